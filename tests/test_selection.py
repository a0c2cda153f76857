"""Comparing models by evidence: the table, its picture and its file, resuming, other kernels, parallel runs."""

import functools

import gpytorch
import joblib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from oracle import assert_close
from problems import F64, mlp, number, randomized

from gpytorch_dnn2gp import metrics, mlls, selection
from gpytorch_dnn2gp.losses import Categorical, Gaussian
from gpytorch_dnn2gp.selection import Candidate, Comparison, compare, mlps


def draw(n: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.rand(n, 1, dtype=F64, generator=generator)
    return x, torch.sin(3 * x) + 0.2 * torch.randn(n, 1, dtype=F64, generator=generator)


X, Y = draw(40, 0)
X_TEST, Y_TEST = draw(30, 1)
OPTIONS = {"max_iterations": 60}
GRID = mlps(1, widths=[2, 4], depths=[1, 2])


class Scaled(torch.nn.Module):
    """Owns a weight that it cannot draw anew."""

    def __init__(self):
        super().__init__()
        self.body, self.scale = torch.nn.Linear(1, 1).double(), torch.nn.Parameter(torch.ones(1, dtype=F64))

    def forward(self, x):
        return self.scale * self.body(x)


def quick(candidates=None, **options):
    defaults = {"tune": "after", "train_options": OPTIONS, "progress": False}
    return compare(GRID if candidates is None else candidates, X, Y, Gaussian(0.5), **{**defaults, **options})


@pytest.fixture(scope="module")
def comparison():
    return quick(test_x=X_TEST, test_y=Y_TEST, test_metrics={"coverage": metrics.coverage})


def test_rows_say_what_the_models_say(comparison):
    assert [row["candidate"] for row in comparison.rows] == list(GRID)
    for row in comparison.rows:
        gp = comparison.models[row["candidate"]]
        with torch.no_grad():
            assert_close(number(row["evidence"]), gp.log_evidence())
            residual = (gp.predict(X_TEST).mean - Y_TEST).square().mean()
        assert_close(number(row["test_error"]), residual)
        assert_close(number(row["test_nll"]), metrics.negative_log_likelihood(gp.predict(X_TEST).y, Y_TEST))
        assert_close(number(row["test_coverage"]), metrics.coverage(gp.predict(X_TEST).y, Y_TEST))
        assert 0 < row["effective"] < row["parameters"] == gp.linearization.num_weights
        assert_close(number(row["sigma"]), gp.noise.sqrt())
        assert row["seconds"] > 0 and row["distance"] >= 0


def test_the_best_has_the_largest_evidence(comparison):
    evidence = comparison.column("evidence")
    assert comparison.rows[int(np.argmax(evidence))]["candidate"] == comparison.best
    with pytest.raises(KeyError, match="There is no column 'depht'"):
        comparison.column("depht")


def test_it_prints_well(comparison):
    lines = str(comparison).splitlines()
    assert len(lines) == 1 + len(GRID) and len({len(line) for line in lines}) == 1
    assert "fingerprint" not in lines[0] and "evidence" in lines[0]
    assert [line for line in lines if f"{comparison.best} *" in line]


def test_it_plots_itself(comparison):
    ax, right = comparison.plot("width", errors=["test_error"])
    assert ax.get_xscale() == "log" and right.get_ylabel() == "test error"
    mean = [line for line in ax.get_lines() if line.get_label() == "log evidence"][0].get_ydata()
    by_width = np.array([[r["evidence"] for r in comparison.rows if r["width"] == w] for w in (2, 4)])
    np.testing.assert_allclose(mean, by_width.mean(1))
    ax, _ = comparison.plot()
    assert [t.get_text() for t in ax.get_xticklabels()] == list(GRID)
    fewer = Comparison(comparison.rows[:3])
    with pytest.raises(ValueError, match="different numbers of candidates"):
        fewer.plot("width")
    plt.close("all")


def test_it_is_saved_and_read(comparison, tmp_path):
    comparison.to_csv(tmp_path / "table.csv")
    again = Comparison.from_csv(tmp_path / "table.csv")
    assert again.rows == comparison.rows and str(again) == str(comparison)
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no table of a comparison"):
        Comparison.from_csv(tmp_path / "other.csv")


# ---- ways to tune, restarts, losses


def test_nothing_tuned():
    options = {"max_iterations": 1000}
    comparison = quick({"net": randomized(mlp(1), 0)}, tune=None, prior_precision=0.7, train_options=options)
    gp = comparison.models["net"]
    assert_close(gp.prior_precision, torch.tensor([0.7], dtype=F64))
    assert gp.stationarity().newton_decrement < 1e-3


def test_tuned_while_trained():
    comparison = quick({"net": GRID["1 x 4 Tanh"]}, tune="online", train_options={"max_iterations": 300, "every": 100})
    (row,) = comparison.rows
    assert row["distance"] < 1 and 0.1 < row["sigma"] < 0.5


@pytest.mark.parametrize("tune", ["after", "online"])
def test_the_best_of_several_starts_counts(tune):
    options = {"tune": tune, "train_options": {"max_iterations": 100, **({"every": 50} if tune == "online" else {})}}
    few = quick({"net": GRID["1 x 4 Tanh"]}, restarts=1, **options)
    many = quick({"net": GRID["1 x 4 Tanh"]}, restarts=3, **options)
    assert many.rows[0]["evidence"] >= few.rows[0]["evidence"] - 1.0  # the first start is the same, stacked


def test_a_given_net_is_not_touched_and_its_restarts_are_drawn_anew():
    net = randomized(mlp(1), 0)
    before = [p.detach().clone() for p in net.parameters()]
    quick({"net": net}, restarts=2)
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before))


def test_restarts_keep_what_is_frozen():
    net = randomized(mlp(1), 0)
    net[0].requires_grad_(False)
    gp = quick({"net": net}, restarts=3, tune=None).models["net"]
    assert torch.equal(gp.linearization.net[0].weight, net[0].weight)
    with pytest.raises(ValueError, match="Scaled has no reset_parameters"):
        quick({"net": Scaled()}, restarts=2)
    quick({"net": Scaled}, restarts=2, tune=None)


def test_a_bound_by_blocks_as_score():
    options = {"max_iterations": 100, "every": 50, "block_size": 10}
    result = quick({"net": GRID["1 x 4 Tanh"]}, tune="online", train_options=options)
    blocks = mlls.BlockEvidence(result.models["net"], 10, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(number(result.rows[0]["evidence"]), blocks.bound())


def test_classes_and_own_losses():
    y = (Y[:, 0] > 0).long()
    candidates = {"linear": Candidate(torch.nn.Linear(1, 2).double()), "net": randomized(mlp(1, num_outputs=2), 0)}
    comparison = compare(
        candidates, X, y, Categorical(), tune="after", test_x=X, test_y=y, train_options=OPTIONS, progress=False
    )
    assert comparison.best == "net"
    assert comparison.rows[1]["test_error"] < comparison.rows[0]["test_error"]
    assert comparison.rows[0]["sigma"] is None


def test_leave_one_out_and_gp_evidence_as_scores():
    for kind in ("leave_one_out", "gp"):
        (row,) = quick({"net": GRID["1 x 4 Tanh"]}, kind=kind).rows
        assert np.isfinite(row["evidence"])


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    quick({"net": GRID["1 x 2 Tanh"]}, tune=None)
    assert torch.equal(torch.get_rng_state(), state)


# ---- GPs of other kernels


def exact_gp_mll(x=X, y=Y):
    class Model(gpytorch.models.ExactGP):
        def __init__(self, likelihood):
            super().__init__(x, y[:, 0], likelihood)
            self.mean_module = gpytorch.means.ZeroMean()
            self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    model = Model(gpytorch.likelihoods.GaussianLikelihood()).double()
    return gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)


def test_nets_and_other_kernels_in_one_table():
    candidates = {
        "net": GRID["1 x 4 Tanh"],
        "rbf": gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()).double(),
        "own model": exact_gp_mll,
    }
    comparison = quick(candidates, test_x=X_TEST, test_y=Y_TEST)
    rbf, own = comparison.rows[1:]
    assert abs(rbf["evidence"] - own["evidence"]) < 2.0  # a constant mean more
    assert rbf["test_error"] < 0.1 and 0.1 < rbf["sigma"] < 0.4
    model = comparison.models["own model"]
    noise = model.likelihood.noise.detach() * torch.eye(40, dtype=F64)
    with torch.no_grad():
        density = torch.distributions.MultivariateNormal(
            torch.zeros(40, dtype=F64), model.covar_module(X).to_dense() + noise
        )
    assert_close(number(own["evidence"]), density.log_prob(Y[:, 0]), 1e-6)
    assert "-" in str(comparison)  # what a kernel does not have


def test_a_kernel_is_not_changed_by_the_comparison():
    kernel = gpytorch.kernels.RBFKernel().double()
    before = kernel.lengthscale.detach().clone()
    quick({"rbf": kernel})
    assert torch.equal(kernel.lengthscale, before)


def test_a_large_gp_of_another_kernel_has_its_exact_evidence():
    """GPyTorch alone estimates it from 800 points on."""
    x, y = draw(900, 2)
    (row,) = compare({"rbf": gpytorch.kernels.RBFKernel().double()}, x, y, Gaussian(0.2), tune=None).rows
    kernel, noise = gpytorch.kernels.RBFKernel().double(), 0.04 * torch.eye(900, dtype=F64)
    with torch.no_grad():
        density = torch.distributions.MultivariateNormal(torch.zeros(900, dtype=F64), kernel(x).to_dense() + noise)
    assert_close(number(row["evidence"]), density.log_prob(y[:, 0]), 1e-9)


def test_leave_one_out_of_other_kernels():
    kernel = gpytorch.kernels.RBFKernel().double()
    (row,) = quick({"rbf": kernel}, kind="leave_one_out", tune=None).rows
    with torch.no_grad():
        inverse = torch.linalg.inv(kernel(X).to_dense() + 0.25 * torch.eye(40, dtype=F64))
    variance = 1 / inverse.diagonal()
    mean = Y[:, 0] - (inverse @ Y[:, 0]) * variance
    assert_close(number(row["evidence"]), torch.distributions.Normal(mean, variance.sqrt()).log_prob(Y[:, 0]).sum())
    with pytest.raises(ValueError, match="is not kind='leave_one_out'"):
        quick({"own": exact_gp_mll}, kind="leave_one_out")


def test_priors_guide_the_fit_and_are_not_in_the_evidence():
    def with_prior():
        mll = exact_gp_mll()
        prior = gpytorch.priors.GammaPrior(2.0, 3.0)
        mll.likelihood.register_prior("noise_prior", prior, lambda m: m.noise)
        return mll

    with_it, without = quick({"with": with_prior, "without": exact_gp_mll}, tune=None).rows
    assert_close(number(with_it["evidence"]), number(without["evidence"]))


def test_mlls_of_other_kinds_are_refused():
    models = gpytorch.models.IndependentModelList(exact_gp_mll().model)
    both = gpytorch.mlls.SumMarginalLogLikelihood(
        gpytorch.likelihoods.LikelihoodList(*models.likelihood.likelihoods), models
    )
    with pytest.raises(ValueError, match="one model with exact inference; SumMarginalLogLikelihood"):
        quick({"own": lambda: both})


def test_an_mll_of_other_labels_is_refused():
    with pytest.raises(ValueError, match="other training labels"):
        quick({"own": functools.partial(exact_gp_mll, X, 2 * Y)})


def test_rows_without_a_value_are_not_drawn():
    both = quick({"net": GRID["1 x 2 Tanh"], "rbf": gpytorch.kernels.RBFKernel().double()}, tune=None)
    ax, _ = both.plot("width")
    assert [line.get_xdata().tolist() for line in ax.get_lines() if line.get_label() == "log evidence"] == [[2.0]]
    plt.close("all")


# ---- resuming


def test_what_is_in_the_file_is_not_run_again(tmp_path, monkeypatch):
    file = tmp_path / "table.csv"
    first = quick({name: GRID[name] for name in list(GRID)[:2]}, file=file)
    ran, original = [], selection._run
    monkeypatch.setattr(selection, "_run", lambda task, name, *a: ran.append(name) or original(task, name, *a))
    second = quick(file=file)  # with more candidates
    assert ran == list(GRID)[2:]
    assert second.rows[:2] == first.rows and list(second.models) == ran
    assert Comparison.from_csv(file).rows == second.rows


def test_an_interruption_keeps_the_finished(tmp_path, monkeypatch):
    original, ran = selection._run, []

    def interrupting(task, name, *rest):
        ran.append(name)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return original(task, name, *rest)

    monkeypatch.setattr(selection, "_run", interrupting)
    with pytest.raises(KeyboardInterrupt):
        quick(file=tmp_path / "table.csv")
    assert [row["candidate"] for row in Comparison.from_csv(tmp_path / "table.csv").rows] == list(GRID)[:2]
    quick(file=tmp_path / "table.csv")
    assert ran[3:] == list(GRID)[2:]


def test_a_file_of_something_else_is_refused(tmp_path):
    file = tmp_path / "table.csv"
    net = {"net": randomized(mlp(1), 0)}
    quick(net, file=file, tune=None)
    with pytest.raises(ValueError, match="results of 'net', which are not among the candidates 'other'"):
        quick({"other": net["net"]}, file=file, tune=None)
    with pytest.raises(ValueError, match="another candidate by the name of 'net'"):
        quick({"net": randomized(mlp(1), 1)}, file=file, tune=None)
    with pytest.raises(ValueError, match="other data or options"):
        quick(net, file=file, tune="after")
    with pytest.raises(ValueError, match="other data or options"):
        compare(net, X[:-1], Y[:-1], Gaussian(0.5), tune=None, train_options=OPTIONS, file=file)


def test_the_file_knows_options_by_their_content(tmp_path):
    """Not by what is printed of them: long tensors, addresses."""
    file, net = tmp_path / "table.csv", {"net": randomized(mlp(1), 0)}
    noise = torch.full((40, 1), 0.5, dtype=F64)

    def again(noise=noise, seed=0):
        options = {"method": "adam", "max_iterations": 2, "generator": torch.Generator().manual_seed(seed)}
        return compare(net, X, Y, Gaussian(noise), tune=None, train_options=options, file=file, progress=False)

    first = again()
    second = again()  # from the file
    assert second.column("seconds") == first.column("seconds") and not second.models
    with pytest.raises(ValueError, match="other data or options"):
        again(seed=1)
    noise = noise.clone()
    noise[20] = 0.4
    with pytest.raises(ValueError, match="another candidate by the name of 'net'"):
        again(noise)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="Make it first"):
        quick({"net": GRID["1 x 2 Tanh"]}, file=tmp_path / "none" / "table.csv")


# ---- parallel


def test_in_parallel_as_one_after_the_other(comparison):
    parallel = quick(n_jobs=2)
    alone = {row["candidate"]: row["evidence"] for row in comparison.rows}
    for row in parallel.rows:
        assert abs(row["evidence"] - alone[row["candidate"]]) < 1e-3
    assert [row["candidate"] for row in parallel.rows] == list(GRID)
    assert set(parallel.models) == set(GRID)


class OnlyLists(joblib.parallel.ThreadingBackend):
    """A backend that hands results over at the end alone, as some clusters' do."""

    supports_return_generator = False


def test_a_backend_without_generators():
    joblib.register_parallel_backend("only_lists", OnlyLists)
    with joblib.parallel_config("only_lists", n_jobs=2):
        result = quick({"net": GRID["1 x 2 Tanh"]}, tune=None)
    assert np.isfinite(result.rows[0]["evidence"])


# ---- what is refused, what fails


class Fails(torch.nn.Module):
    """Works on a few examples, as checks do, and no more."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(1, 1).double()

    def forward(self, x):
        if len(x) > 20:
            raise RuntimeError("out of order")
        return self.body(x)


def test_a_candidate_that_fails_does_not_stop_the_others(tmp_path):
    file, candidates = tmp_path / "table.csv", {"bad": Fails(), "net": GRID["1 x 2 Tanh"]}
    with pytest.warns(RuntimeWarning, match="1 of 2 candidates have failed: bad"):
        comparison = quick(candidates, tune=None, file=file)
    assert comparison.best == "net"
    assert "bad failed: RuntimeError: out of order" in str(comparison)
    assert "out of order" in str(Comparison.from_csv(file))
    with pytest.warns(RuntimeWarning):
        quick(candidates, tune=None, file=file)  # once more


def test_refusals():
    net = GRID["1 x 2 Tanh"]
    for message, options in (
        ("There are no candidates", {"candidates": {}}),
        ("tune must be", {"candidates": {"net": net}, "tune": "before"}),
        ("kind must be", {"candidates": {"net": net}, "kind": "aic"}),
        ("restarts must be", {"candidates": {"net": net}, "restarts": 0}),
        ("give both, or neither", {"candidates": {"net": net}, "test_x": X}),
    ):
        with pytest.raises(ValueError, match=message):
            quick(**options)
    with pytest.raises(TypeError, match="got int") as caught:
        quick({"number": lambda: 3})
    assert "candidate 'number'" in str(caught.value.__notes__)
    with pytest.raises(RuntimeError) as caught:
        quick({"net": mlp(3).double()})
    assert "candidate 'net'" in str(caught.value.__notes__)
    with pytest.raises(ValueError, match="All labels are equal"):
        compare({"net": net}, X, torch.ones_like(Y), Gaussian(0.5))
    with pytest.raises(ValueError, match="There is one example"):
        compare({"net": net}, X[:1], Y[:1], Gaussian(0.5))
    with pytest.raises(ValueError, match="Gaussian noise"):
        compare({"rbf": gpytorch.kernels.RBFKernel()}, X, (Y[:, 0] > 0).long(), Categorical())
    with pytest.raises(ValueError, match="GP of one output"):
        compare({"rbf": gpytorch.kernels.RBFKernel()}, X, torch.cat([Y, Y], 1), Gaussian(0.5))
    with pytest.raises(ValueError, match="GP evidence .* does not exist") as caught:
        compare({"net": randomized(mlp(1, num_outputs=2), 0)}, X, (Y[:, 0] > 0).long(), Categorical(), kind="gp")
    assert "candidate 'net'" in str(caught.value.__notes__)
    with pytest.raises(ValueError, match="train_options has 'every'; fit takes"):
        quick({"net": net}, train_options={"every": 3})
    with pytest.raises(ValueError, match="gp_options has 'prior_variance'"):
        quick({"net": net}, gp_options={"prior_variance": torch.ones(7)})
    with pytest.raises(ValueError, match="other training inputs"):
        quick({"own": functools.partial(exact_gp_mll, X + 1)})


def test_constant_labels_without_tuning():
    (row,) = compare({"net": GRID["1 x 2 Tanh"]}, X, torch.ones_like(Y), Gaussian(0.5), tune=None, progress=False).rows
    assert np.isfinite(row["evidence"])


@pytest.mark.parametrize("name", ["evidence", "delta", "test_nll", "_settings"])
def test_settings_are_not_called_as_own_columns(name):
    with pytest.raises(ValueError, match="own columns"):
        Candidate(mlp(), settings={name: 1.0})


def test_own_columns_are_all_known(comparison):
    own = {name for row in comparison.rows for name in row if name not in row["_settings"]}
    assert {name for name in own if not name.startswith(("_", "test_"))} <= set(selection.OWN_COLUMNS)
