"""Cityscapes (fine annotations) to shards: train and val. gtFine/test holds dummy labels and is left out.

python dataset_scripts/prepare_cityscapes.py ROOT OUT

ROOT/leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png     leftImg8bit_trainvaltest.zip
ROOT/gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png      gtFine_trainvaltest.zip
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import run
from ..label_maps import CITYSCAPES
from ..prepare import Pair, Source, first_folder, prepare, prepare_parser

SOURCE = Source(
    "Cityscapes",
    "Cityscapes must not be passed on: keep this folder, and any repository made of it, private.",
    published={"train": (2975,), "validation": (500,)},
)


def scan(root: Path) -> Iterator[Pair]:
    """All frames; the scene is the city."""
    images, labels = first_folder(root, "leftImg8bit"), first_folder(root, "gtFine")
    for folder, split in {"train": "train", "val": "validation", "test": "test"}.items():
        for image in (images / folder).glob("*/*_leftImg8bit.png"):
            city, frame = image.parent.name, image.name.removesuffix("_leftImg8bit.png")
            skip = "gtFine/test holds dummy labels" if split == "test" else ""
            yield Pair(split, city, image, labels / folder / city / f"{frame}_gtFine_labelIds.png", skip)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Prepares the dataset; returns its manifest."""
    args = prepare_parser(__doc__).parse_args(argv)
    return prepare(args, SOURCE, CITYSCAPES, scan(args.root))


if __name__ == "__main__":
    run(main)
