"""Models chosen by evidence, without a validation set."""

from __future__ import annotations

from .mlls import EvidenceFit, fit_evidence

__all__ = ["EvidenceFit", "fit_evidence"]
