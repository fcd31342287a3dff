"""One table over runs, sets and seeds, with intervals, baselines and published figures: `tqdm-seg table`."""

import sys

from ..commands import start

if __name__ == "__main__":
    sys.exit(start("table"))


import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..data.files import check_out_file, write_json
from ..data.scenes import clusters_text
from ..evaluation.class_sets import members, over_text
from ..evaluation.counts import FrameTable
from ..evaluation.figures import protocol_text, table_line
from ..evaluation.groups import read_text
from ..evaluation.statistics import (
    Estimate,
    Runs,
    class_estimates,
    difference,
    miou_estimate,
    rare_classes,
)
from ..program import takes
from .options import TableOptions
from .runs import Method, read_methods, read_notes

_COLUMNS = ("method", "backbone", "trained_on", "tested_on", "miou", "test_protocol", "source")
_MARK = {"markdown": "†", "latex": r"$^\dagger$"}
_TITLE = "mIoU in percent, mean over the seeds [95 % interval over scenes and seeds]"


# -- figures ------------------------------------------------------------------------------------------------


def make_table(methods: Sequence[Method], min_scenes: int, resamples: int, seed: int) -> dict[str, Any]:
    """All figures of the methods, ready for JSON; an estimate is [value, low, high] as shares, ends None without one.

    Differences are to the first method, and to every baseline. Raises ValueError for methods that were scored on other
    frames or ground truth under one name of a set.
    """
    sets = dict.fromkeys(name for method in methods for name in method.tables)
    over = {name: _over(_tables(methods, name)[0], min_scenes) for name in sets}
    runs = {
        (method.name, name): Runs.of(tables, over[name]) for method in methods for name, tables in method.tables.items()
    }
    for name in sets:
        check_same_frames(methods, name)
    rows = []
    for method in methods:
        cells = {}
        for name, tables in method.tables.items():
            own = runs[method.name, name]
            cells[name] = {
                "miou": miou_estimate(own, resamples, seed),
                "miou_classes": int((own.iou()[:, own.over] >= 0).any(0).sum()),
                "iou": dict(zip(tables[0].classes, class_estimates(own, resamples, seed), strict=True)),
                "difference": {
                    other.name: difference(runs[other.name, name], own, resamples, seed)
                    for other in methods
                    if other is not method
                    and name in other.tables
                    and (other is methods[0] or other.kind == "baseline")
                    and len({len(tables), len(other.tables[name])} - {1}) < 2
                },
            }
        seeds = max(map(len, method.tables.values()))
        rows.append({"name": method.name, "kind": method.kind, "seeds": seeds, "sets": cells})
    facts = {name: _set_facts(_tables(methods, name), over[name], min_scenes) for name in sets}
    return {"sets": facts, "rows": rows, "bootstrap": {"resamples": resamples, "seed": seed}}


def _tables(methods: Sequence[Method], name: str) -> list[FrameTable]:
    """The tables of a set, one per method that has it."""
    return [method.tables[name][0] for method in methods if name in method.tables]


def _over(table: FrameTable, min_scenes: int) -> list[int]:
    """Numbers of the classes that a set's means are over."""
    rare = rare_classes(table, min_scenes)
    chosen = [number for number in members(table.class_set, table.classes) if table.classes[number] not in rare]
    return chosen or members(table.class_set, table.classes)


def _set_facts(tables: Sequence[FrameTable], over: Sequence[int], min_scenes: int) -> dict[str, Any]:
    table = tables[0]
    protocols = list(dict.fromkeys(protocol_text(t.protocol) for t in tables if t.protocol))
    left_out = [name for name in rare_classes(table, min_scenes) if name in (table.class_set or table.classes)]
    return {
        "frames": int(table.num_frames.sum()), "scenes": clusters_text(table.scenes),
        "classes": [table.classes[number] for number in over], "all_classes": len(table.classes), "left_out": left_out,
        "dataset": table.protocol.get("data", {}).get("dataset", ""), "protocols": protocols,
    }  # fmt: skip


def check_same_frames(methods: Sequence[Method], name: str) -> None:
    """Raises ValueError unless all methods were scored on the same frames and ground truth of a set."""
    first, *others = [method for method in methods if name in method.tables]
    wanted = first.tables[name][0]
    for method in others:
        table = method.tables[name][0]
        if table.classes != wanted.classes or table.frames != wanted.frames:
            raise ValueError(
                f"set {name}: {first.name} and {method.name} have other frames or classes; evaluate both on one set, "
                "or give sets of other frames other names"
            )
        if (table.counts.sum(2) != wanted.counts.sum(2)).any():
            raise ValueError(f"set {name}: {first.name} and {method.name} have other ground truth; evaluate both alike")


# -- published figures --------------------------------------------------------------------------------------


def read_published(path: Path, trained_on: str | None = None) -> list[dict[str, str]]:
    """Rows of a CSV of published figures; raises ValueError naming the file for other columns and for no number."""
    rows = list(csv.DictReader(read_text(path).splitlines()))
    if not rows or {*_COLUMNS} - {*rows[0]}:
        raise ValueError(f"{path} needs the columns {','.join(_COLUMNS)} and a row per figure")
    for number, row in enumerate(rows, 2):
        if not re.fullmatch(r"\d+(\.\d+)?", row["miou"] or ""):
            raise ValueError(f"{path}, line {number}: miou is {row['miou']!r}; expected percent, such as 57.50")
    wanted = [row for row in rows if trained_on is None or _dataset(row["trained_on"]) == _dataset(trained_on)]
    if not wanted:
        known = ", ".join(dict.fromkeys(row["trained_on"] for row in rows))
        raise ValueError(f"{path} has no figure of a training on {trained_on}; it has {known[:150]}")
    return wanted


def _dataset(text: str) -> str:
    """'BDD100K (10k)' -> 'bdd100k': what two names of a dataset have in common."""
    return re.split(r"[^A-Za-z0-9-]", text.strip().lower())[0]


def published_rows(rows: Sequence[dict[str, str]], sets: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per published method, with its figures on these sets, by the set's name or its dataset's."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        for name, facts in sets.items():
            if _dataset(row["tested_on"]) in {_dataset(name), _dataset(facts["dataset"])} - {""}:
                title = f"{row['method']}, {row['backbone']}, trained on {row['trained_on']}"
                entry = found.setdefault(title, {"name": title, "kind": "published", "sets": {}, "notes": []})
                entry["sets"].setdefault(name, []).append(row["miou"])
                entry["notes"].append(f"{row['tested_on']}: {row['test_protocol'] or 'not stated'}; {row['source']}")
    return list(found.values())


# -- Markdown and LaTeX -------------------------------------------------------------------------------------


def as_markdown(table: dict[str, Any]) -> str:
    """The figures, differences to the first row and to the baselines, classes, and what they hold under."""
    lines = [f"{_TITLE}:", "", *_markdown_rows(*main_rows(table, "markdown"))]
    first, *others = table["rows"]
    models = [row for row in others if row["kind"] == "model"]
    if models:
        head, body = difference_rows(table, first["name"], models)
        lines += ["", f"Difference to {first['name']} in percentage points:", "", *_markdown_rows(head, body)]
    head, body = baseline_rows(table)
    if body:
        lines += ["", "Difference to the baselines in percentage points:", "", *_markdown_rows(head, body)]
    for name in table["sets"]:
        title = f"IoU of the classes of {name} in percent:"
        lines += ["", title, "", *_markdown_rows(*class_rows(table, name))]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(table)), ""])


def main_rows(table: dict[str, Any], form: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of mIoU."""
    sets = list(table["sets"])
    head = ["method", "seeds", *(f"{name} ({mean_over(table, name)})" for name in sets)]
    body = []
    for row in table["rows"]:
        seeds = str(row["seeds"]) if row["kind"] == "model" else "–"
        body.append([row["name"], seeds, *(_cell(row, name, "miou") for name in sets)])
    for row in table.get("published", ()):
        cells = [f"{' / '.join(row['sets'][name])}{_MARK[form]}" if name in row["sets"] else "–" for name in sets]
        body.append([f"{row['name']}{_MARK[form]}", "–", *cells])
    return head, body


def mean_over(table: dict[str, Any], name: str) -> str:
    """'19 classes', '16 of 22 classes', or 'from 1 to 2 classes' where methods differ: what a set's means are over."""
    counts = sorted({row["sets"][name]["miou_classes"] for row in table["rows"] if name in row["sets"]})
    text = over_text(counts[-1], table["sets"][name]["all_classes"])
    return text if len(counts) == 1 else f"from {counts[0]} to {text}"


def difference_rows(
    table: dict[str, Any], first: str, rows: Sequence[dict[str, Any]]
) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the differences to one method."""
    sets = list(table["sets"])
    return ["method", *sets], [[row["name"], *(_apart(row, name, first) for name in sets)] for row in rows]


def baseline_rows(table: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the differences of every model to every baseline."""
    baselines = [row["name"] for row in table["rows"] if row["kind"] == "baseline"]
    body = [
        [row["name"], name, *(_apart(row, name, baseline) for baseline in baselines)]
        for row in table["rows"]
        if row["kind"] == "model"
        for name in row["sets"]
        if baselines
    ]
    return ["method", "set", *baselines], body


def class_rows(table: dict[str, Any], name: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the IoU of every class of a set; those left out of the mean are in brackets."""
    rows, facts = [row for row in table["rows"] if name in row["sets"]], table["sets"][name]
    classes = list(rows[0]["sets"][name]["iou"])
    body = []
    for label in classes:
        title = label if label in facts["classes"] else f"({label})"
        body.append([title, *(Estimate(*row["sets"][name]["iou"][label]).text() for row in rows)])
    return ["class", *(row["name"] for row in rows)], body


def notes(table: dict[str, Any]) -> list[str]:
    """What the figures hold under, a sentence each."""
    found = []
    for name, facts in table["sets"].items():
        alone = "; intervals are over seeds alone" if facts["scenes"] in ("one place", "no scenes") else ""
        found.append(f"{name}: {facts['frames']} frames, {facts['scenes']}{alone}.")
        if facts["left_out"]:
            found.append(f"{name}: in too few scenes, so left out of the mean: {', '.join(facts['left_out'])}.")
        found += [f"{name}: {protocol}." for protocol in facts["protocols"]]
    resamples, seed = table["bootstrap"]["resamples"], table["bootstrap"]["seed"]
    found.append(f"Bootstrap over scenes and seeds: {resamples} resamples, seed {seed}; differences are paired.")
    for row in table.get("published", ()):
        found.append(f"† published, not run here: {row['name']}. {' | '.join(dict.fromkeys(row['notes']))}.")
    return found + table["notes"]


def as_latex(table: dict[str, Any]) -> str:
    """The table of mIoU for booktabs, with what it holds under as comments."""
    head, body = main_rows(table, "latex")
    lines = [f"% {line}" for line in (_TITLE, *notes(table))]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule", _latex_row(head), r"\midrule"]
    return "\n".join([*lines, *map(_latex_row, body), r"\bottomrule", r"\end{tabular}", ""])


def _latex_row(cells: Sequence[str]) -> str:
    escaped = []
    for cell in cells:
        mark = _MARK["latex"] if cell.endswith(_MARK["latex"]) else ""
        text = re.sub(r"([&%$#_{}])", r"\\\1", cell.removesuffix(mark).replace("\\", "/").replace("–", "--"))
        escaped.append(text + mark)
    return " & ".join(escaped) + r" \\"


def _markdown_rows(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [table_line(row) for row in (head, ["---", *["---:"] * (len(head) - 1)], *body)]


def _cell(row: dict[str, Any], name: str, key: str) -> str:
    return Estimate(*row["sets"][name][key]).text() if name in row["sets"] else "–"


def _apart(row: dict[str, Any], name: str, other: str) -> str:
    apart = row["sets"].get(name, {}).get("difference", {})
    return Estimate(*apart[other]).text(sign=True) if other in apart else "–"


@takes(TableOptions)
def table(options: TableOptions) -> dict[str, Any]:
    """Prints and writes the table; returns its figures."""
    forms: dict[str, Callable[[dict[str, Any]], str]] = {"markdown": as_markdown, "latex": as_latex}
    if options.json is not None:
        check_out_file(options.json, '{\n "sets": {')
    found = make_table(read_methods(options.runs), options.min_scenes, options.bootstrap, options.seed)
    found["notes"] = read_notes(options.runs)
    if options.published is not None:
        found["published"] = published_rows(read_published(options.published, options.trained_on), found["sets"])
    print(forms["latex" if options.latex else "markdown"](found), end="")
    if options.json is not None:
        write_json(options.json, found)
    return found
