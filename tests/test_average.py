"""Averages of predictions are those of the mixture of their distributions."""

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, Independent

import gpytorch_dnn2gp as dnn2gp
from gpytorch_dnn2gp import losses, metrics, mixtures

LOSSES = {
    "gaussian": (losses.Gaussian(0.3), 1),
    "two outputs": (losses.Gaussian(torch.tensor([0.3, 0.5])), 2),
    "bernoulli": (losses.Bernoulli(), 1),
    "two logits": (losses.Bernoulli(), 2),
    "categorical": (losses.Categorical(), 3),
    "poisson": (losses.Poisson(), 1),
    "heteroscedastic": (losses.HeteroscedasticGaussian(), 2),
}


def members(name: str, joint: bool = False) -> tuple[list[dnn2gp.Prediction], torch.Tensor]:
    """Of two random nets, with labels at the inputs of the predictions."""
    loss, outputs = LOSSES[name]
    loss = loss.with_noise(loss.noise.double()) if loss.has_noise else loss
    generator = torch.Generator().manual_seed(0)
    x, new = (torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in (8, 5))

    def labels(n: int) -> torch.Tensor:
        if isinstance(loss, losses.Categorical):
            return torch.randint(3, (n,), generator=generator)
        if isinstance(loss, losses.Gaussian):
            return torch.randn(n, outputs, generator=generator, dtype=torch.float64)
        if isinstance(loss, losses.HeteroscedasticGaussian):
            return torch.randn(n, 1, generator=generator, dtype=torch.float64)
        return torch.randint(2, (n, outputs), generator=generator).double()

    y, new_y = labels(8), labels(5)
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, outputs)).double()
        made.append(dnn2gp.LaplaceGP(net, x, y, loss, 2.0).predict(new, joint=joint))
    return made, new_y


@pytest.mark.parametrize("name", LOSSES)
def test_average_has_the_moments_and_density_of_the_mixture(name):
    predictions, y = members(name)
    pi = torch.tensor([0.3, 0.7], dtype=torch.float64)
    found = dnn2gp.average(predictions, pi)
    density = sum(w * p.y.log_prob(y).exp() for w, p in zip(pi, predictions))
    torch.testing.assert_close(found.y.log_prob(y).exp(), density)
    mean = sum(w * p.mean for w, p in zip(pi, predictions))
    torch.testing.assert_close(found.mean, mean)
    second = sum(w * (p.variance + p.mean.square()) for w, p in zip(pi, predictions))
    torch.testing.assert_close(found.variance, second - mean.square())
    torch.testing.assert_close(found.aleatoric, sum(w * p.aleatoric for w, p in zip(pi, predictions)))
    if found.probs is not None:
        torch.testing.assert_close(found.probs, mean)
    if name in ("gaussian", "two outputs"):
        torch.testing.assert_close(found.y.mean, found.mean)
        torch.testing.assert_close(found.y.variance, found.variance)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", ["gaussian", "two outputs"])
def test_outputs_of_an_average_have_the_moments_of_the_mixture(name, joint):
    predictions, _ = members(name, joint)
    found = dnn2gp.average(predictions)
    assert type(found.f) is type(predictions[0].f)
    means = [p.f.mean.reshape(*p.f.batch_shape, -1) for p in predictions]
    mean = sum(means) / 2
    second = sum(p.f.covariance_matrix + m[..., :, None] * m[..., None, :] for p, m in zip(predictions, means)) / 2
    expected = second - mean[..., :, None] * mean[..., None, :]
    torch.testing.assert_close(found.f.covariance_matrix, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["gaussian", "two outputs", "two logits", "categorical", "poisson"])
def test_samples_of_an_average_have_its_mean(name):
    predictions, _ = members(name)
    found = dnn2gp.average(predictions, [0.2, 0.8])
    torch.manual_seed(0)
    draws = found.y.sample((20_000,))
    draws = torch.nn.functional.one_hot(draws, 3).double() if name == "categorical" else draws
    torch.testing.assert_close(draws.mean(0), found.mean, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("number", [1, 3, 11])
@pytest.mark.parametrize("name", LOSSES)
def test_average_of_equal_predictions_is_any_of_them(name, number):
    (p, _), y = members(name)
    found = dnn2gp.average([p] * number)
    for of in (lambda q: q.variance, lambda q: q.mean, lambda q: q.f.covariance_matrix):
        torch.testing.assert_close(of(found), of(p), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(found.y.log_prob(y), p.y.log_prob(y), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("number", [1, 3])
def test_labels_that_no_member_expects_keep_their_log_density(number, dtype):
    logits = torch.tensor([[-150.0, 50.0], [150.0, -50.0]], dtype=dtype)
    pi = torch.full((number,), 1 / number, dtype=dtype)
    classes = mixtures.mixture([Categorical(logits=logits)] * number, pi)
    torch.testing.assert_close(classes.log_prob(torch.tensor([0, 1])), torch.full((2,), -200.0, dtype=dtype))
    yes = mixtures.mixture([Independent(Bernoulli(logits=logits[:, :1]), 1)] * number, pi)
    expected = torch.full((2,), -150.0, dtype=dtype)
    torch.testing.assert_close(yes.log_prob(torch.tensor([[1.0], [0.0]], dtype=dtype)), expected)


@pytest.mark.parametrize("joint", [False, True])
def test_singular_covariances_average(joint):
    """A net without bias is sure of its output at zero; two equal inputs, or many, have a singular joint covariance."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 2, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
    new = torch.cat([torch.zeros(1, 2, dtype=torch.float64), x[:1], x])
    made = []
    for _ in range(3):
        net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Tanh(), nn.Linear(3, 1, bias=False)).double()
        made.append(dnn2gp.LaplaceGP(net, x, y, losses.Gaussian(0.3), 1.0).predict(new, joint=joint))
    found = dnn2gp.average(made)

    def second_moment(p):
        return p.f.covariance_matrix.diagonal(dim1=-2, dim2=-1).flatten() + p.f.mean.flatten().square()

    torch.testing.assert_close(second_moment(found), sum(second_moment(p) for p in made) / 3)
    assert found.f.rsample(torch.Size([5])).isfinite().all()
    dnn2gp.average([found, found])  # averages average


@pytest.mark.parametrize("name", ["gaussian", "two outputs", "bernoulli", "two logits", "categorical"])
def test_metrics_take_averages(name):
    predictions, y = members(name)
    found = dnn2gp.average(predictions)
    torch.testing.assert_close(metrics.negative_log_likelihood(found.y, y), -found.y.log_prob(y).mean())
    assert 0 <= metrics.coverage(found.y, y) <= 1
    if name == "gaussian":  # the distribution function is that of the mixture
        inside = sum(metrics.entries(p.y).cdf(y) for p in predictions) / 2
        torch.testing.assert_close(found.y.cdf(y), inside)


def test_average_is_differentiable_in_its_weights():
    predictions, y = members("gaussian")
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: dnn2gp.average(predictions, a.softmax(0)).y.log_prob(y), logits)


@pytest.mark.parametrize("name", ["gaussian", "bernoulli", "categorical"])
def test_the_gradient_in_a_weight_of_zero_is_that_of_the_mixture(name):
    predictions, y = members(name)
    first, second = (p.y.log_prob(y) for p in predictions)
    pi = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    log_p = mixtures.mixture([p.y for p in predictions], pi).log_prob(y).sum()
    (gradient,) = torch.autograd.grad(log_p, pi)
    if name == "gaussian":  # those of classes are normalised
        torch.testing.assert_close(gradient, torch.stack([first.exp() / first.exp(), (second - first).exp()]).sum(-1))
    assert gradient.isfinite().all()


def test_a_member_of_weight_zero_counts_for_nothing():
    predictions, y = members("gaussian")
    found = dnn2gp.average(predictions, [1.0, 0.0])
    torch.testing.assert_close(found.y.log_prob(y), predictions[0].y.log_prob(y))


def test_bad_averages_are_refused():
    (p, q), _ = members("gaussian")
    (two, _), _ = members("two outputs")
    with pytest.raises(ValueError, match="There are no predictions to average"):
        dnn2gp.average([])
    with pytest.raises(ValueError, match="Prediction 1 is of numbers"):
        dnn2gp.average([p, two])
    for weights in ([0.5], [0.5, 0.6], [1.5, -0.5], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match="weights must be 2 numbers"):
            dnn2gp.average([p, q], weights)
