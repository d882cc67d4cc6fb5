"""ggml's kernels out of the wheel: their products against exact arithmetic, and every way of having none."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from remoe_adapt.errors import ConfigError, RemoeError, UncacheableError
from remoe_adapt.expert_cache.encodings import (
    DECODED,
    F32,
    MXFP4,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_1,
    Q8_0,
    BlockType,
    Ggml,
    PoolMatrix,
    block_type,
    dequantise,
    ggml,
    ggml_library,
)
from remoe_adapt.expert_cache.encodings.ggml import _MAX_KEPT_BYTES, _MAX_SHAPES

HAS_WHEEL = importlib.util.find_spec("xllamacpp") is not None
needs_wheel = pytest.mark.skipif(not HAS_WHEEL, reason="needs the extra llamacpp")
KINDS = sorted(DECODED, key=lambda kind: kind.number)
# The kernels round inputs to eight bits.
TOLERANCE = 1e-2


class Pool:
    """Slots with a matrix each, not at their beginning, and gaps between."""

    def __init__(self, kernels: Ggml, kind: BlockType, slots: int, rows: int, cols: int) -> None:
        matrix_bytes = rows * kind.row_bytes(cols)
        self.memory_SB = torch.zeros(slots, matrix_bytes + 160, dtype=torch.uint8)
        exact = []
        for slot_B in self.memory_SB:
            blocks_NB = kernels.quantise(torch.randn(rows, cols), kind)
            slot_B[64 : 64 + matrix_bytes] = blocks_NB.view(-1)
            exact.append(dequantise(blocks_NB, kind, cols))
        self.exact_SNK = torch.stack(exact)
        address = self.memory_SB.data_ptr() + 64
        self.matrix = PoolMatrix(address, slots, self.memory_SB.stride(0), kind, rows, cols)

    def expected(self, x: Tensor, slots_TC: Tensor) -> Tensor:
        x_TCK = x.unsqueeze(1).expand(-1, slots_TC.shape[1], -1) if x.ndim == 2 else x
        return torch.einsum("tck,tcnk->tcn", x_TCK.float(), self.exact_SNK[slots_TC.long()])


def off(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape and found.dtype == torch.float32
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def kernels() -> Ggml:
    if not HAS_WHEEL:
        pytest.skip("needs the extra llamacpp")
    found = ggml()
    assert found is not None
    return found


def test_every_type_passes_on_this_machine(kernels: Ggml) -> None:
    assert kernels.types == DECODED
    assert ggml() is kernels


@needs_wheel
@pytest.mark.usefixtures("afresh")
def test_the_package_of_the_wheel_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "xllamacpp", raising=False)
    assert ggml() is not None and "xllamacpp" not in sys.modules


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_products_of_a_pool_are_those_of_exact_arithmetic(kernels: Ggml, kind: BlockType) -> None:
    pool = Pool(kernels, kind, 5, 48, 256)
    slots_TC = torch.tensor([[4, 0, 2], [1, 1, 4]], dtype=torch.int32)
    for x in (torch.randn(2, 256), torch.randn(2, 3, 256)):
        assert off(kernels.expert_matmul(x, slots_TC, pool.matrix), pool.expected(x, slots_TC)) < TOLERANCE


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.values > 1], ids=lambda kind: kind.name)
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e4])
def test_products_that_are_computed_twice_are_nearly_exact(kernels: Ggml, kind: BlockType, size: float) -> None:
    blocks_NB = kernels.quantise(torch.randn(48, 500), kind)
    # A few values far from the others, as models have them: one in a block sets its step.
    x_TK = size * torch.randn(5, 500) * torch.where(torch.rand(500) < 0.02, 30.0, 1.0)
    expected = x_TK @ dequantise(blocks_NB, kind, 500).T
    assert off(kernels.matmul(x_TK, blocks_NB, kind, 48), expected) < 2e-3
    if kind.values == 256:
        pool = Pool(kernels, kind, 3, 48, 500)
        slots_TC = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [1, 2]])
        for x in (x_TK, x_TK[:, None] * torch.tensor([1.0, -0.5])[:, None]):
            assert off(kernels.expert_matmul(x, slots_TC, pool.matrix), pool.expected(x, slots_TC)) < 2e-3


@pytest.mark.parametrize("kind", [Q4_1, Q5_1, Q4_0], ids=lambda kind: kind.name)
def test_activations_too_large_for_fp16(kernels: Ggml, kind: BlockType) -> None:
    up, down = Pool(kernels, kind, 3, 64, 96), Pool(kernels, kind, 3, 96, 32)
    slots_TC = torch.tensor([[0, 2], [1, 0]])
    # The sum of a block of 32 is more than fp16 holds, and behind the gate even its scale is.
    x_TD = 1e4 * torch.randn(2, 96).abs()
    found = kernels.expert_matmul(x_TD, slots_TC, up.matrix)
    assert off(found, up.expected(x_TD, slots_TC)) < TOLERANCE
    gate_TCI, up_TCI = up.expected(x_TD, slots_TC).chunk(2, dim=-1)
    expected = down.expected(F.silu(gate_TCI) * up_TCI, slots_TC)
    assert off(kernels.expert_mlp(x_TD, slots_TC, up.matrix, down.matrix), expected) < 2 * TOLERANCE


@pytest.mark.parametrize("kind", [Q4_0, Q4_K, MXFP4, F32], ids=lambda kind: kind.name)
@pytest.mark.parametrize("cols", [8, 200, 264, 500])
def test_the_last_block_of_a_row_need_not_be_full(kernels: Ggml, kind: BlockType, cols: int) -> None:
    pool = Pool(kernels, kind, 3, 10, cols)
    slots_TC = torch.tensor([[2, 0]])
    for x in (torch.randn(1, cols), torch.randn(1, 2, cols)):
        # Twice, since the second call finds what the first has left in the graph's own memory.
        for factor in (1.0, -2.0):
            found = kernels.expert_matmul(factor * x, slots_TC, pool.matrix)
            assert off(found, pool.expected(factor * x, slots_TC)) < TOLERANCE


@pytest.mark.parametrize("kind", [Q4_0, Q4_K, Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("num_tokens", [1, 8, 33, 64, 300])
def test_any_number_of_tokens(kernels: Ggml, kind: BlockType, num_tokens: int) -> None:
    pool = Pool(kernels, kind, 6, 32, 256)
    x_TK = torch.randn(num_tokens, 256)
    slots_TC = torch.stack([torch.randperm(6)[:4] for _ in range(num_tokens)])
    assert off(kernels.expert_matmul(x_TK, slots_TC, pool.matrix), pool.expected(x_TK, slots_TC)) < TOLERANCE


def test_many_tokens_of_few_slots_are_computed_exactly(kernels: Ggml) -> None:
    pool = Pool(kernels, Q4_0, 4, 32, 80)
    for x in (torch.randn(200, 80), torch.randn(200, 2, 80)):
        slots_TC = torch.randint(0, 4, (200, 2))
        # Inputs are not rounded there.
        assert off(kernels.expert_matmul(x, slots_TC, pool.matrix), pool.expected(x, slots_TC)) < 1e-6


def test_a_large_pool_is_computed_in_pieces(kernels: Ggml, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(kernels, Q4_0, 20, 32, 64)
    x_TK, slots_TC = torch.randn(50, 64), torch.randint(0, 20, (50, 3))
    whole = kernels.expert_matmul(x_TK, slots_TC, pool.matrix)
    # Seven tokens at a time.
    monkeypatch.setattr(sys.modules[Ggml.__module__], "_MAX_WORK_BYTES", 8 * 20 * 3 * 7)
    assert torch.equal(kernels.expert_matmul(x_TK, slots_TC, pool.matrix), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_any_float_type_and_stride(kernels: Ggml, dtype: torch.dtype) -> None:
    pool = Pool(kernels, Q4_0, 3, 16, 64)
    x_TK = torch.randn(64, 2).to(dtype).T
    slots_TC = torch.tensor([[0, 1, 2], [2, 1, 0]]).T[:2].T[:, :2]
    assert not x_TK.is_contiguous() and not slots_TC.is_contiguous()
    found = kernels.expert_matmul(x_TK, slots_TC, pool.matrix)
    assert torch.equal(found, kernels.expert_matmul(x_TK.float().contiguous(), slots_TC.int(), pool.matrix))


def test_results_stay_when_the_next_call_comes(kernels: Ggml) -> None:
    pool = Pool(kernels, Q4_0, 3, 16, 64)
    slots_TC = torch.tensor([[0, 2]])
    x_TK = torch.randn(1, 64)
    first = kernels.expert_matmul(x_TK, slots_TC, pool.matrix)
    kept = first.clone()
    kernels.expert_matmul(torch.randn(1, 64), slots_TC, pool.matrix)
    assert torch.equal(first, kept)


def test_codes_that_change_in_their_slot_are_seen(kernels: Ggml) -> None:
    pool, other = Pool(kernels, Q4_0, 3, 16, 64), Pool(kernels, Q4_0, 3, 16, 64)
    x_TK, slots_TC = torch.randn(1, 64), torch.tensor([[1, 2]])
    kernels.expert_matmul(x_TK, slots_TC, pool.matrix)
    # The same graph serves both pools, and new codes in the first.
    found = kernels.expert_matmul(x_TK, slots_TC, other.matrix)
    assert off(found, other.expected(x_TK, slots_TC)) < TOLERANCE
    pool.memory_SB.copy_(other.memory_SB)
    assert torch.equal(kernels.expert_matmul(x_TK, slots_TC, pool.matrix), found)


def test_no_tokens_and_no_choices(kernels: Ggml) -> None:
    pool = Pool(kernels, Q4_0, 3, 16, 64)
    for shape in ((0, 2), (2, 0)):
        slots_TC = torch.zeros(shape, dtype=torch.int32)
        assert kernels.expert_matmul(torch.randn(shape[0], 64), slots_TC, pool.matrix).shape == (*shape, 16)
    blocks_NB = kernels.quantise(torch.randn(16, 64), Q4_0)
    assert kernels.matmul(torch.randn(0, 64), blocks_NB, Q4_0, 16).shape == (0, 16)


@pytest.mark.parametrize("inner", [64, 40])
def test_experts_in_one_call_are_two_products_with_swiglu_between(kernels: Ggml, inner: int) -> None:
    up, down = Pool(kernels, Q4_0, 4, 2 * inner, 96), Pool(kernels, Q8_0, 4, 96, inner)
    for num_tokens in (1, 5, 200):
        x_TD, slots_TC = torch.randn(num_tokens, 96) / 10, torch.randint(0, 4, (num_tokens, 2))
        gate, factor = up.expected(x_TD, slots_TC).chunk(2, dim=-1)
        expected = down.expected(torch.nn.functional.silu(gate) * factor, slots_TC)
        found = kernels.expert_mlp(x_TD, slots_TC, up.matrix, down.matrix)
        assert off(found, expected) < 2 * TOLERANCE


def test_experts_that_do_not_fit_one_another_are_refused(kernels: Ggml) -> None:
    up, down = Pool(kernels, Q4_0, 4, 64, 96), Pool(kernels, Q4_0, 4, 96, 64)
    with pytest.raises(ConfigError, match="64 rows in 4 slots, then 64 columns in 4"):
        kernels.expert_mlp(torch.randn(1, 96), torch.zeros(1, 2, dtype=torch.int32), up.matrix, down.matrix)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_products_with_one_matrix(kernels: Ggml, kind: BlockType) -> None:
    for cols, num_tokens in ((256, 1), (256, 9), (72, 3)):
        blocks_NB = kernels.quantise(torch.randn(40, cols), kind)
        x_TK = torch.randn(num_tokens, cols)
        expected = x_TK @ dequantise(blocks_NB, kind, cols).T
        assert off(kernels.matmul(x_TK, blocks_NB, kind, 40), expected) < TOLERANCE
        assert off(kernels.matmul(x_TK.bfloat16(), blocks_NB, kind, 40), expected) < 2 * TOLERANCE


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_ggml_dequantises_as_we_do(kernels: Ggml, kind: BlockType) -> None:
    blocks_NB = kernels.quantise(torch.randn(7, 300), kind)
    expected = dequantise(blocks_NB, kind, 300)
    # A fused multiply-add rounds once where the definition rounds twice.
    torch.testing.assert_close(kernels.dequantise(blocks_NB, kind, 300), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "error"),
    [("f32", 0.0), ("bf16", 0.003), ("q8_0", 0.006), ("q6_K", 0.02), ("q4_0", 0.11), ("q4_K", 0.09), ("mxfp4", 0.13)],
)
def test_quantised_weights_are_near_the_weights(kernels: Ggml, name: str, error: float) -> None:
    weight_NK = torch.randn(16, 500)
    blocks_NB = kernels.quantise(weight_NK, block_type(name))
    assert blocks_NB.dtype == torch.uint8 and blocks_NB.shape == (16, block_type(name).row_bytes(500))
    assert off(dequantise(blocks_NB, block_type(name), 500), weight_NK) <= error


def test_weights_that_are_not_finite_are_refused(kernels: Ggml) -> None:
    for weight_NK in (torch.full((2, 32), float("nan")), torch.full((2, 32), float("inf")), torch.ones(32)):
        with pytest.raises(UncacheableError, match="cannot be quantised: it is no matrix of finite numbers"):
            kernels.quantise(weight_NK, Q4_0)


def test_slots_beyond_the_pool_are_refused(kernels: Ggml) -> None:
    pool = Pool(kernels, Q4_0, 3, 16, 64)
    for tokens in (1, 40):
        for bad in (-1, 3, 1 << 32):
            slots_TC = torch.zeros(tokens, 2, dtype=torch.int64)
            slots_TC[-1, 1] = bad
            with pytest.raises(ConfigError, match="are asked for; the pool has 3"):
                kernels.expert_matmul(torch.randn(tokens, 64), slots_TC, pool.matrix)


@pytest.mark.parametrize(
    ("x", "slots_TC"),
    [
        (torch.randn(1, 63), torch.zeros(1, 2, dtype=torch.int32)),
        (torch.randn(2, 64), torch.zeros(1, 2, dtype=torch.int32)),
        (torch.randn(1, 3, 64), torch.zeros(1, 2, dtype=torch.int32)),
        (torch.randn(64), torch.zeros(1, 2, dtype=torch.int32)),
        (torch.randn(1, 64), torch.zeros(2, dtype=torch.int32)),
        (torch.ones(1, 64, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)),
        (torch.randn(1, 64, device="meta"), torch.zeros(1, 2, dtype=torch.int32)),
        (torch.randn(1, 64), torch.zeros(1, 2, dtype=torch.int32, device="meta")),
    ],
)
def test_tensors_that_do_not_fit_are_refused(kernels: Ggml, x: Tensor, slots_TC: Tensor) -> None:
    pool = Pool(kernels, Q4_0, 3, 16, 64)
    with pytest.raises(ConfigError, match="do not fit matrices of 64 columns"):
        kernels.expert_matmul(x, slots_TC, pool.matrix)


def test_matrices_that_do_not_fit_are_refused(kernels: Ggml) -> None:
    blocks_NB = kernels.quantise(torch.randn(16, 64), Q4_0)
    with pytest.raises(UncacheableError, match="does not hold rows of 96 values as q4_0 blocks"):
        kernels.matmul(torch.randn(1, 96), blocks_NB, Q4_0, 16)
    with pytest.raises(ConfigError, match="16 rows of blocks are given for a matrix of 17 rows"):
        kernels.matmul(torch.randn(1, 64), blocks_NB, Q4_0, 17)
    with pytest.raises(ConfigError, match="have no product by ggml"):
        kernels.matmul(torch.randn(64), blocks_NB, Q4_0, 16)


def test_types_without_kernels_are_refused(kernels: Ggml) -> None:
    iq2 = block_type("iq2_xxs")
    with pytest.raises(UncacheableError, match="no products with iq2_xxs here: dequantise instead"):
        kernels.matmul(torch.randn(1, 256), torch.zeros(2, 66, dtype=torch.uint8), iq2, 2)


def test_inference_mode_and_gradients_leave_nothing_behind(kernels: Ggml) -> None:
    pool = Pool(kernels, Q4_0, 3, 16, 72)
    slots_TC = torch.tensor([[0, 1]])
    x_TK = torch.randn(1, 72)
    with torch.inference_mode():
        first = kernels.expert_matmul(x_TK, slots_TC, pool.matrix)
    # A graph made in inference mode serves outside of it, and inputs with a gradient.
    second = kernels.expert_matmul(x_TK.clone().requires_grad_(), slots_TC, pool.matrix)
    third = kernels.expert_matmul(x_TK, slots_TC, pool.matrix)
    assert torch.equal(first, second) and torch.equal(first, third) and not second.requires_grad


def test_many_threads_compute_at_once(kernels: Ggml) -> None:
    pools = [Pool(kernels, kind, 4, 64, 128) for kind in (Q4_0, Q8_0)]
    slots_TC = torch.tensor([[3, 1, 0]])
    inputs = [torch.randn(1, 128) for _ in range(6)]
    expected = {
        (p, i): kernels.expert_matmul(x, slots_TC, pool.matrix)
        for p, pool in enumerate(pools)
        for i, x in enumerate(inputs)
    }
    wrong: list[tuple[int, int]] = []

    def work(number: int) -> None:
        for turn in range(200):
            p, i = (number + turn) % 2, (number * turn) % 6
            if not torch.equal(kernels.expert_matmul(inputs[i], slots_TC, pools[p].matrix), expected[p, i]):
                wrong.append((p, i))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_graphs_of_many_shapes_are_let_go(kernels: Ggml) -> None:
    pool = Pool(kernels, Q4_0, 2, 8, 32)
    for tokens in range(1, 3 * _MAX_SHAPES):
        kernels.expert_matmul(torch.randn(tokens, 32), torch.zeros(tokens, 1, dtype=torch.int32), pool.matrix)
    assert len(kernels._waiting) == _MAX_SHAPES
    kept = [graph.kept_bytes for graphs in kernels._waiting.values() for graph in graphs]
    assert max(kept) <= _MAX_KEPT_BYTES


def test_two_threads_of_ggml_give_what_one_gives(kernels: Ggml) -> None:
    pool = Pool(kernels, Q4_K, 4, 512, 2048)
    x_TK, slots_TC = torch.randn(1, 2048), torch.tensor([[3, 1, 0]])
    one = kernels.expert_matmul(x_TK, slots_TC, pool.matrix)
    torch.set_num_threads(2)
    try:
        assert torch.equal(kernels.expert_matmul(x_TK, slots_TC, pool.matrix), one)
    finally:
        torch.set_num_threads(1)


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("two_threads")
def test_threads_that_have_computed_do_not_spin(kernels: Ggml) -> None:
    pool = Pool(kernels, Q4_0, 1, 1024, 2048)
    for _ in range(20):
        kernels.expert_matmul(torch.randn(1, 2048), torch.zeros(1, 2, dtype=torch.int32), pool.matrix)
    time.sleep(0.1)
    before_s = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before_s < 0.1


@pytest.mark.usefixtures("two_threads")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_computes_while_threads_of_the_parent_do(kernels: Ggml) -> None:
    pool = Pool(kernels, Q4_0, 1, 512, 1024)
    x_TK, slots_TC = torch.randn(1, 1024), torch.zeros(1, 2, dtype=torch.int32)
    expected = kernels.expert_matmul(x_TK, slots_TC, pool.matrix)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            kernels.expert_matmul(x_TK, slots_TC, pool.matrix)

    def child_is_right() -> bool:
        if not (child := os.fork()):
            # Nothing of the test run may go on in the child, and one that waits for ever is ended.
            signal.alarm(20)
            same = False
            with contextlib.suppress(BaseException):
                same = torch.equal(kernels.expert_matmul(x_TK, slots_TC, pool.matrix), expected)
            os._exit(0 if same else 1)
        return os.waitpid(child, 0)[1] == 0

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert all(child_is_right() for _ in range(10))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    # As if one of them had been inside: every call of ggml's asks for this mutex.
    kernels._library.ggml_critical_section_start()
    try:
        assert child_is_right()
    finally:
        kernels._library.ggml_critical_section_end()
    assert torch.equal(kernels.expert_matmul(x_TK, slots_TC, pool.matrix), expected)


@pytest.fixture
def afresh() -> Iterator[None]:
    """`ggml()` loads anew inside the test, and after it."""
    ggml.cache_clear()
    yield
    ggml.cache_clear()


def said(caplog: pytest.LogCaptureFixture) -> str:
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    return record.getMessage()


@pytest.mark.usefixtures("afresh")
def test_another_version_is_not_loaded(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Spec:
        submodule_search_locations = ()

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Spec)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2026.11.1")
    monkeypatch.setattr(ctypes, "CDLL", None)
    assert ggml() is None and ggml() is None
    assert "xllamacpp 2026.10.11549 is needed, found: 2026.11.1" in said(caplog)
    assert "pip install 'remoe-adapt[llamacpp]'" in said(caplog)


@pytest.mark.usefixtures("afresh")
def test_without_the_wheel_there_are_no_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert ggml() is None
    assert "found: none" in said(caplog)


@needs_wheel
@pytest.mark.usefixtures("afresh")
def test_a_missing_function_is_seen_before_any_is_called(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(ggml_library._FUNCTIONS, "ggml_of_tomorrow", ([], None))
    assert ggml() is None
    assert "does not export ggml_of_tomorrow" in said(caplog)


@needs_wheel
@pytest.mark.usefixtures("afresh")
def test_a_tensor_of_another_form_is_seen(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Longer(ctypes.Structure):
        _fields_ = (*ggml_library.Tensor._fields_, ("more", ctypes.c_char * 8))

    monkeypatch.setattr(ggml_library, "Tensor", Longer)
    assert ggml() is None
    assert "tensors have another form: the size of a tensor is 368 where 376 belongs" in said(caplog)


@needs_wheel
@pytest.mark.usefixtures("afresh")
def test_a_type_whose_products_are_wrong_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = ggml()
    assert kernels is not None
    product = Ggml.expert_matmul

    def wrong(self: Ggml, x: Tensor, slots_TC: Tensor, weights: PoolMatrix) -> Tensor:
        return product(self, x, slots_TC, weights) * (1.1 if weights.kind is Q4_0 else 1)

    monkeypatch.setattr(Ggml, "expert_matmul", wrong)
    ggml.cache_clear()
    found = ggml()
    assert found is not None and found.types == DECODED - {Q4_0}


@needs_wheel
@pytest.mark.usefixtures("afresh")
def test_kernels_that_are_all_wrong_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Ggml, "matmul", lambda self, x, blocks, kind, rows: torch.full((1, rows), float("nan")))
    assert ggml() is None
    assert "no type of blocks passed the self-test" in said(caplog)


def test_an_error_of_ggml_is_an_error_of_ours(kernels: Ggml, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(kernels, Q4_0, 3, 16, 64)
    failing: Any = Ggml(kernels._library)
    x_TK, slots_TC = torch.randn(1, 64), torch.tensor([[0, 1]])
    failing.expert_matmul(x_TK, slots_TC, pool.matrix)
    for graphs in failing._waiting.values():
        for graph in graphs:
            graph._compute = lambda graph, plan: -1
    with pytest.raises(RemoeError, match="could not compute a product"):
        failing.expert_matmul(x_TK, slots_TC, pool.matrix)
    # The graph that failed is not used again.
    assert off(failing.expert_matmul(x_TK, slots_TC, pool.matrix), pool.expected(x_TK, slots_TC)) < TOLERANCE
