"""A model made wider without computing anything else: experts padded with zeros, so that reads have a realistic size.

A padded unit has weights of zero on both sides: it multiplies nothing and adds nothing. Logits are equal up to the
order in which sums are rounded, and routing is the trained one.
"""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from remoe_adapt.bench.harness.results import terminated_as_interrupted
from remoe_adapt.checkpoints import auto_class, load_base, load_with_tokenizer
from remoe_adapt.errors import ConfigError
from remoe_adapt.expert_cache import experts_modules

# A huge page and a little more: devices read into those in fewer requests.
EXPERT_BYTES = 2 << 20
# Units are added in steps of as many: rows stay aligned for vector units and, with most hidden sizes, for direct I/O.
_STEP = 32
# Beside the tensors: headers, the tokenizer, and what the file system itself needs.
_SLACK_BYTES = 64 << 20
# Goes up when widened checkpoints change, else one of an earlier version would be taken for this one's.
_FORMAT = 1
# Largest difference of a logit by rounding: (bfloat16 and the like, float32).
_MOST_GAP = (0.5, 1e-3)


@contextmanager
def wide_copy(
    model: str | Path, work: Path, *, dtype: torch.dtype, expert_bytes: int, keep: bool
) -> Iterator[tuple[Path, Path]]:
    """`widened`, and the folder beside it for its pack; unless `keep`, both are deleted afterwards, after a polite kill
    too. Raises as `widened`."""
    with terminated_as_interrupted():
        wide = widened(model, work, dtype=dtype, expert_bytes=expert_bytes)
        pack = wide.with_name(f"{wide.name}.pack")
        try:
            yield wide, pack
        finally:
            # Packs in fewer bits lie beside it too.
            for folder in () if keep else (wide, *wide.parent.glob(f"{wide.name}*.pack")):
                shutil.rmtree(folder, ignore_errors=True)


def widened(model: str | Path, work: Path, *, dtype: torch.dtype, expert_bytes: int = EXPERT_BYTES) -> Path:
    """Folder of the widened checkpoint under `work`, written now unless it is there from before.

    Every expert takes `expert_bytes` or a little more in `dtype`. The folder is an ordinary checkpoint with the model's
    tokenizer, and appears in one piece.

    Raises ConfigError for a model that cannot be widened, and when there is too little space for it.
    """
    folder = work / f"{Path(model).name}-{_key(model, dtype, expert_bytes)}"
    if (folder / "config.json").is_file():
        return folder
    source, tokenizer = load_with_tokenizer(model, device="cpu", dtype=str(dtype).removeprefix("torch."))
    save_whole(widen(source, expert_bytes), folder, tokenizer)
    try:
        check_same(folder, source)
    except ConfigError:
        shutil.rmtree(folder)
        raise
    return folder


def widen(model: Any, expert_bytes: int = EXPERT_BYTES) -> Any:
    """A new model like `model`, whose experts take at least `expert_bytes` each, in its dtype.

    Raises ConfigError when its experts' inner size is no option of its configuration.
    """
    modules = experts_modules(model)
    if not modules:
        raise ConfigError(f"{type(model).__name__} has no experts that could be widened: give another --model.")
    first = next(iter(modules.values()))
    now_bytes = sum(param[0].numel() * param.element_size() for param in first.parameters(recurse=False))
    if now_bytes >= expert_bytes:
        return model
    option, inner = _inner_option(model)
    per_unit = now_bytes / inner
    target = -(-expert_bytes // per_unit)
    wide = _on_meta(model, option, int(-(-target // _STEP) * _STEP))
    shapes = {name: tuple(param.shape) for name, param in wide.named_parameters()}
    interleaved = {
        f"{name}.{param}"
        for name, module in modules.items()
        for param, _ in module.named_parameters(recurse=False)
        if not getattr(module, "is_concatenated", True)
    }
    state = {
        name: value if name not in shapes else _padded(value, shapes[name], inner, halves=name not in interleaved)
        for name, value in model.state_dict().items()
    }
    wide.load_state_dict(state, assign=True)
    return wide.eval()


def check_same(folder: Path, model: Any) -> None:
    """Raises ConfigError when the checkpoint does not compute what `model` does, to rounding."""
    wide, ids_BT = load_base(folder), torch.arange(2, 18)[None]
    with torch.inference_mode():
        gap = (wide(input_ids=ids_BT).logits.float() - model(input_ids=ids_BT).logits.float()).abs().max()
    if not gap <= _MOST_GAP[model.dtype == torch.float32]:
        raise ConfigError(f"{type(model).__name__}: widened, its logits change by {gap:.2g}; give another --model.")


def save_whole(model: Any, folder: Path, tokenizer: Any = None) -> None:
    """`save_pretrained` into a folder that appears in one piece, or not at all.

    Raises ConfigError when the disk is too small for it.
    """
    needed = sum(value.nbytes for value in model.state_dict().values()) + _SLACK_BYTES
    folder.parent.mkdir(parents=True, exist_ok=True)
    check_space(folder.parent, needed)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        each_file(draft, os.fsync)  # a full disk may say so only now
        if not folder.exists():  # else another process was as fast
            draft.replace(folder)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{folder.parent} cannot take {needed >> 20} MiB ({str(error).strip()}): give --work DIR on a larger disk."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_space(folder: Path, needed: int) -> None:
    """Raises ConfigError when the file system of `folder` has less free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"{folder} has {free >> 20} MiB free, {needed >> 20} MiB are needed: give --work DIR on a larger disk."
        )


def each_file(folder: Path, action: Callable[[int], object]) -> None:
    """Call `action` with a descriptor of every file below a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                action(file.fileno())


def _key(model: str | Path, dtype: torch.dtype, expert_bytes: int) -> str:
    facts: list[object] = [_FORMAT, str(model), str(dtype), expert_bytes]
    if Path(model).is_dir():
        files = sorted(path for path in Path(model).iterdir() if path.suffix in (".safetensors", ".json"))
        facts = [_FORMAT, str(Path(model).resolve()), str(dtype), expert_bytes]
        facts += [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def _inner_option(model: Any) -> tuple[str, int]:
    """The option of the configuration that is the experts' inner size alone, and its value."""
    shapes = _experts_shapes(model)
    # The option's name differs by architecture, so each candidate is tried on a model without memory.
    now = {name: tuple(param.shape) for name, param in model.named_parameters()}
    for option, value in model.config.get_text_config().to_dict().items():
        # True is an int to isinstance, and no size.
        if isinstance(value, bool) or not isinstance(value, int) or "intermediate" not in option:
            continue
        try:
            trial = _on_meta(model, option, value + _STEP)
        except (ValueError, RuntimeError):
            continue
        wide = {name: tuple(param.shape) for name, param in trial.named_parameters()}
        # Experts that all tokens share may grow with the others.
        grown = [name for name, shape in now.items() if sum(a != b for a, b in zip(shape, wide[name], strict=True))]
        if all(wide[name] != shape for name, shape in shapes.items()) and all("expert" in name for name in grown):
            return option, value
    raise ConfigError(
        f"{type(model).__name__}: no option of its configuration is the inner size of its experts alone, so it cannot "
        "be widened. Give --model with larger experts, or another architecture."
    )


def _experts_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the experts' weights, by full name; their biases need not have the inner size."""
    return {
        f"{name}.{param}": tuple(value.shape)
        for name, module in experts_modules(model).items()
        for param, value in module.named_parameters(recurse=False)
        if value.dim() > 2
    }


def _on_meta(model: Any, option: str, value: int) -> Any:
    config = copy.deepcopy(model.config)
    setattr(config.get_text_config(), option, value)
    with torch.device("meta"):
        return auto_class(config).from_config(config, dtype=model.dtype)


def _padded(value: Tensor, shape: tuple[int, ...], inner: int, *, halves: bool) -> Tensor:
    """`value` grown to `shape` with zeros; what holds gate and up one after the other grows in both."""
    if tuple(value.shape) == shape:
        return value
    # More than one grown dimension would be another option than the experts' inner size.
    (dim,) = (place for place, (now, then) in enumerate(zip(value.shape, shape, strict=True)) if now != then)
    parts = value.chunk(2, dim=dim) if halves and value.shape[dim] == 2 * inner else (value,)
    more = (shape[dim] - value.shape[dim]) // len(parts)
    padding = [0, 0] * (value.dim() - 1 - dim) + [0, more]
    return torch.cat([F.pad(part, padding) for part in parts], dim=dim)
