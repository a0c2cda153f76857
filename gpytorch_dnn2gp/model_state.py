"""What a ``state_dict`` belongs to: hyperparameters and weights are in it, the data are not, but they are recognised.

Loaded into another model of the same shapes, a ``state_dict`` of GPyTorch predicts something else without a word. Here
a digest of data and structure goes with it, in a tensor, as BoTorch takes every entry for one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from torch import Tensor, nn

DIGEST_SIZE = hashlib.sha256().digest_size


def digest(structure: dict, data: Sequence[Tensor]) -> list[int]:
    """SHA-256 of a description and of tensors, as ``DIGEST_SIZE`` small integers."""
    sha = hashlib.sha256(json.dumps(structure).encode())
    for tensor in data:
        sha.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return list(sha.digest())


def described(module: nn.Module) -> list:
    """Classes and plain attributes (Matern's nu, say) of a module and all within it."""
    plain = (bool, int, float, str)
    return [
        [name, type(part).__name__, {k: v for k, v in vars(part).items() if isinstance(v, plain) and k != "training"}]
        for name, part in module.named_modules()
    ]
