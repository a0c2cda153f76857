"""The six settings of GPyTorch that ``import botorch`` changes for the whole process, either way while a test runs."""

import contextlib

import gpytorch.settings
import linear_operator.settings

FAST = ("_fast_covar_root_decomposition", "_fast_log_prob", "_fast_solves")
SIZES = (
    (linear_operator.settings.cholesky_max_tries, 3, 6),
    (linear_operator.settings.max_cholesky_size, 800, 4096),
    (gpytorch.settings.max_eager_kernel_size, 512, 4096),
)


@contextlib.contextmanager
def _settings(botorch: bool):
    fast = [getattr(linear_operator.settings, name) for name in FAST]
    before = [setting._default for setting in fast], [setting._global_value for setting, _, _ in SIZES]
    try:
        for setting in fast:
            setting._default = not botorch
        for setting, without, with_botorch in SIZES:
            setting._global_value = with_botorch if botorch else without
        yield
    finally:
        for setting, value in zip(fast, before[0], strict=True):
            setting._default = value
        for (setting, _, _), value in zip(SIZES, before[1], strict=True):
            setting._global_value = value


def botorch_on():
    """As after ``import botorch``."""
    return _settings(True)


def botorch_off():
    """As without it."""
    return _settings(False)
