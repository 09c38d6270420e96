"""From an ONNX graph in real numbers to one in which ONNX Runtime finds integers everywhere it has kernels for them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from efficientdnns.parts.integer_layers import IntegerLayer, QuantizedConv2d

MOVING = {
    *("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Slice", "Gather", "Pad", "Concat"),
    *("MaxPool", "Split", "Expand", "DepthToSpace"),
}
"""Operations whose outputs are some of their inputs' numbers: they stay on the grid."""
FUSED = {"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid"}
"""Operations for which ONNX Runtime has integer kernels, beside convolutions and matrix products."""


@dataclass(frozen=True)
class Grid:
    """Scale and zero point of uint8 numbers."""

    scale: float
    zero_point: int

    @classmethod
    def of(cls, scale: Tensor, zero_point: Tensor) -> Grid:
        """From a grid of int8: 128 more on the numbers and on the zero point changes nothing."""
        return cls(float(scale), int(zero_point) + 128)

    @classmethod
    def between(cls, low: float, high: float) -> Grid:
        """The grid of a range, widened to hold 0."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = float(np.float32((high - low) / 255)) or 1.0
        return cls(scale, round(-low / scale))

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest number."""
        return -self.scale * self.zero_point, self.scale * (255 - self.zero_point)


class Rewriter:
    """Rewrites an ONNX graph in place, node by node in order. The nodes of an integer layer are called ``layer/number``.

    A tensor has a real form, an integer form or both. Integer layers take integers, and give integers where they have an
    output grid. A `MOVING` operation on a tensor that has integers moves these. The result of a `FUSED` operation on
    integers is rounded to the grid of the integer layer that reads it, and is those integers for whatever else reads it;
    where another fused operation stands between, to the grid of its largest possible range. Real forms are made from
    integers only where something needs them.

    Args:
        graph: the graph; weights of integer layers are initialisers called ``prefix + name + ".weight"``.
        layers: the integer layers by name.
    """

    def __init__(self, graph: Any, layers: Mapping[str, IntegerLayer], prefix: str = "network.") -> None:
        self.graph, self.prefix = graph, prefix
        self.layers = {f"{prefix}{name}.weight": layer for name, layer in layers.items()}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.outputs = [value.name for value in graph.output]
        self.rank = {value.name: len(value.type.tensor_type.shape.dim) for value in (*graph.value_info, *graph.input)}
        self.producer = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self.nodes: list[Any] = []
        self.real: dict[str, str] = {}
        self.integers: dict[str, tuple[str, Grid]] = {}
        self.made: dict[Any, str] = {}
        self.done: set[str] = set()
        self.layer = ""

    def rewrite(self) -> None:
        """Rewrite the graph."""
        for node in list(self.graph.node):
            if node.output[0] not in self.done:
                weight = next((name for name in node.input if name in self.layers), "")
                self.layer = weight.removeprefix(self.prefix).removesuffix(".weight")
                if weight:
                    self._layer(node, self.layers[weight])
                elif not self._move(node) and not self._fuse(node):
                    self._keep(node)
        for name in self.outputs:
            self._name_output(name, self._real(name))
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        kept = [tensor for name, tensor in self.constants.items() if name not in self.layers]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)

    def _name_output(self, name: str, real: str) -> None:
        """Give a tensor the name of an output of the graph."""
        node = next((node for node in self.nodes if real in node.output), None)
        if real == name:
            return
        if node is None or real in self.outputs or any(real in reader.input for reader in self.nodes):
            self._emit("Identity", [real], [name])
        else:
            node.output[list(node.output).index(real)] = name

    # Nodes of the old graph

    def _layer(self, node: Any, layer: IntegerLayer) -> None:
        result = node.output[0]
        if layer.options["activation"] != "none":  # the activation belongs to the layer, and so does its node
            result = self.readers[result][0].output[0]
            self.done.add(result)
        source = node.input[0]
        if layer.options["dynamic"]:
            self.real[result] = self._activation(self._dynamic(node, layer), layer)
            return
        grid = Grid.of(layer.input_scale, layer.input_zero_point)
        x = self._dequantize(self._on(source, grid), grid)
        if isinstance(layer, QuantizedConv2d) or self.rank.get(source) == 2:
            y = self._with_integer_bias(x, node, layer, grid)
        else:
            weight = self._parameter(layer.weight.T, layer.weight_scale, axis=1, zero_point=True)
            y = self._add_bias(self._emit("MatMul", [x, weight]), layer, layer.input_scale * layer.weight_scale)
        if not layer.options["requantized"]:
            self.real[result] = self._activation(y, layer)
            return
        output = Grid.of(layer.output_scale, layer.output_zero_point)
        # A grid that ends where the activation does clamps by itself.
        if tuple(int(limit) for limit in layer.limits()) != (-128, 127):
            y = self._activation(y, layer)
        self.integers[result] = self._quantize(y, output), output

    def _with_integer_bias(self, x: str, node: Any, layer: IntegerLayer, grid: Grid) -> str:
        linear = not isinstance(layer, QuantizedConv2d)
        inputs = [x, self._parameter(layer.weight, layer.weight_scale, zero_point=linear)]
        if layer.bias is not None:
            inputs.append(self._parameter(layer.bias, layer.weight_scale * grid.scale))
        return self._emit("Gemm", inputs, transB=1) if linear else self._emit("Conv", inputs, like=node)

    def _dynamic(self, node: Any, layer: IntegerLayer) -> str:
        """Integers of the range of this batch, as our layer makes them."""
        x, scale, zero = (self._name() for _ in range(3))
        self._emit("DynamicQuantizeLinear", [self._real(node.input[0])], [x, scale, zero])
        convolution = isinstance(layer, QuantizedConv2d)
        weight = self._constant((layer.weight if convolution else layer.weight.T).numpy())
        if convolution:
            y = self._emit("ConvInteger", [x, weight, zero], like=node)
        else:
            y = self._emit("MatMulInteger", [x, weight, zero])
        steps = layer.weight_scale.reshape(-1, 1, 1) if convolution else layer.weight_scale
        factor = self._emit("Mul", [scale, self._constant(steps.numpy())])
        y = self._emit("Mul", [self._emit("Cast", [y], to=1), factor])
        return self._add_bias(y, layer, None)

    def _move(self, node: Any) -> bool:
        """Carry out an operation on integers where it only moves numbers; says whether it did."""
        found = self.integers.get(node.input[0]) if node.op_type in MOVING else None
        if found is None:
            return False
        inputs, grid = [found[0], *node.input[1:]], found[1]
        zero = np.uint8(grid.zero_point)
        if node.op_type == "Pad":
            value = self._array(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
            if value is None or value.any() or self._attribute(node, "mode", b"constant") != b"constant":
                return False
            inputs = [found[0], node.input[1], self._constant(zero), *node.input[3:]]
        if node.op_type == "Concat":
            parts = [self.integers[name][0] if name in self.integers else None for name in node.input]
            if any(
                self.integers[name][1] != grid if part else not self._is_zero(name)
                for name, part in zip(node.input, parts)
            ):
                return False
            inputs = [part or self._on(name, grid) for name, part in zip(node.input, parts)]
        outputs = [self._name() for _ in node.output]
        self._emit(node.op_type, inputs, outputs, like=node)
        self.integers.update({old: (new, grid) for old, new in zip(node.output, outputs)})
        return True

    def _fuse(self, node: Any) -> bool:
        """Carry out an operation that has an integer kernel so that the kernel is found; says whether it did."""
        pools = self._is_global_average(node)
        sources = node.input[: 1 if pools else None]
        if not (pools or node.op_type in FUSED) or any(name not in self.integers for name in sources):
            return False
        result = node.output[0]
        readers = self.readers[result]
        relu = len(readers) == 1 and readers[0].op_type == "Relu" and result not in self.outputs
        result = readers[0].output[0] if relu else result
        grid = self._grid_for(node, result, relu)
        if grid is None:
            return False
        if relu:
            self.done.add(result)
        operands = [self._dequantize(*self.integers[name]) for name in sources]
        y = self._emit("GlobalAveragePool" if pools else node.op_type, operands, like=None if pools else node)
        if relu and grid.zero_point:
            y = self._emit("Relu", [y])
        integers = self._quantize(y, grid)
        if pools and not self._attribute(node, "keepdims", 1) and node.op_type == "ReduceMean":
            integers = self._emit("Flatten", [integers])
        self.integers[result] = integers, grid
        return True

    def _keep(self, node: Any) -> None:
        new = type(node)()
        new.CopyFrom(node)
        new.input[:] = [self._real(name) for name in node.input]
        self.nodes.append(new)
        for name in node.output:
            # What an integer layer and an addition read is added as the integers that the layer takes.
            grid = self._wanted(name, set())
            if isinstance(grid, Grid) and any(reader.op_type in FUSED | MOVING for reader in self.readers[name]):
                self.real[name] = name
                self.integers[name] = self._on(name, grid), grid

    # Grids

    def _grid_for(self, node: Any, result: str, relu: bool) -> Grid | None:
        """The grid of a fused operation's result, None where nothing reads it as integers."""
        wanted = self._wanted(result, set())
        if isinstance(wanted, Grid) or wanted is None:
            return wanted
        grids = [self.integers[name][1] for name in node.input if name in self.integers]
        low, high = zip(*(grid.range for grid in grids))
        if node.op_type == "Add":
            ends = sum(low), sum(high)
        elif node.op_type == "Mul":
            products = [a * b for a in grids[0].range for b in grids[-1].range]
            ends = min(products), max(products)
        elif node.op_type == "Sigmoid":
            ends = 0.0, 1.0
        else:
            ends = min(low), max(high)
        return Grid.between(0.0 if relu else ends[0], ends[1])

    def _wanted(self, name: str, seen: set[str]) -> Grid | bool | None:
        """The grid on which an integer layer reads a tensor; True where only fused operations do; None for nothing."""
        fused: bool | None = None
        if name in seen:
            return None
        seen.add(name)
        for reader in self.readers[name]:
            layer = next((self.layers[part] for part in reader.input if part in self.layers), None)
            found: Grid | bool | None = None
            if layer is not None and not layer.options["dynamic"]:
                found = Grid.of(layer.input_scale, layer.input_zero_point)
            elif reader.op_type in MOVING and reader.op_type != "Concat" and reader.input[0] == name:
                found = self._wanted(reader.output[0], seen)
            elif reader.op_type in FUSED or self._is_global_average(reader):
                after = self._wanted(reader.output[0], seen) or self._wanted(self._beyond_relu(reader.output[0]), seen)
                found = True if after else None
            if isinstance(found, Grid):
                return found
            fused = fused or found
        return fused

    def _beyond_relu(self, name: str) -> str:
        return next((str(node.output[0]) for node in self.readers[name] if node.op_type == "Relu"), name)

    # What is known about the old graph

    def _is_zero(self, name: str) -> bool:
        """Whether a tensor is zeros whatever the input."""
        node = self.producer.get(name)
        if node is not None and node.op_type == "ConstantOfShape":
            return not any(self._values(attribute.t).any() for attribute in node.attribute)
        array = self._array(name)
        return array is not None and not array.any()

    def _is_global_average(self, node: Any) -> bool:
        if node.op_type != "ReduceMean" or self.rank.get(node.input[0]) != 4 or len(node.input) < 2:
            return node.op_type == "GlobalAveragePool"
        axes = self._array(node.input[1])
        return axes is not None and {int(axis) % 4 for axis in axes} == {2, 3}

    def _attribute(self, node: Any, name: str, default: Any) -> Any:
        from onnx import helper

        return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)

    def _array(self, name: str) -> NDArray[Any] | None:
        return self._values(self.constants[name]) if name in self.constants else None

    @staticmethod
    def _values(tensor: Any) -> NDArray[Any]:
        from onnx import numpy_helper

        return numpy_helper.to_array(tensor)

    # Forms of a tensor

    def _real(self, name: str) -> str:
        """The real form of a tensor of the old graph."""
        if name not in self.real and name in self.integers:
            return self._dequantize(*self.integers[name])
        return self.real.get(name, name)

    def _on(self, name: str, grid: Grid) -> str:
        """The integers of a tensor of the old graph on ``grid``."""
        if name in self.integers and self.integers[name][1] == grid:
            return self.integers[name][0]
        key = "on", name, grid
        if key not in self.made:
            self.made[key] = self._quantize(self._real(name), grid)
        return self.made[key]

    # Nodes of the new graph

    def _activation(self, y: str, layer: IntegerLayer) -> str:
        activation = layer.options["activation"]
        if activation == "relu6":
            return self._emit("Clip", [y, self._constant(np.float32(0)), self._constant(np.float32(6))])
        return y if activation == "none" else self._emit("Relu", [y])

    def _add_bias(self, y: str, layer: IntegerLayer, step: Tensor | None) -> str:
        if layer.bias is None:
            return y
        bias = layer.bias if step is None else layer.bias.double() * step.double()
        shape = (-1, 1, 1) if isinstance(layer, QuantizedConv2d) else (-1,)
        return self._emit("Add", [y, self._constant(bias.float().reshape(shape).numpy())])

    def _parameter(self, integers: Tensor, step: Tensor, axis: int = 0, zero_point: bool = False) -> str:
        inputs = [self._constant(integers.numpy()), self._constant(step.float().numpy())]
        if zero_point:  # of 0; without it ONNX Runtime does not find its integer matrix product
            inputs.append(self._constant(np.zeros(tuple(step.shape), np.int8)))
        axes: dict[str, Any] = {"axis": axis} if step.dim() else {}
        return self._emit("DequantizeLinear", inputs, **axes)

    def _quantize(self, real: str, grid: Grid) -> str:
        return self._emit("QuantizeLinear", [real, *self._of(grid)])

    def _dequantize(self, integers: str, grid: Grid) -> str:
        key = "real", integers, grid
        if key not in self.made:
            self.made[key] = self._emit("DequantizeLinear", [integers, *self._of(grid)])
        return self.made[key]

    def _of(self, grid: Grid) -> list[str]:
        return [self._constant(np.float32(grid.scale)), self._constant(np.uint8(grid.zero_point))]

    def _constant(self, values: Any) -> str:
        """The name of an initialiser; equal ones of one element are one."""
        from onnx import numpy_helper

        array = np.ascontiguousarray(values) if np.ndim(values) else np.asarray(values)
        key = ("constant", array.dtype.str, array.tobytes()) if array.ndim == 0 else ("array", len(self.made))
        if key not in self.made:
            self.made[key] = name = self._name()
            self.constants[name] = numpy_helper.from_array(array, name)
        return self.made[key]

    def _name(self) -> str:
        self.made["name", len(self.made)] = name = f"integer.{len(self.made)}"
        return name

    def _emit(
        self, operation: str, inputs: list[str], outputs: list[str] | None = None, like: Any = None, **attributes: Any
    ) -> str:
        from onnx import helper

        names = outputs or [self._name()]
        name = f"{self.layer}/{len(self.nodes)}" if self.layer else ""
        node = helper.make_node(operation, inputs, names, name, **attributes)
        if like is not None:
            node.attribute.extend(like.attribute)
        self.nodes.append(node)
        return names[0]
