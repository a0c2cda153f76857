"""Laws that hold for every net, loss and size: property tests."""

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close
from problems import CASES, F64, PREDICTED, SOLVERS, covariance, evidence_gradient, flat_mean, number, problem

import gpytorch_dnn2gp as dnn2gp
from gpytorch_dnn2gp import tiling

few = settings(max_examples=12)

cases = st.sampled_from(CASES)
solvers = st.sampled_from(SOLVERS)
sizes = st.integers(1, 5)
seeds = st.integers(0, 1000)
deltas = st.floats(0.05, 20.0)


# ---- the kernel


@few
@given(cases, sizes, seeds, deltas)
def test_gram_is_symmetric_and_positive_semidefinite(name, n, seed, delta):
    p = problem(name, n=n, seed=seed)
    lin = p.linearization()
    dense = p.dense(delta)
    variance = torch.full_like(lin.weights, 1 / delta)
    k = lin.gram(p.x, prior_variance=variance)
    assert_close(k, dense.gram(), what="J S0 J^T")
    assert torch.equal(k, k.mT) or oracle.relative_error(k, k.mT) < 1e-14
    assert torch.linalg.eigvalsh(k).min() >= -1e-12 * k.abs().max()
    kernel = dnn2gp.JacobianKernel(lin, prior_precision=delta)
    assert_close(kernel(floats(p.x)).to_dense(), k, what="kernel")


@few
@given(cases, sizes, sizes, seeds)
def test_gram_across_two_sets_is_a_block_of_the_whole(name, n1, n2, seed):
    p = problem(name, n=n1 + n2, seed=seed)
    lin = p.linearization()
    K = lin(p.x).shape[-1]
    whole, across = lin.gram(p.x), lin.gram(p.x[:n1], p.x[n1:])
    assert_close(across, whole[: n1 * K, n1 * K :], tol=1e-12)
    kernel = dnn2gp.JacobianKernel(lin, prior_precision=2.0)
    assert_close(kernel(floats(p.x[:n1]), floats(p.x[n1:])).to_dense(), across / 2, tol=1e-12)


@few
@given(cases, sizes, seeds, deltas)
def test_diag_is_the_diagonal(name, n, seed, delta):
    p = problem(name, n=n, seed=seed)
    kernel = dnn2gp.JacobianKernel(p.linearization(), prior_precision=delta)
    x = floats(p.x)
    assert_close(kernel(x, diag=True), kernel(x).to_dense().diagonal(), tol=1e-12)
    assert_close(kernel(x).diagonal(), kernel(x).to_dense().diagonal(), tol=1e-12)


@few
@given(cases, sizes, seeds)
def test_feature_map(name, n, seed):
    """k = phi phi^T with phi prior-scaled, (n, K, P)."""
    p = problem(name, n=n, seed=seed)
    deltas = torch.linspace(0.3, 3.0, len(oracle.selected(p.net)), dtype=F64)
    kernel = dnn2gp.JacobianKernel(p.linearization(), prior_precision=deltas)
    phi = kernel.feature_map(floats(p.x))
    dense = p.dense(oracle.per_group(p.net, list(deltas)))
    assert_close(phi, dense.J / dense.s0_inv.sqrt(), what="phi")
    flat = phi.flatten(0, 1)
    assert_close(flat @ flat.mT, kernel(floats(p.x)).to_dense(), tol=1e-12)


@few
@given(cases, st.permutations(range(4)), seeds)
def test_permuting_examples_permutes_everything(name, order, seed):
    p = problem(name, n=4, seed=seed)
    lin, order = p.linearization(), torch.tensor(order)
    K = lin(p.x).shape[-1]
    k = lin.gram(p.x).reshape(4, K, 4, K)
    permuted = lin.gram(p.x[order]).reshape(4, K, 4, K)
    assert_close(permuted, k[order][:, :, order], tol=1e-12)
    # A posterior does not depend on the order of its data.
    a = p.gp(0.7)
    if name == "gaussian_per_example":
        p.loss_kwargs = {"sigma": p.loss_kwargs["sigma"][order]}
    p.x, p.y = p.x[order], p.y[order]
    b = p.gp(0.7)
    assert_close(flat_mean(b(p.x_test)), flat_mean(a(p.x_test)), tol=1e-10)
    assert_close(covariance(b(p.x_test)), covariance(a(p.x_test)), tol=1e-10)
    assert_close(b.log_evidence(), a.log_evidence(), tol=1e-10)


@few
@given(cases, seeds)
def test_products_are_those_of_the_jacobian(name, seed):
    p = problem(name, n=4, seed=seed)
    lin = p.linearization()
    J = p.jacobian(p.x)
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(J.shape[-1], generator=generator, dtype=F64)
    v = torch.randn(J.shape[:2], generator=generator, dtype=F64)
    assert_close(lin.jacobian(p.x), J, tol=1e-12, what="J")
    assert_close(lin.jvp(p.x, u), J @ u, tol=1e-12, what="J u")
    assert_close(lin.vjp(p.x, v), torch.einsum("nkp,nk->p", J, v), tol=1e-12, what="J^T v")


# ---- chunks


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_chunk_size_changes_nothing(name, solver):
    p = problem(name, n=12)
    lin = p.linearization()
    u, v = torch.ones_like(lin.weights), torch.ones_like(lin(p.x))
    P, nK = lin.num_weights, v.numel()

    def everything() -> list[torch.Tensor]:
        gp = p.gp(0.7, solver=solver)
        f = gp(p.x_test)
        values = [lin(p.x), lin.jacobian(p.x), lin.jvp(p.x, u), lin.vjp(p.x, v), lin.gram(p.x)]
        values += [flat_mean(f), covariance(f), gp.log_evidence(), gp.weight_posterior().mean]
        return [value.detach() for value in values]

    at_once = everything()
    # Room for a few matrices of P x P or n K x n K, of which one chunk takes a small part.
    for budget in (110 * max(P, nK) ** 2, 400 * max(P, nK) ** 2):
        with tiling.memory_limit(budget):
            for chunked, whole in zip(everything(), at_once, strict=True):
                assert_close(chunked, whole, tol=1e-10)
    with tiling.memory_limit(110 * max(P, nK) ** 2):
        rows = tiling.chunk_length(2 * P * v.shape[-1], F64, "cpu")
        assert rows < 12, f"the budget of this test no longer makes chunks, but {rows} rows"


# ---- the two sides


@settings(max_examples=30)
@given(cases, st.integers(1, 12), seeds, deltas, st.booleans())
def test_weight_space_is_function_space(name, n, seed, delta, groups):
    """n K < P and n K > P, one prior precision or one per tensor: moments, weights, evidence and its gradient."""
    p = problem(name, n=n, seed=seed)
    if groups:
        number = len(oracle.selected(p.net))
        delta = delta * torch.linspace(0.5, 2.0, number, dtype=F64)
    a, b = (p.gp(delta, solver=solver) for solver in SOLVERS)
    assert_close(flat_mean(a(p.x_test)), flat_mean(b(p.x_test)), what="mean")
    assert_close(covariance(a(p.x_test)), covariance(b(p.x_test)), what="covariance")
    assert_close(a.weight_posterior().mean, b.weight_posterior().mean, what="mean of the weights")
    assert_close(a.weight_posterior().covariance(), b.weight_posterior().covariance(), what="their covariance")
    kinds = ["laplace", "gp"] if a.likelihood.loss.invertible else ["laplace"]
    for kind in kinds:
        value_a, value_b = a.log_evidence(kind=kind), b.log_evidence(kind=kind)
        assert_close(value_a, value_b, what=f"{kind} evidence")
        gradients = [evidence_gradient(gp, v, "prior_precision") for gp, v in ((a, value_a), (b, value_b))]
        assert_close(*gradients, tol=1e-7, what="gradient in the prior precision")


@pytest.mark.parametrize("n", [2, 20])
def test_both_regimes_are_tested(n):
    """The sizes above lie on both sides of n K = P."""
    p = problem("categorical", n=n)
    assert (n * 3 < len(oracle.weights(p.net))) == (n == 2)


@settings(max_examples=10)
@given(cases, st.integers(1, 12), seeds, st.floats(0.3, 5.0))
def test_iterative_predicts_the_same(name, n, seed, delta):
    p = problem(name, n=n, seed=seed)
    iterative, dense = p.gp(delta, solver="iterative"), p.dense(delta)
    J, f = p.jacobian(p.x_test), p.outputs(p.x_test)
    assert_close(flat_mean(iterative(p.x_test)), dense.mean(J, f).flatten(), tol=1e-6, what="mean")
    assert_close(covariance(iterative(p.x_test)), dense.covariance(J), tol=1e-6, what="covariance")
    if name in PREDICTED:
        prediction, expected = (p.predict(gp, p.x_test) for gp in (iterative, p.gp(delta)))
        for field in ("mean", "variance", "aleatoric", "epistemic"):
            assert_close(getattr(prediction, field), getattr(expected, field), tol=1e-6, what=field)


@pytest.mark.parametrize("name", ["gaussian", "categorical"])
@pytest.mark.parametrize("n", [2, 40])
def test_auto_chooses_a_side_and_gives_its_answer(name, n):
    p = problem(name, n=n)
    gp, dense = p.gp(0.7), p.dense(0.7)
    assert_close(covariance(gp(p.x_test)), dense.covariance(p.jacobian(p.x_test)))
    assert_close(gp.log_evidence(), dense.log_evidence)


# ---- batches of inputs


@pytest.mark.parametrize(
    ("name", "solver"),
    [(name, solver) for name in PREDICTED for solver in SOLVERS]
    + [("gaussian", "iterative"), ("bernoulli", "iterative"), ("gaussian_per_output", "iterative")],
)
def test_batched_inputs_are_a_loop(name, solver):
    """b x q x d, and two batch dimensions."""
    p = problem(name, n=4, m=12)
    gp = p.gp(0.7, solver=solver)
    x = floats(p.x_test).reshape(2, 3, 2, -1)
    lin = p.linearization()
    f, prediction = gp(x), p.predict(gp, x)
    tol = 1e-6 if solver == "iterative" else 1e-10
    for i in range(2):
        one = gp(x[i])
        assert_close(flat_mean(f)[i], flat_mean(one), tol=tol)
        assert_close(covariance(f)[i], covariance(one), tol=tol)
        for j in range(3):
            two = gp(x[i, j])
            assert_close(flat_mean(f)[i, j], flat_mean(two), tol=tol)
            assert_close(covariance(f)[i, j], covariance(two), tol=tol)
            assert_close(lin(x)[i, j], lin(x[i, j]), tol=1e-12)
            assert_close(lin.gram(x)[i, j], lin.gram(x[i, j]), tol=1e-12)
            assert_close(lin.jacobian(x)[i, j], lin.jacobian(x[i, j]), tol=1e-12)
            alone = p.predict(gp, x[i, j])
            for field in ("mean", "variance", "aleatoric", "epistemic"):
                assert_close(getattr(prediction, field)[i, j], getattr(alone, field), tol=tol, what=field)


@pytest.mark.parametrize("name", ["gaussian", "categorical", "categorical_images", "categorical_tokens"])
def test_batched_kernel_is_a_loop(name):
    p = problem(name, n=6)
    kernel = dnn2gp.JacobianKernel(p.linearization(), prior_precision=0.7)
    x = floats(p.x).reshape(3, 2, -1)
    whole, diagonal = kernel(x).to_dense(), kernel(x, diag=True)
    for i in range(3):
        assert_close(whole[i], kernel(x[i]).to_dense(), tol=1e-12)
        assert_close(diagonal[i], kernel(x[i], diag=True), tol=1e-12)


# ---- derivatives


@pytest.mark.parametrize("name", ["gaussian", "gaussian_squeezed", "gaussian_odd_net", "categorical", "natural"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_posterior_is_differentiable_in_the_inputs(name, solver):
    p = problem(name, n=4, m=2)
    gp = p.gp(0.7, solver=solver)

    def posterior(x):
        f = gp(x)
        return flat_mean(f), covariance(f)

    def prediction(x):
        y = p.predict(gp, x)
        return y.mean, y.variance

    x = p.x_test.requires_grad_()
    assert torch.autograd.gradcheck(posterior, x, atol=1e-6)
    assert torch.autograd.gradcheck(prediction, x, atol=1e-6)


def test_images_are_differentiable_and_tokens_refuse():
    p = problem("categorical_images", n=4, m=2)
    gp = p.gp(0.7)
    x = p.x_test.requires_grad_()
    (gradient,) = torch.autograd.grad(gp.predict(x).variance.sum(), x)
    assert gradient.shape == x.shape and gradient.abs().max() > 0
    p = problem("categorical_tokens", n=4, m=2)
    with pytest.raises((ValueError, RuntimeError), match="gradient|differentiab"):
        p.gp(0.7).predict(p.x_test.double().requires_grad_())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("n", [2, 12])
@pytest.mark.parametrize("kind", ["laplace", "gp"])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("per_output", [False, True])
def test_gradients_of_the_evidence(solver, n, kind, per_tensor, per_output):
    """In delta (one, or per tensor) and the noise (one, or per output), against autograd through the P x P side."""
    p = problem("gaussian_per_output", n=n)
    number = len(oracle.selected(p.net))
    delta = torch.linspace(0.5, 2.0, number, dtype=F64) if per_tensor else torch.tensor(0.8, dtype=F64)
    noise = torch.tensor([0.09, 0.64], dtype=F64) if per_output else torch.tensor(0.25, dtype=F64)
    p.loss_kwargs = {"sigma": noise.sqrt()}
    gp = p.gp(delta, solver=solver)
    value = gp.log_evidence(kind=kind)

    delta, noise = delta.requires_grad_(), noise.requires_grad_()
    s0_inv = oracle.per_group(p.net, list(delta)) if per_tensor else delta.expand(len(oracle.weights(p.net)))
    dense = p.dense(1.0, hand=oracle.HandLoss("gaussian", noise))
    dense.s0_inv = s0_inv
    expected = dense.log_evidence if kind == "laplace" else dense.gp_log_evidence
    assert_close(value, expected, what="value")
    in_delta, in_noise = torch.autograd.grad(expected, (delta, noise))
    assert_close(evidence_gradient(gp, value, "prior_precision"), in_delta.reshape(-1), what="in delta")
    assert_close(evidence_gradient(gp, value, "noise"), in_noise.reshape(-1), what="in the noise")


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["gaussian", "gaussian_per_output", "categorical"])
def test_gradcheck_of_the_evidence(name, solver):
    """Central differences, through the setters."""
    p = problem(name, n=5)
    number = len(oracle.selected(p.net))
    delta = torch.linspace(0.5, 2.0, number, dtype=F64)
    gp = p.gp(delta, solver=solver)
    names = ["prior_precision", "noise"] if name.startswith("gaussian") else ["prior_precision"]
    for which in names:
        start = getattr(gp, which).detach().clone()
        gradient = evidence_gradient(gp, gp.log_evidence(), which).reshape(start.shape)
        direction, h = torch.linspace(1, 2, start.numel(), dtype=F64).reshape(start.shape), 1e-5
        ends = []
        for sign in (1, -1):
            setattr(gp, which, start + sign * h * direction)
            ends.append(gp.log_evidence().detach())
        setattr(gp, which, start)
        slope = (ends[0] - ends[1]) / (2 * h)
        assert_close(slope, (gradient * direction).sum(), tol=1e-6, what=which)


# ---- setting hyperparameters


@pytest.mark.parametrize("solver", [*SOLVERS, "iterative"])
@pytest.mark.parametrize("name", ["gaussian", "gaussian_per_output", "categorical"])
def test_setting_hyperparameters_is_building_anew(name, solver):
    """After predictions and evidences, no cache survives a new prior precision or noise."""
    p = problem(name, n=5)

    def use(gp) -> list[torch.Tensor]:
        f, prediction, weights = gp(p.x_test), gp.predict(p.x_test), gp.weight_posterior()
        values = [flat_mean(f), covariance(f), prediction.mean, prediction.variance, weights.mean]
        values += [gp.predict(p.x_test, mean="posterior").mean, number(gp.stationarity().newton_decrement)]
        values += [gp.dual_data().targets] if name != "categorical" else []
        if solver != "iterative":
            values += [weights.covariance(), gp.log_evidence()]
            values += [gp.log_evidence(kind="gp")] if name != "categorical" else []
        return [value.detach() for value in values]

    tol = 1e-6 if solver == "iterative" else 1e-10
    gp = p.gp(0.7, solver=solver)
    use(gp)
    gp.prior_precision = 2.5
    for a, b in zip(use(gp), use(p.gp(2.5, solver=solver)), strict=True):
        assert_close(a, b, tol=tol, what="prior precision")
    if name.startswith("gaussian"):
        noise = 0.4 if name == "gaussian" else torch.tensor([0.4, 0.05], dtype=F64)
        gp.noise = noise
        p.loss_kwargs = {"sigma": torch.as_tensor(noise, dtype=F64).sqrt()}
        for a, b in zip(use(gp), use(p.gp(2.5, solver=solver)), strict=True):
            assert_close(a, b, tol=tol, what="noise")


def test_hyperparameters_read_back_as_set():
    p = problem("gaussian")
    gp = p.gp(0.7)
    assert_close(gp.prior_precision.reshape(()), torch.tensor(0.7, dtype=F64), tol=1e-12)
    assert_close(gp.noise.reshape(()), torch.tensor(0.09, dtype=F64), tol=1e-12)
    gp.prior_precision, gp.noise = 3.0, 0.5
    assert_close(gp.prior_precision.reshape(()), torch.tensor(3.0, dtype=F64), tol=1e-12)
    assert_close(gp.noise.reshape(()), torch.tensor(0.5, dtype=F64), tol=1e-12)


# ---- under the settings that botorch installs


@pytest.mark.parametrize("solver", SOLVERS)
def test_global_settings_of_gpytorch_change_nothing(solver):
    """Importing botorch turns Woodbury off for the whole process: our closed forms do not ask."""
    import linear_operator

    p = problem("categorical", n=8)
    gp = p.gp(0.7, solver=solver)
    expected = [gp.log_evidence().detach(), flat_mean(gp(p.x_test)).detach(), covariance(gp(p.x_test)).detach()]
    for on in (False, True):
        with (
            linear_operator.settings.fast_computations(on, on, on),
            linear_operator.settings.max_cholesky_size(1 if on else 4096),
        ):
            other = p.gp(0.7, solver=solver)
            values = [other.log_evidence(), flat_mean(other(p.x_test)), covariance(other(p.x_test))]
            for a, b in zip(values, expected, strict=True):
                assert_close(a, b, tol=1e-10)


def floats(x: torch.Tensor) -> torch.Tensor:
    """Tokens travel through GPyTorch as floats."""
    return x.double()
