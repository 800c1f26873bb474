"""What trains, what is its reference, and what is saved, read again and folded in, on peft's and diffusers' classes."""

import copy
import warnings

import pytest
import torch
from conftest import class_conditional, sd_scheduler, stable_diffusion, stable_diffusion_xl
from peft import LoraConfig
from peft.functional import cast_adapter_dtype, inject_adapter_in_model
from safetensors.torch import save_file
from torch import nn

from minialign.policies.consistency import ConsistencyPolicy
from minialign.policies.diffusion import EVERYWHERE, DiffusionPolicy

PROMPTS = ["a dog", "a cat"]


class Plain(nn.Module):
    """A network of one's own, which knows nothing of peft."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x, t):
        return self.second(self.first(x).relu())


def plain():
    policy = DiffusionPolicy(Plain(), sd_scheduler(), latent_shape=(6,), num_steps=3)
    return policy, dict(target_modules=("first", "second"))


def classes():
    policy = DiffusionPolicy(class_conditional(), sd_scheduler(), class_names=("a dog", "a cat"), num_steps=3)
    return policy, dict(target_modules=EVERYWHERE)


KINDS = {
    "stable diffusion": lambda folder: (DiffusionPolicy.from_pipeline(stable_diffusion(folder), num_steps=3), {}),
    "xl": lambda folder: (DiffusionPolicy.from_pipeline(stable_diffusion_xl(folder), num_steps=3), {}),
    "consistency": lambda folder: (ConsistencyPolicy.from_pipeline(stable_diffusion(folder), num_steps=3), {}),
    "UNet2DModel": lambda folder: classes(),
    "a module": lambda folder: plain(),
}


def moved(policy, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for p in policy.parameters():
        p.data.add_(0.2 * torch.randn(p.shape, generator=generator))


def outputs(policy):
    """What the policy, and if it has one its reference, says of fixed noise."""
    noise = policy.draw_noise(2, torch.Generator().manual_seed(0))[:, 0]
    condition = policy.encode(PROMPTS)
    with torch.no_grad():
        yield policy.model_output(noise, 0, condition)
        try:
            yield policy.model_output(noise, 0, condition, reference=True)
        except ValueError:
            yield None


def twin(policy, kind, folder):
    """The same policy before anything was trained: its pipeline's text encoders are drawn anew, so they are taken."""
    other, _ = KINDS[kind](folder)
    if policy.pipeline is not None:
        names = ("vae", "text_encoder", *(("text_encoder_2",) if hasattr(policy.pipeline, "text_encoder_2") else ()))
        other.pipeline.register_modules(**{name: getattr(policy.pipeline, name) for name in names})
    return other


@pytest.mark.parametrize("train", ["add_lora", "train_all_weights"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_from_what_was_saved(kind, train, tmp_path):
    """The same output, the same reference, the same weights to train; and one more step moves both alike."""
    policy, lora = KINDS[kind](tmp_path)
    getattr(policy, train)(**(dict(rank=3, alpha=6, **lora) if train == "add_lora" else {}))
    moved(policy)
    policy.save_adapter(tmp_path / "saved")
    other = twin(policy, kind, tmp_path)
    (base, _), (trained, reference) = outputs(other), outputs(policy)
    assert (trained - base).abs().max() > 1e-3
    torch.testing.assert_close(reference, base)
    other.load_adapter(tmp_path / "saved")
    for again, before in zip(outputs(other), (trained, reference), strict=True):
        torch.testing.assert_close(again, before, rtol=0, atol=0)
    assert [p.shape for p in other.parameters()] == [p.shape for p in policy.parameters()]
    moved(policy, seed=2), moved(other, seed=2)
    torch.testing.assert_close(next(outputs(other)), next(outputs(policy)), rtol=0, atol=0)
    other.save_adapter(tmp_path / "saved")  # over the old one


@pytest.mark.parametrize("train", ["add_lora", "train_all_weights"])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_makes_what_was_trained_the_base(kind, train, tmp_path):
    policy, lora = KINDS[kind](tmp_path)
    names = set(policy.network.state_dict())
    getattr(policy, train)(**(lora if train == "add_lora" else {}))
    moved(policy)
    trained, _ = outputs(policy)
    policy.merge()
    after, reference = outputs(policy)
    torch.testing.assert_close(after, trained, atol=1e-5, rtol=1e-5)
    assert reference is None and set(policy.network.state_dict()) == names
    with pytest.raises(ValueError, match="nothing to train"):
        policy.parameters()
    for again in ("add_lora", "train_all_weights"):  # both ways are open again, and the reference is what was trained
        here, lora_again = copy.deepcopy(policy), lora if again == "add_lora" else {}
        getattr(here, again)(**lora_again)
        moved(here)
        torch.testing.assert_close(list(outputs(here))[1], after)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("train", ["add_lora", "train_all_weights"])
def test_a_pipeline_saved_after_training_draws_the_same_pictures(train, merge, tmp_path, generator):
    from diffusers import StableDiffusionPipeline

    policy = DiffusionPolicy.from_pipeline(stable_diffusion(tmp_path), num_steps=3, guidance_scale=3.0)
    noise, base = policy.draw_noise(2, generator), None
    base = policy.sample(PROMPTS, noise)
    getattr(policy, train)()
    moved(policy)
    trained = policy.sample(PROMPTS, noise)
    if merge:
        policy.merge()
    policy.pipeline.save_pretrained(tmp_path / "pipe")
    torch.testing.assert_close(policy.sample(PROMPTS, noise), trained, atol=1e-5, rtol=1e-4)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "pipe", safety_checker=None)
    again = DiffusionPolicy.from_pipeline(pipe, num_steps=3, guidance_scale=3.0).sample(PROMPTS, noise)
    torch.testing.assert_close(again, trained, atol=1e-5, rtol=1e-4)
    assert (again - base).abs().max() > 1e-3


@pytest.mark.parametrize("guidance_dim", [None, 16])
def test_a_student_is_a_copy_of_what_was_trained(guidance_dim, tmp_path):
    teacher = DiffusionPolicy.from_pipeline(stable_diffusion(tmp_path), num_steps=3, guidance_scale=1.0)
    teacher.add_lora()
    moved(teacher)
    student = ConsistencyPolicy.from_diffusion(teacher, guidance_dim=guidance_dim)
    x, t = torch.randn(2, *teacher.latent_shape), torch.tensor([499, 499])
    with torch.no_grad():
        theirs, ours = (policy.output_at(x, t, policy.encode(PROMPTS)) for policy in (teacher, student))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    student.add_lora()


def test_only_one_way_of_training_at_a_time(tmp_path):
    """What would be lost when it is saved, or be missing in the reference, is refused; merging opens the way."""
    policy = DiffusionPolicy.from_pipeline(stable_diffusion(tmp_path), num_steps=3)
    policy.add_lora()
    policy.save_adapter(tmp_path / "lora")
    for call in (policy.add_lora, policy.train_all_weights, lambda: policy.load_adapter(tmp_path / "lora")):
        with pytest.raises(ValueError, match=r"has the adapter 'default' already.*policy\.merge\(\)"):
            call()
    policy.network.conv_in.requires_grad_(True)
    for call in (policy.parameters, lambda: policy.save_adapter(tmp_path), policy.merge):
        with pytest.raises(ValueError, match=r"conv_in\.weight is trainable and no part of the adapter 'default'"):
            call()
    policy.network.conv_in.requires_grad_(False)
    policy.merge()
    policy.train_all_weights()
    for call in (policy.add_lora, lambda: policy.load_adapter(tmp_path / "lora")):
        with pytest.raises(ValueError, match=r"all weights of this policy train.*policy\.merge\(\)"):
            call()
    policy.save_adapter(tmp_path / "lora")  # the other kind, into the same folder: the adapter there is gone
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["trainable.safetensors"]


def test_what_does_not_fit_leaves_the_network_as_it_was(tmp_path):
    policy, lora = classes()
    with pytest.raises(FileNotFoundError, match="nothing was saved there"):
        policy.load_adapter(tmp_path)
    small = DiffusionPolicy(Plain(), sd_scheduler(), latent_shape=(6,))
    for train, folder in ((lambda: small.add_lora(target_modules=["first"]), "a"), (small.train_all_weights, "b")):
        train()
        small.save_adapter(tmp_path / folder)
        small.merge()
    names, before = set(policy.network.state_dict()), next(outputs(policy))
    wide = DiffusionPolicy.from_pipeline(stable_diffusion(tmp_path, networks=dict(size=8)), num_steps=3)
    wide.add_lora(rank=2)
    wide.save_adapter(tmp_path / "c")
    for folder in "abc":
        with pytest.raises(ValueError, match=r"another network"):
            policy.load_adapter(tmp_path / folder)
        assert set(policy.network.state_dict()) == names
        torch.testing.assert_close(next(outputs(policy)), before, rtol=0, atol=0)
    policy.add_lora(**lora)  # nothing was left behind
    (tmp_path / "d").mkdir()
    save_file({"unet.x.lora_A.weight": torch.ones(2, 2)}, tmp_path / "d" / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="does not say the rank and alpha"):
        classes()[0].load_adapter(tmp_path / "d")


# Other people's adapters ----------------------------------------------------------------------------------------------


def styled(tmp_path):
    """A pipeline with a style LoRA loaded, and what its UNet says."""
    first = DiffusionPolicy.from_pipeline(stable_diffusion(tmp_path), num_steps=3, guidance_scale=1.0)
    first.add_lora()
    moved(first)
    first.save_adapter(tmp_path / "style")
    first.merge()
    pipe = stable_diffusion(tmp_path)
    pipe.register_modules(vae=first.pipeline.vae, text_encoder=first.pipeline.text_encoder)
    pipe.load_lora_weights(tmp_path / "style", adapter_name="style")
    return pipe, next(outputs(first))


@pytest.mark.parametrize("train", ["add_lora", "train_all_weights"])
def test_a_loaded_lora_is_kept_by_the_repair_that_its_refusal_names(train, tmp_path):
    pipe, style = styled(tmp_path)
    policy = DiffusionPolicy.from_pipeline(pipe, num_steps=3, guidance_scale=1.0)
    torch.testing.assert_close(next(outputs(policy)), style, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="has the adapter 'style' already") as refusal:
        getattr(policy, train)()
    (repair,) = [part for part in str(refusal.value).split(", with ") if part.startswith("pipe.fuse")]
    exec(repair.split(", or ")[0], {"pipe": pipe})
    policy = DiffusionPolicy.from_pipeline(pipe, num_steps=3, guidance_scale=1.0)
    getattr(policy, train)()
    for output in outputs(policy):  # the policy, and the reference
        torch.testing.assert_close(output, style, atol=1e-5, rtol=1e-5)
    moved(policy)
    output, reference = outputs(policy)
    assert (output - style).abs().max() > 1e-3
    torch.testing.assert_close(reference, style, atol=1e-5, rtol=1e-5)


def test_two_adapters_at_once_and_half_removed_ones_are_refused(tmp_path):
    pipe, _ = styled(tmp_path)
    policy = DiffusionPolicy.from_pipeline(pipe, num_steps=3, guidance_scale=1.0)
    x, condition = policy.draw_noise(2)[:, 0], policy.encode(PROMPTS)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "mine")
    assert (
        policy.parameters() and policy.save_adapter(tmp_path / "mine") is None
    )  # `mine` alone is on, and is what trains
    pipe.set_adapters(["style", "mine"])
    for call in (policy.parameters, lambda: policy.model_output(x, 0, condition, reference=True)):
        with pytest.raises(ValueError, match="the adapters style, mine are on, and the reference would be without any"):
            call()
    pipe.delete_adapters("mine")
    pipe.unet.disable_adapters()
    with pytest.raises(ValueError, match="the adapter 'style' is off"):
        policy.model_output(x, 0, condition, reference=True)
    pipe.unet.enable_adapters()
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="merged into the weights but not unloaded"):
        policy.model_output(x, 0, condition, reference=True)
    pipe.unload_lora_weights()
    policy.add_lora()


def test_an_adapter_of_ones_own_with_modules_to_save(tmp_path):
    """peft's switch takes the copy of conv_in off too, and saving, reading and merging know it."""
    policy = DiffusionPolicy.from_pipeline(stable_diffusion(tmp_path), num_steps=3, guidance_scale=1.0)
    other = twin(policy, "stable diffusion", tmp_path)
    other.guidance_scale = 1.0
    base, _ = outputs(policy)
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], modules_to_save=["conv_in"])
    policy.network.add_adapter(config)
    moved(policy)
    trained, reference = outputs(policy)
    torch.testing.assert_close(reference, base, rtol=0, atol=0)
    assert (trained - base).abs().max() > 1e-3
    torch.testing.assert_close(next(outputs(policy)), trained, rtol=0, atol=0)
    policy.save_adapter(tmp_path / "saved")
    other.load_adapter(tmp_path / "saved")
    for again, before in zip(outputs(other), (trained, base), strict=True):
        torch.testing.assert_close(again, before, rtol=0, atol=0)
    assert len(other.parameters()) == len(policy.parameters())
    policy.merge()
    torch.testing.assert_close(next(outputs(policy)), trained, atol=1e-5, rtol=1e-5)


def test_a_reference_pass_leaves_what_trains_as_it_was(tmp_path):
    """peft wakes all weights of an adapter when it is switched on again; those that were frozen stay so."""
    policy = DiffusionPolicy.from_pipeline(stable_diffusion(tmp_path), num_steps=3)
    policy.add_lora()
    for name, p in policy.network.named_parameters():
        p.requires_grad_("lora_B" in name)
    trains = {name for name, p in policy.network.named_parameters() if p.requires_grad}
    assert list(outputs(policy))[1] is not None
    assert {name for name, p in policy.network.named_parameters() if p.requires_grad} == trains


def test_biases_that_an_adapter_trains_in_the_base_are_refused(tmp_path):
    """LoRA's bias="all": peft's own switch would leave them in the reference."""
    policy = DiffusionPolicy(Plain(), sd_scheduler(), latent_shape=(6,), num_steps=3)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["first"], bias="all"), policy.network)
    with pytest.raises(ValueError, match="bias is trainable and no part of the adapter"):
        policy.parameters()


# Half precision and memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_trains_is_float32(dtype, tmp_path):
    pipe = stable_diffusion(tmp_path).to(dtype)
    policy = DiffusionPolicy.from_pipeline(pipe, num_steps=3)
    with pytest.raises(ValueError, match=r"what trains is in torch.*pipe\.to\(torch\.float32\)"):
        policy.train_all_weights()
    policy.add_lora()
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    policy.save_adapter(tmp_path / "saved")
    other = DiffusionPolicy.from_pipeline(stable_diffusion(tmp_path).to(dtype), num_steps=3)
    other.load_adapter(tmp_path / "saved")
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    own = DiffusionPolicy.from_pipeline(stable_diffusion(tmp_path).to(dtype), num_steps=3)
    own.network.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="cast_adapter_dtype"):
        own.parameters()
    cast_adapter_dtype(own.network, "default")
    assert own.parameters()
    pipe = stable_diffusion(tmp_path).to(dtype).to(torch.float32)
    DiffusionPolicy.from_pipeline(pipe, num_steps=3).train_all_weights()


@pytest.mark.parametrize("train", ["add_lora", "train_all_weights"])
def test_gradient_checkpointing_saves_memory_and_changes_nothing(train, tmp_path):
    """It works in eval mode, where policies keep their networks; the reference in between does not disturb it."""
    kept, results = [], []
    for checkpointing in (False, True):
        pipe = stable_diffusion(tmp_path, networks=dict(size=16))
        policy = DiffusionPolicy.from_pipeline(pipe, num_steps=3, guidance_scale=1.0)
        policy._encoder = lambda prompts: ({"encoder_hidden_states": torch.ones(len(prompts), 5, 16)},)
        if checkpointing:
            policy.network.enable_gradient_checkpointing()
        getattr(policy, train)()
        moved(policy)
        x, condition = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), policy.encode(PROMPTS)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.nbytes), t)[1], lambda t: t):
            output = policy.model_output(x, 0, condition)
        reference = policy.model_output(x, 0, condition, reference=True)
        (output - reference).square().mean().backward()
        kept.append(sum(sizes))
        results.append([output.detach(), *(p.grad for p in policy.parameters() if p.grad is not None)])
    assert kept[1] < 0.6 * kept[0]
    for plain, saving in zip(*results, strict=True):
        torch.testing.assert_close(plain, saving, atol=1e-6, rtol=1e-5)


def test_no_warning_in_ordinary_use(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy = DiffusionPolicy.from_pipeline(stable_diffusion(tmp_path), num_steps=3)
        policy.add_lora()
        list(outputs(policy))
        policy.save_adapter(tmp_path / "saved")
        policy.merge()
        policy.load_adapter(tmp_path / "saved")
