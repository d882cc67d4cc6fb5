"""The table of what we rely on in other libraries. Each row checks itself on the installed versions.

A row is written as a function under `@relied_on(...)` in an `of_*` file: the decorator holds the
sentence, the names and who uses it; the body holds the check, which raises BrokenAssumption with the sentence that a
maintainer needs. So the table cannot say one thing and the check another.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata


class BrokenAssumption(AssertionError):  # noqa: N818 (a sentence about a library, not an error of ours)
    """Something that we rely on in a library is not so in the installed version."""


@dataclass(frozen=True, slots=True)
class Contract:
    """One row.

    relies_on: what must be so, in a sentence. used_in: files of ours that would be wrong otherwise. names: what they
    import from below the library's public face. interposes: what we put into the library's or the user's objects
    there, and what takes it off again; empty where we only call. patches: which functions of `patching` do it in which
    files, as "dial/guards.py:override,hook". check: raises BrokenAssumption.
    """

    name: str
    library: str
    relies_on: str
    used_in: tuple[str, ...]
    names: tuple[str, ...]
    interposes: str
    patches: tuple[str, ...]
    check: Callable[[], None]

    def fault(self) -> str | None:
        """Why this contract does not hold on the installed version; None when it does."""
        try:
            self.check()
        except BrokenAssumption as error:
            return str(error)
        except Exception as error:  # a name that is gone, a signature that has changed
            return f"the check itself failed with {type(error).__name__}: {error}"
        return None


CONTRACTS: list[Contract] = []


def relied_on(
    library: str, relies_on: str, used_in: str, *, names: str = "", interposes: str = "", patches: str = ""
) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Add the function under it to CONTRACTS; files, names and patches are separated by spaces."""

    def add(check: Callable[[], None]) -> Callable[[], None]:
        users, imported, placed = (tuple(text.split()) for text in (used_in, names, patches))
        row = Contract(check.__name__, library, relies_on, users, imported, interposes, placed, check)
        # Filled while the `of_*` files are imported, in their order.
        CONTRACTS.append(row)
        return check

    return add


def hold(condition: object, sentence: str) -> None:
    """Raises BrokenAssumption with this sentence unless `condition` is true."""
    if not condition:
        raise BrokenAssumption(sentence)


def versions() -> dict[str, str]:
    """Installed versions of what the table speaks of."""
    found = {"python": platform.python_version()}
    for library in ("torch", "transformers", "peft", "accelerate", "safetensors", "triton"):
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "not installed"
    return found
