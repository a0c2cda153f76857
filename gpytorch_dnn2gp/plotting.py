"""Pictures: predictions with their two kinds of uncertainty, the kernel as an image, calibration.

    plot_regression_1d(p, x)          mean and bands over one input
    plot_predictions(p, labels)       predicted against observed numbers, sorted
    plot_probabilities(p, labels)     class probabilities of a few examples
    plot_variance_split(p)            aleatoric and epistemic variance, stacked, for each example
    plot_kernel(kernel, labels)       the kernel matrix, grouped by class
    plot_calibration(ys, labels)      coverage at every level
    plot_evidence(values, evidence)   evidence and errors over a hyperparameter, the chosen values marked
    plot_trials(settings, evidence)   a search: evidence over its trials, and over each hyperparameter

``p`` is what ``gp.predict(x)`` returns. Every function draws into ``ax`` (``axes``), by default into new ones, and
returns what it drew into. Nothing is shown or saved, and no setting of matplotlib is changed: that is the caller's.
m examples, D entries of a label, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from gpytorch.kernels import Kernel
from torch import Tensor
from torch.distributions import Distribution

from . import metrics
from .prediction import Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Told apart in grey and by the colour-blind.
EPISTEMIC = "#0b559f"
ALEATORIC = "#f3a73b"
OBSERVED = "#1a1a1a"
OUTSIDE = "#c8102e"
NEUTRAL = "#9a9a9a"


def plot_regression_1d(
    prediction: Prediction,
    x: Tensor,
    train_x: Tensor | None = None,
    train_y: Tensor | None = None,
    output: int = 0,
    level: float = 0.95,
    ax: Axes | None = None,
) -> Axes:
    """Mean over one input, with the band of the mean (epistemic) inside the band of the labels (and aleatoric).

    Args:
        prediction: at ``x``.
        x: ``(m,)`` or ``(m, 1)``, in any order.
        train_x, train_y: data to show, ``(n,)`` or ``(n, 1)``; ``train_y`` may be ``(n, D)``.
        output: which entry of the label.
        level: of both bands, as for Gaussians.
        ax: where to draw.
    """
    ax = _axes(ax)
    x = _array(x).reshape(-1)
    mean, aleatoric, epistemic = _entry(prediction, output)
    if len(x) != len(mean):
        raise ValueError(f"There are {len(x)} inputs, but {len(mean)} predictions.")
    order, z = np.argsort(x), _half_width(level)
    x, mean, aleatoric, epistemic = x[order], mean[order], aleatoric[order], epistemic[order]
    for variance, color, label in (
        (aleatoric + epistemic, ALEATORIC, f"{level:.0%} of labels: epistemic + aleatoric"),
        (epistemic, EPISTEMIC, f"{level:.0%} of functions: epistemic"),
    ):
        half = z * np.sqrt(variance)
        ax.fill_between(x, mean - half, mean + half, color=color, alpha=0.45, linewidth=0, label=label)
    ax.plot(x, mean, color=EPISTEMIC, linewidth=1.8, label="mean")
    if train_x is not None and train_y is not None:
        y = _array(train_y).reshape(len(train_y), -1)[:, output]
        ax.plot(_array(train_x).reshape(-1), y, ".", color=OBSERVED, markersize=5, label="data")
    ax.set_xlim(x.min(), x.max())
    ax.legend()
    return ax


def plot_predictions(
    prediction: Prediction,
    labels: Tensor | None = None,
    output: int = 0,
    level: float = 0.95,
    ax: Axes | None = None,
) -> Axes:
    """Examples side by side, sorted by their predicted mean, with error bars; labels outside of them stand out.

    The thick inner bar is epistemic alone, the whole bar epistemic plus aleatoric: the interval of the label.

    Args:
        prediction: at m inputs.
        labels: observed, ``(m,)`` or ``(m, D)``.
        output: which entry of the label.
        level: of both bars, as for Gaussians.
        ax: where to draw.
    """
    ax = _axes(ax)
    mean, aleatoric, epistemic = _entry(prediction, output)
    order, z = np.argsort(mean), _half_width(level)
    mean, aleatoric, epistemic = mean[order], aleatoric[order], epistemic[order]
    rank = np.arange(len(mean))
    width = float(np.clip(250 / max(1, len(mean)), 1.0, 6.0))
    for variance, color, label, scale in (
        (aleatoric + epistemic, ALEATORIC, f"{level:.0%} of labels: epistemic + aleatoric", 1.0),
        (epistemic, EPISTEMIC, f"{level:.0%} of functions: epistemic", 0.55),
    ):
        half = z * np.sqrt(variance)
        ax.vlines(rank, mean - half, mean + half, color=color, linewidth=scale * width, label=label)
    ax.plot(rank, mean, "_", color="white", markersize=width, markeredgewidth=1.2)
    if labels is not None:
        y = _array(labels).reshape(len(labels), -1)[:, output]
        if len(y) != len(mean):
            raise ValueError(f"There are {len(y)} labels, but {len(mean)} predictions.")
        y = y[order]
        inside = np.abs(y - mean) <= z * np.sqrt(aleatoric + epistemic)
        shape = {
            "linestyle": "none",
            "marker": "o",
            "markersize": 4,
            "markeredgecolor": "white",
            "markeredgewidth": 0.5,
        }
        ax.plot(rank[inside], y[inside], color=OBSERVED, label="observed", **shape)
        ax.plot(rank[~inside], y[~inside], color=OUTSIDE, label="observed, outside the interval", **shape)
    ax.set_xlim(-1, len(mean))
    ax.set_xlabel("examples, sorted by predicted mean")
    ax.legend()
    return ax


def plot_probabilities(
    prediction: Prediction,
    labels: Tensor | None = None,
    names: Sequence[str] | None = None,
    axes: Sequence[Axes] | None = None,
) -> np.ndarray:
    """Class probabilities, a small bar chart for each of a few examples; the observed class is the dark bar.

    The line at the end of a bar is one epistemic standard deviation to either side: how much the probability itself is
    in doubt. ``predict(x, approximation="mc")`` keeps it within what a probability can vary; the default's first-order
    variances are unbounded.

    Args:
        prediction: of classes, at m inputs.
        labels: observed classes, ``(m,)``.
        names: of the classes; numbers by default.
        axes: m of them.
    """
    if prediction.probs is None or prediction.probs.shape[-1] < 2:
        raise ValueError("plot_probabilities draws class probabilities; these predictions are of other labels.")
    probs, spread = _array(prediction.probs), np.sqrt(_array(prediction.epistemic))
    if probs.ndim != 2:
        raise ValueError(f"Predictions of m inputs are needed; these have the shape {tuple(prediction.probs.shape)}.")
    m, k = probs.shape
    axes = _many_axes(axes, m)
    names = [str(c) for c in range(k)] if names is None else list(names)
    place = np.arange(k)
    for i, ax in enumerate(axes):
        observed = place == int(labels[i]) if labels is not None else np.zeros(k, bool)
        ends = np.clip([probs[i] - spread[i], probs[i] + spread[i]], 0, 1)
        ax.barh(place, probs[i], color=[OBSERVED if o else NEUTRAL for o in observed], height=0.75)
        ax.hlines(place, *ends, color=EPISTEMIC, linewidth=2)
        ax.set_yticks(place, names)
        ax.invert_yaxis()
        ax.set_xlim(0, 1)
    return axes


def plot_variance_split(prediction: Prediction, names: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """Aleatoric and epistemic variance of the label of each example, stacked; summed over its entries.

    For classes the sum is that of all classes' indicators: ``1 - sum_k p_k^2`` in all, 0 where the class is certain
    (exactly so with ``predict(x, approximation="mc")``; see :func:`plot_probabilities`).

    Args:
        prediction: at m inputs.
        names: of the examples.
        ax: where to draw.
    """
    ax = _axes(ax)
    aleatoric, epistemic = _array(prediction.aleatoric).sum(-1), _array(prediction.epistemic).sum(-1)
    place = np.arange(len(aleatoric))
    ax.bar(place, aleatoric, color=ALEATORIC, width=0.6, label="aleatoric")
    ax.bar(place, epistemic, bottom=aleatoric, color=EPISTEMIC, width=0.6, label="epistemic")
    ax.set_xticks(place, names if names is not None else [str(i) for i in place])
    ax.set_xlim(-0.5, len(place) - 0.5)
    ax.set_ylabel("variance of the label")
    ax.legend()
    return ax


def plot_kernel(
    kernel: Tensor | Kernel,
    labels: Tensor | None = None,
    x: Tensor | None = None,
    names: Sequence[str] | None = None,
    normalize: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """A kernel matrix as an image, examples grouped by class.

    Several outputs are reduced to the trace of each pair's block, ``sum_k k_kk(x, x')``: what two examples share over
    all outputs, ``(n, n)``.

    Args:
        kernel: matrix ``(n, n)`` or ``(n K, n K)``, outputs fastest; or a GPyTorch kernel, evaluated at ``x``.
        labels: classes ``(n,)``; without them the examples stay in their order.
        x: inputs of a kernel, ``(n, d)``.
        names: of the classes, in the order of their sorted values.
        normalize: show correlations, ``k(x, x') / sqrt(k(x, x) k(x', x'))``.
        ax: where to draw; a colour bar is put beside it.
    """
    ax = _axes(ax)
    matrix = _trace_reduced(kernel, labels, x)
    n = len(matrix)
    if labels is not None and len(labels) != n:
        raise ValueError(f"There are {len(labels)} labels, but the kernel matrix is of {n} examples.")
    if normalize:
        scale = np.sqrt(np.diag(matrix))
        matrix = matrix / np.outer(scale, scale)
    if labels is not None:
        labels = _array(labels).reshape(-1)
        order = np.argsort(labels, kind="stable")
        matrix = matrix[np.ix_(order, order)]
    if matrix.min() < 0:
        largest = np.abs(matrix).max()
        style = {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest}
    else:
        style = {"cmap": "viridis", "vmin": 0.0, "vmax": matrix.max()}
    image = ax.imshow(matrix, interpolation="nearest", **style)
    if labels is not None:
        classes, counts = np.unique(labels, return_counts=True)
        ends = np.cumsum(counts)
        for edge in ends[:-1] - 0.5:
            ax.axhline(edge, color="white", linewidth=0.8)
            ax.axvline(edge, color="white", linewidth=0.8)
        names = [f"{c:g}" for c in classes] if names is None else list(names)
        if len(names) != len(classes):
            raise ValueError(f"There are {len(names)} names for {len(classes)} classes.")
        ax.set_xticks(ends - counts / 2 - 0.5, names)
        ax.set_yticks(ends - counts / 2 - 0.5, names)
    ax.tick_params(length=0)
    ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.03, label="correlation" if normalize else None)
    return ax


def plot_calibration(
    ys: Mapping[str, Distribution] | Distribution,
    labels: Tensor,
    levels: Sequence[float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Coverage of intervals (label sets) at every level: on the diagonal where right, below it where too sure.

    Args:
        ys: distributions of the labels by name, such as ``{"GP": gp.predict(x).y}``; see :func:`metrics.coverage`.
        labels: observed.
        levels: in (0, 1); 39 of them by default.
        ax: where to draw.
    """
    ax = _axes(ax)
    levels = np.linspace(0, 1, 41)[1:-1] if levels is None else np.asarray(levels, dtype=float)
    ax.plot([0, 1], [0, 1], color=NEUTRAL, linewidth=1, linestyle="--")
    for name, y in (ys if isinstance(ys, Mapping) else {None: ys}).items():
        ax.plot(levels, [float(metrics.coverage(y, labels, float(level))) for level in levels], label=name)
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="level", ylabel="coverage")
    if isinstance(ys, Mapping):
        ax.legend()
    return ax


def plot_evidence(
    values: Sequence[float] | Tensor,
    evidence: Tensor | Sequence,
    errors: Mapping[str, Tensor | Sequence] | None = None,
    name: str = "hyperparameter",
    log: bool = True,
    ax: Axes | None = None,
) -> tuple[Axes, Axes | None]:
    """Evidence (left axis) and errors such as test MSE (right axis) over a hyperparameter, each's best value starred.

    Several runs are drawn as their mean, with a band of one standard error to either side.

    Args:
        values: of the hyperparameter, ``(V,)``; names, such as ``"2 x 20"``, will do too and are spaced evenly.
        evidence: ``(V,)`` or ``(runs, V)``, in nats; the star is at its maximum.
        errors: curves of the same shapes by name; the star of each whose name begins with "test" is at its minimum.
        name: of the hyperparameter, for the axis.
        log: a logarithmic axis for numbers.
        ax: where to draw; the right axis is put over it.

    Returns:
        The left axis, and the right one, or None without errors.
    """
    ax = _axes(ax)
    numbers = all(isinstance(v, int | float | np.number) or getattr(v, "ndim", None) == 0 for v in values)
    x = np.asarray([float(v) for v in values]) if numbers else np.arange(len(values))
    curves = {"log evidence": evidence, **(errors or {})}
    for label, curve in curves.items():
        if np.shape(curve)[-1:] != (len(x),):
            raise ValueError(
                f"The curve {label!r} has the shape {tuple(np.shape(curve))}, but there are {len(x)} values."
            )
    _draw_curve(ax, x, evidence, EPISTEMIC, "-", "log evidence", np.argmax)
    ax.set_ylabel("log evidence (nats)", color=EPISTEMIC)
    ax.set_xlabel(name)
    if not numbers:
        ax.set_xticks(x, [str(v) for v in values])
    elif log:
        ax.set_xscale("log")
    if not errors:
        return ax, None
    right = ax.twinx()
    colors = [OUTSIDE, NEUTRAL, ALEATORIC, OBSERVED]
    for i, (label, curve) in enumerate(errors.items()):
        best = np.argmin if label.startswith("test") else None
        _draw_curve(right, x, curve, colors[i % len(colors)], ("--", ":", "-.")[i % 3], label, best)
    right.set_ylabel(", ".join(errors))
    lines = [*ax.get_lines(), *right.get_lines()]
    lines = [line for line in lines if not line.get_label().startswith("_")]
    right.legend(lines, [line.get_label() for line in lines])
    return ax, right


def plot_trials(
    settings: Mapping[str, Sequence],
    evidence: Sequence[float],
    trials: Sequence[int] | None = None,
    log: Sequence[str] = (),
    axes: Sequence[Axes] | None = None,
) -> np.ndarray:
    """A search: evidence over its trials, with the best so far, and over each hyperparameter; the best is starred.

    Late trials are dark, so that one sees what the search closes in on. Evidences far below the others stand as
    triangles at the bottom.

    Args:
        settings: the values of each hyperparameter by name, ``(n,)``; names are spaced evenly.
        evidence: of each trial, ``(n,)``, in nats.
        trials: their numbers, 1 to n by default.
        log: names of the hyperparameters with a logarithmic axis.
        axes: where to draw, one for the trials and one for each hyperparameter.

    Returns:
        The axes, ``(1 + number of hyperparameters,)``.
    """
    y = np.asarray(evidence, dtype=float)
    number = np.arange(1, len(y) + 1) if trials is None else np.asarray(trials)
    for name, values in {"trials": number, **settings}.items():
        if len(values) != len(y):
            raise ValueError(f"There are {len(values)} values of {name!r}, but {len(y)} evidences.")
    axes = _many_axes(axes, 1 + len(settings), 2.4)
    low, high = np.quantile(y, [0.25, 0.75])
    floor = min(low - 3 * (high - low), np.median(y)) - 1e-9 * abs(low)
    far, best = y < floor, int(np.argmax(y))
    bottom = y[~far].min() - 0.05 * np.ptp(y[~far]) if far.any() else None
    for ax, (name, values) in zip(axes, {"trial": number, **settings}.items()):
        x = np.asarray(values)
        if x.dtype.kind not in "iuf":
            names, x = np.unique(x.astype(str), return_inverse=True)
            ax.set_xticks(np.arange(len(names)), names)
            ax.set_xlim(-0.5, len(names) - 0.5)
        shape = {"c": number, "cmap": "Blues", "vmin": 1 - 0.5 * len(y), "edgecolors": EPISTEMIC, "linewidths": 0.6}
        ax.scatter(x[~far], y[~far], s=24, **{**shape, "c": number[~far]}, vmax=number.max())
        if far.any():
            ax.scatter(
                x[far], np.full(far.sum(), bottom), s=24, marker="v", **{**shape, "c": number[far]}, vmax=number.max()
            )
        ax.plot(x[best], y[best], "*", color="black", markersize=13, markeredgecolor="white", zorder=5)
        ax.set_xlabel(name)
        if name in log:
            ax.set_xscale("log")
    axes[0].step(number, np.maximum.accumulate(np.where(far, y[~far].min(), y)), where="post", color=EPISTEMIC)
    axes[0].set_ylabel("log evidence (nats)")
    return axes


def _draw_curve(ax: Axes, x: np.ndarray, curve, color: str, style: str, label: str, best) -> None:
    """Mean over runs with a band of its standard error; a star at the ``best`` place."""
    runs = np.atleast_2d(np.asarray(_array(curve) if isinstance(curve, Tensor) else curve, dtype=float))
    mean = runs.mean(0)
    ax.plot(x, mean, color=color, linestyle=style, linewidth=1.6, label=label)
    if len(runs) > 1:
        error = runs.std(0, ddof=1) / np.sqrt(len(runs))
        ax.fill_between(x, mean - error, mean + error, color=color, alpha=0.25, linewidth=0)
    if best is not None:
        place = best(mean)
        ax.plot(x[place], mean[place], "*", color="black", markersize=13, markeredgecolor="white", zorder=5)


def _trace_reduced(kernel: Tensor | Kernel, labels: Tensor | None, x: Tensor | None) -> np.ndarray:
    """``(n, n)``: blocks of a kernel matrix replaced by their traces."""
    if isinstance(kernel, Kernel):
        if x is None:
            raise ValueError("A kernel is drawn at inputs: pass x=. (Or pass a matrix.)")
        with torch.no_grad():
            matrix, n = kernel(x).to_dense(), x.shape[-2]
    else:
        matrix = kernel
        n = len(matrix) if labels is None else len(labels)
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or n == 0 or len(matrix) % n:
        raise ValueError(
            f"A square matrix of n, or n K, rows is needed; got the shape {tuple(matrix.shape)} for n = {n} examples."
        )
    k = len(matrix) // n
    return _array(matrix.unflatten(0, (n, k)).unflatten(2, (n, k)).diagonal(dim1=1, dim2=3).sum(-1))


def _entry(prediction: Prediction, output: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, aleatoric and epistemic variance of one entry of the label, ``(m,)`` each."""
    if prediction.mean.dim() != 2:
        raise ValueError(f"Predictions of m inputs are needed; these have the shape {tuple(prediction.mean.shape)}.")
    return tuple(_array(part)[:, output] for part in (prediction.mean, prediction.aleatoric, prediction.epistemic))


def _half_width(level: float) -> float:
    """In standard deviations: 1.96 for 0.95."""
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1; got {level}.")
    return float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)))


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt  # chooses a backend, so only where a figure is asked for

    return plt.subplots()[1]


def _many_axes(axes: Sequence[Axes] | None, m: int, width: float = 1.6) -> np.ndarray:
    if axes is None:
        import matplotlib.pyplot as plt

        options = {"sharey": True, "squeeze": False, "layout": "constrained"}
        return plt.subplots(1, m, figsize=(width * m + 0.5, 3.0), **options)[1][0]
    axes = np.asarray(axes, dtype=object).reshape(-1)
    if len(axes) != m:
        raise ValueError(f"There are {len(axes)} axes; needed are {m}.")
    return axes
