"""VOGGN, OGGN, VOGN, OGN against their formulas by hand, and what a torch optimizer owes its user."""

import copy
import io
import pickle

import oracle
import pytest
import torch
from oracle import assert_close
from problems import CASES, F64, mlp, problem, randomized
from torch import nn

import gpytorch_dnn2gp as dnn2gp
from gpytorch_dnn2gp import optim, training

TOL = 1e-10
ALGORITHMS = ["VOGGN", "OGGN", "VOGN", "OGN"]


def made(name, p, train_size=None, **options):
    """The optimizer called ``name`` for a problem, on a copy of its net."""
    net = copy.deepcopy(p.net)
    options = {"lr": 0.3, "beta": 0.2, "prior_precision": 0.7, **options}
    return getattr(optim, name)(net, p.loss(), train_size=train_size or len(p.x), **options)


def at(net, w):
    """A copy of the net with other weights."""
    net = copy.deepcopy(net)
    pieces = w.split([p.numel() for p in net.parameters() if p.requires_grad])
    with torch.no_grad():
        for p, piece in zip([p for p in net.parameters() if p.requires_grad], pieces, strict=True):
            p.copy_(piece.view_as(p))
    return net


def pieces(p, net, x, y):
    """J, r, Lambda by hand at the weights of ``net``."""
    f = oracle.outputs(net, x)
    labels = y[:, None] if y.is_floating_point() and y.dim() == 1 else y
    return oracle.jacobian(net, x), p.hand.residual(f, labels), p.hand.lam(f, labels)


def next_state(it, p, net, x, y, gradient_features=False):
    """mean and S of the next iterate by the formulas, dense and one sample after the other."""
    diagonal = it.data_precision.dim() == 1
    scale = it.train_size / len(x) / len(it.samples)
    G, g = 0.0, 0.0
    for w in it.samples:
        J, r, lam = pieces(p, at(net, w), x, y)
        rows = torch.einsum("nk,nkp->np", r, J)
        g = g + scale * rows.sum(0)
        G = G + scale * (rows.T @ rows if gradient_features else torch.einsum("nkp,nkl,nlq->pq", J, lam, J))
    S = (1 - it.beta) * it.data_precision + it.beta * (G.diagonal() if diagonal else G)
    precision = torch.diag(S + it.prior_precision) if diagonal else S + torch.diag(it.prior_precision)
    return it.mean - torch.linalg.solve(precision, it.lr * g + it.drift), S


def batch(p):
    return p.shaped(p.x), p.y


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_steps_follow_the_formulas(name, case):
    p = problem(case)
    opt = made(name, p, **({"mc_samples": 2} if name.startswith("V") else {}))
    x, y = batch(p)
    for _ in range(2):
        it = opt.iterate()
        if not name.startswith("V"):
            assert torch.equal(it.samples, it.mean[None])
        mean, S = next_state(it, p, opt.net, x, y)
        opt.step(x, y)
        assert_close(opt.mean, mean, TOL, "mean")
        assert_close(opt.data_precision, S, TOL, "S")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_squared_gradients_are_an_option(name):
    p = problem("categorical")
    opt = made(name, p, features="gradient")
    x, y = batch(p)
    mean, S = next_state(opt.iterate(), p, opt.net, x, y, gradient_features=True)
    opt.step(x, y)
    assert_close(opt.mean, mean, TOL)
    assert_close(opt.data_precision, S, TOL)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_minibatches_are_scaled_to_all_data(name):
    p = problem("categorical", n=7)
    opt = made(name, p)
    x, y = p.x[:3], p.y[:3]
    mean, S = next_state(opt.iterate(), p, opt.net, x, y)
    opt.step(x, y)
    assert_close(opt.mean, mean, TOL)
    assert_close(opt.data_precision, S, TOL)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_momentum_and_bias_correction_are_adams(name):
    p = problem("gaussian")
    beta, gamma, lr, delta = 0.2, 0.8, 0.3, 0.7
    opt = made(name, p, momentum=gamma, bias_correction=True)
    x, y = batch(p)
    S, M = torch.zeros_like(opt.data_precision), torch.zeros_like(opt.mean)
    for t in range(1, 4):
        it, mean = opt.iterate(), opt.mean
        J, r, lam = pieces(p, at(opt.net, it.samples[0]), x, y)
        G = torch.einsum("nkp,nkl,nlq->pq", J, lam, J)
        S = (1 - beta) * S + beta * (G.diagonal() if opt.diagonal else G)
        M = gamma * M + (1 - gamma) * (torch.einsum("nkp,nk->p", J, r) + delta * mean)
        S_hat, M_hat = S / (1 - (1 - beta) ** t), M / (1 - gamma**t)
        precision = torch.diag(S_hat) if opt.diagonal else S_hat
        expected = mean - lr * torch.linalg.solve(precision + delta * torch.eye(len(mean), dtype=F64), M_hat)
        by_iterate, _ = next_state(it, p, opt.net, x, y)
        opt.step(x, y)
        assert_close(opt.mean, expected, TOL)
        assert_close(opt.data_precision, S_hat, TOL)
        assert_close(by_iterate, expected, TOL, "the iterate's own step")


def test_temperature_divides_the_loss():
    p = problem("gaussian")
    cold, scaled = made("VOGGN", p, temperature=0.25), made("VOGGN", p)
    scaled.loss = dnn2gp.losses.Gaussian(0.5 * 0.3)
    scaled.state["gaussian"]["generator"] = cold.state["gaussian"]["generator"]
    for opt in (cold, scaled):
        opt.step(*batch(p))
    assert_close(cold.mean, scaled.mean, TOL)
    assert_close(cold.data_precision, scaled.data_precision, TOL)


@pytest.mark.parametrize("name", ["OGGN", "OGN"])
def test_groups_have_their_own_precision(name):
    p = problem("gaussian")
    opt = made(name, p, prior_precision=[0.5, 3.0], groups=[["2"], ["0"]])
    assert_close(opt.prior_precision, oracle.per_group(p.net, [3.0, 0.5], [["0"], ["2"]]))
    mean, S = next_state(opt.iterate(), p, opt.net, *batch(p))
    opt.step(*batch(p))
    assert_close(opt.mean, mean, TOL)
    assert_close(opt.data_precision, S, TOL)


@pytest.mark.parametrize("name", ["OGGN", "OGN"])
def test_each_weight_may_have_its_own_precision(name):
    p = problem("gaussian")
    delta = torch.linspace(0.5, 2.0, sum(q.numel() for q in p.net.parameters()), dtype=F64)
    opt = made(name, p, prior_precision=delta)
    assert_close(opt.prior_precision, delta)
    it = opt.iterate()
    mean, S = next_state(it, p, opt.net, *batch(p))
    gp = dnn2gp.VariationalGP(p.net, it, p.x, p.y, p.loss(), converged=True)
    assert_close(gp.covar_module.prior_variance, 1 / delta)
    opt.step(*batch(p))
    assert_close(opt.mean, mean, TOL)
    assert_close(opt.data_precision, S, TOL)


def test_groups_may_differ_in_rates_where_the_covariance_is_diagonal():
    p = problem("gaussian")
    opt = made("OGN", p, prior_precision=[0.5, 0.5], groups=[["2"], ["0"]], momentum=0.5)
    opt.param_groups[1]["lr"] = 0.0  # of "0"
    opt.param_groups[1]["beta"] = 1.0
    before = opt.mean
    with pytest.raises(ValueError, match="differ in lr"):
        opt.iterate()
    opt.step(*batch(p))
    first = p.net[0].weight.numel() + p.net[0].bias.numel()
    assert torch.equal(opt.mean[:first], before[:first])
    assert not torch.equal(opt.mean[first:], before[first:])
    opt = made("OGGN", p, prior_precision=[0.5, 0.5], groups=[["2"], ["0"]])
    opt.param_groups[1]["lr"] = 0.1
    with pytest.raises(ValueError, match="one lr, beta and momentum"):
        opt.step(*batch(p))


def test_schedulers_change_the_step():
    p = problem("gaussian")
    opt = made("OGGN", p)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, gamma=0.5)
    opt.step(*batch(p))
    scheduler.step()
    assert opt.param_groups[0]["lr"] == 0.15
    mean, _ = next_state(opt.iterate(), p, opt.net, *batch(p))
    opt.step(*batch(p))
    assert_close(opt.mean, mean, TOL)


# "b" was stopped near a saddle: short steps take long to leave it; "a" overshoots with whole ones
@pytest.mark.parametrize(("name", "lr"), [("regression_a", 0.3), ("regression_b", 1.0)])
def test_oggn_stops_where_the_loss_is_stationary_with_laplaces_gaussian(name, lr, reference):
    data = reference(f"dnn2gp/{name}")
    meta = data["meta"]
    width = data["params"]["fc_in.weight"].shape[0]
    act = nn.Tanh if meta.get("activation", "tanh") == "tanh" else nn.Sigmoid
    hidden = [k for k in data["params"] if k.endswith("weight") and k not in ("fc_in.weight", "fc_out.weight")]
    layers = [nn.Linear(2, width), act()]
    for _ in hidden:
        layers += [nn.Linear(width, width), act()]
    net = nn.Sequential(*layers, nn.Linear(width, 1)).double()
    with torch.no_grad():
        for own, given in zip(net.parameters(), data["params"].values(), strict=True):
            own.copy_(given.reshape(own.shape))
    loss, delta = dnn2gp.losses.Gaussian(meta["sigma_noise"]), meta["prior_precision"]
    x, y = data["x"], data["y"][:, None]
    opt = optim.OGGN(net, loss, train_size=len(x), prior_precision=delta, lr=lr, beta=lr)
    for _ in range(200):
        opt.step(x, y)
    gp = dnn2gp.LaplaceGP(net, x, y, loss, prior_precision=delta)
    assert gp.stationarity().gradient_norm < 1e-6
    assert_close(opt.gaussian().precision(), gp.weight_posterior().precision(), 1e-8)


# ---- what a torch optimizer owes its user


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_resumed_run_goes_on_to_the_bit(name):
    p = problem("categorical")
    opt = made(name, p, momentum=0.9, bias_correction=True, **({"mc_samples": 3} if name[0] == "V" else {}))
    for _ in range(3):
        opt.step(*batch(p))
    file = io.BytesIO()
    torch.save({"net": opt.net.state_dict(), "opt": opt.state_dict()}, file)
    opt.iterate()  # looks ahead, and changes nothing
    for _ in range(3):
        opt.step(*batch(p))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = made(name, p, lr=99.0, **({"mc_samples": 3} if name[0] == "V" else {}), bias_correction=True)
    again.net.load_state_dict(saved["net"])
    again.load_state_dict(saved["opt"])
    for _ in range(3):
        again.step(*batch(p))
    assert torch.equal(opt.mean, again.mean)
    assert torch.equal(opt.data_precision, again.data_precision)
    assert torch.equal(opt.iterate().samples, again.iterate().samples)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_copies_train_a_net_of_their_own(name, duplicate):
    p = problem("categorical")
    opt = made(name, p, momentum=0.9)
    opt.step(*batch(p))
    mean = opt.mean
    twin = duplicate(opt)
    twin.step(*batch(p))
    assert torch.equal(opt.mean, mean) and not torch.equal(twin.mean, mean)
    opt.step(*batch(p))
    assert torch.equal(opt.mean, twin.mean) and torch.equal(opt.data_precision, twin.data_precision)
    with pytest.raises(ValueError, match="another net|keeps a"):
        twin.load_state_dict(made("OGGN" if twin.diagonal else "OGN", p).state_dict())


def test_a_state_dict_follows_the_nets_dtype():
    p = problem("categorical")
    double = made("VOGN", p)
    double.step(*batch(p))
    single = optim.VOGN(copy.deepcopy(double.net).float(), p.loss(), train_size=len(p.x), prior_precision=0.7)
    single.load_state_dict(double.state_dict())
    assert single.data_precision.dtype == single.gaussian().variance.dtype == torch.float32
    assert_close(single.data_precision.double(), double.data_precision, 1e-6)
    single.step(p.x.float(), p.y)


def test_a_state_dict_is_a_snapshot():
    p = problem("gaussian")
    opt = made("VOGN", p)
    state, mean = opt.state_dict(), opt.mean
    S = opt.data_precision.clone()
    opt.step(*batch(p))
    assert not torch.equal(opt.data_precision, S) and not torch.equal(opt.mean, mean)
    assert torch.equal(state["state"]["gaussian"]["data_precision"], S)


def test_the_iterate_holds_the_samples_of_the_next_step():
    p = problem("gaussian")
    opt = made("VOGGN", p, mc_samples=4)
    first, again = opt.iterate(), opt.iterate()
    assert torch.equal(first.samples, again.samples) and first.samples.shape == (4, len(opt.mean))
    opt.step(*batch(p))
    assert not torch.equal(opt.iterate().samples, first.samples)


@pytest.mark.parametrize("name", ["VOGGN", "VOGN"])
def test_samples_have_the_posteriors_moments(name):
    p = problem("gaussian")
    opt = made(name, p)
    opt.step(*batch(p))
    opt.mc_samples = 20_000
    samples, cov = opt.iterate().samples, opt.gaussian().covariance()
    assert_close(torch.cov(samples.T), cov, 0.05)
    assert float((samples.mean(0) - opt.mean).abs().max()) < 4 * float(cov.diagonal().max().sqrt()) / 100


def test_a_posterior_sample_is_taken_out_whatever_happens():
    p = problem("gaussian")
    opt = made("VOGN", p)
    before, mean = copy.deepcopy(opt.net.state_dict()), opt.mean
    with pytest.raises(KeyError), opt.posterior_sample() as w:
        assert torch.equal(oracle.weights(opt.net), w) and not torch.equal(w, mean)
        # what is asked of the optimizer meanwhile is about the mean
        assert torch.equal(opt.mean, mean) and torch.equal(opt.iterate().mean, mean)
        assert torch.equal(opt.gaussian().mean, mean)
        with pytest.raises(RuntimeError, match="posterior sample is in the net"):
            opt.step(*batch(p))
        with pytest.raises(RuntimeError, match="There is a sample"), opt.posterior_sample():
            pass
        raise KeyError
    for name, value in opt.net.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_refused_step_changes_nothing(name):
    p = problem("gaussian")
    opt = made(name, p)
    opt.step(*batch(p))
    state, mean = copy.deepcopy(opt.state_dict()), opt.mean

    class Explodes(dnn2gp.losses.Gaussian):
        def residual(self, f, y):
            return super().residual(f, y) * torch.nan

    good, opt.loss = opt.loss, Explodes(0.3)
    opt.net.train()
    with pytest.raises(ValueError, match="The step is refused; net and state are as they were"):
        opt.step(*batch(p))
    assert opt.net.training
    assert torch.equal(opt.mean, mean)
    for key, value in opt.state_dict()["state"]["gaussian"].items():
        old = state["state"]["gaussian"][key]
        assert torch.equal(value, old) if isinstance(value, torch.Tensor) else value == old
    opt.loss = good
    opt.step(*batch(p))


def test_the_nets_mode_and_gradients_are_left_alone():
    net = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 1)).double()
    net.train()
    net[1].eval()
    opt = optim.VOGN(net, dnn2gp.losses.Gaussian(0.3), train_size=5, lr=0.1)
    marks = [torch.full_like(q, 7.0) for q in net.parameters()]
    for q, mark in zip(net.parameters(), marks, strict=True):
        q.grad = mark
    opt.step(torch.randn(5, 2, dtype=F64), torch.randn(5, 1, dtype=F64))
    assert net.training and not net[1].training and net[2].training
    assert all(q.grad is mark and bool((mark == 7).all()) for q, mark in zip(net.parameters(), marks, strict=True))


def test_float32_follows_float64():
    p = problem("categorical")
    double, single = made("OGN", p), made("OGN", p)
    single = optim.OGN(single.net.float(), p.loss(), train_size=len(p.x), lr=0.3, beta=0.2, prior_precision=0.7)
    for _ in range(5):
        double.step(p.x, p.y)
        single.step(p.x.float(), p.y)
    assert_close(single.mean.double(), double.mean, 1e-4)


def test_training_lowers_the_loss():
    p = problem("categorical", n=40)
    net = randomized(mlp(num_outputs=3), 1)
    y = (p.x[:, 0] > 0).long() + (p.x[:, 1] > 0.5).long()
    opt = optim.VOGN(net, dnn2gp.losses.Categorical(), train_size=40, prior_precision=0.1, lr=0.1, beta=0.1)
    values = [float(opt.step(p.x, y)) for _ in range(150)]
    assert sum(values[-10:]) < 0.5 * sum(values[:10])


# ---- runs over minibatches, and what is recorded of them


def test_train_runs_over_all_data_and_schedules():
    p = problem("categorical", n=7)
    opt, hand = made("VOGN", p), made("VOGN", p)
    hand.state["gaussian"]["generator"] = opt.state["gaussian"]["generator"]
    values = training.train(
        opt,
        p.x,
        p.y,
        epochs=2,
        batch_size=3,
        scheduler=torch.optim.lr_scheduler.ExponentialLR(opt, 0.9),
        generator=torch.Generator().manual_seed(5),
    )
    generator, expected = torch.Generator().manual_seed(5), []
    for _ in range(2):
        for index in torch.randperm(7, generator=generator).split(3):
            expected.append(float(hand.step(p.x[index], p.y[index])))
            hand.param_groups[0]["lr"] *= 0.9
    assert values == expected
    assert torch.equal(opt.mean, hand.mean)


def test_a_recorder_keeps_the_evidence_and_the_gps_along_training():
    p = problem("gaussian")
    opt, undisturbed = made("VOGGN", p), made("VOGGN", p)
    undisturbed.state["gaussian"]["generator"] = opt.state["gaussian"]["generator"]
    record = training.Recorder(
        lambda: dnn2gp.VariationalGP(opt.net, opt.iterate(), p.x, p.y, p.loss()), every=2, evidence="gp", keep=True
    )
    training.train(opt, p.x, p.y, epochs=5, callback=record)
    training.train(undisturbed, p.x, p.y, epochs=5)
    assert record.steps == [2, 4] and len(record.gps) == 2
    assert record.evidences == [gp.log_evidence("gp").item() for gp in record.gps]
    assert torch.equal(opt.mean, undisturbed.mean)


@pytest.mark.parametrize("method", ["adam", "lbfgs"])
def test_a_recorder_along_map_training(method):
    p = problem("gaussian")
    net = copy.deepcopy(p.net)
    record = training.Recorder(lambda: dnn2gp.LaplaceGP(net, p.x, p.y, p.loss(), 0.7), every=3)

    def fit(net, **options):
        generator = torch.Generator().manual_seed(0)
        return training.fit(
            net, p.x, p.y, p.loss(), 0.7, method=method, max_iterations=9, generator=generator, **options
        )

    fitted = fit(net, callback=record)
    assert record.steps == list(range(3, len(fitted.objective) + 1, 3)) and len(record.evidences) == len(record.steps)
    assert fit(copy.deepcopy(p.net)).objective == fitted.objective
