"""Bayesian optimisation on known functions: our surrogate against GPs, random search and laplace-bayesopt.

    python examples/benchmarks/bayesopt_quality.py                              ours and BoTorch's
    python examples/benchmarks/bayesopt_quality.py --peer-python PYTHON         and laplace-bayesopt, in its environment
    python examples/benchmarks/bayesopt_quality.py --full                       twice the evaluations, ten seeds

Every method starts from the same scrambled Sobol points, fits its model anew after each evaluation, with defaults, and
goes where LogEI is largest (for two objectives qLogNEHVI). The functions have no noise. What counts is the simple
regret after the last evaluation, for two objectives the missing hypervolume; methods are ranked by it for each function
and seed. Finished runs are kept in the CSV of --output, and not run again. --peer-python names the Python of an
environment as contenders/laplace_bayesopt.txt pins it.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from botorch.acquisition import LogExpectedImprovement
from botorch.acquisition.multi_objective import qLogNoisyExpectedHypervolumeImprovement
from botorch.fit import fit_gpytorch_mll
from botorch.models import ModelListGP, SingleTaskGP
from botorch.models.kernels import InfiniteWidthBNNKernel
from botorch.models.transforms import Standardize
from botorch.optim import optimize_acqf
from botorch.sampling import SobolQMCNormalSampler
from botorch.test_functions import Ackley, Branin, BraninCurrin, Hartmann, Levy
from botorch.utils.multi_objective.hypervolume import Hypervolume
from botorch.utils.multi_objective.pareto import is_non_dominated
from gpytorch.mlls import ExactMarginalLogLikelihood, SumMarginalLogLikelihood
from torch import Tensor, nn

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


# ---- functions, to be maximised over the unit cube


@dataclass(frozen=True)
class Problem:
    """A function of ``(n, dim)`` points in the unit cube, its maximum (or largest hypervolume), and a budget."""

    function: Callable[[Tensor], Tensor]
    dim: int
    maximum: float
    start: int
    evaluations: int
    reference: tuple[float, ...] | None = None  # of the hypervolume

    def __call__(self, x: Tensor) -> Tensor:
        y = self.function(x)
        return y if y.dim() == 2 else y[:, None]

    def score(self, y: Tensor) -> list[float]:
        """The best value, or the hypervolume, after each evaluation of ``y`` ``(n, m)``."""
        if self.reference is None:
            return y[:, 0].cummax(0).values.tolist()
        volume = Hypervolume(torch.tensor(self.reference, dtype=y.dtype))
        fronts = (y[:i][is_non_dominated(y[:i])] for i in range(1, len(y) + 1))
        return [volume.compute(front) for front in fronts]


def scaled(function) -> Callable[[Tensor], Tensor]:
    """BoTorch's function on the unit cube."""
    low, high = function.bounds.double()
    return lambda x: function(low + x * (high - low))


def chirp(x: Tensor) -> Tensor:
    """Mean over the inputs of the function of Xiong et al. (2007): fast oscillations for small x, flat for large."""
    u = x - 0.9
    return -(torch.sin(30 * u**4) * torch.cos(2 * u) + u / 2).mean(-1)


def _chirp_maximum() -> float:
    x = torch.linspace(0, 1, 1_000_001, dtype=torch.float64)[:, None]
    return float(chirp(x).max())


def problems(full: bool = False, most: int | None = None) -> dict[str, Problem]:
    """By name; with twice the evaluations, or ``most`` of them."""
    ackley = Ackley(5, bounds=[(-5.0, 10.0)] * 5, negate=True)
    levy = Levy(10, bounds=[(-5.0, 10.0)] * 10, negate=True)
    pair = BraninCurrin(negate=True)
    more = 2 if full else 1
    every = {
        "Branin": Problem(scaled(Branin(negate=True)), 2, -0.397887, 5, 25 * more),
        "Hartmann-6": Problem(scaled(Hartmann(6, negate=True)), 6, 3.32237, 10, 40 * more),
        "Ackley-5": Problem(scaled(ackley), 5, 0.0, 10, 40 * more),
        "Levy-10": Problem(scaled(levy), 10, 0.0, 12, 40 * more),
        "Chirp-2": Problem(chirp, 2, _chirp_maximum(), 5, 30 * more),
        "BraninCurrin": Problem(scaled(pair), 2, pair._max_hv, 6, 25 * more, tuple(pair.ref_point.tolist())),
    }
    return {name: replace(p, evaluations=min(p.evaluations, most or p.evaluations)) for name, p in every.items()}


# ---- methods


def ours(x: Tensor, y: Tensor, **options):
    from gpytorch_dnn2gp.bayesopt import DNN2GPModel

    return DNN2GPModel(x, y, **options)


def gp(x: Tensor, y: Tensor):
    model = SingleTaskGP(x, y)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return model


def infinite_width(x: Tensor, y: Tensor):
    models = [SingleTaskGP(x, y_i, covar_module=InfiniteWidthBNNKernel(3)) for y_i in y.split(1, dim=1)]
    model = ModelListGP(*models) if len(models) > 1 else models[0]
    kind = SumMarginalLogLikelihood if len(models) > 1 else ExactMarginalLogLikelihood
    fit_gpytorch_mll(kind(model.likelihood, model))
    return model


def laplace_bayesopt(x: Tensor, y: Tensor):
    from laplace_bayesopt.botorch import LaplaceBoTorch

    def net():
        sizes, m = [x.shape[-1], 50, 50], y.shape[-1]
        return nn.Sequential(
            *(nn.Linear(sizes[0], sizes[1]), nn.Tanh(), nn.Linear(sizes[1], sizes[2]), nn.Tanh()), nn.Linear(50, m)
        ).double()

    return LaplaceBoTorch(net, x, y, outcome_transform=Standardize(y.shape[-1]))


METHODS: dict[str, Callable | None] = {
    "ours": ours,
    "SingleTaskGP": gp,
    "infinite-width BNN": infinite_width,
    "laplace-bayesopt": laplace_bayesopt,
    "random": None,
}
PEER = "laplace-bayesopt"


def takes(method: str, problem: Problem) -> bool:
    """Whether a method can do it: laplace-bayesopt reads (n, d) as n batches, where qLogNEHVI needs them jointly."""
    return method != PEER or problem.reference is None


def next_point(make: Callable | None, problem: Problem, x: Tensor, y: Tensor, seed: int) -> Tensor:
    """Where the method goes next, ``(1, dim)``."""
    torch.manual_seed(1000 * seed + len(x))
    if make is None:
        return torch.rand(1, problem.dim, dtype=x.dtype)
    model = make(x, y)
    if problem.reference is None:
        acquisition = LogExpectedImprovement(model, best_f=y.max())
    else:
        sampler = SobolQMCNormalSampler(torch.Size([64]), seed=seed)
        acquisition = qLogNoisyExpectedHypervolumeImprovement(
            model, list(problem.reference), x, sampler=sampler, prune_baseline=True
        )
    bounds = torch.stack([torch.zeros(problem.dim, dtype=x.dtype), torch.ones(problem.dim, dtype=x.dtype)])
    options = {"maxiter": 100, "batch_limit": 8}
    point, _ = optimize_acqf(acquisition, bounds, q=1, num_restarts=4, raw_samples=128, options=options)
    return point.detach()


def run(problem: Problem, method: str, seed: int) -> dict:
    """One run: the score after each evaluation, and the seconds until then."""
    torch.set_num_threads(1)
    x = torch.quasirandom.SobolEngine(problem.dim, scramble=True, seed=seed).draw(problem.start, dtype=torch.float64)
    y, seconds = problem(x), [0.0] * problem.start
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while len(x) < problem.evaluations:
            start = time.perf_counter()
            point = next_point(METHODS[method], problem, x, y, seed)
            x, y = torch.cat([x, point]), torch.cat([y, problem(point)])
            seconds.append(seconds[-1] + time.perf_counter() - start)
    return {"scores": problem.score(y), "seconds": seconds}


def run_anywhere(name: str, method: str, seed: int, full: bool, most: int | None, peer: str | None) -> dict:
    """``run``, for the peer in its own Python."""
    if method != PEER:
        return run(problems(full, most)[name], method, seed)
    command = [peer, __file__, "--one", name, method, str(seed), *(["--full"] if full else [])]
    command += ["--evaluations", str(most)] if most else []
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    if done.returncode:
        raise RuntimeError(f"{method} on {name} did not run:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---- results

COLUMNS = ("problem", "method", "seed", "evaluation", "score", "regret", "seconds")


class Table:
    """The CSV: runs that are finished."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[tuple[str, str, int], dict] = {}
        if path.exists():
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    found = self.runs.setdefault((row["problem"], row["method"], int(row["seed"])), _empty())
                    for column, values in found.items():
                        values.append(float(row[column.removesuffix("s") if column != "seconds" else column]))

    def add(self, name: str, problem: Problem, method: str, seed: int, result: dict) -> None:
        regrets = [problem.maximum - score for score in result["scores"]]
        self.runs[name, method, seed] = {**result, "regrets": regrets}
        self.write()

    def write(self) -> None:
        part = self.path.with_suffix(".part")
        with part.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for key in sorted(self.runs):
                run = self.runs[key]
                for i, values in enumerate(zip(run["scores"], run["regrets"], run["seconds"]), 1):
                    writer.writerow([*key, i, *values])
        os.replace(part, self.path)

    def regrets(self, name: str, method: str, seeds: range) -> np.ndarray:
        """``(seeds, evaluations)``."""
        found = [self.runs[name, method, seed]["regrets"] for seed in seeds if (name, method, seed) in self.runs]
        return np.array(found) if found else np.empty((0, 0))


def _empty() -> dict[str, list[float]]:
    return {"scores": [], "regrets": [], "seconds": []}


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks of each column's entries, ties shared, 1 the smallest: ``(methods, seeds)``."""
    below = (values[:, None] > values[None]).sum(1)
    equal = (values[:, None] == values[None]).sum(1)
    return below + (equal + 1) / 2


def report(table: Table, names: list[str], methods: list[str], seeds: range, full: bool) -> str:
    """Median regrets at the end, and mean ranks."""
    lines = [f"{'regret, median of ' + str(len(seeds)):24}" + "".join(f"{method:>20}" for method in methods)]
    every: dict[str, list[float]] = {method: [] for method in methods}
    for name in names:
        there = [m for m in methods if len(table.regrets(name, m, seeds)) == len(seeds)]
        if not there:
            continue
        final = np.array([table.regrets(name, method, seeds)[:, -1] for method in there])
        place = ranks(final)
        cells = []
        for method in methods:
            if method not in there:
                cells.append(f"{'-':>20}")
                continue
            i = there.index(method)
            every[method] += place[i].tolist()
            cells.append(f"{f'{np.median(final[i]):.3g} (rank {place[i].mean():.1f})':>20}")
        lines.append(f"{name:24}" + "".join(cells))
    means = [f"{np.mean(every[m]):.2f}" if every[m] else "-" for m in methods]
    lines.append(f"{'mean rank':24}" + "".join(f"{mean:>20}" for mean in means))
    seconds = []
    for method in methods:
        steps = [
            run["seconds"][-1] / max(1, len(run["seconds"]) - problems(full)[name].start)
            for (name, m, _), run in table.runs.items()
            if m == method
        ]
        seconds.append(f"{np.mean(steps):.2f}" if steps else "-")
    lines.append(f"{'seconds for a step':24}" + "".join(f"{value:>20}" for value in seconds))
    return "\n".join(lines)


def draw(table: Table, names: list[str], methods: list[str], seeds: range, full: bool, path: Path) -> None:
    """Median regret over evaluations, with its quartiles, a panel for each function."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = ["#0b559f", "#c8102e", "#f3a73b", "#1a1a1a", "#9a9a9a"]
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3 * rows), layout="constrained", squeeze=False)
    for ax, name in zip(axes.flat, names):
        start = problems(full)[name].start
        for method, color in zip(METHODS, colors):
            regrets = table.regrets(name, method, seeds)
            if method not in methods or not len(regrets):
                continue
            low, middle, high = np.quantile(regrets[:, start - 1 :], [0.25, 0.5, 0.75], axis=0).clip(min=1e-6)
            number = np.arange(start, start + len(middle))
            ax.plot(number, middle, color=color, label=method)
            ax.fill_between(number, low, high, color=color, alpha=0.15, linewidth=0)
        ax.set_yscale("log")
        ax.set_title(name)
        ax.set_xlabel("evaluations")
    axes[0, 0].set_ylabel("regret")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---- the command


def project(pending: list[tuple[str, str, int]], full: bool, most: int | None, peer: str | None, jobs: int) -> str:
    """The time that the runs will take, from two steps of each method on one of them."""
    lines, total = [], 0.0
    for method in dict.fromkeys(method for _, method, _ in pending):
        mine = [(name, seed) for name, m, seed in pending if m == method]
        names = list(dict.fromkeys(name for name, _ in mine))
        middle = names[len(names) // 2]
        few = problems(full)[middle].start + 2
        seconds = run_anywhere(middle, method, 0, full, few, peer)["seconds"][-1] / 2
        chosen = problems(full, most)
        steps = sum(chosen[name].evaluations - chosen[name].start for name, _ in mine)
        total += steps * seconds
        lines.append(f"  {method:20} {len(mine):3} runs, {steps:5} steps of {seconds:6.2f} s on {middle}")
    return "\n".join([f"Projected: {total / jobs / 60:.0f} min by {jobs} process(es)", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", choices=list(problems()), default=list(problems()))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, help="5, or 10 with --full")
    parser.add_argument("--full", action="store_true", help="twice the evaluations, ten seeds")
    parser.add_argument("--evaluations", type=int, help="at most so many of each function")
    parser.add_argument("--peer-python", help="Python of an environment with laplace-bayesopt; left out without it")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with one thread")
    parser.add_argument("--output", type=Path, default=Path("bayesopt_quality"), help="of the CSV and the picture")
    parser.add_argument("--no-progress", action="store_true")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # problem, method, seed: for the peer
    arguments = parser.parse_args()
    if arguments.one:
        name, method, seed = arguments.one
        with contextlib.redirect_stdout(sys.stderr):
            result = run(problems(arguments.full, arguments.evaluations)[name], method, int(seed))
        print(json.dumps(result))
        return

    import joblib
    from machine import describe
    from tqdm import tqdm

    print(describe("gpytorch", "botorch"))
    methods = [m for m in arguments.methods if m != PEER or arguments.peer_python]
    if PEER in arguments.methods and not arguments.peer_python:
        print(f"{PEER} left out: name its Python by --peer-python")
    full, most, seeds = arguments.full, arguments.evaluations, range(arguments.seeds or (10 if arguments.full else 5))
    arguments.output.mkdir(parents=True, exist_ok=True)
    stem = ("full" if full else "table") + (f"_{most}" if most else "")
    table = Table(arguments.output / f"{stem}.csv")
    wanted = [
        (name, method, seed)
        for seed in seeds
        for name in arguments.problems
        for method in methods
        if takes(method, problems()[name])
    ]
    pending = [key for key in wanted if key not in table.runs]
    if pending:
        print(project(pending, full, most, arguments.peer_python, arguments.jobs), flush=True)
    calls = (joblib.delayed(_keyed)(key, full, most, arguments.peer_python) for key in pending)
    bar = tqdm(total=len(wanted), initial=len(wanted) - len(pending), unit=" runs", disable=arguments.no_progress)
    with bar:
        for key, result in joblib.Parallel(n_jobs=arguments.jobs, return_as="generator_unordered")(calls):
            table.add(key[0], problems(full)[key[0]], *key[1:], result)
            bar.update()
            bar.set_postfix_str(f"{key[1]} on {key[0]}")
    print(report(table, arguments.problems, methods, seeds, full))
    draw(table, arguments.problems, methods, seeds, full, arguments.output / f"{stem}.png")
    print(f"{arguments.output / stem}.csv, .png")


def _keyed(key: tuple[str, str, int], *options) -> tuple[tuple[str, str, int], dict]:
    return key, run_anywhere(*key, *options)


if __name__ == "__main__":
    main()
