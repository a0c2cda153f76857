"""What people have: a mean loss and its weight decay. The prior precision it stands for, by the gradient.

Training with ``loss(net(x), y) + wd/2 |w|^2`` (the weight decay of torch's optimisers) is, times c, training with
``sum_i l(y_i, f_i) + delta/2 |w|^2``: delta = c wd, where c undoes the mean and turns torch's loss into -log p(y|f).
"""

import oracle
import pytest
import torch
from oracle import assert_close
from problems import F64, Squeeze, covariance, flat_mean, mlp, number, randomized
from torch import nn
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader, Dataset, TensorDataset

import gpytorch_dnn2gp as dnn2gp

N, K, WD, SIGMA = 9, 3, 0.02, 0.4
from_training = dnn2gp.LaplaceGP.from_training


def data(kind: str, n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 2, generator=generator, dtype=F64)
    if kind == "classes":
        return x, torch.randint(K, (n,), generator=generator)
    if kind == "soft":
        return x, torch.randn(n, K, generator=generator, dtype=F64).softmax(-1)
    if kind == "bits":
        return x, torch.randint(2, (n, K), generator=generator).double()
    if kind == "counts":
        return x, torch.randint(4, (n, K), generator=generator).double()
    return x, torch.randn(n, K, generator=generator, dtype=F64)


# name: torch's loss, labels, delta / wd, keyword arguments, -log p(y|f) by hand
LOSSES = {
    "cross_entropy": (nn.CrossEntropyLoss(), "classes", N, {}, "categorical"),
    "cross_entropy_sum": (nn.CrossEntropyLoss(reduction="sum"), "classes", 1, {}, "categorical"),
    "cross_entropy_soft": (nn.CrossEntropyLoss(), "soft", N, {}, "categorical"),
    "label_smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), "classes", N, {}, "categorical"),
    "bce": (nn.BCEWithLogitsLoss(), "bits", N * K, {}, "bernoulli"),
    "bce_sum": (nn.BCEWithLogitsLoss(reduction="sum"), "bits", 1, {}, "bernoulli"),
    "mse": (nn.MSELoss(), "reals", N * K / (2 * SIGMA**2), {"sigma": SIGMA}, "gaussian"),
    "mse_sum": (nn.MSELoss(reduction="sum"), "reals", 1 / (2 * SIGMA**2), {"sigma": SIGMA}, "gaussian"),
    "poisson": (nn.PoissonNLLLoss(), "counts", N * K, {}, "poisson"),
    "poisson_sum": (nn.PoissonNLLLoss(reduction="sum"), "counts", 1, {}, "poisson"),
    "poisson_full": (nn.PoissonNLLLoss(full=True), "counts", N * K, {}, "poisson"),
}


def objective_gradient(net: nn.Module, loss, x: torch.Tensor, y: torch.Tensor, wd: float = WD) -> torch.Tensor:
    """Of what was trained: torch's loss on all data, plus wd/2 |w|^2."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    value = loss(net(x), y) + 0.5 * wd * sum((p**2).sum() for p in parameters)
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])


@pytest.mark.parametrize("name", LOSSES)
def test_prior_precision(name):
    loss, kind, factor, kwargs, _ = LOSSES[name]
    x, y = data(kind)
    gp = from_training(randomized(mlp(num_outputs=K), 0), (x, y), loss, weight_decay=WD, **kwargs)
    assert_close(gp.prior_precision.reshape(()), torch.tensor(factor * WD, dtype=F64), tol=1e-12)
    if kind == "reals":
        assert_close(gp.noise.reshape(()), torch.tensor(SIGMA**2, dtype=F64), tol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_of_the_gp_is_that_of_training(name):
    """Without training: g = J^T r + delta w is c times the gradient of what was trained, at any weights.

    c is delta / wd; the weights' direction must agree, not only the length, so the P x P side is built from it.
    """
    loss, kind, factor, kwargs, _ = LOSSES[name]
    x, y = data(kind)
    net = randomized(mlp(num_outputs=K), 0)
    gp = from_training(net, (x, y), loss, weight_decay=WD, **kwargs)
    g = factor * objective_gradient(net, loss, x, y)
    assert_close(number(gp.stationarity().gradient_norm), g.norm(), what="|g|")
    # mean of the weights = w - Sigma g, so Sigma^-1 (w - mean) = g.
    posterior = gp.weight_posterior()
    assert_close(posterior.precision_matmul(oracle.weights(net) - posterior.mean), g, tol=1e-7, what="g")


@pytest.mark.parametrize("name", ["cross_entropy", "label_smoothing", "bce", "mse", "poisson"])
def test_at_the_optimum_of_training_the_gradient_vanishes(name):
    loss, kind, factor, kwargs, hand_name = LOSSES[name]
    x, y = data(kind)
    net = randomized(mlp(num_outputs=K), 0, scale=0.3)
    parameters = list(net.parameters())
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=3000, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(net(x), y) + 0.5 * WD * sum((p**2).sum() for p in parameters)
        value.backward()
        return value

    optimizer.step(closure)
    assert objective_gradient(net, loss, x, y).norm() < 1e-8
    gp = from_training(net, (x, y), loss, weight_decay=WD, **kwargs)
    assert float(gp.stationarity().gradient_norm) < 1e-8 * factor
    assert float(gp.stationarity().newton_decrement) < 1e-12
    assert_close(gp(x + 0.1).mean, net(x + 0.1), tol=1e-7, what="the posterior mean is the net")
    # Another prior precision is not stationary: the test can tell a factor of two.
    gp.prior_precision = gp.prior_precision.detach() * 2
    assert float(gp.stationarity().gradient_norm) > 1e-3


@pytest.mark.parametrize("name", ["cross_entropy", "label_smoothing", "cross_entropy_soft", "bce", "mse", "poisson"])
def test_posterior_and_evidence(name):
    """The same GP as by hand, P x P, constants of p(y|f) in."""
    loss, kind, factor, kwargs, hand_name = LOSSES[name]
    x, y = data(kind)
    net = randomized(mlp(num_outputs=K), 0)
    gp = from_training(net, (x, y), loss, weight_decay=WD, **kwargs)
    if name == "label_smoothing":  # a mixture of the label and the uniform distribution
        y = 0.9 * one_hot(y, K).double() + 0.1 / K
    hand = oracle.HandLoss(hand_name, SIGMA**2)
    f, w = oracle.outputs(net, x), oracle.weights(net)
    J = oracle.jacobian(net, x)
    s0_inv = torch.full_like(w, factor * WD)
    dense = oracle.Dense(J, w, f, hand.residual(f, y), hand.lam(f, y), hand.nll(f, y), s0_inv)
    J, f = oracle.jacobian(net, x + 0.1), oracle.outputs(net, x + 0.1)
    assert_close(flat_mean(gp(x + 0.1)), dense.mean(J, f).flatten(), what="mean")
    assert_close(covariance(gp(x + 0.1)), dense.covariance(J), what="covariance")
    assert_close(gp.log_evidence(), dense.log_evidence, what="evidence")


def test_one_output():
    """MSELoss and BCEWithLogitsLoss on (n,) and (n, 1): n K is n."""
    x, _ = data("reals")
    for net, y in ((mlp(), torch.ones(N, 1, dtype=F64)), (nn.Sequential(*mlp(), Squeeze()), torch.ones(N, dtype=F64))):
        net = randomized(net, 0)
        gp = from_training(net, (x, y), nn.BCEWithLogitsLoss(), weight_decay=WD)
        assert_close(gp.prior_precision.reshape(()), torch.tensor(N * WD, dtype=F64), tol=1e-12)
        gp = from_training(net, (x, y), nn.MSELoss(), weight_decay=WD, sigma=1.0)
        assert_close(gp.prior_precision.reshape(()), torch.tensor(N * WD / 2, dtype=F64), tol=1e-12)


# ---- loaders


class Dicts(Dataset):
    def __init__(self, x, y, keys=("input", "target")):
        self.x, self.y, self.keys = x, y, keys

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return dict(zip(self.keys, (self.x[i], self.y[i]), strict=True))


def loaders(x, y):
    generator = torch.Generator().manual_seed(0)
    return {
        "tuples": DataLoader(TensorDataset(x, y), batch_size=4),
        "shuffled": DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True, generator=generator),
        "one batch": DataLoader(TensorDataset(x, y), batch_size=100),
        "dicts": DataLoader(Dicts(x, y), batch_size=4),
        "list of batches": [(x[:4], y[:4]), (x[4:], y[4:])],
        "list of lists": [[x[:4], y[:4]], [x[4:], y[4:]]],
    }


@pytest.mark.parametrize("name", loaders(*data("classes")))
def test_loaders_are_their_data(name):
    x, y = data("classes")
    net = randomized(mlp(num_outputs=K), 0)
    expected = from_training(net, (x, y), nn.CrossEntropyLoss(), weight_decay=WD)
    gp = from_training(net, loaders(x, y)[name], nn.CrossEntropyLoss(), weight_decay=WD)
    assert_close(gp.prior_precision.reshape(()), torch.tensor(N * WD, dtype=F64), tol=1e-12)
    assert_close(flat_mean(gp(x + 0.1)), flat_mean(expected(x + 0.1)), tol=1e-10)
    assert_close(covariance(gp(x + 0.1)), covariance(expected(x + 0.1)), tol=1e-10)
    assert_close(gp.log_evidence(), expected.log_evidence(), tol=1e-10)


def test_inputs_and_labels_stay_together_in_a_shuffled_loader():
    """The loader is read once: a second pass would come in another order."""
    x, y = data("reals")
    net = randomized(mlp(num_outputs=K), 0)
    gp = from_training(net, loaders(x, y)["shuffled"], nn.MSELoss(), weight_decay=WD, sigma=SIGMA)
    order = [int((x == row).all(1).nonzero()) for row in gp.train_inputs[0]]
    assert sorted(order) == list(range(N))
    assert torch.equal(gp.train_labels, y[order])


def test_other_arguments_are_passed_on():
    x, y = data("classes")
    net = randomized(mlp(num_outputs=K), 0)
    gp = from_training(net, (x, y), nn.CrossEntropyLoss(), weight_decay=WD, params="last_layer", solver="weight_space")
    names = ["2"]
    J = oracle.jacobian(net, x, names)
    assert len(gp.weight_posterior().mean) == J.shape[-1]


# ---- what has no prior, or no likelihood


@pytest.mark.parametrize(
    ("loss", "kind", "words"),
    [
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0], dtype=F64)), "classes", "weight"),
        (nn.CrossEntropyLoss(reduction="none"), "classes", "reduction"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(K, dtype=F64) * 2), "bits", "weight"),
        (nn.BCEWithLogitsLoss(weight=torch.ones(K, dtype=F64) * 2), "bits", "weight"),
        (nn.BCEWithLogitsLoss(reduction="none"), "bits", "reduction"),
        (nn.MSELoss(reduction="none"), "reals", "reduction"),
        (nn.PoissonNLLLoss(log_input=False), "counts", "log_input"),
        (nn.HuberLoss(), "reals", "Huber"),
        (nn.L1Loss(), "reals", "L1"),
        (nn.NLLLoss(), "classes", "NLLLoss"),
        (nn.BCELoss(), "bits", "BCELoss"),
        (nn.GaussianNLLLoss(), "reals", "GaussianNLLLoss"),
        (lambda f, y: ((f - y) ** 2).mean(), "reals", "from_callable|callable|function"),
    ],
)
def test_unsupported_options_are_refused(loss, kind, words):
    x, y = data(kind)
    net = randomized(mlp(num_outputs=K), 0)
    kwargs = {"sigma": SIGMA} if isinstance(loss, nn.MSELoss) else {}
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=words):
        from_training(net, (x, y), loss, weight_decay=WD, **kwargs)


def test_ignored_labels_are_refused():
    x, y = data("classes")
    y[2] = -100
    with pytest.raises(ValueError, match="ignore|-100|label"):
        from_training(randomized(mlp(num_outputs=K), 0), (x, y), nn.CrossEntropyLoss(), weight_decay=WD)


def test_squared_error_needs_a_noise():
    """delta = n K wd / (2 sigma^2): the same training run stands for one prior precision per sigma."""
    x, y = data("reals")
    with pytest.raises((ValueError, TypeError), match="sigma"):
        from_training(randomized(mlp(num_outputs=K), 0), (x, y), nn.MSELoss(), weight_decay=WD)


@pytest.mark.parametrize("weight_decay", [0.0, -1.0, float("nan")])
def test_weight_decay_must_be_positive(weight_decay):
    """Without a prior there is no posterior."""
    x, y = data("classes")
    with pytest.raises(ValueError, match="weight_decay|prior"):
        from_training(randomized(mlp(num_outputs=K), 0), (x, y), nn.CrossEntropyLoss(), weight_decay=weight_decay)


def test_an_empty_loader_and_unreadable_batches():
    x, y = data("classes")
    net = randomized(mlp(num_outputs=K), 0)
    for batches in ([], [x], DataLoader(TensorDataset(x), batch_size=4), [(x, y, y)], [{"a": x, "b": y, "c": y}]):
        with pytest.raises((ValueError, TypeError)):
            from_training(net, batches, nn.CrossEntropyLoss(), weight_decay=WD)
