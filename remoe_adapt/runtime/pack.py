"""`pack_experts`: a pack of the experts of a model by path or hub id."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from remoe_adapt.cache.experts import check_experts
from remoe_adapt.cache.packing import write_pack
from remoe_adapt.cache.store import ExpertStore, experts_modules
from remoe_adapt.errors import ConfigError
from remoe_adapt.runtime.checkpoint import LOADING, find_checkpoint
from remoe_adapt.runtime.pretrained import HUB_OPTIONS


def pack_experts(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    on_start: Callable[[int], None] = lambda total_bytes: None,
    on_bytes: Callable[[int], None] = lambda count: None,
    **options: Any,
) -> dict[str, Any]:
    """Copy the experts of a checkpoint folder or hub id to the folder `out`, for load_with_expert_cache(storage=out).

    path: of the checkpoint, or its hub id.
    out: the folder of the pack.
    dtype: of the copy, which must be that of the model in memory; None: the checkpoint's.
    overwrite, on_start, on_bytes, and what is returned and raised: see cache.packing.write_pack.
    options: of from_pretrained, for the hub.

    Raises ConfigError and UncacheableError as load_with_expert_cache, ConfigError also for other options.
    """
    if unknown := sorted(options.keys() - {*HUB_OPTIONS, "trust_remote_code"}):
        raise ConfigError(
            f"{', '.join(unknown)}: a pack is made of the folder's own safetensors files; give dtype, overwrite, "
            f"trust_remote_code, {', '.join(HUB_OPTIONS)} alone."
        )
    checkpoint = find_checkpoint(path, dtype, options)
    with LOADING:
        skeleton = checkpoint.skeleton()
    check_experts(experts_modules(skeleton))
    source = ExpertStore(checkpoint.folder, skeleton, checkpoint.encoding, direct_io=True)
    name = Path(checkpoint.name).resolve().name if Path(checkpoint.name).is_dir() else checkpoint.name
    try:
        return write_pack(source, out, model_id=name, overwrite=overwrite, on_start=on_start, on_bytes=on_bytes)
    finally:
        source.close()
