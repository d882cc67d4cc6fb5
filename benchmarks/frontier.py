"""Misses at equal quality: ours against what others published, decoded token by token with simulated expert caches.

`python benchmarks/frontier.py --json` measures the shipped model, with `--model` another; `python benchmarks/run.py
frontier` writes results/frontier_cpu.csv (points), frontier_cpu_budgets.csv and frontier_cpu_bars.csv as well. Other
bases are made by the script that made the shipped one, in 40 minutes on a core each:
`python examples/train_tiny_moe.py --architecture deepseek_v2 --tokenizer examples/tiny_moe --data F --out D`.

- Text: held-out files and the standard library modules that the base was never trained on, in equal parts, in rows of
  512 tokens; every seed draws other rows. Each row decodes token by token with a KV cache; its caches start empty, and
  cold misses count. Caches hold 25 % of a layer's experts and are token-atomic.
- Quality: perplexity over that of the base (its standard error is paired by row), KL from the base's distribution to
  the arm's in nats, the share of tokens with the same most likely next one.
- Misses: over those of the base under LRU on the same rows. Every arm runs its own eviction inside the loop, because
  what it chooses depends on what is resident. Choosing to do nothing is a point of every arm.
- Value at a budget: `frontier_curves.misses_at`; an arm is the Pareto front of its points and never extrapolated, so
  one whose strongest point stays below a budget has that point's misses there.
- Arms: `published` is ReMoE (arXiv:2605.27081: adapters trained end to end with the reuse and trust losses and
  next-token CE, LRU, no prior); `prior` the best of Cache-Prior, Max-Rank and the cumulative threshold
  (arXiv:2412.00099, LRU); `cecar` a learned reuse distance that evicts and routes; `ours` a family with its routers,
  priors and LRFU (what `remoe train` writes); `tuned` the same without training (`remoe tune`). Ours run as a user runs
  them; the rivals' rules are put on the routers by `frontier_decode`.
- Curves beside them: `native` (the base's own choice under other evictions), `cost_uniform` (one gain of mode `cost`),
  `cache_prior_lrfu`, `cache_prior_kept` (the same, none protected, with the weights of mode `cost`), `published_lrfu`,
  `published_control` (next-token training alone) and `stateless` (the adapters of our family alone, without a prior,
  under LRU).
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from frontier_arms import CachePrior, CoAware, CumulativeThreshold, KeptPrior, MaxRank, grid
from frontier_curves import bars, budgets
from frontier_decode import Decoded, Eviction, Lrfu, Lru, Rule, Setting, Text, decode
from frontier_reuse import Observed, ReuseDistance

from remoe_adapt._support import read_json
from remoe_adapt.bench.harness.results import REPO_ROOT, chosen_model, work_folder
from remoe_adapt.checkpoints import load_with_tokenizer
from remoe_adapt.errors import ConfigError, DataError, RemoeError
from remoe_adapt.evaluation import example_folder, held_out
from remoe_adapt.evaluation.arms import Arm, Arms, arms_of
from remoe_adapt.eviction.replay import cache_capacity, count_misses
from remoe_adapt.family import TRAINED, Family
from remoe_adapt.recency_settings import Recency
from remoe_adapt.routers import survey_routers
from remoe_adapt.texts import data_files, read_shared
from remoe_adapt.traces import eor
from remoe_adapt.training import TrainOptions, train_family

HELD_OUT = ("wikitext2_valid.txt.gz", "gsm8k_test.jsonl.gz", "humaneval.jsonl.gz")
GROUPS = ("native", "prior", "cecar", "published", "ours", "tuned")
SHARE, DECAY = 0.25, 0.95
Point = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """of: JSON of earlier runs on one model: these are joined, and nothing is measured. model: None: the shipped one.
    seeds: of text and training. arms: of GROUPS. family, tuned: folders of families; None: the model's own, and one
    uniform gain. rows, steps: of the text. side_by_side: rows of a batch, with several settings of a rule in one.
    training_steps: of the published method. work: keeps what was trained."""

    of: Sequence[str] = ()
    model: str | None = None
    seeds: Sequence[int] = (0,)
    arms: Sequence[str] = GROUPS
    family: str | None = None
    tuned: str | None = None
    data: str = str(REPO_ROOT.parent / "shared" / "data")
    rows: int = 32
    steps: int = 512
    side_by_side: int = 256
    weights: Sequence[float] = (0.1, 0.3, 0.6, 1.0)
    reuse_weight: float = 4.0
    training_steps: int = 200
    training_batch: int = 4
    gains: Sequence[float] = (0.02, 0.05, 0.1, 0.14, 0.2, 0.28)
    work: str | None = None


def run(options: Options, on_point: Callable[[Point], None] | None = None) -> dict[str, Any]:
    """`budgets`, `curves` and `bars`; see the module. on_point is called with each point as it is measured.

    Raises as loading models, families and text does.
    """
    if options.of:
        return joined(options.of)
    place = chosen_model(options.model)
    model, tokenizer = load_with_tokenizer(place, device="cpu", dtype="float32")
    points: list[Point] = []
    for seed in options.seeds:
        bench = _Bench(options, Path(place), model, tokenizer, seed)
        for point in bench.points():
            points.append(point)
            if on_point is not None:
                on_point(point)
    return result_of(str(place), points)


def result_of(place: str, points: Sequence[Point]) -> dict[str, Any]:
    """What `run` returns, of these points."""
    rows = budgets(points)
    curves: dict[str, list[Point]] = {}
    for point in points:
        curves.setdefault(point["curve"], []).append(point)
    return {
        "model": place, "budgets": rows, "kl_budgets": budgets(points, "kl"), "curves": curves,
        "bars": bars(rows, points),
    }  # fmt: skip


def joined(files: Sequence[str | Path]) -> dict[str, Any]:
    """Results of runs on one model, as one: seeds and arms may be measured side by side.

    Raises ConfigError for runs on several models, DataError for a file that is no result.
    """
    found = [read_json(Path(file), DataError) for file in files]
    places = {result["model"] for result in found}
    if len(places) > 1:
        raise ConfigError(f"results of several models, {', '.join(sorted(places))}: join those of one")
    points = [point for result in found for curve in result["curves"].values() for point in curve]
    # The base's own points are measured by every run.
    unlike = {(point["seed"], point["curve"], point["label"]): point for point in points}
    return result_of(places.pop(), list(unlike.values()))


def text_rows(documents: Sequence[Sequence[int]], end: int | None, rows: int, length: int, seed: int) -> torch.Tensor:
    """[rows, length] of a stream of these documents in an order drawn by the seed, each with the end token behind it;
    rows are drawn from all over it and do not overlap. Raises DataError for too little text."""
    drawn = random.Random(seed)
    mixed = drawn.sample(list(documents), len(documents))
    stream = [token for ids in mixed for token in (*ids, *(() if end is None else (end,)))]
    starts = range(0, len(stream) - length + 1, length)
    if len(starts) < rows:
        raise DataError(f"{len(stream)} tokens of text do not give {rows} rows of {length}: ask for fewer rows")
    return torch.tensor([stream[start : start + length] for start in sorted(drawn.sample(starts, rows))])


@dataclass(eq=False)
class _Bench:
    """One model on one seed's text."""

    options: Options
    place: Path
    model: Any
    tokenizer: Any
    seed: int
    text: Text = field(init=False)
    base: Decoded = field(init=False)

    def points(self) -> Iterator[Point]:
        """Everything that the options ask for."""
        self.text = Text(self._held_out_rows())
        self.base = decode(self.model, self.text, Lru(), SHARE)[0]
        yield from self._native()
        for group in self.options.arms:
            if group != "native":
                yield from getattr(self, f"_{group}")()

    def _held_out_rows(self) -> torch.Tensor:
        """In equal parts from each held-out file and from the modules that no training saw."""
        folder = Path(self.options.data) / "heldout"
        sources = [read_shared([folder / name], self.tokenizer) for name in HELD_OUT]
        recipe = self.place if (self.place / "demo.json").is_file() else example_folder()
        sources.append(held_out(recipe, self.tokenizer, 1 << 20, piece_tokens=1 << 14).documents)
        return self._rows(sources, self.options.rows, self.options.steps)

    def _rows(self, sources: Sequence[Sequence[Sequence[int]]], rows: int, steps: int) -> torch.Tensor:
        end, share = self.tokenizer.eos_token_id, max(1, rows // len(sources))
        return torch.cat([text_rows(documents, end, share, steps + 1, self.seed) for documents in sources])

    def _point(self, curve: str, label: str, found: Decoded, misses: float | None = None, **more: Any) -> Point:
        change_R = found.ce_R - self.base.ce_R
        ratio = math.exp(change_R.mean())
        return {
            "curve": curve, "label": label, "seed": self.seed, "ppl_ratio": ratio,
            "ppl_se": ratio * float(change_R.std()) / math.sqrt(len(change_R)),
            "misses": float(found.misses_R.sum() if misses is None else misses) / float(self.base.misses_R.sum()),
            "kl": float(found.kl_R.mean()), "agree": float(found.agree_R.mean()),
            "eor": eor(found.trace) / eor(self.base.trace), "share": SHARE, **more,
        }  # fmt: skip

    def _replayed(self, found: Decoded, policy: str, decay: float = DECAY, share: float = SHARE) -> float:
        """Misses of what was chosen under another eviction: where the choice did not look at the cache."""
        capacity = cache_capacity(share, found.trace.num_experts, found.trace.top_k)
        return float(count_misses(found.trace, policy, [capacity], decay).sum())

    def _native(self) -> Iterator[Point]:
        """The base's own choice under other evictions; Belady's is what no online one can reach."""
        for share in (SHARE, SHARE / 2):
            lru = self._replayed(self.base, "lru", share=share)
            whole = float(self.base.misses_R.sum()) / lru
            for policy, decay in (("lrfu", 0.9), ("lrfu", 0.95), ("markov", 0.9)):
                misses = self._replayed(self.base, policy, decay, share) * whole
                yield self._point("native", f"{policy} {decay:g} at {share:g}", self.base, misses, share=share)
            misses = self._replayed(self.base, "belady", share=share) * whole
            yield self._point("belady", f"Belady at {share:g}", self.base, misses, share=share)

    def _swept(
        self, curve: str, kind: type[Rule], settings: Sequence[Setting], eviction: Callable[[], Eviction]
    ) -> Iterator[Point]:
        """Points of a rule, as many settings side by side as fit."""
        at_once = max(1, self.options.side_by_side // len(self.text.ids_RS))
        for first in range(0, len(settings), at_once):
            rule = kind(settings[first : first + at_once])
            for setting, found in zip(
                rule.settings, decode(self.model, self.text, eviction(), SHARE, rule), strict=True
            ):
                yield self._point(curve, rule.label(setting), found)

    @property
    def _k(self) -> int:
        return self.base.trace.top_k

    def _prior(self) -> Iterator[Point]:
        k, experts = self._k, self.base.trace.num_experts
        gains = [*grid(J=(2,), gain=(0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)), *grid(J=(1,), gain=(0.3, 0.5))]
        windows = grid(J=(1, k // 2), M=[min(experts, round(k * part)) for part in (1.5, 2, 2.75, 4)])
        masses = grid(J=(k // 2,), p=(0.6, 0.7, 0.8, 0.9))
        for name in ("cache_prior", "max_rank", "cumulative"):
            yield self._point(name, "base, LRU", self.base)
        yield from self._swept("cache_prior", CachePrior, gains, Lru)
        yield from self._swept("max_rank", MaxRank, windows, Lru)
        yield from self._swept("cumulative", CumulativeThreshold, masses, Lru)
        yield self._point("cache_prior_lrfu", f"base, LRFU {DECAY:g}", self.base, self._replayed(self.base, "lrfu"))
        yield from self._swept("cache_prior_lrfu", CachePrior, gains[1:6:2], lambda: Lrfu(DECAY))
        kept = grid(J=(0,), gain=(0.05, 0.1, 0.15, 0.2, 0.3))
        yield from self._swept("cache_prior_kept", KeptPrior, kept, lambda: Lrfu(DECAY))

    def _cecar(self) -> Iterator[Point]:
        k = self._k
        distance = self._fitted()
        settings = [
            *grid(J=(k,), margin=(0,), power=(1,), gain=(0.0, 0.1, 0.2, 0.3, 0.45)),
            *grid(J=(k,), margin=(0,), power=(0,), gain=(0.05, 0.1, 0.15, 0.2, 0.3, 0.45)),
            *grid(J=(k,), margin=(8,), power=(1,), gain=(0.5, 1.0, 1.5)),
            *grid(J=(k // 2, k - 1), margin=(8,), power=(1,), gain=(0.0, 0.5, 1.0)),
        ]
        yield from self._swept("cecar", CoAware, settings, lambda: ReuseDistance(distance.weights_LF))

    def _fitted(self) -> ReuseDistance:
        """The reuse distance, learned on the base's decoding of training text."""
        files = data_files([Path(self.options.data) / "train"])
        share = 8 * (self.options.steps + 1)
        text = Text(self._rows([read_shared([file], self.tokenizer, share) for file in files], 28, self.options.steps))
        observed = Observed()
        decode(self.model, text, observed, SHARE)
        return observed.fitted()

    def _published(self) -> Iterator[Point]:
        """Trained once and kept in `work`."""
        options = self.options
        name = survey_routers(self.model).fingerprint.removeprefix("sha256:")[:12]
        family = train_family(
            self.model, [Path(options.data) / "train"], options.weights,
            work_folder(options.work) / "frontier" / name / f"published_{self.seed}", tokenizer=self.tokenizer,
            options=TrainOptions(
                recency=None, reference="base", distill_share=0.0, reuse_weight=options.reuse_weight,
                steps=options.training_steps, batch=options.training_batch, seed=self.seed,
            ),
        )  # fmt: skip
        yield self._point("published", "base, LRU", self.base)
        yield self._point("published_lrfu", f"base, LRFU {DECAY:g}", self.base, self._replayed(self.base, "lrfu"))
        with arms_of(self.model, family) as arms:
            wanted = (*arms.points, *(() if arms.control is None else (arms.control,)))
            for arm, found in self._decoded(arms, wanted, Lru):
                if arm is arms.control:
                    yield self._point("published_control", "control, LRU", found)
                    continue
                label = f"reuse weight {options.reuse_weight * (arm.strength or 0.0):g}"
                yield self._point("published", label, found)
                yield self._point("published_lrfu", label, found, self._replayed(found, "lrfu"))

    def _ours(self) -> Iterator[Point]:
        """Nothing where none was asked for and none lies beside the model."""
        place = Path(self.options.family or self.place / "family")
        if self.options.family is None and not (place / "family.json").is_file():
            return
        yield from self._family("ours", Family.load(place))
        adapters = place / TRAINED
        if (adapters / "family.json").is_file():
            with arms_of(self.model, Family.load(adapters)) as arms:
                for arm, found in self._decoded(arms, arms.points, Lru):
                    yield self._point("stateless", f"strength {arm.strength:g}, LRU", found)

    def _tuned(self) -> Iterator[Point]:
        if self.options.tuned is not None:
            yield from self._family("tuned", Family.load(self.options.tuned))
        yield self._point("cost_uniform", f"base, LRFU {DECAY:g}", self.base, self._replayed(self.base, "lrfu"))
        priors = [Recency.of("cost", gain) for gain in self.options.gains]
        with arms_of(self.model, None, priors=priors) as arms:
            decoded = self._decoded(arms, arms.priors, lambda: Lrfu(DECAY))
            for (_, found), gain in zip(decoded, self.options.gains, strict=True):
                yield self._point("cost_uniform", f"gain {gain:g}", found)

    def _family(self, curve: str, family: Family) -> Iterator[Point]:
        """Every point with its routers and its prior, over an LRFU cache."""
        yield self._point(curve, f"base, LRFU {DECAY:g}", self.base, self._replayed(self.base, "lrfu"))
        with arms_of(self.model, family) as arms:
            for arm, found in self._decoded(arms, arms.points, lambda: Lrfu(DECAY)):
                yield self._point(curve, f"point {arm.strength:g}", found)

    def _decoded(
        self, arms: Arms, wanted: Sequence[Arm], eviction: Callable[[], Eviction]
    ) -> Iterator[tuple[Arm, Decoded]]:
        """Each of these arms as a user runs it."""
        for arm in wanted:
            arms.use(arm)
            [found] = decode(self.model, self.text, eviction(), SHARE)
            yield arm, found


def csv_rows(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows of each result file; "" where there is no value."""
    model = {"model": Path(result["model"]).name}
    points = [point for curve in result["curves"].values() for point in curve]
    spent = [
        {"budget_of": cost, "budget": row[cost], **{name: value for name, value in row.items() if name != cost}}
        for cost, name in (("ppl_ratio", "budgets"), ("kl", "kl_budgets"))
        for row in result[name]
    ]
    found = {"": points, "_budgets": spent, "_bars": result["bars"]}
    return {
        f"frontier_cpu{name}.csv": [
            {**model, **{key: "" if value is None else value for key, value in _flat(row)}} for row in rows
        ]
        for name, rows in found.items()
    }


def _flat(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{inner}_{key}", number) for inner, number in value.items())
        else:
            yield key, value


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str | None, typer.Option(help="Folder of a base; left out: the shipped one.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of text and training, as 0,1,2.")] = "0",
    arms: Annotated[str, typer.Option(help="Which to measure.")] = ",".join(GROUPS),
    family: Annotated[str | None, typer.Option(help="Our family; left out: the model's own.")] = None,
    tuned: Annotated[str | None, typer.Option(help="A family of `remoe tune`.")] = None,
    data: Annotated[str, typer.Option(help="Folder with train and heldout.")] = Options.data,
    rows: Annotated[int, typer.Option(help="Rows of text.")] = Options.rows,
    steps: Annotated[int, typer.Option(help="Tokens of a row.")] = Options.steps,
    training_steps: Annotated[int, typer.Option(help="Of the published method.")] = Options.training_steps,
    work: Annotated[str | None, typer.Option(help="Keeps what was trained.")] = None,
    of: Annotated[list[str] | None, typer.Option(help="JSON of an earlier run, to be joined; repeat.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Misses at equal quality: ours against what others published."""
    options = Options(
        model=model, seeds=[int(seed) for seed in seeds.split(",")], arms=arms.split(","), family=family, tuned=tuned,
        data=data, rows=rows, steps=steps, training_steps=training_steps, work=work, of=of or (),
    )  # fmt: skip
    try:
        result = run(options, on_point=_tell)
    except RemoeError as error:
        sys.exit(f"error: {error}")
    if as_json:
        print(json.dumps(result))
        return
    for row in (*result["budgets"], *result["kl_budgets"]):
        print(", ".join(f"{k} {'-' if v is None else format(v, '.4g')}" for k, v in row.items() if k != "spread"))
    for row in result["bars"]:
        value = "-" if row["value"] is None else format(row["value"], ".3g")
        print(f"{row['bar']}: {value} (bar {row['target']:g}, met: {row['met']})")


def _tell(point: Point) -> None:
    print(
        f"{point['curve']} seed {point['seed']}: {point['label']}: ratio {point['ppl_ratio']:.4f} "
        f"+- {point['ppl_se']:.4f}, misses {point['misses']:.3f}, KL {point['kl']:.4f}",
        file=sys.stderr, flush=True,
    )  # fmt: skip


if __name__ == "__main__":
    app()
