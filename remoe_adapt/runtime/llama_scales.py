"""Strength in the language of llama-server: a scale for each loaded LoRA, one LoRA for each operating point.

`Family.live` is linear between neighbouring points; so are scales, and adapters add up: between the points p < q the
strength s is p at (q - s) / (q - p) and q at (s - p) / (q - p); below the first point it is that point at s / p.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from remoe_adapt.errors import DialError, ServerError
from remoe_adapt.runtime.events import HAND, SENSORS, Target, unit
from remoe_adapt.untrusted import printable

# The server keeps scales in fp32.
_SAME = 1e-5
# Adapters of a server that a message names.
_SHOWN = 20
# Strengths are set, and stated, to so many digits.
STEP_DIGITS = 4


def rounded_strength(target: Target, now: float, closed: bool) -> float | None:
    """The strength of a target, to STEP_DIGITS; None: nothing changes, see `Engine.post`.

    now: the strength posted last; where the sensors stay with it, what the server is found at is kept, to all digits.

    Raises ConfigError for a strength outside [0, 1], DialError for a hand's target where the engine is closed.
    """
    strength = unit("strength", target.strength)
    if closed and target.by == HAND:
        raise DialError("this engine is closed, and was left as it is: start `remoe watch` again.")
    same = target.by == SENSORS and strength == now
    return None if closed or same else round(strength, STEP_DIGITS)


@dataclass(frozen=True, slots=True)
class LoadedLora:
    """One of the server's adapters, as GET /lora-adapters lists it."""

    id: int
    path: str
    scale: float


def loaded_loras(answer: Any) -> list[LoadedLora]:
    """The server's adapters. Raises ServerError for an answer of another form."""
    try:
        return [LoadedLora(int(one["id"]), str(one["path"]), float(one["scale"])) for one in answer]
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise ServerError(f"/lora-adapters answers {printable(answer)}: is it a llama-server?") from error


@dataclass(frozen=True, slots=True)
class ScaleMap:
    """points: (strength, adapter id), rising; others: scales of adapters that are not of the family, left as they are.

    Every list of scales names every adapter: the server sets those that are left out to 0, and a request whose list is
    empty counts as one without a list (its prompt cache is not cleared then).
    """

    points: tuple[tuple[float, int], ...]
    others: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(
        cls,
        loras: Sequence[LoadedLora],
        strengths: Sequence[float],
        recognise: Callable[[str], float | None],
    ) -> ScaleMap:
        """From the server's adapters. recognise: an adapter's path -> its strength, None: not of the family.

        Raises ServerError when a point is not loaded, or loaded twice.
        """
        found: dict[float, int] = {}
        others = []
        for lora in loras:
            strength = recognise(lora.path)
            if strength is None:
                others.append((lora.id, lora.scale))
            elif strength in found:
                raise ServerError(f"the server has strength {strength:g} loaded twice: give each --lora once.")
            else:
                found[strength] = lora.id
        missing = [strength for strength in strengths if strength not in found]
        if missing:
            has = ", ".join(printable(lora.path) for lora in loras[:_SHOWN]) or "none"
            raise ServerError(
                f"the server lacks the LoRA of strength {', '.join(f'{s:g}' for s in missing)} (it has: {has}): export "
                "them with `remoe export gguf-lora` and start it with --lora FILE for each."
            )
        return cls(tuple(sorted(found.items())), tuple(others))

    def scales(self, strength: float) -> dict[int, float]:
        """Scale by adapter id, of all adapters, at a strength in [0, 1]; above the last point the last point's."""
        scales = dict(self.others) | {number: 0.0 for _, number in self.points}
        above = bisect_left(self.points, strength, key=lambda point: point[0])
        if above == len(self.points):
            scales[self.points[-1][1]] = 1.0
            return scales
        lower, below_id = self.points[above - 1] if above else (0.0, None)
        upper, above_id = self.points[above]
        share = (strength - lower) / (upper - lower)
        scales[above_id] = share
        if below_id is not None:
            scales[below_id] = 1.0 - share
        return scales

    def as_list(self, strength: float, others: Mapping[int, float] | None = None) -> list[dict[str, float]]:
        """What POST /lora-adapters and a request's `lora` take; others: a request's own scales, ours excepted."""
        family_ids = {number for _, number in self.points}
        scales = self.scales(strength)
        scales |= {number: scale for number, scale in (others or {}).items() if number not in family_ids}
        return [{"id": number, "scale": scale} for number, scale in sorted(scales.items())]

    def strength_of(self, loras: Sequence[LoadedLora]) -> float | None:
        """The strength whose scales these are; None when they are of no strength."""
        present = {lora.id: lora.scale for lora in loras}
        active = [(strength, present[number]) for strength, number in self.points if abs(present[number]) > _SAME]
        guess = sum(strength * scale for strength, scale in active)
        return guess if 0.0 <= guess <= 1.0 and self.matches(loras, guess) else None

    def matches(self, loras: Sequence[LoadedLora], strength: float) -> bool:
        """Whether the family's scales are those of `strength`."""
        present = {lora.id: lora.scale for lora in loras}
        wanted = self.scales(strength)
        return all(abs(present[number] - wanted[number]) <= _SAME for _, number in self.points)
