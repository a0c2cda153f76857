"""diag(J^T Lambda J) by layer rules, against Jacobians one example after the other."""

import copy

import oracle
import pytest
import torch
from oracle import assert_close
from problems import CASES, F64, TokenNet, problem, randomized
from torch import nn
from torch.nn.functional import linear

import gpytorch_dnn2gp as dnn2gp
from gpytorch_dnn2gp.jacobians import NetFunction
from gpytorch_dnn2gp.squares import SquaredRows


class Attention(nn.Module):
    """Linear layers over a sequence, tied by a functional call that no hook sees."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.tied = tied

    def forward(self, x):
        h = torch.tanh(self.embed(x))  # (n, T, 4)
        h = h + torch.tanh(self.mix(h)).mean(1, keepdim=True)
        if self.tied:
            h = h + linear(h, self.mix.weight)
        return self.out(h.sum(1))


class SequenceFirst(nn.Module):
    """A layer that is applied to (T, n, d): its leading dimension is no example."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(2, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.first(x.transpose(0, 1))).mean(0))


NETS = {
    "strides": (nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2)), 5),
    "dilation": (nn.Sequential(nn.Conv2d(2, 3, 2, dilation=2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 2)), 5),
    "in place": (nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 2)), 5),
    "groups": (nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 2)), 5),
    "no bias": (nn.Sequential(nn.Conv2d(2, 3, (3, 2), bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(36, 2)), 5),
}


def names(net):
    return {name for name, _ in net.named_parameters()}


def squares(net, x, c):
    """By hand: sum over examples and cotangents of (c^T J)^2, and sum_i J_i^T c_1i."""
    J = oracle.jacobian(net, x)
    return torch.einsum("mnk,nkp->mnp", c, J).square().sum((0, 1)), torch.einsum("nk,nkp->p", c[0], J)


def compare(net, x, covered=None, m=3):
    rows = SquaredRows(NetFunction(net, [n for n, p in net.named_parameters() if p.requires_grad]))
    k = oracle.outputs(net, x).shape[-1]
    c = torch.randn(m, len(x), k, dtype=F64)
    f, first, second = rows(x, lambda f, part: (c[:, part], c[0, part]))
    expected, gradient = squares(net, x, c)
    assert_close(f, oracle.outputs(net, x), 1e-10)
    assert_close(second, expected, 1e-10)
    assert_close(first, gradient, 1e-10)
    if covered is not None:
        assert set(rows.rules) == covered
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_squares_of_every_case(case, m):
    p = problem(case)
    compare(p.net.eval(), p.shaped(p.x), m=m)


@pytest.mark.parametrize("name", NETS)
def test_convolutions(name):
    net, size = NETS[name]
    compare(randomized(net, 0), torch.randn(4, 2, size, size, dtype=F64), names(net))


def test_convolutions_of_one_dimension():
    net = nn.Sequential(nn.Conv1d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))
    compare(randomized(net, 0), torch.randn(4, 2, 8, dtype=F64), names(net))


def test_sequences():
    compare(randomized(Attention(tied=False), 0), torch.randn(4, 5, 2, dtype=F64), names(Attention(False)))


def test_a_use_that_hooks_do_not_see_is_found():
    covered = names(Attention(True)) - {"mix.weight"}
    compare(randomized(Attention(tied=True), 0), torch.randn(4, 5, 2, dtype=F64), covered)


def test_layers_whose_inputs_have_no_examples_first_are_left_to_jacobians():
    for length in (1, 2, 4, 5):  # as many as are looked at, as are in the batch, and others
        compare(randomized(SequenceFirst(), 0), torch.randn(4, length, 2, dtype=F64), {"out.weight", "out.bias"})


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("net", [Attention(tied=True), SequenceFirst()], ids=["tied", "sequence first"])
def test_a_readout_of_zeros_hides_no_wrong_rule(net, dtype):
    net = randomized(copy.deepcopy(net), 0)
    with torch.no_grad():
        net.out.weight.zero_()
    net, x = net.to(dtype), torch.randn(2, 2, 2, dtype=dtype)
    rows = SquaredRows(NetFunction(net, [n for n, _ in net.named_parameters()]))
    c = torch.ones(2, 2, net.out.out_features, dtype=dtype)
    rows(x, lambda f, part: (c[:, part], c[0, part]))
    assert set(rows.rules) == names(net) - {"mix.weight", "first.weight", "first.bias"}


def test_wide_nets_in_single_precision_are_checked_as_well():
    net = randomized(Attention(tied=True), 0).float()
    with torch.no_grad():
        net.out.weight.mul_(1e-4)
    rows = SquaredRows(NetFunction(net, [n for n, _ in net.named_parameters()]))
    c = torch.ones(2, 4, 3)
    rows(torch.randn(4, 5, 2), lambda f, part: (c[:, part], c[0, part]))
    assert set(rows.rules) == names(net) - {"mix.weight"}


class ByKeyword(nn.Module):
    """Layers that are called with ``input=``, in turn for one and for several sites."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(2, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = torch.tanh(self.first(input=x))
        return self.out(input=h if h.dim() == 2 else h.mean(1))


def test_layers_called_by_keyword_and_inputs_that_change_shape():
    net = randomized(ByKeyword(), 0)
    rows = SquaredRows(NetFunction(net, [n for n, _ in net.named_parameters()]))
    for shape in ((4, 2), (3, 5, 2), (4, 1, 2)):
        x, c = torch.randn(shape, dtype=F64), torch.randn(3, shape[0], 2, dtype=F64)
        _, _, second = rows(x, lambda f, part, c=c: (c[:, part], c[0, part]))
        assert_close(second, squares(net, x, c)[0], 1e-10)
    assert set(rows.rules) == names(net)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:There is a performance drop")
def test_weights_that_are_computed_are_left_to_jacobians():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    nn.utils.weight_norm(net[0])
    x, c = torch.randn(4, 3, dtype=F64), torch.randn(3, 4, 2, dtype=F64)
    expected = 0  # per-example Jacobians by hand: such a net cannot be copied
    for x_i, c_i in zip(x, c.movedim(0, 1), strict=True):
        f = net(x_i[None])[0]
        for row in c_i:
            grads = torch.autograd.grad(f, list(net.parameters()), row, retain_graph=True)
            expected = expected + torch.cat([g.flatten() for g in grads]).square()
    rows = SquaredRows(NetFunction(net, [n for n, _ in net.named_parameters()]))
    _, _, second = rows(x, lambda f, part: (c[:, part], c[0, part]))
    assert_close(second, expected, 1e-10)
    assert set(rows.rules) == {"2.weight", "2.bias"}
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    nn.utils.parametrizations.weight_norm(net[0])
    compare(net, torch.randn(4, 3, dtype=F64), {"0.bias", "2.weight", "2.bias"})


def test_a_hook_of_the_users_own():
    net = randomized(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), 0)
    handle = net[0].register_forward_hook(lambda module, inputs, output: 3 * output)
    rows = SquaredRows(NetFunction(net, [n for n, _ in net.named_parameters()]))
    x, c = torch.randn(4, 3, dtype=F64), torch.randn(3, 4, 2, dtype=F64)
    _, _, second = rows(x, lambda f, part: (c[:, part], c[0, part]))
    assert_close(second, squares(net, x, c)[0], 1e-10)
    assert set(rows.rules) == names(net) and len(net[0]._forward_hooks) == 1
    handle.remove()


def test_scales_and_shifts():
    net = nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4), nn.GroupNorm(2, 4), nn.ConvTranspose2d(4, 3, 2)),
        *(nn.Flatten(), nn.LayerNorm(48), nn.Linear(48, 2)),
    )
    compare(randomized(net, 0).eval(), torch.randn(4, 2, 5, 5, dtype=F64), names(net))


def test_parameters_that_modules_share():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    net[2].weight = net[0].weight
    compare(randomized(net, 0), torch.randn(4, 3, dtype=F64), names(net))


def test_embeddings():
    net = randomized(TokenNet(), 0)
    compare(net, torch.randint(7, (4, 4)), names(net))


def test_chunks_change_nothing():
    p = problem("categorical_images", n=9)
    net, x = p.net.eval(), p.shaped(p.x)
    rows = SquaredRows(NetFunction(net, [n for n, _ in net.named_parameters()]))
    c = torch.randn(3, 9, 3, dtype=F64)
    whole = rows(x, lambda f, part: (c[:, part], c[0, part]))
    with dnn2gp.tiling.memory_limit(200_000):
        parts = rows(x, lambda f, part: (c[:, part], c[0, part]))
    for a, b in zip(whole, parts, strict=True):
        assert_close(a, b, 1e-12)
