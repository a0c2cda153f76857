"""Two trained nets become Gaussian processes: diabetes, a regression, and digits, a classification.

    make demo                                    or: python examples/quickstart.py
    python examples/quickstart.py --seed 1       other splits, other initial weights
    python examples/quickstart.py --output DIR   where the pictures go; examples/output by default

Each net is trained as anyone would. Then, without touching it, the Gaussian process that it already is says what the
net does not know. A table compares the two on data that neither has seen; two pictures show them.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_diabetes, load_digits
from sklearn.metrics import accuracy_score, root_mean_squared_error
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal
from tqdm import tqdm

from gpytorch_dnn2gp import LaplaceGP, fit_evidence, metrics, plotting

matplotlib.use("Agg")  # pictures go to files
import matplotlib.pyplot as plt  # noqa: E402

COLUMNS = ("delta", "sigma", "NLL", "RMSE", "accuracy", "ECE", "coverage")
NET = "net alone"


@dataclass
class Problem:
    """Data of one problem, and the scores of all that predicts them."""

    title: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    gp: LaplaceGP | None = None
    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    costs: list[tuple[float, float]] = field(default_factory=list)

    @torch.no_grad()
    def score(self, name: str, y: Distribution, **hyperparameters: float) -> None:
        """A row of the table: how well the distributions ``y`` predict the test labels."""
        labels = self.test[1]
        row = {**hyperparameters, "NLL": float(metrics.negative_log_likelihood(y, labels))}
        if isinstance(y, Categorical):
            row["accuracy"] = accuracy_score(labels, y.probs.argmax(-1))
            row["ECE"] = float(metrics.calibration_error(y.probs, labels))
        else:
            row["RMSE"] = root_mean_squared_error(labels, y.mean)
        self.rows[name] = {**row, "coverage": float(metrics.coverage(y, labels, 0.95))}

    @torch.no_grad()
    def score_gp(self, name: str) -> None:
        noise = {} if self.gp.noise is None else {"sigma": self.gp.noise.sqrt().item()}
        self.score(name, self.gp.predict(self.test[0]).y, delta=self.gp.prior_precision.item(), **noise)


def train(net: nn.Module, x: Tensor, y: Tensor, loss: nn.Module, weight_decay: float, lr: float, epochs: int) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, weight_decay=weight_decay)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads of so small a net would only wait for each other
    for _ in tqdm(range(epochs), desc="Training", unit=" epochs", disable=None, leave=False):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            loss(net(x[batch]), y[batch]).backward()
            optimizer.step()
    torch.set_num_threads(num_threads)
    net.eval()


def diabetes() -> Problem:
    """Progression of a disease from ten measurements of each of 442 patients."""
    x, y = (torch.as_tensor(a, dtype=torch.float64) for a in load_diabetes(return_X_y=True))
    trained, tested = torch.randperm(len(x)).split(len(x) // 2)
    x = (x - x[trained].mean(0)) / x[trained].std(0)
    y = ((y - y[trained].mean()) / y[trained].std())[:, None]

    net = nn.Sequential(nn.Linear(10, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1)).double()
    train(net, x[trained], y[trained], nn.MSELoss(), weight_decay=1e-3, lr=1e-3, epochs=200)

    problem = Problem("diabetes", (x[trained], y[trained]), (x[tested], y[tested]))
    with torch.no_grad():
        sigma = (net(x[trained]) - y[trained]).square().mean().sqrt()
        problem.score(NET, Independent(Normal(net(x[tested]), sigma), 1), sigma=float(sigma))

    # The net as a GP: delta from the weight decay, sigma from the residuals; then both by the evidence.
    problem.gp = LaplaceGP.from_training(net, problem.train, nn.MSELoss(), weight_decay=1e-3, sigma=sigma)
    problem.score_gp("GP, delta of the weight decay")
    fit_evidence(problem.gp)
    problem.score_gp("GP, delta and sigma by evidence")
    return problem


def digits() -> Problem:
    """Images of handwritten digits, 8 x 8 pixels."""
    x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    trained, held_out, tested = torch.randperm(len(x)).split([1000, 297, 500])
    x = (x - x[trained].mean()) / x[trained].std()

    net = nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10)).double()
    train(net, x[trained], y[trained], nn.CrossEntropyLoss(), weight_decay=1e-4, lr=5e-3, epochs=150)

    problem = Problem("digits", (x[trained], y[trained]), (x[tested], y[tested]))
    with torch.no_grad():
        problem.score(NET, Categorical(logits=net(x[tested])))

    problem.gp = gp = LaplaceGP.from_training(net, problem.train, nn.CrossEntropyLoss(), weight_decay=1e-4)
    problem.score_gp("GP, delta of the weight decay")
    fit_evidence(gp)
    problem.score_gp("GP, delta by evidence")
    problem.costs = [cost_of_functions(gp, y[trained])]

    # The evidence fails here (the text under the table says why): take the delta that predicts held-out digits best.
    def loss_at(delta: Tensor) -> Tensor:
        gp.prior_precision = delta
        return metrics.negative_log_likelihood(gp.predict(x[held_out]).y, y[held_out])

    grid = torch.logspace(0, 4, 9)
    losses = [loss_at(delta) for delta in tqdm(grid, desc="Held-out digits", disable=None, leave=False)]
    gp.prior_precision = grid[torch.stack(losses).argmin()]
    problem.score_gp("GP, delta by held-out digits")
    problem.costs += [cost_of_functions(gp, y[trained])]
    return problem


@torch.no_grad()
def cost_of_functions(gp: LaplaceGP, labels: Tensor) -> tuple[float, float]:
    """What functions drawn from the GP cost on the training data above the net, in nats per example: as the Gaussian
    counts, and in truth. A Laplace approximation knows of the loss only its curvature, so it counts tr(Lambda C)/2."""
    loss, f = gp.loss, gp.predict(gp.train_inputs[0]).f
    counted = 0.5 * (loss.noise_precision(f.mean) * f.covariance_matrix).sum((-2, -1)).mean()
    real = loss.negative_log_likelihood(f.rsample(torch.Size([200])), labels).mean()
    return float(counted), float(real - loss.negative_log_likelihood(f.mean, labels).mean())


# ---- telling


def table(problems: list[Problem]) -> str:
    width = max(len(name) for p in problems for name in p.rows) + 2
    lines = [" " * width + "".join(f"{c:>10}" for c in COLUMNS), "-" * (width + 10 * len(COLUMNS))]
    for p in problems:
        n, m = len(p.train[0]), len(p.test[0])
        lines += [f"{p.title}: {n} examples, {m} to test, {p.gp.linearization.num_weights} weights ({p.gp.solver})"]
        for name, row in p.rows.items():
            lines += [f"  {name:<{width - 2}}" + "".join(f"{written(row.get(c), c):>10}" for c in COLUMNS)]
    return "\n".join(lines)


def written(value: float | None, column: str) -> str:
    form = {"delta": ".3g", "accuracy": ".1%", "coverage": ".1%"}.get(column, ".3f")
    return "-" if value is None else format(value, form)


def verdicts(p: Problem) -> str:
    """Each GP against its net, in words; and the reason, where the GP does worse."""
    net, lines = p.rows[NET], []
    for name, row in p.rows.items():
        if name != NET:
            likelihood = "no worse" if row["NLL"] <= net["NLL"] else "WORSE"
            nearer = abs(row["coverage"] - 0.95) <= abs(net["coverage"] - 0.95)
            coverage = "nearer" if nearer else "FARTHER from"
            lines += [f"{p.title + ', ' + name:<42} NLL {likelihood}, coverage {coverage} 95 % than the net's"]
    if p.costs and any("WORSE" in line for line in lines):
        (counted, real), (counted_later, real_later) = p.costs
        lines += [
            "",
            "Why the evidence fails on clean classes: the net is sure of nearly all its labels, and right. There a",
            "softmax has no curvature, p (1 - p) = 0, and curvature is all that a Laplace approximation sees of the",
            "loss: it takes for likely what the data rule out. Functions drawn from the GP cost, per training digit,",
            f"{real:.2f} nats more than the net, where the approximation counts on {counted:.2f}. So wide a Gaussian",
            "makes the probabilities far too cautious. Digits that the net has not seen choose a larger delta, at",
            f"which it is sound: {real_later:.4f} nats in truth, {counted_later:.4f} counted.",
        ]
    return "\n".join(lines)


# ---- showing


def draw_predictions(diabetes: Problem, digits: Problem, path: Path) -> Path:
    """Both GPs on test data: intervals of sixty patients; the six digits most in doubt, and two others."""
    figure = plt.figure(figsize=(13, 5.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.15])

    x, y = (part[:60] for part in diabetes.test)
    ax = plotting.plot_predictions(diabetes.gp.predict(x), y, ax=left.subplots())
    ax.set(title="Diabetes: 60 test patients", ylabel="progression of the disease, standardised")
    ax.legend(loc="upper left", fontsize=9)

    x, y = digits.test
    doubt = digits.gp.predict(x).probs.max(-1).values.argsort()
    chosen = torch.cat([doubt[:6], doubt[[len(x) // 2, -1]]])
    p = digits.gp.predict(x[chosen], approximation="mc", generator=torch.Generator().manual_seed(0))
    grid = right.add_gridspec(3, len(chosen), height_ratios=[1, 2.4, 1.4])
    bars = [right.add_subplot(grid[1, i]) for i in range(len(chosen))]
    plotting.plot_probabilities(p, y[chosen], axes=bars)
    for i, ax in enumerate(bars):
        image = right.add_subplot(grid[0, i])
        image.imshow(x[chosen[i]].reshape(8, 8), cmap="gray_r")
        image.set_axis_off()
        ax.set_xticks([0, 1])
        ax.tick_params(labelleft=i == 0)
    bars[0].set_ylabel("digit")
    split = plotting.plot_variance_split(p, names=[""] * len(chosen), ax=right.add_subplot(grid[2, :]))
    split.legend(loc="upper right", fontsize=9)
    right.suptitle(
        "Digits: the six test images most in doubt, and two others\n"
        "bars: class probabilities, black the observed class; lines: their epistemic standard deviations",
        fontsize=10,
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def draw_kernel(digits: Problem, path: Path) -> Path:
    """What the net takes for similar: its kernel on 200 training digits, traced over the ten outputs."""
    x, y = (part[:200] for part in digits.train)
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    kernel = digits.gp.covar_module
    plotting.plot_kernel(kernel, y, x, ax=axes[0]).set_title("kernel, traced over outputs")
    plotting.plot_kernel(kernel, y, x, normalize=True, ax=axes[1]).set_title("as correlation")
    for ax in axes:
        ax.set(xlabel="digit", ylabel="digit")
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    problems, begin = [], time.perf_counter()
    for make in (diabetes, digits):
        start = time.perf_counter()
        torch.manual_seed(options.seed)
        problems.append(make())
        print(f"{problems[-1].title}: trained, made a GP and tuned in {time.perf_counter() - start:.1f} s")
    print("", table(problems), "", *map(verdicts, problems), "", sep="\n")
    print("Pictures:", draw_predictions(*problems, options.output / "predictions.png"))
    print("         ", draw_kernel(problems[1], options.output / "kernel.png"))
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
