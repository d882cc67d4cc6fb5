"""The pictures of README and docs: `python docs/pictures/make.py [dial|token|squeeze|demo|all]`.

Each is drawn from what the repository holds: `dial` from the shipped family's certificates, `squeeze` from
benchmarks/results/squeeze_cpu.csv (`python benchmarks/run.py squeeze`). `demo` runs `remoe demo` in a terminal.
"""

from __future__ import annotations

import csv
import json
import math
from itertools import groupby, pairwise
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
import yaml
from recording import recorded
from svg import (
    AMBER,
    FAINT,
    GREY,
    INK,
    PAPER,
    RED,
    RED_WASH,
    SOFT,
    TEAL,
    TEAL_WASH,
    WASH,
    Axes,
    Canvas,
    Curve,
)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FAMILY = ROOT / "examples" / "tiny_moe" / "family" / "family.json"
SQUEEZE = ROOT / "benchmarks" / "results" / "squeeze_cpu.csv"
# The base's own hit rate stands in no certificate; `remoe eval` measures it in the same run (README, "What it shows").
BASE_HIT_RATE = 0.528
PRESSURE = 0.66


def dial() -> str:
    """What a strength costs and brings, and where memory pressure puts the dial."""
    points = json.loads(FAMILY.read_text(encoding="utf-8"))["points"]
    known = [(point["strength"], point["certificate"]) for point in points]
    ratios = Curve([(0.0, 1.0), *((strength, row["ppl_ratio"]) for strength, row in known)])
    rates = Curve([(0.0, BASE_HIT_RATE), *((strength, row["lru@0.25"]) for strength, row in known)])
    profile = yaml.safe_load((ROOT / "profiles" / "orin-8gb.yaml").read_text(encoding="utf-8"))
    live = on_line(profile["strength"]["curve"], PRESSURE)

    canvas = Canvas(840, 412, "Perplexity ratio and hit rate over the strength of the dial")
    canvas.text(32, 40, "One dial: quality against expert reuse", style="title")
    canvas.text(32, 61, "The shipped model under its family of an adapter and a prior, on held-out text", style="soft")
    left = Axes(canvas, 84, 94, 672, 196, (0, 1), (0.98, 1.06))
    right = Axes(canvas, 84, 94, 672, 196, (0, 1), (0.5, 0.94))
    left.grid([0.98, 1.0, 1.02, 1.04, 1.06], "{:.2f}", fill=AMBER)
    right.grid([50, 61, 72, 83, 94], "{:.0f} %", right=True, fill=TEAL, scale=0.01)
    stand = left.at(live, 1)[0]
    canvas.line([(stand, 94), (stand, 334)], RED, 1.2, dash="3 4")
    for axes, curve, colour in ((left, ratios, AMBER), (right, rates, TEAL)):
        canvas.curve(curve.moved(axes.at), colour)
        for value in curve.points:
            canvas.dot(*axes.at(*value), 4, colour)
        canvas.dot(*axes.at(live, curve(live)), 6, RED)
    x, y = right.at(0.36, 0.86)
    canvas.text(x, y, "hit rate", style="strong", anchor="end", fill=TEAL)
    canvas.text(x, y + 17, "of a cache for 25 % of the experts", style="small", anchor="end")
    x, y = left.at(0.74, 0.994)
    canvas.text(x, y, "perplexity", style="strong", fill=AMBER)
    canvas.text(x, y + 17, "to the base model's", style="small")

    canvas.box(84, 330, 672, 8, fill=FAINT, radius=4)
    canvas.box(84, 330, stand - 84, 8, fill=RED, radius=4)
    canvas.dot(stand, 334, 10, RED)
    canvas.text(stand, 364, f"strength {live:.2f}", style="strong", anchor="middle", fill=RED)
    words = f"where a memory pressure of {100 * PRESSURE:.0f} % puts it"
    canvas.text(stand, 383, words, style="small", anchor="middle")
    for x, end, what, anchor in ((84, "0", "the base, bit for bit", "start"), (756, "1", "most reuse", "end")):
        canvas.text(x, 364, end, style="strong", anchor=anchor)
        canvas.text(x, 383, what, style="small", anchor=anchor)
    return canvas.done()


def token() -> str:
    """A token's way through one layer, and the slow loop that turns the dial between two tokens."""
    canvas = Canvas(840, 456, "A token's way through a layer, and the loop that turns the dial")
    canvas.box(16, 16, 808, 240, fill=WASH, radius=8)
    canvas.text(36, 46, "A token's way", style="title")
    clock(canvas, 804, 42, "in every layer of every token", TEAL)
    card(canvas, 36, 108, 92, 70, "hidden", "of one token")
    card(canvas, 172, 96, 166, 94, "router", "W + strength · Δ", "+ recency bonus", colour=TEAL, fill=TEAL_WASH)
    card(canvas, 382, 108, 92, 70, "ids", "top 6 of 64")
    card(canvas, 704, 108, 100, 70, "experts", "matmul")
    for begin, end in ((128, 170), (338, 380)):
        canvas.line([(begin, 143), (end, 143)], SOFT, 1.5, arrow=True)

    canvas.box(532, 66, 118, 78, fill=PAPER, stroke=TEAL)
    canvas.text(591, 87, "slots", style="strong", anchor="middle", fill=TEAL)
    for place in range(10):
        fill = TEAL if place in (1, 4, 7) else TEAL_WASH
        canvas.box(544 + 19 * (place % 5), 98 + 18 * (place // 5), 15, 14, fill=fill, stroke=TEAL, radius=2)
    card(canvas, 532, 180, 118, 58, "disk", "read one expert", colour=AMBER)
    canvas.line([(474, 136), (503, 136), (503, 105), (530, 105)], TEAL, 1.8, arrow=True)
    canvas.text(499, 97, "hit", style="strong", anchor="middle", fill=TEAL)
    canvas.line([(474, 150), (503, 150), (503, 209), (530, 209)], AMBER, 1.8, arrow=True)
    canvas.text(499, 228, "miss", style="strong", anchor="middle", fill=AMBER)
    canvas.line([(591, 180), (591, 146)], AMBER, 1.8, arrow=True)
    canvas.line([(650, 105), (676, 105), (676, 143), (702, 143)], TEAL, 1.8, arrow=True)

    canvas.box(16, 308, 808, 132, fill=WASH, radius=8)
    canvas.text(36, 338, "The dial's loop", style="title")
    clock(canvas, 702, 334, "five times a second, beside the decoding", RED)
    steps = (
        (704, 100, "sensors", "memory, stalls"),
        (532, 118, "pressure", "0 to 1"),
        (382, 92, "strength", "by profile"),
        (172, 166, "swap", "between two tokens"),
    )
    for x, width, name, what in steps:
        card(canvas, x, 362, width, 58, name, what, colour=RED, fill=RED_WASH if name == "swap" else PAPER)
    for (begin, *_), (x, width, *_) in pairwise(steps):
        canvas.line([(begin, 391), (x + width + 2, 391)], RED, 1.8, arrow=True)
    canvas.line([(255, 362), (255, 192)], RED, 1.8, arrow=True)
    canvas.text(268, 287, "router weights of another strength", style="small", fill=RED)
    canvas.line([(650, 209), (754, 209), (754, 360)], SOFT, 1.5, dash="4 4", arrow=True)
    canvas.text(744, 287, "time spent waiting", style="soft small", anchor="end")
    return canvas.done()


def squeeze() -> str:
    """Memory, strength, reads and time per token while another process takes memory, with the dial and without."""
    with SQUEEZE.open(newline="", encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: (row["arm"], float(row["time_s"])))
    arms = {arm: list(found) for arm, found in groupby(rows, key=lambda row: row["arm"])}
    colours = {"no_controller": GREY, "adaptive": TEAL}
    times = [float(row["time_s"]) for row in rows]
    held = [float(row["time_s"]) for row in rows if row["phase"] == "squeeze"]
    begin_s, end_s, last_s = math.floor(min(held)), math.ceil(max(held)), math.ceil(max(times))

    canvas = Canvas(840, 612, "One squeeze of memory, with the dial and without")
    canvas.text(32, 40, "One squeeze: another process takes memory, and gives it back", style="title")
    for left, words, colour in ((32, "with the dial", TEAL), (176, "the same expert cache without it", GREY)):
        canvas.line([(left, 58), (left + 22, 58)], colour, 3)
        canvas.text(left + 30, 62, words, style="strong", fill=SOFT if colour == GREY else colour)
    panels = (
        ("MiB of the expert cache, and free (dotted)", "budget_mib", 100, 80, (0.0, 330.0), (0, 100, 200, 300)),
        ("strength", "strength", 218, 70, (0.0, 1.0), (0, 0.5, 1)),
        ("experts read per token", "misses_per_token", 326, 80, (0.0, 20.0), (0, 10, 20)),
        ("ms per token", "ms_per_token", 444, 110, (0.0, 150.0), (0, 50, 100, 150)),
    )
    for name, key, top, height, limits, ticks in panels:
        axes = Axes(canvas, 72, top, 736, height, (0, last_s), limits)
        (x, _), (end, _) = axes.at(begin_s, 0), axes.at(end_s, 0)
        canvas.box(x, top, end - x, height, fill=RED_WASH, radius=0)
        axes.grid(ticks, "{:g}")
        for arm, colour in colours.items():
            values = [float(row[key]) for row in arms[arm]]
            shown = smooth(values) if key.endswith("per_token") else values
            line = zip((float(row["time_s"]) for row in arms[arm]), shown, strict=True)
            canvas.line([axes.at(at, min(value, limits[1])) for at, value in line], colour, 2.4)
        if key == "budget_mib":
            free = [axes.at(float(row["time_s"]), float(row["available_mib"])) for row in arms["adaptive"]]
            canvas.line(free, TEAL, 1.6, dash="1 4")
        canvas.text(72, top - 9, name, style="small strong")
    canvas.text(end - 8, 116, "squeezed", style="small strong", anchor="end", fill=RED)
    for second in range(0, last_s + 1, 5):
        canvas.text(axes.at(second, 0)[0], 574, f"{second}", style="soft small", anchor="middle")
    canvas.text(440, 594, "seconds", style="soft small", anchor="middle")
    return canvas.done()


def demo() -> str:
    """What `remoe demo` shows in a terminal of 122 columns, run now (two minutes)."""
    return recorded(["remoe", "demo", "--tokens", "200", "--max-new-tokens", "24"], columns=122)


def on_line(curve: list[list[float]], pressure: float) -> float:
    """Strength at a pressure, straight between a profile's points."""
    for (p0, s0), (p1, s1) in pairwise(curve):
        if p0 <= pressure <= p1:
            return s0 + (s1 - s0) * (pressure - p0) / (p1 - p0)
    return curve[-1][1]


def smooth(values: list[float], each_side: int = 2) -> list[float]:
    """Running medians: single slow tokens are the machine's."""
    return [median(values[max(0, at - each_side) : at + each_side + 1]) for at in range(len(values))]


def card(
    canvas: Canvas, x: float, y: float, width: float, height: float, name: str, *what: str,
    colour: str = INK, fill: str = PAPER,
) -> None:  # fmt: skip
    """A step in a box: its name, and below it what it does."""
    canvas.box(x, y, width, height, fill=fill, stroke=GREY if colour == INK else colour)
    top = y + height / 2 - 9 * len(what) + 4
    canvas.text(x + width / 2, top, name, style="strong", anchor="middle", fill=colour)
    for number, words in enumerate(what, start=1):
        canvas.text(x + width / 2, top + 18 * number, words, style="small", anchor="middle")


def clock(canvas: Canvas, right: float, y: float, words: str, colour: str) -> None:
    """How often a loop turns: words, and a clock behind them."""
    canvas.text(right - 24, y + 4, words, style="soft", anchor="end")
    canvas.dot(right - 9, y, 8, PAPER, colour)
    canvas.line([(right - 9, y - 5), (right - 9, y), (right - 5.5, y)], colour, 1.5)


PICTURES = {"dial": dial, "token": token, "squeeze": squeeze, "demo": demo}


def main(
    name: Annotated[str, typer.Argument(help=", ".join([*PICTURES, "or all"]))] = "all",
    folder: Annotated[Path, typer.Option(help="Where to write it.")] = HERE,
) -> None:
    """Write one picture, or all of them."""
    if name != "all" and name not in PICTURES:
        raise typer.BadParameter(f"{name!r}: give one of {', '.join(PICTURES)}, all")
    for each in PICTURES if name == "all" else [name]:
        path = folder / f"{each}.svg"
        path.write_text(PICTURES[each](), encoding="utf-8")
        typer.echo(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    typer.run(main)
