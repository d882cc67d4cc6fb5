"""`remoe export` and `remoe pack`: the adapter for engines without this package, experts in one piece each."""

from __future__ import annotations

import typer
from rich.console import RenderableType

from remoe_adapt._support import size_text
from remoe_adapt.cli import options as opt
from remoe_adapt.cli import report
from remoe_adapt.cli.app import app, command, export_app
from remoe_adapt.cli.options import CommandResult, numbers
from remoe_adapt.cli.report import byte_progress, quiet_libraries


@command(export_app, "merged")
def merged(
    base: opt.ExportBase, family: opt.ExportFamily, out: opt.ExportFolder, strength: opt.AtStrength,
    force: opt.Force = False, as_json: opt.Json = False,
) -> CommandResult:  # fmt: skip
    """A checkpoint for transformers, vLLM, SGLang: only files with routers are rewritten, the others are linked."""
    from remoe_adapt.engines import export_merged
    from remoe_adapt.family import Family

    with byte_progress("writing") as (total, advance):
        result = export_merged(
            base, Family.load(family), strength, out, force=force, on_total=total, on_bytes=advance
        )  # fmt: skip
    return result, [report.figures_table("merged checkpoint", result)]


@command(export_app, "lora")
def lora(
    base: opt.ExportBase, family: opt.ExportFamily, out: opt.ExportFolder, strength: opt.AtStrength,
    dtype: opt.Dtype = "auto", force: opt.Force = False, as_json: opt.Json = False,
) -> CommandResult:  # fmt: skip
    """A stock PEFT LoRA, which PEFT loads without this package; --dtype is what the base will be loaded in."""
    from remoe_adapt.engines import export_lora, not_applied
    from remoe_adapt.family import Family

    result = export_lora(base, Family.load(family), strength, out, dtype=dtype, force=force)
    # Not on stdout, where --json has its object; a LoRA that is silently ignored is worse than none.
    if note := not_applied(result["engines"]):
        typer.echo(note, err=True)
    shown = {name: value for name, value in result.items() if name != "engines"}
    return result, [report.figures_table("PEFT LoRA", shown)]


@command(export_app, "gguf")
def gguf(
    model: opt.GgufModel, family: opt.OptionalFamily = None, out: opt.OptionalGguf = None,
    strength: opt.OptionalStrength = None, base: opt.GgufBase = None, in_place: opt.InPlace = False,
    split: opt.Split = False, undo: opt.UndoInPlace = False, force: opt.Force = False, as_json: opt.Json = False,
) -> CommandResult:  # fmt: skip
    """An existing GGUF with only its routers replaced: a copy, in place with an undo file, or split.

    A split model has its routers in a small first part. Other strengths exported from it write that part alone.
    """
    from remoe_adapt.engines.gguf import export_gguf, patch_in_place, split_gguf, undo_in_place
    from remoe_adapt.family import Family

    if undo:
        if family or out or in_place or split:
            raise typer.BadParameter("--undo takes the model alone")
        result = undo_in_place(model)
        return result, [report.figures_table("routers restored", result)]
    if family is None or strength is None:
        raise typer.BadParameter("give MODEL.gguf FAMILY OUT.gguf --strength S, or MODEL.gguf --undo")
    # Equal means both or neither: one of the two says where the result goes.
    if in_place == (out is not None) or (in_place and split):
        raise typer.BadParameter("give either OUT.gguf (with or without --split) or --in-place")
    points = Family.load(family)
    if out is None:
        result = patch_in_place(model, points, strength, base=base, force=force)
    else:
        export = split_gguf if split else export_gguf
        with byte_progress("writing") as (total, advance):
            result = export(model, points, strength, out, base=base, force=force, on_total=total, on_bytes=advance)
    return result, [report.figures_table("GGUF", result)]


@command(export_app, "gguf-lora")
def gguf_lora(
    model: opt.GgufModel, family: opt.ExportFamily, out: opt.ExportFolder, strength: opt.LoraStrengths = None,
    rank: opt.LoraRank = None, base: opt.GgufBase = None, force: opt.Force = False, as_json: opt.Json = False,
) -> CommandResult:  # fmt: skip
    """Router LoRAs for `llama-server --lora`, one file for each operating point; the server scales and adds them."""
    from remoe_adapt.engines.gguf import export_gguf_lora
    from remoe_adapt.family import Family

    strengths = None if strength is None else numbers(strength)
    result = export_gguf_lora(model, Family.load(family), out, strengths=strengths, rank=rank, base=base, force=force)
    rows = {
        f"strength {row['strength']:g}": {k: v for k, v in row.items() if k != "strength"} for row in result["loras"]
    }
    # Scales add up, so none of them may start at 1.
    flags = " ".join(f"--lora-scaled {row['file']}:0" for row in result["loras"])
    return result, [report.figures_table("GGUF LoRAs", rows), f"llama-server ... {flags}"]


@command(app, "pack")
def pack(
    model: opt.Model, out: opt.PackOut, bits: opt.Bits = None, dense_bits: opt.DenseBits = None,
    dtype: opt.Dtype = "auto", overwrite: opt.Overwrite = False, as_json: opt.Json = False,
) -> CommandResult:  # fmt: skip
    """Copy a model's experts so that the expert cache gets each in one large direct read, quantised if you like.

    A run that was killed goes on where it was when it is started again.
    """
    from remoe_adapt.expert_cache import pack_experts

    quiet_libraries()
    with byte_progress("packing") as (total, advance):
        result = pack_experts(
            model, out, bits=bits, dense_bits=dense_bits, dtype=dtype, overwrite=overwrite, on_start=total,
            on_bytes=advance,
        )  # fmt: skip
    shown: list[RenderableType] = [f"{result['experts']} experts, {size_text(result['bytes'])}, in {result['out']}"]
    if bits is not None or dense_bits in (4, 8):
        shown.insert(0, report.weight_error_table(result))
    return result, shown
