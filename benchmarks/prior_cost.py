"""What the recency prior costs in llama.cpp's callback: microseconds a layer in C, and its share of a token.

`python benchmarks/run.py prior_cost` writes results/prior_cost_cpu.csv. Settings: NAME=VALUE of `Options`.

- "callback": the C function itself on tensors that ggml made, one token through 48 layers of 128 experts (softmax, 8
  chosen) at a time, by the function's own clock; the best and the median of many passes, so caches are hot. `resident`
  is told what is in memory; asking the kernel is not in these figures. `cost` divides weights by their sum, a quarter
  of the experts is held; its second stop, in which that sum is corrected, is in its figure.
- "token": the shipped model, its experts widened to 1.1 GB in F16, all in memory, decoded by one engine for each arm in
  one process: without a callback, with one that is asked and does nothing, with the prior at gain 0 and at its gain,
  and `cost, two stops`, whose weights are divided by their sum in a second stop of every layer.
  Every token of the text goes through all arms before the next one does, in an order that turns; `share` is what the
  arm's median takes beyond that without a callback. It is held to its bar by processor time (`cpu_share`), which with
  one thread is a token's time on a quiet core; wall time stands beside it, and others' jobs spoil it.
"""

from __future__ import annotations

import ctypes as C
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from llamacpp import widened_gguf
from transformers import AutoTokenizer

from remoe_adapt.bench.harness.results import REPO_ROOT
from remoe_adapt.engines.llamacpp import in_process
from remoe_adapt.engines.llamacpp.in_process import LlamaModel, library
from remoe_adapt.engines.llamacpp.prior.control import MODES
from remoe_adapt.engines.llamacpp.prior.cost import Ranks
from remoe_adapt.engines.llamacpp.prior.fallback import Head
from remoe_adapt.engines.llamacpp.prior.native import find_in, functions, symbol
from remoe_adapt.recency_settings import Recency

SHIPPED = REPO_ROOT / "examples" / "tiny_moe"
LAYERS, EXPERTS, CHOSEN = 48, 128, 8
BAR_US, BAR_SHARE = 5.0, 0.03
_TEXTS = 64
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Options:
    """passes: over all layers, in the first part. cost_gain: of the mode `cost`. tokens: of each arm, in the second,
    after `warm` ones; 0 leaves it out. threads: of the engine."""

    work: str = "/tmp"
    passes: int = 2000
    gain: float = 0.2
    cost_gain: float = 0.1
    expert_bytes: int = 3_500_000
    warm: int = 16
    tokens: int = 200
    threads: int = 1


def run(options: Options) -> dict[str, Any]:
    rows = list(callback_rows(options))
    return {"rows": [*rows, *token_rows(options)] if options.tokens else rows}


def callback_rows(options: Options) -> Iterator[dict[str, Any]]:
    """The C function by itself."""
    lib, engine = functions(), library()
    with _Tensors(engine) as tensors:
        arms = (
            ("ema", 0.0), ("ema", options.gain), ("last", options.gain), ("resident", options.gain),
            ("cost", options.cost_gain),
        )  # fmt: skip
        for mode, gain in arms:
            prior = lib.rp_new(1, None)
            control = lib.rp_ctl(prior).contents
            lib.rp_backend(prior, symbol(engine, "ggml_op_desc"), None, None, None)
            lib.rp_probe(prior, find_in(lambda name: symbol(engine, name)), None)
            lib.rp_trust(prior, True)
            control.mode, control.gain, control.decay = MODES[mode], gain, Recency.of(mode).decay
            for layer in range(LAYERS) if mode == "cost" else ():
                lib.rp_weigh(prior, layer, EXPERTS, Ranks.SOFTMAX, True)
            held = (np.arange(EXPERTS) % 2).astype(np.float32)
            found_us: list[float] = []
            corrected = 0
            for number in range(options.passes):
                tensors.fill(number)
                for layer in range(LAYERS) if mode == "resident" else ():
                    lib.rp_set_resident(prior, layer, EXPERTS, held.ctypes.data)
                place = np.array([0, number], np.int32)
                lib.rp_rows(prior, 1, place[:1].ctypes.data, place[1:].ctypes.data, None)
                control.ns = control.calls = 0
                for top, total in zip(tensors.chosen, tensors.sums, strict=True):
                    lib.rp_cb(top, False, prior)
                    if lib.rp_cb(total, True, prior):
                        lib.rp_cb(total, False, prior)
                        corrected += 1
                found_us.append(control.ns / control.calls / 1e3)
            assert control.refused_rows == control.lost_rows == 0, "what was timed is not the prior"
            assert bool(control.changed_rows) == bool(gain) and bool(corrected) == (mode == "cost")
            lib.rp_free(prior)
            best_us, ten, half, ninety = (float(np.percentile(found_us, at)) for at in (0, 10, 50, 90))
            yield row(
                "callback", mode, gain, us_best=best_us, us=half, us_p10=ten, us_p90=ninety, bar=BAR_US,
                met=best_us <= BAR_US,
            )  # fmt: skip


def token_rows(options: Options) -> Iterator[dict[str, Any]]:
    """Its share of a token."""
    path = widened_gguf(options.work, options.expert_bytes)
    text = (REPO_ROOT / "README.md").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(SHIPPED)(text)["input_ids"][: options.warm + options.tokens]
    common: dict[str, Any] = {
        "context_tokens": len(ids), "ubatch_tokens": 1, "threads": options.threads, "load_mode": "mmap",
        "repack": False,
    }  # fmt: skip
    with ExitStack() as ending:
        # Renormalised in one of them alone, as that is a stop more.
        arms = {
            ("none", 0.0): ending.enter_context(LlamaModel(path, **common)),
            ("asked", 0.0): ending.enter_context(_asked(path, common)),
            ("ema", 0.0): ending.enter_context(LlamaModel(path, recency="ema", gain=0.0, **common)),
            ("ema", options.gain): ending.enter_context(LlamaModel(path, recency="ema", gain=options.gain, **common)),
            ("cost", options.cost_gain): ending.enter_context(
                LlamaModel(path, recency="cost", gain=options.cost_gain, **common)
            ),
            ("cost, two stops", options.cost_gain): ending.enter_context(
                LlamaModel(path, recency="cost", gain=options.cost_gain, renormalise=True, **common)
            ),
        }
        names = list(arms)
        took: dict[tuple[str, float], list[tuple[float, float]]] = {name: [] for name in names}
        for number, token in enumerate(ids):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                wall_s, cpu_s = time.perf_counter(), time.process_time()
                arms[name].decode([token])
                took[name].append((time.perf_counter() - wall_s, time.process_time() - cpu_s))
        for name in [name for name in names if name[1]]:
            status = arms[name].prior_status()
            assert status is not None and status.acts and status.swapped
    ms = {name: 1e3 * np.array(found[options.warm :]) for name, found in took.items()}
    base_ms, base_cpu_ms = np.median(ms["none", 0.0], axis=0)
    for (what, gain), found in ms.items():
        (wall_ms, cpu_ms), (low_ms, high_ms) = np.median(found, axis=0), np.percentile(found[:, 1], (10, 90))
        share, cpu_share = wall_ms / base_ms - 1, cpu_ms / base_cpu_ms - 1
        held_to = {} if what == "none" else {"bar": BAR_SHARE, "met": bool(cpu_share <= BAR_SHARE)}
        yield row(
            "token", what, gain, ms=wall_ms, cpu_ms=cpu_ms, cpu_ms_p10=low_ms, cpu_ms_p90=high_ms, share=share,
            cpu_share=cpu_share, **held_to,
        )  # fmt: skip


def row(what: str, mode: str, gain: float, **figures: Any) -> dict[str, Any]:
    """All columns, "" where there is no figure."""
    names = (
        "us_best", "us", "us_p10", "us_p90", "ms", "cpu_ms", "cpu_ms_p10", "cpu_ms_p90", "share", "cpu_share", "bar",
        "met",
    )  # fmt: skip
    return {"what": what, "mode": mode, "gain": gain, **dict.fromkeys(names, ""), **figures}


def _asked(path: Path, common: dict[str, Any]) -> LlamaModel:
    """An engine whose callback is asked about every node, stops where the prior does, and does nothing."""
    module: Any = in_process
    make = module.engine_prior

    def idle(*arguments: Any, **options: Any) -> Any:
        prior = make(*arguments, **options)
        prior.callback = symbol(functions(), "rp_cb_idle")
        return prior

    module.engine_prior = idle
    try:
        return LlamaModel(path, recency="ema", gain=0.0, **common)
    finally:
        module.engine_prior = make


class _InitParams(C.Structure):
    _fields_ = (("mem_size", C.c_size_t), ("mem_buffer", C.c_void_p), ("no_alloc", C.c_bool))


class _Tensors:
    """Scores of a softmax, their ranking, the view of its head and the sum of the scores gathered by it, of each layer,
    in ggml's own memory.

    chosen, sums: addresses of the views and of the sums.
    """

    def __init__(self, engine: Any) -> None:
        pointer, size = C.c_void_p, C.c_size_t
        kinds: dict[str, tuple[list[Any], Any]] = {
            "ggml_init": ([_InitParams], pointer),
            "ggml_free": ([pointer], None),
            "ggml_new_tensor_2d": ([pointer, C.c_int, C.c_int64, C.c_int64], pointer),
            "ggml_soft_max": ([pointer, pointer], pointer),
            "ggml_argsort": ([pointer, pointer, C.c_int], pointer),
            "ggml_view_2d": ([pointer, pointer, C.c_int64, C.c_int64, size, size], pointer),
            "ggml_reshape_2d": ([pointer, pointer, C.c_int64, C.c_int64], pointer),
            "ggml_get_rows": ([pointer, pointer, pointer], pointer),
            "ggml_sum_rows": ([pointer, pointer], pointer),
            "ggml_set_name": ([pointer, C.c_char_p], pointer),
        }
        call = {}
        for name, (arguments, result) in kinds.items():
            call[name] = getattr(engine, name)
            call[name].argtypes, call[name].restype = arguments, result
        self._free, self._context = call["ggml_free"], call["ggml_init"](_InitParams(1 << 22, None, False))
        self.chosen: list[int] = []
        self.sums: list[int] = []
        self._places: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
        for layer in range(LAYERS):
            logits = call["ggml_new_tensor_2d"](self._context, 0, EXPERTS, 1)
            scores = call["ggml_soft_max"](self._context, logits)
            order = call["ggml_argsort"](self._context, scores, 1)
            top = call["ggml_view_2d"](self._context, order, CHOSEN, 1, 4 * EXPERTS, 0)
            call["ggml_set_name"](top, b"ffn_moe_topk-%d" % layer)
            self.chosen.append(top)
            # Of one token there is one row, so its scores are as many rows of one value.
            column = call["ggml_reshape_2d"](self._context, scores, 1, EXPERTS)
            weights = call["ggml_get_rows"](self._context, column, top)
            call["ggml_set_name"](weights, b"ffn_moe_weights-%d" % layer)
            flat = call["ggml_reshape_2d"](self._context, weights, CHOSEN, 1)
            self.sums.append(call["ggml_sum_rows"](self._context, flat))
            self._places.append((_values(scores, np.float32), _values(order, np.int32)))
            _values(self.sums[-1], np.float32, 1)[:] = 1.0
        generator = np.random.default_rng(_SEED)
        # As a router's: some experts are liked in general, and each token has its own.
        logits_LNE = generator.normal(size=(LAYERS, 1, EXPERTS)) + generator.normal(size=(LAYERS, _TEXTS, EXPERTS))
        weights_LNE = np.exp(logits_LNE)
        self._scores_LNE = (weights_LNE / weights_LNE.sum(-1, keepdims=True)).astype(np.float32)
        self._order_LNE = np.argsort(-self._scores_LNE, axis=-1, kind="stable").astype(np.int32)

    def __enter__(self) -> _Tensors:
        return self

    def __exit__(self, *exception: object) -> None:
        self._free(self._context)

    def fill(self, number: int) -> None:
        """Another token's scores, ranked as the engine would."""
        for (scores_E, order_E), given_NE, ranked_NE in zip(
            self._places, self._scores_LNE, self._order_LNE, strict=True
        ):
            scores_E[:], order_E[:] = given_NE[number % _TEXTS], ranked_NE[number % _TEXTS]


def _values(tensor: int, kind: type[np.generic], count: int = EXPERTS) -> np.ndarray[Any, Any]:
    memory: Any = (C.c_uint8 * (4 * count)).from_address(Head.from_address(tensor).data)
    found: np.ndarray[Any, Any] = np.frombuffer(memory, kind)
    return found
