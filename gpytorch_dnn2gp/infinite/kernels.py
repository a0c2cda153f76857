"""GPyTorch kernels of an infinitely wide net: before training (NNGP), and of training itself (NTK).

    NNGPKernel     covariance of an output, over draws of the weights (Lee et al. 2018)
    NTKKernel      inner product of an output's gradients in the weights (Jacot et al. 2018)

Outputs of one net are independent and have the same kernel, so a kernel is made for one of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from gpytorch.constraints import GreaterThan, Interval, Positive
from gpytorch.kernels import Kernel
from gpytorch.priors import Prior
from torch import Tensor, nn

from ..numerics import in_plain_mode, require_finite
from .program import Program, covariance, program_of, variances


def positive() -> Positive:
    """Positive, optimised in the logarithm."""
    return Positive(transform=torch.exp, inv_transform=torch.log)


def not_negative() -> GreaterThan:
    """Zero or more, optimised in the root. At zero its gradient is zero: what shall be learned starts above."""
    return GreaterThan(0.0, transform=torch.square, inv_transform=torch.sqrt)


class NNGPKernel(Kernel):
    """Covariance of a net's output at infinite width, weights N(0, sigma_w^2 / fan_in), biases N(0, sigma_b^2).

    Args:
        net: a module, of which only the structure counts, not the weights or widths; it is neither kept nor changed. Or
            what :func:`fully_connected` and :func:`convolutional` make theirs of.
        weight_variance: sigma_w^2, a number, or one for each layer with weights, in the order of ``layers``.
        bias_variance: sigma_b^2, likewise; zero is allowed. Layers without biases do not read theirs.
        per_layer: whether each layer has variances of its own; None means where several are given.
        input_shape: of one input, such as (channels, height, width); inputs travel flattened.
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

    has_lengthscale = False
    is_stationary = False
    _ntk: str | None = None

    def __init__(
        self,
        net: nn.Module | Program,
        weight_variance: float | Sequence[float] | Tensor = 2.0,
        bias_variance: float | Sequence[float] | Tensor = 0.1,
        *,
        per_layer: bool | None = None,
        input_shape: Sequence[int] | None = None,
        weight_variance_prior: Prior | None = None,
        bias_variance_prior: Prior | None = None,
        weight_variance_constraint: Interval | None = None,
        bias_variance_constraint: Interval | None = None,
        dropout: bool = False,
        progress: bool | None = None,
        batch_shape: torch.Size | None = None,
        **kwargs,
    ) -> None:
        batch_shape = torch.Size() if batch_shape is None else torch.Size(batch_shape)
        super().__init__(batch_shape=batch_shape, **kwargs)
        self.program = net if isinstance(net, Program) else program_of(net)
        self.input_shape = None if input_shape is None else tuple(int(size) for size in input_shape)
        self.dropout, self.progress = dropout, progress
        parameters = net.parameters() if isinstance(net, nn.Module) else ()
        tensors = [t for t in (weight_variance, bias_variance, *parameters) if isinstance(t, Tensor)]
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.get_default_dtype()
        values = [torch.as_tensor(v, dtype=dtype) for v in (weight_variance, bias_variance)]
        if per_layer is None:
            per_layer = any(v.dim() > len(batch_shape) and v.shape[-1] > 1 for v in values)
        self._register("weight_variance", values[0], per_layer, weight_variance_constraint or positive())
        self._register("bias_variance", values[1], per_layer, bias_variance_constraint or not_negative())
        for name, prior in (("weight_variance", weight_variance_prior), ("bias_variance", bias_variance_prior)):
            if prior is not None:
                self.register_prior(f"{name}_prior", prior, _Getter(name), _Setter(name))

    def _register(self, name: str, value: Tensor, per_layer: bool, constraint: Interval) -> None:
        count = len(self.layers) if per_layer else 1
        raw = nn.Parameter(torch.zeros(*self.batch_shape, count, dtype=value.dtype))
        self.register_parameter(f"raw_{name}", raw)
        self.register_constraint(f"raw_{name}", constraint)
        self._set(name, value)

    # ---- hyperparameters

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers with weights, in the order of their variances."""
        return self.program.layers

    @property
    def weight_variance(self) -> Tensor:
        """sigma_w^2, ``(*batch_shape, 1)`` or ``(*batch_shape, L)``."""
        return self.raw_weight_variance_constraint.transform(self.raw_weight_variance)

    @weight_variance.setter
    def weight_variance(self, value: float | Sequence[float] | Tensor) -> None:
        self._set("weight_variance", value)

    @property
    def bias_variance(self) -> Tensor:
        """sigma_b^2, ``(*batch_shape, 1)`` or ``(*batch_shape, L)``."""
        return self.raw_bias_variance_constraint.transform(self.raw_bias_variance)

    @bias_variance.setter
    def bias_variance(self, value: float | Sequence[float] | Tensor) -> None:
        self._set("bias_variance", value)

    def _set(self, name: str, value: float | Sequence[float] | Tensor) -> None:
        raw = getattr(self, f"raw_{name}")
        value = torch.as_tensor(value, dtype=raw.dtype, device=raw.device)
        require_finite(value.detach(), name)
        zero_allowed = name == "bias_variance"
        if (value < 0).any() or (not zero_allowed and (value == 0).any()):
            raise ValueError(
                f"{name} must be {'zero or more' if zero_allowed else 'positive'}; got {value.min().item():g}."
            )
        if 0 < value.dim() <= len(self.batch_shape):
            value = value.unsqueeze(-1)
        try:
            value = value.expand(raw.shape)
        except RuntimeError:
            count = (
                f"one entry for each of the {raw.shape[-1]} layers with weights" if raw.shape[-1] > 1 else "a number"
            )
            batch = f"; with batch_shape the shape is {tuple(raw.shape)}" if self.batch_shape else ""
            raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {count}{batch}.") from None
        constraint = getattr(self, f"raw_{name}_constraint")
        self.initialize(**{f"raw_{name}": constraint.inverse_transform(value)})

    # ---- the kernel

    @in_plain_mode
    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **params) -> Tensor:
        """See ``gpytorch.kernels.Kernel.forward``."""
        if last_dim_is_batch:
            raise RuntimeError(
                f"{type(self).__name__} does not accept last_dim_is_batch: a net reads all dimensions at once."
            )
        same = _same_inputs(x1, x2)
        for x in (x1,) if same else (x1, x2):
            self._require_inputs(x)
        batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2], self.batch_shape)
        x1 = x1.expand(*batch, *x1.shape[-2:])
        x2 = x1 if same else x2.expand(*batch, *x2.shape[-2:])
        w, b = (
            v.expand(*batch, v.shape[-1]) if self.batch_shape else v for v in (self.weight_variance, self.bias_variance)
        )
        options = {"input_shape": self.input_shape, "ntk": self._ntk, "dropout": self.dropout}
        if diag and same:
            return variances(self.program, x1, w, b, **options)
        if diag:
            x1, x2 = x1.unsqueeze(-2), x2.unsqueeze(-2)
            w, b = (v.unsqueeze(-2).expand(*x1.shape[:-2], -1) if self.batch_shape else v for v in (w, b))
            return covariance(self.program, x1, x2, w, b, **options, progress=False)[..., 0, 0]
        return covariance(self.program, x1, None if same else x2, w, b, **options, progress=self.progress)

    def extra_repr(self) -> str:
        """The net, as it was understood."""
        given = f"input_shape={self.input_shape}, dropout={self.dropout}"
        given += f", parameterization={self._ntk!r}" if self._ntk else ""
        return f"{given}\n{self.program.describe()}"

    def _require_inputs(self, x: Tensor) -> None:
        raw = self.raw_weight_variance
        if x.dtype != raw.dtype or x.device != raw.device:
            raise ValueError(
                f"Inputs are {x.dtype} on {x.device}, but the kernel is {raw.dtype} on {raw.device}. Convert one of "
                "them, e.g. kernel.to(x)."
            )
        require_finite(x.detach(), "x", "Remove or impute these rows first.")
        size = None if self.input_shape is None else torch.Size(self.input_shape).numel()
        if size not in (None, x.shape[-1]):
            raise ValueError(f"Inputs have {x.shape[-1]} numbers each, but input_shape {self.input_shape} has {size}.")

    def _apply(self, fn, *args, **kwargs):
        dtype = fn(self.raw_weight_variance.detach().flatten()[:0]).dtype
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{type(self).__name__} cannot be {dtype}, too coarse: keep float32 or float64.")
        return super()._apply(fn, *args, **kwargs)


class NTKKernel(NNGPKernel):
    """Neural tangent kernel of a net's output at infinite width.

    Args:
        net, weight_variance, bias_variance, options: see :class:`NNGPKernel`. Parameters of the net that require no
            gradient count as fixed.
        parameterization: "ntk" (weights N(0, 1), scaled by sigma_w / sqrt(fan_in) where they are used) or "standard"
            (weights N(0, sigma_w^2 / fan_in) as they are, as torch has them; this NTK grows with the net's widths).
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
        if parameterization not in ("ntk", "standard"):
            raise ValueError(f"parameterization must be 'ntk' or 'standard'; got {parameterization!r}.")
        super().__init__(net, weight_variance, bias_variance, **options)
        self._ntk = parameterization

    @property
    def parameterization(self) -> str:
        """What the weights carry: "ntk" or "standard"."""
        return self._ntk


class _Getter:
    """What GPyTorch asks a prior's hyperparameter of; a class, so that kernels can be pickled."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, kernel: NNGPKernel) -> Tensor:
        return getattr(kernel, self.name)


class _Setter(_Getter):
    def __call__(self, kernel: NNGPKernel, value: Tensor) -> None:
        setattr(kernel, self.name, value)


def _same_inputs(x1: Tensor, x2: Tensor) -> bool:
    """Whether one side may stand for both, so that derivatives come out right too."""
    if x1 is x2:
        return True
    recorded = torch.is_grad_enabled() and (x1.requires_grad or x2.requires_grad)
    if recorded or x1.shape != x2.shape:
        return False
    return torch.equal(x1[..., :1, :], x2[..., :1, :]) and torch.equal(x1, x2)  # mostly the first rows tell
