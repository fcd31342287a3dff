"""RUGD to shards: `tqdm-seg prepare rugd`."""

import sys

from ...commands import start

if __name__ == "__main__":
    sys.exit(start("prepare rugd"))


from pathlib import Path
from typing import Any

from ...program import takes
from ..class_files import read_classes
from ..folders import find
from ..label_maps import RUGD_COLOURS, Reading, off_road_map
from ..options import RugdOptions
from ..prepare import Pair, Source, first_folder, make_dataset
from .ycor import TERMS

SOURCE = Source("RUGD", TERMS, published={"test": (7436, 26)})
COLOURS = "RUGD_annotation-colormap.txt"
# Folders of images and of masks, by layout.
ORIGINAL, SAMPLE, PLAIN = (
    ("RUGD_frames-with-annotations", "RUGD_annotations"), ("images", "annotations"), ("test/images", "test/masks"),
)  # fmt: skip


def scan(root: Path) -> tuple[list[Pair], Reading]:
    """All frames of one of the layouts, the scene by the name's beginning, and how their masks are read."""
    images = first_folder(root, ORIGINAL[0], SAMPLE[0], PLAIN[0])
    layout = next(layout for layout in (ORIGINAL, SAMPLE, PLAIN) if root / layout[0] == images)
    masks = first_folder(root, layout[1])
    pairs = []
    for image in find(images, "*.png", "*/*.png", "*.jpg"):
        mask = masks / image.relative_to(images).with_suffix(".png")
        pairs.append(Pair("test", image.stem.rpartition("_")[0], image, mask))
    return pairs, "values" if layout == PLAIN else "colours"


def check_colours(root: Path) -> None:
    """Raises ValueError where the download's list of colours is not the one that masks are read by."""
    for path in find(root, COLOURS, f"{ORIGINAL[1]}/{COLOURS}"):
        found = {colour: name for colour, name in read_classes(path).table if colour}
        wanted = {int.from_bytes(bytes(colour), "big") for colour in RUGD_COLOURS.values()}
        if {*found} != wanted:
            raise ValueError(f"{path} has other colours than the published ones; use prepare folder with this file")


@takes(RugdOptions)
def prepare_rugd(options: RugdOptions) -> dict[str, Any]:
    """Prepares the dataset; returns its manifest."""
    check_colours(options.root)
    pairs, reading = scan(options.root)
    return make_dataset(options, SOURCE, off_road_map("rugd", options.map, reading), pairs)
