"""gpytorch_dnn2gp: ``Linearization.gram`` and its kin. ``prepare`` runs it on two examples, with its self-check."""

from __future__ import annotations

import gemms
from loading import Result, cuda_peak, free, load, wait
from protocol import require, serve
from protocol import versions as installed

import gpytorch_dnn2gp as dnn2gp


def linearization(case):
    net, x = load(case)
    return dnn2gp.Linearization(net, input_shape=tuple(x.shape[1:])), x


def prepare(case):
    lin, x = linearization(case)
    functions = {
        "gram": lambda x: lin.gram(x),
        "diagonal": lambda x: lin.gram(x, prior_variance=prior_variance(lin)),
        "trace": lambda x: lin.trace_gram(x),
        "trace of the full one": lambda x: trace(lin.gram(x), lin.num_outputs),
    }
    compute = functions[case["what"]]
    compute(x[:2])
    full = case["what"] != "trace"
    require(1.2 * (len(x) * (lin.num_outputs if full else 1)) ** 2 * x.element_size(), free(case))

    def run():
        k = compute(x)
        wait(case)
        return Result(k)

    return run


def prior_variance(lin):
    """Of each weight its own, between 1/2 and 3/2."""
    return 1 + 0.5 * (lin.weights * 1000).sin()


def trace(k, num_outputs):
    """``(n, n)``: the sum over the diagonals of the ``K x K`` blocks."""
    return sum(k[i::num_outputs, i::num_outputs] for i in range(num_outputs))


def gemm_times(case):
    """The matrix products of the cheapest contraction of each layer, each timed alone."""
    net, x = load(case)
    return gemms.timed(gemms.cheapest(net, x), case, x.dtype)


def versions(case):
    return installed("gpytorch-dnn2gp", "torch", "gpytorch")


if __name__ == "__main__":
    serve(prepare, versions=versions, cuda_peak=cuda_peak, gemm_times=gemm_times)
