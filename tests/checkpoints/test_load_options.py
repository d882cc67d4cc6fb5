"""Options of loading that are misspelt or of the wrong type: one error with a remedy, before anything is loaded."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from tiny_checkpoints import save_tiny
from tiny_families import tiny_family
from tiny_models import tiny_model

from remoe_adapt import get_remoe_model, load_with_expert_cache
from remoe_adapt.checkpoints.load import load_base
from remoe_adapt.checkpoints.options import CACHE_OPTIONS
from remoe_adapt.errors import ConfigError, DialError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("options") / "model", "qwen2_moe")


def open_files(folder: Path) -> list[str]:
    """Of this folder, by this process."""
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        return []
    found = []
    for entry in descriptors.iterdir():
        try:
            found.append(str(entry.readlink()))
        except OSError:  # the one that listed them
            continue
    return [path for path in found if path.startswith(str(folder))]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"polcy": "lru"}, r"option 'polcy' is not known \(did you mean policy\?\): give one of expert_cache, .*scope"),
        ({"direct_IO": True}, r"did you mean direct_io\?"),
        ({"budget": 0.5}, r"option 'budget' is not known \(did you mean expert_cache\?\)"),
        ({"quux": 1}, r"option 'quux' is not known: give one of expert_cache, device, .*from_pretrained takes"),
        ({"memory": True}, "memory True: give a size, as '6GiB', or a number of bytes"),
        ({"memory": 0.5}, "memory 0.5: give a size"),
        ({"memory": "much"}, "memory: 'much' is not a size"),
        ({"expert_cache": True}, "expert_cache True: give a size, as '2GiB', a number of bytes, or a share"),
        ({"expert_cache": {"memory": "2GiB"}}, "expert_cache .*: give a size.*options of their own"),
        ({"ram_budget": [1]}, r"ram_budget \[1\]: give a size"),
        ({"storage": 5}, "storage 5: give a folder that `remoe pack` made"),
        ({"policy": ["lru"]}, r"policy \['lru'\] is not one of lru, lfu, lrfu"),
        ({"prefetch": "no"}, "prefetch 'no': give True or False"),
        ({"direct_io": 1}, "direct_io 1: give True or False"),
        ({"threads": "4"}, "threads '4': give the number of reads at a time"),
        ({"reader": "fast"}, "reader 'fast': give something that reads"),
    ],
)
def test_options_of_the_expert_cache(folder: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_with_expert_cache(folder, **options)
    gc.collect()
    assert not open_files(folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"expert_cache": {"policy": "lru"}}, "expert_cache .*: give a size.*options of their own"),
        ({"expert_cache": True}, "expert_cache True: give a size"),
        ({"expert_cache": 0.5, "prefech": True}, r"option 'prefech' is not known \(did you mean prefetch\?\)"),
        ({"budget": 0.5}, r"option 'budget' is not known \(did you mean expert_cache\?\)"),
        ({"recensy": "ema"}, r"did you mean recency\?"),
        ({"quux": 1}, "option 'quux' is not known"),
        ({"expert_cache": 0.5, "quux": 1}, "option 'quux' is not known"),
        ({"expert_cache": 0.5, "memory": True}, "memory True: give a size"),
        ({"monitor": "no"}, "monitor 'no': give True or False"),
        ({"force": 1}, "force 1: give True or False"),
        ({"family": 5}, "family 5: give a folder, a hub id or a Family"),
        ({"profile": 5}, "profile 5: give a name, a file or a DeviceProfile"),
        ({"device": 0.5}, "device 0.5: give its name"),
    ],
)
def test_options_of_get_remoe_model(folder: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        get_remoe_model(folder, **options)


def test_a_base_that_is_none(folder: Path) -> None:
    wrong: Any = 5
    with pytest.raises(ConfigError, match="base 5: give a model, a model folder or a hub id"):
        get_remoe_model(wrong)
    with pytest.raises(ConfigError, match="path 5: give a model folder or a hub id"):
        load_with_expert_cache(wrong)
    base = tiny_model("qwen2_moe")
    with pytest.raises(ConfigError, match=r"did you mean recency_gain\?"):
        get_remoe_model(base, recency_gian=0.2)
    assert "controller" not in base.__dict__


@pytest.mark.parametrize("name", [3, None, True])
def test_the_name_of_the_dial_s_adapter_is_text(name: Any) -> None:
    with pytest.raises(ConfigError, match="adapter_name"):
        get_remoe_model(tiny_model("qwen2_moe"), adapter_name=name)


def test_options_of_from_pretrained_and_of_the_configuration_still_count(folder: Path) -> None:
    options: dict[str, Any] = {"use_cache": False, "attn_implementation": "eager", "local_files_only": True}
    for model in (load_with_expert_cache(folder, **options), load_base(folder, **options)):
        config: Any = model.config
        assert config.use_cache is False and config._attn_implementation == "eager"
    assert set(CACHE_OPTIONS) <= set(load_with_expert_cache.__kwdefaults__ or ())


def test_a_closed_dial_logs_to_no_file(tmp_path: Path) -> None:
    base: Any = tiny_model("qwen2_moe")
    model: PeftModel = get_remoe_model(base, family=tiny_family(base, tmp_path / "family"), monitor=False)
    controller: Any = model.controller
    controller.close()
    with pytest.raises(DialError, match="this controller is closed: call get_remoe_model again") as other:
        controller.set_strength(0.5)
    with pytest.raises(DialError) as refused:
        controller.log_to(tmp_path / "log.jsonl")
    assert str(refused.value) == str(other.value) and not (tmp_path / "log.jsonl").exists()
