"""What the pages of the documentation take from the source, so that they cannot say anything else.

A page asks with a line `<!-- from source: NAME -->`; the line gives way to Markdown made here: the commands, the keys
of a profile, the table of interpositions. `::: remoe_adapt.NAME` is completed to where NAME is defined.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
import yaml

import remoe_adapt
from remoe_adapt import DeviceProfile, list_profiles
from remoe_adapt.cli.app import app
from remoe_adapt.device_profile.profile import check_profile
from remoe_adapt.libraries import contracts

_FROM_SOURCE = re.compile(r"^<!-- from source: (\w+) -->$", re.MULTILINE)
_AUTODOC = re.compile(r"^::: remoe_adapt\.(\w+)$", re.MULTILINE)
_SIZE_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this for every page."""
    markdown = _FROM_SOURCE.sub(lambda asked: MAKERS[asked[1]](), markdown)
    return _AUTODOC.sub(lambda asked: _autodoc(asked[1]), markdown)


def _autodoc(name: str) -> str:
    """Public names are imported on first use, which autodoc does not see: it is told where each is defined."""
    if name not in remoe_adapt.__all__:  # a module, which autodoc reads as it is
        return f"::: remoe_adapt.{name}"
    value = getattr(remoe_adapt, name)
    return f"::: {value.__module__}.{value.__qualname__}\n    options:\n      heading: {name}\n      toc_label: {name}"


def cell(text: object) -> str:
    """Text that stays in its cell of a table."""
    return re.sub(r"\s+", " ", str(text)).strip().replace("|", "\\|")


def table(head: tuple[str, ...], rows: Iterator[tuple[object, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


# Commands


def commands() -> Iterator[tuple[str, Any]]:
    """("remoe bench swap", its click command) of every command, as the help lists them."""

    def below(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        if hasattr(command, "commands"):
            for word, inner in command.commands.items():
                yield from below(f"{name} {word}", inner)
        else:
            yield name, command

    yield from below("remoe", typer.main.get_command(app))


def _cli() -> str:
    return "\n\n".join(_command(name, command) for name, command in commands())


def _command(name: str, command: Any) -> str:
    """A heading, how to write it, its help and its options."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    words = [(p.metavar or p.name.upper()) if p.required else f"[{p.metavar or p.name.upper()}]" for p in arguments]
    rows = [(f"`{word}`", p.help or "", _default(p)) for p, word in zip(arguments, words, strict=True)]
    rows += [
        (", ".join(f"`{spelled}`" for spelled in (*p.opts, *p.secondary_opts)), p.help or "", _default(p))
        for p in command.params
        if p.param_type_name == "option" and not p.hidden and p.name != "help"
    ]
    text = re.sub(r"(?<!\n)\n(?!\n)", " ", command.help or "").strip()
    usage = " ".join([name, *words, "[options]"])
    return f"## {name}\n\n`{usage}`\n\n{text}\n\n{table(('option', 'what', 'default'), iter(rows))}"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if callable(value) or value is None or value is False or value == ():
        return f"`${parameter.envvar}`" if isinstance(parameter.envvar, str) else ""
    return f"`{' '.join(map(str, value)) if isinstance(value, list | tuple) else value}`"


# Profiles


def _profile() -> str:
    with tempfile.TemporaryDirectory() as folder:
        return "\n\n".join(_sections(DeviceProfile, "", Path(folder) / "orin-8gb.yaml"))


def _sections(kind: Any, prefix: str, scratch: Path) -> Iterator[str]:
    """A heading, the docstring and the keys of each section, the whole file first."""
    keys = {field.metadata["key"]: field for field in dataclasses.fields(kind)}
    nested = {key: read for key, field in keys.items() if isinstance(read := field.metadata["read"], type)}
    rows = (
        (f"`{prefix}{key}`", _wanted(prefix, key, scratch), _field_default(field))
        for key, field in keys.items()
        if key not in nested
    )
    title = f"## {prefix.rstrip('.')}" if prefix else "## The file"
    yield f"{title}\n\n{_listed(kind)}\n\n{table(('key', 'value', 'default'), rows)}"
    for key, inner in nested.items():
        yield from _sections(inner, f"{prefix}{key}.", scratch)


def _listed(kind: Any) -> str:
    """The docstring, by keys instead of fields; what it says of each is a line of a list."""
    keys = {field.name: field.metadata["key"] for field in dataclasses.fields(kind)}
    names = "|".join(sorted(keys, key=len, reverse=True))
    text = " ".join((kind.__doc__ or "").split())

    def item(found: re.Match[str]) -> str:
        return "\n\n- " + ", ".join(f"`{keys[name]}`" for name in found[1].split(", ")) + found[2]

    return re.sub(rf"(?:^|(?:^|(?<=[.;,:)])) )((?:{names})(?:, (?:{names}))*)(: | \()", item, f" {text}").strip()


def _wanted(prefix: str, key: str, scratch: Path) -> str:
    """What a key takes, in the words with which a wrong value is refused."""
    whole = yaml.safe_load(list_profiles()["orin-8gb"].read_text(encoding="utf-8"))
    (whole.setdefault(prefix.rstrip("."), {}) if prefix else whole)[key] = "?"
    scratch.write_text(yaml.safe_dump(whole), encoding="utf-8")
    for problem in check_profile(scratch):
        if problem.key == prefix + key:
            if said := re.search(r"; write (.+)$", problem.message):
                return said[1]
            if said := re.search(r"is not one of (.+?)(?:;|$)", problem.message):
                return ", ".join(f"`{word}`" for word in said[1].split(", "))
    return "text"


def _field_default(field: Any) -> str:
    value = field.default
    if value is dataclasses.MISSING:
        return "required" if field.default_factory is dataclasses.MISSING else "empty"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(_number, value))}]`"
    if isinstance(value, bool) or value is None:
        return {True: "`true`", False: "`false`", None: "`null`"}[value]
    return f"`{value if isinstance(value, str) else _number(value)}`"


def _number(value: float) -> str:
    for size, unit in _SIZE_UNITS:
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


# Other libraries


def _interpositions() -> str:
    rows = (
        (row.library, row.interposes, ", ".join(map(_patch, row.patches)), f"`{row.name}`")
        for row in contracts()
        if row.interposes
    )
    return table(("library", "what we put there, and what takes it off", "where, by which function", "row"), rows)


def _patch(text: str) -> str:
    file, _, functions = text.partition(":")
    return f"`{file}`: {functions.replace(',', ', ')}"


def _assumptions() -> str:
    rows = ((row.library, row.relies_on, f"`{row.name}`") for row in contracts())
    return table(("library", "what must be so", "row"), rows)


MAKERS: dict[str, Callable[[], str]] = {
    "commands": _cli,
    "profile_keys": _profile,
    "interpositions": _interpositions,
    "assumptions": _assumptions,
}
