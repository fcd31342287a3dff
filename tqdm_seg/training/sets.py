"""Training frames of one or several prepared datasets, each drawn by its weight."""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from ..data.frames import Frame, FrameDataset, PlainRows
from ..data.shards import check_same_labels
from ..program import cut


class TrainSet(NamedTuple):
    """One training set: its name, "" for one given as a path alone, its frames, and its weight among the samples."""

    name: str
    frames: FrameDataset
    weight: Fraction


class FrameSets(Dataset):
    """The frames of all training sets, one set after the other.

    Raises ValueError, naming the set, when classes or label maps differ.
    """

    def __init__(self, sets: Sequence[TrainSet]):
        self.sets = list(sets)
        first, *others = self.sets
        self.classes = first.frames.classes
        for other in others:
            if other.frames.classes != self.classes:
                found = cut(", ".join(other.frames.classes))
                raise ValueError(
                    f"--data {other.name} ({other.frames.folder}) has the classes {found}, {first.name} has "
                    f"{cut(', '.join(self.classes))}; prepare all sets with one class list"
                )
        check_same_labels(self.manifests)
        self.ends = np.cumsum([len(part.frames) for part in self.sets])

    @property
    def manifests(self) -> list[dict]:
        """Of every set."""
        return [part.frames.index.manifest for part in self.sets]

    @property
    def class_pixels(self) -> list[np.ndarray]:
        """Labelled pixels of every class in every frame, (R, K) int64 of every set."""
        return [part.frames.index.class_pixels for part in self.sets]

    @property
    def scenes(self) -> list[str]:
        """The scene of every frame, "" where it is not known."""
        return [scene for part in self.sets for scene in part.frames.scenes]

    @property
    def shares(self) -> list[float]:
        """Which part of the samples every set has."""
        total = sum(part.weight for part in self.sets)
        return [float(part.weight / total) for part in self.sets]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, row: int) -> Frame:
        number = int(np.searchsorted(self.ends, row, "right"))
        name, frames, _ = self.sets[number]
        frame = frames[row - int(self.ends[number]) + len(frames)]
        return frame._replace(key=f"{name}/{frame.key}") if len(self.sets) > 1 else frame


def content(frames: FrameDataset | PlainRows) -> tuple[str, str]:
    """What frames are: the sum of their index, or their source without one, and their split."""
    return frames.source if isinstance(frames, PlainRows) else frames.identity, frames.split


def same_frames(training: FrameSets | PlainRows, validation: FrameDataset | PlainRows) -> bool:
    """Whether the frames to evaluate on are a set that is trained on."""
    parts = [training] if isinstance(training, PlainRows) else [part.frames for part in training.sets]
    return content(validation) in map(content, parts)


def shared_scenes(training: FrameSets, validation: FrameDataset) -> list[str]:
    """Names of the scenes of which both parts hold frames."""
    return sorted({*training.scenes} & {*validation.scenes} - {""})
