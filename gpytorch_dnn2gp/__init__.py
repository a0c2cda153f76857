"""A trained deep network is a Gaussian process: kernel, likelihood, posterior and evidence for GPyTorch.

The theorems are those of Khan, Immer, Abedi and Korzepa (NeurIPS 2019); docs/notation.md maps their letters to names.
"""

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
from .prediction import Prediction, Stationarity, StationarityWarning
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
