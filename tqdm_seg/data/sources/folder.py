"""Your own pictures and masks to shards.

    python dataset_scripts/prepare_folder.py ROOT MASKS OUT --classes classes.txt

Every picture ROOT/a/b.jpg has the mask MASKS/a/b.png (see --mask-suffix). First-level folders called train, val, test
or the like become splits; without them all is train. classes.txt names one class per line, in the order of the new ids:

    road                     the next id; masks are 8-bit PNGs (grey or palette) whose values are 0, 1, ..., 255 ignored
    road,7                   masks hold other ids: this class is stored as 7
    road,128,64,128          masks hold colours: this class has this one

A name may come twice, with a second id or colour. The name "ignored" takes what is not to be learned.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import run
from ..label_maps import IGNORE_INDEX, LabelMap, Reading
from ..prepare import Pair, Source, first_folder, prepare, prepare_parser

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
        value = int.from_bytes(map(int, values)) if values else new
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
    """All pictures; the scene is the folder that a picture lies in, without its split."""
    for image in (path for path in images.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES):
        place = image.relative_to(images)
        folders = place.parent.parts
        split = SPLIT_FOLDERS.get(folders[0]) if folders else None
        scene = "/".join(folders[1:] if split else folders)
        yield Pair(split or "train", scene, image, masks / place.with_name(f"{image.stem}{suffix}"))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Prepares the dataset; returns its manifest."""
    parser = prepare_parser(__doc__, more="MASKS")
    parser.add_argument("--classes", type=Path, required=True, metavar="FILE", help="class names, see above")
    parser.add_argument("--mask-suffix", default=".png", help="end of the masks' names (default: %(default)s)")
    parser.add_argument("--name", default="Own pictures", help="name of the dataset on its card (default: %(default)s)")
    parser.add_argument("--license", default="unknown", help="licence named on the card (default: %(default)s)")
    args = parser.parse_args(argv)
    terms = "Pictures and masks of a folder."
    pairs = scan(first_folder(args.root, "."), first_folder(args.masks, "."), args.mask_suffix)
    return prepare(args, Source(args.name, terms, args.license), read_classes(args.classes), pairs)


if __name__ == "__main__":
    run(main)
