"""One gradient of the Laplace evidence, in one delta for each parameter tensor and in sigma, against laplace-torch.

Red wine's size: n = 1,439, 11 inputs, 2 x 20 tanh, P = 681 (data drawn at random: the time does not depend on them).
Timed apart are the pass over the data, done once, and the gradient, done at each step of an optimiser. Both sides take
all weights and the full covariance, in float64; laplace-torch with each of its backends, the fastest counts.

    python examples/benchmarks/evidence_gradient.py [--laplace-python PYTHON]

--laplace-python names the Python of an environment that has laplace-torch; without it the peer is left out.
"""

import argparse
import json
import subprocess
import sys
import time

import torch
from machine import describe
from torch import nn

N, INPUTS, WIDTH = 1439, 11, 20

PEER = """
import copy, json, sys, time, warnings
import torch
from torch import nn
warnings.filterwarnings("ignore")
torch.set_num_threads(int(sys.argv[1]))
from laplace import Laplace
from laplace.curvature import AsdlGGN, BackPackGGN, CurvlinopsGGN
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(11, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1)).double()
x, y = torch.randn(1439, 11).double(), torch.randn(1439, 1).double()
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=1439)
best = lambda call, k: min(call() for _ in range(k))
out = {}
for backend in (AsdlGGN, BackPackGGN, CurvlinopsGGN):
    try:
        def fit():
            global la
            options = {"subset_of_weights": "all", "hessian_structure": "full", "backend": backend}
            la = Laplace(copy.deepcopy(net), "regression", **options)
            start = time.perf_counter()
            la.fit(loader)
            return time.perf_counter() - start
        def step():
            delta = torch.full((6,), 3.0, dtype=torch.float64, requires_grad=True)
            sigma = torch.tensor(0.64, dtype=torch.float64, requires_grad=True)
            start = time.perf_counter()
            evidence = la.log_marginal_likelihood(delta, sigma)
            gradients = torch.autograd.grad(evidence, (delta, sigma))
            seconds = time.perf_counter() - start
            row = {"evidence": float(evidence), "delta": gradients[0].tolist(), "sigma": float(gradients[1])}
            out[backend.__name__] = row
            return seconds
        times = {"fit": best(fit, 3), "step": best(step, 20)}
        out[backend.__name__] |= times
    except Exception as error:
        out[backend.__name__] = {"failed": repr(error)[:200]}
print(json.dumps(out))
"""


def best(call, repetitions: int) -> float:
    return min(call() for _ in range(repetitions))


def ours() -> dict:
    import gpytorch_dnn2gp as dnn2gp

    torch.manual_seed(0)
    layers = [nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)]
    net = nn.Sequential(*layers).double()
    x, y = torch.randn(N, INPUTS).double(), torch.randn(N, 1).double()
    found = {}

    def fit() -> float:
        start = time.perf_counter()
        gp = dnn2gp.LaplaceGP(net, x, y, dnn2gp.losses.Gaussian(0.64), [3.0] * 6)
        gp.posterior_at()  # takes the sums over the data
        found["gp"] = gp
        return time.perf_counter() - start

    def step() -> float:
        delta = torch.full((6,), 3.0, dtype=torch.float64, requires_grad=True)
        sigma = torch.tensor(0.64, dtype=torch.float64, requires_grad=True)
        start = time.perf_counter()
        evidence = found["gp"].log_evidence(prior_precision=delta, noise=sigma.square())
        gradients = torch.autograd.grad(evidence, (delta, sigma))
        seconds = time.perf_counter() - start
        found.update(evidence=float(evidence.detach()), delta=gradients[0].tolist(), sigma=float(gradients[1]))
        return seconds

    times = {"fit": best(fit, 3), "step": best(step, 20)}
    return times | {name: value for name, value in found.items() if name != "gp"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--laplace-python", help="Python of an environment with laplace-torch")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(describe("gpytorch"))
    results = {"gpytorch_dnn2gp": ours()}
    if arguments.laplace_python is None:
        print("laplace-torch left out: name its Python by --laplace-python")
    else:
        command = [arguments.laplace_python, "-c", PEER, str(arguments.threads)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"laplace-torch did not run:\n{run.stderr}")
        results |= {f"laplace-torch {name}": row for name, row in json.loads(run.stdout.splitlines()[-1]).items()}
    print(f"{'':28} {'pass over data':>15} {'one gradient':>13} {'evidence':>12} {'d/d sigma':>12}")
    for name, row in results.items():
        if "failed" in row:
            print(f"{name:28} failed: {row['failed']}")
            continue
        print(
            f"{name:28} {1e3 * row['fit']:12.1f} ms {1e3 * row['step']:10.1f} ms {row['evidence']:12.4f} "
            f"{row['sigma']:12.4f}"
        )


if __name__ == "__main__":
    main()
