"""Time of infinite-width kernels, beside neural-tangents where that is installed.

1,000 x 1,000 kernels (--n) of fully connected nets on 784 inputs, and 100 x 100 of a convolutional net with pooling on
images of 3 x 16 x 16. Best of some repetitions; for neural-tangents compilation is excluded.

    python examples/benchmarks/infinite_width.py [--threads 2] [--peer-python PYTHON [--peer-path FOLDER]]

PYTHON is an interpreter, of another environment, that imports neural_tangents; FOLDER stands before its path. Without
it the peer's columns stay empty. With --data FOLDER the images are CIFAR-10's pooled 2 x 2; else noise.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

FULLY_CONNECTED = [("relu", 3), ("relu", 20), ("gelu", 3), ("erf", 3)]
PEER = """
import json, os, sys, time
job, path, folder = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
if folder: sys.path.insert(0, folder)
os.environ["JAX_ENABLE_X64"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, numpy as np
import neural_tangents as nt
from neural_tangents import stax
x = np.load(path).astype(job["dtype"])
w, b = job["weight"] ** 0.5, job["bias"] ** 0.5
phi = {"relu": stax.Relu, "gelu": stax.Gelu, "erf": stax.Erf}[job["activation"]]
if job["kind"] == "fc":
    layers = [layer for _ in range(job["depth"]) for layer in (stax.Dense(1, W_std=w, b_std=b), phi())]
else:
    conv = lambda: stax.Conv(1, (3, 3), padding="SAME", W_std=w, b_std=b)
    layers = [conv(), phi(), stax.AvgPool((2, 2), (2, 2)), conv(), phi(), stax.GlobalAvgPool()]
kernel_fn = stax.serial(*layers, stax.Dense(1, W_std=w, b_std=b))[2]
if job["kind"] == "fc":
    within, across = (lambda x: kernel_fn(x, None, "nngp")), (lambda x: kernel_fn(x, x[::-1], "nngp"))
    f = {"within": jax.jit(within), "across": jax.jit(across)}
else:
    batched = nt.batch(kernel_fn, batch_size=job["batch"])
    f = {"within": lambda x: batched(x, None, "nngp"), "across": lambda x: batched(x, x[::-1], "nngp")}
x = jax.device_put(x)
result = {"versions": f"neural-tangents {nt.__version__}, jax {jax.__version__}"}
for name, call in f.items():
    jax.block_until_ready(call(x))
    times = []
    for _ in range(job["repeats"]):
        start = time.perf_counter()
        K = jax.block_until_ready(call(x))
        times.append(time.perf_counter() - start)
    result[name] = min(times)
result["K"] = np.asarray(K)[:3, :3].tolist()
print("RESULT" + json.dumps(result))
"""


def images(folder: Path | None) -> np.ndarray:
    """100 of them, (100, 3, 16, 16)."""
    if folder is None:
        return np.random.default_rng(0).standard_normal((100, 3, 16, 16))
    with np.load(sorted((folder / "cifar10").glob("*.npz"))[0]) as archive:
        x = archive["train_x"][:100].astype(float)
    x = x.reshape(100, 16, 2, 16, 2, 3).mean((2, 4)).transpose(0, 3, 1, 2)
    return (x - x.mean()) / x.std()


def best(repeats: int, kernel, *inputs) -> float:
    kernel(*inputs).to_dense()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        kernel(*inputs).to_dense()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peer-python", help="interpreter that imports neural_tangents")
    parser.add_argument("--peer-path", default="", help="folder put before its path")
    parser.add_argument("--data", type=Path, help="folder with cifar10/*.npz")
    parser.add_argument("--n", type=int, default=1000, help="inputs of the fully connected nets (default 1000)")
    parser.add_argument("--peer-batch", type=int, default=20, help="images per side of its batches (default 20)")
    parser.add_argument("--skip-images", action="store_true")
    parser.add_argument("--only-images", action="store_true")
    arguments = parser.parse_args()

    import torch  # after the thread count is known
    from machine import describe

    from gpytorch_dnn2gp import infinite

    torch.set_num_threads(arguments.threads)
    print(describe("gpytorch"))
    vectors = np.random.default_rng(0).standard_normal((arguments.n, 784))
    jobs = [
        ("fc", activation, depth, dtype) for activation, depth in FULLY_CONNECTED for dtype in ("float32", "float64")
    ]
    jobs = [] if arguments.only_images else jobs
    jobs += [] if arguments.skip_images else [("conv", "relu", 2, "float32")]
    print(f"{'net':>18} {'dtype':>8} {'pairs':>7} {'ours':>8} {'peer':>8} {'ratio':>6}")
    versions = None
    for kind, activation, depth, dtype in jobs:
        x = vectors if kind == "fc" else images(arguments.data)
        if kind == "fc":
            kernel = infinite.fully_connected(depth, activation, 1.8, 0.1)
        else:
            net = torch.nn.Sequential(
                torch.nn.Conv2d(3, 1, 3, padding=1),
                torch.nn.ReLU(),
                torch.nn.AvgPool2d(2),
                torch.nn.Conv2d(1, 1, 3, padding=1),
                torch.nn.ReLU(),
                torch.nn.AdaptiveAvgPool2d(1),
                torch.nn.Flatten(),
                torch.nn.Linear(1, 1),
            )
            kernel = infinite.NNGPKernel(net, 1.8, 0.1, input_shape=(3, 16, 16))
        repeats = arguments.repeats if kind == "fc" else 2
        inputs = torch.as_tensor(x, dtype=getattr(torch, dtype)).flatten(1)
        kernel = kernel.to(inputs)
        with torch.no_grad():
            ours = {
                "within": best(repeats, kernel, inputs),
                "across": best(repeats, kernel, inputs, inputs.flip(0)),
            }
            corner = kernel(inputs[:3], inputs.flip(0)[:3]).to_dense()
        peer = {}
        if arguments.peer_python:
            job = {"kind": kind, "activation": activation, "depth": depth, "dtype": dtype, "weight": 1.8, "bias": 0.1}
            job |= {"repeats": repeats, "batch": arguments.peer_batch}
            with tempfile.NamedTemporaryFile(suffix=".npy") as file:
                np.save(file, x if kind == "fc" else x.transpose(0, 2, 3, 1))
                file.flush()
                command = [arguments.peer_python, "-c", PEER, json.dumps(job), file.name, arguments.peer_path]
                run = subprocess.run(command, capture_output=True, text=True)
            lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT")]
            if not lines:
                raise SystemExit(f"neural-tangents failed under {arguments.peer_python}:\n{run.stderr[-2000:]}")
            peer = json.loads(lines[0][len("RESULT") :])
            versions = peer["versions"]
            theirs = torch.tensor(peer["K"], dtype=torch.float64)
            assert (corner - theirs).abs().max() <= 1e-3 * theirs.abs().max(), "the two kernels differ"
        name = f"{activation}, depth {depth}" if kind == "fc" else "conv, pool"
        for pairs in ("within", "across"):
            end = f"{peer[pairs]:8.4f} {peer[pairs] / ours[pairs]:6.1f}" if peer else f"{'-':>8} {'-':>6}"
            print(f"{name:>18} {dtype:>8} {pairs:>7} {ours[pairs]:8.4f} {end}", flush=True)
    if versions:
        print(f"peer: {versions}")


if __name__ == "__main__":
    main()
