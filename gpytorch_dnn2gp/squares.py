"""Sums of squared Jacobian rows, layer by layer: ``diag(J^T Lambda J)`` without the Jacobian of the whole net.

With cotangents R e_c, ``Lambda = R R^T``, the sum over examples i and cotangents c of the squared rows ``c_i^T J_i`` is
the diagonal of ``J^T Lambda J``, at the cost of K backward passes to the outputs of layers. What a layer's Jacobian is,
given its inputs a and the gradients g of its outputs, the rules of ``gram/rules.py`` tell. For ``z_t = W a_t + b`` at T
sites (positions of a convolution or a sequence, calls of a shared module)

    sum_ic (dl/dW)^2 = (sum_c g_c^2)^T a^2                T = 1: one product of matrices, whatever the number of c
    sum_ic (dl/dW)^2 = sum_ic (sum_t g_ict a_it^T)^2      T > 1

Parameters of layers without a rule are taken by per-example Jacobians of just those. A use of a parameter that hooks
cannot see, or a layer whose inputs do not have the examples first, would make a rule wrong: rules are compared with
plain autograd on two examples, once for each shape of an example, and those that fail are not used.

``gram.sum_of_squares`` gives the same sums for a frozen net. Here outputs, ``J^T v`` and squares come of one pass
of a whole batch through a net whose weights change between calls, as a step of training wants them.

n examples, K outputs, m cotangents, P weights. Read gram/rules.py first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import tiling
from .gram.contract import dense, is_one_product, squares_of_one_product
from .gram.rules import Outer, find_rule
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
            for local, parameter in module._parameters.items():
                if id(parameter) in names:
                    owners.setdefault(names[id(parameter)], []).append((module, local))
        # parameters that rules cover, by what they are called in which modules
        self.rules = {n: of for n, of in owners.items() if all(find_rule(module) is not None for module, _ in of)}
        self._formed: set[str] = set()  # those whose Jacobians are formed
        self._checked: set[torch.Size] = set()  # shapes of an example

    def __call__(self, x: Tensor, weigh: Weigh) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs ``(n, K)``, ``sum_i J_i^T v_i`` ``(P,)`` and ``sum_ic (c_i^T J_i)^2`` ``(P,)``.

        Args:
            x: inputs ``(n, *input_shape)``.
            weigh: cotangents c and v of a chunk of examples, by its outputs.
        """
        self.function.measure(x)
        if len(x) > 0 and x.shape[1:] not in self._checked:
            self._check(x[[0, -1]])
            self._checked.add(x.shape[1:])
        chunks = tiling.chunks(len(x), tiling.chunk_length(self._numbers(6), self.function.dtype, x.device))
        f, first, second = zip(*(self._chunk(x[part], part, weigh) for part in chunks), strict=True)
        return torch.cat(f), sum(first), sum(second)

    def _numbers(self, activations: int) -> int:
        """How many one example leaves in memory: so many copies of its activations, and one row of Jacobians."""
        formed = sum(self._parameters[name].numel() for name in self._formed)
        return max(1, (activations + 2) * self.function.activation_size + 2 * formed)

    def _chunk(self, x: Tensor, part: slice, weigh: Weigh) -> tuple[Tensor, Tensor, Tensor]:
        function = self.function
        while True:
            leaves = {name: self._parameters[name].detach().requires_grad_() for name in function.names}
            f, calls = self._forward(x, leaves)
            cotangents, v = weigh(f.detach(), part)
            zeros = [call.zero for call in calls]
            both = len(cotangents) == 1 and torch.equal(cotangents[0], v)  # squared gradients: one pass does
            wanted = [*leaves.values(), *(zeros if both else [])]
            pulled = torch.autograd.grad(f, wanted, v, retain_graph=not both, materialize_grads=True)
            first = function.flatten(dict(zip(leaves, map(_dense, pulled))))
            passes = [pulled[len(leaves) :]] if both else self._passes(f, zeros, cotangents)
            try:
                squares = self._squares(calls, len(x), len(cotangents), passes)
                break
            except _NoRuleError as error:
                self._drop(error.module)
        rest = [name for name in function.names if name not in squares]
        if rest:
            squares |= self._by_jacobians(rest, x, cotangents)
        return f.detach(), first, function.flatten(squares)

    def _forward(self, x: Tensor, leaves: dict[str, Tensor]) -> tuple[Tensor, list[_Call]]:
        """Outputs with a graph to the weights ``leaves``, and the calls of layers with rules."""
        with torch.enable_grad(), self.function.differentiable_kernels(), self._noted_calls() as calls:
            return self.function(leaves, x), calls

    @contextmanager
    def _noted_calls(self) -> Iterator[list[_Call]]:
        """Hooks that note each layer's inputs and add a zero to its outputs, whose gradient is g."""
        calls: list[_Call] = []

        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
            zero = torch.zeros_like(output, requires_grad=True)
            calls.append(_Call(module, (args[0] if args else next(iter(kwargs.values()))).detach(), zero))
            return output + zero

        modules = {module for of in self.rules.values() for module, _ in of}
        handles = [module.register_forward_hook(hook, prepend=True, with_kwargs=True) for module in modules]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    def _passes(f: Tensor, zeros: list[Tensor], cotangents: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Gradients of all calls' outputs, for one cotangent after the other."""
        for c in cotangents:
            yield torch.autograd.grad(f, zeros, c, retain_graph=True, materialize_grads=True) if zeros else ()

    @torch.no_grad()
    def _squares(self, calls: list[_Call], n: int, m: int, passes: Iterable[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        """``sum_ic (c_i^T J_i)^2`` of the parameters that rules cover."""
        squares = {name: torch.zeros_like(self._parameters[name]).flatten() for name in self.rules}
        options = {"dtype": self.function.dtype, "device": self._parameters[self.function.names[0]].device}
        at_once = max(1, tiling.numbers_per_chunk(**options) // (n * self._numbers(2)))
        passes = iter(passes)
        for rows in tiling.chunks(m, at_once):
            pulled = list(itertools.islice(passes, rows.stop - rows.start))
            factors: dict[nn.Module, list[dict[str, Tensor | Outer]]] = {}
            for number, call in enumerate(calls):
                g = torch.stack([gradients[number] for gradients in pulled], 1)
                factors.setdefault(call.module, []).append(call.factors(g, n))
            for name, of in self.rules.items():
                parts = [_factor(each, module, local) for module, local in of for each in factors.get(module, [])]
                if parts:
                    squares[name] += _sum_of_squares(parts, self._parameters[name].numel())
                if parts and not _is_one_product(parts):
                    self._formed.add(name)
        return {name: value.view_as(self._parameters[name]) for name, value in squares.items()}

    def _by_jacobians(self, names: list[str], x: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
        """The same for any parameters, by Jacobians of just these."""
        function = NetFunction(self.function.net, names)
        total = torch.zeros(function.num_weights, dtype=function.dtype, device=x.device)
        c = cotangents.movedim(0, 1)  # (n, m, K)
        for part in function.jacobian_chunks(x, c.shape[1]):
            total += function.jacobian_rows(x, c, part).square().sum((0, 1))
        return function.unflatten(total)

    def _drop(self, module: nn.Module) -> None:
        """Do without the rules for this module's parameters."""
        self.rules = {name: of for name, of in self.rules.items() if all(m is not module for m, _ in of)}

    def _check(self, x: Tensor) -> None:
        """Keep the rules that agree with plain autograd on two examples.

        Weights are made up for this: where a readout is zero, as many nets begin, all other derivatives are.
        """
        function, options = self.function, {"dtype": self.function.dtype, "device": x.device}
        leaves = {}
        for name in function.names:
            w = self._parameters[name].detach()
            made_up = torch.arange(1.0, 1 + w.numel(), **options).cos().view_as(w)
            leaves[name] = (w + 0.1 / max(1, w.shape[1:].numel()) ** 0.5 * made_up).requires_grad_()
        k = function.num_rows(x)
        c = torch.arange(1.0, 1 + 2 * len(x) * k, **options).cos().reshape(2, len(x), k)
        expected = {name: torch.zeros_like(w).detach() for name, w in leaves.items()}
        for i in range(len(x)):
            f, _ = self._forward(x[i : i + 1], leaves)
            for c_j in c[:, i : i + 1]:
                rows = torch.autograd.grad(f, list(leaves.values()), c_j, retain_graph=True, materialize_grads=True)
                for name, row in zip(leaves, rows, strict=True):
                    expected[name] += _dense(row).square()
        found: dict[str, Tensor] = {}
        while self.rules:
            f, calls = self._forward(x, leaves)
            try:
                found = self._squares(calls, len(x), len(c), self._passes(f, [call.zero for call in calls], c))
                break
            except _NoRuleError as error:
                self._drop(error.module)
        eps = torch.finfo(function.dtype).eps
        # rounding of rows is in proportion to the largest of them; these are squares
        rounding = (1e3 * eps) ** 2 * max(float(value.max()) for value in expected.values())
        for name, value in found.items():
            if not (value - expected[name]).abs().max() <= 10 * eps**0.5 * expected[name].max() + rounding:
                del self.rules[name]
        self._formed &= set(self.rules)


class _NoRuleError(Exception):
    def __init__(self, module: nn.Module) -> None:
        super().__init__(f"The rule of {module} does not hold for its inputs.")
        self.module = module


@dataclass(frozen=True)
class _Call:
    """One call of a layer by a whole batch: its input and the zero that was added to its output."""

    module: nn.Module
    a: Tensor
    zero: Tensor

    def factors(self, g: Tensor, n: int) -> dict[str, Tensor | Outer]:
        """Jacobians of its parameters by its rule, as if each example had gone through alone; ``g`` ``(n, m, ...)``."""
        if len(self.a) != n or len(g) != n:
            raise _NoRuleError(self.module)
        try:
            return find_rule(self.module)(self.module, self.a[:, None], g[:, :, None])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a rule may be a user's
            raise _NoRuleError(self.module) from error


def _factor(factors: dict[str, Tensor | Outer], module: nn.Module, local: str) -> Tensor | Outer:
    if local not in factors:  # ``weight_v`` of weight_norm, say
        raise _NoRuleError(module)
    return factors[local]


def _is_one_product(parts: list[Tensor | Outer]) -> bool:
    """Whether the rows are ``c a^T`` for each example and cotangent."""
    return len(parts) == 1 and is_one_product(parts[0])


def _sum_of_squares(parts: list[Tensor | Outer], size: int) -> Tensor:
    """``sum_ij`` of the squared rows of one parameter, ``(p,)``; they are the sum of ``parts``."""
    if _is_one_product(parts):
        return squares_of_one_product(parts[0])
    return sum(dense(part, size) for part in parts).square().sum((0, 1))


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient
