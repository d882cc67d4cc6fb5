"""Eviction by predicted next use: which experts have followed those of this token, and how often each is used.

The predictor is a first-order Markov chain over the experts of a layer, as prefetchers keep one over addresses (D.
Joseph, D. Grunwald, Prefetching using Markov predictors, ISCA 1997), smoothed by a slowly decayed frequency; beside it
stands a fast one, for bursts. One decay (LRFU) cannot fit both. What keeping expert e is worth after a token that chose
c_1 .. c_K:

    sum over c of (follows[c][e] + PRIOR * slow[e])  /  sum over c of (seen[c] + PRIOR)  +  SHARE_OF_FAST * fast[e]

seen[c]: how often a token has come within LAG tokens after one that chose c; halved, with its row, from COUNT_LIMIT on,
so that rows age.
follows[c][e]: how often such a token chose e.
fast[e], slow[e]: `frequency = decay * frequency + (1 - decay) * (e is chosen)`, with the decays `decay ** FAST` and
`decay ** SLOW`.

The constants were fitted by least squares to 1 / sqrt(tokens to the next use) on the first halves of ten traces of four
models, and rounded; those fitted without the model that is measured do as well, to about 1 %. What the router says of
experts that it did not choose (their probability, and decayed means of it) was tried as a further term, and adds
nothing.
"""

from __future__ import annotations

import heapq
import sys
from array import array
from bisect import insort
from collections.abc import Collection, Hashable
from typing import Generic

from remoe_adapt.errors import ConfigError
from remoe_adapt.eviction.policy import LRFU_DECAY, DecayClock, Key, Policy, register

FAST, SLOW = 3.0, 0.2
PRIOR, SHARE_OF_FAST = 2, 0.25
LAG, COUNT_LIMIT = 2, 128
# The experts of a wider call are those of many tokens (a prompt), which says nothing of what follows what.
MAX_WIDTH = 32
# Added to a value, it rounds it to 2**-40: values that are equal on paper tie whatever the order of their sums.
ROUND = 4096.0
# A row of counts is one integer of so many bits each, so that rows are added at once. A sum of MAX_WIDTH rows fits.
_BITS = 16
_HALVED = ((1 << _BITS - 1) - 1).to_bytes(_BITS // 8, "little")


@register
class Markov(Policy[Key]):
    """Drops the least likely to be used soon, judged by what followed this token's experts before, and by frequency.

    Of keys `(layer, expert)` each layer is predicted by itself, and its values stand until it is used again; other keys
    are of one layer. It takes two bytes for each pair of experts of a layer, once both were used.

    decay: of the frequencies, per token: the fast one's is `decay ** 3`, the slow one's `decay ** 0.2`.

    Raises ConfigError for a decay outside [0.5, 1).
    """

    name = "markov"
    # Values change with every token and are put in order where they are asked for, so uses push nothing.
    only_rises = True
    takes = ("decay",)

    def __init__(self, capacity: int, decay: float = LRFU_DECAY) -> None:
        if not 0.5 <= decay < 1:
            raise ConfigError(f"markov decay {decay!r} is outside [0.5, 1): 0.9 is the default")
        self._decay = decay
        super().__init__(capacity)

    def reset(self) -> None:
        super().reset()
        self._layers: dict[Hashable, _Layer[Key]] = {}
        # Layers whose order is out of date, as a set that keeps the order of insertion.
        self._unordered: dict[_Layer[Key], None] = {}
        # The least valued resident of each layer. An entry counts only while its number is the layer's `shown`.
        self._heads: list[tuple[float, int, int, _Layer[Key]]] = []

    def discard(self, key: Key) -> None:
        size = self._size.pop(key, None)
        if size is not None:
            self.used -= size
            layer = self._layer_of(key)
            del layer.residents[key]
            self._unordered[layer] = None

    def evict(self, protected: Collection[Key] = ()) -> Key:
        if self._unordered:
            for layer in self._unordered:
                layer.sort(self._last_use)
                self._show(layer)
            self._unordered.clear()
        if len(self._layers) == 1:
            for layer in self._layers.values():
                for at, (_, _, key) in enumerate(layer.order):
                    if key not in protected:
                        self._drop(layer, at)
                        return key
        passed: list[_Layer[Key]] = []
        try:
            while self._heads:
                _, _, number, layer = heapq.heappop(self._heads)
                if number != layer.shown:
                    continue
                key = layer.order[layer.at][2]
                # A protected key keeps its place; those behind it stand for the layer until a victim is found.
                if key in protected:
                    if not layer.at:
                        passed.append(layer)
                    layer.at += 1
                    self._show(layer)
                    continue
                self._drop(layer, layer.at)
                self._show(layer)
                return key
        finally:
            for layer in passed:
                layer.at = 0
                self._show(layer)
        raise ConfigError(f"nothing can be evicted: all {len(self)} keys are protected, raise the budget")

    def _drop(self, layer: _Layer[Key], at: int) -> None:
        key = layer.order.pop(at)[2]
        del layer.residents[key]
        self.used -= self._size.pop(key)

    def _begin(self, token: int, keys: Collection[Key]) -> None:
        by_name: dict[Hashable, list[Key]] = {}
        for key in keys:
            by_name.setdefault(key[0] if isinstance(key, tuple) and key else None, []).append(key)
        for used in by_name.values():
            layer = self._layer_of(used[0])
            layer.use(token, used)
            self._unordered[layer] = None

    def _push(self, key: Key) -> None:
        layer = self._layer_of(key)
        layer.residents[key] = layer.place(key)
        if len(self._layers) == 1:
            # Its next eviction comes after its next use, when all is put in order anew.
            self._unordered[layer] = None
        elif layer not in self._unordered:
            # Other layers evict before this one is used again: what has come finds its place among those in order.
            entry = layer.value(key), self._last_use[key], key
            insort(layer.order, entry)
            if layer.order[0] is entry:
                self._show(layer)

    def _value(self, key: Key) -> float:
        return self._layer_of(key).value(key)

    def _layer_of(self, key: Key) -> _Layer[Key]:
        name = key[0] if isinstance(key, tuple) and key else None
        layer = self._layers.get(name)
        if layer is None:
            layer = self._layers[name] = _Layer(self._decay)
            # One layer alone needs no comparison with others, and has made none.
            for other in self._layers.values() if len(self._layers) == 2 else ():
                self._show(other)
        return layer

    def _show(self, layer: _Layer[Key]) -> None:
        """Let the layer's least valued key stand among the other layers'."""
        if len(self._layers) == 1:
            return
        layer.shown = next(self._pushes)
        if layer.at < len(layer.order):
            value, last_use, _ = layer.order[layer.at]
            heapq.heappush(self._heads, (value, last_use, layer.shown, layer))
        # Entries that no longer count pile up behind: see `Policy._push`.
        if len(self._heads) > 2 * len(self._layers) + 64:
            self._heads = [entry for entry in self._heads if entry[2] == entry[3].shown]
            heapq.heapify(self._heads)


class _Layer(Generic[Key]):
    """The experts of one layer: what each is worth, as of the layer's last use; each has a place, in order of use.

    residents: those in the cache, and their places.
    order: (value, last use, key) of the residents, rising, from the last `sort` on.
    at: the entry of `order` that stands for the layer; above 0 only while an eviction passes protected keys.
    shown: the number of its entry among the layers.
    """

    def __init__(self, decay: float) -> None:
        fast, slow = decay**FAST, decay**SLOW
        self._fast_clock, self._slow_clock = DecayClock(fast), DecayClock(slow)
        # What a use adds to a frequency.
        self._fast_rate, self._slow_rate = 1 - fast, 1 - slow
        self._places: dict[Key, int] = {}
        # By place. A unit is a count of 1 in a row.
        self._fast: list[float] = []
        self._slow: list[float] = []
        self._seen: list[int] = []
        self._follows: list[int] = []
        self._units: list[int] = []
        self._token = -1
        # What the last LAG tokens chose, the newest first.
        self._chosen: list[list[int]] = []
        # What `value` needs, computed where it is asked for: a token that misses nothing needs no values.
        self._is_predicted = False
        self._counts = array("H")
        self._of_counts = self._of_fast = self._of_slow = 0.0
        self.residents: dict[Key, int] = {}
        self.order: list[tuple[float, int, Key]] = []
        self.at, self.shown = 0, -1

    def place(self, key: Key) -> int:
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = len(self._fast)
            self._fast.append(0.0)
            self._slow.append(0.0)
            self._seen.append(0)
            self._follows.append(0)
            self._units.append(1 << _BITS * place)
            self._is_predicted = False
        return place

    def use(self, token: int, keys: list[Key]) -> None:
        """One use of each key; calls of one token belong together."""
        places = [self.place(key) for key in keys]
        if (scale := self._fast_clock.advance(token)) != 1.0:
            self._fast = [frequency * scale for frequency in self._fast]
        if (scale := self._slow_clock.advance(token)) != 1.0:
            self._slow = [frequency * scale for frequency in self._slow]
        fast, slow, fast_gain, slow_gain = self._fast, self._slow, self._fast_clock.gain, self._slow_clock.gain
        for place in places:
            fast[place] += fast_gain
            slow[place] += slow_gain
        if token == self._token:
            before = self._chosen.pop(0)
            places = before + [place for place in places if place not in before]
        elif len(places) <= MAX_WIDTH:
            self._learn(places)
        self._token = token
        self._chosen = [places, *self._chosen[: LAG - 1]]
        self._is_predicted = False

    def _learn(self, places: list[int]) -> None:
        """These follow the experts of the last tokens."""
        seen, follows, units = self._seen, self._follows, self._units
        uses = sum([units[place] for place in places])
        for chosen in self._chosen:
            if len(chosen) > MAX_WIDTH:
                continue
            for place in chosen:
                if seen[place] >= COUNT_LIMIT:
                    halves = int.from_bytes(_HALVED * len(units), "little")
                    follows[place] = follows[place] >> 1 & halves
                    seen[place] >>= 1
                seen[place] += 1
                follows[place] += uses

    def _predict(self) -> None:
        """What `value` needs, until the layer is used again."""
        self._is_predicted = True
        places: list[int] = self._chosen[0] if self._chosen else []
        count, prior = 0, 1.0
        if len(places) <= MAX_WIDTH and places:
            seen, follows = self._seen, self._follows
            count = sum([follows[place] for place in places])
            self._of_counts = 1.0 / (sum([seen[place] for place in places]) + PRIOR * len(places))
            prior = PRIOR * len(places) * self._of_counts
        self._counts = array("H", count.to_bytes(len(self._units) * _BITS // 8, "little"))
        if sys.byteorder == "big":
            self._counts.byteswap()
        self._of_slow = prior * self._slow_rate / self._slow_clock.gain
        self._of_fast = SHARE_OF_FAST * self._fast_rate / self._fast_clock.gain

    def sort(self, last_use: dict[Key, int]) -> None:
        if not self._is_predicted:
            self._predict()
        counts, fast, slow = self._counts, self._fast, self._slow
        of_counts, of_fast, of_slow = self._of_counts, self._of_fast, self._of_slow
        self.order = [
            (counts[at] * of_counts + slow[at] * of_slow + fast[at] * of_fast + ROUND, last_use[key], key)
            for key, at in self.residents.items()
        ]
        self.order.sort()

    def value(self, key: Key) -> float:
        """As `sort` has it."""
        at = self.place(key)
        if not self._is_predicted:
            self._predict()
        worth = self._counts[at] * self._of_counts + self._slow[at] * self._of_slow
        return worth + self._fast[at] * self._of_fast + ROUND
