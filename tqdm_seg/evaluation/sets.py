"""Prepared datasets that a model is scored on, and whether model and sets go together."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tqdm_seg.image_processing_tqdm import TqdmImageProcessor

from ..data.files import cut
from ..data.frames import FrameDataset, PlainRows
from ..data.scenes import scene_identity
from ..data.shards import check_same_labels, read_manifest
from .class_sets import COMMON, common_classes, renumbering
from .counts import FrameTable
from .groups import ATTRIBUTES
from .options import EvaluateOptions, SetSource, parse_sets
from .protocol import PUBLISHED_BOXES, Protocol
from .saved import SavedPredictions


@dataclass(frozen=True)
class EvaluationSet:
    """One split of a dataset, the name of its results, and how its frames are shown to the model.

    common: the classes that figures are of, none for all of the dataset's.
    """

    name: str
    frames: FrameDataset | PlainRows
    protocol: Protocol
    common: Sequence[str] = ()

    @property
    def classes(self) -> list[str]:
        """The classes that figures are of."""
        return list(self.common or self.frames.classes)

    @property
    def indexed(self) -> bool:
        """Whether an index tells beforehand which frames there are."""
        return isinstance(self.frames, FrameDataset)

    @property
    def length(self) -> int | None:
        """The number of frames, if an index tells."""
        return len(self.frames) if self.indexed else None

    @property
    def place(self) -> str:
        """Folder, URL or name that the frames are read from."""
        return self.frames.folder if self.indexed else self.frames.source

    @property
    def sizes(self) -> Counter[tuple[int, int]]:
        """How many frames of each (height, width) an index tells of."""
        if not self.indexed:
            return Counter()
        table = self.frames.index.table
        return Counter(zip(table["height"].to_pylist(), table["width"].to_pylist(), strict=True))

    @property
    def class_pixels(self) -> np.ndarray:
        """Pixels (N, K) of the classes in every frame, as the index counts them."""
        pixels = self.frames.index.class_pixels
        numbers = renumbering(self.frames.classes, self.classes)[: pixels.shape[1]]
        return np.stack([pixels[:, numbers == number].sum(1) for number in range(len(self.classes))], 1)

    def ground_truth(self, labels: np.ndarray) -> Tensor:
        """The ground truth (h, w) uint8 in ids of `classes` from labels (h, w) uint8; other classes become 255."""
        if self.common:
            labels = renumbering(self.frames.classes, self.classes)[labels]
        return self.protocol.ground_truth(labels)

    @property
    def facts(self) -> dict[str, str | None]:
        """Which frames these are, wherever they lie: what a manifest says of them."""
        if not self.indexed:
            return {"dataset": PurePath(self.place).name, "split": self.frames.split, "index_sha256": None}
        manifest = self.frames.index.manifest
        return {
            "dataset": manifest["dataset"],
            "split": self.frames.split,
            "index_sha256": manifest["index_sha256"],
        }


class Sample(NamedTuple):
    """A frame as the model gets it: number in its set, views (3, H, W) uint8 or saved ids (h, w) uint8, ground truth.

    views: of a model, or one map of class ids (h, w) uint8 that was predicted before. ground_truth (h, w) uint8.
    """

    row: int
    key: str
    scene: str
    views: list[Tensor]
    ground_truth: Tensor


class Samples(Dataset):
    """The frames of a set as the model gets them, or with predictions that were saved before."""

    def __init__(self, chosen: EvaluationSet, source: TqdmImageProcessor | SavedPredictions):
        self.chosen, self.source = chosen, source
        if chosen.indexed:
            chosen.frames.cache = None  # every frame is read once

    def __getitem__(self, item: tuple[int, dict[str, Any] | None]) -> Sample:
        """item: number of the frame and, without an index, its undecoded row."""
        number, row = item
        frames = self.chosen.frames
        if isinstance(self.source, SavedPredictions):
            key, ground_truth = frames.keys[number], self.chosen.ground_truth(frames.labels(number))
            return Sample(number, key, frames.scenes[number], [torch.from_numpy(self.source.ids(key))], ground_truth)
        frame = frames[number] if row is None else frames.frame(row, number)
        views = self.chosen.protocol.views(frame.image, self.source)
        return Sample(number, frame.key, frame.scene, views, self.chosen.ground_truth(frame.labels))


def rows_to_score(
    chosen: EvaluationSet, done: Sequence[int], process: int = 0, processes: int = 1
) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """A process's share of the frames that are not done: items of `Samples`, read in the order of the set."""
    if chosen.indexed:
        rows = np.setdiff1d(np.arange(chosen.length), done)
        yield from ((row, None) for row in rows[process::processes].tolist())
        return
    finished = {*done}
    for number, row in enumerate(chosen.frames.rows()):  # every process reads all rows, undecoded
        if number % processes == process and number not in finished:
            yield number, row


def open_sets(options: EvaluateOptions, protocol: Protocol, names: Sequence[str]) -> list[EvaluationSet]:
    """The sets of the options, with the classes that figures are of.

    protocol: of the run. names: what the ids mean that are predicted, and the labels of sets without an index.
    Raises ValueError for a missing split and datasets whose labels differ, FileNotFoundError for unfinished datasets.
    """
    sources = parse_sets(options.data)
    opened = [open_frames(source, options, names) for source in sources]
    manifests = [frames.index.manifest for frames in opened if isinstance(frames, FrameDataset)]
    check_same_labels(manifests, options.class_set != COMMON)
    sets = []
    for source, frames in zip(sources, opened, strict=True):
        chosen = source.box or options.size
        if chosen is None and options.protocol == "published" and isinstance(frames, FrameDataset):
            chosen = PUBLISHED_BOXES.get(frames.index.manifest["dataset"])
        size = protocol.size if options.protocol == "model" else None
        if chosen is not None:
            size = dict(zip(("shortest_edge", "longest_edge"), sorted(chosen), strict=True))
        sets.append(EvaluationSet(source.name, frames, replace(protocol, size=size)))
    if options.class_set == COMMON:
        return match_classes(names, sets)
    for chosen in sets:
        check_classes(names, chosen)
    return sets


def open_frames(source: SetSource, options: EvaluateOptions, names: Sequence[str]) -> FrameDataset | PlainRows:
    """The frames of a source; without an index the first one is read, so that errors show before the work."""
    if not options.no_index:
        return FrameDataset(source.folder, source.split or default_split(source.folder))
    classes = tuple(options.class_names or names)
    frames = PlainRows(source.folder, source.split or "validation", classes, options.image_column, options.label_column)
    if next(frames.frames(), None) is None:
        raise ValueError(f"{source.folder} has no row in split {frames.split!r}; say which: --data NAME=PATH:SPLIT")
    return frames


def default_split(folder: str) -> str:
    """validation, or else test; raises ValueError for a dataset that has neither."""
    splits = list(read_manifest(folder)["rows"])
    for split in ("validation", "test"):
        if split in splits:
            return split
    raise ValueError(f"{folder} has no split validation or test, only {', '.join(splits)}; say which: PATH:SPLIT")


def default_names(options: EvaluateOptions) -> list[str]:
    """What ids mean that another program predicted: --class-names, or else the classes of all sets."""
    if options.class_names:
        return list(options.class_names)
    classes = [read_manifest(source.folder)["classes"] for source in parse_sets(options.data)]
    if any(found != classes[0] for found in classes):
        raise ValueError("the sets have different classes; say what the predicted ids mean by --class-names A,B")
    return list(classes[0])


def match_classes(names: Sequence[str], sets: Sequence[EvaluationSet]) -> list[EvaluationSet]:
    """The sets with the classes that all of them and `names` have in common, by name; ValueError if there is none."""
    classes = common_classes(*(chosen.frames.classes for chosen in sets), names)
    if not classes:
        raise ValueError(
            f"--class-set {COMMON}: no class of the predictions ({cut(', '.join(names))}) is one of the data "
            f"({cut(', '.join(sets[0].frames.classes))}); rename classes of one of them"
        )
    return [replace(chosen, common=classes) for chosen in sets]


def left_out(names: Sequence[str], chosen: EvaluationSet) -> dict[str, list[str]]:
    """The classes that only the predictions and only the data have, where figures are of common classes alone."""
    known = {"predictions": names, "data": chosen.frames.classes}
    others = {of: [n for n in found if not common_classes([n], chosen.classes)] for of, found in known.items()}
    return {of: found for of, found in others.items() if found}


def check_classes(names: Sequence[str], chosen: EvaluationSet) -> None:
    """Raises ValueError unless the dataset has the model's classes, in the same order."""
    found = list(chosen.frames.classes)
    if list(names) == found:
        return
    longer = max(len(names), len(found))
    padded = [[*classes, *["nothing"] * (longer - len(classes))] for classes in (list(names), found)]
    number = next(i for i in range(longer) if padded[0][i] != padded[1][i])
    raise ValueError(
        f"the model has {len(names)} classes, {chosen.name} has {len(found)}, and class {number} is "
        f"{padded[0][number]} to the model but {padded[1][number]} in the dataset; evaluate on data prepared with the "
        f"model's classes in the same order, train for these, or give --class-set {COMMON}"
    )


def frame_attributes(
    scenes: Sequence[str], of_scene: dict[str, dict[str, str]], wanted: Sequence[str] | None
) -> dict[str, list[str]]:
    """{attribute: a value per frame, "" where none is given} from {scene: {column: value}}.

    scenes: one per frame. wanted: columns, None for those of `ATTRIBUTES` that there are. Raises ValueError for a
    missing column, one that every table has, and impossible scene names.
    """
    columns = {name for values in of_scene.values() for name in values}
    names = [name for name in ATTRIBUTES if name in columns] if wanted is None else wanted
    missing = [name for name in names if name not in columns]
    if missing:
        known = ", ".join(sorted(columns - {"scene"}))
        raise ValueError(f"--attributes has no column {missing[0]!r} for --by; choose from {known}")
    # A name that no table can have is refused here, before the first frame, not with the table after the last.
    FrameTable(["-"], [""], {name: [""] for name in names}, np.zeros((1, 1, 2), np.int64), ["-"], {})
    known = {scene: of_scene.get(scene_identity(scene), {}) for scene in set(scenes)}
    return {name: [known[scene].get(name) or "" for scene in scenes] for name in names}
