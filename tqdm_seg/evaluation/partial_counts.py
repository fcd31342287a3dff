"""Counts of the frames that were scored so far, on disk, so that a run that was killed goes on from them.

    PARTS/0001-0000.counts    what process 0 of the first start has scored, batch after batch
    PARTS/0002-0001.counts    process 1 of the second

A batch is appended whole: a header with the number of frames and a checksum, then the frames' numbers in the index and
their counts, int64 each. What a killed process wrote of a batch without finishing it is not read. No file is written by
two processes or two starts, so that any number of processes can go on from what any other number has done.

Letters: N frames, K classes.
"""

import os
import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

_HEADER = struct.Struct("<4sII")
_MAGIC = b"TQC1"


class Scored(NamedTuple):
    """Numbers (N,) int64 of frames in their index, and their counts (N, K, K + 1) int64."""

    rows: np.ndarray
    counts: np.ndarray


def append_batch(path: Path, rows: np.ndarray, counts: np.ndarray) -> None:
    """Appends the counts (N, K, K + 1) int64 of frames `rows` (N,) int64, and returns when they are on disk."""
    content = np.concatenate([rows[:, None], counts.reshape(len(rows), -1)], 1).tobytes()
    with path.open("ab") as file:
        file.write(_HEADER.pack(_MAGIC, len(rows), zlib.crc32(content)) + content)
        file.flush()
        os.fsync(file.fileno())


def new_part(folder: Path, process: int) -> Path:
    """Where one process of a new start writes. All processes must ask before any of them writes."""
    starts = [int(path.name.split("-")[0]) for path in folder.glob("*.counts")]
    return folder / f"{max(starts, default=0) + 1:04d}-{process:04d}.counts"


def read_scored(folder: Path, num_frames: int, num_classes: int) -> Scored:
    """All whole batches of all processes and starts, in the order of the frames.

    Raises ValueError for frames that there are not, or that were scored twice.
    """
    width = 1 + num_classes * (num_classes + 1)
    batches = [_read_batches(path, width) for path in sorted(folder.glob("*.counts"))]
    records = np.concatenate([np.empty((0, width), np.int64), *batches])
    rows = records[:, 0]
    strange = rows[(rows < 0) | (rows >= num_frames)]
    if len(strange):
        raise ValueError(f"{folder} holds frame {strange[0]} of a set of {num_frames}; delete it and evaluate anew")
    row, times = Counter(rows.tolist()).most_common(1)[0] if len(rows) else (0, 1)
    if times > 1:
        raise ValueError(
            f"frame {row} was scored {times} times in {folder}: two programs wrote there at once; delete it and "
            "evaluate anew"
        )
    order = np.argsort(rows)
    return Scored(rows[order], records[order, 1:].reshape(-1, num_classes, num_classes + 1))


def _read_batches(path: Path, width: int) -> np.ndarray:
    """The records (N, width) int64 of a part, up to the first batch that is not whole."""
    content, position, found = path.read_bytes(), 0, [np.empty((0, width), np.int64)]
    while position + _HEADER.size <= len(content):
        magic, frames, checksum = _HEADER.unpack_from(content, position)
        start = position + _HEADER.size
        position = start + 8 * frames * width
        if magic != _MAGIC or zlib.crc32(content[start:position]) != checksum:
            break
        found.append(np.frombuffer(content, np.int64, frames * width, start).reshape(frames, width))
    return np.concatenate(found)
