"""Device profiles: one YAML file per device, read into frozen dataclasses.

Keys are strict: a key that is unknown, doubled or missing, or a value that cannot work, is a `Problem` with its line.
`check_profile` returns them all, `load_profile` raises `ProfileError` on the first. Shipped files are the package
`remoe_adapt.profiles`; a user's files in `$XDG_CONFIG_HOME/remoe/profiles` win over shipped ones of the same name.
"""

from __future__ import annotations

import importlib.resources
import os
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from remoe_adapt._support import printable
from remoe_adapt.device_profile import values as of
from remoe_adapt.device_profile.nodes import Problem, Source, did_you_mean, is_map, shown
from remoe_adapt.device_profile.values import ContradictionError, key_of, read_section
from remoe_adapt.errors import ConfigError, ProfileError
from remoe_adapt.eviction import ONLINE
from remoe_adapt.recency_settings import MAX_GAIN, MODES, NO_PRIOR, Recency, mode_words, share_words

CACHE_SCOPES = ("global", "layer")
# The longest wait that a profile may ask for. A dial that waits longer would never move, and a clock in floats still
# tells milliseconds at this length.
_DAY_S = 86400.0
_LONGEST_RISE_S = 600.0
# The policy keeps the samples of four times rise_s and sorts them at each new one, so a long rise at a high rate would
# take the machine's time from the model.
_MOST_RISE_SAMPLES = 1000
_RATIO = of.number(0, 1)
_PART = of.number(0, 1, open_low=True)


@dataclass(frozen=True, kw_only=True)
class MemoryProfile:
    """budget_bytes: what weights, expert cache and KV cache may take together (None: the machine's or cgroup's limit);
    reserve_bytes: what must stay free for everything else."""

    budget_bytes: int | None = key_of("budget", of.budget)
    reserve_bytes: int = key_of("reserve", of.size)


@dataclass(frozen=True, kw_only=True)
class ExpertCacheProfile:
    """share: part of all routed experts' bytes kept in fast memory, (0, 1], as far as memory.budget allows;
    scope: one budget for the whole model or one per layer; floor: the part of its budget that memory pressure never
    takes; regrow_s: calm after which it has its whole budget back, half of it waiting and half growing evenly.
    """

    share: float = key_of("budget", _PART)
    policy: str = key_of("policy", of.choice(ONLINE), default="lrfu")
    scope: str = key_of("scope", of.choice(CACHE_SCOPES), default="global")
    prefetch: bool = key_of("prefetch", of.switch, default=True)
    direct_io: bool = key_of("direct_io", of.switch, default=False)
    floor: float = key_of("floor", _PART, default=0.1)
    regrow_s: float = key_of("regrow_s", of.number(0, _DAY_S), default=30.0)


@dataclass(frozen=True, kw_only=True)
class StrengthProfile:
    """curve: (pressure, strength) points, linear between them and constant outside; max: ceiling on strength."""

    curve: tuple[tuple[float, float], ...] = key_of("curve", of.curve)
    max: float = key_of("max", _RATIO, default=1.0)


@dataclass(frozen=True, kw_only=True)
class ControllerProfile:
    """sample_hz: sensor readings per second; rise_s: how long pressure must last to count in full; fall_s: calm after
    which it counts no more, half of it waiting and half falling; dwell_s: least time between a swap and a fall of
    strength; deadband: changes of strength below it are ignored; max_swaps_per_s: limits rises too."""

    sample_hz: float = key_of("sample_hz", of.number(0.01, 1000), default=5.0)
    rise_s: float = key_of("rise_s", of.number(0, _LONGEST_RISE_S), default=0.5)
    fall_s: float = key_of("fall_s", of.number(0, _DAY_S), default=10.0)
    dwell_s: float = key_of("dwell_s", of.number(0, _DAY_S), default=2.0)
    deadband: float = key_of("deadband", _RATIO, default=0.05)
    max_swaps_per_s: float = key_of("max_swaps_per_s", of.number(0.001, 1000), default=4.0)

    def __post_init__(self) -> None:
        if self.rise_s * self.sample_hz > _MOST_RISE_SAMPLES:
            raise ContradictionError(
                "rise_s",
                f"{self.rise_s:g} s are {self.rise_s * self.sample_hz:.0f} samples at sample_hz {self.sample_hz:g}; "
                f"{_MOST_RISE_SAMPLES} are the most, so lower one of the two",
            )


_Ramp = tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class PressureProfile:
    """Where each sensor's pressure leaves 0 and where it reaches 1; None leaves it out. (Memory itself has
    `memory.reserve`.)

    cache_loss: part of its budget that the expert cache gave back; psi_memory, psi_io: share of the time in which tasks
    stalled (`full` stalls count double; a model that reads experts causes psi_io itself); faults: major faults per
    second; swap: bytes per second in and out; stall: share of the time in which tokens waited for experts.
    """

    cache_loss: _Ramp = key_of("cache_loss", of.ramp(_RATIO), default=(0.05, 0.4))
    psi_memory: _Ramp = key_of("psi_memory", of.ramp(_RATIO), default=(0.07, 0.5))
    psi_io: _Ramp = key_of("psi_io", of.ramp(_RATIO), default=None)
    faults: _Ramp = key_of("faults", of.ramp(of.number(0, 1e9)), default=(50.0, 1000.0))
    swap: _Ramp = key_of("swap", of.ramp(of.size), default=(2.0**20, 2.0**25))
    stall: _Ramp = key_of("stall", of.ramp(_RATIO), default=(0.9, 1.0))


def _mode(source: Source, node: yaml.Node, key: str) -> Any:
    return of.choice(mode_words())(source, node, key)  # asked at each reading, as a mode may have been added


@dataclass(frozen=True, kw_only=True)
class _RecencyKeys:
    """The keys of section `recency` as a file has them, where the mode "none" stands for no prior."""

    mode: str = key_of("mode", _mode, default=NO_PRIOR)
    gain: float = key_of("gain", of.number(0, MAX_GAIN), default=0.0)
    share: float | None = key_of("share", of.number(0, 1, open_low=True), default=None)

    def __post_init__(self) -> None:
        if self.mode == NO_PRIOR and self.gain > 0:
            raise ContradictionError(
                "gain",
                f"gain {self.gain!r} has no effect in mode {NO_PRIOR!r}; choose {', '.join(MODES)}, or set gain 0.0",
            )
        if self.share is not None and not (self.mode in MODES and MODES[self.mode].default_share):
            raise ContradictionError(
                "share", f"share {self.share!r} has no effect in mode {self.mode!r}; it is of {share_words()}"
            )

    def understood(self) -> Recency | None:
        """What the section means (`read_section` asks)."""
        return None if self.mode == NO_PRIOR else Recency.of(self.mode, self.gain, share=self.share)


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """What the runtime needs to know about a device; `families` maps base model ids to family paths or hub ids.

    recency: the prior of the device, with its gain at strength 1; None: no prior.
    """

    name: str = key_of("name", of.text)
    description: str = key_of("description", of.text)
    memory: MemoryProfile = key_of("memory", MemoryProfile)
    expert_cache: ExpertCacheProfile = key_of("expert_cache", ExpertCacheProfile)
    strength: StrengthProfile = key_of("strength", StrengthProfile)
    controller: ControllerProfile = key_of("controller", ControllerProfile, default=ControllerProfile())
    pressure: PressureProfile = key_of("pressure", PressureProfile, default=PressureProfile())
    recency: Recency | None = key_of("recency", _RecencyKeys, default=None)
    families: Mapping[str, str | None] = key_of("families", of.families, default_factory=dict, hash=False)

    def as_keys(self) -> dict[str, Any]:
        """Everything in plain values, with the section `recency` as in a file."""
        keys: dict[str, Any] = {"mode": NO_PRIOR, "gain": 0.0}
        if self.recency is not None:
            share = {"share": self.recency.share} if self.recency.takes_share else {}
            keys = {"mode": self.recency.mode, "gain": self.recency.gain, **share}
        return asdict(self) | {"recency": keys}

    @property
    def recovery_s(self) -> float:
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
        # The number of points at or below this pressure, which is also the place of the next one.
        after = bisect_right(curve, pressure, key=lambda point: point[0])
        if after == 0 or after == len(curve):
            strength = curve[max(after - 1, 0)][1]
        else:
            (p0, s0), (p1, s1) = curve[after - 1], curve[after]
            strength = s0 + (s1 - s0) * (pressure - p0) / (p1 - p0)
        return min(strength, self.strength.max)


def read_profile(path: str | Path) -> tuple[DeviceProfile | None, list[Problem]]:
    """The profile of a file and its problems, in file order; None where there is one."""
    source = Source(Path(path))
    root = source.root()
    if root is None:
        return None, source.problems
    profile: DeviceProfile | None = read_section(source, root, DeviceProfile)
    if is_map(root) and not any(problem.key == "name" for problem in source.problems):
        for node in [value for key, value in root.value if key.value == "name"]:  # none where it is misspelt
            name = node.value.strip()
            if name != source.path.stem:
                source.fail(node, "name", f"{shown(name)} is not the file's name; call the file {printable(name)}.yaml")
    problems = sorted(source.problems, key=lambda problem: problem.line)
    return (None if problems else profile), problems


def check_profile(path: str | Path) -> list[Problem]:
    """All problems of a profile file, in file order; empty when it can be used."""
    return read_profile(path)[1]


def user_profile_dir() -> Path:
    """`$XDG_CONFIG_HOME/remoe/profiles`; below ~/.config where that is unset, or relative (invalid by its rules)."""
    configured = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    try:
        home = Path.home()
    except RuntimeError:  # a user without one, as many in containers
        home = Path("/nonexistent")
    # The XDG rules say that a relative XDG_CONFIG_HOME is to be ignored.
    return (configured if configured.is_absolute() else home / ".config") / "remoe" / "profiles"


def list_profiles() -> dict[str, Path]:
    """Name -> file of every profile found, sorted by name; files are not opened, a user's file hides a shipped one."""
    shipped = Path(str(importlib.resources.files("remoe_adapt.profiles")))
    # Later entries win, so a user's file hides a shipped one of the same name.
    found = {path.stem: path for folder in (shipped, user_profile_dir()) for path in folder.glob("*.yaml")}
    return dict(sorted(found.items()))


def load_profile(name_or_path: str | Path) -> DeviceProfile:
    """The profile of a known name, or of a YAML file. Raises ProfileError naming file, line, key and the remedy."""
    known = list_profiles()
    text = str(name_or_path)
    # A Path is a path, also where its name is that of a profile.
    if text in known and not isinstance(name_or_path, Path):
        path = known[text]
    elif Path(text).suffix in (".yaml", ".yml") or len(Path(text).parts) > 1:
        path = Path(text)
    else:
        hint = did_you_mean(text, tuple(known)) or f"; known are {', '.join(known)}"
        raise ProfileError(f"no profile named {text!r}{hint} (or give the path of a .yaml file)")
    profile, problems = read_profile(path)
    if profile is None:
        first, *others = problems
        more = f" (and {len(others)} more: `remoe profiles check {path}`)" if others else ""
        raise ProfileError(f"{first}{more}")
    return profile
