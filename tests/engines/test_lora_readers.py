"""Exports in the terms of engines that are not installed: names and shapes that vLLM looks for, and what it misses.

`benchmarks/other_engines.py` runs vLLM itself; here its names stand as a table, so that an export, a version of
transformers or of PEFT that changes ours is noticed without it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open
from tiny_checkpoints import save_tiny, stock
from tiny_families import tiny_family

from remoe_adapt.engines import export_lora, export_merged, lora_readers, not_applied
from remoe_adapt.routers import VLLM_ROUTER_LORA

# vLLM 0.32.0 (vllm/model_executor/models/<file>.py): the router in the files that it reads, and its own module of it.
_MLP_GATE = ("mlp.gate.weight", "mlp.gate")
VLLM_NAMES = {
    "ernie4_5_moe": _MLP_GATE,  # ernie45_moe.py
    "glm4_moe": _MLP_GATE,  # glm4_moe.py
    "gpt_oss": ("mlp.router.weight", "mlp.router"),  # gpt_oss.py
    "granitemoe": ("block_sparse_moe.router.layer.weight", "block_sparse_moe.gate"),  # granitemoe.py
    "mixtral": ("block_sparse_moe.gate.weight", "block_sparse_moe.gate"),  # mixtral.py
    "olmoe": _MLP_GATE,  # olmoe.py
    "qwen2_moe": _MLP_GATE,  # qwen2_moe.py
    "qwen3_moe": _MLP_GATE,  # qwen3_moe.py
}
QUICK = ("glm4_moe", "gpt_oss", "granitemoe", "mixtral")
EXPERTS, HIDDEN = 8, 32


def shapes(folder: Path) -> dict[str, list[int]]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return found


def fate(module: str, theirs: str, layer: int) -> str:
    """What vLLM's rules make of a LoRA of this module: it goes by the last part of a name first, then by all of it."""
    if module == f"model.layers.{layer}.{theirs}":
        return "applied"
    return "ignored" if module.rpartition(".")[2] == theirs.rpartition(".")[2] else "refused"


def test_every_architecture_that_was_tried_has_its_names_here() -> None:
    assert VLLM_NAMES.keys() == VLLM_ROUTER_LORA.keys()


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in VLLM_NAMES]
)
def test_exports_have_the_names_that_vllm_reads_and_its_fate_is_what_the_table_says(kind: str, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", kind)
    family = tiny_family(stock(base), tmp_path / "family", (1.0,))
    export_merged(base, family, 1.0, tmp_path / "merged")
    merged, theirs = shapes(tmp_path / "merged"), VLLM_NAMES[kind]
    assert merged == shapes(base)
    routers = {name: shape for name, shape in merged.items() if name.endswith(f".{theirs[0]}")}
    first_moe = 4 - len(routers)
    assert routers == {f"model.layers.{n}.{theirs[0]}": [EXPERTS, HIDDEN] for n in range(first_moe, 4)}

    result = export_lora(base, family, 1.0, tmp_path / "lora")
    lora = shapes(tmp_path / "lora")
    modules = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in lora}
    assert len(modules) == len(routers) == result["routers"]
    fates = {fate(module, theirs[1], int(module.split(".")[2])) for module in modules}
    vllm = result["engines"][0]
    assert fates == {VLLM_ROUTER_LORA[kind]} == {vllm["outcome"]} and vllm["known_by"] == "run"
    # A and B as vLLM's loader takes them: [rank, in], [out, rank].
    assert {tuple(shape) for name, shape in lora.items() if ".lora_A." in name} == {(EXPERTS, HIDDEN)}
    assert {tuple(shape) for name, shape in lora.items() if ".lora_B." in name} == {(EXPERTS, EXPERTS)}


def test_what_is_not_applied_is_said() -> None:
    applied = lora_readers("gpt_oss", 128)
    assert applied[0]["outcome"] == "applied" and "--max-lora-rank 128" in applied[0]["note"]
    note = not_applied(applied)
    assert "vLLM" not in note and "TGI 3.3.6-dev0: ignored" in note and "remoe export merged" in note
    ignored = not_applied(lora_readers("mixtral", 8))
    assert "vLLM 0.32.0: ignored" in ignored and "says nothing" in ignored
    assert "vLLM 0.32.0: unknown" in not_applied(lora_readers("zaya", 16))
    wide = lora_readers("qwen3_moe", 513)[0]
    assert wide["outcome"] == "refused" and "513" in wide["note"]
    assert "--max-lora-rank 64" in lora_readers("qwen3_moe", 60)[0]["note"]
    assert not_applied([applied[0]]) == ""
