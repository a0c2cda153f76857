"""Labels at new inputs: every moment against an integral or a large sample, every split against the total variance."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import quad
from scipy.special import expit
from torch.testing import assert_close

from gpytorch_dnn2gp import losses
from gpytorch_dnn2gp import predictive as module
from gpytorch_dnn2gp.numerics import NumericalWarning
from gpytorch_dnn2gp.predictive import approximations, predictive

N, K = 3, 4
float64 = torch.float64

NATURAL = losses.HeteroscedasticGaussian("natural", link="exp")
LOSSES = {
    "Gaussian": losses.Gaussian(0.5),
    "Bernoulli": losses.Bernoulli(),
    "Categorical": losses.Categorical(),
    "Poisson": losses.Poisson(),
    "HeteroscedasticGaussian": losses.HeteroscedasticGaussian(),
    "natural parameters": NATURAL,
}
# Every loss with every approximation that it has.
ALL = [pytest.param(loss, a, id=f"{name} {a}") for name, loss in LOSSES.items() for a in approximations(loss)]
# Approximations that are averages over f, in whose two variances a label's total variance splits.
AVERAGES = ("exact", "bridge", "quadrature", "mc")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape):
    return torch.randn(*shape, dtype=float64)


def gaussian(*batch, k=K, scale=0.4):
    """Mean and covariance of outputs."""
    A = scale * randn(*batch, k, k)
    return randn(*batch, k), A @ A.mT


def scalar(m, v):
    """Mean and covariance of one output of one example."""
    return torch.tensor([[m]], dtype=float64), torch.tensor([[[v]]], dtype=float64)


def expectation(g, m, v):
    """``E[g(f)]`` for ``f ~ N(m, v)`` by adaptive quadrature, split where sigmoids bend."""
    s = math.sqrt(v)
    ends = sorted(
        {m - 10 * s, m - 3 * s, m, m + 3 * s, m + 10 * s, *(x for x in range(-40, 41, 5) if abs(x - m) < 10 * s)}
    )
    pdf = stats.norm(m, s).pdf
    return sum(quad(lambda f: g(f) * pdf(f), a, b, epsabs=1e-13)[0] for a, b in zip(ends, ends[1:]))


# What every approximation has in common


@pytest.mark.parametrize("loss, approximation", ALL)
def test_shapes_types_and_batches(loss, approximation):
    mean, covariance = gaussian(2, N)
    p = predictive(loss, mean, covariance, approximation, num_samples=50, generator=generator())
    D = loss.conditional_mean(mean).shape[-1]
    assert p.mean.shape == p.aleatoric.shape == p.epistemic.shape == p.variance.shape == (2, N, D)
    assert p.y.batch_shape == (2, N)
    assert p.y.event_shape == (() if isinstance(loss, losses.Categorical) else (D,))
    assert (p.probs is not None) == isinstance(loss, losses.Bernoulli | losses.Categorical)
    assert (p.aleatoric > 0).all() and (p.epistemic > 0).all()
    label = p.y.sample()
    assert torch.isfinite(p.y.log_prob(label)).all()
    if approximation != "mc":
        one = predictive(loss, mean[1], covariance[1], approximation)
        assert_close(p.variance[1], one.variance, rtol=1e-9, atol=1e-12)
        # mixtures take as many nodes as the widest of a batch needs: the same density to the quadrature's accuracy
        assert_close(p.y.log_prob(label)[1], one.y.log_prob(label[1]), rtol=1e-5, atol=1e-9)
    single = predictive(loss, mean.float(), covariance.float(), approximation, num_samples=50)
    assert single.mean.dtype == single.epistemic.dtype == single.y.log_prob(label.float()).dtype == torch.float32
    if approximation != "mc":
        assert_close(single.variance.double(), p.variance, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss, approximation", ALL)
def test_the_mean_is_that_of_the_labels_distribution(loss, approximation):
    mean, covariance = gaussian(N)
    p = predictive(loss, mean, covariance, approximation, num_samples=50)
    if isinstance(loss, losses.Categorical):
        assert_close(p.y.probs, p.mean)
        return
    assert_close(p.y.mean, p.mean)
    first_order = approximation in ("linear", "probit") and isinstance(loss, losses.Bernoulli | losses.Poisson)
    if not first_order:
        assert_close(p.y.variance, p.variance, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss, approximation", [c for c in ALL if c.values[1] in AVERAGES])
def test_total_variance_of_probabilities_splits(loss, approximation):
    p = predictive(loss, *gaussian(N, scale=1.0), approximation, num_samples=50)
    if p.probs is not None:
        assert_close(p.variance, p.probs * (1 - p.probs), rtol=1e-9, atol=1e-12)
    if isinstance(loss, losses.Poisson):
        assert_close(p.aleatoric, p.mean)


@pytest.mark.parametrize("loss, approximation", [c for c in ALL if c.values[1] != "bridge"])
def test_known_outputs_leave_the_conditional(loss, approximation):
    mean, zero = randn(N, K), torch.zeros(N, K, K, dtype=float64)
    p = predictive(loss, mean, zero, approximation, num_samples=7)
    assert_close(p.mean, loss.conditional_mean(mean))
    assert_close(p.aleatoric, loss.conditional_variance(mean))
    assert_close(p.epistemic, torch.zeros_like(p.mean))
    y = loss.conditional(mean).sample()
    assert_close(p.y.log_prob(y), loss.conditional(mean).log_prob(y))


@pytest.mark.parametrize("loss, approximation", ALL)
def test_differentiable_in_mean_and_covariance(loss, approximation):
    mean, _ = gaussian(2)
    A = (0.4 * randn(2, K, K)).requires_grad_()
    mean.requires_grad_()
    y = (
        torch.ones(2, dtype=torch.long)
        if isinstance(loss, losses.Categorical)
        else loss.conditional_mean(mean).detach().clone()
    )
    y = y.round() if isinstance(loss, losses.Bernoulli | losses.Poisson) else y

    def outputs(mean, A):
        p = predictive(loss, mean, A @ A.mT, approximation, num_samples=20, generator=generator())
        return 1 * p.mean, p.aleatoric + 0 * p.mean, p.epistemic, p.y.log_prob(y)

    assert torch.autograd.gradcheck(outputs, (mean, A), fast_mode=True, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("loss, approximation", [c for c in ALL if c.values[1] != "bridge"])
def test_gradients_stay_finite_where_nothing_is_uncertain(loss, approximation):
    mean = randn(N, K).requires_grad_()
    covariance = torch.zeros(N, K, K, dtype=float64, requires_grad=True)
    p = predictive(loss, mean, covariance, approximation, num_samples=20)
    for gradient in torch.autograd.grad((p.mean + p.variance).sum(), (mean, covariance)):
        assert torch.isfinite(gradient).all()


def test_the_docstrings_table_is_true():
    table = re.findall(r"^    ( {2})?([\w ]+?) {2,}(\w+(?:, \w+)*)$", module.__doc__, flags=re.MULTILINE)
    listed = {name: names.split(", ") for _, name, names in table}
    own = losses.from_callable(lambda f, y: f.sum())
    assert {name: list(approximations(loss)) for name, loss in (LOSSES | {"from_callable": own}).items()} == listed


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_the_first_approximation_is_the_default(loss):
    mean, covariance = gaussian(N)
    first = next(iter(approximations(loss)))
    a = predictive(loss, mean, covariance, generator=generator())
    b = predictive(loss, mean, covariance, first, generator=generator())
    assert_close(a.variance, b.variance, rtol=0, atol=0)


# Gaussian


@pytest.mark.parametrize(
    "sigma", [0.3, torch.tensor([0.1, 0.2, 0.3, 0.4]), 0.1 + torch.rand(N, 1), 0.1 + torch.rand(N, K)]
)
def test_gaussian_labels_have_the_outputs_covariance_plus_noise(sigma):
    loss = losses.Gaussian(sigma)
    mean, covariance = gaussian(N)
    p = predictive(loss, mean, covariance)
    noise = loss.conditional_variance(mean)
    assert_close(p.y.covariance_matrix, covariance + torch.diag_embed(noise))
    assert_close(p.aleatoric, noise)
    assert_close(p.epistemic, covariance.diagonal(dim1=-2, dim2=-1))
    assert_close(p.y.mean, mean)


def test_gaussian_noise_per_example_is_not_known_for_others():
    with pytest.raises(ValueError, match="given per example, for 7 examples, and there are 3"):
        predictive(losses.Gaussian(torch.ones(7, 1)), *gaussian(N))


# Bernoulli


@pytest.mark.parametrize("v", [1e-4, 0.1, 0.99, 1.01, 4.0, 30.0, 1e3, 1e5])
@pytest.mark.parametrize("m", [-6.0, 0.0, 0.7, 25.0])
def test_quadrature_of_a_logit(m, v):
    p = predictive(losses.Bernoulli(), *scalar(m, v), "quadrature")
    mean = expectation(expit, m, v)
    assert p.mean.item() == pytest.approx(mean, abs=1e-9)
    assert p.aleatoric.item() == pytest.approx(expectation(lambda f: expit(f) * expit(-f), m, v), abs=1e-9)
    assert p.epistemic.item() == pytest.approx(expectation(lambda f: (expit(f) - mean) ** 2, m, v), abs=1e-9)


@settings(max_examples=30)
@given(m=st.floats(-300, 300), v=st.floats(0, 1e4))
def test_quadrature_laws(m, v):
    p, q = (predictive(losses.Bernoulli(), *scalar(sign * m, v), "quadrature") for sign in (1, -1))
    logit = p.y.base_dist.logits.item()
    assert q.y.base_dist.logits.item() == pytest.approx(-logit, rel=1e-9, abs=1e-9)
    assert p.epistemic.item() == pytest.approx(q.epistemic.item(), rel=1e-9, abs=1e-12)
    assert abs(logit) <= abs(m) + 1e-9 and logit * m >= -1e-9  # averaging moves towards one half
    assert p.variance.item() == pytest.approx(p.mean.item() * (1 - p.mean.item()), abs=1e-9)


def test_quadrature_keeps_the_digits_of_tails():
    # E[s(f)] = e^(m + v/2) up to e^(2m + 2v)
    for m, v in ((-100.0, 0.5), (-100.0, 25.0), (-400.0, 9.0)):
        for sign in (1, -1):
            p = predictive(losses.Bernoulli(), *scalar(sign * m, v), "quadrature")
            assert sign * p.y.base_dist.logits.item() == pytest.approx(m + v / 2, rel=1e-12)
            assert p.aleatoric.item() == pytest.approx(math.exp(m + v / 2), rel=1e-9)


def test_bernoulli_probit_is_close_and_shrinks_the_logit():
    for m, v in ((0.5, 0.3), (-2.0, 2.0), (1.0, 8.0)):
        probit = predictive(losses.Bernoulli(), *scalar(m, v), "probit")
        assert_close(probit.mean.item(), expit(m / math.sqrt(1 + math.pi * v / 8)))
        exact = predictive(losses.Bernoulli(), *scalar(m, v), "quadrature")
        assert probit.mean.item() == pytest.approx(exact.mean.item(), abs=0.02)


def test_bernoulli_to_first_order():
    mean, covariance = gaussian(N)
    p = predictive(losses.Bernoulli(), mean, covariance, "linear")
    lam = losses.Bernoulli().noise_precision(mean)
    assert_close(p.aleatoric, lam.diagonal(dim1=-2, dim2=-1))
    assert_close(p.epistemic, (lam @ covariance @ lam).diagonal(dim1=-2, dim2=-1))


def test_beta_bridge_is_the_dirichlet_bridge_of_two_classes():
    mean, covariance = gaussian(N, k=2)
    two = predictive(losses.Categorical(), mean, covariance, "bridge")
    d = torch.tensor([[1.0], [-1.0]], dtype=float64)
    one = predictive(losses.Bernoulli(), mean @ d, d.mT @ covariance @ d, "bridge")
    for a, b in ((two.mean, one.mean), (two.aleatoric, one.aleatoric), (two.epistemic, one.epistemic)):
        assert_close(a[:, :1], b)


# Categorical


def test_categorical_to_first_order_is_equation_48():
    mean, covariance = gaussian(N)
    p = predictive(losses.Categorical(), mean, covariance, "linear")
    lam = losses.Categorical().noise_precision(mean)
    assert_close(p.probs, mean.softmax(-1))
    assert_close(p.aleatoric, lam.diagonal(dim1=-2, dim2=-1))
    assert_close(p.epistemic, (lam @ covariance @ lam).diagonal(dim1=-2, dim2=-1))


def test_categorical_probit():
    mean, covariance = gaussian(N)
    p = predictive(losses.Categorical(), mean, covariance, "probit")
    shrunk = mean / torch.sqrt(1 + math.pi / 8 * covariance.diagonal(dim1=-2, dim2=-1))
    assert_close(p.probs, shrunk.softmax(-1))
    assert_close(p.epistemic, predictive(losses.Categorical(), mean, covariance, "linear").epistemic)


@pytest.mark.parametrize("k", [2, 3, 10])
def test_bridge_returns_the_dirichlet_whose_laplace_approximation_it_is_given(k):
    alpha = 0.5 + 5 * torch.rand(N, k, dtype=float64)
    # Hobbhahn et al. 2022: the Laplace approximation of a Dirichlet in the basis of logits that sum to zero
    mean = alpha.log() - alpha.log().mean(-1, keepdim=True)
    inverse = 1 / alpha
    covariance = torch.diag_embed(inverse) - (inverse[:, :, None] + inverse[:, None, :]) / k
    covariance = covariance + inverse.sum(-1)[:, None, None] / k**2
    p = predictive(losses.Categorical(), mean, covariance, "bridge")
    dirichlet = torch.distributions.Dirichlet(alpha)
    assert_close(p.probs, dirichlet.mean)
    assert_close(p.epistemic, dirichlet.variance)


def test_bridge_does_not_see_what_all_logits_share():
    mean, covariance = gaussian(N)
    p = predictive(losses.Categorical(), mean, covariance, "bridge")
    shift = randn(N, K, 1)
    moved = covariance + shift + shift.mT + 7.0
    q = predictive(losses.Categorical(), mean + 3.0, moved, "bridge")
    assert_close(p.probs, q.probs)
    assert_close(p.epistemic, q.epistemic)


@pytest.mark.parametrize("loss", [losses.Bernoulli(), losses.Categorical()])
def test_bridge_says_where_a_variance_is_zero(loss):
    mean, covariance = gaussian(N)
    covariance[1] = 0
    with pytest.raises(ValueError, match=r"Laplace bridge divides.* index \(1, 0\)"):
        predictive(loss, mean, covariance, "bridge")


@pytest.mark.parametrize("approximation", ["linear", "probit", "bridge", "mc"])
def test_saturated_classes_keep_their_log_probabilities(approximation):
    mean = torch.tensor([[0.0, 900.0, 30.0]], dtype=float64)
    covariance = torch.eye(3, dtype=float64)[None]
    p = predictive(losses.Categorical(), mean, covariance, approximation)
    log_probs = p.y.log_prob(torch.arange(3))
    assert torch.isfinite(log_probs).all() and log_probs[0] < -300
    assert torch.isfinite(p.variance).all() and (p.variance >= 0).all()


# Monte Carlo


@pytest.mark.parametrize(
    "loss, reference",
    [
        (losses.Bernoulli(), "quadrature"),
        (losses.Poisson(), "exact"),
        (losses.HeteroscedasticGaussian(), "exact"),
    ],
)
def test_monte_carlo_agrees_with_the_exact_moments(loss, reference):
    mean, covariance = gaussian(N, scale=0.25)
    exact = predictive(loss, mean, covariance, reference)
    mc = predictive(loss, mean, covariance, "mc", num_samples=100_000, generator=generator())
    assert_close(mc.mean, exact.mean, rtol=0.02, atol=0.01)
    assert_close(mc.aleatoric, exact.aleatoric, rtol=0.02, atol=0.01)
    assert_close(mc.epistemic, exact.epistemic, rtol=0.03, atol=0.01)
    label = exact.y.sample()
    assert_close(mc.y.log_prob(label), exact.y.log_prob(label), rtol=0.05, atol=0.05)


def test_monte_carlo_of_classes_against_two_logits():
    # softmax of two logits is the sigmoid of their difference, which quadrature knows
    mean, covariance = gaussian(N, k=2, scale=1.0)
    d = torch.tensor([[-1.0], [1.0]], dtype=float64)
    exact = predictive(losses.Bernoulli(), mean @ d, d.mT @ covariance @ d, "quadrature")
    mc = predictive(losses.Categorical(), mean, covariance, "mc", num_samples=100_000, generator=generator())
    assert_close(mc.probs[:, 1:], exact.probs, rtol=0, atol=0.01)
    assert_close(mc.epistemic[:, 1:], exact.epistemic, rtol=0, atol=0.01)
    assert_close(mc.aleatoric[:, :1], exact.aleatoric, rtol=0, atol=0.01)


def test_monte_carlo_draws_from_its_generator_alone():
    mean, covariance = gaussian(N)
    before = torch.get_rng_state()
    a, b, c = (
        predictive(losses.Categorical(), mean, covariance, "mc", generator=generator(seed)).probs for seed in (1, 1, 2)
    )
    assert_close(torch.get_rng_state(), before)
    assert_close(a, b, rtol=0, atol=0)
    assert (a != c).all()


def test_monte_carlo_in_chunks(monkeypatch):
    mean, covariance = gaussian(2, 5)
    whole = predictive(losses.Categorical(), mean, covariance, "mc", num_samples=16, generator=generator())
    monkeypatch.setattr(module, "CHUNK", 2 * 16 * K)  # two rows; 16 samples fill whole blocks of the generator
    parts = predictive(losses.Categorical(), mean, covariance, "mc", num_samples=16, generator=generator())
    assert_close(parts.probs, whole.probs)
    assert_close(parts.epistemic, whole.epistemic)


def test_monte_carlo_of_a_singular_covariance():
    a = randn(N, K, 1)
    p = predictive(losses.Bernoulli(), randn(N, K), a @ a.mT, "mc", num_samples=100)
    assert torch.isfinite(p.variance).all()
    mean = randn(N, K)
    exact = predictive(losses.Bernoulli(), mean, a @ a.mT, "quadrature")
    mc = predictive(losses.Bernoulli(), mean, a @ a.mT, "mc", num_samples=100_000, generator=generator())
    assert_close(mc.probs, exact.probs, rtol=0, atol=0.01)


def test_monte_carlo_mixtures_keep_the_dependence_between_labels():
    v = torch.tensor([[[1.0, 1.0], [1.0, 1.0]]], dtype=float64)
    mean = torch.tensor([[2.0, 2.0]], dtype=float64)
    p = predictive(losses.Poisson(), mean, v, "mc", generator=generator())
    counts = p.y.sample((4000,))[:, 0]
    assert torch.corrcoef(counts.T)[0, 1] > 0.8


# Poisson


@pytest.mark.parametrize("m, v", [(0.3, 0.2), (-2.0, 3.0), (4.0, 0.01), (3.0, 1.0)])
def test_poisson_moments_and_probabilities(m, v):
    p = predictive(losses.Poisson(), *scalar(m, v))
    rate = expectation(math.exp, m, v)
    assert p.mean.item() == pytest.approx(rate, rel=1e-6)
    assert p.epistemic.item() == pytest.approx(expectation(lambda f: math.exp(2 * f), m, v) - rate**2, rel=1e-4)
    assert p.aleatoric.item() == p.mean.item()
    for count in (0, 1, 7, 30):
        exact = expectation(lambda f, count=count: stats.poisson.pmf(count, math.exp(f)), m, v)
        assert p.y.log_prob(torch.tensor([[count]], dtype=float64)).exp().item() == pytest.approx(
            exact, rel=1e-6, abs=1e-12
        )


def test_poisson_probabilities_of_large_counts_are_smooth():
    # The rate is far less certain than its counts are noisy: coarse nodes would leave gaps between them.
    p = predictive(losses.Poisson(), *scalar(6.0, 0.5))
    for count in (150.0, 403.0, 801.0):
        exact = expectation(lambda f, count=count: stats.poisson.pmf(count, math.exp(f)), 6.0, 0.5)
        assert p.y.log_prob(torch.tensor([[count]], dtype=float64)).exp().item() == pytest.approx(exact, rel=1e-4)
    with pytest.warns(NumericalWarning, match="log probabilities of y are rough"):
        predictive(losses.Poisson(), *scalar(16.0, 1.0))


def test_poisson_to_first_order():
    mean, covariance = gaussian(N)
    p = predictive(losses.Poisson(), mean, covariance, "linear")
    rate = mean.exp()
    assert_close(p.epistemic, rate**2 * covariance.diagonal(dim1=-2, dim2=-1))
    assert_close(p.mean, rate)


def test_a_rate_without_a_finite_variance_is_refused():
    with pytest.raises(ValueError, match=r"variance of the Poisson rate exp\(f\).*index \(0, 0\)"):
        predictive(losses.Poisson(), *scalar(0.0, 1000.0))


# Heteroscedastic Gaussian


def test_log_sigma_moments_and_density():
    m, s = 0.4, -0.6
    mean = torch.tensor([[m, s]], dtype=float64)
    covariance = torch.tensor([[[0.5, 0.25], [0.25, 0.3]]], dtype=float64)
    p = predictive(losses.HeteroscedasticGaussian(), mean, covariance)
    assert p.mean.item() == m and p.epistemic.item() == 0.5
    assert p.aleatoric.item() == pytest.approx(expectation(lambda s: math.exp(2 * s), s, 0.3), rel=1e-8)
    # y | s ~ N(m + c/v (s - E s), v_m - c^2/v + e^2s)
    for y in (-2.0, 0.4, 1.5):
        exact = expectation(
            lambda t, y=y: stats.norm.pdf(
                y, m + 0.25 / 0.3 * (t - s), math.sqrt(0.5 - 0.25**2 / 0.3 + math.exp(2 * t))
            ),
            s,
            0.3,
        )
        assert p.y.log_prob(torch.tensor([[y]], dtype=float64)).exp().item() == pytest.approx(exact, rel=1e-6)


def test_log_sigma_density_is_smooth_where_mean_and_noise_go_together():
    mean = torch.tensor([[0.0, -4.0]], dtype=float64)
    covariance = torch.tensor([[[1.0, 0.499], [0.499, 0.25]]], dtype=float64)
    p = predictive(losses.HeteroscedasticGaussian(), mean, covariance)
    grid = torch.linspace(-6, 6, 4001, dtype=float64)
    density = p.y.log_prob(grid[:, None, None]).exp()[:, 0]
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-6)
    turns = (density.diff().sign().diff() != 0).sum().item()
    assert turns == 1  # one maximum


def test_natural_to_first_order_is_the_slope_of_the_mean():
    for link in (None, "exp", "softplus"):
        loss = losses.HeteroscedasticGaussian("natural", link=link)
        mean, covariance = gaussian(N)
        mean[:, K // 2 :] = -mean[:, K // 2 :].abs() - 0.2
        p = predictive(loss, mean, covariance, "linear")
        slope = torch.stack([torch.autograd.functional.jacobian(loss.conditional_mean, m[None])[0, :, 0] for m in mean])
        assert_close(p.epistemic, (slope @ covariance @ slope.mT).diagonal(dim1=-2, dim2=-1))
        assert_close(p.mean, loss.conditional_mean(mean))


def test_natural_with_exp_link_against_its_log_normal_moments():
    mean, covariance = gaussian(N, k=2, scale=0.3)
    p = predictive(NATURAL, mean, covariance, "mc", num_samples=200_000, generator=generator())
    (m, t), (v_m, v_t), c = mean.mT, covariance.diagonal(dim1=-2, dim2=-1).mT, covariance[:, 0, 1]
    # sigma^2 = e^-t, m = f_1 e^-t
    noise = torch.exp(-t + v_t / 2)
    label = noise * (m - c)
    second = torch.exp(-2 * t + 2 * v_t) * ((m - 2 * c).square() + v_m)
    assert_close(p.aleatoric[:, 0], noise, rtol=0.01, atol=0)
    assert_close(p.mean[:, 0], label, rtol=0.02, atol=0.01)
    assert_close(p.epistemic[:, 0], second - label**2, rtol=0.03, atol=0.01)


def test_natural_without_a_link_must_stay_negative():
    loss = losses.HeteroscedasticGaussian("natural")
    mean = torch.tensor([[0.3, -3.0]], dtype=float64)
    narrow, wide = (v * torch.eye(2, dtype=float64)[None] for v in (0.01, 9.0))
    assert predictive(loss, mean, narrow).mean.item() == pytest.approx(0.05, abs=0.01)
    with pytest.raises(ValueError, match=r"samples of the second natural parameter.*link=.*linear"):
        predictive(loss, mean, wide)
    assert predictive(loss, mean, wide, "linear").epistemic.item() > 0


# The user's own loss


def test_own_loss_is_averaged_by_monte_carlo():
    own = losses.from_callable(lambda f, y: f.sum(), conditional=losses.Poisson().conditional)
    mean, covariance = gaussian(N)
    a = predictive(own, mean, covariance, generator=generator())
    b = predictive(losses.Poisson(), mean, covariance, "mc", generator=generator())
    assert_close(a.variance, b.variance)
    assert_close(a.y.mean, b.y.mean)
    classes = losses.from_callable(lambda f, y: f.sum(), conditional=losses.Categorical().conditional)
    a = predictive(classes, mean, covariance, generator=generator())
    b = predictive(losses.Categorical(), mean, covariance, "mc", generator=generator())
    assert_close(a.probs, b.probs)
    assert_close(a.y.log_prob(torch.tensor(1)), b.y.log_prob(torch.tensor(1)))


def test_own_loss_without_a_conditional_says_what_still_works():
    own = losses.from_callable(lambda f, y: f.sum())
    with pytest.raises(ValueError, match="`conditional=`. The posterior of the outputs, and the evidence, need none"):
        predictive(own, *gaussian(N))


# Sizes, mistakes


@pytest.mark.parametrize("approximation", ["probit", "linear", "bridge", "mc"])
def test_a_thousand_classes(approximation):
    A = 0.1 * randn(2, 1000, 50)
    covariance = A @ A.mT + 0.1 * torch.eye(1000, dtype=float64)
    p = predictive(losses.Categorical(), randn(2, 1000), covariance, approximation, num_samples=100)
    assert_close(p.probs.sum(-1), torch.ones(2, dtype=float64))
    assert torch.isfinite(p.variance).all()


@pytest.mark.parametrize(
    "loss, names",
    [
        (losses.Gaussian(), "'exact', 'linear'"),
        (losses.Categorical(), "'probit', 'linear', 'bridge', 'mc'"),
        (losses.HeteroscedasticGaussian("natural"), "'mc', 'linear'"),
    ],
)
def test_unknown_approximations_list_the_known(loss, names):
    with pytest.raises(ValueError, match=f"unknown approximation 'quadrature'.* has {names}"):
        predictive(loss, *gaussian(N), "quadrature")


def test_mistakes_are_named():
    mean, covariance = gaussian(N)
    with pytest.raises(ValueError, match=r"has shape \(3, 4, 4\), got \(4, 4\)"):
        predictive(losses.Categorical(), mean, covariance[0])
    with pytest.raises(ValueError, match="covariance is torch.float32 but mean is torch.float64"):
        predictive(losses.Categorical(), mean, covariance.float())
    with pytest.raises(ValueError, match=r"mean of f .* index \(1, 2\)"):
        bad = mean.clone()
        bad[1, 2] = math.nan
        predictive(losses.Categorical(), bad, covariance)
    with pytest.raises(ValueError, match=r"negative variances, first -1 at index \(2, 0\)"):
        bad = covariance.clone()
        bad[2, 0, 0] = -1
        predictive(losses.Categorical(), mean, bad)
    with pytest.raises(ValueError, match="covariance of f is not positive semidefinite .* first for example 1"):
        bad = covariance.clone()
        bad[1, 0, 1] = bad[1, 1, 0] = 50
        predictive(losses.Categorical(), mean, bad, "mc")
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        predictive(losses.Categorical(), mean, covariance, "mc", num_samples=0)


def test_variances_negative_by_rounding_count_as_zero():
    mean = randn(N, K)
    covariance = -1e-12 * torch.eye(K, dtype=float64).expand(N, K, K)
    for loss in (losses.Bernoulli(), losses.Categorical(), losses.Poisson(), losses.HeteroscedasticGaussian()):
        for approximation in set(approximations(loss)) - {"bridge"}:
            p = predictive(loss, mean, covariance, approximation, num_samples=5)
            assert torch.isfinite(p.variance).all() and (p.epistemic >= 0).all()
