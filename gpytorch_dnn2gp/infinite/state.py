"""What travels through an infinitely wide net: for pairs of inputs, a covariance and its tangent.

    K  (k)   covariance of one channel, E[h(x) h(x')]
    T  (t)   NTK of what has been computed so far

A layer is a map of K, and of T by one mechanism: where K_out = F(K) at fixed variances K(x, x) and K(x', x'), then
T_out = dF[T], plus K_out if the layer has weights of its own (docs/notation.md). Layers say so with the methods of
:class:`State`: :meth:`State.linear` and :meth:`State.pointwise`, or :meth:`State.through` for any F that torch can
differentiate; :meth:`State.weighted` adds the weights.

Shapes: ``(*B, n1, n2, *S)``; S are positions (of an image, a sequence), none for vectors. Where a later layer mixes
positions, the state is ``full``: ``(*B, n1, n2, *S, *S)``, all pairs of positions.

Every net is run twice: :class:`Within`, each input paired with itself, which yields the variances, then
:class:`Across`, for tiles of all pairs, which reads them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .integrals import Dual, Points


@dataclass(frozen=True)
class Features:
    """Inputs on which nothing random has acted yet.

    Attributes:
        x1, x2: ``(*B, n1, *shape)`` and ``(*B, n2, *shape)``.
        shape: of one input.
        run: see :class:`State`.
    """

    x1: Tensor
    x2: Tensor
    shape: tuple[int, ...]
    run: Run

    def map(self, function: Callable[[Tensor], Tensor]) -> Features:
        """Any function of batches ``(m, *shape)``, exactly; one that works in place does so on a copy."""

        def apply(x: Tensor) -> Tensor:
            lead = x.shape[: x.dim() - len(self.shape)]
            return function(x.reshape(-1, *self.shape).clone()).unflatten(0, lead)

        x1 = apply(self.x1)
        x2 = x1 if self.x2 is self.x1 else apply(self.x2)
        return replace(self, x1=x1, x2=x2, shape=tuple(x1.shape[self.x1.dim() - len(self.shape) :]))


@dataclass(frozen=True)
class State:
    """K and T of all pairs.

    Attributes:
        k: see the module.
        t: as ``k``; None for an NNGP, and before the first weights.
        run: the pass it belongs to.
        positions: sizes S.
        full: whether all pairs of positions are there.
        channels_last: whether channels come after the positions, as ``nn.Linear`` wants them, or before.
        flattened: whether positions and channels have been flattened into one.
        gaussian: whether it is a Gaussian process, as after a layer with weights; an activation's output is not.
        sources: layers whose weights it is linear in, or an activation of; disjoint sources are independent.
    """

    k: Tensor
    t: Tensor | None
    run: Run
    positions: tuple[int, ...] = ()
    full: bool = False
    channels_last: bool = True
    flattened: bool = False
    gaussian: bool = True
    sources: frozenset[str] = frozenset()

    # ---- the mechanism

    def linear(self, A: Callable[[Tensor], Tensor], **changes) -> State:
        """K <- A(K), T <- A(T) for a linear map A."""
        return replace(self, k=A(self.k), t=None if self.t is None else A(self.t), **changes)

    def through(self, F: Callable[[Tensor], Tensor], **changes) -> State:
        """K <- F(K), T <- dF[T] for any F, by forward-mode differentiation."""
        if self.t is None:
            return replace(self, k=F(self.k), **changes)
        k, t = torch.func.jvp(F, (self.k,), (self.t,))
        return replace(self, k=k, t=t, **changes)

    def pointwise(self, dual: Dual) -> State:
        """K <- V(K), T <- V'(K) T: an activation of a Gaussian."""
        if not self.gaussian:
            raise ValueError(
                "it acts on what is not Gaussian, such as the output of another activation, so there is no closed "
                "form. Put a layer with weights between, or make one activation of both (integrals.Numerical)."
            )
        t, prepare = None, functools.partial(dual.points, derivative=self.t is not None)
        if self.run.within and not self.full:
            variance = self.run.record(self.variance(), prepare, self.num_position_axes)
            k = dual.variance(variance).view_as(self.k)
            if self.t is not None:
                t = dual.variance_of_derivative(variance).view_as(self.t) * self.t
            return replace(self, k=k, t=t, gaussian=False)
        p, q = self.run.sides(self, prepare)
        if self.t is None:
            k = dual.value(p, q, self.k)
        else:
            k, slope = dual.both(p, q, self.k)
            t = slope * self.t
        if self.run.within:
            variance = self.variance()
            k = self.with_diagonal(k, dual.variance(variance))
            if t is not None:
                diagonal = self.diagonal_of(self.t)
                t = self.with_diagonal(t, dual.variance_of_derivative(variance).view_as(diagonal) * diagonal)
        return replace(self, k=k, t=t, gaussian=False)

    def weighted(self, layer: str, weight: Tensor, bias: Tensor, fan_in: int, trained: tuple[bool, bool]) -> State:
        """Weights and biases, once K and T are means over the fan-in: K <- K_new = sigma_w^2 K + sigma_b^2.

        T <- sigma_w^2 T + K_new in the ntk parameterisation, sigma_w^2 T + fan_in K + 1 in the standard one, and
        sigma_w^2 T + K + 1 in the plain one.

        Args:
            layer: its name, a new source of randomness.
            weight, bias: sigma_w^2 and sigma_b^2, ``(*B)``.
            fan_in: number of summands.
            trained: whether weights, and biases, are there and trained.
        """
        w, b = self.run.per_pair(weight, self.k), self.run.per_pair(bias, self.k)
        k = torch.addcmul(b, self.k, w)
        t = None
        if self.run.ntk is not None:
            t = torch.zeros_like(k) if self.t is None else self.t * w
            if self.run.ntk == "ntk" and all(trained):
                t = t + k
            elif self.run.ntk == "plain":
                t = t + trained[0] * self.k + float(trained[1])
            elif self.run.ntk == "ntk":
                t = t + trained[0] * (self.k * w) + trained[1] * b
            else:
                t = t + (trained[0] * fan_in) * self.k + float(trained[1])
        return replace(self, k=k, t=t, gaussian=True, sources=frozenset([layer]))

    # ---- positions and variances

    @property
    def num_position_axes(self) -> int:
        """Of one side."""
        return len(self.positions)

    def diagonal(self) -> State:
        """Only equal positions."""
        return self.linear(self.diagonal_of, full=False) if self.full else self

    def variance(self) -> Tensor:
        """Of a state :class:`Within`: ``(*B, n, *S)``."""
        k = self.diagonal_of(self.k) if self.full else self.k
        return k.flatten(k.dim() - self.num_position_axes - 3, k.dim() - self.num_position_axes - 1)

    def diagonal_of(self, k: Tensor) -> Tensor:
        """Of a tensor like a full ``k``: equal positions, ``(..., *S)``."""
        m = self.num_position_axes
        flat = k.flatten(-2 * m, -m - 1).flatten(-m)  # (..., P, P)
        return flat.diagonal(dim1=-2, dim2=-1).unflatten(-1, self.positions)

    def with_diagonal(self, k: Tensor, diagonal: Tensor) -> Tensor:
        """The same with other values there."""
        m = self.num_position_axes
        flat = k.flatten(-2 * m, -m - 1).flatten(-m)
        diagonal = diagonal.reshape(flat.shape[:-1])
        return (
            flat.diagonal_scatter(diagonal, dim1=-2, dim2=-1)
            .unflatten(-1, self.positions)
            .unflatten(-m - 1, self.positions)
        )


# ---- the two passes


@dataclass
class Run:
    """One pass through the net.

    Attributes:
        hyper: hyperparameters by name, such as ``weight_variance``, ``(*B, count)``.
        ntk: None, or the parameterisation: "ntk", "standard" or "plain".
        dropout: whether masks are drawn.
        node: where it is.
        full: whether all pairs of positions are wanted there.
        masks: of sequences that are not all of one length, where tokens are and no padding: ``(*B, n1, L)`` of the
            first of each pair and ``(*B, n2, L)`` of the second; else None.
    """

    hyper: dict[str, Tensor]
    ntk: str | None = None
    dropout: bool = False
    node: str = ""
    full: bool = False
    masks: tuple[Tensor, Tensor] | None = None
    within = False

    def per_pair(self, value: Tensor, like: Tensor) -> Tensor:
        """``(*B)`` broadcast against pairs ``(*B, ...)``."""
        return value.view(*value.shape, *[1] * (like.dim() - value.dim())) if value.dim() else value


@dataclass
class Within(Run):
    """Each input with itself, ``B' = (*B, n)`` and n1 = n2 = 1; keeps the variances that layers ask for."""

    recorded: dict[str, tuple[Tensor, Callable[[Tensor], Points], int]] = field(default_factory=dict)
    within = True

    def record(self, variance: Tensor, prepare: Callable[[Tensor], Points], num_axes: int) -> Tensor:
        """Keep variances ``(*B, n, *S)``, S of ``num_axes`` axes, for :class:`Across`, and what to make of them."""
        self.recorded[self.node] = variance, prepare, num_axes
        return variance

    def sides(self, state: State, prepare: Callable[[Tensor], Points]) -> tuple[Points, Points]:
        """What ``prepare`` makes of the variances, for the first and the second of each pair, to broadcast."""
        m = state.num_position_axes
        points = [p.unsqueeze(-m - 1) for p in prepare(self.record(state.variance(), prepare, m))]
        return _spread(points, state, 1), _spread(points, state, 2)


@dataclass
class Across(Run):
    """All pairs of some inputs with some others.

    Attributes:
        points: of each node, what was prepared of the variances of all inputs, and the number of position axes.
        rows, columns: which of these inputs are paired here.
    """

    points: dict[str, tuple[Points, int]] = field(default_factory=dict)
    rows: slice | None = None
    columns: slice | None = None

    def sides(self, state: State, prepare: Callable[[Tensor], Points]) -> tuple[Points, Points]:
        """As :meth:`Within.sides`."""
        return tuple(_spread(points, state, i + 1) for i, points in enumerate(self.taken()))

    def taken(self) -> tuple[Points, Points]:
        """What was prepared of the rows and of the columns, ``(..., n1, *S)`` and ``(..., n2, *S)``."""
        points, m = self.points[self.node]
        return tuple(tuple(_narrow(p, -m - 1, part) for p in points) for part in (self.rows, self.columns))


def _narrow(p: Tensor, axis: int, part: slice) -> Tensor:
    return p.narrow(axis, part.start, part.stop - part.start)


def _spread(points: Sequence[Tensor], state: State, side: int) -> Points:
    """``(..., n, *S)`` -> axes that broadcast against pairs, ``(..., n1, n2, *S[, *S])``."""
    m = state.num_position_axes
    spread = []
    for p in points:
        p = p.unsqueeze(-m - side)
        if state.full:
            ones = [1] * m
            p = (
                p.view(*p.shape, *ones)
                if side == 1
                else p.view(*p.shape[: p.dim() - m], *ones, *p.shape[p.dim() - m :])
            )
        spread.append(p)
    return tuple(spread)


def products(x1: Tensor, x2: Tensor, positions: tuple[int, ...], full: bool) -> Tensor:
    """Inner products over the last axis: ``(*B, n, P, c)`` twice -> ``(*B, n1, n2, *S[, *S])``."""
    if math.prod(positions) == 1:
        k = x1.squeeze(-2) @ x2.squeeze(-2).mT
        return k.view(*k.shape, *positions, *(positions if full else ()))
    if full:
        k = x1.unsqueeze(-3) @ x2.unsqueeze(-4).mT  # (*B, n1, n2, P, P)
        return k.unflatten(-1, positions).unflatten(-1 - len(positions), positions)
    k = (x1.transpose(-3, -2) @ x2.transpose(-3, -2).mT).movedim(-3, -1)  # (*B, P, n1, n2) -> (*B, n1, n2, P)
    return k.unflatten(-1, positions)
