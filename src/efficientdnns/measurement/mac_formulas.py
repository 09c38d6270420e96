"""Multiply-accumulates of each ATen operation that multiplies matrices, from the tensors it was called with.

Every formula has the operation's own arguments after ``output``, its result. Operations that are not listed here count
with half of PyTorch's own formula (`torch.utils.flop_counter`, which counts a multiplication and an addition as two) if
it has one, and zero otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

Formula = Callable[..., int]


def product(output: Tensor, left: Tensor, *_: Any, **__: Any) -> int:
    """``left @ right``: each output element sums ``k`` products, ``k`` the last dimension of ``left``."""
    return output.numel() * left.shape[-1]


def added_product(output: Tensor, addend: Tensor, left: Tensor, *_: Any, **__: Any) -> int:
    """``addend + left @ right``; the addition is not counted."""
    return product(output, left)


def summed_product(output: Tensor, addend: Tensor, left: Tensor, right: Tensor, **_: Any) -> int:
    """``addend + sum over the batch of left @ right``, shapes (b, m, k) and (b, k, n)."""
    return left.numel() * right.shape[-1]


def trilinear(
    output: Tensor,
    first: Tensor,
    second: Tensor,
    third: Tensor,
    expand_first: list[int],
    expand_second: list[int],
    expand_third: list[int],
    summed: list[int],
    *_: Any,
    **__: Any,
) -> int:
    """``nn.Bilinear``: ``first`` times ``second``, summed over the dimensions ``third`` lacks, then times ``third``."""
    shapes = []
    for tensor, expanded in ((first, expand_first), (second, expand_second), (third, expand_third)):
        shape = list(tensor.shape)
        for dimension in sorted(expanded):
            shape.insert(dimension, 1)
        shapes.append(shape)
    pair = [max(sizes) for sizes in zip(*shapes[:2], strict=True)]
    gone = set(summed) & set(expand_third)
    left = [1 if i in gone else size for i, size in enumerate(pair)]
    return prod(pair) + prod(max(sizes) for sizes in zip(left, shapes[2], strict=True))


def convolution(
    output: Tensor,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = None,
    padding: Any = None,
    dilation: Any = None,
    transposed: bool = False,
    *_: Any,
    **__: Any,
) -> int:
    """Convolution of any dimension, grouped, dilated or transposed.

    A filter bank (out, in / groups, k...) makes in / groups * k products for each *output* element; a transposed one
    (in, out / groups, k...) makes out / groups * k for each *input* element. Positions in the padding count.
    """
    return (inputs if transposed else output).numel() * prod(weight.shape[1:])


def forward_convolution(output: Tensor, inputs: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """The kernels of one backend, which are never transposed and order their other arguments differently."""
    return convolution(output, inputs, weight)


def attention(output: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Scaled dot-product attention, (..., heads, length, size): queries times keys, then probabilities times values.

    The heads of the queries count, so grouped keys and values are right. Masked positions, causal ones too, count.
    """
    return prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _lengths(tokens: Tensor) -> list[int]:
    """Tokens of each sequence of a (batch, length, features) tensor, padded or nested."""
    if tokens.is_nested:
        return [int(length) for length in tokens._nested_tensor_size()[:, 0]]
    return [tokens.shape[1]] * tokens.shape[0]


def multi_head_attention(
    output: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    width: int,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    *_: Any,
    **__: Any,
) -> int:
    """The fused ``nn.MultiheadAttention``: four projections of width x width and the attention itself."""
    pairs = list(zip(_lengths(query), _lengths(key), strict=True))
    projections = sum(2 * queries + 2 * keys for queries, keys in pairs) * width * width
    return projections + sum(2 * queries * keys for queries, keys in pairs) * width


def encoder_layer(
    output: Tensor,
    source: Tensor,
    width: int,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    *rest: Any,
    **__: Any,
) -> int:
    """The fused ``nn.TransformerEncoderLayer``: every weight matrix once per token, and the attention.

    ``rest`` goes on with use_gelu, norm_first, eps, the two norms (four vectors), and the feed-forward weights, each
    followed by its bias.
    """
    up, down = rest[7], rest[9]
    lengths = _lengths(source)
    dense = qkv_weight.numel() + out_weight.numel() + up.numel() + down.numel()
    return sum(lengths) * dense + 2 * sum(length * length for length in lengths) * width


def recurrent_layer(output: Any, inputs: Tensor, input_weight: Tensor, state_weight: Tensor, *_: Any, **__: Any) -> int:
    """One layer and direction on (steps, batch, features): both weight matrices once per step."""
    return prod(inputs.shape[:-1]) * (input_weight.numel() + state_weight.numel())


def _all_matrices(inputs: Tensor, parameters: list[Tensor]) -> int:
    return prod(inputs.shape[:-1]) * sum(weight.numel() for weight in parameters if weight.dim() == 2)


def recurrent(output: Any, inputs: Tensor, *arguments: Any, **_: Any) -> int:
    """A whole LSTM, GRU or RNN: every matrix of every layer and direction once per step of every sequence.

    ``inputs`` is (steps, batch, features), (batch, steps, features) or packed (total steps, features). The parameters
    are the last list of tensors: the states, of which an LSTM has a list too, come first.
    """
    lists = [argument for argument in arguments if isinstance(argument, (list, tuple)) and len(argument) > 0]
    return _all_matrices(inputs, [list(tensors) for tensors in lists if isinstance(tensors[0], Tensor)][-1])


def cudnn_recurrent(output: Any, inputs: Tensor, weights: list[Tensor], *_: Any, **__: Any) -> int:
    """A whole LSTM, GRU or RNN in cuDNN or MIOpen, whose weights come second."""
    return _all_matrices(inputs, weights)


_NAMES: dict[Formula, str] = {
    product: "mm bmm mv dot vdot _int_mm _scaled_mm _weight_int8pack_mm _weight_int4pack_mm"
    " _weight_int4pack_mm_for_cpu mkldnn_linear",
    added_product: "addmm addmm_ addmv addmv_ baddbmm baddbmm_ _addmm_activation _sparse_addmm",
    summed_product: "addbmm addbmm_",
    trilinear: "_trilinear",
    convolution: "convolution _convolution convolution_overrideable",
    forward_convolution: "cudnn_convolution cudnn_convolution_relu mkldnn_convolution _slow_conv2d_forward"
    " _conv_depthwise2d conv_depthwise3d _nnpack_spatial_convolution",
    attention: "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention"
    " _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"
    " _scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math_for_mps",
    multi_head_attention: "_native_multi_head_attention _triton_multi_head_attention",
    encoder_layer: "_transformer_encoder_layer_fwd",
    recurrent_layer: "mkldnn_rnn_layer",
    recurrent: "lstm gru rnn_tanh rnn_relu",
    cudnn_recurrent: "_cudnn_rnn miopen_rnn",
}

FORMULAS: dict[Any, Formula] = {
    getattr(torch.ops.aten, name): formula
    for formula, names in _NAMES.items()
    for name in names.split()
    if hasattr(torch.ops.aten, name)
}
"""ATen operation (its overload packet) -> multiply-accumulates. A kernel that this PyTorch lacks is left out."""


def macs_of(operation: Any, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Return the multiply-accumulates of one call, None if no formula knows the operation.

    Args:
        operation: the overload packet, for instance ``torch.ops.aten.addmm``, or a higher-order operator.
        output: what the call returned; where it is a tuple, the formulas look at its first tensor.
    """
    if operation in FORMULAS:
        first = output[0] if isinstance(output, (tuple, list)) else output
        return FORMULAS[operation](first, *args, **kwargs)
    if operation in flop_registry:
        return int(flop_registry[operation](*args, **kwargs, out_val=output)) // 2
    return None


def has_formula(operation: Any) -> bool:
    """Return whether :func:`macs_of` knows the operation."""
    return operation in FORMULAS or operation in flop_registry
