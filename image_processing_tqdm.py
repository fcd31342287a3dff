"""Image processor of tqdm: resizes and normalises images and label maps, post-processes scores.

By default an image keeps its size; the model pads to whole patches and slides windows. The published evaluations resize
images into a box first, with `do_resize=True` and these sizes (which enlarge small images, too):

    Cityscapes, Mapillary Vistas    size={"shortest_edge": 1024, "longest_edge": 2048}    the default `size`
    BDD100K                         size={"shortest_edge": 720, "longest_edge": 1280}

Letters: B batch, K classes, H W image.
"""

import math
import operator
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    is_valid_image,
    pil_torch_interpolation_mapping,
)
from transformers.pipelines.image_segmentation import ImageSegmentationPipeline
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import ModelOutput, TensorType

from .images_tqdm import as_rgb, shorten

LARGEST_SIDE = 100_000  # pixels of a resized image: above it, a number is a slip
_SIZES = ({"shortest_edge", "longest_edge"}, {"shortest_edge"}, {"height", "width"}, {"max_height", "max_width"})


class TqdmImageProcessorKwargs(ImagesKwargs, total=False):
    """Options beyond those of every image processor.

    antialias: low-pass filter before downsampling. Off by default, as in OpenCV, which the published results use.
    """

    antialias: bool


class TqdmImageProcessor(TorchvisionBackend):
    """Turns images into `pixel_values`, label maps into `labels`, and `logits` into semantic maps.

    The class attributes are the defaults; the constructor and every call can set them. `size` holds "shortest_edge" and
    "longest_edge", a box that keeps the aspect ratio (see `fitted_size`), or "height" and "width", which stretch.
    """

    valid_kwargs = TqdmImageProcessorKwargs
    do_convert_rgb = True
    do_resize = False
    size = {"shortest_edge": 1024, "longest_edge": 2048}
    resample = PILImageResampling.BILINEAR
    antialias = False
    do_rescale = True
    do_normalize = True
    # CLIP's, which EVA02 uses, too.
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD

    def __init__(self, **kwargs: Unpack[TqdmImageProcessorKwargs]):
        check_options({name: kwargs.get(name, getattr(self, name, None)) for name in _EXPECTED})
        super().__init__(**kwargs)

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        **kwargs: Unpack[TqdmImageProcessorKwargs],
    ) -> BatchFeature:
        """`pixel_values`, and `labels` if there are segmentation maps: lists, or one tensor each with `return_tensors`.

        images: one or several of the kinds that `as_rgb` takes -> `pixel_values` (3, H, W) float32 each. With
            do_rescale=False also arrays or tensors of fractions 0 ... 1. do_convert_rgb=False hands pixels on
            unconverted and unchecked, as in other image processors.
        segmentation_maps: one map of class ids per image, as large as the image: a PIL image of mode "P" (the palette
            indices count, not the colours), "L" or "I", or an integer array or tensor (H, W) -> `labels` (H, W) int64
            each, resized with the image (nearest neighbour).
        Raises ValueError for options as `check_options`, images that `as_rgb` refuses, maps of another size than their
        image or without class ids, and images of different sizes with `return_tensors`; FileNotFoundError for a path
        without a file.
        """
        kinds = [kind.value for kind in TensorType]
        if (kind := kwargs.get("return_tensors")) is not None and kind not in kinds:
            raise ValueError(f"return_tensors is {shorten(repr(kind), 60)} and must be one of {', '.join(kinds)}")
        check_options({name: kwargs.get(name, getattr(self, name)) for name in _EXPECTED})
        for name in ("image_mean", "image_std"):
            if kwargs.get(name) is not None:  # the library takes no whole numbers
                kwargs[name] = [float(value) for value in _bands(kwargs[name])]
        try:
            return super().preprocess(images, segmentation_maps, **kwargs)
        except Exception as error:
            if not type(error).__name__.startswith("StrictDataclass"):  # huggingface_hub's, of any length
                raise
            raise ValueError(f"{shorten(error, 250)}; see TqdmImageProcessorKwargs") from error

    def post_process_semantic_segmentation(
        self,
        outputs: ModelOutput,
        target_sizes: list[tuple[int, int]] | Tensor | None = None,
        return_segmentation_scores: bool = False,
    ) -> list[Tensor] | list[BatchFeature]:
        """The class id of every pixel: a list of B maps (h, w) int64, on the device of `outputs.logits` (B, K, H, W).

        target_sizes: B pairs (height, width) that the scores are resized to before the argmax; None keeps (H, W).
        return_segmentation_scores: per image the fields `segmentation` (h, w) and `segmentation_scores` (K, h, w).
        Raises ValueError for outputs without logits, logits with NaN (on CPUs), and target_sizes that are not B pairs.
        """
        logits = getattr(outputs, "logits", None)  # (B, K, H, W)
        if not isinstance(logits, Tensor) or logits.ndim != 4 or not logits.numel() or not logits.is_floating_point():
            came = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(outputs).__name__
            raise ValueError(
                f"outputs must be the model's, with float logits (batch, classes, height, width), not {came}"
            )
        if logits.device.type == "cpu" and not torch.stack(logits.aminmax()).isfinite().all():
            raise ValueError("the logits hold NaN or inf; the weights are damaged, or their precision is too low")
        results = []
        for scores, size in zip(logits, _pairs(target_sizes, logits), strict=True):
            if return_segmentation_scores:
                scores = _resize_scores(scores, size)
                # BatchFeature is the parent of the library's class for this, which transformers 5.10 does not have.
                results.append(BatchFeature({"segmentation": scores.max(0).indices, "segmentation_scores": scores}))
            else:
                results.append(_best_classes(scores.detach(), size))
        return results

    def resize(
        self,
        image: Tensor,
        size: SizeDict,
        resample: PILImageResampling | InterpolationMode | int | None = None,
        antialias: bool = False,
        **kwargs,
    ) -> Tensor:
        """image (..., H, W) -> (..., h, w) of the same dtype."""
        if size.shortest_edge and size.longest_edge:
            height, width = fitted_size(*image.shape[-2:], size.shortest_edge, size.longest_edge)
            size = SizeDict(height=height, width=width)
        # In float32: bytes are interpolated in fixed point, which differs between CPUs.
        pixels = super().resize(image.to(torch.float32), size, resample=resample, antialias=antialias)
        if not image.is_floating_point():
            limits = torch.iinfo(image.dtype)  # bicubic overshoots
            pixels = pixels.round().clamp(limits.min, limits.max)
        return pixels.to(image.dtype)

    def _validate_preprocess_kwargs(
        self, do_center_crop: bool | None = None, do_pad: bool | None = None, **kwargs
    ) -> None:
        """Raises ValueError for options that contradict each other, and for cropping and padding."""
        if do_center_crop or do_pad:
            raise ValueError(
                "TqdmImageProcessor neither crops nor pads, as the model takes any image size: leave out do_center_crop"
                ' and do_pad; for one size in a batch use do_resize=True with size={"height": ..., "width": ...}'
            )
        super()._validate_preprocess_kwargs(**kwargs)

    def _preprocess_image_like_inputs(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None,
        return_tensors: str | TensorType | None = None,
        **kwargs,
    ) -> BatchFeature:
        """`pixel_values`, and with segmentation maps `labels`."""
        images = self._prepare_image_like_inputs(images, **kwargs)  # list of (3, H, W)
        data = {"pixel_values": self._preprocess(images, **kwargs)}
        if segmentation_maps is not None:
            data["labels"] = self._preprocess_maps(segmentation_maps, images, **kwargs)
        sizes = list(dict.fromkeys(_size_text(image) for image in data["pixel_values"]))
        if return_tensors is not None and len(sizes) > 1:
            raise ValueError(
                f"images of different sizes ({', '.join(sizes)}) do not fit into one tensor; call the processor for "
                'each, leave out return_tensors, or use do_resize=True with size={"height": ..., "width": ...}'
            )
        return BatchFeature(data, tensor_type=return_tensors)

    def _prepare_image_like_inputs(
        self,
        images: ImageInput,
        do_convert_rgb: bool,
        do_rescale: bool,
        do_normalize: bool,
        input_data_format: str | ChannelDimension | None = None,
        device: torch.device | str | None = None,
        **kwargs,
    ) -> list[Tensor]:
        """Images (3, H, W) by `as_rgb`."""
        if not do_convert_rgb:
            options = {"input_data_format": input_data_format, "device": device}
            return super()._prepare_image_like_inputs(images, do_convert_rgb=False, **options)
        images = _image_list(images)
        if not images:
            raise ValueError("images is empty; pass at least one image")
        first = None if input_data_format is None else ChannelDimension(input_data_format) is ChannelDimension.FIRST
        prepared = []
        for index, image in enumerate(images):
            pixels = image
            if not _is_rgb_tensor(image, first):  # else it stays on its device
                pixels = torch.from_numpy(as_rgb(image, f"image {index}", first, not do_rescale)).permute(2, 0, 1)
            if do_normalize and not do_rescale and not pixels.is_floating_point():
                raise ValueError(f"image {index} holds bytes, which have to be rescaled; leave out do_rescale=False")
            place = image.device if device is None and isinstance(image, Tensor) else device
            try:
                prepared.append(pixels.contiguous().to(place))
            except (RuntimeError, TypeError) as error:
                raise ValueError(
                    f"device is {place!r}, which torch cannot use ({shorten(error, 80)}); try cpu"
                ) from error
        return prepared

    def _preprocess(
        self,
        images: list[Tensor],
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | InterpolationMode | int | None,
        antialias: bool,
        **kwargs,
    ) -> list[Tensor]:
        """Resizes images (3, H, W); the base class rescales and normalises: float32 each."""
        if do_resize:
            images = [self.resize(image, size, resample, antialias) for image in images]
        features = super()._preprocess(
            images, do_resize=False, size=size, resample=resample, return_tensors=None, **kwargs
        )
        return [image.to(torch.float32) for image in features["pixel_values"]]

    def _preprocess_maps(
        self, segmentation_maps: ImageInput, images: list[Tensor], do_resize: bool, size: SizeDict, **kwargs
    ) -> list[Tensor]:
        """Checks the maps against the images (3, H, W) before resizing -> labels (H, W) int64 each."""
        if not isinstance(segmentation_maps, (list, tuple)):
            stacked = getattr(segmentation_maps, "ndim", 2) > 2 and len(segmentation_maps) == len(images)
            segmentation_maps = list(segmentation_maps) if stacked else [segmentation_maps]
        if len(segmentation_maps) != len(images):
            raise ValueError(f"{len(images)} images but {len(segmentation_maps)} segmentation maps; pass one per image")
        labels = []
        for index, (segmentation_map, image) in enumerate(zip(segmentation_maps, images, strict=True)):
            label = _class_ids(segmentation_map, index).to(image.device)
            if label.shape != image.shape[-2:]:
                raise ValueError(
                    f"segmentation map {index} is {_size_text(label)}, its image {_size_text(image)} (height x width); "
                    "pass the map of this image, at the same size"
                )
            if do_resize:
                # With aligned pixel centres, as in the bilinear resize of the image.
                label = self.resize(label[None], size, InterpolationMode.NEAREST_EXACT)[0]
            labels.append(label)
        return labels


def _resize_scores(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """scores (K, H, W) -> (K, h, w), bilinear; the same tensor where they have this size."""
    if scores.shape[-2:] == size:
        return scores
    return F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]


def _best_classes(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Ids (h, w) of the classes with the largest scores (K, H, W) at `size`.

    One class at a time is resized: all of them at once are often the largest tensor of a prediction.
    """
    if scores.shape[-2:] == size:
        return scores.max(0).indices  # on CPUs argmax would take four times as long
    best = _resize_scores(scores[:1], size)[0]
    ids = torch.zeros(size, dtype=torch.int64, device=scores.device)
    for index in range(1, len(scores)):
        plane = _resize_scores(scores[index : index + 1], size)[0]  # (h, w)
        ids.masked_fill_(plane > best, index)
        torch.maximum(best, plane, out=best)
    return ids


_EXPECTED = {
    **dict.fromkeys(("do_convert_rgb", "do_resize", "do_rescale", "do_normalize", "antialias"), "True or False"),
    "size": f'{{"height": ..., "width": ...}} or {{"shortest_edge": ..., "longest_edge": ...}}, 1 to {LARGEST_SIDE}',
    "resample": "a PIL.Image.Resampling, such as 2 (bilinear) or 3 (bicubic)",
    "rescale_factor": "a number above 0 and at most 1, such as 1 / 255",
    "image_mean": "three numbers, one per band, that lie where pixels do after do_rescale",
    "image_std": "three numbers above 0, one per band",
}


def check_options(options: dict[str, Any]) -> None:
    """Raises ValueError, naming the option, for a value that makes no sense; None stands for the default."""
    resample, factor, mean, std = (options[name] for name in ("resample", "rescale_factor", "image_mean", "image_std"))
    rgb = options["do_convert_rgb"] is not False  # else bands and pixels may be anything
    most = 255 * factor if options["do_rescale"] is not False and _is_number(factor) else 1
    fits = {
        "size": _is_size(options["size"]),
        "resample": isinstance(resample, int | InterpolationMode)
        and not isinstance(resample, bool)
        and resample in pil_torch_interpolation_mapping.keys() | {*pil_torch_interpolation_mapping.values()},
        "rescale_factor": _is_number(factor) and 0 < factor <= 1,
        "image_mean": _are_bands(mean, rgb)
        and (not rgb or options["do_normalize"] is False or all(0 <= value <= most for value in _bands(mean))),
        "image_std": _are_bands(std, rgb) and min(_bands(std)) > 0,
    }
    for name, expected in _EXPECTED.items():
        value = options[name]
        if value is not None and not fits.get(name, isinstance(value, bool)):
            raise ValueError(f"{name} is {shorten(repr(value), 60)} and must be {expected}")


def _is_number(value: Any, kind: type = Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


def _is_size(size: Any) -> bool:
    """Whether `resize` can use it; a number is a square, a pair height and width."""
    if not isinstance(size, dict | SizeDict):
        size = dict(zip(("height", "width"), size if isinstance(size, list | tuple) else (size, size), strict=False))
    sides = dict(size)
    return set(sides) in _SIZES and all(_is_number(n, Integral) and 0 < n <= LARGEST_SIDE for n in sides.values())


def _bands(values: Any) -> list:
    """image_mean or image_std as a list; one number is for all bands."""
    return list(values) if isinstance(values, list | tuple) else [values]


def _are_bands(values: Any, rgb: bool) -> bool:
    return len(_bands(values)) in ((1, 3) if rgb else range(1, 99)) and all(map(_is_number, _bands(values)))


def _pairs(target_sizes: Any, logits: Tensor) -> list[tuple[int, int]]:
    """A pair (height, width) for every image of logits (B, K, H, W); raises ValueError for anything else."""
    if target_sizes is None:
        return [tuple(logits.shape[-2:])] * len(logits)
    try:
        sizes = [tuple(operator.index(side) for side in size) for size in target_sizes]
    except TypeError:
        sizes = [()]
    if not all(len(size) == 2 and 0 < min(size) <= max(size) <= LARGEST_SIDE for size in sizes):
        raise ValueError(
            f"target_sizes are {shorten(repr(target_sizes), 60)} and must be pairs of whole numbers, (height, width)"
        )
    if len(sizes) != len(logits):
        raise ValueError(f"{len(sizes)} target_sizes for a batch of {len(logits)}; pass one (height, width) per image")
    return sizes


def _image_list(images: ImageInput) -> list:
    """Single images of one, of nested lists, and of batches (B, ...) of rank 4."""
    if isinstance(images, (list, tuple)):
        return [image for part in images for image in _image_list(part)]
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


def _is_rgb_tensor(image: ImageInput, channels_first: bool | None) -> bool:
    """Whether `as_rgb` takes the image for a uint8 tensor (3, H, W)."""
    rgb = isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3
    return rgb and channels_first is not False and bool(image.numel())


def fitted_size(height: int, width: int, shortest_edge: int, longest_edge: int) -> tuple[int, int]:
    """(height, width) of the largest image of this aspect ratio in the box, portrait or landscape.

    The scale is min(longest_edge / longer side, shortest_edge / shorter side). Sides are rounded half up as in mmcv;
    transformers truncates. 1216 x 2160 in a box of 1024, 2048 -> 1024 x 1819.
    """
    factor = min(longest_edge / max(height, width), shortest_edge / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


def _class_ids(segmentation_map: ImageInput, index: int) -> Tensor:
    """Class ids (H, W) int64 of one segmentation map, (H, W), (1, H, W) or (H, W, 1). `index` is for the errors."""
    if not is_valid_image(segmentation_map):
        raise ValueError(
            f"segmentation map {index} is of type {type(segmentation_map).__name__}; pass a PIL image "
            "(PIL.Image.open), an array or a tensor"
        )
    ids = segmentation_map
    if not isinstance(ids, Tensor):
        ids = np.array(segmentation_map)  # of a palette image the indices
        if ids.dtype.kind not in "buif":
            raise ValueError(f"segmentation map {index} holds {ids.dtype}, and must hold integer class ids")
        ids = torch.from_numpy(ids)
    shape = tuple(ids.shape)
    if ids.ndim == 3 and 1 in (shape[0], shape[-1]):
        ids = ids[0] if shape[0] == 1 else ids[..., 0]
    if ids.ndim != 2 or ids.is_floating_point():
        raise ValueError(
            f"segmentation map {index} has shape {shape} and dtype {ids.dtype}, but must hold one integer class id per "
            "pixel; translate colours to ids first, or open the palette or grey PNG without convert('RGB')"
        )
    return ids.to(torch.int64)


def _size_text(image: Tensor) -> str:
    """'480x640' for an image (..., 480, 640)."""
    return "x".join(map(str, image.shape[-2:]))


class TqdmImageSegmentationPipeline(ImageSegmentationPipeline):
    """transformers' pipeline for this model: one mask per class that the image holds, `score` None.

    Reads images by `as_rgb`; the library's reader clips 16 bits and fractions to white. Holds the scores of a part of
    the image at a time. `threshold`, `mask_threshold` and `overlap_mask_area_threshold` are of other kinds of
    segmentation and change nothing. What `pipeline(..., trust_remote_code=True)` makes of a model folder, see
    `TqdmConfig.custom_pipelines`.
    """

    def _sanitize_parameters(self, subtask: str | None = None, **kwargs) -> tuple[dict, dict, dict]:
        """Raises ValueError for other subtasks than "semantic"."""
        if subtask not in (None, "semantic"):
            raise ValueError(
                f"Subtask {subtask} is not supported for model {type(self.model)}, which gives every pixel a class; "
                'leave subtask out, or pass "semantic"'
            )
        return super()._sanitize_parameters(**kwargs)

    def preprocess(self, image: ImageInput | str, timeout: float | None = None) -> BatchFeature:
        """Inputs of the model for one image, a path, URL or PIL image; raises as `as_rgb`."""
        return super().preprocess(Image.fromarray(as_rgb(image, timeout=timeout)))

    def _forward(self, model_inputs: BatchFeature) -> dict[str, Tensor | list]:
        """Class ids (B, H, W) of images that were not resized, else scores."""
        targets, size = model_inputs["target_size"], tuple(model_inputs["pixel_values"].shape[-2:])
        # One [(height, width)], or a list of them for a batch.
        if all(target in (size, [size]) for target in targets):
            ids = self.model.segment_labels(model_inputs["pixel_values"])
            return {"segmentation": ids, "target_size": targets}
        return super()._forward(model_inputs)

    def postprocess(self, model_outputs: dict[str, Tensor | list], **thresholds: float) -> list[dict]:
        """Label and mask, mode "L" with 0 and 255, of every class in one image."""
        ids = model_outputs.get("segmentation")
        if ids is None:
            ids = self.image_processor.post_process_semantic_segmentation(model_outputs, model_outputs["target_size"])
        ids, names = ids[0].numpy(), self.model.config.id2label
        masks = {index: (ids == index) * np.uint8(255) for index in np.unique(ids).tolist()}
        return [{"score": None, "label": names[index], "mask": Image.fromarray(mask)} for index, mask in masks.items()]


TqdmImageProcessor.register_for_auto_class()

__all__ = ["TqdmImageProcessor", "TqdmImageSegmentationPipeline", "fitted_size"]
