"""The linear model whose posterior a Gaussian over weights is: that of Theorem 1, of Theorem 2, or none.

    y~ = J w + e,  e ~ N(0, (c Lambda)^-1),  w ~ N(m, V)

                       trained net (Theorem 1)    iterate t (Theorem 2)               here
    y~_i               J_i w* - Lambda_i^-1 r_i   J_i mu_t - (alpha/beta) Lam^-1 r    mean, pull
    c                  1                          beta (n/|B|) / S'                   weight(|B|)
    m                  0                          mu_t - V_t alpha S0^-1 mu_t         mean - away
    J, r, Lambda at    w*                         the samples w_1, ..., w_S'          samples

n training examples, |B| of them at hand, S' samples. V is the kernel's. Read dual.py first, solvers.py next.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import tiling
from .linearize import Linearization, Rows
from .weights import GaussianWeights


@dataclass(frozen=True)
class LinearModel:
    """What sets the linear model of a GP apart from that of a trained net, which has the defaults.

    Attributes:
        mean: what the model is expanded about, ``(P,)``; None for the net's own weights.
        away: ``mean - m``, ``(P,)``; None where the prior mean m is zero.
        rate: beta, or 1.
        train_size: n; None where the data at hand are all.
        pull: alpha / beta.
        samples: nets at the weights w_s, if there are several; the data are then taken once at each.
        given: the posterior itself, where it is given instead of following from the data.
        prior_known: whether the prior is known that ``given`` came from, so that there is an evidence.
    """

    mean: Tensor | None = None
    away: Tensor | None = None
    rate: float = 1.0
    train_size: int | None = None
    pull: float = 1.0
    samples: tuple[Linearization, ...] = ()
    given: GaussianWeights | None = None
    prior_known: bool = True

    @property
    def is_default(self) -> bool:
        """Whether it is that of a trained net."""
        moved = self.mean is not None or self.away is not None or self.given is not None or bool(self.samples)
        return not moved and self.rate == self.pull == 1 and self.train_size is None

    @property
    def num_samples(self) -> int:
        """S'."""
        return max(1, len(self.samples))

    def weight(self, num_examples: int) -> float:
        """c: how often each of the examples at hand counts, at each sample."""
        if self.train_size is not None and num_examples > self.train_size:
            raise ValueError(
                f"The batch has {num_examples} examples, but the iterate's train_size is {self.train_size}: that is "
                "the number of all training examples."
            )
        scale = 1.0 if self.train_size is None else self.train_size / num_examples
        return self.rate * scale / self.num_samples

    def rows(self, lin: Linearization, x: Tensor, cotangents: Tensor | None) -> Rows | StackedRows:
        """U at training inputs ``(n, d)``: ``n`` examples, ``n S'`` where there are several samples."""
        if not self.samples:
            return lin.rows(x, cotangents)
        pieces = [None] * self.num_samples if cotangents is None else cotangents.chunk(self.num_samples)
        return StackedRows([net.rows(x, c) for net, c in zip(self.samples, pieces, strict=True)])

    def tensors(self) -> list[Tensor]:
        """What it is made of, for a digest."""
        own = [self.mean, self.away, *([] if self.given is None else self.given.tensors().values())]
        return [t for t in own if t is not None] + [net.weights for net in self.samples]

    def map(self, fn: Callable[[Tensor], Tensor]) -> LinearModel:
        """The same with ``fn`` done to every tensor, as ``Module.to`` does."""
        return dataclasses.replace(
            self,
            mean=None if self.mean is None else fn(self.mean),
            away=None if self.away is None else fn(self.away),
            samples=tuple(copy.deepcopy(net)._apply(fn) for net in self.samples),
            given=None if self.given is None else self.given.map(fn),
        )


class StackedRows:
    """The rows of several nets at the same inputs, one after the other, as one: the face of :class:`Rows`.

    Args:
        parts: rows of each net, without batch dimensions.
    """

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.parts = list(parts)
        self._features: Tensor | None = None

    @property
    def function(self):
        """Of the first net, for its dtype."""
        return self.parts[0].function

    @property
    def x(self) -> Tensor:
        """Inputs of one part."""
        return self.parts[0].x

    @property
    def num_examples(self) -> int:
        """Of all parts, n S'."""
        return sum(part.num_examples for part in self.parts)

    @property
    def num_rows(self) -> int:
        """m, rows for each example."""
        return self.parts[0].num_rows

    @property
    def num_weights(self) -> int:
        """P."""
        return self.parts[0].num_weights

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Chunks of examples with their rows ``(b, m, P)``."""
        start = 0
        for part in self.parts:
            for where, rows in part.blocks():
                yield slice(start + where.start, start + where.start + len(rows)), rows
            start += part.num_examples

    def features(self) -> Tensor:
        """All rows, ``(n S', m, P)``; kept where they take little memory."""
        if self._features is not None:
            return self._features
        features = torch.cat([part.features() for part in self.parts])
        if tiling.cache_fits(features.numel(), features.dtype, features.device):
            self._features = features
        return features

    @property
    def kept(self) -> Tensor | None:
        """The rows, if they are in memory."""
        return self._features

    def keep(self, rows: Tensor | None = None) -> None:
        """Keep the rows for later use if they take little memory, or those given."""
        if rows is not None:
            self._features = rows
        elif tiling.cache_fits(
            self.num_examples * self.num_rows * self.num_weights, self.function.dtype, self.x.device
        ):
            self.features()

    def keep_for_products(self, _groups: Sequence[Tensor], _prior_variance: Tensor | None) -> None:
        """As :meth:`keep`."""
        self.keep()

    def gram(self, groups: list[Tensor], prior_variance: Tensor | None, progress: bool | None = None) -> Tensor:
        """``U_g S0_g U_g^T`` for each group of weights, ``(G, N m, N m)``."""
        scale = 1.0 if prior_variance is None else prior_variance.sqrt()
        size = self.num_examples * self.num_rows
        out = torch.empty(len(groups), size, size, dtype=self.function.dtype, device=self.x.device)
        m = self.num_rows
        for one, a in tiling.progress(self._held(), "Gram matrix", progress):
            for other, b in self._held():
                if other.start > one.start:
                    continue
                for g, group in enumerate(groups):
                    block = (a * scale)[..., group].flatten(0, 1) @ (b * scale)[..., group].flatten(0, 1).mT
                    out[g, one.start * m : one.stop * m, other.start * m : other.stop * m] = block
                    out[g, other.start * m : other.stop * m, one.start * m : one.stop * m] = block.mT
        return out

    def _held(self) -> Iterator[tuple[slice, Tensor]]:
        return iter([(slice(0, self.num_examples), self._features)]) if self._features is not None else self.blocks()

    def matmul(self, u: Tensor) -> Tensor:
        """``U u``, ``(..., N, m)``, for ``u`` ``(..., P)``."""
        return torch.cat([part.matmul(u) for part in self.parts], -2)

    def rmatmul(self, v: Tensor) -> Tensor:
        """``U^T v``, ``(..., P)``, for ``v`` ``(..., N, m)``."""
        pieces = v.split([part.num_examples for part in self.parts], -2)
        return sum(part.rmatmul(piece) for part, piece in zip(self.parts, pieces, strict=True))

    def cross(self, rows: Tensor) -> Tensor:
        """``rows U^T``, ``(..., N m)``, for given feature rows ``(..., P)``."""
        return torch.cat([part.cross(rows) for part in self.parts], -1)


@torch.no_grad()
def at_weights(lin: Linearization, weights: Tensor) -> Linearization:
    """A copy of ``lin`` at other weights ``(P,)``."""
    lin = copy.deepcopy(lin)
    parameters = dict(lin.net.named_parameters())
    for name, value in lin.function.unflatten(weights).items():
        parameters[name].copy_(value)
    return lin
