"""Saying in plain data how a network's modules differ from the ones its code builds, and building them again. No
pickle.

A compressed network is stored as tensors plus a *difference*: which modules have other sizes or another type than in
the network that the original constructor gives. :func:`apply_difference` makes those changes to a fresh network; then
its state dict fits.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from efficientdnns.errors import FileFormatError, ModelError, suggest
from efficientdnns.surgery.recorded import RecordedForward, kind_of, play

Spec = dict[str, Any]
Class = TypeVar("Class", bound=type[nn.Module])

_REGISTERED: dict[str, type[nn.Module]] = {}
_LEAVES = (
    *(
        "Linear",
        "Bilinear",
        "Conv1d",
        "Conv2d",
        "Conv3d",
        "ConvTranspose1d",
        "ConvTranspose2d",
        "ConvTranspose3d",
        "Embedding",
    ),
    *(
        "BatchNorm1d",
        "BatchNorm2d",
        "BatchNorm3d",
        "InstanceNorm1d",
        "InstanceNorm2d",
        "LayerNorm",
        "GroupNorm",
        "LSTM",
        "GRU",
        "RNN",
    ),
    *(
        "MultiheadAttention",
        "PReLU",
        "ReLU",
        "ReLU6",
        "LeakyReLU",
        "ELU",
        "Sigmoid",
        "Tanh",
        "GELU",
        "SiLU",
        "Hardswish",
        "Hardsigmoid",
    ),
    *(
        "Hardtanh",
        "Softplus",
        "Softmax",
        "LogSoftmax",
        "Dropout",
        "Dropout1d",
        "Dropout2d",
        "Identity",
        "Flatten",
        "Unflatten",
    ),
    *(
        "MaxPool1d",
        "MaxPool2d",
        "AvgPool1d",
        "AvgPool2d",
        "AdaptiveAvgPool1d",
        "AdaptiveAvgPool2d",
        "AdaptiveMaxPool2d",
        "Upsample",
    ),
    *("PixelShuffle", "ZeroPad2d"),
)
_TORCH: dict[str, type[nn.Module]] = {name: getattr(nn, name) for name in _LEAVES}
_CONTAINERS: dict[str, type[nn.Module]] = {"Sequential": nn.Sequential, "ModuleList": nn.ModuleList}


def rebuildable(cls: Class) -> Class:
    """Register a module class that can be rebuilt from data.

    The class has ``config() -> dict``, the JSON-able keyword arguments of its constructor; tensors belong into
    parameters and persistent buffers, which the state dict carries. A module that holds other modules rebuilds them in
    its constructor.
    """
    if not callable(getattr(cls, "config", None)):
        raise ModelError(f"{cls.__name__} has no config(): return the constructor's JSON-able keyword arguments")
    known = _REGISTERED.get(cls.__name__)
    if cls.__name__ in _TORCH or (
        known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__)
    ):
        raise ModelError(f"a rebuildable module called {cls.__name__!r} exists already: choose another class name")
    _REGISTERED[cls.__name__] = cls
    return cls


def describe(model: nn.Module) -> Spec:
    """{"modules": {path: spec}} for every module that can be rebuilt; modules inside such a module are not listed by
    themselves."""
    found: dict[str, Spec] = {}

    def visit(module: nn.Module, path: str) -> None:
        spec = _spec(module)
        if spec is not None and type(module) not in _CONTAINERS.values():
            found[path] = spec
            return
        for name, child in module.named_children():
            visit(child, _join(path, name))

    visit(model, "")
    return {"modules": found}


def _spec(module: nn.Module) -> Spec | None:
    """Type and constructor arguments; None where the module cannot be rebuilt."""
    if isinstance(module, RecordedForward):  # described by what differs inside it
        return None
    kind = type(module).__name__
    spec: Spec
    if _REGISTERED.get(kind) is type(module):
        spec = {"type": kind, **module.config()}  # type: ignore[operator]
    elif type(module) in _CONTAINERS.values():
        children = {name: _spec(child) for name, child in module.named_children()}
        if any(child is None for child in children.values()):
            return None
        return {"type": kind, "children": children}
    elif _TORCH.get(kind) is type(module) and not hasattr(module, "parametrizations"):
        spec = {"type": kind, **_arguments(module)}
    else:
        return None
    dtypes = {t.dtype for t in [*module.parameters(), *module.buffers()] if t.is_floating_point()} - {torch.float32}
    return spec | {"dtype": str(dtypes.pop()).removeprefix("torch.")} if len(dtypes) == 1 else spec


def _arguments(module: Any) -> Spec:
    """The constructor arguments of a torch.nn leaf, read from the attributes of the same names."""
    if isinstance(module, nn.RNNBase):
        own = (
            "input_size",
            "hidden_size",
            "num_layers",
            "bias",
            "batch_first",
            "dropout",
            "bidirectional",
            "proj_size",
            "nonlinearity",
        )
        return {
            n: getattr(module, n)
            for n in own
            if hasattr(module, n) and not (n == "proj_size" and not isinstance(module, nn.LSTM))
        }
    result: Spec = {}
    for name, parameter in inspect.signature(type(module).__init__).parameters.items():
        if name in ("self", "device", "dtype", "args", "kwargs", "_weight", "_freeze", "min_value", "max_value"):
            continue
        if isinstance(module, nn.MultiheadAttention) and name in ("bias", "add_bias_kv"):
            value: Any = (module.in_proj_bias if name == "bias" else module.bias_k) is not None
        elif isinstance(module, nn.PReLU) and name == "init":
            continue
        else:
            value = getattr(module, name, parameter.default)
        if name == "bias" and (value is None or isinstance(value, Tensor)):
            value = value is not None
        result[name] = list(value) if isinstance(value, tuple) else value
    return result


def _build(spec: Spec, path: str) -> nn.Module:
    known = _TORCH | _REGISTERED | _CONTAINERS
    kind = spec.get("type")
    if kind not in known:
        raise FileFormatError(
            f"module {path!r} has type {kind!r}{suggest(str(kind), known)}; import the code that defines it first"
        )
    if kind in _CONTAINERS:
        container = _CONTAINERS[kind]()
        for name, child in spec["children"].items():
            container.add_module(name, _build(child, _join(path, name)))
        return container
    arguments = {
        n: tuple(v) if isinstance(v, list) and kind in _TORCH else v
        for n, v in spec.items()
        if n not in ("type", "dtype")
    }
    try:
        module = known[kind](**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FileFormatError(f"module {path!r} cannot be built as {kind}({arguments}): {error}") from error
    return module.to(getattr(torch, spec["dtype"])) if "dtype" in spec else module


def difference(model: nn.Module, reference: nn.Module) -> Spec:
    """What distinguishes the structure of ``model`` from that of ``reference``, as JSON-able data.

    Returns:
        ``{"modules": {path: spec}, "removed": [path], "recorded": {path: program}, "attributes": {path: {name: value}},
        "tensors": {name: {"shape", "dtype"[, "values"]}}, "tied": [[name, ...]]}``, empty entries left out.
        ``tensors`` are parameters and buffers that modules of the user's own classes hold themselves; integer buffers
        outside the state dict come with their values.

    Raises:
        ModelError: A module that differs and cannot be rebuilt, by path.
    """
    delta: Spec = {"modules": {}, "removed": [], "recorded": {}, "attributes": {}, "tensors": {}, "tied": []}
    _compare(model, reference, "", delta)
    if delta["modules"]:
        delta["tied"] = _ties(model)
    return {name: entry for name, entry in delta.items() if entry or name == "modules"}


def _compare(model: nn.Module, reference: nn.Module | None, path: str, delta: Spec) -> None:
    if reference is not None and kind_of(model) is kind_of(reference):
        spec = None if type(model) in _CONTAINERS.values() else _spec(model)
        if spec is not None and (spec != _spec(reference) or _shapes(model) == _shapes(reference)):
            if spec != _spec(reference):
                delta["modules"][path] = spec
            return
        children = dict(reference.named_children())
        for name, child in model.named_children():
            _compare(child, children.pop(name, None), _join(path, name), delta)
        delta["removed"] += [_join(path, name) for name in children]
        if isinstance(model, RecordedForward) and getattr(reference, "program", None) != model.program:
            delta["recorded"][path] = model.program
        _compare_own(model, reference, path, delta)
        return
    spec = _spec(model)
    if spec is None:
        culprit = next((n for n, m in model.named_modules() if _spec(m) is None and not list(m.children())), "")
        name, kind = _join(path, culprit), type(model.get_submodule(culprit)).__name__
        raise ModelError(
            f"module {name!r} ({kind}) cannot be saved as data: give it config() and the decorator @rebuildable"
        )
    delta["modules"][path] = spec
    if spec["type"] in _REGISTERED and list(model.children()):
        # What its constructor makes may have been replaced since.
        made = dict(_build(spec, path).named_children())
        for name, child in model.named_children():
            _compare(child, made.get(name), _join(path, name), delta)


def _shapes(module: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, tensor.shape) for name, tensor in module.state_dict().items()]


def _compare_own(model: nn.Module, reference: nn.Module, path: str, delta: Spec) -> None:
    """Tensors and plain attributes of a module of the user's own class."""
    for kind in ("_parameters", "_buffers"):
        own, other = getattr(model, kind), getattr(reference, kind)
        for name, tensor in own.items():
            before = other.get(name)
            if tensor is None or before is None:
                if (tensor is None) != (before is None):
                    raise ModelError(
                        f"{_join(path, name)!r} exists in only one of the networks: keep it or replace its module"
                    )
                continue
            hidden = kind == "_buffers" and name in model._non_persistent_buffers_set and not tensor.is_floating_point()
            same = tensor.shape == before.shape and tensor.dtype == before.dtype
            if not same or (hidden and not torch.equal(tensor.cpu(), before.cpu())):
                entry = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
                delta["tensors"][_join(path, name)] = entry | ({"values": tensor.tolist()} if hidden else {})
    plain = {n: v for n, v in vars(model).items() if not n.startswith("_") and n != "training" and _is_plain(v)}
    changed = {n: list(v) if isinstance(v, tuple) else v for n, v in plain.items() if v != vars(reference).get(n)}
    if changed:
        delta["attributes"][path] = changed


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str)) or (isinstance(value, tuple) and all(_is_plain(v) for v in value))


def _ties(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [tied for tied in names.values() if len(tied) > 1]


def apply_difference(reference: nn.Module, delta: Spec) -> nn.Module:
    """Give a fresh network the structure that :func:`difference` described; weights of rebuilt modules are not
    meaningful yet.

    Args:
        reference: A network from the original constructor; it is changed in place, except where the root itself is
            replaced.
        delta: What :func:`difference` returned.

    Returns:
        The network, whose state dict now has the described names and shapes.

    Raises:
        FileFormatError: A description that does not fit ``reference`` or names an unknown type.
    """
    model = reference
    own = (t.device for t in [*model.parameters(), *model.buffers()] if not t.is_meta)
    device = next(own, torch.device("cpu"))
    for path, spec in delta.get("modules", {}).items():
        new = _build(spec, path)
        if not any(t.is_meta for t in [*new.parameters(), *new.buffers()]):
            new = new.to(device)
        if not path:
            return new.train(model.training)
        parent, name = _owner(model, path)
        old = parent._modules.get(name)
        parent.add_module(name, new.train((old or parent).training))
    for path in delta.get("removed", []):
        parent, name = _owner(model, path)
        parent._modules.pop(name, None)
    for path, program in delta.get("recorded", {}).items():
        play(_module(model, path), program)
    for path, attributes in delta.get("attributes", {}).items():
        owner = _module(model, path)
        for name, value in attributes.items():
            setattr(owner, name, tuple(value) if isinstance(value, list) else value)
    for path, entry in delta.get("tensors", {}).items():
        _resize(*_owner(model, path), entry)
    _tie(model, delta.get("tied", []))
    return model


def _resize(owner: nn.Module, name: str, entry: Spec) -> None:
    old = getattr(owner, name, None)
    if not isinstance(old, Tensor):
        raise FileFormatError(
            f"the network has no tensor {name!r} in {type(owner).__name__}: it does not belong to this file"
        )
    dtype = getattr(torch, entry["dtype"])
    if "values" in entry:
        old.data = torch.tensor(entry["values"], dtype=dtype, device=old.device).reshape(entry["shape"])
    else:
        old.data = torch.zeros(entry["shape"], dtype=dtype, device=old.device)


def _tie(model: nn.Module, tied: Iterable[list[str]]) -> None:
    for first, *others in tied:
        owner, name = _owner(model, first)
        parameter = owner._parameters[name]
        for other in others:
            holder, attribute = _owner(model, other)
            holder._parameters[attribute] = parameter
            if isinstance(holder, nn.RNNBase):
                holder._flat_weights = [getattr(holder, n) for n in holder._flat_weights_names]


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return _module(model, parent), name


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise FileFormatError(f"the network has no module {path!r}: the file belongs to another network") from error


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
