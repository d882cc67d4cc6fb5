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
# A loss that rises by less than this for a nat of divergence is taken for noise of the text.
_LEAST_CE_PER_KL = 0.25


@dataclass(frozen=True, eq=False)
class Outcome:
    """Gains, and what they did to a text: kl (nats a token), ce (rise of the mean loss over the base's, nats), ce_error
    (its standard error), misses_L (misses of each layer's cache a token, LRFU with the prior's decay)."""

    prior: Recency
    kl: float
    ce: float
    ce_error: float
    misses_L: Floats
    tally: Tally

    @property
    def misses(self) -> float:
        """Of all layers, a token."""
        return float(self.misses_L.sum())


@dataclass(frozen=True, eq=False)
class Measurement:
    """The base and settings of gains over one text.

    lru_L, lrfu_L: misses of the base a token, by layer, under LRU and under LRFU with the prior's decay.
    tokens: scored; window: tokens of a window; documents: how many had something to score.
    """

    base: Tally
    outcomes: tuple[Outcome, ...]
    lru_L: Floats
    lrfu_L: Floats
    num_experts: int
    tokens: int
    documents: int
    window: int


def measure_priors(
    model: nn.Module,
    documents: Sequence[Sequence[int]],
    priors: Sequence[Recency],
    cache: float,
    on_tokens: Callable[[int], object] | None = None,
) -> Measurement:
    """Runs the base, and under each of `priors`, over token documents, by the evaluation protocol.

    priors: of one kind. cache: share of a layer's experts in the cache whose misses are counted, empty where a document
    begins.

    Raises ConfigError for priors of several kinds or a bad share, DataError when no document has two tokens.
    """
    window = window_tokens(model)
    plan = windows([len(ids) for ids in documents], window)
    if not plan:
        raise DataError("nothing to score: no document has two tokens; give more text")
    with (
        arms_of(model, None, priors=priors) as arms,
        measured_model(model) as measured,
        freed_memory_kept(device_of(model).type),
    ):
        assert measured is not None
        tallies = tally_arms(documents, plan, arms, measured, on_tokens=on_tokens)
        experts, top_k = measured.recorder.num_experts, measured.recorder.top_k
        base, found = tallies[arms.base], [tallies[arm] for arm in arms.priors]
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
        )
        for prior, tally in zip(priors, found, strict=True)
    )
    return Measurement(
        base, outcomes, misses(base_trace, "lru"), misses(base_trace, "lrfu"), experts, base.tokens,
        len({part.document for part in plan}), window,
    )  # fmt: skip


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
class Calibration:
    """Curves of every group of layers, and what the whole model did along the way from low prices to high ones.

    kind: mode, decay and share of the priors. routers: of the model. probes: gains at which each group was measured, in
    the order of `groups`. way: by price, rising. ce_per_kl: rise of the loss for a nat of divergence, and error_scale
    such that the standard error of that rise is `sqrt(error_scale * kl)`; both least squares over `way`.
    """

    kind: Recency
    routers: int
    groups: list[tuple[int, ...]]
    probes: list[tuple[Outcome, ...]]
    curves: list[Curve]
    lru: float
    lrfu: float
    tokens: int
    way: list[tuple[float, Outcome]]
    ce_per_kl: float = 1.0
    error_scale: float = 0.0

    @property
    def probe_gains(self) -> list[float]:
        """The gains at which each group was measured."""
        return [max(outcome.prior.gains()) for outcome in self.probes[0]]

    def prior_at(self, price: float) -> Recency:
        """The gains where a miss saved may cost `price` nats of KL (both a token)."""
        return _spread(self.kind, self.routers, self.groups, allot(self.curves, price, self.probe_gains))

    def kl_within(self, budget: float) -> float:
        """The KL, nats, at which the perplexity ratio plus its standard error is predicted to be `budget`."""
        # c * kl + sqrt(e * kl) = log(budget), solved for sqrt(kl).
        c, e, allowed = self.ce_per_kl, self.error_scale, math.log(budget)
        return ((math.sqrt(e + 4.0 * c * allowed) - math.sqrt(e)) / (2.0 * c)) ** 2

    def price_of(self, kl: float) -> float:
        """The price at which the whole model is at this KL, by a line between logarithms of what was measured."""
        found = sorted((price, max(outcome.kl, _LEAST_KL)) for price, outcome in self.way)
        x, y = np.log([price for price, _ in found]), np.maximum.accumulate(np.log([kl for _, kl in found]))
        wanted = math.log(kl)
        if y[0] < wanted < y[-1]:
            return math.exp(float(np.interp(wanted, y, x)))
        # Beyond what was measured on as it goes between the ends, and not far: curves are known near the probes.
        slope = max(0.2, float((y[-1] - y[0]) / (x[-1] - x[0]))) if len(x) > 1 else 1.0
        end = 0 if wanted <= y[0] else -1
        return math.exp(float(x[end]) + min(max((wanted - float(y[end])) / slope, -8.0), 8.0))


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
    whole: int = 6,
    on_tokens: Callable[[int], object] | None = None,
    on_passes: Callable[[int], object] | None = None,
) -> Calibration:
    """Measures each group of layers alone, then all of them together at `whole` prices around what `budgets` allow.

    budgets: perplexity ratios above 1. on_passes: hears how many forwards of the text are to come.

    Raises as `check_possible` and `measure_priors`.
    """
    routers, places = check_possible(model, kind)
    groups, gains = groups_of(places), probe_gains(model, kind)
    if on_passes is not None:
        on_passes(len(groups) * len(gains) + whole + 2)
    alone = [
        _spread(kind, routers, groups, [gain if other == number else 0.0 for other in range(len(groups))])
        for number in range(len(groups))
        for gain in gains
    ]
    found = measure_priors(model, documents, alone, cache, on_tokens)
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
    # A loss rises by about the divergence, so that is where budgets are, give or take what the layers do together.
    wanted = np.geomspace(0.6 * math.log(min(budgets)), 1.4 * math.log(max(budgets)), whole)
    prices = [_price_of_sum(result, float(kl)) for kl in wanted]
    together = measure_priors(model, documents, [result.prior_at(price) for price in prices], cache, on_tokens)
    result.way = list(zip(prices, together.outcomes, strict=True))
    result.ce_per_kl, result.error_scale = _loss_of_divergence(together.outcomes)
    return result


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


def _loss_of_divergence(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """Rise of the loss for a nat of KL, and the square of its standard error for a nat."""
    kl, ce, error = (np.array([getattr(each, name) for each in outcomes]) for name in ("kl", "ce", "ce_error"))
    usable = (kl > _LEAST_KL) & (error > 0)
    if not usable.any():
        return 1.0, 0.0
    kl, ce, error = kl[usable], ce[usable], error[usable]
    weights = 1.0 / error**2
    slope = float((weights * kl * ce).sum() / (weights * kl * kl).sum())
    return max(slope, _LEAST_CE_PER_KL), float(np.mean(error**2 / kl))
