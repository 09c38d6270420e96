"""A step that forgets all weights: the network keeps its shape and its zeros, and is trained anew by what follows."""

from __future__ import annotations

from typing import ClassVar

import torch

from efficientdnns.method import Method
from efficientdnns.parts.reinitialise import reinitialised
from efficientdnns.session import Session


class Reinitialise(Method):
    """Give the network new initial weights: the control of training a small network from scratch.

    Weights that an earlier method set to zero for good stay zero.
    """

    name: ClassVar[str] = "reinitialise"
    kind: ClassVar[str] = "optimization"

    def apply(self, session: Session) -> None:
        fresh = reinitialised(session.model, session.seed)
        old = dict(session.model.named_parameters())
        with torch.no_grad():
            for name, parameter in fresh.named_parameters():
                if name in session.sparse:
                    parameter[old[name] == 0] = 0
        session.model = fresh
