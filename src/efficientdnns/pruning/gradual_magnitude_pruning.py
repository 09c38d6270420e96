"""Gradual magnitude pruning: sparsity rises along a cubic curve while the network trains.

Much is removed early, when there is much to spare, and less and less later; two numbers say it all.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, PositiveFloat, PositiveInt

from efficientdnns.errors import ConfigurationError
from efficientdnns.method import Paper, Ratio, TrainingMethod
from efficientdnns.parts.weight_pruning import ScheduledMasks, WeightOptions
from efficientdnns.session import Session
from efficientdnns.training import Callback

Share = Annotated[float, Field(ge=0, le=1)]


class GradualMagnitudePruning(WeightOptions, TrainingMethod):
    r"""Gradual magnitude pruning, `Zhu and Gupta, 2017 <https://arxiv.org/abs/1710.01878>`_.

    Every ``frequency`` steps the smallest weights of each layer are masked, so many that its sparsity is exactly

    .. math::
        s_t = s_f + (s_i - s_f)\Big(1 - \frac{t - t_0}{n \Delta t}\Big)^3, \qquad t = t_0, t_0 + \Delta t, ..., t_0 + n \Delta t

    with :math:`s_f` = ``sparsity``, :math:`s_i` = ``initial_sparsity`` and the interval :math:`\Delta t` = ``frequency``.
    Masked weights are zero in the forward pass, get no update and do not come back. After the last pruning the network
    trains on with its final mask.

    Deviations:
        The first and last pruning are shares of the run (``begin``, ``end``) rather than step numbers. Counts are exact
        (the highest magnitudes stay, ties by position), where the authors' code cuts at a smoothed histogram quantile.
        ``scope="global"`` ranks the weights of all layers together, which is not the paper's.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="gradual-magnitude-pruning",
        title="To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model Compression",
        authors="Michael Zhu, Suyog Gupta",
        venue="ICLR Workshop",
        year=2018,
        url="https://arxiv.org/abs/1710.01878",
    )
    contract_fields: ClassVar[dict[str, Any]] = {"epochs": 2, "frequency": 4, "sparsity": 0.8, "learning_rate": 0.01}

    initial_sparsity: Ratio = 0.0
    """Sparsity of the first pruning."""
    begin: Share = 0.0
    """The first pruning, as a share of the run."""
    end: Share = 0.75
    """The last pruning, as a share of the run; it reaches the final sparsity."""
    frequency: PositiveInt = 100
    """Steps between prunings; 100 to 1000 made little difference to the authors."""
    exponent: PositiveFloat = 3.0
    """Exponent of the schedule."""

    def check(self, session: Session) -> None:
        super().check(session)
        if self.begin >= self.end:
            raise ConfigurationError(f"{self.name}: begin={self.begin} is not before end={self.end}; swap them")
        if self.initial_sparsity > self.sparsity:
            raise ConfigurationError(
                f"{self.name}: initial_sparsity={self.initial_sparsity} is above sparsity={self.sparsity}; "
                "pruned weights do not come back"
            )

    def callback(self, session: Session) -> Callback:
        return ScheduledMasks(
            self,
            session,
            initial=self.initial_sparsity,
            begin=self.begin,
            end=self.end,
            frequency=self.frequency,
            exponent=self.exponent,
        )
