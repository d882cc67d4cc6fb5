"""Which document each token of a batch belongs to, read from whatever packed batches say it with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from remoe_adapt.errors import ConfigError

PADDING = -1


def document_numbers(inputs: Mapping[str, Any]) -> Tensor:
    """Numbers of documents, int64 [B, T]: equal for two neighbours of a row exactly when they are of one document,
    -1 where padding. A row that says nothing is one document.

    `inputs` are a model's: `input_ids` [B, T] or `inputs_embeds` [B, T, D] give the shape. Borders are read from
    `document_ids` [B, T], `seq_idx` [B, T] and `cu_seq_lens_q` [documents + 1] (a row of all tokens), and from
    `position_ids` [B, T], which a new document begins anew. `attention_mask` is [B, T] (0 is padding, larger numbers
    may count documents) or [B, 1, T, T] (True or 0.0 where a query sees a key).

    Raises:
        ConfigError: no tokens, or a field of another shape.
    """
    tokens = inputs.get("input_ids")
    # Not `or`: a tensor of several values has no truth.
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(tokens, Tensor):
        raise ConfigError(f"training inputs have no 'input_ids' and no 'inputs_embeds' (found {', '.join(inputs)})")
    rows, length = tokens.shape[:2]
    starts_BT = torch.zeros(rows, length, dtype=torch.bool, device=tokens.device)

    def begin(name: str, *, where: Any) -> None:
        """Documents begin where `where` says that a token does not go on from the one before."""
        values = inputs.get(name)
        if not isinstance(values, Tensor) or values.dim() != 2:
            return
        if values.shape[1] != length or values.shape[0] not in (1, rows):
            raise ConfigError(f"{name} has shape {list(values.shape)}, the batch {rows} x {length}: give one per token")
        starts_BT[:, 1:] |= where(values[:, 1:], values[:, :-1]).to(starts_BT.device)

    begin("document_ids", where=torch.ne)
    begin("seq_idx", where=torch.ne)
    # Padding repeats a position too; it is masked below, so a document that begins there harms nobody.
    begin("position_ids", where=lambda now, before: now != before + 1)
    bounds = inputs.get("cu_seq_lens_q")
    if isinstance(bounds, Tensor):
        inside = bounds.to(starts_BT.device, torch.long)
        # The first bound is 0 and the last the number of tokens: no document begins at either of them anew.
        inside = inside[(inside > 0) & (inside < rows * length)]
        starts_BT.view(-1)[inside] = True
    padding_BT = torch.zeros_like(starts_BT)
    mask = inputs.get("attention_mask")
    if isinstance(mask, Mapping):  # one per kind of attention: the widest view is the one of whole documents
        mask = mask.get("full_attention")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape == (rows, length):
        begin("attention_mask", where=torch.ne)
        padding_BT = (mask == 0).to(padding_BT.device)
    elif isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[2:] == (length, length):
        sees_BTT = (mask if mask.dtype == torch.bool else mask == 0)[:, 0].to(starts_BT.device)
        # A token that does not see itself is padding, and one that does not see the token before it begins a document.
        padding_BT |= ~sees_BTT.diagonal(dim1=1, dim2=2)
        starts_BT[:, 1:] |= ~sees_BTT.diagonal(offset=-1, dim1=1, dim2=2)
    elif mask is not None:
        raise ConfigError(
            f"attention_mask {_described(mask)} does not say which of the {rows} x {length} tokens are padding: give "
            "one of that shape, or leave it out"
        )
    # Counting starts numbers documents, and only equality of neighbours is asked of the numbers.
    return starts_BT.cumsum(dim=1).masked_fill(padding_BT, PADDING)


def _described(value: Any) -> str:
    return f"of shape {list(value.shape)}" if isinstance(value, Tensor) else f"of type {type(value).__name__}"
