"""Weightless: a pruned, clustered layer as a Bloomier filter, which takes some zeros for weights; the rest learns around it.

The filter's size does not depend on the number of zeros, so the sparser the layer the more it gains over index coding.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn

from efficientdnns.budget import Plan, most
from efficientdnns.coding.bloomier import WeightlessCodec, false_positive_rate
from efficientdnns.coding.codecs import DeepCompressionCodec, best
from efficientdnns.coding.kmeans import kmeans_1d
from efficientdnns.errors import ConfigurationError
from efficientdnns.measurement.size import nonzero_parameters
from efficientdnns.method import Need, Paper, Ratio
from efficientdnns.parts.budgets import costs, limits_of, meet, require_reachable
from efficientdnns.parts.criteria import weight_scores
from efficientdnns.parts.select import by_pattern
from efficientdnns.parts.weight_pruning import EVERYTHING, WeightOptions, masks_of, share_evenly
from efficientdnns.session import Session
from efficientdnns.training import Callback, Trainer
from efficientdnns.training.sparsity import MaskedTraining

LARGE = 0.1
"""Share of the weights from which on a layer is encoded if no layers are named."""
MARGINS = {"params": 0.995, "bytes": 0.995}
"""Shares of the limits that are aimed at: how many zeros answer as weights is known only once the filter is built."""


class Weightless(WeightOptions):
    r"""Weightless, `Reagen et al., ICML 2018 <https://arxiv.org/abs/1711.04686>`_.

    All layers are pruned by magnitude in ``prune_rounds`` rounds with retraining. Then, from the first to the last of the
    ``layers``: the weights that are left are clustered into k values (1-D k-means), stored in a Bloomier filter of
    :math:`m = c n + 30` cells of t bits, and decoded again by asking for every index,

    .. math::
        v = H_M(i) \oplus X[h_0(i)] \oplus X[h_1(i)] \oplus X[h_2(i)], \qquad
        w_i = \mathrm{centroid}_v \text{ if } v < k \text{ else } 0

    Stored weights come back exactly; a zero becomes a weight with probability :math:`k / 2^t`. The decoded layer, errors
    and all, is frozen, and the rest is retrained around it. A layer takes :math:`m t + 32 k` bits, and its bytes are those
    that the file holds and the loader decodes.

    Other layers stay pruned and are coded exactly. The report has, for each encoded layer, the bytes beside those of Deep
    Compression's format and of this library's smallest exact one, and the false positives beside what was expected.

    Deviations:
        Pruning is by magnitude where the paper also takes dynamic network surgery. Everything but the encoded weights is
        retrained, also layers before them. The smallest t that serves is not searched for: give ``bits``.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="weightless",
        title="Weightless: Lossy Weight Encoding for Deep Neural Network Compression",
        authors="Brandon Reagen, Udit Gupta, Robert Adolf, Michael Mitzenmacher, Alexander Rush, Gu-Yeon Wei, David Brooks",
        venue="ICML",
        year=2018,
        url="https://arxiv.org/abs/1711.04686",
    )
    kind: ClassVar[str] = "coding"
    needs: ClassVar[frozenset[Need]] = frozenset({"training data", "labels"})
    contract_fields: ClassVar[dict[str, Any]] = {
        "sparsity": 0.9, "prune_rounds": 1, "prune_epochs": 1, "retrain_epochs": 1, "learning_rate": 0.01
    }  # fmt: skip

    sparsity: Ratio = 0.98
    """Share of the weights that is removed; solved for when the run has a budget."""
    layers: tuple[str, ...] = ()
    """Layers to encode, by name pattern; without any, those with a tenth of all weights or more."""
    clusters: Annotated[int, Field(ge=1, le=4096)] = 16
    """k, values of a layer."""
    bits: Annotated[int, Field(ge=4, le=16)] = 8
    """t of a cell; every bit less doubles the false positives."""
    c: Annotated[float, Field(gt=1.222)] = 1.25
    """Cells for each weight; below 1.222 hardly any filter can be built."""
    prune_rounds: PositiveInt = 3
    """Prune-and-retrain rounds; the kept share falls by the same factor in each."""
    prune_epochs: NonNegativeInt = 5
    """Retraining epochs of each round."""
    retrain_epochs: NonNegativeInt = 2
    """Epochs around each encoded layer."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate of retraining; None takes a tenth of the session's."""

    def check(self, session: Session) -> None:
        super().check(session)
        if self.clusters >= 1 << self.bits:
            raise ConfigurationError(
                f"{self.name}: {self.clusters} clusters leave no answer for 'zero' in {self.bits} bits; use more bits"
            )
        if not self.encoded(session.model):
            raise ConfigurationError(f"{self.name}: {type(session.model).__name__} has no layer to encode")

    def check_network(self, session: Session) -> None:
        weights = self.weights(session.model)
        by_pattern(self.sparsities, weights, f"{self.name}: sparsities")
        if limits_of(session, self):
            least = len(weights)
            require_reachable(session, self, lambda: self.pruned(session.model, least), self._measure(session))

    def encoded(self, model: nn.Module) -> list[str]:
        """The weights that get a filter, by parameter name, in the order of the network."""
        weights = self.weights(model)
        if self.layers:
            return list(by_pattern(dict.fromkeys(self.layers, True), weights, f"{self.name}: layers"))
        total = sum(weight.numel() for weight in weights.values())
        return [name for name, weight in weights.items() if weight.numel() >= LARGE * total]

    @torch.no_grad()
    def encode(self, session: Session, model: nn.Module, name: str) -> WeightlessCodec | None:
        """Cluster and store one layer, and put into the model what its filter answers; None where no weight is left."""
        weight = model.get_parameter(name)
        kept = weight != 0
        if not kept.any():
            return None
        centroids, assignments = kmeans_1d(weight[kept], self.clusters, seed=session.seed)
        weight[kept] = centroids[assignments]
        codec = WeightlessCodec.lossy(weight, self.bits, self.c, session.seed)
        weight.copy_(codec.decoded(tuple(weight.shape), weight.dtype))
        return codec

    def _measure(self, session: Session) -> Any:
        """Costs of a pruned network once its layers are encoded."""

        def measure(model: nn.Module, names: Sequence[str]) -> Mapping[str, float]:
            model = copy.deepcopy(model)
            codecs = {name: self.encode(session, model, name) for name in self.encoded(model)}
            found = {name: (codec, "codebook") for name, codec in codecs.items() if codec is not None}
            return costs(session, model, names, session.codecs | found)

        return measure

    def kept(self, session: Session) -> dict[str, int]:
        if not limits_of(session, self):
            return super().kept(session)
        weights = self.weights(session.model)
        sizes = {name: weight.numel() for name, weight in weights.items()}
        others = nonzero_parameters(session.model) - sum(int(w.count_nonzero()) for w in weights.values())
        wrong = false_positive_rate(self.clusters, self.bits) * sum(sizes[n] for n in self.encoded(session.model))
        total = sum(sizes.values())

        def estimate(plan: Plan) -> dict[str, float]:
            kept = plan["kept"]
            return {"params": others + kept + wrong * (1 - kept / total), "bytes": self.c * self.bits / 8 * kept}

        plan = meet(
            session,
            self,
            propose=most(len(sizes), total),
            estimate=estimate,
            build=lambda plan: self.pruned(session.model, plan["kept"]),
            least={"kept": len(sizes)},
            full={"kept": total},
            measure=self._measure(session),
            margins=MARGINS,
        )
        return {EVERYTHING: plan["kept"]} if self.scope == "global" else share_evenly(sizes, plan["kept"])

    def apply(self, session: Session) -> None:
        rate = self.learning_rate or session.settings.learning_rate / 10
        self.prune(session, rate)
        accuracy = {"pruned": self._score(session)}
        frozen: list[str] = []
        found: dict[str, Any] = {}
        for name in self.encoded(session.model):
            found[name] = self.encode_layer(session, name)
            accuracy[f"{name} encoded"] = self._score(session)
            frozen.append(name)
            if self.retrain_epochs:
                session.train([Frozen(frozen)], epochs=self.retrain_epochs, learning_rate=rate)
                accuracy[f"{name} retrained"] = self._score(session)
        session.report(layers=found, accuracy=accuracy)

    def prune(self, session: Session, rate: float) -> None:
        """Rounds of pruning and masked retraining."""
        kept = self.kept(session)
        weights = self.weights(session.model)
        sizes = {name: weight.numel() for name, weight in weights.items()} | {
            EVERYTHING: sum(map(torch.numel, weights.values()))
        }
        for number in range(1, self.prune_rounds + 1):
            power = number / self.prune_rounds
            now = {name: max(1, round(sizes[name] * (count / sizes[name]) ** power)) for name, count in kept.items()}
            masks = masks_of(weight_scores(self.weights(session.model)), now)
            training = MaskedTraining({name: mask.to(weights[name].dtype) for name, mask in masks.items()})
            session.train([training], epochs=self.prune_epochs, learning_rate=rate)
        session.sparse.update(weights)

    def encode_layer(self, session: Session, name: str) -> dict[str, Any]:
        """Encode a layer of the session's network and say what came of it."""
        before = session.model.get_parameter(name).detach().clone()
        nonzero, size = int(before.count_nonzero()), before.numel()
        codec = self.encode(session, session.model, name)
        if codec is None:
            return {"nonzero": 0, "weights": size}
        session.codecs[name] = (codec, "codebook", "sparse")
        decoded = session.model.get_parameter(name).detach()
        exact = torch.where(before != 0, decoded, 0.0).cpu()
        compression = len(DeepCompressionCodec().encode(exact)[0])
        return {
            "nonzero": nonzero,
            "weights": size,
            "bytes": len(codec.data),
            "factor": decoded.element_size() * size / len(codec.data),
            "bytes_deep_compression": compression,
            "bytes_exact": len(best(exact).data),
            "false_positives": int(decoded.count_nonzero()) - nonzero,
            "false_positives_expected": (size - nonzero) * false_positive_rate(int(len(exact.unique()) - 1), self.bits),
        }

    @staticmethod
    def _score(session: Session) -> float | None:
        """The metric on the calibration split, where there is one."""
        return session.evaluate() if session.task.calibration is not None and session.task.has_labels else None


class Frozen(Callback):
    """Leaves the named parameters as they are for one run."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    def setup(self, trainer: Trainer) -> None:
        self._train(trainer, False)

    def finish(self, trainer: Trainer) -> None:
        self._train(trainer, True)

    def _train(self, trainer: Trainer, wanted: bool) -> None:
        for name in self.names:
            trainer.model.get_parameter(name).requires_grad_(wanted)
