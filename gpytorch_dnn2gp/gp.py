"""The Gaussian process that a trained net is: posterior, predictions, evidence.

    gp(x)               posterior of f in function space: mean f* - J* Sigma g, covariance J* Sigma J*^T
    gp.predict(x)       labels: mean, aleatoric and epistemic variance, distribution
    gp.log_evidence()   Laplace or GP evidence, differentiable in delta and sigma

Output form: targets in the space of the net's outputs, prior mean ``c(x) = f_w*(x) - J(x) w*`` (spelled out in
dual.py). The paper's targets ``y~`` are in ``gp.dual_data()``. n examples, K outputs, P weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import gpytorch
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.models import ExactGP
from linear_operator import to_linear_operator
from linear_operator.operators import ZeroLinearOperator
from torch import Tensor, nn
from torch.distributions import Distribution

from . import dual, solvers
from .from_torch import collect, translate_loss
from .kernels import JacobianKernel, NetworkMean, as_linearization
from .laplace import FEATURES, Splitting
from .likelihoods import GGNLikelihood
from .linearize import Linearization
from .losses import Loss
from .predictive import predictive
from .weights import GaussianWeights

STRUCTURES = ("full", "diagonal")
_SOLVERS = {
    "weight_space": solvers.WeightSpace,
    "function_space": solvers.FunctionSpace,
    "iterative": solvers.Iterative,
}


@dataclass(frozen=True)
class Prediction:
    """Labels and outputs at new inputs ``(..., m, d)``.

    Attributes:
        mean: ``E[y]``, ``(..., m, D)``; class probabilities for a categorical loss.
        aleatoric: ``E[Var[y|f]]``, the part that more data would not remove, ``(..., m, D)``.
        epistemic: ``Var[E[y|f]]``, the part that comes from not knowing the weights, ``(..., m, D)``.
        f: the outputs' Gaussian: one for each example, batch ``(..., m)`` and event ``(K,)``; with ``joint=True`` one
            over all examples, as ``gp(x)`` gives it.
        y: distribution of each label.
        probs: class probabilities ``(..., m, K)``, of ones for a Bernoulli loss; else None.
    """

    mean: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    f: MultivariateNormal
    y: Distribution
    probs: Tensor | None

    @property
    def variance(self) -> Tensor:
        """``Var[y]``, aleatoric plus epistemic, ``(..., m, D)``."""
        return self.aleatoric + self.epistemic

    def __repr__(self) -> str:
        return (
            f"Prediction(mean={tuple(self.mean.shape)}, aleatoric variance {float(self.aleatoric.mean()):.3g} and "
            f"epistemic variance {float(self.epistemic.mean()):.3g} on average)"
        )


@dataclass(frozen=True)
class Stationarity:
    """How far the net is from a stationary point of its loss, where the Laplace approximation is taken.

    Attributes:
        gradient_norm: ``|g|``, ``g = sum_i J_i^T r_i + S0^-1 w*``.
        newton_decrement: ``g^T Sigma g``, free of scale: the squared length of the Gauss-Newton step from w* to the
            posterior mean, in posterior standard deviations. Well below one is near; for a Gaussian loss half of it is
            the gap in nats between GP and Laplace evidence.
    """

    gradient_norm: float
    newton_decrement: float

    @property
    def evidence_gap(self) -> float:
        """``g^T Sigma g / 2`` in nats."""
        return self.newton_decrement / 2

    def __repr__(self) -> str:
        return (
            f"Stationarity(gradient norm {self.gradient_norm:.3g}, {self.newton_decrement**0.5:.3g} posterior standard "
            "deviations from the Gauss-Newton optimum)"
        )


class LaplaceGP(ExactGP):
    """The Laplace-GGN approximation of a trained net as an exact GP (Theorem 1). Returned in eval mode.

    Args:
        net: trained module (copied, frozen, never touched) or :class:`Linearization`.
        train_x: ``(n, d)``, or ``(n, *input_shape)``, which then is taken as ``input_shape``.
        train_y: labels, in the form that the loss wants.
        loss: from ``losses``: the negative log-likelihood whose sum over the data, plus the weight penalty, the net
            was trained on. Its noise is the initial value of ``gp.noise``.
        prior_precision: delta of the penalty ``delta |w|^2 / 2``: a number, or one entry per group. For a mean loss with
            weight decay see :meth:`from_training`.
        groups: which parameters share a precision; see :class:`JacobianKernel`.
        params: which weights are random; see :class:`Linearization`.
        solver: "weight_space" (P x P), "function_space" (n K x n K), "iterative" (conjugate gradients, no evidence), or
            "auto" for the cheaper dense one that fits in memory. They agree.
        structure: "full", or "diagonal" for ``diag(J^T Lambda J)``, the paper's practical variant.
        features: "jacobian" for the generalised Gauss-Newton matrix, "gradient" for the empirical Fisher (paper eq. 5
            with ``phi = J^T r``): an n x n kernel whatever K is.
        input_shape, input_dtype: see :class:`Linearization`.
        prior_variance: see :class:`JacobianKernel`.
        temperature: the loss is divided by it.
        progress: bars on long work: True, False, or None for terminals only.

    Raises:
        ValueError, TypeError: bad data, labels, net or hyperparameters, before any long work.
        MemoryError: at the first use, if the asked-for solver does not fit; names the size and what else there is.
    """

    def __init__(
        self,
        net: nn.Module | Linearization,
        train_x: Tensor,
        train_y: Tensor,
        loss: Loss,
        prior_precision: float | Sequence[float] | Tensor = 1.0,
        groups: Sequence[str | Sequence[str]] | None = None,
        params: Sequence[str] | str | None = None,
        solver: str = "auto",
        structure: str = "full",
        features: str = "jacobian",
        input_shape: Sequence[int] | None = None,
        input_dtype: torch.dtype | None = None,
        prior_variance: Tensor | None = None,
        temperature: float = 1.0,
        progress: bool | None = None,
    ) -> None:
        _require_one_of("solver", solver, solvers.SOLVERS)
        _require_one_of("structure", structure, STRUCTURES)
        _require_one_of("features", features, FEATURES)
        if not isinstance(loss, Loss):
            raise TypeError(
                f"loss must come from gpytorch_dnn2gp.losses; got {type(loss).__name__}. For a torch loss use "
                "LaplaceGP.from_training; for your own function losses.from_callable."
            )
        if structure == "diagonal" and solver != "auto":
            raise ValueError("structure='diagonal' needs no solver: leave solver='auto'.")
        if input_shape is None and not isinstance(net, Linearization) and train_x.dim() > 2:
            input_shape = train_x.shape[1:]
        lin = as_linearization(net, params=params, input_shape=input_shape, input_dtype=input_dtype)
        train_x = lin.flatten_inputs(train_x).detach().clone()  # read again later: must not change with the user's
        f = lin(train_x).detach()
        if len(f) == 0:
            raise ValueError("train_x is empty.")
        labels = loss.check_labels(train_y, f.shape[-1], len(f), f.dtype, f.device).detach().clone()

        super().__init__(train_x, _output_targets(loss, f, labels), GGNLikelihood(loss, lin, temperature=temperature))
        self.mean_module = NetworkMean(lin)
        self.covar_module = JacobianKernel(lin, prior_precision, groups, prior_variance)
        self.train_labels = labels
        self.structure, self.features, self.requested_solver = structure, features, solver
        self.show_progress = progress
        self._train_outputs = f
        self._clear_solver()
        self.eval()

    @classmethod
    def from_training(
        cls,
        net: nn.Module | Linearization,
        data: Iterable | tuple[Tensor, Tensor],
        torch_loss: nn.Module,
        weight_decay: float | Sequence[float] | Tensor,
        sigma: float | Tensor | None = None,
        unpack: Callable | None = None,
        **options,
    ) -> LaplaceGP:
        """From what was trained: a torch loss and the optimizer's weight decay.

        Minimising ``mean loss + weight_decay |w|^2 / 2`` (what SGD and Adam do with ``weight_decay``) is minimising
        ``c * mean loss + delta |w|^2 / 2`` with ``delta = c * weight_decay``, where c turns the torch loss into the sum
        of negative log-likelihoods:

            CrossEntropyLoss       c = n              BCEWithLogitsLoss, PoissonNLLLoss     c = n K
            MSELoss                c = n K / (2 sigma^2)
            reduction="sum"        c = 1, and 1 / (2 sigma^2) for MSELoss

        AdamW decouples its decay from the loss, so no delta corresponds to it exactly: choose one by the evidence.

        Args:
            net: as above.
            data: ``(x, y)``, or a ``DataLoader`` or any iterable of batches: tuples ``(x, y)``, or dicts with one entry
                for the inputs and one called y, label, labels, target or targets.
            torch_loss: one of the modules above (label smoothing allowed).
            weight_decay: a number, or one entry per group.
            sigma: noise standard deviation, for MSELoss.
            unpack: ``batch -> (x, y)``, for other batches.
            options: of :class:`LaplaceGP`.
        """
        x, y = collect(data, unpack)
        net = _linearization_for(net, x, options)
        f = net(net.flatten_inputs(x))
        loss, labels, scale = translate_loss(torch_loss, f, y, sigma)
        delta = torch.as_tensor(weight_decay, dtype=f.dtype) * torch.as_tensor(scale, dtype=f.dtype)
        if not (delta > 0).all():
            raise ValueError(
                "weight_decay must be positive: without it there is no prior on the weights. For a net trained without, "
                "use LaplaceGP(net, x, y, loss, prior_precision=...) and choose it by the evidence (fit_evidence)."
            )
        return cls(net, x, labels, loss, delta, **options)

    # ---- hyperparameters: kept by kernel and likelihood, forwarded here

    @property
    def linearization(self) -> Linearization:
        """The frozen net."""
        return self.covar_module.linearization

    @property
    def prior_precision(self) -> Tensor:
        """delta, ``(G,)``."""
        return self.covar_module.prior_precision

    @prior_precision.setter
    def prior_precision(self, value: float | Sequence[float] | Tensor) -> None:
        self.covar_module.prior_precision = value

    @property
    def noise(self) -> Tensor | None:
        """sigma^2 of a Gaussian loss: a number, ``(K,)`` or ``(n, K)``; else None."""
        return self.likelihood.noise

    @noise.setter
    def noise(self, value: float | Tensor) -> None:
        self.likelihood.noise = value

    @property
    def loss(self) -> Loss:
        """The loss at the present noise."""
        return self.likelihood.loss

    @property
    def num_outputs(self) -> int:
        """K."""
        return self._train_outputs.shape[-1]

    @property
    def solver(self) -> str:
        """The solver in use: what "auto" chose, or "diagonal"."""
        names = {kind: name for name, kind in _SOLVERS.items()} | {solvers.Diagonal: "diagonal"}
        return names[self._solver_class()]

    # ---- GPyTorch model

    def forward(self, x: Tensor) -> MultivariateNormal:
        """The prior: mean c(x), covariance k."""
        mean, covariance = self.mean_module(x), self.covar_module(x)
        if self.num_outputs == 1:
            return MultivariateNormal(mean, covariance)
        return MultitaskMultivariateNormal(mean, covariance)

    def __call__(self, x: Tensor, **kwargs) -> MultivariateNormal:
        """Posterior of f at ``x`` ``(..., m, d)`` in eval mode; the prior at the training inputs in train mode.

        Returns:
            ``MultivariateNormal`` for one output, else ``MultitaskMultivariateNormal`` over ``(m, K)``, interleaved.
        """
        x = self.linearization.flatten_inputs(x)
        if self.training or gpytorch.settings.prior_mode.on() or self.train_inputs is None:
            return super().__call__(x, **kwargs)
        rows = self.linearization.rows(x)
        return self._distribution(self._mean(x, "posterior"), self._joint_covariance(rows))

    def set_train_data(self, inputs=None, targets=None, strict: bool = True) -> None:
        """Not yet: build a new :class:`LaplaceGP`, which costs the same."""
        raise NotImplementedError(
            "A LaplaceGP's targets follow from its net and labels; build a new one: LaplaceGP(gp.linearization, x, y, "
            "loss, prior_precision=gp.prior_precision)."
        )

    def predict(
        self,
        x: Tensor,
        mean: str = "network",
        approximation: str | None = None,
        num_samples: int = 1000,
        noise: Tensor | None = None,
        joint: bool = False,
        generator: torch.Generator | None = None,
    ) -> Prediction:
        """Labels at new inputs (paper appendix B).

        Args:
            x: ``(..., m, d)``.
            mean: "network", the net's own outputs, or "posterior", the GP's mean, which is one Gauss-Newton step away.
                They agree at a stationary point.
            approximation: how f is averaged over; see :mod:`gpytorch_dnn2gp.predictive`. For classes "probit"
                (default), "linear" (paper eq. 48), "bridge", "mc".
            num_samples: of "mc".
            noise: sigma^2 of these examples, ``(m, K)``, where the noise was given per example.
            joint: let ``f`` be joint over all examples, ``(m K) x (m K)``.
            generator: random numbers of "mc".
        """
        _require_one_of("mean", mean, ("network", "posterior"))
        x = self.linearization.flatten_inputs(x)
        rows = self.linearization.rows(x)
        center = self._mean(x, mean)
        if noise is None and self.likelihood.per_example_noise:
            raise ValueError(
                "The noise was given for each training example, so that of new ones is not known, however many they "
                "are: pass noise=, sigma^2 of shape (m, 1) or (m, K). gp(x), the posterior of f, needs none."
            )
        loss = self.loss if noise is None else self.likelihood.loss_with(noise)
        if joint:
            f = self._distribution(center, self._joint_covariance(rows))
            covariance = _diagonal_blocks(f.covariance_matrix, self.num_outputs)
        else:
            covariance = self.posterior().covariance_blocks(rows)
            f = MultivariateNormal(center, to_linear_operator(covariance))
        labels = predictive(loss, center, covariance, approximation, num_samples, generator)
        return Prediction(labels.mean, labels.aleatoric, labels.epistemic, f, labels.y, labels.probs)

    # ---- what the GP is made of

    def dual_data(self) -> dual.DualData:
        """The regression data of Theorem 1: inputs, targets ``y~`` and noise precision."""
        splitting = self._splitting()
        rows = self._training_rows(splitting)
        with torch.no_grad():
            targets = dual.dual_targets(splitting, rows.matmul(self.linearization.weights))
            return dual.DualData(self.train_inputs[0], targets, dual.noise_precision(splitting))

    def weight_posterior(self) -> GaussianWeights:
        """``N(w* - Sigma g, Sigma)`` over the selected weights."""
        posterior = self.posterior()
        return posterior.weights(self.linearization.weights - posterior.step)

    def stationarity(self) -> Stationarity:
        """How far the net is from a stationary point."""
        with torch.no_grad():
            splitting, prior = self._splitting(), self.covar_module.prior()
            w = self.linearization.weights
            gradient = self._training_rows(splitting).rmatmul(splitting.v) + w / prior.variance
            # g^T (Sigma g): unlike the solver's own form it does not cancel near a stationary point
            decrement = (gradient @ self.posterior().step).clamp(min=0)
            return Stationarity(float(gradient.norm()), float(decrement))

    def log_evidence(
        self, kind: str = "laplace", prior_precision: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Log marginal likelihood, a scalar in nats, differentiable in delta and sigma.

        Args:
            kind: "laplace" for the Laplace evidence, of any loss; "gp" for ``log N(y~; 0, k + Lambda^-1)``, which a
                softmax does not have.
            prior_precision, noise: evaluate at these instead of the GP's own.
        """
        _require_one_of("kind", kind, ("laplace", "gp"))
        if kind == "gp" and self.structure == "diagonal":
            raise ValueError("structure='diagonal' has no GP evidence: its kernel is not the prior's. Use 'laplace'.")
        splitting, prior = self._splitting(noise), self.covar_module.prior(prior_precision)
        if torch.is_grad_enabled() or prior_precision is not None or noise is not None:
            posterior = self._solver_for(splitting).posterior(prior, splitting)
        else:
            posterior = self.posterior()
        return solvers.log_evidence(posterior, prior, splitting, self.linearization.weights, kind)

    def posterior(self) -> solvers.Posterior:
        """The Gaussian over weights and outputs at the present hyperparameters, cached until one of them changes.

        As GPyTorch's caches, it carries no gradient in the hyperparameters unless
        ``gpytorch.settings.detach_test_caches`` is off.
        """
        if torch.is_grad_enabled() and gpytorch.settings.detach_test_caches.off():
            splitting = self._splitting()
            return self._solver_for(splitting).posterior(self.covar_module.prior(), splitting)
        key = (self.prior_precision.detach(), self.likelihood.temperature, *_present(self.noise))
        if self._posterior is None or not _same(self._posterior[0], key):
            with torch.no_grad():
                splitting = self._splitting()
                posterior = self._solver_for(splitting).posterior(self.covar_module.prior(), splitting)
            self._posterior = (tuple(k.clone() for k in key), posterior)
        return self._posterior[1]

    # ---- inside

    def _splitting(self, noise: Tensor | None = None) -> Splitting:
        loss = self.likelihood.loss_with(noise)
        return Splitting(loss, self._train_outputs, self.train_labels, self.features, self.likelihood.temperature)

    def _training_rows(self, splitting: Splitting):
        return self.linearization.rows(self.train_inputs[0], splitting.cotangents())

    def _solver_class(self) -> type[solvers.Solver]:
        if self.structure == "diagonal":
            return solvers.Diagonal
        if self.requested_solver != "auto":
            return _SOLVERS[self.requested_solver]
        splitting = self._splitting()
        rows = self._training_rows(splitting)
        return solvers.choose(rows, len(self.covar_module.groups), len(splitting.noise_scale))

    def _solver_for(self, splitting: Splitting) -> solvers.Solver:
        """The sums over the data, taken once; again only where the rows themselves depend on the noise."""
        key = (splitting.unit().loss.noise.detach(),) if self.features == "gradient" and self.noise is not None else ()
        if self._solver is None or not _same(self._solver[0], key):
            solver = self._solver_class()(
                self._training_rows(splitting),
                splitting,
                self.covar_module.groups,
                self.covar_module.structure.base_variance,
                self.linearization.weights,
                self.show_progress,
            )
            self._solver = (key, solver)
        return self._solver[1]

    def _clear_solver(self) -> None:
        self._solver: tuple[tuple[Tensor, ...], solvers.Solver] | None = None
        self._posterior: tuple[tuple[Tensor, ...], solvers.Posterior] | None = None

    def _mean(self, x: Tensor, kind: str) -> Tensor:
        f = self.linearization(x)
        return f if kind == "network" else f - self.linearization.jvp(x, self.posterior().step)

    def _joint_covariance(self, rows):
        if gpytorch.settings.skip_posterior_variances.on():
            size = rows.batch_shape[-1] * self.num_outputs
            return ZeroLinearOperator(
                *rows.batch_shape[:-1], size, size, dtype=self._train_outputs.dtype, device=self._train_outputs.device
            )
        return self.posterior().covariance(rows)

    def _distribution(self, mean: Tensor, covariance) -> MultivariateNormal:
        covariance = to_linear_operator(covariance)  # a plain tensor would be factorised at once, singular or not
        if self.num_outputs == 1:
            return MultivariateNormal(mean.squeeze(-1), covariance)
        return MultitaskMultivariateNormal(mean, covariance)

    def _apply(self, fn):
        # .to(...), .double(), .cuda(): data and outputs go along, what was computed from them is dropped
        self.train_labels = fn(self.train_labels)
        self._clear_solver()
        result = super()._apply(fn)
        self._train_outputs = self.linearization(self.train_inputs[0])
        return result


def _output_targets(loss: Loss, f: Tensor, labels: Tensor) -> Tensor:
    """Targets in output form, ``(n,)`` or ``(n, K)``: ``f - Lambda^-1 r`` where it exists, else f as a placeholder."""
    targets = f
    if loss.has_noise:
        targets = labels  # a Gaussian's: f - sigma^2 (f - y) / sigma^2 = y
    elif loss.invertible:
        try:
            targets = f - dual.newton_offset(Splitting(loss, f, labels))
        except ValueError:  # a saturated example has no target; posterior and evidence do not read any
            targets = f
    return targets.squeeze(-1) if f.shape[-1] == 1 else targets


def _linearization_for(net: nn.Module | Linearization, x: Tensor, options: dict) -> Linearization:
    if isinstance(net, Linearization):
        return net
    input_shape = options.pop("input_shape", None)
    if input_shape is None and x.dim() > 2:
        input_shape = x.shape[1:]
    return Linearization(net, options.pop("params", None), input_shape, options.pop("input_dtype", None))


def _diagonal_blocks(covariance: Tensor, k: int) -> Tensor:
    """``K x K`` blocks ``(..., m, K, K)`` of a covariance ``(..., m K, m K)``."""
    m = covariance.shape[-1] // k
    return covariance.unflatten(-1, (m, k)).unflatten(-3, (m, k)).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _require_one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}.")


def _present(tensor: Tensor | None) -> tuple[Tensor, ...]:
    return () if tensor is None else (tensor.detach(),)


def _same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
