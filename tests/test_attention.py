"""Attention at infinite width: reference numbers, laws, gradients, modules; docs/gotchas.md has what is refused."""

import json

import gpytorch
import numpy as np
import pytest
import torch
from test_infinite_golden import cases, compare, load
from torch import nn

from gpytorch_dnn2gp import infinite
from gpytorch_dnn2gp.infinite import matrix

F64 = torch.float64
MAKERS = {"transformer": infinite.transformer, "attention": infinite.attention}


def ragged(*lengths: int, d: int = 3, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, d, dtype=F64, generator=generator) for length in lengths]


def dense(kernel, *inputs) -> torch.Tensor:
    with torch.no_grad():
        return kernel(*inputs).to_dense()


def number(value) -> torch.Tensor:
    """In double precision, and so the kernel."""
    return torch.as_tensor(value, dtype=F64)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> bool:
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


def transformer(h: dict, input_size: int, **options) -> infinite.TransformerKernel:
    given = {"temperature": h["temp"], "causal": h.get("causal", True), "readout": h.get("readout", "last")} | options
    return infinite.transformer(
        input_size, h["depth"], number(h["vu"]), h["vw"], h["vb"], h.get("varv", 1.0), **given
    ).double()


def packed(arrays: dict) -> tuple[torch.Tensor, int]:
    tokens = arrays["tokens"]
    return infinite.pack(list(tokens.split(arrays["lengths"].tolist()))), tokens.shape[1]


# ---- reference numbers


def require_transformer(h: dict, arrays: dict) -> None:
    x, d = packed(arrays)
    for readout, name in (("last", "K_last"), ("mean", "K_mean")):
        kernel = transformer(h, d, readout=readout)
        assert close(dense(kernel, x), arrays[name], 1e-9)
        assert close(kernel(x, diag=True), arrays[name].diagonal(), 1e-9)
    L = (x.shape[1] - 1) // d
    rows = torch.cat([torch.arange(n) + i * L for i, n in enumerate(arrays["lengths"].tolist())])
    K = dense(transformer(h, d, readout="all"), x)
    assert K.shape == (len(x) * L,) * 2
    assert close(K[rows][:, rows], arrays["K_exact"], 1e-9)
    assert K.count_nonzero() == len(rows) ** 2


@pytest.mark.parametrize(("file", "case"), cases("transformer_gp4a"))
def test_transformer_has_the_reference_numbers(reference, file, case):
    require_transformer(*load(reference, file, case))


@pytest.mark.parametrize("case", ["c00", "c01"])
def test_transformer_has_the_published_numbers_of_two_sentences(data_dir, case):
    path = data_dir.parent / "reference" / "nngp" / "transformer_gp4a.npz"
    if not path.exists():
        pytest.skip("there are no reference numbers for the GloVe sentences beside the data")
    with np.load(path) as archive:
        (meta,) = [c for c in json.loads(str(archive["meta"]))["cases"] if c["case"] == case]
        arrays = {name[4:]: torch.from_numpy(archive[name]) for name in archive if name.startswith(f"{case}_")}
    require_transformer(meta["hyperparameters"], arrays)


GROUPS = {
    "v": "head",
    "U": "keys",
    "W1": "hidden.weight",
    "b1": "hidden.bias",
    "W2": "outputs.weight",
    "b2": "outputs.bias",
}


@pytest.mark.parametrize(("file", "case"), cases("transformer_ntk"))
def test_ntk_of_the_transformer_has_the_reference_numbers(reference, file, case):
    h, arrays = load(reference, file, case)
    x, d = packed(arrays)
    assert close(dense(transformer(h, d), x), arrays["nngp_readout"], 1e-9)
    assert close(dense(transformer(h, d, kernel="ntk"), x), arrays["ntk_unit"], 1e-9)
    assert close(dense(transformer(h, d, kernel="ntk", parameterization="plain"), x), arrays["ntk_sum"], 1e-9)
    for group, part in GROUPS.items():  # a module of which only these weights are trained
        options = {"depth": h["depth"], "causal": h["causal"], "temperature": h["temp"], "readout": h["readout"]}
        net = infinite.YangTransformer(d, 2, **options, dtype=F64)
        for name, p in net.named_parameters():
            p.requires_grad_(part in name)
        special = {"attention": h["vu"], "head": h["varv"]}
        names = infinite.NNGPKernel(net).layers
        variances = [next((v for key, v in special.items() if key in name), h["vw"]) for name in names]
        kernel = infinite.NTKKernel(net, number(variances), h["vb"], input_size=d, parameterization="plain")
        assert close(dense(kernel, x), arrays[f"ntk_{group}"], 1e-9)


@pytest.mark.parametrize(("file", "case"), cases("attention_nt"))
@pytest.mark.parametrize("which", ["nngp", "ntk"])
def test_attention_has_the_reference_numbers(reference, file, case, which):
    h, arrays = load(reference, file, case)
    C, T, w = h["C"], h["T"], h["sigma_w2"]
    scores, value, output = h["sigma_q"] * h["sigma_k"], h["sigma_v"] ** 2, h["sigma_o"] ** 2
    if h["kind"] == "block":
        given = h["blocks"], "softmax", number(scores), value, output, w, h["sigma_b2"]
        kernel = infinite.attention(C, *given, kernel=which)
        compare(kernel, which, "conv", *(infinite.pack(arrays[name]) for name in ("X1", "X2")), arrays)
        return
    top = [infinite.MeanState(), nn.Linear(2, 1)] if h["top"] == "gap" else [nn.Flatten(), nn.Linear(2 * T, 1)]
    attention = infinite.SelfAttention(2, h["mechanism"].lower())
    net = nn.Sequential(nn.Linear(C, 2), nn.ReLU(), nn.Linear(2, 2), attention, nn.ReLU(), *top).double()
    variances = torch.stack([torch.as_tensor(v, dtype=F64) for v in (w, w, scores, value, output, w)])
    kind = {"nngp": infinite.NNGPKernel, "ntk": infinite.NTKKernel}[which]
    kernel = kind(net, variances, h["sigma_b2"], input_shape=(T, C))
    compare(kernel, which, "conv", arrays["X1"].flatten(1), arrays["X2"].flatten(1), arrays)


def test_relu_weights_by_hand():
    """One layer on raw tokens, read by the mean: K = r^T A X X'^T A'^T r' with A = relu(sigma_q sigma_k X X^T / d)."""
    first, second = ragged(4, 2)
    net = Reads(infinite.SelfAttention(3, "relu", bias=False), infinite.MeanState(), 3).double()
    kernel = infinite.NNGPKernel(net, [1.7, 0.6, 0.8, 1.3], 0.0, input_size=3)
    mixed = [torch.relu(1.7 * s @ s.mT / 3) @ s for s in (first, second)]
    means = torch.stack([s.mean(0) for s in mixed])
    assert close(dense(kernel, infinite.pack([first, second])), 0.6 * 0.8 * 1.3 * means @ means.mT / 3, 1e-12)


class Reads(nn.Module):
    """A layer of attention, a state that is read, a readout."""

    def __init__(self, attention: nn.Module, state: nn.Module, width: int) -> None:
        super().__init__()
        self.attention, self.state, self.head = attention, state, nn.Linear(width, 1, bias=False)

    def forward(self, x, lengths=None):
        return self.head(self.state(self.attention(x, lengths), lengths=lengths))


# ---- laws


@pytest.mark.parametrize("kind", ["nngp", "ntk"])
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("readout", ["last", "mean", "all"])
def test_padding_order_tiles_and_halves_change_nothing(maker, kind, causal, readout, monkeypatch):
    sequences = ragged(3, 1, 4, 2)
    sequences[2][0] = sequences[0][1]
    kernel = MAKERS[maker](3, 2, causal=causal, readout=readout, kernel=kind).double()
    x = infinite.pack(sequences)
    K = dense(kernel, x)
    assert torch.equal(K, K.mT)
    eigenvalues = torch.linalg.eigvalsh(K)
    assert eigenvalues[0] >= -1e-9 * eigenvalues[-1]
    assert close(kernel(x, diag=True), K.diagonal(), 1e-7)
    rows = 4 if readout == "all" else 1
    order = torch.tensor([2, 0, 3, 1])
    places = (order[:, None] * rows + torch.arange(rows)).flatten()
    assert close(dense(kernel, x[order], x), K[places], 1e-7)
    assert close(dense(kernel, x[order]), K[places][:, places], 1e-7)
    assert close(dense(kernel, x[:1], x[1:]), K[:rows, rows:], 1e-7)
    assert close(kernel(x, x[order], diag=True), K[torch.arange(4 * rows), places], 1e-7)
    monkeypatch.setitem(matrix.TILE_BYTES, "cpu", 1)
    assert close(dense(kernel, x), K, 1e-9)
    if readout != "all":
        padded = infinite.pack(sequences, max_length=7)
        padded[1, 3:-1] = torch.nan
        assert close(dense(kernel, padded), K, 1e-12)


def test_a_causal_transformer_does_not_look_ahead():
    first, second = ragged(4, 3)
    kernel = infinite.transformer(3, 2, readout="all").double()
    whole = dense(kernel, infinite.pack([first, second]))
    other = first.clone()
    other[3] += 1
    changed = dense(kernel, infinite.pack([other, second]))
    assert torch.equal(changed[:3, :3], whole[:3, :3])
    assert not close(changed[3, :3], whole[3, :3], 1e-3)


def test_equal_tokens_are_exact():
    """The published code errs by 1e-5 there."""
    (s,) = ragged(3)
    kernel = infinite.transformer(3, 2, causal=False, readout="all").double()
    K = dense(kernel, infinite.pack([torch.cat([s, s[:1]])]))
    assert close(K[0, 3], K[0, 0], 1e-13)


def test_tokens_of_zeros_have_no_direction():
    kernel = infinite.transformer(3, 2, bias_variance=0.0).double()
    x = infinite.pack([torch.zeros(2, 3, dtype=F64), *ragged(2)]).requires_grad_()
    K = kernel(x).to_dense()
    (g,) = torch.autograd.grad(K[1].sum(), x)
    assert K.isfinite().all()
    assert g.isfinite().all()
    assert K[0].abs().max() == 0


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("kind", ["nngp", "ntk"])
@pytest.mark.parametrize("readout", ["last", "mean"])
def test_gradients_in_inputs_and_hyperparameters(maker, kind, readout):
    kernel = MAKERS[maker](2, 1, readout=readout, kernel=kind).double()
    kernel.bias_variance = 0.3
    names = [name for name, _ in kernel.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in kernel.parameters()]
    x = infinite.pack(ragged(2, 3, d=2)).requires_grad_()

    def f(x, *values):
        return torch.func.functional_call(kernel, dict(zip(names, values)), (x, x), {"diag": False}).to_dense()

    def g(tokens, *values):  # lengths are no numbers to be moved
        return f(torch.cat([tokens, x.detach()[:, -1:]], -1), *values)

    assert torch.autograd.gradcheck(g, (x.detach()[:, :-1].requires_grad_(), *values), fast_mode=True)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("kind", ["nngp", "ntk"])
def test_single_precision_and_batches(maker, kind):
    first, second = infinite.pack(ragged(2, 3)), infinite.pack(ragged(3, 1, seed=1))
    double = MAKERS[maker](3, 2, kernel=kind).double()
    K = dense(MAKERS[maker](3, 2, kernel=kind), first.float())
    assert K.dtype == torch.float32
    assert close(K.double(), dense(double, first), 1e-4)
    both = torch.stack([first, second])
    assert close(dense(double, both)[1], dense(double, second), 1e-12)
    several = MAKERS[maker](3, 2, weight_variance=torch.tensor([0.7, 1.9]), kernel=kind, batch_shape=[2]).double()
    one = MAKERS[maker](3, 2, weight_variance=torch.tensor(1.9), kernel=kind).double()
    assert close(dense(several, first)[1], dense(one, first), 1e-12)
    assert close(several(both, diag=True)[1], dense(one, second).diagonal(), 1e-12)


# ---- modules and kernels


@pytest.mark.parametrize("readout", ["last", "mean"])
def test_the_module_the_constructor_and_layers_of_ones_own_have_one_kernel(readout):
    x = infinite.pack(ragged(3, 4))
    kernel = infinite.transformer(3, 2, number(1.3), 1.8, 0.2, 0.7, readout=readout)
    net = infinite.YangTransformer(3, 5, depth=2, readout=readout, dtype=F64)
    module = infinite.NNGPKernel(net, number([1.3, 1.8, 1.8, 1.3, 1.8, 1.8, 0.7]), 0.2, input_size=3)
    assert kernel.layers == module.layers
    assert close(dense(module, x), dense(kernel, x), 1e-14)
    each = infinite.transformer(3, 2, number([1.3, 1.3]), [1.8] * 4, [0.2] * 4, 0.7, readout=readout)
    assert each.weight_variance.shape == (4,)
    assert close(dense(each, x), dense(kernel, x), 1e-14)


def test_finite_modules_do_not_read_padding():
    sequences = ragged(2, 4)
    for readout in ("last", "mean", "all"):
        for net in (
            infinite.YangTransformer(3, 5, depth=2, causal=False, readout=readout, dtype=F64),
            Reads(
                infinite.SelfAttention(3), {"mean": infinite.MeanState()}.get(readout, infinite.LastState()), 3
            ).double(),
        ):
            s = infinite.unpack(infinite.pack(sequences), 3)
            both, alone = net(s.tokens, s.lengths)[0], net(sequences[0][None])[0]
            both = both[:2] if both.dim() > 1 else both
            torch.testing.assert_close(both, alone)


def test_priors_and_constraints_by_name():
    prior = gpytorch.priors.GammaPrior(2.0, 1.0)
    kernel = infinite.transformer(3, priors={"key_variance": prior})
    assert [name for name, *_ in kernel.named_priors()] == ["key_variance_prior"]
    kernel.key_variance = 2.5
    assert kernel.key_variance.item() == pytest.approx(2.5)
    with pytest.raises(ValueError, match="There is no hyperparameter 'depth'"):
        infinite.transformer(3, priors={"depth": prior})


def test_sigmas_are_learned_by_marginal_likelihood():
    torch.manual_seed(0)
    sequences = ragged(*torch.randint(1, 5, (12,)).tolist())
    x, y = infinite.pack(sequences), torch.stack([s.mean() for s in sequences])

    class Regression(gpytorch.models.ExactGP):
        def __init__(self):
            super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood().double())
            self.mean_module = gpytorch.means.ZeroMean()
            self.covar_module = infinite.transformer(3, 1, bias_variance=0.1, readout="mean").double()

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    gp = Regression()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)
    optimizer, losses = torch.optim.Adam(gp.parameters(), 0.1), []
    for _ in range(15):
        optimizer.zero_grad()
        loss = -mll(gp(x), y)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in gp.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    gp.eval()
    with torch.no_grad():
        assert gp(infinite.pack(ragged(2, 3, seed=5), max_length=(x.shape[1] - 1) // 3)).mean.shape == (2,)


def test_only_a_tile_of_all_states_is_held(monkeypatch):
    """The readout's matrix alone is as large as all pairs of sequences."""
    monkeypatch.setitem(matrix.TILE_BYTES, "cpu", 8 * 6 * 6 * 10)  # ten pairs of six tokens
    largest, apply = [0], infinite.State.linear

    def watched(self, A, **changes):
        out = apply(self, A, **changes)
        if not self.run.within:
            largest[0] = max(largest[0], out.k.numel())
        return out

    monkeypatch.setattr(infinite.State, "linear", watched)
    dense(infinite.transformer(3).double(), infinite.pack(ragged(*[6] * 20)))
    assert 0 < largest[0] <= 6 * 6 * 10


# ---- wide nets


class Blocks(nn.Module):
    """An attention net of one's own: an embedding, a residual around attention, LayerNorm, the mean."""

    def __init__(self, weights: str) -> None:
        super().__init__()
        self.embedding, self.attention = nn.Linear(3, 4), infinite.SelfAttention(4, weights)
        self.norm, self.state, self.head = nn.LayerNorm(4), infinite.MeanState(), nn.Linear(4, 1)

    def forward(self, x, lengths=None):
        x = self.embedding(x)
        return self.head(self.state(torch.relu(self.norm(x + self.attention(x, lengths))), lengths))


@pytest.mark.parametrize("readout", ["last", "mean", "all"])
@pytest.mark.parametrize(("kind", "parameterization"), [("nngp", "ntk"), ("ntk", "ntk"), ("ntk", "plain")])
def test_wide_transformers_converge_to_the_kernel(kind, parameterization, readout):
    x, generator = infinite.pack(ragged(2, 4, 3)), torch.Generator().manual_seed(0)
    options = {"readout": readout, "kernel": kind, "parameterization": parameterization}
    kernel = infinite.transformer(3, 1, number(1.5), 1.7, 0.2, 0.8, **options)
    net = infinite.YangTransformer(3, 4, readout=readout, dtype=F64)
    require_convergence(infinite.monte_carlo(net, x, (24, 96), 60, kernel, generator, progress=False))


@pytest.mark.parametrize("weights", ["softmax", "identity", "relu"])
@pytest.mark.parametrize("kind", [infinite.NNGPKernel, infinite.NTKKernel])
def test_wide_nets_with_self_attention_converge(weights, kind):
    x, generator = infinite.pack(ragged(2, 4, 3)), torch.Generator().manual_seed(0)
    net = Blocks(weights).double()
    kernel = kind(net, number([1.2, 0.8, 1.1, 0.9, 1.3]), 0.2, input_size=3)
    require_convergence(infinite.monte_carlo(net, x, (24, 96), 60, kernel, generator, progress=False))


def require_convergence(found: infinite.MonteCarlo) -> None:
    """The wider net spreads half as much, and its mean is off by chance alone and a bias of order 1/width."""
    narrow, wide = found.widths
    assert found.spread[1] < 0.65 * found.spread[0]
    assert found.error[1] < 2.5 * found.noise[1] + 3 / wide
