"""Images of single frames for the report: ground truth, prediction, errors, and what each class text responds to.

All are data URIs, so that a page that holds them needs no other file.

Letters: K classes, H, W image, h, w ground truth.
"""

import base64
import io
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation
from tqdm_seg.windows_tqdm import slide

from ..data.frames import Frame
from ..data.label_maps import IGNORE_INDEX
from ..data.palette import tint
from ..evaluation.protocol import Protocol, predict

WIDTH = 480  # of an image in pixels
HEAT_WIDTH = 224  # of a score map
# Unlike the colours of the first classes.
_WRONG, _IGNORED = (235, 0, 110), (30, 40, 90)


class FrameImages(NamedTuple):
    """Data URIs of one frame."""

    image: str
    ground_truth: str
    prediction: str
    errors: str


class ScoreMaps(NamedTuple):
    """Data URIs of one frame's score map of every class, and the cosines of dark and bright."""

    image: str
    maps: list[str]
    low: float
    high: float


def data_uri(image: Image.Image) -> str:
    """The RGB image as the address of an <img>."""
    content = io.BytesIO()
    image.save(content, "jpeg", quality=82, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def draw_frame(
    model: TqdmForSemanticSegmentation, processor: TqdmImageProcessor, frame: Frame, protocol: Protocol
) -> FrameImages:
    """Image, ground truth, prediction and where they differ, `WIDTH` wide."""
    labels = protocol.ground_truth(frame.labels)
    ids = predict(model, processor, protocol.views(frame.image, processor), labels.shape, protocol, frame.key)
    labels, ids = labels.numpy(), ids.cpu().numpy()
    height, width = labels.shape
    size = (WIDTH, max(round(height * WIDTH / width), 1))
    image = Image.fromarray(frame.image).resize(size, Image.Resampling.BICUBIC)
    number = model.config.num_labels
    overlays = [tint(image, shown, number) for shown in (labels, ids)]
    return FrameImages(*map(data_uri, [image, *overlays, draw_errors(image, labels, ids)]))


def draw_errors(image: Image.Image, labels: np.ndarray, ids: np.ndarray) -> Image.Image:
    """The image in pale grey, wrong pixels of ids (h, w) crimson, those that labels (h, w) leaves out dark blue."""
    kind = np.where(labels == IGNORE_INDEX, 2, labels != ids).astype(np.uint8)
    kind = np.asarray(Image.fromarray(kind).resize(image.size, Image.Resampling.NEAREST))
    grey = np.asarray(image.convert("L"))[..., None].repeat(3, -1) // 2 + 110
    colours = np.array([(0, 0, 0), _WRONG, _IGNORED])[kind]
    strength = np.array([0, 0.85, 0.6])[kind][..., None]
    return Image.fromarray((grey * (1 - strength) + colours * strength).astype(np.uint8))


def draw_score_maps(
    model: TqdmForSemanticSegmentation, processor: TqdmImageProcessor, frame: Frame, protocol: Protocol
) -> ScoreMaps:
    """The cosine of every patch with every class text as heat maps, `HEAT_WIDTH` wide, on one scale for all."""
    height, width = protocol.view_size(*frame.labels.shape)
    view = Protocol(protocol.size).views(frame.image, processor)[0]
    pixel_values = processor(
        images=view.to(model.device), do_resize=False, input_data_format="channels_first", return_tensors="pt"
    )["pixel_values"]
    size = (HEAT_WIDTH, max(round(height * HEAT_WIDTH / width), 1))
    scores = F.interpolate(text_scores(model, pixel_values), size[::-1], mode="bilinear", antialias=True)[0]
    low, high = scores.min().item(), scores.max().item()
    levels = ((scores - low) / max(high - low, 1e-6) * 255).to(torch.uint8).cpu().numpy()
    heat = [cv2.cvtColor(cv2.applyColorMap(level, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB) for level in levels]
    image = Image.fromarray(frame.image).resize(size, Image.Resampling.BICUBIC)
    return ScoreMaps(data_uri(image), [data_uri(Image.fromarray(colours)) for colours in heat], low, high)


@torch.inference_mode()
def text_scores(model: TqdmForSemanticSegmentation, pixel_values: Tensor) -> Tensor:
    """pixel_values (1, 3, H, W) -> cosines with the class texts (1, K, H, W), averaged over the model's windows."""
    window = model.config.window_size or max(pixel_values.shape[-2:])
    encoded = model.model.text_queries.encode()  # (K, E)

    def score(windows: Tensor) -> Tensor:
        rows, columns = windows.shape[-2:]
        covered = model.model.vision_tower.padded_size(rows, columns)
        maps = F.interpolate(model.model(windows, encoded).score_map.float(), covered, mode="bilinear")
        return maps[..., :rows, :columns]

    return slide(
        score, pixel_values, model.config.num_labels, window, model.config.window_stride,
        model.window_batch_size(pixel_values.device),
    )  # fmt: skip
