"""The examples, run as a user runs them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COLUMNS = ("delta", "sigma", "NLL", "RMSE", "accuracy", "ECE", "coverage")


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """What the quickstart printed, and the folder of its pictures."""
    folder = tmp_path_factory.mktemp("output")
    command = [sys.executable, ROOT / "examples" / "quickstart.py", "--output", folder]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run, folder


@pytest.fixture(scope="module")
def rows(quickstart):
    """Its table: ``{(problem, row): {column: number}}``."""
    table, problem = {}, None
    for line in quickstart[0].stdout.splitlines():
        if " to test, " in line:
            problem = line.split(":")[0]
        name, *values = [line[:33].strip(), *line[33:].split()]
        if problem and line.startswith("  ") and len(values) == len(COLUMNS):
            numbers = [None if v == "-" else float(v[:-1]) / 100 if v.endswith("%") else float(v) for v in values]
            table[problem, name] = dict(zip(COLUMNS, numbers))
    return table


def test_quickstart_has_nothing_to_warn_of(quickstart):
    assert "Warning" not in quickstart[0].stderr


def test_quickstart_prints_its_table(rows):
    assert list(rows) == [
        ("diabetes", "net alone"),
        ("diabetes", "GP, delta of the weight decay"),
        ("diabetes", "GP, delta and sigma by evidence"),
        ("digits", "net alone"),
        ("digits", "GP, delta of the weight decay"),
        ("digits", "GP, delta by evidence"),
        ("digits", "GP, delta by held-out digits"),
    ]


@pytest.mark.parametrize(
    "best", [("diabetes", "GP, delta and sigma by evidence"), ("digits", "GP, delta by held-out digits")]
)
def test_quickstart_gains_likelihood_and_coverage(rows, best):
    gp, net = rows[best], rows[best[0], "net alone"]
    assert gp["NLL"] <= net["NLL"]
    assert abs(gp["coverage"] - 0.95) <= abs(net["coverage"] - 0.95)


def test_quickstart_tells_where_the_evidence_fails(quickstart, rows):
    if rows["digits", "GP, delta by evidence"]["NLL"] > rows["digits", "net alone"]["NLL"]:
        assert "Why the evidence fails on clean classes" in quickstart[0].stdout


def test_quickstart_draws_its_pictures(quickstart):
    for picture in ("predictions.png", "kernel.png"):
        data = (quickstart[1] / picture).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 10_000


def evidence(folder, *arguments, **options):
    command = [sys.executable, ROOT / "examples" / "evidence.py", *arguments, "--output", folder, "--jobs", "1"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, **options)


def test_evidence_of_the_sine(tmp_path):
    """Figure 5 in small: both tables, with their choices and stars, and the picture."""
    run = evidence(tmp_path, "sine", "--runs", "2", "--values", "3", "--iterations", "40")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("chosen by evidence: delta") == 2 and run.stdout.count("* evidence") == 2
    assert "variational inference" in run.stdout and "Warning" not in run.stderr
    assert (tmp_path / "evidence-sine.png").read_bytes().startswith(b"\x89PNG")


def test_evidence_of_the_wine_says_what_it_needs(tmp_path):
    run = evidence(tmp_path, "wine-delta", "--data", str(tmp_path))
    assert run.returncode != 0 and "wine-quality-red.npz" in run.stderr and "Traceback" not in run.stderr


def test_evidence_of_the_wine(tmp_path, data_dir):
    """Figure 6 in small: at delta = 32 evidence and test error are better than at either end."""
    options = ("--data", str(data_dir), "--runs", "2", "--values", "3", "--iterations", "150")
    run = evidence(tmp_path, "wine-delta", *options)
    assert run.returncode == 0, run.stderr
    assert "chosen by evidence: delta = 31.6" in run.stdout and "0.0% worse" in run.stdout


# ---- iterates of training


def run(script, folder, *options):
    """What a script printed, and the folder of its pictures."""
    command = [sys.executable, ROOT / "examples" / script, "--output", folder, *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


def test_iterates_shows_theorem_2(tmp_path):
    lines = [line for line in run("iterates.py", tmp_path).splitlines() if "lr = beta" in line]
    assert len(lines) == 6
    for line in lines:
        precision, mean = (float(number) for number in line.split()[-2:])
        assert precision < 1e-9
        full = line.split(",")[0] in ("VOGGN", "OGGN")
        assert mean < 1e-9 if full else mean > 1e-4
    assert (tmp_path / "iterates.png").stat().st_size > 10_000


def test_gap_draws_its_five_pictures(tmp_path):
    out = run("gap.py", tmp_path, "--steps", "30")
    assert sum(line.startswith("  ") for line in out.splitlines()) == 5
    assert (tmp_path / "gap.png").stat().st_size > 10_000


def test_lee2017_goes_on_where_it_stopped(tmp_path):
    """On scikit-learn's digits, small: a table, a picture, the evidence; the second run computes nothing again."""
    options = ["--subsets", "1", "--depths", "1", "--steps", "3", "--figure-size", "200", "--activations", "relu"]
    command = [sys.executable, ROOT / "examples" / "lee2017.py", *options, "--output", tmp_path, "--quiet"]
    outputs = []
    for _ in range(2):
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        outputs.append(run.stdout)
        stamp = (tmp_path / "lee2017.json").stat().st_mtime_ns
        outputs.append(stamp)
    assert outputs[:2] == outputs[2:]
    assert "rank correlation" in outputs[0] and "Evidence" in outputs[0]
    assert (tmp_path / "lee2017_figure2.png").read_bytes().startswith(b"\x89PNG")


def test_yang2019_draws_four_kernels_and_their_finite_nets(tmp_path):
    out = run("yang2019.py", tmp_path, "--widths", "8", "32", "--draws", "4")
    assert out.count("variance of a word") == 5
    assert out.count("4 draws") == 4
    for picture in ("yang2019_kernels.png", "yang2019_monte_carlo.png"):
        assert (tmp_path / picture).stat().st_size > 10_000


def test_transfer_of_a_pretrained_net(tmp_path):
    """A kernel of what eight tasks share predicts a ninth better than one that knows nothing."""
    command = [sys.executable, ROOT / "examples" / "transfer.py", "--evaluations", "1"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    ours, theirs = (line.split() for line in run.stdout.splitlines()[-2:])
    assert float(ours[-2]) < float(theirs[-2])
