"""Hyperparameters of a net by evidence, with BoTorch as the optimiser and without a validation set.

    Float(1e-4, 1e-1, log=True)    a number
    Int(4, 256, log=True)          a whole number
    Choice("tanh", "relu")         one of several things
    search(space, train_fn)        trials, one after the other: a table

After a Sobol start, each trial is where a GP of the evidences so far expects the largest improvement: qLogNEI (Ament et
al. 2023) on BoTorch's default model. What the GP sees are numbers in [0, 1], on the scale (linear or log) of each
setting. A trial depends on the seed and on the trials before it alone, so a search that is continued from its file
takes the steps that it would have taken.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from botorch.acquisition import qLogNoisyExpectedImprovement
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.kernels import CategoricalKernel
from botorch.models.model import Model
from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior
from botorch.optim import optimize_acqf, optimize_acqf_mixed_alternating
from botorch.sampling import SobolQMCNormalSampler
from gpytorch.kernels import Kernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import LogNormalPrior
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor
from torch.quasirandom import SobolEngine

from .. import plotting, tiling
from ..selection import Comparison, digest, read_number, scores_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Choice", "Float", "Int", "Search", "search"]

RESERVED = ("candidate", "evidence", "seconds", "fingerprint", "error")
POOL = 4096  # settings to draw from where BoTorch proposes one that was tried
FENCE = 1.5  # Tukey's: evidences further below the lower quartile than so many interquartile ranges are raised to there


# ---- what is searched


@dataclass(frozen=True)
class Float:
    """A number between ``low`` and ``high``; with ``log`` its logarithm is what is searched."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        _check_range(self)

    def at(self, u: float) -> float:
        """The value at ``u`` in [0, 1]."""
        low, high = _ends(self)
        value = low + u * (high - low)
        return min(max(float(math.exp(value) if self.log else value), float(self.low)), float(self.high))

    def place(self, value: float) -> float:
        """Where ``value`` is in [0, 1]."""
        low, high = _ends(self)
        return ((math.log(value) if self.log else value) - low) / (high - low)

    def check(self, value: object) -> float:
        """The value as it is written to the table, if it is one of these."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            raise ValueError(f"needed is a number from {self.low} to {self.high}; got {value!r}.")
        return float(value)


@dataclass(frozen=True)
class Int:
    """A whole number from ``low`` to ``high``, both included; with ``log`` its logarithm is what is searched."""

    low: int
    high: int
    log: bool = False

    def __post_init__(self) -> None:
        for end in (self.low, self.high):
            if isinstance(end, bool) or not isinstance(end, int):
                raise TypeError(f"{self}: bounds of an Int are whole numbers; got {end!r}. Use Float for others.")
        _check_range(self)

    @property
    def values(self) -> range:
        return range(self.low, self.high + 1)

    def at(self, u: float) -> int:
        """The value at ``u`` in [0, 1]: each takes the part of the line that is nearest to it."""
        low, high = _ends(self)
        value = low + u * (high - low)
        return min(max(round(math.exp(value) if self.log else value), self.low), self.high)

    def place(self, value: int) -> float:
        """Where ``value`` is in [0, 1]."""
        low, high = _ends(self)
        return ((math.log(value) if self.log else value) - low) / (high - low)

    def check(self, value: object) -> int:
        """The value as it is written to the table, if it is one of these."""
        if isinstance(value, bool) or not isinstance(value, int) or not self.low <= value <= self.high:
            raise ValueError(f"needed is a whole number from {self.low} to {self.high}; got {value!r}.")
        return value


class Choice:
    """One of several things without an order: names, classes of activations, numbers.

    Args:
        *values: two or more, each with a ``str`` (a ``__name__``) of its own, by which the table calls it.
    """

    def __init__(self, *values: object) -> None:
        self.values = values
        self.labels = tuple(str(getattr(value, "__name__", value)) for value in values)
        if len(values) < 2:
            hint = " Pass them one by one, Choice(*values)." if values and isinstance(values[0], list | tuple) else ""
            raise ValueError(f"{self}: a choice has two values or more.{hint}")
        if len(set(map(str, map(read_number, self.labels)))) < len(values):
            raise ValueError(f"{self}: two values have the same name.")

    def __repr__(self) -> str:
        return f"Choice({', '.join(self.labels)})"

    def at(self, u: float) -> object:
        """The value at ``u`` in [0, 1]."""
        return self.values[min(int(u * len(self.values)), len(self.values) - 1)]

    def check(self, value: object) -> str:
        """The value as it is written to the table, if it is one of these."""
        for known, label in zip(self.values, self.labels, strict=True):
            if known is value or (type(known) is type(value) and known == value):
                return label
        raise ValueError(f"needed is one of {', '.join(self.labels)}; got {value!r}.")

    def read(self, entry: object) -> int:
        """Number of the value that an entry of the table means."""
        return [str(read_number(label)) for label in self.labels].index(str(read_number(str(entry))))


def _ends(setting: Float | Int) -> tuple[float, float]:
    return (math.log(setting.low), math.log(setting.high)) if setting.log else (setting.low, setting.high)


def _check_range(setting: Float | Int) -> None:
    for end in (setting.low, setting.high):
        if isinstance(end, bool) or not isinstance(end, int | float):
            raise TypeError(f"{setting}: bounds are numbers; got {end!r}.")
        if not math.isfinite(end):
            raise ValueError(f"{setting}: bounds must be finite.")
    if not setting.low < setting.high:
        cure = "Swap them." if setting.low > setting.high else "Fix this setting in train_fn, by functools.partial."
        raise ValueError(f"{setting}: the lower bound must be below the upper one. {cure}")
    if setting.log and setting.low <= 0:
        raise ValueError(f"{setting}: a logarithmic scale needs bounds above zero.")


@dataclass(frozen=True)
class _Space:
    """The settings by name, and their place in the unit cube; choices are at 0, 1, ... of their own column."""

    settings: dict[str, Float | Int | Choice]

    def __post_init__(self) -> None:
        if not self.settings:
            raise ValueError('The space is empty: name the settings of train_fn, such as {"width": Int(4, 64)}.')
        for name, setting in self.settings.items():
            if not isinstance(setting, Float | Int | Choice):
                hint = " Use Choice(*values) for a list." if isinstance(setting, list | tuple | set) else ""
                raise TypeError(f"The setting {name!r} must be a Float, an Int or a Choice; got {setting!r}.{hint}")
            if not isinstance(name, str) or name in RESERVED or name.startswith("_"):
                raise ValueError(
                    f"{name!r} can be no name of a setting: names are strings without a leading underscore, and "
                    f"{', '.join(RESERVED)} are other columns of the table."
                )

    def check(self, settings: Mapping[str, object]) -> dict:
        """One trial's settings as they are written to the table."""
        if settings.keys() != self.settings.keys():
            raise ValueError(f"settings are {', '.join(self.settings)}; got {', '.join(map(str, settings))}.")
        row = {}
        for name, setting in self.settings.items():
            try:
                row[name] = setting.check(settings[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return row

    def arguments(self, row: Mapping[str, object]) -> dict:
        """What ``train_fn`` is called with, of a row of the table."""
        return {
            name: s.values[s.read(row[name])] if isinstance(s, Choice) else s.check(row[name])
            for name, s in self.settings.items()
        }

    def encode(self, row: Mapping[str, object]) -> list[float]:
        return [
            float(s.read(row[name])) if isinstance(s, Choice) else s.place(row[name])
            for name, s in self.settings.items()
        ]

    def decode(self, x: Sequence[float]) -> dict:
        """The row of a point as the GP sees it."""
        return {
            name: s.labels[round(u)] if isinstance(s, Choice) else s.at(u)
            for (name, s), u in zip(self.settings.items(), x, strict=True)
        }

    def uniform(self, u: Sequence[float]) -> dict:
        """The row of a point of the unit cube, choices included."""
        return {name: s.check(s.at(u_i)) for (name, s), u_i in zip(self.settings.items(), u, strict=True)}

    @property
    def categorical(self) -> dict[int, list[float]]:
        """Columns of choices, and their values."""
        return {i: [float(k) for k in range(len(s.values))] for i, s in self._columns() if isinstance(s, Choice)}

    @property
    def discrete(self) -> dict[int, list[float]]:
        """Columns of whole numbers, and their values."""
        return {i: [s.place(v) for v in s.values] for i, s in self._columns() if isinstance(s, Int)}

    @property
    def bounds(self) -> Tensor:
        bounds = torch.zeros(2, len(self.settings), dtype=torch.float64)
        bounds[1] = 1.0
        for i, values in self.categorical.items():
            bounds[1, i] = values[-1]
        return bounds

    def _columns(self) -> Iterator[tuple[int, Float | Int | Choice]]:
        return enumerate(self.settings.values())

    @property
    def size(self) -> float:
        """Number of different settings; infinite with a ``Float``."""
        return math.prod(math.inf if isinstance(s, Float) else len(s.values) for s in self.settings.values())

    def pool(self, seed: int) -> list[dict]:
        """All settings where they are few, else spread evenly."""
        if self.size <= POOL:
            lists = [s.labels if isinstance(s, Choice) else s.values for s in self.settings.values()]
            return [dict(zip(self.settings, values, strict=True)) for values in itertools.product(*lists)]
        engine = SobolEngine(len(self.settings), scramble=True, seed=seed)
        return [self.uniform(u) for u in engine.draw(POOL, dtype=torch.float64).tolist()]


# ---- what is found


@dataclass
class Search:
    """What :func:`search` found.

    Attributes:
        table: a row for each trial, in their order: the settings; the evidence in nats; of a GP also ``parameters``,
            ``effective`` (how many of them the data determine), ``delta`` and ``sigma``; ``error`` of one that failed.
        space: what was searched.
        model: what ``train_fn`` returned in the best trial; None if that trial was read from a file.
    """

    table: Comparison
    space: dict[str, Float | Int | Choice]
    model: object = None

    @property
    def rows(self) -> list[dict]:
        return self.table.rows

    @property
    def best(self) -> dict:
        """Settings of the largest evidence, to call ``train_fn`` with."""
        return _Space(self.space).arguments(self._best_row())

    @property
    def evidence(self) -> float:
        """The largest one, in nats."""
        return self._best_row()["evidence"]

    def _best_row(self) -> dict:
        best = self.table.best
        return next(row for row in self.rows if row["candidate"] == best)

    def plot(self, axes: Sequence[Axes] | None = None) -> np.ndarray:
        """Evidence over the trials, and over each setting; see :func:`plotting.plot_trials`."""
        good = [row for row in self.rows if not row.get("error")]
        if not good:
            raise ValueError("There is nothing to draw: all trials have failed.")
        settings = {name: [row[name] for row in good] for name in self.space}
        log = [name for name, setting in self.space.items() if getattr(setting, "log", False)]
        trials = [int(row["candidate"].split()[-1]) for row in good]
        return plotting.plot_trials(settings, [row["evidence"] for row in good], trials, log, axes)

    def __str__(self) -> str:
        return str(self.table)

    __repr__ = __str__


# ---- the search


def search(
    space: Mapping[str, Float | Int | Choice],
    train_fn: Callable[..., object],
    trials: int = 30,
    initial: int | None = None,
    start: Sequence[Mapping[str, object]] = (),
    surrogate: Callable[[Tensor, Tensor], Model] | None = None,
    file: str | os.PathLike | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Search:
    """Find the settings of the largest evidence.

    Args:
        space: what is searched: :class:`Float`, :class:`Int` or :class:`Choice` by name.
        train_fn: called with the settings by keyword; trains a net and returns its GP, whose ``log_evidence()`` is
            taken, what :func:`training.train_with_evidence` or :func:`fit_evidence` returned, or the evidence itself,
            a number. What it draws (torch, numpy, random) is drawn from ``seed``, the same in each trial.
        trials: how many in all, those of ``start`` and ``file`` included. A space of fewer settings is tried whole.
        initial: how many of them are spread evenly, before the GP is asked; by default two for each setting, at least
            five.
        start: settings to try first, such as those you use now.
        surrogate: makes a BoTorch model of X ``(n, d)`` in [0, 1] (choices as 0, 1, ...) and Y ``(n, 1)``, fitted;
            ``DNN2GPModel`` will do. By default ``SingleTaskGP``, choices in a kernel of their own.
        file: a CSV that each finished trial is added to. A later call with the same file goes on from there, and ends
            where it would have ended without the interruption; with more ``trials`` it extends the search.
        seed: of all that is drawn. No global generator is changed.
        progress: True, False, or None for a bar on terminals only.

    Returns:
        A :class:`Search`. A trial that fails, by an exception or an evidence that is not finite, has the reason in its
        row; the GP takes it for as bad as the worst. Ctrl-C ends the search with what was done, and a warning.

    Raises:
        TypeError, ValueError: before the first trial, for an empty space, reversed or infinite bounds, settings that
            ``train_fn`` does not take, or a file of another search; at the first trial that returns what has no
            evidence.
        FileNotFoundError: if the folder of ``file`` does not exist.
        RuntimeError: if all of the first trials, ``start`` and ``initial``, have failed.
    """
    if not isinstance(space, Mapping):
        raise TypeError(f'space must map names to settings, such as {{"width": Int(4, 64)}}; got {space!r}.')
    where = _Space(dict(space))
    _check_train_fn(train_fn, where)
    initial = max(5, 2 * len(space)) if initial is None else initial
    for name, value, least in (("trials", trials, 1), ("initial", initial, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number, {least} or more; got {value!r}.")
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise FileNotFoundError(f"The folder of file={os.fspath(file)!r} does not exist. Make it first.")
    first = []
    for i, settings in enumerate(start):
        try:
            first.append(where.check(settings))
        except ValueError as error:
            raise ValueError(f"start[{i}]: {error}") from None
    task = _Task(where, train_fn, initial, first, surrogate, seed)
    rows = [] if file is None else _finished(file, task.fingerprint)
    total = int(min(max(trials, len(rows)), where.size))
    best = max((row["evidence"] for row in rows if not row["error"]), default=-math.inf)
    model = None
    table = Comparison(rows, show_settings=True)
    with tiling.progress(None, "Searching", progress, total=total, initial=len(rows), unit=" trials") as bar:
        try:
            while len(rows) < total:
                task.require_success(rows)
                row, result = task.run(len(rows), task.propose(rows))
                rows.append(row)
                if not row["error"] and row["evidence"] > best:
                    best, model = row["evidence"], result
                if file is not None:
                    table.to_csv(file)
                bar.update()
                bar.set_postfix(best=f"{best:.2f}")
        except KeyboardInterrupt:
            if not rows:
                raise
            more = "" if file is None else f" The same call with file={os.fspath(file)!r} goes on from there."
            _warn(f"Interrupted after {len(rows)} of {total} trials, which are returned.{more}")
    task.require_success(rows)
    failed = [row["candidate"] for row in rows if row["error"]]
    if failed:
        _warn(f"{len(failed)} of {len(rows)} trials have failed: {', '.join(failed)}. The table says why.")
    return Search(table, where.settings, model)


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _check_train_fn(train_fn: Callable, space: _Space) -> None:
    if not callable(train_fn):
        raise TypeError(f"train_fn must be a function of the settings; got {type(train_fn).__name__}.")
    try:
        signature = inspect.signature(train_fn)
    except ValueError:  # some builtins have none
        return
    try:
        signature.bind(**dict.fromkeys(space.settings))
    except TypeError as error:
        raise TypeError(
            f"train_fn{signature} does not take the settings {', '.join(space.settings)} by keyword: {error}."
        ) from None


def _finished(file: str | os.PathLike, fingerprint: str) -> list[dict]:
    """Rows of an earlier call."""
    if not Path(file).exists():
        return []
    rows = Comparison.from_csv(file).rows
    if any(row["fingerprint"] != fingerprint for row in rows):
        raise ValueError(
            f"{file} was made by another search: with another space, seed, start, initial or surrogate. Give another "
            "file, or what the earlier call was given."
        )
    return rows


@dataclass
class _Task:
    """What all trials share."""

    space: _Space
    train_fn: Callable[..., object]
    initial: int
    start: list[dict]
    surrogate: Callable[[Tensor, Tensor], Model] | None
    seed: int
    last_error: Exception | None = None
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        columns = [[name, setting] for name, setting in self.space.settings.items()]
        surrogate = getattr(self.surrogate, "__qualname__", repr(self.surrogate))
        self.fingerprint = digest([columns, self.initial, self.start, surrogate, self.seed])

    def require_success(self, rows: Sequence[Mapping]) -> None:
        """Refuse to go on when nothing has worked so far."""
        if len(rows) >= len(self.start) + self.initial and all(row["error"] for row in rows):
            raise RuntimeError(
                f"All of the first {len(rows)} trials have failed, the last one by {rows[-1]['error']}"
            ) from self.last_error

    # -- one trial

    def run(self, index: int, settings: dict) -> tuple[dict, object]:
        """Its row, and what ``train_fn`` returned."""
        start = time.perf_counter()
        row = {"candidate": f"trial {index + 1}", **settings, "_settings": list(settings)}
        result, error = None, ""
        scores: dict = {"evidence": math.nan}
        try:
            with _seeded(self.seed):
                result = self.train_fn(**self.space.arguments(settings))
                scores = _scores(result)
            if not math.isfinite(scores["evidence"]):
                error = f"the evidence is {scores['evidence']}"
                scores["evidence"] = math.nan
        except _NoEvidence as refused:
            raise TypeError(str(refused)) from None
        except Exception as caught:  # the others go on
            self.last_error, error = caught, f"{type(caught).__name__}: {caught}"
        row |= {name: value for name, value in scores.items() if name not in settings}
        row |= {"seconds": time.perf_counter() - start, "fingerprint": self.fingerprint, "error": error}
        return row, result

    # -- where the next one is

    def propose(self, rows: Sequence[Mapping]) -> dict:
        """Settings of the next trial."""
        tried = {self._key(row) for row in rows}
        if len(rows) < len(self.start):
            return self.start[len(rows)]
        evidence = np.array([row["evidence"] for row in rows if not row["error"]])
        pool = self.space.pool(self.seed)
        fresh = [settings for settings in pool if self._key(settings) not in tried]
        if len(rows) < len(self.start) + self.initial or len(np.unique(evidence)) < 2:
            if self.space.size > POOL:
                return fresh[0]  # in Sobol's order
            order = np.random.default_rng(self.seed).permutation(len(pool))
            return next(pool[i] for i in order if self._key(pool[i]) not in tried)
        with _seeded(self.seed + 1 + len(rows)), warnings.catch_warnings():
            for kind in (RuntimeWarning, NumericalWarning):  # of line searches and jitter: a proposal is only that
                warnings.simplefilter("ignore", kind)
            acquisition = self._acquisition(rows, evidence)
            settings = self.space.decode(self._maximise(acquisition))
            if self._key(settings) not in tried:
                return settings
            return fresh[self._largest(acquisition, fresh)]

    def _key(self, row: Mapping) -> tuple:
        return tuple(str(row[name]) for name in self.space.settings)

    def _acquisition(self, rows: Sequence[Mapping], evidence: np.ndarray) -> qLogNoisyExpectedImprovement:
        x = torch.tensor([self.space.encode(row) for row in rows], dtype=torch.float64)
        y = _tamed(np.array([evidence.min() if row["error"] else row["evidence"] for row in rows]))
        model = self._model(x, torch.tensor(y, dtype=torch.float64)[:, None])
        sampler = SobolQMCNormalSampler(torch.Size([128]), seed=self.seed)
        return qLogNoisyExpectedImprovement(model, x, sampler=sampler, prune_baseline=True)

    def _model(self, x: Tensor, y: Tensor) -> Model:
        if self.surrogate is not None:
            return self.surrogate(x, y)
        model = SingleTaskGP(x, y, covar_module=self._kernel())
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        return model

    def _kernel(self) -> Kernel:
        """BoTorch's default over the numbers, times one over the choices: how alike two of them are."""
        choices = list(self.space.categorical)
        numbers = [i for i in range(len(self.space.settings)) if i not in choices]
        kernels = []
        if numbers:
            kernels.append(get_covar_module_with_dim_scaled_prior(len(numbers), active_dims=numbers))
        if choices:
            prior = LogNormalPrior(0.0, 1.0)
            kernels.append(CategoricalKernel(len(choices), active_dims=choices, lengthscale_prior=prior))
        return kernels[0] if len(kernels) == 1 else kernels[0] * kernels[1]

    def _maximise(self, acquisition: qLogNoisyExpectedImprovement) -> list[float]:
        space, options = self.space, {"num_restarts": 8, "raw_samples": 256}
        if not space.discrete and not space.categorical:
            x, _ = optimize_acqf(acquisition, space.bounds, q=1, **options)
            return x[0].tolist()
        x, _ = optimize_acqf_mixed_alternating(
            acquisition,
            space.bounds,
            discrete_dims=space.discrete,
            cat_dims=space.categorical,
            q=1,
            **options,
        )
        return x[0].tolist()

    def _largest(self, acquisition: qLogNoisyExpectedImprovement, pool: Sequence[Mapping]) -> int:
        x = torch.tensor([self.space.encode(settings) for settings in pool], dtype=torch.float64)
        with torch.no_grad():
            values = [acquisition(part[:, None]) for part in x.split(256)]
        return int(torch.cat(values).argmax())


class _NoEvidence(Exception):
    """``train_fn`` returned something of another kind."""


def _scores(result: object) -> dict:
    """Columns of the table for what ``train_fn`` returned."""
    evidence = getattr(result, "evidence", getattr(result, "evidence_after", None))  # of training, of fit_evidence
    gp = getattr(result, "gp", result)
    if callable(getattr(gp, "log_evidence", None)):
        with torch.no_grad():
            value = gp.log_evidence() if evidence is None else evidence
        return {"evidence": float(value), **scores_of(gp)}
    value = result if evidence is None else evidence
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray | np.generic) and value.size == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _NoEvidence(
            "train_fn must return a GP, such as LaplaceGP, what train_with_evidence or fit_evidence returned, or a "
            f"number, the evidence itself; got {type(result).__name__}."
        )
    return {"evidence": float(value)}


def _tamed(evidence: np.ndarray) -> np.ndarray:
    """Evidences with the very bad ones raised to Tukey's fence: a GP of one scale cannot follow both ends."""
    low, high = np.quantile(evidence, [0.25, 0.75])
    return np.maximum(evidence, low - FENCE * (high - low)) if high > low else evidence


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """What torch, numpy and random draw within is drawn from this seed; after it, they are as they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
