"""How long `tqdm-seg audit` takes for the pictures of two sets, and where the time goes.

    python benchmarks/audit_speed.py

Measures, on this machine and in one run,
    hashing      pictures per second from file to perceptual hash, for 1280 x 720 PNG and JPEG files, beside what
                 Pillow needs only to decode the same files on the same threads; rounds alternate, the best counts
    comparison   seconds and peak memory (arrays and Python objects) for two sets of random hashes, all pairs
and prints what both come to for a whole audit. The pictures are generated with as much detail as a real frame of ORFD
has (2 bytes per pixel as PNG) and are read from the file cache, so a slow disk or network comes on top.
"""

import argparse
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from tqdm_seg.data.audit import HASH, FrameSet, NamedFrame, hash_images, nearest_hashes

HEIGHT, WIDTH = 720, 1280
# Options of Pillow per kind of file.
KINDS = {"PNG": {}, "JPEG": {"quality": 90}}


def generated(seed: int) -> Image.Image:
    """A picture of clouds and sensor noise; both together compress as a photograph does."""
    rng = np.random.default_rng(seed)
    clouds = Image.fromarray(rng.integers(0, 256, (9, 16, 3), np.uint8)).resize(
        (WIDTH, HEIGHT), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(clouds) + rng.normal(0, 8, (HEIGHT, WIDTH, 1)) + rng.normal(0, 2.5, (HEIGHT, WIDTH, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_pictures(folder: Path, kind: str, count: int) -> list[Path]:
    """Picture files of one kind."""
    paths = [folder / f"{i:03d}.{kind.lower()}" for i in range(count)]
    for i, path in enumerate(paths):
        generated(i).save(path, kind, **KINDS[kind])
    return paths


def decode(part: FrameSet) -> None:
    """What no audit of pictures can do without: reading and decoding, on as many threads as the audit uses."""

    def load(frame: NamedFrame) -> None:
        with Image.open(BytesIO(frame.read())) as image:
            image.load()

    with ThreadPoolExecutor() as pool:
        list(pool.map(load, part.frames))


def seconds(work: Callable[[], object]) -> float:
    """Time that it takes once."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def hashing_rates(paths: list[Path], rounds: int) -> tuple[float, float]:
    """Pictures per second hashed and only decoded, each in its best round; a round reads every file four times."""
    part = FrameSet("benchmark", [NamedFrame(path.name, "", partial(Path.read_bytes, path)) for path in paths * 4])
    times = [(seconds(lambda: hash_images(part)), seconds(lambda: decode(part))) for _ in range(rounds)]
    hashed, decoded = (len(part.frames) / min(column) for column in zip(*times, strict=True))
    return hashed, decoded


def comparison(first: int, second: int) -> tuple[float, float]:
    """Seconds and peak MiB of comparing so many random hashes; memory in a second run, as watching it takes time."""
    rng = np.random.default_rng(0)
    hashes = [rng.random((count, HASH * HASH)) < 0.5 for count in (first, second)]
    taken = seconds(lambda: nearest_hashes(*hashes, distance=4))
    tracemalloc.start()
    nearest_hashes(*hashes, distance=4)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return taken, peak


def main(argv: list[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=24, metavar="N", help="files per kind (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="repetitions (default %(default)s)")
    parser.add_argument(
        "--first", type=int, default=25_000, metavar="N", help="hashes of one set (default %(default)s)"
    )
    parser.add_argument("--second", type=int, default=12_000, metavar="N", help="of the other (default %(default)s)")
    args = parser.parse_args(argv)

    taken, peak = comparison(args.first, args.second)
    print(f"comparison  {args.first:,} x {args.second:,} hashes: {taken:.2f} s, peak memory {peak:.0f} MiB")
    total = args.first + args.second
    audits = []
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            paths = write_pictures(Path(folder), kind, args.pictures)
            kilobytes = sum(path.stat().st_size for path in paths) / len(paths) / 1000
            hashed, decoded = hashing_rates(paths, args.rounds)
        print(
            f"hashing     {kind:<4} {WIDTH} x {HEIGHT}, {kilobytes:.0f} kB: {hashed:.1f} pictures/s; "
            f"decoded only {decoded:.1f} pictures/s; ratio {hashed / decoded:.2f}"
        )
        audits.append(f"{(total / hashed + taken) / 60:.1f} min if all are such {kind}s")
    print(f"audit       {args.first:,} x {args.second:,} pictures: {', '.join(audits)}")
    print(f"            {total:,} / rate + comparison, on {os.cpu_count()} CPUs, files in the cache; grows with pixels")


if __name__ == "__main__":
    main()
