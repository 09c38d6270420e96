import pytest
import torch
import torch.nn.functional as F
from torch import nn

from efficientdnns.parts.observer import MinMax, MovingAverage
from efficientdnns.parts.quantizer import QuantSpec
from efficientdnns.quantization.fake_quantization import FakeQuantizedLayer, convert, places, prepare, quantizers

WEIGHTS, ACTIVATIONS = QuantSpec(8, symmetric=True, axis=0), QuantSpec(8)


class Residual(nn.Module):
    """Functional activations and additions, a fork, a norm that cannot be folded, a layer used twice."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, 1)
        self.twice = nn.Conv2d(8, 8, 1)
        self.bn3 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        y = self.bn2(self.conv2(x))
        y = F.relu6(y)
        x = torch.cat([x[:, :4], y[:, 4:]], 1) + y
        x = self.twice(F.relu(self.twice(x)))
        x = self.bn3(F.relu(x) + 1)
        x = self.conv3(x)
        x = x.sigmoid() * x
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Residual()
    with torch.no_grad():
        for norm in (model.bn1, model.bn2, model.bn3):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.weight.normal_()
            norm.bias.normal_()
        model.bn2.weight[3] = 0
    return model.eval()


@pytest.fixture
def inputs():
    return torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_places(model, inputs):
    plan, left = places(model, inputs[:1])
    found = {p.name: (p.norm, p.activation, p.source, p.is_output) for p in plan}
    assert found == {
        "conv1": ("bn1", "relu", None, False),
        "conv2": ("bn2", "relu6", "conv1", False),
        "conv3": (None, "none", None, False),
        "head": (None, "none", None, True),
    }
    assert left == ["twice"]
    plan, left = places(model, inputs[:1], ("conv1", "he*"))
    assert [p.name for p in plan] == ["conv2", "conv3"]
    assert plan[0].source is None
    assert set(left) == {"twice", "conv1", "head"}


def test_tied_weights_stay_real(inputs):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    plan, left = places(model, torch.zeros(1, 4))
    assert [p.name for p in plan] == ["3"]
    assert left == ["0", "2"]


def test_unquantized_preparation_only_rounds_the_weights(model, inputs):
    expected = model(inputs)
    plan, _ = places(model, inputs[:1])
    prepare(model, plan, QuantSpec(16, symmetric=True, axis=0), ACTIVATIONS, MinMax)
    assert isinstance(model.bn1, nn.Identity)
    assert torch.allclose(model(inputs), expected, atol=2e-3)


def test_parameters_keep_their_names(model, inputs):
    plan, _ = places(model, inputs[:1])
    before = {name: p for name, p in model.named_parameters() if not name.startswith("bn")}
    prepare(model, plan, WEIGHTS, ACTIVATIONS, MinMax)
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    assert "conv1.norm.weight" in after


def test_conversion_computes_what_was_imitated(model, inputs):
    real = model(inputs)
    plan, _ = places(model, inputs[:1])
    layers = prepare(model, plan, WEIGHTS, ACTIVATIONS, MinMax)
    for quantizer in quantizers(layers):
        quantizer.calibrating = True
    model(inputs)
    for quantizer in quantizers(layers):
        quantizer.calibrating, quantizer.quantizing = False, True
    with torch.no_grad():
        imitated = model(inputs)
        convert(model, plan, layers)
        integer = model(inputs)
    spread = real.std()
    assert (imitated - real).std() < 0.05 * spread
    assert (integer - imitated).std() < 0.01 * spread
    assert (integer - imitated).abs().max() < 0.1 * spread


def test_batch_norm_trains_and_the_fold_uses_running_statistics(inputs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 2)
    plain = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)]
    for a, b in zip(plain, model):
        a.load_state_dict(b.state_dict())
    plan, _ = places(model, inputs[:1])
    layer = prepare(model.train(), plan, QuantSpec(16, symmetric=True, axis=0), ACTIVATIONS, MovingAverage)["0"]
    assert torch.allclose(model(inputs), plain[1](plain[0](inputs)).relu(), atol=1e-3)
    assert torch.allclose(layer.norm.running_mean, plain[1].running_mean, atol=1e-4)
    model(inputs).square().sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    weight, bias = layer.eval().folded()
    assert torch.allclose(F.conv2d(inputs, weight, bias), plain[1].eval()(plain[0](inputs)), atol=0.3)
    assert torch.allclose(F.conv2d(inputs, weight, bias).relu(), model.eval()(inputs), atol=1e-3)


def test_gradients_do_not_pass_where_the_range_is_exceeded():
    layer = FakeQuantizedLayer(nn.Linear(2, 1), None, "none", WEIGHTS, None, None)
    from efficientdnns.quantization.fake_quantization import ActivationQuantizer

    quantizer = ActivationQuantizer(ACTIVATIONS, MinMax()).eval()
    quantizer.observer(torch.tensor([-1.0, 1.0]))
    quantizer.quantizing = True
    x = torch.tensor([[0.5, 3.0]], requires_grad=True)
    layer(quantizer(x)).sum().backward()
    assert x.grad[0, 0] != 0
    assert x.grad[0, 1] == 0
