"""A thousand classes: predictions without a matrix.

K = 1,000 outputs, last layer of 128 features (P = 129,000), n = 256 training points, softmax. The dense sides would be
P x P or n K x n K; conjugate gradients with products of J, the softmax root and their transposes need neither, nor a
K x K block per training point.

    python examples/benchmarks/wide_outputs.py [--points 4] [--float64]
"""

import argparse
import time

import torch
from machine import PeakMemory, describe

import gpytorch_dnn2gp as dnn2gp

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--points", type=int, default=4, help="test points (default 4)")
parser.add_argument("--float64", action="store_true", help="double precision instead of single")
arguments = parser.parse_args()
dtype = torch.float64 if arguments.float64 else torch.float32

torch.manual_seed(0)
features, classes, n = 128, 1000, 256
net = torch.nn.Sequential(torch.nn.Linear(32, features), torch.nn.ReLU(), torch.nn.Linear(features, classes)).to(dtype)
x, y = torch.randn(n, 32, dtype=dtype), torch.randint(0, classes, (n,))
x_test = torch.randn(arguments.points, 32, dtype=dtype)
print(describe("gpytorch"))
print(f"K = {classes}, {features} features, n = {n}, {arguments.points} test points, {dtype}")

for solver in ("weight_space", "function_space"):
    gp = dnn2gp.LaplaceGP(net, x, y, dnn2gp.losses.Categorical(), params="last_layer", solver=solver)
    try:
        gp.predict(x_test)
        print(f"{solver:15s} fits on this machine")
    except MemoryError as refusal:
        print(f"{solver:15s} refused: {refusal}")

gp = dnn2gp.LaplaceGP(net, x, y, dnn2gp.losses.Categorical(), params="last_layer", solver="iterative")
try:
    gp.log_evidence()
except MemoryError as refusal:
    print(f"{'evidence':15s} refused: {refusal}")

memory, start = PeakMemory(), time.perf_counter()
prediction = gp.predict(x_test)
print(
    f"{'iterative':15s} predict: {time.perf_counter() - start:.0f} s, peak memory above the loaded baseline "
    f"{memory.above_baseline() / 1e9:.2f} GB (one K x K block per training point would be "
    f"{n * classes**2 * prediction.mean.element_size() / 1e9:.2f} GB)"
)
print(prediction)
