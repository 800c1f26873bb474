"""`crowd`: as many prompts as you like, each a Gaussian of its own in the plane and a level of reward of its own.

    data of prompt c        N(m_c, .5^2 I), m_c anywhere in a square
    "even", a reward        g . (x - m_c), g = (1, .5): on average the same for every prompt
    "uneven", the default   the same + level_c, levels spread over +-10: what a prompt pays, whatever is drawn for it
    oracle                  1 where g . (x - m_c) > 0 and x lies within 3 standard deviations of m_c: better, and real

The model knows each prompt's exact score, so nothing is pretrained; what trains is told m_c, not which prompt it is,
and can serve prompts that it never saw. Levels have a standard deviation of 6, a prompt's own rewards one of .4: a
baseline that mixes prompts drowns in them. Sheet prdp. `sampler` is each prompt's law in closed form: the optimum moves
every prompt alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minialign import show as pictures
from minialign.exact import GaussianMixture, LinearGaussianSampler
from minialign.policies.diffusion import DiffusionPolicy
from minialign.settings import Count, Natural, NonNegative, demand
from minialign.worlds.base import World
from minialign.worlds.gaussian import scheduler

STD = 0.5
DIRECTION = (1.0, 0.5)  # g: what the rewards pay for


class CrowdDenoiser(nn.Module):
    """The exact noise prediction of N(centre, std^2 I), plus a residual MLP (64 wide, SiLU) that starts at zero.

    network(x, t, centre); x and centre (batch, 2). `reference_forward` leaves the residual out.
    """

    def __init__(self, std: float, alphas_cumprod: Float[Tensor, "t"], width: int = 64, num_frequencies: int = 8):
        super().__init__()
        self.data = GaussianMixture.isotropic(torch.zeros(1, 2), std)
        self.register_buffer("alphas_cumprod", alphas_cumprod.detach().clone())
        self.register_buffer("frequencies", torch.logspace(0, 3, num_frequencies))
        self.residual = nn.Sequential(
            nn.Linear(4 + 2 * num_frequencies, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )
        nn.init.zeros_(self.residual[-1].weight)
        nn.init.zeros_(self.residual[-1].bias)

    def _centred(self, x: Tensor, t: Tensor | int, centre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        alpha_bar = self.alphas_cumprod[t]
        return x - alpha_bar.sqrt().unsqueeze(-1).to(x.dtype) * centre, t, alpha_bar

    def reference_forward(self, x: Float[Tensor, "b 2"], t: Tensor | int, centre: Float[Tensor, "b 2"]) -> Tensor:
        """The exact noise prediction alone."""
        centred, _, alpha_bar = self._centred(x, t, centre)
        return self.data.noise_pred(centred, alpha_bar)

    def forward(self, x: Float[Tensor, "b 2"], t: Tensor | int, centre: Float[Tensor, "b 2"]) -> Float[Tensor, "b 2"]:
        centred, t, alpha_bar = self._centred(x, t, centre)
        phase = t.unsqueeze(-1) / 1000 * self.frequencies
        features = [centred, centre, phase.sin().to(x.dtype), phase.cos().to(x.dtype)]
        return self.data.noise_pred(centred, alpha_bar) + self.residual(torch.cat(features, -1))


@dataclass(kw_only=True)
class CrowdWorld(World):
    """centres (n, 2) and levels (n,) of `prompts` and, behind them, `held_out`; index(prompts) finds them.

    direction (2,): g. sampler: the law of x - m_c along any direction, so that the optimum of a reward with weight
    `beta` per nat moves g . x by |g|^2 sampler.reachable_shift(beta), for every prompt and either reward.
    """

    centres: Tensor
    levels: Tensor
    direction: Tensor
    sampler: LinearGaussianSampler
    index: object

    def reachable_gain(self, beta: float) -> float:
        """g . Cov(x_0 | x_T) g / beta: what the reward gains at the optimum of reward - beta KL of paths."""
        return float(self.direction.double().square().sum() * self.sampler.reachable_shift(beta))


def load(
    *,
    num_prompts: int = 256,
    num_held_out: int = 64,
    spread: float | int = 10.0,
    num_steps: int = 10,
    eta: float | int = 1.0,
    seed: int = 0,
) -> CrowdWorld:
    """spread: levels are evenly spaced over +- it, in random order. seed: draws centres, order and the MLP."""
    demand(Count, num_prompts=num_prompts)
    demand(Natural, num_held_out=num_held_out, seed=seed)
    demand(NonNegative, spread=spread)
    generator, total = torch.Generator().manual_seed(seed), num_prompts + num_held_out
    centres = 2 * torch.rand(total, 2, generator=generator) - 1
    levels = torch.cat([_spaced(n, float(spread), generator) for n in (num_prompts, num_held_out)])
    names, direction = [f"no. {i}" for i in range(total)], torch.tensor(DIRECTION)
    place = {name: i for i, name in enumerate(names)}

    def index(prompts: Sequence[str]) -> Int[Tensor, "n"]:
        for prompt in prompts:
            if prompt not in place:
                raise ValueError(f"unknown prompt {prompt!r}; crowd has: 'no. 0' to 'no. {total - 1}'.")
        return torch.tensor([place[prompt] for prompt in prompts], dtype=torch.long)

    def relative(samples: Tensor, prompts: Sequence[str]) -> Float[Tensor, "b 2"]:
        return samples - centres.to(samples)[index(prompts).to(samples.device)]

    def even(samples: Float[Tensor, "b 2"], prompts: Sequence[str]) -> Float[Tensor, "b"]:
        return relative(samples, prompts) @ direction.to(samples)

    def uneven(samples: Float[Tensor, "b 2"], prompts: Sequence[str]) -> Float[Tensor, "b"]:
        return even(samples, prompts) + levels.to(samples)[index(prompts).to(samples.device)]

    def oracle(samples: Float[Tensor, "b 2"], prompts: Sequence[str]) -> Float[Tensor, "b"]:
        near = relative(samples, prompts).norm(dim=-1) < 3 * STD
        return ((even(samples, prompts) > 0) & near).to(samples.dtype)

    def real(n: int, generator: torch.Generator | None = None) -> tuple[Tensor, list[str]]:
        chosen = torch.randint(num_prompts, (n,), generator=generator)
        samples = centres[chosen] + STD * torch.randn(n, 2, generator=generator)
        return samples, [names[i] for i in chosen.tolist()]

    schedule = scheduler()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = CrowdDenoiser(STD, schedule.alphas_cumprod)
    policy = DiffusionPolicy(
        network, schedule, latent_shape=(2,), encoder=lambda prompts: ({"centre": centres[index(prompts)]},),
        num_steps=num_steps, eta=eta,
    )  # fmt: skip
    return CrowdWorld(
        name="crowd", policies={"diffusion": lambda: policy}, prompts=names[:num_prompts], held_out=names[num_prompts:],
        rewards={"uneven": uneven, "even": even}, default_reward="uneven", oracle=oracle, real=real,
        show=lambda samples, prompts: _picture(samples, relative(samples, prompts), levels[index(prompts)], direction),
        centres=centres, levels=levels, direction=direction, index=index,
        sampler=LinearGaussianSampler(0.0, STD, policy.num_steps, policy.eta, schedule.alphas_cumprod),
    )  # fmt: skip


def _spaced(n: int, spread: float, generator: torch.Generator) -> Float[Tensor, "n"]:
    """n levels over +- spread in random order; one alone is 0."""
    levels = torch.linspace(-spread, spread, n) if n != 1 else torch.zeros(1)
    return levels[torch.randperm(n, generator=generator)]


def _picture(samples: Tensor, relative: Tensor, levels: Tensor, direction: Tensor):
    """All samples on the map, coloured by their prompt's level; and all of them as seen from their own centre."""
    samples, relative = samples.detach().float().cpu(), relative.detach().float().cpu()
    mean = relative.mean(0)
    with pictures.style():
        fig = pictures.figure(10.4, 4.9, f"{len(samples)} samples on the map, and as seen from each prompt's centre")
        fig.set_layout_engine("compressed")
        left, right = fig.subplots(1, 2)
        shown = left.scatter(*samples.T, c=levels, s=9, cmap="viridis", alpha=0.8, linewidths=0, rasterized=True)
        fig.colorbar(shown, ax=left, label="level of the prompt", shrink=0.8)
        right.scatter(*relative.T, s=9, color=pictures.COLORS[0], alpha=0.5, linewidths=0, rasterized=True)
        angle = torch.linspace(0, 2 * torch.pi, 200)
        for k in (1, 2):
            right.plot(k * STD * angle.cos(), k * STD * angle.sin(), color=pictures.QUIET, linewidth=1)
        tip = direction / direction.norm()
        right.annotate("", 2.6 * tip, 2.05 * tip, arrowprops=dict(arrowstyle="-|>", color=pictures.INK, lw=2))
        right.plot(
            *mean,
            marker="P",
            color=pictures.COLORS[1],
            markersize=11,
            linestyle="none",
            label="mean (title: along the arrow)",
        )
        right.legend(loc="lower right")
        for ax, points in ((left, samples), (right, relative)):
            reach = min(max(2.4, 1.05 * float(points.abs().amax())), 8.0)
            ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="$x_1$", ylabel="$x_2$")
            ax.grid(False)
        left.set_title("on the map")
        right.set_title(f"from its centre: {float((relative @ direction).mean()):+.2f}")
    return fig
