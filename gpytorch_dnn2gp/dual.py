"""Dual data: the regression whose posterior is the Laplace approximation (Theorem 1), or the next iterate (Theorem 2).

    paper                       here                      shape
    J_*(x_i)                    rows U_i                  (n, m, P)
    r_i, Lambda_i               v, D  (laplace.py)        (n, m), (n, m, m)
    y~_i = J_i w* - Lam^-1 r_i  DualData.targets          (n, m)

Of a training iterate w* is the mean mu_t, Lambda^-1 r is multiplied by alpha / beta (``Splitting.pull``), Lambda by
``beta (n / |B|) / S'`` (``Splitting.weight``), and there is one row for each example and sample.

The GP that explains these targets, ``y~ = f + e``, ``f ~ GP(0, J S0 J^T)``, ``e ~ N(0, Lambda^-1)``, has the
Laplace-GGN posterior. Shifted by ``c(x) = f_w*(x) - J(x) w*`` (targets and prior mean alike) it is the same GP in
output form: targets ``z_i = f_w*(x_i) - Lambda_i^-1 r_i``, for a Gaussian loss the labels themselves.

The targets are for reporting and for other people's regression code. Nothing in this package solves with Lambda: a
softmax has none to invert (constant vectors are in its null space), and a saturated one overflows. The pseudo-inverse
used here for a softmax is exact in this one place, since r has no component in that null space.

n examples, m rows per example (m = K outputs, 1 for "gradient" features). Read laplace.py first, solvers.py next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .laplace import Splitting
from .losses import Categorical
from .numerics import LOG_2PI, first_index


@dataclass(frozen=True)
class DualData:
    """Targets and noise of the linear model at a trained net.

    Attributes:
        inputs: ``(n, d)``.
        targets: paper's ``y~``, ``(n, m)``.
        noise_precision: Lambda, ``(n, m, m)``; singular for a softmax.
    """

    inputs: Tensor
    targets: Tensor
    noise_precision: Tensor


def dual_targets(splitting: Splitting, rows_times_w: Tensor) -> Tensor:
    """``U w - D^+ v``, ``(n, m)`` (Theorem 1; paper eq. 8).

    Args:
        splitting: v and D at the mode.
        rows_times_w: ``U_i w*``, ``(n, m)``.
    """
    if splitting.features == "gradient":  # in the paper's scaling, phi = s U: phi^T w - 1
        return splitting.noise_scale * rows_times_w - splitting.pull
    return rows_times_w - splitting.pull * newton_offset(splitting)


def noise_precision(splitting: Splitting) -> Tensor:
    """D, ``(n, m, m)``."""
    if splitting.features == "gradient":
        return splitting.f.new_full((len(splitting.f), 1, 1), splitting.weight)
    return splitting.loss.noise_precision(splitting.f, splitting.y) * (splitting.weight / splitting.temperature)


def newton_offset(splitting: Splitting) -> Tensor:
    """``Lambda^+ r``, ``(n, K)``: how far each example would move its outputs.

    Raises:
        ValueError: where Lambda is singular for another reason than a softmax's constant vector, or so close to it
            that the result overflows.
    """
    loss, f, y = splitting.loss, splitting.f, splitting.y
    r = loss.residual(f, y)
    if isinstance(loss, Categorical):
        # diag(p) z - p p^T z = r and 1^T z = 0 are solved by z = r/p - mean(r/p)
        ratio = r / torch.softmax(f, -1)
        offset = ratio - ratio.mean(-1, keepdim=True)
    else:
        factor, info = torch.linalg.cholesky_ex(loss.noise_precision(f, y))
        offset = torch.cholesky_solve(r[..., None], factor)[..., 0]
        offset = offset.masked_fill((info != 0)[..., None], torch.nan)
    bad = ~torch.isfinite(offset).all(-1)
    if bad.any():
        raise ValueError(
            f"The noise precision of {int(bad.sum())} of {len(f)} examples, first at index {first_index(bad)}, is "
            "singular to working precision (saturated outputs), so these have no target. The posterior, predict() and "
            "the Laplace evidence need none."
        )
    return offset


def log_normalizer(splitting: Splitting) -> Tensor:
    """``sum_i log N(y~_i; U_i w*, D_i^-1)``: the data term of the GP evidence.

    Raises:
        ValueError: where D is singular, as a softmax's always is: the density of such targets is improper.
    """
    n = splitting.f.shape[-2]
    if splitting.features == "gradient":
        each = splitting.weight * splitting.pull**2 - math.log(splitting.weight) + LOG_2PI
        return splitting.f.new_tensor(-0.5 * n * each)
    if isinstance(splitting.loss, Categorical) or not splitting.loss.invertible:
        raise ValueError(
            f"The GP evidence of {splitting.loss} does not exist: its noise precision is singular, so the density of "
            "the targets is improper. Use the Laplace evidence, log_evidence(kind='laplace')."
        )
    offset = splitting.pull * newton_offset(splitting)
    factor = torch.linalg.cholesky(noise_precision(splitting))
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum((-2, -1))
    return 0.5 * (log_det - (offset * splitting.v).sum((-2, -1)) - n * offset.shape[-1] * LOG_2PI)
