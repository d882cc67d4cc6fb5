"""What anybody may have written: JSON in bounded size, depth and numbers, and text that is safe to print.

A hub repository, a user's file or a client of the proxy may hold anything. Every JSON document of this package is read
here, so that each kind of damage is one error of our tree, with the file's name in it.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

from remoe_adapt.errors import ConfigError, RemoeError

# An index of a thousand shards with a million tensors has 100 MB.
MAX_JSON_BYTES = 256 << 20
# Python turns longer ones into numbers that no float and no int64 holds.
_MAX_DIGITS = 19
_SHOWN_CHARACTERS = 200


def read_json(path: Path, error: type[RemoeError] = ConfigError, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The JSON document in a file, as `parse_json`. An unreadable or too large file raises `error` too."""
    try:
        with path.open("rb") as file:
            # One byte more than allowed tells of a longer file, whatever its size claims to be.
            data = file.read(max_bytes + 1)
    except OSError as fault:
        raise error(f"{printable(path)} cannot be read: {fault.strerror or fault}.") from fault
    if len(data) > max_bytes:
        raise error(f"{printable(path)} has more than {max_bytes >> 20} MiB: no file of its kind is that large.")
    return parse_json(data, str(path), error)


def parse_json(data: str | bytes, where: str, error: type[RemoeError] = ConfigError) -> Any:
    """A JSON document.

    Raises `error`, whose message begins with `where`, for bytes that are not UTF-8, for text that is not JSON, nested
    too deeply, with a key twice in one object, with NaN or Infinity, or with an integer beyond 64 bits.
    """
    where = printable(where)
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer)
    # A few kilobytes of brackets are enough for it, so it is damage and not a fault of ours.
    except RecursionError:
        raise error(f"{where} is nested too deeply to be what it should be.") from None
    except ValueError as fault:  # JSONDecodeError and UnicodeDecodeError are ones
        raise error(f"{where} is not valid JSON: {printable(fault)}.") from fault


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    # Python keeps the last one without a word; a reader and a checker could then see different values.
    if len(found) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def first_line(error: BaseException) -> str:
    """What an error says, in one printable line; the name of its class where it says nothing."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])


def printable(value: object, most: int = _SHOWN_CHARACTERS) -> str:
    """Text of others for one line of a message: control characters (terminal escapes) as their codes, not endless.

    most: longer texts lose their middle.
    """
    text = str(value)
    if len(text) > most:
        text = f"{text[: most // 2]}...{text[-most // 2 :]}"
    # Cc: control characters; Cf: also those that turn the direction of writing.
    return "".join(c if unicodedata.category(c) not in ("Cc", "Cf", "Zl", "Zp", "Cs") else _code(c) for c in text)


def _code(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
