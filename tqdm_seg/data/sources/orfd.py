"""ORFD (Off-Road Freespace Detection) to shards.

    python dataset_scripts/prepare_orfd.py ROOT OUT

    ROOT/training/<scene>/image_data/<frame>.png             and validation/, testing/
    ROOT/training/<scene>/gt_image/<frame>_fillcolor.png
    ROOT/training/{image_data,gt_image}/...                  or without the scene level: scenes are then unknown

ROOT may also be the folder that holds Final_Dataset/.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import run
from ..label_maps import ORFD
from ..prepare import Pair, Source, first_folder, prepare, prepare_parser

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


def prepare_orfd(args: argparse.Namespace, source: Source) -> dict[str, Any]:
    """Prepares ORFD or ORAD-3D; returns the manifest."""
    pairs = scan(args.root)
    notes = []
    if any(not pair.scene for pair in pairs):
        notes.append(
            "the folders have no scene level, so `scene` is empty and no result per scene can be made of this copy; "
            "the official download has training/<scene>/image_data"
        )
    return prepare(args, source, ORFD[args.unreachable], pairs, notes)


def orfd_parser(description: str) -> argparse.ArgumentParser:
    """Arguments of ORFD and ORAD-3D."""
    parser = prepare_parser(description)
    parser.add_argument(
        "--unreachable",
        choices=sorted(ORFD, reverse=True),
        default="merged",
        help="the grey part of the labels (sky): merged into non-traversable as published (default), or ignored",
    )
    return parser


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Prepares the dataset; returns its manifest."""
    return prepare_orfd(orfd_parser(__doc__).parse_args(argv), SOURCE)


if __name__ == "__main__":
    run(main)
