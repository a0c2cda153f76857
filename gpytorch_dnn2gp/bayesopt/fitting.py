"""Nets for few data, with delta, sigma and a residual kernel by evidence: several at once, the best is kept.

    y = f_w(x) + g(x) + e,    w_g ~ N(0, 1 / delta_g),    g ~ GP(0, k_r (x) I_K),    e ~ N(0, sigma^2)

g is integrated out. With ``C = K_r (x) I + sigma^2 I`` and ``r = y - f`` at the training inputs, in turn:

    weights           min  r^T C^-1 r / 2 + |w|_delta^2 / 2                      |w|_delta^2 = sum_g delta_g |w_g|^2
    hyperparameters   max  log N(r; 0, C) - |w|_delta^2 / 2 - log|I + C^-1 k| / 2 + log p(hyperparameters)
                        =  - (r^T C^-1 r + |w|_delta^2 + log|C + k| + n K log 2 pi) / 2 + ...

with ``k = sum_g J_g J_g^T / delta_g``.

The second is the Laplace evidence, a sum over matrices of all M nets at once, and where the weights are stationary it
is the GP's: ``log N(y; f - J w, C + k)``. Broad priors keep it proper with one example, or constant targets.

M nets of one shape, n examples, K outputs, P weights, G prior groups.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import gpytorch
import torch
from gpytorch.constraints import Interval
from gpytorch.kernels import Kernel
from gpytorch.priors import LogNormalPrior
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from .. import tiling
from ..gp import LaplaceGP
from ..jacobians import UNSUPPORTED, NetFunction
from ..linearize import Linearization, select_parameters
from ..losses import Loss
from ..mlls import fit_evidence
from ..numerics import cholesky
from ..training import fit_many, stacked_lbfgs
from ..weights import WeightGroups, weight_groups

LOWEST_NOISE = 1e-4  # sigma^2, of standardised outcomes, as of BoTorch's own models
NOISE_PRIOR = (-4.0, 1.0)  # mean and deviation of log sigma^2, as of BoTorch's own models
PRECISION_SPREAD = 1.5  # prior deviation of log delta around where it began


@dataclass
class Hyperparameters:
    """Of one net.

    Attributes:
        prior_precision: delta, ``(G,)``.
        noise: sigma^2, ``(K,)``; None where it is given for each example, or the loss has none.
        residual_kernel: with its hyperparameters; None without.
    """

    prior_precision: Tensor
    noise: Tensor | None
    residual_kernel: Kernel | None = None


@dataclass
class FittedNet:
    """What :func:`fit_regression` and :func:`fit_labels` return.

    Attributes:
        net: the best one, trained.
        hyperparameters: its own.
        evidence: of each net, in nats.
    """

    net: nn.Module
    hyperparameters: Hyperparameters
    evidence: list[float] = field(default_factory=list)


# ---- default nets


def smooth_mlp(num_inputs: int, num_outputs: int, widths: Sequence[int] = (50, 50)) -> nn.Sequential:
    """A multilayer perceptron with tanh, for inputs in the unit cube: the first layer sees ``2 x - 1``."""
    layers: list[nn.Module] = [_Centered()]
    for a, b in zip([num_inputs, *widths], widths, strict=False):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], num_outputs))


class _Centered(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x - 1


def restarts(net: nn.Module, number: int, generator: torch.Generator | None = None) -> list[nn.Module]:
    """Copies of ``net`` with new initial weights, by each layer's ``reset_parameters``; nothing global moves."""
    nets = []
    device = next(net.parameters()).device
    seed = int(torch.randint(2**31, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(number):
            new = copy.deepcopy(net).cpu()  # draws the same on every device
            for module in new.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            nets.append(new.to(device))
    return nets


def initial_precision(net: nn.Module, names: Sequence[str], deviation: float = 2.0) -> Tensor:
    """One delta for each parameter tensor: fan-in / deviation^2 for a weight, so that layers keep the scale of inputs.

    With a deviation of one, functions are so tame that a net of few data is best off with no weights at all, where it
    stays: there every gradient vanishes.
    """
    parameters = dict(net.named_parameters())
    shapes = [parameters[name].shape for name in names]
    like = parameters[names[0]]
    fan_in = like.new_tensor([shape.numel() / shape[0] if len(shape) > 1 else 1.0 for shape in shapes])
    return (fan_in / deviation**2).detach()


# ---- regression: M nets at once


def fit_regression(
    nets: Sequence[nn.Module],
    x: Tensor,
    y: Tensor,
    start: Hyperparameters,
    first: Hyperparameters | None = None,
    given_noise: Tensor | None = None,
    groups: Sequence[str | Sequence[str]] | None = None,
    params: Sequence[str] | str | None = None,
    rounds: int = 3,
    iterations: int = 20,
    evidence_evaluations: int = 20,
    tolerance: float = 1e-4,
    progress: bool | None = False,
) -> FittedNet:
    """Train M nets of one shape in place, with hyperparameters of their own, and keep the best.

    Args:
        nets: modules of one shape, each with its initial weights.
        x: ``(n, d)``.
        y: ``(n, K)``, of unit scale.
        start: initial hyperparameters; its delta is also the centre of their prior.
        first: those of the first net, where it comes from an earlier fit.
        given_noise: sigma^2 of each example, ``(n, K)``.
        groups: which weights share a delta; see :class:`LaplaceGP`.
        params: which weights are random, as in :class:`Linearization`; all are trained.
        rounds: of weights and hyperparameters in turn.
        iterations: Gauss-Newton steps of a round; the last round has twice as many.
        evidence_evaluations: of a round.
        tolerance: a net is trained when a step improves its objective by less, relatively.
        progress: True, False, or None for a bar on terminals only.
    """
    problem = _Nets(nets, x, y, params, groups, start, given_noise)
    theta = problem.theta(start)
    if first is not None:
        theta[0] = problem.theta(first)[0]
    for number in tiling.progress(range(rounds), "Fitting nets", progress, unit=" rounds"):
        alone = torch.arange(len(nets), device=x.device) % 2 == 1 if number == 0 else None
        problem.train(theta, iterations if number < rounds - 1 else 2 * iterations, tolerance, alone)
        if number < rounds - 1:
            problem.choose(theta, evidence_evaluations)
    evidence = problem.evidence(theta)
    best = int(evidence.nan_to_num(nan=-torch.inf).argmax())
    problem.write_back()
    return FittedNet(nets[best], problem.hyperparameters(theta, best), evidence.tolist())


class _Nets:
    """The two objectives of M nets: ``w`` is ``(M, P)``, ``theta`` ``(M, T)``: log delta, log sigma^2, raw kernel."""

    def __init__(self, nets, x, y, params, groups, start, given_noise) -> None:
        self.nets, self.x, self.y = list(nets), x, y.flatten()
        self.num_outputs = y.shape[-1]
        self.names = select_parameters(nets[0], None)
        random = select_parameters(nets[0], params)
        self._weights = [[dict(net.named_parameters())[name] for name in self.names] for net in nets]
        self._shapes = [w.shape for w in self._weights[0]]
        self.w = torch.stack([torch.cat([w.detach().flatten() for w in weights]) for weights in self._weights])
        frozen = copy.deepcopy(nets[0]).eval().requires_grad_(False)
        self._net = frozen
        self._function = NetFunction(frozen, self.names)
        sizes = dict(zip(self.names, (s.numel() for s in self._shapes), strict=True))
        self.groups: WeightGroups = weight_groups(
            random, [sizes[name] for name in random], groups, len(start.prior_precision)
        )
        starts, total = {}, 0
        for name in self.names:
            starts[name], total = total, total + sizes[name]
        self._random = torch.cat([torch.arange(starts[n], starts[n] + sizes[n]) for n in random]).to(self.w.device)
        self.delta0 = start.prior_precision
        self.given_noise = None if given_noise is None else given_noise.expand(y.shape).flatten()
        self._kernel = None if start.residual_kernel is None else _BatchedKernel(start.residual_kernel, len(nets))
        self._stacks = True
        self._grams: Tensor | None = None

    # ---- hyperparameters

    def theta(self, start: Hyperparameters) -> Tensor:
        """``start`` for each net, ``(M, T)``."""
        parts = [start.prior_precision.log()]
        if self.given_noise is None:
            parts.append((start.noise.expand(self.num_outputs) - LOWEST_NOISE).clamp(min=1e-8).log())
        row = torch.cat(parts).detach().to(self.w)
        theta = row.expand(len(self.nets), -1).clone()
        return (
            theta
            if self._kernel is None
            else torch.cat([theta, self._kernel.free_of(start.residual_kernel).to(theta)], -1)
        )

    def _split(self, theta: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Delta ``(M, G)``, sigma^2 ``(M, K)`` and the kernel's raw parameters."""
        g = len(self.delta0)
        s = 0 if self.given_noise is not None else self.num_outputs
        delta, noise, raw = theta.tensor_split([g, g + s], -1)
        return delta.exp(), LOWEST_NOISE + noise.exp() if s else None, raw

    def hyperparameters(self, theta: Tensor, i: int) -> Hyperparameters:
        """Of net i."""
        delta, noise, raw = self._split(theta[i : i + 1])
        kernel = None if self._kernel is None else self._kernel.single(raw[0])
        return Hyperparameters(delta[0], None if noise is None else noise[0], kernel)

    def _own_covariance(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """``C``, ``(M, nK, nK)``, and the kernel's log prior, ``(M,)``."""
        c = self._noise_covariance(theta)
        if self._kernel is None:
            return c, theta.new_zeros(len(theta))
        k, log_prior = self._kernel(self._split(theta)[2], self.x)
        if self.num_outputs > 1:
            k = torch.kron(k, torch.eye(self.num_outputs, dtype=k.dtype, device=k.device))
        return c + k, log_prior

    def _noise_covariance(self, theta: Tensor) -> Tensor:
        noise = self._split(theta)[1]
        diagonal = self.given_noise if noise is None else noise.repeat(1, len(self.x))
        return torch.diag_embed(diagonal.expand(len(theta), -1))

    # ---- weights

    def train(self, theta: Tensor, iterations: int, tolerance: float, alone: Tensor | None = None) -> None:
        """Weights at fixed hyperparameters, by Gauss-Newton steps in function space, damped for each net by itself.

        The linear model about w, with a prior that pulls towards w as well, ``lambda |w' - w|_delta^2 / 2``, is a GP:

            w' = (lambda w + S J^T a) / (1 + lambda),   (k / (1 + lambda) + C) a = r + J w / (1 + lambda)

        with ``S = 1 / delta`` and ``k = J S J^T``. A step is taken if the objective falls (Levenberg and Marquardt).
        The nets of the mask ``alone`` are trained as if there were no residual kernel.
        """
        size = 3 * len(self.y) * self.w.shape[-1]
        for part in tiling.chunks(len(self.w), tiling.rows_that_fit(size, self.w.dtype, self.w.device)):
            nets = torch.arange(len(self.w), device=self.w.device)[part]
            self._train_nets(nets, theta, iterations, tolerance, alone)
        self._grams = None

    def _train_nets(self, nets: Tensor, theta: Tensor, iterations: int, tolerance: float, alone: Tensor | None) -> None:
        theta, w = theta[nets], self.w[nets]
        precision = torch.ones_like(w)
        precision[:, self._random] = self._split(theta)[0][:, self.groups.index(w.device)]
        c = self._own_covariance(theta)[0]
        if alone is not None and self._kernel is not None:
            c[alone[nets]] = self._noise_covariance(theta)[alone[nets]]
        factor = cholesky(c, "The covariance of noise and residual")

        def objective(w: Tensor, residual: Tensor, a: Tensor) -> Tensor:
            white = torch.linalg.solve_triangular(factor[a], residual[..., None], upper=False)
            return 0.5 * (white.square().sum((-2, -1)) + (precision[a] * w.square()).sum(-1))

        a = torch.arange(len(w), device=w.device)  # the nets that are not trained yet
        damping = torch.ones_like(w[:, 0])
        residual = self.y - self._outputs(w)
        value = objective(w, residual, a)
        rows = self._rows(w)
        scaled = rows / precision[:, None]
        k, rows_w = scaled @ rows.mT, (rows @ w[..., None])[..., 0]
        for _ in range(iterations):
            more = (1 + damping[a])[:, None]
            dual_factor = cholesky(k[a] / more[..., None] + c[a], "The covariance of the outcomes")
            dual = torch.cholesky_solve((residual[a] + rows_w[a] / more)[..., None], dual_factor)
            trial = (damping[a, None] * w[a] + (scaled[a].mT @ dual)[..., 0]) / more
            trial_residual = self.y - self._outputs(trial)
            trial_value = objective(trial, trial_residual, a)
            fallen = trial_value < value[a]  # False for NaN
            gained = (value[a] - trial_value) / value[a].abs().clamp(min=1.0)
            damping[a] = torch.where(fallen, damping[a] / 4, damping[a] * 3).clamp(1e-4, 1e8)
            b = a[fallen]
            w[b], residual[b], value[b] = trial[fallen], trial_residual[fallen], trial_value[fallen]
            a = a[torch.where(fallen, gained > tolerance, damping[a] < 1e6)]
            b = b[torch.isin(b, a)]
            if len(a) == 0:
                break
            if len(b) > 0:
                rows[b] = self._rows(w[b])
                scaled[b] = rows[b] / precision[b, None]
                k[b], rows_w[b] = scaled[b] @ rows[b].mT, (rows[b] @ w[b, :, None])[..., 0]
        self.w[nets] = w

    def _outputs(self, w: Tensor) -> Tensor:
        """``(a, nK)``, for weights ``(a, P)``."""
        if self._stacks and len(w) > 1:
            try:
                return vmap(self._outputs_of, (0, None))(w, self.x).flatten(1)
            except UNSUPPORTED:
                self._stacks = False
        return torch.stack([self._outputs_of(each, self.x).flatten() for each in w])

    def _rows(self, w: Tensor) -> Tensor:
        """Jacobians in all weights, ``(a, nK, P)``."""

        def one(each: Tensor, x_i: Tensor) -> Tensor:
            f, pullback = vjp(lambda v: self._outputs_of(v, x_i[None])[0], each)
            return vmap(lambda row: pullback(row)[0])(torch.eye(len(f), dtype=f.dtype, device=f.device))

        if self._stacks:
            try:
                with self._function.differentiable_kernels():
                    return vmap(vmap(one, (None, 0)), (0, None))(w, self.x).flatten(1, 2)
            except UNSUPPORTED:
                self._stacks = False
        parameters = [dict(self._net.named_parameters())[name] for name in self.names]
        rows = []
        for each in w:
            _assign(parameters, each)
            rows.append(self._function.jacobian(self.x).flatten(0, 1))
        return torch.stack(rows)

    def _outputs_of(self, w: Tensor, x: Tensor) -> Tensor:
        pieces = w.split([s.numel() for s in self._shapes])
        state = {name: p.view(s) for name, p, s in zip(self.names, pieces, self._shapes, strict=True)}
        return functional_call(self._net, state, (x,)).reshape(len(x), -1)

    def write_back(self) -> None:
        """Put the weights into the nets."""
        for weights, row in zip(self._weights, self.w, strict=True):
            _assign(weights, row)

    # ---- evidence

    @torch.no_grad()
    def _linearize(self) -> None:
        """Grams ``(M, G, nK, nK)``, residuals and squared norms by group, at the present weights."""
        self._residuals = self.y - self._outputs(self.w)
        w = self.w[:, self._random]
        self._norms = torch.stack([w[:, g].square().sum(-1) for g in self.groups.indices], 1)
        grams = []
        for each in self.w:
            rows = self._rows(each[None])[0][:, self._random]
            grams.append(torch.stack([rows[:, g] @ rows[:, g].mT for g in self.groups.indices]))
        self._grams = torch.stack(grams)

    def _log_evidence(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Evidence and log prior of the hyperparameters, ``(M,)`` each, at the weights last linearized at."""
        delta, noise, _ = self._split(theta)
        c, log_prior = self._own_covariance(theta)
        factor = cholesky(c, "The covariance of noise and residual")
        total = cholesky(c + torch.einsum("mg,mgij->mij", 1 / delta, self._grams), "The covariance of the outcomes")
        white = torch.linalg.solve_triangular(factor, self._residuals[..., None], upper=False)
        evidence = -0.5 * (
            white.square().sum((-2, -1))
            + (delta * self._norms).sum(-1)
            + 2 * total.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            + len(self.y) * math.log(2 * math.pi)
        )
        log_prior = log_prior - 0.5 * ((delta / self.delta0).log() / PRECISION_SPREAD).square().sum(-1)
        if noise is not None:
            mean, deviation = NOISE_PRIOR
            log_prior = log_prior - (0.5 * ((noise.log() - mean) / deviation).square() + noise.log()).sum(-1)
        return evidence, log_prior

    @torch.no_grad()
    def evidence(self, theta: Tensor) -> Tensor:
        """Log evidence with the prior of the hyperparameters, ``(M,)``."""
        if self._grams is None:
            self._linearize()
        return sum(self._log_evidence(theta))

    def choose(self, theta: Tensor, evaluations: int) -> None:
        """Hyperparameters at fixed weights; ``theta`` is changed in place."""
        self._linearize()

        def objective(trial: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                every = theta.detach().clone()
                every[active] = trial
                every.requires_grad_()
                value = -sum(self._log_evidence(every))
                (gradient,) = torch.autograd.grad(value.sum(), every)
            return value.detach()[active], gradient[active]

        stacked_lbfgs(objective, theta, evaluations, 1e-3, lambda *_: None)


@torch.no_grad()
def _assign(weights: Sequence[Tensor], flat: Tensor) -> None:
    for w, piece in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
        w.copy_(piece.view_as(w))


class _BatchedKernel(nn.Module):
    """M copies of a GPyTorch kernel as a function of their free parameters ``(M, T)``, which have no bounds."""

    def __init__(self, kernel: Kernel, number: int) -> None:
        super().__init__()
        self.evaluated = _Evaluated(kernel)
        self._number = number
        self._at_once: bool | None = None
        self._parameters_of = [(name, p.shape, c) for name, p, c in kernel.named_parameters_and_constraints()]

    def free_of(self, kernel: Kernel) -> Tensor:
        """Those of a kernel, for each copy."""
        values = dict(kernel.named_parameters())
        row = torch.cat([_free(values[name].detach(), c).flatten() for name, _, c in self._parameters_of])
        return row.expand(self._number, -1)

    def forward(self, free: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Matrices ``(M, n, n)`` and log priors ``(M,)``."""
        if self._at_once is None:
            with torch.no_grad():
                self._at_once = self._works_at_once(free, x)
        if self._at_once:
            return functional_call(self.evaluated, self._state(free, "kernel."), (x,))
        results = [functional_call(self.evaluated, self._state(each[None], "kernel."), (x,)) for each in free]
        return torch.cat([k for k, _ in results]), torch.cat([p for _, p in results])

    def _works_at_once(self, free: Tensor, x: Tensor) -> bool:
        """GPyTorch's kernels take parameters with a leading batch dimension; one's own may not."""
        apart = free + 0.1 * torch.arange(len(free)).to(free)[:, None]
        self._at_once = False
        expected = self(apart, x)
        try:
            found = functional_call(self.evaluated, self._state(apart, "kernel."), (x,))
        except (RuntimeError, ValueError, IndexError):
            return False
        return all(a.shape == b.shape and torch.allclose(a, b) for a, b in zip(found, expected, strict=True))

    def _state(self, free: Tensor, prefix: str = "") -> dict[str, Tensor]:
        pieces = free.split([shape.numel() for _, shape, _ in self._parameters_of], -1)
        return {
            prefix + name: _bounded(piece.reshape(len(free), *shape), c)
            for (name, shape, c), piece in zip(self._parameters_of, pieces, strict=True)
        }

    @torch.no_grad()
    def single(self, free: Tensor) -> Kernel:
        """The kernel at these parameters."""
        new = copy.deepcopy(self.evaluated.kernel)
        for name, value in self._state(free[None]).items():
            new.get_parameter(name).copy_(value[0])
        return new


def _bounded(free: Tensor, constraint: Interval | None) -> Tensor:
    """A raw parameter: within its bounds where GPyTorch leaves keeping them to the optimiser (``transform=None``)."""
    if constraint is None or constraint.enforced:
        return free
    low, high = constraint.lower_bound, constraint.upper_bound
    if high.isinf().all():
        return free if low.isinf().all() else low + free.exp()
    return high - free.exp() if low.isinf().all() else low + (high - low) * free.sigmoid()


def _free(raw: Tensor, constraint: Interval | None) -> Tensor:
    """The inverse of :func:`_bounded`."""
    if constraint is None or constraint.enforced:
        return raw
    low, high = constraint.lower_bound, constraint.upper_bound
    if high.isinf().all():
        return raw if low.isinf().all() else (raw - low).clamp(min=1e-6).log()
    return (high - raw).clamp(min=1e-6).log() if low.isinf().all() else ((raw - low) / (high - low)).logit(1e-6)


class _Evaluated(nn.Module):
    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        m = len(next(iter(self.kernel.parameters())))  # each parameter has a leading dimension here
        log_prior = x.new_zeros(m)
        for _, module, prior, closure, _ in self.kernel.named_priors():
            log_prior = log_prior + prior.log_prob(closure(module)).reshape(m, -1).sum(-1)
        with gpytorch.settings.lazily_evaluate_kernels(False):
            k = self.kernel(x)
        return k.to_dense().reshape(m, len(x), len(x)), log_prior


# ---- labels of any other loss: one net after the other


def fit_labels(
    nets: Sequence[nn.Module],
    x: Tensor,
    y: Tensor,
    loss: Loss,
    start: Hyperparameters,
    first: Hyperparameters | None = None,
    groups: Sequence[str | Sequence[str]] | None = None,
    params: Sequence[str] | str | None = None,
    rounds: int = 3,
    iterations: int = 200,
    evidence_evaluations: int = 20,
    progress: bool | None = False,
) -> FittedNet:
    """The same for a loss of ``losses`` without noise, such as ``Bernoulli()``: by the Laplace evidence of each net.

    ``iterations`` are evaluations of L-BFGS; weights that are not random have prior precision one.
    """
    deltas = [(start if first is None else first).prior_precision] + [start.prior_precision] * (len(nets) - 1)
    gps: list[LaplaceGP] = []
    every = all(set(select_parameters(net, params)) == set(select_parameters(net, None)) for net in nets)
    for number in tiling.progress(range(rounds), "Fitting nets", progress, unit=" rounds"):
        penalty = torch.stack(deltas) if every else 1.0
        fit_many(nets, x, y, loss, penalty, groups if every else None, max_iterations=iterations, progress=False)
        gps = [LaplaceGP(Linearization(net, params), x, y, loss, delta, groups) for net, delta in zip(nets, deltas)]
        for gp in gps:
            # its mode is where delta began
            center = start.prior_precision.log() + PRECISION_SPREAD**2
            gp.covar_module.register_prior(
                "prior_precision_prior", LogNormalPrior(center, PRECISION_SPREAD), "prior_precision"
            )
        if number < rounds - 1:
            for gp in gps:
                fit_evidence(gp, max_iterations=evidence_evaluations, warn=False, progress=False)
            deltas = [gp.prior_precision.detach() for gp in gps]
    with torch.no_grad():
        evidence = [float(gp.log_evidence()) for gp in gps]
    best = max(range(len(nets)), key=evidence.__getitem__)
    return FittedNet(nets[best], Hyperparameters(deltas[best], None), evidence)
