"""GGNLikelihood: GPyTorch's contract, noise given and computed, and refusals where there is none."""

import copy
import pickle
import unittest

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.test.base_likelihood_test_case import BaseLikelihoodTestCase
from gpytorch_settings import botorch_off, botorch_on
from problems import F64, INVERTIBLE, mlp, problem, randomized
from torch.testing import assert_close

import gpytorch_dnn2gp as dnn2gp

# own_loss has no Fisher: its Lambda needs the label
COMPUTED = [name for name in INVERTIBLE if name not in ("own_loss", "gaussian_per_example")]


def covariances(n, k, dtype=F64):
    root = torch.randn(n, k, k, dtype=dtype)
    return root @ root.mT + 0.3 * torch.eye(k, dtype=dtype)


def distribution(n, k, interleaved=True):
    root = torch.randn(n * k, n * k, dtype=F64)
    covariance = root @ root.mT + torch.eye(n * k, dtype=F64)
    if k == 1:
        return MultivariateNormal(torch.randn(n, dtype=F64), covariance)
    return MultitaskMultivariateNormal(torch.randn(n, k, dtype=F64), covariance, interleaved=interleaved)


# ---- GPyTorch's contract: five examples; f of one is independent of that of others, as the suite's samples are


class _Contract:
    settings, num_outputs = staticmethod(botorch_off), 1

    def setUp(self):
        super().setUp()
        self.enterContext(self.settings())

    def _create_conditional_input(self, batch_shape=torch.Size()):
        return torch.randn(*batch_shape, 5, *([self.num_outputs] if self.num_outputs > 1 else []))

    _create_targets = _create_conditional_input

    def _create_marginal_input(self, batch_shape=torch.Size()):
        if self.num_outputs == 1:
            return super()._create_marginal_input(batch_shape)
        # the suite's samples treat outputs as independent in train mode
        variance = 0.2 * torch.rand(*batch_shape, 5 * self.num_outputs) + 0.1
        return MultitaskMultivariateNormal(self._create_targets(batch_shape), torch.diag_embed(variance))


class TestGaussianLoss(_Contract, BaseLikelihoodTestCase, unittest.TestCase):
    def create_likelihood(self):
        return dnn2gp.GGNLikelihood(dnn2gp.losses.Gaussian(0.8), num_outputs=self.num_outputs)


class TestGaussianLossAfterBotorch(TestGaussianLoss):
    settings = staticmethod(botorch_on)


class TestGaussianLossOutputs(TestGaussianLoss):
    num_outputs = 2


class TestGaussianLossOutputsAfterBotorch(TestGaussianLossOutputs):
    settings = staticmethod(botorch_on)


class TestGivenNoise(_Contract, BaseLikelihoodTestCase, unittest.TestCase):
    def create_likelihood(self):
        return dnn2gp.GGNLikelihood(noise=torch.rand(5) + 0.3)


class TestGivenNoiseOutputs(_Contract, BaseLikelihoodTestCase, unittest.TestCase):
    num_outputs = 2

    def create_likelihood(self):
        return dnn2gp.GGNLikelihood(noise=covariances(5, 2, torch.float32))


class TestGivenNoiseOutputsAfterBotorch(TestGivenNoiseOutputs):
    settings = staticmethod(botorch_on)


class TestComputedNoise(_Contract, BaseLikelihoodTestCase, unittest.TestCase):
    def create_likelihood(self):
        # the suite passes no inputs: in train mode they are the training inputs
        lin = dnn2gp.Linearization(randomized(mlp(num_outputs=self.num_outputs), 0).float())
        x = torch.randn(5, 2)
        lin(x)
        return dnn2gp.GGNLikelihood(dnn2gp.losses.Poisson(), lin, train_inputs=x)


class TestComputedNoiseOutputs(TestComputedNoise):
    num_outputs = 2


class TestComputedNoiseOutputsAfterBotorch(TestComputedNoiseOutputs):
    settings = staticmethod(botorch_on)


# ---- values


@pytest.mark.parametrize("name", COMPUTED)
def test_computed_noise_is_the_inverse_of_lambda_at_any_inputs(name):
    p = problem(name)
    likelihood = dnn2gp.GGNLikelihood(p.loss(), p.linearization(), temperature=2.0)
    for mode in (likelihood.train(), likelihood.eval()):
        for x in (p.x, p.x_test):
            f = p.outputs(x)
            expected = 2.0 * torch.linalg.inv(p.hand.lam(f, None))
            assert_close(mode.noise_covariance(x, f.shape).detach(), expected)
            batch = mode.noise_covariance(x.expand(2, *x.shape), torch.Size((2, *f.shape)))
            assert_close(batch.detach().expand(2, *expected.shape), expected.expand(2, *expected.shape))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("k", [1, 3])
def test_marginal_adds_the_blocks_where_they_belong(k, interleaved):
    f, noise = distribution(4, k, interleaved), covariances(4, k)
    likelihood = dnn2gp.GGNLikelihood(dnn2gp.losses.Gaussian(0.1)).eval()
    y = likelihood(f, noise=noise)
    added = torch.block_diag(*noise)
    if not interleaved:  # task-major
        order = torch.arange(4 * k).view(4, k).T.flatten()
        added = added[order][:, order]
    assert_close(y.mean, f.mean)
    assert_close(y.covariance_matrix, f.covariance_matrix + added)
    assert_close(likelihood(f, noise=noise[:, 0, 0]).mean if k == 1 else y.mean, f.mean)


@pytest.mark.parametrize("interleaved", [True, False])
def test_log_marginal_and_expected_log_prob_are_those_of_each_example(interleaved):
    f, noise, y = distribution(4, 2, interleaved), covariances(4, 2), torch.randn(4, 2, dtype=F64)
    likelihood = dnn2gp.GGNLikelihood(dnn2gp.losses.Gaussian(0.1)).eval()
    log_marginal = likelihood.log_marginal(y, f, noise=noise)
    expected_log_prob = likelihood.expected_log_prob(y, f, noise=noise)
    full = f.covariance_matrix
    if not interleaved:
        order = torch.arange(8).view(2, 4).T.flatten()
        full = full[order][:, order]
    for i in range(4):
        v = full[2 * i : 2 * i + 2, 2 * i : 2 * i + 2]
        normal = torch.distributions.MultivariateNormal
        assert_close(log_marginal[i], normal(f.mean[i], v + noise[i]).log_prob(y[i]))
        spread = torch.linalg.solve(noise[i], v).trace() / 2
        assert_close(expected_log_prob[i], normal(f.mean[i], noise[i]).log_prob(y[i]) - spread)


@pytest.mark.parametrize("k", [1, 2])
def test_given_f_labels_have_the_noise(k):
    noise = covariances(4, k)
    likelihood = dnn2gp.GGNLikelihood(noise=noise)
    f = torch.randn(7, 4, *([k] if k > 1 else []), dtype=F64)
    y = likelihood(f)
    assert y.batch_shape == (7, 4)
    assert_close(y.mean, f)
    variance = noise.diagonal(dim1=-2, dim2=-1).squeeze(-1)
    assert_close(y.variance, variance.expand(f.shape))


def test_how_many_outputs_samples_of_f_have():
    loss, samples = dnn2gp.losses.Gaussian(0.3), torch.randn(7, 5, 2)
    y = dnn2gp.GGNLikelihood(loss, num_outputs=2)(samples)
    assert (y.batch_shape, y.event_shape) == ((7, 5), (2,))
    assert_close(y.log_prob(samples), torch.distributions.Normal(samples, 0.3).log_prob(samples).sum(-1))
    assert dnn2gp.GGNLikelihood(loss, num_outputs=1)(samples).batch_shape == (7, 5, 2)
    lin = dnn2gp.Linearization(mlp(num_outputs=2).float())
    assert dnn2gp.GGNLikelihood(loss, lin)(samples, torch.randn(5, 2)).batch_shape == (7, 5)
    unknown = dnn2gp.GGNLikelihood(loss)
    assert unknown(samples[0, :, 0]).batch_shape == (5,)
    noise = covariances(5, 2, torch.float32)
    assert unknown(samples, noise=noise).batch_shape == (7, 5)
    with pytest.raises(ValueError, match=r"shape \(7, 5, 2\) may be .*num_outputs=K"):
        unknown(samples)
    for number in (0, 3):
        with pytest.raises(ValueError, match=f"num_outputs is {number}; net and noise have"):
            dnn2gp.GGNLikelihood(dnn2gp.losses.Gaussian([0.3, 0.8]), num_outputs=number)


# ---- whose noise


def test_given_noise_belongs_to_the_training_inputs_alone():
    p = problem("gaussian_per_output")
    lin, noise = p.linearization(), covariances(6, 2)
    f, shape = distribution(6, 2), torch.Size((6, 2))
    alone = dnn2gp.GGNLikelihood(noise=noise, train_inputs=p.x).eval()
    with_loss = dnn2gp.GGNLikelihood(p.loss(), lin, noise=noise, train_inputs=p.x).eval()
    other = p.x + 1e-9  # as many as there are training examples
    for likelihood in (alone, with_loss):
        assert_close(likelihood.noise_covariance(p.x, shape), noise)
        assert_close(likelihood.train().noise_covariance(None, shape), noise)
        likelihood.eval()
    with pytest.raises(ValueError, match="pass noise="):
        alone(f, other)
    with pytest.raises(ValueError, match="pass noise="):
        alone(f)
    computed = with_loss.noise_covariance(other, shape).detach()
    assert_close(computed, torch.diag(torch.tensor([0.09, 0.64], dtype=F64)).expand(6, 2, 2))
    # training inputs followed by new ones: each has its own
    both = with_loss.noise_covariance(torch.cat([p.x, other]), torch.Size((12, 2))).detach()
    assert_close(both, torch.cat([noise, computed]))
    with pytest.raises(ValueError, match="pass noise="):
        alone.noise_covariance(torch.cat([p.x, other]), torch.Size((12, 2)))
    assert_close(alone(f, other, noise=2 * noise).covariance_matrix, f.covariance_matrix + torch.block_diag(*2 * noise))


def test_without_train_inputs_given_noise_is_known_in_training_alone():
    likelihood = dnn2gp.GGNLikelihood(noise=covariances(6, 2))
    f, x = distribution(6, 2), torch.randn(6, 2, dtype=F64)
    assert likelihood(f).mean.shape == (6, 2)
    with pytest.raises(ValueError, match="given for 6 training examples, and whether these 5"):
        likelihood(distribution(5, 2))
    likelihood.eval()
    for args in ((), (x,)):
        with pytest.raises(ValueError, match="pass noise=.*train_inputs"):
            likelihood(f, *args)


def test_noise_by_example_of_a_gaussian_loss_is_not_that_of_new_examples():
    p = problem("gaussian_per_example")
    gp = p.gp(0.7)
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)
    gp.train()
    value = mll(gp(p.x), gp.train_targets)
    assert_close(value, gp.log_evidence(kind="gp") / 12)
    gp.eval()
    with pytest.raises(ValueError, match="pass noise="):
        gp.likelihood(gp(p.x_test.repeat(2, 1)), p.x_test.repeat(2, 1))


def test_fantasies_keep_each_noise():
    p = problem("gaussian_per_output")
    lin, noise, added = p.linearization(), covariances(6, 2), covariances(3, 2)
    likelihood = dnn2gp.GGNLikelihood(p.loss(), lin, noise=noise, train_inputs=p.x).eval()
    all_inputs, shape = torch.cat([p.x, p.x_test]), torch.Size((9, 2))
    loss_noise = likelihood.noise_covariance(p.x_test, torch.Size((3, 2))).detach()
    same = likelihood.get_fantasy_likelihood()
    assert_close(same.noise_covariance(all_inputs, shape).detach(), torch.cat([noise, loss_noise]))
    for places in ({}, {"inputs": p.x_test}):
        new = likelihood.get_fantasy_likelihood(noise=added, **places)
        assert_close(new.noise_covariance(all_inputs, shape), torch.cat([noise, added]))
    computed = dnn2gp.GGNLikelihood(p.loss(), lin).eval()
    new = computed.get_fantasy_likelihood(noise=added, inputs=p.x_test, train_inputs=p.x)
    assert_close(new.noise_covariance(all_inputs, shape), torch.cat([loss_noise[:1].expand(6, 2, 2), added]))
    assert_close(computed.noise_covariance(all_inputs, shape).detach(), loss_noise[:1].expand(9, 2, 2))


def test_given_noise_is_saved_copied_and_moved():
    p = problem("gaussian_per_output")
    likelihood = dnn2gp.GGNLikelihood(noise=covariances(6, 2), train_inputs=p.x).eval()
    other = dnn2gp.GGNLikelihood(noise=covariances(6, 2), train_inputs=p.x + 1).eval()
    other.load_state_dict(likelihood.state_dict())
    shape = torch.Size((6, 2))
    for new in (other, copy.deepcopy(likelihood), pickle.loads(pickle.dumps(likelihood))):
        assert_close(new.noise_covariance(p.x, shape), likelihood.noise_covariance(p.x, shape))
    likelihood.float()
    assert likelihood.noise_covariance(p.x.float(), shape).dtype == torch.float32
    with pytest.raises(RuntimeError, match="size mismatch"):
        dnn2gp.GGNLikelihood(noise=covariances(5, 2), train_inputs=p.x[:5]).load_state_dict(other.state_dict())


# ---- refusals


def test_infinite_noise_is_refused():
    p = problem("categorical")
    gp = p.gp()
    with pytest.raises(ValueError, match="infinite direction"):
        gp.likelihood(gp(p.x_test), p.x_test)
    p = problem("bernoulli")
    with torch.no_grad():
        p.net[2].bias.fill_(1e6)
    likelihood = dnn2gp.GGNLikelihood(p.loss(), p.linearization())
    with pytest.raises(ValueError, match="index 0 is zero to working precision"):
        likelihood(distribution(6, 1), p.x)
    p = problem("own_loss")
    likelihood = dnn2gp.GGNLikelihood(p.loss(), p.linearization())
    with pytest.raises(ValueError, match="infinite direction|depends on the labels"):
        likelihood(distribution(6, 2), p.x)
    p = problem("poisson")
    likelihood = dnn2gp.GGNLikelihood(p.loss(), p.linearization())
    with pytest.raises(ValueError, match="depends on the inputs"):
        likelihood(distribution(6, 2))


@pytest.mark.parametrize("shape", [(6, 2), (5, 2, 2), (6, 3, 3), (6,), (2, 2)])
def test_noise_of_another_shape_is_refused(shape):
    likelihood = dnn2gp.GGNLikelihood(dnn2gp.losses.Gaussian(0.3))
    with pytest.raises(ValueError, match="must be the covariances"):
        likelihood(distribution(6, 2), noise=torch.ones(shape, dtype=F64))


@pytest.mark.parametrize("k", [1, 2])
def test_bad_noise_given_to_a_call_is_refused(k):
    likelihood = dnn2gp.GGNLikelihood(dnn2gp.losses.Gaussian(0.3)).eval()
    f, noise, x = distribution(6, k), covariances(6, k), torch.randn(6, 2, dtype=F64)
    given = dnn2gp.GGNLikelihood(noise=noise, train_inputs=x)
    third = torch.tensor(3)
    for bad, message in [
        (noise.index_fill(0, third, torch.nan), "noise has .*NaN"),
        (noise.index_fill(0, third, torch.inf), "noise has .*NaN or infinite"),
        (noise.index_fill(0, third, 0.0), "noise covariance at index 3 is not"),
        (noise.index_copy(0, third, -noise[3:4]), "noise covariance at index 3 is not"),
    ]:
        with pytest.raises(ValueError, match=message):
            likelihood(f, noise=bad)
        with pytest.raises(ValueError, match=message):
            given.get_fantasy_likelihood(noise=bad, inputs=x + 1)
    if k == 1:
        with pytest.raises(ValueError, match="index 2 is not"):
            likelihood(f, noise=torch.ones(6, dtype=F64).index_fill(0, torch.tensor(2), -1.0))


def test_bad_given_noise_is_refused_at_once():
    noise = covariances(6, 2)
    x = torch.randn(6, 2, dtype=F64)
    for bad, message in [
        (noise[:, 0], r"noise has shape \(6, 2\)"),
        (noise.index_fill(0, torch.tensor(3), 0.0), "index 3 is not symmetric and positive definite"),
        (noise.index_fill(0, torch.tensor(2), torch.nan), "noise has 4 .*NaN"),
        (noise + torch.tensor([[0.0, 0.1], [0.0, 0.0]]), "index 0 is not symmetric"),
        (noise[:5], "noise is that of 5 examples, but there are 6 train_inputs"),
    ]:
        with pytest.raises(ValueError, match=message):
            dnn2gp.GGNLikelihood(noise=bad, train_inputs=x)
    with pytest.raises(ValueError, match="needs a loss, or"):
        dnn2gp.GGNLikelihood()
    with pytest.raises(ValueError, match="noise by example"):
        dnn2gp.GGNLikelihood(problem("gaussian_per_example").loss(), noise=noise)
    with pytest.raises(ValueError, match="given for 2 outputs, but f has 3"):
        dnn2gp.GGNLikelihood(noise=noise)(distribution(6, 3))


def test_noise_prior_is_gpytorchs():
    prior = gpytorch.priors.GammaPrior(2.0, 1.0)
    likelihood = dnn2gp.GGNLikelihood(dnn2gp.losses.Gaussian(0.5), noise_prior=prior)
    ((_, module, found, closure, setting),) = likelihood.named_priors()
    assert_close(found.log_prob(closure(module)), prior.log_prob(torch.tensor(0.25)))
    setting(module, torch.tensor(0.5))
    assert_close(pickle.loads(pickle.dumps(likelihood)).noise.detach(), torch.tensor(0.5))
