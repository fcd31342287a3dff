"""What a person reads after a run: predictions drawn beside the truth, and the model card."""

import argparse
import re
import shlex
from pathlib import Path

import torch
import transformers
from huggingface_hub import EvalResult, ModelCardData

from tqdm_seg.configuration_tqdm import PRESETS
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

from ..data.frames import FrameDataset, PlainRows
from ..evaluation.figures import percent, short_protocol, sizes_text
from .options import parse_options

_NO_LANGUAGE = "- It started from random weights, so the class names are mere labels to it: it knows no language.\n"


def model_card(
    args: argparse.Namespace,
    model: TqdmForSemanticSegmentation,
    results: dict[str, object],
    training: FrameDataset | PlainRows,
    validation: FrameDataset | PlainRows,
) -> str:
    """README.md of a trained model: metadata for the Hub, use, result with its protocol, data, recipe, limits.

    results: of `evaluate`, and "step" when the model is the best one of a run that goes on.
    """
    config, protocol = model.config, results["protocol"]
    folder = args.push_to_hub or f"{args.out}/{'best' if 'step' in results else 'model'}"
    names = config.class_names
    rows = "\n".join(
        f"| {index} | {name} | {percent(results['iou'][name])} |" for index, name in config.id2label.items()
    )
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) / 1e6
    return f"""---
{card_metadata(args, results, training, validation)}
---

# tqdm ({Path(args.model).name}): {", ".join(names) if len(names) <= 4 else f"{len(names)} classes"}

Semantic segmentation with one textual query per class name, after [tqdm](https://arxiv.org/abs/2407.09033), the
Textual Query-Driven Mask Transformer. {parameters:.1f} million parameters, {trained:.1f} million of them trained.

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

| id | class | IoU, % |
|---|---|---|
{rows}
| | **mean** | **{percent(results["miou"])}** |

{_chosen(args, results)}Protocol: {protocol["frames"]} held-back frames; {short_protocol(protocol)}; images resized:
{protocol["resize"]}; {protocol["interpolation"]}; truth {protocol["truth"]}, {sizes_text(protocol["truth_size"])};
{protocol["pooling"]}. The figures hold for these frames and this protocol; all of them are in `results.json`.

## Labels

{protocol["labels"]["ignored"]} is ignored. Label map `{protocol["labels"]["name"]}`: {protocol["labels"]["policy"]}.

## Data

- Trained on {_part_text(training, args.data)}
- Tested on {_part_text(validation, args.eval_data or args.data)}
- {overlap_text(training, validation)}

## Recipe

{_recipe_text(args)}

```bash
{shlex.join(["accelerate", "launch", "train.py", *changed_options(args)])}
```

## Intended use and limits

- For research on segmentation and for trying out the program. Not for steering a vehicle or any decision on safety.
{_NO_LANGUAGE if args.model in PRESETS else ""}- It names one of its {len(names)} classes for every pixel, \
whatever the image shows.
"""


def card_metadata(
    args: argparse.Namespace,
    results: dict[str, object],
    training: FrameDataset | PlainRows,
    validation: FrameDataset | PlainRows,
) -> str:
    """The YAML that the Hub reads: task, licence, data and start as far as they are on the Hub, the mIoU."""
    test = args.eval_data or args.data
    name = dataset_name(validation)
    figure = EvalResult(
        task_type="image-segmentation",
        task_name="Semantic segmentation",
        dataset_type=hub_name(test) or re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        dataset_name=name,
        dataset_split=validation.split,
        metric_type="mean_iou",
        metric_name="mIoU",
        metric_value=None if results["miou"] is None else round(results["miou"], 4),
    )
    measured = figure.metric_value is not None
    trained_on = hub_name(args.data)
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        license=args.license,
        tags=["semantic-segmentation", "tqdm"],
        datasets=[trained_on] if trained_on else None,
        base_model=hub_name(args.model),
        metrics=["mean_iou"],
        model_name=(args.push_to_hub or Path(args.out).resolve().name).split("/")[-1] if measured else None,
        eval_results=[figure] if measured else None,
    ).to_yaml()


def hub_name(place: str) -> str | None:
    """NAME/REPO of a Hub address, a Hub name or a folder in the Hub's cache; None for what lies elsewhere."""
    patterns = (r"hf://datasets/([^/@]+)/([^/@]+)", r".*/(?:datasets|models)--(.+?)--(.+?)/snapshots/.*")
    if not Path(place).exists():
        patterns += (r"([\w.-]+)/([\w.-]+)$",)
    found = next((match for pattern in patterns if (match := re.match(pattern, place))), None)
    return "/".join(found.groups()) if found else None


def dataset_name(frames: FrameDataset | PlainRows) -> str:
    """What the data is called: by its manifest, or by its place."""
    return frames.index.manifest["dataset"] if isinstance(frames, FrameDataset) else Path(frames.source).name


def changed_options(args: argparse.Namespace) -> list[str]:
    """The words that make train.py's command line these options; what has its default, and --resume, is left out."""
    words = []
    for name, default in vars(parse_options("", [])).items():
        value = getattr(args, name)
        if value == default or name == "resume":
            continue
        words.append(f"--{name.replace('_', '-')}")
        if name == "classes":
            words.append(",".join(value))
        elif not isinstance(value, bool):
            words += map(str, value) if isinstance(value, list) else [str(value)]
    return words


def _chosen(args: argparse.Namespace, results: dict[str, object]) -> str:
    """How a model that is not a run's last one was chosen."""
    if "step" not in results:
        return ""
    return (
        f"The weights after step {results['step']} of {args.steps}, the best so far on these very frames: on others "
        "the score is likely lower.\n\n"
    )


def _part_text(frames: FrameDataset | PlainRows, place: str) -> str:
    """Data set, split and size of what was trained or tested on."""
    if not isinstance(frames, FrameDataset):
        return f"`{place}`, split `{frames.split}`."
    return f"{dataset_name(frames)} (`{place}`), split `{frames.split}`, {len(frames)} frames."


def overlap_text(training: FrameDataset | PlainRows, validation: FrameDataset | PlainRows) -> str:
    """What is known of scenes that are both trained and tested on."""
    if not isinstance(training, FrameDataset):
        return "Read without an index: which scenes are in both parts is not known."
    shared = sorted({*training.scenes} & {*validation.scenes} - {""})
    if shared:
        return (
            f"Both parts hold frames of {', '.join(shared)}, and neighbouring frames look alike: the score shows that "
            "training works, not that the model copes with other places, weather or cameras."
        )
    if "" not in training.scenes and "" not in validation.scenes:
        return "No scene is in both parts."
    if dataset_name(training) != dataset_name(validation):
        return "Trained and tested on different data sets."
    return "Scenes are not named in all of the data: frames of both parts may be neighbours, which look alike."


def _recipe_text(args: argparse.Namespace) -> str:
    """The training in words: what the command below decides by its defaults, too."""
    start = "random weights" if args.model in PRESETS else f"the weights of `{args.model}`"
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    processes = "one process" if world == 1 else f"each of {world} processes"
    batch = f"{args.batch_size} x {args.accumulation}"
    return (
        f"From {start}: {args.steps} steps of {batch} images in {processes}, crop {args.crop}. AdamW, peak rate "
        f"{args.lr:g} (vision tower x {args.vision_lr_mult:g}), {args.warmup_steps} steps of warm-up, polynomial "
        f"decay to {args.min_lr:g}, weight decay {args.weight_decay:g}, seed {args.seed}. Random scale 0.5 to 2, crop, "
        f"flip and colours. torch {torch.__version__}, transformers {transformers.__version__}. Other options than the "
        "defaults:"
    )
