"""MAP training of a user's nets: the minimum that the Laplace approximation is taken at.

    L(w) = sum_i l(y_i, f_w(x_i)) + sum_g delta_g |w_g|^2 / 2        (paper eq. 1)

    fit(net, ...)                  one net, by L-BFGS or Adam
    fit_many(nets, ...)            several nets of one shape at once: restarts, folds, a sweep over delta or sigma
    train_with_evidence(net, ...)  delta and sigma chosen by the evidence while the net is trained
    train(optimizer, ...)          VOGGN, OGGN, VOGN or OGN over minibatches
    Recorder(make)                 a callback: GPs, or their evidence, along any training

Unlike everything else in the package but ``optim``, these functions change the nets they are given.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.func import functional_call, vmap

from . import tiling
from .gp import LaplaceGP, NetworkGP
from .linearize import select_parameters
from .losses import Loss
from .mlls import BlockEvidence, EvidenceFit, fit_evidence, require_varied_labels
from .numerics import require_finite, require_positive
from .optim import GaussNewton
from .weights import weight_groups

METHODS = ("adam", "lbfgs")
MAX_SETTLING = 10  # times that weights and hyperparameters are fitted in turn after the rounds
Callback = Callable[[int], None]


@dataclass(frozen=True)
class Fit:
    """What :func:`fit` did.

    Attributes:
        objective: L(w) after each epoch (Adam: the running value of its batches) or at each evaluation (L-BFGS).
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
    callback: Callback | None = None,
) -> Fit:
    """Train ``net`` in place to a minimum of L(w).

    Args:
        net: trained in place, on the parameters that require a gradient; its mode is restored at the end.
        x: inputs as the net takes them, ``(n, ...)``.
        y: labels as the loss takes them.
        loss: from ``losses``.
        prior_precision, groups: as in :class:`LaplaceGP`.
        method: "lbfgs" (all data at once, net in eval mode) for small nets and data: reaches a stationary point.
            "adam": minibatches, net in train mode, learning rate decayed to zero by a cosine.
        max_iterations: evaluations of L-BFGS, or epochs of Adam.
        gradient_tolerance: of ``|grad L|``, below which L-BFGS stops.
        lr, batch_size, generator: of Adam; ``batch_size=None`` takes all data.
        progress: True, False, or None for a bar on terminals only.
        callback: called with 1, 2, ... after each epoch of Adam or evaluation of L-BFGS, the net as it is by then; a
            :class:`Recorder`, say.

    If interrupted, the net keeps the weights it has reached.
    """
    _require_method(method)
    was_training = net.training
    try:
        problem = _Problem(net, x, y, loss, prior_precision, groups)
        if method == "lbfgs":
            objective = _lbfgs(problem, max_iterations, gradient_tolerance, progress, callback)
        else:
            epochs = _adam_epochs(problem, max_iterations, lr, batch_size, generator)
            objective = []
            with tiling.progress(None, "Adam", progress, total=max_iterations, unit=" epochs") as bar:
                for value in epochs:
                    objective.append(value)
                    bar.update()
                    bar.set_postfix(objective=f"{value:.6g}")
                    if callback is not None:
                        callback(len(objective))
        norm = problem.gradient_norm()
        return Fit(objective, norm, norm <= gradient_tolerance)
    finally:
        net.train(was_training)


def _require_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}; got {method!r}.")


class _Problem:
    """L(w) of one net; ``loss`` and ``delta`` may change while it is trained."""

    def __init__(self, net, x, y, loss, prior_precision, groups) -> None:
        names = select_parameters(net, None)
        parameters = dict(net.named_parameters())
        self.net, self.x, self.loss = net, x, loss
        self.weights = [parameters[name] for name in names]
        delta = torch.as_tensor(prior_precision).to(self.weights[0])
        require_positive(delta, "prior_precision")
        partition = weight_groups(names, [w.numel() for w in self.weights], groups, delta.numel())
        self._num_groups, self._index = len(partition), partition.index(self.weights[0].device)
        self.delta = delta.reshape(-1)
        require_finite(x, "x", "Remove or impute these rows first.")
        net.eval()
        with torch.no_grad():
            f = _outputs(net, x[:1])
        self.y = loss.check_labels(y, f.shape[-1], len(x), f.dtype, f.device)

    @property
    def precision(self) -> Tensor:
        """Prior precision of each weight, ``(P,)``."""
        return self.delta.to(self.weights[0]).expand(self._num_groups)[self._index]

    def penalty(self) -> Tensor:
        return 0.5 * (self.precision * _flat(self.weights).square()).sum()

    def __call__(self) -> tuple[Tensor, Tensor]:
        """L(w) and its gradient over all data, without touching any ``.grad``."""
        with torch.enable_grad():
            value = self.loss.negative_log_likelihood(_outputs(self.net, self.x), self.y).sum() + self.penalty()
            gradient = torch.autograd.grad(value, self.weights, materialize_grads=True)
        return value.detach(), _flat(gradient)

    def gradient_norm(self) -> float:
        self.net.eval()
        return float(self()[1].norm())


def _outputs(net: nn.Module, x: Tensor) -> Tensor:
    out = net(x)
    return out[:, None] if out.dim() == 1 else out


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


@torch.no_grad()
def _assign(weights: Sequence[Tensor], flat: Tensor) -> None:
    for w, piece in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
        w.copy_(piece.view_as(w))


class _Done(Exception):
    """All evaluations are used up, or the first showed a stationary point."""


def _lbfgs(
    problem: _Problem,
    max_evaluations: int,
    tolerance: float,
    progress: bool | None,
    callback: Callback | None = None,
) -> list[float]:
    """In eval mode, all data at once; the net keeps the weights that were reached, also when interrupted.

    SciPy's L-BFGS, on the CPU, which costs a fraction of an evaluation; where its line search gives up, at values that
    are not finite or differ by rounding alone, :func:`stacked_lbfgs` goes on.
    """
    problem.net.eval()
    weights = problem.weights
    history: list[float] = []
    w = _flat(weights).detach()[None].clone()  # accepted so far
    bar = tiling.progress(None, "L-BFGS", progress, unit=" evaluations")

    def objective(trial: Tensor, _: object = None) -> tuple[Tensor, Tensor]:
        _assign(weights, trial[0])
        value, gradient = problem()
        return value[None], gradient[None]

    def report(_: object, values: Tensor) -> None:
        history.append(float(values))
        bar.update()
        bar.set_postfix(objective=f"{history[-1]:.6g}")
        if callback is not None:
            _assign(weights, w[0])
            callback(len(history))

    trial, small, finite = w.clone(), False, True  # evaluated last; is its gradient small, its value finite?
    converged = False

    def evaluate(point: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal small, finite
        if len(history) >= max_evaluations:
            raise _Done
        trial[0] = torch.from_numpy(point)
        value, gradient = objective(trial)
        report(None, value)
        small, finite = bool(gradient.norm() <= tolerance), bool(value.isfinite())
        if small and len(history) == 1:
            raise _Done
        return float(value) if finite else math.nan, gradient[0].double().cpu().numpy()

    def accept(_: np.ndarray) -> None:  # SciPy's line search ends with the point that it evaluated last
        nonlocal converged
        if finite:
            w.copy_(trial)
            converged = small
        if converged or not finite:
            raise StopIteration

    try:
        memory = 50 if w.numel() <= 10**6 else 10  # steps that are remembered, 16 bytes each for each weight
        options = {"maxcor": memory, "maxfun": max_evaluations, "maxiter": max_evaluations, "ftol": 0.0, "gtol": 0.0}
        start = w[0].double().cpu().numpy()
        with contextlib.suppress(_Done):
            minimize(evaluate, start, jac=True, method="L-BFGS-B", callback=accept, options=options)
            if not converged and len(history) < max_evaluations:
                stacked_lbfgs(objective, w, max_evaluations - len(history), tolerance, report)
    finally:
        bar.close()
        _assign(weights, w[0])
    return history


def _adam_epochs(
    problem: _Problem, epochs: int, lr: float, batch_size: int | None, generator: torch.Generator | None
) -> Iterator[float]:
    """Epochs of Adam in train mode, its learning rate decayed to zero by a cosine; yields L(w) summed over batches."""
    net, weights, x, y, n = problem.net, problem.weights, problem.x, problem.y, len(problem.x)
    batch_size = n if batch_size is None else min(batch_size, n)
    optimizer = torch.optim.Adam([nn.Parameter(w.detach()) for w in weights], lr=lr)
    leaves = optimizer.param_groups[0]["params"]  # share the weights' memory, so the user's .grad stays untouched
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        net.train()
        total = 0.0
        order = torch.randperm(n, generator=generator).to(x.device)
        for part in tiling.chunks(n, batch_size):
            index = order[part]
            share = len(index) / n
            value = problem.loss.subset(index).negative_log_likelihood(_outputs(net, x[index]), y[index]).sum()
            value = value + share * problem.penalty()
            for leaf, gradient in zip(leaves, torch.autograd.grad(value, weights, materialize_grads=True), strict=True):
                leaf.grad = gradient / share
            optimizer.step()
            total += float(value.detach())
        scheduler.step()
        yield total


# ---- several nets of one shape


def fit_many(
    nets: Sequence[nn.Module],
    x: Tensor | Sequence[Tensor],
    y: Tensor | Sequence[Tensor],
    loss: Loss | Sequence[Loss],
    prior_precision: float | Sequence | Tensor = 1.0,
    groups: Sequence[str | Sequence[str]] | None = None,
    included: Tensor | None = None,
    method: str = "lbfgs",
    max_iterations: int = 1000,
    gradient_tolerance: float = 1e-4,
    lr: float = 1e-2,
    progress: bool | None = None,
) -> list[Fit]:
    """Train M nets of one shape in place, all at once: their weights are stacked, and one pass serves them all.

    For restarts (other initial weights), folds (other examples), a sweep (other delta, other sigma), or all of these.
    What costs time in small nets is the number of calls, which does not grow with M. All data at once, in eval mode:
    dropout is off and BatchNorm uses its running statistics. Each net ends where it would have ended alone (up to
    rounding), and a net that has converged costs nothing more.

    Args:
        nets: M modules of one class and shape.
        x: inputs ``(n, ...)`` for all, or a sequence of M of them.
        y: labels for all, or a sequence of M of them.
        loss: one for all, or M.
        prior_precision: a number; one for each net, ``(M,)``; or one for each net and group, ``(M, G)``.
        groups: as in :class:`LaplaceGP`, the same for all nets.
        included: ``(M, n)`` of bool: which examples count for which net. None means all.
        method: "lbfgs" (limited memory, line search by the weak Wolfe conditions, its own for each net), or "adam"
            (learning rate decayed to zero by a cosine).
        max_iterations: evaluations of each net.
        gradient_tolerance: of ``|grad L|``, below which a net stops.
        lr: of Adam.
        progress: True, False, or None for a bar on terminals only.

    Returns:
        One :class:`Fit` for each net.

    Raises:
        ValueError: for nets of several shapes, or arguments that do not fit M nets.
    """
    _require_method(method)
    problem = _StackedProblem(nets, x, y, loss, prior_precision, groups, included)
    modes = [net.training for net in nets]
    try:
        for net in nets:
            net.eval()
        problem.try_out()
        histories: list[list[float]] = [[] for _ in nets]
        with tiling.progress(None, f"Training {len(nets)} nets", progress, total=max_iterations) as bar:

            def report(active: Tensor, values: Tensor) -> None:
                for i, value in zip(active.tolist(), values.tolist(), strict=True):
                    histories[i].append(value)
                bar.update()
                bar.set_postfix(training=len(active))

            if method == "lbfgs":
                stacked_lbfgs(problem, problem.w, max_iterations, gradient_tolerance, report)
            else:
                _stacked_adam(problem, problem.w, max_iterations, gradient_tolerance, lr, report)
        norms = problem(problem.w, torch.arange(len(nets)))[1].norm(dim=-1).tolist()
    finally:
        problem.write_back()
        for net, mode in zip(nets, modes, strict=True):
            net.train(mode)
    return [Fit(history, norm, norm <= gradient_tolerance) for history, norm in zip(histories, norms, strict=True)]


class _StackedProblem:
    """L(w) of M nets: ``w`` is ``(M, P)``."""

    def __init__(self, nets, x, y, loss, prior_precision, groups, included) -> None:
        if len(nets) == 0:
            raise ValueError("There are no nets to train.")
        m = len(nets)
        self.nets = list(nets)
        if len({id(net) for net in nets}) < m:
            raise ValueError("The same net is given twice: pass copies, copy.deepcopy(net).")
        names = select_parameters(nets[0], None)
        shapes = [{name: p.shape for name, p in net.named_parameters()} for net in nets]
        for i, net in enumerate(nets):
            if type(net) is not type(nets[0]) or shapes[i] != shapes[0] or select_parameters(net, None) != names:
                raise ValueError(
                    f"Net {i} is not built as net 0: only nets of one class, with the same parameters, can be trained "
                    "together. Group them by shape, or use fit for each."
                )
        parameters = [dict(net.named_parameters()) for net in nets]
        self._weights = [[p[name] for name in names] for p in parameters]
        self._names, self._shapes = names, [w.shape for w in self._weights[0]]
        self._frozen = {
            name: torch.stack([p[name].detach() for p in parameters]) for name in parameters[0] if name not in names
        }
        for name in dict(nets[0].named_buffers()):
            self._frozen[name] = torch.stack([dict(net.named_buffers())[name] for net in nets])
        self.w = torch.stack([_flat(weights).detach() for weights in self._weights])

        self._x, self._shared_x = self._stack(x, "x", m)
        require_finite(self._x, "x", "Remove or impute these rows first.")
        n = len(self._x) if self._shared_x else self._x.shape[1]
        self._losses = [loss] * m if isinstance(loss, Loss) else list(loss)
        if len(self._losses) != m:
            raise ValueError(f"There are {len(self._losses)} losses for {m} nets.")
        with torch.no_grad():
            f = _outputs(copy.deepcopy(nets[0]).eval(), self._x[:1] if self._shared_x else self._x[0, :1])
        ys = [y] * m if isinstance(y, Tensor) else list(y)
        if len(ys) != m:
            raise ValueError(f"There are {len(ys)} tensors of labels for {m} nets.")
        checked: dict[tuple[int, int], Tensor] = {}
        for yi, li in zip(ys, self._losses, strict=True):
            if (id(yi), id(li)) not in checked:
                checked[id(yi), id(li)] = li.check_labels(yi, f.shape[-1], n, f.dtype, f.device)
        self._y = torch.stack([checked[id(yi), id(li)] for yi, li in zip(ys, self._losses, strict=True)])

        delta = torch.as_tensor(prior_precision).to(self.w)
        require_positive(delta, "prior_precision")
        if delta.dim() > 2 or (delta.dim() > 0 and len(delta) != m):
            raise ValueError(
                f"prior_precision has shape {tuple(delta.shape)}; needed is a number, ({m},) with one entry for each "
                f"net, or ({m}, G) with one for each net and group."
            )
        delta = delta.expand(m) if delta.dim() == 0 else delta
        delta = delta[:, None] if delta.dim() == 1 else delta
        partition = weight_groups(names, [s.numel() for s in self._shapes], groups, delta.shape[-1])
        self._precision = delta.expand(m, len(partition))[:, partition.index(self.w.device)]
        if included is not None and (included.shape != (m, n) or included.dtype != torch.bool):
            raise ValueError(
                f"included must be of bool and shape ({m}, {n}), one row for each net; got {included.dtype}, "
                f"{tuple(included.shape)}."
            )
        self._included = included

    @staticmethod
    def _stack(x: Tensor | Sequence[Tensor], name: str, m: int) -> tuple[Tensor, bool]:
        if isinstance(x, Tensor):
            return x, True
        if len(x) != m or len({xi.shape for xi in x}) > 1:
            raise ValueError(
                f"{name} must be one tensor, or {m} of one shape, one for each net; got {len(x)} of shapes "
                f"{sorted({tuple(xi.shape) for xi in x})}. For folds of unequal size pass all data and included=."
            )
        return torch.stack(list(x)), False

    def try_out(self) -> None:
        """One evaluation of two nets, so that what cannot be stacked is refused before the work."""
        try:
            self(self.w[:2], torch.arange(min(2, len(self.w))))
        except RuntimeError as error:
            error.add_note(
                "These nets cannot be evaluated together (torch.func.vmap over their stacked weights failed): train "
                "them one by one, with fit."
            )
            raise

    def __call__(self, w: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """L and its gradient at ``w`` ``(a, P)`` for the nets ``active`` ``(a,)``."""
        every = len(active) == len(self.nets)

        def of(stacked: Tensor) -> Tensor:
            return stacked if every else stacked[active]

        with torch.enable_grad():
            w = w.detach().requires_grad_()
            pieces = w.split([s.numel() for s in self._shapes], dim=1)
            state = {
                name: piece.unflatten(1, shape) if len(shape) else piece[:, 0]
                for name, piece, shape in zip(self._names, pieces, self._shapes, strict=True)
            }
            state |= {name: of(value) for name, value in self._frozen.items()}
            x = self._x if self._shared_x else of(self._x)

            def outputs(state: dict[str, Tensor], x: Tensor) -> Tensor:
                out = functional_call(self.nets[0], state, (x,))
                return out[:, None] if out.dim() == 1 else out

            f = vmap(outputs, in_dims=(0, None if self._shared_x else 0))(state, x)  # (a, n, K)
            each = self._negative_log_likelihoods(f, active)
            if self._included is not None:
                each = torch.where(of(self._included), each, 0.0)
            value = each.sum(-1) + 0.5 * (of(self._precision) * w.square()).sum(-1)
            (gradient,) = torch.autograd.grad(value.sum(), w)
        return value.detach(), gradient

    def _negative_log_likelihoods(self, f: Tensor, active: Tensor) -> Tensor:
        """``(a, n)``; nets of one loss in one call."""
        nets = active.tolist()
        by_loss: dict[int, list[int]] = {}
        for place, i in enumerate(nets):
            by_loss.setdefault(id(self._losses[i]), []).append(place)
        if len(by_loss) == 1:
            y = self._y if len(nets) == len(self.nets) else self._y[active]
            return self._losses[nets[0]].negative_log_likelihood(f, y)
        order = torch.tensor([place for places in by_loss.values() for place in places], device=f.device)
        parts = [
            self._losses[nets[places[0]]].negative_log_likelihood(f[places], self._y[active[places]])
            for places in by_loss.values()
        ]
        return torch.cat(parts)[order.argsort()]

    def write_back(self) -> None:
        for weights, w in zip(self._weights, self.w, strict=True):
            _assign(weights, w)


Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@torch.no_grad()
def stacked_lbfgs(
    objective: Objective,
    w: Tensor,
    max_evaluations: int,
    tolerance: float,
    report: Callable[[Tensor, Tensor], None],
    memory: int = 20,
) -> None:
    """Limited-memory BFGS for M problems at once; ``w`` ``(M, P)`` is changed in place.

    Each evaluation is a step of each problem's own line search (bisection for the weak Wolfe conditions, Lewis and
    Overton 2013), so that no problem waits for another; what has converged, or cannot get better in this precision,
    drops out.
    """
    m, p = w.shape
    device, eps = w.device, torch.finfo(w.dtype).eps
    active = torch.arange(m, device=device)
    value, gradient = objective(w, active)
    report(active, value)
    steps, changes = w.new_zeros(m, memory, p), w.new_zeros(m, memory, p)  # s and y, newest last
    direction = -gradient
    slope = -gradient.square().sum(-1)
    length = 1 / gradient.norm(dim=-1).clamp(min=1.0)  # of the trial step along direction
    low, high = w.new_zeros(m), w.new_full((m,), torch.inf)
    trials = torch.zeros(m, dtype=torch.long, device=device)
    restarted = torch.ones(m, dtype=torch.bool, device=device)  # the direction is that of steepest descent
    for _ in range(max_evaluations - 1):
        active = active[gradient[active].norm(dim=-1) > tolerance]
        if len(active) == 0:
            return
        a = active
        trial = w[a] + length[a, None] * direction[a]
        new_value, new_gradient = objective(trial, a)
        report(a, new_value)
        new_slope = (new_gradient * direction[a]).sum(-1)
        rounding = 10 * eps * value[a].abs()
        enough = new_value <= value[a] + 1e-4 * length[a] * slope[a] + rounding  # False for NaN
        flat = new_slope >= 0.9 * slope[a]
        accepted = enough & flat
        low[a] = torch.where(enough & ~flat, length[a], low[a])
        high[a] = torch.where(enough, high[a], length[a])
        middle = torch.where(high[a].isinf(), 2 * length[a], (low[a] + high[a]) / 2)
        length[a] = torch.where(accepted, 1.0, middle)
        trials[a] += 1

        # the line search has no room left: once more along the gradient, then this is as low as it gets
        stuck = ~accepted & (trials[a] >= 40)
        finished = stuck & restarted[a]
        again = a[stuck & ~restarted[a]]
        steps[again], changes[again] = 0.0, 0.0

        b = a[accepted]
        steps[b] = torch.cat([steps[b, 1:], (trial[accepted] - w[b])[:, None]], 1)
        changes[b] = torch.cat([changes[b, 1:], (new_gradient[accepted] - gradient[b])[:, None]], 1)
        w[b], value[b], gradient[b] = trial[accepted], new_value[accepted], new_gradient[accepted]

        c = torch.cat([b, again])
        direction[c] = -_quasi_newton(steps[c], changes[c], gradient[c])
        slope[c] = (direction[c] * gradient[c]).sum(-1)
        uphill = c[slope[c] >= 0]  # by rounding
        direction[uphill], slope[uphill] = -gradient[uphill], -gradient[uphill].square().sum(-1)
        restarted[c] = False
        restarted[uphill], restarted[again] = True, True
        length[again] = 1 / gradient[again].norm(dim=-1).clamp(min=1.0)
        low[c], high[c], trials[c] = 0.0, torch.inf, 0
        active = a[~finished]


def _quasi_newton(steps: Tensor, changes: Tensor, gradient: Tensor) -> Tensor:
    """``H g`` of L-BFGS for steps s and changes y of the gradient, ``(M, memory, P)``, newest last, zeros if none.

    In the compact form (Byrd, Nocedal and Schnabel 1994) with R the upper triangle of ``S^T Y`` and D its diagonal:

        H g = gamma g + S R^-T ((D + gamma Y^T Y) u - gamma Y^T g) - gamma Y u,   u = R^-1 S^T g
    """
    sy = steps @ changes.mT
    curvature = sy.diagonal(dim1=1, dim2=2)
    there = curvature > 0
    R = sy.triu() + torch.diag_embed((~there).to(sy))
    yy = changes @ changes.mT
    newest = yy[:, -1, -1]
    gamma = torch.where(there[:, -1], curvature[:, -1] / torch.where(newest > 0, newest, 1.0), 1.0)[:, None, None]
    g = gradient[:, :, None]
    u = torch.linalg.solve_triangular(R, steps @ g, upper=True)
    inner = curvature[:, :, None] * u + gamma * (yy @ u - changes @ g)
    v = torch.linalg.solve_triangular(R.mT, inner, upper=False)
    return (gamma * g + steps.mT @ v - gamma * (changes.mT @ u))[:, :, 0]


@torch.no_grad()
def _stacked_adam(
    objective: Objective,
    w: Tensor,
    max_iterations: int,
    tolerance: float,
    lr: float,
    report: Callable[[Tensor, Tensor], None],
) -> None:
    """Adam for M problems at once; ``w`` ``(M, P)`` is changed in place. A problem stops when its gradient is small."""
    active = torch.arange(len(w), device=w.device)
    first, second = torch.zeros_like(w), torch.zeros_like(w)
    for t in range(1, max_iterations + 1):
        value, gradient = objective(w[active], active)
        report(active, value)
        going = gradient.norm(dim=-1) > tolerance
        active, gradient = active[going], gradient[going]
        if len(active) == 0:
            return
        first[active] = 0.9 * first[active] + 0.1 * gradient
        second[active] = 0.999 * second[active] + 0.001 * gradient.square()
        rate = lr * 0.5 * (1 + np.cos(np.pi * (t - 1) / max_iterations))
        w[active] -= rate * (first[active] / (1 - 0.9**t)) / ((second[active] / (1 - 0.999**t)).sqrt() + 1e-8)


# ---- with the evidence


@dataclass(frozen=True)
class EvidenceTraining:
    """What :func:`train_with_evidence` did.

    Attributes:
        gp: the GP at the end, with the delta and sigma of the best round; the net has its weights.
        evidence: its Laplace evidence (or the bound by blocks), in nats.
        history: evidence and hyperparameters after each round.
        best: number of the best round in it.
    """

    gp: LaplaceGP
    evidence: float
    history: list[EvidenceFit]
    best: int

    def __repr__(self) -> str:
        return (
            f"EvidenceTraining(evidence {self.evidence:.2f} nats, best round {self.best + 1} of {len(self.history)}: "
            f"{self.history[self.best]})"
        )


def train_with_evidence(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Loss,
    prior_precision: float | Sequence[float] | Tensor = 1.0,
    groups: Sequence[str | Sequence[str]] | None = None,
    method: str = "lbfgs",
    max_iterations: int = 1000,
    every: int = 100,
    burn_in: int = 0,
    evidence_iterations: int = 20,
    fit_noise: bool | None = None,
    block_size: int | None = None,
    patience: int | None = 3,
    gradient_tolerance: float = 1e-4,
    lr: float = 1e-2,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
    **options,
) -> EvidenceTraining:
    """Train ``net`` in place, and choose delta and sigma by the Laplace evidence on the way (Immer et al. 2021).

    In turn: ``every`` evaluations or epochs of training at the present delta and sigma, then ``evidence_iterations``
    steps on them at the present weights. The round of the largest evidence is kept; by Adam the net has the weights of
    that round. By L-BFGS it is trained on at that round's delta and sigma until it is stationary, so that, unlike after
    :func:`fit_evidence` alone, the weights belong to the hyperparameters; these are then chosen again and the net is
    trained on at them, for as long as the evidence of the stationary nets grows (which is long where there is little
    noise). (The evidence often falls again when the rounds go on: the weights are trained for the fit alone, not for
    the log-determinant.)

    Args:
        net, x, y, loss, method, lr, batch_size, generator, gradient_tolerance: as in :func:`fit`.
        prior_precision, groups: initial values, as in :class:`LaplaceGP`.
        max_iterations: evaluations of L-BFGS, or epochs of Adam, in all rounds; as many again for each time that
            L-BFGS trains on at the end.
        every: evaluations or epochs of one round.
        burn_in: evaluations or epochs before the first look at the evidence.
        evidence_iterations, fit_noise, block_size: as ``max_iterations`` and the others in :func:`fit_evidence`.
        patience: stop after so many rounds in which the evidence has not grown by 0.01 nats; None for never.
        progress: True, False, or None for a bar on terminals only.
        options: of :class:`LaplaceGP`, such as ``structure`` or ``solver``.

    If interrupted, the net keeps the weights of the best round so far.

    Raises:
        ValueError: for labels that leave the noise without a finite estimate; see :func:`fit_evidence`.
    """
    _require_method(method)
    if not (every > 0 and max_iterations >= burn_in + every):
        raise ValueError(
            f"max_iterations = {max_iterations} must leave room for burn_in = {burn_in} and one round of {every}."
        )
    was_training = net.training
    history: list[EvidenceFit] = []
    best: tuple[int, LaplaceGP, Tensor] | None = None  # number of the round, GP, weights
    try:
        problem = _Problem(net, x, y, loss, prior_precision, groups)
        if fit_noise or (fit_noise is None and loss.has_noise and loss.noise.dim() < 2):
            require_varied_labels(loss, problem.y)

        def gp_here() -> LaplaceGP:
            net.eval()
            return LaplaceGP(net, x, y, problem.loss, problem.delta, groups, progress=False, **options)

        how = {"fit_noise": fit_noise, "max_iterations": evidence_iterations, "block_size": block_size}
        epochs = _adam_epochs(problem, max_iterations, lr, batch_size, generator)
        rounds = 1 + (max_iterations - burn_in - every) // every
        for number in tiling.progress(range(rounds), "Training with evidence", progress, unit=" rounds"):
            length = every + (burn_in if number == 0 else 0)
            if method == "lbfgs":
                _lbfgs(problem, length, gradient_tolerance, False)
            else:
                for _ in range(length):
                    next(epochs)
            gp = gp_here()
            history.append(fit_evidence(gp, **how, generator=generator, warn=False, progress=False))
            problem.delta, problem.loss = gp.prior_precision.detach(), _detached(gp.loss)
            if best is None or history[-1].evidence_after > history[best[0]].evidence_after:
                best = number, gp, _flat(problem.weights).detach().clone()
            if patience is not None and number >= patience:
                earlier = max(item.evidence_after for item in history[:-patience])
                if max(item.evidence_after for item in history[-patience:]) < earlier + 0.01:
                    break
        number, gp, w = best
        evidence = history[number].evidence_after
        if method == "lbfgs":
            _assign(problem.weights, w)
            evidence = -np.inf
            for _ in range(MAX_SETTLING):
                problem.delta, problem.loss = gp.prior_precision.detach(), _detached(gp.loss)
                _lbfgs(problem, max_iterations, gradient_tolerance, False)
                gp = gp_here()
                with torch.no_grad():
                    end = gp.log_evidence() if block_size is None else BlockEvidence(gp, block_size).bound()
                if float(end) < evidence + 0.01:
                    break
                best, evidence = (number, gp, _flat(problem.weights).detach().clone()), float(end)
                gp = gp_here()
                fit_evidence(gp, **how, generator=generator, warn=False, progress=False)
        return EvidenceTraining(best[1], evidence, history, number)
    finally:
        if best is not None:
            _assign(problem.weights, best[2])
        net.train(was_training)


def _detached(loss: Loss) -> Loss:
    return loss.with_noise(loss.noise.detach()) if loss.has_noise else loss


# ---- natural-gradient training, and what is recorded along any training


def train(
    optimizer: GaussNewton,
    x: Tensor,
    y: Tensor,
    epochs: int,
    batch_size: int | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    callback: Callback | None = None,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> list[float]:
    """Train by VOGGN, OGGN, VOGN or OGN over minibatches of all training data; changes the optimizer's net.

    Args:
        optimizer: of ``optim``, with ``train_size = len(x)``.
        x, y: all inputs, as the net takes them, and labels.
        epochs: passes over the data.
        batch_size: None takes all data at once. The last batch of an epoch may be smaller.
        scheduler: stepped after each step of the optimizer.
        callback: called with 1, 2, ... after each step; a :class:`Recorder`, say.
        generator: of the order of the data.
        progress: True, False, or None for a bar on terminals only.

    Returns:
        The mean negative log-likelihood of each step's batch.

    Raises:
        ValueError: another number of examples than train_size, or of labels; what a step refuses, which ends training
            at the last sound state.
    """
    n = len(x)
    if n != optimizer.train_size:
        raise ValueError(f"There are {n} examples, but the optimizer's train_size is {optimizer.train_size}.")
    if len(y) != n:
        raise ValueError(f"There are {n} examples, but {len(y)} labels.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be one at least; got {batch_size}.")
    parts = tiling.chunks(n, n if batch_size is None else batch_size)
    values: list[float] = []
    with tiling.progress(None, type(optimizer).__name__, progress, total=epochs * len(parts), unit=" steps") as bar:
        for _ in range(epochs):
            order = torch.arange(n) if len(parts) == 1 else torch.randperm(n, generator=generator)
            for part in parts:
                index = order[part].to(x.device)
                values.append(float(optimizer.step(x[index], y[index])))
                if scheduler is not None:
                    scheduler.step()
                bar.update()
                bar.set_postfix(nll=f"{values[-1]:.4g}")
                if callback is not None:
                    callback(len(values))
    return values


class Recorder:
    """The GP of a net in training, at every so many steps: a callback of :func:`fit` and :func:`train`.

    Args:
        make: the GP as things stand, ``lambda: VariationalGP(net, opt.iterate(), x, y, loss)``, say, or
            ``lambda: LaplaceGP(net, x, y, loss, delta)``.
        every: how many steps lie between.
        evidence: "laplace" or "gp" to record that evidence, None for none.
        keep: whether to keep the GPs themselves; each holds a copy of the net.

    Attributes:
        steps, evidences, gps: what was recorded, lists of one length; the last two empty where not asked for.
    """

    def __init__(
        self, make: Callable[[], NetworkGP], every: int = 1, evidence: str | None = "laplace", keep: bool = False
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be one at least; got {every}.")
        if evidence not in ("laplace", "gp", None):
            raise ValueError(f"evidence must be 'laplace', 'gp' or None; got {evidence!r}.")
        self.make, self.every, self.evidence, self.keep = make, every, evidence, keep
        self.steps: list[int] = []
        self.evidences: list[float] = []
        self.gps: list[NetworkGP] = []

    def __call__(self, step: int) -> None:
        """Record, if it is this step's turn."""
        if step % self.every:
            return
        gp = self.make()
        if self.evidence is not None:
            with torch.no_grad():
                self.evidences.append(float(gp.log_evidence(self.evidence)))
        if self.keep:
            self.gps.append(gp)
        self.steps.append(step)
