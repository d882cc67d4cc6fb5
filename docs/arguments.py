"""Our docstrings describe an argument as `name: text`; on the page each becomes an item of a list."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension


class Arguments(Extension):
    """Griffe calls these for every object of the package that a page shows."""

    def on_function(self, *, func: Any, **_: Any) -> None:
        """A function's parameters."""
        _list_names(func, [parameter.name for parameter in func.parameters])

    def on_class(self, *, cls: Any, **_: Any) -> None:
        """A class's attributes, and the parameters of what makes it."""
        made_by = cls.members.get("__init__")
        parameters = [] if made_by is None or made_by.is_alias else [parameter.name for parameter in made_by.parameters]
        _list_names(cls, [*cls.members, *parameters])


def _list_names(described: Any, names: list[str]) -> None:
    known = [re.escape(name) for name in names if not name.startswith("_")]
    if described.docstring is None or not known:
        return
    name = "|".join(sorted(known, key=len, reverse=True))
    begins = re.compile(rf"(?:^|(?<=[.;]) )((?:{name})(?:, (?:{name}))*): ", re.MULTILINE)
    head, *rest = described.docstring.value.split("\n", 1)
    text = begins.sub(r"\n\n- `\1`: ", "\n".join(rest))
    described.docstring.value = f"{head}\n{text}"
