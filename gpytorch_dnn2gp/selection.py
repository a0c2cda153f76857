"""Models chosen by evidence, without a validation set.

    fit_evidence(gp)               delta and sigma of one net, by gradient (mlls.py)
    compare(candidates, x, y)      widths, depths, activations, architectures; nets, and GPs of any other kernel
    mlps(...)                      candidates: multilayer perceptrons over a grid

A comparison is a table: it prints, plots itself, is saved as CSV after each candidate and goes on from there after an
interruption. Candidates run in parallel by joblib.
"""

from __future__ import annotations

import copy
import csv
import functools
import hashlib
import inspect
import itertools
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import gpytorch
import joblib
import numpy as np
import torch
from gpytorch.kernels import Kernel
from gpytorch.mlls import (
    ExactMarginalLogLikelihood,
    LeaveOneOutPseudoLikelihood,
    MarginalLogLikelihood,
    SumMarginalLogLikelihood,
)
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal

from . import metrics, mlls, plotting, tiling, training
from .gp import LaplaceGP, NetworkGP
from .losses import Gaussian, Loss
from .mlls import (
    BlockEvidence,
    EvidenceFit,
    effective_parameters,
    fit_evidence,
    leave_one_out_density,
    require_varied_labels,
)
from .numerics import require_finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Candidate", "Comparison", "EvidenceFit", "compare", "fit_evidence", "mlps"]

TUNING = ("online", "after", None)
OWN_COLUMNS = ("candidate", "fingerprint", "error", "seconds", "evidence", "train_loss", "parameters", "effective")
OWN_COLUMNS += ("delta", "sigma", "distance")
_LEAVE_ONE_OUT = (LeaveOneOutPseudoLikelihood, mlls.LeaveOneOutPseudoLikelihood)
Metric = Callable[[Distribution, Tensor], Tensor]


@dataclass(frozen=True)
class Candidate:
    """A model to compare, with what sets it apart.

    Attributes:
        model: a net, which is copied and trained; a GPyTorch kernel, for a GP with it and Gaussian noise; GPyTorch's
            ``mll`` of any exact model on the training data, of a batch of outputs in sum; or a function without
            arguments that makes one of these (a net then with initial weights drawn from the comparison's seed).
        loss, prior_precision, groups: of a net, in the place of the comparison's.
        settings: columns of the table, such as ``{"width": 20}``, to plot over.

    Raises:
        ValueError: for a setting with the name of one of the comparison's own columns.
    """

    model: nn.Module | Callable[[], nn.Module]
    loss: Loss | None = None
    prior_precision: float | Sequence[float] | Tensor | None = None
    groups: Sequence[str | Sequence[str]] | None = None
    settings: Mapping[str, float | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.settings:
            if name in OWN_COLUMNS or name.startswith(("_", "test_", "setting:")):
                raise ValueError(
                    f"A setting is called {name!r}, as one of the comparison's own columns. Call it something else, "
                    f"such as 'my_{name.lstrip('_').replace('setting:', '')}'."
                )


def mlps(
    num_inputs: int,
    num_outputs: int = 1,
    widths: Sequence[int] = (20,),
    depths: Sequence[int] = (1,),
    activations: Sequence[type[nn.Module]] = (nn.Tanh,),
    dtype: torch.dtype = torch.float64,
) -> dict[str, Candidate]:
    """Multilayer perceptrons for every combination of width, depth (hidden layers) and activation.

    Example:
        ``compare(mlps(11, widths=[5, 10, 20], depths=[1, 2]), x, y, Gaussian(1.0)).plot("width")``
    """
    candidates = {}
    for depth, width, activation in itertools.product(depths, widths, activations):
        settings = {"depth": depth, "width": width, "activation": activation.__name__}
        make = functools.partial(_mlp, [num_inputs, *[width] * depth, num_outputs], activation, dtype)
        candidates[f"{depth} x {width} {activation.__name__}"] = Candidate(make, settings=settings)
    return candidates


def _mlp(sizes: Sequence[int], activation: type[nn.Module], dtype: torch.dtype) -> nn.Sequential:
    layers = [layer for a, b in itertools.pairwise(sizes[:-1]) for layer in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers, nn.Linear(*sizes[-2:])).to(dtype)


# ---- the table


@dataclass
class Comparison:
    """What :func:`compare` found: a row for each candidate, in their order.

    Attributes:
        rows: by column. ``evidence`` is in nats over all data; ``train_loss`` the mean negative log-likelihood of the
            training data; ``test_nll`` and the other test columns are means over the test data; ``parameters`` and
            ``effective`` the number of weights and how many of them the data determine; ``distance`` that of the net
            from a stationary point in posterior standard deviations; None for what a model does not have.
        models: the fitted ``LaplaceGP``, or GPyTorch's model, of each candidate that was run, not read from a file.
        show_settings: print columns of the settings too, where the candidates' names do not tell them.
    """

    rows: list[dict]
    models: dict[str, nn.Module] = field(default_factory=dict)
    show_settings: bool = False

    @property
    def best(self) -> str:
        """Name of the candidate of the largest evidence."""
        rows = [row for row in self.rows if not row.get("error")]
        if not rows:
            raise ValueError("No candidate has an evidence: all have failed.")
        return max(rows, key=lambda row: row["evidence"])["candidate"]

    def column(self, name: str) -> list:
        """Entries of one column."""
        known = {key for row in self.rows for key in row}
        if name not in known:
            raise KeyError(f"There is no column {name!r}; there are {', '.join(map(repr, sorted(known)))}.")
        return [row.get(name) for row in self.rows]

    def __str__(self) -> str:
        if not self.rows:
            return "Comparison(no candidates)"
        hidden = {"candidate", "fingerprint", "error"}
        if not self.show_settings:
            hidden |= {key for row in self.rows for key in row.get("_settings", ())}
        columns = [c for c in self._columns() if c not in hidden and any(v is not None for v in self.column(c))]
        failed = all(row.get("error") for row in self.rows)
        best = None if failed else self.best
        names = [row["candidate"] + (" *" if row["candidate"] == best else "") for row in self.rows]
        cells = [["candidate", *columns]]
        for name, row in zip(names, self.rows, strict=True):
            cells.append([name, *(_shown(row.get(column), column) for column in columns)])
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        lines = [
            "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
            for line in cells
        ]
        lines += [f"{row['candidate']} failed: {row['error']}" for row in self.rows if row.get("error")]
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__

    def _columns(self) -> list[str]:
        return list(dict.fromkeys(key for row in self.rows for key in row if key != "_settings"))

    def plot(
        self, over: str | None = None, errors: Sequence[str] | None = None, ax: Axes | None = None
    ) -> tuple[Axes, Axes | None]:
        """Evidence and test errors over a column, such as ``"width"``; over the candidates' names by default.

        Args:
            over: rows of equal values count as several runs if each value has as many; their mean is drawn. Rows
                without a value, such as a kernel's without a width, are left out.
            errors: columns for the right axis; by default those that begin with ``test_``.
            ax: where to draw.
        """
        over = over or "candidate"
        self.column(over)
        rows = [row for row in self.rows if not row.get("error") and row.get(over) is not None]
        if not rows:
            raise ValueError(f"There is nothing to draw over {over!r}: no candidate has both that and an evidence.")
        if errors is None:
            names = [c for c in self._columns() if c.startswith("test_")]
            errors = [c for c in names if all(row.get(c) is not None for row in rows)]
        values = list(dict.fromkeys(row[over] for row in rows))
        if all(isinstance(v, int | float) for v in values):
            values = sorted(values)
        by_value = [[row for row in rows if row[over] == value] for value in values]
        runs = {len(group) for group in by_value}
        if len(runs) > 1:
            raise ValueError(
                f"The values of {over!r} have different numbers of candidates, "
                f"{ {value: len(group) for value, group in zip(values, by_value, strict=True)} }: plot over another "
                "column, or select rows."
            )

        def curve(column: str) -> np.ndarray:
            return np.array([[row[column] for row in group] for group in by_value], dtype=float).T

        curves = {name.replace("_", " "): curve(name) for name in errors}
        return plotting.plot_evidence(values, curve("evidence"), curves, over, ax=ax)

    def to_csv(self, path: str | os.PathLike) -> None:
        """Write the rows; in one step, so that an interruption leaves the old file or the new one."""
        path = Path(path)
        settings = list(dict.fromkeys(key for row in self.rows for key in row.get("_settings", ())))
        columns = self._columns()
        temporary = path.with_name(path.name + ".part")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([f"setting:{c}" if c in settings else c for c in columns])
            writer.writerows([["" if row.get(c) is None else _written(row[c]) for c in columns] for row in self.rows])
        os.replace(temporary, path)

    @classmethod
    def from_csv(cls, path: str | os.PathLike) -> Comparison:
        """Read what :meth:`to_csv` wrote; without the models.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not one of these.
        """
        with open(path, newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file))
        if not lines or not {"candidate", "evidence", "fingerprint"} <= set(lines[0]):
            raise ValueError(
                f"{path} is no table of a comparison: columns candidate, evidence and fingerprint are not there."
            )
        rows = []
        for line in lines[1:]:
            row = {}
            for column, text in zip(lines[0], line, strict=True):
                setting = column.startswith("setting:")
                name = column.removeprefix("setting:")
                row[name] = text if name in ("candidate", "fingerprint", "error") else read_number(text)
                if setting:
                    row.setdefault("_settings", []).append(name)
            rows.append(row)
        return cls(rows)


def _written(value) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def read_number(text: str) -> int | float | str | None:
    """An entry of a CSV as the number it is written for, if it is one; None if it is empty."""
    if text == "":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _shown(value, column: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        decimals = {"evidence": 2, "effective": 1, "seconds": 1}.get(column)
        return f"{value:.4g}" if decimals is None else f"{value:.{decimals}f}"
    return str(value)


# ---- comparing


def compare(
    candidates: Mapping[str, Candidate | nn.Module | Callable[[], nn.Module]],
    train_x: Tensor,
    train_y: Tensor,
    loss: Loss,
    prior_precision: float | Sequence[float] | Tensor = 1.0,
    groups: Sequence[str | Sequence[str]] | None = None,
    tune: str | None = "online",
    kind: str = "laplace",
    restarts: int = 1,
    test_x: Tensor | None = None,
    test_y: Tensor | None = None,
    test_metrics: Mapping[str, Metric] | None = None,
    file: str | os.PathLike | None = None,
    n_jobs: int | None = None,
    seed: int = 0,
    train_options: Mapping | None = None,
    gp_options: Mapping | None = None,
    progress: bool | None = None,
) -> Comparison:
    """Train the candidates, and score each by the evidence of the training data.

    Args:
        candidates: by name; see :class:`Candidate`, or just its ``model``. A GP of another kernel is fitted by its own
            evidence, so that nets and other kernels stand in one table (for a Gaussian loss).
        train_x, train_y: as the nets and the loss take them.
        loss: with the initial noise.
        prior_precision, groups: initial values, as in :class:`LaplaceGP`.
        tune: "online", delta and sigma chosen while the net is trained (:func:`training.train_with_evidence`); "after",
            when it is trained (:func:`fit_evidence`); None, left as given.
        kind: of evidence: "laplace", "gp" or "leave_one_out", which with tune="online" is the score alone.
        restarts: nets are trained from so many initial weights, and the best by the score counts. What is frozen stays.
        test_x, test_y: for the test columns, which choose nothing.
        test_metrics: more test columns by name, functions of ``(y, labels)`` as those of :mod:`metrics`; ``test_nll``
            and ``test_error`` (squared error, or part of the labels that are missed) are always there.
        file: a CSV that each finished candidate is added to; those that it has already are not run again.
        n_jobs: processes, as in joblib; None takes joblib's configuration, so that ``joblib.parallel_config`` with a
            Dask or Ray backend puts the candidates onto a cluster.
        seed: of initial weights and of minibatches, the same for each candidate.
        train_options: of :func:`training.fit` or :func:`training.train_with_evidence`, such as
            ``{"method": "adam", "max_iterations": 500}``. With ``block_size`` the score, too, is the lower bound by
            blocks, the same ones for each candidate, so that no matrix of all the data is needed.
        gp_options: of :class:`LaplaceGP`, such as ``{"input_shape": (1, 28, 28)}``.
        progress: True, False, or None for a bar on terminals only.

    Returns:
        A :class:`Comparison`. A candidate that fails has the reason in its row, and a warning tells; it is run again
        by the next call with the same file.

    Raises:
        ValueError: before any long work, for labels without a finite noise estimate, nets that do not take the data,
            an evidence that does not exist, unknown options, or a file of other candidates, data or options.
        FileNotFoundError: if the folder of ``file`` does not exist.
    """
    if tune not in TUNING:
        raise ValueError(f"tune must be 'online', 'after' or None; got {tune!r}.")
    if kind not in ("laplace", "gp", "leave_one_out"):
        raise ValueError(f"kind must be 'laplace', 'gp' or 'leave_one_out'; got {kind!r}.")
    if restarts < 1:
        raise ValueError(f"restarts must be one at least; got {restarts}.")
    if (test_x is None) != (test_y is None):
        raise ValueError("test_x and test_y go together: give both, or neither.")
    if len(candidates) == 0:
        raise ValueError("There are no candidates to compare.")
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise FileNotFoundError(f"The folder of file={os.fspath(file)!r} does not exist. Make it first.")
    task = _Task(
        *(train_x, train_y, loss, prior_precision, groups, tune, kind, restarts),
        *(test_x, test_y, dict(test_metrics or {}), seed, dict(train_options or {}), dict(gp_options or {})),
    )
    task.check_options()
    entries = {name: value if isinstance(value, Candidate) else Candidate(value) for name, value in candidates.items()}
    for name, candidate in entries.items():
        task.check(name, candidate)
    prints = {name: task.fingerprint(candidate) for name, candidate in entries.items()}
    done = {} if file is None else _finished(file, prints)
    models: dict[str, nn.Module] = {}

    def table() -> Comparison:
        return Comparison([done[name] for name in entries if name in done], models)

    waiting = [name for name in entries if name not in done]
    calls = (joblib.delayed(_run)(task, name, entries[name], prints[name]) for name in waiting)
    with tiling.progress(None, "Comparing", progress, total=len(entries), initial=len(done), unit=" candidates") as bar:
        for row, model in _parallel(n_jobs, calls):
            done[row["candidate"]] = row
            if model is not None:
                models[row["candidate"]] = model
            if file is not None:
                table().to_csv(file)
            bar.update()
            bar.set_postfix(last=row["candidate"])
    result = table()
    failed = [row["candidate"] for row in result.rows if row.get("error")]
    if failed:
        warnings.warn(
            f"{len(failed)} of {len(entries)} candidates have failed: {', '.join(failed)}. The table says why.",
            RuntimeWarning,
            stacklevel=2,
        )
    return result


def _parallel(n_jobs: int | None, calls):
    """Results as they come; all at the end where the backend cannot do that."""
    try:
        parallel = joblib.Parallel(n_jobs=n_jobs, return_as="generator_unordered")
    except ValueError:
        parallel = joblib.Parallel(n_jobs=n_jobs)
    return parallel(calls)


def _finished(file: str | os.PathLike, prints: Mapping[str, str]) -> dict[str, dict]:
    """Rows of an earlier call, by candidate."""
    if not Path(file).exists():
        return {}
    rows = {row["candidate"]: row for row in Comparison.from_csv(file).rows}
    cure = "Give another file, or the candidates, data and options of the earlier call."
    other = [name for name in rows if name not in prints]
    if other:
        raise ValueError(
            f"{file} has results of {', '.join(map(repr, other))}, which are not among the candidates "
            f"{', '.join(map(repr, prints))}. {cure}"
        )
    for name, row in rows.items():
        (data, model), (known_data, known_model) = prints[name].split("-"), row["fingerprint"].split("-")
        if data != known_data:
            raise ValueError(f"{file} was made with other data or options of the comparison. {cure}")
        if model != known_model:
            raise ValueError(f"{file} has results of another candidate by the name of {name!r}. {cure}")
    return {name: row for name, row in rows.items() if not row.get("error")}


@dataclass
class _Task:
    """What all candidates share."""

    x: Tensor
    y: Tensor
    loss: Loss
    prior_precision: float | Sequence[float] | Tensor
    groups: Sequence[str | Sequence[str]] | None
    tune: str | None
    kind: str
    restarts: int
    test_x: Tensor | None
    test_y: Tensor | None
    test_metrics: dict[str, Metric]
    seed: int
    train_options: dict
    gp_options: dict

    def loss_of(self, candidate: Candidate) -> Loss:
        return self.loss if candidate.loss is None else candidate.loss

    def make(self, candidate: Candidate, restart: int = 0) -> nn.Module:
        """The model at its start; a net with initial weights of this restart."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + restart)
            if not isinstance(candidate.model, nn.Module):
                return candidate.model()
            model = copy.deepcopy(candidate.model)
            if restart and not isinstance(model, Kernel | MarginalLogLikelihood):
                for module in _trained(model):
                    module.reset_parameters()
        return model

    def check_options(self) -> None:
        """Refuse options by names that do not exist."""
        train = training.train_with_evidence if self.tune == "online" else training.fit
        for name, options, function, own in (
            ("train_options", self.train_options, train, {"net", "x", "y", "options"}),
            ("gp_options", self.gp_options, LaplaceGP, {"net", "train_x", "train_y", "prior_variance", "progress"}),
        ):
            known = inspect.signature(function).parameters.keys() - own - {"loss", "prior_precision", "groups"}
            if unknown := sorted(options.keys() - known):
                raise ValueError(
                    f"{name} has {', '.join(map(repr, unknown))}; {function.__name__} takes "
                    f"{', '.join(map(repr, sorted(known)))} here."
                )

    def check(self, name: str, candidate: Candidate) -> None:
        """Refuse what cannot work, by name, before the work."""
        try:
            model, loss = self.make(candidate), self.loss_of(candidate)
            if not isinstance(model, nn.Module):
                raise TypeError(
                    "a candidate is a torch module, a GPyTorch kernel or mll, or a function without arguments that "
                    f"makes one; got {type(model).__name__}."
                )
            require_finite(self.x, "train_x", "Remove or impute these rows first.")
            if isinstance(model, Kernel | MarginalLogLikelihood):
                self._check_gp(model, loss)
                return
            self._check_net(candidate, model, loss)
        except Exception as error:
            error.add_note(f"This is candidate {name!r} of the comparison.")
            raise

    def _check_net(self, candidate: Candidate, model: nn.Module, loss: Loss) -> None:
        model.eval()
        with torch.no_grad():
            f = model(self.x[:1])
        f = f[:, None] if f.dim() == 1 else f
        labels = loss.check_labels(self.y, f.shape[-1], len(self.x), f.dtype, f.device)
        if self.test_y is not None:
            loss.check_labels(self.test_y, f.shape[-1], len(self.test_x), f.dtype, f.device)
        if self.tune is not None and loss.has_noise and loss.noise.dim() < 2:
            require_varied_labels(loss, labels)
        if self.restarts > 1 and candidate.model is not model and isinstance(candidate.model, nn.Module):
            _trained(model)
        self.score(self.gp_of(model, candidate, slice(0, 1)))  # what has no such evidence says so

    def gp_of(self, net: nn.Module, candidate: Candidate, part: slice = slice(None)) -> LaplaceGP:
        """The GP of a net and (part of) the training data."""
        index = torch.arange(len(self.x))[part].to(self.x.device)
        loss = self.loss_of(candidate).subset(index)
        options = {"progress": False, **self.gp_options}
        return LaplaceGP(net.eval(), self.x[part], self.y[part], loss, *self.prior_of(candidate), **options)

    def prior_of(self, candidate: Candidate) -> tuple:
        """prior_precision and groups."""
        delta = self.prior_precision if candidate.prior_precision is None else candidate.prior_precision
        return delta, self.groups if candidate.groups is None else candidate.groups

    @property
    def block_size(self) -> int | None:
        """Of the bounds in the place of the Laplace evidence."""
        return self.train_options.get("block_size") if self.tune == "online" else None

    def score(self, gp: LaplaceGP) -> float:
        """The evidence that candidates are compared by."""
        with torch.no_grad():
            if self.kind == "leave_one_out":
                return float(leave_one_out_density(gp))
            if self.kind == "laplace" and self.block_size is not None:
                generator = torch.Generator().manual_seed(self.seed)
                return float(BlockEvidence(gp, self.block_size, generator, progress=False).bound())
            return float(gp.log_evidence(self.kind))

    def _check_gp(self, model: nn.Module, loss: Loss) -> None:
        if not isinstance(loss, Gaussian) or loss.noise.dim() > 0:
            raise ValueError(
                "GPyTorch models are compared by their evidence under Gaussian noise with one sigma; the loss is "
                f"{loss}."
            )
        if isinstance(model, Kernel):
            if self.y.numel() != len(self.x):
                raise ValueError(
                    f"a kernel makes a GP of one output, and the labels have the shape {tuple(self.y.shape)}: pass a "
                    "function that makes the mll of a multitask model."
                )
            require_varied_labels(loss, self.y)
            return
        if (self.kind == "leave_one_out") != isinstance(model, _LEAVE_ONE_OUT):
            raise ValueError(f"an mll is compared by itself, and {type(model).__name__} is not kind={self.kind!r}.")
        if getattr(model.model, "train_inputs", None) is None or isinstance(model, SumMarginalLogLikelihood):
            raise ValueError(
                f"a comparison needs the mll of one model with exact inference; {type(model).__name__} of "
                f"{type(model.model).__name__} is another."
            )
        (inputs, *_), labels = model.model.train_inputs, model.model.train_targets
        own = (self.x.flatten(1), self.y.flatten(1) if self.y.dim() > 1 else self.y[:, None])
        if labels.dim() == 2 and len(labels) != len(self.y):  # outputs in a batch
            labels = labels.mT
        for name, given, expected in zip(("inputs", "labels"), (inputs, labels.reshape(len(labels), -1)), own):
            if given.shape[-2:] != expected.shape or not torch.equal(given, expected.to(given).expand_as(given)):
                raise ValueError(
                    f"the mll is of a model on other training {name}: build it on train_x and train_y as they are "
                    "(evidences of labels in another scale do not compare)."
                )

    def fingerprint(self, candidate: Candidate) -> str:
        """Of data and options, and of the candidate: ``"<16 digits>-<16 digits>"``."""
        shared = [self.x, self.y, self.test_x, self.test_y, self.tune, self.kind, self.restarts, self.seed]
        shared += [self.test_metrics, self.train_options, self.gp_options]
        own = [self.make(candidate), self.loss_of(candidate), *self.prior_of(candidate)]
        return f"{digest(shared)}-{digest(own)}"


def _trained(net: nn.Module) -> list[nn.Module]:
    """The parts of a net that own trained parameters; all can draw them anew."""
    parts = [part for part in net.modules() if any(p.requires_grad for p in part.parameters(recurse=False))]
    for part in parts:
        if not hasattr(part, "reset_parameters"):
            raise ValueError(
                f"restarts draw initial weights anew, but {type(part).__name__} has no reset_parameters() to do so: "
                "pass a function that makes the net in the place of the net itself."
            )
    return parts


def digest(item: object) -> str:
    """The same in every process for the same content: 16 digits."""
    digest = hashlib.sha256()
    for piece in _pieces(item):
        digest.update(piece)
    return digest.hexdigest()[:16]


def _pieces(item: object) -> Iterator[bytes]:
    if isinstance(item, Tensor):
        yield f"{tuple(item.shape)} {item.dtype}".encode()
        yield item.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(item, nn.Module):
        yield from _pieces([_ADDRESS.sub("", str(item)), item.state_dict()])
    elif isinstance(item, torch.Generator):
        yield f"seed {item.initial_seed()}".encode()
    elif isinstance(item, Mapping):
        yield from _pieces(sorted(item.items()))
    elif isinstance(item, list | tuple | set | frozenset):
        yield f"{type(item).__name__} of {len(item)}".encode()
        for part in item:
            yield from _pieces(part)
    elif isinstance(item, functools.partial):
        yield from _pieces([item.func, item.args, item.keywords])
    elif isinstance(item, Loss):
        yield from _pieces([type(item).__name__, vars(item)])
    elif hasattr(item, "__code__"):
        yield from _pieces([item.__qualname__, item.__code__.co_code.hex(), item.__defaults__])
    else:
        yield _ADDRESS.sub("", repr(item)).encode()


_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


# ---- one candidate


def _run(task: _Task, name: str, candidate: Candidate, fingerprint: str) -> tuple[dict, nn.Module | None]:
    """Its row and its fitted model."""
    start = time.perf_counter()
    row = {"candidate": name, **candidate.settings, "_settings": list(candidate.settings)}
    model = None
    try:
        made = task.make(candidate)
        if isinstance(made, Kernel | MarginalLogLikelihood):
            model, scores = _run_gp(task, made)
        else:
            model, scores = _run_net(task, candidate)
        row |= scores
    except Exception as error:  # the others go on
        row |= {"evidence": math.nan, "error": f"{type(error).__name__}: {error}"}
    row |= {"seconds": time.perf_counter() - start, "fingerprint": fingerprint, "error": row.get("error", "")}
    return row, model


def _run_net(task: _Task, candidate: Candidate) -> tuple[LaplaceGP, dict]:
    loss, (delta, groups) = task.loss_of(candidate), task.prior_of(candidate)
    nets = [task.make(candidate, restart) for restart in range(task.restarts)]
    options = {"progress": False, **task.train_options}
    stackable = options.keys() <= inspect.signature(training.fit_many).parameters.keys()
    together = task.tune != "online" and task.restarts > 1 and stackable
    if together:
        training.fit_many(nets, task.x, task.y, loss, _repeated(delta, len(nets)), groups, **options)
    gps = []
    for restart, net in enumerate(nets):
        here = {"generator": torch.Generator().manual_seed(task.seed + restart), **options}
        data = (net, task.x, task.y, loss, delta, groups)
        if task.tune == "online":
            gp = training.train_with_evidence(*data, **here, **task.gp_options).gp
        else:
            if not together:
                training.fit(*data, **here)
            gp = task.gp_of(net, candidate)
            if task.tune == "after":
                fit_evidence(gp, task.kind, warn=False, progress=False)
        gps.append((task.score(gp), gp))
    evidence, gp = max(gps, key=lambda item: item[0])
    with torch.no_grad():
        f = gp.linearization(gp.train_inputs[0])
        train_loss = float(gp.loss.negative_log_likelihood(f, gp.train_labels).mean())
        scores = {"evidence": evidence, "train_loss": train_loss}
        if task.test_x is not None:
            y = gp.predict(task.test_x).y
            labels = gp.loss.check_labels(task.test_y, f.shape[-1], len(task.test_x), f.dtype, f.device)
            scores |= _test_scores(y, labels, task.test_metrics)
    return gp, scores | scores_of(gp) | {"distance": gp.stationarity().newton_decrement ** 0.5}


def scores_of(gp: NetworkGP) -> dict:
    """Columns of the table that a network's GP fills: how many weights, how many of them count, delta and sigma."""
    return {
        "parameters": gp.linearization.num_weights,
        "effective": None if gp.solver == "iterative" else float(effective_parameters(gp).sum()),
        "delta": _summary(gp.prior_precision),
        "sigma": None if gp.noise is None else _summary(gp.noise.sqrt()),
    }


def _repeated(delta: float | Sequence[float] | Tensor, m: int) -> float | Tensor:
    delta = torch.as_tensor(delta)
    return delta if delta.dim() == 0 else delta.expand(m, -1)


def _summary(values: Tensor) -> float | str:
    """A number; several as their range."""
    values = values.detach().flatten()
    if len(values) == 1:
        return float(values)
    return f"{float(values.min()):.3g}..{float(values.max()):.3g}"


def _test_scores(y: Distribution, labels: Tensor, more: Mapping[str, Metric]) -> dict[str, float]:
    scores = {
        "test_nll": float(metrics.negative_log_likelihood(y, labels)),
        "test_error": float(_error(y, labels)),
    }
    return scores | {f"test_{name.removeprefix('test_')}": float(metric(y, labels)) for name, metric in more.items()}


def _error(y: Distribution, labels: Tensor) -> Tensor:
    """Mean squared error, or the part of the labels that are missed."""
    if isinstance(y, Categorical):
        return (y.probs.argmax(-1) != labels).double().mean()
    if isinstance(y.base_dist if isinstance(y, Independent) else y, Bernoulli):
        return ((y.mean > 0.5) != (labels > 0.5)).double().mean()
    return (y.mean - labels.reshape(y.mean.shape)).square().mean()


# ---- GPs of other kernels


class _KernelGP(gpytorch.models.ExactGP):
    """A kernel with a constant mean and Gaussian noise."""

    def __init__(self, x: Tensor, y: Tensor, kernel: Kernel, noise: Tensor) -> None:
        likelihood = gpytorch.likelihoods.GaussianLikelihood().to(x)
        likelihood.noise = noise
        super().__init__(x, y, likelihood)
        self.mean_module = gpytorch.means.ConstantMean().to(x)
        self.covar_module = kernel.to(x)

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def _run_gp(task: _Task, made: Kernel | MarginalLogLikelihood) -> tuple[nn.Module, dict]:
    mll = made
    if isinstance(made, Kernel):
        x = task.x.flatten(1)
        gp = _KernelGP(x, task.y.reshape(-1).to(x), made, task.loss.noise.detach())
        kind = LeaveOneOutPseudoLikelihood if task.kind == "leave_one_out" else ExactMarginalLogLikelihood
        mll = kind(gp.likelihood, gp)
    with gpytorch.settings.max_cholesky_size(sys.maxsize):  # no estimates by conjugate gradients
        return _fitted_gp(task, mll)


def _fitted_gp(task: _Task, mll: MarginalLogLikelihood) -> tuple[nn.Module, dict]:
    evidence = _fit_mll(mll, fit=task.tune is not None)
    model, likelihood = mll.model.eval(), mll.likelihood.eval()
    noise = getattr(likelihood, "noise", None)
    scores = {
        "evidence": evidence,
        "parameters": sum(p.numel() for p in mll.parameters() if p.requires_grad),
        "sigma": None if noise is None else _summary(noise.sqrt()),
    }
    if task.test_x is not None:
        with torch.no_grad():
            y = likelihood(model(task.test_x.flatten(1)))
        mean, variance = (y.mean.mT, y.variance.mT) if y.batch_shape else (y.mean, y.variance)
        labels = task.test_y.reshape(mean.shape).to(mean)
        scores |= _test_scores(Normal(mean, variance.sqrt()), labels, task.test_metrics)
    return model, scores


def _fit_mll(mll: MarginalLogLikelihood, fit: bool, max_iterations: int = 200) -> float:
    """Fit GPyTorch's hyperparameters by L-BFGS, with their priors; the evidence over all data, without, in nats."""
    model = mll.train().model
    parameters = [p for p in mll.parameters() if p.requires_grad]

    def log_priors() -> list[Tensor]:
        return [prior.log_prob(closure(module)) for _, module, prior, closure, _ in model.named_priors()]

    def value() -> Tensor:
        output = model(*model.train_inputs)
        total = mll(output, model.train_targets) * output.event_shape.numel()
        for p in log_priors():  # one that all outputs of a batch share is in each of them
            total = total - p.view(*p.shape[: total.dim()], -1).sum(-1)
        return total.sum() + sum(p.sum() for p in log_priors())

    def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
        nn.utils.vector_to_parameters(torch.as_tensor(values).to(parameters[0]), parameters)
        total = value()
        gradient = torch.autograd.grad(total, parameters, materialize_grads=True)
        return -float(total.detach()), -torch.cat([g.flatten() for g in gradient]).double().cpu().numpy()

    if fit and parameters:
        start = nn.utils.parameters_to_vector(parameters).detach().double().cpu().numpy()
        result = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": max_iterations})
        nn.utils.vector_to_parameters(torch.as_tensor(result.x).to(parameters[0]), parameters)
    with torch.no_grad():
        return float(value() - sum(p.sum() for p in log_priors()))
