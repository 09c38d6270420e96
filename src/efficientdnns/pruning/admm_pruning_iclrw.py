"""ADMM pruning as its workshop paper has it: one constraint, a given number of weights in each layer, and a fixed rho.

The primitive behind `admm-pruning`; it stops as soon as the weights have met their sparse copies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, NonNegativeInt, PositiveFloat

from efficientdnns.method import Paper
from efficientdnns.pruning.admm_pruning import ADMM, ADMMPruning
from efficientdnns.training import Callback, Trainer

if TYPE_CHECKING:
    from efficientdnns.session import Session


class ADMMPruningICLRW(ADMMPruning):
    r"""Systematic weight pruning with ADMM, workshop version, `Zhang et al., 2018 <https://arxiv.org/abs/1802.05747>`_.

    .. math:: \min f(\{W_i\}) \;\text{s.t.}\; \mathrm{card}(W_i) \le l_i:\quad
        Z_i^{k+1} = \Pi_{S_i}(W_i^{k+1} + U_i^k), \quad U_i^{k+1} = U_i^k + W_i^{k+1} - Z_i^{k+1}

    It is `admm-pruning` with the cardinality constraint and a fixed :math:`\rho`, plus its stopping rule: once
    :math:`\|W^{k+1} - Z^{k+1}\|_F^2 \le \epsilon` and :math:`\|Z^{k+1} - Z^k\|_F^2 \le \epsilon` hold in every layer
    (:math:`\epsilon` = ``tolerance``), the cut comes at once and the rest of the run is masked retraining.

    Deviations:
        Rounds are counted in epochs. The schedule of the learning rate does not start anew at an early cut. Those of
        `admm-pruning` apply.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="admm-pruning-iclrw",
        title="Systematic Weight Pruning of DNNs using Alternating Direction Method of Multipliers",
        authors="Tianyun Zhang, Shaokai Ye, Yipeng Zhang, Yanzhi Wang, Makan Fardad",
        venue="ICLR Workshop",
        year=2018,
        url="https://arxiv.org/abs/1802.05747",
    )
    contract_fields: ClassVar[dict[str, Any]] = ADMMPruning.contract_fields | {"tolerance": 0.5}

    epochs: NonNegativeInt = 125
    """Epochs of the ADMM phase (the released code: 30 rounds of 5,000 steps); 0 is one-shot magnitude pruning."""
    constraint: Annotated[str, Field(pattern="^weights$")] = "weights"
    """The constraint set; see `admm-pruning` for others."""
    rho_growth: Annotated[float, Field(ge=1, le=1)] = 1.0
    """Fixed; see `admm-pruning`."""
    tolerance: PositiveFloat | None = None
    """Squared Frobenius norm below which both residuals end the ADMM phase; None runs all epochs."""

    def callback(self, session: Session) -> Callback:
        return EarlyADMM(self, session, self.constraints(session))


class EarlyADMM(ADMM):
    """ADMM that cuts as soon as both residuals are small."""

    method: ADMMPruningICLRW

    def epoch_end(self, trainer: Trainer) -> None:
        before, rounds = dict(self.copies), self._rounds
        super().epoch_end(trainer)
        if not self.cut and self._rounds > rounds and self.method.tolerance is not None:
            primal = max(losses[-1] ** 2 for losses in self.residuals.values())
            moved = max(float((self.copies[n] - z).square().sum()) for n, z in before.items())
            if max(primal, moved) <= self.method.tolerance:
                self.session.report(stopped_after_epochs=trainer.epoch + 1)
                self._cut(trainer)

    @property
    def _rounds(self) -> int:
        return max(map(len, self.residuals.values()), default=0)
