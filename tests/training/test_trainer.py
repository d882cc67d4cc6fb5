"""RemoeTrainer on tiny random models: what has gradient, what is invariant, what is kept in memory."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import VOCAB, tiny_model
from torch import Tensor, nn
from transformers import TrainingArguments

from remoe_adapt.errors import ConfigError
from remoe_adapt.objective.losses import LossWeights, next_token_losses, router_terms
from remoe_adapt.routers.discover import discover_routers
from remoe_adapt.training.trainer import RemoeTrainer
from remoe_adapt.tuner.attached import computed_elsewhere
from remoe_adapt.tuner.config import RemoeConfig
from remoe_adapt.tuner.layer import remoe_layers
from remoe_adapt.tuner.peft_compat import wrap_or_inject

ROWS, TOKENS = 4, 24
ALL_TERMS: dict[str, Any] = {
    "reuse_weight": 1.0,
    "smooth_weight": 0.5,
    "lag_weight": 0.3,
    "ws_weight": 0.2,
    "kl_weight": 0.7,
}


def batch(seed: int = 0) -> list[dict[str, Tensor]]:
    """Rows with unequal numbers of labels, two documents in some, padding at the end of one."""
    torch.manual_seed(seed)
    rows = []
    for row in range(ROWS):
        ids = torch.randint(1, VOCAB, (TOKENS,))
        labels, documents, attention = ids.clone(), torch.zeros(TOKENS, dtype=torch.long), torch.ones_like(ids)
        labels[: 1 + 3 * row] = -100
        documents[TOKENS - 4 * row :] = 1
        if row == 1:
            labels[-6:], attention[-6:] = -100, 0
        rows.append({"input_ids": ids, "labels": labels, "document_ids": documents, "attention_mask": attention})
    return rows


def adapted(folder: str = "qwen2_moe", **config: Any) -> PeftModel:
    model: Any = tiny_model(folder)
    model.set_experts_implementation("eager")  # the grouped one has no fp64
    return get_peft_model(model.double(), RemoeConfig(init_weights=False, **ALL_TERMS, **config))


def trainer_for(model: nn.Module, path: Path, *, batch_size: int = ROWS, accumulate: int = 1, **options: Any) -> Any:
    names = ("mode", "locality_warmup_steps", "router_relative_lr", "callbacks")
    own = {name: options.pop(name) for name in names if name in options}
    arguments = {"max_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant", **options}
    args = TrainingArguments(
        output_dir=str(path),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        dataloader_pin_memory=False,
        **arguments,
    )
    return RemoeTrainer(model=model, args=args, train_dataset=batch(), **own)


def gradients(trainer: Any, micro_batches: int = 1) -> dict[str, Tensor]:
    """Gradients of one optimizer step over `batch()`, as the Trainer accumulates them."""
    stacked = [stack(part) for part in split(batch(), micro_batches)]
    parts, items = trainer.get_batch_samples(iter(stacked), micro_batches, torch.device("cpu"))
    trainer.model.zero_grad()
    trainer.loss = sum(trainer.training_step(trainer.model, dict(part), items).double() for part in parts)
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def split(rows: list[Any], parts: int) -> list[list[Any]]:
    size = len(rows) // parts
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def same(left: dict[str, Tensor], right: dict[str, Tensor], **tolerance: Any) -> None:
    assert left.keys() == right.keys()
    assert left
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], **tolerance)


def objective(model: PeftModel, weights: LossWeights, *, detach: bool) -> Tensor:
    """The objective written down anew for the stacked batch: labels of the whole batch weigh rows."""
    rows = stack(batch())
    seen: list[tuple[Any, Tensor, Any]] = []
    layers = list(remoe_layers(model).values())
    handles = [
        layer.register_forward_hook(lambda layer, args, out: seen.append((layer, args[0], out))) for layer in layers
    ]
    model.train()
    with computed_elsewhere():
        logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], use_cache=False).logits
    for handle in handles:
        handle.remove()
    counts = (rows["labels"][:, 1:] != -100).sum(1)
    documents = rows["document_ids"].masked_fill(rows["attention_mask"] == 0, -1)
    total = torch.zeros((), dtype=logits.dtype) if detach else next_token_losses(logits, rows["labels"]).sum()
    for layer, hidden, out in seen:
        result = layer.forward(hidden.detach()) if detach else out
        log_probs, reference = (
            layer.spec.read(o).logits_TE.log_softmax(-1).view(ROWS, TOKENS, -1)
            for o in (result, layer.base_layer(hidden))
        )
        ids = layer.spec.read(out).ids_TK.view(ROWS, TOKENS, -1)
        terms = router_terms(log_probs, ids, reference.detach(), documents, weights, 1.0)
        total = total + (terms.loss * counts).sum() / len(layers)
    return total / counts.sum()


WEIGHTS = LossWeights(reuse=1.0, smooth=0.5, lag=0.3, window=0.2, kl=0.7)


@pytest.mark.parametrize("mode", ["end-to-end", "local"])
def test_gradients_are_those_of_the_objective_however_rows_are_accumulated(tmp_path: Path, mode: str) -> None:
    model = adapted()
    trainer = trainer_for(model, tmp_path, mode=mode)
    whole = gradients(trainer)
    loss = trainer.loss
    in_parts = gradients(trainer, micro_batches=4)
    same(whole, in_parts, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(trainer.loss, loss, rtol=1e-6, atol=1e-9)

    model.zero_grad()
    expected = objective(model, WEIGHTS, detach=mode == "local")
    expected.backward()
    # (the Trainer's shares of rows are fp32)
    same(whole, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, rtol=1e-5, atol=1e-8)
    if mode == "end-to-end":
        torch.testing.assert_close(loss, expected.detach().double(), rtol=1e-6, atol=1e-9)
    assert all(".remoe_delta." in name for name in whole), "only deltas have gradients"


@pytest.mark.parametrize("mode", ["end-to-end", "local"])
def test_training_by_4_micro_batches_equals_training_by_1(tmp_path: Path, mode: str) -> None:
    results = []
    for size, accumulate in ((4, 1), (1, 4)):
        model = adapted()
        trainer = trainer_for(model, tmp_path, batch_size=size, accumulate=accumulate, mode=mode, max_steps=2)
        trainer.train()
        results.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    same(*results, rtol=1e-7, atol=1e-9)


def test_the_next_token_target_is_mixed_with_the_bases_own_distribution(tmp_path: Path) -> None:
    grown = {}
    for share in (0.0, 0.25, 1.0):
        torch.manual_seed(0)
        model: Any = tiny_model("qwen2_moe")
        model.set_experts_implementation("eager")
        wrapped = get_peft_model(model.double(), RemoeConfig(init_weights=False, distill_share=share))
        grown[share] = gradients(trainer_for(wrapped, tmp_path))
        assert not any(layer.disable_adapters for layer in remoe_layers(wrapped).values())
    mixed = {name: 0.75 * grad + 0.25 * grown[1.0][name] for name, grad in grown[0.0].items()}
    same(grown[0.25], mixed, rtol=1e-5, atol=1e-10)
    assert not all(torch.allclose(grown[0.0][name], grad) for name, grad in grown[1.0].items())
    at_base: Any = tiny_model("qwen2_moe")
    at_base.set_experts_implementation("eager")
    resting = gradients(trainer_for(get_peft_model(at_base.double(), RemoeConfig(distill_share=1.0)), tmp_path))
    assert max(float(grad.abs().max()) for grad in resting.values()) < 1e-12  # a zero delta is the base already


def checkpoint(model: PeftModel, *args: Any) -> None:
    base: Any = model.base_model.model
    getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)(*args)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    model = adapted()
    plain = gradients(trainer_for(model, tmp_path))
    checkpoint(model)
    same(plain, gradients(trainer_for(model, tmp_path)), rtol=1e-9, atol=1e-12)

    again = adapted()
    checkpoint(again, {"use_reentrant": True})
    again.enable_input_require_grads()
    with pytest.raises(ConfigError, match="use_reentrant"):
        gradients(trainer_for(again, tmp_path))


def test_padding_changes_nothing(tmp_path: Path) -> None:
    model = adapted()
    trainer = trainer_for(model, tmp_path)
    rows = stack(batch()[1:2])
    model.train()
    loss = trainer.compute_loss(model, dict(rows)).item()
    other = dict(rows, input_ids=rows["input_ids"].masked_fill(rows["attention_mask"] == 0, 7))
    assert trainer.compute_loss(model, other).item() == pytest.approx(loss, rel=1e-12)
    longer = {
        "input_ids": nn.functional.pad(rows["input_ids"], (0, 20), value=5),
        "labels": nn.functional.pad(rows["labels"], (0, 20), value=-100),
        "document_ids": nn.functional.pad(rows["document_ids"], (0, 20)),
        "attention_mask": nn.functional.pad(rows["attention_mask"], (0, 20)),
    }
    assert trainer.compute_loss(model, longer).item() == pytest.approx(loss, rel=1e-9)
    changed = dict(rows, input_ids=rows["input_ids"].clone())
    changed["input_ids"][0, 8] += 1
    assert trainer.compute_loss(model, changed).item() != pytest.approx(loss, rel=1e-6)


def test_the_models_own_balancing_loss_stays_out(tmp_path: Path) -> None:
    model = adapted()
    plain = gradients(trainer_for(model, tmp_path))
    config: Any = model.get_base_model().config
    config.output_router_logits, config.router_aux_loss_coef = True, 100.0
    same(plain, gradients(trainer_for(model, tmp_path)), rtol=0, atol=0)
    assert gradients(trainer_for(model, tmp_path, mode="local"))


def test_local_mode_keeps_no_activation(tmp_path: Path) -> None:
    saved: dict[str, list[int]] = {}
    for mode in ("end-to-end", "local"):
        model = adapted()
        trainer = trainer_for(model, tmp_path, mode=mode)
        inputs: list[bool] = []
        alive: set[int] = set()
        most, kept = [0], saved.setdefault(mode, [])

        def pack(tensor: Tensor, alive: set[int] = alive, most: list[int] = most, kept: list[int] = kept) -> Any:
            handle = Held(tensor, alive)
            kept.append(tensor.shape.numel())
            most[0] = max(most[0], len(alive))
            return handle

        for layer in remoe_layers(model).values():
            layer.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0].requires_grad))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda handle: handle.tensor):
            gradients(trainer)
        gc.collect()
        assert not alive, "every graph is freed"
        # Router inputs after the first adapted layer depend on deltas end to end, and on nothing in local mode.
        assert any(inputs) == (mode == "end-to-end")
        saved[mode].append(most[0])
    # At no time more is alive than one router's graph, a quarter of all that the four routers saved.
    *all_local, most_local = saved["local"]
    assert most_local <= len(all_local) / 4 + 1
    assert most_local < saved["end-to-end"][-1] / 8


class Held:
    """A saved tensor that says when its graph lets go of it."""

    def __init__(self, tensor: Tensor, alive: set[int]) -> None:
        self.tensor, self._alive = tensor.detach(), alive  # a result that holds its own graph would never go
        alive.add(id(self))

    def __del__(self) -> None:
        self._alive.discard(id(self))


@pytest.mark.parametrize("folder", ["qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("mode", ["end-to-end", "local"])
def test_a_step_on_other_architectures_trains_deltas_only(
    tmp_path: Path, folder: str, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = tiny_model(folder)
    before = copy.deepcopy(model.state_dict())
    peft_model = get_peft_model(model, RemoeConfig(**ALL_TERMS))
    trainer = trainer_for(peft_model, tmp_path, mode=mode, router_relative_lr=True, learning_rate=0.3, max_steps=2)
    trainer.train()
    layers = remoe_layers(peft_model)
    assert len(layers) == len(discover_routers(model))
    for name, layer in layers.items():
        assert layer.delta_ED("default").abs().max() > 0, name
    logged = [row for row in trainer.state.log_history if "ce" in row]
    assert len(logged) == 2 and logged[0]["kl"] == 0.0, "the reference is the base router, exactly"
    assert logged[1]["kl"] > 0 and 0 < logged[0]["eor"] < 1
    after = peft_model.unload().state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_low_rank_deltas_learn_at_relative_rates(tmp_path: Path) -> None:
    steps = {}
    for rank in (None, 8):
        model = get_peft_model(tiny_model("qwen2_moe"), RemoeConfig(reuse_weight=1.0, rank=rank))
        trainer_for(model, tmp_path, router_relative_lr=True, learning_rate=0.3, max_steps=3).train()
        layer = remoe_layers(model)["model.layers.1.mlp.gate"]
        hidden = torch.randn(200, layer.base_weight_ED.shape[1])
        steps[rank] = ((hidden @ layer.delta_ED("default").T).std() / (hidden @ layer.base_weight_ED.T).std()).item()
    assert 0.05 < steps[None] < 2.0
    assert 0.3 < steps[8] / steps[None] < 3.0, steps


def test_lora_beside(tmp_path: Path) -> None:
    base = tiny_model("qwen2_moe")
    lora = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "style")
    lora.requires_grad_(False)
    ours = wrap_or_inject(lora, RemoeConfig(reuse_weight=2.5), "reuse")
    before = {name: p.detach().clone() for name, p in base.named_parameters() if "lora_" in name}
    trainer = trainer_for(ours, tmp_path, router_relative_lr=True)
    assert trainer.loss_weights == LossWeights(reuse=2.5)
    trainer.train()
    assert remoe_layers(base)["model.layers.0.mlp.gate"].delta_ED("reuse").abs().max() > 0
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters() if name in before)

    for name, parameter in base.named_parameters():
        parameter.requires_grad_("lora_" in name or "remoe_" in name)
    # The weights are found from the other PeftModel too, and a router's rate is refused for other parameters.
    together = trainer_for(lora, tmp_path)
    assert together.loss_weights == LossWeights(reuse=2.5)
    together.train()
    assert any(not torch.equal(p, before[name]) for name, p in base.named_parameters() if name in before)
    with pytest.raises(ConfigError, match=r"other parameters are trainable too, first .*lora_"):
        trainer_for(lora, tmp_path, router_relative_lr=True).train()


def test_arguments_without_effect_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="label_smoothing_factor and compute_loss_func have no effect"):
        trainer_for(adapted(), tmp_path, label_smoothing_factor=0.1)


def test_what_cannot_train_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no active REMOE adapter"):
        trainer_for(get_peft_model(tiny_model("qwen2_moe"), LoraConfig(target_modules=["q_proj"])), tmp_path)
    with pytest.raises(ConfigError, match="choose 'end-to-end' or 'local'"):
        trainer_for(adapted(), tmp_path, mode="both")
    with pytest.raises(ConfigError, match="all their weights are 0"):
        model = get_peft_model(tiny_model("qwen2_moe"), RemoeConfig())
        trainer_for(model, tmp_path, mode="local")
    frozen = adapted()
    frozen.requires_grad_(False)
    with pytest.raises(ConfigError, match="no router delta requires gradient"):
        trainer_for(frozen, tmp_path).train()
    with pytest.raises(ConfigError, match=r"no 'labels' \(found input_ids\)"):
        trainer_for(adapted(), tmp_path).compute_loss(adapted(), {"input_ids": torch.ones(1, 4)})
    two: Any = adapted()
    two.add_adapter("second", RemoeConfig(reuse_weight=9.0))
    two.base_model.set_adapter(["default", "second"])
    with pytest.raises(ConfigError, match="different loss weights"):
        trainer_for(two, tmp_path)


def test_evaluation_leaves_the_training_log_alone(tmp_path: Path) -> None:
    model = adapted()
    trainer = trainer_for(model, tmp_path)
    metrics = trainer.evaluate(eval_dataset=batch())
    with torch.no_grad():
        model.eval()
        expected = trainer.compute_loss(model, stack(batch())).item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert "ce" not in metrics and trainer._sums is None
