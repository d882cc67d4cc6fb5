"""`remoe train`: one base, one pass over the data, a family of adapters and the next-token-loss-only control."""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel

from remoe_adapt._support import disk_faults
from remoe_adapt.checkpoints import check_place, load_tokenizer, max_positions, usable_device
from remoe_adapt.errors import ConfigError, DataError, FamilyError
from remoe_adapt.expert_cache import arithmetic_of, check_arithmetic, expert_cache_of, load_whole_or_cached
from remoe_adapt.family import Family, write_whole
from remoe_adapt.routers import survey_routers
from remoe_adapt.texts import data_files, pieces, read_file, tokenize_documents
from remoe_adapt.training.data import PackedRows
from remoe_adapt.training.options import TrainOptions, check_same_run, check_strengths
from remoe_adapt.training.passes import GOES_ON, LOG_FILE, WORK_FOLDER, Run
from remoe_adapt.training.point import (
    CHECKPOINT_MINUTES,
    check_fits,
    check_writable,
)
from remoe_adapt.training.processes import join_processes
from remoe_adapt.training.reference import CONTROL
from remoe_adapt.training.sharding import check_sharded, is_sharded
from remoe_adapt.tuner import FAMILY_FILE, plain_base

__all__ = [
    "LOG_FILE", "RUN_FILE", "WORK_FOLDER", "TrainOptions", "check_exact", "held_out_documents", "token_rows",
    "train_family",
]  # fmt: skip

RUN_FILE = "training.json"
_DEFAULT_LENGTH = 512
_HELD_OUT_EVERY = 20
# The tokens that are held out. They tell a perplexity ratio to a quarter of a percent (see `LEAST_CERTIFIED_TOKENS`).
HELD_OUT_TOKENS = 16_384
_PIECE_CHARS = 2048


def token_rows(
    paths: Sequence[str | Path], tokenizer: Any, tokens: int, seed: int = 0, piece_chars: int = _PIECE_CHARS
) -> tuple[list[list[int]], list[list[int]]]:
    """(training, held-out) pieces of documents as token ids, about `tokens` of them, in equal parts from each file.

    Every 20th document of a file is held out; of a file of few documents the last twentieth of each. What is left is
    cut into pieces of about `piece_chars` characters and drawn from all over the file: a few whole documents would
    teach the routers those documents. `tokens` bounds what is trained on; of what is held out there are as many as the
    data give, up to `HELD_OUT_TOKENS` in all.

    Raises DataError when there is no text.
    """
    train, held_out, _ = token_parts(paths, tokenizer, tokens, seed, piece_chars)
    return train, held_out


def token_parts(
    paths: Sequence[str | Path], tokenizer: Any, tokens: int, seed: int = 0, piece_chars: int = _PIECE_CHARS,
    validation_tokens: int = 0,
) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:  # fmt: skip
    """`token_rows`, and as a third part text to evaluate on while training: about `validation_tokens` of other
    documents again, which are kept from both; of a file of few documents, another twentieth of each."""
    files = data_files(paths)
    train: list[list[int]] = []
    held_out: list[list[int]] = []
    validation: list[list[int]] = []
    share = math.ceil(tokens / len(files))
    for file in files:
        documents = list(read_file(file, tokenizer))
        random.Random(seed).shuffle(documents)
        # Whole documents are held out where there are enough: parts of one document are too alike to tell of new text.
        if len(documents) >= _HELD_OUT_EVERY:
            places = (0, 1) if validation_tokens else (0,)
            kept = [text for index, text in enumerate(documents) if index % _HELD_OUT_EVERY not in places]
            apart = documents[::_HELD_OUT_EVERY]
            looked_at = documents[1::_HELD_OUT_EVERY] if validation_tokens else []
        else:
            cuts = [len(text) - len(text) // _HELD_OUT_EVERY for text in documents]
            apart = [text[cut:] for text, cut in zip(documents, cuts, strict=True)]
            ends = [
                cut - len(text) // _HELD_OUT_EVERY * bool(validation_tokens)
                for text, cut in zip(documents, cuts, strict=True)
            ]
            kept = [text[:end] for text, end in zip(documents, ends, strict=True)]
            looked_at = [text[end:cut] for text, end, cut in zip(documents, ends, cuts, strict=True)]
        train += tokenize_documents(_drawn(kept, piece_chars, seed), tokenizer, share)
        most = math.ceil(HELD_OUT_TOKENS / len(files))
        held_out += tokenize_documents(_drawn(apart, piece_chars, seed), tokenizer, most)
        if validation_tokens:
            most = math.ceil(validation_tokens / len(files))
            validation += tokenize_documents(_drawn(looked_at, piece_chars, seed), tokenizer, most)
    if not train:
        raise DataError(f"no text in {', '.join(map(str, files))}")
    # One token has nothing to predict.
    return train, [row for row in held_out if len(row) > 1], [row for row in validation if len(row) > 1]


def _drawn(documents: Sequence[str], piece_chars: int, seed: int) -> list[str]:
    found = [piece for text in documents for piece in pieces(text, piece_chars) if piece.strip()]
    random.Random(seed).shuffle(found)
    return found


def train_family(
    base: str | Path | PreTrainedModel,
    data: Sequence[str | Path],
    strengths: Sequence[float],
    out: str | Path,
    *,
    options: TrainOptions | None = None,
    tokenizer: Any = None,
    resume: bool = True,
    control: bool = True,
    progress: bool = True,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    expert_cache: str | int | float | None = None,
    storage: str | Path | None = None,
    arithmetic: str = "exact",
    on_point: Callable[[str, dict[str, float]], None] | None = None,
    checkpoint_minutes: float = CHECKPOINT_MINUTES,
) -> Family:
    """Train a point for each strength, and the control, side by side on the same rows: one pass of the base serves all.
    Where points may be held to the control (`TrainOptions.reference`), it has a pass of its own before them.

    Beside the family lie `training.json`, what the run was, and `training_log.jsonl`. A stopped run goes on where it
    was when called again with the same options: finished points are kept, those under way restart from their last
    checkpoint; other strengths add points. `base` (a path, hub id or loaded model) is left as it was.
    A checkpoint is kept every `checkpoint_minutes` (and at every fifth of a pass): that much is lost at most.
    `expert_cache` and `storage` put the experts of a base that is loaded into an expert cache, of that budget and
    reading from that pack (see `load_whole_or_cached`, also for quantised checkpoints); adapters are the same as those
    of the dequantised model. `arithmetic`: "exact", or "auto", which is exact here.
    `on_point(name, last_log)` is called for each point when its pass has ended.
    Under `accelerate launch` every process calls this: rows are shared
    out, the main process writes.

    Raises:
        ConfigError: bad strengths or options, reference "control" without a control, fast arithmetic, a rank above a
            router's, a device that is not there, a base or tokenizer that cannot be loaded, `out` holds a run with
            other options, base, experts or data, cannot be written or has no space left. All but the last are found
            before any work.
        DataError: no usable text.
        FamilyError: `out` holds a family that was not made by such a run, or `resume` is off and it exists.
    """
    options = options or TrainOptions()
    check_exact(arithmetic)
    wanted, out = check_strengths(strengths), Path(out)
    if options.reference == "control" and not control:
        raise ConfigError("reference='control' needs the control: train it too, or choose 'base' or 'auto'")
    # The cheap checks come first: a model may take minutes to load.
    data_files(data)
    check_writable(out)
    processes = join_processes(base.device if isinstance(base, nn.Module) else device)
    if is_sharded():
        two_passes = options.next_steps is not None or options.reference == "control"
        check_sharded(isinstance(base, nn.Module), expert_cache is not None, two_passes)
    model, base_id = _load(base, device, dtype, expert_cache, storage)
    # Kept for the whole run: after each point its wrappers are gone, and the same routers are in their places.
    routers = survey_routers(plain_base(model))
    check_fits(routers, options, len(wanted) + control, out)
    for strength in wanted:
        options.recency_of(strength, len(routers.refs))  # refuses another number of gains
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(base_id)
    length = _row_tokens(model, options)
    needed = _needed_tokens(model, options) * processes.num_processes
    # Without a control too: a run that trains it later has the same rows.
    looks = options.evaluate_every is not None or options.reference == "auto"
    wants = options.validation_tokens if looks else 0
    train, _, apart = token_parts(data, tokenizer, needed, options.seed, validation_tokens=wants)
    rows = PackedRows(train, length, None, options.seed)  # pieces end anywhere: no end-of-text after them
    if model.device.type == "cpu":
        torch.set_flush_denormal(True)  # second moments of small gradients slow a CPU down tenfold

    run = {**asdict(options), "length": length, "base": routers.fingerprint, "data": _digest(train)}
    # A pack may hold other experts than the checkpoint, under the same routers.
    run |= {"experts": arithmetic_of(model)["name"]}
    with disk_faults(out, ConfigError, GOES_ON, "written"):
        _claim(out, json.loads(json.dumps(run)), resume)
    names = {Family.adapter_name(strength): strength for strength in wanted} | ({CONTROL: 0.0} if control else {})
    exists = (out / FAMILY_FILE).exists()
    under_way = Run(
        model, options, routers, names,
        family=Family.load(out) if exists else Family.create(out, base_id, routers.fingerprint),
        rows=rows, rows_apart=_rows_apart(apart, length, options),
        shown=progress and processes.is_main_process, checkpoint_minutes=checkpoint_minutes,
    )  # fmt: skip
    return under_way.trained(on_point)


def _rows_apart(documents: Sequence[Sequence[int]], length: int, options: TrainOptions) -> PackedRows | None:
    """Rows of the text that is kept out for measuring a run; None where nobody needs it and it does not suffice.

    Raises DataError where it is needed.
    """
    if options.evaluate_every is not None and not documents:
        raise DataError("the data leave no text to evaluate on while training: give more, or no --evaluate-every")
    if options.evaluate_every is None and sum(map(len, documents)) < length:
        return None
    return PackedRows(documents, length, None, options.seed)


def held_out_documents(
    data: Sequence[str | Path], tokenizer: Any, model: PreTrainedModel, options: TrainOptions | None = None
) -> list[list[int]]:
    """The documents that `train_family` with the same arguments kept out of training (of several processes: some)."""
    options = options or TrainOptions()
    return token_rows(data, tokenizer, _needed_tokens(model, options), options.seed)[1]


def _row_tokens(model: PreTrainedModel, options: TrainOptions) -> int:
    limit = max_positions(model)
    if options.length is not None and limit is not None and options.length > limit:
        raise ConfigError(f"length={options.length}: this model has {limit} positions, use at most that")
    return options.length or min(limit or _DEFAULT_LENGTH, _DEFAULT_LENGTH)


def _needed_tokens(model: PreTrainedModel, options: TrainOptions) -> int:
    """Tokens of one pass of one process."""
    return options.steps * options.batch * options.accumulate * _row_tokens(model, options)


def _digest(documents: Sequence[Sequence[int]]) -> str:
    digest = hashlib.sha256()
    for ids in documents:
        # With its length before it, else two divisions of the same tokens would be equal.
        digest.update(torch.tensor([len(ids), *ids]).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _claim(out: Path, run: dict[str, Any], resume: bool) -> None:
    """Make `out` the folder of this run: refuse what another run left there, clear away what is not resumed."""
    record, family = out / RUN_FILE, out / FAMILY_FILE
    if out.exists() and not out.is_dir():
        raise FamilyError(f"{out} is a file: choose another --out")
    goes_on = resume and record.exists()
    if goes_on:
        check_same_run(record, run)
    elif family.exists():
        raise FamilyError(
            f"{out} holds a family already: choose another --out, or delete that folder"
            + ("" if resume else ", or resume its run")
        )
    processes = PartialState()
    processes.wait_for_everyone()  # all have looked before one writes
    if processes.is_main_process and not goes_on:
        shutil.rmtree(out / WORK_FOLDER, ignore_errors=True)
        # Lines of another run would be read as this one's.
        (out / LOG_FILE).unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        write_whole(record, json.dumps(run, indent=2) + "\n")
    processes.wait_for_everyone()


def check_exact(arithmetic: str) -> None:
    """Raises ConfigError for an arithmetic that training cannot have."""
    check_arithmetic(arithmetic)
    if arithmetic == "fast":
        raise ConfigError(
            'arithmetic="fast" is for decoding: gradients are of dequantised experts, so training is exact. Leave it '
            'out, or give "exact".'
        )


def _load(
    base: str | Path | PreTrainedModel,
    device: str | None,
    dtype: torch.dtype | str | None,
    expert_cache: str | int | float | None,
    storage: str | Path | None,
) -> tuple[PreTrainedModel, str]:
    # A loaded model stays where and as it is: its owner chose the device and the type.
    if isinstance(base, nn.Module):
        if expert_cache is not None or storage is not None:
            raise ConfigError("expert_cache and storage are options of loading, but base is a model already.")
        arithmetic = arithmetic_of(base)
        if expert_cache_of(base) is not None and not arithmetic["exact"]:
            raise ConfigError(
                f"the base computes its experts fast ({arithmetic['name']}), and training is exact: load it with "
                'arithmetic="exact".'
            )
        return base, str(getattr(base.config, "name_or_path", "") or "unnamed")
    processes = PartialState()
    if processes.num_processes > 1:
        device = str(processes.device)  # each process has a device of its own
    device = usable_device(device)
    check_place(base, "cannot load the model:")
    # Half precision is slow on most CPUs, and small bases train there.
    dtype = dtype or (torch.float32 if device == "cpu" else "auto")
    model: Any = load_whole_or_cached(base, expert_cache, storage=storage, device=device, dtype=dtype)
    return model, str(base)
