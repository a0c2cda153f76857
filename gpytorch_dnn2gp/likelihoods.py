"""GPyTorch likelihood with the Gauss-Newton noise: ``y~ = f + e``, ``e ~ N(0, Lambda(x)^-1)``, K x K per example.

The dual Gaussian of any loss whose noise precision Lambda is invertible; Lambda is computed from the net, so it has a
value at new inputs too. For a Gaussian loss it is the observation noise itself. The likelihood owns ``noise`` (sigma^2)
and ``temperature`` and hands them to the stateless loss.
"""

from __future__ import annotations

import math

import torch
from gpytorch.constraints import Interval
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
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
from .numerics import first_index, require_positive


class GGNLikelihood(_GaussianLikelihoodBase):
    """Heteroscedastic Gaussian likelihood with covariance ``Lambda(x)^-1`` per example.

    Args:
        loss: from ``losses``; its noise, if it has one, is the initial value of ``noise``.
        linearization: of the net, which gives the outputs that Lambda depends on. A Gaussian loss needs none.
        noise_prior, noise_constraint: on ``noise``; by default positive, optimised in the logarithm.
        temperature: the loss is divided by it, so Lambda too.

    Calling it on a distribution of f, ``likelihood(gp(x), x)``, adds the noise at ``x``; ``noise=`` gives it instead,
    ``(..., n, K, K)``, or ``(..., n)`` for one output.
    """

    def __init__(
        self,
        loss: Loss,
        linearization: Linearization | None = None,
        noise_prior: HyperPrior | None = None,
        noise_constraint: Interval | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(noise_covar=None)
        self._loss = loss
        self.linearization = linearization
        require_positive(torch.as_tensor(float(temperature)), "temperature")
        options = {} if linearization is None else {"dtype": linearization.dtype, "device": linearization.device}
        self.register_buffer("_temperature", torch.as_tensor(float(temperature), **options))
        self.per_example_noise = loss.has_noise and loss.noise.dim() == 2
        if self.per_example_noise:
            self.register_buffer("_given_noise", loss.noise.detach().clone().to(**options))
        elif loss.has_noise:
            self._noise_shape = loss.noise.shape
            raw = torch.zeros(loss.noise.shape or (1,), **options)
            self.register_parameter("raw_noise", nn.Parameter(raw))
            self.register_constraint("raw_noise", noise_constraint or log_positive())
            if noise_prior is not None:
                self.register_prior(
                    "noise_prior", noise_prior, lambda m: m.noise, lambda m, value: m._set_noise(value)
                )
            self._set_noise(loss.noise)

    # ---- hyperparameters

    @property
    def noise(self) -> Tensor | None:
        """sigma^2: a number, ``(K,)``, or fixed per example ``(n, K)``; None for a loss without noise."""
        if self.per_example_noise:
            return self._given_noise
        if not self._loss.has_noise:
            return None
        return self.raw_noise_constraint.transform(self.raw_noise).reshape(self._noise_shape)

    @noise.setter
    def noise(self, value: float | Tensor) -> None:
        self._set_noise(value)

    def _set_noise(self, value: float | Tensor) -> None:
        if not self._loss.has_noise:
            raise ValueError(f"{self._loss} has no noise to set.")
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
    def loss(self) -> Loss:
        """The loss at the present noise."""
        return self.loss_with()

    # ---- noise of the dual Gaussian

    def noise_covariance(self, x: Tensor | None, shape: torch.Size, noise: Tensor | None = None) -> Tensor:
        """``Lambda^-1`` at each example, ``(..., n, K, K)``.

        Args:
            x: inputs ``(..., n, d)``; a Gaussian loss needs none.
            shape: ``(..., n, K)`` of f.
            noise: given instead, ``(..., n, K, K)``, or ``(..., n)`` for one output.

        Raises:
            ValueError: where the noise has an infinite direction (always for a softmax).
        """
        if noise is not None:
            if shape[-1] == 1 and noise.shape[-1:] == shape[-2:-1]:
                noise = noise[..., None, None]
            if noise.shape[-3:] != (shape[-2], shape[-1], shape[-1]):
                raise ValueError(
                    f"noise has shape {tuple(noise.shape)}; it must be the covariances (..., {shape[-2]}, {shape[-1]}, "
                    f"{shape[-1]}) of these {shape[-2]} examples."
                )
            return noise
        if not self._loss.invertible:
            raise ValueError(
                f"The noise of {self._loss} in the space of targets has an infinite direction (Lambda is singular). "
                "Use gp.predict for labels and the Laplace evidence for model choice; neither needs it."
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
        if loss.precision_needs_labels:
            raise ValueError(f"The noise precision of {self._loss} depends on labels: give from_callable a fisher=.")
        precision = loss.noise_precision(f) / self._temperature
        factor, info = torch.linalg.cholesky_ex(precision)
        if info.any():
            raise ValueError(
                f"The noise precision at index {first_index(info != 0)} is zero to working precision (saturated "
                "outputs): its noise is infinite. Use gp.predict for labels."
            )
        return torch.cholesky_inverse(factor)

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
        if not isinstance(function_dist, MultitaskMultivariateNormal):
            return function_dist.__class__(function_dist.mean, covariance + BlockDiagLinearOperator(blocks))
        interleaved = function_dist._interleaved
        noise_operator = (BlockDiagLinearOperator if interleaved else BlockInterleavedLinearOperator)(blocks)
        return function_dist.__class__(function_dist.mean, covariance + noise_operator, interleaved=interleaved)

    def forward(self, function_samples: Tensor, *params, noise: Tensor | None = None, **_) -> Distribution:
        """``p(y~ | f)``: for one output ``(..., n)`` normals, else ``(..., n)`` normals of K entries each."""
        if self._num_outputs == 1:
            blocks = self.noise_covariance(_first_tensor(params), torch.Size((*function_samples.shape, 1)), noise)
            return Normal(function_samples, blocks[..., 0, 0].sqrt())
        blocks = self.noise_covariance(_first_tensor(params), function_samples.shape, noise)
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

    @property
    def _num_outputs(self) -> int:
        if self.linearization is not None and self.linearization.function.num_outputs is not None:
            return self.linearization.num_outputs
        return 1 if self.noise is None or self.noise.dim() == 0 else self.noise.shape[-1]


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
    if dist._interleaved:
        covariance = covariance.unflatten(-1, (n, k)).unflatten(-3, (n, k))
    else:
        covariance = covariance.unflatten(-1, (k, n)).unflatten(-3, (k, n)).transpose(-1, -2).transpose(-3, -4)
    return dist.mean, covariance.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
