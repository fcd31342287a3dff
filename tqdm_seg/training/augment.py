"""The published augmentation on arrays: scale, crop, flip, colours, padding. One generator makes all random draws.

OpenCV does the arithmetic, as in the published pipeline, so that colours and rounding are the same to the bit; the one
deviation is an option (`TrainTransform.resize`). Letters: H, W image, h, w crop.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from tqdm_seg.layers_tqdm import make_vector

from ..data.label_maps import IGNORE_INDEX

cv2.setNumThreads(1)  # the loader's workers are the parallelism

# Redraws of a crop before it is accepted, for both rules that can refuse one.
CROP_TRIES = 10
Window = tuple[slice, slice]


def scaled_size(height: int, width: int, ratio: float) -> tuple[int, int]:
    """Height and width after scaling: truncated, then fitted keeping the shape, as mmcv's rescale does.

    Two roundings that can differ: the box is int(side * ratio), the image the largest of its shape in the box with
    sides rounded half up.
    """
    box = int(width * ratio), int(height * ratio)
    factor = min(max(box) / max(height, width), min(box) / min(height, width))
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


def nearest_window(labels: np.ndarray, size: tuple[int, int], window: Window) -> np.ndarray:
    """That window of labels (H, W) resized to `size` by nearest neighbour: source index floor(i * old / new)."""
    rows, columns = (
        np.minimum(np.floor(np.arange(new)[part] * (1 / (new / old))).astype(np.intp), old - 1)
        for old, new, part in zip(labels.shape, size, window, strict=True)
    )
    return labels[rows][:, columns]


def bilinear_window(image: np.ndarray, size: tuple[int, int], window: Window) -> np.ndarray:
    """That window of image (H, W, 3) uint8 resized to `size`, bilinear between pixel centres, no low-pass filter.

    Only the window is computed. Values are those of the formula, rounded to the nearest.
    """
    (height, width), (rows, columns) = image.shape[:2], window
    y, x = height / size[0], width / size[1]
    to_source = np.array([[x, 0, (columns.start + 0.5) * x - 0.5], [0, y, (rows.start + 0.5) * y - 0.5]])
    shape = min(columns.stop, size[1]) - columns.start, min(rows.stop, size[0]) - rows.start
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, to_source, shape, flags=flags, borderMode=cv2.BORDER_REPLICATE)


def opencv_window(image: np.ndarray, size: tuple[int, int], window: Window) -> np.ndarray:
    """The same window cut from the whole image resized by OpenCV, whose fixed-point rounding is up to one level off."""
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)[window]


def class_counts(labels: np.ndarray) -> np.ndarray:
    """Pixels of each of the 255 possible classes in uint8 labels, without the ignored ones."""
    counts = cv2.calcHist([labels], [0], None, [256], [0, 256])  # float32, exact below 16.7 million pixels
    return counts.ravel()[:IGNORE_INDEX]


def draw_window(size: tuple[int, int], crop: int, rng: np.random.Generator) -> Window:
    """A uniform crop x crop window of an image of this size; a side shorter than `crop` is used whole."""
    top, left = (int(rng.integers(max(side - crop, 0) + 1)) for side in size)
    return slice(top, top + crop), slice(left, left + crop)


def scale_colours(image: np.ndarray, factor: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """image * factor + shift, clipped to 0 ... 255 and truncated: uint8 in, uint8 out."""
    table = (np.arange(256, dtype=np.float32) * factor + shift).clip(0, 255).astype(np.uint8)
    return cv2.LUT(image, table)


def distort_colours(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation and hue of (h, w, 3) uint8 RGB, each with probability a half.

    Brightness +-32; contrast and saturation times 0.5 ... 1.5; hue shifted by -18 ... 17 of 180 steps. Contrast comes
    before or after the two colour steps. Every step rounds to uint8, in RGB or HSV, as the published pipeline does.
    """
    brighten, contrast_first, contrast, saturate, turn = rng.random(5) < 0.5
    if brighten:
        image = scale_colours(image, shift=rng.uniform(-32, 32))
    if contrast and contrast_first:
        image = scale_colours(image, rng.uniform(0.5, 1.5))
    if saturate:
        image = saturate_colours(image, rng.uniform(0.5, 1.5))
    if turn:
        image = turn_hue(image, int(rng.integers(-18, 18)))
    if contrast and not contrast_first:
        image = scale_colours(image, rng.uniform(0.5, 1.5))
    return image


def saturate_colours(image: np.ndarray, factor: float) -> np.ndarray:
    """Saturation of (h, w, 3) uint8 RGB times `factor`, rounded in 8-bit HSV."""
    hue, saturation, value = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    return cv2.cvtColor(cv2.merge((hue, scale_colours(saturation, factor), value)), cv2.COLOR_HSV2RGB)


def turn_hue(image: np.ndarray, steps: int) -> np.ndarray:
    """Hue of (h, w, 3) uint8 RGB turned by `steps` of 180."""
    hue, saturation, value = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    table = ((np.arange(256) + steps) % 180).astype(np.uint8)
    return cv2.cvtColor(cv2.merge((cv2.LUT(hue, table), saturation, value)), cv2.COLOR_HSV2RGB)


class Crop(NamedTuple):
    """An augmented image in bytes: workers send a fifth of the memory of normalised floats.

    image (crop, crop, 3) uint8 RGB and labels (crop, crop) uint8, padded below and right with 0 and 255; size: rows and
    columns that the image covers; class_pixels (255,): labelled pixels of every class.
    """

    image: Tensor
    labels: Tensor
    size: tuple[int, int]
    class_pixels: np.ndarray


def padded(image: np.ndarray, labels: np.ndarray, crop: int) -> Crop:
    """image (h, w, 3) and labels (h, w) uint8, with sides of at most `crop`."""
    size = labels.shape
    below, right = crop - size[0], crop - size[1]
    image = cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_CONSTANT, value=0)
    ids = cv2.copyMakeBorder(labels, 0, below, 0, right, cv2.BORDER_CONSTANT, value=IGNORE_INDEX)
    return Crop(torch.from_numpy(image), torch.from_numpy(ids), size, class_counts(labels))


def normalise(images: Tensor, sizes: Tensor) -> Tensor:
    """images (B, h, w, 3) uint8 -> pixel_values (B, 3, h, w) float32 by CLIP's mean and deviation, on their device.

    sizes (B, 2): rows and columns that the images cover; pixels beyond are 0, as padding after normalising leaves it.
    """
    mean, std = (make_vector(values, images.device) * 255 for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    pixels = ((images - mean) / std).permute(0, 3, 1, 2)  # (B, 3, h, w)
    rows, columns = (
        torch.arange(side, device=images.device) < sizes[:, axis, None] for axis, side in enumerate(pixels.shape[-2:])
    )  # (B, h), (B, w)
    return torch.where(rows[:, None, :, None] & columns[:, None, None], pixels, 0).contiguous()


@dataclass(frozen=True)
class TrainTransform:
    """The published augmentation: random scale, crop, flip and colours.

    crop: side of the result in pixels. scale: range of the resize ratio. max_class_share: a crop is redrawn, at most 10
        times, while it shows only one class or one class has at least this share of its labelled pixels.
    min_class_pixels: a crop drawn for a class holds more than this many pixels of it; scale and crop are redrawn, at
        most 10 times (published: half of the 3,000 that the frame must hold).
    resize: "window" computes only the crop, by the bilinear formula; "whole" resizes the whole image with OpenCV as
        published and makes the loader a tenth slower. OpenCV's rounding makes every eighth value one level off.
    """

    crop: int = 512
    scale: tuple[float, float] = (0.5, 2.0)
    max_class_share: float = 0.75
    min_class_pixels: int = 1500
    resize: Literal["window", "whole"] = "window"

    def __call__(self, image: np.ndarray, labels: np.ndarray, rng: np.random.Generator, wanted: int = -1) -> Crop:
        """A crop of image (H, W, 3) uint8 and labels (H, W) uint8.

        wanted: the class that the frame was drawn for, -1 for none.
        """
        for _ in range(1 + CROP_TRIES):
            size, window, ids = self.draw_crop(labels, rng)
            if wanted < 0 or np.count_nonzero(ids == wanted) > self.min_class_pixels:
                break
        resize = bilinear_window if self.resize == "window" else opencv_window
        pixels = resize(image, size, window)
        if rng.random() < 0.5:
            pixels, ids = cv2.flip(pixels, 1), cv2.flip(ids, 1)
        return padded(distort_colours(pixels, rng), ids, self.crop)

    def draw_crop(self, labels: np.ndarray, rng: np.random.Generator) -> tuple[tuple[int, int], Window, np.ndarray]:
        """Size of the scaled image, a window of it, and the labels in that window."""
        size = scaled_size(*labels.shape, rng.uniform(*self.scale))
        for _ in range(1 + CROP_TRIES):
            window = draw_window(size, self.crop, rng)
            ids = nearest_window(labels, size, window)
            counts = class_counts(ids)
            if (counts > 0).sum() > 1 and counts.max() < self.max_class_share * counts.sum():
                break
        return size, window, ids
