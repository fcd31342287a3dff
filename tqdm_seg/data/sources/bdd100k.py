"""BDD100K to shards: `tqdm-seg prepare bdd100k`."""

import sys

from ...commands import start

if __name__ == "__main__":
    sys.exit(start("prepare bdd100k"))


from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...program import takes
from ..folders import find
from ..label_maps import TRAIN_IDS
from ..options import Bdd100kOptions
from ..prepare import Pair, Source, first_folder, make_dataset

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
        # There are also colormaps, which hold no ids.
        labels, suffix = first_folder(images.parents[1], "labels/sem_seg/masks"), ".png"
    for folder, split in {"train": "train", "val": "validation", "test": "test"}.items():
        for image in find(images / folder, "*.jpg"):
            skip = "no labels are published for test" if split == "test" else ""
            yield Pair(split, "", image, labels / folder / f"{image.stem}{suffix}", skip)


@takes(Bdd100kOptions)
def prepare_bdd100k(options: Bdd100kOptions) -> dict[str, Any]:
    """Prepares the dataset; returns its manifest."""
    return make_dataset(options, SOURCE, TRAIN_IDS, scan(options.root))
