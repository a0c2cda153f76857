"""Kernels of recurrent nets against wide random nets of torch's own modules: error by width and by number of draws.

    python examples/benchmarks/recurrent_monte_carlo.py [--widths 32 128 512 2048] [--draws 100] [--picture FILE.png]

For each of nn.RNN (tanh, ReLU), its NTK, nn.GRU and nn.LSTM: a table by width (relative distance of the mean over draws
from the kernel; what chance alone explains of it; the spread of one draw), and one by draws at the largest width.
"""

import argparse
import math
from pathlib import Path

import torch
from machine import describe
from torch import nn

from gpytorch_dnn2gp import infinite

SIGMAS = (2.0, 1.5, 0.2, 1.0)  # input, recurrent, bias, readout


def nets() -> dict[str, tuple[nn.Module, dict]]:
    """Name -> module, and what its kernel is asked for."""
    gates = {"paths": 2**14}
    return {
        "nn.RNN, tanh": (nn.RNN(4, 1), {}),
        "nn.RNN, ReLU, mean state": (nn.RNN(4, 1, nonlinearity="relu"), {"readout": "mean"}),
        "nn.RNN, tanh, NTK": (nn.RNN(4, 1), {"kernel": "ntk"}),
        "nn.GRU": (nn.GRU(4, 1), gates),
        "nn.LSTM": (nn.LSTM(4, 1), gates),
    }


def sequences() -> torch.Tensor:
    """Six, of 2 to 7 tokens; the last two begin in the same way."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(n, 4, dtype=torch.float64, generator=generator) for n in (2, 3, 5, 7, 6)]
    return infinite.pack([*found, torch.cat([found[4][:3], -found[4][3:]])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 128, 512, 2048])
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--picture", type=Path, help="where to put the picture")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(describe())
    x, results = sequences(), {}
    sigmas = [torch.tensor(value, dtype=torch.float64) for value in SIGMAS]
    for name, (net, options) in nets().items():
        kernel = infinite.recurrent(net, *sigmas, **options)
        widths = [w for w in arguments.widths if w <= 512 or "NTK" not in name]
        generator = torch.Generator().manual_seed(1)
        found = infinite.monte_carlo(net, x, widths, arguments.draws, kernel, generator)
        results[name] = found
        print(f"\n{name}; paths of gates err by {kernel.integration_error(x):.0e}\n{found}")
        counts = [n for n in (1, 4, 16, 64, 256, 1024) if n <= arguments.draws]
        errors = [float((found.draws[-1, :n].mean(0) - found.kernel).norm() / found.kernel.norm()) for n in counts]
        print(
            f"   width {widths[-1]}, draws: " + ", ".join(f"{n}: {e:.2e}" for n, e in zip(counts, errors)), flush=True
        )
    if arguments.picture:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(
            1, len(results), figsize=(3.6 * len(results), 3.4), sharey=True, layout="constrained"
        )
        for ax, (name, found) in zip(axes, results.items()):
            found.plot(ax)
            ax.set_title(name)
            ax.legend(fontsize=6) if ax is axes[0] else ax.get_legend().remove()
        for ax in axes[1:]:
            ax.set_ylabel("")
        figure.savefig(arguments.picture, dpi=120)
    assert all(math.isfinite(float(found.error[-1])) for found in results.values())


if __name__ == "__main__":
    main()
