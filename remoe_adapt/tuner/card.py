"""Model cards: what an adapter is, what for, and how to load it, in place of PEFT's empty template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftModel

from remoe_adapt._support import printable
from remoe_adapt.tuner.config import RemoeConfig
from remoe_adapt.tuner.layer import remoe_layers

CARD_FILE = "README.md"


def code(value: object) -> str:
    """Text of others as one code span of a card: no markup, no line breaks, no control characters."""
    # A backtick would end the span and a bar the cell, and what follows would be markup of a stranger.
    text = printable(value).replace("`", "'").replace("|", "/")
    return f"`{text}`"


def literal(value: object) -> str:
    """Text of others as a string of a program in a card."""
    # JSON's strings are Python's too, with quotes and backslashes escaped.
    return json.dumps(printable(value), ensure_ascii=False)


def write_card(model: PeftModel, folder: Path) -> None:
    """Write README.md where there is none yet; PEFT then adds its metadata to it, as to any card."""
    path = folder / CARD_FILE
    if path.exists():
        return
    configs: dict[str, Any] = {n: c for n, c in model.peft_config.items() if isinstance(c, RemoeConfig)}
    layers = remoe_layers(model)
    base = getattr(model.get_base_model(), "name_or_path", None) or "the base model"
    rows = []
    for name, config in configs.items():
        routers = sum(name in layer.adapters for layer in layers.values())
        kind = "full deltas" if config.rank is None else f"rank {config.rank}"
        weights = [
            f"{field.removesuffix('_weight')} {getattr(config, field):g}"
            for field in ("reuse_weight", "kl_weight", "smooth_weight", "lag_weight", "ws_weight")
            if getattr(config, field)
        ]
        print_ = code((config.base_fingerprint or "none")[:19])
        rows.append(f"| {code(name)} | {routers} | {kind} | {', '.join(weights) or 'none'} | {print_} |")
    text = f"""---
library_name: peft
---
# Router adapter (REMOE)

It changes the mixture-of-experts routers of {code(base)} and nothing else: every router gets a delta that is added to
its weight, so that the model uses other experts.

| adapter | routers | kind | loss weights | routers it was made for |
|---|---|---|---|---|
{chr(10).join(rows)}

Loading onto a base with other routers is refused.

## How to load

```python
import remoe_adapt  # pip install remoe-adapt: the adapter type
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({literal(base)})
model = PeftModel.from_pretrained(base, "this folder or its hub id")
```

As a point of a family, with a dial: `remoe_adapt.get_remoe_model(base, family=...)`.
"""
    path.write_text(text, encoding="utf-8")
