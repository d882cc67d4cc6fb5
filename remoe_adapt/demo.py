"""The main job in one command: decode base and family over the same held-out text, and show what reuse costs.

Also the example's place, its held-out text, and streaming generation, which `remoe run` shares.
"""

from __future__ import annotations

import json
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TextStreamer

from remoe_adapt.arms import Arm, Arms, arms_of
from remoe_adapt.errors import ConfigError, DataError
from remoe_adapt.evaluate import Tally, read_shared
from remoe_adapt.family import Family
from remoe_adapt.metrics import eor
from remoe_adapt.record import Decoder, Recorder, device_of, inference, load_base, make_trace, record_forward

CACHES = (0.25,)
PIECE_TOKENS = 128
# Steps of a document that are not timed: caches and allocator are still warming up.
WARM_STEPS = 3
GETTING_THEM = (
    "clone the repository, which holds a small trained model and its family, or give --model and --family; "
    "`remoe train MODEL --data FILE --out FAMILY` makes a family for a model of yours"
)


def example_folder() -> Path:
    """Where the shipped model lies in a checkout; absent in a wheel."""
    return Path(__file__).resolve().parent.parent / "examples" / "tiny_moe"


@dataclass(frozen=True)
class HeldOut:
    """Text that the shipped model never saw: token documents, where they are from, and prompts to continue."""

    documents: list[list[int]]
    sources: list[str]
    prompts: list[str]


def held_out(model_folder: Path, tokenizer: Any, tokens: int, data: Sequence[str | Path] = ()) -> HeldOut:
    """About `tokens` tokens: the prompts of `demo.json` in the model's folder, pieces of the standard library modules
    it names (the running interpreter's own source), and as much again of the `data` files if there are any.

    Raises:
        DataError: nothing to decode, or a damaged `demo.json`.
    """
    names, prompts = _recipe(model_folder / "demo.json")
    documents = [ids for prompt in prompts if len(ids := _encode(tokenizer, prompt)) > 1]
    sources = [f"{len(documents)} prompts"] if documents else []
    left = tokens - sum(map(len, documents))
    for name in names:
        source = _module_source(name)
        if left < 2 or source is None:
            continue
        ids = _encode(tokenizer, source[: 16 * PIECE_TOKENS])[: min(PIECE_TOKENS, left)]
        documents.append(ids)
        sources.append(name)
        left -= len(ids)
    if data:
        for ids in read_shared(data, tokenizer, tokens):
            documents += [ids[begin : begin + PIECE_TOKENS] for begin in range(0, len(ids), PIECE_TOKENS)]
        sources += [Path(path).name for path in data]
    documents = [ids for ids in documents if len(ids) > 1]
    if not documents:
        raise DataError(f"nothing to decode: {model_folder} has no demo.json with text; give --data FILE")
    return HeldOut(documents, sources, prompts)


def _recipe(path: Path) -> tuple[list[str], list[str]]:
    if not path.is_file():
        return [], []
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        names, prompts = list(facts["heldout_stdlib"]), list(facts["prompts"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}): it needs lists heldout_stdlib and prompts") from error
    if not all(isinstance(text, str) for text in (*names, *prompts)):
        raise DataError(f"{path}: heldout_stdlib and prompts must hold strings")
    return names, prompts


def _module_source(name: str) -> str | None:
    """Source of a standard library module, None where this interpreter has none (frozen, removed)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in (root / f"{name}.py", root / name / "__init__.py"):
        if path.is_file():
            return path.read_text(encoding="utf-8", errors="ignore")
    return None


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def run_demo(
    model: str | Path | None = None,
    family: str | Path | None = None,
    *,
    data: Sequence[str | Path] = (),
    tokens: int = 1600,
    new_tokens: int = 60,
    max_seconds: float = 120.0,
    force: bool = False,
    on_start: Callable[[int], object] | None = None,
    on_tokens: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Decodes base, control and every point of the family over the same text, one token per step, with the KV cache.

    Returns `base`, `control` and `points` with the keys of `evaluate` and `tpot_ms` (median over steps; arms take
    turns document by document), `samples` (`{strength, prompt, text}` at the base and at the strongest point),
    `model`, `family`, `text` (sources), `tokens`, `hit_rate_is` and `seconds`. `on_start` hears the number of steps to
    come, `on_tokens` of steps done. After `max_seconds` of decoding no further document is begun: all arms have then
    seen the same, shorter text.

    Raises:
        ConfigError: the shipped model or its family is not there and none was given.
        DataError: no text.
        FingerprintMismatchError: the family is of another base (unless `force`).
    """
    started = time.perf_counter()
    if tokens < 2:
        raise ConfigError(f"cannot measure on {tokens} token(s): use --tokens 100 or more")
    model_path, family_path = _places(model, family)
    points = Family.load(family_path)
    loaded, tokenizer = load_base(model_path)
    text = held_out(Path(model_path), tokenizer, tokens, data)
    with arms_of(loaded, points, force=force) as arms, inference(loaded), _fit_for_decode(loaded):
        if on_start is not None:
            on_start(sum(map(len, text.documents)) * len(list(arms)))
        rows, decoded = _decode_arms(loaded, arms, text.documents, max_seconds, on_tokens)
        samples = list(_samples(loaded, tokenizer, arms, text.prompts[:2], new_tokens))
    return {
        "model": str(model_path),
        "family": str(family_path),
        "text": text.sources,
        "tokens": decoded,
        "hit_rate_is": "a replay: LRU cache of 25 % of experts, recorded decode",
        "base": rows[arms.base],
        "control": None if arms.control is None else rows[arms.control],
        "points": [rows[arm] for arm in arms.points],
        "samples": samples,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _places(model: str | Path | None, family: str | Path | None) -> tuple[str | Path, str | Path]:
    if model is None:
        model = example_folder()
        if not (model / "config.json").is_file():
            raise ConfigError(f"the shipped model is not beside this package ({model}): {GETTING_THEM}")
        family = family or model / "family"
    if family is None:
        family = Path(model) / "family"
    if isinstance(family, Path) and not (family / "family.json").is_file():
        raise ConfigError(f"no family in {family}: {GETTING_THEM}")
    return model, family


def _decode_arms(
    model: nn.Module,
    arms: Arms,
    documents: Sequence[Sequence[int]],
    max_seconds: float,
    on_tokens: Callable[[int], object] | None,
) -> tuple[dict[Arm, dict[str, Any]], int]:
    """(row of each arm, scored tokens): arms take turns document by document, so that a busy moment hits them all."""
    tallies = {arm: Tally() for arm in arms}
    times_s: dict[Arm, list[float]] = {arm: [] for arm in arms}
    deadline_s = time.perf_counter() + max_seconds
    with record_forward(model) as recorder:
        for number, ids in enumerate(documents):
            if number and time.perf_counter() > deadline_s:
                break
            base_logits_SV: Tensor | None = None
            for arm, tally in tallies.items():
                arms.use(arm)
                logits_SV, steps_s = _teacher_forced(model, ids)
                times_s[arm] += steps_s[WARM_STEPS:] or steps_s[-1:]
                tally.ids[number, 0] = recorder.take().numpy()
                tally.add(logits_SV, torch.tensor(ids[1:], device=logits_SV.device), base_logits_SV)
                base_logits_SV = logits_SV if base_logits_SV is None else base_logits_SV
                if on_tokens is not None:
                    on_tokens(len(ids))
        rows = {arm: _row(arm, arms, tallies, recorder, times_s[arm]) for arm in arms}
    return rows, tallies[arms.base].tokens


def _row(
    arm: Arm, arms: Arms, tallies: Mapping[Arm, Tally], recorder: Recorder, times_s: Sequence[float]
) -> dict[str, Any]:
    control = None if arms.control is None else tallies[arms.control]
    trace = tallies[arm].trace(recorder.num_experts, phase="decode")
    row = tallies[arm].row(arm.strength, tallies[arms.base], control, trace, caches=CACHES)
    return row | {"tpot_ms": 1e3 * statistics.median(times_s)}


def _teacher_forced(model: nn.Module, ids: Sequence[int]) -> tuple[Tensor, list[float]]:
    """Logits [S, V] that predict ids[1:], and the seconds of each step; the last token is fed for its routing."""
    decoder, logits, times_s = Decoder(model), [], []
    on_accelerator = device_of(model).type != "cpu"
    for token in ids:
        begin = time.perf_counter()
        logits.append(decoder.feed([token]))
        if on_accelerator:
            torch.accelerator.synchronize()
        times_s.append(time.perf_counter() - begin)
    return torch.stack(logits[:-1]), times_s


@contextmanager
def _fit_for_decode(model: Any) -> Iterator[None]:
    """One token at a time is fastest with the batched experts function where a model has it; prefill with another."""
    before = getattr(model.config, "_experts_implementation", None)
    if before is None or not hasattr(model, "set_experts_implementation"):
        yield
        return
    try:
        model.set_experts_implementation("batched_mm")
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def _samples(
    model: Any, tokenizer: Any, arms: Arms, prompts: Sequence[str], new_tokens: int
) -> Iterator[dict[str, Any]]:
    for prompt in prompts if new_tokens > 0 else ():
        for arm in (arms.base, *arms.points[-1:]):
            arms.use(arm)
            made = generate_text(model, tokenizer, prompt, new_tokens=new_tokens, temperature=0.7)
            yield {"strength": arm.strength, "prompt": prompt, "text": made["text"]}


class _Stream(TextStreamer):
    """Hands pieces of text and the time of each token to callbacks."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], object] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times_s: list[float] = []
        self._on_text = on_text

    def put(self, value: Tensor) -> None:
        self.times_s.append(time.perf_counter())
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._on_text is not None and text:
            self._on_text(text)


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Continues a prompt by `model.generate`; temperature 0 is greedy.

    Returns `text`, `prompt_tokens`, `tokens` (new ones), `ttft_ms`, `tpot_ms` (median after the first; None for one
    token) and `eor` of the decode steps (None below two). `on_text` hears pieces of text as they come.

    Raises:
        ConfigError: no new tokens, or a negative temperature.
        DataError: the prompt has no token.
    """
    if new_tokens < 1 or not temperature >= 0:
        raise ConfigError(f"cannot generate {new_tokens} tokens at temperature {temperature}: use >= 1 and >= 0")
    inputs = tokenizer(prompt, return_tensors="pt", verbose=False).to(device_of(model))
    inputs.pop("token_type_ids", None)
    prompt_tokens = inputs["input_ids"].shape[1]
    if not prompt_tokens:
        raise DataError("the prompt has no token: give --prompt some text")
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 50} if temperature else {"do_sample": False}
    stream = _Stream(tokenizer, on_text)
    with record_forward(model) as recorder, inference(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        started = time.perf_counter()
        ids_BT = model.generate(**inputs, max_new_tokens=new_tokens, streamer=stream, **sampling)
        routing_LTK = recorder.take()[:, prompt_tokens:]
        steps = [routing_LTK.numpy()]
        # Two steps make the first overlap.
        overlap = eor(make_trace(steps, recorder.num_experts, phase="decode")) if steps[0].shape[1] > 1 else None
    arrivals_s = stream.times_s[1:]
    gaps_s = [after - before for before, after in pairwise(arrivals_s)]
    return {
        "text": tokenizer.decode(ids_BT[0, prompt_tokens:], skip_special_tokens=True),
        "prompt_tokens": prompt_tokens,
        "tokens": ids_BT.shape[1] - prompt_tokens,
        "ttft_ms": 1e3 * (arrivals_s[0] - started) if arrivals_s else None,
        "tpot_ms": 1e3 * statistics.median(gaps_s) if gaps_s else None,
        "eor": overlap,
    }
