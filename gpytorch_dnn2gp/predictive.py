"""Labels at new inputs: from the outputs' Gaussian ``f ~ N(mean, C)`` to ``p(y)``.

    Var[y]  =  aleatoric  +  epistemic  =  E[Var[y|f]]  +  Var[E[y|f]]

The first part is the noise of the labels, which more data would not remove; the second is what is not known of ``f``.

    loss                      approximations, the default first
    Gaussian                  exact, linear
    Bernoulli                 probit, linear, bridge, quadrature, mc
    Categorical               probit, linear, bridge, mc
    Poisson                   exact, linear, mc
    HeteroscedasticGaussian   exact, linear, mc
      natural parameters      mc, linear
    from_callable             mc

- ``exact``: the moments in closed form; ``y`` a mixture over the nodes of a quadrature, but a Gaussian for Gaussians.
- ``linear``: ``E[y|f]`` to first order around the mean (paper, appendix B). Mean and aleatoric variance are those at
  the mean of ``f``; the epistemic variance, ``Lambda C Lambda`` (paper eq. 48), is unbounded where ``C`` is large. For
  classes and counts ``y`` is ``p(y | f = mean)``, whose variance is the aleatoric one.
- ``probit``: probabilities ``softmax(mean / sqrt(1 + pi/8 diag C))``, for a logit ``s(mean / sqrt(1 + pi/8 C))``, as if
  the link were a probit. Their variances are those of ``linear``: at the unscaled mean, and as unbounded.
- ``bridge``: the Laplace bridge (Hobbhahn et al. 2022), a Dirichlet (Beta) whose Laplace approximation in the logits
  has this mean and these variances. Crude for K > 2: where variances shrink, its mean tends to ``softmax(mean)`` only
  if their ratios are those of a Dirichlet. For one logit its mean is ``s(mean)``.
- ``quadrature``: one integral for each logit, to about 1e-9 whatever the variance.
- ``mc``: an average over samples of ``f``.

Under ``exact``, ``bridge``, ``quadrature`` and ``mc`` the two variances of probabilities sum to ``p (1 - p)``.
Everything but the samples of ``y`` is differentiable in ``mean`` and ``C``. Read losses.py first.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MixtureSameFamily, MultivariateNormal, Normal
from torch.nn.functional import log_softmax, logsigmoid

from . import losses
from .losses import Loss
from .numerics import NumericalWarning, cholesky, first_index, positive_root, require_finite, require_like

__all__ = ["LabelMoments", "approximations", "of_samples", "predictive"]

MIN_NODES, MAX_NODES = 256, 2048  # of a mixture of many components, for each label
MAX_MIXTURE = 2**24  # components of all of them, while there are MIN_NODES
CHUNK = 2**22  # numbers of one chunk of Monte Carlo; fixed, since what a generator draws depends on it


@dataclass(frozen=True)
class LabelMoments:
    """Labels at new inputs. A class label counts as its indicator vector, so that its mean is ``probs``.

    Attributes:
        mean: ``E[y]``, ``(..., n, D)``.
        aleatoric: ``E[Var[y|f]]``, ``(..., n, D)``.
        epistemic: ``Var[E[y|f]]``, ``(..., n, D)``.
        y: distribution of the labels: batch ``(..., n)``, event ``(D,)``, or ``()`` for classes. With several entries
            a Gaussian has their joint distribution, and so have Monte Carlo mixtures; elsewhere they are independent.
        probs: probabilities of classes ``(..., n, K)``; of ones, for a Bernoulli. ``None`` for other labels.
    """

    mean: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    y: Distribution
    probs: Tensor | None = None

    @property
    def variance(self) -> Tensor:
        """``Var[y]``, ``(..., n, D)``: aleatoric plus epistemic."""
        return self.aleatoric + self.epistemic


def predictive(
    loss: Loss,
    mean: Tensor,
    covariance: Tensor,
    approximation: str | None = None,
    num_samples: int = 1000,
    generator: torch.Generator | None = None,
) -> LabelMoments:
    """Mean, aleatoric and epistemic variance, and distribution of labels whose outputs are ``f ~ N(mean, covariance)``.

    Args:
        loss: the likelihood of a label given outputs.
        mean: of ``f``, ``(..., n, K)``.
        covariance: of the outputs of each example, ``(..., n, K, K)``, positive semidefinite; zero is allowed.
        approximation: one of those that the loss has, see the top of predictive.py; ``None`` takes the first.
        num_samples: of Monte Carlo.
        generator: of Monte Carlo's random numbers; ``None`` takes torch's own.

    Raises:
        ValueError: for an approximation that the loss does not have, with those it has.
    """
    known = approximations(loss)
    if approximation is None:
        approximation = next(iter(known))
    if approximation not in known:
        raise ValueError(f"unknown approximation {approximation!r}: {loss!r} has {', '.join(map(repr, known))}.")
    if covariance.shape != (*mean.shape, mean.shape[-1]):
        raise ValueError(
            f"the covariance of outputs of shape {tuple(mean.shape)} has shape {(*mean.shape, mean.shape[-1])}, "
            f"got {tuple(covariance.shape)}."
        )
    require_like(covariance, mean, "covariance", "mean")
    require_finite(mean, "the mean of f")
    require_finite(covariance, "the covariance of f")
    if approximation == "mc":
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
        return _monte_carlo(loss, mean, covariance, num_samples, generator)
    return known[approximation](loss, mean, covariance)


def approximations(loss: Loss) -> dict[str, Callable]:
    """The approximations that `predictive` has for this loss, its default first."""
    known = next((known for kind, known in _APPROXIMATIONS.items() if isinstance(loss, kind)), {"mc": _monte_carlo})
    if isinstance(loss, losses.HeteroscedasticGaussian) and loss.parametrization == "natural":
        known = {name: known[name] for name in ("mc", "linear")}
    return known


# Gaussian


def _gaussian(loss: losses.Gaussian, mean: Tensor, covariance: Tensor) -> LabelMoments:
    """``y ~ N(mean, C + sigma^2)``: nothing is approximated."""
    noise = loss.conditional_variance(mean)
    root = cholesky(covariance + torch.diag_embed(noise), "the covariance of y")
    return LabelMoments(mean, noise, _variances(covariance), MultivariateNormal(mean, scale_tril=root))


# Bernoulli: one logit at a time


def _bernoulli_linear(loss: losses.Bernoulli, mean: Tensor, covariance: Tensor) -> LabelMoments:
    lam = loss.conditional_variance(mean)
    return _of_logits(mean, lam, lam.square() * _variances(covariance))


def _bernoulli_probit(loss: losses.Bernoulli, mean: Tensor, covariance: Tensor) -> LabelMoments:
    first_order = _bernoulli_linear(loss, mean, covariance)
    logits = mean / torch.sqrt(1 + math.pi / 8 * _variances(covariance))
    return _of_logits(logits, first_order.aleatoric, first_order.epistemic)


def _bernoulli_bridge(loss: losses.Bernoulli, mean: Tensor, covariance: Tensor) -> LabelMoments:
    """Beta(a, b) with ``a = (1 + e^mean) / v``, ``b = (1 + e^-mean) / v``: the bridge of the two logits +-f/2."""
    log_v = torch.log(_positive_variances(_variances(covariance)))
    log_total = torch.logaddexp(-logsigmoid(-mean), -logsigmoid(mean)) - log_v
    lam = loss.conditional_variance(mean)
    return _of_logits(mean, lam * torch.sigmoid(log_total), lam * torch.sigmoid(-log_total))


def _bernoulli_quadrature(loss: losses.Bernoulli, mean: Tensor, covariance: Tensor) -> LabelMoments:
    """``E[s(f)]``, ``E[s'(f)]`` and ``Var[s(f)]`` by the trapezoidal rule, ``s' = s (1 - s)``.

    The rule converges geometrically, at a rate that one of two forms of the integral always keeps:

        v <= 1   E[s(m + sqrt(v) z)],  z ~ N(0, 1);              the poles of s(m + sqrt(v) z) keep away
        v > 1    E[Phi((m - u) / sqrt(v))],  u of density s';    Phi is smooth

    It is taken where ``m <= 0``, by symmetry, so that the smaller of the two probabilities keeps its digits.
    """
    sign = torch.where(mean > 0, -1.0, 1.0).to(mean)
    m, v = (sign * mean).unsqueeze(-1), _variances(covariance).unsqueeze(-1)

    z, log_weights = _normal_nodes(0.5, 1.0, mean)
    f = m + _safe_sqrt(v.clamp(max=1)) * z
    s, weights = torch.sigmoid(f), log_weights.exp()
    log_p = torch.logsumexp(log_weights + logsigmoid(f), -1)
    log_q = torch.logsumexp(log_weights + logsigmoid(-f), -1)
    lam = (weights * s * torch.sigmoid(-f)).sum(-1)
    narrow = log_p, log_q, lam, (weights * (s - log_p.exp().unsqueeze(-1)).square()).sum(-1)

    spacing = 0.6
    u = spacing * torch.arange(-67, 68, dtype=mean.dtype, device=mean.device)
    log_density = math.log(spacing) + logsigmoid(u) + logsigmoid(-u)
    v = v.clamp(min=1)
    scale = v.sqrt()
    # In the far tail s(f) = e^f s(-f) is integrated as e^(m + v/2) E[s(-f)], f ~ N(m + v, v).
    tail = m + v < 0
    log_factor = torch.where(tail, m + v / 2, 0.0).squeeze(-1)
    c = torch.where(tail, -(m + v), m)
    log_p = torch.logsumexp(log_density + torch.special.log_ndtr((c - u) / scale), -1)
    log_q = torch.logsumexp(log_density + torch.special.log_ndtr((-m - u) / scale), -1)
    # E[s'(f)] = integral of s'(u) N(u; c, v);  in the tail  e^f s(-f)^2 = e^f (s(-f) - s'(f))
    log_normal = -0.5 * ((c - u) / scale).square() - torch.log(scale) - 0.5 * math.log(2 * math.pi)
    lam = torch.exp(log_density + log_normal).sum(-1)
    lam = log_factor.exp() * torch.where(tail.squeeze(-1), log_p.exp() - lam, lam)
    log_p = log_factor + log_p
    wide = log_p, log_q, lam, ((log_p + log_q).exp() - lam).clamp(min=0)

    is_narrow = _variances(covariance) <= 1
    log_p, log_q, aleatoric, epistemic = (torch.where(is_narrow, a, b) for a, b in zip(narrow, wide))
    return _of_logits(sign * (log_p - log_q), aleatoric, epistemic)


def _of_logits(logits: Tensor, aleatoric: Tensor, epistemic: Tensor) -> LabelMoments:
    probs = torch.sigmoid(logits)
    y = Independent(torch.distributions.Bernoulli(logits=logits), 1)
    return LabelMoments(probs, aleatoric, epistemic, y, probs)


# Categorical


def _categorical_linear(loss: losses.Categorical, mean: Tensor, covariance: Tensor) -> LabelMoments:
    p = torch.softmax(mean, -1)
    # diag(Lambda C Lambda)_k = p_k^2 (e_k - p)^T C (e_k - p)
    Cp = (covariance @ p.unsqueeze(-1)).squeeze(-1)
    spread = _variances(covariance) - 2 * Cp + (p * Cp).sum(-1, keepdim=True)
    return _of_classes(mean, loss.conditional_variance(mean), p.square() * spread.clamp(min=0))


def _categorical_probit(loss: losses.Categorical, mean: Tensor, covariance: Tensor) -> LabelMoments:
    first_order = _categorical_linear(loss, mean, covariance)
    logits = mean / torch.sqrt(1 + math.pi / 8 * _variances(covariance))
    return _of_classes(logits, first_order.aleatoric, first_order.epistemic)


def _categorical_bridge(loss: losses.Categorical, mean: Tensor, covariance: Tensor) -> LabelMoments:
    """Dirichlet(alpha) with ``alpha_k = (1 - 2/K + e^m_k sum_l e^-m_l / K^2) / v_k``.

    The bridge wants logits that sum to zero. A softmax does not see their mean, so ``f`` is projected orthogonally,
    ``m = P mean``, ``v = diag(P C P)``, ``P = I - 1 1^T / K``, which leaves the distribution of ``softmax(f)`` alone.
    """
    K = mean.shape[-1]
    m = mean - mean.mean(-1, keepdim=True)
    rows = covariance.mean(-1)
    v = _positive_variances(_variances(covariance) - 2 * rows + rows.mean(-1, keepdim=True))
    log_alpha = m + torch.logsumexp(-m, -1, keepdim=True) - 2 * math.log(K)
    if K > 2:
        log_alpha = torch.logaddexp(log_alpha, torch.full_like(m, math.log(1 - 2 / K)))
    log_alpha = log_alpha - torch.log(v)
    # With a = sum alpha:  Cov[p] = (diag p - p p^T) / (1 + a),  E[Lambda] = (diag p - p p^T) a / (1 + a)
    log_total = torch.logsumexp(log_alpha, -1, keepdim=True)
    lam = loss.conditional_variance(log_alpha)
    return _of_classes(log_alpha, lam * torch.sigmoid(log_total), lam * torch.sigmoid(-log_total))


def _of_classes(logits: Tensor, aleatoric: Tensor, epistemic: Tensor) -> LabelMoments:
    probs = torch.softmax(logits, -1)
    return LabelMoments(probs, aleatoric, epistemic, torch.distributions.Categorical(logits=logits), probs)


# Poisson


def _poisson_linear(loss: losses.Poisson, mean: Tensor, covariance: Tensor) -> LabelMoments:
    rate = loss.conditional_mean(mean)
    return LabelMoments(rate, rate, rate.square() * _variances(covariance), loss.conditional(mean))


def _poisson_exact(loss: losses.Poisson, mean: Tensor, covariance: Tensor) -> LabelMoments:
    """Moments of a log-normal rate; ``y`` a mixture of Poissons over nodes in ``f``."""
    v = _variances(covariance)
    rate = torch.exp(mean + v / 2)
    epistemic = rate.square() * torch.expm1(v)
    require_finite(epistemic, "the variance of the Poisson rate exp(f), log-normal,")
    # In z, p(y|f) is about 1 / sqrt(v rate) wide. Aim at rates 4 standard deviations up, insist on 2.
    scale = _safe_sqrt(v)
    width, enough = (torch.exp(-0.5 * (mean + up * scale)) / scale.clamp(min=1e-6) for up in (4, 2))
    z, log_weights = _normal_nodes(width, scale, mean, enough)
    rates = torch.exp(mean.unsqueeze(-1) + scale.unsqueeze(-1) * z)
    y = _mixture(log_weights, torch.distributions.Poisson(rates))
    return LabelMoments(rate, rate, epistemic, Independent(y, 1))


# Heteroscedastic Gaussian


def _heteroscedastic_linear(loss: losses.HeteroscedasticGaussian, mean: Tensor, covariance: Tensor) -> LabelMoments:
    m, noise = loss.conditional_mean(mean), loss.conditional_variance(mean)
    D = m.shape[-1]
    if loss.parametrization == "log_sigma":
        epistemic = _variances(covariance)[..., :D]
    else:
        # eta_1 = f_1, so that dm/df are the first rows of Lambda: E[y] is the gradient of the log normaliser in eta_1
        slope = loss.noise_precision(mean)[..., :D, :]
        epistemic = (slope @ covariance * slope).sum(-1).clamp(min=0)
    return LabelMoments(m, noise, epistemic, Independent(Normal(m, torch.sqrt(noise + epistemic)), 1))


def _heteroscedastic_exact(loss: losses.HeteroscedasticGaussian, mean: Tensor, covariance: Tensor) -> LabelMoments:
    """Outputs ``(m, s)``, ``s = log sigma``: ``E[sigma^2]`` of a log-normal; ``y`` a mixture over nodes in ``s``."""
    m, s = mean.chunk(2, -1)
    v_m, v_s = _variances(covariance).chunk(2, -1)
    D = m.shape[-1]
    c = covariance[..., :D, D:].diagonal(dim1=-2, dim2=-1)
    noise = torch.exp(2 * s + 2 * v_s)
    require_finite(noise, "the expected noise variance exp(2 f_2), log-normal,")
    # s = E[s] + sqrt(v_s) z,   m | z ~ N(E[m] + slope z, v_m - slope^2)
    scale = _safe_sqrt(v_s)
    slope = torch.where(scale > 0, c / torch.where(scale > 0, scale, 1.0), 0.0)
    rest = (v_m - slope.square()).clamp(min=0)
    # As functions of z the components vary over 1 / sqrt(v_s), and over their width divided by the slope of their mean.
    width = torch.sqrt(rest + torch.exp(2 * (s - 2 * scale))) / slope.abs().clamp(min=1e-6)
    width = torch.minimum(width, 1 / scale.clamp(min=1e-6))
    z, log_weights = _normal_nodes(width, scale, m, enough=width)
    center = m.unsqueeze(-1) + slope.unsqueeze(-1) * z
    spread = torch.sqrt(rest.unsqueeze(-1) + torch.exp(2 * (s.unsqueeze(-1) + scale.unsqueeze(-1) * z)))
    y = _mixture(log_weights, Normal(center, spread))
    return LabelMoments(m, noise, v_m, Independent(y, 1))


# Monte Carlo, any loss


def _monte_carlo(
    loss: Loss, mean: Tensor, covariance: Tensor, num_samples: int, generator: torch.Generator | None
) -> LabelMoments:
    """Averages over samples of ``f``, the same number for each example, each example with its own."""
    K = mean.shape[-1]
    root = positive_root(covariance, "the covariance of f", " float64 may help.", _tolerance(covariance))
    rows = max(1, CHUNK // (num_samples * K))
    chunks = zip(mean.reshape(-1, K).split(rows), root.reshape(-1, K, K).split(rows))
    sampled = [_sample(loss, m, R, num_samples, generator) for m, R in chunks]
    label_mean, aleatoric, epistemic, extra = (torch.cat(parts) for parts in zip(*sampled))
    label_mean, aleatoric, epistemic = (a.reshape(*mean.shape[:-1], -1) for a in (label_mean, aleatoric, epistemic))
    classes = isinstance(loss, losses.Bernoulli | losses.Categorical)
    extra = extra.reshape(mean.shape if classes else (*mean.shape[:-1], num_samples, K))
    return _of_averages(loss, label_mean, aleatoric, epistemic, extra)


def of_samples(loss: Loss, f: Tensor) -> LabelMoments:
    """Labels where draws of ``f`` are given, ``(..., n, S, K)``: ``p(y) = 1/S sum_s p(y | f_s)``."""
    return _of_averages(loss, *_averages(loss, f))


def _of_averages(loss: Loss, label_mean: Tensor, aleatoric: Tensor, epistemic: Tensor, extra: Tensor) -> LabelMoments:
    if isinstance(loss, losses.Bernoulli):
        return _of_logits(extra, aleatoric, epistemic)
    if isinstance(loss, losses.Categorical):
        return _of_classes(extra, aleatoric, epistemic)
    components = loss.conditional(extra)
    probs = label_mean if isinstance(components, torch.distributions.Categorical) else None
    mixture = _mixture(extra.new_zeros(extra.shape[-2]), components)
    return LabelMoments(label_mean, aleatoric, epistemic, mixture, probs)


def _sample(loss: Loss, mean: Tensor, root: Tensor, num_samples: int, generator: torch.Generator | None) -> tuple:
    """Moments of some examples' labels, ``(n, D)`` each; then the logits of averaged probabilities, or the samples."""
    device = mean.device if generator is None else generator.device
    shape = (len(mean), num_samples, mean.shape[-1])
    noise = torch.randn(shape, dtype=mean.dtype, device=device, generator=generator).to(mean.device)
    f = mean.unsqueeze(-2) + noise @ root.mT  # (n, S, K)
    return _averages(loss, f)


def _averages(loss: Loss, f: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Over draws ``(..., n, S, K)``: moments of labels, then the logits of averaged probabilities, or the draws."""
    if isinstance(loss, losses.HeteroscedasticGaussian) and loss.link is None and loss.parametrization == "natural":
        _require_negative(f)
    means = loss.conditional_mean(f)
    aleatoric, epistemic = loss.conditional_variance(f).mean(-2), means.var(-2, correction=0)
    if isinstance(loss, losses.Bernoulli):
        extra = torch.logsumexp(logsigmoid(f), -2) - torch.logsumexp(logsigmoid(-f), -2)
    elif isinstance(loss, losses.Categorical):
        extra = torch.logsumexp(log_softmax(f, -1), -2)
    else:
        extra = f
    return means.mean(-2), aleatoric, epistemic, extra


def _require_negative(f: Tensor) -> None:
    bad = f.chunk(2, -1)[1] >= 0
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} of {bad.numel()} samples of the second natural parameter, -1/(2 sigma^2), are not "
            "negative: its Gaussian reaches across zero, where there is no variance sigma^2. Train with a link "
            '(link="exp" or "softplus"), or use approximation="linear".'
        )


# Helpers


def _variances(covariance: Tensor) -> Tensor:
    """Diagonal ``(..., n, K)``; entries negative by rounding count as zero."""
    v = covariance.diagonal(dim1=-2, dim2=-1)
    bad = v < -_tolerance(covariance)
    if bad.any():
        raise ValueError(
            f"the covariance of f has negative variances, first {v[bad][0].item():.6g} at index {first_index(bad)}. "
            "float64 may help."
        )
    return v.clamp(min=0)


def _tolerance(covariance: Tensor) -> float:
    """Below what size a negative eigenvalue of a posterior covariance is rounding.

    It is a difference of larger matrices, and outputs are measured in units of about one (logits, log rates).
    """
    largest = covariance.detach().diagonal(dim1=-2, dim2=-1).abs().max().item() if covariance.numel() else 0.0
    return math.sqrt(torch.finfo(covariance.dtype).eps) * max(1.0, largest)


def _positive_variances(v: Tensor) -> Tensor:
    bad = ~(v > 0)
    if bad.any():
        raise ValueError(
            f"the Laplace bridge divides by the variance of every logit (less what all share); it is "
            f"{v[bad][0].item():.6g} at index {first_index(bad)}. Use another approximation."
        )
    return v


def _safe_sqrt(v: Tensor) -> Tensor:
    """``sqrt(v)``, with gradient zero at zero: where an uncertainty vanishes, so does its own gradient in the input."""
    return torch.where(v > 0, torch.sqrt(torch.where(v > 0, v, 1.0)), 0.0)


def _normal_nodes(
    width: Tensor | float, scale: Tensor | float, like: Tensor, enough: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """Nodes and log weights of the trapezoidal rule for ``z ~ N(0, 1)``.

    Unlike the Gauss-Hermite rule's, its nodes are as dense as the integrand needs: for a Gaussian of width w its error
    is ``2 exp(-2 pi^2 w^2 / spacing^2)``, 5e-9 at a spacing of w. They reach far enough for ``e^(2 scale z)``.

    Args:
        width: of the integrand as a function of z, for each integral; the nodes are shared, and the least width counts.
        scale: standard deviation of what z stands for; the largest counts.
        like: the integrals' type and number, which bounds that of the nodes.
        enough: a warning tells of a spacing of more than two of these widths, an error of 1.4 %.
    """
    width, enough, scale = (torch.as_tensor(a).detach() for a in (width, enough, scale))
    reach = 8.5 + 2 * scale.max().item()
    half = math.ceil(reach / min(0.5, width.min().item()))
    most = max(MIN_NODES, min(MAX_NODES, MAX_MIXTURE // max(1, like.numel()))) // 2
    if half > most:
        half = most
        if reach / half > 2 * enough.min().item() > 0:
            warnings.warn(
                "log probabilities of y are rough: the label's noise is far narrower than what is not known of f, and "
                f"{2 * half + 1} nodes leave gaps between them. The moments are exact.",
                NumericalWarning,
                stacklevel=4,
            )
    z = torch.linspace(-reach, reach, 2 * half + 1, dtype=like.dtype, device=like.device)
    return z, log_softmax(-0.5 * z.square(), -1)


def _mixture(log_weights: Tensor, components: Distribution) -> Distribution:
    """Mixture over the last batch dimension of ``components``, with the same weights throughout."""
    weights = torch.distributions.Categorical(logits=log_weights.expand(components.batch_shape))
    return MixtureSameFamily(weights, components)


_APPROXIMATIONS = {
    losses.Gaussian: {"exact": _gaussian, "linear": _gaussian},
    losses.Bernoulli: {
        "probit": _bernoulli_probit,
        "linear": _bernoulli_linear,
        "bridge": _bernoulli_bridge,
        "quadrature": _bernoulli_quadrature,
        "mc": _monte_carlo,
    },
    losses.Categorical: {
        "probit": _categorical_probit,
        "linear": _categorical_linear,
        "bridge": _categorical_bridge,
        "mc": _monte_carlo,
    },
    losses.Poisson: {"exact": _poisson_exact, "linear": _poisson_linear, "mc": _monte_carlo},
    losses.HeteroscedasticGaussian: {
        "exact": _heteroscedastic_exact,
        "linear": _heteroscedastic_linear,
        "mc": _monte_carlo,
    },
}
