"""The recency prior in llama.cpp against ours in transformers: the same logits, whatever way the tokens come."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_writer import small_model, write_gguf
from kv import kv, returned_cache
from llama_architectures import KINDS, engine_model, write_dense
from llama_engine import skip_without_engine
from numpy.typing import NDArray
from torch import nn

from remoe_adapt.engines.llamacpp.prior import PriorStatus
from remoe_adapt.engines.llamacpp.prior.build import library as native_library
from remoe_adapt.errors import ConfigError, TraceError
from remoe_adapt.evaluation.record import record_prefill
from remoe_adapt.recency.install import recency_prior

pytest.importorskip("xllamacpp", reason="llama.cpp in this process (extra: llamacpp)")
from remoe_adapt.engines.llamacpp.in_process import LlamaModel

TOKENS = 48
Logits = NDArray[np.float32]


@pytest.fixture(scope="module", autouse=True)
def _right_version() -> None:
    skip_without_engine()


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return torch.randint(3, 90, (TOKENS,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def others() -> list[int]:
    return torch.randint(3, 90, (TOKENS,), generator=torch.Generator().manual_seed(4)).tolist()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A model whose experts are ranked by a softmax, 3 layers."""
    path = tmp_path_factory.mktemp("prior") / "olmoe.gguf"
    return path, engine_model("olmoe", path)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A model whose routers are less sure, 4 layers."""
    path = tmp_path_factory.mktemp("prior") / "mixtral.gguf"
    return path, engine_model("mixtral", path)


@pytest.fixture
def of_mode(mode: str, home: tuple[Path, nn.Module], calm: tuple[Path, nn.Module]) -> tuple[Path, nn.Module]:
    return calm if mode == "cost" else home


def run(path: Path, ids: list[int], *, step: int | None = None, **options: Any) -> tuple[Logits, PriorStatus]:
    """Logits of all tokens, decoded `step` at a time (None: at once), and what the prior says of it."""
    with LlamaModel(path, **options) as engine:
        size = step or len(ids)
        logits = np.concatenate([engine.decode(ids[at : at + size]) for at in range(0, len(ids), size)])
        status = engine.prior_status()
        assert status is not None
        return logits, status


def in_transformers(model: nn.Module, ids: list[int], mode: str, gain: Any, *settings: float | None) -> Logits:
    """settings: decay, share."""
    with recency_prior(model, mode, gain, *settings), torch.no_grad():
        return np.asarray(model(input_ids=torch.tensor([ids])).logits[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gains", [(0.3,), pytest.param((0.1, 0.6), marks=pytest.mark.slow)])
def test_logits_are_those_of_our_prior_in_transformers(
    gains: tuple[float, ...], kind: str, ids: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    model = engine_model(kind, path)
    before = in_transformers(model, ids, "ema", 0.0)
    for mode in ("ema", "cost"):
        for gain in gains:
            expected = in_transformers(model, ids, mode, gain)
            logits, status = run(path, ids, recency=mode, gain=gain)
            assert np.abs(logits - expected).max() < 1e-5, (mode, gain)
            assert status.acts and status.swapped > 0 and status.refused_rows == status.lost_rows == 0
        assert np.abs(expected - before).max() > 0.01, f"{mode} changes nothing here, so this shows nothing"


@pytest.mark.parametrize("weights", ["F32", "Q8_0", "Q4_K", pytest.param("IQ4_XS", marks=pytest.mark.slow)])
def test_gain_0_is_the_engine_bit_for_bit(weights: str, ids: list[int], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(small_model("qwen2moe", hidden=256, inner=256, layers=1), "qwen2moe", path, weights=weights)
    with LlamaModel(path) as plain:
        at_once = plain.decode(ids)
        plain.clear()
        one_by_one = np.concatenate([plain.decode([token]) for token in ids])
    for mode, step, expected in (("ema", None, at_once), ("ema", 1, one_by_one), ("cost", None, at_once)):
        logits, status = run(path, ids, step=step, recency=mode, gain=0.0)
        assert np.array_equal(logits, expected) and status.acts and status.tokens == TOKENS
        turned, status = run(path, ids, step=step, recency=mode, gain=0.5)
        assert not np.array_equal(turned, expected) and status.swapped > 0


@pytest.mark.parametrize("mode", ["ema", "last", "cost"])
def test_ways_of_decoding_agree(mode: str, ids: list[int], of_mode: tuple[Path, nn.Module]) -> None:
    path, model = of_mode
    at_once, status = run(path, ids, recency=mode, gain=0.4)
    assert np.abs(at_once - in_transformers(model, ids, mode, 0.4)).max() < 1e-5
    parts, of_parts = run(path, ids, recency=mode, gain=0.4, ubatch_tokens=7)
    assert np.abs(parts - at_once).max() < 1e-5 and of_parts.swapped == status.swapped
    for step in (1, 5):
        steps, of_steps = run(path, ids, step=step, recency=mode, gain=0.4)
        assert np.abs(steps - at_once).max() < 1e-5
        assert (of_steps.swapped, of_steps.eor, of_steps.tokens) == (status.swapped, status.eor, TOKENS)


def test_each_layer_has_its_gain_and_a_decay_is_taken(
    ids: list[int], home: tuple[Path, nn.Module], calm: tuple[Path, nn.Module]
) -> None:
    path, model = home
    gains = (0.0, 0.7, 0.2)
    logits, status = run(path, ids, recency="ema", gain=gains, decay=0.9)
    assert np.abs(logits - in_transformers(model, ids, "ema", gains, 0.9)).max() < 1e-5
    assert status.gains == gains and status.layers == (0, 1, 2)
    assert np.abs(logits - run(path, ids, recency="ema", gain=0.3)[0]).max() > 0.01
    with pytest.raises(ConfigError, match="2 recency gains for 3"):
        LlamaModel(path, recency="ema", gain=(0.1, 0.2))
    path, model = calm
    gains = (0.0, 0.3, 0.1, 0.05)
    logits, status = run(path, ids, recency="cost", gain=gains, decay=0.9, share=0.4)
    assert np.abs(logits - in_transformers(model, ids, "cost", gains, 0.9, 0.4)).max() < 1e-5
    assert (status.gains, status.decay, status.share) == (gains, 0.9, 0.4)
    assert np.abs(logits - in_transformers(model, ids, "cost", gains, 0.9)).max() > 0.01


@pytest.mark.parametrize("mode", ["ema", "cost"])
def test_a_gain_turned_in_mid_generation_acts_from_the_next_token(
    mode: str, ids: list[int], of_mode: tuple[Path, nn.Module]
) -> None:
    path, model = of_mode
    with LlamaModel(path, recency=mode, gain=0.0) as engine, recency_prior(model, mode, 0.0) as ours, torch.no_grad():
        past = None
        for number, token in enumerate(ids):
            gain = (0.0, 0.6, 0.2)[number % 3]
            engine.set_gain(gain)
            ours.set_gains(gain)
            out = model(input_ids=torch.tensor([[token]]), use_cache=True, **kv(past))
            past = returned_cache(out)
            assert np.abs(engine.decode([token])[0] - out.logits[0, 0].numpy()).max() < 1e-5, number
        with pytest.raises(ConfigError, match="gain 17"):
            engine.set_gain(17)
    with LlamaModel(path) as plain, pytest.raises(ConfigError, match="no recency prior"):
        plain.set_gain(0.1)


@pytest.mark.parametrize("mode", ["ema", "cost"])
def test_sequences_in_one_batch_are_each_alone(
    mode: str, ids: list[int], others: list[int], of_mode: tuple[Path, nn.Module]
) -> None:
    path, _ = of_mode
    alone = [run(path, text, recency=mode, gain=0.4)[0] for text in (ids, others)]
    both = [token for pair in zip(ids, others, strict=True) for token in pair]
    with LlamaModel(path, recency=mode, gain=0.4, sequences=2) as engine:
        steps = np.stack([engine.decode(list(pair), [0, 1]) for pair in zip(ids, others, strict=True)])
        engine.clear()
        blocks = engine.decode(ids + others, [0] * TOKENS + [1] * TOKENS)
        engine.clear()
        mixed = engine.decode(both, [0, 1] * TOKENS)
    for got in (steps.transpose(1, 0, 2), blocks.reshape(2, TOKENS, -1), mixed.reshape(TOKENS, 2, -1).swapaxes(0, 1)):
        assert np.abs(np.stack(alone) - got).max() < 1e-5


@pytest.mark.parametrize(("mode", "decay"), [("ema", 0.7), ("ema", 0.95), ("cost", 0.95)])
def test_going_back_to_an_earlier_token_takes_the_state_along(
    mode: str, decay: float, ids: list[int], others: list[int], of_mode: tuple[Path, nn.Module]
) -> None:
    """As a server does with rejected draft tokens and reused beginnings of prompts."""
    path, model = of_mode
    changed = ids[:20] + others[20:]
    expected = in_transformers(model, changed, mode, 0.5, decay)
    with LlamaModel(path, recency=mode, gain=0.5, decay=decay) as engine:
        engine.decode(ids)
        engine.rewind(20)
        tail = np.concatenate([engine.decode([token]) for token in changed[20:]])
        status = engine.prior_status()
        assert status is not None and (status.rewinds, status.restarts) == (1, 0)
        engine.rewind(0)
        again = engine.decode(changed)
        with pytest.raises(TraceError, match="cannot go back to 60"):
            engine.rewind(60)
    assert np.abs(tail - expected[20:]).max() < 1e-5 and np.abs(again - expected).max() < 1e-5


def test_weights_of_the_chosen_are_divided_by_their_sum_where_the_engine_does_not(
    ids: list[int], tmp_path: Path
) -> None:
    """A model with norm_topk_prob in an architecture that llama.cpp computes without it."""
    path = tmp_path / "model.gguf"
    model = small_model("qwen2moe")
    for module in model.modules():
        if hasattr(module, "norm_topk_prob"):
            module.norm_topk_prob = True
    write_gguf(model, "qwen2moe", path)
    plain, _ = run(path, ids, recency="ema", gain=0.0)
    expected = in_transformers(model, ids, "ema", 0.0)
    assert np.abs(plain - expected).max() > 0.01
    assert np.abs(run(path, ids, recency="ema", gain=0.0, renormalise=True)[0] - expected).max() < 1e-5
    for mode, gain in (("ema", 0.4), ("cost", 0.3)):
        turned = in_transformers(model, ids, mode, gain)
        assert np.abs(run(path, ids, recency=mode, gain=gain, renormalise=True)[0] - turned).max() < 1e-5
    with pytest.raises(ConfigError, match="renormalise"):
        LlamaModel(path, renormalise=True)


def test_the_trace_shows_the_experts_that_were_used(ids: list[int], home: tuple[Path, nn.Module]) -> None:
    path, model = home
    with recency_prior(model, "ema", 0.5):
        expected = record_prefill(model, [ids]).experts.astype(np.int32)
    with LlamaModel(path, recency="ema", gain=0.5, trace=True) as engine:
        engine.decode(ids)
        chosen = np.stack([np.concatenate(engine.routes[layer]) for layer in sorted(engine.routes)])
    assert np.array_equal(np.sort(chosen, -1), np.sort(expected, -1))


def test_half_precision_weights_agree_with_themselves_in_transformers(ids: list[int], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    model = small_model("qwen3moe")
    write_gguf(model, "qwen3moe", path, weights="F16")
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1 and not name.endswith("mlp.gate.weight"):
                value.copy_(value.half().float())
    with recency_prior(model, "ema", 0.3):
        expected = record_prefill(model, [ids]).experts.astype(np.int32)
    with LlamaModel(path, recency="ema", gain=0.3, trace=True) as engine:
        engine.decode(ids)
        chosen = np.stack([np.concatenate(engine.routes[layer]) for layer in sorted(engine.routes)])
    assert (np.sort(chosen, -1) == np.sort(expected, -1)).all(-1).mean() >= 0.99


@pytest.fixture
def _no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    native_library.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    yield
    native_library.cache_clear()


@pytest.mark.usefixtures("_no_compiler")
@pytest.mark.parametrize("kind", ["olmoe", "deepseek_v3", "gpt_oss"])
def test_without_a_compiler_numpy_computes_the_same(
    kind: str, ids: list[int], others: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    model = engine_model(kind, path)
    with LlamaModel(path) as plain:
        base = plain.decode(ids)
    logits, status = run(path, ids, recency="ema", gain=0.0)
    assert status.computed_by == "numpy" and "no C compiler" in status.why_numpy and status.acts
    assert np.array_equal(logits, base)
    for mode in ("ema", "last", "cost"):
        logits, status = run(path, ids, step=5, recency=mode, gain=0.3)
        assert np.abs(logits - in_transformers(model, ids, mode, 0.3)).max() < 1e-5 and status.swapped > 0
    changed = ids[:20] + others[20:]
    with LlamaModel(path, recency="ema", gain=0.3, context_tokens=2 * TOKENS, sequences=2) as engine:
        engine.decode(ids)
        engine.rewind(20)
        engine.decode(others, [1] * TOKENS)
        tail = engine.decode(changed[20:])
        status = engine.prior_status()
    assert status is not None and (status.rewinds, status.restarts) == (1, 0)
    assert np.abs(tail - in_transformers(model, changed, "ema", 0.3)[20:]).max() < 1e-5


@pytest.mark.parametrize("computed_by", ["c", "numpy"])
@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        (None, "the model chooses no experts"),
        ({"experts": 128, "top_k": 80}, "more than 64 chosen"),
    ],
    ids=["no experts", "80 of 128 chosen"],
)
def test_where_it_cannot_act_it_stays_off_and_says_why(
    computed_by: str, sizes: dict[str, int] | None, reason: str, ids: list[int], tmp_path: Path, request: Any
) -> None:
    if computed_by == "numpy":
        request.getfixturevalue("_no_compiler")
    path = tmp_path / "model.gguf"
    if sizes is None:
        write_dense(path)
    else:
        engine_model("dots1", path, **sizes)
    with LlamaModel(path) as plain:
        base = plain.decode(ids)
    logits, status = run(path, ids, recency="ema", gain=0.5)
    assert np.array_equal(logits, base)
    assert not status.acts and reason in status.reason and status.computed_by == computed_by
    assert status.swapped == status.changed_rows == 0


def test_residency_that_is_the_same_for_all_is_the_engine_bit_for_bit(
    ids: list[int], home: tuple[Path, nn.Module], request: pytest.FixtureRequest
) -> None:
    """A file that lies wholly in memory, as these do: nothing is rounded otherwise."""
    path, _ = home
    with LlamaModel(path) as plain:
        base = plain.decode(ids)
    for computed_by in ("c", "numpy"):
        if computed_by == "numpy":
            request.getfixturevalue("_no_compiler")
        logits, status = run(path, ids, recency="resident", gain=0.5)
        assert np.array_equal(logits, base) and status.acts and status.computed_by == computed_by
        assert status.mode == "resident" and not status.is_blind and status.changed_rows == 0


def test_settings_that_cannot_be_are_refused(home: tuple[Path, nn.Module]) -> None:
    path, _ = home
    for options, words in (
        ({"recency": "lately"}, "'lately' is not one of"),
        ({"recency": "ema", "gain": -0.1}, "gain -0.1"),
        ({"recency": "ema", "gain": float("nan")}, "gain nan"),
        ({"recency": "ema", "decay": 1.0}, "decay 1.0"),
        ({"recency": "cost", "share": 1.5}, "share 1.5"),
        ({"sequences": 0}, "0 sequences"),
    ):
        with pytest.raises(ConfigError, match=words):
            LlamaModel(path, **options)  # type: ignore[arg-type]
    with LlamaModel(path, recency="ema", sequences=2) as engine:
        with pytest.raises(TraceError, match="below 2"):
            engine.decode([5, 6], [0, 2])
        with pytest.raises(TraceError, match="one for each"):
            engine.decode([5, 6], [0])
        assert engine.decode([5, 6], [1, 1]).shape[0] == 2
