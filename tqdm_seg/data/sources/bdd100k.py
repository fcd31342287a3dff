"""BDD100K, its 10k part with semantic labels, to shards: train and val. The test part has no labels.

    python dataset_scripts/prepare_bdd100k.py ROOT OUT

    ROOT/images/10k/train/<id>.jpg       or, in the older release,   ROOT/seg/images/train/<id>.jpg
    ROOT/labels/sem_seg/masks/train/<id>.png                         ROOT/seg/labels/train/<id>_train_id.png

ROOT may also be the folder that holds bdd100k/.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import run
from ..label_maps import TRAIN_IDS
from ..prepare import Pair, Source, first_folder, prepare, prepare_parser

SOURCE = Source(
    "BDD100K (10k)",
    "BDD100K must not be passed on: keep this folder, and any repository made of it, private.",
    published={"train": (7000,), "validation": (1000,)},
)


def scan(root: Path) -> Iterator[Pair]:
    """All frames of either release."""
    images = first_folder(root, "images/10k", "bdd100k/images/10k", "seg/images", "bdd100k/seg/images")
    if images.parent.name == "seg":
        labels, suffix = first_folder(images.parent, "labels"), "_train_id.png"
    else:
        # Beside the masks there are colormaps, which hold no ids.
        labels, suffix = first_folder(images.parents[1], "labels/sem_seg/masks"), ".png"
    for folder, split in {"train": "train", "val": "validation", "test": "test"}.items():
        for image in (images / folder).glob("*.jpg"):
            skip = "no labels are published for test" if split == "test" else ""
            yield Pair(split, "", image, labels / folder / f"{image.stem}{suffix}", skip)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Prepares the dataset; returns its manifest."""
    args = prepare_parser(__doc__).parse_args(argv)
    return prepare(args, SOURCE, TRAIN_IDS, scan(args.root))


if __name__ == "__main__":
    run(main)
