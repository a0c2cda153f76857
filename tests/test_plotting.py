"""Pictures: what the artists hold is compared with the numbers they stand for."""

import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import gpytorch
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import same_color, to_rgb
from torch import nn
from torch.distributions import Categorical, Independent, Normal

import gpytorch_dnn2gp as dnn2gp
from gpytorch_dnn2gp import metrics, plotting
from gpytorch_dnn2gp.predictive import predictive

F64 = torch.float64
ROOT = Path(__file__).parent.parent
Z = 1.959963984540054


@pytest.fixture(autouse=True)
def nothing_shown_and_no_settings_changed(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda *a, **k: pytest.fail("plt.show was called"))
    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before


def prediction(loss, mean, covariance, **options):
    moments = predictive(loss, mean, covariance, **options)
    f = gpytorch.distributions.MultivariateNormal(mean, covariance)
    return dnn2gp.Prediction(moments.mean, moments.aleatoric, moments.epistemic, f, moments.y, moments.probs)


@pytest.fixture
def numbers():
    """Five predictions in one entry, noise 0.3: variances 0.01, 0.04, ... of the mean."""
    mean = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0], dtype=F64)[:, None]
    variance = torch.tensor([0.01, 0.04, 0.09, 0.16, 0.25], dtype=F64)
    return prediction(dnn2gp.losses.Gaussian(0.3), mean, variance[:, None, None])


@pytest.fixture
def classes():
    """Three predictions of four classes."""
    mean = 2 * torch.randn(3, 4, dtype=F64)
    covariance = torch.eye(4, dtype=F64).expand(3, 4, 4) * torch.tensor([0.1, 1.0, 3.0], dtype=F64)[:, None, None]
    return prediction(dnn2gp.losses.Categorical(), mean, covariance, approximation="mc")


def band(collection):
    """Lower and upper ends of a filled band by x."""
    vertices = collection.get_paths()[0].vertices
    xs = np.unique(vertices[:, 0])
    at = [vertices[vertices[:, 0] == x, 1] for x in xs]
    return xs, np.array([v.min() for v in at]), np.array([v.max() for v in at])


def handles(ax):
    return dict(zip([t.get_text() for t in ax.get_legend().get_texts()], ax.get_legend().legend_handles))


# ---- numbers


def test_bands_are_those_of_the_two_variances(numbers):
    x = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0], dtype=F64)
    ax = plotting.plot_regression_1d(numbers, x[:, None])
    order = x.argsort()
    mean, epistemic = numbers.mean[order, 0], numbers.epistemic[order, 0]
    total, inner = ax.collections
    for collection, variance in ((total, epistemic + 0.09), (inner, epistemic)):
        xs, low, high = band(collection)
        np.testing.assert_allclose(xs, x[order])
        np.testing.assert_allclose(low, mean - Z * variance.sqrt())
        np.testing.assert_allclose(high, mean + Z * variance.sqrt())
    np.testing.assert_allclose(ax.lines[0].get_xydata(), torch.stack([x[order], mean], -1))
    assert ax.get_xlim() == (1.0, 5.0)
    assert not same_color(total.get_facecolor(), inner.get_facecolor())


def test_regression_shows_the_data_in_the_given_axes(numbers):
    given = plt.subplots()[1]
    train_x, train_y = torch.tensor([[1.5], [2.5]]), torch.tensor([[0.1], [0.2]])
    ax = plotting.plot_regression_1d(numbers, torch.arange(5.0), train_x, train_y, ax=given)
    assert ax is given
    np.testing.assert_allclose(ax.lines[1].get_xydata(), [[1.5, 0.1], [2.5, 0.2]], rtol=1e-6)
    assert list(handles(ax))[-1] == "data"


def test_predictions_are_sorted_and_labels_outside_stand_out(numbers):
    # sorted means -1, 0, 0.5, 1, 2; half-widths Z * sqrt(variance + 0.09)
    offset = torch.tensor([0.0, 0.99, 1.01, -0.99, -1.01], dtype=F64)[:, None] * Z  # examples 2 and 4 are outside
    labels = numbers.mean + offset * numbers.variance.sqrt()
    ax = plotting.plot_predictions(numbers, labels)
    order = numbers.mean[:, 0].argsort()
    whole, inner = (np.array(c.get_segments()) for c in ax.collections)
    for segments, variance in ((whole, numbers.variance), (inner, numbers.epistemic)):
        np.testing.assert_allclose(segments[:, 0, 0], range(5))
        half = (Z * variance.sqrt())[order, 0]
        np.testing.assert_allclose(
            segments[:, :, 1], torch.stack([numbers.mean[order, 0] - half, numbers.mean[order, 0] + half], -1)
        )
    mean, inside, outside = ax.lines
    np.testing.assert_allclose(mean.get_ydata(), [-1, 0, 0.5, 1, 2])
    rank = order.argsort()
    np.testing.assert_allclose(sorted(inside.get_xdata()), sorted(rank[[0, 1, 3]]))
    np.testing.assert_allclose(sorted(outside.get_xdata()), sorted(rank[[2, 4]]))
    np.testing.assert_allclose(sorted(outside.get_ydata()), sorted(labels[[2, 4], 0]))
    assert inside.get_color() != outside.get_color()
    assert len(inside.get_xdata()) / 5 == metrics.coverage(numbers.y, labels)


def test_level_scales_the_bars(numbers):
    narrow, wide = (
        np.ptp(np.array(plotting.plot_predictions(numbers, level=level).collections[0].get_segments())[:, :, 1], axis=1)
        for level in (0.6826894921370859, 0.9544997361036416)
    )
    np.testing.assert_allclose(narrow, 2 * numbers.variance.sqrt()[numbers.mean[:, 0].argsort(), 0])
    np.testing.assert_allclose(wide, 2 * narrow)


# ---- classes


def test_probabilities_and_their_doubt(classes):
    axes = plotting.plot_probabilities(classes, labels=torch.tensor([3, 0, 1]), names=list("abcd"))
    assert len(axes) == 3
    for i, (ax, label) in enumerate(zip(axes, [3, 0, 1])):
        np.testing.assert_allclose([bar.get_width() for bar in ax.patches], classes.probs[i])
        dark = [same_color(bar.get_facecolor(), plotting.OBSERVED) for bar in ax.patches]
        assert dark == [k == label for k in range(4)]
        ends = np.array(ax.collections[0].get_segments())[:, :, 0]
        p, s = classes.probs[i], classes.epistemic[i].sqrt()
        np.testing.assert_allclose(ends, torch.stack([(p - s).clamp(0, 1), (p + s).clamp(0, 1)], -1))
        assert ax.get_xlim() == (0, 1)
    assert [t.get_text() for t in axes[0].get_yticklabels()] == list("abcd")


def test_variances_are_stacked(classes):
    ax = plotting.plot_variance_split(classes, names=["x", "y", "z"])
    aleatoric, epistemic = ax.containers
    np.testing.assert_allclose([bar.get_height() for bar in aleatoric], classes.aleatoric.sum(-1))
    np.testing.assert_allclose([bar.get_height() for bar in epistemic], classes.epistemic.sum(-1))
    np.testing.assert_allclose([bar.get_y() for bar in epistemic], classes.aleatoric.sum(-1))
    tops = [bar.get_y() + bar.get_height() for bar in epistemic]
    np.testing.assert_allclose(tops, 1 - classes.probs.square().sum(-1))  # all the variance of a class label
    assert [t.get_text() for t in ax.get_xticklabels()] == ["x", "y", "z"]
    assert list(handles(ax)) == ["aleatoric", "epistemic"]


def test_the_two_uncertainties_are_told_apart_in_grey():
    grey = [np.dot(to_rgb(c), (0.299, 0.587, 0.114)) for c in (plotting.EPISTEMIC, plotting.ALEATORIC)]
    assert abs(grey[0] - grey[1]) > 0.3


# ---- kernels


@pytest.fixture
def kernel():
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    return dnn2gp.JacobianKernel(net, prior_precision=2.0)


def image_of(ax):
    return np.asarray(ax.images[0].get_array())


def test_kernel_is_traced_over_outputs_and_grouped_by_class(kernel):
    x, labels = torch.randn(6, 2, dtype=F64), torch.tensor([2, 0, 2, 1, 0, 2])
    names = ["none", "one", "two"]
    ax = plotting.plot_kernel(kernel, labels, x, names=names)
    J = kernel.feature_map(x).detach()  # (n, K, P)
    traced = torch.einsum("ikp,jkp->ij", J, J)
    order = [1, 4, 3, 0, 2, 5]
    np.testing.assert_allclose(image_of(ax), traced[order][:, order], rtol=1e-10)
    horizontal = [line.get_ydata()[0] for line in ax.lines if np.ptp(line.get_ydata()) == 0]
    vertical = [line.get_xdata()[0] for line in ax.lines if np.ptp(line.get_xdata()) == 0]
    assert horizontal == vertical == [1.5, 2.5]
    for axis in (ax.xaxis, ax.yaxis):
        assert [t.get_text() for t in axis.get_ticklabels()] == names
        np.testing.assert_allclose(axis.get_ticklocs(), [0.5, 2.0, 4.0])
    assert len(ax.figure.axes) == 2  # and its colour bar

    matrix = kernel(x).to_dense()
    np.testing.assert_allclose(image_of(plotting.plot_kernel(matrix, labels)), image_of(ax), rtol=1e-10)
    np.testing.assert_allclose(image_of(plotting.plot_kernel(traced, labels)), image_of(ax), rtol=1e-10)


def test_kernel_as_correlation():
    matrix = torch.tensor([[4.0, 1.0], [1.0, 1.0]])
    ax = plotting.plot_kernel(matrix, normalize=True)
    np.testing.assert_allclose(image_of(ax), [[1.0, 0.5], [0.5, 1.0]])
    assert ax.images[0].get_clim() == (0.0, 1.0)


def test_kernel_with_negative_entries_has_zero_in_the_middle_of_the_colours():
    ax = plotting.plot_kernel(torch.tensor([[2.0, -1.0], [-1.0, 2.0]]))
    assert ax.images[0].get_clim() == (-2.0, 2.0)


# ---- calibration


def test_calibration_curve_is_the_coverage_at_every_level():
    labels = torch.randn(200, 1, dtype=F64)
    ys = {f"sigma {s}": Independent(Normal(torch.zeros(200, 1, dtype=F64), s), 1) for s in (0.5, 1.0)}
    levels = [0.1, 0.5, 0.9]
    ax = plotting.plot_calibration(ys, labels, levels)
    diagonal, *curves = ax.lines
    np.testing.assert_allclose(diagonal.get_xydata(), [[0, 0], [1, 1]])
    for curve, y in zip(curves, ys.values()):
        np.testing.assert_allclose(curve.get_xdata(), levels)
        np.testing.assert_allclose(curve.get_ydata(), [metrics.coverage(y, labels, level) for level in levels])
    assert list(handles(ax)) == list(ys)
    assert (curves[0].get_ydata() < curves[1].get_ydata()).all()  # the one that is too sure


def test_calibration_of_one_distribution_of_classes():
    probs = torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    ax = plotting.plot_calibration(Categorical(probs=probs), torch.tensor([0, 1]))
    assert len(ax.lines) == 2 and ax.get_legend() is None


# ---- a fitted GP; mistakes


def test_pictures_of_a_gp():
    x = torch.linspace(-2, 2, 12, dtype=F64)[:, None]
    net = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    gp = dnn2gp.LaplaceGP(net, x, x.sin(), dnn2gp.losses.Gaussian(0.2))
    p = gp.predict(x)
    figure, axes = plt.subplots(1, 3)
    plotting.plot_regression_1d(p, x, x, x.sin(), ax=axes[0])
    plotting.plot_predictions(p, x.sin(), ax=axes[1])
    plotting.plot_kernel(gp.covar_module, x=x, ax=axes[2])
    figure.canvas.draw()
    np.testing.assert_allclose(image_of(axes[2]), gp.covar_module(x).to_dense().detach(), rtol=1e-10)


def test_mistakes_are_named(numbers, classes, kernel):
    with pytest.raises(ValueError, match="4 inputs, but 5 predictions"):
        plotting.plot_regression_1d(numbers, torch.zeros(4))
    with pytest.raises(ValueError, match="3 labels, but 5 predictions"):
        plotting.plot_predictions(numbers, torch.zeros(3))
    with pytest.raises(ValueError, match="level"):
        plotting.plot_predictions(numbers, level=95)
    with pytest.raises(ValueError, match="class probabilities"):
        plotting.plot_probabilities(numbers)
    with pytest.raises(ValueError, match="There are 2 axes; needed are 3"):
        plotting.plot_probabilities(classes, axes=plt.subplots(1, 2)[1])
    with pytest.raises(ValueError, match="pass x="):
        plotting.plot_kernel(kernel)
    with pytest.raises(ValueError, match="square matrix"):
        plotting.plot_kernel(torch.ones(4, 4), torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="1 names for 2 classes"):
        plotting.plot_kernel(torch.ones(2, 2), torch.tensor([0, 1]), names=["zero"])


def test_importing_the_package_leaves_pyplot_and_its_backend_alone():
    code = "import sys, gpytorch_dnn2gp; assert 'matplotlib.pyplot' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_evidence_over_a_hyperparameter():
    values, evidence = [0.1, 1.0, 10.0], torch.tensor([[-9.0, -5.0, -7.0], [-8.0, -6.0, -8.0]])
    errors = {"test MSE": [[3.0, 2.0, 1.0]] * 2, "train MSE": [[1.0, 2.0, 3.0]] * 2}
    ax, right = plotting.plot_evidence(values, evidence, errors, "delta")
    assert ax.get_xscale() == "log" and ax.get_xlabel() == "delta"
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), [-8.5, -5.5, -7.5])
    stars = [line for line in [*ax.get_lines(), *right.get_lines()] if line.get_marker() == "*"]
    assert [(float(s.get_xdata()[0]), float(s.get_ydata()[0])) for s in stars] == [(1.0, -5.5), (10.0, 1.0)]
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose([band.min(), band.max()], [-9.0, -5.0])  # one standard error: half the distance of two
    assert [t.get_text() for t in right.get_legend().get_texts()] == ["log evidence", "test MSE", "train MSE"]
    ax, none = plotting.plot_evidence(["1 x 5", "2 x 5"], [1.0, 2.0])
    assert none is None and [t.get_text() for t in ax.get_xticklabels()] == ["1 x 5", "2 x 5"]
    with pytest.raises(ValueError, match="there are 3 values"):
        plotting.plot_evidence(values, [1.0, 2.0])
