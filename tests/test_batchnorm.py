"""Batch normalisation at infinite width: reference numbers, quadrature, gradients, whole batches only."""

import copy
import math

import gpytorch
import pytest
import torch
from test_infinite_golden import cases, load
from torch import nn

from gpytorch_dnn2gp import infinite
from gpytorch_dnn2gp.infinite import batchnorm

F64 = torch.float64


def inputs(*sizes: int, d: int = 7, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, dtype=F64, generator=generator) for n in sizes]


def dense(kernel, *x) -> torch.Tensor:
    with torch.no_grad():
        return kernel(*x).to_dense()


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> bool:
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


# ---- reference numbers


@pytest.mark.parametrize(("file", "case"), cases("batchnorm_gp4a"))
def test_nngp_has_the_reference_numbers(reference, file, case):
    h, arrays = load(reference, file, case)
    x1, x2 = arrays["X1"], arrays["X2"]
    kernel = infinite.batchnorm_mlp(h["depth"], [x1, x2])
    for a, b, name in ((x1, x1, "K11"), (x2, x2, "K22"), (x1, x2, "K12")):
        assert close(dense(kernel, a, b), arrays[f"{name}_exact"], 1e-12)
    assert kernel(x1, diag=True).mean().item() == pytest.approx(0.5, abs=1e-13)


@pytest.mark.parametrize(("file", "case"), cases("batchnorm_ntk"))
def test_ntk_has_the_reference_numbers(reference, file, case):
    h, arrays = load(reference, file, case)
    x1, x2 = arrays["X1"], arrays["X2"]
    nngp = infinite.batchnorm_mlp(h["depth"], [x1, x2], 1.7)
    ntk = infinite.batchnorm_mlp(h["depth"], [x1, x2], 1.7, kernel="ntk")
    for a, b, name in ((x1, x1, "11"), (x2, x2, "22"), (x1, x2, "12")):
        assert close(dense(nngp, a, b), 1.7 * arrays[f"K{name}"], 1e-12)
        assert close(dense(ntk, a, b), 1.7 * arrays[f"T{name}"], 1e-8)


# ---- the integrals


@pytest.mark.parametrize(("n", "d"), [(2, 4), (3, 5), (5, 2), (12, 30)])
def test_the_rules_have_converged(n, d, monkeypatch):
    (x, z) = inputs(n, n, d=d)
    S, S2, X = x @ x.mT, 1e-6 * z @ z.mT, 1e-3 * x @ z.mT
    tangents = (S, X) if min(n - 1, d) >= 3 else (None, None)
    first = batchnorm.within(S, tangents[0]), batchnorm.across(S, S2, X, tangents[1])
    for step in ("_STEP_WITHIN", "_STEP_ACROSS"):
        monkeypatch.setattr(batchnorm, step, getattr(batchnorm, step) / 2)
    second = batchnorm.within(S, tangents[0]), batchnorm.across(S, S2, X, tangents[1])
    for a, b in zip(first, second):
        for u, v in zip(a, b):
            assert u is v is None or close(u, v, 1e-12)


def test_a_batch_beside_itself_is_the_batch():
    (x,) = inputs(6)
    S = x @ x.mT
    (V, dV), (V2, dV2) = batchnorm.within(S, S), batchnorm.across(S, S, S, S)
    assert close(V2, V, 1e-12)
    assert close(dV2, dV, 1e-5)  # where inputs are the same, V' keeps half of the digits


def test_batches_of_two_are_known_by_hand():
    """Normalised, the two are at 1 and -1, or -1 and 1: E relu relu' = 1/2 within, P(same sign)/2 across."""
    x, z = inputs(2, 2)
    kernel = infinite.batchnorm_mlp(1, [x, z])
    assert close(dense(kernel, x), 0.5 * torch.eye(2, dtype=F64), 1e-14)
    u, v = x[0] - x[1], z[0] - z[1]
    same = 0.5 + torch.asin(u @ v / (u.norm() * v.norm())) / math.pi
    expected = 0.5 * torch.stack([same, 1 - same, 1 - same, same]).view(2, 2)
    assert close(dense(kernel, x, z), expected, 1e-13)


def test_scales_and_shifts_of_a_batch_are_lost():
    x, z = inputs(5, 4)
    moved = 1e-4 * z + torch.arange(7.0, dtype=F64)
    first, second = infinite.batchnorm_mlp(2, [x, z]), infinite.batchnorm_mlp(2, [x, moved])
    assert close(dense(second, x, moved), dense(first, x, z), 1e-10)


def test_chunks_change_nothing(monkeypatch):
    x, z = inputs(5, 6)
    kernel = infinite.batchnorm_mlp(2, [x, z], kernel="ntk")
    both = torch.cat([x, z])
    whole, grad = value_and_gradient(kernel, both)
    monkeypatch.setattr(batchnorm.tiling, "numbers_per_chunk", lambda *_: 50_000)
    for a, b in zip(value_and_gradient(kernel, both), (whole, grad)):
        assert close(a, b, 1e-12)


def value_and_gradient(kernel, x):
    x = x.clone().requires_grad_()
    K = kernel(x).to_dense()
    (g,) = torch.autograd.grad(K.square().sum(), x)
    return K.detach(), g


# ---- laws


@pytest.mark.parametrize("kind", ["nngp", "ntk"])
def test_batches_one_after_the_other(kind):
    x, z, y = inputs(6, 4, 5)
    kernel = infinite.batchnorm_mlp(2, [x, z], 1.3, kernel=kind)
    kernel.add_batch(y)
    K = dense(kernel, torch.cat([y, x, z]))
    assert torch.equal(K, K.mT)
    assert torch.linalg.eigvalsh(K)[0] >= -1e-9 * K.abs().max()
    assert close(K[:5, 5:11], dense(kernel, y, x), 1e-12)
    assert close(K[11:, 5:11], dense(kernel, z, x), 1e-12)
    assert close(kernel(torch.cat([y, x, z]), diag=True), K.diagonal(), 1e-14)
    assert close(
        kernel(torch.cat([y, z]), torch.cat([z, y]), diag=True),
        dense(kernel, torch.cat([y, z]), torch.cat([z, y])).diagonal(),
        1e-14,
    )
    assert dense(kernel, x[:0]).shape == (0, 0)


def test_the_order_within_a_batch_only_permutes():
    x, z = inputs(6, 4)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    first, second = infinite.batchnorm_mlp(2, [x, z]), infinite.batchnorm_mlp(2, [x[order], z])
    assert close(dense(second, x[order], z), dense(first, x, z)[order], 1e-12)


@pytest.mark.parametrize("kind", ["nngp", "ntk"])
def test_gradients_in_inputs_and_in_the_readout(kind):
    x, z = inputs(4, 5, d=4)

    def f(x, z, raw, joint):
        kernel = infinite.batchnorm_mlp(1, [x, z], kernel=kind).double()
        del kernel.raw_readout_variance
        kernel.raw_readout_variance = raw
        return kernel(torch.cat([x, z])).to_dense() if joint else kernel(x, z).to_dense()

    raw = torch.tensor([0.3], dtype=F64, requires_grad=True)
    x, z = x.requires_grad_(), z.requires_grad_()
    for joint in (True, False):
        assert torch.autograd.gradcheck(lambda *a, joint=joint: f(*a, joint), (x, z, raw), fast_mode=True)


@pytest.mark.parametrize("kind", ["nngp", "ntk"])
def test_single_precision_and_batches_of_variances(kind):
    x, z = inputs(5, 4)
    double, single = (infinite.batchnorm_mlp(2, [x.to(t), z.to(t)], kernel=kind) for t in (F64, torch.float32))
    K = dense(single, x.float(), z.float())
    assert K.dtype == torch.float32
    assert close(K.double(), dense(double, x, z), 1e-5)
    assert close(dense(copy.deepcopy(double).float(), x.float(), z.float()).double(), K.double(), 1e-6)
    several = infinite.batchnorm_mlp(2, [x, z], torch.tensor([1.0, 3.0], dtype=F64), kernel=kind, batch_shape=[2])
    assert close(dense(several, x, z)[1], 3 * dense(double, x, z), 1e-14)
    assert several(x, diag=True).shape == (2, 5)


def test_state_dicts_bring_their_batches():
    x, z = inputs(5, 4)
    kernel, other = infinite.batchnorm_mlp(1, [x, z], 2.0), infinite.batchnorm_mlp(1, [0 * x + x.flip(0), z])
    other.load_state_dict(kernel.state_dict())
    assert torch.equal(dense(other, x, z), dense(kernel, x, z))


# ---- within GPyTorch and BoTorch


def test_an_exact_gp_learns_its_readout_and_predicts_a_batch():
    x, z = inputs(8, 5)
    y = x[:, 0] - 0.5 * x[:, 1]

    class Regression(gpytorch.models.ExactGP):
        def __init__(self):
            super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood().double())
            self.mean_module = gpytorch.means.ZeroMean()
            self.covar_module = infinite.batchnorm_mlp(1, [x, z])

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    gp = Regression()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)
    loss = -mll(gp(x), y)
    loss.backward()
    assert gp.covar_module.raw_readout_variance.grad.abs() > 0
    gp.eval()
    with torch.no_grad():
        posterior = gp(z)
        K = dense(gp.covar_module, torch.cat([x, z]))
        noisy = K[:8, :8] + gp.likelihood.noise * torch.eye(8, dtype=F64)
        assert close(posterior.mean, K[8:, :8] @ torch.linalg.solve(noisy, y), 1e-8)
        with pytest.raises(ValueError, match="point by point"):
            gp(z[:2])


def test_botorch_cannot_evaluate_it_point_by_point():
    botorch = pytest.importorskip("botorch")
    (x,) = inputs(8)
    kernel = infinite.batchnorm_mlp(1, x)
    model = botorch.models.SingleTaskGP(x, x[:, :1], covar_module=kernel)
    with pytest.raises(ValueError, match="point by point"):
        botorch.optim.optimize_acqf(
            botorch.acquisition.UpperConfidenceBound(model, 0.1),
            torch.stack([torch.zeros(7, dtype=F64), torch.ones(7, dtype=F64)]),
            q=1,
            num_restarts=1,
            raw_samples=2,
        )
    assert isinstance(kernel, nn.Module)


@pytest.mark.parametrize("kind", ["nngp", "ntk"])
def test_wide_nets_converge_to_the_kernel(kind):
    batches, generator = inputs(8, 7), torch.Generator().manual_seed(0)
    kernel = infinite.batchnorm_mlp(2, batches, 1.4, kernel=kind)
    found = infinite.monte_carlo(None, torch.cat(batches), (24, 96), 60, kernel, generator, progress=False)
    assert found.spread[1] < 0.7 * found.spread[0]
    assert found.error[1] < 2.5 * found.noise[1] + 3 / 96
