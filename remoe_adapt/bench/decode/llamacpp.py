"""Stock llama.cpp as a regime of `remoe bench decode`: a memory-mapped GGUF, whose pages the kernel caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remoe_adapt.bench.decode.regimes import Regime
from remoe_adapt.engines.llamacpp import LlamaModel
from remoe_adapt.errors import ConfigError


class LlamaCpp(Regime):
    """The C API of the pinned wheel on a file of `gguf_copy`, mapped and not repacked, so that pages can be given back.

    Raises ConfigError where the engine refuses the file, or has no recency prior though one is asked for.

    options: `file`, its path; `context_tokens`; `threads`; `engine`, further options of `LlamaModel`, as its recency
        prior. What is computed is what llama.cpp makes of the file: some architectures have switches that it does not
        read, so perplexities are compared with those of its own F16 file.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        self._engine = LlamaModel(
            options["file"],
            context_tokens=options["context_tokens"],
            threads=options["threads"],
            load_mode="mmap",
            repack=False,
            **options.get("engine", {}),
        )
        status = self._engine.prior_status()
        if status is not None and not status.acts:
            raise ConfigError(f"the recency prior in llama.cpp is off: {status.reason}")
        self.facts = {"file_bytes": Path(options["file"]).stat().st_size}

    def use(self, arm: Mapping[str, Any]) -> None:
        """`gain`, if given, of the prior. Pages stay where they are, as the kernel holds them from sequence to
        sequence."""
        if "gain" in arm:
            self._engine.set_gain(arm["gain"])

    def decoder(self) -> LlamaCpp:
        """This engine, at the start of a sequence: it has one context."""
        self._engine.clear()
        return self

    def feed(self, ids: Sequence[int]) -> Tensor:
        """Logits [V] after the last of these tokens, which follow those fed before."""
        return torch.from_numpy(self._engine.decode(ids)[-1])
