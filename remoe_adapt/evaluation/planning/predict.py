"""`plan_model`: what fits, how much of it is hit, and how long a token takes, before anything is downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from remoe_adapt._support import size_text
from remoe_adapt.device_profile import DeviceProfile, parse_size
from remoe_adapt.errors import ConfigError
from remoe_adapt.evaluation.planning.advice import commands, names_of, unknowns
from remoe_adapt.evaluation.planning.hit_rates import GAIN_SOURCE, GAINS, HitRates, known_rates
from remoe_adapt.evaluation.planning.machine import (
    SET_BYTES,
    Compute,
    ComputeTrials,
    Trial,
    given_compute,
)
from remoe_adapt.evaluation.planning.sources import Source, open_source
from remoe_adapt.evaluation.planning.storage import Storage, given_storage, measured_storage
from remoe_adapt.expert_cache import (
    CHUNK,
    KV_CACHE_PART,
    READ_THREADS,
    Footprint,
    Footprints,
    Parameters,
    bytes_for_slots,
    domains_of,
    least_budget,
    parameters_of,
)
from remoe_adapt.expert_cache.encodings import ggml
from remoe_adapt.pressure import Sensors, os_sensors

# What `remoe pack` can make, as (bits, dense_bits).
PACKS = ((None, 8), (None, 4), (8, None), (8, 8), (4, None), (4, 8), (4, 4))
# A pack is worth its time where experts or dense part become smaller than this part of what they are.
_SMALLER = 0.95
# KV cache of a short text, activations, and buffers of libraries: a process grew by 6 to 10 MB.
_PROCESS_BYTES = 8 << 20
# Of measurements, some 0.2 s each.
_ROUNDS = 10
# How experts are timed beside those that are in a cache: without one.
_WHOLE = "whole"


@dataclass(frozen=True)
class PlanOptions:
    """What to plan for; None: as described at the command line.

    profile: the device's; profile_name: as commands are to name it, where it is a file.
    storage: a pack that is there. storage_mib, ram_mib: MiB/s. memory: instead of the profile's.
    share: of the experts in the cache, instead of the profile's. hub: options of from_pretrained for the hub.
    """

    model: str | os.PathLike[str]
    profile: DeviceProfile
    profile_name: str | None = None
    storage: Path | None = None
    family: str | None = None
    trace: Path | None = None
    config: str | None = None
    storage_mib: float | None = None
    ram_mib: float | None = None
    memory: str | int | None = None
    share: float | None = None
    hub: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Fit:
    """How a format lies in memory. share: of the experts in slots; why: it does not fit; whole: all is in memory."""

    share: float
    budget_bytes: int
    memory_bytes: int
    whole: bool
    why: str | None = None


def plan_model(options: PlanOptions) -> dict[str, Any]:
    """The plan, JSON-ready: `model`, `known_from`, `profile`, `parameters`, `memory`, `machine`, `hit_rates` (where
    they are from), `formats`, `rows` (one for each format and way to run it), `advice` (`commands`, `python`, and which
    row they are of; None where nothing fits), `unknown` (what the plan does not know).

    Of a format: `name`, `bits`, `dense_bits`, `dense_bytes`, `experts_bytes`, `stored_bytes`, `fits`, `why`, `share`,
    `budget_bytes`, `memory_bytes` (dense part, slots, an expert that is dequantised), `kv_bytes`. Of a row: `format`,
    `way` ("all in RAM", "strength 0", "resident 0.1" ...), `share`, `hit_rate`, `bytes_per_token` (read), `compute_ms`,
    `read_ms` (what a token waits for), `tpot_ms`, `memory_bytes`. Times are None where no rate of storage is known.

    Raises as `open_source` and `known_rates`; ConfigError for options that cannot work.
    """
    planner = Planner(options)
    for _ in range(_ROUNDS):
        planner.measure()
    return planner.plan()


class Planner:
    """What is known of a model, and of this machine after some rounds of `measure`; made and planned as `plan_model`
    says."""

    def __init__(self, options: PlanOptions) -> None:
        _check(options)
        self._source = source = open_source(options.model, options.config, **(options.hub or {}))
        if source.pack is not None:
            if options.storage is not None:
                raise ConfigError(f"{options.model} is a pack itself: give its model with the storage, or it alone.")
            options = replace(options, storage=source.pack)
        self._options = options
        self._parameters = parameters_of(source.checkpoint)
        self._memory = _memory(options)
        counted = Footprints(source.checkpoint, has_files=source.has_files, on_codes=ggml() is not None)
        self._footprints = _footprints(counted, options.storage, stored=source.pack is None)
        self._fits = {
            name: _fit(each, self._memory[0], _wanted_share(options), options.profile.expert_cache.scope)
            for name, each in self._footprints.items()
        }
        shares = [fit.share for fit in self._fits.values() if fit.share]
        self._hits = known_rates(options.trace, options.family, shares)
        fitting = {name: each for name, each in self._footprints.items() if self._fits[name].why is None}
        # Formats of which nothing is read are planned without.
        self._storages = {
            name: _storage(options, source, name, each)
            for name, each in fitting.items()
            if self._fits[name].share < 1.0
        }
        self._trials: ComputeTrials | None = None
        self._given: Compute | None = None
        sizes, trials = _trials(counted, fitting, self._fits, self._parameters)
        if options.ram_mib is not None:
            kinds = {kind for each in fitting.values() for kind in each.read_bytes}
            self._given = given_compute(options.ram_mib, kinds, sizes, max(self._parameters.chosen_L, default=1))
        else:
            matrices = {key: count for each in fitting.values() for key, count in each.dense_matrices.items()}
            self._trials = ComputeTrials(matrices, {name: make() for name, make in trials.items()})

    def measure(self) -> None:
        """A round of what this machine computes; nothing where its rate is given."""
        if self._trials is not None:
            self._trials.round()

    def _computed(self) -> Compute:
        if self._given is not None:
            return self._given
        assert self._trials is not None
        return self._trials.found()

    def plan(self) -> dict[str, Any]:
        """As `plan_model`, of all rounds so far, at least one."""
        options, source, parameters, fits = self._options, self._source, self._parameters, self._fits
        footprints, hits, storages, compute = self._footprints, self._hits, self._storages, self._computed()
        memory_bytes, memory_source = self._memory
        given = None if options.storage_mib is None else given_storage(options.storage_mib)
        # Of the first format that is read; others differ in the size of their reads.
        storage = next(iter(storages.values()), given or Storage(None, "nothing of this plan is read"))
        rows = [
            row
            for name, each in footprints.items()
            if fits[name].why is None
            for row in _rows(name, each, fits[name], parameters, hits, storages.get(name, storage), compute)
        ]
        best = _best(rows)
        return {
            "model": os.fspath(options.model),
            "known_from": source.known_from,
            "profile": options.profile.name,
            "parameters": {
                "total": parameters.total,
                "active": parameters.active,
                "experts": parameters.experts,
                "embedding": parameters.embedding,
                "layers": parameters.layers,
                "moe_layers": len(parameters.chosen_L),
                "num_experts": max(parameters.num_experts_L, default=0),
                "top_k": max(parameters.chosen_L, default=0),
            },
            "memory": {
                "bytes": memory_bytes,
                "source": memory_source,
                "reserve_bytes": options.profile.memory.reserve_bytes,
                "kv_bytes": memory_bytes // KV_CACHE_PART,
            },
            "machine": {
                "storage_bytes_per_s": storage.bytes_per_s,
                "storage_burst_bytes_per_s": storage.burst_bytes_per_s,
                "storage_source": storage.source,
                "compute_source": compute.source,
                "bytes_per_s": dict(compute.kinds),
                "layer_ms": {name: 1e3 * took_s for name, took_s in compute.layer_s.items()},
                "experts_ms": {name: 1e3 * took_s for name, took_s in compute.experts_s.items()},
                "threads": compute.threads,
            },
            "hit_rates": {"source": hits.source, "prior": GAIN_SOURCE},
            "formats": [_format(name, each, fits[name], source, memory_bytes) for name, each in footprints.items()],
            "rows": rows,
            "advice": None
            if best is None
            else {
                **commands(source, options, footprints[best["format"]], best, fits[best["format"]].budget_bytes),
                "row": best,
            },
            "unknown": unknowns(source, options, storage, compute, hits, parameters, rows),
        }


def _check(options: PlanOptions) -> None:
    for name, value in (("storage-mib", options.storage_mib), ("ram-mib", options.ram_mib)):
        if value is not None and not 0 < value < 1e9:
            raise ConfigError(f"{name} {value!r}: give MiB per second, as 2000.")
    if options.share is not None and not 0 < options.share <= 1:
        raise ConfigError(f"share {options.share!r}: give a part of the experts, above 0 and at most 1.")


def _wanted_share(options: PlanOptions) -> float:
    return options.profile.expert_cache.share if options.share is None else options.share


def _memory(options: PlanOptions) -> tuple[int, str]:
    """What the model may take in all, and who says so."""
    if options.memory is not None:
        memory = parse_size(options.memory) if isinstance(options.memory, str) else options.memory
        if memory <= 0:
            raise ConfigError(f"memory {options.memory!r}: give a size, as 6GiB.")
        return memory, "given"
    profile = options.profile
    if profile.memory.budget_bytes is not None:
        return profile.memory.budget_bytes, f"profile {profile.name}"
    reading = Sensors(os_sensors()).read()
    known = [value for name in ("memory.total", "cgroup.limit") if (value := reading.value(name)) is not None]
    left = int(min(known, default=0.0)) - profile.memory.reserve_bytes
    if left <= 0:
        raise ConfigError(
            f"profile {profile.name} leaves {size_text(profile.memory.reserve_bytes)} free, which this machine does "
            "not have beside a model: give --memory, as 6GiB, or another profile."
        )
    return left, f"this machine's, less the {size_text(profile.memory.reserve_bytes)} that {profile.name} keeps free"


def _footprints(counted: Footprints, storage: Path | None, *, stored: bool) -> dict[str, Footprint]:
    """Formats by name, the stored one first if that is wanted; packs only where they take less memory than it."""
    if storage is not None:
        packed = {f"pack {storage.name}": counted.of_pack(storage)}
        return {names_of(each): each for each in (counted.of(),)} | packed if stored else packed
    whole = counted.of()
    found = {names_of(whole): whole}
    for bits, dense_bits in PACKS:
        # Experts of floats stay so in a pack only where somebody wants no other.
        if bits is None and not whole.workspace_bytes:
            continue
        made = counted.of(bits, dense_bits)
        experts, dense = made.total_bytes / whole.total_bytes, made.dense_bytes / whole.dense_bytes
        if experts <= 1.0 and dense <= 1.0 and min(experts, dense) < _SMALLER:
            found[names_of(made)] = made
    return found


def _fit(each: Footprint, memory_bytes: int, wanted_share: float, scope: str) -> Fit:
    """Divides memory as `load_with_expert_cache(memory=)` does."""
    total = each.total_bytes
    fixed = each.dense_bytes + each.workspace_bytes
    # Beside what the budget is divided by: a process that reads and computes grows by this too.
    beside = _PROCESS_BYTES + READ_THREADS * min(CHUNK, max(each.piece_bytes))
    try:
        left = bytes_for_slots(memory_bytes, fixed)
    except ConfigError as error:
        return Fit(0.0, 0, fixed + beside, False, str(error))
    least = least_budget(_Sizes(each), domains_of(_Sizes(each), scope))
    if left < least:
        return Fit(
            0.0, 0, fixed + beside + least, False, f"slots need {size_text(least)} at least, {size_text(left)} are left"
        )
    budget = max(least, min(int(wanted_share * total), left))
    return Fit(budget / total, budget, fixed + beside + budget, left >= total)


class _Sizes:
    """A footprint as the budget's code takes a source of experts: sizes, and nothing to read."""

    def __init__(self, each: Footprint) -> None:
        self.layers, self.num_experts, self.expert_bytes = each.layers, each.num_experts, each.expert_bytes

    def read(self, layer: int, expert: int) -> Any:
        raise AssertionError("a footprint holds no experts")

    def give_back(self) -> None:
        return None


def _storage(options: PlanOptions, source: Source, name: str, each: Footprint) -> Storage:
    """Of reads as large as those of a format's experts, where they lie or would lie."""
    if options.storage_mib is not None:
        return given_storage(options.storage_mib)
    place, file = source.folder, source.reads_from
    if options.storage is not None and name.startswith("pack "):
        files = sorted(options.storage.glob("*.safetensors"), key=lambda path: path.stat().st_size)
        place, file = options.storage, files[-1] if files else None
    return measured_storage(file if file is None or file.is_file() else None, place, max(each.piece_bytes))


def _held(name: str, each: Footprint, how: str | None = None) -> str:
    """What the experts of a format are called: formats with other dense parts share them."""
    experts = name if name.startswith("pack ") else names_of(each).partition(",")[0]
    return experts if how is None else f"{experts}, {how}"


def _trials(
    counted: Footprints, fitting: Mapping[str, Footprint], fits: Mapping[str, Fit], parameters: Parameters
) -> tuple[dict[str, int], dict[str, Callable[[], Trial]]]:
    """How experts of formats are held, floats that fit whole also as transformers has them, without a cache: bytes of
    those of a token in the first layer, and what makes their trial."""
    chosen = parameters.chosen_L
    sizes, trials = dict[str, int](), dict[str, Callable[[], Trial]]()
    for name, each in fitting.items():
        ways: dict[str, dict[str, bool]] = {_held(name, each): {}}
        if fits[name].whole and not each.workspace_bytes:
            ways[_held(name, each, how=_WHOLE)] = {"whole": True}
        for held, way in ways.items():
            sizes[held] = chosen[0] * each.expert_bytes[0]
            trials[held] = partial(counted.trial, each, chosen, SET_BYTES, **way)
    return sizes, trials


def _rows(
    name: str,
    each: Footprint,
    fit: Fit,
    parameters: Parameters,
    hits: HitRates,
    storage: Storage,
    compute: Compute,
) -> list[dict[str, Any]]:
    sizes = [size * top_k for size, top_k in zip(each.expert_bytes, parameters.chosen_L, strict=True)]
    # Layers may differ in their experts, or in how many a token uses.
    layers = sum(sizes) / sizes[0]
    dense_s = compute.seconds(each.read_bytes)
    read = sum(size * top_k for size, top_k in zip(each.piece_bytes, parameters.chosen_L, strict=True))

    def row(way: str, share: float, hit_rate: float, gain: float = 0.0, strength: float = 0.0) -> dict[str, Any]:
        held = _held(name, each, _WHOLE if way == "all in RAM" and not each.workspace_bytes else None)
        missing = (1 - hit_rate) * read
        compute_s = dense_s + parameters.layers * compute.layer_s[held] + layers * compute.experts_s[held]
        token_s = storage.token_s(compute_s, missing)
        in_slots = each.total_bytes if share == 1.0 else fit.budget_bytes
        return {
            "format": name,
            "way": way,
            "gain": gain,
            "strength": strength,
            "share": share,
            "hit_rate": hit_rate,
            "bytes_per_token": missing,
            "compute_ms": 1e3 * compute_s,
            "read_ms": None if token_s is None else 1e3 * (token_s - compute_s),
            "tpot_ms": None if token_s is None else 1e3 * token_s,
            "memory_bytes": fit.memory_bytes - fit.budget_bytes + in_slots,
        }

    found = [row("all in RAM", 1.0, 1.0)] if fit.whole else []
    if fit.share >= 1.0:
        return found
    found.append(row("strength 0", fit.share, hits.rate(fit.share)))
    found += [row(f"resident {gain:g}", fit.share, hits.rate(fit.share, gain), gain=gain) for gain in GAINS]
    for strength in sorted(hits.strengths):
        rate = hits.at_strength(strength, fit.share)
        found.append(row(f"strength {strength:g}", fit.share, rate, strength=strength))
    return found


def _format(name: str, each: Footprint, fit: Fit, source: Source, memory_bytes: int) -> dict[str, Any]:
    is_stored = each.bits is None and each.dense_bits is None and not name.startswith("pack ")
    return {
        "name": name,
        "bits": each.bits,
        "dense_bits": each.dense_bits,
        "dense_bytes": each.dense_bytes,
        "experts_bytes": each.total_bytes,
        "expert_bytes": max(each.expert_bytes),
        "stored_bytes": source.stored_bytes if is_stored and source.stored_bytes else each.stored_bytes,
        "fits": fit.why is None,
        "kv_bytes": memory_bytes // KV_CACHE_PART,
        **asdict(fit),
    }


def _best(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row that is recommended: of those that cost no quality beyond the format's, the fastest; more bits where they
    are hardly slower. Without times, the largest share."""
    plain = [row for row in rows if not row["gain"] and not row["strength"]]
    timed = [row for row in plain if row["tpot_ms"] is not None]
    if not timed:
        return max(plain, key=lambda row: row["share"], default=None)
    fastest = min(row["tpot_ms"] for row in timed)
    # Formats come from the most bits to the fewest.
    return next(row for row in timed if row["tpot_ms"] <= 1.1 * fastest)
