"""What an arm of `remoe bench controller` cost in quality: its tokens again at its strengths, beside the base."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remoe_adapt.bench.controller_arms import bench_profile, dialled
from remoe_adapt.bench.controller_worker import Text
from remoe_adapt.evaluate import score
from remoe_adapt.record import Decoder, load_with_tokenizer


class Replay:
    """The model as it is stored, all of it in RAM, with the dial and without; a token at a time, as it was decoded."""

    def __init__(
        self, model: str | Path, family: str, gain: float, documents: Sequence[Sequence[int]], dtype: torch.dtype
    ) -> None:
        self._documents, name = documents, str(dtype).removeprefix("torch.")
        self._base: Any = load_with_tokenizer(model, device="cpu", dtype=name)[0].eval()
        dialled_base: Any = load_with_tokenizer(model, device="cpu", dtype=name)[0].eval()
        self._dialled, self._controller = dialled_base, dialled(dialled_base, family, bench_profile(gain))
        self._base_logits_TV: list[Tensor] = []

    def kl(self, strengths: Sequence[float]) -> float:
        """Mean KL to the base in nats over the text's first tokens, the n-th of them at the n-th strength."""
        with torch.inference_mode():
            if len(self._base_logits_TV) < len(strengths):
                self._base_logits_TV = self._decode(self._base, [None] * len(strengths))
            decoded = self._decode(self._dialled, list(strengths))
            total = 0.0
            for logits_V, base_V in zip(decoded, self._base_logits_TV, strict=False):
                target_1 = torch.zeros(1, dtype=torch.long)
                total += float(score(logits_V[None], target_1, base_V[None])[1])
        return total / len(strengths)

    def _decode(self, model: Any, strengths: Sequence[float | None]) -> list[Tensor]:
        text, decoder, found = Text(self._documents), Decoder(model), list[Tensor]()
        for strength in strengths:
            token, starts = text.next()
            if starts:
                decoder = Decoder(model)
            with self._step(strength):
                found.append(decoder.feed([token]).clone())
        return found

    def _step(self, strength: float | None) -> AbstractContextManager[None]:
        if strength is None:
            return nullcontext()
        if self._controller.target != strength:
            self._controller.set_strength(strength)
        return self._controller.step()
