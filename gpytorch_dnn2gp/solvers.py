"""Posterior algebra and evidence of the linear model ``f(x) + J(x)(w - w*)``, on the side where it is cheap.

With rows ``U = phi^T``, gradients v, ``D = R R^T`` (laplace.py), prior N(0, S) and ``g = U^T v + S^-1 w*``:

    Sigma        = (U^T D U + S^-1)^-1
    weight space     A = I + S^(1/2) U^T D U S^(1/2),   Sigma = S^(1/2) A^-1 S^(1/2)            P x P
    function space   B = I + R^T k R,  k = U S U^T,     Sigma = S - S U^T R B^-1 R^T U S        n m x n m
    iterative        conjugate gradients with products of A                                     no matrix
    diagonal         diag(U^T D U) in place of U^T D U                                          P

    log|A| = log|B|;  covariance of f at x*: J* Sigma J*^T;  posterior mean: w* - Sigma g.
    log evidence  = data term - w*^T S^-1 w* / 2 - log|B| / 2   (Laplace)   ( + g^T Sigma g / 2  for the GP's)

In function space a second, stationary kernel may be added, ``k = J S J^T + k_r (x) I_K``, for what the features do not
span: far from the data. There w and the added function are both unknown, and step and weights are those of w alone.

A and B are I + PSD: no inverse of D, no jitter. Everything is differentiable in delta and sigma; sums over the data are
taken once. n examples, m rows each, P weights, G prior groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import dual, tiling
from .laplace import Splitting, curvature
from .linearize import Rows
from .numerics import (
    cholesky,
    conjugate_gradients,
    diagonal_blocks,
    log_det,
    symmetrize,
    warn_if_cancelled,
    warn_if_inaccurate,
)
from .weights import (
    DiagonalGaussian,
    GaussianWeights,
    ImplicitGaussian,
    Prior,
    WeightGroups,
    WhitenedGaussian,
    color,
    scale_rows,
)

SOLVERS = ("auto", "weight_space", "function_space", "iterative")


class Posterior(ABC):
    """The Gaussian over weights and outputs at fixed prior and noise.

    Attributes:
        step: ``Sigma g``, ``(P,)``: minus the Gauss-Newton step that the posterior mean is away from w*.
        newton_decrement: ``g^T Sigma g``.
    """

    newton_decrement: Tensor

    @property
    @abstractmethod
    def step(self) -> Tensor: ...

    @property
    @abstractmethod
    def log_det(self) -> Tensor:
        """``log|I + R^T k R|``, twice the information gained about the weights, in nats."""

    @abstractmethod
    def covariance(self, rows: Rows) -> Tensor:
        """``J* Sigma J*^T`` over all examples of each batch element, ``(..., n K, n K)``."""

    @abstractmethod
    def cross_covariance(self, rows1: Rows, rows2: Rows) -> Tensor:
        """``J1 Sigma J2^T``, ``(..., n1 K, n2 K)``; batch dimensions broadcast."""

    def shift(self, rows: Rows) -> Tensor:
        """``J* Sigma g``, ``(..., n, K)``: how far the posterior mean of f lies below the net's outputs."""
        return rows.matmul(self.step).unflatten(-2, rows.batch_shape)

    @abstractmethod
    def covariance_blocks(self, rows: Rows) -> Tensor:
        """Its ``K x K`` blocks, one for each example, ``(..., n, K, K)``; memory for one chunk of examples."""

    @abstractmethod
    def weights(self, mean: Tensor) -> GaussianWeights:
        """``N(mean, Sigma)``."""


class Solver(ABC):
    """Sums over the data, taken once, from which posteriors for any prior and noise follow.

    Args:
        rows: U at the training inputs.
        splitting: v and D; only what does not change with noise and temperature is read here.
        groups: partition of the weights.
        base_variance: ``(P,)`` or None; see :class:`Prior`.
        w: w*, ``(P,)``.
        progress: True, False, or None for a bar on terminals only.
        sums: what :meth:`sums` of an earlier solver for the same arguments gave; spares the pass over the data.
    """

    _names: tuple[str, ...] = ()  # of the sums

    def __init__(
        self,
        rows: Rows,
        splitting: Splitting,
        groups: WeightGroups,
        base_variance: Tensor | None,
        w: Tensor,
        progress: bool | None = None,
        sums: dict[str, Tensor] | None = None,
    ) -> None:
        self.rows = rows
        self.w = w
        self.progress = progress
        if sums is None:
            self._prepare(splitting.unit(), groups, base_variance, progress)
            return
        for name in self._names:
            setattr(self, name, sums[name])

    def sums(self) -> dict[str, Tensor]:
        """What was taken of the data, by name."""
        return {name: getattr(self, name) for name in self._names}

    @abstractmethod
    def _prepare(
        self, unit: Splitting, groups: WeightGroups, base_variance: Tensor | None, progress: bool | None
    ) -> None: ...

    @abstractmethod
    def posterior(self, prior: Prior, splitting: Splitting) -> Posterior:
        """The posterior under this prior and this noise."""


# k_r: inputs (..., n, d), (..., n', d) -> (..., n, n')
ResidualKernel = Callable[[Tensor, Tensor], Tensor]


# ---- weight space


class WeightSpace(Solver):
    """P x P: one pass over the data, then one Cholesky factor for each prior and noise."""

    _names = ("second", "first")

    def _prepare(self, unit, groups, base_variance, progress):
        p = self.rows.num_weights
        num_sums = len(unit.noise_scale)
        tiling.require_memory(
            (num_sums + 3) * p * p,
            self.rows.function.dtype,
            self.w.device,
            f"The weight-space solver's {num_sums + 3} matrices of {p} x {p} weights",
            "Use solver='function_space' (n*K x n*K), solver='iterative', structure='diagonal', or fewer params.",
        )
        self.second, self.first = curvature(self.rows, unit, per_row=num_sums > 1, progress=progress)

    def posterior(self, prior: Prior, splitting: Splitting) -> Posterior:
        first_scale, second_scale = scales_of_sums(splitting)
        second = torch.einsum("c,cpq->pq", second_scale, self.second)
        g = first_scale @ self.first + prior.precision_matmul(self.w)
        a = in_whitened_weights(second, prior.scale)
        a = a + torch.eye(len(a), dtype=a.dtype, device=a.device)
        return WeightSpacePosterior(prior.scale, a, scale_rows(g, prior.scale))


def in_whitened_weights(second: Tensor, scale: Tensor) -> Tensor:
    """``F^T J^T D J F``, symmetric, for ``J^T D J`` ``(P, P)`` and ``S0 = F F^T``."""
    return symmetrize(scale_rows(scale_rows(second, scale).mT, scale))


class WeightSpacePosterior(Posterior):
    """``Sigma = F A^-1 F^T`` with ``A = I + F^T J^T D J F``, ``S0 = F F^T``.

    Args:
        scale: F, its diagonal ``(P,)``, or lower triangular ``(P, P)``.
        a: A, ``(P, P)``.
        gradient: ``F^T g``, ``(P,)``.
    """

    def __init__(self, scale: Tensor, a: Tensor, gradient: Tensor) -> None:
        self.scale, self.gradient = scale, gradient
        self.factor = cholesky(a, "The weight-space matrix I + S^1/2 J^T Lambda J S^1/2")
        self._log_det = log_det(a, self.factor)
        warn_if_inaccurate(a, self.factor, "The weight-space matrix")
        white = torch.linalg.solve_triangular(self.factor, gradient[:, None], upper=False)
        self.newton_decrement = white.square().sum()
        self._step = color(torch.linalg.solve_triangular(self.factor.mT, white, upper=True)[:, 0], self.scale)

    @property
    def step(self) -> Tensor:
        return self._step

    @property
    def log_det(self) -> Tensor:
        return self._log_det

    def _white(self, rows: Tensor) -> Tensor:
        """``L^-1 S^(1/2) J*^T`` for rows ``(q, P)``: ``(P, q)``."""
        return torch.linalg.solve_triangular(self.factor, scale_rows(rows, self.scale).mT, upper=False)

    def _stacked(self, rows: Rows) -> Tensor:
        """The same for each batch element's rows, ``(..., n K, P)``."""
        white = self._white(rows.features().flatten(0, 1)).mT
        return white.reshape(*rows.batch_shape[:-1], -1, rows.num_weights)

    def covariance(self, rows: Rows) -> Tensor:
        white = self._stacked(rows)
        return white @ white.mT

    def cross_covariance(self, rows1: Rows, rows2: Rows) -> Tensor:
        return self._stacked(rows1) @ self._stacked(rows2).mT

    def covariance_blocks(self, rows: Rows) -> Tensor:
        blocks = []
        for _, u in rows.blocks():
            white = self._white(u.flatten(0, 1)).unflatten(1, u.shape[:2])
            blocks.append(torch.einsum("pbk,pbl->bkl", white, white))
        return torch.cat(blocks).unflatten(0, rows.batch_shape)

    def weights(self, mean: Tensor) -> GaussianWeights:
        return WhitenedGaussian(mean, self.scale, self.factor)


# ---- function space


class FunctionSpace(Solver):
    """n m x n m: one Gram matrix for each prior group, then one Cholesky factor for each prior and noise."""

    _names = ("grams", "rows_times_w")

    def _prepare(self, unit, groups, base_variance, progress):
        size = self.rows.num_examples * self.rows.num_rows
        tiling.require_memory(
            (len(groups) + 3) * size**2,
            self.rows.function.dtype,
            self.w.device,
            f"The function-space solver's {len(groups) + 3} matrices of {size} x {size} outputs",
            "Use solver='weight_space' (P x P), solver='iterative', structure='diagonal', or fewer examples.",
        )
        self.rows.keep_for_products(groups.indices, base_variance)
        self.grams = self.rows.gram(groups.indices, base_variance, progress)
        self.rows_times_w = self.rows.matmul(self.w)

    def posterior(self, prior: Prior, splitting: Splitting, residual_kernel: ResidualKernel | None = None) -> Posterior:
        """See the base class; ``residual_kernel`` is added to that of the net, the same for each output."""
        return _FunctionSpacePosterior(self, prior, splitting, residual_kernel)


class _FunctionSpacePosterior(Posterior):
    def __init__(
        self, solver: FunctionSpace, prior: Prior, splitting: Splitting, residual_kernel: ResidualKernel | None
    ) -> None:
        self.rows, self.w, self.prior, self.splitting = solver.rows, solver.w, prior, splitting
        self._residual_kernel = residual_kernel
        self._grams = solver.grams
        v, uw = splitting.v, solver.rows_times_w
        k = self._kernel()
        b = information_matrix(k, splitting)
        self.factor = cholesky(b, "The function-space matrix I + R^T k R")
        self._log_det = log_det(b, self.factor)
        warn_if_inaccurate(b, self.factor, "The function-space matrix", against_identity=True)
        # U S g = k v + U w;   g^T Sigma g = g^T S g - |L^-1 R^T U S g|^2
        h = (k @ v.flatten()).reshape(v.shape) + uw
        white = torch.linalg.solve_triangular(self.factor, self._root_t(h.reshape(1, -1)).mT, upper=False)
        solved = torch.linalg.solve_triangular(self.factor.mT, white, upper=True)
        gsg = (v * (h + uw)).sum() + prior.squared_norm(self.w)
        self.newton_decrement = gsg - white.square().sum()
        # Sigma g = S U^T (v - R B^-1 R^T U S g) + w
        self._dual_step = v - splitting.apply_root(solved.reshape(len(v), -1))
        self._step: Tensor | None = None

    @property
    def step(self) -> Tensor:
        if self._step is None:
            self._step = self.prior.variance * self.rows.rmatmul(self._dual_step) + self.w
        return self._step

    @property
    def log_det(self) -> Tensor:
        return self._log_det

    def _root_t(self, a: Tensor) -> Tensor:
        """``a R`` for ``a`` ``(..., n m)``: R^T applied to each row."""
        n = self.rows.num_examples
        return self.splitting.apply_root_t(a.unflatten(-1, (n, -1))).flatten(-2)

    def _kernel(self) -> Tensor:
        """``k`` at the training inputs, ``(n m, n m)``."""
        k = torch.einsum("g,gij->ij", self.prior.precision.reciprocal(), self._grams)
        return k if self._residual_kernel is None else k + self._residual(self.rows, self.rows)

    def shift(self, rows: Rows) -> Tensor:
        shift = super().shift(rows)
        if self._residual_kernel is None:
            return shift
        added = self._cross_residual(rows) @ self._dual_step.flatten()
        return shift + added.unflatten(-1, (rows.batch_shape[-1], -1))

    def _residual(self, rows1: Rows, rows2: Rows) -> Tensor:
        """``k_r(x1, x2) (x) I_K``, ``(..., n1 K, n2 K)``."""
        k = self._residual_kernel(rows1.flat_inputs(), rows2.flat_inputs())
        if self.rows.num_rows == 1:
            return k
        return torch.kron(k, torch.eye(self.rows.num_rows, dtype=k.dtype, device=k.device))

    def _cross_residual(self, rows: Rows) -> Tensor:
        """The same against the training inputs; new rows keep it, as their mean and covariance both ask for it."""
        if rows is self.rows:
            return self._residual(rows, rows)
        if rows.residual is None or rows.residual[0] is not self:
            rows.residual = self, self._residual(rows, self.rows)
        return rows.residual[1]

    @property
    def _by_layers(self) -> bool:
        """Whether the training rows are too many to be at hand: then products are taken layer by layer."""
        return isinstance(self.rows, Rows) and self.rows.kept is None

    def _white(self, rows: Rows) -> Tensor:
        """``L^-1 R^T k(X, x*)``: ``(n m, N K)``."""
        if self._by_layers:
            cross = rows.flat().covariance(self.rows, self.prior)
        else:
            cross = self.rows.cross(rows.features().flatten(0, 1) * self.prior.variance)
        if self._residual_kernel is not None:
            cross = cross + self._cross_residual(rows).reshape(cross.shape)
        return torch.linalg.solve_triangular(self.factor, self._root_t(cross).mT, upper=False)

    def _stacked(self, rows: Rows) -> Tensor:
        """The transpose of the above for each batch element, ``(..., n K, n m)``."""
        return self._white(rows).mT.reshape(*rows.batch_shape[:-1], -1, len(self.factor))

    def _before(self, rows1: Rows, rows2: Rows | None = None) -> Tensor:
        """``k(x*, x*')`` for each batch element, ``(..., n1 K, n2 K)``."""
        if self._by_layers:
            before = rows1.covariance(rows2, self.prior)
        else:
            u = rows1.batched_features(self.prior.variance)
            before = u @ (u if rows2 is None else rows2.batched_features(self.prior.variance)).mT
        if self._residual_kernel is None:
            return before
        return before + self._residual(rows1, rows1 if rows2 is None else rows2)

    def covariance(self, rows: Rows) -> Tensor:
        before, white = self._before(rows), self._stacked(rows)
        after = before - white @ white.mT
        warn_if_cancelled(before, after, "The posterior covariance")
        return after

    def cross_covariance(self, rows1: Rows, rows2: Rows) -> Tensor:
        return self._before(rows1, rows2) - self._stacked(rows1) @ self._stacked(rows2).mT

    def covariance_blocks(self, rows: Rows) -> Tensor:
        if rows is self.rows:  # no Jacobian is needed for the training inputs' own
            k = self._kernel()
            white = torch.linalg.solve_triangular(self.factor, self._root_t(k).mT, upper=False)
            white = white.unflatten(1, (rows.num_examples, -1))
            return diagonal_blocks(k, rows.num_rows) - torch.einsum("ibk,ibl->bkl", white, white)
        befores, afters = [], []
        # Each part costs the features of the training data once, unless these are kept: parts as large as may be.
        per_example = rows.num_rows * (len(self.factor) if self._by_layers else rows.num_weights)
        for part in tiling.chunks(
            rows.num_examples, tiling.rows_that_fit(4 * per_example, self.rows.function.dtype, rows.x.device)
        ):
            here = rows.flat(part)
            white = self._white(here).unflatten(1, (here.num_examples, here.num_rows))
            before = here.covariance_blocks(self.prior)
            if self._residual_kernel is not None:
                x = here.flat_inputs()[:, None]
                k = self._residual_kernel(x, x)  # (b, 1, 1)
                before = before + k * torch.eye(here.num_rows, dtype=k.dtype, device=k.device)
            befores.append(before)
            afters.append(before - torch.einsum("ibk,ibl->bkl", white, white))
        before, after = torch.cat(befores), torch.cat(afters)
        warn_if_cancelled(before, after, "The posterior covariance")
        return after.unflatten(0, rows.batch_shape)

    def weights(self, mean: Tensor) -> GaussianWeights:
        if self._residual_kernel is not None:
            raise ValueError(
                "With a residual kernel the weights are not all that is unknown: ask the GP for f instead."
            )

        rows_matmul, rows_rmatmul = _whitened(self.rows, self.splitting)

        def solve(u: Tensor) -> Tensor:
            su = self.prior.variance * u
            inner = rows_matmul(su)
            inner = torch.cholesky_solve(inner.reshape(-1, len(self.factor)).mT, self.factor).mT.reshape(inner.shape)
            return su - self.prior.variance * rows_rmatmul(inner)

        return ImplicitGaussian.from_rows(mean, self.prior.variance, rows_matmul, rows_rmatmul, solve, len(self.factor))


# ---- iterative


class Iterative(Solver):
    """Conjugate gradients with products of U, R and their transposes: no matrix of size P or n m, no evidence."""

    def _prepare(self, unit, groups, base_variance, progress):
        pass

    def posterior(self, prior: Prior, splitting: Splitting) -> Posterior:
        return _IterativePosterior(self, prior, splitting)


class _IterativePosterior(Posterior):
    COLUMNS = 32  # right-hand sides that small problems take at once

    @torch.no_grad()
    def __init__(self, solver: Iterative, prior: Prior, splitting: Splitting) -> None:
        self.rows, self.splitting, self.progress = solver.rows, splitting, solver.progress
        self.variance = prior.variance
        self.scale = self.variance.sqrt()
        self._w = solver.w
        self._solution: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def _solved(self) -> tuple[Tensor, Tensor]:
        """``Sigma g`` and ``g^T Sigma g``, when first asked for."""
        if self._solution is None:
            g = self.rows.rmatmul(self.splitting.v) + self._w / self.variance
            step = self._solve(g[None])[0]
            self._solution = step, g @ step
        return self._solution

    @property
    def step(self) -> Tensor:
        return self._solved()[0]

    @property
    def newton_decrement(self) -> Tensor:
        return self._solved()[1]

    @property
    def log_det(self) -> Tensor:
        p, size, item = len(self.scale), self.rows.num_examples * self.rows.num_rows, self.scale.element_size()
        raise MemoryError(
            "The evidence needs the log-determinant of a dense matrix, which solver='iterative' does without: "
            f"{p} x {p} in weight space ({tiling.gigabytes(p * p * item)}), {size} x {size} in function space "
            f"({tiling.gigabytes(size * size * item)}). Use structure='diagonal', fewer params or fewer examples."
        )

    @torch.no_grad()
    def _solve(self, u: Tensor) -> Tensor:
        """``Sigma u`` for ``u`` ``(c, P)``."""

        def matmul(x: Tensor) -> Tensor:
            inner = self.splitting.apply_precision(self.rows.matmul(x * self.scale))
            return self.rows.rmatmul(inner).mul_(self.scale).add_(x)

        return conjugate_gradients(matmul, u * self.scale, "I + S^1/2 J^T Lambda J S^1/2") * self.scale

    def _columns(self, rows: Rows, show: bool) -> Tensor:
        """``J* Sigma J*^T`` by columns over the N examples of ``rows``, as ``(N, K, N, K)``."""
        n, k = rows.num_examples, rows.num_rows
        dtype, device = self.scale.dtype, self.scale.device
        tiling.require_memory(
            2 * (n * k) ** 2, dtype, device, f"The covariance of {n} points x {k} outputs", "Ask for fewer points."
        )
        # A column costs its weights a few times over, and its images at the training points.
        per_column = 6 * len(self.scale) + 4 * self.rows.num_examples * self.rows.num_rows
        blocks = []
        parts = tiling.chunks(n * k, tiling.chunk_length(per_column, dtype, device))
        for part in tiling.progress(parts, "Conjugate gradients", self.progress if show else False):
            unit = torch.zeros(part.stop - part.start, n * k, dtype=dtype, device=device)
            unit[:, part] = torch.eye(len(unit), dtype=dtype, device=device)
            with torch.no_grad():
                solved = self._solve(rows.rmatmul(unit.unflatten(-1, (n, k))))
            blocks.append(rows.matmul(solved))
        columns = torch.cat(blocks).unflatten(0, (n, k))
        # With Z = Sigma J*^T fixed, d(J* Sigma J*^T) = dJ* Z + Z^T dJ*^T: the gradient in x needs no solve.
        transposed = columns.permute(2, 3, 0, 1)
        return columns + transposed - ((columns + transposed) / 2).detach()

    def covariance(self, rows: Rows) -> Tensor:
        lead, (n, k) = rows.batch_shape[:-1], (rows.batch_shape[-1], rows.num_rows)
        covariances = [
            self._columns(rows.flat(slice(start, start + n)), show=True).reshape(n * k, n * k)
            for start in range(0, rows.num_examples, n)
        ]
        return torch.stack(covariances).reshape(*lead, n * k, n * k)

    def cross_covariance(self, rows1: Rows, rows2: Rows) -> Tensor:
        u1, u2 = rows1.batched_features(), rows2.batched_features()
        solved = self._solve(u2.detach().reshape(-1, u2.shape[-1])).reshape(u2.shape)
        # as above: d(J1 Sigma J2^T) = dJ1 Z2 + Z1^T dJ2^T with Z fixed
        out = u1 @ solved.mT
        if u2.requires_grad:
            solved1 = self._solve(u1.detach().reshape(-1, u1.shape[-1])).reshape(u1.shape)
            other = solved1 @ u2.mT
            out = out + other - other.detach()
        return out

    def covariance_blocks(self, rows: Rows) -> Tensor:
        # Several examples of few outputs share the passes over the data; what they have in common is left out.
        parts = tiling.chunks(rows.num_examples, max(1, self.COLUMNS // rows.num_rows))
        blocks = [
            self._columns(rows.flat(part), show=False).diagonal(dim1=0, dim2=2).movedim(-1, 0)
            for part in tiling.progress(parts, "Conjugate gradients, by example", self.progress)
        ]
        return torch.cat(blocks).unflatten(0, rows.batch_shape)

    def weights(self, mean: Tensor) -> GaussianWeights:
        rows_matmul, rows_rmatmul = _whitened(self.rows, self.splitting)

        def solve(u: Tensor) -> Tensor:
            return self._solve(u.reshape(-1, u.shape[-1])).reshape(u.shape)

        num_rows = self.rows.num_examples * self.splitting.v.shape[-1]
        return ImplicitGaussian.from_rows(mean, self.variance, rows_matmul, rows_rmatmul, solve, num_rows)


# ---- diagonal


class Diagonal(Solver):
    """``diag(U^T D U)`` in place of the whole: the paper's practical variant. An approximation of another kind."""

    _names = ("second", "first")

    def _prepare(self, unit, groups, base_variance, progress):
        self.second, self.first = curvature(
            self.rows, unit, diagonal=True, per_row=len(unit.noise_scale) > 1, progress=progress
        )

    def posterior(self, prior: Prior, splitting: Splitting) -> Posterior:
        return DiagonalPosterior(self, prior, splitting)


class DiagonalPosterior(Posterior):
    """``Sigma = diag(variance)``, ``1 / variance = diag(U^T D U) + 1 / S``, ``(P,)``."""

    def __init__(self, solver: Diagonal, prior: Prior, splitting: Splitting) -> None:
        first_scale, second_scale = scales_of_sums(splitting)
        second = second_scale @ solver.second
        self.variance = 1 / (second + 1 / prior.variance)
        self._log_det = torch.log1p(prior.variance * second).sum()
        g = first_scale @ solver.first + solver.w / prior.variance
        self._step = self.variance * g
        self.newton_decrement = g @ self._step

    @property
    def step(self) -> Tensor:
        return self._step

    @property
    def log_det(self) -> Tensor:
        return self._log_det

    def covariance(self, rows: Rows) -> Tensor:
        u = rows.batched_features(self.variance)
        return u @ u.mT

    def cross_covariance(self, rows1: Rows, rows2: Rows) -> Tensor:
        return rows1.batched_features(self.variance) @ rows2.batched_features(self.variance).mT

    def covariance_blocks(self, rows: Rows) -> Tensor:
        blocks = [(u * self.variance) @ u.mT for _, u in rows.blocks()]
        return torch.cat(blocks).unflatten(0, rows.batch_shape)

    def weights(self, mean: Tensor) -> GaussianWeights:
        return DiagonalGaussian(mean, self.variance)


# ---- given


class Given(Solver):
    """A Gaussian over weights that was given, from SWAG or IVON, say: the data are in it, and nothing is solved for.

    Args:
        weights: the Gaussian.
        rows: U at the training inputs, which the evidence alone reads.
    """

    def __init__(self, weights: GaussianWeights, rows: Rows) -> None:
        self.rows, self._weights = rows, weights

    def _prepare(self, unit, groups, base_variance, progress):
        pass

    def posterior(self, prior: Prior, splitting: Splitting) -> Posterior:
        return _GivenPosterior(self._weights, prior, splitting, self.rows)


class _GivenPosterior(Posterior):
    def __init__(self, weights: GaussianWeights, prior: Prior, splitting: Splitting, rows: Rows) -> None:
        self._weights, self._prior, self._splitting, self._rows = weights, prior, splitting, rows
        self._step = torch.zeros_like(weights.mean)
        self.newton_decrement = self._step.sum()

    @property
    def step(self) -> Tensor:
        return self._step

    @property
    def log_det(self) -> Tensor:
        # log|S Sigma^-1| + tr((S^-1 + U^T D U) Sigma) - P: with it the evidence is the linear model's ELBO, a lower
        # bound, and the last terms vanish where Sigma is the posterior
        variance = self._prior.variance
        blocks = self.covariance_blocks(self._rows)
        trace = self._splitting.apply_precision(blocks.movedim(-1, 0)).diagonal(dim1=0, dim2=-1).sum()
        trace = trace + (self._weights.marginal_variance() / variance).sum()
        return variance.log().sum() - self._weights.log_det() + trace - len(variance)

    def covariance(self, rows: Rows) -> Tensor:
        return symmetrize(self.cross_covariance(rows, rows))

    def cross_covariance(self, rows1: Rows, rows2: Rows) -> Tensor:
        return rows1.batched_features() @ self._weights.covariance_matmul(rows2.batched_features()).mT

    def covariance_blocks(self, rows: Rows) -> Tensor:
        blocks = [symmetrize(u @ self._weights.covariance_matmul(u).mT) for _, u in rows.blocks()]
        return torch.cat(blocks).unflatten(0, rows.batch_shape)

    def weights(self, mean: Tensor) -> GaussianWeights:
        return self._weights.at(mean)


# ---- which one


def choose(rows: Rows, num_groups: int, num_sums: int) -> type[Solver]:
    """The cheaper dense side among those that fit in memory, by counting; the iterative solver where neither does."""
    p, size = rows.num_weights, rows.num_examples * rows.num_rows
    dtype, device = rows.function.dtype, rows.x.device
    weight_fits = tiling.fits((num_sums + 3) * p * p, dtype, device)
    function_fits = tiling.fits((num_groups + 3) * size * size, dtype, device)
    weight_cost, function_cost = size * p * p + p**3 / 3, size * size * p + size**3 / 3
    if weight_fits and (weight_cost <= function_cost or not function_fits):
        return WeightSpace
    return FunctionSpace if function_fits else Iterative


def information_matrix(k: Tensor, splitting: Splitting) -> Tensor:
    """``B = I + R^T k R`` for a kernel matrix ``(n m, n m)``."""
    n = len(splitting.f)

    def root_t(a: Tensor) -> Tensor:
        return splitting.apply_root_t(a.unflatten(-1, (n, -1))).flatten(-2)

    b = symmetrize(root_t(root_t(k).mT))
    return b + torch.eye(len(b), dtype=b.dtype, device=b.device)


def _whitened(rows: Rows, splitting: Splitting) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Products with ``E = R^T U`` and with its transpose: ``(..., P) -> (..., n m)`` and back."""

    def matmul(u: Tensor) -> Tensor:
        return splitting.apply_root_t(rows.matmul(u)).flatten(-2)

    def rmatmul(a: Tensor) -> Tensor:
        return rows.rmatmul(splitting.apply_root(a.unflatten(-1, (rows.num_examples, -1))))

    return matmul, rmatmul


def scales_of_sums(splitting: Splitting) -> tuple[Tensor, Tensor]:
    """What the sums of v and of D at unit noise are multiplied by, each ``(C,)``."""
    scale = splitting.noise_scale
    second = scale.square() if splitting.features == "gradient" else scale
    return scale * (splitting.weight * splitting.pull), second * splitting.weight


def log_evidence(
    posterior: Posterior | SpectralPosterior,
    prior: Prior,
    splittings: Sequence[Splitting],
    w: Tensor,
    kind: str = "laplace",
) -> Tensor:
    """Laplace or GP evidence (see the module's formulas) in nats, a scalar, or one for each element of a batch.

    Args:
        posterior, prior, splittings: at one setting of the hyperparameters; one splitting for each part of the data.
        w: w*, ``(P,)``.
        kind: "laplace", or "gp" for the density ``log N(y~; 0, k + Lambda^-1)`` of the dual targets. For a Gaussian
            loss the two differ by half the Newton decrement, and agree at a stationary point.
    """
    common = -0.5 * prior.squared_norm(w) - 0.5 * posterior.log_det
    if kind == "laplace":
        return sum(splitting.data_term() for splitting in splittings) + common
    if kind == "gp":
        return (
            sum(dual.log_normalizer(splitting) for splitting in splittings)
            + common
            + (0.5 * posterior.newton_decrement)
        )
    raise ValueError(f"kind must be 'laplace' or 'gp'; got {kind!r}.")


# ---- one delta and one noise: every evidence from one eigendecomposition


class Spectrum:
    """The evidence as a function of one delta and one scale s of the curvature, at no cost but a sum over eigenvalues.

    With ``S = S_1 / delta``, ``D = s D_1``, ``v = t v_1``, ``E = R_1^T U S_1^(1/2)`` and lambda_j the eigenvalues of
    ``E^T E`` (weight space) or ``E E^T`` (function space):

        log|I + R^T k R| = sum_j log(1 + s lambda_j / delta)
        g^T Sigma g      = q^T (delta + s E^T E)^-1 q,   q = t S_1^(1/2) U^T v_1 + delta S_1^(-1/2) w*

    Args:
        solver: of weight space or function space, with one prior group and one sum.
        splitting: of the data, at any noise.
        prior: at any delta.
        kind: as for :func:`log_evidence`; "gp" needs eigenvectors too.
    """

    @torch.no_grad()
    def __init__(self, solver: WeightSpace | FunctionSpace, splitting: Splitting, prior: Prior, kind: str) -> None:
        unit = splitting.unit()
        base = prior.variance * prior.precision
        if isinstance(solver, WeightSpace):
            root = base.sqrt()
            matrix = symmetrize(root[:, None] * solver.second[0] * root)
        else:
            matrix = information_matrix(solver.grams[0], unit)
            matrix.diagonal().sub_(1)
        if kind == "laplace":
            self.eigenvalues = torch.linalg.eigvalsh(matrix).clamp(min=0)
            return
        eigenvalues, V = torch.linalg.eigh(matrix)
        self.eigenvalues = eigenvalues.clamp(min=0)
        self._dual = isinstance(solver, FunctionSpace)
        if not self._dual:
            self._a, self._b = V.mT @ (root * solver.first[0]), V.mT @ (solver.w / root)
            return
        v, uw = unit.v, solver.rows_times_w
        kv = (solver.grams[0] @ v.flatten()).reshape(v.shape)
        self._a, self._b = (V.mT @ unit.apply_root_t(h).flatten() for h in (kv, uw))  # E a, E b
        self._aa, self._ab, self._bb = (v * kv).sum(), (v * uw).sum(), (solver.w.square() / base).sum()

    def log_det(self, delta: Tensor, s: Tensor) -> Tensor:
        """``log|I + R^T k R|``."""
        return torch.log1p(s / delta * self.eigenvalues).sum()

    def newton_decrement(self, delta: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """``g^T Sigma g``; of kind "gp"."""
        q = t * self._a + delta * self._b
        inner = (q.square() / (delta + s * self.eigenvalues)).sum()
        if not self._dual:
            return inner
        # (delta + s E^T E)^-1 = (I - s E^T (delta + s E E^T)^-1 E) / delta, and here a, b are E a, E b
        squared = t.square() * self._aa + 2 * t * delta * self._ab + delta.square() * self._bb
        return (squared - s * inner) / delta


class SpectralPosterior:
    """What :func:`log_evidence` reads of a posterior, from a :class:`Spectrum`; delta is a scalar."""

    def __init__(self, spectrum: Spectrum, delta: Tensor, splitting: Splitting) -> None:
        self.spectrum, self.delta = spectrum, delta
        self.first_scale, self.second_scale = (scale[0] for scale in scales_of_sums(splitting))

    @property
    def log_det(self) -> Tensor:
        """See :class:`Posterior`."""
        return self.spectrum.log_det(self.delta, self.second_scale)

    @property
    def newton_decrement(self) -> Tensor:
        """See :class:`Posterior`."""
        return self.spectrum.newton_decrement(self.delta, self.second_scale, self.first_scale)


# ---- leave one out


def leave_one_out(posterior: Posterior, rows: Rows, splitting: Splitting, network: bool) -> tuple[Tensor, Tensor]:
    """Each example's outputs without the example itself: mean minus f ``(n, K)``, and covariance ``(n, K, K)``.

    With ``C_i = J_i Sigma J_i^T``, ``Lambda_i = R R^T`` and ``s_i = J_i Sigma g``

        f_i without (x_i, y_i) ~ N( f_i + C'_i r_i - (I - C_i Lambda_i)^-1 s_i,  C'_i )
        C'_i = (I - C_i Lambda_i)^-1 C_i = C_i + C_i R (I - R^T C_i R)^-1 R^T C_i

    exactly, for the linear model: one solve with K x K (m x m) blocks each, and no inverse of Lambda.

    Args:
        posterior: of all the data.
        rows: J at the examples, without cotangents.
        splitting: of these examples.
        network: leave s out, which is zero at a stationary point, as a prediction with the net's own mean does.

    Raises:
        ValueError: for the diagonal structure.
    """
    if isinstance(posterior, DiagonalPosterior):
        raise ValueError(
            "Leaving one example out is not closed for structure='diagonal', which drops what examples share. Use "
            "structure='full', or the Laplace evidence."
        )
    c = posterior.covariance_blocks(rows)  # (n, K, K)

    def root_t(a: Tensor) -> Tensor:  # R^T a for columns (n, K, q): (n, m, q)
        return splitting.output_root_t(a.movedim(-1, 0)).movedim(0, -1)

    rc = root_t(c)
    inner = symmetrize(root_t(rc.mT))
    inner = torch.eye(inner.shape[-1], dtype=c.dtype, device=c.device) - inner
    factor = cholesky(inner, "I - R^T C R of the examples left out")
    white = torch.linalg.solve_triangular(factor, rc, upper=False)
    covariance = c + white.mT @ white
    shift = (covariance @ splitting.output_gradient()[..., None])[..., 0]
    if network:
        return shift, covariance
    # (I - C Lambda)^-1 s = s + C R (I - R^T C R)^-1 R^T s
    s = posterior.shift(rows)[..., None]
    back = white.mT @ torch.linalg.solve_triangular(factor, root_t(s), upper=False)
    return shift - (s + back)[..., 0], covariance
