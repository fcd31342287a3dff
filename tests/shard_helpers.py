"""Miniatures of datasets for the tests of preparation: PNGs of kinds that Pillow cannot write, frames, commands."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from tqdm_seg.commands import COMMANDS, named
from tqdm_seg.data.images import decode_image
from tqdm_seg.program import parse

ROOT = Path(__file__).parents[1]
LISTS = ROOT / "tqdm_seg" / "data" / "lists"


def call(command: str, *argv: object) -> Any:
    """What the function of a command returns or raises for a command line."""
    place = COMMANDS[command]
    return named(place.function).__wrapped__(parse(named(place.options), "", [str(word) for word in argv]))


def prepare(name: str, root: Path, out: Path, *argv: object) -> dict[str, Any]:
    """Prepares a dataset in this process; returns its manifest."""
    return call(f"prepare {name}", root, "--out", out, "--workers", 1, *argv)


def png(bits: int, colour: int, rows: list[bytes], width: int, palette: bytes | None = None) -> bytes:
    """A PNG of raw rows; colour: 0 grey, 2 RGB, 3 palette, 4 grey with alpha."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0))]
    chunks += [(b"PLTE", palette)] if palette else []
    chunks += [(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    body = (struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def save(path: Path, array: np.ndarray, palette: list[int] | None = None, **options: Any) -> Path:
    """An 8-bit image file of an (H, W) or (H, W, C) array, its folders made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(array, np.uint8))
    if palette is not None:
        image.putpalette(palette)
    image.save(path, **options)
    return path


def photo(path: Path, height: int = 6, width: int = 8, **options: Any) -> Path:
    """An image of random pixels, the same for the same name."""
    rng = np.random.default_rng(zlib.crc32(path.name.encode()))
    return save(path, rng.integers(0, 256, (height, width, 3)), **options)


def orfd(root: Path, frames: int = 3, scene: str = "y0613_1242", split: str = "training", size: int = 8) -> Path:
    """Frames in the official ORFD layout: black above, grey in one row, white below."""
    folder = root / split / scene
    for i in range(frames):
        labels = np.zeros((size, size))
        labels[size // 2], labels[size // 2 + 1 :] = 128, 255
        photo(folder / "image_data" / f"{1623721490000 + i}.png", size, size)
        save(folder / "gt_image" / f"{1623721490000 + i}_fillcolor.png", labels)
    return root


def stored(out: Path) -> dict[str, dict[str, Any]]:
    """Rows of a dataset folder by key, with `split`, and `labels` as an array."""
    found = {}
    for path in sorted((out / "data").glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            row["split"] = path.name.split("-")[0]
            row["labels"] = np.asarray(decode_image(row["label"]["bytes"]))
            assert row["key"] not in found
            found[row["key"]] = row
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
