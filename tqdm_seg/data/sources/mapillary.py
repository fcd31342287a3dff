"""Mapillary Vistas to shards: `tqdm-seg prepare mapillary`."""

import sys

from ...commands import start

if __name__ == "__main__":
    sys.exit(start("prepare mapillary"))


from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...program import takes
from ..files import read_json
from ..folders import find
from ..label_maps import MAPILLARY
from ..options import MapillaryOptions
from ..prepare import Pair, Source, first_folder, make_dataset

SOURCE = Source(
    "Mapillary Vistas",
    "Mapillary Vistas must not be passed on: keep this folder, and any repository made of it, private.",
    published={"train": (18000,), "validation": (2000,)},
)
# v2.0 has 124 ids; read with the table for v1.2 most of them would be another class without an error.
V1_2_IDS = 66


def labels_folder(part: Path) -> Path:
    """Folder of the v1.2 labels of training/ or validation/ in either package."""
    if (part / "v2.0").is_dir() and not (part / "v1.2").is_dir():
        raise FileNotFoundError(
            f"{part} holds v2.0 labels only; unpack v1.2 as well, the maps to 19 classes are for it"
        )
    config = part.parent / "config.json"
    if not (part / "v1.2").is_dir() and config.is_file():
        ids = len(read_json(config, {"labels": list})["labels"])
        if ids != V1_2_IDS:
            raise ValueError(f"{config} names {ids} classes, v1.2 has {V1_2_IDS}; take the v1.2 labels")
    return first_folder(part, "v1.2/labels", "labels")


def scan(root: Path) -> Iterator[Pair]:
    """All frames of either package."""
    first_folder(root, "training", "validation")
    for folder, split in {"training": "train", "validation": "validation"}.items():
        images = list(find(root / folder / "images", "*.jpg"))
        labels = labels_folder(root / folder) if images else root
        for image in images:
            yield Pair(split, "", image, labels / f"{image.stem}.png")
    for image in find(root / "testing" / "images", "*.jpg"):
        yield Pair("test", "", image, None, "no labels are published for testing")


@takes(MapillaryOptions)
def prepare_mapillary(options: MapillaryOptions) -> dict[str, Any]:
    """Prepares the dataset; returns its manifest."""
    return make_dataset(options, SOURCE, MAPILLARY[options.map], scan(options.root))
