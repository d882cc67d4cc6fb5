"""`remoe`: every command registers itself in `cli_app` when its file is imported here."""

from __future__ import annotations

import os
import sys
import warnings
from remoe_adapt.cli import run as cli_run, trace as cli_trace, train as cli_train, export as cli_pack, profiles as cli_profiles, export as cli_export  # noqa: F401
from remoe_adapt.cli import bench as cli_bench, bench as cli_decode, bench as cli_controller, watch as cli_watch  # noqa: F401
from remoe_adapt.cli.app import app


# In the order in which the help lists the commands.
# isort: off

# isort: on

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of `remoe`."""
    # What libraries warn of is for those who write code with them, and for `python -W`; processes of ours inherit it.
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app(prog_name="remoe")
