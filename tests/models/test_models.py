from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import efficientdnns.models as models
from efficientdnns.errors import EfficientDNNsError, ModelError
from efficientdnns.models.cifar_resnet import PadShortcut
from efficientdnns.surgery.structure import apply_difference, difference
from efficientdnns.task import Task

INPUTS = {"28": (2, 1, 28, 28), "32": (2, 3, 32, 32), "text": (2, 9)}
SHAPE = {
    "lenet-300-100": "28",
    "lenet5": "28",
    "lenet5-caffe": "28",
    "lenet5-32": "28",
    "mlp": "28",
    "small-resnet": "28",
    "small-vgg": "28",
    "fitnet-mnist": "28",
    "char-lstm": "text",
    "transformer": "text",
}
PARAMETERS = {
    "lenet-300-100": 266_610,
    "lenet5": 431_080,
    "lenet5-caffe": 431_080,
    "lenet5-32": 61_706,
    "cifar-resnet20": 269_722,
    "cifar-resnet32": 464_154,
    "cifar-resnet44": 658_586,
    "cifar-resnet56": 853_018,
    "cifar-resnet110": 1_727_962,
    "fitnet-mnist": 21_426,
    "wrn-16-1": 175_066,
}
LARGE = {"wrn-28-10", "wrn-40-10", "wrn-22-4", "wrn-16-4", "wrn-28-2", "wrn-40-2"}
LARGE |= {name for name in models.names() if name.startswith("transformer-")}


@pytest.mark.parametrize("name", sorted(set(models.names()) - LARGE))
def test_built_in_networks_run_with_another_number_of_classes(name: str) -> None:
    model = models.build(name, num_classes=7).eval()
    shape = INPUTS[SHAPE.get(name, "32")]
    x = torch.randint(0, 7, shape) if SHAPE.get(name) == "text" else torch.randn(shape)
    with torch.no_grad():
        assert model(x).shape == ((2, 9, 7) if SHAPE.get(name) == "text" else (2, 7))
    assert model.factory == {"spec": name, "options": {"vocabulary" if SHAPE.get(name) == "text" else "num_classes": 7}}


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_parameters_are_the_papers(name: str, parameters: int) -> None:
    assert sum(p.numel() for p in models.build(name).parameters()) == parameters
    assert f"{parameters:,} parameters" in models.describe(name)


def test_caffe_lenet_has_no_relu_after_the_convolutions() -> None:
    torch.manual_seed(0)
    caffe = models.build("lenet5-caffe")
    other = models.build("lenet5")
    other.load_state_dict(caffe.state_dict())
    x = torch.randn(4, 1, 28, 28)
    p = dict(caffe.named_parameters())
    x1 = F.max_pool2d(F.conv2d(x, p["conv1.weight"], p["conv1.bias"]), 2)
    x2 = F.max_pool2d(F.conv2d(x1, p["conv2.weight"], p["conv2.bias"]), 2).flatten(1)
    expected = F.linear(F.relu(F.linear(x2, p["fc1.weight"], p["fc1.bias"])), p["fc2.weight"], p["fc2.bias"])
    assert torch.allclose(caffe(x), expected, atol=1e-6)
    assert not torch.allclose(other(x), expected, atol=1e-3)


def test_option_a_shortcut_is_slicing_and_padding() -> None:
    model = models.build("cifar-resnet20")
    shortcut = model.get_submodule("layer2.0.shortcut")
    assert isinstance(shortcut, PadShortcut)
    x = torch.randn(2, 16, 8, 8)
    expected = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
    assert torch.equal(shortcut(x), expected)
    again = PadShortcut(**shortcut.config())
    assert torch.equal(again(x), expected)
    assert not shortcut.state_dict()
    changed = models.build("cifar-resnet20")
    changed.set_submodule("layer2.0.shortcut", PadShortcut([16, 3, 3] + [16] * 29))
    rebuilt = apply_difference(models.build("cifar-resnet20"), difference(changed, models.build("cifar-resnet20")))
    assert rebuilt.get_submodule("layer2.0.shortcut").config() == {"index": [16, 3, 3] + [16] * 29, "stride": 2}  # type: ignore[operator]
    assert list(models.build("cifar-resnet20").state_dict()) == list(model.state_dict())


def test_resnet_options() -> None:
    b = models.build("cifar-resnet20", shortcut="B", width=0.5, num_classes=3)
    assert tuple(b.get_parameter("layer3.0.shortcut.0.weight").shape) == (32, 16, 1, 1)
    assert b(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    with pytest.raises(ModelError, match="shortcut is 'C', expected 'A'"):
        models.build("cifar-resnet20", shortcut="C")


def test_mlp_options() -> None:
    torch.manual_seed(0)
    model = models.build(
        "mlp", in_features=6, hidden=(8, 4), num_classes=3, init="orthogonal", activation="tanh", dropout=0.1
    )
    widths = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]
    assert widths == [(6, 8), (8, 4), (4, 3)]
    weight = next(m.weight for m in model.modules() if isinstance(m, nn.Linear))
    assert torch.allclose(weight.T @ weight, torch.eye(6), atol=1e-5)
    assert sum(isinstance(m, nn.Dropout) for m in model.modules()) == 2
    assert model.factory["options"]["hidden"] == [8, 4]  # type: ignore[index]
    deep = models.build("mlp", in_features=4, depth=30, width=5)
    assert sum(isinstance(m, nn.Linear) for m in deep.modules()) == 31
    with pytest.raises(ModelError, match="dropout has 2 rates, expected 3"):
        models.build("mlp", dropout=[0.2, 0.5])


def test_names_as_functions() -> None:
    model = models.lenet_300_100(num_classes=4)
    assert model.factory == {"spec": "lenet-300-100", "options": {"num_classes": 4}}
    with pytest.raises(AttributeError):
        _ = models.lenet_6


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lenet6", r"no model is named 'lenet6' \(did you mean 'lenet5'"),
        ("torchvision:resnet19", r"torchvision has no model 'resnet19' \(did you mean"),
        ("timm:resnet19x", "timm has no model 'resnet19x'"),
        ("nothing_here:make", "'nothing_here' cannot be imported: ModuleNotFoundError"),
        ("absent.py:make", "absent.py does not exist"),
        ("net.py", "name the function or class in it, e.g. net.py:make_model"),
        (".", r"holds no saved result \(structure.json\)"),
    ],
)
def test_what_cannot_be_built(spec: str, message: str) -> None:
    if spec.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(ModelError, match=message) as caught:
        models.build(spec)
    assert "\n" not in str(caught.value)


def test_unknown_and_wrong_options() -> None:
    with pytest.raises(ModelError, match=r"model 'wide-resnet' has no option 'dept' \(did you mean 'depth'"):
        models.build("wide-resnet", dept=16)
    with pytest.raises(ModelError, match="depth is 11, expected 6n"):
        models.build("wide-resnet", depth=11)
    with pytest.raises(ModelError, match="model 'lenet5' cannot be built with"):
        models.build("lenet5", num_classes="many")  # type: ignore[arg-type]


NETWORK = """
from dataclasses import dataclass
from torch import nn
from my_sizes import WIDTH

@dataclass
class Sizes:
    width: int = WIDTH

class Net(nn.Sequential):
    def __init__(self, width=Sizes().width, num_classes=3):
        super().__init__(nn.Flatten(), nn.Linear(4, width), nn.ReLU(), nn.Linear(width, num_classes))

def fixed():
    return Net()

def fails():
    raise RuntimeError("out of luck\\nand more")
"""


def test_a_network_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_sizes.py").write_text("WIDTH = 6\n")
    (tmp_path / "my-net.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    path_before = list(sys.path)
    model = models.build("my-net.py:Net", num_classes=5, width=7)
    assert model(torch.rand(2, 4)).shape == (2, 5)
    assert model.factory == {
        "spec": "my-net.py:Net",
        "options": {"num_classes": 5, "width": 7},
        "path": str(tmp_path.resolve() / "my-net.py"),
    }
    assert type(models.build("my-net.py:Net")) is type(model), "a file is imported once"
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir("/")
        again = models.rebuild(model.factory)  # type: ignore[arg-type]
    again.load_state_dict(model.state_dict())
    assert models.build("my-net.py:fixed", num_classes=5)(torch.rand(2, 4)).shape == (2, 3)
    assert sys.path == path_before
    assert "my-net" not in sys.modules
    with pytest.raises(ModelError, match=r"failed: RuntimeError: out of luck \(my-net.py, line 18\)$"):
        models.build("my-net.py:fails")
    (tmp_path / "wrong.py").write_text("def f(:\n")
    with pytest.raises(ModelError, match="cannot be imported: SyntaxError"):
        models.build("wrong.py:f")
    assert not [name for name in sys.modules if "user_wrong" in name]


def test_torchvision_and_timm() -> None:
    pytest.importorskip("torchvision")
    model = models.build("torchvision:squeezenet1_1", num_classes=4)
    assert model.factory == {"spec": "torchvision:squeezenet1_1", "options": {"num_classes": 4}}
    with pytest.raises(ModelError, match="torchvision:squeezenet1_1 cannot be built"):
        models.build("torchvision:squeezenet1_1", colour="red")
    pytest.importorskip("timm")
    model = models.build("timm:test_vit", num_classes=4, act_layer=nn.ReLU)
    assert not hasattr(model, "factory"), "a class is no data, so nothing is recorded"


def test_weights_from_safetensors_and_checkpoints(tmp_path: Path) -> None:
    source = models.build("small-resnet")
    state = source.state_dict()
    save_file({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "a.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "b.pt")
    torch.save(state, tmp_path / "c.pt")
    for file in ("a.safetensors", "b.pt", "c.pt"):
        model = models.build("small-resnet", weights=tmp_path / file)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if "num_batches" not in k)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    model = models.build("lenet-300-100")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = dict(models.build("lenet-300-100", num_classes=7).state_dict())
    del state["fc1.bias"]
    state |= {f"extra{i}": torch.zeros(1) for i in range(5)}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ModelError) as caught:
        models.load_weights_into(model, tmp_path / "a.safetensors")
    text = str(caught.value)
    assert "1 missing (fc1.bias)" in text
    assert "5 unexpected (extra0, extra1, extra2, ...)" in text
    assert "2 of another shape (fc3.weight (7, 100) instead of (10, 100), fc3.bias" in text
    assert "\n" not in text
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("unpickled",)


def test_checkpoints_execute_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(2, 2)
    torch.save({"state_dict": Evil()}, "evil.pt")
    Path("evil.pkl").write_bytes(pickle.dumps(Evil()))
    Path("text.pt").write_text("hello")
    torch.save([1, 2], "list.pt")
    for file in ("evil.pt", "evil.pkl", "text.pt", "list.pt", "missing.pt"):
        with pytest.raises(ModelError) as caught:
            models.load_weights_into(model, file)
        assert "\n" not in str(caught.value)
    assert not Path("unpickled").exists()
    Path("bad.safetensors").write_text("hello")
    with pytest.raises(EfficientDNNsError):
        models.load_weights_into(model, "bad.safetensors")


def test_check_fits() -> None:
    task = Task.from_tensors((torch.rand(20, 1, 28, 28), torch.arange(20) % 10))
    model = models.build("lenet5").train()
    models.check_fits(model, task)
    assert model.training
    hundred = task.with_(num_classes=100)
    with pytest.raises(ModelError, match=r"gives 10 outputs but task 'custom' has 100 classes; .* num_classes=100"):
        models.check_fits(model, hundred)
    few = Task.from_tensors((torch.rand(20, 1, 28, 28), torch.arange(20) % 4))
    models.check_fits(models.build("lenet5", num_classes=12), few)
    assert few.num_classes == 12
    models.check_fits(model, few)
    assert few.num_classes == 10
    with pytest.raises(ModelError, match="gives 3 outputs but task 'custom' has 4 classes"):
        models.check_fits(models.build("lenet5", num_classes=3), few)
    with pytest.raises(ModelError, match=r"cannot take inputs of shape \(1, 1, 28, 28\) from task 'custom'") as caught:
        models.check_fits(models.build("cifar-resnet20"), task)
    assert "\n" not in str(caught.value)
    with pytest.raises(EfficientDNNsError, match="returns a tuple, expected a tensor of logits"):
        models.check_fits(nn.Sequential(nn.Flatten(), nn.Linear(784, 10), Pair()), task)


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return x, 1


@pytest.mark.long
def test_the_public_cifar_weights_score_what_they_should(data_folder: Path) -> None:
    weights = data_folder.parent / "models" / "cifar-resnet20.safetensors"
    if not weights.is_file():
        pytest.skip("the public weights are not beside the data")
    model = models.build("cifar-resnet20", weights=weights)
    value = Task.from_name("cifar10", limit=10).evaluate(model, batch_size=250)
    assert (value.value, value.n) == (pytest.approx(91.73), 10_000)
