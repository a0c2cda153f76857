"""laplace-torch on the data of a table: predictions, as one array.

A case has ``task``:

- "marglik": `marglik_training` of a net with one hidden layer, for regression. Result: means and variances of the test
  labels, ``(2, m)``.
- "classes": a Laplace approximation of a given trained net. Result: class probabilities and two epistemic variances of
  each set of test inputs, one after the other, ``(m, K + 2)``.
"""

from __future__ import annotations

import warnings

import nets
import numpy as np
import torch
from laplace import Laplace, marglik_training
from laplace.curvature import BackPackGGN
from protocol import serve
from protocol import versions as installed
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def prepare(case):
    warnings.filterwarnings("ignore")
    torch.set_num_threads(case["threads"])
    with np.load(case["arrays"]) as arrays:
        arrays = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    torch.set_default_dtype(arrays["x"].dtype)  # its hyperparameters have the default
    torch.manual_seed(case["seed"])
    return {"marglik": marglik, "classes": classes}[case["task"]](case, arrays)


def marglik(case, arrays):
    x, y = arrays["x"], arrays["y"]
    net = nn.Sequential(nn.Linear(x.shape[1], case["width"]), nn.Tanh(), nn.Linear(case["width"], y.shape[1]))

    def run():
        # its defaults, but for these: full batches and as many epochs, at a learning rate, as train the net well
        la, *_ = marglik_training(
            net,
            DataLoader(TensorDataset(x, y), batch_size=len(x)),
            "regression",
            hessian_structure=case["structure"],
            backend=BackPackGGN,
            optimizer_kwargs={"lr": case["lr"]},
            n_epochs=case["epochs"],
            marglik_frequency=case["every"],
        )
        mean, variance = la(arrays["test_x"])
        return torch.stack([mean.flatten(), variance.flatten() + la.sigma_noise.square()]).detach().numpy()

    return run


def classes(case, arrays):
    x, y = arrays["x"], arrays["y"]
    weights = {name[2:]: array for name, array in arrays.items() if name.startswith("w:")}
    net = nets.make(case["net"]).to(x)
    net.load_state_dict(weights)
    net.eval()

    def run():
        la = Laplace(
            net,
            "classification",
            subset_of_weights=case["subset"],
            hessian_structure=case["structure"],
            backend=BackPackGGN,
        )
        la.fit(DataLoader(TensorDataset(x, y), batch_size=case["batch"]))
        if case["tune"] == "evidence":
            la.optimize_prior_precision(method="marglik")
        else:
            held_out = DataLoader(TensorDataset(arrays["held_x"], arrays["held_y"]), batch_size=case["batch"])
            la.optimize_prior_precision(
                method="gridsearch",
                pred_type="glm",
                link_approx=case["link"],
                val_loader=held_out,
                grid_size=25,  # from 1e-4 to 1e4, by the likelihood
            )
        tests = [predicted(la, arrays[name], case["batch"]) for name in sorted(arrays) if name.startswith("test")]
        return torch.cat(tests).numpy()

    return run


@torch.no_grad()
def predicted(la, x: Tensor, batch: int) -> Tensor:
    """Probabilities (probit), their summed variance over 200 draws, and that of the outputs, ``(m, K + 2)``.

    All from the moments of the outputs, which it computes anew for each call of ``la(x)`` or ``predictive_samples``.
    """
    parts = []
    for part in x.split(batch):
        f, covariance = la._glm_predictive_distribution(part)
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        probs = (f / (1 + torch.pi / 8 * variance).sqrt()).softmax(-1)
        samples = la._glm_predictive_samples(f, covariance, 200, diagonal_output=False)
        parts.append(torch.cat([probs, torch.stack([samples.var(0).sum(-1), variance.sum(-1)], -1)], -1).detach())
    return torch.cat(parts)


def versions(case):
    return installed("laplace-torch", "torch", "backpack-for-pytorch")


if __name__ == "__main__":
    serve(prepare, versions=versions)
