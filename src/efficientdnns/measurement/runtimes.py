"""The runtimes whose latency can be measured: eager PyTorch, ``torch.compile`` and ONNX Runtime.

:func:`runner` makes the :class:`~efficientdnns.measurement.latency.Runner` of a network by the name of the runtime; what is
prepared (compilation, the exported file, the session) is never timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from efficientdnns.errors import ConfigurationError, DataError, FileFormatError, ModelError, suggest
from efficientdnns.measurement.inference import Forward
from efficientdnns.measurement.latency import Eager, Runner

ALIASES = {"eager": "pytorch-eager", "compile": "torch-compile", "onnx": "onnxruntime", "ort": "onnxruntime"}
"""Short names of the command line."""


class Compiled(Eager):
    """``torch.compile`` with inductor, one kernel a shape; otherwise like :class:`Eager`."""

    runtime = "torch-compile"

    @contextmanager
    def opened(self, inputs: Any, threads: int) -> Iterator[Callable[[], object]]:
        """See :class:`Runner`; the network is compiled here.

        Raises:
            ConfigurationError: there is no C++ compiler. ModelError: the network cannot be compiled.
        """
        _need_compiler()
        from torch._dynamo.exc import TorchDynamoException

        compiled: Any = torch.compile(self.model, dynamic=False)
        forward = self.forward
        try:
            with Eager(self.model, lambda _, batch: forward(compiled, batch)).opened(inputs, threads) as once:
                try:
                    once()
                except TorchDynamoException as error:
                    name = type(self.model).__name__
                    raise ModelError(f"torch.compile cannot compile {name}: {_first_line(error)}") from error
                yield once
        finally:
            torch.compiler.reset()  # kept kernels count against the limit of recompilations, beyond which it runs eagerly


class OnnxRuntime:
    """ONNX Runtime on the CPU: a network, exported once to a temporary file, or an ONNX file as it is.

    Args:
        source: the network, or the path of an ONNX file (a quantized one, for instance).
        example_input: what the network is traced with; not needed for a file.
        forward: how to call the network where calling it is not enough.
    """

    runtime = "onnxruntime"

    def __init__(self, source: nn.Module | Path, example_input: Any = None, forward: Forward | None = None) -> None:
        self.source, self.example_input, self.forward = source, example_input, forward

    @cached_property
    def _folder(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="efficientdnns-")  # removed together with the runner

    @cached_property
    def path(self) -> Path:
        """The ONNX file."""
        if not isinstance(self.source, nn.Module):
            return Path(self.source)
        from efficientdnns.deployment.graph import trace
        from efficientdnns.deployment.integers import has_integers, write_integers
        from efficientdnns.deployment.onnx import write_onnx

        path = Path(self._folder.name) / "model.onnx"
        if has_integers(self.source):
            graph = trace(self.source, self.example_input, forward=self.forward)
            write_integers("onnx", graph, self.source, path, self.forward)
            return path
        return write_onnx(self.source, self.example_input, path, dynamic_batch=True, forward=self.forward)

    @contextmanager
    def opened(self, inputs: Any, threads: int) -> Iterator[Callable[[], object]]:
        """See :class:`Runner`; the session has ``threads`` threads inside an operation and runs one at a time.

        Raises:
            ConfigurationError: onnxruntime (or, for a network, onnx and onnxscript) is not installed.
            ModelError: the network cannot be exported. FileFormatError: ONNX Runtime cannot open the file.
        """
        session = open_session(self.path, threads)
        arrays = feed(session, inputs)
        try:
            session.run(None, arrays)
        except Exception as error:  # ONNX Runtime's own exceptions have no common base class
            raise ModelError(f"ONNX Runtime cannot run {self.path.name}: {_first_line(error)}") from error
        yield lambda: session.run(None, arrays)


RUNTIMES: dict[str, type[Eager] | type[OnnxRuntime]] = {
    "pytorch-eager": Eager,
    "torch-compile": Compiled,
    "onnxruntime": OnnxRuntime,
}


def runtime_name(name: str) -> str:
    """The full name of a runtime, given it or a short one (``eager``, ``compile``, ``onnx``).

    Raises:
        ConfigurationError: no runtime is called so.
    """
    name = ALIASES.get(name, name)
    if name not in RUNTIMES:
        raise ConfigurationError(f"no runtime is called '{name}'{suggest(name, [*RUNTIMES, *ALIASES])}")
    return name


def runner(name: str, model: nn.Module, example_input: Any, forward: Forward | None = None) -> Runner:
    """The runner of ``model`` in the runtime ``name``.

    Args:
        name: ``"pytorch-eager"``, ``"torch-compile"`` or ``"onnxruntime"``, or a short name of :data:`ALIASES`.
        model: the network; it is not changed.
        example_input: what it is called with: a tensor, a tuple (arguments) or a mapping (keywords).
        forward: ``forward(model, inputs)`` where calling the model is not enough.

    Raises:
        ConfigurationError: no runtime is called so, or what it needs is not installed.
    """
    name = runtime_name(name)
    if name == "onnxruntime":
        from efficientdnns.deployment.extras import need

        need("onnx", "onnx", "onnxscript", "onnxruntime")
        return OnnxRuntime(model, example_input, forward)
    if name == "torch-compile":
        _need_compiler()
        return Compiled(model, forward)
    return Eager(model, forward)


def available(names: Iterable[str] = tuple(RUNTIMES)) -> list[str]:
    """Those of ``names`` whose packages and compiler are there."""
    found = []
    for name in names:
        try:
            runner(name, nn.Identity(), None)
        except ConfigurationError:
            runtime_name(name)  # a name that is none is an error all the same
            continue
        found.append(runtime_name(name))
    return found


def open_session(path: Path, threads: int, profile: Path | None = None, optimized: Path | None = None) -> Any:
    """An ONNX Runtime session on the CPU.

    Args:
        path: the ONNX file.
        threads: threads inside an operation.
        profile: beginning of the path of a profile that ``end_profiling()`` writes.
        optimized: where to write the graph that really runs.

    Raises:
        ConfigurationError: onnxruntime is not installed. FileFormatError: it cannot open the file.
    """
    from efficientdnns.deployment.extras import need
    from efficientdnns.deployment.processor import compute_exactly

    need("onnx", "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Threads of one session would go on spinning while the other network has its turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    compute_exactly(options)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if not path.is_file():
        raise FileFormatError(f"{path} is no file; give an ONNX file")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions have no common base class
        raise FileFormatError(f"ONNX Runtime cannot open {path.name}: {_first_line(error)}") from error


def feed(session: Any, inputs: Any) -> dict[str, Any]:
    """The arrays of ``inputs`` by the names of the session's inputs.

    Raises:
        DataError: there are more or fewer.
    """
    names = [value.name for value in session.get_inputs()]
    if isinstance(inputs, dict) and all(name in inputs for name in names):
        tensors = [inputs[name] for name in names]
    else:
        tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    if len(tensors) != len(names):
        raise DataError(f"the file takes {len(names)} inputs ({', '.join(names)}), got {len(tensors)}")
    return {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, tensors)}


def _need_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ConfigurationError(
            "torch-compile needs a C++ compiler and found none; install g++ or clang, or leave this runtime out"
        ) from None


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
