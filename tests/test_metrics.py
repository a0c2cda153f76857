"""Scores of predictions, against values computed by hand and against the rates that right predictions must have."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Poisson,
)
from torch.testing import assert_close

from gpytorch_dnn2gp import losses, metrics
from gpytorch_dnn2gp.predictive import predictive

F64 = torch.float64
PROBS = tensor([[0.5, 0.3, 0.2], [0.98, 0.01, 0.01], [0.2, 0.7, 0.1]], dtype=F64)


def test_negative_log_likelihood_by_hand():
    assert_close(
        metrics.negative_log_likelihood(Categorical(probs=PROBS), tensor([1, 0, 1])),
        tensor(-(math.log(0.3) + math.log(0.98) + math.log(0.7)) / 3, dtype=F64),
    )
    y = Independent(Normal(tensor([[0.0], [1.0]]).double(), tensor(2.0).double()), 1)
    by_hand = tensor(0.5 * math.log(2 * math.pi * 4) + (1 / 8 + 9 / 8) / 2, dtype=F64)
    assert_close(metrics.negative_log_likelihood(y, tensor([[1.0], [-2.0]]).double()), by_hand)
    assert_close(metrics.negative_log_likelihood(y, tensor([1.0, -2.0])), by_hand)  # (n,) for one entry; float32


def test_coverage_of_intervals_by_hand():
    z = 1.959963984540054
    y = Independent(Normal(torch.zeros(4, 1, dtype=F64), 2.0), 1)
    labels = tensor([0.0, 2 * z - 1e-6, -2 * z - 1e-6, 9.0], dtype=F64)
    assert metrics.coverage(y, labels) == 0.5
    assert metrics.coverage(y, labels, level=0.9999999) == 1.0
    assert metrics.coverage(y, labels, level=0.01) == 0.25


def test_coverage_of_a_joint_gaussian_is_that_of_its_entries():
    covariance = tensor([[4.0, 1.0], [1.0, 1.0]], dtype=F64)
    y = MultivariateNormal(torch.zeros(2, 2, dtype=F64), covariance)
    labels = tensor([[3.9, 1.97], [-4.0, 0.0]], dtype=F64)  # inside, outside; outside, inside
    assert metrics.coverage(y, labels) == 0.5


def test_coverage_of_mixtures_is_that_of_their_quantiles():
    weights = Categorical(probs=tensor([0.5, 0.5], dtype=F64).expand(3, 1, 2))
    components = Normal(tensor([-10.0, 10.0], dtype=F64).expand(3, 1, 2), 1.0)
    y = Independent(MixtureSameFamily(weights, components), 1)
    # 95 % between the quantiles 0.025 of all, 0.05 of the left component: -10 - 1.645, and the same on the right
    assert_close(metrics.coverage(y, tensor([-11.7, -11.6, 0.0], dtype=F64)), tensor(2 / 3, dtype=F64))


def test_coverage_of_label_sets_by_hand():
    y = Categorical(probs=PROBS)
    # first row: 0.5 + 0.3 whole, then 0.15 of 0.2; second row: 0.95 of 0.98; third: 0.7 + 0.2 whole, then 0.05 of 0.1
    chances = tensor([[1.0, 1.0, 0.75], [0.95 / 0.98, 0.0, 0.0], [1.0, 1.0, 0.5]], dtype=F64)
    for labels in ([0, 0, 0], [2, 1, 1], [1, 2, 2]):
        by_hand = chances[torch.arange(3), labels].mean()
        assert_close(metrics.coverage(y, tensor(labels)), by_hand)
    assert_close((chances * PROBS).sum(-1), torch.full((3,), 0.95, dtype=F64))  # what makes it right


def test_coverage_of_one_logit_is_that_of_two_classes():
    p = tensor([0.9, 0.02, 0.5], dtype=F64)
    ones = tensor([1.0, 1.0, 0.0], dtype=F64)
    single = metrics.coverage(Independent(Bernoulli(probs=p[:, None]), 1), ones[:, None])
    assert_close(single, metrics.coverage(Categorical(probs=torch.stack([1 - p, p], -1)), ones.long()))


@given(
    st.lists(st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4), min_size=1, max_size=5),
    st.floats(0.05, 0.99),
)
def test_coverage_is_the_level_where_the_probabilities_are_right(weights, level):
    probs = torch.tensor(weights, dtype=F64)
    probs = probs / probs.sum(-1, keepdim=True)
    k = probs.shape[-1]
    expected = sum(
        (probs[:, c] * torch.stack([metrics.coverage(Categorical(probs=p[None]), tensor([c]), level) for p in probs]))
        for c in range(k)
    )
    assert_close(expected, torch.full_like(expected, level))


def test_coverage_of_predictions_that_are_right_is_the_level():
    generator = torch.Generator().manual_seed(0)
    n = 20000
    mean = torch.randn(n, 1, generator=generator, dtype=F64)
    variance = torch.rand(n, 1, 1, generator=generator, dtype=F64)
    f = mean + variance[..., 0].sqrt() * torch.randn(n, 1, generator=generator, dtype=F64)
    labels = f + 0.3 * torch.randn(n, 1, generator=generator, dtype=F64)
    y = predictive(losses.Gaussian(0.3), mean, variance).y
    for level in (0.5, 0.95):
        assert abs(metrics.coverage(y, labels, level) - level) < 4 * math.sqrt(level * (1 - level) / n)


def test_calibration_error_by_hand():
    # confidences 0.5, 0.98, 0.7 in three bins; right, wrong, right
    assert_close(metrics.calibration_error(PROBS, tensor([0, 2, 1])), tensor((0.5 + 0.98 + 0.3) / 3, dtype=F64))
    # one bin: accuracy 2/3 against confidence (0.5 + 0.98 + 0.7) / 3
    assert_close(metrics.calibration_error(PROBS, tensor([0, 2, 1]), num_bins=1), tensor((2.18 - 2) / 3, dtype=F64))


def test_calibration_error_at_the_edges_of_bins():
    # 0.5 belongs to (0, 0.5], 1 to (0.5, 1]: two right of two each, gaps 0.5 and 0
    probs = tensor([[0.5, 0.5], [1.0, 0.0]], dtype=F64)
    assert_close(metrics.calibration_error(probs, tensor([0, 0]), num_bins=2), tensor(0.25, dtype=F64))


def test_calibration_error_of_one_logit_is_that_of_two_classes():
    p = tensor([0.9, 0.2, 0.4], dtype=F64)
    labels = tensor([1, 1, 0])
    two = metrics.calibration_error(torch.stack([1 - p, p], -1), labels)
    assert_close(metrics.calibration_error(p, labels), two)
    assert_close(metrics.calibration_error(p[:, None], labels[:, None].double()), two)


def test_errors_name_the_shapes():
    y = Categorical(probs=PROBS)
    with pytest.raises(ValueError, match=r"shape \(2,\); these predictions are for \(3,\)"):
        metrics.negative_log_likelihood(y, tensor([0, 1]))
    with pytest.raises(ValueError, match="3 predictions, but 2 labels"):
        metrics.calibration_error(PROBS, tensor([0, 1]))
    with pytest.raises(ValueError, match="level"):
        metrics.coverage(y, tensor([0, 1, 2]), level=95)
    with pytest.raises(TypeError, match="Poisson"):
        metrics.coverage(Independent(Poisson(torch.ones(2, 1)), 1), torch.ones(2, 1))
