"""Dense hand computations in float64: the other side of every comparison. Nothing here imports the package.

    paper            here       shape
    J_*(x_i)         J          (n, K, P)    one example after the other, torch.func.jacrev
    r_i, Lambda_i    r, lam     (n, K), (n, K, K)
    S0^-1            s0_inv     (P,)         prior precision of each weight
    g                g          (P,)         J^T r + S0^-1 w, zero at a minimiser
    Sigma            sigma      (P, P)       (J^T Lambda J + S0^-1)^-1, inverted as it stands

Flat order is example-major, output-minor. Everything but J is differentiable in the prior precision and the noise.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.functional import logsigmoid, one_hot, softplus

LOG_2PI = math.log(2 * math.pi)


def assert_close(actual: Tensor, expected: Tensor, tol: float = 1e-8, what: str = "") -> None:
    """Largest absolute difference over largest absolute entry of ``expected``, at most ``tol``."""
    actual, expected = torch.as_tensor(actual).detach(), torch.as_tensor(expected).detach()
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} is not {tuple(expected.shape)}"
    error = relative_error(actual, expected)
    assert error <= tol, f"{what}: relative error {error:.2e} > {tol:.0e}"


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Infinite if either holds a NaN or an infinity."""
    actual, expected = torch.as_tensor(actual).detach().double(), torch.as_tensor(expected).detach().double()
    if not (torch.isfinite(actual).all() and torch.isfinite(expected).all()):
        return math.inf
    scale = float(expected.abs().max())
    return float((actual - expected).abs().max()) / (scale or 1.0)


# ---- a net, its outputs and its Jacobian


def outputs(net: nn.Module, x: Tensor) -> Tensor:
    """(n, K) in eval mode, from a copy."""
    f = copy.deepcopy(net).eval()(x).detach()
    return f[:, None] if f.dim() == 1 else f


def selected(net: nn.Module, names: list[str] | None = None) -> dict[str, Tensor]:
    """Parameters that require a gradient, or those whose names begin with one of ``names``."""
    return {
        name: p.detach().clone()
        for name, p in net.named_parameters()
        if (p.requires_grad if names is None else any(name == m or name.startswith(m + ".") for m in names))
    }


def weights(net: nn.Module, names: list[str] | None = None) -> Tensor:
    """(P,) in the order of named_parameters."""
    return torch.cat([p.flatten() for p in selected(net, names).values()])


def jacobian(net: nn.Module, x: Tensor, names: list[str] | None = None) -> Tensor:
    """(n, K, P): reverse mode, one example after the other."""
    net, chosen = copy.deepcopy(net).eval(), selected(net, names)
    rows = []
    for x_i in x:
        J_i = jacrev(lambda w, x_i=x_i: functional_call(net, w, (x_i[None],)).reshape(-1))(chosen)
        rows.append(torch.cat([J_i[name].flatten(1) for name in chosen], dim=1).detach())
    return torch.stack(rows)


def per_group(net: nn.Module, deltas: list, groups: list[list[str]] | None = None) -> Tensor:
    """Prior precision of each weight, (P,): one per parameter tensor, or one per list of name prefixes."""
    names = list(selected(net))
    groups = groups or [[name] for name in names]
    pieces = []
    for name in names:
        (index,) = [i for i, g in enumerate(groups) if any(name == m or name.startswith(m + ".") for m in g)]
        pieces.append(torch.as_tensor(deltas[index], dtype=torch.float64).expand(selected(net)[name].numel()))
    return torch.cat(pieces)


# ---- losses: -log p(y|f), its gradient and its Hessian (or Fisher) in f, from the table of the paper's losses


@dataclass
class HandLoss:
    """One of ``gaussian``, ``bernoulli``, ``categorical``, ``poisson``, ``log_sigma``, ``natural``, ``log_cosh``."""

    name: str
    noise: Tensor | float = 1.0  # sigma^2 of a Gaussian: (), (K,) or (n, K)

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        """Summed over examples, all constants of p(y|f) in."""
        if self.name == "gaussian":
            s2 = torch.as_tensor(self.noise, dtype=f.dtype).expand_as(f)
            return (0.5 * (f - y) ** 2 / s2 + 0.5 * s2.log() + 0.5 * LOG_2PI).sum()
        if self.name == "bernoulli":
            return -(y * logsigmoid(f) + (1 - y) * logsigmoid(-f)).sum()
        if self.name == "categorical":
            return -(self._one_hot(f, y) * f.log_softmax(-1)).sum()
        if self.name == "poisson":
            return (f.exp() - y * f + torch.lgamma(y + 1)).sum()
        if self.name == "log_cosh":
            return (f - y).cosh().log().sum()
        m, s2 = self._moments(f)
        return (0.5 * (y - m) ** 2 / s2 + 0.5 * s2.log() + 0.5 * LOG_2PI).sum()

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        """r, (n, K)."""
        if self.name == "gaussian":
            return (f - y) / torch.as_tensor(self.noise, dtype=f.dtype)
        if self.name == "bernoulli":
            return f.sigmoid() - y
        if self.name == "categorical":
            return f.softmax(-1) - self._one_hot(f, y)
        if self.name == "poisson":
            return f.exp() - y
        if self.name == "log_cosh":
            return (f - y).tanh()
        m, s2 = self._moments(f)
        if self.name == "log_sigma":
            return torch.cat([(m - y) / s2, 1 - (m - y) ** 2 / s2], -1)
        return torch.cat([m - y, m**2 + s2 - y**2], -1)  # natural: E[(y, y^2)] - (y, y^2)

    def lam(self, f: Tensor, y: Tensor) -> Tensor:
        """Lambda, (n, K, K)."""
        if self.name == "gaussian":
            return torch.diag_embed(1 / torch.as_tensor(self.noise, dtype=f.dtype).expand_as(f))
        if self.name == "bernoulli":
            return torch.diag_embed(f.sigmoid() * (-f).sigmoid())
        if self.name == "categorical":
            p = f.softmax(-1)
            return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        if self.name == "poisson":
            return torch.diag_embed(f.exp())
        if self.name == "log_cosh":
            return torch.diag_embed(1 / (f - y).cosh() ** 2)
        m, s2 = self._moments(f)
        if self.name == "log_sigma":
            return torch.diag_embed(torch.cat([1 / s2, torch.full_like(s2, 2.0)], -1))
        # natural: Cov[(y, y^2)]
        top, bottom = torch.cat([s2, 2 * m * s2], -1), torch.cat([2 * m * s2, 4 * m**2 * s2 + 2 * s2**2], -1)
        return torch.stack([top, bottom], -2)

    @staticmethod
    def _one_hot(f: Tensor, y: Tensor) -> Tensor:
        return y if y.is_floating_point() else one_hot(y, f.shape[-1]).to(f)

    def _moments(self, f: Tensor) -> tuple[Tensor, Tensor]:
        assert f.shape[-1] == 2, "one label each"
        if self.name == "log_sigma":
            return f[:, :1], (2 * f[:, 1:]).exp()
        s2 = -0.5 / f[:, 1:]  # f = (m / sigma^2, -1 / (2 sigma^2))
        return f[:, :1] * s2, s2


class NegativeSecond(nn.Module):
    """(a, b) -> (a, -softplus(b) - 0.1): natural parameters of a Gaussian."""

    def forward(self, f: Tensor) -> Tensor:
        return torch.cat([f[:, :1], -softplus(f[:, 1:]) - 0.1], -1)


# ---- the P x P side


@dataclass
class Dense:
    """One linearised problem: everything by hand from J, w, f, r, Lambda, S0^-1."""

    J: Tensor
    w: Tensor
    f: Tensor
    r: Tensor
    lam: Tensor
    nll: Tensor
    s0_inv: Tensor
    diagonal: bool = False

    @property
    def ggn(self) -> Tensor:
        G = torch.einsum("nkp,nkl,nlq->pq", self.J, self.lam, self.J)
        return torch.diag(G.diagonal()) if self.diagonal else G

    @property
    def precision(self) -> Tensor:
        return self.ggn + torch.diag(self.s0_inv)

    @property
    def sigma(self) -> Tensor:
        return torch.linalg.inv(self.precision)

    @property
    def g(self) -> Tensor:
        return torch.einsum("nkp,nk->p", self.J, self.r) + self.s0_inv * self.w

    @property
    def weight_mean(self) -> Tensor:
        """Posterior mean of the linear model: one Gauss-Newton step."""
        return self.w - torch.linalg.solve(self.precision, self.g)

    def gram(self, J1: Tensor | None = None, J2: Tensor | None = None) -> Tensor:
        """k = J S0 J'^T, flattened."""
        A, B = (self.J if J is None else J for J in (J1, J2))
        return (A.flatten(0, 1) / self.s0_inv) @ B.flatten(0, 1).T

    def covariance(self, J_test: Tensor) -> Tensor:
        """J_* Sigma J_*^T, (m K, m K)."""
        flat = J_test.flatten(0, 1)
        return flat @ torch.linalg.solve(self.precision, flat.T)

    def mean(self, J_test: Tensor, f_test: Tensor) -> Tensor:
        """f_* - J_* Sigma g, (m, K)."""
        return f_test - J_test @ torch.linalg.solve(self.precision, self.g)

    @property
    def log_evidence(self) -> Tensor:
        """log p(y|f) - 1/2 w^T S0^-1 w + 1/2 log|S0^-1| - 1/2 log|Sigma^-1|."""
        log_det = torch.linalg.slogdet(self.precision).logabsdet
        return -self.nll - 0.5 * (self.s0_inv * self.w**2).sum() + 0.5 * self.s0_inv.log().sum() - 0.5 * log_det

    @property
    def newton_decrement(self) -> Tensor:
        """g^T Sigma g."""
        return self.g @ torch.linalg.solve(self.precision, self.g)

    # The regression of Theorem 1. Lambda is inverted: only where it can be.

    @property
    def y_dual(self) -> Tensor:
        """y~_i = J_i w - Lambda_i^-1 r_i, (n, K)."""
        return self.J @ self.w - torch.linalg.solve(self.lam, self.r)

    @property
    def gp_log_evidence(self) -> Tensor:
        """log N(y~; 0, k + Lambda^-1)."""
        return gp_log_evidence(self.gram(), self.y_dual, self.lam)


def block_diagonal(blocks: Tensor) -> Tensor:
    """(n, K, K) to (n K, n K)."""
    return torch.block_diag(*blocks)


def gp_log_evidence(k: Tensor, targets: Tensor, noise_precision: Tensor) -> Tensor:
    """log N(targets; 0, k + noise) of a Gaussian process, (n K, n K) in full."""
    C, y = k + block_diagonal(torch.linalg.inv(noise_precision)), targets.flatten()
    return -0.5 * (y @ torch.linalg.solve(C, y) + torch.linalg.slogdet(C).logabsdet + len(y) * LOG_2PI)


def gp_regression(
    k: Tensor, k_cross: Tensor, k_test: Tensor, targets: Tensor, noise_precision: Tensor
) -> tuple[Tensor, Tensor]:
    """Posterior mean (m K,) and covariance (m K, m K) of a zero-mean Gaussian process; ``k_cross`` is (m K, n K)."""
    C = k + block_diagonal(torch.linalg.inv(noise_precision))
    return k_cross @ torch.linalg.solve(C, targets.flatten()), k_test - k_cross @ torch.linalg.solve(C, k_cross.T)


def empirical_fisher(dense: Dense) -> Dense:
    """Paper eq. 5 with phi = J^T r, D = 1, v = 1: the same posterior algebra with one row r_i^T J_i per example."""
    phi_t = torch.einsum("nk,nkp->np", dense.r, dense.J)[:, None]
    ones = torch.ones(len(phi_t), 1, dtype=phi_t.dtype)
    return Dense(phi_t, dense.w, dense.f, ones, ones[:, :, None], dense.nll, dense.s0_inv)
