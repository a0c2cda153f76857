"""What a ``state_dict`` belongs to: hyperparameters and weights are in it, the data are not, but they are recognised.

Loaded into another model of the same shapes, a ``state_dict`` of GPyTorch predicts something else without a word. Here
a digest of data and structure goes with it, in a tensor, as BoTorch takes every entry for one.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from . import losses
from .losses import Loss

LOSSES = ("Gaussian", "Bernoulli", "Categorical", "Poisson", "HeteroscedasticGaussian")
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


# ---- what a description cannot say, by value


@torch.no_grad()
def hyperparameters(module: nn.Module) -> list:
    """Shapes of a module's parameters, and what their constraints make of raw values.

    Bounds are left out: a ``state_dict`` holds them.
    """
    points = torch.tensor([-2.0, -0.3, 0.0, 0.4, 1.7], dtype=torch.float64)
    found = []
    for name, part in module.named_modules():
        if "linearization" in name.split("."):
            continue
        for raw, parameter in part.named_parameters(recurse=False):
            values, constraint = points, getattr(part, f"{raw}_constraint", None)
            shapes = [list(parameter.shape)]
            if constraint is not None:
                shapes += [list(constraint.lower_bound.shape), list(constraint.upper_bound.shape)]
                constraint = copy.deepcopy(constraint).cpu()
                constraint.lower_bound, constraint.upper_bound = points.new_zeros(()), points.new_ones(())
                values = constraint.transform(points)
            # six digits, which machines agree on
            found.append([name, raw, shapes, [f"{value + 0.0:.6g}" for value in values.tolist()]])
    return found


def is_own(loss: Loss) -> bool:
    """Whether a loss has functions of one's own, of which only values can be compared."""
    name = type(loss).__name__
    return name not in LOSSES or type(loss) is not getattr(losses, name) or callable(getattr(loss, "link", None))


@torch.no_grad()
def loss_values(loss: Loss, f: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What to recognise a loss by: its value, r and the diagonal of Lambda."""
    return {
        "negative_log_likelihood": loss.negative_log_likelihood(f, y).detach(),
        "residual": loss.residual(f, y).detach(),
        "noise_precision": loss.noise_precision(f, y).detach().diagonal(dim1=-2, dim2=-1),
    }


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding in another order."""
    if a.shape != b.shape:
        return False
    return bool((a - b).abs().max() <= 10 * torch.finfo(a.dtype).eps ** 0.5 * (1 + b.abs().max()))


# ---- load_state_dict changes one GP, wholly or not at all


def before_loading(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """A hook that remembers what a part of a GP has, and gives it a net of its own if the one in the state differs.

    Other GPs may share the net, so that nothing may be written into it.
    """
    lin = getattr(module, "linearization", None)
    if prefix and "_before_loading" not in vars(module):  # without a prefix it is loaded alone
        tensors = {name: tensor.detach().clone() for name, tensor in _own_tensors(module)}
        vars(module)["_before_loading"] = (lin, tensors)
    if lin is not None and _differs(lin, state, f"{prefix}linearization."):
        module.linearization = copy.deepcopy(lin)


def has_new_net(module: nn.Module) -> bool:
    """Whether the net is another one since :func:`before_loading`."""
    return "_before_loading" in vars(module) and vars(module)["_before_loading"][0] is not module.linearization


def forget(module: nn.Module) -> None:
    """The state that was loaded stays."""
    vars(module).pop("_before_loading", None)


def restore(module: nn.Module) -> None:
    """As it was before loading began."""
    lin, tensors = vars(module).pop("_before_loading", (None, {}))
    if lin is not None:
        module.linearization = lin
    for name, tensor in _own_tensors(module):
        if name in tensors:
            tensor.data = tensors[name]


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not name.startswith("linearization."):
            yield name, tensor


def _differs(module: nn.Module, state: dict[str, Tensor], prefix: str) -> bool:
    own = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return any(
        isinstance(state.get(prefix + name), Tensor) and not torch.equal(state[prefix + name].to(tensor), tensor)
        for name, tensor in own
    )
