"""Puts the committed results of the benchmarks into the README, one table per suite.

    python benchmarks/speed_table.py            # writes the tables between the two markers
    python benchmarks/speed_table.py --check    # writes nothing; exit status 1 if the README differs

The tables are a choice of columns; the .md files beside the results have all of them, and say what they mean.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from measure import RESULTS, Result, markdown_table, shown, speed_ratio

from tqdm_seg.data.files import write_whole

README = Path(__file__).parent.parent / "README.md"
BEGIN = "<!-- speed tables: python benchmarks/speed_table.py -->"
END = "<!-- end of the speed tables -->"


def suite_table(suite: dict[str, Any]) -> str:
    """One results file as a line and a table."""
    results = [Result(**contender) for contender in suite["contenders"]]
    by_name = {result.name: result for result in results}
    references = [by_name[name] for name in suite["baselines"] if name in by_name]
    rows = [[result.name, *row_cells(result, references)] for result in results]
    header = ["contender", "seconds", *(f"speed / {reference.name}'s" for reference in references)]
    header += [f"memory / {reference.name}'s" for reference in references[:1]] + ["utilisation", "exact to"]
    facts = suite["facts"]
    caption = (
        f"{suite['title']}, {facts['device']} ({facts['threads']} threads), torch {facts['torch']}, medians of "
        f"{facts['repeats']}:"
    )
    return f"{caption}\n\n{markdown_table(header, rows)}"


def row_cells(result: Result, references: list[Result]) -> list[str]:
    """What stands behind the name."""
    if result.seconds is None:
        return ["failed", *["–"] * (len(references) + len(references[:1]) + 2)]
    ratios = [speed_ratio(result, reference) for reference in references]
    memories = [
        result.memory / reference.memory if result.memory is not None and reference.memory else None
        for reference in references[:1]
    ]
    return [
        f"{result.seconds:.3g}",
        *(shown(ratio and ratio[0], ".2f") for ratio in ratios),
        *(shown(memory, ".2f") for memory in memories),
        shown(result.utilisation, ".0%"),
        shown(result.difference, ".0e"),
    ]


def with_tables(readme: str, tables: str) -> str:
    """The README with these tables between the markers; raises ValueError if it has none."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README has no place for the tables; add the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    parser.add_argument("--readme", type=Path, default=README, help="file with the markers (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Writes or compares; returns the exit status."""
    args = make_parser().parse_args(argv)
    files = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(args.results.glob("*.json"))]
    parts = [suite_table(suite) for suite in files if "contenders" in suite]
    if (
        changes := args.results / "mode_changes.md"
    ).is_file():  # no race, but what a mode costs belongs beside its speed
        parts.append(changes.read_text(encoding="utf-8").removeprefix("# ").strip())
    tables = "\n\n".join(parts)
    before = args.readme.read_text(encoding="utf-8")
    after = with_tables(before, tables)
    if not args.check:
        write_whole(args.readme, after.encode())
    elif before != after:
        print(f"{args.readme} does not show the results in {args.results}; run python benchmarks/speed_table.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
