"""The command line. Commands return what they found; `command` prints it, as tables or as one JSON object.

Standard output belongs to the result; progress, logs and errors go to standard error. Exit status: 0 done, 1 failed,
2 bad usage.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from remoe_adapt import (
    __version__,
    cli_bench,
    cli_controller,
    cli_decode,
    cli_export,
    cli_pack,
    cli_profiles,
    cli_trace,
    cli_train,
    cli_watch,
    report,
)
from remoe_adapt import cli_options as opt
from remoe_adapt.cli_options import Events, Found
from remoe_adapt.errors import RemoeError
from remoe_adapt.report import progress

app = typer.Typer(
    name="remoe",
    help="A dial between quality and expert reuse for mixture-of-experts models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
profiles_app = typer.Typer(help="Device profiles: list, show, check.", no_args_is_help=True)
export_app = typer.Typer(help="The same adapter for other engines: vLLM, PEFT, llama.cpp.", no_args_is_help=True)
bench_app = typer.Typer(help="Benchmarks, each against its named baselines.", no_args_is_help=True)
app.add_typer(profiles_app, name="profiles")
app.add_typer(bench_app, name="bench")
app.add_typer(export_app, name="export")


def command(group: typer.Typer, name: str) -> Callable[[Callable[..., Found]], Callable[..., None]]:
    """Registers a command that returns (JSON object, what to show); "ok": False in the object means exit status 1."""

    def register(function: Callable[..., Found]) -> Callable[..., None]:
        @group.command(name)
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            as_json = kwargs["as_json"]
            # Libraries that print must not break the one JSON object.
            keep_clean = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
            with _exit_status(), keep_clean:
                result, shown = function(*args, **kwargs)
            if int(os.environ.get("RANK", "0")):
                return  # of several processes of a launcher one speaks
            if as_json:
                print(json.dumps(result, default=str))
            else:
                console = Console(width=None if sys.stdout.isatty() else 160)
                for renderable in shown:
                    console.print(Text(renderable) if isinstance(renderable, str) else renderable)
            if result.get("ok") is False:
                raise typer.Exit(1)

        return run

    return register


def lines(group: typer.Typer, name: str) -> Callable[[Callable[..., Events]], Callable[..., None]]:
    """Registers a command that says things while it runs: each (JSON object, text) is a line, printed at once."""

    def register(function: Callable[..., Events]) -> Callable[..., None]:
        @group.command(name)
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            with _exit_status():
                for event, text in function(*args, **kwargs):
                    print(json.dumps(event, default=str) if kwargs["as_json"] else text, flush=True)

        return run

    return register


@contextlib.contextmanager
def _exit_status() -> Iterator[None]:
    try:
        yield
    except (RemoeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(130) from None


@app.callback(invoke_without_command=True)
def _root(version: opt.Version = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@command(app, "demo")
def demo(
    model: opt.ShippedModel = None, family: opt.FamilyPath = None, data: opt.MoreData = None,
    expert_cache: opt.DemoCache = "0.25",
    tokens: opt.DemoTokens = 1000, max_new_tokens: opt.SampleTokens = 60, max_seconds: opt.MaxSeconds = 120.0,
    force: opt.Force = False, as_json: opt.Json = False,
) -> Found:  # fmt: skip
    """Decode a small MoE at every strength, offline: expert reuse, hit rate, perplexity, time per token."""
    from remoe_adapt.demo import run_demo

    with progress("decoding") as (total, advance):
        result = run_demo(
            model, family, data=data or (), expert_cache=_budget(expert_cache), tokens=tokens,
            new_tokens=max_new_tokens, max_seconds=max_seconds, force=force, on_start=total, on_tokens=advance,
        )  # fmt: skip
    return result, [report.demo_table(result), *report.demo_samples(result), report.demo_meaning(result)]


@command(app, "trace")
def trace(
    model: opt.Model, data: opt.Data, out: opt.TraceOut, decode: opt.Decode = None,
    prompt_tokens: opt.PromptTokens = 64, temperature: opt.Temperature = 0.0, seed: opt.Seed = 0,
    max_tokens: opt.RecordTokens = 8192, device: opt.Device = None, dtype: opt.Dtype = "auto",
    as_json: opt.Json = False,
) -> Found:  # fmt: skip
    """Record which experts every router chooses, over given text or over the model's own decode."""
    from remoe_adapt.cache.simulate import summarise
    from remoe_adapt.evaluate import read_shared
    from remoe_adapt.record import load_base, prompts_from, record_decode, record_prefill

    if model.endswith(".gguf"):
        return cli_trace.trace_gguf(model, data, out, decode, max_tokens)
    base, tokenizer = load_base(model, device=device, dtype=dtype)
    names = {"model_id": Path(model).name, "text": ", ".join(path.name for path in data)}
    if decode is None:
        documents = read_shared(data, tokenizer, max_tokens)
        with progress("recording", sum(map(len, documents))) as (_, advance):
            recorded = record_prefill(base, documents, on_tokens=advance, **names)
    else:
        prompts = prompts_from(read_shared(data, tokenizer), prompt_tokens, max_tokens // max(decode, 1))
        with progress("decoding", len(prompts) * decode) as (_, advance):
            recorded = record_decode(
                base, prompts, decode, temperature=temperature, seed=seed, on_tokens=advance, **names
            )
    recorded.save(out)
    result = {"out": str(out), **summarise(recorded)}
    return result, [report.figures_table("recorded", result)]


@command(app, "simulate")
def simulate_command(
    trace_file: opt.TraceFile,
    policy: opt.Policies = ["lru"],  # noqa: B006
    cache: opt.Caches = [0.25],  # noqa: B006
    tokens: opt.FirstTokens = None,
    phase: opt.Phase = None,
    as_json: opt.Json = False,
) -> Found:
    """Replay a trace through expert caches: overlap, switch rate, and the hit rate of each policy and size."""
    from remoe_adapt.cache.simulate import summarise
    from remoe_adapt.trace import Trace

    loaded = Trace.load(trace_file, phase)
    result = summarise(loaded if tokens is None else loaded.tokens(tokens), policy, cache)
    return result, [report.figures_table(trace_file.name, result)]


@command(app, "run")
def run(
    model: opt.Model, prompt: opt.Prompt, family: opt.FamilyPath = None, profile: opt.Profile = None,
    pressure: opt.Pressure = None, strength: opt.Strength = None, max_new_tokens: opt.NewTokens = 128,
    recency: opt.Recency = None, recency_gain: opt.RecencyGain = None, recency_decay: opt.RecencyDecay = None,
    expert_cache: opt.ExpertCacheBudget = None, storage: opt.Storage = None, log: opt.Log = None,
    plot: opt.LogPlot = None, metrics_port: opt.MetricsPort = None,
    temperature: opt.Temperature = 0.0, seed: opt.Seed = 0, device: opt.Device = None, dtype: opt.Dtype = "auto",
    force: opt.Force = False, as_json: opt.Json = False,
) -> Found:  # fmt: skip
    """Generate text with the dial on: a live status line, then a summary."""
    if pressure is not None and strength is not None:
        raise typer.BadParameter("--pressure and --strength pin the same dial: give one of them")
    if plot is not None and log is None:
        raise typer.BadParameter("--plot draws the --log: give both")
    from remoe_adapt.generation import generate_text
    from remoe_adapt.plots import plot_log
    from remoe_adapt.record import load_tokenizer
    from remoe_adapt.runtime.load import get_remoe_model
    from remoe_adapt.runtime.prometheus import serve_metrics

    base = _base_for(model, profile, expert_cache, storage, device, dtype)
    dialled = get_remoe_model(
        base, profile=profile, family=family, recency=recency, recency_gain=recency_gain, recency_decay=recency_decay,
        force=force,
    )  # fmt: skip
    tokenizer = load_tokenizer(model)
    controller = dialled.controller
    metrics = None if metrics_port is None else serve_metrics(controller, metrics_port)
    try:
        if metrics is not None:
            print(f"metrics: {metrics.url}", file=sys.stderr, flush=True)
        controller.log_to(log)
        if pressure is not None:
            controller.set_pressure(pressure)
        if strength is not None:
            controller.set_strength(strength)
        with _live_text(not as_json, lambda: report.status_line(controller.status())) as on_text:
            made = generate_text(
                dialled, tokenizer, prompt, new_tokens=max_new_tokens, temperature=temperature, seed=seed,
                on_text=on_text,
            )  # fmt: skip
        result = {"model": model, "prompt": prompt, **made, "status": controller.status()}
        result |= {} if metrics is None else {"metrics_url": metrics.url}
    finally:
        if metrics is not None:
            metrics.close()
        controller.close()
    shown: list[Any] = [report.run_summary(result)]
    if log is not None and plot is not None:
        try:
            plot_log(log, plot)
            shown.append(f"plot written to {plot}")
        except RemoeError as error:  # what was generated is shown all the same
            result["ok"] = False
            shown.append(f"error: {error}")
    return result, shown


def _base_for(
    model: str, profile: str | None, budget: str | None, storage: Path | None, device: str | None, dtype: str
) -> Any:
    """Behind an expert cache where the profile or --expert-cache says so."""
    from remoe_adapt.record import load_base
    from remoe_adapt.runtime.load import load_base_under, profile_of

    if profile is None and budget is None and storage is None:
        return load_base(model, device=device, dtype=dtype)[0]
    size = None if budget is None else _budget(budget)
    packed = {} if storage is None else {"storage": storage}
    return load_base_under(profile_of(profile), model, size, device=device, dtype=dtype, **packed)


def _budget(text: str) -> str | float:
    """A share of the experts, or a size with its unit."""
    try:
        return float(text)
    except ValueError:
        return text


@contextlib.contextmanager
def _live_text(shown: bool, status: Callable[[], str]) -> Iterator[Callable[[str], None] | None]:
    """Streams text to standard output, with the status in a line below it where both streams are terminals."""
    if not shown:
        yield None
        return
    at_terminal = sys.stdout.isatty() and sys.stderr.isatty()

    def write(piece: str) -> None:
        if at_terminal:
            print("\x1b[J", end="", file=sys.stderr, flush=True)  # erase the old line: text may grow into it
        print(piece, end="", flush=True)
        if at_terminal:
            # Make room below, save the place, write the line, go back (ANSI: IND, CUU, DECSC, EL, DECRC).
            line = status()[: shutil.get_terminal_size().columns - 1]
            print(f"\x1bD\x1b[A\x1b7\n\r\x1b[2K{line}\x1b8", end="", file=sys.stderr, flush=True)

    yield write
    print(flush=True)
    print(f"\x1b[J{status()}" if at_terminal else status(), file=sys.stderr, flush=True)


for _group, _name, _function in (
    (app, "train", cli_train.train),
    (app, "eval", cli_train.evaluate),
    (profiles_app, "list", cli_profiles.list_all),
    (profiles_app, "show", cli_profiles.show),
    (profiles_app, "check", cli_profiles.check),
    (app, "pack", cli_pack.pack),
    (app, "doctor", cli_bench.doctor),
    (export_app, "merged", cli_export.merged),
    (export_app, "lora", cli_export.lora),
    (export_app, "gguf", cli_export.gguf),
    (export_app, "gguf-lora", cli_export.gguf_lora),
    (bench_app, "swap", cli_bench.swap),
    (bench_app, "gating", cli_bench.gating),
    (bench_app, "decode", cli_decode.decode),
    (bench_app, "controller", cli_controller.controller),
):
    command(_group, _name)(_function)
lines(app, "watch")(cli_watch.watch)


def main() -> None:
    """Entry point of `remoe`."""
    app(prog_name="remoe")
