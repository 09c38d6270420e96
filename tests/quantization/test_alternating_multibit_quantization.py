import copy

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.data.text import WindowSplit
from efficientdnns.quantization.multibit_layers import MultiBitEmbedding, MultiBitLinear, MultiBitRecurrent
from efficientdnns.session import Session
from efficientdnns.task import Task


@pytest.fixture(scope="module")
def text():
    """Letters of which each depends on the two before it."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(9000, generator=generator)
    ids = [0, 1]
    for value in noise:
        ids.append((ids[-1] + 2 * ids[-2] + 1) % 9 if value < 0.9 else int(value * 900) % 9)
    ids = torch.tensor(ids)
    parts = (ids[:6000], ids[6000:7500], ids[7500:])
    train, calibration, evaluation = (WindowSplit(part, 20) for part in parts)
    return Task(train, evaluation, calibration, kind="language-modelling", num_classes=9)


@pytest.fixture(scope="module")
def _model(text):
    torch.manual_seed(0)
    model = ed.models.build("char-lstm", vocabulary=9, hidden=32)
    ed.fit(model, text, epochs=6, optimizer="adam", learning_rate=0.02, batch_size=16, quiet=True)
    return model.eval()


@pytest.fixture
def model(_model):
    return copy.deepcopy(_model)


def coded(model, task, **fields):
    session = Session(model=copy.deepcopy(model), task=task, original=model)
    method = ed.AlternatingMultibitQuantization(**fields)
    method.check(session)
    method.apply(session)
    return session


def perplexity(model, task):
    return task.evaluate(model).value


def test_every_weight_of_a_language_model_is_coded(model, text):
    session = coded(model, text.with_(train=None, calibration=None), epochs=0)
    assert [type(m) for m in session.model.children()] == [MultiBitEmbedding, MultiBitRecurrent, MultiBitLinear]
    errors = session.findings["fit"]["relative_squared_error"]
    assert set(errors) == {"embedding.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "linear.weight"}
    assert all(0.03 < error < 0.2 for error in errors.values())


def test_more_bits_and_better_codes_lose_less(model, text):
    before = perplexity(model, text)
    by_bits = [perplexity(coded(model, text, epochs=0, weight_bits=k).model, text) for k in (1, 2, 4)]
    assert by_bits[0] > by_bits[1] > by_bits[2] > 0.98 * before
    assert by_bits[2] < 1.1 * before

    def error(method):
        return sum(coded(model, text, epochs=0, method=method).findings["fit"]["relative_squared_error"].values())

    values = [error(method) for method in ("alternating", "refined", "greedy", "uniform", "balanced")]
    assert values == sorted(values)
    assert error("alternating") > sum(
        coded(model, text, epochs=0, final_refit=True).findings["fit"]["relative_squared_error"].values()
    )


def test_training_through_codes_repairs_them(model, text):
    fields = {"weight_bits": 2, "activation_bits": 2}
    before = perplexity(coded(model, text, epochs=0, **fields).model, text)
    session = coded(model, text, epochs=2, learning_rate=1.0, batch_size=16, clip_norm=0.25, **fields)
    assert perplexity(session.model, text) < before
    assert session.evaluate() == pytest.approx(session.history[-1]["perplexity"], rel=1e-3)


def test_the_settings_are_the_papers():
    settings = ed.AlternatingMultibitQuantization().settings()
    optimizer = {"optimizer": "sgd", "momentum": 0.0, "learning_rate": 20.0, "schedule": "constant"}
    assert settings == {**optimizer, "weight_decay": 0.0, "clip_norm": 0.25}


def test_the_learning_rate_falls_when_validation_is_worse_than_the_best(model, text):
    method = ed.AlternatingMultibitQuantization()
    callback = method.callback(Session(model=model, task=text, original=model))

    class Trainer:
        task = text
        history = []

    shares = []
    for value in (10.0, 9.0, 9.5, 9.2, 8.0, 8.5):
        Trainer.history = [*Trainer.history, {"perplexity": value}]
        callback.epoch_start(Trainer)
        shares.append(round(callback.learning_rate(Trainer), 6))
    assert shares == [1, 1, round(1 / 1.2, 6), round(1 / 1.44, 6), round(1 / 1.44, 6), round(1 / 1.728, 6)]
    again = method.callback(Session(model=model, task=text, original=model))
    again.load_state_dict(callback.state_dict())
    assert again.learning_rate(Trainer) == callback.learning_rate(Trainer)


def test_latent_weights_are_clipped(model, text):
    with torch.no_grad():
        model.linear.weight.mul_(5)
        model.linear.bias.add_(3)
    assert model.linear.weight.abs().max() > 1
    seen = {}

    class Look(ed.Callback):
        def epoch_end(self, trainer):
            seen.update({name: p.detach().clone() for name, p in trainer.model.named_parameters()})

    session = Session(model=model, task=text, original=model)
    method = ed.AlternatingMultibitQuantization(epochs=1, learning_rate=0.1, batch_size=64)
    session.train([method.callback(session), Look()], epochs=1, **method.settings())
    assert all(p.abs().max() <= 1 for name, p in seen.items() if "bias" not in name)
    assert seen["linear.bias"].max() > 2


def test_saved_and_loaded(model, text, tmp_path):
    method = ed.AlternatingMultibitQuantization(epochs=0, weight_bits=2, activation_bits=2)
    result = ed.compress(model, text, method, latency=False, quiet=True)
    assert result.before.bytes / result.after.bytes > 5
    assert result.before.params == result.after.params
    again = ed.load(result.save(tmp_path / "out"))
    assert torch.equal(again(text.example_input), result.model(text.example_input))


def test_other_networks_and_their_limits(trained, digits):
    session = coded(trained, digits, epochs=0, weight_bits=4)
    assert type(session.model.conv1) is nn.Conv2d
    assert type(session.model.fc1) is MultiBitLinear
    assert digits.evaluate(session.model).value >= digits.evaluate(trained).value - 3
    with pytest.raises(ed.ModelError, match="nothing to code"):
        coded(nn.Conv2d(1, 1, 1), digits, epochs=0)
    both = nn.Sequential(nn.LSTM(3, 4, bidirectional=True))
    with pytest.raises(ed.ModelError, match="cannot code the states of '0'"):
        coded(both, digits, epochs=0, activation_bits=2)


def test_fields_are_checked():
    with pytest.raises(ed.ConfigurationError, match="method is 'best', expected"):
        ed.AlternatingMultibitQuantization(method="best")
    task = Task(None, (torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)))
    with pytest.raises(ed.DataError, match="training data"):
        coded(nn.Linear(3, 2), task)
