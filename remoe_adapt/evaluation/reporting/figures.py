"""The drawings of a report, by matplotlib (extra: plot): each as a PNG on white, and as an SVG in the page's colours.

In an SVG every colour of text, lines and curves is a variable of the page's style, so one drawing reads on light and
dark grounds and on paper. Text is drawn as outlines: it looks alike everywhere, and a label can never become markup.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from remoe_adapt._support import blank_figure, check_extra

# Okabe and Ito's colours, which people tell apart whatever their eyes take for red and green; (light, dark) grounds.
SERIES = (
    ("#0072b2", "#6cb8f0"), ("#c44e00", "#ff9d5c"), ("#007a5a", "#4ed6a8"), ("#a8518a", "#e5a3c8"),
    ("#806600", "#e6d452"), ("#2b7f9e", "#9ad5ee"), ("#59606a", "#a3abb6"),
)  # fmt: skip
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
# Of sequential maps the one that is even in lightness to every eye, and reads in grey.
_MAP = "cividis"
_MOST_WRITTEN = 140
_FAMILY = "this family"
_ARMS = {
    "ours": "ours",
    "published": "published ReMoE",
    "prior": "best training-free prior",
    "cecar": "CECAR's idea",
    "native": "eviction alone",
    "belady": "Belady: knows the future",
}


@dataclass(frozen=True)
class Drawing:
    """One picture: `name` is part of its file's name; `words` say in text what it shows."""

    name: str
    title: str
    words: str
    png: bytes
    svg: str


@dataclass(frozen=True)
class _Colours:
    ink: str
    faint: str
    line: str
    ground: str
    series: tuple[str, ...]


_ON_WHITE = _Colours("#1a1d21", "#59606a", "#d5d9df", "#ffffff", tuple(light for light, _ in SERIES))
# Colours that nothing else has: each is replaced by a variable of the style.
_NAMED = _Colours(
    "#010201", "#010202", "#010203", "#010204", tuple(f"#0103{place:02x}" for place in range(len(SERIES)))
)
_VARIABLES = dict(
    zip((_NAMED.ink, _NAMED.faint, _NAMED.line, _NAMED.ground), ("ink", "faint", "line", "card"), strict=True)
)
_VARIABLES |= {colour: f"series-{place}" for place, colour in enumerate(_NAMED.series)}

_Draw = Callable[[_Colours], Any]


def drawings(facts: Mapping[str, Any]) -> list[Drawing]:
    """The frontier, and heat maps of gain, EOR and misses by layer, of `report_facts`; those of which nothing is known
    are left out.

    Raises MissingDependencyError without matplotlib.
    """
    check_extra("matplotlib", "plot", "a report needs matplotlib")
    return list(_drawings(facts))


def _drawings(facts: Mapping[str, Any]) -> Iterator[Drawing]:
    curves = _family_curve(facts)
    arms = (facts["frontier"] or {}).get("curves", {})
    if facts["base"]["misses"] or not arms:
        curves |= {name: points for name, points in arms.items() if points}
    elif arms:
        # The arms' misses are relative to the base's, and of this family's base they are not known.
        yield from _drawn(
            "arms", "Frontier of all arms", {name: points for name, points in arms.items() if points}, facts
        )
    if any(curves.values()):
        yield from _drawn("frontier", "Frontier" if len(curves) > 1 else "This family", curves, facts)
    base, points = facts["base"], facts["points"]
    labels = [f"{point['strength']:g}" for point in points]
    if any(point["recency"] and any(point["recency"]["gain_per_layer"]) for point in points):
        gains = [point["recency"]["gain_per_layer"] if point["recency"] else None for point in points]
        yield from _heat("gain", "Gain of the recency prior", "gain", labels, gains, None)
    for key, title, unit in (
        ("eor", "Expert overlap ratio (EOR)", "EOR, %"),
        ("misses", "Expert look-ups missed", "misses, %"),
    ):
        rows = [each["layers"][key] if each["layers"] else None for each in (base, *points)]
        if any(rows):
            yield from _heat(key, title, unit, ["base", *labels], rows, 100.0)


def _family_curve(facts: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The family's own points, from the base on where its misses are known: {"this family": [...]}."""
    key = "misses_to_base" if facts["base"]["misses"] else "misses"
    points = [
        {"ppl_ratio": point["ppl_ratio"], "misses": point[key], "label": f"{point['strength']:g}"}
        for point in facts["points"]
        if point["ppl_ratio"] is not None and point[key] is not None
    ]
    if points and facts["base"]["misses"]:
        points.insert(0, {"ppl_ratio": 1.0, "misses": 1.0, "label": "base"})
    return {_FAMILY: points} if points else {}


def _drawn(
    name: str, title: str, curves: Mapping[str, Sequence[Mapping[str, Any]]], facts: Mapping[str, Any]
) -> Iterator[Drawing]:
    relative = name == "arms" or bool(facts["base"]["misses"])
    budgets = [row["ppl_ratio"] for row in (facts["frontier"] or {}).get("budgets", ())] if relative else []
    own = [point["ppl_ratio"] for point in curves.get(_FAMILY, next(iter(curves.values())))]
    most = max(1.06, *own, *budgets) + 0.004
    least = min(1.0, *(point["ppl_ratio"] for points in curves.values() for point in points))
    hidden = sum(point["ppl_ratio"] > most for points in curves.values() for point in points)

    def draw(colours: _Colours) -> Any:
        figure, axes = _axes(8.4, 5.2 if len(curves) > 1 else 3.8, colours)
        if budgets:
            axes.grid(visible=False, axis="x")
        for budget in budgets:
            axes.axvline(budget, color=colours.faint, linewidth=0.9, linestyle=_DASHES[2], alpha=0.7, zorder=0)
        for place, (arm, points) in enumerate(curves.items()):
            # Where colours begin again, markers and dashes do not.
            turn = place // len(SERIES)
            colour, marker = colours.series[place % len(SERIES)], _MARKERS[(place + turn) % len(_MARKERS)]
            # The family is a dial, whose points follow one another; of other arms one would take the best ones.
            line = points if arm == _FAMILY else _front(points)
            # All points are there, faint where another one beats them; the line is through the others.
            axes.plot(
                [each["ppl_ratio"] for each in points], [100 * each["misses"] for each in points], linestyle="none",
                marker=marker, markersize=4, color=colour, alpha=0.35, markeredgewidth=0,
            )  # fmt: skip
            axes.plot(
                [each["ppl_ratio"] for each in line], [100 * each["misses"] for each in line], color=colour,
                marker=marker, markersize=6.5, linewidth=2.6 if place == 0 else 1.6, label=_ARMS.get(arm, arm),
                linestyle=_DASHES[turn % len(_DASHES)], zorder=3 if place == 0 else 2,
                markeredgecolor=colours.ground, markeredgewidth=0.8,
            )  # fmt: skip
        for point in curves.get(_FAMILY, ()):
            if point["ppl_ratio"] <= most:
                # The base's to its left: to its right are the tightest budgets.
                at, side = ((-6, 4), "right") if point["label"] == "base" else ((6, 6), "left")
                place_xy = point["ppl_ratio"], 100 * point["misses"]
                axes.annotate(
                    point["label"], place_xy, at, textcoords="offset points", ha=side, color=colours.faint, fontsize=9
                )
        axes.set_xlim(least - 0.004, most)
        # Room above for the labels of the topmost points.
        axes.set_ylim(0, 107 * max(each["misses"] for points in curves.values() for each in points) + 1)
        axes.set_xlabel("perplexity, relative to the base's" + (" (dotted: budgets)" if budgets else ""))
        axes.set_ylabel("misses, % of the base's" if relative else "expert look-ups missed, %")
        if len(curves) > 1:
            figure.legend(frameon=False, labelcolor=colours.ink, fontsize=9, loc="outside upper left", ncols=3)
        return figure

    compared = ", relative to those of the base," if relative else ""
    words = (
        f"Misses of an LRU cache for 25 % of each layer's experts{compared} against perplexity relative to the base's: "
        f"lower and further left is better. Curves: {', '.join(_ARMS.get(arm, arm) for arm in curves)}."
    )
    if hidden:
        words += f" {hidden} point(s) beyond a ratio of {most:.3g} are not shown."
    yield _both(name, title, words, draw)


def _front(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those that no other one beats in both, by rising ratio."""
    found: list[Mapping[str, Any]] = []
    for point in sorted(points, key=lambda each: (each["ppl_ratio"], each["misses"])):
        if not found or point["misses"] < found[-1]["misses"]:
            found.append(point)
    return found


def _heat(
    name: str,
    title: str,
    unit: str,
    labels: Sequence[str],
    rows: Sequence[Sequence[float] | None],
    scale: float | None,
) -> Iterator[Drawing]:
    """A row a point, a column a layer; a row of which nothing is known stays empty."""
    layers = max(len(row) for row in rows if row)
    cells = [
        [(scale or 1.0) * row[layer] if row and layer < len(row) else float("nan") for layer in range(layers)]
        for row in rows
    ]

    def draw(colours: _Colours) -> Any:
        from matplotlib import colormaps

        figure, axes = _axes(8.4, 1.2 + 0.34 * len(rows), colours)
        known = [value for row in cells for value in row if value == value]
        low, high = (0.0 if scale is None else min(known)), max(known)
        mesh = axes.pcolormesh(cells, cmap=_MAP, vmin=low, vmax=high if high > low else low + 1, edgecolors="face")
        axes.set_yticks([place + 0.5 for place in range(len(labels))], labels)
        step = max(1, -(-layers // 16))
        axes.set_xticks([place + 0.5 for place in range(0, layers, step)], [str(n) for n in range(0, layers, step)])
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xlabel("layer with experts")
        axes.set_ylabel("strength")
        bar = figure.colorbar(mesh, ax=axes, pad=0.015, aspect=max(6, 4 * len(rows)))
        bar.set_label(unit, color=colours.ink)
        bar.ax.tick_params(colors=colours.faint, length=0)
        bar.outline.set_visible(False)
        if layers * len(rows) <= _MOST_WRITTEN and layers <= 16:
            for place, row in enumerate(cells):
                for layer, value in enumerate(row):
                    if value == value:
                        share = (value - low) / (high - low) if high > low else 0.0
                        red, green, blue, _ = colormaps[_MAP](share)
                        # Rec. 709 luminance: dark words on light cells.
                        on = "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45 else "#ffffff"
                        text = f"{value:.3g}" if scale is None else f"{value:.0f}"
                        axes.text(layer + 0.5, place + 0.5, text, ha="center", va="center", color=on, fontsize=8.5)
        return figure

    words = f"A row a strength, a column a layer with experts, in the model's order; {unit.replace(', ', ' in ')}."
    yield _both(name, title, words, draw)


def _axes(width: float, height: float, colours: _Colours) -> tuple[Any, Any]:
    figure = blank_figure(width, height)
    figure.set_facecolor(colours.ground)
    axes = figure.subplots()
    axes.set_facecolor(colours.ground)
    for side, spine in axes.spines.items():
        spine.set_color(colours.line)
        spine.set_visible(side in ("left", "bottom"))
    axes.tick_params(colors=colours.faint, labelsize=9)
    axes.xaxis.label.set_color(colours.ink)
    axes.yaxis.label.set_color(colours.ink)
    axes.grid(visible=True, color=colours.line, linewidth=0.6, alpha=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _both(name: str, title: str, words: str, draw: _Draw) -> Drawing:
    with _settled():
        white, named = io.BytesIO(), io.StringIO()
        draw(_ON_WHITE).savefig(white, format="png", dpi=160)
        draw(_NAMED).savefig(named, format="svg", metadata={"Date": None, "Creator": None})
    return Drawing(name, title, words, white.getvalue(), _themed(named.getvalue(), name))


@contextmanager
def _settled() -> Iterator[None]:
    """No label is read as a formula, ids are the same each time, and a letter without a glyph is a box."""
    import matplotlib

    settings: Any = {"text.parse_math": False, "svg.fonttype": "path", "svg.hashsalt": "remoe"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        yield


def _themed(svg: str, name: str) -> str:
    """The `<svg>` element with variables for colours, ids of its own, and nothing that names another host."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = svg.replace("xlink:href", "href")
    # Several drawings stand in one page, where an id may stand once.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return re.sub("#010[0-9a-f]{3}", lambda found: f"var(--{_VARIABLES[found[0]]})", svg)
