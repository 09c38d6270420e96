"""Taps: reading what flows through the modules of a network without editing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from efficientdnns.errors import ConfigurationError, ModelError, suggest

Forward = Callable[[nn.Module, Any], Any]
"""How to run a network on a batch of inputs; ``task.outputs`` is one."""

Where = Literal["output", "input", "pre-activation"]

ACTIVATIONS: frozenset[Any] = frozenset(
    [getattr(F, name) for name in ("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_", "selu")]
    + [getattr(F, name) for name in ("celu", "gelu", "silu", "mish", "hardswish", "hardtanh", "softplus", "prelu")]
    + [torch.relu, torch.relu_, torch.tanh, torch.prelu, Tensor.relu, Tensor.relu_, Tensor.tanh]
)
"""The calls that count as a hidden neuron's activation (sigmoids gate, so they do not)."""


def call(model: nn.Module, inputs: Any) -> Any:
    """The ordinary forward pass: a tuple is unpacked, a mapping passed by name."""
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


class Tap:
    """Reads a value at each of the named modules in every forward pass.

    ``where`` says which value:

    - ``output``: what the module returns, ``input``: its first argument, both as they are before any in-place
      operation overwrites them;
    - ``pre-activation``: the response whose sign decides whether the neurons fire. It is the input of the activation
      that makes the module's output (a post-activation block: the sum before its last ReLU), else the input of the
      next activation (a convolution: what its batch norm gives to the ReLU; a pre-activation block: what the next
      block's batch norm gives to the ReLU), else the module's output (logits). Functional and in-place activations
      count too.

    Gradients flow through the values. ``values`` holds those of the last forward pass by name; a module that is called
    several times in a pass leaves its last value. Attached, a tap costs one hook per name.

    >>> with Tap(model, ["layer1"], "pre-activation") as tap:  # doctest: +SKIP
    ...     model(images)
    ...     response = tap["layer1"]

    Raises `ConfigurationError` when a name is no module of the network.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], where: Where = "output") -> None:
        modules = dict(model.named_modules())
        for name in names:
            if name not in modules:
                raise ConfigurationError(f"the network has no module '{name}'{suggest(name, filter(None, modules))}")
        self.model, self.where = model, where
        self.modules = {name: modules[name] for name in dict.fromkeys(names)}
        self.values: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._watch: _Activations | None = None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.values:
            raise ModelError(f"module '{name}' did not run in the last forward pass; tap a module that runs")
        return self.values[name]

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def attach(self) -> Self:
        """Start reading; every later forward pass of the model is read until `detach`."""
        self._handles.append(self.model.register_forward_pre_hook(self._begin))
        for name, module in self.modules.items():
            if self.where == "input":
                self._handles.append(module.register_forward_pre_hook(self._read_input(name), with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(self._read_output(name)))
        if self.where == "pre-activation":
            self._handles.append(self.model.register_forward_hook(self._end, always_call=True))
        return self

    def detach(self) -> None:
        """Stop reading and leave the model as it was; the values stay."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _begin(self, *_: object) -> None:
        self.values.clear()
        if self.where == "pre-activation":
            self._watch = _Activations(self.values)
            self._watch.__enter__()

    def _end(self, *_: object) -> None:
        if self._watch is not None:
            self._watch.__exit__(None, None, None)
            self._watch = None

    def _read_input(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.values[name] = (args[0] if args else next(iter(kwargs.values()))).clone()

        return hook

    def _read_output(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Tensor) -> None:
            if self.where == "output":
                self.values[name] = output.clone()
            elif self._watch is not None:
                self._watch.module_done(name, output)

        return hook


class _Activations(TorchFunctionMode):
    """Sees every activation that is called and hands its input to the modules that wait for it."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.waiting: list[str] = []
        self.last: tuple[Tensor, Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in ACTIVATIONS:
            return func(*args, **kwargs)
        before = args[0] if args else kwargs["input"]
        if kwargs.get("inplace") or getattr(func, "__name__", "").endswith("_"):
            before = before.clone()
        result = func(*args, **kwargs)
        self.activation(before, result)
        return result

    def activation(self, before: Tensor, result: Tensor) -> None:
        for name in self.waiting:
            self.values[name] = before
        self.waiting.clear()
        self.last = (result, before)

    def module_done(self, name: str, output: Tensor) -> None:
        if self.last is not None and output is self.last[0]:
            self.values[name] = self.last[1]
        else:
            self.values[name] = output
            self.waiting.append(name)


class _Tracer(_Activations):
    """Notes the shape of every activation's input and which modules respond to which activation."""

    def __init__(self) -> None:
        super().__init__({})
        self.shapes: list[torch.Size] = []
        self.responds: dict[str, list[int]] = {}
        self.done: list[str] = []

    def activation(self, before: Tensor, result: Tensor) -> None:
        for name in self.waiting:
            self.responds.setdefault(name, []).append(len(self.shapes))
        self.shapes.append(before.shape)
        super().activation(before, result)

    def module_done(self, name: str, output: Tensor) -> None:
        self.done.append(name)
        if self.last is not None and output is self.last[0]:
            self.responds.setdefault(name, []).append(len(self.shapes) - 1)
        else:
            self.waiting.append(name)


def stage_ends(model: nn.Module, example: Any, forward: Forward = call) -> list[str]:
    """The module at the end of each stage, from input to output: the default layers of feature distillation.

    A stage is all that happens at one spatial size; its end is the last activation at that size (in a network of
    pre-activation blocks that is the first one of the next block). Each activation of vectors is a stage of its own.
    The name returned for a stage is the outermost (then the last) module whose pre-activation response (see `Tap`) is
    that activation's input. Found by running ``example`` in evaluation mode.

    Raises `ModelError` if the network has no activation behind a module.
    """
    tracer = _trace(model, example, forward)
    ends: dict[Any, int] = {}
    for index, shape in enumerate(tracer.shapes):
        size = tuple(shape[2:])
        ends[size if size and max(size) > 1 else ("vector", index if not size else 0)] = index
    names = []
    for index in sorted(ends.values()):
        # A module that ran several times responds to several activations and is no name for one of them.
        found = [name for name in reversed(tracer.done) if tracer.responds.get(name) == [index]]
        if found:
            names.append(min(found, key=lambda name: name.count(".")))
    if not names:
        raise ModelError(f"{type(model).__name__} has no activation behind a module; name the layers to be read")
    return names


def weighted_layers(model: nn.Module, example: Any, forward: Forward = call) -> list[str]:
    """The convolutions and linear layers that run on ``example``, in the order in which they run."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    done = dict.fromkeys(_trace(model, example, forward).done)
    return [name for name in done if isinstance(model.get_submodule(name), kinds)]


@torch.no_grad()
def tap_once(
    model: nn.Module, names: Sequence[str], example: Any, forward: Forward = call, where: Where = "pre-activation"
) -> dict[str, Tensor]:
    """The values at the named modules for one batch, in evaluation mode; the model is left as it was."""
    with evaluating(model), Tap(model, names, where) as tap:
        forward(model, example)
        return {name: tap[name] for name in names}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with every module's own mode restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def _trace(model: nn.Module, example: Any, forward: Forward) -> _Tracer:
    tracer = _Tracer()

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            # An activation module responds to itself; the layer before it is the better name.
            own = tracer.last is not None and output is tracer.last[0] and not any(module.children())
            if isinstance(output, Tensor) and not own:
                tracer.module_done(name, output)

        return note

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        with evaluating(model), tracer:
            forward(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return tracer
