"""A tiny random model of one architecture, on which the contracts are checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

IDS = (3, 9, 4, 30)
TOP_K, EXPERTS = 2, 8


@cache
def model_class() -> Any:
    """Imported late: `contracts()` lists rows without transformers."""
    from transformers import Qwen2MoeForCausalLM

    return Qwen2MoeForCausalLM


def tiny_config() -> Any:
    """Two layers of eight experts, top-2, hidden size 32."""
    from transformers import Qwen2MoeConfig

    return Qwen2MoeConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_experts=EXPERTS, num_experts_per_tok=TOP_K, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip


def tiny_model() -> Any:
    """In eval mode; the random state is as before."""
    # A check must not change the random numbers of whoever asks for it.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class()(tiny_config()).eval()


def tiny_moe(*, layers: int, experts: int, top_k: int) -> Any:
    """Like `tiny_model`, with other counts: what a layer costs whatever its size is timed on it."""
    config = tiny_config()
    config.num_hidden_layers, config.num_experts, config.num_experts_per_tok = layers, experts, top_k
    config.layer_types = ["full_attention"] * layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class()(config).eval()


def ids() -> torch.Tensor:
    """[1, 4]."""
    return torch.tensor([IDS])


@contextmanager
def no_bars() -> Iterator[None]:
    """Within, transformers shows no progress of files."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
