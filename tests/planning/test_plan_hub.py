"""A hub id is planned from its metadata: huggingface_hub's own client, and a server that says what it was asked for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, hub_of
from huggingface_hub import constants, hf_api
from tiny_checkpoints import save_tiny

from remoe_adapt.dial import profile_of
from remoe_adapt.errors import ConfigError
from remoe_adapt.evaluation.planning import PlanOptions, open_source, plan_model

DATA = Path(__file__).parent / "data"
REPOSITORY = "somebody/moe"
GIVEN = ("--storage-mib", "500", "--ram-mib", "8000")


def online(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    """huggingface_hub asks this hub, as with HF_ENDPOINT, which it reads when it is imported."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{template.split('/', 3)[3]}")
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)


def sharded(folder: Path) -> int:
    """A repository with weights in two files; the bytes that its index tells."""
    save_tiny(folder, "qwen2_moe", shards="40KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    return int(index["metadata"]["total_size"])


def test_configuration_and_index_are_fetched_and_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total_bytes = sharded(tmp_path / "repository")
    with hub_of(REPOSITORY, tmp_path / "repository") as hub:
        online(monkeypatch, hub)
        there: dict[str, Any] = {"cache_dir": str(tmp_path / "cache")}
        source = open_source(REPOSITORY, **there)
        files = ("config.json", "model.safetensors.index.json")
        assert hub.asked == [(method, name) for name in files for method in ("HEAD", "GET")]
        assert (source.known_from, source.stored_bytes, source.has_weights) == ("the index", total_bytes, False)
        plan = plan_model(PlanOptions(REPOSITORY, profile_of(None), storage_mib=500, ram_mib=8000, hub=there))
        assert plan["formats"][0]["stored_bytes"] == total_bytes and plan["rows"]
        assert plan["advice"]["commands"][-1].startswith(f"remoe run {REPOSITORY} ")
        # What is there already is not fetched again.
        assert [name for method, name in hub.asked[4:] if method == "GET"] == []
        assert not [name for _, name in hub.asked if name.endswith(".safetensors")]


def test_a_model_of_one_file_has_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "repository").mkdir()
    shutil.copy(DATA / "olmoe-1b-7b" / "config.json", tmp_path / "repository")
    with hub_of(REPOSITORY, tmp_path / "repository") as hub:
        online(monkeypatch, hub)
        source = open_source(REPOSITORY, cache_dir=str(tmp_path / "cache"))
        assert source.known_from == "config.json" and source.stored_bytes is None
        assert hub.asked[-1] == ("HEAD", "model.safetensors.index.json")
        with pytest.raises(ConfigError, match="hub shows no such model"):
            open_source("nobody/moe", cache_dir=str(tmp_path / "cache"))


@pytest.mark.slow
def test_the_command_asks_the_endpoint_of_the_environment(tmp_path: Path) -> None:
    total_bytes = sharded(tmp_path / "repository")
    with hub_of(REPOSITORY, tmp_path / "repository") as hub:
        environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
        done = subprocess.run(
            [sys.executable, "-m", "remoe_adapt", "plan", REPOSITORY, *GIVEN, "--json"],
            env=environment | {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["formats"][0]["stored_bytes"] == total_bytes
        assert not [name for _, name in hub.asked if name.endswith(".safetensors")]
