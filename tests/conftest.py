"""Fixtures every test file may use. Offline, one torch thread: results do not depend on a neighbour or a network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch and huggingface_hub are imported: both read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Workers of pytest-xdist fill the cores by themselves: threads of theirs would take cores from one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Before any kernel is jitted: without a GPU, Triton interprets them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from peft import PeftModel
from tiny_families import tiny_family
from tiny_models import tiny_model
from transformers import PreTrainedModel

from remoe_adapt._support.process import say_once
from remoe_adapt.dial.load import get_remoe_model
from remoe_adapt.family.family import Family

REPO_ROOT = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Random models differ between tests only where a test says so; what is said once is said in each test."""
    torch.manual_seed(0)
    say_once.cache_clear()


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return REPO_ROOT


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of data and traces that may lie beside the clone; never inside the repository."""
    shared = REPO_ROOT.parent / "shared"
    if not shared.is_dir():
        pytest.skip("no ../shared beside the repository: its data and traces are not part of a clone")
    return shared


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Of a tiny Qwen2-MoE; read only."""
    made = tiny_family(tiny_model("qwen2_moe"), tmp_path_factory.mktemp("family") / "family")
    return Family.load(made.path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base on disk, its family beside it; read only."""
    folder = tmp_path_factory.mktemp("saved") / "base"
    base: Any = tiny_model("qwen2_moe")
    base.save_pretrained(folder)
    tiny_family(base, folder / "family")
    return folder


@pytest.fixture(scope="module")
def family_dir(base: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family on disk, of the model that a test file's own fixture `base` makes; read only."""
    return tiny_family(base, tmp_path_factory.mktemp("made") / "family").path


@pytest.fixture
def copied(family_dir: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(family_dir, tmp_path / "family"))


@pytest.fixture(scope="module")
def upstream() -> Iterator[Any]:
    """A server on a real socket that answers what a test tells it to; needs the extra `serve`."""
    from proxied import Upstream

    with Upstream() as server:
        yield server


@pytest.fixture
def model(family: Family) -> PeftModel:
    """Under the default profile's dial; it never ends a text."""
    model = get_remoe_model(tiny_model("qwen2_moe"), family=family)
    model.generation_config.eos_token_id = None
    return model
