"""Theorem 2 in a picture: along 50 steps of training each iterate's GP has the next iterate as its posterior.

    python examples/iterates.py                     or with --output DIR for the picture; examples/output by default

Before each step the GP of the iterate is made of the data. After the step its Gaussian over weights is compared with
the optimizer's. For VOGGN and OGGN they are the same; so they are for a learning rate other than beta. VOGN and OGN
keep diagonals: the diagonal of the posterior's precision is the optimizer's next precision, while the means differ, as
a step with a diagonal is no full solve.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn

from gpytorch_dnn2gp import VariationalGP, losses, optim, plotting

matplotlib.use("Agg")  # pictures go to files
import matplotlib.pyplot as plt  # noqa: E402

STEPS = 50
RUNS = {
    "VOGGN, lr = beta": (optim.VOGGN, {"lr": 0.2, "beta": 0.2}),
    "VOGGN, lr = beta / 4, 3 samples": (optim.VOGGN, {"lr": 0.05, "beta": 0.2, "mc_samples": 3}),
    "OGGN, lr = beta": (optim.OGGN, {"lr": 0.2, "beta": 0.2}),
    "OGGN, lr = beta / 2": (optim.OGGN, {"lr": 0.1, "beta": 0.2}),
    "VOGN, lr = beta / 4": (optim.VOGN, {"lr": 0.05, "beta": 0.2}),
    "OGN, lr = beta / 4": (optim.OGN, {"lr": 0.05, "beta": 0.2}),
}
SHOWN = (1, 5, 15, 50)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 6 * torch.rand(40, 1, generator=generator, dtype=torch.float64) - 3
    return x, torch.sin(2 * x) + 0.2 * torch.randn(x.shape, generator=generator, dtype=torch.float64)


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference over largest entry."""
    return float((a - b).abs().max() / b.abs().max())


def run(kind: type[optim.GaussNewton], options: dict) -> tuple[list[float], list[float], list[VariationalGP]]:
    """Along training: how far the GPs' posteriors are from the next iterates, in precision and in mean; and the GPs."""
    torch.manual_seed(1)
    x, y = data()
    net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    opt = kind(net, losses.Gaussian(0.2), train_size=len(x), prior_precision=0.5, **options)
    precisions, means, gps = [], [], []
    for _ in range(STEPS):
        gp = VariationalGP(net, opt.iterate(), x, y, losses.Gaussian(0.2))
        posterior = gp.weight_posterior()
        opt.step(x, y)
        expected, found = opt.iterate().precision, posterior.precision()
        precisions.append(difference(found.diagonal() if opt.diagonal else found, expected))
        means.append(difference(posterior.mean, opt.mean))
        gps.append(gp)
    return precisions, means, gps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder of the picture")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    x, y = data()
    grid = torch.linspace(-5, 5, 201, dtype=torch.float64)[:, None]

    figure, axes = plt.subplots(2, len(SHOWN), figsize=(16, 7.5), layout="constrained")
    differences, (on_left, on_right) = [], (axes[1, 0], axes[1, 2])
    for place in axes[1]:
        place.remove()
    spec = axes[1, 0].get_gridspec()
    on_left, on_right = figure.add_subplot(spec[1, :2]), figure.add_subplot(spec[1, 2:])
    print(f"{'largest relative difference in ' + str(STEPS) + ' steps':40s} {'precision':>12s} {'mean':>12s}")
    for name, (kind, options) in RUNS.items():
        precisions, means, gps = run(kind, options)
        differences.append((name, max(precisions), max(means)))
        print(f"{name:40s} {max(precisions):12.1e} {max(means):12.1e}")
        on_left.semilogy(range(1, STEPS + 1), precisions, label=name)
        on_right.semilogy(range(1, STEPS + 1), means, label=name)
        if name == "VOGGN, lr = beta":
            for place, step in zip(axes[0], SHOWN, strict=True):
                prediction = gps[step - 1].predict(grid, mean="posterior")
                plotting.plot_regression_1d(prediction, grid, x, y, ax=place)
                place.set(title=f"VOGGN: GP of iterate {step}, given the data", ylim=(-3, 3))
    diagonal = " (VOGN, OGN: its diagonal)"
    on_left.set(title="GP's posterior against next iterate: precision" + diagonal, xlabel="step")
    on_right.set(title="GP's posterior against next iterate: mean", xlabel="step")
    for place in (on_left, on_right):
        place.set(ylabel="relative difference", ylim=(1e-17, 10))
        place.legend(fontsize="small", ncols=2)
    figure.savefig(folder / "iterates.png", dpi=110)
    print(f"{folder / 'iterates.png'} shows them along training.")


if __name__ == "__main__":
    main()
