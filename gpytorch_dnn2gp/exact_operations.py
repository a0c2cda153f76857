"""Operations computed from their definitions where torch's own batching rules give wrong derivatives.

Under two nested ``vmap`` (examples, and outputs), as per-example Jacobians want it, torch 2.6 to 2.13 mix examples up

    in the derivative of PReLU (now and then raising an error instead),
    in the derivative of the derivative of layer norm and instance norm, which gradients of kernels in x need.

Nothing else of some forty layers was found wrong; ``jacobians.py`` compares with plain autograd once for every net.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class ExactOperations(TorchFunctionMode):
    """While it is active, the operations above are made of elementary ones."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return _EXACT.get(func, func)(*args, **(kwargs or {}))


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """``max(x, 0) + w min(x, 0)``."""
    if weight.numel() > 1 and input.dim() > 2:  # one for each entry of axis 1
        weight = weight.reshape(-1, *[1] * (input.dim() - 2))
    return torch.where(input > 0, input, weight * input)


def layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * w + b`` over the last axes."""
    out = _standardized(input, tuple(range(-len(normalized_shape), 0)), eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Every channel of every example by its own mean and variance, or by running ones."""
    shape = (-1, *[1] * (input.dim() - 2))
    if use_input_stats:
        out = _standardized(input, tuple(range(2, input.dim())), eps)
    else:
        out = (input - running_mean.reshape(shape)) * (running_var.reshape(shape) + eps).rsqrt()
    out = out if weight is None else out * weight.reshape(shape)
    return out if bias is None else out + bias.reshape(shape)


def _standardized(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(axes, keepdim=True)
    return centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()


_EXACT = {
    torch.prelu: prelu,
    torch.Tensor.prelu: prelu,
    torch.layer_norm: layer_norm,
    functional.layer_norm: layer_norm,
    functional.instance_norm: instance_norm,
}
