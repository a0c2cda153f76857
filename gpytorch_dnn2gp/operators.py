"""Linear operators of a model that is linear in its weights: the Gram of features, alone and with noise.

    Covariance          a dense posterior covariance, with an exact root
    FeatureGram         phi phi^T                  (N, N)
    NoisyFeatureGram    A = phi phi^T + D          (N, N), D block-diagonal with n blocks of K x K, N = n K

A is never formed to be solved with. With ``D = L L^T`` and ``psi = L^-1 phi`` one matrix is factorised, the smaller of

    C = I + psi^T psi  (P x P)          B = I + psi psi^T  (N x N)

    log|A|    = log|C| + log|D| = log|B| + log|D|
    m         = phi^T A^-1 r = C^-1 psi^T u = psi^T B^-1 u,          u = L^-1 r
    A^-1 r    = L^-T (u - psi m),      r^T A^-1 r = |u - psi m|^2 + |m|^2

Both are I + PSD: no jitter, no conjugate gradients, whatever linear_operator's settings are. (Its own operators do this
for a diagonal D alone.) n examples, K outputs, P features; any batch dimensions.
"""

from __future__ import annotations

from functools import cached_property

import torch
from linear_operator import LinearOperator
from linear_operator.operators import (
    BlockDiagLinearOperator,
    BlockInterleavedLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    RootLinearOperator,
    SumLinearOperator,
    ZeroLinearOperator,
)
from linear_operator.utils.getitem import _is_noop_index as is_everything
from linear_operator.utils.memoize import cached
from torch import Tensor

from .numerics import PROMISED_TOLERANCE, cholesky, first_index, log_det_from_cholesky, positive_root, symmetrize


class Covariance(DenseLinearOperator):
    """A dense covariance with an exact root, for samples that have it.

    linear_operator takes the root of a large matrix (``max_cholesky_size``, 800) from 100 steps of Lanczos, and adds
    jitter to a singular one. This one takes the Cholesky factor, or the symmetric root where there is none.
    """

    @cached(name="root_decomposition")
    def root_decomposition(self, method: str | None = None) -> RootLinearOperator:
        """``R`` with ``R R^T`` this matrix, for any ``method``.

        Raises:
            ValueError: eigenvalues are more negative than rounding explains.
        """
        largest = float(self.tensor.detach().diagonal(dim1=-2, dim2=-1).max()) if self.tensor.numel() else 1.0
        tolerance = PROMISED_TOLERANCE * largest  # less is within the accuracy that the matrix itself is promised to
        advice = " Use float64, or solver='weight_space'."
        return RootLinearOperator(positive_root(self.tensor[None], "The covariance", advice, tolerance)[0])

    def __add__(self, other: LinearOperator | Tensor) -> LinearOperator:
        """Noise, block-diagonal or diagonal, keeps it what it is."""
        if isinstance(other, BlockDiagLinearOperator | BlockInterleavedLinearOperator | DiagLinearOperator):
            return Covariance(self.tensor + other.to_dense())
        return super().__add__(other)


class FeatureGram(LinearOperator):
    """``phi phi^T`` that turns into a :class:`NoisyFeatureGram` when block-diagonal noise is added.

    Args:
        root: phi, ``(..., N, P)``.
    """

    def __init__(self, root: Tensor) -> None:
        super().__init__(root)
        self.root = root

    @property
    def _stock(self) -> RootLinearOperator:
        """linear_operator's own, for what has nothing to do with noise. Not a base class: sums with one factorise."""
        return RootLinearOperator(DenseLinearOperator(self.root))

    def _size(self) -> torch.Size:
        return torch.Size((*self.root.shape[:-1], self.root.shape[-2]))

    def _matmul(self, rhs: Tensor) -> Tensor:
        return self.root @ (self.root.mT @ rhs)

    def _transpose_nonbatch(self) -> FeatureGram:
        return self

    def _diagonal(self) -> Tensor:
        return self.root.square().sum(-1)

    def to_dense(self) -> Tensor:
        return self.root @ self.root.mT

    def _expand_batch(self, batch_shape: torch.Size) -> FeatureGram:
        return type(self)(self.root.expand(*batch_shape, *self.root.shape[-2:]))

    def _get_indices(self, row_index, col_index, *batch_indices) -> Tensor:
        return self._stock._get_indices(row_index, col_index, *batch_indices)

    def _getitem(self, row_index, col_index, *batch_indices) -> LinearOperator:
        part = self._stock._getitem(row_index, col_index, *batch_indices)
        return type(self)(part.root.to_dense()) if isinstance(part, RootLinearOperator) else part

    def _mul_constant(self, other: Tensor) -> LinearOperator:
        if not (other > 0).all():
            return super()._mul_constant(other)
        return type(self)(self.root * other.sqrt()[..., None, None])

    def root_decomposition(self, method: str | None = None) -> RootLinearOperator:
        """A root with at most N columns, which is exact, unlike a Cholesky factor of this singular matrix."""
        if self.root.shape[-1] <= self.root.shape[-2]:
            return self._stock
        return RootLinearOperator(torch.linalg.qr(self.root.mT).R.mT)

    def add_diagonal(self, diag: Tensor) -> LinearOperator:
        """``phi phi^T + diag(d)``."""
        return NoisyFeatureGram(self.root, _as_blocks(diag, self.shape, 1))

    def __add__(self, other) -> LinearOperator:
        blocks = _blocks_of(other)
        if blocks is None or self.shape[-1] != blocks.shape[-3] * blocks.shape[-1]:
            return super().__add__(other)
        return NoisyFeatureGram(self.root, blocks)


class NoisyFeatureGram(LinearOperator):
    """``phi phi^T + blockdiag(D_1, ..., D_n)``, solved with by its smaller side.

    Args:
        root: phi, ``(..., n K, P)``, example-major.
        blocks: D, ``(..., n, K, K)``, positive definite.
    """

    def __init__(self, root: Tensor, blocks: Tensor) -> None:
        batch = torch.broadcast_shapes(root.shape[:-2], blocks.shape[:-3])
        root = root if root.shape[:-2] == batch else root.expand(*batch, *root.shape[-2:])
        blocks = blocks if blocks.shape[:-3] == batch else blocks.expand(*batch, *blocks.shape[-3:])
        if root.shape[-2] != blocks.shape[-3] * blocks.shape[-1] or blocks.shape[-1] != blocks.shape[-2]:
            raise ValueError(
                f"blocks {tuple(blocks.shape)} must be (..., n, K, K) for the n K = {root.shape[-2]} rows of features."
            )
        super().__init__(root, blocks)
        self.root, self.blocks = root, blocks

    # ---- the matrix

    @property
    def _stock(self) -> SumLinearOperator:
        return SumLinearOperator(FeatureGram(self.root), BlockDiagLinearOperator(DenseLinearOperator(self.blocks)))

    def _size(self) -> torch.Size:
        return torch.Size((*self.root.shape[:-1], self.root.shape[-2]))

    def _by_example(self, rhs: Tensor) -> Tensor:
        """``(..., n K, C)`` as ``(..., n, K, C)``."""
        return rhs.unflatten(-2, self.blocks.shape[-3:-1])

    def _matmul(self, rhs: Tensor) -> Tensor:
        columns = rhs[:, None] if rhs.dim() == 1 else rhs
        noise = (self.blocks @ self._by_example(columns)).flatten(-3, -2)
        out = self.root @ (self.root.mT @ columns) + noise
        return out[:, 0] if rhs.dim() == 1 else out

    def _transpose_nonbatch(self) -> NoisyFeatureGram:
        return type(self)(self.root, self.blocks.mT)

    def _diagonal(self) -> Tensor:
        return self.root.square().sum(-1) + self.blocks.diagonal(dim1=-2, dim2=-1).flatten(-2)

    def to_dense(self) -> Tensor:
        return self.root @ self.root.mT + _block_diagonal(self.blocks)

    def _expand_batch(self, batch_shape: torch.Size) -> NoisyFeatureGram:
        return type(self)(
            self.root.expand(*batch_shape, *self.root.shape[-2:]),
            self.blocks.expand(*batch_shape, *self.blocks.shape[-3:]),
        )

    def _get_indices(self, row_index, col_index, *batch_indices) -> Tensor:
        return self._stock._get_indices(row_index, col_index, *batch_indices)

    def _getitem(self, row_index, col_index, *batch_indices) -> LinearOperator:
        if is_everything(row_index) and is_everything(col_index):
            return type(self)(self.root[batch_indices], self.blocks[batch_indices]) if batch_indices else self
        return self._stock._getitem(row_index, col_index, *batch_indices)

    def _mul_constant(self, other: Tensor) -> LinearOperator:
        if not (other > 0).all():
            return super()._mul_constant(other)
        return type(self)(self.root * other.sqrt()[..., None, None], self.blocks * other[..., None, None, None])

    def add_diagonal(self, diag: Tensor) -> NoisyFeatureGram:
        """``A + diag(d)``."""
        return type(self)(self.root, self.blocks + _as_blocks(diag, self.shape, self.blocks.shape[-1]))

    def __add__(self, other) -> LinearOperator:
        blocks = _blocks_of(other, self.blocks.shape[-1])
        if blocks is None or blocks.shape[-3:] != self.blocks.shape[-3:]:
            return super().__add__(other)
        return type(self)(self.root, self.blocks + blocks)

    # ---- its inverse

    @property
    def on_features(self) -> bool:
        """Whether the P x P side is the smaller one."""
        return self.root.shape[-1] < self.root.shape[-2]

    @cached_property
    def _noise_factor(self) -> Tensor:
        """L, the Cholesky factors of the blocks, ``(..., n, K, K)``."""
        factor, info = torch.linalg.cholesky_ex(symmetrize(self.blocks))
        if info.any():
            raise ValueError(
                f"The noise covariance at index {first_index(info != 0)} is not positive definite. Lambda^-1 must "
                "exist at each example; where it does not, LaplaceGP works with the root of Lambda instead."
            )
        return factor

    def _whiten(self, rhs: Tensor) -> Tensor:
        """``L^-1 rhs``."""
        rhs = self._by_example(rhs)
        if self.blocks.shape[-1] == 1:
            return (rhs / self._noise_factor).flatten(-3, -2)
        batch = torch.broadcast_shapes(rhs.shape[:-2], self._noise_factor.shape[:-2])
        rhs = rhs.expand(*batch, *rhs.shape[-2:])
        return torch.linalg.solve_triangular(self._noise_factor, rhs, upper=False).flatten(-3, -2)

    def _whiten_t(self, rhs: Tensor) -> Tensor:
        """``L^-T rhs``."""
        rhs = self._by_example(rhs)
        if self.blocks.shape[-1] == 1:
            return (rhs / self._noise_factor).flatten(-3, -2)
        return torch.linalg.solve_triangular(self._noise_factor.mT, rhs, upper=True).flatten(-3, -2)

    @cached_property
    def _white_root(self) -> Tensor:
        """psi, ``(..., N, P)``."""
        return self._whiten(self.root)

    @cached_property
    def _factor(self) -> Tensor:
        """Cholesky factor of C or of B."""
        psi = self._white_root
        gram = psi.mT @ psi if self.on_features else psi @ psi.mT
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        return cholesky(eye + gram, f"I + (features' Gram), {gram.shape[-1]} x {gram.shape[-1]}")

    def _split(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """``u - psi m`` and ``m`` for columns ``rhs`` ``(..., N, C)``."""
        psi, u = self._white_root, self._whiten(rhs)
        if self.on_features:
            m = _cholesky_solve(psi.mT @ u, self._factor)
            return u - psi @ m, m
        rest = _cholesky_solve(u, self._factor)  # u - psi m = B^-1 u
        return rest, psi.mT @ rest

    def weights(self, residual: Tensor) -> Tensor:
        """``m = phi^T A^-1 r``, ``(..., P, C)``, for columns ``(..., N, C)``.

        It is the posterior mean of weights ``w ~ N(0, I)`` given ``r = phi w + e``, ``e ~ N(0, D)``.
        """
        return self._split(residual)[1]

    def conditional_gram(self, root: Tensor) -> Tensor:
        """``phi_* C^-1 phi_*^T``, ``(..., M, M)``: the posterior covariance at features ``(..., M, P)``."""
        if self.on_features:
            white = _solve_lower(self._factor, root.mT)
            return white.mT @ white
        white = _solve_lower(self._factor, self._white_root @ root.mT)
        return root @ root.mT - white.mT @ white

    def _logdet(self) -> Tensor:
        return log_det_from_cholesky(self._factor) + log_det_from_cholesky(self._noise_factor).sum(-1)

    def _solve(self, rhs: Tensor, preconditioner=None, num_tridiag: int | None = 0) -> Tensor:
        return self._whiten_t(self._split(rhs)[0])

    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        """``A^-1 right``, or ``left A^-1 right``."""
        columns = right_tensor[:, None] if right_tensor.dim() == 1 else right_tensor
        if columns.shape[-2] != self.shape[-1]:
            raise RuntimeError(
                f"NoisyFeatureGram {tuple(self.shape)} cannot be solved with columns {tuple(right_tensor.shape)}."
            )
        out = self._solve(columns)
        out = out[..., 0] if right_tensor.dim() == 1 else out
        return out if left_tensor is None else left_tensor @ out

    def inv_quad(self, inv_quad_rhs: Tensor, reduce_inv_quad: bool = True) -> Tensor:
        """``r^T A^-1 r`` of each column, or their sum."""
        columns = inv_quad_rhs[..., None] if inv_quad_rhs.dim() == self.dim() - 1 else inv_quad_rhs
        rest, m = self._split(columns)
        out = rest.square().sum(-2) + m.square().sum(-2)
        return out.sum(-1) if reduce_inv_quad else out

    def inv_quad_logdet(
        self, inv_quad_rhs: Tensor | None = None, logdet: bool | None = False, reduce_inv_quad: bool | None = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """``r^T A^-1 r`` and ``log|A|``, in closed form whatever the settings."""
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        quadratic = zero if inv_quad_rhs is None else self.inv_quad(inv_quad_rhs, reduce_inv_quad)
        return quadratic, self._logdet() if logdet else zero


# ---- blocks


def _blocks_of(other: object, size: int = 1) -> Tensor | None:
    """The diagonal blocks of a (block-)diagonal operator, ``(..., n, K, K)``; None for anything else.

    Args:
        other: what is added.
        size: K for a diagonal operator.
    """
    if isinstance(other, ZeroLinearOperator):
        return None
    if isinstance(other, DiagLinearOperator):
        return torch.diag_embed(other._diagonal().unflatten(-1, (-1, size)))
    if type(other) is BlockDiagLinearOperator:
        return other.base_linear_op.to_dense()
    return None


def _as_blocks(diag: Tensor, shape: torch.Size, size: int) -> Tensor:
    """A diagonal ``()``, ``(..., 1)`` or ``(..., N)`` as blocks ``(..., n, K, K)``."""
    try:
        diag = torch.as_tensor(diag).expand(*torch.broadcast_shapes(diag.shape, (shape[-1],)))
    except RuntimeError:
        raise RuntimeError(f"Cannot add a diagonal of shape {tuple(diag.shape)} to {tuple(shape)}.") from None
    return torch.diag_embed(diag.unflatten(-1, (-1, size)))


def _block_diagonal(blocks: Tensor) -> Tensor:
    """``(..., n, K, K)`` as ``(..., n K, n K)``."""
    n = blocks.shape[-3]
    eye = torch.eye(n, dtype=blocks.dtype, device=blocks.device)
    return torch.einsum("...ikl,ij->...ikjl", blocks, eye).flatten(-2).flatten(-3, -2)


def _cholesky_solve(rhs: Tensor, factor: Tensor) -> Tensor:
    batch = torch.broadcast_shapes(rhs.shape[:-2], factor.shape[:-2])
    return torch.cholesky_solve(
        rhs.expand(*batch, *rhs.shape[-2:]), factor.expand(*batch, *factor.shape[-2:]), upper=False
    )


def _solve_lower(factor: Tensor, rhs: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(factor, rhs, upper=False)
