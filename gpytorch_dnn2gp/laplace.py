"""Trained net + data -> Laplace-GGN: the splitting of the loss's derivatives and its sums over the data.

    paper, eq. (5)                       here                               shape
    phi_i^T                              rows C_i J_i (linearize.Rows)      (n, m, P)
    v_i                                  Splitting.v                        (n, m)
    D_i                                  apply_root(apply_root_t(.))        (n, m, m), never formed
    grad l_i = phi_i v_i,  hess l_i ~ phi_i D_i phi_i^T

Two choices (``features``):
    "jacobian"   C = I,      v = r,  D = Lambda   generalised Gauss-Newton (paper eq. 7), m = K
    "gradient"   C = r^T,    v = 1,  D = 1        empirical Fisher, m = 1
                 (here C = r^T at unit noise s, v = s and D = s^2: a change of noise rescales, and that is all)

The posterior is N(w*, Sigma), Sigma^-1 = sum_i phi_i D_i phi_i^T + S0^-1 (paper eqs. 4 and 7).

n examples, K outputs, P weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import tiling
from .linearize import Rows
from .losses import Loss

FEATURES = ("jacobian", "gradient")


@dataclass(frozen=True)
class Splitting:
    """Gradient and Hessian of each example's loss in terms of its rows; see the module's table.

    Attributes:
        loss: its noise may carry a graph.
        f: outputs ``(n, K)``.
        y: canonical labels (``loss.check_labels``).
        features: "jacobian" or "gradient".
        temperature: the loss is divided by it.
        weight: how often each example counts; multiplies v and D.
        pull: multiplies v once more: ``alpha / beta`` of a training iterate (Theorem 2), 1 at a trained net.
    """

    loss: Loss
    f: Tensor
    y: Tensor
    features: str = "jacobian"
    temperature: float = 1.0
    weight: float = 1.0
    pull: float = 1.0

    @property
    def noise_scale(self) -> Tensor:
        """What v and D change by when the noise or the temperature does: ``1/(sigma^2 T)``, ``(C,)``.

        C is 1, or K with one noise per output. Noise per example (and, for "gradient", per output) is part of
        :meth:`unit` instead, as is the curvature of every loss without noise.
        """
        scale = self.f.new_tensor(1.0) if self._fixed_noise else self.loss.noise.to(self.f).reciprocal()
        return (scale / self.temperature).reshape(-1)

    def unit(self) -> Splitting:
        """The splitting at noise and temperature one: what the sums over the data are taken of."""
        loss = self.loss if self._fixed_noise else self.loss.with_noise(torch.ones_like(self.loss.noise))
        return Splitting(loss, self.f, self.y, self.features)

    @property
    def _fixed_noise(self) -> bool:
        return not self.loss.has_noise or self.loss.noise.dim() > (0 if self.features == "gradient" else 1)

    @property
    def v(self) -> Tensor:
        """Gradients in the rows, ``(n, m)``."""
        if self.features == "gradient":
            return self.noise_scale.expand(len(self.f), 1) * (self.weight * self.pull)
        return self.output_gradient()

    def apply_root(self, a: Tensor) -> Tensor:
        """``R a``, ``(..., n, m)``, where ``D = R R^T``."""
        if self.features == "gradient":
            return a * (self.noise_scale * self.weight**0.5)
        return self.loss.apply_root(self.f, a, self.y) * (self.weight / self.temperature) ** 0.5

    def apply_root_t(self, a: Tensor) -> Tensor:
        """``R^T a`` for ``a`` ``(..., n, m)``."""
        if self.features == "gradient":
            return a * (self.noise_scale * self.weight**0.5)
        return self.loss.apply_root_t(self.f, a, self.y) * (self.weight / self.temperature) ** 0.5

    def at(self, f: Tensor) -> Splitting:
        """The same at other outputs."""
        return replace(self, f=f)

    # The same in output coordinates, for rows J of any example rather than C J

    def output_gradient(self) -> Tensor:
        """``C^T v``, ``(..., n, K)``: ``r / T``, weighted."""
        return self._residual() * (self.weight * self.pull)

    def output_root(self, a: Tensor) -> Tensor:
        """``C^T R a``, ``(..., n, K)``."""
        return a * self._residual() * self.weight**0.5 if self.features == "gradient" else self.apply_root(a)

    def output_root_t(self, a: Tensor) -> Tensor:
        """``R^T C a`` for ``a`` ``(..., n, K)``."""
        if self.features == "gradient":
            return (a * self._residual() * self.weight**0.5).sum(-1, keepdim=True)
        return self.apply_root_t(a)

    def _residual(self) -> Tensor:
        return self.loss.residual(self.f, self.y) / self.temperature

    def cotangents(self) -> Tensor | None:
        """C, ``(n, m, K)``, at noise and temperature one; None for the identity."""
        if self.features == "gradient":
            unit = self.unit()
            return unit.loss.residual(unit.f, unit.y).detach()[:, None, :]
        return None

    def apply_precision(self, a: Tensor) -> Tensor:
        """``D a``, ``(..., n, m)``."""
        if self.features == "gradient":
            return a * (self.noise_scale.square() * self.weight)
        return self.loss.apply_precision(self.f, a, self.y) * (self.weight / self.temperature)

    def data_term(self) -> Tensor:
        """``sum_i log p(y_i | f_i) / T``, weighted."""
        return -self.loss.negative_log_likelihood(self.f, self.y).sum(-1) * (self.weight / self.temperature)

    def part(self, part: slice) -> Splitting:
        """The splitting of some of the examples."""
        return replace(self, loss=self.loss.subset(part), f=self.f[part], y=self.y[part])


@torch.no_grad()
def curvature(
    rows: Rows, splitting: Splitting, *, diagonal: bool = False, per_row: bool = False, progress: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Sums over the data: ``sum_i phi_i D_i phi_i^T`` and ``sum_i phi_i v_i``.

    Args:
        rows: ``phi^T``.
        splitting: v and the root of D.
        diagonal: only the diagonal of the first sum, ``(P,)`` instead of ``(P, P)``.
        per_row: one sum for each of the m rows of an example, which a diagonal D allows.
        progress: True, False, or None for a bar on terminals only.

    Returns:
        ``(C, P, P)`` or ``(C, P)``, and ``(C, P)``, where C = m with ``per_row`` and 1 without.
    """
    if diagonal and not per_row and splitting.features == "jacobian" and isinstance(rows, Rows) and rows.are_many:
        return _diagonal_by_layers(rows, splitting, progress)
    p, num_sums = rows.num_weights, rows.num_rows if per_row else 1
    options = {"dtype": splitting.f.dtype, "device": splitting.f.device}
    second = torch.zeros((num_sums, p) if diagonal else (num_sums, p, p), **options)
    first = torch.zeros((num_sums, p), **options)
    with tiling.progress(None, "Curvature", progress, total=rows.num_examples) as bar:
        for part, u in rows.blocks():  # u: (b, m, P)
            here = splitting.part(part)
            white, v = _dense_root_t(here, u) @ u, here.v
            for c in range(num_sums):
                row = slice(c, c + 1) if per_row else slice(None)
                e = white[:, row].flatten(0, 1)
                if diagonal:
                    second[c] += e.square().sum(0)
                else:
                    second[c].addmm_(e.mT, e)
                first[c] += v[:, row].flatten() @ u[:, row].flatten(0, 1)
            bar.update(part.stop - part.start)
    return second, first


def _diagonal_by_layers(rows: Rows, splitting: Splitting, progress: bool | None) -> tuple[Tensor, Tensor]:
    """``diag(J^T Lambda J)`` and ``J^T v``, each ``(1, P)``, without Jacobians: squares of the rows ``R^T J``."""
    second = torch.zeros(rows.num_weights, dtype=splitting.f.dtype, device=splitting.f.device)
    length = tiling.chunk_length(2 * rows.num_rows**2, splitting.f.dtype, splitting.f.device)
    with tiling.progress(None, "Curvature", progress, total=rows.num_examples) as bar:
        for part in tiling.chunks(rows.num_examples, length):
            second += rows.flat(part).sum_of_squares(_dense_root_t(splitting.part(part), splitting.f[part, :, None]))
            bar.update(part.stop - part.start)
    return second[None], rows.rmatmul(splitting.v)[None]


def _dense_root_t(splitting: Splitting, u: Tensor) -> Tensor:
    """``R^T`` of a chunk of examples, ``(b, q, m)``."""
    eye = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)[:, None].expand(-1, len(u), -1)
    return splitting.apply_root_t(eye).permute(1, 2, 0)
