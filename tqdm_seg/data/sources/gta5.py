"""GTA5 (Playing for Data) to shards.

python dataset_scripts/prepare_gta5.py ROOT OUT

ROOT/images/00001.png                the ten image archives, unpacked into one folder,
ROOT/labels/00001.png                and the ten label archives
ROOT/images/{train,valid,test}/...   or divided into sub-folders of the same names on both sides
ROOT/split.mat                       with --splits official: the list from the download page
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import run
from ..label_maps import GTA5
from ..prepare import Pair, Source, by_name, first_folder, prepare, prepare_parser

LISTS = Path(__file__).parent / "robustnet_splits"
TERMS = "GTA5 must not be passed on: keep this folder, and any repository made of it, private."
PUBLISHED = {"robustnet": (12388, 6382, 6181), "official": (12403, 6382, 6181)}
# Sizes of picture and label differ in the public release.
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
    lists = loadmat(root / "split.mat")
    keys = {"train": "trainIds", "validation": "valIds", "test": "testIds"}
    return {f"{int(number):05d}.png": split for split, key in keys.items() for number in lists[key].ravel()}


def scan(root: Path, choice: str) -> Iterator[Pair]:
    """All frames; those in no list are the single-colour ones, which RobustNet left out on purpose."""
    splits = read_splits(choice, root)
    images, labels = first_folder(root, "images"), first_folder(root, "labels")
    for name, image in by_name([*images.glob("*.png"), *images.glob("*/*.png")]).items():
        skip = "" if name in splits else f"in no list of the {choice} split"
        if name in MISMATCHED:
            skip = "sizes of picture and label differ in the public release"
        yield Pair(splits.get(name, ""), "", image, labels / image.relative_to(images), skip)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Prepares the dataset; returns its manifest."""
    parser = prepare_parser(__doc__)
    parser.add_argument(
        "--splits",
        choices=sorted(PUBLISHED),
        default="robustnet",
        help="robustnet: the lists that TLDR and tqdm use, without 15 single-colour frames; official: ROOT/split.mat",
    )
    args = parser.parse_args(argv)
    # Of each list one frame has a label of another size: 15188 in train, 17705 in test.
    train, validation, test = PUBLISHED[args.splits]
    source = Source("GTA5", TERMS, published={"train": (train - 1,), "validation": (validation,), "test": (test - 1,)})
    return prepare(args, source, GTA5, scan(args.root, args.splits), splits=args.splits)


if __name__ == "__main__":
    run(main)
