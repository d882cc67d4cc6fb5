"""A small SVG canvas: opaque, so that it reads in light and dark pages; text stays text in the reader's own fonts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise

Point = tuple[float, float]

INK, SOFT, FAINT, PAPER = "#1f2933", "#66727f", "#d9dee4", "#ffffff"
TEAL, AMBER, RED, GREY = "#0f8b8d", "#d9822b", "#d64545", "#9aa5b1"
TEAL_WASH, RED_WASH, WASH = "#e3f3f3", "#fdecec", "#f4f6f8"

_STYLE = """\
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; font-size: 13px; \
fill: #1f2933 }
.soft { fill: #66727f } .small { font-size: 11.5px } .strong { font-weight: 600 } .title { font-size: 16px; \
font-weight: 600 }
.mono { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 12.5px }"""


class Curve:
    """Through all points, without a bump between two of them (Fritsch and Carlson 1980)."""

    def __init__(self, points: Sequence[Point]) -> None:
        self.points = list(points)
        rises = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(points)]
        inner = [2 * a * b / (a + b) if a * b > 0 else 0.0 for a, b in pairwise(rises)]
        self.slopes = [rises[0], *inner, rises[-1]]

    def moved(self, place: Callable[[float, float], Point]) -> Curve:
        """The same curve in other units, of which each is one of ours times something."""
        return Curve([place(*point) for point in self.points])

    def __call__(self, x: float) -> float:
        """Its height at a place between the first and the last point."""
        at = max(n for n, point in enumerate(self.points[:-1]) if point[0] <= x)
        (x0, y0), (x1, y1) = self.points[at : at + 2]
        width, t = x1 - x0, (x - x0) / (x1 - x0)
        s0, s1 = self.slopes[at] * width, self.slopes[at + 1] * width
        return y0 + t * s0 + t * t * (3 * (y1 - y0) - 2 * s0 - s1) + t**3 * (s0 + s1 - 2 * (y1 - y0))


class Canvas:
    """Shapes in the order in which they are drawn."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" width="{width}">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style>",
        ]
        self.box(0.5, 0.5, width - 1, height - 1, fill=PAPER, stroke=FAINT, radius=10)

    def text(self, x: float, y: float, words: str, *, style: str = "", anchor: str = "start", fill: str = "") -> None:
        """A line of text on the baseline `y`. style: classes, as "soft small"; anchor: start, middle or end."""
        colour = f' style="fill:{fill}"' if fill else ""
        self._parts.append(
            f'<text x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}" class="{style}"{colour}>{escape(words)}</text>'
        )

    def box(
        self, x: float, y: float, width: float, height: float, *, fill: str, stroke: str = "none", radius: float = 6
    ) -> None:
        """A rectangle with round corners."""
        self._parts.append(
            f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" rx="{_n(radius)}" '
            f'fill="{fill}" stroke="{stroke}"/>'
        )

    def dot(self, x: float, y: float, radius: float, fill: str, stroke: str = PAPER) -> None:
        """A disc with a thin rim."""
        self._parts.append(
            f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}" fill="{fill}" stroke="{stroke}" stroke-width="2"/>'
        )

    def line(
        self, points: Sequence[Point], colour: str = INK, width: float = 1.5, *, dash: str = "", arrow: bool = False
    ) -> None:
        """Straight pieces; arrow: a head at the last point."""
        if arrow:
            points = self._headed(points, colour)
        self.path("M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in points), colour, width, dash=dash)

    def curve(self, curve: Curve, colour: str, width: float = 2.5) -> None:
        """A curve whose points are places on the canvas."""
        pieces = [f"M{_n(curve.points[0][0])} {_n(curve.points[0][1])}"]
        for (a, b), (s, t) in zip(pairwise(curve.points), pairwise(curve.slopes), strict=True):
            third = (b[0] - a[0]) / 3
            ends = (a[0] + third, a[1] + third * s, b[0] - third, b[1] - third * t, *b)
            pieces.append("C" + " ".join(map(_n, ends)))
        self.path("".join(pieces), colour, width)

    def path(self, pieces: str, colour: str, width: float, *, fill: str = "none", dash: str = "") -> None:
        """SVG's own path language."""
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self._parts.append(
            f'<path d="{pieces}" fill="{fill}" stroke="{colour}" stroke-width="{_n(width)}" stroke-linejoin="round" '
            f'stroke-linecap="round"{dashes}/>'
        )

    def _headed(self, points: Sequence[Point], colour: str) -> list[Point]:
        """The same points, the last one drawn back under a triangle."""
        (x0, y0), (x, y) = points[-2:]
        length = ((x - x0) ** 2 + (y - y0) ** 2) ** 0.5
        dx, dy = (x - x0) / length, (y - y0) / length
        left, right = (x - 8 * dx - 4 * dy, y - 8 * dy + 4 * dx), (x - 8 * dx + 4 * dy, y - 8 * dy - 4 * dx)
        corners = "L".join(f"{_n(a)} {_n(b)}" for a, b in ((x, y), left, right))
        self.path(f"M{corners}Z", colour, 0.5, fill=colour)
        return [*points[:-1], (x - 6 * dx, y - 6 * dy)]

    def done(self) -> str:
        """The whole file."""
        return "\n".join([*self._parts, "</svg>\n"])


class Axes:
    """A rectangle of a canvas with its own units. x and y: (first, last) value on each axis."""

    def __init__(
        self, canvas: Canvas, left: float, top: float, width: float, height: float, x: Point, y: Point
    ) -> None:
        self.canvas, self.left, self.top, self.width, self.height = canvas, left, top, width, height
        self._x, self._y = x, y

    def at(self, x: float, y: float) -> Point:
        """Where a value is on the canvas."""
        (x0, x1), (y0, y1) = self._x, self._y
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return self.left + across * self.width, self.top + (1 - up) * self.height

    def grid(
        self, ticks: Sequence[float], form: str, *, right: bool = False, fill: str = "", scale: float = 1.0
    ) -> None:
        """Values on the y axis, with faint lines across, or on the right of such an axis, without. scale: of a tick."""
        for tick in ticks:
            _, y = self.at(self._x[0], tick * scale)
            if not right:
                self.canvas.line([(self.left, y), (self.left + self.width, y)], FAINT, 1)
            x, anchor = (self.left + self.width + 10, "start") if right else (self.left - 10, "end")
            self.canvas.text(x, y + 4, form.format(tick), style="soft small", anchor=anchor, fill=fill)


def _n(value: float) -> str:
    """A number in a tenth of a pixel, and the same text everywhere."""
    return f"{round(value, 1) + 0.0:g}"
