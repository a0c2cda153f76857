"""Jacobian features of given examples: each layer captured, and put into the form in which products cost least."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import tiling
from ..jacobians import NetFunction
from . import contract
from .capture import capture, chunk_length, hidden_uses
from .contract import Features, Layer, Prior
from .coverage import Layers, covered_layers, layer_factors
from .rules import Outer

Form = Callable[[Layer], set[str]]  # those of a layer's parameters whose Jacobians are to be formed


def features(
    net: NetFunction, x: Tensor, cotangents: Tensor | None, prior: Prior, form: Form | Features, trace: bool = False
) -> Features:
    """Features of the examples ``x``.

    Args:
        net: the net.
        x: ``(n, *input_shape)``, n > 0.
        cotangents: ``(n, m, K)`` or None.
        prior: of each parameter: those of one group stand together.
        form: chooses the parameters whose Jacobians are formed; or features, whose choice is taken.
        trace: rows become further columns, of which products sum: features have one row.
    """
    layers = covered_layers(net, x)
    covered = {name for names in layers.values() for name in names}
    rest = net.restricted([name for name, size in net.sizes_by_name().items() if size and name not in covered])
    num_rows = net.num_rows(x, cotangents)
    length = chunk_length(net, x, num_rows)
    if rest.names:
        length = min(length, rest.jacobian_chunks(x, num_rows)[0].stop)
    names = set(form.columns) if isinstance(form, Features) else None
    chunks: list[Features] = []
    whole: Tensor | None = None  # the dense matrix of all examples, filled chunk by chunk where no graph is wanted
    for part in tiling.chunks(len(x), length):
        here = None if cotangents is None else cotangents[part]
        found, jacobians = _by_rules(net, layers, x[part], here)
        if rest.names:
            pieces = rest.jacobian_rows(x[part], here, slice(None)).split(rest.sizes, dim=-1)
            jacobians.update(zip(rest.names, pieces, strict=True))
        if names is None:
            names = set(jacobians).union(*(form(layer.trace() if trace else layer) for layer in found))
        chunk = _formed(net, found, jacobians, names, prior, trace, None if whole is None else whole[part])
        if whole is None and chunk.dense is not None and len(chunk.dense) < len(x) and not torch.is_grad_enabled():
            whole = chunk.dense.new_empty(len(x), *chunk.dense.shape[1:])
            whole[part] = chunk.dense
        chunks.append(chunk)
    return _concatenated(chunks, whole)


def feature_chunks(
    net: NetFunction, x: Tensor, cotangents: Tensor | None, prior: Prior, form: Form
) -> Iterator[tuple[slice, Features]]:
    """Chunks of the examples, and their features: as many as take little memory."""
    if len(x) == 0:
        return
    first = features(net, x[:1], None if cotangents is None else cotangents[:1], prior, form)
    if len(x) == 1:
        yield slice(0, 1), first
        return
    for part in tiling.chunks(len(x), tiling.chunk_length(3 * first.num_numbers, net.dtype, x.device)):
        yield part, features(net, x[part], None if cotangents is None else cotangents[part], prior, first)


def _by_rules(
    net: NetFunction, layers: Layers, x: Tensor, cotangents: Tensor | None
) -> tuple[list[Layer], dict[str, Tensor]]:
    """The covered parameters: those that multiply as layers, the others as Jacobians ``(n, m, p)``."""
    found: list[Layer] = []
    jacobians: dict[str, Tensor] = {}
    if not layers:
        return found, jacobians
    if net.capture_by_vmap is False:  # then what the net does may depend on the example
        hidden = {name for i in range(len(x)) for name in hidden_uses(net, layers, x[i : i + 1])}
        if hidden:
            raise RuntimeError(
                f"The net uses {', '.join(sorted(hidden))} through their modules for some examples and in other ways "
                "for others. Use them through their modules alone, or select other params."
            )
    calls = capture(net, list(layers), x, cotangents)
    num_rows, sizes = net.num_rows(x, cotangents), net.sizes_by_name()
    for layer, names in layers.items():
        if not calls[layer]:  # it takes no part
            options = {"dtype": net.dtype, "device": x.device}
            jacobians.update({name: torch.zeros(len(x), num_rows, sizes[name], **options) for name in names})
            continue
        shared: dict[int, Layer] = {}
        for name, factor in layer_factors(net, layer, names, calls[layer]).items():
            if isinstance(factor, Outer):
                of = shared.setdefault(id(factor.c), Layer(factor.c, {}))
                of.inputs[name] = (factor.a, factor.transposed)
            else:
                jacobians[name] = factor.flatten(2)
        found += shared.values()
    return found, jacobians


def _formed(
    net: NetFunction,
    layers: list[Layer],
    jacobians: dict[str, Tensor],
    names: set[str],
    prior: Prior,
    trace: bool,
    out: Tensor | None,
) -> Features:
    """Features of one chunk, the Jacobians of the parameters ``names`` formed, in ``out`` if it is given."""
    sizes, order = net.sizes_by_name(), {name: i for i, name in enumerate(net.names)}
    for layer in layers:
        for name in names & set(layer.inputs):
            jacobians[name] = contract.dense(layer.factor(name), sizes[name])
    layers = [layer for layer in (layer.without(names) for layer in layers) if layer is not None]
    repeats = 1
    if trace:
        repeats = (next(iter(jacobians.values())) if jacobians else layers[0].c).shape[1]
        jacobians = {name: jacobian.flatten(1)[:, None] for name, jacobian in jacobians.items()}
        layers = [layer.trace() for layer in layers]
    columns, stop = {}, 0
    for name in sorted(jacobians, key=lambda name: (prior[name].group, order[name])):
        columns[name] = slice(stop, stop := stop + jacobians[name].shape[-1])
    if out is not None:
        for name, where in columns.items():
            out[..., where] = jacobians[name]
        dense = out
    else:
        dense = torch.cat([jacobians[name] for name in columns], -1) if columns else None
    some = layers[0].c if dense is None else dense
    return Features(len(some), some.shape[1], dense, columns, tuple(layers), repeats)


def _concatenated(chunks: list[Features], whole: Tensor | None) -> Features:
    """The same for the examples of all chunks; ``whole``: their dense matrices, where these are in one already."""
    if len(chunks) == 1:
        return chunks[0]
    first = chunks[0]
    dense = whole
    if dense is None and first.dense is not None:
        dense = torch.cat([chunk.dense for chunk in chunks])
    layers = []
    for same in zip(*(chunk.layers for chunk in chunks), strict=True):
        inputs = {
            name: (None if a is None else torch.cat([layer.inputs[name][0] for layer in same]), transposed)
            for name, (a, transposed) in same[0].inputs.items()
        }
        layers.append(Layer(torch.cat([layer.c for layer in same]), inputs, same[0].repeats))
    num_examples = sum(chunk.num_examples for chunk in chunks)
    return Features(num_examples, first.num_rows, dense, first.columns, tuple(layers), first.repeats)
