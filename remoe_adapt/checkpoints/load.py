"""Models by path or hub id, with the class that generates text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftConfig
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PretrainedConfig

import remoe_adapt.tuner  # noqa: F401 (transformers asks PEFT for the type of an adapter)
from remoe_adapt._support import first_line, printable
from remoe_adapt.checkpoints.options import CACHE_OPTIONS, unknown_option
from remoe_adapt.checkpoints.paths import check_place
from remoe_adapt.errors import ConfigError, RemoeError

# Options that every function of the hub takes.
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")
_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText")
# The same weights may lie there in other formats too, which would double the download.
_HUB_FILES = ("*.json", "*.safetensors", "*.py", "*.model", "*.txt", "*.jinja")


def load_base(base: str | os.PathLike[str], **kwargs: Any) -> nn.Module:
    """`from_pretrained` of the auto class that generates text for this base; AutoModel when there is none.

    base: a model, or an adapter that names one (transformers loads both then).

    Raises ConfigError when it cannot be loaded, or an option is none.
    """
    path = os.fspath(base)
    hub = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
    check_place(base, "base", **hub)
    try:
        config = kwargs.get("config") or model_config(
            path, **hub, **{key: kwargs[key] for key in ("trust_remote_code", "subfolder") if key in kwargs}
        )
        model = auto_class(config).from_pretrained(path, **kwargs)
    except (RemoeError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the files may hold anything, and each kind of damage raises something else
        unknown = unknown_option(error, ("device", *CACHE_OPTIONS)) if isinstance(error, TypeError) else None
        what = f"base {printable(path)!r} cannot be loaded ({first_line(error)}): give a model folder or a hub id."
        raise (unknown or ConfigError(what)) from error
    assert isinstance(model, nn.Module)
    return model


def model_config(path: str, **options: Any) -> PretrainedConfig:
    """The configuration of a model, or of the base that an adapter names: transformers loads both by the adapter's.

    Raises ConfigError as `read_config`.
    """
    try:
        return read_config(path, **options)
    except ConfigError:
        if Path(path).is_dir() and not (Path(path) / "adapter_config.json").is_file():
            raise
        hub = {key: options[key] for key in HUB_OPTIONS if key in options}
        try:
            named = PeftConfig.from_pretrained(path, **hub).base_model_name_or_path
        except Exception:  # no adapter either, whatever is wrong with it: what was said of the model holds
            named = None
        if named is None:
            raise
        return read_config(named, **options)


def checkpoint_folder(base: str | os.PathLike[str], **hub_options: Any) -> Path:
    """An existing folder as it is; safetensors, configuration and tokenizer of a hub id from the hub or its cache.

    Raises ConfigError when neither has it.
    """
    path = os.fspath(base)
    check_place(base, "model", **hub_options)
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, allow_patterns=list(_HUB_FILES), **hub_options))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"{printable(path)!r} cannot be found ({first_line(error)}): give a model folder or a hub id."
        ) from error


def read_config(path: str | os.PathLike[str], **options: Any) -> PretrainedConfig:
    """The configuration of a model folder or hub id. Raises ConfigError, whatever is wrong with it."""
    shown = printable(os.fspath(path))
    try:
        config = AutoConfig.from_pretrained(os.fspath(path), **options)
    except Exception as error:  # config.json may hold anything, and each kind of damage raises something else
        what = "is no model" if Path(path).is_dir() else "cannot be found"
        raise ConfigError(f"{shown!r} {what} ({first_line(error)}): give a model folder or a hub id.") from error
    assert isinstance(config, PretrainedConfig)
    return config


def auto_class(config: PretrainedConfig) -> Any:
    """The auto class that makes the text-generating model of a configuration; AutoModel when there is none."""
    # transformers' table is private; its public way, from_config, would make the model to find out.
    known = (getattr(transformers, name) for name in _AUTO_CLASSES)
    found = next((auto for auto in known if type(config) in auto._model_mapping), None)
    if found is not None:
        return found
    # A model with code of its own is in no table: its configuration names the classes that make it.
    remote = getattr(config, "auto_map", None) or {}
    return next((getattr(transformers, name) for name in _AUTO_CLASSES if name in remote), AutoModel)


DTYPES = ("auto", "float32", "bfloat16", "float16")


def usable_device(device: str | int | torch.device | None) -> str:
    """The device to run on; None: a GPU if there is one. Raises ConfigError when it is not here."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    try:
        found = torch.device(name)
        # A tensor is made, because torch accepts the name of a device that this machine lacks.
        if found.type != "meta":
            torch.empty(1, device=found)
            return str(found)
        reason = "it holds no values"
    # torch raises AssertionError for a device that it was built without.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error)
    raise ConfigError(f"cannot run on device {printable(str(name))}: {reason}. Use cpu, or a GPU that is here (cuda:0)")


def load_with_tokenizer(
    path_or_hub_id: str | Path, *, device: str | None = None, dtype: str = "auto"
) -> tuple[Any, Any]:
    """(model, tokenizer), the model as `load_base` makes it, in eval mode.

    device: None: a GPU if there is one.
    dtype: one of `DTYPES`; "auto" means as stored.

    Raises:
        ConfigError: nothing loadable is there, `device` cannot compute here, or `dtype` is unknown; in one line.
    """
    name = str(path_or_hub_id)
    target = usable_device(device)
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    check_place(path_or_hub_id, "cannot load the model:")
    model_config(name)  # first: where it is damaged, the tokenizer is not what is missing
    tokenizer = load_tokenizer(name)
    return on_device(load_base(name, dtype=dtype), target).eval(), tokenizer


def on_device(model: nn.Module, device: str | None) -> nn.Module:
    """The model, moved there; None: where it is. Raises ConfigError where there is no room."""
    try:
        return model if device is None else model.to(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} cannot be used: {first_line(error)}") from error


def load_tokenizer(path_or_hub_id: str) -> Any:
    """The tokenizer of a model. Raises ConfigError when there is none."""
    check_place(path_or_hub_id, "no tokenizer:")
    try:
        return AutoTokenizer.from_pretrained(path_or_hub_id)
    except Exception as error:  # the files may hold anything, and each kind of damage raises something else
        raise ConfigError(
            f"no tokenizer at {path_or_hub_id} ({first_line(error)}): give a model folder that holds one, or pass "
            "tokenizer="
        ) from error


def device_of(model: nn.Module) -> torch.device:
    """Where the model's input goes: the device of its first parameter."""
    return next(model.parameters()).device


def max_positions(model: nn.Module) -> int | None:
    """Positions the model was configured for, or None where its configuration names no limit."""
    config: Any = model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
