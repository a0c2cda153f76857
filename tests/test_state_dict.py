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


@pytest.mark.parametrize("name", ["prior_precision", "noise"])
@pytest.mark.parametrize("transform", ["softplus", "square"])
def test_another_transform_of_a_hyperparameter_raises(name, transform):
    """The raw value would mean another one."""
    p = problem("gaussian")
    other, constraint = p.gp(0.7), gpytorch.constraints.Positive()
    if transform == "square":
        constraint = gpytorch.constraints.Positive(transform=torch.square, inv_transform=torch.sqrt)
    module = other.likelihood if name == "noise" else other.covar_module
    module.register_constraint(f"raw_{name}", constraint)
    other.prior_precision, other.noise = 2.0, 2.0
    for a, b in ((other, p.gp(0.7)), (p.gp(0.7), other)):
        said = what_it_says(a, p)
        with pytest.raises(ValueError, match="another structure"):
            a.load_state_dict(b.state_dict())
        same_bits(said, what_it_says(a, p))


def test_another_transform_in_a_residual_kernel_raises():
    p, kernel = problem("gaussian"), gpytorch.kernels.RBFKernel
    exp = gpytorch.constraints.Positive(transform=torch.exp, inv_transform=torch.log)
    with pytest.raises(ValueError, match="another structure"):
        p.gp(0.7, residual_kernel=kernel()).load_state_dict(
            p.gp(0.7, residual_kernel=kernel(lengthscale_constraint=exp)).state_dict()
        )


def test_bounds_come_along():
    p = problem("gaussian")
    gp, other = p.gp(0.7), p.gp(3.0)
    for model, bounds in ((gp, (0.01, 7.0)), (other, (0.1, 50.0))):
        model.covar_module.register_constraint("raw_prior_precision", gpytorch.constraints.Interval(*bounds))
    gp.prior_precision, other.prior_precision = 0.7, 3.0
    other.load_state_dict(gp.state_dict())
    same_bits(what_it_says(gp, p), what_it_says(other, p))


def loss_of_ones_own(scale: float) -> dnn2gp.losses.Loss:
    return dnn2gp.losses.from_callable(lambda f, y: scale * torch.cosh(f - y).log().sum())


def link_of_ones_own(scale: float) -> dnn2gp.losses.Loss:
    return dnn2gp.losses.HeteroscedasticGaussian("natural", link=lambda f: scale * f.exp())


@pytest.mark.parametrize("loss", [loss_of_ones_own, link_of_ones_own])
def test_functions_of_ones_own_are_compared_by_value(loss):
    """Their names are the same, as here of all lambdas."""
    p = problem("gaussian")

    def gp(scale: float, seed: int) -> dnn2gp.LaplaceGP:
        return dnn2gp.LaplaceGP(randomized(mlp(num_outputs=2), seed), p.x, y, loss(scale), 0.7)

    y = p.y if loss is link_of_ones_own else torch.cat([p.y, -p.y], 1)
    state = gp(1.0, 1).state_dict()
    with pytest.raises(ValueError, match="another loss"):
        gp(2.0, 1).load_state_dict(state)
    other = gp(1.0, 2)
    other.load_state_dict(state)
    assert torch.equal(other(p.x_test).covariance_matrix, gp(1.0, 1)(p.x_test).covariance_matrix)


@pytest.mark.parametrize("through_mll", [False, True])
def test_others_that_share_the_net_stay_as_they_are(through_mll):
    p = problem("gaussian")
    lin = dnn2gp.Linearization(p.net)
    one, two = (dnn2gp.LaplaceGP(lin, p.x, p.y, p.loss(), 0.7) for _ in range(2))
    sources = [p.gp(2.0), p.gp(2.0)]
    q = copy.copy(p)
    q.net = randomized(copy.deepcopy(p.net), 9)
    sources = [q.gp(2.0), p.gp(2.0)]
    more = one.condition_on(p.x_test, p.y[:3])
    for source in sources:
        said, said_more, weights = what_it_says(two, p), what_it_says(more, p), lin.weights.clone()
        if through_mll:
            mll = dnn2gp.mlls.LaplaceMarginalLogLikelihood
            mll(one.likelihood, one).load_state_dict(mll(source.likelihood, source).state_dict())
        else:
            one.load_state_dict(source.state_dict())
        same_bits(what_it_says(source, p), what_it_says(one, p))
        same_bits(said, what_it_says(two, p))
        two._clear_solver(), more._clear_solver()
        same_bits(said, what_it_says(two, p))
        same_bits(said_more, what_it_says(more, p))
        assert torch.equal(lin.weights, weights)
        assert one.mean_module.linearization is one.likelihood.linearization is one.linearization


@pytest.mark.parametrize("through_mll", [False, True])
@pytest.mark.parametrize("same_weights", [False, True])
@pytest.mark.parametrize("why", ["computes something else", "other training data"])
def test_a_refused_state_changes_nothing(why, same_weights, through_mll):
    p = problem("gaussian")
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).double() if "computes" in why else mlp()
    net = randomized(net, 9)
    if same_weights:
        net.load_state_dict(p.net.state_dict())
    y = p.y if "computes" in why else p.y + 1
    gp, source = p.gp(0.7), dnn2gp.LaplaceGP(net, p.x, y, p.loss(), 3.0)
    source.noise = 4.0
    said, lin, state = what_it_says(gp, p), gp.linearization, copy.deepcopy(gp.state_dict())
    mll = dnn2gp.mlls.LaplaceMarginalLogLikelihood
    a, b = (mll(gp.likelihood, gp), mll(source.likelihood, source)) if through_mll else (gp, source)
    with pytest.raises(ValueError, match=why):
        a.load_state_dict(b.state_dict())
    same_bits(said, what_it_says(gp, p))
    same_bits(state, gp.state_dict())
    assert gp.linearization is gp.likelihood.linearization is gp.mean_module.linearization is lin
    gp._clear_solver()
    same_bits(said, what_it_says(gp, p))
