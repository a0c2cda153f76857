"""Hyperparameters by the evidence of the training data: the paper's figures 5 and 6.

    python examples/evidence.py sine          delta; a noisy sine, Laplace and variational inference (figure 5)
    python examples/evidence.py sine-noisy    the same with more noise
    python examples/evidence.py wine-delta    delta at sigma = 0.64; red wine, 2 hidden layers (figure 6, left)
    python examples/evidence.py wine-sigma    sigma at delta = 30 (middle)
    python examples/evidence.py wine-width    width at delta = 3, sigma = 0.64, 1 hidden layer (right)

Each trains a net for every value and run, and prints a table of means and standard errors over runs: the evidence of
the training data beside the test error it is to predict, the value that each of them chooses, and what choosing by the
evidence costs. The wine is read from --data, or the folder that DNN2GP_DATA names:
uci_splits/wine-quality-red/wine-quality-red.npz, with X, y, train_idx, test_idx.
"""

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path

import joblib
import matplotlib
import numpy as np
import torch
from torch import Tensor, nn

from gpytorch_dnn2gp import LaplaceGP, VariationalGP, optim, plotting
from gpytorch_dnn2gp.losses import Gaussian
from gpytorch_dnn2gp.training import fit_many

FLOAT = torch.float64


@dataclass
class Split:
    """One run: standardised inputs and centred labels, ``(n, d)`` and ``(n, 1)``."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def mlp(num_inputs: int, widths: list[int], seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = [num_inputs, *widths]
        layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.Tanh())]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], 1)).to(FLOAT)


# ---- data


def sine(seed: int, noise: float) -> Split:
    """A hundred points in three clusters, few of them around zero."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        centers = torch.tensor(
            [-4.5] * (n * 45 // 100) + [0.0] * (n * 10 // 100) + [4.5] * (n * 45 // 100), dtype=FLOAT
        )
        spread = torch.where(centers == 0, 0.5, 1.5)
        x = centers + spread * (2 * torch.rand(n, generator=generator, dtype=FLOAT) - 1)
        y = torch.sin(x) + noise * torch.randn(n, generator=generator, dtype=FLOAT)
        return x[:, None] / 3, y[:, None]

    return Split(*draw(100), *draw(1000))


def wine(folder: str | None, runs: int) -> list[Split]:
    path = Path(folder or "") / "uci_splits" / "wine-quality-red" / "wine-quality-red.npz"
    if folder is None or not path.exists():
        raise SystemExit(
            f"The red wine is not there ({path}): pass --data, or set DNN2GP_DATA to, a folder that holds "
            "uci_splits/wine-quality-red/wine-quality-red.npz."
        )
    with np.load(path) as data:
        x, y = (torch.as_tensor(data[key], dtype=FLOAT) for key in ("X", "y"))
        train, test = data["train_idx"][:runs], data["test_idx"][:runs]
    splits = []
    for i, j in zip(train, test):
        mean, std, center = x[i].mean(0), x[i].std(0), y[i].mean()
        splits.append(Split((x[i] - mean) / std, y[i, None] - center, (x[j] - mean) / std, y[j, None] - center))
    return splits


# ---- one value of the hyperparameter: evidence, test and train error of every run, (3, runs)


def by_laplace(splits: list[Split], widths: list[int], delta: float, sigma: float, iterations: int) -> np.ndarray:
    """Nets trained to their MAP, all runs at once; the GP's evidence of each."""
    torch.set_num_threads(1)
    loss = Gaussian(sigma)
    nets = [mlp(split.train_x.shape[1], widths, seed) for seed, split in enumerate(splits)]
    fit_many(
        nets,
        [split.train_x for split in splits],
        [split.train_y for split in splits],
        loss,
        delta,
        max_iterations=iterations,
        gradient_tolerance=1e-2,
        progress=False,
    )
    rows = []
    for net, split in zip(nets, splits):
        gp = LaplaceGP(net, split.train_x, split.train_y, loss, delta)
        with torch.no_grad():
            rows.append([float(gp.log_evidence("gp")), *errors(net, split)])
    return np.array(rows).T


def by_vogn(splits: list[Split], widths: list[int], delta: float, sigma: float, iterations: int) -> np.ndarray:
    """Nets trained by VOGN, each on its own; the evidence of the GP that its iterates converge to."""
    torch.set_num_threads(1)
    loss, rows, steps = Gaussian(sigma), [], iterations // 4
    for seed, split in enumerate(splits):
        net = mlp(split.train_x.shape[1], widths, seed)
        generator = torch.Generator().manual_seed(seed)
        n = len(split.train_x)
        optimizer = optim.VOGN(net, loss, n, delta, lr=0.1, beta=0.1, mc_samples=2, generator=generator)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * 0.5 * (1 + np.cos(np.pi * step / steps)) + 1e-4
            optimizer.step(split.train_x, split.train_y)
        gp = VariationalGP(net, optimizer.iterate(), split.train_x, split.train_y, loss, converged=True, at="mean")
        with torch.no_grad():
            rows.append([float(gp.log_evidence("gp")), *errors(net, split)])
    return np.array(rows).T


def errors(net: nn.Module, split: Split) -> list[float]:
    """Test and training mean squared error of the net's own output."""
    pairs = ((split.test_x, split.test_y), (split.train_x, split.train_y))
    with torch.no_grad():
        return [float((net(x) - y).square().mean()) for x, y in pairs]


# ---- a figure


@dataclass
class Study:
    title: str
    name: str  # of the hyperparameter
    values: list
    curves: np.ndarray  # (3, runs, values)

    def table(self) -> str:
        runs = self.curves.shape[1]
        mean = self.curves.mean(1)
        error = self.curves.std(1, ddof=1) / np.sqrt(runs) if runs > 1 else np.zeros_like(mean)
        chosen, best = int(mean[0].argmax()), int(mean[1].argmin())
        lines = [
            self.title,
            f"  {self.name:>8} {'log evidence':>19} {'test MSE':>19} {'train MSE':>19}   ({runs} runs)",
        ]
        for i, value in enumerate(self.values):
            cells = [
                f"{mean[c, i]:{width}} ± {error[c, i]:{spread}}"
                for c, width, spread in ((0, "10.2f", "6.2f"), (1, "10.4f", "6.4f"), (2, "10.4f", "6.4f"))
            ]
            marks = [name for place, name in ((chosen, "* evidence"), (best, "* test")) if place == i]
            lines.append(f"  {value:>8.3g} " + " ".join(cells) + "   " + " ".join(marks))
        loss = mean[1, chosen] / mean[1, best] - 1
        per_run = self.curves[0].argmax(1)
        own = self.curves[1][np.arange(runs), per_run].mean()
        lines.append(
            f"  chosen by evidence: {self.name} = {self.values[chosen]:.3g}, test MSE {mean[1, chosen]:.4f}; the best "
            f"on the grid: {self.name} = {self.values[best]:.3g}, test MSE {mean[1, best]:.4f}: {loss:.1%} worse"
        )
        lines.append(
            f"  chosen in each run by its own evidence: test MSE {own:.4f}, {own / mean[1, best] - 1:.1%} worse"
        )
        return "\n".join(lines)

    def draw(self, ax) -> None:
        evidence, test, train = self.curves
        plotting.plot_evidence(self.values, evidence, {"test MSE": test, "train MSE": train}, self.name, ax=ax)
        ax.set_title(self.title, fontsize="medium")


def sweep(title: str, name: str, values: list, run, jobs: int) -> Study:
    """``run(value)`` for every value, in parallel."""
    results = joblib.Parallel(n_jobs=jobs)(joblib.delayed(run)(value) for value in values)
    return Study(title, name, values, np.stack(results, -1))


def studies(what: str, arguments: argparse.Namespace) -> list[Study]:
    jobs, iterations, count = arguments.jobs, arguments.iterations, arguments.values

    def grid(values) -> list:
        return [values[round(i)] for i in np.linspace(0, len(values) - 1, count or len(values))]

    if what.startswith("sine"):
        noise = 0.6 if what == "sine-noisy" else 0.3
        splits = [sine(seed, noise) for seed in range(arguments.runs or 10)]
        return [
            sweep(
                f"sine, noise {noise}, {how}",
                "delta",
                grid([float(d) for d in np.logspace(-2, 2, 9)]),
                lambda delta, train=train: train(splits, [20], delta, noise, iterations),
                jobs,
            )
            for how, train in (("Laplace", by_laplace), ("variational inference", by_vogn))
        ]
    splits = wine(arguments.data, arguments.runs or 20)
    if what == "wine-delta":
        title, name, values = "red wine, 2 x 20 tanh, sigma = 0.64", "delta", [float(d) for d in np.logspace(0, 3, 9)]

        def run(delta: float) -> np.ndarray:
            return by_laplace(splits, [20, 20], delta, 0.64, iterations)

    elif what == "wine-sigma":
        title, name = "red wine, 2 x 20 tanh, delta = 30", "sigma"
        values = [0.3, 0.4, 0.5, 0.55, 0.6, 0.64, 0.7, 0.8, 1.0, 1.3]

        def run(sigma: float) -> np.ndarray:
            return by_laplace(splits, [20, 20], 30.0, sigma, iterations)

    else:
        title, name = "red wine, 1 hidden layer, delta = 3, sigma = 0.64", "width"
        values = [1, 2, 3, 5, 8, 12, 20, 30, 50]

        def run(width: int) -> np.ndarray:
            return by_laplace(splits, [width], 3.0, 0.64, iterations)

    return [sweep(title, name, grid(values), run, jobs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=["sine", "sine-noisy", "wine-delta", "wine-sigma", "wine-width"])
    parser.add_argument("--data", default=os.environ.get("DNN2GP_DATA"), help="folder of data sets")
    parser.add_argument("--runs", type=int, help="data sets or splits (default 10 for the sine, 20 for the wine)")
    parser.add_argument("--values", type=int, help="values of the hyperparameter (default all of the grid)")
    parser.add_argument("--iterations", type=int, default=2000, help="of training; a quarter of them for VOGN")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--output", type=Path, default=Path("examples/output"), help="folder for the picture")
    arguments = parser.parse_args()

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    start = time.perf_counter()
    found = studies(arguments.study, arguments)
    figure, axes = plt.subplots(1, len(found), figsize=(6.5 * len(found), 4.2), squeeze=False, layout="constrained")
    for study, ax in zip(found, axes[0]):
        print(study.table())
        study.draw(ax)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"evidence-{arguments.study}.png"
    figure.savefig(path, dpi=130)
    print(f"{time.perf_counter() - start:.0f} s; picture in {path}")


if __name__ == "__main__":
    main()
