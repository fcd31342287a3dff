"""Speed of the training loader and of bare decoding of the same files, and its memory.

    python benchmarks/loader_speed.py [--data FOLDER --split train] [--workers 2] [--samples 400] [--memory 2000]

Without --data it makes 64 frames of 1914x1052, GTA5's size, from the comma10k frames in examples/: enlarged, shifted
and with sensor noise, about 2.5 MB an image like GTA5's. All sides are the same DataLoader over the same frames in the
same order, in turns; bare decoding reads a frame's bytes and decodes image and label with Pillow, as `datasets` does,
or with OpenCV, as the loader does, which then also scales, crops, distorts, collates and hands over. Seconds are
processor seconds per sample, of all processes together, so that other work on the machine matters little. Writes
loader.json and .md to --out.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import psutil
import torch
from measure import Settings, main, results_table, take_turns, write_results
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from tqdm_seg.commands import start
from tqdm_seg.data.files import example
from tqdm_seg.data.frames import FrameDataset
from tqdm_seg.data.shards import read_frame
from tqdm_seg.program import option
from tqdm_seg.training.augment import TrainTransform
from tqdm_seg.training.batches import RareClassSampling, TrainPlan, TrainSamples, planned_batches, train_loader

BATCH, SIZE = 8, (1914, 1052)


@dataclass(kw_only=True)
class LoaderSettings(Settings):
    """Options."""

    data: str | None = option(None, help="prepared dataset (default: one is made)")
    frames: int = option(64, help="frames that are made (default: %(default)s)")
    split: str = option("train", help="of --data (default: %(default)s)")
    workers: int = option(2, help="loader processes (default: %(default)s)")
    samples: int = option(240, help="samples per timed run (default: %(default)s)")
    memory: int = option(2000, help="samples of the memory run (default: %(default)s)")
    resize: str = option("window", help="as in train.py (default: %(default)s)")


def make_frames(folder: Path, count: int) -> str:
    """A prepared dataset of images and masks of GTA5's size; returns its folder."""
    rng, raw = np.random.default_rng(0), folder / "raw"
    sources = sorted((example("comma10k") / "images" / "test").glob("*.png"))
    (raw / "images").mkdir(parents=True)
    (raw / "masks").mkdir()
    for i in range(count):
        source, (left, top) = sources[i % len(sources)], rng.integers(0, 100, 2).tolist()
        box = (left, top, left + 1064, top + 585)  # of 1164x874, in the shape of the result
        image = Image.open(source).convert("RGB").resize(SIZE, Image.Resampling.BICUBIC, box)
        noisy = np.asarray(image, np.int16) + rng.integers(-2, 3, (*SIZE[::-1], 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(raw / "images" / f"{i:03d}.png")
        mask = Image.open(example("comma10k") / "masks" / "test" / source.name).convert("RGB")
        mask.resize(SIZE, Image.Resampling.NEAREST, box).save(raw / "masks" / f"{i:03d}.png")
    words = [
        raw / "images",
        raw / "masks",
        "--out",
        folder / "shards",
        "--class-file",
        example("comma10k") / "classes.csv",
    ]
    if start("prepare folder", [*map(str, words), "--workers", "1"]):
        raise ValueError("the frames could not be prepared, see above")
    return str(folder / "shards")


def by_pillow(image: bytes, label: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Image and label."""
    return np.asarray(Image.open(BytesIO(image))), np.asarray(Image.open(BytesIO(label)))


def by_opencv(image: bytes, label: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Image and label."""
    image, label = np.frombuffer(image, np.uint8), np.frombuffer(label, np.uint8)
    return cv2.imdecode(image, cv2.IMREAD_COLOR_RGB), cv2.imdecode(label, cv2.IMREAD_UNCHANGED)


class BareDecode(Dataset):
    """Bytes to arrays and nothing else."""

    def __init__(self, frames: FrameDataset, decoder: Callable[[bytes, bytes], tuple[np.ndarray, np.ndarray]]):
        self.frames, self.decoder = frames, decoder

    def __getitem__(self, draw: np.void) -> int:
        image, label = self.decoder(*read_frame(self.frames.index, int(draw["frame"])))
        return image.size + label.size


def of_all_processes(measure: Callable[[psutil.Process], float]) -> float:
    """Sum over this process and its workers."""
    return sum(map(measure, [psutil.Process(), *psutil.Process().children(recursive=True)]))


def seconds_per_sample(loader: DataLoader, workers: int) -> float:
    """Processor seconds, from when every worker has delivered a batch to when the first may stop."""

    def processor_seconds() -> float:
        return of_all_processes(lambda process: sum(process.cpu_times()[:2]))

    batches, count = iter(loader), len(loader) - 3 * max(workers, 1)
    for _ in range(max(workers, 1)):
        next(batches)
    start = processor_seconds()
    for _ in range(count):
        next(batches)
    return (processor_seconds() - start) / (count * BATCH)


def measure_loader(settings: LoaderSettings) -> int:
    """Writes and prints both speeds and the memory over time."""
    torch.set_num_threads(1)
    workers = settings.workers
    with tempfile.TemporaryDirectory() as folder:
        frames = FrameDataset(settings.data or make_frames(Path(folder), settings.frames), settings.split)
        frames.cache = None
        samples = TrainSamples(frames, TrainTransform(resize=settings.resize))
        plan = TrainPlan(frames.index.class_pixels, 0, RareClassSampling())  # the published one

        def batches(count: int) -> list[np.ndarray]:
            return list(planned_batches(plan, 0, count // BATCH, BATCH))

        order = batches(settings.samples)
        decoders = {"decoding by Pillow": by_pillow, "decoding by OpenCV": by_opencv}
        loaders = {
            name: DataLoader(BareDecode(frames, decoder), batch_sampler=order, num_workers=workers)
            for name, decoder in decoders.items()
        } | {"training loader": train_loader(samples, order, len(frames.classes), workers)}
        timers = {name: partial(seconds_per_sample, loader, workers) for name, loader in loaders.items()}
        results = take_turns(timers, settings.repeats)
        print(results_table(results, list(decoders)))

        marks = {settings.memory * quarter // (4 * BATCH) for quarter in (1, 2, 3, 4)}
        long_run = train_loader(samples, batches(settings.memory), len(frames.classes), workers)
        for number, _ in enumerate(long_run, 1):
            if number in marks:  # proportional set size: shared pages count once
                results[-1].memory = int(of_all_processes(lambda process: process.memory_full_info().pss))
                print(f"after {number * BATCH} samples: {results[-1].memory / 1e6:.0f} MB")
    remarks = "Seconds are processor seconds per sample, of all processes together; memory is that at the end of a run."
    title = f"Training loader, {workers} workers"
    return write_results(settings, "loader", title, results, list(decoders), remarks, threads=1)


if __name__ == "__main__":
    main(measure_loader, LoaderSettings, __doc__)
