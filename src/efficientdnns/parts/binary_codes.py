r"""Multi-bit binary codes: a row of numbers as a sum of k scaled sign vectors, :math:`w \approx \sum_i \alpha_i b_i`.

The quantizer of Xu et al. (https://arxiv.org/abs/1802.00150) with the baselines of the paper, and the packing of codes
into bytes.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from efficientdnns.coding.bits import pack_bools, unpack_bools
from efficientdnns.errors import ConfigurationError

CodeMethod = Literal["alternating", "refined", "greedy", "uniform", "uniform-mse", "balanced"]
METHODS: tuple[CodeMethod, ...] = ("alternating", "refined", "greedy", "uniform", "uniform-mse", "balanced")


def multibit_quantize(
    w: Tensor,
    bits: int,
    *,
    dim: int = -1,
    iterations: int = 2,
    method: CodeMethod = "alternating",
    final_refit: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Approximate every vector along ``dim`` by ``bits`` scaled sign vectors: :math:`\min \|w - \sum_i \alpha_i
    b_i\|^2`.

    - greedy: :math:`\alpha_i = \mathrm{mean}|r|, b_i = \mathrm{sign}(r)` of what the codes before it leave, r (sign(0)
      = +1).
    - refined: greedy, and after each new code all coefficients anew by least squares.
    - alternating: from greedy, ``iterations`` times least-squares coefficients, then for each entry the nearest of all
      2^k sums.
    - uniform: 2^k equally spaced levels from -max|w| to max|w|; uniform-mse: with the largest level of least squared
      error;
      balanced: equally populated intervals on the levels of uniform.

    Args:
        w: any shape (..., n, ...), n along ``dim``; the other dimensions are the rows, in order.
        bits: k, 1 to 8.
        iterations: T; 2 in the paper, 0 leaves the start.
        final_refit: one more least squares at the end (the paper ends with a code update, its coefficients half a step
            old).

    Returns:
        alpha (..., k) in the type of ``w`` and codes (..., k, n) in {-1, +1} as int8.
    """
    if not 1 <= bits <= 8:
        raise ConfigurationError(f"binary codes of {bits} bits, expected 1 to 8")
    if method not in METHODS:
        raise ConfigurationError(f"no binary coding is called '{method}', expected one of {', '.join(METHODS)}")
    moved = w.detach().movedim(dim, -1)
    rows = moved.reshape(-1, moved.shape[-1])
    if method in ("uniform", "uniform-mse", "balanced"):
        alpha, codes = _on_levels(rows, bits, method)
    else:
        alpha, codes = _greedy(rows, bits, refine=method == "refined")
        if method == "alternating":
            for _ in range(iterations):
                alpha = least_squares(rows, codes)
                codes = nearest_codes(rows, alpha)
    if final_refit:
        alpha = least_squares(rows, codes)
    lead = moved.shape[:-1]
    return alpha.view(*lead, bits), codes.to(torch.int8).view(*lead, bits, -1)


def decode(alpha: Tensor, codes: Tensor) -> Tensor:
    """The vectors sum_i alpha_i b_i: alpha (..., k) and codes (..., k, n) give (..., n)."""
    return (alpha.unsqueeze(-1) * codes.to(alpha.dtype)).sum(-2)


def least_squares(rows: Tensor, codes: Tensor) -> Tensor:
    r"""Coefficients :math:`(B^T B)^{-1} B^T w` of each row: rows (r, n), codes (r, k, n) give (r, k).

    A ridge of 1e-9 n keeps equal codes from dividing by zero; they then share the coefficient.
    """
    codes = codes.to(rows.dtype)
    n = rows.shape[-1]
    gram = (codes @ codes.mT).double()
    gram.diagonal(dim1=-2, dim2=-1).add_(1e-9 * n)
    right = (codes @ rows.unsqueeze(-1)).double()
    return torch.linalg.solve(gram, right).squeeze(-1).to(rows.dtype)


def nearest_codes(rows: Tensor, alpha: Tensor) -> Tensor:
    """Give each entry the nearest of the 2^k sums of its row's coefficients, with k comparisons (binary search).

    An entry on the middle between two sums takes the upper one. rows (r, n), alpha (r, k) give codes (r, k, n).
    """
    signs = _sign_patterns(alpha.shape[-1], rows)
    sums, order = (alpha @ signs.T).sort(dim=-1)
    middles = (sums[:, 1:] + sums[:, :-1]) / 2
    position = torch.searchsorted(middles.contiguous(), rows.contiguous(), right=True)
    pattern = order.gather(1, position)
    return signs[pattern].mT


def _sign_patterns(bits: int, like: Tensor) -> Tensor:
    """All 2^k sign patterns, (2^k, k)."""
    number = torch.arange(1 << bits, device=like.device)
    places = torch.arange(bits, device=like.device)
    return ((number[:, None] >> places & 1) * 2 - 1).to(like.dtype)


def _sign(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def _greedy(rows: Tensor, bits: int, refine: bool) -> tuple[Tensor, Tensor]:
    residual, alphas, codes = rows, [], []
    for _ in range(bits):
        code = _sign(residual)
        alphas.append(residual.abs().mean(-1))
        codes.append(code)
        if refine:
            alphas = list(least_squares(rows, torch.stack(codes, 1)).unbind(-1))
            residual = rows - decode(torch.stack(alphas, -1), torch.stack(codes, 1))
        else:
            residual = residual - alphas[-1].unsqueeze(-1) * code
    return torch.stack(alphas, -1), torch.stack(codes, 1)


def _on_levels(rows: Tensor, bits: int, method: str) -> tuple[Tensor, Tensor]:
    """Level m in 0 .. 2^k - 1 is worth c (2 m / (2^k - 1) - 1), which is sum_i alpha_i b_i with alpha_i = c 2^i /
    (2^k - 1)."""
    top = (1 << bits) - 1
    ceiling = rows.abs().amax(-1, keepdim=True)
    # A row of zeros has no scale of its own.
    ceiling = torch.where(ceiling > 0, ceiling, torch.ones_like(ceiling))

    def level_of(c: Tensor) -> Tensor:
        return ((rows / c + 1) * top / 2).round().clamp(0, top)

    if method == "balanced":
        rank = rows.argsort(dim=-1, stable=True).argsort(dim=-1)
        level = (rank * (top + 1)).div(rows.shape[-1], rounding_mode="floor").to(rows.dtype)
    elif method == "uniform-mse":
        best = torch.full_like(ceiling, float("inf"))
        chosen = ceiling
        for share in np.geomspace(0.05, 1.0, 60):
            c = ceiling * float(share)
            error = (c * (2 * level_of(c) / top - 1) - rows).square().sum(-1, keepdim=True)
            chosen = torch.where(error < best, c, chosen)
            best = torch.minimum(error, best)
        ceiling, level = chosen, level_of(chosen)
    else:
        level = level_of(ceiling)
    places = torch.arange(bits, device=rows.device)
    codes = ((level.long().unsqueeze(1) >> places[:, None] & 1) * 2 - 1).to(rows.dtype)
    alpha = ceiling * (2.0**places).to(rows.dtype) / top
    return alpha * (rows.abs().amax(-1, keepdim=True) > 0), codes


def pack_binary(codes: Tensor) -> Tensor:
    """Pack signs (..., n) eight to the byte, each vector starting on a byte of its own: uint8 (..., ceil(n / 8)); +1
    is a 1 bit."""
    lead, n = codes.shape[:-1], codes.shape[-1]
    bits = np.zeros((*lead, -(-n // 8) * 8), dtype=bool)
    bits[..., :n] = (codes > 0).cpu().numpy()
    packed = np.frombuffer(pack_bools(bits), dtype=np.uint8).copy()
    return torch.from_numpy(packed).view(*lead, -1).to(codes.device)


def unpack_binary(packed: Tensor, n: int) -> Tensor:
    """Undo `pack_binary`: int8 signs (..., n) in {-1, +1}."""
    if torch.compiler.is_exporting():  # the graph of a file: in operations that every runtime has
        number, low = packed.float().unsqueeze(-1), 2.0 ** -torch.arange(8)
        bits = (number * low).floor() - 2 * (number * low / 2).floor()
        return (2 * bits - 1).flatten(-2)[..., :n].to(torch.int8)
    data = packed.cpu().contiguous().numpy()
    signs = unpack_bools(data.tobytes(), data.size * 8).reshape(*data.shape[:-1], -1)[..., :n]
    return torch.from_numpy(signs.astype(np.int8) * 2 - 1).to(packed.device)


_ONES = torch.tensor([bin(byte).count("1") for byte in range(256)])


def binary_product(alpha: Tensor, packed: Tensor, alpha_h: Tensor, packed_h: Tensor, n: int) -> Tensor:
    r"""Matrix-vector products on the codes alone: :math:`\sum_{ij} \alpha^w_i \alpha^h_j (B^w_i b^h_j)`, by exclusive
    or and bit counts.

    A product of two sign vectors of n entries is n - 2 popcount(a xor b). The reference for kernels on packed codes,
    not a fast one.

    Args:
        alpha, packed: coefficients (m, k) and packed codes (m, k, bytes) of the matrix.
        alpha_h, packed_h: coefficients (batch, l) and packed codes (batch, l, bytes) of the vectors.
        n: entries of a vector; the bits that fill up its last byte are equal on both sides and count nothing.

    Returns:
        (batch, m).
    """
    differing = packed[None, :, :, None] ^ packed_h[:, None, None, :]
    ones = _ONES.to(packed.device)[differing.long()].sum(-1)
    return torch.einsum("mk,bl,bmkl->bm", alpha, alpha_h, (n - 2 * ones).to(alpha.dtype))
