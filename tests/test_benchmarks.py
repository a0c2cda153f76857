"""Benchmarks, small: they start, their contenders agree, and they end."""

import csv
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gpytorch_dnn2gp import training

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """A script of the benchmarks as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_grams(tmp_path):
    options = ["--n", "3", "--repeats", "1", "--threads", "1", "--csv", tmp_path / "table.csv"]
    command = [sys.executable, BENCHMARKS / "grams.py", "--cases", "lenet-100", *options]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    with (tmp_path / "table.csv").open() as file:
        rows = {row["contender"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["ours", "vmap(jacrev)"]
    assert all(row["time"].endswith("s (once)") and row["memory"].endswith("GB") for row in rows.values()), rows
    assert float(rows["vmap(jacrev)"]["differs"]) < 1e-5
    assert "laplace-torch: not given" in run.stdout
    assert "Matrix products of the cheapest contractions" in run.stdout


def test_infinite_width(tmp_path):
    options = ["--n", "12", "--repeats", "1", "--threads", "1", "--skip-images"]
    command = [sys.executable, BENCHMARKS / "infinite_width.py", *options]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    rows = [line.split() for line in run.stdout.splitlines() if " float32 " in line or " float64 " in line]
    assert len(rows) == 16
    assert all(float(row[-3]) > 0 and row[-2:] == ["-", "-"] for row in rows)


def test_tables_resume(script, tmp_path, capsys):
    tables = script("tables")
    jobs = [{"set": "a", "split": number} for number in range(3)]
    done = []

    def work(job):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(job["split"])
        return {"nll": 0.5 + job["split"], "cpu_seconds": 7.0}

    def table():
        return tables.Table(tmp_path / "results" / "t.csv", ("set", "split"), ("nll", "cpu_seconds"))

    with pytest.raises(KeyboardInterrupt):
        table().run(jobs, work, lambda job: 100.0)
    assert "0 of 3 jobs are there; the others should take about 5 min" in capsys.readouterr().out
    resumed = table()
    assert resumed.values("nll", set="a").tolist() == [0.5, 1.5]
    done.clear()
    resumed.run(jobs, work, lambda job: 100.0)
    assert "2 of 3 jobs are there; the others should take about 7 s" in capsys.readouterr().out
    assert done == [2]
    assert table().values("nll", split=2).tolist() == [2.5]
    resumed.rows.clear()  # another process has done these since
    resumed.run(jobs, work, lambda job: 100.0)
    assert done == [2] and len(table().rows) == 3
    with pytest.raises(ValueError, match="other columns"):
        tables.Table(tmp_path / "results" / "t.csv", ("set",), ("nll",))


def test_tables_summaries(script):
    tables = script("tables")
    assert tables.mean_and_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert tables.shown([1.0, 2.0, 3.0], 2) == "2.00 ± 0.58"
    assert tables.shown([1e-4, 2e-4]) == "1.50e-04 ± 5e-05" and tables.shown([1e-4, 2e-4], 1) == "0.0 ± 0.0"
    assert tables.shown([2.0], 2) == "2.00" and tables.shown([]) == "–"
    assert tables.markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"
    ranks, p = tables.ranks(np.array([[1.0, 2.0, 3.0]] * 6))
    assert ranks.tolist() == [1.0, 2.0, 3.0] and p < 0.01
    mean, error, p = tables.paired(np.arange(10) + 1.0, np.arange(10) + 0.9 - 0.01 * np.arange(10))
    assert mean == pytest.approx(0.145) and error > 0 and p < 0.01


def test_tables_say_that_data_are_missing(script):
    with pytest.raises(FileNotFoundError, match="pass --data FOLDER"):
        script("tables").uci(None, "yacht", 0)


@pytest.fixture
def few(script, monkeypatch):
    """The scripts' data and training, cut to what takes a second."""
    tables = script("tables")
    original = tables.uci

    def shorter(*arguments):
        split = original(*arguments)
        return tables.Split(split.x[:60], split.y[:60], split.test_x, split.test_y, split.scale)

    monkeypatch.setattr(tables, "uci", shorter)
    monkeypatch.setattr(training, "MAX_SETTLING", 1)
    return {"every": 50, "max_iterations": 50, "evidence_iterations": 2}


def test_uci_evidence(script, few, tmp_path, monkeypatch, capsys):
    uci = script("uci_evidence")
    monkeypatch.setattr(uci, "EVALUATIONS", 60)
    monkeypatch.setattr(uci, "ONLINE", few)
    monkeypatch.setattr(uci, "GRID", [0.1, 10.0])
    methods = ["post hoc", "average", "cv", "rbf"]
    command = ["uci_evidence.py", "--results", str(tmp_path), "--sets", "diabetes", "--splits", "1", "--methods"]
    monkeypatch.setattr(sys, "argv", [*command, *methods])
    uci.main()
    rows = uci.Table(tmp_path / "uci_evidence.csv", uci.KEY, uci.COLUMNS).rows
    assert [row["method"] for row in rows] == methods
    for row in rows:  # the labels have a standard deviation of 77
        assert 4.5 < float(row["nll"]) < 9 and 40 < float(row["rmse"]) < 150 and float(row["coverage"]) > 0.4, row
    assert "| diabetes (1) |" in capsys.readouterr().out


def test_conditioning(script, few, monkeypatch):
    study = script("conditioning")
    monkeypatch.setitem(study.OPTIONS, "max_iterations", 100)
    found = study.study(study.data(None, "diabetes", 0), width=5, nets=2)
    assert found["rows"] == 60
    assert all(0.5 < found[f"nll {stage}"] < 10 for stage in study.STAGES), found


def test_classification(script):
    classes = script("classification")
    study = classes.Study(None, None, num_test=10, threads=1)
    problem = study.problem("breast cancer", 0)
    problem.others["fashion"] = 3 * problem.test[0]
    found = {}
    for method in ("net", "temperature", "probit evidence", "both held-out", "mc held-out", "last layer held-out"):
        found[method] = study({"set": "breast cancer", "split": 0, "method": method})
    assert all(row["accuracy"] > 0.9 and row["nll"] < 0.4 for row in found.values()), found
    assert 0 <= found["probit evidence"]["fashion variance"] <= 1 and "fashion variance" not in found["net"]
    assert found["last layer held-out"]["fashion variance f"] > 0.5  # three times as far out
    # what "mc held-out" shares with "both held-out", moments for each delta, counts for both
    gp = study.gp("breast cancer", 0, "last layer")
    gp.begin()
    assert gp.cost_of_earlier()["seconds"] == gp._kept["gram"][1].seconds
    gp.by_held_out("mc")
    assert gp.cost_of_earlier()["seconds"] == pytest.approx(sum(cost.seconds for _, cost in gp._kept.values()))


def test_approximations(script, few, tmp_path, monkeypatch):
    study = script("approximations")
    monkeypatch.setattr(study, "EVALUATIONS", 100)
    monkeypatch.setitem(study.EPOCHS, "swag", 10)
    table = study.Table(tmp_path / "a.csv", study.KEY, study.COLUMNS)
    for method in ("net", "last layer", "swag"):
        job = {"set": "diabetes", "split": 0, "method": method}
        table.add(job, study.work(None, 1, job))
    assert all(np.isfinite(table.values("nll")))
    study.report(table, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def bayesopt_benchmark(name, folder, *options):
    command = [sys.executable, BENCHMARKS / f"bayesopt_{name}.py", *options]
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_bayesopt_quality(tmp_path):
    options = ["--problems", "Branin", "BraninCurrin", "--seeds", "1", "--evaluations", "7", "--no-progress"]
    out = bayesopt_benchmark("quality", tmp_path, *options, "--methods", "SingleTaskGP", "random")
    assert "Projected: " in out and "mean rank" in out
    again = bayesopt_benchmark("quality", tmp_path, *options, "--methods", "SingleTaskGP", "random")
    assert "Projected" not in again  # all from the file
    assert out.splitlines()[-6:] == again.splitlines()[-6:]
    out = bayesopt_benchmark("quality", tmp_path, *options)
    assert "laplace-bayesopt left out" in out
    with (tmp_path / "bayesopt_quality" / "table_7.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4 * 7 and all(float(row["regret"]) >= 0 for row in rows)
    assert (tmp_path / "bayesopt_quality" / "table_7.png").stat().st_size > 10_000


def test_bayesopt_speed(tmp_path):
    out = bayesopt_benchmark("speed", tmp_path, "--n", "8", "--repeats", "1", "--threads", "1")
    assert "laplace-bayesopt left out" in out and "condition (s)" in out
    rows = [line for line in out.splitlines() if line.startswith(("ours", "SingleTaskGP"))]
    assert len(rows) == 3 and all(0 < float(row.split()[-1]) < 10 for row in rows)


def test_recurrent_kernels(script, tmp_path, monkeypatch, capsys):
    threads = torch.get_num_threads()
    cost = script("recurrent_cost")
    monkeypatch.setattr(cost, "PATHS", 64)
    for name in cost.KERNELS:
        cost.measure(name, 3, 4, threads)
        assert json.loads(capsys.readouterr().out)["seconds"] > 0
    picture = tmp_path / "picture.png"
    options = ["--widths", "8", "16", "--draws", "2", "--threads", str(threads), "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", ["recurrent_monte_carlo.py", *options])
    script("recurrent_monte_carlo").main()
    assert "nn.LSTM" in capsys.readouterr().out and picture.stat().st_size > 10_000
    use = script("recurrent_use")
    use.digits(40, 2)
    rows = [line for line in capsys.readouterr().out.splitlines() if "state" in line]
    assert len(rows) == 4 and all(0.3 < float(row.split("state")[1].split()[2]) <= 1 for row in rows)
