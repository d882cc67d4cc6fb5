"""Whether it can be told which experts of a served model are in memory, which is what the prior `resident` prefers.

The preloaded library asks the kernel about the pages of the mapped file (mincore). Where it cannot, every expert looks
alike and the prior does nothing, without any error; so it is said here, from outside, by what the process maps.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from remoe_adapt._support import printable
from remoe_adapt.checkpoints import GgufFile, shard_paths
from remoe_adapt.engines.llamacpp.process import covers, mapped_spans
from remoe_adapt.errors import ConfigError

# As llama.cpp names the tensors that hold all experts of a layer.
_EXPERTS = "_exps."


def expert_spans(model: Path) -> list[tuple[Path, list[tuple[int, int]]]]:
    """(file, (begin, end) in bytes of every tensor of experts in it) of a GGUF, of a split one by its first part.

    Raises ConfigError for a file that is none.
    """
    tensors = [
        (path, (tensor.offset, tensor.offset + tensor.size))
        for path in shard_paths(model, ConfigError)
        for tensor in GgufFile(path, ConfigError).tensors
        if _EXPERTS in tensor.name
    ]
    return [(path, [span for _, span in found]) for path, found in groupby(tensors, lambda one: one[0])]


def why_blind(pid: int, spans: Sequence[tuple[Path, Sequence[tuple[int, int]]]]) -> str | None:
    """Why the residency of these experts cannot be told in a running process, in words; None: it can.

    Raises OSError when the process has ended.
    """
    for path, wanted in spans:
        if not is_told(path):
            return (
                f"{printable(path)} belongs to another user and may not be written, and Linux then says of every page "
                "that it is in memory: serve a file of your own"
            )
        if not covers(mapped_spans(pid, path), wanted):
            return (
                f"the server does not have the experts of {printable(path)} mapped but in memory of its own: start it "
                "with memory mapping, and with its experts on the CPU"
            )
    return None


def is_told(path: Path) -> bool:
    """Whether Linux (5.2 and later) tells this process which pages of a file are in memory, and does not say "all"."""
    try:
        return path.stat().st_uid == os.geteuid() or os.access(path, os.W_OK, effective_ids=True)
    except OSError:
        return False
