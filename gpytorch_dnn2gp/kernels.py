"""GPyTorch kernel and mean of a linearized net.

    k(x, x') = J(x) S0 J(x')^T     JacobianKernel, (n K, n' K), outputs fastest (paper eq. 9; the NTK at w* for S0 = I)
    c(x)     = f_w*(x) - J(x) w*   NetworkMean, the prior mean in output form

The kernel owns ``prior_precision``: one delta, or one per group of weights. With it come the two things that make it
fast in a user's own ``ExactGP``: Jacobians are kept, and the posterior is taken on the smaller side (operators.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import gpytorch
import torch
from gpytorch.constraints import Interval, Positive
from gpytorch.distributions import MultitaskMultivariateNormal
from gpytorch.kernels import AdditiveKernel, Kernel, ProductKernel
from gpytorch.means import Mean
from gpytorch.models.exact_prediction_strategies import DefaultPredictionStrategy
from gpytorch.priors import Prior as HyperPrior
from linear_operator import to_linear_operator
from linear_operator.operators import LinearOperator, MatmulLinearOperator, ZeroLinearOperator
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import tiling
from .linearize import Linearization
from .model_state import digest
from .numerics import cholesky, in_plain_mode, require_finite, require_like, require_positive
from .operators import Covariance, FeatureGram, NoisyFeatureGram
from .weights import Prior, WeightGroups, scale_rows, weight_groups


def as_linearization(net: nn.Module | Linearization, **options) -> Linearization:
    """``net`` linearized, or the linearization it already is (then options must be left out)."""
    if not isinstance(net, Linearization):
        return Linearization(net, **options)
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)} were given with a Linearization, which has its own. Leave them out.")
    return net


def log_positive() -> Positive:
    """Positive, optimised in the logarithm: precisions and variances span orders of magnitude."""
    return Positive(transform=torch.exp, inv_transform=torch.log)


class _PriorStructure(nn.Module):
    """What is fixed of the weight prior: it moves with the kernel and is no batched hyperparameter of it."""

    def __init__(self, groups: WeightGroups, prior_variance: Tensor | None, lin: Linearization) -> None:
        super().__init__()
        full = prior_variance is not None and prior_variance.dim() == 2
        self.groups = groups
        self.register_buffer("group_index", groups.index(lin.device), persistent=False)
        self.register_buffer("base_variance", None if full else prior_variance)
        self.register_buffer("base_root", cholesky(prior_variance, "prior_variance") if full else None)
        # which weights there are and which share a precision, so that a state_dict is recognised
        described = {"params": [list(lin.param_names), list(lin.param_sizes)]}
        identity = digest(described, [groups.index(torch.device("cpu"))])
        self.register_buffer("identity", torch.tensor(identity, dtype=torch.uint8, device=lin.device))


def _require_same_identity(kernel: JacobianKernel, state: dict, prefix: str, *_) -> None:
    """Called before any of ``state`` is loaded into the kernel."""
    own, saved = kernel.structure.identity, state.get(f"{prefix}structure.identity")
    if saved is not None and not torch.equal(saved.to(own), own):
        raise ValueError(
            "This state_dict is of a JacobianKernel with other params or other groups of weights, so its precisions "
            "belong to other weights. Build the kernel with the params and groups of the one that was saved."
        )


FEATURE_NUMBERS = 2**25  # in all, up to which features are held rather than Grams taken by layers


class _Cache:
    """What the last inputs asked for gave, found by equality of inputs and net.

    Left out where the inputs have a gradient, or where it takes much memory. Copies, pickles and moves of the kernel
    start empty.
    """

    SIZE = 0  # entries kept

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._net: list[Tensor] = []
        self._entries: list[tuple] = []

    def __deepcopy__(self, memo: dict) -> _Cache:
        return type(self)()

    def __reduce__(self) -> tuple:
        return type(self), ()

    def _require_same(self, net: nn.Module) -> None:
        """Start afresh if the net has changed, as by ``load_state_dict``."""
        now = [*net.parameters(), *net.buffers()]
        same = len(now) == len(self._net) and all(
            a.device == b.device and a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(now, self._net)
        )
        if not same:
            self.clear()
            self._net = [tensor.detach().clone() for tensor in now]

    def _keep(self, *entry: Tensor | None) -> None:
        """Remember an entry: what was asked for, and last what it gave."""
        self._entries = [entry, *self._entries][: self.SIZE]


class _Grams(_Cache):
    """The Grams, one for each prior group, of the last inputs asked for: a new prior precision repeats none of them."""

    SIZE = 3  # training, test, and between the two

    def __call__(self, kernel: JacobianKernel, x1: Tensor, x2: Tensor | None) -> Tensor:
        """``k(x1, x2)``, ``(n1 K, n2 K)``; ``x2=None`` means ``x1``. Differentiable in the prior precision."""
        lin, prior = kernel.linearization, kernel.prior()
        rows1, rows2 = lin.rows(x1), None if x2 is None else lin.rows(x2)
        batch = x1.dim() > 2 or (x2 is not None and x2.dim() > 2)
        if batch or _has_gradient(x1) or (x2 is not None and _has_gradient(x2)):
            return rows1.covariance(rows2, prior)
        self._require_same(lin.net)
        delta = kernel.prior_precision.reciprocal()
        for i, (known1, known2, grams) in enumerate(self._entries):
            if _equal(known1, x1) and _equal(known2, x2):
                self._entries.insert(0, self._entries.pop(i))
                return torch.einsum("g,gij->ij", delta, grams)
        groups, base = list(kernel.groups.indices), kernel.structure.base_variance
        size = len(groups) * rows1.num_examples * (rows1 if rows2 is None else rows2).num_examples
        if not tiling.cache_fits(size * rows1.num_rows**2, lin.dtype, x1.device):
            return rows1.covariance(rows2, prior)
        grams = rows1.grams(rows2, groups, base)
        if not torch.is_inference_mode_enabled():
            self._keep(x1.detach().clone(), None if x2 is None else x2.detach().clone(), grams)
        return torch.einsum("g,gij->ij", delta, grams)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


class _Jacobians(_Cache):
    """The Jacobians of the last inputs asked for: neither a new prior precision nor a prediction repeats them."""

    SIZE = 2  # training and test inputs

    def __call__(self, lin: Linearization, x: Tensor) -> Tensor:
        """``J(x)``, ``(..., n, K, P)``; without batch dimensions where all elements of a batch are the same."""
        if x.dim() < 2 or _has_gradient(x):
            return lin.jacobian(x)
        self._require_same(lin.net)
        if x.dim() > 2 and x.numel() > 0:
            first = x.reshape(-1, *x.shape[-2:])[0]  # GPyTorch repeats the training inputs for each batch of tests
            x = first if torch.equal(x, first.expand_as(x)) else x
        for i, (known, rows) in enumerate(self._entries):
            if torch.equal(known, x):
                self._entries.insert(0, self._entries.pop(i))
                return rows
        rows = self._extended(lin, x)
        if not torch.is_inference_mode_enabled() and tiling.cache_fits(rows.numel(), rows.dtype, rows.device):
            self._keep(x.detach().clone(), rows.detach())
        return rows

    def _extended(self, lin: Linearization, x: Tensor) -> Tensor:
        """``J(x)``; only the rows that are new where ``x`` begins with known inputs, as after conditioning."""
        for known, rows in self._entries:
            n = len(known)
            if known.dim() != 2 or not 0 < n < x.shape[-2] or known.shape[-1] != x.shape[-1]:
                continue
            if torch.equal(known.expand(*x.shape[:-2], -1, -1), x[..., :n, :]):
                new = lin.jacobian(x[..., n:, :])
                return torch.cat([rows.expand(*new.shape[:-3], *rows.shape), new], -3)
        return lin.jacobian(x)


def _has_gradient(x: Tensor) -> bool:
    """Whether a derivative in ``x``, of either mode, is being taken."""
    return (x.requires_grad and torch.is_grad_enabled()) or forward_ad.unpack_dual(x).tangent is not None


def _same_inputs(x1: Tensor, x2: Tensor) -> bool:
    """Whether one root serves both: equal values, and where a derivative is taken, the same part of the same tensor."""
    if x1 is x2:
        return True
    if x1.shape != x2.shape:
        return False
    gradients = _has_gradient(x1), _has_gradient(x2)
    if not any(gradients):
        return torch.equal(x1, x2)
    # as where a joint covariance of training and test points is indexed
    views = all(gradients) and x1.grad_fn is not None and x2.grad_fn is not None and x1._base is not None
    return views and x1._base is x2._base and _place(x1) == _place(x2)


def _place(x: Tensor) -> tuple:
    return x.storage_offset(), x.stride()


class WeightSpaceStrategy(DefaultPredictionStrategy):
    """Posterior of a :class:`JacobianKernel` in the user's own ``ExactGP``, on the smaller side of :mod:`operators`.

    For one output and several, in closed form whatever GPyTorch's settings are. Covariances are returned dense, since
    BoTorch's samplers break on a low-rank root. What it does not know (a kernel too large for its features, missing
    targets) goes GPyTorch's own way.
    """

    def exact_prediction(
        self, test_mean: Tensor, test_test_covar: LinearOperator, test_train_covar: LinearOperator
    ) -> tuple[Tensor, LinearOperator]:
        """Mean ``(..., m K)`` and covariance ``(..., m K, m K)``."""
        test = to_linear_operator(test_test_covar).evaluate_kernel()
        given = self._given()
        if given is None or not isinstance(test, FeatureGram):
            return super().exact_prediction(test_mean, test_test_covar, test_train_covar)
        train, weights = given
        mean = test_mean + (test.root @ weights).squeeze(-1)
        if gpytorch.settings.skip_posterior_variances.on():
            return mean, ZeroLinearOperator(*test.shape, dtype=mean.dtype, device=mean.device)
        return mean, Covariance(train.conditional_gram(test.root))

    def get_fantasy_strategy(self, inputs, targets, full_inputs, full_targets, full_output, **kwargs):
        """With more data: taken afresh, as by GPyTorch's strategy for linear kernels; Jacobians of old data are kept.

        GPyTorch's update by rows cannot add several points with several outputs.
        """
        places = {}
        if "noise" in kwargs and getattr(self.likelihood, "keeps_inputs", False):
            places = {"inputs": inputs[0], "train_inputs": self.train_inputs[0]}
        return type(self)(
            train_inputs=full_inputs,
            train_prior_dist=self.train_prior_dist.__class__(full_output.mean, full_output.lazy_covariance_matrix),
            train_labels=full_targets,
            likelihood=self.likelihood.get_fantasy_likelihood(**kwargs, **places),
        )

    def _given(self) -> tuple[NoisyFeatureGram, Tensor] | None:
        """Train covariance and posterior mean of the weights, ``(..., P, 1)``; kept unless caches carry gradients."""
        detach = gpytorch.settings.detach_test_caches.on()
        if detach and hasattr(self, "_kept"):
            return self._kept
        train = self.lik_train_train_covar.evaluate_kernel()
        given = None
        if isinstance(train, NoisyFeatureGram) and gpytorch.settings.observation_nan_policy.value() == "ignore":
            train = train.detach() if detach else train
            residual = (self.train_labels - self.train_prior_dist.loc).unsqueeze(-1)
            given = train, train.weights(residual.detach() if detach else residual)
        if detach:
            self._kept = given
        return given


class JacobianKernel(Kernel):
    """``k(x, x') = J(x) S0 J(x')^T`` of a trained net, ``S0 = diag(prior_variance / prior_precision)``.

    Args:
        net: module (copied, frozen) or :class:`Linearization`.
        prior_precision: delta, a number, or one entry per group of weights; for a batch of kernels with one group one
            entry per kernel, and ``(*batch_shape, G)`` in general.
        groups: partition of the parameters, each entry a name, a prefix or a list of them; None means all weights for
            one precision, and the parameter tensors for several.
        prior_variance: a fixed prior covariance, ``(P,)`` for a diagonal one, as from VOGN, or ``(P, P)``, as from
            VOGGN (then with one group); ones by default.
        params, input_shape, input_dtype: see :class:`Linearization`.
        batch_shape: batch of hyperparameters.
        prior_precision_prior: GPyTorch prior on ``prior_precision``.
        prior_precision_constraint: by default positive, optimised in the logarithm.
        kwargs: of ``gpytorch.kernels.Kernel``, such as ``active_dims``.

    Shapes:
        inputs ``(..., n, d)``; the matrix is ``(..., n K, n' K)``, ``diag=True`` gives ``(..., n K)``.
    """

    has_lengthscale = False

    def __init__(
        self,
        net: nn.Module | Linearization,
        prior_precision: float | Sequence[float] | Tensor = 1.0,
        groups: Sequence[str | Sequence[str]] | None = None,
        prior_variance: Tensor | None = None,
        params: Sequence[str] | str | None = None,
        input_shape: Sequence[int] | None = None,
        input_dtype: torch.dtype | None = None,
        batch_shape: torch.Size | None = None,
        prior_precision_prior: HyperPrior | None = None,
        prior_precision_constraint: Interval | None = None,
        **kwargs,
    ) -> None:
        batch_shape = torch.Size() if batch_shape is None else torch.Size(batch_shape)
        super().__init__(batch_shape=batch_shape, **kwargs)
        lin = as_linearization(net, params=params, input_shape=input_shape, input_dtype=input_dtype)
        self.linearization = lin
        delta = torch.as_tensor(prior_precision, dtype=lin.dtype, device=lin.device)
        require_positive(delta.detach(), "prior_precision")
        if delta.dim() > len(batch_shape) + 1:
            raise ValueError(f"prior_precision has shape {tuple(delta.shape)}; give a number or one entry per group.")
        num_precisions = 1 if delta.dim() == 0 else delta.shape[-1]
        if batch_shape and (groups is not None or delta.dim() <= len(batch_shape)):
            num_precisions = 1  # a batch of precisions is fitted to the groups once these are known
        partition = weight_groups(lin.param_names, lin.param_sizes, groups, num_precisions)
        if prior_variance is not None:
            p = lin.num_weights
            if prior_variance.shape not in ((p,), (p, p)):
                raise ValueError(
                    f"prior_variance has shape {tuple(prior_variance.shape)}; the net has {p} selected weights: give "
                    f"({p},) or ({p}, {p})."
                )
            require_like(prior_variance, lin.weights, "prior_variance", "the net")
            if prior_variance.dim() == 1:
                require_positive(prior_variance, "prior_variance")
            elif len(partition) > 1 or batch_shape:
                raise ValueError("A full prior_variance (P, P) has one prior_precision; leave groups and batches out.")
            prior_variance = prior_variance.detach().clone()
        self.structure = _PriorStructure(partition, prior_variance, lin)
        self.register_load_state_dict_pre_hook(_require_same_identity)
        self._jacobians = _Jacobians()
        self._grams = _Grams()

        raw = torch.zeros(*batch_shape, len(partition), dtype=lin.dtype, device=lin.device)
        self.register_parameter("raw_prior_precision", nn.Parameter(raw))
        self.register_constraint("raw_prior_precision", prior_precision_constraint or log_positive())
        if prior_precision_prior is not None:
            self.register_prior(
                "prior_precision_prior",
                prior_precision_prior,
                _prior_precision_of,
                _set_prior_precision_of,
            )
        self.prior_precision = delta

    # ---- hyperparameters

    @property
    def prior_precision(self) -> Tensor:
        """delta, ``(*batch_shape, G)``."""
        return self.raw_prior_precision_constraint.transform(self.raw_prior_precision)

    @prior_precision.setter
    def prior_precision(self, value: float | Sequence[float] | Tensor) -> None:
        self._set_prior_precision(value)

    def _set_prior_precision(self, value: float | Sequence[float] | Tensor) -> None:
        raw = self.raw_prior_precision
        value = torch.as_tensor(value, dtype=raw.dtype, device=raw.device)
        require_positive(value.detach(), "prior_precision")
        given, batch_shape, num_groups = value.shape, self.batch_shape, raw.shape[-1]
        if num_groups == 1 and 0 < value.dim() <= len(batch_shape):
            value = value.unsqueeze(-1)
        try:
            value = value.expand(raw.shape)
        except RuntimeError:
            groups = f"{num_groups} groups {self.structure.groups.names}"
            batch = f"; for a batch of kernels give shape (*batch_shape, G) = {tuple(raw.shape)}" if batch_shape else ""
            raise ValueError(
                f"prior_precision has shape {tuple(given)}; it must be a number or have one entry for each of the "
                f"{groups}{batch}."
            ) from None
        self.initialize(raw_prior_precision=self.raw_prior_precision_constraint.inverse_transform(value))

    @property
    def groups(self) -> WeightGroups:
        """Which weights share a precision."""
        return self.structure.groups

    def prior(self, precision: Tensor | None = None) -> Prior:
        """The weight prior at the present (or the given) ``prior_precision``; for an unbatched kernel."""
        precision = self.prior_precision if precision is None else precision
        return Prior(precision, self.structure.group_index, self.structure.base_variance, self.structure.base_root)

    @property
    def prior_variance(self) -> Tensor:
        """Diagonal of S0, ``(*batch_shape, P)``."""
        if self.structure.base_root is not None:
            return self.prior().variance
        variance = self.prior_precision.reciprocal()[..., self.structure.group_index]
        base = self.structure.base_variance
        return variance if base is None else variance * base

    # ---- the kernel

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:
        """K."""
        if self.linearization.function.num_outputs is None:
            x = x1[..., :1, :]
            if self.active_dims is not None and x.shape[-1] != len(self.active_dims):  # a sum asks before it selects
                x = x.index_select(-1, self.active_dims)
            self.linearization(x)
        return self.linearization.num_outputs

    def feature_map(self, x: Tensor) -> Tensor:
        """phi, ``(*batch, n, K, P)``, with ``k(x, x') = phi(x) phi(x')^T``."""
        phi = self._jacobians(self.linearization, x)
        if self.structure.base_root is not None:
            phi = scale_rows(phi, self.prior().scale)
        else:
            phi = phi * self.prior_variance.sqrt()[..., None, None, :]
        batch_shape = torch.broadcast_shapes(phi.shape[:-3], x.shape[:-2])
        return phi.expand(*batch_shape, *phi.shape[-3:])

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **params
    ) -> Tensor | LinearOperator:
        """See ``gpytorch.kernels.Kernel.forward``."""
        if last_dim_is_batch:
            raise RuntimeError("JacobianKernel does not accept last_dim_is_batch: a net reads all dimensions at once.")
        lin, same = self.linearization, _same_inputs(x1, x2)
        num_rows = self.num_outputs_per_input(x1, x2) * (x1.shape[:-1].numel() + x2.shape[:-1].numel())
        full = self.structure.base_root is not None  # P x P fits, so P rows do
        # Features are what the smaller side is solved by, where that is P, and cheap where they are few; Grams by
        # layers are cheaper elsewhere.
        fits = tiling.fits(num_rows * lin.num_weights, lin.dtype, x1.device)
        few = num_rows >= lin.num_weights or num_rows * lin.num_weights <= FEATURE_NUMBERS
        small = full or bool(self.batch_shape) or (fits and few)
        if diag:
            if same and not small:
                return self._large_diagonal(x1)
            phi1 = self.feature_map(x1)
            return (phi1 * (phi1 if same else self.feature_map(x2))).sum(-1).flatten(-2)
        if not small:
            return to_linear_operator(self._grams(self, x1, None if same else x2))
        phi1 = self.feature_map(x1).flatten(-3, -2)
        return FeatureGram(phi1) if same else MatmulLinearOperator(phi1, self.feature_map(x2).flatten(-3, -2).mT)

    def _large_diagonal(self, x: Tensor) -> Tensor:
        """``(..., n K)``, without the features of all examples at once."""
        lin, variance = self.linearization, self.prior_variance
        if not variance.requires_grad:
            return lin.gram_diagonal(x, variance).flatten(-2)
        rows = lin.rows(x)
        blocks = rows.covariance_blocks(self.prior())
        return blocks.diagonal(dim1=-2, dim2=-1).unflatten(0, rows.batch_shape).flatten(-2)

    def prediction_strategy(self, train_inputs, train_prior_dist, train_labels, likelihood) -> WeightSpaceStrategy:
        """How GPyTorch's ``ExactGP`` conditions on data."""
        return WeightSpaceStrategy(train_inputs, train_prior_dist, train_labels, likelihood)

    def __add__(self, other: Kernel) -> Kernel:
        return _JacobianSum(self, *(other.kernels if isinstance(other, AdditiveKernel) else [other]))

    def __mul__(self, other: Kernel) -> Kernel:
        return _JacobianProduct(self, *(other.kernels if isinstance(other, ProductKernel) else [other]))

    def _apply(self, fn, *args, **kwargs):
        dtype = fn(self.raw_prior_precision.detach().flatten()[:0]).dtype
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"JacobianKernel cannot be {dtype}, too coarse for its algebra: keep float32 or float64.")
        raw = self.raw_prior_precision.detach()
        if fn(raw) is not raw:  # not where it is already, as by BoTorch's acquisition functions
            self._jacobians.clear()
            self._grams.clear()
        return super()._apply(fn, *args, **kwargs)


class _SeveralFantasies:
    """Takes fantasies of several outputs afresh: GPyTorch's update by rows cannot add several points of them."""

    def prediction_strategy(self, train_inputs, train_prior_dist, train_labels, likelihood):
        several = isinstance(train_prior_dist, MultitaskMultivariateNormal)
        kind = WeightSpaceStrategy if several else DefaultPredictionStrategy
        return kind(train_inputs, train_prior_dist, train_labels, likelihood)


class _JacobianSum(_SeveralFantasies, AdditiveKernel):
    def __add__(self, other: Kernel) -> Kernel:
        return type(self)(*self.kernels, *(other.kernels if isinstance(other, AdditiveKernel) else [other]))


class _JacobianProduct(_SeveralFantasies, ProductKernel):
    def __mul__(self, other: Kernel) -> Kernel:
        return type(self)(*self.kernels, *(other.kernels if isinstance(other, ProductKernel) else [other]))


def _prior_precision_of(kernel: JacobianKernel) -> Tensor:
    return kernel.prior_precision


def _set_prior_precision_of(kernel: JacobianKernel, value: Tensor) -> None:
    kernel.prior_precision = value


class NetworkMean(Mean):
    """``c(x) = f_w*(x) - J(x) w*``, the prior mean that goes with :class:`JacobianKernel` for targets in output space.

    Args:
        net: module (copied, frozen) or :class:`Linearization`.
        weights: ``(P,)``, the prior mean of the weights: adds ``J(x) weights``. Zero by default.

    Shapes:
        inputs ``(..., n, d)``; returns ``(..., n)`` for one output, else ``(..., n, K)``.
    """

    def __init__(self, net: nn.Module | Linearization, weights: Tensor | None = None) -> None:
        super().__init__()
        self.linearization = as_linearization(net)
        if weights is not None:
            if weights.shape != (self.linearization.num_weights,):
                raise ValueError(
                    f"weights has shape {tuple(weights.shape)}; the net has {self.linearization.num_weights} selected "
                    "weights."
                )
            require_finite(weights, "weights")
        self.register_buffer("prior_mean", weights)

    @in_plain_mode
    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        away = self.linearization.weights
        if self.prior_mean is not None:
            away = away - self.prior_mean
        out = self.linearization(x) - self.linearization.jvp(x, away)
        return out.squeeze(-1) if out.shape[-1] == 1 else out
