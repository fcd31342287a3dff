"""HTML of the report: elements, sortable tables with bars, and a document that needs no other file."""

import html
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# Light and dark come from the reader's system. Bars and heat are pale enough for text to stay readable on them.
STYLE = """
:root { color-scheme: light dark; --page: #fbfbf9; --card: #fff; --ink: #1c1f23; --soft: #5b6168; --line: #dcdcd6;
  --bar: #bcd8ee; --second: #f5d3a8; --heat: 30, 110, 190; --link: #0b5ea8; --good: #00694a; --bad: #a8330a;
  --warn: #fff1dc; }
@media (prefers-color-scheme: dark) { :root { --page: #15181b; --card: #1d2125; --ink: #e6e8ea; --soft: #a3abb3;
  --line: #363c42; --bar: #22506f; --second: #6a4a1c; --heat: 70, 150, 230; --link: #7cbcf5; --good: #5fd0a6;
  --bad: #ff9a70; --warn: #3c2e15; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0 auto; padding: 0 1rem 4rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 1.6rem 0 .2rem; } h2 { font-size: 1.5rem; margin: 0; }
h3 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; } h4 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
a { color: var(--link); } :focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
p { max-width: 48rem; } .soft { color: var(--soft); font-size: .88rem; margin: .2rem 0; overflow-wrap: anywhere; }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; list-style: none; }
section.set { border-top: 2px solid var(--line); margin-top: 3rem; padding-top: 1.5rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 1rem; margin: 1rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem 1.1rem; }
.cards .card:only-child { max-width: 30rem; }
.big { font-size: 2.3rem; font-weight: 650; line-height: 1.2; font-variant-numeric: tabular-nums; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .6rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; margin: .8rem 0; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
caption { text-align: left; padding: .6rem .8rem; color: var(--soft); font-size: .88rem; }
th, td { padding: .32rem .7rem; text-align: right; border-top: 1px solid var(--line); white-space: nowrap; }
th:first-child, .word { text-align: left; } tbody th { font-weight: 500; }
thead th { font-weight: 600; vertical-align: bottom; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 3px solid var(--link); }
th button::after { content: " \\2195"; color: var(--soft); }
th[aria-sort=ascending] button::after { content: " \\2191"; color: inherit; }
th[aria-sort=descending] button::after { content: " \\2193"; color: inherit; }
td.bar { min-width: 7.5rem; background: no-repeat 0 50% / 100% 72%
  linear-gradient(90deg, var(--bar) calc(100% * var(--v)), transparent 0); }
td.bar.second { background-image: linear-gradient(90deg, var(--second) calc(100% * var(--v)), transparent 0); }
td.up { color: var(--good); } td.down { color: var(--bad); } tr.whole { font-weight: 650; }
table.heat { width: auto; } table.heat td { padding: .3rem .45rem; background: rgba(var(--heat), calc(.75 * var(--v)));
  text-align: center; min-width: 2.7rem; }
table.heat td.hit { outline: 2px solid var(--ink); outline-offset: -2px; }
table.heat.many thead th:not(:first-child) { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; }
.swatch { display: inline-block; width: .85em; height: .85em; border-radius: .2em; margin-right: .5em;
  border: 1px solid var(--soft); vertical-align: -.08em; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; padding: 0; list-style: none; font-size: .9rem; }
.frame { margin: 1rem 0; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(15rem, 46%), 1fr)); gap: .6rem;
  margin-top: .5rem; }
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(10rem, 46%), 1fr)); gap: .6rem; }
figure { margin: 0; } figure img { width: 100%; height: auto; display: block; border-radius: .3rem; }
figcaption { font-size: .85rem; color: var(--soft); }
svg { width: 100%; max-width: 40rem; height: auto; display: block; } svg rect { fill: var(--heat-bar, #4a90c8); }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; } svg line { stroke: var(--line); }
.warning { background: var(--warn); border-left: .35rem solid var(--bad); padding: .6rem .9rem; margin: .5rem 0;
  border-radius: .3rem; overflow-wrap: anywhere; }
summary { cursor: pointer; } details { margin: .8rem 0; }
@media (max-width: 40rem) { body { padding: 0 .7rem 3rem; } details dl { grid-template-columns: 1fr; }
  details dd { margin-bottom: .4rem; } }
@media print { .scroll { overflow: visible; } }
"""

# A click on a column's title sorts by it, a second one the other way round; empty values stay at the end.
SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0];
  const place = [...head.parentNode.children].indexOf(head);
  const numbers = head.dataset.kind === "number";
  const first = numbers ? "descending" : "ascending", second = numbers ? "ascending" : "descending";
  const order = head.getAttribute("aria-sort") === first ? second : first;
  for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order);
  const value = row => row.children[place].dataset.v;
  const compare = numbers ? (a, b) => a - b : (a, b) => a.localeCompare(b, undefined, {numeric: true});
  const rows = [...body.rows].filter(row => !row.classList.contains("whole"));
  const full = rows.filter(row => value(row) !== ""), empty = rows.filter(row => value(row) === "");
  full.sort((a, b) => compare(value(a), value(b)) * (order === "ascending" ? 1 : -1));
  const whole = [...body.rows].filter(row => row.classList.contains("whole"));
  body.append(...full, ...empty, ...whole);
});
"""

# Nothing is ever loaded: the page is whole in itself, and says so to the browser.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


class Cell(NamedTuple):
    """A table cell: its HTML, what it is sorted by (None: at the end), classes and inline style."""

    content: str
    value: float | str | None
    kind: str = ""
    style: str = ""


def element(tag: str, *content: str, **attributes: str) -> str:
    """<tag attribute="...">content</tag>; content is HTML. `class_` is the attribute class, data_v data-v."""
    return f"<{tag}{_attributes(attributes)}>{''.join(content)}</{tag}>"


def picture(uri: str, description: str, caption: str) -> str:
    """A figure; `description` is read out where the picture cannot be seen."""
    shown = f"<img{_attributes({'src': uri, 'alt': description, 'decoding': 'async'})}>"
    return element("figure", shown, element("figcaption", escape(caption)))


def escape(text: str) -> str:
    """Text as HTML."""
    return html.escape(text)


def word(text: str, prefix: str = "") -> Cell:
    """A cell of text, after some HTML."""
    return Cell(prefix + escape(text), text, "word")


def number(value: float, text: str | None = None, kind: str = "") -> Cell:
    """A cell of a number, shown as `text`; NaN has no value."""
    missing = value != value
    return Cell(escape("N/A" if missing else text or f"{value:,}"), None if missing else value, kind)


def bar(share: float | None, kind: str = "") -> Cell:
    """A cell of a percentage behind a bar; None has no value."""
    if share is None or share != share:
        return Cell("N/A", None, f"{kind}")
    return Cell(f"{100 * share:.2f}", share, f"bar {kind}".strip(), f"--v:{share:.4f}")


def sortable(caption: str, titles: Sequence[str], rows: Iterable[Sequence[Cell]], whole: bool = False) -> str:
    """A table that a click on a title sorts; its first column names the rows. whole: the last row sums the others."""
    rows = list(rows)
    heads = []
    for place, title in enumerate(titles):
        numeric = all(isinstance(row[place].value, int | float | None) for row in rows)
        button = element("button", escape(title), type="button")
        kind = "number" if numeric else "text"
        heads.append(element("th", button, scope="col", data_kind=kind, class_="" if numeric else "word"))
    lines = [_row(row, "whole" if whole and place == len(rows) - 1 else "") for place, row in enumerate(rows)]
    content = [element("caption", escape(caption)), element("thead", element("tr", *heads)), element("tbody", *lines)]
    return scrolling(element("table", *content, class_="sortable"), caption)


def scrolling(table: str, name: str) -> str:
    """A table that is moved sideways where the screen is narrow, by keys, too."""
    return element("div", table, class_="scroll", tabindex="0", role="region", aria_label=name)


def document(title: str, body: str) -> str:
    """The page."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    script = f"<script>{SCRIPT}</script>"
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{body}{script}</body></html>\n'


def _row(cells: Sequence[Cell], kind: str) -> str:
    values = ["" if cell.value is None else str(cell.value) for cell in cells]
    found = [element("th", cells[0].content, scope="row", data_v=values[0])]
    for cell, value in zip(cells[1:], values[1:], strict=True):
        found.append(element("td", cell.content, class_=cell.kind, style=cell.style, data_v=value))
    return element("tr", *found, class_=kind)


def _attributes(attributes: dict[str, str]) -> str:
    """Those that are not empty, but for data_v and alt, of which empty is a value."""
    found = ((name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items())
    return "".join(f' {name}="{html.escape(value)}"' for name, value in found if value or name in ("data-v", "alt"))
