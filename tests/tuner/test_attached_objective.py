"""RemoeConfig's objective in any training loop: gradients, value, accumulation, and what a saved adapter claims."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from tiny_models import VOCAB, tiny_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from remoe_adapt.errors import ConfigError
from remoe_adapt.training.trainer import RemoeTrainer
from remoe_adapt.tuner.attached import computed_elsewhere
from remoe_adapt.tuner.config import RemoeConfig
from remoe_adapt.tuner.layer import remoe_layers
from remoe_adapt.tuner.peft_compat import wrap_or_inject

ROWS, TOKENS = 4, 24
WEIGHTS: dict[str, Any] = {
    "reuse_weight": 1.0, "smooth_weight": 0.5, "lag_weight": 0.3, "ws_weight": 0.2, "kl_weight": 0.7,
}  # fmt: skip


def batch() -> list[dict[str, Tensor]]:
    """Rows with unequal numbers of labels and two documents; padding at the end of one."""
    torch.manual_seed(0)
    rows = []
    for row in range(ROWS):
        ids = torch.randint(1, VOCAB, (TOKENS,))
        labels, attention = ids.clone(), torch.ones_like(ids)
        border = TOKENS - 5 - row
        positions = torch.cat([torch.arange(border), torch.arange(TOKENS - border)])
        labels[: 1 + 3 * row] = -100
        labels[border] = -100
        if row == 1:
            labels[-6:], attention[-6:] = -100, 0
        rows.append({"input_ids": ids, "labels": labels, "position_ids": positions, "attention_mask": attention})
    return rows


def base(folder: str = "qwen2_moe") -> Any:
    model: Any = tiny_model(folder)
    model.set_experts_implementation("eager")  # the grouped one has no fp64
    return model.double()


def adapted(**config: Any) -> PeftModel:
    return get_peft_model(base(), RemoeConfig(init_weights=False, **{**WEIGHTS, **config}))


def trainer_for(model: nn.Module, path: Path, cls: type[Trainer] = Trainer, **options: Any) -> Any:
    arguments = {"max_steps": 1, "learning_rate": 1e-2, "per_device_train_batch_size": ROWS, **options}
    args = TrainingArguments(
        output_dir=str(path), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=1,
        dataloader_pin_memory=False, **arguments,
    )  # fmt: skip
    return cls(model=model, args=args, train_dataset=batch())


def stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def gradients(trainer: Any, micro_batches: int = 1, drop: str = "") -> dict[str, Tensor]:
    """Gradients of one optimizer step over `batch()`, as the Trainer accumulates them; its loss is `trainer.loss`."""
    size = ROWS // micro_batches
    stacked = [stack(batch()[i : i + size]) for i in range(0, ROWS, size)]
    parts, items = trainer.get_batch_samples(iter(stacked), micro_batches, torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = micro_batches
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    trainer.model.zero_grad()
    trainer.loss = sum(
        trainer.training_step(trainer.model, {k: v for k, v in part.items() if k != drop}, items).double()
        for part in parts
    )
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def same(left: dict[str, Tensor], right: dict[str, Tensor], **tolerance: Any) -> None:
    assert left.keys() == right.keys() and left
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], **tolerance)


def differ(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return any(not torch.allclose(value, right[name], rtol=1e-4) for name, value in left.items())


def checkpoint(model: PeftModel, options: dict[str, bool]) -> None:
    stock: Any = model.get_base_model()
    getattr(stock, "activation_checkpointing_enable", stock.gradient_checkpointing_enable)(options)


def saved(model: PeftModel, folder: Path) -> dict[str, Any]:
    model.save_pretrained(str(folder))
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return config


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_plain_trainer_has_the_gradients_and_the_loss_of_remoe_trainer(tmp_path: Path, micro_batches: int) -> None:
    ours = trainer_for(adapted(), tmp_path, RemoeTrainer)
    plain = trainer_for(adapted(), tmp_path, gradient_accumulation_steps=micro_batches)
    same(gradients(ours), gradients(plain, micro_batches), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(plain.loss, ours.loss, rtol=1e-5, atol=1e-7)
    with computed_elsewhere():
        without = gradients(plain, micro_batches)
    assert differ(gradients(plain, micro_batches), without), "the terms are there to be seen"


def test_the_terms_act_where_a_trainer_makes_its_own_loss_from_the_logits(tmp_path: Path) -> None:
    """Label smoothing: Trainer takes the labels away, and the model returns no loss."""
    found = {}
    for micro_batches in (1, 2):
        model = adapted()
        smoothed = trainer_for(model, tmp_path, label_smoothing_factor=0.1, gradient_accumulation_steps=micro_batches)
        with computed_elsewhere():
            alone = gradients(smoothed, micro_batches)
        both = gradients(smoothed, micro_batches)
        found[micro_batches] = {name: both[name] - alone[name] for name in alone}
    assert max(float(grad.abs().max()) for grad in found[1].values()) > 1e-3
    for name, grad in found[1].items():  # rows weigh by their own micro-batch here, hence roughly
        assert float((found[2][name] - grad).norm() / grad.norm()) < 0.3, name


def test_a_scaled_loss_scales_the_terms(tmp_path: Path) -> None:
    model = adapted().train()
    inputs = stack(batch())
    grown = []
    for scale in (1.0, 1024.0):
        model.zero_grad()
        loss = model(**inputs).loss
        loss *= scale  # in place, as Trainer does for several processes
        loss.backward()
        grown.append({n: p.grad / scale for n, p in model.named_parameters() if p.grad is not None})
    same(*grown, rtol=1e-9, atol=1e-12)


def test_every_way_to_hold_the_adapter_gets_the_terms() -> None:
    inputs = stack(batch())

    def grown(model: nn.Module) -> dict[str, Tensor]:
        model.train()
        model(**inputs).loss.backward()
        return {
            n[n.index("layers.") :].split(".default")[0]: p.grad for n, p in model.named_parameters() if "remoe_" in n
        }

    whole = adapted()
    torch.manual_seed(1)
    expected = grown(whole)
    inside = adapted()
    same(grown(inside.get_base_model()), expected, rtol=1e-9, atol=1e-12)
    injected = base()
    inject_adapter_in_model(RemoeConfig(init_weights=False, **WEIGHTS), injected)  # transformers' add_adapter
    copied = {n: p for n, p in whole.get_base_model().named_parameters() if "remoe_" in n}
    for name, parameter in injected.named_parameters():
        if "remoe_" in name:
            parameter.data.copy_(copied[name].data)
    same(grown(injected), expected, rtol=1e-9, atol=1e-12)
    lora = get_peft_model(base(), LoraConfig(target_modules=["q_proj"]), "style")  # a zero delta
    wrap_or_inject(lora, RemoeConfig(init_weights=False, **WEIGHTS), "default")
    for name, parameter in lora.get_base_model().named_parameters():
        if "remoe_" in name:
            parameter.data.copy_(copied[name].data)
    same(grown(lora), expected, rtol=1e-9, atol=1e-12)
    twin = copy.deepcopy(whole)
    twin.zero_grad()
    same(grown(twin), expected, rtol=1e-9, atol=1e-12)


def test_what_is_not_trained_gets_no_terms(tmp_path: Path) -> None:
    inputs = stack(batch())
    model = adapted()
    with computed_elsewhere():
        plain = model.train()(**inputs).loss.item()
    assert model.train()(**inputs).loss.item() != pytest.approx(plain, rel=1e-3)
    assert model.eval()(**inputs).loss.item() == plain
    with torch.no_grad():
        assert model.train()(**inputs).loss.item() == plain
    with model.disable_adapter():
        stock = model(**inputs).loss.item()
    assert stock == base()(**inputs).loss.item()
    assert trainer_for(model, tmp_path).evaluate(eval_dataset=batch())["eval_loss"] == pytest.approx(plain, rel=0.05)
    lora = get_peft_model(base(), LoraConfig(target_modules=["q_proj"]), "style")
    wrap_or_inject(lora, RemoeConfig(init_weights=False, **WEIGHTS), "default")
    for name, parameter in lora.named_parameters():
        parameter.requires_grad_("lora_" in name)
    with computed_elsewhere():
        plain = lora.train()(**inputs).loss.item()
    assert lora.train()(**inputs).loss.item() == plain, "it trains something else"


def test_unloading_takes_every_hook_off() -> None:
    stock = base()
    hooks = {n: (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for n, m in stock.named_modules()}
    names = set(vars(stock))
    model = get_peft_model(stock, RemoeConfig(**WEIGHTS))
    model.train()(**stack(batch())).loss.backward()
    assert model.unload() is stock
    assert {n: (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for n, m in stock.named_modules()} == hooks
    assert set(vars(stock)) == names
    assert not any(m._forward_hooks for m in get_peft_model(stock, RemoeConfig()).modules()), "no weights, no hooks"


def test_a_failed_forward_leaves_nothing_listening() -> None:
    model = adapted().train()
    with pytest.raises(Exception):  # noqa: B017 (whatever the model says to ids beyond its vocabulary)
        model(input_ids=torch.full((1, 4), 10**6))
    assert not any(layer._forward_hooks for layer in remoe_layers(model).values())


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain = gradients(trainer_for(adapted(), tmp_path))
    again = trainer_for(adapted(), tmp_path)
    checkpoint(again.model, {"use_reentrant": False})
    same(plain, gradients(again), rtol=1e-9, atol=1e-12)
    reentrant = adapted()
    checkpoint(reentrant, {"use_reentrant": True})
    reentrant.enable_input_require_grads()
    with pytest.raises(ConfigError, match="use_reentrant"):
        gradients(trainer_for(reentrant, tmp_path))


def test_the_models_own_balancing_loss_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted()
    gradients(trainer_for(model, tmp_path))
    assert "load-balancing" not in caplog.text
    model.get_base_model().config.output_router_logits = True
    gradients(trainer_for(model, tmp_path))
    assert "output_router_logits = False" in caplog.text


def test_a_saved_adapter_claims_what_acted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(distill_share=0.25)
    untouched = saved(model, tmp_path / "untouched")
    assert untouched["reuse_weight"] == 1.0 and untouched["distill_share"] == 0.25 and not caplog.records
    trainer_for(model, tmp_path).train()
    acted = saved(model, tmp_path / "trainer")
    assert acted["reuse_weight"] == 1.0 and acted["distill_share"] == 0.0
    assert model.peft_config["default"].distill_share == 0.25, "the configuration itself is the user's"
    assert "distill_share=0.25 acts in RemoeTrainer only" in caplog.text
    ours = adapted(distill_share=0.25)
    trainer_for(ours, tmp_path, RemoeTrainer).train()
    assert saved(ours, tmp_path / "ours")["distill_share"] == 0.25

    caplog.clear()
    bypassed = adapted().eval()  # a loop that never calls train()
    bypassed(**stack(batch())).loss.backward()
    for name in ("first", "second"):
        assert {saved(bypassed, tmp_path / name)[weight] for weight in WEIGHTS} == {0.0}
    said = [record for record in caplog.records if "did not act" in record.message]
    assert len(said) == 1 and "reuse_weight=1" in said[0].message and said[0].levelno == logging.WARNING
    assert RemoeConfig.from_pretrained(str(tmp_path / "first")).loss_weights == {}


def test_a_scaler_that_hides_its_scale_is_refused() -> None:
    model = adapted().train()
    inputs = {name: value for name, value in stack(batch()).items() if name != "labels"}
    vars(model.get_base_model())["_remoe_objective"].loss_is_scaled = True
    with pytest.raises(ConfigError, match="fp16 scales a loss"):
        model(**inputs).logits.sum().backward()


def test_a_rate_at_which_routers_learn_nothing_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer_for(adapted(), tmp_path, learning_rate=5e-5).train()
    assert "learning_rate=5e-05 for 1 steps moves router logits by at most" in caplog.text
    caplog.clear()
    trainer_for(adapted(), tmp_path, learning_rate=1e-2).train()
    assert "learning_rate" not in caplog.text


def test_copies_on_several_gpus_are_refused() -> None:
    model = adapted().train()
    model.get_base_model().model._is_replica = True
    with pytest.raises(ConfigError, match="accelerate launch"):
        model(**stack(batch()))
