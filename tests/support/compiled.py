"""Compiles what a call of ours would launch, for a GPU that is not here, and reads registers and spills of the binary.

Run it in a process of its own, without TRITON_INTERPRET: kernels that were jitted for the interpreter do not compile.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from remoe_adapt.triton_kernels.experts import experts_forward
from remoe_adapt.triton_kernels.slots import FLOAT, FP8, INT4, MXFP4, Activation, SlotMatrix
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


def resources(kernel: Any) -> dict[str, Any]:
    """Registers of a thread, and bytes of its stack, where registers are spilled to; the assembly's loads by width."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        text, assembly = (_cuobjdump(option, binary) for option in ("--dump-resource-usage", "-sass"))
    loads = re.findall(r"\bLDG\.E\.?(U8|U16|64|128)?\S*", assembly)
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    return {
        "registers": usage["REG"],
        "stack_bytes": usage["STACK"] + usage["LOCAL"],
        "shared_bytes": kernel.metadata.shared,
        "loads": {width or "32": loads.count(width) for width in sorted(set(loads))},
    }


def _cuobjdump(option: str, binary: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, binary], capture_output=True, text=True, check=True).stdout


def meta_matrices(kind: str, inner: int, width: int, dtype: torch.dtype, group: int = 32) -> tuple[SlotMatrix, ...]:
    """Both matrices of experts of this shape, whose memory is not there; slots of a pool are 16 MiB apart."""
    return tuple(_meta_matrix(kind, *shape, dtype, group) for shape in ((2 * inner, width), (width, inner)))


def _meta_matrix(kind: str, rows: int, cols: int, dtype: torch.dtype, group: int) -> SlotMatrix:
    def part(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        slot = (1 << 24) // dtype.itemsize
        memory = torch.empty(8 * slot, dtype=dtype, device="meta")
        return memory.as_strided((8, *shape), (slot, shape[1], 1) if len(shape) > 1 else (slot, 1))

    found: dict[str, torch.Tensor] = {}
    base, _, minima = kind.partition("+")
    if base == FLOAT:
        found["codes"] = part(dtype, rows, cols)
    elif base == FP8:
        found["codes"] = part(torch.float8_e4m3fn, rows, cols)
        found["scales"] = part(torch.float32, -(-rows // 128), -(-cols // 128))
    elif base == MXFP4:
        found |= {"codes": part(torch.uint8, rows, cols // 2), "scales": part(torch.uint8, rows, cols // 32)}
    else:
        found["codes"] = part(torch.uint8, rows, cols // 2) if base == INT4 else part(torch.int8, rows, cols)
        for name in ("scales", "minima") if minima else ("scales",):
            found[name] = part(torch.float16, rows, cols // group)
    return SlotMatrix(kind=base, bias=part(dtype, rows), **found)


def main() -> None:
    """Write a JSON list of what the cases compile to, each argument one: capability:kind:tokens:choices:IxD:dtype."""
    rows = []
    for case in sys.argv[1:]:
        capability, kind, tokens, choices, shape, dtype_name = case.split(":")
        inner, width = map(int, shape.split("x"))
        dtype = getattr(torch, dtype_name)
        up, down = meta_matrices(kind, inner, width, dtype)
        x_TD = torch.empty(int(tokens), width, dtype=dtype, device="meta")
        slots_TC = torch.empty(int(tokens), int(choices), dtype=torch.int32, device="meta")
        with compiled_only(int(capability)) as kernels:
            experts_forward(x_TD, slots_TC, slots_TC.float(), up, down, Activation())
        for kernel in kernels:
            rows.append({"case": case, "kernel": kernel.metadata.name, **resources(kernel)})
    sys.stdout.write(json.dumps(rows))


if __name__ == "__main__":
    main()
