"""Gaussians over weights: priors by groups, and posteriors by what is cheap to do with them.

    paper          here                     shape
    S_0            Prior.variance           (P,), its diagonal
    delta          Prior.precision          (G,), one per group of weights
    N(w_*, Sigma)  GaussianWeights          mean (P,)

P weights in ``named_parameters`` order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import tiling
from .numerics import require_positive, symmetrize


@dataclass(frozen=True)
class WeightGroups:
    """A partition of the weight vector.

    Attributes:
        names: what each group is called.
        indices: for each group the positions of its weights, long tensors.
    """

    names: tuple[str, ...]
    indices: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.names)

    def index(self, device: torch.device) -> Tensor:
        """For each weight the number of its group, ``(P,)``."""
        out = torch.empty(sum(len(i) for i in self.indices), dtype=torch.long)
        for number, positions in enumerate(self.indices):
            out[positions] = number
        return out.to(device)


def weight_groups(
    param_names: Sequence[str],
    param_sizes: Sequence[int],
    groups: Sequence[str | Sequence[str]] | None,
    num_precisions: int,
) -> WeightGroups:
    """Which weights share a prior precision.

    Args:
        param_names, param_sizes: the selected parameters.
        groups: one entry per group, each a name, a prefix, or a list of them; every parameter in exactly one. None
            means all weights for one precision, one group per parameter tensor for as many, and one per weight for P.
        num_precisions: number of precisions given.

    Raises:
        ValueError: groups that overlap or leave a parameter out, or another number of precisions than of groups.
    """
    num_weights = sum(param_sizes)
    if groups is None and num_precisions == num_weights not in (1, len(param_names)):
        names = [f"{name}[{i}]" for name, size in zip(param_names, param_sizes, strict=True) for i in range(size)]
        return WeightGroups(tuple(names), tuple(torch.arange(num_weights)[:, None]))
    if groups is None:
        groups = [[""]] if num_precisions == 1 else [[name] for name in param_names]
    groups = [[group] if isinstance(group, str) else list(group) for group in groups]
    starts = [0]
    for size in param_sizes:
        starts.append(starts[-1] + size)
    owner: dict[str, int] = {}
    for number, prefixes in enumerate(groups):
        found = [
            n for n in param_names if any(p == "" or n == p or n.startswith(p.rstrip(".") + ".") for p in prefixes)
        ]
        if not found:
            raise ValueError(f"groups entry {prefixes} matches none of the parameters {', '.join(param_names)}.")
        for name in found:
            if name in owner:
                raise ValueError(f"Parameter '{name}' is in groups {groups[owner[name]]} and {prefixes}.")
            owner[name] = number
    missing = [name for name in param_names if name not in owner]
    if missing:
        raise ValueError(f"groups leave out {', '.join(missing)}: every parameter needs a prior precision.")
    if num_precisions not in (1, len(groups)):
        raise ValueError(f"prior_precision has {num_precisions} entries for {len(groups)} groups of weights.")
    indices = tuple(
        torch.cat([torch.arange(starts[i], starts[i + 1]) for i, n in enumerate(param_names) if owner[n] == number])
        for number in range(len(groups))
    )
    return WeightGroups(tuple("+".join(g) if g != [""] else "all" for g in groups), indices)


@dataclass(frozen=True)
class Prior:
    """``w - m ~ N(0, S0)``, ``S0 = diag(base_variance / delta_g)`` with one precision delta per group.

    Attributes:
        precision: delta, ``(G,)``, positive; may carry a graph.
        group_index: number of each weight's group, ``(P,)``.
        base_variance: ``(P,)`` (from a VOGN iterate, say), or None for ones.
        base_root: F, ``(P, P)``, for the full covariance ``S0 = F F^T / delta`` of one group.
    """

    precision: Tensor
    group_index: Tensor
    base_variance: Tensor | None = None
    base_root: Tensor | None = None

    @property
    def variance(self) -> Tensor:
        """Diagonal of S0, ``(P,)``."""
        variance = self.precision.reciprocal()[self.group_index]
        if self.base_root is not None:
            return variance * self.base_root.square().sum(-1)
        return variance if self.base_variance is None else variance * self.base_variance

    @property
    def scale(self) -> Tensor:
        """``S0^(1/2)``: its diagonal ``(P,)``, or a matrix ``(P, P)``; see :func:`scale_rows`."""
        return self.variance.sqrt() if self.base_root is None else self.base_root * self.precision.rsqrt()

    def precision_matmul(self, w: Tensor) -> Tensor:
        """``S0^-1 w``, ``(P,)``."""
        if self.base_root is None:
            return w / self.variance
        return solve_scale(self.scale, solve_scale(self.scale, w), transpose=True)

    def squared_norm(self, w: Tensor) -> Tensor:
        """``w^T S0^-1 w``."""
        return (w * self.precision_matmul(w)).sum()


# A root F of a covariance is kept as a vector where it is diagonal, and as a lower triangular matrix else.


def scale_rows(rows: Tensor, root: Tensor) -> Tensor:
    """``rows F`` for ``rows`` ``(..., P)``, that is ``F^T u`` for each row u."""
    return rows * root if root.dim() == 1 else rows @ root


def color(z: Tensor, root: Tensor) -> Tensor:
    """``F z`` for ``z`` ``(..., P)``."""
    return z * root if root.dim() == 1 else z @ root.mT


def solve_scale(root: Tensor, v: Tensor, transpose: bool = False) -> Tensor:
    """``F^-1 v``, or ``F^-T v``, for ``v`` ``(..., P)``."""
    if root.dim() == 1:
        return v / root
    columns = v.reshape(-1, v.shape[-1]).mT
    factor = root.mT if transpose else root
    return torch.linalg.solve_triangular(factor, columns, upper=transpose).mT.reshape(v.shape)


class GaussianWeights(ABC):
    """A Gaussian over the P weights, by its products; matrices are formed only when asked for.

    Attributes:
        mean: ``(P,)``.
        prior_precision: diagonal of the prior's precision that it came from, ``(P,)``, where that is known.
    """

    mean: Tensor
    prior_precision: Tensor | None = None
    _names: tuple[str, ...] = ("mean",)  # of the tensors it is made of

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by name: arguments of its class."""
        return {name: getattr(self, name) for name in self._names}

    def map(self, fn: Callable[[Tensor], Tensor]) -> GaussianWeights:
        """The same with ``fn`` done to every tensor, as ``Module.to`` does."""
        return type(self)(**{name: fn(tensor) for name, tensor in self.tensors().items()})

    def at(self, mean: Tensor) -> GaussianWeights:
        """The same covariance around another mean, ``(P,)``."""
        return type(self)(**{**self.tensors(), "mean": mean})

    @abstractmethod
    def covariance_matmul(self, v: Tensor) -> Tensor:
        """``Sigma v`` for ``v`` ``(..., P)``."""

    @abstractmethod
    def precision_matmul(self, v: Tensor) -> Tensor:
        """``Sigma^-1 v`` for ``v`` ``(..., P)``."""

    @abstractmethod
    def rsample(self, sample_shape: torch.Size = torch.Size(), generator: torch.Generator | None = None) -> Tensor:
        """Draws, ``(*sample_shape, P)``."""

    def log_det(self) -> Tensor:
        """``log|Sigma|``."""
        raise ValueError(f"The determinant of a {type(self).__name__}, known by its products alone, is not offered.")

    def covariance(self) -> Tensor:
        """Sigma, ``(P, P)``."""
        return symmetrize(self.covariance_matmul(self._eye("covariance")))

    def precision(self) -> Tensor:
        """``Sigma^-1``, ``(P, P)``."""
        return symmetrize(self.precision_matmul(self._eye("precision")))

    def _eye(self, what: str) -> Tensor:
        p = len(self.mean)
        tiling.require_memory(
            3 * p * p,
            self.mean.dtype,
            self.mean.device,
            f"The {p} x {p} {what} of the weights",
            f"Use {what}_matmul, which needs no matrix.",
        )
        return torch.eye(p, dtype=self.mean.dtype, device=self.mean.device)

    def _noise(self, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        return torch.randn(shape, dtype=self.mean.dtype, device=self.mean.device, generator=generator)


class DiagonalGaussian(GaussianWeights):
    """``N(mean, diag(variance))``; both ``(P,)``."""

    _names = ("mean", "variance")

    def __init__(self, mean: Tensor, variance: Tensor) -> None:
        require_positive(variance.detach(), "variance")
        self.mean = mean
        self.variance = variance

    def log_det(self) -> Tensor:
        return self.variance.log().sum()

    def covariance_matmul(self, v: Tensor) -> Tensor:
        return v * self.variance

    def precision_matmul(self, v: Tensor) -> Tensor:
        return v / self.variance

    def rsample(self, sample_shape=torch.Size(), generator=None) -> Tensor:
        noise = self._noise((*sample_shape, len(self.mean)), generator)
        return self.mean + self.variance.sqrt() * noise


class WhitenedGaussian(GaussianWeights):
    """``N(mean, F A^-1 F^T)`` with ``A = L L^T``: the weight-space posterior.

    Args:
        mean: ``(P,)``.
        scale: F, its diagonal ``(P,)``, or lower triangular ``(P, P)``.
        factor: L, ``(P, P)``.
    """

    _names = ("mean", "scale", "factor")

    def __init__(self, mean: Tensor, scale: Tensor, factor: Tensor) -> None:
        self.mean = mean
        self.scale = scale
        self.factor = factor

    def log_det(self) -> Tensor:
        diagonal = self.scale if self.scale.dim() == 1 else self.scale.diagonal()
        return 2 * (diagonal.log().sum() - self.factor.diagonal().log().sum())

    def covariance_matmul(self, v: Tensor) -> Tensor:
        columns = scale_rows(v, self.scale).reshape(-1, len(self.mean)).mT
        return color(torch.cholesky_solve(columns, self.factor).mT.reshape(v.shape), self.scale)

    def precision_matmul(self, v: Tensor) -> Tensor:
        inner = solve_scale(self.scale, v) @ self.factor @ self.factor.mT
        return solve_scale(self.scale, inner, transpose=True)

    def rsample(self, sample_shape=torch.Size(), generator=None) -> Tensor:
        # F L^-T e has covariance F (L L^T)^-1 F^T
        noise = self._noise((*sample_shape, len(self.mean)), generator)
        columns = noise.reshape(-1, len(self.mean)).mT
        white = torch.linalg.solve_triangular(self.factor.mT, columns, upper=True).mT.reshape(noise.shape)
        return self.mean + color(white, self.scale)


class ImplicitGaussian(GaussianWeights):
    """A Gaussian known by its products only.

    Args:
        mean: ``(P,)``.
        covariance_matmul, precision_matmul: ``(..., P) -> (..., P)``.
        sample: ``(sample_shape, generator) -> (*sample_shape, P)``, draws around zero.
    """

    def __init__(
        self,
        mean: Tensor,
        covariance_matmul: Callable[[Tensor], Tensor],
        precision_matmul: Callable[[Tensor], Tensor],
        sample: Callable[[torch.Size, torch.Generator | None], Tensor],
    ) -> None:
        self.mean = mean
        self._covariance_matmul, self._precision_matmul, self._sample = covariance_matmul, precision_matmul, sample

    @classmethod
    def from_rows(
        cls,
        mean: Tensor,
        prior_variance: Tensor,
        rows_matmul: Callable[[Tensor], Tensor],
        rows_rmatmul: Callable[[Tensor], Tensor],
        solve: Callable[[Tensor], Tensor],
        num_rows: int,
    ) -> ImplicitGaussian:
        """``Sigma^-1 = S0^-1 + E^T E`` by products with the rows E ``(num_rows, P)``, E^T, and Sigma."""

        def precision(u: Tensor) -> Tensor:
            return u / prior_variance + rows_rmatmul(rows_matmul(u))

        def sample(shape: torch.Size, generator: torch.Generator | None) -> Tensor:
            # Sigma (S0^-1/2 e + E^T e') has covariance Sigma (S0^-1 + E^T E) Sigma = Sigma
            options = {"dtype": mean.dtype, "device": mean.device, "generator": generator}
            noise = torch.randn(*shape, len(mean), **options) / prior_variance.sqrt()
            return solve(noise + rows_rmatmul(torch.randn(*shape, num_rows, **options)))

        return cls(mean, solve, precision, sample)

    def covariance_matmul(self, v: Tensor) -> Tensor:
        """See the base class."""
        return self._covariance_matmul(v)

    def precision_matmul(self, v: Tensor) -> Tensor:
        """See the base class."""
        return self._precision_matmul(v)

    def rsample(self, sample_shape: torch.Size = torch.Size(), generator: torch.Generator | None = None) -> Tensor:
        """See the base class."""
        return self.mean + self._sample(torch.Size(sample_shape), generator)
