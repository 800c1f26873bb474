"""Pictures of the Gaussian worlds: samples in the plane over the data's density, samples of the line as a histogram."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from minialign import show as pictures
from minialign.exact import GaussianMixture


def plane(mixture: GaussianMixture, mode_of: Callable[[Tensor], Tensor], oracle: Callable) -> Callable:
    """show(samples, prompts): a panel for each prompt, a colour for each mode, the data's density as lines.

    mode_of(samples) -> (batch,) int; oracle: what a panel's title counts as right.
    """
    reach = float(mixture.means.abs().amax() + 4 * mixture.values.amax().sqrt())

    def show(samples: Float[Tensor, "b 2"], prompts: Sequence[str]):
        samples, unique = samples.detach().float().cpu(), list(dict.fromkeys(prompts))
        limits = min(max(reach, 1.05 * float(samples.abs().amax())), 2 * reach)
        with pictures.style():
            label = f"{len(samples)} samples of the plane, coloured by mode"
            fig = pictures.figure(0.6 + 4.2 * len(unique), 4.9, label)
            fig.set_layout_engine("compressed")
            axes = fig.subplots(1, len(unique), squeeze=False, sharex=True, sharey=True)[0]
            for ax, prompt in zip(axes, unique, strict=True):
                rows = torch.tensor([i for i, name in enumerate(prompts) if name == prompt])
                _draw_panel(ax, samples[rows], mixture, mode_of(samples[rows]), limits)
                right = float(oracle(samples[rows], [prompt] * len(rows)).mean())
                ax.set(title=f"{prompt}: {right:.0%} right", xlabel="$x_1$")
            axes[0].set_ylabel("$x_2$")
        return fig

    return show


def _draw_panel(ax, samples: Tensor, mixture: GaussianMixture, mode: Tensor, limits: float) -> None:
    axis = torch.linspace(-limits, limits, 161)
    density = mixture.log_prob(torch.cartesian_prod(axis, axis)).exp().reshape(161, 161).T
    levels = [float(density.max()) * share for share in (0.02, 0.15, 0.5)]
    ax.contour(axis, axis, density, levels=levels, colors=pictures.QUIET, linewidths=0.8, alpha=0.7, zorder=1)
    for m in mode.unique().tolist():
        color = pictures.COLORS[m % len(pictures.COLORS)]
        ax.scatter(*samples[mode == m].T, s=9, color=color, alpha=0.55, linewidths=0, zorder=2, rasterized=True)
    ax.set(xlim=(-limits, limits), ylim=(-limits, limits), aspect="equal")
    ax.grid(False)


def line(mixture: GaussianMixture) -> Callable:
    """show(samples, prompts): a histogram of the samples, and the data's density."""

    def show(samples: Float[Tensor, "b 1"], prompts: Sequence[str]):
        samples = samples.detach().float().cpu().squeeze(-1)
        centre, spread = float(mixture.means), float(mixture.values.sqrt())
        low = min(centre - 4 * spread, float(samples.min()))
        high = max(centre + 4 * spread, float(samples.max()))
        axis = torch.linspace(low, high, 400)
        with pictures.style():
            fig = pictures.figure(5.6, 3.6, f"{len(samples)} samples of the line")
            fig.set_layout_engine("constrained")
            ax = fig.add_subplot()
            look = {"color": pictures.COLORS[0], "alpha": 0.5, "label": "samples"}
            ax.hist(samples, bins=60, range=(low, high), density=True, **look)
            ax.plot(axis, mixture.log_prob(axis.unsqueeze(-1)).exp(), color=pictures.INK, label="data")
            ax.set(xlabel="$x$", ylabel="density", title=f"mean {samples.mean():.2f}, sd {samples.std():.2f}")
            ax.legend()
        return fig

    return show
