"""Uncertainty where there are no data: the paper's Figure 3, five ways to the same picture.

    python examples/gap.py                          or with --output DIR for the picture; examples/output by default

A net of 32 sigmoid units on Snelson's data without the points between 1.5 and 3. Left to right: the GP of the net
trained by MAP (Laplace), the GP that VOGN converges to, started there (VI), draws of weights in the net itself for
either (diagonal Gaussians), and a GP with an RBF kernel. With DNN2GP_DATA the data are Snelson's own, of the folder's
snelson/train_inputs.txt and train_outputs.txt; else as many points of a curve like his.
"""

from __future__ import annotations

import argparse
import copy
import os
from pathlib import Path

import gpytorch
import matplotlib
import numpy as np
import torch
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import Tensor, nn

from gpytorch_dnn2gp import LaplaceGP, Prediction, VariationalGP, losses, optim, plotting, sampling_predictive, training

matplotlib.use("Agg")  # pictures go to files
import matplotlib.pyplot as plt  # noqa: E402

GAP = (1.5, 3.0)
SIGMA, DELTA = 0.28, 0.1


def data() -> tuple[Tensor, Tensor]:
    """Snelson's 200 points, or some like them, without those in the gap."""
    folder = Path(os.environ.get("DNN2GP_DATA", "")) / "snelson"
    if "DNN2GP_DATA" in os.environ and folder.is_dir():
        x, y = (torch.from_numpy(np.loadtxt(folder / f"train_{what}.txt")) for what in ("inputs", "outputs"))
    else:
        generator = torch.Generator().manual_seed(0)
        x = 6 * torch.rand(200, generator=generator, dtype=torch.float64)
        noise = SIGMA * torch.randn(200, generator=generator, dtype=torch.float64)
        y = torch.sin(2.3 * x + 0.6) * (1 - 0.1 * x) - 0.4 + noise
    kept = (x < GAP[0]) | (x > GAP[1])
    return x[kept][:, None], y[kept][:, None]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 32), nn.Sigmoid(), nn.Linear(32, 1)).double()


class RBF(gpytorch.models.ExactGP):
    """A GP with an RBF kernel, its hyperparameters by the marginal likelihood."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())
        self.double().train()
        optimizer, mll = torch.optim.Adam(self.parameters(), lr=0.1), ExactMarginalLogLikelihood(self.likelihood, self)
        for _ in range(150):
            optimizer.zero_grad()
            (-mll(self(x), y)).backward()
            optimizer.step()
        self.eval()

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def predictions(x: Tensor, y: Tensor, grid: Tensor, steps: int) -> dict[str, Prediction]:
    loss = losses.Gaussian(SIGMA)
    laplace_net = net()
    training.fit(laplace_net, x, y, loss, DELTA, max_iterations=2 * steps, progress=False)
    laplace = LaplaceGP(laplace_net, x, y, loss, DELTA)
    laplace_diagonal = LaplaceGP(laplace_net, x, y, loss, DELTA, structure="diagonal")

    rates = {"lr": 0.02, "beta": 0.02, "mc_samples": 4, "initial_precision": 1e4}  # narrow at first, to stay there
    opt = optim.VOGN(copy.deepcopy(laplace_net), loss, train_size=len(x), prior_precision=DELTA, **rates)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    training.train(opt, x, y, epochs=steps, scheduler=scheduler, progress=False)
    variational = VariationalGP(opt.net, opt.iterate(), x, y, loss, converged=True, at="mean")
    variational_diagonal = VariationalGP(opt.net, opt.gaussian(), x, y, loss)

    draws = {"num_samples": 1000, "progress": False}
    rbf = RBF(x, y[:, 0])
    with torch.no_grad():
        f, noise = rbf(grid), rbf.likelihood.noise.expand(len(grid), 1)
        of_rbf = Prediction(f.mean[:, None], noise, f.variance[:, None], f, rbf.likelihood(f), None)
    return {
        "GP of the net, Laplace": laplace.predict(grid),
        "GP of the net, VI": variational.predict(grid),
        "net itself, Laplace": sampling_predictive(laplace_diagonal, grid, **draws),
        "net itself, VI": sampling_predictive(variational_diagonal, grid, **draws),
        "GP with RBF kernel": of_rbf,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder of the picture")
    parser.add_argument("--steps", type=int, default=1000, help="of VOGN, and half of L-BFGS's (default 1000)")
    arguments = parser.parse_args()
    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    x, y = data()
    grid = torch.linspace(-2, 8, 301, dtype=torch.float64)[:, None]
    inside = (grid[:, 0] > GAP[0]) & (grid[:, 0] < GAP[1])
    figure, axes = plt.subplots(1, 5, figsize=(22, 4.2), sharey=True, layout="constrained")
    print(f"{len(x)} points; standard deviation of f:{'in the gap':>26s} {'at the data':>14s}")
    for place, (name, prediction) in zip(axes, predictions(x, y, grid, arguments.steps).items(), strict=True):
        deviation = prediction.epistemic[:, 0].sqrt()
        at_data = (grid[:, 0] > float(x.min())) & (grid[:, 0] < float(x.max())) & ~inside
        print(f"  {name:36s} {float(deviation[inside].mean()):20.3f} {float(deviation[at_data].mean()):14.3f}")
        plotting.plot_regression_1d(prediction, grid, x, y, ax=place)
        place.axvspan(*GAP, color="0.5", alpha=0.12)
        place.set(title=name, ylim=(-4, 3))
    figure.savefig(folder / "gap.png", dpi=110)
    print(f"{folder / 'gap.png'} shows them.")


if __name__ == "__main__":
    main()
