"""Regular expressions of others, matched where they can be stopped.

Nothing stops `re` while it matches, and an expression of ten letters can keep it busy for years. A child process can be
ended, so names are matched there, and PEFT gets the names and never the expression.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable

from remoe_adapt._support import printable
from remoe_adapt.errors import ConfigError

# Names of ten thousand modules take 20 ms; the rest is for a busy machine to start the child.
_SECONDS = 8.0
_CHILD = """
import json, re, sys
pattern, names = json.load(sys.stdin)
matches = re.compile(pattern).fullmatch
json.dump([number for number, name in enumerate(names) if matches(name)], sys.stdout)
"""


def check_pattern(field: str, pattern: str) -> None:
    """Raises ConfigError, naming the field, for an expression that cannot be compiled."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what the syntax may mean one day
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError, ValueError) as error:
        raise ConfigError(
            f"{field}={printable(repr(pattern))} is no regular expression ({printable(error)}): correct it, or list "
            "the routers by name."
        ) from error


def matching(field: str, pattern: str, names: Iterable[str]) -> set[str]:
    """The `names` that the whole expression matches. Raises ConfigError for one that takes more than 8 s."""
    check_pattern(field, pattern)
    tried = list(names)
    try:
        child = subprocess.run(
            # Without site-packages and the user's paths: it starts faster, and nobody's file of that name is run.
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([pattern, tried]),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=True,
        )
        return {tried[number] for number in json.loads(child.stdout)}
    except subprocess.TimeoutExpired:
        reason = f"takes more than {_SECONDS:g} s to match the modules of this model"
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        reason = f"could not be matched ({printable(error)})"
    raise ConfigError(
        f"{field}={printable(repr(pattern))} {reason}: write it without repetitions inside repetitions, or list the "
        "routers by name."
    )
