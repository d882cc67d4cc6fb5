"""Device profiles: one YAML file per device, read into frozen dataclasses.

Keys are strict: a key that is unknown, doubled or missing, or a value that cannot work, is a `Problem` with its line.
`check_profile` returns them all, `load_profile` raises `ProfileError` on the first. Shipped files are the package
`remoe_adapt.profiles`; a user's files in `$XDG_CONFIG_HOME/remoe/profiles` win over shipped ones of the same name.
"""

from __future__ import annotations

import difflib
import importlib.resources
import math
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from reprlib import Repr
from typing import Any

import yaml

from remoe_adapt.errors import ConfigError, ProfileError

CACHE_POLICIES = ("lru", "lfu", "lrfu")  # belady needs the future, so no device can run it
CACHE_SCOPES = ("global", "layer")
RECENCY_MODES = ("none", "last", "ema", "resident")
_UNIT_BYTES = {"B": 1} | {f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")}
_UNIT_BYTES |= {f"{p}IB": 1024 ** (i + 1) for i, p in enumerate("KMGT")}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B)", re.IGNORECASE)
# Nested YAML aliases grow exponentially when written out: messages show the outer levels only.
_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict = 2, 4, 2
_show = _SHORT.repr


def parse_size(text: object) -> int:
    """Bytes in a size with a unit, as "5.5GiB", "512 MiB" or "8GB" (1000**3). Raises ConfigError without a unit."""
    match = _SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        raise ConfigError(f"{_show(text)} is not a size; write a number and its unit, as 5.5GiB or 512MiB")
    return int(float(match[1]) * _UNIT_BYTES[match[2].upper()])


def _budget(value: object) -> int | None:
    size_bytes = None if value is None else parse_size(value)
    if size_bytes == 0:
        raise ConfigError("a budget of 0 bytes holds nothing; write a size above 0, or null for the whole machine")
    return size_bytes


def _number(low: float, high: float, *, open_low: bool = False) -> Callable[[object], float]:
    """Reader of a finite number in [low, high], or (low, high] with `open_low`."""
    wanted = f"a number {'above' if open_low else 'from'} {low:g}" + (f" up to {high:g}" if high < math.inf else "")

    def read(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{_show(value)} is not a number; write {wanted}")
        if not low <= value <= high or (open_low and value == low):
            raise ConfigError(f"{value!r} is out of range; write {wanted}")
        return float(value)

    return read


def _choice(*allowed: str) -> Callable[[object], str]:
    def read(value: object) -> str:
        if value not in allowed:
            raise ConfigError(f"{_show(value)} is not one of {', '.join(allowed)}{_did_you_mean(value, allowed)}")
        return str(value)

    return read


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{_show(value)} is not a switch; write true or false")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{_show(value)} is not text; write at least one word, quoted if it looks like a number")
    return value.strip()


def _curve(value: object) -> tuple[tuple[float, float], ...]:
    """Points (pressure, strength): pressures strictly rising, strengths never falling, all in [0, 1]."""
    if not isinstance(value, list) or not value or any(not isinstance(p, list) or len(p) != 2 for p in value):
        raise ConfigError(f"{_show(value)} is not a curve; write pairs, as [[0.0, 0.0], [0.9, 1.0]]")
    unit = _number(0, 1)
    points = tuple((unit(pressure), unit(strength)) for pressure, strength in value)
    for (pressure, strength), (next_pressure, next_strength) in pairwise(points):
        if next_pressure <= pressure:
            raise ConfigError(f"pressure {next_pressure!r} follows {pressure!r}; sort the points by rising pressure")
        if next_strength < strength:
            raise ConfigError(f"strength falls from {strength!r} to {next_strength!r}; it may only rise with pressure")
    return points


def _ramp(read: Callable[[object], float]) -> Callable[[object], tuple[float, float] | None]:
    """Reader of null or [from, full]: where a sensor's pressure leaves 0, and where it reaches 1."""

    def read_pair(value: object) -> tuple[float, float] | None:
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != 2:
            raise ConfigError(f"{_show(value)} is not a range; write [from, full], or null to leave the sensor out")
        begin, full = read(value[0]), read(value[1])
        if begin >= full:
            raise ConfigError(f"from {value[0]!r} is not below full {value[1]!r}; pressure rises between the two")
        return begin, full

    return read_pair


def _families(value: object) -> dict[str, str | None]:
    if not isinstance(value, dict):
        raise ConfigError(f"{_show(value)} is not a map; write base model ids with a family path, hub id or null")
    for base, family in value.items():
        if not isinstance(base, str) or not (family is None or isinstance(family, str)):
            raise ConfigError(f"{_show({base: family})} must map a model id to a family path, hub id or null")
    return value


def _key(key: str, read: Callable[[object], object] | type, **default: Any) -> Any:
    """A dataclass field filled from YAML key `key`: by a reader function, or by a dataclass for a section."""
    return field(metadata={"key": key, "read": read}, **default)


@dataclass(frozen=True, kw_only=True)
class MemoryProfile:
    """budget_bytes: what weights, expert cache and KV cache may take together (None: the machine's or cgroup's limit);
    reserve_bytes: what must stay free for everything else."""

    budget_bytes: int | None = _key("budget", _budget)
    reserve_bytes: int = _key("reserve", parse_size)


@dataclass(frozen=True, kw_only=True)
class ExpertCacheProfile:
    """share: part of all routed experts' bytes kept in fast memory, (0, 1], as far as memory.budget allows;
    scope: one budget for the whole model or one per layer; floor: the part of its budget that memory pressure never
    takes; regrow_s: calm after which it has its whole budget back, half of it waiting and half growing evenly.
    """

    share: float = _key("budget", _number(0, 1, open_low=True))
    policy: str = _key("policy", _choice(*CACHE_POLICIES), default="lrfu")
    scope: str = _key("scope", _choice(*CACHE_SCOPES), default="global")
    prefetch: bool = _key("prefetch", _switch, default=True)
    direct_io: bool = _key("direct_io", _switch, default=False)
    floor: float = _key("floor", _number(0, 1, open_low=True), default=0.1)
    regrow_s: float = _key("regrow_s", _number(0, math.inf), default=30.0)


@dataclass(frozen=True, kw_only=True)
class StrengthProfile:
    """curve: (pressure, strength) points, linear between them and constant outside; max: ceiling on strength."""

    curve: tuple[tuple[float, float], ...] = _key("curve", _curve)
    max: float = _key("max", _number(0, 1), default=1.0)


@dataclass(frozen=True, kw_only=True)
class ControllerProfile:
    """sample_hz: sensor readings per second; rise_s: how long pressure must last to count in full; fall_s: calm after
    which it counts no more, half of it waiting and half falling; dwell_s: least time between a swap and a fall of
    strength; deadband: changes of strength below it are ignored; max_swaps_per_s: limits rises too."""

    sample_hz: float = _key("sample_hz", _number(0, 1000, open_low=True), default=5.0)
    rise_s: float = _key("rise_s", _number(0, math.inf), default=0.5)
    fall_s: float = _key("fall_s", _number(0, math.inf), default=10.0)
    dwell_s: float = _key("dwell_s", _number(0, math.inf), default=2.0)
    deadband: float = _key("deadband", _number(0, 1), default=0.05)
    max_swaps_per_s: float = _key("max_swaps_per_s", _number(0, 1000, open_low=True), default=4.0)


_Ramp = tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class PressureProfile:
    """Where each sensor's pressure leaves 0 and where it reaches 1; None leaves it out. (Memory itself has
    `memory.reserve`.)

    cache_loss: part of its budget that the expert cache gave back; psi_memory, psi_io: share of the time in which tasks
    stalled (`full` stalls count double; a model that reads experts causes psi_io itself); faults: major faults per
    second; swap: bytes per second in and out; stall: share of the time in which tokens waited for experts.
    """

    cache_loss: _Ramp = _key("cache_loss", _ramp(_number(0, 1)), default=(0.05, 0.4))
    psi_memory: _Ramp = _key("psi_memory", _ramp(_number(0, 1)), default=(0.07, 0.5))
    psi_io: _Ramp = _key("psi_io", _ramp(_number(0, 1)), default=None)
    faults: _Ramp = _key("faults", _ramp(_number(0, math.inf)), default=(50.0, 1000.0))
    swap: _Ramp = _key("swap", _ramp(parse_size), default=(2.0**20, 2.0**25))
    stall: _Ramp = _key("stall", _ramp(_number(0, 1)), default=(0.9, 1.0))


@dataclass(frozen=True, kw_only=True)
class RecencyProfile:
    """The recency prior: mode "none", "last" (the previous token's experts), "ema" (used lately) or "resident" (cached
    now), and its gain at strength 1."""

    mode: str = _key("mode", _choice(*RECENCY_MODES), default="none")
    gain: float = _key("gain", _number(0, math.inf), default=0.0)

    def __post_init__(self) -> None:
        if self.mode == "none" and self.gain > 0:
            raise ConfigError(
                f"gain {self.gain!r} has no effect in mode 'none'; choose last, ema or resident, or set gain 0.0"
            )


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """What the runtime needs to know about a device; `families` maps base model ids to family paths or hub ids."""

    name: str = _key("name", _text)
    description: str = _key("description", _text)
    memory: MemoryProfile = _key("memory", MemoryProfile)
    expert_cache: ExpertCacheProfile = _key("expert_cache", ExpertCacheProfile)
    strength: StrengthProfile = _key("strength", StrengthProfile)
    controller: ControllerProfile = _key("controller", ControllerProfile, default=ControllerProfile())
    pressure: PressureProfile = _key("pressure", PressureProfile, default=PressureProfile())
    recency: RecencyProfile = _key("recency", RecencyProfile, default=RecencyProfile())
    families: Mapping[str, str | None] = _key("families", _families, default_factory=dict, hash=False)

    @property
    def settle_s(self) -> float:
        """Seconds of calm within which the cache is whole and the strength that of pressure 0, whatever was before.

        Strength that rose on the word of stalls alone is held longer, see `pressure.policy`.
        """
        controller = self.controller
        return self.expert_cache.regrow_s + controller.fall_s + controller.dwell_s + 5 / controller.sample_hz

    def strength_at(self, pressure: float) -> float:
        """Strength for a pressure in [0, 1]; linear between curve points, never above `strength.max`."""
        if not 0.0 <= pressure <= 1.0:  # NaN fails too
            raise ConfigError(f"pressure {pressure!r} is out of range; pressure runs from 0 (plenty) to 1 (thrashing)")
        curve = self.strength.curve
        after = bisect_right(curve, pressure, key=lambda point: point[0])
        if after == 0 or after == len(curve):
            strength = curve[max(after - 1, 0)][1]
        else:
            (p0, s0), (p1, s1) = curve[after - 1], curve[after]
            strength = s0 + (s1 - s0) * (pressure - p0) / (p1 - p0)
        return min(strength, self.strength.max)


@dataclass(frozen=True)
class Problem:
    """A fault of a profile file; `line` counts from 1, `key` is dotted, as "strength.curve" ("" for the whole file)."""

    path: Path
    line: int
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: " + (f"{self.key}: " if self.key else "") + self.message


def _did_you_mean(value: object, allowed: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(value, allowed, n=1) if isinstance(value, str) else []
    return f"; did you mean {close[0]!r}?" if close else ""


class _Reader:
    """Reads one file; collects problems instead of stopping at the first. Only yaml.SafeLoader builds values."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[Problem] = []

    def read(self) -> DeviceProfile | None:
        try:
            self.loader = yaml.SafeLoader(self.path.read_text(encoding="utf-8"))
            root = self.loader.get_single_node()
        except OSError as error:
            self._fail(1, "", f"cannot be read ({error.strerror}); give the path of a profile's YAML file")
            return None
        except UnicodeDecodeError as error:
            self._fail(1, "", f"is not UTF-8 text ({error.reason} at byte {error.start}); is this a YAML file?")
            return None
        except yaml.YAMLError as error:
            self._fail(_error_line(error), "", f"is not valid YAML ({_error_text(error)})")
            return None
        if root is None:
            self._fail(1, "", "is empty; copy a shipped profile (`remoe profiles show orin-8gb`) and edit it")
            return None
        profile: DeviceProfile | None = self._section(root, DeviceProfile, "")
        if profile is not None and profile.name != self.path.stem:
            line = next(k.start_mark.line + 1 for k, _ in root.value if k.value == "name")
            self._fail(line, "name", f"{profile.name!r} is not the file's name; call the file {profile.name}.yaml")
        return None if self.problems else profile

    def _fail(self, line: int, key: str, message: str) -> None:
        self.problems.append(Problem(self.path, line, key, message))

    def _section(self, node: yaml.Node, cls: type[Any], prefix: str) -> Any:
        """The dataclass `cls` from a YAML mapping, or None after reporting what is wrong with it."""
        line, faults_before = node.start_mark.line + 1, len(self.problems)
        known: dict[str, Field[Any]] = {f.metadata["key"]: f for f in fields(cls)}
        if not isinstance(node, yaml.MappingNode):
            return self._fail(
                line, prefix.rstrip("."), f"must hold keys ({', '.join(known)}), one per line or in braces"
            )
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, key_line = str(key_node.value), key_node.start_mark.line + 1
            if key not in known:
                hint = _did_you_mean(key, tuple(known)) or f"; the keys here are {', '.join(known)}"
                self._fail(key_line, prefix + key[:40], f"is not a key of a profile{hint}")
            elif known[key].name in values:
                self._fail(key_line, prefix + key, "appears twice; keep one")
            else:
                values[known[key].name] = self._value(value_node, known[key].metadata["read"], prefix + key)
        for key, spec in known.items():
            if spec.name not in values and spec.default is MISSING and spec.default_factory is MISSING:
                self._fail(line, prefix + key, "is missing; add it")
        if len(self.problems) > faults_before:
            return None
        try:
            return cls(**values)
        except ConfigError as error:  # keys that contradict each other
            return self._fail(line, prefix.rstrip("."), str(error))

    def _value(self, node: yaml.Node, read: Any, key: str) -> Any:
        if isinstance(read, type):
            return self._section(node, read, key + ".")
        try:
            return read(self.loader.construct_object(node, deep=True))
        except ConfigError as error:
            return self._fail(node.start_mark.line + 1, key, str(error))
        except (yaml.YAMLError, ValueError, TypeError) as error:  # a foreign tag, an impossible date, an unhashable key
            return self._fail(node.start_mark.line + 1, key, f"is not a plain YAML value ({_error_text(error)})")


def _error_line(error: yaml.YAMLError) -> int:
    mark = getattr(error, "problem_mark", None)
    return 1 if mark is None else int(mark.line) + 1


def _error_text(error: Exception) -> str:
    return str(getattr(error, "problem", None) or error).splitlines()[0]


def check_profile(path: str | Path) -> list[Problem]:
    """All problems of a profile file, in file order; empty when it can be used."""
    reader = _Reader(Path(path))
    reader.read()
    return sorted(reader.problems, key=lambda problem: problem.line)


def user_profile_dir() -> Path:
    """`$XDG_CONFIG_HOME/remoe/profiles`; below ~/.config where that is unset, or relative (invalid by its rules)."""
    configured = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    return (configured if configured.is_absolute() else Path.home() / ".config") / "remoe" / "profiles"


def list_profiles() -> dict[str, Path]:
    """Name -> file of every profile found, sorted by name; files are not opened, a user's file hides a shipped one."""
    shipped = Path(str(importlib.resources.files("remoe_adapt.profiles")))
    found = {path.stem: path for folder in (shipped, user_profile_dir()) for path in folder.glob("*.yaml")}
    return dict(sorted(found.items()))


def load_profile(name_or_path: str | Path) -> DeviceProfile:
    """The profile of a known name, or of a YAML file. Raises ProfileError naming file, line, key and the remedy."""
    known = list_profiles()
    text = str(name_or_path)
    if text in known and not isinstance(name_or_path, Path):
        path = known[text]
    elif Path(text).suffix in (".yaml", ".yml") or len(Path(text).parts) > 1:
        path = Path(text).expanduser()
    else:
        hint = _did_you_mean(text, tuple(known)) or f"; known are {', '.join(known)}"
        raise ProfileError(f"no profile named {text!r}{hint} (or give the path of a .yaml file)")
    reader = _Reader(path)
    profile = reader.read()
    if profile is None:
        first, *others = sorted(reader.problems, key=lambda problem: problem.line)
        more = f" (and {len(others)} more: `remoe profiles check {path}`)" if others else ""
        raise ProfileError(f"{first}{more}")
    return profile
