"""Two runs on the same frames, scene by scene: which is better, where, and how sure that is.

    python compare_runs.py A.parquet B.csv --leaked SEEN_IN_TRAINING.txt --by weather light --markdown comparison.md

A and B are per-frame tables (`tables_tqdm.py` names the layouts). Everything follows from their pixel counts:
    scene         mean IoU over the classes, on the summed counts of the scene's frames; sorted by canonical name
    Overall       the same on the sums over all frames; the mean of the scenes is given as what it is
    difference    (B - A) x 100 percentage points, of unrounded values; better is above 0, worse below
    marks         up or down: further above or below the mean of the scenes' differences than one standard deviation
                  (of a sample). This marks the rows that the published Road3D comparison marks.
    no value      a class in neither truth nor prediction of a run has no IoU there and is left out of its mean, also
                  where the other run predicts it (and gets 0). A scene without labelled pixels, or that a run lacks,
                  has no mIoU: N/A, and it counts neither as better nor as worse.

Exit status: 0 compared, 2 bad input or nothing to compare: other frames, other truth, another protocol. With --anyway
such runs are compared, too, and every output says what is wrong with that.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ..data.files import write_whole
from ..data.scenes import scene_identity
from ..evaluation.counts import FrameTable, read_table
from ..evaluation.groups import ATTRIBUTES, read_attributes, read_text
from .comparison import (
    Comparison,
    Message,
    attribute_groups,
    class_names,
    compare,
    identities,
    list_groups,
)
from .comparison_text import as_csv, as_json, as_markdown, say


def read_scenes(path: Path) -> set[str]:
    """Identities of the scenes in a text file, one name or path per line; raises ValueError for impossible ones."""
    scenes = set()
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            scenes.add(scene_identity(PurePosixPath(line.strip()).name))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    scenes.discard("")
    if not scenes:
        raise ValueError(f"{path} is empty; it must hold a scene per line")
    return scenes


def restricted(table: FrameTable, scenes: set[str], source: str) -> FrameTable:
    """The rows of these scenes; raises ValueError if there are none."""
    kept = [row for row, scene in enumerate(identities(table)) if scene in scenes]
    if not kept:
        raise ValueError(f"no scene of the list is in {source}; compare the names")
    return replace(
        table,
        frames=[table.frames[row] for row in kept],
        scenes=[table.scenes[row] for row in kept],
        attributes={name: [values[row] for row in kept] for name, values in table.attributes.items()},
        counts=table.counts[kept],
        num_frames=table.num_frames[kept],
    )


def run_names(first: str, second: str) -> tuple[str, str]:
    """What the runs are called: by their files, or by the whole paths where these are alike."""
    names = Path(first).stem, Path(second).stem
    return names if names[0] != names[1] else (first, second)


def count_from_zero(text: str) -> int:
    """A number of resamples."""
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", metavar="A", help="per-frame table (.parquet or .csv) of the run to compare with")
    parser.add_argument("second", metavar="B", help="the same of the run whose gain is asked for")
    what = parser.add_argument_group("what is compared")
    add = what.add_argument
    add("--scenes", type=Path, metavar="FILE", help="only these scenes, one name per line (default: all)")
    add("--known", type=Path, metavar="FILE", help="scenes trained on: results for known and unknown scenes apart")
    add("--leaked", type=Path, metavar="FILE", help="test scenes that leaked from training: results without them, too")
    add(
        "--attributes",
        type=Path,
        metavar="FILE",
        help="CSV: scene and what to group by, in place of the tables' columns",
    )
    add(
        "--by", nargs="*", metavar="NAME",
        help=f"columns to group by (default: those of {', '.join(ATTRIBUTES)} that can be had)",
    )  # fmt: skip
    add(
        "--bootstrap", type=count_from_zero, default=10000, metavar="N",
        help="resamples of the scenes for the interval of the Overall difference, 0 for none (default %(default)s)",
    )  # fmt: skip
    add("--seed", type=int, default=0, metavar="S", help="of the bootstrap (default %(default)s)")
    add("--anyway", action="store_true", help="compare in spite of other frames, truth or protocol, and say so")
    out = parser.add_argument_group("output")
    add = out.add_argument
    add("--language", choices=("en", "zh"), default="en", help="of the Markdown (default %(default)s)")
    add("--markdown", type=Path, metavar="OUT", help="write what is printed")
    add("--csv", type=Path, metavar="OUT", help="write scenes and groups, unrounded")
    add("--json", type=Path, metavar="OUT", help="write everything, unrounded")
    return parser


def load(args: argparse.Namespace) -> Comparison:
    """Reads what the command line names, and compares."""
    paths = args.first, args.second
    tables = [read_run(path) for path in paths]
    wanted, notes = set(), []
    if args.scenes:
        wanted = read_scenes(args.scenes)
        left_out = all_scenes(tables) - wanted
        tables = [restricted(table, wanted, path) for table, path in zip(tables, paths, strict=True)]
        if left_out:
            values = {"file": args.scenes.name, "count": len(left_out)}
            notes.append(Message("Scenes left out, for they are not in {file}: {count}.", values))
    known, leaked = (read_scenes(path) if path else None for path in (args.known, args.leaked))
    if leaked is not None:
        found = ", ".join(sorted(leaked & all_scenes(tables)))
        notes.append(Message("Leaked scenes: {scenes}.", {"scenes": found or "-"}))
    class_names(tables)
    of_scene = read_attributes(args.attributes) if args.attributes else None
    by_attribute, disagreements = attribute_groups(tables, args.by, of_scene)
    groups = [*list_groups(tables, known, leaked), *by_attribute]
    return compare(tables, run_names(*paths), wanted, groups, args.bootstrap, args.seed, [*notes, *disagreements])


def read_run(path: str) -> FrameTable:
    """A table whose scenes all have possible names."""
    table = read_table(path)
    try:
        identities(table)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return table


def all_scenes(tables: Sequence[FrameTable]) -> set[str]:
    """The scenes of both tables by their identities."""
    return {scene for table in tables for scene in identities(table)}


def main(argv: list[str] | None = None) -> int:
    """Prints and writes the comparison; returns the exit status."""
    parser = make_parser()
    args = parser.parse_args(argv)
    outputs = [path for path in (args.markdown, args.csv, args.json) if path is not None]
    try:
        for path in outputs:
            if not path.resolve().parent.is_dir():
                raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} in")
        found = load(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if found.warnings and not args.anyway:
        print("The runs cannot be compared:", file=sys.stderr)
        print(*(f"- {say(message)}" for message in found.warnings), sep="\n", file=sys.stderr)
        print("Evaluate both alike on the same frames, or give --anyway.", file=sys.stderr)
        return 2
    markdown = as_markdown(found, args.language)
    print(markdown, end="")
    if args.markdown:
        write_whole(args.markdown, markdown.encode())
    if args.csv:
        write_whole(args.csv, as_csv(found).encode())
    if args.json:
        write_whole(args.json, as_json(found).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
