"""Theorem 2: an iterate's GP, conditioned on the batch, is the next iterate."""

import copy

import oracle
import pytest
import torch
from oracle import assert_close
from problems import CASES, F64, GAUSSIAN, INVERTIBLE, problem
from test_optim import at, batch, made

import gpytorch_dnn2gp as dnn2gp
from gpytorch_dnn2gp import VariationalGP, optim

TOL = 1e-10


def variational(p, it, x=None, y=None, **options):
    shape = {"input_shape": p.input_shape, "input_dtype": p.input_dtype}
    x, y = p.x if x is None else x, p.y if y is None else y
    return VariationalGP(p.net, it, x, y, p.loss(), **shape, **options)


def by_hand(p, it, x, y):
    """Prior mean and precision, stacked J, targets and noise precision of Theorem 2, dense."""
    rows, targets, noise = [], [], []
    labels = y[:, None] if y.is_floating_point() and y.dim() == 1 else y
    c = it.beta * it.train_size / len(x) / len(it.samples)
    for w in it.samples:
        net = at(p.net, w)
        f, J = oracle.outputs(net, x), oracle.jacobian(net, x)
        r, lam = p.hand.residual(f, labels), p.hand.lam(f, labels)
        rows.append(J)
        noise.append(c * lam)
        targets.append((J @ it.mean, r))
    J, noise = torch.cat(rows), torch.cat(noise)
    S = it.data_precision if it.data_precision.dim() == 2 else torch.diag(it.data_precision)
    S0_inv = torch.diag(it.prior_precision)
    V_inv = (1 - it.beta) * (S + S0_inv) + it.beta * S0_inv
    m = it.mean - it.lr * torch.linalg.solve(V_inv, S0_inv @ it.mean)
    Jmu, r = (torch.cat(parts) for parts in zip(*targets))
    return m, V_inv, J, Jmu, r, noise


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "options"), [("VOGGN", {}), ("VOGGN", {"mc_samples": 3}), ("OGGN", {})])
@pytest.mark.parametrize("rates", [{"lr": 0.2, "beta": 0.2}, {"lr": 0.05, "beta": 0.3}])
def test_theorem_2_the_posterior_is_the_next_iterate(case, name, options, rates):
    p = problem(case)
    opt = made(name, p, **options, **rates)
    for _ in range(2):
        it = opt.iterate()
        posterior = variational(p, it).weight_posterior()
        opt.step(*batch(p))
        assert_close(posterior.mean, opt.mean, TOL, "mean")
        assert_close(posterior.precision(), opt.iterate().precision, TOL, "precision")


@pytest.mark.parametrize("mc_samples", [1, 2])
def test_theorem_2_with_minibatches(mc_samples):
    p = problem("categorical", n=7)
    opt = made("VOGGN", p, mc_samples=mc_samples, lr=0.1)
    x, y = p.x[2:5], p.y[2:5]
    posterior = variational(p, opt.iterate(), x, y).weight_posterior()
    opt.step(x, y)
    assert_close(posterior.mean, opt.mean, TOL)
    assert_close(posterior.precision(), opt.iterate().precision, TOL)


@pytest.mark.parametrize("name", ["VOGGN", "OGGN"])
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.8},
        {"momentum": 0.8, "bias_correction": True},
        {"temperature": 0.3},
        {"features": "gradient"},
        {"prior_precision": [0.5, 3.0], "groups": [["2"], ["0"]]},
    ],
    ids=lambda options: "-".join(options),
)
def test_theorem_2_with_all_the_optimizers_options(name, options):
    p = problem("bernoulli_outputs")
    opt = made(name, p, **options)
    for _ in range(3):
        it = opt.iterate()
        posterior = variational(p, it).weight_posterior()
        opt.step(*batch(p))
        assert_close(posterior.mean, opt.mean, TOL)
        assert_close(posterior.precision(), opt.iterate().precision, TOL)


@pytest.mark.parametrize("case", ["gaussian", "categorical", "poisson", "log_sigma"])
@pytest.mark.parametrize("name", ["VOGN", "OGN"])
@pytest.mark.parametrize("solver", ["weight_space", "function_space"])
def test_theorem_2_for_diagonals_the_diagonal_of_the_precision_is_the_next(case, name, solver):
    p = problem(case)
    opt = made(name, p, lr=0.1)
    it = opt.iterate()
    full = variational(p, it, solver=solver).weight_posterior()
    diagonal = variational(p, it, structure="diagonal").weight_posterior()
    opt.step(*batch(p))
    assert_close(full.precision().diagonal(), opt.iterate().precision, 1e-8)
    assert_close(diagonal.mean, opt.mean, TOL)
    assert_close(diagonal.precision().diagonal(), opt.iterate().precision, TOL)


@pytest.mark.parametrize("case", [c for c in INVERTIBLE if c != "own_loss"])  # whose evidence is not known to exist
@pytest.mark.parametrize("mc_samples", [1, 3])
def test_the_gp_is_the_linear_model_of_theorem_2(case, mc_samples):
    p = problem(case)
    opt = made("VOGGN", p, mc_samples=mc_samples, lr=0.1)
    it = opt.iterate()
    gp = variational(p, it)
    x, y = batch(p)
    m, V_inv, J, Jmu, r, noise = by_hand(p, it, x, y)
    c = it.beta / mc_samples
    targets = Jmu - it.lr / it.beta * torch.linalg.solve(noise / c, r)
    dual = gp.dual_data()
    assert_close(dual.targets, targets, 1e-9, "targets")
    assert_close(dual.noise_precision, noise, TOL, "noise")
    evidence = oracle.gp_log_evidence(
        oracle.Dense(J, None, None, None, None, None, torch.ones(1)).gram(J @ torch.linalg.inv(V_inv), J),
        targets - J @ m,
        noise,
    )
    assert_close(gp.log_evidence(kind="gp"), evidence, 1e-9, "evidence")
    if mc_samples > 1:
        return
    # train mode: GPyTorch's own GP, mean c(x) + J m_t and kernel J V_t J^T
    f = oracle.outputs(at(p.net, it.samples[0]), x)
    gp.train()
    prior = gp(gp.train_inputs[0])
    assert_close(prior.mean.reshape(f.shape), f - J @ (it.mean - m), 1e-9, "prior mean")
    gram = J.flatten(0, 1) @ torch.linalg.solve(V_inv, J.flatten(0, 1).T)
    assert_close(prior.covariance_matrix, gram, 1e-9, "prior covariance")


@pytest.mark.parametrize("case", [c for c in GAUSSIAN if c != "gaussian_per_example"])
def test_gpytorchs_own_evidence_is_the_iterates(case):
    import gpytorch

    p = problem(case)
    gp = variational(p, made("VOGGN", p, lr=0.1).iterate())
    expected = gp.log_evidence(kind="gp")
    gp.train()
    gp.likelihood.train()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)
    value = mll(gp(gp.train_inputs[0]), gp.train_targets) * gp.train_targets.numel()
    assert_close(value, expected, 1e-8)


def test_golden_iterate(reference):
    data = reference("dnn2gp/vogn_a")
    meta, delta, beta = data["meta"], data["meta"]["prior_precision"], float(data["beta"])
    net = torch.nn.Sequential(torch.nn.Linear(2, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1)).double()
    mu, p0 = data["mu"], torch.full_like(data["mu"], delta)
    assert meta["lr_alpha"] == pytest.approx(1 - beta)
    with torch.no_grad():
        for own, given in zip(net.parameters(), data["params"].values(), strict=True):
            own.copy_(given.reshape(own.shape))
    it = optim.Iterate(mu, data["precision"] - p0, p0, mu[None], beta, beta, beta * p0 * mu, len(data["x"]))
    assert_close(1 / it.model_precision, data["s_t"], TOL)
    assert_close(it.model_precision, data["theorem2_prior_precision"], TOL)
    assert_close(it.model_mean, data["m_t"], TOL)
    assert_close(it.model_mean, data["theorem2_prior_mean"], TOL)
    gp = VariationalGP(net, it, data["x"], data["y"], dnn2gp.losses.Gaussian(1.0))
    dual, posterior = gp.dual_data(), gp.weight_posterior()
    assert_close(dual.targets[:, 0], data["theorem2_targets"], TOL)
    assert_close(dual.noise_precision.flatten(), torch.full((len(data["x"]),), beta, dtype=F64), TOL)
    assert_close(gp.log_evidence(kind="gp"), data["theorem2_gp_log_evidence"], TOL)
    assert_close(posterior.precision(), data["theorem2_next_precision_full"], 1e-8)
    assert_close(posterior.mean, data["theorem2_next_mean_full"], 1e-8)
    assert_close(gp.linearization.jacobian(data["x"])[:, 0], data["jacobian"], TOL)


def test_the_oggns_limit_is_the_laplace_gp():
    p = problem("categorical")
    opt = made("OGGN", p)
    gp = variational(p, opt.iterate(), converged=True)
    laplace = dnn2gp.LaplaceGP(opt.net, p.x, p.y, p.loss(), prior_precision=0.7)
    assert_close(gp(p.x_test).mean, laplace(p.x_test).mean)
    assert_close(gp(p.x_test).covariance_matrix, laplace(p.x_test).covariance_matrix)
    assert_close(gp.log_evidence(), laplace.log_evidence())
    assert_close(gp.prior_precision, laplace.prior_precision)


def test_the_voggns_limit_stacks_samples():
    p = problem("gaussian")
    opt = made("VOGGN", p, mc_samples=5)
    it = opt.iterate()
    gp = variational(p, it, converged=True)
    G = sum(problem_dense(p, w).ggn for w in it.samples) / 5
    precision = G + torch.diag(it.prior_precision)
    assert_close(gp.weight_posterior().precision(), precision, TOL)
    more = variational(p, it, converged=True, num_samples=7, generator=torch.Generator().manual_seed(1))
    again = variational(p, it, converged=True, num_samples=7, generator=torch.Generator().manual_seed(1))
    assert torch.equal(more.weight_posterior().mean, again.weight_posterior().mean)


def problem_dense(p, w):
    p = copy.copy(p)
    p.net = at(p.net, w)
    return p.dense(0.7)


def test_many_steps_settle_where_the_limit_says():
    """At a fixed point of OGGN the iterate's GP and the converged one have the same posterior."""
    p = problem("gaussian", n=12)
    opt = made("OGGN", p, lr=0.3, beta=0.3, prior_precision=3.0)
    for _ in range(400):
        opt.step(*batch(p))
    it = opt.iterate()
    now, limit = variational(p, it).weight_posterior(), variational(p, it, converged=True).weight_posterior()
    assert_close(now.mean, limit.mean, 1e-6)
    assert_close(now.precision(), limit.precision(), 1e-6)
