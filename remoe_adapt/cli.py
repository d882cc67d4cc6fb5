"""The command line. Commands return what they found; `command` prints it, as tables or as one JSON object.

Standard output belongs to the result; progress, logs and errors go to standard error. Exit status: 0 done, 1 failed
(something is not there, damaged or impossible here), 2 bad usage (an option's value cannot work, or does nothing).

Nothing here imports torch before a command works: help and typing errors come at once.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    rows,
)
from remoe_adapt import cli_options as opt
from remoe_adapt.cli_options import Events, Found
from remoe_adapt.cli_rules import check_options
from remoe_adapt.errors import ConfigError, RemoeError, UncacheableError
from remoe_adapt.outputs import check_appendable, check_extra, check_file, write_csv
from remoe_adapt.report import progress, quiet_libraries

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


def command(
    group: typer.Typer, name: str, csv_rows: Callable[[Mapping[str, Any]], Iterable[Mapping[str, Any]]] | None = None
) -> Callable[[Callable[..., Found]], Callable[..., None]]:
    """Registers a command that returns (JSON object, what to show); "ok": False in the object means exit status 1.

    csv_rows: what --csv writes of the object, for a command that has the option.
    """

    def register(function: Callable[..., Found]) -> Callable[..., None]:
        def run(ctx: typer.Context, **kwargs: Any) -> None:
            as_json, csv = kwargs["as_json"], kwargs.get("csv")
            # Libraries that print must not break the one JSON object.
            keep_clean = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
            with _exit_status(), keep_clean:
                _check(ctx, kwargs)
                if csv is not None:
                    check_file(csv, "--csv", (".csv",))
                result, shown = function(**kwargs)
            if int(os.environ.get("RANK", "0")):
                return  # of several processes of a launcher one speaks
            if as_json:
                print(json.dumps(result, default=str))
            else:
                console = Console(width=None if sys.stdout.isatty() else 160)
                for renderable in shown:
                    console.print(Text(renderable) if isinstance(renderable, str) else renderable)
            if csv is not None and csv_rows is not None:
                with _exit_status():
                    write_csv(csv, csv_rows(result))
            if result.get("ok") is False:
                raise typer.Exit(1)

        group.command(name)(_with_context(run, function))
        return run

    return register


def lines(group: typer.Typer, name: str) -> Callable[[Callable[..., Events]], Callable[..., None]]:
    """Registers a command that says things while it runs: each (JSON object, text) is a line, printed at once."""

    def register(function: Callable[..., Events]) -> Callable[..., None]:
        def run(ctx: typer.Context, **kwargs: Any) -> None:
            with _exit_status():
                _check(ctx, kwargs)
                for event, text in function(**kwargs):
                    print(json.dumps(event, default=str) if kwargs["as_json"] else text, flush=True)

        group.command(name)(_with_context(run, function))
        return run

    return register


def _with_context(run: Callable[..., None], function: Callable[..., Any]) -> Callable[..., None]:
    """`run` with the options and the help of `function`; typer hands it the context beside them."""
    context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    functools.update_wrapper(run, function)
    signature = inspect.signature(function, eval_str=True)
    keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values()]
    run.__signature__ = signature.replace(parameters=[*keywords, context])  # type: ignore[attr-defined]
    run.__annotations__ = {**function.__annotations__, "ctx": typer.Context}
    return run


def _check(ctx: typer.Context, values: Mapping[str, Any]) -> None:
    spelled = {parameter.name: parameter for parameter in ctx.command.params}

    def given(name: str) -> bool:
        source = ctx.get_parameter_source(name)
        return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")

    name = ctx.command_path.partition(" ")[2]
    for hint in check_options(name, values, given, lambda option: spelled[option].opts[0]):
        print(f"note: {hint}", file=sys.stderr)


@contextlib.contextmanager
def _exit_status() -> Iterator[None]:
    try:
        yield
    except (RemoeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        usage = isinstance(error, ConfigError) and not isinstance(error, UncacheableError)
        raise typer.Exit(2 if usage else 1) from error
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(130) from None


@app.callback(invoke_without_command=True)
def _root(version: opt.Version = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@command(app, "demo", rows.of_arms)
def demo(
    model: opt.ShippedModel = None, family: opt.FamilyPath = None, data: opt.MoreData = None,
    expert_cache: opt.DemoCache = "0.25",
    tokens: opt.DemoTokens = 1000, max_new_tokens: opt.SampleTokens = 60, max_seconds: opt.MaxSeconds = 120.0,
    force: opt.Force = False, csv: opt.Csv = None, as_json: opt.Json = False,
) -> Found:  # fmt: skip
    """Decode a small MoE at every strength, offline: expert reuse, hit rate, perplexity, time per token."""
    from remoe_adapt.demo import run_demo

    quiet_libraries()
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
    check_file(out, "--out", (".npz",), new_folders=True)
    if model.endswith(".gguf"):
        if device is not None or dtype != "auto":
            raise ConfigError("--device and --dtype are for models that transformers runs, not for a GGUF.")
        return cli_trace.trace_gguf(model, data, out, decode, max_tokens)
    from remoe_adapt.cache.simulate import summarise
    from remoe_adapt.evaluate import check_data, read_shared
    from remoe_adapt.record import load_with_tokenizer, prompts_from, record_decode, record_prefill

    check_data(data, max_tokens)
    quiet_libraries()
    base, tokenizer = load_with_tokenizer(model, device=device, dtype=dtype)
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


@command(app, "simulate", rows.of_trace)
def simulate_command(
    trace_file: opt.TraceFile,
    policy: opt.Policies = ["lru"],  # noqa: B006
    cache: opt.Caches = [0.25],  # noqa: B006
    tokens: opt.FirstTokens = None,
    phase: opt.Phase = None,
    per_layer: opt.PerLayer = False,
    csv: opt.Csv = None,
    as_json: opt.Json = False,
) -> Found:
    """Replay a trace through expert caches: overlap, switch rate, and the hit rate of each policy and size.

    policy@c is the share of expert look-ups found in a per-layer cache of max(K, floor(c * E)) experts, emptied where a
    document begins. It is token-atomic: all look-ups of a token see the cache as the previous token left it. Beside it
    stands policy@c/lookup, the figure that others publish: each look-up sees the cache as the look-up before left it.
    """
    from remoe_adapt.cache.simulate import check_replay, layer_rows, summarise
    from remoe_adapt.trace import PHASES, Trace

    check_replay(policy, cache)
    if phase is not None and phase not in PHASES:
        raise ConfigError(f"--phase {phase!r}: choose one of {', '.join(PHASES)}.")
    loaded = Trace.load(trace_file, phase)
    if tokens is not None and tokens > loaded.num_tokens:
        raise ConfigError(f"--tokens {tokens}: this trace has {loaded.num_tokens}.")
    replayed = loaded if tokens is None else loaded.tokens(tokens)
    result = summarise(replayed, policy, cache)
    shown: list[Any] = [report.simulate_table(trace_file.name, result)]
    if per_layer:
        result["per_layer"] = layer_rows(replayed, policy, cache)
        shown.append(report.layer_table([(trace_file.name, result)]))
    return result, shown


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
    from remoe_adapt.plots import check_plot, plot_log

    if log is not None:
        check_appendable(log, "--log")
    if plot is not None:
        check_plot(plot, "--plot")
    if metrics_port is not None:
        check_extra("prometheus_client", "metrics", "metrics need prometheus-client")
    from remoe_adapt.generation import generate_text
    from remoe_adapt.record import load_tokenizer
    from remoe_adapt.runtime.load import get_remoe_model
    from remoe_adapt.runtime.prometheus import serve_metrics

    quiet_libraries()
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
            result.update(ok=False, error=str(error))
            shown.append(f"error: {error}")
    return result, shown


def _base_for(
    model: str, profile: str | None, budget: str | None, storage: Path | None, device: str | None, dtype: str
) -> Any:
    """Behind an expert cache where the profile or --expert-cache says so."""
    from remoe_adapt.record import load_with_tokenizer
    from remoe_adapt.runtime.load import load_base_under, profile_of

    if profile is None and budget is None and storage is None:
        return load_with_tokenizer(model, device=device, dtype=dtype)[0]
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


for _group, _name, _function, _rows in (
    (app, "train", cli_train.train, None),
    (app, "eval", cli_train.evaluate, rows.of_arms),
    (profiles_app, "list", cli_profiles.list_all, rows.of_profiles),
    (profiles_app, "show", cli_profiles.show, None),
    (profiles_app, "check", cli_profiles.check, None),
    (app, "pack", cli_pack.pack, None),
    (app, "doctor", cli_bench.doctor, rows.of_rows),
    (export_app, "merged", cli_export.merged, None),
    (export_app, "lora", cli_export.lora, None),
    (export_app, "gguf", cli_export.gguf, None),
    (export_app, "gguf-lora", cli_export.gguf_lora, None),
    (bench_app, "swap", cli_bench.swap, rows.of_figures),
    (bench_app, "gating", cli_bench.gating, rows.of_rows),
    (bench_app, "decode", cli_decode.decode, rows.of_named_arms),
    (bench_app, "controller", cli_controller.controller, rows.of_named_arms),
):
    command(_group, _name, _rows)(_function)
lines(app, "watch")(cli_watch.watch)


def main() -> None:
    """Entry point of `remoe`."""
    # What libraries warn of is for those who write code with them, and for `python -W`; processes of ours inherit it.
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app(prog_name="remoe")
