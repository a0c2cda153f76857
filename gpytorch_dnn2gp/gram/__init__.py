"""Gram matrices of a net's Jacobian features, layer by layer, without Jacobians.

    rules.py      what a layer's own Jacobian looks like: the rules, and ``register`` for one's own
    contract.py   products of such Jacobians in the cheapest order
    capture.py    inputs and cotangents of every layer, for chunks of examples
    coverage.py   which parameters the rules cover, and the check against plain autodiff
    features.py   the three together: features of given examples
    matrix.py     the Gram matrix, tile by tile, in memory or in a file
    diagonals.py  what costs n, not n^2: its diagonal blocks, and diag(J^T J)

Rows are example-major, output-minor: entry ``[i K + k, j K + l]``.
"""

from .coverage import FallbackWarning
from .diagonals import gram_blocks, gram_diagonal, sum_of_squares
from .matrix import Side, batched_gram, form_features, gram
from .rules import Outer, register

__all__ = [
    "FallbackWarning",
    "Outer",
    "Side",
    "batched_gram",
    "form_features",
    "gram",
    "gram_blocks",
    "gram_diagonal",
    "register",
    "sum_of_squares",
]
