"""Kernels for people who think in depth and sigma instead of modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from .batchnorm import BatchNormKernel
from .integrals import Dual, dual
from .kernels import NNGPKernel, NTKKernel
from .program import Program, Step
from .rules import Convolution, Flatten, Linear, Pointwise, Pool, _average_pool

Activation = str | Dual | Callable[[Tensor], Tensor]
Variances = float | Sequence[float] | Tensor


def fully_connected(
    depth: int,
    activation: Activation = "relu",
    weight_variance: Variances = 2.0,
    bias_variance: Variances = 0.1,
    *,
    kernel: str = "nngp",
    width: int = 1,
    **options,
) -> NNGPKernel:
    """A fully connected net: ``depth`` hidden layers and a readout, as Lee et al. (2018) count.

    Args:
        depth: number of hidden layers, each with its activation.
        activation: "relu", "tanh", ... (``integrals.ACTIVATIONS``), a function of a tensor, or an ``integrals.Dual``.
        weight_variance, bias_variance: sigma_w^2 and sigma_b^2 of all ``depth + 1`` layers, or one for each.
        kernel: "nngp" or "ntk".
        width: of the hidden layers; only the NTK with ``parameterization="standard"`` depends on it.
        options: of :class:`NNGPKernel` or :class:`NTKKernel`.
    """
    _require_depth(depth)
    phi = Pointwise(dual(activation))
    layers = [("input layer", Linear())]
    for i in range(1, depth + 1):
        name = "readout" if i == depth else f"hidden layer {i + 1}"
        layers += [(f"activation {i}", phi), (name, Linear(width=width))]
    return _kernel(kernel)(_chain(layers), weight_variance, bias_variance, **options)


def convolutional(
    depth: int,
    activation: Activation = "relu",
    weight_variance: Variances = 2.0,
    bias_variance: Variances = 0.1,
    *,
    input_shape: Sequence[int],
    filter: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | None = None,
    padding_mode: str = "zeros",
    average_pool: int | None = None,
    top: str = "pool",
    kernel: str = "nngp",
    width: int = 1,
    **options,
) -> NNGPKernel:
    """A convolutional net: ``depth`` convolutions, each with its activation, then pooling or flattening, and a readout.

    Args:
        depth: number of convolutions.
        activation, weight_variance, bias_variance, kernel, width, options: see :func:`fully_connected`; width means
            channels.
        input_shape: (channels, height, width) or (channels, length).
        filter, stride: of every convolution, one number or one for each axis.
        padding: on either side; None keeps the size where the stride is one and the filter odd.
        padding_mode: "zeros" or "circular", as in ``nn.Conv2d``.
        average_pool: window of the average pooling after each activation; None leaves it out.
        top: "pool" (mean over all positions) or "flatten".
    """
    _require_depth(depth)
    if top not in ("pool", "flatten"):
        raise ValueError(f"top must be 'pool' or 'flatten'; got {top!r}.")
    m = len(input_shape) - 1
    if m < 1:
        raise ValueError(f"input_shape is (channels, height, width) or (channels, length); got {tuple(input_shape)}.")
    sizes, strides = _per_axis(filter, m, "filter"), _per_axis(stride, m, "stride")
    pads = [(size - 1) // 2 for size in sizes] if padding is None else _per_axis(padding, m, "padding")
    pads = tuple((p, p) for p in pads)
    phi, layers = Pointwise(dual(activation)), []
    for i in range(1, depth + 1):
        channels, hidden = (int(input_shape[0]), None) if i == 1 else (None, width)
        convolution = Convolution(channels, sizes, strides, pads, (1,) * m, padding_mode, hidden)
        layers += [(f"convolution {i}", convolution), (f"activation {i}", phi)]
        if average_pool is not None:
            layers.append((f"pooling {i}", _average_pool(m, average_pool)))
    if top == "pool":
        layers.append(("global pooling", Pool(tuple(nn.AdaptiveAvgPool1d(1) for _ in range(m)))))
    layers += [("flatten", Flatten()), ("readout", Linear(width=width))]
    return _kernel(kernel)(_chain(layers), weight_variance, bias_variance, input_shape=input_shape, **options)


def batchnorm_mlp(
    depth: int,
    batches: Tensor | Sequence[Tensor],
    readout_variance: float | Tensor = 1.0,
    *,
    kernel: str = "nngp",
    **options,
) -> BatchNormKernel:
    """A ReLU MLP with batch normalisation: a kernel between whole batches, not between points.

    Args:
        depth: number of layers of weights, batch normalisation and ReLU, before the readout.
        batches: the reference batches ``(B_i, d)``, such as ``[train_x, test_x]``.
        readout_variance: sigma_v^2 of the readout.
        kernel: "nngp" or "ntk".
        options: of :class:`BatchNormKernel`.
    """
    _require_depth(depth)
    _kernel(kernel)
    return BatchNormKernel(depth, batches, readout_variance, ntk=kernel == "ntk", **options)


def _require_depth(depth: int) -> None:
    if not isinstance(depth, int) or depth < 1:
        raise ValueError(f"depth is the number of hidden layers, 1 or more; got {depth!r}.")


def _kernel(kind: str) -> type[NNGPKernel]:
    if kind not in ("nngp", "ntk"):
        raise ValueError(f"kernel must be 'nngp' or 'ntk'; got {kind!r}.")
    return NTKKernel if kind == "ntk" else NNGPKernel


def _per_axis(value: int | Sequence[int], m: int, name: str) -> tuple[int, ...]:
    values = (value,) * m if isinstance(value, int) else tuple(value)
    if len(values) != m:
        raise ValueError(f"{name} has {len(values)} entries for {m} axes of positions.")
    return values


def _chain(layers: list[tuple[str, Callable]]) -> Program:
    """A program of one step after the other."""
    steps, before, index = [], "x", 0
    for name, layer in layers:
        weighted = isinstance(layer, Linear | Convolution)
        steps.append(Step(name, name, (before,), layer, None, index if weighted else None))
        before, index = name, index + weighted
    return Program(tuple(steps))
