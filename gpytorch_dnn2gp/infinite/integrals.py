"""Gaussian integrals of activations: what a pointwise nonlinearity does to a covariance.

    V(a, b, k)  = E[phi(u) phi(v)]                     the dual of phi
    V'(a, b, k) = E[phi'(u) phi'(v)] = dV/dk           its derivative dual (Price's theorem)
    (u, v) ~ N(0, [[a, k], [k, b]])

Closed forms for ReLU and its kin (Cho and Saul 2009), erf (Williams 1997), GELU, sin, cos, exp, polynomials, step; for
any other phi the Hermite expansion (:class:`Numerical`). A :class:`Dual` works in two steps: :meth:`Dual.points` takes
what depends on one input alone, so that a matrix of n x m pairs does that work n + m times; :meth:`Dual.value` and
:meth:`Dual.derivative` then work on pairs, by broadcasting.

All is differentiable in a, b and k, with finite gradients at k = +-sqrt(ab) and at a = 0: where V' itself has a
kink (ReLU, step), its derivative counts as zero.
"""

from __future__ import annotations

import abc
import functools
import math
import warnings
from collections.abc import Callable, Sequence

import torch
from linear_operator.utils.errors import NanError
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .. import tiling
from ..numerics import NumericalWarning

Points = tuple[Tensor, ...]  # what a Dual needs of each input: (..., n, *positions), further axes in front


class VarianceOverflow(NanError, ValueError):
    """Variances have left the range of the dtype. It is a ``NanError`` too, from which BoTorch's fits step back."""


TOO_LARGE = "inputs or weight variances are too large. Standardise inputs, or take smaller variances."


def safe_sqrt(a: Tensor) -> Tensor:
    """``sqrt(max(a, 0))``, whose derivative at zero counts as zero."""
    positive = a > 0
    return torch.where(positive, torch.where(positive, a, 1).sqrt(), 0)


def safe_inverse(a: Tensor) -> Tensor:
    """``1/a``; zero, with derivative zero, where ``a`` is zero."""
    zero = a == 0
    return torch.where(zero, 0, torch.where(zero, 1, a).reciprocal())


class Dual(abc.ABC):
    """V and V' of one activation.

    A subclass fills :meth:`value` and :meth:`derivative` in terms of what :meth:`points` returns for each side.
    """

    def points(self, a: Tensor, largest: float | None = None, derivative: bool = True) -> Points:
        """What one side needs, given its variances: tensors of the shape of ``a``, or with further axes in front.

        Args:
            a: variances.
            largest: of both sides, where that is not in ``a``: it decides how fine a numerical rule is.
            derivative: whether V' is wanted too, which takes more terms.
        """
        return (a,)

    @abc.abstractmethod
    def value(self, p: Points, q: Points, k: Tensor) -> Tensor:
        """V at covariance ``k``; ``p`` and ``q``, from :meth:`points`, broadcast against it."""

    @abc.abstractmethod
    def derivative(self, p: Points, q: Points, k: Tensor) -> Tensor:
        """V' at covariance ``k``."""

    def both(self, p: Points, q: Points, k: Tensor) -> tuple[Tensor, Tensor]:
        """V and V', where they share work."""
        return self.value(p, q, k), self.derivative(p, q, k)

    def variance(self, a: Tensor) -> Tensor:
        """E[phi(u)^2]."""
        p = self.points(a)
        return self.value(p, p, a)

    def variance_of_derivative(self, a: Tensor) -> Tensor:
        """E[phi'(u)^2]."""
        p = self.points(a)
        return self.derivative(p, p, a)

    def __call__(self, a: Tensor, b: Tensor, k: Tensor) -> Tensor:
        """V(a, b, k)."""
        largest = max((float(x.detach().max()) for x in (a, b) if x.numel()), default=0.0)
        return self.value(self.points(a, largest), self.points(b, largest), k)


# ---- ReLU and its kin: functions of the angle t, cos t = k/sqrt(ab)


def _correlation(k: Tensor, p: Points, q: Points) -> Tensor:
    return (k * p[1] * q[1]).clamp_(-1, 1)


def _sine(rho: Tensor) -> Tensor:
    return ((1 - rho) * (1 + rho)).sqrt_()


def _snapped(rho: Tensor) -> Tensor:
    """Correlations that differ from +-1 by rounding alone count as +-1: else t would be off by its square root."""
    return torch.where(rho.abs() > 1 - 4 * torch.finfo(rho.dtype).eps, rho.sign(), rho)


class _Angle(Function):
    """t = acos(k/sqrt(ab)); its derivatives, infinite at +-1, count as zero there."""

    @staticmethod
    def forward(ctx, k: Tensor, ra: Tensor, ia: Tensor, rb: Tensor, ib: Tensor) -> Tensor:
        ctx.save_for_backward(k, ra, ia, rb, ib)
        return _snapped(_correlation(k, (ra, ia), (rb, ib))).acos_()

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        k, ra, ia, rb, ib = ctx.saved_tensors
        rho = _snapped(_correlation(k, (ra, ia), (rb, ib)))
        slope = g * safe_inverse(_sine(rho))  # dt = (-d rho) / sin t, rho = k / (ra rb)
        along = slope * rho
        return -slope * ia * ib, (along * ia).sum_to_size(ra.shape), None, (along * ib).sum_to_size(rb.shape), None


class _RectifierValue(Function):
    """c sqrt(ab) sin t + V' k, with dV/dk = V' and dV/d sqrt(a) = c sqrt(b) sin t."""

    @staticmethod
    def forward(ctx, k: Tensor, ra: Tensor, ia: Tensor, rb: Tensor, ib: Tensor, c: float, half: float) -> Tensor:
        ctx.save_for_backward(k, ra, ia, rb, ib)
        ctx.constants = c, half
        rho = _correlation(k, (ra, ia), (rb, ib))
        return _rectifier(rho, ra, rb, c, half)[0]

    @staticmethod
    def backward(ctx, g: Tensor):
        k, ra, ia, rb, ib = ctx.saved_tensors
        c, half = ctx.constants
        slope = half - c * _Angle.apply(k, ra, ia, rb, ib)
        rho = k * ia * ib
        across = c * g * safe_sqrt((1 - rho) * (1 + rho))
        return g * slope, (across * rb).sum_to_size(ra.shape), None, (across * ra).sum_to_size(rb.shape), *[None] * 3


def _rectifier(rho: Tensor, ra: Tensor, rb: Tensor, c: float, half: float) -> tuple[Tensor, Tensor]:
    """V and V' = half - c t at correlations ``rho``, without gradient."""
    sine = _sine(rho)
    slope = torch.atan2(sine, rho).mul_(-c).add_(half)  # quicker than acos, and no less exact
    value = sine.mul_(c).addcmul_(rho, slope).mul_(ra).mul_(rb)
    return value, slope


class Rectifier(Dual):
    """``negative * min(x, 0) + positive * max(x, 0)``: ReLU, leaky ReLU, abs.

        V = (A - B)^2/2pi sqrt(ab - k^2) + V' k,   V' = (A^2 + B^2)/2 - (A - B)^2/2pi t,   cos t = k / sqrt(ab)

    Args:
        negative, positive: the slopes A and B.
    """

    def __init__(self, negative: float = 0.0, positive: float = 1.0) -> None:
        self.negative, self.positive = float(negative), float(positive)
        self._c = (self.negative - self.positive) ** 2 / (2 * math.pi)
        self._half = (self.negative**2 + self.positive**2) / 2

    def points(self, a: Tensor, largest: float | None = None, derivative: bool = True) -> Points:
        root = safe_sqrt(a)
        return root, safe_inverse(root).detach()

    def value(self, p: Points, q: Points, k: Tensor) -> Tensor:
        return _RectifierValue.apply(k, *p, *q, self._c, self._half)

    def derivative(self, p: Points, q: Points, k: Tensor) -> Tensor:
        return self._half - self._c * _Angle.apply(k, *p, *q)

    def both(self, p: Points, q: Points, k: Tensor) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() and any(x.requires_grad for x in (k, p[0], q[0])):
            return super().both(p, q, k)
        return _rectifier(_snapped(_correlation(k, p, q)), p[0], q[0], self._c, self._half)

    def variance(self, a: Tensor) -> Tensor:
        return self._half * a

    def variance_of_derivative(self, a: Tensor) -> Tensor:
        return torch.where(a > 0, self._half, self._half - self._c * math.pi / 2).to(a)

    def __repr__(self) -> str:
        return f"Rectifier(negative={self.negative:g}, positive={self.positive:g})"


class Step(Dual):
    """``low`` for x < 0 and ``high`` for x > 0: V only, since the derivative is no function.

    E[sign sign] = 1 - 2t/pi,   cos t = k / sqrt(ab)
    """

    def __init__(self, low: float = 0.0, high: float = 1.0) -> None:
        self.mean, self.jump = (low + high) / 2, (high - low) / 2

    points = Rectifier.points

    def value(self, p: Points, q: Points, k: Tensor) -> Tensor:
        return self.mean**2 + self.jump**2 * (1 - 2 / math.pi * _Angle.apply(k, *p, *q))

    def derivative(self, p: Points, q: Points, k: Tensor) -> Tensor:
        raise ValueError(
            "A step has no NTK: its derivative is zero or infinite. Take NNGPKernel, or a smooth activation."
        )

    def __repr__(self) -> str:
        return f"Step(low={self.mean - self.jump:g}, high={self.mean + self.jump:g})"


# ---- smooth closed forms


class Erf(Dual):
    """``scale * erf(rate * x) + shift``.

    V = scale^2 (2/pi) asin(2k / sqrt((1 + 2a)(1 + 2b))) + shift^2 at variances times rate^2 (Williams 1997).
    """

    def __init__(self, scale: float = 1.0, rate: float = 1.0, shift: float = 0.0) -> None:
        self.scale, self.rate, self.shift = float(scale), float(rate), float(shift)

    def points(self, a: Tensor, largest: float | None = None, derivative: bool = True) -> Points:
        return ((1 + 2 * self.rate**2 * a).rsqrt(),)

    def value(self, p: Points, q: Points, k: Tensor) -> Tensor:
        x = k * (2 * self.rate**2 * p[0]) * q[0]
        return (2 / math.pi * self.scale**2) * x.asin() + self.shift**2

    def derivative(self, p: Points, q: Points, k: Tensor) -> Tensor:
        x = k * (2 * self.rate**2 * p[0]) * q[0]
        slope = 4 / math.pi * (self.scale * self.rate) ** 2
        return slope * p[0] * q[0] * ((1 - x) * (1 + x)).rsqrt()

    def __repr__(self) -> str:
        return f"Erf(scale={self.scale:g}, rate={self.rate:g}, shift={self.shift:g})"


class GELU(Dual):
    """``x Phi(x)``, exact.

    With A = 1 + a, B = 1 + b, d^2 = AB - k^2, s = atan(k/d):
    V = [k^2 / (AB d) + ab d / (AB) + k s] / 2pi + k/4,  V' = 1/4 + [s + (1/d^2 + 1/A + 1/B) k/d] / 2pi.
    """

    def points(self, a: Tensor, largest: float | None = None, derivative: bool = True) -> Points:
        return 1 + a, 1 / (1 + a), a / (1 + a)

    def value(self, p: Points, q: Points, k: Tensor) -> Tensor:
        return self._value(p, q, k, *self._angle(p, q, k))

    def derivative(self, p: Points, q: Points, k: Tensor) -> Tensor:
        return self._derivative(p, q, k, *self._angle(p, q, k))

    def both(self, p: Points, q: Points, k: Tensor) -> tuple[Tensor, Tensor]:
        common = self._angle(p, q, k)
        return self._value(p, q, k, *common), self._derivative(p, q, k, *common)

    @staticmethod
    def _value(p: Points, q: Points, k: Tensor, square: Tensor, d2: Tensor, d: Tensor, angle: Tensor) -> Tensor:
        total = (square * p[1]).mul_(q[1]).div_(d).addcmul_(d * p[2], q[2])
        return total.addcmul_(k, angle + math.pi / 2).div_(2 * math.pi)

    @staticmethod
    def _derivative(p: Points, q: Points, k: Tensor, square: Tensor, d2: Tensor, d: Tensor, angle: Tensor) -> Tensor:
        return torch.addcmul(angle, (1 / d2).add_(p[1]).add_(q[1]), k / d).div_(2 * math.pi).add_(0.25)

    @staticmethod
    def _angle(p: Points, q: Points, k: Tensor) -> tuple[Tensor, ...]:
        square = k * k
        d2 = (p[0] * q[0]).sub_(square).clamp_(min=1)  # in truth at least 1 + a + b
        d = d2.sqrt()
        return square, d2, d, torch.atan2(k, d)

    def __repr__(self) -> str:
        return "GELU()"


class _Wave(Dual):
    """sin and cos: combinations of exp(k - (a + b)/2) and exp(-k - (a + b)/2), which never overflow."""

    sign: float

    def value(self, p: Points, q: Points, k: Tensor) -> Tensor:
        m = (p[0] + q[0]) / 2
        return ((k - m).exp() + self.sign * (-k - m).exp()) / 2

    def derivative(self, p: Points, q: Points, k: Tensor) -> Tensor:
        m = (p[0] + q[0]) / 2
        return ((k - m).exp() - self.sign * (-k - m).exp()) / 2


class Sin(_Wave):
    """``sin x``: V = exp(-(a + b)/2) sinh k, V' = exp(-(a + b)/2) cosh k."""

    sign = -1.0

    def __repr__(self) -> str:
        return "Sin()"


class Cos(_Wave):
    """``cos x``: V = exp(-(a + b)/2) cosh k, V' = exp(-(a + b)/2) sinh k."""

    sign = 1.0

    def __repr__(self) -> str:
        return "Cos()"


class Exp(Dual):
    """``exp x``: V = V' = exp((a + b)/2 + k)."""

    def value(self, p: Points, q: Points, k: Tensor) -> Tensor:
        return ((p[0] + q[0]) / 2 + k).exp()

    derivative = value

    def __repr__(self) -> str:
        return "Exp()"


class Polynomial(Dual):
    """``sum_i coefficients[i] x^i``: exactly: V = sum_j E[phi^(j)(u)] E[phi^(j)(v)] k^j / j!."""

    def __init__(self, coefficients: Sequence[float]) -> None:
        self.coefficients = tuple(float(c) for c in coefficients)
        if not self.coefficients:
            raise ValueError("coefficients is empty: give at least the constant term.")

    def points(self, a: Tensor, largest: float | None = None, derivative: bool = True) -> Points:
        degree = len(self.coefficients) - 1
        means = []  # of the j-th derivative: E[u^i] = a^(i/2) (i - 1)!! for even i
        for j in range(degree + 1):
            terms = [
                self.coefficients[i] * math.perm(i, j) * math.prod(range(i - j - 1, 0, -2)) * a ** ((i - j) // 2)
                for i in range(j, degree + 1, 2)
            ]
            means.append(sum(terms))
        return (torch.stack([m / math.sqrt(math.factorial(j)) for j, m in enumerate(means)]),)

    def value(self, p: Points, q: Points, k: Tensor) -> Tensor:
        return power_series(p[0], q[0], k)

    def derivative(self, p: Points, q: Points, k: Tensor) -> Tensor:
        if len(self.coefficients) == 1:
            return torch.zeros_like(k)
        order = torch.arange(1, len(self.coefficients), dtype=k.dtype, device=k.device).view(
            -1, *[1] * (p[0].dim() - 1)
        )
        return power_series(order * p[0][1:], q[0][1:], k)

    def __repr__(self) -> str:
        return f"Polynomial({self.coefficients})"


# ---- series


def power_series(A: Tensor, B: Tensor, x: Tensor) -> Tensor:
    """``sum_j A_j B_j x^j``; the coefficients ``(J, ...)`` broadcast against ``x``."""
    return _PowerSeries.apply(A, B, x)


class _PowerSeries(Function):
    """By Horner's rule, in place; the gradient recomputes the powers instead of keeping J matrices."""

    @staticmethod
    def forward(ctx, A: Tensor, B: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(A, B, x)
        total = (A[-1] * B[-1]).expand(torch.broadcast_shapes(A.shape[1:], B.shape[1:], x.shape)).clone()
        for a, b in zip(A[:-1].flip(0), B[:-1].flip(0)):
            total.mul_(x).addcmul_(a, b)
        return total

    @staticmethod
    def backward(ctx, g: Tensor):
        A, B, x = ctx.saved_tensors
        gx = ga = gb = None
        if ctx.needs_input_grad[2]:
            order = torch.arange(1, len(A), dtype=x.dtype, device=x.device).view(-1, *[1] * (A.dim() - 1))
            gx = (g * power_series(order * A[1:], B[1:], x)).sum_to_size(x.shape) if len(A) > 1 else torch.zeros_like(x)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            power, rows, columns = g, [], []  # g x^j
            for j, (a, b) in enumerate(zip(A, B)):
                power = power * x if j else power
                rows.append((power * b).sum_to_size(a.shape))
                columns.append((power * a).sum_to_size(b.shape))
            ga, gb = torch.stack(rows), torch.stack(columns)
        return ga, gb, gx


def slope_of(phi: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """phi'(x), entry by entry, itself differentiable."""
    return torch.func.jvp(phi, (x,), (torch.ones_like(x),))[1]


REACH = 12.5  # exp(-REACH^2 / 4) is below rounding: so far do the nodes go
MAX_NODES = 2**13
MAX_PRODUCT_NODES = 2**9


@functools.lru_cache(maxsize=8)
def _hermite_rule(num_nodes: int, num_terms: int) -> tuple[Tensor, Tensor, Tensor]:
    """Equally spaced nodes z (M,), their weights (sum 1), and weights times h_j(z), ``(M, J)``.

    h_j are the normalised Hermite polynomials, E[h_i h_j] = 1 for i = j, else 0.
    """
    z = torch.linspace(-REACH, REACH, num_nodes, dtype=torch.float64)
    root = torch.exp(-(z**2) / 4)
    root = root / root.square().sum().sqrt()  # of the weight: its product with h_j stays bounded
    rows = [root, z * root]
    for j in range(1, num_terms - 1):
        rows.append((z * rows[j] - math.sqrt(j) * rows[j - 1]) / math.sqrt(j + 1))
    return z, root.square(), torch.stack(rows[:num_terms], -1) * root[:, None]


class Numerical(Dual):
    """Any other activation, by its Hermite expansion: coefficients for each input, a power series for each pair.

        phi(sqrt(a) z) = sum_j alpha_j(a) h_j(z),   V = sum_j alpha_j(a) alpha_j(b) rho^j,   rho = k / sqrt(ab)

    Coefficients are sums over equally spaced nodes, which for analytic phi converge faster than any power. Both the
    number of nodes and of terms come from ``tolerance``. What the series leaves out is bounded, for all correlations at
    once, by what is missing of E[phi(u)^2] and E[phi'(u)^2]; those two are integrated exactly.

    Args:
        phi: maps a tensor entry by entry, and is differentiable almost everywhere.
        tolerance: of V and V' relative to E[phi(u)^2] and E[phi'(u)^2]; None aims at 1e-9 in float64, at 1e-6 in
            float32, and is content with a thousand times that.
        max_terms: where the series is cut at last; if that misses the tolerance, a :class:`NumericalWarning` tells the
            bound. Kinked activations and large variances come to that; the error is at correlations near one.
        name: for ``repr``.
    """

    def __init__(
        self,
        phi: Callable[[Tensor], Tensor],
        tolerance: float | None = None,
        max_terms: int = 512,
        name: str | None = None,
    ) -> None:
        self.phi, self.tolerance, self.max_terms = phi, tolerance, max_terms
        self.name = name or getattr(phi, "__name__", repr(phi))
        self._known: dict[tuple, tuple[int, int, float]] = {}
        self._stride = 2 if self._is_odd() else 1  # every other term is missing

    def points(self, a: Tensor, largest: float | None = None, derivative: bool = True) -> Points:
        """E[phi], 1/sqrt(a), and alpha_j(a)/sqrt(a) for j >= 1, ``(J, *a.shape)``; at a = 0: phi'(0), 0, ..."""
        num_nodes, num_terms = self.resolution(a, largest, derivative)
        z, _, basis = _on(_hermite_rule(num_nodes, num_terms + 1), a)
        root = safe_sqrt(a)
        pieces = [self._coefficients(piece, z, basis) for piece in self._pieces(root.flatten(), num_nodes)]
        coefficients = torch.cat(pieces, -1).unflatten(-1, a.shape)
        mean = self._at_zero(a)[0] + root * coefficients[0]
        return mean, safe_inverse(root), coefficients[1 :: self._stride]

    def value(self, p: Points, q: Points, k: Tensor) -> Tensor:
        return p[0] * q[0] + k * self._series(p[2], q[2], k * p[1] * q[1])

    def derivative(self, p: Points, q: Points, k: Tensor) -> Tensor:
        order = 1 + self._stride * torch.arange(len(p[2]), dtype=k.dtype, device=k.device)
        return self._series(order.view(-1, *[1] * (p[2].dim() - 1)) * p[2], q[2], k * p[1] * q[1])

    def variance(self, a: Tensor) -> Tensor:
        return self._square_mean(self.phi, a, False)

    def variance_of_derivative(self, a: Tensor) -> Tensor:
        return self._square_mean(lambda x: slope_of(self.phi, x), a, True)

    def resolution(
        self, a: Tensor, largest: float | None = None, derivative: bool = True, warn: bool = True
    ) -> tuple[int, int]:
        """Number of nodes and of terms for variances up to the largest of ``a``, or up to ``largest``."""
        if largest is None:
            largest = float(a.detach().max()) if a.numel() else 0.0
        if not math.isfinite(largest):
            raise VarianceOverflow(f"A variance before {self.name} is {largest}: {TOO_LARGE}")
        tolerance = self.tolerance or (1e-9 if a.dtype == torch.float64 else 1e-6)
        # a quarter of an octave: nearby variances share a rule, and so does a matrix taken in several calls
        level = math.ceil(4 * math.log2(max(largest, 2.0**-20)) + 0.3)
        key = level, tolerance, derivative
        if key not in self._known:
            self._known[key] = self._find_resolution(2.0 ** (level / 4), tolerance, derivative)
        num_nodes, num_terms, missing = self._known[key]
        if warn and missing > (self.tolerance or 1e3 * tolerance):
            warnings.warn(
                f"The series of {self.name} is cut after {num_terms} terms: at variance {largest:.3g} its duals may be "
                f"off by {missing:.0e} relative, near correlation one. Smaller variances or smoother activations help.",
                NumericalWarning,
                stacklevel=3,
            )
        return num_nodes, num_terms

    @torch.no_grad()
    def _is_odd(self) -> bool:
        """Whether phi - phi(0) is odd. The first call of phi, so what is wrong with it is told here."""
        x = torch.linspace(0, REACH, 101, dtype=torch.float64)
        values = self.phi(x)
        if not isinstance(values, Tensor) or values.shape != x.shape or not values.isfinite().all():
            raise ValueError(
                f"{self.name} is no activation: at 101 numbers from 0 to {REACH} it must return 101 finite "
                "numbers, one for each."
            )
        middle = 2 * values[0]
        return bool((values + self.phi(-x) - middle).abs().max() <= 1e-14 * (values - values[0]).abs().max())

    @torch.no_grad()
    def _find_resolution(self, variance: float, tolerance: float, derivative: bool) -> tuple[int, int, float]:
        root = torch.tensor([math.sqrt(variance)], dtype=torch.float64)
        order = torch.arange(1, self.max_terms + 1, dtype=torch.float64)
        previous, num_nodes = None, 256
        while True:
            z, weights, basis = _hermite_rule(num_nodes + 1, self.max_terms + 1)
            energies = self._coefficients(root, z, basis).flatten()[1:].square()
            if derivative:
                energies = order * energies  # their sum is E[phi'^2], else Var[phi] / variance
                total = slope_of(self.phi, root * z).square() @ weights
            else:
                values = self.phi(root * z)
                total = (values - values @ weights).square() @ weights / variance
            total = max(float(total), 1e-300)
            change = math.inf if previous is None else float((energies - previous).abs().sum()) / total
            if change <= tolerance / 10 or 2 * num_nodes >= MAX_NODES:
                break
            previous, num_nodes = energies, 2 * num_nodes
        tails = (total - energies.cumsum(0)).abs() / total
        enough = (tails <= tolerance).nonzero()
        count = int(enough[0]) + 1 if len(enough) else self.max_terms
        missing = max(float(tails[count - 1]), change if change > tolerance else 0.0)
        return num_nodes + 1, count, missing

    def _coefficients(self, root: Tensor, z: Tensor, basis: Tensor) -> Tensor:
        """Sums of (phi(s z) - phi(0))/s h_j(z), ``(J, m)``, for ``m`` roots s of variances."""
        at_zero, slope_at_zero = self._at_zero(root)
        positive = root > 1e-10
        s = torch.where(positive, root, 1)[:, None]
        slope = torch.where(positive[:, None], (self.phi(s * z) - at_zero) / s, slope_at_zero * z)
        return basis.mT @ slope.mT

    def _at_zero(self, like: Tensor) -> tuple[Tensor, Tensor]:
        zero = like.new_zeros(())
        return self.phi(zero).detach(), slope_of(self.phi, zero).detach()

    def _square_mean(self, function: Callable[[Tensor], Tensor], a: Tensor, derivative: bool) -> Tensor:
        num_nodes = self.resolution(a, None, derivative, warn=False)[0]  # the series is not used
        z, weights, _ = _on(_hermite_rule(num_nodes, 2), a)
        pieces = [function(s[:, None] * z).square() @ weights for s in self._pieces(safe_sqrt(a).flatten(), num_nodes)]
        return torch.cat(pieces).view(a.shape)

    @staticmethod
    def _pieces(root: Tensor, num_nodes: int) -> tuple[Tensor, ...]:
        return root.split(tiling.chunk_length(4 * num_nodes, root.dtype, root.device))

    def _series(self, A: Tensor, B: Tensor, rho: Tensor) -> Tensor:
        return power_series(A, B, rho * rho if self._stride == 2 else rho)

    def __repr__(self) -> str:
        return f"Numerical({self.name})"


class ProductRule(Dual):
    """Any activation by a product rule on equally spaced nodes, for every pair anew: slow, independent of the above.

        u = sqrt(a) z1,   v = sqrt(b) (rho z1 + sqrt(1 - rho^2) z2)

    Its error does not grow near correlation one. First derivatives in a, b and k are right; there are no second ones.

    Args:
        phi: maps a tensor entry by entry, and is differentiable almost everywhere.
        tolerance: of V and V' relative to E[phi(u)^2] and E[phi'(u)^2], from which the step between nodes follows; by
            default 1e-9 in float64, 1e-6 in float32. A kinked phi may not reach it with ``MAX_PRODUCT_NODES`` along
            each axis; a :class:`NumericalWarning` then tells the error.
        step: between nodes, instead; for tanh the error is about exp(-pi^2 / (sqrt(variance) step)).
        name: for ``repr``.
    """

    def __init__(
        self,
        phi: Callable[[Tensor], Tensor],
        tolerance: float | None = None,
        step: float | None = None,
        name: str | None = None,
    ) -> None:
        if tolerance is not None and step is not None:
            raise ValueError("A product rule takes its step from the tolerance: give one of them.")
        if (tolerance is not None and not tolerance > 0) or (step is not None and not step > 0):
            raise ValueError(f"tolerance and step must be positive; got {tolerance if step is None else step}.")
        self.phi, self.tolerance, self.step = phi, tolerance, None if step is None else float(step)
        self.name = name or getattr(phi, "__name__", repr(phi))
        self._known: dict[tuple, float] = {}

    points = Rectifier.points

    def value(self, p: Points, q: Points, k: Tensor) -> Tensor:
        step = self.step_for(p, q)
        with torch.no_grad():
            value = self._mean(self.phi, self.phi, p, q, k, step)
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in (k, p[0], q[0]))):
            return value
        with torch.no_grad():
            slope = self._mean(self._slope, self._slope, p, q, k, step)
            left = (self._mean(self._times_slope, self.phi, p, q, k, step) - k * slope) * p[1]  # dV / d sqrt(a)
            right = (self._mean(self.phi, self._times_slope, p, q, k, step) - k * slope) * q[1]
        steps = zip((k, p[0], q[0]), (slope, left, right))
        return value + sum((x - x.detach()) * d for x, d in steps)

    def derivative(self, p: Points, q: Points, k: Tensor) -> Tensor:
        return ProductRule(self._slope, step=self.step_for(p, q), name=self.name).value(p, q, k)

    def step_for(self, p: Points, q: Points) -> float:
        """Step between nodes for these points: where integrals at the largest variance stay as they are."""
        if self.step is not None:
            return self.step
        largest = max((float(x[0].detach().max()) for x in (p, q) if x[0].numel()), default=0.0)
        if not math.isfinite(largest):
            raise VarianceOverflow(f"A variance before {self.name} is {largest}: {TOO_LARGE}")
        tolerance = self.tolerance or (1e-9 if p[0].dtype == torch.float64 else 1e-6)
        key = math.ceil(4 * math.log2(max(largest, 2.0**-10))), tolerance  # a quarter of an octave
        if key not in self._known:
            self._known[key] = self._find_step(2.0 ** (key[0] / 4), tolerance)
        return self._known[key]

    @torch.no_grad()
    def _find_step(self, root: float, tolerance: float) -> float:
        step, previous = 1.0, None
        while True:
            z, weights = _normal_rule(step, torch.empty(0, dtype=torch.float64))
            values = torch.stack([f(root * z) for f in (self.phi, self._slope)])
            beside = torch.stack([f(root * (0.8 * z + 0.6)) for f in (self.phi, self._slope)])
            squares, products = values.square() @ weights, (values * beside) @ weights
            change = math.inf
            if previous is not None:
                moved = torch.maximum((squares - previous[0]).abs(), (products - previous[1]).abs())
                change = float((moved / squares.clamp(min=1e-300)).max())
            if change <= tolerance:
                return step
            if 2 * len(z) > MAX_PRODUCT_NODES:
                warnings.warn(
                    f"The product rule of {self.name} ends at {len(z)} nodes along each axis: at variance "
                    f"{root**2:.3g} its duals may be off by {change:.0e} relative. Smoother activations help.",
                    NumericalWarning,
                    stacklevel=4,
                )
                return step
            previous, step = (squares, products), step / math.sqrt(2)

    def _slope(self, x: Tensor) -> Tensor:
        return slope_of(self.phi, x)

    def _times_slope(self, x: Tensor) -> Tensor:
        return x * slope_of(self.phi, x)

    @staticmethod
    def _mean(f: Callable, g: Callable, p: Points, q: Points, k: Tensor, step: float) -> Tensor:
        """E[f(u) g(v)]."""
        z, weights = _normal_rule(step, k)
        shape = torch.broadcast_shapes(p[0].shape, q[0].shape, k.shape)
        ra, rb, rho = (x.expand(shape).flatten() for x in (p[0], q[0], _correlation(k, p, q)))
        means = []
        for part in tiling.chunks(rho.numel(), tiling.chunk_length(4 * len(z), k.dtype, k.device)):
            r, x, y = rho[part], ra[part], rb[part]
            across = _sine(r)[:, None] * z
            inner = (g(y[:, None] * (r[:, None] * node + across)) @ weights for node in z)
            means.append(sum(w * f(x * node) * mean for w, node, mean in zip(weights, z, inner)))
        return torch.cat(means).view(shape)

    def __repr__(self) -> str:
        how = f"step={self.step:g}" if self.step is not None else f"tolerance={self.tolerance}"
        return f"ProductRule({self.name}, {how})"


def _normal_rule(step: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes of this distance up to 8.5 on either side, and weights of a standard normal, whose sum is 1."""
    half = math.ceil(8.5 / step)
    z = step * torch.arange(-half, half + 1, dtype=like.dtype, device=like.device)
    return z, torch.softmax(-z.square() / 2, 0)


# ---- by name

_CLOSED = {
    "relu": Rectifier(),
    "abs": Rectifier(-1.0, 1.0),
    "erf": Erf(),
    "gelu": GELU(),
    "sin": Sin(),
    "cos": Cos(),
    "exp": Exp(),
    "identity": Polynomial((0.0, 1.0)),
    "square": Polynomial((0.0, 0.0, 1.0)),
    "step": Step(),
    "sign": Step(-1.0, 1.0),
}
_NUMERICAL = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": nn.functional.silu,
    "softplus": nn.functional.softplus,
    "elu": nn.functional.elu,
    "selu": nn.functional.selu,
    "mish": nn.functional.mish,
    "softsign": nn.functional.softsign,
}
ACTIVATIONS = (*_CLOSED, "leaky_relu", *_NUMERICAL)


@functools.cache
def _numerical(name: str) -> Numerical:
    return Numerical(_NUMERICAL[name], name=name)


def dual(activation: str | Dual | Callable[[Tensor], Tensor]) -> Dual:
    """The integrals of an activation.

    Args:
        activation: one of ``ACTIVATIONS``, such as "relu" or "tanh"; a :class:`Dual`; or a function that maps a tensor
            entry by entry.

    Raises:
        ValueError: for a name that is not known.
        TypeError: for anything else.
    """
    if isinstance(activation, Dual):
        return activation
    if isinstance(activation, str):
        name = activation.lower()
        if name == "leaky_relu":
            return Rectifier(0.01)
        if name in _CLOSED:
            return _CLOSED[name]
        if name in _NUMERICAL:
            return _numerical(name)
        raise ValueError(
            f"There is no activation {activation!r}; known are {', '.join(ACTIVATIONS)}. Or pass a function."
        )
    if callable(activation):
        return Numerical(activation)
    raise TypeError(f"An activation is a name, a Dual or a function of a tensor; got {type(activation).__name__}.")


def _on(tensors: tuple[Tensor, ...], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(like) for t in tensors)
