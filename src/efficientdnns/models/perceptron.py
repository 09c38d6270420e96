"""Multilayer perceptrons of any width and depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from efficientdnns.errors import ModelError, suggest

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky-relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}

INITS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "torch": None,
    "xavier": nn.init.xavier_uniform_,
    "he": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"),
    "orthogonal": nn.init.orthogonal_,
}


class MLP(nn.Module):
    """in_features, hidden layers with an activation each, classes; any input that flattens to ``in_features``.

    ``hidden`` lists the widths; without it there are ``depth`` layers of ``width``. ``init`` is ``torch`` (its
    default), ``xavier``, ``he`` or ``orthogonal``, the last three with zero biases; ``activation`` is ``relu``,
    ``leaky-relu``, ``tanh`` or ``sigmoid``. ``dropout`` is one rate for every hidden layer, or a list of rates for the
    input and each hidden layer. ``output`` is an activation of the outputs: with ``sigmoid``, and ``num_classes`` the
    number of inputs, it is an autoencoder of values in [0, 1].
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_features: int = 784,
        hidden: Sequence[int] | None = None,
        depth: int = 2,
        width: int = 256,
        activation: str = "relu",
        init: str = "torch",
        dropout: float | Sequence[float] = 0.0,
        output: str | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ModelError(f"activation is '{activation}'{suggest(activation, ACTIVATIONS)}")
        if output is not None and output not in ACTIVATIONS:
            raise ModelError(f"output is '{output}'{suggest(output, ACTIVATIONS)}")
        if init not in INITS:
            raise ModelError(f"init is '{init}'{suggest(init, INITS)}")
        widths = [in_features, *(hidden if hidden is not None else [width] * depth)]
        rates = [0.0] + [dropout] * (len(widths) - 1) if isinstance(dropout, int | float) else list(dropout)
        if len(rates) != len(widths):
            raise ModelError(
                f"dropout has {len(rates)} rates, expected {len(widths)}: the input's and each hidden layer's"
            )
        layers: list[nn.Module] = [nn.Flatten()]
        for index, features in enumerate(widths):
            if rates[index] > 0:
                layers.append(nn.Dropout(rates[index]))
            if index + 1 < len(widths):
                layers += [nn.Linear(features, widths[index + 1]), ACTIVATIONS[activation]()]
        layers.append(nn.Linear(widths[-1], num_classes))
        self.layers = nn.Sequential(*layers, *([ACTIVATIONS[output]()] if output else []))
        if (initialise := INITS[init]) is not None:
            for module in self.layers:
                if isinstance(module, nn.Linear):
                    initialise(module.weight)
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
