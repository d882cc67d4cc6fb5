"""At which rate RemoeTrainer trains when nobody chose one, and when somebody did."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCAB, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from remoe_adapt import RemoeTrainer
from remoe_adapt.errors import ConfigError
from remoe_adapt.training.data import PackedRows
from remoe_adapt.tuner.config import RemoeConfig
from remoe_adapt.tuner.layer import remoe_layers
from remoe_adapt.tuner.peft_compat import wrap_or_inject


def rows() -> list[dict[str, Tensor]]:
    ids = [torch.randint(1, VOCAB, (24,), generator=torch.Generator().manual_seed(row)) for row in range(4)]
    return [{"input_ids": ids_T, "labels": ids_T} for ids_T in ids]


def test_plain_arguments_train_routers_and_a_chosen_rate_is_kept(tmp_path: Path) -> None:
    """Fault of old: at Trainer's own default rate nothing moved."""

    def reach(cls: Any = TrainingArguments, own: dict[str, Any] | None = None, **given: Any) -> float:
        model = get_peft_model(tiny_model("qwen2_moe"), RemoeConfig(reuse_weight=1.0))
        layer = remoe_layers(model)["model.layers.1.mlp.gate"]
        args = cls(
            output_dir=str(tmp_path), max_steps=4, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
            dataloader_pin_memory=False, **given,
        )  # fmt: skip
        RemoeTrainer(model=model, args=args, train_dataset=rows(), **(own or {})).train()
        hidden = torch.randn(200, layer.base_weight_ED.shape[1])
        moved = (hidden @ layer.delta_ED("default").detach().T).std() / (hidden @ layer.base_weight_ED.T).std()
        return moved.item()

    @dataclass
    class Lower(TrainingArguments):  # as TRL's have
        learning_rate: float = field(default=2e-5)

    default = reach()
    assert default > 0.1, "four steps move logits by a share of their spread"
    assert reach(Lower) == pytest.approx(default), "the default of the arguments' own class is no choice"
    assert reach(own={"router_relative_lr": True}, learning_rate=0.3) == pytest.approx(default)
    assert reach(learning_rate=2e-5) < 0.01
    assert reach(own={"router_relative_lr": False}) < 0.02
    with pytest.raises(ConfigError, match=r"optim=.*sgd"):
        reach(optim="sgd")


def test_others_train_at_their_own_rate_beside_routers_at_theirs(tmp_path: Path) -> None:
    base = tiny_model("qwen2_moe")
    lora = get_peft_model(base, LoraConfig(target_modules=["q_proj"]), "style")
    wrap_or_inject(lora, RemoeConfig(reuse_weight=1.0), "reuse")
    for name, parameter in base.named_parameters():
        parameter.requires_grad_("lora_" in name or "remoe_" in name)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    trainer = RemoeTrainer(model=lora, args=args, train_dataset=rows())
    rates = {id(p): group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    named = {name: rates[id(p)] for name, p in base.named_parameters() if p.requires_grad}
    assert {rate for name, rate in named.items() if "lora_" in name} == {5e-5}
    assert all(rate > 5e-4 for name, rate in named.items() if "remoe_" in name)


@pytest.mark.slow
def test_the_readmes_snippet_raises_the_shipped_models_reuse(repo_root: Path, tmp_path: Path) -> None:
    folder = repo_root / "examples" / "tiny_moe"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = Path(argparse.__file__).read_text()
    ids = tokenizer(text, verbose=False)["input_ids"]
    rows = PackedRows([ids], 128, None)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), RemoeConfig(reuse_weight=0.4, kl_weight=0.5)
    )
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=30, logging_steps=5, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = RemoeTrainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    eor = [row["eor"] for row in trainer.state.log_history if "eor" in row]
    assert eor[-1] > eor[0] * 1.05, eor
