"""What a person reads after a run: predictions drawn beside the truth, and the model card."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw, ImageFont

from tqdm_seg.configuration_tqdm import PRESETS
from tqdm_seg.data_tqdm import Frame, FrameDataset, PlainRows, frame_loader
from tqdm_seg.evaluate_tqdm import predict_frame
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.label_maps_tqdm import IGNORE_INDEX
from tqdm_seg.metrics_tqdm import confusion_matrix, scores
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation
from tqdm_seg.visualise_tqdm import legend, tinted

_PANEL = 336  # least width of a panel in pixels; smaller images are enlarged
_GAP, _TITLE = 12, 30


def draw_comparison(frame: Frame, prediction: np.ndarray, class_names: dict[int, str]) -> Image.Image:
    """Image, truth and prediction (h, w) side by side, with the frame's mIoU and a legend. Ignored pixels stay bare."""
    matrix = confusion_matrix(torch.from_numpy(prediction), torch.tensor(frame.labels), len(class_names), IGNORE_INDEX)
    score = _percent(scores(matrix, list(class_names.values()))["miou"])
    titles = [frame.key, "truth", f"prediction, mIoU {score} % of this frame"]
    height, width = frame.labels.shape
    factor = max(_PANEL / width, 1)
    size = (round(width * factor), round(height * factor))
    image = Image.fromarray(frame.image).resize(size, Image.Resampling.BICUBIC)
    panels = [image, *(tinted(image, ids, len(class_names)) for ids in (frame.labels, prediction))]

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
    """Name and drawing of `count` of the `total` frames, evenly spread."""
    chosen = set(np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist())
    model.eval()
    for index, frame in enumerate(frame_loader(frames, 0)):
        if index in chosen:
            prediction, _ = predict_frame(model, processor, frame)
            name = f"{index:04d}_{Path(frame.key).stem}"
            yield name, draw_comparison(frame, prediction.cpu().numpy(), model.config.id2label)


def model_card(
    args: argparse.Namespace,
    model: TqdmForSemanticSegmentation,
    results: dict[str, object],
    training: FrameDataset | PlainRows,
    validation: FrameDataset | PlainRows,
) -> str:
    """README.md of a trained model: use, result with its protocol, labels, data, recipe, limits."""
    config, protocol, folder = model.config, results["protocol"], f"{args.out}/model"
    rows = "\n".join(f"| {name} | {_percent(iou)} |" for name, iou in results["iou"].items())
    window = f", window {protocol['window']}, stride {protocol['stride']}" if protocol["mode"] == "slide" else ""
    classes = ", ".join(f"{index} = {name}" for index, name in config.id2label.items())
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) / 1e6
    frames, caveat = "", "Read without an index: which scenes are in both parts is not known."
    if isinstance(training, FrameDataset):
        shared = sorted({*training.scenes} & {*validation.scenes})
        frames, caveat = f"{len(training)} frames of ", "No scene is in both parts."
    if frames and shared:
        caveat = (
            f"Both parts hold frames of {', '.join(scene or 'unnamed scenes' for scene in shared)}, and neighbouring "
            "frames look alike: the score shows that training works, not that the model copes with other places, "
            "weather or cameras."
        )
    start, language = f"the weights of `{args.model}`", ""
    if args.model in PRESETS:
        start = "random weights"
        language = "- It started from random weights, so the class names are mere labels to it: it knows no language.\n"
    return f"""---
library_name: transformers
pipeline_tag: image-segmentation
license: {args.license}
tags:
- semantic-segmentation
- tqdm
---

# tqdm ({args.model}): {", ".join(config.class_names)}

Semantic segmentation with one textual query per class name, after [tqdm](https://arxiv.org/abs/2407.09033), the
Textual Query-Driven Mask Transformer. {parameters:.1f} million parameters, {trained:.1f} million of them trained (the
text tower is frozen).

```python
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

processor = AutoImageProcessor.from_pretrained("{folder}", trust_remote_code=True)
model = AutoModelForSemanticSegmentation.from_pretrained("{folder}", trust_remote_code=True)
image = Image.open("photo.png")
outputs = model(**processor(images=image, return_tensors="pt"))
labels = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])[0]
```

## Result

| class | IoU, % |
|---|---|
{rows}
| **mean** | **{_percent(results["miou"])}** |

Protocol: {protocol["frames"]} held-back frames; images {_counts(protocol["image_size"])} (height x width);
{protocol["mode"]}{window}; test-time augmentation: {protocol["test_time_augmentation"]};
{protocol["interpolation"]}; truth {_counts(protocol["truth_size"])};
{protocol["pooling"]}; {protocol["precision"]}. All numbers are in `results.json` of the run.

## Labels

{classes}; {protocol["labels"]["ignored"]} is ignored.

Label map `{protocol["labels"]["name"]}`: {protocol["labels"]["policy"]}.

## Data

`{args.data}`: {frames}split `{training.split}` to train on, `{validation.split}` held back. {caveat}

## Recipe

From {start}: {args.steps} steps of {args.batch_size} x {args.accumulation} images per process, crop {args.crop}. AdamW,
peak rate {args.lr:g} (vision tower x {args.vision_lr_mult:g}), {args.warmup_steps} steps of warm-up, polynomial decay
to {args.min_lr:g}, weight decay {args.weight_decay:g}, seed {args.seed}. Random scale 0.5 to 2, crop, flip and colours.
torch {torch.__version__}, transformers {transformers.__version__}. All options are in `args.json` of the run.

## Intended use and limits

- For research on segmentation and for trying out the program. Not for steering a vehicle or any decision on safety.
{language}- It names one of its {config.num_labels} classes for every pixel, whatever the image shows.
"""


def _percent(share: float | None) -> str:
    return "not defined" if share is None else f"{100 * share:.2f}"


def _counts(sizes: dict[str, int]) -> str:
    """'224x224', or '224x224 (3), 720x1280 (5)' for several sizes."""
    return next(iter(sizes)) if len(sizes) == 1 else ", ".join(f"{size} ({count})" for size, count in sizes.items())
