"""The model card: a template filled with the options, results and data of a run."""

import dataclasses
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from tqdm_seg.configuration_tqdm import PRESETS
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

from ..data.frames import FrameDataset, PlainRows
from ..evaluation.figures import absent_lines, mean_over, percent, short_protocol, sizes_text
from .options import EXAMPLE, TrainOptions
from .plan import Phase
from .sets import FrameSets, same_frames, shared_scenes

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"


def model_card(
    options: TrainOptions,
    model: TqdmForSemanticSegmentation,
    results: dict[str, Any],
    training: FrameSets | PlainRows,
    validation: FrameDataset | PlainRows,
    phases: Sequence[Phase] = (),
    image: str | None = None,
) -> str:
    """README.md of a trained model: metadata for the Hub, use, result with its protocol, data, recipe, limits.

    results: of `score_frames`, and "step" when the model is the best one of a run that goes on. phases: of the run.
    image: name of a file next to it, which shows a prediction.
    """
    protocol, best_step = results["protocol"], results.get("step")
    names = model.config.class_names
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    data = f"examples/{EXAMPLE}" if options.data is None else options.train_sources[0].folder
    card = ModelCard.from_template(
        card_metadata(options, results, training, validation),
        template_path=str(TEMPLATE),
        options=options,
        image=image,
        start=plain(Path(options.model).name),
        title=", ".join(map(plain, names)) if len(names) <= 4 else f"{len(names)} classes",
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) / 1e6,
        folder=json.dumps(options.push_to_hub or (options.out / ("model" if best_step is None else "best")).as_posix()),
        classes=[(i, plain(name), percent(results["iou"][name])) for i, name in model.config.id2label.items()],
        miou=percent(results["miou"]),
        over=mean_over([results]),
        absent=" ".join(map(plain, absent_lines(results))),
        evaluated=evaluated_frames(training, validation),
        best_step=best_step,
        protocol=protocol,
        protocol_text=short_protocol(protocol),
        ground_truth_sizes=sizes_text(protocol["ground_truth_size"]),
        label_map=code(protocol["labels"]["name"]),
        label_policy=plain(protocol["labels"]["policy"]),
        class_texts=class_texts(model.config.class_vectors),
        open_classes=model.config.has_open_classes,
        training=_training_text(training, data),
        validation=_part_text(validation, options.eval_data or data),
        overlap=overlap_text(training, validation),
        random_start=options.model in PRESETS,
        start_weights="random weights" if options.model in PRESETS else f"the weights of {code(options.model)}",
        phases=[(plain(phase.name), phase.first_step, phase.last_step) for phase in phases],
        processes="one process" if world == 1 else f"each of {world} processes",
        torch_version=torch.__version__,
        transformers_version=transformers.__version__,
        command=shlex.join(["accelerate", "launch", "train.py", *changed_options(options)]),
    )
    return f"{card}\n"


def evaluated_frames(training: FrameSets | PlainRows, validation: FrameDataset | PlainRows) -> str:
    """What the scored frames are: held back from training, or the very frames that are trained on."""
    seen = same_frames(training, validation)
    return "frames that were trained on, which says nothing of others" if seen else "held-back frames"


def class_texts(table: dict[str, Any] | None) -> str:
    """Whose vectors the class texts are, with their notice; nothing for a model with a text tower."""
    if table is None:
        return ""
    source, licence = (plain(str(table.get(key, "not stated"))) for key in ("source", "licence"))
    about = f"vectors of {plain(str(table.get('model', 'a model not stated')))}, {len(table['names'])} names"
    return f"Class texts: {about}; from {source}; licence: {licence}."


def plain(text: str) -> str:
    """Text on one line in which Markdown sees no markup."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """Text on one line as a code span of Markdown."""
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"


def card_metadata(
    options: TrainOptions,
    results: dict[str, Any],
    training: FrameSets | PlainRows,
    validation: FrameDataset | PlainRows,
) -> ModelCardData:
    """What the Hub reads: task, licence, mIoU, and data and start model if they are on the Hub."""
    test = options.eval_source
    name = dataset_name(validation)
    figure = EvalResult(
        task_type="image-segmentation",
        task_name="Semantic segmentation",
        dataset_type=hub_name(test) or re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        dataset_name=name,
        dataset_split=validation.split,
        metric_type="mean_iou",
        metric_name=f"mIoU over {mean_over([results])}",
        metric_value=None if results["miou"] is None else round(results["miou"], 4),
    )
    measured = figure.metric_value is not None
    trained_on = [name for source in options.train_sources if (name := hub_name(source.folder))]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        license=options.license,
        tags=["semantic-segmentation", "tqdm"],
        datasets=trained_on or None,
        base_model=hub_name(options.model),
        metrics=["mean_iou"],
        model_name=(options.push_to_hub or options.out.resolve().name).split("/")[-1] if measured else None,
        eval_results=[figure] if measured else None,
    )


def hub_name(place: str) -> str | None:
    """NAME/REPO of a Hub address, a Hub name or a folder in the Hub's cache; None for other places."""
    patterns = (r"hf://datasets/([^/@]+)/([^/@]+)", r".*/(?:datasets|models)--(.+?)--(.+?)/snapshots/.*")
    if not Path(place).exists():
        patterns += (r"([\w.-]+)/([\w.-]+)$",)
    found = next((match for pattern in patterns if (match := re.match(pattern, place))), None)
    return "/".join(found.groups()) if found else None


def dataset_name(frames: FrameDataset | PlainRows) -> str:
    """Name of the data, by its manifest or else its place."""
    return frames.index.manifest["dataset"] if isinstance(frames, FrameDataset) else Path(frames.source).name


def changed_options(options: TrainOptions) -> list[str]:
    """The words that make train.py's command line these options, without defaults and --resume."""
    words = []
    for field in dataclasses.fields(TrainOptions):
        value = getattr(options, field.name)
        if value == field.default or field.name in ("resume", "phase"):
            continue
        words.append(f"--{field.name.replace('_', '-')}")
        if field.name == "data":
            words += value
        elif isinstance(value, tuple):
            words.append(("x" if field.name == "eval_size" else ",").join(map(str, value)))
        elif not isinstance(value, bool):
            words.append(str(value))
    return words


def _training_text(frames: FrameSets | PlainRows, place: str) -> str:
    """What was trained on: every set, and where there are several, which share of the samples it has."""
    if isinstance(frames, PlainRows):
        return _part_text(frames, place)
    if len(frames.sets) == 1:
        return _part_text(frames.sets[0].frames, place)
    parts = (_part_text(part.frames, part.frames.folder).rstrip(".") for part in frames.sets)
    shares = (f"{share:.0%} of the samples" for share in frames.shares)
    return "; ".join(f"{part}, {share}" for part, share in zip(parts, shares, strict=True)) + "."


def _part_text(frames: FrameDataset | PlainRows, place: str) -> str:
    """Data set, split and size of what was trained or tested on."""
    if not isinstance(frames, FrameDataset):
        return f"{code(place)}, split {code(frames.split)}."
    return f"{plain(dataset_name(frames))} ({code(place)}), split {code(frames.split)}, {len(frames)} frames."


def overlap_text(training: FrameSets | PlainRows, validation: FrameDataset | PlainRows) -> str:
    """What is known of scenes that are both trained and tested on."""
    if isinstance(training, PlainRows):
        return "Read without an index: which scenes are in both parts is not known."
    if shared := shared_scenes(training, validation):
        scenes = plain(", ".join(shared))
        return (
            f"Both parts hold frames of {scenes}, and neighbouring frames look alike: the score shows "
            "that training works, not that the model copes with other places, weather or cameras."
        )
    if "" not in training.scenes and "" not in validation.scenes:
        return "No scene is in both parts."
    if dataset_name(validation) not in {dataset_name(part.frames) for part in training.sets}:
        return "Trained and tested on different data sets."
    return "Scenes are not named in all of the data: frames of both parts may be neighbours, which look alike."
