"""YAML of a profile as nodes that know their lines. Values are built one at a time, by `yaml.SafeLoader` alone.

A profile has about sixty values on three levels. Whatever is a multiple of that (nesting, aliases that grow when
written out, size) is refused while it is read, before anything is built of it.
"""

from __future__ import annotations

import difflib
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import Repr
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.reader import ReaderError

from remoe_adapt._support import printable
from remoe_adapt.errors import ConfigError

# A shipped profile has 1 KiB and about 60 values; a file beyond these bounds was made to use up memory or time.
_MOST_FILE_BYTES, _MOST_NODES, _MOST_LEVELS, _MOST_DIGITS = 1 << 18, 10_000, 20, 64
# Three more characters break lines in YAML 1.1, but not in editors: they become spaces, so that a fault's line number
# is the one that the user's editor shows.
_ONE_BREAK = {ord("\r"): "\n"} | dict.fromkeys((0x85, 0x2028, 0x2029), " ")
_TAG = "tag:yaml.org,2002:"
# YAML 1.1 reads 010 as 8, 1:30 as 90 and 1_0 as 10, which nobody who writes a profile means; such numbers are refused.
_DECIMAL = re.compile(r"[-+]?(0|[1-9]\d*)?(\.\d*)?(e[-+]?\d+)?|[-+]?\.(inf|nan)", re.IGNORECASE | re.ASCII)
# SafeLoader's constructors raise these for a foreign tag, an impossible date, `!!bool maybe` and `!!int ''`.
_UNBUILT = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
# Repr takes its limits as arguments since Python 3.12 only.
_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict = 2, 4, 2


@dataclass(frozen=True)
class Problem:
    """A fault of a profile file; `line` counts from 1, `key` is dotted, as "strength.curve" ("" for the whole file)."""

    path: Path
    line: int
    key: str
    message: str

    def __str__(self) -> str:
        return f"{printable(str(self.path), 4096)}:{self.line}: " + (f"{self.key}: " if self.key else "") + self.message


def shown(value: object) -> str:
    """A value, short enough for a message."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return "a number of very many digits"


def did_you_mean(value: object, allowed: Sequence[str]) -> str:
    """ "; did you mean 'x'?" where one of `allowed` is close, else ""."""
    close = difflib.get_close_matches(value, allowed, n=1) if isinstance(value, str) else []
    return f"; did you mean {close[0]!r}?" if close else ""


def line_of(node: yaml.Node) -> int:
    """Where a node begins, from 1; what an alias stands for begins at the alias."""
    return int(node.start_mark.line) + 1


def is_map(node: yaml.Node) -> bool:
    """Keys and values, without a tag that makes something else of them."""
    return isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map"


def is_list(node: yaml.Node) -> bool:
    """Values in order, without a tag that makes something else of them."""
    return isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq"


class Source:
    """One file: its nodes, and the faults found in them. Faults are collected, so that all can be told at once."""

    def __init__(self, path: Path) -> None:
        try:
            self.path = path.expanduser()
        except RuntimeError:  # no such user: there will be no such file either
            self.path = path
        self.problems: list[Problem] = []
        self._loader = _Loader("")

    def root(self) -> Any:
        """The file's one document, a node; None, and a problem, where there is none that can be used."""
        try:
            if not stat.S_ISREG(self.path.stat().st_mode) and not self.path.is_dir():  # a pipe would be waited for
                return self._fail(1, "", "is not a regular file; give the path of a profile's YAML file")
            with self.path.open("rb") as file:
                data = file.read(_MOST_FILE_BYTES + 1)
        except (OSError, ValueError) as error:  # ValueError: a path with a null byte
            why = getattr(error, "strerror", None) or error
            return self._fail(1, "", f"cannot be read ({why}); give the path of a profile's YAML file")
        if len(data) > _MOST_FILE_BYTES:
            return self._fail(1, "", f"is larger than {_MOST_FILE_BYTES >> 10} KiB; is this a profile?")
        try:
            # Windows line ends become one break each, so that lines are those that an editor shows.
            text = data.decode("utf-8").replace("\r\n", "\n").translate(_ONE_BREAK)
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            return self._fail(line, "", f"is not UTF-8 text ({error.reason}, byte {error.start}); save YAML as UTF-8")
        try:
            self._loader = _Loader(text)
            node = self._loader.get_single_node()
        except ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            what = f"holds the character {ord(text[error.position]):#x}, which YAML text cannot hold; save it as UTF-8"
            return self._fail(line, "", what)
        except _TooMuchError as error:
            mark = error.problem_mark
            return self._fail(1 if mark is None else mark.line + 1, error.key, str(error.problem))
        except yaml.YAMLError as error:
            return self._fail(*_syntax(error))
        if node is None:
            self._fail(1, "", "is empty; copy a shipped profile (`remoe profiles show orin-8gb`) and edit it")
        return node

    def fail(self, node: yaml.Node, key: str, message: str) -> Any:
        """Record a fault at a node's line; None, for a reader to return."""
        return self._fail(line_of(node), key, message)

    def _fail(self, line: int, key: str, message: str) -> Any:
        self.problems.append(Problem(self.path, line, printable(key), message))
        return None

    def plain(self, node: yaml.Node) -> Any:
        """The value of a node. Raises ConfigError for one that no plain YAML value is written like."""
        # The length comes first: Python turns very long digits into numbers in quadratic time.
        number = node.tag in (f"{_TAG}int", f"{_TAG}float")
        if number and isinstance(node, yaml.ScalarNode) and len(node.value) > _MOST_DIGITS:
            raise ConfigError(f"is a number of {len(node.value)} characters; write one of at most {_MOST_DIGITS}")
        if number and isinstance(node, yaml.ScalarNode) and node.value and not _DECIMAL.fullmatch(node.value):
            raise ConfigError(f"{shown(node.value)} is not written in plain decimal digits; write it so, as 10 or 0.5")
        try:
            return self._loader.construct_object(node, deep=True)
        except _UNBUILT as error:
            is_said = isinstance(error, yaml.YAMLError | ValueError)
            why = _said(error) if is_said else f"its text is not of its tag, {node.tag.removeprefix(_TAG)}"
            raise ConfigError(f"is not a plain YAML value ({why})") from error

    def shown(self, node: yaml.Node) -> str:
        """A node's value, short enough for a message."""
        try:
            return shown(self.plain(node))
        except ConfigError as error:
            return f"what {error}"

    def entries(self, node: yaml.Node, prefix: str) -> Iterator[tuple[str, yaml.ScalarNode, yaml.Node]]:
        """(key, its node, the value's node) of a mapping, each key once; faults for all others."""
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.fail(key_node, prefix.rstrip("."), "has a list or a map for a key; a key is one text")
            elif key_node.tag == f"{_TAG}merge":
                self.fail(key_node, f"{prefix}<<", "is a YAML merge, which profiles do not have; write its keys out")
            elif key_node.value in first:
                before = first[key_node.value]
                self.fail(key_node, prefix + key_node.value, f"appears twice (before in line {before}); keep one")
            else:
                first[key_node.value] = line_of(key_node)
                yield key_node.value, key_node, value_node


class _TooMuchError(ComposerError):
    """More than a profile can be; `key` is where."""

    key = ""


class _Loader(yaml.SafeLoader):
    """Composes nodes within bounds. An alias becomes a copy of its own, whose lines are the alias's."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._above: list[Any] = []
        self._open: set[str] = set()
        self._count = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        self._above.append(index)
        if isinstance(event, yaml.AliasEvent) and event.anchor in self.anchors:
            self.get_event()  # type: ignore[no-untyped-call]
            # An alias inside its own anchor would be copied without end.
            if event.anchor in self._open:
                raise self._too_much(event, f"holds itself (*{event.anchor}); write its values out")
            # Copied, because a shared node has one line, and a fault must name the line that a user would change.
            node = self._copy(self.anchors[event.anchor], event, len(self._above))
        else:
            self._counted(event, len(self._above))
            anchor = event.anchor
            self._open.add(anchor)
            node = super().compose_node(parent, index)
            self._open.discard(anchor)
        self._above.pop()
        return node

    def _copy(self, node: Any, alias: Any, level: int) -> Any:
        self._counted(alias, level)
        value = node.value
        if isinstance(node, yaml.SequenceNode):
            value = [self._copy(child, alias, level + 1) for child in value]
        elif isinstance(node, yaml.MappingNode):
            value = [tuple(self._copy(child, alias, level + 1) for child in pair) for pair in value]
        return type(node)(node.tag, value, alias.start_mark, alias.end_mark)

    def _counted(self, event: Any, level: int) -> None:
        # Copies count too: a few nested aliases can stand for billions of values.
        self._count += 1
        if level > _MOST_LEVELS:
            raise self._too_much(event, f"is nested deeper than {_MOST_LEVELS} levels; a profile has three")
        if self._count > _MOST_NODES:
            raise self._too_much(event, f"holds more than {_MOST_NODES} values; is this a profile?")

    def _too_much(self, event: Any, message: str) -> _TooMuchError:
        error = _TooMuchError(None, None, message, event.start_mark)
        error.key = ".".join(key.value for key in self._above if isinstance(key, yaml.ScalarNode))
        return error


def _syntax(error: yaml.YAMLError) -> tuple[int, str, str]:
    mark, begun = getattr(error, "problem_mark", None), getattr(error, "context_mark", None)
    context = getattr(error, "context", None)
    since = "" if not context else f"{context}: " if begun is None else f"{context} in line {begun.line + 1}: "
    return 1 if mark is None else mark.line + 1, "", f"is not valid YAML ({since}{_said(error)})"


def _said(error: Exception) -> str:
    text = str(getattr(error, "problem", None) or error).splitlines()
    return text[0] if text else type(error).__name__
