"""Hyperparameters of a net by its evidence, against cross-validation, laplace-torch and a GP: the UCI regressions.

    python examples/benchmarks/uci_evidence.py --data FOLDER --peer-python PYTHON
    python examples/benchmarks/uci_evidence.py --report            the tables of what has been run

The same net for all, 50 tanh units in one hidden layer, float64, the initial weights those of seed = number of the
split; delta (weights) and sigma (noise) are chosen

    post hoc      by the evidence of the net trained at delta = 1, sigma = 0.3 (of standardised labels)
    online        by the evidence while it is trained
    layerwise     online, with one delta for each of its four parameter tensors
    average       the average of two predictive distributions by "online", of other initial weights each: one from
                  delta = 1, sigma = 0.3, the other from delta = 10, sigma = 1
    cv            by 5-fold cross-validation: delta sigma^2 on a grid of 8 values from 1e-5 to 100, all folds and
                  values trained together as stacked nets (training.fit_many), and for each the sigma that predicts
                  best in closed form; predictions with the net's Gaussian process, as for all of the above
    marglik       laplace-torch's marglik_training, Kronecker as by default
    marglik full  the same with the full covariance
    rbf           no net: a GP with an ARD-RBF kernel, by its evidence (L-BFGS; Adam where that fails)

"online" may train on at the end, for as long as its evidence grows, where each net of "cv" has 1,000 evaluations of the
loss: what that costs is in the column of times. "average" is the only one of two nets.

Scores are those of the test part of each split: NLL in the labels' own unit, RMSE, coverage of 95 % intervals. Cost is
processor time of training, choosing and predicting, on one thread. boston, concrete, energy, wine and yacht have 20
splits, kin8nm, naval and power 3 of at most 2,000 training rows; "marglik full" runs with --full. scikit-learn's
diabetes needs no folder.
"""

from __future__ import annotations

import contextlib
import math
import warnings

import gpytorch
import numpy as np
import tables
import torch
from tables import Cost, Split, Table
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from gpytorch_dnn2gp import LaplaceGP, NumericalWarning, average, compare, fit_evidence, metrics, training
from gpytorch_dnn2gp.losses import Gaussian
from gpytorch_dnn2gp.selection import Candidate

SMALL = ("yacht", "bostonHousing", "energy", "concrete", "wine-quality-red")
LARGE = ("kin8nm", "power-plant", "naval-propulsion-plant")
METHODS = ("post hoc", "online", "layerwise", "average", "cv", "marglik", "marglik full", "rbf")
KEY, COLUMNS = ("set", "split", "method"), ("nll", "rmse", "coverage", "cpu_seconds", "seconds", "delta", "sigma")
WIDTH, START, SMOOTH = 50, {"delta": 1.0, "sigma": 0.3}, {"delta": 10.0, "sigma": 1.0}  # initial values
EVALUATIONS = 1000  # of the loss and its gradient at most, for each net trained at given delta and sigma
ONLINE = {"every": 30, "max_iterations": 1000, "evidence_iterations": 8}  # the net is trained on several times
FOLDS, GRID = 5, np.logspace(-5, 2, 8)  # of delta sigma^2
COSTS = {"post hoc": 1, "online": 2, "layerwise": 3, "average": 4, "cv": 18, "marglik": 4, "marglik full": 40}


def net(split: Split, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(split.x.shape[1], WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)).double()


# ---- the methods: each returns the distribution of the test labels, and delta and sigma


def by_evidence(split: Split, seed: int, groups: int | None, start: dict[str, float] = START) -> LaplaceGP:
    """delta and sigma after training (``groups=None``), or while the net is trained, with so many delta."""
    model, loss = net(split, seed), Gaussian(start["sigma"])
    if groups is None:
        options = {"max_iterations": EVALUATIONS, "progress": False}
        training.fit(model, split.x, split.y, loss, start["delta"], **options)
        gp = LaplaceGP(model.eval(), split.x, split.y, loss, start["delta"], progress=False)
        fit_evidence(gp, warn=False, progress=False)
        return gp
    delta = [start["delta"]] * groups
    return training.train_with_evidence(model, split.x, split.y, loss, delta, **ONLINE, progress=False).gp


def by_cross_validation(split: Split, seed: int) -> LaplaceGP:
    """The best of ``GRID`` for delta sigma^2, which alone decides the weights, with its best sigma.

    The GP's variances are sigma^2 times those at sigma = 1, so the sigma that predicts held-out labels best has a
    closed form: the mean of their squared errors in units of these.
    """
    x, y, n = split.x, split.y, len(split.x)
    fold = torch.empty(n, dtype=torch.long)
    fold[torch.randperm(n, generator=torch.Generator().manual_seed(seed))] = torch.arange(n) % FOLDS
    jobs = [(k, value) for k in range(FOLDS) for value in GRID]
    included = torch.stack([fold != k for k, _ in jobs])
    nets, precisions = [net(split, seed) for _ in jobs], torch.tensor([value for _, value in jobs])
    options = {"max_iterations": EVALUATIONS, "progress": False}
    training.fit_many(nets, x, y, Gaussian(1.0), precisions, included=included, **options)
    squares, variances = ({value: [] for value in GRID} for _ in range(2))
    for model, (k, value) in zip(nets, jobs, strict=True):
        train, test = fold != k, fold == k
        p = LaplaceGP(model.eval(), x[train], y[train], Gaussian(1.0), value, progress=False).predict(x[test])
        squares[value].append((y[test] - p.mean).square().detach())
        variances[value].append(p.variance.detach())
    best = (math.inf, 0.0, 0.0)
    for value in GRID:
        square, variance = torch.cat(squares[value]), torch.cat(variances[value])
        noise = (square / variance).mean()
        nll = 0.5 * (torch.log(2 * math.pi * noise * variance) + square / (noise * variance)).mean()
        best = min(best, (float(nll), float(value / noise), float(noise.sqrt())))
    _, delta, sigma = best
    model = net(split, seed)
    training.fit(model, x, y, Gaussian(sigma), delta, **options)
    return LaplaceGP(model.eval(), x, y, Gaussian(sigma), delta, progress=False)


class ArdGP(gpytorch.models.ExactGP):
    """A constant mean, an RBF kernel with one length for each input; noise down to sigma = 0.001."""

    def __init__(self, split: Split) -> None:
        constraint = gpytorch.constraints.GreaterThan(1e-6)
        likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=constraint).double()
        likelihood.noise = START["sigma"] ** 2
        super().__init__(split.x, split.y[:, 0], likelihood)
        self.mean_module = gpytorch.means.ConstantMean().double()
        kernel = gpytorch.kernels.RBFKernel(ard_num_dims=split.x.shape[1])
        self.covar_module = gpytorch.kernels.ScaleKernel(kernel).double()

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def by_rbf(split: Split) -> tuple[Distribution, dict]:
    """By L-BFGS; where that runs into numbers that are no more, by 200 steps of Adam."""

    def make() -> gpytorch.mlls.ExactMarginalLogLikelihood:
        model = ArdGP(split)
        return gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of the failure, which is looked at here
        table = compare({"rbf": Candidate(make)}, split.x, split.y, Gaussian(START["sigma"]), progress=False)
    model = table.models.get("rbf")
    if model is None:
        mll = make()
        model = mll.model
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        with gpytorch.settings.max_cholesky_size(len(split.x) + 1):
            for _ in range(200):
                optimizer.zero_grad()
                (-mll(model(split.x), split.y[:, 0])).backward()
                optimizer.step()
        model.eval()
        model.likelihood.eval()
    with gpytorch.settings.max_cholesky_size(len(split.x) + 1):
        y = model.likelihood(model(split.test_x))
    normal = Independent(Normal(y.mean.detach()[:, None], y.stddev.detach()[:, None]), 1)
    return normal, {"sigma": model.likelihood.noise.sqrt().item()}


@torch.no_grad()
def predicted(gp: LaplaceGP, split: Split) -> tuple[Distribution, dict]:
    deltas = gp.prior_precision.detach().tolist()
    return gp.predict(split.test_x).y, {"delta": " ".join(f"{d:.4g}" for d in deltas), "sigma": float(gp.noise.sqrt())}


class Study:
    """One job after the other."""

    def __init__(self, folder, peer: tables.Peer | None) -> None:
        self.folder, self.peer = folder, peer

    def split(self, name: str, number: int) -> Split:
        return tables.uci(self.folder, name, number, 2000 if name in LARGE else None)

    def __call__(self, job) -> dict:
        split, seed, method = self.split(job["set"], job["split"]), job["split"], job["method"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NumericalWarning)  # the grid's ends
            if method.startswith("marglik"):
                y, costs, extra = self.by_peer(split, seed, "full" if method.endswith("full") else "kron")
            else:
                with Cost() as cost:
                    y, extra = self.by_us(split, seed, method)
                costs = {"cpu_seconds": cost.cpu_seconds, "seconds": cost.seconds}
        return {**scores(y, split), **costs, **extra}

    def by_us(self, split: Split, seed: int, method: str) -> tuple[Distribution, dict]:
        if method == "rbf":
            return by_rbf(split)
        if method == "cv":
            return predicted(by_cross_validation(split, seed), split)
        if method == "average":
            starts = (seed, START), (seed + 1000, SMOOTH)
            gps = [by_evidence(split, number, 1, start) for number, start in starts]
            return average([gp.predict(split.test_x) for gp in gps]).y, {}
        return predicted(by_evidence(split, seed, {"post hoc": None, "online": 1, "layerwise": 4}[method]), split)

    def by_peer(self, split: Split, seed: int, structure: str) -> tuple[Distribution, dict, dict]:
        arrays = {"x": split.x, "y": split.y, "test_x": split.test_x}
        case = {"task": "marglik", "width": WIDTH, "structure": structure, "seed": seed, "threads": 1}
        (mean, variance), answer = self.peer(arrays, **case, epochs=1000, lr=1e-2, every=10)
        mean, spread = torch.from_numpy(mean)[:, None], torch.from_numpy(variance)[:, None].sqrt()
        costs = {name: answer[name] for name in ("cpu_seconds", "seconds")}
        return Independent(Normal(mean, spread), 1), costs, {}

    def estimate(self, job) -> float:
        """Processor seconds of one job, a rough guess from the number of examples."""
        n = (
            2000
            if job["set"] in LARGE
            else {"yacht": 277, "diabetes": 398, "wine-quality-red": 1439}.get(job["set"], 700)
        )
        if job["method"] == "rbf":
            return 90 * (n / 2000) ** 2.5
        return COSTS[job["method"]] * n / 500


@torch.no_grad()
def scores(y: Distribution, split: Split) -> dict[str, float]:
    return {
        "nll": float(metrics.negative_log_likelihood(y, split.test_y)) + math.log(split.scale),
        "rmse": float((y.mean - split.test_y).square().mean().sqrt()) * split.scale,
        "coverage": float(metrics.coverage(y, split.test_y, 0.95)),
    }


# ---- telling


def report(table: Table) -> None:
    """For each data set the splits that all of its methods have; then ranks over the data sets."""
    sets = [name for name in (*SMALL, *LARGE, "diabetes") if len(table.values("nll", set=name))]
    methods = [m for m in METHODS if len(table.values("nll", method=m))]
    common = {name: _common(table, name, methods) for name in sets}
    for column, digits in (("nll", 3), ("rmse", 3), ("coverage", 3), ("cpu_seconds", 1)):
        rows = [
            [f"{s} ({len(common[s])})", *(tables.shown(_of(table, column, s, m, common[s]), digits) for m in methods)]
            for s in sets
        ]
        print(f"\n{column} (splits)\n" + tables.markdown(["", *methods], rows))
    complete = [s for s in sets if common[s]]
    if len(complete) < 2:
        return
    for column in ("nll", "rmse"):
        means = np.array([[_of(table, column, s, m, common[s]).mean() for m in methods] for s in complete])
        mean_ranks, p = tables.ranks(means)
        told = ", ".join(
            f"{m} {r:.2f}" for m, r in sorted(zip(methods, mean_ranks, strict=True), key=lambda item: item[1])
        )
        print(f"\nmean rank by {column} over {len(complete)} data sets: {told}; Friedman's p = {p:.3g}")
    rows = []
    for other in [m for m in methods if m in ("cv", "marglik", "marglik full", "rbf")]:
        for method in [m for m in methods if m in ("post hoc", "online", "layerwise", "average")]:
            a, b = (np.concatenate([_of(table, "nll", s, m, common[s]) for s in complete]) for m in (method, other))
            _, _, p = tables.paired(a, b)
            costs = [sum(_of(table, "cpu_seconds", s, m, common[s]).sum() for s in complete) for m in (method, other)]
            better, faster = f"{np.mean(a < b):.0%} of {len(a)}", f"{costs[1] / costs[0]:.1f}"
            rows.append([f"{method} − {other}", tables.shown(a - b), better, f"{p:.2g}", faster])
    columns = ["", "difference of NLL, nats", "better in", "Wilcoxon's p", "times faster"]
    print("\nover all splits of all data sets (which overlap: p is too small)\n" + tables.markdown(columns, rows))


def _common(table: Table, name: str, methods: list[str]) -> list[str]:
    done = [{row["split"] for row in table.rows if row["set"] == name and row["method"] == m} for m in methods]
    return sorted(set.intersection(*done), key=int)


def _of(table: Table, column: str, name: str, method: str, splits: list[str]) -> np.ndarray:
    return np.concatenate([table.values(column, set=name, method=method, split=s) for s in splits] or [np.zeros(0)])


def main() -> None:
    options = tables.parser(__doc__.splitlines()[0])
    options.add_argument("--splits", type=int, help="of the small sets (default 20)")
    arguments = options.parse_args()
    table = Table(arguments.results / "uci_evidence.csv", KEY, COLUMNS)
    if not arguments.report:
        names = arguments.sets or ([*SMALL, *LARGE] if arguments.data else ["diabetes"])
        for name in names:
            tables.uci(arguments.data, name, 0)  # what is not there is told before the work
        with contextlib.ExitStack() as stack:
            peer = tables.peer(arguments, "laplace_tables.py", stack)
            tables.head(arguments, peer)
            study = Study(arguments.data, peer)
            small = arguments.splits or 20
            methods = arguments.methods or [m for m in METHODS if m != "marglik full" or arguments.full]
            methods = [m for m in methods if peer or not m.startswith("marglik")]
            jobs = [
                {"set": name, "split": number, "method": method}
                for number in range(small)
                for name in names
                if name not in LARGE or number < 3
                for method in methods
            ]
            table.run(jobs, study, study.estimate)
    report(table)


if __name__ == "__main__":
    main()
