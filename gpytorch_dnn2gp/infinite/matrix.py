"""From a recursion and inputs to a covariance matrix.

:func:`covariance` runs the recursion twice (see state.py): each input with itself, then tiles of all pairs, so small
that a tile stays in the processor's cache from the first layer to the last.
"""

from __future__ import annotations

import abc
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import tiling
from .integrals import TOO_LARGE, VarianceOverflow
from .state import Across, Features, Within

# Of one tile: few enough for the processor's cache, many enough for torch's cost per call.
TILE_BYTES = {"cpu": 2**21, "cuda": 2**28}
STEPS = 16  # of a net of layers, about; where there are more, gradients have smaller tiles


class Recursion(abc.ABC):
    """What makes a kernel of pairs of inputs: the layers of a program, the time steps of a recurrent net."""

    @abc.abstractmethod
    def block(self, x: Features) -> Tensor:
        """The kernel of all pairs in ``x``, NNGP or NTK as ``x.run`` says.

        ``(*B, n1, n2)``; or ``(*B, n1, n2, R, R)`` where each input has R rows in the matrix. With ``x.run.within``
        each input stands with itself, ``B' = (*B, n)`` and n1 = n2 = 1, and what the pairs need of each input is kept
        by ``x.run.record``.
        """

    @abc.abstractmethod
    def require_inputs(self, x: Tensor) -> None:
        """Raise a ``ValueError`` that says what is wrong with inputs ``(*B, n, d)``, if anything is."""

    @abc.abstractmethod
    def widest(self, x: Tensor, shape: tuple[int, ...], run: Within) -> int:
        """Entries of the largest tensor that one pair needs; ``x`` is one input, ``(*B, 1, *shape)``."""

    def num_steps(self, shape: tuple[int, ...]) -> int:
        """How many tensors as large as :meth:`widest` follow each other, all of which a gradient keeps; about."""
        return STEPS

    def rows(self, shape: tuple[int, ...]) -> int:
        """R, rows of the matrix for each input of this shape."""
        return 1

    @abc.abstractmethod
    def describe(self) -> str:
        """The same text for the same recursion in another process."""


def covariance(
    recursion: Recursion,
    x1: Tensor,
    x2: Tensor | None,
    hyper: dict[str, Tensor],
    *,
    input_shape: tuple[int, ...] | None = None,
    ntk: str | None = None,
    dropout: bool = False,
    progress: bool | None = None,
) -> Tensor:
    """NNGP or NTK of all pairs, ``(*B, n1, n2)``, or ``(*B, n1 * R, n2 * R)`` with R rows for each input.

    Args:
        recursion: the net.
        x1, x2: inputs ``(*B, n, d)``; ``x2=None`` means ``x1``, and half the work.
        hyper: hyperparameters by name, such as ``weight_variance``, each ``(*B, count)``.
        input_shape: of one input; ``(d,)`` by default.
        ntk: None for the NNGP, else the parameterisation.
        dropout: whether masks are drawn.
        progress: True, False, or None for a bar on terminals only.
    """
    symmetric = x2 is None
    n1, n2 = x1.shape[-2], (x1 if symmetric else x2).shape[-2]
    batch = x1.shape[:-2]
    if n1 * n2 == 0:
        return x1.new_zeros(*batch, n1, n2)
    shape = input_shape or (x1.shape[-1],)
    R = recursion.rows(shape)
    tiling.require_memory(
        batch.numel() * n1 * n2 * R * R,
        x1.dtype,
        x1.device,
        f"The kernel matrix ({' x '.join(map(str, (*batch, n1 * R, n2 * R)))})",
        "Take fewer points at once.",
    )
    options = {"hyper": hyper, "ntk": ntk, "dropout": dropout}
    x1 = x1.unflatten(-1, shape)
    x2 = x1 if symmetric else x2.unflatten(-1, shape)
    sides = (x1,) if symmetric else (x1, x2)
    diagonal, points, area = _within(recursion, sides, shape, options)

    def tile(rows: slice, columns: slice) -> Tensor:
        second = columns if symmetric else slice(n1 + columns.start, n1 + columns.stop)
        run = Across(**options, points=points, rows=rows, columns=second)
        a, b = (u.narrow(len(batch), s.start, s.stop - s.start) for u, s in ((x1, rows), (x2, columns)))
        return _matrix_of(recursion.block(Features(a, b, shape, run)), len(batch))

    pair_bytes = x1.element_size() * area * max(1, batch.numel())
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (*sides, *hyper.values()))
    if recorded:
        pair_bytes *= max(1, recursion.num_steps(shape) // STEPS)
    tiles = _tiles(n1, n2, max(1, TILE_BYTES.get(x1.device.type, 2**28) // pair_bytes), symmetric)
    bar = tiling.progress(tiles, "NNGP" if ntk is None else "NTK", progress)
    places = [(slice(r.start * R, r.stop * R), slice(c.start * R, c.stop * R)) for r, c in tiles]
    if recorded:
        blocks = [_tile_again(tile, *at, len(tiles)) for at in bar]
        return _assembled(blocks, places, diagonal if symmetric else None)
    out = x1.new_empty(*batch, n1 * R, n2 * R)
    for at, (rows, columns) in zip(bar, places):
        block = tile(*at)
        if symmetric and columns.start == rows.start:  # the two halves of its square differ by rounding
            square = block[..., : rows.stop - rows.start]
            square.copy_(square.triu() + square.triu(1).mT)
        out[..., rows, columns] = block
        if symmetric:
            out[..., columns, rows] = block.mT
    if symmetric:
        out.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    return out


def variances(recursion: Recursion, x: Tensor, hyper: dict[str, Tensor], **options) -> Tensor:
    """The diagonal of :func:`covariance`, ``(*B, n)`` or ``(*B, n * R)``, at the cost of n pairs."""
    if x.shape[-2] == 0:
        return x.new_zeros(x.shape[:-1])
    shape = options.pop("input_shape") or (x.shape[-1],)
    return _within(recursion, (x.unflatten(-1, shape),), shape, {"hyper": hyper, **options})[0]


def _within(
    recursion: Recursion, sides: tuple[Tensor, ...], shape: tuple[int, ...], options: dict
) -> tuple[Tensor, dict, int]:
    """Variances of the outputs, what the layers prepared of theirs, and the largest number of entries of one pair.

    All inputs one after another, those of the first side before those of the second.
    """
    x = sides[0]
    axis = x.dim() - len(shape) - 1
    batch = x.shape[:axis]
    widest = recursion.widest(x.narrow(axis, 0, min(1, x.shape[axis])), shape, Within(**options))
    per_input = 8 * max(widest, x.shape[axis + 1 :].numel()) * max(1, batch.numel())
    length = tiling.chunk_length(per_input, x.dtype, x.device)
    diagonals, recorded = [], []
    for piece in (piece for side in sides for piece in side.split(length, axis)):
        run = Within(**options)
        piece = piece.unsqueeze(axis + 1)
        block = _matrix_of(recursion.block(Features(piece, piece, shape, run)), axis + 1)  # (*B, n, R, R)
        diagonals.append(block.diagonal(dim1=-2, dim2=-1).flatten(-2))
        recorded.append(run.recorded)
        if not diagonals[-1].isfinite().all():
            raise VarianceOverflow(f"The variance of an output is beyond {x.dtype}: {TOO_LARGE}")
    points = {}
    for node, (_, prepare, m) in recorded[0].items():
        variance = torch.cat([r[node][0] for r in recorded], -m - 1)
        points[node] = prepare(variance), m
    return torch.cat(diagonals, -1), points, widest


def _matrix_of(block: Tensor, num_batch_axes: int) -> Tensor:
    """``(*B, n1, n2)`` as it is, ``(*B, n1, n2, R, R)`` -> ``(*B, n1 * R, n2 * R)``."""
    if block.dim() == num_batch_axes + 2:
        return block
    return block.transpose(-3, -2).flatten(-2).flatten(-3, -2)


def _tiles(n1: int, n2: int, pairs: int, symmetric: bool) -> list[tuple[slice, slice]]:
    """Slices of rows and columns of at most ``pairs`` pairs each; for a symmetric matrix those of its upper half."""
    tiles, start = [], 0
    while start < n1:
        first = start if symmetric else 0
        height = max(1, min(pairs // max(1, n2 - first), n1 - start))
        rows = slice(start, start + height)
        for part in tiling.chunks(n2 - first, max(1, pairs // height)):
            tiles.append((rows, slice(first + part.start, first + part.stop)))
        start += height
    return tiles


def _tile_again(tile: Callable[[slice, slice], Tensor], rows: slice, columns: slice, num_tiles: int) -> Tensor:
    """A tile whose gradient computes it again, so that no layer of any other tile has to be kept."""
    if num_tiles == 1:
        return tile(rows, columns)
    return checkpoint(tile, rows, columns, use_reentrant=False, preserve_rng_state=False)


def _assembled(blocks: list[Tensor], tiles: list, diagonal: Tensor | None) -> Tensor:
    """One matrix of its tiles, differentiably."""
    rows: dict[int, list[Tensor]] = {}
    for block, (at, columns) in zip(blocks, tiles):
        row = rows.setdefault(at.start, [])
        if not row and columns.start:
            row.append(block.new_zeros(*block.shape[:-1], columns.start))
        row.append(block)
    matrix = torch.cat([torch.cat(row, -1) for row in rows.values()], -2)
    if diagonal is None:
        return matrix
    upper = matrix.triu(1)
    return (upper + upper.mT).diagonal_scatter(diagonal, dim1=-2, dim2=-1)
