"""A trained deep network is a Gaussian process: kernel, likelihood, posterior and evidence for GPyTorch.

The theorems are those of Khan, Immer, Abedi and Korzepa (NeurIPS 2019); docs/notation.md maps their letters to names.
"""

import importlib

from . import (
    dual,
    gram,
    infinite,
    laplace,
    losses,
    metrics,
    mlls,
    numerics,
    optim,
    plotting,
    predictive,
    selection,
    solvers,
    tiling,
    training,
    weights,
)
from .gp import LaplaceGP
from .kernels import JacobianKernel, NetworkMean
from .likelihoods import GGNLikelihood
from .linearize import Linearization
from .numerics import NumericalWarning
from .prediction import Prediction, Stationarity, StationarityWarning, average
from .selection import compare, fit_evidence
from .serialization import load, save
from .variational import VariationalGP, sampling_predictive

__version__ = "0.1.0"

__all__ = [
    "GGNLikelihood",
    "JacobianKernel",
    "LaplaceGP",
    "Linearization",
    "NetworkMean",
    "NumericalWarning",
    "Prediction",
    "Stationarity",
    "StationarityWarning",
    "VariationalGP",
    "average",
    "compare",
    "dual",
    "fit_evidence",
    "gram",
    "infinite",
    "laplace",
    "load",
    "losses",
    "metrics",
    "mlls",
    "numerics",
    "optim",
    "plotting",
    "predictive",
    "sampling_predictive",
    "save",
    "selection",
    "solvers",
    "tiling",
    "training",
    "weights",
]


def __getattr__(name: str):
    """``bayesopt`` is imported when first asked for, as it imports botorch, which changes GPyTorch's settings."""
    if name == "bayesopt":
        return importlib.import_module(f"{__name__}.bayesopt")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "bayesopt"})
