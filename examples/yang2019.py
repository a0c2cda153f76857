"""Wide nets of any architecture are Gaussian processes: Yang (2019), Tensor Programs I. His four kernels, drawn.

    python examples/yang2019.py --data FOLDER       GloVe vectors of two sentences, as in the paper's code (GP4A)
    python examples/yang2019.py                     random vectors instead, one for each word

1. Heat maps: the covariance of all words of "The brown fox jumps over the dog" and "The quick brown fox jumps over the
   lazy dog" at infinite width: simple RNN, GRU, transformer, and batch normalisation with each sentence as a batch.
2. Monte Carlo: the same nets, finite, their weights drawn many times. The error of their mean kernel is chance alone:
   it falls with draws, the spread of one draw as 1/sqrt(width).

FOLDER holds gp4a/ExampleGloVeVecs.npy, (16, 300): the words of the first sentence, then those of the second.
"""

import argparse
import itertools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from gpytorch_dnn2gp import infinite

SENTENCES = "The brown fox jumps over the dog", "The quick brown fox jumps over the lazy dog"


def load(folder: Path | None) -> list[torch.Tensor]:
    """The vectors of the words of each sentence, ``(T, 300)``, float64."""
    words = [sentence.lower().split() for sentence in SENTENCES]
    if folder is not None:
        vectors = torch.from_numpy(np.load(folder / "gp4a" / "ExampleGloVeVecs.npy")).double()
        return list(vectors.split([len(sentence) for sentence in words]))
    generator = torch.Generator().manual_seed(0)
    common = 0.7 * torch.randn(300, dtype=torch.float64, generator=generator)
    vocabulary = {}
    for word in itertools.chain(*words):
        if word not in vocabulary:
            vocabulary[word] = common + 0.7 * torch.randn(300, dtype=torch.float64, generator=generator)
    return [torch.stack([vocabulary[word] for word in sentence]) for sentence in words]


def kernels(sentences: list[torch.Tensor], d: int, readout: str) -> dict[str, torch.nn.Module]:
    """Yang's four, with the variances of his examples."""
    one = torch.ones((), dtype=torch.float64)
    return {
        "simple RNN, erf": infinite.simple_rnn(d, "erf", one, 1.0, 0.0, readout=readout),
        "GRU": infinite.gru(d, one, 1.0, 1.0, readout=readout, paths=2**14),
        "transformer, depth 2": infinite.transformer(d, 2, 2 * one, 3.0, 0.1, readout=readout),
        "batch norm and ReLU, depth 1": infinite.batchnorm_mlp(1, sentences, one),
    }


@torch.no_grad()
def heat_maps(sentences: list[torch.Tensor], path: Path) -> None:
    """The Gram matrix of the words and the four kernels between them."""
    x, tokens = infinite.pack(sentences), torch.cat(sentences)
    L, d = max(map(len, sentences)), tokens.shape[1]
    rows = torch.cat([i * L + torch.arange(len(s)) for i, s in enumerate(sentences)])
    matrices = {"the words, x.x'/d": tokens @ tokens.mT / d}
    for name, kernel in kernels(sentences, d, "all").items():
        if isinstance(kernel, infinite.BatchNormKernel):
            matrices[name] = kernel(tokens).to_dense()
        else:
            matrices[name] = kernel(x).to_dense()[rows][:, rows]
    words = [word for sentence in SENTENCES for word in sentence.split()]
    figure, axes = plt.subplots(2, 3, figsize=(13, 9), layout="constrained")
    axes.flat[-1].axis("off")
    for ax, (name, K) in zip(axes.flat, matrices.items()):
        s = K.diagonal().rsqrt()
        image = ax.imshow(s[:, None] * K * s, cmap="viridis")
        figure.colorbar(image, ax=ax, shrink=0.6)
        ax.axhline(len(sentences[0]) - 0.5, color="white", linewidth=1)
        ax.axvline(len(sentences[0]) - 0.5, color="white", linewidth=1)
        ax.set(title=name, xticks=range(len(words)), yticks=range(len(words)))
        ax.set_xticklabels(words, rotation=90)
        ax.set_yticklabels(words)
        between = K[: len(sentences[0]), len(sentences[0]) :]
        print(f"{name:>30}: variance of a word {K.diagonal().mean():.4f}, across the sentences {between.mean():.4f}")
    figure.suptitle("Correlations at infinite width")
    figure.savefig(path, dpi=110)
    print(f"drawn: {path}")


NETS = ("rnn", "gru", "transformer", "batchnorm")


def against_finite_nets(sentences: list[torch.Tensor], chosen: list[str], widths: list, draws: int, path: Path) -> None:
    """Error and spread of finite nets around each kernel, last states of the sentences and of their beginnings."""
    tokens = torch.cat(sentences)
    d = tokens.shape[1]
    beginnings = [s[:n] for s in sentences for n in (2, len(s) // 2, len(s))]
    nets = [nn.RNN(d, 1), nn.GRU(d, 1), infinite.YangTransformer(d, 1, depth=2), None]
    wide = kernels(sentences, d, "last")
    wide["simple RNN, tanh"] = infinite.recurrent(nets[0], torch.ones((), dtype=torch.float64), 1.0, 0.1)
    wide["GRU, logistic gates"] = infinite.recurrent(
        nets[1], torch.ones((), dtype=torch.float64), 1.0, 1.0, paths=2**14
    )
    names = ["simple RNN, tanh", "GRU, logistic gates", "transformer, depth 2", "batch norm and ReLU, depth 1"]
    pairs = [(name, net) for short, name, net in zip(NETS, names, nets) if short in chosen]
    figure, axes = plt.subplots(1, len(pairs), figsize=(4 * len(pairs), 3.6), layout="constrained", squeeze=False)
    axes = axes[0]
    for ax, (name, net) in zip(axes, pairs):
        x = tokens if net is None else infinite.pack(beginnings)
        found = infinite.monte_carlo(net, x, widths, draws, wide[name], torch.Generator().manual_seed(0))
        print(f"\n{name}, {draws} draws\n{found}")
        found.plot(ax)
        ax.set(title=name, xticks=widths, xticklabels=widths)
        ax.minorticks_off()
        if ax is not axes[-1]:
            ax.get_legend().remove()
    figure.savefig(path, dpi=110)
    print(f"drawn: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds gp4a/ExampleGloVeVecs.npy")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS), help="which are drawn finite")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--draws", type=int, default=200)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    sentences = load(options.data)
    heat_maps(sentences, options.output / "yang2019_kernels.png")
    path = options.output / "yang2019_monte_carlo.png"
    against_finite_nets(sentences, options.nets, options.widths, options.draws, path)


if __name__ == "__main__":
    main()
