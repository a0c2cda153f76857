"""Infinite-width kernels against reference numbers: NNGP and NTK, from a module and from the explicit constructor."""

import json
from pathlib import Path

import infinite_nets as nets
import numpy as np
import pytest
import torch

from gpytorch_dnn2gp import infinite
from gpytorch_dnn2gp.infinite import integrals

FOLDER = Path(__file__).parent / "reference" / "nngp"
TOLERANCES = {  # largest error over largest entry, of NNGP and NTK
    "fc_numeric": (1e-8, 1e-8),
    "fc_gelu": (1e-10, 1e-10),
    "fc_sin": (1e-10, 1e-10),
    "conv": (1e-10, 1e-7),
    "residual_layernorm": (1e-10, 1e-7),
}


def cases(*files: str) -> list:
    found = []
    for file in files:
        with np.load(FOLDER / f"{file}.npz") as archive:
            meta = json.loads(str(archive["meta"]))
        found += [pytest.param(file, case["case"], id=f"{file}-{case['name']}") for case in meta["cases"]]
    return found


FULLY_CONNECTED = sorted(path.stem for path in FOLDER.glob("fc_*.npz"))


def load(reference, file: str, case: str) -> tuple[dict, dict]:
    """Hyperparameters, and the arrays without the case's prefix; `nngp` etc. are the exact values, if any."""
    data = reference(f"nngp/{file}")
    (meta,) = [c for c in data["meta"]["cases"] if c["case"] == case]
    arrays = {key[len(case) + 1 :]: value for key, value in data.items() if key.startswith(f"{case}_")}
    for key in [key for key in arrays if key.endswith("_exact")]:
        arrays[key.removesuffix("_exact")] = arrays[key]
    h = meta["hyperparameters"]
    for name in {"sigma_w2", "sigma_b2"} & h.keys():
        h[name] = torch.tensor(h[name], dtype=torch.float64)
    return h, arrays


def compare(kernel, which: str, file: str, x1, x2, arrays) -> None:
    tolerance = TOLERANCES.get(file, (1e-10, 1e-6))[which == "ntk"]
    within, across = arrays[f"{which}_11"], arrays[which]
    with torch.no_grad():
        checks = [
            (kernel(x1, x2).to_dense(), across),
            (kernel(x1).to_dense(), within),
            (kernel(x1, diag=True), within.diagonal()),
        ]
    for ours, theirs in checks:
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize(("file", "case"), cases(*FULLY_CONNECTED))
def test_fully_connected_from_depth_and_sigma(reference, file, case):
    h, arrays = load(reference, file, case)
    activation = h["activation"]
    if activation == "leaky_relu":
        activation = integrals.Rectifier(h["negative_slope"])
    if activation == "sigmoid_like":
        activation = integrals.Erf(0.5, nets.SIGMOID_LIKE, 0.5)
    given = (h["depth"], activation, h["sigma_w2"], h["sigma_b2"])
    standard = {"parameterization": "standard", "width": h["width"]} if "parameterization" in h else {}
    compare(infinite.fully_connected(*given), "nngp", file, arrays["X1"], arrays["X2"], arrays)
    ntk = infinite.fully_connected(*given, kernel="ntk", **standard)
    compare(ntk, "ntk", file, arrays["X1"], arrays["X2"], arrays)


@infinite.rule(nets.Activation)
def _(module: nets.Activation) -> infinite.Pointwise:
    known = {torch.erf: "erf", torch.sin: "sin", torch.abs: "abs"}
    return infinite.Pointwise(integrals.dual(known.get(module.phi, module.phi)))


@pytest.mark.parametrize(("file", "case"), cases(*FULLY_CONNECTED))
def test_fully_connected_from_a_module(reference, file, case):
    h, arrays = load(reference, file, case)
    if h["activation"] == "sigmoid_like":
        activation = nets.Activation(nets.sigmoid_like)  # no closed form is known for the function: the series
    else:
        activation = nets.activation_module(h["activation"], h.get("negative_slope"))
    net = nets.fully_connected(h["depth"], activation, arrays["X1"].shape[1], width=h.get("width", 8))
    variances = h["sigma_w2"], h["sigma_b2"]
    file = "fc_numeric" if h["activation"] == "sigmoid_like" else file
    compare(infinite.NNGPKernel(net, *variances), "nngp", file, arrays["X1"], arrays["X2"], arrays)
    ntk = infinite.NTKKernel(net, *variances, parameterization=h.get("parameterization", "ntk"))
    compare(ntk, "ntk", file, arrays["X1"], arrays["X2"], arrays)


def images(arrays: dict) -> tuple:
    """Channels first and flattened, with the shape of one image."""
    x1, x2 = (arrays[name].permute(0, 3, 1, 2) for name in ("X1", "X2"))
    return x1.flatten(1), x2.flatten(1), tuple(x1.shape[1:])


@pytest.mark.parametrize(("file", "case"), cases("conv"))
def test_convolutional(reference, file, case):
    h, arrays = load(reference, file, case)
    x1, x2, shape = images(arrays)
    net = nets.convolutional(h)
    for which, kind in (("nngp", infinite.NNGPKernel), ("ntk", infinite.NTKKernel)):
        compare(kind(net, h["sigma_w2"], h["sigma_b2"], input_shape=shape), which, file, x1, x2, arrays)
        explicit = infinite.convolutional(
            h["depth"],
            h["activation"],
            h["sigma_w2"],
            h["sigma_b2"],
            input_shape=shape,
            filter=h["filter"],
            stride=h["strides"],
            padding=0 if h["padding"] == "VALID" else None,
            padding_mode="circular" if h["padding"] == "CIRCULAR" else "zeros",
            average_pool=h["avgpool"][0] if "avgpool" in h else None,
            top="pool" if h["top"] == "gap" else "flatten",
            kernel=which,
        )
        compare(explicit, which, file, x1, x2, arrays)


@pytest.mark.parametrize(("file", "case"), cases("residual_layernorm"))
def test_residual_and_layer_norm(reference, file, case):
    h, arrays = load(reference, file, case)
    x1, x2, shape = arrays["X1"], arrays["X2"], None
    if "shape" in h:
        net = nets.WideResNet()
        x1, x2, shape = images(arrays)
    else:
        net = nets.residual(h, x1.shape[1])
    for which, kind in (("nngp", infinite.NNGPKernel), ("ntk", infinite.NTKKernel)):
        compare(kind(net, h["sigma_w2"], h["sigma_b2"], input_shape=shape), which, file, x1, x2, arrays)
