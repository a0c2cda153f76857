"""Mixtures of predicted distributions: ``p(y) = sum_s pi_s p_s(y)``, S components of one kind and shape.

    mixture(components, weights)   classes and single Bernoullis stay what they are, others become a Mixture
    entries(y)                     the entries of a vector each by itself: what a ``cdf`` is about
    weighted_mean(values, weights) sum_s pi_s v_s

All in logarithms: a label that every component finds as good as impossible keeps its own log density.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, MultivariateNormal, Normal
from torch.nn.functional import logsigmoid


def mixture(components: Sequence[Distribution], weights: Tensor) -> Distribution:
    """The mixture of distributions of one batch and event shape.

    Args:
        components: all of classes, all of Bernoullis, or others that have ``mean``, ``variance`` and ``log_prob``.
        weights: pi, ``(S,)``, not negative, with sum one.
    """
    first = components[0]
    if isinstance(first, Categorical):
        return Categorical(logits=_log_average([c.logits for c in components], weights))
    if isinstance(first, Bernoulli):
        logs = ([logsigmoid(sign * c.logits) for c in components] for sign in (1, -1))
        yes, no = (_log_average(each, weights) for each in logs)
        return Bernoulli(logits=yes - no)
    if isinstance(first, Independent) and first.event_shape == (1,) and isinstance(first.base_dist, Bernoulli):
        return Independent(mixture([c.base_dist for c in components], weights), 1)
    return Mixture(components, weights)


def entries(y: Distribution) -> Distribution:
    """The entries of a vector each by itself, as a batch: what ``cdf`` is about."""
    if isinstance(y, Mixture):
        return mixture([entries(c) for c in y.components], y.weights)
    if isinstance(y, MultivariateNormal):
        return Normal(y.mean, y.stddev)
    return y.base_dist if isinstance(y, Independent) else y


class Mixture(Distribution):
    """``sum_s pi_s p_s``, components of any kind and one shape.

    Args:
        components: distributions of one batch and event shape.
        weights: pi, ``(S,)``, not negative, with sum one.
    """

    arg_constraints: dict = {}

    def __init__(self, components: Sequence[Distribution], weights: Tensor) -> None:
        self.components, self.weights = list(components), weights
        super().__init__(components[0].batch_shape, components[0].event_shape, validate_args=False)

    def __repr__(self) -> str:
        return f"Mixture of {len(self.components)}, the first {self.components[0]}"

    @property
    def support(self):
        return self.components[0].support

    @property
    def mean(self) -> Tensor:
        return weighted_mean([c.mean for c in self.components], self.weights)

    @property
    def variance(self) -> Tensor:
        mean = self.mean
        return weighted_mean([c.variance + (c.mean - mean).square() for c in self.components], self.weights)

    def log_prob(self, value: Tensor) -> Tensor:
        return _log_average([c.log_prob(value) for c in self.components], self.weights)

    def cdf(self, value: Tensor) -> Tensor:
        """Of each entry by itself."""
        return weighted_mean([entries(c).cdf(value) for c in self.components], self.weights)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Each draw of each batch element is one component's."""
        shape = torch.Size(sample_shape)
        with torch.no_grad():
            which = torch.multinomial(self.weights, (shape + self.batch_shape).numel(), replacement=True)
            which = which.reshape(shape + self.batch_shape + (1,) * len(self.event_shape))
            drawn = torch.stack([c.sample(shape) for c in self.components])
        return drawn.gather(0, which.expand(drawn.shape[1:])[None])[0]


def weighted_mean(values: Iterable[Tensor], weights: Tensor) -> Tensor:
    """``sum_s pi_s v_s``, of S tensors of one shape."""
    return torch.tensordot(weights, torch.stack(list(values)), 1)


def _log_average(logs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``log sum_s pi_s exp(a_s)``, with the gradient ``exp(a_s) / sum`` where a weight is zero, too."""
    logs = torch.stack(list(logs), -1)
    largest = logs.detach().masked_fill(weights == 0, -torch.inf).amax(-1, keepdim=True)
    largest = largest.nan_to_num(neginf=0.0)
    # more than the largest are those of weight zero alone: without a bound 0 * inf would be no number
    return ((logs - largest).clamp(max=80.0).exp() * weights).sum(-1).log() + largest.squeeze(-1)
