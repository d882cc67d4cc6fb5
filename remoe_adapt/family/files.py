"""The files of a family: `family.json` (format 1), read strictly, and folders and files written all or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from remoe_adapt._support import first_line, printable, read_json, replacing
from remoe_adapt.errors import FamilyError
from remoe_adapt.recency_settings import MAX_GAIN, MODES, NO_PRIOR, Recency, is_number, mode_words, share_words
from remoe_adapt.tuner import FAMILY_FILE

FORMAT = 1
# The folder, inside that of a tuned family, of the family of the adapters that it was tuned on.
TRAINED = "trained"
# Certificates are the most of a file; one beyond this was made to use up memory.
_MAX_BYTES, _MAX_NAME = 16 << 20, 64
# What an object of family.json is called in errors -> (keys that it must have, keys that it may have).
_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "the family": ({"format", "base", "points"}, {"control"}),
    "base": ({"id", "fingerprint"}, set()),
    "a point": ({"strength", "adapter"}, {"recency", "certificate", "recovery", "budget"}),
    "control": ({"adapter"}, {"certificate"}),
}


def read_recency(entry: Any, where: str) -> Recency | None:
    """The recency prior of an operating point from its JSON object, None for the mode "none".

    Raises FamilyError naming `where` and the fault.
    """
    if not isinstance(entry, Mapping) or set(entry) - {"share"} != {"mode", "decay", "gain_per_layer"}:
        raise FamilyError(
            f"{where}: recency must hold mode, decay and gain_per_layer, and share in some modes, not {_shown(entry)}."
        )
    mode, decay, gains = (entry[key] for key in ("mode", "decay", "gain_per_layer"))
    if mode not in mode_words():
        raise FamilyError(f"{where}: recency mode {_shown(mode)} is not one of {', '.join(mode_words())}.")
    if not is_number(decay) or not 0.0 <= decay < 1.0:
        raise FamilyError(f"{where}: recency decay {_shown(decay)} must be at least 0 and below 1.")
    if not isinstance(gains, list | tuple) or not all(is_number(gain) and 0 <= gain <= MAX_GAIN for gain in gains):
        raise FamilyError(f"{where}: gain_per_layer must list a number from 0 to {MAX_GAIN:g} for each layer.")
    share: Any = entry.get("share")
    if "share" in entry and not (mode in MODES and MODES[mode].default_share):
        raise FamilyError(f"{where}: recency share is of the mode {share_words()}; {_shown(mode)} has none.")
    if "share" in entry and (not is_number(share) or not 0.0 < share <= 1.0):
        raise FamilyError(f"{where}: recency share {_shown(share)} must be above 0 and at most 1.")
    if mode == NO_PRIOR:
        return None
    return Recency(mode, tuple(float(gain) for gain in gains), float(decay), share)


def recency_entry(recency: Recency) -> dict[str, Any]:
    """The JSON object that `read_recency` reads."""
    share = {"share": recency.share} if recency.takes_share else {}
    return {"mode": recency.mode, "decay": recency.decay, **share, "gain_per_layer": recency.gain}


def check_recovery(folder: Path) -> None:
    """Raises FamilyError when a folder holds no plain LoRA with safe weights."""
    path = folder / CONFIG_NAME
    if not path.is_file() or not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise FamilyError(
            f"{printable(folder)} is no saved recovery adapter: it needs {CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME}."
        )
    config = read_json(path, FamilyError, max_bytes=_MAX_BYTES)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise FamilyError(f"{printable(folder)} holds an adapter of type {_shown(kind)}: a recovery adapter is a LORA.")


def check_budget(budget: Any, where: str) -> None:
    """Raises FamilyError for what is no perplexity ratio that a point may be aimed at; None is no budget."""
    if budget is not None and (not is_number(budget) or not 1.0 < budget < math.inf):
        raise FamilyError(f"{where}: budget {_shown(budget)} must be a perplexity ratio above 1, as 1.005.")


def usable_path(path: str | os.PathLike[str]) -> Path:
    """A path that may be there or not. Raises FamilyError for one that no disk can have."""
    # stat is asked only because it refuses what no path can be: a null byte, too long a name.
    try:
        found = Path(path)
        found.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, TypeError) as error:
        raise FamilyError(f"{printable(repr(path))} can be no folder of a family ({printable(error)}).") from error
    return found


def family_folder(path_or_hub_id: str | os.PathLike[str]) -> Path:
    """An existing folder as it is; "owner/name" from the hub or its cache. Raises FamilyError when neither has it."""
    path = usable_path(path_or_hub_id).expanduser()
    text = os.fspath(path_or_hub_id)
    if path.is_dir():
        return path
    if not isinstance(path_or_hub_id, str) or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise FamilyError(f"no family folder {text}: give the folder that holds family.json, or a hub id owner/name.")
    try:
        # Only what a family needs: a hub repository may hold a whole model as well.
        files = [FAMILY_FILE, "*/adapter_config.json", "*/adapter_model.safetensors"]
        return Path(snapshot_download(text, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FamilyError(
            f"no folder {text} here, and the hub gave no family of that id ({first_line(error)}): check the spelling; "
            "offline, download it where there is a network and give its folder."
        ) from error


def read_family_json(folder: Path) -> dict[str, Any]:
    """The checked content of `family.json`; adapter folders are named, not opened.

    Raises FamilyError naming the file and the first fault.
    """
    path = folder / FAMILY_FILE
    if not path.is_file():
        raise FamilyError(f"{printable(folder)} has no {FAMILY_FILE}: it is no family (a lone adapter loads by PEFT).")
    entries = read_json(path, FamilyError, max_bytes=_MAX_BYTES)
    version = entries.get("format") if isinstance(entries, dict) else None
    # True == 1 in Python, and "format": true is no version.
    if version != FORMAT or isinstance(version, bool):
        raise FamilyError(f"{path} has format {_shown(version)}, this version reads {FORMAT}: update remoe-adapt.")
    _check_keys(path, "the family", entries)
    _check_keys(path, "base", entries["base"])
    for key in ("id", "fingerprint"):
        if not isinstance(entries["base"][key], str) or not entries["base"][key]:
            raise FamilyError(f"{path}: base {key} {_shown(entries['base'][key])} must be text.")
    if not isinstance(entries["points"], list):
        raise FamilyError(f"{path}: points must be a list.")
    strengths = []
    for point in entries["points"]:
        _check_keys(path, "a point", point)
        # None: the point is a recency prior alone.
        if point["adapter"] is not None:
            _check_adapter(path, point)
        if "recovery" in point:
            _check_adapter(path, {"adapter": point["recovery"]})
        check_budget(point.get("budget"), str(path))
        if not is_number(point["strength"]) or not 0.0 < point["strength"] <= 1.0:
            raise FamilyError(f"{path}: strength {_shown(point['strength'])} must be a number above 0 and at most 1.")
        strengths.append(point["strength"])
    # Interpolation looks for neighbours, so points are in order and none is there twice.
    if strengths != sorted(set(strengths)):
        raise FamilyError(f"{path}: strengths {printable(strengths)} must rise from point to point.")
    if "control" in entries:
        _check_keys(path, "control", entries["control"])
        _check_adapter(path, entries["control"])
    return dict(entries)


def json_text(path: Path, entries: Mapping[str, Any]) -> str:
    """The text of a JSON file. Raises FamilyError for what JSON cannot hold."""
    try:
        return json.dumps(entries, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise FamilyError(f"{path}: a certificate holds what JSON cannot ({error}): use finite numbers.") from error


def write_whole(path: Path, text: str) -> None:
    """Write a file in one piece: readers see the old one or the new one. Raises FamilyError when the disk refuses."""
    write_together({path: text})


def write_together(texts: dict[Path, str]) -> None:
    """Write files in their order, none before all of them are on the disk; folders are made.

    Raises FamilyError when the disk refuses.
    """
    try:
        with ExitStack() as drafts:
            # The stack ends the last one first, and the last of the texts must be the last to take its name.
            for path, text in reversed(texts.items()):
                path.parent.mkdir(parents=True, exist_ok=True)
                drafts.enter_context(replacing(path)).write_text(text, encoding="utf-8")
    except OSError as error:
        raise _refused(next(iter(texts)).parent, error) from error


@contextmanager
def placed(copies: Mapping[Path, Path]) -> Iterator[None]:
    """Folders copied from key to value for the time of the block, and for good when it succeeds; otherwise nothing was
    there and what was there is again. Raises FamilyError when the disk refuses."""
    asides = []
    with ExitStack() as undo:
        try:
            for source, target in copies.items():
                for folder in reversed([target.parent, *target.parent.parents]):
                    if not folder.exists():
                        undo.callback(_remove_empty, folder)
                        folder.mkdir()
                draft, aside = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("new", "old"))
                # Registered before the copy begins, so that half a copy is removed as well.
                undo.callback(_take_back, draft, aside, target, target.exists())
                shutil.copytree(source, draft)
                if target.exists():
                    target.rename(aside)
                    asides.append(aside)
                draft.rename(target)
        except OSError as error:
            raise _refused(next(iter(copies.values())).parent, error) from error
        yield
        # From here on the folders stay: what was written by the block refers to them.
        undo.pop_all()
    # What was there before is kept until nothing can fail any more.
    for aside in asides:
        shutil.rmtree(aside, ignore_errors=True)


def _take_back(draft: Path, aside: Path, target: Path, existed: bool) -> None:
    shutil.rmtree(draft, ignore_errors=True)
    if not existed:
        shutil.rmtree(target, ignore_errors=True)
    elif aside.exists():
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _refused(folder: Path, error: OSError) -> FamilyError:
    reason = error.strerror or printable(error)
    return FamilyError(f"{printable(folder)} cannot be written: {reason}. The family there is as it was.")


def _shown(value: object) -> str:
    return printable(repr(value))


def _check_keys(path: Path, what: str, entry: Any) -> None:
    required, optional = _KEYS[what]
    if not isinstance(entry, dict):
        raise FamilyError(f"{path}: {what} must be an object with {', '.join(sorted(required))}, not {_shown(entry)}.")
    if missing := sorted(required - entry.keys()):
        raise FamilyError(f"{path}: {what} lacks {', '.join(missing)}.")
    if unknown := sorted(entry.keys() - required - optional):
        raise FamilyError(
            f"{path}: {what} has unknown keys {printable(unknown)}; known are {sorted(required | optional)}."
        )
    if not isinstance(entry.get("certificate", {}), dict):
        raise FamilyError(f"{path}: the certificate of {what} must be an object, not {_shown(entry['certificate'])}.")


def _check_adapter(path: Path, entry: dict[str, Any]) -> None:
    """An adapter is named by one folder beside family.json: never a path out of the family."""
    name = entry["adapter"]
    plain = isinstance(name, str) and name.isprintable() and len(name) <= _MAX_NAME and name not in ("", ".", "..")
    if not plain or "/" in name or "\\" in name:
        raise FamilyError(f"{path}: adapter {_shown(name)} must be the name of a folder beside {FAMILY_FILE}.")
