"""What the command line accepts and returns: one typed name per option, so that equal ones read alike everywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from remoe_adapt.errors import ConfigError
from remoe_adapt.eviction import POLICIES
from remoe_adapt.recency_settings import DEFAULT_MODE, MODES

# What a command returns: its JSON object, and what is shown instead of it.
CommandResult = tuple[Mapping[str, Any], list[RenderableType]]
# What a command yields that speaks while it runs: JSON object and text of each line.
CommandLines = Iterator[tuple[Mapping[str, Any], str]]

# Everywhere
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output instead of tables.")]
Csv = Annotated[Path | None, typer.Option("--csv", metavar="FILE.csv", help="Write the table's figures here as well.")]
Contracts = Annotated[
    bool, typer.Option("--contracts", help="Check what we rely on in the installed transformers, PEFT and torch.")
]
Model = Annotated[str, typer.Argument(help="Folder or hub id of the base model.", metavar="MODEL")]
FamilyPath = Annotated[str | None, typer.Option("--family", help="Family folder or hub id.")]
Device = Annotated[str | None, typer.Option(help="Where to run: cpu, cuda, ... Default: a GPU if there is one.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Force = Annotated[bool, typer.Option("--force", help="Use a family made for another base.")]
Data = Annotated[list[Path], typer.Option(help="Text: .txt, .jsonl, .gz of these, or a folder; repeat.")]
Policies = Annotated[list[str], typer.Option("--policy", help=f"{', '.join(POLICIES)}; repeat.")]
Caches = Annotated[list[float], typer.Option("--cache", help="Cache size as a share of the experts; repeat.")]

# remoe demo, remoe bench
ShippedModel = Annotated[str | None, typer.Option(help="Folder or hub id instead of the shipped model.")]
MoreData = Annotated[list[Path] | None, typer.Option(help="More held-out text to decode; repeat.")]
DemoTokens = Annotated[int, typer.Option(min=2, help="Tokens of held-out text to decode with every strength.")]
MaxSeconds = Annotated[float, typer.Option(min=0, help="Stop decoding after this time, whatever is done by then.")]
SampleTokens = Annotated[int, typer.Option(min=0, help="Length of the sample texts; 0 leaves them out.")]

# remoe train; None means the default of training.TrainOptions
FamilyOut = Annotated[Path, typer.Option(help="Folder of the family; an unfinished one is gone on with.")]
Strengths = Annotated[str, typer.Option(help="Points to train, comma-separated, each in (0, 1].")]
ReuseWeight = Annotated[float | None, typer.Option(help="Weight of L_Reuse at strength 1.")]
SmoothWeight = Annotated[float | None, typer.Option(help="Weight of L_Smooth at strength 1.")]
LagWeight = Annotated[float | None, typer.Option(help="Weight of L_Lag at strength 1.")]
WsWeight = Annotated[float | None, typer.Option(help="Weight of L_WS at strength 1.")]
KlWeight = Annotated[float | None, typer.Option(help="Weight of L_Trust.")]
DistillShare = Annotated[float | None, typer.Option(help="Share of the base's own distribution in the target.")]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps per point.")]
Batch = Annotated[int | None, typer.Option(help="Rows per step.")]
Accumulate = Annotated[int | None, typer.Option(help="Micro-batches per step.")]
Length = Annotated[int | None, typer.Option(help="Tokens per row.")]
Lr = Annotated[float | None, typer.Option(help="Learning rate, relative to the router's own scale.")]
Mode = Annotated[str | None, typer.Option(help="end-to-end, or local (memory of inference only).")]
Rank = Annotated[int | None, typer.Option(help="Low-rank deltas of this rank; default: full.")]
DataSeed = Annotated[int | None, typer.Option("--seed", help="Of the order of the data.")]
Resume = Annotated[bool, typer.Option(help="Go on with an unfinished family in --out.")]
CheckpointMinutes = Annotated[float | None, typer.Option(min=0, help="A kill loses no more than this; default 5.")]
Control = Annotated[bool, typer.Option(help="Train the next-token-loss-only control too.")]

TuneAfter = Annotated[
    bool | None,
    typer.Option(
        "--tune/--no-tune",
        help="Tune recency gains on the adapters for --budgets. Default: unless they are trained under a --recency.",
    ),
]
TrainBudgets = Annotated[
    str | None, typer.Option("--budgets", help="Perplexity ratios that the tuned points stay within.")
]

# remoe tune
TuneFamily = Annotated[str | None, typer.Option("--family", help="A family whose adapters the points run with.")]
TuneOut = Annotated[Path, typer.Option("--out", help="Folder of the family, which must not be there.")]
Budgets = Annotated[str, typer.Option(help="Perplexity ratios to stay within, comma-separated, each above 1.")]
TuneCache = Annotated[float, typer.Option("--cache", help="Cache whose misses count, as a share of the experts.")]
TuneRecency = Annotated[str, typer.Option("--recency", help="Recency prior: a mode with history.")]
TuneTokens = Annotated[int, typer.Option("--max-tokens", help="Tokens to calibrate by, shared among the files.")]
TextSeed = Annotated[int, typer.Option("--seed", help="Of which parts of the text are taken.")]

# remoe eval
EvalData = Annotated[list[Path] | None, typer.Option("--data", help="Text: .txt, .jsonl, .gz, or a folder; repeat.")]
MaxTokens = Annotated[int | None, typer.Option(min=2, help="Tokens in all, shared evenly among the files.")]
DecodeDomains = Annotated[
    int | None,
    typer.Option(
        "--decode",
        min=512,
        metavar="N",
        help="Decode N tokens of each domain (file, or `domain` of a record) token by token, and report each.",
    ),
]
Window = Annotated[int | None, typer.Option(min=2, help="Shorter windows than min(max positions, 1024).")]
Tasks = Annotated[str | None, typer.Option(help="lm-eval tasks, comma-separated (extra: eval).")]
TaskFolder = Annotated[Path | None, typer.Option(help="Folder with lm-eval task files of your own.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Examples per task.")]
Plot = Annotated[Path | None, typer.Option(help="Write EOR against perplexity here (extra: plot).")]
Recency = Annotated[str | None, typer.Option(help=f"Recency prior: {', '.join(MODES)}.")]
RecencyGains = Annotated[
    str | None,
    typer.Option(
        "--recency-gain",
        "--gain",
        help=f"Its gains to try on the base, comma-separated; default 0.1,0.2,0.3; of {DEFAULT_MODE}.",
    ),
]
EvalRecency = Annotated[
    str | None, typer.Option("--recency", help=f"Recency prior: {', '.join(MODES)}; of a GGUF several, with commas.")
]
EvalConfig = Annotated[
    str | None,
    typer.Option(
        "--config", help="Folder or hub id a GGUF was made from: its tokenizer if the file has none, norm_topk_prob."
    ),
]
WarmTokens = Annotated[
    int, typer.Option("--warm-tokens", min=0, help="Tokens that each arm decodes before it counts (GGUF).")
]
PerLayer = Annotated[bool, typer.Option("--per-layer", help="The figures of each layer too (JSON: per_layer).")]
RecencyGain = Annotated[float | None, typer.Option(help="Its gain, at every strength; default 0.2.")]
FullGain = Annotated[
    str | None,
    typer.Option("--recency-gain", help="Its gain in the point of strength 1; or one for each strength, with commas."),
]
NextSteps = Annotated[
    int | None, typer.Option(min=1, help="Points but the weakest go on from it, this far; default: all from the base.")
]
Reference = Annotated[
    str | None,
    typer.Option(help="What points are held to: auto, base, or control, trained first; auto: whichever is better."),
]
RecoveryRank = Annotated[
    int | None, typer.Option(min=1, help="Train a LoRA of this rank on attention and dense layers with each point.")
]
RecoveryLr = Annotated[float | None, typer.Option(help="Its learning rate; default 0.001.")]
EvaluateEvery = Annotated[
    int | None, typer.Option(min=1, help="Steps between looks at held-out text; each point ends as it did best.")
]
Patience = Annotated[int | None, typer.Option(min=1, help="Looks without a better one, and a point stops; default 3.")]
Checkpointing = Annotated[bool, typer.Option(help="Run layers again in backward: less memory, more time.")]
# From the table of modes, so that a new mode is in the help without a word here.
_DECAYS = " or ".join(f"{mode.name}; default {mode.default_decay:g}" for mode in MODES.values() if mode.takes_decay)
_SHARES = " or ".join(f"{mode.default_share:g} ({mode.name})" for mode in MODES.values() if mode.default_share)
RecencyDecay = Annotated[float | None, typer.Option(help=f"Its decay in mode {_DECAYS}.")]
RecencyShare = Annotated[
    float | None,
    typer.Option(help=f"Of a layer's experts, how many a cache holds; default {_SHARES}."),
]
Against = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Compare with this model, not with the base: what quantising cost.")
]
Certify = Annotated[bool, typer.Option("--certify", help="Write the results into family.json.")]

# remoe report
ReportOut = Annotated[Path, typer.Option("--out", metavar="FILE.html", help="The page; pictures go beside it.")]
ReportModel = Annotated[
    str | None, typer.Option("--model", help="Measure the points on this base anew (folder or hub id; needs --data).")
]
FrontierFile = Annotated[
    Path | None,
    typer.Option("--frontier", metavar="FILE.json", help="Arms to compare with: `benchmarks/frontier.py --json`."),
]

# remoe trace, remoe simulate
TraceOut = Annotated[Path, typer.Option("--out", metavar="FILE.npz", help="The .npz to write.")]
Decode = Annotated[int | None, typer.Option(min=1, help="Decode this many tokens after each document's start.")]
PromptTokens = Annotated[int, typer.Option(min=1, help="With --decode: how much of a document is the prompt.")]
RecordTokens = Annotated[
    int, typer.Option("--max-tokens", min=2, help="Tokens to record, shared evenly among the files.")
]
TraceFile = Annotated[Path, typer.Argument(metavar="TRACE", help="A trace .npz, or the CSV of a phone run.")]
FirstTokens = Annotated[int | None, typer.Option("--tokens", min=1, help="Only the first N tokens.")]
Phase = Annotated[str | None, typer.Option(help="prefill or decode, of a trace that has both.")]

# Generation
Prompt = Annotated[str, typer.Option(help="What to continue.")]
Profile = Annotated[str | None, typer.Option(help="Profile name or YAML file: see `remoe profiles list`.")]
Pressure = Annotated[float | None, typer.Option(min=0, max=1, help="Pin the pressure, 0 (plenty) to 1 (thrashing).")]
Strength = Annotated[float | None, typer.Option(min=0, max=1, help="Pin the strength itself, 0 to 1.")]
ExpertCacheBudget = Annotated[
    str | None, typer.Option("--expert-cache", help="Keep so much of the experts in memory: a share (0.25) or 2GiB.")
]
DemoCache = Annotated[str, typer.Option("--expert-cache", help="So much of the experts in memory: a share, or 2GiB.")]
Storage = Annotated[Path | None, typer.Option(help="Read experts from this folder of `remoe pack`.")]
Arithmetic = Annotated[
    str, typer.Option(help="Of quantised experts: exact (dequantised), fast (as they are), auto (fast if it can be).")
]
Log = Annotated[Path | None, typer.Option(help="Append swaps and samples here, one JSON object a line.")]
LogPlot = Annotated[Path | None, typer.Option("--plot", help="Draw the --log over time here (extra: plot).")]
MetricsPort = Annotated[
    int | None, typer.Option(min=0, max=65535, help="Serve Prometheus metrics here (extra: metrics).")
]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to generate.")]
Temperature = Annotated[float, typer.Option(min=0, help="Of generated tokens; 0 is greedy.")]
Seed = Annotated[int, typer.Option(min=-(1 << 63), max=(1 << 64) - 1, help="Of generated tokens.")]

# remoe bench
Calls = Annotated[int, typer.Option(min=1, help="Timed calls for each row on the CPU.")]

# remoe bench decode, remoe bench controller
Work = Annotated[Path | None, typer.Option(help="Folder for the widened model and the disk; default: ~/.cache/remoe.")]
KeepModel = Annotated[bool, typer.Option("--keep", help="Keep the widened model for the next run.")]
Quick = Annotated[bool, typer.Option("--quick", help="A first look in a fraction of the time: less of all, few arms.")]
DecodeTokens = Annotated[int, typer.Option(min=2, help="Tokens of held-out text, decoded by every arm.")]
DecodeSeconds = Annotated[
    float, typer.Option(min=0, help="Begin no further document after so many seconds of decoding.")
]
QualityTokens = Annotated[
    int, typer.Option(min=0, help="More tokens, decoded without the clock, for the perplexity ratios.")
]
Threads = Annotated[int, typer.Option(min=1, help="Threads of torch, the same for every arm.")]
DirectIo = Annotated[bool, typer.Option(help="Read experts past the page cache.")]
Prefetch = Annotated[bool, typer.Option(help="Read ahead what the next layer's router will choose.")]
BenchDtype = Annotated[str, typer.Option("--dtype", help="Type of the weights of every arm: float32 or bfloat16.")]
FewerBits = Annotated[bool, typer.Option("--bits/--no-bits", help="Arms with experts in 4 and 8 bits.")]
Layers = Annotated[int, typer.Option(min=1, help="Layers of the model: 48 take 18 GB on the disk and 8 of memory.")]
ScaleTokens = Annotated[int, typer.Option("--tokens", min=1, help="Tokens that are timed, in each of two ways.")]
ScaleThreads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads of torch; default: all cores.")]
ScaleArithmetic = Annotated[str, typer.Option("--arithmetic", help="Of the experts: auto, fast or exact.")]
KeepFiles = Annotated[bool, typer.Option("--keep", help="Keep the models for the next run.")]
InRam = Annotated[bool, typer.Option("--in-ram/--no-in-ram", help="Also 4 bits against bf16 with all experts in RAM.")]
Pack = Annotated[bool, typer.Option(help="Read experts from a pack, not from the checkpoint.")]
ReadRate = Annotated[
    float, typer.Option("--read-mib", min=0, help="Nobody reads faster than so many MiB/s; 0: the disk.")
]
PhaseTokens = Annotated[int, typer.Option(min=1, help="Tokens of each phase: calm, squeeze, calm.")]
Cycles = Annotated[int, typer.Option(min=1, help="How often an arm is squeezed.")]
EmaGain = Annotated[float, typer.Option("--recency-gain", help="Recency prior (ema) at strength 1; 0: adapters alone.")]
Squeezed = Annotated[
    float, typer.Option(min=0, max=1, help="What a squeeze leaves of the cache, as a share of all experts.")
]
TakeRate = Annotated[float, typer.Option("--take-mib", min=1, help="MiB/s at which the other process takes memory.")]
PacedRate = Annotated[
    float, typer.Option("--read-mib", min=1, help="Experts are read as from a device of so many MiB/s.")
]
Squeezes = Annotated[int, typer.Option(min=0, help="Squeezes in the count of kills.")]

# remoe profiles
ProfileName = Annotated[str, typer.Argument(help="Profile name, or a YAML file.")]
ProfileNames = Annotated[list[str] | None, typer.Argument(help="Names or YAML files; default: all.")]
Version = Annotated[bool, typer.Option("--version", help="Show the version and exit.")]

# remoe plan
PlannedModel = Annotated[
    str, typer.Argument(help="Folder with a config.json, GGUF file or hub id; weights need not be there.")
]
PlanTrace = Annotated[
    Path | None, typer.Option("--trace", metavar="FILE.npz", help="Its routing (remoe trace), for hit rates.")
]
PlanConfig = Annotated[
    str | None, typer.Option("--config", help="Of a GGUF that does not tell its configuration: folder or hub id.")
]
StorageMib = Annotated[
    float | None, typer.Option("--storage-mib", help="MiB/s that experts are read at; default: measured where it lies.")
]
RamMib = Annotated[
    float | None, typer.Option("--ram-mib", help="MiB/s that weights are computed at; default: measured here.")
]
PlanMemory = Annotated[
    str | None, typer.Option("--memory", metavar="SIZE", help="Memory for all of it, instead of the profile's: 6GiB.")
]
PlanShare = Annotated[
    float | None, typer.Option("--share", help="Part of the experts in the cache, instead of the profile's.")
]

# remoe pack
PackOut = Annotated[Path, typer.Argument(help="Folder for the packed experts.", metavar="OUT")]
Bits = Annotated[int | None, typer.Option(help="Quantise the experts: 4 or 8. Default: as they are.")]
DenseBits = Annotated[
    int | None, typer.Option(help="Pack the dense part too: 4, 8, or 16 (as it is). Default: leave it out.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]

# remoe export
ExportBase = Annotated[str, typer.Argument(help="Folder or hub id of the base model.", metavar="BASE")]
ExportFamily = Annotated[str, typer.Argument(help="Family folder or hub id.", metavar="FAMILY")]
ExportFolder = Annotated[Path, typer.Argument(help="Folder to write.", metavar="OUT")]
AtStrength = Annotated[float, typer.Option("--strength", min=0, max=1, help="0 is the base, 1 the strongest point.")]
GgufModel = Annotated[Path, typer.Argument(help="A GGUF model; of a split one, its first part.", metavar="MODEL.gguf")]
OptionalFamily = Annotated[str | None, typer.Argument(help="Family folder or hub id.", metavar="FAMILY")]
OptionalGguf = Annotated[Path | None, typer.Argument(help="The GGUF to write.", metavar="OUT.gguf")]
OptionalStrength = Annotated[
    float | None, typer.Option("--strength", min=0, max=1, help="0 is the base, 1 the strongest point.")
]
GgufBase = Annotated[str | None, typer.Option("--base", help="Compare with this base value by value as well.")]
InPlace = Annotated[bool, typer.Option("--in-place", help="Change MODEL.gguf itself; originals go to an undo file.")]
UndoInPlace = Annotated[bool, typer.Option("--undo", help="Give MODEL.gguf its original routers back.")]
Split = Annotated[bool, typer.Option("--split", help="Put the routers into a first part of their own.")]
LoraStrengths = Annotated[
    str | None, typer.Option("--strength", help="Points to write, comma-separated; default: the stored ones.")
]
LoraRank = Annotated[int | None, typer.Option("--rank", help="Nearest LoRA of this rank; default: exact.")]

# remoe watch
Server = Annotated[str | None, typer.Option(help="Address of a running llama-server, as http://127.0.0.1:8080.")]
Live = Annotated[
    Path | None,
    typer.Option(metavar="SPLIT.gguf", help="Rewrite the routers of this mapped file instead: a hazard, see above."),
]
WatchFamily = Annotated[str | None, typer.Option("--family", help="Family that is driven: folder or hub id.")]
WatchGain = Annotated[
    float | None,
    typer.Option("--gain", min=0, help="Drive the recency prior of a preloaded server: gain at strength 1."),
]
PriorFile = Annotated[
    Path | None,
    typer.Option("--control", metavar="FILE", help="The preloaded server's control file; default: it tells."),
]
ServerPid = Annotated[int | None, typer.Option("--pid", help="The server's process; default: whoever has the port.")]
Once = Annotated[bool, typer.Option("--once", help="Look, set the strength once, and go.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; set nothing.")]
Interval = Annotated[float | None, typer.Option(min=0.01, help="Seconds between samples; default: the profile's.")]
ProxyAt = Annotated[
    str | None, typer.Option("--proxy", metavar="HOST:PORT", help="Listen here and set the strength of each request.")
]
Hold = Annotated[float, typer.Option(min=0.0, help="Seconds a request waits for a server that is down (--proxy).")]
MaxBody = Annotated[
    str | None, typer.Option("--max-body", metavar="SIZE", help="Longest request taken (--proxy); default: 64MiB.")
]
ReusePrompts = Annotated[
    bool, typer.Option("--reuse-prompts", help="Leave prompt caches to clients (--proxy, server with --cache-ram 0).")
]
KeepPoint = Annotated[bool, typer.Option("--keep", help="At the end, leave the strength as it is; default: the base.")]
ApiKey = Annotated[str | None, typer.Option(envvar="LLAMA_API_KEY", help="The server's --api-key.")]
JsonLines = Annotated[bool, typer.Option("--json", help="One JSON object per line.")]

# remoe serve
ServeGain = Annotated[
    float | None,
    typer.Option(
        "--recency-gain",
        "--gain",
        min=0,
        help="Its gain: at every strength; of a GGUF that at strength 1, held where nothing turns it. Default 0.2.",
    ),
]
ServeModel = Annotated[str, typer.Argument(help="Folder or hub id of the base model, or a GGUF file.", metavar="MODEL")]
LlamaServerProgram = Annotated[
    Path | None,
    typer.Option("--llama-server", metavar="PATH", help="Serve a GGUF by this llama-server (Linux, experimental)."),
]
LlamaOptions = Annotated[
    list[str] | None, typer.Option("--llama-option", help="One more word for --llama-server; repeat for each.")
]
ContextTokens = Annotated[int | None, typer.Option("--context", min=1, help="Tokens of all slots together (GGUF).")]
Slots = Annotated[int, typer.Option("--slots", min=1, max=256, help="Requests answered at once (GGUF).")]
PageAt = Annotated[
    str | None,
    typer.Option(
        "--page",
        metavar="[HOST:]PORT|off",
        help="Where page, status and metrics of a GGUF are; default: next to the server's port, on 127.0.0.1.",
    ),
]
EngineThreads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads of llama.cpp (GGUF).")]
Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: every one that this machine has.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any that is free.")]
ServeKey = Annotated[str | None, typer.Option("--api-key", envvar="REMOE_API_KEY", help="Key that requests must bear.")]
Alias = Annotated[list[str] | None, typer.Option("--alias", help="Another id of the model in requests; repeat.")]
ChatTemplate = Annotated[
    Path | None, typer.Option(metavar="FILE.jinja", help="How chats become prompts, instead of the tokenizer's own.")
]
ServeBody = Annotated[str, typer.Option("--max-body", metavar="SIZE", help="Longest request taken.")]
MaxWaiting = Annotated[int, typer.Option(min=0, help="Requests that may wait; one is answered at a time.")]
Drain = Annotated[float, typer.Option(min=0, help="Seconds that the last answer has when the server ends.")]


def budget(text: str) -> str | float:
    """A share of the experts, or a size with its unit."""
    try:
        return float(text)
    except ValueError:
        return text


def words(text: str) -> list[str]:
    """What commas separate."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(text: str) -> list[float]:
    """The same as numbers. Raises ConfigError."""
    try:
        return [float(word) for word in words(text) or [text]]
    except ValueError as error:
        raise ConfigError(f"{text!r} is not a list of numbers: write them as 0.25,0.5,1.0") from error


def size_bytes(text: str, option: str) -> int:
    """What a size option says. Raises ConfigError for one that is none, or 0."""
    from remoe_adapt.device_profile import parse_size

    try:
        found = parse_size(text)
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from error
    if not found:
        raise ConfigError(f"{option} {text}: no request would be taken; give a size above 0, as 64MiB.")
    return found
