"""GRU and LSTM at infinite width, by averages over paths of their gates.

A unit of such a net is a recurrence of single numbers, driven by Gaussian processes over the tokens: pre-activations of
its gates, independent of each other, each with a covariance like that of a simple RNN,

    C(t, r) = sigma_u^2 x^t.x'^r / d + sigma_w^2 H(t-1, r-1) + sigma_b^2,     H(t, r) = lim h^t.h'^r / width

H is an expectation over these processes. It is taken for each pair of sequences by itself: at the nodes of one
low-discrepancy rule the processes are drawn token after token, as C becomes known, with its Cholesky factor. So a value
depends on its pair and the number of paths, on no other sequence, and is the same in every call. A GRU's state is a
mean of candidates weighted by gates, which are independent: these two are averaged separately.

    GRU, "before" (Yang 2019)   h^t = (1 - z) h^{t-1} + z phi(U x + W (r h^{t-1}) + b)      the reset gate is r
    GRU, "after" (torch)        h^t = z h^{t-1} + (1 - z) phi(U x + b + r (W h^{t-1} + b'))
    LSTM (torch)                c^t = f c^{t-1} + i phi(..),   h^t = o phi(c^t)
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import tiling
from .integrals import Dual, Erf, Numerical, dual
from .matrix import Recursion
from .recurrent import later, read, reversed_states
from .sequences import Sequences, num_tokens, split, unpack
from .state import Features, Run, Within

NUGGET = 1e-12  # added to variances, relative: so derivatives are right where sequences begin in the same way
NEGLIGIBLE = 1e-8  # what is left of a variance, relative, that nothing else is made to depend on
MAX_DIMENSIONS = torch.quasirandom.SobolEngine.MAXDIM


def erf_gate(x: Tensor) -> Tensor:
    """(1 + erf x)/2."""
    return (1 + torch.erf(x)) / 2


@dataclass(frozen=True)
class Shifted:
    """phi(x + mean)."""

    phi: Callable[[Tensor], Tensor]
    mean: float

    def __call__(self, x: Tensor) -> Tensor:
        return self.phi(x + self.mean)


FUNCTIONS = {"erf": erf_gate, "logistic": torch.sigmoid}
CANDIDATES = {"erf": torch.erf, "tanh": torch.tanh}


@functools.lru_cache(maxsize=8)
def nodes(dimensions: int, paths: int, rule: int = 0) -> Tensor:
    """Standard normal numbers ``(dimensions, paths)``: Sobol points, digitally shifted.

    The first dimensions are the same whatever their number. ``rule`` makes another shift.
    """
    bits = 30
    generator = torch.Generator().manual_seed(rule)
    shifts = torch.randint(2**bits, (MAX_DIMENSIONS,), generator=generator)[:dimensions]
    points = torch.quasirandom.SobolEngine(dimensions).draw(paths, dtype=torch.float64)
    u = (torch.bitwise_xor((points * 2**bits).long(), shifts).double() + 0.5) / 2**bits
    return torch.special.ndtri(u).mT.contiguous()


class _Process:
    """Gaussian processes, drawn at one token after the other, given those at all tokens of a first sequence.

    Covariances across are averages over paths too, so that all of them together may miss positive semidefiniteness by
    the error of these; variances are right nevertheless.

    Args:
        nodes: standard normal numbers, ``(G, L, M)`` for G processes.
        factor: Cholesky factor of the first sequence, ``(G, P, T, T)`` for P pairs, or None if there is none.
        first_nodes: its numbers, ``(G, T, M)``.
    """

    def __init__(self, nodes: Tensor, factor: Tensor | None = None, first_nodes: Tensor | None = None) -> None:
        self.nodes, self.first_nodes = nodes, first_nodes
        self.factor = None if factor is None else _for_solves(factor, factor.square().sum(-1))
        self.across: list[Tensor] = []
        self.rows: list[Tensor] = []
        self.variances: list[Tensor] = []

    def draw(self, own: Tensor, across: Tensor | None = None) -> Tensor:
        """``(G, P, M)``, given covariances ``(G, P, r + 1)`` with tokens so far, and ``(G, P, T)`` with the first's."""
        variance, own = own[..., -1], own[..., :-1]
        left = variance * (1 + NUGGET)
        drawn = 0
        if across is not None:
            along, left = _conditioned(self.factor, across, left)
            drawn = along @ self.first_nodes
            if self.rows:
                own = own - (torch.stack(self.across, -2) @ along.unsqueeze(-1)).squeeze(-1)
            self.across.append(along)
        r = len(self.rows)
        if r:
            factor = torch.stack([torch.nn.functional.pad(row, (0, r - row.shape[-1])) for row in self.rows], -2)
            own, left = _conditioned(_for_solves(factor, torch.stack(self.variances, -1)), own, left)
        rest = torch.maximum(left, NUGGET * variance.detach() + 1e-30).sqrt()
        self.rows.append(torch.cat([own, rest.unsqueeze(-1)], -1))
        self.variances.append(variance)
        return drawn + self.rows[-1] @ self.nodes[:, : r + 1]


def _for_solves(factor: Tensor, variance: Tensor) -> Tensor:
    """A Cholesky factor by whose negligible pivots nothing is divided."""
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    negligible = pivots.square() <= NEGLIGIBLE * variance
    return factor.diagonal_scatter(torch.where(negligible, 1e30, pivots), dim1=-2, dim2=-1)


def _conditioned(factor: Tensor, covariance: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients of what is known, ``(..., T)``, and the variance that is left."""
    row = torch.linalg.solve_triangular(factor, covariance.unsqueeze(-1), upper=False).squeeze(-1)
    square = row.square().sum(-1)
    excess = square > variance
    shrink = torch.where(excess, variance / torch.where(excess, square, 1), 1)
    return row * shrink.sqrt().unsqueeze(-1), variance - shrink * square


@dataclass(frozen=True)
class Side:
    """What is known of one sequence of each pair.

    Attributes:
        x: x.x'/d within it, or H of the layer below, ``(P, T, T)``.
        h: H(t-1, r-1) within it, ``(P, T, T)``.
        mask: true at tokens, false at padding, ``(P, T)``.
        drawn: what its unit does along the paths, tuples of ``(P, T, M)``.
    """

    x: Tensor
    h: Tensor
    mask: Tensor
    drawn: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class GatedRecurrence(Recursion):
    """Stacked layers of gated units in one direction, or one layer in each of both.

    ``run.hyper`` has ``input_variance``, ``recurrent_variance`` and ``bias_variance``, one each or one for each gate,
    and ``readout_variance``. The arithmetic is in float64 whatever the inputs are.

    Attributes:
        input_size, readout, num_layers, bidirectional, bias: see :class:`SimpleRecurrence`.
        bias_mean: of the biases of each gate.
        paths: M, over which it averages; even, best a power of two.
        rule: which shift of the nodes.
    """

    input_size: int
    readout: str = "last"
    num_layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    bias_mean: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    paths: int = 2**10
    rule: int = 0

    gates = ()  # in the order of variances

    @property
    @abc.abstractmethod
    def processes(self) -> tuple[str, ...]:
        """What is drawn along the paths."""

    @abc.abstractmethod
    def covariance(self, v: dict, process: str, x: Tensor, h: Tensor) -> Tensor:
        """C of a process, entry by entry, from x.x'/d and H before."""

    @abc.abstractmethod
    def unit(self, z: dict[str, Tensor], before: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """What the unit does at a token, ``(P, M)`` each, from the processes there and what it did before."""

    @abc.abstractmethod
    def column(
        self, v: dict, first: Side, new: tuple, x: Tensor, h: Tensor, own: tuple, memory: Tensor | None
    ) -> tuple:
        """H of all tokens of ``first`` and a new one, ``(P, T)``, and what the next one needs.

        Args:
            v: variances of each gate.
            first: of which ``drawn`` is known.
            new: what the unit does at the new token, ``(P, M)`` each.
            x, h: x.x'/d and H before, of each token of ``first`` and the new one, ``(P, T)``.
            own: the same of the new one with itself, ``(P, 1)``; None if it is the last of ``first``.
            memory: what the token before returned.
        """

    # ---- the kernel

    @property
    def num_variances(self) -> int:
        """How many of each kind there may be."""
        return len(self.gates)

    def describe(self) -> str:
        """One line."""
        return repr(self)

    def require_inputs(self, x: Tensor) -> None:
        """Packed sequences, not too long."""
        length = unpack(x, self.input_size).mask.shape[-1]
        most = MAX_DIMENSIONS // (2 * len(self.processes))
        if length > most:
            raise ValueError(
                f"Sequences of {length} tokens are too long for paths of gates, which take {most} at most. Pool "
                "tokens, or take a simple RNN, which needs no paths."
            )

    def rows(self, shape: tuple[int, ...]) -> int:
        """L with ``readout="all"``."""
        return num_tokens(shape[0], self.input_size) if self.readout == "all" else 1

    def widest(self, x: Tensor, shape: tuple[int, ...], run: Within) -> int:
        """All paths of one sequence."""
        return self.paths * num_tokens(shape[0], self.input_size)

    def block(self, x: Features) -> Tensor:
        """See :class:`Recursion`."""
        first, second = (split(side, self.input_size) for side in (x.x1, x.x2))
        H = self._one_direction(first, second, x.run, "forward")
        if self.bidirectional:
            back = self._one_direction(first.reversed(), second.reversed(), x.run, "backward")
            if self.readout == "all":
                back = reversed_states(back, first, second)
            H = (H + back) / 2
        return H

    def _one_direction(self, first: Sequences, second: Sequences, run: Run, name: str) -> Tensor:
        pairs = torch.broadcast_shapes(
            (*first.lengths.shape, 1), (*second.lengths.shape[:-1], 1, second.lengths.shape[-1])
        )
        v = self._variances(run, pairs)
        names = [f"{name} {i + 1}" for i in range(self.num_layers)]
        if run.within:
            tokens = first.tokens.squeeze(-3).flatten(0, -3).double()
            below = tokens @ tokens.mT / self.input_size
            for run.node in names:
                below = self._within(v, below)
                run.record(below.unflatten(0, pairs[:-2]), lambda h: (h,), 2)
        else:
            tokens, lengths, known = [], [], []
            for side, axis in ((first, -1), (second, -2)):
                lengths.append(side.lengths.unsqueeze(axis).expand(pairs).flatten())
                spread = side.tokens.unsqueeze(axis - 2).expand(*pairs, *side.tokens.shape[-2:])
                tokens.append(spread.flatten(0, -3).double())
            swapped, equal = _order(tokens, lengths)
            for run.node in names:
                taken = [
                    h[0].unsqueeze(axis - 2).expand(*pairs, *h[0].shape[-2:]) for h, axis in zip(run.taken(), (-1, -2))
                ]
                known.append(_ordered([h.flatten(0, -3) for h in taken], swapped))
            lengths = _ordered(lengths, swapped)
            a, b = (t[:, : int(n.max())] for t, n in zip(_ordered(tokens, swapped), lengths))
            mask = torch.arange(a.shape[1], device=a.device) < lengths[0].unsqueeze(-1)
            (xa, xb), below = (t @ t.mT / self.input_size for t in (a, b)), a @ b.mT / self.input_size
            for ha, hb in known:
                ha, hb = (h[:, : t.shape[1], : t.shape[1]] for h, t in ((ha, a), (hb, b)))
                below = self._across(v, Side(xa, _before(ha), mask), xb, _before(hb), below)
                below = torch.where(equal[:, None, None], (_fitted(ha, below) + _fitted(hb, below)) / 2, below)
                xa, xb = ha, hb
            length = first.tokens.shape[-2]
            below = _fitted(below, below.new_empty(length, length))
            below = torch.where(swapped[:, None, None], below.mT, below)
        return read(below.unflatten(0, pairs).to(first.tokens), self.readout, first, second, run)

    def _variances(self, run: Run, pairs: torch.Size) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """sigma_u^2, sigma_w^2 and sigma_b^2 of each gate, ``(P, 1)``, or ``(1, 1)`` for all pairs."""
        found = {}
        for i, gate in enumerate(self.gates):
            values = []
            for name in ("input_variance", "recurrent_variance", "bias_variance"):
                value = run.hyper[name].double()
                value = value[..., i if value.shape[-1] > 1 else 0]
                if value.dim():
                    value = value.view(*value.shape, *[1] * (len(pairs) - value.dim())).expand(pairs)
                values.append(value.reshape(-1, 1))
            found[gate] = (*values[:2], values[2] if self.bias else torch.zeros_like(values[2]))
        return found

    def _nodes(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """For the first and the second sequence of a pair, ``(G, L, M)``: the second's once more with opposite sign."""
        G = len(self.processes)
        z = nodes(2 * G * length, self.paths // 2, self.rule).to(like.device).unflatten(0, (length, 2, G))
        first, second = (z[:, side].transpose(0, 1) for side in (0, 1))
        return torch.cat([first, first], -1), torch.cat([second, -second], -1)

    def _within(self, v: dict, x: Tensor) -> Tensor:
        """H of all pairs of tokens of each sequence, ``(P, T, T)``, from x.x'/d."""
        length = x.shape[-1]
        if torch.is_grad_enabled() and any(u.requires_grad for u in (x, *(u for each in v.values() for u in each))):
            tiling.require_memory(
                2 * self.paths * length**2 * len(x),  # every token keeps the paths of all before it
                x.dtype,
                x.device,
                f"Gradients along {self.paths} paths, for {len(x)} sequence(s) of {length} tokens,",
                "Take shorter sequences, fewer of them at once, fewer paths, or torch.no_grad().",
            )
        process = _Process(self._nodes(length, x)[0][..., : self.paths // 2])  # the other half is the same
        columns, states, state, memory = [], [], None, None
        for t in range(length):
            h = torch.nn.functional.pad(columns[-1], (1, 0)) if t else torch.zeros_like(x[:, 0, :1])
            z = process.draw(self._covariances(v, x[:, : t + 1, t], h))
            state = self.unit(dict(zip(self.processes, z)), state)
            states.append(state)
            drawn = tuple(torch.stack(s, 1) for s in zip(*states))
            diagonal = [torch.stack([c[:, -1] for c in columns[:t]], -1)] if t else []
            diagonal = torch.cat([torch.zeros_like(h[:, :1]), *diagonal], -1)
            first = Side(x[:, : t + 1, : t + 1], torch.diag_embed(diagonal), torch.ones_like(h).bool(), drawn)
            column, memory = self.column(v, first, state, x[:, : t + 1, t], h, None, memory)
            columns.append(column)
        upper = torch.stack([torch.nn.functional.pad(c, (0, length - c.shape[-1])) for c in columns], -1)
        return upper + upper.triu(1).mT

    def _across(self, v: dict, first: Side, x2: Tensor, h2: Tensor, x: Tensor) -> Tensor:
        """H of all tokens of first sequences with all of the second, ``(P, T, T')``, from x.x'/d and H before."""
        num_first, num_second = x.shape[-2:]
        z1, z2 = self._nodes(max(num_first, num_second), x)
        z1 = z1[:, :num_first]
        C = self._covariances(v, first.x, first.h) * (first.mask.unsqueeze(-1) & first.mask.unsqueeze(-2))
        variance = C.diagonal(dim1=-2, dim2=-1)
        factor = torch.linalg.cholesky(C + torch.diag_embed(NUGGET * variance + 1e-30))
        z = factor @ z1[..., : self.paths // 2].unsqueeze(1)  # (G, P, T, M / 2): the other half is the same
        states, state = [], None
        for t in range(num_first):
            state = self.unit(dict(zip(self.processes, z[:, :, t])), state)
            states.append(state)
        first = replace(first, drawn=tuple(torch.stack(s, 1).repeat(1, 1, 2) for s in zip(*states)))
        process = _Process(z2, factor, z1)
        columns, state, memory = [], None, None
        h = torch.zeros_like(x[..., 0])
        for r in range(num_second):
            own = x2[:, : r + 1, r], h2[:, : r + 1, r]
            z = process.draw(self._covariances(v, *own), self._covariances(v, x[..., r], h) * first.mask)
            state = self.unit(dict(zip(self.processes, z)), state)
            ends = tuple(o[:, -1:] for o in own)
            column, memory = self.column(v, first, state, x[..., r], h, ends, memory)
            columns.append(column)
            h = later(column)
        return torch.stack(columns, -1)

    def _covariances(self, v: dict, x: Tensor, h: Tensor) -> Tensor:
        """Of all processes, ``(G, P, T)``, or ``(G, P, T, T)``."""
        if x.dim() == 3:
            v = {gate: tuple(s.unsqueeze(-1) for s in values) for gate, values in v.items()}
        return torch.stack([self.covariance(v, process, x, h) for process in self.processes])


def _before(h: Tensor) -> Tensor:
    """H(t-1, r-1) at t, r."""
    return torch.nn.functional.pad(h[..., :-1, :-1], (1, 0, 1, 0))


def _fitted(h: Tensor, like: Tensor) -> Tensor:
    """As many rows and columns as ``like`` has: cut, or zeros added."""
    return torch.nn.functional.pad(h, (0, like.shape[-1] - h.shape[-1], 0, like.shape[-2] - h.shape[-2]))


def _order(tokens: list[Tensor], lengths: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Which pairs are swapped, so that of two sequences always the same comes first, and which are equal, ``(P,)``."""
    a, b = (torch.cat([n.unsqueeze(-1).to(t), t.flatten(1)], -1).detach() for t, n in zip(tokens, lengths))
    unequal = a != b
    at = unequal.int().argmax(-1, keepdim=True)
    return (a.gather(-1, at) > b.gather(-1, at)).squeeze(-1), ~unequal.any(-1)


def _ordered(sides: list[Tensor], swapped: Tensor) -> tuple[Tensor, Tensor]:
    a, b = sides
    swapped = swapped.view(-1, *[1] * (a.dim() - 1))
    return torch.where(swapped, b, a), torch.where(swapped, a, b)


def _affine(v: tuple[Tensor, Tensor, Tensor], x: Tensor, h: Tensor) -> Tensor:
    return v[0] * x + v[1] * h + v[2]


# ---- units


@dataclass(frozen=True)
class GRURecurrence(GatedRecurrence):
    """Gated recurrent units.

    Attributes:
        reset: whether the reset gate acts "before" the weights, and the update gate on the new state (Yang 2019), or
            "after" them and on the old state (torch).
        gate: "erf", (1 + erf x)/2, or "logistic".
        activation: of the candidate, "erf" or "tanh".
    """

    reset: str = "after"
    gate: str = "logistic"
    activation: str = "tanh"

    gates = ("reset", "update", "candidate")

    @property
    def processes(self) -> tuple[str, ...]:
        return ("update",) if self.reset == "before" else ("update", "reset", "input", "hidden")

    def covariance(self, v: dict, process: str, x: Tensor, h: Tensor) -> Tensor:
        if process in self.gates:
            return _affine(v[process], x, h)
        u, w, b = v["candidate"]
        return u * x + b / 2 if process == "input" else w * h + b / 2  # torch has half of the biases on either side

    def unit(self, z: dict[str, Tensor], before: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        sigma, phi = FUNCTIONS[self.gate], CANDIDATES[self.activation]
        mean = dict(zip(self.gates, self.bias_mean))
        if self.reset == "before":
            return (sigma(z["update"] + mean["update"]),)
        update = sigma(-z["update"] - mean["update"])  # what the new state gets
        reset = sigma(z["reset"] + mean["reset"])
        return update, phi(z["input"] + mean["candidate"] + reset * z["hidden"])

    def column(
        self, v: dict, first: Side, new: tuple, x: Tensor, h: Tensor, own: tuple, memory: Tensor | None
    ) -> tuple:
        z, z_new = first.drawn[0], new[0]
        if self.reset == "before":
            variances = tuple(m.diagonal(dim1=-2, dim2=-1) for m in (first.x, first.h))
            E = self._candidates(v, variances, own or tuple(m[:, -1:] for m in variances), x, h)
        else:
            E = torch.einsum("ptm,pm->pt", first.drawn[1], new[1]) / new[1].shape[-1]
        mixed, row = [], 0  # E[h^t phi'], given the gates
        for t in range(E.shape[-1]):
            row = z[:, t] * E[:, t, None] if t == 0 else torch.lerp(row, E[:, t, None].expand_as(row), z[:, t])
            mixed.append(row)
        X, z_new = torch.stack(mixed, 1), z_new.unsqueeze(1)
        if own is not None:  # E[h^t h'^r] = (1 - z'^r) E[h^t h'^{r-1}] + z'^r E[h^t phi'^r]
            S = z_new * X if memory is None else torch.lerp(memory, X, z_new.expand_as(X))
        elif memory is None:
            S = z_new * z_new * E.unsqueeze(-1)
        else:
            S = torch.lerp(memory, X[:, :-1], z_new.expand_as(memory))
            S = torch.cat([S, torch.lerp(S[:, -1:], X[:, -1:], z_new)], 1)
        return S.mean(-1), S

    def _candidates(self, v: dict, a: tuple, b: tuple, x: Tensor, h: Tensor) -> Tensor:
        """E[phi phi'] in closed form, from x.x'/d and H of both tokens with themselves and with each other."""
        phi, sigma = self._duals
        R = [_affine(v["reset"], *side) for side in (a, b, (x, h))]
        u, w, bias = v["candidate"]
        R = sigma.variance(R[0]), sigma.variance(R[1]), sigma(*R)
        C = [u * side[0] + w * side[1] * r + bias for side, r in zip((a, b, (x, h)), R)]
        return phi(*C)

    @functools.cached_property
    def _duals(self) -> tuple[Dual, Dual]:
        mean = dict(zip(self.gates, self.bias_mean))
        phi, sigma = CANDIDATES[self.activation], FUNCTIONS[self.gate]
        closed_phi = Erf() if self.activation == "erf" else dual(self.activation)
        closed_sigma = Erf(0.5, 1.0, 0.5) if self.gate == "erf" else dual("sigmoid")
        return (
            Numerical(Shifted(phi, mean["candidate"])) if mean["candidate"] else closed_phi,
            Numerical(Shifted(sigma, mean["reset"])) if mean["reset"] else closed_sigma,
        )


@dataclass(frozen=True)
class LSTMRecurrence(GatedRecurrence):
    """Long short-term memory: logistic gates, tanh. The output gate, no part of the memory, is in closed form."""

    gates = ("input", "forget", "cell", "output")

    @property
    def processes(self) -> tuple[str, ...]:
        return self.gates[:3]

    def covariance(self, v: dict, process: str, x: Tensor, h: Tensor) -> Tensor:
        return _affine(v[process], x, h)

    def unit(self, z: dict[str, Tensor], before: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        i, f, g = (z[process] + mean for process, mean in zip(self.processes, self.bias_mean))
        c = i.sigmoid() * g.tanh()
        if before is not None:
            c = c + f.sigmoid() * before[1]
        return c.tanh(), c

    def column(
        self, v: dict, first: Side, new: tuple, x: Tensor, h: Tensor, own: tuple, memory: Tensor | None
    ) -> tuple:
        variances = tuple(m.diagonal(dim1=-2, dim2=-1) for m in (first.x, first.h))
        sides = variances, own or tuple(m[:, -1:] for m in variances), (x, h)
        gates = self._dual(*(_affine(v["output"], *side) for side in sides))
        return gates * torch.einsum("ptm,pm->pt", first.drawn[0], new[0]) / new[0].shape[-1], None

    @functools.cached_property
    def _dual(self) -> Dual:
        mean = self.bias_mean[3]
        return Numerical(Shifted(torch.sigmoid, mean)) if mean else dual("sigmoid")
