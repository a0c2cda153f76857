"""BoTorch's acquisition functions on DNN2GPModel: they run, and what they propose is better than what was known."""

import pytest
import torch
from botorch.acquisition import qKnowledgeGradient, qMaxValueEntropy
from botorch.acquisition.analytic import LogConstrainedExpectedImprovement, LogExpectedImprovement
from botorch.acquisition.joint_entropy_search import qJointEntropySearch
from botorch.acquisition.logei import (
    qLogExpectedImprovement,
    qLogNoisyExpectedImprovement,
)
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.acquisition.objective import GenericMCObjective, ScalarizedPosteriorTransform
from botorch.generation.sampling import MaxPosteriorSampling
from botorch.models import ModelListGP, SingleTaskGP
from botorch.models.transforms import Normalize
from botorch.optim import optimize_acqf
from botorch.sampling import SobolQMCNormalSampler
from botorch.test_functions import BraninCurrin
from botorch.utils.multi_objective.box_decompositions.dominated import DominatedPartitioning

from gpytorch_dnn2gp import JacobianKernel
from gpytorch_dnn2gp.bayesopt import DNN2GPModel, smooth_mlp
from gpytorch_dnn2gp.losses import Bernoulli

# Points of a batch that come close have a covariance that is singular in double precision; SingleTaskGP's too.
# There a step of the optimiser may fail, and BoTorch tries again.
pytestmark = [
    pytest.mark.filterwarnings("ignore:A not p.d., added jitter"),
    pytest.mark.filterwarnings("ignore:Optimization failed in `gen_candidates_scipy`"),
]

UNIT = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
CENTER = torch.tensor([0.3, 0.6], dtype=torch.float64)
OPTIONS = {"restarts": 2, "fit_options": {"rounds": 3, "iterations": 10, "evidence_evaluations": 10}}
SEARCH = {"bounds": UNIT, "num_restarts": 4, "raw_samples": 64, "options": {"maxiter": 30}}


def objective(x):
    """A hill of height 1 at CENTER."""
    return torch.exp(-4 * (x - CENTER).square().sum(-1, keepdim=True))


def start(n=12):
    x = torch.rand(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x[(x - CENTER).norm(dim=-1) > 0.15]  # the hill's top is not among them
    return x, objective(x)


def surrogate(x, y, **options):
    return DNN2GPModel(x, y, net=smooth_mlp(2, y.shape[-1], widths=(16, 16)), **(OPTIONS | options))


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return surrogate(*start())


def joint_entropy_search(model, x, y):
    grid = torch.rand(64, 2, dtype=torch.float64)
    inputs = MaxPosteriorSampling(model, replacement=False)(grid, num_samples=4)
    return qJointEntropySearch(model, inputs, model.posterior(inputs).mean.detach())


ACQUISITIONS = {
    "LogEI": (1, lambda model, x, y: LogExpectedImprovement(model, y.max())),
    "qLogEI": (2, lambda model, x, y: qLogExpectedImprovement(model, y.max(), SobolQMCNormalSampler(torch.Size([32])))),
    "qLogNEI": (2, lambda model, x, y: qLogNoisyExpectedImprovement(model, x, prune_baseline=True)),
    "qKG": (1, lambda model, x, y: qKnowledgeGradient(model, num_fantasies=4)),
    "qMES": (1, lambda model, x, y: qMaxValueEntropy(model, torch.rand(50, 2, dtype=torch.float64))),
    "JES": (1, joint_entropy_search),
}


@pytest.mark.parametrize("name", ACQUISITIONS)
def test_an_acquisition_is_optimised_and_finds_better_points(model, name):
    """A value above random points', and after three steps better points: seen, or where the model expects the best."""
    x, y = start()
    q, make = ACQUISITIONS[name]
    best = y.max()
    for step in range(3):
        acquisition = make(model, x, y)
        candidates, value = optimize_acqf(acquisition, q=q, **SEARCH)
        assert candidates.shape == (q, 2)
        if step == 0:
            points = q if name != "qKG" else 5  # its fantasies' optima are optimised too
            assert value > acquisition(torch.rand(16, points, 2, dtype=torch.float64)).max()
        x, y = torch.cat([x, candidates]), torch.cat([y, objective(candidates)])
        model = model.condition_on_observations(candidates, objective(candidates))
    if "EI" in name:
        assert y.max() > best
    else:  # these ask for what tells most
        grid = torch.rand(500, 2, dtype=torch.float64)
        assert objective(grid[model.posterior(grid).mean.argmax()]) > best


def test_thompson_sampling_by_joint_draws(model):
    x, y = start()
    grid = torch.rand(200, 2, dtype=torch.float64)
    chosen = MaxPosteriorSampling(model, replacement=False)(grid, num_samples=5)
    assert chosen.shape == (5, 2)
    assert objective(chosen).max() > y.max()


def test_a_loop_finds_the_hill():
    x, y = start(8)
    assert y.max() < 0.95
    model = surrogate(x, y, input_transform=Normalize(2, bounds=UNIT))
    for _ in range(5):
        candidate, _ = optimize_acqf(LogExpectedImprovement(model, y.max()), q=1, **SEARCH)
        model = model.refit(candidate, objective(candidate))
        x, y = torch.cat([x, candidate]), torch.cat([y, objective(candidate)])
    assert y.max() > 0.98


def test_two_objectives_correlated_or_not():
    problem = BraninCurrin(negate=True).to(torch.float64)
    x = torch.rand(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = problem(x)
    reference = y.amin(0)
    both = surrogate(x, y)
    single = ModelListGP(surrogate(x, y[:, :1]), SingleTaskGP(x, y[:, 1:]))
    for each in (both, single):
        acquisition = qLogNoisyExpectedHypervolumeImprovement(
            each, ref_point=reference.tolist(), X_baseline=x, sampler=SobolQMCNormalSampler(torch.Size([16]))
        )
        candidates, value = optimize_acqf(acquisition, q=2, **SEARCH)
        assert candidates.shape == (2, 2)
        assert value > acquisition(torch.rand(16, 2, 2, dtype=torch.float64)).max()
        before, after = (
            DominatedPartitioning(reference, outcomes).compute_hypervolume()
            for outcomes in (y, torch.cat([y, problem(candidates)]))
        )
        assert after > before


def test_constraints_by_a_second_outcome_and_by_labels():
    x, y = start()
    limit = x[:, :1] - 0.5  # feasible where x_0 <= 0.5
    both = ModelListGP(surrogate(x, y), surrogate(x, limit))
    acquisition = LogConstrainedExpectedImprovement(both, y.max(), objective_index=0, constraints={1: (None, 0.0)})
    candidates, _ = optimize_acqf(acquisition, q=1, **SEARCH)
    assert candidates[0, 0] < 0.55

    held = surrogate(x, (limit <= 0).to(x), loss=Bernoulli(), fit_options={})
    assert ((held.posterior(x).mean > 0) == (limit <= 0)).double().mean() > 0.8
    acquisition = qLogExpectedImprovement(
        ModelListGP(surrogate(x, y), held),
        y[limit <= 0].max(),
        SobolQMCNormalSampler(torch.Size([32])),
        objective=GenericMCObjective(lambda samples, X=None: samples[..., 0]),
        constraints=[lambda samples: -samples[..., 1]],
    )
    candidates, value = optimize_acqf(acquisition, q=1, **SEARCH)
    assert candidates[0, 0] < 0.6
    fantasies = held.fantasize(candidates, SobolQMCNormalSampler(torch.Size([3]), seed=0))
    assert fantasies.posterior(x).mean.shape == (3, len(x), 1)
    assert ((fantasies.gp.train_labels == 0) | (fantasies.gp.train_labels == 1)).all()


def test_a_list_of_models_takes_fantasies_and_scalarizations():
    x, y = start()
    both = ModelListGP(surrogate(x, y), SingleTaskGP(x, -y))
    acquisition = qKnowledgeGradient(
        both,
        num_fantasies=3,
        posterior_transform=ScalarizedPosteriorTransform(torch.tensor([1.0, -1.0], dtype=torch.float64)),
    )
    assert acquisition(torch.rand(2, 4, 2, dtype=torch.float64)).isfinite().all()


def test_gradients_go_through_fantasies(model):
    acquisition = qKnowledgeGradient(model, num_fantasies=3)
    x = torch.rand(1, 4, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(acquisition, x, rtol=1e-4, atol=1e-6)


def test_a_pretrained_net_is_a_kernel_for_a_single_task_gp():
    x, y = start()
    net = smooth_mlp(2, 1, widths=(16, 16)).double()
    model = SingleTaskGP(x, y, covar_module=JacobianKernel(net))
    for acquisition in (LogExpectedImprovement(model, y.max()), qLogNoisyExpectedImprovement(model, x)):
        candidates, value = optimize_acqf(acquisition, q=1, **SEARCH)
        assert value.isfinite()
    fantasies = model.fantasize(torch.rand(4, 1, 2, dtype=torch.float64), SobolQMCNormalSampler(torch.Size([3])))
    assert fantasies.posterior(x).mean.shape == (3, 4, len(x), 1)
