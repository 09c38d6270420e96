"""Frequency-domain dynamic pruning: kernels lose DCT coefficients rather than weights, and may have them back.

Low frequencies matter more than high ones, so every frequency band has a threshold of its own.
"""

from __future__ import annotations

import copy
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from efficientdnns.errors import ConfigurationError
from efficientdnns.measurement.macs import count_macs
from efficientdnns.method import Paper, TrainingMethod
from efficientdnns.parts.dct import DCTConv2d, Domain, bands
from efficientdnns.parts.select import layer_weights, without
from efficientdnns.parts.sparse_budgets import trim
from efficientdnns.parts.sparsity_schedule import scheduled_sparsity
from efficientdnns.parts.weight_pruning import EVERYTHING, WeightOptions, masks_of, share_evenly
from efficientdnns.session import Session
from efficientdnns.surgery import replace_module
from efficientdnns.training import Callback, Trainer
from efficientdnns.training.sparsity import MaskedTraining, apply_masks

Share = Annotated[float, Field(ge=0, le=1)]
Shape = tuple[Annotated[float, Field(ge=1)], Annotated[float, Field(gt=0, le=1)]]


def hysteresis_mask(scores: Tensor, previous: Tensor, low: float, high: float) -> Tensor:
    """True from ``high`` on, False below ``low``, and as in ``previous`` between them."""
    return (scores >= high) | (previous.bool() & (scores >= low))


def update_probability(step: int, gamma: float, power: float) -> float:
    r"""How likely the masks are refreshed: :math:`(1 + \gamma t)^{-p}`."""
    return float((1 + gamma * step) ** -power)


def band_factors(height: int, width: int, p: float, q: float) -> Tensor:
    r"""What the threshold of every coefficient is multiplied by, (height, width).

    :math:`g(x) = x^{p-1} (1-x)^{q-1}` at :math:`x_b = (b + 1) / (K + 1)` for band b of K; it never falls for p >= 1 and
    0 < q <= 1, and is 1 for p = q = 1.
    """
    x = (bands(height, width) + 1) / (height + width)
    return x ** (p - 1) * (1 - x) ** (q - 1)


def kept_by_band(coefficients: Tensor) -> list[float]:
    """Share of non-zero coefficients of each band of (M, N, height, width) kernels, from the lowest on."""
    band = bands(*coefficients.shape[-2:])
    kept = (coefficients != 0).float().mean((0, 1)).cpu()
    return [float(kept[band == b].mean()) for b in range(int(band.max()) + 1)]


@torch.no_grad()
def frequency_macs(model: nn.Module, example_input: Any, forward: Any = None) -> dict[str, int]:
    """Multiply-accumulates of one sample with every weight (``dense``), and those that remain where zeros are skipped
    (``sparse``), with the transform of the patches (``transform``: 2 k^3 a channel and position) apart.

    The last two are theoretical: they need a kernel that skips zeros.
    """
    dense = sparse = transform = 0.0
    for name, macs in count_macs(model, example_input, forward).by_module.items():
        module = model.get_submodule(name)
        weights = [p for p in module.parameters(recurse=False) if p.dim() > 1]
        size = sum(p.numel() for p in weights)
        if isinstance(module, DCTConv2d) and module.domain == "frequency":
            macs = round(macs * size / (size + module.in_channels * weights[0][0, 0].numel() ** 2))
        dense += macs
        sparse += macs * (sum(int(p.count_nonzero()) for p in weights) / size if size else 1.0)
        if isinstance(module, DCTConv2d):
            height, width = module.kernel_size
            transform += macs / size * module.in_channels * height * width * (height + width)
    return {"dense": round(dense), "sparse": round(sparse), "transform": round(transform)}


class FrequencyDomainDynamicPruning(WeightOptions, TrainingMethod):
    r"""Frequency-domain dynamic pruning, `Liu et al., NeurIPS 2018 <https://papers.nips.cc/paper_files/paper/2018/hash/a9a6653e48976138166de32772b1bf40-Abstract.html>`_.

    Every k x k kernel W is kept as DCT coefficients :math:`V = B W B^T` with a mask T, and trained as V * T. At step t,
    with probability :math:`(1 + \gamma t)^{-p}`, the mask becomes

    .. math::
        T = \begin{cases} 0 & |v| < a_b \\ T & a_b \le |v| < \theta_b \\ 1 & |v| \ge \theta_b \end{cases},
        \qquad \theta_b = \xi\, g(x_b), \quad a_b = h\,\theta_b

    where :math:`b = u + v` is the frequency band, :math:`x_b = (b + 1) / 2k`, g as in `band_factors` (1 without
    ``band_adaptive``) and :math:`\xi` is solved for so that the wanted share of the layer is above. All of V follows the
    gradient taken at V * T, so what was pruned can come back. From ``freeze`` on the mask, cut to the exact number, stays.

    The result holds `DCTConv2d` layers: sparse coefficients in the file, decoded once for ordinary convolutions, or
    executed in the frequency domain (``execution``). An exported file decodes them. The report has the multiplications
    of both, with the cost of the transform; that they are saved takes a kernel that skips zeros.

    Deviations:
        The thresholds come from the wanted sparsity, solved on the coefficients as they are every ``frequency`` steps,
        where the paper takes mean and deviation of the initial ones times a constant. The form of g is ours.
        Linear layers and 1 x 1 convolutions, where the DCT is the identity, are pruned by the same rule
        (``layers="kernels"`` leaves them alone, as on the paper's CIFAR networks).
    """

    paper: ClassVar[Paper | None] = Paper(
        id="frequency-domain-dynamic-pruning",
        title="Frequency-Domain Dynamic Pruning for Convolutional Neural Networks",
        authors="Zhenhua Liu, Jizheng Xu, Xiulian Peng, Ruiqin Xiong",
        venue="NeurIPS",
        year=2018,
        url="https://papers.nips.cc/paper_files/paper/2018/hash/a9a6653e48976138166de32772b1bf40-Abstract.html",
    )
    contract_fields: ClassVar[dict[str, Any]] = {"epochs": 2, "frequency": 4, "sparsity": 0.8, "learning_rate": 0.01}

    layers: Literal["all", "kernels"] = "all"
    """All convolutional, linear and recurrent layers, or those with kernels larger than 1 x 1 only."""
    transform: Domain = "frequency"
    """Where coefficients are pruned; 'spatial' is the same course on the weights themselves."""
    execution: Domain = "spatial"
    """How the resulting layers compute: decoded once, or on transformed patches."""
    band_adaptive: bool = True
    """A threshold for every frequency band."""
    band_shape: Shape = (1.2, 0.8)
    """(p, q) of g: p >= 1 and 0 < q <= 1; the further from 1, the harder high frequencies are pruned."""
    hysteresis: Annotated[float, Field(gt=0, le=1)] = 0.9
    """h, lower over upper threshold."""
    update: tuple[NonNegativeFloat, NonNegativeFloat] = (1e-4, 1.0)
    """(gamma, p) of the probability of a refresh."""
    ramp: Share = 0.5
    """Share of the run over which the sparsity rises, as a cubic."""
    freeze: Share = 0.75
    """Share of the run from which the mask stays."""
    frequency: PositiveInt = 50
    """Steps between solving for the thresholds."""

    def check(self, session: Session) -> None:
        super().check(session)
        if self.ramp > self.freeze:
            raise ConfigurationError(f"{self.name}: ramp={self.ramp} is after freeze={self.freeze}; swap them")
        if not self.weights(session.model):
            raise ConfigurationError(
                f"{self.name}: {type(session.model).__name__} has no layer to prune; write layers=all or take another method"
            )

    def weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        found = layer_weights(model)
        found |= {
            f"{name}.weight_dct": module.weight_dct
            for name, module in model.named_modules()
            if isinstance(module, DCTConv2d)
        }
        if self.layers == "kernels":
            found = {n: w for n, w in found.items() if w.dim() == 4 and w[0, 0].numel() > 1}
        return without(found, self.skip, f"{self.name}: skip")

    def prepare(self, session: Session) -> None:
        self.transformed(session.model)

    def transformed(self, model: nn.Module) -> nn.Module:
        """The same network, in place, with its kernels in the frequency domain."""
        if self.transform == "frequency":
            layers: dict[int, DCTConv2d] = {}
            for parameter in self.weights(model):
                name = parameter.rpartition(".")[0]
                layer = model.get_submodule(name)
                if type(layer) is nn.Conv2d and layer.weight[0, 0].numel() > 1:
                    replace_module(model, name, layers.setdefault(id(layer), DCTConv2d.of(layer, self.execution)))
        return model

    def factors(self, name: str, weight: Tensor) -> Tensor | float:
        """What the threshold of the named weight is multiplied by, entry by entry."""
        if not (self.band_adaptive and name.endswith(".weight_dct")):
            return 1.0
        height, width = weight.shape[-2:]
        return band_factors(height, width, *self.band_shape).to(weight)

    def scores(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Magnitudes over the factors of the thresholds."""
        return {name: w.detach().abs() / self.factors(name, w) for name, w in weights.items()}

    @torch.no_grad()
    def pruned(self, model: nn.Module, count: int) -> nn.Module:
        model = self.transformed(copy.deepcopy(model))
        weights = self.weights(model)
        sizes = {name: weight.numel() for name, weight in weights.items()}
        kept = {EVERYTHING: count} if self.scope == "global" else share_evenly(sizes, count)
        apply_masks(model, masks_of(self.scores(dict(weights)), kept))
        return model

    def callback(self, session: Session) -> Callback:
        return DynamicMasks(self, session)


class DynamicMasks(MaskedTraining):
    """The run. Between steps the parameters are what is deployed, V * T; the optimizer moves all of V."""

    def __init__(self, method: FrequencyDomainDynamicPruning, session: Session) -> None:
        super().__init__()
        self.method, self.session = method, session
        self.frozen = False
        self.dense: dict[str, Tensor] = {}
        self.thresholds: dict[str, float] = {}
        self.refreshed = 0

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        weights = self.method.weights(trainer.model)
        self.sizes = {name: weight.numel() for name, weight in weights.items()}
        self.kept = self.method.kept(self.session)
        self.scale = {name: self.method.factors(name, weight) for name, weight in weights.items()}
        self.dense = {name: weight.detach().clone() for name, weight in weights.items()}
        self.masks = {name: torch.ones_like(weight) for name, weight in self.dense.items()}
        self.last = min(trainer.total_steps - 1, round(self.method.freeze * trainer.total_steps))

    def start(self, trainer: Trainer) -> None:
        if trainer.epochs == 0:
            self.harden()
            apply_masks(trainer.model, self.masks)

    @torch.no_grad()
    def after_backward(self, trainer: Trainer) -> None:
        if self.frozen:
            super().after_backward(trainer)
            return
        for name, dense in self.dense.items():
            trainer.model.get_parameter(name).copy_(dense)

    @torch.no_grad()
    def after_step(self, trainer: Trainer) -> None:
        if not self.frozen:
            for name, dense in self.dense.items():
                dense.copy_(trainer.model.get_parameter(name))
            if trainer.step >= self.last:
                self.harden()
            elif self._chance(trainer.step) < update_probability(trainer.step, *self.method.update):
                self.refresh(trainer.step, trainer.step / max(1, self.method.ramp * trainer.total_steps))
        apply_masks(trainer.model, self.masks)

    def _chance(self, step: int) -> float:
        generator = torch.Generator().manual_seed(self.session.seed * 1_000_003 + step)
        return float(torch.rand((), generator=generator))

    @torch.no_grad()
    def refresh(self, step: int, progress: float) -> None:
        """Masks by the thresholds, which are solved for anew every so often."""
        scores = {name: dense.abs() / self.scale[name] for name, dense in self.dense.items()}
        if step % self.method.frequency == 0 or not self.thresholds:
            self.thresholds = self._solve(scores, progress)
        for name, score in scores.items():
            high = self.thresholds[name]
            self.masks[name] = hysteresis_mask(score, self.masks[name], self.method.hysteresis * high, high).to(score)
        self.refreshed += 1

    def _solve(self, scores: dict[str, Tensor], progress: float) -> dict[str, float]:
        """The threshold of every layer above which so many lie as are to stay now."""
        together = EVERYTHING in self.kept
        values = {EVERYTHING: torch.cat([s.flatten() for s in scores.values()])} if together else scores
        found = {}
        for name, score in values.items():
            sparsity = scheduled_sparsity(progress, 1 - self.kept[name] / score.numel())
            keep = max(1, round((1 - sparsity) * score.numel()))
            found[name] = float(score.flatten().kthvalue(score.numel() - keep + 1).values)
        return dict.fromkeys(scores, found[EVERYTHING]) if together else found

    def harden(self) -> None:
        """The final masks, with exactly the wanted number of ones."""
        scores = {name: dense.abs() / self.scale[name] for name, dense in self.dense.items()}
        masks = masks_of(scores, self.kept)
        self.masks = {name: mask.to(self.dense[name]) for name, mask in masks.items()}
        self.frozen, self.dense = True, {}

    def finish(self, trainer: Trainer) -> None:
        apply_masks(trainer.model, self.masks)
        trim(self.session, self.method, trainer.model, self.sizes)
        self.session.sparse.update(self.sizes)
        weights = {name: trainer.model.get_parameter(name).detach() for name in self.sizes}
        transformed = {name: w for name, w in weights.items() if name.endswith(".weight_dct")}
        self.session.report(
            kept={name: [int(w.count_nonzero()), w.numel()] for name, w in weights.items()},
            kept_by_band={name: kept_by_band(w) for name, w in transformed.items()},
            macs=frequency_macs(trainer.model, self.session.example_input, self.session.task.outputs),
            refreshed=self.refreshed,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "masks": self.masks,
            "dense": self.dense,
            "thresholds": self.thresholds,
            "frozen": self.frozen,
            "refreshed": self.refreshed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.session.device
        self.frozen, self.thresholds, self.refreshed = state["frozen"], state["thresholds"], state["refreshed"]
        self.masks = {name: mask.to(device) for name, mask in state["masks"].items()}
        self.dense = {name: value.to(device) for name, value in state["dense"].items()}
