"""Options of the programs that prepare, check and audit datasets."""

from dataclasses import dataclass
from pathlib import Path

from ..program import option


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Is a prepared dataset folder what its manifest says?

    Checks sizes and checksums of all files, every row against the index, that labels hold classes only, and their
    counts. With several folders also that their labels may be used together: the same classes, and not two maps of one
    kind. Exit status 1, and the first bad row of every bad shard, if not.
    """

    folders: tuple[Path, ...] = option(nargs="+", type=Path, metavar="FOLDER", help="folders that `prepare` made")
    workers: int | None = option(None, help="processes (default: one per CPU)")
