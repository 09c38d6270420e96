"""A step that takes whole residual blocks out of a network: each becomes the identity, which its shortcut already is.

Narrow channels shorten few layers of a small network in practice, while a block that is gone costs nothing at all.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from efficientdnns.errors import ConfigurationError, ModelError
from efficientdnns.method import Method
from efficientdnns.session import Session
from efficientdnns.surgery import get_module, replace_module


class RemoveBlocks(Method):
    """Replace the modules ``blocks`` by the identity; training or distillation behind it repairs the network.

    A block can go where it returns a tensor of the shape that it takes: the residual blocks between two changes of
    resolution, an encoder layer of a transformer.
    """

    name: ClassVar[str] = "remove-blocks"
    kind: ClassVar[str] = "pruning"

    blocks: tuple[str, ...] = ()
    """Paths of the blocks, such as ``layer1.2``."""

    def check(self, session: Session) -> None:
        super().check(session)
        if not self.blocks:
            raise ConfigurationError("remove-blocks names no block; write remove-blocks: {blocks: [layer1.2]}")
        for name in self.blocks:
            get_module(session.model, name)

    def apply(self, session: Session) -> None:
        for name, (taken, given) in shapes(session, self.blocks).items():
            if taken != given:
                raise ModelError(
                    f"remove-blocks: '{name}' takes {list(taken)} and gives {list(given)}; "
                    "choose a block that keeps the shape"
                )
        before = session.evaluate() if session.task.calibration is not None and session.task.has_labels else None
        for name in self.blocks:
            replace_module(session.model, name, nn.Identity())
        if before is not None:
            session.report(calibration={"before": before, "after": session.evaluate()})
        session.report(removed=list(self.blocks))


@torch.no_grad()
def shapes(session: Session, names: tuple[str, ...]) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Shapes of the first input and of the output of modules, without the batch.

    Raises:
        ModelError: one of them is not called, or takes or gives no tensor.
    """
    found: dict[str, tuple[torch.Size, torch.Size]] = {}
    handles = []
    for name in names:

        def note(_: nn.Module, inputs: tuple[Any, ...], output: Any, name: str = name) -> None:
            if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                found[name] = inputs[0].shape[1:], output.shape[1:]

        handles.append(get_module(session.model, name).register_forward_hook(note))
    try:
        session.task.outputs(session.model.eval(), session.example_input)
    finally:
        for handle in handles:
            handle.remove()
    for name in names:
        if name not in found:
            raise ModelError(f"remove-blocks: '{name}' is not a module that turns one tensor into another")
    return found
