"""torch's 4-bit kernels: products of codes in groups, and of what ggml's blocks hold of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from remoe_adapt.errors import ConfigError, UncacheableError
from remoe_adapt.expert_cache.encodings import (
    Q4_0,
    Q4_1,
    Q4_K,
    Q8_0,
    BlockType,
    code_groups,
    dequantise,
    torch_int4,
)

# bf16 has eight bits, and (code - 8) * scale may cancel with the zero.
TOLERANCE = 1e-2


def groups(rows: int, cols: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    num_groups = -(-cols // group)
    codes_NK = torch.randint(0, 16, (rows, cols), dtype=torch.uint8)
    return codes_NK, torch.rand(rows, num_groups) + 0.5, torch.randn(rows, num_groups)


def exact(codes_NK: Tensor, scales_NG: Tensor, minima_NG: Tensor, group: int) -> Tensor:
    scales_NK, minima_NK = (
        part.repeat_interleave(group, dim=1)[:, : codes_NK.shape[1]] for part in (scales_NG, minima_NG)
    )
    return codes_NK * scales_NK + minima_NK


def off(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape and found.dtype == torch.float32
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("group", torch_int4.GROUPS)
@pytest.mark.parametrize(("rows", "tokens"), [(16, 1), (50, 3), (7, 20)])
def test_products_are_those_of_exact_arithmetic(group: int, rows: int, tokens: int) -> None:
    # A full group, a half one at the end, and less than a group.
    for cols in (group, 2 * group + group // 2, group // 2):
        codes = groups(rows, cols, group)
        packed_NB, scales_GN2 = torch_int4.pack(*codes, group)
        assert (packed_NB.shape, scales_GN2.shape) == torch_int4.packed_shapes(rows, cols, group)
        assert packed_NB.dtype == torch.uint8 and scales_GN2.dtype == torch.bfloat16
        x_TK = torch.randn(tokens, cols)
        expected = x_TK @ exact(*codes, group).T
        assert off(torch_int4.matmul(x_TK, packed_NB, scales_GN2, rows), expected) < TOLERANCE


def test_other_float_types_no_tokens_and_gradients() -> None:
    packed = torch_int4.pack(*groups(32, 64, 32), 32)
    x_TK = torch.randn(2, 64)
    expected = torch_int4.matmul(x_TK, *packed, 32)
    assert torch.equal(torch_int4.matmul(x_TK.bfloat16(), *packed, 32), expected)
    assert torch.equal(torch_int4.matmul(x_TK.double().requires_grad_(), *packed, 32), expected)
    assert torch_int4.matmul(x_TK[:0], *packed, 32).shape == (0, 32)


def test_symmetric_codes_have_no_zero_of_their_own() -> None:
    codes_NK, scales_NG, _ = groups(16, 64, 32)
    _, scales_GN2 = torch_int4.pack(codes_NK, scales_NG, -8 * scales_NG, 32)
    assert not scales_GN2[:, :, 1].any() and scales_GN2[:, :, 0].all()


@pytest.mark.parametrize("kind", [Q4_0, Q4_1, Q4_K], ids=lambda kind: kind.name)
@pytest.mark.parametrize("cols", [256, 72, 500])
def test_blocks_hold_codes_in_groups(kind: BlockType, cols: int) -> None:
    blocks_NB = torch.randint(0, 256, (20, kind.row_bytes(cols)), dtype=torch.uint8)
    halfs = blocks_NB.view(20, -1, kind.bytes)[:, :, 1 : 2 if kind is Q4_0 else 4 : 2]
    # Scales and minima of about one.
    halfs &= 0b10000011
    halfs |= 0b00111100
    codes_NK, scales_NG, minima_NG = code_groups(blocks_NB, kind, cols)
    assert codes_NK.shape == (20, cols) and scales_NG.shape == minima_NG.shape == (20, -(-cols // 32))
    expected = dequantise(blocks_NB, kind, cols)
    torch.testing.assert_close(exact(codes_NK, scales_NG, minima_NG, 32), expected, rtol=1e-5, atol=1e-5)
    x_TK = torch.randn(2, cols)
    packed = torch_int4.pack(codes_NK, scales_NG, minima_NG, 32)
    assert off(torch_int4.matmul(x_TK, *packed, 20), x_TK @ expected.T) < TOLERANCE


def test_blocks_without_such_codes_are_refused() -> None:
    with pytest.raises(UncacheableError, match="q8_0 blocks hold no 4-bit codes"):
        code_groups(torch.zeros(1, 34, dtype=torch.uint8), Q8_0, 32)
    with pytest.raises(UncacheableError, match="does not hold rows of 33 values"):
        code_groups(torch.zeros(1, 18, dtype=torch.uint8), Q4_0, 33)


def test_codes_and_scales_that_do_not_fit_are_refused() -> None:
    codes_NK, scales_NG, minima_NG = groups(16, 64, 32)
    with pytest.raises(ConfigError, match="Groups of 16 columns"):
        torch_int4.pack(codes_NK, scales_NG, minima_NG, 16)
    with pytest.raises(ConfigError, match=r"do not fit groups of 64: scales and minima are \[16, 1\]"):
        torch_int4.pack(codes_NK, scales_NG, minima_NG, 64)
    with pytest.raises(ConfigError, match="do not fit groups of 32"):
        torch_int4.pack(codes_NK.int(), scales_NG, minima_NG, 32)
    with pytest.raises(ConfigError, match="A code is 17"):
        torch_int4.pack(codes_NK + 2, scales_NG, minima_NG, 32)


def test_inputs_that_do_not_fit_are_refused() -> None:
    packed_NB, scales_GN2 = torch_int4.pack(*groups(16, 64, 32), 32)
    for x in (torch.randn(1, 65), torch.randn(1, 32), torch.randn(64), torch.ones(1, 64, dtype=torch.int32)):
        with pytest.raises(ConfigError, match="do not fit a matrix of 2 groups of 32 columns"):
            torch_int4.matmul(x, packed_NB, scales_GN2, 16)
    for rows in (0, 17, -1):
        with pytest.raises(ConfigError, match=f"do not fit a matrix of {rows} rows"):
            torch_int4.matmul(torch.randn(1, 64), packed_NB, scales_GN2, rows)
    with pytest.raises(ConfigError, match="do not fit"):
        torch_int4.matmul(torch.randn(1, 64), packed_NB, scales_GN2[:, :8], 16)


@pytest.mark.parametrize("rows", [16, 50, 150])
def test_packed_codes_come_back(rows: int) -> None:
    for group in torch_int4.GROUPS:
        codes_NK, scales_NG, minima_NG = groups(rows, group + 8, group)
        packed = torch_int4.pack(codes_NK, torch.ones_like(scales_NG), torch.zeros_like(minima_NG), group)
        # Such scales and zeros are numbers of bf16.
        assert torch.equal(torch_int4.dequantise(*packed, rows, group + 8), codes_NK.float())
        packed = torch_int4.pack(codes_NK, scales_NG, minima_NG, group)
        found = torch_int4.dequantise(*packed, rows, group + 8)
        assert off(found, exact(codes_NK, scales_NG, minima_NG, group)) < TOLERANCE


@pytest.fixture
def afresh() -> Iterator[None]:
    """The self-test runs again inside the test, and after it."""
    torch_int4.is_usable.cache_clear()
    yield
    torch_int4.is_usable.cache_clear()


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("fault", ["missing", "wrong"])
def test_operators_that_fail_their_test_are_not_used(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    packed = torch_int4.pack(*groups(16, 64, 32), 32)
    torch_int4.is_usable.cache_clear()

    def product(*arguments: Any) -> Tensor:
        if fault == "missing":
            raise AttributeError("'_OpNamespace' 'aten' object has no attribute '_weight_int4pack_mm_for_cpu'")
        return 1.1 * original(*arguments)

    original = torch_int4._product
    monkeypatch.setattr(torch_int4, "_product", product)
    assert not torch_int4.is_usable() and not torch_int4.is_usable()
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "torch's 4-bit kernels are not used" in record.getMessage()
    assert "experts are dequantised" in record.getMessage()
    with pytest.raises(ConfigError, match="cannot be used here: dequantise instead"):
        torch_int4.matmul(torch.randn(1, 64), *packed, 16)
    with pytest.raises(ConfigError, match="cannot be used here: dequantise instead"):
        torch_int4.dequantise(*packed, 16, 64)
    with pytest.raises(ConfigError, match="cannot be used here: dequantise instead"):
        torch_int4.pack(*groups(16, 64, 32), 32)
