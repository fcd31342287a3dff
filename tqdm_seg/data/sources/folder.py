"""Your own images and masks to shards: `tqdm-seg prepare folder`."""

import sys

from ...commands import start

if __name__ == "__main__":
    sys.exit(start("prepare folder"))


from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...program import takes
from ..label_maps import IGNORE_INDEX, LabelMap, Reading
from ..options import FolderOptions
from ..prepare import Pair, Source, first_folder, make_dataset

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
SPLIT_FOLDERS = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
IGNORED = "ignored"


def read_classes(path: Path) -> LabelMap:
    """The label map that a class file describes; ValueError naming the line that is wrong."""
    ids: dict[str, int] = {IGNORED: IGNORE_INDEX}
    table: dict[int, int] = {}
    kinds = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        name, *values = (part.strip() for part in line.split(","))
        if not name or len(values) not in (0, 1, 3) or not all(v.isdecimal() and int(v) <= 255 for v in values):
            raise ValueError(f"{path} line {number}: {line!r} is not NAME or NAME,ID or NAME,R,G,B with numbers to 255")
        kinds.add(len(values))
        new = ids.setdefault(name, len(ids) - 1)
        value = int.from_bytes(map(int, values), "big") if values else new
        if len(kinds) > 1 or value in table:
            what = "its id or colour was named before" if len(kinds) == 1 else "lines have ids, colours, or neither"
            raise ValueError(f"{path} line {number}: {line!r}: {what}; every line needs its own, of one kind")
        table[value] = new
    reading: Reading = "colours" if kinds == {3} else "values"
    if reading == "values":
        table.setdefault(IGNORE_INDEX, IGNORE_INDEX)
    classes = tuple(name for name in ids if name != IGNORED)
    policy = f"ids or colours as listed in {path.name}; " + (
        "every other colour is an error" if reading == "colours" else "255 is ignored, every other value is an error"
    )
    return LabelMap(f"folder/{path.stem}", classes, reading, tuple(table.items()), policy)


def scan(images: Path, masks: Path, suffix: str) -> Iterator[Pair]:
    """All images; the scene is the folder that an image lies in, without its split."""
    for image in (path for path in images.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES):
        place = image.relative_to(images)
        folders = place.parent.parts
        split = SPLIT_FOLDERS.get(folders[0]) if folders else None
        scene = "/".join(folders[1:] if split else folders)
        yield Pair(split or "train", scene, image, masks / place.with_name(f"{image.stem}{suffix}"))


@takes(FolderOptions)
def prepare_folder(options: FolderOptions) -> dict[str, Any]:
    """Prepares the dataset; returns its manifest."""
    source = Source(options.name, "Images and masks of a folder.", options.license)
    pairs = scan(first_folder(options.root, "."), first_folder(options.masks, "."), options.mask_suffix)
    return make_dataset(options, source, read_classes(options.class_file), pairs)
