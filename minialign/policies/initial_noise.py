"""The initial noise as the one action of an episode: a frozen sampler, and for each prompt a Gaussian of its own.

    NoisePolicy(policy, prompts)      noise of N(mean_c, diag(std_c)^2) for prompt c, N(0, I) at first; policy is frozen
    noise_log_prob, noise_kl          the density of a noise, and the KL of its law to N(0, I): nothing else is learned

What follows the noise, the sampler, is a black box. Where it is deterministic (eta = 0), which noise and which sample
are the same question.
"""

import json
from collections.abc import Hashable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minialign.kernels import diagonal_log_prob, standard_normal_kl
from minialign.statistics import key_of

LAWS = "initial_noise.safetensors"
SAMPLER = ("num_steps", "eta", "guidance_scale")  # what a law was learned for
SHARED = (
    "network", "num_steps", "timesteps", "latent_shape", "state_dtype", "device", "encode", "draw_noise", "decode",
)  # fmt: skip


class NoisePolicy:
    """A denoising policy that is frozen, in place, and learns `mean` and `log_std`, (prompts, *latent), of its noise.

    sampler: the wrapped policy (a DiffusionPolicy, a ConsistencyPolicy). prompts: those that get a law of their own;
    any other one keeps N(0, I), so it is drawn as before. The random numbers of a sample stay `draw_noise`'s: the law
    of its prompt moves the first of them, so the same numbers can be compared before and after.
    """

    def __init__(self, policy, prompts: Sequence[Hashable]):
        if not hasattr(policy, "draw_noise") or isinstance(policy, NoisePolicy):
            raise ValueError(
                f"the policy is a {type(policy).__name__}; expected one that denoises, to learn its noise."
            )
        policy.encode(prompts)  # refuses what is no list of prompts, and prompts that it does not know
        self.sampler, self.prompts = policy, list(dict.fromkeys(prompts))
        policy.network.requires_grad_(False)
        shape = (len(self.prompts), *policy.latent_shape)
        self.mean, self.log_std = (
            nn.Parameter(torch.zeros(shape, dtype=policy.state_dtype, device=policy.device)) for _ in range(2)
        )
        self._row_of = {prompt: row for row, prompt in enumerate(self.prompts)}

    def __getattr__(self, name: str):
        if name in SHARED:
            return getattr(self.sampler, name)
        raise AttributeError(f"a NoisePolicy has no {name!r}; its `sampler` may have.")

    @property
    def network_evaluations(self) -> int:
        return self.sampler.network_evaluations

    @network_evaluations.setter
    def network_evaluations(self, value: int) -> None:
        self.sampler.network_evaluations = value

    def parameters(self) -> list[nn.Parameter]:
        return [self.mean, self.log_std]

    def to(self, device: torch.device | str) -> "NoisePolicy":
        """Moves the sampler and the laws, in place."""
        self.sampler.to(device)
        for parameter in self.parameters():
            parameter.data = parameter.data.to(self.device)
        return self

    # ---------------------------------------------------------------- the laws

    def rows(self, prompts: Sequence[Hashable]) -> Int[Tensor, "n"]:
        """Each prompt's row in `mean` and `log_std`; -1 for one that has no law."""
        return torch.tensor([self._row_of.get(prompt, -1) for prompt in prompts], device=self.device)

    def shifted(self, prompts: Sequence[Hashable], noise: Float[Tensor, "n s *latent"]) -> Float[Tensor, "n s *latent"]:
        """`draw_noise`'s numbers with the first of each row, z, moved to mean + std z of its prompt. Detached."""
        rows = self.rows(prompts)
        known, noise = rows >= 0, noise.detach().clone()
        mean, std = self.mean.detach()[rows[known]], self.log_std.detach()[rows[known]].exp()
        noise[known, 0] = mean + std * noise[known, 0]
        return noise

    def noise_log_prob(
        self, latents: Float[Tensor, "n *latent"], rows: Int[Tensor, "n"], reduction: str
    ) -> Float[Tensor, "n"]:
        """log N(latents; mean, diag(std)^2) of the laws in `rows`. The latents are data, so its gradient is a score."""
        return diagonal_log_prob(latents.detach(), self.mean[rows], self.log_std[rows], reduction)

    def noise_kl(self, rows: Int[Tensor, "n"], reduction: str) -> Float[Tensor, "n"]:
        """KL(law || N(0, I)) of the laws in `rows`, nats (an element under "mean"); of row -1, no law, it is 0."""
        return standard_normal_kl(self.mean[rows], self.log_std[rows], reduction) * (rows >= 0)

    # ---------------------------------------------------------------- samples

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Hashable], noise: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Decoded samples, one a prompt, each from its prompt's noise; noise: as from `draw_noise`, not yet moved."""
        noise = self.draw_noise(len(prompts), generator) if noise is None else noise
        return self.sampler.sample(prompts, self.shifted(prompts, noise))

    def latents(self, prompts: Sequence[Hashable], generator: torch.Generator | None = None) -> Tensor:
        """Initial noise (n, *latent) as pipelines take it: `pipe(prompts, latents=policy.latents(prompts))`."""
        return self.shifted(prompts, self.draw_noise(len(prompts), generator)[:, :1])[:, 0]

    # ---------------------------------------------------------------- saving

    def _belongs_to(self) -> dict[str, float]:
        return {name: float(getattr(self.sampler, name)) for name in SAMPLER if hasattr(self.sampler, name)}

    def save_adapter(self, folder: str | Path) -> None:
        """Writes `initial_noise.safetensors`: mean and std, (prompts, *latent) each; whose they are."""
        from safetensors.torch import save_file

        Path(folder).mkdir(parents=True, exist_ok=True)
        laws = {"mean": self.mean.detach(), "std": self.log_std.detach().exp()}
        about = {"prompts": json.dumps([key_of(p) for p in self.prompts]), "sampler": json.dumps(self._belongs_to())}
        save_file({name: law.contiguous().cpu() for name, law in laws.items()}, Path(folder) / LAWS, about)

    def load_adapter(self, folder: str | Path) -> None:
        """What `save_adapter` wrote, for the prompts of this policy, in place.

        Raises ValueError, and changes nothing, for laws of another sampler, of latents of another shape, or of other
        prompts; FileNotFoundError where there is nothing.
        """
        from safetensors import safe_open

        path = Path(folder) / LAWS
        if not path.exists():
            raise FileNotFoundError(f"{folder} has no {LAWS}: nothing was saved there.")
        with safe_open(path, "pt") as file:
            about, laws = file.metadata(), {name: file.get_tensor(name) for name in ("mean", "std")}
        sampler = json.loads(about["sampler"])
        if sampler != self._belongs_to():
            raise ValueError(
                f"{path} was learned with the sampler {sampler}, and this one is {self._belongs_to()}: the same noise "
                "becomes another sample. Set the policy as it was."
            )
        saved = json.loads(about["prompts"])
        missing = [prompt for prompt in self.prompts if key_of(prompt) not in saved]
        if missing:
            raise ValueError(f"{path} has no law for the prompt {missing[0]!r}; it has: {', '.join(saved)}.")
        if laws["mean"].shape[1:] != self.mean.shape[1:]:
            shapes = tuple(laws["mean"].shape[1:]), tuple(self.mean.shape[1:])
            raise ValueError(f"{path} has latents of shape {shapes[0]}, and this policy {shapes[1]}: of another model.")
        rows = [saved.index(key_of(prompt)) for prompt in self.prompts]
        with torch.no_grad():
            self.mean.copy_(laws["mean"][rows])
            self.log_std.copy_(laws["std"][rows].log())
