"""How long `tqdm-seg audit` takes for the images of two sets, and where the time goes.

    python benchmarks/audit_speed.py

hashing      images per second from file to perceptual hash, 1280 x 720 PNG and JPEG, and what Pillow needs only to
             decode the same files on the same threads; in turns, the best round counts
comparison   seconds and peak memory (arrays and Python objects) for two sets of random hashes, all pairs
audit        both together. The images are generated with as much detail as a real frame of ORFD (2 bytes per pixel as
             PNG) and read from the file cache, so a slow disk or network comes on top.
"""

import os
import tempfile
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from measure import main, seconds_of, take_turns
from PIL import Image

from tqdm_seg.data.audit import HASH, hash_or_problem, nearest_hashes, read_set
from tqdm_seg.program import option

HEIGHT, WIDTH = 720, 1280
SAVE_OPTIONS = {"PNG": {}, "JPEG": {"quality": 90}}


@dataclass(kw_only=True)
class AuditSettings:
    """Options."""

    images: int = option(24, help="files per kind (default: %(default)s)")
    rounds: int = option(5, help="repetitions (default: %(default)s)")
    first: int = option(25_000, help="hashes of one set (default: %(default)s)")
    second: int = option(12_000, help="hashes of the other (default: %(default)s)")


def detailed_image(seed: int) -> Image.Image:
    """Clouds and sensor noise, which together compress as a photograph does."""
    rng = np.random.default_rng(seed)
    clouds = Image.fromarray(rng.integers(0, 256, (9, 16, 3), np.uint8))
    pixels = np.asarray(clouds.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    pixels = pixels + rng.normal(0, 8, (HEIGHT, WIDTH, 1)) + rng.normal(0, 2.5, (HEIGHT, WIDTH, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def decode(frame: Any) -> None:
    """Reads and decodes one frame."""
    with Image.open(BytesIO(frame.read())) as image:
        image.load()


def on_threads(work: Callable[[Any], object], frames: list[Any]) -> None:
    """As the audit does it."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(work, frames))


def hashing_rates(kind: str, settings: AuditSettings) -> tuple[float, float, float]:
    """Kilobytes of a file, images per second hashed and only decoded; a round reads every file four times."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(settings.images):
            detailed_image(i).save(Path(folder) / f"{i:03d}.{kind.lower()}", kind, **SAVE_OPTIONS[kind])
        frames = read_set(folder).frames * 4
        timers = {f.__name__: partial(seconds_of, on_threads, f, frames) for f in (hash_or_problem, decode)}
        hashed, decoded = (len(frames) / min(r.rounds) for r in take_turns(timers, settings.rounds))
        sizes = [path.stat().st_size / 1000 for path in Path(folder).iterdir()]
        return sum(sizes) / len(sizes), hashed, decoded


def measure_audit(settings: AuditSettings) -> None:
    """Measures and prints."""
    rng, first, second = np.random.default_rng(0), settings.first, settings.second
    compare = partial(nearest_hashes, *(rng.random((n, HASH * HASH)) < 0.5 for n in (first, second)), distance=4)
    taken = seconds_of(compare)
    tracemalloc.start()
    compare()  # again, as watching the memory takes time
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    print(f"comparison  {first:,} x {second:,} hashes: {taken:.2f} s, peak memory {peak:.0f} MiB")
    audits = []
    for kind in SAVE_OPTIONS:
        kilobytes, hashed, decoded = hashing_rates(kind, settings)
        print(
            f"hashing     {kind:<4} {WIDTH} x {HEIGHT}, {kilobytes:.0f} kB: {hashed:.1f} images/s; "
            f"decoded only {decoded:.1f} images/s; ratio {hashed / decoded:.2f}"
        )
        audits.append(f"{((first + second) / hashed + taken) / 60:.1f} min if all are such {kind}s")
    print(f"audit       {first:,} x {second:,} images: {', '.join(audits)}; {os.cpu_count()} CPUs, files in the cache")


if __name__ == "__main__":
    main(measure_audit, AuditSettings, __doc__)
