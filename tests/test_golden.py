"""Golden numbers, float64, largest absolute difference over largest absolute entry at most 1e-8, from both sides.

The paper's own code for ``dnn2gp``, laplace-torch for ``laplace``; tests/reference has the keys and their meaning.
"""

import gzip
import re
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from oracle import assert_close
from problems import SOLVERS, covariance, evidence_gradient, flat_mean, number
from torch import nn

import gpytorch_dnn2gp as dnn2gp

ACTIVATIONS = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


def sequential(params: dict, activation: type[nn.Module]) -> nn.Sequential:
    """Linear layers with an activation between, holding ``params`` in their order."""
    tensors = list(params.values())
    layers: list[nn.Module] = []
    for weight, bias in zip(tensors[::2], tensors[1::2], strict=True):
        layer = nn.Linear(weight.shape[1], weight.shape[0]).double()
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        layers += [layer, activation()]
    return nn.Sequential(*layers[:-1])


# ---- the paper's code: regression


@pytest.fixture(params=["regression_a", "regression_b"])
def regression(request, reference):
    d = reference(f"dnn2gp/{request.param}")
    d["net"] = sequential(d["params"], ACTIVATIONS[d["meta"]["activation"]])
    d["loss"] = dnn2gp.losses.Gaussian(sigma=d["meta"]["sigma_noise"])
    return d


def laplace_gp(d: dict, **kwargs) -> dnn2gp.LaplaceGP:
    kwargs = {"prior_precision": d["meta"]["prior_precision"], **kwargs}
    return dnn2gp.LaplaceGP(d["net"], d["x"], d["y"], d["loss"], **kwargs)


def test_regression_net_and_jacobian(regression):
    d = regression
    lin = dnn2gp.Linearization(d["net"])
    assert_close(lin(d["x"])[:, 0], d["f_train"], what="f_train")
    assert_close(lin(d["x_test"])[:, 0], d["f_test"], what="f_test")
    assert_close(lin.jacobian(d["x"])[:, 0], d["jacobian"], what="jacobian")
    assert_close(lin.weights, torch.cat([p.flatten() for p in d["params"].values()]), what="weights")


@pytest.mark.parametrize("solver", SOLVERS)
def test_regression_weight_posterior(regression, solver):
    d = regression
    posterior = laplace_gp(d, solver=solver).weight_posterior()
    assert_close(posterior.mean, d["linear_model_posterior_mean"], what="linear_model_posterior_mean")
    assert_close(posterior.precision(), d["laplace_precision"], what="laplace_precision")
    assert_close(posterior.covariance(), d["laplace_covariance"], what="laplace_covariance")
    eye = torch.eye(len(posterior.mean), dtype=torch.float64)
    assert_close(posterior.precision_matmul(eye), d["laplace_precision"], what="precision products")
    assert_close(posterior.covariance_matmul(eye), d["laplace_covariance"], what="covariance products")


@pytest.mark.parametrize("solver", SOLVERS)
def test_regression_dual_form(regression, solver):
    """The paper's GP has prior mean zero; ours is shifted by c(x) = f(x) - J(x) w*: same covariance and evidence."""
    d = regression
    gp = laplace_gp(d, solver=solver)
    posterior = gp(d["x_test"])
    lin = dnn2gp.Linearization(d["net"])
    c = d["f_test"] - lin.jvp(d["x_test"], lin.weights)[:, 0]
    assert_close(flat_mean(posterior) - c, d["gp_mean"], what="gp_mean")
    assert_close(covariance(posterior), d["gp_cov"], what="gp_cov")
    assert_close(gp.dual_data().targets.reshape(-1), d["y_tilde"], what="y_tilde")
    noise_precision = torch.full_like(d["y"], d["meta"]["sigma_noise"] ** -2)
    assert_close(gp.dual_data().noise_precision.reshape(-1), noise_precision, what="noise_precision")
    assert_close(gp.log_evidence(kind="gp"), d["log_marginal_likelihood"], what="log_marginal_likelihood")


@pytest.mark.parametrize("solver", SOLVERS)
def test_regression_predictions(regression, solver):
    d = regression
    gp = laplace_gp(d, solver=solver)
    network, posterior = gp.predict(d["x_test"]), gp.predict(d["x_test"], mean="posterior")
    assert_close(network.mean.reshape(-1), d["f_test"], what="mean at the network's output")
    assert_close(posterior.mean.reshape(-1), flat_mean(gp(d["x_test"])), what="posterior mean")
    aleatoric = torch.full_like(d["f_test"], d["meta"]["sigma_noise"] ** 2)
    assert_close(network.aleatoric.reshape(-1), aleatoric, what="aleatoric")
    assert_close(network.epistemic.reshape(-1), d["gp_cov"].diagonal(), what="epistemic")
    assert_close(network.variance.reshape(-1), d["gp_cov"].diagonal() + aleatoric, what="variance")
    # The targets of the output form are the labels themselves.
    assert_close(gp.train_targets.reshape(-1), d["y"], what="train_targets")
    assert_close(gp.train_labels.reshape(-1), d["y"], what="train_labels")


# ---- the paper's code: binary classification


@pytest.fixture
def binary(reference):
    d = reference("dnn2gp/binary_a")
    d["net"] = sequential(d["params"], nn.Tanh)
    d["loss"] = dnn2gp.losses.Bernoulli()
    return d


def test_binary_loss_and_jacobian(binary):
    d = binary
    lin = dnn2gp.Linearization(d["net"])
    f, y = lin(d["x"]), d["y"][:, None]
    assert_close(d["loss"].residual(f, y)[:, 0], d["residual"], what="residual")
    assert_close(d["loss"].noise_precision(f)[:, 0, 0], d["noise_precision"], what="noise_precision")
    assert_close(lin.jacobian(d["x"])[:, 0], d["jacobian"], what="jacobian")


@pytest.mark.parametrize("solver", SOLVERS)
def test_binary_weight_posterior(binary, solver):
    d = binary
    gp = laplace_gp(d, solver=solver)
    assert_close(gp.weight_posterior().precision(), d["laplace_precision"], what="laplace_precision")
    assert_close(gp.weight_posterior().covariance(), d["laplace_covariance"], what="laplace_covariance")
    assert_close(gp.dual_data().noise_precision.reshape(-1), d["noise_precision"], what="noise_precision")
    w = oracle.weights(d["net"])
    y_dual = d["jacobian"] @ w - d["residual"] / d["noise_precision"]
    assert_close(gp.dual_data().targets.reshape(-1), y_dual, what="targets")


# ---- laplace-torch


@pytest.fixture(params=["multiclass", "multiclass_saturated", "regression_multi"])
def laplace(request, reference):
    d = reference(f"laplace/{request.param}")
    d["net"] = sequential(d["params"], nn.Tanh)
    sigma = d["meta"]["sigma_noise"]
    d["loss"] = dnn2gp.losses.Categorical() if sigma is None else dnn2gp.losses.Gaussian(sigma=sigma)
    return d


@pytest.mark.parametrize("solver", SOLVERS)
def test_laplace_outputs_and_covariances(laplace, solver):
    d = laplace
    gp = laplace_gp(d, solver=solver)
    prediction = gp.predict(d["x_test"])
    assert_close(dnn2gp.Linearization(d["net"])(d["x"]), d["f_train"], what="f_train")
    assert_close(prediction.f.mean, d["f_test"], what="f_test")
    assert_close(covariance(prediction.f), d["f_var_test"], what="f_var_test")
    assert_close(covariance(gp(d["x_test"])), d["f_cov_joint_test"], what="f_cov_joint_test")
    joint = gp.predict(d["x_test"], joint=True).f
    assert_close(covariance(joint), d["f_cov_joint_test"], what="f_cov_joint_test")
    assert_close(flat_mean(joint), d["f_test"].flatten(), what="f_test")


@pytest.mark.parametrize("solver", SOLVERS)
def test_laplace_evidence_and_its_gradient(laplace, solver):
    d = laplace
    gp = laplace_gp(d, solver=solver)
    evidence = gp.log_evidence()
    assert_close(evidence, d["log_marginal_likelihood"], what="log_marginal_likelihood")
    gradient = evidence_gradient(gp, evidence, "prior_precision")
    assert_close(gradient, d["grad_log_marginal_likelihood_prior_precision"], what="gradient")


@pytest.mark.parametrize("solver", SOLVERS)
def test_laplace_one_precision_per_tensor(laplace, solver):
    d = laplace
    gp = laplace_gp(d, solver=solver, prior_precision=d["prior_precision_per_tensor"])
    f = gp.predict(d["x_test"]).f
    assert_close(covariance(f), d["f_var_test_per_tensor"], what="f_var_test_per_tensor")
    assert_close(gp.log_evidence(), d["log_marginal_likelihood_per_tensor"], what="log_marginal_likelihood_per_tensor")
    # The same from a number, set afterwards: no Jacobian is computed again.
    later = laplace_gp(d, solver=solver, prior_precision=torch.ones(len(d["params"]), dtype=torch.float64))
    later.predict(d["x_test"])
    later.prior_precision = d["prior_precision_per_tensor"]
    assert_close(covariance(later.predict(d["x_test"]).f), d["f_var_test_per_tensor"], what="set afterwards")
    assert_close(later.log_evidence(), d["log_marginal_likelihood_per_tensor"], what="set afterwards")


@pytest.mark.parametrize("solver", SOLVERS)
def test_laplace_predictive(laplace, solver):
    """Probit class probabilities (their default and ours), or the mean of a regression."""
    d = laplace
    prediction = laplace_gp(d, solver=solver).predict(d["x_test"])
    assert_close(prediction.mean, d["predictive_test"], what="predictive_test")
    if d["meta"]["sigma_noise"] is None:
        assert_close(prediction.probs, d["predictive_test"], what="predictive_test")
        torch.testing.assert_close(prediction.probs.sum(-1), torch.ones_like(prediction.probs[:, 0]))


def test_the_two_evidences_of_a_regression_that_is_not_quite_stationary(reference):
    d = reference("laplace/regression_multi")
    d["net"], d["loss"] = sequential(d["params"], nn.Tanh), dnn2gp.losses.Gaussian(sigma=d["meta"]["sigma_noise"])
    gp = laplace_gp(d)
    gap = gp.log_evidence(kind="gp") - gp.log_evidence()
    assert gap > 1e-7 * abs(float(d["log_marginal_likelihood"]))  # visible at the tolerance of this file
    assert_close(gap, number(gp.stationarity().newton_decrement) / 2, tol=1e-6, what="gap")
    assert_close(number(gp.stationarity().gradient_norm), number(d["meta"]["grad_norm_at_mode"]), tol=1e-6, what="|g|")


# ---- the paper's LeNet-5 on MNIST: diagonal posterior, P = 44,426


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2))
        self.layer2 = nn.Sequential(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2))
        self.fc1, self.fc2, self.fc = nn.Linear(256, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x):
        x = self.layer2(self.layer1(x)).flatten(1)
        return self.fc(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


def mnist_train(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images scaled to [0, 1] and flattened, and labels."""
    images = gzip.decompress((folder / "mnist" / "train-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / "mnist" / "train-labels-idx1-ubyte.gz").read_bytes())
    x = np.frombuffer(images, np.uint8, count=200 * 784, offset=16).reshape(200, 784)
    y = np.frombuffer(labels, np.uint8, count=200, offset=8)
    return torch.tensor(x, dtype=torch.float64) / 255, torch.tensor(y, dtype=torch.long)


def lenet(folder: Path) -> LeNet:
    net = LeNet()
    with np.load(folder / "dnn2gp_models" / "full_mnist_lenet_adaml2.npz") as archive:
        net.load_state_dict({name: torch.from_numpy(archive[name]) for name in archive.files})
    return net.double()


def test_lenet_kernel(reference, data_dir):
    d, (x, _) = reference("dnn2gp/lenet_mnist"), mnist_train(data_dir)
    x = x[d["indices_eval"]]
    lin = dnn2gp.Linearization(lenet(data_dir), input_shape=(1, 28, 28))
    k = lin.gram(x).reshape(30, 10, 30, 10)
    assert_close(torch.einsum("ikjk->ij", k), d["kernel_sum_of_class_diagonals"], what="kernel_sum_of_class_diagonals")
    assert_close(k[:8, :, :8].transpose(1, 2), d["kernel_full_first8"], what="kernel_full_first8")
    assert_close(lin.jvp(x, lin.weights), d["jacobian_times_w"], what="jacobian_times_w")


def test_lenet_diagonal_posterior(reference, data_dir):
    d, (x, y) = reference("dnn2gp/lenet_mnist"), mnist_train(data_dir)
    fit, evaluate = d["indices_fit"], d["indices_eval"]
    assert torch.equal(y[evaluate], d["labels"].long())
    gp = dnn2gp.LaplaceGP(
        lenet(data_dir),
        x[fit],
        y[fit],
        dnn2gp.losses.Categorical(),
        prior_precision=float(d["prior_precision"]),
        structure="diagonal",
        input_shape=(1, 28, 28),
    )
    # A diagonal matrix times the vector of ones.
    precision = gp.weight_posterior().precision_matmul(torch.ones(44426, dtype=torch.float64))
    assert_close(precision, d["posterior_precision_diag"], what="posterior_precision_diag")
    prediction = gp.predict(x[evaluate], approximation="linear")
    assert_close(prediction.mean, d["mean_probabilities"], what="mean_probabilities")
    assert_close(prediction.aleatoric, d["aleatoric_variance_diag"], what="aleatoric_variance_diag")
    assert_close(prediction.epistemic, d["epistemic_variance_diag"], what="epistemic_variance_diag")
    assert_close(prediction.variance, d["aleatoric_variance_diag"] + d["epistemic_variance_diag"], what="variance")


# ---- every key has its test


def test_no_reference_key_is_left_out(reference):
    """Each key of the files above appears in this file; those of vogn_a belong to the training iterates."""
    text = Path(__file__).read_text()
    inputs = {"meta", "params", "x", "y", "x_test", "y_test"}
    files = [f"dnn2gp/{name}" for name in ("regression_a", "regression_b", "binary_a", "lenet_mnist")]
    files += [f"laplace/{name}" for name in ("multiclass", "multiclass_saturated", "regression_multi")]
    for file in files:
        for key in reference(file):
            assert key in inputs or re.search(rf'\["{key}"\]', text), f"{file}: {key} is compared nowhere"
