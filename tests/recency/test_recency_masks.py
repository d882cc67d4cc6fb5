"""Padding and packed rows reach the recency through every kind of attention mask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from recency_support import LONGER, PROMPT, chosen, decode, left_padded, routing_matters

from remoe_adapt.recency.install import recency_prior


@pytest.fixture(params=["cost", "last"])
def primed(request: pytest.FixtureRequest) -> Iterator[Any]:
    with recency_prior(model := routing_matters(), request.param, 0.4):
        yield model


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_left_padded_batch_decodes_as_its_rows_alone(primed: Any, cache: str) -> None:
    """With a static cache, generate hands over the mask prepared in four dimensions."""
    batch, mask, pad = left_padded()
    both = decode(primed, batch, attention_mask=mask, cache_implementation=cache)
    assert torch.equal(both[0, pad:], decode(primed)[0])
    assert torch.equal(both[1], decode(primed, LONGER)[0])


@pytest.mark.parametrize("kind", ["bool", "int", "float", "4-D bool", "4-D float"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_kind_of_mask_tells_padding(primed: Any, kind: str, side: str) -> None:
    _, mask, pad = left_padded()
    batch = torch.cat([torch.cat([torch.full((1, pad), 3), PROMPT], dim=1), LONGER])
    if side == "right":
        batch[0], mask[0] = batch[0].roll(-pad), mask[0].roll(-pad)
    given = {"bool": mask.bool(), "int": mask, "float": mask.float()}.get(kind)
    if given is None:
        seen = mask.bool()[:, None, None, :] & torch.ones((11, 11)).tril().bool()
        given = seen if kind == "4-D bool" else torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo().min)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    found = chosen(primed, batch, attention_mask=given, position_ids=positions)
    layers, _, k = found.shape
    real = found.reshape(layers, 2, -1, k)[:, :, mask[0].bool()]
    assert torch.equal(real[:, 0], chosen(primed, PROMPT))
    assert torch.equal(found[:, LONGER.shape[1] :], chosen(primed, LONGER))


def test_rows_packed_by_a_mask_are_apart(primed: Any) -> None:
    packed = torch.cat([PROMPT, LONGER], dim=1)
    lengths = (PROMPT.shape[1], LONGER.shape[1])
    seen = torch.block_diag(*(torch.ones((n, n)).tril() for n in lengths)).bool()[None, None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    found = chosen(primed, packed, attention_mask=seen, position_ids=positions)
    assert torch.equal(found[:, : PROMPT.shape[1]], chosen(primed, PROMPT))
    assert torch.equal(found[:, PROMPT.shape[1] :], chosen(primed, LONGER))


def test_rows_packed_by_positions_are_apart(primed: Any) -> None:
    """As transformers' flash and sdpa paths tell packed rows: positions start at 0 again, without a mask."""
    packed = torch.cat([PROMPT, LONGER], dim=1)
    positions = torch.cat([torch.arange(PROMPT.shape[1]), torch.arange(LONGER.shape[1])])[None]
    found = chosen(primed, packed, position_ids=positions, use_cache=False)
    assert torch.equal(found[:, : PROMPT.shape[1]], chosen(primed, PROMPT))
    assert torch.equal(found[:, PROMPT.shape[1] :], chosen(primed, LONGER))
