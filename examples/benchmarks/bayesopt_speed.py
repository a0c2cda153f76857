"""Surrogates of BoTorch side by side: fit, optimize_acqf and condition_on_observations, ours against two peers.

    python examples/benchmarks/bayesopt_speed.py [--peer-python PYTHON]

Branin at n = 20 and 100 points of a Sobol sequence, in float64. The net of ours and of laplace-bayesopt is the same
MLP, 2-50-50-1 with tanh. laplace-bayesopt trains one for its default of 1,000 epochs of Adam, then chooses its
hyperparameters in 100 steps. Ours trains by Gauss-Newton steps over all data, in rounds with its hyperparameters, until
nothing changes: with its defaults (several nets, a residual kernel), and one net alone, as the peer does. "misfit" is
the root mean squared error on 1,000 other points, in standard deviations, so that nobody is fast by not training.

    fit          the model, ready for use
    acqf         optimize_acqf of LogEI, 10 restarts from the best of 512 points, with the fitted model
    condition    condition_on_observations on one new point, and the posterior there

Times are medians; --peer-python names the Python of an environment with laplace-bayesopt (contenders/
laplace_bayesopt.txt), which is left out without it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from botorch.acquisition import LogExpectedImprovement
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.transforms import Standardize
from botorch.optim import optimize_acqf
from botorch.test_functions import Branin
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent.parent
PEER = "laplace-bayesopt"
BARS = {"fit": 0.5, "acqf": 0.3, "condition": 0.01}  # of the peer's time


def net() -> nn.Sequential:
    layers = [nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1)]
    return nn.Sequential(*layers).double()


def ours(x: Tensor, y: Tensor, **options):
    from gpytorch_dnn2gp.bayesopt import DNN2GPModel

    return DNN2GPModel(x, y, net=net, **options)


def ours_alone(x: Tensor, y: Tensor):
    return ours(x, y, restarts=1, residual_kernel=None)


def gp(x: Tensor, y: Tensor) -> SingleTaskGP:
    model = SingleTaskGP(x, y)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return model


def laplace_bayesopt(x: Tensor, y: Tensor):
    from laplace_bayesopt.botorch import LaplaceBoTorch

    return LaplaceBoTorch(net, x, y, outcome_transform=Standardize(1))


CONTENDERS: dict[str, Callable] = {
    "ours": ours,
    "ours, one net, no residual": ours_alone,
    "SingleTaskGP": gp,
    PEER: laplace_bayesopt,
}


def measure(name: str, n: int, repeats: int) -> dict[str, float]:
    """Seconds of each step, and the misfit."""
    branin = Branin(negate=True)
    low, high = branin.bounds.double()
    x = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(n + 1000, dtype=torch.float64)
    y = branin(low + x * (high - low))[:, None]
    x, x_test, y, y_test = x[:n], x[n:], y[:n], y[n:]
    bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    times: dict[str, list[float]] = {step: [] for step in BARS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CONTENDERS[name](x[:5], y[:5]).posterior(x[:1])  # what is done once
        for repeat in range(repeats):
            torch.manual_seed(repeat)
            start = time.perf_counter()
            model = CONTENDERS[name](x, y)
            times["fit"].append(time.perf_counter() - start)

            acquisition = LogExpectedImprovement(model, best_f=y.max())
            start = time.perf_counter()
            point, _ = optimize_acqf(acquisition, bounds, q=1, num_restarts=10, raw_samples=512)
            times["acqf"].append(time.perf_counter() - start)

            model.posterior(point)
            start = time.perf_counter()
            more = model.condition_on_observations(point, branin(low + point * (high - low))[:, None])
            more.posterior(point)
            times["condition"].append(time.perf_counter() - start)
        with torch.no_grad():
            mean = model.posterior(x_test[:, None]).mean.reshape(-1, 1)
    result = {step: statistics.median(values) for step, values in times.items()}
    return result | {"misfit": float((mean - y_test).square().mean().sqrt() / y_test.std())}


def measure_anywhere(name: str, n: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Each contender in a process of its own, the peer by its Python."""
    python = arguments.peer_python if name == PEER else sys.executable
    options = ["--threads", str(arguments.threads), "--repeats", str(arguments.repeats)]
    environment = dict(os.environ, OMP_NUM_THREADS=str(arguments.threads))
    if name != PEER:
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [python, __file__, "--one", name, str(n), *options]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        sys.exit(f"{name} did not run:\n{run.stderr[-3000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", help="Python of an environment with laplace-bayesopt")
    parser.add_argument("--n", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # contender, n: in a process of its own
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], int(arguments.one[1]), arguments.repeats)))
        return

    from machine import describe

    print(describe("gpytorch", "botorch"))
    names = [name for name in CONTENDERS if name != PEER or arguments.peer_python]
    if PEER not in names:
        print(f"{PEER} left out: name its Python by --peer-python")
    for n in arguments.n:
        rows = {name: measure_anywhere(name, n, arguments) for name in names}
        peer = rows.get(PEER)
        print(f"\n{f'n = {n}':28}" + "".join(f"{step + ' (s)':>15}{'of peer':>10}" for step in BARS) + f"{'misfit':>9}")
        for name, row in rows.items():
            cells = [
                f"{row[step]:15.4f}" + (f"{row[step] / peer[step]:9.3f}x" if peer else f"{'-':>10}") for step in BARS
            ]
            print(f"{name:28}" + "".join(cells) + f"{row['misfit']:9.3f}")
        if peer:
            missed = [f"{step} {rows['ours'][step] / peer[step]:.3f}x > {bar}x" for step, bar in BARS.items()
                      if rows["ours"][step] > bar * peer[step]]  # fmt: skip
            print("bars: " + ("all kept" if not missed else "missed: " + ", ".join(missed)))


if __name__ == "__main__":
    main()
