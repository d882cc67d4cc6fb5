"""What a recency prior is set to, and its modes: which experts it prefers and how fast it forgets.

No torch here, because device profiles and the command line are read without it. The arithmetic is that of
`gating/reference.py`, which every mode steers by the facts below; so a new mode is one class in this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, TypeVar

from remoe_adapt.errors import ConfigError

MAX_GAIN = 16.0
# The word for "no prior" in files; code says None.
NO_PRIOR = "none"
MODES: dict[str, Mode] = {}


class Mode:
    """A kind of recency, known by its `name` once it is registered.

    needs_history: each token moves a router's recency to `decay * recency + (1 - decay) * chosen`. It is kept beside
    the KV cache, so a cache that cannot be followed is refused. Without history the gate reads what an expert cache
    holds, and nothing moves.
    needs_expert_cache: without one the prior does nothing, which is said.
    takes_decay: a user may choose the decay; otherwise it is 0, the last token alone.
    default_decay: the decay where nobody chose one.
    is_priced: the bonus of an expert follows from what taking it costs, not from the span of the scores (see `Cost`).
    default_share: it prefers the experts that an LRFU cache of this share of a layer's would hold, where nobody chose
    another share; 0: it has no such cache in mind, and takes no share.
    """

    name: ClassVar[str]
    needs_history: ClassVar[bool] = True
    needs_expert_cache: ClassVar[bool] = False
    takes_decay: ClassVar[bool] = True
    default_decay: ClassVar[float] = 0.7
    is_priced: ClassVar[bool] = False
    default_share: ClassVar[float] = 0.0


_Kind = TypeVar("_Kind", bound=type[Mode])


def register(mode: _Kind) -> _Kind:
    """Class decorator: the mode can be asked for by its name from now on, in code, files and on the command line."""
    MODES[mode.name] = mode()
    return mode


@register
class Last(Mode):
    """The previous token's experts alone."""

    name = "last"
    takes_decay = False


@register
class Ema(Mode):
    """A decayed mean of uses."""

    name = "ema"


@register
class Resident(Mode):
    """What the expert cache holds now."""

    name = "resident"
    needs_history, needs_expert_cache, takes_decay = False, True, False


@register
class Cost(Mode):
    """What an LRFU cache would hold, preferred by what it costs.

    Of a layer's E experts the `max(K, floor(share * E))` used most lately (by the decayed mean of uses, which ranks as
    LRFU does, so a cache of that policy, decay and size holds them). A held expert of weight w ranks as one of weight
    `w + gain`: it takes another's place where that one's weight is less than `gain` above its own. Experts that stay
    weigh what they weighed: a router that divides weights by the sum of the chosen divides by that of its own choice.
    """

    name = "cost"
    default_decay = 0.95
    is_priced = True
    default_share = 0.25


DEFAULT_MODE = Ema.name


@dataclass(frozen=True, slots=True)
class Recency:
    """A recency prior's settings; None in its place means that there is no prior.

    mode: a key of MODES.
    gain: of all routers, or a tuple with that of each, in model order; from 0 to MAX_GAIN.
    decay: in [0, 1); 0 in a mode that takes none, whatever was given, so that equal priors compare equal.
    share: in (0, 1], of a layer's experts, that the cache holds which the prior is made for; None: the mode's own; 0 in
    a mode that takes none.

    Raises ConfigError for values that cannot be.
    """

    mode: str
    gain: float | tuple[float, ...]
    decay: float
    share: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.mode, str) or self.mode not in MODES:
            raise ConfigError(f"recency {self.mode!r} is not one of {', '.join(MODES)}.")
        for gain in self.gains():
            if not is_number(gain) or not 0.0 <= gain <= MAX_GAIN:
                raise ConfigError(
                    f"recency gain {gain!r}: give a number from 0 (no prior) to {MAX_GAIN:g}; 0.1 to 0.3 is usual."
                )
        if not is_number(self.decay) or not 0.0 <= self.decay < 1.0:
            raise ConfigError(f"recency decay {self.decay!r}: give a number from 0 (the last token alone) to below 1.")
        if not self.kind.takes_decay:
            object.__setattr__(self, "decay", 0.0)
        if not (usual := self.kind.default_share):
            object.__setattr__(self, "share", 0.0)
        elif self.share is None:
            object.__setattr__(self, "share", usual)
        elif not is_number(self.share) or not 0.0 < self.share <= 1.0:
            raise ConfigError(
                f"recency share {self.share!r}: give the part of a layer's experts that a cache holds, above 0 up to "
                "1; 0.25 is a quarter."
            )

    @classmethod
    def of(
        cls, mode: str | None, gain: float | Sequence[float] = 0.0, decay: float | None = None,
        share: float | None = None,
    ) -> Recency:  # fmt: skip
        """Settings with the usual value of what is None: DEFAULT_MODE, the mode's own decay and share. Raises as the
        class."""
        mode = DEFAULT_MODE if mode is None else mode
        if decay is None:
            decay = MODES[mode].default_decay if isinstance(mode, str) and mode in MODES else 0.0
        return cls(
            mode, tuple(gain) if isinstance(gain, Sequence) and not isinstance(gain, str) else gain, decay, share
        )

    @property
    def kind(self) -> Mode:
        """How its mode behaves."""
        return MODES[self.mode]

    @property
    def takes_share(self) -> bool:
        """Whether its mode is made for a cache of some share, so that files and tables say which."""
        return self.kind.default_share > 0

    @property
    def cache_decay(self) -> float | None:
        """Decay of the LRFU cache that holds what this prior prefers; None where it has no such cache in mind."""
        return max(self.decay, 0.5) if self.kind.is_priced else None  # below a half LRFU is no policy

    def gains(self, routers: int | None = None) -> tuple[float, ...]:
        """The gain of each of `routers` routers; None: as many as are listed. Raises ConfigError for another number."""
        listed = self.gain if isinstance(self.gain, tuple) else (self.gain,) * (1 if routers is None else routers)
        if routers is not None and len(listed) != routers:
            raise ConfigError(f"{len(listed)} recency gains for {routers} routers: give one for each.")
        return listed

    def is_like(self, other: Recency) -> bool:
        """Whether one prior can have the gains of both: same mode, decay, share and number of gains."""
        mine, theirs = ((it.mode, it.decay, it.share, len(it.gains())) for it in (self, other))
        return mine == theirs


def share_words() -> str:
    """The modes that take a share, for messages."""
    return " or ".join(name for name, mode in MODES.items() if mode.default_share)


def held_experts(share: float, k: int, experts: int) -> int:
    """Of so many experts of a layer, top-`k`, how many a cache of this share holds."""
    return max(k, int(share * experts))


def mode_words() -> tuple[str, ...]:
    """What a file may say for a mode."""
    return (NO_PRIOR, *MODES)


def is_number(value: object) -> bool:
    """Whether it is a real number; to Python True and False are numbers as well."""
    return isinstance(value, Real) and not isinstance(value, bool)
