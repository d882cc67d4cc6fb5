"""Borders of documents, however a packed batch tells them; the losses of RemoeTrainer do not cross them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny_models import tiny_model
from torch import Tensor
from transformers import DataCollatorWithFlattening, TrainingArguments

from remoe_adapt.errors import ConfigError
from remoe_adapt.objective.documents import document_numbers
from remoe_adapt.objective.losses import pair_mask
from remoe_adapt.training.trainer import RemoeTrainer
from remoe_adapt.tuner.config import RemoeConfig

IDS_BT = torch.arange(1, 9).view(1, 8)
# Documents of 3, 3 and 2 tokens.
NUMBERS_BT = torch.tensor([[5, 5, 5, 1, 1, 1, 5, 5]])
POSITIONS_BT = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1]])
SEES_BTT = (NUMBERS_BT[..., None] == NUMBERS_BT[:, None]) & torch.ones(8, 8, dtype=torch.bool).tril()
SEES_BTT[:, 6:, :3] = False


def pairs(**inputs: Any) -> list[bool]:
    """Which token goes on from the one before it."""
    together: list[bool] = pair_mask(document_numbers({"input_ids": IDS_BT, **inputs}))[0].tolist()
    return together


BORDERS = [True, True, False, True, True, False, True]


@pytest.mark.parametrize(
    "told",
    [
        {"document_ids": NUMBERS_BT},
        {"position_ids": POSITIONS_BT},
        {"position_ids": POSITIONS_BT, "attention_mask": torch.ones(1, 8)},
        {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]], dtype=torch.int32)},
        {"cu_seq_lens_q": torch.tensor([0, 3, 6, 8], dtype=torch.int32)},
        {"attention_mask": torch.tensor([[1, 1, 1, 2, 2, 2, 3, 3]])},
        {"attention_mask": SEES_BTT[:, None]},
        {"attention_mask": torch.where(SEES_BTT, 0.0, torch.finfo(torch.float32).min)[:, None]},
        {"attention_mask": {"full_attention": SEES_BTT[:, None], "sliding_attention": None}},
    ],
)
def test_borders_are_read_from_what_says_them(told: dict[str, Any]) -> None:
    assert pairs(**told) == BORDERS


def test_a_row_that_says_nothing_is_one_document() -> None:
    assert all(pairs())
    assert all(pairs(position_ids=torch.arange(8)[None], attention_mask=None))
    assert document_numbers({"inputs_embeds": torch.zeros(2, 5, 4)}).tolist() == [[0] * 5] * 2


def test_padding_belongs_to_no_document() -> None:
    for mask in (torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0]]), torch.tensor([[False, False, *[True] * 5, False]])):
        positions = (mask.long().cumsum(1) - 1).masked_fill(mask == 0, 1)
        assert pairs(attention_mask=mask, position_ids=positions) == [False, False, True, True, True, True, False]
        assert (document_numbers({"input_ids": IDS_BT, "attention_mask": mask}) == -1).tolist() == (mask == 0).tolist()


def test_fields_of_another_shape_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"position_ids has shape \[1, 5\], the batch 1 x 8"):
        pairs(position_ids=torch.arange(5)[None])
    with pytest.raises(ConfigError, match=r"attention_mask of shape \[1, 9\] does not say"):
        pairs(attention_mask=torch.ones(1, 9))
    with pytest.raises(ConfigError, match="attention_mask of type object"):
        pairs(attention_mask=object())
    with pytest.raises(ConfigError, match="no 'input_ids'"):
        document_numbers({"labels": IDS_BT})


def test_packing_changes_no_locality_loss(tmp_path: Path) -> None:
    """Rows apart and the same rows flattened into one: equal losses, so none crosses a border."""
    model: Any = tiny_model("qwen2_moe", max_position_embeddings=128)
    model.set_experts_implementation("eager")
    # Terms that are means over pairs; L_Reuse is the logarithm of one, and one row is one mean.
    tuned = get_peft_model(model.double(), RemoeConfig(init_weights=False, smooth_weight=0.5, ws_weight=0.2)).train()
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    trainer = RemoeTrainer(model=tuned, args=args)
    rows = [{"input_ids": torch.randint(1, 90, (24,)).tolist()} for _ in range(3)]

    def loss(**options: Any) -> Tensor:
        flat = DataCollatorWithFlattening(**options)([dict(row) for row in rows])
        flat = {key: value for key, value in flat.items() if key in ("input_ids", "labels", "position_ids", "seq_idx")}
        return trainer.compute_loss(tuned, flat).detach()

    apart = {"input_ids": torch.tensor([row["input_ids"] for row in rows])}
    whole = trainer.compute_loss(tuned, apart | {"labels": apart["input_ids"]}).detach()
    for options in ({}, {"return_seq_idx": True}):
        torch.testing.assert_close(loss(**options), whole, rtol=1e-7, atol=1e-9)
