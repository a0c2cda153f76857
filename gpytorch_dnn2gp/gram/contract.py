"""Products of Jacobian features, layer by layer, in the order of contraction that costs least.

A layer ``z_t = W a_t + b`` at T sites has Jacobian rows ``sum_t c_t a_t^T`` (``rules.py``), and for two examples, with
the sums over sites t, t' of one and the other,

    k = sum_tt' (v_w a_t . a'_t' + v_b) (c_t . c'_t')              one variance v for all of W, one for b

    name        order                                              multiplications for each pair of examples
    "sites"     both Grams over sites, then their product          T T' (d_in + m m' d_out)
    "apply"     M_tt' = a_t . a'_t', then H = M c', then c H        T T' (d_in + m' d_out) + m m' T d_out
    "dense"     the layer's own Jacobian, then one product          m m' d_in d_out        (+ n m T d_in d_out once)
    "outputs"   one variance for each weight (VOGN): a Gram         T T' d_out (d_in + m m')
                over inputs for each output unit

For T = 1 the first is ``(A A'^T + 1) o (G G'^T)``, n x n spread over nm x nm: no factor P anywhere.

n examples, m rows for each, T sites, d_in inputs and d_out outputs of the layer. Leading batch dimensions are allowed
for one site and variances that are numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .rules import Outer

# What one number costs that is read, multiplied and written, in multiplications of a matrix product.
ELEMENTWISE = 25
# A net's passes that give a layer its Jacobian, in times what the layer's own part of one costs.
PASSES = 10
BLOCK_NUMBERS = 4 * 2**20  # intermediate products are this large: they stay in the processor's caches


@dataclass(frozen=True)
class ParameterPrior:
    """The prior of one parameter tensor.

    Attributes:
        group: number of its Gram.
        variance: a number ``()``, or one for each weight, ``(p,)``; None for one.
    """

    group: int
    variance: Tensor | None = None

    @property
    def per_weight(self) -> bool:
        """Whether each weight has a variance of its own."""
        return self.variance is not None and self.variance.dim() > 0


Prior = dict[str, ParameterPrior]  # by parameter, in the order of the weight vector


@dataclass(frozen=True)
class Layer:
    """Weights of one layer whose Jacobians share cotangents.

    Attributes:
        c: ``(..., n, m, T, d_out)``.
        inputs: for each parameter its ``a`` and whether it is transposed; see :class:`Outer`.
        repeats: how many rows have been made into further outputs (:meth:`trace`).
    """

    c: Tensor
    inputs: dict[str, tuple[Tensor | None, bool]]
    repeats: int = 1

    @property
    def num_sites(self) -> int:
        return self.c.shape[-2]

    def map(self, change: Callable[[Tensor], Tensor]) -> Layer:
        """``change`` applied to all tensors."""
        inputs = {name: (None if a is None else change(a), flip) for name, (a, flip) in self.inputs.items()}
        return Layer(change(self.c), inputs, self.repeats)

    def without(self, names: Collection[str]) -> Layer | None:
        """The other parameters; None if none is left."""
        inputs = {name: value for name, value in self.inputs.items() if name not in names}
        return replace(self, inputs=inputs) if inputs else None

    def trace(self) -> Layer:
        """With the m rows as further outputs of one row: its product is the sum over rows of the K x K blocks."""
        return replace(self, c=self.c.transpose(-3, -2).flatten(-2).unsqueeze(-3), repeats=self.c.shape[-3])

    def factor(self, name: str) -> Outer:
        """What the rule gave for one parameter."""
        a, transposed = self.inputs[name]
        return Outer(a, self.c, transposed)


def dense(factor: Outer | Tensor, size: int) -> Tensor:
    """The Jacobian of one parameter with ``size`` weights, ``(n, m, p)``."""
    if isinstance(factor, Tensor):
        return factor.flatten(2)
    a, c = factor.a, factor.c
    if a is None:
        return c.sum(-2)
    if not a.is_floating_point():  # rows of the embedding by token
        n, m, t, d = c.shape
        out = c.new_zeros(n, m, size // d, d)
        return out.scatter_add(2, a[:, None, :, None].expand(n, m, t, d), c).flatten(2)
    a, c = (c, a) if factor.transposed else (a, c)
    # one product for each example: (m d_out x T) (T x d_in)
    if factor.transposed:
        n, m, t, d = a.shape
        out = torch.bmm(c.mT, a.transpose(1, 2).reshape(n, t, m * d))  # (n, d_in, m d_out)
        return out.unflatten(-1, (m, d)).transpose(1, 2).flatten(2)
    n, m, t, d = c.shape
    out = torch.bmm(c.transpose(2, 3).reshape(n, m * d, t), a)
    return out.reshape(n, m, d * a.shape[-1])


def is_one_product(factor: Outer | Tensor) -> bool:
    """Whether the rows of each example are ``c_j a^T``, for a single vector a."""
    a = factor.a if isinstance(factor, Outer) else None
    return a is not None and a.is_floating_point() and a.shape[1] == 1


def squares_of_one_product(factor: Outer) -> Tensor:
    """``sum_ij`` of the squares of such rows, ``(p,)``: ``(c a^T)^2 = c^2 (a^2)^T``, one product for all examples."""
    square = factor.c.square().sum((1, 2)).mT @ factor.a[:, 0].square()
    return (square.mT if factor.transposed else square).flatten()


# ---- which order


@dataclass(frozen=True)
class Use:
    """What features are for: what the cheapest form depends on, besides the net.

    Attributes:
        pairs: of examples that will be multiplied.
        num_examples: whose features are formed, those of both sides together.
        other_rows: m' of the other side; None for the same as this side's.
        trace: whether the sum over rows is all that is wanted: features then have one row.
        memory: how many numbers one parameter's Jacobian may have at a time: a larger one is formed again and again.
        again: whether it can be; else a larger one is not formed where there is another way.
    """

    pairs: float
    num_examples: int
    other_rows: int | None = None
    trace: bool = False
    memory: float = math.inf
    again: bool = True


def cheaper_dense(layer: Layer, sizes: dict[str, int], prior: Prior, use: Use) -> set[str]:
    """Those parameters of a layer whose own Jacobian is the cheaper way, by counting multiplications.

    Args:
        layer: of one side, as it would be used.
        sizes: p of each parameter.
        prior: of each parameter.
        use: what the product is for.
    """
    m, t, d_out = layer.c.shape[-3:]
    m2 = m if use.trace or use.other_rows is None else use.other_rows
    several_groups = len({prior[name].group for name in layer.inputs}) > 1
    # A bias shares its layer's products, unless these are of weights with other variances or sums over sites.
    alone = {
        name
        for name, (a, _) in layer.inputs.items()
        if a is None and (prior[name].per_weight or len(layer.inputs) == 1 or (several_groups and t > 1))
    }
    structured = explicit = 0.0
    for name, (a, _) in layer.inputs.items():
        if name in alone:
            continue
        size = layer.repeats * sizes[name]
        explicit += (use.pairs * m * m2 + use.num_examples * m * t) * size
        parts = use.num_examples * m * size / use.memory  # of the examples, whose Jacobians are held at a time
        if parts > 1:
            explicit += parts * PASSES * use.num_examples * m * t * size
            if not use.again or parts > use.num_examples:
                explicit = math.inf
        if a is None:
            continue
        d_in = _width(a)
        if prior[name].per_weight and a.is_floating_point():
            structured += use.pairs * t * t * d_out * (d_in + m * m2 + ELEMENTWISE * min(m, m2))
        else:
            structured += use.pairs * min(_sites_cost(m, m2, t, t, d_in, d_out), _apply_cost(m, m2, t, t, d_in, d_out))
    return alone | (set(layer.inputs) if explicit < structured else set())


def _sites_cost(m1: int, m2: int, t1: int, t2: int, d_in: int, d_out: int) -> float:
    return t1 * t2 * (d_in + m1 * m2 * (d_out + ELEMENTWISE))


def _apply_cost(m1: int, m2: int, t1: int, t2: int, d_in: int, d_out: int) -> float:
    return t1 * t2 * (d_in + m2 * d_out) + m1 * m2 * t1 * d_out + ELEMENTWISE * t1 * m2 * d_out


@dataclass(frozen=True)
class Features:
    """The rows ``C_i J_i`` of some examples, in the form that makes their products cheap.

    Parameters whose explicit Jacobian is cheapest (or that no rule covers) are columns of one dense matrix and share
    one matrix product; the others stay as layers.

    Attributes:
        num_examples, num_rows: n and m.
        dense: ``(..., n, m, columns)``, or None.
        columns: for each dense parameter its slice of the columns, those of one prior group together.
        layers: all other parameters.
        repeats: how many rows have been made into further columns (:meth:`Layer.trace`).
    """

    num_examples: int
    num_rows: int
    dense: Tensor | None
    columns: dict[str, slice]
    layers: tuple[Layer, ...]
    repeats: int = 1

    def part(self, part: slice) -> Features:
        """Some of the examples; of features without batch dimensions."""
        return self._map(lambda tensor: tensor[part])

    def batched(self, batch_shape: torch.Size) -> Features:
        """With the examples unflattened to ``(..., n)``."""
        return self._map(lambda tensor: tensor.unflatten(0, batch_shape), batch_shape[-1])

    def _map(self, change: Callable[[Tensor], Tensor], num_examples: int | None = None) -> Features:
        dense = None if self.dense is None else change(self.dense)
        layers = tuple(layer.map(change) for layer in self.layers)
        if num_examples is None:
            some = dense if dense is not None else layers[0].c
            num_examples = some.shape[0]
        return replace(self, num_examples=num_examples, dense=dense, layers=layers)

    def tensors(self) -> list[Tensor]:
        """All that is held."""
        inputs = [a for layer in self.layers for a, _ in layer.inputs.values() if a is not None]
        return ([] if self.dense is None else [self.dense]) + [layer.c for layer in self.layers] + inputs

    @property
    def num_numbers(self) -> int:
        """How many numbers are held."""
        return sum(tensor.numel() for tensor in self.tensors())


# ---- products


def product(left: Features, right: Features, prior: Prior, num_groups: int = 1) -> list[Tensor]:
    """``U_g S0_g U'_g^T`` for each prior group g, ``(..., n1 m1, n2 m2)``."""
    sums = Sums(num_groups)
    for group in range(num_groups):
        names = [name for name in left.columns if prior[name].group == group]
        if names:
            columns = slice(left.columns[names[0]].start, left.columns[names[-1]].stop)
            here = _weighted(left, names, prior).flatten(-3, -2) @ right.dense[..., columns].flatten(-3, -2).mT
            sums.add(group, here.unflatten(-2, (-1, left.num_rows)))
    for layer1, layer2 in zip(left.layers, right.layers, strict=True):
        add_layer(sums, layer1, layer2, prior)
    size1, size2 = left.num_examples * left.num_rows, right.num_examples * right.num_rows
    empty = left.tensors()[0].new_zeros(size1, size2)  # of a group without weights
    return [empty if total is None else total.flatten(-3, -2) for total in sums.totals]


def numbers_per_pair(features: Features, other_rows: int) -> int:
    """The largest intermediate product for each pair of examples; those of the other side have ``other_rows`` rows."""
    largest = features.num_rows * other_rows
    for layer in features.layers:
        m, t, d = layer.c.shape[-3:]
        width = max(_width(a) for a, _ in layer.inputs.values())
        applied = t > 1 and _apply_cost(m, other_rows, t, t, width, d) < _sites_cost(m, other_rows, t, t, width, d)
        largest = max(largest, t * t * (1 if applied else m * other_rows))
    return largest


def allows_batch(features: Features, prior: Prior) -> bool:
    """Whether :func:`product` takes leading batch dimensions."""
    one_site = all(layer.num_sites == 1 for layer in features.layers)
    return one_site and not any(prior[name].per_weight for layer in features.layers for name in layer.inputs)


def _weighted(features: Features, names: list[str], prior: Prior) -> Tensor:
    """Columns of these parameters times the variances of their weights."""
    start, stop = features.columns[names[0]].start, features.columns[names[-1]].stop
    u = features.dense[..., start:stop]
    if all(prior[name].variance is None for name in names):
        return u
    parts = []
    for name in names:
        variance, columns = prior[name].variance, features.columns[name]
        variance = u.new_ones(()) if variance is None else variance
        size = columns.stop - columns.start
        parts.append(variance.repeat(features.repeats) if prior[name].per_weight else variance.expand(size))
    return u * torch.cat(parts)


def _scaled(a: Tensor, variance: Tensor | None) -> Tensor:
    return a if variance is None else a * variance


class Sums:
    """One sum of products for each prior group; in place unless a derivative is taken."""

    def __init__(self, num_groups: int) -> None:
        self.totals: list[Tensor | None] = [None] * num_groups

    def add(self, group: int, value: Tensor) -> None:
        """``total += value``; ``value`` must be nobody else's."""
        total = self.totals[group]
        if total is None:
            self.totals[group] = value
        elif torch.is_grad_enabled():
            self.totals[group] = total + value
        else:
            total += value

    def add_product(self, group: int, a: Tensor, b: Tensor) -> None:
        """``total += a * b``."""
        total = self.totals[group]
        if total is None:
            self.totals[group] = a * b
        elif torch.is_grad_enabled():
            self.totals[group] = total + a * b
        else:
            total.addcmul_(a, b)


def add_layer(sums: Sums, layer1: Layer, layer2: Layer, prior: Prior) -> None:
    """Add a layer's products ``(..., n1, m1, n2 m2)``, each parameter's to its group."""
    per_weight = [name for name in layer1.inputs if prior[name].per_weight]
    constant = [name for name in layer1.inputs if not prior[name].per_weight]
    for name in per_weight:
        if layer1.inputs[name][0].is_floating_point():
            sums.add(prior[name].group, _by_outputs(layer1, layer2, name, prior[name].variance))
        else:
            scaled1, scaled2 = (_scaled_tokens(layer, name, prior[name].variance) for layer in (layer1, layer2))
            add_layer(sums, scaled1, scaled2, {name: ParameterPrior(prior[name].group)})
    by_group = {
        group: [name for name in constant if prior[name].group == group]
        for group in sorted({prior[name].group for name in constant})
    }
    inner = {
        group: sum(_scaled(_inner(layer1, layer2, name), prior[name].variance) for name in names)
        for group, names in by_group.items()
    }
    if layer1.num_sites == layer2.num_sites == 1:
        _add_pairs(sums, layer1.c, layer2.c, inner)
    elif inner:
        width = max(_width(layer1.inputs[name][0]) for name in constant)
        _add_sites(sums, layer1.c, layer2.c, inner, width)


def _add_pairs(sums: Sums, c1: Tensor, c2: Tensor, inner: dict[int, Tensor]) -> None:
    """One site: ``(A A'^T + 1) o (C C'^T)``, the first ``(n1, n2)`` spread over the m x m' entries of each pair."""
    m1, m2 = c1.shape[-3], c2.shape[-3]
    products = (c1.flatten(-4, -2) @ c2.flatten(-4, -2).mT).unflatten(-2, (-1, m1))  # (..., n1, m1, n2 m2)
    for group, pairs in inner.items():
        sums.add_product(group, products, pairs.repeat_interleave(m2, -1).unsqueeze(-2))


def _add_sites(sums: Sums, c1: Tensor, c2: Tensor, inner: dict[int, Tensor], width: int) -> None:
    """Several sites: the cheaper of the first two orders of the table."""
    (m1, t1, d), (m2, t2, _) = c1.shape[-3:], c2.shape[-3:]
    if _apply_cost(m1, m2, t1, t2, width, d) < _sites_cost(m1, m2, t1, t2, width, d):
        for group, sites in inner.items():
            sums.add(group, _applied(sites, c1, c2))
        return
    products = c1.flatten(-4, -2) @ c2.flatten(-4, -2).mT
    products = products.unflatten(-1, (-1, m2, t2)).unflatten(-4, (-1, m1, t1))  # (..., n1, m1, t1, n2, m2, t2)
    for group, sites in inner.items():
        sites = sites.unflatten(-1, (-1, 1, t2)).unflatten(-4, (-1, 1, t1))
        sums.add(group, (products * sites).sum((-4, -1)).flatten(-2))


def _inner(layer1: Layer, layer2: Layer, name: str) -> Tensor:
    """``a_t . a'_t'`` for all sites, ``(..., n1 T, n2 T')``; ones for a bias, equality for tokens."""
    (a1, _), (a2, _), c1, c2 = layer1.inputs[name], layer2.inputs[name], layer1.c, layer2.c
    if a1 is None:
        return c1.new_ones(c1.shape[-4] * c1.shape[-2], c2.shape[-4] * c2.shape[-2])
    if not a1.is_floating_point():
        return (a1.flatten(-2).unsqueeze(-1) == a2.flatten(-2).unsqueeze(-2)).to(c1.dtype)
    return a1.flatten(-3, -2) @ a2.flatten(-3, -2).mT


def _width(a: Tensor | None) -> int:
    """Multiplications of one inner product."""
    return a.shape[-1] if a is not None and a.is_floating_point() else 1


def _applied(inner: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """``sum_tt' M_tt' (c_t . c'_t')``, ``(n1, m1, n2 m2)``, by ``H_tl = sum_t' M_tt' c'_lt'`` first."""
    n1, m1, t1, d = c1.shape
    n2, m2, t2, _ = c2.shape
    right = c2.transpose(1, 2).reshape(n2, t2, m2 * d)
    left = c1.reshape(n1, m1, t1 * d)
    step = max(1, BLOCK_NUMBERS // max(1, n1 * t1 * m2 * d))
    blocks = []
    for j in range(0, n2, step):
        m = inner.unflatten(-1, (n2, t2))[:, j : j + step].transpose(0, 1)  # (b, n1 t1, t2)
        h = torch.bmm(m, right[j : j + step])  # (b, n1 t1, m2 d)
        b = len(h)
        h = h.reshape(b, n1, t1, m2, d).permute(1, 2, 4, 0, 3).reshape(n1, t1 * d, b * m2)
        blocks.append(torch.bmm(left, h))  # (n1, m1, b m2)
    return torch.cat(blocks, -1)


def _by_outputs(layer1: Layer, layer2: Layer, name: str, variance: Tensor) -> Tensor:
    """One variance for each weight: ``sum_o (A diag(v_o) A'^T) o (c_o c'_o^T)``, ``(n1, m1, n2 m2)``."""
    factor1, factor2 = layer1.factor(name), layer2.factor(name)
    (n1, m1, t1, d), (n2, m2, t2, _) = factor1.c.shape, factor2.c.shape
    # sites as examples; their products are summed at the end
    a1, a2 = factor1.a.flatten(0, 1), factor2.a.flatten(0, 1)  # (n T, d_in)
    c1, c2 = (f.c.transpose(1, 2).flatten(0, 1) for f in (factor1, factor2))  # (n T, m, d_out)
    d_in = a1.shape[-1]
    v = variance.reshape(d_in, -1).mT if factor1.transposed else variance.reshape(-1, d_in)
    v = v.repeat(layer1.repeats, 1)  # (d_out, d_in)
    rows = max(1, min(len(a1), BLOCK_NUMBERS // max(1, d * d_in)))
    columns = max(1, min(len(a2), BLOCK_NUMBERS // max(1, d * rows * min(m1, m2))))
    strips = []
    for i in range(0, len(a1), rows):
        weighted = (v[:, None] * a1[i : i + rows]).flatten(0, 1)  # (d_out b1, d_in)
        left = c1[i : i + rows]
        b1 = len(left)
        strip = []
        for j in range(0, len(a2), columns):
            s = (a2[j : j + columns] @ weighted.mT).reshape(-1, d, b1).mT  # (b2, b1, d_out)
            right = c2[j : j + columns]
            if m1 <= m2:
                spread = (s[:, :, None] * left).flatten(1, 2)  # (b2, b1 m1, d_out)
                strip.append(torch.bmm(spread, right.mT).reshape(-1, b1, m1, m2).permute(1, 2, 0, 3))
            else:
                spread = (s.transpose(0, 1)[:, :, None] * right).flatten(1, 2)  # (b1, b2 m2, d_out)
                strip.append(torch.bmm(left, spread.mT).reshape(b1, m1, -1, m2))
        strips.append(torch.cat(strip, 2))
    out = torch.cat(strips).reshape(n1, t1, m1, n2, t2, m2)
    return (out.sum((1, 4)) if t1 * t2 > 1 else out).reshape(n1, m1, n2 * m2)


def _scaled_tokens(layer: Layer, name: str, variance: Tensor) -> Layer:
    """An embedding's variances belong to its cotangents: ``c_t -> c_t sqrt(v[token_t])``."""
    tokens, _ = layer.inputs[name]
    v = variance.reshape(-1, layer.c.shape[-1] // layer.repeats)[tokens]  # (..., n, T, d)
    v = v.repeat(*[1] * (v.dim() - 1), layer.repeats)
    return Layer(layer.c * v.sqrt().unsqueeze(-3), {name: layer.inputs[name]})
