"""GTA5 to shards: `tqdm-seg prepare gta5`."""

import sys

from ...commands import start

if __name__ == "__main__":
    sys.exit(start("prepare gta5"))


from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...program import takes
from ..files import cut
from ..folders import find
from ..label_maps import GTA5
from ..options import Gta5Options
from ..prepare import Pair, Source, first_folder, images_by_name, make_dataset

LISTS = Path(__file__).parents[1] / "lists" / "robustnet_splits"
TERMS = "GTA5 must not be passed on: keep this folder, and any repository made of it, private."
PUBLISHED = {"robustnet": (12388, 6382, 6181), "official": (12403, 6382, 6181)}
# Sizes of image and label differ in the public release.
MISMATCHED = {"15188.png", "17705.png"}


def read_splits(choice: str, root: Path) -> dict[str, str]:
    """Split of every listed file name."""
    if choice == "robustnet":
        files = {"train": "train", "validation": "val", "test": "test"}
        return {
            name: split
            for split, part in files.items()
            for name in (LISTS / f"gtav_split_{part}.txt").read_text().split()
        }
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError("split.mat is read by scipy: pip install scipy, or use --splits robustnet") from error
    keys = {"train": "trainIds", "validation": "valIds", "test": "testIds"}
    try:
        lists = loadmat(root / "split.mat")
        return {f"{int(number):05d}.png": split for split, key in keys.items() for number in lists[key].ravel()}
    except OSError:
        raise
    except Exception as error:  # scipy raises almost anything for a broken file
        raise ValueError(f"{root / 'split.mat'} cannot be read ({cut(error, 80)}); download it again") from error


def scan(root: Path, choice: str) -> Iterator[Pair]:
    """All frames; those in no list are the single-colour ones, which RobustNet left out on purpose."""
    splits = read_splits(choice, root)
    images, labels = first_folder(root, "images"), first_folder(root, "labels")
    for name, image in images_by_name(find(images, "*.png", "*/*.png")).items():
        skip = "" if name in splits else f"in no list of the {choice} split"
        if name in MISMATCHED:
            skip = "sizes of image and label differ in the public release"
        yield Pair(splits.get(name, ""), "", image, labels / image.relative_to(images), skip)


@takes(Gta5Options)
def prepare_gta5(options: Gta5Options) -> dict[str, Any]:
    """Prepares the dataset; returns its manifest."""
    # Of each list one frame has a label of another size: 15188 in train, 17705 in test.
    train, validation, test = PUBLISHED[options.splits]
    source = Source("GTA5", TERMS, published={"train": (train - 1,), "validation": (validation,), "test": (test - 1,)})
    return make_dataset(options, source, GTA5, scan(options.root, options.splits), splits=options.splits)
