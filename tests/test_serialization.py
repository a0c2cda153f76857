"""save -> new process -> load: the same predictions to the bit; files that are not right are refused by name."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import gpytorch
import oracle
import pytest
import torch
from problems import CASES, F64, TokenNet, log_cosh, mlp, problem, randomized
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import gpytorch_dnn2gp as dnn2gp
from gpytorch_dnn2gp import serialization
from gpytorch_dnn2gp.jacobians import NetFunction

TESTS = Path(__file__).parent

# what is saved: a case of problems.py, and options of the GP
OPTIONS = {
    "weight_space": {"solver": "weight_space"},
    "function_space": {"solver": "function_space"},
    "iterative": {"solver": "iterative"},
    "diagonal": {"structure": "diagonal"},
    "gradient": {"features": "gradient"},
    "last_layer": {"params": "last_layer", "temperature": 0.7},
}
SAVED = [f"{case} {option}" for case in CASES for option in ("weight_space", "function_space")]
SAVED += [f"{case} {o}" for case in ("gaussian_per_output", "categorical") for o in OPTIONS if not o.endswith("space")]


def build(which: str) -> tuple:
    case, option = which.split()
    p = problem(case)
    return p, p.gp(0.7, **OPTIONS[option])


def what_it_says(gp, p) -> dict[str, torch.Tensor]:
    """All that a user reads of it, as tensors to compare bit by bit."""
    f = gp(p.x_test)
    out = {"mean": f.mean, "covariance": f.covariance_matrix, "prior precision": gp.prior_precision}
    out["weights"] = gp.weight_posterior().mean
    if gp.noise is not None:
        out["noise"] = gp.noise
    if p.loss_name != "from_callable":
        noise = torch.full((len(p.x_test), gp.num_outputs), 0.3, dtype=gp.linearization.dtype)
        prediction = p.predict(gp, p.x_test, noise=noise if gp.likelihood.per_example_noise else None)
        out |= {"label": prediction.mean, "aleatoric": prediction.aleatoric, "epistemic": prediction.epistemic}
    if gp.solver != "iterative":
        out["evidence"] = gp.log_evidence()
    return {name: value.detach().clone() for name, value in out.items()}


def same_bits(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"not equal to the bit: {different}"


def again(p, path, **kwargs):
    """Loaded into a net of other weights."""
    net = copy.deepcopy(p.net)
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.mul_(2).add_(1)
    loss = p.loss() if p.loss_name == "from_callable" else None
    return dnn2gp.load(path, net, **{"loss": loss, **kwargs})


IN_A_NEW_PROCESS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_serialization import SAVED, again, what_it_says
from problems import problem
folder = sys.argv[2]
torch.set_num_threads(int(sys.argv[3]))
for number, which in enumerate(SAVED):
    p = problem(which.split()[0])
    torch.save(what_it_says(again(p, f"{folder}/{number}.safetensors"), p), f"{folder}/{number}.said")
"""


@pytest.fixture(scope="module")
def new_process(tmp_path_factory):
    """For each of SAVED: what the GP said here, and what it said in one new process."""
    folder = tmp_path_factory.mktemp("saved")
    here = []
    for number, which in enumerate(SAVED):
        p, gp = build(which)
        here.append(what_it_says(gp, p))
        dnn2gp.save(gp, folder / f"{number}.safetensors")
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, str(TESTS), str(folder), str(torch.get_num_threads())]
    run = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    there = [torch.load(folder / f"{number}.said", weights_only=True) for number in range(len(SAVED))]
    return dict(zip(SAVED, zip(here, there, strict=True), strict=True))


@pytest.mark.parametrize("which", SAVED)
def test_a_new_process_predicts_the_same_to_the_bit(new_process, which):
    here, there = new_process[which]
    same_bits(here, there)


@pytest.mark.parametrize("option", OPTIONS)
def test_in_float32(option, tmp_path):
    p = problem("gaussian")
    p.net, p.x, p.y, p.x_test = p.net.float(), p.x.float(), p.y.float(), p.x_test.float()
    gp = p.gp(0.7, **OPTIONS[option])
    dnn2gp.save(gp, tmp_path / "gp")
    said = what_it_says(gp, p)
    p.net.double()  # the file's precision counts, not the instance's
    same_bits(said, what_it_says(again(p, tmp_path / "gp"), p))


def test_hyperparameters_groups_and_constraints(tmp_path):
    p = problem("gaussian_per_output")
    variance = 0.5 + torch.rand(sum(w.numel() for w in p.net.parameters()), dtype=F64)
    gp = p.gp(torch.tensor([0.5, 2.0], dtype=F64), groups=["2", ["0.weight", "0.bias"]], prior_variance=variance)
    interval = gpytorch.constraints.Interval(torch.tensor(0.01), torch.tensor(7.1))
    gp.covar_module.register_constraint("raw_prior_precision", interval)
    gp.likelihood.register_constraint("raw_noise", gpytorch.constraints.GreaterThan(1e-3))
    gp = gp.double()
    gp.prior_precision, gp.noise = torch.tensor([0.3, 1.7], dtype=F64), torch.tensor([0.2, 0.4], dtype=F64)
    said = what_it_says(gp, p)
    dnn2gp.save(gp, tmp_path / "gp")
    loaded = again(p, tmp_path / "gp")
    same_bits(said, what_it_says(loaded, p))
    assert loaded.covar_module.groups.names == gp.covar_module.groups.names
    assert repr(loaded.covar_module.raw_prior_precision_constraint) == repr(interval)
    for new, old in zip(loaded.parameters(), gp.parameters(), strict=True):
        assert torch.equal(new, old)
    for model in (gp, loaded):  # and goes on from there
        model.prior_precision, model.noise = 1.1, torch.tensor([0.1, 0.9], dtype=F64)
    same_bits(what_it_says(gp, p), what_it_says(loaded, p))


@pytest.mark.parametrize("solver", ["weight_space", "function_space"])
@pytest.mark.parametrize("case", ["gaussian", "gaussian_per_example", "categorical"])
def test_a_conditioned_gp(case, solver, tmp_path):
    p = problem(case)
    gp = p.gp(0.7, solver=solver)
    y = p.y[:2] if case != "categorical" else torch.tensor([2, 0])
    two, one = (torch.full((q, 2), 0.2, dtype=F64) if case == "gaussian_per_example" else None for q in (2, 1))
    gp = gp.condition_on(p.x[:2] + 0.3, y, two).condition_on(p.x[3:4] - 0.2, y[:1], one)
    dnn2gp.save(gp, tmp_path / "gp")
    loaded = again(p, tmp_path / "gp")
    same_bits(what_it_says(gp, p), what_it_says(loaded, p))
    assert torch.equal(loaded.train_inputs[0], gp.train_inputs[0])


def test_a_loaded_gp_can_be_saved_conditioned_and_refitted(tmp_path):
    p, gp = build("categorical weight_space")
    dnn2gp.save(gp, tmp_path / "a")
    loaded = again(p, tmp_path / "a")
    dnn2gp.save(loaded, tmp_path / "b")
    same_bits(what_it_says(gp, p), what_it_says(again(p, tmp_path / "b"), p))
    y = torch.tensor([1])
    same_bits(what_it_says(gp.condition_on(p.x_test[:1], y), p), what_it_says(loaded.condition_on(p.x_test[:1], y), p))
    for model in (gp, loaded):
        dnn2gp.fit_evidence(model, progress=False, warn=False)
    same_bits(what_it_says(gp, p), what_it_says(loaded, p))


@pytest.mark.parametrize("option", ["weight_space", "function_space", "diagonal", "gradient"])
def test_loading_and_predicting_form_no_jacobian_of_the_training_data(option, tmp_path, monkeypatch):
    p, gp = build(f"categorical {option}")
    dnn2gp.save(gp, tmp_path / "gp")
    seen = []
    for name in ("jacobian_rows", "vjp", "jvp"):
        method = getattr(NetFunction, name)

        def spy(self, x, *args, _method=method):
            seen.extend(x)
            return _method(self, x, *args)

        monkeypatch.setattr(NetFunction, name, spy)
    loaded = again(p, tmp_path / "gp")
    assert not seen
    loaded(p.x_test), loaded.predict(p.x_test)
    assert seen and all(any(torch.equal(x, x_test) for x_test in p.x_test) for x in seen)


def test_without_jacobians_the_file_is_smaller(tmp_path):
    p, gp = build("gaussian function_space")
    dnn2gp.save(gp, tmp_path / "with")
    dnn2gp.save(gp, tmp_path / "without", jacobians=False)
    assert (tmp_path / "with").stat().st_size > (tmp_path / "without").stat().st_size
    a, b = what_it_says(gp, p), what_it_says(again(p, tmp_path / "without"), p)
    for name in a:
        assert (a[name] - b[name]).abs().max() <= 1e-12 * a[name].abs().max(), name


def test_tied_parameters_and_hidden_buffers(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1)
            self.b.weight = self.a.weight
            self.register_buffer("offset", torch.rand(2), persistent=False)

        def forward(self, x):
            return self.out(torch.tanh(self.b(torch.tanh(self.a(x + self.offset)))))

    p = problem("gaussian")
    p.net = randomized(Tied(), 0)
    gp = p.gp(0.7)
    dnn2gp.save(gp, tmp_path / "gp")
    same_bits(what_it_says(gp, p), what_it_says(again(p, tmp_path / "gp"), p))


def test_a_net_without_weights_yet_and_a_frozen_one(tmp_path):
    p, gp = build("gaussian weight_space")
    dnn2gp.save(gp, tmp_path / "gp")
    with torch.device("meta"):
        net = mlp()
    same_bits(what_it_says(gp, p), what_it_says(dnn2gp.load(tmp_path / "gp", net), p))
    net = randomized(mlp(), 3).requires_grad_(False)
    same_bits(what_it_says(gp, p), what_it_says(dnn2gp.load(tmp_path / "gp", net), p))


def test_the_net_given_to_load_is_not_changed(tmp_path):
    p, gp = build("gaussian_odd_net weight_space")
    dnn2gp.save(gp, tmp_path / "gp")
    net = randomized(copy.deepcopy(p.net), 7).train()
    before = copy.deepcopy(net)
    loaded = dnn2gp.load(tmp_path / "gp", net)
    said = what_it_says(loaded, p)
    for a, b in zip((*net.parameters(), *net.buffers()), (*before.parameters(), *before.buffers()), strict=True):
        assert torch.equal(a, b) and a.requires_grad == b.requires_grad and a.grad is None
    assert net.training
    with torch.no_grad():
        next(net.parameters()).zero_()
    same_bits(said, what_it_says(loaded, p))


# ---- the file


def test_the_file_says_what_it_is(tmp_path):
    p, gp = build("categorical weight_space")
    dnn2gp.save(gp, tmp_path / "gp")
    with safe_open(tmp_path / "gp", framework="pt") as file:
        config = json.loads(file.metadata()["gpytorch_dnn2gp"])
    assert config["version"] == dnn2gp.__version__ and config["format"] == 1
    assert config["loss"] == {"name": "Categorical", "arguments": {}}


@pytest.mark.parametrize("exception", [KeyboardInterrupt, OSError])
def test_an_interrupted_save_loses_nothing(tmp_path, monkeypatch, exception):
    p, gp = build("gaussian weight_space")
    dnn2gp.save(gp, tmp_path / "gp")
    before = (tmp_path / "gp").read_bytes()

    def fails(tensors, path, metadata):
        Path(path).write_bytes(before[:100])
        raise exception("disk full")

    monkeypatch.setattr(serialization, "save_file", fails)
    gp.prior_precision = 3.0
    with pytest.raises(exception, match="disk full"):
        dnn2gp.save(gp, tmp_path / "gp")
    assert (tmp_path / "gp").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["gp"]


def test_the_file_is_as_readable_as_any_other(tmp_path):
    _, gp = build("gaussian weight_space")
    (tmp_path / "other").touch()
    dnn2gp.save(gp, tmp_path / "gp")
    assert (tmp_path / "gp").stat().st_mode == (tmp_path / "other").stat().st_mode
    (tmp_path / "gp").chmod(0o600)
    dnn2gp.save(gp, tmp_path / "gp")
    assert (tmp_path / "gp").stat().st_mode & 0o777 == 0o600


def test_an_open_file_may_be_replaced(tmp_path):
    """What was loaded does not read the file any more."""
    p, gp = build("gaussian weight_space")
    dnn2gp.save(gp, tmp_path / "gp")
    loaded = again(p, tmp_path / "gp")
    said = what_it_says(gp, p)
    (tmp_path / "gp").write_bytes(b"")
    same_bits(said, what_it_says(loaded, p))


def rewritten(path: Path, change) -> None:
    """The file with its description changed in place by ``change(config)``."""
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["gpytorch_dnn2gp"])
    tensors = load_file(path)
    change(config)
    save_file(tensors, path, {"gpytorch_dnn2gp": json.dumps(config)})


@pytest.fixture
def saved(tmp_path):
    p, gp = build("gaussian weight_space")
    dnn2gp.save(gp, tmp_path / "gp")
    return tmp_path / "gp"


def test_files_that_are_not_right(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file .*elsewhere"):
        dnn2gp.load(tmp_path / "elsewhere", mlp())
    whole = saved.read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="gp is truncated or damaged"):
            dnn2gp.load(saved, mlp())
    torch.save(mlp().state_dict(), saved)
    with pytest.raises(ValueError, match="truncated or damaged, or no file that gpytorch_dnn2gp.save wrote"):
        dnn2gp.load(saved, mlp())
    for metadata in (None, {"format": "pt"}):
        save_file(mlp().state_dict(), saved, metadata)
        with pytest.raises(ValueError, match="not one that gpytorch_dnn2gp.save wrote"):
            dnn2gp.load(saved, mlp())


def test_a_newer_file(saved):
    rewritten(saved, lambda config: config.update(format=99, version="7.0"))
    with pytest.raises(ValueError, match="written by gpytorch_dnn2gp 7.0 in format 99.*Upgrade"):
        dnn2gp.load(saved, mlp())


@pytest.mark.parametrize("key", ["params", "groups", "loss", "layouts", "constraints", "solver", "format"])
def test_a_file_that_lacks_something(saved, key):
    rewritten(saved, lambda config: config.pop(key))
    with pytest.raises(ValueError, match="damaged"):
        dnn2gp.load(saved, mlp())


@pytest.mark.parametrize(
    "net, message",
    [
        (lambda: mlp(width=5), r"not built as the one in .*has 0.weight of shape \(5, 2\) instead of \(4, 2\)"),
        (lambda: nn.Sequential(nn.Linear(2, 4)), r"lacks 2.bias, 2.weight"),
        (lambda: nn.Sequential(*mlp(), nn.BatchNorm1d(1)), r"has besides 3.bias, 3.num_batches_tracked, .*\.\.\."),
        (lambda: TokenNet(), r"given to load \(TokenNet\).*Sequential"),
        (lambda: nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)), "not in what it computes.*same acti"),
        (lambda: nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Dropout(), nn.Linear(4, 1)), "lacks 2.bias"),
    ],
)
def test_a_wrong_net(saved, net, message):
    with pytest.raises(ValueError, match=message):
        dnn2gp.load(saved, net())


def test_a_class_instead_of_an_instance(saved):
    with pytest.raises(TypeError, match="instance of the saved net's class, .*Sequential"):
        dnn2gp.load(saved, nn.Sequential)


# ---- losses that a file cannot hold


def test_a_loss_of_ones_own_is_given_again(tmp_path):
    p, gp = build("own_loss weight_space")
    dnn2gp.save(gp, tmp_path / "gp")
    with pytest.raises(ValueError, match=r"loss .* is from_callable\(log_cosh\).*load\(path, net, loss=...\)"):
        dnn2gp.load(tmp_path / "gp", p.net)
    other = dnn2gp.losses.from_callable(lambda f, y: (f - y).square().sum())
    with pytest.raises(ValueError, match="not the one in .*negative log likelihood at the training data differs"):
        dnn2gp.load(tmp_path / "gp", p.net, loss=other)
    fisher = dnn2gp.losses.from_callable(log_cosh, fisher=lambda f: torch.eye(2, dtype=F64).expand(*f.shape, 2))
    with pytest.raises(ValueError, match="noise precision at the training data differs"):
        dnn2gp.load(tmp_path / "gp", p.net, loss=fisher)
    with pytest.raises(TypeError, match="losses; got function"):
        dnn2gp.load(tmp_path / "gp", p.net, loss=log_cosh)


def test_a_link_of_ones_own_is_given_again(tmp_path):
    p = problem("natural")
    p.net = randomized(mlp(num_outputs=2), 0)
    loss = dnn2gp.losses.HeteroscedasticGaussian("natural", link=torch.exp)
    gp = dnn2gp.LaplaceGP(p.net, p.x, p.y, loss, 0.7)
    dnn2gp.save(gp, tmp_path / "gp")
    with pytest.raises(ValueError, match="link=exp.*give it again"):
        dnn2gp.load(tmp_path / "gp", p.net)
    loaded = dnn2gp.load(tmp_path / "gp", p.net, loss=loss)
    same_bits(what_it_says(gp, p), what_it_says(loaded, p))


def test_a_named_loss_needs_no_second_mention_and_must_agree(saved):
    p = problem("gaussian")
    dnn2gp.load(saved, p.net, loss=dnn2gp.losses.Gaussian())
    with pytest.raises(ValueError, match=r"loss=Poisson\(\) was given, but the GP in .* has Gaussian"):
        dnn2gp.load(saved, p.net, loss=dnn2gp.losses.Poisson())


@pytest.mark.parametrize("parametrization, link", [("natural", "exp"), ("natural", "softplus"), ("log_sigma", None)])
def test_links_by_name(parametrization, link, tmp_path):
    p = problem("log_sigma")
    loss = dnn2gp.losses.HeteroscedasticGaussian(parametrization, link)
    gp = dnn2gp.LaplaceGP(p.net, p.x, p.y, loss, 0.7)
    dnn2gp.save(gp, tmp_path / "gp")
    assert repr(again(p, tmp_path / "gp").loss) == repr(loss)


# ---- a residual kernel


def matern(nu: float = 2.5, **kwargs) -> gpytorch.kernels.Kernel:
    return gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=nu, **kwargs))


@pytest.mark.parametrize("case", ["gaussian", "categorical"])
def test_a_residual_kernel_is_given_again(case, tmp_path):
    p = problem(case)
    kernel = matern().double()
    kernel.outputscale, kernel.base_kernel.lengthscale = 0.3, 0.8
    gp = p.gp(0.7, residual_kernel=kernel)
    said = [gp(p.x_test).mean, gp(p.x_test).covariance_matrix, gp.predict(p.x_test).variance, gp.log_evidence()]
    dnn2gp.save(gp, tmp_path / "gp")
    loaded = dnn2gp.load(tmp_path / "gp", p.net, residual_kernel=matern())
    new = [loaded(p.x_test).mean, loaded(p.x_test).covariance_matrix]
    new += [loaded.predict(p.x_test).variance, loaded.log_evidence()]
    assert all(torch.equal(a, b) for a, b in zip(said, new, strict=True))
    with pytest.raises(ValueError, match=r"whose code no file can hold.*residual_kernel=...\).*Scale"):
        dnn2gp.load(tmp_path / "gp", p.net)
    with pytest.raises(ValueError, match="residual kernel given to load is not the one in .*: its residual kernel at"):
        dnn2gp.load(tmp_path / "gp", p.net, residual_kernel=matern(nu=0.5))
    with pytest.raises(ValueError, match=r"is not built as .* has base_kernel.raw_lengthscale of shape \(1, 2\)"):
        dnn2gp.load(tmp_path / "gp", p.net, residual_kernel=matern(ard_num_dims=2))
    dnn2gp.save(p.gp(0.7), tmp_path / "gp")
    with pytest.raises(ValueError, match="given, but the GP in .* has none"):
        dnn2gp.load(tmp_path / "gp", p.net, residual_kernel=matern())


# ---- what cannot be saved


def test_what_cannot_be_saved(tmp_path):
    p, gp = build("gaussian weight_space")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        dnn2gp.save(gp, tmp_path / "missing" / "gp")
    with pytest.raises(FileNotFoundError, match="it is a folder"):
        dnn2gp.save(gp, tmp_path)
    with pytest.raises(TypeError, match="save writes a LaplaceGP or a VariationalGP; got Sequential"):
        dnn2gp.save(p.net, tmp_path / "gp")

    class Odd(gpytorch.constraints.Positive):
        pass

    for constraint in (Odd(), gpytorch.constraints.Positive(transform=torch.square, inv_transform=torch.sqrt)):
        gp.covar_module.register_constraint("raw_prior_precision", constraint)
        with pytest.raises(ValueError, match="constraint .* of raw_prior_precision is a class or a transform of yo"):
            dnn2gp.save(gp, tmp_path / "gp")
    assert not list(tmp_path.iterdir())


def test_oracle_agrees_after_loading(tmp_path):
    """Not only the same as before: right."""
    p, gp = build("categorical function_space")
    dnn2gp.save(gp, tmp_path / "gp")
    dense = p.dense(0.7)
    covariance = again(p, tmp_path / "gp")(p.x_test).covariance_matrix
    oracle.assert_close(covariance, dense.covariance(p.jacobian(p.x_test)), tol=1e-8)


# ---- damage inside a file


def with_tensors(path: Path, change) -> None:
    """The file with ``change(tensors)`` applied."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


DAMAGES = {
    "shorter": lambda t: t[..., :-1].clone(),
    "fewer": lambda t: t[:-1].clone(),
    "twice": lambda t: torch.cat([t, t]),
    "one": lambda t: t[:1, ..., :1].clone() if t.dim() > 1 else t[:1].clone(),
}


@pytest.mark.parametrize("option", ["weight_space", "function_space", "diagonal"])
@pytest.mark.parametrize("case", ["gaussian", "categorical"])
def test_tensors_of_a_wrong_size_and_missing_ones(case, option, tmp_path):
    p, gp = build(f"{case} {option}")
    conditioned = tmp_path / "conditioned gp"
    dnn2gp.save(gp, tmp_path / "gp")
    y, noise = (p.y[:3], torch.full((3, 1), 0.2, dtype=F64)) if case == "gaussian" else (torch.tensor([0, 1, 2]), None)
    dnn2gp.save(gp.condition_on(p.x_test, y, noise), conditioned)
    for path in (tmp_path / "gp", conditioned):
        whole, tensors = path.read_bytes(), load_file(path)
        assert any(name.startswith("sums/") for name in tensors)
        for name, tensor in tensors.items():
            for damage in DAMAGES.values():
                wrong = damage(tensor) if tensor.dim() else tensor.expand(2).clone()
                if wrong.shape == tensor.shape:
                    continue
                path.write_bytes(whole)
                with_tensors(path, lambda t, name=name, wrong=wrong: t.update({name: wrong}))
                with pytest.raises(ValueError, match=re.escape(str(path))):
                    dnn2gp.load(path, p.net)
            if name not in ("sums/rows", "added/noise", "added/inputs") and not name.startswith("net/"):
                path.write_bytes(whole)
                with_tensors(path, lambda t, name=name: t.pop(name))
                with pytest.raises(ValueError, match="gp lacks .*damaged"):
                    dnn2gp.load(path, p.net)
        path.write_bytes(whole)
        dnn2gp.load(path, p.net)


@pytest.mark.parametrize("layout", [[0, 0], [1, 2], [0], [1, 0, 2], [], None, "ab", [0, None]])
def test_bad_layouts(saved, layout):
    rewritten(saved, lambda config: config["layouts"].update({"data/inputs": layout}))
    with pytest.raises(ValueError, match="gp .*damaged"):
        dnn2gp.load(saved, mlp())


def test_a_missing_noise_is_damage_and_not_a_loss_that_was_given(saved):
    with_tensors(saved, lambda tensors: tensors.pop("fixed/noise"))
    with pytest.raises(ValueError, match="gp lacks 'fixed/noise': it is damaged"):
        dnn2gp.load(saved, mlp())


def test_a_newer_file_that_tells_no_version(saved):
    rewritten(saved, lambda config: (config.update(format=99), config.pop("version"), config.pop("layouts")))
    with pytest.raises(ValueError, match="in format 99.*Upgrade"):
        dnn2gp.load(saved, mlp())


def test_a_key_error_in_the_net_is_no_damage(saved):
    class Forgetful(nn.Sequential):
        def forward(self, x):
            return {}["a key of the net's own"]

    with pytest.raises(KeyError, match="a key of the net's own"):
        dnn2gp.load(saved, Forgetful(*mlp()))


def test_a_residual_kernel_that_reads_some_inputs(tmp_path):
    p = problem("gaussian")
    gp = p.gp(0.7, residual_kernel=gpytorch.kernels.RBFKernel(active_dims=[0]))
    dnn2gp.save(gp, tmp_path / "gp")
    loaded = dnn2gp.load(tmp_path / "gp", p.net, residual_kernel=gpytorch.kernels.RBFKernel(active_dims=[0]))
    assert torch.equal(loaded(p.x_test).covariance_matrix, gp(p.x_test).covariance_matrix)
    assert loaded.residual_kernel.active_dims.dtype == torch.int64


def test_noise_given_to_some_of_the_added_examples_is_kept(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    x, y = torch.randn(9, 2, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    gp = dnn2gp.LaplaceGP(net, x[:5], y[:5], dnn2gp.losses.Gaussian(0.3))
    gp = gp.condition_on(x[5:7], y[5:7]).condition_on(x[7:], y[7:], noise=0.5)
    dnn2gp.save(gp, tmp_path / "gp.safetensors")
    loaded = dnn2gp.load(tmp_path / "gp.safetensors", net)
    gp.noise = loaded.noise = 0.7
    assert torch.equal(loaded(x).mean, gp(x).mean)
