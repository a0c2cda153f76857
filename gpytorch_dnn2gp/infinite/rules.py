"""Rules: what each layer of torch is at infinite width.

A rule takes a module (or the arguments of a function call) and returns a layer: a function of :class:`State`, or a
:class:`Weighted` one. A rule of your own takes a few lines:

    @infinite.rule(MyScale)
    def _(module):
        return lambda state: state.linear(lambda k: module.factor**2 * k)

    infinite.rule(MyActivation)(lambda module: infinite.Pointwise(integrals.Numerical(my_phi)))
"""

from __future__ import annotations

import abc
import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import integrals
from .integrals import Dual, Numerical
from .state import Features, State, products

Layer = Callable[..., State]

MODULE_RULES: dict[type[nn.Module], Callable[[nn.Module], Layer]] = {}
FUNCTION_RULES: dict[object, Callable[..., Layer]] = {}  # functions, and names of tensor methods
NO_RULE: dict[type[nn.Module], str] = {}  # why


def rule(*kinds: type[nn.Module] | Callable | str) -> Callable:
    """Decorator: what follows is the rule for modules of these types, for these functions, or tensor methods by name.

    A module's rule is called with the module, a function's with the arguments of the call but for the tensors that come
    out of the net. It returns a layer. A type's rule holds for its subclasses too, unless they have their own, or a
    ``forward`` of their own, which is then traced.
    """

    def register(function: Callable) -> Callable:
        for kind in kinds:
            rules = MODULE_RULES if isinstance(kind, type) and issubclass(kind, nn.Module) else FUNCTION_RULES
            rules[kind] = function
        return function

    return register


# ---- layers with weights


class Weighted(abc.ABC):
    """A layer with weights N(0, sigma_w^2 / fan_in), and biases N(0, sigma_b^2): a mean over the fan-in, then weights.

    Attributes:
        fan_in: number of summands; None where only the input tells (:meth:`width_of`).
        trained: whether weights, and biases, require a gradient, and so are part of the NTK.
        bias: whether there are biases.
    """

    fan_in: int | None
    trained: tuple[bool, bool]
    bias: bool

    @abc.abstractmethod
    def mean_product(self, features: Features) -> State:
        """Mean over the fan-in of x x', as a state with ``t=None``."""

    @abc.abstractmethod
    def mean(self, state: State) -> State:
        """Mean of K over the fan-in, a linear map."""

    def width_of(self, state: State | Features) -> int:
        """The fan-in where only the input tells it."""
        return math.prod(state.shape) if isinstance(state, Features) else 1

    def needs_full(self, full: bool) -> bool:
        """Whether all pairs of positions are needed of the input, given whether they are of the output."""
        return full

    def __call__(self, state: State | Features, weight: Tensor, bias: Tensor) -> State:
        first = isinstance(state, Features)
        mean = self.mean_product(state) if first else self.mean(state)
        fan_in = self.fan_in
        if fan_in is None:
            fan_in = self.width_of(state)
        bias = bias if self.bias else torch.zeros_like(bias)
        return mean.weighted(state.run.node, weight, bias, fan_in, self.trained)


@dataclass(frozen=True)
class Linear(Weighted):
    """``nn.Linear``: over channels, and over positions too where these were flattened into channels.

    Attributes:
        width: channels of its input, where ``fan_in`` is not given.
    """

    fan_in: int | None = None
    bias: bool = True
    trained: tuple[bool, bool] = (True, True)
    width: int = 1

    def mean_product(self, features: Features) -> State:
        *positions, d = features.shape
        if self.fan_in not in (None, d):
            raise ValueError(
                f"it takes {self.fan_in} features, but the inputs have {d}; their shape is {features.shape}."
            )
        full = features.run.full and bool(positions)
        x1, x2 = (
            x.flatten(-1 - len(positions), -2) if positions else x.unsqueeze(-2) for x in (features.x1, features.x2)
        )
        return State(products(x1 / d, x2, tuple(positions), full), None, features.run, tuple(positions), full)

    def width_of(self, state: State | Features) -> int:
        if isinstance(state, Features):
            return state.shape[-1]
        return self.width * (math.prod(state.positions) if state.flattened else 1)

    def mean(self, state: State) -> State:
        m = state.num_position_axes
        if state.flattened:
            return state.linear(lambda k: k.flatten(-m).mean(-1), positions=(), flattened=False, channels_last=True)
        if m and not state.channels_last:
            raise ValueError(
                "it acts on the last axis, which is a position, not the channels. Flatten or pool before it."
            )
        return state


@dataclass(frozen=True)
class Convolution(Weighted):
    """``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d``: mean over the filter's offsets; zeros outside, same divisor."""

    channels: int | None
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    mode: str = "zeros"
    width: int | None = None
    bias: bool = True
    trained: tuple[bool, bool] = (True, True)

    @property
    def fan_in(self) -> int | None:
        channels = self.channels or self.width
        return None if channels is None else channels * math.prod(self.kernel)

    def mean_product(self, features: Features) -> State:
        channels, *sizes = features.shape
        if len(sizes) != len(self.kernel) or self.channels not in (None, channels):
            expected = (self.channels or "channels", *["size"] * len(self.kernel))
            raise ValueError(
                f"it takes inputs of shape ({', '.join(map(str, expected))}), but they have the shape "
                f"{features.shape}. Tell it by input_shape=(channels, height, width)."
            )
        out = self._sizes(sizes)
        x1 = self._patches(features.x1)
        x2 = x1 if features.x2 is features.x1 else self._patches(features.x2)
        full = features.run.full
        k = products(x1 / x1.shape[-1], x2, out, full)
        return State(k, None, features.run, out, full, channels_last=False)

    def mean(self, state: State) -> State:
        if state.channels_last or state.flattened or state.num_position_axes != len(self.kernel):
            raise ValueError(
                f"it takes images of {len(self.kernel)} axes, channels first; its input is {_layout(state)}."
            )
        return state.linear(functools.partial(self._mean, state.full), positions=self._sizes(state.positions))

    def _mean(self, full: bool, k: Tensor) -> Tensor:
        m = len(self.kernel)
        for i in range(m):
            axes = (i - 2 * m, i - m) if full else (i - m,)
            for axis in axes:
                k = pad(k, axis, self.padding[i], self.mode)
            k = sum(_taken(k, axes, window) for window in self._windows(i, k.shape[axes[0]]))
        return k / math.prod(self.kernel)

    def _patches(self, x: Tensor) -> Tensor:
        """``(..., C, *S)`` -> ``(..., P, F C)``."""
        m = len(self.kernel)
        for i in range(m):
            x = pad(x, i - m, self.padding[i], self.mode)
        windows = [self._windows(i, x.shape[i - m]) for i in range(m)]
        patches = torch.cat([x[(..., *offset)] for offset in itertools.product(*windows)], -m - 1)
        return patches.flatten(-m).mT

    def _windows(self, i: int, size: int) -> list[slice]:
        """For each offset of axis i, the entries of the padded axis that it meets."""
        count = (size - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1
        starts = range(0, self.dilation[i] * self.kernel[i], self.dilation[i])
        return [slice(start, start + (count - 1) * self.stride[i] + 1, self.stride[i]) for start in starts]

    def _sizes(self, sizes: Sequence[int]) -> tuple[int, ...]:
        out = tuple(
            (size + sum(padding) - dilation * (kernel - 1) - 1) // stride + 1
            for size, padding, dilation, kernel, stride in zip(
                sizes, self.padding, self.dilation, self.kernel, self.stride
            )
        )
        if min(out) < 1:
            raise ValueError(f"its filter {self.kernel} does not fit into positions {tuple(sizes)}.")
        return out


def pad(k: Tensor, axis: int, amount: tuple[int, int], mode: str = "zeros") -> Tensor:
    """Pad one (negative) axis by zeros, or as torch's padding modes "circular", "reflect", "replicate" do."""
    if amount == (0, 0):
        return k
    if mode == "zeros":
        return F.pad(k, [0] * (2 * (-axis - 1)) + list(amount))
    index = torch.arange(k.shape[axis], dtype=torch.float64, device=k.device)[None, None]
    return k.index_select(axis, F.pad(index, amount, mode=mode)[0, 0].long())


def _taken(k: Tensor, axes: tuple[int, ...], window: slice) -> Tensor:
    index = [slice(None)] * k.dim()
    for axis in axes:
        index[axis] = window
    return k[tuple(index)]


def _trained(module: nn.Module) -> tuple[bool, bool]:
    return module.weight.requires_grad, module.bias is not None and module.bias.requires_grad


def _require_plain_weight(module: nn.Module) -> None:
    if isinstance(module._parameters.get("weight"), nn.parameter.UninitializedParameter):
        raise ValueError("its size is not known yet; run the net once.")
    if "weight" not in module._parameters:
        raise ValueError("its weight is made of other parameters (parametrized, normed, pruned); remove these first.")


@rule(nn.Linear)
def _(module: nn.Linear) -> Linear:
    _require_plain_weight(module)
    return Linear(module.in_features, module.bias is not None, _trained(module))


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _(module: nn.Conv2d) -> Convolution:
    _require_plain_weight(module)
    if module.groups != 1:
        raise ValueError(f"it has groups={module.groups}; the rule is for groups=1.")
    padding = module.padding
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size)]
        padding = tuple((total // 2, total - total // 2) for total in totals)
    elif padding == "valid":
        padding = ((0, 0),) * len(module.kernel_size)
    else:
        padding = tuple((p, p) for p in padding)
    return Convolution(
        module.in_channels,
        module.kernel_size,
        module.stride,
        padding,
        module.dilation,
        module.padding_mode,
        bias=module.bias is not None,
        trained=_trained(module),
    )


# ---- layers without


@dataclass(frozen=True)
class Pointwise:
    """An activation."""

    dual: Dual

    def __call__(self, state: State) -> State:
        return state.pointwise(self.dual)


def identity(state: State) -> State:
    """Nothing changes."""
    return state


@dataclass(frozen=True)
class Scale:
    """A constant factor."""

    factor: float

    def __call__(self, state: State) -> State:
        return state.linear(lambda k: self.factor**2 * k)


@dataclass(frozen=True)
class Pool:
    """Averages over windows of each axis: K <- M K M^T.

    Attributes:
        windows: for each axis, the pooling of torch in one dimension.
    """

    windows: tuple[nn.Module, ...]

    def needs_full(self, full: bool) -> bool:
        return True

    def __call__(self, state: State) -> State:
        if state.flattened or state.channels_last or state.num_position_axes != len(self.windows):
            raise ValueError(
                f"it takes images of {len(self.windows)} axes, channels first; its input is {_layout(state)}."
            )
        like = state.k.new_zeros(())
        eyes = [torch.eye(size, dtype=torch.float64)[None] for size in state.positions]
        matrices = [window(eye)[0].mT.to(like) for window, eye in zip(self.windows, eyes)]
        positions = tuple(len(M) for M in matrices)
        return state.linear(lambda k: _on_axes(k, matrices * 2), positions=positions)


def _on_axes(k: Tensor, matrices: list[Tensor]) -> Tensor:
    for i, M in enumerate(matrices):
        axis = i - len(matrices)
        if len(M) == 1 and (M == M[0, 0]).all():
            k = k.sum(axis, keepdim=True) * M[0, 0]
        else:
            k = (k.movedim(axis, -1) @ M.mT).movedim(-1, axis)
    return k


def _layout(state: State) -> str:
    if state.flattened:
        return "flattened"
    return f"{state.positions} positions, channels {'last' if state.channels_last else 'first'}"


@dataclass(frozen=True)
class Mean:
    """Mean over all positions, as global average pooling: they are gone afterwards."""

    axes: tuple[int, ...]
    keepdim: bool = False

    def needs_full(self, full: bool) -> bool:
        return True

    def __call__(self, state: State) -> State:
        m = state.num_position_axes
        positions = {axis + (1 if state.channels_last else 2) for axis in range(m)}
        axes = {axis % (m + 2) for axis in self.axes}
        if state.flattened or axes != positions:
            raise ValueError(
                f"it takes the mean over axes {sorted(axes)}; the rule is for the mean over all positions, axes "
                f"{sorted(positions)}."
            )
        kept = (1,) * m if self.keepdim else ()
        shape = (*kept, *kept)
        return state.linear(
            lambda k: k.flatten(-2 * m).mean(-1).view(*k.shape[: k.dim() - 2 * m], *shape), positions=kept
        )


@dataclass(frozen=True)
class Pad:
    """``nn.ZeroPad2d`` and its relatives."""

    amounts: tuple[tuple[int, int], ...]
    mode: str = "zeros"

    def __call__(self, state: State) -> State:
        m = len(self.amounts)
        if state.flattened or state.channels_last or state.num_position_axes != m:
            raise ValueError(f"it takes images of {m} axes, channels first; its input is {_layout(state)}.")

        def padded(k: Tensor) -> Tensor:
            for i, amount in enumerate(self.amounts):
                k = pad(k, i - m, amount, self.mode)
                if state.full:
                    k = pad(k, i - 2 * m, amount, self.mode)
            return k

        return state.linear(padded, positions=tuple(s + sum(a) for s, a in zip(state.positions, self.amounts)))


@dataclass(frozen=True)
class Flatten:
    """Positions become channels: from here on only equal positions meet."""

    def needs_full(self, full: bool) -> bool:
        return False

    def __call__(self, state: State) -> State:
        return replace(state, flattened=True) if state.positions else state


@dataclass(frozen=True)
class Norm:
    """LayerNorm, GroupNorm, RMSNorm: K / sqrt((K(x, x) + eps)(K(x', x') + eps)), T likewise.

    Attributes:
        axes: over how many of the last axes it normalises: the channels alone, or these and all positions, whose
            variances are averaged. None for groups of channels with all positions, channels first.
        eps: as torch's; None for the rounding of the dtype.
        centred: whether the mean over channels is subtracted, which is zero for a Gaussian alone.

    A scale and a shift of its own are at 1 and 0, as torch has them at first, and count as fixed in the NTK.
    """

    axes: int | None
    eps: float | None
    centred: bool = True

    def __call__(self, state: State) -> State:
        if self.centred and not state.gaussian:
            raise ValueError(
                "it acts on the output of an activation, whose mean is not zero. Put it after a layer with weights."
            )
        m = state.num_position_axes
        if self.axes is None:
            fits, over = not m or state.flattened or not state.channels_last, m
        elif state.flattened:
            fits, over = self.axes == 1, m
        else:
            over = m if self.axes == m + 1 else 0
            fits = over == m or (self.axes == 1 and state.channels_last)
        if not fits:
            raise ValueError(f"the axes it normalises are not those of its input, which is {_layout(state)}.")

        def inverse_deviation(variance: Tensor) -> tuple[Tensor]:
            eps = torch.finfo(variance.dtype).eps if self.eps is None else self.eps
            mean = variance.mean(tuple(range(-m, 0)), keepdim=True) if over else variance
            return ((mean + eps).rsqrt(),)

        (p,), (q,) = state.run.sides(state, inverse_deviation)
        return state.linear(lambda k: k * p * q)


@dataclass(frozen=True)
class Dropout:
    """Masks that are drawn for each input anew: variances grow by 1 / (1 - rate), covariances stay.

    Attributes:
        rate: of what is dropped.
        channels: whether whole channels are, at all positions, as ``nn.Dropout2d`` does.
    """

    rate: float
    channels: bool = False

    def __call__(self, state: State | Features) -> State | Features:
        if not state.run.dropout or self.rate == 0:
            return state
        self._require_rule(state)
        state = replace(state, gaussian=False)
        if not state.run.within:
            return state
        factor = 1 / (1 - self.rate)
        if self.channels or not state.full:
            return state.linear(lambda k: factor * k)
        return state.linear(lambda k: state.with_diagonal(k, factor * state.diagonal_of(k)))

    def _require_rule(self, state: State | Features) -> None:
        if isinstance(state, Features):
            raise ValueError("it drops entries of the inputs themselves, for which there is no rule. Put it later.")
        if self.rate >= 1:
            raise ValueError(f"its rate {self.rate} drops everything.")
        if self.channels and state.positions and state.channels_last and not state.flattened:
            raise ValueError("it drops whole positions, not channels, so that outputs stay random at infinite width.")


@dataclass(frozen=True)
class AlphaDropout(Dropout):
    """Nothing, as in eval mode."""

    def _require_rule(self, state: State | Features) -> None:
        raise ValueError("what it does in train mode has no rule; leave dropout=False, or take nn.Dropout.")


class Add:
    """Sum of branches whose weights are independent: K and T add."""

    def __call__(self, *states: State | Features) -> State | Features:
        if all(isinstance(state, Features) for state in states):
            x1 = sum(state.x1 for state in states)
            x2 = x1 if states[0].x2 is states[0].x1 else sum(state.x2 for state in states)
            return replace(states[0], x1=x1, x2=x2)
        if any(isinstance(state, Features) for state in states):
            raise ValueError(
                "it adds the inputs themselves to a branch with weights: the inputs are not random, so the sum is a "
                "Gaussian with a mean. Pass them through a layer with weights."
            )
        states = tuple(state if state.run.full else state.diagonal() for state in states)
        first = states[0]
        if any(s.positions != first.positions or s.channels_last != first.channels_last for s in states):
            raise ValueError(f"its branches differ in shape: {' and '.join(_layout(s) for s in states)}.")
        sources = frozenset().union(*(s.sources for s in states))
        if len(sources) < sum(len(s.sources) for s in states) or sum(not s.gaussian for s in states) > 1:
            raise ValueError(
                "its branches are not independent, or more than one ends in an activation: then covariances do not "
                "add. Let all branches but one end in a layer with weights of its own."
            )
        return replace(
            first,
            k=sum(s.k for s in states),
            t=None if first.t is None else sum(s.t for s in states),
            gaussian=all(s.gaussian for s in states),
            sources=sources,
        )


# ---- torch's modules


def _pointwise(dual: Dual) -> Callable[..., Pointwise]:
    return lambda *_, **options: Pointwise(dual)


for _name, _kinds in {
    "relu": (nn.ReLU, torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_"),
    "abs": (torch.abs, operator.abs, "abs"),
    "erf": (torch.erf, torch.special.erf, "erf"),
    "sin": (torch.sin, "sin"),
    "cos": (torch.cos, "cos"),
    "exp": (torch.exp, "exp"),
    "square": (torch.square, "square"),
    "sign": (torch.sign, "sign"),
}.items():
    rule(*_kinds)(_pointwise(integrals.dual(_name)))


def _numerical(function: Callable, name: str) -> Callable[..., Pointwise]:
    """The rule for a pointwise function of torch with its other arguments, or a module that is one."""

    def make(*args, **kwargs) -> Pointwise:
        kwargs.pop("inplace", None)
        if args and isinstance(args[0], nn.Module):
            return Pointwise(Numerical(args[0], name=repr(args[0])))
        given = ", ".join([*map(repr, args), *(f"{key}={value!r}" for key, value in kwargs.items())])
        call = functools.partial(_call, function, args, tuple(kwargs.items()))
        return Pointwise(Numerical(call, name=f"{name}({given})" if given else name))

    return make


def _call(function: Callable, args: tuple, kwargs: tuple, x: Tensor) -> Tensor:
    return function(x, *args, **dict(kwargs))


for _function, *_kinds in (
    (torch.tanh, F.tanh, "tanh", nn.Tanh),
    (torch.sigmoid, F.sigmoid, "sigmoid", nn.Sigmoid),
    (F.silu, nn.SiLU),
    (F.softplus, nn.Softplus),
    (F.elu, nn.ELU),
    (F.selu, nn.SELU),
    (F.celu, nn.CELU),
    (F.mish, nn.Mish),
    (F.softsign, nn.Softsign),
    (F.logsigmoid, nn.LogSigmoid),
    (F.tanhshrink, nn.Tanhshrink),
    (F.hardtanh, nn.Hardtanh),
    (F.relu6, nn.ReLU6),
    (F.hardswish, nn.Hardswish),
    (F.hardsigmoid, nn.Hardsigmoid),
    (F.softshrink, nn.Softshrink),
    (F.hardshrink, nn.Hardshrink),
):
    rule(_function, *_kinds)(_numerical(_function, _function.__name__))


@rule(nn.LeakyReLU)
def _(module: nn.LeakyReLU) -> Pointwise:
    return Pointwise(integrals.Rectifier(module.negative_slope))


@rule(F.leaky_relu)
def _(negative_slope: float = 0.01, inplace: bool = False) -> Pointwise:
    return Pointwise(integrals.Rectifier(negative_slope))


@rule(nn.GELU)
def _(module: nn.GELU) -> Pointwise:
    return _gelu(module.approximate)


@rule(F.gelu)
def _gelu(approximate: str = "none") -> Pointwise:
    if approximate == "none":
        return Pointwise(integrals.GELU())
    return Pointwise(Numerical(functools.partial(F.gelu, approximate=approximate), name=f"gelu ({approximate})"))


@rule(nn.Identity)
def _(module: nn.Module) -> Layer:
    return identity


@rule("contiguous", "clone", "detach")
def _(*_) -> Layer:
    return identity


@rule(nn.Dropout)
def _(module: nn.Dropout) -> Dropout:
    return Dropout(module.p)


@rule(nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
def _(module: nn.Dropout2d) -> Dropout:
    return Dropout(module.p, channels=True)


@rule(nn.AlphaDropout, nn.FeatureAlphaDropout)
def _(module: nn.AlphaDropout) -> AlphaDropout:
    return AlphaDropout(module.p)


@rule(F.dropout)
def _(p: float = 0.5, training: bool = True, inplace: bool = False) -> Dropout:
    return Dropout(p)


@rule(F.dropout1d, F.dropout2d, F.dropout3d)
def _(p: float = 0.5, training: bool = True, inplace: bool = False) -> Dropout:
    return Dropout(p, channels=True)


@rule(nn.Flatten)
def _(module: nn.Flatten) -> Flatten:
    return flatten(module.start_dim, module.end_dim)


@rule(torch.flatten, "flatten")
def flatten(start_dim: int = 0, end_dim: int = -1) -> Flatten:
    """The rule for flattening everything but the examples."""
    if (start_dim, end_dim) != (1, -1):
        raise ValueError(f"it flattens axes {start_dim} to {end_dim}; the rule is for start_dim=1, end_dim=-1.")
    return Flatten()


@rule("view", "reshape", torch.reshape)
def _(*shape) -> Flatten:
    shape = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], list | tuple | torch.Size) else shape
    if len(shape) == 2 and (shape.count(-1) == 1 or not isinstance(shape[0], int)):
        return Flatten()
    raise ValueError(f"it reshapes to {shape}; the rule is for two axes, as in x.view(x.size(0), -1).")


def _tuple(value: int | Sequence[int], length: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,) * length


def _average_pool(
    length: int, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
) -> Pool:
    if divisor_override is not None:
        raise ValueError("it has a divisor_override; the rule is for means.")
    kernel = _tuple(kernel_size, length)
    stride = kernel if stride in (None, ()) or stride == [] else _tuple(stride, length)
    pools = zip(kernel, stride, _tuple(padding, length))
    return Pool(tuple(nn.AvgPool1d(k, s, p, ceil_mode, count_include_pad) for k, s, p in pools))


def _adaptive_pool(length: int, output_size) -> Pool:
    if None in _tuple(output_size, length):
        raise ValueError("its output_size has a None; give numbers.")
    return Pool(tuple(nn.AdaptiveAvgPool1d(size) for size in _tuple(output_size, length)))


for _length, _module, _function, _adaptive, _adaptive_function in (
    (1, nn.AvgPool1d, F.avg_pool1d, nn.AdaptiveAvgPool1d, F.adaptive_avg_pool1d),
    (2, nn.AvgPool2d, F.avg_pool2d, nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d),
    (3, nn.AvgPool3d, F.avg_pool3d, nn.AdaptiveAvgPool3d, F.adaptive_avg_pool3d),
):

    @rule(_module)
    def _(module: nn.Module, length: int = _length) -> Pool:
        options = (module.ceil_mode, module.count_include_pad, getattr(module, "divisor_override", None))
        return _average_pool(length, module.kernel_size, module.stride, module.padding, *options)

    rule(_function)(functools.partial(_average_pool, _length))

    @rule(_adaptive)
    def _(module: nn.Module, length: int = _length) -> Pool:
        return _adaptive_pool(length, module.output_size)

    rule(_adaptive_function)(functools.partial(_adaptive_pool, _length))


@rule(torch.mean, "mean")
def _(dim=None, keepdim: bool = False, dtype=None) -> Mean:
    if dim is None:
        raise ValueError("it takes the mean over everything, examples too; give the axes of the positions.")
    return Mean(_tuple(dim, 1), keepdim)


for _kinds, _mode in (
    ((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d), "zeros"),
    ((nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d), "circular"),
    ((nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d), "reflect"),
    ((nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d), "replicate"),
):

    @rule(*_kinds)
    def _(module: nn.Module, mode: str = _mode) -> Pad:
        return Pad(_amounts(module.padding), mode)


@rule(F.pad)
def _(pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Pad:
    if value:
        raise ValueError(f"it pads with {value}; the rule is for zeros.")
    return Pad(_amounts(pad), "zeros" if mode == "constant" else mode)


def _amounts(padding: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Torch's order, last axis first, by pairs -> one pair for each axis in order."""
    return tuple(zip(padding[::2], padding[1::2]))[::-1]


@rule(nn.LayerNorm)
def _(module: nn.LayerNorm) -> Norm:
    return Norm(len(module.normalized_shape), module.eps)


@rule(nn.GroupNorm)
def _(module: nn.GroupNorm) -> Norm:
    if 1 < module.num_groups == module.num_channels:
        raise ValueError("its groups are of one channel each, whose statistics stay random at infinite width.")
    return Norm(None, module.eps)


@rule(F.layer_norm)
def _(normalized_shape: Sequence[int], weight=None, bias=None, eps: float = 1e-5) -> Norm:
    if weight is not None or bias is not None:
        raise ValueError("it has a weight or a bias; use nn.LayerNorm for these.")
    return Norm(len(tuple(normalized_shape)), eps)


if hasattr(nn, "RMSNorm"):

    @rule(nn.RMSNorm)
    def _(module: nn.RMSNorm) -> Norm:
        return Norm(len(module.normalized_shape), module.eps, centred=False)


@rule(operator.add, operator.iadd, torch.add, "add", "add_")
def _(*others, alpha: float = 1) -> Layer:
    if others or alpha != 1:
        raise ValueError("it adds a constant, or with a factor; the rule is for sums of branches.")
    return Add()


@rule(operator.mul, torch.mul, "mul")
def _(factor: object = None) -> Scale:
    if not isinstance(factor, int | float):
        raise ValueError("it multiplies by something else than a number, for which there is no rule.")
    return Scale(float(factor))


@rule(operator.truediv, torch.div, "div")
def _(divisor: object = None) -> Scale:
    if not isinstance(divisor, int | float):
        raise ValueError("it divides by something else than a number, for which there is no rule.")
    return Scale(1 / float(divisor))


@rule(operator.neg, torch.neg, "neg")
def _() -> Scale:
    return Scale(-1.0)


_ATTENTION = (
    "softmax attention with logits scaled by 1/sqrt(d) has no closed form; with 1/d it has one: "
    "infinite.YangTransformer and infinite.SelfAttention, or infinite.transformer and infinite.attention"
)
_MAXIMUM = "the maximum of correlated Gaussians has no closed form; average pooling has one"
for _kind, _why in {
    nn.MultiheadAttention: _ATTENTION,
    nn.TransformerEncoderLayer: _ATTENTION,
    nn.TransformerDecoderLayer: _ATTENTION,
    nn.Transformer: _ATTENTION,
    nn.modules.batchnorm._BatchNorm: "batch normalisation makes a covariance of whole batches, not of two inputs; "
    "infinite.batchnorm_mlp has it",
    nn.modules.instancenorm._InstanceNorm: "its statistics, of one channel each, stay random at infinite width",
    nn.modules.pooling._MaxPoolNd: _MAXIMUM,
    nn.modules.pooling._AdaptiveMaxPoolNd: _MAXIMUM,
    nn.Softmax: "a softmax over channels is no activation of single units",
    nn.RNNBase: "infinite.recurrent makes the kernel of a recurrent module, with a readout",
    nn.Embedding: "it takes tokens; pass vectors instead",
}.items():
    NO_RULE[_kind] = _why
