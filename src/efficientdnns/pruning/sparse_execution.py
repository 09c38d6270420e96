"""A step that lets very sparse layers skip their zeros on the CPU, where that is measured to be faster.

General processors multiply dense matrices so well that few layers gain; the report says which, and by how much.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, PositiveInt

from efficientdnns.method import Method, Ratio
from efficientdnns.parts.sparse_kernels import faster_sparse
from efficientdnns.session import Session


class SparseExecution(Method):
    """Replace linear layers, convolutions and LSTMs with at least ``sparsity`` zeros by ones that multiply with compressed
    rows, each only where it was measured to be faster by ``gain`` for ``batch`` samples on this machine.

    Take it as the last step. Outputs change by rounding only, the file and its exports not at all. A choice that is timed
    can fall otherwise the next time.
    """

    name: ClassVar[str] = "sparse-execution"
    kind: ClassVar[str] = "pruning"

    batch: PositiveInt = 1
    """Samples at a time."""
    sparsity: Ratio = 0.9
    """Share of zeros from which on a layer is tried."""
    gain: Annotated[float, Field(ge=1)] = 1.1
    """Least ratio of the dense to the sparse time."""

    def apply(self, session: Session) -> None:
        options: dict[str, Any] = {"batch": self.batch, "sparsity": self.sparsity, "gain": self.gain}
        task = session.task
        session.model, layers = faster_sparse(session.model, session.example_input, **options, forward=task.outputs)
        session.report(layers=layers, batch=self.batch)
