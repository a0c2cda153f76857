"""Benchmarks, small: they start, their contenders agree, and they end."""

import csv
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"


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
