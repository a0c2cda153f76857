"""BoTorch surrogates of nets, and search by evidence; a leaf of the package, and its only part that imports botorch.

    DNN2GPModel       a BoTorch model: small nets trained with their evidence, then an exact GP (surrogate.py)
    RefitWhen         when ``model.refit(X, Y)`` trains again, and when it conditions in closed form (refitting.py)
    fitting           several nets at once, with delta, sigma and a residual kernel by evidence
    search            hyperparameters of a net by evidence, with BoTorch as the optimiser (search.py)

``import gpytorch_dnn2gp`` does not load it, as importing botorch changes six settings of GPyTorch for the whole
process; ``gpytorch_dnn2gp.bayesopt`` does when first asked for.
"""

from . import fitting
from .fitting import smooth_mlp
from .refitting import RefitWhen
from .search import Choice, Float, Int, Search, search
from .surrogate import DNN2GPModel

__all__ = ["Choice", "DNN2GPModel", "Float", "Int", "RefitWhen", "Search", "fitting", "search", "smooth_mlp"]
