"""What the experts' kernels know of a pool of slots: where a matrix of every slot lies, how its numbers are coded, and
what comes between an expert's two products. No triton here: the reference and a CPU need none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FLOAT, INT8, INT4, MXFP4, FP8 = "float", "int8", "int4", "mxfp4", "fp8"
KINDS = (FLOAT, INT8, INT4, MXFP4, FP8)
SILU, GELU, GELU_TANH, RELU = "silu", "gelu", "gelu_tanh", "relu"
FUNCTIONS = (SILU, GELU, GELU_TANH, RELU)
# A choice whose slot is SKIP counts nothing; one that is DONE was computed before, and lies in the workspace.
SKIP, DONE = -1, -2
# One scale of MXFP4 is for so many columns; blocks of FP8 are so many rows and columns.
MXFP4_GROUP, FP8_BLOCK = 32, 128
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Coding:
    """What kernels are compiled for: all of a matrix but where it lies.

    kind, halves: of SlotMatrix.
    rows, cols: N, the outputs, and K, the inputs.
    group: columns that share a scale; 0 where there is none.
    itemsize: bytes of one code of FLOAT.
    has_minima: whether groups have minima of their own.
    """

    kind: str
    rows: int
    cols: int
    group: int
    halves: bool
    itemsize: int
    has_minima: bool

    @property
    def values(self) -> int:
        """Numbers in 4 bytes of codes; of FLOAT, numbers in the 16 that a thread reads at a time."""
        if self.kind == FLOAT:
            return 16 // self.itemsize
        return 4 if self.kind in (INT8, FP8) else 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SlotMatrix:
    """One matrix of N rows (outputs) and K columns (inputs) in each of S slots.

    All tensors are views [S, ...] whose slots are contiguous inside, at any distance from one another: parts of one
    allocation, or tensors of their own. Numbers are `code * scale + minimum`; a group of columns of a row shares both.

    kind: FLOAT, INT8, INT4, MXFP4 or FP8.
    codes: FLOAT [S, N, K] fp32, fp16 or bf16. INT8 [S, N, K] int8. INT4 and MXFP4 [S, N, K/2] uint8, where byte j of a
        row holds column 2j in its low half and 2j + 1 in its high half; INT4 codes are 0 to 15, those of MXFP4 E2M1.
        FP8 [S, N, K] float8_e4m3fn.
    scales: INT8 and INT4 [S, N, K/G] fp32, fp16 or bf16. MXFP4 [S, N, K/32] uint8, E8M0. FP8 fp32 [S, B, ceil(K/128)]
        with a row for every 128 of N; see `halves`.
    minima: INT8 and INT4, shaped as scales. None: 0 for INT8, -8 * scale for INT4.
    bias: [S, N] fp32, fp16 or bf16.
    coding, arguments: what launches need of it: tensors, codes as words, and the distances of their slots.
    halves: of FP8 alone: gate and up rows were coded apart, so blocks of rows begin anew at N / 2, and B counts both.
    """

    kind: str
    codes: Tensor
    scales: Tensor | None = None
    minima: Tensor | None = None
    bias: Tensor | None = None
    halves: bool = False
    # Kernels ask for these at every launch.
    coding: Coding = field(init=False, repr=False)
    arguments: tuple[Any, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Raises ValueError for tensors that the kernels would read wrongly."""
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r}: give one of {', '.join(KINDS)}.")
        shapes: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
            "codes": ((self.rows, self.codes.shape[-1]), _CODES[self.kind])
        }
        if self.kind != FLOAT:
            if self.scales is None:
                raise ValueError(f"{self.kind} codes without scales.")
            shapes["scales"] = (self.scale_shape, _SCALES[self.kind])
        if self.kind in (INT8, INT4):
            shapes["minima"] = (self.scale_shape, _FLOATS)
        shapes["bias"] = ((self.rows,), _FLOATS)
        for name in ("codes", "scales", "minima", "bias"):
            part: Tensor | None = getattr(self, name)
            if part is None:
                continue
            if name not in shapes:
                raise ValueError(f"{self.kind} codes have no {name}.")
            shape, dtypes = shapes[name]
            if part.shape != (self.slots, *shape) or part.dtype not in dtypes or not part[:1].is_contiguous():
                raise ValueError(
                    f"{name} {part.dtype} {list(part.shape)} with strides {list(part.stride())} for {self.kind} codes "
                    f"{list(self.codes.shape)}: give contiguous slots {[self.slots, *shape]} of one of {dtypes}."
                )
        group, cols = self.group, self.cols
        if group and (group & (group - 1) or group < 16 or cols % (32 if self.kind == FP8 else group)):
            raise ValueError(
                f"{cols} columns in {self.kind} groups of {group}: give whole groups of 16, 32, 64 ... (FP8: a "
                "multiple of 32 columns)."
            )
        # Kernels read codes in words of 4 bytes.
        codes = self.codes if self.kind == FLOAT else self.codes.view(torch.int32)
        parts = (codes, self.scales, self.minima, self.bias)
        arguments = tuple(value for part in parts for value in (part, 0 if part is None else part.stride(0)))
        coding = Coding(
            self.kind, self.rows, cols, group, self.halves, self.codes.element_size(), self.minima is not None
        )
        object.__setattr__(self, "arguments", arguments)
        object.__setattr__(self, "coding", coding)

    @property
    def slots(self) -> int:
        """Slots of the pool."""
        return self.codes.shape[0]

    @property
    def rows(self) -> int:
        """N, the outputs."""
        return self.codes.shape[1]

    @property
    def cols(self) -> int:
        """K, the inputs."""
        return self.codes.shape[2] * (2 if self.kind in (INT4, MXFP4) else 1)

    @property
    def group(self) -> int:
        """Columns that share a scale; 0 where there is none."""
        if self.kind == FP8:
            return FP8_BLOCK
        return 0 if self.scales is None else self.cols // max(1, self.scales.shape[-1])

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Rows and columns of the scales of one slot."""
        if self.kind == FP8:
            parts = 2 if self.halves else 1
            return parts * -(-self.rows // parts // FP8_BLOCK), -(-self.cols // FP8_BLOCK)
        if self.kind == MXFP4:
            return self.rows, self.cols // MXFP4_GROUP
        return self.rows, 0 if self.scales is None else self.scales.shape[-1]


_CODES = {
    FLOAT: _FLOATS,
    INT8: (torch.int8,),
    INT4: (torch.uint8,),
    MXFP4: (torch.uint8,),
    FP8: (torch.float8_e4m3fn,),
}
_SCALES = {INT8: _FLOATS, INT4: _FLOATS, MXFP4: (torch.uint8,), FP8: (torch.float32,)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """What comes between the two products: `function(gate) * (up + shift)`, of rows that lie in one matrix.

    function: SILU (`gate * sigmoid(alpha * gate)`), GELU (by erf), GELU_TANH or RELU.
    alpha: of SILU.
    limit: gates are cut to at most this, ups to +- this, before anything else; None: they are not.
    shift: added to the ups.
    interleaved: rows are gate, up, gate, up, ...; else all gates come before all ups.

    gpt-oss is `Activation(alpha=1.702, limit=7.0, shift=1.0, interleaved=True)`.
    """

    function: str = SILU
    alpha: float = 1.0
    limit: float | None = None
    shift: float = 0.0
    interleaved: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for a function that the kernels do not know."""
        if self.function not in FUNCTIONS:
            raise ValueError(f"function {self.function!r}: give one of {', '.join(FUNCTIONS)}.")


def check_experts(x_TD: Tensor, slots_TC: Tensor, weights_TC: Tensor, up: SlotMatrix, down: SlotMatrix) -> None:
    """Raises ValueError where a kernel would read or write beside a tensor."""
    tokens, width = x_TD.shape
    first, second = up.coding, down.coding
    if first.cols != width or first.rows != 2 * second.cols or second.rows != width or x_TD.stride(1) != 1:
        raise ValueError(
            f"hidden states {width} wide, strides {list(x_TD.stride())}, for experts {first.rows}x{first.cols} and "
            f"{second.rows}x{second.cols}."
        )
    if slots_TC.shape != weights_TC.shape or slots_TC.shape[:1] != (tokens,) or slots_TC.dtype != torch.int32:
        raise ValueError(
            f"slots {slots_TC.dtype} {list(slots_TC.shape)} and weights {list(weights_TC.shape)} for {tokens} tokens: "
            "give int32 slots and as many weights."
        )
    if up.slots != down.slots:
        raise ValueError(f"{up.slots} slots of the first matrix, {down.slots} of the second.")
