"""llama.cpp in this process, for tests that need the pinned wheel."""

from __future__ import annotations

import pytest

from remoe_adapt.engines.llamacpp.in_process import library
from remoe_adapt.errors import MissingDependencyError


def skip_without_engine() -> None:
    """Skip the tests of a module where the wheel is of another version."""
    try:
        library()
    except MissingDependencyError as error:
        pytest.skip(str(error))
