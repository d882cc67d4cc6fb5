"""What the pages of the documentation take from the source, so that they cannot say anything else.

A page asks with a line `<!-- from source: NAME -->`; the line gives way to Markdown made here: the commands, the keys of
a profile, the table of interpositions. `::: remoe_adapt.NAME` is completed to where NAME is defined.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

import remoe_adapt
from remoe_adapt import DeviceProfile
from remoe_adapt.cli import app
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
    import typer

    def below(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        if hasattr(command, "commands"):
            for word, inner in command.commands.items():
                yield from below(f"{name} {word}", inner)
        else:
            yield name, command

    yield from below("remoe", typer.main.get_command(app))


def _cli() -> str:
    parts = []
    for name, command in commands():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
        words = [p.metavar or p.name.upper() for p in arguments]
        usage = " ".join([name, *(w if p.required else f"[{w}]" for p, w in zip(arguments, words, strict=True))])
        rows = [
            (f"`{w}`", p.help or "", "required" if p.required else "") for p, w in zip(arguments, words, strict=True)
        ]
        rows += [(", ".join(f"`{o}`" for o in p.opts), p.help or "", _default(p)) for p in options]
        help_text = re.sub(r"(?<!\n)\n(?!\n)", " ", command.help or "").strip()
        parts.append(
            f"## {name}\n\n`{usage} [options]`\n\n{help_text}\n\n{table(('option', 'what', 'default'), iter(rows))}"
        )
    return "\n\n".join(parts)


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if callable(value) or value is None or value is False or value == ():
        return f"`${parameter.envvar}`" if isinstance(parameter.envvar, str) else ""
    return f"`{' '.join(map(str, value)) if isinstance(value, list | tuple) else value}`"


# Profiles


def _profile() -> str:
    return "\n\n".join(_sections(DeviceProfile, ""))


def _sections(kind: Any, prefix: str) -> Iterator[str]:
    """A heading, the docstring and the keys of each section, the whole file first."""
    hints = get_type_hints(kind)
    nested = {
        f.metadata["key"]: hints[f.name] for f in dataclasses.fields(kind) if dataclasses.is_dataclass(hints[f.name])
    }
    rows = [
        (f"`{prefix}{f.metadata['key']}`", _type_text(hints[f.name]), _field_default(f))
        for f in dataclasses.fields(kind)
        if f.metadata["key"] not in nested
    ]
    title = f"## {prefix.rstrip('.')}" if prefix else "## The file"
    yield f"{title}\n\n{_listed(kind)}\n\n{table(('key', 'type', 'default'), iter(rows))}"
    for key, inner in nested.items():
        yield from _sections(inner, f"{prefix}{key}.")


def _listed(kind: Any) -> str:
    """The docstring; what it says of each field is a line of a list."""
    names = "|".join(sorted((f.name for f in dataclasses.fields(kind)), key=len, reverse=True))
    text = " ".join((kind.__doc__ or "").split())
    return re.sub(rf"(?:^|(?<=[.;,:]) )((?:{names})(?:, (?:{names}))*)(: | \()", r"\n\n- `\1`\2", text).strip()


def _type_text(hint: Any) -> str:
    text = hint.__name__ if isinstance(hint, type) else str(hint)
    for spelled, plain in (("collections.abc.", ""), ("tuple[float, float]", "[from, full]"), (" | None", " or null")):
        text = text.replace(spelled, plain)
    return text.replace("tuple[[from, full], ...]", "[[pressure, strength], ...]")


def _field_default(field: Any) -> str:
    value = field.default
    if value is dataclasses.MISSING:
        return "required" if field.default_factory is dataclasses.MISSING else "empty"
    if isinstance(value, tuple):
        return f"`[{', '.join(_number(number) for number in value)}]`"
    return (
        f"`{ {True: 'true', False: 'false', None: 'null'}.get(value, value) }`"
        if not isinstance(value, float)
        else f"`{value:g}`"
    )


def _number(value: float) -> str:
    for size, unit in _SIZE_UNITS:
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


# Other libraries


def _interpositions() -> str:
    rows = (
        (row.library, row.interposes, ", ".join(f"`{file}`" for file in row.used_in), f"`{row.name}`")
        for row in contracts()
        if row.interposes
    )
    return table(("library", "what we put there, and what takes it off", "used by", "row"), rows)


def _assumptions() -> str:
    rows = ((row.library, row.relies_on, f"`{row.name}`") for row in contracts())
    return table(("library", "what must be so", "row"), rows)


MAKERS: dict[str, Callable[[], str]] = {
    "commands": _cli,
    "profile_keys": _profile,
    "interpositions": _interpositions,
    "assumptions": _assumptions,
}
