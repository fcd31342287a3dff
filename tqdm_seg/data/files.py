"""Files written whole or not at all, and the one way in which a program fails."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """The file with all its content on disk, or none of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` once the block has ended well and all is on disk."""
    folder = folder.resolve()
    temporary, old = (folder.with_name(f".{folder.name}.{word}") for word in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            _fsync(path)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)  # not deleted yet: at every moment one whole version is on disk
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    _fsync(folder.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def run(main: Callable[[], object]) -> None:
    """Calls `main`; what it reports as an error becomes one message and exit status 1."""
    try:
        main()
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command again to go on")
