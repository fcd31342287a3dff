"""What is evaluated: NAME=PATH arguments, the prepared datasets behind them, and whether model and sets go together."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from tqdm_seg.image_processing_tqdm import TqdmImageProcessor

from ..data.frames import FrameDataset
from ..data.scenes import scene_identity
from ..data.shards import read_manifest, refuse_mixed_labels
from .counts import FrameTable
from .groups import ATTRIBUTES
from .protocol import PUBLISHED_BOXES, Inference

_FORM = "give NAME=PATH, NAME=PATH:SPLIT or NAME=PATH:SPLIT@1024x2048; a name has letters, digits, '.', '_' and '-'"
_SET = re.compile(r"([A-Za-z0-9][\w.-]*)=(.+?)(?:@(\d+)x(\d+))?")


class SetSource(NamedTuple):
    """A NAME=PATH argument. split: None for what the dataset has; box: None for that of the whole run."""

    name: str
    folder: str
    split: str | None
    box: tuple[int, int] | None


@dataclass(frozen=True)
class EvaluationSet:
    """One split of a prepared dataset under the name that its results have, and how its frames are shown."""

    name: str
    frames: FrameDataset
    inference: Inference

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
    """A frame as the model gets it: number in the index, views (3, H, W) uint8, truth (h, w) uint8."""

    row: int
    views: list[Tensor]
    truth: Tensor


class Samples(Dataset):
    """The frames of a set as the model gets them."""

    def __init__(self, chosen: EvaluationSet, processor: TqdmImageProcessor):
        self.frames, self.inference, self.processor = chosen.frames, chosen.inference, processor
        self.frames.cache = None  # every frame is read once

    def __getitem__(self, row: int) -> Sample:
        frame = self.frames[row]
        truth = self.inference.truth_of(frame.labels)
        return Sample(row, self.inference.views(frame.image, self.processor), truth)


def parse_set(text: str) -> SetSource:
    """The parts of NAME=PATH[:SPLIT][@HEIGHTxWIDTH]; raises ValueError for anything else."""
    match = _SET.fullmatch(text)
    if match is None:
        raise ValueError(f"--data {text!r} names no dataset; {_FORM}")
    name, folder, *sides = match.groups()
    box = None if sides[0] is None else checked_box(*map(int, sides))
    place, colon, split = folder.rpartition(":")
    # URLs have colons, too: hf://datasets/...; and so may folders.
    if colon and re.fullmatch(r"\w+", split) and not Path(folder).exists():
        return SetSource(name, place, split, box)
    return SetSource(name, folder, None, box)


def checked_box(*sides: int) -> tuple[int, int]:
    """The shorter and the longer side of a box; raises ValueError if it is empty."""
    if min(sides) < 1:
        raise ValueError(f"a box of {sides[0]}x{sides[1]} pixels is empty; give two sides, as 1024x2048")
    return min(sides), max(sides)


def open_sets(
    arguments: Sequence[str], inference: Inference, protocol: str, box: tuple[int, int] | None = None
) -> list[EvaluationSet]:
    """The sets that the arguments name.

    inference: of the run. protocol: whose sizes the frames have, "model": the inference's, "own": the frames',
    "published": by the dataset's name. box: in place of it; the box of an argument goes before both.
    Raises ValueError for malformed or doubled names, a missing split, datasets whose labels differ; FileNotFoundError
    for unfinished datasets.
    """
    sources = [parse_set(text) for text in arguments]
    name, times = Counter(source.name.lower() for source in sources).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{times} sets are called {name}; results go by these names, so give each its own")
    sets = []
    for source in sources:
        frames = FrameDataset(source.folder, source.split or default_split(source.folder))
        chosen = source.box or box
        if chosen is None and protocol == "published":
            chosen = PUBLISHED_BOXES.get(frames.index.manifest["dataset"])
        size = inference.size if protocol == "model" else None
        if chosen is not None:
            size = dict(zip(("shortest_edge", "longest_edge"), chosen, strict=True))
        sets.append(EvaluationSet(source.name, frames, replace(inference, size=size)))
    refuse_mixed_labels([chosen.frames.index.manifest for chosen in sets])
    return sets


def default_split(folder: str) -> str:
    """validation, or else test; raises ValueError for a dataset that has neither."""
    splits = list(read_manifest(folder)["rows"])
    for split in ("validation", "test"):
        if split in splits:
            return split
    raise ValueError(f"{folder} has no split validation or test, only {', '.join(splits)}; say which: PATH:SPLIT")


def refuse_other_classes(names: Sequence[str], chosen: EvaluationSet) -> None:
    """Raises ValueError unless the dataset has the model's classes, in the same order."""
    found = chosen.frames.classes
    if list(names) == found:
        return
    longer = max(len(names), len(found))
    padded = [[*classes, *["nothing"] * (longer - len(classes))] for classes in (list(names), found)]
    number = next(i for i in range(longer) if padded[0][i] != padded[1][i])
    raise ValueError(
        f"the model has {len(names)} classes, {chosen.name} has {len(found)}, and class {number} is "
        f"{padded[0][number]} to the model but {padded[1][number]} in the dataset; names and order must be the same: "
        "evaluate on data prepared with the model's classes, or train for these"
    )


def frame_attributes(
    scenes: Sequence[str], of_scene: dict[str, dict[str, str]], wanted: Sequence[str] | None
) -> dict[str, list[str]]:
    """{attribute: a value per frame, "" where none is given} from {scene: {column: value}}.

    scenes: one per frame. wanted: columns, None for those of `ATTRIBUTES` that there are. Raises ValueError for a
    column that is not there or that a table has anyway, and for impossible scene names.
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
