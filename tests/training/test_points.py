"""Points side by side, each under its own rule: as each would come out alone, and with what their options add."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_family import save_base, save_words
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from remoe_adapt.cli.train import _gains
from remoe_adapt.dial.load import get_remoe_model, release
from remoe_adapt.errors import ConfigError, DataError, FamilyError, MergeStateError
from remoe_adapt.evaluation.evaluate import evaluate
from remoe_adapt.family.family import Family
from remoe_adapt.family.recovery import FamilyRecovery, recovery_targets
from remoe_adapt.recency.install import recency_prior
from remoe_adapt.training.options import TrainOptions
from remoe_adapt.training.run import train_family

RULE: dict[str, Any] = {"recency": "cost", "recency_gain": 0.3, "steps": 4, "batch": 2, "length": 40, "lr": 0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("points")
    save_base(folder / "base")
    save_words(folder / "words.jsonl", 79, least=3, lengths=20)
    return folder


def family_of(folder: Path, out: Path, strengths: list[float], base: Any = None, **options: Any) -> Family:
    return train_family(
        base or folder / "base", [folder / "words.jsonl"], strengths, out, progress=False, control=False,
        options=TrainOptions(**{**RULE, **options}),
    )  # fmt: skip


def base_model(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(left: Any, right: Any, **tolerance: Any) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], **(tolerance or {"rtol": 0, "atol": 0}))


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]


def test_a_point_comes_out_as_it_would_alone(folder: Path, tmp_path: Path) -> None:
    together = family_of(folder, tmp_path / "both", [0.5, 1.0], recovery_rank=2)
    alone = family_of(folder, tmp_path / "alone", [1.0], recovery_rank=2)
    equal(together.deltas(1.0), alone.deltas(1.0))
    assert max(float((together.deltas(0.5)[n] - d).abs().max()) for n, d in alone.deltas(1.0).items()) > 1e-4


def test_one_forward_of_the_base_serves_all_points(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards: list[bool] = []
    model = base_model(folder)
    handle = model.register_forward_hook(lambda module, args, out: forwards.append(torch.is_grad_enabled()))
    family_of(folder, tmp_path / "family", [0.25, 0.5, 1.0], base=model, steps=2)
    handle.remove()
    assert forwards.count(True) == 2 * 3 and forwards.count(False) - 2 * 3 <= 2 * 2, forwards


def test_the_rule_is_in_the_forward_and_begins_anew_with_each_document(folder: Path, tmp_path: Path) -> None:
    """Rows of a batch are packed; what routers choose for a document is what they choose where it is alone."""
    model = base_model(folder).eval()
    torch.manual_seed(0)
    first, second = torch.randint(1, 256, (2, 1, 20))
    positions = torch.arange(20)[None]
    seen: dict[str, list[Tensor]] = {}
    with recency_prior(model, "cost", 2.0) as installed, torch.no_grad():
        routers = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]

        def run(name: str, ids: Tensor, numbers: Tensor | None = None, **inputs: Any) -> None:
            chosen = seen.setdefault(name, [])
            handles = [r.register_forward_hook(lambda m, a, out: chosen.append(out[2])) for r in routers[:1]]
            if numbers is None:
                model(ids, use_cache=False, **inputs)
            else:
                with installed.prior.documents(numbers):
                    model(ids, use_cache=False, **inputs)
            for handle in handles:
                handle.remove()

        packed, where = torch.cat([first, second], dim=1), torch.cat([positions, positions], dim=1)
        numbers = torch.tensor([[3] * 20 + [7] * 20])
        # The first layer's attention would mix the documents: each sees only itself.
        mask = (numbers[:, None, :, None] == numbers[:, None, None, :]).expand(1, 1, 40, 40).tril()
        run("alone", second)
        run("told", packed, numbers, attention_mask={"full_attention": mask}, position_ids=where)
        assert installed.prior.running.flags_BS is None
    assert torch.equal(seen["told"][0][20:], seen["alone"][0])


def test_documents_restart_the_recency_without_any_mask(folder: Path) -> None:
    model = base_model(folder).eval()
    torch.manual_seed(1)
    ids = torch.randint(1, 256, (2, 24))
    numbers = torch.zeros(2, 24, dtype=torch.long)
    numbers[1, 12:] = 5
    numbers[0, 20:] = -1
    routers = [module for name, module in model.named_modules() if name.endswith("mlp.gate")][:1]
    chosen: list[Tensor] = []
    with recency_prior(model, "ema", 1.0) as installed, torch.no_grad():
        handle = routers[0].register_forward_hook(lambda m, a, out: chosen.append(out[2].view(2, 24, -1)))
        model(ids, use_cache=False)
        with installed.prior.documents(numbers):
            model(ids, use_cache=False)
        installed.set_gains(0.0)
        model(ids, use_cache=False)
        handle.remove()
    whole, cut, plain = chosen
    assert torch.equal(whole[:, :12], cut[:, :12])
    assert torch.equal(cut[1, 12], plain[1, 12]), "the first token of a document has no past"
    assert torch.equal(cut[0, 20:], plain[0, 20:]), "padding is gated without the prior"
    assert not torch.equal(whole[1, 12:], cut[1, 12:])


def test_gradients_are_of_the_rule_and_the_base_is_held_to_without_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first step has deltas of 0, so KL to the base comes from the rule alone: 0 without it."""
    for gain, is_moved in ((0.0, False), (4.0, True)):
        out = tmp_path / f"gain{gain}"
        family_of(folder, out, [1.0], recency_gain=gain, steps=1)
        first = rows_of(out)[0]
        assert (first["kl_base"] > 1e-4) is is_moved, first


@pytest.mark.parametrize("recency", ["ema", "cost"])
def test_layers_run_again_in_backward_choose_the_same(folder: Path, tmp_path: Path, recency: str) -> None:
    options: dict[str, Any] = {"recency": recency, "recency_gain": 1.0, "steps": 2, "recovery_rank": 2}
    model = base_model(folder)
    plain = family_of(folder, tmp_path / "plain", [0.5, 1.0], base=model, **options)
    again = family_of(folder, tmp_path / "again", [0.5, 1.0], base=model, checkpointing=True, **options)
    for strength in (0.5, 1.0):
        equal(plain.deltas(strength), again.deltas(strength), rtol=1e-4, atol=1e-6)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_a_bf16_base_is_trained_under_the_rule(folder: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    family = family_of(folder, tmp_path / "family", [1.0], base=model, recovery_rank=2, checkpointing=True)
    assert all(float(delta.abs().max()) > 0 for delta in family.deltas(1.0).values())


def test_gains_may_be_said_for_each_strength_and_router(folder: Path, tmp_path: Path) -> None:
    each = ((0.5, (0.0, 0.1, 0.2, 0.3)), (1.0, 0.7))
    family = family_of(folder, tmp_path / "family", [0.5, 1.0], recency_gains=each, steps=1)
    assert [point.recency.gain for point in family.points if point.recency] == [(0.0, 0.1, 0.2, 0.3), (0.7,) * 4]
    more = family_of(folder, tmp_path / "family", [0.25, 0.5, 1.0], recency_gains=((0.25, 0.05), *each), steps=1)
    assert more.strengths == (0.25, 0.5, 1.0)
    with pytest.raises(ConfigError, match=r"recency_gains was .* now"):
        family_of(folder, tmp_path / "family", [0.5, 1.0], recency_gains=((0.5, 0.4),), steps=1)
    with pytest.raises(ConfigError, match="2 recency gains for 4 routers"):
        family_of(folder, tmp_path / "few", [0.5], recency_gains=((0.5, (0.1, 0.2)),), steps=1)
    assert not (tmp_path / "few").exists()
    with pytest.raises(ConfigError, match="choose its mode"):
        TrainOptions(recency_gains=((0.5, 0.1),))


def test_later_points_may_begin_where_the_weakest_ended(folder: Path, tmp_path: Path) -> None:
    family = family_of(folder, tmp_path / "family", [0.25, 0.5, 1.0], steps=5, next_steps=2)
    first = {row["point"]: row["step"] for row in rows_of(tmp_path / "family")}
    assert first == {"s025": 5, "s050": 1, "s100": 1}
    step = {n: (family.deltas(1.0)[n] - d).abs().max() for n, d in family.deltas(0.25).items()}
    far = {n: d.abs().max() for n, d in family.deltas(0.25).items()}
    assert all(step[n] > 0 for n in step) and sum(map(float, step.values())) < sum(map(float, far.values()))


def test_the_best_state_is_kept_and_a_point_stops(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "family"
    options: dict[str, Any] = {"evaluate_every": 1, "patience": 2, "validation_tokens": 160, "steps": 8}
    # Far too large a step, so that the first is the best, or nearly.
    family = family_of(folder, out, [0.5, 1.0], lr=40.0, **options)
    held_out: dict[str, list[Any]] = {"s050": [], "s100": []}
    for row in rows_of(out):
        if "held_out" in row:
            held_out[row["point"]].append((row["step"], row["held_out"]))
    for name, found in held_out.items():
        losses = [row["loss"] for _, row in found]
        best = min(range(len(losses)), key=losses.__getitem__)
        assert found[-1][1]["best_step"] == found[best][0]
        assert found[-1][1]["stopped"] and len(found) == best + 3 < 8, (name, losses)
        assert {"ce", "kl_base", "eor", "misses"} <= found[0][1].keys() and 0 < found[0][1]["misses"] < 1
        # The first step of a warm-up has the rate 0: what is kept of it is the base itself.
        largest = max(float(d.abs().max()) for d in family.deltas({"s050": 0.5}.get(name, 1.0)).values())
        assert (largest == 0) is (best == 0)
    with pytest.raises(DataError, match="no text to evaluate on"):
        (tmp_path / "short.txt").write_text("a few words " * 40)
        train_family(
            folder / "base", [tmp_path / "short.txt"], [1.0], tmp_path / "none", progress=False,
            options=TrainOptions(evaluate_every=1, length=8, batch=1, steps=1, validation_tokens=1),
        )  # fmt: skip


def test_recovery_is_a_plain_adapter_beside_the_point(folder: Path, tmp_path: Path) -> None:
    model = base_model(folder)
    names = [name for name, _ in model.named_modules()]
    family = family_of(folder, tmp_path / "family", [1.0], base=model, recovery_rank=2, recovery_lr=0.05)
    assert [name for name, _ in model.named_modules()] == names and not hasattr(model, "peft_config")
    point = Family.load(tmp_path / "family").point(1.0)
    assert point.recovery == "s100-recovery"
    ids = torch.randint(1, 256, (1, 16))
    with torch.no_grad():
        before = model(ids).logits
    lora = PeftModel.from_pretrained(model, str(family.path / point.recovery))
    config = lora.peft_config["default"]
    assert set(config.target_modules) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    with torch.no_grad():
        assert not torch.equal(lora(ids).logits, before)
    copied = family.save(tmp_path / "copy")
    assert (copied / "s100-recovery" / "adapter_model.safetensors").is_file()


def test_an_evaluation_runs_each_point_with_its_recovery_adapter(folder: Path, tmp_path: Path) -> None:
    model = base_model(folder).eval()
    names, before = [name for name, _ in model.named_modules()], weights(model)
    options: dict[str, Any] = {"recovery_rank": 2, "recovery_lr": 0.05}
    family = family_of(folder, tmp_path / "family", [0.5, 1.0], base=model, **options)
    ids = torch.randint(1, 256, (1, 16))

    def logits() -> Tensor:
        with torch.no_grad():
            return model(ids, use_cache=False).logits

    base = logits()
    recovery = FamilyRecovery(model, family)
    found = {}
    for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
        recovery.use(strength)
        found[strength] = logits()
    recovery.remove()
    assert torch.equal(found[0.0], base) and torch.equal(found[0.25], base) and torch.equal(found[0.5], found[0.75])
    assert not torch.equal(found[0.5], base) and not torch.equal(found[1.0], found[0.5])
    assert [name for name, _ in model.named_modules()] == names and not hasattr(model, "peft_config")
    documents = [torch.randint(1, 256, (40,)).tolist()]
    with_it = evaluate(model, documents, family=family)
    bare = Family.load(family.path)
    bare.points = tuple(replace(point, recovery=None) for point in bare.points)
    without = evaluate(model, documents, family=bare)
    assert with_it["base"] == without["base"]
    assert all(a["ppl"] != b["ppl"] for a, b in zip(with_it["points"], without["points"], strict=True))
    equal(weights(model), before)
    assert [name for name, _ in model.named_modules()] == names


def test_a_dial_switches_recovery_adapters_and_the_base_is_exact(folder: Path, tmp_path: Path) -> None:
    model = base_model(folder).eval()
    names, flags = [name for name, _ in model.named_modules()], [p.requires_grad for p in model.parameters()]
    options: dict[str, Any] = {"recovery_rank": 2, "recovery_lr": 0.05}
    family = family_of(folder, tmp_path / "family", [0.5, 1.0], base=model, **options)
    ids = torch.randint(1, 256, (1, 16))

    def logits() -> Tensor:
        with torch.no_grad():
            return model(ids, use_cache=False).logits

    base = logits()
    dialled = get_remoe_model(model, family=family)
    assert torch.equal(logits(), base)
    found = {}
    for strength in (1.0, 0.5, 0.0):
        dialled.controller.set_strength(strength)
        found[strength] = logits()
    assert torch.equal(found[0.0], base)
    dialled.controller.set_strength(1.0)
    with pytest.raises(MergeStateError, match="recovery"):
        dialled.merge_and_unload()
    release(model)
    assert torch.equal(logits(), base)
    assert [name for name, _ in model.named_modules()] == names and not hasattr(model, "peft_config")
    assert [p.requires_grad for p in model.parameters()] == flags
    bare = Family.load(family.path)
    bare.points = tuple(replace(point, recovery=None) for point in bare.points)
    plain = get_remoe_model(model, family=bare)
    plain.controller.set_strength(1.0)
    assert not torch.equal(logits(), found[1.0])
    release(model)


def test_a_recovery_adapter_of_other_layers_is_refused(folder: Path, tmp_path: Path) -> None:
    model = base_model(folder)
    family = family_of(folder, tmp_path / "family", [1.0], base=model, recovery_rank=2, steps=1)
    names = [name for name, _ in model.named_modules()]
    path = family.path / "s100-recovery" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"target_modules": ["q_proj", "lm_head"]}))
    with pytest.raises(FamilyError, match="no recovery adapter of this model: Found missing adapter keys"):
        FamilyRecovery(model, Family.load(family.path))
    tensors = family.path / "s100-recovery" / "adapter_model.safetensors"
    head = {
        f"base_model.model.lm_head.lora_{n}.weight": torch.zeros(s) for n, s in {"A": (2, 32), "B": (257, 2)}.items()
    }
    save_file(load_file(tensors) | head, tensors)
    with pytest.raises(FamilyError, match="recovery adapter changes lm_head"):
        FamilyRecovery(model, Family.load(family.path))
    path.write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(FamilyError, match="is a LORA"):
        Family.load(family.path)
    path.unlink()
    with pytest.raises(FamilyError, match="no saved recovery adapter"):
        Family.load(family.path)
    assert [name for name, _ in model.named_modules()] == names


def test_recovery_is_never_on_experts_or_routers() -> None:
    for kind in ("qwen2_moe", "mixtral", "deepseek_v3", "olmoe"):
        model = tiny_model(kind)
        found = recovery_targets(model)
        modules = [n for n, m in model.named_modules() if n in found or n.rpartition(".")[2] in found]
        assert modules and all(isinstance(model.get_submodule(name), nn.Linear) for name in modules)
        assert not any(".experts" in name or name.endswith((".gate", "lm_head")) for name in modules), modules


def test_recovery_needs_a_base_without_other_adapters(folder: Path, tmp_path: Path) -> None:
    model = base_model(folder)
    lora = get_peft_model(model, LoraConfig(target_modules=["q_proj"]), "style")
    with pytest.raises(ConfigError, match=r"carries another adapter, at .*q_proj"):
        family_of(folder, tmp_path / "family", [1.0], base=model, recovery_rank=2)
    assert list(lora.peft_config) == ["style"]


def test_the_command_takes_one_gain_or_one_for_each_strength() -> None:
    assert _gains(None, [0.5, 1.0]) == {} and _gains("0.3", [0.5, 1.0]) == {"recency_gain": 0.3}
    listed = _gains("0.1,0.2", [0.5, 1.0])
    assert listed == {"recency_gain": None, "recency_gains": ((0.5, 0.1), (1.0, 0.2))}
    with pytest.raises(ConfigError, match="3 gains for 2 strengths"):
        _gains("0.1,0.2,0.3", [0.5, 1.0])
