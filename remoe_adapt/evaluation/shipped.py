"""The model that lies in the repository, and text that it never saw: what the demo and the benchmarks decode."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remoe_adapt._support import printable, read_json
from remoe_adapt.errors import DataError
from remoe_adapt.texts import read_shared

PIECE_TOKENS = 128


def example_folder() -> Path:
    """Where the shipped model lies in a checkout; absent in a wheel."""
    return Path(__file__).resolve().parents[2] / "examples" / "tiny_moe"


@dataclass(frozen=True)
class HeldOut:
    """Text that the shipped model never saw: token documents, where they are from, and prompts to continue."""

    documents: list[list[int]]
    sources: list[str]
    prompts: list[str]


def held_out(
    model_folder: Path, tokenizer: Any, tokens: int, data: Sequence[str | Path] = (), piece_tokens: int = PIECE_TOKENS
) -> HeldOut:
    """About `tokens` tokens: the prompts of `demo.json` in the model's folder, the first `piece_tokens` of each of the
    standard library modules it names (the running interpreter's own source), and as much again of the `data` files if
    there are any, in pieces of that length.

    Raises:
        DataError: nothing to decode, or a damaged `demo.json`.
    """
    names, prompts = _recipe(model_folder / "demo.json")
    documents: list[list[int]] = []
    left = tokens
    for prompt in prompts:
        if len(ids := _encode(tokenizer, prompt)[:left]) > 1:
            documents.append(ids)
            left -= len(ids)
    sources = [f"{len(documents)} prompts"] if documents else []
    for name in names:
        source = _module_source(name)
        # A document of one token has nothing to predict.
        if left < 2 or source is None:
            continue
        # No token has more than some 16 characters on average, and whole modules are slow to tokenize.
        ids = _encode(tokenizer, source[: 16 * piece_tokens])[: min(piece_tokens, left)]
        documents.append(ids)
        sources.append(name)
        left -= len(ids)
    if data:
        for ids in read_shared(data, tokenizer, tokens):
            documents += [ids[begin : begin + piece_tokens] for begin in range(0, len(ids), piece_tokens)]
        sources += [Path(path).name for path in data]
    documents = [ids for ids in documents if len(ids) > 1]
    if not documents:
        raise DataError(f"nothing to decode: {model_folder} has no demo.json with text; give --data FILE")
    return HeldOut(documents, sources, prompts)


def _recipe(path: Path) -> tuple[list[str], list[str]]:
    if not path.is_file():
        return [], []
    facts = read_json(path, DataError)
    lists: list[Any] = [facts.get(key) if isinstance(facts, dict) else None for key in ("heldout_stdlib", "prompts")]
    for texts in lists:
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{printable(path)} is damaged: heldout_stdlib and prompts must be lists of strings")
    return lists[0], lists[1]


def _module_source(name: str) -> str | None:
    """Source of a standard library module, None where this interpreter has none (frozen, removed)."""
    if name not in sys.stdlib_module_names:  # a recipe of others may name any path
        return None
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in (root / f"{name}.py", root / name / "__init__.py"):
        if path.is_file():
            # A distribution may have patched a module with bytes that are not UTF-8.
            return path.read_text(encoding="utf-8", errors="ignore")
    return None


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
