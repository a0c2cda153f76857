"""Hyperparameters by evidence with BoTorch: the space, the table, resuming, Ctrl-C, what fails and what is refused."""

import functools
import math
import random

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from botorch.models import SingleTaskGP
from oracle import assert_close
from problems import F64, number
from torch import nn

import gpytorch_dnn2gp as dnn2gp
from gpytorch_dnn2gp import training
from gpytorch_dnn2gp.bayesopt import Choice, Float, Int, Search, search
from gpytorch_dnn2gp.losses import Gaussian
from gpytorch_dnn2gp.selection import Comparison

SPACE = {"rate": Float(1e-4, 1.0, log=True), "width": Int(2, 200, log=True)}


def bowl(rate, width):
    """An evidence with its maximum, 0, at 0.01 and 20."""
    return -(math.log10(rate / 0.01) ** 2) - 4 * math.log10(width / 20) ** 2


def quick(space=SPACE, train_fn=bowl, **options):
    return search(space, train_fn, **{"trials": 9, "initial": 5, "progress": False, **options})


# ---- the space


@pytest.mark.parametrize("setting", [Float(-2.0, 3.0), Float(1e-3, 10, log=True)])
def test_numbers_and_their_places(setting):
    for u in (0.0, 0.1, 0.5, 1.0):
        assert setting.place(setting.at(u)) == pytest.approx(u, abs=1e-12)
    assert (setting.at(0.0), setting.at(1.0)) == pytest.approx((setting.low, setting.high), rel=1e-12)
    assert setting.at(0.5) == pytest.approx(0.5 if not setting.log else 0.1)


@pytest.mark.parametrize("setting", [Int(-2, 5), Int(1, 300, log=True)])
def test_whole_numbers_and_their_places(setting):
    assert [setting.at(setting.place(v)) for v in setting.values] == list(setting.values)
    assert (setting.at(0.0), setting.at(1.0)) == (setting.low, setting.high)


def test_choices():
    choice = Choice(nn.Tanh, "relu", 3, None)
    assert choice.labels == ("Tanh", "relu", "3", "None")
    assert [choice.at(u) for u in (0.0, 0.3, 0.6, 1.0)] == [nn.Tanh, "relu", 3, None]
    assert [choice.read(choice.check(v)) for v in choice.values] == [0, 1, 2, 3]


# ---- a search


def test_it_finds_the_maximum():
    found = quick(trials=20)
    at_random = max(
        bowl(SPACE["rate"].at(u), SPACE["width"].at(v))
        for u, v in torch.rand(20, 2, dtype=F64, generator=torch.Generator().manual_seed(0)).tolist()
    )
    assert found.evidence > -0.01 > at_random
    assert found.best["rate"] == pytest.approx(0.01, rel=0.3) and 15 <= found.best["width"] <= 27
    assert bowl(**found.best) == found.evidence == max(row["evidence"] for row in found.rows)


def test_choices_and_whole_numbers():
    space = {"kind": Choice("a", "b", "c"), "depth": Int(1, 4), "x": Float(0, 1)}

    def fn(kind, depth, x):
        return -abs(depth - 3) - 2 * (kind != "b") - (x - 0.5) ** 2

    found = quick(space, fn, trials=14)
    assert (found.best["kind"], found.best["depth"]) == ("b", 3) and abs(found.best["x"] - 0.5) < 0.1


def test_a_finite_space_is_tried_whole_and_nothing_twice():
    space = {"kind": Choice("a", "b"), "depth": Int(1, 4)}
    found = quick(space, lambda kind, depth: depth if kind == "a" else -depth, trials=30)
    tried = [(row["kind"], row["depth"]) for row in found.rows]
    assert len(tried) == len(set(tried)) == 8
    assert found.best == {"kind": "a", "depth": 4}


def test_equal_evidences():
    assert len(quick(train_fn=lambda rate, width: 1.0, trials=7).rows) == 7


def test_evidences_of_very_different_size():
    """As at a wild learning rate: the good end must still be resolved."""
    found = quick(train_fn=lambda rate, width: bowl(rate, width) * (1e6 if rate > 0.1 else 1.0), trials=20)
    assert found.evidence > -0.05


def test_start_comes_first():
    default = {"rate": 0.01, "width": 20}
    found = quick(start=[default], trials=3)
    assert {name: found.rows[0][name] for name in SPACE} == default
    assert found.best == default


def test_another_surrogate():
    seen = []

    def surrogate(x, y):
        seen.append((x.shape, y.shape))
        assert x.min() >= 0 and x.max() <= 1
        return SingleTaskGP(x, y)

    quick(surrogate=surrogate, trials=7)
    assert seen == [((5, 2), (5, 1)), ((6, 2), (6, 1))]


def draw(n):
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.rand(n, 1, dtype=F64, generator=generator)
    return x, torch.sin(3 * x) + 0.2 * torch.randn(n, 1, dtype=F64, generator=generator)


X, Y = draw(15)


def train(width, delta, activation=nn.Tanh):
    net = nn.Sequential(nn.Linear(1, width), activation(), nn.Linear(width, 1)).double()
    training.fit(net, X, Y, Gaussian(0.2), delta, max_iterations=20, progress=False)
    return dnn2gp.LaplaceGP(net, X, Y, Gaussian(0.2), delta)


NET_SPACE = {"width": Int(2, 20), "delta": Float(1e-2, 10, log=True), "activation": Choice(nn.Tanh, nn.ReLU)}


@pytest.fixture(scope="module")
def of_nets():
    return quick(NET_SPACE, train, trials=7)


def test_rows_say_what_the_gps_say(of_nets):
    assert isinstance(of_nets, Search) and isinstance(of_nets.model, dnn2gp.LaplaceGP)
    row = max(of_nets.rows, key=lambda row: row["evidence"])
    with torch.no_grad():
        assert_close(number(of_nets.evidence), of_nets.model.log_evidence())
    assert row["parameters"] == 3 * row["width"] + 1 == of_nets.model.linearization.num_weights
    assert row["delta"] == of_nets.best["delta"] == pytest.approx(of_nets.model.prior_precision.item())
    assert row["sigma"] == pytest.approx(0.2) and 0 < row["effective"] < row["parameters"]
    assert row["activation"] == of_nets.best["activation"].__name__


def test_what_train_fn_may_return(of_nets):
    width, delta = 4, 0.5
    torch.manual_seed(0)
    gp = train(width, delta)
    expected = gp.log_evidence().item()
    fitted = dnn2gp.fit_evidence(train(width, delta), warn=False, progress=False)
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    trained = training.train_with_evidence(net, X, Y, Gaussian(0.2), max_iterations=20, every=10, progress=False)
    for result, evidence in (
        (gp, expected),
        (gp.log_evidence(), expected),
        (gp.log_evidence().detach().numpy(), expected),
        (expected, expected),
        (3, 3.0),
        (fitted, fitted.evidence_after),
        (trained, trained.evidence),
    ):
        found = quick(train_fn=lambda rate, width, result=result: result, trials=1)
        assert found.evidence == pytest.approx(evidence, abs=1e-12)
        assert found.model is result


def test_the_table_prints_its_settings(of_nets):
    text = str(of_nets)
    assert text.splitlines()[0].split()[:5] == ["candidate", "width", "delta", "activation", "evidence"]
    assert text.count(" *") == 1 and len(text.splitlines()) == 8


def test_the_picture(of_nets):
    axes = of_nets.plot()
    assert [ax.get_xlabel() for ax in axes] == ["trial", "width", "delta", "activation"]
    assert axes[2].get_xscale() == "log" and axes[1].get_xscale() == "linear"
    assert {label.get_text() for label in axes[3].get_xticklabels()} == {"ReLU", "Tanh"}
    assert len(axes[0].collections[0].get_offsets()) + sum(
        len(c.get_offsets()) for c in axes[0].collections[1:]
    ) == len(of_nets.rows)
    plt.close(axes[0].figure)
    _, own = plt.subplots(1, 4)
    assert list(of_nets.plot(own)) == list(own)
    plt.close(own[0].figure)


def test_the_picture_of_one_trial():
    axes = quick(trials=1).plot()
    plt.close(axes[0].figure)


def test_the_picture_puts_very_bad_trials_at_the_bottom():
    y = [0.0, -1.0, -0.5, -0.7, -0.2, -1e6]
    axes = dnn2gp.plotting.plot_trials({"x": [1, 2, 3, 4, 5, 6]}, y)
    assert axes[0].get_ylim()[0] > -3
    assert np.asarray(axes[1].collections[1].get_offsets())[:, 0].tolist() == [6]
    plt.close(axes[0].figure)


# ---- draws


def test_draws_are_the_searchs_own():
    def fn(rate, width):
        return bowl(rate, width) + 0.01 * float(torch.randn(()) + np.random.randn() + random.random())

    def state():
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()

    torch.manual_seed(7)
    before = state()
    first = quick(train_fn=fn)
    assert state() == before
    torch.manual_seed(8)
    second, third = quick(train_fn=fn), quick(train_fn=fn, seed=1)
    assert first.table.column("evidence") == second.table.column("evidence") != third.table.column("evidence")


# ---- interrupted


def settings_of(found):
    names = [*found.space, "evidence", "candidate"]
    return [{name: row[name] for name in names} for row in found.rows]


def killed_at(count, error=KeyboardInterrupt):
    """``bowl``, until the call of this number."""
    calls = []

    def fn(rate, width):
        calls.append(rate)
        if len(calls) == count:
            raise error
        return bowl(rate, width)

    return fn


@pytest.mark.parametrize("count", [3, 8])
def test_continued_from_its_file(tmp_path, count):
    file, straight = tmp_path / "table.csv", quick()
    with pytest.raises(SystemExit):
        quick(train_fn=killed_at(count, SystemExit), file=file)
    assert len(Comparison.from_csv(file).rows) == count - 1
    calls = []

    def counted(**settings):
        calls.append(settings)
        return bowl(**settings)

    continued = quick(train_fn=counted, file=file)
    assert len(calls) == 9 - (count - 1)
    assert settings_of(continued) == settings_of(straight)
    assert quick(file=file).model is None  # all from the file
    longer = quick(file=file, trials=11)
    assert settings_of(longer)[:9] == settings_of(straight) and len(longer.rows) == 11
    assert settings_of(quick(file=file, trials=4)) == settings_of(longer)  # nothing is thrown away


def test_choices_are_read_from_the_file(tmp_path):
    space = {"kind": Choice(nn.Tanh, None, True, "1e3"), "depth": Int(1, 4), "x": Float(0, 1)}

    def fn(kind, depth, x):
        return -depth - x - 3 * (kind != "1e3")

    straight = quick(space, fn)
    quick(space, fn, file=tmp_path / "table.csv", trials=6)
    continued = quick(space, fn, file=tmp_path / "table.csv")
    assert [row["depth"] for row in continued.rows] == [row["depth"] for row in straight.rows]
    assert continued.best == straight.best and continued.best["kind"] == "1e3"


def test_ctrl_c_keeps_what_was_done(tmp_path):
    file = tmp_path / "table.csv"
    with pytest.warns(RuntimeWarning, match="Interrupted after 3 of 9 trials.* goes on from there"):
        part = quick(train_fn=killed_at(4), file=file)
    assert len(part.rows) == 3 and part.evidence == max(part.table.column("evidence"))
    assert settings_of(quick(file=file)) == settings_of(quick())
    with pytest.warns(RuntimeWarning, match="which are returned.$"):
        quick(train_fn=killed_at(2))
    with pytest.raises(KeyboardInterrupt):
        quick(train_fn=killed_at(1))  # nothing was done


# ---- what fails, what is refused


def test_failed_trials_are_recorded(tmp_path):
    def fn(rate, width):
        if rate > 0.1:
            raise FloatingPointError("diverged")
        return bowl(rate, width) if width < 60 else math.nan

    with pytest.warns(RuntimeWarning, match="trials have failed: trial"):
        found = quick(train_fn=fn, trials=14, file=tmp_path / "table.csv")
    failed = [row for row in found.rows if row["error"]]
    assert {row["error"] for row in failed} == {"FloatingPointError: diverged", "the evidence is nan"}
    assert all(math.isnan(row["evidence"]) for row in failed)
    assert "failed: FloatingPointError: diverged" in str(found)
    assert sum(bool(row["error"]) for row in found.rows[8:]) <= 1  # learned
    with pytest.warns(RuntimeWarning):
        again = quick(train_fn=fn, trials=14, file=tmp_path / "table.csv")
    assert again.best == found.best and str(again) == str(found)


def test_infinite_evidence_has_failed():
    with pytest.warns(RuntimeWarning, match="1 of 9"):
        found = quick(train_fn=lambda rate, width, seen=[]: seen.append(1) or (math.inf if len(seen) == 2 else -rate))  # noqa: B006
    assert found.rows[1]["error"] == "the evidence is inf" and math.isfinite(found.evidence)


def test_nothing_works():
    def fn(rate, width):
        raise ValueError("no such thing")

    with pytest.raises(RuntimeError, match="All of the first 5 trials .* ValueError: no such thing") as caught:
        quick(train_fn=fn)
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_file_of_another_search(tmp_path):
    file = tmp_path / "table.csv"
    quick(file=file, trials=2)
    for options in (
        {"seed": 1},
        {"initial": 6},
        {"space": {**SPACE, "rate": Float(1e-3, 1.0, log=True)}},
        {"surrogate": SingleTaskGP},
        {"start": [{"rate": 0.1, "width": 3}]},
    ):
        with pytest.raises(ValueError, match="made by another search"):
            quick(file=file, **options)
    with pytest.raises(FileNotFoundError, match="Make it first"):
        quick(file=tmp_path / "none" / "table.csv")


def test_refusals():
    calls = []

    def fn(rate, width):
        calls.append(rate)

    for error, message, options in (
        (ValueError, "The space is empty", {"space": {}}),
        (TypeError, "space must map names", {"space": [Int(1, 2)]}),
        (TypeError, "'rate' must be a Float, an Int or a Choice; got 3", {"space": {"rate": 3}}),
        (TypeError, r"Use Choice\(\*values\)", {"space": {"rate": [1, 2]}}),
        (ValueError, "'evidence' can be no name", {"space": {"evidence": Int(1, 2)}}),
        (ValueError, "'_x' can be no name", {"space": {"_x": Int(1, 2)}}),
        (TypeError, "does not take the settings rate by keyword: missing a required", {"space": {"rate": Int(1, 2)}}),
        (TypeError, "got an unexpected keyword", {"space": {**SPACE, "depth": Int(1, 2)}}),
        (TypeError, "train_fn must be a function", {"train_fn": 3.0}),
        (ValueError, "trials must be a whole number, 1 or more; got 0", {"trials": 0}),
        (ValueError, "initial must be a whole number", {"initial": 2.5}),
        (ValueError, r"start\[0\]: settings are rate, width; got rate", {"start": [{"rate": 0.1}]}),
        (ValueError, r"start\[0\]: width: needed is a whole number", {"start": [{"rate": 0.1, "width": 2.5}]}),
        (ValueError, r"start\[0\]: rate: needed is a number from", {"start": [{"rate": math.nan, "width": 3}]}),
    ):
        with pytest.raises(error, match=message):
            quick(**{"train_fn": fn, **options})
    assert not calls
    with pytest.raises(TypeError, match="train_fn must return a GP.* got NoneType"):
        quick(train_fn=fn)
    assert len(calls) == 1
    for result in ("3", torch.ones(2), nn.Linear(1, 1), True):
        with pytest.raises(TypeError, match="the evidence itself"):
            quick(train_fn=lambda rate, width, result=result: result)


def test_settings_that_are_refused():
    for error, message, setting in (
        (ValueError, "must be below the upper one. Swap them", lambda: Float(2, 1)),
        (ValueError, "Fix this setting", lambda: Int(2, 2)),
        (ValueError, "must be finite", lambda: Float(0, math.inf)),
        (ValueError, "must be finite", lambda: Float(math.nan, 1)),
        (ValueError, "needs bounds above zero", lambda: Float(0, 1, log=True)),
        (TypeError, "bounds are numbers", lambda: Float("0", 1)),
        (TypeError, "Use Float for others", lambda: Int(1, 2.5)),
        (ValueError, "two values or more", lambda: Choice("a")),
        (ValueError, r"Choice\(\*values\)", lambda: Choice(["a", "b"])),
        (ValueError, "the same name", lambda: Choice("1", 1)),
        (ValueError, "needed is one of a, b", lambda: Choice("a", "b").check("c")),
    ):
        with pytest.raises(error, match=message):
            setting()


def test_a_partial_will_do():
    assert len(quick({"rate": SPACE["rate"]}, functools.partial(bowl, width=20), trials=6).rows) == 6
