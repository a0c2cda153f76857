"""GPyTorch kernels of infinitely wide recurrent nets: sequences made by :func:`infinite.pack` in, a covariance out.

simple_rnn(...), gru(...)   from sigmas
recurrent(module)           of nn.RNN, nn.GRU, nn.LSTM
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from gpytorch.constraints import Interval
from gpytorch.priors import Prior
from torch import Tensor, nn

from .constructors import Activation
from .gated import GatedRecurrence, GRURecurrence, LSTMRecurrence
from .hyperparameters import Hyperparameter, InfiniteKernel, Numbers, as_tensors
from .integrals import dual
from .matrix import covariance
from .recurrent import SimpleRecurrence
from .sequences import READOUTS


class RecurrentKernel(InfiniteKernel):
    """Covariance of a recurrent net's output at infinite width, or its NTK. Made by :func:`recurrent` and its kin.

    Inputs are sequences in rows, ``(*B, n, L * d + 1)``, made by :func:`pack`; what is behind their ends does not
    matter. The matrix is ``(*B, n, n')``. With ``readout="all"`` it has a row for each token, ``(*B, n * L, n' * L)``,
    sequence after sequence, zero where there is padding.

    Hyperparameters are one each, or one for each layer, or gate, in the order that :func:`recurrent` tells.
    """

    input_variance = Hyperparameter("sigma_u^2: weights of the input are N(0, sigma_u^2 / d).", each="layers or gates")
    recurrent_variance = Hyperparameter("sigma_w^2: of the state N(0, sigma_w^2 / width).", each="layers or gates")
    bias_variance = Hyperparameter("sigma_b^2: biases are N(0, sigma_b^2).", "zero or more", each="layers or gates")
    readout_variance = Hyperparameter("sigma_v^2: the output is <v, state>, v ~ N(0, sigma_v^2 / width).")

    def __init__(
        self,
        recursion: SimpleRecurrence | GatedRecurrence,
        input_variance: Numbers,
        recurrent_variance: Numbers,
        bias_variance: Numbers,
        readout_variance: Numbers,
        *,
        like: Sequence[Tensor] = (),
        priors: dict[str, Prior] | None = None,
        constraints: dict[str, Interval] | None = None,
        **options,
    ) -> None:
        super().__init__(recursion, **options)
        names = ("input_variance", "recurrent_variance", "bias_variance", "readout_variance")
        values = as_tensors(input_variance, recurrent_variance, bias_variance, readout_variance, like=like)
        counts = dict.fromkeys(names[:3], recursion.num_variances)
        self._register_all(dict(zip(names, values)), counts, priors, constraints)

    @property
    def readout(self) -> str:
        """Which states are read: "last", "mean" or "all"."""
        return self.program.readout

    @property
    def input_size(self) -> int:
        """Numbers per token."""
        return self.program.input_size

    @torch.no_grad()
    def integration_error(self, x1: Tensor, x2: Tensor | None = None, rules: int = 4) -> float:
        """Estimated error of the average over paths: root mean square, relative to the largest entry of the matrix.

        It is the spread of the matrix among ``rules`` shifts of the nodes; zero for a simple RNN, which needs no paths.
        """
        if not isinstance(self.program, GatedRecurrence):
            return 0.0
        hyper = {name: getattr(self, name) for name in self._names}
        programs = [replace(self.program, rule=self.program.rule + i) for i in range(rules)]
        matrices = torch.stack([covariance(p, x1, x2, hyper, progress=self.progress) for p in programs])
        return float(matrices.std(0).square().mean().sqrt() / matrices[0].abs().max())


def simple_rnn(
    input_size: int,
    activation: Activation = "tanh",
    input_variance: Numbers = 1.0,
    recurrent_variance: Numbers = 1.0,
    bias_variance: Numbers = 0.1,
    readout_variance: Numbers = 1.0,
    *,
    readout: str = "last",
    num_layers: int = 1,
    bidirectional: bool = False,
    kernel: str = "nngp",
    parameterization: str = "ntk",
    **options,
) -> RecurrentKernel:
    """A simple recurrent net, exactly.

        h^t = W s^{t-1} + U x^t + b,  s^t = phi(h^t),  y = <v, s>,  s^0 = 0

    The last state of two sequences costs as many steps as the shorter has tokens; the mean over time, or all states,
    as many as both have together, squared. NNGP: Yang 2019, Tensor Programs I; NTK: Yang 2020, Tensor Programs II.

    Args:
        input_size: d, numbers per token.
        activation: phi: "tanh", "relu", "erf", ... (``integrals.ACTIVATIONS``), a function, or an ``integrals.Dual``.
        input_variance, recurrent_variance, bias_variance: U ~ N(0, sigma_u^2 / d), W ~ N(0, sigma_w^2 / width),
            b ~ N(0, sigma_b^2); one each, or one for each layer.
        readout_variance: v ~ N(0, sigma_v^2 / width).
        readout: "last" state, "mean" of all, or "all" of them, a row of the matrix for each.
        num_layers: stacked; those above read the states below.
        bidirectional: whether a second net, of weights of its own, reads each sequence from its end; for one layer.
        kernel: "nngp" or "ntk".
        parameterization: of the NTK: "ntk" (parameters N(0, 1), scaled by sigma where they are used) or "plain"
            (parameters carry their variance: all sigma^2 of the other one are 1 where a gradient meets a parameter).
        options: ``priors`` and ``constraints``, by name of the hyperparameter; ``progress``, ``batch_shape`` and what
            ``gpytorch.kernels.Kernel`` takes.
    """
    recursion = SimpleRecurrence(input_size, dual(activation), readout, num_layers, bidirectional)
    _require_structure(recursion)
    values = input_variance, recurrent_variance, bias_variance, readout_variance
    return RecurrentKernel(recursion, *values, ntk=_ntk(kernel, parameterization), **options)


def gru(
    input_size: int,
    input_variance: Numbers = 1.0,
    recurrent_variance: Numbers = 1.0,
    bias_variance: Numbers = 0.1,
    readout_variance: Numbers = 1.0,
    *,
    gate: str = "erf",
    activation: str = "erf",
    reset: str = "before",
    bias_mean: float | Sequence[float] = 0.0,
    readout: str = "last",
    num_layers: int = 1,
    bidirectional: bool = False,
    paths: int = 2**11,
    **options,
) -> RecurrentKernel:
    """Gated recurrent units after Yang (2019), Tensor Programs I; :func:`recurrent` makes the kernel of ``nn.GRU``.

        h^t = (1 - z) h^{t-1} + z phi(U x + W (r h^{t-1}) + b),  z and r likewise gates of x^t and h^{t-1}

    By averages over ``paths`` of the gates. Their error, which ``kernel.integration_error(x)`` estimates, is of the
    order of 1e-3 of the largest entry with the default, for sequences of a few tokens; for ``nn.GRU`` and ``nn.LSTM``,
    where candidates are drawn as well, 4e-3 and 8e-3; for 32 tokens 3e-3, 1e-2 and 2e-2. It falls like paths^-0.7, or
    faster where sequences are short. Eigenvalues of a matrix below that, times the number of its rows if they are much
    alike, may come out negative; the noise of the data must be larger.

    Args:
        input_size, readout_variance, readout, num_layers, bidirectional, options: see :func:`simple_rnn`. There is no
            NTK.
        input_variance, recurrent_variance, bias_variance: one each, or one for each gate: reset, update, candidate.
        gate: "erf", which is (1 + erf x)/2, or "logistic".
        activation: of the candidate, "erf" or "tanh".
        reset: whether the reset gate acts "before" the weights, as above, or "after" them, as in torch, where moreover
            z weighs the old state: h^t = z h^{t-1} + (1 - z) phi(U x + b + r (W h^{t-1} + b')).
        bias_mean: of the biases, one or one for each gate; fixed.
        paths: even, best a power of two.
    """
    given = {"gate": (gate, ("erf", "logistic")), "activation": (activation, ("erf", "tanh"))}
    for name, (value, known) in {**given, "reset": (reset, ("before", "after"))}.items():
        if value not in known:
            raise ValueError(f"{name} must be {known[0]!r} or {known[1]!r}; got {value!r}.")
    mean = _per_gate(bias_mean, 3)
    common = {"num_layers": num_layers, "bidirectional": bidirectional, "bias_mean": mean, "paths": paths}
    recursion = GRURecurrence(input_size, readout, **common, gate=gate, activation=activation, reset=reset)
    _require_structure(recursion)
    return RecurrentKernel(
        recursion, input_variance, recurrent_variance, bias_variance, readout_variance, **_without_ntk(options)
    )


def recurrent(
    module: nn.RNN | nn.GRU | nn.LSTM,
    input_variance: Numbers = 1.0,
    recurrent_variance: Numbers = 1.0,
    bias_variance: Numbers = 0.1,
    readout_variance: Numbers = 1.0,
    *,
    bias_mean: float | Sequence[float] = 0.0,
    readout: str = "last",
    paths: int = 2**11,
    **options,
) -> RecurrentKernel:
    """The kernel of a module of torch, with a linear readout, infinitely wide.

    Only the structure of the module counts, not its weights or width; it is neither kept nor changed. ``nn.RNN`` is
    exact. ``nn.GRU`` and ``nn.LSTM`` are averages over ``paths`` of their gates, see :func:`gru`.

    Args:
        module: ``nn.RNN`` (tanh or ReLU), ``nn.GRU`` or ``nn.LSTM``.
        input_variance, recurrent_variance, bias_variance: ``weight_ih`` ~ N(0, sigma_u^2 / d), ``weight_hh`` ~
            N(0, sigma_w^2 / width), ``bias_ih`` and ``bias_hh`` ~ N(0, sigma_b^2 / 2) each. One each; or for ``nn.RNN``
            one for each layer, for ``nn.GRU`` one for each gate (reset, update, candidate), for ``nn.LSTM`` too
            (input, forget, cell, output).
        readout_variance, readout: see :func:`simple_rnn`. The last state is that of both directions, ``h_n``.
        bias_mean: of ``bias_ih``, of gated units alone: one, or one for each gate, such as (0, 1, 0, 0) for forget
            gates that begin open; fixed.
        paths: for gated units; even, best a power of two.
        options: see :func:`simple_rnn`; ``kernel`` and ``parameterization`` for ``nn.RNN`` alone.

    Raises:
        NotImplementedError: for a module of another kind or with a ``forward`` of its own, dropout between layers,
            projections, several layers in both directions.
    """
    kinds = {nn.RNN: "RNN", nn.GRU: "GRU", nn.LSTM: "LSTM"}
    base, kind = next(((known, name) for known, name in kinds.items() if isinstance(module, known)), (None, None))
    if kind is None:
        raise NotImplementedError(
            f"recurrent takes nn.RNN, nn.GRU or nn.LSTM; got {type(module).__name__}. NNGPKernel and NTKKernel take "
            "other nets, without recurrent layers."
        )
    if type(module).forward is not base.forward:
        raise NotImplementedError(
            f"{type(module).__name__} has a forward of its own, so the rule of nn.{kind} does not hold for it: pass an "
            f"nn.{kind}."
        )
    if module.num_layers > 1 and module.dropout:
        raise NotImplementedError("There is no rule for dropout between recurrent layers: set module.dropout = 0.")
    if getattr(module, "proj_size", 0):
        raise NotImplementedError("There is no rule for projections of an LSTM's state: leave proj_size out.")
    structure = {
        "readout": readout,
        "num_layers": module.num_layers,
        "bidirectional": module.bidirectional,
        "bias": module.bias,
    }
    if kind == "RNN":
        if _per_gate(bias_mean, 1) != (0.0,):
            raise ValueError("bias_mean is for gated units, nn.GRU and nn.LSTM; nn.RNN takes none.")
        recursion = SimpleRecurrence(module.input_size, dual(module.nonlinearity), **structure)
        options["ntk"] = _ntk(options.pop("kernel", "nngp"), options.pop("parameterization", "ntk"))
        if options["ntk"] and not all(p.requires_grad for p in module.parameters()):
            raise NotImplementedError(
                "Some weights of the module are frozen; its NTK has a rule for all of them alone."
            )
    else:
        make, count = (GRURecurrence, 3) if kind == "GRU" else (LSTMRecurrence, 4)
        recursion = make(module.input_size, **structure, bias_mean=_per_gate(bias_mean, count), paths=paths)
        options = _without_ntk(options)
    _require_structure(recursion)
    values = input_variance, recurrent_variance, bias_variance, readout_variance
    return RecurrentKernel(recursion, *values, like=tuple(module.parameters()), **options)


def _require_structure(recursion: SimpleRecurrence | GatedRecurrence) -> None:
    for name in ("input_size", "num_layers"):
        value = getattr(recursion, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is a number of 1 or more; got {value!r}.")
    if recursion.readout not in READOUTS:
        raise ValueError(f"readout must be 'last', 'mean' or 'all'; got {recursion.readout!r}.")
    if recursion.bidirectional and recursion.num_layers > 1:
        raise NotImplementedError(
            "There is no rule for several layers in both directions: take one of them, or one direction."
        )
    paths = getattr(recursion, "paths", 2)
    if not isinstance(paths, int) or paths < 2 or paths % 2:
        raise ValueError(f"paths is an even number, best a power of two; got {paths!r}.")


def _ntk(kernel: str, parameterization: str) -> str | None:
    if kernel not in ("nngp", "ntk"):
        raise ValueError(f"kernel must be 'nngp' or 'ntk'; got {kernel!r}.")
    if parameterization not in ("ntk", "plain"):
        raise ValueError(f"parameterization of a recurrent NTK is 'ntk' or 'plain'; got {parameterization!r}.")
    return parameterization if kernel == "ntk" else None


def _without_ntk(options: dict) -> dict:
    if options.pop("kernel", "nngp") != "nngp":
        raise NotImplementedError("There is no NTK of gated units; simple_rnn and nn.RNN have one.")
    return options


def _per_gate(mean: float | Sequence[float], count: int) -> tuple[float, ...]:
    values = (float(mean),) * count if isinstance(mean, int | float) else tuple(float(m) for m in mean)
    if len(values) != count or not all(abs(m) < float("inf") for m in values):
        raise ValueError(f"bias_mean is one finite number, or {count} of them, one for each gate; got {mean!r}.")
    return values
