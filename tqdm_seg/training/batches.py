"""Which frame is trained on when, and the batches made of it."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data.frames import Frame, PlainRows
from .augment import TrainTransform, normalise
from .options import TrainOptions
from .sets import FrameSets

# Samples planned at once.
PLAN_BLOCK = 2**16
# Samples, about, in which several sets have exactly the shares of their weights.
BLOCK = 1024


# One sample of the plan: a frame, the class that it was drawn for (-1: none), the seeds of its augmentation and of all
# other chance, such as dropout.
DRAW = np.dtype([("frame", np.int64), ("wanted", np.int64), ("seed", np.uint64), ("chance", np.int32)])


@dataclass(frozen=True)
class RareClassSampling:
    """First a class, then a frame with enough of it (DAFormer, and the published recipe with temperature 100).

    Class c is drawn with probability softmax((1 - f_c) / temperature), f_c its share of the labelled pixels, over the
    classes that occur; then one of the frames with more than `min_pixels` of it. At 100 all classes are equally
    likely to within 1 %; at DAFormer's 0.01 the rarest classes take almost all draws.
    """

    temperature: float = 100
    min_pixels: int = 3000

    def probabilities(self, class_pixels: np.ndarray) -> np.ndarray:
        """class_pixels (R, K) -> (K,) float64, 0 for classes that do not occur."""
        totals = class_pixels.sum(0)
        if not totals.any():
            raise ValueError("no pixel of the training frames is labelled; there is nothing to learn")
        weights = np.exp((1 - totals / totals.sum()) / self.temperature - 1 / self.temperature) * (totals > 0)
        return weights / weights.sum()


def largest_minimum(class_pixels: np.ndarray) -> int:
    """The largest --min-pixels with which every class that occurs can be drawn; class_pixels (R, K)."""
    most = class_pixels.max(0)
    return int(most[most > 0].min()) - 1


def check_minimum(sets: Mapping[str, np.ndarray], minimum: int, classes: Sequence[str] = ()) -> None:
    """Raises ValueError when a class occurs in a set, but in no frame of it with more than `minimum` pixels.

    sets: labelled pixels (R, K) of every class in every frame, by the name of the set. classes: names, for the message.
    """
    lacking = []
    for name, class_pixels in sets.items():
        most = class_pixels.max(0)
        of_set = f" in {name}" if len(sets) > 1 else ""
        lacking += [
            f"{classes[k] if classes else k}{of_set}" for k in np.flatnonzero((most > 0) & (most <= minimum)).tolist()
        ]
    if lacking:
        more = f" and {len(lacking) - 3} more classes" if len(lacking) > 3 else ""
        workable = min(largest_minimum(class_pixels) for class_pixels in sets.values() if class_pixels.any())
        raise ValueError(
            f"no frame has more than {minimum} pixels of {', '.join(lacking[:3])}{more}, so none can be drawn for "
            f"them; use --min-pixels {workable} or less, or --sampling permutation"
        )


def random_words(seed: int, first: int, last: int) -> np.ndarray:
    """Four random words of every sample first ... last - 1: (last - first, 4) uint64, a function of (seed, sample)."""
    # Philox is a function of (key, counter); a counter gives four words.
    return np.random.Philox(key=seed, counter=first).random_raw(4 * (last - first)).reshape(-1, 4)


class TrainPlan:
    """Which frame every sample of a run shows; a pure function of (seed, sample).

    class_pixels (R, K) int64, labelled pixels of every class in every frame; names: of the classes, for messages.
    sampling: rare classes, or None: every epoch shows all frames in a new order. number: of the set among several.
    Raises ValueError when a class occurs, but in no frame with more than `min_pixels` of it.
    """

    def __init__(
        self, class_pixels: np.ndarray, seed: int, sampling: RareClassSampling | None, names: Sequence[str] = (),
        number: int | None = None,
    ):  # fmt: skip
        self.seed, self.sampling, self.num_frames = seed, sampling, len(class_pixels)
        self.stream = [seed] if number is None else [seed, number]
        if sampling is None:
            return
        self.limits = sampling.probabilities(class_pixels).cumsum()
        check_minimum({"": class_pixels}, sampling.min_pixels, names)
        enough = class_pixels > sampling.min_pixels
        self.counts = enough.sum(0)  # (K,) frames to choose from
        self.members = np.nonzero(enough.T)[1]  # frames of class 0, of class 1, ...
        self.starts = self.counts.cumsum() - self.counts

    def draws(self, first: int, last: int) -> np.ndarray:
        """Samples first ... last - 1: (last - first,) of type DRAW."""
        return self.pick(random_words(self.seed, first, last), np.arange(first, last))

    def pick(self, words: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """The samples of these numbers (S,) and random words (S, 4): (S,) of type DRAW."""
        draws = np.empty(len(words), DRAW)
        draws["seed"], draws["chance"] = words[:, 2], words[:, 3] >> np.uint64(33)
        if self.sampling is None:
            draws["frame"], draws["wanted"] = self._permuted(samples), -1
            return draws
        uniform = (words[:, :2] >> np.uint64(11)) * 2.0**-53  # in [0, 1)
        wanted = np.minimum(np.searchsorted(self.limits, uniform[:, 0], "right"), np.flatnonzero(self.counts)[-1])
        draws["frame"] = self.members[self.starts[wanted] + (uniform[:, 1] * self.counts[wanted]).astype(np.int64)]
        draws["wanted"] = wanted
        return draws

    def _permuted(self, samples: np.ndarray) -> np.ndarray:
        epochs, places = np.divmod(samples, self.num_frames)
        frames = np.empty_like(samples)
        for epoch in np.unique(epochs):
            order = np.random.default_rng([*self.stream, epoch]).permutation(self.num_frames)
            frames[epochs == epoch] = order[places[epochs == epoch]]
        return frames


class MixedPlan:
    """Which frame of several sets every sample shows; a pure function of (seed, sample).

    Every block of about a thousand samples holds each set exactly by its weight, in an order of its own. Within its
    samples a set is drawn from as if it were alone. Frames are numbered through all sets.
    """

    def __init__(self, plans: Sequence[TrainPlan], weights: Sequence[Fraction], seed: int):
        self.plans, self.seed = plans, seed
        unit = math.lcm(*(weight.denominator for weight in weights))
        counts = np.array([int(weight * unit) for weight in weights])
        counts //= math.gcd(*counts.tolist())
        if counts.sum() > 1000 * BLOCK:
            raise ValueError(f"the weights of --data, {', '.join(map(str, weights))}, are too far apart; round them")
        counts *= max(BLOCK // int(counts.sum()), 1)
        self.pattern, self.counts = np.repeat(np.arange(len(plans)), counts), counts
        self.firsts = np.cumsum([0, *(plan.num_frames for plan in plans)])

    def draws(self, first: int, last: int) -> np.ndarray:
        """Samples first ... last - 1: (last - first,) of type DRAW."""
        samples, words = np.arange(first, last), random_words(self.seed, first, last)
        sets, numbers = self.places(samples)
        draws = np.empty(len(samples), DRAW)
        for number, plan in enumerate(self.plans):
            chosen = sets == number
            draws[chosen] = plan.pick(words[chosen], numbers[chosen])
            draws["frame"][chosen] += self.firsts[number]
        return draws

    def places(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The set of every sample, and which one of that set's samples it is: both (S,) int64."""
        blocks, places = np.divmod(samples, len(self.pattern))
        sets, numbers = np.empty_like(samples), np.empty_like(samples)
        for block in np.unique(blocks):
            order = np.random.default_rng([self.seed, block, len(self.plans)]).permutation(self.pattern)
            ranks = np.empty_like(order)
            for number in range(len(self.plans)):
                ranks[order == number] = np.arange(self.counts[number]) + block * self.counts[number]
            inside = blocks == block
            sets[inside], numbers[inside] = order[places[inside]], ranks[places[inside]]
        return sets, numbers


def make_plan(options: TrainOptions, training: FrameSets) -> TrainPlan | MixedPlan:
    """The plan of a run; raises ValueError for a --min-pixels with which a class cannot be drawn."""
    rare = RareClassSampling(options.temperature, options.min_pixels) if options.sampling == "rare-class" else None
    pixels = training.class_pixels
    if len(pixels) == 1:
        return TrainPlan(pixels[0], options.seed, rare, training.classes)
    if rare is not None:
        check_minimum(
            dict(zip((s.name for s in training.sets), pixels, strict=True)), rare.min_pixels, training.classes
        )
    plans = [TrainPlan(of_set, options.seed, rare, training.classes, number) for number, of_set in enumerate(pixels)]
    return MixedPlan(plans, [part.weight for part in training.sets], options.seed)


def planned_batches(
    plan: TrainPlan | MixedPlan, first_step: int, last_step: int, batch_size: int, parts: int = 1, process: int = 0,
    processes: int = 1,
) -> Iterator[np.ndarray]:  # fmt: skip
    """The draws (batch_size,) of every batch that one process reads, for steps first_step ... last_step - 1.

    A step consists of `parts` (accumulated) batches per process. Rows number all samples of a step, so two runs with
    the same rows per step see the same samples, however they are divided among parts and processes.
    """
    rows = batch_size * parts * processes
    block = max(PLAN_BLOCK // rows, 1)
    for start in range(first_step, last_step, block):
        draws = plan.draws(start * rows, min(start + block, last_step) * rows)
        for number in range(process, len(draws) // batch_size, processes):
            yield draws[number * batch_size : (number + 1) * batch_size]


class TrainSamples(Dataset):
    """Augmented frames by record of type DRAW."""

    def __init__(self, frames: FrameSets, transform: TrainTransform):
        self.frames, self.transform = frames, transform

    def __getitem__(self, draw: np.void) -> dict[str, Tensor | str]:
        frame, wanted, seed, chance = draw.item()
        return augmented(self.frames[frame], self.transform, seed, wanted) | {"chance": chance}


def augmented(
    frame: Frame, transform: TrainTransform, seed: int | list[int], wanted: int = -1
) -> dict[str, Tensor | str]:
    """The fields of a `Crop`, key and scene of a frame, augmented by `seed`."""
    crop = transform(frame.image, frame.labels, np.random.default_rng(seed), wanted)
    return {**crop._asdict(), "key": frame.key, "scene": frame.scene}


def collate(samples: list[dict[str, Tensor | str]], num_classes: int) -> dict[str, Tensor | list[str]]:
    """Stacked `image` (B, h, w, 3) and `labels` (B, h, w) uint8, `size` (B, 2); lists `key` and `scene`.

    mask_index (M, 2): image and class of every supervised mask; made on the CPU, because on a GPU its data-dependent
    size would make the host wait for the device.
    """
    class_pixels = torch.from_numpy(np.stack([sample["class_pixels"] for sample in samples]))  # (B, 255)
    return {
        "image": torch.stack([sample["image"] for sample in samples]),
        "labels": torch.stack([sample["labels"] for sample in samples]),
        "size": torch.tensor([sample["size"] for sample in samples]),
        "mask_index": class_pixels[:, :num_classes].nonzero(),
        "chance": torch.tensor([sample["chance"] for sample in samples], dtype=torch.int32),
        "key": [sample["key"] for sample in samples],
        "scene": [sample["scene"] for sample in samples],
    }


def model_inputs(batch: dict[str, Tensor | list[str]], device: torch.device) -> dict[str, Tensor]:
    """`pixel_values` (B, 3, h, w) float32, `labels` (B, h, w) int64 and `mask_index` of a batch, on the device."""
    moved = {name: batch[name].to(device, non_blocking=True) for name in ("image", "size", "labels", "mask_index")}
    return {
        "pixel_values": normalise(moved["image"], moved["size"]),
        "labels": moved["labels"].long(),
        "mask_index": moved["mask_index"],
    }


def train_loader(samples: Dataset, batches: Iterable[Any], num_classes: int, workers: int) -> DataLoader:
    """Loader over `planned_batches` or `plain_batches`.

    It is already divided among processes: `Accelerator.prepare` would divide it again.
    """
    return DataLoader(
        samples, batch_sampler=batches, collate_fn=partial(collate, num_classes=num_classes), num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )  # fmt: skip


class PlainSamples(Dataset):
    """Augmented frames by (number, undecoded row): workers get the bytes, only the main process reads the source."""

    def __init__(self, source: PlainRows, transform: TrainTransform, seed: int):
        self.source, self.transform, self.seed = source, transform, seed

    def __getitem__(self, numbered: tuple[int, dict[str, Any]]) -> dict[str, Tensor | str]:
        number, row = numbered
        chance = int(np.random.SeedSequence([self.seed, number, 1]).generate_state(1)[0] >> 1)
        return augmented(self.source.frame(row, number), self.transform, [self.seed, number]) | {"chance": chance}


def plain_batches(
    source: PlainRows, seed: int, first_batch: int, last_batch: int, batch_size: int, process: int = 0,
    processes: int = 1,
) -> Iterator[list[tuple[int, dict[str, Any]]]]:  # fmt: skip
    """Batches first_batch ... last_batch - 1 of one process: rows with numbers that no other process uses."""
    rows = islice(source.rows(process, processes, seed), first_batch * batch_size, last_batch * batch_size)
    numbered = ((process + processes * i, row) for i, row in enumerate(rows, first_batch * batch_size))
    while batch := list(islice(numbered, batch_size)):
        yield batch


def step_batches(
    options: TrainOptions, training: FrameSets | PlainRows, first_step: int, process: int, processes: int
) -> Iterator[dict[str, Any]]:
    """Batches that this process trains on from `first_step` on, as `collate` makes them."""
    transform = TrainTransform(options.crop, min_class_pixels=options.min_pixels // 2, resize=options.resize)
    if isinstance(training, PlainRows):
        samples = PlainSamples(training, transform, options.seed)
        first, last = (step * options.accumulation for step in (first_step, options.steps))
        batches = plain_batches(training, options.seed, first, last, options.batch_size, process, processes)
    else:
        plan = make_plan(options, training)
        samples = TrainSamples(training, transform)
        batches = planned_batches(
            plan, first_step, options.steps, options.batch_size, options.accumulation, process, processes
        )
    return iter(train_loader(samples, batches, len(training.classes), options.workers))


def first_now(batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same batches; the first one is made now, so that bad data is an error before anything is written."""
    return chain(list(islice(batches, 1)), batches)
