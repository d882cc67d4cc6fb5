"""Blocks of q4_1 and q8_0: what they are worth is what gguf-py reads of them, and near what can be had."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from remoe_adapt.errors import ConfigError, UncacheableError
from remoe_adapt.expert_cache.encodings.blocks import Q4_0, Q4_1, Q8_0, BlockType, dequantise
from remoe_adapt.expert_cache.encodings.quantise import quantise

# The face has a function of this name.
MODULE = importlib.import_module("remoe_adapt.expert_cache.encodings.quantise")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def heavy(rows: int, cols: int) -> Tensor:
    """Student's t with 4 degrees of freedom: outliers, as real weights have."""
    return numbers(rows, cols) / numbers(rows, cols, 4, seed=1).square().mean(-1).sqrt() * 0.02


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def rounded_to_nearest(weight_NK: Tensor) -> Tensor:
    """What no search gives: 16 even steps between the least and the largest of each group."""
    groups = weight_NK.reshape(-1, 32)
    low, high = groups.amin(1, True), groups.amax(1, True)
    step = ((high - low) / 15).half().float()
    low = low.half().float()
    return (((groups - low) / step).round().clamp(0, 15) * step + low).view(weight_NK.shape)


def exhaustive(weight_NK: Tensor) -> Tensor:
    """16 cuts of the range with two steps of least squares each, scales not rounded: the prototype's search."""
    groups = weight_NK.reshape(-1, 32)
    low, high = groups.amin(1, True), groups.amax(1, True)
    best, least = torch.zeros_like(groups), torch.full_like(low, torch.inf)
    for cut in torch.linspace(0.6, 1.05, 16).tolist():
        step, minimum = (high - low) * cut / 15, (high + low) / 2 - (high - low) / 2 * cut
        for _ in range(2):
            codes = ((groups - minimum) / step).round().clamp(0, 15)
            mean_code, mean = codes.mean(1, True), groups.mean(1, True)
            spread = (codes - mean_code).square().sum(1, True)
            step = ((codes - mean_code) * (groups - mean)).sum(1, True) / spread
            minimum = mean - step * mean_code
        values = codes * step + minimum
        error = (values - groups).square().sum(1, True)
        best, least = torch.where(error < least, values, best), torch.minimum(error, least)
    return best.view(weight_NK.shape)


@pytest.mark.parametrize("make", [numbers, heavy])
def test_four_bits_are_as_near_as_a_long_search_finds(make: Callable[..., Tensor]) -> None:
    weight = make(512, 256)
    found = quantise(weight, Q4_1)
    values = dequantise(found.blocks_NB, Q4_1, 256)
    error = relative(values, weight)
    assert error <= 1.005 * relative(exhaustive(weight), weight)
    assert error <= 0.93 * relative(rounded_to_nearest(weight), weight)
    assert (found.error / found.norm) ** 0.5 == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("kind", [Q4_1, Q8_0])
@pytest.mark.parametrize("cols", [32, 96, 40, 1])
def test_gguf_reads_the_same_numbers(kind: BlockType, cols: int) -> None:
    gguf = pytest.importorskip("gguf")
    weight = numbers(70, cols)
    blocks = quantise(weight, kind).blocks_NB
    assert blocks.shape == (70, kind.row_bytes(cols)) and blocks.dtype == torch.uint8
    theirs = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind.name.upper()])
    assert np.array_equal(theirs[:, :cols], dequantise(blocks, kind, cols).numpy())


@pytest.mark.parametrize("kind", [Q4_1, Q8_0])
def test_the_end_of_a_row_is_as_near_as_the_rest(kind: BlockType) -> None:
    """Far from zero, so that a filling of zeros would take most of the steps."""
    weight = numbers(64, 80) + 0.2
    found = quantise(weight, kind)
    left = dequantise(found.blocks_NB, kind, 80) - weight
    assert left[:, 64:].norm() / 16**0.5 <= 1.05 * left[:, :64].norm() / 64**0.5
    assert found.error == pytest.approx(float(left.square().sum()), rel=1e-3)
    assert found.norm == pytest.approx(float(weight.square().sum()), rel=1e-5)


@pytest.mark.parametrize("kind", [Q4_1, Q8_0])
def test_chunks_types_and_strides_change_nothing(kind: BlockType, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = numbers(48, 192).bfloat16()
    whole = quantise(weight, kind)
    monkeypatch.setattr(MODULE, "_CHUNK_GROUPS", 7 * 6)
    for same in (weight, weight.float(), weight.t().contiguous().t()):
        assert torch.equal(quantise(same, kind).blocks_NB, whole.blocks_NB)


def test_eight_bits_round_to_nearest_on_the_stored_scale() -> None:
    weight = heavy(64, 256)
    found = quantise(weight, Q8_0)
    scales = found.blocks_NB.view(-1, Q8_0.bytes)[:, :2].contiguous().view(torch.float16).float()
    values = dequantise(found.blocks_NB, Q8_0, 256)
    assert ((values - weight).abs().view(-1, 32) <= scales * 0.5001).all()
    assert (found.error / found.norm) ** 0.5 == pytest.approx(relative(values, weight), rel=1e-4)


@pytest.mark.parametrize("kind", [Q4_1, Q8_0])
def test_odd_groups(kind: BlockType) -> None:
    weight = torch.stack([
        torch.zeros(32), torch.full((32,), 0.1), torch.full((32,), -3.0), torch.full((32,), 1e-9),
        torch.arange(32) % 2 * 60000.0, torch.cat([torch.zeros(31), torch.ones(1)]),
    ])  # fmt: skip
    values = dequantise(quantise(weight, kind).blocks_NB, kind, 32)
    assert torch.allclose(values, weight, rtol=5e-3, atol=1e-5)
    assert torch.equal(values[0], weight[0])


@pytest.mark.parametrize("kind", [Q4_1, Q8_0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_no_block_holds_are_named(kind: BlockType, bad: float) -> None:
    weight = numbers(20, 64)
    weight[13, 5] = bad
    with pytest.raises(ConfigError, match=r"^down_proj of expert 3 holds NaN or infinity.*fetch"):
        quantise(weight, kind, "down_proj of expert 3")


def test_what_is_no_matrix_or_too_large_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"holds 70000; q4_1 holds up to 65504"):
        quantise(torch.full((1, 32), 70000.0), Q4_1)
    assert quantise(torch.full((1, 32), 70000.0), Q8_0).error < 70000.0
    with pytest.raises(ConfigError, match=r"q8_0 holds up to"):
        quantise(torch.full((1, 32), 1e7), Q8_0)
    for weight, kind, words in (
        (torch.zeros(3), Q4_1, "is no matrix of floats"),
        (torch.zeros(3, 32, dtype=torch.int8), Q4_1, "is no matrix of floats"),
        (torch.zeros(0, 32), Q4_1, "is no matrix of floats"),
        (torch.zeros(3, 32), Q4_0, "only q4_1"),
    ):
        with pytest.raises(UncacheableError, match=words):
            quantise(weight, kind)
