"""Which experts are being read ahead, and which of those that were have not been asked for yet."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from remoe_adapt.cache.slots import Key


class ReadAheads:
    """Bookkeeping of an expert cache, under its lock.

    queued: posted, the read has not begun. begun: being read. unused: read or being read, not looked up since.
    expected: predicted, there or not, until their layer looks up.
    """

    def __init__(self) -> None:
        self.queued: set[Key] = set()
        self.begun: set[Key] = set()
        self.unused: set[Key] = set()
        self.expected: set[Key] = set()

    @property
    def reading(self) -> set[Key]:
        return self.queued | self.begun

    def queue(self, key: Key) -> None:
        self.queued.add(key)
        self.unused.add(key)

    def begin(self, key: Key) -> None:
        self.queued.discard(key)
        self.begun.add(key)

    def end(self, key: Key, *, came: bool) -> None:
        """The read is over."""
        self.begun.discard(key)
        if not came:
            self.unused.discard(key)

    def forget(self, key: Key) -> None:
        """No read-ahead any more: called off before it began, or taken over by a lease."""
        self.queued.discard(key)
        self.unused.discard(key)

    def look_up(self, layer: int, wanted: Collection[int]) -> list[Key]:
        """A layer looks up its experts: no more of them are expected. Returns those queued for it that it does not
        want."""
        self.expected = {key for key in self.expected if key[0] != layer}
        return [key for key in self.queued if key[0] == layer and key[1] not in wanted]

    def use(self, keys: Sequence[Key]) -> int:
        """How many of the keys were read ahead and are looked up for the first time since."""
        used = self.unused.intersection(keys)
        self.unused -= used
        return len(used)
