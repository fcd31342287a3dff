"""Puts the results of the benchmarks into docs/speed.md, one table per suite.

    python benchmarks/speed_table.py            # writes the tables between the two markers
    python benchmarks/speed_table.py --check    # writes nothing; exit status 1 if the page differs

The tables are a choice of columns; the .md files next to the results have all of them and say what they mean.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import RESULTS, Result, main, results_table

from tqdm_seg.program import option

LEFT_OUT = ("least", "most", "GFLOP", "peak MB", "first call s")
BEGIN = "<!-- speed tables: python benchmarks/speed_table.py -->"
END = "<!-- end of the speed tables -->"


@dataclass(kw_only=True)
class TableSettings:
    """Options."""

    check: bool = option(False, help="compare only")
    results: Path = option(RESULTS, help="folder of the results (default: %(default)s)")
    page: Path = option(Path(__file__).parents[1] / "docs" / "speed.md", help="with the markers (default: %(default)s)")


def suite_table(suite: dict[str, Any]) -> str:
    """A caption and a table."""
    facts, results = suite["facts"], [Result(**variant) for variant in suite["variants"]]
    machine = f"{facts['device']} ({facts['threads']} threads), torch {facts['torch']}, medians of {facts['repeats']}"
    return f"{suite['title']}, {machine}:\n\n{results_table(results, suite['baselines'], LEFT_OUT)}"


def with_tables(page: str, tables: str) -> str:
    """The page with these tables between the markers; raises ValueError if it has none."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no place for the tables; add the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def write_tables(settings: TableSettings) -> int:
    """Writes or compares; returns the exit status."""
    files = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(settings.results.glob("*.json"))]
    tables = [suite_table(suite) for suite in files if "variants" in suite]
    changes = settings.results / "mode_changes.md"  # what a mode costs in accuracy
    if changes.is_file():
        tables.append(changes.read_text(encoding="utf-8").removeprefix("# ").strip())
    before = settings.page.read_text(encoding="utf-8")
    after = with_tables(before, "\n\n".join(tables))
    if settings.check and before != after:
        print(f"{settings.page} differs from the results in {settings.results}; run python benchmarks/speed_table.py")
        return 1
    settings.page.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    main(write_tables, TableSettings, __doc__)
