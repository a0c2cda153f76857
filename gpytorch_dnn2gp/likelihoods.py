"""GPyTorch likelihood with the Gauss-Newton noise: ``y~ = f + e``, ``e ~ N(0, Lambda(x)^-1)``, K x K per example.

The dual Gaussian of any loss whose noise precision Lambda is invertible; Lambda is computed from the net, so it has a
value at new inputs too. For a Gaussian loss it is the observation noise itself. The likelihood owns ``noise`` (sigma^2)
and ``temperature`` and hands them to the stateless loss.

Noise that was given for the training examples belongs to them alone: to all of f in train mode, and else to the leading
examples whose inputs are ``train_inputs``. Nothing is matched by number.
"""

from __future__ import annotations

import copy
import math

import gpytorch
import torch
from gpytorch.constraints import Interval
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.lazy import LazyEvaluatedKernelTensor
from gpytorch.likelihoods.gaussian_likelihood import _GaussianLikelihoodBase
from gpytorch.priors import Prior as HyperPrior
from linear_operator.operators import (
    BlockDiagLinearOperator,
    BlockInterleavedLinearOperator,
    DenseLinearOperator,
    LinearOperator,
)
from torch import Tensor, nn
from torch.distributions import Distribution, Normal
from torch.distributions import MultivariateNormal as TorchMultivariateNormal

from .kernels import log_positive
from .linearize import Linearization
from .losses import Loss
from .numerics import diagonal_blocks, first_index, require_finite, require_positive
from .operators import NoisyFeatureGram


class _ClosedForm:
    """log_prob by the covariance's own closed form, which GPyTorch takes only while its setting for it is on."""

    def log_prob(self, value: Tensor) -> Tensor:
        with gpytorch.settings.fast_computations(log_prob=True):
            return super().log_prob(value)


class _ClosedFormNormal(_ClosedForm, MultivariateNormal):
    pass


class _ClosedFormMultitaskNormal(_ClosedForm, MultitaskMultivariateNormal):
    pass


_CLOSED_FORM = {MultivariateNormal: _ClosedFormNormal, MultitaskMultivariateNormal: _ClosedFormMultitaskNormal}


class GGNLikelihood(_GaussianLikelihoodBase):
    """Heteroscedastic Gaussian likelihood with covariance ``Lambda(x)^-1`` per example.

    Args:
        loss: from ``losses``; its noise, if it has one, is the initial value of :attr:`noise`. None with ``noise``.
        linearization: of the net, which gives the outputs that Lambda depends on. A Gaussian loss needs none.
        noise_prior, noise_constraint: on :attr:`noise`; by default positive, optimised in the logarithm.
        temperature: the loss is divided by it, so Lambda too.
        noise: the training examples' noise, fixed: covariances ``(n, K, K)``, or ``(n,)`` for one output. New examples
            have that of the loss, if there is one.
        train_inputs: ``(n, d)``, the inputs of these examples; without them the noise is known in train mode alone.
        num_outputs: K. It is needed where one noise for all outputs and no linearization leave open whether samples of
            f are ``(..., n)`` or ``(..., n, K)``; distributions of f have it.

    Calling it on a distribution of f, ``likelihood(gp(x), x)``, adds the noise at ``x``; ``noise=`` gives it instead,
    ``(..., n, K, K)``, or ``(..., n)`` for one output.

    Raises:
        ValueError: when called, where the noise has an infinite direction (always for a softmax) or is not known.
    """

    def __init__(
        self,
        loss: Loss | None = None,
        linearization: Linearization | None = None,
        noise_prior: HyperPrior | None = None,
        noise_constraint: Interval | None = None,
        temperature: float = 1.0,
        noise: Tensor | None = None,
        train_inputs: Tensor | None = None,
        num_outputs: int | None = None,
    ) -> None:
        super().__init__(noise_covar=None)
        self._given_num_outputs = num_outputs
        if loss is None and noise is None:
            raise ValueError("GGNLikelihood needs a loss, or the training examples' noise=, or both.")
        self._loss = loss
        self.linearization = linearization
        require_positive(torch.as_tensor(float(temperature)), "temperature")
        options = {} if linearization is None else {"dtype": linearization.dtype, "device": linearization.device}
        self.register_buffer("_temperature", torch.as_tensor(float(temperature), **options))
        has_noise = loss is not None and loss.has_noise
        self.per_example_noise = has_noise and loss.noise.dim() == 2
        if self.per_example_noise:
            if noise is not None:
                raise ValueError("The loss has noise by example, and noise= gives another. Leave one of them out.")
            self.register_buffer("_given_noise", loss.noise.detach().clone().to(**options))
        elif has_noise:
            self._noise_shape = loss.noise.shape
            raw = torch.zeros(loss.noise.shape or (1,), **options)
            self.register_parameter("raw_noise", nn.Parameter(raw))
            self.register_constraint("raw_noise", noise_constraint or log_positive())
            if noise_prior is not None:
                self.register_prior("noise_prior", noise_prior, _noise_of, _set_noise_of)
            self._set_noise(loss.noise)
        self.register_buffer("_given_covariances", None if noise is None else _as_covariances(noise))
        if train_inputs is not None:
            train_inputs = train_inputs.detach().clone()
            train_inputs = train_inputs[:, None] if train_inputs.dim() == 1 else train_inputs
            given = self._given_blocks(1)
            if given is not None and len(given) != len(train_inputs):
                raise ValueError(
                    f"noise is that of {len(given)} examples, but there are {len(train_inputs)} train_inputs."
                )
        self.register_buffer("train_inputs", train_inputs)
        known = self._known_num_outputs()
        if num_outputs is not None and (num_outputs < 1 or known not in (None, num_outputs)):
            raise ValueError(f"num_outputs is {num_outputs}; net and noise have {known or 'at least one'}.")

    # ---- hyperparameters

    @property
    def noise(self) -> Tensor | None:
        """sigma^2 of the loss: a number, ``(K,)``, or fixed per example ``(n, K)``; None for a loss without noise."""
        if self.per_example_noise:
            return self._given_noise
        if self._loss is None or not self._loss.has_noise:
            return None
        return self.raw_noise_constraint.transform(self.raw_noise).reshape(self._noise_shape)

    @noise.setter
    def noise(self, value: float | Tensor) -> None:
        self._set_noise(value)

    def _set_noise(self, value: float | Tensor) -> None:
        if self._loss is None or not self._loss.has_noise:
            raise ValueError(f"{self._loss or 'This likelihood'} has no noise to set.")
        target = self._given_noise if self.per_example_noise else self.raw_noise
        value = torch.as_tensor(value, dtype=target.dtype, device=target.device)
        require_positive(value.detach(), "noise")
        try:
            value = value.expand(target.shape)
        except RuntimeError:
            raise ValueError(f"noise has shape {tuple(value.shape)}; it must fit {tuple(target.shape)}.") from None
        if self.per_example_noise:
            self._given_noise = value.detach().clone()
        else:
            self.initialize(raw_noise=self.raw_noise_constraint.inverse_transform(value))

    @property
    def temperature(self) -> Tensor:
        """What the loss is divided by."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        value = self._temperature.new_tensor(float(value))
        require_positive(value, "temperature")
        self._temperature = value

    def loss_with(self, noise: Tensor | None = None) -> Loss:
        """The loss at the present, or the given, noise."""
        if noise is None:
            noise = self.noise
        return self._loss if noise is None else self._loss.with_noise(noise)

    @property
    def loss(self) -> Loss | None:
        """The loss at the present noise; None where only the training examples' noise was given."""
        return None if self._loss is None else self.loss_with()

    # ---- noise of the dual Gaussian

    def noise_covariance(self, x: Tensor | None, shape: torch.Size, noise: Tensor | None = None) -> Tensor:
        """``Lambda^-1`` at each example, ``(..., n, K, K)``.

        Args:
            x: inputs ``(..., n, d)``; a Gaussian loss needs none.
            shape: ``(..., n, K)`` of f.
            noise: given instead, ``(..., n, K, K)``, or ``(..., n)`` for one output.

        Raises:
            ValueError: where the noise has an infinite direction (always for a softmax), or is not known.
        """
        if noise is not None:
            return _fitting(noise, shape)
        if x is None and self.training:
            x = self.train_inputs
        if x is not None and x.dim() == 1:
            x = x[:, None]
        given, n = self._given_blocks(shape[-1]), shape[-2]
        known = 0 if given is None else self._num_known(x, n, given.shape[-3])
        if known == 0:
            return self._computed_noise(x, shape)
        given = given[..., :known, :, :]
        if given.shape[-1] != shape[-1]:
            raise ValueError(f"noise was given for {given.shape[-1]} outputs, but f has {shape[-1]}.")
        if known == n:
            return given
        rest = self._computed_noise(x[..., known:, :], torch.Size((*shape[:-2], n - known, shape[-1])))
        return _cat(given, rest)

    def _given_blocks(self, num_outputs: int) -> Tensor | None:
        """The training examples' noise, ``(..., n, K, K)``, if it was given."""
        if self.per_example_noise:
            variances = self._given_noise * self._temperature
            return torch.diag_embed(variances.expand(-1, max(num_outputs, variances.shape[-1])))
        return self._given_covariances

    def _num_known(self, x: Tensor | None, n: int, num_given: int) -> int:
        """How many of the leading examples at ``x`` are those whose noise was given."""
        if x is None or self.train_inputs is None:
            if self.training and n == num_given:
                return n
            raise ValueError(
                f"The noise was given for {num_given} training examples, and whether these {n} are among them is not "
                "known: pass noise=, their covariances (n, K, K), or give GGNLikelihood the train_inputs and pass x."
            )
        inputs = self.train_inputs
        size = inputs.shape[-2]
        if x.shape[-2] < size or x.shape[-1] != inputs.shape[-1] or x.dtype != inputs.dtype:
            return 0
        lead = x[..., :size, :]
        try:
            inputs = inputs.expand(torch.broadcast_shapes(inputs.shape, lead.shape))
        except RuntimeError:
            return 0
        if not bool((lead == inputs).all()):
            return 0
        return n if n == num_given else size

    def _computed_noise(self, x: Tensor | None, shape: torch.Size) -> Tensor:
        """Lambda^-1 of the loss, at the net's outputs at ``x``."""
        if self._loss is None or self.per_example_noise:
            raise ValueError(
                "The noise was given for the training examples alone, so that of new ones is not known, however many "
                "they are: pass noise=, their covariances (..., n, K, K), or (..., n) for one output."
            )
        if not self._loss.invertible:
            raise ValueError(
                f"The noise of {self._loss} in the space of targets has an infinite direction (Lambda is singular). "
                "Use gp.predict for labels and the Laplace evidence for model choice; neither needs it."
            )
        if self._loss.precision_needs_labels:
            raise ValueError(
                f"The noise precision of {self._loss} depends on the labels: give fisher= to from_callable."
            )
        loss = self.loss
        if loss.has_noise:
            f = torch.zeros(shape, dtype=self.noise.dtype, device=self.noise.device)
        elif self.linearization is None or x is None:
            raise ValueError(
                f"The noise of {self._loss} depends on the inputs: call likelihood(dist, x) on a GGNLikelihood that "
                "was given a linearization, or pass noise=."
            )
        else:
            f = self.linearization(x)
        precision = loss.noise_precision(f) / self._temperature
        factor, info = torch.linalg.cholesky_ex(precision)
        if info.any():
            raise ValueError(
                f"The noise precision at index {first_index(info != 0)} is zero to working precision (saturated "
                "outputs): its noise is infinite. Use gp.predict for labels."
            )
        return torch.cholesky_inverse(factor)

    keeps_inputs = True  # a prediction strategy of ours tells get_fantasy_likelihood which inputs the noise belongs to

    def get_fantasy_likelihood(
        self, noise: Tensor | None = None, inputs: Tensor | None = None, train_inputs: Tensor | None = None, **_
    ) -> GGNLikelihood:
        """A copy for a model with more data.

        Args:
            noise: of the added examples, ``(..., m, K, K)``, or ``(..., m)`` for one output; without it, that of the
                loss.
            inputs: theirs, ``(..., m, d)``.
            train_inputs: of the data before, ``(..., n, d)``; by default those known.
        """
        new = copy.deepcopy(self)
        train_inputs = self.train_inputs if train_inputs is None else train_inputs
        if noise is None or train_inputs is None:
            return new
        blocks = (
            noise.dim() >= 3
            and noise.shape[-1] == noise.shape[-2]
            and (inputs is None or noise.shape[-3] == inputs.shape[-2])
        )
        added = noise.detach() if blocks else noise.detach()[..., None, None]
        _require_covariances(added)
        shape = torch.Size((*train_inputs.shape[:-1], added.shape[-1]))
        before = self.noise_covariance(train_inputs, shape).detach()
        if new.per_example_noise:
            del new._given_noise
            new.per_example_noise, new._loss = False, None
        new._given_covariances = _cat(before, added)
        new.train_inputs = train_inputs if inputs is None else _cat(train_inputs, inputs.detach(), 2)
        return new

    def _blocks(self, dist: MultivariateNormal, params: tuple, noise: Tensor | None) -> Tensor:
        shape = dist.mean.shape if isinstance(dist, MultitaskMultivariateNormal) else (*dist.mean.shape, 1)
        return self.noise_covariance(_first_tensor(params), torch.Size(shape), noise)

    def _shaped_noise_covar(self, base_shape: torch.Size, *params, noise: Tensor | None = None, **_) -> LinearOperator:
        """For one output, as GPyTorch asks for it: ``(..., n, n)``."""
        blocks = self.noise_covariance(_first_tensor(params), torch.Size((*base_shape, 1)), noise)
        return BlockDiagLinearOperator(DenseLinearOperator(blocks))

    # ---- the likelihood

    def marginal(self, function_dist: MultivariateNormal, *params, noise: Tensor | None = None, **_) -> Distribution:
        """``p(y~)``: the distribution of f with the noise added."""
        blocks = DenseLinearOperator(self._blocks(function_dist, params, noise))
        covariance = function_dist.lazy_covariance_matrix
        if isinstance(covariance, LazyEvaluatedKernelTensor):
            covariance = covariance.evaluate_kernel()  # only then does it say whether it has a low-rank root
        multitask = isinstance(function_dist, MultitaskMultivariateNormal)
        options = {"interleaved": function_dist._interleaved} if multitask else {}
        in_order = BlockDiagLinearOperator if options.get("interleaved", True) else BlockInterleavedLinearOperator
        total = covariance + in_order(blocks)
        kind = type(function_dist)
        if isinstance(total, NoisyFeatureGram):
            kind = _CLOSED_FORM.get(kind, kind)
        return kind(function_dist.mean, total, **options)

    def forward(self, function_samples: Tensor, *params, noise: Tensor | None = None, **_) -> Distribution:
        """``p(y~ | f)``: for one output ``(..., n)`` normals, else ``(..., n)`` normals of K entries each.

        Raises:
            ValueError: the number of outputs is not known, see the class.
        """
        x = _first_tensor(params)
        if self._num_outputs_of(function_samples, x, noise) == 1:
            blocks = self.noise_covariance(x, torch.Size((*function_samples.shape, 1)), noise)
            return Normal(function_samples, blocks[..., 0, 0].sqrt())
        blocks = self.noise_covariance(x, function_samples.shape, noise)
        return TorchMultivariateNormal(function_samples, blocks.expand(*function_samples.shape, -1))

    def log_marginal(
        self, observations: Tensor, function_dist: MultivariateNormal, *params, noise: Tensor | None = None, **_
    ) -> Tensor:
        """``log N(y~_i; m_i, V_i + Lambda_i^-1)`` of each example, ``(..., n)``."""
        mean, blocks = _marginals(function_dist)
        blocks = blocks + self._blocks(function_dist, params, noise)
        if observations.dim() < mean.dim():
            observations = observations.unsqueeze(-1)
        return TorchMultivariateNormal(mean, blocks).log_prob(observations)

    def expected_log_prob(
        self, target: Tensor, input: MultivariateNormal, *params, noise: Tensor | None = None, **_
    ) -> Tensor:
        """``E_f log N(y~_i; f_i, Lambda_i^-1)`` of each example, ``(..., n)``."""
        mean, blocks = _marginals(input)
        factor = torch.linalg.cholesky(self._blocks(input, params, noise))
        if target.dim() < mean.dim():
            target = target.unsqueeze(-1)
        off = torch.linalg.solve_triangular(factor, (target - mean)[..., None], upper=False)
        spread = torch.cholesky_solve(blocks, factor.expand(blocks.shape)).diagonal(dim1=-2, dim2=-1).sum(-1)
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * (off.square().sum((-2, -1)) + spread + log_det + mean.shape[-1] * math.log(2 * math.pi))

    def _known_num_outputs(self) -> int | None:
        """K, from the net, the noise given, or a noise for each output; None where these do not tell."""
        if self.linearization is not None and self.linearization.function.num_outputs is not None:
            return self.linearization.num_outputs
        if self._given_covariances is not None:
            return self._given_covariances.shape[-1]
        noise = self.noise
        if noise is None or noise.dim() == 0 or (self.per_example_noise and noise.shape[-1] == 1):
            return None
        return noise.shape[-1]

    def _num_outputs_of(self, samples: Tensor, x: Tensor | None, noise: Tensor | None) -> int:
        """K of samples of f, which are ``(..., n)`` for one output, else ``(..., n, K)``."""
        if self._given_num_outputs is not None:
            return self._given_num_outputs
        if self.linearization is not None and self.linearization.function.num_outputs is None and x is not None:
            self.linearization(x[..., :1, :] if x.dim() > 1 else x[:1, None])
        known = self._known_num_outputs()
        if known is not None:
            return known
        if samples.dim() < 2:
            return 1
        if noise is not None and noise.dim() > 2 and noise.shape[-3:] == (*samples.shape[-2:], samples.shape[-1]):
            return samples.shape[-1]
        raise ValueError(
            f"Samples of f of shape {tuple(samples.shape)} may be (..., n) of one output or (..., n, K) of several: "
            "construct GGNLikelihood with num_outputs=K, or with a linearization."
        )


def _noise_of(likelihood: GGNLikelihood) -> Tensor:
    return likelihood.noise


def _set_noise_of(likelihood: GGNLikelihood, value: Tensor) -> None:
    likelihood.noise = value


def _as_covariances(noise: Tensor) -> Tensor:
    """Given noise, checked: ``(n, K, K)``."""
    noise = noise.detach().clone()
    noise = noise[:, None, None] if noise.dim() == 1 else noise
    if noise.dim() != 3 or noise.shape[-1] != noise.shape[-2]:
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}; it must be covariances (n, K, K), or variances (n,) for one output."
        )
    _require_covariances(noise)
    return noise


def _require_covariances(noise: Tensor) -> None:
    """Raise a ``ValueError`` that names the first of ``noise`` ``(..., n, K, K)`` that is no covariance."""
    noise = noise.detach()
    require_finite(noise, "noise")
    bad = torch.linalg.cholesky_ex(noise).info != 0
    bad |= (noise - noise.mT).abs().amax((-2, -1)) > 1e-6 * noise.abs().amax((-2, -1))
    if bad.any():
        raise ValueError(f"The noise covariance at index {first_index(bad)} is not symmetric and positive definite.")


def _fitting(noise: Tensor, shape: torch.Size) -> Tensor:
    """Noise given for f of ``shape`` ``(..., n, K)``: ``(..., n, K, K)``."""
    n, k = shape[-2:]
    if noise.shape[-3:] != (n, k, k):
        if k > 1 or noise.shape[-1:] != (n,):
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}; it must be the covariances (..., {n}, {k}, {k}) of these {n} "
                "examples."
            )
        noise = noise[..., None, None]
    _require_covariances(noise)
    return noise


def _cat(before: Tensor, after: Tensor, event_dims: int = 3) -> Tensor:
    """Rows of examples put together; batch dimensions broadcast."""
    batch = torch.broadcast_shapes(before.shape[:-event_dims], after.shape[:-event_dims])
    parts = [part.expand(*batch, *part.shape[-event_dims:]) for part in (before, after)]
    return torch.cat(parts, -event_dims)


def _first_tensor(params: tuple) -> Tensor | None:
    """The inputs among a likelihood's positional arguments, which GPyTorch passes as they are or as a list."""
    if not params:
        return None
    return params[0] if isinstance(params[0], Tensor) else _first_tensor(tuple(params[0]))


def _marginals(dist: MultivariateNormal) -> tuple[Tensor, Tensor]:
    """Mean ``(..., n, K)`` and ``K x K`` covariance ``(..., n, K, K)`` of f at each example."""
    if not isinstance(dist, MultitaskMultivariateNormal):
        return dist.mean.unsqueeze(-1), dist.variance[..., None, None]
    n, k = dist.event_shape
    covariance = dist.covariance_matrix
    if not dist._interleaved:  # outputs first: bring examples first
        order = torch.arange(n * k, device=covariance.device).reshape(k, n).T.flatten()
        covariance = covariance[..., order, :][..., order]
    return dist.mean, diagonal_blocks(covariance, k)
