"""Grams layer by layer: what they offer beside the plain matrix, which the fuzz compares with autodiff."""

import os
import signal
import subprocess
import sys
import warnings

import gpytorch
import numpy as np
import pytest
import torch
from oracle import relative_error
from torch import nn
from torch.nn import functional as F

import gpytorch_dnn2gp as dnn2gp
from gpytorch_dnn2gp import Linearization, gram, tiling
from gpytorch_dnn2gp.gram import FallbackWarning

TOLERANCE = 1e-10


def convolutional(num_outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 5, 3),
        nn.GroupNorm(1, 5),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(20, 6),
        nn.Tanh(),
        nn.Linear(6, num_outputs),
    ).double()


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(7, 4, padding_idx=0)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, tokens):
        return self.head(torch.tanh(self.mix(self.embedding(tokens))).mean(1))


PROBLEMS = {
    "convolutional": (
        convolutional(),
        torch.randn(7, 64, generator=torch.Generator().manual_seed(2)).double(),
        {"input_shape": (1, 8, 8)},
    ),
    "tokens": (
        Tokens().double(),
        torch.randint(0, 7, (6, 5), generator=torch.Generator().manual_seed(3)).double(),
        {"input_dtype": torch.long},
    ),
}


@pytest.fixture(params=list(PROBLEMS))
def problem(request):
    net, x, options = PROBLEMS[request.param]
    lin = Linearization(net, **options)
    return lin, x, lin.jacobian(x)


def blocks(k, num_outputs):
    return k.unflatten(0, (-1, num_outputs)).unflatten(-1, (-1, num_outputs))


def variances(lin):
    return torch.rand(lin.num_weights, dtype=lin.dtype, generator=torch.Generator().manual_seed(4)) + 0.1


@pytest.mark.parametrize("per_weight", [False, True])
def test_trace_gram_sums_the_diagonals_of_the_blocks(problem, per_weight):
    lin, x, j = problem
    v = variances(lin) if per_weight else None
    scaled = j if v is None else j * v
    expected = torch.einsum("ikp,jkp->ij", scaled, j)
    assert relative_error(lin.trace_gram(x, prior_variance=v), expected) < TOLERANCE
    assert relative_error(lin.trace_gram(x[:3], x[2:], prior_variance=v), expected[:3, 2:]) < TOLERANCE


def test_cotangents_give_other_rows_as_the_empirical_fisher_has(problem):
    lin, x, j = problem
    r = torch.randn(len(x), 1, lin.num_outputs, dtype=lin.dtype)
    rows = (r @ j).squeeze(1)
    assert relative_error(lin.gram(x, cotangents1=r), rows @ rows.mT) < TOLERANCE
    # rows of one side only: covariances of the outputs with the gradients
    assert relative_error(lin.gram(x, x, cotangents2=r), j.flatten(0, 1) @ rows.mT) < TOLERANCE
    images = lin.prepare(x)[0].to(lin.dtype)  # inputs in the net's own shape
    assert relative_error(lin.gram(images, cotangents1=r), rows @ rows.mT) < TOLERANCE
    with pytest.raises(ValueError, match="cotangents1 has shape"):
        lin.gram(x, cotangents1=r[:2])
    with pytest.raises(ValueError, match="m at least 1"):
        lin.sum_of_squares(x, r[:, :0])
    with pytest.raises(ValueError, match="cotangents1: torch.float32 on cpu, but the net is torch.float64"):
        lin.gram(x, cotangents1=r.float())
    with pytest.raises(ValueError, match="cotangents2 belong to x2"):
        lin.gram(x, cotangents2=r)


@pytest.mark.parametrize("per_weight", [False, True])
def test_diagonal_and_blocks(problem, per_weight, monkeypatch):
    lin, x, j = problem
    v = variances(lin) if per_weight else torch.ones_like(lin.weights)
    expected = (j * v) @ j.mT
    assert relative_error(lin.gram_blocks(x, v), expected) < TOLERANCE
    diagonal = expected.diagonal(dim1=-2, dim2=-1)
    assert relative_error(lin.gram_diagonal(x, v), diagonal) < TOLERANCE
    monkeypatch.setattr(gram.diagonals, "ROWS_AT_ONCE", 1)  # as for many outputs
    assert relative_error(lin.gram_diagonal(x, v), diagonal) < TOLERANCE


def test_sum_of_squares_is_the_diagonal_of_the_gauss_newton_matrix(problem, monkeypatch):
    lin, x, j = problem
    root = torch.randn(len(x), lin.num_outputs, lin.num_outputs, dtype=lin.dtype)
    noise_precision = root @ root.mT
    expected = torch.einsum("ikp,ikl,ilp->p", j, noise_precision, j)
    assert relative_error(lin.sum_of_squares(x, root.mT), expected) < TOLERANCE
    assert relative_error(lin.sum_of_squares(x), j.square().sum((0, 1))) < TOLERANCE
    with tiling.memory_limit(50_000):  # some rows and examples at a time
        assert relative_error(lin.sum_of_squares(x, root.mT), expected) < TOLERANCE


@pytest.mark.parametrize("per_weight", [False, True])
def test_one_gram_for_each_group_even_if_it_divides_a_tensor(problem, per_weight):
    lin, x, j = problem
    v = variances(lin) if per_weight else None
    rows = (j if v is None else j * v.sqrt()).flatten(0, 1)
    by_tensor = [torch.arange(lin.num_weights)[part] for part in lin.function.slices()]
    by_tensor = [by_tensor[0], torch.cat(by_tensor[1:3]), torch.cat(by_tensor[3:])]
    half = lin.num_weights // 2 + 1
    for groups in (by_tensor, [torch.arange(half), torch.arange(half, lin.num_weights)]):
        found = lin.rows(x).gram(groups, v)
        expected = torch.stack([rows[:, g] @ rows[:, g].mT for g in groups])
        assert relative_error(found, expected) < TOLERANCE


def test_little_memory_changes_nothing(problem):
    lin, x, _ = problem
    whole, cross = lin.gram(x), lin.gram(x[:4], x)
    with tiling.memory_limit(60_000):  # features of a few examples at a time
        assert relative_error(lin.gram(x), whole) < TOLERANCE
        assert relative_error(lin.gram(x[:4], x), cross) < TOLERANCE
        assert relative_error(lin.gram(x), lin.gram(x).mT) < 1e-15


def test_small_tiles_change_nothing(problem, monkeypatch):
    lin, x, _ = problem
    whole = lin.gram(x)
    monkeypatch.setitem(gram.matrix.TILE_BYTES, "cpu", 800)
    monkeypatch.setattr(gram.contract, "BLOCK_NUMBERS", 100)
    monkeypatch.setattr(gram.capture, "CHUNK_NUMBERS", 1000)
    assert relative_error(lin.gram(x), whole) < TOLERANCE
    assert relative_error(lin.gram(x, prior_variance=variances(lin)), lin.gram(x, x, variances(lin))) < TOLERANCE


@pytest.mark.parametrize("kind", ["wide", "many rows on one side"])
def test_features_are_formed_once_for_each_part_that_memory_holds(kind, monkeypatch):
    """However few examples memory holds, and however many rows the other side has."""
    lin = Linearization(nn.Sequential(nn.Linear(200, 1000), nn.Tanh(), nn.Linear(1000, 20)).double())
    x = torch.randn(30, 200).double()
    c = torch.randn(30, 1, 20).double() if kind != "wide" else None
    whole = lin.gram(x, x, cotangents1=c)
    formed, held = [], []
    features = gram.matrix.features

    def counted(net, x, *args):
        out = features(net, x, *args)
        formed.append(len(x))
        held.append(out.num_numbers * 8)
        return out

    monkeypatch.setattr(gram.matrix, "features", counted)
    with tiling.memory_limit(6_000_000):
        assert relative_error(lin.gram(x, x, cotangents1=c), whole) < TOLERANCE
    assert max(held) <= 6_000_000 / 4  # beside the result, and the other side's
    assert sum(formed) < 30 * 12


@pytest.mark.parametrize("per_weight", [False, True])
def test_the_jacobian_of_a_layer_is_formed_again_where_that_is_cheaper(per_weight):
    """A convolution of many sites: products over sites cost far more than its Jacobian, however many examples."""
    prior = {"w": gram.contract.ParameterPrior(0, torch.ones(36864) if per_weight else None)}
    layer = gram.contract.Layer(torch.zeros(1, 10, 1024, 64), {"w": (torch.zeros(1, 1024, 576), False)})

    def formed(**use):
        return gram.contract.cheaper_dense(layer, {"w": 36864}, prior, gram.contract.Use(memory=1e8, **use))

    for n in (100, 1000, 10000):
        assert formed(pairs=n * n / 2, num_examples=n) == {"w"}
    assert formed(pairs=1000 * 500, num_examples=1000, again=False) == set()  # a graph holds all


@pytest.mark.parametrize("method", ["sites", "apply", "dense"])
def test_every_order_of_contraction_gives_the_same(problem, method, monkeypatch):
    lin, x, j = problem
    monkeypatch.setattr(
        gram.matrix, "cheaper_dense", lambda layer, *_: set(layer.inputs) if method == "dense" else set()
    )
    monkeypatch.setattr(gram.contract, "_apply_cost", lambda *_: 0 if method == "apply" else float("inf"))
    rows = j.flatten(0, 1)
    assert relative_error(lin.gram(x), rows @ rows.mT) < TOLERANCE
    assert relative_error(lin.gram(x[:2], x), rows[: 2 * j.shape[1]] @ rows.mT) < TOLERANCE
    trace = torch.einsum("ikp,jkp->ij", j, j)
    assert relative_error(lin.trace_gram(x), trace) < TOLERANCE


# ---- batches and derivatives


@pytest.mark.parametrize("per_weight", [False, True])
def test_batch_dimensions_broadcast(problem, per_weight):
    lin, x, j = problem
    v = variances(lin) if per_weight else torch.ones_like(lin.weights)
    rows = (j * v.sqrt()).flatten(0, 1)
    k, whole = lin.num_outputs, rows @ rows.mT
    pairs = x[:6].reshape(3, 1, 2, *x.shape[1:])  # (3, 1, 2)
    out = lin.gram(pairs, x[:4], prior_variance=v)
    assert out.shape == (3, 1, 2 * k, 4 * k)
    for b in range(3):
        assert relative_error(out[b, 0], whole[2 * k * b : 2 * k * (b + 1), : 4 * k]) < TOLERANCE
    out = lin.gram(pairs, x[None, :4].expand(2, *[-1] * x.dim()), prior_variance=v)
    assert out.shape == (3, 2, 2 * k, 4 * k)
    assert relative_error(out[1, 1], whole[2 * k : 4 * k, : 4 * k]) < TOLERANCE
    assert relative_error(lin.gram(pairs, prior_variance=v)[2, 0], whole[4 * k : 6 * k, 4 * k : 6 * k]) < TOLERANCE
    assert lin.trace_gram(pairs, prior_variance=v).shape == (3, 1, 2, 2)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch.func.hessian: unfold's backward
@pytest.mark.parametrize("per_weight", [False, True])
def test_first_and_second_derivatives_in_x(per_weight):
    net = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    lin = Linearization(net.double(), input_shape=(1, 3))
    v = variances(lin) if per_weight else None
    x1, x2 = torch.randn(2, 3).double().requires_grad_(), torch.randn(3, 3).double().requires_grad_()
    lin.gram(x1.detach(), x2.detach())

    def function(a, b):
        return lin.gram(a, b, prior_variance=v), lin.gram(a, prior_variance=v), lin.trace_gram(b, prior_variance=v)

    assert torch.autograd.gradcheck(function, (x1, x2))
    assert torch.autograd.gradgradcheck(function, (x1, x2))
    hessian = torch.func.hessian(lambda a: lin.gram(a[None], x2.detach()).sum())(x1[0].detach())
    expected = torch.autograd.functional.hessian(lambda a: lin.gram(a[None], x2.detach()).sum(), x1[0].detach())
    assert relative_error(hessian, expected) < 1e-8


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # unfold's backward
def test_derivatives_by_torch_func_alone():
    """A shape that a transform brings first cannot be checked there: plain autodiff, and rules from then on."""
    net, x = convolutional(), PROBLEMS["convolutional"][1][:2]
    weights = torch.randn(6, 6, dtype=torch.float64)

    def total(lin, x):
        return (lin.gram(x) * weights).sum()

    lin = Linearization(net, input_shape=(1, 8, 8))
    found = torch.func.grad(lambda x: total(lin, x))(x)
    inputs = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(lin, inputs), inputs)
    assert relative_error(found, expected) < TOLERANCE


def test_derivatives_in_equal_prior_variances_by_torch_func():
    """Variances that happen to be equal are still different variables."""
    lin = Linearization(convolutional(), input_shape=(1, 8, 8))
    x = PROBLEMS["convolutional"][1][:2]
    v, u = torch.ones_like(lin.weights), variances(lin)
    expected = lin.jacobian(x).square().sum((0, 1))
    found = torch.func.grad(lambda v: lin.gram(x, prior_variance=v).diagonal().sum())(v)
    assert relative_error(found, expected) < TOLERANCE
    _, found = torch.func.jvp(lambda v: lin.gram(x, prior_variance=v).diagonal().sum(), (v,), (u,))
    assert relative_error(found, u @ expected) < TOLERANCE


def test_derivative_in_the_prior_variance():
    lin = Linearization(convolutional(), input_shape=(1, 8, 8))
    x = PROBLEMS["convolutional"][1][:2]
    v = variances(lin).requires_grad_()
    weights = torch.randn(6, 6, dtype=torch.float64)
    (found,) = torch.autograd.grad((lin.gram(x, prior_variance=v) * weights).sum(), v)
    rows = lin.jacobian(x).flatten(0, 1)
    assert relative_error(found, torch.einsum("ip,ij,jp->p", rows, weights, rows)) < TOLERANCE


# ---- the rules and their check


class Scale(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(size))

    def forward(self, x):
        return x * self.scale


def test_a_rule_for_ones_own_module(monkeypatch):
    monkeypatch.setattr(gram.rules, "_RULES", dict(gram.rules._RULES))
    seen = []

    @gram.register(Scale)
    def scale(module, a, g):
        seen.append(module)
        return {"scale": g * a[:, None]}

    lin = Linearization(nn.Sequential(nn.Linear(3, 4), Scale(4), nn.Tanh(), nn.Linear(4, 2)).double())
    x = torch.randn(5, 3).double()
    rows = lin.jacobian(x).flatten(0, 1)
    assert relative_error(lin.gram(x), rows @ rows.mT) < TOLERANCE
    assert seen
    with pytest.raises(TypeError, match=r"subclasses of torch\.nn\.Module"):
        gram.register(torch.relu)


@pytest.mark.parametrize("mistake", ["values", "shape", "error"])
def test_a_wrong_rule_is_named_and_not_used(monkeypatch, mistake):
    monkeypatch.setattr(gram.rules, "_RULES", dict(gram.rules._RULES))

    @gram.register(Scale)
    def scale(module, a, g):
        if mistake == "error":
            raise KeyError("none such")
        return {"scale": 2 * g * a[:, None] if mistake == "values" else g[..., :1]}

    lin = Linearization(nn.Sequential(nn.Linear(3, 4), Scale(4), nn.Tanh(), nn.Linear(4, 2)).double())
    x = torch.randn(5, 3).double()
    rows = lin.jacobian(x).flatten(0, 1)
    with pytest.warns(FallbackWarning, match=r"1\.scale do not agree with plain autodiff"):
        found = lin.gram(x)
    assert relative_error(found, rows @ rows.mT) < TOLERANCE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lin.gram(x)  # said once


class Gated(nn.Module):
    """Uses a layer's weight a second time, through a gate that is shut unless the first input is very large."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        gate = torch.relu(x[:, :1] - 100)
        return self.second(torch.tanh(self.first(x)) + gate * F.linear(x, self.first.weight))


def test_a_use_whose_derivative_is_zero_where_it_is_checked_is_found():
    lin = Linearization(Gated().double())
    x = torch.randn(5, 3).double()
    x[4, 0] = 150.0
    with pytest.warns(FallbackWarning, match=r"first\.weight reach the output in other ways"):
        found = lin.gram(x)
    rows = lin.jacobian(x).flatten(0, 1)
    assert relative_error(found, rows @ rows.mT) < TOLERANCE


class OtherWeights(nn.Module):
    """Calls a layer with something else in the place of its weight."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3, bias=False)

    def forward(self, x):
        return torch.func.functional_call(self.layer, {"weight": self.layer.weight * 2}, (x,))


def test_a_layer_called_with_other_weights_is_found_where_all_derivatives_are_zero():
    lin = Linearization(nn.Sequential(OtherWeights(), nn.Linear(3, 2)).double())
    x = torch.zeros(2, 3).double()
    with pytest.warns(FallbackWarning, match=r"0\.layer\.weight reach the output in other ways"):
        lin.gram(x)
    x = torch.randn(4, 3).double()
    rows = lin.jacobian(x).flatten(0, 1)
    assert relative_error(lin.gram(x), rows @ rows.mT) < TOLERANCE


class Undecided(nn.Module):
    """Python control flow on values, which vmap refuses: another use of the weights for some of the examples."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        rows = [self.first(row) if row[0] < 100 else F.linear(row, self.first.weight, self.first.bias) for row in x]
        return self.second(torch.tanh(torch.stack(rows)))


def test_another_use_at_a_later_example_is_refused():
    lin = Linearization(Undecided().double())
    x = torch.randn(4, 3).double()
    rows = lin.jacobian(x).flatten(0, 1)
    assert relative_error(lin.gram(x), rows @ rows.mT) < TOLERANCE
    x[3, 0] = 150.0
    with pytest.raises(RuntimeError, match=r"first\.weight"):
        lin.gram(x)


def test_prelu_jacobians_are_right_under_vmap():
    """torch's batching rule for the derivative of PReLU mixes examples up when two are nested."""
    net = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 3)).double()
    lin = Linearization(net)
    x = torch.randn(3, 3).double()
    for i in range(3):
        f = net(x[i : i + 1])[0]
        for k in range(3):
            grads = torch.autograd.grad(f[k], list(net.parameters()), retain_graph=True)
            expected = torch.cat([g.flatten() for g in grads])
            assert relative_error(lin.jacobian(x)[i, k], expected) < TOLERANCE


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.InstanceNorm1d(2, affine=True)])
def test_gradients_in_x_are_right_under_vmap_with_norms(norm):
    """torch's batching rules for the second derivatives of these mix examples up."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Unflatten(1, (2, 4)), norm, nn.Flatten(), nn.Linear(8, 2)).double()
    lin = Linearization(net)
    x = torch.randn(2, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(lin.jacobian, (x,))
    assert torch.autograd.gradcheck(lin.gram, (x,))


def test_a_wrong_second_derivative_of_torch_is_noticed():
    lin = Linearization(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    x = torch.randn(3, 3).double().requires_grad_()
    right = lin.function._jacobian_vmap
    lin.function._jacobian_vmap = lambda x, c: right(x, c) + 1e-3 * (x - x.detach()).sum()
    assert torch.autograd.gradcheck(lin.jacobian, (x,))
    assert torch.autograd.gradcheck(lin.gram, (x,))


def test_a_wrong_batching_rule_of_torch_is_noticed(monkeypatch):
    lin = Linearization(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    x = torch.randn(3, 3).double()
    expected = lin.function.jacobian_loop(x, None)
    right = lin.function._jacobian_vmap
    monkeypatch.setattr(lin.function, "_jacobian_vmap", lambda *args: right(*args).flip(0))
    assert relative_error(lin.jacobian(x), expected) < TOLERANCE


class OtherUse(nn.Module):
    """A weight that only longer inputs meet in a second way."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(1, 20), nn.Linear(20, 8)
        self.last = nn.Linear(8, 2)

    def forward(self, x):
        z = self.second(self.first(x.mean(1, keepdim=True)).tanh())
        if x.shape[1] > 3:
            z = z + nn.functional.linear(self.first(x[:, :1]).cos(), self.second.weight)
        return self.last(z.tanh())


def test_inputs_of_two_lengths_of_which_one_meets_another_use():
    lin = Linearization(OtherUse().double())
    short, long = torch.randn(5, 3).double(), torch.randn(4, 6).double()
    rows, others = (lin.jacobian(x).flatten(0, 1) for x in (short, long))
    with pytest.warns(gram.FallbackWarning, match="second.weight"):
        assert relative_error(lin.gram(short, long), rows @ others.mT) < TOLERANCE
    assert relative_error(lin.gram(long, short), others @ rows.mT) < TOLERANCE
    assert relative_error(lin.gram(short), rows @ rows.mT) < TOLERANCE


class Empty(nn.Module):
    """Has a parameter without a single weight."""

    def __init__(self):
        super().__init__()
        self.layer, self.none = nn.Linear(3, 2), nn.ParameterList([nn.Parameter(torch.zeros(0))])

    def forward(self, x):
        return self.layer(x) + self.none[0].sum()


def test_a_parameter_without_weights():
    lin = Linearization(Empty().double())
    x, v = torch.randn(4, 3).double(), variances(lin)
    rows = lin.jacobian(x).flatten(0, 1)
    assert relative_error(lin.gram(x), rows @ rows.mT) < TOLERANCE
    assert relative_error(lin.gram(x, prior_variance=v), (rows * v) @ rows.mT) < TOLERANCE


# ---- files


def test_file_holds_the_same_matrix(problem, tmp_path):
    lin, x, _ = problem
    path = tmp_path / "k.npy"
    found = lin.gram(x, file=path)
    assert relative_error(found, lin.gram(x)) < TOLERANCE
    assert np.array_equal(np.load(path), found.numpy())
    assert os.listdir(tmp_path) == ["k.npy"]
    assert relative_error(lin.trace_gram(x[:2], x, file=tmp_path / "t.npy"), lin.trace_gram(x[:2], x)) < TOLERANCE
    found += 1  # a copy in memory: the file stays
    assert relative_error(torch.from_numpy(np.load(path)), lin.gram(x)) < TOLERANCE


def test_bad_files_are_refused(problem, tmp_path):
    lin, x, _ = problem
    with pytest.raises(ValueError, match=r"must end in \.npy"):
        lin.gram(x, file=tmp_path / "k.pt")
    (tmp_path / "k.npy").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="exists already"):
        lin.gram(x, file=tmp_path / "k.npy")
    assert (tmp_path / "k.npy").read_bytes() == b"mine"
    with pytest.raises(ValueError, match="without batch dimensions"):
        lin.gram(x[None], file=tmp_path / "b.npy")


def test_an_interrupted_file_of_other_inputs_is_refused(problem, tmp_path, monkeypatch):
    lin, x, _ = problem
    path = tmp_path / "k.npy"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def interrupted(*_, **__):
            raise KeyboardInterrupt

        patch.setattr(tiling.MatrixFile, "write", interrupted)
        lin.gram(x, file=path)
    assert sorted(os.listdir(tmp_path)) == ["k.npy.journal", "k.npy.partial"]
    with pytest.raises(ValueError, match="begun with another net, other inputs or another prior"):
        lin.gram(x[:-1], file=path)
    with open(tmp_path / "k.npy.journal", "r+") as journal:
        journal.truncate(5)  # killed while its first line was being written: begun anew
    assert relative_error(lin.gram(x, file=path), lin.gram(x)) < TOLERANCE
    (tmp_path / "k.npy").unlink()
    (tmp_path / "k.npy.journal").write_text("of a matrix that is no more\n")
    assert relative_error(lin.gram(x, file=path), lin.gram(x)) < TOLERANCE


KILLED = """
import sys, time, torch
sys.path.insert(0, {tests!r})
import test_gram
import gpytorch_dnn2gp as dnn2gp
from gpytorch_dnn2gp import Linearization, gram, tiling
gram.matrix.TILE_BYTES['cpu'] = 160
gram.matrix.MIN_TILE_ROWS = 1
tiling.MatrixFile.SECONDS = 0.0
write = tiling.MatrixFile.write
def slow(*args, **kwargs):
    write(*args, **kwargs)
    print("tile", flush=True)
    time.sleep(0.05)
tiling.MatrixFile.write = slow
net, x, options = test_gram.PROBLEMS["convolutional"]
torch.set_num_threads(1)
Linearization(net, **options).gram(x, file={path!r})
print("done", flush=True)
"""


def test_a_killed_computation_resumes_where_it_stopped(tmp_path):
    """SIGKILL in the middle; the next run computes the missing tiles alone and ends in the same bits."""

    def start(path):
        code = KILLED.format(tests=os.path.dirname(__file__), path=str(path))
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)

    whole = start(tmp_path / "whole.npy")
    tiles = whole.communicate(timeout=120)[0].split().count("tile")
    assert whole.returncode == 0 and tiles >= 4
    killed = start(tmp_path / "killed.npy")
    for _ in range(2):
        assert killed.stdout.readline() == "tile\n"
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    assert not (tmp_path / "killed.npy").exists()
    with open(tmp_path / "killed.npy.journal", "a") as journal:
        journal.write("0 1")  # a line that was being written
    resumed = start(tmp_path / "killed.npy")
    out = resumed.communicate(timeout=120)[0].split()
    assert resumed.returncode == 0 and out[-1] == "done"
    assert out.count("tile") < tiles
    assert (tmp_path / "killed.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


# ---- in Gaussian processes: by layers as by Jacobians


@pytest.fixture
def by_layers(monkeypatch):
    monkeypatch.setattr(dnn2gp.linearize, "FEW_NUMBERS", 0)
    monkeypatch.setattr(dnn2gp.kernels, "FEATURE_NUMBERS", 0)


@pytest.mark.parametrize("num_precisions", [1, 6])
def test_laplace_gp_by_layers_is_that_by_jacobians(request, num_precisions):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x, y, test = torch.randn(12, 3).double(), torch.randint(0, 2, (12,)), torch.randn(2, 4, 3).double()
    delta = torch.arange(1.0, 1 + num_precisions, dtype=torch.float64)

    def results():
        gp = dnn2gp.LaplaceGP(net, x, y, dnn2gp.losses.Categorical(), delta, solver="function_space")
        points = test.clone().requires_grad_()
        f = gp(points)
        covariance = f.covariance_matrix
        (gradient,) = torch.autograd.grad(covariance.sum() + f.mean.sum(), points)
        evidence = gp.log_evidence()
        (by_delta,) = torch.autograd.grad(evidence, gp.covar_module.raw_prior_precision)
        return [covariance, gradient, gp.predict(test[0]).variance, evidence[None], by_delta]

    expected = results()
    request.getfixturevalue("by_layers")
    for found, value in zip(results(), expected, strict=True):
        assert relative_error(found.detach(), value.detach()) < TOLERANCE


@pytest.mark.parametrize("loss", [dnn2gp.losses.Categorical(), dnn2gp.losses.Gaussian(0.3)])
def test_diagonal_posterior_by_layers_is_that_by_jacobians(request, loss):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x = torch.randn(12, 3).double()
    y = torch.randint(0, 2, (12,)) if isinstance(loss, dnn2gp.losses.Categorical) else torch.randn(12, 2).double()

    def variance():
        return dnn2gp.LaplaceGP(net, x, y, loss, 0.5, structure="diagonal").predict(x[:3]).epistemic

    expected = variance()
    request.getfixturevalue("by_layers")
    assert relative_error(variance(), expected) < TOLERANCE


@pytest.mark.parametrize("num_precisions", [1, 4])
def test_kernel_in_an_exact_gp_by_layers_is_that_by_features(request, num_precisions):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    x, y, test = torch.randn(12, 3).double(), torch.randn(12).double(), torch.randn(4, 3).double()

    class Model(gpytorch.models.ExactGP):
        def __init__(self):
            super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
            self.mean_module = gpytorch.means.ZeroMean()
            self.covar_module = dnn2gp.JacobianKernel(net, torch.arange(1.0, 1 + num_precisions).double())

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    def results():
        model = Model().double().train()
        kernel = model.covar_module
        mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
        value = mll(model(x), y)
        value.backward()
        model.eval()
        points = test.clone().requires_grad_()
        f = model(points)
        (gradient,) = torch.autograd.grad(f.variance.sum() + f.mean.sum(), points)
        diagonal = kernel(x, diag=True)
        (by_delta,) = torch.autograd.grad(diagonal.sum(), kernel.raw_prior_precision)
        return [value[None], kernel.raw_prior_precision.grad, f.mean, f.covariance_matrix, gradient, diagonal, by_delta]

    expected = results()
    request.getfixturevalue("by_layers")
    for found, value in zip(results(), expected, strict=True):
        assert relative_error(found.detach(), value.detach()) < TOLERANCE


def test_a_new_prior_precision_takes_no_gram_again(by_layers, monkeypatch):
    kernel = dnn2gp.JacobianKernel(convolutional(), input_shape=(1, 8, 8))
    x = PROBLEMS["convolutional"][1]
    before = kernel(x).to_dense()
    monkeypatch.setattr(gram, "gram", None)
    kernel.prior_precision = 4.0
    assert relative_error(kernel(x).to_dense(), before / 4) < TOLERANCE


def test_wrong_cotangents_of_torch_are_noticed(monkeypatch):
    """The check holds for the number of examples and rows at hand, not for those of the first check alone."""
    lin = Linearization(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    x = torch.randn(4, 3).double()
    rows = lin.jacobian(x).flatten(0, 1)
    lin.gram(x[:3])
    right = gram.capture._capture_by_vmap

    def wrong(*args):
        return {name: [(a, g.flip(0)) for a, g in calls] for name, calls in right(*args).items()}

    monkeypatch.setattr(gram.capture, "_capture_by_vmap", wrong)
    assert relative_error(lin.gram(x), rows @ rows.mT) < TOLERANCE


def test_selected_weights_without_influence_give_zeros():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.used(x)

    lin = Linearization(Idle().double(), params=["unused"])
    x = torch.randn(4, 3).double()
    assert torch.equal(lin.gram(x), torch.zeros(8, 8, dtype=torch.float64))
    assert not lin.jacobian(x).any()
