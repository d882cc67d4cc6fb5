"""A tiny base with a tokenizer and a family of random points on disk, for tests that need real files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from remoe_adapt import Family, RemoeConfig
from remoe_adapt.routers.discover import fingerprint
from remoe_adapt.tuner.layer import remoe_layers

EOS = "<eos>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token: 256 of them and an end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([EOS, *alphabet])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=EOS, pad_token=EOS)


def save_base(folder: Path, seed: int = 0, positions: int = 256) -> PreTrainedModel:
    """Writes a byte-level model with its tokenizer; 8 experts, top-2, 4 layers."""
    # Wide enough an initialisation that routing matters to the output.
    sizes: dict[str, Any] = {
        "vocab_size": 257,
        "max_position_embeddings": positions,
        "eos_token_id": 0,
        "initializer_range": 0.3,
    }
    model = tiny_model("qwen2_moe", seed=seed, **sizes)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def save_words(file: Path, documents: int, least: int = 5, lengths: int = 40) -> list[str]:
    """Writes texts with structure as JSON lines, and returns them: words repeat within a document."""
    words = ["expert", "router", "token", "weight", "cache", "layer", "delta"]
    texts = [" ".join(words[(i * j) % 7] for j in range(least + i % lengths)) for i in range(1, documents + 1)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def save_family(
    base: PreTrainedModel, folder: Path, strengths: tuple[float, ...] = (0.5, 1.0), *, control: bool = True
) -> Family:
    """Writes a family of random deltas, each as large as its strength says. `base` is wrapped and left as it was."""
    family = Family.create(folder, "tiny/base", fingerprint(base))
    torch.manual_seed(1)
    for strength in (*strengths, *((None,) if control else ())):
        tuned = get_peft_model(base, RemoeConfig(init_weights=False))
        for layer in remoe_layers(tuned).values():
            layer.remoe_delta["default"].data *= strength or 0.05
        name = "control" if strength is None else Family.adapter_name(strength)
        tuned.save_pretrained(folder / name)
        tuned.unload()
        if strength is None:
            family.set_control(name)
        else:
            family.add_point(strength, name)
    return family
