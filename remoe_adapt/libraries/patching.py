"""The one way in which a method of somebody else's object is changed: on that object alone, with a way back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class Override:
    """`owner.name(...)` is `around(original, ...)` until `undo`; other objects of its class are as before.

    The signature stays the original's: transformers reads that of `prepare_inputs_for_generation`.
    """

    def __init__(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        self._owner, self._name = owner, name
        # None where the class's own method was in use; undo then removes ours, so that later changes of the class
        # count.
        self._before = vars(owner).get(name)
        original = getattr(owner, name)
        self._hook = functools.wraps(original)(functools.partial(around, original))
        vars(owner)[name] = self._hook

    def undo(self) -> None:
        """The method is what it was, unless somebody else has changed it since. Calling it again does nothing."""
        # Somebody has wrapped ours since: taking it out would take theirs out as well.
        if vars(self._owner).get(self._name) is not self._hook:
            return
        if self._before is None:
            del vars(self._owner)[self._name]
        else:
            vars(self._owner)[self._name] = self._before


class Overrides:
    """Several of them, with one way back."""

    def __init__(self) -> None:
        self._placed: list[Override] = []

    def wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """An Override; nothing where the owner has no such method, as a model without generate."""
        if getattr(owner, name, None) is not None:
            self._placed.append(Override(owner, name, around))

    def remove(self) -> None:
        """Undo all of them, the last one first."""
        while self._placed:
            self._placed.pop().undo()
