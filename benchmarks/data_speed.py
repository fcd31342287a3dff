"""Speed of the training loader, the audit and the confusion matrix, next to the bare libraries, in turns.

    python benchmarks/data_speed.py loader [--data FOLDER --split train] [--workers 2] [--samples 400] [--memory 2000]
    python benchmarks/data_speed.py audit [--images 24] [--sets 25000 12000]
    python benchmarks/data_speed.py metric [--size 1024x2048] [--classes 19]

loader   Processor seconds per sample of all processes together, so that other work on the machine matters little, and
         memory over a long run. Bare decoding reads a frame's bytes and decodes image and label with Pillow, as
         `datasets` does, or with OpenCV, as the loader does, which then also scales, crops, distorts, collates and
         hands over. Without --data, frames of GTA5's size are made. Writes loader.json and .md to --out.
audit    Seconds from file to perceptual hash on all threads, next to decoding by Pillow, for 1280x720 PNG and JPEG with
         the detail of ORFD (2 bytes per pixel as PNG), in the file cache; seconds and peak memory (arrays and Python
         objects) of comparing two sets of random hashes, all pairs; minutes of both together.
metric   Seconds per map on one thread, next to torchmetrics with and without its checks. Raises ValueError if the two
         count differently. Needs torchmetrics (`pip install -e ".[test]"`).
"""

import tempfile
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import psutil
import torch
from measure import Result, Settings, main, results_table, seconds_of, take_turns, write_results
from PIL import Image
from torch.utils.data import DataLoader

from tqdm_seg.commands import start
from tqdm_seg.data.audit import HASH, NamedFrame, hash_or_problem, nearest_hashes, read_set
from tqdm_seg.data.files import example
from tqdm_seg.data.frames import FrameDataset
from tqdm_seg.data.shards import read_frame
from tqdm_seg.evaluation.metrics import confusion_matrix
from tqdm_seg.program import option, size
from tqdm_seg.training.augment import TrainTransform
from tqdm_seg.training.batches import RareClassSampling, TrainPlan, TrainSamples, planned_batches, train_loader

BATCH = 8


@dataclass(kw_only=True)
class DataSettings(Settings):
    """Options."""

    what: Literal["loader", "audit", "metric"] = option(help="what is measured")
    data: str | None = option(None, group="loader", help="prepared dataset (default: one is made)")
    split: str = option("train", group="loader", help="of --data")
    workers: int = option(2, group="loader", help="loader processes")
    samples: int = option(240, group="loader", help="samples per timed run")
    memory: int = option(2000, group="loader", help="samples of the memory run")
    resize: str = option("window", group="loader", help="as in train.py")
    images: int = option(64, group="loader and audit", help="files that are made")
    sets: tuple[int, int] = option((25_000, 12_000), group="audit", type=int, nargs=2, help="hashes of the two sets")
    size: tuple[int, int] = option((1024, 2048), group="metric", type=size, metavar="HxW", help="of the maps")
    classes: int = option(19, group="metric", help="number of classes")


def make_frames(folder: Path, count: int, size: tuple[int, int], noise: int, suffix: str = "png") -> None:
    """Images and masks of that height and width: frames of comma10k, shifted, enlarged and with sensor noise."""
    rng, masks = np.random.default_rng(0), example("comma10k") / "masks" / "test"
    sources = sorted((example("comma10k") / "images" / "test").glob("*.png"))
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        source, (left, top) = sources[i % len(sources)], rng.integers(0, 100, 2).tolist()
        shape, box = size[::-1], (left, top, left + 1064, top + 585)  # of 1164x874
        image = Image.open(source).convert("RGB").resize(shape, Image.Resampling.BICUBIC, box)
        noisy = np.asarray(image, np.int16) + rng.integers(-noise, noise + 1, (*size, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{i:03d}.{suffix}", quality=90)
        mask = Image.open(masks / source.name).convert("RGB").resize(shape, Image.Resampling.NEAREST, box)
        mask.save(folder / "masks" / f"{i:03d}.png")


def by_pillow(content: bytes) -> np.ndarray:
    """The image of a file's bytes."""
    return np.asarray(Image.open(BytesIO(content)))


def by_opencv(content: bytes) -> np.ndarray:
    """The image of a file's bytes."""
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)


def bare_decode(frames: FrameDataset, decode: Callable[[bytes], np.ndarray], draws: np.ndarray) -> int:
    """Reads and decodes a batch and does nothing else."""
    return sum(decode(content).size for draw in draws for content in read_frame(frames.index, int(draw["frame"])))


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


def prepared_frames(settings: DataSettings, folder: Path) -> FrameDataset:
    """Those of --data, or new ones of GTA5's size, about 2.5 MB an image."""
    data = settings.data or str(folder / "shards")
    if settings.data is None:
        make_frames(folder, settings.images, (1052, 1914), noise=2)
        words = [folder / "images", folder / "masks", "--class-file", example("comma10k") / "classes.csv"]
        if start("prepare folder", [*map(str, words), "--out", data, "--workers", "1"]):
            raise ValueError("the frames could not be prepared, see above")
    return FrameDataset(data, settings.split)


def measure_loader(settings: DataSettings, folder: Path) -> None:
    """Seconds of the three sides, and the memory over time."""
    frames, workers = prepared_frames(settings, folder), settings.workers
    frames.cache = None
    samples = TrainSamples(frames, TrainTransform(resize=settings.resize))
    plan = TrainPlan(frames.index.class_pixels, 0, RareClassSampling())  # the published one

    def batches(count: int) -> list[np.ndarray]:
        return list(planned_batches(plan, 0, count // BATCH, BATCH))

    order = batches(settings.samples)
    decoders = {"decoding by Pillow": by_pillow, "decoding by OpenCV": by_opencv}
    loaders = {
        name: DataLoader(order, None, collate_fn=partial(bare_decode, frames, decode), num_workers=workers)
        for name, decode in decoders.items()
    } | {"training loader": train_loader(samples, order, len(frames.classes), workers)}
    timers = {name: partial(seconds_per_sample, loader, workers) for name, loader in loaders.items()}
    results = take_turns(timers, settings.repeats)
    print(results_table(results, list(decoders)))

    marks = {settings.memory * quarter // (4 * BATCH) for quarter in (1, 2, 3, 4)}
    for number, _ in enumerate(train_loader(samples, batches(settings.memory), len(frames.classes), workers), 1):
        if number in marks:  # proportional set size: shared pages count once
            results[-1].memory = int(of_all_processes(lambda process: process.memory_full_info().pss))
            print(f"after {number * BATCH} samples: {results[-1].memory / 1e6:.0f} MB")
    title = f"Training loader: processor seconds per sample, memory at the end, {workers} workers"
    write_results(settings, "loader", title, results, list(decoders))


def hash_results(folder: Path, suffix: str, settings: DataSettings) -> list[Result]:
    """Seconds per image of hashing and of decoding alone; a round reads every file four times."""
    make_frames(folder / suffix, settings.images, (720, 1280), noise=10, suffix=suffix)
    frames = read_set(str(folder / suffix / "images")).frames * 4

    def seconds_per_image(work: Callable[[NamedFrame], object]) -> float:
        with ThreadPoolExecutor() as pool:  # as the audit does it
            return seconds_of(lambda: list(pool.map(work, frames))) / len(frames)

    works = {f"hashing {suffix}": hash_or_problem, f"decoding {suffix}": lambda frame: by_pillow(frame.read())}
    return take_turns({name: partial(seconds_per_image, work) for name, work in works.items()}, settings.repeats)


def measure_audit(settings: DataSettings, folder: Path) -> None:
    """Hashing, comparison, both."""
    rng, (first, second) = np.random.default_rng(0), settings.sets
    compare = partial(nearest_hashes, *(rng.random((n, HASH * HASH)) < 0.5 for n in settings.sets), distance=4)
    (comparison,) = take_turns({"comparison": partial(seconds_of, compare)}, settings.repeats)
    tracemalloc.start()
    compare()  # again, as watching the memory takes time
    comparison.memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"{first:,} x {second:,} hashes:\n{results_table([comparison], [])}")
    for suffix in ("png", "jpg"):
        results = hash_results(folder, suffix, settings)
        minutes = ((first + second) * results[0].seconds + comparison.seconds) / 60
        print(f"{results_table(results, [results[1].name])}\naudit of {first:,} x {second:,}: {minutes:.1f} min")


def street_maps(height: int, width: int, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prediction and ground truth (H, W) uint8: blocks of one class, an eighth predicted wrong, a tenth ignored."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(num_classes, (1, 1, 32, 64), generator=generator).float()
    truth = torch.nn.functional.interpolate(blocks, (height, width))[0, 0].to(torch.uint8)
    wrong = torch.rand(truth.shape, generator=generator) < 1 / 8
    prediction = torch.where(wrong, (truth + 1) % num_classes, truth)
    truth[: height // 10] = 255
    return prediction, truth


def measure_metric(settings: DataSettings, folder: Path) -> None:
    """A table for each pair of number formats."""
    from torchmetrics.classification import MulticlassConfusionMatrix

    prediction, truth = street_maps(*settings.size, settings.classes)
    for maps in ((prediction, truth), (prediction.long(), truth), (prediction.long(), truth.long())):
        calls = {"ours": partial(confusion_matrix, *maps, settings.classes)} | {
            name: partial(MulticlassConfusionMatrix(settings.classes, ignore_index=255, validate_args=checks), *maps)
            for name, checks in {"torchmetrics": True, "torchmetrics without checks": False}.items()
        }
        ours, theirs = calls["ours"](), calls["torchmetrics"]()
        if not torch.equal(ours[:, :-1], theirs) or ours[:, -1].any():
            raise ValueError("the two count differently; compare metrics.py with torchmetrics' confusion matrix")
        results = take_turns({name: partial(seconds_of, call) for name, call in calls.items()}, settings.repeats)
        print(f"prediction {maps[0].dtype}, ground truth {maps[1].dtype}:\n{results_table(results, list(calls)[1:])}")


def measure_data(settings: DataSettings) -> None:
    """Measures what is asked for; torch has one thread."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        programs = {"loader": measure_loader, "audit": measure_audit, "metric": measure_metric}
        programs[settings.what](settings, Path(folder))


if __name__ == "__main__":
    main(measure_data, DataSettings, __doc__)
