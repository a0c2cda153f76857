"""Training: one net, many at once, and with the evidence."""

import copy

import pytest
import torch
from oracle import assert_close
from problems import F64, OddNet, TokenNet, mlp, randomized
from torch import nn

import gpytorch_dnn2gp as dnn2gp
from gpytorch_dnn2gp import training
from gpytorch_dnn2gp.losses import Categorical, Gaussian

X = torch.randn(40, 2, dtype=F64, generator=torch.Generator().manual_seed(3))
Y = torch.sin(2 * X[:, :1]) + 0.3 * torch.randn(40, 1, dtype=F64, generator=torch.Generator().manual_seed(4))


def nets(m: int, make=mlp) -> list[nn.Module]:
    return [randomized(make(), seed) for seed in range(m)]


def weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def gradient_norm(net, x, y, loss, delta) -> float:
    return dnn2gp.LaplaceGP(net, x, y, loss, delta).stationarity().gradient_norm


# ---- one net


@pytest.mark.parametrize("method", ["lbfgs", "adam"])
def test_fit_reaches_a_stationary_point(method):
    (net,) = nets(1)
    net.train()
    options = {"max_iterations": 2000} if method == "adam" else {}
    tolerance = {"lbfgs": 1e-4, "adam": 0.2}[method]
    result = training.fit(net, X, Y, Gaussian(0.5), 2.0, method=method, gradient_tolerance=tolerance, **options)
    assert result.converged and net.training and all(p.grad is None for p in net.parameters())
    assert abs(gradient_norm(net, X, Y, Gaussian(0.5), 2.0) - result.gradient_norm) < 1e-9
    assert result.objective[-1] < result.objective[0]


@pytest.mark.parametrize("evaluations", [1, 2, 7])
def test_fit_by_lbfgs_keeps_to_its_evaluations(evaluations):
    (net,) = nets(1)
    result = training.fit(net, X, Y, Gaussian(0.5), 2.0, max_iterations=evaluations)
    assert len(result.objective) == evaluations and not result.converged
    assert float(training._Problem(net, X, Y, Gaussian(0.5), 2.0, None)()[0]) <= result.objective[0]


def test_fit_at_a_stationary_point_stays_there():
    (net,) = nets(1)
    training.fit(net, X, Y, Gaussian(0.5), 2.0, gradient_tolerance=1e-6)
    before = weights(net)
    result = training.fit(net, X, Y, Gaussian(0.5), 2.0, gradient_tolerance=1e-4)
    assert result.converged and len(result.objective) == 1
    assert torch.equal(weights(net), before)


@pytest.mark.parametrize("outside", [torch.nan, torch.inf])
def test_fit_by_lbfgs_goes_on_where_the_loss_is_not_finite(outside):
    """Steps over a barrier, -log(0.4 - f), are taken back; SciPy's line search alone gives up there."""

    def fn(f, y):
        inside = f < 0.4
        return torch.where(inside, 50 * (f - y).square() - torch.where(inside, 0.4 - f, 1.0).log(), outside).sum()

    (net,) = nets(1)
    for p in net[-1].parameters():
        nn.init.zeros_(p)
    loss, y = dnn2gp.losses.from_callable(fn), Y.clamp(max=0.3)
    result = training.fit(net, X, y, loss, 1.0, max_iterations=3000, gradient_tolerance=1e-3)
    values = torch.tensor(result.objective)
    assert not values.isfinite().all(), "it never went there"
    assert result.converged and (net(X) < 0.4).all() and values[-1] < values[0]


def test_fit_in_single_precision():
    (net,), (other,) = nets(1), nets(1)
    result = training.fit(net.float(), X.float(), Y.float(), Gaussian(0.5), 2.0)
    exact = training.fit(other, X, Y, Gaussian(0.5), 2.0)
    assert result.gradient_norm < 0.05 and abs(result.objective[-1] - exact.objective[-1]) < 1e-3


def test_interrupted_fit_keeps_the_weights_it_has_accepted(monkeypatch):
    (net,) = nets(1)
    original, values = training._Problem.__call__, []

    def interrupting(self):
        if len(values) == 20:
            raise KeyboardInterrupt
        values.append(original(self))
        return values[-1]

    monkeypatch.setattr(training._Problem, "__call__", interrupting)
    with pytest.raises(KeyboardInterrupt):
        training.fit(net, X, Y, Gaussian(0.5), 2.0)
    monkeypatch.undo()
    reached = float(training._Problem(net, X, Y, Gaussian(0.5), 2.0, None)()[0])
    assert reached < float(values[0][0]) and any(abs(reached - float(v)) < 1e-9 for v, _ in values)


def test_fit_by_minibatches():
    (net,) = nets(1)
    generator = torch.Generator().manual_seed(0)
    result = training.fit(
        net, X, Y, Gaussian(0.5), 2.0, method="adam", batch_size=16, max_iterations=400, generator=generator
    )
    assert result.gradient_norm < 3.0 and len(result.objective) == 400


# ---- several nets


def test_many_are_as_each_alone():
    """Restarts at several delta and several sigma, with one precision for each group."""
    together, alone = nets(4), nets(4)
    losses = [Gaussian(0.4), Gaussian(0.8)] * 2
    losses[2] = losses[0]
    deltas = torch.tensor([[3.0, 1.0], [1.0, 2.0], [4.0, 4.0], [2.0, 5.0]], dtype=F64)
    groups = ["0", "2"]
    fits = training.fit_many(together, X, Y, losses, deltas, groups, gradient_tolerance=1e-7)
    for i, net in enumerate(alone):
        training.fit(net, X, Y, losses[i], deltas[i], groups, gradient_tolerance=1e-7)
        gp = dnn2gp.LaplaceGP(together[i], X, Y, losses[i], deltas[i], groups)
        assert fits[i].converged and gp.stationarity().gradient_norm < 1.1e-7
        own = dnn2gp.LaplaceGP(net, X, Y, losses[i], deltas[i], groups)
        # the same valley, or another one that is a minimum as well
        if abs(float((own.log_evidence() - gp.log_evidence()).detach())) < 1e-6:
            assert_close(weights(net), weights(together[i]), 1e-5)


def test_many_from_the_same_start_agree_and_one_minimum_is_fits():
    """A convex problem has one minimum: that of the linear model in closed form."""
    linear = [nn.Linear(2, 1).double() for _ in range(3)]
    deltas = torch.tensor([0.1, 1.0, 10.0], dtype=F64)
    training.fit_many(linear, X, Y, Gaussian(0.5), deltas, gradient_tolerance=1e-8)
    A = torch.cat([X, torch.ones(40, 1, dtype=F64)], 1)
    for net, delta in zip(linear, deltas):
        w = torch.linalg.solve(A.T @ A / 0.25 + delta * torch.eye(3, dtype=F64), A.T @ Y / 0.25)
        assert_close(weights(net), w[:, 0])


def test_folds():
    """A net that does not see some examples ends where it ends without them."""
    linear = [nn.Linear(2, 3).double() for _ in range(4)]
    y = torch.arange(40) % 3
    included = torch.ones(4, 40, dtype=torch.bool)
    for i in range(4):
        included[i, i::4] = False
    training.fit_many(linear, X, y, Categorical(), 0.5, included=included, gradient_tolerance=1e-8)
    for net, mask in zip(linear, included):
        assert gradient_norm(net, X[mask], y[mask], Categorical(), 0.5) < 1.1e-8


def test_other_data_for_each_net():
    linear = [nn.Linear(2, 1).double() for _ in range(2)]
    xs, ys = [X[:20], X[20:]], [Y[:20], Y[20:]]
    training.fit_many(linear, xs, ys, Gaussian(0.5), 1.0, gradient_tolerance=1e-8)
    for net, x, y in zip(linear, xs, ys):
        assert gradient_norm(net, x, y, Gaussian(0.5), 1.0) < 1.1e-8


def test_many_by_adam():
    together = nets(3)
    fits = training.fit_many(together, X, Y, Gaussian(0.5), 2.0, method="adam", max_iterations=2000)
    assert all(fit.gradient_norm < 1.0 for fit in fits)


@pytest.mark.parametrize("make", [OddNet, TokenNet])
def test_many_of_any_architecture(make):
    """Frozen parameters and buffers of each net's own; recurrences; modes are restored."""
    together = nets(3, make)
    x = X if make is OddNet else torch.randint(7, (40, 4), generator=torch.Generator().manual_seed(0))
    y = torch.cat([Y, Y], 1) if make is OddNet else torch.arange(40) % 3
    loss = Gaussian(0.5) if make is OddNet else Categorical()
    fits = training.fit_many(together, x, y, loss, 2.0, gradient_tolerance=1e-6)
    assert all(fit.converged for fit in fits)
    assert all(net.training for net in together)
    options = {} if make is OddNet else {"input_dtype": torch.long}
    for net in together:
        assert dnn2gp.LaplaceGP(net, x, y, loss, 2.0, **options).stationarity().gradient_norm < 1.1e-6


def test_an_interrupted_training_keeps_what_it_has_reached(monkeypatch):
    together = nets(2)
    before = [weights(net) for net in together]
    original, calls = training._StackedProblem.__call__, []

    def interrupting(self, *args):
        calls.append(0)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(training._StackedProblem, "__call__", interrupting)
    with pytest.raises(KeyboardInterrupt):
        training.fit_many(together, X, Y, Gaussian(0.5), 2.0)
    monkeypatch.undo()
    for net, w in zip(together, before):
        now = weights(net)
        assert torch.isfinite(now).all() and not torch.equal(now, w)


def test_refusals_of_many():
    (net,) = nets(1)
    with pytest.raises(ValueError, match="same net is given twice"):
        training.fit_many([net, net], X, Y, Gaussian(0.5))
    with pytest.raises(ValueError, match="Net 1 is not built as net 0"):
        training.fit_many([net, mlp(width=5).double()], X, Y, Gaussian(0.5))
    with pytest.raises(ValueError, match="There are no nets"):
        training.fit_many([], X, Y, Gaussian(0.5))
    with pytest.raises(ValueError, match=r"prior_precision has shape \(3,\)"):
        training.fit_many(nets(2), X, Y, Gaussian(0.5), [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="unequal size"):
        training.fit_many(nets(2), [X, X[1:]], Y, Gaussian(0.5))
    with pytest.raises(ValueError, match="included must be"):
        training.fit_many(nets(2), X, Y, Gaussian(0.5), included=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="1 losses for 2 nets"):
        training.fit_many(nets(2), X, Y, [Gaussian(0.5)])
    with pytest.raises(ValueError, match="method must be"):
        training.fit_many(nets(2), X, Y, Gaussian(0.5), method="sgd")


class Sampling(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(2, 3, batch_first=True)
        self.out = nn.Linear(3, 1)

    def forward(self, x):
        return self.out(self.gru(x[:, None])[0][:, 0])


def test_what_cannot_be_stacked_is_told():
    gru = [Sampling().double() for _ in range(2)]
    with pytest.raises(RuntimeError) as caught:
        training.fit_many(gru, X, Y, Gaussian(0.5))
    assert "train them one by one" in " ".join(caught.value.__notes__)


# ---- with the evidence


@pytest.mark.parametrize("method", ["lbfgs", "adam"])
def test_train_with_evidence(method):
    (net,) = nets(1)
    net = copy.deepcopy(net)
    options = {"max_iterations": 800, "every": 200} if method == "adam" else {}
    result = training.train_with_evidence(net, X, Y, Gaussian(1.0), 1.0, method=method, **options)
    assert_close(weights(net), result.gp.linearization.weights)
    assert_close(torch.tensor(result.evidence, dtype=F64), result.gp.log_evidence())
    assert result.history[result.best].evidence_after == max(item.evidence_after for item in result.history)
    assert result.evidence > result.history[0].evidence_before
    assert 0.2 < float(result.gp.noise.detach().sqrt()) < 0.5  # sigma is 0.3
    assert net.training and "round" in repr(result)


def test_train_with_evidence_ends_in_agreement():
    """By L-BFGS the weights at the end are stationary at the delta and sigma that were chosen."""
    (net,) = nets(1)
    gp = training.train_with_evidence(net, X, Y, Gaussian(1.0), 1.0).gp
    assert gp.stationarity().newton_decrement < 1e-6
    assert gradient_norm(net, X, Y, gp.loss, float(gp.prior_precision.detach())) < 1.1e-4


def test_train_with_evidence_settles_where_there_is_little_noise(monkeypatch):
    """A few short rounds leave sigma far too large; weights and hyperparameters in turn mend it."""
    y = torch.sin(2 * X[:, :1]) + 0.001 * Y

    def trained():
        (net,) = nets(1)
        return training.train_with_evidence(net, X, y, Gaussian(0.3), 1.0, max_iterations=200, every=50)

    settled = trained()
    monkeypatch.setattr(training, "MAX_SETTLING", 1)
    once = trained()
    assert settled.evidence > once.evidence + 1
    assert settled.gp.noise < 0.8 * once.gp.noise
    assert_close(torch.tensor(settled.evidence, dtype=F64), settled.gp.log_evidence())


def test_train_with_evidence_of_classes_by_layer():
    y = (X[:, 0] + X[:, 1] > 0).long()
    net = randomized(mlp(num_outputs=2), 0)
    result = training.train_with_evidence(net, X, y, Categorical(), [1.0] * 4, max_iterations=600, every=100)
    assert result.gp.prior_precision.shape == (4,) and result.gp.noise is None
    assert ((net(X).argmax(-1) == y).double().mean()) > 0.9


def test_train_with_evidence_by_blocks():
    (net,) = nets(1)
    result = training.train_with_evidence(net, X, Y, Gaussian(1.0), 1.0, max_iterations=600, block_size=10)
    assert result.evidence < float(result.gp.log_evidence().detach())  # a lower bound


def test_train_with_evidence_interrupted_keeps_the_best(monkeypatch):
    (net,) = nets(1)
    original, calls = training.fit_evidence, []

    def interrupting(gp, **kwargs):
        calls.append(gp)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(gp, **kwargs)

    monkeypatch.setattr(training, "fit_evidence", interrupting)
    with pytest.raises(KeyboardInterrupt):
        training.train_with_evidence(net, X, Y, Gaussian(1.0), 1.0, every=20)
    assert any(torch.equal(weights(net), gp.linearization.weights) for gp in calls[:2])


def test_train_with_evidence_refusals():
    (net,) = nets(1)
    before = weights(net)
    with pytest.raises(ValueError, match="must leave room"):
        training.train_with_evidence(net, X, Y, Gaussian(1.0), max_iterations=100, every=200)
    with pytest.raises(ValueError, match="All labels are equal"):
        training.train_with_evidence(net, X, torch.ones_like(Y), Gaussian(1.0))
    with pytest.raises(ValueError, match="There is one example"):
        training.train_with_evidence(net, X[:1], Y[:1], Gaussian(1.0))
    assert torch.equal(weights(net), before)
