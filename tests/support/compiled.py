"""Compiles what a call of ours would launch, for a GPU that is not here, and reads registers and spills of the binary.

Run it in a process of its own, without TRITON_INTERPRET: kernels that were jitted for the interpreter do not compile.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


class _Driver:
    """Stands for the driver of a GPU with this compute capability (90 for an H100)."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiled_only(capability: int) -> Iterator[list[Any]]:
    """Launches compile, and run nothing: their kernels are in the list. Tensors may be on the meta device."""
    found: list[Any] = []
    run: Callable[..., Any] = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    driver.set_active(_Driver(capability))
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = run


def resources(kernel: Any) -> dict[str, int]:
    """Registers of a thread, bytes of its stack and of shared memory, as cuobjdump reads them; `spills` from ptxas."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        text = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", binary], capture_output=True, text=True, check=True
        ).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    return {"registers": usage["REG"], "stack_bytes": usage["STACK"], "local_bytes": usage["LOCAL"]}
