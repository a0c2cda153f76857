"""The matrix products of a Gram by the cheapest contraction of each layer, counted by hand and timed alone.

A yardstick that knows nothing of the package. Sizes: n examples, K outputs, T sites, d_in and d_out of one layer, p of
its weights. A layer can be contracted in three orders (multiplications; the Gram is symmetric, so the products of equal
sides are counted and timed for the lower triangle alone):

    Jacobian     n K T p, and (n K)^2 p / 2                       in the one product of the Jacobians of all such layers
    sites        (n T)^2 d_in / 2 + (n K T)^2 d_out / 2           times each other, elementwise, summed over both sites
    applied      (n T)^2 d_in / 2 + n^2 K T^2 d_out + n^2 K^2 T d_out
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from loading import free, wait
from torch import Tensor, nn

TILE = 1024  # rows and columns of one tile of a product


@dataclass
class Gemm:
    """``batch`` products ``(m, k) (k, n)``; of a symmetric one, m = n, the lower triangle of tiles."""

    layer: str
    what: str
    batch: int
    m: int
    n: int
    k: int
    symmetric: bool = False

    @property
    def multiplications(self) -> float:
        return self.batch * self.m * self.n * self.k * (0.5 if self.symmetric else 1.0)


def cheapest(net: nn.Module, x: Tensor) -> list[Gemm]:
    """The products of the symmetric Gram of these examples, by the cheapest order of each layer."""
    n, K = len(x), net(x[:1]).shape[1]
    gemms, inner, alone = [], 0, []
    for name, module, sites in _layers(net, x[:1]):
        size = sum(p.numel() for p in module.parameters(recurse=False))
        if not isinstance(module, nn.Linear | nn.Conv2d):
            inner, alone = inner + size, [*alone, name]
            continue
        d_out = module.weight.shape[0]
        d_in = module.weight[0].numel()
        form = [Gemm(name, "its Jacobian", n, K * d_out, d_in, sites)] if sites > 1 else []
        join = [Gemm(name, "its part of the product of Jacobians", 1, n * K, n * K, size, symmetric=True)]
        inputs = [Gemm(name, "inputs", 1, n * sites, n * sites, d_in, symmetric=True)]
        orders = {
            "Jacobian": form + join,
            "sites": [*inputs, Gemm(name, "cotangents", 1, n * K * sites, n * K * sites, d_out, symmetric=True)],
        }
        if sites > 1:
            orders["applied"] = [
                *inputs,
                Gemm(name, "inputs on cotangents", n, n * sites, K * d_out, sites),
                Gemm(name, "cotangents", n, K, n * K, sites * d_out, symmetric=False),
            ]
        best = min(orders, key=lambda order: sum(gemm.multiplications for gemm in orders[order]))
        if best == "Jacobian":
            gemms, inner, alone = gemms + form, inner + size, [*alone, name]
        else:
            gemms += orders[best]
    if inner:
        gemms.append(Gemm(", ".join(alone), "product of Jacobians", 1, n * K, n * K, inner, symmetric=True))
    return gemms


def _layers(net: nn.Module, x: Tensor) -> list[tuple[str, nn.Module, int]]:
    """Name, module and number of sites of each layer with parameters of its own."""
    found = []

    def see(name):
        return lambda module, _args, z: found.append((name, module, z[0].numel() // module.weight.shape[0]))

    with_weights = [(name, m) for name, m in net.named_modules() if next(m.parameters(recurse=False), None) is not None]
    handles = [module.register_forward_hook(see(name)) for name, module in with_weights]
    try:
        with torch.no_grad():
            net(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


def timed(gemms: list[Gemm], case: dict, dtype: torch.dtype, repeats: int = 5) -> list[dict]:
    """Each with the median of its seconds, or what it would need where it does not fit."""
    rows = []
    for gemm in gemms:
        row = {"layer": gemm.layer, "what": gemm.what, "shape": f"{gemm.m} x {gemm.k} x {gemm.n}"}
        row["shape"] += f", {gemm.batch} times" if gemm.batch > 1 else ""
        row["shape"] += ", lower triangle" if gemm.symmetric else ""
        if (gemm.m + gemm.n) * gemm.k * gemm.batch * dtype.itemsize > 0.8 * free(case):
            rows.append(row)
            continue
        a = torch.randn(gemm.batch, gemm.m, gemm.k, dtype=dtype, device=case["device"])
        b = a.mT if gemm.symmetric else torch.randn(gemm.batch, gemm.k, gemm.n, dtype=dtype, device=case["device"])
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            _multiply(a, b, gemm.symmetric)
            wait(case)
            seconds.append(time.perf_counter() - start)
        row["seconds"] = statistics.median(seconds)
        area = sum((r.stop - r.start) * (c.stop - c.start) for r, c in _tiles(gemm.m, gemm.n, gemm.symmetric))
        row["gigaflops"] = 2e-9 * gemm.batch * area * gemm.k / row["seconds"]
        rows.append(row)
    return rows


def _tiles(num_rows: int, num_columns: int, symmetric: bool) -> Iterator[tuple[slice, slice]]:
    """Tiles of a matrix, or those that its lower triangle needs."""
    for row in range(0, num_rows, TILE):
        for column in range(0, row + 1 if symmetric else num_columns, TILE):
            yield slice(row, min(row + TILE, num_rows)), slice(column, min(column + TILE, num_columns))


def _multiply(a: Tensor, b: Tensor, symmetric: bool) -> None:
    """By tiles, each soon forgotten: what is done with the result is not what is timed."""
    together = max(1, TILE * TILE // (a.shape[1] * b.shape[2]))
    for start in range(0, len(a), together):
        part = slice(start, start + together)
        for rows, columns in _tiles(a.shape[1], b.shape[2], symmetric):
            torch.bmm(a[part, rows], b[part, :, columns])
