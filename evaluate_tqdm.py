"""Evaluation: every frame at the size of its truth, one confusion matrix, and the protocol beside the numbers.

Letters: K classes, H, W image, h, w truth.
"""

from collections import Counter
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from tqdm_seg.data_tqdm import Frame
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.label_maps_tqdm import IGNORE_INDEX
from tqdm_seg.metrics_tqdm import confusion_matrix, scores
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation


def predict_frame(
    model: TqdmForSemanticSegmentation, processor: TqdmImageProcessor, frame: Frame
) -> tuple[Tensor, tuple[int, int]]:
    """Class ids (h, w) int64 at the size of the labels, and height and width of the image that the model was given."""
    inputs = processor(images=frame.image.copy(), input_data_format="channels_last", return_tensors="pt")
    pixel_values = inputs["pixel_values"].to(model.device)
    return model.segment(pixel_values, size=frame.labels.shape)[0].argmax(0), tuple(pixel_values.shape[-2:])


def evaluate(
    model: TqdmForSemanticSegmentation,
    processor: TqdmImageProcessor,
    frames: Iterable[Frame],
    label_map: dict[str, str],
    accelerator: Accelerator,
) -> dict[str, object]:
    """All of `metrics_tqdm.scores` pooled over the frames, with the protocol that produced them.

    frames: the part of the set that this process shall score; counts are summed over processes. label_map: its name and
    policy, from the manifest of the dataset. The model comes back in the mode, training or not, that it was in.
    """
    training = model.training
    model.eval()
    num_classes = model.config.num_labels
    matrix = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64, device=model.device)
    image_sizes, truth_sizes = Counter(), Counter()
    for frame in frames:
        with accelerator.autocast():
            prediction, size = predict_frame(model, processor, frame)
        truth = torch.tensor(frame.labels, device=prediction.device)
        matrix += confusion_matrix(prediction, truth, num_classes, IGNORE_INDEX)
        image_sizes[size] += 1
        truth_sizes[frame.labels.shape] += 1
    model.train(training)

    matrix = accelerator.reduce(matrix, "sum")
    image_sizes, truth_sizes = (sum(gather_object([sizes]), Counter()) for sizes in (image_sizes, truth_sizes))
    config = model.config
    sliding = config.window_size is not None and any(max(size) > config.window_size for size in image_sizes)
    return {
        **scores(matrix.cpu(), config.class_names),
        "protocol": {
            "frames": image_sizes.total(),
            "image_size": _size_table(image_sizes),
            "mode": "slide" if sliding else "whole",
            "window": config.window_size if sliding else None,
            "stride": config.window_stride if sliding else None,
            "test_time_augmentation": "none",
            "interpolation": "scores resized bilinearly to the truth, then argmax",
            "truth_size": _size_table(truth_sizes),
            "pooling": "one confusion matrix over all frames",
            "precision": {"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision),
            "labels": {**label_map, "classes": config.id2label, "ignored": IGNORE_INDEX},
        },
    }


def _size_table(sizes: Counter) -> dict[str, int]:
    """{"height x width": number of frames}."""
    return {f"{height}x{width}": count for (height, width), count in sorted(sizes.items())}
