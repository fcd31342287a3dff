"""Pictures of single frames for the report: truth, prediction and errors over the image, and what each class text sees.

All are data URIs, so that a page that holds them needs no other file.

Letters: K classes, H, W image, h, w truth.
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
from ..evaluation.protocol import Inference, predict

WIDTH = 480  # of a picture in pixels
HEAT_WIDTH = 224  # of a score map
# Unlike the colours of the first classes, beside which they are seen.
_WRONG, _IGNORED = (235, 0, 110), (30, 40, 90)


class FramePictures(NamedTuple):
    """Data URIs of one frame."""

    image: str
    truth: str
    prediction: str
    errors: str


class ScoreMaps(NamedTuple):
    """Data URIs of one frame's score map of every class, and the cosines that dark and bright stand for."""

    image: str
    maps: list[str]
    low: float
    high: float


def data_uri(picture: Image.Image) -> str:
    """The RGB picture as the address of an <img>."""
    content = io.BytesIO()
    picture.save(content, "jpeg", quality=82, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def draw_frame(
    model: TqdmForSemanticSegmentation, processor: TqdmImageProcessor, frame: Frame, inference: Inference
) -> FramePictures:
    """Image, truth, prediction and where they differ, `WIDTH` wide."""
    truth = inference.truth_of(frame.labels)
    ids = predict(model, processor, inference.views(frame.image, processor), truth.shape, inference)
    truth, ids = truth.numpy(), ids.cpu().numpy()
    height, width = truth.shape
    size = (WIDTH, max(round(height * WIDTH / width), 1))
    image = Image.fromarray(frame.image).resize(size, Image.Resampling.BICUBIC)
    number = model.config.num_labels
    overlays = [tint(image, labels, number) for labels in (truth, ids)]
    return FramePictures(*map(data_uri, [image, *overlays, error_picture(image, truth, ids)]))


def error_picture(image: Image.Image, truth: np.ndarray, ids: np.ndarray) -> Image.Image:
    """The image in pale grey, wrong pixels of ids (h, w) crimson, those that truth (h, w) leaves out dark blue."""
    kind = np.where(truth == IGNORE_INDEX, 2, truth != ids).astype(np.uint8)
    kind = np.asarray(Image.fromarray(kind).resize(image.size, Image.Resampling.NEAREST))
    grey = np.asarray(image.convert("L"))[..., None].repeat(3, -1) // 2 + 110
    colours = np.array([(0, 0, 0), _WRONG, _IGNORED])[kind]
    strength = np.array([0, 0.85, 0.6])[kind][..., None]
    return Image.fromarray((grey * (1 - strength) + colours * strength).astype(np.uint8))


def draw_score_maps(
    model: TqdmForSemanticSegmentation, processor: TqdmImageProcessor, frame: Frame, inference: Inference
) -> ScoreMaps:
    """The cosine of every patch with every class text as heat pictures, `HEAT_WIDTH` wide, on one scale for all."""
    height, width = inference.view_size(*frame.labels.shape)
    view = Inference(inference.size).views(frame.image, processor)[0]
    pixel_values = processor(
        images=view.to(model.device), do_resize=False, input_data_format="channels_first", return_tensors="pt"
    )["pixel_values"]
    size = (HEAT_WIDTH, max(round(height * HEAT_WIDTH / width), 1))
    scores = F.interpolate(text_scores(model, pixel_values), size[::-1], mode="bilinear", antialias=True)[0]
    low, high = scores.min().item(), scores.max().item()
    levels = ((scores - low) / max(high - low, 1e-6) * 255).to(torch.uint8).cpu().numpy()
    heat = [cv2.cvtColor(cv2.applyColorMap(level, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB) for level in levels]
    image = Image.fromarray(frame.image).resize(size, Image.Resampling.BICUBIC)
    return ScoreMaps(data_uri(image), [data_uri(Image.fromarray(picture)) for picture in heat], low, high)


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
