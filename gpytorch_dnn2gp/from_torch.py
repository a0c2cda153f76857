"""What people have, translated: batches of a loader into tensors, a torch loss into a negative log-likelihood.

Each torch loss is ``1/c`` times a sum of negative log-likelihoods (up to constants). Minimising it with weight decay
``wd`` is minimising the sum with ``delta = c wd``: up to the factor c both have the gradient
``sum_i J_i^T r_i + delta w``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from .losses import Bernoulli, Categorical, Gaussian, Loss, Poisson

LABEL_KEYS = ("y", "label", "labels", "target", "targets")


def collect(data: Iterable | tuple[Tensor, Tensor], unpack: Callable | None = None) -> tuple[Tensor, Tensor]:
    """All inputs and labels of ``data``, which is a pair of tensors or an iterable of batches."""
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        return data[0], data[1]
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise TypeError(
            f"data must be (x, y) or an iterable of batches such as a DataLoader; got {type(data).__name__}."
        )
    if isinstance(data, Mapping):
        return (unpack or _unpack)(data)
    with torch.random.fork_rng(devices=[]):  # iterating over a DataLoader draws from torch's global generator
        pairs = [(unpack or _unpack)(batch) for batch in data]
    if not pairs:
        raise ValueError("data has no batches.")
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def _unpack(batch: object) -> tuple[Tensor, Tensor]:
    if isinstance(batch, Mapping):
        labels = [key for key in batch if key in LABEL_KEYS]
        inputs = [key for key, value in batch.items() if key not in LABEL_KEYS and isinstance(value, Tensor)]
        if len(labels) == 1 and len(inputs) == 1:
            return batch[inputs[0]], batch[labels[0]]
        raise ValueError(
            f"A batch has the entries {', '.join(map(str, batch))}; which are inputs and which labels? Pass "
            "unpack=lambda batch: (batch[...], batch[...])."
        )
    if isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        return batch[0], batch[1]
    if type(batch).__module__ == "numpy":
        raise TypeError("data holds numpy arrays; pass tensors: (torch.as_tensor(x), torch.as_tensor(y)).")
    raise ValueError(
        f"A batch is a {type(batch).__name__}, not a pair of tensors (x, y) or a dict of them. Pass "
        "unpack=lambda batch: (x, y)."
    )


def translate_loss(
    torch_loss: nn.Module, f: Tensor, y: Tensor, sigma: float | Tensor | None = None
) -> tuple[Loss, Tensor, float | Tensor]:
    """The loss, its labels, and c: ``c * torch_loss = sum_i l(y_i, f_i)`` up to a constant.

    Args:
        torch_loss: MSELoss, CrossEntropyLoss, BCEWithLogitsLoss or PoissonNLLLoss.
        f: outputs ``(n, K)``.
        y: labels as the torch loss takes them.
        sigma: noise standard deviation, for MSELoss: one number, since one weight decay is one delta.
    """
    if not isinstance(torch_loss, nn.Module):
        raise TypeError(f"torch_loss must be a module such as nn.CrossEntropyLoss(); got {torch_loss!r}.")
    n, k = f.shape
    reduction = getattr(torch_loss, "reduction", None)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{torch_loss} has reduction={reduction!r}; 'mean' or 'sum' is what an optimizer minimises.")
    for option in ("weight", "pos_weight"):
        if getattr(torch_loss, option, None) is not None:
            raise ValueError(f"{type(torch_loss).__name__}({option}=...) is not translated; use losses.from_callable.")
    per_example, per_entry = (1, 1) if reduction == "sum" else (n, n * k)

    if not isinstance(torch_loss, nn.MSELoss) and sigma is not None:
        raise ValueError(f"sigma is the noise of MSELoss; {type(torch_loss).__name__} has none.")
    if isinstance(torch_loss, nn.MSELoss):
        if sigma is None:
            rms = (f.detach() - y.reshape(f.shape)).square().mean().sqrt() if y.numel() == f.numel() else torch.nan
            raise ValueError(
                "MSELoss says nothing of the noise: pass its standard deviation, sigma=. (The training residuals' root "
                f"mean square is {float(rms):.3g}; fit_evidence(gp) can tune it.)"
            )
        sigma = torch.as_tensor(sigma, dtype=f.dtype)
        if sigma.numel() != 1:
            raise ValueError("MSELoss weighs all outputs alike, so it has one sigma; set gp.noise per output later.")
        return Gaussian(sigma.reshape(())), y, per_entry / (2 * sigma.reshape(()) ** 2)
    if isinstance(torch_loss, nn.CrossEntropyLoss):
        if not y.is_floating_point() and (y == torch_loss.ignore_index).any():
            raise ValueError(f"Some labels are ignore_index={torch_loss.ignore_index}; remove these examples first.")
        if torch_loss.label_smoothing:
            hard = y if y.is_floating_point() else torch.nn.functional.one_hot(y.long(), k).to(f)
            y = (1 - torch_loss.label_smoothing) * hard + torch_loss.label_smoothing / k
        return Categorical(), y, per_example
    if isinstance(torch_loss, nn.BCEWithLogitsLoss):
        return Bernoulli(), y, per_entry
    if isinstance(torch_loss, nn.PoissonNLLLoss) and torch_loss.log_input:
        return Poisson(), y, per_entry
    raise ValueError(
        f"{torch_loss} is not translated. There are MSELoss, CrossEntropyLoss, BCEWithLogitsLoss and "
        "PoissonNLLLoss(log_input=True); for others build LaplaceGP(net, x, y, loss, prior_precision) with a loss from "
        "gpytorch_dnn2gp.losses."
    )
