"""The files of a family, read strictly: `family.json` (format 1) and the deltas of one adapter folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from remoe_adapt.device_profile import RECENCY_MODES
from remoe_adapt.errors import AdapterCorruptError, FamilyError, FingerprintMismatchError
from remoe_adapt.gating.prior import MAX_GAIN
from remoe_adapt.tuner.checks import check_finite, plain_key

FAMILY_FILE = "family.json"
FORMAT = 1
# Keys that must be there, and keys that may.
_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "the family": ({"format", "base", "points"}, {"control"}),
    "base": ({"id", "fingerprint"}, set()),
    "a point": ({"strength", "adapter"}, {"recency", "certificate"}),
    "control": ({"adapter"}, {"certificate"}),
}


@dataclass(frozen=True)
class Recency:
    """The recency prior of an operating point: mode ("last", "ema", "resident" or "none"), decay in [0, 1), gain per
    router in model order."""

    mode: str
    decay: float
    gain_per_layer: tuple[float, ...]

    @classmethod
    def read(cls, entry: Any, where: str) -> Recency:
        """From its JSON object. Raises FamilyError naming `where` and the fault."""
        if not isinstance(entry, Mapping) or set(entry) != {"mode", "decay", "gain_per_layer"}:
            raise FamilyError(f"{where}: recency must hold mode, decay and gain_per_layer, not {entry!r}.")
        gains = entry["gain_per_layer"]
        if entry["mode"] not in RECENCY_MODES:
            raise FamilyError(f"{where}: recency mode {entry['mode']!r} is not one of {', '.join(RECENCY_MODES)}.")
        if not _is_number(entry["decay"]) or not 0.0 <= entry["decay"] < 1.0:
            raise FamilyError(f"{where}: recency decay {entry['decay']!r} must be at least 0 and below 1.")
        if not isinstance(gains, list | tuple) or not all(_is_number(gain) and 0 <= gain <= MAX_GAIN for gain in gains):
            raise FamilyError(f"{where}: gain_per_layer must list a number from 0 to {MAX_GAIN:g} for each layer.")
        return cls(entry["mode"], float(entry["decay"]), tuple(float(gain) for gain in gains))

    def blends_with(self, other: Recency) -> bool:
        """Whether gains may be interpolated between the two."""
        mine, theirs = ((r.mode, r.decay, len(r.gain_per_layer)) for r in (self, other))
        return mine == theirs


def family_folder(path_or_hub_id: str | os.PathLike[str]) -> Path:
    """An existing folder as it is; "owner/name" from the hub or its cache. Raises FamilyError when neither has it."""
    text = os.fspath(path_or_hub_id)
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if not isinstance(path_or_hub_id, str) or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise FamilyError(f"no family folder {text}: give the folder that holds family.json, or a hub id owner/name.")
    try:
        files = [FAMILY_FILE, "*/adapter_config.json", "*/adapter_model.safetensors"]
        return Path(snapshot_download(text, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FamilyError(
            f"no folder {text} here, and the hub gave no family of that id ({reason}): check the spelling; offline, "
            "download it where there is a network and give its folder."
        ) from error


def read_family_json(folder: Path) -> dict[str, Any]:
    """The checked content of `family.json`; adapter folders are named, not opened.

    Raises FamilyError naming the file and the first fault.
    """
    path = folder / FAMILY_FILE
    try:
        entries: Any = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise FamilyError(f"{folder} has no {FAMILY_FILE}: it is no family (a lone adapter loads by PEFT).") from error
    except (OSError, ValueError) as error:
        raise FamilyError(f"{path} cannot be read as JSON ({error}): copy or train the family again.") from error
    version = entries.get("format") if isinstance(entries, dict) else None
    if version != FORMAT or isinstance(version, bool):
        raise FamilyError(f"{path} has format {version!r}, this version reads {FORMAT}: update remoe-adapt.")
    _check_keys(path, "the family", entries)
    _check_keys(path, "base", entries["base"])
    for key in ("id", "fingerprint"):
        if not isinstance(entries["base"][key], str) or not entries["base"][key]:
            raise FamilyError(f"{path}: base {key} {entries['base'][key]!r} must be text.")
    if not isinstance(entries["points"], list):
        raise FamilyError(f"{path}: points must be a list.")
    strengths = []
    for point in entries["points"]:
        _check_keys(path, "a point", point)
        _check_adapter(path, point)
        if not _is_number(point["strength"]) or not 0.0 < point["strength"] <= 1.0:
            raise FamilyError(f"{path}: strength {point['strength']!r} must be a number above 0 and at most 1.")
        strengths.append(point["strength"])
    if strengths != sorted(set(strengths)):
        raise FamilyError(f"{path}: strengths {strengths} must rise from point to point.")
    if "control" in entries:
        _check_keys(path, "control", entries["control"])
        _check_adapter(path, entries["control"])
    return dict(entries)


def read_deltas(folder: Path, base_id: str, fingerprint: str) -> dict[str, Tensor]:
    """Deltas [E, D] fp32 on the CPU by router name, of one saved REMOE adapter; low-rank ones are multiplied out.

    Raises FamilyError when the folder is missing, is another kind of adapter or holds more than router deltas,
    AdapterCorruptError when its tensors are truncated or not finite, FingerprintMismatchError when it records another
    base's fingerprint.
    """
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FamilyError(f"{folder} is not a saved adapter ({CONFIG_NAME}: {error}).") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "REMOE":
        raise FamilyError(f"{folder} holds a PEFT adapter of type {kind!r}: a family is made of REMOE adapters.")
    made_for = config.get("base_fingerprint")
    if made_for not in (None, fingerprint):
        raise FingerprintMismatchError(
            f"adapter {folder} was made for {config.get('base_model_name_or_path')!r} ({made_for[:19]}...), its family "
            f"for {base_id!r} ({fingerprint[:19]}...): train it on the family's base."
        )
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise FamilyError(f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}: copy the family again.")
    try:
        tensors = {plain_key(key): tensor.float() for key, tensor in load_file(path).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterCorruptError(f"{path} is not a complete safetensors file ({error}): copy it again.") from error
    deltas: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        router, _, kind = key.rpartition(".")
        if kind == "remoe_delta":
            deltas[router] = tensor
        elif kind == "remoe_A" and f"{router}.remoe_B" in tensors:
            deltas[router] = tensors[f"{router}.remoe_B"] @ tensor
        elif kind != "remoe_B" or f"{router}.remoe_A" not in tensors:
            raise FamilyError(f"{path} holds {key}, which is not a router's delta: a family changes routers only.")
    for name, delta_ED in deltas.items():
        check_finite(name, delta_ED, str(path))
        if delta_ED.dim() != 2:
            raise FamilyError(f"{path}: the delta of {name} has shape {list(delta_ED.shape)}, not [experts, hidden].")
    if not deltas:
        raise FamilyError(f"{path} holds no router deltas.")
    return deltas


def write_json(path: Path, entries: Mapping[str, Any]) -> None:
    """Write in one piece: readers see the old file or the new one. Raises FamilyError for what JSON cannot hold."""
    try:
        text = json.dumps(entries, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise FamilyError(f"{path}: a certificate holds what JSON cannot ({error}): use finite numbers.") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def write_whole(path: Path, text: str) -> None:
    """Write a file in one piece: readers see the old one or the new one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number that JSON may hold")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_keys(path: Path, what: str, entry: Any) -> None:
    required, optional = _KEYS[what]
    if not isinstance(entry, dict):
        raise FamilyError(f"{path}: {what} must be an object with {', '.join(sorted(required))}, not {entry!r}.")
    if missing := sorted(required - entry.keys()):
        raise FamilyError(f"{path}: {what} lacks {', '.join(missing)}.")
    if unknown := sorted(entry.keys() - required - optional):
        raise FamilyError(f"{path}: {what} has unknown keys {unknown}; known are {sorted(required | optional)}.")
    if not isinstance(entry.get("certificate", {}), dict):
        raise FamilyError(f"{path}: the certificate of {what} must be an object, not {entry['certificate']!r}.")


def _check_adapter(path: Path, entry: dict[str, Any]) -> None:
    """An adapter is named by one folder beside family.json: never a path out of the family."""
    name = entry["adapter"]
    if not isinstance(name, str) or not name or name in (".", "..") or "/" in name or "\\" in name:
        raise FamilyError(f"{path}: adapter {name!r} must be the name of a folder beside {FAMILY_FILE}.")
