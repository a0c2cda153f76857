"""What costs n rather than n^2: diagonal blocks of the Gram matrix, its diagonal, and ``diag(J^T J)``."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import tiling
from ..jacobians import NetFunction
from .contract import (
    Layer,
    Use,
    allows_batch,
    cheaper_dense,
    is_one_product,
    product,
    squares_of_one_product,
)
from .features import feature_chunks
from .matrix import Side, prior_of

ROWS_AT_ONCE = 32  # of an example, where only the diagonal of its block is wanted


def gram_blocks(net: NetFunction, side: Side, prior_variance: Tensor | None = None) -> Tensor:
    """The diagonal blocks ``C_i J_i S0 J_i^T C_i^T`` of the Gram matrix, ``(n, m, m)``, at the cost of n examples."""
    prior, sizes = prior_of(net, prior_variance), net.sizes_by_name()
    blocks = [torch.zeros(0, *2 * (side.num_rows(net),), dtype=net.dtype, device=side.x.device)]
    use = Use(1, 1, memory=tiling.numbers_per_chunk(net.dtype, side.x.device), again=False)

    def form(layer: Layer) -> set[str]:
        return cheaper_dense(layer, sizes, prior, use)

    for _, found in feature_chunks(net, side.x, side.cotangents, prior, form):
        if allows_batch(found, prior):
            each = found.batched(torch.Size((found.num_examples, 1)))  # every example a batch element of its own
            blocks.append(product(each, each, prior)[0])
        else:
            examples = (found.part(slice(i, i + 1)) for i in range(found.num_examples))
            blocks += [product(example, example, prior)[0][None] for example in examples]
    return torch.cat(blocks)


def gram_diagonal(net: NetFunction, side: Side, prior_variance: Tensor | None = None) -> Tensor:
    """The diagonal of the Gram matrix by examples, ``(n, m)``."""
    num_rows = side.num_rows(net)
    if num_rows <= ROWS_AT_ONCE:
        return gram_blocks(net, side, prior_variance).diagonal(dim1=-2, dim2=-1)
    parts = [side.rows(net, part) for part in tiling.chunks(num_rows, ROWS_AT_ONCE)]
    return torch.cat([gram_blocks(net, part, prior_variance).diagonal(dim1=-2, dim2=-1) for part in parts], -1)


def sum_of_squares(net: NetFunction, side: Side, progress: bool | None = None) -> Tensor:
    """``sum_i sum_j (C_i J_i)_jp^2``, ``(P,)``: ``diag(J^T Lambda J)`` for ``C_i = R_i^T`` with ``Lambda = R R^T``.

    For a weight applied once, ``(c_j a^T)^2 = c_j^2 (a^2)^T``, summed over examples by one matrix product.
    """
    options = {"dtype": net.dtype, "device": side.x.device}
    total = {name: torch.zeros(size, **options) for name, size in net.sizes_by_name().items()}
    prior, num_rows = prior_of(net, None), side.num_rows(net)
    at_once = max(1, tiling.numbers_per_chunk(**options) // max(1, 4 * net.num_weights))
    with tiling.progress(None, "Squared Jacobians", progress, total=len(side) * num_rows) as bar:
        for rows in tiling.chunks(num_rows, at_once):
            here = side if at_once >= num_rows else side.rows(net, rows)
            for part, found in feature_chunks(net, here.x, here.cotangents, prior, _several_sites):
                for name, columns in found.columns.items():
                    total[name] += found.dense[..., columns].square().sum((0, 1))
                for layer in found.layers:
                    for name in layer.inputs:
                        total[name] += squares_of_one_product(layer.factor(name))
                bar.update((part.stop - part.start) * (rows.stop - rows.start))
    return torch.cat(list(total.values()))


def _several_sites(layer: Layer) -> set[str]:
    """Parameters whose Jacobian is more than one outer product."""
    return {name for name in layer.inputs if not is_one_product(layer.factor(name))}
