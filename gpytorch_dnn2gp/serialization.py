"""One file from which a GP predicts in a new process, given the net's class.

    metadata    JSON: format and version, names, structure, loss, groups, constraints, memory layouts
    net/        parameters and buffers
    data/       training inputs, labels, outputs, targets
    sums/       what the solver took of the data, so that no Jacobian of it is formed again
    raw/        hyperparameters as they are optimised; fixed/: the others
    added/      data that the GP was conditioned on
    residual/   parameters and buffers of a residual kernel
    model/      what sets the linear model of an iterate apart, given/ a Gaussian over weights that was given
    check/      values of a loss or residual kernel that the file cannot hold, to recognise it by

The format is safetensors: nothing in a file is ever executed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path

import torch
from gpytorch.constraints import GreaterThan, Interval, LessThan, Positive
from gpytorch.constraints.constraints import softplus
from gpytorch.kernels import Kernel
from gpytorch.utils.transforms import inv_sigmoid, inv_softplus
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import losses
from .gp import LaplaceGP, NetworkGP
from .kernels import JacobianKernel
from .linear_model import LinearModel, at_weights
from .linearize import Linearization
from .losses import Loss
from .model_state import LOSSES, close, is_own, loss_values
from .variational import VariationalGP
from .weights import DiagonalGaussian, LowRankGaussian, WhitenedGaussian

FORMAT = 2  # raised when older packages could not read a file rightly: 2 is a VariationalGP's, 1 a LaplaceGP's
_KEY = "gpytorch_dnn2gp"
_CONSTRAINTS = {"Interval": Interval, "GreaterThan": GreaterThan, "LessThan": LessThan, "Positive": Positive}
_TRANSFORMS = {
    "exp": (torch.exp, torch.log),
    "softplus": (softplus, inv_softplus),
    "sigmoid": (torch.sigmoid, inv_sigmoid),
    "none": (None, None),
}
_GIVEN = {kind.__name__: kind for kind in (DiagonalGaussian, WhitenedGaussian, LowRankGaussian)}
_DTYPES = {str(d): d for d in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)}


def save(gp: NetworkGP, path: str | os.PathLike, jacobians: bool = True) -> None:
    """Write all that ``gp`` needs to predict, condition and give evidence into one safetensors file.

    The file replaces one of the same name only when it is complete: an interrupted save loses nothing. Priors on
    hyperparameters and progress settings are not written.

    Args:
        gp: a :class:`LaplaceGP` or :class:`VariationalGP`, conditioned on more data or not. If it has not been used
            yet, its sums over the data are taken first.
        path: of the file; its folder must exist.
        jacobians: keep the Jacobians at the training inputs (n K P numbers) where solver="function_space" holds them.
            Without them the file is smaller, they are computed again after loading, and predictions may differ by
            rounding.

    Raises:
        TypeError, ValueError: what cannot be saved faithfully: another model, a constraint of your own.
    """
    if type(gp) not in (LaplaceGP, VariationalGP):
        raise TypeError(f"save writes a LaplaceGP or a VariationalGP; got {type(gp).__name__}.")
    variational = type(gp) is VariationalGP
    path = Path(path)
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"Cannot write {path}: " + ("it is a folder." if path.is_dir() else "no such folder."))
    lin, kernel, likelihood = gp.linearization, gp.covar_module, gp.likelihood
    net = lin.net
    config = {
        "format": 2 if variational else 1,
        "version": _version(),
        "net": f"{type(net).__module__}.{type(net).__qualname__}",
        "dtype": str(lin.dtype),
        "params": lin.param_names,
        "input_shape": None if lin.input_shape is None else list(lin.input_shape),
        "input_dtype": None if lin.input_dtype is None else str(lin.input_dtype),
        "loss": _describe_loss(gp.loss),
        "structure": gp.structure,
        "features": gp.features,
        "groups": _describe_groups(gp),
        "constraints": {name: _describe_constraint(module, name) for module, name in _hyperparameters(gp)},
    }
    with torch.no_grad():
        solver = gp._solver_for(gp._splitting())
    config["solver"] = gp.solver if gp.structure == "full" and gp.model.given is None else "auto"

    tensors = {f"net/{name}": tensor for name, tensor in _net_state(net).items()}
    tensors |= {"data/inputs": gp._inputs, "data/labels": gp._labels, "data/outputs": gp._outputs}
    tensors |= {f"sums/{name}": tensor for name, tensor in solver.sums().items()}
    config["kept"] = gp.solver == "function_space" and solver.rows.kept is not None
    if jacobians and config["kept"]:
        tensors["sums/rows"] = solver.rows.kept
    tensors |= {"fixed/temperature": likelihood.temperature}
    for module, name in _hyperparameters(gp):
        constraint, key = getattr(module, f"{name}_constraint"), name.replace("raw_", "raw/")
        tensors |= {
            key: getattr(module, name),
            f"{key}.lower": constraint.lower_bound,
            f"{key}.upper": constraint.upper_bound,
        }
    if kernel.structure.base_variance is not None:
        tensors["fixed/prior_variance"] = kernel.structure.base_variance
    if kernel.structure.base_root is not None:
        tensors["fixed/prior_root"] = kernel.structure.base_root
    if variational:
        config["model"], more = _describe_model(gp)
        tensors |= more
    if gp.noise is not None:
        tensors["fixed/noise"] = gp.noise
    if gp._added is None:
        tensors["data/targets"] = gp.train_targets
    else:
        tensors |= {"added/inputs": gp._added.inputs, "added/labels": gp._added.labels}
        if gp._added.noise is not None:
            tensors["added/noise"] = gp._added.noise
    config["residual_kernel"] = None if gp.residual_kernel is None else " ".join(repr(gp.residual_kernel).split())
    if gp.residual_kernel is not None:
        tensors |= {f"residual/{name}": tensor for name, tensor in gp.residual_kernel.state_dict().items()}
    tensors |= _fingerprint(gp, config)

    packed, config["layouts"] = {}, {}
    for name, tensor in tensors.items():
        packed[name], config["layouts"][name] = _pack(tensor)
    _write(packed, {_KEY: json.dumps(config)}, path)


def load(
    path: str | os.PathLike, net: nn.Module, loss: Loss | None = None, residual_kernel: Kernel | None = None
) -> NetworkGP:
    """The GP that :func:`save` wrote, predicting as it did: to the bit with the same versions, threads and machine.

    Args:
        path: of the file.
        net: an instance of the net's class, built as the saved one was. Its weights do not matter and it is not
            changed; the GP comes to lie on its device.
        loss: needed if the GP's loss was made by ``losses.from_callable`` or has a function for its link, which a file
            cannot hold.
        residual_kernel: needed if the GP has one: a kernel built the same way, whose hyperparameters do not matter.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated, foreign or newer than this package; the net has other parameters or computes
            something else; the loss or the residual kernel is missing or another one.
    """
    config, tensors = _read(Path(path))
    try:
        _require_types(config, net, loss, residual_kernel)
    except _Damaged as error:
        raise ValueError(f"{path} {error}") from error
    try:
        return _rebuild(config, tensors, net, loss, residual_kernel, path)
    except _Damaged as error:
        raise ValueError(f"{path} {error}") from error
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(
            f"{path} is damaged, or is not of the net, loss or residual kernel given to load "
            f"({type(error).__name__}: {error})."
        ) from error


def _require_types(config: dict, net: object, loss: object, residual_kernel: object) -> None:
    if not isinstance(net, nn.Module):
        raise TypeError(
            f"load needs an instance of the saved net's class, {config['net']}; got {type(net).__name__}. A file holds "
            "weights, not code."
        )
    if not isinstance(loss, Loss | None):
        raise TypeError(f"loss must come from gpytorch_dnn2gp.losses; got {type(loss).__name__}.")
    if not isinstance(residual_kernel, Kernel | None):
        raise TypeError(f"residual_kernel must be a GPyTorch kernel; got {type(residual_kernel).__name__}.")


def _rebuild(
    config: dict,
    tensors: dict[str, Tensor],
    net: nn.Module,
    loss: Loss | None,
    residual_kernel: Kernel | None,
    path: str | os.PathLike,
) -> NetworkGP:
    loss = _rebuild_loss(config["loss"], loss, tensors.get("fixed/noise"), path)
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    device = torch.device("cpu") if device.type == "meta" else device
    tensors = _Entries({name: tensor.to(device) for name, tensor in tensors.items()})
    lin = Linearization(
        _filled(net, config, _under("net/", tensors), path),
        config["params"],
        config["input_shape"],
        None if config["input_dtype"] is None else _DTYPES[config["input_dtype"]],
    )
    if lin.param_names != config["params"]:
        raise ValueError(
            f"The net's parameters come in another order than in {path}: {', '.join(lin.param_names)} instead of "
            f"{', '.join(config['params'])}."
        )
    root = tensors.get("fixed/prior_root")
    variance = tensors.get("fixed/prior_variance") if root is None else root @ root.mT
    kernel = JacobianKernel(lin, groups=config["groups"]["parameters"], prior_variance=variance)
    if root is not None:
        kernel.structure.base_root = root
    temperature = tensors["fixed/temperature"]
    kind, model, own_temperature = LaplaceGP, LinearModel(), float(temperature)
    if config["format"] > 1:
        kind, model, own_temperature = VariationalGP, *_rebuild_model(config["model"], tensors, lin)
    gp = kind.__new__(kind)
    NetworkGP.__init__(
        gp,
        kernel,
        tensors["data/inputs"],
        tensors["data/labels"],
        loss,
        model,
        config["solver"],
        config["structure"],
        config["features"],
        own_temperature,
        _rebuild_residual_kernel(config, _under("residual/", tensors), residual_kernel, path),
    )
    gp.likelihood._temperature = temperature
    outputs = tensors["data/outputs"]
    _require_shape("data/outputs", outputs, (len(tensors["data/inputs"]), *outputs.shape[1:]))
    if not close(gp._outputs, outputs):
        raise ValueError(
            f"The net given to load fits {path} in names and shapes of its parameters, but not in what it computes: "
            "its outputs at the training inputs are others. Build it as the saved one was "
            f"({config['net']}): the same activations, normalisations, constructor arguments."
        )
    # What follows is set to the bit, instead of being computed in, perhaps, another order
    gp._outputs = outputs
    kernel = gp.covar_module
    kernel.structure.groups = dataclasses.replace(kernel.structure.groups, names=tuple(config["groups"]["names"]))
    for module, name in _hyperparameters(gp):
        key = name.replace("raw_", "raw/")
        shape, lower, upper = getattr(module, name).shape, tensors[f"{key}.lower"], tensors[f"{key}.upper"]
        _require_shape(key, tensors[key], shape)
        for bound in ("lower", "upper"):
            _require_shape(f"{key}.{bound}", tensors[f"{key}.{bound}"].expand(shape), shape)
        constraint = _rebuild_constraint(config["constraints"][name], lower, upper)
        module.register_constraint(name, constraint, replace=True)
        with torch.no_grad():
            getattr(module, name).copy_(tensors[key])
    for name, value in _fingerprint(gp, config).items():
        if not close(value, tensors[name]):
            what = "residual kernel" if name == "check/residual_kernel" else f"loss {gp.loss}"
            raise ValueError(
                f"The {what} given to load is not the one in {path}: its "
                f"{name.removeprefix('check/').replace('_', ' ')} at the training data differs."
            )
    sums = _under("sums/", tensors)
    for name, shape in _shapes_of_sums(gp).items():
        if name in sums:
            _require_shape(f"sums/{name}", sums[name], shape)
    with torch.no_grad():
        solver = gp._solver_for(gp._splitting(), sums)
    if "rows" in sums:
        solver.rows.keep(sums["rows"])
    elif config["kept"]:
        solver.rows.keep()
    if "added/inputs" in tensors:
        labels, noise, q = tensors["added/labels"], tensors.get("added/noise"), tensors["added/inputs"].shape[-2]
        event = (q, *gp._labels.shape[1:])
        _require_shape("added/labels", labels, (*labels.shape[: -len(event)], *event))
        if noise is not None and noise.shape[-2:] != (q, gp.num_outputs):
            _require_shape("added/noise", noise, (*noise.shape[:-2], q, 1))
        return gp._with(tensors["added/inputs"], tensors["added/labels"], tensors.get("added/noise"))
    _require_shape("data/targets", tensors["data/targets"], gp.train_targets.shape)
    gp.train_targets = tensors["data/targets"]
    return gp


def _shapes_of_sums(gp: NetworkGP) -> dict[str, tuple[int, ...]]:
    n, p = len(gp._inputs) * gp.model.num_samples, gp.linearization.num_weights
    m = gp.num_outputs if gp.features == "jacobian" else 1
    c = len(gp._splitting().noise_scale)
    return {
        "first": (c, p),
        "second": (c, p) if gp.structure == "diagonal" else (c, p, p),
        "grams": (len(gp.covar_module.groups), n * m, n * m),
        "rows_times_w": (n, m),
        "rows": (n, m, p),
    }


def _require_shape(name: str, tensor: Tensor, shape: Iterable[int]) -> None:
    if tensor.shape != tuple(shape):
        raise _Damaged(f"has {name!r} of shape {tuple(tensor.shape)} instead of {tuple(shape)}")


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return _Entries({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)})


# ---- the file


class _Damaged(Exception):
    """What is wrong with a file; no other error is taken for it, such as one in the user's net."""

    def __str__(self) -> str:
        return f"{super().__str__()}: it is damaged, or was not written by gpytorch_dnn2gp.save."


class _Entries(dict):
    """What stands in a file."""

    def __missing__(self, key: str) -> None:
        raise _Damaged(f"lacks {key!r}")


def _write(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    path = path.resolve()  # through a link, not in its place
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch(exist_ok=False)
        mode = (path if path.exists() else temporary).stat().st_mode  # safetensors lets only the owner read
        save_file(tensors, temporary, metadata)
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {}).get(_KEY, "null"), object_hook=_Entries)
            if config is None:
                raise ValueError(f"{path} is a safetensors file, but not one that gpytorch_dnn2gp.save wrote.")
            if config["format"] > FORMAT:
                version = config.get("version", "(of no known version)")
                raise ValueError(
                    f"{path} was written by gpytorch_dnn2gp {version} in format {config['format']}; this is "
                    f"{_version()}, which reads up to format {FORMAT}. Upgrade the package."
                )
            names, layouts = file.keys(), config["layouts"]
            return config, _Entries({name: _unpack(name, file.get_tensor(name), layouts[name]) for name in names})
    except _Damaged as error:
        raise ValueError(f"{path} {error}") from error
    except (SafetensorError, json.JSONDecodeError, TypeError) as error:
        raise ValueError(
            f"{path} is truncated or damaged, or no file that gpytorch_dnn2gp.save wrote ({error})."
        ) from error


def _pack(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """Contiguous on the CPU, and the order of dimensions in memory, which decides how products are rounded."""
    order = sorted(range(tensor.dim()), key=lambda i: (-tensor.stride(i), i))
    return tensor.detach().permute(order).cpu().clone(memory_format=torch.contiguous_format), order


def _unpack(name: str, tensor: Tensor, order: list[int]) -> Tensor:
    if sorted(order) != list(range(tensor.dim())):
        raise _Damaged(f"lays {name!r}, of shape {tuple(tensor.shape)}, out as {order}")
    # A clone lies where torch likes tensors to lie, and outlives the file
    return tensor.clone().permute([order.index(i) for i in range(len(order))])


def _version() -> str:
    return sys.modules[__package__].__version__


# ---- the net


def _net_state(net: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, those that no state_dict shows as well."""
    return dict(net.named_parameters(remove_duplicate=False)) | dict(net.named_buffers(remove_duplicate=False))


def _filled(net: nn.Module, config: dict, state: dict[str, Tensor], path) -> nn.Module:
    """A copy of ``net`` with the saved weights."""
    net = copy.deepcopy(net)
    if any(tensor.is_meta for tensor in _net_state(net).values()):
        net = net.to_empty(device="cpu")
    present = _net_state(net)
    _require_same_shapes(f"The net given to load ({type(net).__name__})", present, state, config["net"], path)
    for name, tensor in state.items():
        present[name].data = tensor.clone()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in config["params"])
    return net


def _require_same_shapes(what: str, present: dict[str, Tensor], state: dict[str, Tensor], saved: str, path) -> None:
    differences = [
        *_listed("lacks", state.keys() - present.keys()),
        *_listed("has besides", present.keys() - state.keys()),
        *(
            f"has {name} of shape {tuple(present[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in state.items()
            if name in present and present[name].shape != tensor.shape
        ),
    ]
    if differences:
        more = f" and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise ValueError(f"{what} is not built as the one in {path} ({saved}): it {'; '.join(differences[:4])}{more}.")


def _listed(verb: str, names: Iterable[str]) -> list[str]:
    names = sorted(names)
    return [f"{verb} {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"] if names else []


# ---- loss and hyperparameters


def _describe_loss(loss: Loss) -> dict:
    if is_own(loss):
        return {"name": None, "repr": repr(loss)}
    name = type(loss).__name__
    if name != "HeteroscedasticGaussian":
        return {"name": name, "arguments": {}}
    return {"name": name, "arguments": {"parametrization": loss.parametrization, "link": loss.link}}


def _rebuild_loss(saved: dict, loss: Loss | None, noise: Tensor | None, path) -> Loss:
    if saved["name"] is None and loss is None:
        raise ValueError(
            f"The loss of the GP in {path} is {saved['repr']}, whose functions no file can hold: give it again, "
            "load(path, net, loss=...)."
        )
    if saved["name"] is not None:
        if saved["name"] not in LOSSES:
            raise ValueError(f"{path} names the loss {saved['name']!r}, which is none of {', '.join(LOSSES)}.")
        built = getattr(losses, saved["name"])(**saved["arguments"])
        if loss is not None and _describe_loss(loss) != saved:
            raise ValueError(f"loss={loss} was given, but the GP in {path} has {saved['name']}. Leave loss= out.")
        loss = built
    if loss.has_noise != (noise is not None):
        if saved["name"] is not None:
            raise _Damaged("lacks 'fixed/noise'" if loss.has_noise else f"has a 'fixed/noise' besides its {loss}")
        raise ValueError(f"loss={loss} was given, but the GP in {path} has {saved['repr']}.")
    return loss if noise is None else loss.with_noise(noise)


def _rebuild_residual_kernel(config: dict, state: dict[str, Tensor], kernel: Kernel | None, path) -> Kernel | None:
    saved = config["residual_kernel"]
    if (saved is None) != (kernel is None):
        raise ValueError(
            f"A residual_kernel was given, but the GP in {path} has none. Leave it out."
            if saved is None
            else f"The GP in {path} has a residual kernel, whose code no file can hold: give one that is built the "
            f"same way, load(path, net, residual_kernel=...). It was {saved}"
        )
    if kernel is None:
        return None
    kernel, like = copy.deepcopy(kernel), next((t for t in state.values() if t.is_floating_point()), None)
    kernel = kernel if like is None else kernel.to(like)
    _require_same_shapes("The residual kernel given to load", kernel.state_dict(), state, saved, path)
    kernel.load_state_dict(state)
    return kernel


def _fingerprint(gp: NetworkGP, config: dict) -> dict[str, Tensor]:
    """Values at the training data of what the file cannot hold: what is given again must have them too."""
    checks = {}
    with torch.no_grad():
        if config["loss"]["name"] is None:
            values = loss_values(gp.loss, gp._outputs, gp._labels)
            checks |= {f"check/{name}": value for name, value in values.items()}
        if gp.residual_kernel is not None:
            checks["check/residual_kernel"] = gp.residual_kernel(gp._inputs[:100]).to_dense()
    return checks


def _hyperparameters(gp: NetworkGP) -> list[tuple[nn.Module, str]]:
    """Owners and names of what is optimised."""
    owners = (gp.covar_module, "raw_prior_precision"), (gp.likelihood, "raw_noise")
    return [(module, name) for module, name in owners if hasattr(module, name)]


def _describe_model(gp: NetworkGP) -> tuple[dict, dict[str, Tensor]]:
    """The linear model of an iterate, or a given Gaussian."""
    model = gp.model
    numbers = {name: getattr(model, name) for name in ("rate", "train_size", "pull", "prior_known")}
    tensors = {f"model/{name}": getattr(model, name) for name in ("mean", "away") if getattr(model, name) is not None}
    if model.samples:
        tensors["model/samples"] = torch.stack([net.weights for net in model.samples])
    given = None
    if model.given is not None:
        given = type(model.given).__name__
        if _GIVEN.get(given) is not type(model.given):
            raise TypeError(
                f"save cannot write a {given} over weights: give VariationalGP one made by "
                "gpytorch_dnn2gp.weights.gaussian."
            )
        tensors |= {f"given/{name}": tensor for name, tensor in model.given.tensors().items()}
    return {**numbers, "given": given, "temperature": gp._given_temperature}, tensors


def _rebuild_model(saved: dict, tensors: dict[str, Tensor], lin: Linearization) -> tuple[LinearModel, float]:
    given = None
    if saved["given"] is not None:
        if saved["given"] not in _GIVEN:
            raise _Damaged(f"names the Gaussian {saved['given']!r}, which is none of {', '.join(_GIVEN)}")
        given = _GIVEN[saved["given"]](**_under("given/", tensors))
    vectors = {name: tensors.get(f"model/{name}") for name in ("mean", "away")}
    vectors["given/mean"] = None if given is None else given.mean
    for name, vector in vectors.items():
        if vector is not None:
            _require_shape(f"model/{name}", vector, (lin.num_weights,))
    samples = tensors.get("model/samples")
    if samples is not None:
        _require_shape("model/samples", samples, (len(samples), lin.num_weights))
    nets = () if samples is None else tuple(at_weights(lin, w) for w in samples)
    numbers = {name: saved[name] for name in ("rate", "train_size", "pull", "prior_known")}
    model = LinearModel(vectors["mean"], vectors["away"], samples=nets, given=given, **numbers)
    return model, float(saved["temperature"])


def _describe_groups(gp: NetworkGP) -> dict:
    """Names of the groups, and the parameters in each."""
    lin, groups = gp.linearization, gp.covar_module.groups
    owner, parameters = groups.index(torch.device("cpu")).tolist(), [[] for _ in groups.names]
    for name, part in zip(lin.param_names, lin.function.slices(), strict=True):
        parameters[owner[part.start]].append(name)
    return {"names": list(groups.names), "parameters": parameters}


def _describe_constraint(module: nn.Module, name: str) -> dict:
    constraint = getattr(module, f"{name}_constraint")
    kind = type(constraint).__name__
    given = softplus if isinstance(constraint._transform, nn.Softplus) else constraint._transform  # perhaps copied
    transform = next((n for n, (f, _) in _TRANSFORMS.items() if given is f), None)
    if _CONSTRAINTS.get(kind) is not type(constraint) or transform is None:
        raise ValueError(
            f"The constraint {constraint!r} of {name} is a class or a transform of your own, which no file can hold. "
            f"Register one of gpytorch.constraints.{', '.join(_CONSTRAINTS)} with a transform exp, softplus or sigmoid."
        )
    return {"class": kind, "transform": transform}


def _rebuild_constraint(saved: dict, lower: Tensor, upper: Tensor) -> Interval:
    transform, inverse = _TRANSFORMS[saved["transform"]]
    bounds = {"Interval": (lower, upper), "GreaterThan": (lower,), "LessThan": (upper,), "Positive": ()}[saved["class"]]
    constraint = _CONSTRAINTS[saved["class"]](*bounds, transform=transform, inv_transform=inverse)
    constraint.lower_bound, constraint.upper_bound = lower, upper  # in their own precision
    return constraint
