"""Evidence objects: what measures how well hyperparameters fit the training data, without a validation set.

    LaplaceMarginalLogLikelihood     Laplace evidence, any loss         } by GPyTorch's conventions: mll(output, target)
    LeaveOneOutPseudoLikelihood      sum_i log p(y_i | all others)      } per datum, priors added
    BlockEvidence                    lower bound of the Laplace evidence, by blocks of the data: large n
    fit_evidence                     delta and sigma by any of them
    effective_parameters             how many weights the data determine

GPyTorch's own ``ExactMarginalLogLikelihood`` on a ``LaplaceGP`` is the GP evidence of a Gaussian loss; its own
``LeaveOneOutPseudoLikelihood`` is wrong for several outputs. n examples, K outputs, P weights, G prior groups.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.mlls import ExactMarginalLogLikelihood
from scipy.optimize import minimize
from torch import Tensor
from torch.func import functional_call

from . import tiling
from .gp import LaplaceGP, NetworkGP
from .laplace import Splitting
from .likelihoods import GGNLikelihood
from .losses import Loss
from .numerics import NotPositiveDefiniteError, cholesky, log_det
from .prediction import StationarityWarning
from .solvers import information_matrix

KINDS = ("laplace", "gp", "leave_one_out")
BOUND_MARGIN = 1e-4  # how near, in the logarithm, a hyperparameter comes to a bound of its constraint


# ---- by GPyTorch's conventions


class _OwnData(ExactMarginalLogLikelihood):
    """A criterion of a GP of this package on its own training data, divided by the number of data, n K.

    Args:
        likelihood: ``gp.likelihood``.
        model: a :class:`LaplaceGP` (or, for the evidence, a :class:`VariationalGP`).

    ``output`` must be ``model(*model.train_inputs)`` in train mode, and ``target`` ``model.train_targets``. The closed
    form is taken whatever GPyTorch's settings are.
    """

    _models: type = NetworkGP

    def __init__(self, likelihood: GGNLikelihood, model: NetworkGP) -> None:
        if not isinstance(model, self._models):
            raise TypeError(f"{type(self).__name__} is for a {self._models.__name__}; got {type(model).__name__}.")
        if likelihood is not model.likelihood:
            raise ValueError("The likelihood must be the model's own, gp.likelihood.")
        super().__init__(likelihood, model)
        self._checked = False

    def forward(self, function_dist: MultivariateNormal, target: Tensor, *params, **kwargs) -> Tensor:
        """The criterion, a scalar."""
        if target.shape != self.model.train_targets.shape or not torch.equal(target, self.model.train_targets):
            raise ValueError("The evidence of this GP is that of its own data: pass target=gp.train_targets.")
        if not self._checked and isinstance(self.model, LaplaceGP):
            warn_if_far_from_stationary(self.model)
            self._checked = True
        evidence = self._add_other_terms(self._criterion(), params)
        return evidence / function_dist.event_shape.numel()

    @abstractmethod
    def _criterion(self) -> Tensor:
        """In nats, over all data."""


class LaplaceMarginalLogLikelihood(_OwnData):
    """The Laplace evidence divided by the number of data, n K.

    Args:
        likelihood: ``gp.likelihood``.
        model: a :class:`LaplaceGP`, or the GP of a training iterate, a :class:`VariationalGP`.

    The evidence is that of the model's own training data: ``output`` must be ``model(*model.train_inputs)`` in train
    mode, and ``target`` ``model.train_targets``. It takes the closed form whatever GPyTorch's settings are.
    """

    def _criterion(self) -> Tensor:
        return self.model.log_evidence()


class LeaveOneOutPseudoLikelihood(_OwnData):
    """``sum_i log p(y_i | all others)``, in closed form, divided by n K: any loss, any number of outputs.

    Arguments and conventions are those of :class:`LaplaceMarginalLogLikelihood`. Of the linear model; the labels'
    densities are those of ``gp.leave_one_out()`` (for classes by probit). Unlike the evidence it asks how well
    predictions are, so it is the one to take where the evidence fails, as on clean classes.
    """

    _models = LaplaceGP

    def _criterion(self) -> Tensor:
        return leave_one_out_density(self.model)


def leave_one_out_density(gp: LaplaceGP, prior_precision: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
    """``sum_i log p(y_i | all others)`` in nats, a scalar, differentiable in delta and sigma.

    Args:
        gp: with its training data.
        prior_precision, noise: evaluate at these instead of the GP's own.
    """
    if not isinstance(gp, LaplaceGP):
        raise TypeError(f"Leave-one-out predictions are those of a LaplaceGP; got {type(gp).__name__}.")
    y = gp.leave_one_out(prior_precision=prior_precision, noise=noise).y
    labels = gp.train_labels
    shape = y.batch_shape + y.event_shape
    if labels.shape != shape:
        raise ValueError(
            f"Labels of shape {tuple(labels.shape)} have no density under predictions of shape {tuple(shape)}: soft "
            "labels have none. Use the Laplace evidence."
        )
    return y.log_prob(labels).sum()


def warn_if_far_from_stationary(gp: LaplaceGP) -> None:
    """Warn, with the size, where the net is so far from a stationary point that its evidence says little.

    Far is where the evidence's error, ``g^T Sigma g / 2``, exceeds half of what the evidence charges for complexity,
    ``log|I + R^T k R| / 2``.
    """
    if gp.solver == "iterative":  # no evidence
        return
    stationarity = gp.stationarity()
    penalty = 0.5 * float(gp.posterior().log_det.detach())
    if stationarity.evidence_gap > 0.5 * penalty:
        warnings.warn(
            f"The net is {stationarity.newton_decrement**0.5:.3g} posterior standard deviations from a stationary "
            f"point of its loss (gradient norm {stationarity.gradient_norm:.3g}): its evidence may be off by "
            f"{stationarity.evidence_gap:.3g} nats, where {penalty:.3g} are charged for complexity. Train on, for "
            "instance by training.fit with this prior_precision and noise, or by training.train_with_evidence, which "
            "chooses them on the way.",
            StationarityWarning,
            stacklevel=3,
        )


# ---- large n


class BlockEvidence:
    """A lower bound of the Laplace evidence whose gradients come by minibatches.

    For every partition of the data into blocks b

        log|I + R^T k R| <= sum_b log|I + R_b^T k_bb R_b|

    so the sum over blocks in place of the log-determinant bounds the Laplace evidence from below (Immer et al., ICML
    2023), and a random block, times their number, is an unbiased estimate of it and of its gradients. A block costs its
    Gram matrix ``(b K)^2`` for each prior group, once where memory allows, and its Cholesky factor for each evaluation.

    Args:
        gp: a :class:`LaplaceGP` of any size; its solver is not used.
        block_size: examples in a block. The larger, the tighter the bound: one block is the evidence itself.
        generator: random numbers, of the partition and of the blocks of an estimate.
        progress: True, False, or None for a bar on terminals only.

    Attributes:
        num_blocks: in the partition.
    """

    def __init__(
        self,
        gp: LaplaceGP,
        block_size: int,
        generator: torch.Generator | None = None,
        progress: bool | None = None,
    ) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be positive; got {block_size}.")
        if not isinstance(gp, LaplaceGP):
            raise TypeError(
                f"Block bounds are for a LaplaceGP; got {type(gp).__name__}, whose log_evidence() is exact."
            )
        if gp.covar_module.structure.base_root is not None:
            raise ValueError("Block bounds are for independent weights; this prior has a full covariance, P x P.")
        if gp.structure != "full" or gp.residual_kernel is not None:
            raise ValueError("Block bounds are for structure='full' without a residual kernel.")
        if gp.train_inputs[0].dim() != 2 or len(gp.train_inputs[0]) != len(gp.train_labels):
            raise ValueError("Block bounds are for one data set, not for a batch of conditioned GPs.")
        if gp.features == "gradient" and gp.noise is not None and gp.noise.dim() > 0:
            raise ValueError("features='gradient' has block bounds with one sigma for all outputs only.")
        self.gp, self.generator, self.progress = gp, generator, progress
        self._x, self._y = gp.train_inputs[0], gp.train_labels
        with torch.no_grad():
            self._f = gp.linearization(self._x)
        n = len(self._x)
        order = torch.randperm(n, generator=generator)
        self._blocks = [order[part].sort().values.to(self._x.device) for part in tiling.chunks(n, block_size)]
        m = 1 if gp.features == "gradient" else gp.num_outputs
        size = len(gp.covar_module.groups) * sum((len(block) * m) ** 2 for block in self._blocks)
        self.kept = tiling.cache_fits(size, self._f.dtype, self._f.device)
        self._grams: dict[int, Tensor] = {}

    @property
    def num_blocks(self) -> int:
        """In the partition."""
        return len(self._blocks)

    def bound(self, prior_precision: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """The lower bound over all blocks, a scalar in nats, differentiable in delta and sigma.

        Args:
            prior_precision, noise: evaluate at these instead of the GP's own.
        """
        blocks = tiling.progress(range(self.num_blocks), "Blocks", self.progress)
        return sum(self._term(b, prior_precision, noise) for b in blocks) + self._prior_term(prior_precision)

    def estimate(
        self, prior_precision: Tensor | None = None, noise: Tensor | None = None, num_blocks: int = 1
    ) -> Tensor:
        """An unbiased estimate of :meth:`bound`, and by its gradient of the bound's, from random blocks."""
        if not 1 <= num_blocks <= self.num_blocks:
            raise ValueError(f"num_blocks must be between 1 and {self.num_blocks}; got {num_blocks}.")
        drawn = torch.randperm(self.num_blocks, generator=self.generator)[:num_blocks].tolist()
        terms = sum(self._term(b, prior_precision, noise) for b in drawn)
        return self.num_blocks / num_blocks * terms + self._prior_term(prior_precision)

    def _term(self, b: int, prior_precision: Tensor | None, noise: Tensor | None) -> Tensor:
        """``sum_(i in b) log p(y_i|f_i) - log|I + R_b^T k_bb R_b| / 2``."""
        index, gp = self._blocks[b], self.gp
        loss = gp.likelihood.loss_with(noise).subset(index)
        splitting = Splitting(loss, self._f[index], self._y[index], gp.features, gp.likelihood.temperature)
        precision = self._prior(prior_precision).precision
        k = torch.einsum("g,gij->ij", precision.reciprocal(), self._gram(b, splitting))
        b_matrix = information_matrix(k, splitting)
        factor = cholesky(b_matrix, "The matrix I + R^T k R of a block")
        return splitting.data_term() - 0.5 * log_det(b_matrix, factor)

    @torch.no_grad()
    def _gram(self, b: int, splitting: Splitting) -> Tensor:
        if b in self._grams:
            return self._grams[b]
        kernel = self.gp.covar_module
        rows = self.gp.linearization.rows(self._x[self._blocks[b]], splitting.cotangents())
        grams = rows.gram(kernel.groups.indices, kernel.structure.base_variance, progress=False)
        if self.kept:
            self._grams[b] = grams
        return grams

    def _prior(self, prior_precision: Tensor | None):
        if prior_precision is not None:
            prior_precision = torch.as_tensor(prior_precision).to(self._f).expand(len(self.gp.covar_module.groups))
        return self.gp.covar_module.prior(prior_precision)

    def _prior_term(self, prior_precision: Tensor | None) -> Tensor:
        return -0.5 * self._prior(prior_precision).squared_norm(self.gp.linearization.weights)


# ---- how many weights count


def effective_parameters(gp: LaplaceGP) -> Tensor:
    """Effective number of parameters of each prior group, ``(G,)``: ``gamma_g = P_g - tr_g(S0^-1 Sigma)``.

    Between 0 and the number of weights of the group: how many of them the data determine (MacKay 1992). It is
    ``-d log|I + R^T k R| / d log delta_g``; sum it for the whole net.
    """
    with torch.enable_grad():
        logs = gp.prior_precision.detach().log().requires_grad_()
        log_det = gp.posterior_at(prior_precision=logs.exp()).log_det
        return -torch.autograd.grad(log_det, logs)[0]


# ---- delta and sigma


@dataclass(frozen=True)
class EvidenceFit:
    """What :func:`fit_evidence` did.

    Attributes:
        evidence_before, evidence_after: in nats.
        prior_precision: delta at the end, ``(G,)``.
        noise: sigma^2 at the end, or None.
        num_evaluations: of the evidence and its gradient.
        converged: whether the optimiser says so.
        message: its words.
    """

    evidence_before: float
    evidence_after: float
    prior_precision: Tensor
    noise: Tensor | None
    num_evaluations: int
    converged: bool
    message: str

    def __repr__(self) -> str:
        noise = "" if self.noise is None else f", noise {np.round(self.noise.cpu().numpy(), 6)}"
        return (
            f"EvidenceFit({self.evidence_before:.2f} -> {self.evidence_after:.2f} nats in {self.num_evaluations} "
            f"evaluations: prior_precision {np.round(self.prior_precision.cpu().numpy(), 6)}{noise}"
            f"{'' if self.converged else ', NOT converged: ' + self.message})"
        )


def fit_evidence(
    gp: LaplaceGP,
    kind: str = "laplace",
    fit_noise: bool | None = None,
    max_iterations: int = 200,
    log_range: float = 25.0,
    block_size: int | None = None,
    generator: torch.Generator | None = None,
    warn: bool = True,
    progress: bool | None = None,
) -> EvidenceFit:
    """Choose ``prior_precision`` and ``noise`` by maximising the evidence: L-BFGS on their logarithms.

    The net stays as it is, so each step costs one factorisation and no Jacobian; with one delta and at most one sigma,
    one eigendecomposition serves all steps. Priors registered on the hyperparameters are added. The raw parameters of a
    residual kernel are fitted too. If interrupted, the GP is left at its best point so far.

    Args:
        gp: changed in place: its ``prior_precision`` and ``noise``.
        kind: "laplace" (any loss), "gp", or "leave_one_out" (:func:`leave_one_out_density`).
        fit_noise: whether sigma is fitted too; None means where the loss has a learnable one.
        max_iterations: of L-BFGS.
        log_range: how far the logarithms may move from where they start, a guard against maxima at infinity.
        block_size: for many examples: fit the lower bound by :class:`BlockEvidence` instead. By L-BFGS where the Gram
            matrices of the blocks fit in memory, else by Adam on one random block for each of ``max_iterations`` steps.
        generator: random numbers of the blocks.
        warn: whether to warn of a net far from a stationary point (not looked at with ``block_size``).
        progress: True, False, or None for a bar on terminals only.

    Raises:
        ValueError: for a noise that cannot be fitted (given per example; labels that are all equal), or an evidence
            that does not exist.
    """
    fit_noise = _noise_is_fitted(gp, fit_noise)
    if fit_noise:
        require_varied_labels(gp.loss, gp.train_labels)
    if block_size is not None and kind != "laplace":
        raise ValueError(f"block_size bounds the Laplace evidence; it cannot be had with kind={kind!r}.")
    blocks = None if block_size is None else BlockEvidence(gp, block_size, generator, progress=False)
    evidence = _evidence_of(gp, kind) if blocks is None else blocks.bound
    if warn and blocks is None:
        warn_if_far_from_stationary(gp)
    problem = _LogHyperparameters(gp, fit_noise)
    if blocks is not None and not blocks.kept:
        return _fit_by_blocks(problem, blocks, max_iterations, progress)

    start = problem.start.double().cpu().numpy()
    bar = tiling.progress(None, "Evidence", progress, unit=" evaluations")
    history: list[tuple[float, np.ndarray, float]] = []  # objective, logarithms, evidence
    num_refused = 0

    def best() -> tuple[float, np.ndarray, float]:
        return max(history, key=lambda item: item[0])

    def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal num_refused
        bar.update()
        try:
            total, here, gradient = problem.gradient(evidence, torch.as_tensor(values))
        except NotPositiveDefiniteError:
            if not history:
                raise
            num_refused += 1
            value, center, _ = best()
            away = values - center  # too far: a steep bowl around the best so far lets the line search step back
            return -value + (1 + abs(value)) * float(away @ away), 2 * (1 + abs(value)) * away
        history.append((total, values.copy(), here))
        bar.set_postfix(evidence=f"{here:.2f}")
        return -total, -gradient.double().cpu().numpy()

    try:
        result = minimize(
            objective,
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=list(zip(*problem.bounds(log_range), strict=True)),
            options={"maxiter": max_iterations},
        )
    finally:
        bar.close()
        if history:
            problem.set_to(torch.as_tensor(best()[1]))
    number, message = len(history) + num_refused, str(result.message)
    if num_refused:  # steps cut short may have ended it, not a maximum
        message = f"{num_refused} of the values tried left a matrix without a Cholesky factor; {message}"
    return problem.result(history[0][2], best()[2], number, bool(result.success) and not num_refused, message)


def _evidence_of(gp: LaplaceGP, kind: str) -> Callable[..., Tensor]:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}; got {kind!r}.")
    if kind != "leave_one_out":
        return gp.evidence_function(kind)
    return lambda prior_precision, noise: leave_one_out_density(gp, prior_precision, noise)


def _noise_is_fitted(gp: LaplaceGP, fit_noise: bool | None) -> bool:
    learnable = gp.noise is not None and not gp.likelihood.per_example_noise
    if gp.features == "gradient" and learnable and gp.noise.dim() > 0:
        learnable = False  # the rows r^T J themselves change with it
    if fit_noise and not learnable:
        raise ValueError(
            f"There is no learnable noise in {gp.loss} with features={gp.features!r}: one given per example is fixed, "
            "and so is one per output for the empirical Fisher. Leave fit_noise out."
        )
    return learnable if fit_noise is None else fit_noise


def require_varied_labels(loss: Loss, labels: Tensor) -> None:
    """Raise where labels leave the noise of a Gaussian loss without a finite estimate.

    Raises:
        ValueError: if there is one example, or all labels (of an output, for one noise per output) are equal.
    """
    columns = labels.reshape(len(labels), -1)
    constant = (columns == columns[:1]).all(0)
    if loss.noise.dim() == 0:
        constant = constant.all(0, keepdim=True)
    if constant.any():
        what = "There is one example" if len(labels) == 1 else "All labels are equal"
        if len(labels) > 1 and loss.noise.dim() > 0:
            what = f"All labels of output {int(constant.nonzero()[0, 0])} are equal"
        raise ValueError(
            f"{what}: nothing in the data tells noise from function, and the evidence has no maximum in sigma. Give "
            "sigma and pass fit_noise=False."
        )


class _Closure(torch.nn.Module):
    """What a prior is on, as the ``forward`` of a module, so that it can be called with other parameters."""

    def __init__(self, module: torch.nn.Module, closure: Callable[[torch.nn.Module], Tensor]) -> None:
        super().__init__()
        self.module, self.closure = module, closure

    def forward(self) -> Tensor:
        return self.closure(self.module)


class _LogHyperparameters:
    """log delta, log sigma^2 and the raw parameters of a residual kernel in one vector."""

    def __init__(self, gp: LaplaceGP, fit_noise: bool) -> None:
        self.gp = gp
        residual = () if gp.residual_kernel is None else gp.residual_kernel.parameters()
        self.residual = [p for p in residual if p.requires_grad]
        delta = gp.prior_precision.detach()
        self.num_groups = delta.numel()
        parts = [delta.log().flatten()]
        self.noise_shape = gp.noise.shape if fit_noise else None
        if fit_noise:
            parts.append(gp.noise.detach().log().flatten())
        self.num_logs = sum(len(part) for part in parts)
        self.start = torch.cat([*parts, *(p.detach().flatten() for p in self.residual)])

    def bounds(self, log_range: float) -> tuple[np.ndarray, np.ndarray]:
        """Least and largest values of the vector: ``log_range`` around the start, and what constraints leave of it."""
        low, high = self.start.double() - log_range, self.start.double() + log_range
        constraints = [self.gp.covar_module.raw_prior_precision_constraint] * self.num_groups
        if self.noise_shape is not None:
            constraints += [self.gp.likelihood.raw_noise_constraint] * self.noise_shape.numel()
        for i, constraint in enumerate(constraints):  # the bounds themselves lie at infinity of the raw parameter
            least, most = (float(bound.max()) for bound in (constraint.lower_bound, constraint.upper_bound))
            if least > 0:
                low[i] = low[i].clamp(min=math.log(least) + BOUND_MARGIN)
            if most < math.inf:
                high[i] = high[i].clamp(max=math.log(most) - BOUND_MARGIN)
        return low.cpu().numpy(), high.cpu().numpy()

    def split(self, theta: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prior precision and sigma^2."""
        delta = theta[: self.num_groups].exp()
        if self.noise_shape is None:
            return delta, None
        return delta, theta[self.num_groups : self.num_logs].exp().reshape(self.noise_shape)

    def set_to(self, theta: Tensor) -> None:
        delta, noise = self.split(theta.to(self.start))
        self.gp.prior_precision = delta
        if noise is not None:
            self.gp.noise = noise
        self._set_residual(theta)

    @torch.no_grad()
    def _set_residual(self, theta: Tensor) -> None:
        for p, piece in zip(self.residual, theta[self.num_logs :].split([p.numel() for p in self.residual])):
            p.copy_(piece.view_as(p))

    def gradient(self, evidence: Callable[..., Tensor], theta: Tensor) -> tuple[float, float, Tensor]:
        """Evidence with priors, evidence, and the gradient of the former."""
        theta = theta.to(self.start).requires_grad_()
        self._set_residual(theta)
        with torch.enable_grad():
            delta, noise = self.split(theta)
            value = evidence(prior_precision=delta, noise=noise)
            total = value + self._log_priors(delta, noise)
            gradient, *others = torch.autograd.grad(total, [theta, *self.residual])
        gradient = torch.cat([gradient[: self.num_logs], *(g.flatten() for g in others)])
        return float(total.detach()), float(value.detach()), gradient

    def _log_priors(self, prior_precision: Tensor, noise: Tensor | None) -> Tensor:
        """Log densities of the priors registered on the hyperparameters, at these values."""
        gp, total = self.gp, prior_precision.new_zeros(())
        kernel, likelihood = gp.covar_module, gp.likelihood
        delta = kernel.raw_prior_precision_constraint.inverse_transform(prior_precision)
        raw = {kernel: {"module.raw_prior_precision": delta.reshape(kernel.raw_prior_precision.shape)}}
        if noise is not None:
            sigma2 = likelihood.raw_noise_constraint.inverse_transform(noise)
            raw[likelihood] = {"module.raw_noise": sigma2.reshape(likelihood.raw_noise.shape)}
        for _, module, prior, closure, _ in gp.named_priors():
            value = functional_call(_Closure(module, closure), raw.get(module, {}), ())
            total = total + prior.log_prob(value).sum()
        return total

    def result(self, before: float, after: float, evaluations: int, converged: bool, message: str) -> EvidenceFit:
        gp = self.gp
        noise = None if gp.noise is None else gp.noise.detach().clone()
        return EvidenceFit(before, after, gp.prior_precision.detach().clone(), noise, evaluations, converged, message)


def _fit_by_blocks(
    problem: _LogHyperparameters, blocks: BlockEvidence, steps: int, progress: bool | None
) -> EvidenceFit:
    """Adam on single blocks, its learning rate decayed to zero by a cosine."""
    with torch.no_grad():
        before = float(blocks.bound())
    theta = problem.start.clone()
    optimizer = torch.optim.Adam([torch.nn.Parameter(theta)], lr=0.1)  # shares the memory of theta
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    low, high = (torch.as_tensor(bound).to(theta) for bound in problem.bounds(math.inf))
    try:
        for _ in tiling.progress(range(steps), "Evidence by blocks", progress, unit=" steps"):
            _, _, gradient = problem.gradient(blocks.estimate, theta.clone())
            optimizer.param_groups[0]["params"][0].grad = -gradient
            optimizer.step()
            theta.clamp_(low, high)
            scheduler.step()
    finally:
        problem.set_to(theta)
    with torch.no_grad():
        after = float(blocks.bound())
    return problem.result(before, after, steps, True, "fixed number of steps of Adam")
