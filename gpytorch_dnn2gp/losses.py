"""Losses: what the labels say about the outputs of a network.

A loss is the negative log-likelihood ``l(y, f)`` of a label given the outputs of the network, all normalising constants
in. A Gaussian approximation of the network's posterior reads three things of it:

    paper                            here                       shape
    f_w(x_i)                         f                          (..., n, K)
    r_i = dl/df                      loss.residual(f, y)        (..., n, K)
    Lambda_i = d2l/df2, or Fisher    loss.noise_precision(f)    (..., n, K, K)
    R_i,  Lambda_i = R_i R_i^T       loss.apply_root(f, v), loss.apply_root_t(f, v)    R v, R^T v

``n`` examples, ``K`` outputs. ``Lambda`` is positive semidefinite and is never inverted: a softmax has none to invert.
Products with the root cost O(K) per example for every loss below but the user's own.

    loss                       f                              r                              Lambda
    Gaussian                   K reals                        (f - y) / sigma^2              I / sigma^2
    Bernoulli                  K logits                       s(f) - y                       diag s(1 - s)
    Categorical                K logits                       p - e_y                        diag(p) - p p^T
    Poisson                    K log rates                    e^f - y                        diag e^f
    HeteroscedasticGaussian    (m, log sigma)                 ((m-y)/sigma^2,                Fisher: diag(1/sigma^2, 2)
                                                               1 - (m-y)^2/sigma^2)
      natural parameters       (m/sigma^2, -1/(2 sigma^2))    (m - y, m^2 + sigma^2 - y^2)   [[sigma^2, 2 m sigma^2],
                                                               [2 m sigma^2, 4 m^2 sigma^2 + 2 sigma^4]]
    from_callable              K reals                        autodiff                       autodiff, or a given Fisher

A loss is immutable and knows no data, but for the noise level of a Gaussian. Everything is differentiable in ``f`` and
in the noise. From here go to predictive.py (labels at new inputs) or dual.py (targets and noise of the regression).
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.func import grad, jacrev, vmap
from torch.nn.functional import log_softmax, logsigmoid

from .numerics import first_index, positive_root, require_positive

__all__ = ["Bernoulli", "Categorical", "Gaussian", "HeteroscedasticGaussian", "Loss", "Poisson", "from_callable"]


class Loss(ABC):
    """Negative log-likelihood of a label given the outputs of a network.

    Attributes:
        invertible: whether ``Lambda`` is invertible at every finite ``f``.
        precision_needs_labels: whether ``Lambda`` depends on the label, so that ``y`` must be given.
    """

    invertible = True
    precision_needs_labels = False
    _noise: Tensor | None = None

    # Labels

    def check_labels(
        self,
        y: Tensor,
        num_outputs: int,
        num_examples: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Labels in canonical form, or an error that says which one is wrong.

        Nothing is repaired: integers and booleans become floats of the same value, ``(n,)`` becomes ``(n, 1)`` where
        there is one column, and that is all.

        Args:
            y: labels, examples first.
            num_outputs: K, the number of outputs of the network.
            num_examples: n, if it is known from the inputs.
            dtype: of the outputs of the network; ``None`` takes that of ``y``, or the default for integers.
            device: where the outputs of the network are; ``None`` asks nothing.

        Returns:
            ``(n, D)`` floats, or ``(n,)`` class indices for hard labels of a Categorical.
        """
        if not isinstance(y, Tensor):
            raise TypeError(f"labels must be a torch.Tensor, got {type(y).__name__}: use torch.as_tensor(y).")
        if y.is_complex():
            raise TypeError(f"labels must be real, got {y.dtype}.")
        if y.ndim == 0:
            raise ValueError("labels need a first dimension of examples, got a scalar.")
        if num_examples is not None and len(y) != num_examples:
            raise ValueError(f"{len(y)} labels for {num_examples} inputs: one label (row) for each input is needed.")
        if device is not None and y.device != torch.device(device):
            raise ValueError(f"labels are on {y.device}, the network on {device}: move them, y.to({str(device)!r}).")
        return self._check_labels(y, num_outputs, dtype)

    @abstractmethod
    def _check_labels(self, y: Tensor, num_outputs: int, dtype: torch.dtype | None) -> Tensor:
        """The part of `check_labels` that depends on the loss."""

    # The loss and its derivatives

    @abstractmethod
    def negative_log_likelihood(self, f: Tensor, y: Tensor) -> Tensor:
        """``-log p(y|f)`` for each example, ``(..., n)``, all normalising constants in."""

    @abstractmethod
    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        """``r``, gradient of the negative log-likelihood in the outputs, ``(..., n, K)``."""

    @abstractmethod
    def noise_precision(self, f: Tensor, y: Tensor | None = None) -> Tensor:
        """``Lambda``, Hessian of the negative log-likelihood in the outputs, or its Fisher, ``(..., n, K, K)``.

        ``y`` is read where `precision_needs_labels` alone.
        """

    @abstractmethod
    def apply_root(self, f: Tensor, v: Tensor, y: Tensor | None = None) -> Tensor:
        """``R v`` with ``Lambda = R R^T``; leading dimensions of ``v (..., n, K)`` broadcast against those of ``f``."""

    @abstractmethod
    def apply_root_t(self, f: Tensor, v: Tensor, y: Tensor | None = None) -> Tensor:
        """``R^T v`` with ``Lambda = R R^T``; leading dimensions broadcast as in `apply_root`."""

    def apply_precision(self, f: Tensor, v: Tensor, y: Tensor | None = None) -> Tensor:
        """``Lambda v``; leading dimensions broadcast as in `apply_root`."""
        return self.apply_root(f, self.apply_root_t(f, v, y), y)

    # The label given the outputs

    @abstractmethod
    def conditional(self, f: Tensor) -> Distribution:
        """``p(y|f)``: batch ``(..., n)``, event ``(D,)``, but ``()`` for a Categorical."""

    @abstractmethod
    def conditional_mean(self, f: Tensor) -> Tensor:
        """``E[y|f]``, ``(..., n, D)``; a class label counts as its indicator vector."""

    @abstractmethod
    def conditional_variance(self, f: Tensor) -> Tensor:
        """``Var[y|f]`` of each entry of ``y``, ``(..., n, D)``."""

    @abstractmethod
    def conditional_covariance(self, f: Tensor) -> Tensor:
        """``Cov[y|f]``, ``(..., n, D, D)``."""

    # The noise of a Gaussian

    @property
    def has_noise(self) -> bool:
        """Whether there is a noise level to set and to learn."""
        return self._noise is not None

    @property
    def noise(self) -> Tensor | None:
        """``sigma^2``: ``()``, per output ``(K,)``, or per example ``(n, 1)`` or ``(n, K)``. ``None`` without one."""
        return self._noise

    def with_noise(self, noise: Tensor | float) -> Loss:
        """The same loss with another noise variance, which keeps its autograd graph."""
        if self._noise is None:
            raise TypeError(f"{self!r} has no noise level to set; Gaussian has one.")
        new = copy.copy(self)
        new._noise = _check_noise(noise, "noise")
        return new

    def subset(self, index: Tensor | slice) -> Loss:
        """The loss of some of the examples: that noise, where each example has its own; else the loss itself."""
        if self._noise is None or self._noise.ndim < 2:
            return self
        return self.with_noise(self._noise[index])

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class _IndependentOutputs(Loss):
    """A loss that is a sum over outputs: ``Lambda`` is diagonal."""

    @abstractmethod
    def _root(self, f: Tensor) -> Tensor:
        """Square root of the diagonal of ``Lambda``, smooth in ``f`` where ``Lambda`` underflows."""

    def noise_precision(self, f: Tensor, y: Tensor | None = None) -> Tensor:
        return torch.diag_embed(self._root(f).square())

    def apply_root(self, f: Tensor, v: Tensor, y: Tensor | None = None) -> Tensor:
        return self._root(f) * v

    def apply_root_t(self, f: Tensor, v: Tensor, y: Tensor | None = None) -> Tensor:
        return self._root(f) * v

    def conditional_covariance(self, f: Tensor) -> Tensor:
        return torch.diag_embed(self.conditional_variance(f))


class Gaussian(_IndependentOutputs):
    """``y ~ N(f, sigma^2)``.

    Args:
        sigma: standard deviation of the noise: a number, one per output ``(K,)``, or one per example, ``(n, 1)`` or
            ``(n, K)``. Noise per example is known for the examples of that loss alone.
    """

    def __init__(self, sigma: float | Tensor = 1.0):
        self._noise = _check_noise(sigma, "sigma").square()
        require_positive(self._noise, "sigma^2")

    def _check_labels(self, y, num_outputs, dtype):
        y = _real_labels(y, num_outputs, dtype)
        self._variance(y)
        return y

    def _variance(self, f: Tensor) -> Tensor:
        """``sigma^2``, in the type of ``f`` and broadcasting against it."""
        noise, (n, K) = self._noise, f.shape[-2:]
        if noise.ndim > 0 and noise.shape[-1] not in (1, K):
            raise ValueError(
                f"noise of shape {tuple(noise.shape)} for {K} outputs: give a number, one per output ({K},), "
                f"or one per example, (n, 1) or (n, {K})."
            )
        if noise.ndim == 2 and len(noise) != n:
            raise ValueError(
                f"the noise is given per example, for {len(noise)} examples, and there are {n} here. It is known for "
                "the training examples alone: give that of the new ones, loss.with_noise(variance), shape (n, 1) or "
                f"(n, {K})."
            )
        return noise.to(f).expand(n, K)

    def negative_log_likelihood(self, f, y):
        """``(f - y)^2 / (2 sigma^2) + log(2 pi sigma^2) / 2``, summed over outputs."""
        y, noise = _align(y, f, f.shape[-1]), self._variance(f)
        return 0.5 * ((f - y).square() / noise + torch.log(2 * math.pi * noise)).sum(-1)

    def residual(self, f, y):
        """``(f - y) / sigma^2``."""
        return (f - _align(y, f, f.shape[-1])) / self._variance(f)

    def _root(self, f):
        return self._variance(f).rsqrt().expand(f.shape)

    def conditional(self, f):
        """``N(f, sigma^2)``."""
        return _independent(torch.distributions.Normal(f, self._variance(f).sqrt()))

    def conditional_mean(self, f):
        """``f``."""
        return f

    def conditional_variance(self, f):
        """``sigma^2``."""
        return self._variance(f).expand(f.shape)

    def __repr__(self):
        sigma = self._noise.detach().sqrt()
        if sigma.ndim == 0:
            return f"Gaussian(sigma={sigma.item():.6g})"
        if sigma.ndim == 1 and len(sigma) <= 6:
            return f"Gaussian(sigma=[{', '.join(f'{s:.6g}' for s in sigma.tolist())}])"
        each = "output" if sigma.ndim == 1 else "example"
        return f"Gaussian(sigma=<one per {each}, {tuple(sigma.shape)}>)"


class Bernoulli(_IndependentOutputs):
    """``y ~ Bernoulli(s(f))``, independent logits; ``s(f) = 1 / (1 + e^-f)``.

    Labels are 0, 1, booleans, or probabilities between, whose loss is the cross-entropy.
    """

    def _check_labels(self, y, num_outputs, dtype):
        y = _real_labels(y, num_outputs, dtype)
        _refuse((y < 0) | (y > 1), y, "a Bernoulli label is 0, 1, or a probability between")
        return y

    def negative_log_likelihood(self, f, y):
        """``-y log s(f) - (1 - y) log s(-f)``, summed over outputs."""
        y = _align(y, f, f.shape[-1])
        return -(y * logsigmoid(f) + (1 - y) * logsigmoid(-f)).sum(-1)

    def residual(self, f, y):
        """``s(f) - y``, without cancellation in either tail."""
        y = _align(y, f, f.shape[-1])
        return (1 - y) * torch.sigmoid(f) - y * torch.sigmoid(-f)

    def _root(self, f):
        # sqrt(s(f) s(-f))
        return torch.exp(0.5 * (logsigmoid(f) + logsigmoid(-f)))

    def conditional(self, f):
        """``Bernoulli(s(f))``."""
        return _independent(torch.distributions.Bernoulli(logits=f))

    def conditional_mean(self, f):
        """``s(f)``."""
        return torch.sigmoid(f)

    def conditional_variance(self, f):
        """``s(f) s(-f)``."""
        return self._root(f).square()


class Poisson(_IndependentOutputs):
    """``y ~ Poisson(e^f)``, independent log rates; labels are counts."""

    def _check_labels(self, y, num_outputs, dtype):
        y = _real_labels(y, num_outputs, dtype)
        _refuse((y < 0) | (y != y.round()), y, "a Poisson label is a count, 0, 1, 2, ...")
        return y

    def negative_log_likelihood(self, f, y):
        """``e^f - y f + log y!``, summed over outputs."""
        y = _align(y, f, f.shape[-1])
        return (torch.exp(f) - y * f + torch.lgamma(y + 1)).sum(-1)

    def residual(self, f, y):
        """``e^f - y``."""
        return torch.exp(f) - _align(y, f, f.shape[-1])

    def _root(self, f):
        return torch.exp(0.5 * f)

    def conditional(self, f):
        """``Poisson(e^f)``."""
        return _independent(torch.distributions.Poisson(torch.exp(f)))

    def conditional_mean(self, f):
        """``e^f``."""
        return torch.exp(f)

    def conditional_variance(self, f):
        """``e^f``."""
        return torch.exp(f)


class Categorical(Loss):
    """``y ~ Categorical(p)``, ``p = softmax(f)``, K >= 2 logits.

    Labels are class indices ``(n,)``, or rows of probabilities ``(n, K)`` (soft labels), whose loss is the
    cross-entropy. ``Lambda`` has the null vector 1 and vanishes at saturated points. Its root is
    ``R = diag(sqrt p) - p sqrt(p)^T``, finite and smooth wherever ``f`` is.
    """

    invertible = False

    def _check_labels(self, y, num_outputs, dtype):
        if num_outputs < 2:
            raise ValueError("Categorical needs at least 2 logits, the network has 1: use Bernoulli() for it.")
        if y.ndim == 1:
            if y.is_floating_point() or y.dtype == torch.bool:
                raise TypeError(
                    f"class labels must be integers, got {y.dtype} of shape {tuple(y.shape)}: pass y.long(), or rows "
                    f"of probabilities (n, {num_outputs})."
                )
            _refuse((y < 0) | (y >= num_outputs), y, f"a class label is one of 0, ..., {num_outputs - 1}")
            return y.long()
        if y.ndim != 2 or y.shape[1] != num_outputs:
            raise ValueError(
                f"labels have shape {tuple(y.shape)}; needed are class indices (n,) or rows of probabilities "
                f"(n, {num_outputs})."
            )
        y = _real_labels(y, num_outputs, dtype)
        _refuse(y < 0, y, "a soft label is a row of probabilities")
        total = y.sum(-1)
        off = (total - 1).abs() > 1e-6 + num_outputs * torch.finfo(y.dtype).eps
        _refuse(off, total, "a soft label is a row of probabilities, which sum to one; this is the sum")
        return y

    def _target(self, f: Tensor, y: Tensor) -> Tensor:
        """Label probabilities that broadcast against ``f``: indicator vectors, or soft labels as they are."""
        if y.is_floating_point():
            return _align(y, f, f.shape[-1])
        index = _align_index(y, f)
        return torch.zeros_like(f).scatter(-1, index, 1.0)

    def negative_log_likelihood(self, f, y):
        """``-log p_y``, or the cross-entropy ``-sum_k y_k log p_k`` of soft labels."""
        log_p = log_softmax(f, -1)
        if y.is_floating_point():
            return -(_align(y, f, f.shape[-1]) * log_p).sum(-1)
        return -log_p.gather(-1, _align_index(y, f)).squeeze(-1)

    def residual(self, f, y):
        """``p - e_y``."""
        return torch.softmax(f, -1) - self._target(f, y)

    def noise_precision(self, f, y=None):
        """``diag(p) - p p^T``."""
        p = torch.softmax(f, -1)
        # A graph Laplacian: -p_j p_k off the diagonal, and on it what makes rows sum to zero. Saturated points keep
        # their relative accuracy, which p - p^2 loses.
        weights = p.unsqueeze(-1) * p.unsqueeze(-2)
        weights = weights * (1 - torch.eye(f.shape[-1], dtype=f.dtype, device=f.device))
        return torch.diag_embed(weights.sum(-1)) - weights

    def apply_root(self, f, v, y=None):
        """``R v = sqrt(p) o v - p (sqrt(p)^T v)``."""
        log_p = log_softmax(f, -1)
        root = torch.exp(0.5 * log_p)  # sqrt p, with a gradient where p underflows
        return root * v - log_p.exp() * (root * v).sum(-1, keepdim=True)

    def apply_root_t(self, f, v, y=None):
        """``R^T v = sqrt(p) o (v - p^T v)``."""
        log_p = log_softmax(f, -1)
        return torch.exp(0.5 * log_p) * (v - (log_p.exp() * v).sum(-1, keepdim=True))

    def apply_precision(self, f, v, y=None):
        """``p * v - p (p . v)``: half the passes over ``v`` that the two roots take."""
        p = torch.softmax(f, -1)
        return p * (v - (p * v).sum(-1, keepdim=True))

    def conditional(self, f):
        """``Categorical(p)``."""
        return torch.distributions.Categorical(logits=f)

    def conditional_mean(self, f):
        """``p``."""
        return torch.softmax(f, -1)

    def conditional_variance(self, f):
        """``p (1 - p)``."""
        p = torch.softmax(f, -1)
        return p * (1 - p)

    def conditional_covariance(self, f):
        """``diag(p) - p p^T``."""
        return self.noise_precision(f)


class HeteroscedasticGaussian(Loss):
    """``y ~ N(m, sigma^2)``, both from the network: the first D outputs give the means, the last D the noise.

    ``Lambda`` is the Fisher information; the Hessian is indefinite at every ``y != m`` (``log_sigma``).

    Args:
        parametrization: ``"log_sigma"``: outputs ``(m, log sigma)``. ``"natural"``: outputs are the natural parameters
            ``eta_1 = m / sigma^2`` and ``eta_2 = -1 / (2 sigma^2)``, or what the link makes of them.
        link: natural parametrization alone. ``None``: the second output is ``eta_2`` itself, and must be negative.
            ``"exp"``, ``"softplus"``, or a positive elementwise function of a tensor: ``eta_2 = -link(f_2) / 2``, that
            is, the link gives the precision ``1 / sigma^2``.
    """

    def __init__(self, parametrization: str = "log_sigma", link: str | Callable[[Tensor], Tensor] | None = None):
        if parametrization not in ("log_sigma", "natural"):
            raise ValueError(f'parametrization must be "log_sigma" or "natural", got {parametrization!r}.')
        if parametrization == "log_sigma" and link is not None:
            raise ValueError('a link belongs to the natural parametrization: parametrization="natural".')
        if not (link is None or callable(link) or link in ("exp", "softplus")):
            raise ValueError(f'link must be None, "exp", "softplus" or a function of a tensor, got {link!r}.')
        self.parametrization = parametrization
        self.link = link
        self.invertible = not callable(link)

    def _check_labels(self, y, num_outputs, dtype):
        if num_outputs % 2:
            raise ValueError(
                f"HeteroscedasticGaussian needs an even number of outputs, D for the means and D for the noise; the "
                f"network has {num_outputs}."
            )
        return _real_labels(y, num_outputs // 2, dtype)

    # log sigma:  f = (m, s)                 e^s = sigma
    # natural:    f = (eta_1, f_2)           -2 eta_2 = tau = 1 / sigma^2,  m = eta_1 / tau

    def _tau(self, f_2: Tensor) -> tuple[Tensor, Tensor]:
        """Precision ``tau`` of the natural parametrization, and ``d eta_2 / d f_2``."""
        if self.link is None:
            tau, slope = -2 * f_2, torch.ones_like(f_2)
        elif self.link == "exp":
            tau = torch.exp(f_2)
            slope = -0.5 * tau
        elif self.link == "softplus":
            tau, slope = -logsigmoid(-f_2), -0.5 * torch.sigmoid(f_2)
        else:
            tau, slope = self.link(f_2), -0.5 * grad(lambda s: self.link(s).sum())(f_2)
        bad = ~((tau > 0) & torch.isfinite(tau))
        if bad.any():
            index = tuple(bad.nonzero()[0].tolist())
            cure = ' A link keeps it so: link="exp" or "softplus".' if self.link is None else ""
            raise ValueError(
                f"the second natural parameter -1/(2 sigma^2) must be negative and finite; it is "
                f"{-0.5 * tau[index].item():.6g} for (..., example, label) {index}.{cure}"
            )
        return tau, slope

    def _moments(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """``m`` and ``sigma``, ``(..., n, D)``."""
        f_1, f_2 = _halves(f)
        if self.parametrization == "log_sigma":
            return f_1, torch.exp(f_2)
        tau, _ = self._tau(f_2)
        return f_1 / tau, tau.rsqrt()

    def negative_log_likelihood(self, f, y):
        """``(y - m)^2 / (2 sigma^2) + log(2 pi sigma^2) / 2``, summed over the D labels."""
        f_1, f_2 = _halves(f)
        y = _align(y, f, f_1.shape[-1])
        if self.parametrization == "log_sigma":
            z = (y - f_1) * torch.exp(-f_2)
            return (0.5 * z.square() + f_2 + 0.5 * math.log(2 * math.pi)).sum(-1)
        tau, _ = self._tau(f_2)
        return 0.5 * (tau * (y - f_1 / tau).square() - torch.log(tau) + math.log(2 * math.pi)).sum(-1)

    def residual(self, f, y):
        """Gradient in the outputs, as the table above; a link adds its slope."""
        f_1, f_2 = _halves(f)
        y = _align(y, f, f_1.shape[-1])
        if self.parametrization == "log_sigma":
            e = (f_1 - y) * torch.exp(-f_2)  # (m - y) / sigma
            return torch.cat(torch.broadcast_tensors(e * torch.exp(-f_2), 1 - e.square()), -1)
        tau, slope = self._tau(f_2)
        m = f_1 / tau
        # dl/d eta = E[(y, y^2)] - (y, y^2)
        return torch.cat([m - y, slope * ((m - y) * (m + y) + 1 / tau)], -1)

    def noise_precision(self, f, y=None):
        """Fisher information, as the table above; a link adds its slope on both sides."""
        f_1, f_2 = _halves(f)
        if self.parametrization == "log_sigma":
            return torch.diag_embed(self._log_sigma_root(f_2).square())
        a, b, c = self._natural_root(f_1, f_2)
        # [[a, 0], [b, c]] times its transpose
        top = torch.cat([torch.diag_embed(a * a), torch.diag_embed(a * b)], -1)
        bottom = torch.cat([torch.diag_embed(a * b), torch.diag_embed(b * b + c * c)], -1)
        return torch.cat([top, bottom], -2)

    def _log_sigma_root(self, f_2: Tensor) -> Tensor:
        """Diagonal ``(1 / sigma, sqrt 2)`` of the root."""
        return torch.cat([torch.exp(-f_2), torch.full_like(f_2, math.sqrt(2.0))], -1)

    def _natural_root(self, f_1: Tensor, f_2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Entries of the root ``[[a, 0], [b, c]]``, in which a, b, c are diagonal D x D.

        ``[[sigma, 0], [2 m sigma, sqrt(2) sigma^2]]`` is the Cholesky factor of the Fisher in ``eta``; the second row
        takes the slope of the link.
        """
        tau, slope = self._tau(f_2)
        sigma = tau.rsqrt()
        return sigma, 2 * slope * (f_1 / tau) * sigma, math.sqrt(2.0) * slope / tau

    def apply_root(self, f, v, y=None):
        """``R v``, with the Cholesky factor of each label's 2 x 2 Fisher for ``R``."""
        f_1, f_2 = _halves(f)
        if self.parametrization == "log_sigma":
            return self._log_sigma_root(f_2) * v
        (a, b, c), (v_1, v_2) = self._natural_root(f_1, f_2), _halves(v)
        return torch.cat([a * v_1, b * v_1 + c * v_2], -1)

    def apply_root_t(self, f, v, y=None):
        """``R^T v``."""
        f_1, f_2 = _halves(f)
        if self.parametrization == "log_sigma":
            return self._log_sigma_root(f_2) * v
        (a, b, c), (v_1, v_2) = self._natural_root(f_1, f_2), _halves(v)
        return torch.cat([a * v_1 + b * v_2, c * v_2], -1)

    def conditional(self, f):
        """``N(m, sigma^2)``."""
        return _independent(torch.distributions.Normal(*self._moments(f)))

    def conditional_mean(self, f):
        """``m``."""
        return self._moments(f)[0]

    def conditional_variance(self, f):
        """``sigma^2``."""
        return self._moments(f)[1].square()

    def conditional_covariance(self, f):
        """``diag sigma^2``."""
        return torch.diag_embed(self.conditional_variance(f))

    def __repr__(self):
        if self.parametrization == "log_sigma":
            return "HeteroscedasticGaussian()"
        link = getattr(self.link, "__name__", repr(self.link)) if callable(self.link) else repr(self.link)
        return f'HeteroscedasticGaussian("natural", link={link})'


def from_callable(
    fn: Callable[[Tensor, Tensor], Tensor],
    fisher: Callable[[Tensor], Tensor] | None = None,
    conditional: Callable[[Tensor], Distribution] | None = None,
) -> Loss:
    """The user's own loss; its derivatives come from autodiff.

    Args:
        fn: ``fn(f_i, y_i)``, the negative log-likelihood of one example: outputs ``(K,)`` and one label to a scalar. It
            goes through ``torch.func.vmap``, so that ``f_i[y_i]`` is written ``f_i.gather(0, y_i[None])[0]``, and a
            choice ``torch.where``. Constants that depend on nothing matter to the evidence alone.
        fisher: ``f (..., n, K) -> (..., n, K, K)``, positive semidefinite, taken for ``Lambda`` in place of the
            Hessian: for losses whose Hessian is indefinite, and for those asked for ``Lambda`` where no label is known.
        conditional: ``f (..., n, K)`` to the distribution of labels, batch ``(..., n)`` and event ``()`` or ``(D,)``:
            for predictions of labels.
    """
    return _CallableLoss(fn, fisher, conditional)


class _CallableLoss(Loss):
    """What `from_callable` returns."""

    invertible = False

    def __init__(self, fn, fisher=None, conditional=None):
        for name, value in (("fn", fn), ("fisher", fisher), ("conditional", conditional)):
            if not (callable(value) or (value is None and name != "fn")):
                raise TypeError(f"{name} must be a function, got {type(value).__name__}.")
        self._fn = fn
        self._fisher = fisher
        self._conditional = conditional
        self.precision_needs_labels = fisher is None

    def _check_labels(self, y, num_outputs, dtype):
        if y.is_floating_point():
            _require_dtype(y, dtype)
            _refuse(~torch.isfinite(y), y, "labels must be finite")
        return y

    def _map(self, fn: Callable, f: Tensor, y: Tensor) -> Tensor:
        """``fn`` for each example; ``y`` has the leading dimensions of ``f``, or is ``(n, ...)`` for all of them."""
        batched = f.ndim > 2 and y.shape[: f.ndim - 1] == f.shape[:-1]
        if not batched and len(y) != f.shape[-2]:
            raise ValueError(f"{len(y)} labels for {f.shape[-2]} examples.")
        mapped = vmap(fn)
        for _ in range(f.ndim - 2):
            mapped = vmap(mapped, in_dims=(0, 0 if batched else None))
        try:
            return mapped(f, y)
        except RuntimeError as error:
            if "vmap" in str(error):
                error.add_note(
                    "The function given to from_callable goes through torch.func.vmap: write f[y] as "
                    "f.gather(0, y[None])[0], a choice as torch.where, and take no .item()."
                )
            raise

    def negative_log_likelihood(self, f, y):
        return self._map(self._fn, f, y)

    def residual(self, f, y):
        return self._map(grad(self._fn), f, y)

    def noise_precision(self, f, y=None):
        return self._precision_and_root(f, y)[0]

    def apply_root(self, f, v, y=None):
        _, root = self._precision_and_root(f, y)
        return (root @ v.unsqueeze(-1)).squeeze(-1)

    def apply_root_t(self, f, v, y=None):
        _, root = self._precision_and_root(f, y)
        return (root.mT @ v.unsqueeze(-1)).squeeze(-1)

    def _precision_and_root(self, f: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        if self._fisher is not None:
            precision = self._fisher(f)
            if precision.shape != (*f.shape, f.shape[-1]):
                raise ValueError(
                    f"fisher(f) must have shape {(*f.shape, f.shape[-1])} for f of shape {tuple(f.shape)}, got "
                    f"{tuple(precision.shape)}."
                )
            skew = (precision - precision.mT).detach().abs().amax((-2, -1))
            bad = skew > math.sqrt(torch.finfo(precision.dtype).eps) * precision.detach().abs().amax((-2, -1))
            if bad.any():
                raise ValueError(f"fisher(f) is not symmetric for example {first_index(bad)}.")
            return precision, positive_root(precision, "fisher(f)")
        if y is None:
            raise ValueError(
                "the Hessian of this loss depends on the label: pass y, or give from_callable the Fisher information, "
                "`fisher=`, which does not."
            )
        precision = self._map(jacrev(grad(self._fn)), f, y)  # reverse over reverse: what most operations have
        cure = " Give from_callable a positive semidefinite stand-in, `fisher=`: the Fisher information of the loss."
        return precision, positive_root(precision, "the Hessian of the loss", cure)

    def conditional(self, f):
        if self._conditional is None:
            raise ValueError(
                "the distribution of labels given outputs is not known for this loss: give from_callable "
                "`conditional=`. The posterior of the outputs, and the evidence, need none."
            )
        return self._conditional(f)

    def conditional_mean(self, f):
        """Mean of `conditional`."""
        y = self.conditional(f)
        if isinstance(y, torch.distributions.Categorical):
            return y.probs
        return y.mean if y.event_shape else y.mean.unsqueeze(-1)

    def conditional_variance(self, f):
        """Variances of `conditional`."""
        y = self.conditional(f)
        if isinstance(y, torch.distributions.Categorical):
            return y.probs * (1 - y.probs)
        return y.variance if y.event_shape else y.variance.unsqueeze(-1)

    def conditional_covariance(self, f):
        """Covariance of `conditional`."""
        y = self.conditional(f)
        if isinstance(y, torch.distributions.Categorical):
            return torch.diag_embed(y.probs) - y.probs.unsqueeze(-1) * y.probs.unsqueeze(-2)
        if hasattr(y, "covariance_matrix"):
            return y.covariance_matrix
        return torch.diag_embed(self.conditional_variance(f))

    def __repr__(self):
        given = [f"{k}=..." for k, v in (("fisher", self._fisher), ("conditional", self._conditional)) if v is not None]
        return f"from_callable({', '.join([getattr(self._fn, '__name__', '...'), *given])})"


def _halves(f: Tensor) -> tuple[Tensor, Tensor]:
    if f.shape[-1] % 2:
        raise ValueError(f"HeteroscedasticGaussian needs an even number of outputs, got {f.shape[-1]}.")
    return f.chunk(2, -1)


def _independent(distribution: Distribution) -> Distribution:
    return torch.distributions.Independent(distribution, 1)


def _align(y: Tensor, f: Tensor, columns: int) -> Tensor:
    """Labels as floats ``(..., n, columns)``; ``(..., n)`` will do for one column."""
    n = f.shape[-2]
    if y.shape[-2:] != (n, columns):
        if columns != 1 or y.shape[-1:] != (n,):
            raise ValueError(
                f"labels have shape {tuple(y.shape)}, outputs {tuple(f.shape)}; needed is ({n}, {columns})."
            )
        y = y.unsqueeze(-1)
    return _require_dtype(y, f.dtype) if y.is_floating_point() else y.to(f.dtype)


def _align_index(y: Tensor, f: Tensor) -> Tensor:
    """Class labels as an index into the last dimension of ``f``, ``(..., n, 1)``."""
    if y.shape[-1:] != f.shape[-2:-1] or y.ndim >= f.ndim:
        raise ValueError(f"class labels have shape {tuple(y.shape)}, outputs {tuple(f.shape)}: needed are (n,).")
    return y.long().expand(f.shape[:-1]).unsqueeze(-1)


def _real_labels(y: Tensor, columns: int, dtype: torch.dtype | None) -> Tensor:
    """Finite floats of shape ``(n, columns)``."""
    if y.ndim == 1 and columns == 1:
        y = y.unsqueeze(-1)
    if y.ndim != 2 or y.shape[1] != columns:
        raise ValueError(f"labels have shape {tuple(y.shape)}; needed is (n, {columns}).")
    if y.is_floating_point():
        _require_dtype(y, dtype)
        _refuse(~torch.isfinite(y), y, "labels must be finite")
        return y
    cast = y.to(torch.get_default_dtype() if dtype is None else dtype)
    _refuse(cast.to(y.dtype) != y, y, f"integer labels must be exact as {cast.dtype}")
    return cast


def _require_dtype(y: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is not None and y.dtype != dtype:
        raise TypeError(f"labels are {y.dtype}, the outputs of the network {dtype}: convert one, y.to({dtype}).")
    return y


def _refuse(bad: Tensor, y: Tensor, rule: str) -> None:
    if bad.any():
        raise ValueError(f"label {y[bad][0].item():.6g} at index {first_index(bad)}: {rule}.")


def _check_noise(value: float | Tensor, name: str) -> Tensor:
    """A positive, finite tensor of at most two dimensions; float64 if it is not of a floating type yet."""
    if not isinstance(value, Tensor):
        value = torch.as_tensor(value, dtype=torch.float64)
    elif not value.is_floating_point():
        value = value.to(torch.float64)
    if value.ndim > 2:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}: give a number, one per output (K,), or one per example, (n, 1) or "
            "(n, K)."
        )
    require_positive(value, name)
    return value
