"""Batch normalisation at infinite width: a covariance of whole batches.

    h = W x,  y = (h - mean over the batch) / deviation over the batch,  x <- relu(y),      ``depth`` times
    f = <v, x> / sqrt(n),  v ~ N(0, sigma_v^2)

after Yang (2019; Yang et al. 2019, arXiv:1902.08129), statistics with 1/B, no eps, no scale, no shift. With the inputs'
Gram matrices S1, S2 within two batches of B1 and B2 inputs and X across, centred in each batch, each layer maps

    S <- V(S) = B int_0^inf ds  V_relu(P) / sqrt(det(I + 2s S)),    P = S (I + 2s S)^-1
    X <- V(X) = sqrt(B1 B2)/pi int int ds dt (st)^-1/2  V_relu(P12) / sqrt(det(I + 2 D Sigma))
         Sigma = [S1, X; X^T, S2],  D = diag(s I, t I),  P = Sigma (I + 2 D Sigma)^-1

since y sqrt(B) / |y| divides by a random norm, and 1/|y|^2 = int e^{-s |y|^2} ds. The NTK goes by the same maps:
T <- V(X) + dV(X)[T] at fixed S1 and S2 (docs/notation.md).

Both integrals are done by the trapezoidal rule on a line where the integrand is analytic in a strip and its ends decay
exponentially, so that errors are of the order of rounding (1e-14): in r = log s within a batch, and in u across, where
s = sinh(u)^2 / (2 lambda), lambda the largest eigenvalue of S1, likewise t. Centred matrices are held in a basis of
the B - 1 directions that centring leaves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from gpytorch.constraints import Interval
from gpytorch.priors import Prior
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import tiling
from ..numerics import in_plain_mode, require_finite, require_like
from .hyperparameters import Hyperparameter, HyperparameterKernel, as_tensors, same_inputs
from .integrals import Rectifier, safe_inverse, safe_sqrt

_RELU = Rectifier()
_NEGLIGIBLE = 39.0  # e^-39 = 1e-17
_STEP_WITHIN, _STEP_ACROSS = 0.5, 0.25  # errors e^(-2 pi pi / 0.5) and e^(-2 pi (pi/2) / 0.25), 7e-18


# ---- the two integrals


def within(S: Tensor, T: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """V(S), and dV(S)[T] if there is a tangent ``T``, of one batch, ``(*B, n, n)``, in double precision.

    Raises:
        ValueError: for a batch without variance, or a tangent whose integral diverges.
    """
    n, E = S.shape[-1], _basis(S)
    S, scale = _centred(S, E)
    T = None if T is None else E.mT @ T @ E / scale
    r = torch.arange(-_NEGLIGIBLE, 200, _STEP_WITHIN, dtype=S.dtype, device=S.device)
    r = r[: _count(S, r.exp(), r if T is not None else None)]

    def part(nodes: slice) -> tuple[Tensor, ...]:
        s = torch.exp(r[nodes])[:, None, None]
        P, log_det = _tilted(S.unsqueeze(-3), s)
        weight = n * _STEP_WITHIN * s * torch.exp(-0.5 * log_det)
        full = E @ P @ E.mT
        p = _RELU.points(full.diagonal(dim1=-2, dim2=-1))
        left, right = [a.unsqueeze(-1) for a in p], [a.unsqueeze(-2) for a in p]
        if T is None:
            return ((weight * _RELU.value(left, right, full)).sum(-3),)
        PT = P @ T.unsqueeze(-3)
        PTP = PT @ P
        sides = s**2 * PTP - s * (PT + PT.mT)
        side = ((E @ sides) * E).sum(-1) * safe_inverse(full.diagonal(dim1=-2, dim2=-1))
        value, slope = _RELU.both(left, right, full)
        tangent = slope * (E @ (T.unsqueeze(-3) + sides) @ E.mT)  # T + sides = (I - sP) T (I - sP)
        tangent = tangent + _sine(left, right, full) * (side.unsqueeze(-1) + side.unsqueeze(-2))
        tangent = tangent + 0.5 * s**2 * _trace(PT) * value
        return (weight * value).sum(-3), (weight * tangent).sum(-3)

    sums = _summed(part, len(r), 12 * S.shape[:-2].numel() * n**2, S)
    return tuple(None if A is None else (A + A.mT) / 2 for A in sums)


def across(S1: Tensor, S2: Tensor, X: Tensor, T: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """V(X), and dV(X)[T], of two batches, ``(*B, n1, n2)``; see :func:`within`."""
    n1, n2 = X.shape[-2:]
    E1, E2 = _basis(S1), _basis(S2)
    (S1, scale1), (S2, scale2) = _centred(S1, E1), _centred(S2, E2)
    scale = (scale1 * scale2).sqrt()
    X = E1.mT @ X @ E2 / scale
    T = None if T is None else (E1.mT @ T @ E2 / scale)[..., None, None, :, :]
    (s, weight_s), (t, weight_t) = (_rule(S, T is not None) for S in (S1, S2))  # (*B, N1), (*B, N2)
    weight_s = math.sqrt(n1 * n2) / math.pi * weight_s

    def part(nodes: slice) -> tuple[Tensor, ...]:
        # first by s alone, (*B, N1, ...)
        s_ = s[..., nodes, None, None]
        C11, log_det1, C12 = _tilted(S1.unsqueeze(-3), s_, X.unsqueeze(-3))
        C22 = S2.unsqueeze(-3) - 2 * s_ * X.unsqueeze(-3).mT @ C12
        # then by t, (*B, N1, N2, ...)
        s_, t_ = s_.unsqueeze(-3), t[..., None, :, None, None]
        C11, C12, C22, log_det1 = (C.unsqueeze(-3) for C in (C11, C12, C22, log_det1))
        P22, log_det2, P21 = _tilted((C22 + C22.mT) / 2, t_, C12.mT)
        weight = weight_s[..., nodes, None, None, None] * weight_t[..., None, :, None, None]
        weight = weight * torch.exp(-0.5 * (log_det1 + log_det2))
        full = E1 @ P21.mT @ E2.mT
        variances1 = ((E1 @ C11) * E1).sum(-1) - 2 * t_[..., 0] * ((E1 @ C12) * (E1 @ P21.mT)).sum(-1)
        variances2 = ((E2 @ P22) * E2).sum(-1)
        left = [a.unsqueeze(-1) for a in _RELU.points(variances1.clamp_min(0))]
        right = [a.unsqueeze(-2) for a in _RELU.points(variances2)]
        if T is None:
            return ((weight * _RELU.value(left, right, full)).sum((-4, -3)),)
        # dP = (I - 2PD) dSigma (I - 2PD)^T with dSigma = [0, T; T^T, 0]
        P12, P11 = P21.mT, C11 - 2 * t_ * C12 @ P21
        A, B = T - 2 * s_ * P11 @ T, T - 2 * t_ * T @ P22
        cross = A - 2 * t_ * A @ P22 + 4 * s_ * t_ * P12 @ T.mT @ P12
        side1 = -4 * t_[..., 0] * ((E1 @ A) * (E1 @ P12)).sum(-1) * safe_inverse(variances1.clamp_min(0))
        side2 = -4 * s_[..., 0] * ((E2 @ B.mT) * (E2 @ P21)).sum(-1) * safe_inverse(variances2)
        value, slope = _RELU.both(left, right, full)
        tangent = slope * (E1 @ cross @ E2.mT)
        tangent = tangent + _sine(left, right, full) * (side1.unsqueeze(-1) + side2.unsqueeze(-2))
        tangent = tangent + 4 * s_ * t_ * _trace(P12 @ T.mT) * value
        return (weight * value).sum((-4, -3)), (weight * tangent).sum((-4, -3))

    return _summed(part, s.shape[-1], 12 * X.shape[:-2].numel() * t.shape[-1] * max(n1, n2) ** 2, X)


def _tilted(S: Tensor, s: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """(I + 2s S)^-1 S, log det(I + 2s S) and (I + 2s S)^-1 times the others; S is lifted by what rounding takes."""
    one = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    M = one + 2 * s * (S + 8 * len(one) * torch.finfo(S.dtype).eps * one)
    L = torch.linalg.cholesky(M)
    solved = [torch.cholesky_solve(A.expand(*M.shape[:-2], *A.shape[-2:]), L) for A in (S, *others)]
    log_det = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)[..., None, None]
    return (solved[0] + solved[0].mT) / 2, log_det, *solved[1:]


def _sine(left: Sequence[Tensor], right: Sequence[Tensor], k: Tensor) -> Tensor:
    """What a ReLU has of a dV/da = b dV/db: sqrt(ab - k^2) / 4pi; zero where rounding alone keeps k from sqrt(ab)."""
    ab = (left[0] * right[0]).square()
    gap = ab - k.square()
    return safe_sqrt(torch.where(gap > 8 * torch.finfo(k.dtype).eps * ab, gap, 0)) / (4 * math.pi)


def _trace(A: Tensor) -> Tensor:
    return A.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def _basis(S: Tensor) -> Tensor:
    """Orthonormal, of the directions that centring a batch leaves, ``(n, n - 1)``."""
    n = S.shape[-1]
    j = torch.arange(1, n, dtype=S.dtype, device=S.device)  # column j: 1, ..., 1 (j times), -j, 0, ..., 0
    return (S.new_ones(n, n - 1).triu() - torch.diag(j, -1)[:, : n - 1]) / (j * (j + 1)).sqrt()


def _centred(S: Tensor, E: Tensor) -> tuple[Tensor, Tensor]:
    """E^T S E over its mean eigenvalue, and that, which is a constant for derivatives: V does not depend on scales."""
    S = E.mT @ ((S + S.mT) / 2) @ E
    scale = _trace(S.detach()) / S.shape[-1]
    return S / scale, scale


def _rule(S: Tensor, tangent: bool) -> tuple[Tensor, Tensor]:
    """Nodes s and weights of int_0^inf ds s^-1/2, ``(*B, N)`` each: s = sinh(u)^2 / (2 lambda), even in u."""
    u = torch.arange(0, 100, _STEP_ACROSS, dtype=S.dtype, device=S.device)
    root = (2 * torch.linalg.eigvalsh(S.detach())[..., -1:]).sqrt()
    s = (u.sinh() / root).square()
    n = _count(S, s, 2 * u if tangent else None)
    return s[..., :n], torch.where(u > 0, 2 * _STEP_ACROSS, _STEP_ACROSS)[:n] * u[:n].cosh() / root


def _count(S: Tensor, s: Tensor, growth: Tensor | None) -> int:
    """How many of the nodes ``(*B, N)`` matter: 1/sqrt(det(I + 2s S)), times e^growth for tangents, ends it."""
    eigenvalues = torch.linalg.eigvalsh(S.detach()).clamp_min(0)
    if growth is not None:
        smallest = 100 * torch.finfo(S.dtype).eps * eigenvalues[..., -1:]
        rank = int((eigenvalues > smallest).sum(-1).min())
        if rank < 3:
            raise ValueError(
                f"The NTK of batch normalisation diverges: the inputs of a batch, centred, span {rank} dimensions, "
                "but it takes three, and so four inputs at least. Take larger batches, inputs of more dimensions, or "
                "the NNGP."
            )
    decay = 0.5 * torch.log1p(2 * s.unsqueeze(-1) * eigenvalues.unsqueeze(-2)).sum(-1)
    decay = decay if growth is None else decay - growth
    return int((decay < _NEGLIGIBLE).reshape(-1, s.shape[-1]).any(0).nonzero().max()) + 1


def _summed(part: Callable[[slice], tuple[Tensor, ...]], count: int, size: int, like: Tensor) -> tuple:
    """Sum over all nodes, in chunks, whose gradients compute them again; ``size`` numbers for each node."""
    chunks = tiling.chunks(count, tiling.chunk_length(size, like.dtype, like.device))
    if len(chunks) > 1 and torch.is_grad_enabled():
        part = functools.partial(checkpoint, part, use_reentrant=False, preserve_rng_state=False)
    sums = part(chunks[0])
    for nodes in chunks[1:]:
        sums = tuple(a + b for a, b in zip(sums, part(nodes)))
    return sums if len(sums) == 2 else (sums[0], None)


# ---- the kernel


class BatchNormKernel(HyperparameterKernel):
    """NNGP or NTK of a ReLU MLP with batch normalisation, in train mode: between whole batches, not between points.

    What the net says of an input depends on the batch that it comes in, and so does the covariance of two inputs: on
    the whole of both batches. So the kernel is made for fixed reference batches. Its inputs are these, whole and in
    their order, one after the other: ``kernel(train_x)``, ``kernel(torch.cat([train_x, test_x]))``, as an ``ExactGP``
    asks. Other rows are refused; :meth:`add_batch` makes one more batch known. Within BoTorch, which evaluates
    candidates point by point, such a kernel cannot be used.

    Args:
        depth: number of layers of weights, batch normalisation and ReLU, before the readout.
        batches: the reference batches, ``(B_i, d)`` each, of two inputs or more; for an NTK four, since with three it
            diverges.
        readout_variance: sigma_v^2 of the readout. Other variances, and biases, are lost in the normalisation.
        ntk: whether it is the NTK ("ntk" parameterisation, gradients through the batch's statistics) or the NNGP.
        readout_variance_prior, readout_variance_constraint: a GPyTorch prior; by default positive.
        progress: True, False, or None for a bar on terminals, in long work only.
        batch_shape: of the hyperparameter.
        kwargs: of ``gpytorch.kernels.Kernel``.

    Raises:
        ValueError: for batches that are too small, without variance, or of several sizes or dtypes.

    The matrices are computed in double precision whatever the dtype, with errors of rounding alone; where the inputs of
    a batch, centred, span one dimension, up to 1e-7.
    """

    readout_variance = Hyperparameter("sigma_v^2: the output is <v, x>, v ~ N(0, sigma_v^2 / width).")

    def __init__(
        self,
        depth: int,
        batches: Tensor | Sequence[Tensor],
        readout_variance: float | Tensor = 1.0,
        *,
        ntk: bool = False,
        readout_variance_prior: Prior | None = None,
        readout_variance_constraint: Interval | None = None,
        progress: bool | None = None,
        batch_shape: torch.Size | None = None,
        **kwargs,
    ) -> None:
        super().__init__(batch_shape, **kwargs)
        batches = [batches] if isinstance(batches, Tensor) else list(batches)
        (variance,) = as_tensors(readout_variance, like=batches)
        self._register("readout_variance", variance, 1, readout_variance_constraint, readout_variance_prior)
        self.depth, self.ntk, self.progress = depth, ntk, progress
        self.num_batches = 0
        for batch in batches:
            self.add_batch(batch)
        if not self.num_batches:
            raise ValueError("There are no reference batches; give one at least.")

    def add_batch(self, batch: Tensor) -> None:
        """Make one more reference batch known, ``(B, d)``."""
        if isinstance(batch, Tensor) and self.active_dims is not None:
            batch = batch.index_select(-1, self.active_dims.to(batch.device))
        name = f"reference batch {self.num_batches}"
        if not isinstance(batch, Tensor) or batch.dim() != 2 or not batch.is_floating_point():
            got = f"{batch.dtype} {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
            raise ValueError(f"{name} must be floating-point inputs (B, d); got {got}.")
        if self.num_batches:
            first = self.batches[0]
            require_like(batch, first, name, "reference batch 0")
            if batch.shape[1] != first.shape[1]:
                raise ValueError(f"{name} has {batch.shape[1]} features, but the others {first.shape[1]}.")
        require_finite(batch.detach(), name, "Remove or impute these rows first.")
        least = 4 if self.ntk else 2
        if len(batch) < least:
            why = "the NTK of batch normalisation diverges at three inputs" if self.ntk else "one has no deviation"
            raise ValueError(f"{name} has {len(batch)} inputs, but it takes {least} at least: {why}.")
        if (batch == batch[0]).all():
            raise ValueError(f"{name} has no variance: all its inputs are the same, so it cannot be normalised.")
        self.register_buffer(f"batch_{self.num_batches}", batch.detach().clone())
        self.num_batches += 1

    @property
    def batches(self) -> list[Tensor]:
        """The reference batches."""
        return [getattr(self, f"batch_{i}") for i in range(self.num_batches)]

    # ---- the kernel

    @in_plain_mode
    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **params) -> Tensor:
        """See ``gpytorch.kernels.Kernel.forward``."""
        if last_dim_is_batch:
            raise RuntimeError("BatchNormKernel does not accept last_dim_is_batch: a net reads all dimensions at once.")
        for x in (x1, x2):
            require_like(x, self.batch_0, "x", "the reference batches")
        same = same_inputs(x1, x2)
        recorded = torch.is_grad_enabled() and (x1.requires_grad or x2.requires_grad)
        shared = same or not recorded  # whether equal batches of either side are one
        batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2], self.batch_shape)
        rows = self._split(x1)
        columns = rows if same else self._split(x2)
        chains: dict[tuple[int, int], list] = {}

        def chain(side: int, index: int, a: Tensor) -> list[tuple[Tensor, Tensor | None]]:
            key = (0 if shared else side, index)
            if key not in chains:
                chains[key] = self._within(a)
            return chains[key]

        if diag and same:
            parts = [chain(0, i, a)[-1][self.ntk].diagonal(dim1=-2, dim2=-1) for i, a in rows]
            out = torch.cat([x1.new_zeros(*x1.shape[:-2], 0), *parts], -1)
            return (out * self.readout_variance).to(x1).expand(*batch, -1)
        n1, n2 = x1.shape[-2], x2.shape[-2]
        size = f"The kernel matrix ({' x '.join(map(str, (*batch, n1, n2)))})"
        tiling.require_memory(batch.numel() * n1 * n2, x1.dtype, x1.device, size, "Take fewer batches at once.")
        blocks: dict[tuple[int, int], Tensor] = {}  # of each pair of batches, once
        pairs = {(i, j): (a, b) for i, a in rows for j, b in columns}
        for (i, j), (a, b) in tiling.progress(pairs.items(), "Batches", self.progress, total=len(pairs)):
            if i == j and shared:
                blocks[i, j] = chain(0, i, a)[-1][self.ntk]
            elif shared and (j, i) in blocks:
                blocks[i, j] = blocks[j, i].mT
            else:
                blocks[i, j] = self._across(a, b, chain(1, i, a), chain(2, j, b))[self.ntk]
        empty = x1.new_zeros(*torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2]), n1, n2)
        matrix = [torch.cat([blocks[i, j] for j, _ in columns], -1) for i, _ in rows] if columns else []
        out = torch.cat(matrix, -2) if matrix else empty
        out = (out * self.readout_variance.unsqueeze(-1)).to(x1).expand(*batch, -1, -1)
        return out.diagonal(dim1=-2, dim2=-1) if diag else out

    def _split(self, x: Tensor) -> list[tuple[int, Tensor]]:
        """The reference batches that ``x`` consists of, with their numbers, centred, in double precision."""
        found, start = [], 0
        while start < x.shape[-2]:
            for i, batch in enumerate(self.batches):
                part = x[..., start : start + len(batch), :]
                if part.shape[-2:] == batch.shape and (part == batch).all():
                    part = part.double()
                    found.append((i, part - part.mean(-2, keepdim=True)))
                    break
            else:
                sizes = ", ".join(str(len(batch)) for batch in self.batches)
                raise ValueError(
                    "The covariance of two inputs depends on the whole of both their batches, so this kernel cannot be "
                    f"evaluated point by point, but only at its reference batches (of {sizes} inputs), whole and in "
                    f"their order. In these {x.shape[-2]} rows none begins at row {start}. Pass the batches as they "
                    "were given; kernel.add_batch makes one more known."
                )
            start += len(batch)
        return found

    def _within(self, a: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """K, and T, of one batch, after each layer."""
        K = a @ a.mT / a.shape[-1]
        states = [(K, K if self.ntk else None)]
        for _ in range(self.depth):
            states.append(_after(*within(*states[-1])))
        return states

    def _across(self, a: Tensor, b: Tensor, first: list, second: list) -> tuple[Tensor, Tensor | None]:
        """K, and T, of two batches after the last layer."""
        K = a @ b.mT / a.shape[-1]
        state = K, K if self.ntk else None
        for (K1, _), (K2, _) in zip(first[:-1], second[:-1]):
            state = _after(*across(K1, K2, *state))
        return state

    def extra_repr(self) -> str:
        """Depth and batches."""
        return f"depth={self.depth}, ntk={self.ntk}, batches of {', '.join(str(len(b)) for b in self.batches)} inputs"


def _after(V: Tensor, dV: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """K and T after a layer and the weights that follow."""
    return V, None if dV is None else V + dV
