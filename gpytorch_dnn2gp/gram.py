"""Gram matrices ``J S0 J'^T`` of a net's Jacobian features.

Rows are example-major, output-minor: entry ``[i K + k, j K + l]``. By chunks of per-example Jacobians, formed block by
block, so that no object of size ``n K P`` is needed. Groups of weights get one Gram each, ``k = sum_g k_g / delta_g``:
a change of prior precision never recomputes a Jacobian.

n examples, m rows per example (K outputs, unless cotangents say otherwise), P weights, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import tiling
from .jacobians import NetFunction


def gram(
    net: NetFunction,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    prior_variance: Tensor | None = None,
    groups: list[Tensor] | None = None,
    cotangents1: Tensor | None = None,
    cotangents2: Tensor | None = None,
    progress: bool | None = None,
) -> Tensor:
    """``C1 J(x1) S0 J(x2)^T C2^T``, ``(n1 m1, n2 m2)``; with ``groups`` one such matrix each, ``(G, n1 m1, n2 m2)``.

    Args:
        net: the net as a function of its weights.
        x1, x2: inputs ``(n, *input_shape)``; ``x2=None`` means ``x1``.
        prior_variance: diagonal of S0, ``(P,)``; ones without it.
        groups: for each group the indices of its weights, a partition of ``range(P)``.
        cotangents1, cotangents2: rows ``C_i``, ``(n, m, K)``, of each side; the identity without them.
        progress: True, False, or None for a bar on terminals only.

    Raises:
        MemoryError: if the result does not fit; names its size.
    """
    symmetric = x2 is None
    if symmetric:
        x2, cotangents2 = x1, cotangents1
    m1, m2 = net.num_rows(x1, cotangents1), net.num_rows(x2, cotangents2)
    num_groups = 1 if groups is None else len(groups)
    tiling.require_memory(
        num_groups * len(x1) * m1 * len(x2) * m2,
        net.dtype,
        x1.device,
        f"The Gram matrix ({num_groups} x {len(x1) * m1} x {len(x2) * m2})",
        "Use fewer examples, or a GP in weight space or with solver='iterative', which do without it.",
    )
    scale = None if prior_variance is None else prior_variance.sqrt()

    def features(x: Tensor, cotangents: Tensor | None, part: slice) -> Tensor:
        rows = net.jacobian(x[part], None if cotangents is None else cotangents[part]).flatten(0, 1)
        return rows if scale is None else rows * scale

    def product(a: Tensor, b: Tensor) -> Tensor:
        if groups is None:
            return a @ b.mT
        return torch.stack([a[:, group] @ b[:, group].mT for group in groups])

    # Each pass over a block of rows of x1 costs the Jacobians of all of x2: hold as many of them as memory allows.
    held = tiling.rows_that_fit(m1 * net.num_weights, net.dtype, x1.device)
    inner = net.jacobian_chunks(x2, m2)
    blocks = []
    for outer in tiling.progress(tiling.chunks(len(x1), held), "Gram matrix", progress):
        a = features(x1, cotangents1, outer)
        if symmetric and len(a) == len(x1) * m1:
            return product(a, a)
        blocks.append(torch.cat([product(a, features(x2, cotangents2, part)) for part in inner], dim=-1))
    return torch.cat(blocks, dim=-2)


def gram_blocks(net: NetFunction, x: Tensor, prior_variance: Tensor | None = None) -> Tensor:
    """The ``K x K`` diagonal blocks ``J_i S0 J_i^T`` of the Gram matrix, ``(n, K, K)``, at the cost of n examples."""
    blocks = []
    for part in net.jacobian_chunks(x, net.num_rows(x)):
        rows = net.jacobian_rows(x, None, part)
        if prior_variance is not None:
            rows = rows * prior_variance.sqrt()
        blocks.append(rows @ rows.mT)
    return torch.cat(blocks)
