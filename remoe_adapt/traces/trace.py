"""Which experts a model chose, token by token: one array and a few facts about it, in memory and on disk."""

from __future__ import annotations

import itertools
import json
import math
import os
import stat
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from remoe_adapt._support import parse_json, printable, read_arrays, replacing
from remoe_adapt.errors import TraceError

# The numbers that the CSV of a phone run has for the phases.
PHASES = {"prefill": 0, "decode": 1}
_TEXT_KEYS = ("model", "text", "phase")
# 60,000 tokens of 48 layers and 8 experts take 46 MB. What is larger must come out of a file of its own order: routing
# deflates to a third, so a file that grows 64-fold was made to hurt.
MAX_ARRAY_BYTES, _MAX_RATIO = 256 << 20, 64
# numpy stores text as UTF-32, four bytes a character: room for the starts of half a million documents.
_MAX_META_BYTES = 16 << 20
_MAX_LINE_CHARACTERS = 4096
# What numpy (which tokenizes headers), json and zipfile (which raises RuntimeError and its kin) say of damaged files.
_UNREADABLE = (
    OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, OverflowError, SyntaxError, struct.error,
    tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Trace:
    """Chosen experts `experts` int16 [L layers, T tokens, K slots] in recorded slot order, and `meta`.

    `meta` must hold `num_experts`, and may hold `model`, `text`, `phase` (strings), `document_starts` (rising token
    indices, the first 0; default one document), `top_k` and `n_moe_layers` (checked against the array), and anything
    else that JSON can write. The trace keeps its own copy of `meta` and a read-only view of the array.

    Raises:
        TraceError: wrong shape, dtype or meta, an id outside [0, num_experts), an expert twice in one token.
    """

    experts: NDArray[np.int16]
    meta: dict[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "meta", _checked_meta(self.meta))
        # A view, so that making it read-only leaves the caller's array writable.
        experts = _checked_experts(self.experts, self.num_experts).view()
        experts.flags.writeable = False
        object.__setattr__(self, "experts", experts)
        for key, actual in (("top_k", self.top_k), ("n_moe_layers", self.num_layers)):
            if self.meta.get(key, actual) != actual:
                raise TraceError(f"meta says {key}={self.meta[key]!r}, the experts array has {actual}")
        starts = self.document_starts
        # Starts rise, so the last one tells of all.
        if starts[-1] >= self.num_tokens:
            raise TraceError(f"a document starts at token {starts[-1]}, the trace ends after {self.num_tokens} tokens")

    @property
    def num_layers(self) -> int:
        return int(self.experts.shape[0])

    @property
    def num_tokens(self) -> int:
        return int(self.experts.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.experts.shape[2])

    @property
    def num_experts(self) -> int:
        return int(self.meta["num_experts"])

    @property
    def document_starts(self) -> tuple[int, ...]:
        """Index of each document's first token, rising, the first 0."""
        return tuple(self.meta.get("document_starts", (0,)))

    def tokens(self, count: int) -> Trace:
        """The trace of the first `count` tokens.

        Raises:
            TraceError: `count` is not in [1, num_tokens].
        """
        if not 1 <= count <= self.num_tokens:
            raise TraceError(f"cannot take {count} tokens of a trace: this one has 1 to {self.num_tokens} to give")
        meta = dict(self.meta)
        if "document_starts" in meta:
            meta["document_starts"] = [start for start in self.document_starts if start < count]
        return Trace(self.experts[:, :count], meta)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a compressed npz (`experts` int16, `meta` JSON string), making its folder; an older file stays whole
        until the end."""
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # A file object and not a path, because numpy would add .npz to a name without it.
            with replacing(target) as scratch, scratch.open("wb") as file:
                np.savez_compressed(file, experts=self.experts, meta=np.array(json.dumps(self.meta)))
        except OSError as error:
            raise TraceError(f"cannot write trace {target}: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str], phase: str | None = None) -> Trace:
        """Reads an npz trace, or the CSV of a BigMoeOnEdge phone run (each turn of it becomes a document).

        `phase` ("prefill" or "decode") keeps only that phase of a CSV; an npz has one phase, which must be this one.

        Raises:
            TraceError: the file is missing, malformed or of another phase; the message names the file.
        """
        source = Path(path)
        if phase is not None and phase not in PHASES:
            raise TraceError(f"unknown phase {phase!r}: choose one of {', '.join(PHASES)}")
        try:
            if not stat.S_ISREG(source.stat().st_mode):
                raise TraceError("it is no regular file")  # a pipe or a device would be waited for, or never end
            with source.open("rb") as file:
                # The content decides, not the name: downloads are often renamed.
                magic = file.read(32)
            if magic.startswith(b"PK"):
                experts, meta = _read_npz(source, phase)
            elif magic.startswith(b"# route_trace v1"):
                experts, meta = _read_phone_csv(source, phase)
            else:
                raise TraceError("neither an npz file nor a route_trace CSV")
            return cls(experts, meta)
        except _UNREADABLE as error:
            raise TraceError(f"cannot read trace {printable(source)}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    # Our own messages are printable already, and `printable` would cut them short.
    return str(error) if isinstance(error, TraceError) else printable(error)


def _checked_meta(meta: Any) -> dict[str, Any]:
    if not isinstance(meta, dict):
        raise TraceError(f"meta must be a dict, got {type(meta).__name__}")
    try:
        # The round trip through JSON proves that `save` will work, and makes a copy that later edits of the argument do
        # not reach.
        text = json.dumps(meta, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise TraceError(f"meta cannot be written as JSON: {printable(error)}") from error
    copy: dict[str, Any] = parse_json(text, "meta", TraceError)
    num_experts = copy.get("num_experts")
    # bool is an int to isinstance, and True experts are no experts.
    if type(num_experts) is not int or not 1 <= num_experts <= np.iinfo(np.int16).max:
        raise TraceError(f"meta must hold num_experts as an int in [1, 32767], got {printable(repr(num_experts))}")
    for key in _TEXT_KEYS:
        if not isinstance(copy.get(key, ""), str):
            raise TraceError(f"meta[{key!r}] must be a string, got {printable(repr(copy[key]))}")
    starts = copy.get("document_starts", [0])
    rising = isinstance(starts, list) and all(type(start) is int for start in starts) and starts[:1] == [0]
    if not rising or any(b <= a for a, b in itertools.pairwise(starts)):
        raise TraceError(f"meta['document_starts'] must be rising ints, the first 0, got {printable(starts)}")
    return copy


def _checked_experts(experts: Any, num_experts: int) -> NDArray[np.int16]:
    if not isinstance(experts, np.ndarray) or experts.dtype != np.int16:
        got = f"dtype {experts.dtype}" if isinstance(experts, np.ndarray) else type(experts).__name__
        raise TraceError(f"experts must be an int16 array, got {got}: convert it with .astype(numpy.int16)")
    if experts.ndim != 3 or 0 in experts.shape:
        raise TraceError(f"experts must have shape [layers, tokens, slots], none of them 0, got {experts.shape}")
    outside = (experts < 0) | (experts >= num_experts)
    if outside.any():
        layer, token, slot = (int(i) for i in np.argwhere(outside)[0])
        raise TraceError(
            f"expert id {experts[layer, token, slot]} at layer {layer}, token {token}, slot {slot} "
            f"is outside [0, {num_experts})"
        )
    # Layer by layer, as a sorted copy of the whole trace would double its memory.
    for layer, ids_TK in enumerate(experts):
        sorted_TK = np.sort(ids_TK, axis=1)
        twice = sorted_TK[:, 1:] == sorted_TK[:, :-1]
        if twice.any():
            token, slot = (int(i) for i in np.argwhere(twice)[0])
            raise TraceError(f"layer {layer}, token {token} names expert {sorted_TK[token, slot]} twice")
    return experts


def _read_npz(source: Path, phase: str | None) -> tuple[NDArray[Any], Any]:
    most = max(MAX_ARRAY_BYTES, _MAX_RATIO * source.stat().st_size)
    experts, text = read_arrays(source, {"experts": most, "meta": _MAX_META_BYTES}, TraceError)
    if text.shape != () or text.dtype.kind != "U":
        raise TraceError(f"'meta' must be one JSON string, got {text.dtype} of shape {text.shape}")
    meta = parse_json(str(text), "its 'meta'", TraceError)
    if phase is not None and isinstance(meta, dict) and meta.get("phase") != phase:
        raise TraceError(f"phase {phase!r} was asked for, it holds phase {printable(repr(meta.get('phase')))}")
    return experts, meta


def _lines(file: TextIO) -> Iterator[str]:
    while line := file.readline(_MAX_LINE_CHARACTERS + 1):
        if len(line) > _MAX_LINE_CHARACTERS:
            raise TraceError(f"it has a line of more than {_MAX_LINE_CHARACTERS} characters")
        yield line


def _read_phone_csv(source: Path, phase: str | None) -> tuple[NDArray[np.int16], dict[str, Any]]:
    facts: dict[str, str] = {}
    expert_bytes: dict[int, int] = {}
    if source.stat().st_size > MAX_ARRAY_BYTES:
        raise TraceError(f"it has more than {MAX_ARRAY_BYTES >> 20} MiB: record a part, or write it as npz")
    with source.open(encoding="utf-8") as file:
        lines = _lines(file)
        for line in lines:
            if not line.startswith("#"):
                break
            pairs = dict(word.split("=", 1) for word in line[1:].split() if "=" in word)
            if {"layer", "expert_bytes"} <= pairs.keys():
                expert_bytes[int(pairs["layer"])] = int(pairs["expert_bytes"])
            else:
                facts.update(pairs)
        else:
            line = ""
        names = line.strip().split(",")
        wanted = ("turn", "phase", "step", "layer", "slot", "expert")
        absent = [name for name in (*wanted, "n_expert") if name not in names and name not in facts]
        if absent:
            raise TraceError(f"its header does not name {absent[0]!r}")
        columns = [names.index(name) for name in wanted]
        filled = (line for line in lines if line.strip())
        first = next(filled, None)
        if first is None:
            raise TraceError("it ends after its header")
        # The first row was taken to see that there is one: numpy warns of an empty file and returns an array of no
        # shape.
        body = itertools.chain((first,), filled)
        rows = np.loadtxt(body, delimiter=",", usecols=columns, dtype=np.int64, ndmin=2, comments=None)
    if phase is not None:
        rows = rows[rows[:, 1] == PHASES[phase]]
    if not len(rows):
        raise TraceError(f"it has no tokens of phase {phase!r}" if phase else "it has no tokens")

    # A step counts from 0 in every turn, so a token is a pair of turn and step.
    turns, _, steps, layers, slots, ids = rows.T
    tokens, token_of_row = np.unique(np.stack([turns, steps], axis=1), axis=0, return_inverse=True)
    layer_numbers, layer_of_row = np.unique(layers, return_inverse=True)
    shape = (len(layer_numbers), len(tokens), int(slots.max()) + 1)
    if slots.min() < 0 or math.prod(shape) != len(rows):
        raise TraceError(
            f"it has {len(rows)} rows; {shape[0]} layers, {shape[1]} tokens and slots {slots.min()} to {slots.max()} "
            f"need {math.prod(shape)}: a row is missing or there twice"
        )
    # numpy 2.0 alone returns this inverse with a second dimension.
    where = (layer_of_row.reshape(-1), token_of_row.reshape(-1), slots)
    times_LTK = np.zeros(shape, dtype=np.int64)
    # As many rows as places can still mean one place twice and another never.
    np.add.at(times_LTK, where, 1)
    if (times_LTK != 1).any():
        layer, token, slot = (int(i) for i in np.argwhere(times_LTK != 1)[0])
        turn, step = tokens[token]
        raise TraceError(
            f"turn {turn}, step {step}, layer {layer_numbers[layer]}, slot {slot} is there "
            f"{times_LTK[layer, token, slot]} times instead of once"
        )
    if ids.min() < 0 or ids.max() > np.iinfo(np.int16).max:
        raise TraceError(f"expert ids run from {ids.min()} to {ids.max()}, more than int16 holds")
    experts = np.zeros(shape, dtype=np.int16)
    experts[where] = ids
    meta: dict[str, Any] = {
        "num_experts": int(facts["n_expert"]),
        "document_starts": [0, *(np.flatnonzero(tokens[1:, 0] != tokens[:-1, 0]) + 1).tolist()],
    }
    if "model" in facts:
        meta["model"] = Path(facts["model"]).name
    phases = [name for name, code in PHASES.items() if (rows[:, 1] == code).any()]
    if len(phases) == 1:
        meta["phase"] = phases[0]
    # Sizes of some layers alone would be no use to whoever replays bytes.
    if expert_bytes.keys() >= set(layer_numbers.tolist()):
        meta["expert_bytes"] = [expert_bytes[layer] for layer in layer_numbers.tolist()]
    return experts, meta
