"""One net as a function of its weights, and the derivatives of its outputs in them, by autodiff.

    paper            here                       shape
    f_w(x)           NetFunction.__call__       (n, K)
    J_w(x)           NetFunction.jacobian       (n, K, P)
    J u              NetFunction.jvp            (n, K)
    J^T v            NetFunction.vjp            (P,)

n examples, K outputs, P selected weights in ``named_parameters`` order. More general rows ``C_i J_i`` (paper eq. 5:
``phi^T``) are asked for by ``cotangents`` C, ``(n, m, K)``. Everything is differentiable in the inputs when they
require a gradient, and works in chunks of examples otherwise.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import tiling
from .exact_operations import ExactOperations

# What torch raises where an operator has no vmap or forward-mode rule (fused RNNs, data-dependent control flow, ...).
UNSUPPORTED = (RuntimeError, NotImplementedError, ValueError)


class NetFunction:
    """``f(weights, x)`` of a frozen net, restricted to the parameters called ``names``.

    Args:
        net: module in eval mode whose parameters do not require gradients. It is read, never written.
        names: selected parameters, in ``named_parameters`` order.
    """

    def __init__(self, net: nn.Module, names: list[str]) -> None:
        self.net = net
        self.names = list(names)
        parameters = dict(net.named_parameters())
        self.shapes = [parameters[name].shape for name in self.names]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.num_outputs: int | None = None  # K, known after the first example
        self.activation_size: int | None = None  # numbers stored by one forward pass of one example
        self._has_rnn = any(isinstance(module, nn.RNNBase) for module in net.modules())
        self._vmap_works: bool | None = None
        self._vmap_differentiates: bool | None = None
        self._checked: dict[tuple, bool] = {}
        self._forward_mode_works: bool | None = None
        self.capture_by_vmap: bool | None = None  # as the two above, for gram/capture.py
        self.covered: dict[torch.Size, dict[str, list[str]]] = {}  # and for gram/coverage.py

    def restricted(self, names: list[str]) -> NetFunction:
        """The same net as a function of some of these parameters."""
        other = NetFunction(self.net, names)
        other.num_outputs, other.activation_size = self.num_outputs, self.activation_size
        other._vmap_works = self._vmap_works
        return other

    @property
    def num_weights(self) -> int:
        """P."""
        return sum(self.sizes)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, hence of every result."""
        return next(self.net.parameters()).dtype

    def weights(self) -> Tensor:
        """The selected weights as one vector, ``(P,)``."""
        return self.flatten(self.weight_dict())

    def weight_dict(self) -> dict[str, Tensor]:
        """The selected weights by name."""
        parameters = dict(self.net.named_parameters())
        return {name: parameters[name].detach() for name in self.names}

    def flatten(self, tensors: dict[str, Tensor], num_batch_dims: int = 0) -> Tensor:
        """Concatenate tensors ``(batch..., *shape)`` by name to ``(batch..., P)``."""
        parts = (tensors[name] for name in self.names)
        return torch.cat([t[..., None] if t.dim() == num_batch_dims else t.flatten(num_batch_dims) for t in parts], -1)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Split ``(batch..., P)`` into tensors by name; the inverse of :meth:`flatten`."""
        pieces = vector.split(self.sizes, dim=-1)
        return {
            name: piece.reshape(*vector.shape[:-1], *shape)
            for name, piece, shape in zip(self.names, pieces, self.shapes, strict=True)
        }

    def sizes_by_name(self) -> dict[str, int]:
        """Number of weights in each parameter tensor."""
        return dict(zip(self.names, self.sizes, strict=True))

    def slices(self) -> list[slice]:
        """Where each parameter tensor lies in the weight vector."""
        ends = itertools.accumulate(self.sizes)
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]

    # ---- values

    def __call__(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        """Outputs ``(n, K)`` at inputs ``(n, *input_shape)``; a net that returns ``(n,)`` has one output."""
        try:
            out = functional_call(self.net, weights, (x.clone(),))  # the net may change its input in place
        except Exception as error:
            error.add_note(
                f"The net itself raised this, at inputs of shape {tuple(x.shape)} and {x.dtype}. Images and sequences "
                "want input_shape=, token ids input_dtype=torch.long."
            )
            raise
        if not isinstance(out, Tensor):
            raise TypeError(
                f"The net returned {type(out).__name__}, not a tensor. Wrap it in a module that returns its outputs "
                "(n, K) alone."
            )
        if out.dim() == 1:
            out = out[:, None]
        if out.dim() != 2 or out.shape[0] != x.shape[0]:
            raise ValueError(
                f"The net maps {tuple(x.shape)} to {tuple(out.shape)}; it must return (n,), (n, 1) or (n, K) with "
                f"n = {x.shape[0]}. Flatten further output dimensions in a wrapping module; images and sequences want "
                "input_shape=."
            )
        return out

    def outputs(self, x: Tensor) -> Tensor:
        """Outputs ``(n, K)`` at the net's own weights, in chunks."""
        if len(x) == 0 and self.num_outputs is not None:
            return torch.zeros(0, self.num_outputs, dtype=self.dtype, device=x.device)
        if x.requires_grad and torch.is_grad_enabled():
            return self(self.weight_dict(), x)
        self.measure(x)
        weights = self.weight_dict()
        with torch.no_grad(), self.differentiable_kernels():
            return torch.cat([self(weights, x[part]) for part in self._chunks(x, self.activation_size)])

    # ---- Jacobians

    def jacobian(self, x: Tensor, cotangents: Tensor | None = None) -> Tensor:
        """Rows ``C_i J_i``, ``(n, m, P)``; ``J`` itself, ``(n, K, P)``, without ``cotangents`` ``(n, m, K)``."""
        num_rows = self.num_rows(x, cotangents)
        tiling.require_memory(
            len(x) * num_rows * self.num_weights,
            self.dtype,
            x.device,
            f"The Jacobian of {len(x)} examples x {num_rows} rows x {self.num_weights} weights",
            "Ask for fewer examples at once, or use jvp, vjp or gram, which never form it.",
        )
        return torch.cat([self.jacobian_rows(x, cotangents, part) for part in self.jacobian_chunks(x, num_rows)])

    def num_rows(self, x: Tensor, cotangents: Tensor | None = None) -> int:
        """Rows per example: K, or the m of the cotangents."""
        self.measure(x)
        if self.num_outputs is None:
            raise ValueError(
                "The number of outputs is known after the first example: call the net on one before asking for none."
            )
        return self.num_outputs if cotangents is None else cotangents.shape[-2]

    def jacobian_chunks(self, x: Tensor, num_rows: int) -> list[slice]:
        """Slices of the examples whose Jacobians fit the budget of one chunk."""
        self.measure(x)
        return self._chunks(x, num_rows * (2 * self.num_weights + 2 * self.activation_size))

    def jacobian_rows(self, x: Tensor, cotangents: Tensor | None, part: slice) -> Tensor:
        """All rows of the examples of one chunk: ``vmap`` where torch can, else a loop."""
        x, cotangents = x[part], None if cotangents is None else cotangents[part]
        if len(x) == 0:
            return torch.zeros(0, self.num_rows(x, cotangents), self.num_weights, dtype=self.dtype, device=x.device)
        if self._vmap_works is False or not self.vmap_differentiates(x):
            return self.jacobian_loop(x, cotangents)
        try:
            with self.differentiable_kernels():
                rows = self._jacobian_vmap(x, cotangents)
            if self.right_once("jacobian", rows.shape, lambda: self._agrees_with_plain_autograd(rows, x, cotangents)):
                self._vmap_works = True
                return rows
        except UNSUPPORTED:
            if self._vmap_works:
                raise
        rows = self.jacobian_loop(x, cotangents)  # raises by itself if the net is at fault
        self._vmap_works = False
        return rows

    def vmap_differentiates(self, x: Tensor) -> bool:
        """Whether first and second derivatives in x of vmap's Jacobians are those of plain autograd; checked once."""
        if torch._C._functorch.is_functorch_wrapped_tensor(x) or not (x.requires_grad and torch.is_grad_enabled()):
            return True
        if self._vmap_differentiates is None:
            x = x[:2].detach().clone().requires_grad_()
            made_up = torch.arange(1.0, 1 + x.numel() + self.num_weights, dtype=self.dtype, device=x.device).cos()
            direction, u = made_up[: x.numel()].reshape(x.shape), made_up[x.numel() :]
            angles = torch.arange(1.0, 1 + 2 * len(x) * self.num_outputs, dtype=self.dtype, device=x.device)
            cotangents = angles.cos().reshape(len(x), 2, self.num_outputs)
            found = []
            for jacobian in (self._jacobian_vmap, self.jacobian_loop):
                with self.differentiable_kernels():
                    try:
                        value = (jacobian(x, cotangents) @ u).sum()
                        options = {"create_graph": True, "materialize_grads": True}
                        (first,) = torch.autograd.grad(value, x, **options)
                        (second,) = torch.autograd.grad((first * direction).sum() + 0 * x.sum(), x, **options)
                    except UNSUPPORTED:  # second derivatives that torch has not
                        return True
                    found += [first.detach(), second.detach()]
            self._vmap_differentiates = all(
                bool((a - b).abs().max() <= 10 * torch.finfo(self.dtype).eps ** 0.5 * b.abs().max() + 1e-30)
                for a, b in zip(found[:2], found[2:], strict=True)
            )
        return self._vmap_differentiates

    def right_once(self, what: str, shape: torch.Size, check: Callable[[], bool | None]) -> bool:
        """The answer of ``check``, asked once for each shape, on which errors of batching rules depend.

        None for "cannot be told here", as inside a transform of the user's own: taken for right, and asked again.
        """
        key = (what, shape)
        if self._checked.get(key) is None:
            self._checked[key] = check()
        return self._checked[key] is not False

    @torch.no_grad()
    def _agrees_with_plain_autograd(self, rows: Tensor, x: Tensor, cotangents: Tensor | None) -> bool | None:
        """Whether ``vmap`` gave what one backward pass gives: torch's batching rules have had errors."""
        if torch._C._functorch.is_functorch_wrapped_tensor(rows):
            return None
        for i in {0, len(x) - 1}:
            f_i, leaves = self._with_graph(x[i : i + 1].detach())
            v = torch.cos(torch.arange(1.0, 1 + rows.shape[1], dtype=self.dtype, device=x.device))
            c = v if cotangents is None else v @ cotangents[i].detach()
            expected = self._pull_back(f_i, leaves, c[None], x)
            error = (v @ rows[i].detach() - expected).abs().max()
            if not error <= 10 * torch.finfo(self.dtype).eps ** 0.5 * expected.abs().max():
                return False
        return True

    def _jacobian_vmap(self, x: Tensor, cotangents: Tensor | None) -> Tensor:
        weights = self.weight_dict()

        def example(x_i: Tensor, c_i: Tensor | None) -> Tensor:
            f_i, pullback = vjp(lambda w: self(w, x_i[None])[0], weights)
            if c_i is None and len(f_i) == 1:  # one row, for which a further vmap is the larger half of the time
                return self.flatten(pullback(torch.ones_like(f_i))[0])[None]
            if c_i is None:
                c_i = torch.eye(len(f_i), dtype=f_i.dtype, device=f_i.device)
            return self.flatten(vmap(pullback)(c_i)[0], num_batch_dims=1)

        if cotangents is None:
            return vmap(lambda x_i: example(x_i, None))(x)
        return vmap(example)(x, cotangents)

    def jacobian_loop(self, x: Tensor, cotangents: Tensor | None) -> Tensor:
        """The same, one backward pass at a time: for layers that vmap cannot batch."""
        rows = []
        for i in range(len(x)):
            f_i, leaves = self._with_graph(x[i : i + 1])
            c_i = cotangents[i] if cotangents is not None else torch.eye(f_i.shape[-1]).to(f_i)
            rows.append(torch.stack([self._pull_back(f_i, leaves, c[None], x) for c in c_i]))
        return torch.stack(rows)

    # ---- products

    def vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """``sum_i J_i^T v_i``, ``(..., P)``, for cotangents ``v`` ``(..., n, K)``: one backward pass each."""
        self.measure(x)
        batch = v.shape[:-2]
        v = v.reshape(-1, *v.shape[-2:])
        total = 0
        for part in self._chunks(x, 2 * self.activation_size):
            f, leaves = self._with_graph(x[part])
            total = total + torch.stack([self._pull_back(f, leaves, v_j[part], x) for v_j in v])
        return total.reshape(*batch, self.num_weights)

    def jvp(self, x: Tensor, u: Tensor) -> Tensor:
        """``J_i u``, ``(..., n, K)``, for directions ``u`` ``(..., P)``: one forward-mode pass each."""
        self.measure(x)
        batch = u.shape[:-1]
        u = u.reshape(-1, self.num_weights)
        blocks = [self._jvp_chunk(x[part], u) for part in self._chunks(x, 2 * self.activation_size * len(u))]
        out = torch.cat(blocks, dim=-2)
        return out.reshape(*batch, *out.shape[-2:])

    def _jvp_chunk(self, x: Tensor, u: Tensor) -> Tensor:
        if self._forward_mode_works is not False:
            try:
                with self.differentiable_kernels():
                    out = self._jvp_forward_mode(x, u)
                if self._forward_mode_works is None:
                    self._forward_mode_works = self._agrees_with_reverse_mode(x)
                if self._forward_mode_works:
                    return out
            except UNSUPPORTED:
                if self._forward_mode_works:
                    raise
                self._forward_mode_works = False
        blocks = [
            torch.einsum("nkp,jp->jnk", self.jacobian_rows(x, None, part), u)
            for part in self.jacobian_chunks(x, self.num_outputs)
        ]
        return torch.cat(blocks, dim=-2)

    @torch.no_grad()
    def _agrees_with_reverse_mode(self, x: Tensor) -> bool:
        """Whether ``v . (J u) = (J^T v) . u``.

        Forward mode passes through ``torch.no_grad()`` in a net, where reverse mode stops.
        """
        x = x[:1].detach()
        u = torch.cos(torch.arange(1.0, 1 + self.num_weights, dtype=self.dtype, device=x.device))
        v = torch.sin(torch.arange(1.0, 1 + self.num_outputs, dtype=self.dtype, device=x.device))
        forward = v * self._jvp_forward_mode(x, u[None])[0, 0]
        reverse = self.vjp(x, v[None]) * u
        scale = forward.norm() + reverse.norm()
        return bool((forward.sum() - reverse.sum()).abs() <= 10 * torch.finfo(self.dtype).eps ** 0.5 * scale)

    def _jvp_forward_mode(self, x: Tensor, u: Tensor) -> Tensor:
        weights = self.weight_dict()
        return vmap(lambda u_j: jvp(lambda w: self(w, x), (weights,), (self.unflatten(u_j),))[1])(u)

    # ---- shared pieces

    def _with_graph(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Outputs with a graph to fresh leaves that hold the selected weights; the net's own stay untouched."""
        leaves = {name: weight.clone().requires_grad_() for name, weight in self.weight_dict().items()}
        with torch.enable_grad(), self.differentiable_kernels():
            return self(leaves, x), list(leaves.values())

    def _pull_back(self, f: Tensor, leaves: list[Tensor], cotangent: Tensor, x: Tensor) -> Tensor:
        create_graph = torch.is_grad_enabled() and (x.requires_grad or cotangent.requires_grad)
        if not f.requires_grad:  # no selected weight takes part
            return torch.cat([torch.zeros_like(leaf).flatten() for leaf in leaves])
        with torch.enable_grad():
            grads = torch.autograd.grad(
                f, leaves, cotangent, retain_graph=True, create_graph=create_graph, materialize_grads=True
            )
        dense = (grad.to_dense() if grad.is_sparse else grad for grad in grads)  # nn.Embedding(sparse=True)
        return torch.cat([grad.flatten() for grad in dense])

    def _chunks(self, x: Tensor, elements_per_example: int) -> list[slice]:
        if len(x) == 0:
            return [slice(0, 0)]
        return tiling.chunks(len(x), tiling.chunk_length(elements_per_example, self.dtype, x.device))

    def measure(self, x: Tensor) -> None:
        """Count what one example leaves in memory on its way through the net, once, for the chunk lengths."""
        if self.activation_size is not None or len(x) == 0:
            return
        counts = [x[:1].numel()]

        def count(_module: nn.Module, _inputs: tuple, output: object) -> None:
            if isinstance(output, Tensor):
                counts.append(output.numel())

        leaves = [module for module in self.net.modules() if not any(module.children())]
        handles = [module.register_forward_hook(count) for module in leaves]
        try:
            with torch.no_grad(), self.differentiable_kernels():
                f = self(self.weight_dict(), x[:1].detach())
        finally:
            for handle in handles:
                handle.remove()
        self.activation_size, self.num_outputs = sum(counts), f.shape[-1]

    @contextlib.contextmanager
    def differentiable_kernels(self) -> Iterator[None]:
        """Fused inference kernels have no derivatives: use the ordinary ones here, then restore the settings."""
        fastpath, cudnn = torch.backends.mha.get_fastpath_enabled(), torch.backends.cudnn.enabled
        torch.backends.mha.set_fastpath_enabled(False)
        if self._has_rnn:  # cuDNN differentiates recurrent layers in training mode only
            torch.backends.cudnn.enabled = False
        try:
            with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH), ExactOperations():
                warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            torch.backends.cudnn.enabled = cudnn
