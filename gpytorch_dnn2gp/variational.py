"""Iterates of training, and any other Gaussian over weights, as Gaussian processes (paper section 4).

    VariationalGP(net, opt.iterate(), x, y, loss)     its posterior over weights is the next iterate (Theorem 2)
    ..., converged=True)                              prior N(0, S0) and noise Lambda^-1: what training converges to
    VariationalGP(net, opt.gaussian(), x, y, loss)    f ~ N(f_m(x), J Sigma_w J^T) for any N(m, Sigma_w) of weights.py
    sampling_predictive(gp, x)                        labels by draws of weights in the net: DNN-Laplace, DNN-VI

n training examples, |B| at hand, K outputs, P weights, S' samples. linear_model.py writes the linear model down.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from gpytorch.distributions import MultivariateNormal
from torch import Tensor, nn

from . import tiling
from .gp import NetworkGP, linearization_for
from .kernels import JacobianKernel
from .linear_model import LinearModel, at_weights
from .linearize import Linearization
from .losses import Loss
from .numerics import cholesky, in_plain_mode, require_like
from .operators import Covariance
from .optim import Iterate
from .prediction import Prediction
from .predictive import of_samples
from .weights import GaussianWeights

AT = ("samples", "mean")


class VariationalGP(NetworkGP):
    """The GP of a training iterate (Theorem 2), or of any Gaussian over weights. Returned in eval mode.

    Of an :class:`Iterate` ``q_t = N(mu_t, (S_t + S0^-1)^-1)`` it is the GP with mean ``J m_t``, kernel ``J V_t J^T``
    and noise ``(beta Lambda)^-1`` on the targets ``J mu_t - (alpha/beta) Lambda^-1 r``, J, Lambda and r taken at the
    samples that the next step draws. Its posterior over weights, ``gp.weight_posterior()``, is the next iterate: always
    for VOGGN and OGGN; for VOGN and OGN the diagonal of its precision is, and with ``structure="diagonal"`` all of it.
    ``gp.prior_precision`` is 1: it multiplies ``V_t^-1``.

    Of a Gaussian of ``weights`` it is ``f ~ N(f_m(x), J Sigma_w J^T)`` at any x, J at the mean; the data are in it
    already, and ``train_x``, ``train_y`` serve the evidence and what is conditioned on later. The evidence compares it
    with the prior, so it needs ``prior_precision``: it is the linear model's ELBO, a lower bound of the Laplace
    evidence, and equal to it where Sigma_w is Laplace's.

    Everything that :class:`LaplaceGP` offers works on both.

    Args:
        net: the net that was trained (its own weights do not matter), or a :class:`Linearization` of it.
        weights: ``opt.iterate()``, or a Gaussian over weights.
        train_x: of an iterate the batch of the next step, else all data; ``(|B|, d)`` or ``(|B|, *input_shape)``.
        train_y: its labels.
        loss: that was trained with, from ``losses``.
        converged: of an iterate, take prior N(0, S0) and noise Lambda^-1, what repeated steps converge to. Exact at a
            fixed point of OGGN; for VOGGN with many samples.
        at: "samples" for J at the samples, "mean" for J at mu_t, as in the paper's experiments.
        num_samples: so many new draws of ``q_t`` in the place of the iterate's own samples.
        prior_precision, groups: of a Gaussian, the prior it was trained with; an iterate knows its own.
        params, input_shape, input_dtype: see :class:`Linearization`; an iterate knows its params.
        solver, structure, progress: see :class:`LaplaceGP`. A full V_t is worked with in weight space.
        generator: of the new draws.

    With several samples the data count once for each, at a net of its own, and predictions are made at mu_t.

    Raises:
        ValueError, TypeError: as :class:`LaplaceGP`; weights that are not this net's; a batch larger than train_size.
    """

    def __init__(
        self,
        net: nn.Module | Linearization,
        weights: Iterate | GaussianWeights,
        train_x: Tensor,
        train_y: Tensor,
        loss: Loss,
        converged: bool = False,
        at: str = "samples",
        num_samples: int | None = None,
        prior_precision: float | Sequence[float] | Tensor | None = None,
        groups: Sequence[str | Sequence[str]] | None = None,
        params: Sequence[str] | str | None = None,
        solver: str = "auto",
        structure: str = "full",
        input_shape: Sequence[int] | None = None,
        input_dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        progress: bool | None = None,
    ) -> None:
        if at not in AT:
            raise ValueError(f"at must be one of {', '.join(map(repr, AT))}; got {at!r}.")
        if isinstance(weights, Iterate):
            if prior_precision is not None or groups is not None:
                raise ValueError("An iterate knows its prior: leave prior_precision and groups out.")
            if num_samples is not None and num_samples < 1:
                raise ValueError(f"num_samples must be one at least; got {num_samples}.")
            if num_samples is not None and at == "mean":
                raise ValueError("at='mean' takes no samples: leave num_samples out, or at.")
            if params is None and not isinstance(net, Linearization):
                params = weights.param_names or None
        elif not isinstance(weights, GaussianWeights):
            raise TypeError(
                f"weights must be an optimizer's iterate() or a Gaussian of gpytorch_dnn2gp.weights; got "
                f"{type(weights).__name__}."
            )
        elif converged or num_samples is not None or structure != "full" or solver != "auto":
            raise ValueError(
                "converged, num_samples, solver and structure are for iterates: a Gaussian over weights is the "
                "posterior itself. Leave them out."
            )
        lin = linearization_for(net, train_x, params, input_shape, input_dtype)
        _require_same_weights(weights, lin)
        features, temperature = "jacobian", 1.0
        if isinstance(weights, Iterate):
            features, temperature = weights.features, weights.temperature
            if num_samples is not None:
                samples = weights.gaussian.rsample((num_samples,), generator)
            else:
                samples = weights.samples if at == "samples" else weights.mean[None]
            kernel, model = _of_iterate(weights, lin, samples, converged)
        else:
            kernel, model = _of_gaussian(weights, lin, prior_precision, groups)
        super().__init__(
            kernel, train_x, train_y, loss, model, solver, structure, features, temperature, None, progress
        )


def _of_iterate(
    it: Iterate, lin: Linearization, samples: Tensor, converged: bool
) -> tuple[JacobianKernel, LinearModel]:
    """Kernel and linear model of Theorem 2, or those it converges to."""
    nets = () if len(samples) == 1 else tuple(at_weights(lin, w) for w in samples)
    lin = at_weights(lin, samples[0] if not nets else it.mean)
    shared = {"mean": it.mean, "train_size": it.train_size, "samples": nets}
    if converged:
        if it.groups:
            kernel = JacobianKernel(lin, it.group_precision, [list(names) for names in it.groups])
        else:
            kernel = JacobianKernel(lin, 1.0, prior_variance=1 / it.prior_precision)
        return kernel, LinearModel(away=it.mean, **shared)
    kernel = JacobianKernel(lin, 1.0, prior_variance=_inverse(it.model_precision))
    return kernel, LinearModel(away=it.mean - it.model_mean, rate=it.beta, pull=it.lr / it.beta, **shared)


def _inverse(precision: Tensor) -> Tensor:
    if precision.dim() == 1:
        return 1 / precision
    return torch.cholesky_inverse(cholesky(precision, "The prior precision V_t^-1 of the iterate"))


def _of_gaussian(
    gaussian: GaussianWeights,
    lin: Linearization,
    prior_precision: float | Sequence[float] | Tensor | None,
    groups: Sequence[str | Sequence[str]] | None,
) -> tuple[JacobianKernel, LinearModel]:
    """The kernel of the prior it came from, if known, and the Gaussian itself."""
    lin, own = at_weights(lin, gaussian.mean), gaussian.prior_precision
    if prior_precision is not None:
        return JacobianKernel(lin, prior_precision, groups), LinearModel(given=gaussian)
    if own is None:
        return JacobianKernel(lin), LinearModel(given=gaussian, prior_known=False)
    delta = own.unique()
    if len(delta) == 1:
        return JacobianKernel(lin, delta[0]), LinearModel(given=gaussian)
    return JacobianKernel(lin, 1.0, prior_variance=1 / own), LinearModel(given=gaussian)


def _require_same_weights(weights: Iterate | GaussianWeights, lin: Linearization) -> None:
    mean = weights.mean
    if mean.shape != (lin.num_weights,):
        raise ValueError(
            f"The Gaussian is over {mean.numel()} weights, but the net has {lin.num_weights} selected ones: "
            f"{', '.join(lin.param_names)}. Choose by params= those it is over."
        )
    names = getattr(weights, "param_names", ())
    if names and tuple(names) != tuple(lin.param_names):
        raise ValueError(
            f"The iterate is of the parameters {', '.join(names)}, but the net has {', '.join(lin.param_names)}."
        )
    require_like(mean, lin.weights, "weights.mean", "the net")


@in_plain_mode
@torch.no_grad()
def sampling_predictive(
    gp: NetworkGP,
    x: Tensor,
    weights: GaussianWeights | None = None,
    num_samples: int = 100,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> Prediction:
    """Labels by draws of weights in the net itself, nothing linearized: the paper's DNN-Laplace and DNN-VI.

    ``p(y) = 1/S sum_s p(y | f_{w_s}(x))``, beside the GP's own ``gp.predict(x)``. The Gaussian is that of ``gp``,
    around the net's weights; with ``structure="diagonal"`` it is the paper's.

    Args:
        gp: a :class:`LaplaceGP` or :class:`VariationalGP`, for the net, the loss and the Gaussian.
        x: ``(..., m, d)``.
        weights: another Gaussian over the same weights.
        num_samples: S.
        generator: of the draws.
        progress: True, False, or None for a bar on terminals only.

    Returns:
        a :class:`Prediction`; ``f`` has the mean and covariance of the draws, for each example.

    Raises:
        ValueError: fewer than two draws, weights that are not this net's, or noise given for each training example.
    """
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2, to have a variance; got {num_samples}.")
    lin = gp.linearization
    if weights is None:
        center = lin.weights if gp.model.given is not None or gp.model.mean is None else gp.weight_posterior().mean
        weights = gp.weight_posterior().at(center)
    _require_same_weights(weights, lin)
    if gp.likelihood.per_example_noise:
        raise ValueError("The noise was given for each training example, so that of new ones is not known.")
    inputs, batch_shape = lin.prepare(x)
    draws = weights.rsample((num_samples,), generator)
    f = torch.stack(
        [
            torch.cat([lin.function(lin.function.unflatten(w), inputs[part]) for part in _chunks(lin, inputs)])
            for w in tiling.progress(draws, "Draws of weights", progress)
        ]
    ).unflatten(1, batch_shape)  # (S, ..., m, K)
    away = f - f.mean(0)
    covariance = torch.einsum("s...k,s...l->...kl", away, away) / (num_samples - 1)
    labels = of_samples(gp.loss, f.movedim(0, -2))
    outputs = MultivariateNormal(f.mean(0), Covariance(covariance))
    return Prediction(labels.mean, labels.aleatoric, labels.epistemic, outputs, labels.y, labels.probs)


def _chunks(lin: Linearization, x: Tensor) -> list[slice]:
    return lin.function._chunks(x, lin.function.activation_size or 1)
