"""Recurrent nets at infinite width: reference numbers, laws, gradients, wide random nets."""

import functools
import json
import os
from pathlib import Path

import gpytorch
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sequences import ragged
from torch import nn

from gpytorch_dnn2gp import infinite
from gpytorch_dnn2gp.infinite import gated, matrix
from gpytorch_dnn2gp.tiling import memory_limit

F64 = torch.float64
FOLDER = Path(__file__).parent / "reference" / "nngp"
SIGMAS = [torch.tensor(v, dtype=F64) for v in (1.5, 1.2, 0.3, 0.9)]
PATHS = 2**8  # enough for laws that hold exactly


def simple(d: int = 3, activation="tanh", sigmas=SIGMAS, **options):
    return infinite.simple_rnn(d, activation, *sigmas, **options)


def of_module(kind, d: int = 3, sigmas=SIGMAS, structure: dict | None = None, **options):
    options = options if kind is nn.RNN else {"paths": PATHS, **options}
    return infinite.recurrent(kind(d, 4, **(structure or {})), *sigmas, **options)


KINDS = {
    "tanh": lambda **options: simple(**options),
    "relu": lambda **options: simple(activation="relu", **options),
    "ntk": lambda **options: simple(activation="erf", kernel="ntk", **options),
    "yang": lambda **options: infinite.gru(3, *SIGMAS, **{"paths": PATHS, **options}),
    "gru": lambda **options: of_module(nn.GRU, **options),
    "lstm": lambda **options: of_module(nn.LSTM, **options),
}


def dense(kernel, *inputs) -> torch.Tensor:
    with torch.no_grad():
        return kernel(*inputs).to_dense()


def tokens_of(x: torch.Tensor, d: int) -> torch.Tensor:
    """Which rows of a matrix of all states are tokens."""
    return infinite.unpack(x, d).mask.flatten()


# ---- reference numbers


def cases(file: str) -> list:
    with np.load(FOLDER / f"{file}.npz") as archive:
        meta = json.loads(str(archive["meta"]))
    return [pytest.param(case["case"], id=case["name"]) for case in meta["cases"]]


def load(archive: dict, case: str) -> tuple[dict, dict, torch.Tensor]:
    """Hyperparameters, the arrays without the case's prefix, and the sequences, packed."""
    (meta,) = [c for c in archive["meta"]["cases"] if c["case"] == case]
    arrays = {key[len(case) + 1 :]: torch.as_tensor(v) for key, v in archive.items() if key.startswith(f"{case}_")}
    x = infinite.pack(list(arrays["tokens"].double().split(arrays["lengths"].tolist())))
    return meta["hyperparameters"], arrays, x


def assert_relative(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def compare_rnn(h: dict, arrays: dict, x: torch.Tensor) -> None:
    d = arrays["tokens"].shape[1]
    sigmas = [torch.tensor(h[name], dtype=F64) for name in ("varu", "varw", "varb", "varv")]
    mask = tokens_of(x, d)
    for readout, name in (("last", "K_last_readout"), ("mean", "K_avgpool_readout"), ("all", "K_readout")):
        kernel = infinite.simple_rnn(d, h["phi"], *sigmas, readout=readout)
        K, diagonal = dense(kernel, x), kernel(x, diag=True)
        if readout == "all":
            K, diagonal = K[mask][:, mask], diagonal[mask]
        assert_relative(K, arrays[name], 1e-10)
        assert_relative(diagonal, arrays[name].diagonal(), 1e-10)


def compare_gru(h: dict, arrays: dict, x: torch.Tensor, paths: int, tolerance: float) -> None:
    d = arrays["tokens"].shape[1]
    sigmas = [torch.tensor([h[f"var{a}{gate}"] for gate in "rzh"], dtype=F64) for a in "UWb"]
    mean = [h[f"mub{gate}"] for gate in "rzh"]
    mask = tokens_of(x, d)
    K = dense(infinite.gru(d, *sigmas, bias_mean=mean, readout="all", paths=paths), x)[mask][:, mask]
    assert (K - arrays["K_hh"]).abs().max() <= tolerance
    ends = arrays["lengths"].cumsum(0) - 1
    assert (K[ends][:, ends] - arrays["K_last"]).abs().max() <= tolerance
    if paths <= 2**12:
        last = dense(infinite.gru(d, *sigmas, bias_mean=mean, paths=paths), x)
        assert (last - arrays["K_last"]).abs().max() <= tolerance


@pytest.mark.parametrize("case", cases("rnn_gp4a"))
def test_rnn_of_gp4a(reference, case):
    compare_rnn(*load(reference("nngp/rnn_gp4a"), case))


@pytest.mark.parametrize("case", cases("rnn_ntk"))
def test_ntk(reference, case):
    h, arrays, x = load(reference("nngp/rnn_ntk"), case)
    d = arrays["tokens"].shape[1]
    sigmas = [torch.tensor(h[name], dtype=F64) for name in ("varu", "varw", "varb", "varv")]
    options = {"readout": h["readout"]}
    assert_relative(dense(infinite.simple_rnn(d, h["phi"], *sigmas, **options), x), arrays["nngp_readout"], 1e-9)
    for parameterization, name in (("ntk", "ntk_unit"), ("plain", "ntk_sum")):
        kernel = infinite.simple_rnn(d, h["phi"], *sigmas, **options, kernel="ntk", parameterization=parameterization)
        assert_relative(dense(kernel, x), arrays[name], 1e-9)
        assert_relative(kernel(x, diag=True), arrays[name].diagonal(), 1e-9)


@pytest.mark.parametrize(("paths", "tolerance"), [(2**12, 2e-3), (2**16, 1e-4), (2**20, 1e-6)])
@pytest.mark.parametrize("case", cases("gru_gp4a"))
def test_gru_of_gp4a(reference, case, paths, tolerance):
    compare_gru(*load(reference("nngp/gru_gp4a"), case), paths, tolerance)


def test_gru_of_gp4a_with_many_paths(reference):
    compare_gru(*load(reference("nngp/gru_gp4a"), "c00"), 2**20, 1e-6)


def glove() -> Path | None:
    """Folder of reference numbers that are made of GloVe vectors, which cannot be passed on here."""
    folder = Path(os.environ.get("DNN2GP_DATA", "/nowhere"))
    return next((path for path in (folder / "reference/nngp", folder.parent / "reference/nngp") if path.exists()), None)


@pytest.mark.skipif(glove() is None, reason="DNN2GP_DATA has no reference numbers beside it")
@pytest.mark.parametrize("file", ["rnn_gp4a", "gru_gp4a"])
def test_sentences_of_gp4a(file):
    with np.load(glove() / f"{file}.npz") as loaded:
        archive = {key: loaded[key] for key in loaded.files}
    archive["meta"] = json.loads(str(archive["meta"]))
    for case in archive["meta"]["cases"]:
        if not case["name"].startswith("glove"):
            continue
        if file == "rnn_gp4a":
            compare_rnn(*load(archive, case["case"]))
        else:
            exact = case["hyperparameters"]["accuracy"] == "miwa"  # else the numbers scatter by 1e-4 themselves
            compare_gru(*load(archive, case["case"]), *((2**20, 1e-6) if exact else (2**14, 5e-4)))


# ---- other roads to the same number


def test_one_token_by_quadrature():
    """torch: h = (1 - z) tanh(a + r b') for a GRU, h = o tanh(i tanh(a)) for an LSTM."""
    token = torch.tensor([[0.7, -0.2]], dtype=F64)
    z = torch.linspace(-9, 9, 121, dtype=F64)
    weights = torch.softmax(-(z**2) / 2, 0)
    signal, bias = 1.5 * token.square().sum() / 2, torch.tensor(0.3, dtype=F64)
    gate = torch.sigmoid((signal + bias).sqrt() * z)
    candidate = (signal + bias / 2 + gate**2 * bias / 2).sqrt()[:, None] * z
    GRU = weights @ gate**2 * (weights @ (candidate.tanh() ** 2 @ weights))
    LSTM = weights @ gate**2 * (weights @ ((gate[:, None] * ((signal + bias).sqrt() * z).tanh()).tanh() ** 2 @ weights))
    for kind, value in ((nn.GRU, GRU), (nn.LSTM, LSTM)):
        K = dense(of_module(kind, 2, paths=2**16), infinite.pack(token.unsqueeze(0))).squeeze()
        assert abs(K / 0.9 - value) <= 1e-4 * value


@pytest.mark.parametrize(
    ("kind", "structure", "options"),
    [
        (nn.RNN, {}, {}),
        (nn.RNN, {"nonlinearity": "relu", "num_layers": 2}, {"readout": "mean"}),
        (nn.RNN, {"bidirectional": True, "bias": False}, {"readout": "all"}),
        (nn.RNN, {}, {"kernel": "ntk"}),
        (nn.RNN, {"num_layers": 2}, {"kernel": "ntk", "parameterization": "plain", "readout": "mean"}),
        (nn.GRU, {}, {"bias_mean": (0.3, 1.0, -0.5)}),
        (nn.GRU, {"bidirectional": True}, {"readout": "all"}),
        (nn.LSTM, {}, {"bias_mean": (0.0, 1.0, 0.2, 0.0)}),
        (nn.LSTM, {"num_layers": 2}, {"readout": "mean"}),
    ],
)
def test_wide_random_nets_agree(kind, structure, options):
    x = infinite.pack(ragged([4, 2, 5], 3))
    net = kind(3, 4, **structure)
    options = {"paths": 2**12, **options} if kind is not nn.RNN else options
    kernel = infinite.recurrent(net, *SIGMAS, **options)
    found = infinite.monte_carlo(net, x, 256, 20, kernel, torch.Generator().manual_seed(0))
    assert found.error < 3 * found.noise
    assert found.noise < 0.06


def test_variances_of_their_own_for_gates_and_layers():
    x = infinite.pack(ragged([3, 4], 3))
    each = [torch.tensor(v, dtype=F64) for v in ((0.5, 1.0, 2.0), (2.0, 1.0, 0.5), (0.1, 0.4, 0.2), 1.0)]
    net = nn.GRU(3, 4)
    kernel = infinite.recurrent(net, *each, paths=2**12)
    assert kernel.input_variance.shape == (3,)
    found = infinite.monte_carlo(net, x, 256, 20, kernel, torch.Generator().manual_seed(0))
    assert found.error < 3 * found.noise
    net = nn.RNN(3, 4, num_layers=3)
    kernel = infinite.recurrent(net, *each)
    found = infinite.monte_carlo(net, x, 256, 20, kernel, torch.Generator().manual_seed(0))
    assert found.error < 3 * found.noise


def test_the_error_of_paths_is_known():
    h, arrays, x = load(_archive("gru_gp4a"), "c00")
    kernel = infinite.gru(4, *(torch.tensor(1.0, dtype=F64),) * 3, readout="all", paths=2**10)
    mask = tokens_of(x, 4)
    true = (dense(kernel, x)[mask][:, mask] - arrays["K_hh"]).square().mean().sqrt() / arrays["K_hh"].abs().max()
    assert h["varUz"] == 1
    assert true / 5 <= kernel.integration_error(x, rules=8) <= 5 * true
    assert simple().integration_error(infinite.pack(ragged([2], 3))) == 0


def _archive(file: str) -> dict:
    with np.load(FOLDER / f"{file}.npz") as archive:
        found = {key: archive[key] for key in archive.files}
    return {**found, "meta": json.loads(str(found["meta"]))}


# ---- laws


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    kind=st.sampled_from(["tanh", "relu", "ntk"]),
    readout=st.sampled_from(["last", "mean", "all"]),
    seed=st.integers(0, 1000),
)
def test_simple_nets_are_positive_semidefinite(lengths, kind, readout, seed):
    sequences = ragged(lengths, 3, seed)
    sequences += [sequences[0], -sequences[0], torch.zeros(3, 3, dtype=F64)]
    K = dense(KINDS[kind](readout=readout), infinite.pack(sequences))
    eigenvalues = torch.linalg.eigvalsh(K)
    assert torch.equal(K, K.mT)
    assert eigenvalues[0] >= -1e-7 * eigenvalues[-1]


@pytest.mark.parametrize("kind", ["yang", "gru", "lstm"])
def test_gated_nets_are_positive_semidefinite_up_to_the_error_of_paths(kind):
    sequences = ragged([4, 2, 5, 3, 1, 4], 3)
    sequences += [sequences[0], torch.cat([sequences[0], sequences[1]]), sequences[3] + 1e-4]
    x = infinite.pack(sequences)
    kernel = KINDS[kind](paths=2**12)
    K = dense(kernel, x)
    assert torch.equal(K, K.mT)
    assert torch.linalg.eigvalsh(K)[0] >= -len(x) * kernel.integration_error(x) * K.abs().max()


@pytest.mark.parametrize("readout", ["last", "mean", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_order_change_nothing(kind, readout):
    x = infinite.pack(ragged([3, 1, 4], 3), max_length=4)
    kernel = KINDS[kind](readout=readout)
    K = dense(kernel, x)
    other = x.clone().view(3, -1)
    for row, length in enumerate([3, 1, 4]):
        other[row, 3 * length : -1] = torch.nan
    torch.testing.assert_close(dense(kernel, other), K, rtol=1e-12, atol=1e-12)
    wider = dense(kernel, infinite.pack(ragged([3, 1, 4], 3), max_length=6))
    wide, narrow = (tokens_of(infinite.pack(ragged([3, 1, 4], 3), max_length=n), 3) for n in (6, 4))
    if readout == "all":
        wider, K = wider[wide][:, wide], K[narrow][:, narrow]
    torch.testing.assert_close(wider, K, rtol=1e-10, atol=1e-12)
    if readout != "all":
        order = torch.tensor([2, 0, 1])
        torch.testing.assert_close(dense(kernel, x[order]), K[order][:, order], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_readouts_agree(kind):
    x = infinite.pack(ragged([3, 1, 4], 3))
    every = dense(KINDS[kind](readout="all"), x)
    mask = tokens_of(x, 3)
    assert not every[~mask].any() and not every[:, ~mask].any()
    blocks = every.view(3, 4, 3, 4).transpose(1, 2)
    lengths = torch.tensor([3, 1, 4])
    last = blocks[torch.arange(3)[:, None], torch.arange(3), lengths[:, None] - 1, lengths - 1]
    torch.testing.assert_close(dense(KINDS[kind](readout="last"), x), last, rtol=1e-7, atol=1e-10)
    mean = blocks.sum((-2, -1)) / (lengths[:, None] * lengths)
    torch.testing.assert_close(dense(KINDS[kind](readout="mean"), x), mean, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU])
def test_both_directions_are_the_mean_of_each(kind):
    sequences = ragged([3, 1, 4], 3)
    x, back = infinite.pack(sequences), infinite.pack([s.flip(0) for s in sequences])
    for readout in ("last", "mean"):
        one, both = (of_module(kind, structure={"bidirectional": b}, readout=readout) for b in (False, True))
        torch.testing.assert_close(dense(both, x), (dense(one, x) + dense(one, back)) / 2)


@pytest.mark.parametrize("readout", ["last", "mean", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_halves_and_diagonal_agree(kind, readout, monkeypatch):
    x = infinite.pack([*ragged([3, 1, 4], 3), ragged([2], 3, 7)[0]])
    kernel = KINDS[kind](readout=readout)
    whole = dense(kernel, x)
    rows = 4 if readout == "all" else 1
    close = {"rtol": 1e-7, "atol": 1e-10}
    torch.testing.assert_close(dense(kernel, x, x.flip(0).clone())[:, :rows], whole[:, -rows:], **close)
    torch.testing.assert_close(kernel(x, diag=True), whole.diagonal(), **close)
    across = whole[: 2 * rows, 2 * rows :]
    torch.testing.assert_close(kernel(x[:2], x[2:], diag=True), across.diagonal(), **close)
    monkeypatch.setitem(matrix.TILE_BYTES, "cpu", 1)
    torch.testing.assert_close(dense(kernel, x), whole, **close)
    torch.testing.assert_close(kernel(x).to_dense().detach(), whole, **close)
    torch.testing.assert_close(dense(kernel, x[:2], x[2:]), across, **close)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_inputs_and_of_hyperparameters(kind):
    x = torch.stack([infinite.pack(ragged([3, 1, 4], 3, seed)) for seed in range(2)])
    kernel = KINDS[kind]()
    each = torch.stack([dense(kernel, one) for one in x])
    torch.testing.assert_close(dense(kernel, x), each)
    if kind == "yang":
        several = infinite.gru(3, SIGMAS[0] * torch.tensor([1.0, 2.0]), *SIGMAS[1:], paths=PATHS, batch_shape=[2])
        double = infinite.gru(3, 2 * SIGMAS[0], *SIGMAS[1:], paths=PATHS)
    else:
        several, double = (
            simple(activation="relu", sigmas=[SIGMAS[0] * torch.tensor(f, dtype=F64), *SIGMAS[1:]], **options)
            for f, options in (([1.0, 2.0], {"batch_shape": [2]}), (2.0, {}))
        )
        kernel = simple(activation="relu")
    found = dense(several, x)
    torch.testing.assert_close(found[0], dense(kernel, x[0]))
    torch.testing.assert_close(found[1], dense(double, x[1]))
    torch.testing.assert_close(several(x, diag=True), found.diagonal(dim1=-2, dim2=-1))


@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind):
    x = infinite.pack(ragged([3, 1, 4], 3))
    kernel = KINDS[kind]()
    K = dense(kernel, x)
    single = dense(kernel.float(), x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), K, rtol=2e-4, atol=1e-5)


def test_the_covariance_of_all_states_is_held_only_where_asked_for():
    x = infinite.pack(torch.randn(40, 50, 2, dtype=F64))
    for make in (lambda readout: simple(2, readout=readout), lambda readout: of_module(nn.LSTM, 2, readout=readout)):
        with memory_limit(4 * 8 * 40 * 40), pytest.raises(MemoryError, match="2000 x 2000"):
            make("all")(x).to_dense()
    with memory_limit(4 * 8 * 40 * 40):
        for readout in ("last", "mean"):
            assert dense(simple(2, readout=readout), x).shape == (40, 40)


def test_gradients_of_long_sequences_have_smaller_tiles(monkeypatch):
    """A gradient keeps every time step of a tile, the value none."""
    pairs, tiles = {}, matrix._tiles

    def watched(n1, n2, count, symmetric):
        pairs[length, torch.is_grad_enabled()] = count
        return tiles(n1, n2, count, symmetric)

    monkeypatch.setattr(matrix, "_tiles", watched)
    for length in (16, 320):
        x = infinite.pack(torch.randn(3, length, 1, dtype=F64))
        for recorded in (False, True):
            with torch.set_grad_enabled(recorded):
                simple(1, "erf")(x).to_dense()
    assert pairs[320, False] == pairs[16, False] == pairs[16, True]
    assert 320 * pairs[320, True] <= 16 * pairs[16, True]


# ---- gradients


@pytest.mark.parametrize("readout", ["last", "mean"])
@pytest.mark.parametrize("kind", ["tanh", "relu", "ntk"])
def test_gradients_of_simple_nets(kind, readout):
    x = infinite.pack(ragged([2, 1, 3], 2))
    options = {"activation": {"tanh": "tanh", "relu": "relu", "ntk": "erf"}[kind]}
    options |= {"kernel": "ntk"} if kind == "ntk" else {}

    def function(tokens, *sigmas):
        kernel = simple(2, sigmas=SIGMAS, readout=readout, **options)
        hyper = dict(zip(kernel._names, (s.view(1) for s in sigmas)))
        z = torch.cat([tokens, x[:, -1:]], -1)
        return matrix.covariance(kernel.program, z, None, hyper, ntk=kernel._ntk)

    inputs = [x[:, :-1].clone().requires_grad_(), *(s.clone().requires_grad_() for s in SIGMAS)]
    assert torch.autograd.gradcheck(function, inputs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["yang", "gru", "lstm"])
def test_gradients_of_gated_nets(kind):
    sequences = ragged([2, 1, 3], 2)
    x = infinite.pack([*sequences, torch.cat([sequences[0], sequences[1]])])  # two begin in the same way
    make = {"yang": lambda: infinite.gru(2, *SIGMAS, paths=2**6)}
    make |= {"gru": lambda: of_module(nn.GRU, 2, paths=2**6), "lstm": lambda: of_module(nn.LSTM, 2, paths=2**6)}
    kernel = make[kind]()

    def function(tokens, *sigmas):
        hyper = dict(zip(kernel._names, (s.view(1) for s in sigmas)))
        return matrix.covariance(kernel.program, torch.cat([tokens, x[:3, -1:]], -1), x[3:], hyper)

    def diagonal(tokens, *sigmas):
        hyper = dict(zip(kernel._names, (s.view(1) for s in sigmas)))
        return matrix.variances(kernel.program, torch.cat([tokens, x[:3, -1:]], -1), hyper, input_shape=None, ntk=None)

    sigmas = [s.clone().requires_grad_() for s in SIGMAS]
    tokens = x[:3, :-1].clone()
    tokens[0] += 0.1  # away from the kink of the estimate where sequences begin in the same way
    for f in (function, diagonal):
        assert torch.autograd.gradcheck(f, [tokens.requires_grad_(), *sigmas], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["yang", "gru", "lstm"])
def test_gradients_of_gated_nets_where_sequences_are_equal_or_begin_so(kind):
    """There differences of the estimate itself say nothing; differences over a distance do."""
    first = ragged([3], 2)[0]
    longer = torch.cat([first[:2], -first[2:]])
    make = {"yang": lambda: infinite.gru(2, *SIGMAS, paths=2**14)}
    make |= {"gru": lambda: of_module(nn.GRU, 2, paths=2**14), "lstm": lambda: of_module(nn.LSTM, 2, paths=2**14)}
    kernel = make[kind]()
    for other in (first, longer):
        y = infinite.pack([other])
        x = infinite.pack([first]).requires_grad_()
        (g,) = torch.autograd.grad(kernel(x, y.clone().requires_grad_()).to_dense().sum(), x)
        for entry in range(4):
            step = torch.zeros_like(y)
            step[0, entry] = 0.1
            with torch.no_grad():
                difference = (kernel(x + step, y).to_dense() - kernel(x - step, y).to_dense()) / 0.2
            assert abs(float(difference - g[0, entry])) <= 0.01


@pytest.mark.parametrize("kind", ["tanh", "gru"])
def test_hyperparameters_are_learned_in_gpytorch(kind):
    x = infinite.pack(ragged([3, 2, 4, 1, 3, 2], 3))
    y = torch.randn(6, dtype=F64)

    class GP(gpytorch.models.ExactGP):
        def __init__(self):
            super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood().double())
            self.mean_module = gpytorch.means.ZeroMean()
            prior = {"input_variance": gpytorch.priors.GammaPrior(2.0, 1.0)}
            self.covar_module = KINDS[kind](priors=prior)

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    gp = GP()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)
    optimizer = torch.optim.Adam(gp.parameters(), lr=0.1)
    values = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = -mll(gp(x), y)
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[-1] < values[0]
    assert all(p.grad is not None for p in gp.covar_module.parameters())
    gp.eval()
    with torch.no_grad():
        posterior = gp(infinite.pack(ragged([2, 3], 3, 5), max_length=4))
    assert posterior.covariance_matrix.shape == (2, 2)
    again = GP()
    again.load_state_dict(gp.state_dict())
    torch.testing.assert_close(again.covar_module.input_variance, gp.covar_module.input_variance)


def test_nodes_do_not_depend_on_how_many_there_are():
    assert torch.equal(gated.nodes(7, 64)[:3], gated.nodes(3, 64))
    z = gated.nodes(5, 2**12)
    torch.testing.assert_close(z @ z.mT / 2**12, torch.eye(5, dtype=F64), rtol=0, atol=0.02)


@pytest.mark.parametrize("make", [infinite.simple_rnn, functools.partial(infinite.gru, paths=64), infinite.transformer])
def test_all_states_of_tokens_that_are_single_numbers(make):
    x = infinite.pack(torch.ones(2, 3, 1, dtype=F64), torch.tensor([3, 2]))
    K = dense(make(1, readout="all").double(), x)
    assert K.shape == (6, 6)
    assert (K.diagonal() > 0).tolist() == [True] * 5 + [False]
    last = dense(make(1).double(), x)
    assert_relative(K[2, 4].view(1), last[0, 1].view(1), 1e-9)
