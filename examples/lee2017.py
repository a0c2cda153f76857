"""Deep neural networks as Gaussian processes, Lee et al. (2017): their Table 1 and Figure 2, and the evidence instead.

    python examples/lee2017.py --data FOLDER              MNIST and CIFAR-10, ReLU and tanh, 1k and 10k training points
    python examples/lee2017.py                            the same on scikit-learn's digits, which need no folder

1. Table 1: one-hot regression with an infinitely wide fully connected net at the table's best depth, sigma_w^2 and
   sigma_b^2: our test accuracy beside theirs.
2. Figure 2: predicted variance against realised squared error, each point a mean over 100 test points, with the rank
   correlation (depth 3, sigma_w^2 = 2, sigma_b^2 = 0.2).
3. Evidence: what they left to future work. Depth, sigma_w^2 and sigma_b^2 by marginal likelihood on the 1,000 training
   points, without a validation set: test accuracy beside the table's.

Every finished row is kept in OUTPUT/lee2017.json: a run that was stopped goes on where it was.

FOLDER holds mnist/train-images-idx3-ubyte.gz and the three files that belong to it, and cifar10/*.npz with train_x,
train_y, test_x, test_y (n, 32, 32, 3). Their 50k and 45k rows: --sizes 50000 45000, where the files hold as many.
"""

import argparse
import gzip
import json
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.stats import spearmanr

from gpytorch_dnn2gp import infinite, tiling

# (data, n, activation): depth, sigma_w^2, sigma_b^2, their accuracy
TABLE_1 = {
    ("mnist", 1000, "relu"): (20, 1.45, 0.28, 0.9279),
    ("mnist", 1000, "tanh"): (20, 1.96, 0.62, 0.9266),
    ("mnist", 10000, "relu"): (7, 0.61, 0.07, 0.9765),
    ("mnist", 10000, "tanh"): (2, 1.62, 0.28, 0.9773),
    ("mnist", 50000, "relu"): (1, 0.10, 0.48, 0.9875),
    ("mnist", 50000, "tanh"): (1, 1.28, 0.00, 0.9879),
    ("cifar10", 1000, "relu"): (7, 1.28, 0.00, 0.3608),
    ("cifar10", 1000, "tanh"): (50, 2.97, 0.97, 0.3702),
    ("cifar10", 10000, "relu"): (5, 2.97, 0.28, 0.4780),
    ("cifar10", 10000, "tanh"): (7, 3.48, 2.00, 0.4766),
    ("cifar10", 45000, "relu"): (3, 3.31, 1.86, 0.5566),
    ("cifar10", 45000, "tanh"): (3, 3.48, 1.52, 0.5558),
    ("digits", 1000, "relu"): (3, 2.00, 0.20, None),
    ("digits", 1000, "tanh"): (3, 2.00, 0.20, None),
}
DEPTHS = (1, 3, 7, 20)  # among which the evidence chooses


def load(name: str, folder: Path | None) -> tuple[torch.Tensor, ...]:
    """Training and test inputs, each standardised over its own features as theirs are, and classes."""
    if name == "digits":
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(x))
        parts = x[order[:1200]], y[order[:1200]], x[order[1200:]], y[order[1200:]]
    elif name == "mnist":

        def read(file: str, offset: int) -> np.ndarray:
            return np.frombuffer(gzip.open(folder / "mnist" / f"{file}-ubyte.gz").read(), np.uint8, offset=offset)

        parts = []
        for kind in ("train", "t10k"):
            parts += [read(f"{kind}-images-idx3", 16).reshape(-1, 784), read(f"{kind}-labels-idx1", 8)]
    else:
        arrays = {key: [] for key in ("train_x", "train_y", "test_x", "test_y")}
        for path in sorted((folder / "cifar10").glob("*.npz")):
            with np.load(path) as archive:
                for key in arrays:
                    if key in archive:
                        arrays[key].append(archive[key])
        parts = [np.concatenate(arrays[key]) for key in arrays]
        parts[0], parts[2] = (p.reshape(len(p), -1) for p in (parts[0], parts[2]))

    def standardised(x: np.ndarray) -> torch.Tensor:
        x = torch.as_tensor(np.array(x), dtype=torch.float64)
        return (x - x.mean(1, keepdim=True)) / x.std(1, unbiased=False, keepdim=True)

    classes = [torch.as_tensor(np.array(p), dtype=torch.long) for p in (parts[1], parts[3])]
    return standardised(parts[0]), classes[0], standardised(parts[2]), classes[1]


class Results:
    """Rows that are finished, on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = json.loads(path.read_text()) if path.exists() else {}

    def get(self, key: str, compute) -> dict:
        """The row, computed if it is not there yet."""
        if key not in self.rows:
            start = time.perf_counter()
            self.rows[key] = {**compute(), "seconds": round(time.perf_counter() - start, 1)}
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.rows, indent=1))
            partial.replace(self.path)
        return self.rows[key]


def subset(n: int, number: int, total: int) -> torch.Tensor:
    """The first n of a shuffle, one shuffle for each number."""
    return torch.from_numpy(np.random.default_rng(number).permutation(total)[:n])


def classify(data, rows: torch.Tensor, depth: int, activation: str, weight: float, bias: float) -> dict:
    x, y, x_test, y_test = data
    w, b = (torch.tensor(v, dtype=torch.float64) for v in (weight, bias))
    gp = infinite.OneHotGP(x[rows], y[rows], infinite.fully_connected(depth, activation, w, b), 10, noise=1e-8)
    mean, variance = gp.predict(x_test)
    error = (torch.nn.functional.one_hot(y_test, 10) - 0.1 - mean).square().mean(1)
    accuracy = float((mean.argmax(1) == y_test).double().mean())
    return {"accuracy": accuracy, "error": error.tolist(), "variance": variance.tolist()}


def fit_evidence(data, rows: torch.Tensor, depth: int, activation: str, steps: int) -> dict:
    """sigma_w^2, sigma_b^2 and noise by L-BFGS on the marginal likelihood of the training points."""
    x, y, x_test, y_test = data
    w, b = torch.tensor(1.8, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    gp = infinite.OneHotGP(x[rows], y[rows], infinite.fully_connected(depth, activation, w, b), 10, noise=1e-2)
    optimizer = torch.optim.LBFGS(gp.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = -gp.evidence() / len(rows)
        loss.backward()
        return loss

    optimizer.step(closure)
    gp.eval()
    accuracy = float((gp.predict(x_test)[0].argmax(1) == y_test).double().mean())
    kernel = gp.covar_module
    return {
        "evidence": gp.evidence().item(),
        "weight_variance": kernel.weight_variance.item(),
        "bias_variance": kernel.bias_variance.item(),
        "noise": gp.likelihood.noise.item(),
        "accuracy": accuracy,
    }


def table_1(names, sizes, activations, num_subsets, data, results, show) -> None:
    keys = [key for key in TABLE_1 if key[0] in names and key[1] in sizes and key[2] in activations]
    jobs = [(key, i) for key in keys for i in range(num_subsets if key[1] <= 1000 else 1)]
    for (name, n, activation), i in tiling.progress(jobs, "Table 1", show):
        depth, weight, bias, _ = TABLE_1[name, n, activation]
        total = len(data[name][0])
        if n > total:
            print(f"{name} has {total:,} training points here, fewer than {n:,}: left out")
            continue

        chosen = data[name], subset(n, i, total), depth, activation, weight, bias

        def compute(chosen=chosen) -> dict:
            return {"accuracy": classify(*chosen)["accuracy"]}

        results.get(f"table {name} {n} {activation} {i}", compute)
    print("\nTable 1: test accuracy, one-hot regression at the table's hyperparameters")
    print(
        f"{'data':>8} {'n':>6} {'phi':>5} {'depth':>6} {'s_w^2':>6} {'s_b^2':>6} "
        f"{'ours':>8} {'spread':>7} {'Lee et al.':>10}"
    )
    for key in keys:
        found = [v["accuracy"] for k, v in results.rows.items() if k.startswith("table {} {} {} ".format(*key))]
        if not found:
            continue
        depth, weight, bias, theirs = TABLE_1[key]
        spread = f"{np.std(found, ddof=1):.4f}" if len(found) > 1 else "-"
        head = f"{key[0]:>8} {key[1]:>6} {key[2]:>5} {depth:>6} {weight:>6.2f} {bias:>6.2f}"
        print(f"{head} {np.mean(found):>8.4f} {spread:>7} {theirs if theirs else '-':>10}   ({len(found)} subsets)")


def figure_2(names, size, data, results, folder: Path) -> None:
    figure, axes = plt.subplots(1, len(names), figsize=(4.5 * len(names), 3.6), squeeze=False, layout="constrained")
    print("\nFigure 2: predicted variance and realised squared error, each a mean over 100 test points")
    for ax, name in zip(axes[0], names):
        for activation, color in (("relu", "#0b559f"), ("tanh", "#f3a73b")):
            n = min(size, len(data[name][0]))

            def compute(name=name, n=n, activation=activation) -> dict:
                return classify(data[name], subset(n, 0, len(data[name][0])), 3, activation, 2.0, 0.2)

            row = results.get(f"figure {name} {n} {activation}", compute)
            variance, error = (np.array(row[key]) for key in ("variance", "error"))
            order = np.argsort(variance)
            groups = np.array_split(order, max(1, len(order) // 100))
            points = np.array([(variance[g].mean(), error[g].mean()) for g in groups])
            binned, single = spearmanr(*points.T).statistic, spearmanr(variance, error).statistic
            print(
                f"{name:>8} {activation:>5} n = {n}: rank correlation {binned:.3f} binned, {single:.3f} single points"
            )
            ax.plot(*points.T, ".", color=color, label=f"{activation}: rank correlation {binned:.2f}")
        ax.set(xlabel="predicted variance", ylabel="realised squared error", title=f"{name}, n = {n}")
        ax.legend()
    figure.savefig(folder / "lee2017_figure2.png", dpi=110)
    print(f"drawn: {folder / 'lee2017_figure2.png'}")


def by_evidence(names, activations, depths, num_subsets, steps, data, results, show) -> None:
    n = 1000
    jobs = [(name, a, d, i) for name in names for a in activations for d in depths for i in range(num_subsets)]
    for name, activation, depth, i in tiling.progress(jobs, "Evidence", show):

        def compute(name=name, activation=activation, depth=depth, i=i) -> dict:
            return fit_evidence(data[name], subset(n, i, len(data[name][0])), depth, activation, steps)

        results.get(f"evidence {name} {activation} {depth} {i}", compute)
    print("\nEvidence: depth, sigma_w^2, sigma_b^2 and noise chosen on the 1,000 training points alone")
    print(
        f"{'data':>8} {'phi':>5} {'depth':>12} {'s_w^2':>6} {'s_b^2':>6} {'ours':>8} {'spread':>7} {'Lee et al.':>10}"
    )
    for name in names:
        for activation in activations:
            best = []
            for i in range(num_subsets):
                rows = [(results.rows[f"evidence {name} {activation} {depth} {i}"], depth) for depth in depths]
                best.append(max(rows, key=lambda row: row[0]["evidence"]))
            accuracies = [row["accuracy"] for row, _ in best]
            chosen = ",".join(str(depth) for _, depth in best)
            theirs = TABLE_1[name, n, activation][3]
            spread = f"{np.std(accuracies, ddof=1):.4f}" if len(best) > 1 else "-"
            weight, bias = (np.mean([row[key] for row, _ in best]) for key in ("weight_variance", "bias_variance"))
            head = f"{name:>8} {activation:>5} {chosen:>12} {weight:>6.2f} {bias:>6.2f}"
            print(f"{head} {np.mean(accuracies):>8.4f} {spread:>7} {theirs if theirs else '-':>10}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of MNIST and CIFAR-10; without it scikit-learn's digits")
    parser.add_argument("--sets", nargs="+", choices=["mnist", "cifar10", "digits"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[1000, 10000])
    parser.add_argument("--activations", nargs="+", default=["relu", "tanh"])
    parser.add_argument("--subsets", type=int, default=5, help="at 1,000 points (default 5)")
    parser.add_argument("--figure-size", type=int, default=5000, help="training points of figure 2 (default 5000)")
    parser.add_argument("--depths", nargs="+", type=int, default=DEPTHS, help="among which the evidence chooses")
    parser.add_argument("--steps", type=int, default=25, help="of L-BFGS for each evidence (default 25)")
    parser.add_argument("--parts", nargs="+", default=["table", "figure", "evidence"])
    parser.add_argument("--output", type=Path, default=Path("examples/output"))
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    arguments = parser.parse_args()
    names = arguments.sets or (["mnist", "cifar10"] if arguments.data else ["digits"])
    if arguments.data is None and names != ["digits"]:
        parser.error("MNIST and CIFAR-10 are read from a folder: --data FOLDER")
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.output / "lee2017.json")
    data = {name: load(name, arguments.data) for name in names}
    show = False if arguments.quiet else True
    if "table" in arguments.parts:
        table_1(names, arguments.sizes, arguments.activations, arguments.subsets, data, results, show)
    if "figure" in arguments.parts:
        figure_2(names, arguments.figure_size, data, results, arguments.output)
    if "evidence" in arguments.parts:
        options = (arguments.depths, arguments.subsets, arguments.steps)
        by_evidence(names, arguments.activations, *options, data, results, show)


if __name__ == "__main__":
    main()
