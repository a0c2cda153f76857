"""Infinite width against finite nets: the same module, wide, its weights drawn many times.

    NNGP   f f^T / width                              for the outputs f of one draw, as many as the net is wide
    NTK    sum over weights of (df/dw) (df'/dw)       for one output; a weight of variance s counts s times

Both converge to the kernel: the spread of one draw falls as 1/sqrt(width), the bias as 1/width. Of recurrent
and batch-normalised nets the states h are compared, which stand for outputs of all readouts: sigma_v^2 h h^T / width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import tiling
from ..plotting import ALEATORIC, EPISTEMIC, NEUTRAL
from .attention import Attention
from .batchnorm import BatchNormKernel
from .hyperparameters import InfiniteKernel
from .kernels import NNGPKernel
from .program import Program, program_of
from .recurrent_kernels import RecurrentKernel, recurrent
from .sequences import unpack

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
    net: nn.Module | None,
    x: Tensor,
    width: int | Sequence[int] = (32, 128, 512),
    draws: int = 100,
    kernel: InfiniteKernel | BatchNormKernel | None = None,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> MonteCarlo:
    """Compare the infinite-width kernel of ``net`` with wide random nets of the same module.

    Args:
        net: copied, not changed. All its layers with weights get ``width`` units, or channels; its ``forward`` may not
            assume sizes. Or ``nn.RNN``, ``nn.GRU``, ``nn.LSTM``; or a :class:`YangTransformer`, with the kernel
            :func:`transformer`. None for a :class:`BatchNormKernel`, which is of one net alone.
        x: ``(n, d)``; images flattened, sequences packed, batches whole, as for the kernel.
        width: one, or several, which show the convergence.
        draws: of all weights, for each width.
        kernel: whose variances are drawn from; an NTK is compared with the gradients of the nets. By default
            ``NNGPKernel(net)``, or ``recurrent(net)``.
        generator: of the draws.
        progress: True, False, or None for a bar on terminals only.

    Raises:
        ValueError: for an NTK in the standard parameterisation, which grows with the width, nets of several sizes, or a
            kernel of another net.
    """
    if kernel is None:
        kernel = (recurrent(net) if isinstance(net, nn.RNNBase) else NNGPKernel(net)).to(x)
    widths = (int(width),) if isinstance(width, int) else tuple(int(w) for w in width)
    if not widths or min(widths) < 1 or draws < 1:
        raise ValueError(f"widths and draws must be positive; got width={width}, draws={draws}.")
    if kernel.batch_shape or x.dim() != 2:
        raise ValueError("A batch of kernels or of inputs cannot be compared; take them one by one.")
    kinds = {RecurrentKernel: _recurrent, BatchNormKernel: _batch_normed}
    draws_of = next((draw for kind, draw in kinds.items() if isinstance(kernel, kind)), _layered)
    of_width = draws_of(net, x, kernel, generator)
    with torch.no_grad():
        exact = kernel(x).to_dense()
    found = []
    for size in widths:
        estimate = of_width(size)
        found.append(torch.stack([estimate() for _ in tiling.progress(range(draws), f"Width {size}", progress)]))
    return MonteCarlo(exact, widths, torch.stack(found))


Draws = Callable[[], Tensor]  # the kernel of one draw of the weights


def _layered(
    net: nn.Module, x: Tensor, kernel: InfiniteKernel, generator: torch.Generator | None
) -> Callable[[int], Draws]:
    """Draws of a net of layers, by width."""
    ntk = kernel._ntk is not None
    if kernel._ntk == "standard":
        raise ValueError(
            "The NTK in the standard parameterization grows with the width; compare parameterization='ntk'."
        )
    program = program_of(net)
    if program.layers != kernel.layers:
        raise ValueError(f"The kernel is of another net: its layers with weights are {kernel.layers}.")
    w, b = kernel.program.variances({name: getattr(kernel, name).detach() for name in kernel._names})
    inputs, there = (x.unflatten(-1, kernel.input_shape) if kernel.input_shape else x,), None
    if kernel.program.input_size is not None:
        sequences = unpack(x, kernel.program.input_size)
        inputs, there = (sequences.tokens, sequences.lengths), sequences.mask

    def output(wide: nn.Module) -> Tensor:
        """``(n, F)``, or ``(n * L, F)`` of all states."""
        f = wide(*inputs)
        return (f * there.unsqueeze(-1)).flatten(0, 1) if kernel.program.all_states else f.flatten(1)

    def of_width(width: int) -> Draws:
        wide = _widened(net, program, width, 1 if ntk else width, inputs).train(kernel.dropout)
        layers = [wide.get_submodule(step.module) for step in program.steps if step.index is not None]

        def estimate() -> Tensor:
            _draw(layers, w, b, generator)
            if ntk:
                return _ntk(output(wide).flatten(), wide, layers, w, b, kernel._ntk)
            with torch.no_grad():
                f = output(wide)
            return f @ f.mT / f.shape[1]

        return estimate

    return of_width


def _widened(net: nn.Module, program: Program, width: int, outputs: int, inputs: tuple[Tensor, ...]) -> nn.Module:
    """A copy whose layers are ``width`` wide, its readouts ``outputs``."""
    readouts, x = _readouts(program), inputs[0]
    wide = copy.deepcopy(net).to(x)
    for step in program.steps:
        if step.index is None:
            continue
        old = wide.get_submodule(step.module)
        if isinstance(old, Attention):
            wide.set_submodule(step.module, old.widened(width, dtype=x.dtype, device=x.device))
            continue
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
        wide.eval()(*(a[:1] for a in inputs))
    weights = {step.module + end for step in program.steps if step.index is not None for end in ("", ".keys")}
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


def _ntk(f: Tensor, wide: nn.Module, layers: list[nn.Module], w: Tensor, b: Tensor, parameterization: str) -> Tensor:
    """Sum over all weights of the products of their gradients, each times its variance, or what it is multiplied by."""
    scales, plain = {}, parameterization == "plain"
    for layer, weight, bias in zip(layers, w, b):
        scales[id(layer.weight)] = (1 if plain else weight) / layer.weight[0].numel()
        if layer.bias is not None:
            scales[id(layer.bias)] = 1 if plain else bias
    parameters = [p for p in wide.parameters() if p.requires_grad]
    return _gradient_products(f, parameters, [scales[id(p)] for p in parameters])


def _gradient_products(f: Tensor, parameters: Sequence[Tensor], scales: Sequence[Tensor | float]) -> Tensor:
    """Inner products of the gradients of each entry of ``f``, those in a parameter times its scale."""
    rows = [torch.autograd.grad(y, parameters, retain_graph=True) for y in f]
    total = 0
    for scale, *gradients in zip(scales, *rows):
        J = torch.stack([g.flatten() for g in gradients])
        total = total + scale * (J @ J.mT)
    return total


def _recurrent(
    net: nn.RNNBase, x: Tensor, kernel: RecurrentKernel, generator: torch.Generator | None
) -> Callable[[int], Draws]:
    """Draws of one of torch's recurrent modules, by width."""
    expected = recurrent(net, readout=kernel.readout).program
    fixed = {name: getattr(kernel.program, name) for name in ("bias_mean", "paths", "rule") if hasattr(expected, name)}
    if type(expected) is not type(kernel.program) or replace(expected, **fixed) != kernel.program:
        raise ValueError(f"The kernel is of another net than this {type(net).__name__}: {kernel.program.describe()}.")
    names = ("input_variance", "recurrent_variance", "bias_variance", "readout_variance")
    u, w, b, v = (getattr(kernel, name).detach() for name in names)
    several = isinstance(net, nn.GRU | nn.LSTM)  # gates, or layers
    means = torch.tensor(fixed.get("bias_mean", (0.0,))).to(x)
    sequences = unpack(x, kernel.input_size)
    packed = nn.utils.rnn.pack_padded_sequence(
        sequences.tokens, sequences.lengths.cpu(), batch_first=True, enforce_sorted=False
    )
    options = {"num_layers": net.num_layers, "bias": net.bias, "bidirectional": net.bidirectional}
    options |= {"nonlinearity": net.nonlinearity} if isinstance(net, nn.RNN) else {}

    def variance_of(name: str, p: Tensor) -> Tensor:
        """One number, or one for each row."""
        layer = int(name.split("_l")[1].split("_")[0])
        kind, fan_in = (u, p.shape[-1]) if name.startswith("weight_ih") else (w, p.shape[-1])
        kind, fan_in = (b, 2) if name.startswith("bias") else (kind, fan_in)
        kind = kind if several or len(kind) == 1 else kind[layer : layer + 1]
        return (kind / fan_in).repeat_interleave(p.shape[0] // len(kind))

    def features(wide: nn.RNNBase) -> Tensor:
        """States that are read, ``(n, F)``, or ``(n * L, F)``."""
        out = nn.utils.rnn.pad_packed_sequence(wide(packed)[0], batch_first=True, total_length=sequences.mask.shape[-1])
        states = out[0]
        if kernel.readout == "all":
            return states.flatten(0, 1)
        if kernel.readout == "mean":
            return states.sum(1) / sequences.lengths.unsqueeze(-1)
        ends = states[torch.arange(len(states)), sequences.lengths - 1]
        return torch.cat([ends[:, : wide.hidden_size], states[:, 0, wide.hidden_size :]], -1)

    def of_width(width: int) -> Draws:
        wide = type(net)(net.input_size, width, batch_first=True, dtype=x.dtype, device=x.device, **options)
        named = dict(wide.named_parameters())
        variances = {name: variance_of(name, p) for name, p in named.items()}

        def estimate() -> Tensor:
            with torch.no_grad():
                for name, p in named.items():
                    root = variances[name].sqrt().view(-1, *[1] * (p.dim() - 1))
                    p.normal_(generator=generator).mul_(root)
                    if name.startswith("bias_ih"):
                        p.add_(means.repeat_interleave(len(p) // len(means)))
            if kernel._ntk is None:
                with torch.no_grad():
                    s = features(wide)
                return v * (s @ s.mT) / s.shape[1]
            s = features(wide)
            readout = torch.randn(s.shape[1], dtype=s.dtype, device=s.device, generator=generator) * v.sqrt()
            scales = [variances[name][0] if kernel._ntk == "ntk" else _plain(name, p) for name, p in named.items()]
            above = (v if kernel._ntk == "ntk" else 1) * (s @ s.mT).detach() / s.shape[1]
            return above + _gradient_products(s @ readout / s.shape[1] ** 0.5, list(named.values()), scales)

        return estimate

    return of_width


def _plain(name: str, p: Tensor) -> float:
    """What a parameter of variance one would be multiplied by, squared; two biases stand for one."""
    return 0.5 if name.startswith("bias") else 1 / p.shape[-1]


def _batch_normed(
    net: None, x: Tensor, kernel: BatchNormKernel, generator: torch.Generator | None
) -> Callable[[int], Draws]:
    """Draws of an MLP with batch normalisation, by width; its last activations stand for outputs of all readouts."""
    batches = [batch for _, batch in kernel._split(x)]
    v = kernel.readout_variance.detach().to(batches[0])

    def of_width(width: int) -> Draws:
        layers, norms = [], []
        for i in range(kernel.depth):
            layers.append(nn.Linear(width if i else x.shape[1], width, bias=False).to(batches[0]))
            norms.append(nn.BatchNorm1d(width, eps=1e-12, affine=False, track_running_stats=False))
        body = nn.Sequential(*(part for pair in zip(layers, norms) for part in (*pair, nn.ReLU())))
        ones = torch.ones(len(layers)).to(batches[0])

        def estimate() -> Tensor:
            _draw(layers, ones, ones, generator)
            if not kernel.ntk:
                with torch.no_grad():
                    y = torch.cat([body(batch) for batch in batches])
                return (v * (y @ y.mT) / width).to(x)
            y = torch.cat([body(batch) for batch in batches])
            readout = torch.randn(width, dtype=y.dtype, device=y.device, generator=generator) * v.sqrt()
            scales = [1 / layer.in_features for layer in layers]
            hidden = _gradient_products(y @ readout / width**0.5, [layer.weight for layer in layers], scales)
            return (hidden + v * (y @ y.mT).detach() / width).to(x)

        return estimate

    return of_width
