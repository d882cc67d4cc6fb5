"""A GGUF model's run in llama.cpp -> Trace: the engine's own routing, by the protocol of `evaluation/record.py`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from remoe_adapt._support import usable_cores
from remoe_adapt.engines.llamacpp.in_process import LlamaModel, LlamaVocabulary
from remoe_adapt.errors import TraceError
from remoe_adapt.evaluation import MAX_WINDOW, make_trace, windows
from remoe_adapt.traces import Trace


def record_gguf(
    model: LlamaModel,
    documents: Sequence[Sequence[int]],
    *,
    window: int,
    model_id: str | None = None,
    text: str | None = None,
    on_tokens: Callable[[int], object] | None = None,
) -> Trace:
    """Runs llama.cpp over token ids in windows with stride half, and records every router's choice, best expert first.

    model: loaded with `trace` and a context of at least `window` tokens. Each token's routing is taken from the window
    that scores it; documents of fewer than 2 tokens are left out. Layers are those with routers, in order.

    Raises TraceError when the model routes nothing, or layers differ in what they saw.
    """
    parts: dict[int, list[NDArray[np.int16]]] = {}
    for piece in windows([len(ids) for ids in documents], window):
        model.clear()
        model.routes.clear()
        model.decode(documents[piece.document][piece.begin : piece.end])
        parts.setdefault(piece.document, []).append(taken(model)[:, piece.fresh - piece.begin :])
        if on_tokens is not None:
            on_tokens(piece.end - piece.fresh)
    joined = [np.concatenate(part, axis=1) for part in parts.values()]
    return make_trace(joined, model.num_experts, phase="prefill", model=model_id, text=text)


def open_gguf(path: str | os.PathLike[str], threads: int | None = None) -> tuple[LlamaModel, int]:
    """(model that records its routes, window length): min(trained context, 1024) tokens; threads None: all cores."""
    model = LlamaModel(path, context_tokens=MAX_WINDOW, threads=threads or usable_cores(), trace=True)
    return model, min(model.trained_tokens or MAX_WINDOW, MAX_WINDOW)


class GgufTokenizer:
    """The tokenizer inside a GGUF, called as those of transformers are."""

    def __init__(self, model: LlamaVocabulary) -> None:
        self._model = model

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": self._model.tokenize(text)}


def taken(model: LlamaModel) -> NDArray[np.int16]:
    """Chosen experts int16 [L, T, K] since routes were cleared. Raises TraceError as `record_gguf`."""
    if not model.routes:
        raise TraceError("llama.cpp named no router's choice: the model has none, or it was loaded without trace=True")
    layers = [np.concatenate(model.routes[layer]) for layer in sorted(model.routes)]
    if len({ids_TK.shape for ids_TK in layers}) > 1:
        raise TraceError(f"routers saw or chose different numbers: {sorted({ids.shape for ids in layers})}")
    return np.stack(layers).astype(np.int16)
