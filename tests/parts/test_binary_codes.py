import itertools

import pytest
import torch

from efficientdnns.errors import ConfigurationError
from efficientdnns.parts.binary_codes import (
    METHODS,
    binary_product,
    decode,
    least_squares,
    multibit_quantize,
    nearest_codes,
    pack_binary,
    unpack_binary,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def errors(w: torch.Tensor, bits: int, **options) -> torch.Tensor:
    return (decode(*multibit_quantize(w, bits, **options)) - w).square().sum(-1)


def relative(w: torch.Tensor, bits: int, **options) -> float:
    return float(errors(w, bits, **options).sum() / w.square().sum())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_codes_are_the_nearest_of_all_sums(bits):
    w, alpha = normal(20, 50), normal(20, bits, seed=1)
    codes = nearest_codes(w, alpha)
    assert codes.abs().eq(1).all()
    patterns = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=bits)))
    best = (w[:, :, None] - (alpha @ patterns.T)[:, None, :]).abs().amin(-1)
    assert torch.allclose((w - decode(alpha, codes)).abs(), best, atol=1e-6)


def test_an_entry_on_the_middle_goes_up():
    assert decode(torch.tensor([[1.0]]), nearest_codes(torch.tensor([[0.0]]), torch.tensor([[1.0]]))) == 1


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_error_never_grows_with_alternations(bits):
    w = normal(100, 64)
    steps = [errors(w, bits, iterations=t) for t in range(6)]
    for before, after in itertools.pairwise(steps):
        assert (after <= before * (1 + 1e-5)).all()
    assert (errors(w, bits) <= errors(w, bits, method="greedy") * (1 + 1e-5)).all()
    assert (errors(w, bits, final_refit=True) <= errors(w, bits) * (1 + 1e-5)).all()


def test_two_bits_alternating_refined_greedy_on_every_row():
    w = normal(400, 64)
    alternating, refined, greedy = (errors(w, 2, method=m) for m in ("alternating", "refined", "greedy"))
    assert (alternating <= refined * (1 + 1e-5)).all()
    assert (refined <= greedy * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", [3, 4])
def test_the_order_of_methods_in_the_mean(bits):
    w = normal(100, 512)
    values = [relative(w, bits, method=m) for m in ("alternating", "refined", "greedy", "balanced")]
    assert values == sorted(values)
    # On Gaussian rows (not on heavier tails) a well scaled uniform grid overtakes from 3 bits on.
    assert relative(w, bits, method="uniform-mse") < min(values[0], relative(w, bits, method="uniform"))


def test_one_bit_is_the_mean_and_the_sign():
    w = normal(5, 30)
    alpha, codes = multibit_quantize(w, 1)
    assert torch.allclose(alpha[:, 0], w.abs().mean(-1))
    assert torch.equal(codes[:, 0], torch.where(w >= 0, 1, -1).to(torch.int8))


@pytest.mark.parametrize(
    ("bits", "expected"), [(2, (0.131, 0.126, 0.120)), (3, (0.059, 0.051, 0.046)), (4, (0.034, 0.025, 0.021))]
)
def test_relative_error_on_gaussian_rows(bits, expected):
    w = normal(200, 1024)
    got = [relative(w, bits, method=m) for m in ("greedy", "refined", "alternating")]
    assert got == pytest.approx(expected, rel=0.05)


def test_relative_error_on_laplace_rows():
    uniform = torch.rand(200, 1024, generator=torch.Generator().manual_seed(0)) - 0.5
    w = -uniform.sign() * (1 - 2 * uniform.abs()).clamp(min=1e-6).log()
    got = [relative(w, 2, method=m) for m in ("greedy", "refined", "alternating")]
    assert got == pytest.approx((0.228, 0.208, 0.183), rel=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_scale_and_sign(method):
    w = normal(10, 64)
    alpha, codes = multibit_quantize(w, 3, method=method)
    scaled, same = multibit_quantize(4 * w, 3, method=method)
    assert torch.equal(codes, same)
    assert torch.allclose(scaled, 4 * alpha)
    if method != "balanced":
        assert torch.allclose(decode(*multibit_quantize(-w, 3, method=method)), -decode(alpha, codes), atol=1e-5)


def test_uniform_has_its_levels():
    w = torch.tensor([[-2.0, -1.0, 0.1, 0.9, 2.0]])
    assert torch.allclose(
        decode(*multibit_quantize(w, 2, method="uniform")), torch.tensor([[-2, -2 / 3, 2 / 3, 2 / 3, 2]])
    )


def test_balanced_fills_its_intervals_equally():
    values, counts = decode(*multibit_quantize(normal(1, 64), 2, method="balanced")).unique(return_counts=True)
    assert len(values) == 4
    assert counts.tolist() == [16] * 4


@pytest.mark.parametrize("method", METHODS)
def test_degenerate_rows(method):
    w = torch.stack([torch.zeros(16), torch.ones(16), torch.tensor([1.0, -1.0] * 8)])
    alpha, codes = multibit_quantize(w, 3, method=method)
    assert alpha.isfinite().all()
    assert decode(alpha, codes)[0].abs().max() < 1e-6
    if method in ("alternating", "refined", "greedy", "uniform"):
        assert torch.allclose(decode(alpha, codes), w, atol=1e-5)


def test_equal_codes_share_the_coefficient():
    codes = torch.ones(1, 2, 8)
    assert torch.allclose(least_squares(torch.full((1, 8), 3.0), codes), torch.tensor([[1.5, 1.5]]), atol=1e-4)


def test_any_dimension_and_shape():
    w = normal(3, 5, 16)
    alpha, codes = multibit_quantize(w, 2, dim=1)
    assert alpha.shape == (3, 16, 2)
    assert codes.shape == (3, 16, 2, 5)
    assert torch.equal(decode(alpha, codes)[1, 4], decode(*multibit_quantize(w[1, :, 4], 2)))


@pytest.mark.parametrize("n", [1, 7, 8, 65])
def test_packing(n):
    codes = torch.where(normal(4, 3, n) > 0, 1, -1).to(torch.int8)
    packed = pack_binary(codes)
    assert packed.shape == (4, 3, -(-n // 8))
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_binary(packed, n), codes)


def test_the_product_of_codes_is_the_dense_product():
    w, h = normal(12, 37), normal(5, 37, seed=1)
    (aw, bw), (ah, bh) = multibit_quantize(w, 3), multibit_quantize(h, 2)
    dense = decode(ah, bh) @ decode(aw, bw).T
    assert torch.allclose(binary_product(aw, pack_binary(bw), ah, pack_binary(bh), 37), dense, atol=1e-4)


def test_bad_arguments():
    with pytest.raises(ConfigurationError, match="9 bits, expected 1 to 8"):
        multibit_quantize(normal(2, 8), 9)
    with pytest.raises(ConfigurationError, match="no binary coding"):
        multibit_quantize(normal(2, 8), 2, method="best")
