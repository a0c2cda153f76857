"""What the tables of docs/benchmarks.md share: data, files of results that resume, costs, peers, summaries.

Table          jobs that are run once and kept as rows of a CSV file; an interrupted run goes on where it stopped
uci, holdout   data sets, standardised with their training part
Cost           processor time beside wall time: on a machine that does other work too, only the former means much
Peer           another package in an interpreter of its own (contenders/protocol.py)
markdown, mean_and_error, ranks    what is printed
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from machine import describe
from scipy import stats
from torch import Tensor

from gpytorch_dnn2gp import tiling

HERE = Path(__file__).parent
Row = dict[str, str]


def parser(description: str) -> argparse.ArgumentParser:
    """With the options that all tables have."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--data", type=Path, default=os.environ.get("DNN2GP_DATA"), help="folder of data sets")
    made.add_argument("--results", type=Path, default=HERE / "results", help="folder of CSV files, which resume")
    made.add_argument("--report", action="store_true", help="run nothing, print the tables of what is there")
    made.add_argument("--full", action="store_true", help="everything; without it what takes a few hours in all")
    made.add_argument("--methods", nargs="+", help="only these")
    made.add_argument("--sets", nargs="+", help="only these data sets")
    made.add_argument("--peer-python", help="interpreter with laplace-torch; without it that peer is left out")
    made.add_argument("--threads", type=int, default=1)
    return made


# ---- data


@dataclass
class Split:
    """Training and test data, float64: inputs ``(n, d)``, labels ``(n, 1)`` standardised, or classes ``(n,)``.

    Attributes:
        scale: of the labels: a density in the original unit is that of the standardised label, less log(scale).
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    scale: float = 1.0


def uci(folder: Path | None, name: str, split: int, max_train: int | None = None) -> Split:
    """One of the usual 90/10 splits of ``uci_splits``; scikit-learn's diabetes in ten parts without any folder.

    Args:
        folder: as ``DNN2GP_DATA``.
        name: of the data set, the folder under ``uci_splits``.
        split: number of the split.
        max_train: take the first so many of the training rows, which are in random order.

    Raises:
        FileNotFoundError: where the data are not.
    """
    if name == "diabetes":
        from sklearn.datasets import load_diabetes

        x, y = load_diabetes(return_X_y=True)
        order = np.random.default_rng(split).permutation(len(x))
        train, test = order[: round(0.9 * len(x))], order[round(0.9 * len(x)) :]
    else:
        require_folder(folder, name)
        with np.load(Path(folder) / "uci_splits" / name / f"{name}.npz") as archive:
            x, y = archive["X"], archive["y"]
            train, test = archive["train_idx"][split], archive["test_idx"][split]
    return holdout(x, y, train[:max_train], test)


def require_folder(folder: Path | None, name: str) -> None:
    """Raise where there is no folder of data."""
    if folder is None:
        raise FileNotFoundError(f"{name} is read from a folder: pass --data FOLDER, or set DNN2GP_DATA.")


def holdout(x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray) -> Split:
    """Inputs and labels standardised with the training part; columns that are constant there stay zero."""
    x, y = (torch.as_tensor(np.asarray(a), dtype=torch.float64) for a in (x, y))
    center, spread = x[train].mean(0), x[train].std(0)
    x = (x - center) / torch.where(spread > 0, spread, 1.0)
    scale = y[train].std()
    y = ((y - y[train].mean()) / scale)[:, None]
    return Split(x[train], y[train], x[test], y[test], float(scale))


# ---- jobs, rows, files


class Cost:
    """Time of a block: ``with Cost() as cost: ...``, then ``cost.cpu_seconds`` of all threads, ``cost.seconds``."""

    cpu_seconds = seconds = math.nan

    def __enter__(self) -> Cost:
        self._start = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu_seconds = time.process_time() - self._start[0]
        self.seconds = time.perf_counter() - self._start[1]


class Table:
    """Rows of results in a CSV file, found again by the columns of ``key``.

    Args:
        path: of the file; made at the first row.
        key: columns that name a job.
        columns: those of its results.
    """

    def __init__(self, path: Path, key: Sequence[str], columns: Sequence[str]) -> None:
        self.path, self.key, self.columns = Path(path), tuple(key), (*key, *columns)
        self.rows: list[Row] = []
        self._read()

    def _read(self) -> None:
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                if tuple(reader.fieldnames or ()) != self.columns:
                    raise ValueError(f"{self.path} has other columns than {', '.join(self.columns)}: move it away.")
                self.rows = list(reader)

    def has(self, job: Mapping[str, object]) -> bool:
        """Whether there is a row of this job."""
        wanted = [str(job[name]) for name in self.key]
        return any([row[name] for name in self.key] == wanted for row in self.rows)

    def add(self, job: Mapping[str, object], result: Mapping[str, object]) -> None:
        """Write one row, at once."""
        row = {name: _written({**job, **result}.get(name, "")) for name in self.columns}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append(row)

    def values(self, column: str, **wanted: object) -> np.ndarray:
        """Numbers of one column in the rows that have these values, in the order of their keys."""
        rows = [row for row in self.rows if all(row[name] == str(value) for name, value in wanted.items())]
        rows.sort(key=lambda row: [(len(row[name]), row[name]) for name in self.key])
        return np.array([float(row[column]) for row in rows if row[column] != ""])

    def run(
        self,
        jobs: Sequence[Mapping[str, object]],
        work: Callable[[Mapping[str, object]], Mapping[str, object]],
        estimate: Callable[[Mapping[str, object]], float],
    ) -> None:
        """Do the jobs that have no row yet; says first how long that should take.

        Args:
            jobs: each with the columns of ``key``.
            work: the result of one.
            estimate: processor seconds of one. Where the file has rows of the same job but for its split, their mean
                counts instead.
        """
        left = [job for job in jobs if not self.has(job)]
        expected = sum(self._known_cost(job) or estimate(job) for job in left)
        print(
            f"{self.path.name}: {len(jobs) - len(left)} of {len(jobs)} jobs are there; the others should take about "
            f"{duration(expected)} of one processor.",
            flush=True,
        )
        bar = tiling.progress(left, self.path.stem, None)
        for job in bar:
            bar.set_postfix_str(" ".join(str(job[name]) for name in self.key))
            self._read()  # another process may share the file
            if self.has(job):
                continue
            result = work(job)
            self._read()
            if not self.has(job):
                self.add(job, result)

    def _known_cost(self, job: Mapping[str, object]) -> float | None:
        if "cpu_seconds" not in self.columns:
            return None
        same = {name: job[name] for name in self.key if name != "split"}
        costs = self.values("cpu_seconds", **same)
        return float(costs.mean()) if len(costs) else None


def _written(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """``90 s``, ``12 min``, ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def head(arguments: argparse.Namespace, peer: Peer | None) -> None:
    """Threads are set; what it runs on is printed."""
    torch.set_num_threads(arguments.threads)
    print(describe("gpytorch", "scikit-learn"))
    print(f"peer: {peer.versions}" if peer else "peer: none (--peer-python PYTHON)", flush=True)


# ---- peers


def installed(package: str) -> bool:
    """Whether it can be imported here; says so where not."""
    found = importlib.util.find_spec(package) is not None
    if not found:
        print(f"{package} is not installed: left out")
    return found


def contenders() -> None:
    """Make nets.py and the others of contenders/ importable here too."""
    sys.path.insert(0, str(HERE / "contenders"))


def peer(arguments: argparse.Namespace, script: str, stack: contextlib.ExitStack) -> Peer | None:
    """laplace-torch where an interpreter is given, closed with the stack."""
    if arguments.peer_python is None:
        return None
    made = Peer(arguments.peer_python, script, arguments.threads)
    stack.callback(made.close)
    return made


class Peer:
    """A contender in a process of its own, started at its first job.

    Args:
        python: its interpreter.
        script: in contenders/.
        threads: of torch.
    """

    def __init__(self, python: str, script: str, threads: int = 1) -> None:
        self._log = tempfile.TemporaryFile("w+")
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads), PYTHONPATH=str(HERE / "contenders"))
        self._process = subprocess.Popen(
            [python, HERE / "contenders" / script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self.versions = self._ask(do="versions")["result"]

    def __call__(self, arrays: Mapping[str, Tensor], **case: object) -> tuple[np.ndarray, dict]:
        """What the contender computes of these arrays, and its answer with ``cpu_seconds`` and ``seconds``."""
        with tempfile.TemporaryDirectory() as folder:
            given, found = Path(folder, "given.npz"), Path(folder, "found.npy")
            np.savez(given, **{name: array.numpy() for name, array in arrays.items()})
            self._ask(do="prepare", arrays=str(given), **case)
            answer = self._ask(do="run")
            self._ask(do="save", path=str(found))
            return np.load(found), answer

    def _ask(self, **command: object) -> dict:
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"{self._process.args[1].name} has failed:\n{self._log.read()[-2000:]}")
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._log.close()


# ---- summaries


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Mean and its standard error; NaN for the error of a single value."""
    values = np.asarray(list(values), float)
    if len(values) == 0:
        return math.nan, math.nan
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.nan


def shown(values: Iterable[float], digits: int = 3) -> str:
    """``0.123 ± 0.004``; of three digits or more ``1.23e-04 ± 5e-06`` where that shows little; a dash for none."""
    mean, error = mean_and_error(values)
    if math.isnan(mean):
        return "–"
    small = digits >= 3 and 0 < max(abs(mean), error if error > 0 else 0) < 10 ** (1 - digits)
    value, spread = (f"{mean:.2e}", f"{error:.0e}") if small else (f"{mean:.{digits}f}", f"{error:.{digits}f}")
    return value + ("" if math.isnan(error) else f" ± {spread}")


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for docs/benchmarks.md."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def ranks(scores: np.ndarray) -> tuple[np.ndarray, float]:
    """Mean ranks over problems, 1 the best, and the p-value of Friedman's test that all methods are alike.

    Args:
        scores: ``(problems, methods)``, smaller is better.
    """
    each = stats.rankdata(scores, axis=1)
    enough = scores.shape[0] > 1 and scores.shape[1] > 2
    return each.mean(0), float(stats.friedmanchisquare(*scores.T).pvalue) if enough else math.nan


def paired(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Mean of ``a - b``, its standard error, and the p-value of Wilcoxon's signed-rank test."""
    difference = np.asarray(a) - np.asarray(b)
    p = float(stats.wilcoxon(difference).pvalue) if len(difference) > 4 and difference.any() else math.nan
    return *mean_and_error(difference), p
