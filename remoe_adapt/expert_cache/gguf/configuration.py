"""The configuration of a model out of a GGUF's entries, out of a config.json beside it, or as it was given."""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from remoe_adapt._support import first_line, printable
from remoe_adapt.checkpoints import ARCHITECTURE_KEY, GgufFile, read_config
from remoe_adapt.errors import ConfigError, ExpertReadError, MissingDependencyError, UncacheableError
from remoe_adapt.expert_cache.gguf.architectures import ARCHITECTURES, Architecture
from remoe_adapt.expert_cache.gguf.tensors import Stored
from remoe_adapt.routers import GGUF_ARCH

_CONFIG = "config.json"
_FLOAT32, _FLOAT64 = 6, 12
# Entries that say how positions are stretched, and the field of `rope_parameters`; others are not known here.
_ROPE_SCALING = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
    "attn_factor": "attention_factor",
}
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}


def architecture_of(file: GgufFile) -> str:
    """`general.architecture`. Raises ConfigError when the file is no model, ExpertReadError when it has none."""
    if (kind := file.text("general.type", "model")) != "model":
        raise ConfigError(f"{printable(file.path)} is of the type {printable(kind)}, not a model.")
    if not (found := file.text(ARCHITECTURE_KEY, "")):
        raise ExpertReadError(f"{printable(file.path)} has no {ARCHITECTURE_KEY}: fetch it again.")
    return found


def configuration(
    files: Sequence[GgufFile],
    tensors: Mapping[str, Stored],
    given: PretrainedConfig | str | os.PathLike[str] | None,
    options: Mapping[str, Any],
) -> PretrainedConfig:
    """The configuration of the text model that a GGUF holds.

    files: its parts. tensors: of all of them.
    given: a configuration, or the folder or hub id of one; None: the config.json beside the file where it is of this
        architecture and these sizes, else the file's own entries.
    options: for the hub.

    Raises ConfigError when `given` cannot be read or is of another architecture, UncacheableError when the entries
    alone do not tell enough, ExpertReadError when they are damaged.
    """
    first = files[0]
    architecture = architecture_of(first)
    num_experts = first.number(f"{architecture}.expert_count", 0)
    if not num_experts:
        raise UncacheableError(
            f"{printable(first.path)} is a dense {printable(architecture)} model, without experts: load it with "
            "from_pretrained(folder, gguf_file=...)."
        )
    if given is not None:
        whole = given if isinstance(given, PretrainedConfig) else read_config(given, **options)
        config = whole.get_text_config()
        if not _fits(config, architecture):
            raise ConfigError(
                f"config is of a {printable(config.model_type)} model, {printable(first.path)} is of the architecture "
                f"{printable(architecture)}: give the configuration of the model that it was made from."
            )
        return config
    found = _beside(first, architecture, tensors) or _from_entries(first, architecture, tensors)
    if found is None:
        found = _of_transformers(first, architecture)
        if num_experts not in [getattr(found, name, None) for name in _COUNTS]:
            raise _not_enough(first, f"transformers does not read that it has {num_experts} experts")
        # transformers looks for the tensor in the first part alone.
        found.tie_word_embeddings = "output.weight" not in tensors
    return found


def _fits(config: PretrainedConfig, architecture: str) -> bool:
    model_type = config.model_type
    return GGUF_ARCH.get(model_type, model_type) == architecture


def _beside(file: GgufFile, architecture: str, tensors: Mapping[str, Stored]) -> PretrainedConfig | None:
    """What the config.json beside the file says, if it can be of the same model: folders hold many GGUFs."""
    if not (file.path.parent / _CONFIG).is_file():
        return None
    try:
        config = read_config(file.path.parent).get_text_config()
    except ConfigError:
        return None
    if not _fits(config, architecture):
        return None
    layers = file.number(f"{architecture}.block_count", 0) - file.number(f"{architecture}.nextn_predict_layers", 0)
    embedding = tensors.get("token_embd.weight")
    found = (layers, embedding.shape if embedding is not None else None)
    same = found == (config.num_hidden_layers, (config.vocab_size, config.hidden_size))
    theta = file.values.get(f"{architecture}.rope.freq_base")
    rope = getattr(config, "rope_parameters", None) or {}
    if same and isinstance(theta, float) and isinstance(rope.get("rope_theta"), int | float):
        # A continued training for longer texts has the sizes of its base, and another base of its rotations.
        same = math.isclose(theta, rope["rope_theta"], rel_tol=1e-5)
    return config if same else None


def _from_entries(file: GgufFile, architecture: str, tensors: Mapping[str, Stored]) -> PretrainedConfig | None:
    """A configuration by our table; None where it has none that is made of entries."""
    known = {
        model_type: entry
        for model_type, entry in ARCHITECTURES.items()
        if entry.config is not None and GGUF_ARCH.get(model_type) == architecture
    }
    if not known:
        return None
    (model_type, entry), *_ = known.items()
    fields = _fields(file, architecture, entry)
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ExpertReadError(f"{printable(file.path)} has no token_embd.weight of two dimensions: fetch it again.")
    fields["vocab_size"] = embedding.shape[0]
    fields["tie_word_embeddings"] = "output.weight" not in tensors
    layers = file.number(f"{architecture}.block_count", 0) - file.number(f"{architecture}.nextn_predict_layers", 0)
    # Before a model of a billion layers is made: each has tensors.
    if not 0 < layers <= len(tensors):
        raise ExpertReadError(
            f"{printable(file.path)} claims {layers} layers in {len(tensors)} tensors: is it damaged?"
        )
    fields["num_hidden_layers"] = layers
    cls = CONFIG_MAPPING[model_type]
    for key, name in _TOKENS.items():
        if (full := f"tokenizer.ggml.{key}") in file.values:
            fields[name] = file.number(full, 0)
    try:
        made = cls(**fields)
    except Exception as error:  # the entries may hold anything, and each kind of damage raises something else
        raise ExpertReadError(
            f"{printable(file.path)}: its entries make no configuration ({first_line(error)}): fetch it again."
        ) from error
    assert isinstance(made, PretrainedConfig)
    return made


def _fields(file: GgufFile, architecture: str, entry: Architecture) -> dict[str, Any]:
    rest: dict[str, Any] = dict(entry.config or {})
    fixed_rope = rest.pop("rope_scaling", {})
    fields: dict[str, Any] = {}
    for key, name in entry.entries.items():
        if (full := f"{architecture}.{key}") in file.entries:
            fields[name] = _value(file, full)
            # transformers divides by sizes before it looks at them; without dense layers theirs may be 0.
            if not fields[name] and key != "feed_forward_length":
                raise ExpertReadError(f"{printable(file.path)}: {printable(full)} is 0: is it damaged?")
    rope: dict[str, Any] = {"rope_type": "default"}
    if (base := f"{architecture}.rope.freq_base") in file.entries:
        rope["rope_theta"] = _value(file, base)
    prefix = f"{architecture}.rope.scaling."
    kind = file.text(f"{prefix}type", "none")
    if kind != "none":
        scaling = {key.removeprefix(prefix): key for key in file.entries if key.startswith(prefix)}
        odd = sorted(scaling.keys() - {"type", "finetuned", *_ROPE_SCALING})
        if odd or kind not in ("linear", "yarn"):
            raise _not_enough(file, f"its {prefix}{odd[0] if odd else 'type'} is not known here")
        rope |= {_ROPE_SCALING[key]: _value(file, full) for key, full in scaling.items() if key in _ROPE_SCALING}
        rope |= {"rope_type": kind, **fixed_rope}
    elif any(re.fullmatch(r"rope_(freqs|factors_long|factors_short)\.weight", t.name) for t in file.tensors):
        raise _not_enough(file, "its rotations are stretched by a table of factors")
    return fields | rest | {"rope_parameters": rope}


def _value(file: GgufFile, key: str) -> int | float:
    """A number of one entry. Raises UncacheableError for a list, ExpertReadError for anything else."""
    if key not in file.values:
        raise _not_enough(file, f"{printable(key)} is a list")
    value = file.values[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ExpertReadError(f"{printable(file.path)}: {printable(key)} is {printable(repr(value))}: is it damaged?")
    # A float of 32 bits is meant as its shortest decimal number: 1e-06, not 9.999999974752427e-07.
    return value if isinstance(value, int) else _shortest(value)


def _shortest(value: float) -> float:
    if value > torch.finfo(torch.float32).max:
        return value
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value


def _of_transformers(file: GgufFile, architecture: str) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(str(file.path.parent), gguf_file=file.path.name)
    except ImportError as error:
        raise MissingDependencyError(
            f"transformers reads the configuration of a {printable(architecture)} GGUF by the gguf package "
            f"({first_line(error)}): pip install 'remoe-adapt[export]', or give config=."
        ) from error
    except Exception as error:  # the entries may hold anything, and each kind of damage raises something else
        raise _not_enough(file, f"transformers makes none of them ({first_line(error)})") from error
    assert isinstance(config, PretrainedConfig)
    return config


def _not_enough(file: GgufFile, why: str) -> UncacheableError:
    return UncacheableError(
        f"{printable(file.path)}: its entries do not tell the whole configuration of the model, {why}: give config=, "
        "the folder or hub id of the model that it was made from, or put that model's config.json beside it."
    )


def float_type(tensors: Mapping[str, Stored]) -> torch.dtype:
    """The dtype that from_pretrained chooses for a GGUF: the half type of its numbers, fp32 where blocks are
    quantised."""
    kinds = {stored.kind.name for stored in tensors.values()}
    if not kinds <= {"f32", "f16", "bf16"}:
        return torch.float32
    return torch.bfloat16 if "bf16" in kinds else torch.float16 if "f16" in kinds else torch.float32
