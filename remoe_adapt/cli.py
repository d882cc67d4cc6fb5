"""`remoe`: every command registers itself in `cli_app` when its file is imported here."""

from __future__ import annotations

import os
import sys
import warnings

# In the order in which the help lists the commands.
# isort: off
from remoe_adapt import cli_run, cli_trace, cli_train, cli_pack, cli_profiles, cli_export  # noqa: F401
from remoe_adapt import cli_bench, cli_decode, cli_controller, cli_watch  # noqa: F401

# isort: on
from remoe_adapt.cli_app import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of `remoe`."""
    # What libraries warn of is for those who write code with them, and for `python -W`; processes of ours inherit it.
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app(prog_name="remoe")
