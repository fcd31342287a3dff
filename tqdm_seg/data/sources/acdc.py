"""ACDC (fog, night, rain, snow) to shards: train and val. The test part has no labels; *_ref are not used.

python dataset_scripts/prepare_acdc.py ROOT OUT

ROOT/rgb_anon/fog/train/GOPR0475/GOPR0475_frame_000041_rgb_anon.png      rgb_anon_trainvaltest.zip
ROOT/gt/fog/train/GOPR0475/GOPR0475_frame_000041_gt_labelTrainIds.png    gt_trainval.zip
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import run
from ..label_maps import TRAIN_IDS
from ..prepare import Pair, Source, first_folder, prepare, prepare_parser

SOURCE = Source(
    "ACDC",
    "ACDC must not be passed on: keep this folder, and any repository made of it, private.",
    published={"train": (1600,), "validation": (406,)},
)


def scan(root: Path) -> Iterator[Pair]:
    """All frames; the scene is condition and drive, "fog/GOPR0475"."""
    images, labels = first_folder(root, "rgb_anon"), first_folder(root, "gt")
    for folder, split in {"train": "train", "val": "validation", "test": "test"}.items():
        for image in images.glob(f"*/{folder}/*/*_rgb_anon.png"):
            drive = image.parent.relative_to(images)
            frame = image.name.removesuffix("_rgb_anon.png")
            skip = "no labels are published for test" if split == "test" else ""
            scene = f"{drive.parts[0]}/{drive.name}"
            yield Pair(split, scene, image, labels / drive / f"{frame}_gt_labelTrainIds.png", skip)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Prepares the dataset; returns its manifest."""
    args = prepare_parser(__doc__).parse_args(argv)
    return prepare(args, SOURCE, TRAIN_IDS, scan(args.root))


if __name__ == "__main__":
    run(main)
