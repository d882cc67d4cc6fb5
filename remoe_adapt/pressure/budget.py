"""How large the expert cache may be: at once down by what memory lacks, slowly up again in long calm.

A cache that follows every change of free memory is known to hurt (BigMoeOnEdge retired its governor). So this moves
only when memory is lacking, or after calm of half of `expert_cache.regrow_s`, and then only as far as a quarter of the
reserve stays to spare.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from remoe_adapt._support import size_text
from remoe_adapt.device_profile import DeviceProfile
from remoe_adapt.pressure.signals import Place, Weighed, notes_of

# Parts of the reserve: given back beyond what is lacking, and to spare before the cache grows.
_SLACK, _SPARE = 0.1, 0.25
# Stalled or swapping memory takes a whole budget in so many seconds.
_SQUEEZE_S = 60.0
_SQUEEZING = ("psi memory", "swap")
_TIERS = ("cache", "below")
# Smaller changes are not worth a call, as parts of the allowed budget.
_LEAST_STEP = 0.02


class TierState(NamedTuple):
    """calm_s: when calm began, None: there is none; moved_s: the last growth; both on the policy's clock.
    others: bytes free or ours to give, as so many sensors (`seen`) said last: what falls of it, others took."""

    calm_s: float | None = None
    moved_s: float = 0.0
    others: float = 0.0
    seen: int = 0


@dataclass(frozen=True, slots=True)
class Tier:
    """One tier of the cache in a reading, in bytes. allowed: its budget in calm; resident: of its experts."""

    name: str
    budget: float
    allowed: float
    resident: float
    place: Place

    @classmethod
    def of(cls, name: str, weighed: Weighed) -> Tier | None:
        """None when the reading does not say enough about it."""
        found = [weighed.values.get(f"{name}.{key}") for key in ("budget", "allowed", "resident")]
        on_gpu = name == "cache" and weighed.values.get("cache.on_gpu", 0.0) > 0
        place = weighed.places.get("device" if on_gpu and "device" in weighed.places else "host")
        budget, allowed, resident = found
        if budget is None or not allowed or resident is None or place is None:
            return None
        return cls(name, budget, allowed, min(resident, budget), place)


def move(
    tier: Tier, state: TierState, weighed: Weighed, clock_s: float, step_s: float, profile: DeviceProfile, share: float
) -> tuple[TierState, int | None, str]:
    """The tier's next state, the budget it should have (None: as it is), and why in words ("" when nothing moves).

    share: the part of what is lacking or to spare that is this model's.
    """
    place, settings = tier.place, profile.expert_cache
    # A cache that is below its floor already is not grown by giving back.
    floor = min(tier.budget, settings.floor * tier.allowed)
    others = place.free + tier.resident
    # What others took since the last reading, they may take again before the next one.
    taken = max(0.0, state.others - others) if state.seen == place.seen else 0.0
    state = state._replace(others=others, seen=place.seen)
    lacking = place.lacking + min(taken, place.reserve)
    squeeze = max((s.pressure for s in weighed.memory if s.name in _SQUEEZING), default=0.0)
    if lacking > 0:
        # From what is resident and not from the budget: slots that are empty give nothing back.
        wanted = max(floor, tier.resident - share * (lacking + _SLACK * place.reserve))
        return _shrunk(tier, clock_s, state, wanted, f"{size_text(lacking)} of memory are lacking, or will be")
    if squeeze >= 0.5:
        wanted = max(floor, tier.budget - tier.allowed * squeeze * step_s / _SQUEEZE_S)
        return _shrunk(tier, clock_s, state, wanted, f"memory stalls or swaps (pressure {squeeze:.2f})")
    if squeeze > 0:
        return state._replace(calm_s=None, moved_s=clock_s), None, ""
    calm_s = clock_s if state.calm_s is None else state.calm_s
    waiting = clock_s - calm_s < settings.regrow_s / 2
    # Growth is counted from the end of the wait.
    moved_s = clock_s if waiting else state.moved_s
    if waiting or tier.budget >= tier.allowed:
        return state._replace(calm_s=calm_s, moved_s=moved_s), None, ""
    # What the budget allows and nobody has filled yet will be taken without any growth.
    spare = share * (-place.lacking - _SPARE * place.reserve) - (tier.budget - tier.resident)
    # The whole budget in half of `regrow_s`, so that calm of all of it restores an empty cache.
    grown = tier.allowed * (clock_s - moved_s) / max(settings.regrow_s / 2, 1e-9)
    growth = min(grown, spare, tier.allowed - tier.budget)
    if growth < min(_LEAST_STEP * tier.allowed, tier.allowed - tier.budget):
        # What could not grow for want of room is not saved up.
        return state._replace(calm_s=calm_s, moved_s=moved_s if growth == grown else clock_s), None, ""
    words = f"{clock_s - calm_s:.0f} s of calm: the expert cache grows to {size_text(tier.budget + growth)}"
    return state._replace(calm_s=calm_s, moved_s=clock_s), int(tier.budget + growth), words


def _shrunk(tier: Tier, clock_s: float, state: TierState, wanted: float, why: str) -> tuple[TierState, int | None, str]:
    state = state._replace(calm_s=None, moved_s=clock_s)
    if wanted >= tier.budget:
        return state, None, ""
    return state, int(wanted), f"{why}: the expert cache shrinks to {size_text(wanted)}"


def budgets(
    states: Mapping[str, TierState],
    weighed: Weighed,
    clock_s: float,
    step_s: float,
    profile: DeviceProfile,
    share: float,
) -> tuple[dict[str, TierState], dict[str, int], list[str]]:
    """`move` for every tier a reading tells of: their states, the budgets to set, and why."""
    after, wanted, why = dict(states), dict[str, int](), list[str]()
    for name in _TIERS:
        tier = Tier.of(name, weighed)
        if tier is None:
            continue
        after[name], budget, words = move(tier, states.get(name, TierState()), weighed, clock_s, step_s, profile, share)
        if budget is not None:
            wanted[name] = budget
            why.append(words)
    return after, wanted, why


def notes(weighed: Weighed, profile: DeviceProfile) -> dict[str, str]:
    """What of the profile's memory section cannot hold here, in words, by place and key."""
    found = notes_of(weighed.places, profile)
    budget_bytes = profile.memory.budget_bytes
    tiers = [tier for name in _TIERS if (tier := Tier.of(name, weighed)) is not None]
    for where, place in weighed.places.items():
        if budget_bytes is None or place.used is None:
            continue
        shed = sum(
            max(0.0, tier.resident - profile.expert_cache.floor * tier.allowed) for tier in tiers if tier.place is place
        )
        if place.used - shed > budget_bytes:
            gives = (
                f"its expert cache can give back {size_text(shed)} of that at most" if tiers else "nothing gives back"
            )
            found[f"{where} budget unmet"] = (
                f"memory.budget {size_text(budget_bytes)} of profile {profile.name} cannot be met: the model takes "
                f"{size_text(place.used)} of {place.name}, and {gives}"
            )
    return found


def is_whole(weighed: Weighed) -> bool:
    """Whether every tier that a reading tells of has the budget of calm."""
    values = weighed.values
    return all(values.get(f"{name}.budget", 0.0) >= values.get(f"{name}.allowed", 0.0) for name in _TIERS)
