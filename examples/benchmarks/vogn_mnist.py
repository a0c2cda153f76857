"""VOGN on MNIST: what a step costs, how well LeNet-5 learns, and what its GP says of digits it has never seen.

    DNN2GP_DATA=... python examples/benchmarks/vogn_mnist.py [cost] [binary] [full] [--threads 2]

cost     one step of VOGN (exact diagonal; squared gradients) beside one of Adam and, if installed, IVON, batch 128
binary   digits 0 and 1: test accuracy, and the AUROC of epistemic uncertainty for the other eight digits
full     all ten digits: test accuracy

The folder holds MNIST as its authors distribute it (CONTRIBUTING.md). Without one only the cost is measured.
"""

from __future__ import annotations

import argparse
import gzip
import os
import time
from pathlib import Path

import numpy as np
import torch
from machine import describe
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from gpytorch_dnn2gp import VariationalGP, losses, optim, sampling_predictive, training

BATCH = 128


def lenet(num_classes: int) -> nn.Sequential:
    """The paper's LeNet-5."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, num_classes)),
    )


def mnist(split: str) -> tuple[Tensor, Tensor]:
    """Images ``(n, 1, 28, 28)`` in [0, 1], and digits."""

    def read(name: str, offset: int) -> np.ndarray:
        with gzip.open(Path(os.environ["DNN2GP_DATA"]) / "mnist" / f"{split}-{name}-ubyte.gz") as file:
            return np.frombuffer(file.read(), np.uint8, offset=offset).copy()

    images = torch.from_numpy(read("images-idx3", 16)).reshape(-1, 1, 28, 28).float() / 255
    return images, torch.from_numpy(read("labels-idx1", 8)).long()


# ---- cost


def cost(repeats: int = 30) -> None:
    """Steps of all optimizers in turn, so that what else runs on the machine meets all of them."""
    x, y = torch.rand(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))
    steps = {}

    net = lenet(10)
    adam = torch.optim.Adam(net.parameters())

    def adam_step() -> None:
        adam.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        adam.step()

    steps["Adam"] = adam_step
    options = {"train_size": 60_000, "prior_precision": 60.0, "lr": 1e-3, "beta": 1e-2}
    exact = optim.VOGN(lenet(10), losses.Categorical(), **options)
    squared = optim.VOGN(lenet(10), losses.Categorical(), features="gradient", **options)
    steps["VOGN, exact diagonal (K = 10)"] = lambda: exact.step(x, y)
    steps["VOGN, squared gradients"] = lambda: squared.step(x, y)
    try:
        from ivon import IVON

        other = lenet(10)
        ivon = IVON(other.parameters(), lr=0.1, ess=60_000)

        def ivon_step() -> None:
            with ivon.sampled_params(train=True):
                ivon.zero_grad()
                nn.functional.cross_entropy(other(x), y).backward()
            ivon.step()

        steps["IVON"] = ivon_step
    except ImportError:
        print("IVON is not installed (ivon-opt): left out")

    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(repeats + 3):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if round_ >= 3:
                times[name].append(time.perf_counter() - start)
    print(f"one step, LeNet-5, batch {BATCH}, float32: median (fastest) of {repeats}, ratio of medians to Adam's")
    for name, seconds in times.items():
        median = float(np.median(seconds))
        ratio = median / float(np.median(times["Adam"]))
        print(f"  {name:32s} {1e3 * median:7.1f} ms ({1e3 * min(seconds):.1f})   {ratio:5.2f}")


# ---- accuracy


def trained(x: Tensor, y: Tensor, num_classes: int, epochs: int, seed: int, **options) -> optim.VOGN:
    """LeNet-5 by VOGN with momentum, its learning rate decayed to zero by a cosine."""
    torch.manual_seed(seed)
    opt = optim.VOGN(lenet(num_classes), losses.Categorical(), train_size=len(x), momentum=0.9, **options)
    num_steps = epochs * -(-len(x) // BATCH)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, num_steps)
    start = time.perf_counter()
    training.train(opt, x, y, epochs, BATCH, scheduler)
    print(f"  {num_steps} steps in {time.perf_counter() - start:.0f} s")
    return opt


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> tuple[int, float, float]:
    f = torch.cat([net(part) for part in x.split(1000)])
    wrong = int((f.argmax(-1) != y).sum())
    return wrong, 1 - wrong / len(y), float(nn.functional.cross_entropy(f, y))


def binary(seed: int) -> None:
    (x, y), (x_test, y_test) = mnist("train"), mnist("t10k")
    known = y < 2
    print(f"digits 0 and 1, {int(known.sum())} images")
    opt = trained(x[known], y[known], 2, 8, seed, lr=0.02, beta=0.01, prior_precision=10.0)
    inside = y_test < 2
    wrong, right, nll = accuracy(opt.net, x_test[inside], y_test[inside])
    print(f"  test accuracy {right:.2%} ({wrong} of {int(inside.sum())} wrong), NLL {nll:.4f}")

    # as many of the eight other digits
    outside = torch.nonzero(~inside)[: int(inside.sum()), 0]
    images = torch.cat([x_test[inside], x_test[outside]])
    is_new = [0] * int(inside.sum()) + [1] * len(outside)
    gp = VariationalGP(opt.net, opt.gaussian(), x[known][:100], y[known][:100], losses.Categorical())
    scores: dict[str, list[Tensor]] = {}
    for part in images.split(500):
        p = gp.predict(part, approximation="mc", generator=torch.Generator().manual_seed(0))
        drawn = sampling_predictive(gp, part, num_samples=100, generator=torch.Generator().manual_seed(0))
        cov = p.f.covariance_matrix
        margin = cov[:, 0, 0] + cov[:, 1, 1] - 2 * cov[:, 0, 1]
        of_part = {
            "GP: epistemic variance of the label (Monte Carlo)": p.epistemic.sum(-1),
            "GP: variance of f_1 - f_0": margin,
            "GP: total variance of the label": p.variance.sum(-1),
            "draws in the net: epistemic variance of the label": drawn.epistemic.sum(-1),
        }
        for name, values in of_part.items():
            scores.setdefault(name, []).append(values.detach())
    print(f"  {len(outside)} other digits against {int(inside.sum())} of 0 and 1")
    for name, values in scores.items():
        values = torch.cat(values)
        new, old = values[len(values) - len(outside) :], values[: int(inside.sum())]
        area = roc_auc_score(is_new, values.numpy())
        print(f"    {name:52s} AUROC {area:.3f}   medians {float(new.median()):.3g} and {float(old.median()):.3g}")


def full(seed: int) -> None:
    (x, y), (x_test, y_test) = mnist("train"), mnist("t10k")
    print(f"all ten digits, {len(x)} images")
    opt = trained(x, y, 10, 5, seed, lr=0.03, beta=0.01, prior_precision=60.0)
    wrong, right, nll = accuracy(opt.net, x_test, y_test)
    print(f"  test accuracy {right:.2%} ({wrong} of {len(y_test)} wrong), NLL {nll:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=["cost", "binary", "full"], choices=["cost", "binary", "full"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(describe("ivon-opt"))
    if "cost" in arguments.what:
        cost()
    if "DNN2GP_DATA" not in os.environ:
        print("DNN2GP_DATA names no folder with MNIST: accuracy is not measured")
    else:
        if "binary" in arguments.what:
            binary(arguments.seed)
        if "full" in arguments.what:
            full(arguments.seed)
