"""float32 agrees with float64 to 1e-3, or says that it cannot."""

import copy
import math
import warnings

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import relative_error
from problems import CASES, F64, PREDICTED, SOLVERS, Problem, covariance, flat_mean, problem

import gpytorch_dnn2gp as dnn2gp
from gpytorch_dnn2gp.numerics import NumericalWarning

TOLERANCE = 1e-3


def in_single(p: Problem) -> Problem:
    """The same problem rounded to float32, and ``p`` itself moved to those rounded numbers: one problem, two types."""
    p = copy.deepcopy(p)

    def rounded(t: torch.Tensor) -> torch.Tensor:
        return t.float() if t.is_floating_point() else t

    p.net = p.net.float()
    p.x, p.y, p.x_test = rounded(p.x), rounded(p.y), rounded(p.x_test)
    p.loss_kwargs = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in p.loss_kwargs.items()}
    return p


def in_double(p: Problem) -> Problem:
    p = copy.deepcopy(p)
    p.net = p.net.double()
    p.x, p.y, p.x_test = (t.double() if t.is_floating_point() else t for t in (p.x, p.y, p.x_test))
    p.loss_kwargs = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in p.loss_kwargs.items()}
    return p


def answers(p: Problem, delta: float, solver: str, labels: bool = True) -> dict[str, torch.Tensor]:
    gp = p.gp(delta, solver=solver)
    f = gp(p.x_test)
    values = {"mean": flat_mean(f), "covariance": covariance(f)}
    if labels:
        prediction = p.predict(gp, p.x_test)
        values |= {"label mean": prediction.mean, "label variance": prediction.variance}
        values |= {"epistemic variance": prediction.epistemic}
    if solver != "iterative":
        values["evidence"] = gp.log_evidence()
    return {key: value.detach() for key, value in values.items()}


def errors(single: dict, double: dict, n: int) -> dict[str, float]:
    """Relative; a log evidence counts in nats per datum where it is small."""
    out = {key: relative_error(single[key], double[key]) for key in single if key != "evidence"}
    if "evidence" in single:
        a, b = float(single["evidence"]), float(double["evidence"])
        error = abs(a - b) / max(abs(b), n)
        out["evidence"] = error if math.isfinite(error) else math.inf
    return out


@pytest.mark.parametrize("solver", [*SOLVERS, "iterative"])
@pytest.mark.parametrize("name", CASES)
def test_well_conditioned(name, solver):
    """No warning (they are errors here) and agreement; the answer comes in the type of the net."""
    single = in_single(problem(name, n=8))
    double = in_double(single)
    labels = name in PREDICTED
    a, b = (answers(p, 0.8, solver, labels) for p in (single, double))
    for key, error in errors(a, b, 8).items():
        assert error < TOLERANCE, f"{key}: {error:.1e}"
    assert a["mean"].dtype == torch.float32 and b["mean"].dtype == F64
    assert a["covariance"].dtype == torch.float32


@settings(max_examples=80)
@given(
    st.sampled_from(["gaussian", "gaussian_per_output", "gaussian_odd_net", "bernoulli", "categorical", "poisson"]),
    st.sampled_from([*SOLVERS, "auto"]),
    st.integers(1, 40),
    st.floats(-8, 4),
    st.floats(-4, 1),
    st.integers(0, 1000),
)
# Function space subtracts nearly equal vectors where the prior is wide, though its matrix may be well conditioned.
@example("gaussian", "function_space", 2, 0.0, -2.0, 0)
@example("gaussian_odd_net", "function_space", 4, -5.9290484427068915, -3.5259382028715294, 562)
@example("bernoulli", "function_space", 8, -5.784390662739204, 0.0, 1000)
# Conjugate gradients with a small residual and a large error.
@example("gaussian", "iterative", 6, -3.6673103121967134, -3.1545819216977815, 828)
def test_never_silently_wrong(name, solver, n, log_delta, log_sigma, seed):
    """Tiny delta, tiny sigma, few and many points: float32 agrees with float64 to 1e-3, or there was a warning."""
    p = problem(name, n=n, seed=seed)
    if name.startswith("gaussian"):
        p.loss_kwargs = {"sigma": 10.0**log_sigma}
    check_honest(p, 10.0**log_delta, solver)


@pytest.mark.parametrize(
    ("solver", "repeat"), [("weight_space", 1), ("weight_space", 5), ("function_space", 1), ("function_space", 5)]
)
def test_never_silently_wrong_on_purpose(solver, repeat):
    """Interpolation: delta = 1e-8, sigma = 1e-4, the same inputs several times."""
    p = problem("gaussian", n=8, m=1)
    p.x, p.y = p.x.repeat(repeat, 1), p.y.repeat(repeat, 1)
    p.loss_kwargs = {"sigma": 1e-4}
    check_honest(p, 1e-8, solver)


def check_honest(p: Problem, delta: float, solver: str) -> None:
    single = in_single(p)
    double = in_double(single)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            a = answers(single, delta, solver)
        except ValueError:  # refused, with words: honest
            return
    announced = any(issubclass(w.category, NumericalWarning) for w in seen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        b = answers(double, delta, solver)
    wrong = {key: error for key, error in errors(a, b, len(p.x)).items() if not error < TOLERANCE}
    assert announced or not wrong, f"silently wrong: { {key: f'{error:.1e}' for key, error in wrong.items()} }"


def test_warnings_can_be_told_apart():
    assert issubclass(NumericalWarning, Warning) and NumericalWarning is dnn2gp.numerics.NumericalWarning


def test_mixed_types_are_refused():
    p = problem("gaussian")
    with pytest.raises((ValueError, TypeError), match="float32|float64"):
        dnn2gp.LaplaceGP(p.net, p.x.float(), p.y, p.loss())
    with pytest.raises((ValueError, TypeError), match="float32|float64"):
        dnn2gp.LaplaceGP(p.net, p.x, p.y.float(), p.loss())
    with pytest.raises((ValueError, TypeError, RuntimeError), match="float32|float64|dtype"):
        p.gp()(p.x_test.float())
