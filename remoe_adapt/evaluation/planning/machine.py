"""How fast this machine multiplies with weights, and goes through a layer: measured in a few seconds.

A decoding step is modelled as four sums: what every layer costs beside its experts whatever its size (Python and the
calls of kernels), the bytes of the dense part over the rate at which products with them are computed, what the experts
of a layer take as an expert cache computes them, and the bytes of missing experts over the rate at which storage brings
them. Each is timed on the functions that a decoding step calls.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from remoe_adapt.evaluation import Decoder
from remoe_adapt.expert_cache import byte_of, experts_modules, load_with_expert_cache
from remoe_adapt.expert_cache.encodings import block_type, dequantise, ggml
from remoe_adapt.libraries import tiny_moe

# No cache of a processor holds so many bytes of weights.
SET_BYTES = 96 << 20
# Of the trial of a product.
_TURN_S = 0.015
_STEPS, _GIVEN_STEPS, _LAYERS = 3, 48, 4
# The name of calls of next to no work, among the trials.
_CALL = "call"
# Rows and columns of a tiny model's matrices.
_TINY = 32
# Matrices that are a smaller part of a kind's are not timed; of larger ones than these a part is.
_LEAST_PART, _MOST_VALUES = 0.02, 1 << 24


@dataclass(frozen=True, slots=True)
class Compute:
    """kinds: bytes of the dense part per second that products with one token take, by kind ("bfloat16", "q4_1").
    layer_s: of a layer beside its experts, whatever its size, by format of these. experts_s: of the first layer's
    experts. source: where the rates are from.
    """

    kinds: Mapping[str, float]
    layer_s: Mapping[str, float]
    experts_s: Mapping[str, float]
    threads: int
    source: str

    def seconds(self, bytes_of: Mapping[str, float]) -> float:
        """Of products with so many bytes of each kind of the dense part."""
        return sum(count / self.kinds[kind] for kind, count in bytes_of.items() if count)


class Trial(Protocol):
    """What can be timed."""

    def run(self) -> Any: ...


class ComputeTrials:
    """Times products with the dense part, each format's experts, and the layers of a tiny model, with torch's threads.

    They take turns, round after round, so that other work on the machine slows all alike. Experts are computed between
    the layers of the tiny model, as in a model: in a loop of their own they would find the processor's caches full of
    their code.

    matrices: of the dense part: how many of each kind, outputs and inputs.
    trials: what computes the experts of a layer, by format.
    """

    def __init__(self, matrices: Mapping[tuple[str, int, int], int], trials: Mapping[str, Trial]) -> None:
        self._trials, self._layers = dict(trials), _TinyLayers(cached=False, top_k=1)
        self._layer_s: dict[str, list[float]] = {name: [] for name in trials}
        self._experts_s: dict[str, list[float]] = {name: [] for name in trials}
        self._products: dict[tuple[str, int, int], _Product] = {}
        # The layers of the tiny model have one of these in the place of each product.
        self._call = _Product("float32", _TINY, _TINY, _set_of("float32", _TINY * _TINY * 4))
        self._matrices = dict(matrices)
        for kind in {kind for kind, _, _ in matrices}:
            mine = {key: count * key[1] * key[2] for key, count in matrices.items() if key[0] == kind}
            numbers_B = _set_of(kind, SET_BYTES)
            for key, values in mine.items():
                if values >= _LEAST_PART * sum(mine.values()):
                    rows = min(key[1], max(1, _MOST_VALUES // key[2]))
                    self._products[key] = _Product(kind, rows, key[2], numbers_B)
        self._times_s: dict[Any, list[float]] = {}

    def round(self) -> None:
        """Once more, each of them."""
        for name, trial in self._trials.items():
            layer_s, experts_s = self._layers.seconds(_STEPS, trial)
            self._layer_s[name].append(layer_s)
            self._experts_s[name].append(experts_s)
        turns: dict[Any, Trial] = {_CALL: self._call, **self._products}
        for key, product in turns.items():
            self._times_s.setdefault(key, []).append(_turn_s(product.run))

    def found(self) -> Compute:
        """The medians of all rounds."""
        times_s = {key: median(found) for key, found in self._times_s.items()}
        nbytes, took_s = dict[str, float](), dict[str, float]()
        for key, product in self._products.items():
            kind, rows, _ = key
            parts = self._matrices[key] * rows / product.rows
            nbytes[kind] = nbytes.get(kind, 0.0) + parts * product.nbytes
            beyond_s = max(times_s[key] - times_s[_CALL], times_s[key] / 10)
            took_s[kind] = took_s.get(kind, 0.0) + parts * beyond_s
        rates = {kind: nbytes[kind] / took_s[kind] for kind in sorted(nbytes)}
        layer_s, experts_s = (
            {name: median(times) for name, times in each.items()} for each in (self._layer_s, self._experts_s)
        )
        return Compute(rates, layer_s, experts_s, torch.get_num_threads(), "measured on this machine")


def given_compute(ram_mib_per_s: float, kinds: Iterable[str], expert_bytes: Mapping[str, float], top_k: int) -> Compute:
    """As somebody says: weights are read at one rate; only the layers of a tiny model are timed.

    expert_bytes: of the experts that a token uses in the first layer, by format.
    top_k: how many these are, each of which costs calls.
    """
    rate, (layer_s, calls_s) = ram_mib_per_s * (1 << 20), _TinyLayers(cached=True, top_k=top_k).seconds(_GIVEN_STEPS)
    experts_s = {name: calls_s + size / rate for name, size in expert_bytes.items()}
    return Compute(
        dict.fromkeys(kinds, rate), dict.fromkeys(experts_s, layer_s), experts_s, torch.get_num_threads(), "given"
    )


def _turn_s(run: Callable[[], Any]) -> float:
    """Of a call, over a turn of many: one that is about as long as a token, so that other work on the machine slows it
    as it slows tokens."""
    run()
    begin, calls = time.perf_counter(), 0
    while (took_s := time.perf_counter() - begin) < _TURN_S or not calls:
        run()
        calls += 1
    return took_s / calls


def _set_of(kind: str, nbytes: int) -> Tensor:
    """uint8 [nbytes]: numbers of no meaning, neither tiny nor infinite in any type."""
    if hasattr(torch, kind):
        dtype: torch.dtype = getattr(torch, kind)
        return torch.ones(nbytes // dtype.itemsize, dtype=dtype).view(torch.uint8)
    return torch.full((nbytes,), byte_of(block_type(kind)), dtype=torch.uint8)


class _Product:
    """A product of one token with matrices [rows, cols] of a kind, one after another of those that `numbers_B` holds:
    floats, or blocks as modules in codes compute with them."""

    def __init__(self, kind: str, rows: int, cols: int, numbers_B: Tensor) -> None:
        self.rows = rows
        self._dtype: torch.dtype = getattr(torch, kind, torch.float32)
        self._blocks = None if hasattr(torch, kind) else block_type(kind)
        row_bytes = cols * self._dtype.itemsize if self._blocks is None else self._blocks.row_bytes(cols)
        self.nbytes, self._cols = rows * row_bytes, cols
        if len(numbers_B) < self.nbytes:
            numbers_B = _set_of(kind, self.nbytes)
        self._matrices = itertools.cycle(
            numbers_B[at : at + self.nbytes].view(rows, row_bytes)
            for at in range(0, len(numbers_B) - self.nbytes + 1, -(-self.nbytes // 64) * 64)
        )
        self._x_TK = torch.ones(1, cols, dtype=self._dtype)

    def run(self) -> Tensor:
        matrix_NB, kernels = next(self._matrices), ggml()
        with torch.inference_mode():
            if self._blocks is None:
                return F.linear(self._x_TK, matrix_NB.view(self._dtype))
            if kernels is not None and self._blocks in kernels.types:
                return kernels.matmul(self._x_TK, matrix_NB, self._blocks, self.rows)
            return F.linear(self._x_TK, dequantise(matrix_NB, self._blocks, self._cols))


class _TinyLayers:
    """Layers without weights to speak of.

    cached: their experts are behind an expert cache.
    top_k: how many of them a token chooses.
    """

    def __init__(self, *, cached: bool, top_k: int) -> None:
        self._model = tiny_moe(layers=_LAYERS, experts=2 * top_k, top_k=top_k)
        if cached:
            with tempfile.TemporaryDirectory(prefix="remoe-plan-") as folder:
                self._model.save_pretrained(folder)
                self._model = load_with_expert_cache(folder, 1.0)
        self._trial: Trial | None = None
        # Of each call of experts: its begin, its end, and the end of the trial behind it.
        self._calls_s: list[float] = []
        for module in experts_modules(self._model).values():
            module.register_forward_pre_hook(lambda *_: self._calls_s.append(time.perf_counter()))
            module.register_forward_hook(self._after)

    def _after(self, *_: Any) -> None:
        self._calls_s.append(time.perf_counter())
        if self._trial is not None:
            self._trial.run()
        self._calls_s.append(time.perf_counter())

    def seconds(self, steps: int, trial: Trial | None = None) -> tuple[float, float]:
        """Of a layer beside its experts, and of these: means over so many tokens.

        trial: computed behind its own experts, and counted instead of them.
        """
        self._trial = trial
        beside_s = experts_s = 0.0
        with torch.inference_mode():
            decoder = Decoder(self._model)
            decoder.feed([0])
            for token in range(1, 1 + steps):
                self._calls_s.clear()
                begin = time.perf_counter()
                decoder.feed([token])
                beside_s += time.perf_counter() - begin
                for start, own, end in zip(*[iter(self._calls_s)] * 3, strict=True):
                    beside_s -= end - start
                    experts_s += own - start if trial is None else end - own
        return beside_s / steps / _LAYERS, experts_s / steps / _LAYERS
