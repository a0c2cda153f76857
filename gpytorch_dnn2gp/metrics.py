"""How good predicted distributions are: a proper score, and two measures of calibration.

    negative_log_likelihood(y, labels)   mean of -log p(y_i), in nats
    coverage(y, labels, level)           part of the labels inside the sets that should hold ``level`` of them
    calibration_error(probs, labels)     confidence against accuracy, in bins (ECE)

``y`` is a torch distribution of the labels, such as ``gp.predict(x).y``, or what a net says alone:
``Categorical(logits=net(x))``, ``Independent(Normal(net(x), sigma), 1)``. Each returns a scalar tensor. Accuracy, root
mean square errors and the like are in scikit-learn.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution

from .mixtures import entries


def negative_log_likelihood(y: Distribution, labels: Tensor) -> Tensor:
    """Mean over the examples of ``-log p(y_i)``.

    Args:
        y: batch ``(n,)``, event ``(D,)``, or ``()`` for classes.
        labels: ``(n, D)``, ``(n,)`` if D = 1; classes ``(n,)``.
    """
    return -y.log_prob(_like(y, labels)).mean()


def coverage(y: Distribution, labels: Tensor, level: float = 0.95) -> Tensor:
    """Part of the labels that lie in the predicted sets of probability ``level``; ``level`` itself if ``y`` is right.

    Numbers: the central interval, between the quantiles ``(1 - level)/2`` and ``(1 + level)/2``, of each entry.
    Classes: the smallest set of classes. Whole classes rarely add up to ``level``, so the last one is taken with the
    chance that makes them (randomised sets, as in conformal prediction); what is returned is the average over it. A net
    that is sure and always right thus has a coverage of ``level``, and one that is sure but right in 9 cases of 10 has
    0.9 ``level``.

    Args:
        y: as above; entries Gaussian, mixtures of Gaussians, Bernoulli, or classes.
        labels: as above.
        level: in (0, 1).

    Raises:
        TypeError: for other distributions.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1; got {level}.")
    labels = _like(y, labels)
    if isinstance(y, Categorical):
        return _chance_in_set(y.probs, labels, level).mean()
    base = entries(y)
    if isinstance(base, Bernoulli):
        return _chance_in_set(torch.stack([1 - base.probs, base.probs], -1), labels.long(), level).mean()
    try:
        below = base.cdf(labels)
    except NotImplementedError:
        raise TypeError(f"coverage needs the distribution function (cdf) of y, which {base} does not have.") from None
    return ((below - 0.5).abs() <= level / 2).to(below).mean()


def calibration_error(probs: Tensor, labels: Tensor, num_bins: int = 15) -> Tensor:
    """Expected calibration error: ``sum_b (n_b / n) |accuracy_b - confidence_b|``.

    Examples are put into bins of equal width by their confidence, the largest probability; b runs over the bins.

    Args:
        probs: ``(n, K)``; of ones, ``(n,)`` or ``(n, 1)``, for two classes.
        labels: classes, ``(n,)``, or ``(n, 1)``.
        num_bins: as many as in most papers; the error depends on it.
    """
    labels = labels.reshape(-1).long()
    if probs.dim() == 1 or probs.shape[-1] == 1:
        probs = torch.stack([1 - probs.reshape(-1), probs.reshape(-1)], -1)
    if len(probs) != len(labels):
        raise ValueError(f"There are {len(probs)} predictions, but {len(labels)} labels.")
    confidence, predicted = probs.max(-1)
    b = (confidence * num_bins).ceil().long().clamp(1, num_bins) - 1  # ((b) / num_bins, (b + 1) / num_bins]
    gap = confidence.new_zeros(num_bins).index_add(0, b, (predicted == labels).to(confidence) - confidence)
    return gap.abs().sum() / len(labels)


def _chance_in_set(probs: Tensor, labels: Tensor, level: float) -> Tensor:
    """Chance that each label ``(...)`` is in its smallest set of probability ``level``; ``probs`` is ``(..., K)``."""
    labels = labels.unsqueeze(-1)
    p = probs.gather(-1, labels)
    classes = torch.arange(probs.shape[-1], device=probs.device)
    before = (probs > p) | ((probs == p) & (classes < labels))
    missing = level - (probs * before).sum(-1)
    return (missing / p.squeeze(-1).clamp(min=torch.finfo(probs.dtype).tiny)).clamp(0, 1)


def _like(y: Distribution, labels: Tensor) -> Tensor:
    """Labels in the shape ``batch + event`` of ``y`` and, where they are numbers, in its dtype."""
    shape = y.batch_shape + y.event_shape
    if labels.shape != shape and shape[-1:] == (1,) and labels.shape == shape[:-1]:
        labels = labels.unsqueeze(-1)
    if labels.shape != shape:
        raise ValueError(f"labels have shape {tuple(labels.shape)}; these predictions are for {tuple(shape)}.")
    return labels.long() if isinstance(y, Categorical) else labels.to(y.mean)
