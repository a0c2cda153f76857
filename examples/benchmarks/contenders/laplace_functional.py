"""laplace-torch: ``FunctionalLaplace.fit``, which computes the kernel of all training points."""

from __future__ import annotations

import torch
from laplace import FunctionalLaplace
from laplace.curvature import BackPackGGN, CurvlinopsGGN
from loading import Result, free, load
from protocol import require, serve
from protocol import versions as installed
from torch.utils.data import DataLoader, TensorDataset


def settings(net: torch.nn.Module, n: int) -> tuple[type, int]:
    """Backend and batch: the fastest on LeNet-5; BackPACK knows chains of common layers only."""
    return (BackPackGGN, min(n, 100)) if isinstance(net, torch.nn.Sequential) else (CurvlinopsGGN, min(n, 16))


def prepare(case):
    net, x = load(case)
    num_weights, K = sum(p.numel() for p in net.parameters()), net(x[:1]).shape[1]
    n, (backend, batch) = len(x), settings(net, len(x))
    # Two batches of Jacobians, the matrix and its factor. Without BackPACK a batch is differentiated as a whole: the
    # outputs of every example in copies of the weights.
    copies = batch * K * num_weights
    require((2 * copies + 2 * (n * K) ** 2) * x.element_size(), free(case))
    y = torch.arange(n) % K

    def fit(x, y):
        la = FunctionalLaplace(net, "classification", n_subset=len(x), prior_precision=1.0, backend=backend)
        la.fit(DataLoader(TensorDataset(x, y), batch_size=min(batch, len(x))))
        return la

    def run():
        la = fit(x, y)
        places = la.train_loader.sampler.indices.argsort()  # it has shuffled the examples
        return Result(la.K_MM.unflatten(0, (n, K)).unflatten(2, (n, K))[places][:, :, places].flatten(2).flatten(0, 1))

    fit(x[:2], y[:2])
    return run


def versions(case):
    return installed("laplace-torch", "torch", "curvlinops-for-pytorch", "backpack-for-pytorch")


if __name__ == "__main__":
    serve(prepare, versions=versions)
