"""Speed of the training loader beside the bare decoding of the same files, and its memory.

    python benchmarks/loader_speed.py [--data FOLDER --split train] [--workers 2] [--samples 400] [--memory 2000]

Without --data it makes 64 frames of 1914x1052, GTA5's size, out of the comma10k frames in examples/: enlarged, shifted
and with sensor noise, about 2.5 MB a picture like GTA5's. Both sides are the same DataLoader over the same frames in
the same order, in alternating runs; bare decoding reads a frame's bytes and decodes picture and label with Pillow, as
`datasets` does, or with OpenCV, as the loader does, which then also scales, crops, distorts, collates and hands over.
Speeds are per second of processor time of all processes together, so that other work on the machine matters little.
Writes loader.json and .md to --out; seconds are there processor seconds per sample.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil
import torch
from measure import RESULTS, Result, Settings, markdown_table, run_facts, speed_ratio
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from tqdm_seg.data.files import write_whole
from tqdm_seg.data.frames import FrameDataset
from tqdm_seg.data.images import decode_rgb, decode_unchanged
from tqdm_seg.data.options import PrepareOptions
from tqdm_seg.data.prepare import Pair, Source, make_dataset
from tqdm_seg.data.shards import read_frame
from tqdm_seg.data.sources.folder import read_classes
from tqdm_seg.training.augment import TrainTransform
from tqdm_seg.training.batches import RareClassSampling, TrainPlan, TrainSamples, planned_batches, train_loader

COMMA = Path(__file__).parents[1] / "examples" / "comma10k"


def make_frames(folder: Path, count: int) -> str:
    """A prepared dataset of pictures and masks of GTA5's size; returns its folder."""
    rng = np.random.default_rng(0)
    sources = sorted((COMMA / "images" / "test").glob("*.png"))
    pairs = []
    for i in range(count):
        source = sources[i % len(sources)]
        left, top = rng.integers(0, 100, 2)
        box = (int(left), int(top), int(left) + 1064, int(top) + 585)  # of 1164x874, in the shape of the result
        picture = Image.open(source).convert("RGB").resize((1914, 1052), Image.Resampling.BICUBIC, box)
        noisy = np.asarray(picture, np.int16) + rng.integers(-2, 3, (1052, 1914, 3))
        mask = Image.open(COMMA / "masks" / "test" / source.name).convert("RGB")
        mask = np.asarray(mask.resize((1914, 1052), Image.Resampling.NEAREST, box))
        pair = Pair("train", "", folder / "raw" / f"{i:03d}.png", folder / "raw" / f"{i:03d}_mask.png")
        pair.image.parent.mkdir(exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(pair.image)
        Image.fromarray(mask).save(pair.label)
        pairs.append(pair)
    options = PrepareOptions(root=folder / "raw", out=folder / "shards", workers=1)
    make_dataset(options, Source("comma10k, enlarged", "MIT"), read_classes(COMMA / "classes.csv"), pairs)
    return str(folder / "shards")


def by_pillow(image: bytes, label: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Picture and label."""
    return np.asarray(Image.open(BytesIO(image))), np.asarray(Image.open(BytesIO(label)))


def by_opencv(image: bytes, label: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Picture and label."""
    return decode_rgb(image), decode_unchanged(label)


class BareDecode(Dataset):
    """Bytes to arrays and nothing else."""

    def __init__(self, frames: FrameDataset, decoder: Callable[[bytes, bytes], tuple[np.ndarray, np.ndarray]]):
        self.frames, self.decoder = frames, decoder

    def __getitem__(self, draw: np.void) -> int:
        image, label = self.decoder(*read_frame(self.frames.index, int(draw["frame"])))
        return image.size + label.size


def batches_of(frames: FrameDataset, samples: int, batch_size: int) -> list[np.ndarray]:
    """The published plan over the frames."""
    plan = TrainPlan(frames.index.class_pixels, 0, RareClassSampling())
    return list(planned_batches(plan, 0, samples // batch_size, batch_size))


def processor_seconds() -> float:
    """Processor time of this process and its workers so far."""
    me = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (me, *me.children(recursive=True)))


def rate(loader: DataLoader, workers: int, batch_size: int) -> float:
    """Samples per processor second, from when every worker has delivered a batch to when the first may stop."""
    batches, count = iter(loader), 0
    for _ in range(max(workers, 1)):
        next(batches)
    start = processor_seconds()
    for _ in range(len(loader) - 3 * max(workers, 1)):
        next(batches)
        count += batch_size
    return count / (processor_seconds() - start)


def memory() -> float:
    """MB that this process and its workers hold, shared pages counted once."""
    me = psutil.Process()
    return sum(process.memory_full_info().pss for process in (me, *me.children(recursive=True))) / 1e6


def write(out: Path, rates: dict[str, list[float]], workers: int, memory_mb: float) -> None:
    """loader.json, as every suite writes it, and loader.md; rates: samples per second and core, of every round."""
    results = [
        Result(name, statistics.median(1 / rate for rate in values), [1 / rate for rate in values])
        for name, values in rates.items()
    ]
    *bare, ours = results
    ours.memory = int(memory_mb * 1e6)
    title = f"Training loader, {workers} workers"
    facts = run_facts(Settings(len(ours.rounds), device="cpu", threads=1))
    suite = {"title": title, "baselines": [result.name for result in bare], "facts": facts}
    suite["contenders"] = [asdict(result) for result in results]
    header = ["", "samples per second and core", *(f"speed / {result.name}'s (least to most)" for result in bare)]
    rows = []
    for result in results:
        ratios = [speed_ratio(result, other) for other in bare]
        cells = (f"{median:.3f} ({least:.3f} to {most:.3f})" for median, least, most in ratios)
        rows.append([result.name, f"{1 / result.seconds:.1f}", *cells])
    page = (
        f"# {title}\n\n{markdown_table(header, rows)}\n\n{facts['date']}, {facts['processor']}, medians of "
        f"{facts['repeats']} rounds in turns. Memory at the end: {memory_mb:.0f} MB.\n\n`{facts['command']}`\n"
    )
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "loader.json", (json.dumps(suite, indent=1) + "\n").encode())
    write_whole(out / "loader.md", page.encode())


def main() -> None:
    """Prints both speeds, their ratio and the memory over time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="prepared dataset, by default one is made")
    parser.add_argument("--split", default="train", help="split of --data (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=240, help="samples per timed run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--memory", type=int, default=2000, help="samples of the memory run (default: %(default)s)")
    parser.add_argument("--resize", default="window", help="as in train.py (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        frames = FrameDataset(args.data or make_frames(Path(folder), 64), args.split)
        frames.cache = None
        samples, batch_size = TrainSamples(frames, TrainTransform(resize=args.resize)), 8
        order = batches_of(frames, args.samples, batch_size)

        def loader(batches: list[np.ndarray]) -> DataLoader:
            return train_loader(samples, batches, len(frames.classes), args.workers)

        loaders = {
            name: DataLoader(BareDecode(frames, decoder), batch_sampler=order, num_workers=args.workers)
            for name, decoder in (("decoding by Pillow", by_pillow), ("decoding by OpenCV", by_opencv))
        } | {"training loader": loader(order)}
        rates = {name: [] for name in loaders}
        for _ in range(args.rounds):
            for name, values in rates.items():
                values.append(rate(loaders[name], args.workers, batch_size))
        for name, values in rates.items():
            print(f"{name}: {statistics.median(values):.1f} samples per second and core ({args.workers} workers)")
        *bare, ours = rates.items()
        for name, values in bare:
            ratios = [mine / theirs for mine, theirs in zip(ours[1], values, strict=True)]
            spread = f"{min(ratios):.3f} to {max(ratios):.3f} of {args.rounds}"
            print(f"training loader / {name}: median {statistics.median(ratios):.3f}, {spread}")

        marks = {args.memory * quarter // (4 * batch_size) for quarter in (1, 2, 3, 4)}
        for number, _ in enumerate(loader(batches_of(frames, args.memory, batch_size)), 1):
            if number in marks:
                held = memory()
                print(f"after {number * batch_size} samples: {held:.0f} MB")
        write(args.out, rates, args.workers, held)


if __name__ == "__main__":
    main()
