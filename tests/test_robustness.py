"""Nets and modes that users bring: hooks, kept activations, frozen backbones, autocast, inference mode; samples."""

import copy

import pytest
import torch
from oracle import assert_close
from torch import nn

import gpytorch_dnn2gp as dnn2gp

F64 = torch.float64


def make(net=None, num_outputs=2, n=10, dtype=F64, **options):
    net = net or nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, num_outputs)).to(dtype)
    x, y = torch.randn(n, 3, dtype=dtype), torch.randn(n, num_outputs, dtype=dtype)
    return dnn2gp.LaplaceGP(net, x, y, dnn2gp.losses.Gaussian(0.5), 0.8, **options)


# ---- samples


@pytest.mark.parametrize("solver", ["weight_space", "function_space"])
@pytest.mark.parametrize(("num_outputs", "m"), [(1, 850), (3, 280)])
def test_the_root_that_samples_are_drawn_with_is_exact(solver, num_outputs, m):
    """More than 800 rows, where linear_operator's own root is approximate; more points than weights, so singular."""
    gp = make(num_outputs=num_outputs, solver=solver)
    x = torch.randn(m, 3, dtype=F64)
    for f in (gp(x), gp.predict(x, joint=True).f):
        root = f.lazy_covariance_matrix.root_decomposition().root.to_dense()
        assert_close(root @ root.mT, f.covariance_matrix, 1e-6)
    noisy = gp.likelihood(gp(x), x)
    root = noisy.lazy_covariance_matrix.root_decomposition().root.to_dense()
    assert_close(root @ root.mT, noisy.covariance_matrix, 1e-8)


def test_samples_have_the_posteriors_moments():
    gp = make()
    f = gp(torch.randn(4, 3, dtype=F64))
    samples = f.rsample(torch.Size([40_000])).flatten(1)
    assert_close(samples.mean(0), f.mean.flatten(), 0.05)
    assert_close(samples.T.cov(), f.covariance_matrix, 0.05)


def test_a_thousand_outputs_at_one_point_are_sampled_exactly():
    gp = make(nn.Linear(3, 900).to(F64), num_outputs=900, n=4, structure="diagonal")
    f = gp.predict(torch.randn(1, 3, dtype=F64)).f
    root = f.lazy_covariance_matrix.root_decomposition().root.to_dense()
    assert_close(root @ root.mT, f.covariance_matrix, 1e-8)


# ---- nets


class FrozenBackbone(nn.Module):
    """The backbone runs under no_grad, though its weights require gradients: they have none."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        with torch.no_grad():
            z = torch.tanh(self.backbone(x))
        return self.head(z)


@pytest.mark.parametrize("solver", ["weight_space", "function_space", "iterative"])
def test_no_grad_inside_a_net(solver):
    net = FrozenBackbone().to(F64)
    x, y, x_test = torch.randn(8, 3, dtype=F64), torch.randn(8, 2, dtype=F64), torch.randn(3, 3, dtype=F64)
    lin = dnn2gp.Linearization(net)
    u = torch.randn(lin.num_weights, dtype=F64)
    assert_close(lin.jvp(x, u), lin.jacobian(x) @ u)
    loss = dnn2gp.losses.Gaussian(0.5)
    gp = dnn2gp.LaplaceGP(net, x, y, loss, solver=solver)
    head = dnn2gp.LaplaceGP(net, x, y, loss, params="last_layer", solver="weight_space")
    assert_close(gp(x_test).covariance_matrix, head(x_test).covariance_matrix)
    assert_close(gp(x_test).mean, head(x_test).mean)


def test_backward_hooks_neither_run_nor_count():
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).to(F64)
    x = torch.randn(4, 3, dtype=F64)
    expected, ran = dnn2gp.Linearization(net).jacobian(x), []
    net[1].register_full_backward_hook(lambda module, grad_in, grad_out: ran.append(1) or (grad_in[0] * 0,))
    lin = dnn2gp.Linearization(net)
    assert torch.equal(lin.jacobian(x), expected)
    lin.vjp(x, torch.ones(4, 2, dtype=F64))
    assert not ran
    assert len(net[1]._backward_hooks) == 1


class KeepsActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        self.features = {"last": [torch.tanh(self.body(x))]}
        return self.head(self.features["last"][0])


def test_a_net_that_keeps_its_activations():
    net = KeepsActivation().to(F64)
    net(torch.randn(5, 3, dtype=F64)).sum().backward()
    kept = net.features["last"][0]
    gp = make(net)
    gp.predict(torch.randn(2, 3, dtype=F64))
    assert net.features["last"][0] is kept and kept.grad_fn is not None


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_weight_norm_of_the_old_kind():
    net = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 6)), nn.Tanh(), nn.Linear(6, 2)).to(F64)
    x = torch.randn(4, 3, dtype=F64)
    net(x)
    lin = dnn2gp.Linearization(net)
    assert_close(lin(x), net(x).detach())
    u = torch.randn(lin.num_weights, dtype=F64)
    assert_close(lin.jvp(x, u), lin.jacobian(x) @ u)


def test_a_net_that_changes_its_input_in_place():
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)).to(F64)
    x = torch.randn(5, 3, dtype=F64)
    before = x.clone()
    gp = make(net)
    gp.predict(x)
    gp(x)
    assert torch.equal(x, before)


def test_sparse_embeddings():
    net = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(6, 2)).to(F64)
    dense = copy.deepcopy(net)
    dense[0].sparse = False
    x = torch.randint(0, 5, (4, 2))
    options = {"input_shape": (2,), "input_dtype": torch.long}
    assert_close(dnn2gp.Linearization(net, **options).jacobian(x), dnn2gp.Linearization(dense, **options).jacobian(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_wrappers_that_cannot_be_linearized():
    net = nn.Linear(3, 2).to(F64)
    with pytest.raises(TypeError, match=r"net\.module"):
        dnn2gp.Linearization(nn.DataParallel(net))
    with pytest.raises(TypeError, match="traced or scripted"):
        dnn2gp.Linearization(torch.jit.trace(net, torch.zeros(1, 3, dtype=F64)))


def test_last_layer_by_name_after_the_advice():
    net = nn.Module()
    net.head, net.first = nn.Linear(3, 2).to(F64), nn.Linear(3, 3).to(F64)
    net.forward = lambda x: net.head(net.first(x))

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.decode = nn.Linear(3, 3).to(F64), nn.Linear(3, 3).to(F64)
            self.decode.weight = self.encode.weight
            self.aside = nn.Linear(2, 2).to(F64)

        def forward(self, x):
            return self.decode(torch.tanh(self.encode(x)))

    with pytest.raises(ValueError, match=r"params=\['encode.weight', 'decode.bias'\]"):
        dnn2gp.Linearization(Tied(), params="last_layer")(torch.randn(2, 3, dtype=F64))
    assert dnn2gp.Linearization(Tied(), params=["encode.weight", "decode.bias"]).num_weights == 12


# ---- modes


@pytest.mark.parametrize("solver", ["weight_space", "function_space", "iterative"])
def test_autocast_outside_changes_nothing(solver):
    x_test = torch.randn(3, 3)
    gp = make(dtype=torch.float32, solver=solver)
    expected = gp.predict(x_test)
    fresh = copy.deepcopy(gp)
    fresh._clear_solver()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for other in (gp, fresh):
            p = other.predict(x_test)
            assert p.mean.dtype == torch.float32
            assert torch.equal(p.mean, expected.mean)
            assert torch.equal(p.epistemic, expected.epistemic)
        built = dnn2gp.LaplaceGP(gp.linearization, *gp.train_inputs, gp.train_labels, dnn2gp.losses.Gaussian(0.5), 0.8)
        assert built(x_test).mean.dtype == torch.float32


@pytest.mark.parametrize("solver", ["weight_space", "function_space", "iterative"])
def test_inference_mode_first_then_gradients(solver):
    gp, reference = make(solver=solver), None
    reference = copy.deepcopy(gp)
    x_test = torch.randn(3, 3, dtype=F64)
    with torch.inference_mode():
        p = gp.predict(x_test * 1.0)
        f = gp(x_test)
        conditioned = gp.condition_on(x_test[:1], torch.zeros(1, 2, dtype=F64))
        conditioned.predict(x_test)
    assert_close(p.mean, reference.predict(x_test).mean)
    assert_close(f.covariance_matrix, reference(x_test).covariance_matrix)
    x = x_test.clone().requires_grad_()
    gp.predict(x).variance.sum().backward()
    conditioned(x).variance.sum().backward()
    if solver != "iterative":
        fit, other = (dnn2gp.fit_evidence(model, warn=False) for model in (gp, reference))
        assert fit.evidence_after >= other.evidence_after - 1e-6


def test_moving_one_gp_leaves_another_with_the_same_net():
    gp = make()
    x_test = torch.randn(3, 3, dtype=F64)
    expected = gp(x_test).covariance_matrix
    conditioned = gp.condition_on(x_test[:1], torch.zeros(1, 2, dtype=F64))
    conditioned.float()
    gp._clear_solver()
    assert torch.equal(gp(x_test).covariance_matrix, expected)


# ---- arguments


def test_evidence_takes_numbers_and_refuses_negative_ones():
    gp = make()
    expected = make()
    gp = copy.deepcopy(expected)
    expected.prior_precision, expected.noise = 2.0, 0.3
    assert_close(gp.log_evidence(prior_precision=2.0, noise=0.3), expected.log_evidence())
    with pytest.raises(ValueError, match="prior_precision must be positive"):
        gp.log_evidence(prior_precision=-1.0)
    with pytest.raises(ValueError, match="noise must be positive"):
        gp.log_evidence(noise=0.0)


def test_noise_per_output_of_the_empirical_fisher_is_not_learned():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(F64)
    x, y = torch.randn(8, 3, dtype=F64), torch.randn(8, 2, dtype=F64)
    loss = dnn2gp.losses.Gaussian(torch.tensor([0.4, 0.6], dtype=F64))
    gp = dnn2gp.LaplaceGP(net, x, y, loss, features="gradient")
    assert not gp.likelihood.raw_noise.requires_grad
    with pytest.raises(ValueError, match="has no gradient in it"):
        gp.log_evidence(noise=gp.noise.clone().requires_grad_())


def test_dual_data_is_refused_where_it_does_not_fit():
    gp = make(num_outputs=60, n=20)
    with dnn2gp.tiling.memory_limit(10**5), pytest.raises(MemoryError, match="noise precisions of 20 examples"):
        gp.dual_data()


def test_fantasies_of_one_point_in_a_batch_of_one():
    gp = make(num_outputs=1)
    for x_shape, y_shape, batch in [
        ((1, 1, 3), (16, 1, 1), (16, 1)),
        ((3, 1, 3), (16, 3, 1), (16, 3)),
        ((1, 3), (16, 1), (16,)),
        ((1, 3), (1, 1), ()),
        ((2, 3), (2,), ()),
        ((5, 2, 3), (5, 2, 1), (5,)),
    ]:
        fantasy = gp.get_fantasy_model(torch.randn(*x_shape, dtype=F64), torch.randn(*y_shape, dtype=F64))
        assert fantasy(torch.randn(4, 3, dtype=F64)).batch_shape == batch


def test_loaders_leave_the_global_generator_alone():
    x, y = torch.randn(8, 3, dtype=F64), torch.randn(8, 2, dtype=F64)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4, shuffle=True)
    net, state = nn.Linear(3, 2).to(F64), torch.get_rng_state()
    state = torch.get_rng_state()
    dnn2gp.LaplaceGP.from_training(net, loader, nn.MSELoss(), 1e-3, sigma=0.5)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_no_torch_loss_or_no_tensor():
    x, y = torch.randn(8, 3, dtype=F64), torch.randint(0, 2, (8,))
    net = nn.Linear(3, 2).to(F64)
    with pytest.raises(TypeError, match=r"nn\.CrossEntropyLoss\(\)"):
        dnn2gp.LaplaceGP.from_training(net, (x, y), nn.functional.cross_entropy, 1e-3)
    with pytest.raises(TypeError, match="numpy"):
        dnn2gp.LaplaceGP.from_training(net, (x.numpy(), y.numpy()), nn.CrossEntropyLoss(), 1e-3)
    gp = dnn2gp.LaplaceGP.from_training(net, {"inputs": x, "labels": y}, nn.CrossEntropyLoss(), 1e-3)
    assert len(gp.train_labels) == 8


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_nets_that_are_random_in_eval_mode_are_found(rate):
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(nn.functional.dropout(torch.relu(self.body(x)), rate))

    for seed in range(20):
        torch.manual_seed(seed)
        with pytest.raises(ValueError, match="different outputs for the same input"):
            dnn2gp.Linearization(Random().to(F64))(torch.randn(4, 3, dtype=F64))


def test_functional_batch_norm_is_found():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(nn.functional.batch_norm(x, None, None, training=True))

    with pytest.raises(ValueError, match="normalises by the batch"):
        dnn2gp.Linearization(Normalised().to(F64))(torch.randn(4, 3, dtype=F64))


class Scaled(nn.Module):
    """Has a parameter without dimensions."""

    def __init__(self):
        super().__init__()
        self.body, self.scale = nn.Linear(2, 2).to(F64), nn.Parameter(torch.tensor(1.3, dtype=F64))

    def forward(self, x):
        return self.scale * self.body(x)


def test_a_parameter_without_dimensions():
    net, x = Scaled(), torch.randn(5, 2, dtype=F64)
    lin = dnn2gp.Linearization(net)
    J = lin.jacobian(x)
    at = sum(lin.param_sizes[: lin.param_names.index("scale")])
    assert_close(J[..., at], net.body(x))  # d (s f) / d s = f
    assert_close(lin.gram(x), torch.einsum("ikp,jlp->ikjl", J, J).reshape(10, 10))
    y, loss = torch.randn_like(x), dnn2gp.losses.Gaussian(0.5)
    gps = [dnn2gp.LaplaceGP(net, x, y, loss, solver=solver) for solver in ("weight_space", "function_space")]
    assert_close(gps[0].log_evidence(), gps[1].log_evidence())


# ---- moved


def test_moved_to_where_it_is():
    """As BoTorch's acquisition functions do at each call: nothing is computed again; sharing memory is no move."""
    gp = make()
    posterior = gp.posterior()
    assert gp.to(torch.float64).to("cpu") is gp and gp.posterior() is posterior
    gp.share_memory()
    assert all(parameter.is_shared() for parameter in gp.parameters())
    assert gp.posterior() is posterior
