"""Two runs on the same frames: their scores by scene and group, what differs, and whether they may be compared.

Everything follows from the pixel counts of the two per-frame tables; `CompareOptions` states the rules.

Letters: R rows, S scenes, N resamples, K classes.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from ..data.scenes import scene_identity
from ..evaluation.class_sets import COMMON, common_classes, members
from ..evaluation.counts import FrameTable
from ..evaluation.groups import ATTRIBUTES, NOT_GIVEN, flatten
from ..evaluation.metrics import class_iou, group_sums
from ..evaluation.statistics import Runs, draw, table_totals


class Message(NamedTuple):
    """A sentence in English, and values for its braces (which may be messages), so that it can be translated."""

    text: str
    values: dict[str, Any] = {}


@dataclass(frozen=True)
class PairedCounts:
    """The counts (2, K, K + 1) of one set of frames in both runs, and how many frames each run has of it.

    over: numbers of the classes that means are over.
    """

    name: str
    counts: np.ndarray
    frames: tuple[int, int]
    over: list[int]

    @cached_property
    def iou(self) -> torch.Tensor:
        """(2, K) float64, NaN where undefined."""
        return class_iou(torch.from_numpy(self.counts))

    @cached_property
    def miou(self) -> list[float]:
        """Of both runs; NaN where one has no labelled pixel."""
        return self.iou[:, self.over].nanmean(-1).tolist()

    @cached_property
    def classes(self) -> tuple[int, int]:
        """How many classes the mean of either run is over."""
        return tuple((~self.iou[:, self.over].isnan()).sum(-1).tolist())

    @property
    def difference(self) -> float:
        """Percentage points by which the second run is better; NaN if either has no value."""
        return (self.miou[1] - self.miou[0]) * 100


class Group(NamedTuple):
    """The frames divided by one of their properties."""

    name: str
    rows: list[PairedCounts]


class Interval(NamedTuple):
    """95 % interval of the Overall difference in percentage points, and where it comes from."""

    low: float
    high: float
    scenes: int
    resamples: int
    seed: int


@dataclass(frozen=True)
class Comparison:
    """All that the outputs say. warnings: reasons not to compare. notes: what else a reader should know."""

    runs: tuple[str, str]
    protocols: tuple[dict[str, Any], dict[str, Any]]
    classes: list[str]
    class_set: tuple[str, ...]
    scenes: list[PairedCounts]
    overall: PairedCounts
    groups: list[Group]
    interval: Interval | None
    same_frames: bool
    warnings: list[Message]
    notes: list[Message]

    @cached_property
    def ranked(self) -> list[PairedCounts]:
        """Scenes that have a value in both runs, from the largest loss to the largest gain."""
        return sorted((row for row in self.scenes if row.difference == row.difference), key=lambda row: row.difference)

    @cached_property
    def spread(self) -> tuple[float, float]:
        """Mean and standard deviation of the scenes' differences in percentage points; NaN for too few scenes."""
        differences = [row.difference for row in self.ranked]
        deviation = np.std(differences, ddof=1) if len(differences) > 1 else np.nan
        return float(np.mean(differences or [np.nan])), float(deviation)

    @cached_property
    def scene_mean(self) -> list[float]:
        """Means of the scenes' mIoU of both runs, over the scenes that have a value in both; NaN for none."""
        return np.mean([row.miou for row in self.ranked] or [[np.nan, np.nan]], 0).tolist()

    @property
    def class_iou(self) -> list[tuple[str, list[float]]]:
        """Every class and its IoU over all frames in both runs; NaN where undefined."""
        return list(zip(self.classes, self.overall.iou.T.tolist(), strict=True))

    def mark(self, row: PairedCounts) -> str:
        """What a scene is marked with: up, down or nothing."""
        mean, deviation = self.spread
        if abs(row.difference - mean) > deviation:  # never true of NaN
            return "up" if row.difference > mean else "down"
        return ""


# -- whether they may be compared -------------------------------------------------------------------------------


def frame_warnings(tables: Sequence[FrameTable], runs: tuple[str, str]) -> list[Message]:
    """What one run has and the other lacks."""
    unit, keys = frame_keys(tables)
    frames = [group_sums(table.num_frames, of_table) for table, of_table in zip(tables, keys, strict=True)]
    found = []
    for run, own, other in ((runs[0], *frames), (runs[1], *reversed(frames))):
        alone = sorted(own.keys() - other.keys())
        if alone:
            values = {"count": len(alone), "unit": Message(unit), "run": run, "first": alone[0]}
            found.append(Message("Found in {run} only ({unit}): {count}, beginning with {first}.", values))
    changed = [key for key in sorted(frames[0].keys() & frames[1].keys()) if frames[0][key] != frames[1][key]]
    if changed:
        values = {"count": len(changed), "first": changed[0], "a": frames[0][changed[0]], "b": frames[1][changed[0]]}
        text = "Scenes with different numbers of frames: {count}, beginning with {first} ({a} and {b})."
        found.append(Message(text, values))
    return found


def ground_truth_warnings(tables: Sequence[FrameTable]) -> list[Message]:
    """Whether both runs were scored against the same ground truth, as far as its pixels per class tell."""
    unit, keys = frame_keys(tables)
    labelled = [group_sums(table.counts.sum(2), of_table) for table, of_table in zip(tables, keys, strict=True)]
    common = sorted(labelled[0].keys() & labelled[1].keys())
    if not common:
        return []
    a, b = (np.stack([sums[key] for key in common]) for sums in labelled)  # (frames or scenes, K)
    changed = (a != b).any(1)
    if not changed.any():
        return []
    share = np.abs(a - b).sum(0) / np.maximum(np.maximum(a, b).sum(0), 1)  # (K,)
    values = {
        "count": int(changed.sum()), "total": len(common), "unit": Message(unit), "share": f"{100 * share.max():.2f}",
        "name": class_names(tables)[share.argmax()],
    }  # fmt: skip
    text = "The ground truth differs in {count} of {total} {unit}, most in class {name}: by {share} % of its pixels."
    return [Message(text, values)]


def frame_keys(tables: Sequence[FrameTable]) -> tuple[str, list[list[str]]]:
    """Whether frames or scenes can be told apart in both tables, and what names of one have in common, row by row.

    Tables name a frame by its image or its label, under whatever folder the data were in: scene and file name count,
    or the whole path where these are not unique.
    """
    if not all(any(table.frames) for table in tables):
        return "scenes", [identities(table) for table in tables]
    keys = []
    for table in tables:
        files = (frame.replace("\\", "/").rpartition("/")[2] for frame in table.frames)
        stems = (file.rsplit(".", 1)[0].removesuffix("_fillcolor") for file in files)
        keys.append([f"{scene}/{stem}" for scene, stem in zip(identities(table), stems, strict=True)])
    unique = all(len(set(of_table)) == len(of_table) for of_table in keys)
    return "frames", keys if unique else [table.frames for table in tables]


def protocol_warnings(tables: Sequence[FrameTable], runs: tuple[str, str]) -> list[Message]:
    """Every field of the protocols that differs, and the names of the classes if both tables have them."""
    a, b = (flatten(table.protocol) for table in tables)
    if bool(a) != bool(b):
        return [Message("Only {run} states its protocol.", {"run": runs[0] if a else runs[1]})]
    if all(map(has_names, tables)):
        a["classes"], b["classes"] = (", ".join(table.classes) for table in tables)
    missing = Message(NOT_GIVEN)
    both = {field: (a.get(field, missing), b.get(field, missing)) for field in [*a, *(b.keys() - a.keys())]}
    text = "The protocols differ in {field}: {a} and {b}."
    return [Message(text, {"field": field, "a": x, "b": y}) for field, (x, y) in sorted(both.items()) if x != y]


def has_names(table: FrameTable) -> bool:
    """Whether the table names its classes; where it does not, they are called 0, 1, ..."""
    return table.classes != [str(k) for k in range(len(table.classes))]


def class_names(tables: Sequence[FrameTable]) -> list[str]:
    """Names of the classes, from the table that has them; raises ValueError for different numbers of classes."""
    a, b = tables
    if len(a.classes) != len(b.classes):
        raise ValueError(
            f"{len(a.classes)} and {len(b.classes)} classes cannot be compared; evaluate both alike, or give "
            f"--class-set {COMMON}"
        )
    return a.classes if has_names(a) else b.classes


def match_tables(tables: Sequence[FrameTable]) -> tuple[list[FrameTable], list[Message]]:
    """Tables of other class lists with the classes that both name alone, and what was left out."""
    a, b = tables
    if a.classes == b.classes or not (has_names(a) and has_names(b)):
        return list(tables), []
    names = common_classes(a.classes, b.classes)
    if not names:
        raise ValueError(f"--class-set {COMMON}: the tables name no class in common; evaluate both on one set of data")
    others = [name for name in (*a.classes, *b.classes) if not common_classes([name], names)]
    note = Message("Left out, as only one run has them, are the classes {classes}.", {"classes": ", ".join(others)})
    return [table.restricted(names) for table in tables], [note] if others else []


def with_class_set(tables: Sequence[FrameTable], chosen: str | None) -> list[FrameTable]:
    """The tables whose means are over one class set: "common" is of the classes with pixels in both, None their own.

    Raises ValueError for a class that there is not, and for tables of different class sets where none is given.
    """
    names = class_names(tables)
    if chosen is None and tables[0].class_set != tables[1].class_set:
        sets = (table.protocol.get("class_set", {}).get("name", "all classes") for table in tables)
        raise ValueError(f"the means are over different classes ({' and '.join(sets)}); give one --class-set for both")
    if chosen is None:
        return list(tables)
    if chosen == COMMON:
        seen = np.logical_and(*(table.counts.sum((0, 2)) > 0 for table in tables))
        chosen = ",".join(name for name, found in zip(names, seen, strict=True) if found)
    return [replace(table, classes=names).with_class_set(chosen) for table in tables]


# -- comparing ------------------------------------------------------------------------------------------


def compare_tables(
    tables: Sequence[FrameTable],
    runs: tuple[str, str],
    wanted: Collection[str] = (),
    groups: Sequence[Group] = (),
    resamples: int = 0,
    seed: int = 0,
    notes: Sequence[Message] = (),
) -> Comparison:
    """Compares two tables of the same classes and class set.

    wanted: scenes that get a row even if neither table has them.
    resamples: of the bootstrap, 0 for none. Raises ValueError for different numbers of classes.
    """
    classes = class_names(tables)
    other_frames = frame_warnings(tables, runs)
    scenes = rows_by(tables, [identities(table) for table in tables], wanted)
    (overall,) = rows_by(tables, [["Overall"] * len(table.scenes) for table in tables])
    if not any(table.protocol for table in tables):
        text = "No table states its protocol: the runs may have been scored differently."
        notes = [*notes, Message(text)]
    return Comparison(
        runs=runs,
        protocols=(tables[0].protocol, tables[1].protocol),
        classes=classes,
        class_set=tables[0].class_set,
        scenes=scenes,
        overall=overall,
        groups=list(groups),
        interval=bootstrap(scenes, resamples, seed),
        same_frames=not other_frames,
        warnings=[*other_frames, *ground_truth_warnings(tables), *protocol_warnings(tables, runs)],
        notes=list(notes),
    )


def rows_by(
    tables: Sequence[FrameTable], keys: Sequence[Sequence[str]], wanted: Collection[str] = ()
) -> list[PairedCounts]:
    """A row per key, sorted as text. keys: one per row of each table. wanted: keys that get a row in any case."""
    counts = [group_sums(table.counts, of_table) for table, of_table in zip(tables, keys, strict=True)]
    frames = [group_sums(table.num_frames, of_table) for table, of_table in zip(tables, keys, strict=True)]
    nothing = np.zeros_like(tables[0].counts[0])
    over = members(tables[0].class_set, tables[0].classes)
    return [
        PairedCounts(
            key, np.stack([sums.get(key, nothing) for sums in counts]), tuple(int(n.get(key, 0)) for n in frames), over
        )
        for key in sorted({*counts[0], *counts[1], *wanted})
    ]


def bootstrap(scenes: Iterable[PairedCounts], resamples: int, seed: int) -> Interval | None:
    """95 % paired-bootstrap interval of the Overall difference over scenes; None for fewer than two scenes.

    Both runs get the same scenes in each resample: what is hard for both cancels.
    """
    scored = [row for row in scenes if row.difference == row.difference]
    over = scored[0].over if scored else []
    counts = np.array([row.counts for row in scored])  # (S, 2, K, K + 1)
    size = len(counts)
    if resamples < 1 or size < 2:
        return None
    runs = [Runs(table_totals(counts[None, :, run]), [], over) for run in (0, 1)]
    draws = draw(size, 1, resamples, seed)
    (first, second) = (run.miou(draws)[:, 0] for run in runs)  # (N,)
    low, high = np.quantile((second - first) * 100, [0.025, 0.975])
    return Interval(float(low), float(high), size, resamples, seed)


def identities(table: FrameTable) -> list[str]:
    """The scene of every row under its canonical name; raises ValueError for impossible names."""
    known = {scene: scene_identity(scene) or "(no scene)" for scene in set(table.scenes)}
    return [known[scene] for scene in table.scenes]


def list_groups(tables: Sequence[FrameTable], known: set[str] | None, leaked: set[str] | None) -> list[Group]:
    """The scenes in and out of a training list, and what remains without leaked scenes."""
    scenes = [identities(table) for table in tables]
    groups = []
    if known is not None:
        keys = [["known" if scene in known else "unknown" for scene in of_table] for of_table in scenes]
        groups.append(Group("training list", rows_by(tables, keys, ["known", "unknown"])))
    if leaked is not None:
        names = ["without the leaked", "only the leaked"]
        keys = [[names[scene in leaked] for scene in of_table] for of_table in scenes]
        only, without = rows_by(tables, keys, names)
        (everything,) = rows_by(tables, [["all"] * len(of_table) for of_table in scenes])
        groups.append(Group("leaked scenes", [everything, without, only]))
    return groups


def attribute_groups(
    tables: Sequence[FrameTable], wanted: Sequence[str] | None, of_scene: dict[str, dict[str, str]] | None
) -> tuple[list[Group], list[Message]]:
    """The frames by weather and the like, and where the tables disagree about them.

    wanted: None for those of `ATTRIBUTES` that both have. of_scene: {scene: {attribute: value}} that
    replaces the tables' columns. Raises ValueError for a wanted attribute that is missing.
    """
    groups, notes = [], []
    for name in ATTRIBUTES if wanted is None else wanted:
        if of_scene is not None and any(name in values for values in of_scene.values()):
            keys = [[of_scene.get(scene, {}).get(name) or NOT_GIVEN for scene in identities(t)] for t in tables]
        elif of_scene is None and all(name in table.attributes for table in tables):
            keys = [[value or NOT_GIVEN for value in table.attributes[name]] for table in tables]
            notes += find_disagreement(tables, name, keys)
        elif wanted is None:
            continue
        else:
            raise ValueError(f"{name!r} is a column neither of both tables nor of --attributes; add it there")
        groups.append(Group(name, rows_by(tables, keys)))
    return groups, notes


def find_disagreement(tables: Sequence[FrameTable], name: str, values: Sequence[Sequence[str]]) -> list[Message]:
    """Whether the two tables put the same frames, or scenes, into different groups."""
    unit, keys = frame_keys(tables)
    first, second = (set(zip(of_keys, of_values, strict=True)) for of_keys, of_values in zip(keys, values, strict=True))
    common = set(keys[0]) & set(keys[1])
    apart = sorted({key for key, _ in first ^ second} & common)
    if not apart:
        return []
    text = "The tables disagree on {name} ({unit}): {count}, beginning with {first}."
    return [Message(text, {"name": name, "count": len(apart), "unit": Message(unit), "first": apart[0]})]
