"""Attention at infinite width, and the modules whose wide nets it is the limit of.

    YangAttention     k = U x,  h_i = k_i + sum_j a_ij k_j,  a_i = softmax_j(<k_i, k_j> / (n tau))    (Yang 2019)
    SelfAttention     h = W_o W_v A x,                       A = zeta(<W x_i, W x_j> / n)             (Hron et al. 2020)

Logits are scaled by 1/n, not by 1/sqrt(n), so that at infinite width they are the covariances of the tokens: attention
weights are no longer random, and mix the tokens of each sequence linearly, K <- M K M'^T. Gradients through them
vanish, T <- M T M'^T.

Further modules read sequences: :class:`LastState`, :class:`MeanState`. All take tokens ``(n, L, d)`` and the lengths of
the sequences, ``(n,)``, or None where all have L tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .rules import Linear, _trained, rule
from .sequences import READOUTS
from .state import Features, State

MECHANISMS = ("softmax", "identity", "relu")
_EPS = 1e-12  # of LayerNorm


def _attended(logits: Tensor, mechanism: str, causal: bool, there: Tensor | None) -> Tensor:
    """Attention weights ``(..., L, L)`` of logits; ``there`` is ``(..., L)``, false at padding."""
    allowed = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device)
    allowed = allowed.tril() if causal else allowed
    if there is not None:
        allowed = allowed & there.unsqueeze(-2)
    if mechanism == "softmax":
        return logits.masked_fill(~allowed, -torch.inf).softmax(-1)
    return (logits.relu() if mechanism == "relu" else logits).masked_fill(~allowed, 0)


def _there(x: Tensor, lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else torch.arange(x.shape[-2], device=x.device) < lengths.unsqueeze(-1)


# ---- modules


class Attention(nn.Module):
    """What the two kinds of attention share: weights of keys, and how these attend to each other.

    ``widened`` makes the same layer of another width, for :func:`monte_carlo`.
    """

    def __init__(
        self, in_features: int, width: int, mechanism: str, causal: bool, temperature: float, **factory
    ) -> None:
        super().__init__()
        if mechanism not in MECHANISMS:
            raise ValueError(f"The attention weights are one of {', '.join(MECHANISMS)}; got {mechanism!r}.")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive; got {temperature}.")
        self.keys = nn.Linear(in_features, width, bias=False, **factory)
        self.mechanism, self.causal, self.temperature = mechanism, causal, temperature

    @property
    def weight(self) -> Tensor:
        """Of the keys."""
        return self.keys.weight

    @property
    def bias(self) -> None:
        """There is none."""
        return None

    def widened(self, width: int, **factory) -> nn.Module:
        """A copy with keys of this width, which takes as many features as it will be given."""
        wide = copy.deepcopy(self)
        wide.keys = nn.LazyLinear(width, bias=False, **factory)
        return wide

    def _weights(self, keys: Tensor, lengths: Tensor | None) -> Tensor:
        logits = keys @ keys.mT / (keys.shape[-1] * self.temperature)
        return _attended(logits, self.mechanism, self.causal, _there(keys, lengths))

    def extra_repr(self) -> str:
        """Its options."""
        return f"mechanism={self.mechanism!r}, causal={self.causal}, temperature={self.temperature:g}"


class YangAttention(Attention):
    """One head with a residual connection, whose keys, queries and values are the same vectors ``k = U x``.

    Args:
        in_features, width: of a token, and of its key.
        causal: whether a token attends to itself and earlier ones only.
        temperature: tau, by which logits ``<k_i, k_j> / width`` are divided.
        factory: ``device`` and ``dtype``.
    """

    def __init__(
        self, in_features: int, width: int, *, causal: bool = True, temperature: float = 1.0, **factory
    ) -> None:
        super().__init__(in_features, width, "softmax", causal, temperature, **factory)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """``(n, L, in_features)`` -> ``(n, L, width)``."""
        keys = self.keys(x)
        return keys + self._weights(keys, lengths) @ keys


class Mixing(Attention):
    """The tokens, mixed by their attention weights: the first step of :class:`SelfAttention`."""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """``(n, L, features)`` -> the same."""
        return self._weights(self.keys(x), lengths) @ x


class SelfAttention(nn.Module):
    """One head with values and outputs of weights of its own, and logits scaled by 1/width.

    In the limit of infinite width it is the attention layer of many heads of Hron et al. (2020) with that scaling, keys
    and queries tied; the variance of :attr:`mixing` is sigma_q sigma_k, which multiplies the logits.

    Args:
        features: of a token.
        weights: of the attention, "softmax", "identity" or "relu" of the logits.
        bias: whether outputs have biases.
        causal, temperature, factory: see :class:`YangAttention`.
    """

    def __init__(
        self,
        features: int,
        weights: str = "softmax",
        *,
        bias: bool = True,
        causal: bool = False,
        temperature: float = 1.0,
        **factory,
    ) -> None:
        super().__init__()
        self.mixing = Mixing(features, features, weights, causal, temperature, **factory)
        self.values = nn.Linear(features, features, bias=False, **factory)
        self.outputs = nn.Linear(features, features, bias=bias, **factory)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """``(n, L, features)`` -> the same."""
        return self.outputs(self.values(self.mixing(x, lengths)))


class LastState(nn.Module):
    """The last token of each sequence, ``(n, L, width)`` -> ``(n, width)``."""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """See the class."""
        return x[:, -1] if lengths is None else x[torch.arange(len(x), device=x.device), lengths - 1]


class MeanState(nn.Module):
    """The mean over the tokens of each sequence, ``(n, L, width)`` -> ``(n, width)``."""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """See the class."""
        if lengths is None:
            return x.mean(-2)
        return (x * _there(x, lengths).unsqueeze(-1)).sum(-2) / lengths.unsqueeze(-1)


def _norm(width: int, **factory) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=_EPS, elementwise_affine=False, **factory)


class _YangBlock(nn.Module):
    """``z = LN(attention(x))``, then ``LN(W2 relu(W1 z + b1) + b2 + z)``."""

    def __init__(self, in_features: int, width: int, causal: bool, temperature: float, **factory) -> None:
        super().__init__()
        self.attention = YangAttention(in_features, width, causal=causal, temperature=temperature, **factory)
        self.norm1 = _norm(width, **factory)
        self.hidden = nn.Linear(width, width, **factory)
        self.outputs = nn.Linear(width, width, **factory)
        self.norm2 = _norm(width, **factory)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        z = self.norm1(self.attention(x, lengths))
        return self.norm2(self.outputs(torch.relu(self.hidden(z))) + z)


class YangTransformer(nn.Module):
    """The transformer of Yang (2019, Tensor Programs I): its wide nets have the kernel :func:`transformer`.

    Each block: k = U x; z = LN(k + sum_j a_ij k_j), a_i = softmax_j(<k_i, k_j> / (n tau)); x <- LN(W2 relu(W1 z + b1) +
    b2 + z). One head, no positional embedding; LN without scale and shift.

    Args:
        in_features: numbers per token.
        width: of everything between.
        outputs: of the readout <v, x>, which has no biases.
        depth: number of blocks.
        causal: whether a token attends to itself and earlier ones only.
        temperature: tau.
        readout: "last" token, "mean" over tokens, or "all" tokens, each with an output.
        factory: ``device`` and ``dtype``.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        outputs: int = 1,
        *,
        depth: int = 1,
        causal: bool = True,
        temperature: float = 1.0,
        readout: str = "last",
        **factory,
    ) -> None:
        super().__init__()
        require_readout(readout)
        sizes = [in_features] + [width] * (depth - 1)
        self.in_features, self.readout = in_features, readout
        self.blocks = nn.ModuleList(_YangBlock(size, width, causal, temperature, **factory) for size in sizes)
        self.state = {"last": LastState(), "mean": MeanState(), "all": None}[readout]
        self.head = nn.Linear(width, outputs, bias=False, **factory)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """``(n, L, in_features)``, lengths ``(n,)`` -> ``(n, outputs)``, or ``(n, L, outputs)`` for all tokens."""
        for block in self.blocks:
            x = block(x, lengths)
        return self.head(x if self.state is None else self.state(x, lengths))


def require_readout(readout: str) -> None:
    """Raise a ``ValueError`` for a readout that there is not."""
    if readout not in READOUTS:
        raise ValueError(f"readout must be one of {', '.join(READOUTS)}; got {readout!r}.")


# ---- rules


@dataclass(frozen=True)
class Attended(Linear):
    """The rule of :class:`YangAttention` and of :class:`Mixing`.

    Attributes:
        mechanism, causal, temperature: see :class:`SelfAttention`.
        residual: whether it is Yang's: S = sigma_w^2 K, K <- (I + A) S (I + A')^T with A of S within each sequence.
            Else K <- A K A'^T with A of sigma_w^2 K.
    """

    mechanism: str = "softmax"
    causal: bool = False
    temperature: float = 1.0
    residual: bool = False
    reads_lengths = True

    def needs_full(self, full: bool) -> bool:
        return True

    def __call__(self, state: State | Features, weight: Tensor, bias: Tensor) -> State:
        if isinstance(state, Features):
            run = replace(state.run, full=True)
            inputs = replace(state, run=run)
            if len(state.shape) != 2:
                raise ValueError(f"it takes sequences of tokens (L, d), but the inputs have the shape {state.shape}.")
        elif state.flattened or len(state.positions) != 1 or not state.channels_last:
            raise ValueError("it takes sequences of tokens (L, d), channels last.")
        if self.residual:
            out = super().__call__(inputs if isinstance(state, Features) else state, weight, bias)
            scale = torch.ones_like(weight)
        elif isinstance(state, Features):
            out, scale = replace(self.mean_product(inputs), gaussian=False), weight
        else:
            out, scale = self.mean(state), weight
        first, second = self._matrices(replace(out, run=state.run), scale)
        return replace(out.linear(lambda k: first @ k @ second.mT), run=state.run)

    def _matrices(self, state: State, scale: Tensor) -> tuple[Tensor, Tensor]:
        """M of the first and of the second of each pair, to broadcast against ``(*B, n1, n2, L, L)``."""
        run = state.run
        if run.within:
            own = state.k[..., 0, 0, :, :]
            logits = own * (run.per_pair(scale, own) / self.temperature)
            there = None if run.masks is None else run.masks[0][..., 0, :]
            M = _attended(logits, self.mechanism, self.causal, there)
            if self.residual:
                M = M + torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
            M = run.record(M, lambda M: (M,), 2)[..., None, None, :, :]
            return M, M
        (first,), (second,) = run.taken()
        return first.unsqueeze(-3), second.unsqueeze(-4)


def _attention_rule(residual: bool) -> Callable[[Attention], Attended]:
    def make(module: Attention) -> Attended:
        trained = _trained(module) if residual else (False, False)
        options = module.mechanism, module.causal, module.temperature, residual
        return Attended(module.keys.in_features, False, trained, 1, *options)

    return make


rule(YangAttention)(_attention_rule(residual=True))
rule(Mixing)(_attention_rule(residual=False))


@dataclass(frozen=True)
class Read:
    """The rule of :class:`LastState` and :class:`MeanState`."""

    readout: str
    reads_lengths = True

    def needs_full(self, full: bool) -> bool:
        return True

    def __call__(self, state: State) -> State:
        if state.flattened or len(state.positions) != 1 or not state.channels_last:
            raise ValueError("it reads sequences of tokens (L, d), channels last.")
        masks = state.run.masks
        if masks is None:
            return state.linear(self._of_equal, positions=())
        lengths = tuple(mask.sum(-1) for mask in masks)
        read = self._last if self.readout == "last" else self._mean
        return state.linear(lambda k: read(k, masks, lengths), positions=())

    def _of_equal(self, k: Tensor) -> Tensor:
        return k[..., -1, -1] if self.readout == "last" else k.mean((-2, -1))

    @staticmethod
    def _last(k: Tensor, masks: tuple[Tensor, Tensor], lengths: tuple[Tensor, Tensor]) -> Tensor:
        i, j = (a - 1 for a in lengths)
        k = k.gather(-2, i[..., :, None, None, None].expand(*k.shape[:-2], 1, k.shape[-1]))
        return k.gather(-1, j[..., None, :, None, None].expand(k.shape[:-1] + (1,)))[..., 0, 0]

    @staticmethod
    def _mean(k: Tensor, masks: tuple[Tensor, Tensor], lengths: tuple[Tensor, Tensor]) -> Tensor:
        r, q = (mask.to(k) / length.unsqueeze(-1) for mask, length in zip(masks, lengths))
        return (r[..., :, None, None, :] @ k @ q[..., None, :, :, None])[..., 0, 0]


rule(LastState)(lambda module: Read("last"))
rule(MeanState)(lambda module: Read("mean"))
