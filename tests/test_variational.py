"""VariationalGP offers what LaplaceGP does: predictions, evidence, conditioning, state, files."""

import copy

import oracle
import pytest
import torch
from oracle import assert_close
from problems import F64, problem
from test_optim import at, batch, made
from test_theorem2 import variational

import gpytorch_dnn2gp as dnn2gp
from gpytorch_dnn2gp import VariationalGP, optim, sampling_predictive, weights

KINDS = ["OGGN", "VOGGN", "VOGGN samples", "VOGN", "VOGN diagonal", "converged", "given diagonal", "given low rank"]


def gp_of(kind, p, steps=2, **options):
    """One GP of each kind, after some steps."""
    name = "VOGN" if kind.startswith("given") or kind == "converged" else kind.split()[0]
    opt = made(name, p, lr=0.1, **({"mc_samples": 3} if kind == "VOGGN samples" else {}))
    for _ in range(steps):
        opt.step(*batch(p))
    if kind == "given diagonal":
        return variational(p, opt.gaussian(), prior_precision=0.7, **options)
    if kind == "given low rank":
        q = opt.gaussian()
        root = 0.1 * torch.randn(len(q.mean), 2, dtype=F64)
        return variational(p, weights.LowRankGaussian(q.mean, q.variance, root), prior_precision=0.7, **options)
    if kind == "VOGN diagonal":
        options["structure"] = "diagonal"
    return variational(p, opt.iterate(), converged=kind == "converged", **options)


@pytest.mark.parametrize("kind", KINDS)
def test_the_posterior_of_f_is_that_of_the_weights(kind):
    p = problem("categorical")
    gp = gp_of(kind, p)
    q, lin = gp.weight_posterior(), gp.linearization
    J = oracle.jacobian(at(p.net, lin.weights), p.x_test).flatten(0, 1)
    mu = q.mean if gp.model.mean is None else gp.model.mean
    f = lin(p.x_test).flatten() + J @ (q.mean - mu)
    posterior = gp(p.x_test)
    assert_close(posterior.mean.flatten(), f)
    assert_close(posterior.covariance_matrix, J @ q.covariance() @ J.T)
    blocks = gp.predict(p.x_test).f.covariance_matrix
    for i in range(len(p.x_test)):
        assert_close(blocks[i], posterior.covariance_matrix[3 * i : 3 * i + 3, 3 * i : 3 * i + 3])


@pytest.mark.parametrize("case", ["gaussian_per_output", "bernoulli", "categorical", "poisson", "log_sigma"])
@pytest.mark.parametrize("kind", KINDS)
def test_conditioning_adds_the_linear_models_rows(kind, case):
    p = problem(case)
    gp = gp_of(kind, p)
    y = p.y[:3]
    later = gp.condition_on(p.x_test, y)
    before, after = gp.weight_posterior(), later.weight_posterior()
    splitting = later._added_splitting()
    J = gp.linearization.jacobian(p.x_test)
    R = splitting.apply_root_t(torch.eye(J.shape[1], dtype=F64)[:, None].expand(-1, len(J), -1)).permute(1, 2, 0)
    G = torch.einsum("nqk,nkp->nqp", R, J).flatten(0, 1)
    G = G.T @ G
    if kind == "VOGN diagonal":
        G = torch.diag(G.diagonal())
    assert_close(after.precision(), before.precision() + G, 1e-7)
    assert not torch.equal(later(p.x_test).mean, gp(p.x_test).mean)
    assert torch.isfinite(later.log_evidence())


def test_conditioning_an_iterate_is_a_larger_batch_of_the_same_weight():
    p = problem("gaussian")
    opt = made("OGGN", p, lr=0.1)
    it = opt.iterate()
    whole = variational(p, it)
    # the same scale n/|B| for each: half of the data of an iterate of half the train size
    half = optim.Iterate(**{**vars(it), "train_size": 3})
    parts = variational(p, half, p.x[:3], p.y[:3]).condition_on(p.x[3:], p.y[3:])
    assert_close(parts(p.x_test).mean, whole(p.x_test).mean)
    assert_close(parts(p.x_test).covariance_matrix, whole(p.x_test).covariance_matrix)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_predicts_the_same_to_the_bit(kind, tmp_path):
    p = problem("gaussian_per_output")
    gp = gp_of(kind, p)
    for one in (gp, gp.condition_on(p.x_test, p.y[:3])):
        dnn2gp.save(one, tmp_path / "gp.safetensors")
        again = dnn2gp.load(tmp_path / "gp.safetensors", copy.deepcopy(p.net))
        assert type(again) is VariationalGP
        assert torch.equal(again(p.x_test).mean, one(p.x_test).mean)
        assert torch.equal(again(p.x_test).covariance_matrix, one(p.x_test).covariance_matrix)
        assert torch.equal(again.log_evidence().detach(), one.log_evidence().detach())
        assert torch.equal(again.noise.detach(), one.noise.detach())
        assert again.solver == one.solver and again.num_outputs == 2
        further = [g.condition_on(p.x_test[:1], p.y[:1])(p.x_test).mean for g in (again, one)]
        assert torch.equal(*further)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_and_moves(kind):
    p = problem("gaussian")
    gp, other = gp_of(kind, p), gp_of(kind, p, steps=1)
    same = copy.deepcopy(gp)
    same.noise = 0.5
    same.load_state_dict(gp.state_dict())
    assert_close(same.noise, gp.noise)
    assert torch.equal(same(p.x_test).mean, gp(p.x_test).mean)
    with pytest.raises(ValueError, match="other training data"):
        gp.load_state_dict(other.state_dict())
    single = copy.deepcopy(gp).float()
    assert single(p.x_test.float()).mean.dtype == torch.float32
    assert_close(single(p.x_test.float()).mean.double(), gp(p.x_test).mean, 1e-3)
    assert_close(single(p.x_test.float()).covariance_matrix.double(), gp(p.x_test).covariance_matrix, 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_moves_when_training_goes_on(kind):
    p = problem("gaussian")
    opt = made("VOGN", p)
    gp = variational(p, opt.gaussian()) if kind.startswith("given") else gp_of(kind, p)
    before = gp(p.x_test).mean.clone()
    opt.step(*batch(p))
    with torch.no_grad():
        for parameter in p.net.parameters():
            parameter.add_(1.0)
    assert torch.equal(gp(p.x_test).mean, before)


def test_the_evidence_of_a_given_gaussian_is_laplaces_with_its_covariance():
    p = problem("categorical")
    laplace = dnn2gp.LaplaceGP(p.net, p.x, p.y, p.loss(), prior_precision=0.7)
    q = weights.gaussian(laplace.linearization.weights, precision=laplace.weight_posterior().precision())
    gp = variational(p, q, prior_precision=0.7)
    assert_close(gp.log_evidence(), laplace.log_evidence())
    assert_close(gp.stationarity().gradient_norm, laplace.stationarity().gradient_norm)
    assert_close(gp.stationarity().newton_decrement, laplace.stationarity().newton_decrement)
    assert_close(gp(p.x_test).covariance_matrix, laplace(p.x_test).covariance_matrix)
    assert_close(gp(p.x_test).mean, gp.linearization(p.x_test))
    # for any other Gaussian it is the ELBO of the linear model: never above
    d = p.dense(0.7)
    for other in (1.3 * torch.diag(q.covariance().diagonal()), 2.0 * q.covariance()):
        gp = variational(p, weights.gaussian(q.mean, covariance=other), prior_precision=0.7)
        kl = (
            torch.trace(0.7 * other) - len(q.mean) - torch.linalg.slogdet(0.7 * other).logabsdet + 0.7 * q.mean @ q.mean
        )
        assert_close(gp.log_evidence(), -d.nll - 0.5 * torch.trace(d.ggn @ other) - 0.5 * kl)
        assert gp.log_evidence().item() < laplace.log_evidence().item()
    gp = variational(p, q, prior_precision=0.7)
    known = weights.gaussian(q.mean, covariance=q.covariance(), prior_precision=0.7)
    assert_close(variational(p, known).log_evidence(), laplace.log_evidence())
    with pytest.raises(ValueError, match="prior_precision="):
        variational(p, q).log_evidence()
    with pytest.raises(ValueError, match="no GP evidence"):
        gp.log_evidence(kind="gp")
    with pytest.raises(ValueError, match="no regression led to it"):
        gp.dual_data()


def test_the_evidence_of_an_iterate_has_gradients_in_the_noise():
    p = problem("gaussian")
    gp = gp_of("VOGGN samples", p)
    noise = torch.tensor(0.09, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(gp.log_evidence(noise=noise), noise)
    step = 1e-6
    up, down = (gp.log_evidence(noise=torch.tensor(0.09 + s, dtype=F64)) for s in (step, -step))
    assert_close(gradient, (up - down) / (2 * step), 1e-6)


@pytest.mark.parametrize("kind", ["VOGGN samples", "given diagonal"])
def test_train_mode_says_what_there_is_instead(kind):
    p = problem("gaussian")
    gp = gp_of(kind, p)
    gp.train()
    with pytest.raises(ValueError, match="log_evidence"):
        gp(gp.train_inputs[0])


def test_tokens_and_images():
    for case in ("categorical_tokens", "categorical_images"):
        p = problem(case)
        gp = gp_of("VOGN", p)
        assert gp.predict(p.x_test).probs.shape == (3, 3)


def test_only_some_parameters():
    p = problem("gaussian")
    net = copy.deepcopy(p.net)
    opt = optim.VOGGN(net, p.loss(), train_size=len(p.x), params="last_layer", lr=0.1)
    first = net[0].weight.detach().clone()
    it = opt.iterate()
    gp = VariationalGP(p.net, it, p.x, p.y, p.loss())
    opt.step(p.x, p.y)
    assert torch.equal(net[0].weight, first)
    assert_close(gp.weight_posterior().mean, opt.mean, 1e-10)


# ---- draws of weights in the net


@pytest.mark.parametrize("case", ["gaussian", "bernoulli_outputs", "categorical", "poisson", "log_sigma"])
def test_sampling_predictive_is_the_average_over_draws(case):
    p = problem(case)
    gp = gp_of("given diagonal", p)
    generator = torch.Generator().manual_seed(3)
    predicted = sampling_predictive(gp, p.x_test, num_samples=50, generator=generator)
    draws = gp.model.given.rsample((50,), torch.Generator().manual_seed(3))
    f = torch.stack([oracle.outputs(at(p.net, w), p.x_test) for w in draws])
    loss = gp.loss
    means = loss.conditional_mean(f)
    assert_close(predicted.mean, means.mean(0))
    assert_close(predicted.epistemic, means.var(0, correction=0))
    assert_close(predicted.aleatoric, loss.conditional_variance(f).mean(0))
    assert_close(predicted.f.mean, f.mean(0))
    assert_close(predicted.f.variance, f.var(0))
    y = p.y[:3] if p.y.dim() > 1 or not p.y.is_floating_point() else p.y[:3, None]
    if case == "bernoulli_outputs":  # whose marginals alone are kept
        return
    each = torch.stack([-loss.negative_log_likelihood(fs, y) for fs in f])
    assert_close(predicted.y.log_prob(y), each.logsumexp(0) - torch.log(torch.tensor(50.0, dtype=F64)), 1e-7)


def test_sampling_predictive_tends_to_the_gps_where_the_net_is_linear():
    net = torch.nn.Linear(2, 1).double()
    x, y = torch.randn(8, 2, dtype=F64), torch.randn(8, 1, dtype=F64)
    gp = dnn2gp.LaplaceGP(net, x, y, dnn2gp.losses.Gaussian(0.3))
    p, s = gp.predict(x), sampling_predictive(gp, x, num_samples=20_000, generator=torch.Generator().manual_seed(0))
    assert_close(s.epistemic, p.epistemic, 0.05)
    assert_close(s.mean, p.mean, 0.02)
    assert_close(s.aleatoric, p.aleatoric)


@pytest.mark.parametrize("solver", ["weight_space", "function_space", "iterative"])
def test_sampling_predictive_of_every_solver(solver):
    p = problem("categorical")
    gp = dnn2gp.LaplaceGP(p.net, p.x, p.y, p.loss(), 5.0, solver=solver)
    drawn = sampling_predictive(gp, p.x_test, num_samples=2000, generator=torch.Generator().manual_seed(0))
    dense = weights.gaussian(gp.linearization.weights, covariance=gp.weight_posterior().covariance())
    expected = sampling_predictive(gp, p.x_test, dense, 2000, torch.Generator().manual_seed(1))
    assert_close(drawn.mean, expected.mean, 0.05)
    assert_close(drawn.epistemic, expected.epistemic, 0.2)


# ---- Gaussians over weights


def dense(p, low=0.1):
    a = torch.randn(p, p, dtype=F64)
    return a @ a.T / p + low * torch.eye(p, dtype=F64)


@pytest.mark.parametrize("kind", ["variance", "covariance", "precision", "diagonal precision", "low rank"])
def test_any_gaussian_has_its_products(kind):
    p, mean = 6, torch.randn(6, dtype=F64)
    if kind == "low rank":
        d, root = torch.rand(p, dtype=F64) + 0.1, torch.randn(p, 2, dtype=F64)
        q, cov = weights.LowRankGaussian(mean, d, root), torch.diag(d) + root @ root.T
    elif kind in ("variance", "diagonal precision"):
        d = torch.rand(p, dtype=F64) + 0.1
        q = weights.gaussian(mean, **({"variance": d} if kind == "variance" else {"precision": 1 / d}))
        cov = torch.diag(d)
    else:
        cov = dense(p)
        q = weights.gaussian(mean, **{kind: cov if kind == "covariance" else torch.linalg.inv(cov)})
    v = torch.randn(4, 3, p, dtype=F64)
    assert_close(q.covariance(), cov)
    assert_close(q.precision(), torch.linalg.inv(cov))
    assert_close(q.covariance_matmul(v), v @ cov)
    assert_close(q.precision_matmul(v), v @ torch.linalg.inv(cov))
    assert_close(q.marginal_variance(), cov.diagonal())
    assert_close(q.log_det(), torch.linalg.slogdet(cov).logabsdet)
    draws = q.rsample((40_000,), torch.Generator().manual_seed(0))
    assert_close(torch.cov(draws.T), cov, 0.05)
    assert torch.equal(q.at(0 * mean).mean, 0 * mean)


def test_swag_is_its_definition():
    p = problem("gaussian")
    net = copy.deepcopy(p.net)
    swag, seen = weights.SWAG(net, rank=3), []
    for _ in range(6):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        swag.collect()
        seen.append(oracle.weights(net))
    W = torch.stack(seen)
    q = swag.gaussian()
    D = (W[-3:] - W.mean(0)).T
    assert_close(q.mean, W.mean(0))
    assert_close(q.covariance(), 0.5 * torch.diag(W.var(0, correction=0)) + 0.5 * D @ D.T / 2)
    gp = variational(p, q)
    J = oracle.jacobian(at(p.net, q.mean), p.x_test)[:, 0]
    assert_close(gp(p.x_test).covariance_matrix, J @ q.covariance() @ J.T)
    assert type(swag.gaussian()) is weights.LowRankGaussian
    diagonal = weights.SWAG(net, rank=0)
    for w in seen:
        diagonal.net = at(net, w)
        diagonal.collect()
    assert_close(diagonal.gaussian().variance, W.var(0, correction=0))


def test_weights_that_never_moved_have_no_precision():
    net = torch.nn.Linear(2, 1).double()
    swag = weights.SWAG(net, rank=2)
    for _ in range(3):
        with torch.no_grad():
            net.weight.add_(torch.randn_like(net.weight))
        swag.collect()
    q = swag.gaussian()
    assert torch.isfinite(q.rsample((3,))).all()
    with pytest.raises(ValueError, match="1 of 3 weights never moved"):
        q.precision_matmul(q.mean)


class FakeIVON(torch.optim.Optimizer):
    """The state of an IVON, without its package: what from_ivon reads."""

    def __init__(self, params, **defaults):
        super().__init__(params, defaults)
        for group in self.param_groups:
            group["hess"] = torch.linspace(0.5, 2.0, sum(p.numel() for p in group["params"]), dtype=F64)


def check_ivon(optimizer, net, p):
    q = weights.from_ivon(optimizer, net)
    (group,) = optimizer.param_groups
    assert_close(q.mean, oracle.weights(net))
    assert_close(1 / q.variance, group["ess"] * (group["hess"] + group["weight_decay"]))
    assert_close(q.prior_precision, torch.full_like(q.mean, group["ess"] * group["weight_decay"]))
    gp = VariationalGP(net, q, p.x, p.y, p.loss())
    J = oracle.jacobian(net, p.x_test)[:, 0]
    assert_close(gp(p.x_test).covariance_matrix, (J * q.variance) @ J.T)
    assert torch.isfinite(gp.log_evidence())


def test_ivons_state_becomes_a_gp():
    p = problem("gaussian")
    check_ivon(FakeIVON(p.net.parameters(), ess=60.0, weight_decay=1e-3), p.net, p)


def test_ivon_itself_becomes_a_gp():
    ivon = pytest.importorskip("ivon", reason="needs the package ivon-opt")
    p = problem("gaussian")
    net = copy.deepcopy(p.net)
    optimizer = ivon.IVON(net.parameters(), lr=0.05, ess=float(len(p.x)), weight_decay=1e-2, beta2=0.9)
    for _ in range(20):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            (0.5 * (net(p.x) - p.y).square().mean() / 0.09).backward()
        optimizer.step()
    check_ivon(optimizer, net, p)


def test_ivons_groups_in_another_order():
    p = problem("gaussian")
    groups = [{"params": list(p.net[2].parameters())}, {"params": list(p.net[0].parameters()), "weight_decay": 0.5}]
    optimizer = FakeIVON(groups, ess=10.0, weight_decay=0.1)
    q = weights.from_ivon(optimizer, p.net)
    second, first = (g["hess"] for g in optimizer.param_groups)
    assert_close(1 / q.variance, 10 * torch.cat([first + 0.5, second + 0.1]))
    gp = VariationalGP(p.net, q, p.x, p.y, p.loss())
    assert_close(gp.covar_module.prior_variance, 1 / q.prior_precision)


class FakeLaplace:
    def __init__(self, mean, precision, prior):
        self.mean, self.posterior_precision, self.prior_precision_diag = mean, precision, prior


@pytest.mark.parametrize("full", [True, False])
def test_laplace_torchs_posterior_becomes_a_gp(full):
    p = problem("gaussian")
    laplace = dnn2gp.LaplaceGP(p.net, p.x, p.y, p.loss(), 0.7, structure="full" if full else "diagonal")
    w, precision = laplace.linearization.weights, laplace.weight_posterior().precision()
    q = weights.from_laplace(FakeLaplace(w, precision if full else precision.diagonal(), torch.full_like(w, 0.7)))
    gp = variational(p, q)
    assert_close(gp(p.x_test).covariance_matrix, laplace(p.x_test).covariance_matrix)
    assert_close(gp.log_evidence(), laplace.log_evidence())


def test_a_prior_around_other_weights_is_no_prior_of_ours():
    p = problem("gaussian")
    w = oracle.weights(p.net)
    fake = FakeLaplace(w, torch.ones_like(w), torch.ones_like(w))
    fake.prior_mean = 0.5
    assert weights.from_laplace(fake).prior_precision is None


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_laplace_torch_itself_becomes_a_gp(structure):
    laplace = pytest.importorskip("laplace", reason="needs the package laplace-torch")
    p = problem("gaussian")
    options = {"sigma_noise": 0.3, "prior_precision": 0.7}
    theirs = laplace.Laplace(copy.deepcopy(p.net), "regression", "all", structure, **options)
    theirs.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(p.x, p.y), batch_size=4))
    gp = variational(p, weights.from_laplace(theirs))
    J = oracle.jacobian(p.net, p.x_test)
    blocks = gp.predict(p.x_test).f.covariance_matrix
    assert_close(blocks, theirs.functional_variance(J).detach(), 1e-6)
    assert_close(gp(p.x_test).mean.flatten(), theirs.model(p.x_test).flatten().detach(), 1e-8)
    if structure == "full":
        assert_close(gp.log_evidence(), theirs.log_marginal_likelihood().detach(), 1e-6)
    else:  # of all Gaussians Laplace's has the largest
        exact = dnn2gp.LaplaceGP(p.net, p.x, p.y, p.loss(), 0.7)
        assert gp.log_evidence().item() <= exact.log_evidence().item()
