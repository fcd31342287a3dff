"""ORFD to shards: `tqdm-seg prepare orfd`."""

import sys

from ...commands import start

if __name__ == "__main__":
    sys.exit(start("prepare orfd"))


from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...program import takes
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
FOLDERS = {"training": "train", "validation": "validation", "testing": "test"}
# Some archives of ORAD-3D have a folder around the scene's folder.
DEPTHS = ("image_data", "*/image_data", "*/*/image_data")


def scan(root: Path) -> list[Pair]:
    """All frames of ORFD and of ORAD-3D, which has the same layout; the scene is the folder above image_data."""
    return list(_frames(first_folder(root, *FOLDERS, *(f"Final_Dataset/{name}" for name in FOLDERS)).parent))


def _frames(root: Path) -> Iterator[Pair]:
    for folder, split in FOLDERS.items():
        for images in (found for depth in DEPTHS for found in (root / folder).glob(depth)):
            scene = "" if images.parent.name == folder else images.parent.name
            for image in images.glob("*.png"):
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
