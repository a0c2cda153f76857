"""MAP training of a user's net: the minimum that the Laplace approximation is taken at.

    L(w) = sum_i l(y_i, f_w(x_i)) + sum_g delta_g |w_g|^2 / 2        (paper eq. 1)

Unlike everything else in the package, these functions change the net they are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from . import tiling
from .linearize import select_parameters
from .losses import Loss
from .numerics import require_finite, require_positive
from .weights import weight_groups

METHODS = ("adam", "lbfgs")


@dataclass(frozen=True)
class Fit:
    """What :func:`fit` did.

    Attributes:
        objective: L(w) after each epoch (Adam: the running value of its batches) or evaluation (L-BFGS).
        gradient_norm: ``|grad L|`` at the end, over all data.
        converged: whether it is below the tolerance.
    """

    objective: list[float]
    gradient_norm: float
    converged: bool

    def __repr__(self) -> str:
        end = f"{self.objective[-1]:.6g}" if self.objective else "none"
        return f"Fit(objective {end} after {len(self.objective)}, gradient norm {self.gradient_norm:.2e})"


def fit(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Loss,
    prior_precision: float | Sequence[float] | Tensor = 1.0,
    groups: Sequence[str | Sequence[str]] | None = None,
    method: str = "lbfgs",
    max_iterations: int = 1000,
    gradient_tolerance: float = 1e-4,
    lr: float = 1e-2,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> Fit:
    """Train ``net`` in place to a minimum of L(w).

    Args:
        net: trained in place, on the parameters that require a gradient; its mode is restored at the end.
        x: inputs as the net takes them, ``(n, ...)``.
        y: labels as the loss takes them.
        loss: from ``losses``.
        prior_precision, groups: as in :class:`LaplaceGP`.
        method: "lbfgs" (scipy, all data at once, net in eval mode) for small nets and data: reaches a stationary point.
            "adam": minibatches, net in train mode, learning rate decayed to zero by a cosine.
        max_iterations: of L-BFGS, or epochs of Adam.
        gradient_tolerance: of ``|grad L|``, below which L-BFGS stops.
        lr, batch_size, generator: of Adam; ``batch_size=None`` takes all data.
        progress: True, False, or None for a bar on terminals only.

    If interrupted, the net keeps the weights it has reached.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}; got {method!r}.")
    names = select_parameters(net, None)
    parameters = dict(net.named_parameters())
    weights = [parameters[name] for name in names]
    delta = torch.as_tensor(prior_precision).to(weights[0])
    require_positive(delta, "prior_precision")
    partition = weight_groups(names, [w.numel() for w in weights], groups, delta.numel())
    precision = delta.reshape(-1).expand(len(partition))[partition.index(weights[0].device)]
    require_finite(x, "x", "Remove or impute these rows first.")
    was_training = net.training
    try:
        net.eval()
        with torch.no_grad():
            f = _outputs(net, x[:1])
        y = loss.check_labels(y, f.shape[-1], len(x), f.dtype, f.device)
        run = _lbfgs if method == "lbfgs" else _adam
        objective = run(
            net, weights, precision, x, y, loss, max_iterations, gradient_tolerance, lr, batch_size, generator, progress
        )
        net.eval()
        _, gradient = _objective(net, weights, precision, x, y, loss)
        norm = float(gradient.norm())
        return Fit(objective, norm, norm <= gradient_tolerance)
    finally:
        net.train(was_training)


def _outputs(net: nn.Module, x: Tensor) -> Tensor:
    out = net(x)
    return out[:, None] if out.dim() == 1 else out


def _objective(net, weights, precision, x, y, loss) -> tuple[Tensor, Tensor]:
    """L(w) and its gradient over all data, without touching any ``.grad``."""
    with torch.enable_grad():
        value = loss.negative_log_likelihood(_outputs(net, x), y).sum()
        value = value + 0.5 * (precision * _flat(weights).square()).sum()
        gradient = torch.autograd.grad(value, weights, materialize_grads=True)
    return value.detach(), _flat(gradient)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


@torch.no_grad()
def _assign(weights: Sequence[Tensor], flat: Tensor) -> None:
    for w, piece in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
        w.copy_(piece.view_as(w))


def _lbfgs(net, weights, precision, x, y, loss, max_iterations, tolerance, lr, batch_size, generator, progress):
    history: list[float] = []
    best = [np.inf, _flat(weights).detach().clone()]
    bar = tiling.progress(None, "L-BFGS", progress, unit=" evaluations")

    def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
        _assign(weights, torch.as_tensor(values).to(weights[0]))
        value, gradient = _objective(net, weights, precision, x, y, loss)
        history.append(float(value))
        if history[-1] < best[0]:
            best[:] = [history[-1], _flat(weights).detach().clone()]
        bar.update()
        bar.set_postfix(objective=f"{history[-1]:.6g}")
        return history[-1], gradient.double().cpu().numpy()

    options = {"maxiter": max_iterations, "maxfun": 2 * max_iterations, "gtol": 0.0, "ftol": 0.0, "maxcor": 30}
    options["gtol"] = tolerance / np.sqrt(len(precision))  # scipy's is of the largest entry
    try:
        minimize(objective, best[1].double().cpu().numpy(), jac=True, method="L-BFGS-B", options=options)
    finally:
        bar.close()
        _assign(weights, best[1])
    return history


def _adam(net, weights, precision, x, y, loss, max_iterations, tolerance, lr, batch_size, generator, progress):
    n = len(x)
    batch_size = n if batch_size is None else min(batch_size, n)
    optimizer = torch.optim.Adam([torch.nn.Parameter(w.detach()) for w in weights], lr=lr)
    leaves = optimizer.param_groups[0]["params"]  # share the weights' memory, so the user's .grad stays untouched
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_iterations)
    history = []
    net.train()
    bar = tiling.progress(range(max_iterations), "Adam", progress, unit=" epochs")
    for _ in bar:
        total = 0.0
        order = torch.randperm(n, generator=generator).to(x.device)
        for part in tiling.chunks(n, batch_size):
            index = order[part]
            share = len(index) / n
            value = loss.subset(index).negative_log_likelihood(_outputs(net, x[index]), y[index]).sum()
            value = value + 0.5 * share * (precision * _flat(weights).square()).sum()
            for leaf, gradient in zip(leaves, torch.autograd.grad(value, weights, materialize_grads=True), strict=True):
                leaf.grad = gradient / share
            optimizer.step()
            total += float(value.detach())
        scheduler.step()
        history.append(total)
        bar.set_postfix(objective=f"{total:.6g}")
    return history
