"""Folders of images as people keep them: links, hidden files, names of splits in any spelling."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from .files import is_system_file

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
SPLITS = ("train", "validation", "test")
# "train", "Training", "val2017", "testing_B"; not "valley" and not "test_drive".
_SPLIT = re.compile(
    r"(?:(?P<train>train|training|trn)|(?P<validation>val|valid|validation|eval|evaluation|dev)|(?P<test>test|testing))"
    r"(?:[-_ ]?\d+|[-_ ][a-z])?",
    re.IGNORECASE,
)


def split_of(folder: str) -> str | None:
    """The split that a folder's name stands for, whatever its case; None for other names."""
    match = _SPLIT.fullmatch(folder)
    return match.lastgroup if match else None


def is_hidden(path: PurePath | str) -> bool:
    """Whether a relative path is hidden, or one that systems leave behind: no data."""
    return any(part.startswith(".") and part != ".." for part in PurePath(path).parts) or is_system_file(path)


def walk(root: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES, once: bool = False) -> Iterator[Path]:
    """Files with these suffixes in a folder and below it, ordered, links followed, hidden files left out.

    A link back to a folder that it lies in is not followed. once: no folder is read twice, by whatever links.
    Raises OSError for a folder that is closed and FileNotFoundError for a link to nothing: both may hide a whole split.
    """
    seen: set[str] = set()

    def visit(folder: Path, above: frozenset[str]) -> Iterator[Path]:
        real = os.path.realpath(folder)
        if real in (seen if once else above):
            return
        seen.add(real)
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            path = folder / entry.name
            if is_hidden(entry.name):
                continue
            if entry.is_symlink() and not path.exists():
                raise FileNotFoundError(f"{path} links to {os.readlink(path)}, which does not exist; mend or remove it")
            if entry.is_dir():
                yield from visit(path, above | {real})
            elif path.suffix.lower() in suffixes:
                yield path

    return visit(root, frozenset())


def find(root: Path, *patterns: str) -> list[Path]:
    """What matches the patterns below `root`, ordered, linked folders followed, hidden files left out."""
    found = {path for pattern in patterns for path in root.glob(pattern)}
    return sorted(path for path in found if not is_hidden(path.relative_to(root)))
