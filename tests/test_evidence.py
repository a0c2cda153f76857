"""Evidence and leave-one-out: derivatives in every hyperparameter, both sides, refits by hand, bounds by blocks."""

import gpytorch
import oracle
import pytest
import torch
from gpytorch.constraints import Interval
from oracle import assert_close
from problems import CASES, F64, SOLVERS, covariance, mlp, number, problem, randomized

import gpytorch_dnn2gp as dnn2gp
from gpytorch_dnn2gp import mlls, numerics, tiling

pytestmark = pytest.mark.filterwarnings("ignore::gpytorch_dnn2gp.StationarityWarning")

KINDS = ["laplace", "gp"]


def has(kind: str, name: str) -> bool:
    return kind == "laplace" or not (name.startswith("categorical") or name == "own_loss")


# ---- derivatives


def precisions(gp, which: str) -> torch.Tensor:
    counts = {"one": 1, "per_group": len(gp.linearization.param_sizes), "per_weight": gp.linearization.num_weights}
    return 0.5 + torch.rand(counts[which], dtype=F64)


@pytest.mark.parametrize("which", ["one", "per_group", "per_weight"])
@pytest.mark.parametrize("name", CASES)
def test_gradient_in_delta(name, which):
    p = problem(name)
    delta = precisions(p.gp(), which)
    sides = []
    for solver in SOLVERS if which != "per_weight" else ["weight_space", "auto"]:
        gp = p.gp(delta, solver=solver)
        for kind in KINDS:
            if has(kind, name):
                point = delta.clone().requires_grad_()
                assert torch.autograd.gradcheck(lambda d, gp=gp, kind=kind: gp.log_evidence(kind, d), point)
        point = delta.clone().requires_grad_()
        sides.append(torch.autograd.grad(gp.log_evidence(prior_precision=point), point)[0])
    assert_close(sides[1], sides[0])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["gaussian", "gaussian_per_output"])
def test_gradient_in_sigma(name, solver):
    gp = problem(name).gp(0.7, solver=solver)
    for kind in KINDS:
        noise = gp.noise.detach().clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda s, kind=kind: gp.log_evidence(kind, noise=s), noise)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["gaussian", "categorical", "poisson"])
def test_gradient_in_the_temperature(name, solver):
    gp = problem(name).gp(0.7, solver=solver)
    temperature = torch.tensor(1.3, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: gp.log_evidence(temperature=t), temperature)
    assert_close(gp.log_evidence(temperature=1.3), problem(name).gp(0.7, temperature=1.3).log_evidence())


def test_one_precision_for_each_weight_by_hand():
    p = problem("gaussian_per_output")
    delta = precisions(p.gp(), "per_weight")
    gp, dense = p.gp(delta), p.dense(delta)
    assert gp.covar_module.groups.names[5] == "0.weight[5]"
    assert_close(gp.log_evidence(), dense.log_evidence)
    assert_close(covariance(gp(p.x_test)), dense.covariance(p.jacobian(p.x_test)))


# ---- many evaluations from one eigendecomposition


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("features", ["jacobian", "gradient"])
@pytest.mark.parametrize("name", ["gaussian", "gaussian_per_example", "categorical", "poisson", "gaussian_per_output"])
def test_evidence_function(name, features, solver):
    gp = problem(name).gp(0.7, solver=solver, features=features)
    learnable = name == "gaussian"
    for kind in KINDS:
        if not has(kind, name) and features == "jacobian":
            continue
        function = gp.evidence_function(kind)
        point = torch.tensor([1.9], dtype=F64, requires_grad=True)
        noise = torch.tensor(0.2, dtype=F64, requires_grad=True) if learnable else None
        variables = [point, noise] if learnable else [point]
        fast, slow = function(point, noise), gp.log_evidence(kind, point, noise)
        assert_close(fast, slow)
        for a, b in zip(torch.autograd.grad(fast, variables), torch.autograd.grad(slow, variables)):
            assert_close(a, b, 1e-7)
        assert_close(function(), gp.log_evidence(kind))


def test_one_delta_costs_one_factorisation(monkeypatch):
    gp = problem("gaussian").gp(0.7)
    seen = []
    for name in ("cholesky_ex", "eigvalsh"):
        original = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg, name, lambda *a, original=original, name=name, **k: seen.append(name) or original(*a, **k)
        )
    fit = dnn2gp.fit_evidence(gp, warn=False)
    assert fit.num_evaluations > 3
    assert seen == ["eigvalsh"]


# ---- leave one out


def without(p, i: int, delta: float = 0.7, mean: str = "posterior") -> tuple[torch.Tensor, torch.Tensor]:
    """f of example i by the linear model fitted again without it: mean ``(K,)`` and covariance ``(K, K)``."""
    dense = p.dense(delta)
    keep = [j for j in range(len(dense.J)) if j != i]
    J, lam, r = dense.J[keep], dense.lam[keep], dense.r[keep]
    precision = torch.einsum("nkp,nkl,nlq->pq", J, lam, J) + delta * torch.eye(len(dense.w), dtype=F64)
    gradient = torch.einsum("nkp,nk->p", J, r) + delta * dense.w
    if mean == "network":  # all examples together are taken to be stationary
        gradient = -torch.einsum("kp,k->p", dense.J[i], dense.r[i])
    mean_i = dense.f[i] - dense.J[i] @ torch.linalg.solve(precision, gradient)
    return mean_i, dense.J[i] @ torch.linalg.solve(precision, dense.J[i].T)


@pytest.mark.parametrize("mean", ["network", "posterior"])
@pytest.mark.parametrize("solver", [*SOLVERS, "iterative"])
@pytest.mark.parametrize("name", [c for c in CASES if c not in ("natural", "own_loss")])
def test_leave_one_out_is_n_refits(name, solver, mean):
    p = problem(name)
    f = p.gp(0.7, solver=solver).leave_one_out(mean, approximation="linear").f
    refits = [without(p, i, mean=mean) for i in range(len(p.x))]
    assert_close(f.mean, torch.stack([m for m, _ in refits]), 1e-7)
    assert_close(f.covariance_matrix, torch.stack([c for _, c in refits]), 1e-7)


def test_leave_one_out_by_gps_without_the_example():
    """The densities of labels too, against GPs built of the others, at the same net."""
    p = problem("gaussian_per_output")
    densities = p.gp(0.7).leave_one_out("posterior").y.log_prob(p.y)
    for i in range(len(p.x)):
        keep = torch.arange(len(p.x)) != i
        gp = dnn2gp.LaplaceGP(p.net, p.x[keep], p.y[keep], p.loss(), 0.7)
        assert_close(densities[i], gp.predict(p.x[i : i + 1], mean="posterior").y.log_prob(p.y[i : i + 1])[0])


def test_leave_one_out_of_the_empirical_fisher():
    """Without example i its own row r_i^T J_i is left out."""
    p = problem("gaussian_per_output")
    gp, dense = p.gp(0.7, features="gradient"), p.dense(0.7)
    f = gp.leave_one_out("posterior").f
    u = torch.einsum("nkp,nk->np", dense.J, dense.r)
    for i in range(len(p.x)):
        keep = [j for j in range(len(p.x)) if j != i]
        precision = u[keep].T @ u[keep] + 0.7 * torch.eye(len(dense.w), dtype=F64)
        step = torch.linalg.solve(precision, u[keep].sum(0) + 0.7 * dense.w)
        assert_close(f.mean[i], dense.f[i] - dense.J[i] @ step)
        assert_close(f.covariance_matrix[i], dense.J[i] @ torch.linalg.solve(precision, dense.J[i].T))


def test_leave_one_out_with_a_residual_kernel():
    p = problem("gaussian_per_output")
    residual = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())
    f = p.gp(0.7, residual_kernel=residual).leave_one_out("posterior").f
    keep = torch.arange(len(p.x)) != 2
    rest = dnn2gp.LaplaceGP(
        p.net, p.x[keep], p.y[keep], dnn2gp.losses.Gaussian(p.loss().noise.sqrt()), 0.7, residual_kernel=residual
    )
    assert_close(f.mean[2], rest(p.x[2:3]).mean[0])
    assert_close(f.covariance_matrix[2], covariance(rest(p.x[2:3])))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["gaussian", "gaussian_per_output", "categorical"])
def test_leave_one_out_has_gradients(name, solver):
    gp = problem(name).gp(0.7, solver=solver)
    delta = torch.tensor([0.7], dtype=F64, requires_grad=True)
    noise = None if gp.noise is None else gp.noise.detach().clone().requires_grad_()
    variables = (delta,) if noise is None else (delta, noise)
    assert torch.autograd.gradcheck(lambda *v: mlls.leave_one_out_density(gp, *v), variables)


def test_leave_one_out_of_one_example_is_its_prior():
    p = problem("gaussian", n=1)
    f = p.gp(0.7).leave_one_out().f
    J = p.jacobian(p.x)[0]
    assert_close(f.covariance_matrix[0], J @ J.T / 0.7)


def test_leave_one_out_by_gpytorchs_conventions():
    gp = problem("gaussian_per_output").gp(0.7).train()
    mll = mlls.LeaveOneOutPseudoLikelihood(gp.likelihood, gp)
    value = mll(gp(*gp.train_inputs), gp.train_targets)
    assert_close(value, gp.leave_one_out().y.log_prob(gp.train_labels).sum() / 12)
    value.backward()
    assert gp.covar_module.raw_prior_precision.grad.abs() > 0


@pytest.mark.parametrize("name", ["gaussian_per_output", "categorical"])
def test_fit_by_leave_one_out(name):
    gp = problem(name, n=12).gp(0.7)
    before = mlls.leave_one_out_density(gp)
    fit = dnn2gp.fit_evidence(gp, "leave_one_out")
    assert fit.converged
    assert_close(number(fit.evidence_before), before)
    assert_close(number(fit.evidence_after), mlls.leave_one_out_density(gp))
    assert fit.evidence_after > fit.evidence_before


def test_leave_one_out_refusals():
    with pytest.raises(ValueError, match="structure='full'"):
        problem("gaussian").gp(structure="diagonal").leave_one_out()
    p = problem("gaussian")
    with pytest.raises(ValueError, match="Build a GP with all"):
        p.gp().condition_on(p.x_test, p.y[:3]).leave_one_out()
    with pytest.raises(ValueError, match="soft labels"):
        mlls.leave_one_out_density(problem("categorical_soft").gp())
    with pytest.raises(TypeError, match="got VariationalGP"):
        mlls.leave_one_out_density(dnn2gp.VariationalGP(p.net, p.gp().weight_posterior(), p.x, p.y, p.loss()))


@pytest.mark.parametrize("block_size", [None, 6])
def test_fits_keep_to_constraints(block_size, monkeypatch):
    """The best within the bounds is at the bound, as the evidence has one maximum in each."""
    free, bounded = (problem("gaussian", n=12).gp(0.7) for _ in range(2))
    dnn2gp.fit_evidence(free)
    delta, noise = free.prior_precision.item(), free.noise.item()
    bounded.covar_module.register_constraint("raw_prior_precision", Interval(delta / 9, delta / 3))
    bounded.likelihood.register_constraint("raw_noise", Interval(noise * 2, noise * 5))
    bounded.prior_precision, bounded.noise = delta / 5, noise * 3
    if block_size is not None:
        monkeypatch.setattr(tiling, "cache_fits", lambda *_: False)  # by Adam
    dnn2gp.fit_evidence(bounded, block_size=block_size)
    assert delta / 9 <= bounded.prior_precision.item() <= delta / 3
    assert bounded.noise.item() == pytest.approx(noise * 2, rel=1e-3)


# ---- bounds by blocks


@pytest.mark.parametrize("features", ["jacobian", "gradient"])
@pytest.mark.parametrize("name", [c for c in CASES if c != "own_loss"])
def test_blocks_bound_the_evidence_from_below(name, features):
    if features == "gradient" and name in ("gaussian_per_output", "gaussian_per_example"):
        pytest.skip("rows change with this noise")
    gp = problem(name, n=9).gp(0.7, features=features)
    exact = gp.log_evidence()
    bounds = [mlls.BlockEvidence(gp, size).bound() for size in (1, 4, 9, 100)]
    assert bounds[0] <= exact + 1e-9 and bounds[1] <= exact + 1e-9
    assert_close(bounds[2], exact)
    assert_close(bounds[3], exact)


@pytest.mark.parametrize("memory", [None, 200_000])
def test_estimates_are_unbiased_with_their_gradients(memory):
    """The average over all blocks is the bound, whether Gram matrices are kept or not."""
    gp = problem("gaussian_per_output", n=11).gp(torch.rand(4, dtype=F64) + 0.5)
    blocks = mlls.BlockEvidence(gp, 4, torch.Generator().manual_seed(0))
    blocks.kept = memory is None
    delta = gp.prior_precision.detach().requires_grad_()
    noise = gp.noise.detach().clone().requires_grad_()
    terms = [blocks._term(b, delta, noise) for b in range(blocks.num_blocks)]
    average = sum(3 * term + blocks._prior_term(delta) for term in terms) / 3
    bound = blocks.bound(delta, noise)
    assert_close(average, bound)
    for a, b in zip(torch.autograd.grad(average, (delta, noise)), torch.autograd.grad(bound, (delta, noise))):
        assert_close(a, b)
    drawn = {round(float(blocks.estimate().detach()), 6) for _ in range(30)}
    assert drawn == {round(float((3 * t + blocks._prior_term(delta)).detach()), 6) for t in terms}
    assert_close(blocks.estimate(num_blocks=3), bound)


def test_blocks_have_the_gps_own_parameters_by_default():
    gp = problem("gaussian", n=9).gp(0.7)
    mlls.BlockEvidence(gp, 3).estimate().backward()
    assert gp.covar_module.raw_prior_precision.grad.abs() > 0 and gp.likelihood.raw_noise.grad.abs() > 0


def test_fit_by_blocks(monkeypatch):
    """By L-BFGS where Gram matrices are kept, by Adam on single blocks where not: the same maximum."""
    fits = []
    for kept in (True, False):
        gp = problem("gaussian_per_output", n=30).gp(0.7)
        monkeypatch.setattr(tiling, "cache_fits", lambda *_, kept=kept: kept)
        fits.append(
            dnn2gp.fit_evidence(gp, block_size=10, max_iterations=300, generator=torch.Generator().manual_seed(0))
        )
        monkeypatch.undo()
        bound = mlls.BlockEvidence(gp, 10, torch.Generator().manual_seed(0)).bound()
        assert_close(number(fits[-1].evidence_after), bound)
    exact, stochastic = fits
    assert exact.converged and exact.num_evaluations < 100 and stochastic.num_evaluations == 300
    assert abs(exact.evidence_after - stochastic.evidence_after) < 0.1 < exact.evidence_after - exact.evidence_before


def test_block_refusals():
    gp = problem("gaussian").gp()
    with pytest.raises(ValueError, match="positive"):
        mlls.BlockEvidence(gp, 0)
    with pytest.raises(ValueError, match="structure='full'"):
        mlls.BlockEvidence(problem("gaussian").gp(structure="diagonal"), 2)
    with pytest.raises(ValueError, match="full covariance"):
        p = problem("gaussian")
        mlls.BlockEvidence(p.gp(prior_variance=torch.eye(gp.linearization.num_weights, dtype=F64)), 2)
    with pytest.raises(TypeError, match="got VariationalGP"):
        mlls.BlockEvidence(dnn2gp.VariationalGP(p.net, gp.weight_posterior(), p.x, p.y, p.loss()), 2)
    with pytest.raises(ValueError, match="between 1 and 3"):
        mlls.BlockEvidence(gp, 2).estimate(num_blocks=4)
    with pytest.raises(ValueError, match="Laplace evidence"):
        dnn2gp.fit_evidence(gp, "gp", block_size=2)


# ---- how many weights count


@pytest.mark.parametrize("solver", SOLVERS)
def test_effective_parameters(solver):
    """``sum_g P_g - tr_g(S0^-1 Sigma)``, by group."""
    p = problem("gaussian_per_output")
    delta = torch.tensor([0.5, 2.0], dtype=F64)
    groups = [["0"], ["2"]]
    gp = p.gp(delta, groups=groups, solver=solver)
    s0_inv = oracle.per_group(p.net, list(delta), groups)
    left = 1 - s0_inv * p.dense(s0_inv).sigma.diagonal()
    index = gp.covar_module.groups.index(torch.device("cpu"))
    assert_close(mlls.effective_parameters(gp), torch.zeros(2, dtype=F64).index_add(0, index, left))


# ---- far from a stationary point


def test_far_from_stationary_warns_with_the_size():
    gp = problem("gaussian").gp()
    size = f"{gp.stationarity().newton_decrement ** 0.5:.3g} posterior standard deviations"
    with pytest.warns(dnn2gp.StationarityWarning, match=size):
        dnn2gp.fit_evidence(gp)
    gp = problem("gaussian").gp().train()
    mll = mlls.LaplaceMarginalLogLikelihood(gp.likelihood, gp)
    with pytest.warns(dnn2gp.StationarityWarning, match=size):
        mll(gp(*gp.train_inputs), gp.train_targets)


@pytest.mark.filterwarnings("error")
def test_near_a_stationary_point_there_is_no_warning():
    x = torch.randn(30, 2, dtype=F64)
    y = torch.sin(x.sum(1, keepdim=True))
    net = randomized(mlp(), 0)
    dnn2gp.training.fit(net, x, y, dnn2gp.losses.Gaussian(0.3), 0.5)
    dnn2gp.fit_evidence(dnn2gp.LaplaceGP(net, x, y, dnn2gp.losses.Gaussian(0.3), 0.5))


# ---- labels without variation


@pytest.mark.parametrize(
    ("loss", "y"),
    [
        (dnn2gp.losses.Gaussian(0.3), torch.full((6, 1), 2.0, dtype=F64)),
        (dnn2gp.losses.Gaussian(torch.tensor([0.3, 0.3], dtype=F64)), torch.arange(12.0, dtype=F64).view(6, 2) % 2),
    ],
)
def test_constant_labels(loss, y):
    gp = dnn2gp.LaplaceGP(randomized(mlp(num_outputs=y.shape[1]), 0), torch.randn(6, 2, dtype=F64), y, loss)
    with pytest.raises(ValueError, match="fit_noise=False"):
        dnn2gp.fit_evidence(gp)
    assert torch.isfinite(gp.log_evidence())
    assert torch.isfinite(torch.tensor(dnn2gp.fit_evidence(gp, fit_noise=False).evidence_after))


def test_one_example():
    for name in ("gaussian", "categorical", "bernoulli"):
        gp = problem(name, n=1).gp()
        assert torch.isfinite(gp.log_evidence())
        assert torch.isfinite(torch.tensor(dnn2gp.fit_evidence(gp, fit_noise=False).evidence_after))
        assert torch.isfinite(mlls.leave_one_out_density(gp))
    with pytest.raises(ValueError, match="There is one example"):
        dnn2gp.fit_evidence(problem("gaussian", n=1).gp())


# ---- log-determinants


def test_log_det_and_its_first_two_derivatives():
    root = torch.randn(4, 4, dtype=F64)
    a = (root @ root.T + torch.eye(4, dtype=F64)).requires_grad_()

    def function(a):
        a = (a + a.mT) / 2
        return numerics.log_det(a, numerics.cholesky(a, "a"))

    assert_close(function(a), torch.linalg.slogdet(a).logabsdet)
    assert torch.autograd.gradcheck(function, a) and torch.autograd.gradgradcheck(function, a)


@pytest.mark.parametrize("solver", SOLVERS)
def test_second_derivatives_of_the_evidence(solver):
    gp = problem("gaussian").gp(0.7, solver=solver)
    delta = torch.tensor([0.7], dtype=F64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda d: gp.log_evidence(prior_precision=d), delta)


# ---- a search that meets what has no factor


def test_fit_evidence_steps_back_from_values_without_a_factor(monkeypatch):
    """Far off, as a line search may try, k and Lambda can have no Cholesky factor in this precision."""
    free = problem("gaussian", n=30).gp(5.0)
    dnn2gp.fit_evidence(free)
    lowest = free.prior_precision.item() * 0.5
    gradient, refused = mlls._LogHyperparameters.gradient, []

    def failing(self, evidence, theta):
        if theta[0].exp().item() < lowest:
            refused.append(theta)
            raise numerics.NotPositiveDefiniteError("no factor")
        return gradient(self, evidence, theta)

    monkeypatch.setattr(mlls._LogHyperparameters, "gradient", failing)
    gp = problem("gaussian", n=30).gp(free.prior_precision.item() * 30)
    before = gp.log_evidence().item()
    fit = dnn2gp.fit_evidence(gp)
    assert refused, "the search never went there"
    assert not fit.converged and f"{len(refused)} of the values tried left" in fit.message
    assert fit.evidence_after > before and gp.prior_precision.item() >= lowest
    assert_close(number(fit.evidence_after), gp.log_evidence().detach())
    with pytest.raises(numerics.NotPositiveDefiniteError):  # but not where it begins
        dnn2gp.fit_evidence(problem("gaussian", n=30).gp(lowest * 0.9))
