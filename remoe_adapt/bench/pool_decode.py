"""Decode steps of `benchmarks/run.py pool`: a model of random weights on a GPU, stock and behind the expert cache.

Its layers are those of Qwen3-30B-A3B, fewer of them, bf16. All arms decode the same tokens, drawn as text repeats its
words: out of forty of them, of which one in twenty changes. So a quarter of the experts meets about two look-ups of
three, as behind trained models.
"""

from __future__ import annotations

import gc
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from remoe_adapt.bench import harness
from remoe_adapt.bench.scale import Shape, config_of
from remoe_adapt.checkpoints import auto_class
from remoe_adapt.evaluation import Decoder
from remoe_adapt.expert_cache import expert_cache_of, experts_modules, load_with_expert_cache, pack_experts

Row = dict[str, Any]
_PROMPT = 8
# accelerate moves every expert of a layer for each token.
_OFFLOADED_TOKENS = 8
_COPY_BYTES = 256 << 20
_OF_ROOFLINE, _TIMES_ACCELERATE = 1.25, 20.0
_QUARTER = 0.25


@dataclass(frozen=True)
class DecodeSizes:
    """Of the model; by default eight layers of Qwen3-30B-A3B, with a smaller vocabulary."""

    layers: int = 8
    experts: int = 128
    chosen: int = 8
    hidden: int = 2048
    inner: int = 768
    heads: int = 32
    head_dim: int = 128
    vocabulary: int = 32_000

    @classmethod
    def tiny(cls) -> DecodeSizes:
        """What a test decodes on a CPU."""
        return cls(layers=2, experts=8, chosen=2, hidden=64, inner=32, heads=4, head_dim=16, vocabulary=256)

    @property
    def expert_bytes(self) -> int:
        """Of all experts, bf16."""
        return self.layers * self.experts * 3 * self.hidden * self.inner * 2


def decode_rows(sizes: DecodeSizes, device: str, tokens: int, warm: int, work: Path | None = None) -> Iterator[Row]:
    """A row for each arm as it is done: `tpot_ms` (median of `tokens`, host and launches included), `tpot_p95_ms`,
    `hit_rate`, `miss_bytes` (a token), `gpu_bytes`, `load_s`, `error` (of the logits, relative to eager stock), and
    what it is held to: `bar_of` says of what `value` is, which `target` it has, and `met`.

    Arms: stock `eager` and `grouped_mm` with all on the device; `dense` (its experts compute nothing); `pool_100` and
    `pool_25`, behind the expert cache with slots for all experts and for a quarter; `pool_q4`, 4-bit experts in as many
    bytes as that quarter; `pool_q4_25`, slots for a quarter of them; `accelerate`, experts offloaded to RAM. An arm
    that cannot run has `skipped` instead. Files are gone afterwards.

    Raises ConfigError when the disk is too small.
    """
    folder = harness.work_folder(work) / f"pool-{sizes.layers}x{sizes.experts}x{sizes.hidden}x{sizes.inner}"
    pack = folder.with_name(f"{folder.name}.q4.pack")
    try:
        ids = _text(sizes.vocabulary, _PROMPT + warm + tokens)
        write_model(folder, sizes, device)
        yield from _arms(folder, pack, sizes, device, ids, warm)
    finally:
        for made in (folder, pack):
            shutil.rmtree(made, ignore_errors=True)


def _arms(folder: Path, pack: Path, sizes: DecodeSizes, device: str, ids: list[int], warm: int) -> Iterator[Row]:
    pcie = _pcie_bandwidth(device)
    bench = _Bench(sizes, device, ids, warm)
    eager = bench.row("eager", lambda: _stock(folder, device, "eager"))
    yield eager
    grouped = bench.row("grouped_mm", lambda: _stock(folder, device, "grouped_mm"))
    yield grouped
    dense = bench.row("dense", lambda: _without_experts(_stock(folder, device, "eager")), compare=False)
    yield dense

    def cached(budget: float | int, **options: Any) -> Callable[[], Any]:
        return lambda: load_with_expert_cache(folder, budget, device=device, ram_budget=_ram(device), **options)

    row = bench.row("pool_100", cached(1.0))
    yield row | _held("of grouped_mm", row, lambda: row["tpot_ms"] / grouped["tpot_ms"], 1.0)
    quarter = bench.row("pool_25", cached(_QUARTER))

    def of_roofline() -> float:
        return float(quarter["tpot_ms"] / (dense["tpot_ms"] + 1e3 * quarter["miss_bytes"] / pcie))

    yield (
        quarter
        | _held("of dense + miss bytes / PCIe", quarter, of_roofline, _OF_ROOFLINE)
        | {"pcie_gb_per_s": pcie / 1e9 if pcie else None}
    )
    if not pack.exists():
        pack_experts(folder, pack, bits=4)
    yield bench.row("pool_q4", cached(int(sizes.expert_bytes * _QUARTER), storage=pack))
    yield bench.row("pool_q4_25", cached(_QUARTER, storage=pack))
    bench.tokens = min(bench.tokens, _OFFLOADED_TOKENS)
    offloaded = bench.row("accelerate", lambda: _offloaded(folder, sizes, device))
    yield offloaded | _held(
        "of pool_25", offloaded, lambda: offloaded["tpot_ms"] / quarter["tpot_ms"], _TIMES_ACCELERATE, at_most=False
    )


def _held(of: str, row: Row, value: Callable[[], float], target: float, *, at_most: bool = True) -> Row:
    """The columns of a row that is held to a bar, if it was measured on a GPU."""
    if row.get("device", "cpu") == "cpu":
        return {}
    try:
        found = value()
    except KeyError:  # one of them was skipped
        return {}
    return {"bar_of": of, "value": found, "target": target, "met": found <= target if at_most else found >= target}


class _Bench:
    """Decodes the same tokens with one model after another."""

    def __init__(self, sizes: DecodeSizes, device: str, ids: list[int], warm: int) -> None:
        self._sizes, self._device, self._ids, self._warm = sizes, device, ids, warm
        self.tokens = len(ids) - _PROMPT - warm
        self._expected_NV: Tensor | None = None

    def row(self, arm: str, load: Callable[[], Any], *, compare: bool = True) -> Row:
        """One arm, whose model is gone when it is done."""
        try:
            return self._row(arm, load, compare)
        except (ImportError, ValueError, torch.OutOfMemoryError) as error:
            return {"arm": arm, "skipped": str(error).splitlines()[0]}
        finally:
            gc.collect()
            if self._device == "cuda":
                torch.cuda.empty_cache()

    @torch.inference_mode()
    def _row(self, arm: str, load: Callable[[], Any], compare: bool) -> Row:
        begin_s = time.perf_counter()
        model = load()
        load_s, cache = time.perf_counter() - begin_s, expert_cache_of(model)
        decoder = Decoder(model)
        decoder.feed(self._ids[:_PROMPT])
        times_ms, logits = [], []
        for number, token in enumerate(self._ids[_PROMPT : _PROMPT + self._warm + self.tokens]):
            if number == self._warm and cache is not None:
                cache.reset_stats()
            self._synchronize()
            begin_s = time.perf_counter()
            logits_V = decoder.feed([token])
            self._synchronize()
            if number >= self._warm:
                times_ms.append(1e3 * (time.perf_counter() - begin_s))
                logits.append(logits_V.float().cpu())
        logits_NV, error = torch.stack(logits), None
        if self._expected_NV is None:
            self._expected_NV = logits_NV
        elif compare:
            expected_NV = self._expected_NV[: len(logits_NV)]
            error = float((logits_NV - expected_NV).norm() / expected_NV.norm())
        stats = {} if cache is None else cache.stats(layers=False)
        return {
            "what": "decode", "arm": arm, "device": _name(self._device), "layers": self._sizes.layers,
            "experts": self._sizes.experts, "tokens": len(times_ms), "tpot_ms": statistics.median(times_ms),
            "tpot_p95_ms": sorted(times_ms)[int(0.95 * len(times_ms))], "hit_rate": stats.get("hit_rate"),
            "miss_bytes": stats["bytes"] / len(times_ms) if stats else None, "arithmetic": stats.get("arithmetic", ""),
            "gpu_bytes": torch.cuda.memory_allocated() if self._device == "cuda" else None, "load_s": load_s,
            "error": error, "pcie_gb_per_s": None, "bar_of": "", "value": None, "target": None, "met": None,
        }  # fmt: skip

    def _synchronize(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


def write_model(folder: Path, sizes: DecodeSizes, device: str) -> None:
    """A checkpoint of random weights, made on the device; tokens have embeddings as different as those of a trained
    model, so that each has experts of its own.

    Raises ConfigError when the disk is too small.
    """
    if (folder / "config.json").is_file():
        return
    shape = Shape(
        layers=sizes.layers, experts=sizes.experts, chosen=sizes.chosen, hidden=sizes.hidden, inner=sizes.inner,
        heads=sizes.heads, kv_heads=min(4, sizes.heads), head_dim=sizes.head_dim, vocabulary=sizes.vocabulary,
    )  # fmt: skip
    config = config_of(shape)
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = auto_class(config).from_config(config, dtype=torch.bfloat16)
    nn.init.normal_(model.get_input_embeddings().weight)
    harness.save_whole(model, folder)


def _text(vocabulary: int, count: int) -> list[int]:
    """Token ids out of forty, of which one in twenty tokens changes one."""
    drawn = random.Random(1)
    words = drawn.sample(range(10, vocabulary), 40)
    ids = []
    for _ in range(count):
        if drawn.random() < 0.05:
            words[drawn.randrange(len(words))] = drawn.randrange(10, vocabulary)
        ids.append(drawn.choice(words))
    return ids


def _stock(folder: Path, device: str, implementation: str) -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, experts_implementation=implementation
    )
    return model.to(device).eval()


def _without_experts(model: Any) -> Any:
    """The dense part alone: experts give nothing."""
    for module in experts_modules(model).values():
        vars(module)["forward"] = lambda hidden_TD, *others: torch.zeros_like(hidden_TD)
    return model


def _offloaded(folder: Path, sizes: DecodeSizes, device: str) -> Any:
    """transformers' own way to decode with too little memory: accelerate moves experts from RAM for each use."""
    if device == "cpu":
        raise ValueError("accelerate offloads from a GPU, and none is there")
    from transformers import AutoModelForCausalLM

    plain: Any = _stock(folder, "meta", "eager")
    places: dict[str, str | int] = {"": 0} | dict.fromkeys(experts_modules(plain), "cpu")
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, experts_implementation="eager", device_map=places
    ).eval()


def _ram(device: str) -> float | None:
    """All experts have a slot in RAM, so that no step waits for a disk; on a CPU there is no tier below."""
    return 1.0 if device == "cuda" else None


def _pcie_bandwidth(device: str) -> float:
    """Bytes a second from pinned RAM to the device; 0 where that is the CPU."""
    if device == "cpu":
        return 0.0
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    times_ms = []
    for _ in range(8):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
        times_ms.append(begin.elapsed_time(end))
    return float(_COPY_BYTES / statistics.median(times_ms) * 1e3)


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"
