"""What is scored without a model: a constant answer, a mask of where classes lie, a classifier of single colours.

All three are fitted on the training frames alone and scored on the same pixels as a model. They say what a figure is
worth: whoever does not beat the location mask has learned where the road lies in an image, not what a road is.

Letters: K classes, H, W grid of the location mask, C levels per colour channel.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import cv2
import numpy as np
import torch

from ..data.frames import FrameDataset, frame_loader
from ..data.label_maps import IGNORE_INDEX
from .metrics import confusion_matrix
from .sets import EvaluationSet

CONSTANT, LOCATION, COLOUR = BASELINES = ("constant answer", "location mask", "colour classifier")
# Folder of an evaluation that holds their per-frame tables, by set.
BASELINE_FOLDER = "baselines"
LEVELS = 32  # of every colour channel
_LONGEST_SIDE = 512  # of the location mask, in pixels


@dataclass(frozen=True, eq=False)
class Baselines:
    """What the training frames say without a model; class ids are those of `classes`.

    constant: the most frequent class. location (H, W) uint8: the most frequent class at every place of the frame.
    colours (C, C, C) uint8: the most frequent class of every colour, by red, green and blue.
    """

    classes: list[str]
    constant: int
    location: np.ndarray
    colours: np.ndarray

    @classmethod
    def fit(cls, sets: Sequence[FrameDataset], workers: int = 0) -> "Baselines":
        """From all frames of one or several training sets of the same classes.

        The grid of the mask is the most frequent frame size, shrunk to 512 pixels a side. Colours are counted in bins
        of 8 levels a channel, and bins lend each other a part of their counts (1, 2, 1 along every channel); a bin that
        stays empty gets the constant answer. Of equally frequent classes the first counts.
        """
        number, sizes = len(sets[0].classes), Counter[tuple[int, int]]()
        for frames in sets:
            sides = (frames.index.table[side].to_pylist() for side in ("height", "width"))
            sizes.update(zip(*sides, strict=True))
        (height, width), _ = sizes.most_common(1)[0]
        scale = min(1.0, _LONGEST_SIDE / max(height, width))
        size = round(height * scale), round(width * scale)
        places = np.zeros((number, size[0] * size[1]), np.int64)
        colours = np.zeros((number, LEVELS**3), np.int64)
        for frame in chain.from_iterable(frame_loader(frames, workers) for frames in sets):
            small = enlarged(frame.labels, size).ravel()
            (labelled,) = np.nonzero(small != IGNORE_INDEX)
            places[small[labelled], labelled] += 1  # every place once
            pixels = frame.labels != IGNORE_INDEX
            cells = frame.labels[pixels].astype(np.int64) * LEVELS**3 + colour_bins(frame.image)[pixels]
            colours += np.bincount(cells, minlength=colours.size).reshape(colours.shape)
        constant = int(sum(frames.index.class_pixels.sum(0) for frames in sets).argmax())
        location = most_frequent(places, constant).reshape(size)
        return cls(
            sets[0].classes,
            constant,
            location,
            most_frequent(blurred(colours.reshape(number, *3 * [LEVELS])), constant),
        )

    def answers(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """{baseline: class ids (h, w) uint8} of an image (h, w, 3) uint8."""
        size = image.shape[:2]
        return {
            CONSTANT: np.full(size, self.constant, np.uint8),
            LOCATION: enlarged(self.location, size),
            COLOUR: self.colours.ravel()[colour_bins(image)],
        }

    def translation(self, classes: Sequence[str], words: dict[str, str] | None = None) -> np.ndarray:
        """Class id (256,) uint8 in another class list for every one of ours; 255, no class, where none is meant.

        words: {name: word} of names that stand for the same; classes of one name, or else of one word, are the same.
        """
        words = words or {}
        by_word = {words.get(name, name): number for number, name in reversed([*enumerate(classes)])}
        found = np.full(IGNORE_INDEX + 1, IGNORE_INDEX, np.uint8)
        for number, name in enumerate(self.classes):
            same = by_word.get(words.get(name, name), IGNORE_INDEX)
            found[number] = classes.index(name) if name in classes else same
        return found


def score_baselines(
    baselines: Baselines, chosen: EvaluationSet, workers: int = 0, words: dict[str, str] | None = None
) -> dict[str, np.ndarray]:
    """{baseline: counts (N, K, K + 1) int64} of all frames of a set, against the ground truth of its protocol."""
    number, same = len(chosen.classes), baselines.translation(chosen.classes, words)
    counts: dict[str, list[np.ndarray]] = {name: [] for name in BASELINES}
    for frame in frame_loader(chosen.frames, workers):
        labels = chosen.ground_truth(frame.labels)
        for name, ids in baselines.answers(frame.image).items():
            answer = torch.from_numpy(same[ids])
            counts[name].append(confusion_matrix(answer, labels, number, IGNORE_INDEX).numpy())
    return {name: np.stack(of_frames) for name, of_frames in counts.items()}


def file_name(name: str) -> str:
    """'location mask' -> 'location_mask'."""
    return name.replace(" ", "_")


def enlarged(ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Class ids (h, w) uint8 at another size (height, width): those of the nearest pixel centres."""
    return ids if ids.shape == size else cv2.resize(ids, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


def colour_bins(image: np.ndarray) -> np.ndarray:
    """Number (h, w) int64 of the colour bin of every pixel of an image (h, w, 3) uint8."""
    step = 256 // LEVELS
    red, green, blue = np.moveaxis(image // step, -1, 0).astype(np.int64)
    return (red * LEVELS + green) * LEVELS + blue


def blurred(counts: np.ndarray) -> np.ndarray:
    """Counts (K, C, C, C) with a part of their neighbours': 1, 2, 1 along every channel."""
    for axis in (1, 2, 3):
        edges = [(0, 0)] * 4
        edges[axis] = (1, 1)
        padded = np.pad(counts, edges)
        before, here, after = (np.take(padded, range(i, i + LEVELS), axis) for i in range(3))
        counts = before + 2 * here + after
    return counts


def most_frequent(counts: np.ndarray, otherwise: int) -> np.ndarray:
    """The class (...) uint8 with the largest of the counts (K, ...), `otherwise` where all are 0."""
    return np.where(counts.any(0), counts.argmax(0), otherwise).astype(np.uint8)
