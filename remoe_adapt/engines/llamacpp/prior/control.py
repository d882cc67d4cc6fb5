"""The control file of a preloaded server: commands in, its status and a log of the gains of every sequence out.

The layout is that of preload.c. Each side writes its own part with one call, and all parts but the head carry a check
sum, so what is read torn is read again, and what was written torn never counts. A command goes in turn into one of two
places, of which the server takes the valid one with the higher serial.
"""

from __future__ import annotations

import os
import stat
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remoe_adapt._support import printable
from remoe_adapt.errors import ConfigError, ServerError
from remoe_adapt.recency_settings import Recency

MAGIC, VERSION = b"REMOEPR1", 3
# Numbers of the modes in prior.h.
MODES = {"ema": 0, "last": 1, "resident": 2, "cost": 3}
MAX_LAYERS, RING = 512, 1024
_HEAD = struct.Struct("<8sII")
_COMMAND = struct.Struct(f"<QffIIIIQdd{MAX_LAYERS}f")
_STATUS = struct.Struct("<4Q2If5I23Q256s")
_EVENT = struct.Struct("<2Q4ifIQ2I")
_CHECK = struct.Struct("<Q")
_AT_COMMANDS, _AT_STATUS, _AT_RING, _COMMAND_STEP, _EVENT_BYTES = 4096, 12288, 16384, 4096, 64
FILE_BYTES = _AT_RING + RING * _EVENT_BYTES
AHEAD = (
    "ahead_hits", "ahead_misses", "ahead_stale", "ahead_spilled", "ahead_dropped", "ahead_bytes", "ahead_failed",
    "ahead_ns",
)  # fmt: skip
_COUNTERS = (
    "tokens", "calls", "changed_rows", "kept", "chosen", "swapped", "ns", "mincore_ns", "restarts", "rewinds",
    "refused_rows", "lost_rows", "unproven_rows", "batches", *AHEAD, "held_bytes",
)  # fmt: skip
# Why none are read ahead.
NO_FILE = "no experts lie in a file that is mapped to be read alone: they were copied, rearranged, or are on a GPU"
_AHEAD = {0: "off", 1: "on", 2: "no file"}
_KINDS = {1: "begin", 2: "gain", 3: "restart"}
_WAITING, _ON, _OFF = 0, 1, 100
# A writer is done within microseconds, so a sum that is still wrong after this is a broken file.
_TRIES, _PAUSE_S = 20, 0.002
_MASK = (1 << 64) - 1
ENVIRONMENT = "REMOE_PRIOR_CONTROL"


@dataclass(frozen=True, slots=True)
class PreloadStatus:
    """What a preloaded server says of itself.

    pid: of the process; 0: none has come yet.
    state: "none" (no server yet), "waiting" (for its first whole graph), "on" or "off".
    reason: why it is off.
    gain, mode: in force at its last batch of tokens; serial: of the command that set them.
    is_blind: the residency of the model's pages cannot be seen, so that mode resident does nothing.
    ahead: whether missing experts are read ahead: "off", "on", or "no file" where none lie in a mapped file.
    layers: with experts.
    counters: since the process began, but held_bytes, of experts that are held now; ns and mincore_ns are nanoseconds
        of the callback, ahead_ns of reading ahead.
    """

    pid: int
    state: str
    reason: str
    gain: float
    mode: str
    serial: int
    is_blind: bool
    ahead: str
    layers: int
    written: int
    counters: dict[str, int]

    @property
    def reuse(self) -> float | None:
        """Share of chosen experts that the previous token of the sequence used as well; None before there were any."""
        return self.counters["kept"] / self.counters["chosen"] if self.counters["chosen"] else None


@dataclass(frozen=True, slots=True)
class GainEvent:
    """From position `position` of a sequence on, tokens are computed at `gain`.

    kind: "begin" of a text or of its continuation, "gain" that was turned in its midst, or "restart": the recency of
    the sequence could not be followed and began anew (its position is -1).
    """

    number: int
    time_s: float
    pid: int
    context: int
    sequence: int
    position: int
    gain: float
    kind: str


class PriorControl:
    """One control file, open for both directions; close it, or use `with`. Any number of them may be open on a file,
    one of which should command.

    Raises ConfigError when `path` is no control file of this version, or cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise ConfigError(
                f"{printable(self.path)} cannot be opened ({error.strerror}): give the file that the server has in "
                f"{ENVIRONMENT}."
            ) from error
        try:
            self._check()
            self.serial = max((command[0] for command in self._commands() if command), default=0)
        except BaseException:
            os.close(self._fd)
            raise
        self._closed = False

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> PriorControl:
        """A new file, for its owner alone. Raises ConfigError where there is something already, or it cannot be."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"{printable(path)} cannot be made ({error.strerror}): name another place.") from error
        try:
            os.ftruncate(fd, FILE_BYTES)
            os.pwrite(fd, _HEAD.pack(MAGIC, VERSION, FILE_BYTES), 0)
        finally:
            os.close(fd)
        return cls(path)

    def __enter__(self) -> PriorControl:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            os.close(self._fd)

    def command(
        self, recency: Recency, *, scale: float = 1.0, pages: int = 1, look_every: int = 1, budget_bytes: int = 0,
        budget_share: float = 0.0,
    ) -> int:  # fmt: skip
        """Have the server compute with these gains from its next batch of tokens on. Returns the command's serial.

        recency: mode, decay, share and gain; a gain for each layer is a factor of layer number i of the file.
        scale: all gains times this.
        pages: how many of each expert's pages are looked at in mode resident; 0 all.
        look_every: residency is read anew every so many batches.
        budget_bytes: of experts that are to stay in memory, missing ones being read ahead; 0: neither.
        budget_share: of all experts' bytes, in place of budget_bytes where it is above 0.

        Raises ServerError when the file cannot be written.
        """
        listed = recency.gains()
        gain, factors = (scale, listed) if isinstance(recency.gain, tuple) else (scale * listed[0], ())
        if len(factors) > MAX_LAYERS:
            raise ConfigError(f"{len(factors)} recency gains: a server can be told those of {MAX_LAYERS} layers.")
        self.serial += 1
        body = _COMMAND.pack(
            self.serial, gain, budget_share, MODES[recency.mode], pages, look_every, len(factors),
            budget_bytes, recency.decay, recency.share, *factors, *(0.0,) * (MAX_LAYERS - len(factors)),
        )  # fmt: skip
        self._write(body + _CHECK.pack(check_of(body)), _AT_COMMANDS + self.serial % 2 * _COMMAND_STEP)
        return self.serial

    def status(self) -> PreloadStatus:
        """Raises ServerError when the file was damaged or cut short."""
        for _ in range(_TRIES):
            data = self._read(_STATUS.size + _CHECK.size, _AT_STATUS)
            if not any(data):
                return PreloadStatus(0, "none", "", 0.0, "ema", 0, False, "off", 0, 0, dict.fromkeys(_COUNTERS, 0))
            if _sound(data):
                return _status(_STATUS.unpack(data[: _STATUS.size]))
            time.sleep(_PAUSE_S)
        raise ServerError(f"{self.path} holds no status of a server: something else writes there; start both anew.")

    def events(self, after: int = 0) -> list[GainEvent]:
        """Those behind number `after` that are still in the log, which holds the last RING. Raises as `status`."""
        newest = self.status().written
        found = []
        for number in range(max(after, newest - RING) + 1, newest + 1):
            data = self._read(_EVENT_BYTES, _AT_RING + (number - 1) % RING * _EVENT_BYTES)
            values = _EVENT.unpack(data[: _EVENT.size])
            if not _sound(data) or values[0] != number:
                continue  # overwritten just now
            _, time_ns, context, sequence, position, _, gain, kind, _, pid, _ = values
            found.append(
                GainEvent(number, time_ns / 1e9, pid, context, sequence, position, gain, _KINDS.get(kind, str(kind)))
            )
        return found

    def gain(self) -> float:
        """Of the newest command; 0 without one."""
        commands = [command for command in self._commands() if command]
        return max(commands)[1] if commands else 0.0

    def _commands(self) -> list[tuple[int, float] | None]:
        """(serial, gain) of each of the two places; None where there is no valid one."""
        found: list[tuple[int, float] | None] = []
        for place in range(2):
            data = self._read(_COMMAND.size + _CHECK.size, _AT_COMMANDS + place * _COMMAND_STEP)
            values = _COMMAND.unpack(data[: _COMMAND.size])
            found.append((values[0], values[1]) if _sound(data) and values[0] else None)
        return found

    def _check(self) -> None:
        facts = os.fstat(self._fd)
        head = os.pread(self._fd, _HEAD.size, 0)
        what = ""
        if not stat.S_ISREG(facts.st_mode):
            what = "is no regular file"
        elif len(head) < _HEAD.size or head[:8] != MAGIC:
            what = "is no control file of remoe"
        elif _HEAD.unpack(head)[1:] != (VERSION, FILE_BYTES):
            what = "is a control file of another version of remoe"
        elif facts.st_size < FILE_BYTES:
            what = "is cut short"
        if what:
            raise ConfigError(
                f"{printable(self.path)} {what}: give the file that the server has in {ENVIRONMENT}, or remove it and "
                "start the server anew."
            )

    def _read(self, size_bytes: int, at: int) -> bytes:
        try:
            data = os.pread(self._fd, size_bytes, at)
        except OSError as error:
            raise ServerError(f"{self.path} cannot be read ({error.strerror}): start the server anew.") from error
        if len(data) < size_bytes:
            raise ServerError(f"{self.path} was cut short: start the server anew.")
        return data

    def _write(self, data: bytes, at: int) -> None:
        try:
            written = os.pwrite(self._fd, data, at)
        except OSError as error:
            raise ServerError(f"{self.path} cannot be written ({error.strerror}): the gain stays.") from error
        if written != len(data):
            raise ServerError(f"{self.path} could not be written whole (is the disk full?): the gain stays.")


def control_of(pid: int) -> Path:
    """The control file of a running process, from its environment.

    Raises ConfigError when it was started without one, or is another user's.
    """
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        folder = Path(f"/proc/{pid}/cwd").readlink()
    except OSError as error:
        raise ConfigError(
            f"the environment of process {pid} cannot be read ({error.strerror}): name --control."
        ) from error
    given = dict(entry.split(b"=", 1) for entry in entries if b"=" in entry)
    path = given.get(ENVIRONMENT.encode())
    if not path:
        raise ConfigError(
            f"process {pid} was started without {ENVIRONMENT}, so no prior is in it: start it with `remoe serve`, or "
            "with LD_PRELOAD of our library."
        )
    return folder / os.fsdecode(path)


def check_of(data: bytes) -> int:
    """The sum of preload.c: FNV-1a over 64-bit words, with a shift so that high bits come down."""
    total = 14695981039346656037
    words = len(data) // 8
    for word in struct.unpack_from(f"<{words}Q", data):
        total = (total ^ word) * 1099511628211 & _MASK
        total ^= total >> 29
    for byte in data[8 * words :]:
        total = (total ^ byte) * 1099511628211 & _MASK
    return total


def _sound(data: bytes) -> bool:
    (stated,) = _CHECK.unpack(data[-_CHECK.size :])
    return check_of(data[: -_CHECK.size]) == int(stated)


def _status(values: Sequence[Any]) -> PreloadStatus:
    serial, _, _, written, pid, state, gain, mode, _, is_blind, layers, ahead = values[:12]
    name = {_WAITING: "waiting", _ON: "on", _OFF: "off"}.get(state, "off")
    modes = {number: word for word, number in MODES.items()}
    reason = ""
    with suppress(UnicodeDecodeError):
        reason = values[-1].split(b"\0")[0].decode()
    return PreloadStatus(
        pid, name, reason, gain, modes.get(mode, str(mode)), serial, bool(is_blind), _AHEAD.get(ahead, str(ahead)),
        layers, written,
        dict(zip(_COUNTERS, values[12:-1], strict=True)),
    )  # fmt: skip
