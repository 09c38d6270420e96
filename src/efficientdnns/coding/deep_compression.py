"""Deep Compression: prune and retrain, share weights through a codebook and train it, Huffman-code what is left.

The three stages multiply, and the result is a file that decodes to exactly the network that was evaluated.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from efficientdnns.budget import Plan, most
from efficientdnns.coding.codecs import DeepCompressionCodec
from efficientdnns.coding.file import weights_size
from efficientdnns.coding.kmeans import kmeans_1d
from efficientdnns.errors import ConfigurationError
from efficientdnns.measurement.size import nonzero_parameters
from efficientdnns.method import Method, Need, Paper, Ratio
from efficientdnns.parts.budgets import costs, limits_of, meet, require_reachable
from efficientdnns.parts.dead import remove_constant_channels, remove_dead_channels
from efficientdnns.parts.select import by_pattern, largest_mask, layer_weights, without
from efficientdnns.parts.sparse_budgets import AIM, coded_size, trim
from efficientdnns.session import Session
from efficientdnns.training import Callback, Trainer
from efficientdnns.training.sparsity import MaskedTraining

Bits = Annotated[int, Field(ge=1, le=8)]
IndexBits = Annotated[int, Field(ge=2, le=16)]
POWER, STEPS = 4.0, 4000
"""Largest power of the kept shares that a budget is solved with, and the steps in which it falls to 0."""


def adjusted_dropout(rate: float, connections_after: int, connections_before: int) -> float:
    r"""Dropout of the retraining: :math:`D_r = D_o \sqrt{C_{ir} / C_{io}}`."""
    return rate * math.sqrt(connections_after / connections_before)


def threshold_mask(weight: Tensor, quality: float) -> Tensor:
    r"""Weights above :math:`\tau = q \cdot \mathrm{std}(W)`."""
    return weight.abs() > quality * weight.std(correction=0)


class DeepCompression(Method):
    r"""Deep Compression, `Han et al., ICLR 2016 <https://arxiv.org/abs/1510.00149>`_.

    1. *Prune*: in ``prune_iterations`` rounds the smallest weights of every layer go (an exact share, or those below
       :math:`\tau_l = q_l \, \mathrm{std}(W_l)`) and the rest is retrained; dropout is reduced to
       :math:`D_o \sqrt{C_{ir}/C_{io}}`. Neurons without input or output connections are removed.
    2. *Share*: 1-D k-means on the remaining weights of each layer, :math:`k = 2^b`, centroids spread evenly between the
       smallest and the largest; then the centroids are trained, with gradients

       .. math:: \frac{\partial L}{\partial c_k} = \sum_{ij} \frac{\partial L}{\partial W_{ij}} \mathbf 1[I_{ij} = k]

    3. *Code*: relative indices of ``index_bits`` with fillers, Huffman codes for cluster ids and gaps; the tables are in
       the file.

    Under a budget the kept shares of all layers are raised to one power, which is found on the network as it is before the
    first and again before the last round of pruning.

    Biases stay as they are unless ``bias_bits`` says otherwise. The report gives the bytes after each stage, each of a file
    that was written and decoded.

    Deviations:
        An exact share per layer is the default (the paper gives the share, not the quality parameter). The codebook is
        capped at the number of remaining weights. ``bias_bits`` and ``coder`` are not the paper's: with few weights left,
        biases of 32 bits are a quarter of the file. Text and tables of the paper disagree on index bits; the default is
        whatever codes smallest per layer.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="deep-compression",
        title="Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization and Huffman Coding",
        authors="Song Han, Huizi Mao, William J. Dally",
        venue="ICLR",
        year=2016,
        url="https://arxiv.org/abs/1510.00149",
    )
    kind: ClassVar[str] = "coding"
    needs: ClassVar[frozenset[Need]] = frozenset({"training data", "labels"})
    budgets: ClassVar[frozenset[str]] = frozenset({"params", "bytes"})
    contract_fields: ClassVar[dict[str, Any]] = {
        "sparsity": 0.8,
        "prune_iterations": 1,
        "prune_epochs": 1,
        "share_epochs": 1,
        "learning_rate": 0.01,
    }

    sparsity: Ratio | dict[str, Ratio] = 0.9
    """Share of weights removed: one number, or one per layer by name pattern; under a budget what it is in proportion."""
    quality: dict[str, PositiveFloat] = {}
    """Quality parameter q of single layers by name pattern, in place of a share."""
    skip: tuple[str, ...] = ()
    """Layers to leave alone, by name pattern such as ``fc3`` or ``layer1.*``."""
    prune_iterations: PositiveInt = 3
    """Prune-and-retrain rounds; the sparsity rises evenly in the kept share's logarithm."""
    prune_epochs: NonNegativeInt = 10
    """Retraining epochs of each round."""
    bits: dict[Literal["conv", "fc"], Bits] = {"conv": 8, "fc": 5}
    """Bits of a cluster id in convolutional and in fully connected layers."""
    init: Literal["linear", "density", "random"] = "linear"
    """Where k-means starts."""
    share_epochs: NonNegativeInt = 5
    """Epochs of training the centroids."""
    index_bits: IndexBits | None = None
    """Bits of a relative index; None takes what codes smallest."""
    bias_bits: Bits | None = None
    """Bits of a cluster id of the biases, where there are many more of them than clusters; None leaves them as they are."""
    huffman: bool = True
    """Code cluster ids and gaps; without it they are packed in fixed width."""
    coder: Literal["paper", "smallest"] = "paper"
    """The paper's relative indices and Huffman codes, or for every layer whatever codec of the library is smallest."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate of retraining; None takes a tenth of the session's. The centroids get a tenth of that."""

    def weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The weights that are pruned, clustered and coded, by parameter name."""
        return without(layer_weights(model), self.skip, f"{self.name}: skip")

    def check(self, session: Session) -> None:
        super().check(session)
        weights = self.weights(session.model)
        if not weights:
            raise ConfigurationError(
                f"{type(session.model).__name__} has no linear, convolutional or recurrent layer for {self.name}"
            )
        self.shares(weights)
        if missing := {self._kind(session.model, name) for name in weights} - set(self.bits):
            raise ConfigurationError(f"{self.name}: bits lacks {sorted(missing)}; write bits={{conv: 8, fc: 5}}")

    def check_network(self, session: Session) -> None:
        weights = self.weights(session.model)
        if limits_of(session, self):
            least = self.powered(self.shares(weights), 0)
            require_reachable(
                session, self, lambda: self._clustered(session, least), partial(self._costs, session=session)
            )

    @staticmethod
    def powered(shares: Mapping[str, float], step: int) -> dict[str, float]:
        """Kept shares raised to a power that falls from POWER at step 0 to 0, which keeps everything, at STEPS."""
        return {name: 1 - (1 - share) ** (POWER * (1 - step / STEPS)) for name, share in shares.items()}

    def shares_within(self, session: Session) -> dict[str, float]:
        """The share of weights removed from each layer, as the budget or else as the field wants it."""
        weights = self.weights(session.model)
        shares = self.shares(weights)
        if not limits_of(session, self):
            return shares
        sizes = {name: weight.numel() for name, weight in weights.items()}
        others = nonzero_parameters(session.model) - sum(int(weight.count_nonzero()) for weight in weights.values())

        def estimate(plan: Plan) -> dict[str, float]:
            kept = {name: (1 - s) * sizes[name] for name, s in self.powered(shares, plan["step"]).items()}
            coded = [
                coded_size(round(kept[name]), size, self._bits(session.model, name)) for name, size in sizes.items()
            ]
            return {"params": others + sum(kept.values()), "bytes": sum(coded)}

        plan = meet(
            session,
            self,
            propose=most(0, STEPS, "step"),
            estimate=estimate,
            build=lambda plan: self._clustered(session, self.powered(shares, plan["step"])),
            least={"step": 0},
            full={"step": STEPS},
            measure=partial(self._costs, session=session),
            margins=AIM,
        )
        return self.powered(shares, plan["step"])

    def _bits(self, model: nn.Module, name: str) -> int:
        return self.bits[self._kind(model, name)]

    @staticmethod
    def _kind(model: nn.Module, name: str) -> Literal["conv", "fc"]:
        layer = model.get_submodule(name.rpartition(".")[0])
        return "conv" if isinstance(layer, nn.modules.conv._ConvNd) else "fc"

    @torch.no_grad()
    def _clustered(self, session: Session, shares: Mapping[str, float]) -> nn.Module:
        """A copy that is pruned, rid of what that made useless, and clustered, all without training, to see what it costs."""
        model = copy.deepcopy(session.model)
        for name, share in shares.items():
            weight = model.get_parameter(name)
            weight.mul_(largest_mask(weight.abs(), max(1, round((1 - share) * weight.numel())))).add_(0.0)
        model = self._without_dead(model, session)
        for name, shared in self._codebooks(model, session.seed).items():
            model.get_parameter(name).copy_(shared.dense())
        return model

    def _costs(self, model: nn.Module, names: Sequence[str], session: Session) -> Mapping[str, float]:
        own = self._codecs(model, self.huffman) if self.coder == "paper" else {}
        return costs(session, model, names, session.codecs | own)

    def _codecs(self, model: nn.Module, huffman: bool) -> dict[str, DeepCompressionCodec]:
        return {name: DeepCompressionCodec(self.index_bits, huffman) for name in self.weights(model)}

    def shares(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """The share of weights removed from each layer without a budget."""
        if not isinstance(self.sparsity, dict):
            return dict.fromkeys(weights, self.sparsity)
        return {name: 0.0 for name in weights} | by_pattern(self.sparsity, weights, f"{self.name}: sparsity")

    def apply(self, session: Session) -> None:
        dense = self._bytes(session)
        size = {name: weight.numel() for name, weight in self.weights(session.model).items()}
        rate = self.learning_rate or session.settings.learning_rate / 10
        self.prune(session, rate)
        session.sparse |= set(self.weights(session.model))
        session.model = self._without_dead(session.model, session)
        pruned = self._bytes(session)
        self.share(session, rate / 10)
        names = self.weights(session.model)
        packed = self._bytes(session, self._codecs(session.model, huffman=False))
        if self.coder == "paper":
            session.codecs |= self._codecs(session.model, self.huffman)
        coded = self._bytes(session, session.codecs)
        kept = {name: int((weight != 0).sum()) / size[name] for name, weight in names.items()}
        session.report(
            kept=kept,
            shapes={name: list(weight.shape) for name, weight in names.items()},
            bytes={"dense": dense, "pruned": pruned, "shared": packed, "coded": coded},
            ratio={"pruned": dense / pruned, "shared": dense / packed, "coded": dense / coded},
        )

    def prune(self, session: Session, rate: float) -> None:
        """Stage 1: rounds of pruning and masked retraining, with less dropout."""
        dropouts = [m for m in session.model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
        original = [m.p for m in dropouts]
        shares = self.shares_within(session)
        for round_number in range(1, self.prune_iterations + 1):
            weights = self.weights(session.model)
            quality = by_pattern(self.quality, weights, f"{self.name}: quality") if self.quality else {}
            if 1 < round_number == self.prune_iterations:
                shares = self.shares_within(session)
            masks: dict[str, Tensor] = {}
            for name, weight in weights.items():
                if name in quality:
                    mask = threshold_mask(weight.detach(), quality[name] * round_number / self.prune_iterations)
                    masks[name] = (mask & (weight != 0)).to(weight.dtype)
                else:
                    kept = (1 - shares[name]) ** (round_number / self.prune_iterations)
                    masks[name] = largest_mask(weight.detach().abs(), max(1, round(kept * weight.numel()))).to(
                        weight.dtype
                    )
            kept_all = sum(int(m.sum()) for m in masks.values())
            for module, p in zip(dropouts, original):
                module.p = adjusted_dropout(p, kept_all, sum(m.numel() for m in masks.values()))
            session.train([MaskedTraining(masks)], epochs=self.prune_epochs, learning_rate=rate)
        for module, p in zip(dropouts, original):
            module.p = p

    def share(self, session: Session, rate: float) -> None:
        """Stage 2: cluster every layer and train the centroids."""
        shared = self._codebooks(session.model, session.seed)
        if limits_of(session, self):
            # What is coded is settled once the clusters are: training moves the centroids only.
            with torch.no_grad():
                for name, book in shared.items():
                    session.model.get_parameter(name).copy_(book.dense())
            measure = partial(self._costs, session=session)
            names = [name for name in shared if name in self.weights(session.model)]
            if trim(session, self, session.model, names, lambda model: measure(model, ["bytes"])["bytes"]):
                for name, book in shared.items():
                    book.index[session.model.get_parameter(name) == 0] = 0
        session.train(
            [CentroidTraining(shared)],
            epochs=self.share_epochs,
            learning_rate=rate,
            weight_decay=0.0,
            schedule="cosine",
        )

    @staticmethod
    def _without_dead(model: nn.Module, session: Session) -> nn.Module:
        return remove_dead_channels(remove_constant_channels(model, session.example_input), session.example_input)

    def _codebooks(self, model: nn.Module, seed: int) -> dict[str, SharedWeight]:
        """The codebook of every layer that has weights left."""
        shared = {}
        weights = self.weights(model)
        for name, weight in weights.items():
            values = weight.detach()[weight.detach() != 0]
            if len(values):
                clusters = min(2 ** self._bits(model, name), len(values))
                shared[name] = SharedWeight(weight, *kmeans_1d(values, clusters, init=self.init, seed=seed))
        biases = {n: p for n, p in model.named_parameters() if n.endswith("bias") and f"{n[:-4]}weight" in weights}
        for name, bias in biases.items():
            values = bias.detach()[bias.detach() != 0]
            if self.bias_bits is not None and len(values) > 2 * 2**self.bias_bits:
                shared[name] = SharedWeight(bias, *kmeans_1d(values, 2**self.bias_bits, init=self.init, seed=seed))
        return shared

    @staticmethod
    def _bytes(session: Session, codecs: Mapping[str, Any] | None = None) -> int:
        return weights_size(
            {name: value.detach().cpu() for name, value in session.model.state_dict().items()}, dict(codecs or {})
        )


class SharedWeight:
    """One layer's codebook and the cluster of each of its non-zero weights."""

    def __init__(self, weight: nn.Parameter, centroids: Tensor, assignments: Tensor) -> None:
        self.centroids = nn.Parameter(centroids.clone())
        self.index = torch.zeros_like(weight, dtype=torch.long)  # 0 is 'no weight', k + 1 is centroid k
        self.index[weight.detach() != 0] = assignments + 1

    def dense(self) -> Tensor:
        """The weight tensor that the codebook stands for."""
        return torch.cat([self.centroids.new_zeros(1), self.centroids.detach()])[self.index]

    def gradient(self, dense: Tensor) -> Tensor:
        """Sum of a dense gradient over the members of each cluster."""
        total = self.centroids.new_zeros(len(self.centroids) + 1)
        return total.scatter_add_(0, self.index.flatten(), dense.flatten())[1:]


class CentroidTraining(Callback):
    """Trains the centroids; the optimizer never touches the dense tensors, so shared weights stay shared."""

    def __init__(self, shared: Mapping[str, SharedWeight]) -> None:
        self.shared = dict(shared)

    def setup(self, trainer: Trainer) -> None:
        for shared in self.shared.values():
            shared.centroids.data = shared.centroids.data.to(trainer.device)
            shared.index = shared.index.to(trainer.device)
        self._write(trainer)

    def parameter_groups(self, trainer: Trainer) -> list[dict[str, Any]]:
        # The dense tensors go into a group that no gradient ever reaches.
        dense = [trainer.model.get_parameter(name) for name in self.shared]
        return [{"params": [s.centroids for s in self.shared.values()]}, {"params": dense, "weight_decay": 0.0}]

    def after_backward(self, trainer: Trainer) -> None:
        for name, shared in self.shared.items():
            weight = trainer.model.get_parameter(name)
            if weight.grad is not None:
                shared.centroids.grad = shared.gradient(weight.grad)
                weight.grad = None

    def after_step(self, trainer: Trainer) -> None:
        self._write(trainer)

    @torch.no_grad()
    def _write(self, trainer: Trainer) -> None:
        for name, shared in self.shared.items():
            trainer.model.get_parameter(name).copy_(shared.dense())

    def state_dict(self) -> dict[str, Any]:
        return {name: shared.centroids.detach() for name, shared in self.shared.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, centroids in state.items():
            self.shared[name].centroids.data.copy_(centroids)
