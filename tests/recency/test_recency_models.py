"""The recency prior on every architecture of transformers that builds: a scan, however the text is decoded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kv import returned_cache
from recency_support import HYBRIDS, LONGER, PROMPT, chosen, decode, left_padded, routing_matters
from tiny_models import model_class, moe_folders

from remoe_adapt.errors import UnsupportedRouterError
from remoe_adapt.evaluation.record import record_forward
from remoe_adapt.recency.install import recency_prior
from remoe_adapt.recency.sequences import _STATE
from remoe_adapt.recency_settings import Ema
from remoe_adapt.routers.discover import discover_routers

# Without a layer of attention, transformers itself cannot decode these.
REFUSED = {"doge": "product keys", "nllb_moe": "mask as expert numbers"}
# Every router of these keeps its own forward.
OWN_FORWARD = {"dbrx", "inkling", "jetmoe", "phimoe", "switch_transformers", "zaya"}
NOT_DECODED = {
    "diffusion_gemma": "it denoises blocks of tokens",
    "openai_privacy_filter": "it classifies tokens",
    "mistral_large4": "a tiny one takes half a minute",
    "qwen3_omni_moe": "a tiny one lacks the numbers of its special tokens",
}
# What these architectures do otherwise by themselves, without a prior.
STOCK_BEAMS_DIFFER = {"minimax"}
STOCK_PADDING_DIFFERS = {"deepseek_v4"}
FEW = {"max_new_tokens": 6}


def ready(folder: str) -> Any:
    text_only = folder not in {"ernie4_5_vl_moe"} and "Model" not in model_class(folder, text_only=True).__name__[-5:]
    model = routing_matters(folder, **HYBRIDS.get(folder, {}), text_only=text_only)
    for ref in discover_routers(model):
        if not ref.weight_ED.any():  # all experts equal: any choice would do
            torch.nn.init.normal_(ref.weight_ED.detach(), std=0.3)
    return model


def check_kept_at_rest(model: Any) -> None:
    """The recency of a text that was decoded at gain 0 is that of the experts that were used."""
    with record_forward(model) as recorder:
        made = decode(model, LONGER, return_dict_in_generate=True, **FEW)
        ids_LTK = recorder.take()
    state = getattr(returned_cache(made), _STATE)
    assert ids_LTK.shape[:2] == (len(state.recency), state.length)
    for recency_1E, ids_TK in zip(state.recency, ids_LTK, strict=True):
        expected_1E = torch.zeros_like(recency_1E)
        for ids_K in ids_TK:
            expected_1E *= Ema.default_decay
            expected_1E[0, ids_K.long()] += 1 - Ema.default_decay
        torch.testing.assert_close(recency_1E, expected_1E)


@pytest.mark.parametrize("folder", sorted(set(moe_folders()) - set(REFUSED) - set(NOT_DECODED) - OWN_FORWARD))
def test_every_way_to_decode_is_a_scan(folder: str) -> None:
    model = ready(folder)
    every_router_is_asked = folder != "ernie4_5_vl_moe"  # half of them are for images
    plain = decode(model, LONGER, **FEW)
    with recency_prior(model, "ema", 0.0) as installed:
        assert installed.layers and not installed.own_forward
        assert torch.equal(decode(model, LONGER, **FEW), plain)
        if every_router_is_asked:
            check_kept_at_rest(model)
    with recency_prior(model, "ema", 0.4):
        text = decode(model, LONGER, **FEW)
        if every_router_is_asked:
            with record_forward(model) as recorder:
                assert torch.equal(decode(model, LONGER, **FEW), text)
                decoded = recorder.take()
            assert torch.equal(decoded, chosen(model, text[:, :-1]))
        else:
            assert torch.equal(decode(model, LONGER, use_cache=False, **FEW), text)
        if folder not in STOCK_PADDING_DIFFERS:
            batch, mask, pad = left_padded()
            both = decode(model, batch, attention_mask=mask, **FEW)
            assert torch.equal(both[0, pad:], decode(model, PROMPT, **FEW)[0]) and torch.equal(both[1], text[0])
        if folder not in STOCK_BEAMS_DIFFER:
            beams = [decode(model, num_beams=2, use_cache=cached, **FEW) for cached in (True, False)]
            assert torch.equal(*beams)
    if every_router_is_asked:
        with recency_prior(model, "ema", 0.4):
            with_prior = chosen(model, text)
        assert not torch.equal(with_prior, chosen(model, text)), "the prior must matter"
    assert torch.equal(decode(model, LONGER, **FEW), plain)


@pytest.mark.parametrize("folder", REFUSED)
def test_what_cannot_be_discovered_is_refused(folder: str) -> None:
    model = routing_matters(folder)
    with pytest.raises(UnsupportedRouterError, match=REFUSED[folder]), recency_prior(model):
        pass
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("folder", sorted(OWN_FORWARD))
def test_routers_that_cannot_have_it_keep_their_own_forward(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    model = routing_matters(folder)
    before = decode(model, LONGER, **FEW)
    with recency_prior(model, "ema", 0.4) as installed:
        assert not installed.layers and len(installed.own_forward) == installed.num_routers
        assert torch.equal(decode(model, LONGER, **FEW), before)
    assert "keep their own forward" in caplog.text


def test_routers_of_several_text_models_know_their_own_sequences() -> None:
    model = routing_matters("qwen3_omni_moe", text_only=False)
    with recency_prior(model, "ema", 0.4) as installed:
        hooked = [name for name, module in model.named_modules() if module._forward_pre_hooks]
        assert hooked == ["thinker.model.language_model", "talker.model"] and not installed.own_forward


def test_routers_beside_the_text_model_keep_their_own_forward() -> None:
    with recency_prior(routing_matters("dots3_note", text_only=False), "ema", 0.4) as installed:
        assert installed.layers == [0, 1, 2]
        assert all("vision_tower" in name and "beside" in why for name, why in installed.own_forward.items())


def test_experts_of_another_modality_are_not_asked() -> None:
    """Text alone leaves the vision experts of this architecture unasked, over more tokens than are kept one by one."""
    model = routing_matters("ernie4_5_vl_moe", text_only=False, max_position_embeddings=512)
    with recency_prior(model, "ema", 0.4):
        plain = decode(model, use_cache=False)
        assert torch.equal(decode(model, prompt_lookup_num_tokens=3), plain)
        assert decode(model, max_new_tokens=270).shape[1] == PROMPT.shape[1] + 270


def test_a_multimodal_model_that_prepares_masks_tells_padding() -> None:
    """This architecture gives its text model the masks of each kind of attention layer."""
    model = routing_matters("gemma4", text_only=False)
    batch, mask, pad = left_padded()
    with recency_prior(model, "ema", 0.4):
        both = decode(model, batch, attention_mask=mask, **FEW)
        assert torch.equal(both[0, pad:], decode(model, **FEW)[0])
        assert torch.equal(both[1], decode(model, LONGER, **FEW)[0])
