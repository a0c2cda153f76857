"""What a GP answers with: labels at new inputs, their average over GPs; how far a net is from a stationary point."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from gpytorch.distributions import MultivariateNormal
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent

from .metrics import entries


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
        predictions: at the same inputs, with the same number of outputs.
        weights: of the members, ``(S,)``, not negative, with sum one; equal by default.

    Returns:
        ``y`` is the mixture, with ``log_prob``, ``sample``, ``mean``, ``variance`` and, where the members have one,
        ``cdf`` of each entry; ``f`` is the Gaussian with the moments of the mixture.

    Raises:
        ValueError: for no predictions, shapes that differ, or weights that are none.
    """
    predictions = list(predictions)
    if not predictions:
        raise ValueError("There are no predictions to average.")
    shapes = [(p.mean.shape, p.f.batch_shape, p.f.event_shape) for p in predictions]
    for i, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"Prediction {i} has mean, f of shapes {[tuple(s) for s in shape]}, prediction 0 "
                f"{[tuple(s) for s in shapes[0]]}: predict at the same inputs, all with joint= or all without."
            )
    like = predictions[0].mean
    pi = torch.full((len(predictions),), 1 / len(predictions)) if weights is None else torch.as_tensor(weights)
    pi = pi.to(like)
    if pi.shape != (len(predictions),) or not (pi >= 0).all() or abs(float(pi.detach().sum()) - 1) > 1e-4:
        raise ValueError(
            f"weights must be {len(predictions)} numbers that are not negative and sum to one; got {pi.tolist()}."
        )

    def mean_of(values: Iterable[Tensor]) -> Tensor:
        return torch.tensordot(pi, torch.stack(list(values)), 1)

    mean, f_mean = mean_of(p.mean for p in predictions), mean_of(p.f.mean for p in predictions)
    covariances = []
    for p in predictions:
        away = (p.f.mean - f_mean).reshape(*p.f.batch_shape, -1)
        covariances.append(p.f.covariance_matrix + away[..., :, None] * away[..., None, :])
    return Prediction(
        mean,
        mean_of(p.aleatoric for p in predictions),
        mean_of(p.epistemic + (p.mean - mean).square() for p in predictions),
        type(predictions[0].f)(f_mean, mean_of(covariances)),
        _mixture([p.y for p in predictions], pi),
        None if predictions[0].probs is None else mean_of(p.probs for p in predictions),
    )


def _mixture(components: list[Distribution], weights: Tensor) -> Distribution:
    first = components[0]
    if isinstance(first, Categorical):
        return Categorical(probs=torch.tensordot(weights, torch.stack([c.probs for c in components]), 1))
    if isinstance(first, Independent) and isinstance(first.base_dist, Bernoulli) and first.event_shape == (1,):
        probs = torch.tensordot(weights, torch.stack([c.base_dist.probs for c in components]), 1)
        return Independent(Bernoulli(probs), 1)
    return Mixture(components, weights)


class Mixture(Distribution):
    """``sum_s pi_s p_s``, components of any kind and one shape.

    Args:
        components: distributions of one batch and event shape.
        weights: pi, ``(S,)``.
    """

    arg_constraints: dict = {}

    def __init__(self, components: Sequence[Distribution], weights: Tensor) -> None:
        self.components, self.weights = list(components), weights
        super().__init__(components[0].batch_shape, components[0].event_shape, validate_args=False)

    @property
    def support(self):
        return self.components[0].support

    @property
    def mean(self) -> Tensor:
        return self._average([c.mean for c in self.components])

    @property
    def variance(self) -> Tensor:
        mean = self.mean
        return self._average([c.variance + (c.mean - mean).square() for c in self.components])

    def log_prob(self, value: Tensor) -> Tensor:
        each = torch.stack([c.log_prob(value) for c in self.components], -1)
        return torch.logsumexp(each + self.weights.log(), -1)

    def cdf(self, value: Tensor) -> Tensor:
        """Of each entry by itself."""
        return self._average([entries(c).cdf(value) for c in self.components])

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Each draw of each batch element is one component's."""
        shape = torch.Size(sample_shape)
        which = torch.multinomial(self.weights, (shape + self.batch_shape).numel(), replacement=True)
        which = which.reshape(shape + self.batch_shape + (1,) * len(self.event_shape))
        with torch.no_grad():
            drawn = torch.stack([c.sample(shape) for c in self.components])
        return drawn.gather(0, which.expand(drawn.shape[1:])[None])[0]

    def _average(self, values: list[Tensor]) -> Tensor:
        return torch.tensordot(self.weights, torch.stack(values), 1)


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
