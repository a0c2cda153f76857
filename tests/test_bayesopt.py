"""DNN2GPModel after BoTorch's own contract for models: shapes, transforms, gradients, fantasies, state."""

import copy
import pickle
import warnings

import pytest
import torch
from botorch.acquisition.analytic import LogExpectedImprovement
from botorch.exceptions.errors import BotorchTensorDimensionError, InputDataError, UnsupportedError
from botorch.exceptions.warnings import InputDataWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import ModelListGP, SingleTaskGP
from botorch.models.transforms import Log, Normalize
from botorch.models.transforms.input import InputPerturbation
from botorch.posteriors import GPyTorchPosterior
from botorch.sampling import SobolQMCNormalSampler
from botorch.utils.datasets import SupervisedDataset
from gpytorch.mlls import ExactMarginalLogLikelihood

from gpytorch_dnn2gp import JacobianKernel, LaplaceGP
from gpytorch_dnn2gp.bayesopt import DNN2GPModel, RefitWhen, fitting, smooth_mlp
from gpytorch_dnn2gp.bayesopt.surrogate import matern_residual
from gpytorch_dnn2gp.jacobians import NetFunction
from gpytorch_dnn2gp.losses import Bernoulli, Gaussian

QUICK = {"rounds": 2, "iterations": 10, "evidence_evaluations": 5}


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
    expected = transform.untransform_posterior(GPyTorchPosterior(every(z)))
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


def test_fantasies_of_fantasies_and_conditioned_fantasies(model):
    """Shapes as of SingleTaskGP; the same as all at once."""
    m, other = model.num_outputs, SingleTaskGP(*data(m=model.num_outputs))
    x, z = torch.rand(5, 1, 2, dtype=torch.float64), torch.rand(5, 2, 2, dtype=torch.float64)
    shapes = []
    for each in (model, other):
        first = each.fantasize(x, SobolQMCNormalSampler(torch.Size([4]), seed=0))
        second = first.fantasize(z.expand(4, -1, -1, -1), SobolQMCNormalSampler(torch.Size([3]), seed=0))
        third = first.condition_on_observations(z.expand(4, -1, -1, -1), torch.rand(4, 5, 2, m, dtype=torch.float64))
        shapes.append([(f.batch_shape, f.posterior(x).mean.shape) for f in (first, second, third)])
    assert shapes[0] == shapes[1]
    y = torch.rand(5, 3, m, dtype=torch.float64)
    once = model.condition_on_observations(torch.cat([x, z], 1), y).posterior(x)
    twice = model.condition_on_observations(x, y[:, :1]).condition_on_observations(z, y[:, 1:]).posterior(x)
    torch.testing.assert_close(once.mean, twice.mean)
    torch.testing.assert_close(dense(once), dense(twice))


def test_state_copies_and_pickles(model):
    z = torch.rand(4, 2, dtype=torch.float64)
    expected = model.posterior(z)
    m = model.num_outputs
    other = DNN2GPModel(*data(m=m), net=small_net(m=m), restarts=1, seed=3, fit_options=QUICK)
    assert not torch.allclose(other.posterior(z).mean, expected.mean)
    other.load_state_dict(model.state_dict())
    for same in (other, copy.deepcopy(other), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(same.posterior(z).mean, expected.mean)
        torch.testing.assert_close(dense(same.posterior(z)), dense(expected))


def test_a_batch_is_its_elements_alone(model):
    x = torch.rand(3, 2, 2, dtype=torch.float64)
    together = model.posterior(x)
    for i, each in enumerate(x):
        alone = model.posterior(each)
        torch.testing.assert_close(together.mean[i], alone.mean)
        torch.testing.assert_close(dense(together)[i], dense(alone))


def test_gradients_in_x_are_finite_differences(model):
    def numbers(x):
        posterior = model.posterior(x, observation_noise=True)
        return torch.cat([posterior.mean.flatten(), dense(posterior).flatten()])

    x = torch.rand(2, 2, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(numbers, x, rtol=1e-5, atol=1e-6)


def test_outcomes_are_one_joint_distribution():
    model = DNN2GPModel(*data(m=2), net=small_net(m=2), restarts=1, fit_options=QUICK)
    x = torch.rand(3, 2, dtype=torch.float64)
    every = model.posterior(x)
    assert dense(every)[0::2, 1::2].abs().max() > 0
    for i in (0, 1, -1):
        for part in (model.posterior(x, output_indices=[i]), model.subset_output([i]).posterior(x)):
            torch.testing.assert_close(part.mean[..., 0], every.mean[..., i])
            torch.testing.assert_close(dense(part), dense(every)[i % 2 :: 2, i % 2 :: 2])
    swapped = model.subset_output([1, 0])
    torch.testing.assert_close(swapped.posterior(x).mean, every.mean.flip(-1))
    torch.testing.assert_close(swapped.posterior(x, output_indices=[1]).mean, every.mean[:, :1])
    assert swapped.num_outputs == 2
    assert model.subset_output([1]).num_outputs == 1


def test_a_subset_of_outcomes_is_conditioned_on_them_alone():
    model = DNN2GPModel(*data(m=2), net=small_net(m=2), restarts=1, fit_options=QUICK)
    x, y = torch.rand(2, 2, dtype=torch.float64), torch.rand(2, 2, dtype=torch.float64) + 5
    part = model.subset_output([1]).condition_on_observations(x, y[:, 1:])
    blind = torch.full_like(y, 1e-3).index_fill(-1, torch.tensor([0]), 1e12)
    noise = model.gp.noise.detach().expand_as(y) * torch.tensor([0.0, 1.0]) + blind * torch.tensor([1.0, 0.0])
    expected = model.condition_on_observations(x, y, noise=noise).posterior(x, output_indices=[1])
    torch.testing.assert_close(part.posterior(x).mean, expected.mean, rtol=1e-4, atol=1e-4)
    sampler = SobolQMCNormalSampler(torch.Size([3]), seed=0)
    assert model.subset_output([1]).fantasize(x, sampler).posterior(x).mean.shape == (3, 2, 1)


@pytest.mark.parametrize("given", [False, True])
def test_noise_is_added_as_asked(given):
    x, y = data()
    yvar = torch.linspace(0.1, 0.5, len(y), dtype=torch.float64)[:, None] if given else None
    model = DNN2GPModel(x, y, yvar, net=small_net(), restarts=1, fit_options=QUICK)
    z = torch.rand(4, 3, 2, dtype=torch.float64)
    f, noisy = model.posterior(z), model.posterior(z, observation_noise=True)
    added = (noisy.variance - f.variance)[0, 0, 0]
    scale = model.outcome_transform.stdvs.square().squeeze()
    torch.testing.assert_close(added, yvar.mean() if given else model.gp.noise.detach()[0] * scale)
    torch.testing.assert_close(dense(noisy) - dense(f), (added * torch.eye(3).double()).expand(4, 3, 3))
    given_now = torch.rand(4, 3, 1, dtype=torch.float64)
    noisy = model.posterior(z, observation_noise=given_now)
    torch.testing.assert_close(noisy.variance - f.variance, given_now * scale)
    sampler = SobolQMCNormalSampler(torch.Size([3]), seed=0)
    assert model.fantasize(z, sampler).posterior(z).mean.shape == (3, 4, 3, 1)


def test_observed_noise_is_conditioned_on():
    x, y = data()
    yvar = torch.full_like(y, 0.2)
    model = DNN2GPModel(x[:6], y[:6], yvar[:6], net=small_net(), restarts=1, fit_options=QUICK)
    scale = model.outcome_transform.stdvs.square()
    later = model.condition_on_observations(x[6:], y[6:], noise=yvar[6:] / scale)
    every = DNN2GPModel(x, y, yvar, net=small_net(), restarts=1, fit_options=QUICK)
    state = model.state_dict()
    for name in list(state):
        if name.endswith(("_extra_state", "given_noise")):
            state[name] = every.state_dict()[name]
    every.load_state_dict(state)
    z = torch.rand(3, 2, dtype=torch.float64)
    torch.testing.assert_close(later.posterior(z).mean, every.posterior(z).mean)
    torch.testing.assert_close(later.posterior(z).variance, every.posterior(z).variance)


@pytest.mark.parametrize("given", [False, True])
def test_what_was_conditioned_on_stays_with_the_model(given):
    x, y = data(n=9)
    yvar = torch.linspace(0.1, 0.5, len(y), dtype=torch.float64)[:, None] if given else None
    part = [None if each is None else each[:6] for each in (x, y, yvar)]
    model = DNN2GPModel(*part, net=small_net(), restarts=1, fit_options=QUICK)
    scale = model.outcome_transform.stdvs.square()
    later = model.condition_on_observations(x[6:], y[6:], noise=yvar[6:] / scale if given else None)
    z = torch.rand(4, 2, dtype=torch.float64)
    expected = later.posterior(z)
    state = later.state_dict()
    again = copy.deepcopy(later)
    for name in [name for name in state if name.endswith(("_extra_state", "given_noise"))]:
        state[name] = again.state_dict()[name]
    again.load_state_dict(state)
    torch.testing.assert_close(again.posterior(z).mean, expected.mean)
    torch.testing.assert_close(copy.deepcopy(again).posterior(z).variance, expected.variance)
    later.train()
    torch.testing.assert_close(later.train_inputs[0], x)
    assert later(*later.train_inputs).mean.shape == later.train_targets.shape == (9,)
    same = later.condition_on_observations(x[:1], y[:1], noise=yvar[:1] if given else None)
    torch.testing.assert_close(same.outcome_transform.means, model.outcome_transform.means)
    more = later.refit(x[:1], y[:1], None if yvar is None else yvar[:1])
    torch.testing.assert_close(more._train_X, torch.cat([x, x[:1]]))
    torch.testing.assert_close(more.outcome_transform.means[0], torch.cat([y, y[:1]]).mean(0))
    if given:
        torch.testing.assert_close(more._train_Yvar, torch.cat([yvar, yvar[:1]]))
    fantasies = model.fantasize(z.requires_grad_(), SobolQMCNormalSampler(torch.Size([2]), seed=0))
    assert copy.deepcopy(fantasies).train().train_inputs[0].shape == (2, 10, 2)
    for refused in (lambda: fantasies.refit(x[:1], y[:1]), lambda: fantasies.load_state_dict(model.state_dict())):
        with pytest.raises((UnsupportedError, InputDataError)):
            refused()


@pytest.mark.parametrize("given", [False, True])
def test_a_list_of_models_is_conditioned_on_data(given):
    x, y = data(m=2)
    yvar = torch.full_like(y, 0.2) if given else None
    models = [make_quick(x, each, None if yvar is None else yvar[:, :1]) for each in y.split(1, 1)]
    new = [torch.rand(3, 2, dtype=torch.float64) for _ in models]
    noise = {"noise": torch.full((3, 2), 0.3, dtype=torch.float64)} if given else {}
    later = ModelListGP(*models).condition_on_observations(new, y[:3], **noise)
    z = torch.rand(4, 2, dtype=torch.float64)
    for i, (model, x_i) in enumerate(zip(models, new, strict=True)):
        own = {"noise": noise["noise"][:, [i]] / model.outcome_transform.stdvs.square()} if given else {}
        expected = model.condition_on_observations(x_i, y[:3, [i]], **own).posterior(z)
        torch.testing.assert_close(later.posterior(z).mean[..., i].squeeze(), expected.mean.squeeze())
        torch.testing.assert_close(later.posterior(z).variance[..., i].squeeze(), expected.variance.squeeze())


def test_fantasies_looked_at_without_gradients_have_them_later(model):
    x = torch.rand(2, 1, 2, dtype=torch.float64, requires_grad=True)
    z = torch.rand(3, 2, dtype=torch.float64)
    gradients = []
    for look in (False, True):
        fantasies = model.fantasize(x, SobolQMCNormalSampler(torch.Size([2]), seed=0))
        if look:
            with torch.no_grad():
                before = fantasies.posterior(z[None]).mean
        after = fantasies.posterior(z[None]).mean
        gradients += torch.autograd.grad(after.sum(), x)
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(before, after.detach())


def test_perturbed_inputs_are_perturbed_at_predictions_alone():
    x, y = data()
    shifts = 0.01 * torch.rand(3, 2, dtype=torch.float64)
    options = {"net": small_net(), "restarts": 1, "fit_options": QUICK}
    model, plain = DNN2GPModel(x, y, input_transform=InputPerturbation(shifts), **options), DNN2GPModel(x, y, **options)
    z = torch.rand(4, 2, 2, dtype=torch.float64)
    moved = (z[:, :, None] + shifts).flatten(1, 2)
    torch.testing.assert_close(model.posterior(z).mean, plain.posterior(moved).mean)
    for take in ("condition_on_observations", "refit"):
        ours, expected = (getattr(each, take)(z[0], y[:2]) for each in (model, plain))
        torch.testing.assert_close(ours.posterior(z).mean, expected.posterior(moved).mean)
    sampler = SobolQMCNormalSampler(torch.Size([2]), seed=0)
    ours, expected = (each.fantasize(z, sampler) for each in (model, plain))
    torch.testing.assert_close(ours.posterior(z).mean, expected.posterior(moved).mean)


def test_nothing_global_is_drawn_from():
    x, y = data(n=5)
    before = torch.random.get_rng_state()
    model = DNN2GPModel(x, y, restarts=2, fit_options=QUICK)
    held = DNN2GPModel(x, (y > y.mean()).double(), loss=Bernoulli(), restarts=2, fit_options={"rounds": 1})
    for each in (model, held):
        each.fantasize(x[:1], SobolQMCNormalSampler(torch.Size([2]), seed=0))
    model.refit(x[:1], y[:1])
    assert torch.equal(before, torch.random.get_rng_state())


def test_transforms_are_those_of_botorch():
    x, y = data()
    bounds = torch.tensor([[-5.0, 0.0], [10.0, 15.0]], dtype=torch.float64)
    wide = bounds[0] + x * (bounds[1] - bounds[0])
    options = {"net": small_net(), "restarts": 1, "fit_options": QUICK}
    plain = DNN2GPModel(x, (y - y.mean()) / y.std(), outcome_transform=None, **options)
    model = DNN2GPModel(wide, y, input_transform=Normalize(2, bounds=bounds), **options)
    z = torch.rand(4, 2, dtype=torch.float64)
    ours, raw = model.posterior(bounds[0] + z * (bounds[1] - bounds[0])), plain.posterior(z)
    torch.testing.assert_close(ours.mean, y.mean() + y.std() * raw.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.variance, y.var() * raw.variance, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.train_inputs[0], x)
    torch.testing.assert_close(model.train().train_inputs[0], wide)
    later = model.condition_on_observations(wide[:2], y[:2])
    torch.testing.assert_close(later.posterior(wide[:1]).mean, y[:1], rtol=0.1, atol=0.5)
    learned = DNN2GPModel(wide, y, input_transform=Normalize(2), **options)
    torch.testing.assert_close(learned.train_inputs[0].amax(0), torch.ones(2, dtype=torch.float64))
    logs = DNN2GPModel(x, ((y - y.mean()) / y.std()).exp(), outcome_transform=Log(), **options)
    assert logs.posterior(z).rsample(torch.Size([2])).min() > 0
    sampler = SobolQMCNormalSampler(torch.Size([2]), seed=0)
    assert logs.fantasize(z, sampler).posterior(z).mean.shape == (2, 4, 1)


def test_a_state_of_other_data_brings_net_hyperparameters_and_transforms():
    x, y = data(n=10)
    model = DNN2GPModel(x, y, net=small_net(), restarts=1, fit_options=QUICK)
    part = DNN2GPModel(x[:6], y[:6], net=small_net(), restarts=1, seed=2, fit_options=QUICK)
    part.load_state_dict(model.state_dict())
    z = torch.rand(4, 2, dtype=torch.float64)
    gp = LaplaceGP(
        model.gp.linearization,
        x[:6],
        model.outcome_transform(y)[0][:6],
        Gaussian(model.gp.noise.detach().sqrt()),
        model.gp.prior_precision.detach(),
        [[name] for name in model.gp.linearization.param_names],
        residual_kernel=model.gp.residual_kernel,
    )
    expected = model.outcome_transform.untransform_posterior(GPyTorchPosterior(gp(z)))
    torch.testing.assert_close(part.posterior(z).mean, expected.mean)
    torch.testing.assert_close(part.posterior(z).variance, expected.variance)
    with pytest.raises(RuntimeError, match="another model"):
        part.load_state_dict({})


def test_a_posterior_linearizes_its_points_and_no_training_point(model, monkeypatch):
    model.posterior(torch.rand(1, 2, dtype=torch.float64))
    rows = []
    original = NetFunction.jacobian_rows

    def counting(self, x, cotangents, part):
        rows.append(len(x[part]))
        return original(self, x, cotangents, part)

    monkeypatch.setattr(NetFunction, "jacobian_rows", counting)
    for batch in ((), (5,), (2, 5)):
        rows.clear()
        model.posterior(torch.rand(*batch, 3, 2, dtype=torch.float64, requires_grad=True))
        assert sum(rows) == torch.Size(batch).numel() * 3
    rows.clear()
    later = model.condition_on_observations(
        torch.rand(2, 2, dtype=torch.float64), torch.rand(2, model.num_outputs).double()
    )
    later.posterior(torch.rand(4, 2, dtype=torch.float64))
    assert sum(rows) == 2 + 4
    rows.clear()
    if model.num_outputs == 1:  # it moves the model to the device of X each time
        LogExpectedImprovement(model, best_f=7.0)(torch.rand(3, 1, 2, dtype=torch.float64))
        assert sum(rows) == 3


def test_a_jacobian_kernel_in_a_single_task_gp_keeps_its_training_rows(monkeypatch):
    x, y = data()
    model = SingleTaskGP(x, y, covar_module=JacobianKernel(small_net().double()))
    acquisition = LogExpectedImprovement(model, best_f=7.0)
    acquisition(torch.rand(3, 1, 2, dtype=torch.float64))
    rows = []
    original = NetFunction.jacobian_rows
    monkeypatch.setattr(
        NetFunction, "jacobian_rows", lambda self, x, c, part: rows.append(len(x[part])) or original(self, x, c, part)
    )
    acquisition(torch.rand(3, 1, 2, dtype=torch.float64))
    assert sum(rows) == 3


# ---- what a SingleTaskGP refuses or warns of


def kinds_of(make, x, y, yvar=None):
    """Type of the error, if any, and of the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            make(x, y, yvar)
        except Exception as error:
            return type(error), set()
    return None, {each.category for each in caught}


def make_quick(x, y, yvar):
    return DNN2GPModel(x, y, yvar, net=small_net(x.shape[-1], y.shape[-1]), restarts=1, fit_options=QUICK)


@pytest.mark.parametrize(
    "case",
    ["right", "single precision", "unscaled", "no outcome dimension", "nan x", "nan y", "yvar shape", "negative yvar"],
)
def test_bad_input_is_treated_as_by_a_single_task_gp(case):
    x, y = data()
    yvar = None
    if case == "single precision":
        x, y = x.float(), y.float()
    elif case == "unscaled":
        x = 10 * x
    elif case == "no outcome dimension":
        y = y[:, 0]
    elif case == "nan x":
        x[1, 0] = torch.nan
    elif case == "nan y":
        y[1] = torch.nan
    elif case == "yvar shape":
        yvar = torch.ones(3, 1, dtype=torch.float64)
    elif case == "negative yvar":
        yvar = torch.full_like(y, -1.0)
    ours, theirs = kinds_of(make_quick, x, y, yvar), kinds_of(SingleTaskGP, x, y, yvar)
    assert ours == theirs
    assert (theirs == (None, set())) == (case == "right")


@pytest.mark.parametrize("case", ["one point", "duplicates", "constant", "two outcomes of one point"])
def test_little_data(case):
    x, y = data(m=2 if "two" in case else 1)
    if "one" in case:
        x, y = x[:1], y[:1]
    elif case == "duplicates":
        x, y = x[[0, 0, 0, 1]], y[[0, 0, 0, 1]]
    else:
        y = torch.full_like(y, 3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=InputDataWarning)  # that one point cannot be standardised
        model = make_quick(x, y, None)
    z = torch.rand(2, 20, 2, dtype=torch.float64)
    posterior = model.posterior(z)
    assert posterior.mean.isfinite().all()
    assert (posterior.variance > 0).all()
    assert posterior.rsample(torch.Size([3])).isfinite().all()
    assert model.condition_on_observations(x, y).posterior(x).mean.isfinite().all()


def test_one_data_set_at_a_time():
    x, y = data()
    with pytest.raises(UnsupportedError, match="one data set"):
        DNN2GPModel(x.expand(2, -1, -1), y.expand(2, -1, -1))
    with pytest.raises(InputDataError, match="no training point"):
        DNN2GPModel(x[:0], y[:0])
    model = make_quick(x, y, None)
    with pytest.raises(BotorchTensorDimensionError, match="must end in"):
        model.condition_on_observations(x[:2], torch.rand(3, 1, dtype=torch.float64))


# ---- training


@pytest.mark.parametrize("m", [1, 2])
def test_the_evidence_is_that_of_the_gp_less_what_the_next_step_gains(m):
    """log N(y; f - J w, C + k) = Laplace evidence + g^T H^-1 g / 2, at any weights; g = 0 where they are stationary."""
    x, y = data(m=m)
    y = (y - y.mean(0)) / y.std(0)
    net = small_net(m=m).double()
    names = [name for name, _ in net.named_parameters()]
    start = fitting.Hyperparameters(
        fitting.initial_precision(net, names), y.new_tensor([0.05]), matern_residual(2).double()
    )
    problem = fitting._Nets([net], x, y, None, None, start, None)
    theta = problem.theta(start)
    problem.train(theta, 5, 0.0)
    problem._linearize()
    evidence = problem._log_evidence(theta)[0][0]
    found = problem.hyperparameters(theta, 0)
    problem.write_back()
    gp = LaplaceGP(
        net,
        x,
        y,
        Gaussian(found.noise.sqrt()),
        found.prior_precision,
        [[name] for name in names],
        residual_kernel=found.residual_kernel,
    )
    C = problem._own_covariance(theta)[0][0]
    J, w = gp.linearization.jacobian(x).flatten(0, 1), gp.linearization.weights
    delta = 1 / gp.covar_module.prior_variance.detach()
    r = (y - gp.linearization(x)).flatten()
    g = delta * w - J.T @ torch.linalg.solve(C, r)
    H = torch.diag(delta) + J.T @ torch.linalg.solve(C, J)
    gain = 0.5 * g @ torch.linalg.solve(H, g)
    torch.testing.assert_close(evidence + gain, gp.log_evidence("gp").detach())
    torch.testing.assert_close(found.noise, start.noise.expand(m))
    torch.testing.assert_close(found.residual_kernel.outputscale, start.residual_kernel.outputscale)


def test_the_band_widens_far_from_the_data():
    x, y = data(n=10)
    model = DNN2GPModel(x, y, net=small_net(), restarts=2)
    near, far = model.posterior(x).variance.mean(), model.posterior(x + 30).variance.mean()
    assert far > 0.2 * y.var() > near


def test_refit_trains_by_its_policy(monkeypatch):
    x, y = data(n=8)
    fits = []
    original = DNN2GPModel._fit
    monkeypatch.setattr(DNN2GPModel, "_fit", lambda self, warm: fits.append(warm) or original(self, warm))
    options = {"net": small_net(), "restarts": 2, "fit_options": QUICK}
    model = DNN2GPModel(x[:5], y[:5], **options)
    later = model.refit(x[5:6], y[5:6])
    assert fits == [False, True]
    assert later.train_targets.shape == (6,)
    assert model.train_targets.shape == (5,)
    model = DNN2GPModel(x[:5], y[:5], refit_when=RefitWhen(every=2), **options)
    model = model.refit(x[5:6], y[5:6])
    assert len(fits) == 3
    assert len(model.refit(x[6:7], y[6:7]).train_targets) == 7
    assert fits[3:] == [True]
    model = DNN2GPModel(x[:5], y[:5], refit_when=RefitWhen(evidence_falls_by=2.0), **options)
    assert len(model.refit(x[5:6], model.posterior(x[5:6]).mean.detach()).train_targets) == 6
    assert len(fits) == 5
    model.refit(x[5:6], y[5:6] + 50)
    assert fits[5:] == [True]


def test_botorch_fits_it_by_leaving_it_as_it_is():
    x, y = data()
    inputs = DNN2GPModel.construct_inputs(SupervisedDataset(x, y, feature_names=["a", "b"], outcome_names=["c"]))
    model = DNN2GPModel(**inputs, net=small_net(), restarts=1, fit_options=QUICK)
    before = copy.deepcopy(model.state_dict())
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_is_found_when_asked_for():
    import gpytorch_dnn2gp

    assert gpytorch_dnn2gp.bayesopt.DNN2GPModel is DNN2GPModel
    assert "bayesopt" in dir(gpytorch_dnn2gp)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gpytorch_dnn2gp.nothing  # noqa: B018
