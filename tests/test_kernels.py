"""JacobianKernel in a user's own ExactGP: GPyTorch's contract, posteriors, hyperparameters, work done once."""

import contextlib
import copy
import pickle
import subprocess
import sys
import unittest
from pathlib import Path

import gpytorch
import linear_operator
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.test.base_kernel_test_case import BaseKernelTestCase
from gpytorch_settings import botorch_off, botorch_on
from problems import F64, mlp, problem, randomized
from torch import nn
from torch.testing import assert_close

import gpytorch_dnn2gp as dnn2gp
from gpytorch_dnn2gp.kernels import WeightSpaceStrategy
from gpytorch_dnn2gp.operators import NoisyFeatureGram

SETTINGS = {"plain": botorch_off, "botorch": botorch_on}
CASES = ["gaussian", "gaussian_per_output", "gaussian_odd_net", "bernoulli_outputs", "poisson", "log_sigma"]


@pytest.fixture(params=SETTINGS)
def settings(request):
    with SETTINGS[request.param]():
        yield request.param


class UserGP(gpytorch.models.ExactGP):
    """As a user would write it."""

    def __init__(self, x, y, likelihood, mean, kernel):
        super().__init__(x, y, likelihood)
        self.mean_module, self.covar_module = mean, kernel

    def forward(self, x):
        mean, covariance = self.mean_module(x), self.covar_module(x)
        kind = MultivariateNormal if mean.shape == x.shape[:-1] else MultitaskMultivariateNormal
        return kind(mean, covariance)


def user_gp(name, n=6, delta=0.7, wrap=lambda kernel: kernel, likelihood=None):
    """A user's GP, our GP of the same net, the problem."""
    p = problem(name, n=n)
    gp = p.gp(delta)
    lin = gp.linearization
    likelihood = likelihood or dnn2gp.GGNLikelihood(p.loss(), lin)
    model = UserGP(p.x, gp.train_targets, likelihood, dnn2gp.NetworkMean(lin), wrap(dnn2gp.JacobianKernel(lin, delta)))
    return model.eval(), gp, p


def mll_value(model):
    model.train()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    value = mll(model(*model.train_inputs), model.train_targets, *model.train_inputs)
    model.eval()
    return value


def dense_posterior(p, y, kernel, x_test, mean):
    """Mean and covariance at x_test by the GP's formula with dense matrices."""
    noise = torch.linalg.inv(p.hand.lam(p.outputs(p.x), p.labels))
    a = kernel(p.x, p.x) + torch.block_diag(*noise)
    cross = kernel(x_test, p.x)
    center = mean(x_test).flatten() + cross @ torch.linalg.solve(a, (y - mean(p.x)).flatten())
    return center, kernel(x_test, x_test) - cross @ torch.linalg.solve(a, cross.mT), a


# ---- GPyTorch's contract


class AnyWidth(nn.Module):
    """A net for inputs of any width, as the suite asks for."""

    def __init__(self, num_outputs):
        super().__init__()
        self.net = randomized(mlp(2, 3, num_outputs), seed=1).to(torch.get_default_dtype())

    def forward(self, x):
        return self.net(torch.stack([x.sin().sum(-1), x.square().mean(-1)], -1))


class _Contract:
    num_outputs, settings = 1, staticmethod(botorch_off)

    def setUp(self):
        super().setUp()
        self.enterContext(self.settings())

    def create_kernel_no_ard(self, **kwargs):
        return dnn2gp.JacobianKernel(AnyWidth(self.num_outputs), 2.0, **kwargs)


class TestJacobianKernel(_Contract, BaseKernelTestCase, unittest.TestCase):
    pass


class TestJacobianKernelAfterBotorch(_Contract, BaseKernelTestCase, unittest.TestCase):
    settings = staticmethod(botorch_on)


class TestJacobianKernelOutputs(_Contract, BaseKernelTestCase, unittest.TestCase):
    num_outputs = 2


class TestJacobianKernelOutputsAfterBotorch(TestJacobianKernelOutputs):
    settings = staticmethod(botorch_on)


class TestJacobianKernelGroups(_Contract, BaseKernelTestCase, unittest.TestCase):
    def create_kernel_no_ard(self, batch_shape=torch.Size(), **kwargs):
        delta = torch.tensor([0.5, 3.0]).expand(*batch_shape, 2)
        groups = ["net.0", "net.2"]
        return dnn2gp.JacobianKernel(AnyWidth(1), delta, groups, batch_shape=batch_shape, **kwargs)


class TestScaledJacobianKernel(_Contract, BaseKernelTestCase, unittest.TestCase):
    num_outputs = 2

    def create_kernel_no_ard(self, **kwargs):
        batch_shape = kwargs.get("batch_shape", torch.Size())
        return gpytorch.kernels.ScaleKernel(super().create_kernel_no_ard(**kwargs), batch_shape=batch_shape)


# ---- posterior and evidence


@pytest.mark.parametrize("n", [3, 25])  # n K below and above P
@pytest.mark.parametrize("name", CASES)
def test_posterior_and_evidence_are_those_of_laplace_gp(name, n, settings):
    model, gp, p = user_gp(name, n)
    ours, theirs = gp(p.x_test), model(p.x_test)
    assert theirs.event_shape == ours.event_shape
    assert_close(theirs.mean, ours.mean)
    assert_close(theirs.covariance_matrix, ours.covariance_matrix)
    assert_close(mll_value(model), gp.log_evidence(kind="gp") / gp.train_targets.numel())


@pytest.mark.parametrize("name", ["gaussian", "log_sigma"])
@pytest.mark.parametrize("n", [3, 25])
def test_evidence_gradients_are_those_of_laplace_gp(name, n, settings):
    model, gp, _ = user_gp(name, n)
    (ours,) = torch.autograd.grad(gp.log_evidence(kind="gp"), gp.covar_module.raw_prior_precision)
    (theirs,) = torch.autograd.grad(mll_value(model), model.covar_module.raw_prior_precision)
    assert_close(theirs * gp.train_targets.numel(), ours)


WRAPPERS = {
    "scaled": (lambda k: scaled(k), lambda k, rbf: 3.0 * k),
    "added": (lambda k: k + rbf_like(k), lambda k, rbf: k + rbf),
    "added_first": (lambda k: rbf_like(k) + k, lambda k, rbf: k + rbf),
    "scaled_and_added": (lambda k: scaled(scaled(k) + rbf_like(k)), lambda k, rbf: 3.0 * (3.0 * k + rbf)),
    "multiplied": (lambda k: k * rbf_like(k), lambda k, rbf: k * rbf),
}


def scaled(kernel):
    kernel = gpytorch.kernels.ScaleKernel(kernel).double()
    kernel.outputscale = 3.0
    return kernel


def rbf_like(kernel):
    num_outputs = kernel.linearization.num_outputs if hasattr(kernel, "linearization") else 1
    if hasattr(kernel, "base_kernel"):
        num_outputs = kernel.base_kernel.linearization.num_outputs
    rbf = gpytorch.kernels.RBFKernel()
    if num_outputs > 1:
        rbf = gpytorch.kernels.MultitaskKernel(rbf, num_tasks=num_outputs, rank=1)
    return rbf.double()


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["gaussian", "gaussian_per_output"])
@pytest.mark.parametrize("n", [3, 25])
def test_posterior_and_evidence_of_composed_kernels(wrapper, name, n, settings):
    wrap, by_hand = WRAPPERS[wrapper]
    model, gp, p = user_gp(name, n, wrap=wrap)
    rbf = [k for k in model.covar_module.modules() if isinstance(k, gpytorch.kernels.MultitaskKernel)]
    rbf = rbf or [k for k in model.covar_module.modules() if isinstance(k, gpytorch.kernels.RBFKernel)]

    def kernel(a, b):
        j = p.jacobian(a).flatten(0, 1) @ p.jacobian(b).flatten(0, 1).mT / 0.7
        return by_hand(j, rbf[0](a, b).to_dense().detach() if rbf else None)

    def center(x):
        return gp.mean_module(x).reshape(len(x), -1)

    y = gp.train_targets.reshape(n, -1)
    mean, covariance, a = dense_posterior(p, y, kernel, p.x_test, center)
    posterior = model(p.x_test)
    assert_close(posterior.mean.flatten(), mean)
    assert_close(posterior.covariance_matrix, covariance)
    expected = torch.distributions.MultivariateNormal(center(p.x).flatten(), a).log_prob(y.flatten())
    assert_close(mll_value(model).detach() * y.numel(), expected)


@pytest.mark.parametrize("n", [3, 25])
def test_gpytorch_likelihoods_work_too(n, settings):
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    likelihood.noise = 0.09
    model, gp, p = user_gp("gaussian", n, likelihood=likelihood)
    assert_close(model(p.x_test).covariance_matrix, gp(p.x_test).covariance_matrix)
    assert_close(mll_value(model), gp.log_evidence(kind="gp") / n)
    likelihood = gpytorch.likelihoods.MultitaskGaussianLikelihood(num_tasks=2, has_global_noise=False).double()
    likelihood.task_noises = torch.tensor([0.09, 0.64], dtype=F64)
    model, gp, p = user_gp("gaussian_per_output", n, likelihood=likelihood)
    assert_close(model(p.x_test).covariance_matrix, gp(p.x_test).covariance_matrix)
    assert_close(mll_value(model), gp.log_evidence(kind="gp") / (2 * n))


@pytest.mark.parametrize("name", ["gaussian", "gaussian_per_output"])
def test_batches_of_test_points(name):
    model, _, p = user_gp(name, 25)
    batch = torch.randn(4, 2, 2, dtype=F64)
    together = model(batch)
    for i, x in enumerate(batch):
        alone = model(x)
        assert_close(together.mean[i], alone.mean)
        assert_close(together.covariance_matrix[i], alone.covariance_matrix)


def test_a_batch_of_hyperparameters_is_as_many_kernels():
    p = problem("gaussian_per_output")
    lin, delta = p.linearization(), torch.tensor([0.2, 3.0, 1.0], dtype=F64)
    batched = dnn2gp.JacobianKernel(lin, delta, batch_shape=torch.Size([3]))
    for i in range(3):
        alone = dnn2gp.JacobianKernel(lin, delta[i])
        assert_close(batched(p.x, p.x_test).to_dense()[i], alone(p.x, p.x_test).to_dense())
        assert_close(batched[i](p.x).to_dense(), alone(p.x).to_dense())
    assert batched.expand_batch(2, 3)(p.x).shape == (2, 3, 12, 12)


def test_feature_map_slices_and_diagonal():
    p = problem("gaussian_per_output")
    kernel = dnn2gp.JacobianKernel(p.linearization(), 0.7)
    phi, full = kernel.feature_map(p.x), kernel(p.x).to_dense()
    j = p.jacobian(p.x).flatten(0, 1)
    assert phi.shape == (6, 2, j.shape[-1])
    assert_close(phi.flatten(0, 1) @ phi.flatten(0, 1).mT, full)
    assert_close(full, j @ j.mT / 0.7)
    assert_close(kernel(p.x)[2:8, 4:].to_dense(), full[2:8, 4:])
    assert_close(kernel(p.x)[1:4, ::3].to_dense(), full[1:4, ::3])
    assert_close(kernel(p.x, diag=True), full.diagonal())
    assert_close(kernel(p.x[:3], p.x_test, diag=True), kernel(p.x[:3], p.x_test).to_dense().diagonal())
    with dnn2gp.tiling.memory_limit(2 * 8 * phi.numel()):  # too large for features, not for the matrix or its blocks
        assert_close(kernel(p.x, diag=True), full.diagonal())


@pytest.mark.parametrize("name", ["gaussian", "gaussian_per_output"])
@pytest.mark.parametrize("n", [3, 25])
def test_gradients_in_x(name, n):
    model, _, p = user_gp(name, n)

    def values(x):
        posterior = model(x)
        return posterior.mean, posterior.covariance_matrix

    assert torch.autograd.gradcheck(values, p.x_test.clone().requires_grad_())


def test_memory_too_small_for_features_changes_nothing():
    model, gp, p = user_gp("gaussian_per_output", 3)
    expected, posterior = mll_value(model).detach(), gp(p.x_test)
    size = 8 * 2 * 6 * gp.linearization.num_weights
    with dnn2gp.tiling.memory_limit(2 * size - 16):
        model, _, _ = user_gp("gaussian_per_output", 3)
        assert not isinstance(model.covar_module(p.x).evaluate_kernel(), dnn2gp.operators.FeatureGram)
        assert_close(mll_value(model).detach(), expected)
        assert_close(model(p.x_test).covariance_matrix, posterior.covariance_matrix)


# ---- more data


def extended(model, x, y, likelihood=None):
    """A new GP with all the data."""
    targets = torch.cat([model.train_targets, y])
    inputs = torch.cat([model.train_inputs[0], x])
    likelihood = likelihood or copy.deepcopy(model.likelihood)
    return UserGP(inputs, targets, likelihood, model.mean_module, copy.deepcopy(model.covar_module)).eval()


@pytest.mark.parametrize("q", [1, 3])
@pytest.mark.parametrize("n", [3, 25])
@pytest.mark.parametrize("name", ["gaussian", "gaussian_per_output", "log_sigma"])
def test_fantasies_equal_a_gp_with_all_the_data(name, n, q, settings):
    model, _, p = user_gp(name, n)
    x, y = torch.randn(q, 2, dtype=F64), torch.randn(q, *model.train_targets.shape[1:], dtype=F64)
    model(p.x_test)
    fantasy, again = model.get_fantasy_model(x, y), None
    for new in (fantasy, extended(model, x, y)):
        posterior = new(p.x_test)
        again = again or posterior
        assert_close(posterior.mean, again.mean)
        assert_close(posterior.covariance_matrix, again.covariance_matrix)
    twice = fantasy.get_fantasy_model(x + 1, y)
    assert_close(twice(p.x_test).mean, extended(extended(model, x, y), x + 1, y)(p.x_test).mean)


COMPOSED = {
    "sum": lambda k: k + rbf_like(k),
    "longer_sum": lambda k: k + rbf_like(k) + rbf_like(k),
    "scaled_sum": lambda k: scaled(k + rbf_like(k)),
    "product": lambda k: k * rbf_like(k),
}


@pytest.mark.parametrize("wrap", COMPOSED)
@pytest.mark.parametrize("q", [1, 3])
@pytest.mark.parametrize("name", ["gaussian", "gaussian_per_output"])
def test_fantasies_of_composed_kernels(name, q, wrap):
    model, _, p = user_gp(name, 8, wrap=COMPOSED[wrap])
    model(p.x_test)
    x, y = torch.randn(q, 2, dtype=F64), torch.randn(q, *model.train_targets.shape[1:], dtype=F64)
    fantasy, both = model.get_fantasy_model(x, y), extended(model, x, y)
    assert not torch.allclose(fantasy(p.x_test).mean, model(p.x_test).mean)
    assert_close(fantasy(p.x_test).mean, both(p.x_test).mean)
    assert_close(fantasy(p.x_test).covariance_matrix, both(p.x_test).covariance_matrix)
    assert_close(fantasy.get_fantasy_model(x + 1, y)(p.x_test).mean, extended(both, x + 1, y)(p.x_test).mean)


@pytest.mark.parametrize("name", ["gaussian", "gaussian_per_output"])
def test_batches_of_fantasies(name):
    model, _, p = user_gp(name, 25)
    model(p.x_test)
    event = model.train_targets.shape[1:]
    labels = torch.randn(4, 2, *event, dtype=F64)
    same, several = torch.randn(2, 2, dtype=F64), torch.randn(4, 2, 2, dtype=F64)
    at_same, at_several = model.get_fantasy_model(same, labels), model.get_fantasy_model(several, labels)
    for i in range(4):
        for many, x in ((at_same, same), (at_several, several[i])):
            one = extended(model, x, labels[i])(p.x_test)
            assert_close(many(p.x_test).mean[i], one.mean)
            assert_close(many(p.x_test).covariance_matrix[i], one.covariance_matrix)


@pytest.mark.parametrize("name", ["gaussian", "gaussian_per_output", "poisson"])
def test_fantasies_with_noise_of_their_own(name):
    model, _, p = user_gp(name, 8)
    model(p.x_test)
    k = 1 if name == "gaussian" else 2
    x, y = torch.randn(3, 2, dtype=F64), torch.randn(3, *model.train_targets.shape[1:], dtype=F64)
    root = torch.randn(3, k, k, dtype=F64)
    noise = root @ root.mT + 0.1 * torch.eye(k, dtype=F64)
    before = model.likelihood.noise_covariance(p.x, torch.Size((8, k))).detach()
    likelihood = dnn2gp.GGNLikelihood(noise=torch.cat([before, noise]), train_inputs=torch.cat([p.x, x]))
    expected = extended(model, x, y, likelihood)(p.x_test)
    posterior = model.get_fantasy_model(x, y, noise=noise)(p.x_test)
    assert_close(posterior.mean, expected.mean)
    assert_close(posterior.covariance_matrix, expected.covariance_matrix)


def test_gradients_through_fantasies():
    model, _, p = user_gp("gaussian_per_output", 4)
    model(p.x_test)
    y = torch.randn(2, 2, dtype=F64)

    def values(x):
        with gpytorch.settings.detach_test_caches(False):
            posterior = model.get_fantasy_model(x, y)(p.x_test)
            return posterior.mean, posterior.covariance_matrix

    assert torch.autograd.gradcheck(values, torch.randn(2, 2, dtype=F64, requires_grad=True))


# ---- hyperparameters


def test_groups_priors_and_constraints_are_gpytorchs():
    p = problem("gaussian")
    prior = gpytorch.priors.GammaPrior(2.0, 1.0)
    constraint = gpytorch.constraints.Interval(0.01, 100.0)
    kernel = dnn2gp.JacobianKernel(
        p.net, [0.5, 2.0], ["0", "2"], prior_precision_prior=prior, prior_precision_constraint=constraint
    )
    assert_close(kernel.prior_precision.detach(), torch.tensor([0.5, 2.0], dtype=F64))
    assert_close(kernel.prior_variance.detach(), torch.tensor([2.0] * 12 + [0.5] * 5, dtype=F64))
    ((_, module, found, closure, setting),) = kernel.named_priors()
    assert_close(found.log_prob(closure(module)), prior.log_prob(kernel.prior_precision))
    setting(module, torch.tensor([1.0, 3.0], dtype=F64))
    assert_close(kernel.prior_precision.detach(), torch.tensor([1.0, 3.0], dtype=F64))
    for other in (pickle.loads(pickle.dumps(kernel)), copy.deepcopy(kernel)):
        assert_close(other(p.x).to_dense(), kernel(p.x).to_dense())
    with pytest.raises(ValueError, match="prior_precision must be positive"):
        kernel.prior_precision = [1.0, -1.0]


def test_state_dict_round_trip():
    p = problem("gaussian_per_output")
    kernel = dnn2gp.JacobianKernel(p.net, [0.5, 2.0], ["0", "2"])
    other = dnn2gp.JacobianKernel(randomized(mlp(num_outputs=2), 3), [1.0, 1.0], ["0", "2"])
    other(p.x).to_dense()  # what it keeps must not outlive its net
    other.load_state_dict(kernel.state_dict())
    assert_close(other(p.x).to_dense(), kernel(p.x).to_dense())


@pytest.mark.parametrize("net", ["same", "other"])
def test_a_state_dict_with_other_groups_or_params_is_refused(net):
    p = problem("gaussian_per_output")
    other_net = p.net if net == "same" else randomized(mlp(num_outputs=2), 3)
    kernel = dnn2gp.JacobianKernel(p.net, [0.5, 2.0], ["0", "2"])
    for groups, params in [
        (["2", "0"], None),
        ([["0.weight", "2"], "0.bias"], None),
        (["0.weight", "0.bias"], ["0.weight", "0.bias"]),
    ]:
        other = UserGP(
            p.x,
            p.y,
            gpytorch.likelihoods.GaussianLikelihood(),
            dnn2gp.NetworkMean(other_net),
            gpytorch.kernels.ScaleKernel(dnn2gp.JacobianKernel(other_net, [1.0, 1.0], groups, params=params)),
        )
        state = {f"covar_module.base_kernel.{name}": tensor for name, tensor in kernel.state_dict().items()}
        for strict in (True, False):
            with pytest.raises(ValueError, match="other params or other groups"):
                other.load_state_dict(other.state_dict() | state, strict=strict)
            assert_close(other.covar_module.base_kernel.prior_precision.detach(), torch.ones(2, dtype=F64))
    for same in (copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel)), kernel.float()):
        same.load_state_dict(kernel.state_dict())
        with pytest.raises(ValueError, match="other params or other groups"):
            same.load_state_dict(dnn2gp.JacobianKernel(p.net, [0.5, 2.0], ["2", "0"]).state_dict())


def test_precisions_of_a_batch_with_groups():
    net, groups = problem("gaussian").net, ["0", "2"]
    batch, delta = torch.Size([2]), torch.tensor([0.5, 3.0], dtype=F64)
    kernel = dnn2gp.JacobianKernel(net, delta, groups, batch_shape=batch)
    assert_close(kernel.prior_precision.detach(), delta.expand(2, 2))  # rows alike: the last dimension is groups
    kernel.prior_precision = torch.tensor([[0.5, 3.0], [1.0, 2.0]])
    assert_close(kernel.prior_precision.detach(), torch.tensor([[0.5, 3.0], [1.0, 2.0]], dtype=F64))
    kernel.prior_precision = delta.flip(0)
    assert_close(kernel.prior_precision.detach(), delta.flip(0).expand(2, 2))
    alone = dnn2gp.JacobianKernel(net, delta, batch_shape=batch)
    assert_close(alone.prior_precision.detach(), delta[:, None])
    many = torch.Size([2, 3])
    assert dnn2gp.JacobianKernel(net, torch.ones(3), batch_shape=many).prior_precision.shape == (2, 3, 1)
    with pytest.raises(ValueError, match=r"has shape \(3,\).*give shape \(\*batch_shape, G\) = \(3, 2\)"):
        dnn2gp.JacobianKernel(net, torch.ones(3), groups, batch_shape=torch.Size([3]))
    with pytest.raises(ValueError, match=r"give shape \(\*batch_shape, G\) = \(2, 2\)"):
        kernel.prior_precision = torch.ones(3)


def test_half_precision_is_refused_and_changes_nothing():
    p = problem("gaussian")
    kernel = dnn2gp.JacobianKernel(p.net)
    before = kernel(p.x).to_dense()
    for move in (kernel.half, kernel.bfloat16, gpytorch.kernels.ScaleKernel(kernel).half):
        with pytest.raises(ValueError, match="JacobianKernel cannot be torch.b?float16"):
            move()
    assert torch.equal(kernel(p.x).to_dense(), before)


@pytest.mark.parametrize("compose", ["sum", "product", "scaled", "alone"])
def test_active_dims_of_a_fresh_kernel(compose):
    net, x = mlp(2, 3, 1).double(), torch.randn(5, 4, dtype=F64)
    kernel = dnn2gp.JacobianKernel(net, active_dims=(1, 3))
    rbf = gpytorch.kernels.RBFKernel().double()
    alone = dnn2gp.JacobianKernel(net)(x[:, [1, 3]]).to_dense()
    both, expected = {
        "sum": (kernel + rbf, alone + rbf(x).to_dense()),
        "product": (kernel * rbf, alone * rbf(x).to_dense()),
        "scaled": (scaled(kernel), 3.0 * alone),
        "alone": (kernel, alone),
    }[compose]
    assert both(x).shape == (5, 5)
    assert_close(both(x).to_dense(), expected)


@pytest.mark.parametrize("limit", [None, 2 * 8 * 200])
@pytest.mark.parametrize("diag", [False, True])
def test_gradients_in_one_argument_where_both_are_equal(diag, limit):
    kernel = dnn2gp.JacobianKernel(problem("gaussian_per_output").net)
    x = torch.randn(4, 2, dtype=F64, requires_grad=True)

    def value(a, b):
        return kernel(a, b, diag=True).sum() if diag else kernel(a, b).to_dense().square().sum()

    other = x.detach() + 1e-9  # not equal, so no one takes them for the same
    with contextlib.nullcontext() if limit is None else dnn2gp.tiling.memory_limit(limit):
        (one,) = torch.autograd.grad(value(x, x.detach()), x)
        (two,) = torch.autograd.grad(value(x.detach(), x), x)
        (both,) = torch.autograd.grad(value(x, x), x)
        (expected,) = torch.autograd.grad(value(x, other), x)
    assert_close(one, expected, rtol=1e-6, atol=1e-6)
    assert_close(two, expected, rtol=1e-6, atol=1e-6)
    assert_close(both, one + two)


# ---- work done once


@pytest.fixture
def linearized(monkeypatch):
    """Numbers of examples whose Jacobians were taken."""
    sizes = []
    jacobian = dnn2gp.Linearization.jacobian

    def counted(self, x):
        sizes.append(x.shape[:-1].numel())
        return jacobian(self, x)

    monkeypatch.setattr(dnn2gp.Linearization, "jacobian", counted)
    return sizes


def test_training_the_prior_precision_takes_each_jacobian_once(linearized):
    model, _, p = user_gp("gaussian_per_output", 9)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for _ in range(4):
        optimizer.zero_grad()
        (-mll_value(model)).backward()
        optimizer.step()
    assert linearized == [9]
    model(p.x_test)
    model(p.x_test + 1)
    model(torch.randn(4, 2, 2, dtype=F64))
    assert linearized == [9, 3, 3, 8]
    model.get_fantasy_model(p.x_test, torch.randn(3, 2, dtype=F64))
    assert linearized == [9, 3, 3, 8, 3]


def test_what_is_kept_is_found_by_value(linearized):
    p = problem("gaussian")
    kernel = dnn2gp.JacobianKernel(p.net)
    x = p.x.clone()
    kernel(x).to_dense()
    x[0] += 1.0
    changed = kernel(x).to_dense()
    assert_close(changed, dnn2gp.JacobianKernel(p.net)(x).to_dense())
    kernel.to(torch.float32).to(torch.float64)
    kernel(x).to_dense()
    assert linearized == [6, 6, 6, 6]
    assert "jacobians" not in str(list(kernel.state_dict()))
    for other in (copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
        other(x).to_dense()
    assert linearized == [6] * 6
    with dnn2gp.tiling.memory_limit(1000):  # features may be taken, but not kept
        small = dnn2gp.JacobianKernel(mlp(2, 1).double(), batch_shape=torch.Size([1]))
        small(x).to_dense(), small(x).to_dense()
    assert linearized == [6] * 8


def test_inputs_with_gradients_are_not_looked_up(linearized):
    p = problem("gaussian")
    kernel = dnn2gp.JacobianKernel(p.net)
    kernel(p.x).to_dense()
    x = p.x.clone().requires_grad_()
    (backward,) = torch.autograd.grad(kernel(x).to_dense().sum(), x)
    assert backward.abs().max() > 0
    direction = torch.randn_like(p.x)
    _, forward = torch.func.jvp(lambda x: kernel(x).to_dense().sum(), (p.x,), (direction,))
    assert_close(forward, (backward * direction).sum())
    assert linearized == [6, 6, 6]


# ---- no factorisation of size n K


@pytest.fixture
def factorised(monkeypatch):
    """Sizes of all that is factorised; conjugate gradients count with the size of their matrix."""
    sizes = []

    def counted(function, size):
        def call(*args, **kwargs):
            sizes.append(size(*args))
            return function(*args, **kwargs)

        return call

    for name in ("cholesky", "cholesky_ex", "eigh", "qr", "svd", "lu_factor", "lu_factor_ex", "inv", "solve"):
        monkeypatch.setattr(torch.linalg, name, counted(getattr(torch.linalg, name), lambda a, *_: a.shape[-1]))
    cg = counted(linear_operator.utils.linear_cg, lambda _, rhs, *__: rhs.shape[-2])
    monkeypatch.setattr(linear_operator.utils, "linear_cg", cg)
    return sizes


@pytest.mark.parametrize("wrap", ["alone", "scaled"])
@pytest.mark.parametrize("name", ["gaussian", "gaussian_per_output", "log_sigma"])
def test_with_many_examples_nothing_of_their_number_is_factorised(name, wrap, settings, factorised):
    model, gp, p = user_gp(name, 1000, wrap=scaled if wrap == "scaled" else lambda k: k)
    num_weights = gp.linearization.num_weights
    factorised.clear()
    mll_value(model).backward()
    posterior = model(p.x_test)
    assert posterior.variance.shape == posterior.mean.shape
    model.likelihood(posterior, p.x_test)
    model.get_fantasy_model(p.x_test, model.train_targets[:3])(p.x_test)
    assert num_weights in factorised
    assert max(factorised) <= num_weights


def test_with_many_weights_nothing_of_their_number_is_factorised(settings, factorised):
    model, gp, p = user_gp("gaussian_per_output", 3)
    factorised.clear()
    mll_value(model).backward()
    assert model(p.x_test).covariance_matrix.shape == (6, 6)
    assert max(factorised) == 6 < gp.linearization.num_weights


def test_the_strategy_and_the_operator_are_ours():
    for wrap in (lambda k: k, scaled):
        model, _, p = user_gp("gaussian_per_output", 25, wrap=wrap)
        model(p.x_test)
        assert isinstance(model.prediction_strategy, WeightSpaceStrategy)
        assert isinstance(model.prediction_strategy.lik_train_train_covar, NoisyFeatureGram)


AFTER_BOTORCH = """
import warnings
warnings.simplefilter("ignore")
import botorch, torch, gpytorch, linear_operator
from gpytorch_settings import SIZES, FAST, botorch_on
state = lambda: [getattr(linear_operator.settings, n)._default for n in FAST] + [s._global_value for s, _, _ in SIZES]
real = state()
with botorch_on():
    assert state() == real, (state(), real)

from botorch.fit import fit_gpytorch_mll
import test_kernels

class BotorchGP(test_kernels.UserGP, botorch.models.gpytorch.GPyTorchModel):  # fit_gpytorch_mll wants this base
    pass

test_kernels.UserGP = BotorchGP
torch.set_num_threads(1)
for name in ("gaussian", "gaussian_per_output"):
    model, gp, p = test_kernels.user_gp(name, 40)
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    net = [w.clone() for w in model.covar_module.linearization.net.parameters()]
    fit_gpytorch_mll(mll)
    assert all(torch.equal(a, b) for a, b in zip(net, model.covar_module.linearization.net.parameters()))
    gp.prior_precision, gp.noise = model.covar_module.prior_precision.detach(), model.likelihood.noise.detach()
    evidence = gp.log_evidence(kind="gp")
    grads = torch.autograd.grad(evidence, [q for q in gp.parameters() if q.requires_grad])
    assert max(g.abs().max() for g in grads) < 0.05, grads
    assert torch.allclose(model.eval()(p.x_test).covariance_matrix, gp(p.x_test).covariance_matrix)
"""


def test_fit_gpytorch_mll_finds_the_maximum_of_the_evidence():
    folder = Path(__file__).parent
    path = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(folder.parent)!r}]\n"
    run = subprocess.run([sys.executable, "-c", path + AFTER_BOTORCH], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
