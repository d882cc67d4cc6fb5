"""What other engines do with a PEFT LoRA on routers, in the versions that were tried or read.

PEFT itself applies it. An engine that serves many LoRAs has lists of its own of what may have one, and one that leaves
routers out either refuses the adapter or, worse, serves the base and says nothing: so exports state it. How each line
is known is part of it: "run" is by `benchmarks/other_engines.py` (log-probabilities with the LoRA against those of the
live model and of the base), "called" by calling the engine's own loader, "read" by its source alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from remoe_adapt.routers import VLLM_ROUTER_LORA

# vllm/config/lora.py, `MaxLoRARanks`: the ranks that memory can be made for; 16 unless told otherwise.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_VERSION = "0.32.0"


@dataclass(frozen=True, slots=True)
class LoraReader:
    """One engine. outcome: of a LoRA on routers: "applied", "ignored" (it serves the base), "refused" (an error when it
    is loaded), "unknown"; note: what a user does about it."""

    engine: str
    version: str
    known_by: str
    outcome: str
    note: str


_OTHERS = (
    LoraReader("SGLang", "0.5.23", "read", "refused",
               "its list of LoRA modules has no router, and ours names parameters (lora/mem_pool.py, lora/utils.py)"),
    LoraReader("LMDeploy", "0.18.0", "called", "refused",
               "KeyError: no module of it has a LoRA whose name is a parameter's (pytorch/adapter/adapter.py)"),
    LoraReader("TGI", "3.3.6-dev0", "read", "ignored",
               "it warns of unused adapter weights and serves the base (models/__init__.py, adapter_layers)"),
)  # fmt: skip


def lora_readers(model_type: str, rank: int) -> list[dict[str, Any]]:
    """A row for each engine, of an exported LoRA of this rank on a model of this `config.model_type` (text part)."""
    return [asdict(reader) for reader in (_vllm(model_type, rank), *_OTHERS)]


def not_applied(readers: list[dict[str, Any]]) -> str:
    """One line for people: which engines do not apply it, or may not; empty where all do."""
    parts = [
        f"{row['engine']} {row['version']}: {row['outcome']} ({row['note']})"
        for row in readers
        if row["outcome"] != "applied"
    ]
    return (
        f"Engines that do not apply this LoRA, or may not: {'; '.join(parts)}. Use `remoe export merged` there."
        if parts
        else ""
    )


def _vllm(model_type: str, rank: int) -> LoraReader:
    outcome = VLLM_ROUTER_LORA.get(model_type, "unknown")
    fitting = next((size for size in _VLLM_RANKS if size >= rank), None)
    notes = {
        # In those, the runner of the experts calls the router that it was given, which is not the one with the LoRA:
        # 0.22 lets both names mean one module (lora/model_manager.py, `wrapped_by_id`).
        "applied": f"vllm serve BASE --enable-lora --max-lora-rank {fitting}; by their source, versions 0.17 to 0.20 "
        "ignore it where experts call the router",
        "ignored": "its module of the router has another name, so it serves the base and says nothing",
        "refused": "its module of the router has another name: ValueError",
        "unknown": "this architecture was not tried: compare answers with and without it",
    }
    if fitting is None and outcome != "ignored":
        outcome, notes["refused"] = "refused", f"rank {rank} is above its largest, {_VLLM_RANKS[-1]}"
    known_by = "read" if outcome == "unknown" or fitting is None else "run"
    return LoraReader("vLLM", _VLLM_VERSION, known_by, outcome, notes[outcome])
