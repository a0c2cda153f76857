"""Infinite-width kernels: laws, gradients, layouts of nets, hyperparameters, GPyTorch and BoTorch."""

import copy
import functools
import pickle
import subprocess
import sys
from pathlib import Path

import gpytorch
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_operator.utils.errors import NanError
from torch import nn

from gpytorch_dnn2gp import Linearization, infinite
from gpytorch_dnn2gp.infinite import integrals, matrix
from gpytorch_dnn2gp.losses import Gaussian
from gpytorch_dnn2gp.selection import Candidate, compare

F64 = torch.float64
ACTIVATIONS = (
    "relu",
    "leaky_relu",
    "abs",
    "erf",
    "gelu",
    "sin",
    "cos",
    "tanh",
    "sigmoid",
    "silu",
    "softplus",
    "square",
)


def kernel_of(kind: str, depth: int = 2, activation="relu", weight=1.7, bias=0.2, **options):
    w, b = (torch.as_tensor(v, dtype=F64) for v in (weight, bias))
    return infinite.fully_connected(depth, activation, w, b, kernel=kind, **options)


def dense(kernel, *inputs) -> torch.Tensor:
    with torch.no_grad():
        return kernel(*inputs).to_dense()


def images(n: int, *shape: int) -> torch.Tensor:
    return torch.randn(n, torch.Size(shape).numel(), dtype=F64)


def pooled_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 4, 2),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).double()


class Fixed(nn.Module):
    """A layer that is not torch's."""

    def forward(self, x):
        return 3 * x


# ---- laws


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), activation=st.sampled_from(ACTIVATIONS), kind=st.sampled_from(["nngp", "ntk"]))
def test_kernels_are_symmetric_and_positive_semidefinite(seed, activation, kind):
    torch.manual_seed(seed)
    x = torch.randn(8, 3, dtype=F64)
    x = torch.cat([x, x[:2], -x[:2], torch.zeros(1, 3, dtype=F64), x[:1] + 1e-7])
    for bias in (0.0, 0.3):
        K = dense(kernel_of(kind, 3, activation, 1.5, bias), x)
        assert K.isfinite().all()
        assert torch.equal(K, K.mT)
        eigenvalues = torch.linalg.eigvalsh(K)
        assert eigenvalues[0] >= -1e-7 * eigenvalues[-1]


@pytest.mark.parametrize("kind", ["nngp", "ntk"])
@pytest.mark.parametrize("make", [lambda kind: kernel_of(kind, 3, "tanh"), lambda kind: kernel_of(kind, 3, "relu")])
def test_tiles_halves_and_diagonal_agree(kind, make, monkeypatch):
    kernel, x = make(kind), torch.randn(13, 4, dtype=F64)
    whole = dense(kernel, x, x.flip(0)).flip(1)  # not symmetric by construction
    torch.testing.assert_close(dense(kernel, x), whole, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(kernel(x, diag=True), whole.diagonal(), rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(kernel(x[:5], x[5:10], diag=True), whole[:5, 5:10].diagonal(), rtol=1e-7, atol=1e-10)
    for size in (1, 7, 30):
        monkeypatch.setitem(matrix.TILE_BYTES, "cpu", 8 * size)
        torch.testing.assert_close(dense(kernel, x), dense(kernel, x).mT, rtol=0, atol=0)
        torch.testing.assert_close(dense(kernel, x), whole, rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(dense(kernel, x[:4], x), whole[:4], rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(kernel(x).to_dense().detach(), whole, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("kind", [infinite.NNGPKernel, infinite.NTKKernel])
def test_tiles_of_images_agree(kind, monkeypatch):
    kernel, x = kind(pooled_net(), input_shape=(2, 6, 6)), images(5, 2, 6, 6)
    whole = dense(kernel, x, x.flip(0)).flip(1)
    monkeypatch.setitem(matrix.TILE_BYTES, "cpu", 1)
    for K in (dense(kernel, x), kernel(x).to_dense().detach()):
        torch.testing.assert_close(K, whole, rtol=1e-7, atol=0)
    torch.testing.assert_close(kernel(x, diag=True), whole.diagonal(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("kind", ["nngp", "ntk"])
def test_float32(kind):
    x = torch.randn(9, 5, dtype=F64)
    x[1] = x[0]
    for activation in ACTIVATIONS:
        double = kernel_of(kind, 3, activation)
        single = infinite.fully_connected(3, activation, 1.7, 0.2, kernel=kind)
        K = dense(single, x.float())
        assert K.dtype == torch.float32
        torch.testing.assert_close(K.double(), dense(double, x), rtol=2e-4, atol=0)


@pytest.mark.parametrize("kind", ["nngp", "ntk"])
def test_batches_of_inputs_and_of_hyperparameters(kind):
    x, z = torch.randn(3, 2, 6, 4, dtype=F64), torch.randn(5, 4, dtype=F64)
    kernel = kernel_of(kind, 2, "tanh")
    each = torch.stack([torch.stack([dense(kernel, x[i, j], z) for j in range(2)]) for i in range(3)])
    torch.testing.assert_close(dense(kernel, x, z.expand(3, 2, 5, 4)), each)
    weight, bias = torch.tensor([1.0, 2.0], dtype=F64), torch.tensor([0.0, 0.3], dtype=F64)
    several = kernel_of(kind, 2, "tanh", weight, bias, batch_shape=torch.Size([2]))
    each = torch.stack([dense(kernel_of(kind, 2, "tanh", w, b), z) for w, b in zip(weight, bias)])
    torch.testing.assert_close(dense(several, z), each)
    torch.testing.assert_close(several(x, diag=True)[0, 1], dense(several, x[0, 1])[1].diagonal())


# ---- gradients


SPECIAL = torch.tensor([[0.3, -0.8], [1.1, 0.4], [0.3, -0.8], [-1.1, -0.4], [0.0, 0.0]], dtype=F64)
# An NTK has a kink where inputs are parallel, the arc-cosine kernel of a rectifier; central differences see none there.


@pytest.mark.parametrize("kind", ["nngp", "ntk"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "erf", "gelu", "sin", "tanh", "sigmoid", "square"])
@pytest.mark.parametrize("bias", [0.0, 0.3])
def test_gradients_in_inputs_at_identical_opposite_and_zero_inputs(kind, activation, bias):
    kernel = kernel_of(kind, 2, activation, 1.3, bias)
    other = torch.tensor([[0.3, -0.8], [-1.1, -0.4], [0.7, 0.2]], dtype=F64)
    x = SPECIAL.clone().requires_grad_()
    assert torch.autograd.grad(kernel(x, other).to_dense().sum(), x)[0].isfinite().all()
    if bias == 0 and activation in ("relu", "leaky_relu"):  # homogeneous, so the kernel is a cone at zero
        x = SPECIAL[:4].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kernel(x, other).to_dense(), x, atol=1e-4, rtol=1e-3)
    assert torch.autograd.gradcheck(lambda x: kernel(x, diag=True), x)


@pytest.mark.parametrize("kind", ["nngp", "ntk"])
@pytest.mark.parametrize("activation", ["relu", "erf", "gelu", "tanh"])
def test_gradients_in_hyperparameters(kind, activation):
    kernel = kernel_of(kind, 2, activation, [1.3, 0.8, 2.0], [0.2, 0.1, 0.4])

    def covariance(w, b):
        hyper = {"weight_variance": w, "bias_variance": b}
        others = (None, -SPECIAL)
        return torch.stack([matrix.covariance(kernel.program, SPECIAL, x, hyper, ntk=kernel._ntk) for x in others])

    w, b = (v.detach().clone().requires_grad_() for v in (kernel.weight_variance, kernel.bias_variance))
    assert torch.autograd.gradcheck(covariance, (w, b), atol=1e-5, rtol=1e-4)
    assert all(g.isfinite().all() for g in torch.autograd.grad(covariance(w, b).sum(), (w, b)))


def test_gradients_through_many_tiles_are_those_of_one(monkeypatch):
    net, x = pooled_net(), images(4, 2, 6, 6)
    gradients = []
    for size in (1, 2**20):
        monkeypatch.setitem(matrix.TILE_BYTES, "cpu", size)
        kernel, z = infinite.NTKKernel(net, input_shape=(2, 6, 6)), x.clone().requires_grad_()
        (kernel(z).to_dense() * torch.arange(16, dtype=F64).view(4, 4)).sum().backward()
        gradients.append([z.grad, *(p.grad for p in kernel.parameters())])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


# ---- nets


class Branches(nn.Module):
    """What people write in forward."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.functional = functional
        self.a, self.b = nn.Conv1d(2, 4, 3, padding="same"), nn.Conv1d(4, 4, 3, padding="same")
        self.readout, self.drop, self.leaky = nn.Linear(20, 1), nn.Dropout(0.4), nn.LeakyReLU(0.2)

    def forward(self, x):
        h = self.a(x)
        if self.functional:
            h = torch.add(h, self.b(nn.functional.leaky_relu(h, 0.2)))
            h = nn.functional.dropout(nn.functional.gelu(h), 0.4, self.training)
            return self.readout(h.view(x.size(0), -1))
        h = h + self.b(self.leaky(h))
        return self.readout(torch.flatten(self.drop(nn.functional.gelu(h)), 1))


def test_functions_methods_and_modules_are_the_same():
    x = images(4, 2, 5)
    one, two = (infinite.NTKKernel(Branches(f).double(), input_shape=(2, 5)) for f in (True, False))
    assert torch.equal(dense(one, x), dense(two, x))


def test_a_net_is_neither_kept_nor_changed():
    net = Branches(False).double()
    before = copy.deepcopy(net.state_dict())
    kernel = infinite.NNGPKernel(net, input_shape=(2, 5))
    dense(kernel, images(3, 2, 5))
    assert net.training and all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))
    assert {name for name, _ in kernel.named_parameters()} == {"raw_weight_variance", "raw_bias_variance"}
    assert len([m for m in kernel.modules() if isinstance(m, nn.Conv1d)]) == 0


def test_what_comes_before_the_first_weights_is_exact():
    x = images(5, 2, 4, 4)
    net = nn.Sequential(nn.AvgPool2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 1)).double()
    features = net[:3](x.view(5, 2, 4, 4))
    K = dense(infinite.NNGPKernel(net, 1.5, 0.2, input_shape=(2, 4, 4)), x)
    torch.testing.assert_close(K, 1.5 * features @ features.mT / 8 + 0.2)


def test_pooling_and_padding_of_every_kind_against_a_finite_net():
    """A net of one convolution is a Gaussian process at any width: its covariance is known from its matrix."""
    shape = (2, 7, 6)
    x = images(3, *shape)
    for tail in (
        [nn.AvgPool2d(3, 2, 1)],
        [nn.AvgPool2d((2, 3), stride=1, padding=1, count_include_pad=False)],
        [nn.AvgPool2d(3, 2, ceil_mode=True)],
        [nn.AdaptiveAvgPool2d((2, 3))],
        [nn.ReflectionPad2d(2), nn.AvgPool2d(3)],
        [nn.ReplicationPad2d((1, 0, 2, 0)), nn.AvgPool2d(2)],
        [nn.CircularPad2d(1), nn.AvgPool2d(3, 1)],
    ):
        head = nn.Conv2d(2, 1, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(1, 0), bias=False).double()
        body = nn.Sequential(head, *tail)
        # the net is linear in its 12 weights, N(0, 1.4 / 12): J is what each of them does
        J = []
        for weight in torch.eye(12, dtype=F64):
            head.weight.data = weight.view(1, 2, 3, 2)
            J.append(body(x.view(3, *shape)).detach().flatten(1))
        J = torch.stack(J, -1)  # (n, positions, 12)
        readout = nn.Linear(J.shape[1], 1, bias=False).double()
        kernel = infinite.NNGPKernel(nn.Sequential(body, nn.Flatten(), readout), 1.4, 0.0, input_shape=shape)
        expected = 1.4 * torch.einsum("ipw,jpw->ij", J, J) * 1.4 / 12 / J.shape[1]
        torch.testing.assert_close(dense(kernel, x), expected)


def test_sequences_with_channels_last():
    x = images(4, 3, 5)
    net = nn.Sequential(
        nn.Linear(5, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8), nn.Flatten(), nn.Linear(24, 1)
    ).double()
    K = dense(infinite.NNGPKernel(net, 1.5, 0.2, input_shape=(3, 5)), x)
    token = nn.Sequential(*net[:4])  # each position for itself
    each = [dense(infinite.NNGPKernel(token, 1.5, 0.2), t) for t in x.view(4, 3, 5).unbind(1)]
    torch.testing.assert_close(K, 1.5 * sum(each) / 3 + 0.2)


def test_every_normalisation_knows_its_axes():
    """Against wide nets; what would normalise other axes is refused, also where torch would find it possible."""

    def net(norm, *, tokens=False):
        first = nn.Linear(3, 6) if tokens else nn.Conv1d(3, 6, 3, padding=1)
        return nn.Sequential(first, norm, nn.ReLU(), nn.Flatten(), nn.Linear(24, 1)).double()

    x = images(3, 3, 4)
    for norm in (nn.GroupNorm(2, 6), nn.LayerNorm([6, 4]), nn.GroupNorm(1, 6)):
        kernel = infinite.NTKKernel(net(norm), 1.6, 0.1, input_shape=(3, 4))
        result = infinite.monte_carlo(net(norm), x, 128, 30, kernel, torch.Generator().manual_seed(0), progress=False)
        assert result.error[0] < max(4 * result.noise[0], 0.05)
    for norm in (nn.LayerNorm([6]), nn.LayerNorm([4]), nn.LayerNorm([9, 6, 4])):
        with pytest.raises(ValueError, match="the axes it normalises are not those of its input"):
            dense(infinite.NNGPKernel(net(norm), input_shape=(3, 4)), x)
    with pytest.raises(ValueError, match="the axes it normalises"):
        dense(infinite.NNGPKernel(net(nn.GroupNorm(2, 4), tokens=True), input_shape=(4, 3)), images(3, 4, 3))
    image = nn.Sequential(nn.Conv2d(2, 4, 1), nn.LayerNorm([5, 5]), nn.Flatten(), nn.Linear(100, 1))
    with pytest.raises(ValueError, match="the axes it normalises"):  # positions without channels
        dense(infinite.NNGPKernel(image.double(), input_shape=(2, 5, 5)), images(3, 2, 5, 5))
    with pytest.raises(NotImplementedError, match="groups are of one channel each"):
        infinite.NNGPKernel(net(nn.GroupNorm(6, 6)), input_shape=(3, 4))


def test_inputs_are_left_as_they_are():
    x = torch.randn(4, 3, dtype=F64)
    before, positive = x.clone(), x.clamp(min=0)
    for first in (nn.ReLU(inplace=True), nn.ReLU()):
        kernel = infinite.NNGPKernel(nn.Sequential(first, nn.Linear(3, 1)).double(), 1.5, 0.0)
        torch.testing.assert_close(dense(kernel, x), 0.5 * positive @ positive.mT)
        assert torch.equal(x, before)


@pytest.mark.parametrize("activation", ["relu", "tanh", integrals.ProductRule(torch.tanh, step=0.5)])
def test_no_inputs_make_an_empty_matrix(activation):
    x, kernel = torch.randn(4, 3, dtype=F64), kernel_of("ntk", 2, activation)
    assert kernel(x[:0], x).to_dense().shape == (0, 4)
    assert kernel(x, x[:0]).to_dense().shape == (4, 0)
    assert kernel(x[:0]).to_dense().shape == (0, 0)
    assert kernel(x[:0], diag=True).shape == (0,)


def test_lazy_layers_are_to_be_run_first():
    net = nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.Linear(3, 1)).double()
    with pytest.raises(NotImplementedError, match="run the net once"):
        infinite.NNGPKernel(net)
    net(torch.randn(2, 4, dtype=F64))
    assert dense(infinite.NNGPKernel(net), torch.randn(2, 4, dtype=F64)).shape == (2, 2)


def test_inputs_may_be_normalised_first():
    x = torch.randn(4, 6, dtype=F64)
    net = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 1)).double()
    normal = nn.functional.layer_norm(x, (6,))
    torch.testing.assert_close(dense(infinite.NNGPKernel(net, 1.5, 0.2), x), 1.5 * normal @ normal.mT / 6 + 0.2)


class Shaped(nn.Module):
    def __init__(self, view) -> None:
        super().__init__()
        self.view, self.stem, self.readout = view, nn.Conv2d(1, 3, 3), nn.Linear(12, 1)

    def forward(self, x):
        return self.readout(self.view(torch.relu(self.stem(x))))


def test_views_of_every_kind_flatten():
    x = images(3, 1, 4, 4)
    views = (
        lambda h: h.view(h.size(0), -1),
        lambda h: h.view(-1, 12),
        lambda h: h.reshape(h.shape[0], 12),
        lambda h: torch.reshape(h, (-1, 12)),
        lambda h: h.flatten(1),
    )
    kernels = [infinite.NNGPKernel(Shaped(view).double(), input_shape=(1, 4, 4)) for view in views]
    for kernel in kernels[1:]:
        assert torch.equal(dense(kernel, x), dense(kernels[0], x))
    with pytest.raises(NotImplementedError, match="reshapes to"):
        infinite.NNGPKernel(Shaped(lambda h: h.view(-1, 3, 4)))


def test_subclasses_with_their_own_forward_and_made_weights_are_not_taken_for_plain_layers():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Renamed(nn.Linear):
        pass

    with pytest.raises(NotImplementedError):
        infinite.NNGPKernel(nn.Sequential(Doubled(2, 3), nn.ReLU(), nn.Linear(3, 1)))
    x = torch.randn(3, 2)
    one, two = (
        infinite.NNGPKernel(nn.Sequential(kind(2, 3), nn.ReLU(), nn.Linear(3, 1))) for kind in (Renamed, nn.Linear)
    )
    assert torch.equal(dense(one, x), dense(two, x))
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))
    with pytest.raises(NotImplementedError, match="made of other parameters"):
        infinite.NNGPKernel(nn.Sequential(normed, nn.ReLU(), nn.Linear(3, 1)))


def test_the_standard_ntk_of_a_flattened_net_counts_positions():
    x = images(3, 1, 4, 4)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 1)).double()
    w, b = torch.tensor(1.5, dtype=F64), torch.tensor(0.2, dtype=F64)
    module = infinite.NTKKernel(net, w, b, input_shape=(1, 4, 4), parameterization="standard")
    explicit = infinite.convolutional(
        1,
        "relu",
        w,
        b,
        input_shape=(1, 4, 4),
        padding=0,
        top="flatten",
        kernel="ntk",
        width=6,
        parameterization="standard",
    )
    torch.testing.assert_close(dense(explicit, x), dense(module, x))


class Dropped(nn.Module):
    def __init__(self, functional: bool, first: bool) -> None:
        super().__init__()
        self.functional, self.first = functional, first
        self.drop, self.stem, self.readout = nn.Dropout(0.3), nn.Linear(3, 8), nn.Linear(8, 1)

    def forward(self, x):
        drop = (lambda h: nn.functional.dropout(h, 0.3, self.training)) if self.functional else self.drop
        h = torch.tanh(self.stem(drop(x) if self.first else x))
        return self.readout(h if self.first else drop(h))


@pytest.mark.parametrize("functional", [False, True])
def test_dropout_of_inputs_is_off_or_refused(functional):
    x, net = torch.randn(4, 3, dtype=F64), Dropped(functional, True).double()
    plain = infinite.NNGPKernel(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double())
    assert torch.equal(dense(infinite.NNGPKernel(net), x), dense(plain, x))
    with pytest.raises(ValueError, match="drops entries of the inputs"):
        dense(infinite.NNGPKernel(net, dropout=True), x)


@pytest.mark.parametrize(("kind", "per_channel"), [(nn.Dropout, False), (nn.Dropout2d, True)])
def test_dropout_of_channels_and_of_entries_against_wide_nets(kind, per_channel):
    def net(p):
        layers = [nn.Conv2d(2, 4, 1), nn.ReLU(), kind(p), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1)]
        return nn.Sequential(*layers).double()

    x = images(3, 2, 3, 3)
    kernel = infinite.NNGPKernel(net(0.5), 1.5, 0.1, input_shape=(2, 3, 3), dropout=True)
    plain = dense(infinite.NNGPKernel(net(0.5), 1.5, 0.1, input_shape=(2, 3, 3)), x)
    if per_channel:  # all positions of a channel share a mask
        torch.testing.assert_close(dense(kernel, x).diagonal() - 0.1, 2 * (plain.diagonal() - 0.1))
    result = infinite.monte_carlo(net(0.5), x, 256, 100, kernel, torch.Generator().manual_seed(0), progress=False)
    assert result.error[0] < 4 * result.noise[0]
    unmasked = (result.mean[0] - plain).diagonal().mean() / plain.diagonal().mean()
    assert unmasked > 0.03


def test_alpha_dropout_is_off_or_refused():
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.AlphaDropout(0.3), nn.Linear(8, 1)).double()
    x = torch.randn(4, 3, dtype=F64)
    assert dense(infinite.NNGPKernel(net), x).isfinite().all()
    with pytest.raises(ValueError, match="has no rule"):
        dense(infinite.NNGPKernel(net, dropout=True), x)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_variances_beyond_the_dtype_raise_also_as_gpytorch_expects_it(activation):
    x = torch.randn(4, 3)
    depth, weight = (60, 1e3) if activation == "relu" else (1, 3e38)
    kernel = infinite.fully_connected(depth, activation, weight)
    for error in (ValueError, NanError):
        with pytest.raises(error, match=r"beyond torch.float32|is inf"):
            dense(kernel, 10 * x)
    if activation == "relu":
        assert dense(kernel.double(), 10 * x.double()).isfinite().all()


@pytest.mark.parametrize("kind", ["nngp", "ntk"])
def test_dropout_adds_to_variances_alone(kind):
    x = torch.randn(5, 3, dtype=F64)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1)).double()
    make = infinite.NNGPKernel if kind == "nngp" else infinite.NTKKernel
    plain, masked = dense(make(net), x), dense(make(net, dropout=True), x)
    off = ~torch.eye(5, dtype=torch.bool)
    assert torch.equal(plain[off], masked[off])
    without = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    assert torch.equal(dense(make(without), x), plain)
    if kind == "nngp":
        torch.testing.assert_close(masked.diagonal() - 0.1, (plain.diagonal() - 0.1) / 0.8)


def test_frozen_weights_are_no_part_of_the_ntk():
    x = torch.randn(4, 3, dtype=F64)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    net[0].requires_grad_(False)
    # what is left is the readout alone, whose NTK is the NNGP
    torch.testing.assert_close(dense(infinite.NTKKernel(net), x), dense(infinite.NNGPKernel(net), x))


def test_rules_of_ones_own():
    x = torch.randn(4, 3, dtype=F64)
    net = nn.Sequential(nn.Linear(3, 8), nn.Sequential(Fixed(), nn.Identity()), nn.ReLU(), nn.Linear(8, 1)).double()
    twin = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)).double()  # ReLU is homogeneous
    expected = 9 * dense(infinite.NTKKernel(twin, 1.5, 0.0), x)
    torch.testing.assert_close(dense(infinite.NTKKernel(net, 1.5, 0.0), x), expected)  # traced into

    class Cube(nn.Module):
        def forward(self, x):
            raise AssertionError("rules are enough")

    infinite.rule(Cube)(lambda module: infinite.Pointwise(integrals.Polynomial((0, 0, 0, 1))))
    net = nn.Sequential(nn.Linear(3, 8), Cube(), nn.Linear(8, 1)).double()
    torch.testing.assert_close(
        dense(infinite.NNGPKernel(net, 2.0, 0.1), x), dense(kernel_of("nngp", 1, lambda x: x**3, 2, 0.1), x)
    )


def test_a_rule_may_be_any_map_of_the_covariance():
    """T_out = dF[T] by differentiation, against a layer whose derivative is known."""

    class Powered(nn.Module):
        def forward(self, x):
            raise AssertionError("rules are enough")

    # x -> x^2 - variance is the second Hermite polynomial: F(K) = 2 K^2
    infinite.rule(Powered)(lambda module: lambda state: state.through(lambda k: 2 * k**2, gaussian=False))
    x = torch.randn(4, 3, dtype=F64)
    net = nn.Sequential(nn.Linear(3, 8, bias=False), Powered(), nn.Linear(8, 1, bias=False)).double()
    K = x @ x.mT / 3
    torch.testing.assert_close(dense(infinite.NTKKernel(net, 1.0, 0.0), x), 2 * K**2 + 4 * K * K)


# ---- hyperparameters


def test_variances_are_shared_or_per_layer():
    shared, each = kernel_of("nngp", 2), kernel_of("nngp", 2, weight=[1.0, 2.0, 3.0], bias=0.0)
    assert shared.weight_variance.shape == (1,) and each.weight_variance.tolist() == pytest.approx([1, 2, 3])
    assert each.bias_variance.tolist() == [0, 0, 0]
    assert each.layers == ("input layer", "hidden layer 2", "readout")
    x = torch.randn(3, 2, dtype=F64)
    base = dense(each, x)
    each.weight_variance = [1.0, 2.0, 6.0]
    torch.testing.assert_close(dense(each, x), 2 * base)
    shared.bias_variance = 0.0
    assert shared.bias_variance.item() == 0.0
    shared.initialize(weight_variance=1.5)
    assert shared.weight_variance.item() == pytest.approx(1.5)


def test_a_traced_kernel_can_be_pickled_and_shows_its_net():
    x = images(4, 2, 5)
    for functional in (True, False):
        kernel = infinite.NTKKernel(Branches(functional).double(), input_shape=(2, 5))
        assert torch.equal(dense(pickle.loads(pickle.dumps(kernel)), x), dense(kernel, x))
    shown = [repr(infinite.fully_connected(depth, phi)) for depth in (1, 2) for phi in ("relu", "tanh", lambda x: x)]
    assert len(set(shown)) == 6 and not any(" at 0x" in text for text in shown)
    alphas = [repr(infinite.NNGPKernel(nn.Sequential(nn.Linear(2, 2), nn.ELU(a), nn.Linear(2, 1)))) for a in (1.0, 2.0)]
    assert alphas[0] != alphas[1]


def test_priors_state_dicts_pickles_and_copies():
    prior = gpytorch.priors.GammaPrior(2.0, 1.0)
    kernel = infinite.fully_connected(2, "tanh", 1.5, 0.2, weight_variance_prior=prior, bias_variance_prior=prior)
    names = [name for name, *_ in kernel.named_priors()]
    assert names == ["weight_variance_prior", "bias_variance_prior"]
    kernel.sample_from_prior("weight_variance_prior")
    x = torch.randn(3, 2)
    for twin in (copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
        assert torch.equal(dense(twin, x), dense(kernel, x))
    other = infinite.fully_connected(2, "tanh", weight_variance_prior=prior, bias_variance_prior=prior)
    other.load_state_dict(kernel.state_dict())
    assert torch.equal(dense(other, x), dense(kernel, x))


class Regression(gpytorch.models.ExactGP):
    def __init__(self, x, y, kernel) -> None:
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood().double())
        self.mean_module, self.covar_module = gpytorch.means.ZeroMean(), kernel

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


@pytest.mark.parametrize("kind", ["nngp", "ntk"])
def test_sigmas_are_learned_by_marginal_likelihood(kind):
    x = torch.linspace(-2, 2, 25, dtype=F64)[:, None]
    y = torch.sin(2 * x[:, 0]) + 0.05 * torch.randn(25, dtype=F64)
    gp = Regression(x, y, kernel_of(kind, 2, "erf", [1.0] * 3, [0.1] * 3))
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)
    optimizer = torch.optim.Adam(gp.parameters(), lr=0.05)
    values = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = -mll(gp(x), y)
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[0] - 0.2
    gp.eval()
    new = x[:-1] + 0.05
    assert (gp(new).mean - torch.sin(2 * new[:, 0])).abs().max() < 0.4
    posterior = gp(torch.randn(3, 2, 1, dtype=F64))
    assert posterior.covariance_matrix.shape == (3, 2, 2)


# ---- finite nets


def test_the_finite_kernel_has_reference_numbers_too(reference):
    """J J^T of finite nets, by `Linearization.gram`."""
    data = reference("nngp/empirical_ntk")
    for case in data["meta"]["cases"]:
        h, key = case["hyperparameters"], case["case"]
        net, images_last = finite_net(
            h, {k: data[f"{key}_{k}"] for k in case["keys"] if k[0] in "Wb" and k[1:].isdigit()}
        )
        x1, x2 = (data[f"{key}_{name}"] for name in ("X1", "X2"))
        if images_last:
            x1, x2 = x1.permute(0, 3, 1, 2).contiguous(), x2.permute(0, 3, 1, 2).contiguous()
        lin = Linearization(net, input_shape=tuple(x1.shape[1:]))
        x1, x2 = x1.flatten(1), x2.flatten(1)
        K = h["out"]
        ours = lin.gram(x1, x2).view(len(x1), K, len(x2), K).transpose(1, 2)
        expected = data[f"{key}_ntk_full"]
        assert (ours - expected).abs().max() <= 1e-10 * expected.abs().max()
        torch.testing.assert_close(lin(x1), data[f"{key}_f1"], rtol=1e-10, atol=1e-10)


class Scaled(nn.Module):
    """A layer in the ntk parameterisation: weights and biases are multiplied where they are used."""

    def __init__(self, layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor, scales: tuple[float, float]) -> None:
        super().__init__()
        self.weight, self.bias, self.scales = nn.Parameter(weight), nn.Parameter(bias), scales
        self.options = {"padding": layer.padding} if isinstance(layer, nn.Conv2d) else None

    def forward(self, x):
        w, b = self.scales[0] * self.weight, self.scales[1] * self.bias
        return nn.functional.linear(x, w, b) if self.options is None else nn.functional.conv2d(x, w, b, **self.options)


class FlattenChannelsLast(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1).flatten(1)


def finite_net(h: dict, weights: dict) -> tuple[nn.Module, bool]:
    layers, ntk = [], h["parameterization"] == "ntk"
    for i in range(h["n_layers"]):
        W, b = weights[f"W{i}"], weights[f"b{i}"]
        convolution = W.dim() == 4
        fan_in = W.shape[:-1].numel()
        W = W.permute(3, 2, 0, 1) if convolution else W.mT
        scales = (h["W_std"] / fan_in**0.5, h["b_std"]) if ntk else (1.0, 1.0)
        padding = 1 if h.get("padding") == "SAME" else 0
        layer = nn.Conv2d(1, 1, 3, padding=padding) if convolution else nn.Linear(1, 1)
        first_dense = (
            h["kind"] == "cnn"
            and not convolution
            and layers
            and not any(isinstance(m, FlattenChannelsLast) for m in layers)
        )
        layers += [FlattenChannelsLast()] if first_dense else []
        layers.append(Scaled(layer, W.contiguous().clone(), b.flatten().clone(), scales))
        if i < h["n_layers"] - 1:
            layers.append(nn.ReLU() if h["activation"] == "relu" else nn.Tanh())
            layers += [nn.AvgPool2d(2)] if convolution and h.get("avgpool") else []
    return nn.Sequential(*layers), h["kind"] == "cnn"


@pytest.mark.parametrize("kind", ["nngp", "ntk"])
def test_wide_nets_converge_to_the_kernel(kind):
    """The spread of one draw falls as 1/sqrt(width), the bias of the mean as 1/width."""
    net = fully_connected_net()
    x = torch.randn(4, 3, dtype=F64)
    make = infinite.NNGPKernel if kind == "nngp" else infinite.NTKKernel
    kernel = make(net, [1.5, 2.5, 1.0], [0.1, 0.2, 0.3])
    widths, draws = ((4, 16, 64), 300) if kind == "nngp" else ((4, 16, 64), 100)
    result = infinite.monte_carlo(net, x, widths, draws, kernel, torch.Generator().manual_seed(0), progress=False)
    spread, error, noise = (v.tolist() for v in (result.spread, result.error, result.noise))
    for narrow, wide in ((0, 1), (1, 2)):  # width times four
        assert 0.35 < spread[wide] / spread[narrow] < 0.7
    assert error[2] < 4 * noise[2]
    assert error[0] < 4 * noise[0] + 1.0 / widths[0]
    assert error[2] < error[0]
    assert result.plot().get_xlabel() == "width"
    assert "spread" in repr(result)


def fully_connected_net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5), nn.GELU(), nn.Linear(5, 2)).double()


def test_the_bias_of_narrow_nets_falls_as_one_over_the_width():
    """Of the mean over very many draws, for which the spread is small against it."""
    x = torch.tensor([[1.0], [-0.5]], dtype=F64)
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    kernel = infinite.NNGPKernel(net, [4.0, 4.0, 1.0], 0.0)
    result = infinite.monte_carlo(net, x, (2, 8), 1500, kernel, torch.Generator().manual_seed(1), progress=False)
    assert result.error[0] > 5 * result.noise[0]
    assert 2 < result.error[0] / result.error[1] < 6


@pytest.mark.parametrize("kind", [infinite.NNGPKernel, infinite.NTKKernel])
def test_wide_nets_of_every_layer(kind):
    class Everything(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.branch = (
                nn.Conv2d(2, 4, 3, padding=1),
                nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
            )
            self.group, self.layer = nn.GroupNorm(2, 4), nn.LayerNorm([4, 2, 2])
            self.pool, self.pad, self.readout = nn.AvgPool2d(2), nn.ZeroPad2d(1), nn.Linear(36, 1)

        def forward(self, x):
            h = self.stem(x)
            h = h + 0.7 * self.branch(torch.relu(self.group(h)))
            h = nn.functional.gelu(self.layer(self.pool(h)))
            return self.readout((-self.pool(self.pad(self.pad(h)))).flatten(1))

    net, x = Everything().double(), images(4, 2, 4, 4)
    kernel = kind(net, 1.6, 0.1, input_shape=(2, 4, 4))
    result = infinite.monte_carlo(net, x, 48, 20, kernel, torch.Generator().manual_seed(0), progress=False)
    assert result.error[0] < 4 * result.noise[0]


# ---- classification, BoTorch


def test_one_hot_regression_takes_one_cholesky_for_all_classes(monkeypatch):
    x, y = torch.randn(40, 3, dtype=F64), torch.arange(40) % 4
    gp = infinite.OneHotGP(x, y, kernel_of("nngp"), noise=0.1)
    shapes, cholesky = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(
        torch.linalg, "cholesky_ex", lambda a, *args, **kw: (shapes.append(a.shape), cholesky(a, *args, **kw))[1]
    )
    evidence = gp.evidence()
    assert len(shapes) == 1 and shapes[0].numel() == 40**2
    covariance = dense(gp.covar_module, x) + 0.1 * torch.eye(40, dtype=F64)
    targets = nn.functional.one_hot(y, 4).double() - 0.25
    normal = torch.distributions.MultivariateNormal(torch.zeros(40, dtype=F64), covariance)
    torch.testing.assert_close(evidence, normal.log_prob(targets.mT).sum())
    evidence.backward()
    assert all(p.grad.isfinite().all() and (p.grad != 0).all() for p in gp.parameters())
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)
    torch.testing.assert_close(40 * mll(gp(x), gp.train_targets).sum(), evidence)
    z = torch.randn(6, 3, dtype=F64)
    mean, variance = gp.predict(z)
    gp.eval()
    torch.testing.assert_close(gp(z).mean.mT, mean)
    torch.testing.assert_close(gp(z).variance, variance.expand(4, 6))
    assert gp.predict(torch.cat([z, x]))[0].shape == (46, 4)


def depths(x, y, weight: float = 1.5) -> dict:
    """One-hot GPs of several depths, as `compare` takes them."""
    prior = gpytorch.priors.GammaPrior(2.0, 1.0)

    def make(depth):
        gp = infinite.OneHotGP(
            x, y, kernel_of("nngp", depth, "erf", weight, 0.1, weight_variance_prior=prior), noise=0.05
        )
        return gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)

    return {f"depth {d}": Candidate(functools.partial(make, d), settings={"depth": d}) for d in (1, 3)}


def test_the_depth_is_chosen_by_evidence_in_regression(tmp_path):
    """`compare` of kernels: data drawn from one depth, which the evidence prefers."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(60, 3, dtype=F64, generator=generator)
    truth = kernel_of("nngp", 1, "relu", 3.0, 0.5)
    root = torch.linalg.cholesky(dense(truth, x) + 1e-4 * torch.eye(60, dtype=F64))
    y = root @ torch.randn(60, dtype=F64, generator=generator)
    candidates = {
        f"depth {d}": Candidate(kernel_of("nngp", d, "relu", 2.0, 0.2), settings={"depth": d}) for d in (1, 4, 12)
    }
    file = tmp_path / "depths.csv"
    table = compare(candidates, x, y, Gaussian(0.1), file=file, n_jobs=1, progress=False)
    assert table.best == "depth 1"
    gp = table.models["depth 1"]
    root = torch.linalg.cholesky(dense(gp.covar_module, x) + gp.likelihood.noise.detach() * torch.eye(60, dtype=F64))
    normal = torch.distributions.MultivariateNormal(gp.mean_module(x).detach(), scale_tril=root)
    assert table.rows[0]["evidence"] == pytest.approx(float(normal.log_prob(y)), rel=1e-4)
    assert compare(candidates, x, y, Gaussian(0.1), file=file, n_jobs=1, progress=False).rows == table.rows
    swapped = {"depth 1": candidates["depth 4"], "depth 4": candidates["depth 1"], "depth 12": candidates["depth 12"]}
    with pytest.raises(ValueError, match="another candidate by the name"):
        compare(swapped, x, y, Gaussian(0.1), file=file, n_jobs=1, progress=False)


def test_the_depth_is_chosen_by_evidence_in_classification():
    """`compare` of mlls over a batch of classes: their evidence in sum, accuracy by a metric of one's own."""
    x, y = torch.randn(30, 3, dtype=F64), torch.arange(30) % 3
    x[:, 0] += 4.0 * y
    new, classes = x + 0.01, nn.functional.one_hot(y, 3).double() - 1 / 3

    def accuracy(predicted, labels):
        return (predicted.mean.argmax(-1) == labels.argmax(-1)).double().mean()

    options = {"test_x": new, "test_y": classes, "test_metrics": {"accuracy": accuracy}, "n_jobs": 1, "progress": False}
    table = compare(depths(x, y), x, classes, Gaussian(0.1), **options)
    for row, (name, model) in zip(table.rows, table.models.items()):
        assert not row["error"] and row["candidate"] == name
        assert row["evidence"] == pytest.approx(model.evidence().item(), rel=1e-6)
        mean, _ = model.predict(new)
        assert row["test_error"] == pytest.approx(float((mean - classes).square().mean()), rel=1e-4)
        assert row["test_accuracy"] == pytest.approx(float((mean.argmax(1) == y).double().mean()))
        assert row["test_accuracy"] > 0.8
    start = {name: c.model().model.evidence().item() for name, c in depths(x, y).items()}
    assert all(row["evidence"] > start[row["candidate"]] for row in table.rows)


def test_a_surrogate_for_botorch():
    code = """
import torch, botorch
from botorch.acquisition import LogExpectedImprovement
from botorch.models import SingleTaskGP
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import nn
from gpytorch_dnn2gp import infinite
torch.manual_seed(0)
x = torch.rand(12, 2, dtype=torch.float64)
y = torch.sin(5 * x[:, :1]) + x[:, 1:]
net = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
for kernel in (infinite.NNGPKernel(net), infinite.NTKKernel(net)):
    model = SingleTaskGP(x, y, covar_module=kernel)
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    model.train()
    before = float(mll(model(*model.train_inputs), model.train_targets))
    botorch.fit_gpytorch_mll(mll)
    model.train()
    assert float(mll(model(*model.train_inputs), model.train_targets)) > before
    acquisition = LogExpectedImprovement(model.eval(), best_f=y.max())
    bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    point, value = botorch.optim.optimize_acqf(acquisition, bounds, q=1, num_restarts=2, raw_samples=16)
    assert value.isfinite() and point.shape == (1, 2)
"""
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
