"""Where an evaluation is largest, as a function of a few settings: read off finished runs, or searched by new ones.

fit_proxy_points    the peak of a polynomial fitted along training runs (Moskovitz et al., 2023, arXiv 2310.04373)
nelder_mead         the simplex search of Nelder and Mead (1965), from a given simplex
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def fit_proxy_points(
    values: Float[Tensor, "m n"], evaluation: Float[Tensor, "m"], degree: int = 10
) -> Float[Tensor, "n"]:
    """theta: where a polynomial of that total degree, fitted to the evaluation along training runs, is largest.

    Least squares weighted by a Gaussian kernel density estimate of the values, as in the paper: where runs went often,
    the fit counts. The maximum is sought among the values themselves: runs are curves in the plane of two rewards, and
    beside its data a polynomial of degree 10 says anything (a hundred times the largest evaluation, in our world).
    """
    import numpy as np
    from scipy.stats import gaussian_kde
    from sklearn.preprocessing import PolynomialFeatures

    x, y = values.double().cpu().numpy(), evaluation.double().cpu().numpy()
    scaled = 2 * (x - x.min(0)) / np.ptp(x, 0) - 1
    root, basis = np.sqrt(gaussian_kde(scaled.T)(scaled.T)), PolynomialFeatures(degree).fit_transform(scaled)
    coefficients = np.linalg.lstsq(root[:, None] * basis, root * y, rcond=1e-8)[0]
    return torch.from_numpy(x[(basis @ coefficients).argmax()])


def nelder_mead(evaluate: Callable, simplex: Float[Tensor, "n1 n"], max_evaluations: int = 20):
    """(best theta, its value, all (theta, value) in order): scipy's Nelder-Mead on -evaluate, from a given simplex.

    evaluate(theta: list) -> larger is better: the evaluation after training with thresholds theta. Cold start: it
    resets the policy each time. Warm start, the paper's: it goes on from where the last one stopped, and then measures
    a policy that has not reached its thresholds. Reflection 1, expansion 2, contraction and shrinking .5, as there. Not
    as there: a reflected point between the second worst and the worst is contracted towards, and nothing is cached.
    """
    from scipy.optimize import minimize

    seen: list[tuple[list[float], float]] = []

    def objective(theta) -> float:
        seen.append((theta.tolist(), float(evaluate(theta.tolist()))))
        return -seen[-1][1]

    start = simplex.double().cpu().numpy()
    options = {"initial_simplex": start, "maxfev": max_evaluations, "xatol": 0.0, "fatol": 0.0}
    minimize(objective, start[0], method="Nelder-Mead", options=options)
    best = max(seen, key=lambda pair: pair[1])
    return best[0], best[1], seen
