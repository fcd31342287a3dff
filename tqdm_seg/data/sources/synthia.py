"""SYNTHIA-RAND-CITYSCAPES to shards: `tqdm-seg prepare synthia`."""

import sys

from ...commands import start

if __name__ == "__main__":
    sys.exit(start("prepare synthia"))


from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...program import takes
from ..folders import find
from ..label_maps import SYNTHIA
from ..options import SynthiaOptions
from ..prepare import Pair, Source, first_folder, images_by_name, make_dataset

LISTS = Path(__file__).parents[1] / "lists" / "robustnet_splits"
TERMS = "SYNTHIA must not be passed on: keep this folder, and any repository made of it, private."
PUBLISHED = {"robustnet": {"train": (6580,), "validation": (2820,)}, "none": {"train": (9400,)}}


def read_splits(choice: str) -> dict[str, str]:
    """Split of every file name of the two lists."""
    files = {"train": "train", "validation": "train" if choice == "none" else "validation"}
    parts = {"train": "train", "validation": "val"}
    return {
        name: files[split]
        for split, part in parts.items()
        for name in (LISTS / f"synthia_split_{part}.txt").read_text().split()
    }


def scan(root: Path, choice: str) -> Iterator[Pair]:
    """All frames."""
    splits = read_splits(choice)
    images = first_folder(root, "RGB", "RAND_CITYSCAPES/RGB")
    labels = first_folder(images.parent, "GT/LABELS")
    for name, image in images_by_name(find(images, "*.png", "*/*.png")).items():
        skip = "" if name in splits else "in no list of the split"
        yield Pair(splits.get(name, ""), "", image, labels / image.relative_to(images), skip)


@takes(SynthiaOptions)
def prepare_synthia(options: SynthiaOptions) -> dict[str, Any]:
    """Prepares the dataset; returns its manifest."""
    source = Source("SYNTHIA-RAND-CITYSCAPES", TERMS, published=PUBLISHED[options.splits])
    return make_dataset(options, source, SYNTHIA, scan(options.root, options.splits), splits=options.splits)
