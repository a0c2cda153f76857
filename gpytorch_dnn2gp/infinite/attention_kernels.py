"""GPyTorch kernels of attention nets, infinitely wide: sequences made by :func:`infinite.pack` in, a covariance out.

    transformer(input_size, depth, ...)   Yang's, the limit of :class:`YangTransformer`
    attention(input_size, depth, ...)     blocks of :class:`SelfAttention` and a feed-forward net, with LayerNorm

Both are programs of layers, as those of modules; only their hyperparameters have names of their own.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from gpytorch.constraints import Interval
from gpytorch.priors import Prior
from torch import Tensor, nn

from .attention import _EPS, LastState, MeanState, SelfAttention, YangTransformer, require_readout
from .hyperparameters import Hyperparameter, InfiniteKernel, Numbers, as_tensors
from .kernels import PARAMETERIZATIONS
from .program import Program, program_of


class _SequenceKernel(InfiniteKernel):
    """What the two share."""

    def __init__(
        self,
        program: Program,
        values: dict[str, Numbers],
        kernel: str = "nngp",
        parameterization: str = "ntk",
        priors: dict[str, Prior] | None = None,
        constraints: dict[str, Interval] | None = None,
        **options,
    ) -> None:
        if kernel not in ("nngp", "ntk"):
            raise ValueError(f"kernel must be 'nngp' or 'ntk'; got {kernel!r}.")
        if parameterization not in PARAMETERIZATIONS or parameterization == "standard":
            raise ValueError(f"parameterization must be 'ntk' or 'plain'; got {parameterization!r}.")
        super().__init__(program, ntk=parameterization if kernel == "ntk" else None, **options)
        counts = Counter(step.hyper[0] for step in program.steps if step.index is not None)
        counts["bias_variance"] = counts["weight_variance"]
        tensors = dict(zip(values, as_tensors(*values.values())))
        self._register_all(tensors, counts, priors, constraints)

    @property
    def input_size(self) -> int:
        """Numbers per token."""
        return self.program.input_size

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers with weights."""
        return self.program.layers


class TransformerKernel(_SequenceKernel):
    """Covariance of a :class:`YangTransformer`'s output at infinite width, or its NTK; made by :func:`transformer`.

    Inputs are sequences in rows, ``(*B, n, L * d + 1)``, made by :func:`pack`; L may differ from call to call. The
    matrix is ``(*B, n, n')``; with ``readout="all"`` ``(*B, n * L, n' * L)``, sequence-major, zero for padding.
    """

    key_variance = Hyperparameter("sigma_u^2 of the keys, which are queries and values too.", each="blocks")
    weight_variance = Hyperparameter("sigma_w^2 of the feed-forward layers, two in each block.", each="layers")
    bias_variance = Hyperparameter("sigma_b^2 of their biases.", "zero or more", each="layers")
    readout_variance = Hyperparameter("sigma_v^2: the output is <v, x>, v ~ N(0, sigma_v^2 / width).")


class AttentionKernel(_SequenceKernel):
    """Covariance of an attention net's output at infinite width, or its NTK; made by :func:`attention`.

    Shapes are those of :class:`TransformerKernel`.
    """

    score_variance = Hyperparameter("sigma_q sigma_k, by which logits are multiplied.", each="blocks")
    value_variance = Hyperparameter("sigma_v^2 of the values.", each="blocks")
    output_variance = Hyperparameter("sigma_o^2 of what attention gives out.", each="blocks")
    weight_variance = Hyperparameter("sigma_w^2 of all other layers: embedding, feed-forward, readout.", each="layers")
    bias_variance = Hyperparameter("sigma_b^2 of all biases.", "zero or more")


def transformer(
    input_size: int,
    depth: int = 1,
    key_variance: Numbers = 1.0,
    weight_variance: Numbers = 1.0,
    bias_variance: Numbers = 0.0,
    readout_variance: Numbers = 1.0,
    *,
    temperature: float = 1.0,
    causal: bool = True,
    readout: str = "last",
    kernel: str = "nngp",
    **options,
) -> TransformerKernel:
    """The transformer of Yang (2019, Tensor Programs I; NTK: Yang 2020, Tensor Programs II), infinitely wide.

    Each block: k = U x; z = LN(k + sum_j a_ij k_j), a_i = softmax_j(<k_i, k_j> / (n tau)); x <- LN(W2 relu(W1 z + b1) +
    b2 + z). With K of the tokens, x.x'/d at first:

        S = sigma_u^2 K,  A = softmax(mask(S) / tau) within each sequence,  Z = corr((I + A) S (I + A')^T)
        K <- corr(sigma_w^2 V(sigma_w^2 Z + sigma_b^2) + sigma_b^2 + Z),    V of ReLU

    Args:
        input_size: numbers per token, d.
        depth: number of blocks.
        key_variance: sigma_u^2, one, or one for each block. Softmax sees sigma_u^2 K, so in the first block the norm of
            the tokens matters.
        weight_variance, bias_variance: sigma_w^2, sigma_b^2 of the feed-forward layers, one, or one for each of the two
            in each block.
        readout_variance: sigma_v^2.
        temperature: tau.
        causal: whether a token attends to itself and earlier ones only, or to all.
        readout: the "last" token, the "mean" over tokens, or "all" of them.
        kernel: "nngp" or "ntk".
        options: ``parameterization`` of the NTK, "ntk" or "plain" (see :class:`NTKKernel`); ``priors`` and
            ``constraints``, by name of the hyperparameter; ``progress``, ``batch_shape``, and those of
            ``gpytorch.kernels.Kernel``.
    """
    _require(depth, input_size, readout)
    net = _skeleton(
        YangTransformer, input_size, 1, depth=depth, causal=causal, temperature=temperature, readout=readout
    )
    values = {
        "key_variance": key_variance,
        "weight_variance": weight_variance,
        "bias_variance": bias_variance,
        "readout_variance": readout_variance,
    }
    special = {"keys": "key_variance", "attention": "key_variance", "head": "readout_variance"}
    program = _named(program_of(net), special).of_sequences(input_size, readout == "all")
    return TransformerKernel(program, values, kernel, **options)


class _AttentionNet(nn.Module):
    """What :func:`attention` is the limit of."""

    def __init__(
        self, in_features: int, width: int, depth: int, weights: str, causal: bool, temperature: float, readout: str
    ) -> None:
        super().__init__()
        self.embedding = nn.Linear(in_features, width)
        self.blocks = nn.ModuleList(_AttentionBlock(width, weights, causal, temperature) for _ in range(depth))
        self.state = {"last": LastState(), "mean": MeanState(), "all": None}[readout]
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x, lengths)
        return self.head(x if self.state is None else self.state(x, lengths))


class _AttentionBlock(nn.Module):
    def __init__(self, width: int, weights: str, causal: bool, temperature: float) -> None:
        super().__init__()
        self.attention = SelfAttention(width, weights, causal=causal, temperature=temperature)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=_EPS, elementwise_affine=False) for _ in range(2))
        self.hidden, self.outputs = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        z = self.norm1(x + self.attention(x, lengths))
        return self.norm2(z + self.outputs(torch.relu(self.hidden(z))))


def attention(
    input_size: int,
    depth: int = 1,
    weights: str = "softmax",
    score_variance: Numbers = 1.0,
    value_variance: Numbers = 1.0,
    output_variance: Numbers = 1.0,
    weight_variance: Numbers = 2.0,
    bias_variance: Numbers = 0.1,
    *,
    temperature: float = 1.0,
    causal: bool = False,
    readout: str = "mean",
    kernel: str = "nngp",
    **options,
) -> AttentionKernel:
    """Attention of many heads with logits scaled by 1/n (Hron et al. 2020), infinitely wide, as neural-tangents has it.

    An embedding, then blocks: h <- LN(h + attention(h)); h <- LN(h + W2 relu(W1 h + b1) + b2); a readout. With K of the
    tokens of h, attention is

        K <- sigma_o^2 sigma_v^2 A K A'^T + sigma_b^2,    A = zeta(sigma_q sigma_k K) within each sequence

    and residual branches, of independent weights, add. For other nets put :class:`SelfAttention` into a module and use
    :class:`NNGPKernel`.

    Args:
        input_size, depth: see :func:`transformer`.
        weights: zeta, "softmax", "identity" or "relu".
        score_variance: sigma_q sigma_k.
        value_variance, output_variance: sigma_v^2, sigma_o^2; biases come with the output.
        weight_variance: sigma_w^2, one, or one for each of the other layers.
        bias_variance: sigma_b^2 of all biases.
        temperature, causal, readout, kernel, options: see :func:`transformer`.
    """
    _require(depth, input_size, readout)
    net = _skeleton(_AttentionNet, input_size, 1, depth, weights, causal, temperature, readout)
    values = {
        "score_variance": score_variance,
        "value_variance": value_variance,
        "output_variance": output_variance,
        "weight_variance": weight_variance,
        "bias_variance": bias_variance,
    }
    special = {"mixing": "score_variance", "values": "value_variance", "attention.outputs": "output_variance"}
    program = _named(program_of(net), special).of_sequences(input_size, readout == "all")
    return AttentionKernel(program, values, kernel, **options)


def _require(depth: int, input_size: int, readout: str) -> None:
    for name, value in (("depth", depth), ("input_size", input_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer, 1 or more; got {value!r}.")
    require_readout(readout)


def _skeleton(make: type[nn.Module], *args, **options) -> nn.Module:
    """A net of which only the structure counts."""
    with torch.device("meta"):
        return make(*args, **options)


def _named(program: Program, special: dict[str, str]) -> Program:
    """The program, its layers' sigma_w^2 called as ``special`` says of the ends of their names."""
    counts: Counter = Counter()
    steps = []
    for step in program.steps:
        if step.index is not None:
            name = next((n for end, n in special.items() if step.module.endswith(end)), "weight_variance")
            step = replace(step, hyper=(name, "bias_variance"), index=counts[name])
            counts[name] += 1
        steps.append(step)
    return replace(program, steps=tuple(steps))
