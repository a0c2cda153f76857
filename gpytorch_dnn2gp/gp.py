"""The Gaussian process that a trained net is: posterior, predictions, evidence.

    gp(x)               posterior of f in function space: mean f* - J* Sigma g, covariance J* Sigma J*^T
    gp.predict(x)       labels: mean, aleatoric and epistemic variance, distribution
    gp.log_evidence()   Laplace or GP evidence, differentiable in delta and sigma
    gp.condition_on(x, y)   the GP with more data, in closed form

Output form: targets in the space of the net's outputs, prior mean ``c(x) = f_w*(x) - J(x) w*`` (spelled out in
dual.py). The paper's targets ``y~`` are in ``gp.dual_data()``. n examples, K outputs, P weights.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence

import gpytorch
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.models import ExactGP
from linear_operator import to_linear_operator
from linear_operator.operators import KroneckerProductLinearOperator, ZeroLinearOperator
from torch import Tensor, nn

from . import dual, solvers, tiling
from .added_data import AddedData, canonical_labels, expand_batch
from .conditioning import Conditioned, condition
from .from_torch import collect, translate_loss
from .kernels import JacobianKernel, NetworkMean, as_linearization
from .laplace import FEATURES, Splitting
from .likelihoods import GGNLikelihood
from .linear_model import LinearModel, StackedRows
from .linearize import Linearization, Rows
from .losses import Loss
from .model_state import (
    DIGEST_SIZE,
    before_loading,
    close,
    described,
    digest,
    forget,
    has_new_net,
    hyperparameters,
    is_own,
    loss_values,
    restore,
)
from .numerics import diagonal_blocks, in_plain_mode, require_finite, require_positive
from .operators import Covariance
from .prediction import Prediction, Stationarity
from .predictive import predictive
from .weights import GaussianWeights, Prior

STRUCTURES = ("full", "diagonal")
_SOLVERS = {
    "weight_space": solvers.WeightSpace,
    "function_space": solvers.FunctionSpace,
    "iterative": solvers.Iterative,
}


class NetworkGP(ExactGP):
    """A net that is linear in its weights near where it was linearized, as an exact GP; returned in eval mode.

    What :class:`LaplaceGP` (a trained net, Theorem 1) and :class:`VariationalGP` (an iterate of training, Theorem 2, or
    any Gaussian over weights) share: all but how the linear model comes about. Make one of these.
    """

    def __init__(
        self,
        kernel: JacobianKernel,
        train_x: Tensor,
        train_y: Tensor,
        loss: Loss,
        model: LinearModel,
        solver: str = "auto",
        structure: str = "full",
        features: str = "jacobian",
        temperature: float = 1.0,
        residual_kernel: Kernel | None = None,
        progress: bool | None = None,
    ) -> None:
        _require_one_of("solver", solver, solvers.SOLVERS)
        _require_one_of("structure", structure, STRUCTURES)
        _require_one_of("features", features, FEATURES)
        _require_loss(loss)
        if structure == "diagonal" and solver != "auto":
            raise ValueError("structure='diagonal' needs no solver: leave solver='auto'.")
        if kernel.structure.base_root is not None:
            if structure != "full" or solver not in ("auto", "weight_space"):
                raise ValueError(
                    "A full prior covariance, P x P, works in weight space: leave structure='full' and solver='auto'."
                )
            solver = "weight_space"
        if residual_kernel is not None:
            if not isinstance(residual_kernel, Kernel):
                raise TypeError(f"residual_kernel must be a GPyTorch kernel; got {type(residual_kernel).__name__}.")
            if structure != "full" or features != "jacobian" or solver not in ("auto", "function_space"):
                raise ValueError(
                    "residual_kernel works in function space: leave structure='full', features='jacobian' and solver="
                    "'auto' or 'function_space'."
                )
            solver = "function_space"
        lin = kernel.linearization
        super().__init__(None, None, GGNLikelihood(loss, lin, temperature=temperature))
        self.model, self._given_temperature = model, float(temperature)
        self.mean_module = NetworkMean(lin, None if model.away is None else lin.weights - model.away)
        self.covar_module = kernel
        self.residual_kernel = None if residual_kernel is None else copy.deepcopy(residual_kernel).to(lin.weights)
        if features == "gradient" and not self.likelihood.per_example_noise and loss.has_noise and loss.noise.dim() > 0:
            self.likelihood.raw_noise.requires_grad_(False)  # the rows r^T J depend on it: set it, do not learn it
        self.structure, self.features, self.requested_solver = structure, features, solver
        self.show_progress = progress
        self._set_data(train_x, train_y)
        for module in self._parts():
            module.register_load_state_dict_pre_hook(before_loading)
        self.register_load_state_dict_post_hook(_after_loading_state)
        self.eval()

    @in_plain_mode
    def _set_data(self, x: Tensor, y: Tensor) -> None:
        lin, loss = self.linearization, self.loss
        x = lin.flatten_inputs(x).detach().clone()  # read again later: must not change with the user's
        if x.dim() != 2:
            raise ValueError(f"Training inputs must be (n, d) or (n, *input_shape); got {tuple(x.shape)}.")
        f = lin(x).detach()
        if len(f) == 0:
            raise ValueError("There are no training examples.")
        weight = self.model.weight(len(f))
        require_finite(f, "The net's output at the training inputs", "Scale the inputs as in training.")
        labels = loss.check_labels(y, f.shape[-1], len(f), f.dtype, f.device).detach().clone()
        self.train_inputs, self.train_targets, self.train_labels = (
            (x,),
            _output_targets(loss, f, labels, self.model.pull),
            labels,
        )
        self._inputs, self._labels, self._outputs = x, labels, f
        self._sample_outputs = (
            torch.cat([net(x).detach() for net in self.model.samples]) if self.model.samples else None
        )
        if self.likelihood.per_example_noise:
            self.likelihood.train_inputs = x  # whose noise it is
        if self._is_weighted:
            # (c Lambda)^-1 is the dual Gaussian's noise; the labels' own stays
            self.likelihood.temperature = self._given_temperature / weight
        self._added: AddedData | None = None
        self._clear_solver()

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
        return self._outputs.shape[-1]

    @property
    def solver(self) -> str:
        """The solver in use: what "auto" chose, "diagonal", or "given" where the posterior was."""
        names = {kind: name for name, kind in _SOLVERS.items()} | {solvers.Diagonal: "diagonal", solvers.Given: "given"}
        return names[self._solver_class() if self._solver is None else type(self._solver[1])]

    # ---- GPyTorch model

    def forward(self, x: Tensor) -> MultivariateNormal:
        """The prior: mean c(x), covariance k."""
        mean, covariance = self.mean_module(x), self.covar_module(x)
        if self.residual_kernel is not None:
            eye = torch.eye(self.num_outputs, dtype=mean.dtype, device=mean.device)
            covariance = covariance + KroneckerProductLinearOperator(self.residual_kernel(x), to_linear_operator(eye))
        if self.num_outputs == 1:
            return MultivariateNormal(mean, covariance)
        return MultitaskMultivariateNormal(mean, covariance)

    @in_plain_mode
    def __call__(self, x: Tensor, **kwargs) -> MultivariateNormal:
        """Posterior of f at ``x`` ``(..., m, d)`` in eval mode; the prior at the training inputs in train mode.

        Returns:
            ``MultivariateNormal`` for one output, else ``MultitaskMultivariateNormal`` over ``(m, K)``, interleaved.
        """
        x = self.linearization.flatten_inputs(x)
        if self.training and self._added is not None and self._added.noise is not None:
            raise ValueError(
                "This GP was conditioned on examples with noise of their own, which its likelihood does not know in "
                "train mode. Its evidence is gp.log_evidence(kind='gp') or LaplaceMarginalLogLikelihood."
            )
        if self.training and (self.model.samples or self.model.given is not None):
            raise ValueError(
                "In train mode GPyTorch asks for a prior over the training inputs. This GP has "
                + ("several rows for each, one per sample." if self.model.samples else "a posterior that was given.")
                + " Its evidence is gp.log_evidence()."
            )
        if self.training or gpytorch.settings.prior_mode.on() or self.train_inputs is None:
            return super().__call__(x, **kwargs)
        rows = self.linearization.rows(x)
        covariance = self._joint_covariance(rows)  # first: it keeps the Jacobians for the mean
        return self._distribution(self._mean(rows, "posterior"), covariance)

    def transform_inputs(self, X: Tensor, **_) -> Tensor:
        """As they are: BoTorch's ``fit_gpytorch_mll`` asks."""
        return X

    def set_train_data(
        self, inputs: Tensor | Sequence[Tensor] | None = None, targets: Tensor | None = None, strict: bool = True
    ) -> None:
        """Replace the data; hyperparameters and net stay.

        Args:
            inputs: ``(n, d)``; None keeps the present ones.
            targets: labels, as ``train_y`` of the constructor; None keeps the present ones.
            strict: whether shapes, dtypes and devices must be those of the present data.
        """
        if self._added is not None and self._added.noise is not None:
            raise ValueError(
                "This GP was conditioned on examples with noise of their own, which set_train_data would forget: build "
                "a new GP with Gaussian(sigma), one sigma per example."
            )
        inputs = inputs if isinstance(inputs, Tensor | None) else inputs[0]
        x = self.train_inputs[0] if inputs is None else self.linearization.flatten_inputs(inputs)
        y = self.train_labels if targets is None else targets
        if strict:
            for name, new, old in (("inputs", x, self.train_inputs[0]), ("targets", y, self.train_labels)):
                if name == "targets" and new.shape == old.shape[:1]:
                    new = new.reshape(old.shape)
                if (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
                    raise RuntimeError(
                        f"Cannot replace {name} {tuple(old.shape)}, {old.dtype}, {old.device} by {tuple(new.shape)}, "
                        f"{new.dtype}, {new.device}; pass strict=False to allow it."
                    )
        self._set_data(x, y)

    @in_plain_mode
    def get_fantasy_model(self, inputs: Tensor | Sequence[Tensor], targets: Tensor, noise: Tensor | None = None, **_):
        """The GP conditioned on more data, in closed form; :meth:`condition_on` is the same.

        The posterior is the one that a GP built with all the data, the same net and the same hyperparameters has: r and
        Lambda of the new rows are taken at the net's own outputs. It costs the new rows only; nothing is retrained, and
        this GP stays as it is.

        Args:
            inputs: ``(b..., q, d)``.
            targets: labels ``(b..., q)`` or ``(b..., q, D)``; further leading dimensions are fantasies at the same
                inputs, ``(f..., b..., q, D)``.
            noise: sigma^2 of the new examples, a number, ``(K,)`` or ``(q, K)``, or ``(q,)`` for one output; needed
                where the noise was given per example.

        Returns:
            A new GP of the same kind; with batch dimensions its posteriors have them too.
        """
        lin = self.linearization
        x = lin.flatten_inputs(inputs if isinstance(inputs, Tensor) else inputs[0])
        if noise is None and self.likelihood.per_example_noise:
            raise ValueError("The noise was given for each training example: pass noise=, sigma^2 of the new ones.")
        noise = self._noise_of_new(noise, x.shape[-2])
        any_noise = self._outputs.new_tensor(1.0) if self.likelihood.per_example_noise else None  # no matter for labels
        if not isinstance(targets, Tensor):
            raise TypeError(f"Labels must be a tensor; got {type(targets).__name__}.")
        if x.shape[-2] == 0:
            raise ValueError("There are no new examples to condition on.")
        labels = canonical_labels(self._loss_of(any_noise), targets, x, self._labels, self._outputs)
        return self._with(x, labels, noise)

    def _with(self, x: Tensor, labels: Tensor, noise: Tensor | None) -> NetworkGP:
        """The GP with these checked data added to those it has."""
        lin, event_dims = self.linearization, self._labels.dim()
        if self._added is not None:
            x, labels, noise = self._added.then(x, labels, noise, event_dims)

        new = self._shallow_copy()
        new._added = added = AddedData.at(lin, x, labels, noise, event_dims)
        new._conditioned = None

        def both(base: Tensor, more: Tensor) -> Tensor:
            batch, dims = added.batch_shape, base.dim()
            return torch.cat([expand_batch(base, batch, dims), expand_batch(more, batch, dims)], len(batch))

        new.train_inputs = (both(self._inputs, x),)
        new.train_labels = both(self._labels, added.labels)
        new.train_targets = both(
            _output_targets(self.loss, self._outputs, self._labels, self.model.pull),
            _output_targets(self._loss_of(added.noise_or(self.noise)), added.outputs, added.labels, self.model.pull),
        )
        return new

    def _noise_of_new(self, noise: Tensor | float | None, m: int) -> Tensor | None:
        """sigma^2 of m new examples as ``(m, 1)`` or ``(m, K)``.

        A number, per output ``(K,)``, or per example ``(m, 1)`` or ``(m, K)``, as of a Gaussian loss; ``(m,)`` for one
        output.
        """
        if noise is None:
            return None
        if self.noise is None:
            raise ValueError(f"{self._loss_of(None)} has no noise; leave noise= out.")
        noise, k = torch.as_tensor(noise, dtype=self._outputs.dtype, device=self._outputs.device), self.num_outputs
        if noise.dim() == 0 or noise.shape == (k,):
            noise = noise.expand(m, k)
        elif k == 1 and noise.shape == (m,):
            noise = noise[:, None]
        if noise.shape not in ((m, 1), (m, k)):
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}; it must be sigma^2 of the {m} new examples: a number, ({k},) "
                f"per output, or ({m}, 1) or ({m}, {k}) per example."
            )
        require_positive(noise, "noise")
        return noise

    def condition_on(self, x: Tensor, y: Tensor, noise: Tensor | None = None) -> NetworkGP:
        """See :meth:`get_fantasy_model`."""
        return self.get_fantasy_model(x, y, noise=noise)

    def __deepcopy__(self, memo: dict) -> NetworkGP:
        # Added data may carry a graph, which cannot be copied and need not be: nothing writes into them.
        kept = (self._added, self._conditioned, *self.train_inputs, self.train_targets, self.train_labels)
        memo.update({id(item): item for item in kept if item is not None})
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        return new

    def _shallow_copy(self) -> NetworkGP:
        """A copy with hyperparameters of its own, which shares the frozen net, the data and all that was computed."""
        shared = (
            *(self.linearization, self.model, self._solver, self._base_posterior, self._conditioned, self._added),
            *(self._inputs, self._labels, self._outputs, self.train_inputs, self.train_targets, self.train_labels),
        )
        return copy.deepcopy(self, {id(item): item for item in shared if item is not None})

    @in_plain_mode
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
            noise: sigma^2 of these examples, a number, ``(K,)`` or ``(m, K)``, where the noise was given per example.
            joint: let ``f`` be joint over all examples, ``(m K) x (m K)``.
            generator: random numbers of "mc".
        """
        _require_one_of("mean", mean, ("network", "posterior"))
        if noise is None and self.likelihood.per_example_noise:
            raise ValueError(
                "The noise was given for each training example, so that of new ones is not known, however many they "
                "are: pass noise=, sigma^2 of shape (m, 1) or (m, K). gp(x), the posterior of f, needs none."
            )
        rows = self.linearization.rows(self.linearization.flatten_inputs(x))
        loss = self._loss_of(self._noise_of_new(noise, rows.batch_shape[-1]))
        if rows.num_examples == 0:  # torch has no distribution of nothing
            raise ValueError("There are no inputs to predict at.")
        self._require_memory_for_blocks(rows)
        if joint:
            joint_covariance = self._joint_covariance(rows)
            blocks = diagonal_blocks(to_linear_operator(joint_covariance).to_dense(), self.num_outputs)
        else:
            blocks = self.posterior().covariance_blocks(rows)
        center = self._mean(rows, mean)
        blocks = blocks.expand(*center.shape, -1)
        if joint:
            f = self._distribution(center, joint_covariance)
        else:
            f = MultivariateNormal(center, Covariance(blocks))
        labels = predictive(loss, center, blocks, approximation, num_samples, generator)
        return Prediction(labels.mean, labels.aleatoric, labels.epistemic, f, labels.y, labels.probs)

    # ---- what the GP is made of

    @in_plain_mode
    def dual_data(self) -> dual.DualData:
        """The regression data of Theorem 1: inputs, targets ``y~`` and noise precision."""
        if self.model.given is not None:
            raise ValueError("The Gaussian over weights was given: it is a posterior, and no regression led to it.")
        w = self._mean_weights
        n, k = (
            self.train_inputs[0].shape[-2] * self.model.num_samples,
            1 if self.features == "gradient" else self.num_outputs,
        )
        tiling.require_memory(
            3 * n * k * k,
            self._outputs.dtype,
            self._outputs.device,
            f"The noise precisions of {n} examples, {k} x {k} each, with the work on them,",
            "The posterior, predict() and the evidence need none of them.",
        )
        with torch.no_grad():
            parts = [
                (dual.dual_targets(splitting, rows.matmul(w)), dual.noise_precision(splitting))
                for splitting, rows in self._all_data("dual_data")
            ]
        targets, precisions = zip(*parts, strict=True)
        inputs = torch.cat([self._inputs.repeat(self.model.num_samples, 1), self.train_inputs[0][len(self._inputs) :]])
        return dual.DualData(inputs, torch.cat(targets), torch.cat(precisions))

    @in_plain_mode
    def weight_posterior(self) -> GaussianWeights:
        """``N(w* - Sigma g, Sigma)`` over the selected weights; mu_t in the place of w* for an iterate."""
        posterior = self.posterior()
        return posterior.weights(self._mean_weights - posterior.step)

    @in_plain_mode
    def stationarity(self) -> Stationarity:
        """How far the net is from a stationary point; for an iterate, how far its next step goes."""
        self._require_prior("stationarity")
        with torch.no_grad():
            gradient = self.covar_module.prior().precision_matmul(self._away)
            for splitting, rows in self._all_data("stationarity"):
                gradient = gradient + rows.rmatmul(splitting.v)
            # g^T (Sigma g): unlike the solver's own form it does not cancel near a stationary point
            decrement = gradient @ self.posterior().step
            if self.model.given is not None:  # which stays where it is
                decrement = gradient @ self.model.given.covariance_matmul(gradient)
            if self.residual_kernel is not None:  # whose function moves too, besides the weights
                decrement = self.posterior().newton_decrement
            decrement = decrement.clamp(min=0)
            return Stationarity(float(gradient.norm()), float(decrement))

    @in_plain_mode
    def log_evidence(
        self,
        kind: str = "laplace",
        prior_precision: Tensor | None = None,
        noise: Tensor | None = None,
        temperature: Tensor | None = None,
    ) -> Tensor:
        """Log marginal likelihood, a scalar in nats, differentiable in delta, sigma and temperature.

        Args:
            kind: "laplace" for the Laplace evidence, of any loss; "gp" for ``log N(y~; 0, k + Lambda^-1)``, which a
                softmax does not have.
            prior_precision, noise, temperature: evaluate at these instead of the GP's own; numbers or tensors.
        """
        _require_one_of("kind", kind, ("laplace", "gp"))
        if kind == "gp" and self.structure == "diagonal":
            raise ValueError("structure='diagonal' has no GP evidence: its kernel is not the prior's. Use 'laplace'.")
        self._require_prior("log_evidence")
        if kind == "gp" and self.model.given is not None:
            raise ValueError("A Gaussian that was given has no GP evidence, as no regression led to it. Use 'laplace'.")
        prior_precision, noise, temperature = self._given(prior_precision, noise, temperature)
        if torch.is_grad_enabled() or any(value is not None for value in (prior_precision, noise, temperature)):
            posterior = self.posterior_at(prior_precision, noise, temperature)
        else:
            posterior = self.posterior()
        return self._log_evidence(posterior, kind, prior_precision, noise, temperature)

    @in_plain_mode
    def evidence_function(self, kind: str = "laplace") -> Callable[..., Tensor]:
        """:meth:`log_evidence` for many evaluations, as ``function(prior_precision, noise=None)``.

        With one delta and at most one sigma it costs one eigendecomposition now and a sum over the eigenvalues each
        time; else what :meth:`log_evidence` costs, one factorisation each time.
        """
        _require_one_of("kind", kind, ("laplace", "gp"))
        splitting, residual = self._splitting(), self.residual_kernel
        self._require_prior("evidence_function")
        single = len(self.covar_module.groups) == 1 and len(splitting.noise_scale) == 1 and self.model.is_default
        dense = self.solver in ("weight_space", "function_space")
        if not (single and dense and residual is None and self._added is None):
            return functools.partial(self.log_evidence, kind)
        prior = self.covar_module.prior()
        spectrum = solvers.Spectrum(self._solver_for(splitting), splitting, prior, kind)

        def evidence(prior_precision: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
            prior_precision, noise, _ = self._given(prior_precision, noise)
            delta = self.covar_module.prior(prior_precision).precision[0]
            posterior = solvers.SpectralPosterior(spectrum, delta, self._splitting(noise))
            return self._log_evidence(posterior, kind, prior_precision, noise)

        return evidence

    def _given(
        self,
        prior_precision: Tensor | float | None,
        noise: Tensor | float | None,
        temperature: Tensor | float | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Hyperparameters given in place of the GP's own, checked."""

        def checked(value: Tensor | float | None, name: str) -> Tensor | None:
            if value is None:
                return None
            value = torch.as_tensor(value, dtype=self._outputs.dtype, device=self._outputs.device)
            require_positive(value.detach(), name)
            return value

        prior_precision, noise = checked(prior_precision, "prior_precision"), checked(noise, "noise")
        if prior_precision is not None:
            prior_precision = prior_precision.expand(len(self.covar_module.groups))
        if noise is not None:
            if self.features == "gradient" and self.noise.dim() > 0 and noise.requires_grad:
                raise ValueError(
                    "features='gradient' with one noise for each output, or example, has no gradient in it: the rows "
                    "r^T J depend on it. Use one sigma for all outputs, or features='jacobian'."
                )
        return prior_precision, noise, checked(temperature, "temperature")

    def _log_evidence(
        self,
        posterior: solvers.Posterior | solvers.SpectralPosterior,
        kind: str,
        prior_precision: Tensor | None,
        noise: Tensor | None,
        temperature: Tensor | None = None,
    ) -> Tensor:
        splittings = [self._splitting(noise, temperature)]
        if self._added is not None:
            splittings.append(self._added_splitting(noise, temperature))
        prior = self.covar_module.prior(prior_precision)
        return solvers.log_evidence(posterior, prior, splittings, self._away, kind)

    @in_plain_mode
    def posterior(self) -> solvers.Posterior:
        """The Gaussian over weights and outputs at the present hyperparameters, cached until one of them changes.

        As GPyTorch's caches, it carries no gradient in the hyperparameters unless
        ``gpytorch.settings.detach_test_caches`` is off. It does carry one in the inputs that the GP was conditioned on.
        """
        if torch.is_grad_enabled() and gpytorch.settings.detach_test_caches.off():
            return self.posterior_at()
        key = self._hyperparameter_values()
        if self._base_posterior is None or not _same(self._base_posterior[0], key):
            with torch.no_grad():
                splitting = self._splitting()
                # the cache outlives this call, and GPs conditioned from this one share it: keep the kernel as it is now
                residual_kernel = copy.deepcopy(self.residual_kernel)
                base = self._base_at(self.covar_module.prior(), splitting, residual_kernel)
            self._base_posterior = (tuple(k.clone() for k in key), base)
            self._conditioned = None
        if self._added is None:
            return self._base_posterior[1]
        if self._conditioned is None:
            base, noise = self._base_posterior[1], None if self.noise is None else self.noise.detach()
            if self._added.carries_graph and not torch.is_grad_enabled():
                # not kept, nor are its rows: what is kept carries the graph of the data
                return condition(base, self.linearization.rows(self._added.inputs), self._added_splitting(noise))
            self._conditioned = self._condition(base, noise)
        return self._conditioned

    @in_plain_mode
    def posterior_at(
        self, prior_precision: Tensor | None = None, noise: Tensor | None = None, temperature: Tensor | None = None
    ) -> solvers.Posterior:
        """The posterior at these, or the present, hyperparameters, with their graph; never cached.

        Args:
            prior_precision, noise, temperature: tensors, instead of the GP's own.
        """
        splitting, prior = self._splitting(noise, temperature), self.covar_module.prior(prior_precision)
        base = self._base_at(prior, splitting, self.residual_kernel)
        return base if self._added is None else self._condition(base, noise, temperature)

    # ---- inside

    def _base_at(self, prior: Prior, splitting: Splitting, residual_kernel: Kernel | None) -> solvers.Posterior:
        solver = self._solver_for(splitting)
        if residual_kernel is None:
            return solver.posterior(prior, splitting)
        return solver.posterior(prior, splitting, functools.partial(_dense_kernel, residual_kernel))

    def _hyperparameter_values(self) -> tuple[Tensor, ...]:
        residual = () if self.residual_kernel is None else self.residual_kernel.parameters()
        return (
            *(self.prior_precision.detach(), self.likelihood.temperature),
            *_present(self.noise),
            *(p.detach() for p in residual),
        )

    def _condition(
        self, base: solvers.Posterior, noise: Tensor | None, temperature: Tensor | None = None
    ) -> Conditioned:
        return condition(base, self._added.rows, self._added_splitting(noise, temperature))

    @property
    def _is_weighted(self) -> bool:
        return self.model.rate != 1 or self.model.train_size is not None

    @property
    def _mean_weights(self) -> Tensor:
        """w*, or mu_t: what the linear model is expanded about, ``(P,)``."""
        return self.linearization.weights if self.model.mean is None else self.model.mean

    @property
    def _away(self) -> Tensor:
        """The same less the prior's mean, ``(P,)``."""
        return self._mean_weights if self.model.away is None else self.model.away

    def _require_prior(self, what: str) -> None:
        if not self.model.prior_known:
            raise ValueError(
                f"{what} compares the Gaussian over weights with the prior it came from, which is not known here: give "
                "VariationalGP prior_precision=."
            )

    def _temperature(self, given: Tensor | None) -> Tensor:
        return self.likelihood.temperature if given is None else given

    def _loss_of(self, noise: Tensor | None) -> Loss:
        return self.likelihood.loss_with(noise)

    def _splitting(self, noise: Tensor | None = None, temperature: Tensor | None = None) -> Splitting:
        loss, f, labels = self._loss_of(noise), self._outputs, self._labels
        n, s = len(labels), self.model.num_samples
        if self.model.samples:
            index = torch.arange(n, device=f.device).repeat(s)
            loss, f, labels = loss.subset(index), self._sample_outputs, labels[index]
        weight = self.model.weight(n)
        temperature = self._temperature(temperature) * (weight if self._is_weighted else 1)
        return Splitting(loss, f, labels, self.features, temperature, weight, self.model.pull)

    def _added_splitting(self, noise: Tensor | None = None, temperature: Tensor | None = None) -> Splitting:
        added = self._added
        loss = self._loss_of(noise if added.noise is None else added.noise_or(self.noise if noise is None else noise))
        weight = self.model.weight(len(self._labels))
        temperature = self._temperature(temperature) * (weight if self._is_weighted else 1)
        weight = weight * self.model.num_samples  # seen at one net
        return Splitting(loss, added.outputs, added.labels, self.features, temperature, weight, self.model.pull)

    def _all_data(self, what: str) -> list[tuple[Splitting, Rows]]:
        """Splittings and rows of the original and the added data."""
        splitting = self._splitting()
        data = [(splitting, self._training_rows(splitting))]
        if self._added is not None:
            if self._added.batch_shape:
                raise ValueError(f"{what} of a batch of conditioned GPs is not offered; condition on one element.")
            splitting = self._added_splitting()
            data.append((splitting, self.linearization.rows(self._added.inputs, splitting.cotangents())))
        return data

    def _training_rows(self, splitting: Splitting) -> Rows | StackedRows:
        return self.model.rows(self.linearization, self._inputs, splitting.cotangents())

    def _solver_class(self) -> type[solvers.Solver]:
        if self.model.given is not None:
            return solvers.Given
        if self.structure == "diagonal":
            return solvers.Diagonal
        if self.requested_solver != "auto":
            return _SOLVERS[self.requested_solver]
        splitting = self._splitting()
        rows = self._training_rows(splitting)
        return solvers.choose(rows, len(self.covar_module.groups), len(splitting.noise_scale))

    def _solver_for(self, splitting: Splitting, sums: dict[str, Tensor] | None = None) -> solvers.Solver:
        """The sums over the data, taken once, or given; again only where the rows themselves depend on the noise."""
        key = (splitting.unit().loss.noise.detach(),) if self.features == "gradient" and self.noise is not None else ()
        if self.model.given is not None:
            return solvers.Given(self.model.given, self._training_rows(splitting))
        if self._solver is None or not _same(self._solver[0], key):
            solver = self._solver_class()(
                self._training_rows(splitting),
                splitting,
                self.covar_module.groups,
                self.covar_module.structure.base_variance,
                self._away,
                self.show_progress,
                sums,
            )
            self._solver = (key, solver)
        return self._solver[1]

    def _clear_solver(self) -> None:
        self._solver: tuple[tuple[Tensor, ...], solvers.Solver] | None = None
        self._base_posterior: tuple[tuple[Tensor, ...], solvers.Posterior] | None = None
        self._conditioned: Conditioned | None = None

    def _mean(self, rows: Rows, kind: str) -> Tensor:
        """The net's outputs, moved by the Gauss-Newton step of all data ("posterior") or of added data only."""
        f = self.linearization.function.outputs(rows.x).unflatten(0, rows.batch_shape)
        if rows.num_examples == 0:
            return f
        if kind == "posterior":
            return f - self.posterior().shift(rows)
        return f if self._added is None else f - self.posterior().added_shift(rows)

    def _require_memory_for_blocks(self, rows: Rows) -> None:
        m, k = rows.num_examples, self.num_outputs
        tiling.require_memory(
            3 * m * k**2,
            self._outputs.dtype,
            self._outputs.device,
            f"The covariances of {m} points, {k} x {k} each, with the work on them,",
            "Predict fewer points at once.",
        )

    def _joint_covariance(self, rows: Rows):
        if rows.num_examples == 0:
            return self._outputs.new_zeros(*rows.batch_shape[:-1], 0, 0)
        if gpytorch.settings.skip_posterior_variances.on():
            size = rows.batch_shape[-1] * self.num_outputs
            return ZeroLinearOperator(
                *rows.batch_shape[:-1], size, size, dtype=self._outputs.dtype, device=self._outputs.device
            )
        m, k = rows.batch_shape[-1], self.num_outputs
        tiling.require_memory(
            3 * rows.batch_shape[:-1].numel() * (m * k) ** 2,
            self._outputs.dtype,
            self._outputs.device,
            f"The joint covariance of {m} points x {k} outputs, with the work on it,",
            "Use gp.predict(x), which needs one K x K block for each point, or ask for fewer points at once.",
        )
        return self.posterior().covariance(rows)

    def _distribution(self, mean: Tensor, covariance) -> MultivariateNormal:
        if isinstance(covariance, Tensor):  # which GPyTorch would factorise at once, singular or not
            covariance = Covariance(covariance)
        covariance = covariance.expand(*mean.shape[:-2], *covariance.shape[-2:])
        if self.num_outputs == 1:
            return MultivariateNormal(mean.squeeze(-1), covariance)
        return MultitaskMultivariateNormal(mean, covariance)

    # ---- state_dict: hyperparameters and weights; the data they belong to are not in it, but recognised

    def get_extra_state(self) -> Tensor:
        """What a ``state_dict`` belongs to, in one tensor: a digest of data and structure, and the net's outputs."""
        lin, added = self.linearization, self._added
        loss = self.likelihood.loss
        structure = {
            "loss": type(loss).__name__ if loss.has_noise else repr(loss),
            "net": [lin.param_names, lin.param_sizes, lin.input_shape, str(lin.input_dtype), str(lin.dtype)],
            "groups": self.covar_module.groups.index(torch.device("cpu")).tolist(),
            "kind": [type(self).__name__, self.structure, self.features],
            "residual_kernel": None if self.residual_kernel is None else described(self.residual_kernel),
            "hyperparameters": [hyperparameters(module) for module in self._parts()],
        }
        data = [self._inputs, self._labels, *self.model.tensors()]
        if added is not None:
            data += [added.inputs, added.labels, *_present(added.noise)]
        outputs = self._outputs.detach().double().flatten()
        values = [value.double().flatten() for value in self._own_loss_values(self._outputs)]
        return torch.cat([outputs.new_tensor(digest(structure, data)), outputs, *values])

    def _own_loss_values(self, outputs: Tensor) -> list[Tensor]:
        loss = self.likelihood.loss
        return list(loss_values(loss, outputs, self._labels).values()) if is_own(loss) else []

    def set_extra_state(self, state: Tensor) -> None:
        """Called by ``load_state_dict`` before anything is loaded.

        Raises:
            ValueError: the state is of a GP with other data, loss or structure.
        """
        own = self.get_extra_state()
        same = len(state) == len(own) and torch.equal(state[:DIGEST_SIZE].to(own), own[:DIGEST_SIZE])
        if same:
            outputs, values = state[DIGEST_SIZE:].to(self._outputs).tensor_split([self._outputs.numel()])
            outputs = outputs.reshape(self._outputs.shape)
            for value in self._own_loss_values(outputs):
                saved, values = values.tensor_split([value.numel()])
                same = same and close(value.flatten(), saved)
        if not same:
            self._restore()  # an mll loads the likelihood first
            raise ValueError(
                "This state_dict is of a GP with other training data, another loss or another structure; with it this "
                "one would predict something else. Build the GP on the same data first, or use gpytorch_dnn2gp.save "
                "and load, which keep the data; to take over hyperparameters alone, set prior_precision and noise."
            )
        self._loading = outputs

    def _parts(self) -> list[nn.Module]:
        parts = (self.mean_module, self.covar_module, self.likelihood, self.residual_kernel)
        return [module for module in parts if module is not None]

    def _restore(self) -> None:
        for module in self._parts():
            restore(module)

    def _use_linearization(self, lin: Linearization) -> None:
        for module in (self.mean_module, self.covar_module, self.likelihood):
            module.linearization = lin

    def _apply(self, fn):
        # .to(...), .double(), .cuda(): the net and the data go along, what was computed from them is dropped
        part = self._inputs[:0]
        moved = fn(part)
        if moved.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"A GP cannot be {moved.dtype}, too coarse for its algebra: keep float32 or float64.")
        if moved is part:  # moved to where it is, as by BoTorch's acquisition functions at each call; or shared
            return super()._apply(fn) if part.is_shared() else self
        # others may share the frozen net (the GP this one was conditioned from): move a copy
        self._use_linearization(copy.deepcopy(self.linearization))
        self.model = self.model.map(fn)
        result = super()._apply(fn)
        self._renew(fn)
        return result

    def _renew(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Compute again what follows from net and data, the data changed by ``fn``."""
        added = self._added
        self._set_data(fn(self._inputs), fn(self._labels))
        if added is None:
            return
        noise = None if added.noise is None else fn(added.noise)
        moved = self._with(fn(added.inputs), fn(added.labels), noise)
        self._added, self.train_inputs = moved._added, moved.train_inputs
        self.train_targets, self.train_labels = moved.train_targets, moved.train_labels


class LaplaceGP(NetworkGP):
    """The Laplace-GGN approximation of a trained net as an exact GP (Theorem 1). Returned in eval mode.

    Args:
        net: trained module (copied, frozen, never touched) or :class:`Linearization`.
        train_x: ``(n, d)``, or ``(n, *input_shape)``, which then is taken as ``input_shape``.
        train_y: labels, in the form that the loss wants.
        loss: from ``losses``: the negative log-likelihood whose sum over the data, plus the weight penalty, the net
            was trained on. Its noise is the initial value of ``gp.noise``.
        prior_precision: delta of the penalty ``delta |w|^2 / 2``: a number, or one entry per group. For a mean loss
            with weight decay see :meth:`from_training`.
        groups: which parameters share a precision; see :class:`JacobianKernel`.
        params: which weights are random; see :class:`Linearization`.
        solver: "weight_space" (P x P), "function_space" (n K x n K), "iterative" (conjugate gradients, no evidence), or
            "auto" for the cheaper dense one that fits in memory. They agree.
        structure: "full", or "diagonal" for ``diag(J^T Lambda J)``, the paper's practical variant.
        features: "jacobian" for the generalised Gauss-Newton matrix, "gradient" for the empirical Fisher (paper eq. 5
            with ``phi = J^T r``): an n x n kernel whatever K is.
        input_shape, input_dtype: see :class:`Linearization`.
        prior_variance: see :class:`JacobianKernel`.
        temperature: the loss is divided by it, so the noise of the dual Gaussian is multiplied; the labels' own is not.
            The Laplace evidence then has ``log p(y|f) / T``, which is no density: compare it at one temperature only.
        residual_kernel: a GPyTorch kernel, such as ``ScaleKernel(MaternKernel())``, added to that of the net, the same
            for each output: far from the data the band widens to it whatever the features do. In function space;
            its hyperparameters are fitted by the evidence with the others. Its dtype is that of the net.
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
        residual_kernel: Kernel | None = None,
        progress: bool | None = None,
    ) -> None:
        _require_loss(loss)
        lin = linearization_for(net, train_x, params, input_shape, input_dtype)
        kernel = JacobianKernel(lin, prior_precision, groups, prior_variance)
        options = (solver, structure, features, temperature, residual_kernel, progress)
        super().__init__(kernel, train_x, train_y, loss, LinearModel(), *options)

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
            reduction="sum"        c = 1, and 1 / (2 sigma^2) for MSELoss, all data in one batch; with minibatches the
                                   sum of a batch counts for the whole: multiply weight_decay by n / batch size

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
        net = linearization_for(net, x, *(options.pop(name, None) for name in ("params", "input_shape", "input_dtype")))
        f = net(net.flatten_inputs(x))
        loss, labels, scale = translate_loss(torch_loss, f, y, sigma)
        delta = torch.as_tensor(weight_decay, dtype=f.dtype) * torch.as_tensor(scale, dtype=f.dtype)
        if not (delta > 0).all():
            raise ValueError(
                "weight_decay must be positive: without it there is no prior on the weights. For a net trained without "
                "it use LaplaceGP(net, x, y, loss, prior_precision=...) and choose it by the evidence."
            )
        return cls(net, x, labels, loss, delta, **options)

    @in_plain_mode
    def leave_one_out(
        self,
        mean: str = "network",
        approximation: str | None = None,
        num_samples: int = 1000,
        prior_precision: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Prediction:
        """Predictions of each training example by the others, in closed form: exact for the linear model.

        Nothing is trained again, so for a net it is an approximation, by one Gauss-Newton step of all weights.
        ``gp.leave_one_out().y.log_prob(y)`` are the leave-one-out log densities of the labels.

        Args:
            mean, approximation, num_samples, generator: as in :meth:`predict`.
            prior_precision, noise: evaluate at these instead of the GP's own; differentiable.
        """
        _require_one_of("mean", mean, ("network", "posterior"))
        prior_precision, noise, _ = self._given(prior_precision, noise)
        with_graph = torch.is_grad_enabled() or prior_precision is not None or noise is not None
        posterior = self.posterior_at(prior_precision, noise) if with_graph else self.posterior()
        if self._added is not None:
            raise ValueError(
                "leave_one_out is for the data a GP was built with; this one was conditioned on more. Build a GP with "
                "all of them."
            )
        splitting = self._splitting(noise)
        rows = (
            self._solver_for(splitting).rows if self.features == "jacobian" else self.linearization.rows(self._inputs)
        )
        shift, blocks = solvers.leave_one_out(posterior, rows, splitting, mean == "network")
        center = self._outputs + shift
        labels = predictive(splitting.loss, center, blocks, approximation, num_samples, generator)
        f = MultivariateNormal(center, Covariance(blocks))
        return Prediction(labels.mean, labels.aleatoric, labels.epistemic, f, labels.y, labels.probs)


def _after_loading_state(gp: NetworkGP, _keys: object) -> None:
    """Where ``load_state_dict`` changed the net, outputs and sums follow; the outputs must be the saved ones."""
    outputs = gp.__dict__.pop("_loading", None)  # None with strict=False, where it is not there
    changed = has_new_net(gp.covar_module)
    try:
        gp._use_linearization(gp.linearization)
        f = gp.linearization(gp._inputs).detach() if changed else gp._outputs
        if outputs is not None and not close(f, outputs):
            raise ValueError(
                "The state_dict fits this GP's net in names and shapes, but the net it was taken from computes "
                "something else. Build this GP from a net of the same activations, normalisations and constructor "
                "arguments."
            )
        if changed:
            gp._renew(lambda tensor: tensor)
            gp._outputs = gp._outputs if outputs is None else outputs
    except BaseException:
        gp._restore()
        raise
    for module in gp._parts():
        forget(module)


def _output_targets(loss: Loss, f: Tensor, labels: Tensor, pull: float) -> Tensor:
    """Targets in output form, ``(n,)`` or ``(n, K)``: ``f - Lambda^-1 r`` where it exists, else f as a placeholder."""
    targets = f
    if loss.has_noise:  # a Gaussian's: f - sigma^2 (f - y) / sigma^2 = y
        targets = labels if pull == 1 else f - pull * (f - labels)
    elif loss.invertible:
        try:
            targets = f - pull * dual.newton_offset(Splitting(loss, f, labels))
        except ValueError:  # a saturated example has no target; posterior and evidence do not read any
            targets = f
    return targets.squeeze(-1) if f.shape[-1] == 1 else targets


def linearization_for(
    net: nn.Module | Linearization,
    x: Tensor,
    params: Sequence[str] | str | None,
    input_shape: Sequence[int] | None,
    input_dtype: torch.dtype | None,
) -> Linearization:
    """``net`` linearized; inputs of more than one dimension each tell their ``input_shape`` themselves."""
    if input_shape is None and not isinstance(net, Linearization) and getattr(x, "ndim", 0) > 2:
        input_shape = x.shape[1:]
    return as_linearization(net, params=params, input_shape=input_shape, input_dtype=input_dtype)


def _dense_kernel(kernel: Kernel, x1: Tensor, x2: Tensor) -> Tensor:
    with gpytorch.settings.lazily_evaluate_kernels(False):
        return to_linear_operator(kernel(x1, x2)).to_dense()


def _require_loss(loss: object) -> None:
    if not isinstance(loss, Loss):
        raise TypeError(
            f"loss must come from gpytorch_dnn2gp.losses; got {type(loss).__name__}. For a torch loss use "
            "LaplaceGP.from_training; for your own function losses.from_callable."
        )


def _require_one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}.")


def _present(tensor: Tensor | None) -> tuple[Tensor, ...]:
    return () if tensor is None else (tensor.detach(),)


def _same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
