"""What a run is built from: processes, data, model."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, DynamoBackend, ProjectConfiguration

from tqdm_seg.configuration_tqdm import PRESETS, TqdmConfig
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

from ..data.class_vectors import ClassVectors, read_class_vectors
from ..data.frames import FrameDataset, PlainRows
from ..data.shards import check_same_labels
from ..deploy.folder import from_pretrained, load_model
from ..deploy.speed import set_float32_arithmetic
from ..evaluation.class_sets import class_set
from ..evaluation.protocol import Protocol, check_view_sizes
from .checkpoint import whole_weights
from .options import TrainOptions
from .sets import FrameSets, TrainSet


def make_accelerator(options: TrainOptions) -> Accelerator:
    """The launched processes; raises ValueError for what they cannot do, naming the option."""
    _check_launch(options)
    if options.compile == "inductor":
        from torch._inductor import config  # here, because the compiler takes seconds to import

        config.fallback_random = True  # the same dropout and points as without compiling
    if options.precision is not None:
        set_float32_arithmetic(options.precision)
    accelerator = Accelerator(
        mixed_precision={"fp32": "no", "tf32": "no"}.get(options.precision, options.precision),
        gradient_accumulation_steps=options.accumulation, cpu=not torch.accelerator.is_available(),
        log_with=None if options.tracker == "none" else options.tracker,
        project_config=ProjectConfiguration(str(options.out), str(options.out / "tracker")),
        dynamo_backend=options.compile,
    )  # fmt: skip
    if accelerator.distributed_type == DistributedType.FSDP and (options.ema or options.vision == "lora"):
        raise ValueError("--ema and --vision lora need the whole model in every process; launch with DDP, not FSDP")
    return accelerator


def _check_launch(options: TrainOptions) -> None:
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ and not os.environ.get("PMI_SIZE"):
        raise ValueError(
            "accelerate launch --cpu starts a single process whatever --num_processes says; use torchrun "
            "--nproc_per_node N train.py, or accelerate launch --multi_gpu --num_processes N train.py, on CPUs too"
        )
    if options.precision == "tf32" and not torch.cuda.is_available():
        raise ValueError("--precision tf32 needs an NVIDIA GPU, and torch sees none; choose fp32")
    trackers = [str(tracker) for tracker in get_available_trackers()]
    if options.tracker not in ("none", *trackers):
        raise ValueError(f"--tracker {options.tracker} is not installed; choose {', '.join(trackers)} or none")
    if options.compile is not None and options.compile.upper() not in DynamoBackend.__members__:
        backends = ", ".join(DynamoBackend.__members__).lower()
        raise ValueError(f"--compile {options.compile} is no backend of accelerate; choose one of {backends}")


def open_data(options: TrainOptions) -> tuple[FrameSets | PlainRows, FrameDataset | PlainRows]:
    """Training and held-back frames; raises ValueError when their classes differ."""
    sources = [source._replace(split=source.split or options.train_split) for source in options.train_sources]
    held_back = (options.eval_source, options.eval_split)
    if options.class_names is not None:
        columns = (options.class_names, options.image_column, options.label_column)
        training, validation = (PlainRows(*place, *columns) for place in (sources[0][1:3], held_back))
        for frames, split in ((training, "--train-split"), (validation, "--eval-split")):
            if next(frames.frames(), None) is None:  # read now, so that errors show before the training
                raise ValueError(f"{frames.source} has no row in split {frames.split!r}; see {split}")
        return training, validation
    training = FrameSets(
        [TrainSet(name, FrameDataset(folder, split), weight) for name, folder, split, weight in sources]
    )
    validation = FrameDataset(*held_back)
    check_same_labels([*training.manifests, validation.index.manifest])
    return training, validation


def build_model(
    options: TrainOptions, classes: Sequence[str]
) -> tuple[TqdmForSemanticSegmentation, TqdmImageProcessor]:
    """A preset with random weights by --seed, or a model folder; the parts of classes new to it start at random.

    Raises FileNotFoundError when --model is neither.
    """
    torch.manual_seed(options.seed)
    changes, id2label = _config_changes(options), dict(enumerate(classes))
    table = None if options.class_vectors is None else read_class_vectors(options.class_vectors)
    if options.model in PRESETS:
        given = {} if table is None else _given_texts(table)
        net = TqdmForSemanticSegmentation(TqdmConfig.from_preset(options.model, id2label=id2label, **given, **changes))
        processor = TqdmImageProcessor()
    elif (Path(options.model) / "config.json").is_file():
        net, processor = load_model(Path(options.model))
        if changes:  # some add weights, or have no use for others
            net, _ = from_pretrained(
                TqdmForSemanticSegmentation, options.model, dtype=torch.float32, ignore_mismatched_sizes=True, **changes
            )
        if net.config.id2label != id2label:
            net.set_classes(id2label)
    else:
        raise FileNotFoundError(
            f"--model {options.model} is no preset ({', '.join(sorted(PRESETS))}) and no folder with a "
            "config.json; name one of them"
        )
    if table is not None:
        net.use_class_vectors(torch.from_numpy(table.vectors), table.about, options.centre_class_vectors)
    if options.eval_size:
        shortest, longest = sorted(options.eval_size)
        processor.do_resize, processor.size = True, {"shortest_edge": shortest, "longest_edge": longest}
    return net, processor


def _given_texts(table: ClassVectors) -> dict[str, Any]:
    """Fields of a preset whose class texts are given: no text tower, and an image-text space of their width."""
    width = {"projection_dim": table.vectors.shape[1]}
    return {"queries": "vectors", "class_vectors": table.about, "vision_config": width, "text_config": width}


def check_sizes(
    options: TrainOptions, net: TqdmForSemanticSegmentation, processor: TqdmImageProcessor,
    validation: FrameDataset | PlainRows,
) -> None:  # fmt: skip
    """Raises ValueError for a crop, or an image to evaluate, that is smaller than the model's two patches a side."""
    class_set(options.class_set, net.config.class_names)  # raises ValueError for a class that there is not
    patch = net.config.vision_config.patch_size
    if min(net.model.vision_tower.padded_size(options.crop, options.crop)) < 2 * patch:
        raise ValueError(f"--crop {options.crop} is under two patches of {patch} pixels; use {2 * patch} or more")
    if isinstance(validation, FrameDataset):  # rows without an index are checked as they are read
        check_view_sizes(net, validation, Protocol.of(processor))


def _config_changes(options: TrainOptions) -> dict[str, Any]:
    changes: dict[str, Any] = {
        "class_loss_weight": options.class_weight,
        "mask_loss_weight": options.mask_weight,
        "dice_loss_weight": options.dice_weight,
        "textual_loss_weight": options.textual_weight,
        "visual_loss_weight": options.visual_weight,
        "score_map_loss_weight": options.score_map_weight,
        "text_to_pixel_attention": False if options.no_text_attention else None,
        "queries": "random" if options.random_queries else None,
        "class_head": options.class_head,
        "centre_class_vectors": True if options.centre_class_vectors and options.class_vectors is None else None,
    }
    return {name: value for name, value in changes.items() if value is not None}


def choose_trained(net: TqdmForSemanticSegmentation, vision: str, lora_rank: int) -> None:
    """Freezes the vision tower, or adds adapters to its blocks; its pyramid, which is new, always learns."""
    if vision == "full":
        return
    tower = net.model.vision_tower
    if vision == "lora":
        from .lora import add_adapters  # here, because peft takes seconds to import

        add_adapters(tower, lora_rank)
    else:
        tower.requires_grad_(False)
    tower.pyramid.requires_grad_(True)


def unsharded(accelerator: Accelerator, net: TqdmForSemanticSegmentation) -> TqdmForSemanticSegmentation:
    """The model itself, or a whole copy in every process if FSDP has sharded it."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return net
    whole = TqdmForSemanticSegmentation(net.config).to(accelerator.device)
    whole.load_state_dict(whole_weights(net))
    return whole
