"""What a layer's own Jacobian looks like, from what went into the layer and what comes back to it.

A rule is a function ``rule(module, a, g) -> {parameter: factor}`` of one call of one module:

    a    the module's input, ``(n, *shape)``, n examples, each with the shape the module saw for that one example
    g    the cotangents of its output z, ``(n, m, *output_shape)``: g[i, j] = d(row j of example i) / dz

and each factor is either the Jacobian itself, ``(n, m, *parameter.shape)`` (for scales and shifts, which are few), or
an :class:`Outer`, for a weight that multiplies:

    z_t = W a_t + b   =>   d row_j / dW = sum_t g_jt a_t^T,   d row_j / db = sum_t g_jt

over the T sites at which the weight is applied (pixels, tokens, calls). From outer products Gram matrices follow
without any object of the weight's size (``contract.py``). Rules know nothing of batching, priors or memory.

A user's own module takes part by one function:

    >>> @register(MyScale)
    ... def my_scale(module, a, g):
    ...     return {"scale": g * a[:, None]}
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

Factor = "Tensor | Outer"
Rule = Callable[[nn.Module, Tensor, Tensor], "dict[str, Tensor | Outer]"]


@dataclass(frozen=True)
class Outer:
    """``sum_t c_t a_t^T``, the Jacobian of a weight ``(d_out, d_in)``; of ``(d_in, d_out)`` if ``transposed``.

    Attributes:
        a: ``(n, T, d_in)``; integers ``(n, T)`` stand for one-hot vectors; None for ones (the Jacobian of a bias).
        c: cotangents ``(n, m, T, d_out)``. Factors of one layer that share the very same ``c`` share its products.
        transposed: whether the weight's first axis is that of ``a``.
    """

    a: Tensor | None
    c: Tensor
    transposed: bool = False


@dataclass(frozen=True)
class _Entry:
    rule: Rule
    applies: Callable[[nn.Module], bool] | None


_RULES: dict[type[nn.Module], _Entry] = {}


def register(*types: type[nn.Module], applies: Callable[[nn.Module], bool] | None = None) -> Callable[[Rule], Rule]:
    """Decorator that makes a function the rule of these types of modules; see the module's docstring.

    Subclasses that keep ``forward`` share the rule. The first Gram of every net is compared with plain autodiff, so a
    wrong rule is found, reported by a warning, and not used.

    Args:
        types: subclasses of ``nn.Module`` that take one tensor and return one.
        applies: tells for a module whether the rule holds with its settings; always by default.
    """
    for cls in types:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise TypeError(f"register wants subclasses of torch.nn.Module; got {cls!r}.")

    def decorator(rule: Rule) -> Rule:
        for cls in types:
            _RULES[cls] = _Entry(rule, applies)
        return rule

    return decorator


def find_rule(module: nn.Module) -> Rule | None:
    """The rule of a module, or None: a subclass with a ``forward`` of its own computes something else."""
    cls = type(module)
    if "forward" in vars(module):
        return None
    for base in cls.__mro__:
        entry = _RULES.get(base)
        if entry is not None:
            same = all(getattr(cls, name, None) is getattr(base, name, None) for name in ("forward", "_conv_forward"))
            return entry.rule if same and (entry.applies is None or entry.applies(module)) else None
    return None


# ---- weights that multiply


def _is_called(module: nn.Linear) -> bool:
    """``nn.MultiheadAttention`` holds a layer of this type for its weights alone and never calls it."""
    return not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


@register(nn.Linear, applies=_is_called)
def linear(module: nn.Linear, a: Tensor, g: Tensor) -> dict[str, Tensor | Outer]:
    """``z = W a + b`` at every site."""
    c = g.reshape(*g.shape[:2], -1, module.out_features)
    return {"weight": Outer(a.reshape(len(a), -1, module.in_features), c), "bias": Outer(None, c)}


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(module: nn.Conv2d, a: Tensor, g: Tensor) -> dict[str, Tensor | Outer]:
    """A linear layer at every output pixel, applied to the patch under the kernel."""
    n, m, spatial = *g.shape[:2], len(module.kernel_size)
    a = a.reshape(-1, *a.shape[-spatial - 1 :])  # examples x calls' own batch
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    a = functional.pad(a, module._reversed_padding_repeated_twice, mode=mode)
    patches = _patches(a, module.kernel_size, module.stride, module.dilation).unflatten(0, (n, -1)).flatten(1, 2)
    c = g.reshape(n, m, -1, module.out_channels, g.shape[-spatial:].numel()).mT.flatten(2, 3)  # (n, m, T, d_out)
    if module.groups == 1:
        return {"weight": Outer(patches, c), "bias": Outer(None, c)}
    return {"weight": _grouped(patches, c, module.groups).reshape(n, m, *module.weight.shape), "bias": Outer(None, c)}


@register(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def transposed_convolution(module: nn.ConvTranspose2d, a: Tensor, g: Tensor) -> dict[str, Tensor | Outer]:
    """A linear layer at every input pixel, whose cotangent is the patch of outputs that the pixel reaches."""
    n, m, spatial = *g.shape[:2], len(module.kernel_size)
    bias = g.reshape(n, m, -1, module.out_channels, g.shape[-spatial:].numel()).sum((2, 4))
    size = a.shape[-spatial:]
    a = a.reshape(n, -1, module.in_channels, size.numel()).mT.flatten(1, 2)  # (n, T, d_in)
    z = g.reshape(-1, *g.shape[-spatial - 1 :])
    z = functional.pad(z, [p for p in reversed(module.padding) for _ in range(2)])
    patches = _patches(z, module.kernel_size, module.stride, module.dilation, size)
    c = patches.reshape(n, m, -1, patches.shape[-1])  # (n, m, T, out_channels * kernel)
    if module.groups == 1:
        return {"weight": Outer(a, c, transposed=True), "bias": bias}
    weight = _grouped(a, c, module.groups, transposed=True).reshape(n, m, *module.weight.shape)
    return {"weight": weight, "bias": bias}


def _patches(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    most: torch.Size | None = None,
) -> Tensor:
    """Patches of ``x`` ``(N, channels, *size)`` under the kernel, ``(N, number of places, channels * kernel)``.

    ``most``: at most so many places along each axis.
    """
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
        if most is not None:
            x = x.narrow(axis, 0, most[axis - 2])
    spatial = len(kernel)
    axes = range(x.dim())
    places, window = axes[2 : 2 + spatial], axes[2 + spatial :]
    # copied along the places, which lie side by side in memory, many times faster than along the short window
    return x.permute(0, 1, *window, *places).reshape(len(x), x.shape[1] * x.shape[-spatial:].numel(), -1).mT


def _grouped(a: Tensor, c: Tensor, groups: int, transposed: bool = False) -> Tensor:
    """The Jacobian ``(n, m, groups, d_out, d_in)`` of a weight whose groups of outputs see their own inputs."""
    a, c = a.unflatten(-1, (groups, -1)), c.unflatten(-1, (groups, -1))
    return torch.einsum("ntgi,nmtgo->nmgio" if transposed else "ntgi,nmtgo->nmgoi", a, c)


def _gradient_is_plain(module: nn.Embedding) -> bool:
    return module.max_norm is None and not module.scale_grad_by_freq


@register(nn.Embedding, applies=_gradient_is_plain)
def embedding(module: nn.Embedding, a: Tensor, g: Tensor) -> dict[str, Tensor | Outer]:
    """A linear layer of one-hot inputs; the row of ``padding_idx`` gets no gradient."""
    tokens = a.reshape(len(a), -1)
    c = g.reshape(*g.shape[:2], -1, module.embedding_dim)
    if module.padding_idx is not None:
        c = c * (tokens != module.padding_idx)[:, None, :, None]
    return {"weight": Outer(tokens, c, transposed=True)}


# ---- scales and shifts: z = w * xhat + b, so dz/dw = xhat, summed over all places that share w


def _scale_and_shift(x_hat: Tensor, g: Tensor, axes: tuple[int, ...]) -> dict[str, Tensor | Outer]:
    """``axes``: those of ``x_hat`` that share a weight."""
    if not axes:
        return {"weight": g * x_hat[:, None], "bias": g}
    axes = tuple(axis + 1 for axis in axes)  # g has the rows m at axis 1
    return {"weight": (g * x_hat[:, None]).sum(axes), "bias": g.sum(axes)}


@register(nn.LayerNorm)
def layer_norm(module: nn.LayerNorm, a: Tensor, g: Tensor) -> dict[str, Tensor | Outer]:
    """Normalised over the last axes, weights shared by all others."""
    x_hat = functional.layer_norm(a, module.normalized_shape, eps=module.eps)
    return _scale_and_shift(x_hat, g, tuple(range(1, a.dim() - len(module.normalized_shape))))


@register(nn.RMSNorm)
def rms_norm(module: nn.RMSNorm, a: Tensor, g: Tensor) -> dict[str, Tensor | Outer]:
    """As layer norm, without mean and shift."""
    x_hat = functional.rms_norm(a, module.normalized_shape, eps=module.eps)
    factors = _scale_and_shift(x_hat, g, tuple(range(1, a.dim() - len(module.normalized_shape))))
    return {"weight": factors["weight"]}


@register(nn.GroupNorm)
def group_norm(module: nn.GroupNorm, a: Tensor, g: Tensor) -> dict[str, Tensor | Outer]:
    """Channels are axis 1 of what the module sees, axis 2 here."""
    x_hat = functional.group_norm(a.flatten(0, 1), module.num_groups, eps=module.eps).reshape(a.shape)
    return _scale_and_shift(x_hat, g, (1, *range(3, a.dim())))


@register(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def batch_norm(module: nn.BatchNorm2d, a: Tensor, g: Tensor) -> dict[str, Tensor | Outer]:
    """In eval mode: normalised by running statistics."""
    shape = (-1, *[1] * (a.dim() - 3))
    x_hat = (a - module.running_mean.view(shape)) * (module.running_var.view(shape) + module.eps).rsqrt()
    return _scale_and_shift(x_hat, g, (1, *range(3, a.dim())))


@register(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def instance_norm(module: nn.InstanceNorm2d, a: Tensor, g: Tensor) -> dict[str, Tensor | Outer]:
    """Each channel of each image by its own statistics, or by running ones."""
    spatial = {nn.InstanceNorm1d: 1, nn.InstanceNorm2d: 2, nn.InstanceNorm3d: 3}
    dims = next(dims for cls, dims in spatial.items() if isinstance(module, cls))
    channel = a.dim() - dims - 1
    images = a.reshape(-1, *a.shape[channel:])
    x_hat = functional.instance_norm(
        images,
        module.running_mean,
        module.running_var,
        use_input_stats=not module.track_running_stats,
        eps=module.eps,
    )
    return _scale_and_shift(x_hat.reshape(a.shape), g, (*range(1, channel), *range(channel + 1, a.dim())))


@register(nn.PReLU)
def prelu(module: nn.PReLU, a: Tensor, g: Tensor) -> dict[str, Tensor | Outer]:
    """``z = max(a, 0) + w min(a, 0)``; one weight, or one for each entry of axis 1 of what the module sees."""
    weight = g * a.clamp(max=0)[:, None]
    if module.num_parameters == 1:
        return {"weight": weight.flatten(2).sum(-1, keepdim=True)}
    return {"weight": weight.sum((2, *range(4, weight.dim())))}
