"""DNN2GPModel after BoTorch's own contract for models: shapes, transforms, gradients, fantasies, state."""

import copy
import pickle

import pytest
import torch
from botorch.models import SingleTaskGP
from botorch.sampling import SobolQMCNormalSampler

from gpytorch_dnn2gp import LaplaceGP
from gpytorch_dnn2gp.bayesopt import DNN2GPModel, smooth_mlp
from gpytorch_dnn2gp.losses import Gaussian

QUICK = {"rounds": 2, "evaluations": 20, "evidence_evaluations": 5}


def data(n=8, d=2, m=1, seed=0):
    x = torch.rand(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    y = torch.stack([torch.sin((3 + k) * x[:, 0]) + (k + 1) * x[:, -1] ** 2 for k in range(m)], -1)
    return x, 5 + 3 * y


def small_net(d=2, m=1):
    return smooth_mlp(d, m, widths=(8, 6))


@pytest.fixture(scope="module", params=[1, 2])
def model(request):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        m = request.param
        return DNN2GPModel(*data(m=m), net=small_net(m=m), restarts=2, fit_options=QUICK)


def dense(posterior):
    return posterior.distribution.covariance_matrix


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("q", [1, 2])
@pytest.mark.parametrize("noise", [False, True])
def test_shapes_are_those_of_a_single_task_gp(model, batch, q, noise):
    x = torch.rand(*batch, q, 2, dtype=torch.float64)
    other = SingleTaskGP(*data(m=model.num_outputs))
    ours, theirs = (each.posterior(x, observation_noise=noise) for each in (model, other))
    assert ours.mean.shape == theirs.mean.shape == (*batch, q, model.num_outputs)
    assert ours.variance.shape == theirs.variance.shape
    assert ours.rsample(torch.Size([5])).shape == (5, *batch, q, model.num_outputs)
    assert dense(ours).shape == theirs.distribution.covariance_matrix.shape


def test_conditioning_is_a_gp_of_all_data_with_the_same_net(model):
    x, y = torch.rand(3, 2, dtype=torch.float64), torch.rand(3, model.num_outputs, dtype=torch.float64) + 5
    later = model.condition_on_observations(x, y)
    gp, transform = model.gp, model.outcome_transform
    every = LaplaceGP(
        gp.linearization,
        torch.cat([gp.train_inputs[0], x]),
        torch.cat([gp.train_targets.reshape(8, -1), transform(y)[0]]),
        Gaussian(gp.noise.detach().sqrt()),
        gp.prior_precision.detach(),
        [[name] for name in gp.linearization.param_names],
        residual_kernel=gp.residual_kernel,
    )
    z = torch.rand(5, 2, dtype=torch.float64)
    expected = transform.untransform_posterior(
        SingleTaskGP(*data(m=model.num_outputs)).posterior(z).__class__(every(z))
    )
    ours = later.posterior(z)
    torch.testing.assert_close(ours.mean, expected.mean, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(dense(ours), dense(expected), rtol=1e-7, atol=1e-7)


def test_fantasies_have_the_shapes_of_single_task_gps(model):
    x = torch.rand(5, 2, 2, dtype=torch.float64)
    other = SingleTaskGP(*data(m=model.num_outputs))
    sampler = SobolQMCNormalSampler(torch.Size([4]), seed=0)
    ours, theirs = (each.fantasize(x, sampler) for each in (model, other))
    assert ours.batch_shape == theirs.batch_shape == (4, 5)
    z = torch.rand(5, 3, 2, dtype=torch.float64)
    assert ours.posterior(z).mean.shape == theirs.posterior(z).mean.shape == (4, 5, 3, model.num_outputs)


def test_state_copies_and_pickles(model):
    z = torch.rand(4, 2, dtype=torch.float64)
    expected = model.posterior(z)
    m = model.num_outputs
    other = DNN2GPModel(*data(m=m), net=small_net(m=m), restarts=1, seed=3, fit_options=QUICK)
    assert not torch.allclose(other.posterior(z).mean, expected.mean)
    other.load_state_dict(model.state_dict())
    for same in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(same.posterior(z).mean, expected.mean)
        torch.testing.assert_close(dense(same.posterior(z)), dense(expected))
