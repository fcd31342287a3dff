"""Image/label pairs in the ORFD layout, and the published augmentation, a pure function of (seed, step, row).

    <root>/<split>/<scene>/image_data/<frame>.png                  (the scene level may be missing)
    <root>/<split>/<scene>/gt_image/<frame>_fillcolor.png

Letters: B batch, K classes, H, W image, h, w crop, M supervised masks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from tqdm_seg.loss_tqdm import supervised_masks

IGNORE_INDEX = 255
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
# A set smaller than this is kept decoded in memory, once per loader process.
CACHE_BYTES = 256 * 2**20

LabelRule = Literal["orfd", "ids"]
LABEL_RULES: dict[LabelRule, str] = {
    "orfd": "class 1 where the label's brightness (third colour channel) is above 200, else class 0; the grey that "
    f"ORFD gives to the unreachable part (sky) is class 0, not ignored; {IGNORE_INDEX} appears only as padding",
    "ids": f"the pixel value (of a palette image: the index) is the class id, {IGNORE_INDEX} is ignored",
}


class Pair(NamedTuple):
    """Where one frame lies. `scene` is empty in the layout without scene folders, whose paths do not tell it."""

    key: str
    scene: str
    image: Path
    label: Path


class Frame(NamedTuple):
    """One decoded frame: image (H, W, 3) uint8 RGB, labels (H, W) uint8 class ids with 255 ignored."""

    key: str
    scene: str
    image: np.ndarray
    labels: np.ndarray


def find_pairs(root: Path, split: str) -> list[Pair]:
    """All frames of `root/split`, sorted by path; raises FileNotFoundError for missing folders, images or labels."""
    folder = root / split
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {folder}; --data must hold {split}/<scene>/image_data and {split}/<scene>/gt_image"
        )
    flat = (folder / "image_data").is_dir()
    pairs = []
    for scene in [folder] if flat else sorted(folder.iterdir()):
        for image in sorted((scene / "image_data").glob("*")):
            if image.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            label = scene / "gt_image" / f"{image.stem}_fillcolor.png"
            if not label.is_file():
                raise FileNotFoundError(f"image {image} has no label {label}; add the label or remove the image")
            pairs.append(Pair(str(image.relative_to(root)), "" if flat else scene.name, image, label))
    if not pairs:
        raise FileNotFoundError(f"{folder} holds no image; expected {folder}/<scene>/image_data/<frame>.png")
    return pairs


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB; raises ValueError naming the file when it cannot be decoded."""
    image, _ = _decode(path)
    return np.array(image.convert("RGB"))


def read_labels(path: Path, rule: LabelRule, num_classes: int) -> np.ndarray:
    """(H, W) uint8 class ids, 255 ignored, by one of `LABEL_RULES`.

    Raises ValueError naming the file when it cannot be decoded, when its kind does not carry the values that the rule
    needs, and for values that are no class.
    """
    image, raw_mode = _decode(path)
    if rule == "orfd":
        if image.mode not in ("1", "L", "P", "RGB", "RGBA"):
            raise ValueError(f"label {path} is of mode {image.mode}; ORFD labels are 8-bit grey or RGB PNG")
        return (np.asarray(image.convert("RGB"))[..., 2] > 200).astype(np.uint8)
    # Colours are no ids, and Pillow stretches the values of 2- and 4-bit grey files over 0 ... 255.
    if image.mode not in ("L", "P") or raw_mode in ("L;2", "L;4"):
        raise ValueError(
            f"label {path} (mode {raw_mode or image.mode}) holds no class ids that survive reading; save it as 8-bit "
            "grey or palette PNG whose values are the ids"
        )
    ids = np.array(image)
    strange = np.unique(ids[(ids >= num_classes) & (ids != IGNORE_INDEX)])
    if len(strange):
        raise ValueError(
            f"label {path} holds the values {strange.tolist()}, which are no class of 0 ... {num_classes - 1} and not "
            f"the ignored {IGNORE_INDEX}; name all classes with --classes, or map the label files to ids first"
        )
    return ids


def _decode(path: Path) -> tuple[Image.Image, str | None]:
    """The loaded image, and how its pixels are stored in the file where that is one word ("L;4")."""
    try:
        with Image.open(path) as image:
            stored = image.tile[0].args if image.tile else None
            image.load()
    except (OSError, SyntaxError) as error:  # Pillow reports some broken PNGs as SyntaxError
        raise ValueError(f"cannot read {path} ({error}); copy the file anew or remove the frame") from error
    return image, stored if isinstance(stored, str) else None


class FrameDataset(Dataset):
    """Decoded frames by index, kept in memory when all of them are small enough together."""

    def __init__(self, pairs: list[Pair], rule: LabelRule, num_classes: int):
        if rule == "orfd" and num_classes != 2:
            raise ValueError(f"ORFD labels tell two classes apart, not {num_classes}; use --label-rule ids")
        self.pairs, self.rule, self.num_classes = pairs, rule, num_classes
        first = self._read(pairs[0])
        size = len(pairs) * (first.image.nbytes + first.labels.nbytes)
        self.cache: dict[int, Frame] | None = {} if size <= CACHE_BYTES else None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Frame:
        if self.cache is None:
            return self._read(self.pairs[index])
        if index not in self.cache:
            self.cache[index] = self._read(self.pairs[index])
        return self.cache[index]

    def _read(self, pair: Pair) -> Frame:
        image = read_image(pair.image)
        labels = read_labels(pair.label, self.rule, self.num_classes)
        if labels.shape != image.shape[:2]:
            height, width = labels.shape
            raise ValueError(
                f"label {pair.label} is {height}x{width}, its image {image.shape[0]}x{image.shape[1]} (height x "
                "width); use the label that was drawn for this image, or remove the frame"
            )
        return Frame(pair.key, pair.scene, image, labels)


def resize(image: np.ndarray, labels: np.ndarray, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Both scaled by one ratio: bilinear and nearest, without the low-pass filter before shrinking, as OpenCV does."""
    size = [max(round(side * ratio), 1) for side in labels.shape]
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]  # (1, 3, H, W)
    pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    ids = F.interpolate(torch.from_numpy(labels)[None, None], size, mode="nearest")[0, 0]
    return pixels.numpy(), ids.numpy()


def choose_crop(labels: np.ndarray, crop: int, max_class_share: float, rng: np.random.Generator) -> tuple[slice, slice]:
    """Rows and columns of a random crop, drawn anew up to 10 times.

    A crop is taken when more than one class is in it and none covers max_class_share of its labelled pixels; the last
    draw is taken as it is. Sides shorter than `crop` are used whole.
    """

    def draw() -> tuple[slice, slice]:
        top, left = (int(rng.integers(max(side - crop, 0) + 1)) for side in labels.shape)
        return slice(top, top + crop), slice(left, left + crop)

    window = draw()
    for _ in range(10):
        counts = np.bincount(labels[window].ravel(), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
        if (counts > 0).sum() > 1 and counts.max() < max_class_share * counts.sum():
            break
        window = draw()
    return window


def rgb_to_hsv(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 RGB -> (..., 3) uint8 HSV with H in 0 ... 179 (two degrees each), in OpenCV's arithmetic."""
    red, green, blue = np.moveaxis(rgb.astype(np.int32), -1, 0)
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    sector = np.where(
        value == red, green - blue, np.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    )
    saturation = (chroma * _SATURATION_TABLE[value] + 2048) >> 12
    hue = (sector * _HUE_TABLE[chroma] + 2048) >> 12
    return np.stack((np.where(hue < 0, hue + 180, hue), saturation, value), -1).astype(np.uint8)


# 255 / value and 30 / chroma in 12-bit fixed point, 0 for 0.
_SATURATION_TABLE, _HUE_TABLE = (
    np.append(0, np.rint((full << 12) / np.arange(1, 256))).astype(np.int32) for full in (255, 30)
)


def hsv_to_rgb(hsv: np.ndarray) -> np.ndarray:
    """Inverse of `rgb_to_hsv` up to rounding: fractions are cut off, as OpenCV does."""
    hue, saturation, value = np.moveaxis(hsv.astype(np.float32), -1, 0)
    hue, saturation, value = hue * np.float32(6 / 180), saturation * np.float32(1 / 255), value * np.float32(1 / 255)
    sector = np.floor(hue)
    part = hue - sector
    low, falling, rising = (value * (1 - saturation * x) for x in (1, part, 1 - part))
    choices = [
        np.stack(channels, -1)
        for channels in (
            (value, rising, low), (falling, value, low), (low, value, rising),
            (low, falling, value), (rising, low, value), (value, low, falling),
        )
    ]  # fmt: skip
    rgb = np.choose((sector.astype(np.int64) % 6)[..., None], choices)
    return (rgb * 255).astype(np.uint8)


def linear(values: np.ndarray, factor: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """values * factor + shift, cut to 0 ... 255 and to whole numbers: uint8 in, uint8 out."""
    return (values.astype(np.float32) * factor + shift).clip(0, 255).astype(np.uint8)


def distort_colours(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation and hue of (h, w, 3) uint8 RGB, each with probability a half.

    Brightness +-32; contrast and saturation times 0.5 ... 1.5; hue shifted by -18 ... 17 of 180 steps. Contrast comes
    before or after the two colour steps. Every step rounds to uint8, in RGB or HSV, as the published pipeline does.
    """
    brighten, contrast_first, contrast, saturate, turn = rng.random(5) < 0.5
    if brighten:
        image = linear(image, shift=rng.uniform(-32, 32))
    if contrast and contrast_first:
        image = linear(image, rng.uniform(0.5, 1.5))
    if saturate:
        hsv = rgb_to_hsv(image)
        hsv[..., 1] = linear(hsv[..., 1], rng.uniform(0.5, 1.5))
        image = hsv_to_rgb(hsv)
    if turn:
        hsv = rgb_to_hsv(image)
        hsv[..., 0] = (hsv[..., 0].astype(np.int16) + rng.integers(-18, 18)) % 180
        image = hsv_to_rgb(hsv)
    if contrast and not contrast_first:
        image = linear(image, rng.uniform(0.5, 1.5))
    return image


def to_tensors(image: np.ndarray, labels: np.ndarray, size: int) -> tuple[Tensor, Tensor]:
    """pixel_values (3, size, size) float32 by CLIP's mean and deviation, labels (size, size) int64.

    Smaller inputs are padded below and right: pixels with 0 after normalising, labels with 255.
    """
    mean, std = np.float32(OPENAI_CLIP_MEAN), np.float32(OPENAI_CLIP_STD)
    pixels = torch.from_numpy((image / np.float32(255) - mean) / std).permute(2, 0, 1)
    height, width = labels.shape
    padding = (0, size - width, 0, size - height)
    ids = torch.from_numpy(labels.astype(np.int64))
    return F.pad(pixels, padding).contiguous(), F.pad(ids, padding, value=IGNORE_INDEX)


@dataclass(frozen=True)
class TrainTransform:
    """The published augmentation: random scale, crop, flip and colours; every draw comes from the generator given.

    crop: side of the result in pixels. scale: range of the resize ratio. max_class_share: see `choose_crop`.
    """

    crop: int = 512
    scale: tuple[float, float] = (0.5, 2.0)
    max_class_share: float = 0.75

    def __call__(self, image: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """image (H, W, 3) uint8, labels (H, W) uint8 -> pixel_values (3, crop, crop), labels (crop, crop)."""
        image, labels = resize(image, labels, rng.uniform(*self.scale))
        window = choose_crop(labels, self.crop, self.max_class_share, rng)
        image, labels = image[window], labels[window]
        if rng.random() < 0.5:
            image, labels = image[:, ::-1], labels[:, ::-1]
        return to_tensors(distort_colours(image, rng), labels, self.crop)


class TrainDraws(Dataset):
    """Augmented frames by (step, row); the same seed, step and row always give the same frame and augmentation.

    Frames are drawn with replacement, so a run has no epochs, and to go on after an interruption it has to know nothing
    but the step.
    """

    def __init__(self, frames: FrameDataset, transform: TrainTransform, seed: int):
        self.frames, self.transform, self.seed = frames, transform, seed

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor | str]:
        rng = np.random.default_rng([self.seed, *draw])
        frame = self.frames[int(rng.integers(len(self.frames)))]
        pixel_values, labels = self.transform(frame.image, frame.labels, rng)
        return {"pixel_values": pixel_values, "labels": labels, "key": frame.key, "scene": frame.scene}


def batch_draws(
    first_step: int, last_step: int, batch_size: int, parts: int = 1, process: int = 0, processes: int = 1
) -> Iterator[list[tuple[int, int]]]:
    """The (step, row) of every batch that one process reads, for steps first_step ... last_step - 1.

    A step consists of `parts` (accumulated) batches per process. Rows number all samples of a step, so two runs with
    the same rows per step see the same samples, however these are divided among parts and processes.
    """
    for step in range(first_step, last_step):
        for part in range(parts):
            start = (part * processes + process) * batch_size
            yield [(step, row) for row in range(start, start + batch_size)]


def collate(samples: list[dict[str, Tensor | str]], num_classes: int) -> dict[str, Tensor | list[str]]:
    """Stacked `pixel_values` (B, 3, h, w) and `labels` (B, h, w); lists `key` and `scene`; `mask_index` (M, 2).

    mask_index names image and class of every supervised mask. It is made here, on the CPU, because on a GPU its
    data-dependent size would make the host wait for the device.
    """
    labels = torch.stack([sample["labels"] for sample in samples])
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": labels,
        "mask_index": supervised_masks(labels, num_classes, IGNORE_INDEX),
        "key": [sample["key"] for sample in samples],
        "scene": [sample["scene"] for sample in samples],
    }


def train_loader(
    draws: TrainDraws, batches: Iterator[list[tuple[int, int]]], num_classes: int, workers: int
) -> DataLoader:
    """Loader over `batch_draws`. It is already divided among processes: do not hand it to `Accelerator.prepare`."""
    return DataLoader(
        draws, batch_sampler=batches, collate_fn=partial(collate, num_classes=num_classes), num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )  # fmt: skip


def frame_loader(frames: FrameDataset, workers: int, process: int = 0, processes: int = 1) -> DataLoader:
    """Every `processes`-th frame in order, one at a time and unchanged, for evaluation."""
    return DataLoader(
        frames, batch_size=None, sampler=range(process, len(frames), processes), num_workers=workers, collate_fn=_same
    )


def _same(frame: Frame) -> Frame:
    return frame
