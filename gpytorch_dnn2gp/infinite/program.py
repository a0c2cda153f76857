"""From an ``nn.Module`` to a program of layers.

:func:`program_of` traces the module with ``torch.fx`` and finds a rule for each step. matrix.py runs the program.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn

from ..numerics import require_finite
from .integrals import VarianceOverflow
from .matrix import Recursion
from .rules import (
    FUNCTION_RULES,
    MODULE_RULES,
    NO_RULE,
    Add,
    Convolution,
    Dropout,
    Flatten,
    Layer,
    Mean,
    Norm,
    Pad,
    Pool,
    Weighted,
)
from .sequences import num_tokens, split, unpack
from .state import Features, Run, State, Within

HOW_TO_ADD = (
    "A rule of your own takes a few lines: @infinite.rule({kind}), then a function of the {what} that returns a "
    "function of the state; see infinite.rules."
)


@dataclass(frozen=True)
class Step:
    """One step of a program.

    Attributes:
        name: of its output.
        place: of the module in the net, or the function; for messages.
        inputs: names of its inputs.
        layer: what it does to states.
        exact: what it does to inputs on which nothing random has acted, ``(m, *shape)``; None for layers with weights.
        index: of a layer with weights, its place among these that have the same hyperparameters; else None.
        module: its name in the net.
        hyper: of a layer with weights, names of the hyperparameters that are its sigma_w^2 and sigma_b^2.
        given_lengths: whether it is called with the lengths of sequences.
    """

    name: str
    place: str
    inputs: tuple[str, ...]
    layer: Layer
    exact: Callable[..., Tensor] | None = None
    index: int | None = None
    module: str | None = None
    hyper: tuple[str, str] = ("weight_variance", "bias_variance")
    given_lengths: bool = False


@dataclass(frozen=True)
class Program(Recursion):
    """A net at infinite width.

    Attributes:
        steps: in order; the first input is called "x", the last step is the output.
        input_size: numbers per token, for inputs that are sequences made by :func:`pack`; else None.
        all_states: whether each token of a sequence has an output of its own, and so a row of the matrix.
        layers: names of the layers with weights, in the order of their variances.
    """

    steps: tuple[Step, ...]
    input_size: int | None = None
    all_states: bool = False
    layers: tuple[str, ...] = field(init=False)
    full: dict[str, bool] = field(init=False, repr=False)  # where all pairs of positions are needed
    last_use: dict[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        full, last_use = {step.name: False for step in self.steps} | {"x": False}, {}
        full[self.steps[-1].name] = self.all_states
        for step in reversed(self.steps):
            needs = getattr(step.layer, "needs_full", lambda wanted: wanted)(full[step.name])
            for name in step.inputs:
                full[name] = full[name] or needs
                last_use.setdefault(name, step.name)
        object.__setattr__(self, "full", full)
        object.__setattr__(self, "last_use", last_use)
        object.__setattr__(self, "layers", tuple(step.place for step in self.steps if step.index is not None))

    def block(self, x: Features) -> Tensor:
        """K or T of the output."""
        out = self(self._tokens(x))
        if not self.all_states:
            return _kernel_of(out, x.run.ntk)
        first, second = x.run.masks  # (*B, n1, n2, L, L)
        there = first.unsqueeze(-2).unsqueeze(-1) & second.unsqueeze(-3).unsqueeze(-2)
        return torch.where(there, out.k if x.run.ntk is None else out.t, 0)

    def rows(self, shape: tuple[int, ...]) -> int:
        """L where all states of a sequence are read."""
        return num_tokens(shape[0], self.input_size) if self.all_states else 1

    def require_inputs(self, x: Tensor) -> None:
        """Finite numbers, or packed sequences of these."""
        if self.input_size is not None:
            unpack(x, self.input_size)
        else:
            require_finite(x, "x", "Remove or impute these rows first.")

    def of_sequences(self, input_size: int, all_states: bool = False) -> Program:
        """The same for packed sequences of tokens with ``input_size`` numbers.

        Raises:
            ValueError: for a layer that mixes tokens without regard to lengths.
        """
        for step in self.steps:
            if getattr(step.layer, "reads_lengths", False) and not step.given_lengths:
                raise ValueError(
                    f"{step.place} is not given the lengths of the sequences. Let forward take a second argument, "
                    "lengths, and hand it on to this layer; or, for sequences of one length, use input_shape."
                )
            if isinstance(step.layer, _MIXES_POSITIONS):
                raise ValueError(
                    f"{step.place} mixes the tokens of a sequence, its padding too. Use infinite.LastState or "
                    "infinite.MeanState, which know lengths; or, for sequences of one length, input_shape."
                )
        return replace(self, input_size=input_size, all_states=all_states)

    def _tokens(self, x: Features) -> Features:
        """Sequences, from rows of one matrix; their padding repeats the first token, and nothing reads it."""
        if self.input_size is None:
            return x
        first = split(x.x1, self.input_size)
        second = first if x.x2 is x.x1 else split(x.x2, self.input_size)
        x.run.masks = first.mask, second.mask
        x1, x2 = (torch.where(s.mask.unsqueeze(-1), s.tokens, s.tokens[..., :1, :]) for s in (first, second))
        return Features(x1, x1 if second is first else x2, tuple(x1.shape[-2:]), x.run)

    def widest(self, x: Tensor, shape: tuple[int, ...], run: Within) -> int:
        """Most entries that any state has for one pair."""
        sizes = [1]

        class Watched(Program):
            @staticmethod
            def _apply(step, inputs, run):
                out = Program._apply(step, inputs, run)
                if isinstance(out, State):
                    sizes.append(out.k.numel() // max(1, x.shape[: x.dim() - len(shape)].numel()))
                return out

        if x.numel():
            with torch.no_grad():
                piece = x.unsqueeze(x.dim() - len(shape))
                watched = Watched(self.steps, self.input_size, self.all_states)
                watched(self._tokens(Features(piece, piece, shape, run)))
        return max(sizes)

    def __call__(self, x: Features) -> State | Features:
        """Run all steps."""
        values: dict[str, State | Features] = {"x": x}
        run = x.run
        for step in self.steps:
            inputs = [values[name] for name in step.inputs]
            run.node, run.full = step.name, self.full[step.name]
            try:
                out = self._apply(step, inputs, run)
            except ValueError as error:
                kind = VarianceOverflow if isinstance(error, VarianceOverflow) else ValueError
                raise kind(f"{step.place}: {error}") from error
            if isinstance(out, State) and out.full and not (run.full and out.positions):
                out = out.diagonal() if out.positions else _without_positions(out)
            values[step.name] = out
            for name in step.inputs:
                if self.last_use[name] == step.name:
                    values.pop(name, None)
        return values[self.steps[-1].name]

    def variances(self, hyper: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """sigma_w^2 and sigma_b^2 of each layer with weights, ``(*B, L)``, of hyperparameters by name."""
        pairs = [_of_step(step, hyper) for step in self.steps if step.index is not None]
        return tuple(torch.stack(values, -1) for values in zip(*pairs))

    def describe(self) -> str:
        """A line for each step: its name, what it does, its inputs. The same for the same net in another process."""
        return "\n".join(f"{step.name}: {_label(step.layer)} of {', '.join(step.inputs)}" for step in self.steps)

    @staticmethod
    def _apply(step: Step, inputs: list[State | Features], run: Run) -> State | Features:
        if step.index is not None:
            return step.layer(inputs[0], *_of_step(step, run.hyper))
        if isinstance(inputs[0], Features) and not isinstance(step.layer, Add | Dropout):
            if step.exact is None or (run.masks is not None and getattr(step.layer, "reads_lengths", False)):
                raise ValueError("it acts on the inputs themselves, which its rule does not say how to do.")
            return inputs[0].map(step.exact)
        return step.layer(*inputs)


def _of_step(step: Step, hyper: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(v[..., step.index if v.shape[-1] > 1 else 0] for v in (hyper[name] for name in step.hyper))


def _label(layer: Layer) -> str:
    text = repr(layer)
    return getattr(layer, "__name__", type(layer).__name__) if " at 0x" in text else text


def _without_positions(state: State) -> State:
    return state.linear(lambda k: k, full=False)


# ---- tracing


class _Tracer(fx.Tracer):
    """Stops at modules that have a rule, and at torch's own."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if _rule_of(module) is not None or _why_none(module) is not None:
            return True
        return super().is_leaf_module(module, name)


def _rule_of(module: nn.Module) -> Callable[[nn.Module], Layer] | None:
    """Its type's rule; that of a type it is derived from only if it has no other ``forward``."""
    kind = next((kind for kind in type(module).__mro__ if kind in MODULE_RULES), None)
    if kind is None or (kind.forward is not nn.Module.forward and type(module).forward is not kind.forward):
        return None
    return MODULE_RULES[kind]


def _why_none(module: nn.Module) -> str | None:
    return next((NO_RULE[kind] for kind in type(module).__mro__ if kind in NO_RULE), None)


_MIXES_POSITIONS = Convolution | Flatten | Mean | Pad | Pool
_BATCH = object()  # stands for the number of examples, as in x.view(x.size(0), -1)
_LENGTHS = object()  # stands for the lengths of sequences, the second argument of ``forward``


def program_of(net: nn.Module) -> Program:
    """The program of a module.

    The module is traced, not run, and neither kept nor changed: only its structure counts, not its weights.

    Raises:
        TypeError: if ``net`` is no module.
        NotImplementedError: for a module or function that has no rule, with its place in the net and how to add a rule.
        ValueError: for a net whose outputs are no Gaussian process, or with shared weights, or that cannot be traced.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(
            f"net must be an nn.Module, or made by fully_connected or convolutional; got {type(net).__name__}."
        )
    tracer = _Tracer()
    if _rule_of(net) is not None or _why_none(net) is not None:
        net = nn.Sequential(net)
    try:
        graph = tracer.trace(net)
    except Exception as error:
        raise ValueError(
            f"{type(net).__name__} cannot be traced by torch.fx: {error} Its forward may not branch on values or "
            "shapes of its input; give the part that does a rule of its own, @infinite.rule(ThatModule)."
        ) from error
    modules = dict(net.named_modules())
    names: dict[fx.Node, object] = {}
    steps: list[Step] = []
    owners: dict[int, str] = {}
    num_weighted = 0
    for node in graph.nodes:
        if node.op == "placeholder":
            if "x" in names.values():
                if node.target == "lengths":
                    names[node] = _LENGTHS
                    continue
                if node.args:  # an argument with a default
                    names[node] = node.args[0]
                    continue
                raise ValueError(f"{type(net).__name__}.forward takes several inputs; the rules are for one.")
            names[node] = "x"
        elif node.op == "output":
            result = node.args[0]
            if not isinstance(result, fx.Node):
                raise ValueError(
                    f"{type(net).__name__} returns a {type(result).__name__}; the rules are for one tensor."
                )
            if not steps or names[result] != steps[-1].name:
                steps = _upto(steps, names[result])
        elif node.op == "get_attr":
            raise NotImplementedError(
                f"The net uses its tensor {node.target!r} directly, for which there is no rule. Put it into a module "
                "of its own, and " + HOW_TO_ADD.format(kind="ThatModule", what="module")
            )
        elif _is_batch_size(node, names):
            names[node] = _BATCH
        else:
            module_name = node.target if node.op == "call_module" else None
            if module_name is not None:
                module = modules[node.target]
                place = f"{node.target!r} ({type(module).__name__})"
                _require_unshared(module, node.target, owners)
                layer = _module_layer(module, place)
                given = (*node.args, *node.kwargs.values())
                lengths = [a for a in given if isinstance(a, fx.Node) and names.get(a) is _LENGTHS]
                inputs = [a for a in given if a is not None and a not in lengths]
                exact = _without_weights(module, layer)
            else:
                place = f"the call of {_name_of(node.target)} at {node.name!r}"
                layer, inputs, exact = _function_layer(node, names, place)
                lengths = []
            unknown = [a for a in inputs if not isinstance(a, fx.Node) or not isinstance(names.get(a), str)]
            if unknown or (node.op == "call_module" and len(inputs) != 1):
                raise NotImplementedError(
                    f"{place} is called with other arguments than one tensor; there is no rule for that."
                )
            index = None
            if isinstance(layer, Weighted):
                index, num_weighted, exact = num_weighted, num_weighted + 1, None
            inputs = tuple(names[a] for a in inputs)
            steps.append(Step(node.name, place, inputs, layer, exact, index, module_name, given_lengths=bool(lengths)))
            names[node] = node.name
    if num_weighted == 0:
        raise ValueError(f"{type(net).__name__} has no layer with weights, so it is no random function.")
    return Program(tuple(steps))


def _upto(steps: list[Step], name: object) -> list[Step]:
    """The steps up to the one of this name, which torch.fx put before others that nothing uses."""
    names = [step.name for step in steps]
    if name not in names:
        raise ValueError("The net returns its input.")
    return steps[: names.index(name) + 1]


def _is_batch_size(node: fx.Node, names: dict) -> bool:
    """``x.size(0)``, ``x.shape[0]``, ``len(x)``, and what leads there."""
    if node.op == "call_method" and node.target == "size":
        return node.args[1:] == (0,)
    if node.op == "call_function" and node.target is getattr and node.args[1:] == ("shape",):
        return True
    if node.op == "call_function" and node.target is operator.getitem:
        return names.get(node.args[0]) is _BATCH and node.args[1] == 0
    return False


def _name_of(target: object) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _require_unshared(module: nn.Module, name: str, owners: dict[int, str]) -> None:
    for parameter in module.parameters():
        owner = owners.setdefault(id(parameter), name)
        if owner != name or (name, "seen") in owners:
            where = f"{owner!r} and {name!r}" if owner != name else f"{name!r}, which is called twice"
            raise ValueError(
                f"Weights are shared by {where}. Then branches are not independent, and the rules, each for fresh "
                "weights, do not hold. Give each place a module of its own."
            )
    if next(module.parameters(), None) is not None:
        owners[(name, "seen")] = name


def _module_layer(module: nn.Module, place: str) -> Layer:
    make = _rule_of(module)
    if make is None:
        kind = type(module).__name__
        why = _why_none(module)
        raise NotImplementedError(
            f"{place} has no rule at infinite width{': ' + why if why else ''}. "
            + HOW_TO_ADD.format(kind=kind, what="module")
        )
    try:
        return make(module)
    except ValueError as error:
        raise NotImplementedError(f"{place}: {error}") from error


def _function_layer(node: fx.Node, names: dict, place: str) -> tuple[Layer, list[fx.Node], Callable]:
    """Layer of a function or method call, the tensors it acts on, and the same call on tensors."""
    make = FUNCTION_RULES.get(node.target)
    if make is None:
        raise NotImplementedError(
            f"{place} has no rule at infinite width. "
            + HOW_TO_ADD.format(kind=_name_of(node.target), what="other arguments of the call")
        )
    tensors = [
        a for a in [*node.args, *node.kwargs.values()] if isinstance(a, fx.Node) and isinstance(names.get(a), str)
    ]

    def is_tensor(a: object) -> bool:
        return isinstance(a, fx.Node) and a in tensors

    others = [names.get(a, a) if isinstance(a, fx.Node) else a for a in node.args if not is_tensor(a)]
    options = {
        key: names.get(a, a) if isinstance(a, fx.Node) else a for key, a in node.kwargs.items() if not is_tensor(a)
    }
    if len(tensors) > 1 and make is not FUNCTION_RULES[operator.add]:
        raise NotImplementedError(
            f"{place} combines {len(tensors)} branches, for which there is no rule; sums have one."
        )
    if len(tensors) == 1 and make is FUNCTION_RULES[operator.add] and not others:
        raise NotImplementedError(
            f"{place} adds a branch to itself, for which there is no rule; multiply by 2 instead."
        )
    try:
        layer = make(*others, **options)
    except (ValueError, TypeError) as error:
        raise NotImplementedError(f"{place}: {error}") from error

    def slotted(a: object) -> object:
        return _Slot(tensors.index(a) if a in tensors else None)

    args, options = fx.map_arg((node.args, node.kwargs), slotted)
    return layer, tensors, _Call(node.target, tuple(args), dict(options))


@dataclass(frozen=True)
class _Slot:
    """Stands for the tensor of this number, or for the number of examples."""

    index: int | None


@dataclass(frozen=True)
class _Call:
    """A call of a function, or of a tensor's method by name, as it stands in the net."""

    target: Callable | str
    args: tuple
    options: dict

    def __call__(self, *values: Tensor) -> Tensor:
        args, options = self._filled(self.args, values), self._filled(self.options, values)
        if isinstance(self.target, str):
            return getattr(args[0], self.target)(*args[1:], **options)
        return self.target(*args, **options)

    def _filled(self, a: object, values: tuple[Tensor, ...]) -> object:
        if isinstance(a, _Slot):
            return len(values[0]) if a.index is None else values[a.index]
        if isinstance(a, dict):
            return {key: self._filled(b, values) for key, b in a.items()}
        if isinstance(a, list | tuple):
            filled = [self._filled(b, values) for b in a]
            return filled if isinstance(a, list) else tuple(filled)
        return a


def _without_weights(module: nn.Module, layer: Layer) -> nn.Module | None:
    """The module to be applied to inputs, in eval mode; layers with weights are never applied."""
    if next(module.parameters(), None) is None:
        return copy.deepcopy(module).eval()
    if isinstance(layer, Norm):
        twin = copy.deepcopy(module).eval()
        for name in list(twin._parameters):  # a scale of 1 and a shift of 0
            twin.register_parameter(name, None)
        return twin
    return None


def _kernel_of(out: State | Features, ntk: str | None) -> Tensor:
    if not isinstance(out, State) or not out.gaussian:
        raise ValueError(
            "The net does not end in a layer with weights, so its outputs are no Gaussian process. Leave out the last "
            "activation, or add a linear readout."
        )
    if out.positions:
        if out.k[0, 0].numel() != 1 or any(size != 1 for size in out.positions):
            raise ValueError(
                f"The net's output has positions {out.positions}, each with a covariance of its own. End it with "
                "pooling, or Flatten, and a linear readout."
            )
    k = out.k if ntk is None else out.t
    return k.flatten(k.dim() - len(out.positions)).squeeze(-1) if out.positions else k
