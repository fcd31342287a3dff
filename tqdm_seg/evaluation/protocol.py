"""How a frame becomes class ids: input sizes, ground-truth handling, and the protocol stored with every figure.

Letters: K classes, H, W image, h, w ground truth.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from transformers.image_utils import SizeDict

from tqdm_seg.configuration_tqdm import TqdmConfig
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor, fitted_size
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

from ..data.frames import FrameDataset, PlainRows
from ..data.label_maps import IGNORE_INDEX
from .saved import UNKNOWN

# The boxes that the published figures come from, by the name that a dataset's manifest has.
PUBLISHED_BOXES = {"Cityscapes": (1024, 2048), "Mapillary Vistas": (1024, 2048), "BDD100K (10k)": (720, 1280)}
# Scales of the published test-time augmentation, each with its mirror image.
PUBLISHED_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
# Width and height, a quarter of its input, to which OFF-Net shrinks the ground truth.
_OFFNET_SIZE = (320, 176)


@dataclass(frozen=True)
class Protocol:
    """How a model sees a frame, and the ground truth that its prediction is scored against.

    size: box or exact size as in the image processor's `size`, or None for every image's own.
    scales: the views of a frame, as ratios of that size. flip: every view also mirrored. softmax_views: softmax over
    the classes before views are averaged, as published. offnet: ground truth shrunk and enlarged again, as OFF-Net
    scores.
    """

    size: dict[str, int] | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    softmax_views: bool = False
    offnet: bool = False

    @classmethod
    def of(cls, processor: TqdmImageProcessor) -> "Protocol":
        """What a model's own image processor does: images fitted into its size if it resizes, else at their own."""
        size = {name: side for name, side in dict(processor.size).items() if side}
        return cls(size if processor.do_resize else None)

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

    def ground_truth(self, labels: np.ndarray) -> Tensor:
        """The ground truth (h, w) uint8 from labels (h, w) uint8."""
        if self.offnet:
            small = cv2.resize(labels, _OFFNET_SIZE, interpolation=cv2.INTER_NEAREST)
            labels = cv2.resize(small, labels.shape[::-1], interpolation=cv2.INTER_NEAREST)
        return torch.tensor(labels)

    def describe(
        self, config: TqdmConfig | None, classes: Sequence[str], label_map: dict[str, str],
        sizes: Counter[tuple[int, int]], precision: str,
    ) -> dict[str, Any]:  # fmt: skip
        """Everything that figures depend on besides weights and frames, ready for JSON.

        config: of the model, None for predictions that were saved before. label_map: its name and policy, from the
        manifest. sizes: how many frames of each (height, width) there are.
        """
        images, longest = Counter(), 0
        for size, count in sizes.items():
            images[self.view_size(*size)] += count
            longest = max(longest, *map(max, self.view_sizes(*size)))
        window = config.window_size if config else None
        sliding = window is not None and longest > window
        described = {
            "frames": sizes.total(),
            "image_size": _size_table(images),
            "resize": self._resize_text(),
            "mode": "slide" if sliding else "whole",
            "window": window if sliding else None,
            "stride": config.window_stride if sliding else None,
            "test_time_augmentation": self._views_text(),
            "interpolation": "scores resized bilinearly to the ground truth, then argmax",
            "ground_truth": "shrunk to 176x320 and enlarged again by nearest neighbour, as OFF-Net scores"
            if self.offnet
            else "at its own size",
            "ground_truth_size": _size_table(sizes),
            "pooling": "one confusion matrix over all frames",
            "precision": precision,
            "labels": {**label_map, "classes": dict(enumerate(classes)), "ignored": IGNORE_INDEX},
        }
        return described if config else described | UNKNOWN

    def _resize_text(self) -> str:
        if self.size is None:
            return "none"
        if "height" in self.size:
            return f"to {self.size['height']}x{self.size['width']}, stretched"
        return (
            f"fitted into {self.size['shortest_edge']}x{self.size['longest_edge']}, either way round, keeping the shape"
        )

    def _views_text(self) -> str:
        if self.scales == (1.0,) and not self.flip:
            return "none"
        mirrored = ", each with its mirror image" if self.flip else ""
        softmax = "after a softmax over the classes, " if self.softmax_views else ""
        return f"mean of the scores {softmax}over the scales {', '.join(f'{s:g}' for s in self.scales)}{mirrored}"


def predict(
    model: TqdmForSemanticSegmentation,
    processor: TqdmImageProcessor,
    views: list[Tensor],
    size: tuple[int, int],
    protocol: Protocol,
    key: str,
) -> Tensor:
    """Class ids (h, w) = size uint8, on the model's device, from the views (3, H, W) uint8 of one frame.

    Raises ValueError naming the frame by its key when it is too small.
    """
    pixel_values = [
        processor(
            images=view.to(model.device, non_blocking=True), do_resize=False, input_data_format="channels_first",
            return_tensors="pt",
        )["pixel_values"]
        for view in views
    ]  # fmt: skip
    try:
        return model.segment_labels(pixel_values, size, protocol.flip, protocol.softmax_views)[0].to(torch.uint8)
    except ValueError as error:
        raise ValueError(f"frame {key}: {error}") from error


def frame_sizes(frames: FrameDataset | PlainRows) -> list[tuple[str, tuple[int, int]]]:
    """Key and (height, width) of all frames; without an index of the first one, the others are checked as they come."""
    if isinstance(frames, PlainRows):
        return [(frame.key, frame.labels.shape) for frame in islice(frames.frames(), 1)]
    table = frames.index.table
    sides = zip(table["height"].to_pylist(), table["width"].to_pylist(), strict=True)
    return list(zip(table["key"].to_pylist(), sides, strict=True))


def check_view_sizes(model: TqdmForSemanticSegmentation, frames: FrameDataset | PlainRows, protocol: Protocol) -> None:
    """Raises ValueError for the first frame that the model sees, or a window of which it sees, under two patches."""
    tower, patch = model.model.vision_tower, model.config.vision_config.patch_size
    window = model.config.window_size
    for key, size in frame_sizes(frames):
        for view in protocol.view_sizes(*size):
            seen = view if window is None else [min(side, window) for side in view]
            if min(tower.padded_size(*seen)) < 2 * patch:
                place = frames.folder if isinstance(frames, FrameDataset) else frames.source
                raise ValueError(
                    f"{key} of {place}, split {frames.split}, {size[0]}x{size[1]} pixels, would be seen as "
                    f"{seen[0]}x{seen[1]} pixels; {2 * patch} a side are the least: leave it out, or enlarge the size "
                    "or window of the evaluation"
                )


def _size_table(sizes: Counter[tuple[int, int]]) -> dict[str, int]:
    """{"height x width": number of frames}."""
    return {f"{height}x{width}": count for (height, width), count in sorted(sizes.items())}
