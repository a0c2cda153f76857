"""The user's net is bit-identical before and after everything, also when an exception is thrown in the middle."""

import contextlib
import random

import numpy as np
import pytest
import torch
from problems import F64, OddNet, flat_mean, mlp, number, problem, randomized
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gpytorch_dnn2gp as dnn2gp

HOOK_DICTS = [
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_non_persistent_buffers_set",
]


def snapshot(net: nn.Module) -> dict:
    """Everything about a net that someone could change, with the identity of its tensors."""
    state: dict = {}
    for name, module in net.named_modules():
        state[name, "training"] = module.training
        state[name, "type"] = type(module)
        state[name, "attributes"] = sorted(module.__dict__)
        for hooks in HOOK_DICTS:
            value = module.__dict__.get(hooks, ())
            state[name, hooks] = dict(value) if isinstance(value, dict) else sorted(value)
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        state[name, "identity"] = (id(tensor), tensor.data_ptr(), tensor._version)
        state[name, "bits"] = tensor.detach().clone().reshape(-1).contiguous().view(torch.uint8)
        state[name, "requires_grad"] = (tensor.requires_grad, tensor.is_leaf, tensor.dtype)
        state[name, "tensor_hooks"] = len(tensor._backward_hooks or {})
        state[name, "grad"] = None
        if tensor.grad is not None:
            state[name, "grad"] = tensor.grad.clone().reshape(-1).view(torch.uint8)
            state[name, "grad identity"] = id(tensor.grad)
    return state


def process() -> dict:
    """What is global."""
    return {
        "dtype": torch.get_default_dtype(),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tobytes(),
        "python": random.getstate(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "fastpath": torch.backends.mha.get_fastpath_enabled(),
        "cudnn": torch.backends.cudnn.enabled,
        "threads": torch.get_num_threads(),
    }


def assert_same(before: dict, after: dict) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key]
        assert same, f"{key} has changed"


@contextlib.contextmanager
def untouched(net: nn.Module, random_numbers: bool = False):
    """Fails if the net, or anything global, is another afterwards; ``random_numbers``: some may be drawn."""
    before, around = snapshot(net), process()
    try:
        yield
    finally:
        assert_same(before, snapshot(net))
        after = process()
        if random_numbers:
            for key in ("torch", "numpy", "python"):
                around.pop(key), after.pop(key)
        assert_same(around, after)


def lived_in(net: nn.Module) -> nn.Module:
    """A net as people have them: mixed training modes, gradients here and there, hooks, a frozen part."""
    net.train()
    parameters = list(net.parameters())
    parameters[0].grad = torch.full_like(parameters[0], 0.5)
    parameters[-1].grad = torch.full_like(parameters[-1], -2.0)
    net.register_forward_hook(lambda module, inputs, output: None)
    net.register_forward_pre_hook(lambda module, inputs: None)
    parameters[-1].register_hook(lambda grad: grad)
    children = list(net.children())
    children[-1].eval()
    return net


def lived_in_problem(name: str = "gaussian_odd_net", **kwargs):
    p = problem(name, **kwargs)
    lived_in(p.net)
    return p


def visit(*values: torch.Tensor) -> None:
    for value in values:
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("name", ["gaussian_odd_net", "categorical", "categorical_images", "categorical_tokens"])
def test_linearization_and_kernel(name):
    p = lived_in_problem(name)
    with untouched(p.net):
        lin = p.linearization()
        u, v = torch.ones_like(lin.weights), torch.ones_like(lin(p.x))
        lin.jacobian(p.x), lin.jvp(p.x, u), lin.vjp(p.x, v), lin.gram(p.x), lin.gram(p.x, p.x_test)
        kernel = dnn2gp.JacobianKernel(p.net, prior_precision=0.7) if p.input_dtype is None else None
        if kernel is not None and p.input_shape is None:
            kernel(p.x).to_dense().sum().backward()
            kernel.feature_map(p.x)
        lin.train()
        lin.zero_grad()
        lin.eval()


@pytest.mark.parametrize("solver", ["auto", "weight_space", "function_space", "iterative"])
@pytest.mark.parametrize("name", ["gaussian_odd_net", "categorical", "categorical_images", "categorical_tokens"])
def test_gp(name, solver):
    p = lived_in_problem(name)
    with untouched(p.net):
        gp = p.gp(0.7, solver=solver)
        visit(gp(p.x_test).covariance_matrix)
        for mean in ("network", "posterior"):
            visit(gp.predict(p.x_test, mean=mean).variance)
        visit(gp.predict(p.x_test, joint=True).f.covariance_matrix)
        visit(gp.dual_data().noise_precision, number(gp.stationarity().newton_decrement))
        posterior = gp.weight_posterior()
        visit(posterior.covariance_matmul(torch.ones_like(posterior.mean)))
        gp.prior_precision = 2.0
        visit(gp(p.x_test).covariance_matrix)
        if solver != "iterative":
            gp.log_evidence().backward()
        gp.train()
        gp.zero_grad()
        gp.eval()


def test_inputs_with_gradients():
    p = lived_in_problem()
    with untouched(p.net):
        gp = p.gp(0.7)
        gp.predict(p.x_test.requires_grad_()).variance.sum().backward()
    assert p.x_test.grad is not None


@pytest.mark.parametrize("kwargs", [{"structure": "diagonal"}, {"features": "gradient"}, {"params": "last_layer"}])
def test_variants(kwargs):
    p = lived_in_problem("categorical")
    with untouched(p.net):
        gp = p.gp(0.7, **kwargs)
        visit(gp.predict(p.x_test).variance)
        gp.log_evidence().backward()


@pytest.mark.filterwarnings("ignore::gpytorch_dnn2gp.StationarityWarning")
def test_samples_and_evidence_optimisation():
    p = lived_in_problem()
    with untouched(p.net, random_numbers=True):
        gp = p.gp(0.7)
        gp.weight_posterior().rsample(torch.Size([3]))
        gp(p.x_test).rsample(torch.Size([3]))
        dnn2gp.selection.fit_evidence(gp, warn=False)
        mll = dnn2gp.mlls.LaplaceMarginalLogLikelihood(gp.likelihood, gp)
        gp.train()
        (-mll(gp(*gp.train_inputs), gp.train_targets)).backward()
    p = lived_in_problem("categorical")
    with untouched(p.net, random_numbers=True):
        p.gp(0.7).predict(p.x_test, approximation="mc", num_samples=8)


def test_samples_from_a_generator_leave_the_global_one_alone():
    p = lived_in_problem("categorical")
    with untouched(p.net):
        generator = torch.Generator().manual_seed(0)
        a = p.gp(0.7).predict(p.x_test, approximation="mc", num_samples=8, generator=generator).mean
    b = p.gp(0.7).predict(p.x_test, approximation="mc", num_samples=8, generator=torch.Generator().manual_seed(0)).mean
    assert torch.equal(a, b)


def test_from_training():
    p = lived_in_problem("categorical")
    loader = DataLoader(TensorDataset(p.x, p.y), batch_size=2)
    with untouched(p.net, random_numbers=True):  # a loader draws from the global generator
        gp = dnn2gp.LaplaceGP.from_training(p.net, loader, nn.CrossEntropyLoss(), weight_decay=1e-2)
        visit(gp.predict(p.x_test).variance)
    with untouched(p.net):
        dnn2gp.LaplaceGP.from_training(p.net, (p.x, p.y), nn.CrossEntropyLoss(), weight_decay=1e-2)


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_grad_mode_of_the_caller(context):
    p = lived_in_problem()
    with context(), untouched(p.net):
        gp = p.gp(0.7)
        visit(gp.predict(p.x_test).variance)
        gp.log_evidence()
        visit(gp(p.x_test).covariance_matrix)


def test_default_dtype_of_the_caller():
    before = torch.get_default_dtype()
    p = lived_in_problem()
    try:
        for dtype in (torch.float32, F64):
            torch.set_default_dtype(dtype)
            with untouched(p.net):
                assert p.gp(0.7).predict(p.x_test).variance.dtype == F64
    finally:
        torch.set_default_dtype(before)


# ---- exceptions in the middle


class Failing(nn.Module):
    """A layer that raises at its ``countdown``-th call; copies share the countdown."""

    countdown = None
    exception = RuntimeError

    def forward(self, x):
        if Failing.countdown is not None:
            Failing.countdown -= 1
            if Failing.countdown <= 0:
                raise Failing.exception("in the middle")
        return x


@pytest.fixture
def failing_net():
    Failing.countdown = None
    net = nn.Sequential(OddNet(num_outputs=3), Failing())
    yield lived_in(randomized(net, 0))
    Failing.countdown = None


def everything(net: nn.Module, x: torch.Tensor, y: torch.Tensor, loss) -> None:
    for solver in ("weight_space", "function_space", "iterative"):
        gp = dnn2gp.LaplaceGP(net, x, y, loss, solver=solver)
        visit(gp(x[:2] + 0.1).covariance_matrix)
        visit(gp.predict(x[:2] + 0.1, mean="posterior").variance)
        visit(gp.weight_posterior().mean)
        gp.stationarity()
        if solver != "iterative":
            gp.log_evidence().backward()


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2, 3, 5, 8, 13, 21])
def test_a_net_that_raises_at_some_call(failing_net, call, exception):
    p = problem("categorical")
    Failing.countdown, Failing.exception = call, exception
    with untouched(failing_net), pytest.raises(exception, match="in the middle"):
        everything(failing_net, p.x, p.y, dnn2gp.losses.Categorical())
        pytest.fail(f"the net is called fewer than {call} times")


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2, 3, 5, 8])
def test_a_loss_that_raises_at_some_call(call, exception):
    p = lived_in_problem("gaussian_odd_net")
    calls = []

    def fn(f, y):
        calls.append(None)
        if len(calls) >= call:
            raise exception("in the middle")
        return 0.5 * ((f - y) ** 2).sum()

    def conditional(f):
        return torch.distributions.Independent(torch.distributions.Normal(f, 1.0), 1)

    with untouched(p.net, random_numbers=True), pytest.raises(exception, match="in the middle"):
        everything(p.net, p.x, p.y, dnn2gp.losses.from_callable(fn, conditional=conditional))
        pytest.fail(f"the loss is called fewer than {call} times")


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_a_loader_that_raises(exception):
    p = lived_in_problem("categorical")

    def batches():
        yield p.x[:3], p.y[:3]
        raise exception("in the middle")

    class Loader:
        def __iter__(self):
            return batches()

    with untouched(p.net), pytest.raises(exception, match="in the middle"):
        dnn2gp.LaplaceGP.from_training(p.net, Loader(), nn.CrossEntropyLoss(), weight_decay=1e-2)


def test_bad_labels_and_bad_inputs():
    p = lived_in_problem("categorical")
    loss = dnn2gp.losses.Categorical()
    bad_x = p.x.clone()
    bad_x[1, 0] = torch.nan
    for x, y in ((p.x, p.y + 5), (p.x, p.y[:-1]), (bad_x, p.y), (p.x[:, :1], p.y), (p.x.float(), p.y)):
        with untouched(p.net), pytest.raises((ValueError, TypeError, RuntimeError)):
            dnn2gp.LaplaceGP(p.net, x, y, loss)


# ---- two lives


@pytest.mark.parametrize("solver", ["weight_space", "function_space", "iterative"])
def test_later_training_of_the_net_does_not_move_the_gp(solver):
    p = problem("gaussian_odd_net")
    gp, lin = p.gp(0.7, solver=solver), p.linearization()

    def use():
        f = gp(p.x_test)
        return flat_mean(f), f.covariance_matrix, gp.predict(p.x_test).mean, gp.weight_posterior().mean, lin.gram(p.x)

    before = [value.detach().clone() for value in use()]
    optimizer = torch.optim.SGD(p.net.parameters(), lr=0.1)
    p.net.train()
    for _ in range(3):
        optimizer.zero_grad()
        ((p.net(p.x) - p.y) ** 2).mean().backward()
        optimizer.step()
    gp.prior_precision = 0.7  # throws the caches away
    for a, b in zip(use(), before, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=1e-12, atol=1e-12)
    fresh = p.gp(0.7, solver=solver)
    assert not torch.allclose(fresh.predict(p.x_test).mean, before[2])


def test_data_may_be_overwritten_afterwards():
    """A batch buffer that is used again does not move the GP."""
    p = problem("gaussian")
    x, y = p.x.clone(), p.y.clone()
    gp = dnn2gp.LaplaceGP(p.net, x, y, p.loss(), prior_precision=0.7)
    x.zero_(), y.zero_()
    gp.prior_precision = 0.7
    expected = p.gp(0.7)
    torch.testing.assert_close(gp(p.x_test).mean, expected(p.x_test).mean)
    torch.testing.assert_close(gp.log_evidence(), expected.log_evidence())


def test_what_requires_grad_in_a_gp_is_a_hyperparameter():
    """fit_gpytorch_mll trains whatever requires a gradient: the weights of the net must not be among it."""
    for name, expected in (("gaussian", {"prior_precision", "noise"}), ("categorical", {"prior_precision"})):
        p = problem(name)
        gp = p.gp(0.7)
        trained = {key.rsplit("raw_", 1)[-1] for key, value in gp.named_parameters() if value.requires_grad}
        assert trained == expected
        own = {q.data_ptr() for q in p.net.parameters()}
        assert not own & {q.data_ptr() for q in gp.parameters()}
        assert not own & {b.data_ptr() for b in gp.buffers()}


def test_training_a_gp_leaves_its_weights():
    p = problem("gaussian")
    gp = p.gp(0.7)
    before = [v.clone() for k, v in gp.state_dict().items() if "raw_" not in k]
    dnn2gp.selection.fit_evidence(gp, warn=False)
    after = [v for k, v in gp.state_dict().items() if "raw_" not in k]
    for a, b in zip(after, before, strict=True):
        assert torch.equal(a, b)


def test_the_net_may_be_deleted():
    net = randomized(mlp(), 0)
    p = problem("gaussian")
    gp = dnn2gp.LaplaceGP(net, p.x, p.y, p.loss())
    expected = gp.predict(p.x_test).mean
    del net
    torch.testing.assert_close(gp.predict(p.x_test).mean, expected)
