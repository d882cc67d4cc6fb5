"""A saved adapter of a tiny base, every route that loads one, and files as an attacker would write them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from remoe_adapt import RemoeConfig

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IDS_BT = torch.tensor([[5, 7, 9, 11, 23], [31, 8, 44, 17, 60]])
PREFIX = "base_model.model."
ROUTER = "model.layers.3.mlp.gate"
HEAD = f"{PREFIX}lm_head.weight"


def saved_base(folder: Path) -> Path:
    """A tiny model on disk, its output layer untied."""
    tiny_model("qwen2_moe", initializer_range=0.2, tie_word_embeddings=False).save_pretrained(folder)
    return folder


def base_at(folder: Path, **kwargs: Any) -> Any:
    """That model in memory, in eval mode."""
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


def saved_adapter(base: Path, folder: Path, **fields: Any) -> Path:
    """An adapter of random deltas of the base, saved by PEFT."""
    torch.manual_seed(1)
    config = RemoeConfig(init_weights=False, task_type="CAUSAL_LM", **fields)
    get_peft_model(base_at(base), config).save_pretrained(folder)
    return folder


def saved_home(folder: Path) -> Path:
    """In `folder`: base, and its adapters: adapter, low (rank 3), and copied (with modules_to_save)."""
    base = saved_base(folder / "base")
    saved_adapter(base, folder / "adapter")
    saved_adapter(base, folder / "low", rank=3)
    saved_adapter(base, folder / "copied", modules_to_save=["lm_head"])
    return folder


def changed(
    adapter: Path,
    folder: Path,
    tensors: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] = dict,
    **fields: Any,
) -> Path:
    """A copy of an adapter with other tensors and other fields of the configuration."""
    shutil.copytree(adapter, folder)
    save_file(dict(tensors(load_file(adapter / WEIGHTS))), folder / WEIGHTS)
    entries = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(entries | fields))
    return folder


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Of two short prompts."""
    return model(input_ids=IDS_BT).logits  # type: ignore[no-any-return]


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a failed load must leave alone."""
    return {
        "modules": [(name, type(module), id(module), module.training) for name, module in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()],
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "configs": dict(getattr(model, "peft_config", None) or {}),
        "flag": getattr(model, "_hf_peft_config_loaded", None),
        "active": [getattr(m, "_active_adapter", None) for m in model.modules()],
        "logits": logits(model),
    }


def same_state(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Bit for bit."""
    plain = all(left[key] == right[key] for key in left if key not in ("values", "logits"))
    values = left["values"].keys() == right["values"].keys() and all(
        torch.equal(left["values"][name].nan_to_num(), right["values"][name].nan_to_num()) for name in left["values"]
    )
    return plain and values and torch.equal(left["logits"], right["logits"])


def by_peft(model: Any, adapter: Path, **kwargs: Any) -> Any:
    return PeftModel.from_pretrained(model, adapter, **kwargs)


def by_peft_on_meta(model: Any, adapter: Path, **kwargs: Any) -> Any:
    return PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=True, **kwargs)


def with_a_given_config(model: Any, adapter: Path, **kwargs: Any) -> Any:
    fields = json.loads((adapter / CONFIG).read_text())
    config = RemoeConfig(task_type="CAUSAL_LM", rank=fields["rank"], modules_to_save=fields["modules_to_save"])
    return PeftModel.from_pretrained(model, adapter, config=config, **kwargs)


def by_transformers(model: Any, adapter: Path, **kwargs: Any) -> Any:
    model.load_adapter(str(adapter), "mine", **kwargs)
    return model


def as_a_second_one(model: Any, adapter: Path, **kwargs: Any) -> Any:
    model.load_adapter(adapter, "second", **kwargs)
    return model


INTO_A_BASE = [by_peft, by_peft_on_meta, with_a_given_config, by_transformers]
WITHOUT_A_BASE: list[Callable[[Path], Any]] = [
    AutoPeftModelForCausalLM.from_pretrained,
    AutoModelForCausalLM.from_pretrained,
]
