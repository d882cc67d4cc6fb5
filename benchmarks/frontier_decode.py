"""Decoding many rows of text side by side, one token a step, each row with simulated expert caches of its own.

Shapes: R rows of text of S tokens each, P settings of a rule, N = P * R rows of a batch (all rows of the first setting,
then of the second), L routers, E experts, K chosen, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from remoe_adapt.errors import UnsupportedRouterError
from remoe_adapt.eviction.replay import cache_capacity
from remoe_adapt.gating import RouterForward, router_forward
from remoe_adapt.gating.cost import kept_weights
from remoe_adapt.libraries import Patches, cache_keyword, hook, put_on
from remoe_adapt.routers import RouterRef, RouterSpec, best_ids, survey_routers
from remoe_adapt.traces import Trace

Setting = Mapping[str, float]


class Eviction(ABC):
    """What the expert caches of all rows keep."""

    def begin(self, specs: Sequence[RouterSpec], rows: int) -> None:
        """Empty caches: nothing was used yet."""
        self.step = [0] * len(specs)

    @abstractmethod
    def use(self, layer: int, ids_NK: Tensor, probabilities_NE: Tensor | None) -> None:
        """One token of each row was given these experts."""

    @abstractmethod
    def worth_NE(self, layer: int) -> Tensor:
        """What keeping each expert is worth; the least go first. No two experts of a row are worth the same."""


class Lru(Eviction):
    """Drops the least recently used; of one token's experts the last is the newest."""

    def begin(self, specs: Sequence[RouterSpec], rows: int) -> None:
        super().begin(specs, rows)
        self.last = [torch.full((rows, spec.num_experts), -1.0, dtype=torch.float64) for spec in specs]

    def use(self, layer: int, ids_NK: Tensor, probabilities_NE: Tensor | None) -> None:
        k = ids_NK.shape[1]
        first = self.step[layer] * k
        self.step[layer] += 1
        self.last[layer].scatter_(1, ids_NK, torch.arange(first, first + k, dtype=torch.float64).expand(ids_NK.shape))

    def worth_NE(self, layer: int) -> Tensor:
        return self.last[layer]


class Lrfu(Lru):
    """Drops the least sum of `decay ** age` over its uses; of equals the least recently used."""

    # A double holds 2**53 steps between two neighbours: what tells equals apart moves no others past each other.
    _TIE = 2.0**-40

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def begin(self, specs: Sequence[RouterSpec], rows: int) -> None:
        super().begin(specs, rows)
        self.uses = [torch.zeros(rows, spec.num_experts, dtype=torch.float64) for spec in specs]

    def use(self, layer: int, ids_NK: Tensor, probabilities_NE: Tensor | None) -> None:
        super().use(layer, ids_NK, probabilities_NE)
        uses_NE = self.uses[layer].mul_(self.decay)
        uses_NE.scatter_add_(1, ids_NK, torch.ones(ids_NK.shape, dtype=torch.float64))

    def worth_NE(self, layer: int) -> Tensor:
        return self.uses[layer] * (1.0 + self._TIE * self.last[layer])


class Caches:
    """A simulated expert cache for every row and router, of `max(K, floor(share * E))` experts and token-atomic: all K
    look-ups of a token see the cache as the token before left it; all are let in, then it is cut back to its size."""

    def __init__(self, specs: Sequence[RouterSpec], rows: int, share: float, eviction: Eviction) -> None:
        self.eviction = eviction
        self.capacity = [cache_capacity(share, spec.num_experts, spec.top_k) for spec in specs]
        self.resident = [torch.zeros(rows, spec.num_experts, dtype=torch.bool) for spec in specs]
        self.misses_N = torch.zeros(rows, dtype=torch.int64)
        self.ids: list[list[Tensor]] = [[] for _ in specs]
        eviction.begin(specs, rows)

    def use(self, layer: int, ids_NK: Tensor, probabilities_NE: Tensor | None = None) -> None:
        """Look up what one token of each row was given."""
        resident_NE = self.resident[layer]
        self.ids[layer].append(ids_NK.to(torch.int16))
        self.misses_N += ids_NK.shape[1] - resident_NE.gather(1, ids_NK).sum(dim=1)
        self.eviction.use(layer, ids_NK, probabilities_NE)
        resident_NE.scatter_(1, ids_NK, True)
        worth_NE = self.eviction.worth_NE(layer).masked_fill(~resident_NE, -torch.inf)
        resident_NE &= worth_NE >= worth_NE.topk(self.capacity[layer]).values[:, -1:]


class Rule(ABC):
    """A way to choose experts that knows what is resident, with one setting for each group of rows in a batch."""

    name: ClassVar[str]
    # Whether weights are over the sum of the router's own best, as in mode `cost`; else over that of the chosen.
    keeps_weights: ClassVar[bool] = False

    def __init__(self, settings: Sequence[Setting]) -> None:
        self.settings = list(settings)

    def begin(self, specs: Sequence[RouterSpec], rows: int, caches: Caches) -> None:
        """`rows` rows of every setting start."""
        self.specs, self.rows, self.caches = specs, rows, caches

    def each_N1(self, name: str) -> Tensor:
        """This number of every row's setting, [N, 1]."""
        return torch.tensor([float(setting[name]) for setting in self.settings]).repeat_interleave(self.rows)[:, None]

    def label(self, setting: Setting) -> str:
        """How a point of the curve is called."""
        return f"{self.name} " + ", ".join(f"{key} {value:g}" for key, value in setting.items())

    @abstractmethod
    def ranked_NE(self, layer: int, choice_NE: Tensor, probabilities_NE: Tensor, resident_NE: Tensor) -> Tensor:
        """Values whose K largest are chosen. choice_NE: fp32, what the router itself ranks."""


class _Simulation:
    """The gate of every router while rules choose (see `gating.StepGate`): rank by the rule, weigh by the router."""

    launch = None

    def __init__(self, rule: Rule, caches: Caches) -> None:
        self.rule, self.caches, self.count = rule, caches, len(caches.misses_N)

    def step_of(self, count: int) -> _Simulation:
        """Itself, always."""
        return self

    def gate(
        self, layer: int, logits_NE: Tensor, k: int, spec: RouterSpec, bias_E: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As StepGate."""
        choice_NE = spec.choice_scores(logits_NE, bias_E).float()
        probabilities_NE = spec.probabilities(logits_NE)
        ranked_NE = self.rule.ranked_NE(layer, choice_NE, probabilities_NE, self.caches.resident[layer])
        ids_NK = best_ids(ranked_NE, k)
        self.caches.use(layer, ids_NK, probabilities_NE)
        if self.rule.keeps_weights:
            return kept_weights(logits_NE, ids_NK, best_ids(choice_NE, k), spec), ids_NK
        return spec.expert_weights(logits_NE, ids_NK), ids_NK

    def note(self, layer: int, ids_TK: Tensor) -> None:
        """Nothing: no class chooses."""


@dataclass(frozen=True, eq=False)
class Decoded:
    """What one setting gave on R rows. ce_R, kl_R: means over a row's tokens in nats, of the next token and from the
    base's distribution to this one. agree_R: share of tokens with the base's most likely next one. misses_R: of all
    layers. trace: one document a row."""

    ce_R: Tensor
    kl_R: Tensor
    agree_R: Tensor
    misses_R: Tensor
    trace: Trace


@dataclass(eq=False)
class Text:
    """Rows that are decoded: ids_RS [R, S + 1], where the last token is only predicted. base_log_p: log-probabilities
    of the base, [R, V] for each step, filled by the first decoding and compared with by all others."""

    ids_RS: Tensor
    base_log_p: list[Tensor] | None = None

    @property
    def steps(self) -> int:
        """Tokens of a row that are fed."""
        return self.ids_RS.shape[1] - 1


def decode(model: nn.Module, text: Text, eviction: Eviction, share: float, rule: Rule | None = None) -> list[Decoded]:
    """Feed the rows token by token, once for every setting of the rule side by side, and look on.

    rule: None: the model's own routers choose, with whatever is put on them, and the caches only count.
    Raises UnsupportedRouterError for a router whose choice cannot be set, as the router itself says why.
    """
    refs = survey_routers(model).usable()
    specs = [ref.spec for ref in refs]
    settings = 1 if rule is None else len(rule.settings)
    rows = len(text.ids_RS)
    caches = Caches(specs, settings * rows, share, eviction)
    with _choosing(refs, rule, caches, rows), torch.inference_mode():
        scores = _scores(model, text, settings)
    ids_LNSK = torch.stack([torch.stack(ids, dim=1) for ids in caches.ids])
    ce_PR, kl_PR, agree_PR, misses_PR = (values.reshape(settings, rows) for values in (*scores, caches.misses_N))
    return [
        Decoded(ce_PR[p], kl_PR[p], agree_PR[p], misses_PR[p], _trace(ids_LNSK[:, p * rows : (p + 1) * rows], specs[0]))
        for p in range(settings)
    ]


@contextmanager
def _choosing(refs: Sequence[RouterRef], rule: Rule | None, caches: Caches, rows: int) -> Iterator[None]:
    """The routers choose by the rule, or are watched by the caches."""
    with Patches() as patches:
        if rule is not None:
            rule.begin([ref.spec for ref in refs], rows, caches)
            simulation = _Simulation(rule, caches)
        for layer, ref in enumerate(refs):
            if rule is None:
                patches.add(hook(ref.outermost, "forward", _watch(caches, layer, ref.spec)))
                continue
            forward = router_forward(ref)
            if not isinstance(forward, RouterForward):
                raise UnsupportedRouterError(f"router {ref.name} keeps its own choice: {forward}")
            forward.steps, forward.layer = simulation, layer
            patches.add(put_on(ref.module, "forward", forward))
        yield


def _watch(caches: Caches, layer: int, spec: RouterSpec) -> Callable[[nn.Module, Any, Any], None]:
    def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
        found = spec.read(output)
        caches.use(layer, found.ids_TK, spec.probabilities(found.logits_TE))

    return look


class _RoomyLayer(DynamicLayer):
    """Keys and values of one layer, with room for more tokens behind them: to copy all of them for every new token, as
    a DynamicLayer does, takes longer than the model itself."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._room = [new.new_empty(0) for new in (key_states, value_states)]
        self._held = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held, self._held = self._held, self._held + key_states.shape[-2]
        for place, new in enumerate((key_states, value_states)):
            if held == 0 or self._held > self._room[place].shape[-2]:
                grown = new.new_empty(*new.shape[:-2], 2 * self._held + 62, new.shape[-1])
                if held:
                    grown[..., :held, :] = self._room[place][..., :held, :]
                self._room[place] = grown
            self._room[place][..., held : self._held, :] = new
        self.keys, self.values = (room[..., : self._held, :] for room in self._room)
        return self.keys, self.values


def _scores(model: nn.Module, text: Text, settings: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross entropy, KL and top-1 agreement of each row [N]."""
    rows, steps = len(text.ids_RS), text.steps
    made: list[Tensor] = []
    ce_N, kl_N, agree_N = (torch.zeros(settings * rows) for _ in range(3))
    cache = Cache(layer_class_to_replicate=_RoomyLayer)
    for step in range(steps):
        fed_N1 = text.ids_RS[:, step].repeat(settings)[:, None]
        logits_NV = model(input_ids=fed_N1, **{cache_keyword(model): cache}, use_cache=True).logits[:, -1].float()
        log_p_NV = logits_NV.log_softmax(dim=-1)
        base_RV = log_p_NV[:rows] if text.base_log_p is None else text.base_log_p[step]
        made.append(base_RV)
        target_N1 = text.ids_RS[:, step + 1].repeat(settings)[:, None]
        ce_N -= log_p_NV.gather(1, target_N1)[:, 0]
        log_p_PRV = log_p_NV.reshape(settings, rows, -1)
        kl_N += (base_RV.exp() * (base_RV - log_p_PRV)).sum(dim=-1).flatten()
        agree_N += (base_RV.argmax(dim=-1) == log_p_PRV.argmax(dim=-1)).float().flatten()
    text.base_log_p = made
    return ce_N / steps, kl_N / steps, agree_N / steps


def _trace(ids_LRSK: Tensor, spec: RouterSpec) -> Trace:
    layers, rows, steps, k = ids_LRSK.shape
    starts = [row * steps for row in range(rows)]
    meta = {"num_experts": spec.num_experts, "document_starts": starts, "phase": "decode"}
    return Trace(ids_LRSK.reshape(layers, rows * steps, k).numpy(), meta)
