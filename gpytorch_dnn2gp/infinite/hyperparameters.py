"""What all kernels of infinitely wide nets share: named hyperparameters with constraints and priors, and the call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch
from gpytorch.constraints import GreaterThan, Interval, Positive
from gpytorch.kernels import Kernel
from gpytorch.priors import Prior
from torch import Tensor

from ..numerics import in_plain_mode, require_finite
from .matrix import Recursion, covariance, variances

Numbers = float | Sequence[float] | Tensor
_OPTIONS = inspect.signature(Kernel).parameters.keys() - {"kwargs"}


def positive() -> Positive:
    """Positive, optimised in the logarithm."""
    return Positive(transform=torch.exp, inv_transform=torch.log)


def not_negative() -> GreaterThan:
    """Zero or more, optimised in the root. At zero its gradient is zero: what shall be learned starts above."""
    return GreaterThan(0.0, transform=torch.square, inv_transform=torch.sqrt)


def any_number() -> Interval:
    """Anything."""
    return Interval(-torch.inf, torch.inf, transform=lambda x: x, inv_transform=lambda x: x)


class Hyperparameter:
    """An attribute of a kernel, ``(*batch_shape, count)``: read it, set it, learn it.

    The parameter behind it is ``raw_<name>``, made by :meth:`HyperparameterKernel._register`.

    Args:
        doc: its meaning.
        range: "positive", "zero or more" or "any".
        each: what has an entry of its own where there are several, for messages.
    """

    CONSTRAINTS = {"positive": positive, "zero or more": not_negative, "any": any_number}

    def __init__(self, doc: str, range: str = "positive", each: str = "layers with weights") -> None:
        self.__doc__, self.range, self.each = doc, range, each

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, kernel: HyperparameterKernel | None, owner: type | None = None) -> Tensor | Hyperparameter:
        if kernel is None:
            return self
        raw = getattr(kernel, f"raw_{self.name}")
        return getattr(kernel, f"raw_{self.name}_constraint").transform(raw)

    def __set__(self, kernel: HyperparameterKernel, value: Numbers) -> None:
        raw = getattr(kernel, f"raw_{self.name}")
        value = torch.as_tensor(value, dtype=raw.dtype, device=raw.device)
        require_finite(value.detach(), self.name)
        if self.range != "any" and ((value < 0).any() or (self.range == "positive" and (value == 0).any())):
            raise ValueError(f"{self.name} must be {self.range}; got {value.min().item():g}.")
        if 0 < value.dim() <= len(kernel.batch_shape):
            value = value.unsqueeze(-1)
        try:
            value = value.expand(raw.shape)
        except RuntimeError:
            count = f"one entry for each of the {raw.shape[-1]} {self.each}" if raw.shape[-1] > 1 else "a number"
            batch = f"; with batch_shape the shape is {tuple(raw.shape)}" if kernel.batch_shape else ""
            raise ValueError(f"{self.name} has shape {tuple(value.shape)}; it must be {count}{batch}.") from None
        constraint = getattr(kernel, f"raw_{self.name}_constraint")
        kernel.initialize(**{f"raw_{self.name}": constraint.inverse_transform(value)})


class HyperparameterKernel(Kernel):
    """A kernel whose subclasses declare each :class:`Hyperparameter` in their body and register it in ``__init__``."""

    has_lengthscale = False
    is_stationary = False

    def __init__(self, batch_shape: torch.Size | None = None, **kwargs) -> None:
        for name in kwargs.keys() - _OPTIONS:  # GPyTorch would take any, and ignore it
            raise TypeError(f"{type(self).__name__} got an unexpected option {name!r}.")
        super().__init__(batch_shape=torch.Size() if batch_shape is None else torch.Size(batch_shape), **kwargs)
        self._names: tuple[str, ...] = ()

    def _register(
        self,
        name: str,
        value: Tensor,
        count: int = 1,
        constraint: Interval | None = None,
        prior: Prior | None = None,
    ) -> None:
        """Make the parameter behind a :class:`Hyperparameter` of this class, with ``count`` entries."""
        kind = getattr(type(self), name)
        raw = torch.nn.Parameter(torch.zeros(*self.batch_shape, count, dtype=value.dtype))
        self.register_parameter(f"raw_{name}", raw)
        self.register_constraint(f"raw_{name}", constraint or Hyperparameter.CONSTRAINTS[kind.range]())
        setattr(self, name, value)
        self._names += (name,)
        if prior is not None:
            self.register_prior(f"{name}_prior", prior, _Getter(name), _Setter(name))

    def _register_all(
        self,
        values: dict[str, Tensor],
        counts: Mapping[str, int],
        priors: dict[str, Prior] | None,
        constraints: dict[str, Interval] | None,
    ) -> None:
        """:meth:`_register` by name: ``counts`` entries where several are given, else one."""
        priors, constraints = priors or {}, constraints or {}
        for name in (*priors, *constraints):
            if name not in values:
                raise ValueError(f"There is no hyperparameter {name!r}; there are {', '.join(values)}.")
        for name, value in values.items():
            several = value.dim() > len(self.batch_shape) and value.shape[-1] > 1
            self._register(name, value, counts.get(name, 1) if several else 1, constraints.get(name), priors.get(name))

    @property
    def _raw(self) -> Tensor:
        return getattr(self, f"raw_{self._names[0]}")

    def _apply(self, fn, *args, **kwargs):
        dtype = fn(self._raw.detach().flatten()[:0]).dtype
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{type(self).__name__} cannot be {dtype}, too coarse: keep float32 or float64.")
        return super()._apply(fn, *args, **kwargs)


class InfiniteKernel(HyperparameterKernel):
    """A kernel that is made by a :class:`matrix.Recursion`.

    Subclasses declare each :class:`Hyperparameter` in their body and register it in ``__init__``; the recursion finds
    them in ``run.hyper``, by name.

    Args:
        recursion: what computes blocks of the matrix.
        input_shape: of one input, as the recursion sees it; inputs travel flattened.
        ntk: None for the NNGP, else the parameterisation.
        dropout: whether masks of dropout layers are drawn.
        progress: True, False, or None for a bar on terminals, in long work only.
        batch_shape: of hyperparameters.
        kwargs: of ``gpytorch.kernels.Kernel``, such as ``active_dims``.
    """

    def __init__(
        self,
        recursion: Recursion,
        *,
        input_shape: Sequence[int] | None = None,
        ntk: str | None = None,
        dropout: bool = False,
        progress: bool | None = None,
        batch_shape: torch.Size | None = None,
        **kwargs,
    ) -> None:
        super().__init__(batch_shape, **kwargs)
        self.program = recursion
        self.input_shape = None if input_shape is None else tuple(int(size) for size in input_shape)
        self.dropout, self.progress, self._ntk = dropout, progress, ntk

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:
        """Rows of the matrix for each input: one, or one for each token of a sequence."""
        return self.program.rows(self.input_shape or x1.shape[-1:])

    @in_plain_mode
    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **params) -> Tensor:
        """See ``gpytorch.kernels.Kernel.forward``."""
        if last_dim_is_batch:
            raise RuntimeError(
                f"{type(self).__name__} does not accept last_dim_is_batch: a net reads all dimensions at once."
            )
        same = same_inputs(x1, x2)
        for x in (x1,) if same else (x1, x2):
            self._require_inputs(x)
        batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2], self.batch_shape)
        x1 = x1.expand(*batch, *x1.shape[-2:])
        x2 = x1 if same else x2.expand(*batch, *x2.shape[-2:])
        hyper = {name: getattr(self, name) for name in self._names}
        if self.batch_shape:
            hyper = {name: v.expand(*batch, v.shape[-1]) for name, v in hyper.items()}
        options = {"input_shape": self.input_shape, "ntk": self._ntk, "dropout": self.dropout}
        if diag and same:
            return variances(self.program, x1, hyper, **options)
        if diag:
            x1, x2 = x1.unsqueeze(-2), x2.unsqueeze(-2)
            if self.batch_shape:
                hyper = {name: v.unsqueeze(-2).expand(*x1.shape[:-2], -1) for name, v in hyper.items()}
            K = covariance(self.program, x1, x2, hyper, **options, progress=False)
            return K.diagonal(dim1=-2, dim2=-1).flatten(-2)
        return covariance(self.program, x1, None if same else x2, hyper, **options, progress=self.progress)

    def extra_repr(self) -> str:
        """The net, as it was understood."""
        given = f"input_shape={self.input_shape}, dropout={self.dropout}"
        given += f", parameterization={self._ntk!r}" if self._ntk else ""
        return f"{given}\n{self.program.describe()}"

    def _require_inputs(self, x: Tensor) -> None:
        if x.dtype != self._raw.dtype or x.device != self._raw.device:
            raise ValueError(
                f"Inputs are {x.dtype} on {x.device}, but the kernel is {self._raw.dtype} on {self._raw.device}. "
                "Convert one of them, e.g. kernel.to(x)."
            )
        self.program.require_inputs(x.detach())
        size = None if self.input_shape is None else torch.Size(self.input_shape).numel()
        if size not in (None, x.shape[-1]):
            raise ValueError(f"Inputs have {x.shape[-1]} numbers each, but input_shape {self.input_shape} has {size}.")


def as_tensors(*values: Numbers, like: Sequence[Tensor] = ()) -> list[Tensor]:
    """Numbers as tensors of one dtype: float64 where any of them, or of ``like``, is; else the default dtype."""
    tensors = [t for t in (*values, *like) if isinstance(t, Tensor)]
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.get_default_dtype()
    return [torch.as_tensor(v, dtype=dtype) for v in values]


class _Getter:
    """What GPyTorch asks a prior's hyperparameter of; a class, so that kernels can be pickled."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, kernel: HyperparameterKernel) -> Tensor:
        return getattr(kernel, self.name)


class _Setter(_Getter):
    def __call__(self, kernel: HyperparameterKernel, value: Tensor) -> None:
        setattr(kernel, self.name, value)


def same_inputs(x1: Tensor, x2: Tensor) -> bool:
    """Whether one side may stand for both, so that derivatives come out right too."""
    if x1 is x2:
        return True
    recorded = torch.is_grad_enabled() and (x1.requires_grad or x2.requires_grad)
    if recorded or x1.shape != x2.shape:
        return False
    return torch.equal(x1[..., :1, :], x2[..., :1, :]) and torch.equal(x1, x2)  # mostly the first rows tell
