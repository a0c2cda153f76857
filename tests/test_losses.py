"""Losses: every derivative against autodiff, every density against its integral, every root against its matrix."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial.hermite_e import hermegauss
from scipy.integrate import quad
from torch.func import hessian, vmap
from torch.nn.functional import cross_entropy, one_hot
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from gpytorch_dnn2gp import losses
from gpytorch_dnn2gp.numerics import positive_root

N, K = 5, 4
float64 = torch.float64


def randn(*shape):
    return torch.randn(*shape, dtype=float64)


def own_softmax(f, y):
    return torch.logsumexp(f, -1) - f.gather(0, y[None])[0]


def own_link(f):
    return f.square() + 0.1


# name: (loss, labels). Each test that takes `case` runs on all of them.
CASES = {
    "gaussian": lambda: (losses.Gaussian(0.3), randn(N, K)),
    "gaussian per output": lambda: (losses.Gaussian(torch.rand(K, dtype=float64) + 0.2), randn(N, K)),
    "gaussian per example": lambda: (losses.Gaussian(torch.rand(N, 1, dtype=float64) + 0.2), randn(N, K)),
    "gaussian each": lambda: (losses.Gaussian(torch.rand(N, K, dtype=float64) + 0.2), randn(N, K)),
    "bernoulli": lambda: (losses.Bernoulli(), torch.randint(2, (N, K)).double()),
    "bernoulli soft": lambda: (losses.Bernoulli(), torch.rand(N, K, dtype=float64)),
    "categorical": lambda: (losses.Categorical(), torch.randint(K, (N,))),
    "categorical soft": lambda: (losses.Categorical(), randn(N, K).softmax(-1)),
    "poisson": lambda: (losses.Poisson(), torch.randint(6, (N, K)).double()),
    "log sigma": lambda: (losses.HeteroscedasticGaussian(), randn(N, K // 2)),
    "natural": lambda: (losses.HeteroscedasticGaussian("natural"), randn(N, K // 2)),
    "natural exp": lambda: (losses.HeteroscedasticGaussian("natural", link="exp"), randn(N, K // 2)),
    "natural softplus": lambda: (losses.HeteroscedasticGaussian("natural", link="softplus"), randn(N, K // 2)),
    "natural own link": lambda: (losses.HeteroscedasticGaussian("natural", link=own_link), randn(N, K // 2)),
    "own": lambda: (losses.from_callable(own_softmax), torch.randint(K, (N,))),
    "own fisher": lambda: (
        losses.from_callable(own_softmax, fisher=losses.Categorical().noise_precision),
        torch.randint(K, (N,)),
    ),
}
HETEROSCEDASTIC = ["log sigma", "natural", "natural exp", "natural softplus", "natural own link"]
CANONICAL = [name for name in CASES if name not in HETEROSCEDASTIC]


def make(name, f=None):
    loss, y = CASES[name]()
    f = randn(N, K) if f is None else f
    if name == "natural":
        f[..., K // 2 :] = -0.1 - f[..., K // 2 :].abs()
    return loss, f, y


@pytest.fixture(params=CASES)
def case(request):
    return make(request.param)


def dense_root(apply, f, y):
    """The matrix of an `apply_root`, column by column, ``(n, K, K)``."""
    columns = torch.eye(f.shape[-1], dtype=f.dtype)[:, None, :].expand(-1, *f.shape)
    return apply(f, columns, y).movedim(0, -1)


# Derivatives


def test_residual_is_the_gradient(case):
    loss, f, y = case
    f.requires_grad_()
    (gradient,) = torch.autograd.grad(loss.negative_log_likelihood(f, y).sum(), f)
    assert_close(loss.residual(f, y), gradient)


def autodiff_hessian(loss, f, y):
    """Of each example's loss, ``(n, K, K)``; per-example noise comes along by `subset`."""
    return torch.stack(
        [
            hessian(lambda g, i=i: loss.subset(slice(i, i + 1)).negative_log_likelihood(g[None], y[i : i + 1])[0])(f[i])
            for i in range(len(f))
        ]
    )


@pytest.mark.parametrize("name", CANONICAL)
def test_noise_precision_is_the_hessian(name):
    loss, f, y = make(name)
    assert_close(loss.noise_precision(f, y), autodiff_hessian(loss, f, y))


@pytest.mark.parametrize("name", HETEROSCEDASTIC)
def test_noise_precision_is_the_fisher_where_the_hessian_is_indefinite(name):
    loss, f, _ = make(name)
    # E[r r^T] over y ~ N(m, sigma^2), one label at a time: polynomials, for which Gauss-Hermite is exact
    z, w = (torch.from_numpy(a) for a in hermegauss(8))
    m, sigma = loss.conditional_mean(f), loss.conditional_variance(f).sqrt()
    y = m + sigma * z[:, None, None]
    r = loss.residual(f.expand(8, N, K), y)
    r = r.unflatten(-1, (2, K // 2))
    fisher = torch.einsum("s,snad,snbd->nabd", w / w.sum(), r, r)
    expected = torch.einsum("nabd,de->nadbe", fisher, torch.eye(K // 2, dtype=float64)).reshape(N, K, K)
    assert_close(loss.noise_precision(f), expected)


def test_log_sigma_hessian_is_indefinite_wherever_the_label_is_off():
    loss, f, _ = make("log sigma")
    y = f[:, : K // 2] + 0.1
    assert (torch.linalg.eigvalsh(autodiff_hessian(loss, f, y))[:, 0] < 0).all()


def test_natural_fisher_as_in_the_table():
    m, s2 = torch.tensor([[0.7]], dtype=float64), torch.tensor([[0.3]], dtype=float64)
    f = torch.cat([m / s2, -1 / (2 * s2)], -1)
    m, s2 = m.item(), s2.item()
    expected = [[s2, 2 * m * s2], [2 * m * s2, 4 * m**2 * s2 + 2 * s2**2]]
    assert_close(losses.HeteroscedasticGaussian("natural").noise_precision(f), torch.tensor([expected], dtype=float64))


def test_callable_link_gives_what_the_named_one_gives():
    f, y, v = randn(N, K), randn(N, K // 2), randn(N, K)
    named = losses.HeteroscedasticGaussian("natural", link="exp")
    own = losses.HeteroscedasticGaussian("natural", link=torch.exp)
    assert_close(own.residual(f, y), named.residual(f, y))
    assert_close(own.apply_root(f, v), named.apply_root(f, v))


# Roots


def test_root_squares_to_the_noise_precision(case):
    loss, f, y = case
    root = dense_root(loss.apply_root, f, y)
    assert_close(root @ root.mT, loss.noise_precision(f, y), rtol=1e-12, atol=1e-14)


def test_the_two_products_are_with_one_root(case):
    loss, f, y = case
    assert_close(dense_root(loss.apply_root, f, y).mT, dense_root(loss.apply_root_t, f, y))
    assert_close(dense_root(loss.apply_precision, f, y), loss.noise_precision(f, y))
    u, v = randn(N, K), randn(N, K)
    assert_close((loss.apply_root(f, v, y) * u).sum(), (loss.apply_root_t(f, u, y) * v).sum())


def test_the_callable_softmax_has_a_root_though_it_is_singular():
    own, f, y = make("own")
    root = dense_root(own.apply_root, f, y)
    assert_close(root @ root.mT, losses.Categorical().noise_precision(f))


def test_leading_dimensions_of_v_and_of_f_broadcast(case):
    loss, f, y = case
    v = randn(2, 3, N, K)
    for apply in (loss.apply_root, loss.apply_root_t):
        assert_close(apply(f, v, y)[1, 2], apply(f, v[1, 2], y))
    many = f * torch.linspace(0.5, 1.5, 6, dtype=float64).reshape(2, 3, 1, 1)
    one = many[1, 2]
    assert_close(loss.residual(many, y)[1, 2], loss.residual(one, y))
    assert_close(loss.negative_log_likelihood(many, y)[1, 2], loss.negative_log_likelihood(one, y))
    assert_close(loss.noise_precision(many, y)[1, 2], loss.noise_precision(one, y))
    assert_close(loss.apply_root(many, v, y)[1, 2], loss.apply_root(one, v[1, 2], y))
    if not repr(loss).startswith("from_callable"):
        assert_close(loss.conditional_covariance(many)[1, 2], loss.conditional_covariance(one))
        assert loss.conditional(many).batch_shape == (2, 3, N)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for a in out if isinstance(out, tuple | list) else [out]:
            if isinstance(a, torch.Tensor):
                self.numel = max(self.numel, a.numel())
        return out


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("own")])
def test_products_with_the_root_form_no_matrix(name):
    loss, f, _ = make(name)
    v = randn(N, K)
    with LargestTensor() as largest:
        loss.apply_root(f, v)
        loss.apply_root_t(f, v)
    assert largest.numel <= N * K


# Densities


@pytest.mark.parametrize("name", ["gaussian", "log sigma", "natural", "natural exp", "natural softplus"])
def test_densities_integrate_to_one(name):
    loss, y = CASES[name]()
    f = torch.tensor([[0.4, -0.7]], dtype=float64)
    if name == "gaussian":
        f = f[:, :1]
    m, sigma = loss.conditional_mean(f).item(), loss.conditional_variance(f).sqrt().item()

    def density(y):
        return math.exp(-loss.negative_log_likelihood(f, torch.tensor([[y]], dtype=float64)).item())

    assert quad(density, m - 12 * sigma, m + 12 * sigma)[0] == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize(
    "loss, f, y",
    [
        (losses.Bernoulli(), [[0.3]], torch.arange(2.0)[:, None]),
        (losses.Categorical(), [[0.3, -1.0, 2.0]], torch.arange(3)),
        (losses.Poisson(), [[1.3]], torch.arange(60.0)[:, None]),
    ],
)
def test_probabilities_sum_to_one(loss, f, y):
    f = torch.tensor(f, dtype=float64).expand(len(y), -1)
    y = y.double() if y.is_floating_point() else y
    assert_close(torch.exp(-loss.negative_log_likelihood(f, y)).sum().item(), 1.0)


@pytest.mark.parametrize("name", [name for name in CASES if "own" not in name.split() and "soft" not in name.split()])
def test_negative_log_likelihood_is_that_of_the_conditional(name):
    loss, f, y = make(name)
    conditional = loss.conditional(f)
    assert_close(-conditional.log_prob(y), loss.negative_log_likelihood(f, y))
    if name != "categorical":  # torch has no mean of classes
        assert_close(conditional.mean, loss.conditional_mean(f))
        assert_close(conditional.variance, loss.conditional_variance(f))
    assert_close(loss.conditional_covariance(f).diagonal(dim1=-2, dim2=-1), loss.conditional_variance(f))


def test_categorical_moments_are_those_of_the_indicator_vector():
    loss, f, _ = make("categorical")
    p = f.softmax(-1)
    assert_close(loss.conditional_mean(f), p)
    assert_close(loss.conditional_covariance(f), torch.diag_embed(p) - p[:, :, None] * p[:, None, :])


def test_soft_labels_are_the_average_of_hard_ones():
    loss, f, q = make("categorical soft")
    hard = [torch.full((N,), k) for k in range(K)]
    nll = torch.stack([loss.negative_log_likelihood(f, y) for y in hard], -1)
    assert_close(loss.negative_log_likelihood(f, q), (q * nll).sum(-1))
    y = torch.randint(K, (N,))
    assert_close(loss.residual(f, one_hot(y, K).double()), loss.residual(f, y))


def test_two_classes_are_one_logit():
    f, y = randn(N, 1), torch.randint(2, (N,))
    two = torch.cat([torch.zeros_like(f), f], -1)
    assert_close(losses.Categorical().negative_log_likelihood(two, y), losses.Bernoulli().negative_log_likelihood(f, y))
    assert_close(losses.Categorical().residual(two, y)[:, 1:], losses.Bernoulli().residual(f, y))
    assert_close(losses.Categorical().noise_precision(two)[:, 1:, 1:], losses.Bernoulli().noise_precision(f))


# Saturation


def everything(loss, f, y, v):
    """All that a posterior reads of a loss."""
    return (
        loss.negative_log_likelihood(f, y),
        loss.residual(f, y),
        loss.noise_precision(f),
        loss.apply_root(f, v),
        loss.apply_root_t(f, v),
    )


def test_a_confidently_wrong_label_has_a_residual_and_no_nan():
    loss = losses.Categorical()
    f = torch.tensor([[0.0, 62.0, -3.0]], dtype=float64, requires_grad=True)  # p_0 = 1.2e-27
    y = torch.tensor([0])
    assert_close(loss.residual(f, y), torch.tensor([[-1.0, 1.0, 0.0]], dtype=float64), rtol=0, atol=1e-26)
    v = torch.tensor([[1.0, -2.0, 3.0]], dtype=float64)
    for value in everything(loss, f, y, v):
        (gradient,) = torch.autograd.grad(value.square().sum(), f)
        assert torch.isfinite(value).all() and torch.isfinite(gradient).all()
    assert loss.negative_log_likelihood(f, y).item() == pytest.approx(62.0)


def test_softmax_curvature_keeps_its_digits_where_it_is_saturated():
    f = torch.tensor([[0.0, 60.0]], dtype=float64)
    expected = math.exp(-60) / (1 + math.exp(-60)) ** 2
    lam = losses.Categorical().noise_precision(f)[0]
    assert_close(lam, expected * torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", [losses.Categorical(), losses.Bernoulli()])
@pytest.mark.parametrize("scale", [40.0, 1e3, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, float64])
def test_extreme_logits_give_finite_numbers_and_gradients(loss, scale, dtype):
    f = (scale * torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]])).to(dtype).requires_grad_()
    y = torch.tensor([1, 0]) if isinstance(loss, losses.Categorical) else torch.tensor([[0, 1, 1], [1, 0, 0]])
    v = torch.ones_like(f)
    for value in everything(loss, f, y, v):
        (gradient,) = torch.autograd.grad(value.sum(), f)
        assert torch.isfinite(value).all() and torch.isfinite(gradient).all()
        assert value.dtype == dtype


def test_bernoulli_keeps_its_digits_in_both_tails():
    loss = losses.Bernoulli()
    f = torch.tensor([[50.0], [-50.0]], dtype=float64)
    y = torch.tensor([[1.0], [0.0]], dtype=float64)
    assert_close(loss.negative_log_likelihood(f, y), torch.full((2,), math.exp(-50), dtype=float64), rtol=1e-12, atol=0)
    tail = torch.tensor([[-1.0], [1.0]], dtype=float64) * math.exp(-50)
    assert_close(loss.residual(f, y), tail, rtol=1e-12, atol=0)
    assert_close(loss.noise_precision(f).flatten(), torch.full((2,), math.exp(-50), dtype=float64), rtol=1e-12, atol=0)


# Differentiability, types


def test_everything_is_differentiable_in_the_outputs(case):
    loss, f, y = case
    f.requires_grad_()
    v = randn(N, K)
    functions = [
        lambda f: loss.negative_log_likelihood(f, y),
        lambda f: loss.residual(f, y),
        lambda f: loss.noise_precision(f, y),
        lambda f: loss.apply_root(f, v, y),
        lambda f: loss.apply_root_t(f, v, y),
    ]
    if repr(loss).startswith("from_callable"):
        functions = functions[:3]  # the root of a singular matrix is tested on its own
    for function in functions:
        assert torch.autograd.gradcheck(function, (f,), fast_mode=True)


@pytest.mark.parametrize("shape", [(), (K,), (N, 1), (N, K)])
def test_everything_is_differentiable_in_the_noise(shape):
    f, y, v = randn(N, K), randn(N, K), randn(N, K)
    noise = (torch.rand(shape, dtype=float64) + 0.2).requires_grad_()
    assert losses.Gaussian().with_noise(noise).noise is noise
    for function in (
        lambda noise: losses.Gaussian().with_noise(noise).negative_log_likelihood(f, y),
        lambda noise: losses.Gaussian().with_noise(noise).residual(f, y),
        lambda noise: losses.Gaussian().with_noise(noise).noise_precision(f),
        lambda noise: losses.Gaussian().with_noise(noise).apply_root(f, v),
        lambda noise: losses.Gaussian().with_noise(noise).conditional(f).variance,
    ):
        assert torch.autograd.gradcheck(function, (noise,))


@pytest.mark.parametrize("name", [name for name in CASES if "own" not in name])
def test_float32_agrees_with_float64(name):
    loss, f, y = make(name)
    v = randn(N, K)
    f32, y32, v32 = f.float(), y.float() if y.is_floating_point() else y, v.float()
    for a, b in (
        (loss.negative_log_likelihood(f32, y32), loss.negative_log_likelihood(f, y)),
        (loss.residual(f32, y32), loss.residual(f, y)),
        (loss.noise_precision(f32), loss.noise_precision(f)),
        (loss.apply_root(f32, v32), loss.apply_root(f, v)),
        (loss.apply_root_t(f32, v32), loss.apply_root_t(f, v)),
        (loss.conditional_variance(f32), loss.conditional_variance(f)),
    ):
        assert a.dtype == torch.float32 and b.dtype == float64
        assert (a.double() - b).abs().max() <= 1e-5 * b.abs().max()


# Laws

numbers = st.floats(-30, 30)


@settings(max_examples=40)
@given(f=st.lists(numbers, min_size=2, max_size=6))
def test_softmax_laws(f):
    f = torch.tensor([f], dtype=float64)
    loss, n_outputs = losses.Categorical(), f.shape[-1]
    lam = loss.noise_precision(f)[0]
    assert_close(lam, lam.mT, rtol=0, atol=0)
    assert torch.linalg.eigvalsh(lam)[0] >= -1e-15
    assert lam.sum(-1).abs().max() <= 1e-16  # the null vector 1
    assert loss.apply_root_t(f, torch.ones_like(f)).abs().max() <= 1e-15
    assert_close(loss.noise_precision(f + 3.7), lam[None], rtol=1e-9, atol=1e-14)  # logits have no origin
    order = torch.randperm(n_outputs)
    assert_close(loss.noise_precision(f[:, order])[0], lam[order][:, order], rtol=1e-12, atol=1e-16)
    for k in range(n_outputs):
        assert loss.residual(f, torch.tensor([k])).sum().abs() <= 1e-14


@settings(max_examples=40)
@given(f=st.lists(numbers, min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_examples_are_independent(f, seed):
    f = torch.tensor(f, dtype=float64)[:, None]
    order = torch.randperm(len(f), generator=torch.Generator().manual_seed(seed))
    y = torch.arange(len(f), dtype=float64)[:, None]
    for loss, labels in (
        (losses.Bernoulli(), y % 2),
        (losses.Poisson(), y),
        (losses.Gaussian(y + 1), y),
    ):
        permuted = loss.subset(order)
        assert_close(permuted.residual(f[order], labels[order]), loss.residual(f, labels)[order])
        assert_close(permuted.noise_precision(f[order]), loss.noise_precision(f)[order])


# Noise


def test_noise_is_the_square_of_sigma_in_the_type_of_the_outputs():
    assert losses.Gaussian(0.3).noise.item() == 0.3**2
    for f in (randn(N, K), randn(N, K).float()):
        assert losses.Gaussian(0.3).noise_precision(f).dtype == f.dtype
        assert losses.Gaussian(torch.tensor([1, 2, 3, 4])).residual(f, f).dtype == f.dtype
    per_output = losses.Gaussian([0.1, 0.2])
    assert_close(per_output.noise_precision(randn(3, 2))[1].diagonal(), torch.tensor([100.0, 25.0], dtype=float64))
    assert not losses.Poisson().has_noise and losses.Poisson().noise is None
    assert losses.Gaussian().has_noise


def test_with_noise_leaves_the_loss_as_it_is():
    loss = losses.Gaussian(0.5)
    other = loss.with_noise(0.09)
    assert loss.noise.item() == 0.25 and other.noise.item() == 0.09
    with pytest.raises(TypeError, match="Poisson.. has no noise"):
        losses.Poisson().with_noise(1.0)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_sigma_is_positive_and_finite(sigma):
    with pytest.raises(ValueError, match="sigma"):
        losses.Gaussian(sigma)
    with pytest.raises(ValueError, match="sigma.* index 1"):
        losses.Gaussian(torch.tensor([1.0, sigma]))
    with pytest.raises(ValueError, match="noise.* index 1"):
        losses.Gaussian().with_noise(torch.tensor([1.0, sigma]))


def test_noise_of_the_wrong_shape_says_which_is_right():
    f = randn(N, K)
    with pytest.raises(ValueError, match=r"shape \(3,\) for 4 outputs.*per output \(4,\)"):
        losses.Gaussian(torch.ones(3)).residual(f, f)
    with pytest.raises(ValueError, match="given per example, for 7 examples, and there are 5.*give that of the new"):
        losses.Gaussian(torch.ones(7, 1)).noise_precision(f)
    with pytest.raises(ValueError, match="given per example, for 7 examples"):
        losses.Gaussian(torch.ones(7, 1)).check_labels(f, K)
    with pytest.raises(ValueError, match=r"sigma has shape \(2, 5, 4\)"):
        losses.Gaussian(torch.ones(2, N, K))


def test_subset_takes_the_noise_along():
    loss = losses.Gaussian(torch.arange(1.0, 6.0)[:, None])
    assert_close(loss.subset(torch.tensor([3, 1])).noise, torch.tensor([[16.0], [4.0]]))
    assert loss.subset(slice(1, 3)).noise.shape == (2, 1)
    assert losses.Poisson().subset(slice(2)) is not None


# Labels


def test_labels_in_canonical_form():
    y = torch.tensor([0, 1, 2])
    assert losses.Categorical().check_labels(y.int(), 3, 3).dtype == torch.long
    assert_close(losses.Poisson().check_labels(y, 1, 3, float64), y.double()[:, None])
    assert losses.Poisson().check_labels(y, 1).dtype == torch.get_default_dtype()
    assert_close(losses.Bernoulli().check_labels(y > 0, 1, dtype=torch.float32), torch.tensor([[0.0], [1.0], [1.0]]))
    assert_close(losses.Categorical().check_labels(one_hot(y), 3), torch.eye(3))
    assert losses.HeteroscedasticGaussian().check_labels(torch.zeros(3), 2).shape == (3, 1)
    assert losses.HeteroscedasticGaussian().check_labels(torch.zeros(3, 2), 4).shape == (3, 2)
    soft = torch.tensor([[0.25, 0.75]])
    assert losses.Categorical().check_labels(soft, 2) is soft


@pytest.mark.parametrize(
    "loss, y, outputs, error, message",
    [
        (losses.Gaussian(), [0.0], 1, TypeError, "must be a torch.Tensor, got list"),
        (losses.Gaussian(), torch.zeros(()), 1, ValueError, "got a scalar"),
        (losses.Gaussian(), torch.zeros(3, dtype=torch.cfloat), 1, TypeError, "must be real"),
        (losses.Gaussian(), torch.zeros(3), 2, ValueError, r"shape \(3,\); needed is \(n, 2\)"),
        (losses.Gaussian(), torch.zeros(3, 3), 2, ValueError, r"shape \(3, 3\); needed is \(n, 2\)"),
        (losses.Gaussian(), torch.tensor([0.0, math.nan]), 1, ValueError, r"label nan at index \(1, 0\).*finite"),
        (losses.Poisson(), torch.tensor([0.0, math.inf]), 1, ValueError, r"label inf at index \(1, 0\)"),
        (losses.Poisson(), torch.tensor([0.0, -2.0]), 1, ValueError, r"label -2 at index \(1, 0\).*count"),
        (losses.Poisson(), torch.tensor([0.0, 1.5]), 1, ValueError, r"label 1.5 at index \(1, 0\).*count"),
        (losses.Bernoulli(), torch.tensor([[0.0, 2.0]]), 2, ValueError, r"label 2 at index \(0, 1\).*probability"),
        (losses.Bernoulli(), torch.tensor([-1, 1]), 1, ValueError, r"label -1 at index \(0, 0\)"),
        (losses.Categorical(), torch.tensor([0, 3]), 3, ValueError, "label 3 at index 1: .* one of 0, ..., 2"),
        (losses.Categorical(), torch.tensor([-1, 2]), 3, ValueError, "label -1 at index 0"),
        (losses.Categorical(), torch.tensor([0.0, 1.0]), 3, TypeError, r"got torch.float32.*y.long\(\)"),
        (losses.Categorical(), torch.tensor([True]), 3, TypeError, "must be integers, got torch.bool"),
        (losses.Categorical(), torch.tensor([[0], [1]]), 3, ValueError, r"shape \(2, 1\); .* class indices \(n,\)"),
        (losses.Categorical(), torch.tensor([[0.5, 0.4]]), 2, ValueError, "label 0.9 at index 0.*sum to one"),
        (losses.Categorical(), torch.tensor([[1.5, -0.5]]), 2, ValueError, r"label -0.5 at index \(0, 1\)"),
        (losses.Categorical(), torch.tensor([0]), 1, ValueError, r"at least 2 logits.*Bernoulli\(\)"),
        (losses.HeteroscedasticGaussian(), torch.zeros(3), 3, ValueError, "even number of outputs.*has 3"),
        (losses.HeteroscedasticGaussian(), torch.zeros(3, 4), 4, ValueError, r"shape \(3, 4\); needed is \(n, 2\)"),
        (losses.Gaussian(), torch.tensor([2**24 + 1]), 1, ValueError, "label 1.67772e.07 at .*exact as torch.float32"),
        (losses.from_callable(own_softmax), torch.tensor([0.0, math.nan]), 2, ValueError, "label nan at index 1"),
    ],
)  # fmt: skip
def test_bad_labels_are_named(loss, y, outputs, error, message):
    with pytest.raises(error, match=message):
        loss.check_labels(y, outputs)


def test_labels_match_the_inputs_and_the_network():
    loss, y = losses.Gaussian(), torch.zeros(3, 1)
    with pytest.raises(ValueError, match="3 labels for 4 inputs"):
        loss.check_labels(y, 1, 4)
    with pytest.raises(
        TypeError, match=r"labels are torch.float32, .* torch.float64: convert one, y.to\(torch.float64"
    ):
        loss.check_labels(y, 1, dtype=float64)
    with pytest.raises(ValueError, match="labels are on cpu, the network on meta"):
        loss.check_labels(y, 1, device=torch.device("meta"))
    assert loss.check_labels(y, 1, device="cpu") is y


def test_labels_never_broadcast_against_outputs():
    f = randn(N, 1)
    y = randn(N)
    assert losses.Gaussian().residual(f, y).shape == (N, 1)  # not (N, N)
    assert losses.Gaussian().residual(f.expand(3, N, 1), y).shape == (3, N, 1)
    with pytest.raises(ValueError, match=r"labels have shape \(5,\), outputs \(5, 4\); needed is \(5, 4\)"):
        losses.Poisson().residual(randn(N, K), y)
    with pytest.raises(ValueError, match=r"class labels have shape \(5, 1\)"):
        losses.Categorical().residual(randn(N, K), torch.zeros(N, 1).long())
    with pytest.raises(TypeError, match="labels are torch.float32"):
        losses.Gaussian().residual(f, y.float())
    with pytest.raises(RuntimeError, match="out of bounds"):
        losses.Categorical().residual(randn(1, K), torch.tensor([K]))


# Natural parameters


def test_the_second_natural_parameter_must_be_negative():
    f = torch.tensor([[0.3, -0.5], [0.3, 0.2]], dtype=float64)
    with pytest.raises(ValueError, match=r"must be negative and finite; it is 0.2 for .*\(1, 0\).*link="):
        losses.HeteroscedasticGaussian("natural").noise_precision(f)
    for link in ("exp", "softplus", own_link):
        assert torch.isfinite(losses.HeteroscedasticGaussian("natural", link=link).noise_precision(f)).all()
    with pytest.raises(ValueError, match="must be negative"):
        losses.HeteroscedasticGaussian("natural", link=lambda s: s - 1).noise_precision(f)


def test_heteroscedastic_options_are_checked():
    with pytest.raises(ValueError, match='"log_sigma" or "natural", got .sigma.'):
        losses.HeteroscedasticGaussian("sigma")
    with pytest.raises(ValueError, match="a link belongs to the natural"):
        losses.HeteroscedasticGaussian(link="exp")
    with pytest.raises(ValueError, match='link must be None, "exp", "softplus"'):
        losses.HeteroscedasticGaussian("natural", link="square")
    with pytest.raises(ValueError, match="even number of outputs, got 3"):
        losses.HeteroscedasticGaussian().residual(randn(N, 3), randn(N, 1))


# The user's own loss


def test_own_loss_by_torchs_names():
    f, y = randn(N, K), torch.randint(K, (N,))
    own = losses.from_callable(cross_entropy)
    assert_close(own.negative_log_likelihood(f, y), losses.Categorical().negative_log_likelihood(f, y))
    assert_close(own.residual(f, y), losses.Categorical().residual(f, y))


def test_own_loss_with_an_indefinite_hessian_names_the_example_and_the_cure():
    own = losses.from_callable(lambda f, y: 0.5 * (y * f.square()).sum())
    f, y = randn(3, 1), torch.tensor([1.0, -2.0, -3.0], dtype=float64)
    with pytest.raises(
        ValueError, match="2 of 3 examples, first for example 1: its smallest eigenvalue is -2.*fisher="
    ):
        own.noise_precision(f, y)
    with pytest.raises(ValueError, match="not positive semidefinite"):
        own.apply_root(f, f, y)
    cured = losses.from_callable(lambda f, y: 0.5 * (y * f.square()).sum(), fisher=torch.ones_like(f)[..., None].mul)
    assert not cured.precision_needs_labels and own.precision_needs_labels


def test_own_loss_that_is_not_finite_names_the_example():
    own = losses.from_callable(lambda f, y: (f - y).abs().pow(0.5).sum())
    with pytest.raises(ValueError, match="not finite for example 1"):
        own.noise_precision(torch.tensor([[-1.0], [2.0]]), torch.tensor([1.0, 2.0]))


def test_own_loss_needs_labels_or_a_fisher():
    f, y = randn(N, K), torch.randint(K, (N,))
    with pytest.raises(ValueError, match="depends on the label: pass y, or give from_callable the Fisher"):
        losses.from_callable(own_softmax).noise_precision(f)
    with pytest.raises(ValueError, match="4 labels for 5 examples"):
        losses.from_callable(own_softmax).residual(f, y[:4])


@pytest.mark.parametrize(
    "fisher, message",
    [
        (lambda f: f, r"must have shape \(5, 4, 4\)"),
        (lambda f: -torch.eye(K, dtype=float64).expand(N, K, K), r"fisher\(f\) is not positive semidefinite"),
        (lambda f: torch.eye(K, dtype=float64).expand(N, K, K).cumsum(-1), "not symmetric for example 0"),
        (lambda f: torch.full((N, K, K), math.nan, dtype=float64), "not finite for example 0"),
    ],
)
def test_a_bad_fisher_is_refused(fisher, message):
    with pytest.raises(ValueError, match=message):
        losses.from_callable(own_softmax, fisher=fisher).noise_precision(randn(N, K))


def test_own_loss_that_vmap_refuses_says_how_to_write_it():
    own = losses.from_callable(lambda f, y: -f.log_softmax(-1)[y])
    with pytest.raises(RuntimeError, match="vmap") as caught:
        own.residual(randn(N, K), torch.randint(K, (N,)))
    assert "f.gather(0, y[None])[0]" in "".join(caught.value.__notes__)


def test_own_loss_with_its_conditional():
    f = randn(N, K)
    known = losses.from_callable(own_softmax, conditional=losses.Categorical().conditional)
    assert_close(known.conditional_mean(f), f.softmax(-1))
    assert_close(known.conditional_covariance(f), losses.Categorical().conditional_covariance(f))
    scalar = losses.from_callable(own_softmax, conditional=lambda f: torch.distributions.Exponential(f[..., 0].exp()))
    assert scalar.conditional_mean(f).shape == (N, 1) and scalar.conditional_covariance(f).shape == (N, 1, 1)
    joint = losses.from_callable(own_softmax, conditional=lambda f: torch.distributions.MultivariateNormal(f, cov))
    cov = torch.eye(K, dtype=float64) + 0.3
    assert_close(joint.conditional_covariance(f), cov.expand(N, K, K))
    with pytest.raises(ValueError, match="`conditional=`. The posterior of the outputs, and the evidence, need none"):
        losses.from_callable(own_softmax).conditional_mean(f)
    with pytest.raises(TypeError, match="fisher must be a function, got int"):
        losses.from_callable(own_softmax, fisher=3)


# Roots of singular matrices


def test_positive_root_of_definite_singular_and_zero_matrices():
    A = randn(4, 3, 3)
    a = A @ A.mT
    a[1] = A[1, :, :1] @ A[1, :, :1].mT
    a[2] = 0
    root = positive_root(a, "a")
    assert_close(root @ root.mT, a, rtol=1e-12, atol=1e-14)
    assert_close(positive_root(a[1:2], "a"), root[1:2])  # whatever its neighbours
    a[3] -= 10 * torch.eye(3, dtype=float64)
    with pytest.raises(ValueError, match="first for example 3"):
        positive_root(a, "a")


def test_the_root_of_a_singular_matrix_has_a_derivative():
    # R R^T = a for every a that stays singular, so the derivative of R R^T is that of a.
    def square_of_root(A):
        root = positive_root(A @ A.mT, "a")
        return root @ root.mT

    for A in (randn(2, 3, 1), torch.cat([randn(1, 3, 3), randn(1, 3, 1) @ randn(1, 1, 3)])):
        A.requires_grad_()
        weight = randn(2, 3, 3)
        (here,) = torch.autograd.grad((weight * square_of_root(A)).sum(), A)
        (there,) = torch.autograd.grad((weight * (A @ A.mT)).sum(), A)
        assert_close(here, there, rtol=1e-6, atol=1e-6)
    zero = torch.zeros(1, 3, 3, dtype=float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(positive_root(zero, "a").sum(), zero)
    assert torch.isfinite(gradient).all()


# Faces


@pytest.mark.parametrize(
    "loss, text",
    [
        (losses.Gaussian(0.3), "Gaussian(sigma=0.3)"),
        (losses.Gaussian([0.1, 0.25]), "Gaussian(sigma=[0.1, 0.25])"),
        (losses.Gaussian(torch.ones(50)), "Gaussian(sigma=<one per output, (50,)>)"),
        (losses.Gaussian(torch.ones(5, 1)), "Gaussian(sigma=<one per example, (5, 1)>)"),
        (losses.Gaussian().with_noise(torch.tensor(0.25, requires_grad=True)), "Gaussian(sigma=0.5)"),
        (losses.Bernoulli(), "Bernoulli()"),
        (losses.HeteroscedasticGaussian(), "HeteroscedasticGaussian()"),
        (losses.HeteroscedasticGaussian("natural", link="exp"), "HeteroscedasticGaussian(\"natural\", link='exp')"),
        (losses.HeteroscedasticGaussian("natural", link=own_link), 'HeteroscedasticGaussian("natural", link=own_link)'),
        (losses.from_callable(own_softmax, conditional=print), "from_callable(own_softmax, conditional=...)"),
    ],
)
def test_repr(loss, text):
    assert repr(loss) == text


def test_what_a_loss_says_of_its_precision():
    assert losses.Gaussian().invertible and losses.HeteroscedasticGaussian("natural", link="exp").invertible
    assert not losses.Categorical().invertible and not losses.from_callable(own_softmax).invertible
    for loss, f, _ in (make(name) for name in CANONICAL if "own" not in name):
        smallest = torch.linalg.eigvalsh(loss.noise_precision(f))[:, 0]
        assert bool((smallest > 1e-6).all()) == loss.invertible


def test_losses_run_under_vmap():
    f, v = randn(3, N, K), randn(3, N, K)
    for loss, y in (
        (losses.Gaussian(0.3), randn(N, K)),
        (losses.Bernoulli(), torch.rand(N, K, dtype=float64)),
        (losses.Categorical(), torch.randint(K, (N,))),
        (losses.Poisson(), torch.ones(N, K, dtype=float64)),
        (losses.HeteroscedasticGaussian(), randn(N, K // 2)),
    ):
        assert_close(vmap(lambda f, loss=loss, y=y: loss.residual(f, y))(f), loss.residual(f, y))
        assert_close(vmap(loss.apply_root)(f, v), loss.apply_root(f, v))
