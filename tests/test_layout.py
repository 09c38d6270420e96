"""The layout of images in memory changes how fast a network runs, never what it computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.layout import arrange_state, arranged, fitting_layout, fitting_outputs, lay_out
from efficientdnns.session import Session
from efficientdnns.training import Callback


class Viewing(nn.Sequential):
    """Code that only knows the usual layout."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).view(len(x), -1)


def convolutions(kind: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    end = [nn.Flatten()] if kind is nn.Sequential else []
    return kind(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 4, 3), *end)


def call(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x)


@pytest.mark.parametrize(
    ("model", "example", "expected"),
    [
        (convolutions(), torch.randn(1, 3, 8, 8), torch.channels_last),
        (convolutions(Viewing), torch.randn(1, 3, 8, 8), torch.contiguous_format),
        (nn.Flatten(), torch.randn(1, 3, 8, 8), torch.contiguous_format),
        (nn.Linear(4, 2), torch.randn(1, 4), torch.contiguous_format),
        (nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 8, 8, dtype=torch.long), torch.contiguous_format),
    ],
    ids=["convolutions", "views", "no-convolution", "vectors", "integers"],
)
def test_only_networks_that_run_with_it_get_it(model, example, expected) -> None:
    assert fitting_layout(model, example, call) is expected


def test_asking_changes_nothing() -> None:
    model, random = convolutions(), torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fitting_layout(model, torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)), call)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.is_contiguous() for parameter in model.parameters())


@pytest.mark.parametrize("kind", [nn.Sequential, Viewing])
def test_outputs_are_the_same_and_code_with_views_runs(kind) -> None:
    model, x = convolutions(kind).eval(), torch.randn(4, 3, 8, 8)
    run = fitting_outputs(call)
    for batch in (x, x + 1):
        torch.testing.assert_close(run(model, batch), model(batch))


def test_an_error_of_the_network_stays_its_own() -> None:
    with pytest.raises(RuntimeError, match="expected input"):
        fitting_outputs(call)(convolutions().eval(), torch.randn(4, 5, 8, 8))


def test_weights_keep_identity_and_values() -> None:
    model = convolutions()
    weight, values = model[0].weight, model[0].weight.detach().clone()
    lay_out(model, torch.channels_last)
    assert model[0].weight is weight
    assert not weight.is_contiguous()
    assert torch.equal(weight, values)
    assert lay_out(model, torch.contiguous_format)[0].weight.is_contiguous()


def test_inputs_other_than_images_stay() -> None:
    image, numbers = torch.randn(2, 3, 4, 4), torch.randn(2, 3)
    first, second = arranged((image, numbers), torch.channels_last)
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert second is numbers


def test_loaded_momenta_lie_as_their_parameters_do() -> None:
    model = lay_out(convolutions(), torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    state = optimizer.state[model[0].weight]
    values = state["exp_avg"] = state["exp_avg"].contiguous()
    arrange_state(optimizer)
    assert state["exp_avg"].stride() == model[0].weight.stride()
    assert torch.equal(state["exp_avg"], values)
    assert state["step"].dim() == 0


def test_a_trained_network_has_the_usual_layout_and_learns_the_same(digits) -> None:
    trained = []
    for kind in (nn.Sequential, Viewing):  # the second is trained as it is
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 8, 5), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(8, 10, 6)]
        model = kind(*layers) if kind is Viewing else kind(*layers, nn.Flatten())
        ed.fit(model, digits, epochs=1, quiet=True, learning_rate=0.05, batch_size=32)
        assert all(parameter.is_contiguous() for parameter in model.parameters())
        trained.append(model)
    for first, second in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


def test_callbacks_may_hold_on_to_the_weights(digits) -> None:
    class Holds(Callback):
        def setup(self, trainer) -> None:
            self.held = {name: parameter.data for name, parameter in trainer.model.named_parameters()}

        def after_step(self, trainer) -> None:
            for name, parameter in trainer.model.named_parameters():
                assert parameter.data_ptr() == self.held[name].data_ptr(), name

    model = nn.Sequential(nn.Conv2d(1, 8, 5), nn.ReLU(), nn.Conv2d(8, 10, 24), nn.Flatten())
    session = Session(model=model, task=digits, original=model)
    session.train([Holds()], epochs=1, learning_rate=0.01, batch_size=64)
