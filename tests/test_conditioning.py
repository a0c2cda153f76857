"""New data in closed form: conditioning a GP is building it with all the data and the same frozen net."""

import copy

import gpytorch
import pytest
import torch
from oracle import assert_close
from torch.autograd import gradcheck

import gpytorch_dnn2gp as dnn2gp
from gpytorch_dnn2gp import conditioning

F64 = torch.float64
SETTINGS = [
    {"solver": "weight_space"},
    {"solver": "function_space"},
    {"structure": "diagonal"},
    {"features": "gradient"},
    {"residual_kernel": gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel())},
]
IDS = ["weight space", "function space", "diagonal", "gradient", "residual kernel"]
N, Q, M, DIM = 12, 4, 3, 2


def problem(loss_name: str):
    """Loss, net, inputs and labels of N + Q examples, M test inputs."""
    k = {"gaussian": 2, "one output": 1, "bernoulli": 1, "categorical": 3, "poisson": 2, "heteroscedastic": 2}[
        loss_name
    ]
    net = torch.nn.Sequential(torch.nn.Linear(DIM, 5), torch.nn.Tanh(), torch.nn.Linear(5, k)).to(F64)
    x, x_test = torch.randn(N + Q, DIM, dtype=F64), torch.randn(M, DIM, dtype=F64)
    loss, y = {
        "gaussian": (dnn2gp.losses.Gaussian(torch.tensor([0.3, 0.5], dtype=F64)), torch.randn(N + Q, 2, dtype=F64)),
        "one output": (dnn2gp.losses.Gaussian(0.3), torch.randn(N + Q, dtype=F64)),
        "bernoulli": (dnn2gp.losses.Bernoulli(), torch.randint(0, 2, (N + Q,))),
        "categorical": (dnn2gp.losses.Categorical(), torch.randint(0, 3, (N + Q,))),
        "poisson": (dnn2gp.losses.Poisson(), torch.randint(0, 4, (N + Q, 2))),
        "heteroscedastic": (dnn2gp.losses.HeteroscedasticGaussian(), torch.randn(N + Q, 1, dtype=F64)),
    }[loss_name]
    return loss, net, x, y, x_test


def assert_same_posterior(actual, expected, x_test, what="", tol=1e-8):
    a, b = actual(x_test), expected(x_test)
    assert_close(a.mean, b.mean, tol, f"{what} mean")
    assert_close(a.covariance_matrix, b.covariance_matrix, tol, f"{what} covariance")


@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
@pytest.mark.parametrize(
    "loss_name", ["gaussian", "one output", "bernoulli", "categorical", "poisson", "heteroscedastic"]
)
def test_conditioned_is_rebuilt(loss_name, setting):
    check_conditioned_is_rebuilt(loss_name, setting)


@pytest.mark.parametrize("loss_name", ["one output", "categorical"])
def test_conditioned_is_rebuilt_iteratively(loss_name):
    check_conditioned_is_rebuilt(loss_name, {"solver": "iterative"})


def check_conditioned_is_rebuilt(loss_name, setting):
    loss, net, x, y, x_test = problem(loss_name)
    gp = dnn2gp.LaplaceGP(net, x[:N], y[:N], loss, 0.7, **setting)
    full = dnn2gp.LaplaceGP(net, x, y, loss, 0.7, **setting)
    before = gp(x_test)
    conditioned = gp.condition_on(x[N:], y[N:])
    assert_same_posterior(conditioned, full, x_test)
    assert torch.equal(conditioned.train_labels, full.train_labels)
    assert_close(conditioned.train_targets, full.train_targets)
    assert torch.equal(conditioned.train_inputs[0], full.train_inputs[0])

    # predictions move by exactly the added rows' effect, and spread as the rebuilt GP's
    moved = conditioned.predict(x_test).f.mean - gp.predict(x_test).f.mean
    assert_close(moved.flatten(), (full(x_test).mean - before.mean).flatten())
    assert_close(conditioned.predict(x_test).f.covariance_matrix, full.predict(x_test).f.covariance_matrix)

    if setting.get("solver") != "iterative":
        assert_close(conditioned.log_evidence(), full.log_evidence())
        if loss.invertible and "structure" not in setting:
            assert_close(conditioned.log_evidence("gp"), full.log_evidence("gp"))
    if "residual_kernel" not in setting:
        mine, theirs = conditioned.weight_posterior(), full.weight_posterior()
        assert_close(mine.mean, theirs.mean)
        assert_close(mine.covariance(), theirs.covariance())
        assert_close(mine.precision(), theirs.precision())
        assert_close(conditioned.dual_data().targets, full.dual_data().targets)
    # and the GP it came from is as before
    assert_same_posterior(gp, dnn2gp.LaplaceGP(net, x[:N], y[:N], loss, 0.7, **setting), x_test, tol=0.0)


@pytest.mark.parametrize("loss_name", ["gaussian", "categorical", "heteroscedastic"])
def test_more_added_rows_than_weights(loss_name, monkeypatch):
    """The result is in weight space then, and the same."""
    loss, net, x, y, x_test = problem(loss_name)
    repeats = 4
    more_x = torch.randn(repeats * N, DIM, dtype=F64)
    more_y = y[:N].repeat(repeats, *[1] * (y.dim() - 1))
    gp = dnn2gp.LaplaceGP(net, x, y, loss, [0.7, 0.5, 0.4, 0.6], solver="weight_space")
    wide = gp.condition_on(more_x, more_y)
    assert isinstance(wide.posterior(), conditioning.ConditionedWeights)
    monkeypatch.setattr(conditioning, "_is_plain", lambda *_: False)
    other = gp.condition_on(more_x, more_y)
    assert isinstance(other.posterior(), conditioning.ConditionedPosterior)
    assert_same_posterior(wide, other, x_test)
    for mean in ("network", "posterior"):
        assert_close(wide.predict(x_test, mean=mean).mean, other.predict(x_test, mean=mean).mean, 1e-8)
    evidences = [gp.log_evidence() for gp in (wide, other)]
    assert_close(*(e.detach() for e in evidences), 1e-9)
    for gradients in zip(
        *(
            torch.autograd.grad(e, [p for p in gp.parameters() if p.requires_grad])
            for e, gp in zip(evidences, (wide, other))
        )
    ):
        assert_close(*gradients, 1e-8)
    a, b = wide.weight_posterior(), other.weight_posterior()
    assert_close(a.mean, b.mean, 1e-8)
    assert_close(a.covariance(), b.covariance(), 1e-8)
    assert abs(wide.stationarity().newton_decrement / other.stationarity().newton_decrement - 1) < 1e-7


@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
def test_one_by_one_and_in_any_order(setting):
    loss, net, x, y, x_test = problem("categorical")
    full = dnn2gp.LaplaceGP(net, x, y, loss, 0.7, **setting)
    gp = dnn2gp.LaplaceGP(net, x[:N], y[:N], loss, 0.7, **setting)
    for i in reversed(range(N, N + Q)):
        gp = gp.condition_on(x[i : i + 1], y[i : i + 1])
    assert_same_posterior(gp, full, x_test)


@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
@pytest.mark.parametrize("loss_name", ["one output", "categorical"])
def test_batches_of_fantasies(loss_name, setting):
    loss, net, x, y, x_test = problem(loss_name)
    gp = dnn2gp.LaplaceGP(net, x[:N], y[:N], loss, 0.7, **setting)
    # two fantasies of the labels at each of three sets of inputs
    inputs = x[N:] + 0.1 * torch.arange(3, dtype=F64)[:, None, None]
    labels = torch.stack([y[N:].expand(3, Q), y[:Q].expand(3, Q)])
    fantasies = gp.get_fantasy_model(inputs, labels)
    posterior = fantasies(x_test)
    assert fantasies.train_inputs[0].shape == (2, 3, N + Q, DIM)
    assert posterior.batch_shape == (2, 3)
    batched = fantasies(x_test.expand(2, 3, M, DIM))
    for f in range(2):
        for b in range(3):
            alone = gp.condition_on(inputs[b], labels[f, b])
            expected = alone(x_test)
            for result in (posterior, batched):
                assert_close(result.mean[f, b], expected.mean)
                assert_close(result.covariance_matrix[f, b], expected.covariance_matrix)
            assert_close(fantasies.predict(x_test).mean[f, b], alone.predict(x_test).mean)
    # fantasies on fantasies
    again = fantasies.condition_on(x[:1].expand(3, 1, DIM), y[:1].expand(2, 3, 1))
    expected = gp.condition_on(torch.cat([inputs[2], x[:1]]), torch.cat([labels[1, 2], y[:1]]))
    assert_close(again(x_test).mean[1, 2], expected(x_test).mean)


@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
@pytest.mark.parametrize("loss_name", ["one output", "categorical"])
def test_gradients_through_posterior_and_fantasies(loss_name, setting):
    check_gradients(loss_name, setting)


def test_gradients_of_the_iterative_solver():
    check_gradients("one output", {"solver": "iterative"})


def check_gradients(loss_name, setting):
    loss, net, x, y, x_test = problem(loss_name)
    gp = dnn2gp.LaplaceGP(net, x[:N], y[:N], loss, 0.7, **setting)

    def posterior(inputs):
        out = gp(inputs)
        return out.mean, out.covariance_matrix

    def after_fantasy(inputs, new):
        out = gp.condition_on(new, y[N : N + 1])(inputs)
        return out.mean, out.covariance_matrix

    points, new = x_test[:2].clone().requires_grad_(), x[N : N + 1].clone().requires_grad_()
    assert gradcheck(posterior, points)
    assert gradcheck(after_fantasy, (points, new))


def test_nothing_is_linearized_twice(monkeypatch):
    """Conditioning costs the new rows; a posterior on m points linearizes m points."""
    loss, net, x, y, x_test = problem("gaussian")
    seen = []
    original = dnn2gp.jacobians.NetFunction.jacobian_rows

    def counting(self, inputs, cotangents, part):
        seen.append(len(inputs[part]))
        return original(self, inputs, cotangents, part)

    gp = dnn2gp.LaplaceGP(net, x[:N], y[:N], loss, 0.7, solver="function_space")
    gp(x_test)
    monkeypatch.setattr(dnn2gp.jacobians.NetFunction, "jacobian_rows", counting)
    gp(x_test)
    assert sum(seen) == M
    seen.clear()
    conditioned = gp.condition_on(x[N:], y[N:])
    conditioned(x_test)
    assert sum(seen) == Q + M
    seen.clear()
    conditioned(x_test)
    gp.prior_precision = 2.0
    gp(x_test)
    assert sum(seen) == 2 * M  # a new delta recomputes no Jacobian of the training data


def test_hyperparameters_of_a_conditioned_gp_are_its_own():
    loss, net, x, y, x_test = problem("one output")
    gp = dnn2gp.LaplaceGP(net, x[:N], y[:N], loss, 0.7)
    conditioned = gp.condition_on(x[N:], y[N:])
    expected = gp(x_test).covariance_matrix
    conditioned.prior_precision, conditioned.noise = 3.0, 0.2
    assert_same_posterior(
        conditioned, dnn2gp.LaplaceGP(net, x, y, dnn2gp.losses.Gaussian(0.2**0.5), 3.0), x_test, "changed"
    )
    assert torch.equal(gp(x_test).covariance_matrix, expected)
    assert conditioned.linearization is gp.linearization  # the frozen net is shared, not copied


def test_evidence_of_a_conditioned_gp_is_differentiable():
    loss, net, x, y, _ = problem("one output")
    conditioned = dnn2gp.LaplaceGP(net, x[:N], y[:N], loss, 0.7).condition_on(x[N:], y[N:])
    delta, noise = torch.tensor([0.7], dtype=F64, requires_grad=True), torch.tensor(0.09, dtype=F64, requires_grad=True)
    for kind in ("laplace", "gp"):
        assert gradcheck(
            lambda d, s, kind=kind: conditioned.log_evidence(kind, prior_precision=d, noise=s), (delta, noise)
        )


def test_noise_of_new_examples():
    _, net, x, y, x_test = problem("one output")
    noise = torch.linspace(0.1, 0.4, N + Q, dtype=F64)[:, None]
    full = dnn2gp.LaplaceGP(net, x, y, dnn2gp.losses.Gaussian(noise.sqrt()), 0.7)
    gp = dnn2gp.LaplaceGP(net, x[:N], y[:N], dnn2gp.losses.Gaussian(noise[:N].sqrt()), 0.7)
    with pytest.raises(ValueError, match="pass noise="):
        gp.condition_on(x[N:], y[N:])
    assert_same_posterior(gp.condition_on(x[N:], y[N:], noise=noise[N:, 0]), full, x_test)
    twice = gp.condition_on(x[N : N + 1], y[N : N + 1], noise=noise[N : N + 1])
    assert_same_posterior(twice.condition_on(x[N + 1 :], y[N + 1 :], noise=noise[N + 1 :]), full, x_test)


def test_a_confidently_wrong_new_label_pulls():
    """Its Lambda vanishes, its residual does not."""
    loss, net, x, y, x_test = problem("categorical")
    with torch.no_grad():
        net[2].weight *= 200
    gp = dnn2gp.LaplaceGP(net, x[:N], y[:N], loss, 0.7, solver="weight_space")
    wrong = net(x[N:]).argmin(-1)
    full = dnn2gp.LaplaceGP(net, x, torch.cat([y[:N], wrong]), loss, 0.7, solver="weight_space")
    conditioned = gp.condition_on(x[N:], wrong)
    assert_same_posterior(conditioned, full, x_test)
    assert (conditioned(x_test).mean - gp(x_test).mean).abs().max() > 0.1


def test_set_train_data():
    loss, net, x, y, x_test = problem("one output")
    gp = dnn2gp.LaplaceGP(net, x[:N], y[:N], loss, 0.7)
    gp(x_test)
    gp.set_train_data(x[Q : N + Q], y[Q : N + Q])
    assert_same_posterior(gp, dnn2gp.LaplaceGP(net, x[Q : N + Q], y[Q : N + Q], loss, 0.7), x_test, tol=0.0)
    with pytest.raises(RuntimeError, match="strict=False"):
        gp.set_train_data(x, y)
    gp.set_train_data(x, y, strict=False)
    assert_same_posterior(gp, dnn2gp.LaplaceGP(net, x, y, loss, 0.7), x_test, tol=0.0)


def test_moving_to_another_dtype_takes_everything_along():
    loss, net, x, y, x_test = problem("one output")
    gp = dnn2gp.LaplaceGP(net, x[:N], y[:N], loss, 0.7).condition_on(x[N:], y[N:])
    expected = gp(x_test)
    single = gp.float()(x_test.float())
    assert single.mean.dtype == torch.float32
    assert_close(single.mean, expected.mean, 1e-3)
    assert_close(single.covariance_matrix, expected.covariance_matrix, 1e-3)


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (torch.zeros(2, DIM, dtype=F64), torch.zeros(3, dtype=F64), "do not fit 2 new inputs"),
        (torch.full((2, DIM), torch.nan, dtype=F64), torch.zeros(2, dtype=F64), "x has 4 entries that are NaN"),
        (torch.zeros(2, DIM, dtype=F64), torch.tensor([0.0, torch.inf], dtype=F64), "inf"),
    ],
)
def test_bad_new_data(inputs, labels, message):
    loss, net, x, y, _ = problem("one output")
    gp = dnn2gp.LaplaceGP(net, x[:N], y[:N], loss, 0.7)
    with pytest.raises(ValueError, match=message):
        gp.condition_on(inputs, labels)


# ---- residual kernel


@pytest.mark.parametrize("loss_name", ["gaussian", "one output"])
def test_residual_kernel_against_dense_gp_regression(loss_name):
    loss, net, x, y, x_test = problem(loss_name)
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel())
    kernel.outputscale = 0.4
    gp = dnn2gp.LaplaceGP(net, x, y, loss, 0.7, residual_kernel=kernel)
    k_outputs, n = gp.num_outputs, len(x) * gp.num_outputs
    with gpytorch.settings.prior_mode():
        prior = gp(torch.cat([x, x_test]))
    jac = gp.linearization.jacobian(torch.cat([x, x_test])).flatten(0, 1)
    k = jac @ jac.T / 0.7 + torch.kron(
        kernel(torch.cat([x, x_test])).to_dense().detach().to(F64), torch.eye(k_outputs, dtype=F64)
    )
    assert_close(prior.covariance_matrix, k, 1e-6)  # the user's kernel is in float32
    k, mean = prior.covariance_matrix.detach(), prior.mean.detach().reshape(-1)
    noise = loss.noise.to(F64).expand(len(x), k_outputs).reshape(-1)
    a, z = k[:n, :n] + torch.diag(noise), y.reshape(-1)
    posterior = gp(x_test)
    assert_close(posterior.mean.reshape(-1), mean[n:] + k[n:, :n] @ torch.linalg.solve(a, z - mean[:n]))
    assert_close(posterior.covariance_matrix, k[n:, n:] - k[n:, :n] @ torch.linalg.solve(a, k[:n, n:]))
    evidence = torch.distributions.MultivariateNormal(mean[:n], a).log_prob(z)
    assert_close(gp.log_evidence("gp"), evidence)


def test_residual_kernel_widens_the_band_far_away_and_is_fitted():
    loss, net, x, y, _ = problem("categorical")
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel())
    far = torch.full((1, DIM), 50.0, dtype=F64)
    plain = dnn2gp.LaplaceGP(net, x, y, loss, 5.0)
    gp = dnn2gp.LaplaceGP(net, x, y, loss, 5.0, residual_kernel=kernel)
    gained = (gp(far).variance - plain(far).variance).squeeze()
    assert (gained > 0.999 * float(kernel.outputscale.detach())).all()  # and what the data now say less of the weights
    before = gp.residual_kernel.raw_outputscale.detach().clone()
    fit = dnn2gp.fit_evidence(gp, warn=False)
    assert fit.evidence_after > fit.evidence_before
    assert not torch.equal(gp.residual_kernel.raw_outputscale, before)
    assert_close(torch.tensor(fit.evidence_after), gp.log_evidence(), 1e-6)
    with pytest.raises(ValueError, match="function space"):
        dnn2gp.LaplaceGP(net, x, y, loss, residual_kernel=kernel, solver="weight_space")


def test_a_gp_and_one_conditioned_from_it_do_not_share_the_residual_kernel():
    loss, net, x, y, x_test = problem("one output")
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel())
    gp = dnn2gp.LaplaceGP(net, x[:N], y[:N], loss, 0.7, residual_kernel=kernel)
    gp(x_test)
    conditioned = gp.condition_on(x[N:], y[N:])
    gp.residual_kernel.outputscale = 50.0
    assert_same_posterior(conditioned, dnn2gp.LaplaceGP(net, x, y, loss, 0.7, residual_kernel=kernel), x_test)


def test_noise_given_to_some_leaves_the_gps_own_to_the_others():
    _, net, x, y, x_test = problem("one output")
    gp = dnn2gp.LaplaceGP(net, x[:N], y[:N], dnn2gp.losses.Gaussian(0.3), 0.7)
    conditioned = gp.condition_on(x[N : N + 2], y[N : N + 2]).condition_on(x[N + 2 :], y[N + 2 :], noise=0.5)
    conditioned.noise = 0.9
    noise = torch.full((N + Q, 1), 0.9, dtype=F64)
    noise[N + 2 :] = 0.5
    full = dnn2gp.LaplaceGP(net, x, y, dnn2gp.losses.Gaussian(noise.sqrt()), 0.7)
    assert_same_posterior(conditioned, full, x_test)
    own = torch.tensor(0.9, dtype=F64, requires_grad=True)
    assert gradcheck(lambda s: conditioned.log_evidence(noise=s), own)
    with pytest.raises(ValueError, match="would forget"):
        conditioned.set_train_data(targets=conditioned.train_labels)
    with pytest.raises(ValueError, match="log_evidence"):
        conditioned.train()(*conditioned.train_inputs)


@pytest.mark.parametrize("fisher", [None, lambda f: torch.eye(2, dtype=f.dtype).expand(*f.shape, 2) * 3])
def test_fantasies_with_a_loss_of_ones_own(fisher):
    _, net, x, y, x_test = problem("gaussian")
    loss = dnn2gp.losses.from_callable(lambda f, label: 1.5 * ((f - label) ** 2).sum(), fisher=fisher)
    gp = dnn2gp.LaplaceGP(net, x[:N], y[:N], loss, 0.7)
    inputs, labels = torch.stack([x[N:], x[:Q]]), torch.randn(3, 2, Q, 2, dtype=F64)
    fantasies = gp.get_fantasy_model(inputs, labels)(x_test)
    alone = gp.condition_on(inputs[1], labels[2, 1])(x_test)
    assert_close(fantasies.mean[2, 1], alone.mean)
    assert_close(fantasies.covariance_matrix[2, 1], alone.covariance_matrix)


@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
def test_no_test_points(setting):
    loss, net, x, y, _ = problem("gaussian")
    gp = dnn2gp.LaplaceGP(net, x[:N], y[:N], loss, 0.7, **setting)
    for model in (gp, gp.condition_on(x[N:], y[N:])):
        assert model(x[:0]).mean.shape == (0, 2)
        assert model(x[:0]).covariance_matrix.shape == (0, 0)
        with pytest.raises(ValueError, match="no inputs to predict"):
            model.predict(x[:0])
    with pytest.raises(ValueError, match="no new examples"):
        gp.condition_on(x[:0], y[:0])


def test_a_gp_conditioned_on_inputs_with_a_graph_can_be_copied():
    loss, net, x, y, x_test = problem("one output")
    gp = dnn2gp.LaplaceGP(net, x[:N], y[:N], loss, 0.7)
    new = x[N:].clone().requires_grad_() * 1.0
    conditioned = gp.condition_on(new, y[N:])
    expected = conditioned(x_test)
    copied = copy.deepcopy(conditioned)
    assert torch.equal(copied(x_test).mean, expected.mean)
    copied.prior_precision = 3.0
    assert torch.equal(conditioned(x_test).mean, expected.mean)


def test_stationarity_counts_the_residual_functions_move():
    loss, net, x, y, _ = problem("one output")
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel())
    gp = dnn2gp.LaplaceGP(net, x, y, loss, 0.7, residual_kernel=kernel)
    gap = float((gp.log_evidence("gp") - gp.log_evidence("laplace")).detach())
    assert gp.stationarity().evidence_gap == pytest.approx(gap, rel=1e-8)
    with pytest.raises(TypeError, match="GPyTorch kernel"):
        dnn2gp.LaplaceGP(net, x, y, loss, residual_kernel="rbf")
    with pytest.raises(TypeError, match="tensor"):
        gp.condition_on(x[:1], [0.0])
