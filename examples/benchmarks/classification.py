"""Classes: a net alone, its Gaussian process, and laplace-torch's approximations of the same net.

    python examples/benchmarks/classification.py --data FOLDER --peer-python PYTHON
    python examples/benchmarks/classification.py --report

Problems (five seeds of splits and initial weights, with --full ten; MNIST's 2,000 images have three, all of it one):

    digits          1,000 images of 8 x 8 to train, 297 held out, 500 to test (scikit-learn); 64-20-10 ReLU
    breast cancer   300, 99, 170 (scikit-learn); 30-20-2 tanh
    banana          300, 100 (of its 400 training points), 4,900 to test; 2-20-2 tanh
    mnist 2000      LeNet-5 trained on 2,000 images; 500 held out, 1,000 to test, with --full 10,000
    mnist 60000     LeNet-5 with the paper's weights, of all 60,000; 500 of the test images held out, the others to test

All are trained with the weight decay of 1e-3 for each example (small nets, L-BFGS) or 1e-4 (LeNet, Adam), and then left
as they are. Methods:

    net                    softmax of the outputs
    temperature            the same, outputs divided by a temperature chosen on held-out labels
    probit evidence        GP of all weights, delta by the evidence, probabilities by probit
    probit held-out        delta by the likelihood of held-out labels
    mc held-out            the same, probabilities by Monte Carlo
    both held-out          delta and a factor of the outputs by the likelihood of held-out labels, probit
    last layer, diagonal   GPs of the last layer, or with a diagonal covariance: delta held-out, mc
    kron, ll               laplace-torch: Kronecker factors of all weights, or the full covariance of the last layer;
                           prior precision by "evidence" (its marglik), or "held-out" (its gridsearch), probit

Held-out values of delta: 13 from 0.1 to 1e5, six of them for the 2,000 images of MNIST (at 1e5 a GP is as good as its
net); laplace-torch's own: 25 from 1e-4 to 1e4. What methods share, the Gram and moments of held-out outputs, is
computed once and counts for each. The variances of "both held-out" are those of the GP, before its outputs are scaled.

Accuracy, NLL, ECE (15 bins) of the test labels; for MNIST also the AUROC of Fashion and KMNIST test images against
MNIST's, by the summed epistemic variance of the probabilities ("variance", Monte Carlo), by that of the outputs
("variance f", the trace of their covariance) and by 1 - max p. Cost: processor time of all that follows training.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tables
import torch
from sklearn.metrics import roc_auc_score
from tables import Cost, Table
from torch import Tensor, nn

from gpytorch_dnn2gp import LaplaceGP, fit_evidence, metrics, training
from gpytorch_dnn2gp.losses import Categorical

tables.contenders()
import nets  # noqa: E402

SMALL, MNIST = ("digits", "breast cancer", "banana"), ("mnist 2000", "mnist 60000")
ALL_WEIGHTS = ("probit evidence", "probit held-out", "mc held-out", "both held-out")
PEERS = ("kron evidence", "kron held-out", "ll evidence", "ll held-out")
METHODS = ("net", "temperature", *ALL_WEIGHTS, "last layer held-out", "diagonal held-out", *PEERS)
DETECTORS = ("variance", "variance f", "max p")
SCORES = ("accuracy", "nll", "ece", *(f"{s} {by}" for s in ("fashion", "kmnist") for by in DETECTORS))
KEY, COLUMNS = ("set", "split", "method"), (*SCORES, "cpu_seconds", "seconds", "delta")
DELTAS = torch.logspace(-1, 5, 13, dtype=torch.float64)
SEEDS = {"mnist 2000": 3, "mnist 60000": 1}  # at most
BATCH = 500
Found = tuple[Tensor, Tensor | None]  # probabilities (m, K) and, where there are any, epistemic variances (m, 2)


@dataclass
class Problem:
    """Data and a trained net. ``others`` are images of other kinds."""

    net: nn.Module
    name: str
    prior_precision: float
    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    others: dict[str, Tensor] = field(default_factory=dict)


# ---- data and nets


def small(folder: Path | None, name: str, seed: int) -> Problem:
    if name == "banana":
        tables.require_folder(folder, name)
        with np.load(Path(folder) / "uci" / "banana.npz") as archive:
            x, y, train, rest = archive["X"], (archive["y"] > 0).astype(int), archive["train_idx"], archive["test_idx"]
        sizes, train = (300, 100, len(rest)), np.random.default_rng(seed).permutation(train)
        order = np.concatenate([train, rest])
    else:
        from sklearn import datasets

        load = {"digits": datasets.load_digits, "breast cancer": datasets.load_breast_cancer}[name]
        x, y = load(return_X_y=True)
        sizes = {"digits": (1000, 297, 500), "breast cancer": (300, 99, 170)}[name]
        order = np.random.default_rng(seed).permutation(len(x))
    parts = [torch.as_tensor(part) for part in np.split(order, np.cumsum(sizes)[:2])]
    x, y = torch.as_tensor(x, dtype=torch.float64), torch.as_tensor(y)
    first = x[parts[0]]
    x = (x - first.mean()) / first.std() if name == "digits" else (x - first.mean(0)) / first.std(0)
    net, n = nets.make(name, seed).double(), sizes[0]
    data = [(x[part], y[part]) for part in parts]
    training.fit(net, *data[0], Categorical(), 1e-3 * n, max_iterations=2000, progress=False)
    return Problem(net.eval(), name, 1e-3 * n, *data)


def mnist(folder: Path | None, name: str, seed: int, num_test: int) -> Problem:
    tables.require_folder(folder, "MNIST")
    x, y = images(Path(folder) / "mnist", "train")
    test_x, test_y = images(Path(folder) / "mnist", "t10k")
    others = {key: images(Path(folder) / "ood" / where, "t10k")[0][:num_test] for key, where in OTHERS.items()}
    net = nets.make("paper lenet", seed)
    if name == "mnist 60000":
        with np.load(Path(folder) / "dnn2gp_models" / "full_mnist_lenet_adaml2.npz") as weights:
            net.load_state_dict({key: torch.from_numpy(weights[old]) for key, old in PAPER_NAMES.items()})
        held_out, test = (test_x[-500:], test_y[-500:]), (test_x[:-500], test_y[:-500])
        return Problem(net.eval(), "paper lenet", 60_000 * 1e-4, (x, y), held_out, test, others)
    n, first = 2000, 2500 * seed  # other images for each seed
    options = {"batch_size": 64, "max_iterations": 60, "lr": 2e-3, "progress": False}
    generator = torch.Generator().manual_seed(seed)
    data = [(x[i], y[i]) for i in (slice(first, first + n), slice(first + n, first + n + 500))]
    training.fit(net, *data[0], Categorical(), 1e-4 * n, method="adam", generator=generator, **options)
    data.append((test_x[:num_test], test_y[:num_test]))
    return Problem(net.eval(), "paper lenet", 1e-4 * n, *data, others)


OTHERS = {"fashion": "fashionmnist", "kmnist": "kmnist"}
PAPER_NAMES = {
    f"{place}.{kind}": f"{old}.{kind}"
    for place, old in {"0": "layer1.0", "3": "layer2.0", "7": "fc1", "9": "fc2", "11": "fc"}.items()
    for kind in ("weight", "bias")
}


def images(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """``(n, 1, 28, 28)`` in [0, 1], and classes."""

    def read(name: str, offset: int) -> np.ndarray:
        with gzip.open(folder / f"{part}-{name}-ubyte.gz") as file:
            return np.frombuffer(file.read(), np.uint8, offset=offset).copy()

    x = torch.from_numpy(read("images-idx3", 16)).reshape(-1, 1, 28, 28).float() / 255
    return x, torch.from_numpy(read("labels-idx1", 8)).long()


# ---- methods: probabilities and epistemic variance at inputs


@torch.no_grad()
def outputs(net: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([net(part) for part in x.split(BATCH)])


def nll(logits: Tensor, y: Tensor) -> float:
    return float(nn.functional.cross_entropy(logits, y))


def best_scale(variance: Tensor, f: Tensor, y: Tensor) -> tuple[float, float]:
    """The factor of the outputs, and of their standard deviations, that predicts held-out labels best by probit."""
    factors = np.logspace(-0.7, 0.7, 57)
    losses = [nll(c * f / (1 + math.pi / 8 * c**2 * variance).sqrt(), y) for c in factors]
    i = int(np.argmin(losses))
    return factors[i], losses[i]


class GP:
    """The GP of a problem's net with delta and a factor of the outputs.

    Methods share it where they differ in these alone: what is ``kept`` by one (the Gram, the moments of held-out
    outputs for each delta) is not computed again, but its cost counts for each method that uses it.
    """

    def __init__(self, problem: Problem, **options) -> None:
        self.problem, self.options, self._kept = problem, options, {}

    def begin(self) -> None:
        """A method begins: it has used nothing yet."""
        self.scale, self._used, self._made = 1.0, set(), set()
        self.gp = self.kept("gram", self._with_gram)
        self.gp.prior_precision = self.problem.prior_precision

    def _with_gram(self) -> LaplaceGP:
        shape = tuple(self.problem.train[0].shape[1:])
        shape = {"input_shape": shape} if len(shape) > 1 else {}
        data = self.problem.net, *self.problem.train, Categorical(), self.problem.prior_precision
        gp = LaplaceGP(*data, **shape, **self.options, progress=False)
        gp.posterior()
        return gp

    def kept(self, key: object, make: Callable[[], object]) -> object:
        """What ``make()`` returns, computed once."""
        if key not in self._kept:
            with Cost() as cost:
                self._kept[key] = make(), cost
            self._made.add(key)
        self._used.add(key)
        return self._kept[key][0]

    def cost_of_earlier(self) -> dict[str, float]:
        """What this method has used and others made."""
        costs = [self._kept[key][1] for key in self._used - self._made]
        return {name: sum(getattr(cost, name) for cost in costs) for name in ("cpu_seconds", "seconds")}

    @torch.no_grad()
    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of f."""
        parts = [self.gp.predict(part).f for part in x.flatten(1).split(BATCH)]
        return torch.cat([f.mean for f in parts]), torch.cat([f.covariance_matrix for f in parts])

    def by_evidence(self) -> None:
        large = len(self.problem.train[0]) * 10 > 10_000 and self.gp.solver == "function_space"
        fit_evidence(self.gp, block_size=200 if large else None, warn=False, progress=False)

    def by_held_out(self, approximation: str, scaled: bool = False, deltas: Tensor = DELTAS) -> None:
        """delta of the best likelihood of held-out labels, and a factor of the outputs if ``scaled``."""
        x, y = self.problem.held_out
        best = (math.inf, 0.0, 1.0)
        for delta in tables.tiling.progress(deltas.tolist(), "delta on held-out labels"):
            self.gp.prior_precision = delta
            f, covariance = self.kept(delta, lambda: self.moments(x))
            if approximation == "mc":
                here = (-float(sampled_probs(f, covariance).mean(0)[range(len(y)), y].log().mean()), delta, 1.0)
            else:
                variance = covariance.diagonal(dim1=-2, dim2=-1)
                scale, value = best_scale(variance, f, y) if scaled else (1.0, None)
                here = (nll(f / (1 + math.pi / 8 * variance).sqrt(), y) if value is None else value, delta, scale)
            best = min(best, here)
        _, self.gp.prior_precision, self.scale = best

    def probs(self, x: Tensor, approximation: str) -> Found:
        """Probabilities ``(m, K)`` and summed epistemic variances, of those (Monte Carlo) and of f, ``(m, 2)``."""
        f, covariance = self.moments(x)
        samples = sampled_probs(f, covariance)
        p = samples.mean(0)
        if approximation == "probit":
            variance = covariance.diagonal(dim1=-2, dim2=-1)
            p = (self.scale * f / (1 + math.pi / 8 * self.scale**2 * variance).sqrt()).softmax(-1)
        return p, torch.stack([samples.var(0).sum(-1), covariance.diagonal(dim1=-2, dim2=-1).sum(-1)], -1)


def sampled_probs(f: Tensor, covariance: Tensor, num_samples: int = 200) -> Tensor:
    """Softmax of draws of f, ``(s, m, K)``."""
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    noise = torch.randn(num_samples, *f.shape, generator=torch.Generator().manual_seed(0), dtype=f.dtype)
    return (f + torch.einsum("mkl,sml->smk", root, noise)).softmax(-1)


class Study:
    """One job after the other; the trained net, and its GP of all weights, are kept for the methods that share them."""

    def __init__(self, folder, peer: tables.Peer | None, num_test: int, threads: int) -> None:
        self.folder, self.peer, self.num_test, self.threads = folder, peer, num_test, threads
        self.problem = functools.lru_cache(1)(self._problem)
        self.gp = functools.lru_cache(1)(self._gp)

    def _problem(self, name: str, seed: int) -> Problem:
        if name in SMALL:
            return small(self.folder, name, seed)
        return mnist(self.folder, name, seed, self.num_test)

    def _gp(self, name: str, seed: int, kind: str) -> GP:
        options = {"last layer": {"params": "last_layer"}, "diagonal": {"structure": "diagonal"}}.get(kind, {})
        return GP(self.problem(name, seed), **options)

    def __call__(self, job) -> dict:
        problem, method = self.problem(job["set"], job["split"]), job["method"]
        inputs = {"test": problem.test[0], **problem.others}
        earlier, delta = {}, ""
        if method in PEERS:
            found, costs = self.by_peer(problem, method, inputs)
        else:
            with Cost() as cost:
                if method in ("net", "temperature"):
                    found = by_net(problem, method, inputs)
                else:
                    kind = "all weights" if method in ALL_WEIGHTS else method.removesuffix(" held-out")
                    gp = self.gp(job["set"], job["split"], kind)
                    gp.begin()
                    found, delta = by_gp(gp, method, inputs)
                    earlier = gp.cost_of_earlier()
            costs = {name: getattr(cost, name) + earlier.get(name, 0.0) for name in ("cpu_seconds", "seconds")}
        return {**scores(found, problem.test[1]), **costs, "delta": delta}

    def by_peer(self, problem: Problem, method: str, inputs: dict[str, Tensor]):
        structure, tune = method.split()
        case = {"kron": {"structure": "kron", "subset": "all"}, "ll": {"structure": "full", "subset": "last_layer"}}
        arrays = {
            "x": problem.train[0],
            "y": problem.train[1],
            "held_x": problem.held_out[0],
            "held_y": problem.held_out[1],
        }
        arrays |= {f"test {name}": x for name, x in inputs.items()}
        arrays |= {f"w:{name}": weights for name, weights in problem.net.state_dict().items()}
        options = {"task": "classes", "net": problem.name, "batch": 256, "link": "probit", "seed": 0}
        found, answer = self.peer(arrays, **options, **case[structure], tune=tune, threads=self.threads)
        ends = np.cumsum([len(inputs[name]) for name in sorted(inputs)])[:-1]
        parts = dict(zip(sorted(inputs), np.split(found, ends), strict=True))
        results = {name: (torch.from_numpy(a[:, :-2]), torch.from_numpy(a[:, -2:])) for name, a in parts.items()}
        return results, {name: answer[name] for name in ("cpu_seconds", "seconds")}

    def estimate(self, job) -> float:
        """Processor seconds of one job, a rough guess."""
        name, method = job["set"], job["method"]
        if name in SMALL:
            return 5.0 if name == "digits" else 0.5
        if method in ALL_WEIGHTS:  # what they share counts once
            own = {"probit evidence": 160.0, "probit held-out": 550.0}.get(method, 50.0)
            return own + 200.0 * (self.num_test / 1000)
        once = {"net": 40, "diagonal held-out": 30, "kron evidence": 50, "kron held-out": 240}.get(method, 4)
        return once + (150.0 if name == "mnist 60000" and method not in ("net", "temperature") else 0.0)


@torch.no_grad()
def by_net(problem: Problem, method: str, inputs: dict[str, Tensor]) -> dict[str, Found]:
    """Probabilities by the name of the inputs."""
    scale = 1.0
    if method == "temperature":
        f = outputs(problem.net, problem.held_out[0])
        scale, _ = best_scale(torch.zeros(()), f, problem.held_out[1])
    return {name: ((scale * outputs(problem.net, x)).softmax(-1), None) for name, x in inputs.items()}


@torch.no_grad()
def by_gp(gp: GP, method: str, inputs: dict[str, Tensor]) -> tuple[dict[str, Found], str]:
    """Probabilities and epistemic variances by the name of the inputs; and delta."""
    kind, _, tune = method.rpartition(" ")
    approximation = "mc" if kind in ("mc", "last layer", "diagonal") else "probit"
    if tune == "evidence":
        gp.by_evidence()
    else:  # each value costs a factorisation of the whole matrix: fewer where that is large
        exact = gp.gp.solver == "function_space" and len(gp.problem.train[0]) > 1000
        gp.by_held_out(approximation, scaled=kind == "both", deltas=DELTAS[2::2] if exact else DELTAS)
    return {name: gp.probs(x, approximation) for name, x in inputs.items()}, f"{float(gp.gp.prior_precision):.4g}"


def scores(found: dict[str, Found], y: Tensor) -> dict[str, float]:
    p, variances = found["test"]
    made = {
        "accuracy": float((p.argmax(-1) == y).double().mean()),
        "nll": -float(p[range(len(y)), y].clamp(min=1e-30).log().mean()),
        "ece": float(metrics.calibration_error(p, y)),
    }
    for name, (other, other_variances) in found.items():
        if name == "test":
            continue
        is_other = np.r_[np.zeros(len(p)), np.ones(len(other))]
        made[f"{name} max p"] = roc_auc_score(is_other, 1 - torch.cat([p, other]).max(-1).values)
        if variances is not None:
            for column, by in enumerate(("variance", "variance f")):
                both = torch.cat([variances[:, column], other_variances[:, column]])
                made[f"{name} {by}"] = roc_auc_score(is_other, both)
    return made


# ---- telling


def report(table: Table) -> None:
    for name in (*SMALL, *MNIST):
        shown = [c for c in SCORES if len(table.values(c, set=name))]
        rows = []
        for method in METHODS:
            number = len(table.values("nll", set=name, method=method))
            if number:
                cells = [tables.shown(table.values(c, set=name, method=method), 4) for c in shown]
                rows.append(
                    [method, str(number), *cells, tables.shown(table.values("cpu_seconds", set=name, method=method), 1)]
                )
        if rows:
            print(f"\n{name}\n" + tables.markdown(["", "seeds", *shown, "CPU s"], rows))


def main() -> None:
    options = tables.parser(__doc__.splitlines()[0])
    options.add_argument("--splits", type=int, help="seeds of the small sets (default 5, with --full 10)")
    arguments = options.parse_args()
    table = Table(arguments.results / "classification.csv", KEY, COLUMNS)
    if not arguments.report:
        with contextlib.ExitStack() as stack:
            peer = tables.peer(arguments, "laplace_tables.py", stack)
            tables.head(arguments, peer)
            splits = arguments.splits or (10 if arguments.full else 5)
            names = arguments.sets or ((*SMALL, *MNIST) if arguments.data else SMALL[:2])
            jobs = [
                {"set": name, "split": number, "method": method}
                for number in range(splits)
                for name in names
                for method in METHODS
                if number < SEEDS.get(name, splits)
                and not (name == "mnist 60000" and method in ALL_WEIGHTS)
                and method in (arguments.methods or METHODS)
                and (peer or method not in PEERS)
            ]
            study = Study(arguments.data, peer, 10_000 if arguments.full else 1000, arguments.threads)
            table.run(jobs, study, study.estimate)
    report(table)


if __name__ == "__main__":
    main()
