"""Layers whose weights are sums of scaled sign vectors: packed for use, or latent while they are trained.

A layer keeps its matrices as one byte for eight signs (``codes``) with k coefficients a row (``alpha``). A matrix of at
most `KEPT` entries is decoded on first use and kept outside the state; a larger one is decoded at every use, so that a
large network stays small in memory. Its twin for training (`LatentMultiBit...`) has the ordinary
float parameters under their ordinary names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientdnns.parts.binary_codes import CodeMethod, decode, multibit_quantize, pack_binary, unpack_binary
from efficientdnns.parts.quantizer import straight_through
from efficientdnns.surgery import rebuildable

Recurrent = nn.LSTM | nn.GRU
State = Any
KEPT = 1 << 18
"""Entries up to which a decoded matrix is kept."""
_BLOCK = 1 << 20


def quantize_rows(x: Tensor, bits: int | None, method: CodeMethod = "alternating", iterations: int = 2) -> Tensor:
    """The binary-coded approximation of every vector along the last dimension, gradient passed unchanged; ``x``
    where bits is None."""
    if bits is None:
        return x
    alpha, codes = multibit_quantize(x, bits, method=method, iterations=iterations)
    return straight_through(x, decode(alpha, codes))


class _Coded(nn.Module):
    """Base of the packed layers: matrices as codes and coefficients, left so in exported files.

    Args:
        shapes: (rows, n) of each matrix by name.
        bits: k_w. activation_bits: k_h for vectors quantized on the fly, or None.
        method, iterations: of the quantizer.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        bits: int,
        activation_bits: int | None,
        method: CodeMethod,
        iterations: int,
    ) -> None:
        super().__init__()
        self.shapes = dict(shapes)
        self.options = {"bits": bits, "activation_bits": activation_bits, "method": method, "iterations": iterations}
        for name, (rows, n) in self.shapes.items():
            self.register_buffer(f"{name}_alpha", torch.zeros(rows, bits))
            self.register_buffer(f"{name}_codes", torch.zeros(rows, bits, -(-n // 8), dtype=torch.uint8))
            self.register_buffer(f"{name}_dense", None, persistent=False)
        self.register_load_state_dict_post_hook(_Coded.forget)

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor], final_refit: bool = False) -> None:
        """Quantize the matrices and copy the biases."""
        o: dict[str, Any] = self.options
        for name, value in tensors.items():
            if name in self.shapes:
                for rows in _row_blocks(value):
                    found = multibit_quantize(
                        value[rows], o["bits"], method=o["method"], iterations=o["iterations"], final_refit=final_refit
                    )
                    self.get_buffer(f"{name}_alpha")[rows] = found[0]
                    self.get_buffer(f"{name}_codes")[rows] = pack_binary(found[1])
            else:
                self.get_parameter(name).copy_(value)
        self.forget()

    def forget(self, *_: Any) -> None:
        """Drop what was decoded; it is decoded again when needed."""
        for name in self.shapes:
            setattr(self, f"{name}_dense", None)

    def dense(self, name: str) -> Tensor:
        """The matrix ``name``; decoded once where it is small (in an exported file by the file)."""
        if torch.compiler.is_exporting():
            return self.decoded(name, slice(None))
        known: Tensor | None = getattr(self, f"{name}_dense")
        if known is None:
            # Not inside inference mode, whose tensors would be unusable in a later training run.
            with torch.inference_mode(False), torch.no_grad():
                known = self.get_buffer(f"{name}_alpha").new_empty(self.shapes[name])
                for rows in _row_blocks(known):
                    known[rows] = self.decoded(name, rows)
            if known.numel() <= KEPT:
                setattr(self, f"{name}_dense", known)
        return known

    def decoded(self, name: str, rows: slice | Tensor) -> Tensor:
        """Some rows of the matrix ``name``, (number of rows, n)."""
        codes = unpack_binary(self.get_buffer(f"{name}_codes")[rows], self.shapes[name][1])
        return decode(self.get_buffer(f"{name}_alpha")[rows], codes)

    def activations(self, x: Tensor) -> Tensor:
        """Vectors as the layer sees them: coded with k_h bits, or as they are."""
        o: dict[str, Any] = self.options
        return quantize_rows(x, o["activation_bits"], o["method"], o["iterations"])

    def count_parameters(self) -> tuple[int, int]:
        """Weights that the codes stand for, and biases; how many of them are not zero."""
        biases = [p.detach() for p in self.parameters()]
        total = sum(rows * n for rows, n in self.shapes.values()) + sum(bias.numel() for bias in biases)
        nonzero = sum(int(self.dense(name).count_nonzero()) for name in self.shapes)
        return total, nonzero + sum(int(bias.count_nonzero()) for bias in biases)


@rebuildable
class MultiBitLinear(_Coded):
    """A linear layer of coded rows, (..., in_features) -> (..., out_features); with ``activation_bits`` its input
    vectors are coded too."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        bits: int = 2,
        activation_bits: int | None = None,
        method: CodeMethod = "alternating",
        iterations: int = 2,
    ) -> None:
        super().__init__({"weight": (out_features, in_features)}, bits, activation_bits, method, iterations)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.activations(x), self.dense("weight"), self.bias)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            **self.options,
        }


@rebuildable
class MultiBitEmbedding(_Coded):
    """An embedding of coded rows: indices (...) -> (..., embedding_dim). A row looked up is a coded vector already."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int = 2,
        method: CodeMethod = "alternating",
        iterations: int = 2,
    ) -> None:
        super().__init__({"weight": (num_embeddings, embedding_dim)}, bits, None, method, iterations)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim

    def forward(self, x: Tensor) -> Tensor:
        if self.num_embeddings * self.embedding_dim <= KEPT or torch.compiler.is_exporting():
            return F.embedding(x, self.dense("weight"))
        return self.decoded("weight", x.reshape(-1)).view(*x.shape, self.embedding_dim)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        options = {name: value for name, value in self.options.items() if name != "activation_bits"}
        return {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim, **options}


@rebuildable
class MultiBitRecurrent(_Coded):
    """An LSTM or GRU of coded rows, called like ``nn.LSTM`` and ``nn.GRU``.

    Without ``activation_bits`` the fused kernel runs on the decoded matrices. With them every hidden state h_t is coded
    when it is made, and the recurrence, the next layer and the output read the coded one; gates, cell states and biases
    stay real.

    Args:
        kind: "LSTM" or "GRU".
        arguments: further constructor arguments of ``nn.LSTM`` (input_size, hidden_size, num_layers, ...).
    """

    def __init__(
        self,
        kind: str,
        bits: int = 2,
        activation_bits: int | None = None,
        method: CodeMethod = "alternating",
        iterations: int = 2,
        **arguments: Any,
    ) -> None:
        with torch.device("meta"):
            shape = getattr(nn, kind)(**arguments)
        matrices = {name: tuple(p.shape) for name, p in shape.named_parameters() if p.dim() == 2}
        super().__init__(matrices, bits, activation_bits, method, iterations)
        self.kind, self.arguments, self.batch_first = kind, arguments, shape.batch_first
        for name, parameter in shape.named_parameters():
            if parameter.dim() == 1:
                self.register_parameter(name, nn.Parameter(torch.zeros(parameter.shape)))
        self.names = [name for name, _ in shape.named_parameters()]

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        tensors = {name: self.dense(name) if name in self.shapes else self.get_parameter(name) for name in self.names}
        return run_recurrent(self, tensors, x, state)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"kind": self.kind, **self.options, **self.arguments}


class LatentMultiBit(nn.Module):
    """The twin of a coded layer while it is trained: float parameters, coded anew at every forward pass, gradients
    straight through.

    Args:
        layer: the Linear, Embedding, LSTM or GRU replaced; its parameters are taken over under their names.
        coded: an empty packed layer of the same geometry, to be filled by `packed`.
        final_refit: a last least squares for the weights' coefficients.
    """

    def __init__(self, layer: nn.Module, coded: _Coded, final_refit: bool = False) -> None:
        super().__init__()
        for name, parameter in layer.named_parameters():
            self.register_parameter(name, parameter)
        self._twin, self.final_refit = (coded,), final_refit  # in a tuple, so that it is no submodule
        self.train(layer.training)

    @property
    def coded(self) -> _Coded:
        """The packed layer."""
        return self._twin[0]

    def weights(self) -> dict[str, Tensor]:
        """The parameters, matrices coded."""
        o: dict[str, Any] = self.coded.options
        result: dict[str, Tensor] = dict(self.named_parameters())
        for name in self.coded.shapes:
            latent = result[name]
            codes = multibit_quantize(
                latent, o["bits"], method=o["method"], iterations=o["iterations"], final_refit=self.final_refit
            )
            result[name] = straight_through(latent, decode(*codes))
        return result

    def forward(self, x: Tensor, state: State = None) -> Any:
        tensors, coded = self.weights(), self.coded
        if isinstance(coded, MultiBitEmbedding):
            return F.embedding(x, tensors["weight"])
        if isinstance(coded, MultiBitRecurrent):
            return run_recurrent(coded, tensors, x, state)
        return F.linear(coded.activations(x), tensors["weight"], tensors.get("bias"))

    def packed(self) -> _Coded:
        """The packed layer, filled."""
        coded = self.coded.to(next(self.parameters()).device)
        coded.fill(dict(self.named_parameters()), self.final_refit)
        return coded.train(self.training)


def _row_blocks(matrix: Tensor) -> list[slice]:
    """Rows, which are coded independently, in blocks of about `_BLOCK` entries."""
    step = max(1, _BLOCK // max(1, matrix.shape[1]))
    return [slice(start, start + step) for start in range(0, matrix.shape[0], step)]


def coded_layer(
    layer: nn.Module, bits: int, activation_bits: int | None, method: CodeMethod, iterations: int
) -> _Coded:
    """An empty packed layer of the geometry of a Linear, Embedding, LSTM or GRU."""
    if isinstance(layer, nn.Linear):
        bias = layer.bias is not None
        return MultiBitLinear(layer.in_features, layer.out_features, bias, bits, activation_bits, method, iterations)
    if isinstance(layer, nn.Embedding):
        return MultiBitEmbedding(layer.num_embeddings, layer.embedding_dim, bits, method, iterations)
    assert isinstance(layer, Recurrent)
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
    arguments = {name: getattr(layer, name) for name in names}
    if isinstance(layer, nn.LSTM) and layer.proj_size:
        arguments["proj_size"] = layer.proj_size
    return MultiBitRecurrent(type(layer).__name__, bits, activation_bits, method, iterations, **arguments)


def run_recurrent(
    layer: MultiBitRecurrent, tensors: Mapping[str, Tensor], x: Tensor, state: State
) -> tuple[Tensor, State]:
    """One forward pass of an LSTM or GRU with the given matrices and biases: fused, or cell by cell where hidden states
    are coded.

    ``x`` is (T, B, n), with batch_first (B, T, n), or without a batch (T, n).
    """
    arguments = {"num_layers": 1, "bias": True, "dropout": 0.0, "bidirectional": False, **layer.arguments}
    unbatched = x.dim() == 2
    batch_axis = 1 if unbatched or not layer.batch_first else 0
    x = x.unsqueeze(batch_axis) if unbatched else x
    if unbatched and state is not None:
        state = tuple(s.unsqueeze(1) for s in state) if isinstance(state, tuple) else state.unsqueeze(1)
    directions = 1 + arguments["bidirectional"]
    if state is None:
        hidden, projected = arguments["hidden_size"], arguments.get("proj_size") or arguments["hidden_size"]
        zeros = [
            x.new_zeros(arguments["num_layers"] * directions, x.shape[batch_axis], size) for size in (projected, hidden)
        ]
        state = tuple(zeros) if layer.kind == "LSTM" else zeros[0]
    if layer.options["activation_bits"] is not None:
        y, state = _cells(layer, arguments, tensors, x, state, batch_axis == 0)
    else:
        flat = [tensors[name] for name in layer.names]
        options = (arguments["bias"], arguments["num_layers"], arguments["dropout"], layer.training)
        kernel = torch.lstm if layer.kind == "LSTM" else torch.gru
        y, *rest = kernel(x, state, flat, *options, arguments["bidirectional"], batch_axis == 0)
        state = tuple(rest) if layer.kind == "LSTM" else rest[0]
    if unbatched:
        state = tuple(s.squeeze(1) for s in state) if isinstance(state, tuple) else state.squeeze(1)
        y = y.squeeze(1)
    return y, state


def _cells(
    layer: MultiBitRecurrent,
    arguments: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    x: Tensor,
    state: State,
    batch_first: bool,
) -> tuple[Tensor, State]:
    """The recurrence step by step, each hidden state coded as soon as it is made."""
    steps = x.transpose(0, 1) if batch_first else x
    states = state if layer.kind == "LSTM" else (state,)
    ends: list[tuple[Tensor, ...]] = []
    for number in range(arguments["num_layers"]):
        if number and arguments["dropout"]:
            steps = F.dropout(steps, arguments["dropout"], layer.training)
        recurrent = tensors[f"weight_hh_l{number}"]
        bias = tensors.get(f"bias_hh_l{number}")
        entry = F.linear(steps, tensors[f"weight_ih_l{number}"], tensors.get(f"bias_ih_l{number}"))
        now = tuple(s[number] for s in states)
        now = (layer.activations(now[0]), *now[1:])
        outputs = []
        for gates in entry:
            now = _cell(layer.kind, gates, F.linear(now[0], recurrent, bias), now)
            now = (layer.activations(now[0]), *now[1:])
            outputs.append(now[0])
        steps = torch.stack(outputs)
        ends.append(now)
    final = tuple(torch.stack(part) for part in zip(*ends))
    y = steps.transpose(0, 1) if batch_first else steps
    return y, final if layer.kind == "LSTM" else final[0]


def _cell(kind: str, entry: Tensor, recurrent: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if kind == "LSTM":
        i, f, g, o = (entry + recurrent).chunk(4, -1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    (ri, zi, ni), (rh, zh, nh) = entry.chunk(3, -1), recurrent.chunk(3, -1)
    z = (zi + zh).sigmoid()
    return ((1 - z) * (ni + (ri + rh).sigmoid() * nh).tanh() + z * state[0],)
