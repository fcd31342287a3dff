"""Cityscapes to shards: `tqdm-seg prepare cityscapes`."""

import sys

from ...commands import start

if __name__ == "__main__":
    sys.exit(start("prepare cityscapes"))


from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...program import takes
from ..folders import find
from ..label_maps import CITYSCAPES
from ..options import CityscapesOptions
from ..prepare import Pair, Source, first_folder, make_dataset

SOURCE = Source(
    "Cityscapes",
    "Cityscapes must not be passed on: keep this folder, and any repository made of it, private.",
    published={"train": (2975,), "validation": (500,)},
)


def scan(root: Path) -> Iterator[Pair]:
    """All frames; the scene is the city."""
    images, labels = first_folder(root, "leftImg8bit"), first_folder(root, "gtFine")
    for folder, split in {"train": "train", "val": "validation", "test": "test"}.items():
        for image in find(images / folder, "*/*_leftImg8bit.png"):
            city, frame = image.parent.name, image.name.removesuffix("_leftImg8bit.png")
            skip = "gtFine/test holds dummy labels" if split == "test" else ""
            yield Pair(split, city, image, labels / folder / city / f"{frame}_gtFine_labelIds.png", skip)


@takes(CityscapesOptions)
def prepare_cityscapes(options: CityscapesOptions) -> dict[str, Any]:
    """Prepares the dataset; returns its manifest."""
    return make_dataset(options, SOURCE, CITYSCAPES, scan(options.root))
