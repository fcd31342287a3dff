"""YCOR to shards: `tqdm-seg prepare ycor`."""

import sys

from ...commands import start

if __name__ == "__main__":
    sys.exit(start("prepare ycor"))


from pathlib import Path
from typing import Any

from ...program import takes
from ..folders import find
from ..label_maps import Reading, off_road_map
from ..options import YcorOptions
from ..prepare import Pair, Source, first_folder, make_dataset

TERMS = "No licence was found: measure on it, keep this folder, and any image from it, private."
SOURCE = Source("YCOR", TERMS, published={"train": (837,), "validation": (94,), "test": (145, 0)})


def scan(root: Path) -> tuple[list[Pair], Reading]:
    """All frames of the original layout or of the plain one, train in file order, and how their masks are read."""
    train = first_folder(root, "train", "yamaha_v0/train")
    plain = (train / "images").is_dir()
    pairs = []
    for folder, split in ((train, "train"), (train.parent / "valid", "test")):
        if plain:
            images = find(folder, "images/*.jpg")
            pairs += [Pair(split, "", image, folder / "masks" / f"{image.stem}.png") for image in images]
        else:
            pairs += [Pair(split, "", image, image.parent / "labels.png") for image in find(folder, "*/rgb.jpg")]
    return pairs, "values" if plain else "colours"


def hold_out_last(pairs: list[Pair], number: int) -> list[Pair]:
    """The pairs, the last ones of train made validation, which is one place, so one scene; no other scene is known.

    Raises ValueError where none would be left to train on.
    """
    train = [pair for pair in pairs if pair.split == "train"]
    if number >= len(train):
        raise ValueError(f"--hold-out-last {number} of {len(train)} frames leaves none to train on; hold out fewer")
    held = {pair.image for pair in train[len(train) - number :]}
    return [pair._replace(split="validation", scene="held back") if pair.image in held else pair for pair in pairs]


@takes(YcorOptions)
def prepare_ycor(options: YcorOptions) -> dict[str, Any]:
    """Prepares the dataset; returns its manifest."""
    pairs, reading = scan(options.root)
    pairs = hold_out_last(pairs, options.hold_out_last)
    return make_dataset(options, SOURCE, off_road_map("ycor", options.map, reading), pairs)
