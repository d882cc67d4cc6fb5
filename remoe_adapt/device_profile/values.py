"""What a profile's keys may hold: readers from a YAML node to a value, and from a mapping to a dataclass.

A reader that finds a fault tells the source its line and key, and returns None; it goes on where it can, so that one
look tells all faults.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any

import yaml

from remoe_adapt.device_profile.nodes import Source, did_you_mean, is_list, is_map, shown
from remoe_adapt.errors import ConfigError

Reader = Callable[[Source, yaml.Node, str], Any]
_UNIT_BYTES = {"B": 1} | {f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")}
_UNIT_BYTES |= {f"{p}IB": 1024 ** (i + 1) for i, p in enumerate("KMGT")}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*((?:[KMGT]i?)?B)", re.IGNORECASE | re.ASCII)
# An exbibyte. No machine has that much, and sums of such sizes still fit into 64-bit counters.
_MOST_BYTES = 1 << 60


class ContradictionError(ConfigError):
    """Two keys of one section that cannot both hold; `key` is the one to change."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def parse_size(text: object) -> int:
    """Bytes in a size with a unit, as "5.5GiB", "512 MiB" or "8GB" (1000**3). Raises ConfigError without a unit, and
    above 1 EiB."""
    match = _SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        raise ConfigError(f"{shown(text)} is not a size; write a number and its unit, as 5.5GiB or 512MiB")
    size_bytes = float(match[1]) * _UNIT_BYTES[match[2].upper()]
    # Before it becomes a whole number: an infinite float cannot.
    if size_bytes > _MOST_BYTES:
        raise ConfigError(f"{shown(text)} is more than any machine has; write at most {_MOST_BYTES >> 40}TiB")
    return int(size_bytes)


def scalar(parse: Callable[[object], object]) -> Reader:
    """Reader of one value by a function that raises ConfigError."""

    def read(source: Source, node: yaml.Node, key: str) -> Any:
        try:
            return parse(source.plain(node))
        except ConfigError as error:
            return source.fail(node, key, str(error))

    return read


def _budget(value: object) -> int | None:
    size_bytes = None if value is None else parse_size(value)
    if size_bytes == 0:
        raise ConfigError("a budget of 0 bytes holds nothing; write a size above 0, or null for the whole machine")
    return size_bytes


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{shown(value)} is not a switch; write true or false")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{shown(value)} is not text; write at least one word, quoted if it looks like a number")
    return _checked(value.strip())


def _checked(value: str) -> str:
    if not all(char.isprintable() or char.isspace() for char in value):
        raise ConfigError(f"{shown(value)} holds characters that cannot be shown; leave them out")
    return value


size, budget, switch, text = scalar(parse_size), scalar(_budget), scalar(_switch), scalar(_text)


def number(low: float, high: float, *, open_low: bool = False) -> Reader:
    """Reader of a number in [low, high], or (low, high] with `open_low`."""
    wanted = f"a number {'above' if open_low else 'from'} {low:g} up to {high:g}"

    def parse(value: object) -> float:
        # To Python True is the number 1, so `max: true` would be taken without a word.
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise ConfigError(f"{shown(value)} is not a number; write {wanted}{_as_number(value)}")
        if not low <= value <= high or (open_low and value == low):
            raise ConfigError(f"{shown(value)} is out of range; write {wanted}")
        return float(value)

    return scalar(parse)


def _as_number(value: object) -> str:
    """How to write what only looks like a number: 1e3 without a point, or quoted digits, are text in YAML."""
    try:
        meant = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return ""
    return f", as {int(meant) if meant.is_integer() and abs(meant) < 1e15 else meant!r}" if math.isfinite(meant) else ""


def choice(allowed: Iterable[str]) -> Reader:
    """Reader of one of some words; allowed: they, as they are when a value is read."""

    def parse(value: object) -> str:
        if value not in (words := tuple(allowed)):
            raise ConfigError(f"{shown(value)} is not one of {', '.join(words)}{did_you_mean(value, words)}")
        return str(value)

    return scalar(parse)


def curve(source: Source, node: yaml.Node, key: str) -> Any:
    """Points (pressure, strength): pressures strictly rising, strengths never falling, all in [0, 1]."""
    if not is_list(node) or not node.value:
        return source.fail(node, key, f"{source.shown(node)} is not a curve; write pairs, as [[0.0, 0.0], [0.9, 1.0]]")
    unit = number(0, 1)
    points: list[tuple[float, float]] = []
    for point in node.value:
        if not is_list(point) or len(point.value) != 2:
            source.fail(point, key, f"{source.shown(point)} is no point of a curve; write pairs, as [0.9, 1.0]")
            continue
        pressure, strength = (unit(source, child, key) for child in point.value)
        if pressure is None or strength is None:
            continue
        # At equal pressures the strength would be two numbers at once.
        if points and pressure <= points[-1][0]:
            message = f"pressure {pressure!r} follows {points[-1][0]!r}; sort the points by rising pressure"
            source.fail(point.value[0], key, message)
        # A strength that falls under more pressure would give back memory when it is needed most.
        elif points and strength < points[-1][1]:
            message = f"strength falls from {points[-1][1]!r} to {strength!r}; it may only rise with pressure"
            source.fail(point.value[1], key, message)
        else:
            points.append((pressure, strength))
    return tuple(points)


def ramp(read: Reader) -> Reader:
    """Reader of null or [from, full]: where a sensor's pressure leaves 0, and where it reaches 1."""

    def read_pair(source: Source, node: yaml.Node, key: str) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null"):
            return None
        if not is_list(node) or len(node.value) != 2:
            message = f"{source.shown(node)} is not a range; write [from, full], or null to leave the sensor out"
            return source.fail(node, key, message)
        begin, full = (read(source, child, key) for child in node.value)
        if begin is None or full is None:
            return None
        if begin >= full:
            low, high = map(source.shown, node.value)
            message = f"from {low} is not below full {high}; pressure rises between the two"
            return source.fail(node.value[1], key, message)
        return begin, full

    return read_pair


def families(source: Source, node: yaml.Node, key: str) -> Any:
    """Base model id -> family: a hub id, or a path, in which `~` is the user's home and a folder beside the profile's
    file is found from anywhere. None: no family of this base."""
    if not is_map(node):
        message = f"{source.shown(node)} is not a map; write base model ids with a family path, hub id or null"
        return source.fail(node, key, message)
    found: dict[str, str | None] = {}
    for base, base_node, family_node in source.entries(node, f"{key}."):
        where = f"{key}.{base}"
        base_id = text(source, base_node, where)
        if base_id is not None:
            found[base_id] = _family(source, family_node, where)
    return found


def _family(source: Source, node: yaml.Node, key: str) -> Any:
    try:
        value = source.plain(node)
        if value is None:
            return None
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(f"{shown(value)} is no family; write a family path, hub id or null")
        family = _checked(value.strip())
        path = Path(family).expanduser() if family.startswith("~") else Path(family)
        # A profile travels with its family, so its own folder is asked before the hub.
        beside = source.path.parent.absolute() / path
        return str(beside) if path.is_absolute() or beside.exists() else family
    except ConfigError as error:
        return source.fail(node, key, str(error))
    except (OSError, RuntimeError) as error:  # too long for a path; a user who is not known
        why = getattr(error, "strerror", None) or error
        return source.fail(node, key, f"{shown(value)} can be no path ({why}); write a family path, hub id or null")


def key_of(key: str, read: Reader | type, **default: Any) -> Any:
    """A dataclass field filled from YAML key `key`: by a reader, or by a dataclass for a section."""
    return field(metadata={"key": key, "read": read}, **default)


def read_section(source: Source, node: yaml.Node, cls: type[Any], prefix: str = "", at: yaml.Node | None = None) -> Any:
    """The dataclass `cls`, whose fields are made by `key_of`, from a mapping; None where anything is wrong with it.

    at: the section's key, where what is missing is reported. A class with a method `understood` has its words
    translated: what that returns is read instead.
    """
    known: dict[str, Field[Any]] = {f.metadata["key"]: f for f in fields(cls)}
    if not is_map(node):
        return source.fail(node, prefix.rstrip("."), f"must hold keys ({', '.join(known)}), one per line or in braces")
    faults_before = len(source.problems)
    values: dict[str, Any] = {}
    key_nodes: dict[str, yaml.Node] = {}
    misspelt = ""
    for key, key_node, value_node in source.entries(node, prefix):
        if key not in known:
            close = did_you_mean(key, tuple(known))
            # A key that was meant by a misspelt one is not reported as missing as well.
            misspelt += close
            hint = close or f"; the keys here are {', '.join(known)}"
            source.fail(key_node, prefix + key, f"is not a key of a profile{hint}")
            continue
        read, key_nodes[key] = known[key].metadata["read"], key_node
        if isinstance(read, type):
            values[known[key].name] = read_section(source, value_node, read, f"{prefix}{key}.", key_node)
        else:
            values[known[key].name] = read(source, value_node, prefix + key)
    for key, spec in known.items():
        optional = spec.default is not MISSING or spec.default_factory is not MISSING
        if spec.name not in values and not optional and repr(key) not in misspelt:
            source.fail(at or node, prefix + key, "is missing; add it")
    if len(source.problems) > faults_before:
        return None
    try:
        section = cls(**values)
    # Each value was fine by itself; only the class knows which of them exclude each other.
    except ContradictionError as error:
        return source.fail(key_nodes.get(error.key, at or node), prefix + error.key, str(error))
    return section.understood() if hasattr(section, "understood") else section
