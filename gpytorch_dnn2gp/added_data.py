"""The data that a GP was conditioned on: shapes, batches of fantasies, and what comes before what.

Inputs X are ``(b..., q, d)``, labels ``(f..., b..., q, ...)``: several fantasies f of the labels at the same inputs. q
added examples, K outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .linearize import Linearization, Rows
from .losses import Loss


@dataclass(frozen=True)
class AddedData:
    """Added examples with their rows J(X) and outputs.

    Attributes:
        inputs: ``(b..., q, d)``.
        labels: canonical, ``(f..., b..., q, D)``, or ``(f..., b..., q)`` for class indices.
        noise: sigma^2 of these examples ``(q, K)`` where it was given, NaN for the GP's own; None where none was given.
        rows: at ``inputs``.
        outputs: of the net, ``(f..., b..., q, K)``.
    """

    inputs: Tensor
    labels: Tensor
    noise: Tensor | None
    rows: Rows
    outputs: Tensor

    @classmethod
    def at(cls, lin: Linearization, inputs: Tensor, labels: Tensor, noise: Tensor | None, event_dims: int) -> AddedData:
        """The net evaluated there; ``event_dims`` is the number of label dimensions that are no batch."""
        rows = lin.rows(inputs)
        batch = torch.broadcast_shapes(labels.shape[: labels.dim() - event_dims], inputs.shape[:-2])
        outputs = lin.function.outputs(rows.x).unflatten(0, rows.batch_shape).expand(*batch, -1, -1)
        return cls(inputs, expand_batch(labels, batch, event_dims), noise, rows, outputs)

    @property
    def batch_shape(self) -> torch.Size:
        """``(f..., b...)``."""
        return self.outputs.shape[:-2]

    @property
    def carries_graph(self) -> bool:
        """Whether something is to be differentiated in them."""
        return self.inputs.requires_grad or self.labels.requires_grad

    def noise_or(self, own: Tensor | None) -> Tensor | None:
        """sigma^2 of these examples, where ``own`` is the GP's."""
        if self.noise is None or not self.noise.isnan().any():
            return own if self.noise is None else self.noise
        return torch.where(self.noise.isnan(), own, self.noise)

    def then(
        self, inputs: Tensor, labels: Tensor, noise: Tensor | None, event_dims: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Inputs, labels and noise of these data and later ones: conditioning twice is conditioning once on both."""
        inputs_batch = torch.broadcast_shapes(self.inputs.shape[:-2], inputs.shape[:-2])
        batch = torch.broadcast_shapes(self.batch_shape, labels.shape[: labels.dim() - event_dims], inputs_batch)
        both = [expand_batch(part, batch, event_dims) for part in (self.labels, labels)]
        all_inputs = torch.cat([expand_batch(part, inputs_batch, 2) for part in (self.inputs, inputs)], -2)
        if self.noise is None and noise is None:
            return all_inputs, torch.cat(both, len(batch)), None
        k = self.outputs.shape[-1]
        sizes = (self.inputs.shape[-2], inputs.shape[-2])
        own = inputs.new_tensor(torch.nan)
        noises = [
            (own if part is None else part).expand(size, k)
            for part, size in zip((self.noise, noise), sizes, strict=True)
        ]
        return all_inputs, torch.cat(both, len(batch)), torch.cat(noises)


def canonical_labels(loss: Loss, y: Tensor, inputs: Tensor, like: Tensor, f: Tensor) -> Tensor:
    """Labels ``(f..., b..., q, ...)`` for ``inputs`` ``(b..., q, d)``, checked and in the form of those the GP has.

    Args:
        loss: that checks them.
        y: labels; without their last dimension where it is 1.
        inputs: ``(b..., q, d)``.
        like: canonical labels of the GP, ``(n, ...)``.
        f: outputs of the GP's data, ``(n, K)``, for dtype and device.
    """
    q, event, inputs_batch = inputs.shape[-2], like.shape[1:], inputs.shape[:-2]

    def fits(labels: Tensor) -> bool:
        """Whether they read as ``(f..., b..., q, ...)``, b being the batch of the inputs."""
        batch = labels.shape[: labels.dim() - 1 - len(event)]
        return (
            labels.dim() >= 1 + len(event)
            and labels.shape[len(batch)] == q
            and labels.shape[len(batch) + 1 :] == event
            and batch[len(batch) - len(inputs_batch) :] == inputs_batch
        )

    if event == (1,) and not fits(y) and fits(y.unsqueeze(-1)):
        y = y.unsqueeze(-1)
    if not fits(y):
        raise ValueError(
            f"Labels of shape {tuple(y.shape)} do not fit {q} new inputs: they must be "
            f"({', '.join(map(str, ('...', *inputs_batch, q, *event)))})."
        )
    batch = y.shape[: y.dim() - 1 - len(event)]
    flat = loss.check_labels(y.reshape(-1, *event), f.shape[-1], None, f.dtype, f.device)
    return flat.reshape(*batch, q, *flat.shape[1:])


def expand_batch(tensor: Tensor, batch: torch.Size, event_dims: int) -> Tensor:
    """``tensor`` with the batch dimensions ``batch`` before its ``event_dims`` last ones."""
    missing = len(batch) - (tensor.dim() - event_dims)
    return tensor[(None,) * missing].expand(*batch, *tensor.shape[tensor.dim() - event_dims :])
