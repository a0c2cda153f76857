"""The house: modules stand in one order, and each imports only from those above it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gpytorch_dnn2gp"

# Reading order = import order = the paper's order. A new module takes its place here and in docs/architecture.md.
HOUSE = [
    "numerics",
    "tiling",
    "losses",
    "predictive",
    "mixtures",
    "metrics",
    "from_torch",
    "exact_operations",
    "jacobians",
    "gram",
    "squares",
    "linearize",
    "weights",
    "laplace",
    "optim",
    "dual",
    "linear_model",
    "solvers",
    "conditioning",
    "added_data",
    "model_state",
    "operators",
    "kernels",
    "likelihoods",
    "prediction",
    "gp",
    "variational",
    "serialization",
    "mlls",
    "plotting",
    "training",
    "selection",
    "bayesopt",
    "infinite",
]
FIRST_WITH_GPYTORCH = "kernels"
ONLY_WITH_BOTORCH = "bayesopt"

FILES = sorted(PACKAGE.rglob("*.py"))
FILE_IDS = [path.relative_to(PACKAGE).as_posix() for path in FILES]


def module_of(path: Path) -> str:
    """The name in the house: the file's, or that of the subpackage it is in; ``__init__`` for the package's own."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path, source: str | None = None) -> set[str]:
    """Dotted names of all that a file imports, wherever in the file, relative imports resolved."""
    here = (PACKAGE.name, *path.relative_to(PACKAGE).parent.parts)  # the package that `from . import` means
    names = set()
    for node in ast.walk(ast.parse(source or path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            base = ".".join((*base, *([node.module] if node.module else [])))
            # `from package import module` and `from module import name` look alike: keep the longer reading
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def houses_in(names: set[str]) -> set[str]:
    """Modules of this package among dotted names; a name of the package itself counts as ``__init__``."""
    parts = [name.split(".") for name in names]
    inner = [p[1] if len(p) > 1 else "__init__" for p in parts if p[0] == PACKAGE.name]
    known = {module_of(path) for path in FILES} | set(HOUSE)
    return {name if name in known else "__init__" for name in inner}


def others_in(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_the_package_is_found():
    assert PACKAGE / "__init__.py" in FILES


@pytest.mark.parametrize("path", FILES, ids=FILE_IDS)
def test_every_module_has_its_place_in_the_house(path):
    assert module_of(path) in [*HOUSE, "__init__"], (
        f"{path.name} has no place in the house: put it into HOUSE of {Path(__file__).name}, after all that it "
        "imports, and into docs/architecture.md"
    )


@pytest.mark.parametrize("path", FILES, ids=FILE_IDS)
def test_a_module_imports_only_from_those_above_it(path):
    here = module_of(path)
    if here == "__init__" or here not in HOUSE:
        return
    above = set(HOUSE[: HOUSE.index(here)]) | ({here} if path.parent != PACKAGE else set())
    wrong = houses_in(imports_of(path)) - above
    assert not wrong, f"{here} imports {sorted(wrong)}, which do not stand above it"


@pytest.mark.parametrize("path", FILES, ids=FILE_IDS)
def test_gpytorch_comes_in_with_the_kernels_and_botorch_in_one_leaf(path):
    here, others = module_of(path), others_in(imports_of(path))
    if here in HOUSE and HOUSE.index(here) < HOUSE.index(FIRST_WITH_GPYTORCH):
        assert "gpytorch" not in others, f"{here} stands above {FIRST_WITH_GPYTORCH}: torch and linear_operator only"
    if here != ONLY_WITH_BOTORCH:
        assert "botorch" not in others, "importing botorch changes GPyTorch's settings for the whole process"


def test_infinite_width_needs_no_trained_net():
    """It sees numbers, tiles and pictures alone."""
    names = set().union(*(imports_of(path) for path in FILES if module_of(path) == "infinite"))
    assert houses_in(names) <= {"infinite", "numerics", "tiling", "plotting"}


def test_imports_are_read_in_every_form():
    source = """
import torch.nn as nn
from gpytorch.kernels import Kernel
from . import numerics
from .losses import Loss
from gpytorch_dnn2gp import gram, LaplaceGP
def late():
    import gpytorch_dnn2gp.dual
    from .. import elsewhere
"""
    names = imports_of(PACKAGE / "kernels.py", source)
    assert houses_in(names) == {"numerics", "losses", "gram", "dual", "__init__"}
    assert {"torch", "gpytorch"} <= others_in(names)
    assert houses_in(imports_of(PACKAGE / "sub" / "one.py", "from ..gram import f\nfrom . import two")) == {
        "gram",
        "__init__",  # `sub` is no module of the house
    }


def test_the_picture_of_the_house_is_true():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = re.search(r"## The house.*?```\w*\n(.*?)```", text, flags=re.DOTALL).group(1)
    named = [name for name in re.findall(r"^ +(\w+)(?:\.py|/)", picture, flags=re.MULTILINE) if name != "__init__"]
    missing = {module_of(path) for path in FILES} - {"__init__"} - set(named)
    assert not missing, f"docs/architecture.md does not show {sorted(missing)}"
    assert named == [name for name in HOUSE if name in named], "docs/architecture.md shows another order than HOUSE"


IMPORT_CHANGES_NOTHING = """
import random, sys, warnings
import numpy, torch, gpytorch, linear_operator
import scipy.optimize  # scipy adds two filters for its own warnings

def state():
    # settings keep their state in class attributes
    classes = {
        f"{module.__name__}.{name}": cls
        for module in (gpytorch.settings, gpytorch.beta_features, linear_operator.settings)
        for name, cls in vars(module).items() if isinstance(cls, type)
    }
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "torch seed": torch.get_rng_state().tolist(),
        "numpy seed": str(numpy.random.get_state()),
        "python seed": random.getstate(),
        "warnings": list(warnings.filters),
        **{f"{name}.{key}": repr(value) for name, cls in classes.items() for key, value in vars(cls).items()},
    }

before = state()
import gpytorch_dnn2gp
after = state()
assert after == before, {key for key in after if after[key] != before[key]}
assert "botorch" not in sys.modules

import botorch  # the guard is awake: it sees what importing botorch does to the settings
assert state() != before
"""


def test_importing_the_package_changes_nothing_global():
    run = subprocess.run([sys.executable, "-c", IMPORT_CHANGES_NOTHING], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
