"""A BoTorch model made of a net: trained with its evidence, then an exact GP of it.

    train_X, train_Y  --transforms-->  x, y  --fitting.py-->  net, delta, sigma, k_r  --LaplaceGP-->  posterior

All of BoTorch that a ``SingleTaskGP`` takes part in works, in closed form where that one is: conditioning, fantasies in
batches, gradients in X, joint covariances over points and outputs. n training points, d inputs, m outcomes (K outputs
of the net), q points jointly, b further batch dimensions.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gpytorch
import torch
from botorch.exceptions.errors import BotorchTensorDimensionError, InputDataError, UnsupportedError
from botorch.models.gpytorch import GPyTorchModel
from botorch.models.model import FantasizeMixin
from botorch.models.transforms.input import InputTransform
from botorch.models.transforms.outcome import OutcomeTransform, Standardize
from botorch.models.utils import validate_input_scaling
from botorch.models.utils.assorted import fantasize as fantasize_flag
from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior
from botorch.posteriors.gpytorch import GPyTorchPosterior
from botorch.utils.types import DEFAULT
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import Kernel, ScaleKernel
from gpytorch.models.gp import GP
from gpytorch.priors import GammaPrior
from linear_operator import to_linear_operator
from linear_operator.operators import DenseLinearOperator
from torch import Tensor, nn

from ..gp import LaplaceGP
from ..jacobians import NetFunction
from ..linearize import Linearization, select_parameters
from ..losses import Gaussian, Loss
from ..numerics import NumericalWarning
from . import fitting
from .fitting import Hyperparameters
from .refitting import EVERY_CALL, RefitWhen

LABELS_DEVIATION = 3.0  # of initial weights: logits of few labels want a larger scale than standardised outcomes
UNOBSERVED = 1e8  # noise variance, of unit-scale outcomes, that stands for an outcome that was not observed


def matern_residual(num_inputs: int) -> Kernel:
    """The default residual kernel: Matern 5/2 with one lengthscale for each input, for inputs in the unit cube."""
    base = get_covar_module_with_dim_scaled_prior(num_inputs, use_rbf_kernel=False)
    kernel = ScaleKernel(base, outputscale_prior=GammaPrior(1.1, 0.2))
    kernel.outputscale = 0.1
    return kernel


class DNN2GPModel(GPyTorchModel, FantasizeMixin, GP):
    """A BoTorch model whose posterior is that of a small net, seen as a Gaussian process.

    The net is trained here, from several initial weights at once, with its prior precisions, the noise and the weight
    of the residual kernel chosen by the evidence (``fitting``). Then its weights are frozen and everything is closed
    form: ``condition_on_observations`` and ``fantasize`` retrain nothing.

    Args:
        train_X: ``(n, d)``, in the unit cube, or with ``input_transform=Normalize(d)``.
        train_Y: ``(n, m)``, an outcome for each output of the net; several are correlated.
        train_Yvar: observed noise variances, ``(n, m)``; without them one for each outcome is chosen.
        net: a module that maps ``(n, d)`` to ``(n, m)``, copied and trained from its own weights and from ones drawn
            anew by its layers' ``reset_parameters``; or a function that makes one. By default :func:`smooth_mlp`.
        loss: from ``losses``, such as ``Bernoulli()`` for a constraint that only tells whether it held; the posterior
            is then that of the net's outputs, here of the logit. By default ``Gaussian()``.
        outcome_transform: as of BoTorch's ``SingleTaskGP``: by default ``Standardize``, and none for a ``loss``.
        input_transform: as of ``SingleTaskGP``.
        params: which weights are random; see :class:`gpytorch_dnn2gp.Linearization`.
        groups: which weights share a prior precision; by default each parameter tensor has its own.
        residual_kernel: a GPyTorch kernel added to that of the net, so that the band widens far from the data whatever
            the net's features do there; "matern", the default for regression, or None.
        restarts: number of nets.
        refit_when: what :meth:`refit` goes by; by default it trains at every call.
        seed: of initial weights; nothing global is drawn from.
        fit_options: of ``fitting.fit_regression``, such as ``{"rounds": 6}``.
        progress: a bar while nets are trained: True, False, or None for terminals only.

    Raises:
        BotorchTensorDimensionError, InputDataError: as ``SingleTaskGP``.
        UnsupportedError: batches of training data.
    """

    def __init__(
        self,
        train_X: Tensor,
        train_Y: Tensor,
        train_Yvar: Tensor | None = None,
        net: nn.Module | Callable[[], nn.Module] | None = None,
        loss: Loss | None = None,
        outcome_transform: OutcomeTransform | Any | None = DEFAULT,
        input_transform: InputTransform | None = None,
        params: Sequence[str] | str | None = None,
        groups: Sequence[str | Sequence[str]] | None = None,
        residual_kernel: Kernel | str | None = "matern",
        restarts: int = 4,
        refit_when: RefitWhen = EVERY_CALL,
        seed: int = 0,
        fit_options: Mapping[str, Any] | None = None,
        progress: bool | None = False,
    ) -> None:
        super().__init__()
        self._validate_tensor_args(X=train_X, Y=train_Y, Yvar=train_Yvar)
        if train_X.dim() != 2:
            raise UnsupportedError(
                f"DNN2GPModel takes one data set, (n, d) and (n, m); got a batch of them, {tuple(train_X.shape)}. Make "
                "one model for each."
            )
        if len(train_X) != len(train_Y):
            raise BotorchTensorDimensionError(f"There are {len(train_X)} points, but {len(train_Y)} outcomes.")
        if len(train_X) == 0:
            raise InputDataError("There is no training point.")
        if restarts < 1:
            raise ValueError(f"restarts must be one at least; got {restarts}.")
        if loss is not None and not isinstance(loss, Loss):
            raise TypeError(f"loss must come from gpytorch_dnn2gp.losses, or be None; got {type(loss).__name__}.")
        if net is not None and not callable(net):
            raise TypeError(f"net must be a module or a function that makes one; got {type(net).__name__}.")
        if not isinstance(refit_when, RefitWhen):
            raise TypeError(f"refit_when must be a RefitWhen, such as RefitWhen(every=5); got {refit_when!r}.")
        self.loss, self.params, self.groups = loss, params, groups
        regression = self._is_regression
        if train_Yvar is not None and not regression:
            raise UnsupportedError(f"train_Yvar is the noise of a regression, but the loss is {loss}.")
        if isinstance(outcome_transform, type(DEFAULT)) and outcome_transform == DEFAULT:
            outcome_transform = Standardize(m=train_Y.shape[-1]) if regression else None
        self.restarts, self.seed, self.progress = restarts, seed, progress
        self.refit_when, self.fit_options = refit_when, dict(fit_options or {})
        self._num_outputs = train_Y.shape[-1]
        self._reported: list[int] | None = None
        self._supports_cache_root = self._num_outputs == 1
        for name, tensor in (("_train_X", train_X), ("_train_Y", train_Y), ("_train_Yvar", train_Yvar)):
            self.register_buffer(name, None if tensor is None else tensor.detach(), persistent=False)
        if input_transform is not None:
            self.input_transform = input_transform
        if outcome_transform is not None:
            self.outcome_transform = outcome_transform
        x, y, yvar = self._transformed(learn=True)
        self._validate_tensor_args(X=x, Y=y, Yvar=yvar)
        validate_input_scaling(train_X=x, train_Y=y, train_Yvar=yvar, check_nans_only=not regression)
        if not x.isfinite().all() or not y.isfinite().all():
            raise InputDataError("Input data contains infinite values.")
        self._template = self._template_net(net, x.shape[-1]).to(x)
        self._require_outputs(x)
        if residual_kernel == "matern":
            residual_kernel = matern_residual(x.shape[-1]) if regression else None
        elif residual_kernel is not None and not isinstance(residual_kernel, Kernel):
            raise ValueError(f"residual_kernel must be a kernel, 'matern' or None; got {residual_kernel!r}.")
        elif residual_kernel is not None and not regression:
            raise UnsupportedError(f"A residual kernel is for regression, but the loss is {loss}.")
        self._residual_template = None if residual_kernel is None else copy.deepcopy(residual_kernel).to(x)
        self._fit(warm=False)
        self.to(train_X)
        self.eval()

    # ---- training

    @property
    def _is_regression(self) -> bool:
        return self.loss is None or isinstance(self.loss, Gaussian)

    def _template_net(self, net: nn.Module | Callable[[], nn.Module] | None, num_inputs: int) -> nn.Module:
        if net is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                return fitting.smooth_mlp(num_inputs, self._num_outputs)
        if isinstance(net, nn.Module):
            return copy.deepcopy(net)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return net()

    def _require_outputs(self, x: Tensor) -> None:
        net = copy.deepcopy(self._template).eval()
        function = NetFunction(net, select_parameters(net, None))
        with torch.no_grad():
            outputs = function(function.weight_dict(), x[:1])
        if outputs.shape[-1] != self._num_outputs:
            raise BotorchTensorDimensionError(
                f"The net has {outputs.shape[-1]} outputs, but train_Y has {self._num_outputs} outcomes."
            )

    def _transformed(self, learn: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """The training data as the net sees them; transforms learn from them where they do such a thing."""
        x, y, yvar = self._train_X, self._train_Y, self._train_Yvar
        with torch.no_grad():
            if hasattr(self, "input_transform"):
                self.input_transform.to(x)
                if learn:
                    self.input_transform.train()
                    self.input_transform(x)
                    self.input_transform.eval()
                x = self.input_transform.preprocess_transform(x)
            if hasattr(self, "outcome_transform"):
                self.outcome_transform.train(learn)
                y, yvar = self.outcome_transform(Y=y, Yvar=yvar, X=x)
                self.outcome_transform.eval()
        return x, y, yvar

    def _fit(self, warm: bool) -> None:
        """Train nets on the present data and make the GP of the best."""
        x, y, yvar = self._transformed(learn=True)
        generator = torch.Generator().manual_seed(self.seed)
        nets, first = [copy.deepcopy(self._template)], None
        if warm:
            nets[0] = _trainable(self.gp.linearization, self._template)
            noise = self.gp.noise if self._train_Yvar is None else None
            first = Hyperparameters(
                self.gp.prior_precision.detach(),
                None if noise is None else noise.detach(),
                copy.deepcopy(self.gp.residual_kernel),
            )
        nets += fitting.restarts(self._template, self.restarts - 1, generator)
        random = select_parameters(self._template, self.params)
        start = Hyperparameters(
            fitting.initial_precision(self._template, random, *(() if self._is_regression else (LABELS_DEVIATION,))),
            y.new_tensor([0.02]),
            None if self._residual_template is None else copy.deepcopy(self._residual_template),
        )
        if self.groups is not None:
            start.prior_precision = y.new_ones(len(self.groups))
        common = {"first": first, "groups": self.groups, "params": self.params, "progress": self.progress}
        common |= self.fit_options
        if self._is_regression:
            noise = None if yvar is None else yvar.clamp(min=fitting.LOWEST_NOISE)
            fitted = fitting.fit_regression(nets, x, y, start, given_noise=noise, **common)
            found = fitted.hyperparameters
            loss = Gaussian((noise if found.noise is None else found.noise).sqrt())
        else:
            fitted = fitting.fit_labels(nets, x, y, self.loss, start, **common)
            found, loss = fitted.hyperparameters, self.loss
        lin = Linearization(fitted.net, self.params)
        self.gp = LaplaceGP(
            lin,
            x,
            y,
            loss,
            found.prior_precision,
            self.groups or [[name] for name in lin.param_names],
            residual_kernel=found.residual_kernel,
            progress=False,
        )
        self._points_at_fit = len(x)
        self._evidence_at_fit = self._evidence_per_point()

    @torch.no_grad()
    def _evidence_per_point(self) -> float:
        kind = "laplace" if self.gp.noise is None else "gp"
        with self._precision_is_known():
            return float(self.gp.log_evidence(kind)) / self.gp.train_inputs[0].shape[-2]

    @contextlib.contextmanager
    def _precision_is_known(self) -> Iterator[None]:
        """In single precision BoTorch has warned once, when the model was made: that is enough."""
        if self._train_X.dtype == torch.float64:
            yield
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=NumericalWarning)
            yield

    def custom_fit(self, mll: gpytorch.mlls.MarginalLogLikelihood, **_: Any) -> gpytorch.mlls.MarginalLogLikelihood:
        """What BoTorch's ``fit_gpytorch_mll`` calls: nothing to do, as the model is trained when it is made."""
        return mll.eval()

    def refit(self, X: Tensor, Y: Tensor, Yvar: Tensor | None = None) -> DNN2GPModel:
        """The model with more data; this one stays as it is.

        By ``refit_when`` it is trained again, one net starting from the present weights and the others from new ones,
        transforms learning from all data; or it is conditioned on the new data in closed form.

        Args:
            X, Y, Yvar: new data, ``(q, d)``, ``(q, m)``, ``(q, m)``, as those of the constructor.
        """
        if self._reported is not None:
            raise UnsupportedError("Refit the model of all outcomes, then take the subset.")
        if (Yvar is None) != (self._train_Yvar is None):
            raise InputDataError("Yvar is needed where, and only where, the model was given train_Yvar.")
        self._validate_tensor_args(X=X, Y=Y, Yvar=Yvar)
        if X.dim() != 2 or self.batch_shape:
            raise UnsupportedError(
                f"refit takes one data set, (q, d) and (q, m); got X of shape {tuple(X.shape)}, for a model of batch "
                f"shape {tuple(self.batch_shape)}. Fantasies are only conditioned on."
            )
        new = self._conditioned(X, Y, Yvar, transform_noise=True)
        points = len(new._train_X) - self._points_at_fit
        if self.refit_when.due(points, self._evidence_at_fit, new._evidence_per_point()):
            new._fit(warm=True)
        return new

    # ---- BoTorch's model

    @property
    def likelihood(self):
        """Of the GP: it adds the noise."""
        return self.gp.likelihood

    @property
    def train_inputs(self) -> tuple[Tensor]:
        """As of BoTorch's models: transformed in eval mode, as they came in train mode."""
        return self.gp.train_inputs if not self.training else (self._train_X,)

    @property
    def train_targets(self) -> Tensor:
        """Transformed outcomes, ``(n,)`` or ``(n, m)``."""
        return self.gp.train_targets

    @property
    def batch_shape(self) -> torch.Size:
        """Of the fantasies that this model was conditioned on."""
        return self.gp.train_inputs[0].shape[:-2]

    def train(self, mode: bool = True) -> DNN2GPModel:
        """The frozen net stays as it is; see ``train_inputs``."""
        nn.Module.train(self, mode)
        self.gp.eval()
        return self

    def eval(self) -> DNN2GPModel:
        """See ``train_inputs``."""
        return self.train(False) if self.training else self

    def forward(self, X: Tensor) -> MultivariateNormal:
        """GPyTorch's: the prior at (raw) training inputs in train mode, the posterior at transformed ones else."""
        if self.training:
            return self.gp.forward(self.transform_inputs(X))
        return self.gp(X)

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: Any | None = None,
    ):
        """Joint posterior at q points of each batch element, over the function or, with noise, over outcomes.

        Args:
            X: ``(b..., q, d)``.
            output_indices: of the outcomes wanted.
            observation_noise: True adds the noise (its mean over the training data where it was observed); a tensor
                ``(b..., q, m)`` adds that, in the space of the transformed outcomes.
            posterior_transform: of BoTorch.

        Returns:
            A ``GPyTorchPosterior``, or what an outcome transform that is not linear makes of it.
        """
        self.eval()
        X = self.transform_inputs(X)
        d = self.gp.train_inputs[0].shape[-1]
        if X.dim() < 2 or X.shape[-1] != d:
            raise BotorchTensorDimensionError(
                f"X has shape {tuple(X.shape)} when transformed; it must be (b..., q, {d})."
            )
        with gpytorch.settings.detach_test_caches(True), self._precision_is_known():
            mvn = _with_jitter(self.gp(X))
        if observation_noise is not False:
            mvn = _with_noise(mvn, self._noise_at(X, observation_noise))
        outputs = self._reported if self._reported is not None else None
        if output_indices is not None:
            every = list(range(self.gp.num_outputs)) if outputs is None else outputs
            outputs = [every[i] for i in output_indices]
        posterior = GPyTorchPosterior(distribution=mvn if outputs is None else _subset(mvn, outputs))
        if hasattr(self, "outcome_transform"):
            transform = self.outcome_transform
            if output_indices is not None:
                transform = transform.subset_output([i % self.num_outputs for i in output_indices])
            posterior = transform.untransform_posterior(posterior, X=X)
        return posterior if posterior_transform is None else posterior_transform(posterior=posterior, X=X)

    def _noise_at(self, X: Tensor, given: bool | Tensor) -> Tensor:
        """Variances that broadcast against ``(b..., q, K)``."""
        k = self.gp.num_outputs
        if isinstance(given, Tensor):
            if given.shape[-1] != self.num_outputs:
                raise BotorchTensorDimensionError(
                    f"observation_noise has shape {tuple(given.shape)}; its last dimension must be the "
                    f"{self.num_outputs} outcomes."
                )
            if self._reported is None:
                return given
            where = torch.tensor(self._reported, device=given.device)
            return given.new_zeros(*given.shape[:-1], k).index_copy(-1, where, given)
        noise = self.gp.noise
        if noise is None:
            raise UnsupportedError(
                f"The posterior of {self.loss} is that of the net's outputs, to which no noise is added: leave "
                "observation_noise out. fantasize draws labels."
            )
        return noise.detach().mean(0) if noise.dim() == 2 else noise.detach()

    def subset_output(self, idcs: list[int]) -> DNN2GPModel:
        """The same model, which reports these outcomes only; all data keep informing it."""
        every = list(range(self.gp.num_outputs)) if self._reported is None else self._reported
        new = self._shallow_copy()
        new._reported = [every[i] for i in idcs]
        new._num_outputs = len(idcs)
        if hasattr(self, "outcome_transform"):
            new.outcome_transform = self.outcome_transform.subset_output(idcs=idcs)
        return new

    # ---- more data in closed form

    def condition_on_observations(
        self, X: Tensor, Y: Tensor, noise: Tensor | None = None, **kwargs: Any
    ) -> DNN2GPModel:
        """The model with more data, in closed form: as one with all data, this net and these hyperparameters.

        Args:
            X: ``(b..., q, d)``.
            Y: ``(f..., b..., q, m)``.
            noise: their noise variances, of the shape of Y, in the space of transformed outcomes; needed where
                ``train_Yvar`` was given. Where it was not, it serves until :meth:`refit` trains with one for all.
        """
        if fantasize_flag.off():
            self._validate_tensor_args(X=X, Y=Y, Yvar=noise, strict=False)
        return self._conditioned(X, Y, noise)

    def get_fantasy_model(
        self, inputs: Tensor | Sequence[Tensor], targets: Tensor, noise: Tensor | None = None, **_: Any
    ) -> DNN2GPModel:
        """The same by the name that BoTorch's ``ModelListGP`` calls: of outcomes that are transformed already.

        Args:
            inputs: ``(b..., q, d)``, as they come.
            targets, noise: transformed outcomes and their noise variances, ``(f..., b..., q)`` for one outcome, else
                ``(f..., b..., q, m)``.
        """
        if self.num_outputs == 1:
            targets, noise = (None if each is None else each[..., None] for each in (targets, noise))
        if hasattr(self, "outcome_transform"):
            targets, _ = self.outcome_transform.untransform(targets)
        X = inputs if isinstance(inputs, Tensor) else inputs[0]
        return self._conditioned(X, targets, noise)

    def _conditioned(self, X: Tensor, Y: Tensor, noise: Tensor | None, transform_noise: bool = False) -> DNN2GPModel:
        if Y.shape[-2:] != (X.shape[-2], self.num_outputs):
            raise BotorchTensorDimensionError(
                f"Y has shape {tuple(Y.shape)}; for X of shape {tuple(X.shape)} it must end in "
                f"({X.shape[-2]}, {self.num_outputs})."
            )
        self.eval()  # transforms learn nothing here
        raw_Y, raw_noise = Y, noise
        x = self._transformed_as_data(X)
        if hasattr(self, "outcome_transform"):
            Y, transformed = self.outcome_transform(Y=Y, Yvar=noise if transform_noise else None, X=x)
            noise = transformed if transform_noise else noise
        batch = torch.broadcast_shapes(x.shape[:-2], Y.shape[:-2], self.batch_shape)
        Y = Y.expand(*batch, *Y.shape[-2:])
        if not (batch or transform_noise or raw_noise is None or self._train_Yvar is None):
            raw_noise = self._untransformed_noise(Y, noise, x)
        if x.shape[:-2] != batch[len(batch) - (x.dim() - 2) :]:
            x = x.expand(*batch, *x.shape[-2:])
        if self._reported is not None:
            Y, noise = self._with_unobserved(Y, noise)
        new = self._shallow_copy()
        if x.shape[-2] > 0:
            new.gp = self.gp.get_fantasy_model(x, Y, noise=_common(noise))
            new._keep(X, raw_Y, raw_noise)
        return new

    def _transformed_as_data(self, X: Tensor) -> Tensor:
        """As training inputs are: without what is done at predictions alone, such as perturbing them."""
        if fantasize_flag.on() or not hasattr(self, "input_transform"):
            return self.transform_inputs(X)
        return self.input_transform.preprocess_transform(X)

    def _untransformed_noise(self, Y: Tensor, noise: Tensor, x: Tensor) -> Tensor:
        if not hasattr(self, "outcome_transform"):
            return noise
        return self.outcome_transform.untransform(Y=Y, Yvar=noise.expand_as(Y), X=x)[1]

    def _keep(self, X: Tensor, Y: Tensor, noise: Tensor | None) -> None:
        """Add to the data to train on again; of fantasies, which are not trained on, to the inputs alone."""
        batch, old, new = self.batch_shape, self._train_X, X.detach()
        both = [each.expand(*batch, *each.shape[-2:]) for each in (old, new)]
        self._train_X = torch.cat(both, -2)
        if batch or self._reported is not None:
            return
        self._train_Y = torch.cat([self._train_Y, Y.detach()])
        if self._train_Yvar is not None:
            self._train_Yvar = torch.cat([self._train_Yvar, noise.detach().expand_as(Y)])

    def _with_unobserved(self, Y: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outcomes and noise of all outputs, of which only those reported were observed."""
        k, where = self.gp.num_outputs, torch.tensor(self._reported, device=Y.device)
        noise = self._noise_at(Y, True)[..., where].expand_as(Y) if noise is None else noise
        every = Y.new_zeros(*Y.shape[:-1], k).index_copy(-1, where, Y)
        return every, torch.full_like(every, UNOBSERVED).index_copy(-1, where, noise)

    def fantasize(self, X: Tensor, sampler, observation_noise: Tensor | None = None, **kwargs: Any) -> DNN2GPModel:
        """As BoTorch's; for a loss without noise, labels are drawn given the sampled outputs."""
        if observation_noise is None and self.likelihood.per_example_noise:
            observation_noise = self._noise_at(X, True).expand(1, self.num_outputs)
        if self.gp.noise is not None:
            return super().fantasize(X, sampler, observation_noise=observation_noise, **kwargs)
        with fantasize_flag():
            f = sampler(self.posterior(X))
            with torch.random.fork_rng(devices=[f.device] if f.is_cuda else []):
                torch.manual_seed(self.seed)
                labels = self.gp.loss.conditional(f.detach()).sample()
            return self.condition_on_observations(X=X, Y=labels, **kwargs)

    def _shallow_copy(self) -> DNN2GPModel:
        """A model of its own transforms that shares the GP, which is replaced, never changed."""
        return copy.deepcopy(self, {id(self.gp): self.gp, id(self._template): self._template})

    # ---- state

    def _state_parts(self) -> dict[str, nn.Module]:
        gp = self.gp
        parts = {"gp.covar_module.linearization": gp.linearization, "gp.residual_kernel": gp.residual_kernel}
        return {name: part for name, part in parts.items() if part is not None}

    def load_state_dict(
        self,
        state_dict: Mapping[str, Any],
        strict: bool = True,
        keep_transforms: bool = True,
        assign: bool = False,
    ) -> None:
        """Take over net, hyperparameters and transforms of a model of the same shapes; the data stay this one's.

        Args:
            state_dict: of another ``DNN2GPModel``.
            strict, assign: as of ``nn.Module``; what is missing is refused either way.
            keep_transforms: as of BoTorch's models: outcomes are transformed by the transforms of the state; False
                leaves the transformed outcomes as they are.

        Raises:
            UnsupportedError: this is a subset of outcomes, or a batch of fantasies.
        """
        if self._reported is not None or self.batch_shape:
            raise UnsupportedError(
                "Load the state into the model of all outcomes, before it is given fantasies; then take the subset, or "
                "make the fantasies."
            )
        state = dict(state_dict)
        own = self.state_dict()
        missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
        if strict and (missing or unexpected):
            raise RuntimeError(
                f"This state_dict is of another model: missing are {sorted(missing)}, unexpected {sorted(unexpected)}."
            )
        gp = self.gp
        lin = copy.deepcopy(gp.linearization)
        lin.load_state_dict(_under(state, "gp.covar_module.linearization."))
        kernel = copy.deepcopy(gp.residual_kernel)
        if kernel is not None:
            kernel.load_state_dict(_under(state, "gp.residual_kernel."))
        covar_module, likelihood = copy.deepcopy((gp.covar_module, gp.likelihood))
        covar_module.raw_prior_precision.data.copy_(state["gp.covar_module.raw_prior_precision"])
        loss = gp.loss
        if "gp.likelihood.raw_noise" in state:
            likelihood.raw_noise.data.copy_(state["gp.likelihood.raw_noise"])
            loss = Gaussian(likelihood.noise.detach().sqrt())
        for name in ("input_transform", "outcome_transform"):
            if hasattr(self, name):
                getattr(self, name).load_state_dict(_under(state, f"{name}."))
        x, y, yvar = self._transformed(learn=False)
        if not keep_transforms:
            y = gp.train_targets.reshape(y.shape)
        elif yvar is not None:
            loss = Gaussian(yvar.clamp(min=fitting.LOWEST_NOISE).sqrt())
        self.gp = LaplaceGP(
            lin,
            x,
            y,
            loss,
            covar_module.prior_precision.detach(),
            self.groups or [[name] for name in lin.param_names],
            residual_kernel=kernel,
            progress=False,
        )
        self._evidence_at_fit = self._evidence_per_point()


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _trainable(lin: Linearization, template: nn.Module) -> nn.Module:
    """A copy of the frozen net that trains what the template does."""
    net = copy.deepcopy(lin.net)
    wanted = {name for name, p in template.named_parameters() if p.requires_grad}
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in wanted)
    return net


def _common(noise: Tensor | None) -> Tensor | None:
    """Noise variances ``(q, m)`` of all batch elements."""
    if noise is None or noise.dim() <= 2:
        return noise
    first = noise[(0,) * (noise.dim() - 2)]
    if not torch.equal(noise, first.expand_as(noise)):
        raise UnsupportedError("Noise that differs between elements of a batch is not supported: condition on each.")
    return first


def _with_noise(mvn: MultivariateNormal, variances: Tensor) -> MultivariateNormal:
    """F plus independent noise ``(..., q, K)``."""
    several = isinstance(mvn, MultitaskMultivariateNormal)
    shape = mvn.mean.shape if several else (*mvn.mean.shape, 1)
    noise = variances.expand(torch.broadcast_shapes(variances.shape, shape)).flatten(-2)
    covariance = to_linear_operator(mvn.lazy_covariance_matrix).to_dense() + torch.diag_embed(noise)
    return type(mvn)(mvn.mean, DenseLinearOperator(covariance))


def _with_jitter(mvn: MultivariateNormal) -> MultivariateNormal:
    """With samples as of BoTorch's other models, by a Cholesky factor: with jitter where there is none.

    The exact root that a ``Covariance`` of ours has where it is singular is another one, and an optimiser of fixed base
    samples must not see them jump.
    """
    covariance = to_linear_operator(mvn.lazy_covariance_matrix).to_dense()
    return type(mvn)(mvn.mean, DenseLinearOperator(covariance))


def _subset(mvn: MultivariateNormal, outputs: Sequence[int]) -> MultivariateNormal:
    """The distribution of some outputs."""
    if not isinstance(mvn, MultitaskMultivariateNormal):
        return mvn
    mean = mvn.mean[..., list(outputs)]
    q, k = mvn.mean.shape[-2:]
    where = (torch.arange(q)[:, None] * k + torch.tensor(list(outputs)) % k).flatten()
    covariance = to_linear_operator(mvn.lazy_covariance_matrix).to_dense()[..., where[:, None], where]
    if len(outputs) == 1:
        return MultivariateNormal(mean[..., 0], DenseLinearOperator(covariance))
    return MultitaskMultivariateNormal(mean, DenseLinearOperator(covariance))
