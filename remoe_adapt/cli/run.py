"""`remoe demo` and `remoe run`: text with the dial on."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from remoe_adapt._support import check_appendable, check_extra
from remoe_adapt.cli import options as opt
from remoe_adapt.cli import report, rows
from remoe_adapt.cli.app import app, command, live_text, note
from remoe_adapt.cli.options import CommandResult, budget
from remoe_adapt.cli.report import progress, quiet_libraries


@command(app, "demo", rows.of_arms)
def demo(
    model: opt.ShippedModel = None, family: opt.FamilyPath = None, data: opt.MoreData = None,
    expert_cache: opt.DemoCache = "0.25",
    tokens: opt.DemoTokens = 1000, max_new_tokens: opt.SampleTokens = 60, max_seconds: opt.MaxSeconds = 120.0,
    force: opt.Force = False, csv: opt.Csv = None, as_json: opt.Json = False,
) -> CommandResult:  # fmt: skip
    """Decode a small MoE at every strength, offline: expert reuse, hit rate, perplexity, time per token."""
    from remoe_adapt.evaluation import run_demo

    quiet_libraries()
    with progress("decoding") as (total, advance):
        result = run_demo(
            model, family, data=data or (), expert_cache=budget(expert_cache), tokens=tokens,
            new_tokens=max_new_tokens, max_seconds=max_seconds, force=force, on_start=total, on_tokens=advance,
        )  # fmt: skip
    return result, [report.demo_table(result), *report.demo_samples(result), report.demo_meaning(result)]


@command(app, "run")
def run(
    model: opt.Model, prompt: opt.Prompt, family: opt.FamilyPath = None, profile: opt.Profile = None,
    pressure: opt.Pressure = None, strength: opt.Strength = None, max_new_tokens: opt.NewTokens = 128,
    recency: opt.Recency = None, recency_gain: opt.RecencyGain = None, recency_decay: opt.RecencyDecay = None,
    recency_share: opt.RecencyShare = None,
    expert_cache: opt.ExpertCacheBudget = None, storage: opt.Storage = None, arithmetic: opt.Arithmetic = "auto",
    log: opt.Log = None, plot: opt.LogPlot = None, metrics_port: opt.MetricsPort = None,
    temperature: opt.Temperature = 0.0, seed: opt.Seed = 0, device: opt.Device = None, dtype: opt.Dtype = "auto",
    force: opt.Force = False, as_json: opt.Json = False,
) -> CommandResult:  # fmt: skip
    """Generate text with the dial on: a live status line, then a summary."""
    from remoe_adapt.cli.plots import check_plot, plot_log

    if log is not None:
        check_appendable(log, "--log")
    if plot is not None:
        check_plot(plot, "--plot")
    if metrics_port is not None:
        check_extra("prometheus_client", "metrics", "metrics need prometheus-client")
    from remoe_adapt.checkpoints import load_tokenizer
    from remoe_adapt.dial import get_remoe_model, serve_metrics
    from remoe_adapt.evaluation import generate_text

    quiet_libraries()
    base = base_for(model, profile, expert_cache, storage, arithmetic, device, dtype)
    dialled = get_remoe_model(
        base, profile=profile, family=family, recency=recency, recency_gain=recency_gain, recency_decay=recency_decay,
        recency_share=recency_share, force=force,
    )  # fmt: skip
    tokenizer = load_tokenizer(model)
    controller = dialled.controller
    # Before generation: a port that is taken should be said before minutes of work.
    metrics = None if metrics_port is None else serve_metrics(controller, metrics_port)
    try:
        if metrics is not None:
            note(f"metrics: {metrics.url}")
        controller.log_to(log)
        if pressure is not None:
            controller.set_pressure(pressure)
        if strength is not None:
            controller.set_strength(strength)
        with live_text(not as_json, lambda: report.status_line(controller.status())) as on_text:
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
        report.afterwards(result, shown, lambda: plot_log(log, plot), f"plot written to {plot}")
    return result, shown


def base_for(
    model: str,
    profile: str | None,
    expert_cache: str | None,
    storage: Path | None,
    arithmetic: str,
    device: str | None,
    dtype: str,
) -> Any:
    """Behind an expert cache where the profile or --expert-cache says so, or the checkpoint is quantised."""
    from remoe_adapt.checkpoints import load_with_tokenizer
    from remoe_adapt.dial import load_base_under, profile_of
    from remoe_adapt.expert_cache import check_arithmetic, load_whole_or_cached

    check_arithmetic(arithmetic)
    # Without any of them nobody asked for an expert cache.
    if profile is None and expert_cache is None and storage is None:
        load = partial(load_whole_or_cached, arithmetic=arithmetic)
        return load_with_tokenizer(model, device=device, dtype=dtype, load=load)[0]
    # Options of a cache make it a must, so only those that were given are passed on.
    given: dict[str, Any] = {} if storage is None else {"storage": storage}
    given |= {} if arithmetic == "auto" else {"arithmetic": arithmetic}
    size = expert_cache and budget(expert_cache)
    return load_base_under(profile_of(profile), model, size, device=device, dtype=dtype, **given)
