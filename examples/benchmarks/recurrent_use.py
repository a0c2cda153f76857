"""Real sequences: recurrent kernels whose sigmas the evidence chooses, beside an RBF kernel on the same inputs.

Digits of scikit-learn, read row by row: eight tokens of eight numbers, ten classes by regression. Atmospheric CO2 at
Mauna Loa: the last 24 months, as a sequence of one number each, foretell the mean of a month half a year ahead; trained
on the months before 1990, scored on those after. Hyperparameters of all kernels are fitted alike, by L-BFGS on the
evidence of the training data; the RBF kernels see the same numbers as one vector.

    python examples/benchmarks/recurrent_use.py [--data FOLDER] [--train 400]

FOLDER holds uci/co2_mm_mlo.txt; without it the second table is left out.
"""

import argparse
import math
import os
import time
from pathlib import Path

import gpytorch
import numpy as np
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from machine import describe
from sklearn.datasets import load_digits
from torch import Tensor

from gpytorch_dnn2gp import infinite

WINDOW, AHEAD = 24, 6


class Regression(gpytorch.models.ExactGP):
    """Zero mean, any kernel."""

    def __init__(self, x: Tensor, y: Tensor, kernel: gpytorch.kernels.Kernel) -> None:
        likelihood = gpytorch.likelihoods.GaussianLikelihood().to(x)
        likelihood.noise = 0.1
        super().__init__(x, y, likelihood)
        self.mean_module, self.covar_module = gpytorch.means.ZeroMean(), kernel

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    def evidence(self) -> Tensor:
        """Log marginal likelihood of the training data."""
        self.train()
        return self.likelihood(self(*self.train_inputs)).log_prob(self.train_targets)


def fit(gp: infinite.OneHotGP | Regression, steps: int) -> tuple[float, float]:
    """Evidence before and after its hyperparameters are fitted."""
    optimizer = torch.optim.LBFGS(gp.parameters(), max_iter=steps, line_search_fn="strong_wolfe", history_size=20)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -gp.evidence() / len(gp.train_inputs[0])
        loss.backward()
        return loss

    with gpytorch.settings.max_cholesky_size(10**6):
        with torch.no_grad():
            before = float(gp.evidence())
        optimizer.step(closure)
        with torch.no_grad():
            return before, float(gp.evidence())


def recurrent(size: int, activation: str, readout: str) -> infinite.RecurrentKernel:
    return infinite.simple_rnn(size, activation, 2.0, 1.0, 0.1, readout=readout).double()


def kernels(size: int, readouts: tuple[str, ...] = ("last", "mean")) -> dict[str, tuple]:
    """Name -> kernel, and whether it reads sequences."""
    found = {"RBF, one length scale": (ScaleKernel(RBFKernel()).double(), False)}
    for activation in ("erf", "relu"):
        for readout in readouts:
            found[f"RNN, {activation}, {readout} state"] = (recurrent(size, activation, readout), True)
    return found


def sigmas(kernel: gpytorch.kernels.Kernel) -> str:
    if not isinstance(kernel, infinite.RecurrentKernel):
        return f"length scale {float(kernel.base_kernel.lengthscale.detach()):.3g}"
    names = {"u": kernel.input_variance, "w": kernel.recurrent_variance, "b": kernel.bias_variance}
    return ", ".join(f"{name}2 {float(value.detach()):.3g}" for name, value in names.items())


def digits(train: int, steps: int) -> None:
    images = torch.tensor(load_digits().images, dtype=torch.float64) / 16
    classes = torch.tensor(load_digits().target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, classes = images[order] - images.mean(), classes[order]
    print(f"\ndigits row by row, {train} for training, {len(images) - train} for testing")
    print(f"{'kernel':>24} {'evidence before':>16} {'after':>9} {'accuracy':>9} {'seconds':>8}  sigmas")
    for name, (kernel, sequential) in kernels(8).items():
        x = infinite.pack(images) if sequential else images.flatten(1)
        start = time.perf_counter()
        gp = infinite.OneHotGP(x[:train], classes[:train], kernel, 10, noise=1e-2)
        before, after = fit(gp, steps)
        mean, _ = gp.predict(x[train:], progress=False)
        accuracy = float((mean.argmax(-1) == classes[train:]).double().mean())
        seconds = time.perf_counter() - start
        print(f"{name:>24} {before:16.1f} {after:9.1f} {accuracy:9.4f} {seconds:8.1f}  {sigmas(kernel)}", flush=True)


def co2(path: Path, steps: int) -> None:
    table = np.loadtxt(path, comments="#")
    when, values = torch.tensor(table[:, 2]), torch.tensor(table[:, 3])
    count = len(values) - WINDOW - AHEAD + 1
    windows = values.unfold(0, WINDOW, 1)[:count]
    present = windows[:, -1:]
    targets = (values[WINDOW + AHEAD - 1 :] - present[:, 0]).unsqueeze(-1)
    times = when[WINDOW + AHEAD - 1 :]
    old = times < 1990
    inputs = windows - present
    inputs = (inputs - inputs[old].mean()) / inputs[old].std()
    centre, scale = targets[old].mean(), targets[old].std()
    y = ((targets - centre) / scale)[:, 0]
    before, after = int(old.sum()), int((~old).sum())
    print(f"\nCO2 at Mauna Loa, {AHEAD} months after {WINDOW}: {before} months before 1990, {after} after")
    print(f"{'kernel':>24} {'evidence before':>16} {'after':>9} {'RMSE, ppm':>10} {'NLPD':>7} {'seconds':>8}  sigmas")
    truth = targets[~old, 0]
    for name, (kernel, sequential) in kernels(1, ("last",)).items():
        x = infinite.pack(inputs.unsqueeze(-1)) if sequential else inputs
        start = time.perf_counter()
        gp = Regression(x[old], y[old], kernel)
        before, after = fit(gp, steps)
        gp.eval()
        with torch.no_grad(), gpytorch.settings.max_cholesky_size(10**6), gpytorch.settings.fast_pred_var(False):
            p = gp.likelihood(gp(x[~old]))
            mean, variance = p.mean * scale + centre, p.variance * scale**2
        rmse = float((mean - truth).square().mean().sqrt())
        nlpd = float((0.5 * (truth - mean) ** 2 / variance + 0.5 * (2 * math.pi * variance).log()).mean())
        seconds = time.perf_counter() - start
        print(
            f"{name:>24} {before:16.1f} {after:9.1f} {rmse:10.3f} {nlpd:7.3f} {seconds:8.1f}  {sigmas(kernel)}",
            flush=True,
        )
    trend = float((truth - targets[old].mean()).square().mean().sqrt())
    print(f"{'mean rise of the past':>24} {'':16} {'':9} {trend:10.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("DNN2GP_DATA"), help="folder with uci/")
    parser.add_argument("--train", type=int, default=400, help="digits for training (default 400)")
    parser.add_argument("--steps", type=int, default=20, help="of L-BFGS (default 20)")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(describe("gpytorch", "scikit-learn"))
    digits(arguments.train, arguments.steps)
    if arguments.data is None:
        print("\nNo --data and no DNN2GP_DATA: CO2 is left out.")
        return
    co2(Path(arguments.data) / "uci" / "co2_mm_mlo.txt", arguments.steps)


if __name__ == "__main__":
    main()
