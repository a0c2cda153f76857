"""Classification as regression on one-hot targets (Lee et al. 2018): an ``ExactGP`` with one Cholesky for all classes.

t_ik = 1[class of i is k] - 1/K,   f_k ~ GP(0, k) independent,   t_ik = f_k(x_i) + noise
"""

from __future__ import annotations

import gpytorch
import torch
from gpytorch.constraints import GreaterThan
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ZeroMean
from gpytorch.models import ExactGP
from torch import Tensor

from .. import tiling
from ..numerics import cholesky


class SharedNoise(GaussianLikelihood):
    """One noise for a batch of targets that share a covariance, which is then not repeated for each of them."""

    def _shaped_noise_covar(self, base_shape: torch.Size, *params, **kwargs):
        return super()._shaped_noise_covar(base_shape[-1:], *params, **kwargs)


class OneHotGP(ExactGP):
    """A GP for each class, on one-hot targets, all with the same kernel.

    It is plain GPyTorch: ``gp(x)`` is a batch of K normal distributions, and
    ``gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)`` gives an evidence for each class, per datum.

    Args:
        train_x: ``(n, d)``.
        classes: ``(n,)``, integers from 0.
        kernel: any GPyTorch kernel.
        num_classes: K; by default as many as there are in ``classes``.
        noise: sigma^2 of the targets, learnable; at least 1e-10, which is what Lee et al. start from.
    """

    def __init__(
        self, train_x: Tensor, classes: Tensor, kernel: Kernel, num_classes: int | None = None, noise: float = 1e-6
    ) -> None:
        if classes.dim() != 1 or len(classes) != train_x.shape[-2] or classes.is_floating_point():
            raise ValueError(
                f"classes must be integers, one for each of the {train_x.shape[-2]} inputs; got {classes.dtype} of "
                f"shape {tuple(classes.shape)}."
            )
        largest = int(classes.max()) + 1 if len(classes) else 0
        K = largest if num_classes is None else num_classes
        if largest > K or (len(classes) and int(classes.min()) < 0):
            raise ValueError(f"classes must be in 0, ..., {K - 1}; got {int(classes.min())} to {largest - 1}.")
        targets = torch.nn.functional.one_hot(classes.long(), K).to(train_x).mT - 1 / K
        constraint = GreaterThan(1e-10, transform=torch.exp, inv_transform=torch.log)
        likelihood = SharedNoise(noise_constraint=constraint).to(train_x)
        likelihood.noise = max(noise, 2e-10)
        super().__init__(train_x, targets, likelihood)
        self.mean_module = ZeroMean(batch_shape=torch.Size([K]))
        self.covar_module = kernel

    def forward(self, x: Tensor) -> MultivariateNormal:
        """Prior of the K functions at ``x``."""
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))

    def evidence(self) -> Tensor:
        """Log marginal likelihood of all classes, in nats; differentiable in the hyperparameters."""
        training = self.training
        try:
            self.train()
            with gpytorch.settings.max_cholesky_size(10**9):
                marginal = self.likelihood(self(self.train_inputs[0]))
                return marginal.log_prob(self.train_targets).sum()
        finally:
            self.train(training)

    @torch.no_grad()
    def predict(self, x: Tensor, progress: bool | None = None) -> tuple[Tensor, Tensor]:
        """Means ``(m, K)`` of the targets, the largest for the class, and the variance ``(m,)`` that all share.

        In chunks, with a progress bar (True, False, or None for terminals only). The variance is f's, without noise.
        """
        train_x, targets = self.train_inputs[0], self.train_targets
        K = self.covar_module(train_x).to_dense()
        tiling.require_memory(
            2 * K.numel(), K.dtype, K.device, "The kernel matrix with its factor", "Use fewer points."
        )
        K.diagonal().add_(self.likelihood.noise)
        root = cholesky(K, "The kernel matrix with its noise")
        weights = torch.cholesky_solve(targets.mT, root)  # (n, K)
        means, variances = [], []
        length = tiling.chunk_length(4 * len(train_x), K.dtype, K.device)
        for part in tiling.progress(tiling.chunks(len(x), length), "Predictions", progress):
            across = self.covar_module(x[part], train_x).to_dense()
            means.append(across @ weights)
            inner = torch.linalg.solve_triangular(root, across.mT, upper=False)
            variances.append(self.covar_module(x[part], diag=True) - inner.square().sum(0))
        return torch.cat(means), torch.cat(variances)
