"""`remoe pack`."""

from __future__ import annotations

from remoe_adapt import cli_options as opt
from remoe_adapt.cli_app import app, command
from remoe_adapt.cli_options import CommandResult
from remoe_adapt.report import byte_progress, quiet_libraries


@command(app, "pack")
def pack(
    model: opt.Model, out: opt.PackOut, dtype: opt.Dtype = "auto", overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
) -> CommandResult:  # fmt: skip
    """Copy a model's experts so that the expert cache gets each in one large direct read."""
    from remoe_adapt.runtime.pack import pack_experts

    quiet_libraries()
    with byte_progress("packing") as (total, advance):
        result = pack_experts(model, out, dtype=dtype, overwrite=overwrite, on_start=total, on_bytes=advance)
    size = result["bytes"] / (1 << 30)
    return result, [f"{result['experts']} experts, {size:.2f} GiB, in {result['out']}"]
