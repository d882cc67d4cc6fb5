"""Router LoRAs in GGUF for `llama-server --lora`: one file for each operating point, scaled and added up by the server.

Tensors `<weight>.lora_a` [r, D] and `<weight>.lora_b` [E, r]; llama.cpp adds scale * (alpha / r) * B A to the product.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remoe_adapt._support import check_extra, disk_faults, printable
from remoe_adapt.engines import left_out, new_files
from remoe_adapt.engines.gguf.patch import NOTHING_LEFT, Base
from remoe_adapt.engines.gguf.routers import GgufModel
from remoe_adapt.errors import ConfigError, ExportError, UnsupportedRouterError
from remoe_adapt.family import Family
from remoe_adapt.routers import GGUF_ARCH, GGUF_LORA_IGNORED

# A router LoRA carries these two entries: its strength, and the fingerprint of its base.
STRENGTH_KEY, FINGERPRINT_KEY = "remoe.strength", "remoe.fingerprint"


def export_gguf_lora(
    source: str | os.PathLike[str],
    family: Family,
    out: str | os.PathLike[str],
    *,
    strengths: Sequence[float] | None = None,
    rank: int | None = None,
    base: Base = None,
    force: bool = False,
) -> dict[str, Any]:
    """Write LoRAs for the model `source` into the folder `out`, one for each of `strengths` (None: the stored points).

    rank: None keeps the delta as it is; else the nearest of that rank, and `relative_error` is the largest
        |delta - BA| / |delta| (Frobenius) of a router.
    base: what the routers are compared with, see `GgufModel.check`.
    force: also for a model that seems to be of another base, or an architecture that is not known.

    A server adds scale times the delta, so between two points p < q the strength s is the scales (q - s) / (q - p) and
    (s - p) / (q - p), below the first point s / p.

    After an error nothing is left of what was written. Raises UnsupportedRouterError for architectures whose routers
    ignore a LoRA or are not known to use one, MissingDependencyError without the gguf package, ConfigError for a rank
    below 1, strengths that repeat, a file that exists or a source that is patched in place, ExportError when a file
    cannot be written, else as `GgufModel` and `GgufModel.check`.
    """
    model, folder = GgufModel(source), Path(out)
    check_applied(model.architecture, force=force)
    if any(undo.state(file) != "original" for file, undo in model.undone()):
        raise ConfigError(
            f"{printable(source)} is patched in place, a LoRA would come on top: undo that first (--undo)."
        )
    if rank is not None and rank < 1:
        raise ConfigError(f"rank {rank} is impossible: use 1 or more, or leave it out for the delta as it is.")
    # A LoRA is added to the product, so a model whose routers are changed already would get the delta twice.
    layers = model.check(family, base, force=force)
    # Stored points are enough: the server adds two of them up for a strength between.
    chosen = family.strengths if strengths is None else tuple(strengths)
    targets = [folder / f"{Family.adapter_name(strength)}.gguf" for strength in chosen]
    # Two strengths may differ by less than their file names show.
    if len(set(targets)) < len(targets) or not targets or 0.0 in chosen:
        raise ConfigError(f"strengths {list(chosen)} must differ, and 0 needs no LoRA: it is scale 0.")
    rows = []
    with disk_faults(folder, ExportError, NOTHING_LEFT), new_files(targets) as drafts:
        for strength, target, draft in zip(chosen, targets, drafts, strict=True):
            factors, error = {}, 0.0
            for name, delta_ED in family.deltas(strength).items():
                a_RD, b_ER = factor(delta_ED, rank)
                if not (torch.isfinite(a_RD).all() and torch.isfinite(b_ER).all()):
                    raise ExportError(f"the delta of {printable(name)} at strength {strength:g} is too large for fp32.")
                factors[model.weights[layers[name]].name] = (a_RD, b_ER)
                # In fp64, because the error of an exact factorisation is near what fp32 can tell.
                norm = delta_ED.double().norm()
                if norm > 0:
                    error = max(error, float((delta_ED.double() - b_ER.double() @ a_RD.double()).norm() / norm))
            _write(draft, model.architecture, family, strength, factors)
            rows.append(
                {
                    "strength": strength,
                    "file": str(target),
                    "bytes": draft.stat().st_size,
                    "rank": max(len(a_RD) for a_RD, _ in factors.values()),
                    "relative_error": error,
                    **left_out(family, strength),
                }
            )
    shown = printable(model.architecture)
    return {"out": str(folder), "base": family.base_id, "architecture": shown, "loras": rows}


def check_applied(architecture: str, *, force: bool = False) -> None:
    """Raises UnsupportedRouterError when llama.cpp would load a router LoRA for this architecture without effect."""
    if architecture in GGUF_LORA_IGNORED:
        raise UnsupportedRouterError(
            f"llama.cpp multiplies by the router of {architecture} without its LoRA, which would be silently ignored: "
            "use `remoe export gguf`."
        )
    if architecture not in GGUF_ARCH.values() and not force:
        raise UnsupportedRouterError(
            f"architecture {printable(architecture)!r} is not known to apply a LoRA to its routers (a LoRA that is not "
            "applied is silently ignored): use `remoe export gguf`, or --force and check that routing changes."
        )


def factor(delta_ED: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """(A [r, D], B [E, r]) fp32 whose product is the delta exactly, or the nearest of a lower rank."""
    experts, hidden = delta_ED.shape
    if rank is None or rank >= min(experts, hidden):
        # A full delta is one factor and the identity the other, so nothing is rounded; the rank is the smaller side.
        tall = experts > hidden
        return (torch.eye(hidden), delta_ED) if tall else (delta_ED, torch.eye(experts))
    u_EM, s_M, v_MD = torch.linalg.svd(delta_ED.double(), full_matrices=False)
    return (s_M[:rank, None] * v_MD[:rank]).float(), u_EM[:, :rank].float()


def _write(
    target: Path, architecture: str, family: Family, strength: float, factors: dict[str, tuple[Tensor, Tensor]]
) -> None:
    check_extra("gguf", "export", "GGUF LoRAs need the gguf package")
    import gguf

    writer = gguf.GGUFWriter(target, architecture)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        # One alpha for all: where ranks differ none may be scaled by it, and 0 leaves alpha / r out.
        ranks = {len(a_RD) for a_RD, _ in factors.values()}
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(ranks.pop()) if len(ranks) == 1 else 0.0)
        writer.add_name(f"{family.base_id} at strength {strength:g}")
        writer.add_string(FINGERPRINT_KEY, family.fingerprint)
        writer.add_float32(STRENGTH_KEY, strength)
        for name, (a_RD, b_ER) in factors.items():
            writer.add_tensor(f"{name}.lora_a", a_RD.contiguous().numpy())
            writer.add_tensor(f"{name}.lora_b", b_ER.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
