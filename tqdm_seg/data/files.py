"""Example files, and files and folders that are written whole or not at all. Imports the standard library only."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def example(name: str) -> Path:
    """Path of `name` in the examples: orfd_mini (a prepared dataset), comma10k, frames, quickstart.png.

    They lie inside an installed package and at the root of a checkout. Raises FileNotFoundError for other names.
    """
    for root in (_PACKAGE, _PACKAGE.parent):
        if (root / "examples" / name).exists():
            return root / "examples" / name
    raise FileNotFoundError(f"file not found: {_PACKAGE / 'examples' / name}; install the package again")


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A temporary path with the suffix of `path`; after the block the file written there replaces `path`.

    Makes the folder of `path`. When the block raises, `path` stays as before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        _flush_to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Writes the whole file or, when that fails, nothing."""
    with replace_file(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """A temporary empty folder; after the block it replaces `folder`. When the block raises, `folder` stays as before.

    At every moment one whole version is on disk.
    """
    folder = folder.resolve()
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            _flush_to_disk(path)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    move_folder(temporary, folder)


def move_folder(source: Path, target: Path) -> None:
    """Renames `source` to `target`; a folder already there is deleted, but only after the new one took its name."""
    target = target.resolve()
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    source.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    _flush_to_disk(target.parent)


def _flush_to_disk(path: Path) -> None:
    windows = os.name == "nt"
    if windows and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
