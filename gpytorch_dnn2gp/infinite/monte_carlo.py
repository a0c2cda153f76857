"""Infinite width against finite nets: the same module, wide, its weights drawn many times.

    NNGP   f f^T / width                              for the outputs f of one draw, as many as the net is wide
    NTK    sum over weights of (df/dw) (df'/dw)       for one output; a weight of variance s counts s times

Both converge to the kernel: the spread of one draw falls as 1/sqrt(width), the bias as 1/width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import tiling
from ..plotting import ALEATORIC, EPISTEMIC, NEUTRAL
from .kernels import NNGPKernel, NTKKernel
from .program import Program, program_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LAZY = {
    nn.Linear: nn.LazyLinear,
    nn.Conv1d: nn.LazyConv1d,
    nn.Conv2d: nn.LazyConv2d,
    nn.Conv3d: nn.LazyConv3d,
}
_CONVOLUTION = ("kernel_size", "stride", "padding", "dilation", "padding_mode")


@dataclass(frozen=True)
class MonteCarlo:
    """What :func:`monte_carlo` found.

    Attributes:
        kernel: ``(n, n)``, at infinite width.
        widths: W of them.
        draws: ``(W, D, n, n)``, the kernel of each draw of the weights.
    """

    kernel: Tensor
    widths: tuple[int, ...]
    draws: Tensor

    @property
    def mean(self) -> Tensor:
        """Over draws, ``(W, n, n)``."""
        return self.draws.mean(1)

    @property
    def error(self) -> Tensor:
        """Distance of the mean from the kernel, relative, in the Frobenius norm, ``(W,)``; :attr:`noise` is in it."""
        return self._relative(self.mean - self.kernel)

    @property
    def spread(self) -> Tensor:
        """Root mean square distance of one draw from the mean, relative, ``(W,)``."""
        away = self._relative(self.draws - self.mean.unsqueeze(1)).square().sum(1)
        return (away / max(1, self.draws.shape[1] - 1)).sqrt()

    @property
    def noise(self) -> Tensor:
        """What of :attr:`error` chance alone explains: spread / sqrt(D), ``(W,)``."""
        return self.spread / math.sqrt(self.draws.shape[1])

    def _relative(self, difference: Tensor) -> Tensor:
        return difference.flatten(-2).norm(dim=-1) / self.kernel.norm()

    def plot(self, ax: Axes | None = None) -> Axes:
        """Error and spread against width, both logarithmic, beside lines of slope -1 and -1/2."""
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        widths = torch.tensor(self.widths, dtype=torch.float64)
        for values, color, label, slope in (
            (self.spread, ALEATORIC, "spread of one draw", -0.5),
            (self.error, EPISTEMIC, "error of the mean", -1.0),
        ):
            ax.plot(widths, values.cpu(), "o-", color=color, label=label)
            line = float(values[0]) * (widths / widths[0]) ** slope
            ax.plot(widths, line, "--", color=color, linewidth=0.8, label=f"slope {slope:g}")
        ax.plot(widths, self.noise.cpu(), ":", color=NEUTRAL, label="chance alone, in the mean")
        ax.set(xscale="log", yscale="log", xlabel="width", ylabel="relative distance from the kernel")
        ax.legend()
        return ax

    def __repr__(self) -> str:
        rows = zip(self.widths, self.error.tolist(), self.noise.tolist(), self.spread.tolist())
        lines = [f"{w:>8} {e:>10.2e} {c:>10.2e} {s:>10.2e}" for w, e, c, s in rows]
        return "\n".join([f"{'width':>8} {'error':>10} {'chance':>10} {'spread':>10}", *lines])


def monte_carlo(
    net: nn.Module,
    x: Tensor,
    width: int | Sequence[int] = (32, 128, 512),
    draws: int = 100,
    kernel: NNGPKernel | None = None,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> MonteCarlo:
    """Compare the infinite-width kernel of ``net`` with wide random nets of the same module.

    Args:
        net: copied, not changed. All its layers with weights get ``width`` units, or channels; its ``forward`` may not
            assume sizes.
        x: ``(n, d)``; images flattened, as for the kernel.
        width: one, or several, which show the convergence.
        draws: of all weights, for each width.
        kernel: whose variances are drawn from; an :class:`NTKKernel` is compared with the gradients of the nets. By
            default ``NNGPKernel(net)``.
        generator: of the draws.
        progress: True, False, or None for a bar on terminals only.

    Raises:
        ValueError: for an NTK in the standard parameterisation, which grows with the width, or nets of several sizes.
    """
    kernel = NNGPKernel(net).to(x) if kernel is None else kernel
    widths = (int(width),) if isinstance(width, int) else tuple(int(w) for w in width)
    if not widths or min(widths) < 1 or draws < 1:
        raise ValueError(f"widths and draws must be positive; got width={width}, draws={draws}.")
    ntk = isinstance(kernel, NTKKernel)
    if ntk and kernel.parameterization != "ntk":
        raise ValueError(
            "The NTK in the standard parameterization grows with the width; compare parameterization='ntk'."
        )
    if kernel.batch_shape or x.dim() != 2:
        raise ValueError("A batch of kernels or of inputs cannot be compared; take them one by one.")
    program = program_of(net)
    if program.layers != kernel.layers:
        raise ValueError(f"The kernel is of another net: its layers with weights are {kernel.layers}.")
    with torch.no_grad():
        exact = kernel(x).to_dense()
        w, b = (v.expand(len(program.layers)) for v in (kernel.weight_variance, kernel.bias_variance))
    x = x.unflatten(-1, kernel.input_shape) if kernel.input_shape else x
    found = []
    for size in widths:
        wide = _widened(net, program, size, 1 if ntk else size, x).train(kernel.dropout)
        layers = [wide.get_submodule(step.module) for step in program.steps if step.index is not None]
        estimates = []
        for _ in tiling.progress(range(draws), f"Width {size}", progress):
            _draw(layers, w, b, generator)
            if ntk:
                estimates.append(_ntk(wide, layers, x, w, b))
            else:
                with torch.no_grad():
                    f = wide(x).flatten(1)
                estimates.append(f @ f.mT / f.shape[1])
        found.append(torch.stack(estimates))
    return MonteCarlo(exact, widths, torch.stack(found))


def _widened(net: nn.Module, program: Program, width: int, outputs: int, x: Tensor) -> nn.Module:
    """A copy whose layers are ``width`` wide, its readouts ``outputs``."""
    readouts = _readouts(program)
    wide = copy.deepcopy(net).to(x)
    for step in program.steps:
        if step.index is None:
            continue
        old = wide.get_submodule(step.module)
        make = next((lazy for kind, lazy in _LAZY.items() if type(old) is kind), None)
        if make is None:
            raise ValueError(
                f"{step.place} is a layer of your own, which cannot be made wider; compare a net without it."
            )
        options = {name: getattr(old, name) for name in _CONVOLUTION if hasattr(old, name)}
        size = outputs if step.name in readouts else width
        new = make(size, bias=old.bias is not None, dtype=x.dtype, device=x.device, **options)
        wide.set_submodule(step.module, new)
    for name, old in list(wide.named_modules()):
        if isinstance(old, nn.LayerNorm):
            wide.set_submodule(name, _WideNorm(old))
        elif isinstance(old, nn.GroupNorm):
            new = nn.GroupNorm(old.num_groups, width, old.eps, old.affine, dtype=x.dtype, device=x.device)
            wide.set_submodule(name, new)
    with torch.no_grad():
        wide.eval()(x[:1])
    weights = {step.module for step in program.steps if step.index is not None}
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    for name, p in wide.named_parameters():  # those of norms count as fixed
        p.requires_grad_(name in trained and name.rpartition(".")[0] in weights)
    return wide


class _WideNorm(nn.Module):
    """Layer normalisation over as many axes as the given one, whatever their sizes."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.num_axes, self.eps, self.affine = len(norm.normalized_shape), norm.eps, norm.elementwise_affine
        self.has_bias = norm.bias is not None
        self.weight = self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape[-self.num_axes :]
        if self.affine and self.weight is None:
            self.weight = nn.Parameter(x.new_ones(shape))
            self.bias = nn.Parameter(x.new_zeros(shape)) if self.has_bias else None
        return nn.functional.layer_norm(x, shape, self.weight, self.bias, self.eps)


def _readouts(program: Program) -> set[str]:
    """Layers with weights from which no other one is met on the way to the output."""
    steps = {step.name: step for step in program.steps}
    found, waiting = set(), [program.steps[-1].name]
    while waiting:
        step = steps.get(waiting.pop())
        if step is not None and step.index is not None:
            found.add(step.name)
        elif step is not None:
            waiting += step.inputs
    return found


@torch.no_grad()
def _draw(layers: list[nn.Module], w: Tensor, b: Tensor, generator: torch.Generator | None) -> None:
    for layer, weight, bias in zip(layers, w, b):
        layer.weight.normal_(0, math.sqrt(weight / layer.weight[0].numel()), generator=generator)
        if layer.bias is not None:
            layer.bias.normal_(0, 1, generator=generator).mul_(bias.sqrt())


def _ntk(wide: nn.Module, layers: list[nn.Module], x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Sum over all weights of the products of their gradients, each times its variance."""
    scales = {}
    for layer, weight, bias in zip(layers, w, b):
        scales[id(layer.weight)] = weight / layer.weight[0].numel()
        if layer.bias is not None:
            scales[id(layer.bias)] = bias
    parameters = [p for p in wide.parameters() if p.requires_grad]
    with torch.enable_grad():
        f = wide(x).flatten()
        rows = [torch.autograd.grad(y, parameters, retain_graph=True) for y in f]
    total = 0
    for p, *gradients in zip(parameters, *rows):
        J = torch.stack([g.flatten() for g in gradients])
        total = total + scales[id(p)] * (J @ J.mT)
    return total
