"""What every test shares: reproducible randomness, the reference numbers, the folder of data sets."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # no windows; read when matplotlib is first imported

import hypothesis
import numpy as np
import pytest
import torch

# The problems are tiny: a second thread only waits, and on a busy machine it waits long.
torch.set_num_threads(1)

REFERENCE = Path(__file__).parent / "reference"


class _TorchRandom:
    """torch's global generator, in the words Hypothesis knows from `random.Random`."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


# Each example of a property test starts from the same torch seed, else a failure could not be replayed or shrunk.
# To vary what torch draws, let Hypothesis draw a seed.
_TORCH_RANDOM = _TorchRandom()
hypothesis.register_random(_TORCH_RANDOM)

# too_slow measures the clock, and a loaded machine is no property of the code.
hypothesis.settings.register_profile(
    "derandomized", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("derandomized")


@pytest.fixture(autouse=True)
def seed():
    """Runs the test with torch seeded by 0, then puts torch's random state back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def no_figures_left():
    """Closes the figures that a test has opened."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of data sets named by the environment variable DNN2GP_DATA; the test is skipped without it."""
    folder = os.environ.get("DNN2GP_DATA")
    if not folder:
        pytest.skip("needs data sets: set DNN2GP_DATA to their folder (CONTRIBUTING.md lists what it holds)")
    if not Path(folder).is_dir():
        pytest.fail(f"DNN2GP_DATA is {folder!r}, which is no folder", pytrace=False)
    return Path(folder)


@pytest.fixture(scope="session")
def reference():
    """Loader of reference numbers: ``reference("dnn2gp/regression_a")``, see tests/reference/README.md.

    It returns a new dict of tensors (numbers float64, indices and class labels int64). Two entries are put together:
    ``meta``, a dict, and ``params``, the net's parameters by name, in their order.
    """

    def load(name: str) -> dict:
        path = REFERENCE / f"{name}.npz"
        if not path.exists():
            known = sorted(p.relative_to(REFERENCE).with_suffix("").as_posix() for p in REFERENCE.rglob("*.npz"))
            raise FileNotFoundError(f"no reference {name!r}; there are {', '.join(known)}")
        with np.load(path) as archive:
            arrays = dict(archive)
        loaded: dict = {"meta": json.loads(str(arrays.pop("meta"))), "params": {}}
        for key, array in arrays.items():
            place, key = (loaded["params"], key[len("param.") :]) if key.startswith("param.") else (loaded, key)
            place[key] = torch.from_numpy(array)
        return loaded

    return load


def pytest_addoption(parser):
    parser.addoption(
        "--seeds",
        type=lambda text: range(*map(int, text.split(":"))),
        default=range(10, 300, 11),
        help="seeds of the random nets in test_fuzz_gram.py, FIRST:END or FIRST:END:STEP (default 10:300:11)",
    )
