"""What a human would want to know of the data before the first step: `tqdm-seg train --doctor`.

Letters: R frames, K classes.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from itertools import islice

import numpy as np
from PIL import Image

from ..data.audit import CheckResult, FrameSet, NamedFrame, compare_images, find_same_frames, find_same_scenes
from ..data.frames import FrameDataset, PlainRows
from ..data.images import orientation
from ..data.shards import read_frame
from ..program import cut
from .batches import largest_minimum
from .options import TrainOptions
from .sets import FrameSets, same_frames, shared_scenes

# Rows that are looked at where there is no index.
ROWS, FIRST_ROWS = 200, 32
# Bits of 64 in which the hashes of two images differ at most that count as one image, as `tqdm-seg audit` has it.
DISTANCE = 4
_MODES = {"1": "black and white", "L": "grey", "LA": "grey with alpha", "P": "palette", "I;16": "grey", "I": "grey"}


@dataclass
class Survey:
    """What a part of the data holds. class_pixels (R, K); sizes: frames by (height, width).

    Reading the images through `noting` fills the rest: files: images by kind; turned: (key, orientation, is square) of
    images that EXIF turns.
    """

    title: str
    class_pixels: np.ndarray
    sizes: Counter[tuple[int, int]]
    images: FrameSet
    files: Counter[str] = field(default_factory=Counter)
    turned: list[tuple[str, int, bool]] = field(default_factory=list)

    @property
    def ignored(self) -> float:
        """The ignored part of all pixels."""
        pixels = sum(height * width * count for (height, width), count in self.sizes.items())
        return 1 - self.class_pixels.sum() / pixels

    def noting(self, key: str, read: Callable[[], bytes]) -> bytes:
        """The bytes of an image file, whose kind and orientation are noted."""
        file = read()
        try:
            with Image.open(BytesIO(file)) as image:
                kind, turn = file_kind(file, image), orientation(image)
                if turn != 1:
                    self.turned.append((key, turn, image.width == image.height))
        except Exception as error:  # of broken files Pillow raises almost anything; the audit names them
            kind = f"unreadable ({type(error).__name__})"
        self.files[kind] += 1
        return file


def file_kind(file: bytes, image: Image.Image) -> str:
    """'8-bit RGB PNG' of the bytes of an image file and the image opened from them."""
    bits = 8
    if image.format == "PNG":
        bits = file[24]  # of the header chunk; Pillow's mode does not tell 16-bit colour
    elif image.format == "TIFF":
        bits = max(image.tag_v2.get(258, (1,)))
    elif image.mode.startswith("I"):
        bits = 16
    return f"{bits}-bit {_MODES.get(image.mode, image.mode)} {image.format}"


def survey_index(title: str, frames: FrameDataset) -> Survey:
    """Of an indexed part."""
    table = frames.index.table
    sizes = Counter(zip(table["height"].to_pylist(), table["width"].to_pylist(), strict=True))
    found = Survey(title, frames.index.class_pixels, sizes, FrameSet(title, []))

    def file(row: int) -> bytes:
        return found.noting(frames.keys[row], lambda: read_frame(frames.index, row)[0])

    named = zip(frames.keys, frames.scenes, strict=True)
    found.images = FrameSet(title, [NamedFrame(*names, partial(file, row)) for row, names in enumerate(named)])
    return found


def survey_rows(title: str, frames: PlainRows, most: int = ROWS) -> Survey:
    """Of the first rows of a part without an index."""
    count = len(frames.classes)
    found = Survey(title, np.empty((0, count), np.int64), Counter(), FrameSet(title, []))
    pixels, named = [], []
    for number, row in enumerate(islice(frames.rows(), most)):
        frame = frames.frame(row, number)
        pixels.append(np.bincount(frame.labels.ravel(), minlength=256)[:count])
        found.sizes[frame.labels.shape] += 1
        file = frames.file(row)
        named.append(NamedFrame(frame.key, frame.scene, partial(found.noting, frame.key, lambda file=file: file)))
    found.class_pixels, found.images = np.array(pixels), FrameSet(title, named)
    return found


def survey(training: FrameSets | PlainRows, validation: FrameDataset | PlainRows) -> list[Survey]:
    """Of every training set and, last, the held-back part."""
    if isinstance(training, PlainRows):
        return [survey_rows("train", training), survey_rows("held back", validation)]
    trained = [survey_index(part.name or "train", part.frames) for part in training.sets]
    return [*trained, survey_index("held back", validation)]


# -- what is alarming ---------------------------------------------------------------------------------------


def alarms(training: FrameSets | PlainRows, validation: FrameDataset | PlainRows) -> list[str]:
    """What an index, or without one the first frames, tell at once and every training says at its start."""
    if isinstance(training, PlainRows):
        first = survey_rows(f"the first {FIRST_ROWS} frames to train on", training, FIRST_ROWS)
        absent = absent_classes(training.classes, first.class_pixels.sum(0), first.title)
        return absent + [line for line in [mask_alarm(first, training.classes)] if line]
    found = class_alarms(training, validation)
    if same_frames(training, validation):
        found.append(SAME_FRAMES)
    elif shared := shared_scenes(training, validation):
        found.append(f"scenes in both parts, whose neighbouring frames look alike: {cut(', '.join(shared), 200)}")
    return found


SAME_FRAMES = "the frames to evaluate on are trained on, too; the score says nothing of other frames"


def class_alarms(training: FrameSets, validation: FrameDataset) -> list[str]:
    """A sentence each on classes without a pixel and on masks that are likely 0 and 255."""
    found = []
    for what, pixels in (("train", training.class_pixels), ("evaluate", [validation.index.class_pixels])):
        totals = sum(of_set.sum(0) for of_set in pixels)
        found += absent_classes(training.classes, totals, f"the frames to {what} on")
    surveyed = [survey_index(part.name or "train", part.frames) for part in training.sets]
    return found + [line for part in surveyed if (line := mask_alarm(part, training.classes))]


def absent_classes(classes: list[str], pixels: np.ndarray, where: str) -> list[str]:
    """A sentence on the classes that have no pixel, pixels (K); none if all have some."""
    absent = [name for name, count in zip(classes, pixels, strict=True) if not count]
    return [f"classes without a pixel in {where}: {cut(', '.join(absent), 200)}"] if absent else []


def mask_alarm(part: Survey, classes: list[str]) -> str:
    """A sentence if the masks of a part are likely 0 and 255, of which 255 is ignored; "" if not."""
    present = np.flatnonzero(part.class_pixels.sum(0))
    if len(present) != 1 or len(classes) < 2 or not part.ignored:
        return ""
    return (
        f"labels of {part.title} hold {classes[present[0]]} and {part.ignored:.0%} ignored pixels only: if the masks "
        f"are 0 and 255, prepare them with '{classes[0]},0' and '{classes[1]},255' in the class file"
    )


def leak_lines(training: list[Survey], validation: Survey) -> Iterator[str]:
    """What the audit finds in both parts; reads every image."""
    first = FrameSet("train", [frame for part in training for frame in part.images.frames])
    images, problems = compare_images(first, validation.images, DISTANCE, wanted=True)
    for find in (find_same_scenes, find_same_frames):
        try:
            yield from leak_line(find(first, validation.images))
        except ValueError as error:  # names that are almost a time
            yield f"scenes and frames in both parts: not looked for by name, {error}"
            break
    yield from leak_line(images)
    yield from problems[:3]


def leak_line(result: CheckResult) -> Iterator[str]:
    """A sentence of what a check found, or why it could not look."""
    if result.skipped:
        yield f"{result.check.name}: not looked for, {result.skipped}"
    elif result.findings:
        trained, held = ({getattr(f, side) for f in result.findings} for side in ("first", "second"))
        first = min(result.findings, key=lambda finding: finding.amount or 0)
        yield (
            f"{result.check.name}: {len(held)} held back, {len(trained)} trained on, such as {cut(first.second)} and "
            f"{cut(first.first)}; see tqdm-seg audit"
        )


def turn_lines(part: Survey, turned_labels: Sequence[str]) -> Iterator[str]:
    """Doubts about orientations of a part; turned_labels: keys of labels that `prepare` turned with their images."""
    if not part.turned:
        return
    labels = len({key for key, *_ in part.turned}.intersection(turned_labels))
    doubtful = [key for key, turn, square in sorted(part.turned) if turn < 5 or square]
    yield f"{len(part.turned)} images of {part.title} are turned or mirrored by EXIF, {labels} labels with them"
    if doubtful:
        yield (
            f"of {len(doubtful)} of them the size does not tell whether the label is, too: look at {cut(doubtful[0])}"
        )


# -- the page -----------------------------------------------------------------------------------------------


def doctor_page(options: TrainOptions, training: FrameSets | PlainRows, validation: FrameDataset | PlainRows) -> str:
    """The page that --doctor prints. Reads every image once, or the first rows where there is no index."""
    parts, indexed = survey(training, validation), isinstance(training, FrameSets)
    if indexed:
        found, manifests = class_alarms(training, validation), [*training.manifests, validation.index.manifest]
    else:
        found = [line for part in parts if (line := mask_alarm(part, list(training.classes)))]
        manifests = [{}, {}]
    if same_frames(training, validation):
        found.append(SAME_FRAMES)
        for frame in parts[-1].images.frames:
            frame.read()
    else:
        found += leak_lines(parts[:-1], parts[-1])
    for part, manifest in zip(parts, manifests, strict=True):
        found += turn_lines(part, manifest.get("labels_turned_by_exif", ()))
    lines = table(parts, list(training.classes))
    lines += [f"files of {part.title}: {counted(part.files)}" for part in parts]
    lines += [f"sizes of {part.title}, height x width: {counted(sized(part))}" for part in parts]
    if indexed:
        lines.append(minimum_line(options, training))
    else:
        lines.append(f"read without an index: the first {ROWS} rows of each part at most")
    return "\n".join([*lines, "", *(["to look at:", *(f"- {line}" for line in found)] if found else ["no alarm"])])


def table(parts: list[Survey], classes: list[str]) -> list[str]:
    """Frames, scenes, and the share of every class among the labelled pixels, a column per part."""
    rows = [["", *(part.title for part in parts)], ["frames", *(str(part.sizes.total()) for part in parts)]]
    rows.append(["scenes", *(str(len(part.images.scenes) or "-") for part in parts)])
    rows.append(["ignored, % of pixels", *(f"{100 * part.ignored:.2f}" for part in parts)])
    totals = [part.class_pixels.sum(0) for part in parts]
    for number, name in enumerate(classes):
        shares = (f"{100 * of[number] / of.sum():.2f}" if of[number] else "none" for of in totals)
        rows.append([f"{cut(name, 40)}, % of labels", *shares])
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))])
        for row in rows
    ]


def sized(part: Survey) -> Counter[str]:
    """Frames of a part by 'height x width'."""
    return Counter({f"{height}x{width}": count for (height, width), count in part.sizes.items()})


def counted(counts: Counter[str], most: int = 4) -> str:
    """'40 8-bit RGB JPEG, 2 8-bit grey PNG', the most frequent ones."""
    rest = len(counts) - most
    shown = ", ".join(f"{count} {name}" for name, count in counts.most_common(most))
    return f"{shown} and {rest} more kinds" if rest > 0 else shown


def minimum_line(options: TrainOptions, training: FrameSets) -> str:
    """The largest --min-pixels that works."""
    workable = min((largest_minimum(pixels) for pixels in training.class_pixels if pixels.any()), default=0)
    ends = " works" if options.min_pixels <= workable else " is refused"
    if options.sampling != "rare-class":
        ends = " is not used"
    return f"largest workable --min-pixels: {workable}; {options.min_pixels}{ends} with --sampling {options.sampling}"
