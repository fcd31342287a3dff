"""ORFD to shards: `tqdm-seg prepare orfd`."""

import sys

from ...commands import start

if __name__ == "__main__":
    sys.exit(start("prepare orfd"))


from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...program import takes
from ..folders import find, split_of
from ..label_maps import ORFD
from ..options import OrfdOptions
from ..prepare import Pair, Source, first_folder, make_dataset

SOURCE = Source(
    "ORFD",
    "ORFD by Chen Min and others; its README puts code and dataset under the Apache License 2.0.",
    licence="apache-2.0",
    # The second number is that of the copy on Academic Torrents.
    published={"train": (8398, 8392), "validation": (1245,), "test": (2555, 2193)},
)
# Some archives of ORAD-3D have a folder around the scene's folder.
DEPTHS = ("image_data", "*/image_data", "*/*/image_data")


def scan(root: Path) -> list[Pair]:
    """All frames of ORFD and of ORAD-3D, which has the same layout; the scene is the folder above image_data.

    Raises FileNotFoundError without a folder of a split, ValueError for frames in other folders next to them.
    """
    for place in (root, root / "Final_Dataset"):
        folders = [folder for folder in find(place, "*") if folder.is_dir()]
        if any(split_of(folder.name) for folder in folders):
            break
    else:
        first_folder(root, "training", "validation", "testing")
    for folder in folders:
        if split_of(folder.name) is None and find(folder, *DEPTHS):
            raise ValueError(
                f"{folder} holds frames, but its name is none of training, validation and testing; rename or move it"
            )
    return [pair for folder in folders if (split := split_of(folder.name)) for pair in _frames(folder, split)]


def _frames(folder: Path, split: str) -> Iterator[Pair]:
    for images in find(folder, *DEPTHS):
        scene = "" if images.parent == folder else images.parent.name
        for image in find(images, "*.png"):
            yield Pair(split, scene, image, images.parent / "gt_image" / f"{image.stem}_fillcolor.png")


def make_orfd_dataset(options: OrfdOptions, source: Source) -> dict[str, Any]:
    """Prepares ORFD or ORAD-3D; returns the manifest."""
    pairs = scan(options.root)
    notes = []
    if any(not pair.scene for pair in pairs):
        notes.append(
            "the folders have no scene level, so `scene` is empty and no result per scene can be made of this copy; "
            "the official download has training/<scene>/image_data"
        )
    return make_dataset(options, source, ORFD[options.unreachable], pairs, notes)


@takes(OrfdOptions)
def prepare_orfd(options: OrfdOptions) -> dict[str, Any]:
    """Prepares the dataset; returns its manifest."""
    return make_orfd_dataset(options, SOURCE)
