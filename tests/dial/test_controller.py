"""The dial by hand: targets in, swaps between forwards out, and the model left as it was."""

from __future__ import annotations

import copy
import itertools
import json
import threading
from typing import Any

import numpy as np
import pytest
import torch
from kv import kv
from peft import PeftModel
from tiny_models import tiny_model
from torch import Tensor
from transformers import DynamicCache
from watched_decoding import IDS, Watch, each, generate, run_all

from remoe_adapt import load_profile
from remoe_adapt.dial.controller import Controller
from remoe_adapt.dial.load import get_remoe_model
from remoe_adapt.errors import ConfigError, DialError
from remoe_adapt.family.family import Family, original_weights
from remoe_adapt.tuner.layer import remoe_layers


def logits_of(model: PeftModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits
    return logits


def test_setting_pressure_takes_effect_for_the_next_forward(model: PeftModel) -> None:
    base = logits_of(model)
    model.controller.set_pressure(0.8)
    assert model.controller.strength == 0.8
    strong = logits_of(model)
    assert not torch.equal(strong, base)
    model.controller.set_pressure(None)
    assert torch.equal(logits_of(model), base) and model.controller.status()["pressure"] == 0.0
    other = threading.Thread(target=model.controller.set_pressure, args=(0.8,))
    other.start()
    other.join()
    assert torch.equal(logits_of(model), strong), "from another thread too, when nothing runs"


def test_pressure_goes_through_the_profile_s_curve_and_maximum_and_strength_does_not(family: Family) -> None:
    model = get_remoe_model(tiny_model("qwen2_moe"), "orin-8gb", family)
    curve = load_profile("orin-8gb")
    for pressure in (0.0, 0.25, 0.5, 0.7, 0.9, 1.0):
        model.controller.set_pressure(pressure)
        assert model.controller.strength == curve.strength_at(pressure)
    assert "orin-8gb" in model.controller.status()["reason"]
    server = get_remoe_model(tiny_model("qwen2_moe"), "server", family)
    server.controller.set_pressure(np.float32(1.0))
    assert server.controller.strength == 0.5 == load_profile("server").strength.max
    server.controller.set_strength(1)
    assert server.controller.strength == 1.0


def without_sensors(status: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in status.items() if key != "sensors"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.01, 1.01, "0.5", True, [0.5], torch.tensor(2.0)])
def test_bad_values_are_refused_by_name_and_change_nothing(model: PeftModel, value: Any) -> None:
    model.controller.set_pressure(0.3)
    model.controller.pause()
    before = model.controller.status()
    with pytest.raises(ConfigError, match="pressure"):
        model.controller.set_pressure(value)
    with pytest.raises(ConfigError, match="strength"):
        model.controller.set_strength(value)
    with pytest.raises(ConfigError):
        model.controller.set_strength(None)
    assert without_sensors(model.controller.status()) == without_sensors(before)


def test_status_is_json_and_says_what_happened(model: PeftModel) -> None:
    start = model.controller.status()
    assert json.loads(json.dumps(start)) == start
    assert (start["swaps"], start["strength"], start["swap_ms"], start["waiting"]) == (0, 0.0, None, False)
    for strength in (0.3, 0.3, 0.6):  # the second is no swap
        model.controller.set_strength(strength)
    status = model.controller.status()
    assert status["swaps"] == 2 and status["strength"] == status["target"] == 0.6
    assert status["swap_ms"] > 0 and status["swap_ms_median"] > 0 and status["stage_ms_median"] > 0
    assert status["reason"] == "strength 0.6 was set by hand" and status["points"] == [0.25, 0.5, 1.0]
    assert status["running"] == 0 and status["base"] == "tests/tiny-base"


def manual_decode(model: PeftModel, schedule: list[float]) -> tuple[list[int], list[Tensor]]:
    """Greedy decoding with one strength per forward, without generate."""
    cache, ids, tokens, logits = DynamicCache(), IDS, [], []
    with torch.no_grad():
        for strength in schedule:
            model.controller.set_strength(strength)
            model.controller.step()
            out = model(input_ids=ids, **kv(cache), use_cache=True)
            logits.append(out.logits[:, -1])
            ids = out.logits[:, -1:].argmax(-1)
            tokens.append(int(ids))
    return tokens, logits


def test_swaps_between_tokens_of_generate_equal_a_manual_loop(family: Family) -> None:
    schedule = [0.0, 1.0, 0.35, 0.35, 0.0, 0.7, 1.0, 0.1]
    tokens, logits = manual_decode(get_remoe_model(tiny_model("qwen2_moe"), family=family), schedule)
    model = get_remoe_model(tiny_model("qwen2_moe"), family=family)
    model.generation_config.eos_token_id = None
    model.controller.set_strength(schedule[0])
    waiting = []

    def turn(step: int) -> None:
        if step + 1 < len(schedule):
            model.controller.set_strength(schedule[step + 1])
            waiting.append((model.controller.strength, model.controller.status()["waiting"]))

    out = generate(model, len(schedule), logits_processor=each(turn), output_logits=True, return_dict_in_generate=True)
    assert out.sequences[0, IDS.shape[1] :].tolist() == tokens
    for mine, expected in zip(out.logits, logits, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-6)
    assert len({tuple(part.flatten().tolist()) for part in logits}) == len(schedule)
    # Inside generate a target only waits: what is live is still the strength of the forward before.
    assert waiting == [(now, now != then) for now, then in itertools.pairwise(schedule)]


@pytest.mark.parametrize("mode", ["beam", "assisted", "chunked"])
def test_other_decoding_loops_have_boundaries_too(model: PeftModel, family: Family, mode: str) -> None:
    watch = Watch(model, family, [0.0, 0.25, 0.5, 1.0])
    options: dict[str, dict[str, Any]] = {
        "beam": {"num_beams": 2},
        "assisted": {"prompt_lookup_num_tokens": 2},
        "chunked": {"prefill_chunk_size": 2},
    }
    turns = each(lambda step: model.controller.set_strength([0.25, 0.5, 1.0][step % 3]))
    generate(model, 6, logits_processor=turns, **options[mode])
    assert len(watch.check()) >= 3 and model.controller.status()["running"] == 0


def test_a_stepped_loop_owns_its_swaps(model: PeftModel) -> None:
    model.controller.step()
    run_all(lambda: model.controller.set_strength(0.5))
    assert model.controller.strength == 0.0 and model.controller.status()["reason"].endswith("waits for the next step")
    with model.controller.step():
        assert model.controller.strength == 0.5 and model.controller.status()["running"] == 1
        run_all(lambda: model.controller.set_strength(1.0), lambda: generate(model, 2))
        assert model.controller.strength == 0.5, "a generate in another thread must not swap under this forward"
    model.controller.set_strength(0.25)
    assert model.controller.strength == 0.25, "the loop's own thread is between two forwards"


def test_close_restores_everything_and_waits_for_forwards(family: Family) -> None:
    base: Any = tiny_model("qwen2_moe")
    names = set(base.__dict__)
    before = [weight.detach().clone() for weight in original_weights(base).values()]
    with get_remoe_model(base, family=family).controller as controller:
        model: Any = controller._model
        model.generation_config.eos_token_id = None
        controller.set_strength(1.0)
        watch = Watch(model, family, [0.0, 1.0])
        started = threading.Event()
        run_all(
            lambda: generate(model, 30, logits_processor=each(lambda _: started.set())),
            lambda: (started.wait(30), controller.close())[1],
        )
        assert watch.check() == {0.0, 1.0}
    weights = list(original_weights(base).values())
    assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(weights, before, strict=True))
    assert set(base.__dict__) - names <= {"peft_config", "_hf_peft_config_loaded"}
    assert controller.status()["closed"] and controller.strength == 0.0
    with pytest.raises(DialError, match="closed"):
        controller.set_strength(0.5)
    with pytest.raises(DialError, match="closed"):
        controller.set_pressure(None)
    with pytest.raises(DialError, match="closed"):
        controller.on_swap(print)
    controller.close()
    assert generate(model).shape[1] == IDS.shape[1] + 8


def test_close_inside_a_forward_is_refused(model: PeftModel) -> None:
    layer = next(iter(remoe_layers(model).values()))
    handle = layer.register_forward_hook(lambda *_: model.controller.close())
    with pytest.raises(DialError, match="inside a forward"):
        generate(model, 2)
    handle.remove()
    assert model.controller.status()["running"] == 0 and generate(model, 2) is not None


def test_nothing_is_saved_or_copied_by_accident(model: PeftModel, tmp_path: Any) -> None:
    model.controller.set_strength(0.5)
    targets: tuple[Any, ...] = (model, model.get_base_model())
    for target in targets:
        with pytest.raises(DialError, match=r"strength 0\.5"):
            target.save_pretrained(tmp_path)
        with pytest.raises(DialError, match="close"):
            copy.deepcopy(target)
    assert not list(tmp_path.iterdir())
    model.controller.close()
    copied: Any = copy.deepcopy(model)
    copied.save_pretrained(tmp_path)
    assert (tmp_path / "dial" / "adapter_config.json").exists()


def test_merge_and_unload_keeps_the_strength_and_unload_the_base(family: Family, tmp_path: Any) -> None:
    for strength, unload in ((0.6, "merge_and_unload"), (0.6, "unload")):
        base: Any = tiny_model("qwen2_moe")
        before = {name: weight.detach().clone() for name, weight in original_weights(base).items()}
        model = get_remoe_model(base, family=family)
        controller: Controller = model.controller
        controller.set_strength(strength)
        plain: Any = getattr(model, unload)()
        assert plain is base and not remoe_layers(plain) and controller.status()["closed"]
        expected = family.live(strength, before) if unload == "merge_and_unload" else before
        for name, weight in original_weights(plain).items():
            assert torch.equal(weight, expected[name])
        plain.save_pretrained(tmp_path / unload)


def bits(model: Any) -> list[Tensor]:
    return [weight.detach().clone() for weight in original_weights(model).values()]


def test_a_swap_cut_short_is_done_again_at_the_next_boundary(
    model: PeftModel, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bits(model)
    copy_all = torch._foreach_copy_

    def interrupted(live: list[Tensor], values: list[Tensor]) -> None:
        copy_all(live[:1], values[:1])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "_foreach_copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.controller.set_strength(1.0)
    monkeypatch.undo()
    assert model.controller.status()["waiting"]
    watch = Watch(model, family, [0.0, 1.0])
    generate(model, 2)
    assert watch.check() == {1.0} and not model.controller.status()["waiting"]

    monkeypatch.setattr(torch, "_foreach_copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.controller.set_strength(0.0)
    monkeypatch.undo()
    model.controller.set_strength(1.0)  # what is said to be live is not
    generate(model, 2)
    assert watch.check() == {1.0}
    model.controller.set_strength(0.0)
    assert all(torch.equal(a, b) for a, b in zip(live_weights(model), base, strict=True))


def live_weights(model: Any) -> list[Tensor]:
    return [layer.base_weight_ED for layer in remoe_layers(model).values()]


def test_what_cannot_be_staged_changes_nothing(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(strength: float) -> None:
        raise MemoryError("no room")

    controller: Any = model.controller
    controller.pause()
    monkeypatch.setattr(controller._routers, "stage", no_room)
    with pytest.raises(MemoryError):
        controller.set_strength(0.5)
    status = controller.status()
    assert (status["strength"], status["target"], status["pinned"], status["waiting"]) == (0.0, 0.0, False, False)
    assert status["reason"] == "strength 0.5 could not be staged (MemoryError: no room)"
    monkeypatch.undo()
    controller.set_strength(0.5)
    assert controller.strength == 0.5


def test_a_listener_may_close_its_dial_and_another(family: Family, tmp_path: Any) -> None:
    models: list[Any] = [get_remoe_model(tiny_model("qwen2_moe"), family=family) for _ in "12"]
    base, heard, closed = bits(models[0]), [], threading.Event()

    def close_both(swap: Any) -> None:
        heard.append(swap.after)
        for model in models:
            model.controller.close()
        closed.set()

    controllers = [model.controller for model in models]
    for number, controller in enumerate(controllers):
        controller.log_to(tmp_path / str(number))
        controller.set_strength(0.25)
    controllers[0]._events.flush()
    controllers[0].on_swap(close_both)
    models[0].generation_config.eos_token_id = None
    run_all(
        lambda: generate(
            models[0], 40, logits_processor=each(lambda step: step == 2 and controllers[0].set_strength(0.5))
        ),
        lambda: generate(models[1], 40),
    )
    assert closed.wait(20) and heard == [0.5] and all(controller.status()["closed"] for controller in controllers)
    assert all(torch.equal(a, b) for a, b in zip(live_weights(models[0]), base, strict=True))
    lines = [json.loads(line) for line in (tmp_path / "0").read_text().splitlines()]
    assert [line["after"] for line in lines if line["event"] == "swap"] == [0.25, 0.5]
    assert lines[-1]["event"] == "sample", "its end is written too"


def test_closing_from_two_threads_during_generate(model: PeftModel) -> None:
    base, controller = bits(model), model.controller
    controller.set_strength(1.0)
    begun, layer = threading.Event(), next(iter(remoe_layers(model).values()))
    layer.register_forward_hook(lambda *_: (begun.set(), None)[1])
    close = [lambda: (begun.wait(20), controller.close())[1]] * 2
    run_all(lambda: generate(model, 30), lambda: generate(model, 30), *close)
    assert all(torch.equal(a, b) for a, b in zip(live_weights(model), base, strict=True))
    assert controller.status()["closed"] and controller.status()["running"] == 0
