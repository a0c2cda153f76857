"""Gaussians over weights: priors by groups, and posteriors by what is cheap to do with them.

    paper          here                     shape
    S_0            Prior.variance           (P,), its diagonal
    delta          Prior.precision          (G,), one per group of weights
    N(w_*, Sigma)  GaussianWeights          mean (P,)

P weights in ``named_parameters`` order.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import tiling
from .linearize import select_parameters
from .numerics import cholesky, log_det_from_cholesky, require_finite, require_positive, symmetrize


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
        other = copy.copy(self)
        other.mean = mean
        return other

    @abstractmethod
    def covariance_matmul(self, v: Tensor) -> Tensor:
        """``Sigma v`` for ``v`` ``(..., P)``."""

    @abstractmethod
    def precision_matmul(self, v: Tensor) -> Tensor:
        """``Sigma^-1 v`` for ``v`` ``(..., P)``."""

    @abstractmethod
    def rsample(self, sample_shape: torch.Size = torch.Size(), generator: torch.Generator | None = None) -> Tensor:
        """Draws, ``(*sample_shape, P)``."""

    def marginal_variance(self) -> Tensor:
        """Diagonal of Sigma, ``(P,)``."""
        return self.covariance().diagonal()

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

    def marginal_variance(self) -> Tensor:
        return self.variance

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


class LowRankGaussian(GaussianWeights):
    """``N(mean, diag(variance) + root root^T)``, as SWAG gives it.

    Args:
        mean: ``(P,)``.
        variance: ``(P,)``, not negative; where it is zero there is a covariance but no precision.
        root: ``(P, r)``.
    """

    _names = ("mean", "variance", "root")

    def __init__(self, mean: Tensor, variance: Tensor, root: Tensor) -> None:
        if root.shape[:-1] != mean.shape or variance.shape != mean.shape:
            raise ValueError(
                f"mean {tuple(mean.shape)}, variance {tuple(variance.shape)} and root {tuple(root.shape)} must be "
                "(P,), (P,) and (P, r)."
            )
        if not bool((torch.isfinite(variance) & (variance >= 0)).all()):
            raise ValueError("variance must be finite and not negative.")
        self.mean, self.variance, self.root = mean, variance, root

    def _inner(self) -> Tensor:
        """Cholesky factor of ``I + root^T diag(variance)^-1 root``, ``(r, r)``."""
        if not bool((self.variance > 0).all()):
            raise ValueError(
                f"{int((self.variance == 0).sum())} of {len(self.variance)} weights never moved, and have no variance "
                "of their own. This Gaussian has covariances and samples, but no precision and no evidence."
            )
        inner = self.root.mT @ (self.root / self.variance[:, None])
        return cholesky(inner + torch.eye(len(inner), dtype=inner.dtype, device=inner.device), "I + R^T D^-1 R")

    def marginal_variance(self) -> Tensor:
        return self.variance + self.root.square().sum(-1)

    def log_det(self) -> Tensor:
        return log_det_from_cholesky(self._inner()) + self.variance.log().sum()

    def covariance_matmul(self, v: Tensor) -> Tensor:
        return v * self.variance + (v @ self.root) @ self.root.mT

    def precision_matmul(self, v: Tensor) -> Tensor:
        # Woodbury
        scaled = v / self.variance
        inner = (scaled @ self.root).reshape(-1, self.root.shape[-1]).mT
        solved = torch.cholesky_solve(inner, self._inner()).mT.reshape(*v.shape[:-1], -1)
        return scaled - (solved @ self.root.mT) / self.variance

    def rsample(self, sample_shape=torch.Size(), generator=None) -> Tensor:
        own = self._noise((*sample_shape, len(self.mean)), generator) * self.variance.sqrt()
        return self.mean + own + self._noise((*sample_shape, self.root.shape[-1]), generator) @ self.root.mT


# ---- from elsewhere


def gaussian(
    mean: Tensor,
    *,
    variance: Tensor | None = None,
    covariance: Tensor | None = None,
    precision: Tensor | None = None,
    prior_precision: float | Tensor | None = None,
) -> GaussianWeights:
    """Any Gaussian over weights, to make a GP of.

    Args:
        mean: ``(P,)``, in ``named_parameters`` order.
        variance: ``(P,)``; or
        covariance: ``(P, P)``; or
        precision: ``(P,)`` or ``(P, P)``. One of the three.
        prior_precision: of the prior it came from, a number or ``(P,)``, for the evidence.

    Raises:
        ValueError: not exactly one of the three, other shapes, or a matrix that is not positive definite.
    """
    given = {"variance": variance, "covariance": covariance, "precision": precision}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"Give one of variance, covariance and precision; got {', '.join(given) or 'none'}.")
    ((name, value),) = given.items()
    require_finite(mean, "mean")
    require_finite(value, name)
    p = len(mean)
    shapes = {"variance": [(p,)], "covariance": [(p, p)], "precision": [(p,), (p, p)]}[name]
    if mean.dim() != 1 or tuple(value.shape) not in shapes:
        raise ValueError(
            f"mean is {tuple(mean.shape)} and {name} {tuple(value.shape)}; they must be (P,) and "
            f"{' or '.join('(P,)' if len(s) == 1 else '(P, P)' for s in shapes)}."
        )
    mean, value = mean.detach().clone(), value.detach().clone()
    if value.dim() == 1:
        require_positive(value, name)
        result = DiagonalGaussian(mean, value if name == "variance" else 1 / value)
    else:
        factor, info = torch.linalg.cholesky_ex(symmetrize(value))
        if info or not torch.allclose(value, value.mT, rtol=0.0, atol=1e-5 * float(value.abs().max())):
            raise ValueError(f"{name} is not symmetric and positive definite.")
        eye = torch.eye(p, dtype=value.dtype, device=value.device)
        one = torch.ones_like(mean)
        # N(m, F F^T), or N(m, (L L^T)^-1)
        result = WhitenedGaussian(mean, factor, eye) if name == "covariance" else WhitenedGaussian(mean, one, factor)
    if prior_precision is not None:
        result.prior_precision = _as_weights(prior_precision, mean)
    return result


def _as_weights(prior_precision: float | Tensor, mean: Tensor) -> Tensor:
    prior_precision = torch.as_tensor(prior_precision, dtype=mean.dtype, device=mean.device)
    require_positive(prior_precision, "prior_precision")
    return prior_precision.expand(mean.shape).clone()


def from_ivon(optimizer: torch.optim.Optimizer, net: nn.Module) -> DiagonalGaussian:
    """Posterior of IVON (package ``ivon-opt``): precision ``ess (hess + weight_decay)``, prior ``ess weight_decay``.

    Args:
        optimizer: ``ivon.IVON`` of this net, outside ``sampled_params``.
        net: whose parameters are the mean.

    Raises:
        TypeError: another optimizer.
        ValueError: parameters of the net that the optimizer does not have.

    Source: Shen et al. 2024, "Variational learning is effective for large deep networks".
    """
    groups = getattr(optimizer, "param_groups", None)
    if not groups or not all({"hess", "ess", "weight_decay"} <= set(group) for group in groups):
        raise TypeError(f"from_ivon reads an ivon.IVON optimizer; got {type(optimizer).__name__}.")
    pieces: dict[int, tuple[Tensor, float, float]] = {}
    for group in groups:
        own = [p for p in group["params"] if p is not None]
        sizes = [p.numel() for p in own]
        if group["hess"].numel() != sum(sizes):
            raise ValueError(f"IVON's Hessian has {group['hess'].numel()} entries for {sum(sizes)} weights.")
        for p, hess in zip(own, group["hess"].split(sizes), strict=True):
            pieces[id(p)] = hess, float(group["ess"]), float(group["weight_decay"])
    means, precisions, priors = [], [], []
    for name, p in net.named_parameters():
        if not p.requires_grad:
            continue
        if id(p) not in pieces:
            raise ValueError(f"IVON does not train '{name}' of this net: freeze it, or give the net that it trains.")
        hess, ess, weight_decay = pieces[id(p)]
        means.append(p.detach().flatten())
        precisions.append(ess * (hess.detach() + weight_decay))
        priors.append(torch.full_like(means[-1], ess * weight_decay))
    prior = torch.cat(priors)
    known = prior if bool((prior > 0).all()) else None
    return gaussian(torch.cat(means), precision=torch.cat(precisions), prior_precision=known)


def from_laplace(posterior: object) -> GaussianWeights:
    """The posterior of laplace-torch: ``DiagLaplace`` or ``FullLaplace``, after ``fit``.

    Args:
        posterior: its object. Of a last-layer one make ``VariationalGP(..., params="last_layer")``. A prior whose mean
            is not zero is not taken over, so that there is no evidence.

    Raises:
        TypeError: another structure (Kronecker, low rank), or another object.
    """
    mean, precision = getattr(posterior, "mean", None), getattr(posterior, "posterior_precision", None)
    if not isinstance(mean, Tensor) or not isinstance(precision, Tensor):
        raise TypeError(
            f"from_laplace reads a fitted DiagLaplace or FullLaplace of laplace-torch; got {type(posterior).__name__}."
        )
    centred = not torch.as_tensor(getattr(posterior, "prior_mean", 0.0)).any()
    known = posterior.prior_precision_diag.detach() if centred else None
    return gaussian(mean, precision=precision, prior_precision=known)


class SWAG:
    """Stochastic weight averaging, Gaussian: the moments of the weights that any optimizer goes through.

    ``N(mean, (diag(variance) + D D^T / (r - 1)) / 2)`` with mean and variance over all that were collected, and D the
    last r of them less the mean. Call :meth:`collect` once in an epoch or so, at the end of training with a constant
    learning rate.

    Args:
        net: the net in training; it is read, never written.
        rank: r, at least 2, how many deviations are kept; 0 for the diagonal alone.
        params: which weights, as in :class:`Linearization`.

    Source: Maddox et al. 2019, "A simple baseline for Bayesian uncertainty in deep learning"; here deviations are from
    the final mean, and the variance is summed by Welford's rule, which does not cancel.
    """

    def __init__(self, net: nn.Module, rank: int = 20, params: Sequence[str] | str | None = None) -> None:
        if rank < 0 or rank == 1:
            raise ValueError(f"rank must be at least 2, or 0 for the diagonal alone; got {rank}.")
        self.net, self.rank = net, rank
        self.names = select_parameters(net, params)
        self.count = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None
        self._last: list[Tensor] = []

    @torch.no_grad()
    def collect(self) -> None:
        """Take the net's present weights in.

        Raises:
            ValueError: weights that are NaN or infinite; what was collected stays.
        """
        parameters = dict(self.net.named_parameters())
        w = torch.cat([parameters[name].detach().flatten() for name in self.names])
        require_finite(w, "The net's weights", "Training has diverged.")
        if self._mean is None:
            self._mean, self._squares = torch.zeros_like(w), torch.zeros_like(w)
        self.count += 1
        away = w - self._mean
        self._mean = self._mean + away / self.count
        self._squares = self._squares + away * (w - self._mean)
        self._last = [*self._last, w][-self.rank :] if self.rank else []

    def gaussian(self) -> GaussianWeights:
        """The Gaussian over weights."""
        if self.count < 2:
            raise ValueError(f"SWAG needs at least two collected sets of weights; there are {self.count}.")
        variance = self._squares / self.count
        if not self.rank:
            return DiagonalGaussian(self._mean.clone(), variance)
        deviations = torch.stack(self._last, -1) - self._mean[:, None]
        return LowRankGaussian(self._mean.clone(), variance / 2, deviations / (2 * (len(self._last) - 1)) ** 0.5)
