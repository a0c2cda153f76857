"""A net pre-trained on related tasks is a kernel for Bayesian optimisation: its Jacobians, in BoTorch's SingleTaskGP.

    python examples/transfer.py                     or with --evaluations 20 --seeds 10

Tasks are Branin functions, shifted and stretched. A net with an output for each of eight of them is trained on 100
points each: what it learns is what they share. Linearized in the weights of a new output, it is the kernel of a GP on a
ninth task, of which there are six points. It is compared with BoTorch's own kernel: error of the prediction, and the
best value after some evaluations chosen by expected improvement. ``fit_gpytorch_mll`` chooses its prior precision as it
chooses lengthscales.
"""

from __future__ import annotations

import argparse
import copy
import math

import torch
from botorch.acquisition.analytic import LogExpectedImprovement
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.optim import optimize_acqf
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import Tensor, nn
from torch.quasirandom import SobolEngine

from gpytorch_dnn2gp import JacobianKernel, losses, training
from gpytorch_dnn2gp.bayesopt import smooth_mlp

UNIT = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)


def task(seed: int):
    """A function of the unit square: Branin, shifted by up to a tenth and stretched by up to a fifth."""
    generator = torch.Generator().manual_seed(seed)
    shift = 0.2 * torch.rand(2, generator=generator, dtype=torch.float64) - 0.1
    stretch = 0.8 + 0.4 * torch.rand(2, generator=generator, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        z = 0.5 + stretch * (x - 0.5) + shift
        a, b = 15 * z[:, :1] - 5, 15 * z[:, 1:]
        valley = b - 5.1 / (4 * math.pi**2) * a.square() + 5 / math.pi * a - 6
        return -(valley.square() + 10 * (1 - 1 / (8 * math.pi)) * a.cos() + 10) / 50

    return function


def pretrained(num_tasks: int, num_points: int) -> nn.Sequential:
    """A net trained on all tasks but the one with seed 0, an output for each."""
    x = SobolEngine(2, scramble=True, seed=0).draw(num_points).double()
    y = torch.cat([task(1 + t)(x) for t in range(num_tasks)], 1)
    torch.manual_seed(0)
    net = smooth_mlp(2, num_tasks, widths=(40, 40)).double()
    training.fit(net, x, y - y.mean(0), losses.Gaussian(0.05), 1.0, max_iterations=600, progress=False)
    return net


def kernel_of(net: nn.Sequential) -> JacobianKernel:
    """The net with one output in place of many, linearized in its weights: the Jacobian is the last hidden layer."""
    net = copy.deepcopy(net)
    net[-1] = nn.Linear(net[-1].in_features, 1).to(net[-1].weight)
    return JacobianKernel(net, params="last_layer")


def fitted(x: Tensor, y: Tensor, kernel: JacobianKernel | None) -> SingleTaskGP:
    model = SingleTaskGP(x, y, covar_module=copy.deepcopy(kernel))
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return model


def compare(kernel: JacobianKernel | None, evaluations: int, seed: int) -> tuple[float, float]:
    """Root mean squared error with six points, in standard deviations, and the best value found in the end."""
    function = task(0)
    test = torch.rand(500, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = SobolEngine(2, scramble=True, seed=seed).draw(6).double()
    y, truth = function(x), function(test)
    error = (fitted(x, y, kernel).posterior(test).mean - truth).detach()
    for _ in range(evaluations):
        acquisition = LogExpectedImprovement(fitted(x, y, kernel), y.max())
        candidate, _ = optimize_acqf(acquisition, bounds=UNIT, q=1, num_restarts=4, raw_samples=64)
        x, y = torch.cat([x, candidate]), torch.cat([y, function(candidate)])
    return float(error.square().mean().sqrt() / truth.std()), float(y.max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=5, help="of the new task, after the first six")
    parser.add_argument("--seeds", type=int, default=3, help="of the first six points")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--points", type=int, default=100, help="of each task to train on")
    arguments = parser.parse_args()

    kernel = kernel_of(pretrained(arguments.tasks, arguments.points))
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, 201, dtype=torch.float64)] * 2)
    print(f"the new task's maximum: {float(task(0)(grid).max()):.3f}\n")
    print(f"{'kernel':<24}{'RMSE of 6 points':>18}{f'best of {6 + arguments.evaluations}':>14}")
    for name, each in (("of the pre-trained net", kernel), ("BoTorch's own", None)):
        torch.manual_seed(0)
        rows = torch.tensor([compare(each, arguments.evaluations, seed) for seed in range(arguments.seeds)])
        print(f"{name:<24}{rows[:, 0].mean():>18.3f}{rows[:, 1].mean():>14.3f}")


if __name__ == "__main__":
    main()
