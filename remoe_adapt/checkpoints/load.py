"""Models by path or hub id: whether they are there, with which class they are made, and of which stored tensors."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants, model_info, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import PeftConfig
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.quantizers.base import HfQuantizer

import remoe_adapt.tuner  # noqa: F401 (transformers asks PEFT for the type of an adapter)
from remoe_adapt._support import first_line, printable
from remoe_adapt.checkpoints.gguf_file import MAGIC
from remoe_adapt.checkpoints.options import CACHE_OPTIONS, unknown_option
from remoe_adapt.checkpoints.safetensors_files import CONFIG
from remoe_adapt.errors import ConfigError, RemoeError

# Options that every function of the hub takes.
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")
# The hub is asked once, and not long, before anything is downloaded.
_ASK_S = 10.0
DTYPES = ("auto", "float32", "bfloat16", "float16")
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
    # The table is private, but no public call says whether an auto class knows a configuration.
    known = (getattr(transformers, name) for name in _AUTO_CLASSES)
    found = next((auto for auto in known if type(config) in auto._model_mapping), None)
    if found is not None:
        return found
    # A model with code of its own is in no table: its configuration names the classes that make it.
    remote = getattr(config, "auto_map", None) or {}
    return next((getattr(transformers, name) for name in _AUTO_CLASSES if name in remote), AutoModel)


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
    path_or_hub_id: str | Path,
    *,
    device: str | None = None,
    dtype: str = "auto",
    load: Callable[..., nn.Module] | None = None,
) -> tuple[Any, Any]:
    """(model, tokenizer), the model in eval mode.

    device: None: a GPU if there is one.
    dtype: one of `DTYPES`; "auto" means as stored.
    load: makes the model of its name, `device` and `dtype`; None: as `load_base` does.

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
    model = on_device(load_base(name, dtype=dtype), target) if load is None else load(name, device=target, dtype=dtype)
    return model.eval(), tokenizer


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


def is_path(text: str) -> bool:
    """Whether it can only be a path: no hub id looks so, or the folder that it would lie in is here."""
    # os.path: names that no file system takes are no folders to it; pathlib raises for some.
    return (
        text in ("", ".", "..")
        or text.startswith(("./", "../", "/", "~"))
        or text.endswith("/")
        or "\\" in text
        or text.count("/") > 1
        or os.path.isabs(text)  # noqa: PTH117
        or ("/" in text and os.path.isdir(os.path.dirname(text)))  # noqa: PTH112, PTH120
    )


def is_gguf(path: object) -> bool:
    """Whether it is the path of a GGUF file that is there, by its name or its first bytes."""
    if not isinstance(path, str | os.PathLike) or not os.path.isfile(path):  # noqa: PTH113
        return False
    if os.fspath(path).endswith(".gguf"):
        return True
    try:
        with Path(path).open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def names_gguf(path: object, options: Mapping[str, Any]) -> bool:
    """Whether what is asked for is a GGUF: by its path, or as from_pretrained takes one."""
    return is_gguf(path) or options.get("gguf_file") is not None


def gguf_path(base: str | os.PathLike[str], gguf_file: str, **hub_options: Any) -> Path:
    """Where a GGUF lies that is named as from_pretrained takes it: in a folder, or fetched from the hub, with its later
    parts and the configuration beside it.

    base: the folder or hub id.
    gguf_file: the file in it, of a split model the first part.

    Raises ConfigError when neither has it.
    """
    if not isinstance(gguf_file, str) or not gguf_file.endswith(".gguf") or ".." in Path(gguf_file).parts:
        raise ConfigError(f"gguf_file {printable(repr(gguf_file))}: give the name of a GGUF file of the model.")
    check_place(base, "model", **hub_options)
    folder, shown = Path(os.fspath(base)), printable(os.fspath(base))
    if not folder.is_dir():
        parts = re.sub(r"-[0-9]{5}(-of-[0-9]{5}\.gguf)", r"-?????\1", gguf_file)
        beside = (Path(gguf_file).parent / CONFIG).as_posix()
        try:
            folder = Path(snapshot_download(os.fspath(base), allow_patterns=[parts, beside], **hub_options))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ConfigError(
                f"{shown!r} cannot be found ({first_line(error)}): give a model folder or a hub id."
            ) from error
    if not is_gguf(path := folder / gguf_file):
        raise ConfigError(f"{shown!r} has no GGUF {printable(gguf_file)}: check the spelling.")
    return path


def check_place(
    given: str | os.PathLike[str], what: str, *, error: type[RemoeError] = ConfigError, gguf: bool = False, **hub: Any
) -> None:
    """Whether a folder, or a model of the hub or its cache, is there, before anybody takes long to look for it.

    what: what it is to be, the beginning of messages.
    gguf: a GGUF file will do as well.
    hub: `cache_dir`, `revision`, `token`, `local_files_only`, as from_pretrained takes them.

    Raises `error` when it is not, naming what was given, and the reason.
    """
    text, shown = os.fspath(given), printable(os.fspath(given))
    if os.path.isdir(text):  # noqa: PTH112
        return
    if is_gguf(text):
        if gguf:
            return
        raise error(
            f"{what} {shown!r} cannot be loaded, it is a GGUF, which load_with_expert_cache and get_remoe_model alone "
            "read: give a folder, or a hub id."
        )
    if os.path.isfile(text):  # noqa: PTH113
        raise error(f"{what} {shown!r} cannot be loaded, it is a file: give its folder, or a hub id.")
    cached = _cached(text, hub)
    if not isinstance(given, str) or (is_path(text) and not cached):
        more = " (~ is not expanded: write the whole path)" if text.startswith("~") else ""
        raise error(
            f"{what} {shown!r} cannot be found: no such folder{more}. Give an existing folder, or a hub id owner/name."
        )
    if not cached:
        _ask_hub(text, shown, what, error, hub)


def _cached(text: str, hub: dict[str, Any]) -> bool:
    cache_dir, revision = hub.get("cache_dir"), hub.get("revision")
    try:
        found = try_to_load_from_cache(text, "config.json", cache_dir=cache_dir, revision=revision)
    except (HFValidationError, OSError, ValueError):
        return False
    return isinstance(found, str)


def _ask_hub(text: str, shown: str, what: str, error: type[RemoeError], hub: dict[str, Any]) -> None:
    start = f"{what} {shown!r} cannot be found: it is no folder here"
    if hub.get("local_files_only") or constants.HF_HUB_OFFLINE:
        raise error(
            f"{start}, and not in the hub's cache, which alone may be used (local_files_only or HF_HUB_OFFLINE): check "
            "the spelling, or download it first."
        )
    try:
        model_info(text, revision=hub.get("revision"), token=hub.get("token"), timeout=_ASK_S)
    except HFValidationError as fault:
        raise error(f"{start}, and no hub id (owner/name): give one of them.") from fault
    except (RepositoryNotFoundError, RevisionNotFoundError) as fault:
        raise error(f"{start}, and the hub shows no such model ({first_line(fault)}): check the spelling.") from fault
    except Exception as fault:  # of the network, in classes that change with the hub's client
        raise error(
            f"{start}, and the hub cannot be asked for it ({first_line(fault)}): check the spelling; offline, download "
            "it where there is a network and give its folder."
        ) from fault


# Parameter of the model -> pattern of the conversion it goes through, or None -> names of the tensors.
Sources = dict[str, dict[str | None, list[str]]]


def stored_sources(
    model: PreTrainedModel, meta: dict[str, Any], names: Iterable[str], quantizer: HfQuantizer | None = None
) -> tuple[Sources, dict[str, WeightConverter]]:
    """(which tensors of a checkpoint each parameter is made of, the conversions by their pattern).

    meta: the model's state dict, with or without values.
    names: of the checkpoint's tensors.
    quantizer: of a quantised checkpoint, made with dequantize=True: its conversions begin with dequantising.
    """
    mapping = get_model_conversion_mapping(model, hf_quantizer=quantizer)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    found: defaultdict[str, dict[str | None, list[str]]] = defaultdict(dict)
    # In transformers' own order, in which its converters stack experts: expert 10 comes after 9, not after 1.
    for key in sorted(names, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, meta)
        if name not in meta and key in meta:  # a renaming meant for another layout has spoiled it
            name, pattern = key, None
        found[name].setdefault(pattern, []).append(key)
    return dict(found), {pattern: entry for entry in converters for pattern in entry.source_patterns}
