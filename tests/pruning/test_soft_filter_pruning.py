"""Soft filter pruning: which filters, softness, and a small network that computes the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.pruning.soft_filter_pruning import SoftPruning, filter_norms, pruned_flops
from efficientdnns.session import Session


@pytest.mark.parametrize(
    ("blocks", "keep", "percent"), [(3, 0.7, 42.22), (5, 0.7, 41.51), (18, 0.7, 40.78), (9, 0.6, 52.6)]
)
def test_flops_formula_gives_the_papers_figures(blocks, keep, percent) -> None:
    assert 100 * pruned_flops(blocks, keep) == pytest.approx(percent, abs=0.035)


def images_task(n: int = 48) -> ed.Task:
    torch.manual_seed(0)
    x, y = torch.randn(n, 3, 16, 16), torch.randint(4, (n,))
    return ed.Task.from_tensors((x, y), (x[:16], y[:16]), num_classes=4)


def session_of(model: nn.Module, task: ed.Task) -> Session:
    return Session(model=model, task=task, original=copy.deepcopy(model))


@pytest.mark.parametrize("norm", [1, 2])
def test_exactly_the_weakest_filters_are_zeroed(norm) -> None:
    model = nn.Sequential(nn.Conv2d(3, 10, 3), nn.ReLU(), nn.Conv2d(10, 7, 3))
    method = ed.SoftFilterPruning(pruning_ratio=0.3, norm=norm)
    weights = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    callback = SoftPruning(method, session_of(model, images_task()))
    callback.kept = method.plan(callback.session, model)
    callback.prune(model)
    for layer, before, count in ((model[0], weights[0], 3), (model[2], weights[1], 2)):
        zero = (layer.weight.flatten(1) == 0).all(1)
        assert zero.sum() == count
        norms = filter_norms(before, norm)
        assert norms[zero].max() <= norms[~zero].min()
        assert torch.equal(layer.weight[~zero], before[~zero])
        assert (layer.bias != 0).all()


def test_zeroed_filters_are_trained_and_may_return(digits) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 144, 10)
    )
    model[1].bias.data.fill_(0.1)  # at 0 the ReLU would hide the zeroed filters in the first step
    chosen: list[torch.Tensor] = []
    moved: list[bool] = []

    class Watch(ed.Callback):
        def after_step(self, trainer):
            if trainer.step % trainer.steps_per_epoch == 0:
                moved.append(not (model[0].weight.flatten(1) == 0).all(1).any())

        def epoch_end(self, trainer):
            chosen.append((model[0].weight.flatten(1) == 0).all(1))

    method = ed.SoftFilterPruning(pruning_ratio=0.5)
    session = session_of(model, digits)
    callback = SoftPruning(method, session)
    callback.finish = lambda trainer: None
    session.train([callback, Watch()], epochs=5, learning_rate=0.1)
    assert all(moved)
    assert all(mask.sum() == 4 for mask in chosen)
    assert any(not torch.equal(chosen[0], later) for later in chosen[1:])


def test_hard_pruning_never_lets_a_filter_return(digits) -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 144, 10))
    norms = filter_norms(model[0].weight.detach())
    first = torch.isin(torch.arange(8), norms.argsort()[:4])
    zero: list[torch.Tensor] = []

    class Watch(ed.Callback):
        def after_step(self, trainer):
            zero.append((model[0].weight.flatten(1) == 0).all(1))

    session = session_of(model, digits)
    callback = SoftPruning(ed.SoftFilterPruning(pruning_ratio=0.5, soft=False), session)
    session.train([callback, Watch()], epochs=3, learning_rate=0.1)
    assert all(torch.equal(mask, first) for mask in zero)
    again = SoftPruning(callback.method, session)
    again.load_state_dict(callback.state_dict())
    assert torch.equal(again.masks["0.weight"].flatten(1).any(1), ~first)
    assert session.model[0].out_channels == 4


class Residual(nn.Module):
    """A block whose second convolution feeds a sum, behind a stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.bn0(self.stem(x)))
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.relu(x + y).mean((2, 3)))


def disturbed(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize(
    ("make", "linear"),
    [
        (Residual, ()),
        (lambda: ed.models.build("cifar-resnet20", num_classes=4), ()),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 32), nn.GELU(), nn.Linear(32, 4)), ("1",)),
    ],
    ids=["residual", "resnet20", "linear"],
)
def test_the_small_network_computes_what_the_zeroed_one_does(make, linear) -> None:
    torch.manual_seed(0)
    model, task = disturbed(make()), images_task()
    zeroed: list[nn.Module] = []

    class Keep(ed.Callback):
        def finish(self, trainer):
            zeroed.append(copy.deepcopy(trainer.model).eval())

    method = ed.SoftFilterPruning(pruning_ratio=0.4, linear=linear)
    session = session_of(model, task)
    session.train([Keep(), method.callback(session)], epochs=1, batch_size=16, learning_rate=0.01)
    x = torch.randn(4, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(session.model(x), zeroed[0](x), atol=1e-4, rtol=1e-4)
    before = sum(p.numel() for p in zeroed[0].parameters())
    after = sum(p.numel() for p in session.model.parameters())
    assert after < 0.65 * before


def test_validation_sees_the_zeroed_network(digits, trained, monkeypatch) -> None:
    seen: list[int] = []
    evaluate = ed.Task.evaluate

    def watched(self, model, split="evaluation", **options):
        if split == "calibration":
            seen.append(int((model.get_parameter("conv1.weight").flatten(1) == 0).all(1).sum()))
        return evaluate(self, model, split, **options)

    monkeypatch.setattr(ed.Task, "evaluate", watched)
    ed.compress(trained, digits, [ed.SoftFilterPruning(pruning_ratio=0.3, epochs=2)], quiet=True, latency=False)
    assert seen == [6, 6]


def test_a_network_without_convolutions_is_refused(digits) -> None:
    with pytest.raises(ed.ModelError, match="no convolution"):
        ed.compress(ed.models.build("lenet-300-100"), digits, [ed.SoftFilterPruning(epochs=1)], quiet=True)


class Padded(nn.Module):
    """A shortcut of zeros: half of the channels of the sum come from one convolution alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.fc(torch.relu(self.conv(x) + nn.functional.pad(x, (0, 0, 0, 0, 0, 8))).mean((2, 3)))


def test_all_the_filters_that_no_other_layer_adds_to_may_go() -> None:
    torch.manual_seed(0)
    model, task = Padded(), images_task()
    with torch.no_grad():
        model.conv.weight[8:] *= 1e-3
    method = ed.SoftFilterPruning(pruning_ratio=0.5, epochs=1, batch_size=16, learning_rate=1e-4)
    result = ed.compress(model, task, [method], quiet=True, latency=False)
    assert result.report.methods[0].findings["zeroed"] == {"stem": 4, "conv": 8}
    assert result.after.params < 0.6 * result.before.params


class Pointwise(nn.Module):
    """Convolutions without bias whose constants go to a 1x1 convolution that is pruned as well."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6()),
            *(nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU6()),
            *(nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6)),
        )
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))


def test_layers_that_take_constants_over_are_pruned_too() -> None:
    torch.manual_seed(0)
    model, task = disturbed(Pointwise()), images_task()
    result = ed.compress(
        model, task, [ed.SoftFilterPruning(pruning_ratio=0.4, epochs=1, batch_size=16)], quiet=True, latency=False
    )
    findings = result.report.methods[0].findings
    assert findings["removed"]["body.0"] == 3
    assert result.after.params < 0.75 * result.before.params
