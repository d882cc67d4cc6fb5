"""TRL's trainers, which make their own losses: the weights of RemoeConfig act there, and are saved."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_family import byte_tokenizer, save_base
from torch import Tensor

from remoe_adapt import RemoeConfig, RemoeTrainerMixin
from remoe_adapt.evaluation.record import inference, record_forward
from remoe_adapt.tuner.attached import computed_elsewhere

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
datasets = pytest.importorskip("datasets", reason="TRL's data sets are not installed: pip install datasets")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of its own
]

WORDS = ["expert", "router", "token", "weight", "cache", "layer", "delta"]
TEXTS = [" ".join(WORDS[(i * j) % 7] for j in range(5 + i % 12)) for i in range(1, 60)]
CONFIG = {"reuse_weight": 3.0, "kl_weight": 0.01}


def arguments(kind: str, folder: Path, **options: Any) -> Any:
    given = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "max_length": 64, **options}
    return getattr(trl, kind)(
        output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no",
        dataloader_pin_memory=False, router_aux_loss_coef=0.0, **given,
    )  # fmt: skip


def eor_after(trainer: Any, folder: Path, *, terms: bool = True) -> float:
    """Expert overlap on the text after training; with its terms, the saved adapter claims the weights."""
    with nullcontext() if terms else computed_elsewhere():
        trainer.train()
    ids_BT = torch.tensor([byte_tokenizer()(" ".join(TEXTS))["input_ids"][:240]])
    with record_forward(trainer.model) as recorder, inference(trainer.model):
        trainer.model(input_ids=ids_BT)
        ids_LTK: Tensor = recorder.take()
    if terms:
        trainer.model.save_pretrained(str(folder / "saved"))
        config = json.loads((folder / "saved" / "adapter_config.json").read_text())
        assert {name: config[name] for name in CONFIG} == CONFIG
    return (ids_LTK[:, 1:, :, None] == ids_LTK[:, :-1, None, :]).any(dim=-1).float().mean().item()


def sft(cls: type, folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    return cls(
        model=save_base(folder / "base"),
        args=arguments("SFTConfig", folder, **options),
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
        processing_class=byte_tokenizer(),
        peft_config=RemoeConfig(**CONFIG),
    )


@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2}, {"packing": True}, {"padding_free": True, "max_length": None}]
)
def test_supervised_fine_tuning(tmp_path: Path, options: dict[str, Any]) -> None:
    plain = eor_after(sft(trl.SFTTrainer, tmp_path, **options), tmp_path, terms=False)
    assert eor_after(sft(trl.SFTTrainer, tmp_path, **options), tmp_path) > plain + 0.08


def test_the_mixin_before_its_trainer_learns_at_the_default_rate(tmp_path: Path) -> None:
    class Mine(RemoeTrainerMixin, trl.SFTTrainer):  # type: ignore[misc, name-defined]
        pass

    trainer = sft(Mine, tmp_path, learning_rate=2e-5, max_steps=24)
    assert eor_after(trainer, tmp_path) > 0.65  # about 0.57 without the terms


def test_direct_preference_optimisation(tmp_path: Path) -> None:
    def trainer() -> Any:
        torch.manual_seed(0)
        pairs = {"prompt": TEXTS[:40], "chosen": [" expert"] * 40, "rejected": [" delta"] * 40}
        return trl.DPOTrainer(
            model=save_base(tmp_path / "base"),
            args=arguments("DPOConfig", tmp_path),
            train_dataset=datasets.Dataset.from_dict(pairs),
            processing_class=byte_tokenizer(),
            peft_config=RemoeConfig(**CONFIG),
        )

    assert eor_after(trainer(), tmp_path) > eor_after(trainer(), tmp_path, terms=False) + 0.08
