"""`benchmarks/run.py pool`: experts straight from a pool of slots on a GPU, kernels alone and whole decode steps.

Kernels: one layer's experts of Qwen3-30B-A3B's shape, other slots in each call, so that they come from the device's
memory and not from its caches; timed in a CUDA graph and held to the bandwidth of a copy on the same device. Decode
steps are those of pool_decode.py. With `quick` on a machine without a GPU the kernels are interpreted on tiny shapes
(TRITON_INTERPRET=1), which says that they run, and nothing of how fast.
"""

from __future__ import annotations

import functools
import itertools
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from remoe_adapt.bench.gating import graph_us, no_gpu
from remoe_adapt.bench.pool_decode import DecodeSizes, decode_rows
from remoe_adapt.errors import ConfigError
from remoe_adapt.triton_kernels.slots import (
    FLOAT,
    FP8,
    FP8_BLOCK,
    INT4,
    INT8,
    MXFP4,
    MXFP4_GROUP,
    Activation,
    SlotMatrix,
)

if TYPE_CHECKING:
    from remoe_adapt.triton_kernels.experts import Tiling

Row = dict[str, Any]
# By the name of a row: kind, columns of a group, whether there are minima, and the share of the copy bandwidth that one
# token must reach.
CODINGS: dict[str, tuple[str, int, bool, float | None]] = {
    "bf16": (FLOAT, 0, False, 0.85),
    "int8": (INT8, 32, False, None),
    "int4": (INT4, 32, False, 0.5),
    "int4_minima": (INT4, 32, True, 0.5),
    "int4_g128": (INT4, 128, False, 0.5),
    "mxfp4": (MXFP4, MXFP4_GROUP, False, 0.5),
    "fp8": (FP8, FP8_BLOCK, False, None),
}
_COPY_BYTES = 1 << 30
# Slots begin at multiples of it, and so do the parts of one.
_ALIGNMENT = 256


@dataclass(frozen=True, kw_only=True)
class PoolOptions:
    """What to measure.

    layers: of the checkpoint that decodes.
    tokens: that are timed of each arm, behind `warm` others.
    codings: of the kernels' rows, by comma.
    sweep: try other tilings for these codings, by comma, or for all of them (true), and tell the best.
    decode: measure decode steps too.
    quick: tiny shapes; on a machine without a GPU too.
    work: folder for the checkpoint, some GiB; None: one in the user's cache. It is removed afterwards.
    """

    layers: int = 8
    tokens: int = 96
    warm: int = 64
    codings: str = ",".join(CODINGS)
    sweep: bool | str = False
    decode: bool = True
    quick: bool = False
    work: Path | str | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        for names in (self.codings, self.sweep if isinstance(self.sweep, str) else ""):
            for name in filter(None, names.split(",")):
                if name not in CODINGS:
                    raise ConfigError(f"coding {name!r}: give some of {', '.join(CODINGS)}.")
        for name in ("layers", "tokens", "warm"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} {value!r}: give a number of at least 1.")

    @property
    def swept(self) -> tuple[str, ...]:
        """Codings to try other tilings for."""
        if isinstance(self.sweep, str):
            return tuple(filter(None, self.sweep.split(",")))
        return tuple(CODINGS) if self.sweep else ()


def run_pool(options: PoolOptions, on_row: Callable[[Row], object] = lambda row: None) -> dict[str, Any]:
    """Keys `kernels` and `decode`, a list of rows each, and `skipped`: what was not measured, and why.

    on_row: hears of each row as it is done; its `what` is "kernels", "sweep" or "decode".

    Raises ConfigError for a work folder with too little room.
    """
    why, found = no_gpu(), dict[str, Any](kernels=[], decode=[], skipped={})
    device = "cpu" if why else "cuda"
    rows = itertools.chain(_kernel_rows(options, device), _sweep_rows(options, device))
    if why:
        found["skipped"]["cuda"] = f"{why}; nothing here says how fast the kernels are"
        if not options.quick:
            return found
        if not os.environ.get("TRITON_INTERPRET"):
            found["skipped"]["kernels"] = "TRITON_INTERPRET=1 is not set, with which Triton interprets them on a CPU"
            rows = itertools.chain()
    for row in rows:
        found["kernels"].append(row)
        on_row(row)
    if options.decode:
        sizes = DecodeSizes.tiny() if options.quick else DecodeSizes(layers=options.layers)
        work = Path(options.work) if options.work else None
        for row in decode_rows(sizes, device, options.tokens, options.warm, work):
            if "skipped" in row:
                found["skipped"][row["arm"]] = row["skipped"]
                continue
            found["decode"].append(row)
            on_row(row)
    return found


@dataclass(frozen=True)
class _Experts:
    """Random experts in a pool, and which of them each call takes."""

    up: SlotMatrix
    down: SlotMatrix
    slot_bytes: int
    sets: list[Tensor]


def _kernel_rows(options: PoolOptions, device: str) -> Iterator[Row]:
    bandwidth = _copy_bandwidth(device)
    for name in options.codings.split(","):
        experts = random_experts(name, *_shape(options), _slots(options), device)
        for tokens in (1, 9) if options.quick else (1, 8, 64, 512):
            yield _row("kernels", name, experts, tokens, bandwidth, None, device)
        del experts


def _sweep_rows(options: PoolOptions, device: str) -> Iterator[Row]:
    """One token with other tilings: those of the first product beside the table's of the second, then the other way
    round with the best of the first. The last row of a coding, `what` "best", has both."""
    bandwidth = _copy_bandwidth(device) if options.swept else 0.0
    for name in options.swept:
        from remoe_adapt.triton_kernels.experts import tiling_of

        experts = random_experts(name, *_shape(options), _slots(options), device)
        best = (tiling_of(experts.up.coding), tiling_of(experts.down.coding, len(experts.sets[0][0])))
        rows: list[Row] = []
        for product in (0, 1):
            tried = [best, *(_with(best, product, tiling) for tiling in _candidates(experts, product, options.quick))]
            for tilings in tried:
                try:
                    row = _row("sweep", name, experts, 1, bandwidth, tilings, device)
                except Exception as error:
                    # A GPU may have too few registers for some, which is for the kernels' compiler to say.
                    row = _empty_row("sweep", name, 1, tilings) | {"error": str(error).splitlines()[0][:120]}
                rows.append(row)
                yield row
            timed = [row for row in rows if row["us"] is not None]
            if timed:
                row = min(timed, key=lambda row: float(row["us"]))
                best = _tiling(row["up"]), _tiling(row["down"])
        yield _row("best", name, experts, 1, bandwidth, best, device)


def _candidates(experts: _Experts, product: int, quick: bool) -> list[Tiling]:
    """Other tilings of one of the products, of a kind that the matrices allow."""
    from remoe_adapt.triton_kernels.experts import Tiling

    matrix, choices = (experts.down if product else experts.up), len(experts.sets[0][0])
    widest = {FLOAT: 1, INT8: 2, FP8: 2}.get(matrix.kind, 4)
    chunks = [n for n in (1, 2, 4) if n <= widest and (matrix.kind == FLOAT or n * 8 <= matrix.group)][-2:]
    lanes = (32, 64, 128) if matrix.kind == FLOAT else (8, 16, 32)
    found = [
        Tiling(lane, rows, warps, chunk, unroll)
        for lane, rows, warps, chunk, unroll in itertools.product(lanes, (1, 2, 4, 8), (1, 2, 4, 8), chunks, (1, 2, 4))
        if warps * 32 >= lane
        and (not product or warps * 32 // lane in (choices, choices // 2))
        # Four rows and four reads of 16 bytes under way are all that registers hold.
        and rows * unroll * chunk <= 32
        and (product or rows <= 4)
    ]
    return found[:1] if quick else found


def _with(tilings: tuple[Tiling, Tiling], product: int, tiling: Tiling) -> tuple[Tiling, Tiling]:
    return (tilings[0], tiling) if product else (tiling, tilings[1])


def _row(what: str, name: str, experts: _Experts, tokens: int, bandwidth: float, tilings: Any, device: str) -> Row:
    """Microseconds of one layer's experts, and the share of the copy bandwidth at which their slots are read."""
    from remoe_adapt.triton_kernels.experts import experts_forward, tiling_of

    width, chosen = experts.up.cols, len(experts.sets[0][0])
    dtype = torch.float16 if device == "cpu" and tokens > 8 else torch.bfloat16
    x_TD = torch.randn(tokens, width, device=device, dtype=dtype)
    weights_TC = torch.rand(tokens, chosen, device=device)
    sets = experts.sets
    if tokens > 1:
        # So many experts has a layer, and its tokens share them.
        some = min(experts.up.slots, 128)
        sets = [torch.rand(tokens, some, device=device).topk(chosen).indices.int() for _ in range(4)]
    turns = itertools.cycle(sets)

    def call() -> None:
        experts_forward(x_TD, next(turns), weights_TC, experts.up, experts.down, Activation(), tilings=tilings)

    row = _empty_row(
        what, name, tokens, tilings or (tiling_of(experts.up.coding), tiling_of(experts.down.coding, chosen))
    )
    row |= {"device": _device_name(device), "K": chosen, "inner": experts.down.cols, "width": width}
    if device == "cpu":
        call()
        return row
    us = graph_us(call, calls=len(sets), replays=15)
    read = round(statistics.mean(len(slots_TC.unique()) for slots_TC in sets)) * experts.slot_bytes
    row |= {"us": us, "bytes": read, "gb_per_s": read / us / 1e3, "of_copy": read / us * 1e6 / bandwidth}
    bar = CODINGS[name][3]
    if what != "sweep" and tokens == 1 and bar is not None:
        row |= {"bar": bar, "met": row["of_copy"] >= bar}
    return row


def _empty_row(what: str, name: str, tokens: int, tilings: Any) -> Row:
    return {
        "what": what, "device": "", "coding": name, "T": tokens, "K": None, "inner": None, "width": None, "us": None,
        "bytes": None, "gb_per_s": None, "of_copy": None, "bar": None, "met": None, "up": _text(tilings[0]),
        "down": _text(tilings[1]), "error": "",
    }  # fmt: skip


def _text(tiling: Tiling) -> str:
    """lanes x rows x warps x chunks x unroll."""
    return "x".join(str(getattr(tiling, name)) for name in ("lanes", "rows", "warps", "chunks", "unroll"))


def _tiling(text: str) -> Tiling:
    from remoe_adapt.triton_kernels.experts import Tiling

    return Tiling(*map(int, text.split("x")))


def _shape(options: PoolOptions) -> tuple[int, int]:
    """Inner size and width of the experts."""
    return (32, 64) if options.quick else (768, 2048)


def _slots(options: PoolOptions) -> int:
    return 8 if options.quick else 512


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu (interpreted)"


def _copy_bandwidth(device: str) -> float:
    """Bytes a second that a copy of a GiB on the device reads and writes."""
    if device == "cpu":
        return float("nan")
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    us = graph_us(functools.partial(torch.empty_like(source).copy_, source), calls=4, replays=15)
    return 2 * _COPY_BYTES / us * 1e6


def random_experts(name: str, inner: int, width: int, slots: int, device: str, chosen: int = 8) -> _Experts:
    """Experts in one allocation, all parts of a slot side by side, of random codes whose numbers are small.

    name: of `CODINGS`.
    inner, width: shape of the experts.
    chosen: of them for a token; no slot comes twice in a set.
    """
    kind, group, minima, _ = CODINGS[name]
    generator = torch.Generator(device).manual_seed(0)
    likes: dict[str, tuple[torch.dtype, tuple[int, int]]] = {}
    for which, rows, cols in (("up", 2 * inner, width), ("down", width, inner)):
        # A shape for tests may be smaller than a group.
        groups = max(1, cols // group) if group else 0
        codes = {FLOAT: torch.bfloat16, INT8: torch.int8, FP8: torch.float8_e4m3fn}.get(kind, torch.uint8)
        likes[f"{which}.codes"] = codes, (rows, cols if codes != torch.uint8 else cols // 2)
        if kind == FP8:
            likes[f"{which}.scales"] = torch.float32, (-(-rows // FP8_BLOCK), -(-cols // FP8_BLOCK))
        elif kind != FLOAT:
            likes[f"{which}.scales"] = torch.uint8 if kind == MXFP4 else torch.float16, (rows, groups)
        if minima:
            likes[f"{which}.minima"] = torch.float16, (rows, groups)
    sizes = [dtype.itemsize * rows * cols for dtype, (rows, cols) in likes.values()]
    places = list(itertools.accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0))
    memory = torch.empty(slots, places[-1], dtype=torch.uint8, device=device)
    parts: dict[str, Tensor] = {}
    for (part, (dtype, shape)), size, first in zip(likes.items(), sizes, places, strict=False):
        parts[part] = memory[:, first : first + size].view(dtype).view(slots, *shape)
        _fill(parts[part], kind, part.endswith("codes"), generator)
    up, down = (
        SlotMatrix(kind=kind, **{name.partition(".")[2]: parts[name] for name in parts if name.startswith(which)})
        for which in ("up.", "down.")
    )
    sets = [
        torch.randperm(slots, generator=generator, device=device)[:chosen].int().reshape(1, -1)
        for _ in range(2 if device == "cpu" else 50)
    ]
    return _Experts(up, down, sum(sizes), sets)


def _fill(part: Tensor, kind: str, codes: bool, generator: torch.Generator) -> None:
    """Random numbers, a slot at a time: all at once they would take as much memory again."""
    for slot in part:
        if not codes:
            slot.fill_(120) if slot.dtype == torch.uint8 else slot.copy_(
                torch.rand(slot.shape, generator=generator, device=slot.device) * 2e-3
            )
        elif kind == FLOAT:
            slot.normal_(0.0, 0.02, generator=generator)
        elif kind == FP8:
            slot.copy_(torch.randn(slot.shape, generator=generator, device=slot.device))
        else:
            slot.view(torch.uint8).random_(0, 256, generator=generator)
