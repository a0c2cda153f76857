"""Which approximation when: the same nets by seven approximations, likelihood against time and memory, as a picture.

    python examples/benchmarks/approximations.py --data FOLDER
    python examples/benchmarks/approximations.py --report      the tables, and the picture in docs/images

A regression, concrete (8-50-50-1 tanh, P = 3,051; without a folder scikit-learn's diabetes), and a classification,
scikit-learn's digits (64-50-50-10 tanh, P = 6,310; 1,000 images to train, 297 held out, 500 to test). Three seeds of
splits and initial weights, with --full ten. Float64, one thread; each in a process of its own.

    full          the GP of all weights                      last layer   of the output layer's weights
    subset        of the last two layers' weights            diagonal     all weights, diagonal covariance
    fisher        empirical Fisher, `features="gradient"`    ivon         a Gaussian trained by IVON (ivon-opt)
    swag          20 iterates of Adam around the trained net

The nets of the first five are trained once, by L-BFGS with delta = 1 (sigma = 0.3). Then delta and sigma are chosen: by
the evidence for the regression, delta on held-out digits for the classification (Monte Carlo probabilities). IVON and
SWAG choose nothing: their spread comes from training, whose time is counted (for SWAG, what follows the net's own);
sigma is that of their residuals. Seconds are processor time of all that follows training; memory the peak above what
the process held before. "net" is the trained net alone, with the sigma of its residuals.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import tables
import torch
from machine import PeakMemory
from tables import Cost, Split, Table
from torch import Tensor, nn
from torch.distributions import Categorical as Classes
from torch.distributions import Distribution, Independent, Normal

from gpytorch_dnn2gp import LaplaceGP, VariationalGP, fit_evidence, metrics, training, weights
from gpytorch_dnn2gp.losses import Categorical, Gaussian, Loss

METHODS = ("net", "full", "subset", "last layer", "diagonal", "fisher", "ivon", "swag")
OPTIONS = {
    "full": {},
    "subset": {"params": ["2", "4"]},
    "last layer": {"params": "last_layer"},
    "diagonal": {"structure": "diagonal"},
    "fisher": {"features": "gradient"},
}
KEY, COLUMNS = ("set", "split", "method"), ("nll", "cpu_seconds", "seconds", "megabytes")
DELTAS = torch.logspace(-1, 4, 11, dtype=torch.float64).tolist()
SIGMA = 0.3
EVALUATIONS = 2000  # of the loss and its gradient at most, of L-BFGS
EPOCHS = {"ivon": 400, "swag": 100}


def data(folder: Path | None, name: str, seed: int) -> tuple[Split, tuple[Tensor, Tensor] | None, Loss, int]:
    """Split, held-out data or None, loss and number of outputs."""
    if name != "digits":
        return tables.uci(folder, name, seed), None, Gaussian(SIGMA), 1
    from sklearn.datasets import load_digits

    x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    order = torch.as_tensor(np.random.default_rng(seed).permutation(len(x)))
    train, held_out, test = order.split([1000, 297, 500])
    x = (x - x[train].mean()) / x[train].std()
    return Split(x[train], y[train], x[test], y[test]), (x[held_out], y[held_out]), Categorical(), 10


def net(split: Split, outputs: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    hidden = nn.Linear(split.x.shape[1], 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh()
    return nn.Sequential(*hidden, nn.Linear(50, outputs)).double()


def at_residuals(model: nn.Module, split: Split, loss: Loss) -> Loss:
    """The loss with the sigma of the net's residuals."""
    with torch.no_grad():
        return Gaussian((model(split.x) - split.y).square().mean().sqrt().item()) if loss.has_noise else loss


@torch.no_grad()
def alone(model: nn.Module, split: Split, loss: Loss) -> Distribution:
    f = model(split.test_x)
    return Independent(Normal(f, loss.noise.sqrt()), 1) if loss.has_noise else Classes(logits=f)


def laplace(method: str, model: nn.Module, split: Split, held_out, loss: Loss) -> Distribution:
    gp = LaplaceGP(model, split.x, split.y, loss, 1.0, **OPTIONS[method], progress=False)
    if held_out is None:
        fit_evidence(gp, warn=False, progress=False)
        return predicted(gp, split.test_x)
    losses = []
    for delta in DELTAS:
        gp.prior_precision = delta
        losses.append(float(metrics.negative_log_likelihood(predicted(gp, held_out[0]), held_out[1])))
    gp.prior_precision = DELTAS[int(np.argmin(losses))]
    return predicted(gp, split.test_x)


@torch.no_grad()
def predicted(gp, x: Tensor) -> Distribution:
    if gp.loss.has_noise:
        return gp.predict(x).y
    return gp.predict(x, approximation="mc", num_samples=200, generator=torch.Generator().manual_seed(0)).y


def batches(split: Split, epochs: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(len(split.x), generator=generator).split(64)


def mean_loss(f: Tensor, y: Tensor, loss: Loss) -> Tensor:
    return loss.negative_log_likelihood(f, y).mean()


def ivon(split: Split, outputs: int, seed: int, loss: Loss) -> Distribution:
    """IVON with prior precision 1, as the others begin with; learning rate decayed to zero by a cosine."""
    from ivon import IVON

    model, n, epochs = net(split, outputs, seed), len(split.x), EPOCHS["ivon"]
    optimizer = IVON(model.parameters(), lr=0.05, ess=n, weight_decay=1 / n, hess_init=0.5, beta2=0.999)
    steps = epochs * -(-n // 64)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for batch in batches(split, epochs, seed):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            mean_loss(model(split.x[batch]), split.y[batch], loss).backward()
        optimizer.step()
        scheduler.step()
    posterior = weights.from_ivon(optimizer, model)
    return predicted(VariationalGP(model, posterior, split.x, split.y, at_residuals(model, split, loss)), split.test_x)


def swag(model: nn.Module, split: Split, seed: int, loss: Loss) -> Distribution:
    """Adam at a constant learning rate from the trained net on; the weights of each fifth epoch are collected."""
    collector, n, epochs = weights.SWAG(model, rank=20), len(split.x), EPOCHS["swag"]
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=1 / n)
    per_epoch = -(-n // 64)
    for step, batch in enumerate(batches(split, epochs, seed), 1):
        optimizer.zero_grad()
        mean_loss(model(split.x[batch]), split.y[batch], loss).backward()
        optimizer.step()
        if step % (5 * per_epoch) == 0:
            collector.collect()
    posterior = collector.gaussian()
    gp = VariationalGP(model, posterior, split.x, split.y, loss)
    if loss.has_noise:
        with torch.no_grad():
            gp.noise = (gp.linearization(split.x) - split.y).square().mean()
    return predicted(gp, split.test_x)


def work(folder: Path | None, threads: int, job: dict) -> dict[str, float]:
    """One method on one split."""
    torch.set_num_threads(threads)
    split, held_out, loss, outputs = data(folder, job["set"], job["split"])
    seed, method = job["split"], job["method"]
    model = net(split, outputs, seed)
    if method != "ivon":
        training.fit(model, split.x, split.y, loss, 1.0, max_iterations=EVALUATIONS, progress=False)
    memory = PeakMemory()
    with Cost() as cost:
        if method == "net":
            y = alone(model, split, at_residuals(model, split, loss))
        elif method == "ivon":
            y = ivon(split, outputs, seed, loss)
        elif method == "swag":
            y = swag(model, split, seed, loss)
        else:
            y = laplace(method, model, split, held_out, at_residuals(model, split, loss))
    nll = float(metrics.negative_log_likelihood(y, split.test_y)) + float(np.log(split.scale))
    used = memory.above_baseline() / 1e6
    return {"nll": nll, "cpu_seconds": cost.cpu_seconds, "seconds": cost.seconds, "megabytes": used}


# ---- telling


def report(table: Table, image: Path) -> None:
    sets = list(dict.fromkeys(row["set"] for row in table.rows))
    for name in sets:
        rows = []
        for method in METHODS:
            of = {column: table.values(column, set=name, method=method) for column in COLUMNS}
            if len(of["nll"]):
                shown = tables.shown(of["nll"]), tables.shown(of["cpu_seconds"], 2), tables.shown(of["megabytes"], 0)
                rows.append([method, str(len(of["nll"])), *shown])
        print(f"\n{name}\n" + tables.markdown(["", "seeds", "NLL", "CPU s", "MB"], rows))
    if sets:
        draw(table, sets, image)
        print(f"\npicture: {image}")


def draw(table: Table, sets: list[str], image: Path) -> None:
    """NLL against time, the area of a marker as its memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = plt.subplots(1, len(sets), figsize=(5 * len(sets) + 1.2, 4.2), layout="constrained", squeeze=False)
    for ax, name in zip(axes[0], sets):
        for i, method in enumerate(METHODS):
            of = {column: table.values(column, set=name, method=method) for column in COLUMNS}
            if not len(of["nll"]):
                continue
            mean, error = tables.mean_and_error(of["nll"])
            if method == "net":
                ax.axhline(mean, color="gray", linestyle="--", linewidth=1, label="net alone")
                continue
            time, memory = of["cpu_seconds"].mean(), of["megabytes"].mean()
            ax.errorbar(time, mean, error, color=f"C{i}", linewidth=1)
            ax.scatter(time, mean, 20 + 0.5 * memory, color=f"C{i}", alpha=0.6)
            ax.plot([], [], "o", color=f"C{i}", alpha=0.6, label=method)
        ax.set(xscale="log", title=name, xlabel="processor time after training, s", ylabel="NLL of test labels")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.margins(0.1)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    figure.suptitle("Area of a circle: peak memory; lower and further left is better", fontsize=10)
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=100)
    plt.close(figure)


def main() -> None:
    options = tables.parser(__doc__.splitlines()[0])
    options.add_argument("--splits", type=int, help="seeds (default 3, with --full 10)")
    options.add_argument("--image", type=Path, default=tables.HERE.parent.parent / "docs/images/approximations.png")
    arguments = options.parse_args()
    table = Table(arguments.results / "approximations.csv", KEY, COLUMNS)
    if not arguments.report:
        tables.head(arguments, None)
        wanted = [m for m in METHODS if m in (arguments.methods or METHODS)]
        methods = [m for m in wanted if m != "ivon" or tables.installed("ivon")]
        names = arguments.sets or ("concrete" if arguments.data else "diabetes", "digits")
        jobs = [
            {"set": name, "split": number, "method": method}
            for number in range(arguments.splits or (10 if arguments.full else 3))
            for name in names
            for method in methods
        ]

        def alone_in_its_process(job: dict) -> dict[str, float]:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                return pool.submit(work, arguments.data, arguments.threads, job).result()

        table.run(jobs, alone_in_its_process, lambda job: 60.0 if job["set"] == "digits" else 25.0)
    report(table, arguments.image)


if __name__ == "__main__":
    main()
