"""New data in closed form: the same algebra once more, with the posterior in the place of the prior.

With base covariance ``C`` and base shift ``s(x) = J(x) Sigma g`` (solvers.py), added rows at X with gradients v and
``D = R R^T``:

    B      = I + R^T C(X,X) R
    h      = s(X) + C(X,X) v
    shift  s'(x)     = s(x) + C(x,X) (v - R B^-1 R^T h)
    cov    C'(x,x')  = C(x,x') - C(x,X) R B^-1 R^T C(X,x')
    log|I + R^T k R| = base + log|B|

Where there are more added rows than weights, q K > P, and the base is in weight space, so is the result: ``J^T D J``
and ``J^T v`` of the added rows join those of the base.

With ``diag(J^T D J)`` in place of the matrix ("diagonal" structure) the added rows' diagonal is added to it instead.

This is exact for the linear model: the posterior that all data together would have given, at the cost of the added
rows only. Batches: X is ``(b..., q, d)``, labels ``(f..., b..., q)``: covariances have the batch of X, shifts that of
the labels. q added examples, K outputs, P weights.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from .laplace import Splitting, curvature
from .linearize import Rows
from .numerics import cholesky, log_det_from_cholesky, symmetrize
from .solvers import DiagonalPosterior, Posterior, WeightSpacePosterior, in_whitened_weights, scales_of_sums
from .weights import DiagonalGaussian, GaussianWeights, ImplicitGaussian, scale_rows


def condition(base: Posterior, rows: Rows, splitting: Splitting) -> Conditioned:
    """``base`` conditioned on added examples.

    Args:
        base: posterior without them.
        rows: their rows J(X), batch shape ``(b..., q)``.
        splitting: with outputs and labels of the batch shape of the labels, ``(f..., b..., q, K)``.
    """
    if isinstance(base, DiagonalPosterior):
        return ConditionedDiagonal(base, rows, splitting)
    if isinstance(base, WeightSpacePosterior) and _is_plain(rows, splitting):
        if rows.num_examples * rows.num_rows > rows.num_weights:
            return ConditionedWeights(base, rows, splitting)
    return ConditionedPosterior(base, rows, splitting)


def _is_plain(rows: Rows, splitting: Splitting) -> bool:
    """One set of rows and labels, nothing to differentiate in: sums are taken of it once, for any noise."""
    one = splitting.features == "jacobian" and splitting.f.dim() == 2 and len(rows.batch_shape) == 1
    noise = splitting.unit().loss.noise
    given = (rows.x, splitting.f, splitting.y) if noise is None else (rows.x, splitting.f, splitting.y, noise)
    return one and not any(t.requires_grad for t in given)


def _label_free(splitting: Splitting, rows: Rows) -> Splitting:
    """For R alone: unless labels are in it, R has no more batch dimensions than X, so all fantasies share it."""
    if splitting.features == "gradient" or splitting.loss.precision_needs_labels:
        return splitting
    extra = splitting.f.dim() - 1 - len(rows.batch_shape)
    return splitting.at(splitting.f[(0,) * extra])


class Conditioned(Posterior):
    """A posterior that knows what its added rows did."""

    @abstractmethod
    def added_shift(self, rows: Rows) -> Tensor:
        """The part of ``shift`` that is due to the added rows alone, ``(..., n, K)``."""


class ConditionedPosterior(Conditioned):
    """By the formulas above; see :func:`condition`."""

    def __init__(self, base: Posterior, rows: Rows, splitting: Splitting) -> None:
        self.base, self.rows = base, rows
        self._root = _label_free(splitting, rows)
        k = base.covariance(rows)
        b = symmetrize(self._root_t(self._root_t(k).mT))
        b = b + torch.eye(b.shape[-1], dtype=b.dtype, device=b.device)
        self._factor = cholesky(b, "The matrix I + R^T k R of the added rows")
        v = splitting.output_gradient()
        base_shift = base.shift(rows)
        h = base_shift + (k @ v.flatten(-2)[..., None]).reshape(v.shape)
        white = torch.linalg.solve_triangular(self._factor, self._root_t(h.flatten(-2)[..., None, :]).mT, upper=False)
        solved = torch.linalg.solve_triangular(self._factor.mT, white, upper=True)[..., 0]
        # R B^-1 R^T h, in output coordinates
        self._dual = v - self._root.output_root(solved.unflatten(-1, (v.shape[-2], -1)))
        # g'^T Sigma' g' = g^T Sigma g + v^T s(X) + v^T h - |L^-1 R^T h|^2
        self.newton_decrement = (
            base.newton_decrement + (v * (base_shift + h)).sum((-2, -1)) - white.square().sum((-2, -1))
        )

    def _root_t(self, a: Tensor) -> Tensor:
        """``a R`` for ``a`` ``(batch..., c, q K)``."""
        a = a.unflatten(-1, (self.rows.batch_shape[-1], -1))
        missing = self._root.f.dim() - (a.dim() - 1)  # batch dimensions that R has and a does not
        a = a[(None,) * missing].movedim(-3, 0)  # (c, batch..., q, K)
        return self._root.output_root_t(a).movedim(0, -3).flatten(-2)

    def _white(self, rows: Rows) -> Tensor:
        """``L^-1 R^T C(X, x)``, ``(batch..., q m, n K)``."""
        cross = self.base.cross_covariance(rows, self.rows)
        return torch.linalg.solve_triangular(self._factor, self._root_t(cross).mT, upper=False)

    @property
    def log_det(self) -> Tensor:
        return self.base.log_det + log_det_from_cholesky(self._factor)

    def shift(self, rows: Rows) -> Tensor:
        return self.base.shift(rows) + self.added_shift(rows)

    def added_shift(self, rows: Rows) -> Tensor:
        # C(x,X) (v - R B^-1 R^T h)
        moved = self.base.cross_covariance(rows, self.rows) @ self._dual.flatten(-2)[..., None]
        return moved[..., 0].unflatten(-1, (rows.batch_shape[-1], -1))

    def covariance(self, rows: Rows) -> Tensor:
        white = self._white(rows)
        return self.base.covariance(rows) - white.mT @ white

    def cross_covariance(self, rows1: Rows, rows2: Rows) -> Tensor:
        return self.base.cross_covariance(rows1, rows2) - self._white(rows1).mT @ self._white(rows2)

    def covariance_blocks(self, rows: Rows) -> Tensor:
        white = self._white(rows).unflatten(-1, (rows.batch_shape[-1], -1))
        return self.base.covariance_blocks(rows) - torch.einsum("...ink,...inl->...nkl", white, white)

    # ---- in weight space

    @property
    def step(self) -> Tensor:
        self._require_no_batch()
        added = self.rows.rmatmul(self._dual)
        return self.base.step + self.base.weights(torch.zeros_like(added)).covariance_matmul(added)

    def weights(self, mean: Tensor) -> GaussianWeights:
        self._require_no_batch()
        base = self.base.weights(torch.zeros_like(mean))

        def rows_matmul(u: Tensor) -> Tensor:
            return self._root.output_root_t(self.rows.matmul(u)).flatten(-2)

        def rows_rmatmul(a: Tensor) -> Tensor:
            return self.rows.rmatmul(self._root.output_root(a.unflatten(-1, (self.rows.num_examples, -1))))

        def covariance(u: Tensor) -> Tensor:
            su = base.covariance_matmul(u)
            inner = rows_matmul(su)
            solved = torch.cholesky_solve(inner.reshape(-1, len(self._factor)).mT, self._factor).mT
            return su - base.covariance_matmul(rows_rmatmul(solved.reshape(inner.shape)))

        def sample(shape: torch.Size, generator: torch.Generator | None) -> Tensor:
            # Sigma' (Sigma^-1 w + E^T e), w ~ N(0, Sigma), e ~ N(0, I), has covariance Sigma' (Sigma^-1 + E^T E) Sigma'
            noise = torch.randn(*shape, len(self._factor), dtype=mean.dtype, device=mean.device, generator=generator)
            return covariance(base.precision_matmul(base.rsample(shape, generator)) + rows_rmatmul(noise))

        def precision(u: Tensor) -> Tensor:
            return base.precision_matmul(u) + rows_rmatmul(rows_matmul(u))

        return ImplicitGaussian(mean, covariance, precision, sample)

    def _require_no_batch(self) -> None:
        _require_no_batch(self._dual.shape[:-2])


class ConditionedWeights(WeightSpacePosterior, Conditioned):
    """The same in weight space, P x P; see :func:`condition`. Differentiable in delta and sigma."""

    def __init__(self, base: WeightSpacePosterior, rows: Rows, splitting: Splitting) -> None:
        first_scale, second_scale = scales_of_sums(splitting)
        seconds, firsts = curvature(rows, splitting.unit(), per_row=len(first_scale) > 1)
        second, first = torch.einsum("c,cpq->pq", second_scale, seconds), first_scale @ firsts
        a = base.factor @ base.factor.mT + in_whitened_weights(second, base.scale)
        super().__init__(base.scale, a, base.gradient + scale_rows(first, base.scale))
        self._base_step = base.step

    def added_shift(self, rows: Rows) -> Tensor:
        return rows.matmul(self.step - self._base_step).unflatten(-2, rows.batch_shape)


class ConditionedDiagonal(Conditioned):
    """The same for the diagonal structure: ``1 / variance' = 1 / variance + diag(J^T D J)``; see :func:`condition`."""

    def __init__(self, base: DiagonalPosterior, rows: Rows, splitting: Splitting) -> None:
        self.base = base
        u = rows.features().unflatten(0, rows.batch_shape)  # (b..., q, K, P)
        root = _label_free(splitting, rows)
        columns = u[(None,) * (root.f.dim() + 1 - u.dim())].movedim(-1, 0)  # (P, batch..., q, K)
        second = root.output_root_t(columns).square().sum((-2, -1)).movedim(0, -1)  # (batch..., P)
        self.variance = 1 / (1 / base.variance + second)
        g = base.step / base.variance + torch.einsum("...qkp,...qk->...p", u, splitting.output_gradient())
        self._step = self.variance * g
        self._log_det = base.log_det + torch.log1p(base.variance * second).sum(-1)
        self.newton_decrement = (g * self._step).sum(-1)

    @property
    def log_det(self) -> Tensor:
        return self._log_det

    @property
    def step(self) -> Tensor:
        _require_no_batch(self._step.shape[:-1])
        return self._step

    def shift(self, rows: Rows) -> Tensor:
        return self._project(rows, self._step)

    def added_shift(self, rows: Rows) -> Tensor:
        return self._project(rows, self._step - self.base.step)

    def _project(self, rows: Rows, step: Tensor) -> Tensor:
        moved = rows.batched_features() @ step[..., None]
        return moved[..., 0].unflatten(-1, (rows.batch_shape[-1], -1))

    def covariance(self, rows: Rows) -> Tensor:
        return self.cross_covariance(rows, rows)

    def cross_covariance(self, rows1: Rows, rows2: Rows) -> Tensor:
        return (rows1.batched_features() * self.variance[..., None, :]) @ rows2.batched_features().mT

    def covariance_blocks(self, rows: Rows) -> Tensor:
        u = rows.features().unflatten(0, rows.batch_shape)
        return (u * self.variance[..., None, None, :]) @ u.mT

    def weights(self, mean: Tensor) -> GaussianWeights:
        _require_no_batch(self.variance.shape[:-1])
        return DiagonalGaussian(mean, self.variance)


def _require_no_batch(batch_shape: torch.Size) -> None:
    if batch_shape:
        raise ValueError(
            f"The weights of a batch of conditioned GPs, {tuple(batch_shape)}, are not offered; condition on one batch "
            "element at a time."
        )
