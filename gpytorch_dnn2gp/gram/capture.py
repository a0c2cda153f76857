"""What goes into each layer and what comes back to it: inputs and cotangents of every call, for chunks of examples.

One forward pass per chunk with hooks on the layers, one backward pass per row, both batched by ``vmap``: inside it a
net sees one example, so whatever it does with axes (merging time into the batch, putting the batch second) nothing of
two examples can be mixed up. Nets that ``vmap`` cannot batch are run example by example.

Hooks see modules, not uses of weights. A weight that is also used in another way (tied to a second module, or called
through ``functional``) has derivatives that no hook sees; :func:`hidden_uses` finds them in autograd's graph.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap

from .. import tiling
from ..jacobians import UNSUPPORTED, NetFunction

# For each layer its calls, each with input (n, *shape) and cotangents (n, m, *output_shape).
Calls = dict[str, list[tuple[Tensor, Tensor]]]

# Numbers that a chunk's backward passes touch: as many as stay in the processor's caches.
CHUNK_NUMBERS = 8 * 2**20

_hooked = threading.RLock()  # hooks are on the (shared) net: one capture at a time


def chunk_length(net: NetFunction, x: Tensor, num_rows: int) -> int:
    """Examples per chunk."""
    net.measure(x)
    per_example = 2 * num_rows * max(1, net.activation_size)
    fits = tiling.chunk_length(per_example, net.dtype, x.device)
    return fits if x.device.type == "cuda" else max(1, min(fits, 2 * CHUNK_NUMBERS // per_example))


def capture(net: NetFunction, layers: Sequence[str], x: Tensor, cotangents: Tensor | None) -> Calls:
    """Inputs and cotangents of every call of ``layers`` (names of modules), for one chunk of examples.

    Args:
        net: the net as a function of its weights.
        layers: modules that take and return one tensor.
        x: ``(n, *input_shape)``, n > 0.
        cotangents: C, ``(n, m, K)``; the identity without.
    """
    if net.capture_by_vmap is not False and net.vmap_differentiates(x):
        try:
            with net.differentiable_kernels(), _hooked:
                calls = _capture_by_vmap(net, layers, x, cotangents)
            shape = torch.Size((*x.shape, net.num_rows(x, cotangents)))
            if net.right_once("capture", shape, lambda: _agrees_with_loop(calls, net, layers, x, cotangents)):
                net.capture_by_vmap = True
                return calls
        except torch.OutOfMemoryError:
            raise
        except UNSUPPORTED:  # for some layers that depends on the number of examples
            pass
    calls = _capture_by_loop(net, layers, x, cotangents)  # raises by itself if the net is at fault
    net.capture_by_vmap = bool(net.capture_by_vmap)
    return calls


def _capture_by_vmap(net: NetFunction, layers: Sequence[str], x: Tensor, cotangents: Tensor | None) -> Calls:
    weights = net.weight_dict()
    order, shapes = _outputs_of_calls(net, layers, x)
    budget = max(1, CHUNK_NUMBERS // max(1, len(x) * net.activation_size))

    def example(x_i: Tensor, c_i: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        def shifted(shifts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            """The net with something added to each output of a layer; the derivative in that is the cotangent."""
            inputs, remaining = [], iter(shifts)

            def shift(_name: str, a: Tensor, z: Tensor) -> Tensor:
                inputs.append(a)
                return z + next(remaining)

            with _each_call(net, layers, shift):
                return net(weights, x_i[None])[0], inputs

        shifts = [torch.zeros(shape, dtype=net.dtype, device=x.device) for shape in shapes]
        f_i, pullback, inputs = vjp(shifted, shifts, has_aux=True)
        if c_i is None:
            c_i = torch.eye(len(f_i), dtype=f_i.dtype, device=f_i.device)
        return inputs, vmap(pullback, chunk_size=budget if budget < len(c_i) else None)(c_i)[0]

    if cotangents is None:
        inputs, cotangents = vmap(lambda x_i: example(x_i, None))(x)
    else:
        inputs, cotangents = vmap(example)(x, cotangents)
    calls: Calls = {name: [] for name in layers}
    for name, a, g in zip(order, inputs, cotangents, strict=True):
        calls[name].append((a, g))
    return calls


@torch.no_grad()
def _agrees_with_loop(
    calls: Calls, net: NetFunction, layers: Sequence[str], x: Tensor, cotangents: Tensor | None
) -> bool | None:
    """Whether vmap's cotangents, in a made-up combination of an example's rows, are those of plain autograd."""
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return None
    num_rows = net.num_rows(x, cotangents)
    v = torch.cos(torch.arange(1.0, 1 + num_rows, dtype=net.dtype, device=x.device))
    tolerance = 10 * torch.finfo(net.dtype).eps ** 0.5
    for i in {0, len(x) - 1}:
        c = v if cotangents is None else v @ cotangents[i].detach()
        expected = _capture_by_loop(net, layers, x[i : i + 1].detach(), c[None, None])
        largest = max((float(g.abs().max()) for each in expected.values() for _, g in each if g.numel()), default=0.0)
        for layer in layers:
            for (_, found), (_, right) in zip(calls[layer], expected[layer], strict=True):
                difference = torch.einsum("m,m...->...", v, found[i].detach()) - right[0, 0]
                if not difference.abs().max() <= tolerance * largest:
                    return False
    return True


def _capture_by_loop(net: NetFunction, layers: Sequence[str], x: Tensor, cotangents: Tensor | None) -> Calls:
    """One example and one backward pass at a time."""
    weights = net.weight_dict()
    create_graph = torch.is_grad_enabled() and x.requires_grad
    create_graph = create_graph or (torch.is_grad_enabled() and cotangents is not None and cotangents.requires_grad)
    examples: list[list[tuple[str, Tensor, Tensor]]] = []
    for i in range(len(x)):
        sites: list[tuple[str, Tensor]] = []
        shifts: list[Tensor] = []

        def shift(name: str, a: Tensor, z: Tensor, sites=sites, shifts=shifts) -> Tensor:
            sites.append((name, a))
            shifts.append(torch.zeros_like(z).requires_grad_())
            return z + shifts[-1]

        with torch.enable_grad(), net.differentiable_kernels(), _hooked:
            with _each_call(net, layers, shift):
                f_i = net(weights, x[i : i + 1])[0]
            c_i = torch.eye(len(f_i)).to(f_i) if cotangents is None else cotangents[i]
            grads = (
                [
                    torch.autograd.grad(
                        f_i, shifts, c, retain_graph=True, create_graph=create_graph, materialize_grads=True
                    )
                    for c in c_i
                ]
                if f_i.requires_grad
                else [[torch.zeros_like(s) for s in shifts] for _ in c_i]
            )
        rows = [torch.stack(g) for g in zip(*grads, strict=True)]
        if not create_graph:
            rows = [g.detach() for g in rows]
            sites = [(name, a.detach()) for name, a in sites]
        examples.append([(name, a, g) for (name, a), g in zip(sites, rows, strict=True)])
    if any([site[0] for site in example] != [site[0] for site in examples[0]] for example in examples):
        raise RuntimeError(
            "The net calls its layers in another order for some examples than for others, so that their Jacobians "
            "cannot be put together by layers. Ask for lin.jacobian(x), or make the order the same for all."
        )
    calls: Calls = {name: [] for name in layers}
    for same in zip(*examples, strict=True):  # the same call of every example
        names, inputs, grads = zip(*same, strict=True)
        calls[names[0]].append((torch.stack(inputs), torch.stack(grads)))
    return calls


@torch.no_grad()
def _outputs_of_calls(net: NetFunction, layers: Sequence[str], x: Tensor) -> tuple[list[str], list[torch.Size]]:
    """Which layer is called when one example passes, and the shape of its output."""
    order: list[str] = []
    shapes: list[torch.Size] = []

    def note(name: str, _a: Tensor, z: Tensor) -> Tensor:
        order.append(name)
        shapes.append(z.shape)
        return z

    def once(x_i: Tensor) -> Tensor:
        with _each_call(net, layers, note):
            return net(net.weight_dict(), x_i[None])[0]

    vmap(once)(x[:1].detach())
    return order, shapes


@contextlib.contextmanager
def _each_call(net: NetFunction, layers: Sequence[str], see: Callable[[str, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """While a forward pass runs: ``z = see(name, a, z)`` for each call ``z = layer(a)``, before the user's hooks."""
    handles = []
    for name in layers:

        def hook(module: nn.Module, args: tuple, kwargs: dict, z: Tensor, name: str = name) -> Tensor:
            return see(name, args[0] if args else next(iter(kwargs.values())), z)

        module = net.net.get_submodule(name)
        handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hidden_uses(net: NetFunction, layers: dict[str, list[str]], x: Tensor) -> list[str]:
    """Parameters of the covered layers that reach the output in another way than through their layer's call.

    Inside their own layer's calls the weights are detached; whatever then still is connected to the output is used
    elsewhere: in autograd's graph, whether or not the derivative happens to be zero at these inputs. A layer called
    with something else in the place of its weight uses the weight elsewhere, too.

    Args:
        net: the net.
        layers: for each covered layer the full names of its covered parameters.
        x: some examples; one is looked at.
    """
    leaves = {name: weight.clone().requires_grad_() for name, weight in net.weight_dict().items()}
    covered = [name for names in layers.values() for name in names]
    replaced: set[str] = set()
    handles = []
    for layer, names in layers.items():
        module = net.net.get_submodule(layer)
        local = [name.rpartition(".")[2] for name in names]

        def detach(module: nn.Module, _args: tuple, local: list[str] = local, names: list[str] = names) -> None:
            own = [module._parameters[name] for name in local]
            replaced.update(name for name, weight in zip(names, own, strict=True) if weight is not leaves[name])
            module.__dict__["_kept_weights"] = own
            for name in local:
                module._parameters[name] = module._parameters[name].detach()

        def restore(module: nn.Module, _args: tuple, _z: Tensor, local: list[str] = local) -> None:
            module._parameters.update(zip(local, module.__dict__.pop("_kept_weights"), strict=True))

        handles.append(module.register_forward_pre_hook(detach))
        handles.append(module.register_forward_hook(restore, prepend=True, always_call=True))
    try:
        with torch.enable_grad(), net.differentiable_kernels(), _hooked:
            f = net(leaves, x[:1].detach())
            if not f.requires_grad:
                return sorted(replaced)
            grads = torch.autograd.grad(f.sum(), [leaves[name] for name in covered], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return sorted(replaced | {name for name, grad in zip(covered, grads, strict=True) if grad is not None})
