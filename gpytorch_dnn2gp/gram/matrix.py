"""The Gram matrix ``J S0 J'^T``, tile by tile, in memory or in a file.

Groups of weights get one matrix each, ``k = sum_g k_g / delta_g``: a change of prior precision never recomputes one.

n examples, m rows per example (K outputs, unless cotangents say otherwise), P weights, G groups.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad
from tqdm import tqdm

from .. import tiling
from ..jacobians import NetFunction
from .contract import (
    Features,
    Layer,
    ParameterPrior,
    Prior,
    Use,
    allows_batch,
    cheaper_dense,
    numbers_per_pair,
    product,
)
from .coverage import share_coverage
from .features import features

# The largest intermediate of one tile stays in a processor's own cache; a GPU wants them larger.
TILE_BYTES = {"cpu": 2**21, "cuda": 2**28}
MIN_TILE_ROWS = 200  # smaller matrix products do not use the processor well


@dataclass(frozen=True)
class Side:
    """One side of the product.

    Attributes:
        x: inputs, ``(N, *input_shape)``.
        cotangents: rows ``C_i``, ``(N, m, K)``; None for the identity.
        features: kept from an earlier product, under a prior with the same groups.
    """

    x: Tensor
    cotangents: Tensor | None = None
    features: Features | None = None

    def __len__(self) -> int:
        return len(self.x)

    def num_rows(self, net: NetFunction) -> int:
        """Rows per example, m."""
        return net.num_rows(self.x, self.cotangents)

    def rows(self, net: NetFunction, part: slice) -> Side:
        """Some of the rows of each example."""
        if self.cotangents is not None:
            return Side(self.x, self.cotangents[:, part])
        eye = torch.eye(self.num_rows(net), dtype=net.dtype, device=self.x.device)
        return Side(self.x, eye[part].expand(len(self.x), -1, -1))

    def part(self, part: slice) -> Side:
        """Some of the examples."""
        cotangents = None if self.cotangents is None else self.cotangents[part]
        return Side(self.x[part], cotangents, None if self.features is None else self.features.part(part))


def gram(
    net: NetFunction,
    left: Side,
    right: Side | None = None,
    *,
    prior_variance: Tensor | None = None,
    groups: Sequence[Tensor] | None = None,
    trace: bool = False,
    file: str | os.PathLike | None = None,
    progress: bool | None = None,
) -> Tensor:
    """``C1 J(x1) S0 J(x2)^T C2^T``, ``(n1 m1, n2 m2)``; with ``groups`` one such matrix each, ``(G, n1 m1, n2 m2)``.

    Args:
        net: the net as a function of its weights.
        left, right: the two sides; ``right=None`` means ``left``.
        prior_variance: diagonal of S0, ``(P,)``; ones without it.
        groups: for each group the indices of its weights, a partition of ``range(P)``.
        trace: sum over the rows, ``(n1, n2)``: the trace of each m x m block (m the same on both sides).
        file: a ``.npy`` file to write the matrix to, for one larger than memory; see :class:`tiling.MatrixFile`.
        progress: True, False, or None for a bar on terminals only.

    Raises:
        MemoryError: if the result does not fit; names its size.
    """
    device = left.x.device
    prior = prior_of(net, prior_variance, groups)
    if prior is None:  # groups that divide parameter tensors: by masks, with one variance for each weight
        ones = torch.ones(net.num_weights, dtype=net.dtype, device=device)
        base = ones if prior_variance is None else prior_variance
        masked = [torch.zeros_like(base).index_copy(0, g.to(device), base[g]) for g in groups]
        return torch.stack([gram(net, left, right, prior_variance=v, trace=trace, progress=progress) for v in masked])
    num_groups = 1 if groups is None else len(groups)
    other = left if right is None else right
    m1, m2 = (1, 1) if trace else (left.num_rows(net), other.num_rows(net))
    shape = (num_groups, len(left) * m1, len(other) * m2)
    out_shape = shape if groups is not None else shape[1:]
    assembly = _Assembly(net, left, right, prior, num_groups, trace, progress)
    if file is not None:
        key = _digest(net, left, right, prior_variance, groups, trace)
        return assembly.to_file(tiling.MatrixFile(file, out_shape, net.dtype, key, device))
    if 0 in shape:
        return torch.zeros(out_shape, dtype=net.dtype, device=device)
    tiling.require_memory(
        num_groups * shape[1] * shape[2],
        net.dtype,
        device,
        f"The Gram matrix ({' x '.join(map(str, shape))})",
        "Use fewer examples, write it to a file (gram(..., file='gram.npy')), or use a GP in weight space or with "
        "solver='iterative', which do without it.",
    )
    with torch.set_grad_enabled(assembly.needs_graph):
        out = assembly.with_graph() if assembly.needs_graph else assembly.in_memory(shape)
    return out if groups is not None else out[0]


class _Assembly:
    """Tiles of one Gram matrix."""

    def __init__(
        self,
        net: NetFunction,
        left: Side,
        right: Side | None,
        prior: Prior,
        num_groups: int,
        trace: bool,
        progress: bool | None,
    ) -> None:
        self.net, self.left, self.prior, self.num_groups = net, left, prior, num_groups
        self.symmetric, self.right = right is None, left if right is None else right
        self.progress = progress
        self.trace = trace
        variances = [each.variance for each in prior.values() if each.variance is not None]
        sides = [left.x, left.cotangents, self.right.x, self.right.cotangents]
        self.needs_graph = any(_has_derivative(tensor) for tensor in [*sides, *variances])
        if 0 not in (len(left), len(self.right)):
            share_coverage(net, left.x, self.right.x)

    def features(self, side: Side, like: Features | None = None) -> Features:
        """Of one side, or some of its examples."""
        if side.features is not None:
            return side.features
        kept = [known.features for known in (self.left, self.right) if known.features is not None]
        form = like or (kept[0] if kept else self._form)
        return features(self.net, side.x, side.cotangents, self.prior, form, self.trace)

    def _form(self, layer: Layer) -> set[str]:
        n1, n2 = len(self.left), len(self.right)
        use = Use(
            pairs=n1 * n1 / 2 if self.symmetric else n1 * n2,
            num_examples=n1 if self.symmetric else n1 + n2,
            other_rows=self.right.num_rows(self.net),
            trace=self.trace,
            memory=tiling.numbers_that_fit(self.net.dtype, self.left.x.device) / 4,
            again=not self.needs_graph,
        )
        return cheaper_dense(layer, self.net.sizes_by_name(), self.prior, use)

    def product(self, left: Features, right: Features) -> list[Tensor]:
        """One tile for each group."""
        return product(left, right, self.prior, self.num_groups)

    def in_memory(self, shape: tuple[int, int, int]) -> Tensor:
        """The whole, ``(G, n1 m1, n2 m2)``."""
        out = torch.empty(shape, dtype=self.net.dtype, device=self.left.x.device)
        for rows, columns, tiles in self.tiles():
            for group, tile in enumerate(tiles):
                out[group, rows, columns] = tile
                if self.symmetric and rows != columns:
                    out[group, columns, rows] = tile.mT
        return out

    def with_graph(self) -> Tensor:
        """The same, differentiable."""
        left = self.features(self.left)
        right = left if self.symmetric else self.features(self.right, left)
        return torch.stack(self.product(left, right))

    def to_file(self, file: tiling.MatrixFile) -> Tensor:
        """The same in a file, resumed where an earlier run was interrupted."""
        with torch.no_grad(), tiling.memory_limit(file.free_memory), file:
            for rows, columns, tiles in self.tiles(skip=file.has):
                tile = tiles[0] if len(tiles) == 1 else torch.stack(tiles)
                file.write(rows, columns, tile, mirrored=self.symmetric and rows != columns)
        return file.tensor()

    def tiles(
        self, skip: Callable[[slice, slice], bool] = lambda rows, columns: False
    ) -> Iterator[tuple[slice, slice, list[Tensor]]]:
        """Rows and columns of each tile, and one tile for each group.

        Of a symmetric matrix those on and above the diagonal. Features are held for as many examples as memory allows,
        and formed again for those it does not.
        """
        n1, n2 = len(self.left), len(self.right)
        if n1 == 0 or n2 == 0:
            return
        # Features of one example tell how many fit; of all of them at once, where even Jacobians would.
        most = self.net.num_weights + 2 * self.net.activation_size
        fit = tiling.numbers_that_fit(self.net.dtype, self.left.x.device)
        everything = 2 * (n1 + n2) * max(self.left.num_rows(self.net), self.right.num_rows(self.net)) * most <= fit
        first = self.features(self.left if everything else self.left.part(slice(0, 1)))
        m1 = first.num_rows
        m2 = m1 if self.symmetric or self.trace else self.right.num_rows(self.net)
        # Those of the other side are larger by their rows.
        both = first.num_numbers * (1 + max(1, m2 / max(1, m1)))
        held = n1 + n2 if everything else max(1, int(fit // max(1, both)))
        numbers = TILE_BYTES.get(self.left.x.device.type, 2**28) // tiling.element_size(self.net.dtype)
        tile = max(1, int((numbers / numbers_per_pair(first, m2)) ** 0.5))
        if self.symmetric:  # several tiles, so that those below the diagonal are saved
            tile = min(tile, max(-(-n1 // 6), -(-MIN_TILE_ROWS // m1)))
        held = (held // tile * tile or held) if held < n1 + n2 else n1 + n2
        with self._bar(n1, n2) as bar:
            for outer in tiling.chunks(n1, held):
                left = first if everything else None
                for inner in tiling.chunks(n2, held, outer.start if self.symmetric else 0):
                    same = self.symmetric and inner == outer
                    pairs = self._pairs(outer, inner, tile, same)
                    spans = [
                        (a, b, slice(a.start * m1, a.stop * m1), slice(b.start * m2, b.stop * m2)) for a, b in pairs
                    ]
                    todo = [span for span in spans if not skip(span[2], span[3])]
                    if todo and left is None:
                        left = self.features(self.left.part(outer), first)
                    right = None
                    if todo:
                        right = left if same else self.features(self.right.part(inner), first)
                    for a, b, rows, columns in todo:
                        here = left.part(slice(a.start - outer.start, a.stop - outer.start))
                        there = right.part(slice(b.start - inner.start, b.stop - inner.start))
                        yield rows, columns, self.product(here, there)
                        bar.update((a.stop - a.start) * (b.stop - b.start))
                    bar.update(sum(_area(span) for span in spans) - sum(_area(span) for span in todo))

    @staticmethod
    def _pairs(outer: slice, inner: slice, tile: int, same: bool) -> list[tuple[slice, slice]]:
        """Tiles of one block of the matrix, in examples."""
        rows = tiling.chunks(outer.stop, tile, outer.start)
        columns = tiling.chunks(inner.stop, tile, inner.start)
        return [(a, b) for a in rows for b in columns if not same or b.start >= a.start]

    def _bar(self, n1: int, n2: int) -> tqdm:
        total = n1 * (n1 + 1) // 2 if self.symmetric else n1 * n2
        return tiling.progress(None, "Gram matrix", self.progress, total=total, unit=" pairs", unit_scale=True)


def _area(span: tuple) -> int:
    a, b = span[:2]
    return (a.stop - a.start) * (b.stop - b.start)


def batched_gram(
    net: NetFunction,
    left: Side,
    right: Side | None,
    shape1: torch.Size,
    shape2: torch.Size,
    *,
    prior_variance: Tensor | None = None,
    groups: Sequence[Tensor] | None = None,
    trace: bool = False,
) -> Tensor:
    """As :func:`gram` for each element of a batch, ``(..., n1 m1, n2 m2)``, or ``(G, ..., n1 m1, n2 m2)``.

    ``shape1`` and ``shape2`` are ``(..., n)``: those of the sides' examples; batch dimensions broadcast.
    """
    prior, other = prior_of(net, prior_variance, groups), left if right is None else right
    if prior is None:
        raise ValueError("Batches want groups that are made of whole parameter tensors.")
    num_groups = 1 if groups is None else len(groups)
    batch = torch.broadcast_shapes(shape1[:-1], shape2[:-1])
    m1, m2 = (1, 1) if trace else (left.num_rows(net), other.num_rows(net))
    size = torch.Size((num_groups, *batch, shape1[-1] * m1, shape2[-1] * m2))
    if 0 in (len(left), len(other)):
        return torch.zeros(size if groups is not None else size[1:], dtype=net.dtype, device=left.x.device)
    assembly = _Assembly(net, left, right, prior, num_groups, trace, False)
    tiling.require_memory(
        size.numel(),
        net.dtype,
        left.x.device,
        f"The batch of Gram matrices ({' x '.join(map(str, size))})",
        "Ask for fewer elements of the batch at once.",
    )
    with torch.set_grad_enabled(assembly.needs_graph):
        first = assembly.features(left)
        second = first if right is None else assembly.features(right, first)
        if allows_batch(first, prior):
            a = first.batched(shape1)
            tiles = assembly.product(a, a if right is None else second.batched(shape2))
            return tiles[0] if groups is None else torch.stack(tiles)
        # one by one; an index tells which element of each side is meant, since batch dimensions broadcast
        elements = []
        for shape in (shape1, shape2):
            number = torch.arange(shape[:-1].numel()).reshape(shape[:-1])
            elements.append(
                [slice(i * shape[-1], (i + 1) * shape[-1]) for i in number.expand(batch).flatten().tolist()]
            )
        blocks = [assembly.product(first.part(i), second.part(j)) for i, j in zip(*elements, strict=True)]
        out = torch.stack([torch.stack(tiles) for tiles in blocks], 1).unflatten(1, batch)
        return out[0] if groups is None else out


def form_features(
    net: NetFunction, side: Side, prior_variance: Tensor | None, groups: Sequence[Tensor]
) -> Features | None:
    """The features of one side's Gram with itself, to be kept in it; None if they take much memory."""
    prior = prior_of(net, prior_variance, groups)
    if prior is None or len(side) == 0:
        return None
    assembly = _Assembly(net, side, None, prior, len(groups), False, False)
    with torch.no_grad():
        first = assembly.features(side.part(slice(0, 1)))
        if not tiling.cache_fits(len(side) * first.num_numbers, net.dtype, side.x.device):
            return None
        return assembly.features(side, first)


def prior_of(net: NetFunction, variance: Tensor | None, groups: Sequence[Tensor] | None = None) -> Prior | None:
    """The prior by parameter tensors; None if a group divides one."""
    numbers = torch.zeros(net.num_weights, dtype=torch.long)
    for number, indices in enumerate(groups or []):
        numbers[indices.cpu()] = number
    prior: Prior = {}
    exact = _has_derivative(variance)
    for name, part in zip(net.names, net.slices(), strict=True):
        group = int(numbers[part][:1].sum())  # a tensor may have no weights
        if groups is not None and not bool((numbers[part] == group).all()):
            return None
        here = None if variance is None else variance[part]
        if here is not None and len(here) and not exact and bool((here == here[0]).all()):
            here = here[0]
        prior[name] = ParameterPrior(group, here)
    return prior


def _has_derivative(x: Tensor | None) -> bool:
    """Whether a derivative in ``x`` is being taken, in either mode or by ``torch.func``."""
    if x is None:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return True
    return (x.requires_grad and torch.is_grad_enabled()) or forward_ad.unpack_dual(x).tangent is not None


def _digest(
    net: NetFunction,
    left: Side,
    right: Side | None,
    prior_variance: Tensor | None,
    groups: Sequence[Tensor] | None,
    trace: bool,
) -> str:
    """What a matrix in a file was computed from: net, inputs and prior, by value."""
    hasher = hashlib.sha256(repr((str(net.net), net.names, trace)).encode())
    tensors = [*net.net.parameters(), *net.net.buffers(), left.x, left.cotangents]
    tensors += [] if right is None else [right.x, right.cotangents]
    for tensor in [*tensors, prior_variance, *(groups or [])]:
        hasher.update(repr(None if tensor is None else (tuple(tensor.shape), str(tensor.dtype))).encode())
        if tensor is not None:
            hasher.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()
