"""New data without retraining: a net trained on one half, conditioned on the other, against a net trained on both.

    python examples/benchmarks/conditioning.py --data FOLDER
    python examples/benchmarks/conditioning.py --report

The protocol of Scannell et al., "Function-space parameterization of neural networks for sequential learning" (ICLR
2024): airfoil, boston and protein (10 % of its rows). A tenth of the rows is for testing, the others are halved. The
net has 50 tanh units, or as --width says; delta and sigma are chosen by the evidence while it is trained
(`training.train_with_evidence`). Once with one net, and once with four, from other initial weights, whose predictions
are averaged (`average`), at each stage.

    before        the GPs of the nets trained on the first half
    conditioned   the same with the other half added, `gp.condition_on(x, y)`: no step of training
    tuned         the same, delta and sigma chosen once more by the evidence of all data, still for the same weights
    retrained     the GPs of nets trained on both halves from the same initial weights, delta and sigma chosen anew

NLL of the test labels, standardised; seconds of processor time, of one thread and all nets: for "conditioned" until the
new posterior is there, for "tuned" until it is tuned, for "retrained" all of training. Without a folder: scikit-learn's
diabetes.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from pathlib import Path

import numpy as np
import tables
import torch
from tables import Cost, Split, Table
from torch import nn

from gpytorch_dnn2gp import LaplaceGP, NumericalWarning, average, fit_evidence, metrics, training
from gpytorch_dnn2gp.losses import Gaussian

SETS = ("airfoil", "boston", "protein")
STAGES = ("before", "conditioned", "tuned", "retrained")
KEY = ("set", "split", "width", "nets")
COLUMNS = (
    *(f"nll {stage}" for stage in STAGES),
    *(f"rmse {stage}" for stage in STAGES),
    *(f"cpu_seconds {stage}" for stage in STAGES),
    *("cpu_seconds", "seconds", "rows"),
)
NETS = (1, 4)
START = {"delta": 1.0, "sigma": 0.3}
OPTIONS = {"every": 30, "max_iterations": 1000, "evidence_iterations": 8, "progress": False}


def data(folder: Path | None, name: str, split: int) -> Split:
    """A tenth for testing, drawn by the split's number; the training rows are in random order."""
    if name == "diabetes":
        return tables.uci(None, name, split)
    tables.require_folder(folder, name)
    if name == "airfoil":
        rows = np.loadtxt(Path(folder) / "uci" / "airfoil_self_noise.dat")
        order = np.random.default_rng(split).permutation(len(rows))
        cut = round(0.9 * len(rows))
        return tables.holdout(rows[:, :-1], rows[:, -1], order[:cut], order[cut:])
    if name == "boston":
        return tables.uci(folder, "bostonHousing", split)
    full = tables.uci(folder, "protein-tertiary-structure", split)
    n, m = len(full.x) // 10, len(full.test_x) // 10
    return Split(full.x[:n], full.y[:n], full.test_x[:m], full.test_y[:m], full.scale)


def trained(split: Split, rows: slice, width: int, nets: int) -> list[LaplaceGP]:
    gps = []
    for seed in range(nets):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(split.x.shape[1], width), nn.Tanh(), nn.Linear(width, 1)).double()
        data = split.x[rows], split.y[rows], Gaussian(START["sigma"])
        gps.append(training.train_with_evidence(net, *data, START["delta"], **OPTIONS).gp)
        gps[-1].posterior()
    return gps


def conditioned(gp: LaplaceGP, split: Split, rows: slice) -> LaplaceGP:
    more = gp.condition_on(split.x[rows], split.y[rows])
    more.posterior()
    return more


def tuned(gp: LaplaceGP) -> LaplaceGP:
    again = copy.deepcopy(gp)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)  # of values far off, which the search tries
        fit_evidence(again, warn=False, progress=False)
    again.posterior()
    return again


@torch.no_grad()
def scores(gps: list[LaplaceGP], split: Split, stage: str, cost: Cost) -> dict[str, float]:
    p = average([gp.predict(split.test_x) for gp in gps])
    return {
        f"nll {stage}": float(metrics.negative_log_likelihood(p.y, split.test_y)),
        f"rmse {stage}": float((p.mean - split.test_y).square().mean().sqrt()),
        f"cpu_seconds {stage}": cost.cpu_seconds,
    }


def study(split: Split, width: int, nets: int) -> dict[str, float]:
    """All stages on one split."""
    half = len(split.x) // 2
    first, second = slice(0, half), slice(half, None)
    found = {"rows": len(split.x)}
    with Cost() as whole:
        with Cost() as cost:
            before = trained(split, first, width, nets)
        found |= scores(before, split, "before", cost)
        with Cost() as cost:
            more = [conditioned(gp, split, second) for gp in before]
        found |= scores(more, split, "conditioned", cost)
        with Cost() as tuning:
            again = [tuned(gp) for gp in more]
        tuning.cpu_seconds += cost.cpu_seconds
        found |= scores(again, split, "tuned", tuning)
        with Cost() as cost:
            new = trained(split, slice(None), width, nets)
        found |= scores(new, split, "retrained", cost)
    return found | {"cpu_seconds": whole.cpu_seconds, "seconds": whole.seconds}


def report(table: Table, width: int) -> None:
    rows, differences = [], []
    for name, nets in itertools.product((*SETS, "diabetes"), NETS):
        of = {column: table.values(column, set=name, width=width, nets=nets) for column in COLUMNS}
        if not len(of["rows"]):
            continue
        nlls = [tables.shown(of[f"nll {stage}"]) for stage in STAGES]
        times = [tables.shown(of[f"cpu_seconds {stage}"], 2) for stage in STAGES[1:]]
        rows.append([f"{name} ({len(of['rows'])} splits, {of['rows'][0]:.0f} rows)", str(nets), *nlls, *times])
        for stage in ("conditioned", "tuned"):
            more = tables.shown(of[f"nll {stage}"] - of["nll retrained"])
            faster = of["cpu_seconds retrained"].mean() / of[f"cpu_seconds {stage}"].mean()
            which = f"{name}, {nets} net{'s' if nets > 1 else ''}: {stage}"
            differences.append(f"{which} {more} nats more than retrained, {faster:.0f} times faster")
    columns = ["", "nets", *(f"NLL {stage}" for stage in STAGES), *(f"{stage}, s" for stage in STAGES[1:])]
    print(tables.markdown(columns, rows), "", *differences, sep="\n")


def main() -> None:
    options = tables.parser(__doc__.splitlines()[0])
    options.add_argument("--splits", type=int, help="of each set (default 5, with --full 20; protein has 5)")
    options.add_argument("--width", type=int, default=50)
    arguments = options.parse_args()
    table = Table(arguments.results / "conditioning.csv", KEY, COLUMNS)
    if not arguments.report:
        names = arguments.sets or (SETS if arguments.data else ["diabetes"])
        splits = arguments.splits or (20 if arguments.full else 5)
        jobs = [
            {"set": name, "split": number, "width": arguments.width, "nets": nets}
            for number in range(splits)
            for name in names
            for nets in NETS
            if name != "protein" or number < 5
        ]
        for name in names:
            data(arguments.data, name, 0)  # what is not there is told before the work
        tables.head(arguments, None)
        guess = {"airfoil": 12, "boston": 6, "protein": 20, "diabetes": 5}
        table.run(
            jobs,
            lambda job: study(data(arguments.data, job["set"], job["split"]), job["width"], job["nets"]),
            lambda job: guess[job["set"]] * job["nets"],
        )
    report(table, arguments.width)


if __name__ == "__main__":
    main()
