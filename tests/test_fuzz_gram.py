"""Grams of random nets against per-example autodiff, at 1e-10: every layer rule, the fallback, and how they combine.

A sample of the seeds runs with the suite, ``make fuzz`` runs many more, ``pytest tests/test_fuzz_gram.py --seeds 7:8``
one of them. ``random_nets.py`` says what a seed draws.
"""

import contextlib
import warnings
from collections import Counter

import pytest
import torch
from oracle import relative_error
from random_nets import F64, THEMES, Apply, case, jacobian
from torch import nn
from torch.nn import functional as F

import gpytorch_dnn2gp as dnn2gp
from gpytorch_dnn2gp.gram import FallbackWarning

TOLERANCE = 1e-10


# torch on the speed of even kernels
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


def pytest_generate_tests(metafunc):
    if metafunc.function is test_random_net:
        metafunc.parametrize("number", metafunc.config.getoption("seeds"))


@contextlib.contextmanager
def may_fall_back(allowed: bool = True):
    """The package may warn that it takes autodiff for weights that are used where it cannot see them."""
    with warnings.catch_warnings():
        if allowed:
            warnings.simplefilter("ignore", FallbackWarning)
        yield


def assert_close(actual, expected, what, scale=None):
    """Largest absolute difference over the largest absolute entry, or over ``scale``."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} is not {tuple(expected.shape)}"
    if scale is None:
        error = relative_error(actual, expected)
    else:
        error = float((actual - expected).abs().max() / (scale or 1))
    assert error <= TOLERANCE, f"{what}: relative error {error:.1e}"


def product(J1, J2, s0=None):
    """``J1 S0 J2^T``, examples first, outputs fastest."""
    rows = J1.flatten(0, 1)
    return (rows if s0 is None else rows * s0) @ J2.flatten(0, 1).mT


def blocks(k, K):
    """``(n1, K, n2, K)``."""
    return k.unflatten(0, (-1, K)).unflatten(-1, (-1, K))


def compare(net, x1, x2, names, options, s0, gradient):
    """Everything that the package makes of Grams, against the Jacobian's products."""
    lin = dnn2gp.Linearization(net, **options)
    y1, y2 = lin.prepare(x1)[0], lin.prepare(x2)[0]
    J1, J2 = jacobian(net, y1, names), jacobian(net, y2, names)
    K = J1.shape[1]
    assert lin.param_names == names
    for v, what in ((None, ""), (s0, " with prior variance")):
        symmetric, cross = product(J1, J1, v), product(J1, J2, v)
        assert_close(lin.gram(x1, prior_variance=v), symmetric, "gram(x)" + what)
        assert_close(lin.gram(x1, x2, prior_variance=v), cross, "gram(x1, x2)" + what)
        own = torch.stack([product(J[None], J[None], v) for J in J1])
        assert_close(lin.gram_blocks(x1, prior_variance=v), own, "gram_blocks" + what)
        assert_close(lin.gram_diagonal(x1, prior_variance=v), symmetric.diagonal().unflatten(0, (-1, K)), "diagonal")
        trace = torch.einsum("ikjk->ij", blocks(symmetric, K))
        assert_close(lin.trace_gram(x1, prior_variance=v), trace, "trace_gram(x)" + what)
        trace = torch.einsum("ikjk->ij", blocks(cross, K))
        assert_close(lin.trace_gram(x1, x2, prior_variance=v), trace, "trace_gram(x1, x2)" + what)
    # Each parameter by itself: an error in a small one shows. Below a millionth of the largest it is cancellation.
    indices = [torch.arange(part.start, part.stop) for part in lin.function.slices()]
    C = torch.randn(len(x1), 2, K, dtype=F64)
    assert_close(lin.sum_of_squares(x1, C), (C @ J1).square().sum((0, 1)), "sum_of_squares")
    C2 = torch.randn(len(x2), 1, K, dtype=F64)
    k = lin.gram(x1, x2, prior_variance=s0, cotangents1=C, cotangents2=C2)
    assert_close(k, product(C @ J1, C2 @ J2, s0), "gram with cotangents")
    grams = lin.rows(x1, C).gram(indices, s0)
    largest = float(symmetric.abs().max())
    for name, index, k in zip(names, indices, grams):
        expected = product(C @ J1[..., index], C @ J1[..., index], s0[index])
        assert_close(k, expected, f"Gram of {name} alone", max(float(expected.abs().max()), 1e-6 * largest))
    if gradient:
        compare_gradients(lin, net, x1[:2], x2[:1], names, s0)


def gradients(total, *inputs):
    if not total.requires_grad:  # biases alone may be selected
        return [torch.zeros_like(x) for x in inputs]
    return torch.autograd.grad(total, inputs, materialize_grads=True)


def compare_gradients(lin, net, x1, x2, names, s0):
    """The gradient of one number made of a Gram in both inputs."""
    x1, x2 = x1.clone().requires_grad_(), x2.clone().requires_grad_()
    k = lin.gram(x1, x2, prior_variance=s0)
    weight = torch.randn_like(k)
    actual = gradients((weight * k).sum(), x1, x2)
    J1, J2 = (jacobian(net, lin.prepare(x)[0], names, create_graph=True) for x in (x1, x2))
    expected = gradients((weight * product(J1, J2, s0)).sum(), x1, x2)
    scale = max(float(g.abs().max()) for g in expected)
    for a, e, name in zip(actual, expected, ("x1", "x2")):
        assert_close(a, e, f"gradient in {name}", max(scale, 1e-6 * float(k.detach().abs().max())))


def test_random_net(number):
    problem = case(number)
    print(problem)
    with may_fall_back(problem.hidden):
        compare(
            problem.net,
            problem.x1,
            problem.x2,
            problem.names,
            problem.options,
            problem.prior_variance,
            problem.gradient,
        )


def test_every_theme_comes_up_among_300_seeds():
    counts = Counter(case(seed).theme for seed in range(300))
    assert set(counts) == set(THEMES) and min(counts.values()) >= 3


# ---- the traps by name: weights used where no hook sees them, or by more than one layer


def check(net, shape, dtype=None):
    """A net of inputs of this shape, all of its parameters."""
    net = net.to(F64)
    x1, x2 = torch.randn(3, *shape, dtype=F64), torch.randn(2, *shape, dtype=F64)
    options = {"input_shape": shape}
    if dtype is not None:
        x1, x2, options["input_dtype"] = (x1 * 100).round() % 5, (x2 * 100).round() % 5, dtype
    names = [name for name, _ in net.named_parameters()]
    s0 = torch.rand(sum(p.numel() for p in net.parameters()), dtype=F64) + 0.1
    compare(net, x1, x2, names, options, s0, gradient=dtype is None)


def test_tied_weights_of_two_linear_layers():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    net[2].weight = net[0].weight
    check(net, (3,))


def test_tied_weights_of_an_embedding_and_the_output_layer():
    net = nn.Sequential(nn.Embedding(5, 3), Apply(lambda self, x: x.sin().mean(1)), nn.Linear(3, 5))
    net[2].weight = net[0].weight
    check(net, (4,), torch.long)


def test_tied_weights_of_a_convolution_and_its_transpose():
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.ConvTranspose2d(3, 2, 2), nn.Flatten(), nn.Linear(18, 2))
    net[2].weight = net[0].weight
    check(net, (2, 3, 3))


def test_functional_use_of_a_layers_weight_that_is_called_too():
    net = nn.Sequential(
        Apply(lambda self, x: F.linear(self.layer(x).tanh(), self.layer.weight.T), layer=nn.Linear(3, 4)),
        nn.Linear(3, 2),
    )
    with may_fall_back():
        check(net, (3,))


def test_functional_use_of_a_layer_that_is_never_called():
    net = nn.Sequential(
        Apply(lambda self, x: F.linear(x, self.layer.weight, self.layer.bias).tanh(), layer=nn.Linear(3, 4)),
        nn.Linear(4, 2),
    )
    with may_fall_back():
        check(net, (3,))


def test_functional_use_that_two_equal_examples_would_hide():
    """The weight is used once more only where examples are far from zero."""

    def forward(self, x):
        far = (x.abs().sum(1, keepdim=True) > 2).to(x.dtype)
        return self.layer(x) + far * F.linear(x.sin(), self.layer.weight)

    with may_fall_back():
        check(nn.Sequential(Apply(forward, layer=nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)), (3,))


def test_examples_that_pass_a_layer_in_another_order():
    """In the order of their sums: two examples may happen to stand in it."""
    net = nn.Sequential(
        Apply(lambda self, x: self.layer(x[x.sum(1).argsort()])[x.sum(1).argsort().argsort()], layer=nn.Linear(3, 4)),
        nn.Tanh(),
        nn.Linear(4, 2),
    )
    for _ in range(5):
        with may_fall_back():
            check(net, (3,))
