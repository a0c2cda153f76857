"""A state_dict loaded into another GP: the same predictions, or an error; never something else in silence."""

import copy

import gpytorch
import pytest
import torch
from problems import CASES, F64, mlp, problem, randomized
from test_serialization import again, same_bits, what_it_says
from torch import nn

import gpytorch_dnn2gp as dnn2gp

OPTIONS = [{"solver": "weight_space"}, {"solver": "function_space"}, {"structure": "diagonal"}]


def use(gp, p) -> None:
    """Fill every cache."""
    what_it_says(gp, p)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: next(iter(o.values())))
def test_same_data_another_net_other_hyperparameters(case, options, tmp_path):
    p = problem(case)
    gp = p.gp(0.7, **options)
    said = what_it_says(gp, p)
    q = copy.copy(p)
    q.net = randomized(copy.deepcopy(p.net), 9)
    other = q.gp(3.0, **options)
    if gp.noise is not None:
        other.noise = 2.0
    use(other, p)
    torch.save(gp.state_dict(), tmp_path / "state")
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    same_bits(said, what_it_says(other, p))


def test_the_same_state_keeps_what_was_computed():
    """As when a fit is rolled back: nothing of the data is computed again."""
    p = problem("gaussian")
    gp = p.gp(0.7)
    gp.posterior()
    solver = gp._solver
    state = copy.deepcopy(gp.state_dict())
    gp.prior_precision = 3.0
    gp.load_state_dict(state)
    assert gp._solver is solver
    same_bits(what_it_says(gp, p), what_it_says(p.gp(0.7), p))


@pytest.mark.parametrize(
    "change",
    [
        lambda p: setattr(p, "x", p.x + 0.1),
        lambda p: setattr(p, "y", p.y + 0.1),
        lambda p: (setattr(p, "x", p.x[:-1]), setattr(p, "y", p.y[:-1])),
        lambda p: setattr(p, "loss_name", "HeteroscedasticGaussian") or setattr(p, "loss_kwargs", {}),
    ],
    ids=["inputs", "labels", "fewer", "loss"],
)
def test_other_data_raises_and_changes_nothing(change):
    p, q = problem("gaussian_per_output"), problem("gaussian_per_output", seed=0)
    q.net = randomized(mlp(num_outputs=2), 5)
    change(q)
    if q.loss_name != "Gaussian":
        q.y = q.y[:, :1]
    gp = q.gp(2.0)
    said = what_it_says(gp, q)
    with pytest.raises((ValueError, RuntimeError), match="other training data, another loss|size mismatch"):
        gp.load_state_dict(p.gp(0.7).state_dict())
    same_bits(said, what_it_says(gp, q))


@pytest.mark.parametrize(
    "net",
    [lambda: mlp(width=5), lambda: nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)), lambda: nn.Linear(2, 1)],
)
def test_another_kind_of_net_raises(net):
    p = problem("gaussian")
    other = dnn2gp.LaplaceGP(randomized(net(), 1), p.x, p.y, p.loss(), 1.0)
    with pytest.raises((ValueError, RuntimeError), match="structure|computes something else"):
        other.load_state_dict(p.gp(0.7).state_dict())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"features": "gradient"}, "another structure"),
        ({"params": "last_layer"}, "another structure"),
        ({"structure": "diagonal"}, "another structure"),
        ({"groups": ["0", "2"]}, "another structure"),
    ],
)
def test_another_structure_raises(options, message):
    p = problem("gaussian")
    with pytest.raises((ValueError, RuntimeError), match=message):
        p.gp(0.7, **options).load_state_dict(p.gp(0.7).state_dict())


def test_a_residual_kernel():
    p, matern = problem("gaussian"), gpytorch.kernels.MaternKernel
    gp = p.gp(0.7, residual_kernel=matern(nu=2.5))
    said = gp(p.x_test).covariance_matrix
    other = p.gp(0.7, residual_kernel=matern(nu=2.5, lengthscale_constraint=gpytorch.constraints.Positive()))
    other.residual_kernel.lengthscale = 3.0
    other.load_state_dict(gp.state_dict())
    assert torch.equal(other(p.x_test).covariance_matrix, said)
    for kernel in (matern(nu=0.5), gpytorch.kernels.RBFKernel(), None):
        with pytest.raises((ValueError, RuntimeError), match="structure|keys"):
            p.gp(0.7, residual_kernel=kernel).load_state_dict(gp.state_dict())


def test_a_conditioned_gp_is_another_gp():
    p = problem("gaussian")
    gp = p.gp(0.7)
    more, other = gp.condition_on(p.x_test, p.y[:3]), gp.condition_on(p.x_test, p.y[3:])
    for a, b in ((more, gp), (gp, more), (more, other)):
        with pytest.raises(ValueError, match="other training data"):
            a.load_state_dict(b.state_dict())
    more_again = p.gp(2.0).condition_on(p.x_test, p.y[:3])
    use(more_again, p)
    more_again.load_state_dict(more.state_dict())
    same_bits(what_it_says(more, p), what_it_says(more_again, p))


def test_through_an_mll_and_back_as_botorch_does():
    """botorch.fit takes every entry of mll.state_dict() for a tensor, writes into them and loads them."""
    p = problem("gaussian")
    gp = p.gp(0.7)
    mll = dnn2gp.mlls.LaplaceMarginalLogLikelihood(gp.likelihood, gp)
    said = what_it_says(gp, p)
    checkpoint = {name: value.detach().clone() for name, value in mll.state_dict().items()}
    gp.prior_precision, gp.noise = 5.0, 5.0
    use(gp, p)
    state = mll.state_dict()
    for name, value in checkpoint.items():
        state[name][...] = value
    mll.load_state_dict(state)
    same_bits(said, what_it_says(gp, p))


def test_a_loaded_file_takes_a_state_dict(tmp_path):
    p = problem("gaussian")
    gp = p.gp(0.7)
    dnn2gp.save(gp, tmp_path / "gp")
    loaded = again(p, tmp_path / "gp")
    gp.prior_precision = torch.tensor(2.0, dtype=F64)
    loaded.load_state_dict(gp.state_dict())
    same_bits(what_it_says(gp, p), what_it_says(loaded, p))
