"""What a user gave as a model or a family: a folder of this machine, or an id of the Hugging Face hub."""

from __future__ import annotations

import os
from typing import Any

from huggingface_hub import constants, model_info, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from remoe_adapt._support import first_line, printable
from remoe_adapt.errors import ConfigError, RemoeError

# The hub is asked once, and not long, before anything is downloaded.
_ASK_S = 10.0


def is_path(text: str) -> bool:
    """Whether it can only be a path: no hub id looks so, or the folder that it would lie in is here."""
    # os.path: names that no file system takes are no folders to it; pathlib raises for some.
    return (
        text in ("", ".", "..")
        or text.startswith(("./", "../", "/", "~"))
        or text.endswith("/")
        or "\\" in text
        or text.count("/") > 1
        or os.path.isabs(text)  # noqa: PTH117
        or ("/" in text and os.path.isdir(os.path.dirname(text)))  # noqa: PTH112, PTH120
    )


def check_place(given: str | os.PathLike[str], what: str, *, error: type[RemoeError] = ConfigError, **hub: Any) -> None:
    """Whether a folder, or a model of the hub or its cache, is there, before anybody takes long to look for it.

    what: what it is to be, the beginning of messages. hub: `cache_dir`, `revision`, `token`, `local_files_only`, as
    from_pretrained takes them.

    Raises `error` when it is not, naming what was given, and the reason.
    """
    text, shown = os.fspath(given), printable(os.fspath(given))
    if os.path.isdir(text):  # noqa: PTH112
        return
    if os.path.isfile(text):  # noqa: PTH113
        raise error(f"{what} {shown!r} cannot be loaded, it is a file: give its folder, or a hub id.")
    cached = _cached(text, hub)
    if not isinstance(given, str) or (is_path(text) and not cached):
        more = " (~ is not expanded: write the whole path)" if text.startswith("~") else ""
        raise error(
            f"{what} {shown!r} cannot be found: no such folder{more}. Give an existing folder, or a hub id owner/name."
        )
    if not cached:
        _ask_hub(text, shown, what, error, hub)


def _cached(text: str, hub: dict[str, Any]) -> bool:
    cache_dir, revision = hub.get("cache_dir"), hub.get("revision")
    try:
        found = try_to_load_from_cache(text, "config.json", cache_dir=cache_dir, revision=revision)
    except (HFValidationError, OSError, ValueError):
        return False
    return isinstance(found, str)


def _ask_hub(text: str, shown: str, what: str, error: type[RemoeError], hub: dict[str, Any]) -> None:
    start = f"{what} {shown!r} cannot be found: it is no folder here"
    if hub.get("local_files_only") or constants.HF_HUB_OFFLINE:
        raise error(
            f"{start}, and not in the hub's cache, which alone may be used (local_files_only or HF_HUB_OFFLINE): check "
            "the spelling, or download it first."
        )
    try:
        model_info(text, revision=hub.get("revision"), token=hub.get("token"), timeout=_ASK_S)
    except HFValidationError as fault:
        raise error(f"{start}, and no hub id (owner/name): give one of them.") from fault
    except (RepositoryNotFoundError, RevisionNotFoundError) as fault:
        raise error(f"{start}, and the hub shows no such model ({first_line(fault)}): check the spelling.") from fault
    except Exception as fault:  # of the network, in classes that change with the hub's client
        raise error(
            f"{start}, and the hub cannot be asked for it ({first_line(fault)}): check the spelling; offline, download "
            "it where there is a network and give its folder."
        ) from fault
