"""How a frame becomes class ids: the sizes at which the model sees it, the truth it is held against, and the protocol
that says so beside every figure.

Letters: K classes, H, W image, h, w truth.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import torch
from torch import Tensor
from transformers.image_utils import SizeDict

from tqdm_seg.configuration_tqdm import TqdmConfig
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor, fitted_size
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

from ..data.label_maps import IGNORE_INDEX

# The boxes that the published figures come from, by the name that a dataset's manifest has.
PUBLISHED_BOXES = {"Cityscapes": (1024, 2048), "Mapillary Vistas": (1024, 2048), "BDD100K (10k)": (720, 1280)}
# Scales of the published test-time augmentation, each with its mirror image.
PUBLISHED_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
# Width and height, a quarter of its input, at which OFF-Net keeps the truth.
_OFFNET_SIZE = (320, 176)
_TRUTHS = {
    "own": "at its own size",
    "offnet": "shrunk to 320x176 (width x height) and enlarged again, by nearest neighbour, as OFF-Net scores",
}


@dataclass(frozen=True)
class Inference:
    """How frames are shown to a model, and what its answer is held against.

    size: box or exact size as in the image processor's `size`, or None for every image's own.
    scales: the views of a frame, as ratios of that size. flip: every view also as its mirror image. softmax_views: a
    softmax over the classes before views are averaged, as published. truth: as `_TRUTHS` says.
    """

    size: dict[str, int] | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    softmax_views: bool = False
    truth: Literal["own", "offnet"] = "own"

    def view_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Height and width of every view of an image (height, width)."""
        return [self.view_size(height, width, scale) for scale in self.scales]

    def view_size(self, height: int, width: int, scale: float = 1.0) -> tuple[int, int]:
        """Height and width of the view at one scale."""
        size = self.size or {"shortest_edge": min(height, width), "longest_edge": max(height, width)}
        scaled = {name: int(side * scale) for name, side in size.items()}  # cut off, as published
        if "height" in scaled:
            return scaled["height"], scaled["width"]
        return fitted_size(height, width, scaled["shortest_edge"], scaled["longest_edge"])

    def views(self, image: np.ndarray, processor: TqdmImageProcessor) -> list[Tensor]:
        """The views (3, H, W) uint8 of an image (h, w, 3) uint8."""
        pixels, views = torch.tensor(image).permute(2, 0, 1).contiguous(), []
        for height, width in self.view_sizes(*image.shape[:2]):
            view, size = pixels, SizeDict(height=height, width=width)
            if pixels.shape[1:] != (height, width):
                view = processor.resize(pixels, size, processor.resample, processor.antialias)
            views.append(view)
        return views

    def truth_of(self, labels: np.ndarray) -> Tensor:
        """The truth (h, w) uint8 from labels (h, w) uint8."""
        if self.truth == "offnet":
            small = cv2.resize(labels, _OFFNET_SIZE, interpolation=cv2.INTER_NEAREST)
            labels = cv2.resize(small, labels.shape[::-1], interpolation=cv2.INTER_NEAREST)
        return torch.tensor(labels)


def model_inference(processor: TqdmImageProcessor) -> Inference:
    """What a model's own image processor does: images fitted into its size if it says so, else at their own."""
    size = {name: side for name, side in dict(processor.size).items() if side}
    return Inference(size if processor.do_resize else None)


def predict(
    model: TqdmForSemanticSegmentation,
    processor: TqdmImageProcessor,
    views: list[Tensor],
    size: tuple[int, int],
    inference: Inference,
) -> Tensor:
    """Class ids (h, w) = size uint8, on the model's device, from the views (3, H, W) uint8 of one frame."""
    pixel_values = [
        processor(
            images=view.to(model.device, non_blocking=True), do_resize=False, input_data_format="channels_first",
            return_tensors="pt",
        )["pixel_values"]
        for view in views
    ]  # fmt: skip
    return model.segment_labels(pixel_values, size, inference.flip, inference.softmax_views)[0].to(torch.uint8)


def protocol(
    config: TqdmConfig,
    inference: Inference,
    label_map: dict[str, str],
    sizes: Counter[tuple[int, int]],
    precision: str,
) -> dict[str, Any]:
    """Everything that figures depend on besides weights and frames, ready for JSON.

    label_map: its name and policy, from the manifest. sizes: how many frames of each (height, width) there are.
    """
    images, longest = Counter(), 0
    for size, count in sizes.items():
        images[inference.view_size(*size)] += count
        longest = max(longest, *map(max, inference.view_sizes(*size)))
    sliding = config.window_size is not None and longest > config.window_size
    return {
        "frames": sizes.total(),
        "image_size": _size_table(images),
        "resize": _resize_text(inference.size),
        "mode": "slide" if sliding else "whole",
        "window": config.window_size if sliding else None,
        "stride": config.window_stride if sliding else None,
        "test_time_augmentation": _views_text(inference),
        "interpolation": "scores resized bilinearly to the truth, then argmax",
        "truth": _TRUTHS[inference.truth],
        "truth_size": _size_table(sizes),
        "pooling": "one confusion matrix over all frames",
        "precision": precision,
        "labels": {**label_map, "classes": config.id2label, "ignored": IGNORE_INDEX},
    }


def _resize_text(size: dict[str, int] | None) -> str:
    if size is None:
        return "none"
    if "height" in size:
        return f"to {size['height']}x{size['width']}, stretched"
    return f"fitted into {size['shortest_edge']}x{size['longest_edge']}, either way round, keeping the shape"


def _views_text(inference: Inference) -> str:
    if inference.scales == (1.0,) and not inference.flip:
        return "none"
    mirrored = ", each with its mirror image" if inference.flip else ""
    softmax = "after a softmax over the classes, " if inference.softmax_views else ""
    return f"mean of the scores {softmax}over the scales {', '.join(f'{s:g}' for s in inference.scales)}{mirrored}"


def _size_table(sizes: Counter[tuple[int, int]]) -> dict[str, int]:
    """{"height x width": number of frames}."""
    return {f"{height}x{width}": count for (height, width), count in sorted(sizes.items())}
