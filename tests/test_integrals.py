"""Gaussian integrals of activations: closed forms and series against a product rule, limits, and gradients."""

import math

import pytest
import torch
from torch import nn

from gpytorch_dnn2gp import NumericalWarning
from gpytorch_dnn2gp.infinite import integrals

F64 = torch.float64
A = torch.tensor([1.3, 0.4, 2.2], dtype=F64)[:, None]
B = torch.tensor([0.7, 1.1, 2.2], dtype=F64)
RHO = torch.tensor([[0.3, -0.9, 1.0], [0.99, 0.0, -1.0], [0.5, -0.999, 1.0]], dtype=F64)
K = RHO * (A * B).sqrt()


def cubic(x):
    return 1 + 0.5 * x - 0.2 * x**2 + 0.1 * x**3


SMOOTH = {
    "erf": (integrals.Erf(), torch.erf),
    "erf scaled": (integrals.Erf(0.5, 0.7, 0.2), lambda x: 0.5 * torch.erf(0.7 * x) + 0.2),
    "gelu": (integrals.GELU(), nn.functional.gelu),
    "sin": (integrals.Sin(), torch.sin),
    "cos": (integrals.Cos(), torch.cos),
    "polynomial": (integrals.Polynomial((1, 0.5, -0.2, 0.1)), cubic),
    "identity": (integrals.dual("identity"), lambda x: 1 * x),
    "tanh": (integrals.dual("tanh"), torch.tanh),
    "sigmoid": (integrals.dual("sigmoid"), torch.sigmoid),
    "silu": (integrals.dual("silu"), nn.functional.silu),
    "softplus": (integrals.dual("softplus"), nn.functional.softplus),
    "a user's": (integrals.dual(lambda x: x * torch.exp(-(x**2) / 4)), lambda x: x * torch.exp(-(x**2) / 4)),
}


def points(dual: integrals.Dual) -> tuple:
    return dual.points(A, 2.3), dual.points(B, 2.3)


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_activations_against_the_product_rule(name):
    dual, phi = SMOOTH[name]
    rule = integrals.ProductRule(phi, 1e-10)
    for ours, theirs in (
        (dual.value(*points(dual), K), rule.value(*points(rule), K)),
        (dual.derivative(*points(dual), K), rule.derivative(*points(rule), K)),
        (dual.both(*points(dual), K)[1], rule.derivative(*points(rule), K)),
        (dual(A, B, K), rule(A, B, K)),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
    for exact, value in (
        (dual.variance(A), dual(A, A, A)),
        (dual.variance_of_derivative(A), dual.derivative(points(dual)[0], points(dual)[0], A)),
    ):
        torch.testing.assert_close(exact, value, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("slopes", [(0.0, 1.0), (0.1, 1.0), (-1.0, 1.0)])
def test_rectifiers_against_the_integral_of_their_derivative(slopes):
    """V(k) = V(0) + integral of V', and V' in closed form at rho = -1, 0, 1 (Cho and Saul 2009)."""
    a, b = slopes
    dual = integrals.Rectifier(*slopes)
    one = torch.ones((), dtype=F64)
    p = dual.points(one)
    # E[phi'(u) phi'(v)] where signs are opposite, independent, equal
    for rho, expected in ((-1.0, a * b), (0.0, ((a + b) / 2) ** 2), (1.0, (a**2 + b**2) / 2)):
        assert float(dual.derivative(p, p, rho * one)) == pytest.approx(expected, abs=1e-15)
    k = torch.linspace(-1, 1, 4001, dtype=F64)
    integral = torch.trapezoid(dual.derivative(p, p, k), k)
    torch.testing.assert_close(dual(one, one, one) - dual(one, one, -one), integral, rtol=1e-5, atol=1e-12)
    assert float(dual(one, one, one)) == pytest.approx((a**2 + b**2) / 2)


def test_steps_have_values_and_no_tangent_kernel():
    dual, one = integrals.Step(), torch.ones((), dtype=F64)
    assert float(dual(one, one, one)) == pytest.approx(0.5)
    assert float(dual(one, one, 0 * one)) == pytest.approx(0.25)
    assert float(integrals.Step(-1, 1)(one, one, 0.5 * one)) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="no NTK"):
        dual.derivative(dual.points(one), dual.points(one), one)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "abs", "step", *SMOOTH])
def test_gradients(name):
    dual = SMOOTH[name][0] if name in SMOOTH else integrals.dual(name)
    a, b, k = A.clone().requires_grad_(), B.clone().requires_grad_(), (0.97 * K).requires_grad_()

    def value(a, b, k):
        return dual.value(dual.points(a, 2.3), dual.points(b, 2.3), k)

    def derivative(a, b, k):
        return dual.derivative(dual.points(a, 2.3), dual.points(b, 2.3), k)

    assert torch.autograd.gradcheck(value, (a, b, k))
    if name != "step":
        assert torch.autograd.gradcheck(derivative, (a, b, k))
    if name in SMOOTH:
        assert torch.autograd.gradgradcheck(value, (a, b, k))


def test_gradients_of_the_product_rule():
    dual = integrals.ProductRule(torch.tanh, step=0.4)
    inputs = (A.clone().requires_grad_(), B.clone().requires_grad_(), K[:2].mul(0.97).requires_grad_())
    assert torch.autograd.gradcheck(
        lambda a, b, k: dual.value(dual.points(a[:2]), dual.points(b), k), inputs, atol=1e-4
    )


@pytest.mark.parametrize("name", ["relu", "abs", "step", "gelu", "erf", "tanh", "sigmoid"])
def test_gradients_are_finite_at_correlation_one_and_at_zero(name):
    dual = integrals.dual(name)
    a = torch.tensor([1.0, 1.0, 0.0, 0.0, 2.0], dtype=F64).requires_grad_()
    b = torch.tensor([1.0, 1.0, 0.0, 1.0, 2.0], dtype=F64).requires_grad_()
    k = torch.tensor([1.0, -1.0, 0.0, 0.0, 2.0], dtype=F64).requires_grad_()
    p, q = dual.points(a, 2.1), dual.points(b, 2.1)
    outputs = [dual.value(p, q, k)] + ([dual.derivative(p, q, k)] if name != "step" else [])
    for out in outputs:
        assert out.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (a, b, k), retain_graph=True))


def test_at_variance_zero_the_derivative_is_that_of_the_function():
    """E[phi'(0) phi'(v)], where the correlation is not defined."""
    zero, b = torch.zeros(1, dtype=F64), torch.tensor([0.8], dtype=F64)
    for name, slope in (("tanh", 1.0), ("sigmoid", 0.25), ("gelu", 0.5), ("erf", 2 / math.sqrt(math.pi))):
        dual = integrals.dual(name)
        p, q = dual.points(zero, 0.9), dual.points(b, 0.9)
        mean_slope = (dual.derivative(p, dual.points(zero, 0.9), zero) / slope).item()
        assert mean_slope == pytest.approx(slope)
        k = torch.zeros(1, dtype=F64, requires_grad=True)
        (gradient,) = torch.autograd.grad(dual.value(p, q, k).sum(), k)
        torch.testing.assert_close(gradient, dual.derivative(p, q, zero))


def test_the_product_rule_is_sized_by_its_tolerance():
    rho = torch.tensor([1.0, -1.0, 0.999, 0.3], dtype=F64)
    for variance in (0.1, 1.0, 9.0):
        a = torch.full((4,), variance, dtype=F64)
        fine = integrals.ProductRule(torch.tanh, step=0.04)
        p = fine.points(a)
        for tolerance in (1e-3, 1e-6, 1e-10):
            rule = integrals.ProductRule(torch.tanh, tolerance)
            for method in ("value", "derivative"):
                exact = getattr(fine, method)(p, p, variance * rho)
                error = (getattr(rule, method)(p, p, variance * rho) - exact).abs().max()
                assert error <= tolerance * exact[0]
    coarse, loose, wide = (
        integrals.ProductRule(torch.tanh, tolerance).step_for(*2 * ((torch.tensor([root], dtype=F64),),))
        for tolerance, root in ((1e-10, 1.0), (1e-4, 1.0), (1e-10, 3.0))
    )
    assert loose > 1.5 * coarse and coarse > 1.5 * wide
    with pytest.warns(NumericalWarning, match="product rule of hardtanh ends at"):
        integrals.ProductRule(nn.functional.hardtanh)(A, B, K)
    for options in ({"tolerance": 0.0}, {"step": -1.0}, {"tolerance": 1e-3, "step": 0.1}):
        with pytest.raises(ValueError, match="tolerance"):
            integrals.ProductRule(torch.tanh, **options)


def test_the_series_is_sized_by_its_tolerance():
    for tolerance in (1e-4, 1e-8, 1e-11):
        dual = integrals.Numerical(torch.tanh, tolerance=tolerance)
        one = torch.ones(3, dtype=F64) * 1.5
        rho = torch.tensor([1.0, -1.0, 0.999], dtype=F64)
        exact = integrals.ProductRule(torch.tanh, 1e-12)(one, one, 1.5 * rho)
        assert (dual(one, one, 1.5 * rho) - exact).abs().max() <= tolerance * dual.variance(one[:1])
    coarse, fine = (integrals.Numerical(torch.tanh, tolerance=t).resolution(one)[1] for t in (1e-4, 1e-10))
    assert coarse < fine / 2


def test_a_series_cut_short_says_by_how_much():
    dual = integrals.Numerical(nn.functional.hardtanh, tolerance=1e-6)
    with pytest.warns(NumericalWarning, match="cut after 512 terms"):
        dual(A, A, 0.5 * A)


def test_activations_by_name_function_and_object():
    for name in integrals.ACTIVATIONS:
        assert isinstance(integrals.dual(name), integrals.Dual)
    assert repr(integrals.dual("relu")) == "Rectifier(negative=0, positive=1)"
    assert integrals.dual(integrals.GELU()).variance(torch.ones(1)).shape == (1,)
    torch.testing.assert_close(integrals.dual(torch.tanh)(A, B, K), integrals.dual("tanh")(A, B, K))


def test_power_series_of_any_length():
    x = torch.rand(3, 2, dtype=F64).requires_grad_()
    for terms in (1, 2, 5):
        a, b = (torch.randn(terms, *shape, dtype=F64).requires_grad_() for shape in ((3, 1), (1, 2)))
        direct = sum(a[j] * b[j] * x**j for j in range(terms))
        torch.testing.assert_close(integrals.power_series(a, b, x), direct)
        assert torch.autograd.gradcheck(integrals.power_series, (a, b, x))
