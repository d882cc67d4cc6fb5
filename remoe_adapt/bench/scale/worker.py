"""A process that loads the model of `remoe bench scale` and decodes with it: JSON lines in, JSON lines out.

It is fresh, so that what it takes is the model's alone.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers.models.auto.modeling_auto  # noqa: F401  (part of the process, not of what a model takes)
from torch import Tensor, nn

from remoe_adapt._support import return_freed_memory
from remoe_adapt.bench import harness
from remoe_adapt.checkpoints import GgufFile
from remoe_adapt.evaluation import Decoder
from remoe_adapt.expert_cache import expert_cache_of, load_with_expert_cache

# One (experts module, hidden states, ids, weights) for each call of a layer.
_Call = tuple[nn.Module, Tensor, Tensor, Tensor]


class Worker(harness.Worker):
    """Answers `open` and `load` once, then any number of `decode`, then `look_ups`."""

    def __init__(self) -> None:
        self._model: Any = None
        self._before_bytes = 0

    def do_open(self, path: str) -> dict[str, Any]:
        """Read the header of the file: where every tensor is."""
        begin_s = time.perf_counter()
        file = GgufFile(Path(path))
        took_s = time.perf_counter() - begin_s
        header_bytes = min(tensor.offset for tensor in file.tensors)
        return {"open_s": took_s, "header_bytes": header_bytes, "tensors": len(file.tensors), "file_bytes": file.size}

    def do_load(self, path: str, threads: int, **options: Any) -> dict[str, Any]:
        """Load the model behind a cache; options: of load_with_expert_cache."""
        torch.set_num_threads(threads)
        gc.collect()
        return_freed_memory()
        self._before_bytes = _anonymous_bytes()
        maps = _num_maps()
        begin_s = time.perf_counter()
        self._model = model = load_with_expert_cache(path, **options).eval()
        load_s = time.perf_counter() - begin_s
        cache = expert_cache_of(model)
        assert cache is not None
        gc.collect()
        return_freed_memory()
        source = cache.source
        return {
            "load_s": load_s,
            "load_growth_bytes": _anonymous_bytes() - self._before_bytes,
            "dense_bytes": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
            "budget_bytes": cache.budget_bytes,
            "expert_bytes": max(source.expert_bytes),
            "experts": sum(source.num_experts),
            "maps": _num_maps(),
            "maps_before": maps,
        }

    def do_decode(self, ids: Sequence[int], warm: int) -> dict[str, Any]:
        """Feed these tokens one at a time; the first `warm` ones are not counted."""
        cache = expert_cache_of(self._model)
        assert cache is not None
        times_ms = []
        gc.collect()
        gc.disable()  # a collection would be a step that takes longer
        decoder = Decoder(self._model)
        with torch.inference_mode():
            for number, token in enumerate(ids):
                if number == warm:
                    cache.reset_stats()
                begin_s = time.perf_counter()
                decoder.feed([token])
                times_ms.append(1e3 * (time.perf_counter() - begin_s))
        gc.enable()
        stats = cache.stats(layers=False)
        return {
            "times_ms": times_ms[warm:],
            "hits": stats["hits"],
            "misses": stats["misses"],
            "bytes": stats["bytes"],
            "stall_s": stats["stall_s"],
            "anon_growth_bytes": _anonymous_bytes() - self._before_bytes,
            "maps": _num_maps(),
            "arithmetic": stats["arithmetic"],
        }

    def do_look_ups(self, ids: Sequence[int], warm: int, rounds: int) -> dict[str, Any]:
        """What a look-up costs, arithmetic aside: the experts modules run once more on what they were given while
        these tokens were decoded, with nothing computed on the slots. Those must be hits: `misses` says so."""
        cache = expert_cache_of(self._model)
        assert cache is not None
        calls: list[_Call] = []
        modules = [module for module in self._model.modules() if "cached_experts" in vars(module)]
        experts = [vars(module)["cached_experts"] for module in modules]
        layouts = [each.layout for each in experts]
        decoder = Decoder(self._model)
        try:
            for each, layout in zip(experts, layouts, strict=True):
                each.layout = _Recording(layout, calls)
            with torch.inference_mode():
                for number, token in enumerate(ids):
                    if number == warm:
                        calls.clear()
                    decoder.feed([token])
            for each, layout in zip(experts, layouts, strict=True):
                each.layout = _Nothing(layout)
            looked_up = sum(len(set(call[2].flatten().tolist())) for call in calls)
            by_module = dict(zip(modules, experts, strict=True))
            runs = [(by_module[call[0]].run, call) for call in calls]
            cache.reset_stats()
            times_us = []
            with torch.inference_mode():
                for _ in range(rounds):
                    # Nothing waits here, so the processor's time is all of it, whoever else computes meanwhile.
                    begin_s = time.process_time()
                    for run, call in runs:
                        run(*call)
                    times_us.append(1e6 * (time.process_time() - begin_s) / looked_up)
        finally:
            for each, layout in zip(experts, layouts, strict=True):
                each.layout = layout
        return {"us": times_us, "misses": cache.stats(layers=False)["misses"], "look_ups": looked_up}


class _Around:
    """A layout as it is, but for what it computes."""

    def __init__(self, layout: Any) -> None:
        self._layout = layout

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layout, name)


class _Recording(_Around):
    def __init__(self, layout: Any, calls: list[_Call]) -> None:
        super().__init__(layout)
        self._calls = calls

    def compute(
        self, layer: int, module: nn.Module, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, chosen: Any
    ) -> Tensor:
        self._calls.append((module, hidden_TD, ids_TK, weights_TK))
        found: Tensor = self._layout.compute(layer, module, hidden_TD, ids_TK, weights_TK, chosen)
        return found


class _Nothing(_Around):
    def compute(
        self, layer: int, module: nn.Module, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, chosen: Any
    ) -> Tensor:
        return hidden_TD


def _anonymous_bytes() -> int:
    """RssAnon, proc(5): what the process has taken for itself, without mapped files."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) << 10


def _num_maps() -> int:
    """Memory mappings, of which a process may have vm.max_map_count."""
    return Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").count("\n")


if __name__ == "__main__":
    harness.speak(Worker().answer)
