"""The ways to hold an MoE's experts that `remoe bench decode` compares, each a model ready to decode one token."""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from remoe_adapt.bench.harness import PacedReads, evict
from remoe_adapt.checkpoints import auto_class, load_base
from remoe_adapt.dial import get_remoe_model
from remoe_adapt.evaluation import Decoder
from remoe_adapt.expert_cache import (
    BLOCK,
    ExpertCache,
    expert_cache_of,
    experts_modules,
    load_whole_or_cached,
    load_with_expert_cache,
)
from remoe_adapt.family import Family, FamilyPoint
from remoe_adapt.recency_settings import Recency
from remoe_adapt.routers import survey_routers

# Where a model has them: transformers' own ways to compute experts.
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
# Enough for a median; the choice between three functions needs no more.
_TRIAL_STEPS = 12


class Decodes(Protocol):
    """One sequence, fed step by step; logits [V] after the last token of each step."""

    def feed(self, ids: Sequence[int]) -> Tensor: ...


class Regime(ABC):
    """A loaded model. `facts` go into the result; `model` is there where it is one of transformers, `cache` is its
    expert cache, if it has one."""

    model: nn.Module | None = None
    cache: ExpertCache | None = None
    facts: dict[str, Any]

    @abstractmethod
    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None: ...

    def use(self, arm: Mapping[str, Any]) -> None:
        """From here on the model is this arm; no slot holds what another arm left, but all that the same arm did."""
        assert not arm, "only a cache has arms"

    def between_steps(self) -> AbstractContextManager[None]:
        """Around each forward."""
        return nullcontext()

    def decoder(self) -> Decodes:
        """For a new sequence."""
        assert self.model is not None
        return Decoder(self.model)


class Stock(Regime):
    """Everything in RAM, computed by the fastest of transformers' own experts functions, as found here and now."""

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        model: Any = load_base(folder)
        self.model = model
        # Versions of transformers differ in which of them they have; eager is in no registry.
        known = [name for name in IMPLEMENTATIONS if name == "eager" or name in ALL_EXPERTS_FUNCTIONS]
        times_ms = {name: _trial_ms(model, name, options["trial_ids"]) for name in known}
        fastest = min(times_ms, key=times_ms.__getitem__)
        model.set_experts_implementation(fastest)
        self.facts = {"experts_implementation": fastest, "experts_implementations_ms": times_ms}


class Whole(Regime):
    """Everything in RAM, as it is loaded where nobody asks for an expert cache."""

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        self.model, self.facts = load_whole_or_cached(folder, arithmetic="auto"), {}


class Cached(Regime):
    """Our expert cache under the dial; an arm is a strength of the family, or a gain of the resident prior."""

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        pace = options.get("pace_mib_per_s")
        paced: dict[str, Any] = {} if pace is None else {"reader": PacedReads(pace * (1 << 20))}
        base = load_with_expert_cache(folder, options["budget"], **options["cache"], **paced)
        cache = expert_cache_of(base)
        assert cache is not None
        dial: dict[str, Any] = {"family": options["family"], "force": True}  # as checked on the model as it is stored
        if options["gain"]:
            routers = survey_routers(base)
            gains = (options["gain"],) * len(routers.usable())
            prior = FamilyPoint(1.0, "resident", {}, Recency.of("resident", gains))
            dial = {"family": Family(Path("resident"), str(folder), routers.fingerprint, (prior,))}
        if options["budget"] == 1.0:  # nothing is read any more
            for layer, count in enumerate(cache.source.num_experts):
                cache.lease(layer, range(count)).release()
        self._has_misses = options["budget"] < 1.0
        self._arm: Mapping[str, Any] | None = None
        # Without its monitor: an arm is one strength and one budget.
        self._controller = get_remoe_model(base, **dial, monitor=False).controller if options["dial"] else None
        self.model, self.cache = base, cache
        self.facts = {
            "dense_bytes": sum(tensor.nbytes for tensor in (*base.parameters(), *base.buffers())),
            "budget_bytes": cache.budget_bytes,
            "expert_bytes": max(cache.source.expert_bytes),
        }

    def use(self, arm: Mapping[str, Any]) -> None:
        assert self.cache is not None
        if self._controller is not None:
            self._controller.set_strength(arm["strength"])
        # The only arm of a process goes on with what it has, as the page cache does for those we are compared with.
        if self._has_misses and self._arm not in (None, arm):
            self.cache.clear()
        self._arm = arm

    def between_steps(self) -> AbstractContextManager[None]:
        return nullcontext() if self._controller is None else self._controller.step()


class Mapped(Regime):
    """transformers' eager function on experts in one memory-mapped file, each expert in one piece: the kernel caches.

    Stronger than mapping the checkpoint, whose tensors from_pretrained would have to copy together.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        self.model = load_base(folder, experts_implementation="eager")
        modules = experts_modules(self.model)
        # Beside the checkpoint, so that it lies on the same disk as what the others read.
        place = folder.parent / "mapped"
        place.mkdir()
        rows = {name: _write_rows(place / name, module) for name, module in modules.items()}
        evict(place)
        for name, module in modules.items():
            _map_rows(place / name, module, rows[name])
        self.facts = {"mapped_bytes": _size(place)}


class AccelerateDisk(Regime):
    """accelerate's disk offload: the experts of all layers on disk in its own format, everything else in RAM."""

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        model = load_base(folder, experts_implementation="eager")
        offload = folder.parent / "accelerate"
        self.model = dispatch_model(model, _experts_on_disk(model), offload_dir=str(offload))
        evict(offload)
        self.facts = {"offloaded_bytes": _size(offload)}


class TransformersDisk(Regime):
    """from_pretrained with the experts of all layers on "disk": accelerate's hooks over memory-mapped safetensors."""

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        config = AutoConfig.from_pretrained(folder)
        # Only names are needed to say what goes to disk, so no weight is made.
        with torch.device("meta"):
            places = _experts_on_disk(auto_class(config).from_config(config))
        offload = folder.parent / "transformers"
        self.model = load_base(folder, device_map=places, offload_folder=str(offload), experts_implementation="eager")
        evict(offload)
        self.facts = {"offloaded_bytes": _size(offload)}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _trial_ms(model: Any, implementation: str, ids: Sequence[int]) -> float:
    """Median time of one token; infinite where the model does not have this function."""
    try:
        model.set_experts_implementation(implementation)
    except ValueError:
        return float("inf")
    decoder, times_ms = Decoder(model), []
    with torch.inference_mode():
        for token in ids[: _TRIAL_STEPS + 2]:
            begin = time.perf_counter()
            decoder.feed([token])
            times_ms.append((time.perf_counter() - begin) * 1e3)
    # The first two calls allocate what later ones use again.
    return statistics.median(times_ms[2:])


def _write_rows(path: Path, module: nn.Module) -> int:
    """All parameters of one expert after the other, each expert from a page boundary on; bytes of one."""
    params = [param.detach() for param in module.parameters(recurse=False)]
    row_bytes = -(-sum(param[0].nbytes for param in params) // BLOCK) * BLOCK
    with path.open("wb") as file:
        for expert in range(len(params[0])):
            file.seek(expert * row_bytes)
            for param in params:
                file.write(param[expert].contiguous().view(torch.uint8).numpy().data)
        file.truncate(len(params[0]) * row_bytes)
    return row_bytes


def _map_rows(path: Path, module: nn.Module, row_bytes: int) -> None:
    whole_B = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    rows_EB = whole_B.view(-1, row_bytes)
    begin = 0
    for name, param in list(module.named_parameters(recurse=False)):
        size = param[0].nbytes
        mapped: Tensor = rows_EB[:, begin : begin + size].view(param.dtype).unflatten(1, param.shape[1:])
        setattr(module, name, nn.Parameter(mapped, requires_grad=False))
        begin += size


def _experts_on_disk(model: nn.Module) -> dict[str, str]:
    """A device map: the experts on disk, everything else on the CPU."""
    experts, places = set(experts_modules(model)), {}

    def place(module: nn.Module, name: str) -> None:
        if name in experts:
            places[name] = "disk"
        elif not any(other.startswith(f"{name}." if name else "") for other in experts):
            places[name] = "cpu"
        else:
            for own, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                places[f"{name}.{own}".removeprefix(".")] = "cpu"
            for child, part in module.named_children():
                place(part, f"{name}.{child}".removeprefix("."))

    place(model, "")
    return places
