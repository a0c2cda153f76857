"""neural-tangents: structured derivatives, jitted; compilation happens in ``prepare``.

The weights of linear layers are kept as (in, out), as its own layers keep them: with a transpose in the net it loses
the structure and is some hundred times slower. Of the ways to write max-pooling the fastest one stands here.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
from protocol import free_memory, require, serve
from protocol import versions as installed

NUM_OUTPUTS = 10


def linear(p, name, x):
    return x @ p[f"{name}.weight"] + p[f"{name}.bias"]


def conv(p, name, x, stride=1, padding=0):
    y = jax.lax.conv_general_dilated(x, p[f"{name}.weight"], (stride, stride), [(padding, padding)] * 2)
    return y + p[f"{name}.bias"][:, None, None] if f"{name}.bias" in p else y


def max_pool(x):
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).max((3, 5))


def lenet(p, b, x):
    x = max_pool(jax.nn.relu(conv(p, "0", x, padding=2)))
    x = max_pool(jax.nn.relu(conv(p, "3", x)))
    x = jax.nn.relu(linear(p, "7", x.reshape(len(x), -1)))
    return linear(p, "11", jax.nn.relu(linear(p, "9", x)))


def mlp(p, b, x):
    return linear(p, "4", jax.nn.relu(linear(p, "2", jax.nn.relu(linear(p, "0", x)))))


def batch_norm(p, b, name, x):
    scale = p[f"{name}.weight"] / np.sqrt(b[f"{name}.running_var"] + 1e-5)
    return (x - b[f"{name}.running_mean"][:, None, None]) * scale[:, None, None] + p[f"{name}.bias"][:, None, None]


def resnet18(p, b, x):
    x = jax.nn.relu(batch_norm(p, b, "bn", conv(p, "conv", x, padding=1)))
    for i in range(8):
        block, stride = f"blocks.{i}", 2 if i in (2, 4, 6) else 1
        y = jax.nn.relu(batch_norm(p, b, f"{block}.bn1", conv(p, f"{block}.conv1", x, stride, 1)))
        y = batch_norm(p, b, f"{block}.bn2", conv(p, f"{block}.conv2", y, 1, 1))
        if f"{block}.shortcut.0.weight" in p:
            x = batch_norm(p, b, f"{block}.shortcut.1", conv(p, f"{block}.shortcut.0", x, stride))
        x = jax.nn.relu(y + x)
    return linear(p, "head", x.mean((2, 3)))


def layer_norm(p, name, x):
    centred = x - x.mean(-1, keepdims=True)
    normal = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return normal * p[f"{name}.weight"] + p[f"{name}.bias"]


def encoder(p, b, x):
    x = linear(p, "embed", x)
    for layer in ("layers.0", "layers.1"):
        y = layer_norm(p, f"{layer}.norm1", x)
        q, k, v = (linear(p, f"{layer}.{name}", y).reshape(*y.shape[:2], 4, -1).swapaxes(1, 2) for name in "qkv")
        attention = jax.nn.softmax(q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1]), axis=-1)
        x = x + linear(p, f"{layer}.out", (attention @ v).swapaxes(1, 2).reshape(y.shape))
        hidden = jax.nn.gelu(linear(p, f"{layer}.up", layer_norm(p, f"{layer}.norm2", x)), approximate=False)
        x = x + linear(p, f"{layer}.down", hidden)
    return linear(p, "head", x.mean(1))


NETS = {"lenet": lenet, "mlp": mlp, "resnet18": resnet18, "encoder": encoder}


def prepare(case):
    arrays = np.load(case["arrays"])
    x = jnp.asarray(arrays["x"])
    weights = {name[2:]: jnp.asarray(arrays[name]) for name in arrays.files if name.startswith("w/")}
    weights = {name: weight.T.copy() if weight.ndim == 2 else weight for name, weight in weights.items()}
    buffers = {name[2:]: arrays[name] for name in arrays.files if name.startswith("b/")}
    trace = case["what"] == "trace"
    n, K = len(x), 1 if trace else NUM_OUTPUTS
    require(2 * (n * K) ** 2 * x.dtype.itemsize, free_memory())  # the result, and its layers' sum
    net = functools.partial(NETS[case["net"]], b=buffers)
    kernel = nt.empirical_ntk_fn(
        lambda p, x: net(p, x=x),
        trace_axes=(-1,) if trace else (),
        vmap_axes=0,
        implementation=nt.NtkImplementation.STRUCTURED_DERIVATIVES,
    )
    jitted = jax.jit(lambda p, x: kernel(x, None, p))
    jitted(weights, x).block_until_ready()

    def run():
        k = jitted(weights, x).block_until_ready()
        return Result(k * NUM_OUTPUTS if trace else k)  # its trace is divided by the number of outputs

    return run


class Result:
    """``(n, n, K, K)`` as the ``(n K, n K)`` matrix of the others, when it is asked for."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __array__(self, dtype=None, copy=None):
        k = np.asarray(self.kernel)
        return k if k.ndim == 2 else k.transpose(0, 2, 1, 3).reshape(k.shape[0] * k.shape[2], -1)


def versions(case):
    return installed("neural-tangents", "jax", "jaxlib") + f", neural_tangents {nt.__version__}"


if __name__ == "__main__":
    serve(prepare, versions=versions)
