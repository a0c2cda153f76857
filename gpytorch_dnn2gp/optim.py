"""Training whose iterates are Gaussians over weights: VOGGN, OGGN, VOGN, OGN (paper section 4).

    q_t = N(mu_t, Sigma_t),  Sigma_t^-1 = S_t + S0^-1;  gradients and curvature at w_s ~ q_t, s = 1..S'

    S_{t+1}  = (1 - beta) S_t + beta (n/|B|) 1/S' sum_s sum_i J_i^T Lambda_i J_i
    mu_{t+1} = mu_t - lr (S_{t+1} + S0^-1)^-1 ((n/|B|) 1/S' sum_s sum_i J_i^T r_i + S0^-1 mu_t)

                 S_t                       where J, Lambda, r are taken
    VOGGN        P x P                     samples of q_t
    OGGN         P x P                     mu_t; its fixed points are minimisers of the loss
    VOGN         its diagonal              samples of q_t
    OGN          its diagonal              mu_t

First come the pure steps :func:`precision_step` and :func:`mean_step`, then :class:`Iterate`, what Theorem 2 reads of
an iterate, then thin ``torch.optim`` shells. Unlike most of the package these train the net they are given.

Momentum gamma: the bracket above is averaged, ``M_{t+1} = gamma M_t + (1 - gamma) (...)``. Bias correction starts the
averages at the first batch, as Adam does: with ``beta_t = beta / (1 - (1 - beta)^(t+1))`` in the place of beta (and
gamma likewise) S_t is what Adam calls the corrected average, so that one step keeps its form and Theorem 2 holds.

n training examples, |B| of them in a batch, K outputs, P weights. Read laplace.py first, dual.py and gp.py next.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import laplace, tiling
from .jacobians import NetFunction
from .linearize import Linearization, Rows, select_parameters
from .losses import Loss
from .numerics import cholesky, in_plain_mode, require_finite, require_positive
from .squares import SquaredRows
from .weights import DiagonalGaussian, GaussianWeights, WhitenedGaussian, weight_groups

__all__ = ["OGGN", "OGN", "VOGGN", "VOGN", "Iterate", "mean_step", "precision_step"]


# ---- the steps


def precision_step(data_precision: Tensor, curvature: Tensor, beta: float | Tensor) -> Tensor:
    """``S_{t+1} = (1 - beta) S_t + beta * curvature``.

    Args:
        data_precision: S_t, ``(P, P)``, or ``(P,)`` for its diagonal.
        curvature: ``J^T Lambda J`` of the same shape, scaled to all n examples and averaged over samples.
        beta: in (0, 1]; ``(P,)`` for a diagonal.
    """
    return (1 - beta) * data_precision + beta * curvature


def mean_step(
    mean: Tensor, data_precision: Tensor, gradient: Tensor, prior_precision: Tensor, lr: float | Tensor
) -> Tensor:
    """``mu_{t+1} = mu_t - lr (S_{t+1} + S0^-1)^-1 gradient``.

    Args:
        mean: mu_t, ``(P,)``.
        data_precision: S_{t+1}, ``(P, P)`` or ``(P,)``: that of the next iterate.
        gradient: of the loss with its penalty, ``J^T r + S0^-1 mu_t``, or its running average, ``(P,)``.
        prior_precision: diagonal of S0^-1, ``(P,)``.
        lr: step length; ``(P,)`` for a diagonal.
    """
    if data_precision.dim() == 1:
        return mean - lr * gradient / (data_precision + prior_precision)
    factor = cholesky(data_precision + torch.diag(prior_precision), "The precision S + S0^-1 of the iterate")
    return mean - lr * torch.cholesky_solve(gradient[:, None], factor)[:, 0]


def corrected(rate: float, steps: int) -> float:
    """The weight of a new value in an average over ``steps`` values before it that starts at the first (Adam's).

    Args:
        rate: weight of a new value in the long run, in (0, 1].
        steps: how many values there were.
    """
    return rate / (1 - (1 - rate) ** (steps + 1))


# ---- what Theorem 2 reads


@dataclass(frozen=True)
class Iterate:
    """A Gaussian ``q_t`` of training and the step that comes next: what ``VariationalGP`` makes a GP of (Theorem 2).

    Attributes:
        mean: mu_t, ``(P,)``, in ``named_parameters`` order.
        data_precision: S_t, ``(P, P)``, or ``(P,)`` for VOGN and OGN.
        prior_precision: diagonal of S0^-1, ``(P,)``.
        samples: the w_s that the next step takes J, Lambda and r at, ``(S', P)``; mu_t itself for OGGN and OGN.
        lr: alpha of the next step, times the weight of its gradient where there is momentum.
        beta: of the next step, bias correction included.
        drift: what moves the mean without any data, ``alpha S0^-1 mu_t``, ``(P,)``; with momentum also its past.
        train_size: n.
        temperature: the loss is divided by it.
        features: "jacobian" for ``J^T Lambda J``, "gradient" for squared gradients of each example.
        param_names: of the weights.
        groups, group_precision: names of the parameters in each prior group, and its delta, ``(G,)``; no names where
            weights of one parameter have precisions of their own.
    """

    mean: Tensor
    data_precision: Tensor
    prior_precision: Tensor
    samples: Tensor
    lr: float
    beta: float
    drift: Tensor
    train_size: int
    temperature: float = 1.0
    features: str = "jacobian"
    param_names: tuple[str, ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()
    group_precision: Tensor | None = None

    @property
    def diagonal(self) -> bool:
        """Whether S_t is kept by its diagonal."""
        return self.data_precision.dim() == 1

    @property
    def precision(self) -> Tensor:
        """``Sigma_t^-1 = S_t + S0^-1``, ``(P, P)`` or ``(P,)``."""
        return _plus_prior(self.data_precision, self.prior_precision)

    @property
    def gaussian(self) -> GaussianWeights:
        """``q_t``."""
        return _gaussian(self.mean, self.precision)

    @property
    def model_precision(self) -> Tensor:
        """``V_t^-1 = (1 - beta) Sigma_t^-1 + beta S0^-1``, of the linear model's prior, ``(P, P)`` or ``(P,)``."""
        return _plus_prior((1 - self.beta) * self.data_precision, self.prior_precision)

    @property
    def model_mean(self) -> Tensor:
        """``m_t = mu_t - V_t drift``: its prior mean, ``(P,)``."""
        if self.diagonal:
            return self.mean - self.drift / self.model_precision
        factor = cholesky(self.model_precision, "The prior precision V_t^-1 of the iterate")
        return self.mean - torch.cholesky_solve(self.drift[:, None], factor)[:, 0]

    def __repr__(self) -> str:
        kind = "diagonal" if self.diagonal else "full"
        return (
            f"Iterate({len(self.mean)} weights, {kind} covariance, {len(self.samples)} sample(s), lr {self.lr:.3g}, "
            f"beta {self.beta:.3g}, train_size {self.train_size})"
        )


def _plus_prior(data_precision: Tensor, prior_precision: Tensor) -> Tensor:
    prior = prior_precision if data_precision.dim() == 1 else torch.diag(prior_precision)
    return data_precision + prior


def _gaussian(mean: Tensor, precision: Tensor) -> GaussianWeights:
    if precision.dim() == 1:
        return DiagonalGaussian(mean, 1 / precision)
    return WhitenedGaussian(mean, torch.ones_like(mean), cholesky(precision, "The precision of the iterate"))


# ---- torch.optim shells


class GaussNewton(torch.optim.Optimizer):
    """What :class:`VOGGN`, :class:`OGGN`, :class:`VOGN` and :class:`OGN` share; see these.

    Between steps the net's parameters are the mean mu_t. Everything else is in ``state_dict``, the random numbers of
    samples among it, so that a run that is resumed goes on to the bit.
    """

    diagonal: bool
    samples_weights: bool

    def __init__(
        self,
        net: nn.Module,
        loss: Loss,
        train_size: int,
        prior_precision: float | Sequence[float] | Tensor = 1.0,
        lr: float = 0.1,
        beta: float = 0.1,
        momentum: float = 0.0,
        bias_correction: bool = False,
        groups: Sequence[str | Sequence[str]] | None = None,
        params: Sequence[str] | str | None = None,
        initial_precision: float | None = None,
        temperature: float = 1.0,
        features: str = "jacobian",
        mc_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(net, nn.Module):
            raise TypeError(
                f"The first argument is the net itself, as per-example curvature is needed; got {type(net).__name__}."
            )
        if not isinstance(loss, Loss):
            raise TypeError(f"loss must come from gpytorch_dnn2gp.losses; got {type(loss).__name__}.")
        if features not in laplace.FEATURES:
            raise ValueError(f"features must be one of {', '.join(map(repr, laplace.FEATURES))}; got {features!r}.")
        _require_count(train_size, "train_size")
        _require_count(mc_samples, "mc_samples")
        require_positive(torch.as_tensor(float(temperature)), "temperature")
        names = select_parameters(net, params)
        parameters = dict(net.named_parameters())
        delta = torch.as_tensor(prior_precision, dtype=torch.float64).detach()
        require_positive(delta, "prior_precision")
        partition = weight_groups(names, [parameters[name].numel() for name in names], groups, delta.numel())
        self.net, self.loss, self.train_size = net, loss, train_size
        self.mc_samples, self.temperature, self.features = mc_samples, float(temperature), features
        self.bias_correction = bias_correction
        self._function = NetFunction(net, names)
        self._curvature = SquaredRows(self._function) if self.diagonal else self._function
        self._group_index = partition.index(next(net.parameters()).device)
        self._names = names
        self._checked = self._complete = False
        self._set_aside: Tensor | None = None  # the mean, while a sample is in the net

        # one torch group for each group of weights, its parameters by the place of their weights
        starts = [part.start for part in self._function.slices()]
        owners = partition.index(torch.device("cpu"))[starts].tolist()
        values = delta.reshape(-1).expand(len(partition)).tolist()
        self._group_names = [
            tuple(name for name, owner in zip(names, owners, strict=True) if owner == number)
            for number in range(len(partition))
        ]
        param_groups = [
            {"params": [parameters[name] for name in group], "prior_precision": value}
            for group, value in zip(self._group_names, values, strict=True)
        ]
        super().__init__(param_groups, {"lr": lr, "beta": beta, "momentum": momentum, "prior_precision": 1.0})
        self._complete = True
        self._require_rates()

        mean = self.mean
        p = len(mean)
        if not self.diagonal:
            tiling.require_memory(
                5 * p * p,
                mean.dtype,
                mean.device,
                f"{type(self).__name__}'s matrices of {p} x {p} weights",
                "Use VOGN or OGN, which keep diagonals, or fewer params.",
            )
        start = float(train_size if initial_precision is None else initial_precision)
        if not (math.isfinite(start) and start >= 0):
            raise ValueError(f"initial_precision must be finite and not negative; got {start}.")
        data_precision = torch.full_like(mean, start)
        if generator is None:  # seeded by torch's own, so that torch.manual_seed decides
            generator = torch.Generator(mean.device).manual_seed(int(torch.randint(2**62, ())))
        self.state["gaussian"] = {
            "data_precision": data_precision if self.diagonal else torch.diag(data_precision),
            "momentum": torch.zeros_like(mean),
            "steps": 0,
            "generator": generator.get_state(),
            "params": self._identity(),
        }
        self._watch_loading()

    def _watch_loading(self) -> None:
        self.register_load_state_dict_pre_hook(_before_loading)
        self.register_load_state_dict_post_hook(_after_loading)

    def __getstate__(self) -> dict:
        """All but hooks: a copy, or what comes out of a pickle, trains a net of its own, ``copy.net``."""
        return {name: value for name, value in self.__dict__.items() if not name.endswith("_hooks")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._watch_loading()

    def add_param_group(self, param_group: dict) -> None:
        """Refused once the optimizer is made: which weights share what is told by ``groups`` and ``params``."""
        if getattr(self, "_complete", False):
            raise ValueError("Parameters cannot be added later: make a new optimizer of the net, with groups=.")
        super().add_param_group(param_group)

    # ---- the Gaussian

    @property
    def mean(self) -> Tensor:
        """mu_t, ``(P,)``: a copy of the net's parameters, in ``named_parameters`` order.

        Within :meth:`posterior_sample`, when the parameters are a draw, it still is the mean.
        """
        return self._function.weights() if self._set_aside is None else self._set_aside.clone()

    @property
    def data_precision(self) -> Tensor:
        """S_t, ``(P, P)``, or ``(P,)`` for VOGN and OGN."""
        return self.state["gaussian"]["data_precision"]

    @property
    def prior_precision(self) -> Tensor:
        """Diagonal of S0^-1, ``(P,)``."""
        mean = self.mean
        return mean.new_tensor([group["prior_precision"] for group in self.param_groups])[self._group_index]

    @property
    def steps(self) -> int:
        """How many there were."""
        return self.state["gaussian"]["steps"]

    def gaussian(self) -> GaussianWeights:
        """``q_t = N(mu_t, (S_t + S0^-1)^-1)``."""
        return _gaussian(self.mean, _plus_prior(self.data_precision, self.prior_precision))

    def iterate(self) -> Iterate:
        """A snapshot of ``q_t`` and of the next step, with the very samples that it will draw.

        Raises:
            ValueError: groups that differ in lr, beta or momentum: such a step is no regression.
        """
        rates = self._require_rates()
        if any(isinstance(rate, Tensor) for rate in rates):
            raise ValueError(
                "The groups differ in lr, beta or momentum. A step is inference in a linear model (Theorem 2) where "
                "all weights share these; each group may have its own prior_precision."
            )
        lr, beta, kept = rates
        mean, state = self.mean, self.state["gaussian"]
        drift = lr * (kept * state["momentum"] + (1 - kept) * self.prior_precision * mean)
        samples, _ = self._draw()
        return Iterate(
            mean,
            state["data_precision"].clone(),
            self.prior_precision,
            samples,
            lr * (1 - kept),
            beta,
            drift,
            self.train_size,
            self.temperature,
            self.features,
            tuple(self._names),
            tuple(self._group_names) if all(self._group_names) else (),
            mean.new_tensor([group["prior_precision"] for group in self.param_groups]),
        )

    @contextlib.contextmanager
    def posterior_sample(self, generator: torch.Generator | None = None) -> Iterator[Tensor]:
        """Put a draw of ``q_t`` into the net, and the mean back at the end, whatever happens in between.

        Args:
            generator: of the draw; torch's own without it. The random numbers of the steps are left alone.

        Yields:
            the weights, ``(P,)``.
        """
        if self._set_aside is not None:
            raise RuntimeError("There is a sample in the net already: leave the other posterior_sample() first.")
        with self._weights_in_net(self.gaussian().rsample(generator=generator)) as weights:
            yield weights

    # ---- training

    @in_plain_mode
    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step on a batch. There is no closure, as each example's own curvature is needed, not the loss's gradient.

        The net is evaluated in eval mode (dropout off, normalisation by running statistics): a Jacobian of each example
        needs a function of one example. Its mode is restored.

        Args:
            x: inputs as the net takes them, ``(|B|, ...)``.
            y: labels as the loss takes them.

        Returns:
            The mean negative log-likelihood of the batch, averaged over samples, a scalar.

        Raises:
            ValueError: a batch that is larger than train_size, parameters without influence, rates out of range, or
                NaN and infinity in outputs or derivatives. Net and state then are what they were.
        """
        if self._set_aside is not None:
            raise RuntimeError("A posterior sample is in the net: leave posterior_sample() before the next step.")
        lr, beta, kept = self._require_rates()
        was_training = self.net.training
        modes = [(module, module.training) for module in self.net.modules()] if was_training else []
        try:
            self.net.eval()
            y = self._checked_batch(x, y)
            samples, generator = self._draw()
            scale = self.train_size / len(x) / len(samples)
            value, gradient, curvature = 0.0, 0.0, 0.0
            for sample in samples:
                with self._weights_in_net(sample) if self.samples_weights else contextlib.nullcontext():
                    terms = derivatives(self._curvature, x, y, self.loss, self.features, self.temperature)
                value, gradient, curvature = value + terms[0], gradient + terms[1], curvature + terms[2]
        finally:
            for module, mode in modes:
                module.training = mode
        mean, state, prior_precision = self.mean, self.state["gaussian"], self.prior_precision
        cure = "The step is refused; net and state are as they were. Lower lr or raise initial_precision."
        require_finite(gradient, "The gradient of this batch", cure)
        require_finite(curvature, "The curvature of this batch", cure)
        # M_{t+1} = gamma M_t + (1 - gamma) (J^T r + S0^-1 mu)
        momentum = kept * state["momentum"] + (1 - kept) * (scale * gradient + prior_precision * mean)
        data_precision = precision_step(state["data_precision"], scale * curvature, beta)
        mean = mean_step(mean, data_precision, momentum, prior_precision, lr)
        require_finite(mean, "The next mean", cure)
        # nothing is written before all is known to be sound; tensors are new, so state_dicts taken earlier stay
        self.state["gaussian"] = {
            **state,
            "data_precision": data_precision,
            "momentum": momentum,
            "steps": state["steps"] + 1,
            "generator": generator,
        }
        self._put(mean)
        return value / len(x) / len(samples)

    # ---- inside

    def _require_rates(self) -> tuple[float | Tensor, float | Tensor, float | Tensor]:
        """lr, beta and momentum of the next step, bias corrected: numbers, or ``(P,)`` where groups differ."""
        steps = self.steps if "gaussian" in self.state else 0
        for group in self.param_groups:
            require_positive(torch.as_tensor(float(group["prior_precision"])), "prior_precision")
            lr, beta, momentum = (float(group[name]) for name in ("lr", "beta", "momentum"))
            if not (math.isfinite(lr) and lr >= 0):
                raise ValueError(f"lr must be finite and not negative; got {lr}.")
            if not 0 < beta <= 1:
                raise ValueError(f"beta must be in (0, 1], the weight of new curvature in the average; got {beta}.")
            if not 0 <= momentum < 1:
                raise ValueError(f"momentum must be in [0, 1); got {momentum}.")

        def new_weight(rate: float) -> float:
            return corrected(rate, steps) if self.bias_correction else rate

        rows = {
            (float(g["lr"]), new_weight(float(g["beta"])), 1 - new_weight(1 - float(g["momentum"])))
            for g in self.param_groups
        }
        if len(rows) == 1:
            return rows.pop()
        if not self.diagonal:
            raise ValueError(
                f"{type(self).__name__} has one lr, beta and momentum for all weights, whose curvature it keeps "
                "jointly; groups may differ in prior_precision alone."
            )
        rates = [
            [float(g["lr"]), new_weight(float(g["beta"])), 1 - new_weight(1 - float(g["momentum"]))]
            for g in self.param_groups
        ]
        return tuple(self.mean.new_tensor(rates).T[:, self._group_index])

    def _checked_batch(self, x: Tensor, y: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"Inputs must be a tensor; got {type(x).__name__}. step takes a batch, step(x, y).")
        if not self._checked:
            integers = None if x.is_floating_point() else x.dtype
            lin = Linearization(self.net, self._names, input_shape=x.shape[1:], input_dtype=integers)
            lin.prepare(x)  # one output row for each example, nothing random, no influence of other examples
            self._require_influence(x[:1])
            self._checked = True
        if len(x) == 0:
            raise ValueError("The batch is empty.")
        if len(x) > self.train_size:
            raise ValueError(
                f"The batch has {len(x)} examples, but train_size is {self.train_size}: that is the number of all "
                "training examples, which gradients are scaled to."
            )
        require_finite(x, "x", "Remove or impute these rows first.")
        k, dtype = self._function.num_rows(x), self._function.dtype
        return self.loss.check_labels(y, k, len(x), dtype, x.device)

    def _require_influence(self, x: Tensor) -> None:
        f, leaves = self._function._with_graph(x)
        with torch.enable_grad():
            grads = torch.autograd.grad(f.sum(), leaves, allow_unused=True)
        unused = [name for name, grad in zip(self._names, grads, strict=True) if grad is None]
        if unused:
            raise ValueError(
                f"The outputs do not depend on {', '.join(unused)}, which get no gradient: freeze them, "
                "requires_grad_(False), or choose others by params=."
            )

    def _draw(self) -> tuple[Tensor, Tensor]:
        """The weights that the next step looks at, ``(S', P)``, not used up yet, and the random state after it."""
        state = self.state["gaussian"]["generator"]
        mean = self.mean
        if not self.samples_weights:
            return mean[None], state
        generator = torch.Generator(mean.device)
        generator.set_state(state)
        return self.gaussian().rsample((self.mc_samples,), generator), generator.get_state()

    @contextlib.contextmanager
    def _weights_in_net(self, weights: Tensor) -> Iterator[Tensor]:
        self._set_aside = self.mean
        try:
            self._put(weights)
            yield weights
        finally:
            self._put(self._set_aside)
            self._set_aside = None

    @torch.no_grad()
    def _put(self, weights: Tensor) -> None:
        parameters = dict(self.net.named_parameters())
        for name, value in self._function.unflatten(weights).items():
            parameters[name].copy_(value)

    def _identity(self) -> list[list]:
        """What a state belongs to: the algorithm, and names and shapes of the parameters."""
        shapes = [list(shape) for shape in self._function.shapes]
        return [["diagonal" if self.diagonal else "full"], list(self._names), shapes]


def _before_loading(optimizer: GaussNewton, state_dict: dict) -> None:
    """Refuse the ``state_dict`` of another net before anything is loaded."""
    saved = state_dict.get("state", {}).get("gaussian")
    own = optimizer._identity()
    if saved is not None and saved["params"] == own:
        return
    if saved is None:
        what = "another optimizer"
    elif saved["params"][0] != own[0]:
        what = "an optimizer that keeps a " + saved["params"][0][0] + " covariance"
    else:
        what = f"another net, with {_listed(saved['params'])}"
    raise ValueError(f"This state_dict is of {what}; nothing was loaded. This one trains {_listed(own)}.")


def _after_loading(optimizer: GaussNewton) -> None:
    """Put tensors where the weights are: ``torch.load(map_location=)`` may have moved them elsewhere."""
    mean, state = optimizer.mean, optimizer.state["gaussian"]
    moved = {name: state[name].to(mean) for name in ("data_precision", "momentum")}
    optimizer.state["gaussian"] = {**state, **moved, "generator": state["generator"].cpu()}


def _listed(identity: list[list]) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in zip(*identity[1:], strict=True))


def derivatives(
    function: NetFunction | SquaredRows, x: Tensor, y: Tensor, loss: Loss, features: str, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over a batch at the net's present weights, at temperature T.

    Args:
        function: the net, for the whole matrix of curvature, or its :class:`SquaredRows`, for the diagonal.
        x, y: inputs and canonical labels.
        loss, features, temperature: as of the optimizers.

    Returns:
        ``sum_i l_i`` (without T), ``sum_i J_i^T r_i / T``, ``(P,)``, and ``sum_i J_i^T Lambda_i J_i / T``, ``(P, P)``
        or its diagonal ``(P,)``; with ``features="gradient"`` ``sum_i g_i g_i^T`` instead, ``g_i = J_i^T r_i / T``.
    """
    if isinstance(function, SquaredRows):

        def weigh(f: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            here = laplace.Splitting(loss.subset(part), f, y[part], features, temperature)
            m = 1 if features == "gradient" else f.shape[-1]
            eye = torch.eye(m, dtype=f.dtype, device=f.device)[:, None].expand(m, len(f), m)
            return here.output_root(eye), here.output_gradient()  # (C^T R)^T J squared and summed is the diagonal

        f, first, second = function(x, weigh)
        return loss.negative_log_likelihood(f, y).sum(), first, second
    f = function.outputs(x)
    splitting = laplace.Splitting(loss, f, y, features, temperature)
    rows = Rows(function, x, x.shape[:1], splitting.cotangents())
    second, first = laplace.curvature(rows, splitting, progress=False)
    return loss.negative_log_likelihood(f, y).sum(), first[0], second[0]


class VOGGN(GaussNewton):
    """Variational online generalised Gauss-Newton: ``q_t`` with a full covariance, for small nets.

    Args:
        net: trained in place, on the parameters that require a gradient.
        loss: from ``losses``; the objective is its sum over n examples, plus the penalty ``delta |w|^2 / 2``.
        train_size: n; sums over a batch are scaled by ``n / |B|``.
        prior_precision: delta, a number or one entry per group.
        lr: alpha, the step length; a scheduler may change it. The paper takes lr = beta.
        beta: weight of new curvature in its average, in (0, 1].
        momentum: gamma in [0, 1), of the gradient's average.
        bias_correction: start both averages at the first batch, as Adam does; ``initial_precision`` then only says how
            widely the first samples are drawn.
        groups: which parameters share a precision, as in ``LaplaceGP``: each becomes an entry of ``param_groups``.
        params: which weights are trained and random; see :class:`Linearization`.
        initial_precision: S_0, the same for all weights; n by default, one unit of curvature for each example.
        temperature: the loss is divided by it: below one the posterior is narrower than Bayes' ("cold").
        features: "jacobian" for ``J^T Lambda J``; "gradient" for the empirical Fisher, squares of the gradients of
            single examples in the place of curvature: cheaper, and no curvature at all where labels are fitted well.
        mc_samples: S', draws of ``q_t`` in each step.
        generator: of these draws; by default one seeded from torch's.

    ``opt.iterate()`` is a snapshot that ``VariationalGP`` turns into the GP whose posterior is the next iterate.

    Source: Khan et al. 2019, section 4 and Theorem 2.
    """

    diagonal = False
    samples_weights = True


class VOGN(GaussNewton):
    """Variational online Gauss-Newton: ``q_t`` with a diagonal covariance.

    Arguments are those of :class:`VOGGN`. By default the curvature is the exact diagonal of ``J^T Lambda J``, K rows
    for each example; ``features="gradient"`` takes squared gradients of each example, one row, as VOGN was first
    published.
    ``param_groups`` may differ in lr, beta and momentum too (then without :meth:`iterate`).

    Source: Khan et al. 2019, section 4; Khan et al. 2018, "Fast and scalable Bayesian deep learning by
    weight-perturbation in Adam".
    """

    diagonal = True
    samples_weights = True


class OGGN(GaussNewton):
    """Online generalised Gauss-Newton: as :class:`VOGGN`, at the mean in place of samples.

    Its fixed points are stationary points of the loss with its penalty, where ``q_t`` is the Laplace-GGN posterior.
    Arguments are those of :class:`VOGGN`, without ``mc_samples`` and ``generator``.
    """

    diagonal = False
    samples_weights = False

    def __init__(self, *args, **options) -> None:
        _without_samples(type(self), options)
        super().__init__(*args, **options)


class OGN(GaussNewton):
    """Online Gauss-Newton: as :class:`VOGN`, at the mean in place of samples. Arguments as of :class:`OGGN`."""

    diagonal = True
    samples_weights = False

    def __init__(self, *args, **options) -> None:
        _without_samples(type(self), options)
        super().__init__(*args, **options)


def _without_samples(kind: type, options: dict) -> None:
    for name in ("mc_samples", "generator"):
        if name in options:
            raise TypeError(f"{kind.__name__} draws no samples: leave {name} out, or use V{kind.__name__}.")


def _require_count(value: int, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number, one at least; got {value!r}.")
