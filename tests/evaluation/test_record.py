"""Recording: windows that own every token once, hooks that see what the experts see, decode step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from tiny_family import byte_tokenizer, save_base
from tiny_models import TOP_K, VOCAB, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from remoe_adapt import RemoeConfig, discover_routers
from remoe_adapt.checkpoints.load import load_base, load_with_tokenizer, max_positions
from remoe_adapt.dial.load import get_remoe_model
from remoe_adapt.errors import ConfigError, RouterNotFoundError, TraceError
from remoe_adapt.evaluation.record import (
    Decoder,
    Window,
    inference,
    record_decode,
    record_forward,
    record_prefill,
    window_tokens,
    windows,
)
from remoe_adapt.tuner.layer import remoe_layers


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("qwen2_moe")


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(1, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def chosen_by_hand(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Experts [L, T, K] from the router logits that transformers itself captures, as sorted sets."""
    with torch.no_grad():
        logits_LTE = torch.stack(model(torch.tensor([ids]), output_router_logits=True).router_logits)
    return logits_LTE.topk(TOP_K, dim=-1).indices.sort(dim=-1).values


# Windows


def test_windows_of_a_long_document_by_hand() -> None:
    assert windows([10], 4) == [
        Window(0, 0, 4, 0), Window(0, 2, 6, 4), Window(0, 4, 8, 6), Window(0, 6, 10, 8),
    ]  # fmt: skip
    assert [w.scored for w in windows([10], 4)] == [3, 2, 2, 2]


@pytest.mark.parametrize("window", [2, 3, 4, 7, 64])
@pytest.mark.parametrize("length", [2, 3, 7, 8, 9, 50])
def test_every_token_is_owned_by_exactly_one_window(length: int, window: int) -> None:
    plan = windows([length], window)
    assert [t for w in plan for t in range(w.fresh, w.end)] == list(range(length))
    assert sum(w.scored for w in plan) == length - 1
    assert all(w.end - w.begin <= window and w.begin % max(1, window // 2) == 0 for w in plan)
    # From the second window on, at least half a window (less one token) stands before each target.
    assert all(w.fresh - w.begin >= window - window // 2 for w in plan[1:])


def test_documents_without_a_target_are_left_out() -> None:
    assert {w.document for w in windows([0, 1, 2, 5], 4)} == {2, 3}


def test_window_is_limited_by_positions_and_option(model: PreTrainedModel) -> None:
    assert max_positions(model) == 64
    assert window_tokens(model) == 64
    assert window_tokens(model, 16) == 16
    with pytest.raises(ConfigError, match="window of 1 token"):
        window_tokens(model, 1)
    with pytest.raises(ConfigError, match="100 tokens is longer than this model's, 64"):
        window_tokens(model, 100)


# Prefill


def test_prefill_trace_holds_the_models_own_choices(model: PreTrainedModel) -> None:
    documents = [tokens(40, seed=1), tokens(1, seed=2), tokens(25, seed=3)]
    trace = record_prefill(model, documents, model_id="m", text="t")
    assert trace.experts.shape == (4, 65, TOP_K)
    assert trace.document_starts == (0, 40)
    assert (trace.meta["model"], trace.meta["text"], trace.meta["phase"]) == ("m", "t", "prefill")
    found = torch.from_numpy(trace.experts.astype(np.int64)).sort(dim=-1).values
    assert torch.equal(found[:, :40], chosen_by_hand(model, documents[0]))
    assert torch.equal(found[:, 40:], chosen_by_hand(model, documents[2]))


def test_routing_comes_from_the_window_that_owns_the_token(model: PreTrainedModel) -> None:
    ids = tokens(150)
    trace = record_prefill(model, [ids])
    found = torch.from_numpy(trace.experts.astype(np.int64)).sort(dim=-1).values
    assert torch.equal(found[:, :64], chosen_by_hand(model, ids[:64]))
    assert torch.equal(found[:, 64:96], chosen_by_hand(model, ids[32:96])[:, 32:])
    assert torch.equal(found[:, 128:], chosen_by_hand(model, ids[96:])[:, 32:])


def test_progress_counts_every_token_once(model: PreTrainedModel) -> None:
    heard: list[int] = []
    record_prefill(model, [tokens(150), tokens(9)], on_tokens=heard.append)
    assert sum(heard) == 159


def test_hooks_and_training_flag_are_gone_afterwards(model: PreTrainedModel) -> None:
    before = [len(ref.module._forward_hooks) for ref in discover_routers(model)]
    model.train()
    try:
        record_prefill(model, [tokens(8)])
        assert model.training
    finally:
        model.eval()
    assert [len(ref.module._forward_hooks) for ref in discover_routers(model)] == before


def test_a_wrapped_router_is_recorded_as_its_experts_see_it() -> None:
    base, ids = tiny_model("mixtral"), tokens(30)
    plain = record_prefill(base, [ids])
    wrapped = get_peft_model(base, RemoeConfig(init_weights=False))
    moved = record_prefill(wrapped, [ids])
    assert (moved.experts != plain.experts).any()
    with wrapped.disable_adapter():
        assert np.array_equal(record_prefill(wrapped, [ids]).experts, plain.experts)


@pytest.mark.parametrize("folder", ["deepseek_v3", "gpt_oss", "llama4"])
def test_other_return_contracts_give_ids_in_range(folder: str) -> None:
    trace = record_prefill(tiny_model(folder), [tokens(12)])
    assert trace.num_tokens == 12
    assert trace.experts.min() >= 0 and trace.experts.max() < trace.num_experts


def test_batches_keep_rows_apart_and_in_order(model: PreTrainedModel) -> None:
    rows = [tokens(10, seed=4), tokens(10, seed=5)]
    with record_forward(model) as recorder, inference(model):
        model(torch.tensor(rows))
        ids_LTK = recorder.take()
    assert ids_LTK.dtype == torch.int16
    for number, row in enumerate(rows):
        found = ids_LTK[:, 10 * number : 10 * number + 10].long().sort(dim=-1).values
        assert torch.equal(found, chosen_by_hand(model, row))


def test_taking_what_never_ran_is_an_error(model: PreTrainedModel) -> None:
    with record_forward(model) as recorder, pytest.raises(TraceError, match="was not called"):
        recorder.take()


def test_encoder_beside_decoder_cannot_share_a_trace() -> None:
    both = tiny_model("switch_transformers", text_only=False)
    with record_forward(both) as recorder, inference(both), pytest.raises(TraceError, match="saw 3 to 7 tokens"):
        both(input_ids=torch.tensor([tokens(7)]), decoder_input_ids=torch.tensor([tokens(3)]))
        recorder.take()


def test_dense_models_and_empty_text_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(RouterNotFoundError):
        record_prefill(tiny_model("qwen2_moe", decoder_sparse_step=99), [tokens(5)])
    with pytest.raises(TraceError, match="nothing was recorded"):
        record_prefill(model, [[], [3]])


# Decode


def test_decoder_equals_one_forward(model: PreTrainedModel) -> None:
    ids = tokens(20)
    with inference(model):
        expected_TV = model(torch.tensor([ids])).logits[0]
        decoder = Decoder(model)
        step_logits = [decoder.feed(ids[:5]), *(decoder.feed([token]) for token in ids[5:])]
    torch.testing.assert_close(torch.stack(step_logits), expected_TV[4:], rtol=1e-4, atol=1e-5)


def test_greedy_decode_equals_generate(model: PreTrainedModel) -> None:
    prompts = [tokens(6, seed=7), tokens(11, seed=8)]
    trace = record_decode(model, prompts, 12)
    assert trace.experts.shape == (4, 24, TOP_K)
    assert trace.document_starts == (0, 12)
    assert trace.meta["phase"] == "decode"
    generate: Any = model.generate
    for number, prompt in enumerate(prompts):
        out = generate(torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None)
        found = torch.from_numpy(trace.experts[:, 12 * number : 12 * number + 12].astype(np.int64))
        expected = chosen_by_hand(model, out[0].tolist())[:, len(prompt) :]
        assert torch.equal(found.sort(dim=-1).values, expected)


def test_sampling_is_seeded(model: PreTrainedModel) -> None:
    first, again, other = (
        record_decode(model, [tokens(6)], 15, temperature=1.0, seed=seed).experts for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_long_prompts_keep_their_end(model: PreTrainedModel) -> None:
    ids = tokens(100)
    cut = record_decode(model, [ids], 10)
    assert np.array_equal(cut.experts, record_decode(model, [ids[-54:]], 10).experts)


@pytest.mark.parametrize(("new_tokens", "temperature"), [(0, 0.0), (64, 0.0), (5, -1.0), (5, float("nan"))])
def test_impossible_decodes_are_refused(model: PreTrainedModel, new_tokens: int, temperature: float) -> None:
    with pytest.raises(ConfigError):
        record_decode(model, [tokens(6)], new_tokens, temperature=temperature)


@pytest.mark.parametrize("seed", [1 << 64, -(1 << 63) - 1, 10**30])
def test_a_seed_that_no_generator_takes_is_one_clear_error(model: PreTrainedModel, seed: int) -> None:
    with pytest.raises(ConfigError, match=f"seed {seed} is out of range"):
        record_decode(model, [tokens(6)], 2, temperature=1.0, seed=seed)


@pytest.mark.parametrize("device", ["meta", "banana", "", "cpu:x"])
def test_a_device_that_cannot_compute_is_said_before_anything_is_loaded(device: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot run on device {device}: "):
        load_with_tokenizer("no/such/model", device=device)
    with pytest.raises(ConfigError, match=f"cannot run on device {device}: "):
        get_remoe_model("no/such/model", device=device)


def test_the_command_line_loads_what_get_remoe_model_loads_and_an_adapter_with_its_base(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "adapter")
    base: Any = load_base(tmp_path / "base")
    assert type(load_with_tokenizer(tmp_path / "base", device="cpu")[0]) is type(base)
    get_peft_model(base, RemoeConfig(init_weights=False)).save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    adapted, _ = load_with_tokenizer(tmp_path / "adapter", device="cpu")
    expected = {name: layer.delta_ED("default") for name, layer in remoe_layers(base).items()}
    found = {name: layer.delta_ED("default") for name, layer in remoe_layers(adapted).items()}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
