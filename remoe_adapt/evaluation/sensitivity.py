"""What each layer's recency gain costs and saves, measured, and the gains of all layers that a quality budget buys.

A layer alone, at a few gains, gives two curves: KL to the base, and misses of its cache. Where the whole model pays one
price for a miss saved, every layer has the gain at which its next miss saved costs that much KL, so no other gains save
as many misses for as much KL (up to how layers act together, which is then measured for the whole). Shapes: L routers,
G gains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from remoe_adapt._support import freed_memory_kept
from remoe_adapt.checkpoints import device_of
from remoe_adapt.errors import ConfigError, DataError, RouterError
from remoe_adapt.evaluation.arms import arms_of
from remoe_adapt.evaluation.evaluate import Tally, measured_model, tally_arms
from remoe_adapt.evaluation.record import window_tokens, windows
from remoe_adapt.eviction import cache_capacity, count_misses
from remoe_adapt.family import Family, FamilyPoint
from remoe_adapt.recency import InstalledPrior
from remoe_adapt.recency_settings import MAX_GAIN, Recency
from remoe_adapt.routers import survey_routers
from remoe_adapt.traces import Trace

Floats = NDArray[np.float64]

# So many groups of neighbouring layers at most are measured each alone; a group shares a gain. Three gains of sixteen
# groups are 48 forwards of the calibration text, however many layers a model has.
MOST_GROUPS = 16
# The gains at which a layer is measured: of priced modes in units of the mean weight of a chosen expert, 1 / K, else in
# spans of the choice values.
_PRICED_GAINS, _PLAIN_GAINS = (0.3, 0.6, 1.2), (0.1, 0.2, 0.4)
# Gains that may be allotted, as multiples of the smallest and the largest that were measured, and how many are tried.
_LEAST, _MOST, _TRIED = 1 / 64, 8.0, 512
# Below this a divergence is rounding, and has no logarithm worth fitting.
_LEAST_KL = 1e-9
# Fewer misses a token than these have no logarithm worth a line.
_LEAST_MISSES = 1e-4
# A loss that rises by less than this for a nat of divergence is taken for noise of the text.
_LEAST_CE_PER_KL = 0.25


@dataclass(frozen=True, eq=False)
class Outcome:
    """Gains, and what they did to a text: kl (nats a token), ce (rise of the mean loss over the base's, nats), ce_error
    (its standard error), misses_L (misses of each layer's cache a token, LRFU with the prior's decay). source: the
    point of a family whose adapter ran; None: the base's own routers."""

    prior: Recency
    kl: float
    ce: float
    ce_error: float
    misses_L: Floats
    tally: Tally
    source: FamilyPoint | None = None

    @property
    def misses(self) -> float:
        """Of all layers, a token."""
        return float(self.misses_L.sum())


@dataclass(frozen=True, eq=False)
class Measurement:
    """The base and settings of gains over one text.

    lru_L, lrfu_L: misses of the base a token, by layer, under LRU and under LRFU with the prior's decay.
    tokens: scored; window: tokens of a window; documents: how many had something to score. control: of the family whose
    adapters ran, where it has one.
    """

    base: Tally
    outcomes: tuple[Outcome, ...]
    lru_L: Floats
    lrfu_L: Floats
    num_experts: int
    tokens: int
    documents: int
    window: int
    control: Tally | None = None


# A setting to measure: gains, and the point whose adapter runs with them (None: the base's own routers).
Setting = tuple[Recency, FamilyPoint | None]


def measure_settings(
    model: nn.Module,
    documents: Sequence[Sequence[int]],
    settings: Sequence[Setting],
    cache: float,
    on_tokens: Callable[[int], object] | None = None,
    *,
    family: Family | None = None,
    control: bool = False,
) -> Measurement:
    """Runs the base, and under each setting, over token documents, by the evaluation protocol.

    settings: gains of one kind, all with an adapter of `family` or all without. cache: share of a layer's experts in
    the cache whose misses are counted, empty where a document begins. control: that of `family` is measured too.

    Raises ConfigError for priors of several kinds or a bad share, DataError when no document has two tokens.
    """
    priors = [prior for prior, _ in settings]
    trial = None if family is None else _trial(family, settings, control)
    window = window_tokens(model)
    plan = windows([len(ids) for ids in documents], window)
    if not plan:
        raise DataError("nothing to score: no document has two tokens; give more text")
    with (
        arms_of(model, trial, priors=priors if trial is None else ()) as arms,
        measured_model(model) as measured,
        freed_memory_kept(device_of(model).type),
    ):
        assert measured is not None
        tallies = tally_arms(documents, plan, arms, measured, on_tokens=on_tokens)
        experts, top_k = measured.recorder.num_experts, measured.recorder.top_k
    base, found = tallies[arms.base], [tallies[arm] for arm in arms.points or arms.priors]
    capacity, decay = cache_capacity(cache, experts, top_k), priors[0].decay

    def misses(trace: Trace, policy: str) -> Floats:
        counted: Floats = count_misses(trace, policy, [capacity], decay)[0] / trace.num_tokens
        return counted

    base_trace = base.trace(experts)
    outcomes = tuple(
        Outcome(
            prior,
            kl=tally.kl_nats / tally.tokens,
            ce=(tally.nll_nats - base.nll_nats) / tally.tokens,
            ce_error=tally.ce_error(base) or 0.0,
            misses_L=misses(tally.trace(experts), "lrfu"),
            tally=tally,
            source=source,
        )
        for (prior, source), tally in zip(settings, found, strict=True)
    )
    return Measurement(
        base, outcomes, misses(base_trace, "lru"), misses(base_trace, "lrfu"), experts, base.tokens,
        len({part.document for part in plan}), window, None if arms.control is None else tallies[arms.control],
    )  # fmt: skip


def _trial(family: Family, settings: Sequence[Setting], control: bool) -> Family:
    """A family of these settings, and its control where it is asked for, in memory alone."""
    points = []
    for number, (prior, source) in enumerate(settings, 1):
        assert source is not None
        points.append(replace(source, strength=number / len(settings), recency=prior))
    beside = family.control if control else None
    return Family(family.path, family.base_id, family.fingerprint, tuple(points), beside)


@dataclass(frozen=True)
class Curve:
    """KL and misses of a group of layers at a gain g, fitted: `kl_scale * g^kl_power`, and
    `misses / (1 + (g / half_gain)^steepness)` with the misses at gain 0."""

    kl_scale: float
    kl_power: float
    misses: float
    half_gain: float
    steepness: float

    def kl(self, gains_G: Floats) -> Floats:
        """Nats a token, fp64 [G]."""
        return np.asarray(self.kl_scale * gains_G**self.kl_power, dtype=np.float64)

    def saved(self, gains_G: Floats) -> Floats:
        """Misses saved a token, fp64 [G]."""
        return self.misses * (1.0 - 1.0 / (1.0 + (gains_G / self.half_gain) ** self.steepness))


def fit_curve(gains: Sequence[float], kls: Sequence[float], misses: Sequence[float], base_misses: float) -> Curve:
    """Least squares in the logarithms of KL, and in the log-odds of the misses that are left."""
    log_g = np.log(gains)
    power, scale = _line(log_g, np.log(np.maximum(kls, _LEAST_KL)))
    # What is left must be a share between 0 and 1, also where a small gain happened to add misses.
    left = np.clip(np.asarray(misses) / max(base_misses, 1e-12), 1e-4, 1.0 - 1e-4)
    steepness, offset = _line(log_g, np.log(1.0 / left - 1.0))
    return Curve(math.exp(scale), power, base_misses, math.exp(-offset / steepness), steepness)


def _line(x: Floats, y: Floats) -> tuple[float, float]:
    """Slope and intercept, of a slope that makes a curve which rises from 0."""
    slope = float(np.polyfit(x, y, 1)[0]) if len(x) > 1 else 2.0
    slope = min(max(slope, 0.5), 6.0)
    return slope, float(np.mean(y) - slope * np.mean(x))


def groups_of(places: Sequence[int]) -> list[tuple[int, ...]]:
    """Routers that share a gain: each its own, or as many groups of neighbours as are measured."""
    parts = np.array_split(np.asarray(places), min(MOST_GROUPS, len(places)))
    return [tuple(int(place) for place in part) for part in parts]


def check_possible(model: nn.Module, prior: Recency) -> tuple[int, list[int]]:
    """Number of routers, and the places of those that can have the prior.

    Raises ConfigError for a mode that an evaluation cannot measure, RouterError where no router can have it.
    """
    if not prior.kind.needs_history:
        raise ConfigError(f"recency {prior.mode!r} follows a real cache, which a calibration does not have: use cost.")
    installed = InstalledPrior(model, prior.mode, prior.decay, share=prior.share)
    installed.remove()
    if not installed.layers:
        reason = next(iter(installed.own_forward.values()))
        raise RouterError(f"no router of {type(model).__name__} can have a recency prior: {reason}.")
    return installed.num_routers, list(installed.layers)


@dataclass(eq=False)
class Way:
    """What the whole model did with one adapter, or without, from low prices to high ones.

    source: the point whose adapter it is; None: the base's own routers. steps: (price, outcome), by price, rising.
    rest: the adapter with gains of 0; None: the base itself. ce_per_kl: rise of the loss for a nat of divergence, both
    over those at rest, and error_scale such that the standard error of that rise is `sqrt(error_scale * kl)`; least
    squares over `steps`.
    """

    source: FamilyPoint | None
    steps: list[tuple[float, Outcome]]
    rest: Outcome | None = None
    ce_per_kl: float = 1.0
    error_scale: float = 0.0

    @classmethod
    def of(cls, source: FamilyPoint | None, steps: list[tuple[float, Outcome]], rest: Outcome | None = None) -> Way:
        """With its slope and errors."""
        return cls(source, steps, rest, *_loss_of_divergence([outcome for _, outcome in steps], rest))

    @property
    def rest_ce(self) -> float:
        """Rise of the loss over the base's with gains of 0, nats."""
        return 0.0 if self.rest is None else self.rest.ce

    @property
    def rest_kl(self) -> float:
        """KL to the base with gains of 0, nats."""
        return 0.0 if self.rest is None else self.rest.kl

    def kl_within(self, allowed_ce: float) -> float:
        """The KL to the base, nats, at which the rise of the loss over the base's, plus the standard error of what the
        gains add to it, is predicted to be `allowed_ce` nats; that at rest where it is above that already."""
        # rest_ce + c * own + sqrt(e * own) = allowed_ce, solved for sqrt(own).
        c, e = self.ce_per_kl, self.error_scale
        left = max(0.0, allowed_ce - self.rest_ce)
        return float(self.rest_kl + ((math.sqrt(e + 4.0 * c * left) - math.sqrt(e)) / (2.0 * c)) ** 2)

    def price_of(self, kl: float) -> float:
        """The price at which the whole model is at this KL, by a line between logarithms of what was measured of the
        gains' own part of it."""
        found = sorted((price, max(outcome.kl - self.rest_kl, _LEAST_KL)) for price, outcome in self.steps)
        x, y = np.log([price for price, _ in found]), np.maximum.accumulate(np.log([own for _, own in found]))
        wanted = math.log(max(kl - self.rest_kl, _LEAST_KL))
        if y[0] < wanted < y[-1]:
            return math.exp(float(np.interp(wanted, y, x)))
        # Beyond what was measured on as it goes between the ends, and not far: curves are known near the probes.
        slope = max(0.2, float((y[-1] - y[0]) / (x[-1] - x[0]))) if len(x) > 1 else 1.0
        end = 0 if wanted <= y[0] else -1
        return math.exp(float(x[end]) + min(max((wanted - float(y[end])) / slope, -8.0), 8.0))

    def misses_at(self, price: float) -> float:
        """Misses a token at this price, by a line between the logarithms of what was measured; the nearest one's beyond
        it."""
        found = sorted((step, max(outcome.misses, _LEAST_MISSES)) for step, outcome in self.steps)
        x, y = np.log(np.array(found)).T
        return math.exp(float(np.interp(math.log(price), x, y)))


@dataclass(eq=False)
class Calibration:
    """Curves of every group of layers of the base, and what the whole model did along the way from low prices to high.

    kind: mode, decay and share of the priors. routers: of the model. probes: gains at which each group was measured, in
    the order of `groups`. ways: of each adapter, or the base's alone. reference_ce: see `reference_ce`.
    """

    kind: Recency
    routers: int
    groups: list[tuple[int, ...]]
    probes: list[tuple[Outcome, ...]]
    curves: list[Curve]
    lru: float
    lrfu: float
    tokens: int
    ways: list[Way]
    reference_ce: float = 0.0

    @property
    def probe_gains(self) -> list[float]:
        """The gains at which each group was measured."""
        return [max(outcome.prior.gains()) for outcome in self.probes[0]]

    def prior_at(self, price: float) -> Recency:
        """The gains where a miss saved may cost `price` nats of KL (both a token)."""
        return _spread(self.kind, self.routers, self.groups, allot(self.curves, price, self.probe_gains))

    def best_way(self, budget: float) -> tuple[Way, float]:
        """The one that is predicted to miss least within the budget, and its KL there; of those over it from the start
        the nearest."""
        allowed = self.reference_ce + math.log(budget)

        def order(way: Way) -> tuple[float, float]:
            return max(0.0, way.rest_ce - allowed), way.misses_at(way.price_of(way.kl_within(allowed)))

        best = min(self.ways, key=order)
        return best, best.kl_within(allowed)


def allot(curves: Sequence[Curve], price: float, probe_gains: Sequence[float]) -> list[float]:
    """The gain of each curve with the least `kl - price * saved`; 0 where any would cost more than it saves.

    Searched among all that may be allotted, since the curves need not be convex.
    """
    low, high = min(probe_gains) * _LEAST, min(MAX_GAIN, max(probe_gains) * _MOST)
    gains_G = np.concatenate([[0.0], np.geomspace(low, high, _TRIED)])
    return [float(gains_G[np.argmin(curve.kl(gains_G) - price * curve.saved(gains_G))]) for curve in curves]


def probe_gains(model: nn.Module, kind: Recency) -> tuple[float, ...]:
    """The gains at which layers are measured."""
    if not kind.kind.is_priced:
        return _PLAIN_GAINS
    top_k = max(ref.spec.top_k for ref in survey_routers(model).usable())
    return tuple(gain / top_k for gain in _PRICED_GAINS)


def calibrate(
    model: nn.Module,
    documents: Sequence[Sequence[int]],
    kind: Recency,
    cache: float,
    budgets: Sequence[float],
    *,
    family: Family | None = None,
    whole: int = 6,
    on_tokens: Callable[[int], object] | None = None,
    on_passes: Callable[[int], object] | None = None,
) -> Calibration:
    """Measures each group of layers of the base alone, then all of them together at `whole` prices around what
    `budgets` allow: with each adapter of `family`, or without any.

    budgets: perplexity ratios above 1. on_passes: hears how many forwards of the text are to come.

    Raises as `check_possible` and `measure_settings`.
    """
    routers, places = check_possible(model, kind)
    groups, gains = groups_of(places), probe_gains(model, kind)
    sources: list[FamilyPoint | None] = [None] if family is None else [*family.points]
    if on_passes is not None:
        together = whole + 1 if family is None else 2 + len(sources) * (whole + 1)
        on_passes(1 + len(groups) * len(gains) + together)
    alone = [
        _spread(kind, routers, groups, [gain if other == number else 0.0 for other in range(len(groups))])
        for number in range(len(groups))
        for gain in gains
    ]
    found = measure_settings(model, documents, [(prior, None) for prior in alone], cache, on_tokens)
    probes = [found.outcomes[at : at + len(gains)] for at in range(0, len(alone), len(gains))]
    curves = [
        fit_curve(
            gains,
            [outcome.kl for outcome in outcomes],
            [float(outcome.misses_L[list(group)].sum()) for outcome in outcomes],
            float(found.lrfu_L[list(group)].sum()),
        )
        for group, outcomes in zip(groups, probes, strict=True)
    ]
    result = Calibration(
        kind, routers, groups, probes, curves, float(found.lru_L.sum()), float(found.lrfu_L.sum()), found.tokens, []
    )
    rests: dict[FamilyPoint | None, Outcome | None] = dict.fromkeys(sources)
    if family is not None:
        still = _spread(kind, routers, groups, [0.0] * len(groups))
        at_rest = measure_settings(
            model, documents, [(still, source) for source in sources], cache, on_tokens, family=family
        )
        rests = dict(zip(sources, at_rest.outcomes, strict=True))
        result.reference_ce = reference_ce(at_rest.outcomes)
    prices = {}
    for source, rest in rests.items():
        spent = 0.0 if rest is None else rest.ce - result.reference_ce
        prices[source] = _prices(result, budgets, spent, whole)
    settings = [(result.prior_at(price), source) for source in sources for price in prices[source]]
    outcomes = iter(measure_settings(model, documents, settings, cache, on_tokens, family=family).outcomes)
    result.ways = [
        Way.of(source, [(price, next(outcomes)) for price in prices[source]], rests[source]) for source in sources
    ]
    return result


def _prices(found: Calibration, budgets: Sequence[float], spent_ce: float, whole: int) -> list[float]:
    """Prices, rising, around what the budgets allow, of which an adapter has spent some nats of loss by itself."""
    # A loss rises by about the divergence, so that is where budgets are, give or take what the layers do together.
    least, most = 0.6 * math.log(min(budgets)), 1.4 * math.log(max(budgets))
    wanted = np.geomspace(least, max(most - spent_ce, 4.0 * least), whole)
    return [_price_of_sum(found, float(kl)) for kl in wanted]


def reference_ce(at_rest: Sequence[Outcome]) -> float:
    """What budgets are told from: the least loss, over the base's, nats, of the base and of adapters with gains of 0.
    What an adapter learnt of the data is not for gains to spend: on other text it is not there."""
    return min([0.0, *(outcome.ce for outcome in at_rest)])


def _spread(kind: Recency, routers: int, groups: Sequence[tuple[int, ...]], gains: Sequence[float]) -> Recency:
    """Gains of groups as those of all routers; 0 of routers in no group."""
    spread = [0.0] * routers
    for group, gain in zip(groups, gains, strict=True):
        for place in group:
            spread[place] = gain
    return replace(kind, gain=tuple(spread))


def _price_of_sum(found: Calibration, kl: float) -> float:
    """The price at which the layers' own divergences add up to this."""
    low, high = -30.0, 30.0
    for _ in range(60):
        price = (low + high) / 2
        allotted = allot(found.curves, math.exp(price), found.probe_gains)
        total = sum(float(curve.kl(np.array([g]))[0]) for curve, g in zip(found.curves, allotted, strict=True))
        low, high = (price, high) if total < kl else (low, price)
    return math.exp((low + high) / 2)


def _loss_of_divergence(outcomes: Sequence[Outcome], rest: Outcome | None) -> tuple[float, float]:
    """Rise of the loss for a nat of KL, both over those at rest, and the square of its standard error for a nat."""
    kl, ce, error = (np.array([getattr(each, name) for each in outcomes]) for name in ("kl", "ce", "ce_error"))
    if rest is not None:
        # The error of what gains add is far smaller than that of what the adapter does.
        error = np.array([each.tally.ce_error(rest.tally) or 0.0 for each in outcomes])
        kl, ce = kl - rest.kl, ce - rest.ce
    usable = (kl > _LEAST_KL) & (error > 0)
    if not usable.any():
        return 1.0, 0.0
    kl, ce, error = kl[usable], ce[usable], error[usable]
    weights = 1.0 / error**2
    slope = float((weights * kl * ce).sum() / (weights * kl * kl).sum())
    return max(slope, _LEAST_CE_PER_KL), float(np.mean(error**2 / kl))
