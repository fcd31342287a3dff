"""SYNTHIA-RAND-CITYSCAPES to shards.

    python dataset_scripts/prepare_synthia.py ROOT OUT

    ROOT/RGB/0000000.png          and the same names in   ROOT/GT/LABELS/   (16-bit, red = class id)
    ROOT/RGB/{train,val}/...      or divided into sub-folders of the same names on both sides

ROOT may also be the folder that holds RAND_CITYSCAPES/.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import run
from ..label_maps import SYNTHIA
from ..prepare import Pair, Source, by_name, first_folder, prepare, prepare_parser

LISTS = Path(__file__).parent / "robustnet_splits"
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
    for name, image in by_name([*images.glob("*.png"), *images.glob("*/*.png")]).items():
        skip = "" if name in splits else "in no list of the split"
        yield Pair(splits.get(name, ""), "", image, labels / image.relative_to(images), skip)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Prepares the dataset; returns its manifest."""
    parser = prepare_parser(__doc__)
    parser.add_argument(
        "--splits",
        choices=sorted(PUBLISHED),
        default="robustnet",
        help="robustnet: its lists of 6,580 and 2,820 (default); none: all frames are train",
    )
    args = parser.parse_args(argv)
    source = Source("SYNTHIA-RAND-CITYSCAPES", TERMS, published=PUBLISHED[args.splits])
    return prepare(args, source, SYNTHIA, scan(args.root, args.splits), splits=args.splits)


if __name__ == "__main__":
    run(main)
