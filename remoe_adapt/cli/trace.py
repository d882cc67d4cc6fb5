"""`remoe trace` and `remoe simulate`: routing recorded, and replayed through expert caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from remoe_adapt._support import check_file
from remoe_adapt.cli import options as opt
from remoe_adapt.cli import report, rows
from remoe_adapt.cli.app import app, command
from remoe_adapt.cli.options import CommandResult
from remoe_adapt.cli.report import progress, quiet_libraries
from remoe_adapt.errors import ConfigError


@command(app, "trace")
def trace(
    model: opt.Model, data: opt.Data, out: opt.TraceOut, decode: opt.Decode = None,
    prompt_tokens: opt.PromptTokens = 64, temperature: opt.Temperature = 0.0, seed: opt.Seed = 0,
    max_tokens: opt.RecordTokens = 8192, device: opt.Device = None, dtype: opt.Dtype = "auto",
    as_json: opt.Json = False,
) -> CommandResult:  # fmt: skip
    """Record which experts every router chooses, over given text or over the model's own decode."""
    check_file(out, "--out", (".npz",), new_folders=True)
    if model.endswith(".gguf"):
        if device is not None or dtype != "auto":
            raise ConfigError("--device and --dtype are for models that transformers runs, not for a GGUF.")
        return _trace_gguf(model, data, out, decode, max_tokens)
    from remoe_adapt.checkpoints import load_with_tokenizer
    from remoe_adapt.evaluation import check_data, prompts_from, record_decode, record_prefill
    from remoe_adapt.eviction import summarise
    from remoe_adapt.expert_cache import load_whole_or_cached
    from remoe_adapt.texts import read_shared

    check_data(data, max_tokens)
    quiet_libraries()
    base, tokenizer = load_with_tokenizer(model, device=device, dtype=dtype, load=load_whole_or_cached)
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


def _trace_gguf(model: str, data: list[Path], out: Path, decode: int | None, max_tokens: int) -> CommandResult:
    """Record which experts every router of a GGUF model chooses over given text, in llama.cpp itself."""
    from remoe_adapt.engines.llamacpp import GgufTokenizer, open_gguf, record_gguf
    from remoe_adapt.evaluation import check_data
    from remoe_adapt.eviction import summarise
    from remoe_adapt.texts import read_shared

    if decode is not None:
        raise ConfigError("--decode is for models that transformers runs; of a GGUF given text is recorded.")
    check_data(data, max_tokens)
    engine, window = open_gguf(model)
    with engine:
        documents = read_shared(data, GgufTokenizer(engine), max_tokens)
        text = ", ".join(path.name for path in data)
        with progress("recording", sum(map(len, documents))) as (_, advance):
            recorded = record_gguf(
                engine, documents, window=window, model_id=Path(model).name, text=text, on_tokens=advance
            )
    recorded.save(out)
    result = {"out": str(out), **summarise(recorded)}
    return result, [report.figures_table("recorded in llama.cpp", result)]


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
) -> CommandResult:
    """Replay a trace through expert caches: overlap, switch rate, and the hit rate of each policy and size.

    policy@c is the share of expert look-ups found in a per-layer cache of max(K, floor(c * E)) experts, emptied where a
    document begins. It is token-atomic: all look-ups of a token see the cache as the previous token left it. Beside it
    stands policy@c/lookup, the figure that others publish: each look-up sees the cache as the look-up before left it.
    """
    from remoe_adapt.eviction import check_replay, layer_rows, summarise
    from remoe_adapt.traces import PHASES, Trace

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
