"""`remoe train` and `remoe eval`: families of router adapters made, and measured."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

import typer
from rich.console import RenderableType

from remoe_adapt import cli_options as opt
from remoe_adapt import report
from remoe_adapt.cli_options import Found
from remoe_adapt.errors import ConfigError
from remoe_adapt.report import progress


def train(
    model: opt.Model, data: opt.Data, out: opt.FamilyOut, strengths: opt.Strengths = "0.25,0.5,1.0",
    reuse_weight: opt.ReuseWeight = None, smooth_weight: opt.SmoothWeight = None, lag_weight: opt.LagWeight = None,
    ws_weight: opt.WsWeight = None, kl_weight: opt.KlWeight = None, distill_share: opt.DistillShare = None,
    steps: opt.Steps = None, batch: opt.Batch = None,
    accumulate: opt.Accumulate = None, length: opt.Length = None, lr: opt.Lr = None, mode: opt.Mode = None,
    recency: opt.Recency = None, recency_gain: opt.FullGain = None, recency_decay: opt.RecencyDecay = None,
    rank: opt.Rank = None, seed: opt.DataSeed = None, resume: opt.Resume = True, control: opt.Control = True,
    checkpoint_minutes: opt.CheckpointMinutes = None,
    device: opt.Device = None, as_json: opt.Json = False,
) -> Found:  # fmt: skip
    """Train a family of router adapters, and the control that shows what training alone would do."""
    recency = recency or (None if recency_gain is None else "ema")
    given: dict[str, Any] = dict(locals())
    if mode == "local" and distill_share:
        raise ConfigError(f"distill_share={distill_share:g} has no effect in mode local: leave one of them out")
    from remoe_adapt.evaluate import LEAST_CERTIFIED_TOKENS, certify
    from remoe_adapt.evaluate import evaluate as measure
    from remoe_adapt.record import load_base
    from remoe_adapt.training.point import CHECKPOINT_MINUTES
    from remoe_adapt.training.run import TrainOptions, held_out_documents, train_family

    options = TrainOptions(**{f.name: given[f.name] for f in fields(TrainOptions) if given.get(f.name) is not None})
    family = train_family(
        model, data, numbers(strengths), out, options=options, resume=resume, control=control, device=device,
        checkpoint_minutes=CHECKPOINT_MINUTES if checkpoint_minutes is None else checkpoint_minutes,
    )  # fmt: skip
    base, tokenizer = load_base(model, device=device)
    result: dict[str, Any] = {"family": str(out), "strengths": list(family.strengths), "control": None}
    documents = held_out_documents(data, tokenizer, base, options)
    # Of the processes of a distributed run one measures.
    if not documents or int(os.environ.get("RANK", "0")):
        unmeasured = [] if documents else ["no certificate: the data leave no text to hold out"]
        return result, [f"family written to {out}", *unmeasured]
    with progress("measuring on held-out parts of the data") as (total, advance):
        total(sum(map(len, documents)) * (1 + len(family.points) + (family.control is not None)))
        measured = measure(base, documents, family=family, on_tokens=advance)
    measured["data"] = [f"held-out part of {path.name}" for path in data]
    shown: list[RenderableType] = [report.eval_table(measured), f"family written to {out}"]
    measured["certified"] = measured["tokens"] >= LEAST_CERTIFIED_TOKENS
    if not measured["certified"]:
        shown.append(
            f"no certificate: {measured['tokens']} held-out tokens, {LEAST_CERTIFIED_TOKENS} are needed; measure it on "
            "more text with `remoe eval --certify`"
        )
    else:
        certify(family, measured)
    return result | measured, shown


def evaluate(
    model: opt.Model, data: opt.EvalData = None, family: opt.FamilyPath = None, max_tokens: opt.MaxTokens = None,
    policy: opt.Policies = ["lru"], cache: opt.Caches = [0.25, 0.5], window: opt.Window = None,  # noqa: B006
    recency: opt.Recency = None, recency_gain: opt.RecencyGains = "0.1,0.2,0.3",
    recency_decay: opt.RecencyDecay = None,
    tasks: opt.Tasks = None, task_folder: opt.TaskFolder = None, limit: opt.Limit = None,
    plot: opt.Plot = None, certified: opt.Certify = False, device: opt.Device = None,
    dtype: opt.Dtype = "auto", force: opt.Force = False, as_json: opt.Json = False,
) -> Found:  # fmt: skip
    """Measure every operating point: perplexity, divergence from the base, expert reuse, hit rates, task scores."""
    from remoe_adapt.arms import Prior
    from remoe_adapt.evaluate import certify, evaluate_tasks, read_shared
    from remoe_adapt.evaluate import evaluate as measure
    from remoe_adapt.family import Family
    from remoe_adapt.plots import plot_frontier
    from remoe_adapt.record import load_base

    if not data and not tasks:
        raise typer.BadParameter("give --data FILE (repeat for more), or --tasks")
    if certified and not (family and data):
        raise typer.BadParameter("--certify needs --family and --data")
    points = None if family is None else Family.load(family)
    base, tokenizer = load_base(model, device=device, dtype=dtype)
    result: dict[str, Any] = {"model": model, "family": family}
    shown: list[RenderableType] = []
    if data:
        documents = read_shared(data, tokenizer, max_tokens)
        kind = {} if recency_decay is None else {"decay": recency_decay}
        priors = [] if recency is None else [Prior(recency, gain, **kind) for gain in numbers(recency_gain)]
        arms = 1 + len(priors) + (0 if points is None else len(points.points) + (points.control is not None))
        with progress("scoring", sum(map(len, documents)) * arms) as (_, advance):
            result |= measure(
                base, documents, family=points, policies=policy, caches=cache, window=window, priors=priors,
                force=force, on_tokens=advance,
            )  # fmt: skip
        result["data"] = [path.name for path in data]
        shown.append(report.eval_table(result))
        if plot is not None:
            plot_frontier(result, plot)
            shown.append(f"plot written to {plot}")
        if certified and points is not None:
            certify(points, result)
            shown.append(f"certificates written to {points.path}")
    if tasks:
        scores = evaluate_tasks(base, tokenizer, points, words(tasks), folder=task_folder, limit=limit, force=force)
        result["tasks"] = scores
        shown.append(report.task_table(scores))
    return result, shown


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in words(text)]
    except ValueError as error:
        raise ConfigError(f"{text!r} is not a list of numbers: write them as 0.25,0.5,1.0") from error
