"""A report on the disk: the page and the PNGs beside it, all of them or none."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from remoe_adapt._support import printable, replacing
from remoe_adapt.errors import WriteError
from remoe_adapt.evaluation.reporting.figures import drawings
from remoe_adapt.evaluation.reporting.page import page_html


def write_report(facts: Mapping[str, Any], page: str | Path) -> list[Path]:
    """Writes the page of `report_facts`, and each drawing as `PAGE-NAME.png` beside it; returns these files, the page
    first.

    Raises:
        MissingDependencyError: matplotlib is not there.
        WriteError: the disk refuses; what was there is as it was.
    """
    page = Path(page)
    drawn = drawings(facts)
    pictures = {drawing.name: page.with_name(f"{page.stem}-{drawing.name}.png") for drawing in drawn}
    contents = {page: page_html(facts, drawn, {name: path.name for name, path in pictures.items()}).encode()}
    contents |= {pictures[drawing.name]: drawing.png for drawing in drawn}
    try:
        with contextlib.ExitStack() as drafts:
            # The stack ends the last one first: the page takes its name when its pictures have theirs.
            for path, data in contents.items():
                drafts.enter_context(replacing(path)).write_bytes(data)
    except OSError as error:
        raise WriteError(
            f"{printable(page)} cannot be written ({error.strerror or error}): give another place."
        ) from error
    return list(contents)
