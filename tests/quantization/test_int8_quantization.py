import copy

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.parts.integer_layers import IntegerLayer, QuantizedConv2d, QuantizedLinear
from efficientdnns.quantization.int8_quantization import QuantizationAwareTraining
from efficientdnns.session import Session


def quantized(model, task, **fields):
    session = Session(model=copy.deepcopy(model), task=task, original=model)
    method = ed.Int8Quantization(**fields)
    method.check(session)
    method.apply(session)
    return session


def accuracy(model, task):
    return task.evaluate(model).value


@pytest.mark.parametrize("observer", ["min-max", "moving-average", "percentile", "mse", "entropy"])
def test_eight_bits_keep_the_accuracy(trained, digits, observer):
    session = quantized(trained, digits, observer=observer, calibration_samples=50)
    assert accuracy(session.model, digits) >= accuracy(trained, digits) - 1.5
    kinds = [type(m) for m in session.model.modules() if isinstance(m, IntegerLayer)]
    assert kinds == [QuantizedConv2d] * 2 + [QuantizedLinear] * 2
    finding = session.findings["fit"]
    assert finding == {"quantized": ["conv1", "conv2", "fc1", "fc2"], "left_real": [], "fused": 3}


def test_dynamic_needs_no_data(trained, digits):
    task = digits.with_(train=None, calibration=None)
    session = quantized(trained, task, mode="dynamic")
    assert accuracy(session.model, digits) >= accuracy(trained, digits) - 1.5
    with pytest.raises(ed.DataError, match="calibration"):
        quantized(trained, task)


def test_the_file_is_four_times_smaller_and_loads_to_the_same_outputs(trained, digits, tmp_path):
    result = ed.compress(trained, digits, ed.Int8Quantization(calibration_samples=64), latency=False, quiet=True)
    assert result.before.bytes / result.after.bytes > 3.8
    assert result.before.params == result.after.params
    assert result.before.macs == result.after.macs
    assert result.before.metric.value - result.after.metric.value <= 1.5
    again = ed.load(result.save(tmp_path / "out"))
    x = digits.example_input
    assert torch.equal(again(x), result.model(x))
    assert {str(v.dtype) for v in result.model.state_dict().values()} == {"torch.int8", "torch.int32", "torch.float32"}


def test_batch_norm_is_folded(digits):
    torch.manual_seed(0)
    model = ed.models.build("small-resnet")
    ed.fit(model, digits, epochs=3, quiet=True, batch_size=64)
    session = quantized(model, digits, observer="min-max")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in session.model.modules())
    assert accuracy(session.model, digits) >= accuracy(model, digits) - 2
    x = next(digits.evaluation.batches(64)).inputs
    real, integer = model.eval()(x), session.model(x)
    assert (integer - real).std() < 0.05 * real.std()


def test_skipped_layers_stay_real(trained, digits):
    session = quantized(trained, digits, skip=("fc*",))
    assert type(session.model.fc1) is nn.Linear
    assert session.findings["fit"]["left_real"] == ["fc1", "fc2"]
    with pytest.raises(ed.ConfigurationError, match="skip names 'fc9'"):
        quantized(trained, digits, skip=("fc9",))


def test_nothing_to_quantize(digits):
    with pytest.raises(ed.ModelError, match="no layer to quantize"):
        quantized(nn.Flatten(), digits)


def test_pruned_weights_stay_zero(trained, digits):
    with torch.no_grad():
        trained.fc1.weight[torch.rand_like(trained.fc1.weight) < 0.9] = 0
    session = quantized(trained, digits)
    assert torch.equal(session.model.fc1.weight == 0, session.model.fc1.real_weight() == 0)
    assert (session.model.fc1.weight[trained.fc1.weight == 0] == 0).all()


def test_training_keeps_the_zeros_of_pruning(trained, digits):
    zero = torch.rand_like(trained.fc1.weight) < 0.9
    with torch.no_grad():
        trained.fc1.weight[zero] = 0
    session = Session(model=trained, task=digits, original=trained, sparse={"fc1.weight"})
    ed.Int8Quantization(mode="qat", epochs=1).apply(session)
    assert (session.model.fc1.weight[zero] == 0).all()
    assert session.model.fc1.weight.count_nonzero() > 0.8 * (~zero).sum()


def rescaled(model):
    """The same function with the channels of conv2 scaled by up to 100 and the columns of fc1 by the inverse."""
    model = copy.deepcopy(model)
    factor = 10 ** (torch.rand(50) * 4 - 2)
    with torch.no_grad():
        model.conv2.weight.mul_(factor.view(-1, 1, 1, 1))
        model.conv2.bias.mul_(factor)
        per_channel = model.fc1.in_features // 50
        model.fc1.weight.div_(factor.repeat_interleave(per_channel))
    return model


def test_per_channel_weights_survive_a_rescaling_of_channels(trained, digits):
    model = rescaled(trained)
    x = next(digits.evaluation.batches(50)).inputs
    assert torch.allclose(model.eval()(x), trained.eval()(x), atol=1e-3)
    one, many = (quantized(model, digits, skip=("fc1",), per_channel=p, mode="dynamic").model(x) for p in (False, True))
    real = model(x)
    assert (many - real).std() < 0.5 * (one - real).std()


def test_percentile_beats_min_max_where_activations_have_outliers(trained, digits):
    class Outliers(nn.Module):
        def forward(self, x):
            y = x.flatten().clone()
            y[:: max(1, y.numel() // 4)] += 500
            return y.view_as(x)

    model = nn.Sequential(Outliers(), trained)
    calibrated = quantized(model, digits, observer="percentile", percentile=99.9, activation_bits=8)
    extreme = quantized(model, digits, observer="min-max", activation_bits=8)
    for session in (calibrated, extreme):
        session.model[0] = nn.Identity()
    assert accuracy(calibrated.model, digits) > accuracy(extreme.model, digits) + 10


def test_training_beats_calibration_at_few_bits(trained, digits):
    fields = {"weight_bits": 2, "activation_bits": 3}
    after = quantized(trained, digits, observer="mse", **fields)
    during = quantized(trained, digits, mode="qat", epochs=3, batch_size=32, learning_rate=0.02, **fields)
    assert accuracy(during.model, digits) > accuracy(after.model, digits) + 2
    assert all(type(m) is not nn.Linear for m in during.model.modules())


def test_training_ends_as_it_was_validated(digits):
    model = ed.models.build("small-resnet", width=0.5)
    fields = {"epochs": 4, "batch_size": 24, "learning_rate": 0.05, "freeze_batch_norm": 1.0}
    session = quantized(model, digits, mode="qat", **fields)
    assert abs(session.evaluate() - session.history[-1]["accuracy"]) <= 4
    assert session.evaluate() > 25


def test_statistics_stand_still_in_the_end_and_activations_are_real_at_first(digits):
    seen = []

    class Look(ed.Callback):
        def after_step(self, trainer):
            layer = trainer.model.conv1
            seen.append((float(layer.norm.running_mean.sum()), layer.outputs.quantizing))

    model = ed.models.build("small-resnet", width=0.5)
    session = Session(model=model, task=digits, original=model)
    method = ed.Int8Quantization(mode="qat", epochs=2, batch_size=46, delay=0.25, freeze_batch_norm=0.5)
    session.train([method.callback(session), Look()], epochs=2, **method.settings())
    means, quantizing = zip(*seen)
    assert len(seen) == 20
    assert len(set(means[:10])) == 10
    assert len(set(means[9:])) == 1
    assert quantizing == (False,) * 5 + (True,) * 15


class Stop(ed.Callback):
    def epoch_start(self, trainer):
        if trainer.epoch == 1:
            raise KeyboardInterrupt


def test_a_killed_run_ends_the_same(trained, digits, tmp_path, monkeypatch):
    method = ed.Int8Quantization(mode="qat", epochs=2, batch_size=64, delay=0.2)

    def session(folder):
        return Session(model=copy.deepcopy(trained), task=digits, original=trained, directory=folder)

    whole = session(None)
    method.apply(whole)
    killed = session(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(QuantizationAwareTraining, "epoch_start", Stop.epoch_start)
        with pytest.raises(KeyboardInterrupt):
            method.apply(killed)
    resumed = session(tmp_path)
    method.apply(resumed)
    assert len(resumed.history) == 2
    states = [s.model.state_dict() for s in (whole, resumed)]
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


def test_shares_a_run_with_other_methods(trained, digits):
    for mode in ("static", "qat"):
        steps = [[ed.KnowledgeDistillation(epochs=1), ed.Int8Quantization(mode=mode, epochs=1, calibration_samples=32)]]
        result = ed.compress(trained, digits, steps, latency=False, quiet=True)
        assert any(isinstance(m, IntegerLayer) for m in result.model.modules())
        assert result.before.metric.value - result.after.metric.value < 5


def test_fields_are_checked():
    with pytest.raises(ed.ConfigurationError, match="weight_bits is 9, expected"):
        ed.Int8Quantization(weight_bits=9)
