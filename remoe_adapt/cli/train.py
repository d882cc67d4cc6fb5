"""`remoe train` and `remoe eval`: families of router adapters made, and measured."""

from __future__ import annotations

import os
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import typer
from rich.console import RenderableType

from remoe_adapt._support import check_extra, check_file
from remoe_adapt.cli import options as opt
from remoe_adapt.cli import report, rows, rules
from remoe_adapt.cli.app import app, command
from remoe_adapt.cli.eval_gguf import GAINS, check_kind, eval_gguf
from remoe_adapt.cli.options import CommandResult, budget, numbers, words
from remoe_adapt.cli.report import progress, quiet_libraries
from remoe_adapt.cli.rows import arm_rows
from remoe_adapt.cli.tune import BUDGETS, shown_points
from remoe_adapt.errors import ConfigError, DataError, FamilyError, RouterError
from remoe_adapt.recency_settings import DEFAULT_MODE, Recency


@command(app, "train")
def train(
    model: opt.Model, data: opt.Data, out: opt.FamilyOut, strengths: opt.Strengths = "0.25",
    tune: opt.TuneAfter = None, budgets: opt.TrainBudgets = None,
    reuse_weight: opt.ReuseWeight = None, smooth_weight: opt.SmoothWeight = None, lag_weight: opt.LagWeight = None,
    ws_weight: opt.WsWeight = None, kl_weight: opt.KlWeight = None, distill_share: opt.DistillShare = None,
    steps: opt.Steps = None, batch: opt.Batch = None,
    accumulate: opt.Accumulate = None, length: opt.Length = None, lr: opt.Lr = None, mode: opt.Mode = None,
    recency: opt.Recency = None, recency_gain: opt.FullGain = None, recency_decay: opt.RecencyDecay = None,
    recency_share: opt.RecencyShare = None,
    rank: opt.Rank = None, next_steps: opt.NextSteps = None, reference: opt.Reference = None,
    recovery_rank: opt.RecoveryRank = None, recovery_lr: opt.RecoveryLr = None,
    evaluate_every: opt.EvaluateEvery = None, patience: opt.Patience = None, checkpointing: opt.Checkpointing = False,
    seed: opt.DataSeed = None, resume: opt.Resume = True, control: opt.Control = True,
    checkpoint_minutes: opt.CheckpointMinutes = None,
    expert_cache: opt.ExpertCacheBudget = None, storage: opt.Storage = None, arithmetic: opt.Arithmetic = "exact",
    device: opt.Device = None, as_json: opt.Json = False,
) -> CommandResult:  # fmt: skip
    """Train router adapters, and the control that shows what training alone would do; then tune recency gains on them.

    The adapters are a family of their own in OUT/trained, one for each strength, for engines that know no recency
    prior. The family in OUT has a point for each of --budgets: the adapter and the gains of each layer that save the
    most misses within it (see `remoe tune`). With --no-tune, and by default where adapters are trained under a
    --recency, the adapters alone are the family in OUT.
    """
    recency = recency or (None if recency_gain is None else DEFAULT_MODE)
    # Taken before any other local is made: these are the options by their parameter names.
    given: dict[str, Any] = dict(locals())
    if mode == "local" and distill_share:
        raise ConfigError(f"distill_share={distill_share:g} has no effect in mode local: leave one of them out")
    tune = recency is None if tune is None else tune
    if budgets is not None and not tune:
        raise ConfigError("--budgets are of tuned points: leave them out, or add --tune")
    from remoe_adapt.checkpoints import load_with_tokenizer, usable_device
    from remoe_adapt.evaluation import LEAST_CERTIFIED_TOKENS, certify, check_budgets
    from remoe_adapt.evaluation import evaluate as measure
    from remoe_adapt.expert_cache import load_whole_or_cached
    from remoe_adapt.family import TRAINED
    from remoe_adapt.training import CHECKPOINT_MINUTES, TrainOptions, held_out_documents, train_family

    quiet_libraries()
    aims = check_budgets(numbers(budgets or BUDGETS))
    adapters, is_tuned = out / TRAINED if tune else out, tune and _is_tuned(out)
    placed: dict[str, Any] = {"expert_cache": expert_cache and budget(expert_cache), "storage": storage}
    given |= _gains(recency_gain, numbers(strengths))
    options = TrainOptions(**{f.name: given[f.name] for f in fields(TrainOptions) if given.get(f.name) is not None})
    family = train_family(
        model, data, numbers(strengths), adapters, options=options, resume=resume, control=control, device=device,
        checkpoint_minutes=CHECKPOINT_MINUTES if checkpoint_minutes is None else checkpoint_minutes,
        arithmetic=arithmetic, **placed,
    )  # fmt: skip
    # As it was trained: half precision is slow on most CPUs.
    dtype = "float32" if usable_device(device) == "cpu" else "auto"
    load = partial(load_whole_or_cached, **placed)
    base, tokenizer = load_with_tokenizer(model, device=device, dtype=dtype, load=load)
    result: dict[str, Any] = {
        "family": str(adapters), "adapters": str(adapters), "strengths": list(family.strengths), "control": None,
        "tuned": None,
    }  # fmt: skip
    documents = held_out_documents(data, tokenizer, base, options)
    # Of the processes of a distributed run one measures.
    if not documents or int(os.environ.get("RANK", "0")):
        unmeasured = [] if documents else ["no certificate: the data leave no text to hold out"]
        return result, [f"family written to {adapters}", *unmeasured]
    with progress("measuring on held-out parts of the data") as (total, advance):
        total(sum(map(len, documents)) * (1 + len(family.points) + (family.control is not None)))
        measured = measure(base, documents, family=family, on_tokens=advance)
    measured["data"] = [f"held-out part of {path.name}" for path in data]
    shown: list[RenderableType] = [report.eval_table(measured), f"family written to {adapters}"]
    measured["certified"] = measured["tokens"] >= LEAST_CERTIFIED_TOKENS
    if not measured["certified"]:
        shown.append(
            f"no certificate: {measured['tokens']} held-out tokens, {LEAST_CERTIFIED_TOKENS} are needed; measure it on "
            "more text with `remoe eval --certify`"
        )
    else:
        certify(family, measured)
    if is_tuned:
        result["family"] = str(out)
        shown.append(f"{out} is tuned already: delete its family.json to tune again")
    elif tune:
        made, words = _tuned(base, tokenizer, model, data, out, adapters, aims, options)
        result |= {"tuned": made, "family": str(out if made else adapters)}
        shown += words
    return result | measured, shown


def _is_tuned(out: Path) -> bool:
    """Whether a run before this one has tuned already. Raises FamilyError for a family that is another."""
    from remoe_adapt.family import read_family_json

    if not (out / "family.json").exists():
        return False
    if any("budget" not in point for point in read_family_json(out)["points"]):
        raise FamilyError(
            f"{out} holds adapters that were trained without tuning: go on with --no-tune, tune them with `remoe tune "
            "--family`, or choose another --out."
        )
    return True


def _tuned(
    base: Any, tokenizer: Any, model: str, data: list[Path], out: Path, adapters: Path, budgets: list[float],
    options: Any,
) -> tuple[dict[str, Any] | None, list[RenderableType]]:  # fmt: skip
    """What tuning gave, and its words. Where a model or the data do not allow it, the adapters are what there is."""
    from remoe_adapt.evaluation import tune_family
    from remoe_adapt.family import Family

    mode = {} if options.recency is None else {"mode": options.recency, "decay": options.recency_decay}
    try:
        with progress("tuning gains on the adapters") as (total, advance):
            made = tune_family(
                base, data, out, tokenizer=tokenizer, base_id=model, family=Family.load(adapters), budgets=budgets,
                seed=options.seed, on_total=total, on_tokens=advance, **mode,
            )  # fmt: skip
    except (RouterError, DataError) as error:
        return None, [f"not tuned, so the family is {adapters}: {error}"]
    return made, shown_points(made)


def _gains(text: str | None, strengths: list[float]) -> dict[str, Any]:
    """`recency_gain`, or `recency_gains` of each strength, as TrainOptions has them."""
    if text is None:
        return {}
    gains = numbers(text)
    if len(gains) == 1:
        return {"recency_gain": gains[0]}
    if len(gains) != len(strengths):
        raise ConfigError(
            f"--recency-gain has {len(gains)} gains for {len(strengths)} strengths: give one, or one each"
        )
    return {"recency_gain": None, "recency_gains": tuple(zip(strengths, gains, strict=True))}


@command(app, "eval", rows.of_arms)
def evaluate(
    model: opt.Model, data: opt.EvalData = None, family: opt.FamilyPath = None, max_tokens: opt.MaxTokens = None,
    policy: opt.Policies = ["lru"], cache: opt.Caches = [0.25, 0.5], window: opt.Window = None,  # noqa: B006
    recency: opt.EvalRecency = None, recency_gain: opt.RecencyGains = None, recency_decay: opt.RecencyDecay = None,
    recency_share: opt.RecencyShare = None, decode: opt.DecodeDomains = None, tasks: opt.Tasks = None,
    task_folder: opt.TaskFolder = None, limit: opt.Limit = None,
    plot: opt.Plot = None, per_layer: opt.PerLayer = False, certified: opt.Certify = False,
    against: opt.Against = None, expert_cache: opt.ExpertCacheBudget = None, storage: opt.Storage = None,
    arithmetic: opt.Arithmetic = "exact", device: opt.Device = None,
    dtype: opt.Dtype = "auto", config: opt.EvalConfig = None, warm_tokens: opt.WarmTokens = 32,
    threads: opt.EngineThreads = None, force: opt.Force = False, csv: opt.Csv = None, as_json: opt.Json = False,
) -> CommandResult:  # fmt: skip
    """Measure every operating point: perplexity, divergence from the base, expert reuse, hit rates, task scores.

    KL is the mean over tokens of KL(base || point) of the next-token distributions, in nats. policy@c is the share of
    expert look-ups found in a per-layer cache of max(K, floor(c * E)) experts, emptied where a document begins; all
    look-ups of a token see the cache as the previous token left it. policy@c/lookup, the figure that others publish:
    each look-up sees the cache as the look-up before left it.

    top1_agreement is the share of tokens for which a point holds the same token for the likeliest as the base. With
    --decode N, at least N tokens of each kind of text are decoded one by one as well (JSON: domains).

    With --against, ratios and KL are to that model: `remoe eval MODEL --storage PACK --against MODEL` tells what the
    pack's encoding costs. A quantised MODEL is loaded behind an expert cache that holds its codes.

    A GGUF file runs in llama.cpp, memory-mapped and token by token, with the recency prior in its callback: beside the
    rest stand the MiB that were really read from storage for a token, and major faults. Under a memory limit, that is
    what a prior saves; resident is possible there.
    """
    given = dict(locals())
    if not data and not tasks:
        raise typer.BadParameter("give --data FILE (repeat for more), or --tasks")
    from remoe_adapt.cli.plots import check_plot, plot_frontier
    from remoe_adapt.eviction import check_replay

    # Before the imports below, which take seconds, and before the model.
    check_replay(policy, cache)
    if recency is None and any(given is not None for given in (recency_gain, recency_decay, recency_share)):
        recency = DEFAULT_MODE
    gains = [] if recency is None else numbers(GAINS if recency_gain is None else recency_gain)
    if plot is not None:
        check_plot(plot, "--plot")
    from remoe_adapt.checkpoints import is_gguf

    # By its name too, so that a file that is not there is not looked for on the hub.
    gguf = model.endswith(".gguf") or is_gguf(model)
    check_kind(given, evaluate, gguf)
    if gguf:
        return eval_gguf(**rules.passed_on(given, eval_gguf))
    if tasks:
        check_extra("lm_eval", "eval", "task scores need lm-eval")

    from remoe_adapt.checkpoints import load_with_tokenizer, model_config
    from remoe_adapt.evaluation import (
        LEAST_CERTIFIED_TOKENS,
        certify,
        check_certifiable,
        check_data,
        check_domains,
        check_priors,
        check_vocabularies,
        evaluate_domains,
        evaluate_tasks,
        task_manager,
    )
    from remoe_adapt.evaluation import evaluate as measure
    from remoe_adapt.expert_cache import check_arithmetic, load_whole_or_cached
    from remoe_adapt.family import Family
    from remoe_adapt.texts import read_domains, read_shared

    quiet_libraries()
    check_arithmetic(arithmetic)
    priors = [Recency.of(recency, gain, recency_decay, recency_share) for gain in gains]
    points = None if family is None else Family.load(family)
    check_priors(points, priors)
    if data:
        check_data(data, max_tokens)
    if tasks:
        task_manager(words(tasks), task_folder)
    if certified and max_tokens is not None and max_tokens <= LEAST_CERTIFIED_TOKENS:
        raise ConfigError(
            f"--max-tokens {max_tokens} is too few to --certify, which needs {LEAST_CERTIFIED_TOKENS} scored tokens: "
            "give more, or measure without --certify."
        )
    if certified and points is not None:
        check_file(points.path / "family.json", "--certify: family.json of --family")
    if against is not None:
        check_vocabularies(model_config(model), model_config(against))
    size = expert_cache and budget(expert_cache)
    load = partial(load_whole_or_cached, expert_cache=size, storage=storage, arithmetic=arithmetic)
    base, tokenizer = load_with_tokenizer(model, device=device, dtype=dtype, load=load)
    other: Any = None
    if against is not None:
        other, _ = load_with_tokenizer(against, device=device, dtype=dtype, load=load_whole_or_cached)
    result: dict[str, Any] = {"model": model, "family": family, "against_model": against}
    shown: list[RenderableType] = []
    if data:
        documents = read_shared(data, tokenizer, max_tokens)
        if certified and points is not None:
            check_certifiable(sum(len(ids) - 1 for ids in documents))  # the first of a document has nothing to score it
        domains = read_domains(data, tokenizer, decode) if decode is not None else {}
        if decode is not None:
            check_domains(domains)
        arms = 1 + (other is not None) + len(priors)
        if points is not None:
            arms += len(points.points) + (points.control is not None)
        with progress("scoring", sum(map(len, documents)) * arms) as (_, advance):
            result |= measure(
                base, documents, family=points, policies=policy, caches=cache, window=window, priors=priors,
                force=force, per_layer=per_layer, against=other, on_tokens=advance,
            )  # fmt: skip
        result["data"] = [path.name for path in data]
        shown.append(report.eval_table(result))
        if per_layer:
            shown.append(report.layer_table(arm_rows(result)))
        if domains:
            decoded = sum(len(ids) - 1 for documents in domains.values() for ids in documents)
            with progress("decoding", decoded * arms) as (_, advance):
                result["domains"] = evaluate_domains(
                    base, domains, family=points, policies=policy, caches=cache, priors=priors, force=force,
                    against=other, on_tokens=advance,
                )  # fmt: skip
            shown.append(report.domain_table(result))
        if plot is not None:
            report.afterwards(result, shown, lambda: plot_frontier(result, plot), f"plot written to {plot}")
        if certified and points is not None:
            report.afterwards(result, shown, lambda: certify(points, result), f"certificates written to {points.path}")
    if tasks:

        def score() -> None:
            scores = evaluate_tasks(
                base, tokenizer, points, words(tasks), folder=task_folder, limit=limit, priors=priors, force=force,
                against=other,
            )  # fmt: skip
            result["tasks"] = scores
            shown.append(report.task_table(scores))

        if data:
            report.afterwards(result, shown, score, "task scores by lm-eval")
        else:
            score()
    return result, shown
