"""ACDC to shards: `tqdm-seg prepare acdc`."""

import sys

from ...commands import start

if __name__ == "__main__":
    sys.exit(start("prepare acdc"))


from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...program import takes
from ..folders import find
from ..label_maps import TRAIN_IDS
from ..options import AcdcOptions
from ..prepare import Pair, Source, first_folder, make_dataset

SOURCE = Source(
    "ACDC",
    "ACDC must not be passed on: keep this folder, and any repository made of it, private.",
    published={"train": (1600,), "validation": (406,)},
)


def scan(root: Path) -> Iterator[Pair]:
    """All frames; the scene is condition and drive, "fog/GOPR0475"."""
    images, labels = first_folder(root, "rgb_anon"), first_folder(root, "gt")
    for folder, split in {"train": "train", "val": "validation", "test": "test"}.items():
        for image in find(images, f"*/{folder}/*/*_rgb_anon.png"):
            drive = image.parent.relative_to(images)
            frame = image.name.removesuffix("_rgb_anon.png")
            skip = "no labels are published for test" if split == "test" else ""
            scene = f"{drive.parts[0]}/{drive.name}"
            yield Pair(split, scene, image, labels / drive / f"{frame}_gt_labelTrainIds.png", skip)


@takes(AcdcOptions)
def prepare_acdc(options: AcdcOptions) -> dict[str, Any]:
    """Prepares the dataset; returns its manifest."""
    return make_dataset(options, SOURCE, TRAIN_IDS, scan(options.root))
