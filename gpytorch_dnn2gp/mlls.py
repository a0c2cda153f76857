"""Marginal likelihoods by GPyTorch's conventions: ``mll(output, target)``, per datum, priors added.

``LaplaceMarginalLogLikelihood`` is the Laplace evidence, which every loss has. GPyTorch's own
``ExactMarginalLogLikelihood`` on a ``LaplaceGP`` is the GP evidence of a Gaussian loss.
"""

from __future__ import annotations

import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import Tensor

from .gp import LaplaceGP
from .likelihoods import GGNLikelihood


class LaplaceMarginalLogLikelihood(ExactMarginalLogLikelihood):
    """The Laplace evidence divided by the number of data, n K.

    Args:
        likelihood: ``gp.likelihood``.
        model: a :class:`LaplaceGP`.

    The evidence is that of the model's own training data: ``output`` must be ``model(*model.train_inputs)`` in train
    mode, and ``target`` ``model.train_targets``. It takes the closed form whatever GPyTorch's settings are.
    """

    def __init__(self, likelihood: GGNLikelihood, model: LaplaceGP) -> None:
        if not isinstance(model, LaplaceGP):
            raise TypeError(f"LaplaceMarginalLogLikelihood is for a LaplaceGP; got {type(model).__name__}.")
        if likelihood is not model.likelihood:
            raise ValueError("The likelihood must be the model's own, gp.likelihood.")
        super().__init__(likelihood, model)

    def forward(self, function_dist: MultivariateNormal, target: Tensor, *params, **kwargs) -> Tensor:
        """The evidence, a scalar."""
        if target.shape != self.model.train_targets.shape or not torch.equal(target, self.model.train_targets):
            raise ValueError("The evidence of a LaplaceGP is that of its own data: pass target=gp.train_targets.")
        evidence = self._add_other_terms(self.model.log_evidence(), params)
        return evidence / function_dist.event_shape.numel()
