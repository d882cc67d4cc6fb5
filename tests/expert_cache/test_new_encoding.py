"""A new encoding of experts is one file: this one, whose experts are the two halves of each number, apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import save_tiny, stock
from torch import Tensor, nn
from torch.nn import functional as F

from remoe_adapt import load_with_expert_cache
from remoe_adapt.checkpoints.safetensors_files import Extent
from remoe_adapt.errors import UncacheableError
from remoe_adapt.expert_cache import encoding as encodings
from remoe_adapt.expert_cache.experts import ChosenExperts
from remoe_adapt.expert_cache.load import pack_experts
from remoe_adapt.expert_cache.plan import experts_modules

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
PARTS = ("high", "low")


def halves(whole: Tensor) -> dict[str, Tensor]:
    """The upper and the lower 16 bits of fp32 numbers."""
    bits = whole.contiguous().view(torch.int32)
    return {"high": (bits >> 16).to(torch.int16), "low": bits.to(torch.int16)}


def joined(slot: Any, param: str) -> Tensor:
    high, low = (slot[f"{param}_{part}"].to(torch.int32) for part in PARTS)
    return ((high << 16) | (low & 0xFFFF)).view(torch.float32)


class Halves:
    method = "halves"

    def prepare(self, model: Any) -> None:
        for module in experts_modules(model).values():
            for name, param in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                for part in PARTS:
                    half = nn.Parameter(torch.empty_like(param, dtype=torch.int16), requires_grad=False)
                    setattr(module, f"{name}_{part}", half)

    def check_files(self, folder: Path, extents: Iterable[Extent]) -> None:
        for extent in extents:
            if "expert" in extent.tensor and extent.tensor.endswith(PARTS) and extent.dtype != torch.int16:
                raise UncacheableError(f"{folder}: {extent.tensor} is no half of a number.")

    def arithmetic(
        self, module: Any, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, chosen: ChosenExperts
    ) -> Tensor:
        out_TD = torch.zeros_like(hidden_TD)
        for group in chosen.groups():
            for expert, slot in sorted(group.items()):
                place, token = torch.where((ids_TK == expert).T)
                gate, up = F.linear(hidden_TD[token], joined(slot, "gate_up_proj")).chunk(2, dim=-1)
                found = F.linear(module.act_fn(gate) * up, joined(slot, "down_proj"))
                out_TD.index_add_(0, token, found * weights_TK[token, place, None])
        return out_TD


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    plain = save_tiny(tmp_path / "plain", "qwen2_moe")
    tensors: dict[str, Tensor] = {}
    for name, value in stock(plain).state_dict().items():
        parts = {f"{name}_{part}": half for part, half in halves(value).items()}
        tensors |= parts if ".experts." in name else {name: value}
    folder = tmp_path / "halves"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "halves"}}))
    yield folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def test_a_new_encoding_is_one_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UncacheableError, match=r"is quantised \(halves\)"):
        load_with_expert_cache(folder)
    monkeypatch.setattr(encodings, "_ENCODINGS", dict(encodings._ENCODINGS))
    encodings.register(Halves())
    expected = logits(stock(tmp_path / "plain"))
    pack_experts(folder, tmp_path / "pack")
    for storage in (None, tmp_path / "pack"):
        model = load_with_expert_cache(folder, 0.5, storage=storage)
        cache = model.expert_cache
        whole = load_with_expert_cache(tmp_path / "plain", 0.5).expert_cache.source
        assert cache.source.expert_bytes == whole.expert_bytes and cache.source.layers == whole.layers
        for budget in (cache.budget_bytes, max(cache.source.expert_bytes), cache.source.total_bytes):
            cache.resize(budget)
            assert torch.equal(logits(model), expected)
        with cache.lease(0, [1]) as lease:
            assert {tensor.dtype for tensor in lease.slots[1].values()} == {torch.int16}


def test_files_in_another_encoding_than_the_configuration_names_are_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UncacheableError, match=r"experts\.\w+ is quantised"):
        load_with_expert_cache(other)
