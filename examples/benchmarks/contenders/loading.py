"""The net and the inputs of a case, in torch."""

from __future__ import annotations

import nets
import numpy as np
import torch
from protocol import free_memory
from torch import Tensor, nn


def load(case: dict) -> tuple[nn.Module, Tensor]:
    """The net with the weights of the case, in eval mode, and the inputs."""
    torch.set_num_threads(case["threads"])
    with np.load(case["arrays"]) as arrays:
        arrays = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    net = nets.make(case["net"])
    net.load_state_dict({name[2:]: array for name, array in arrays.items() if name != "x"})
    x = arrays["x"].to(case["device"])
    return net.to(x), x


def free(case: dict) -> int:
    """Bytes of memory that are available on the device of the case."""
    return torch.cuda.mem_get_info()[0] if case["device"] == "cuda" else free_memory()


def wait(case: dict) -> None:
    """Until the device has done what it was told."""
    if case["device"] == "cuda":
        torch.cuda.synchronize()


def cuda_peak(case: dict) -> dict:
    """Peak and present memory on the device, in bytes."""
    return {"peak": torch.cuda.max_memory_allocated(), "now": torch.cuda.memory_allocated()}


class Result:
    """A tensor, as numpy wants it when it is asked for."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.tensor.cpu().numpy()
