"""Kernels without Jacobians: time and memory of Gram matrices, ours and our peers', side by side.

    python examples/benchmarks/grams.py                                         ours and torch alone
    python examples/benchmarks/grams.py --laplace-python ~/laplace/bin/python \
        --neural-tangents-python ~/nt/bin/python                                with the peers, each in its environment
    python examples/benchmarks/grams.py --cases lenet-100 mlp-1000 --csv grams.csv
    python examples/benchmarks/grams.py --device cuda                           ours and torch alone on a GPU

Every contender runs in a process of its own, in the environment that its file contenders/*.txt pins, on the same inputs
and weights; contenders take turns, so that a slow minute of the machine hits all of them. Times are medians, with what
is compiled or checked once left out; "ratio" is to ours, "cpu" the processor time of all threads, which tells more on a
busy machine. Memory is the peak above what the process held before its first run. "differs" is the largest difference
from our matrix, relative to its largest entry.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import torch
from machine import describe

HERE = Path(__file__).parent / "contenders"
sys.path.insert(0, str(HERE))
import nets  # noqa: E402

OURS = "ours"


@dataclass
class Case:
    """What is computed: ``gram`` ``(n K, n K)``, ``diagonal``: with a prior variance for each weight, or ``trace``."""

    net: str
    n: int
    contenders: tuple[str, ...]
    what: str = "gram"
    gemms: bool = False

    def title(self, name: str) -> str:
        rows = self.n if self.what == "trace" else 10 * self.n
        return f"{name}: {self.net}, {self.what}, n = {self.n}, K = 10, result {rows} x {rows}"


PEERS = (OURS, "vmap(jacrev)", "laplace-torch", "neural-tangents")
CASES = {
    "lenet-100": Case("lenet", 100, PEERS, gemms=True),
    "lenet-1000": Case("lenet", 1000, PEERS, gemms=True),
    "mlp-1000": Case("mlp", 1000, PEERS, gemms=True),
    "resnet18-64": Case("resnet18", 64, PEERS),
    "encoder-64": Case("encoder", 64, PEERS),
    "mlp-diagonal-100": Case("mlp", 100, (OURS, "vmap(jacrev)"), what="diagonal"),
    "lenet-trace-2000": Case("lenet", 2000, (OURS, "ours, in full", "neural-tangents"), what="trace"),
}
SCRIPTS = {
    OURS: "ours.py",
    "ours, in full": "ours.py",
    "vmap(jacrev)": "vmap_jacrev.py",
    "laplace-torch": "laplace_functional.py",
    "neural-tangents": "neural_tangents_structured.py",
}


class Child:
    """One contender, see contenders/protocol.py."""

    def __init__(self, name: str, python: str, arguments: argparse.Namespace) -> None:
        self.name = name
        self.times: list[float] = []
        self.cpu_times: list[float] = []
        self.note = ""
        self.memory = ""
        self.agreement = ""
        self.log = tempfile.TemporaryFile("w+")
        environment = dict(os.environ, OMP_NUM_THREADS=str(arguments.threads), TF_CPP_MIN_LOG_LEVEL="3")
        environment["PYTHONPATH"] = os.pathsep.join(_import_paths(name, arguments))
        self.process = subprocess.Popen(
            [python, HERE / SCRIPTS[name]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )
        if hasattr(os, "sched_setaffinity"):  # XLA takes all processors that it may use
            os.sched_setaffinity(self.process.pid, sorted(os.sched_getaffinity(0))[: arguments.threads])
        with contextlib.suppress(OSError):  # where memory runs out, let it be this process that ends
            Path(f"/proc/{self.process.pid}/oom_score_adj").write_text("1000")

    def ask(self, do: str, patience: float | None = None, **command: object) -> dict | None:
        """Its answer; None if it has failed or run out of patience, and then it is no more."""
        if self.process.poll() is not None:
            return None
        timer = threading.Timer(patience or 1e6, self._give_up, [patience])
        timer.start()
        try:
            self.process.stdin.write(json.dumps({"do": do, **command}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            killed = self.process.wait() == -signal.SIGKILL
            self.note = self.note or ("killed: out of memory" if killed else f"failed: {self._last_words()}")
            return None
        return json.loads(line)

    def _give_up(self, patience: float) -> None:
        self.note = f"stopped after {patience:.0f} s"
        self.process.kill()

    def _last_words(self) -> str:
        self.log.seek(0)
        return (self.log.read().strip().splitlines() or [f"exit code {self.process.returncode}"])[-1][:150]

    def resident(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def _import_paths(name: str, arguments: argparse.Namespace) -> list[str]:
    """This clone for ours; for neural-tangents its source, where it is not installed."""
    if name == "neural-tangents" and arguments.neural_tangents_source:
        return [str(arguments.neural_tangents_source)]
    return [str(HERE.parent.parent.parent)] if name.startswith(OURS) else []


def write_arrays(case: Case, path: Path) -> None:
    """Inputs and weights, the same for all."""
    net = nets.make(case.net)
    x = torch.randn(case.n, *nets.INPUT_SHAPES[case.net], generator=torch.Generator().manual_seed(1))
    arrays = {f"w/{name}": p.detach().numpy() for name, p in net.named_parameters()}
    arrays |= {f"b/{name}": b.numpy() for name, b in net.named_buffers()}
    np.savez(path, x=x.numpy(), **arrays)


def run(name: str, case: Case, arguments: argparse.Namespace, folder: Path) -> list[dict]:
    """The rows of one case."""
    write_arrays(case, folder / "arrays.npz")
    message = {
        "net": case.net,
        "arrays": str(folder / "arrays.npz"),
        "threads": arguments.threads,
        "device": arguments.device,
    }
    children, absent = [], []
    for contender in case.contenders:
        python = interpreter(contender, arguments)
        if python is None:
            absent.append(contender)
            continue
        children.append(Child(contender, python, arguments))
    print(f"\n{case.title(name)}", flush=True)
    for contender in absent:
        print(f"  {contender}: not given", flush=True)
    baselines = {}
    for child in children:
        what = "trace of the full one" if child.name == "ours, in full" else case.what
        answer = child.ask("prepare", patience=10 * arguments.patience, what=what, **message)
        if answer and "needs" in answer:
            child.note = f"does not fit: {gigabytes(answer['needs'])} of {gigabytes(answer['free'])}"
        elif answer:
            baselines[child.name] = (child.resident(), answer["peak"])
            print(f"  {child.name}: {(child.ask('versions') or {}).get('result')}", flush=True)
    measure([child for child in children if not child.note], arguments)
    for child in children:
        if child.times and not child.note.startswith("failed"):
            take_memory(child, *baselines[child.name], arguments)
    compare([child for child in children if child.times], folder)
    rows = [table_row(name, child, children) for child in children]
    print(markdown(rows), flush=True)
    if case.gemms and arguments.gemms and children and children[0].name == OURS:
        print_gemms(children[0], arguments)
    for child in children:
        child.close()
    return rows


def measure(children: list[Child], arguments: argparse.Namespace) -> None:
    """Contenders take turns; who takes longer than the patience is timed once."""
    for turn in range(arguments.repeats):
        for child in children:
            if turn and (not child.times or child.times[0] > arguments.patience):
                continue
            answer = child.ask("run", patience=10 * arguments.patience)
            if answer:
                child.times.append(answer["seconds"])
                child.cpu_times.append(answer["cpu_seconds"])


def take_memory(child: Child, resident: int, peak_before: int, arguments: argparse.Namespace) -> None:
    if arguments.device == "cuda":
        answer = child.ask("cuda_peak")
        child.memory = gigabytes(answer["result"]["peak"] - answer["result"]["now"]) if answer else ""
        return
    peak = (child.ask("versions") or {"peak": 0})["peak"]
    # What was compiled or checked before may have taken more than all runs: then only a bound is known.
    child.memory = ("" if peak > peak_before else "<= ") + gigabytes(max(peak - resident, 0))


def compare(children: list[Child], folder: Path) -> None:
    """Largest difference from the first contender's matrix over its largest entry, by blocks of rows."""
    reference = None
    for child in children:
        path = folder / f"{len(child.name)}.npy"
        if child.process.poll() is not None or child.ask("save", path=str(path)) is None:
            continue
        matrix = np.load(path, mmap_mode="r")
        if reference is None:
            reference, scale, first = matrix, float(np.abs(matrix).max()), path
            continue
        steps = range(0, len(matrix), 1000)
        worst = max(float(np.abs(matrix[i : i + 1000] - reference[i : i + 1000]).max()) for i in steps)
        child.agreement = f"{worst / scale:.0e}"
        del matrix
        path.unlink()
    if reference is not None:
        first.unlink()


def interpreter(contender: str, arguments: argparse.Namespace) -> str | None:
    """Which python runs it; None where it has not been given or cannot run on the device."""
    peers = {"laplace-torch": arguments.laplace_python, "neural-tangents": arguments.neural_tangents_python}
    if contender not in peers:
        return sys.executable
    return peers[contender] if arguments.device == "cpu" else None


def table_row(name: str, child: Child, children: list[Child]) -> dict:
    ours = statistics.median(children[0].times) if children[0].times else None
    row = {"case": name, "contender": child.name, "time": child.note}
    row |= dict.fromkeys(("least", "most", "ratio", "cpu"), "")
    if child.times:
        median = statistics.median(child.times)
        row |= {"time": f"{median:.3g} s" + (" (once)" if len(child.times) == 1 else "")}
        row |= {"least": f"{min(child.times):.3g} s", "most": f"{max(child.times):.3g} s"}
        row["ratio"] = f"{median / ours:.3g}" if ours else ""
        row["cpu"] = f"{statistics.median(child.cpu_times):.3g} s"
    return row | {"memory": child.memory, "differs": child.agreement}


def print_gemms(ours: Child, arguments: argparse.Namespace) -> None:
    """The products of the cheapest contraction of each layer, and what they take of our time."""
    answer = ours.ask("gemm_times")
    if not answer:
        print(f"  matrix products: {ours.note}")
        return
    rows = answer["result"]
    for row in rows:
        seconds = row.pop("seconds", None)
        row["gigaflops"] = f"{row['gigaflops']:.0f}" if "gigaflops" in row else ""
        row["time"] = "does not fit" if seconds is None else f"{seconds:.3g} s"
        row["number"] = seconds or 0.0
    total, median = sum(row.pop("number") for row in rows), statistics.median(ours.times)
    products = f"Matrix products of the cheapest contractions: {total:.3g} s"
    print(f"\n{products}; ours took {median / total:.2f} times that")
    print(markdown(rows), flush=True)


def markdown(rows: list[dict]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(["", *lines, *("| " + " | ".join(str(v) for v in row.values()) + " |" for row in rows)])


def gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--n", type=int, help="examples, in place of those of the cases")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each contender (default 5)")
    parser.add_argument("--patience", type=float, default=60, help="seconds after which one run is enough (default 60)")
    parser.add_argument("--threads", type=int, default=2, help="of each contender (default 2)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--laplace-python", help="python of an environment made by contenders/laplace.txt")
    parser.add_argument("--neural-tangents-python", help="python of one made by contenders/neural_tangents.txt")
    parser.add_argument("--neural-tangents-source", type=Path, help="its source, where it is not installed there")
    parser.add_argument("--no-gemms", dest="gemms", action="store_false", help="do not time the matrix products alone")
    parser.add_argument("--csv", type=Path, help="write the table there, too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(describe("gpytorch"))
    if arguments.device == "cuda":
        print(torch.cuda.get_device_name())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.cases:
            case = CASES[name] if arguments.n is None else replace(CASES[name], n=arguments.n)
            rows += run(name, case, arguments, Path(folder))
    print(markdown(rows))
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
