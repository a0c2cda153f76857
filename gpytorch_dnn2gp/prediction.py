"""What a GP answers with: labels at new inputs, their average over GPs; how far a net is from a stationary point."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from gpytorch.distributions import MultivariateNormal
from torch import Tensor
from torch.distributions import Categorical, Distribution

from .mixtures import mixture, weighted_mean
from .operators import Covariance


@dataclass(frozen=True)
class Prediction:
    """Labels and outputs at new inputs ``(..., m, d)``.

    Attributes:
        mean: ``E[y]``, ``(..., m, D)``; class probabilities for a categorical loss.
        aleatoric: ``E[Var[y|f]]``, the part that more data would not remove, ``(..., m, D)``.
        epistemic: ``Var[E[y|f]]``, the part that comes from not knowing the weights, ``(..., m, D)``.
        f: the outputs' Gaussian: one for each example, batch ``(..., m)`` and event ``(K,)``; with ``joint=True`` one
            over all examples, as ``gp(x)`` gives it.
        y: distribution of each label.
        probs: class probabilities ``(..., m, K)``, of ones for a Bernoulli loss; else None.
    """

    mean: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    f: MultivariateNormal
    y: Distribution
    probs: Tensor | None

    @property
    def variance(self) -> Tensor:
        """``Var[y]``, aleatoric plus epistemic, ``(..., m, D)``."""
        return self.aleatoric + self.epistemic

    def __repr__(self) -> str:
        return (
            f"Prediction(mean={tuple(self.mean.shape)}, aleatoric variance {float(self.aleatoric.mean()):.3g} and "
            f"epistemic variance {float(self.epistemic.mean()):.3g} on average)"
        )


def average(predictions: Iterable[Prediction], weights: Sequence[float] | Tensor | None = None) -> Prediction:
    """The mixture of several predictions of the same labels, of nets from other initial weights, say.

    With weights pi_s and moments of the members with index s:

        p(y) = sum_s pi_s p_s(y),   E[y] = sum_s pi_s E_s[y]
        Var[E[y|f]] = sum_s pi_s (epistemic_s + (E_s[y] - E[y])^2),   E[Var[y|f]] = sum_s pi_s aleatoric_s

    Which member is right is one more thing not known: the epistemic variance grows where they differ.

    Args:
        predictions: at the same inputs, by GPs whose losses are of one kind.
        weights: pi, ``(S,)``, not negative, with sum one; equal by default.

    Returns:
        ``y`` is the mixture, with ``log_prob``, ``sample``, ``mean``, ``variance`` and, where the members have one,
        ``cdf`` of each entry; ``f`` is the Gaussian with the moments of the mixture.

    Raises:
        ValueError: for no predictions, predictions that do not go together, or weights as they cannot be.
        TypeError: for one prediction that is not in a list.
    """
    if isinstance(predictions, Prediction):
        raise TypeError("predictions must be a list of them; to average one prediction changes nothing.")
    predictions = list(predictions)
    if not predictions:
        raise ValueError("There are no predictions to average.")
    for i, p in enumerate(predictions):
        if _kind(p) != _kind(predictions[0]):
            raise ValueError(
                f"Prediction {i} is of {_kind(p)}, prediction 0 of {_kind(predictions[0])}: predict at the same "
                "inputs, with losses of one kind, all with joint= or all without."
            )
    pi = _weights(weights, len(predictions), predictions[0].mean)

    def mean_of(values: Iterable[Tensor]) -> Tensor:
        return weighted_mean(values, pi)

    mean, f_mean = mean_of(p.mean for p in predictions), mean_of(p.f.mean for p in predictions)
    away = [(p.f.mean - f_mean).reshape(*p.f.batch_shape, -1) for p in predictions]
    covariance = mean_of(p.f.covariance_matrix + d[..., None] * d[..., None, :] for p, d in zip(predictions, away))
    return Prediction(
        mean,
        mean_of(p.aleatoric for p in predictions),
        mean_of(p.epistemic + (p.mean - mean).square() for p in predictions),
        type(predictions[0].f)(f_mean, Covariance(covariance)),  # torch would factorise it at once, singular or not
        mixture([p.y for p in predictions], pi),
        None if predictions[0].probs is None else mean_of(p.probs for p in predictions),
    )


def _kind(p: Prediction) -> str:
    labels = "numbers" if p.probs is None else "classes" if isinstance(p.y, Categorical) else "yes or no"
    f = tuple(p.f.batch_shape), tuple(p.f.event_shape)
    return f"{labels} with mean {tuple(p.mean.shape)} and f {f[0]} x {f[1]}"


def _weights(given: Sequence[float] | Tensor | None, number: int, like: Tensor) -> Tensor:
    options = {"dtype": like.dtype, "device": like.device}
    pi = torch.full((number,), 1 / number, **options) if given is None else torch.as_tensor(given, **options)
    if pi.shape != (number,) or not (pi >= 0).all() or abs(float(pi.detach().sum()) - 1) > 1e-4:
        raise ValueError(f"weights must be {number} numbers that are not negative and sum to one; got {pi.tolist()}.")
    return pi / pi.sum()


class StationarityWarning(UserWarning):
    """The net is so far from a stationary point that its evidence is not that of a minimum."""


@dataclass(frozen=True)
class Stationarity:
    """How far the net is from a stationary point of its loss, where the Laplace approximation is taken.

    Attributes:
        gradient_norm: ``|g|``, ``g = sum_i J_i^T r_i + S0^-1 w*``.
        newton_decrement: ``g^T Sigma g``, free of scale: the squared length of the Gauss-Newton step from w* to the
            posterior mean, in posterior standard deviations. Well below one is near; for a Gaussian loss half of it is
            the gap in nats between GP and Laplace evidence.
    """

    gradient_norm: float
    newton_decrement: float

    @property
    def evidence_gap(self) -> float:
        """``g^T Sigma g / 2`` in nats."""
        return self.newton_decrement / 2

    def __repr__(self) -> str:
        return (
            f"Stationarity(gradient norm {self.gradient_norm:.3g}, {self.newton_decrement**0.5:.3g} posterior standard "
            "deviations from the Gauss-Newton optimum)"
        )
