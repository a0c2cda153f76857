"""GPyTorch kernel and mean of a linearized net.

    k(x, x') = J(x) S0 J(x')^T     JacobianKernel, (n K, n' K), outputs fastest (paper eq. 9; the NTK at w* for S0 = I)
    c(x)     = f_w*(x) - J(x) w*   NetworkMean, the prior mean in output form

The kernel owns ``prior_precision``: one delta, or one per group of weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from gpytorch.constraints import Interval, Positive
from gpytorch.kernels import Kernel
from gpytorch.means import Mean
from gpytorch.priors import Prior as HyperPrior
from linear_operator import to_linear_operator
from linear_operator.operators import (
    LinearOperator,
    LowRankRootLinearOperator,
    MatmulLinearOperator,
    RootLinearOperator,
)
from torch import Tensor, nn

from . import tiling
from .linearize import Linearization
from .numerics import require_finite, require_like, require_positive
from .weights import Prior, WeightGroups, weight_groups


def as_linearization(net: nn.Module | Linearization, **options) -> Linearization:
    """``net`` linearized, or the linearization it already is (then options must be left out)."""
    if not isinstance(net, Linearization):
        return Linearization(net, **options)
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)} were given with a Linearization, which has its own. Leave them out.")
    return net


def log_positive() -> Positive:
    """Positive, optimised in the logarithm: precisions and variances span orders of magnitude."""
    return Positive(transform=torch.exp, inv_transform=torch.log)


class _PriorStructure(nn.Module):
    """What is fixed of the weight prior: it moves with the kernel and is no batched hyperparameter of it."""

    def __init__(self, groups: WeightGroups, base_variance: Tensor | None, device: torch.device) -> None:
        super().__init__()
        self.groups = groups
        self.register_buffer("group_index", groups.index(device), persistent=False)
        self.register_buffer("base_variance", base_variance)


class JacobianKernel(Kernel):
    """``k(x, x') = J(x) S0 J(x')^T`` of a trained net, ``S0 = diag(prior_variance / prior_precision)``.

    Args:
        net: module (copied, frozen) or :class:`Linearization`.
        prior_precision: delta, a number, or one entry per group of weights.
        groups: partition of the parameters, each entry a name, a prefix or a list of them; None means all weights for
            one precision, and the parameter tensors for several.
        prior_variance: ``(P,)``, a fixed diagonal prior covariance, as from VOGN; ones by default.
        params, input_shape, input_dtype: see :class:`Linearization`.
        batch_shape: batch of hyperparameters.
        prior_precision_prior: GPyTorch prior on ``prior_precision``.
        prior_precision_constraint: by default positive, optimised in the logarithm.
        kwargs: of ``gpytorch.kernels.Kernel``, such as ``active_dims``.

    Shapes:
        inputs ``(..., n, d)``; the matrix is ``(..., n K, n' K)``, ``diag=True`` gives ``(..., n K)``.
    """

    has_lengthscale = False

    def __init__(
        self,
        net: nn.Module | Linearization,
        prior_precision: float | Sequence[float] | Tensor = 1.0,
        groups: Sequence[str | Sequence[str]] | None = None,
        prior_variance: Tensor | None = None,
        params: Sequence[str] | str | None = None,
        input_shape: Sequence[int] | None = None,
        input_dtype: torch.dtype | None = None,
        batch_shape: torch.Size | None = None,
        prior_precision_prior: HyperPrior | None = None,
        prior_precision_constraint: Interval | None = None,
        **kwargs,
    ) -> None:
        batch_shape = torch.Size() if batch_shape is None else torch.Size(batch_shape)
        super().__init__(batch_shape=batch_shape, **kwargs)
        lin = as_linearization(net, params=params, input_shape=input_shape, input_dtype=input_dtype)
        self.linearization = lin
        delta = torch.as_tensor(prior_precision, dtype=lin.dtype, device=lin.device)
        require_positive(delta.detach(), "prior_precision")
        if delta.dim() > len(batch_shape) + 1:
            raise ValueError(f"prior_precision has shape {tuple(delta.shape)}; give a number or one entry per group.")
        num_precisions = 1 if delta.dim() == len(batch_shape) else delta.shape[-1]
        partition = weight_groups(lin.param_names, lin.param_sizes, groups, num_precisions)
        if prior_variance is not None:
            if prior_variance.shape != (lin.num_weights,):
                raise ValueError(
                    f"prior_variance has shape {tuple(prior_variance.shape)}; the net has {lin.num_weights} selected "
                    "weights."
                )
            require_like(prior_variance, lin.weights, "prior_variance", "the net")
            require_positive(prior_variance, "prior_variance")
            prior_variance = prior_variance.detach().clone()
        self.structure = _PriorStructure(partition, prior_variance, lin.device)

        raw = torch.zeros(*batch_shape, len(partition), dtype=lin.dtype, device=lin.device)
        self.register_parameter("raw_prior_precision", nn.Parameter(raw))
        self.register_constraint("raw_prior_precision", prior_precision_constraint or log_positive())
        if prior_precision_prior is not None:
            self.register_prior(
                "prior_precision_prior",
                prior_precision_prior,
                lambda module: module.prior_precision,
                lambda module, value: module._set_prior_precision(value),
            )
        self.prior_precision = delta

    # ---- hyperparameters

    @property
    def prior_precision(self) -> Tensor:
        """delta, ``(*batch_shape, G)``."""
        return self.raw_prior_precision_constraint.transform(self.raw_prior_precision)

    @prior_precision.setter
    def prior_precision(self, value: float | Sequence[float] | Tensor) -> None:
        self._set_prior_precision(value)

    def _set_prior_precision(self, value: float | Sequence[float] | Tensor) -> None:
        raw = self.raw_prior_precision
        value = torch.as_tensor(value, dtype=raw.dtype, device=raw.device)
        require_positive(value.detach(), "prior_precision")
        if value.dim() == len(self.batch_shape):
            value = value.unsqueeze(-1)
        try:
            value = value.expand(self.raw_prior_precision.shape)
        except RuntimeError:
            raise ValueError(
                f"prior_precision has shape {tuple(value.shape)}; it must be a number or have one entry for each of "
                f"the {len(self.structure.groups)} groups {self.structure.groups.names}."
            ) from None
        self.initialize(raw_prior_precision=self.raw_prior_precision_constraint.inverse_transform(value))

    @property
    def groups(self) -> WeightGroups:
        """Which weights share a precision."""
        return self.structure.groups

    def prior(self, precision: Tensor | None = None) -> Prior:
        """The weight prior at the present (or the given) ``prior_precision``; for an unbatched kernel."""
        precision = self.prior_precision if precision is None else precision
        return Prior(precision, self.structure.group_index, self.structure.base_variance)

    @property
    def prior_variance(self) -> Tensor:
        """Diagonal of S0, ``(*batch_shape, P)``."""
        variance = self.prior_precision.reciprocal()[..., self.structure.group_index]
        base = self.structure.base_variance
        return variance if base is None else variance * base

    # ---- the kernel

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:
        """K."""
        if self.linearization.function.num_outputs is None:
            self.linearization(x1[..., :1, :])
        return self.linearization.num_outputs

    def feature_map(self, x: Tensor) -> Tensor:
        """phi, ``(*batch, n, K, P)``, with ``k(x, x') = phi(x) phi(x')^T``."""
        return self.linearization.jacobian(x) * self.prior_variance.sqrt()[..., None, None, :]

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **params
    ) -> Tensor | LinearOperator:
        """See ``gpytorch.kernels.Kernel.forward``."""
        if last_dim_is_batch:
            raise RuntimeError("JacobianKernel does not accept last_dim_is_batch: a net reads all dimensions at once.")
        same = x1 is x2 or (x1.shape == x2.shape and torch.equal(x1, x2))
        if diag:
            phi1 = self.feature_map(x1)
            phi2 = phi1 if same else self.feature_map(x2)
            return (phi1 * phi2).sum(-1).flatten(-2)
        k, p = self.num_outputs_per_input(x1, x2), self.linearization.num_weights
        elements = p * k * (x1.shape[:-1].numel() + x2.shape[:-1].numel())
        if not self.batch_shape and not tiling.fits(elements, self.linearization.dtype, x1.device):
            variance = self.prior_variance
            return to_linear_operator(self.linearization.gram(x1, None if same else x2, prior_variance=variance))
        phi1 = self.feature_map(x1).flatten(-3, -2)
        if same:
            low_rank = phi1.shape[-1] < phi1.shape[-2]
            return LowRankRootLinearOperator(phi1) if low_rank else RootLinearOperator(phi1)
        return MatmulLinearOperator(phi1, self.feature_map(x2).flatten(-3, -2).mT)


class NetworkMean(Mean):
    """``c(x) = f_w*(x) - J(x) w*``, the prior mean that goes with :class:`JacobianKernel` for targets in output space.

    Args:
        net: module (copied, frozen) or :class:`Linearization`.
        weights: ``(P,)``, the prior mean of the weights: adds ``J(x) weights``. Zero by default.

    Shapes:
        inputs ``(..., n, d)``; returns ``(..., n)`` for one output, else ``(..., n, K)``.
    """

    def __init__(self, net: nn.Module | Linearization, weights: Tensor | None = None) -> None:
        super().__init__()
        self.linearization = as_linearization(net)
        if weights is not None:
            if weights.shape != (self.linearization.num_weights,):
                raise ValueError(
                    f"weights has shape {tuple(weights.shape)}; the net has {self.linearization.num_weights} selected "
                    "weights."
                )
            require_finite(weights, "weights")
        self.register_buffer("prior_mean", weights)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        away = self.linearization.weights
        if self.prior_mean is not None:
            away = away - self.prior_mean
        out = self.linearization(x) - self.linearization.jvp(x, away)
        return out.squeeze(-1) if out.shape[-1] == 1 else out
