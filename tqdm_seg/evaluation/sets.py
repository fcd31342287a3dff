"""Prepared datasets that a model is scored on, and whether model and sets go together."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from tqdm_seg.image_processing_tqdm import TqdmImageProcessor

from ..data.frames import FrameDataset
from ..data.scenes import scene_identity
from ..data.shards import check_same_labels, read_manifest
from .counts import FrameTable
from .groups import ATTRIBUTES
from .options import SetSource
from .protocol import PUBLISHED_BOXES, Protocol


@dataclass(frozen=True)
class EvaluationSet:
    """One split of a prepared dataset, the name of its results, and how its frames are shown to the model."""

    name: str
    frames: FrameDataset
    protocol: Protocol

    @property
    def sizes(self) -> Counter[tuple[int, int]]:
        """How many frames of each (height, width) there are."""
        table = self.frames.index.table
        return Counter(zip(table["height"].to_pylist(), table["width"].to_pylist(), strict=True))

    @property
    def facts(self) -> dict[str, str]:
        """Which frames these are, wherever they lie: what a manifest says of them."""
        manifest = self.frames.index.manifest
        return {
            "dataset": manifest["dataset"],
            "split": self.frames.split,
            "index_sha256": manifest["index_sha256"],
        }


class Sample(NamedTuple):
    """A frame as the model gets it: number in the index, views (3, H, W) uint8, ground truth (h, w) uint8."""

    row: int
    views: list[Tensor]
    ground_truth: Tensor


class Samples(Dataset):
    """The frames of a set as the model gets them."""

    def __init__(self, chosen: EvaluationSet, processor: TqdmImageProcessor):
        self.frames, self.protocol, self.processor = chosen.frames, chosen.protocol, processor
        self.frames.cache = None  # every frame is read once

    def __getitem__(self, row: int) -> Sample:
        frame = self.frames[row]
        views = self.protocol.views(frame.image, self.processor)
        return Sample(row, views, self.protocol.ground_truth(frame.labels))


def open_sets(
    sources: Sequence[SetSource], protocol: Protocol, sizes: str, box: tuple[int, int] | None = None
) -> list[EvaluationSet]:
    """The sets of these sources.

    protocol: of the run. sizes: what the frames are resized to, "model": the protocol's size, "own": none, "published":
    by the dataset's name. box: in place of it; the box of a source goes before both.
    Raises ValueError for a missing split and datasets whose labels differ, FileNotFoundError for unfinished datasets.
    """
    sets = []
    for source in sources:
        frames = FrameDataset(source.folder, source.split or default_split(source.folder))
        chosen = source.box or box
        if chosen is None and sizes == "published":
            chosen = PUBLISHED_BOXES.get(frames.index.manifest["dataset"])
        size = protocol.size if sizes == "model" else None
        if chosen is not None:
            size = dict(zip(("shortest_edge", "longest_edge"), sorted(chosen), strict=True))
        sets.append(EvaluationSet(source.name, frames, replace(protocol, size=size)))
    check_same_labels([chosen.frames.index.manifest for chosen in sets])
    return sets


def default_split(folder: str) -> str:
    """validation, or else test; raises ValueError for a dataset that has neither."""
    splits = list(read_manifest(folder)["rows"])
    for split in ("validation", "test"):
        if split in splits:
            return split
    raise ValueError(f"{folder} has no split validation or test, only {', '.join(splits)}; say which: PATH:SPLIT")


def check_classes(names: Sequence[str], chosen: EvaluationSet) -> None:
    """Raises ValueError unless the dataset has the model's classes, in the same order."""
    found = chosen.frames.classes
    if list(names) == found:
        return
    longer = max(len(names), len(found))
    padded = [[*classes, *["nothing"] * (longer - len(classes))] for classes in (list(names), found)]
    number = next(i for i in range(longer) if padded[0][i] != padded[1][i])
    raise ValueError(
        f"the model has {len(names)} classes, {chosen.name} has {len(found)}, and class {number} is "
        f"{padded[0][number]} to the model but {padded[1][number]} in the dataset; evaluate on data prepared with the "
        "model's classes in the same order, or train for these"
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
        raise ValueError(f"the attributes have no column {missing[0]!r}, only {', '.join(sorted(columns))}")
    # A name that no table can have is refused here, before the first frame, not with the table after the last.
    FrameTable(["-"], [""], {name: [""] for name in names}, np.zeros((1, 1, 2), np.int64), ["-"], {})
    known = {scene: of_scene.get(scene_identity(scene), {}) for scene in set(scenes)}
    return {name: [known[scene].get(name) or "" for scene in scenes] for name in names}
