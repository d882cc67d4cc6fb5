"""Small GGUF files written value by value, right or wrong in any place, and a family for them, for tests."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from remoe_adapt.family.family import Family, FamilyPoint
from remoe_adapt.routers.discover import fingerprint_of_weights

EXPERTS, HIDDEN, LAYERS = 4, 8, 2
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
U8, U16, I32, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 2, 5, 4, 6, 7, 8, 9, 10


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def entry(key: str, kind: int, value: Any) -> bytes:
    """A metadata entry; of an array, `value` is the bytes after its type number."""
    body = text(value) if kind == STRING else value if kind == ARRAY else struct.pack("<" + SCALARS[kind], value)
    return text(key.encode()) + struct.pack("<I", kind) + body


@dataclass
class RawTensor:
    """A tensor as the header tells it (`offset` None: where it belongs), and its bytes."""

    name: str
    shape: tuple[int, ...]
    data: bytes
    kind: int = 0
    offset: int | None = None


@dataclass
class RawGguf:
    """A GGUF of two routers with a tensor of another type before and behind them; change it, then `write` it."""

    entries: dict[str, tuple[int, Any]] = field(default_factory=dict)
    tensors: list[RawTensor] = field(default_factory=list)
    counts: tuple[int, int] | None = None
    more: bytes = b""
    alignment: int = 32

    def written(self) -> bytes:
        entries = [entry(key, *value) for key, value in self.entries.items()]
        counts = self.counts or (len(self.tensors), len(entries))
        header = b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join(entries) + self.more
        data = b""
        for tensor in self.tensors:
            offset = len(data) if tensor.offset is None else tensor.offset
            header += text(tensor.name.encode()) + struct.pack("<I", len(tensor.shape))
            header += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
            header += struct.pack("<IQ", tensor.kind, offset)
            data += tensor.data + b"\0" * (-len(tensor.data) % self.alignment)
        return header + b"\0" * (-len(header) % self.alignment) + data

    def write(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.written())
        return path

    def with_entry(self, key: str, kind: int, value: Any) -> RawGguf:
        return replace(self, entries=self.entries | {key: (kind, value)})


def router(layer: int) -> str:
    return f"blk.{layer}.ffn_gate_inp.weight"


def weights(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(EXPERTS, HIDDEN, generator=generator) for _ in range(LAYERS)]


def raw_model(seed: int = 0) -> RawGguf:
    entries = {
        "general.architecture": (STRING, b"qwen2moe"),
        "general.alignment": (U32, 32),
        "qwen2moe.block_count": (U32, LAYERS),
        "qwen2moe.expert_count": (U32, EXPERTS),
        "qwen2moe.embedding_length": (U32, HIDDEN),
        "tokenizer.ggml.tokens": (ARRAY, struct.pack("<IQ", STRING, 3) + text(b"a") + text(b"bc") + text(b"")),
        "tokenizer.ggml.scores": (ARRAY, struct.pack("<IQ3f", F32, 3, 0.0, 1.0, 2.0)),
    }
    rest = bytes(torch.randint(0, 256, (2, 34), generator=torch.Generator().manual_seed(seed + 99)).flatten().tolist())
    routers = [RawTensor(router(n), (EXPERTS, HIDDEN), w.numpy().tobytes()) for n, w in enumerate(weights(seed))]
    first = RawTensor("token_embd.weight", (1, 32), rest[:34], 8)
    return RawGguf(entries, [first, *routers, RawTensor("output.weight", (1, 32), rest[34:], 8)])


def raw_family(folder: Path, scale: float = 1.0, strengths: Sequence[float] = (0.5, 1.0)) -> Family:
    """Of `raw_model()`, in memory alone."""
    names = [f"model.layers.{layer}.mlp.gate" for layer in range(LAYERS)]
    points = []
    for number, strength in enumerate(strengths, start=7):
        deltas = {name: scale * delta for name, delta in zip(names, weights(number), strict=True)}
        points.append(FamilyPoint(strength, Family.adapter_name(strength), deltas))
    return Family(folder, "tests/raw", fingerprint_of_weights(weights()), tuple(points))
