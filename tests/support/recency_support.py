"""A tiny model whose routing matters, prompts of two lengths, and what it decodes and chooses."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import tiny_model
from torch import Tensor

from remoe_adapt.evaluation.record import record_forward

PROMPT = torch.tensor([[5, 17, 40, 8, 61, 33]])
LONGER = torch.tensor([[9, 2, 77, 5, 17, 40, 8, 61, 33, 12, 50]])
HYBRIDS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
}


def routing_matters(folder: str = "qwen2_moe", **overrides: Any) -> Any:
    """A tiny model whose output depends on its routing; it never ends a text."""
    model: Any = tiny_model(folder, **{"initializer_range": 0.3, "max_position_embeddings": 256, **overrides})
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def decode(model: Any, ids: Tensor = PROMPT, **options: Any) -> Tensor:
    made: Tensor = model.generate(ids, **{"max_new_tokens": 24, "do_sample": False, **options})
    return made


def chosen(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    """Experts [L, T, K] of one forward."""
    with torch.no_grad(), record_forward(model) as recorder:
        model(ids, **inputs)
        return recorder.take()


def left_padded() -> tuple[Tensor, Tensor, int]:
    """(ids, mask, padding): PROMPT and LONGER as one batch."""
    pad = LONGER.shape[1] - PROMPT.shape[1]
    batch = torch.cat([torch.cat([torch.zeros((1, pad), dtype=torch.int64), PROMPT], dim=1), LONGER])
    mask = torch.ones_like(batch)
    mask[0, :pad] = 0
    return batch, mask, pad
