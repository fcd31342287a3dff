"""Image, ground truth and prediction next to each other."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

from ..data.frames import Frame, FrameDataset, PlainRows
from ..data.label_maps import IGNORE_INDEX
from ..data.palette import legend, tint
from ..evaluation.evaluate import predict_frame
from ..evaluation.figures import mean_over, percent
from ..evaluation.metrics import confusion_matrix, scores

_GAP, _TITLE = 12, 30
_PANEL = 336  # least width of a panel in pixels; smaller images are enlarged


def draw_comparison(frame: Frame, prediction: np.ndarray, class_names: dict[int, str]) -> Image.Image:
    """Image, ground truth and prediction (h, w) side by side, with mIoU and legend. Ignored pixels have no colour."""
    matrix = confusion_matrix(torch.from_numpy(prediction), torch.tensor(frame.labels), len(class_names), IGNORE_INDEX)
    results = scores(matrix, list(class_names.values()))
    score = f"mIoU {percent(results['miou'])} % of this frame, over {mean_over([results])}"
    titles = [frame.key, "ground truth", f"prediction, {score}"]
    height, width = frame.labels.shape
    factor = max(_PANEL / width, 1)
    size = (round(width * factor), round(height * factor))
    image = Image.fromarray(frame.image).resize(size, Image.Resampling.BICUBIC)
    panels = [image, *(tint(image, ids, len(class_names)) for ids in (frame.labels, prediction))]

    names = legend(class_names, 3 * size[0] + 4 * _GAP)
    canvas = Image.new("RGB", (names.width, size[1] + _TITLE + names.height), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (title, panel) in enumerate(zip(titles, panels, strict=True)):
        left = _GAP + i * (size[0] + _GAP)
        draw.text((left, _TITLE / 2), title, "black", ImageFont.load_default(16 if i else 11), anchor="lm")
        canvas.paste(panel, (left, _TITLE))
    canvas.paste(names, (0, _TITLE + size[1]))
    return canvas


def draw_frames(
    model: TqdmForSemanticSegmentation, processor: TqdmImageProcessor, frames: FrameDataset | PlainRows, count: int,
    total: int,
) -> Iterator[tuple[str, Image.Image]]:  # fmt: skip
    """Name and drawing of `count` of the `total` frames, evenly spaced."""
    chosen = np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()
    model.eval()
    if isinstance(frames, FrameDataset):
        numbered = ((index, frames[index]) for index in chosen)
    else:  # rows, which are read in order
        numbered = ((index, frame) for index, frame in enumerate(frames.frames()) if index in chosen)
    for index, frame in numbered:
        prediction, _ = predict_frame(model, processor, frame)
        name = f"{index:04d}_{Path(frame.key).stem}"
        yield name, draw_comparison(frame, prediction.cpu().numpy(), model.config.id2label)
