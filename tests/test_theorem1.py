"""Theorem 1: the Laplace-GGN posterior of a trained net is the posterior of a linear model, and of a GP.

Without training, at random weights, in the form of one Gauss-Newton step; then at a minimiser. The other side of each
comparison is the P x P one, or a GP regression, computed by hand in oracle.py.
"""

import math

import oracle
import pytest
import torch
from oracle import assert_close
from problems import (
    CASES,
    F64,
    GAUSSIAN,
    INVERTIBLE,
    PREDICTED,
    SOLVERS,
    Problem,
    covariance,
    evidence_gradient,
    flat_mean,
    mlp,
    number,
    problem,
    randomized,
)
from torch import nn
from torch.func import functional_call, grad, hessian

import gpytorch_dnn2gp as dnn2gp

DELTA = 0.8


# ---- at random weights


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", CASES)
def test_theorem_1_posterior_is_one_gauss_newton_step(name, solver):
    p = problem(name)
    gp, dense = p.gp(DELTA, solver=solver), p.dense(DELTA)
    posterior = gp.weight_posterior()
    assert_close(posterior.mean, dense.weight_mean, what="w - Sigma g")
    assert_close(posterior.covariance(), dense.sigma, what="Sigma")
    assert_close(posterior.precision(), dense.precision, what="Sigma^-1")
    J, f = p.jacobian(p.x_test), p.outputs(p.x_test)
    assert_close(flat_mean(gp(p.x_test)), dense.mean(J, f).flatten(), what="f - J Sigma g")
    assert_close(covariance(gp(p.x_test)), dense.covariance(J), what="J Sigma J^T")


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", CASES)
def test_laplace_evidence(name, solver):
    p = problem(name)
    delta = torch.tensor(DELTA, dtype=F64, requires_grad=True)
    gp, dense = p.gp(DELTA, solver=solver), p.dense(delta)
    value, expected = gp.log_evidence(), dense.log_evidence
    assert_close(value, expected, what="Laplace evidence")
    (gradient,) = torch.autograd.grad(expected, delta)
    assert_close(evidence_gradient(gp, value, "prior_precision"), gradient[None], what="its gradient")


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", CASES)
def test_both_readings_of_the_mean(name, solver):
    p = problem(name)
    gp, dense = p.gp(DELTA, solver=solver), p.dense(DELTA)
    J, f = p.jacobian(p.x_test), p.outputs(p.x_test)
    K = f.shape[-1]
    blocks = torch.stack([dense.covariance(J_i[None]) for J_i in J])
    if name not in PREDICTED:
        assert_close(flat_mean(gp(p.x_test)), dense.mean(J, f).flatten(), what="posterior")
        return
    network = p.predict(gp, p.x_test, mean="network").f
    assert_close(network.mean.reshape(-1, K), f, what="network")
    assert_close(covariance(network), blocks, what="covariance")
    if name == "natural":  # a Gauss-Newton step may leave the domain of natural parameters, and does here
        return
    posterior = p.predict(gp, p.x_test, mean="posterior").f
    assert_close(posterior.mean.reshape(-1, K), dense.mean(J, f), what="posterior")
    assert_close(covariance(posterior), blocks, what="covariance")


@pytest.mark.parametrize("name", CASES)
def test_stationarity(name):
    p = problem(name)
    stationarity, dense = p.gp(DELTA).stationarity(), p.dense(DELTA)
    assert_close(number(stationarity.gradient_norm), dense.g.norm(), what="|g|")
    assert_close(number(stationarity.newton_decrement), dense.newton_decrement, what="g^T Sigma g")
    assert_close(number(stationarity.evidence_gap), dense.newton_decrement / 2, what="its half")


# ---- the two forms


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", INVERTIBLE)
def test_dual_form_and_output_form_are_one(name, solver):
    """GP regression by hand on the targets and the noise that the package reports: one mean, covariance, evidence."""
    p = problem(name)
    gp, dense = p.gp(DELTA, solver=solver), p.dense(DELTA)
    if name == "own_loss":  # Lambda of a user's own loss may be singular: reported only where it can be inverted
        targets, noise_precision = dense.y_dual, dense.lam
    else:
        dual = gp.dual_data()
        targets, noise_precision = dual.targets, dual.noise_precision
        assert_close(targets.reshape(dense.f.shape), dense.y_dual, what="y~ = J w - Lambda^-1 r")
        assert_close(noise_precision.reshape(dense.lam.shape), dense.lam, what="Lambda")
    J, f, w = p.jacobian(p.x_test), p.outputs(p.x_test), dense.w
    k, k_cross, k_test = dense.gram(), dense.gram(J), dense.gram(J, J)
    mean, cov = oracle.gp_regression(k, k_cross, k_test, targets, noise_precision)
    c = (f - J @ w).flatten()
    assert_close(flat_mean(gp(p.x_test)), mean + c, what="mean")
    assert_close(covariance(gp(p.x_test)), cov, what="covariance")
    # Output form: targets z = f - Lambda^-1 r, prior mean c(x).
    c_train = dense.f - dense.J @ w
    z = dense.f - torch.linalg.solve(dense.lam, dense.r)
    mean, cov = oracle.gp_regression(k, k_cross, k_test, z - c_train, dense.lam)
    assert_close(flat_mean(gp(p.x_test)), mean + c, what="mean")
    assert_close(covariance(gp(p.x_test)), cov, what="covariance")
    if name != "own_loss":
        assert_close(gp.train_targets.reshape(z.shape), z, what="targets of the output form")
        evidence = gp.log_evidence(kind="gp")
        assert_close(evidence, oracle.gp_log_evidence(k, targets, noise_precision), what="evidence, y~ form")
        assert_close(evidence, oracle.gp_log_evidence(k, z - c_train, dense.lam), what="evidence, output form")


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("categorical")])
def test_a_softmax_has_no_dual_evidence_and_a_placeholder_for_targets(name):
    p = problem(name)
    gp = p.gp(DELTA)
    with pytest.raises(ValueError, match="(?i)laplace|log_evidence"):
        gp.log_evidence(kind="gp")
    assert_close(gp.train_targets.reshape(len(p.x), -1), p.outputs(p.x), what="f(x), a placeholder")
    assert torch.equal(gp.train_labels, p.y)


# ---- Gaussian losses: both evidences


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", GAUSSIAN)
def test_gp_evidence_is_laplace_evidence_plus_half_the_newton_decrement(name, solver):
    """Everywhere, not only where the gradient vanishes; with one prior precision and with one per parameter tensor."""
    p = problem(name)
    number = len(oracle.selected(p.net))
    for delta in (DELTA, torch.linspace(0.5, 2.0, number, dtype=F64)):
        gp = p.gp(delta, solver=solver)
        dense = p.dense(delta if isinstance(delta, float) else oracle.per_group(p.net, list(delta)))
        gap = dense.newton_decrement / 2
        assert gap > 1e-3
        assert_close(gp.log_evidence(), dense.log_evidence, what="Laplace evidence")
        assert_close(gp.log_evidence(kind="gp"), dense.gp_log_evidence, what="GP evidence")
        assert_close(gp.log_evidence(kind="gp"), dense.log_evidence + gap, what="Theorem")


# ---- prior groups, subsets of the weights


@pytest.mark.parametrize("solver", SOLVERS)
def test_named_groups(solver):
    p = problem("gaussian_odd_net")
    groups = [["shared", "scale"], ["norm", "readout"]]
    s0_inv = oracle.per_group(p.net, [0.4, 2.5], groups)
    gp = p.gp(torch.tensor([0.4, 2.5], dtype=F64), groups=groups, solver=solver)
    dense = p.dense(s0_inv)
    assert_close(gp.weight_posterior().mean, dense.weight_mean, what="mean")
    assert_close(covariance(gp(p.x_test)), dense.covariance(p.jacobian(p.x_test)), what="covariance")
    assert_close(gp.log_evidence(), dense.log_evidence, what="evidence")


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("params", "names"),
    [("last_layer", ["2"]), (["2"], ["2"]), (["0.weight", "2.bias"], ["0.weight", "2.bias"]), (["0"], ["0"])],
)
def test_subsets_of_the_weights(params, names, solver):
    p = problem("categorical")
    gp, dense = p.gp(DELTA, params=params, solver=solver), p.dense(DELTA, names=names)
    J, f = p.jacobian(p.x_test, names), p.outputs(p.x_test)
    assert_close(gp.weight_posterior().mean, dense.weight_mean, what="mean of the weights")
    assert_close(flat_mean(gp(p.x_test)), dense.mean(J, f).flatten(), what="mean")
    assert_close(covariance(gp(p.x_test)), dense.covariance(J), what="covariance")
    assert_close(gp.log_evidence(), dense.log_evidence, what="evidence")


# ---- at a minimiser


def minimised(p: Problem, delta: float) -> Problem:
    """The same problem with the net at a minimiser of nll + delta/2 |w|^2: damped Newton steps."""
    with torch.no_grad():
        for q in p.net.parameters():
            q *= 0.1
    params = dict(p.net.named_parameters())
    sizes, shapes = [q.numel() for q in params.values()], [q.shape for q in params.values()]

    def objective(w):
        pieces = zip(params, w.split(sizes), shapes, strict=True)
        f = functional_call(p.net, {name: piece.reshape(shape) for name, piece, shape in pieces}, (p.x,))
        f = f[:, None] if f.dim() == 1 else f
        return p.hand.nll(f, p.labels) + 0.5 * delta * w @ w

    w = oracle.weights(p.net)
    for _ in range(200):
        g, H = grad(objective)(w), hessian(objective)(w)
        if g.norm() < 1e-12:
            break
        values, vectors = torch.linalg.eigh(H)
        step, size = vectors @ ((vectors.T @ g) / values.abs().clamp(min=1e-3)), 1.0
        while size > 1e-6 and not objective(w - size * step) < objective(w):
            size /= 2
        w = w - (size if size > 1e-6 else 1.0) * step  # at the end no decrease is visible in float64
    assert grad(objective)(w).norm() < 1e-9
    torch.nn.utils.vector_to_parameters(w, p.net.parameters())
    return p


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    "name", ["gaussian", "gaussian_per_output", "bernoulli", "categorical", "poisson", "log_sigma"]
)
def test_theorem_1_at_a_minimiser(name, solver):
    """There the mean is w*, both readings agree, and so do both evidences of a Gaussian loss."""
    delta = 2.0 if name == "log_sigma" else DELTA  # a small one lets sigma collapse on single points
    p = minimised(problem(name, n=12), delta)
    gp = p.gp(delta, solver=solver)
    f = p.outputs(p.x_test)
    assert f.std() > 1e-2  # not the trivial one, w = 0
    assert_close(gp.weight_posterior().mean, oracle.weights(p.net), what="w*")
    assert_close(gp.weight_posterior().covariance(), p.dense(delta).sigma, what="Sigma")
    assert_close(flat_mean(gp(p.x_test)), f.flatten(), what="f(x)")
    assert_close(gp.predict(p.x_test, mean="posterior").f.mean.reshape(f.shape), f, what="f(x)")
    assert float(gp.stationarity().gradient_norm) < 1e-8
    assert abs(float(gp.stationarity().newton_decrement)) < 1e-14
    if name.startswith("gaussian"):
        assert_close(gp.log_evidence(kind="gp"), gp.log_evidence(), what="evidences")


# ---- a saturated point with a flipped label


def saturated(seed: int = 0) -> Problem:
    """Softmax regression on a small net in which the last example has p_y = 1e-27: no curvature, |r| = sqrt 2."""
    p = problem("categorical", n=6, seed=seed)
    net = randomized(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)), seed)
    with torch.no_grad():
        x = torch.tensor([[40.0, -30.0]], dtype=F64)  # far out, where tanh is +-1 and the logits are a sum of weights
        f = net(x)[0]
        # Turn up the last layer until the likeliest class beats the least likely one by 27 ln 10.
        net[2].weight *= 27 * math.log(10) / (f.max() - f.min())
        net[2].bias *= 27 * math.log(10) / (f.max() - f.min())
        p.net, p.x, p.y = net, torch.cat([p.x, x]), torch.cat([p.y, f.argmin()[None]])
        log_p = net(x)[0].log_softmax(-1)
    assert abs(float(log_p.min()) / math.log(10) + 27) < 0.5
    return p


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("seed", range(3))
def test_a_saturated_point_with_a_flipped_label_pulls_as_it_should(seed, solver):
    p = saturated(seed)
    gp, dense = p.gp(DELTA, solver=solver), p.dense(DELTA)
    J, f = p.jacobian(p.x_test), p.outputs(p.x_test)
    assert dense.lam[-1].abs().max() < 1e-10 and dense.r[-1].norm() > 1  # no curvature, a full residual
    assert_close(gp.weight_posterior().mean, dense.weight_mean, what="w - Sigma g")
    assert_close(flat_mean(gp(p.x_test)), dense.mean(J, f).flatten(), what="posterior mean")
    assert_close(covariance(gp(p.x_test)), dense.covariance(J), what="covariance")
    assert_close(gp.log_evidence(), dense.log_evidence, what="evidence")
    # The point matters: without it the mean is elsewhere.
    without = Problem(p.net, p.x[:-1], p.y[:-1], p.x_test, p.hand, p.loss_name)
    moved = flat_mean(gp(p.x_test)) - flat_mean(without.gp(DELTA, solver=solver)(p.x_test))
    assert moved.abs().max() > 0.1
    prediction = gp.predict(p.x_test, mean="posterior")
    for value in (prediction.mean, prediction.variance, prediction.aleatoric, prediction.epistemic, prediction.probs):
        assert torch.isfinite(value).all()
    assert torch.isfinite(evidence_gradient(gp, gp.log_evidence(), "prior_precision")).all()
    assert torch.isfinite(gp.train_targets).all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["categorical", "bernoulli_outputs"])
def test_probabilities_that_underflow(name, solver):
    """Logits of +-1000: Lambda is zero in float64 and so is p_y; the residual still counts, nothing is NaN."""
    p = problem(name)
    with torch.no_grad():
        for q in p.net[2].parameters():
            q *= 1000 / p.outputs(p.x).abs().min()
    gp, dense = p.gp(DELTA, solver=solver), p.dense(DELTA)
    J, f = p.jacobian(p.x_test), p.outputs(p.x_test)
    assert_close(flat_mean(gp(p.x_test)), dense.mean(J, f).flatten(), what="posterior mean")
    assert_close(covariance(gp(p.x_test)), dense.covariance(J), what="covariance")
    assert_close(gp.log_evidence(), dense.log_evidence, what="evidence")
    assert torch.isfinite(gp.predict(p.x_test).variance).all()


# ---- other splittings (paper eq. 5), the diagonal approximation


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["gaussian", "bernoulli", "categorical", "poisson", "categorical_images"])
def test_empirical_fisher(name, solver):
    """phi = J^T r, D = 1, v = 1: Sigma^-1 = sum phi phi^T + S0^-1, targets phi^T w - 1, noise 1, an n x n kernel."""
    p = problem(name)
    delta = torch.tensor(DELTA, dtype=F64, requires_grad=True)
    gp, fisher = p.gp(DELTA, solver=solver, features="gradient"), oracle.empirical_fisher(p.dense(delta))
    n = len(p.x)
    assert_close(fisher.g, p.dense(DELTA).g, what="by hand: both splittings have one gradient")
    J, f = p.jacobian(p.x_test), p.outputs(p.x_test)
    assert_close(gp.weight_posterior().mean, fisher.weight_mean, what="w - Sigma g")
    assert_close(gp.weight_posterior().covariance(), fisher.sigma, what="Sigma")
    assert_close(flat_mean(gp(p.x_test)), fisher.mean(J, f).flatten(), what="mean at new inputs")
    assert_close(covariance(gp(p.x_test)), fisher.covariance(J), what="covariance at new inputs")
    dual = gp.dual_data()
    assert_close(dual.targets.reshape(-1), fisher.y_dual[:, 0], what="phi^T w - 1")
    assert_close(dual.noise_precision.reshape(-1), torch.ones(n, dtype=F64), what="D")
    assert fisher.gram().shape == (n, n)
    for kind, expected in (("laplace", fisher.log_evidence), ("gp", fisher.gp_log_evidence)):
        value = gp.log_evidence(kind=kind)
        assert_close(value, expected, what=f"{kind} evidence")
        (gradient,) = torch.autograd.grad(expected, delta, retain_graph=True)
        assert_close(evidence_gradient(gp, value, "prior_precision"), gradient[None], what="its gradient")


@pytest.mark.parametrize("name", ["gaussian", "categorical", "log_sigma", "natural", "categorical_images"])
def test_diagonal_posterior(name):
    """Sigma^-1 = diag(J^T Lambda J) + S0^-1, the paper's practical variant."""
    p = problem(name)
    gp, dense = p.gp(DELTA, structure="diagonal"), p.dense(DELTA, diagonal=True)
    J, f = p.jacobian(p.x_test), p.outputs(p.x_test)
    assert_close(gp.weight_posterior().precision(), dense.precision, what="precision")
    assert_close(gp.weight_posterior().covariance(), dense.sigma, what="covariance")
    assert_close(covariance(gp(p.x_test)), dense.covariance(J), what="J Sigma J^T")
    assert_close(flat_mean(gp(p.x_test)), dense.mean(J, f).flatten(), what="f - J Sigma g")
    network = p.predict(gp, p.x_test).f
    assert_close(network.mean.reshape(f.shape), f, what="f")
    assert_close(covariance(network), torch.stack([dense.covariance(J_i[None]) for J_i in J]), what="covariance")
    assert_close(gp.log_evidence(), dense.log_evidence, what="evidence")


# ---- from outputs to labels


def test_gaussian_labels():
    p = problem("gaussian_per_output")
    prediction, dense = p.gp(DELTA).predict(p.x_test), p.dense(DELTA)
    J, f = p.jacobian(p.x_test), p.outputs(p.x_test)
    epistemic = dense.covariance(J).diagonal().reshape(f.shape)
    noise = p.hand.noise.expand_as(f)
    assert_close(prediction.mean, f, what="mean")
    assert_close(prediction.epistemic, epistemic, what="epistemic")
    assert_close(prediction.aleatoric, noise, what="aleatoric")
    assert_close(prediction.variance, epistemic + noise, what="variance")
    assert_close(prediction.y.variance, epistemic + noise, what="distribution of y")


def test_class_probabilities_to_first_order():
    """Paper eq. 48: Lambda + Lambda J Sigma J^T Lambda."""
    p = problem("categorical")
    prediction, dense = p.gp(DELTA).predict(p.x_test, approximation="linear"), p.dense(DELTA)
    J, f = p.jacobian(p.x_test), p.outputs(p.x_test)
    lam = p.hand.lam(f, p.y)
    blocks = torch.stack([dense.covariance(J_i[None]) for J_i in J])
    assert_close(prediction.mean, f.softmax(-1), what="mean")
    assert_close(prediction.aleatoric, lam.diagonal(dim1=1, dim2=2), what="aleatoric")
    assert_close(prediction.epistemic, (lam @ blocks @ lam).diagonal(dim1=1, dim2=2), what="epistemic")


@pytest.mark.parametrize("name", ["bernoulli", "categorical"])
@pytest.mark.parametrize("approximation", ["bridge", "mc", "quadrature"])
def test_averaged_class_probabilities_split_their_variance(name, approximation):
    """Averaged over f, aleatoric and epistemic variance sum to p (1 - p)."""
    if (name, approximation) == ("categorical", "quadrature"):
        pytest.skip("quadrature is one-dimensional")
    p = problem(name)
    kwargs = {"num_samples": 64, "generator": torch.Generator().manual_seed(0)} if approximation == "mc" else {}
    prediction = p.gp(DELTA).predict(p.x_test, approximation=approximation, **kwargs)
    probs = prediction.mean
    assert_close(prediction.aleatoric + prediction.epistemic, probs * (1 - probs), what="p (1 - p)")
    assert (prediction.aleatoric >= 0).all() and (prediction.epistemic >= 0).all()


@pytest.mark.parametrize("m", [3, 6])
def test_noise_of_the_training_examples_is_not_that_of_new_ones(m):
    """As many new inputs as training inputs: still not theirs."""
    p = problem("gaussian_per_example", n=6, m=m)
    with pytest.raises(ValueError, match="noise"):
        p.gp(DELTA).predict(p.x_test)


def test_noise_at_new_inputs():
    """Lambda(x*)^-1 at x* for losses that need no label there: gp.likelihood(gp(x), x)."""
    p = problem("poisson")
    gp, dense = p.gp(DELTA), p.dense(DELTA)
    J, f = p.jacobian(p.x_test), p.outputs(p.x_test)
    noisy = gp.likelihood(gp(p.x_test), p.x_test)
    noise = oracle.block_diagonal(torch.linalg.inv(p.hand.lam(f, f)))
    assert_close(covariance(noisy), dense.covariance(J) + noise, what="J Sigma J^T + Lambda^-1")


def test_rsample_of_the_weights_has_their_covariance():
    p = problem("gaussian", n=4)
    gp = p.gp(DELTA)
    samples = gp.weight_posterior().rsample(torch.Size([20000]))
    assert samples.shape == (20000, len(oracle.weights(p.net)))
    assert_close(samples.mean(0), p.dense(DELTA).weight_mean, tol=0.05, what="mean")
    assert_close(torch.cov(samples.T), p.dense(DELTA).sigma, tol=0.05, what="covariance")


def test_one_net_with_outputs_of_every_shape():
    """(n,), (n, 1): the same GP."""
    one, squeezed = problem("gaussian"), problem("gaussian_squeezed")
    squeezed.net[:3].load_state_dict(one.net.state_dict())
    squeezed.x, squeezed.y, squeezed.x_test = one.x, one.y[:, 0], one.x_test
    a, b = one.gp(DELTA), squeezed.gp(DELTA)
    assert_close(flat_mean(a(one.x_test)), flat_mean(b(one.x_test)), tol=1e-12)
    assert_close(covariance(a(one.x_test)), covariance(b(one.x_test)), tol=1e-12)
    assert a(one.x_test).mean.shape == (3,)


def test_mlp_is_what_the_oracle_thinks():
    """The oracle itself, once, against forward differences."""
    net = randomized(mlp(num_outputs=2), 3)
    x = torch.tensor([[0.3, -1.2]], dtype=F64)
    J, w = oracle.jacobian(net, x)[0], oracle.weights(net)
    for j in range(len(w)):
        outputs = []
        for step in (1e-6, -1e-6):
            moved = w.clone()
            moved[j] += step
            torch.nn.utils.vector_to_parameters(moved, net.parameters())
            outputs.append(net(x)[0].detach())
        torch.testing.assert_close(J[:, j], (outputs[0] - outputs[1]) / 2e-6, rtol=1e-6, atol=1e-8)
        torch.nn.utils.vector_to_parameters(w, net.parameters())
    assert isinstance(dnn2gp.losses.Gaussian(), dnn2gp.losses.Loss)
