"""Quality by kind of text, decoded token by token with the KV cache: what a mean over wide windows does not show.

Every arm decodes the same text, as in the demo. Routing is that of decode steps, so a recency prior sees of a token
just what it sees when the model writes.

Shapes: S tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from remoe_adapt.errors import DataError
from remoe_adapt.evaluation.arms import Arm, Arms, arms_of
from remoe_adapt.evaluation.evaluate import CACHES, POLICIES, Tally, check_comparable
from remoe_adapt.evaluation.generation import room_for_reads
from remoe_adapt.evaluation.record import (
    Decoder,
    Recorder,
    fit_for_decode,
    inference,
    record_forward,
    window_tokens,
)
from remoe_adapt.eviction import check_replay
from remoe_adapt.expert_cache import expert_cache_of
from remoe_adapt.family import Family
from remoe_adapt.recency_settings import Recency

# Of fewer decoded tokens top-1 agreement is known to no better than two points or so, more than what points differ by.
LEAST_DECODED_TOKENS = 512
# The most fp32 values of one chunk of logits: 128 MiB. Of the arms, the base's and one more are there at a time.
_CHUNK_VALUES = 1 << 25

Documents = Sequence[Sequence[int]]


def evaluate_domains(
    model: nn.Module,
    domains: Mapping[str, Documents],
    *,
    family: Family | None = None,
    policies: Sequence[str] = POLICIES,
    caches: Sequence[float] = CACHES,
    priors: Sequence[Recency] = (),
    force: bool = False,
    against: nn.Module | None = None,
    least_tokens: int = LEAST_DECODED_TOKENS,
    on_tokens: Callable[[int], object] | None = None,
) -> list[dict[str, Any]]:
    """Decodes the base, the control, every stored point and `priors` on the base over token documents by domain:
    for each `{"domain", "tokens", "documents", "against", "base", "control", "points", "priors"}`, in order.

    domains: token ids of documents by the domain's name (see `texts.read_domains`). A document longer than the model's
        window (`window_tokens`) is decoded in pieces, each with a KV cache of its own.
    against: as in `evaluate`: another model of the same vocabulary, with which all are compared.
    least_tokens: a domain with fewer tokens to predict is refused.
    on_tokens: hears of tokens decoded, over all arms.

    The rows have the keys of `evaluate`; every token but a document's last is fed once, and the next one scored, so
    `tokens` is the number of both. The model's weights are the same afterwards, bit for bit.

    Raises:
        ConfigError, FingerprintMismatchError: as `evaluate`.
        DataError: a domain has too few tokens.
    """
    check_replay(policies, caches)
    check_domains(domains, least_tokens)
    if against is not None:
        check_comparable(model, against)
    with arms_of(model, family, priors=priors, force=force) as arms, ExitStack() as stack:
        # One for all arms: it hears every forward of the model, whichever arm runs.
        recorder = stack.enter_context(_decoding(model))
        runs = [_Run(model, recorder, arm) for arm in arms]
        if against is not None:
            # First: what is compared with runs before what is compared.
            runs.insert(0, _Run(against, stack.enter_context(_decoding(against))))
        found = []
        for name, documents in domains.items():
            for run in runs:
                run.tally = Tally()
            _decode(documents, runs, arms, on_tokens)
            tallies = {run.arm: run.tally for run in runs}
            control = None if arms.control is None else tallies[arms.control]
            rows = {run.arm: run.row(runs[0].tally, control, policies, caches) for run in runs}
            of_arms = {arm: row | arms.recency_of(arm) for arm, row in rows.items() if arm is not None}
            facts = {"domain": name, "tokens": runs[0].tally.tokens, "documents": len(documents)}
            compared = {"against": rows.get(None), **arms.by_kind(of_arms)}
            found.append(facts | compared | {"priors": [of_arms[arm] for arm in arms.priors]})
    return found


@dataclass(eq=False)
class _Run:
    """One arm of a comparison (None: the other model, as it is), what its routers choose, and its sums."""

    model: nn.Module
    recorder: Recorder
    arm: Arm | None = None
    tally: Tally = field(default_factory=Tally)

    def row(
        self, compared: Tally, control: Tally | None, policies: Sequence[str], caches: Sequence[float]
    ) -> dict[str, Any]:
        """The keys of `evaluate`."""
        trace = self.tally.trace(self.recorder.num_experts, phase="decode")
        return self.tally.row(
            None if self.arm is None else self.arm.strength, compared, control, trace, policies, caches
        )


@contextmanager
def _decoding(model: nn.Module) -> Iterator[Recorder]:
    """The model fit for steps of one token, and what its routers choose meanwhile."""
    with (
        record_forward(model) as recorder,
        inference(model),
        fit_for_decode(model),
        room_for_reads(expert_cache_of(model)),
    ):
        yield recorder


def _decode(documents: Documents, runs: Sequence[_Run], arms: Arms, on_tokens: Callable[[int], object] | None) -> None:
    window = min(window_tokens(run.model) for run in runs)
    for number, ids in enumerate(_pieces(documents, window)):
        decoders = [Decoder(run.model) for run in runs]
        for chunk in _chunks(ids, _vocabulary(runs[0].model)):
            compared_SV: Tensor | None = None
            for run, decoder in zip(runs, decoders, strict=True):
                if run.arm is not None:
                    arms.use(run.arm)
                logits_SV = torch.stack([decoder.feed([token]) for token in ids[chunk]])
                run.tally.ids[number, chunk.start] = run.recorder.take().numpy()
                targets_S = torch.tensor(ids[chunk.start + 1 : chunk.stop + 1], device=logits_SV.device)
                # Two models may be on different devices.
                there_SV = None if compared_SV is None else compared_SV.to(logits_SV.device)
                run.tally.add(logits_SV, targets_S, there_SV)
                compared_SV = logits_SV if compared_SV is None else compared_SV
                if on_tokens is not None:
                    on_tokens(len(targets_S))


def check_domains(domains: Mapping[str, Documents], least_tokens: int = LEAST_DECODED_TOKENS) -> None:
    """Raises DataError where there is no domain, or one has fewer tokens to predict than `least_tokens`."""
    if not domains:
        raise DataError("nothing to decode: no document has two tokens; give more text")
    for name, documents in domains.items():
        tokens = sum(max(0, len(ids) - 1) for ids in documents)
        if tokens < max(1, least_tokens):
            raise DataError(
                f"domain {name} has {tokens} token(s) to decode, {max(1, least_tokens)} are needed for figures that "
                "tell points apart: give more of its text, or leave it out"
            )


def _pieces(documents: Documents, window: int) -> Iterator[Sequence[int]]:
    """Parts of `window` tokens or fewer; the last token of one is the first of the next, so that each is predicted."""
    for ids in documents:
        for begin in range(0, len(ids) - 1, window - 1):
            yield ids[begin : begin + window]


def _chunks(ids: Sequence[int], vocabulary: int) -> Iterator[slice]:
    """The tokens of a piece that are fed, in slices: arms take turns, so that their logits need not be kept for all."""
    step = max(1, _CHUNK_VALUES // vocabulary)
    for begin in range(0, len(ids) - 1, step):
        yield slice(begin, min(begin + step, len(ids) - 1))


def _vocabulary(model: Any) -> int:
    size: int = model.config.get_text_config().vocab_size
    return size
