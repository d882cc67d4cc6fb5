"""What each operating point of a family costs and saves: the evaluation protocol, certificates, and task scores.

Protocol: windows of min(max positions, 1024) tokens, stride half, each token scored once, documents never joined; a
token's routing is taken from the window that scores it; EOR and cache replay run in text order, reset per document.
For each batch of windows the base runs once and every point after it, so no logits outlive their batch. Where all of
them are compared with another model, that one runs first.

Shapes: B windows of a batch, T tokens of a window, S scored targets of it, V vocabulary, N rows of B * S.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import math
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from remoe_adapt._support import check_extra, freed_memory_kept
from remoe_adapt.checkpoints import device_of
from remoe_adapt.errors import ConfigError, DataError
from remoe_adapt.evaluation.arms import Arm, Arms, arms_of
from remoe_adapt.evaluation.record import (
    Recorder,
    Window,
    inference,
    make_trace,
    record_forward,
    window_tokens,
    windows,
)
from remoe_adapt.eviction import check_replay, hit_rates, layer_rows
from remoe_adapt.expert_cache import arithmetic_of
from remoe_adapt.family import Family
from remoe_adapt.recency_settings import Recency
from remoe_adapt.texts import data_files
from remoe_adapt.traces import Trace, eor, load_entropy, switch_rate
from remoe_adapt.tuner import plain_base

# Of two operating points the loss of a token differs by about 0.3 nats (standard deviation): over this many tokens the
# perplexity ratio is known to about 1 %, which is what points of a family differ by.
LEAST_CERTIFIED_TOKENS = 1000
POLICIES, CACHES = ("lru",), (0.25, 0.5)
# The most fp32 values that one batch of logits has, and one piece of it while it is scored: 128 and 16 MiB.
_BATCH_VALUES, _PIECE_VALUES = 1 << 25, 1 << 22
_MAX_BATCH_TOKENS = 1 << 14
# Neighbouring tokens whose mean is one observation in standard errors.
_BLOCK_TOKENS = 32


@dataclass(eq=False)
class Tally:
    """Sums of one arm over scored tokens, its loss of each, and its routing by (document, first token)."""

    nll_nats: float = 0.0
    kl_nats: float = 0.0
    agreed: int = 0
    tokens: int = 0
    # In the order of scoring, which is the same for every arm, so that losses of two of them can be paired.
    losses: list[np.ndarray[Any, np.dtype[np.float32]]] = field(default_factory=list)
    ids: dict[tuple[int, int], np.ndarray[Any, np.dtype[np.int16]]] = field(default_factory=dict)

    def add(self, logits_NV: Tensor, targets_N: Tensor, base_logits_NV: Tensor | None) -> None:
        """Scores N next-token distributions; without logits to compare with these are their own, at divergence 0."""
        # Piece by piece, as the fp32 copies of a whole batch of logits would be several times its size.
        step = max(1, _PIECE_VALUES // logits_NV.shape[-1])
        for begin in range(0, len(targets_N), step):
            part = slice(begin, begin + step)
            base_part_NV = None if base_logits_NV is None else base_logits_NV[part]
            nll_N, kl_N = score(logits_NV[part], targets_N[part], base_part_NV)
            # Summed in fp64: over a hundred thousand tokens fp32 sums lose the digits in which points differ.
            self.nll_nats += float(nll_N.double().sum())
            self.kl_nats += float(kl_N.double().sum())
            self.agreed += len(nll_N) if base_part_NV is None else agreeing(logits_NV[part], base_part_NV)
            self.losses.append(nll_N.cpu().numpy())
        self.tokens += len(targets_N)

    def ce_error(self, compared: Tally) -> float | None:
        """Standard error of the difference of two arms' mean losses, nats, from the differences token by token; None of
        a single token.

        Means of neighbouring tokens are taken for independent, and not the tokens: one changed expert goes on having
        effects in the tokens that follow.
        """
        gaps_N = np.concatenate(self.losses).astype(np.float64) - np.concatenate(compared.losses)
        blocks = min(len(gaps_N), max(2, len(gaps_N) // _BLOCK_TOKENS))
        if blocks < 2:
            return None
        means = np.array([part.mean() for part in np.array_split(gaps_N, blocks)])
        return float(means.std(ddof=1)) / math.sqrt(blocks)

    def trace(self, num_experts: int, phase: str = "prefill") -> Trace:
        """The recorded routing in text order."""
        documents: dict[int, list[Any]] = {}
        # Batches are by window length, so windows of one document may have been scored in any order.
        for (document, _), ids_LTK in sorted(self.ids.items(), key=lambda item: item[0]):
            documents.setdefault(document, []).append(ids_LTK)
        joined = [np.concatenate(parts, axis=1) for parts in documents.values()]
        return make_trace(joined, num_experts, phase=phase)

    def row(
        self, strength: float | None, compared: Tally, control: Tally | None, trace: Trace,
        policies: Sequence[str] = POLICIES, caches: Sequence[float] = CACHES, per_layer: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        """The keys of `remoe eval --json`: see `evaluate`."""
        ce = self.nll_nats / self.tokens
        to_control = None if control is None else math.exp(ce - control.nll_nats / control.tokens)
        ratio, error = math.exp(ce - compared.nll_nats / compared.tokens), self.ce_error(compared)
        return {
            "strength": strength,
            "ce": ce,
            "ppl": math.exp(ce),
            "ppl_ratio": ratio,
            "ppl_ratio_error": None if error is None else ratio * error,
            "ppl_ratio_control": to_control,
            "kl": self.kl_nats / self.tokens,
            "top1_agreement": self.agreed / self.tokens,
            "eor": eor(trace),
            "switch_rate": switch_rate(trace),
            **hit_rates(trace, policies, caches),
            "load_entropy": load_entropy(trace),
            **({"per_layer": layer_rows(trace, policies, caches)} if per_layer else {}),
        }


def score(logits_NV: Tensor, targets_N: Tensor, base_logits_NV: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the targets and KL(P_base || P) of the whole distributions, both fp32 [N] in nats.

    The logsumexp form: `F.cross_entropy` takes many times as long on a CPU. The divergence is taken as
    <P_base, z_base - z> - (log Z_base - log Z), which is exactly 0 for equal logits.
    """
    logits_NV = logits_NV.float()
    log_z_N = logits_NV.logsumexp(dim=-1)
    nll_N = log_z_N - logits_NV.gather(-1, targets_N[:, None])[:, 0]
    if base_logits_NV is None:
        return nll_N, torch.zeros_like(nll_N)
    base_NV = base_logits_NV.float()
    base_log_z_N = base_NV.logsumexp(dim=-1)
    base_p_NV = (base_NV - base_log_z_N[:, None]).exp()
    # A vocabulary entry that both models mask with -inf would make NaN of the sum, though it has probability 0.
    gap_NV = (base_NV - logits_NV).nan_to_num_(nan=0.0)
    return nll_N, (base_p_NV * gap_NV).sum(dim=-1) - (base_log_z_N - log_z_N)


def agreeing(logits_NV: Tensor, base_logits_NV: Tensor) -> int:
    """Rows in which both hold the same token for the likeliest; of equally likely ones the first counts."""
    return int((logits_NV.argmax(dim=-1) == base_logits_NV.argmax(dim=-1)).sum())


def evaluate(
    model: nn.Module,
    documents: Sequence[Sequence[int]],
    *,
    family: Family | None = None,
    policies: Sequence[str] = POLICIES,
    caches: Sequence[float] = CACHES,
    window: int | None = None,
    priors: Sequence[Recency] = (),
    force: bool = False,
    per_layer: bool = False,
    against: nn.Module | None = None,
    on_tokens: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Measures the base, the control, every stored point and `priors` on the base over token documents:
    `{"base", "control", "points", "priors"}`.

    against: another model of the same vocabulary, with which all of them are compared instead of the base: the model
        before it was quantised, for instance. Its own row is `against` then, which is None without one.

    Each row holds `strength` (0 for the base, None for the control), `ce` (nats per token), `ppl`, `ppl_ratio` (to the
    base), `ppl_ratio_error` (its standard error; None of one token), `ppl_ratio_control` (to the control; None without
    one), `kl` (mean over scored tokens of KL(P_base || P_point) of the next-token distributions, nats),
    `top1_agreement` (share of scored tokens for which it holds the same token for the likeliest as the base), `eor`,
    `switch_rate`, hit rates `policy@cache` and `policy@cache/lookup` (see `eviction.simulate`) and `load_entropy`, with
    `per_layer` the rows of `layer_rows` under that name, and with a recency prior `recency` and (mean) `recency_gain`;
    beside them `tokens` (scored), `documents`, `window` and `arithmetic` (`{"name", "exact"}` of the model's experts).
    The model's weights are the same afterwards, bit for bit. `window` shortens the protocol's windows; `on_tokens`
    hears of tokens done, over all arms.

    Raises:
        ConfigError: a window below 2 tokens, an unknown policy or a bad cache fraction; `against` is the model itself,
            or has another vocabulary.
        DataError: no document has two tokens.
        FingerprintMismatchError: the family is of another base.
    """
    check_replay(policies, caches)
    if against is not None:
        check_comparable(model, against)
    # Both score the same windows: those that fit into the shorter one's positions.
    length = min(window_tokens(each, window) for each in (model, against) if each is not None)
    plan = windows([len(ids) for ids in documents], length)
    if not plan:
        raise DataError("nothing to score: no document has two tokens; give more text or a higher --max-tokens")
    with (
        arms_of(model, family, priors=priors, force=force) as arms,
        measured_model(model) as measured,
        measured_model(against) as compared,
        freed_memory_kept(device_of(model).type),
    ):
        assert measured is not None
        tallies = tally_arms(documents, plan, arms, measured, compared, on_tokens)
        base = tallies[arms.base] if compared is None else compared.tally
        control = None if arms.control is None else tallies[arms.control]

        def row(strength: float | None, tally: Tally, num_experts: int) -> dict[str, Any]:
            return tally.row(strength, base, control, tally.trace(num_experts), policies, caches, per_layer)

        experts = measured.recorder.num_experts
        rows = {arm: row(arm.strength, tally, experts) | arms.recency_of(arm) for arm, tally in tallies.items()}
        other = None if compared is None else row(None, compared.tally, compared.recorder.num_experts)
    return {
        "against": other,
        **arms.by_kind(rows),
        "priors": [rows[arm] for arm in arms.priors],
        "tokens": base.tokens,
        "documents": len({part.document for part in plan}),
        "window": length,
        "arithmetic": arithmetic_of(model),
    }


def tally_arms(
    documents: Sequence[Sequence[int]],
    plan: Sequence[Window],
    arms: Arms,
    measured: Measured,
    compared: Measured | None = None,
    on_tokens: Callable[[int], object] | None = None,
) -> dict[Arm, Tally]:
    """What every arm scored and chose over the windows of `plan`, the base (or `compared`) being what KL is to."""
    tallies = {arm: Tally() for arm in arms}
    config: Any = measured.model.config
    for batch in _batches(plan, config.get_text_config().vocab_size):
        _run_batch(documents, batch, arms, tallies, measured, compared)
        if on_tokens is not None:
            on_tokens(sum(part.end - part.fresh for part in batch) * (len(tallies) + (compared is not None)))
    return tallies


def check_comparable(model: nn.Module, against: nn.Module) -> None:
    """Raises ConfigError when next-token distributions of the two cannot be compared."""
    if plain_base(model) is plain_base(against):
        raise ConfigError("against: this is the model itself, whose routers change while it is measured: load another.")
    check_vocabularies(model.config, against.config)


def check_vocabularies(config: Any, against: Any) -> None:
    """Raises ConfigError when the models of these configurations have vocabularies of different sizes."""
    mine, theirs = (each.get_text_config().vocab_size for each in (config, against))
    if mine != theirs:
        raise ConfigError(
            f"the model predicts one of {mine} tokens, the one it is to be compared with one of {theirs}: compare with "
            "a model of the same vocabulary."
        )


@dataclass(eq=False)
class Measured:
    """A model that is run, what its routers choose, and, for one that the others are compared with, its sums."""

    model: nn.Module
    recorder: Recorder
    tally: Tally = field(default_factory=Tally)


@contextmanager
def measured_model(model: nn.Module | None) -> Iterator[Measured | None]:
    """In eval mode, without gradients; None without a model."""
    if model is None:
        yield None
        return
    with record_forward(model) as recorder, inference(model):
        yield Measured(model, recorder)


def _batches(plan: Sequence[Window], vocabulary: int) -> Iterator[list[Window]]:
    """Windows of equal length and equal share of targets together, so that nothing is padded."""
    alike: dict[tuple[int, int], list[Window]] = {}
    for part in plan:
        alike.setdefault((part.end - part.begin, part.scored), []).append(part)
    for (length, scored), parts in alike.items():
        # The vocabulary bounds the batch too: logits are its largest tensor by far.
        size = max(1, min(_MAX_BATCH_TOKENS // length, _BATCH_VALUES // ((scored + 1) * vocabulary)))
        for begin in range(0, len(parts), size):
            yield parts[begin : begin + size]


def _run_batch(
    documents: Sequence[Sequence[int]],
    batch: Sequence[Window],
    arms: Arms,
    tallies: Mapping[Arm, Tally],
    measured: Measured,
    compared: Measured | None,
) -> None:
    base_logits_NV: Tensor | None = None
    if compared is not None:
        base_logits_NV = _score_batch(documents, batch, compared, compared.tally, None)
        # The two may be on different devices.
        base_logits_NV = base_logits_NV.to(device_of(measured.model))
    for arm, tally in tallies.items():
        arms.use(arm)
        # All arms run on one batch before the next, so that the base's logits need not be kept for the whole text.
        logits_NV = _score_batch(documents, batch, measured, tally, base_logits_NV)
        if base_logits_NV is None:
            base_logits_NV = logits_NV


def _score_batch(
    documents: Sequence[Sequence[int]],
    batch: Sequence[Window],
    measured: Measured,
    tally: Tally,
    base_logits_NV: Tensor | None,
) -> Tensor:
    """Runs a model as it is over a batch, counts that in `tally`, and returns the logits [N, V]."""
    model, scored = measured.model, batch[0].scored
    ids_BT = torch.tensor([documents[part.document][part.begin : part.end] for part in batch], device=device_of(model))
    targets_N = ids_BT[:, ids_BT.shape[1] - scored :].flatten()
    logits_NV = next_token_logits(model, ids_BT, scored).flatten(0, 1)
    ids_LBTK = measured.recorder.take().unflatten(1, ids_BT.shape)
    for row, part in enumerate(batch):
        # Only the tokens that this window owns: the others were recorded with more context by the window before.
        tally.ids[part.document, part.fresh] = ids_LBTK[:, row, part.fresh - part.begin :].numpy()
    tally.add(logits_NV, targets_N, base_logits_NV)
    return logits_NV


def next_token_logits(model: nn.Module, ids_BT: Tensor, scored: int) -> Tensor:
    """Logits [B, S, V] that predict the last `scored` tokens of each row; earlier ones are not computed if possible."""
    # The head over a large vocabulary costs more than the model itself, and most windows score only their second half.
    can_leave_out = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    keep = {"logits_to_keep": scored + 1} if can_leave_out else {}
    logits_BTV: Tensor = model(input_ids=ids_BT, use_cache=False, **keep).logits
    return logits_BTV[:, logits_BTV.shape[1] - scored - 1 : -1]


def check_data(paths: Sequence[str | Path], max_tokens: int | None = None) -> None:
    """Before a model is loaded: raises DataError for files that are not there, ConfigError for fewer tokens than
    `read_shared` can share among them."""
    files = data_files(paths)
    if max_tokens is not None and max_tokens < 2 * len(files):
        raise ConfigError(f"--max-tokens {max_tokens} is too few for {len(files)} data file(s): each needs two tokens.")


@cache
def commit() -> str | None:
    """Commit of the checkout this package runs from, with "+" when it has changes; None outside a checkout.

    As it was when first asked: results are files of the checkout themselves.
    """
    package = Path(__file__).resolve().parents[1]
    if not (package.parent / ".git").exists():
        return None
    # `--exclude=*` leaves tags out: a result names the commit itself, which a moved tag cannot falsify.
    command = ["git", "-C", str(package), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def check_certifiable(scored_tokens: int) -> None:
    """Raises DataError when a certificate needs more scored tokens than these."""
    if scored_tokens < LEAST_CERTIFIED_TOKENS:
        raise DataError(
            f"{scored_tokens} scored tokens are too few for a certificate, which needs {LEAST_CERTIFIED_TOKENS} to "
            "know a perplexity ratio to about 1 %: give more text"
        )


def certify(family: Family, result: Mapping[str, Any]) -> None:
    """Writes what `evaluate` measured into the family: one certificate per point and one of the control.

    `result["data"]` (names of the data) goes into each, beside the scored tokens, the arithmetic of the experts, the
    base's own CE, EOR and hit rates, the version and the commit; with `result["domains"]`, of `evaluate_domains`, the
    quality by domain, and with `per_layer` rows these.

    Raises:
        ConfigError: another model than the base was compared with: a certificate is of a point and its base.
        DataError: fewer tokens were scored than a certificate needs.
        FamilyError: the family has no such point.
    """
    if result.get("against"):
        raise ConfigError("these figures compare with another model than the base: certify a family without against.")
    # A certificate is believed without its text at hand, so few tokens must not make one.
    check_certifiable(result["tokens"])
    rows = [*result["points"], *([result["control"]] if result["control"] else [])]
    for row in rows:
        family.set_certificate(row["strength"], certificate_of(row, result))


def certificate_of(row: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """The certificate that a row of `evaluate` makes, with what was the same for all rows of its `result`."""
    facts = {key: result[key] for key in ("data", "tokens", "window", "arithmetic") if key in result}
    # Version and commit go into each certificate, since points of one family may be measured at different times.
    facts |= {"remoe_adapt": importlib.metadata.version("remoe-adapt"), "commit": commit()}
    # Without the base's own figures nobody could say of a certificate how many misses fewer these are.
    facts["base"] = {key: value for key, value in result["base"].items() if key in ("ce", "eor") or "@" in key}
    if domains := _by_domain(result, row["strength"]):
        facts["domains"] = domains
    return {key: value for key, value in row.items() if key != "strength"} | facts


def _by_domain(result: Mapping[str, Any], strength: float | None) -> dict[str, Any]:
    """What `evaluate_domains` found of a point (None: the control), by domain; empty where it did not run."""
    return {
        domain["domain"]: {"tokens": domain["tokens"]}
        | {key: row[key] for key in ("ppl_ratio", "kl", "top1_agreement")}
        for domain in result.get("domains", ())
        for row in ([domain["control"]] if strength is None else domain["points"])
        if row["strength"] == strength
    }


def task_manager(tasks: Sequence[str], folder: str | Path | None = None) -> Any:
    """lm-eval's index of tasks, which knows all of `tasks`; `folder` holds task files beside its own.

    Raises:
        ConfigError: no task is named.
        DataError: lm-eval does not know a task.
        MissingDependencyError: lm-eval is not installed.
    """
    if not tasks:
        raise ConfigError("--tasks names none: write them as arc_easy,gsm8k")
    check_extra("lm_eval", "eval", "task scores need lm-eval")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise DataError(f"lm-eval has no task {', '.join(map(repr, unknown))}: see `lm-eval ls tasks`")
    return manager


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    family: Family | None,
    tasks: Sequence[str],
    *,
    folder: str | Path | None = None,
    limit: int | None = None,
    priors: Sequence[Recency] = (),
    force: bool = False,
    against: nn.Module | None = None,
) -> dict[str, Any]:
    """Scores of lm-eval tasks per arm: `{"base", "control", "points", "priors"}` of
    `{strength, tasks: {task: {metric: value}}}`, with a recency prior `recency` and (mean) `recency_gain` too.

    `folder` holds task files of your own beside those that lm-eval knows; `limit` is examples per task; `priors` are
    tried on the base; `against` is another model, whose scores are `against` then (None without one).

    Raises as `task_manager` and `check_priors`; FingerprintMismatchError when the family is of another base (unless
    `force`).
    """
    manager = task_manager(tasks, folder)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    def wrapped(scored: nn.Module) -> Any:
        # One at a time, so that no padding reaches the routers and a score does not depend on its neighbours.
        return HFLM(pretrained=scored, tokenizer=tokenizer, batch_size=1)

    def scores(scored: Any, strength: float | None) -> dict[str, Any]:
        found = lm_eval.simple_evaluate(
            model=scored, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False
        )
        # lm-eval puts names and aliases among the metrics.
        values = {
            task: {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
            for task, metrics in found["results"].items()
        }
        return {"strength": strength, "tasks": values}

    other: dict[str, Any] | None = None
    if against is not None:
        with inference(against):
            other = scores(wrapped(against), None)
    rows: dict[Arm, dict[str, Any]] = {}
    with arms_of(model, family, priors=priors, force=force) as arms, inference(model):
        of_model = wrapped(model)
        for arm in arms:
            arms.use(arm)
            rows[arm] = scores(of_model, arm.strength) | arms.recency_of(arm)
    return {"against": other, **arms.by_kind(rows), "priors": [rows[arm] for arm in arms.priors]}
