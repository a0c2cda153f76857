"""Factors, tolerances and input checks. The only home of repairs: each one warns with its size.

Everything the solvers factorise is of the form ``I + (something PSD)``, so a Cholesky factor exists in exact
arithmetic and jitter is the exception.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

# An answer whose relative error may exceed this is announced. It is the tolerance promised for float32.
PROMISED_TOLERANCE = 1e-3
LOG_2PI = math.log(2 * math.pi)


def in_plain_mode(function: Callable) -> Callable:
    """Run ``function`` without autocast and outside inference mode, whatever mode the caller is in.

    Autocast would take the algebra to half precision; tensors made in inference mode could never be differentiated,
    and caches outlive the call that fills them. Within inference mode no gradients are recorded, as the caller expects.
    """

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        inference = torch.is_inference_mode_enabled()
        if not kinds and not inference:
            return function(*args, **kwargs)
        with contextlib.ExitStack() as stack:
            for kind in kinds:
                stack.enter_context(torch.autocast(kind, enabled=False))
            if inference:
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
                args = [_plain(arg) for arg in args]
                kwargs = {name: _plain(arg) for name, arg in kwargs.items()}
            return function(*args, **kwargs)

    return wrapper


def _plain(arg: object) -> object:
    return arg.clone() if isinstance(arg, Tensor) and arg.is_inference() else arg


class NumericalWarning(RuntimeWarning):
    """A result had to be repaired, or may be less accurate than promised."""


def first_index(mask: Tensor) -> int | tuple[int, ...]:
    """Index of the first true entry of ``mask``: a number for one dimension, else a tuple."""
    index = tuple(int(i) for i in mask.nonzero()[0])
    return index[0] if len(index) == 1 else index


def require_finite(tensor: Tensor, name: str, cure: str = "") -> None:
    """Raise a ``ValueError`` that names the first NaN or infinite entry of ``tensor``, and the ``cure``."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    if tensor.sum().isfinite():  # one pass; a sum that overflows is looked at closely
        return
    bad = ~torch.isfinite(tensor)
    if bad.any():
        index = first_index(bad)
        raise ValueError(
            f"{name} has {int(bad.sum())} entries that are NaN or infinite, first {float(tensor[index])} at "
            f"index {index}. {cure}".rstrip()
        )


def require_positive(tensor: Tensor, name: str) -> None:
    """Raise a ``ValueError`` unless every entry is finite and larger than zero."""
    bad = ~((tensor > 0) & torch.isfinite(tensor))
    if bad.any():
        index = first_index(bad)
        at = f" at index {index}" if index != () else ""
        raise ValueError(f"{name} must be positive and finite; got {float(tensor[index])}{at}.")


def require_like(tensor: Tensor, other: Tensor, name: str, other_name: str) -> None:
    """Raise a ``ValueError`` unless ``tensor`` has the dtype and the device of ``other``."""
    if tensor.dtype != other.dtype:
        raise ValueError(
            f"{name} is {tensor.dtype} but {other_name} is {other.dtype}. Convert one of them, "
            f"e.g. {name}.to({other.dtype})."
        )
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device} but {other_name} is on {other.device}. Move one of them.")


def diagonal_blocks(a: Tensor, size: int) -> Tensor:
    """The ``size x size`` diagonal blocks ``(..., n, size, size)`` of ``(..., n size, n size)``."""
    n = a.shape[-1] // size
    return a.unflatten(-1, (n, size)).unflatten(-3, (n, size)).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def symmetrize(a: Tensor) -> Tensor:
    """``(a + a^T)/2``: removes the asymmetry of rounding."""
    return (a + a.mT) / 2


class NotPositiveDefiniteError(ValueError):
    """A matrix that should have a Cholesky factor has none in this precision."""


def cholesky(a: Tensor, name: str) -> Tensor:
    """Lower Cholesky factor of a positive definite ``(..., p, p)``; jitter only if it fails, and then a warning.

    Args:
        a: symmetric matrix, positive definite up to rounding.
        name: what the matrix is, for messages.

    Raises:
        ValueError: if ``a`` is not finite; :class:`NotPositiveDefiniteError` if it is not positive definite even with
            jitter of 1e-4 of its mean diagonal.
    """
    factor, info = torch.linalg.cholesky_ex(a)
    if not info.any():
        return factor
    require_finite(a, name)
    scale = a.diagonal(dim1=-2, dim2=-1).mean(-1).detach()
    relative = 10 * torch.finfo(a.dtype).eps
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    while relative <= 1e-4:
        factor, info = torch.linalg.cholesky_ex(a + relative * scale[..., None, None] * eye)
        if not info.any():
            warnings.warn(
                f"{name} is not positive definite in {a.dtype}: {relative:.0e} of its mean diagonal was added. "
                "Results are accurate to about that much; float64 usually removes the need.",
                NumericalWarning,
                stacklevel=3,
            )
            return factor
        relative *= 10
    raise NotPositiveDefiniteError(
        f"{name} is not positive definite, even with {relative / 10:.0e} of its mean diagonal added. "
        "Use float64, or a larger prior precision."
    )


@torch.no_grad()
def warn_if_inaccurate(a: Tensor, factor: Tensor, name: str, steps: int = 8, against_identity: bool = False) -> None:
    """Warn when solves with ``a = factor factor^T`` cannot keep ``PROMISED_TOLERANCE`` in its dtype.

    The relative error of a solve is about ``eps * cond(a)``; the condition number is estimated from below by power
    iterations on ``a`` and on its inverse, which is sharp enough for a warning and costs a few products.

    Args:
        a: I + PSD.
        factor: its Cholesky factor.
        name: what the matrix is, for the warning.
        steps: of the power iterations.
        against_identity: the solution is subtracted from something as large as ``a`` times it, so the error is
            ``eps * |a|``, four times that by experience, however well ``a`` is conditioned.
    """
    unit_roundoff = torch.finfo(a.dtype).eps / 2
    # A cheap upper bound first: cond <= ||a||_F as the smallest eigenvalue of I + PSD is at least one.
    if 4 * unit_roundoff * float(torch.linalg.matrix_norm(a).max()) < PROMISED_TOLERANCE:
        return
    n = a.shape[-1]
    v = torch.cos(torch.arange(n, dtype=a.dtype, device=a.device))[:, None].expand(*a.shape[:-2], n, 1)
    u = v
    largest = smallest = torch.ones(a.shape[:-2], dtype=a.dtype, device=a.device)
    for _ in range(steps):
        v = a @ (v / v.norm(dim=-2, keepdim=True))
        u = torch.cholesky_solve(u / u.norm(dim=-2, keepdim=True), factor)
        largest, smallest = v.norm(dim=(-2, -1)), u.norm(dim=(-2, -1)).reciprocal()
    condition = float((largest if against_identity else largest / smallest).max())
    error = (4 if against_identity else 1) * unit_roundoff * condition
    if error >= PROMISED_TOLERANCE:
        what = "largest eigenvalue" if against_identity else "condition number"
        warnings.warn(
            f"{name} has {what} {condition:.1e}: in {a.dtype} results may be off by {min(error, 1.0):.0e} relative. "
            "Use float64 (net.double() on a copy, data.double()), or a larger prior precision or noise.",
            NumericalWarning,
            stacklevel=4,
        )


def log_det_from_cholesky(factor: Tensor) -> Tensor:
    """``log|a|`` of ``a = factor factor^T``."""
    return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def log_det(a: Tensor, factor: Tensor) -> Tensor:
    """``log|a|`` of ``a = factor factor^T``, whose gradient in ``a`` is the inverse, from the factor at hand.

    A third of the work of going back through the factorisation.
    """
    return _LogDet.apply(a, factor)


class _LogDet(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, factor: Tensor) -> Tensor:
        return log_det_from_cholesky(factor)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors  # with its graph, for second derivatives
        return grad[..., None, None] * torch.cholesky_inverse(factor), None


@torch.no_grad()
def warn_if_cancelled(before: Tensor, after: Tensor, name: str) -> None:
    """Warn when ``after = before - something`` is so much smaller than ``before`` that rounding shows in it."""
    if after.numel() == 0:
        return
    largest_before = float(before.diagonal(dim1=-2, dim2=-1).max())
    largest_after = float(after.diagonal(dim1=-2, dim2=-1).max())
    error = torch.finfo(after.dtype).eps * largest_before / max(largest_after, torch.finfo(after.dtype).tiny)
    if largest_before > 0 and error >= PROMISED_TOLERANCE:
        warnings.warn(
            f"{name} ({largest_after:.1e}) is what is left of the prior's ({largest_before:.1e}): in {after.dtype} it "
            f"may be off by {min(error, 1.0):.0e} relative. Use float64 (net.double() on a copy, data.double()), or "
            "solver='weight_space'.",
            NumericalWarning,
            stacklevel=4,
        )


@torch.no_grad()
def conjugate_gradients(
    matmul: Callable[[Tensor], Tensor], b: Tensor, name: str, tolerance: float | None = None, max_iterations: int = 2000
) -> Tensor:
    """Solve ``A z = b``, ``A = I + PSD``, for many right-hand sides at once, given products with A.

    It stops at ``|b - A z| <= tolerance |z|``, which bounds the relative error of z, as no eigenvalue of A is below
    one. (A residual small against ``|b|`` says little: ``|b|`` may be as large as the largest eigenvalue times
    ``|z|``.) Of our own, since linear_operator's counts inner products below 1e-10 as zero and so stalls, and takes
    ten steps at least; this one also needs no copy in the other memory order.

    Args:
        matmul: ``(c, p) -> (c, p)``, the product of A with each row.
        b: ``(c, p)``.
        name: what A is, for warnings.
        tolerance: relative error of every row; by default 1e-4 in float32, 1e-10 in float64.
        max_iterations: after which a :class:`NumericalWarning` tells the error. One also tells of an A so large that
            rounding in its products exceeds what is promised.
    """
    if tolerance is None:
        tolerance = 1e-4 if b.dtype == torch.float32 else 1e-10
    size = b.norm(dim=-1, keepdim=True)
    residual = torch.where(size > 0, b / size, 0)  # squares of large numbers overflow in float32
    z, direction = torch.zeros_like(b), residual.clone()
    squared = residual.square().sum(-1, keepdim=True)
    largest = 1.0  # eigenvalue of A, from below
    for _ in range(max_iterations):
        if (squared <= tolerance**2 * z.square().sum(-1, keepdim=True)).all():
            break
        image = matmul(direction)
        # a row whose residual is zero stays where it is
        length = torch.where(squared > 0, squared / (direction * image).sum(-1, keepdim=True), 0)
        largest = max(largest, float((image.norm(dim=-1) / direction.norm(dim=-1)).nan_to_num(nan=0.0).max()))
        z.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1)
        previous, squared = squared, residual.square().sum(-1, keepdim=True)
        direction.mul_(torch.where(previous > 0, squared / previous, 0)).add_(residual)
    error = float(torch.where(squared > 0, squared / z.square().sum(-1, keepdim=True), 0).max().sqrt())
    rounding = torch.finfo(b.dtype).eps * largest
    if not error <= tolerance or not rounding < PROMISED_TOLERANCE:
        warnings.warn(
            f"Conjugate gradients with {name}, whose largest eigenvalue is at least {largest:.1e}, may be off by "
            f"{min(max(error, rounding), 1.0):.0e} relative in {b.dtype}. Use a dense solver, float64, or a larger "
            "prior precision or noise.",
            NumericalWarning,
            stacklevel=4,
        )
    return z * size


def positive_root(a: Tensor, name: str, cure: str = "", tolerance: float | None = None) -> Tensor:
    """Root ``R R^T = a`` of ``(..., n, K, K)``: the Cholesky factor of each if it has one, else the symmetric root.

    Eigenvalues between ``-tolerance`` and zero are rounding and count as zero; smaller ones are an error. Where ``a``
    is singular it has first derivatives alone, along changes that keep it positive semidefinite.

    Args:
        a: symmetric positive semidefinite.
        name, cure: what it is and what to do, for the error.
        tolerance: ``None`` takes 100 K units of rounding of the largest eigenvalue, or of one if that is larger.
    """
    bad = ~torch.isfinite(a).flatten(-2).all(-1)
    if bad.any():
        raise ValueError(f"{name} is not finite for example {first_index(bad)}.")
    root, failed = torch.linalg.cholesky_ex(a)
    failed = failed > 0
    if not failed.any():
        return root
    singular = a[failed]
    eigenvalues, V = torch.linalg.eigh(singular.detach())
    smallest = eigenvalues[:, 0]
    if tolerance is None:
        largest = a.detach().diagonal(dim1=-2, dim2=-1).abs().max().item()
        tolerance = 100 * a.shape[-1] * torch.finfo(a.dtype).eps * max(1.0, largest)
    bad = smallest < -tolerance
    if bad.any():
        index = failed.nonzero()[bad][0].tolist()
        raise ValueError(
            f"{name} is not positive semidefinite for {int(bad.sum())} of {failed.numel()} examples, first for example "
            f"{index[0] if len(index) == 1 else tuple(index)}: its smallest eigenvalue is "
            f"{smallest[bad][0].item():.6g}.{cure}"
        )
    sigma = eigenvalues.clamp(min=0).sqrt()
    # R^2 = a, so dR R + R dR = da: in the basis of eigenvectors dR_ij = da_ij / (sigma_i + sigma_j)
    sums = sigma.unsqueeze(-1) + sigma.unsqueeze(-2)
    change = V.mT @ (singular - singular.detach()) @ V
    change = torch.where(sums > 0, change / torch.where(sums > 0, sums, 1.0), 0.0)
    symmetric = V @ (torch.diag_embed(sigma) + change) @ V.mT
    # A failed factor has no derivative, not even one that is then multiplied by zero.
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    root = torch.linalg.cholesky(torch.where(failed[..., None, None], eye, a))
    return root.index_put(failed.nonzero(as_tuple=True), symmetric)
