"""What recency priors and a family cost and save in llama.cpp: a memory-mapped GGUF, decoded token by token.

Documents are cut into pieces of at most a window, each of which begins with an empty context; every token is decoded
once, as in use: computed many at once, tokens share reads, and a prior would seem to save less than it does. What the
mode `resident` chooses depends on what is in memory, so arms never take turns on a text: each decodes all of it before
the next one begins, after some tokens that do not count. Of the base its logits are kept for the others' divergence, in
a file in the folder for temporary files that takes itself out of the page cache, 4 bytes for each vocabulary entry of
each scored token.

Shapes: T tokens of a piece, N scored targets, V vocabulary, L layers with experts, K experts per token.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remoe_adapt._support import disk_reads, printable, size_text, usable_cores
from remoe_adapt.checkpoints import shard_paths
from remoe_adapt.engines.gguf import export_gguf_lora
from remoe_adapt.engines.llamacpp.in_memory import share_in_memory
from remoe_adapt.engines.llamacpp.in_process import VERSION, LlamaModel, LlamaVocabulary
from remoe_adapt.engines.llamacpp.record import taken
from remoe_adapt.errors import ConfigError, DataError, RouterNotFoundError
from remoe_adapt.evaluation import CACHES, POLICIES, Tally, one_kind, window_length
from remoe_adapt.eviction import check_replay
from remoe_adapt.expert_cache.gguf import ARCHITECTURES
from remoe_adapt.family import Family, FamilyPoint
from remoe_adapt.recency_settings import DEFAULT_MODE, Recency
from remoe_adapt.routers import GGUF_ARCH

WARM_TOKENS = 32
_MIB = 1 << 20
# So much of the base's logits may be in the page cache.
_CACHED_BYTES = 16 << 20
_UNLIMITED = (
    "all of the file is in memory, so nothing is read, and what a prior saves cannot be seen: run it under a memory "
    "limit (systemd-run --scope -p MemoryMax=4G remoe eval ...)"
)


@dataclass(frozen=True, kw_only=True)
class GgufMeasuring:
    """priors: on the base, each an arm; they may be of several modes.
    family: its points and its control are arms too, as LoRAs of scale 1.
    renormalise: see `LlamaModel`.
    window: the most tokens of a piece; None: min(trained context, 1024).
    warm_tokens: decoded by each arm before it counts.
    threads: of the engine; None: all cores.
    expert_cache: experts that stay in memory, missing ones being read ahead, as of `LlamaModel`; None: page faults.
    force: take a family of another base.
    """

    priors: Sequence[Recency] = ()
    family: Family | None = None
    renormalise: bool = False
    window: int | None = None
    policies: Sequence[str] = POLICIES
    caches: Sequence[float] = CACHES
    per_layer: bool = False
    warm_tokens: int = WARM_TOKENS
    threads: int | None = None
    expert_cache: str | int | float | None = None
    force: bool = False


@dataclass(frozen=True, eq=False)
class _Arm:
    """`kind`: where its row stands in the result; strength as in `evaluation.evaluate`; lora: its file."""

    kind: str
    strength: float | None
    recency: Recency | None = None
    lora: str | None = None


@dataclass(eq=False)
class _Found:
    """Sums of one arm over decoded tokens; bytes and faults are None where the system does not tell."""

    arm: _Arm
    tally: Tally = field(default_factory=Tally)
    decoded: int = 0
    read_bytes: int | None = 0
    faults: int | None = 0
    choices: int = 0
    swapped: int = 0
    refused: int = 0
    in_memory: float | None = None
    gain: float = 0.0
    why_numpy: str = ""

    def count(self, before: tuple[int | None, int | None], after: tuple[int | None, int | None]) -> None:
        """One more token, between whose ends the counters of the process went so."""
        self.decoded += 1
        self.read_bytes, self.faults = (
            None if so_far is None or then is None or now is None else so_far + now - then
            for so_far, then, now in zip((self.read_bytes, self.faults), before, after, strict=True)
        )

    def row(self) -> dict[str, Any]:
        """The keys beside those of `Tally.row`."""
        found: dict[str, Any] = {
            "mib_per_token": None if self.read_bytes is None else self.read_bytes / _MIB / self.decoded,
            "major_faults_per_token": None if self.faults is None else self.faults / self.decoded,
            "in_memory": self.in_memory,
        }
        if self.arm.recency is not None:
            swapped = self.swapped / max(self.choices, 1)
            found |= {"recency": self.arm.recency.mode, "recency_gain": self.gain, "swapped_share": swapped}
        return found


def evaluate_gguf(
    path: str | os.PathLike[str],
    documents: Sequence[Sequence[int]],
    options: GgufMeasuring,
    *,
    on_tokens: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Measures the base, and every prior and point on it, over token documents, as `evaluation.evaluate` does for
    models in transformers: the same keys, and in each row

    - `mib_per_token`, `major_faults_per_token`: what the kernel read from storage for this process while it decoded;
    - `in_memory`: the share of the file's pages in memory when the arm ended;
    - with a prior `swapped_share`: of the chosen experts those that are there in another one's place.

    None stands where the system does not tell. Beside the rows: `engine`, `renormalised`, `file_bytes`, `warm_tokens`,
    and `notes`, sentences on what these figures do not show. The base is the same engine at gain 0.

    documents: token ids; those of fewer than 2 tokens are left out. A rest of one token is not decoded.
    on_tokens: hears of tokens done, over all arms.

    Raises:
        ConfigError: llama.cpp refuses the file or a LoRA, a window or gains do not fit, a token is not in the
            vocabulary, the recency prior is off in this engine, or residency cannot be told (`resident`), or there is
            no room for the base's logits.
        DataError: no document has two tokens.
        RouterNotFoundError: the model has no experts.
        MissingDependencyError: llama.cpp, or for a family the gguf package, is not there.
        Others as `export_gguf_lora`.
    """
    check_replay(options.policies, options.caches)
    with LlamaVocabulary(path) as facts:
        if not facts.num_experts:
            raise RouterNotFoundError(f"{printable(os.fspath(path))} is a model without experts: nothing is routed.")
        window = window_length(facts.trained_tokens or None, options.window)
        vocabulary, num_experts = facts.vocab_size, facts.num_experts
    plan = pieces(documents, window)
    if not plan:
        raise DataError("nothing to score: no document has two tokens; give more text or a higher --max-tokens")
    highest = max(max(ids) for _, _, ids in plan)
    if highest >= vocabulary:
        raise ConfigError(f"token {highest} is none of this model's {vocabulary}: use the tokenizer it was made for.")
    scored = sum(len(ids) - 1 for _, _, ids in plan)
    with contextlib.ExitStack() as ending:
        arms = _arms(path, options, ending)
        logits = None
        if len(arms) > 1:
            logits = ending.enter_context(_BaseLogits(scored, vocabulary))
        measured = _Measured(path, plan, options, window, logits, on_tokens)
        found = [each for group in _groups(arms, options) for each in measured.run(*group)]
    base = found[0].tally
    control = next((each.tally for each in found if each.arm.kind == "control"), None)
    rows: dict[str, list[dict[str, Any]]] = {"base": [], "control": [], "points": [], "priors": []}
    # In the order of the arms: a point and a prior of one kind share an engine with others in between.
    for each in sorted(found, key=lambda each: arms.index(each.arm)):
        trace = each.tally.trace(num_experts, phase="decode")
        row = each.tally.row(
            each.arm.strength, base, control, trace, options.policies, options.caches, options.per_layer
        )
        rows[each.arm.kind].append(row | each.row())
    return {
        "against": None,
        "base": rows["base"][0],
        "control": rows["control"][0] if rows["control"] else None,
        "points": rows["points"],
        "priors": rows["priors"],
        "tokens": base.tokens,
        "documents": len({document for document, _, _ in plan}),
        "window": window,
        "arithmetic": {"name": "llama.cpp", "exact": False},
        "engine": f"xllamacpp {VERSION}",
        "renormalised": options.renormalise,
        "file_bytes": sum(part.stat().st_size for part in measured.files),
        "warm_tokens": options.warm_tokens,
        "expert_cache": options.expert_cache,
        "notes": _notes(found),
    }


def pieces(documents: Sequence[Sequence[int]], window: int) -> list[tuple[int, int, Sequence[int]]]:
    """(document, first token, ids) of at most `window` tokens each, one after another; each scores what follows its
    first token, so what would score nothing is left out."""
    return [
        (document, begin, ids[begin : begin + window])
        for document, ids in enumerate(documents)
        for begin in range(0, len(ids) - 1, window)
    ]


def renormalises(architecture: str, config: Any = None) -> tuple[bool, str]:
    """(whether the engine must be made to divide the weights of the chosen experts by their sum, what to tell of it).

    architecture: as the file names it. config: that of the model which the file was made from, None where it is not
    known: then the engine computes as it does.

    Raises ConfigError when the configuration is of another architecture.
    """
    if config is None:
        known = [kind for kind in ARCHITECTURES if GGUF_ARCH.get(kind, kind) == architecture]
        never = any((ARCHITECTURES[kind].config or {}).get("norm_topk_prob") is False for kind in known)
        note = (
            f"llama.cpp does not divide the weights of {printable(architecture)}'s chosen experts by their sum: of a "
            "model with norm_topk_prob these figures are another model's, unless --config names its folder"
        )
        return False, note if never else ""
    text = config.get_text_config()
    if GGUF_ARCH.get(text.model_type, text.model_type) != architecture:
        raise ConfigError(
            f"--config is of a {printable(text.model_type)} model, the file is of the architecture "
            f"{printable(architecture)}: give the folder of the model that it was made from."
        )
    entry = ARCHITECTURES.get(text.model_type)
    fixed = ((entry.config if entry else None) or {}).get("norm_topk_prob")
    asked = getattr(text, "norm_topk_prob", fixed)
    if fixed is True and not asked:
        return False, "llama.cpp divides the weights of the chosen experts by their sum, which this model does not"
    return bool(asked) and fixed is False, ""


def _arms(path: str | os.PathLike[str], options: GgufMeasuring, ending: contextlib.ExitStack) -> list[_Arm]:
    """The base first; LoRAs of a family lie in a temporary folder until the end."""
    arms, family = [_Arm("base", 0.0)], options.family
    one_kind(family)  # one engine runs all points
    if family is not None:
        folder = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="remoe-eval-")))
        if family.control is not None:
            # As a family of one point, so that there is one way in which LoRAs are made.
            whole = FamilyPoint(1.0, family.control.adapter, family.control.deltas)
            alone = Family(family.path, family.base_id, family.fingerprint, (whole,))
            (lora,) = export_gguf_lora(path, alone, folder / "control", force=options.force)["loras"]
            arms.append(_Arm("control", None, lora=lora["file"]))
        if not family.has_adapters:
            return (
                arms
                + [_Arm("points", point.strength, point.recency) for point in family.points]
                + [_Arm("priors", 0.0, prior) for prior in options.priors]
            )
        for lora in export_gguf_lora(path, family, folder / "points", force=options.force)["loras"]:
            strength = lora["strength"]
            arms.append(_Arm("points", strength, family.point(strength).recency, lora["file"]))
    return arms + [_Arm("priors", 0.0, prior) for prior in options.priors]


def _groups(arms: Sequence[_Arm], options: GgufMeasuring) -> list[tuple[Recency | None, list[_Arm]]]:
    """(the engine's prior, arms that run in it): a context has one mode, decay and share. The base's group is the
    first."""
    plain = [arm for arm in arms if arm.kind != "priors"]
    first = next((arm.recency for arm in plain + list(arms) if arm.recency is not None), None)
    if first is None and options.renormalise:
        first = Recency.of(DEFAULT_MODE)  # at gain 0: renormalising is of the same callback
    groups = [(first, plain)]
    for arm in arms:
        if arm.kind != "priors" or arm.recency is None:
            continue
        alike = [each for kind, each in groups if kind and _is_alike(kind, arm.recency)]
        if alike:
            alike[0].append(arm)
        else:
            groups.append((arm.recency, [arm]))
    return groups


def _is_alike(one: Recency, other: Recency) -> bool:
    return (one.mode, one.decay, one.share) == (other.mode, other.decay, other.share)


class _Measured:
    """The text, and engines that decode it one after another."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        plan: Sequence[tuple[int, int, Sequence[int]]],
        options: GgufMeasuring,
        window: int,
        logits: _BaseLogits | None,
        on_tokens: Callable[[int], object] | None,
    ) -> None:
        self._path, self._plan, self._options, self._window = path, plan, options, window
        self._logits, self._on_tokens = logits, on_tokens
        self.files = shard_paths(Path(path))

    def run(self, kind: Recency | None, arms: Sequence[_Arm]) -> Iterator[_Found]:
        """Decode the text by each of the arms, in an engine with such a prior."""
        with LlamaModel(
            self._path,
            context_tokens=self._window,
            ubatch_tokens=1,
            threads=self._options.threads or usable_cores(),
            trace=True,
            load_mode="mmap",
            # Copies of the weights would not be seen by mincore, and would not be read again.
            repack=False,
            recency=None if kind is None else replace(kind, gain=0.0),
            renormalise=self._options.renormalise,
            expert_cache=self._options.expert_cache,
        ) as engine:
            status = engine.prior_status()
            if status is not None and not status.acts:
                raise ConfigError(f"the recency prior in llama.cpp is off for this file: {status.reason}.")
            loras = {arm.lora: engine.load_lora(arm.lora) for arm in arms if arm.lora is not None}
            for arm in arms:
                engine.set_loras({} if arm.lora is None else {loras[arm.lora]: 1.0})
                found = _Found(arm)
                if kind is not None:
                    engine.set_gain(0.0 if arm.recency is None else arm.recency.gain)
                self._warm(engine, found)
                self._decode(engine, found)
                yield found

    def _warm(self, engine: LlamaModel, found: _Found) -> None:
        """Memory as this arm leaves it, not as the one before did: the beginning of the last piece is decoded."""
        engine.clear()
        # At least one, by which a prior that cannot tell what is in memory shows itself.
        for token in self._plan[-1][2][: max(self._options.warm_tokens, 1)]:
            engine.decode([token])
        status = engine.prior_status()
        # With a cache of ours the kernel need not tell.
        is_blind = status is not None and status.is_blind and engine.cache_status() is None
        if status is not None and is_blind and found.arm.recency is not None:
            raise ConfigError(
                f"recency {status.mode!r} would do nothing: which pages of {printable(os.fspath(self._path))} are in "
                "memory is told to its owner or whoever may write it alone (Linux 5.2 and later): own it, or copy it."
            )

    def _decode(self, engine: LlamaModel, found: _Found) -> None:
        before, row = engine.prior_status(), 0
        for document, begin, ids in self._plan:
            engine.clear()
            engine.routes.clear()
            for token, target in zip(ids, [*ids[1:], None], strict=True):
                counters = disk_reads()
                logits_1V = engine.decode([token])
                found.count(counters, disk_reads())
                if target is not None:
                    self._score(found, logits_1V, target, row)
                    row += 1
                if self._on_tokens is not None:
                    self._on_tokens(1)
            found.tally.ids[document, begin] = taken(engine)
        status = engine.prior_status()
        if status is not None and before is not None:
            found.choices = sum(ids_LTK.size for ids_LTK in found.tally.ids.values())
            found.swapped = status.swapped - before.swapped
            found.refused = status.refused_rows + status.lost_rows - before.refused_rows - before.lost_rows
            found.gain = sum(status.gains) / max(len(status.gains), 1)
            found.why_numpy = status.why_numpy
        found.in_memory = share_in_memory(self.files)

    def _score(self, found: _Found, logits_1V: NDArray[np.float32], target: int, row: int) -> None:
        base_1V: Tensor | None = None
        if self._logits is not None:
            if found.arm.kind == "base":
                self._logits.add(logits_1V)
            else:
                base_1V = self._logits.read(row)
        found.tally.add(torch.from_numpy(logits_1V), torch.tensor([target]), base_1V)


class _BaseLogits:
    """The base's logits float32 [N, V], in a file without a name that does not stay in the page cache.

    Raises ConfigError where the folder for temporary files has no room for it.
    """

    def __init__(self, rows: int, vocabulary: int) -> None:
        folder, size_bytes = tempfile.gettempdir(), rows * vocabulary * 4
        free_bytes = shutil.disk_usage(folder).free
        if size_bytes > free_bytes:
            raise ConfigError(
                f"the base's logits of {rows} tokens take {size_text(size_bytes)}, {printable(folder)} has "
                f"{size_text(free_bytes)}: give fewer --max-tokens, or another folder by TMPDIR."
            )
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by __exit__)
        self._row_bytes, self._cached_bytes = vocabulary * 4, 0

    def __enter__(self) -> _BaseLogits:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def add(self, logits_1V: NDArray[np.float32]) -> None:
        """One row more."""
        self._file.write(logits_1V.tobytes())
        self._count()

    def read(self, row: int) -> Tensor:
        """Row [1, V]."""
        self._file.seek(row * self._row_bytes)
        data = bytearray(self._file.read(self._row_bytes))
        self._count()
        return torch.frombuffer(data, dtype=torch.float32)[None]

    def _count(self) -> None:
        """A row went through the page cache, where it takes the place of the model."""
        self._cached_bytes += self._row_bytes
        if self._cached_bytes >= _CACHED_BYTES:
            self._file.flush()
            # What is not on the disk yet cannot leave the page cache.
            os.fsync(self._file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._cached_bytes = 0


def _notes(found: Sequence[_Found]) -> list[str]:
    """What a reader of the figures has to know; nothing where they show what they seem to."""
    notes = []
    if found[0].read_bytes is None:
        notes.append("this system does not tell what a process reads from storage")
    elif not any(each.read_bytes for each in found) and found[0].in_memory == 1.0:
        notes.append(_UNLIMITED)
    for each in found:
        prior = each.arm.recency
        if prior is None or not each.gain:
            continue
        name = f"{prior.mode} {each.gain:g}"
        if not each.swapped:
            why = ": of each layer all experts are in memory, or none" if prior.kind.needs_expert_cache else ""
            notes.append(f"{name} changed no expert{why}")
        if each.refused:
            notes.append(f"{name}: {each.refused} choices were left as the engine made them, as a check failed")
    if why_numpy := next((each.why_numpy for each in found if each.why_numpy), ""):
        notes.append(f"the prior was computed in numpy, which is slow: {why_numpy}")
    return notes
