"""Every benchmark by name: `python benchmarks/run.py gating` prints JSON and adds its rows to results/.

Those of `remoe bench` are the same ones with their result files; the others are described in the files beside this one.
Settings are NAME=VALUE of a benchmark's options, as `tokens=300 read_mib_per_s=0`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from remoe_adapt.bench.harness.results import REPO_ROOT, append_row, environment, terminated_as_interrupted
from remoe_adapt.errors import RemoeError

HELD_OUT = ("wikitext2_valid.txt.gz", "gsm8k_test.jsonl.gz", "humaneval.jsonl.gz")
CONTROLLER_SETTINGS = (
    "tokens", "cycles", "gain", "squeezed", "take_mib_per_s", "read_mib_per_s", "expert_bytes", "squeezes",
)  # fmt: skip
DECODE_FIGURES = (
    "tpot_ms", "tpot_p95_ms", "tpot_mean_ms", "hit_rate", "bytes_per_token", "io_bytes_per_token", "stall_share",
    "ppl_ratio", "anon_growth_bytes", "steps", "skipped",
)  # fmt: skip
DECODE_SETTINGS = (
    "tokens", "quality_tokens", "dtype", "direct_io", "prefetch", "pack", "read_mib_per_s",
    "raw_bandwidth_bytes_per_s", "limit_ms", "memory_limit_bytes", "tight_limit_bytes",
)  # fmt: skip
SCALE_FIGURES = (
    "layers", "experts", "expert_bytes", "threads", "direct_io", "arithmetic", "file_bytes", "header_bytes", "open_s",
    "load_s", "dense_bytes", "budget_bytes", "anon_growth_bytes", "maps", "max_map_count", "tpot_ms", "hit_rate",
    "bytes_per_token", "stall_share", "hits_tpot_ms", "hits_hit_rate", "look_up_us", "look_ups_per_token", "tokens",
)  # fmt: skip
LLAMACPP_SETTINGS = ("model_bytes", "limit_bytes", "read_mib_per_s", "tokens", "rounds")

app = typer.Typer(help="Every benchmark by name.", no_args_is_help=True, pretty_exceptions_enable=False)
Options = TypeVar("Options")
Settings = Annotated[list[str] | None, typer.Argument(help="NAME=VALUE of its options.")]
_results = Path(__file__).parent / "results"


@app.callback()
def places(results: Annotated[Path, typer.Option(help="Folder of the result files.")] = _results) -> None:
    """Every benchmark by name: prints JSON and adds its rows to the files in results/."""
    global _results
    _results = results


def keep(name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a result file, with machine, versions and commit in front."""
    for row in rows:
        append_row(_results / name, {**environment(), **row})


def picked(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """These entries, "" where there is none: a result file has the same columns in every row."""
    return {name: values.get(name, "") for name in names}


def options(made: Callable[..., Options], settings: list[str] | None, **defaults: object) -> Options:
    """A benchmark's options from its settings; bad usage for one that it does not have."""
    try:
        return made(**{**defaults, **given(settings)})
    except TypeError as error:
        raise typer.BadParameter(str(error)) from error


def given(settings: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE, each value JSON where it can be read as such and text otherwise."""
    found: dict[str, Any] = {}
    for setting in settings or ():
        name, equals, value = setting.partition("=")
        if not equals:
            raise typer.BadParameter(f"{setting!r}: give NAME=VALUE")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def file_name(device: str) -> str:
    """The part of a file's name that names a device: "h100" for "NVIDIA H100 80GB HBM3"."""
    name = re.sub(r"[\s-]\d+gb.*", "", device.lower().removeprefix("nvidia"))
    return re.sub(r"[^a-z0-9]+", "_", name.strip()).strip("_")


def texts() -> list[Path]:
    """Held-out text beside the clone; without it, benchmarks decode the shipped model's own."""
    paths = (REPO_ROOT.parent / "shared" / "data" / "heldout" / name for name in HELD_OUT)
    return [path for path in paths if path.is_file()]


@app.command()
def controller(settings: Settings = None) -> None:
    """`remoe bench controller`: controller_cpu.csv (arms) and controller_cpu_bars.csv."""
    from remoe_adapt.bench.controller.bench import ControllerOptions, run_controller

    result = run_controller(options(ControllerOptions, settings, data=texts(), keep=True))
    common = {**picked(result["settings"], CONTROLLER_SETTINGS), "void": result["void"] or ""}
    keep("controller_cpu.csv", ({"arm": name, **row, **common} for name, row in result["arms"].items()))
    keep("controller_cpu_bars.csv", ({**row, **common} for row in result["bars"]))
    print(json.dumps(result))


@app.command()
def decode(settings: Settings = None) -> None:
    """`remoe bench decode`: decode_cpu.csv (arms) and decode_cpu_bars.csv."""
    from remoe_adapt.bench.decode.bench import DecodeOptions, run_decode

    result = run_decode(options(DecodeOptions, settings, data=texts()))
    common, bar = picked(result, DECODE_SETTINGS), ("bar", "arm", "value", "target", "met")
    arms = result["arms"].items()
    keep("decode_cpu.csv", ({"arm": name, **picked(row, DECODE_FIGURES), **common} for name, row in arms))
    keep("decode_cpu_bars.csv", ({**picked(row, bar), **common} for row in result["bars"]))
    print(json.dumps(result))


@app.command()
def reuse(settings: Settings = None) -> None:
    """Hit rates by share of the cache and gain of the resident prior, which `remoe plan` starts from: reuse_cpu.csv."""
    from remoe_adapt.bench.reuse import ReuseOptions, run_reuse

    rows = run_reuse(options(ReuseOptions, settings, data=texts()))
    keep("reuse_cpu.csv", rows)
    print(json.dumps(rows))


@app.command()
def plan(settings: Settings = None) -> None:
    """`remoe plan` against measurement on the widened shipped model: plan_cpu.csv."""
    from remoe_adapt.bench.decode.planned import PlannedOptions, run_planned

    name = "plan_cpu.csv"
    with terminated_as_interrupted():
        rows = run_planned(options(PlannedOptions, settings, data=texts()), on_row=lambda row: keep(name, [row]))
    print(json.dumps(rows))


@app.command()
def scale(settings: Settings = None) -> None:
    """`remoe bench scale`: scale_cpu.csv, scale_cpu_in_ram.csv (4 bits against bf16) and scale_cpu_bars.csv."""
    from remoe_adapt.bench.scale.bench import ScaleOptions, run_scale

    result = run_scale(options(ScaleOptions, settings))
    common = picked(result, ("layers", "threads"))
    keep("scale_cpu.csv", [picked(result, SCALE_FIGURES)])
    keep("scale_cpu_in_ram.csv", ({**row, "threads": result["threads"]} for row in result["in_ram"]))
    keep("scale_cpu_bars.csv", ({**row, **common} for row in result["bars"]))
    print(json.dumps(result))


@app.command()
def frontier(settings: Settings = None) -> None:
    """Misses at equal quality against the published methods: frontier_cpu.csv (points), _budgets.csv and _bars.csv."""
    from frontier import Options, csv_rows, run

    result = run(options(Options, settings))
    for name, rows in csv_rows(result).items():
        keep(name, rows)
    print(json.dumps(result))


@app.command()
def gating(gpu_only: bool = False) -> None:
    """`remoe bench gating`, row by row: gating_<device>.csv."""
    from remoe_adapt.bench.gating import gpu_rows, run_gating

    def keep_row(row: dict[str, Any]) -> None:
        keep(f"gating_{file_name(row['device'])}.csv", [row])
        print(json.dumps(row), flush=True)

    if gpu_only:
        for row in gpu_rows():
            keep_row(row)
        return
    for what, why in run_gating(on_row=keep_row)["skipped"].items():
        print(f"no rows for {what}: {why}", file=sys.stderr)


@app.command()
def pool(settings: Settings = None) -> None:
    """Experts out of a pool of slots on a GPU: pool_<device>.csv (kernels) and pool_decode_<device>.csv (steps)."""
    from remoe_adapt.bench.pool import PoolOptions, run_pool

    def keep_row(row: dict[str, Any]) -> None:
        name = "pool_decode" if row["what"] == "decode" else "pool"
        keep(f"{name}_{file_name(row['device'])}.csv", [row])
        print(json.dumps(row), flush=True)

    for what, why in run_pool(options(PoolOptions, settings), on_row=keep_row)["skipped"].items():
        print(f"no rows for {what}: {why}", file=sys.stderr)


@app.command()
def swap(model: str | None = None, family: str | None = None) -> None:
    """`remoe bench swap`: swap_cpu.csv."""
    from remoe_adapt.bench.swap import run_swap

    result = run_swap(model, family)
    keep("swap_cpu.csv", [result])
    print(json.dumps(result))


@app.command()
def reading(model: str, pack: str) -> None:
    """Raw and expert reads of a checkpoint and its pack (`remoe pack`): reading_cpu.csv."""
    from remoe_adapt.bench.files import run_file_reads

    for row in run_file_reads(model, pack)["rows"]:
        keep("reading_cpu.csv", [row])
        print(json.dumps(row), flush=True)


@app.command("patch_gguf")
def patch_gguf(gigabytes: Annotated[float, typer.Argument(help="Size of the GGUF.")] = 3.0) -> None:
    """What another strength costs in a GGUF of 3 GB: patch_gguf.csv."""
    from remoe_adapt.bench.files import run_patching

    result = run_patching(gigabytes)
    keep("patch_gguf.csv", [result])
    print(json.dumps(result))


@app.command()
def squeeze(settings: Settings = None) -> None:
    """One squeeze over time, with and without the dial: squeeze_cpu.csv, written anew."""
    from squeeze import Options, run

    with terminated_as_interrupted():
        rows = run(options(Options, settings))
    (_results / "squeeze_cpu.csv").unlink(missing_ok=True)
    keep("squeeze_cpu.csv", rows)
    print(json.dumps(rows))


@app.command()
def llamacpp(settings: Settings = None) -> None:
    """llama.cpp with a model larger than its memory: llamacpp_cpu.csv (arms) and llamacpp_cpu_bars.csv."""
    from llamacpp import Options, run

    with terminated_as_interrupted():
        result = run(options(Options, settings))
    if "skipped" not in result:
        common = picked(result, LLAMACPP_SETTINGS)
        rows = ({name: "" if value is None else value for name, value in row.items()} for row in result["rows"])
        keep("llamacpp_cpu.csv", ({**row, **common} for row in rows))
        bar = ("bar", "arm", "value", "target", "met")
        keep("llamacpp_cpu_bars.csv", ({**picked(row, bar), **common} for row in result["bars"]))
    print(json.dumps(result))


@app.command("prior_cost")
def prior_cost(settings: Settings = None) -> None:
    """What the recency prior costs in llama.cpp: microseconds a layer, share of a token: prior_cost_cpu.csv."""
    from prior_cost import Options, run

    chosen = options(Options, settings)
    result = run(chosen)
    common = picked(asdict(chosen), ("passes", "tokens")) | {"engine_threads": chosen.threads}
    keep("prior_cost_cpu.csv", ({**row, **common} for row in result["rows"]))
    print(json.dumps(result, default=float))


@app.command("live_swap")
def live_swap(settings: Settings = None) -> None:
    """What swaps of `remoe watch --live` do to tokens under way in llama.cpp: live_swap_cpu.csv."""
    from live_swap import Options, run

    chosen = options(Options, settings)
    with terminated_as_interrupted():
        rows = run(chosen)
    keep("live_swap_cpu.csv", ({**row, "seconds": chosen.seconds} for row in rows))
    print(json.dumps({"rows": rows, **asdict(chosen)}))


def main() -> None:
    """One line on stderr for what we refuse."""
    try:
        app(prog_name="benchmarks/run.py")
    except RemoeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
