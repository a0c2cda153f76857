"""GPyTorch kernels of an infinitely wide net: before training (NNGP), and of training itself (NTK).

    NNGPKernel     covariance of an output, over draws of the weights (Lee et al. 2018)
    NTKKernel      inner product of an output's gradients in the weights (Jacot et al. 2018)

Outputs of one net are independent and have the same kernel, so a kernel is made for one of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from gpytorch.constraints import Interval
from gpytorch.priors import Prior
from torch import Tensor, nn

from .hyperparameters import Hyperparameter, InfiniteKernel, as_tensors
from .program import Program, program_of

PARAMETERIZATIONS = ("ntk", "standard", "plain")


class NNGPKernel(InfiniteKernel):
    """Covariance of a net's output at infinite width, weights N(0, sigma_w^2 / fan_in), biases N(0, sigma_b^2).

    Args:
        net: a module, of which only the structure counts, not the weights or widths; it is neither kept nor changed. Or
            what :func:`fully_connected` and :func:`convolutional` make theirs of.
        weight_variance: sigma_w^2, a number, or one for each layer with weights, in the order of ``layers``.
        bias_variance: sigma_b^2, likewise; zero is allowed. Layers without biases do not read theirs.
        per_layer: whether each layer has variances of its own; None means where several are given.
        input_shape: of one input, such as (channels, height, width); inputs travel flattened.
        input_size: numbers per token, where inputs are sequences made by :func:`pack`. The net's ``forward`` takes
            tokens ``(n, L, d)`` and, if it has attention or reads states, their ``lengths``, which it hands on.
        weight_variance_prior, bias_variance_prior: GPyTorch priors.
        weight_variance_constraint, bias_variance_constraint: by default positive, and zero or more.
        dropout: whether masks of dropout layers are drawn, for each input anew, as in train mode: that adds to
            variances alone. By default they are not, as in eval mode.
        progress: True, False, or None for a bar on terminals, in long work only.
        batch_shape: of hyperparameters.
        kwargs: of ``gpytorch.kernels.Kernel``, such as ``active_dims``.

    Shapes:
        inputs ``(..., n, d)``; the matrix is ``(..., n, n')``.

    Raises:
        NotImplementedError: for a module that has no rule, with its place and how to add one.
        ValueError: for variances out of range, shared weights, or outputs that are not Gaussian; when called, also for
            variances that grow beyond the dtype, as a ``NanError`` too.
    """

    weight_variance = Hyperparameter("sigma_w^2, ``(*batch_shape, 1)`` or ``(*batch_shape, L)``.")
    bias_variance = Hyperparameter("sigma_b^2, ``(*batch_shape, 1)`` or ``(*batch_shape, L)``.", "zero or more")

    def __init__(
        self,
        net: nn.Module | Program,
        weight_variance: float | Sequence[float] | Tensor = 2.0,
        bias_variance: float | Sequence[float] | Tensor = 0.1,
        *,
        per_layer: bool | None = None,
        input_shape: Sequence[int] | None = None,
        input_size: int | None = None,
        weight_variance_prior: Prior | None = None,
        bias_variance_prior: Prior | None = None,
        weight_variance_constraint: Interval | None = None,
        bias_variance_constraint: Interval | None = None,
        dropout: bool = False,
        progress: bool | None = None,
        batch_shape: torch.Size | None = None,
        **kwargs,
    ) -> None:
        program = net if isinstance(net, Program) else program_of(net)
        if input_size is not None:
            program = program.of_sequences(input_size)
        options = {"input_shape": input_shape, "dropout": dropout, "progress": progress, "batch_shape": batch_shape}
        super().__init__(program, **options, **kwargs)
        parameters = tuple(net.parameters()) if isinstance(net, nn.Module) else ()
        w, b = as_tensors(weight_variance, bias_variance, like=parameters)
        if per_layer is None:
            per_layer = any(v.dim() > len(self.batch_shape) and v.shape[-1] > 1 for v in (w, b))
        count = len(self.layers) if per_layer else 1
        self._register("weight_variance", w, count, weight_variance_constraint, weight_variance_prior)
        self._register("bias_variance", b, count, bias_variance_constraint, bias_variance_prior)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers with weights, in the order of their variances."""
        return self.program.layers


class NTKKernel(NNGPKernel):
    """Neural tangent kernel of a net's output at infinite width.

    Args:
        net, weight_variance, bias_variance, options: see :class:`NNGPKernel`. Parameters of the net that require no
            gradient count as fixed.
        parameterization: "ntk" (weights N(0, 1), scaled by sigma_w / sqrt(fan_in) where they are used), "standard"
            (weights N(0, sigma_w^2 / fan_in) as they are, as torch has them; this NTK grows with the net's widths) or
            "plain" (weights N(0, sigma_w^2), scaled by 1 / sqrt(fan_in); Yang 2020).
    """

    def __init__(
        self,
        net: nn.Module | Program,
        weight_variance: float | Sequence[float] | Tensor = 2.0,
        bias_variance: float | Sequence[float] | Tensor = 0.1,
        *,
        parameterization: str = "ntk",
        **options,
    ) -> None:
        if parameterization not in PARAMETERIZATIONS:
            raise ValueError(f"parameterization must be 'ntk', 'standard' or 'plain'; got {parameterization!r}.")
        super().__init__(net, weight_variance, bias_variance, **options)
        self._ntk = parameterization

    @property
    def parameterization(self) -> str:
        """What the weights carry: "ntk", "standard" or "plain"."""
        return self._ntk
