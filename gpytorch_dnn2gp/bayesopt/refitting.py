"""When a surrogate is trained again, and when new data are only conditioned on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RefitWhen:
    """A policy: train again if one of its conditions holds.

    Attributes:
        every: so many new points have come since the last training; None for no such rule.
        evidence_falls_by: the evidence per point has fallen by so many nats since then; None for no such rule.
    """

    every: int | None = None
    evidence_falls_by: float | None = None

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ValueError(f"every must be one at least; got {self.every}.")
        if self.evidence_falls_by is not None and not self.evidence_falls_by >= 0:
            raise ValueError(f"evidence_falls_by must be zero or more, in nats; got {self.evidence_falls_by}.")

    def due(self, new_points: int, evidence_before: float, evidence_now: float) -> bool:
        """Whether to train again.

        Args:
            new_points: since the last training.
            evidence_before, evidence_now: per point, in nats, after the last training and with the new points.
        """
        if self.every is not None and new_points >= self.every:
            return True
        return self.evidence_falls_by is not None and not evidence_now > evidence_before - self.evidence_falls_by


EVERY_CALL = RefitWhen(every=1)
