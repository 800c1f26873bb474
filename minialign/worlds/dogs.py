"""A subject in four dimensions: what a thing is, and where it is, each two numbers.

    base      x = (identity, context): identity N(0, I), context N(m_c, .25^2 I), m_c one of four places
    prompts   "a dog on the moon", "a [V] dog on the moon", "a dog": to the base the word [V] means nothing
    subject   identity near (1.5, 1): four references, all of them on the beach, to the prompt "a [V] dog"
    S_I       exp(-|identity - v|^2)       S_T    exp(-|context - m_c|^2)

Trained on the references alone, a model can learn who [V] is, or that a [V] dog is on the beach. Sheet rpo_subject.
"""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minialign.exact import GaussianMixture
from minialign.kernels import add_noise
from minialign.policies.diffusion import DiffusionPolicy
from minialign.settings import demand
from minialign.subjects import SubjectTask
from minialign.worlds.exact_denoiser import ExactDenoiser
from minialign.worlds.gaussian import scheduler

PLACES = {"on the beach": (1.0, 1.0), "in the snow": (-1.0, 1.0), "on the moon": (-1.0, -1.0), "at home": (1.0, -1.0)}
STD = 0.25  # of the context, around its place
SUBJECT = (1.5, 1.0)
SUBJECT_STD = 0.1
TOKEN = "[V]"
NAMES = [f"a {word}dog{place}" for word in ("", f"{TOKEN} ") for place in (*(f" {p}" for p in PLACES), "")]


class WordsMLP(nn.Module):
    """A small MLP of (x, t, words of the prompt): place, one of four or none, and whether [V] is there.

    So that what it learns of [V] in one prompt, it says in the others too. labels index NAMES. zero: its last layer is
    zero, as a residual's must be.
    """

    def __init__(self, train_steps: int, dim: int = 4, width: int = 128, num_frequencies: int = 8, zero: bool = False):
        super().__init__()
        self.train_steps = train_steps
        self.register_buffer("frequencies", torch.logspace(0, 2, num_frequencies))
        places = torch.eye(len(PLACES) + 1)[:, :-1]
        words = torch.cat([torch.cat([places, torch.full((len(places), 1), v)], 1) for v in (0.0, 1.0)])
        self.register_buffer("words", words)
        self.net = nn.Sequential(
            nn.Linear(dim + 2 * num_frequencies + words.shape[1], width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, dim),
        )
        if zero:
            nn.init.zeros_(self.net[-1].weight)
            nn.init.zeros_(self.net[-1].bias)

    def forward(self, x: Float[Tensor, "b d"], t: Tensor | int, class_labels: Int[Tensor, "b"]) -> Float[Tensor, "b d"]:
        phase = torch.as_tensor(t, device=x.device).expand(len(x)).unsqueeze(-1) / self.train_steps * self.frequencies
        parts = [x, phase.sin().to(x.dtype), phase.cos().to(x.dtype), self.words[class_labels].to(x.dtype)]
        return self.net(torch.cat(parts, -1))


def fit(network: WordsMLP, exact: ExactDenoiser, updates: int = 2000, rows: int = 256, seed: int = 0) -> None:
    """Teaches the network what the exact one says, of every prompt alike; about four seconds."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        labels = torch.randint(len(NAMES), (rows,), generator=generator)
        t = torch.randint(len(exact.alphas_cumprod), (rows,), generator=generator)
        data = exact.mixture.sample(rows, generator, exact.class_log_weights[labels])[0]
        states = add_noise(data, torch.randn(rows, 4, generator=generator), exact.alphas_cumprod[t])
        loss = (network(states, t, labels) - exact(states, t, labels)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()


class Dogs(NamedTuple):
    """policy: the base, exact, its residual ready to train. task: the subject to teach it."""

    policy: DiffusionPolicy
    task: SubjectTask


def image_similarity(samples: Float[Tensor, "b 4"], prompts: Sequence[str]) -> Float[Tensor, "b"]:
    """S_I = exp(-|identity - v|^2), whatever the prompt."""
    return (-(samples[:, :2] - samples.new_tensor(SUBJECT)).square().sum(1)).exp()


def text_similarity(samples: Float[Tensor, "b 4"], prompts: Sequence[str]) -> Float[Tensor, "b"]:
    """S_T = exp(-|context - m_c|^2); 1 where the prompt names no place. The base has 0.89 on average."""
    places = [next((m for place, m in PLACES.items() if prompt.endswith(place)), None) for prompt in prompts]
    named = torch.tensor([m is not None for m in places], device=samples.device)
    centres = samples.new_tensor([m or (0.0, 0.0) for m in places])
    return torch.where(named, (-(samples[:, 2:] - centres).square().sum(1)).exp(), 1.0)


@functools.cache
def _base(seed: int) -> dict[str, Tensor]:
    """Weights of a learned base."""
    exact, schedule = _exact()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = WordsMLP(len(schedule.alphas_cumprod))
    fit(network, exact, seed=seed)
    return network.state_dict()


def _exact(residual: nn.Module | None = None):
    means = torch.cat([torch.zeros(len(PLACES), 2), torch.tensor(list(PLACES.values()))], 1)
    covariance = torch.diag(torch.tensor([1.0, 1.0, STD**2, STD**2]))
    mixture, schedule = GaussianMixture(means, covariance.expand(len(means), -1, -1)), scheduler("cosine")
    rows = torch.cat([torch.eye(len(PLACES)), torch.ones(1, len(PLACES))]).bool()
    return ExactDenoiser(mixture, schedule.alphas_cumprod, residual, class_components=rows.repeat(2, 1)), schedule


def load(
    seed: int = 0, base: str = "learned", num_references: int = 4, num_steps: int = 20, eta: float | int = 1.0
) -> Dogs:
    """The base and a subject's references; seed draws both.

    base: "learned", a small MLP that has been taught what is exact, so that it can forget; or "exact", the formula and
    a residual, which cannot.
    """
    demand(Literal["learned", "exact"], base=base)
    schedule = scheduler("cosine")
    steps = len(schedule.alphas_cumprod)
    if base == "learned":
        network = WordsMLP(steps)
        network.load_state_dict(_base(seed))
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = _exact(WordsMLP(steps, zero=True))[0]
    policy = DiffusionPolicy(network, schedule, latent_shape=(4,), class_names=NAMES, num_steps=num_steps, eta=eta)
    if base == "learned":
        policy.train_all_weights()
    beach, *others = PLACES
    generator = torch.Generator().manual_seed(seed)
    centre, spread = torch.tensor([*SUBJECT, *PLACES[beach]]), torch.tensor([SUBJECT_STD, SUBJECT_STD, STD, STD])
    references = centre + spread * torch.randn(num_references, 4, generator=generator)
    prompts = [f"a {TOKEN} dog {place}" for place in others]
    similarities = image_similarity, text_similarity
    return Dogs(policy, SubjectTask(references, f"a {TOKEN} dog", prompts, ["a dog"], prompts, similarities, TOKEN))
