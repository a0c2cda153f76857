"""Which parameters the layers' rules cover, and the check that it is so.

A parameter is covered if one module alone owns it, that module has a rule, and a few examples show that

- it reaches the output through that module's calls alone, in autograd's graph (weights tied to a second module or used
  through ``functional`` do not), and
- its Jacobian rows by the rule equal those by plain autodiff.

What fails here goes by plain autodiff from then on, with a warning that names it: slower, never wrong.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ..jacobians import NetFunction
from ..numerics import first_index
from . import contract
from .capture import Calls, capture, hidden_uses
from .rules import Outer, find_rule

Layers = dict[str, list[str]]  # for each covered module the full names of its covered parameters


class FallbackWarning(UserWarning):
    """Parameters that a layer's rule seemed to cover go by plain autodiff: exact as well, but slower."""


def covered_layers(net: NetFunction, x: Tensor) -> Layers:
    """The layers, and the selected parameters, that rules cover; checked once for each shape of an example.

    Args:
        net: the net; the answer is kept in ``net.covered``.
        x: inputs ``(n, *input_shape)``, n > 0. Within a transform of ``torch.func`` nothing can be checked: a shape
            that comes up there first goes by plain autodiff.
    """
    shape = x.shape[1:]
    if shape not in net.covered:
        if torch._C._functorch.is_functorch_wrapped_tensor(x):
            return {}
        net.covered[shape] = _checked(net, _candidates(net), x.detach())
    return net.covered[shape]


def share_coverage(net: NetFunction, x1: Tensor, x2: Tensor) -> None:
    """Rules for what they cover with inputs of either shape, so that features of both have the same form."""
    shapes = x1.shape[1:], x2.shape[1:]
    if shapes[0] == shapes[1]:
        return
    first, second = covered_layers(net, x1), covered_layers(net, x2)
    if first != second:
        shared = {name for names in second.values() for name in names}
        both = {layer: [name for name in names if name in shared] for layer, names in first.items()}
        net.covered[shapes[0]] = net.covered[shapes[1]] = {layer: names for layer, names in both.items() if names}


def layer_factors(
    net: NetFunction, layer: str, names: Sequence[str], calls: list[tuple[Tensor, Tensor]]
) -> dict[str, Outer | Tensor]:
    """Jacobian factors of one layer's parameters, by full name; the sites of all its calls together."""
    module = net.net.get_submodule(layer)
    rule = find_rule(module)
    by_call = [rule(module, a, g) for a, g in calls]
    sizes = net.sizes_by_name()
    joined: dict[tuple[int, ...], Tensor] = {}  # cotangents that factors share stay shared
    out: dict[str, Outer | Tensor] = {}
    for name in names:
        each = [call[name.rpartition(".")[2]] for call in by_call]  # at least one
        if len(each) == 1:
            out[name] = each[0]
        elif all(isinstance(factor, Outer) for factor in each):
            key = tuple(id(factor.c) for factor in each)
            if key not in joined:
                joined[key] = torch.cat([factor.c for factor in each], -2)
            a = None if each[0].a is None else torch.cat([factor.a for factor in each], 1)
            out[name] = Outer(a, joined[key], each[0].transposed)
        else:
            out[name] = sum(contract.dense(factor, sizes[name]) for factor in each)
    return out


def _candidates(net: NetFunction) -> Layers:
    """Layers with a rule, and those of their selected parameters that no other module owns."""
    modules = dict(net.net.named_modules())
    owners: dict[int, int] = {}
    for module in modules.values():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    layers: Layers = {}
    for name in net.names:
        layer, _, local = name.rpartition(".")
        parameter = modules[layer]._parameters[local]
        if find_rule(modules[layer]) is not None and owners[id(parameter)] == 1 and parameter.numel():
            layers.setdefault(layer, []).append(name)
    return layers


@torch.no_grad()
def _checked(net: NetFunction, layers: Layers, x: Tensor) -> Layers:
    """``layers`` without the parameters that plain autodiff contradicts."""
    if not layers:
        return {}
    x = x[_telling_examples(x)]
    hidden = {name for i in range(len(x)) for name in hidden_uses(net, layers, x[i : i + 1])}
    layers, problems = _without(layers, hidden), []
    if hidden:
        problems.append(f"{', '.join(sorted(hidden))} reach the output in other ways than through their module's calls")
    if layers:
        wrong, why = _contradicted(net, layers, x)
        if wrong and net.capture_by_vmap:  # by an error of torch's batching rules?
            net.capture_by_vmap = False
            wrong, why = _contradicted(net, layers, x)
            net.capture_by_vmap = bool(wrong)
        layers = _without(layers, wrong)
        if wrong:
            problems.append(f"the rules for {', '.join(wrong)} do not agree with plain autodiff{why}")
    if problems:
        warnings.warn(
            f"In this net {'; '.join(problems)}. These parameters go by plain autodiff: exact, but slower.",
            FallbackWarning,
            stacklevel=2,
        )
    return layers


def _telling_examples(x: Tensor) -> list[int]:
    """The first example, one that differs from it, and the largest, which is not likely to be all zeros; of 1,000."""
    x = x[:1000].flatten(1)
    differs = (x != x[:1]).any(1)
    largest = int(x.to(torch.float64).square().sum(1).argmax())
    return sorted({0, largest} | ({first_index(differs)} if differs.any() else set()))


def _without(layers: Layers, names: Sequence[str] | set[str]) -> Layers:
    left = {layer: [name for name in own if name not in names] for layer, own in layers.items()}
    return {layer: own for layer, own in left.items() if own}


def _contradicted(net: NetFunction, layers: Layers, x: Tensor) -> tuple[list[str], str]:
    """Parameters whose rows by rule differ from those by autodiff, and why; at two made-up rows of each example."""
    names = [name for own in layers.values() for name in own]
    num_outputs = net.num_rows(x)
    angles = torch.arange(1.0, 1 + 2 * len(x) * num_outputs, dtype=net.dtype, device=x.device)
    cotangents = torch.cos(3 * angles).reshape(len(x), 2, num_outputs)
    reference = net.restricted(names)
    rows = reference.jacobian_loop(x, cotangents)  # plain autograd, without vmap
    expected = dict(zip(reference.names, rows.split(reference.sizes, dim=-1), strict=True))
    try:
        calls: Calls = capture(net, list(layers), x, cotangents)
    except Exception as error:  # whatever it is, plain autodiff does without
        return names, f": its layers cannot be watched ({type(error).__name__}: {error})"
    wrong: list[str] = []
    why = ""
    eps = torch.finfo(net.dtype).eps
    rounding = 1e3 * eps * max(float(row.abs().max()) for row in expected.values())  # of derivatives that cancel
    for layer, own in layers.items():
        if not calls[layer]:
            continue  # not called: without hidden uses it takes no part
        try:
            factors = layer_factors(net, layer, own, calls[layer])
            found = {name: contract.dense(factors[name], expected[name].shape[-1]) for name in own if name in factors}
        except Exception as error:  # a rule may be a user's
            wrong += own
            why += f" ({type(error).__name__} in the rule of {layer or 'the net'}: {error})"
            continue
        for name in own:
            agrees = found[name].shape == expected[name].shape and bool(
                (found[name] - expected[name]).abs().max()
                <= 10 * math.sqrt(eps) * expected[name].abs().max() + rounding
            )
            if not agrees:
                wrong.append(name)
    return wrong, why
