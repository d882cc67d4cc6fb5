"""What a recency prior in an engine's callback is, whoever computes it: C, or numpy where there is no compiler."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass

from remoe_adapt.errors import ConfigError
from remoe_adapt.recency_settings import Recency


@dataclass(frozen=True, slots=True)
class PriorStatus:
    """Whether and how the prior of a context acts, and what it has done since the context was made.

    acts: it may rewrite ids (at a gain above 0); reason: why not, "on" if so. computed_by: "c" or "numpy"; why_numpy:
    why not in C. gains: of each layer with experts, in model order, and layers: their numbers in the file. share: of a
    layer's experts those that the mode prefers, 0 in modes without. tokens: rows of the first such layer. changed_rows:
    rows of any layer whose ids or their order changed; swapped: ids that took another one's place. eor: share of
    experts that the token before used too. restarts and rewinds:
    sequences whose state began anew because it could not be followed, or went back. refused_rows: rows left alone
    because a check failed; lost_rows: rows of no known sequence. is_blind: residency cannot be told from memory
    (`resident` does nothing). microseconds_per_layer: in the callback, wall time.
    """

    acts: bool
    reason: str
    computed_by: str
    why_numpy: str
    mode: str
    gains: tuple[float, ...]
    decay: float
    share: float
    layers: tuple[int, ...]
    tokens: int
    changed_rows: int
    swapped: int
    eor: float
    restarts: int
    rewinds: int
    refused_rows: int
    lost_rows: int
    is_blind: bool
    microseconds_per_layer: float


@dataclass(frozen=True, slots=True)
class EngineCacheStatus:
    """The expert cache of a memory-mapped model: missing experts are read at the stop where their ids are known.

    acts: it does; reason: why not, "on" if so. budget_bytes: of experts that are to stay in memory; experts_bytes: of
    all; held_bytes: of those that are held. hits, misses: experts that were held when a layer chose them, or not, once
    for each layer served. Of the misses: stale ones were held by our account, but the kernel had taken them back (a
    budget above what the machine leaves), spilled ones had no room (a prompt's, mostly). dropped: given back.
    read_bytes: asked of the kernel. failed: pieces of advice that it refused.
    """

    acts: bool
    reason: str
    budget_bytes: int
    experts_bytes: int
    held_bytes: int
    hits: int
    misses: int
    stale: int
    spilled: int
    dropped: int
    read_bytes: int
    failed: int


class EnginePrior(abc.ABC):
    """The prior of one context: `callback` and `user_data` are what the context is made with.

    Before each decode `rows` names the rows of the batch; positions are those of the sequences, by which the state
    follows: position 0 begins anew, an earlier one than the next goes back. One thread at a time.
    """

    callback: int  # address of a ggml_backend_sched_eval_callback
    user_data: int
    recency: Recency

    @abc.abstractmethod
    def rows(self, sequences: Sequence[int], positions: Sequence[int]) -> None:
        """The rows of the next batch, all with outputs."""

    @abc.abstractmethod
    def settle(self) -> None:
        """A first decode has ended: decide whether the prior may act, count from here on, forget its tokens."""

    @abc.abstractmethod
    def reset(self) -> None:
        """All sequences begin anew."""

    @abc.abstractmethod
    def copy(self, source: int, target: int) -> None:
        """The sequence `target` goes on from the state of `source`."""

    @abc.abstractmethod
    def ask(self, tensor: int, ask: bool) -> bool:
        """The callback, called from Python."""

    @abc.abstractmethod
    def status(self) -> PriorStatus:
        """What it does."""

    def hold(self, size_bytes: int, share: float = 0.0) -> None:
        """Keep so many bytes of experts in memory, and read missing ones ahead, from the next layer on; 0: neither.

        share: of all experts' bytes, in place of size_bytes where it is above 0. Raises ConfigError where it cannot be.
        """
        raise ConfigError("reading experts ahead needs the prior in C.")

    def cache_status(self) -> EngineCacheStatus | None:
        """What the expert cache does; None where there can be none."""
        return None

    @abc.abstractmethod
    def close(self) -> None:
        """Free it; the context must be gone."""

    @abc.abstractmethod
    def _layers(self) -> tuple[int, ...]:
        """Numbers of the layers with experts that were seen."""

    @abc.abstractmethod
    def _write(self, recency: Recency) -> None:
        """Let these settings act from the next layer on."""

    def set(self, recency: Recency) -> None:
        """Other settings from the next layer on, in mid-generation too. Raises ConfigError for a wrong number of
        gains."""
        if isinstance(recency.gain, tuple):
            layers = len(self._layers())
            if len(recency.gain) != layers:
                raise ConfigError(f"{len(recency.gain)} recency gains for {layers} layers with experts: one for each.")
        self.recency = recency
        self._write(recency)


def budget_of(value: str | int | float) -> tuple[int, float]:
    """Bytes, and the share of all experts that counts in their place where it is above 0. Raises ConfigError."""
    # An expert cache is of the package with its torch, which programs that trace llama.cpp do without.
    from remoe_adapt.expert_cache import budget_in_bytes, check_budget

    check_budget("expert_cache", value)
    return (0, value) if isinstance(value, float) else (budget_in_bytes(value, 0), 0.0)
