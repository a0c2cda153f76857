"""What a GP answers with: labels at new inputs, and how far the net is from a stationary point."""

from __future__ import annotations

from dataclasses import dataclass

from gpytorch.distributions import MultivariateNormal
from torch import Tensor
from torch.distributions import Distribution


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
