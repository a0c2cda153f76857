"""Time and memory of kernels of sequences against the length of sequences and their number, on logarithmic axes.

Each point is a process of its own, whose peak memory is taken above what it held before; the exponent is that of the
last two points. Of a simple RNN the last state costs n^2 L, the mean over time n^2 L^2; neither holds the (n L)^2
covariances of all states, whose size stands beside. A GRU by paths costs n^2 L^2, a transformer of two blocks, read at
its last token or by the mean, n^2 L^2 for all pairs of tokens and n^2 L^3 for attention to mix them.

    python examples/benchmarks/recurrent_cost.py [--picture FILE.png] [--kernels "RNN, last" "transformer, mean" ...]
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

KERNELS = ("RNN, last", "RNN, mean", "GRU, last", "transformer, mean")
LENGTHS = {
    "RNN, last": (8, 16, 32, 64, 128, 256),
    "RNN, mean": (4, 8, 16, 32, 64),
    "GRU, last": (2, 4, 8, 16, 32),
    "transformer, mean": (4, 8, 16, 32, 64),
}
NUMBERS = {
    "RNN, last": (125, 250, 500, 1000, 2000),
    "RNN, mean": (31, 62, 125, 250),
    "GRU, last": (5, 10, 20, 40),
    "transformer, mean": (50, 100, 200, 400),
}
# number, length
FIXED = {"RNN, last": (500, 32), "RNN, mean": (200, 32), "GRU, last": (10, 8), "transformer, mean": (100, 16)}
PATHS = 2**10


def measure(name: str, number: int, length: int, threads: int) -> None:
    """Print seconds and peak bytes as JSON."""
    import torch
    from machine import PeakMemory
    from torch import nn

    from gpytorch_dnn2gp import infinite

    torch.set_num_threads(threads)
    net, readout = name.split(", ")
    if net == "GRU":
        kernel = infinite.recurrent(nn.GRU(8, 1), readout=readout, paths=PATHS, progress=False)
    elif net == "transformer":
        kernel = infinite.transformer(8, 2, readout=readout, progress=False)
    else:
        kernel = infinite.simple_rnn(8, "tanh", readout=readout, progress=False)
    kernel = kernel.double()
    generator = torch.Generator().manual_seed(0)
    x = infinite.pack(torch.randn(number, length, 8, dtype=torch.float64, generator=generator))
    with torch.no_grad():
        kernel(infinite.pack(x[:2, : 2 * 8].view(2, 2, 8))).to_dense()  # what is made once
        memory, start = PeakMemory(), time.perf_counter()
        kernel(x).to_dense()
        print(json.dumps({"seconds": time.perf_counter() - start, "bytes": memory.above_baseline()}))


def exponent(sizes: list[int], values: list[float]) -> float:
    return math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--largest", type=int, help="leave out lengths and numbers above this")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS, help="which of them")
    parser.add_argument("--picture", type=Path, help="where to put the picture")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, number, length = arguments.measure
        measure(name, int(number), int(length), arguments.threads)
        return
    from machine import describe

    print(describe())
    lines = {}
    for varied in ("length", "number"):
        for name in arguments.kernels:
            sizes = [s for s in (LENGTHS if varied == "length" else NUMBERS)[name] if s <= (arguments.largest or s)]
            found = []
            for size in sizes:
                number, length = (FIXED[name][0], size) if varied == "length" else (size, FIXED[name][1])
                command = [sys.executable, __file__, "--threads", str(arguments.threads)]
                run = subprocess.run(
                    [*command, "--measure", name, str(number), str(length)], capture_output=True, text=True, check=True
                )
                found.append(json.loads(run.stdout))
                full = 8 * (number * length) ** 2
                print(
                    f"{name:>17}: {number:5d} sequences of {length:4d} tokens {found[-1]['seconds']:9.3f} s "
                    f"{found[-1]['bytes'] / 1e6:8.1f} MB   (all states: {full / 1e6:10.1f} MB)",
                    flush=True,
                )
            seconds, size_of = ([f[key] for f in found] for key in ("seconds", "bytes"))
            lines[varied, name] = sizes, seconds, size_of
            if len(sizes) > 1:
                memory = exponent(sizes, [max(1, b) for b in size_of])
                print(f"{name:>17}: exponent in {varied}: time {exponent(sizes, seconds):.2f}, memory {memory:.2f}\n")
    if arguments.picture:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
        for column, varied in enumerate(("length", "number")):
            for row, label in enumerate(("seconds", "MB above what the process held")):
                ax = axes[row, column]
                for name in arguments.kernels:
                    sizes, *values = lines[varied, name]
                    ax.plot(sizes, [v / (1e6 if row else 1) for v in values[row]], "o-", label=name)
                ax.set(yscale="log", xlabel=f"{varied} of sequences", ylabel=label)
                ax.set_xscale("log", base=2)
                ax.legend()
        figure.savefig(arguments.picture, dpi=120)


if __name__ == "__main__":
    main()
