"""A thousand classes over a last layer of 128 features: products with R, J and their transposes, nothing of n K K."""

import math

import oracle
import pytest
import torch
from oracle import assert_close
from problems import F64, covariance, flat_mean, randomized
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gpytorch_dnn2gp as dnn2gp
from gpytorch_dnn2gp import tiling

FEATURES, POINTS = 128, 256


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.what = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            # Expanded views take no memory: count what is stored.
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                stored = math.prod(n for n, s in zip(leaf.shape, leaf.stride(), strict=True) if s != 0)
                if stored > self.numel:
                    self.numel, self.what = stored, f"{func} {tuple(leaf.shape)}"
        return out


def wide(num_classes: int, n: int = POINTS, features: int = FEATURES, dtype: torch.dtype = F64):
    """A net of 10 inputs with a wide last layer, n points with labels, some points to predict at."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(10, features), nn.Tanh(), nn.Linear(features, num_classes))
    net = randomized(net, 0, scale=0.3).to(dtype)
    x = torch.randn(n + 4, 10, generator=generator, dtype=F64).to(dtype)
    y = torch.randint(num_classes, (n,), generator=generator)
    return net, x[:n], y, x[n:]


def gp_of(net, x, y, **kwargs) -> dnn2gp.LaplaceGP:
    kwargs = {"prior_precision": 10.0, "params": "last_layer", **kwargs}
    return dnn2gp.LaplaceGP(net, x, y, dnn2gp.losses.Categorical(), **kwargs)


# Work grows as K (n K + P) for each point: less of one or another here, docs/benchmarks.md has all of it.
@pytest.mark.parametrize(("num_classes", "n", "features"), [(1000, 10, 32), (160, POINTS, FEATURES)])
def test_predict_with_many_classes(num_classes, n, features):
    K = num_classes
    net, x, y, x_test = wide(K, n, features, dtype=torch.float32)
    with tiling.memory_limit(10**9), Largest() as largest:  # columns of the covariance in small chunks
        prediction = gp_of(net, x, y, solver="iterative").predict(x_test[:1])
    assert prediction.mean.shape == (1, K)
    assert largest.numel < n * K * K, f"{largest.what} is as large as n K K"
    for value in (prediction.mean, prediction.variance, prediction.aleatoric, prediction.epistemic):
        assert torch.isfinite(value).all()
    assert_close(prediction.probs.sum(-1), torch.ones(1), tol=1e-4, what="probabilities")
    # The prior is an upper bound, J S0 J^T = (|phi|^2 + 1) / delta on the diagonal, and data tell something.
    phi = net[1](net[0](x_test[:1]))
    prior = (phi.square().sum() + 1) / 10.0
    variance = covariance(prediction.f).diagonal(dim1=-2, dim2=-1)
    assert (variance > 0).all() and (variance <= prior * (1 + 1e-3)).all()
    assert variance.min() < 0.999 * prior


def test_products_with_a_thousand_classes():
    """n = 256, K = 1000: some columns of J* Sigma J*^T, by products with the covariance of 129,000 weights."""
    K = 1000
    net, x, y, x_test = wide(K, dtype=torch.float32)
    with Largest() as largest:
        gp = gp_of(net, x, y, solver="iterative")
        posterior = gp.weight_posterior()
        rows = torch.stack([gp.linearization.vjp(x_test[:1], e[None]) for e in torch.eye(K)[:3]])
        columns = gp.linearization.jvp(x_test[:1], posterior.covariance_matmul(rows))[:, 0]
        back = posterior.precision_matmul(posterior.covariance_matmul(rows))
    assert largest.numel < POINTS * K * K, f"{largest.what} is as large as n K K"
    assert_close(back, rows, tol=1e-3, what="precision times covariance")
    assert_close(columns[:, :3], columns[:, :3].mT.clone(), tol=1e-3, what="symmetry")
    assert float(gp.stationarity().gradient_norm) > 0


def test_the_same_net_with_fewer_classes_by_hand():
    """n K K is out of reach of P x P algebra; K = 12 is not."""
    net, x, y, x_test = wide(12, n=40, features=16)
    gp = gp_of(net, x, y, solver="iterative")
    names, hand = ["2"], oracle.HandLoss("categorical")
    w, f = oracle.weights(net, names), oracle.outputs(net, x)
    J = oracle.jacobian(net, x, names)
    s0_inv = torch.full_like(w, 10.0)
    dense = oracle.Dense(J, w, f, hand.residual(f, y), hand.lam(f, y), hand.nll(f, y), s0_inv)
    J, f = oracle.jacobian(net, x_test, names), oracle.outputs(net, x_test)
    blocks = torch.stack([dense.covariance(J_i[None]) for J_i in J])
    assert_close(covariance(gp.predict(x_test).f), blocks, tol=1e-6, what="covariance")
    assert_close(covariance(gp(x_test)), dense.covariance(J), tol=1e-6, what="joint covariance")
    assert_close(flat_mean(gp(x_test)), dense.mean(J, f).flatten(), tol=1e-6, what="mean")
    posterior = gp.weight_posterior()
    v = torch.linspace(-1, 1, len(w), dtype=F64)
    assert_close(posterior.mean, dense.weight_mean, tol=1e-6, what="weights")
    assert_close(posterior.covariance_matmul(v), dense.sigma @ v, tol=1e-6, what="covariance product")
    assert_close(posterior.precision_matmul(v), dense.precision @ v, tol=1e-6, what="precision product")


@pytest.mark.parametrize("solver", ["weight_space", "function_space"])
def test_dense_sides_are_refused_with_their_sizes(solver):
    """P = 129,000 and n K = 256,000: matrices of 133 and 524 GB in float64."""
    net, x, y, x_test = wide(1000)
    with tiling.memory_limit(4 * 10**9), Largest() as largest:
        with pytest.raises((MemoryError, ValueError), match=r"\d[\d.,e+]* ?GB"):
            gp_of(net, x, y, solver=solver).predict(x_test)
    assert largest.numel < POINTS * 1000 * 1000


@pytest.mark.parametrize("solver", ["iterative", "auto"])
@pytest.mark.parametrize("kind", ["laplace", "gp"])
def test_the_evidence_is_refused_with_its_size(solver, kind):
    """Its determinant needs a dense side."""
    net, x, y, _ = wide(1000)
    with tiling.memory_limit(4 * 10**9), Largest() as largest:
        gp = gp_of(net, x, y, solver=solver)
        with pytest.raises((MemoryError, ValueError)) as error:
            gp.log_evidence(kind=kind)
    if kind == "laplace":
        assert "GB" in str(error.value)
    assert largest.numel < POINTS * 1000 * 1000


def test_auto_takes_the_iterative_side_when_neither_matrix_fits():
    net, x, y, x_test = wide(30, n=64)
    with tiling.memory_limit(10**8):  # P = 3870: 120 MB, n K = 1920: 29 MB
        a = gp_of(net, x, y, solver="auto").predict(x_test)
    with tiling.memory_limit(3 * 10**7):
        b = gp_of(net, x, y, solver="auto").predict(x_test)
    assert_close(b.variance, a.variance, tol=1e-5, what="variance")


def test_the_recorder_sees_through_vmap():
    with Largest() as largest:
        torch.func.vmap(lambda a: a[:, None] * a)(torch.ones(7, 11))
    assert largest.numel == 7 * 11 * 11
