"""Hyperparameters by evidence, without a validation set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize

from . import tiling
from .gp import LaplaceGP


@dataclass(frozen=True)
class EvidenceFit:
    """What :func:`fit_evidence` did.

    Attributes:
        evidence_before, evidence_after: in nats.
        prior_precision: delta at the end, ``(G,)``.
        noise: sigma^2 at the end, or None.
        num_evaluations: of the evidence and its gradient, one factorisation each.
        converged: whether the optimiser says so.
        message: its words.
    """

    evidence_before: float
    evidence_after: float
    prior_precision: torch.Tensor
    noise: torch.Tensor | None
    num_evaluations: int
    converged: bool
    message: str

    def __repr__(self) -> str:
        noise = "" if self.noise is None else f", noise {np.round(self.noise.cpu().numpy(), 6)}"
        return (
            f"EvidenceFit({self.evidence_before:.2f} -> {self.evidence_after:.2f} nats in {self.num_evaluations} "
            f"evaluations: prior_precision {np.round(self.prior_precision.cpu().numpy(), 6)}{noise}"
            f"{'' if self.converged else ', NOT converged: ' + self.message})"
        )


def fit_evidence(
    gp: LaplaceGP,
    kind: str = "laplace",
    fit_noise: bool | None = None,
    max_iterations: int = 200,
    log_range: float = 25.0,
    progress: bool | None = None,
) -> EvidenceFit:
    """Choose ``prior_precision`` and ``noise`` by maximising the evidence: L-BFGS on their logarithms.

    The net stays as it is, so each step costs one factorisation and no Jacobian. Priors registered on the
    hyperparameters are added. The raw parameters of a residual kernel are fitted too. If interrupted, the GP is left at
    its best point so far.

    Args:
        gp: changed in place: its ``prior_precision`` and ``noise``.
        kind: "laplace" (any loss) or "gp".
        fit_noise: whether sigma is fitted too; None means where the loss has a learnable one.
        max_iterations: of L-BFGS.
        log_range: how far the logarithms may move from where they start, a guard against maxima at infinity.
        progress: True, False, or None for a bar on terminals only.

    Raises:
        ValueError: for a noise that cannot be fitted, or an evidence that does not exist.
    """
    learnable = gp.noise is not None and not gp.likelihood.per_example_noise
    if gp.features == "gradient" and learnable and gp.noise.dim() > 0:
        learnable = False  # the rows r^T J themselves change with it
    if fit_noise and not learnable:
        raise ValueError(
            f"There is no learnable noise in {gp.loss} with features={gp.features!r}: one given per example is fixed, "
            "and so is one per output for the empirical Fisher. Leave fit_noise out."
        )
    fit_noise = learnable if fit_noise is None else fit_noise

    residual = [] if gp.residual_kernel is None else [p for p in gp.residual_kernel.parameters() if p.requires_grad]
    delta0 = gp.prior_precision.detach().clone()
    noise0 = gp.noise.detach().clone() if fit_noise else None
    num_groups = delta0.numel()
    start = delta0.log().flatten()
    if fit_noise:
        start = torch.cat([start, noise0.log().flatten()])
    num_logs = len(start)
    start = torch.cat([start, *(p.detach().flatten() for p in residual)])
    bar = tiling.progress(None, "Evidence", progress, unit=" evaluations")
    history: list[tuple[float, np.ndarray, float]] = []  # objective, logarithms, evidence

    def set_to(theta: torch.Tensor) -> None:
        gp.prior_precision = theta[:num_groups].exp()
        if fit_noise:
            gp.noise = theta[num_groups:num_logs].exp().reshape(noise0.shape)
        set_residual(theta)

    def set_residual(theta: torch.Tensor) -> None:
        with torch.no_grad():
            for p, piece in zip(residual, theta[num_logs:].split([p.numel() for p in residual]), strict=True):
                p.copy_(piece.view_as(p))

    def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
        theta = torch.as_tensor(values).to(start).requires_grad_()
        set_residual(theta)
        with torch.enable_grad():
            noise = theta[num_groups:num_logs].exp().reshape(noise0.shape) if fit_noise else None
            evidence = gp.log_evidence(kind, prior_precision=theta[:num_groups].exp(), noise=noise)
            total = evidence + _log_priors(gp, theta[:num_groups].exp(), noise)
            gradient, *others = torch.autograd.grad(total, [theta, *residual])
            gradient = torch.cat([gradient[:num_logs], *(g.flatten() for g in others)])
        history.append((float(total.detach()), values.copy(), float(evidence.detach())))
        bar.update()
        bar.set_postfix(evidence=f"{history[-1][2]:.2f}")
        return -history[-1][0], -gradient.double().cpu().numpy()

    x0 = start.double().cpu().numpy()
    try:
        result = minimize(
            objective,
            x0,
            jac=True,
            method="L-BFGS-B",
            bounds=list(zip(x0 - log_range, x0 + log_range, strict=True)),
            options={"maxiter": max_iterations},
        )
    finally:
        bar.close()
        if history:
            set_to(torch.as_tensor(max(history, key=lambda item: item[0])[1]).to(start))
    return EvidenceFit(
        history[0][2],
        max(history, key=lambda item: item[0])[2],
        gp.prior_precision.detach().clone(),
        None if gp.noise is None else gp.noise.detach().clone(),
        len(history),
        bool(result.success),
        str(result.message),
    )


def _log_priors(gp: LaplaceGP, prior_precision: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """Log densities of the priors registered on the hyperparameters, at these values."""
    total = prior_precision.new_zeros(())
    for name, module, prior, closure, _ in gp.named_priors():
        short = name.rpartition(".")[2]
        if module is gp.covar_module and short == "prior_precision_prior":
            value = prior_precision
        elif module is gp.likelihood and short == "noise_prior" and noise is not None:
            value = noise
        else:
            value = closure(module).detach()
        total = total + prior.log_prob(value).sum()
    return total
