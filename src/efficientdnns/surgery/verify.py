"""Trying a removal: does the smaller network run, and does it compute what it should?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map

from efficientdnns.data.detection import is_detections, paired
from efficientdnns.surgery.graph import ChannelGraph
from efficientdnns.surgery.precision import computing_in
from efficientdnns.surgery.recorded import RecordedForward, kind_of
from efficientdnns.surgery.recorder import Unrecordable, record, signatures, written_in
from efficientdnns.surgery.reference import reference_outputs
from efficientdnns.surgery.remove import sliced, zero_contributions
from efficientdnns.surgery.resize import Sizes
from efficientdnns.surgery.trace import Inputs, as_arguments, evaluating, first_line, hint, plain_attention, quietly

Plan = Mapping[str, Tensor]


def tried(
    model: nn.Module, plan: Plan, graph: ChannelGraph, example_inputs: Inputs, exact: bool = True
) -> tuple[nn.Module | None, str | None]:
    """Remove the units of ``plan``: the smaller network, and why it is not right (None where it is).

    Outputs are compared in float64 to 1e-9 of their size, or to 1e-3 in the network's own dtype where its code cannot
    run in float64. Modules in whose code sizes are written run their recorded graph where that makes it right.
    """
    smaller, reason = settled(model, plan, graph, example_inputs)
    if smaller is not None and exact:
        reason = mismatch(model, smaller, plan, graph, example_inputs)
        if reason is not None and graph.exported is not None:  # a size in its code makes it compute something else
            again, _ = settled(model, plan, graph, example_inputs, everywhere=True)
            if again is not None and mismatch(model, again, plan, graph, example_inputs) is None:
                smaller, reason = again, None
    if smaller is not None and reason is None:
        graph.recorded |= {name for name, module in smaller.named_modules() if isinstance(module, RecordedForward)}
    return smaller, reason


def mismatch(
    model: nn.Module, smaller: nn.Module, plan: Plan, graph: ChannelGraph, example_inputs: Inputs
) -> str | None:
    """Why ``smaller`` is not ``model`` without the channels of ``plan``, or None where it is."""
    if graph.exported is None:
        return differing(zero_contributions(model, plan, graph), smaller, example_inputs)
    probe = probed(graph.example)
    for dtype, allowed in ((torch.float64, 1e-9), (None, 1e-3)):
        try:
            expected = reference_outputs(model, plan, graph, probe, dtype)
            got = tree_leaves(_run_in(dtype, smaller, probe))
        except (RuntimeError, TypeError) as error:
            reason = f"the new network does not run ({first_line(error)})"
            continue
        if _shapes(expected) != _shapes(got):
            return f"its outputs change shape from {_shapes(expected)} to {_shapes(got)}"
        distance = _distance(expected, got)
        if distance > allowed:
            again = tree_leaves(_run_in(dtype, smaller, probe))
            if _distance(got, again) <= allowed:  # a network with randomness in eval mode cannot be compared
                return f"its outputs differ by {distance:.1e} from those of the full network without them"
        return None
    return reason


def _floats(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _run_in(dtype: torch.dtype | None, model: nn.Module, probe: Sequence[Any]) -> list[Output]:
    if dtype is None:
        return _run(model, probe)
    with computing_in(dtype):
        return _run(model, probe)


def probed(example: Sequence[Any]) -> list[Any]:
    """Inputs like ``example`` with random numbers, so that zeros in it hide nothing."""
    generator = torch.Generator().manual_seed(0)

    def noise(x: Any) -> Any:
        return torch.randn(x.shape, generator=generator).to(x) if _floats(x) else x

    return [tree_map(noise, x) for x in example]


def settled(
    model: nn.Module, plan: Plan, graph: ChannelGraph, example_inputs: Inputs, everywhere: bool = False
) -> tuple[nn.Module | None, str | None]:
    """The smaller network such that it runs and keeps its output shapes, or why that cannot be.

    It is tried without computing anything. A module that fails because a size is written in its code runs its recorded
    graph instead, then its caller where it cannot be recorded; ``everywhere``: every module with a changed size does.
    """
    smaller = sliced(model, plan, graph)
    if graph.exported is None:
        return (smaller, None) if (why := _outputs_change(model, smaller, example_inputs)) is None else (None, why)
    sizes = Sizes(graph, plan)
    written = written_in(graph, sizes)
    attempt = _Recordings(model, smaller, graph, sizes)
    for path in written if everywhere else [p for p in written if p in graph.recorded]:
        attempt.record(path)
    for _ in range(len(list(model.modules()))):
        failed = trial(smaller, graph)
        if failed is None:
            return smaller, None
        path, reason = failed
        kind = kind_of(smaller.get_submodule(path))
        alike = {path} | {p for p in written if p not in attempt.done and kind_of(smaller.get_submodule(p)) is kind}
        if not everywhere and any([attempt.rename(p, written.get(p, {})) for p in alike]):
            continue
        if not any([attempt.record(p) for p in alike]):
            return None, f"the new network does not run ({reason})"
    return None, "the new network does not run"


class _Recordings:
    """Modules of one smaller network that run their recorded graphs."""

    def __init__(self, model: nn.Module, smaller: nn.Module, graph: ChannelGraph, sizes: Sizes) -> None:
        self.model, self.smaller, self.graph, self.sizes = model, smaller, graph, sizes
        self.done: set[str] = set()
        self.attributes: dict[str, dict[str, int]] = {}
        self.inline: set[str] = set()

    def rename(self, path: str, sizes: dict[int, int]) -> bool:
        """Set the plain attributes of a module that hold a written size (``hidden_dim``); False where none does or that
        did not help before."""
        module = self.smaller.get_submodule(path)
        if path in self.attributes or path in self.done:
            for name, value in self.attributes.pop(path, {}).items():
                setattr(module, name, value)
            return False
        plain = {n: v for n, v in vars(module).items() if type(v) is int and v in sizes and not n.startswith("_")}
        self.attributes[path] = plain
        for name, value in plain.items():
            setattr(module, name, sizes[value])
        return bool(plain)

    def record(self, path: str) -> bool:
        """Record a module, or the next one around it that can be; False where nothing is left to try."""
        while path in self.done and path:
            self.inline.add(path)
            path = path.rpartition(".")[0]
        self.graph.calls = self.graph.calls or signatures(self.model, self.graph)
        while path not in self.done:
            try:
                record(self.model, self.smaller, path, self.sizes, self.inline, self.graph.calls)
            except Unrecordable:
                self.inline.add(path)
                if not path:
                    return False
                path = path.rpartition(".")[0]
            else:
                self.done.add(path)
                parent = self.smaller.get_submodule(path.rpartition(".")[0])
                if isinstance(parent, nn.TransformerEncoderLayer):  # its fast path reads the attention's tensors itself
                    self.inline.add(path)
                    return self.record(path.rpartition(".")[0])
                return True
        return False


def trial(smaller: nn.Module, graph: ChannelGraph) -> tuple[str, str] | None:
    """Run a network without computing anything: the path of the module that fails and why, or None where none does."""
    stack: list[str] = []
    paths = {module: path for path, module in smaller.named_modules()}

    def leave(*_: Any) -> None:
        stack.pop()

    handles = [module.register_forward_pre_hook(lambda m, _: stack.append(paths[m])) for module in paths]
    handles += [module.register_forward_hook(leave) for module in paths]
    try:
        with evaluating(smaller), quietly(), plain_attention(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = tree_map(lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, graph.example)
            output = smaller(*fake)
    except Exception as error:
        return (stack[-1] if stack else ""), first_line(error)
    finally:
        for handle in handles:
            handle.remove()
    assert graph.exported is not None
    end = next(node for node in graph.exported.graph.nodes if node.op == "output")
    expected = [tuple(hint(n) for n in x.meta["val"].shape) for x in tree_leaves(end.args) if isinstance(x, Node)]
    got = [tuple(x.shape) for x in tree_leaves(output) if isinstance(x, Tensor)]
    return None if expected == got else ("", f"its outputs change shape from {expected} to {got}")


def _outputs_change(model: nn.Module, smaller: nn.Module, example_inputs: Inputs) -> str | None:
    return differing(model, smaller, example_inputs, exact=False)


def differing(
    reference: nn.Module, other: nn.Module, example_inputs: Inputs, exact: bool = True, allowed: float = 1e-9
) -> str | None:
    """How the outputs of two networks differ (in shape only, unless ``exact``), or None up to ``allowed``.

    What a detector finds has no shape, and is compared as a set of which nine tenths must be in both: rounding decides
    about boxes of equal scores. There are many of these in pictures with even areas, so it looks at noise instead, and
    keeps boxes of any score.
    """
    arguments = as_arguments(example_inputs, reference)
    try:
        expected, got = _run(reference, arguments), _run(other, arguments)
    except Exception as error:
        return f"the new network does not run ({first_line(error)})"
    if _shapes(expected) != _shapes(got):
        return f"its outputs change shape from {_shapes(expected)} to {_shapes(got)}"
    if not exact:
        return None
    if any(map(is_detections, expected)):
        arguments = tuple(probed(arguments))
        expected, got = _run(reference, arguments), _run(other, arguments)
    runs = _run_in_float64(reference, other, arguments)
    tolerance = max(allowed, 1e-9 if runs else 1e-3)
    expected, got, again = runs or (expected, got, _run(reference, arguments))
    distance, noise = _distance(expected, got), _distance(expected, again)
    if distance > tolerance and noise <= tolerance:  # a network with randomness in eval mode cannot be compared
        return f"its outputs differ by {distance:.1e} from those of the full network without them"
    return None


def rounding(model: nn.Module) -> float:
    """What new constants cost that are stored in the network's own dtype: 1e-9 in float64, 1e-4 in float32, 0.1
    below."""
    coarsest = max((torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()), default=0.0)
    return 1e-9 if coarsest < 1e-12 else 1e-4 if coarsest < 1e-6 else 0.1


Output = Tensor | Mapping[str, Tensor]
"""A tensor, or what was detected in one image."""


def _run(model: nn.Module, arguments: Sequence[Any]) -> list[Output]:
    with evaluating(model), _of_any_score(model):
        outputs = tree_leaves(model(*arguments), is_leaf=is_detections)
        return [x.clone() if isinstance(x, Tensor) else x for x in outputs if isinstance(x, Tensor) or is_detections(x)]


@contextmanager
def _of_any_score(model: nn.Module) -> Iterator[None]:
    """Torchvision's detectors keep all boxes, not only those that they are sure of."""
    strict: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "score_thresh", None), float)]
    before = [module.score_thresh for module in strict]
    try:
        for module in strict:
            module.score_thresh = 0.0
        yield
    finally:
        for module, threshold in zip(strict, before, strict=True):
            module.score_thresh = threshold


Runs = tuple[list[Output], list[Output], list[Output]]


def _run_in_float64(reference: nn.Module, other: nn.Module, arguments: Sequence[Any]) -> Runs | None:
    """Outputs of reference, other and reference again; None where float64 fails (constants in the code, the device)."""
    try:
        with computing_in(torch.float64):
            return _run(reference, arguments), _run(other, arguments), _run(reference, arguments)
    except (RuntimeError, TypeError):
        return None


def _distance(expected: Sequence[Output], got: Sequence[Output]) -> float:
    """Largest difference relative to the size of the outputs (at least 1); infinite where only one of them is
    finite."""
    worst = 0.0
    for first, second in zip(expected, got, strict=True):
        if not isinstance(first, Tensor) or not isinstance(second, Tensor):
            one, other, labels = paired(first, second)  # type: ignore[arg-type]
            first, second = torch.cat([one, labels[:, None]], 1), torch.cat([other, torch.zeros(len(labels), 1)], 1)
        if first.numel() == 0:
            continue
        first, second = first.double(), second.double()
        same = torch.isclose(first, second, rtol=0.0, atol=0.0, equal_nan=True)
        gap = torch.where(same, torch.zeros_like(first), (first - second).abs())
        size = max(1.0, float(first[first.isfinite()].abs().max())) if bool(first.isfinite().any()) else 1.0
        worst = max(worst, float(gap.nan_to_num(nan=torch.inf, posinf=torch.inf).max()) / size)
    return worst


def _shapes(outputs: Sequence[Output]) -> str:
    return ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else " ".join(sorted(x)) for x in outputs)


def failing_groups(model: nn.Module, example_inputs: Inputs, graph: ChannelGraph) -> dict[str, str]:
    """Try to remove an odd number of units, about half, of every group at once; where that fails, find the groups that
    make it fail and why.

    Half, so that the smaller network takes little memory beside the large one; odd, because code that counts on whole
    multiples should show.
    """
    generator = torch.Generator().manual_seed(0)
    plan = {
        group.name: torch.randperm(group.size, generator=generator)[: min(group.size // 2 | 1, group.size - 1)]
        for group in graph.groups
        if group.size > 1
    }
    return failing_among(model, example_inputs, graph, plan)


def failing_among(model: nn.Module, example_inputs: Inputs, graph: ChannelGraph, plan: Plan) -> dict[str, str]:
    """The groups of a plan whose removal fails, with the reason; found by halving."""

    def trial(names: list[str]) -> str | None:
        part = {name: plan[name] for name in names}
        return tried(model, part, graph, example_inputs)[1] if part else None

    def search(names: list[str], reason: str) -> dict[str, str]:
        if len(names) == 1:
            return {names[0]: reason}
        found: dict[str, str] = {}
        for half in (names[: len(names) // 2], names[len(names) // 2 :]):
            why = trial(half)
            if why is not None:
                found |= search(half, why)
        rest = [name for name in names if name not in found]
        why = trial(rest)
        while why is not None and rest:  # only together do they fail: the later ones stay whole
            found[rest[-1]] = why
            rest = rest[:-1]
            why = trial(rest)
        return found

    reason = trial(list(plan))
    return search(list(plan), reason) if reason is not None else {}
