"""What an expert cache keeps: LRU, LFU, LRFU and Belady behind one protocol, in bytes or in experts.

One policy object serves the replay of traces and the live expert cache. Keys are any hashable (an expert id, or
`(layer, expert)` for one budget over all layers). A token is served as

    missing = [key for key in keys if key not in policy]
    policy.touch(keys)                       # all of them are uses, found or not
    for key in missing:
        dropped = policy.make_room(size, protected=keys)
        policy.admit(key, size)              # once its bytes are there

by a cache with a hard budget, or by `policy.step(keys)`, which lets all of the token in and then cuts back: that is the
token-atomic replay in which hit rates are defined.

Markov, which predicts the next use, is in `markov`.

A policy is one class under `@register`: its `name` then stands for it in replays, expert caches and profiles alike.
Replays of many sizes get quicker with a score for all layers at once (`replay_scored.SCORES`).
"""

from __future__ import annotations

import heapq
import itertools
import math
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from remoe_adapt.errors import ConfigError

Key = TypeVar("Key")
# The first place of the key in the order of eviction is the smallest; the last number is the time of its last use.
Priority = tuple[float, int]

LRFU_DECAY = 0.9
# Weights of LRFU grow by 1 / decay per token; they are scaled back before they pass this.
_LRFU_LIMIT = 1e100


class Policy(ABC, Generic[Key]):
    """The resident keys of a cache of `capacity` (bytes, or experts where every size is 1), and who leaves next.

    The history of uses is kept for absent keys too; ties go to the least recently used. Time is in tokens: `touch`
    counts one per call, or takes the token number where several calls (the layers) belong to one token.

    `capacity` changes by `resize` alone. `used` is the sum of the resident keys' sizes; it is above the capacity only
    between `admit` and `trim`.

    name: what it is called in options, profiles and results.
    online: it needs no future, so a live cache can run it.
    only_rises: a use never lowers what its key is worth, which makes uses cheaper.
    takes: which options of `make_policy` its constructor has beside the capacity, as "future" or "decay".

    Raises ConfigError for a capacity that is not a positive int.
    """

    name: ClassVar[str]
    online: ClassVar[bool] = True
    only_rises: ClassVar[bool] = False
    takes: ClassVar[tuple[str, ...]] = ()

    def __init__(self, capacity: int) -> None:
        self.capacity = _checked_capacity(capacity)
        self.reset()

    def reset(self) -> None:
        """Empties the cache and forgets all uses, as at the start of a document."""
        self.used = 0
        self._token = -1
        self._uses_seen = 0
        # Kept for keys that are absent too, so that an expert that returns has its history.
        self._last_use: dict[Key, int] = {}
        self._size: dict[Key, int] = {}
        # A lazy heap, which a use leaves as it is: an entry whose key has been used since stands too far in front, and
        # goes to its place when it gets there. So a look-up costs no step in a heap, and an eviction a few.
        self._heap: list[tuple[Priority, int, Key]] = []
        # An entry counts only while its priority is still that: a key may have left and come back since.
        self._queued: dict[Key, Priority] = {}
        # Stands before the key in an entry, because keys need not be comparable.
        self._pushes = itertools.count()

    def __contains__(self, key: object) -> bool:
        return key in self._size

    def __len__(self) -> int:
        return len(self._size)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._size)

    def touch(self, keys: Collection[Key], token: int | None = None) -> None:
        """Counts one use of each key, resident or not; of equals the last is the newest.

        Raises:
            ConfigError: `token` lies before the token of an earlier call.
        """
        now = self._token + 1 if token is None else token
        if now < self._token:
            raise ConfigError(f"token {now} cannot follow token {self._token}: pass rising numbers, or none")
        # Before anything changes: a policy may refuse the keys, and all is as it was then.
        self._begin(now, keys)
        self._token = now
        last_use, use, seen = self._last_use, self._use, self._uses_seen
        for key in keys:
            last_use[key] = seen
            seen += 1
            self._uses_seen = seen
            use(key)
            # A key that is worth less now would stand too far behind. An absent key gets its entry when it is admitted;
            # one made now would be evicted though nothing is there.
            if not self.only_rises and key in self._size:
                self._push(key)

    def admit(self, key: Key, size: int = 1) -> None:
        """Makes an absent key resident; call `make_room` before, or `trim` after. No use is counted (see `touch`).

        Raises:
            ConfigError: the key is resident, or `size` is not in [1, capacity].
        """
        if key in self._size:
            raise ConfigError(f"{key!r} is in the cache already: admit only what is missing")
        self._check_size(key, size)
        if key not in self._last_use:
            # An expert that was read ahead has no use yet. It counts as new, or it would leave before its layer asks.
            self._last_use[key] = self._uses_seen
            self._uses_seen += 1
        self._size[key] = size
        self.used += size
        self._push(key)

    def discard(self, key: Key) -> None:
        """Drops a key if it is resident, as after a failed read. Its uses stay counted."""
        size = self._size.pop(key, None)
        if size is not None:
            self.used -= size
            # Its entries in the heap are dead from now on; `evict` skips them.
            del self._queued[key]

    def evict(self, protected: Collection[Key] = ()) -> Key:
        """Drops and returns the key that the policy values least among those not protected.

        Raises:
            ConfigError: every resident key is protected, or the cache is empty.
        """
        kept: list[tuple[Priority, int, Key]] = []
        moved = 0
        try:
            while self._heap:
                entry = heapq.heappop(self._heap)
                priority, _, key = entry
                if self._queued.get(key) != priority:
                    continue
                if priority[1] != self._last_use[key]:
                    moved += 1
                    # After a long time without evictions most are to be moved, which takes longer than a new heap.
                    if moved > len(self._size) // 4:
                        self._rebuild_heap()
                        kept.clear()
                    else:
                        self._push(key)
                    continue
                # A protected key keeps its place: its entry goes back when a victim is found.
                if key in protected:
                    kept.append(entry)
                    continue
                self.discard(key)
                return key
        finally:
            for entry in kept:
                heapq.heappush(self._heap, entry)
        raise ConfigError(f"nothing can be evicted: {len(kept)} of {len(self)} keys are protected, raise the budget")

    def make_room(self, size: int, protected: Collection[Key] = ()) -> list[Key]:
        """Evicts until `size` more fits; returns what was dropped, first victim first.

        Raises:
            ConfigError: the protected keys and `size` exceed the capacity; nothing was dropped.
        """
        return self._cut_to(self.capacity - size, protected)

    def trim(self, protected: Collection[Key] = ()) -> list[Key]:
        """Evicts until the capacity is kept; see `make_room`."""
        return self._cut_to(self.capacity, protected)

    def resize(self, capacity: int, protected: Collection[Key] = ()) -> list[Key]:
        """Changes the capacity, evicting at once what no longer fits; see `make_room`. A refusal changes nothing."""
        # The capacity changes last, because `_cut_to` refuses when protected keys alone take more.
        dropped = self._cut_to(_checked_capacity(capacity), protected)
        self.capacity = capacity
        return dropped

    def step(self, keys: Sequence[Key], sizes: Sequence[int] | None = None) -> list[Key]:
        """One token of the token-atomic replay; returns the keys that were missing.

        All keys are looked up in the cache as the last token left it; then all are let in, the last as the newest; then
        the cache is cut back to its capacity, where keys of this token may go too. `sizes` default to 1.
        """
        missing = [(key, 1 if sizes is None else sizes[slot]) for slot, key in enumerate(keys) if key not in self]
        # All sizes are checked first, so that a token that cannot be served changes nothing.
        for key, size in missing:
            self._check_size(key, size)
        self.touch(keys)
        for key, size in missing:
            self.admit(key, size)
        self.trim()
        return [key for key, _ in missing]

    def _check_size(self, key: Key, size: int) -> None:
        if not 1 <= size <= self.capacity:
            raise ConfigError(f"{key!r} of size {size} does not fit a cache of {self.capacity}: raise the budget")

    def _cut_to(self, limit: int, protected: Collection[Key]) -> list[Key]:
        if self.used <= limit:
            return []
        # Refused before the first eviction: a caller that fails must not have lost experts for nothing.
        pinned = sum(self._size.get(key, 0) for key in set(protected))
        if pinned > limit:
            raise ConfigError(f"protected keys take {pinned}, only {max(limit, 0)} may stay: raise the budget")
        dropped = []
        while self.used > limit:
            dropped.append(self.evict(protected))
        return dropped

    def _push(self, key: Key) -> None:
        priority = (self._value(key), self._last_use[key])
        self._queued[key] = priority
        heapq.heappush(self._heap, (priority, next(self._pushes), key))
        # Dead entries pile up with keys that are discarded, and with uses where those push. A rebuild at twice the size
        # costs each push O(1) in the mean; the 64 keep small caches from rebuilding at each use.
        if len(self._heap) > 2 * len(self._size) + 64:
            self._rebuild_heap()

    def _rebuild_heap(self) -> None:
        self._queued = {key: (self._value(key), self._last_use[key]) for key in self._size}
        self._heap = [(priority, next(self._pushes), key) for key, priority in self._queued.items()]
        heapq.heapify(self._heap)

    def _begin(self, token: int, keys: Collection[Key]) -> None:
        """Called before time moves to `token` and its uses `keys` count; may refuse them."""

    def _use(self, key: Key) -> None:
        """Called for one use of `key` at token `self._token`."""

    @abstractmethod
    def _value(self, key: Key) -> float:
        """What keeping `key` is worth; the least goes first. Changes only when the key is used."""


# Every policy by its name, and those that a live cache can run. Options, profiles and replays ask here, so that a new
# policy needs no other place.
POLICIES: dict[str, type[Policy[Any]]] = {}
ONLINE: dict[str, type[Policy[Any]]] = {}
_Kind = TypeVar("_Kind", bound=type[Policy[Any]])


def register(policy: _Kind) -> _Kind:
    """Class decorator: the policy can be asked for by its name from now on."""
    POLICIES[policy.name] = policy
    if policy.online:
        ONLINE[policy.name] = policy
    return policy


def check_policy(name: str) -> None:
    """Raises ConfigError for a name that no policy has."""
    # A tuple compares: a name from a file may be a list, which a dict cannot look up.
    if name not in tuple(POLICIES):
        raise ConfigError(f"unknown cache policy {name!r}: choose from {', '.join(POLICIES)}")


def make_policy(
    name: str, capacity: int, future: Sequence[Iterable[Any]] = (), decay: float = LRFU_DECAY
) -> Policy[Any]:
    """A new policy object by name.

    capacity: in bytes, or in experts where every size is 1.
    future: the keys of every token to come, which belady knows.
    decay: of lrfu and markov, per token.

    Raises ConfigError for an unknown name, or a capacity that is not a positive int.
    """
    check_policy(name)
    kind, offered = POLICIES[name], {"future": future, "decay": decay}
    return kind(capacity, **{option: offered[option] for option in kind.takes})


@register
class LRU(Policy[Key]):
    """Drops the least recently used."""

    name = "lru"
    only_rises = True

    def _value(self, key: Key) -> float:
        # All are worth the same, and of equals the least recently used leaves.
        return 0.0


@register
class LFU(Policy[Key]):
    """Drops the fewest uses since the start (of the cache, or of the document)."""

    name = "lfu"
    only_rises = True

    def reset(self) -> None:
        super().reset()
        self._uses: Counter[Key] = Counter()

    def _use(self, key: Key) -> None:
        self._uses[key] += 1

    def _value(self, key: Key) -> float:
        return self._uses[key]


@register
class LRFU(Policy[Key]):
    """Drops the least sum of `decay ** age` over its uses, age in tokens: Lee et al., LRFU, IEEE ToC 50(12), 2001.

    `decay` runs from 0.5 (the order of LRU) to 1 (of LFU); others raise ConfigError."""

    name = "lrfu"
    only_rises = True
    takes = ("decay",)

    def __init__(self, capacity: int, decay: float = LRFU_DECAY) -> None:
        _check_decay(decay)
        # Before the base class, whose constructor calls `reset`.
        self._clock = DecayClock(decay)
        super().__init__(capacity)

    def reset(self) -> None:
        super().reset()
        self._clock.reset()
        self._weight: defaultdict[Key, float] = defaultdict(float)

    @property
    def decay(self) -> float:
        """In force."""
        return self._clock.decay

    def set_decay(self, decay: float) -> None:
        """Another decay from the next token on; what is resident stays, and uses so far weigh what they weigh now.

        Raises ConfigError as the constructor.
        """
        _check_decay(decay)
        # Weights are relative to a token that the clock chose: those of the new clock are to the token of now.
        self._rescale(1.0 / self._clock.gain)
        self._clock = DecayClock(decay, max(self._token, 0))

    def _begin(self, token: int, keys: Collection[Key]) -> None:
        scale = self._clock.advance(token)
        if scale != 1.0:
            self._rescale(scale)

    def _rescale(self, scale: float) -> None:
        # All weights by one factor keep their order, but the heap compares old entries with new ones.
        for key in self._weight:
            self._weight[key] *= scale
        self._rebuild_heap()

    def _use(self, key: Key) -> None:
        self._weight[key] += self._clock.gain

    def _value(self, key: Key) -> float:
        return self._weight[key]


@register
class Belady(Policy[Key]):
    """Drops the farthest next use, for which it is told the future: one entry of keys per token.

    With equal sizes no policy misses less: Belady, A study of replacement algorithms for a virtual-storage computer,
    IBM Systems Journal 5(2), 1966; here a key of the current token may go too.

    Raises:
        ConfigError: by `touch`, when a key is used at a token where the future does not have it.
    """

    name = "belady"
    online = False
    takes = ("future",)

    def __init__(self, capacity: int, future: Sequence[Iterable[Key]]) -> None:
        self._tokens_of: defaultdict[Key, list[int]] = defaultdict(list)
        for token, keys in enumerate(future):
            for key in keys:
                self._tokens_of[key].append(token)
        super().__init__(capacity)

    def _begin(self, token: int, keys: Collection[Key]) -> None:
        for key in keys:
            tokens = self._tokens_of.get(key, [])
            place = bisect_left(tokens, token)
            # A future that is not the one that comes would give hit rates that no cache can have.
            if place == len(tokens) or tokens[place] != token:
                raise ConfigError(f"the future told to Belady does not use {key!r} at token {token}")

    def _value(self, key: Key) -> float:
        tokens = self._tokens_of.get(key, [])
        # The next use after this token; the use that is being counted is no reason to keep it.
        place = bisect_right(tokens, self._token)
        return -tokens[place] if place < len(tokens) else -math.inf


class DecayClock:
    """Forward decay: a use at token t adds `decay ** -t`, so that weights change, and order, only where used.

    `advance` moves to a token and returns the factor by which all weights must be scaled (1 nearly always), which keeps
    them finite; `gain` is what a use adds now. Weights that fall below the smallest float tie at 0.
    """

    def __init__(self, decay: float, token: int = 0) -> None:
        self.decay = decay
        # After so many tokens a use would weigh more than _LRFU_LIMIT.
        self._period = math.inf if decay == 1 else math.floor(math.log(_LRFU_LIMIT) / -math.log(decay))
        self.reset(token)

    def reset(self, token: int = 0) -> None:
        self._base = token
        self.gain = 1.0

    def advance(self, token: int) -> float:
        # Weights are relative to the token `_base`. Moving it costs a pass over all keys, so it is done once
        # a period instead of at each token.
        scale = 1.0
        if token - self._base > self._period:
            scale = self.decay ** (token - self._base)
            self._base = token
        self.gain = self.decay ** (self._base - token)
        return scale


def _check_decay(decay: object) -> None:
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0.5 <= decay <= 1:
        raise ConfigError(f"LRFU decay {decay!r} is outside [0.5, 1]: 0.5 ranks as LRU, 1 as LFU")


def _checked_capacity(capacity: int) -> int:
    # To Python True is 1, and a capacity of True is a mistake.
    if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
        raise ConfigError(f"cache capacity must be a positive int, got {capacity!r}")
    return capacity
