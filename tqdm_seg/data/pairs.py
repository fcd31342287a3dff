"""Which frame belongs to which split: lists of pairs, and validation frames held out of the training split."""

import csv
import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from .class_files import read_text
from .files import cut
from .folders import split_of
from .prepare import Pair

_FORM = "image,mask[,split[,scene]]"


def read_pairs(path: Path, images: Path, masks: Path) -> list[Pair]:
    """The pairs that a text file lists, separated by commas, semicolons, tabs or (two columns) blanks.

    Paths are under `images` and `masks`. Raises ValueError naming file and line.
    """
    pairs, default = [], split_of(path.stem) or "train"
    lines = [(number, text) for number, text in _lines(path) if not text.startswith("#")]
    usual = next((mark for mark in "\t;," if lines and mark in lines[0][1]), " ")
    for position, (number, text) in enumerate(lines):
        try:
            cells = text.split() if usual == " " else next(csv.reader([text], delimiter=usual, strict=True))
        except csv.Error as error:
            raise ValueError(
                f"{path} line {number}: {cut(text)!r} cannot be divided ({error}); write {_FORM}"
            ) from error
        cells = [cell.strip() for cell in cells]
        if position == 0 and cells[0].lower() in ("image", "images", "img", "file", "image_path"):
            continue
        if not 2 <= len(cells) <= 4 or not cells[0] or not cells[1]:
            raise ValueError(f"{path} line {number}: {cut(text)!r}: expected {_FORM}")
        split = split_of(cells[2]) if len(cells) > 2 and cells[2] else default
        if split is None:
            raise ValueError(
                f"{path} line {number}: split {cut(cells[2])!r} is none of train, val and test; choose one"
            )
        image, mask = _below(path, number, images, cells[0]), _below(path, number, masks, cells[1])
        if not image.is_file():
            raise FileNotFoundError(f"{path} line {number}: file not found: {image}; paths are under {images}")
        pairs.append(Pair(split, cells[3] if len(cells) > 3 else "", image, mask))
    if not pairs:
        raise ValueError(f"{path} lists no pair; write {_FORM} per line")
    twice = [pair.image for i, pair in enumerate(sorted(pairs)) if i and pair.image == sorted(pairs)[i - 1].image]
    if twice:
        raise ValueError(f"{path} lists {twice[0]} twice; leave one out")
    return pairs


def _below(path: Path, number: int, folder: Path, name: str) -> Path:
    found = folder / name
    if not found.is_relative_to(folder) or ".." in found.relative_to(folder).parts:
        raise ValueError(f"{path} line {number}: {cut(name)!r} must lie under {folder}")
    return found


def _lines(path: Path) -> list[tuple[int, str]]:
    texts = enumerate(re.split(r"\r\n|\r|\n", read_text(path)), 1)
    return [(number, text.strip()) for number, text in texts if text.strip()]


def hold_out(pairs: Sequence[Pair], images: Path, share: float, seed: int) -> list[Pair]:
    """The pairs, about `share` of train made validation: whole scenes where there are several, else single frames.

    The choice depends on the seed and the names alone. Raises ValueError where that cannot be done.
    """
    train = _only_train(pairs)
    by_scene = len({pair.scene for pair in train}) > 1
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in train:
        groups[pair.scene if by_scene else pair.image.relative_to(images).as_posix()].append(pair)
    wanted, held = share * len(train), list[Pair]()
    for name in sorted(groups, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest()):
        count = len(held) + len(groups[name])
        if count < len(train) and abs(count - wanted) <= abs(len(held) - wanted):
            held += groups[name]
    if not held:
        held = min(groups.values(), key=len)
    if len(held) == len(train):
        raise ValueError(f"--hold-out {share:g} of {len(train)} frames leaves none to train on; prepare more frames")
    return _held(pairs, {pair.image for pair in held})


def hold_out_listed(pairs: Sequence[Pair], images: Path, path: Path) -> list[Pair]:
    """The pairs, those of train whose scene or image the file lists made validation; ValueError for unknown names."""
    train, held = _only_train(pairs), set[Path]()
    named: dict[str, list[Path]] = defaultdict(list)
    for pair in train:
        place = pair.image.relative_to(images)
        for name in {pair.scene, place.as_posix(), place.name}:
            named[name].append(pair.image)
    for number, name in _lines(path):
        if name.rstrip("/") not in named:
            raise ValueError(
                f"{path} line {number}: {cut(name)!r} is no scene or image of the training split; compare the names"
            )
        held.update(named[name.rstrip("/")])
    if not 0 < len(held) < len(train):
        raise ValueError(f"{path} names {'all' if held else 'no'} frames of the training split; name some")
    return _held(pairs, held)


def _only_train(pairs: Sequence[Pair]) -> list[Pair]:
    if any(pair.split == "validation" for pair in pairs):
        raise ValueError("there is a validation split already; leave out --hold-out and --hold-out-scenes")
    return [pair for pair in pairs if pair.split == "train"]


def _held(pairs: Sequence[Pair], images: set[Path]) -> list[Pair]:
    return [pair._replace(split="validation") if pair.image in images else pair for pair in pairs]
