"""Simple recurrent nets at infinite width: a sequence of tokens in, a number out.

    h^t = W s^{t-1} + U x^t + b,  s^t = phi(h^t),  y^t = <v, s^t>,  s^0 = 0     (Yang 2019, Tensor Programs I)

W, U, b and v are the same at all times and for all sequences. For tokens t, r of two sequences

    H(t, r) = sigma_u^2 x^t.x'^r / d + sigma_b^2 + sigma_w^2 S(t-1, r-1),    S(t, r) = V_phi(H(t, r))

so an entry needs those of its own diagonal alone: the last states of two sequences take as many steps as the shorter
has tokens, and no other entry is ever made. The mean over time needs all of them, of one tile of pairs at a time.
Layers above another one read the state below in place of x.

NTK (Yang 2020, Tensor Programs II). Gradients reach the weights at all earlier times, but only uses equally far from
the end meet, so T follows the same diagonal: T_H = (what the weights add) + sigma_w^2 T_S(t-1, r-1), T_S = V'_phi T_H.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .integrals import Dual
from .matrix import Recursion
from .sequences import READOUTS, Sequences, num_tokens, split, unpack
from .state import Features, Run, Within

Steps = tuple[Tensor, Tensor | None]  # S and T


@dataclass(frozen=True)
class SimpleRecurrence(Recursion):
    """Stacked layers in one direction, or one layer in each of both.

    ``run.hyper`` has ``input_variance``, ``recurrent_variance`` and ``bias_variance``, one each or one for each layer,
    and ``readout_variance``. NTKs are of parameters N(0, 1), with ``run.ntk == "ntk"``, or of parameters that carry
    their variance ("plain").

    Attributes:
        input_size: d, numbers per token.
        dual: of phi.
        readout: "last" state, "mean" over time, or "all" states, which makes L rows for each sequence, zero for
            padding.
        num_layers: stacked.
        bidirectional: whether a second net, of weights of its own, reads each sequence from its end.
        bias: whether there are biases.
    """

    input_size: int
    dual: Dual
    readout: str = "last"
    num_layers: int = 1
    bidirectional: bool = False
    bias: bool = True

    @property
    def num_variances(self) -> int:
        """How many of each kind there may be."""
        return self.num_layers

    def describe(self) -> str:
        """One line."""
        given = [f"{self.dual!r}", f"input_size={self.input_size}", f"readout={self.readout!r}"]
        given += [f"num_layers={self.num_layers}"] if self.num_layers > 1 else []
        given += [
            name for name, there in (("bidirectional", self.bidirectional), ("no biases", not self.bias)) if there
        ]
        return f"recurrent net of {', '.join(given)}"

    def require_inputs(self, x: Tensor) -> None:
        """Packed sequences."""
        unpack(x, self.input_size)

    def rows(self, shape: tuple[int, ...]) -> int:
        """L with ``readout="all"``."""
        return num_tokens(shape[0], self.input_size) if self.readout == "all" else 1

    def num_steps(self, shape: tuple[int, ...]) -> int:
        """One for each token and layer."""
        return num_tokens(shape[0], self.input_size) * self.num_layers * (1 + self.bidirectional)

    def widest(self, x: Tensor, shape: tuple[int, ...], run: Within) -> int:
        """A number for each layer; for the mean, along one sequence; for all states, along both."""
        length = num_tokens(shape[0], self.input_size)
        return length ** READOUTS.index(self.readout) * (1 + self.num_layers)

    def block(self, x: Features) -> Tensor:
        """See :class:`Recursion`."""
        first, second = (split(side, self.input_size) for side in (x.x1, x.x2))
        out = self._one_direction(first, second, x.run, "forward")
        if self.bidirectional:  # weights of their own, so the kernels add
            back = self._one_direction(first.reversed(), second.reversed(), x.run, "backward")
            if self.readout == "all":  # a state stands at the token that it has just read
                back = reversed_states(back, first, second)
            out = (out + back) / 2
        return out

    def _one_direction(self, first: Sequences, second: Sequences, run: Run, name: str) -> Tensor:
        nodes = [f"{name} {i + 1}" for i in range(self.num_layers)]
        last = self.readout == "last"
        sides = [s.at_the_right() if last else (s.tokens, s.mask) for s in (first, second)]
        if run.within:
            above, variances, exact = self._along(sides, run, self._variance)
            prepare = functools.partial(self.dual.points, derivative=run.ntk is not None)
            points = []
            for run.node, variance in zip(nodes, variances):
                prepared = prepare(run.record(variance, prepare, 1))
                points.append((tuple(p.unsqueeze(-2) for p in prepared),) * 2)
            if not last:
                above = self._throughout(sides, run, points, exact)
        else:
            points = []
            for run.node in nodes:
                points.append(run.taken())
            above = self._along(sides, run, functools.partial(self._both, points))[0] if last else None
            above = above if last else self._throughout(sides, run, points)
        return self._read(above, first, second, run)

    def _read(self, above: Steps, first: Sequences, second: Sequences, run: Run) -> Tensor:
        """Covariance of y, or its NTK."""
        if self.readout == "mean":
            pairs = first.lengths.unsqueeze(-1) * second.lengths.unsqueeze(-2)
            above = tuple(x if x is None else x / pairs for x in above)
        s, t = above
        v = run.per_pair(run.hyper["readout_variance"][..., 0], s)
        if run.ntk is None:
            return v * s
        return v * t + (v * s if run.ntk == "ntk" else s)

    # ---- steps

    def _step(self, run: Run, below: Tensor, before: list[Steps], dual: Callable) -> tuple[list[Steps], list[Tensor]]:
        """S and T of all layers at one time, and H, from x.x'/d and the S and T before; ``dual(layer, H)`` is V, V'."""
        now, variances, t_below = [], [], None
        for i, (s, t) in enumerate(before):
            u, w, b = (run.per_pair(value, below) for value in self._of_layer(run, i))
            h = u * below + w * s + b
            variances.append(h)
            s, slope = dual(i, h)
            if run.ntk is not None:
                added = h if run.ntk == "ntk" else below + before[i][0] + float(self.bias)
                t = slope * (added + w * t + (0 if t_below is None else u * t_below))
            now.append((s, t))
            below, t_below = s, t
        return now, variances

    def _of_layer(self, run: Run, i: int) -> list[Tensor]:
        names = ("input_variance", "recurrent_variance", "bias_variance")
        u, w, b = (v[..., i if v.shape[-1] > 1 else 0] for v in (run.hyper[name] for name in names))
        return [u, w, b if self.bias else torch.zeros_like(b)]

    def _variance(self, time: int, ntk: bool, layer: int, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """V and V' of a sequence with itself."""
        return self.dual.variance(h), self.dual.variance_of_derivative(h) if ntk else None

    def _both(self, points: list, time: int, ntk: bool, layer: int, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """V and V' of pairs at the same time."""
        p, q = points[layer]
        p, q = tuple(x[..., time].unsqueeze(-1) for x in p), tuple(x[..., time].unsqueeze(-2) for x in q)
        return self.dual.both(p, q, h) if ntk else (self.dual.value(p, q, h), None)

    def _across(self, points: list, time: int, ntk: bool, layer: int, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """V and V' of pairs, the first at this time, the second at all."""
        p, q = points[layer]
        p, q = tuple(x[..., time, None, None] for x in p), tuple(x.unsqueeze(-3) for x in q)
        return self.dual.both(p, q, h) if ntk else (self.dual.value(p, q, h), None)

    def _start(self, like: Tensor, run: Run) -> list[Steps]:
        zero = torch.zeros_like(like)
        return [(zero, None if run.ntk is None else zero)] * self.num_layers

    # ---- all pairs at equal times

    def _along(self, sides: list, run: Run, dual: Callable) -> tuple[Steps, list[Tensor], list[list[Steps]]]:
        """S and T at the end; H of each layer at all times; S and T of each time."""
        (x1, mask1), (x2, mask2) = sides
        length, ntk = x1.shape[-2], run.ntk is not None
        start = 0 if run.within else length - int(torch.minimum(mask1.sum(-1).max(), mask2.sum(-1).max()))
        now, variances, states = None, [], []
        for time in range(start, length):
            below = x1[..., time, :] @ x2[..., time, :].mT / self.input_size
            active = mask1[..., time].unsqueeze(-1) & mask2[..., time].unsqueeze(-2)
            before = now or self._start(below, run)
            now, h = self._step(run, below, before, _where(active, functools.partial(dual, time, ntk)))
            if run.within:
                variances.append([torch.where(active, v, 0)[..., 0] for v in h])
                states.append(now)
        return now[-1], [torch.cat(v, -1) for v in zip(*variances)], states

    # ---- all pairs at all times

    def _throughout(self, sides: list, run: Run, points: list, exact: list | None = None) -> Steps:
        """S and T of the top layer, summed over all times, or with ``readout="all"`` one for each pair of times."""
        (x1, mask1), (x2, mask2) = sides
        ntk, columns = run.ntk is not None, x2.flatten(-3, -2).mT / self.input_size
        now, rows = None, []
        for time in range(int(mask1.sum(-1).max())):
            below = (x1[..., time, :] @ columns).unflatten(-1, x2.shape[-3:-1])  # (*B, n1, n2, L)
            active = mask1[..., time, None, None] & mask2.unsqueeze(-3)
            dual = _where(active, functools.partial(self._across, points, time, ntk))
            if now is None:
                before = self._start(below, run)
            else:
                before = [tuple(None if v is None else later(v) for v in layer) for layer in now]
            now, _ = self._step(run, below, before, dual)
            if exact is not None:  # equal times of a sequence and itself
                now = [tuple(_replaced(v, e, time) for v, e in zip(*layers)) for layers in zip(now, exact[time])]
            rows.append(now[-1] if self.readout == "all" else tuple(v if v is None else v.sum(-1) for v in now[-1]))
        s, t = zip(*rows)
        if self.readout == "mean":
            return sum(s), sum(t) if ntk else None
        return _stacked(s, x1.shape[-2]), _stacked(t, x1.shape[-2]) if ntk else None


def read(states: Tensor, readout: str, first: Sequences, second: Sequences, run: Run) -> Tensor:
    """Covariance of y from that of all states, ``(*B, n1, n2, L, L)``."""
    i, j = first.lengths.unsqueeze(-1), second.lengths.unsqueeze(-2)
    if readout == "last":
        rows = states.gather(-2, (i - 1)[..., None, None].expand(*states.shape[:-2], 1, states.shape[-1]))
        states = rows.squeeze(-2).gather(-1, (j - 1).expand(states.shape[:-2]).unsqueeze(-1)).squeeze(-1)
    else:
        mask = first.mask.unsqueeze(-2).unsqueeze(-1) & second.mask.unsqueeze(-3).unsqueeze(-2)
        states = torch.where(mask, states, 0)
    if readout == "mean":
        states = states.sum((-2, -1)) / (i * j)
    return run.per_pair(run.hyper["readout_variance"][..., 0], states) * states


def _where(active: Tensor, dual: Callable) -> Callable:
    """V and V' where ``active``, zero elsewhere, with finite gradients."""

    def masked(layer: int, h: Tensor) -> tuple[Tensor, Tensor | None]:
        values = dual(layer, torch.where(active, h, 0))
        return tuple(None if v is None else torch.where(active, v, 0) for v in values)

    return masked


def later(v: Tensor) -> Tensor:
    """Entry r - 1 at r, zero at the first."""
    return torch.nn.functional.pad(v[..., :-1], (1, 0))


def _replaced(v: Tensor | None, exact: Tensor | None, time: int) -> Tensor | None:
    return None if v is None else v.select_scatter(exact, -1, time)


def _stacked(rows: list[Tensor], length: int) -> Tensor:
    """``(*B, n1, n2, L)`` for each time -> ``(*B, n1, n2, L, L)``, zero after the last."""
    return torch.nn.functional.pad(torch.stack(rows, -2), (0, 0, 0, length - len(rows)))


def reversed_states(block: Tensor, first: Sequences, second: Sequences) -> Tensor:
    """Rows and columns of each block in the order of the tokens, the padding left behind them."""
    length = block.shape[-1]
    places = torch.arange(length, device=block.device)
    i, j = ((s.lengths.unsqueeze(-1) - 1 - places) % length for s in (first, second))
    block = block.gather(-2, i.unsqueeze(-2).unsqueeze(-1).expand(block.shape))
    return block.gather(-1, j.unsqueeze(-3).unsqueeze(-2).expand(block.shape))
