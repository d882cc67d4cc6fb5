"""Every route that loads a saved adapter, made all or nothing for REMOE adapters.

PEFT and transformers add an adapter to the model first and open its weights after that. So the load is known here while
it is under way: the tuner asks for it before it touches a module, and an error takes back whatever was done.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.config import PeftConfigMixin
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, PeftType
from torch import Tensor, nn
from transformers.integrations.peft import PeftAdapterMixin

from remoe_adapt._support import printable, read_json, say_once
from remoe_adapt.errors import AdapterCorruptError, ConfigError
from remoe_adapt.libraries import Snapshot, override
from remoe_adapt.tuner.card import write_card
from remoe_adapt.tuner.config import RemoeConfig
from remoe_adapt.tuner.fitting import copy_modules
from remoe_adapt.tuner.stored import (
    FAMILY_FILE,
    StoredAdapter,
    find_adapter,
    find_file,
    refuse_prior_points,
    warn_of_missing_prior,
)

_ALLOW = "allow_other_base"
_MAX_CONFIG_BYTES = 16 << 20


@dataclass
class Load:
    """A load under way. `ours`: it is of a REMOE adapter; `pickle_first`: transformers was told to prefer pickles;
    `state_dict`: given instead of a file; `stored` and `family`: the files that were found."""

    ours: bool = False
    allow_other_base: bool = False
    pickle_first: bool = False
    state_dict: Mapping[str, Tensor] | None = None
    stored: StoredAdapter | None = None
    family: Path | None = None


_current: ContextVar[Load | None] = ContextVar("remoe_load", default=None)


def current_load() -> Load | None:
    """The load that is under way in this thread."""
    return _current.get()


@contextmanager
def all_or_nothing(root: nn.Module, adapter_name: str | None, allow_other_base: bool) -> Iterator[Load]:
    """While open, `current_load` is the load of an adapter into `root`, which is as before when it ends in an error."""
    outer = _current.get()
    if outer is not None:  # from_pretrained calls load_adapter, and takes back both
        outer.allow_other_base |= allow_other_base
        yield outer
        return
    load = Load(allow_other_base=allow_other_base)
    before = Snapshot(root, _values_of(root, adapter_name))
    token = _current.set(load)
    try:
        yield load
    except BaseException:
        if load.ours:
            before.restore()
        raise
    finally:
        _current.reset(token)
    if load.ours and load.stored is not None:
        warn_of_missing_prior(load.stored.path.parent.absolute(), load.family)


def _values_of(root: nn.Module, adapter_name: str | None) -> list[Tensor]:
    """What is overwritten when the weights of an adapter that is there already are loaded again."""
    config = (getattr(root, "peft_config", None) or {}).get(adapter_name)
    if not isinstance(config, RemoeConfig):
        return []
    ending = f".{adapter_name}"
    return [value for name, value in root.named_parameters() if name.endswith(ending) or f"{ending}." in name]


def read_weights(config: RemoeConfig, model_id: str | os.PathLike[str], subfolder: str | None, **hub: Any) -> None:
    """Note in `config` which tensors the file beside it holds; the tuner compares them with the model.

    In a load there must be such a file, wherever it is; else a configuration may be read alone, and only a local file
    is looked at. Raises AdapterCorruptError as `find_adapter`.
    """
    load = _current.get()
    if load is None:
        folder = Path(os.fspath(model_id), subfolder or "")
        config.stored = find_adapter(folder) if (folder / SAFETENSORS_WEIGHTS_NAME).is_file() else None
        return
    load.ours = True
    load.stored = config.stored = find_adapter(model_id, subfolder, **hub)
    folder = load.stored.path.parent.absolute()
    if load.pickle_first and (folder / WEIGHTS_NAME).is_file():
        raise AdapterCorruptError(
            f"{printable(folder)} has {WEIGHTS_NAME} beside {SAFETENSORS_WEIGHTS_NAME}, and use_safetensors=False "
            "would read that pickle, which can run code: leave use_safetensors out."
        )
    if not Path(os.fspath(model_id)).is_dir() and subfolder is not None:  # in a repository it is fetched by itself
        find_file(model_id, FAMILY_FILE, **hub)
    load.family = folder.parent / FAMILY_FILE


def guard_loaders() -> None:
    """Put this module between the callers and PEFT's and transformers' loaders; once.

    Each replacement gets the original as its first argument.
    """
    # No handles are kept: a process that has imported this package may load a REMOE adapter at any time.
    override(PeftConfigMixin, "from_json_file", _from_json_file)
    override(PeftConfigMixin, "from_pretrained", _config_from_pretrained)
    override(PeftModel, "from_pretrained", _model_from_pretrained)
    override(PeftModel, "load_adapter", _load_adapter)
    override(PeftModel, "create_or_update_model_card", _create_or_update_model_card)
    override(PeftAdapterMixin, "load_adapter", _load_adapter_of_transformers)


def _from_json_file(original: Any, cls: type[PeftConfigMixin], path_json_file: Any, **kwargs: Any) -> Any:
    """The configurations of REMOE adapters are read in bounded depth and size, and without what only a caller may say.

    Raises ConfigError.
    """
    try:
        values = original(cls, path_json_file, **kwargs)
    except (ValueError, RecursionError, TypeError) as error:  # TypeError: PEFT takes it for an object
        raise ConfigError(f"{printable(path_json_file)} is no JSON that can be read: {printable(error)}.") from error
    if not isinstance(values, dict) or not isinstance(values.get("peft_type", ""), str):
        raise ConfigError(f"{printable(path_json_file)} is no configuration: it must be an object with a peft_type.")
    if values.get("peft_type") != "REMOE":
        return values
    values = read_json(Path(path_json_file), ConfigError, max_bytes=_MAX_CONFIG_BYTES)
    if reserved := {"cls", "self"} & values.keys():
        raise ConfigError(f"{printable(path_json_file)} has the key {reserved.pop()!r}, which is no field.")
    if _ALLOW in values:
        del values[_ALLOW]
        say_once(
            f"{printable(path_json_file)} holds {_ALLOW}, which is ignored: only who loads an adapter can say that it "
            "may meet another base."
        )
    return values


def _config_from_pretrained(
    original: Any,
    cls: type[PeftConfigMixin],
    pretrained_model_name_or_path: Any,
    subfolder: str | None = None,
    **kwargs: Any,
) -> Any:
    """transformers and AutoPeftModel call PeftConfig's, which makes a RemoeConfig without a word to its class."""
    config = original(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
    if isinstance(config, RemoeConfig):
        config.allow_other_base = bool(kwargs.get(_ALLOW, False))
        hub: dict[str, Any] = PeftConfigMixin._split_kwargs(kwargs)[0]
        read_weights(config, pretrained_model_name_or_path, subfolder, **hub)
    return config


def _model_from_pretrained(original: Any, cls: type[PeftModel], *args: Any, **kwargs: Any) -> Any:
    given = inspect.signature(original).bind(cls, *args, **kwargs).arguments
    refuse_prior_points(given["model_id"], kwargs.get("subfolder"))
    with all_or_nothing(given["model"], given.get("adapter_name"), bool(kwargs.get(_ALLOW, False))):
        return original(cls, *args, **kwargs)


def _load_adapter(original: Any, model: PeftModel, *args: Any, **kwargs: Any) -> Any:
    allowed = bool(kwargs.pop(_ALLOW, False))
    given = inspect.signature(original).bind(model, *args, **kwargs).arguments
    refuse_prior_points(given["model_id"], kwargs.get("subfolder"))
    with all_or_nothing(model, given["adapter_name"], allowed) as load:
        config = model.peft_config.get(given["adapter_name"])
        if isinstance(config, RemoeConfig) and (load.stored is None or load.stored is not config.stored):
            # Made by hand, or loaded before: nobody has looked at this file.
            hub = PeftModel._split_kwargs(given.get("kwargs", {}))[0]
            read_weights(config, given["model_id"], hub.pop("subfolder", None), **hub)
        return original(model, *args, **kwargs)


def _load_adapter_of_transformers(original: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    allowed = bool(kwargs.pop(_ALLOW, False))
    given = inspect.signature(original).bind(model, *args, **kwargs).arguments
    settings = {**vars(given["load_config"])} if given.get("load_config") is not None else {}
    settings |= given.get("kwargs", {})
    with all_or_nothing(model, given.get("adapter_name") or "default", allowed) as load:
        load.state_dict = given.get("adapter_state_dict")
        load.pickle_first = settings.get("use_safetensors") is False
        source = given.get("peft_model_id") or settings.get("pretrained_model_name_or_path")
        if source is not None:
            refuse_prior_points(source, (settings.get("download_kwargs") or {}).get("subfolder"))
        config = given.get("peft_config")
        if isinstance(config, RemoeConfig) and source is not None and load.state_dict is None:
            hub = dict(settings.get("download_kwargs") or {})
            read_weights(config, source, hub.pop("subfolder", None), **hub)
        result = original(model, *args, **kwargs)
        if load.ours:
            # Before 5.18, transformers leaves modules_to_save as they are in the base, without a word.
            copy_modules(model, given.get("adapter_name") or "default", load.state_dict, load.stored)
        return result


def _create_or_update_model_card(original: Any, model: PeftModel, output_dir: str) -> None:
    if model.peft_type == PeftType("REMOE"):
        write_card(model, Path(output_dir))
    original(model, output_dir)
