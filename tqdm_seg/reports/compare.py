"""Two evaluations of the same frames, scene by scene: `tqdm-seg compare`."""

import sys

from ..commands import start

if __name__ == "__main__":
    sys.exit(start("compare"))


import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ..data.files import check_out_file, cut, write_file
from ..data.scenes import scene_identity
from ..evaluation.class_sets import COMMON
from ..evaluation.counts import FrameTable, read_table
from ..evaluation.groups import read_attributes, read_text
from ..program import takes
from .comparison import (
    Comparison,
    Message,
    attribute_groups,
    compare_tables,
    identities,
    list_groups,
    match_tables,
    with_class_set,
)
from .comparison_text import as_csv, as_json, as_markdown, say
from .options import CompareOptions
from .runs import set_table


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
        raise ValueError(f"{path} is empty; write a scene per line")
    return scenes


def read_scene_map(path: Path) -> dict[str, str]:
    """{old: new} identities of scenes, of a CSV with old,new per line; raises ValueError naming the line."""
    renamed: dict[str, str] = {}
    for number, row in enumerate(csv.reader(read_text(path).splitlines()), 1):
        cells = [cell.strip() for cell in row]
        if not any(cells) or (number == 1 and [cell.lower() for cell in cells] == ["old", "new"]):
            continue
        try:
            if len(cells) != 2 or not all(cells):
                raise ValueError(f"{cut(','.join(row))!r} is not old,new; write two scenes")
            old, new = map(scene_identity, cells)
            if old in renamed or new in renamed.values():
                raise ValueError(f"{cut(','.join(row))} names a scene for the second time; leave one line")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        renamed[old] = new
    if chained := sorted(renamed.keys() & {*renamed.values()}):
        raise ValueError(f"{path}: {chained[0]} is an old name and a new one; rename every scene once")
    if not renamed:
        raise ValueError(f"{path} is empty; write old,new per line")
    return renamed


def rename_scenes(tables: Sequence[FrameTable], renamed: dict[str, str], path: Path) -> list[FrameTable]:
    """The tables under the new names; raises ValueError if neither has any of the old ones."""
    if not renamed.keys() & all_scenes(tables):
        raise ValueError(f"{path} renames no scene of either table; compare the names")
    names = [[renamed.get(scene_identity(scene), scene) for scene in table.scenes] for table in tables]
    return [replace(table, scenes=scenes) for table, scenes in zip(tables, names, strict=True)]


def keep_scenes(table: FrameTable, path: str, scenes: set[str], listed: Path) -> FrameTable:
    """The rows of these scenes; raises ValueError, naming the table and the list, if there are none."""
    kept = [row for row, scene in enumerate(identities(table)) if scene in scenes]
    if not kept:
        raise ValueError(f"{path} has no scene of the list {listed}; compare the names")
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


def read_and_compare(options: CompareOptions) -> Comparison:
    """The comparison of the files that the options name."""
    paths = str(options.first), str(options.second)
    tables = [read_run(set_table(path, options.set)) for path in paths]
    renamed = read_scene_map(options.scene_map) if options.scene_map else {}
    if options.scene_map:
        tables = rename_scenes(tables, renamed, options.scene_map)

    def scenes_of(path: Path) -> set[str]:
        return {renamed.get(scene, scene) for scene in read_scenes(path)}

    wanted, notes = set(), []
    if options.scenes:
        wanted = scenes_of(options.scenes)
        left_out = all_scenes(tables) - wanted
        tables = [keep_scenes(*table_path, wanted, options.scenes) for table_path in zip(tables, paths, strict=True)]
        if left_out:
            values = {"file": options.scenes.name, "count": len(left_out)}
            notes.append(Message("Scenes left out because they are not in {file}: {count}.", values))
    known, leaked = (scenes_of(path) if path else None for path in (options.known, options.leaked))
    if leaked is not None:
        found = ", ".join(sorted(leaked & all_scenes(tables)))
        notes.append(Message("Leaked scenes: {scenes}.", {"scenes": found or "-"}))
    if options.class_set == COMMON:
        tables, left_out = match_tables(tables)
        notes += left_out
    tables = with_class_set(tables, options.class_set)
    of_scene = read_attributes(options.attributes) if options.attributes else None
    of_scene = of_scene and {renamed.get(scene, scene): values for scene, values in of_scene.items()}
    by_attribute, disagreements = attribute_groups(tables, options.by, of_scene)
    groups = [*list_groups(tables, known, leaked), *by_attribute]
    return compare_tables(
        tables, run_names(*paths), wanted, groups, options.bootstrap, options.seed, [*notes, *disagreements]
    )


def read_run(path: Path) -> FrameTable:
    """A table, all of whose scenes have possible names; raises ValueError for others."""
    table = read_table(path)
    try:
        identities(table)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return table


def all_scenes(tables: Sequence[FrameTable]) -> set[str]:
    """The scenes of both tables by their identities."""
    return {scene for table in tables for scene in identities(table)}


@takes(CompareOptions)
def compare(options: CompareOptions) -> Comparison:
    """Prints and writes the comparison; returns it. Raises ValueError for runs that may not be compared."""
    lists = [options.scenes, options.known, options.leaked, options.scene_map, options.attributes]
    inputs = [options.first, options.second, *lists]
    beginnings = {"en": "# Comparison of ", "zh": "# "}
    for path, begins in (
        (options.markdown, beginnings[options.language]), (options.csv, "part,name,frames_a"),
        (options.json, '{\n  "runs": ['),
    ):  # fmt: skip
        if path is not None and not path.resolve().parent.is_dir():
            raise FileNotFoundError(f"folder not found: {path.parent}; make it, or write {path.name} elsewhere")
        if path is not None:
            check_out_file(path, begins, filter(None, inputs))
    named = [path.resolve() for path in (options.markdown, options.csv, options.json) if path is not None]
    if len({*named}) < len(named):
        raise ValueError(f"two of --markdown, --csv and --json name {named[0]}; give each output its own file")
    found = read_and_compare(options)
    if found.warnings and not options.anyway:
        # A long line loses its middle: first the protocols, from which the others follow.
        reasons = " ".join(map(say, sorted(found.warnings, key=lambda warning: "protocols" not in warning.text)))
        raise ValueError(f"the runs differ in more than the model: {reasons} Evaluate both alike, or give --anyway")
    markdown = as_markdown(found, options.language)
    print(markdown, end="")
    outputs = ((options.markdown, markdown), (options.csv, as_csv(found)), (options.json, as_json(found)))
    for path, text in outputs:
        if path is not None:
            write_file(path, text.encode())
    return found
