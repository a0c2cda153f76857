"""Random small nets in float64 for the fuzz of the Gram, and their Jacobians by hand. Nothing here imports the package.

``case(seed)`` draws a net, two sets of inputs, options of the linearization and a prior variance. A net is a chain of
stages, each drawn for the shape that reaches it; per example that is ``(d,)``, ``(T, d)`` or ``(C, L)``, ``(C, H, W)``,
``(C, D, H, W)``, or ``T`` token ids. Each seed has a theme, the entries of ``THEMES`` in turn: one stage that its net
holds for certain, among others drawn at random.

    theme = a function (draw, shape) -> module, registered for the numbers of dimensions that it takes

A stage may return any shape. One more theme is one more decorated function.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

F64 = torch.float64
VOCABULARY = 5
TOKENS = 0  # the "number of dimensions" of a theme that starts from token ids


@dataclass
class Theme:
    """A kind of stage.

    Args:
        make: draws one, for the shape of one example.
        dims: the numbers of dimensions it takes; ``TOKENS`` for one that starts a net of tokens.
        hidden: it uses weights of a layer where no call of that layer shows it, or calls a layer with examples out of
            their places: the package may warn that it falls back to autodiff.
        alone: drawn only as a theme of its own, not as a companion of others.
    """

    make: Callable[[Draw, tuple[int, ...]], nn.Module]
    dims: tuple[int, ...]
    hidden: bool = False
    alone: bool = False


THEMES: dict[str, Theme] = {}


def theme(*dims: int, hidden: bool = False, alone: bool = False) -> Callable:
    """Register the decorated function as a theme, under its name."""

    def register(make: Callable) -> Callable:
        THEMES[make.__name__] = Theme(make, dims, hidden, alone or hidden)
        return make

    return register


class Draw(random.Random):
    """The generator of one case; keeps the names of what it drew.

    Args:
        seed: of this case.
        least: a normalisation takes its mean and variance of so many numbers or more. Of one number it makes zero, of
            two nearly signs: what is differentiated through them (twice: even more so) is then noise.
    """

    def __init__(self, seed: int, least: int = 2) -> None:
        super().__init__(seed)
        self.least = least
        self.drawn: list[str] = []

    def size(self, largest: int = 5) -> int:
        """A width, a length or a number of channels; one now and then."""
        return self.randint(1, largest)

    def flag(self, probability: float = 0.5) -> bool:
        return self.random() < probability

    def stage(self, shape: tuple[int, ...], same_shape: bool = False) -> nn.Module:
        """Any stage that takes this shape, and returns it if it must."""
        names = [name for name, theme in THEMES.items() if len(shape) in theme.dims and not theme.alone]
        for _ in range(20):
            name = self.choice(names)
            stage = THEMES[name].make(self, shape)
            out = output_shape(stage, shape)
            if (out == shape) if same_shape else (1 <= len(out) <= 4 and product(out) <= 150):
                self.drawn.append(name)
                return stage
        return nn.Linear(shape[-1], shape[-1])


def product(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


@torch.no_grad()
def output_shape(stage: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of one example."""
    stage = copy.deepcopy(stage).to(F64).eval()
    return tuple(stage(torch.rand(2, *shape, dtype=F64)).shape[1:])


class Apply(nn.Module):
    """A stage written as a function of its modules and its input.

    Args:
        function: ``(self, x) -> y``; it reaches the modules and parameters by their names.
        members: they.
    """

    def __init__(self, function: Callable, **members: nn.Module | nn.Parameter | Tensor | None) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / max(shape[-1], 1) ** 0.5)


# ---- layers


@theme(1, 2, 3)
def linear(draw: Draw, shape):
    return nn.Linear(shape[-1], draw.size(), bias=draw.flag(0.8))


@theme(1, 2, 3, 4)
def activation(draw: Draw, shape):
    kinds = (nn.ReLU, nn.ELU, nn.SiLU, nn.Hardtanh, nn.LeakyReLU)
    # An in-place one after a copy: at the start of a net, torch forbids it on a leaf that requires a gradient.
    in_place = Apply(lambda self, x: self.act(x * 1.0), act=draw.choice(kinds)(inplace=True))
    return draw.choice([nn.Tanh(), nn.GELU(), nn.Softplus(), in_place, in_place])


def _conv(draw: Draw, shape, kind: type[nn.Module]) -> nn.Module:
    channels, *lengths = shape
    groups = draw.choice([g for g in range(1, channels + 1) if channels % g == 0])
    kernel = [draw.randint(1, min(3, n)) for n in lengths]
    # A kernel dilated by 2 spans 2 k - 1, which has to fit.
    dilation = [draw.choice([1, 2]) if 2 * k - 1 <= n else 1 for k, n in zip(kernel, lengths)]
    mode = draw.choice(["zeros", "zeros", "reflect", "replicate", "circular"])
    stride = [draw.choice([1, 1, 2, 3]) for _ in lengths]
    if draw.flag(0.2):
        padding, stride = "same", 1
        if mode == "reflect" and any(d * (k - 1) >= n for d, k, n in zip(dilation, kernel, lengths)):
            mode = "zeros"
    else:
        padding = [draw.randint(0, min(2, n - 1)) for n in lengths]
    return kind(
        channels,
        groups * draw.randint(1, 2),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw.flag(0.7),
        padding_mode=mode,
    )


@theme(2)
def conv1d(draw: Draw, shape):
    return _conv(draw, shape, nn.Conv1d)


@theme(3)
def conv2d(draw: Draw, shape):
    return _conv(draw, shape, nn.Conv2d)


@theme(4)
def conv3d(draw: Draw, shape):
    return _conv(draw, shape, nn.Conv3d)


def _conv_transpose(draw: Draw, shape, kind: type[nn.Module]) -> nn.Module:
    channels, *lengths = shape
    groups = draw.choice([g for g in range(1, channels + 1) if channels % g == 0])
    kernel = [draw.randint(1, 3) for _ in lengths]
    stride = [draw.randint(1, 2) for _ in lengths]
    dilation = [draw.randint(1, 2) for _ in lengths]
    output_padding = [draw.randint(0, max(s, d) - 1) for s, d in zip(stride, dilation)]
    # out = (n - 1) stride - 2 padding + dilation (kernel - 1) + output_padding + 1, at least one
    spans = [(n - 1) * s + d * (k - 1) + o for n, s, d, k, o in zip(lengths, stride, dilation, kernel, output_padding)]
    padding = [draw.randint(0, min(2, span // 2)) for span in spans]
    return kind(
        channels,
        groups * draw.randint(1, 2),
        kernel,
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        dilation=dilation,
        groups=groups,
        bias=draw.flag(0.7),
    )


@theme(2)
def conv_transpose1d(draw: Draw, shape):
    return _conv_transpose(draw, shape, nn.ConvTranspose1d)


@theme(3)
def conv_transpose2d(draw: Draw, shape):
    return _conv_transpose(draw, shape, nn.ConvTranspose2d)


@theme(4)
def conv_transpose3d(draw: Draw, shape):
    return _conv_transpose(draw, shape, nn.ConvTranspose3d)


@theme(3)
def depthwise_separable(draw: Draw, shape):
    depthwise = nn.Conv2d(shape[0], 2 * shape[0], 2, padding=1, groups=shape[0], bias=False)
    return nn.Sequential(depthwise, nn.ReLU6(inplace=True), nn.Conv2d(2 * shape[0], draw.size(3), 1))


# ---- tokens


@theme(TOKENS)
def embedding(draw: Draw, shape):
    padding = draw.choice([None, 0, VOCABULARY - 1])
    return nn.Embedding(VOCABULARY, draw.size(), padding_idx=padding, sparse=draw.flag(0.2))


@theme(TOKENS)
def embedding_bag(draw: Draw, shape):
    mode = draw.choice(["sum", "mean", "max"])
    return nn.EmbeddingBag(VOCABULARY, draw.size(), mode=mode, padding_idx=draw.choice([None, 1]))


@theme(TOKENS)
def positions(draw: Draw, shape):
    """The embedding of the positions is called without examples: ``(T, d)``, added to ``(n, T, d)``."""
    width = draw.size()
    return Apply(
        lambda self, x: self.tokens(x) + self.places(torch.arange(x.shape[1])),
        tokens=nn.Embedding(VOCABULARY, width),
        places=nn.Embedding(shape[0], width),
    )


@theme(TOKENS)
def two_embeddings_of_one_table(draw: Draw, shape):
    """The same module called twice, on the tokens and on their neighbours."""
    return Apply(
        lambda self, x: self.table(x) * self.table(x.roll(1, dims=1)), table=nn.Embedding(VOCABULARY, draw.size())
    )


@theme(TOKENS)
def tied_embedding(draw: Draw, shape):
    """A language model: the output layer's weight is the embedding."""
    width = draw.size()
    stage = Apply(
        lambda self, x: self.out(torch.tanh(self.body(self.table(x)))),
        table=nn.Embedding(VOCABULARY, width),
        body=nn.Linear(width, width),
        out=nn.Linear(width, VOCABULARY, bias=draw.flag()),
    )
    stage.out.weight = stage.table.weight
    return stage


# ---- normalisation and its kind


@theme(1, 2, 3, 4)
def layer_norm(draw: Draw, shape):
    normalized = shape[-draw.randint(1, len(shape)) :]
    if product(normalized) < draw.least:
        return nn.PReLU()
    return nn.LayerNorm(normalized, elementwise_affine=draw.flag(0.85), bias=draw.flag(0.8))


@theme(1, 2, 3, 4)
def group_norm(draw: Draw, shape):
    divisors = [g for g in range(1, shape[0] + 1) if shape[0] % g == 0 and product(shape) // g >= draw.least]
    return nn.GroupNorm(draw.choice(divisors), shape[0], affine=draw.flag(0.85)) if divisors else nn.PReLU()


@theme(2, 3, 4)
def instance_norm(draw: Draw, shape):
    kind = {2: nn.InstanceNorm1d, 3: nn.InstanceNorm2d, 4: nn.InstanceNorm3d}[len(shape)]
    tracked = draw.flag() or product(shape[1:]) < draw.least
    return kind(shape[0], affine=draw.flag(0.85), track_running_stats=tracked)


@theme(1, 2, 3, 4)
def batch_norm(draw: Draw, shape):
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}[len(shape)]
    return kind(shape[0], affine=draw.flag(0.85))


@theme(1, 2, 3, 4)
def prelu(draw: Draw, shape):
    return nn.PReLU(draw.choice([1, shape[0]]))


@theme(1, 2)
def rms_norm(draw: Draw, shape):
    return nn.RMSNorm(shape[-1:]) if shape[-1] >= draw.least else nn.PReLU()


# ---- sequences


@theme(2)
def fused_recurrent(draw: Draw, shape):
    kind = draw.choice([nn.RNN, nn.LSTM, nn.GRU])
    batch_first, size = draw.flag(), draw.size(3)
    options = {"proj_size": size - 1} if kind is nn.LSTM and size > 1 and draw.flag() else {}
    module = kind(
        shape[-1], size, num_layers=draw.randint(1, 2), bidirectional=draw.flag(), batch_first=batch_first, **options
    )
    if batch_first:
        return Apply(lambda self, x: self.rnn(x)[0], rnn=module)
    return Apply(lambda self, x: self.rnn(x.transpose(0, 1))[0].transpose(0, 1), rnn=module)


@theme(2)
def last_hidden_state(draw: Draw, shape):
    return Apply(lambda self, x: self.rnn(x)[1][-1], rnn=nn.GRU(shape[-1], draw.size(3), batch_first=True))


@theme(2)
def recurrent_cell(draw: Draw, shape):
    """One module called T times."""
    size = draw.size(3)
    kind = draw.choice([nn.RNNCell, nn.GRUCell, nn.LSTMCell])

    def unroll(self, x):
        state, outputs = None, []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, dim=1)

    return Apply(unroll, cell=kind(shape[-1], size))


@theme(2)
def own_recurrence(draw: Draw, shape):
    """Two linear layers called T times, hidden states kept."""
    size = draw.size(3)

    def unroll(self, x):
        h, outputs = x.new_zeros(len(x), size), []
        for t in range(x.shape[1]):
            h = torch.tanh(self.inward(x[:, t]) + self.onward(h))
            outputs.append(h)
        return torch.stack(outputs, dim=1)

    return Apply(unroll, inward=nn.Linear(shape[-1], size), onward=nn.Linear(size, size, bias=draw.flag()))


@theme(2)
def fused_attention(draw: Draw, shape):
    heads = draw.choice([h for h in range(1, shape[-1] + 1) if shape[-1] % h == 0])
    weights = draw.flag()
    return Apply(
        lambda self, x: self.attention(x, x, x, need_weights=weights)[0],
        attention=nn.MultiheadAttention(shape[-1], heads, bias=draw.flag(0.7), batch_first=True),
    )


@theme(2)
def transformer_layer(draw: Draw, shape):
    width = max(shape[-1], draw.least)
    heads = draw.choice([h for h in range(1, width + 1) if width % h == 0])
    options = {"batch_first": True, "norm_first": draw.flag(), "activation": draw.choice(["relu", "gelu"])}
    layer = nn.TransformerEncoderLayer(width, heads, dim_feedforward=draw.size(4), dropout=0.0, **options)
    return layer if width == shape[-1] else nn.Sequential(nn.Linear(shape[-1], width), layer)


@theme(2)
def own_attention(draw: Draw, shape):
    """Attention built of linear layers."""
    width = draw.size()

    def attend(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return torch.softmax(q @ k.mT / width**0.5, dim=-1) @ v

    q, k, v = (nn.Linear(shape[-1], width, bias=draw.flag()) for _ in range(3))
    return Apply(attend, q=q, k=k, v=v)


@theme(2)
def mixer(draw: Draw, shape):
    """A linear layer over the positions."""
    return Apply(lambda self, x: self.mix(x.mT).mT, mix=nn.Linear(shape[0], draw.size(4)))


# ---- layers called in unusual ways


@theme(2, 3)
def merged_batch(draw: Draw, shape):
    """Examples and positions in one dimension, examples first."""
    return Apply(
        lambda self, x: self.layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1),
        layer=nn.Linear(shape[-1], draw.size()),
    )


@theme(2)
def merged_batch_positions_first(draw: Draw, shape):
    """The same with positions first: examples are neither a dimension nor contiguous."""
    return Apply(
        lambda self, x: self.layer(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (x.shape[1], -1)).transpose(0, 1),
        layer=nn.Linear(shape[-1], draw.size()),
    )


@theme(3)
def merged_batch_convolution(draw: Draw, shape):
    """A convolution over each image's rows, examples and rows in one dimension."""
    return Apply(
        lambda self, x: self.layer(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2),
        layer=nn.Conv1d(shape[0], draw.size(3), min(2, shape[2])),
    )


@theme(2)
def positions_first(draw: Draw, shape):
    """``(T, n, d)``: examples are the second dimension of every layer."""
    inner = nn.Sequential(nn.Linear(shape[-1], draw.size()), nn.Tanh())
    return Apply(lambda self, x: self.inner(x.transpose(0, 1)).transpose(0, 1), inner=inner)


@theme(2)
def several_shapes(draw: Draw, shape):
    """One layer on a sequence, on its mean, and on that with one more dimension."""
    return Apply(
        lambda self, x: self.layer(x) + self.layer(x.mean(1))[:, None] * self.layer(x[:, None]).sum(1),
        layer=nn.Linear(shape[-1], draw.size()),
    )


@theme(3)
def several_image_sizes(draw: Draw, shape):
    """One convolution at two resolutions."""
    return Apply(
        lambda self, x: self.layer(x) + self.layer(F.avg_pool2d(x, 2, ceil_mode=True)).mean((2, 3), keepdim=True),
        layer=nn.Conv2d(shape[0], draw.size(3), 3, padding=1, stride=draw.randint(1, 2)),
    )


@theme(1, 2, 3)
def keyword_arguments(draw: Draw, shape):
    return Apply(lambda self, x: self.layer(input=x), layer=nn.Linear(shape[-1], draw.size()))


@theme(1, 2)
def constant_input(draw: Draw, shape):
    """A layer that never sees an example: its output shifts and scales them."""
    return Apply(
        lambda self, x: x * self.layer(self.constant) + self.layer(self.constant[None])[0],
        layer=nn.Linear(3, shape[-1]),
        constant=torch.randn(3, dtype=F64),
    )


@theme(1, 2, 3)
def output_changed_in_place(draw: Draw, shape):
    def change(self, x):
        y = self.layer(x)
        y *= 0.5
        y[..., 0] += 1
        return y.tanh_()

    return Apply(change, layer=nn.Linear(shape[-1], draw.size()))


@theme(3)
def convolution_changed_in_place(draw: Draw, shape):
    return Apply(
        lambda self, x: F.relu(self.layer(x).add_(0.2), inplace=True),
        layer=nn.Conv2d(shape[0], draw.size(3), 2, padding=1),
    )


@theme(1, 2, 3)
def output_unused(draw: Draw, shape):
    """One layer runs for nothing, one does not run, one runs without a gradient."""

    def forward(self, x):
        self.dead(x)
        with torch.no_grad():
            y = self.frozen(x)
        return self.used(x) + y + self.used(x).detach()

    layers = {name: nn.Linear(shape[-1], shape[-1]) for name in ("dead", "unused", "frozen", "used")}
    return Apply(forward, **layers)


@theme(1, 2, 3, 4)
def hooks(draw: Draw, shape):
    """Hooks that change what goes in and what comes out of a layer."""
    layer = nn.Linear(shape[-1], draw.size())
    layer.register_forward_pre_hook(lambda module, args: (args[0].sin(),))
    layer.register_forward_hook(lambda module, args, output: output * 2 + output.square())
    return layer


@theme(1, 2, hidden=True)
def loop_over_examples(draw: Draw, shape):
    """A layer called once for each example, without a dimension for examples."""
    return Apply(lambda self, x: torch.stack([self.layer(x_i) for x_i in x]), layer=nn.Linear(shape[-1], draw.size()))


@theme(1, 2, hidden=True)
def reversed_examples(draw: Draw, shape):
    return Apply(lambda self, x: self.layer(x.flip(0)).flip(0), layer=nn.Linear(shape[-1], draw.size()))


@theme(1, 2, hidden=True)
def sorted_examples(draw: Draw, shape):
    """Examples pass the layer in another order, as sequences sorted by length do; which one depends on them."""

    def forward(self, x):
        order = x.flatten(1).sum(1).argsort()
        return self.layer(x[order])[order.argsort()]

    return Apply(forward, layer=nn.Linear(shape[-1], draw.size()))


# ---- structure


@theme(1, 2, 3, 4)
def residual(draw: Draw, shape):
    return Apply(lambda self, x: x + self.branch(x), branch=draw.stage(shape, same_shape=True))


@theme(1, 2, 3)
def shared_twice(draw: Draw, shape):
    """One stage called on its own output."""
    return Apply(lambda self, x: self.stage(torch.tanh(self.stage(x))), stage=draw.stage(shape, same_shape=True))


@theme(1, 2, 3, 4)
def nested(draw: Draw, shape):
    inner = draw.stage(shape)
    return nn.Sequential(nn.Sequential(inner, nn.Tanh()), nn.Sequential(draw.stage(output_shape(inner, shape))))


@theme(1, 2, 3, 4)
def branches(draw: Draw, shape):
    """Two stages side by side, their outputs flattened and concatenated."""
    return Apply(
        lambda self, x: torch.cat([stage(x).flatten(1) for stage in self.stages], dim=1),
        stages=nn.ModuleList([draw.stage(shape), draw.stage(shape)]),
    )


@theme(1, 2, 3, 4)
def flatten(draw: Draw, shape):
    return nn.Flatten(draw.randint(1, len(shape)))


@theme(2, 3, 4)
def pooled(draw: Draw, shape):
    pools = {2: (nn.MaxPool1d, nn.AvgPool1d), 3: (nn.MaxPool2d, nn.AvgPool2d), 4: (nn.MaxPool3d, nn.AvgPool3d)}
    return draw.choice(pools[len(shape)])(2 if min(shape[1:]) > 1 else 1)


@theme(1, 2)
def one_more_dimension(draw: Draw, shape):
    return nn.Unflatten(1, (1, shape[0])) if draw.flag() else nn.Unflatten(1, (shape[0], 1))


# ---- weights used outside of their layer's call, or by two layers


@theme(1, 2, 3)
def own_parameters(draw: Draw, shape):
    return Apply(lambda self, x: x * self.scale + self.shift, scale=parameter(shape[-1]), shift=parameter(shape[-1]))


@theme(2)
def class_token(draw: Draw, shape):
    return Apply(
        lambda self, x: torch.cat([self.token.expand(len(x), 1, -1), x], dim=1), token=parameter(1, 1, shape[-1])
    )


@theme(1)
def bilinear(draw: Draw, shape):
    return Apply(lambda self, x: self.form(x, x), form=nn.Bilinear(shape[0], shape[0], draw.size(3)))


@theme(1, 2, 3)
def tied_linear(draw: Draw, shape):
    """Two linear layers of one weight, with a bias each."""
    stage = nn.Sequential(nn.Linear(shape[-1], shape[-1]), nn.Tanh(), nn.Linear(shape[-1], shape[-1]))
    stage[2].weight = stage[0].weight
    return stage


@theme(1, 2)
def tied_bias(draw: Draw, shape):
    """The bias of a linear layer is that of a normalisation."""
    width = max(shape[-1], draw.least)
    stage = nn.Sequential(nn.Linear(shape[-1], width), nn.LayerNorm(width))
    stage[1].bias = stage[0].bias
    return stage


@theme(3)
def tied_autoencoder(draw: Draw, shape):
    """A convolution and a transposed one of the same weight."""
    channels, kernel = draw.size(3), min(draw.randint(1, 2), *shape[1:])
    stage = nn.Sequential(
        nn.Conv2d(shape[0], channels, kernel), nn.Tanh(), nn.ConvTranspose2d(channels, shape[0], kernel)
    )
    stage[2].weight = stage[0].weight
    return stage


@theme(1, 2)
def two_names(draw: Draw, shape):
    """One module under two names."""
    layer = nn.Linear(shape[-1], shape[-1])
    return Apply(lambda self, x: self.second(torch.tanh(self.first(x))), first=layer, second=layer)


@theme(1, 2, hidden=True)
def functional_use(draw: Draw, shape):
    """A layer called, and its weight used once more where no hook sees it."""
    return Apply(
        lambda self, x: F.linear(torch.tanh(self.layer(x)), self.layer.weight.T),
        layer=nn.Linear(shape[-1], draw.size()),
    )


@theme(1, 2, 3, hidden=True)
def only_functional_use(draw: Draw, shape):
    """A layer that is never called."""
    return Apply(
        lambda self, x: F.linear(x, self.layer.weight, self.layer.bias), layer=nn.Linear(shape[-1], draw.size())
    )


@theme(3, hidden=True)
def functional_convolution(draw: Draw, shape):
    return Apply(
        lambda self, x: self.layer(x) * F.conv2d(x.sin(), self.layer.weight, padding=1),
        layer=nn.Conv2d(shape[0], draw.size(3), 3, padding=1),
    )


@theme(1, 2, hidden=True)
def weight_penalty_in_the_output(draw: Draw, shape):
    """An output that depends on the size of a layer's weight."""
    return Apply(lambda self, x: self.layer(x) / self.layer.weight.norm(), layer=nn.Linear(shape[-1], draw.size()))


class OtherForward(nn.Linear):
    """A subclass of a known layer that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / (1 + self.weight.square().sum(1, keepdim=True)), self.bias)


class ScaledForward(nn.Linear):
    """A subclass that changes what the known layer returns."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sin() * 3


class StandardizedConv(nn.Conv2d):
    """Weight standardisation."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) * 2, self.bias)


@theme(1, 2, 3, hidden=True)
def subclass(draw: Draw, shape):
    if len(shape) == 3 and draw.flag():
        return StandardizedConv(shape[0], draw.size(3), 2, padding=1)
    return draw.choice([OtherForward, ScaledForward])(shape[-1], draw.size())


@theme(1, 2, 3)
def weight_norm(draw: Draw, shape):
    if len(shape) == 3:
        return parametrizations.weight_norm(nn.Conv2d(shape[0], draw.size(3), 2, padding=1))
    return parametrizations.weight_norm(nn.Linear(shape[-1], draw.size()))


@theme(1, 2, 3)
def spectral_norm(draw: Draw, shape):
    if len(shape) == 3:
        return parametrizations.spectral_norm(nn.Conv2d(shape[0], draw.size(3), 2, padding=1))
    return parametrizations.spectral_norm(nn.Linear(shape[-1], draw.size()))


# ---- cases


@dataclass
class Case:
    """One random problem.

    Args:
        theme: what the net holds for certain; ``drawn`` are the other kinds of stages in it.
        x1, x2: inputs ``(n, ...)``, with integer tokens as floats.
        options: keyword arguments of the linearization, ``params`` among them.
        names: the selected parameters, in the order of the weights.
        prior_variance: ``(P,)``.
        gradient: whether to compare gradients in the inputs, too: now and then, and not in tokens.
        hidden: as in :class:`Theme`.
    """

    seed: int
    theme: str
    net: nn.Module
    x1: Tensor
    x2: Tensor
    options: dict
    names: list[str]
    prior_variance: Tensor
    gradient: bool
    hidden: bool
    drawn: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        """What a failing test shows; the net last, as it is long."""
        return (
            f"seed {self.seed}, theme {self.theme}, with {', '.join(self.drawn) or 'nothing else'}; x1 "
            f"{tuple(self.x1.shape)}, x2 {tuple(self.x2.shape)}, options {self.options}\n{self.net}"
        )


def case(seed: int) -> Case:
    """The random problem of this seed; its theme is entry ``seed`` of ``THEMES``, counted around."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        themes = list(THEMES)
        gradient = seed // len(themes) % 3 == 1  # in every third round of the themes
        return _case(seed, Draw(seed, least=3 if gradient else 2), themes[seed % len(themes)], gradient)


def _case(seed: int, draw: Draw, name: str, gradient: bool) -> Case:
    chosen = THEMES[name]
    dims = draw.choice(chosen.dims)
    tokens = dims == TOKENS or (dims == 2 and draw.flag(0.15))
    if tokens:
        shape = (draw.size(4),)
        first = chosen.make(draw, shape) if dims == TOKENS else nn.Embedding(VOCABULARY, draw.size())
        stages = [first.to(F64)]
        inside = tuple(first(torch.zeros(2, *shape, dtype=torch.long)).shape[1:])
    else:
        largest = {1: (6,), 2: (4, 5), 3: (4, 6, 5), 4: (3, 4, 3, 4)}[dims]
        shape = inside = tuple(draw.size(n) for n in largest)
        stages = []
    if dims != TOKENS:
        if draw.flag():  # something before the theme, that leaves the shape as it is
            stages.append(draw.stage(inside, same_shape=True))
        stages.append(chosen.make(draw, inside))
        inside = output_shape(stages[-1], inside)
    for _ in range(draw.choice([0, 1, 1, 2])):
        stages.append(draw.stage(inside))
        inside = output_shape(stages[-1], inside)
    stages += _head(draw, inside, optional=any(True for stage in stages for _ in stage.parameters()))
    net = nn.Sequential(*stages).to(F64).eval()
    _randomize(net)
    _freeze(draw, net)
    names, params = _selection(draw, net)
    n1, n2 = (draw.choice([1, 2, 3, 4, min(shape[0], 5)]) for _ in range(2))
    options = {"params": params}
    if tokens:
        x1, x2 = (torch.randint(0, VOCABULARY, (n, *shape)).to(F64) for n in (n1, n2))
        options["input_dtype"] = torch.long
    else:
        x1, x2 = (torch.randn(n, *shape, dtype=F64) for n in (n1, n2))
    if len(shape) > 1:
        options["input_shape"] = shape
        if draw.flag() and len(shape) > 2:  # (1, d) flattened could be one example of shape (1, d)
            x1, x2 = x1.flatten(1), x2.flatten(1)
    num_weights = sum(p.numel() for n, p in net.named_parameters() if n in names)
    prior_variance = torch.rand(num_weights, dtype=F64) * 2 + 0.1
    return Case(
        seed,
        name,
        net,
        x1,
        x2,
        options,
        names,
        prior_variance,
        gradient=gradient and not tokens,
        hidden=chosen.hidden,
        drawn=sorted(set(draw.drawn)),
    )


def _head(draw: Draw, shape, optional: bool) -> list[nn.Module]:
    """To one or several outputs; one may be returned as ``(n,)``."""
    layers = []
    while product(shape) > 100 and len(shape) > 1:
        layers.append(Apply(lambda self, x: x.mean(-1)))
        shape = shape[:-1]
    if len(shape) > 1:
        layers.append(nn.Flatten())
    if optional and draw.flag(0.15) and 1 < product(shape) <= 4:
        return layers  # what came before is the last layer
    outputs = draw.choice([1, 2, 3, 4])
    layers.append(nn.Linear(product(shape), outputs, bias=draw.flag(0.8)))
    if outputs == 1 and draw.flag():
        layers.append(nn.Flatten(0))
    return layers


@torch.no_grad()
def _randomize(net: nn.Module) -> None:
    """Nothing at its default of zero or one, running statistics among them."""
    for p in net.parameters():
        if p.dim() <= 1:
            p.add_(0.3 * torch.randn_like(p))
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.3 * torch.randn_like(buffer))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand_like(buffer))


def _freeze(draw: Draw, net: nn.Module) -> None:
    parameters = list(net.parameters())
    if draw.flag(0.2) and len(parameters) > 1:
        draw.choice(parameters).requires_grad_(False)


def _selection(draw: Draw, net: nn.Module) -> tuple[list[str], list[str] | None]:
    """Names of the selected parameters, and ``params`` that selects them: mostly all."""
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    if draw.flag(0.75):
        return names, None
    some = [name for name in names if draw.flag()] or names[:1]
    return some, some


# ---- the other side


def jacobian(net: nn.Module, x: Tensor, names: list[str], create_graph: bool = False) -> Tensor:
    """``(n, K, P)``: one example, one output and one backward pass at a time, on a copy of the net.

    With ``create_graph`` it is differentiable in ``x``.
    """
    net = copy.deepcopy(net).eval()
    weights = [p for name, p in net.named_parameters() if name in names]
    fused = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # it alone differentiates twice
    rows = []
    with torch.enable_grad(), fused:
        for x_i in x:
            f = net(x_i[None].clone()).reshape(-1)
            rows.append(torch.stack([_row(f_k, weights, create_graph) for f_k in f]))
    return torch.stack(rows)


def _row(f_k: Tensor, weights: list[Tensor], create_graph: bool) -> Tensor:
    if not f_k.requires_grad:
        return torch.cat([torch.zeros_like(w).flatten() for w in weights])
    grads = torch.autograd.grad(f_k, weights, retain_graph=True, create_graph=create_graph, materialize_grads=True)
    return torch.cat([(g.to_dense() if g.is_sparse else g).flatten() for g in grads])
