"""The page of a report: one HTML file without a script, a font or an image of anybody else. Every text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from remoe_adapt.evaluation.reporting.figures import SERIES, Drawing

# The page may load nothing and run nothing, whatever a family's file says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_ARMS = {"ours": "ours", "published": "published ReMoE", "prior": "best prior", "cecar": "CECAR's idea"}
_BUDGETS = (1.002, 1.005, 1.01, 1.02, 1.05)
_NONE = "–"

_STYLE = """
:root {{
  color-scheme: light dark;
  --ground: #f6f7f9; --card: #ffffff; --ink: #1a1d21; --faint: #59606a; --line: #d5d9df; --wash: #eef1f5; {light}
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --ground: #14161a; --card: #1e2126; --ink: #e8eaed; --faint: #a3abb6; --line: #363b43; --wash: #272b32; {dark}
  }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }}
header, main {{ max-width: 66rem; margin: 0 auto; padding: 1rem; }}
h1 {{ font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.05rem; margin: 0 0 .5rem; }}
p {{ margin: .35rem 0; }}
.faint, dt, figcaption {{ color: var(--faint); font-size: .875rem; }}
section {{
  background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; margin: 0 0 1rem;
}}
.cards {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); margin: 0 0 1rem; }}
.cards section {{ margin: 0; padding: .75rem 1rem; }}
.cards h2 {{ font-size: .875rem; font-weight: 600; color: var(--faint); margin: 0; }}
.value {{ font-size: 1.75rem; font-variant-numeric: tabular-nums; line-height: 1.3; }}
figure {{ margin: 0 0 1.25rem; }}
figure:last-child {{ margin-bottom: 0; }}
figure svg {{ display: block; width: 100%; height: auto; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }}
td {{ white-space: nowrap; }}
th {{ font-weight: 600; color: var(--faint); }}
tbody tr:last-child > * {{ border-bottom: 0; }}
th:first-child, td.words, th.words {{ text-align: left; }}
tbody th {{ color: var(--ink); white-space: nowrap; }}
td.words {{ white-space: normal; overflow-wrap: anywhere; min-width: 8rem; }}
td.best {{ background: var(--wash); font-weight: 600; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .25rem 0 0; }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
pre {{
  background: var(--wash); border-radius: .35rem; padding: .6rem .8rem; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; font: .875rem/1.5 ui-monospace, Menlo, Consolas, monospace; margin: .5rem 0;
}}
a {{ color: var(--series-0); }}
@media print {{
  :root {{
    color-scheme: light; --ground: #ffffff; --card: #ffffff; --ink: #000000; --faint: #444444; --line: #bbbbbb;
    --wash: #f1f1f1; {light}
  }}
  body {{ font-size: 11pt; }}
  section, figure, tr {{ break-inside: avoid; }}
  section {{ border: 0; padding: 0; }}
  table {{ font-size: 8pt; }}
  th, td {{ padding: .15rem .3rem; }}
  svg, td.best {{ print-color-adjust: exact; }}
}}
"""


def page_html(facts: Mapping[str, Any], drawings: Sequence[Drawing], files: Mapping[str, str]) -> str:
    """The page of `report_facts`; files: by a drawing's name the name of its PNG, which lies beside the page."""
    name = facts["family"].rstrip("/").rpartition("/")[2] or facts["family"]
    colours = {
        tone: " ".join(f"--series-{place}: {pair[tone_place]};" for place, pair in enumerate(SERIES))
        for tone_place, tone in enumerate(("light", "dark"))
    }
    parts = [
        "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(name)} – remoe report</title>",
        f"<style>{_STYLE.format(**colours)}</style>", "</head>", "<body>",
        f"<header><h1>{escape(name)}</h1>", f'<p class="faint">{_about(facts)}</p></header>', "<main>",
        _cards(facts), *_pictures(drawings, files, ("frontier", "arms"), "Misses against quality"), _budgets(facts),
        *_pictures(drawings, files, ("gain", "eor", "misses"), "Layer by layer"), _certificates(facts), _domains(facts),
        _again(facts), "</main>", "</body>", "</html>", "",
    ]  # fmt: skip
    return "\n".join(part for part in parts if part is not None)


def _about(facts: Mapping[str, Any]) -> str:
    base, points = facts["base"], facts["points"]
    kinds = {
        "router adapters": any(point["adapter"] is not None for point in points),
        "a recency prior": any(point["recency"] for point in points),
    }
    made = " and ".join(kind for kind, is_there in kinds.items() if is_there) or "nothing but the base"
    return (
        f"{len(points)} operating point(s) of {escape(base['id'])}, made of {made}. Strength 0 is the base, 1 the "
        f"strongest point. Routers {escape(base['fingerprint'][:19])}."
    )


def _cards(facts: Mapping[str, Any]) -> str:
    """The fewest misses within each budget, which is what a family is chosen by."""
    key = "misses_to_base" if facts["base"]["misses"] else "misses"
    cards = []
    for budget in _BUDGETS:
        inside = [
            point for point in facts["points"]
            if point["ppl_ratio"] is not None and point[key] is not None and point["ppl_ratio"] <= budget
        ]  # fmt: skip
        if inside:
            best = min(inside, key=lambda point: point[key])
            shown = f"{100 * (best[key] - 1):+.0f} %" if key == "misses_to_base" else f"{100 * best[key]:.1f} %"
            said = "misses" if key == "misses_to_base" else "of look-ups missed"
            cards.append(
                f'<section><h2>at a ratio ≤ {budget:g}</h2><div class="value">{shown.replace("-", "−")}</div>'
                f'<p class="faint">{said}, at strength {best["strength"]:g}</p></section>'
            )
    if not cards:
        return ""
    said = "Fewest misses of a cache for a quarter of the experts, by what may be lost (perplexity over the base's)"
    return f'<p class="faint">{said}:</p><div class="cards">{"".join(cards)}</div>'


def _pictures(drawings: Sequence[Drawing], files: Mapping[str, str], names: Iterable[str], title: str) -> Iterable[str]:
    chosen = [drawing for drawing in drawings if drawing.name in names]
    if chosen:
        yield f"<section><h2>{escape(title)}</h2>"
        for drawing in chosen:
            link = f'<a href="{escape(quote(files[drawing.name]))}">PNG</a>'
            yield (
                f'<figure role="img" aria-label="{escape(drawing.words)}">{drawing.svg}'
                f"<figcaption><b>{escape(drawing.title)}.</b> {escape(drawing.words)} {link}</figcaption></figure>"
            )
        yield "</section>"


def _budgets(facts: Mapping[str, Any]) -> str:
    rows = (facts["frontier"] or {}).get("budgets", [])
    if not rows:
        return ""
    arms = list(dict.fromkeys(name for row in rows for name in row if name != "ppl_ratio"))
    lines = []
    for row in rows:
        known = [row[arm] for arm in arms if row.get(arm) is not None]
        cells = [
            (f"{100 * row[arm]:.1f} %", "best" if row[arm] == min(known) else "") if row.get(arm) is not None else _NONE
            for arm in arms
        ]
        others = [row[arm] for arm in arms if arm != "ours" and row.get(arm) is not None]
        ours = row.get("ours")
        ratio = f"{ours / min(others):.2f}" if ours is not None and others and min(others) else _NONE
        lines.append([f"≤ {row['ppl_ratio']:g}", *cells, ratio])
    head = ["perplexity ratio", *(_ARMS.get(arm, arm) for arm in arms), "ours / best other"]
    return (
        "<section><h2>Misses at each quality budget, % of the base's</h2>"
        f"{_table(head, lines)}</section>"
    )  # fmt: skip


def _certificates(facts: Mapping[str, Any]) -> str:
    head = [
        "strength", "perplexity ratio", "to control", "KL, nats", "top-1 as base", "EOR", "misses", "to base", "prior",
    ]  # fmt: skip
    base, points = facts["base"], [*([facts["control"]] if facts["control"] else []), *facts["points"]]
    lines: list[list[Any]] = []
    if base["misses"] is not None:
        figures = (_percent(base["eor"]), _percent(base["misses"]), _percent(1.0))
        lines.append(["base", "1.0000", "", "0.0000", _percent(1.0), *figures, ("", "words")])
    lines += [
        [
            _named(point), _figure(point["ppl_ratio"], ".4f"), _figure(point["ppl_ratio_control"], ".4f"),
            _figure(point["kl"], ".4f"), _percent(point["top1_agreement"]), _percent(point["eor"]),
            _percent(point["misses"]), _percent(point["misses_to_base"]), (_prior(point["recency"]), "words"),
        ]
        for point in points
    ]  # fmt: skip
    # Most often all points were measured together, and it is said once.
    together: dict[str, list[str]] = {}
    for point in points:
        together.setdefault(_source(point), []).append(_named(point))
    sources = "".join(
        f"<p>{escape(', '.join(names) if len(together) > 1 else 'All rows')}: {escape(source)}.</p>"
        for source, names in together.items()
    )
    return (
        f'<section><h2>Certificates</h2>{_table(head, lines, words=(8,))}<div class="faint">{sources}'
        "<p>KL: mean of KL(base ‖ point) of the next-token distributions. Top-1: share of tokens for which the point "
        "holds the same token for the likeliest as the base. EOR: share of a token's experts that the token before "
        "used too. Misses: share of expert look-ups not found in an LRU cache for 25 % of a layer's experts. Control: "
        "the routers trained by next-token loss alone.</p></div></section>"
    )


def _named(point: Mapping[str, Any]) -> str:
    return "control" if point["strength"] is None else f"{point['strength']:g}"


def _domains(facts: Mapping[str, Any]) -> str:
    lines = [
        [
            name, f"{point['strength']:g}", _figure(row["ppl_ratio"], ".4f"), _figure(row["kl"], ".4f"),
            _percent(row["top1_agreement"]), _figure(row["tokens"], ".0f"),
        ]
        for name in dict.fromkeys(name for point in facts["points"] for name in point["domains"])
        for point in facts["points"]
        for row in [point["domains"].get(name)]
        if row is not None
    ]  # fmt: skip
    if not lines:
        return ""
    head = ["kind of text", "strength", "perplexity ratio", "KL, nats", "top-1 as base", "tokens"]
    return (
        "<section><h2>By kind of text, decoded token by token</h2>"
        f"{_table(head, [[name, *rest] for name, *rest in lines])}</section>"
    )


def _again(facts: Mapping[str, Any]) -> str:
    rows = {"family": facts["family"], "base": facts["base"]["id"], "fingerprint": facts["base"]["fingerprint"]}
    rows |= facts["environment"]
    listed = "".join(f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in rows.items())
    command = f"<pre>{escape(facts['command'])}</pre>" if facts["command"] else ""
    return f"<section><h2>Make it again</h2>{command}<dl>{listed}</dl></section>"


def _table(head: Sequence[str], lines: Iterable[Sequence[Any]], words: Iterable[int] = ()) -> str:
    """A cell is a text, or (text, class). words: columns of text."""
    left = set(words)
    heads = "".join(
        f'<th scope="col"{" class=words" if place in left else ""}>{escape(each)}</th>'
        for place, each in enumerate(head)
    )
    body = []
    for first, *rest in lines:
        cells = []
        for cell in rest:
            text, kind = cell if isinstance(cell, tuple) else (cell, "")
            cells.append(f"<td{f' class={kind}' if kind else ''}>{escape(text)}</td>")
        body.append(f'<tr><th scope="row">{escape(first)}</th>{"".join(cells)}</tr>')
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _prior(recency: Mapping[str, Any] | None) -> str:
    if recency is None:
        return "none"
    gains = recency["gain_per_layer"]
    low, high = min(gains, default=0.0), max(gains, default=0.0)
    gain = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
    share = f", share {recency['share']:g}" if recency["share"] else ""
    decay = f", decay {recency['decay']:g}" if recency["decay"] else ""
    return f"{recency['mode']}, gain {gain}{decay}{share}"


def _source(point: Mapping[str, Any]) -> str:
    """Where its figures are from, in words."""
    if point["source"] is None:
        return "not measured"
    text = f" on {_figure(point['tokens'], '.0f')} tokens of {', '.join(point['data']) or 'unknown text'}"
    made = [
        f"version {point['version']}" if point["version"] else "",
        f"commit {point['commit']}" if point["commit"] else "",
    ]
    return ", ".join(part for part in (point["source"] + text, *made) if part)


def _figure(value: float | None, form: str) -> str:
    return _NONE if value is None else format(value, form)


def _percent(value: float | None) -> str:
    return _NONE if value is None else f"{100 * value:.1f} %"
