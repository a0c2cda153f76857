"""Every row of the table "What is refused" in docs/gotchas.md: the error and its message, before any long work."""

import copy
import re
import warnings
from pathlib import Path

import gpytorch
import numpy as np
import pytest
import torch
from botorch.exceptions.warnings import InputDataWarning
from problems import F64, TokenNet, log_cosh, mlp, problem, randomized
from safetensors.torch import save_file
from test_serialization import rewritten
from torch import nn

import gpytorch_dnn2gp as dnn2gp
from gpytorch_dnn2gp import bayesopt, optim
from gpytorch_dnn2gp import weights as weight_module
from gpytorch_dnn2gp.bayesopt import Choice, Float, Int
from gpytorch_dnn2gp.jacobians import NetFunction
from gpytorch_dnn2gp.losses import Bernoulli, Categorical, Gaussian, Poisson, from_callable
from gpytorch_dnn2gp.tiling import memory_limit

GOTCHAS = Path(__file__).parent.parent / "docs" / "gotchas.md"
CASES = {}  # what is given -> how


def case(given: str):
    def register(fn):
        assert given not in CASES
        CASES[given] = fn
        return fn

    return register


# ---- what is varied: six examples of two numbers; one output, or three


def regression(net=None, x=None, y=None, sigma=0.3, **options) -> dnn2gp.LaplaceGP:
    p = problem("gaussian")
    loss = options.pop("loss", None) or Gaussian(sigma)
    x, y = p.x if x is None else x, p.y if y is None else y
    return dnn2gp.LaplaceGP(p.net if net is None else net, x, y, loss, **options)


def classes(y=None, net=None, x=None) -> dnn2gp.LaplaceGP:
    p = problem("categorical")
    net, x = p.net if net is None else net, p.x if x is None else x
    return dnn2gp.LaplaceGP(net, x, p.y if y is None else y, Categorical())


def tokens(x, **options) -> dnn2gp.LaplaceGP:
    p = problem("categorical_tokens")
    return dnn2gp.LaplaceGP(p.net, x, p.y, Categorical(), **options)


def with_entry(tensor: torch.Tensor, index, value) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


class Flawed(nn.Module):
    """A usable net, with a flaw put on its output."""

    def __init__(self, flaw) -> None:
        super().__init__()
        self.body, self.flaw = randomized(mlp(), 0), flaw

    def forward(self, x):
        return self.flaw(self.body(x))


# ---- data

X, Y = problem("gaussian").x, problem("gaussian").y


@case("NaN or infinity in the inputs")
def _(tmp):
    regression(x=with_entry(X, (3, 1), torch.nan))


@case("infinity in new inputs")
def _(tmp):
    regression().predict(with_entry(X, (4, 0), -torch.inf))


@case("NaN in new inputs, asked for f")
def _(tmp):
    regression()(with_entry(X[None].repeat(2, 1, 1), (1, 4, 0), torch.nan))


@case("NaN or infinity in the labels")
def _(tmp):
    regression(y=with_entry(Y, (2, 0), torch.nan))


@case("NaN in labels of a loss of one's own")
def _(tmp):
    regression(y=with_entry(Y, (5, 0), torch.inf), loss=from_callable(log_cosh))


@case("a class number outside 0..K-1")
def _(tmp):
    classes(torch.tensor([0, 1, 2, 0, 3, 1]))


@case("a class number that means ignore")
def _(tmp):
    classes(torch.tensor([0, -100, 2, 0, 1, 1]))


@case("float labels where classes are meant")
def _(tmp):
    classes(torch.tensor([0.0, 1, 2, 0, 1, 1], dtype=F64))


@case("soft labels that do not sum to one")
def _(tmp):
    classes(with_entry(torch.full((6, 3), 1 / 3, dtype=F64), (1, 0), 0.5))


@case("a label other than 0 and 1 for Bernoulli")
def _(tmp):
    regression(y=with_entry(torch.zeros(6, 1, dtype=F64), (3, 0), -1.0), loss=Bernoulli())


@case("a fraction where counts are meant")
def _(tmp):
    regression(y=with_entry(torch.ones(6, 1, dtype=F64), (3, 0), 1.5), loss=Poisson())


@case("another number of labels than of inputs")
def _(tmp):
    regression(y=Y[:5])


@case("labels of one column for a net of several outputs")
def _(tmp):
    regression(net=randomized(mlp(num_outputs=2), 0), y=Y[:, 0])


@case("new labels that do not fit the new inputs")
def _(tmp):
    regression().condition_on(X[:3], Y[:2])


@case("inputs of another width than the net's")
def _(tmp):
    regression(x=X[:, :1])


@case("images that do not fit `input_shape`")
def _(tmp):
    p = problem("categorical_images")
    dnn2gp.LaplaceGP(p.net, p.x[:, :35], p.y, Categorical(), input_shape=(1, 6, 6))


@case("no examples")
def _(tmp):
    regression(x=X[:0], y=Y[:0])


@case("arrays or lists instead of tensors")
def _(tmp):
    regression(x=X.numpy())


@case("labels that are no tensor")
def _(tmp):
    regression(y=np.zeros((6, 1)))


@case("a loss of torch's")
def _(tmp):
    dnn2gp.LaplaceGP(mlp().double(), X, Y, nn.MSELoss())


# ---- nets


@case("NaN or infinity in the weights")
def _(tmp):
    net = mlp().double()
    with torch.no_grad():
        net[0].weight[2, 1] = torch.inf
    regression(net=net)


@case("NaN in a buffer")
def _(tmp):
    net = nn.Sequential(mlp(), nn.BatchNorm1d(1)).double()
    net[1].running_var[0] = torch.nan
    regression(net=net)


@case("a net whose output is infinite")
def _(tmp):
    regression(net=Flawed(lambda f: f / (f - f)))


@case("a net whose output is infinite somewhere")
def _(tmp):
    regression(net=nn.Sequential(nn.Linear(2, 1), InfiniteAt(X[3])).double())


class InfiniteAt(nn.Module):
    def __init__(self, x) -> None:
        super().__init__()
        self.x = x
        self.register_forward_pre_hook(lambda *_: None)

    def forward(self, f):
        where = torch.arange(len(f))[:, None] == 3
        return torch.where(where & (len(f) == 6), torch.inf, f)


@case("BatchNorm without running statistics")
def _(tmp):
    regression(net=nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1, track_running_stats=False)).double())


@case("outputs that depend on the other examples")
def _(tmp):
    regression(net=Flawed(lambda f: f - f.mean(0)))


@case("the same, with one training example")
def _(tmp):
    regression(net=Flawed(lambda f: f - f.mean(0)), x=X[:1], y=Y[:1])


@case("outputs that are random in eval mode")
def _(tmp):
    regression(net=Flawed(lambda f: nn.functional.dropout(f + 5, 0.5) + torch.randn_like(f)))


@case("several outputs in a tuple")
def _(tmp):
    regression(net=Flawed(lambda f: (f, f)))


@case("outputs with more than two dimensions")
def _(tmp):
    regression(net=Flawed(lambda f: f[:, None]))


@case("a function instead of a module")
def _(tmp):
    regression(net=torch.sin)


@case("a net that is frozen as a whole")
def _(tmp):
    regression(net=mlp().double().requires_grad_(False))


@case("an empty selection of parameters")
def _(tmp):
    regression(params=[])


@case("parameters that do not exist")
def _(tmp):
    regression(params=["head"])


@case("a last layer that is not the last to run")
def _(tmp):
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(4, 1), nn.Linear(2, 4)

        def forward(self, x):
            return self.last(torch.tanh(self.first(x)))

    regression(net=Swapped().double(), params="last_layer")


# ---- types and devices


@case("integer inputs without `input_dtype`")
def _(tmp):
    tokens(torch.zeros(6, 4, dtype=torch.long))


@case("a token id out of range")
def _(tmp):
    tokens(with_entry(torch.zeros(6, 4, dtype=torch.long), (2, 3), 7), input_dtype=torch.long)


@case("a token id that is no whole number")
def _(tmp):
    gp = tokens(problem("categorical_tokens").x, input_dtype=torch.long)
    gp.predict(with_entry(torch.zeros(6, 4, dtype=F64), (1, 2), 0.5))


@case("a gradient in token ids")
def _(tmp):
    tokens(problem("categorical_tokens").x, input_dtype=torch.long)(torch.zeros(2, 4, dtype=F64, requires_grad=True))


@case("a net in half precision")
def _(tmp):
    regression(net=mlp().half(), x=X.half(), y=Y.half())


@case("a GP turned to half precision")
def _(tmp):
    regression().bfloat16()


@case("inputs in half precision")
def _(tmp):
    regression(x=X.half())


@case("inputs of another dtype than the net's")
def _(tmp):
    regression().predict(X.float())


@case("labels of another dtype than the net's")
def _(tmp):
    regression(y=Y.float())


@case("a net of several dtypes")
def _(tmp):
    regression(net=nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1).double()))


@case("inputs on another device than the net's")
def _(tmp):
    regression(x=X.to("meta"))


@case("labels on another device than the net's")
def _(tmp):
    regression(y=Y.to("meta"))


@case("a net on several devices")
def _(tmp):
    regression(net=nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1, device="meta")).double())


@case("a net without values")
def _(tmp):
    with torch.device("meta"):
        net = mlp().double()
    regression(net=net)


# ---- hyperparameters


@case("sigma that is not positive")
def _(tmp):
    regression(sigma=0.0)


@case("one sigma of several that is not positive")
def _(tmp):
    regression(sigma=torch.tensor([0.3, -0.1]))


@case("sigma in another shape than outputs or examples")
def _(tmp):
    regression(sigma=torch.tensor([0.3, 0.1]))


@case("noise set to what is not positive")
def _(tmp):
    regression().noise = -0.5


@case("noise set for a loss that has none")
def _(tmp):
    classes().noise = 0.5


@case("a prior precision that is not positive")
def _(tmp):
    regression(prior_precision=0.0)


@case("one prior precision of several that is not finite")
def _(tmp):
    regression(prior_precision=[1.0, 1.0, torch.nan, 1.0])


@case("a prior precision set to what is not positive")
def _(tmp):
    regression().prior_precision = -1.0


@case("another number of prior precisions than of groups")
def _(tmp):
    regression(prior_precision=[1.0, 2.0, 3.0], groups=["0", "2"])


@case("groups that leave parameters out")
def _(tmp):
    regression(groups=["0"])


@case("a temperature that is not positive")
def _(tmp):
    regression(temperature=0.0)


@case("no weight decay")
def _(tmp):
    dnn2gp.LaplaceGP.from_training(mlp().double(), (X, Y), nn.MSELoss(), weight_decay=0.0, sigma=1.0)


# ---- memory


def large(**options) -> dnn2gp.LaplaceGP:
    """A thousand weights, 200 examples."""
    net = randomized(mlp(width=250), 0)
    return dnn2gp.LaplaceGP(net, torch.randn(200, 2, dtype=F64), torch.randn(200, 1, dtype=F64), Gaussian(), **options)


@case("P too large for the weight-space solver")
def _(tmp):
    gp = large(solver="weight_space")
    with memory_limit(10_000_000), no_jacobians():
        gp.log_evidence()


@case("n K too large for the function-space solver")
def _(tmp):
    gp = large(solver="function_space")
    with memory_limit(2_000_000), no_jacobians():
        gp.predict(X)


@case("evidence where neither side fits")
def _(tmp):
    gp = large()
    with memory_limit(500_000), no_jacobians():
        gp.log_evidence()


@case("a joint posterior over too many points")
def _(tmp):
    gp = large(params="last_layer")
    gp.posterior()
    with memory_limit(20_000_000), no_jacobians():
        gp(torch.zeros(1000, 2, dtype=F64))


@case("predictions of too many outputs")
def _(tmp):
    net = randomized(mlp(num_outputs=100), 0)
    gp = dnn2gp.LaplaceGP(net, X, torch.zeros(6, dtype=torch.long), Categorical(), structure="diagonal")
    with memory_limit(10_000_000), no_jacobians():
        gp.predict(torch.zeros(100, 2, dtype=F64))


@case("the covariance of too many weights")
def _(tmp):
    posterior = large(structure="diagonal").weight_posterior()
    with memory_limit(10_000_000):
        posterior.covariance()


@case("a Jacobian that does not fit")
def _(tmp):
    lin = dnn2gp.Linearization(randomized(mlp(width=250), 0))
    with memory_limit(10_000_000), no_jacobians():
        lin.jacobian(torch.zeros(1000, 2, dtype=F64))


def small_lin():
    return dnn2gp.Linearization(randomized(mlp(), 0))


@case("a Gram matrix that does not fit")
def _(tmp):
    with memory_limit(10_000), no_jacobians():
        small_lin().gram(torch.ones(100, 2, dtype=F64))


@case("rows C of another number of examples for a Gram")
def _(tmp):
    small_lin().gram(torch.ones(4, 2, dtype=F64), cotangents1=torch.ones(3, 1, 1, dtype=F64))


@case("rows C for x2 without an x2")
def _(tmp):
    small_lin().gram(torch.ones(4, 2, dtype=F64), cotangents2=torch.ones(4, 1, 1, dtype=F64))


@case("a prior variance of another number of weights for a Gram")
def _(tmp):
    small_lin().gram(torch.ones(4, 2, dtype=F64), prior_variance=torch.ones(3, dtype=F64))


@case("a prior variance below zero for a Gram")
def _(tmp):
    small_lin().gram(torch.ones(4, 2, dtype=F64), prior_variance=with_entry(torch.ones(17, dtype=F64), 3, -1.0))


@case("a prior variance of another dtype for a Gram")
def _(tmp):
    small_lin().gram(torch.ones(4, 2, dtype=F64), prior_variance=torch.ones(17))


@case("a number as prior variance for a Gram")
def _(tmp):
    small_lin().gram(torch.ones(4, 2, dtype=F64), prior_variance=2.0)


@case("a batch of Grams that does not fit")
def _(tmp):
    with memory_limit(10_000), no_jacobians():
        small_lin().gram(torch.ones(10, 20, 2, dtype=F64))


@case("a file for a Gram that is not `.npy`")
def _(tmp):
    small_lin().gram(torch.ones(4, 2, dtype=F64), file=tmp / "k.pt")


@case("a file for a Gram that exists")
def _(tmp):
    (tmp / "k.npy").touch()
    small_lin().gram(torch.ones(4, 2, dtype=F64), file=tmp / "k.npy")


@case("an interrupted file of a Gram of other inputs")
def _(tmp):
    (tmp / "k.npy.partial").touch()
    (tmp / "k.npy.journal").write_text('{"key": "other", "shape": [4, 4], "dtype": "float64", "free_memory": 1}\n')
    small_lin().gram(torch.ones(4, 2, dtype=F64), file=tmp / "k.npy")


@case("a file for a batch of Grams")
def _(tmp):
    small_lin().gram(torch.ones(3, 4, 2, dtype=F64), file=tmp / "k.npy")


@case("a layer rule for what is no module")
def _(tmp):
    dnn2gp.gram.register(torch.relu)


class no_jacobians:  # noqa: N801
    """Refused before the work: no Jacobian is formed."""

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(NetFunction, "jacobian_rows", lambda *_: pytest.fail("a Jacobian was formed"))

    def __exit__(self, *_):
        self.patch.undo()


# ---- noise at new inputs


def noisy_examples() -> dnn2gp.LaplaceGP:
    return problem("gaussian_per_example").gp()


@case("noise given for the training examples, asked for at new ones")
def _(tmp):
    noisy_examples().predict(X[:3])


@case("the same at as many new ones")
def _(tmp):
    noisy_examples().predict(X + 1)


@case("noise of another number of examples")
def _(tmp):
    noisy_examples().predict(X[:3], noise=torch.ones(6, 2, dtype=F64))


@case("noise of another number of outputs")
def _(tmp):
    noisy_examples().predict(X[:3], noise=torch.ones(3, dtype=F64))


@case("negative noise at new inputs")
def _(tmp):
    noisy_examples().predict(X[:3], noise=with_entry(torch.ones(3, 2, dtype=F64), (2, 1), -1.0))


@case("noise at new inputs for a loss that has none")
def _(tmp):
    classes().predict(X[:3], noise=torch.ones(3, 3, dtype=F64))


@case("the likelihood at as many new inputs as training examples")
def _(tmp):
    gp = noisy_examples()
    gp.likelihood(gp(X + 1), X + 1)


@case("covariances of another shape for the likelihood")
def _(tmp):
    gp = problem("gaussian_per_output").gp()
    gp.likelihood(gp(X[:3]), X[:3], noise=torch.ones(3, 2, dtype=F64))


@case("the likelihood's noise of a softmax")
def _(tmp):
    gp = classes()
    gp.likelihood(gp(X[:3]), X[:3])


# ---- averages of predictions


@case("nothing to average")
def _(tmp):
    dnn2gp.average([])


@case("one prediction to average, not in a list")
def _(tmp):
    dnn2gp.average(regression().predict(X))


@case("predictions at other inputs to average")
def _(tmp):
    gp = regression()
    dnn2gp.average([gp.predict(X), gp.predict(X[:5])])


@case("a joint prediction among those to average")
def _(tmp):
    gp = regression()
    dnn2gp.average([gp.predict(X), gp.predict(X, joint=True)])


@case("predictions of losses that differ to average")
def _(tmp):
    gp = classes()
    x, net = gp.train_inputs[0], problem("categorical").net
    binary = dnn2gp.LaplaceGP(net, x, torch.zeros(6, 3, dtype=F64), Bernoulli())
    dnn2gp.average([gp.predict(x), binary.predict(x)])


@case("weights of an average that sum to more than one")
def _(tmp):
    p = regression().predict(X)
    dnn2gp.average([p, p], [0.5, 0.75])


# ---- evidence


@case("the GP evidence of a softmax")
def _(tmp):
    classes().log_evidence(kind="gp")


@case("GPyTorch's exact evidence of a softmax")
def _(tmp):
    gp = classes().train()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)
    mll(gp(*gp.train_inputs), gp.train_targets)


@case("labels that are all equal, with a noise to fit")
def _(tmp):
    dnn2gp.fit_evidence(regression(y=torch.full_like(Y, 2.0)))


@case("one example, with a noise to fit")
def _(tmp):
    dnn2gp.fit_evidence(regression(x=X[:1], y=Y[:1]))


@case("a net far from a stationary point")
def _(tmp):
    dnn2gp.fit_evidence(regression(net=randomized(mlp(), 0, scale=2.0), sigma=0.05))


@case("leave-one-out for the diagonal structure")
def _(tmp):
    regression(structure="diagonal").leave_one_out()


@case("nets of several shapes to train together")
def _(tmp):
    dnn2gp.training.fit_many([mlp().double(), mlp(width=5).double()], X, Y, Gaussian(0.3))


def comparison(candidates=None, y=Y, **options):
    candidates = {"a": randomized(mlp(), 0)} if candidates is None else candidates
    options = {"tune": None, "train_options": {"max_iterations": 2}, "progress": False, **options}
    return dnn2gp.selection.compare(candidates, X, y, Gaussian(0.3), **options)


@case("a comparison resumed with other candidates")
def _(tmp):
    comparison(file=tmp / "table.csv")
    comparison({"b": randomized(mlp(), 0)}, file=tmp / "table.csv")


@case("a comparison resumed with another candidate of the same name")
def _(tmp):
    comparison(file=tmp / "table.csv")
    comparison({"a": randomized(mlp(), 1)}, file=tmp / "table.csv")


@case("a comparison resumed with other data or options")
def _(tmp):
    comparison(file=tmp / "table.csv")
    comparison(y=Y + 1, file=tmp / "table.csv")


@case("a comparison of constant labels that fits the noise")
def _(tmp):
    comparison(y=torch.ones_like(Y), tune="after")


@case("a comparison of nets that do not take the data")
def _(tmp):
    comparison({"a": mlp(3).double()})


# ---- training by optim, and Gaussians over weights


def vogn(net=None, **options) -> optim.VOGN:
    return optim.VOGN(problem("gaussian").net if net is None else net, Gaussian(0.3), **{"train_size": 6, **options})


@case("a batch larger than train_size")
def _(tmp):
    vogn(train_size=5).step(X, Y)


@case("beta out of range")
def _(tmp):
    vogn(beta=1.5)


@case("beta set to zero in the midst of training")
def _(tmp):
    opt = vogn()
    opt.param_groups[0]["beta"] = 0.0
    opt.step(X, Y)


@case("lr out of range")
def _(tmp):
    vogn(lr=-0.1)


@case("momentum out of range")
def _(tmp):
    vogn(momentum=1.0)


@case("a negative initial_precision")
def _(tmp):
    vogn(initial_precision=-1.0)


@case("a train_size that is no number of examples")
def _(tmp):
    vogn(train_size=0)


@case("mc_samples for an optimizer that draws none")
def _(tmp):
    optim.OGN(problem("gaussian").net, Gaussian(0.3), train_size=6, mc_samples=2)


@case("parameters instead of the net")
def _(tmp):
    vogn(net=problem("gaussian").net.parameters())


@case("an optimizer with a loss of torch's")
def _(tmp):
    optim.VOGN(mlp(), nn.MSELoss(), train_size=6)


@case("NaN in a step's derivatives")
def _(tmp):
    class Broken(Gaussian):
        def residual(self, f, y):
            return super().residual(f, y) * torch.nan

    optim.VOGN(problem("gaussian").net, Broken(0.3), train_size=6).step(X, Y)


@case("an empty batch")
def _(tmp):
    vogn().step(X[:0], Y[:0])


@case("parameters that get no gradient")
def _(tmp):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(2, 1).double(), nn.Linear(2, 1).double()

        def forward(self, x):
            return self.used(x)

    vogn(net=Half()).step(X, Y)


@case("a net that normalises by the batch, to be trained by optim")
def _(tmp):
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 1)).double()
    vogn(net=net).step(X, Y)


@case("a full covariance of too many weights")
def _(tmp):
    with memory_limit(10_000_000):
        optim.VOGGN(mlp(width=250), Gaussian(0.3), train_size=6)


@case("different learning rates for a full covariance")
def _(tmp):
    opt = optim.OGGN(problem("gaussian").net, Gaussian(0.3), train_size=6, prior_precision=[1, 2], groups=["0", "2"])
    opt.param_groups[0]["lr"] = 0.5
    opt.step(X, Y)


@case("the iterate of groups with different learning rates")
def _(tmp):
    opt = vogn(prior_precision=[1, 2], groups=["0", "2"])
    opt.param_groups[0]["lr"] = 0.5
    opt.iterate()


@case("a parameter group that is added later")
def _(tmp):
    vogn().add_param_group({"params": [nn.Parameter(torch.zeros(3))]})


@case("an optimizer's `state_dict` of another net")
def _(tmp):
    vogn().load_state_dict(vogn(net=mlp(width=5).double()).state_dict())


@case("a `state_dict` of Adam")
def _(tmp):
    opt = vogn()
    opt.load_state_dict(torch.optim.Adam(opt.net.parameters()).state_dict())


@case("a step while a posterior sample is in the net")
def _(tmp):
    opt = vogn()
    with opt.posterior_sample():
        opt.step(X, Y)


@case("train over another number of examples than train_size")
def _(tmp):
    dnn2gp.training.train(vogn(train_size=7), X, Y, epochs=1)


@case("train with fewer labels than examples")
def _(tmp):
    dnn2gp.training.train(vogn(), X, Y[:5], epochs=1)


def gaussian_gp(weights=None, **options) -> dnn2gp.VariationalGP:
    p = problem("gaussian")
    weights = vogn().gaussian() if weights is None else weights
    return dnn2gp.VariationalGP(p.net, weights, X, Y, Gaussian(0.3), **options)


@case("an iterate of another net")
def _(tmp):
    gaussian_gp(vogn(net=randomized(mlp(width=5), 0)).iterate())


@case("an iterate's GP of a batch larger than train_size")
def _(tmp):
    gaussian_gp(vogn(train_size=5).iterate())


@case("weights that are no Gaussian")
def _(tmp):
    gaussian_gp(torch.zeros(17, dtype=F64))


@case("a Gaussian in another dtype than the net's")
def _(tmp):
    q = vogn().gaussian()
    gaussian_gp(weight_module.gaussian(q.mean.float(), variance=q.variance.float()))


@case("a prior for an iterate, which has its own")
def _(tmp):
    gaussian_gp(vogn().iterate(), prior_precision=1.0)


@case("an iterate's GP of no samples")
def _(tmp):
    gaussian_gp(vogn().iterate(), num_samples=0)


@case("an iterate's GP at the mean, and at new samples")
def _(tmp):
    gaussian_gp(vogn().iterate(), num_samples=5, at="mean")


@case("converged for a Gaussian that was given")
def _(tmp):
    gaussian_gp(converged=True)


@case("evidence of a Gaussian whose prior is not known")
def _(tmp):
    gaussian_gp().log_evidence()


@case("GP evidence of a Gaussian that was given")
def _(tmp):
    gaussian_gp(prior_precision=1.0).log_evidence(kind="gp")


@case("a full covariance in function space")
def _(tmp):
    opt = optim.VOGGN(problem("gaussian").net, Gaussian(0.3), train_size=6)
    gaussian_gp(opt.iterate(), solver="function_space")


@case("a covariance that is not positive definite")
def _(tmp):
    weight_module.gaussian(torch.zeros(2), covariance=-torch.eye(2))


@case("a Gaussian with both a variance and a precision")
def _(tmp):
    weight_module.gaussian(torch.zeros(2), variance=torch.ones(2), precision=torch.ones(2))


@case("SWAG of one set of weights")
def _(tmp):
    swag = weight_module.SWAG(mlp())
    swag.collect()
    swag.gaussian()


@case("another optimizer for `from_ivon`")
def _(tmp):
    weight_module.from_ivon(torch.optim.Adam(mlp().parameters()), mlp())


@case("a Kronecker posterior for `from_laplace`")
def _(tmp):
    class KronLaplace:  # laplace-torch's: neither a vector nor a matrix
        mean, posterior_precision = torch.zeros(17), object()

    weight_module.from_laplace(KronLaplace())


@case("draws of weights with a variance of one")
def _(tmp):
    dnn2gp.sampling_predictive(regression(), X, num_samples=1)


# ---- files


def a_file(tmp: Path) -> Path:
    dnn2gp.save(regression(), tmp / "gp")
    return tmp / "gp"


@case("no file")
def _(tmp):
    dnn2gp.load(tmp / "gp", mlp())


@case("a truncated file")
def _(tmp):
    path = a_file(tmp)
    path.write_bytes(path.read_bytes()[:-1])
    dnn2gp.load(path, mlp())


@case("a file of another kind")
def _(tmp):
    torch.save(mlp().state_dict(), tmp / "gp")
    dnn2gp.load(tmp / "gp", mlp())


@case("a safetensors file of something else")
def _(tmp):
    save_file(mlp().state_dict(), tmp / "gp")
    dnn2gp.load(tmp / "gp", mlp())


@case("a file of a newer version")
def _(tmp):
    path = a_file(tmp)
    rewritten(path, lambda config: config.update(format=99, version="7.0"))
    dnn2gp.load(path, mlp())


@case("a net with other parameters than the file's")
def _(tmp):
    dnn2gp.load(a_file(tmp), TokenNet())


@case("a net with the file's parameters that computes something else")
def _(tmp):
    dnn2gp.load(a_file(tmp), nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)))


@case("a file whose loss was the user's own, without it")
def _(tmp):
    p = problem("own_loss")
    dnn2gp.save(p.gp(), tmp / "gp")
    dnn2gp.load(tmp / "gp", p.net)


@case("a `state_dict` of a GP with other data")
def _(tmp):
    regression().load_state_dict(regression(x=X + 0.1).state_dict())


# ---- infinite width


def wide_kernel(*layers, shape=None, x=None, **options):
    net = nn.Sequential(*layers).double()
    kernel = dnn2gp.infinite.NNGPKernel(net, input_shape=shape, **options)
    return kernel(X if x is None else x).to_dense()


@case("attention, at infinite width")
def _(tmp):
    wide_kernel(nn.Linear(2, 4), nn.TransformerEncoderLayer(4, 1), nn.Linear(4, 1))


@case("a layer without a rule")
def _(tmp):
    net = nn.Sequential()
    net.add_module("body", nn.Sequential(nn.Conv2d(2, 4, 3), nn.MaxPool2d(2)))
    dnn2gp.infinite.NNGPKernel(net)


@case("a function without a rule")
def _(tmp):
    class Sums(nn.Module):
        def forward(self, x):
            return torch.cumsum(x, -1)

    wide_kernel(nn.Linear(2, 4), Sums(), nn.Linear(4, 1))


@case("a net that ends in an activation")
def _(tmp):
    wide_kernel(nn.Linear(2, 4), nn.ReLU())


@case("a net whose output has positions")
def _(tmp):
    wide_kernel(nn.Conv2d(2, 4, 3, padding=1), shape=(2, 4, 4), x=torch.ones(1, 32, dtype=F64))


@case("an activation of an activation")
def _(tmp):
    wide_kernel(nn.Linear(2, 4), nn.ReLU(), nn.Tanh(), nn.Linear(4, 1))


@case("a layer that is used twice")
def _(tmp):
    layer = nn.Linear(2, 2)
    wide_kernel(layer, nn.ReLU(), layer)


@case("a sum of branches that depend on each other")
def _(tmp):
    class Both(nn.Module):
        def forward(self, x):
            return x + torch.relu(x)

    wide_kernel(nn.Linear(2, 4), Both(), nn.Linear(4, 1))


@case("a net of images without `input_shape`")
def _(tmp):
    wide_kernel(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 1), x=torch.ones(1, 32, dtype=F64))


@case("inputs of another width for a kernel")
def _(tmp):
    wide_kernel(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1), x=torch.ones(1, 3, dtype=F64))


@case("inputs of another dtype for a kernel")
def _(tmp):
    wide_kernel(nn.Linear(2, 1), x=X.float())


@case("a negative bias variance")
def _(tmp):
    dnn2gp.infinite.fully_connected(2, "relu", 1.0, -0.1)


@case("a weight variance of zero")
def _(tmp):
    dnn2gp.infinite.fully_connected(2, "relu", 0.0)


@case("variances for another number of layers")
def _(tmp):
    dnn2gp.infinite.fully_connected(2, "relu", [1.0, 2.0])


@case("an activation by an unknown name")
def _(tmp):
    dnn2gp.infinite.fully_connected(2, "rely")


@case("an activation that is not pointwise")
def _(tmp):
    def softmax(x):
        return torch.softmax(x, -1).sum(-1)

    dnn2gp.infinite.fully_connected(2, softmax)


@case("a depth of zero")
def _(tmp):
    dnn2gp.infinite.fully_connected(0)


@case("NaN in inputs of a kernel")
def _(tmp):
    wide_kernel(nn.Linear(2, 1), x=with_entry(X, (3, 1), torch.nan))


@case("variances that grow beyond the dtype")
def _(tmp):
    dnn2gp.infinite.fully_connected(60, "relu", 1e3)(X.float()).to_dense()


@case("a normalisation of other axes, at infinite width")
def _(tmp):
    wide_kernel(nn.Conv2d(2, 4, 1), nn.LayerNorm([3, 3]), shape=(2, 3, 3), x=torch.ones(1, 18, dtype=F64))


@case("a layer whose weight is made of others")
def _(tmp):
    wide_kernel(nn.utils.parametrizations.weight_norm(nn.Linear(2, 4)), nn.ReLU(), nn.Linear(4, 1))


@case("dropout of inputs, with masks drawn")
def _(tmp):
    wide_kernel(nn.Dropout(0.2), nn.Linear(2, 1), dropout=True)


@case("a product rule with a step and a tolerance")
def _(tmp):
    dnn2gp.infinite.integrals.ProductRule(torch.tanh, tolerance=1e-6, step=0.1)


# ---- sequences

PADDED = torch.arange(12, dtype=F64).view(2, 3, 2)


@case("an empty sequence")
def _(tmp):
    dnn2gp.infinite.pack([PADDED[0], PADDED[1, :0]])


@case("a length beyond the tokens")
def _(tmp):
    dnn2gp.infinite.pack(PADDED, torch.tensor([3, 4]))


@case("lengths for another number of sequences")
def _(tmp):
    dnn2gp.infinite.pack(PADDED, torch.tensor([3, 2, 1]))


@case("a length that is no integer")
def _(tmp):
    dnn2gp.infinite.unpack(with_entry(dnn2gp.infinite.pack(PADDED), (0, -1), 1.5), 2)


@case("NaN in a token")
def _(tmp):
    dnn2gp.infinite.pack(with_entry(PADDED, (1, 0, 1), torch.nan))


@case("sequences with tokens of several sizes")
def _(tmp):
    dnn2gp.infinite.pack([PADDED[0], torch.ones(2, 3, dtype=F64)])


@case("token numbers instead of embeddings")
def _(tmp):
    dnn2gp.infinite.pack(PADDED.long())


@case("rows that hold no sequence")
def _(tmp):
    dnn2gp.infinite.unpack(dnn2gp.infinite.pack(PADDED), 4)


@case("too little room for the longest sequence")
def _(tmp):
    dnn2gp.infinite.pack(PADDED, max_length=2)


@case("tokens of no numbers")
def _(tmp):
    dnn2gp.infinite.pack(PADDED[..., :0])


@case("a length that half precision cannot hold")
def _(tmp):
    dnn2gp.infinite.pack(torch.zeros(1, 4097, 1, dtype=torch.float16))


# ---- recurrent nets


def rnn(kind=nn.RNN, x=None, structure=None, **options):
    kernel = dnn2gp.infinite.recurrent(kind(2, 4, **(structure or {})), **options).double()
    kernel(dnn2gp.infinite.pack(PADDED) if x is None else x).to_dense()


@case("a recurrent layer within a net")
def _(tmp):
    dnn2gp.infinite.NNGPKernel(nn.Sequential(nn.RNN(2, 4)))


@case("a module that is not recurrent")
def _(tmp):
    dnn2gp.infinite.recurrent(nn.Linear(2, 4))


@case("a recurrent module with a forward of its own")
def _(tmp):
    class Skips(nn.GRU):
        def forward(self, x):
            return x + super().forward(x)[0]

    dnn2gp.infinite.recurrent(Skips(2, 4))


@case("an option that a kernel at infinite width does not have")
def _(tmp):
    dnn2gp.infinite.simple_rnn(2, redout="mean")


@case("dropout between recurrent layers")
def _(tmp):
    rnn(structure={"num_layers": 2, "dropout": 0.1})


@case("several recurrent layers in both directions")
def _(tmp):
    rnn(structure={"num_layers": 2, "bidirectional": True})


@case("an LSTM with projections")
def _(tmp):
    rnn(nn.LSTM, structure={"proj_size": 2})


@case("an NTK of gated units")
def _(tmp):
    rnn(nn.GRU, kernel="ntk")


@case("an NTK of a recurrent module with frozen weights")
def _(tmp):
    module = nn.RNN(2, 4)
    module.weight_hh_l0.requires_grad_(False)
    dnn2gp.infinite.recurrent(module, kernel="ntk")


@case("the standard NTK of a recurrent net")
def _(tmp):
    rnn(kernel="ntk", parameterization="standard")


@case("a readout of a recurrent net that there is not")
def _(tmp):
    rnn(readout="first")


@case("a recurrent variance of zero")
def _(tmp):
    rnn(recurrent_variance=0.0)


@case("a negative variance of recurrent biases")
def _(tmp):
    rnn(bias_variance=-0.1)


@case("variances for another number of gates")
def _(tmp):
    rnn(nn.GRU, input_variance=[1.0, 2.0])


@case("a mean of biases for another number of gates")
def _(tmp):
    rnn(nn.LSTM, bias_mean=(0.0, 1.0))


@case("a mean of biases of nn.RNN")
def _(tmp):
    rnn(bias_mean=1.0)


@case("an odd number of paths")
def _(tmp):
    rnn(nn.GRU, paths=5)


@case("a reset gate at another place")
def _(tmp):
    dnn2gp.infinite.gru(2, reset="within")


@case("a prior of a hyperparameter that there is not")
def _(tmp):
    rnn(priors={"lengthscale": gpytorch.priors.GammaPrior(1.0, 1.0)})


@case("tokens of another size for a recurrent net")
def _(tmp):
    dnn2gp.infinite.simple_rnn(4).double()(dnn2gp.infinite.pack(PADDED)).to_dense()


@case("a length beyond the tokens, for a recurrent net")
def _(tmp):
    rnn(x=with_entry(dnn2gp.infinite.pack(PADDED), (1, -1), 4.0))


@case("a sequence too long for paths")
def _(tmp):
    rnn(nn.LSTM, x=dnn2gp.infinite.pack(torch.ones(1, 4000, 2, dtype=F64)))


@case("gradients of a long sequence along paths")
def _(tmp):
    with memory_limit(100_000_000):
        rnn(nn.LSTM, x=dnn2gp.infinite.pack(torch.ones(1, 200, 2, dtype=F64)))


@case("Monte Carlo with the kernel of another recurrent net")
def _(tmp):
    kernel = dnn2gp.infinite.recurrent(nn.LSTM(2, 4)).double()
    dnn2gp.infinite.monte_carlo(nn.GRU(2, 4), dnn2gp.infinite.pack(PADDED), kernel=kernel)


# ---- batch normalisation at infinite width

BATCHES = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i), dtype=F64) for i in range(2)]


@case("new points for a batch-norm kernel")
def _(tmp):
    dnn2gp.infinite.batchnorm_mlp(1, BATCHES)(torch.cat([BATCHES[0], BATCHES[1][:1]]), diag=True)


@case("part of a batch for a batch-norm kernel")
def _(tmp):
    dnn2gp.infinite.batchnorm_mlp(1, BATCHES)(BATCHES[0][:3], diag=True)


@case("a batch of one, normalised")
def _(tmp):
    dnn2gp.infinite.batchnorm_mlp(1, BATCHES[0][:1])


@case("a batch of three, its NTK")
def _(tmp):
    dnn2gp.infinite.batchnorm_mlp(1, BATCHES[0][:3], kernel="ntk")


@case("a batch in a plane, its NTK")
def _(tmp):
    dnn2gp.infinite.batchnorm_mlp(1, BATCHES[0][:, :2], kernel="ntk")(BATCHES[0][:, :2], diag=True)


@case("a batch of equal inputs, normalised")
def _(tmp):
    dnn2gp.infinite.batchnorm_mlp(1, torch.ones(4, 3))


@case("reference batches of different features")
def _(tmp):
    dnn2gp.infinite.batchnorm_mlp(1, [BATCHES[0], BATCHES[1][:, :2]])


@case("no reference batches")
def _(tmp):
    dnn2gp.infinite.batchnorm_mlp(1, [])


@case("a readout variance of zero")
def _(tmp):
    dnn2gp.infinite.batchnorm_mlp(1, BATCHES, 0.0)


# ---- attention at infinite width

TOKENS = dnn2gp.infinite.pack(PADDED)


@case("torch's attention, at infinite width")
def _(tmp):
    dnn2gp.infinite.NNGPKernel(torch.nn.MultiheadAttention(4, 2))


@case("a variance of keys that is negative")
def _(tmp):
    dnn2gp.infinite.transformer(2, 1, key_variance=-1.0)


@case("a readout of attention that there is not")
def _(tmp):
    dnn2gp.infinite.transformer(2, 1, readout="first")


@case("attention weights that there are not")
def _(tmp):
    dnn2gp.infinite.attention(2, 1, weights="sigmoid")


@case("a temperature of zero")
def _(tmp):
    dnn2gp.infinite.transformer(2, 1, temperature=0.0)


@case("a transformer without blocks")
def _(tmp):
    dnn2gp.infinite.transformer(2, 0)


@case("the standard NTK of a transformer")
def _(tmp):
    dnn2gp.infinite.transformer(2, kernel="ntk", parameterization="standard")


@case("tokens of another size for a transformer")
def _(tmp):
    dnn2gp.infinite.transformer(4).double()(TOKENS, diag=True)


@case("a length beyond the tokens, for a transformer")
def _(tmp):
    dnn2gp.infinite.transformer(2).double()(with_entry(TOKENS, (1, -1), 4.0), diag=True)


@case("a mean over padding")
def _(tmp):
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Flatten(), torch.nn.Linear(9, 1))
    dnn2gp.infinite.NNGPKernel(net, input_size=2)


@case("attention that is not told the lengths")
def _(tmp):
    net = torch.nn.Sequential(dnn2gp.infinite.YangAttention(2, 3), torch.nn.Linear(3, 1))
    dnn2gp.infinite.NNGPKernel(net, input_size=2)


@case("attention of inputs that are no sequences")
def _(tmp):
    net = torch.nn.Sequential(dnn2gp.infinite.YangAttention(2, 3), torch.nn.Flatten(), torch.nn.Linear(3, 1))
    dnn2gp.infinite.NNGPKernel(net)(torch.ones(2, 2), diag=True)


# ---- a surrogate for BoTorch


def surrogate(x=None, y=None, yvar=None, width=4, outputs=1, **options):
    """On six points of two inputs and one outcome, trained for a moment."""
    x, y = X if x is None else x, Y if y is None else y
    net = options.pop("net", None) or bayesopt.smooth_mlp(2, outputs, widths=(width,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=InputDataWarning)  # these are not scaled
        return bayesopt.DNN2GPModel(x, y, yvar, net=net, outcome_transform=None, **{"restarts": 1, **options})


@case("a batch of training data for a surrogate")
def _(tmp):
    surrogate(X.expand(2, -1, -1), Y.expand(2, -1, -1))


@case("a surrogate of no data")
def _(tmp):
    surrogate(X[:0], Y[:0])


@case("fewer outcomes than points for a surrogate")
def _(tmp):
    surrogate(X, Y[:5])


@case("a surrogate's net of another number of outputs")
def _(tmp):
    surrogate(outputs=2)


@case("a surrogate of no nets")
def _(tmp):
    surrogate(restarts=0)


@case("a residual kernel by an unknown name")
def _(tmp):
    surrogate(residual_kernel="rbf")


@case("a residual kernel for labels")
def _(tmp):
    surrogate(y=(Y > 0).double(), loss=Bernoulli(), residual_kernel=gpytorch.kernels.MaternKernel())


@case("observed noise of labels")
def _(tmp):
    surrogate(y=(Y > 0).double(), yvar=torch.ones_like(Y), loss=Bernoulli())


@case("a surrogate's loss that is none of ours")
def _(tmp):
    surrogate(loss="gaussian")


@case("a surrogate's net by its name")
def _(tmp):
    surrogate(net="mlp")


@case("a policy that is a number")
def _(tmp):
    surrogate(refit_when=3)


@case("infinite inputs of a surrogate")
def _(tmp):
    surrogate(torch.where(X == X.max(), torch.inf, X))


@case("points of another dimension for a surrogate")
def _(tmp):
    surrogate().posterior(torch.rand(3, 5, dtype=F64))


@case("a refit of fantasies")
def _(tmp):
    surrogate().condition_on_observations(X.expand(2, -1, -1), Y.expand(2, -1, -1)).refit(X, Y)


@case("a `state_dict` for a subset of outcomes")
def _(tmp):
    model = surrogate()
    model.subset_output([0]).load_state_dict(model.state_dict())


@case("a surrogate's posterior of labels with noise")
def _(tmp):
    surrogate(y=(Y > 0).double(), loss=Bernoulli()).posterior(X, observation_noise=True)


@case("observation noise of another number of outcomes")
def _(tmp):
    surrogate().posterior(X, observation_noise=torch.ones(6, 2, dtype=F64))


@case("outcomes that do not fit the points to condition on")
def _(tmp):
    surrogate().condition_on_observations(X[:2], Y[:3])


@case("noise that differs between elements of a batch of fantasies")
def _(tmp):
    noise = torch.tensor([0.1, 0.2], dtype=F64)[:, None, None].expand(2, 6, 1)
    surrogate().condition_on_observations(X.expand(2, -1, -1), Y.expand(2, -1, -1), noise=noise)


@case("a refit without the noise that was observed before")
def _(tmp):
    surrogate(yvar=torch.ones_like(Y)).refit(X, Y)


@case("a refit of a subset of outcomes")
def _(tmp):
    surrogate().subset_output([0]).refit(X, Y)


@case("a refit every zero points")
def _(tmp):
    bayesopt.RefitWhen(every=0)


@case("a refit when the evidence falls by less than nothing")
def _(tmp):
    bayesopt.RefitWhen(evidence_falls_by=-1.0)


@case("a `state_dict` of another surrogate")
def _(tmp):
    surrogate().load_state_dict(surrogate(residual_kernel=None).state_dict())


# ---- search


def searched(space=None, train_fn=lambda width: 0.0, **options):
    space = {"width": Int(1, 9)} if space is None else space
    return bayesopt.search(space, train_fn, trials=6, progress=False, **options)


@case("an empty space to search")
def _(tmp):
    searched(space={})


@case("a space that is a list")
def _(tmp):
    searched(space=[3])


@case("a setting that is a number")
def _(tmp):
    searched(space={"width": 3})


@case("a setting called as a column of the table")
def _(tmp):
    searched(space={"evidence": Int(1, 2)})


@case("reversed bounds of a setting")
def _(tmp):
    searched(space={"width": Float(2, 1)})


@case("infinite bounds of a setting")
def _(tmp):
    searched(space={"width": Float(0, float("inf"))})


@case("a logarithmic scale from zero")
def _(tmp):
    searched(space={"width": Float(0, 1, log=True)})


@case("a fraction as bound of whole numbers")
def _(tmp):
    searched(space={"width": Int(1, 2.5)})


@case("a choice of one")
def _(tmp):
    searched(space={"width": Choice("a")})


@case("two choices of one name")
def _(tmp):
    searched(space={"width": Choice("1", 1)})


@case("a train_fn that does not take the settings")
def _(tmp):
    searched(space={"depth": Int(1, 2)})


@case("a search that starts outside of its space")
def _(tmp):
    searched(start=[{"width": 10}])


@case("a train_fn that returns no evidence")
def _(tmp):
    searched(train_fn=lambda width: None)


@case("a search in which nothing works")
def _(tmp):
    searched(train_fn=lambda width: 1 / 0)


@case("a search resumed with another space")
def _(tmp):
    searched(file=tmp / "table.csv")
    searched({"width": Int(1, 8)}, file=tmp / "table.csv")


# ---- the table


def table() -> dict[str, tuple[str, str]]:
    """What is given -> (error, message) by docs/gotchas.md."""
    text = GOTCHAS.read_text(encoding="utf-8")
    section = re.search(r"^## What is refused$(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE).group(1)
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in row] for row in rows if row[0].strip() != "Given"]
    assert all(len(row) == 3 for row in rows), [row for row in rows if len(row) != 3]
    given = [row[0] for row in rows]
    assert len(given) == len(set(given)), "a row stands twice"
    return {row[0]: (row[1].strip("`"), row[2].strip("`")) for row in rows}


TABLE = table()


def test_the_table_and_the_tests_name_the_same_cases():
    assert sorted(TABLE) == sorted(CASES)


@pytest.mark.parametrize("given", CASES)
def test_row(given, tmp_path):
    if given not in TABLE:
        pytest.fail(f"docs/gotchas.md has no row for {given!r}", pytrace=False)
    error, message = TABLE[given]
    with pytest.raises(Exception) as caught:
        CASES[given](tmp_path)
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert type(caught.value).__name__ == error, text
    pattern = ".*".join(re.escape(part.strip()) for part in message.split("…"))
    assert re.search(pattern, text, flags=re.DOTALL), f"documented:\n{message}\nraised:\n{text}"


def test_good_input_is_not_refused():
    """The cases next to those above."""
    p = problem("gaussian")
    regression(y=Y[:, 0])
    regression(y=torch.arange(6))  # integers become floats of the same value
    regression(x=X[:1], y=Y[:1])
    regression(x=X[:1].expand(6, -1))  # replicates
    regression(sigma=torch.tensor([0.3]))
    regression(sigma=torch.full((6, 1), 0.3)).predict(X, noise=torch.ones(6, 1, dtype=F64))
    classes(torch.tensor([0, 1, 2, 0, 1, 1], dtype=torch.int32))
    masked = copy.deepcopy(p.net)
    masked.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    regression(net=masked)
    frozen = copy.deepcopy(p.net)
    frozen[0].requires_grad_(False)
    regression(net=frozen)
    tokens(problem("categorical_tokens").x.double(), input_dtype=torch.long)
    gp = noisy_examples()
    x = problem("gaussian_per_example").x
    gp.likelihood(gp(x), x)  # the training examples themselves
    assert isinstance(gp, gpytorch.models.ExactGP)
