"""The command line as a caller sees it: an exit status, one object on stdout, one line on stderr."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from remoe_adapt.cli.app import app


def call(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)


def found(*args: object) -> dict[str, Any]:
    """What a command prints with --json: nothing but one object."""
    result = call(*args, "--json")
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    assert isinstance(value, dict)
    return value


def refused(*args: object, status: int = 1) -> str:
    """The one line on stderr of a command that fails."""
    result = call(*args)
    assert (result.exit_code, result.stdout) == (status, "")
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in result.stderr
    return last
