"""The model card of a family: what it is, which points it has and how they were measured, how to load it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remoe_adapt.tuner import CARD_FILE, code, literal

if TYPE_CHECKING:
    from remoe_adapt.family.family import Family

# Only a README with this line was written by us; any other is somebody's own text and is never overwritten.
_MARK = "<!-- written by remoe-adapt with family.json; without this line it is left alone -->"
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_MAX_CARD_BYTES = 1 << 20
# The arithmetic of experts that are not quantised.
_PLAIN = "float"
# Whether points have adapters -> the card's title and library line, what changes, how one point is loaded alone.
_ABOUT = {
    True: (
        "Family of router adapters",
        "library_name: peft\n",
        "Only the weights of the mixture-of-experts routers change.",
        "One point as a PEFT adapter, after `import remoe_adapt`: "
        "`PeftModel.from_pretrained(base, folder, subfolder=...)`.",
    ),
    False: (
        "Family of recency priors",
        "library_name: remoe-adapt\n",
        "No weight changes: the points are a recency prior, which prefers experts used lately.",
        "A point has no PEFT adapter that could be loaded alone.",
    ),
}
_FIGURES = ("ppl_ratio", "kl", "eor", "lru@0.25", "tokens")


def is_our_card(folder: Path) -> bool:
    """Whether README.md of a family folder is missing or ours to write."""
    path = folder / CARD_FILE
    try:
        with path.open("rb") as file:
            # Looked for within bounds, as a README of others may have any size.
            return _MARK.encode() in file.read(_MAX_CARD_BYTES)
    except OSError:
        return not path.exists()


def card_text(family: Family) -> str:
    """README.md of a family. Text of others stands in code spans, without control characters."""
    base_id = family.base_id
    # The hub links the card to the base by this line, where it must be a hub id; a path of this machine is none.
    named = f"base_model: {base_id}\n" if _HUB_ID.fullmatch(base_id) and not Path(base_id).exists() else ""
    measured = [(f"{point.strength:g}", point.adapter, point.recency, point.certificate) for point in family.points]
    if family.control:
        measured.append(("control", family.control.adapter, None, family.control.certificate))
    rows = "\n".join(
        f"| {strength} | {'none' if adapter is None else code(adapter)} | "
        f"{'none' if recency is None else code(recency.mode)} | "
        f"{' | '.join(_figure(certificate, name) for name in _FIGURES)} |"
        for strength, adapter, recency, certificate in measured
    )
    title, peft, weights, one_point = _ABOUT[family.has_adapters or family.control is not None]
    return f"""---
{peft}{named}tags:
- remoe
- mixture-of-experts
---
{_MARK}
# {title} (REMOE)

Operating points between quality and expert reuse for {code(base_id)} (routers {code(family.fingerprint[:19])}):
strength 0 is the base, 1 the strongest. {weights}

| strength | adapter | prior | {" | ".join(_FIGURES)} |
|---|---|---|{"---|" * len(_FIGURES)}
{rows}

The figures are the certificates in `family.json` (`remoe eval` writes them): perplexity over the base's, KL to the base
in nats, share of experts used again by the next token, hit rate of an LRU cache for a quarter of the experts, tokens
measured.{_experts(certificate for *_, certificate in measured)} Where a prior is named, they hold with it only, so not
for the adapter folder loaded alone.

## How to load

```python
from remoe_adapt import get_remoe_model  # pip install remoe-adapt

model = get_remoe_model({literal(base_id)}, family="this folder or its hub id")
model.controller.set_strength(1.0)
```

{one_point}
"""


def _experts(certificates: Iterable[Mapping[str, Any] | None]) -> str:
    """A sentence on the arithmetic of the experts, where it was not that of plain numbers."""
    found = set()
    for certificate in certificates:
        entry = (certificate or {}).get("arithmetic")
        name, exact = (entry.get("name"), entry.get("exact")) if isinstance(entry, Mapping) else (None, None)
        # A certificate may be written by anybody, and one of an older version says nothing.
        if isinstance(name, str) and name != _PLAIN and isinstance(exact, bool):
            found.add(code(f"{name}, {'exact' if exact else 'fast'}"))
    return f" The experts were computed as {', '.join(sorted(found))}." if found else ""


def _figure(certificate: Mapping[str, Any] | None, name: str) -> str:
    value = None if certificate is None else certificate.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4g}"
