"""The command line `remoe`: every command registers itself in `cli/app.py` when its file is imported here."""

from __future__ import annotations

import os
import sys
import warnings

# In the order in which the help lists the commands.
# isort: off
from remoe_adapt.cli import plan, run, serve, trace, train, tune, family_report, export, profiles, bench, watch

# isort: on
from remoe_adapt.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of `remoe`."""
    # What libraries warn of is for those who write code with them, and for `python -W`; processes of ours inherit it.
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    # Before transformers is imported, which reads it then; a user who set it is obeyed.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app(prog_name="remoe")
