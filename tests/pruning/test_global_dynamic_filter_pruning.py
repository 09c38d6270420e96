"""Global and dynamic filter pruning: counts, gradients of masked filters, recovery, and the cut."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.parts.criteria import channel_scores
from efficientdnns.pruning.global_dynamic_filter_pruning import GlobalMask
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph, zero_contributions


def network() -> nn.Module:
    convolutions = (nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*convolutions, nn.Linear(48, 10), nn.ReLU(), nn.Linear(10, 4))


def session_of(model: nn.Module | None = None) -> Session:
    torch.manual_seed(0)
    model = model or network()
    x = torch.randn(64, 1, 6, 6)
    y = (x[:, 0, :3].sum((1, 2)) > 0).long() + 2 * (x[:, 0, 3:].sum((1, 2)) > 0).long()
    task = ed.Task.from_tensors((x, y), (x[:16], y[:16]), (x[:16], y[:16]), num_classes=4)
    settings = ed.training.TrainingSettings(batch_size=16, learning_rate=0.05)
    return Session(model=model, task=task, original=copy.deepcopy(model), settings=settings)


def run(session: Session, watch: ed.Callback | None = None, **fields) -> GlobalMask:
    fields = {"interval": 2, "pruning_ratio": 0.5, "epochs": 5} | fields
    callback = GlobalMask(ed.GlobalDynamicFilterPruning(**fields), session)
    session.train([callback, *([watch] if watch else [])], epochs=fields["epochs"])
    return callback


class Watch(ed.Callback):
    def __init__(self) -> None:
        self.masks: list[dict[str, torch.Tensor]] = []
        self.weights: list[torch.Tensor] = []

    def after_step(self, trainer):
        callback = trainer.callbacks[0]
        self.masks.append({name: gate.clone() for name, gate in callback.gates.gates.items()})
        self.weights.append(trainer.model[2].weight.detach().clone())


def test_the_mask_has_its_count_after_every_update_and_is_global() -> None:
    watch = Watch()
    session = session_of()
    run(session, watch, average=0.5)
    totals = {int(sum(gate.sum() for gate in masks.values())) for masks in watch.masks}
    assert totals == {15}
    shares = [float(gate.mean()) for gate in watch.masks[-1].values()]
    assert max(shares) - min(shares) > 0.05, "layers differ"
    frozen = [masks for masks in watch.masks[10:]]
    assert all(torch.equal(frozen[0][name], masks[name]) for masks in frozen for name in masks)
    widths = session.findings[session.label]["widths"]
    assert [kept for _, kept in widths.values()] == [int(gate.sum()) for gate in watch.masks[-1].values()]


def test_masked_filters_are_trained_until_the_mask_is_frozen() -> None:
    watch = Watch()
    run(session_of(), watch, interval=100, stable=99)
    assert len(watch.weights) == 20
    masked = (watch.masks[0]["2"] == 0).nonzero().flatten()
    assert len(masked)
    for step in range(1, 9):
        assert all((watch.weights[step][unit] != watch.weights[step - 1][unit]).any() for unit in masked)


def test_masked_channels_are_zero_where_they_are_read_and_get_gradients() -> None:
    session = session_of()
    callback = GlobalMask(ed.GlobalDynamicFilterPruning(), session)

    class Trainer:
        model, total_steps, device, step = session.model, 10, session.device, 0

    callback.setup(Trainer)
    callback.gates.gates["0"][[1, 4]] = 0.0
    x, y = torch.randn(32, 1, 6, 6), torch.randint(4, (32,))
    read = {}
    handle = session.model[2].register_forward_hook(lambda m, inputs, o: read.update(x=inputs[0]))
    outputs = session.model(x)
    handle.remove()
    assert not read["x"][:, [1, 4]].any()
    assert read["x"][:, 0].any()
    graph = ChannelGraph.trace(session.original, x[:1])
    assert torch.allclose(outputs, zero_contributions(session.original, {"0": [1, 4]}, graph)(x), atol=1e-6)
    nn.functional.cross_entropy(outputs, y).backward()
    assert session.model[0].weight.grad[1].any(), "straight through"
    callback.gates.straight_through = False
    session.model.zero_grad()
    nn.functional.cross_entropy(session.model(x), y).backward()
    assert not session.model[0].weight.grad[1].any()
    # With every gate open the gradient is the ordinary one.
    callback.gates.straight_through = True
    callback.gates.gates["0"].fill_(1.0)
    session.model.zero_grad()
    nn.functional.cross_entropy(session.model(x), y).backward()
    nn.functional.cross_entropy(session.original(x), y).backward()
    assert torch.equal(session.model[0].weight.grad, session.original[0].weight.grad)


def test_saliency_of_two_weights() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
    model[0].weight.data = torch.tensor([[1.0, -2.0], [0.5, 0.25]])
    gradients = {"0.weight": torch.tensor([[3.0, 1.0], [-2.0, 4.0]])}
    graph = ChannelGraph.trace(model, torch.ones(1, 2))
    scores = channel_scores(model, graph.groups, "taylor", gradients)["0"]
    assert scores.tolist() == [3 * 1 + 1 * 2, 2 * 0.5 + 4 * 0.25], "magnitudes do not cancel"


def test_a_crucial_filter_that_was_dropped_comes_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    with torch.no_grad():  # one filter carries the network, the others hardly do anything
        model[0].weight[1:] *= 0.01
        model[0].bias[1:] = 0.0
        model[2].weight[:, 1:] *= 0.01
    session = session_of(model)
    callback = GlobalMask(ed.GlobalDynamicFilterPruning(interval=3, pruning_ratio=0.25, freeze=1.0, epochs=4), session)

    class Wrong(ed.Callback):
        def start(self, trainer):
            callback.gates.gates["0"][0] = 0.0

    session.train([callback, Wrong()], epochs=4)
    assert callback.history[0][1] >= 1, "it re-enters"
    assert callback.gates.gates["0"][0] == 1
    assert session.findings[session.label]["recoveries"] >= 1


def test_a_stable_mask_is_frozen_early() -> None:
    session = session_of()
    callback = run(session, interval=1, stable=2, criterion="magnitude", epochs=6)
    assert callback.frozen
    assert len(callback.history) < 12
    assert all(back == went == 0 for _, back, went in callback.history[-2:])


def test_removed_is_masked() -> None:
    session = session_of()
    before: list[torch.Tensor] = []
    x = torch.randn(5, 1, 6, 6)

    class Watch(ed.Callback):
        def epoch_end(self, trainer):
            before.append(trainer.model.eval()(x))
            trainer.model.train()

    run(session, Watch())
    assert torch.allclose(session.model.eval()(x), before[-1], atol=1e-5)
    assert not any(module._forward_pre_hooks for module in session.model.modules())


def test_at_once_it_is_the_one_shot_cut() -> None:
    session = session_of()
    ed.GlobalDynamicFilterPruning(epochs=0, pruning_ratio=0.4, samples=64).apply(session)
    widths = session.findings[session.label]["widths"].values()
    assert sum(kept for _, kept in widths) == 30 - 12
    assert session.findings[session.label]["updates"] == []


@pytest.mark.parametrize("fields", [{}, {"scope": "layer"}, {"epochs": 0}])
def test_budgets_are_met(fields) -> None:
    session = session_of()
    method = ed.GlobalDynamicFilterPruning(**({"epochs": 2, "interval": 2} | fields))
    for budget in ("params=0.5", "macs=0.5"):
        result = ed.compress(session.model, session.task, method, budget=budget, quiet=True, latency=False)
        assert all(line.met for line in result.budget)


def test_groups_that_cannot_be_masked_are_named() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.lstm, self.fc = nn.Conv2d(1, 5, (3, 1)), nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 8)
            self.out = nn.Linear(8, 4)

        def forward(self, x):
            x = self.conv(x).mean(2).transpose(1, 2)
            return self.out(self.fc(self.lstm(x)[0].mean(1)).relu())

    session = session_of(Recurrent())
    run(session, epochs=1)
    assert session.model.conv.out_channels == 5
    assert session.findings[session.label]["not_masked"] == ["conv", "lstm"]

    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.lstm = nn.Conv2d(1, 5, (3, 1)), nn.LSTM(5, 4, batch_first=True)

        def forward(self, x):
            return self.lstm(self.conv(x).mean(2).transpose(1, 2))[0].mean(1)

    with pytest.raises(ed.SurgeryError, match="no channels of Only are read by linear layers or convolutions alone"):
        run(session_of(Only()), epochs=1)


def test_wrong_fields_are_refused() -> None:
    for fields in ({"freeze": 0}, {"interval": 0}, {"average": 1.0}, {"criterion": "l7"}):
        with pytest.raises(ed.ConfigurationError, match=next(iter(fields))):
            ed.GlobalDynamicFilterPruning(**fields)
