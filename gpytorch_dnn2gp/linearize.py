"""A frozen copy of a net, as the linear model ``f(x) + J(x)(w - w*)`` that it is near its weights.

``Linearization`` is the face of ``jacobians.py`` and ``gram.py``: it selects parameters, checks inputs, restores the
shapes of images and sequences, and maps batch dimensions. The user's net is copied and never touched.

n examples, K outputs, P selected weights. Inputs are ``(..., n, d)``; with ``input_shape`` also
``(..., n, *input_shape)``.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from . import gram as _gram
from . import tiling
from .jacobians import NetFunction
from .numerics import first_index, in_plain_mode, require_finite

# Up to so many numbers the Jacobian itself is what products are made of: layers would save nothing.
FEW_NUMBERS = 2**22


class Linearization(nn.Module):
    """The Jacobian feature map of a trained net (the neural tangent features at its weights).

    Args:
        net: any module whose output is ``(n,)``, ``(n, 1)`` or ``(n, K)``, one row per example. It is deep-copied, the
            copy put in eval mode, so later training of the net does not move the linearization. Forward hooks are part
            of what a net computes and are copied with it.
        params: which weights are random: None for all that require a gradient; a list of names or prefixes such as
            ``["head", "body.2.weight"]``; or ``"last_layer"``. Frozen parameters are always left out.
        input_shape: shape of one input, where inputs travel flattened as ``n x d``, e.g. ``(1, 28, 28)``.
        input_dtype: integer dtype that the net wants, e.g. ``torch.long`` for token ids, which travel as floats.

    Raises:
        ValueError: no parameters selected, half precision or mixed dtypes, NaN weights, BatchNorm that normalises by
            the batch at hand. At the first inputs: outputs that depend on the other examples, or that are random.
    """

    def __init__(
        self,
        net: nn.Module,
        params: Sequence[str] | str | None = None,
        input_shape: Sequence[int] | None = None,
        input_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise TypeError(f"net must be a torch.nn.Module; got {type(net).__name__}.")
        if isinstance(net, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise TypeError(f"{type(net).__name__} only distributes a net: pass the net itself, net.module.")
        if isinstance(net, torch.jit.ScriptModule):
            raise TypeError("A traced or scripted net cannot be copied and differentiated here: pass the nn.Module.")
        names = select_parameters(net, params)
        _require_usable(net)
        self.net = _frozen_copy(net)
        self.input_shape = None if input_shape is None else torch.Size(input_shape)
        if input_dtype is not None and (input_dtype.is_floating_point or input_dtype.is_complex):
            raise ValueError(f"input_dtype is for integer inputs such as torch.long; got {input_dtype}.")
        self.input_dtype = input_dtype
        self.function = NetFunction(self.net, names)
        self._expect_last = _owner(names[-1]) if isinstance(params, str) and params == "last_layer" else None
        self._checked = False

    # ---- what was linearized

    @property
    def num_weights(self) -> int:
        """P, the number of selected weights."""
        return self.function.num_weights

    @property
    def num_outputs(self) -> int:
        """K; known once the linearization has seen an input."""
        if self.function.num_outputs is None:
            raise RuntimeError("The number of outputs is known after the first call: evaluate lin(x) once.")
        return self.function.num_outputs

    @property
    def param_names(self) -> list[str]:
        """Names of the selected parameters, in the order of the weight vector."""
        return self.function.names

    @property
    def param_sizes(self) -> list[int]:
        """Number of weights in each selected parameter."""
        return self.function.sizes

    @property
    def weights(self) -> Tensor:
        """w*, ``(P,)``."""
        return self.function.weights()

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.function.dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return next(self.net.parameters()).device

    def train(self, mode: bool = True) -> Linearization:
        """The frozen net stays in eval mode whatever module it is part of."""
        super().train(mode)
        self.net.eval()
        return self

    # ---- values and derivatives

    @in_plain_mode
    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``f(x)``, ``(..., n, K)``."""
        rows = self.rows(x)
        return self.function.outputs(rows.x).unflatten(0, rows.batch_shape)

    @in_plain_mode
    def jacobian(self, x: Tensor) -> Tensor:
        """``J(x)``, ``(..., n, K, P)``, weights in ``named_parameters`` order."""
        rows = self.rows(x)
        return self.function.jacobian(rows.x).unflatten(0, rows.batch_shape)

    @in_plain_mode
    def jvp(self, x: Tensor, u: Tensor) -> Tensor:
        """``J(x) u`` for ``u`` ``(P,)``: ``(..., n, K)``; for ``u`` ``(m, P)``: ``(m, ..., n, K)``."""
        rows = self.rows(x)
        return rows.matmul(u).unflatten(-2, rows.batch_shape)

    @in_plain_mode
    def vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """``sum_i J_i^T v_i``, ``(P,)``, summed over all examples, for ``v`` ``(..., n, K)``."""
        rows = self.rows(x)
        return rows.rmatmul(v.reshape(rows.num_examples, -1))

    @in_plain_mode
    def gram(
        self,
        x1: Tensor,
        x2: Tensor | None = None,
        prior_variance: Tensor | None = None,
        *,
        cotangents1: Tensor | None = None,
        cotangents2: Tensor | None = None,
        file: str | os.PathLike | None = None,
        progress: bool | None = None,
    ) -> Tensor:
        """``J(x1) S0 J(x2)^T``, ``(..., n1 K, n2 K)``, examples first, outputs fastest; S0 = diag(prior_variance) or I.

        Layer by layer, without Jacobians (see the package ``gram``).

        Args:
            x1, x2: inputs; ``x2=None`` means ``x1``.
            prior_variance: ``(P,)``.
            cotangents1, cotangents2: rows ``C_i J_i`` in place of ``J_i``, ``(n, m, K)``, for inputs without batch
                dimensions: with residuals, m = 1, the empirical Fisher's ``n x n`` kernel. Those of x1 serve both sides
                where ``x2=None``.
            file: a ``.npy`` file for the matrix, where it is larger than memory: written tile by tile, resumed by the
                next call if it is interrupted, returned as a tensor that reads from the file.
            progress: True, False, or None for a bar on terminals only.

        Raises:
            MemoryError: if it does not fit; names its size.
            FileExistsError: ``file`` exists.
            OSError: not enough free disk for ``file``; names the size.
            ValueError: variances that are negative or not finite; shapes that do not fit.
        """
        return self._gram(x1, x2, prior_variance, cotangents1, cotangents2, file, progress)

    @in_plain_mode
    def trace_gram(
        self,
        x1: Tensor,
        x2: Tensor | None = None,
        prior_variance: Tensor | None = None,
        *,
        file: str | os.PathLike | None = None,
        progress: bool | None = None,
    ) -> Tensor:
        """``sum_k J_k(x1) S0 J_k(x2)^T``, ``(..., n1, n2)``: the trace of each ``K x K`` block (paper, Figure 4).

        At a K-th of the time and a K^2-th of the memory of :meth:`gram`, whose arguments it takes.
        """
        return self._gram(x1, x2, prior_variance, None, None, file, progress, trace=True)

    def _gram(
        self,
        x1: Tensor,
        x2: Tensor | None,
        prior_variance: Tensor | None,
        cotangents1: Tensor | None,
        cotangents2: Tensor | None,
        file: str | os.PathLike | None,
        progress: bool | None,
        trace: bool = False,
    ) -> Tensor:
        self._require_variance(prior_variance)
        rows1 = self.rows(x1, self._checked_cotangents(cotangents1, x1, "cotangents1"))
        rows2 = None if x2 is None else self.rows(x2, self._checked_cotangents(cotangents2, x2, "cotangents2"))
        if x2 is None and cotangents2 is not None:
            raise ValueError("cotangents2 belong to x2: without it those of x1 serve both sides.")
        shapes = [rows.batch_shape for rows in (rows1, rows2) if rows is not None]
        left, right = rows1.side, None if rows2 is None else rows2.side
        options = {"prior_variance": prior_variance, "trace": trace}
        if any(len(shape) > 1 for shape in shapes):
            if file is not None:
                raise ValueError("A file holds one matrix: give inputs without batch dimensions.")
            return _gram.batched_gram(self.function, left, right, shapes[0], shapes[-1], **options)
        return _gram.gram(self.function, left, right, file=file, progress=progress, **options)

    def _require_variance(self, prior_variance: Tensor | None) -> None:
        if prior_variance is None:
            return
        self._require_alike(prior_variance, "prior_variance")
        if prior_variance.shape != (self.num_weights,):
            raise ValueError(
                f"prior_variance has shape {tuple(prior_variance.shape)}; the net has {self.num_weights} selected "
                "weights."
            )
        require_finite(prior_variance, "prior_variance")
        if (prior_variance < 0).any():
            index = first_index(prior_variance < 0)
            raise ValueError(f"prior_variance must not be negative; got {float(prior_variance[index])} at {index}.")

    def _require_alike(self, tensor: Tensor, name: str) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}.")
        if tensor.dtype != self.dtype or tensor.device != self.device:
            raise ValueError(
                f"{name}: {tensor.dtype} on {tensor.device}, but the net is {self.dtype} on {self.device}. Convert one "
                "of them."
            )

    def _checked_cotangents(self, cotangents: Tensor | None, x: Tensor, name: str) -> Tensor | None:
        if cotangents is None:
            return None
        self._require_alike(cotangents, name)
        inputs, shape = self.prepare(x)
        n, k = len(inputs), self.function.num_rows(inputs)
        right = cotangents.dim() == 3 and cotangents.shape[::2] == (n, k) and cotangents.shape[1] > 0
        if len(shape) != 1 or not right:
            raise ValueError(
                f"{name} has shape {tuple(cotangents.shape)}; {n} examples without batch dimensions and {k} outputs "
                f"want ({n}, m, {k}), m at least 1."
            )
        require_finite(cotangents, name, "They are what the rows of J are multiplied by.")
        return cotangents

    @in_plain_mode
    def gram_blocks(self, x: Tensor, prior_variance: Tensor | None = None) -> Tensor:
        """The ``K x K`` blocks ``J(x_i) S0 J(x_i)^T``, ``(..., n, K, K)``, at the cost of n examples."""
        self._require_variance(prior_variance)
        rows = self.rows(x)
        return _gram.gram_blocks(self.function, rows.side, prior_variance).unflatten(0, rows.batch_shape)

    @in_plain_mode
    def gram_diagonal(self, x: Tensor, prior_variance: Tensor | None = None) -> Tensor:
        """The diagonal of the Gram matrix, ``(..., n, K)``: the prior variances of the outputs."""
        self._require_variance(prior_variance)
        rows = self.rows(x)
        return _gram.gram_diagonal(self.function, rows.side, prior_variance).unflatten(0, rows.batch_shape)

    @in_plain_mode
    def sum_of_squares(self, x: Tensor, cotangents: Tensor | None = None, progress: bool | None = None) -> Tensor:
        """``sum_i sum_j (C_i J_i)_j^2``, ``(P,)``, for C ``(n, m, K)``: ``diag(J^T Lambda J)`` for ``C_i = R_i^T``.

        R is the root of the loss's noise precision, ``Lambda = R R^T``; without cotangents ``diag(J^T J)``. This is
        what the diagonal algorithms add up (paper, section 4), at the cost of one backward pass for each row.
        """
        rows = self.rows(x, self._checked_cotangents(cotangents, x, "cotangents"))
        return _gram.sum_of_squares(self.function, rows.side, progress)

    def rows(self, x: Tensor, cotangents: Tensor | None = None) -> Rows:
        """The Jacobian rows at these inputs, as an operator; see :class:`Rows`."""
        inputs, batch_shape = self.prepare(x)
        return Rows(self.function, inputs, batch_shape, cotangents)

    # ---- inputs

    def prepare(self, x: Tensor) -> tuple[Tensor, torch.Size]:
        """Check inputs and give them the net's shape: ``(N, *input_shape)`` and the shape ``(..., n)`` they had."""
        _require_tensor(x)
        if x.device != self.device:
            raise ValueError(f"Inputs are on {x.device} but the net is on {self.device}. Move one of them.")
        require_finite(x, "x", "Remove or impute these rows first.")
        if x.dim() <= 1:
            x = x.reshape(-1, 1)
        x, batch_shape = self._reshape(x)
        x = self._cast(x)
        if not self._checked and len(x) > 0:
            self._check_net(x.detach())
        return x, batch_shape

    def flatten_inputs(self, x: Tensor) -> Tensor:
        """Inputs as GPyTorch wants them, ``(..., n, d)`` floats."""
        _require_tensor(x)
        if x.dim() <= 1:
            x = x.reshape(-1, 1)
        if (
            self.input_shape is not None
            and len(self.input_shape) > 1
            and x.shape[-len(self.input_shape) :] == (self.input_shape)
        ):
            x = x.flatten(-len(self.input_shape))
        return x.to(self.dtype) if self.input_dtype is not None else x

    def _reshape(self, x: Tensor) -> tuple[Tensor, torch.Size]:
        shape = self.input_shape
        if shape is None:
            return x.reshape(-1, x.shape[-1]), x.shape[:-1]
        if x.shape[-len(shape) :] == shape:
            return x.reshape(-1, *shape), x.shape[: x.dim() - len(shape)]
        if x.shape[-1] == math.prod(shape):
            return x.reshape(-1, *shape), x.shape[:-1]
        raise ValueError(
            f"Inputs {tuple(x.shape)} end neither in input_shape {tuple(shape)} nor in its flattened length "
            f"{math.prod(shape)}."
        )

    def _cast(self, x: Tensor) -> Tensor:
        if self.input_dtype is None:
            if not x.is_floating_point():
                raise ValueError(
                    f"Inputs are {x.dtype}, but the net is {self.dtype}. Pass x.to({self.dtype}), or input_dtype="
                    f"{x.dtype} if the net wants integers (token ids)."
                )
            if x.dtype != self.dtype:
                raise ValueError(f"Inputs are {x.dtype} but the net is {self.dtype}. Convert one of them.")
            return x
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"Integer inputs (input_dtype={self.input_dtype}) have no gradient; detach x.")
        tokens = x.to(self.input_dtype)
        if x.is_floating_point() and not torch.equal(tokens.to(x.dtype), x):
            index = tuple(int(i) for i in (tokens.to(x.dtype) != x).nonzero()[0])
            raise ValueError(
                f"x must hold integers for input_dtype={self.input_dtype}; got {float(x[index])} at {index}."
            )
        self._require_known_tokens(tokens)
        return tokens

    def _require_known_tokens(self, tokens: Tensor) -> None:
        sizes = [module.num_embeddings for module in self.net.modules() if isinstance(module, nn.Embedding)]
        if not sizes or tokens.numel() == 0:
            return
        bad = (tokens < 0) | (tokens >= max(sizes))
        if bad.any():
            index = tuple(int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"Token id {int(tokens[index])} at index {index} is outside the net's embedding, 0..{max(sizes) - 1}. "
                "Map unknown tokens to an id that the net knows."
            )

    # ---- is it a function of one example?

    @torch.no_grad()
    def _check_net(self, x: Tensor) -> None:
        """One row per example, no randomness, no influence of another example; once, on two examples."""
        copies = 8  # of one example: what is random now and then shows in one of them
        both = torch.cat([x[:1].expand(copies, *x.shape[1:]), _another_example(x)])
        last: list[str] = []
        handles = [
            module.register_forward_hook(lambda *_, name=name: last.append(name))
            for name, module in self.net.named_modules()
            if next(module.parameters(recurse=False), None) is not None
        ]
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                pair, again = self.function.outputs(both), self.function.outputs(both)
                alone = self.function.outputs(x[:1])
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ValueError(
                "The net cannot take one example alone: it normalises by the batch at hand. Normalise by running "
                "statistics or by the example itself (BatchNorm in eval mode, LayerNorm, GroupNorm)."
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        require_finite(alone, "The net's output for the first example", "Scale the inputs as in training.")
        tolerance = 10 * math.sqrt(torch.finfo(self.dtype).eps) * (1 + alone.abs().max())
        if max((each[:copies] - pair[:1]).abs().max() for each in (pair, again)) > tolerance:
            raise ValueError(
                "The net gives different outputs for the same input in eval mode. Remove what is random in it "
                "(functional dropout without training=self.training, sampling)."
            )
        if (pair[:1] - alone).abs().max() > tolerance:
            raise ValueError(
                "The net's output for one example depends on the other examples in its batch. Normalise by running "
                "statistics or by the example itself (BatchNorm in eval mode, LayerNorm, GroupNorm)."
            )
        if self._expect_last is not None and last and last[-1] != self._expect_last:
            raise ValueError(
                f"params='last_layer' took '{self._expect_last}', the last layer that the net registers, but "
                f"'{last[-1] or 'the net itself'}' is the last to run. {self._advice(last[-1])}"
            )
        self._checked = True

    def _advice(self, last: str) -> str:
        """How to name the parameters of the layer that runs last."""
        module = self.net.get_submodule(last)
        names = {id(parameter): name for name, parameter in self.net.named_parameters()}  # of shared ones the first
        own = [names[id(parameter)] for parameter in module.parameters(recurse=False)]
        return f"Name its parameters: params={own}."


class DiagonalPrior(Protocol):
    """A prior by groups, ``S0 = diag(base_variance / precision)``: that of :mod:`weights`."""

    precision: Tensor
    group_index: Tensor
    base_variance: Tensor | None

    @property
    def variance(self) -> Tensor:
        """Diagonal of S0, ``(P,)``."""


class Rows:
    """The rows ``U_i = C_i J_i`` of a linear model at N given inputs, as an operator that need not be formed.

    Args:
        function: the net.
        x: inputs in the net's own shape, ``(N, *input_shape)``.
        batch_shape: ``(..., n)``, the shape the inputs had, with N entries.
        cotangents: C, ``(N, m, K)``; the identity without it, and then m = K.
    """

    def __init__(
        self, function: NetFunction, x: Tensor, batch_shape: torch.Size, cotangents: Tensor | None = None
    ) -> None:
        self.function = function
        self.x = x
        self.batch_shape = batch_shape
        self.cotangents = cotangents
        self._features: Tensor | None = None
        self._by_layers: _gram.Features | None = None
        self.residual: tuple[object, Tensor] | None = None  # a posterior's own covariance here, kept by it

    @property
    def num_examples(self) -> int:
        """N."""
        return len(self.x)

    @property
    def side(self) -> _gram.Side:
        """Inputs and cotangents, as one side of a Gram matrix."""
        return _gram.Side(self.x, self.cotangents, self._by_layers)

    def flat(self, part: slice = slice(None)) -> Rows:
        """Some of the examples, without batch dimensions."""
        x = self.x[part]
        rows = Rows(self.function, x, x.shape[:1], None if self.cotangents is None else self.cotangents[part])
        rows._features = None if self._features is None else self._features[part]
        rows._by_layers = None if self._by_layers is None else self._by_layers.part(part)
        return rows

    def flat_inputs(self) -> Tensor:
        """The inputs as vectors, ``(..., n, d)``, in the weights' dtype."""
        return self.x.flatten(1).unflatten(0, self.batch_shape).to(self.function.dtype)

    @property
    def num_rows(self) -> int:
        """m, rows per example."""
        return self.function.num_rows(self.x, self.cotangents)

    @property
    def num_weights(self) -> int:
        """P."""
        return self.function.num_weights

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Chunks of examples with their rows ``(b, m, P)``."""
        if self._features is not None:
            yield slice(0, self.num_examples), self._features
            return
        for part in self.function.jacobian_chunks(self.x, self.num_rows):
            yield part, self.function.jacobian_rows(self.x, self.cotangents, part)

    def features(self) -> Tensor:
        """All rows, ``(N, m, P)``; kept where they take little memory.

        Raises:
            MemoryError: if they do not fit.
        """
        if self._features is not None:
            return self._features
        features = self.function.jacobian(self.x, self.cotangents)
        if tiling.cache_fits(features.numel(), features.dtype, features.device):
            self._features = features
        return features

    def batched_features(self, prior_variance: Tensor | None = None) -> Tensor:
        """``U S0^(1/2)`` with the rows of each batch element stacked, ``(..., n m, P)``."""
        rows = self.features().unflatten(0, self.batch_shape).flatten(-3, -2)
        return rows if prior_variance is None else rows * prior_variance.sqrt()

    @property
    def kept(self) -> Tensor | None:
        """The rows, if they are in memory."""
        return self._features

    def keep(self, rows: Tensor | None = None) -> None:
        """Keep the rows for later use if they take little memory: then nothing is linearized twice.

        Args:
            rows: kept earlier, for the same net and inputs.
        """
        if rows is not None:
            self._features = rows
            return
        size = self.num_examples * self.num_rows * self.num_weights
        if tiling.cache_fits(size, self.function.dtype, self.x.device):
            self.features()

    @property
    def are_many(self) -> bool:
        """Whether the rows are not at hand, and too many for it to be cheap to form them."""
        size = self.num_examples * self.num_rows * self.num_weights
        return self._features is None and size > FEW_NUMBERS

    def sum_of_squares(self, cotangents: Tensor) -> Tensor:
        """``sum_i sum_j (C_i J_i)_j^2``, ``(P,)``, for rows of outputs and C ``(N, m, K)``."""
        return _gram.sum_of_squares(self.function, _gram.Side(self.x, cotangents), progress=False)

    def keep_for_products(self, groups: Sequence[Tensor], prior_variance: Tensor | None) -> None:
        """Keep what makes products of these rows cheap: the rows themselves if they are few, else their layers."""
        if self.num_examples * self.num_rows * self.num_weights <= FEW_NUMBERS:
            self.keep()
        elif self._features is None and self._by_layers is None:
            self._by_layers = _gram.form_features(self.function, self.side, prior_variance, groups)

    def grams(self, other: Rows | None, groups: Sequence[Tensor], prior_variance: Tensor | None) -> Tensor:
        """``U_g S0_g U'_g^T`` for each group of weights, ``(G, n m, n' m')``; without batch dimensions."""
        side = None if other is None else other.side
        return _gram.gram(self.function, self.side, side, prior_variance=prior_variance, groups=groups, progress=False)

    def covariance(self, other: Rows | None, prior: DiagonalPrior) -> Tensor:
        """``U S0 U'^T`` under a diagonal prior, ``(..., n m, n' m')``; ``other=None`` means the same rows."""
        sides = self.side, None if other is None else other.side
        shapes = self.batch_shape, self.batch_shape if other is None else other.batch_shape
        batch = shapes if any(len(shape) > 1 for shape in shapes) else ()
        multiply = _gram.batched_gram if batch else _gram.gram
        if not (prior.precision.requires_grad and torch.is_grad_enabled()):
            return multiply(self.function, *sides, *batch, prior_variance=prior.variance)
        groups = [(prior.group_index == g).nonzero()[:, 0] for g in range(len(prior.precision))]
        grams = multiply(self.function, *sides, *batch, prior_variance=prior.base_variance, groups=groups)
        return torch.einsum("g,g...->...", prior.precision.reciprocal(), grams)

    def covariance_blocks(self, prior: DiagonalPrior) -> Tensor:
        """The blocks ``U_i S0 U_i^T``, ``(N, m, m)``."""
        if self._features is None and not (prior.precision.requires_grad and torch.is_grad_enabled()):
            return _gram.gram_blocks(self.function, self.side, prior.variance)
        scaled = [u * prior.variance.sqrt() for _, u in self.blocks()]
        return torch.cat([u @ u.mT for u in scaled])

    def gram(self, groups: list[Tensor], prior_variance: Tensor | None, progress: bool | None = None) -> Tensor:
        """``U_g S0_g U_g^T`` for each group of weights, ``(G, N m, N m)``."""
        if self._features is not None:
            rows = self._features.flatten(0, 1)
            if prior_variance is not None:
                rows = rows * prior_variance.sqrt()
            return torch.stack([rows[:, g] @ rows[:, g].mT if len(groups) > 1 else rows @ rows.mT for g in groups])
        return _gram.gram(self.function, self.side, prior_variance=prior_variance, groups=groups, progress=progress)

    def matmul(self, u: Tensor) -> Tensor:
        """``U u``, ``(..., N, m)``, for ``u`` ``(..., P)``."""
        if self._features is not None:
            return torch.einsum("nmp,...p->...nm", self._features, u)
        out = self.function.jvp(self.x, u)
        return out if self.cotangents is None else torch.einsum("nmk,...nk->...nm", self.cotangents, out)

    def rmatmul(self, v: Tensor) -> Tensor:
        """``U^T v``, ``(..., P)``, for ``v`` ``(..., N, m)``."""
        if self._features is not None:
            return torch.einsum("nmp,...nm->...p", self._features, v)
        if self.cotangents is not None:
            v = torch.einsum("nmk,...nm->...nk", self.cotangents, v)
        return self.function.vjp(self.x, v)

    def cross(self, rows: Tensor) -> Tensor:
        """``rows U^T``, ``(..., N m)``, for given feature rows ``(..., P)``."""
        return torch.cat([rows @ block.flatten(0, 1).mT for _, block in self.blocks()], dim=-1)


def _require_tensor(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"Inputs must be a tensor; got {type(x).__name__}. torch.as_tensor makes one.")


def _another_example(x: Tensor) -> Tensor:
    """An example other than the first of ``x``, ``(1, *input_shape)``: one of the first thousand, or made up."""
    differs = (x[:1000] != x[:1]).flatten(1).any(1)
    if differs.any():
        return x[first_index(differs)][None]
    mirrored = x[:1].flip(-1)
    return x[:1] + 1 if x.is_floating_point() and torch.equal(mirrored, x[:1]) else mirrored


# ---- the net


def select_parameters(net: nn.Module, params: Sequence[str] | str | None) -> list[str]:
    """Names of the parameters of ``net`` that ``params`` selects; see :class:`Linearization`."""
    trainable = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("No parameter of the net requires a gradient: call net.requires_grad_() on what is trained.")
    if params is None:
        return trainable
    if isinstance(params, str):
        if params == "last_layer":
            return [name for name in trainable if _owner(name) == _owner(trainable[-1])]
        params = [params]
    chosen: set[str] = set()
    for prefix in params:
        matches = [name for name in trainable if name == prefix or name.startswith(prefix.rstrip(".") + ".")]
        if not matches:
            raise ValueError(
                f"params entry '{prefix}' matches no parameter that requires a gradient. There are: "
                f"{', '.join(trainable)}."
            )
        chosen.update(matches)
    if not chosen:
        raise ValueError("params selects no parameters. Pass None for all, names or prefixes, or 'last_layer'.")
    return [name for name in trainable if name in chosen]


def _owner(parameter_name: str) -> str:
    """Name of the module that owns a parameter."""
    return parameter_name.rpartition(".")[0]


def _require_usable(net: nn.Module) -> None:
    dtypes = {parameter.dtype for parameter in net.parameters()}
    if len(dtypes) > 1:
        raise ValueError(f"The net mixes parameter dtypes {sorted(map(str, dtypes))}. Convert it to one of them.")
    if dtypes - {torch.float32, torch.float64}:
        raise ValueError(f"The net is {dtypes.pop()}; float32 or float64 is needed, e.g. copy.deepcopy(net).float().")
    if len({parameter.device for parameter in net.parameters()}) > 1:
        raise ValueError("The net's parameters are on several devices. Move them to one.")
    if any(parameter.is_meta for parameter in net.parameters()):
        raise ValueError("The net is on the meta device, where weights have no values. Load them first.")
    cure = "Its training has diverged: train it anew."
    for name, parameter in net.named_parameters():
        require_finite(parameter.detach(), f"The net's parameter '{name}'", cure)
    for name, buffer in net.named_buffers():
        if buffer.isnan().any():  # an infinite one may be a mask
            require_finite(buffer, f"The net's buffer '{name}'", cure)
    for name, module in net.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"'{name}' normalises by the batch at hand (track_running_stats=False), so outputs depend on the other "
                "examples. Use running statistics, LayerNorm or GroupNorm."
            )


def _frozen_copy(net: nn.Module) -> nn.Module:
    """A deep copy in eval mode, without gradients (``deepcopy`` of a parameter leaves its ``.grad`` behind).

    Forward hooks are part of what a net computes and stay (weight norm is one); backward hooks would change J, or run
    into the user's objects, and go.
    """
    # Activations that a module has kept, and weights that a hook computes, are no leaves: deepcopy refuses those.
    memo = {
        id(value): value.detach().clone()
        for module in net.modules()
        for value in _tensors(vars(module))
        if not value.is_leaf
    }
    frozen = copy.deepcopy(net, memo).eval().requires_grad_(False)
    for module in frozen.modules():
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    return frozen


def _tensors(value: object) -> Iterator[Tensor]:
    """Tensors in an attribute, or in the lists, tuples and dicts it is made of."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
