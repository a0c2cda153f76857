"""Sums of squared Jacobian rows, layer by layer: ``diag(J^T Lambda J)`` without Jacobians.

A linear layer ``z = W a + b`` has ``dl/dW = g a^T`` with ``g = dl/dz``. Over examples i, cotangents c and the T sites t
that a layer is applied at (positions of a convolution or a sequence, calls of a shared module)

    sum_ic (dl/dW)^2 = (sum_c g_c^2)^T a^2                T = 1: one product of matrices, whatever the number of c
    sum_ic (dl/dW)^2 = sum_ic (sum_t g_ict a_it^T)^2      T > 1

With cotangents R e_c, ``Lambda = R R^T``, that is the diagonal of ``J^T Lambda J``, at the cost of K backward passes to
the outputs of layers. Parameters of other layers are taken by per-example Jacobians of just those. A use of a parameter
that hooks cannot see would make a rule wrong: rules are compared with Jacobians on two examples, once, and those that
fail are not used.

``gram.sum_of_squares`` gives the same sums for a frozen net. Here outputs, ``J^T v`` and squares come of one pass
through a net whose weights change between calls, as a step of training wants them.

n examples, K outputs, m cotangents, P weights. Read jacobians.py first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, unfold

from . import tiling
from .jacobians import NetFunction

# outputs f (b, K) of some of the examples, and which -> their cotangents (m, b, K) and v (b, K)
Weigh = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


class SquaredRows:
    """``sum_i J_i^T v_i`` and ``sum_ic (c_i^T J_i)^2`` of a net at its present weights.

    Args:
        function: the net; it may be one in training, whose weights change between calls.
    """

    def __init__(self, function: NetFunction) -> None:
        self.function = function
        self._parameters = dict(function.net.named_parameters())
        names = {id(self._parameters[name]): name for name in function.names}
        owners: dict[str, list[tuple[nn.Module, str]]] = {}
        for module in function.net.modules():
            for kind, parameter in module._parameters.items():
                if id(parameter) in names:
                    owners.setdefault(names[id(parameter)], []).append((module, kind))
        # parameters that rules cover, by what they are to which modules
        self.rules = {name: of for name, of in owners.items() if all(_has_rule(module) for module, _ in of)}
        self._checked = False

    def __call__(self, x: Tensor, weigh: Weigh) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs ``(n, K)``, ``sum_i J_i^T v_i`` ``(P,)`` and ``sum_ic (c_i^T J_i)^2`` ``(P,)``.

        Args:
            x: inputs ``(n, *input_shape)``.
            weigh: cotangents c and v of a chunk of examples, by its outputs.
        """
        if not self._checked and len(x) > 0:
            self._check(x[:2])
        self.function.measure(x)
        covered = sum(self._parameters[name].numel() for name in self.rules)
        per_example = 8 * self.function.activation_size + 2 * covered
        chunks = tiling.chunks(len(x), tiling.chunk_length(per_example, self.function.dtype, x.device))
        f, first, second = zip(*(self._chunk(x[part], part, weigh) for part in chunks), strict=True)
        return torch.cat(f), sum(first), sum(second)

    def _chunk(self, x: Tensor, part: slice, weigh: Weigh) -> tuple[Tensor, Tensor, Tensor]:
        function = self.function
        leaves = {name: self._parameters[name].detach().requires_grad_() for name in function.names}
        with torch.enable_grad(), function.differentiable_kernels(), self._noted_uses() as uses:
            f = function(leaves, x)
        cotangents, v = weigh(f.detach(), part)
        zeros = [use.zero for use in uses]
        both = len(cotangents) == 1 and torch.equal(cotangents[0], v)  # squared gradients: one pass does
        wanted = [*leaves.values(), *(zeros if both else [])]
        pulled = torch.autograd.grad(f, wanted, v, retain_graph=not both, materialize_grads=True)
        first = function.flatten(dict(zip(leaves, map(_dense, pulled))))
        if both:
            squares = self._squares(uses, len(x), [pulled[len(leaves) :]])
        else:
            passes = (torch.autograd.grad(f, zeros, c, retain_graph=True, materialize_grads=True) for c in cotangents)
            squares = self._squares(uses, len(x), passes if zeros else [])
        rest = [name for name in function.names if name not in squares]
        if rest:
            squares |= self._by_jacobians(rest, x, cotangents)
        return f.detach(), first, function.flatten(squares)

    @contextmanager
    def _noted_uses(self) -> Iterator[list[_Use]]:
        """Hooks that note each layer's inputs and add a zero to its outputs, whose gradient is g."""
        uses: list[_Use] = []

        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            zero = torch.zeros_like(output, requires_grad=True)
            uses.append(_Use(module, inputs[0].detach(), zero))
            return output + zero

        modules = {module for of in self.rules.values() for module, _ in of}
        handles = [module.register_forward_hook(hook) for module in modules]
        try:
            yield uses
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _squares(self, uses: list[_Use], n: int, passes) -> dict[str, Tensor]:
        """``sum_ic (c_i^T J_i)^2`` of the parameters that rules cover, from gradients g of all uses for each c."""
        # where each parameter was used, and as what
        places = {
            name: [(i, kind) for module, kind in of for i, use in enumerate(uses) if use.module is module]
            for name, of in self.rules.items()
        }
        squares = {name: torch.zeros_like(self._parameters[name]) for name in self.rules}
        inputs: dict[int, Tensor] = {}  # (n, d, T) by the number of the use
        single: dict[str, Tensor] = {}  # sum_c g_c^2 (n, out) of weights used at one site
        for pulled in passes:
            g = [use.output_sites(gradient, n) for use, gradient in zip(uses, pulled, strict=True)]
            for name, of in places.items():
                if len(of) == 1 and of[0][1] == "weight" and g[of[0][0]].shape[-1] == 1:
                    single[name] = single.get(name, 0) + g[of[0][0]][..., 0].square()
                    continue
                total = 0  # (n, out, d), or (n, out) of a bias
                for i, kind in of:
                    if kind == "weight" and i not in inputs:
                        inputs[i] = uses[i].input_sites(n)
                    total = total + (g[i] @ inputs[i].mT if kind == "weight" else g[i].sum(-1))
                if of:
                    squares[name] += total.square().sum(0).view_as(squares[name])
        for name, g_squared in single.items():
            a_squared = uses[places[name][0][0]].input_sites(n)[..., 0].square()
            squares[name] += (g_squared.mT @ a_squared).view_as(squares[name])
        return squares

    def _by_jacobians(self, names: list[str], x: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
        """The same for any parameters, by Jacobians of just these."""
        function = NetFunction(self.function.net, names)
        total = torch.zeros(function.num_weights, dtype=function.dtype, device=x.device)
        c = cotangents.movedim(0, 1)  # (n, m, K)
        for part in function.jacobian_chunks(x, c.shape[1]):
            total += function.jacobian_rows(x, c, part).square().sum((0, 1))
        return function.unflatten(total)

    def _check(self, x: Tensor) -> None:
        """Keep the rules that agree with Jacobians on two examples."""
        k = self.function.num_rows(x)
        c = torch.cos(torch.arange(1.0, 1 + 2 * len(x) * k, dtype=self.function.dtype, device=x.device))
        c = c.reshape(2, len(x), k)
        found: dict[str, Tensor] = {}
        while self.rules:
            try:
                found = self._rules_alone(x, c)
                break
            except _NoRuleError as error:  # a layer that is applied to something else than examples first
                self.rules = {n: of for n, of in self.rules.items() if all(m is not error.module for m, _ in of)}
        expected = self._by_jacobians(list(self.rules), x, c) if self.rules else {}
        tolerance = 10 * torch.finfo(self.function.dtype).eps ** 0.5
        for name, value in expected.items():
            if not (found[name] - value).abs().max() <= tolerance * (value.abs().max() + tolerance):
                del self.rules[name]
        self._checked = True

    def _rules_alone(self, x: Tensor, c: Tensor) -> dict[str, Tensor]:
        leaves = {name: self._parameters[name].detach().requires_grad_() for name in self.function.names}
        with torch.enable_grad(), self.function.differentiable_kernels(), self._noted_uses() as uses:
            f = self.function(leaves, x)
        zeros = [use.zero for use in uses]
        passes = (torch.autograd.grad(f, zeros, c_j, retain_graph=True, materialize_grads=True) for c_j in c)
        return self._squares(uses, len(x), passes if zeros else [])


class _NoRuleError(Exception):
    def __init__(self, module: nn.Module) -> None:
        super().__init__(f"{module} is applied to inputs that do not have the examples first.")
        self.module = module


@dataclass(frozen=True)
class _Use:
    """One call of a layer: its input and the zero that was added to its output."""

    module: nn.Module
    a: Tensor
    zero: Tensor

    def input_sites(self, n: int) -> Tensor:
        """``(n, d, T)``."""
        module, a = self.module, self.a
        if len(a) != n:
            raise _NoRuleError(module)
        if isinstance(module, nn.Linear):
            return a.reshape(n, -1, a.shape[-1]).mT
        if isinstance(module, nn.Conv1d):
            a = a[:, :, None]
        kernel, dilation, padding, stride = (
            (one, *size) if len(size) == 1 else size
            for one, size in ((1, module.kernel_size), (1, module.dilation), (0, module.padding), (1, module.stride))
        )
        if dilation != (1, 1):
            return unfold(a, kernel, dilation, padding, stride)
        # the same as unfold, many times faster: views, and one copy along contiguous memory
        a = pad(a, (padding[1], padding[1], padding[0], padding[0]))
        windows = a.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])  # (n, c, h, w, kh, kw)
        return windows.permute(0, 1, 4, 5, 2, 3).reshape(n, -1, windows.shape[2] * windows.shape[3])

    def output_sites(self, g: Tensor, n: int) -> Tensor:
        """``(n, out, T)``."""
        if len(g) != n:
            raise _NoRuleError(self.module)
        return g.reshape(n, -1, g.shape[-1]).mT if isinstance(self.module, nn.Linear) else g.flatten(2)


def _has_rule(module: nn.Module) -> bool:
    if type(module) is nn.Linear:
        return True
    if type(module) not in (nn.Conv1d, nn.Conv2d):
        return False
    return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient
