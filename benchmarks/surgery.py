"""Half of the channels of every group removed at random, network by network: ours beside torch-pruning.

    python benchmarks/surgery.py [--models 'timm/*'] [--timeout 60] [--memory 8] [--markdown] [--json FILE]

Networks have random weights; batch norms get the statistics of random images and every parameter that starts out constant
is made random, so that each channel matters. Every network and tool runs in a process of its own on one thread,
with a time limit (from the built network to the smaller one that has run) and a memory limit; seconds are those the
process computed, so that other work on the machine does not count. Verdicts:

exact         float64 outputs equal, up to 1e-9 of their size, those of the full network with the contributions of the
              removed channels zeroed (a channel that leaves a layer norm leaves its statistics)
runs          the smaller network runs; the comparison is not possible
wrong         it runs and computes something else, or its output has another shape
fails         the tool, or the network it leaves behind, raises
does not end  the time limit passed
out of memory the memory limit passed

torch-pruning is used out of the box (``BasePruner``, random importance, half of the channels, the layers that make the
network's outputs left alone); ``pip install torch-pruning==1.6.1 --no-deps``. "Removable" is the share of the elements of
all matrices and filters that lie in a row or column that ours can remove, "memory" the peak beside the network itself, in
multiples of its size (activations included, which is what counts in small networks).
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from table import show
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

import efficientdnns as ed
from efficientdnns.errors import SurgeryError
from efficientdnns.measurement import count_macs
from efficientdnns.surgery import ChannelGraph, remove, zero_contributions
from efficientdnns.surgery.precision import computing_in
from efficientdnns.surgery.reference import reference_outputs

TIMM = """vit_tiny_patch16_224 deit_tiny_distilled_patch16_224 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256
convnext_atto convnextv2_atto efficientnet_b0 mobilenetv3_small_050 mobilenetv4_conv_small_035
mobilenetv4_hybrid_medium regnetx_002 resnest14d densenet121 maxvit_rmlp_pico_rw_256 mixer_s32_224 poolformer_s12
cait_xxs24_224 xcit_nano_12_p16_224 levit_128s coatnet_pico_rw_224 edgenext_xx_small ghostnet_050 repvgg_a0
hrnet_w18_small dpn48b res2net50_26w_4s legacy_seresnet18 volo_d1_224 beit_base_patch16_224 efficientvit_b0
efficientvit_m0 fastvit_t8 tiny_vit_5m_224 mobilevit_xxs mobilevitv2_050 pvt_v2_b0 twins_svt_small crossvit_tiny_240
resmlp_12_224 gmlp_ti16_224 nfnet_l0 resnetv2_50 cspresnet50 ese_vovnet19b_dw selecsls42 tnt_s_patch16_224
convmixer_768_32 xception41 dla34 skresnet18 lcnet_035 rexnet_100 nest_tiny pit_ti_224 visformer_tiny davit_tiny
inception_next_atto caformer_s18 repvit_m0_9 hiera_tiny_224 eva02_tiny_patch14_224 mambaout_femto focalnet_tiny_srf
gcvit_xxtiny sequencer2d_s mvitv2_tiny coat_tiny botnet26t_256 inception_resnet_v2 efficientformer_l1 rdnet_tiny"""
"""Architectures of timm, the smallest member of each family."""

SEGMENTATION = ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
DETECTION = ("fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large", "retinanet_resnet50_fpn")
HEADS = r"cls_logits|bbox_pred|cls_score|bbox_reg|classification_head.*\.\d+\.1$|regression_head.*\.\d+\.1$"
"""Layers of the detectors that make outputs."""


def architectures(limit: float) -> list[str]:
    """Names of everything that is measured; torchvision's up to ``limit`` parameters."""
    from torchvision import models

    sizes = {name: models.get_model_weights(name).DEFAULT.meta["num_params"] for name in models.list_models(models)}
    own = ["cifar/cifar-resnet20", "cifar/cifar-resnet56"]
    vision = [f"torchvision/{name}" for name, size in sizes.items() if size <= limit]
    tasks = [*(f"segmentation/{n}" for n in SEGMENTATION), *(f"detection/{n}" for n in DETECTION)]
    return [*own, *vision, *(f"timm/{n}" for n in TIMM.split()), *tasks]


def build(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """The network with random weights, and its input at the resolution it was made for."""
    family, _, kind = name.partition("/")
    torch.manual_seed(0)
    size: tuple[int, ...] = (3, 224, 224)
    if family == "cifar":
        model, size = ed.models.build(kind), (3, 32, 32)
    elif family == "timm":
        import timm

        model = timm.create_model(kind)
        size = model.default_cfg["input_size"]
    else:
        from torchvision import models

        options: dict[str, Any] = {"weights_backbone": None} if family != "torchvision" else {}
        if kind in ("googlenet", "inception_v3"):
            options["init_weights"] = False  # SciPy's truncated normal takes minutes
            size = (3, 299, 299) if kind == "inception_v3" else size
        if kind.startswith("retinanet"):  # it would enlarge the images to 800 pixels, and see nothing in random ones
            options |= {"min_size": 320, "max_size": 320, "score_thresh": 0.0}
        elif kind.startswith("fasterrcnn"):
            options["box_score_thresh"] = 0.0
        model = models.get_model(kind, weights=None, **options)
        if family == "detection":
            return model.eval(), ([torch.rand(3, 320, 320), torch.rand(3, 320, 320)],)
    return model.eval(), (torch.randn(1, *size),)


def enliven(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Make every channel matter: constant parameters become random, batch norms see a batch."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
        batch = tree_map(lambda x: torch.randn(2, *x.shape[1:], generator=generator) if x.dim() == 4 else x, inputs)
        if norms:
            model(*batch)
        model.eval()


class Limits(threading.Thread):
    """Follows the memory of this process and ends it, with a verdict, when it takes too much memory or time."""

    def __init__(self, seconds: float, memory: float) -> None:
        super().__init__(daemon=True)
        self.process = psutil.Process()
        self.baseline = self.peak = self.process.memory_info().rss
        self.seconds, self.memory, self.started, self.over = seconds, memory, time.process_time(), False
        self.known: dict[str, Any] = {}

    def run(self) -> None:
        while not self.over:
            self.peak = max(self.peak, self.process.memory_info().rss)
            if self.peak > self.memory * 2**30:
                self.end("out of memory")
            elif time.process_time() - self.started > self.seconds:
                self.end("does not end")
            time.sleep(0.005)

    def end(self, verdict: str) -> None:
        if not self.over:
            print(json.dumps(self.known | {"verdict": verdict} | self.cost()), flush=True)
            os._exit(0)

    def cost(self) -> dict[str, float]:
        return {"seconds": time.process_time() - self.started, "bytes": self.peak - self.baseline}


def outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    with torch.no_grad():
        return [x for x in tree_leaves(model(*inputs)) if isinstance(x, Tensor)]


def compare(
    reference: Callable[[Any], list[Tensor]], smaller: nn.Module, model: nn.Module, inputs: tuple[Any, ...]
) -> dict[str, Any]:
    """Verdict on the smaller network, in float64, from the full network with zeroed contributions and as it was."""
    wide = tree_map(lambda x: x.double() if x.is_floating_point() else x, inputs)
    try:
        with computing_in(torch.float64):
            expected, got = reference(wide), outputs(smaller, wide)
    except RuntimeError as error:  # constants in the code
        return {"verdict": "runs", "reason": f"not in float64: {one_line(error)}"}
    if [t.shape for t in expected] != [t.shape for t in got]:
        return {"verdict": "wrong", "reason": "the outputs have another shape"}
    if not all(bool(t.isfinite().all()) for t in [*expected, *got]):
        return {"verdict": "runs", "reason": "outputs are not finite"}
    size = max((float(t.abs().max()) for t in expected if t.numel()), default=0.0)
    gap = max((float((a - b).abs().max()) for a, b in zip(expected, got) if a.numel()), default=0.0) / max(size, 1e-30)
    with computing_in(torch.float64):
        full = outputs(model, wide)
    same = [t.shape for t in full] == [t.shape for t in expected] and all(map(torch.equal, full, expected))
    if size == 0 or same:
        return {"verdict": "runs", "reason": "the removed channels do not matter for the outputs"}
    return {"verdict": "exact" if gap < 1e-9 else "wrong", "difference": gap}


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def removable(model: nn.Module, graph: ChannelGraph) -> float:
    """Share of the elements of all matrices and filters that lie in a row or column of some group."""
    tensors = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    lines = {(n, d): torch.zeros(size) for n, p in tensors.items() for d, size in enumerate(p.shape)}
    for member in (m for group in graph.groups for m in group.members if m.tensor in tensors):
        lines[member.tensor, member.dim][member.index.reshape(-1)] = 1
    covered = total = 0.0
    for name, parameter in tensors.items():
        kept = 1.0
        for dim in range(parameter.dim()):
            kept *= 1 - float(lines[name, dim].mean())
        total += parameter.numel()
        covered += parameter.numel() * (1 - kept)
    return covered / max(total, 1)


def ours(name: str, limits: Limits, model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Any]:
    graph = ChannelGraph.trace(model, inputs)
    limits.known |= {"analysis": time.process_time() - limits.started, "analysis_bytes": limits.cost()["bytes"]}
    reasons = Counter(f"{k.operation} {k.reason}" for k in graph.kept_whole for _ in k.layers)
    limits.known |= {"removable": removable(model, graph), "kept_whole": dict(reasons.most_common())}
    generator = torch.Generator().manual_seed(0)
    chosen = {g.name: torch.randperm(g.size, generator=generator)[: g.size // 2] for g in graph.groups if g.size > 1}
    if not chosen:
        return {"verdict": "fails", "reason": "nothing can be removed"}
    try:
        smaller = remove(model, inputs, chosen, graph)
    except SurgeryError as error:
        return {"verdict": "fails", "reason": one_line(error)}
    limits.over = True
    cost = limits.cost()
    sizes = {"macs": macs(smaller, inputs) / macs(model, inputs), "params": count(smaller) / count(model)}
    if graph.exported is None:
        full = zero_contributions(model, chosen, graph).double()
        return cost | sizes | compare(lambda wide: outputs(full, wide), smaller, model, inputs)
    return cost | sizes | compare(lambda wide: reference_outputs(model, chosen, graph, wide), smaller, model, inputs)


def torch_pruning(name: str, limits: Limits, model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Any]:
    before = macs(model, inputs), count(model)
    try:
        halve(model, inputs)
        outputs(model, inputs)
    except Exception as error:  # whatever it raises is the result
        return {"verdict": "fails", "reason": one_line(error)}
    limits.over = True
    found = limits.cost() | {"macs": macs(model, inputs) / before[0], "params": count(model) / before[1]}
    print(json.dumps(limits.known | found | {"verdict": "runs", "reason": "the comparison failed"}), flush=True)
    del model
    torch.set_default_dtype(torch.float64)  # then every weight is unique, and positions can be found again
    original, inputs = build(name)
    enliven(original, inputs)
    full, smaller = copy.deepcopy(original), copy.deepcopy(original)
    halve(smaller, inputs)
    cause = zeroed(full, smaller)
    if cause is not None:
        return found | {"verdict": "runs", "reason": f"what was removed cannot be told at {cause}"}
    return found | compare(lambda wide: outputs(full.double(), wide), smaller, original, inputs)


def halve(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """torch-pruning out of the box, in place."""
    import torch_pruning as tp

    ignored = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            size = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            if size in (1000, 21) or re.search(HEADS, name) or name in ("fc", "linear"):
                ignored.append(module)
    torch.manual_seed(0)
    importance = tp.importance.RandomImportance()
    example: Any = inputs[0] if isinstance(inputs[0], Tensor) else list(inputs)
    tp.pruner.BasePruner(model, example, importance, pruning_ratio=0.5, ignored_layers=ignored).step()


def zeroed(full: nn.Module, smaller: nn.Module) -> str | None:
    """Zero, in place, what in ``full`` reads input channels that ``smaller`` does not have; return the layer where that
    cannot be known."""
    layers = dict(smaller.named_modules())
    for path, module in full.named_modules():
        weight, less = getattr(module, "weight", None), getattr(layers[path], "weight", None)
        if not isinstance(weight, Tensor) or less is None or weight.shape == less.shape:
            continue
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and not getattr(module, "transposed", False):
            table = weight.detach().flatten(2) if weight.dim() > 2 else weight.detach()[..., None]
            own = less.detach().reshape(*less.shape[:2], -1)
            order = table.flatten().argsort()
            rows = positions(table.flatten(), order, own[:, 0, 0]) // table[0].numel()
            columns = positions(table.flatten(), order, own[0, :, 0]) // table.shape[2] % table.shape[1]
            if not torch.equal(table[rows][:, columns], own):
                return path
            gone = torch.ones(table.shape[1], dtype=torch.bool)
            gone[columns] = False
            weight.data[:, gone] = 0
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine and weight.dim() == 1:
            module.forward = among(module, positions(weight.detach(), weight.detach().argsort(), less.detach()))
        elif not isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.PReLU)):
            return path
    return None


def positions(values: Tensor, order: Tensor, wanted: Tensor) -> Tensor:
    """Where in ``values`` (sorted by ``order``) each of ``wanted`` stands."""
    return order[torch.searchsorted(values[order], wanted).clamp(max=len(values) - 1)]


def among(norm: nn.LayerNorm, kept: Tensor) -> Callable[[Tensor], Tensor]:
    """A layer norm whose statistics are taken over the kept channels."""
    first = "2d" in type(norm).__name__.lower()  # channels come first, as in torchvision's and timm's LayerNorm2d

    def forward(x: Tensor) -> Tensor:
        x = x.movedim(1, -1) if first else x
        y = torch.zeros_like(x)
        y[..., kept] = F.layer_norm(x[..., kept], (len(kept),), norm.weight[kept], norm.bias[kept], norm.eps)
        return y.movedim(-1, 1) if first else y

    return forward


def macs(model: nn.Module, inputs: tuple[Any, ...]) -> float:
    return count_macs(model, inputs, samples=1).total


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


TOOLS = {"ours": ours, "torch-pruning": torch_pruning}


def work(name: str, tool: str, seconds: float, memory: float) -> None:
    """Measure one network with one tool in this process and print the result as JSON lines; the last one counts."""
    torch.set_num_threads(1)
    model, inputs = build(name)
    enliven(model, inputs)
    if tool == "torch-pruning":
        import torch_pruning  # noqa: F401  (what a tool imports is not counted)
    torch.export.export(nn.Linear(1, 1), (torch.ones(1, 1),))  # nor what the first export imports
    outputs(model, inputs)
    limits = Limits(seconds, memory)
    size = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    limits.known = {"architecture": name, "tool": tool, "model_bytes": size, "parameters": count(model)}
    limits.start()
    try:
        found = TOOLS[tool](name, limits, model, inputs)
    except Exception as error:  # one network must not end the table
        found = {"verdict": "fails", "reason": one_line(error)}
    limits.over = True
    print(json.dumps(limits.known | limits.cost() | found), flush=True)


def measure(name: str, tool: str, options: argparse.Namespace) -> dict[str, Any]:
    """One network and tool in a process of its own."""
    limits = [str(options.timeout), str(options.memory)]
    command = [sys.executable, "-W", "ignore", __file__, "--worker", name, tool, *limits]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=4 * options.timeout + 120, env=environment
        )
        written, error = done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        written, error = (late.stdout or b"").decode(), ""
    found = [json.loads(text) for text in written.splitlines() if text.startswith("{")]
    if found:
        return found[-1]
    last = next(iter(error.strip().splitlines()[-1:]), "")
    return {"architecture": name, "tool": tool, "verdict": "fails" if last else "does not end", "reason": last}


def cells(result: dict[str, Any]) -> list[str]:
    """Verdict, seconds and memory of one tool."""
    if not result:
        return ["-", "-", "-"]
    verdict = result["verdict"] + (f" ({result['difference']:.0e})" if "difference" in result else "")
    memory = f"{result['bytes'] / result['model_bytes']:.1f}x" if result.get("model_bytes") else "-"
    return [verdict, f"{result['seconds']:.1f}" if "seconds" in result else "-", memory]


def row(name: str, by_tool: dict[str, dict[str, Any]]) -> list[str]:
    mine = by_tool.get("ours", {})
    shares = [f"{mine[key]:.2f}" if key in mine else "-" for key in ("removable", "macs")]
    verdict, seconds, memory = cells(mine)
    analysis = f"{mine['analysis']:.1f}" if "analysis" in mine else "-"
    size = f"{mine['parameters'] / 1e6:.1f}" if "parameters" in mine else "-"
    return [name, size, verdict, analysis, seconds, memory, *shares, *cells(by_tool.get("torch-pruning", {}))]


TITLES = ["network", "M params", "ours", "analysis s", "total s", "memory", "removable", "MACs left"]
TITLES += ["torch-pruning", "s", "memory"]


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="*", help="name pattern, e.g. 'timm/*' or '*resnet*'; several with commas")
    parser.add_argument(
        "--limit", type=float, default=400e6, help="leave out torchvision networks with more parameters"
    )
    parser.add_argument("--timeout", type=float, default=60, help="seconds per network and tool")
    parser.add_argument("--memory", type=float, default=8, help="GB per network and tool")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", type=Path, help="write every result to this file, one JSON object a line")
    parser.add_argument("--skip-torch-pruning", action="store_true")
    parser.add_argument("--skip-ours", action="store_true")
    parser.add_argument("--reuse", action="store_true", help="measure only what the --json file does not hold yet")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def main() -> None:
    options = arguments()
    if options.worker:
        name, tool, seconds, memory = options.worker
        return work(name, tool, float(seconds), float(memory))
    skipped = {"ours": options.skip_ours, "torch-pruning": options.skip_torch_pruning}
    tools = [tool for tool in TOOLS if not skipped[tool]]
    if "torch-pruning" in tools and importlib.util.find_spec("torch_pruning") is None:
        sys.exit("torch-pruning is missing: pip install torch-pruning==1.6.1 --no-deps, or --skip-torch-pruning")
    patterns = options.models.split(",")
    names = [n for n in architectures(options.limit) if any(fnmatch.fnmatch(n, p) for p in patterns)]
    known: dict[tuple[str, str], dict[str, Any]] = {}
    if options.json and options.reuse and options.json.exists():
        results = [json.loads(text) for text in options.json.read_text().splitlines()]
        known = {(result["architecture"], result["tool"]): result for result in results}
    elif options.json and options.json.exists():  # what is known of networks that are not measured now stays
        lines = options.json.read_text().splitlines(keepends=True)
        options.json.write_text("".join(line for line in lines if json.loads(line)["architecture"] not in names))

    def one(name: str) -> list[str]:
        for tool in tools:
            if (name, tool) not in known:
                result = known[name, tool] = measure(name, tool, options)
                if options.json:
                    with options.json.open("a") as file:
                        file.write(json.dumps(result) + "\n")
        found = row(name, {tool: known[name, tool] for tool in TOOLS if (name, tool) in known})
        print("  ".join(found), file=sys.stderr, flush=True)
        return found

    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(one, names))
    show(TITLES, rows, options.markdown)


if __name__ == "__main__":
    main()
