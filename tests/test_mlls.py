"""Evidence objects by GPyTorch's conventions, and fitting by them."""

import subprocess
import sys

import gpytorch
import pytest
import torch
from oracle import assert_close
from problems import F64

import gpytorch_dnn2gp as dnn2gp

# nets at random weights
pytestmark = pytest.mark.filterwarnings("ignore::gpytorch_dnn2gp.StationarityWarning")


def make_gp(loss=None, num_outputs=2, **options):
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, num_outputs)).to(F64)
    x = torch.randn(9, 2, dtype=F64)
    y = torch.randn(9, num_outputs, dtype=F64)
    return dnn2gp.LaplaceGP(net, x, y, loss or dnn2gp.losses.Gaussian(0.4), 0.8, **options)


def test_laplace_evidence_per_datum():
    gp = make_gp().train()
    mll = dnn2gp.mlls.LaplaceMarginalLogLikelihood(gp.likelihood, gp)
    value = mll(gp(*gp.train_inputs), gp.train_targets)
    assert_close(value, gp.log_evidence() / 18)
    value.backward()
    delta = gp.covar_module.raw_prior_precision
    assert_close(delta.grad, torch.autograd.grad(gp.log_evidence() / 18, delta)[0])
    assert gp.likelihood.raw_noise.grad.abs() > 0


def test_priors_count():
    gp = make_gp().train()
    mll = dnn2gp.mlls.LaplaceMarginalLogLikelihood(gp.likelihood, gp)
    without = mll(gp(*gp.train_inputs), gp.train_targets)
    prior = gpytorch.priors.GammaPrior(2.0, 3.0)
    gp.covar_module.register_prior("prior_precision_prior", prior, lambda m: m.prior_precision)
    with_prior = mll(gp(*gp.train_inputs), gp.train_targets)
    assert_close(with_prior - without, prior.log_prob(gp.prior_precision).sum() / 18, 1e-6)


@pytest.mark.parametrize("num_outputs", [1, 2])
def test_gpytorchs_own_evidence_is_the_gps(num_outputs):
    gp = make_gp(num_outputs=num_outputs).train()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)
    assert_close(mll(gp(*gp.train_inputs), gp.train_targets), gp.log_evidence("gp") / (9 * num_outputs))


def test_refusals():
    gp = make_gp().train()
    with pytest.raises(TypeError, match="NetworkGP"):
        dnn2gp.mlls.LaplaceMarginalLogLikelihood(gp.likelihood, gpytorch.models.ExactGP(None, None, gp.likelihood))
    with pytest.raises(ValueError, match=r"gp\.likelihood"):
        dnn2gp.mlls.LaplaceMarginalLogLikelihood(dnn2gp.GGNLikelihood(gp.loss), gp)
    mll = dnn2gp.mlls.LaplaceMarginalLogLikelihood(gp.likelihood, gp)
    with pytest.raises(ValueError, match=r"gp\.train_targets"):
        mll(gp(*gp.train_inputs), gp.train_targets + 1)


@pytest.mark.parametrize("kind", ["laplace", "gp"])
def test_fit_evidence_finds_a_maximum(kind):
    gp = make_gp(dnn2gp.losses.Gaussian(torch.tensor([0.4, 0.6], dtype=F64)), prior_variance=None)
    fit = dnn2gp.fit_evidence(gp, kind)
    assert fit.converged
    assert fit.evidence_after > fit.evidence_before
    assert_close(torch.tensor(fit.evidence_after, dtype=F64), gp.log_evidence(kind))
    delta = gp.prior_precision.detach().log().requires_grad_()
    noise = gp.noise.detach().log().requires_grad_()
    evidence = gp.log_evidence(kind, prior_precision=delta.exp(), noise=noise.exp())
    for gradient in torch.autograd.grad(evidence, (delta, noise)):
        assert gradient.abs().max() < 1e-2
    assert "nats" in repr(fit)


def test_priors_of_any_name_count_in_fits():
    gp = make_gp()
    prior = gpytorch.priors.GammaPrior(5000.0, 100.0)  # near 50
    gp.covar_module.register_prior("of_my_own", prior, lambda m: m.prior_precision)
    dnn2gp.fit_evidence(gp)
    assert 45 < float(gp.prior_precision.detach()) < 55


def test_the_gradient_with_priors_on_every_hyperparameter():
    prior = gpytorch.priors.GammaPrior(50.0, 10.0).double()
    residual = gpytorch.kernels.ScaleKernel(
        gpytorch.kernels.RBFKernel(lengthscale_prior=prior), outputscale_prior=prior
    )
    gp = make_gp(residual_kernel=residual.to(F64))
    gp.covar_module.register_prior("a", prior, lambda m: m.prior_precision)
    gp.likelihood.register_prior("b", prior, lambda m: m.noise)
    problem = dnn2gp.mlls._LogHyperparameters(gp, fit_noise=True)
    evidence = dnn2gp.mlls._evidence_of(gp, "laplace")
    _, _, gradient = problem.gradient(evidence, problem.start.clone())
    steps = 1e-5 * torch.eye(len(gradient), dtype=F64)
    differences = [
        problem.gradient(evidence, problem.start + h)[0] - problem.gradient(evidence, problem.start - h)[0]
        for h in steps
    ]
    assert_close(gradient, torch.tensor(differences, dtype=F64) / 2e-5, 1e-6)


def test_fit_evidence_interrupted_keeps_its_best(monkeypatch):
    gp = make_gp(groups=["0", "2"])
    before = float(gp.log_evidence().detach())
    original, calls = dnn2gp.LaplaceGP.log_evidence, []

    def interrupting(self, *args, **kwargs):
        calls.append(0)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(dnn2gp.LaplaceGP, "log_evidence", interrupting)
    with pytest.raises(KeyboardInterrupt):
        dnn2gp.fit_evidence(gp)
    monkeypatch.undo()
    assert float(gp.log_evidence().detach()) > before


def test_fit_evidence_refuses_what_it_cannot_fit():
    noise = torch.full((9, 2), 0.3, dtype=F64)
    with pytest.raises(ValueError, match="no learnable noise"):
        dnn2gp.fit_evidence(make_gp(dnn2gp.losses.Gaussian(noise)), fit_noise=True)
    with pytest.raises(MemoryError, match="structure='diagonal'"):
        dnn2gp.fit_evidence(make_gp(solver="iterative"))


FIT_WITH_BOTORCH = """
import botorch, torch, warnings
import gpytorch_dnn2gp as dnn2gp
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
x, y = torch.randn(9, 2, dtype=torch.double), torch.randn(9, 2, dtype=torch.double)
gp = dnn2gp.LaplaceGP(net, x, y, dnn2gp.losses.Gaussian(0.4), 0.8)
other = dnn2gp.LaplaceGP(net, x, y, dnn2gp.losses.Gaussian(0.4), 0.8)
expected = dnn2gp.fit_evidence(other).evidence_after
weights = gp.linearization.weights.clone()
mll = dnn2gp.mlls.LaplaceMarginalLogLikelihood(gp.likelihood, gp)
botorch.fit.fit_gpytorch_mll(mll)
assert abs(float(gp.log_evidence().detach()) - expected) < 1e-3, (gp.log_evidence(), expected)
assert torch.equal(gp.linearization.weights, weights)
"""


def test_botorch_fits_it():
    subprocess.run([sys.executable, "-c", FIT_WITH_BOTORCH], check=True, timeout=300)
