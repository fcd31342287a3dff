"""Options of `train` and `ablate`. Defaults are the quick start's; the published settings' values are in the help."""

import argparse
import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..data.files import example
from ..data.options import check_workers
from ..evaluation.options import class_set_option, parse_sets
from ..program import cut, names, option, size

# Names of configuration_tqdm.PRESETS, which is not imported here: it takes seconds.
PRESETS = ("clip_vit_b16", "eva02_clip_b16", "eva02_clip_l14", "tiny")

# Example frames that are trained on without --data.
EXAMPLE = "orfd_mini"

# What an ablation calls the held-back part among the sets that it tests on.
HELD_BACK = "held_back"

# Options that a resumed run may change: they decide where and how fast it runs, not what it computes.
FREE_OPTIONS = (
    "out", "resume", "phase", "dry_run", "doctor", "workers", "log_every", "save_every_steps", "eval_every_steps",
    "keep", "overlays", "tracker", "license", "push_to_hub", "batch_size", "accumulation", "gradient_checkpointing",
    "compile", "channels_last", "data", "eval_data", "model", "precision", "class_set", "class_vectors",
)  # fmt: skip

# Options that a resumed run may change in a new phase: how it goes on from the weights that it has.
PHASE_OPTIONS = (
    "steps", "lr", "vision_lr_mult", "min_lr", "warmup_steps", "weight_decay", "clip_norm", "sampling", "temperature",
    "min_pixels", "crop", "teacher_drop_path", "class_weight", "mask_weight", "dice_weight", "textual_weight",
    "visual_weight", "score_map_weight",
)  # fmt: skip

# Numbers that must be above 0; all others may be 0.
_POSITIVE = (
    "steps", "batch_size", "accumulation", "log_every", "keep", "crop", "lr", "vision_lr_mult", "temperature",
    "lora_rank",
)  # fmt: skip

_run = partial(option, group="run")
_model = partial(option, group="model")
_data = partial(option, group="data")
_optimisation = partial(option, group="optimisation")
_speed = partial(option, group="speed and memory")


class TrainSource(NamedTuple):
    """A training set as --data names it. name: "" where one is given as a path alone; split: None for --train-split."""

    name: str
    folder: str
    split: str | None
    weight: Fraction


def is_named(text: str) -> bool:
    """Whether a text is NAME=PATH, and not a path with such a name."""
    return re.match(r"[\w.-]+=", text) is not None and not Path(text).exists()


class CollectSets(argparse.Action):
    """--data again: named sets are added to named ones, a path replaces what came before, as of any option."""

    def __call__(self, parser: Any, values: Any, given: Any, option_string: Any = None) -> None:
        before = getattr(values, self.dest) or ()
        named = all(map(is_named, (*before, *given)))
        setattr(values, self.dest, (*before, *given) if named else tuple(given))


def parse_training_sets(texts: Sequence[str]) -> list[TrainSource]:
    """The set of one PATH, or those of NAME=PATH[:SPLIT][@WEIGHT] texts; raises ValueError for others."""
    if len(texts) == 1 and not is_named(texts[0]):
        return [TrainSource("", texts[0], None, Fraction(1))]
    places, weights = [], []
    for text in texts:
        place, weight = re.fullmatch(r"(.*?)(?:@(\d+(?:\.\d+)?))?", text).groups()
        weights.append(Fraction(weight or 1))
        if not weights[-1]:
            raise ValueError(f"--data {cut(text)} has the weight 0; leave the set out, or give it a weight above 0")
        if not is_named(text):
            raise ValueError(f"--data {cut(text)} has no name; several sets are named: NAME=PATH[:SPLIT][@WEIGHT]")
        places.append(place)
    sources = parse_sets(places)
    if boxed := [source.name for source in sources if source.box]:
        raise ValueError(f"--data {boxed[0]} names a size; training crops at the image's own: leave out @HxW")
    return [TrainSource(*source[:3], weight) for source, weight in zip(sources, weights, strict=True)]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Trains tqdm. Without options this is the quick start: a small model, 56 real frames, minutes on a CPU.

    The run folder --out receives args.json, log.jsonl, checkpoints/, best/ (with --eval-every-steps), and in the end
    model/ (loadable with `AutoModelForSemanticSegmentation.from_pretrained(..., trust_remote_code=True)`),
    results.json and overlays/*.png. After any interruption the same command with --resume continues to the same bits.

        tqdm-seg train --dry-run                                 what would be trained, on what, and the memory it takes
        accelerate launch train.py                               as `accelerate config` says
        torchrun --nproc_per_node 2 -m tqdm_seg.train            several processes, on CPUs too
        bash recipes/gta5_clip_vit_b.sh                          a published setting
    """

    # Where the run lives and what it reports.
    out: Path = _run(Path("runs/quickstart"), help="run folder")
    resume: bool = _run(False, help="continue from the last checkpoint in --out, if there is one")
    phase: str | None = _run(
        None, metavar="NAME", help="with --resume: go on from the last checkpoint with other --steps, rates, "
        "weights of losses or sampling; warm-up and decay start again; args.json and log.jsonl name the phase",
    )  # fmt: skip
    dry_run: bool = _run(False, help="build everything, print the plan and the memory it takes, and stop")
    doctor: bool = _run(
        False, help="print what there is to know of the data, and stop: class shares, likely 0/255 masks, leaks, "
        "orientations, bit depths, sizes, the largest workable --min-pixels; reads every image, writes nothing",
    )  # fmt: skip
    seed: int = _run(0, help="decides the first weights and every batch")
    log_every: int = _run(10, help="steps per log line, which holds means over them")
    save_every_steps: int = _run(50, help="steps between checkpoints, 0: none (published: 2000; default: %(default)s)")
    keep: int = _run(2, help="newest checkpoints to keep")
    eval_every_steps: int = _run(0, help="steps between evaluations, which keep the best model; 0: only in the end")
    overlays: int = _run(6, help="held-back frames to draw at every evaluation; the model card shows one")
    tracker: str = _run("tensorboard", help="tensorboard, wandb, trackio, ..., or none")
    license: str = _run("apache-2.0", help="licence named on the model card")
    push_to_hub: str | None = _run(None, metavar="NAME/REPO", help="push the model folder there in the end")

    # What is trained.
    model: str = _model("tiny", help=f"preset with random weights ({', '.join(PRESETS)}), or model folder")
    vision: Literal["full", "frozen", "lora"] = _model(
        "full",
        help="vision tower: trained (published), frozen but for its pyramid, or with low-rank adapters, which are "
        "merged into the model folder in the end",
    )
    lora_rank: int = _model(16, help="rank of the adapters of --vision lora")
    no_text_attention: bool = _model(False, help="ablation: no text-to-pixel attention in the pixel decoder")
    random_queries: bool = _model(False, help="ablation: learned random vectors instead of the class texts")
    class_vectors: str | None = _model(
        None,
        metavar="NAME|FILE",
        help="class texts given as vectors, without a text tower: clip_vit_b16 (171 names of COCO-Stuff), or an .npz "
        "of names, vectors, model, source and licence; see docs/training.md",
    )
    centre_class_vectors: bool = _model(
        False, help="subtract the mean of all class vectors: raw texts of CLIP lie close together"
    )
    class_head: Literal["linear", "cosine"] | None = _model(
        None,
        help="linear: weights per class (published); cosine: compares with the class texts, so that a trained model "
        "takes new class names without training (default: the model's, linear)",
    )
    class_weight: float | None = _model(None, help="weight of the class loss (default: the model's, 2)")
    mask_weight: float | None = _model(None, help="weight of the mask loss (default: the model's, 5)")
    dice_weight: float | None = _model(None, help="weight of the dice loss (default: the model's, 5)")
    textual_weight: float | None = _model(None, help="weight of the textual regulariser (default: the model's, 1)")
    visual_weight: float | None = _model(None, help="weight of the visual regulariser (default: the model's, 1)")
    score_map_weight: float | None = _model(None, help="weight of the score-map regulariser (default: the model's, 1)")

    # What it is trained on.
    data: tuple[str, ...] | None = _data(
        None, nargs="+", action=CollectSets, metavar="PATH",
        help="folder or URL of a prepared dataset; its classes become the model's. Several are "
        "NAME=PATH[:SPLIT][@WEIGHT] each, need --eval-data, and have samples by their weights, 1 if none is given "
        "(default: the example frames)",
    )  # fmt: skip
    train_split: str = _data("train", help="split of --data to train on")
    eval_data: str | None = _data(None, metavar="PATH", help="dataset to evaluate on (default: --data)")
    eval_split: str = _data("validation", help="split to evaluate on")
    eval_size: tuple[int, int] | None = _data(
        None, type=size, help="fit evaluated images into this size (default: keep their size)"
    )
    class_set: str | None = class_set_option("data")
    no_index: bool = _data(
        False,
        help="read --data with datasets.load_dataset, without an index: any dataset of images and 8-bit masks of class "
        "ids; needs --class-names, and samples frames in shuffled order",
    )
    image_column: str = _data("image", help="with --no-index: name of the column of images")
    label_column: str = _data("label", help="with --no-index: name of the column of masks")
    class_names: tuple[str, ...] | None = _data(None, type=names, help="with --no-index: class names in id order")
    sampling: Literal["rare-class", "permutation"] = _data(
        "rare-class",
        help="first a class, then a frame with enough of it (published), or every frame once an epoch",
    )
    temperature: float = _data(
        100.0, help="rare-class: 100 draws classes evenly (published), 0.01 favours rare classes (default: %(default)g)"
    )
    min_pixels: int = _data(
        3000,
        help="rare-class: a frame drawn for a class has more pixels of it, its crop over half as many (published; "
        "default: %(default)s)",
    )
    crop: int = _data(128, metavar="PX", help="side of the training crop (published: 512; default: %(default)s)")
    resize: Literal["window", "whole"] = _data(
        "window",
        help="resize only what the crop shows, or the whole image with OpenCV's rounding (published)",
    )
    workers: int = _data(0, help="loader processes, 0: load in the main process")

    # How it is trained.
    steps: int = _optimisation(300, help="optimiser steps (published: 20000; default: %(default)s)")
    batch_size: int = _optimisation(4, help="images per process and forward pass (published: 8; default: %(default)s)")
    accumulation: int = _optimisation(1, help="forward passes per optimiser step")
    lr: float = _optimisation(5e-4, help="peak learning rate (published: 1e-5, Cityscapes 1e-4; default: %(default)s)")
    vision_lr_mult: float = _optimisation(
        1.0, help="vision tower: --lr times this (published: 0.1, for a pre-trained tower; default: %(default)s)"
    )
    min_lr: float = _optimisation(1e-6, help="final learning rate (published; default: %(default)s)")
    warmup_steps: int = _optimisation(20, help="steps of linear warm-up (published: 1500; default: %(default)s)")
    weight_decay: float = _optimisation(
        1e-4, help="AdamW's weight decay (published: 1e-4, Cityscapes 1e-5; default: %(default)s)"
    )
    no_embedding_decay: bool = _optimisation(
        False, help="no decay for the mask decoder's level and query embeddings (published for Cityscapes)"
    )
    clip_norm: float = _optimisation(0.0, help="largest norm of all gradients together, 0: no limit (published)")
    ema: float = _optimisation(
        0.0, help="decay of averaged weights, which are evaluated and saved; 0: none (published)"
    )
    loss_counts: Literal["step", "published"] = _optimisation(
        "step",
        help="losses are divided by the counts of the whole step, so that results do not depend on the number of "
        "processes; published: by those of each process, except the number of masks",
    )
    teacher_drop_path: bool = _optimisation(False, help="the frozen teacher drops paths at random (published)")

    # What changes time and memory, and results in their last digits.
    precision: Literal["fp32", "tf32", "bf16", "fp16"] | None = _speed(
        None, help="number format of the forward pass (default: what `accelerate launch` was told, else fp32)"
    )
    teacher_precision: Literal["fp32", "bf16"] = _speed(
        "fp32",
        help="number format of the frozen teacher; bf16 takes a third of its time and half its memory, and moves "
        "loss_visual by 1e-4 of the embeddings' mean square (published: fp32; default: %(default)s)",
    )
    gradient_checkpointing: bool = _speed(False, help="compute activations twice instead of storing them")
    channels_last: bool = _speed(False, help="store the channels of a pixel together; in bf16 0.9 of the time")
    compile: str | None = _speed(
        None,
        metavar="BACKEND",
        help="torch.compile the model: inductor, aot_eager, ...; for GPUs: on a CPU it takes minutes and gains nothing",
    )

    def __post_init__(self) -> None:
        """Raises ValueError, naming the option, for what makes no sense."""
        object.__setattr__(self, "out", Path(self.out))
        if isinstance(self.data, str):
            object.__setattr__(self, "data", (self.data,))
        if self.data == ():
            raise ValueError("--data is empty; name a dataset, or leave it out")
        if len(self.train_sources) > 1 and self.no_index:
            raise ValueError("--no-index reads one dataset; prepare several, or give one --data")
        if len(self.train_sources) > 1 and self.eval_data is None:
            raise ValueError("several --data sets need --eval-data PATH, the dataset to evaluate on")
        if self.phase is not None and not self.resume:
            raise ValueError(f"--phase {cut(self.phase)} goes on with a run; add --resume")
        if self.no_index != (self.class_names is not None):
            raise ValueError("--no-index needs --class-names, and --class-names needs --no-index")
        if self.no_index and self.data is None:
            raise ValueError("--no-index needs --data: the example frames have an index")
        for name, value in vars(self).items():
            lowest_is_zero = name not in _POSITIVE
            if isinstance(value, int | float) and (value < 0 or (value == 0 and not lowest_is_zero)):
                raise ValueError(f"{_flag(name)} {value} must be {'0 or more' if lowest_is_zero else 'above 0'}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{_flag(name)} {value} is no finite number")
        check_workers(self.workers, 0)
        if self.random_queries and self.class_vectors is not None:
            raise ValueError("--random-queries replaces the class texts that --class-vectors gives; use one of them")
        if self.min_lr > self.lr:
            raise ValueError(f"--min-lr {self.min_lr:g} is above --lr {self.lr:g}; it is where the rate ends")
        if self.ema >= 1:
            raise ValueError(f"--ema {self.ema} must be below 1, such as 0.999")
        if self.push_to_hub is not None:
            from huggingface_hub.utils import validate_repo_id  # here, because it takes time to import

            try:
                validate_repo_id(self.push_to_hub)
            except ValueError as error:
                raise ValueError(f"--push-to-hub {self.push_to_hub}: {error}") from error

    @property
    def train_sources(self) -> list[TrainSource]:
        """Where the training frames lie."""
        return parse_training_sets((str(example(EXAMPLE)),) if self.data is None else self.data)

    @property
    def eval_source(self) -> str:
        """Where the held-back frames lie."""
        return self.train_sources[0].folder if self.eval_data is None else self.eval_data


class Variant(NamedTuple):
    """A row of an ablation: what it is called, and the options of `train` in which it differs from the full model."""

    label: str
    changes: dict[str, Any]


# The table of class texts of an ablation without --class-vectors, and what stands for random ones of the same names.
REAL_TEXTS, RANDOM_TEXTS = "clip_vit_b16", "random"
VARIANTS = {
    "full": Variant("full model", {}),
    "no-text-attention": Variant("without text-to-pixel attention", {"no_text_attention": True}),
    "random-queries": Variant(
        "random queries instead of class texts",
        {"random_queries": True, "textual_weight": 0.0, "class_vectors": None, "centre_class_vectors": False},
    ),
    "no-textual": Variant("without the textual regulariser", {"textual_weight": 0.0}),
    "no-visual": Variant("without the visual regulariser", {"visual_weight": 0.0}),
    "no-score-map": Variant("without the score-map regulariser", {"score_map_weight": 0.0}),
    "real-texts": Variant(
        "vectors of CLIP as class texts", {"class_vectors": REAL_TEXTS, "centre_class_vectors": True}
    ),
    "random-texts": Variant("random vectors as class texts", {"class_vectors": RANDOM_TEXTS}),
    "raw-texts": Variant("class texts as they are, not centred", {"centre_class_vectors": False}),
    "linear-head": Variant("linear class head", {"class_head": "linear"}),
    "cosine-head": Variant("cosine class head", {"class_head": "cosine"}),
}
# Without --variants: what the paper's method consists of.
PARTS = tuple(VARIANTS)[:6]

# Options of `train` that an ablation sets itself.
_SET_BY_ABLATION = (
    "seed", "resume", "phase", "doctor", "overlays", "tracker", "push_to_hub", "no_text_attention", "random_queries",
    "textual_weight", "visual_weight", "score_map_weight", "no_index",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AblateOptions(TrainOptions):
    """Trains models without one part of tqdm each, from the same seeds, and tests them where they never were.

        tqdm-seg ablate                         the example frames; five dashcam frames are the other place
        tqdm-seg ablate --data data/ycor --test rugd=data/rugd orfd=data/orfd --eval-every-steps 50 --out runs/e1

        DIR/ablation.md, .json      mIoU of every set with intervals, differences to the first variant and to baselines
        DIR/frames/SET/*.parquet    pixel counts of every frame, from which every figure follows; for table and compare
        DIR/runs/VARIANT_SEED       the runs; the same command goes on after any interruption

    The held-back part (--eval-data, --eval-split) is tested, too. With --eval-every-steps the best model by that part
    counts, otherwise the last; no test set chooses anything. Beside the models stand three baselines fitted on the
    training frames (constant answer, location mask, colour classifier) and what `audit` finds in every pair of sets.
    All options of `train` hold for every run.
    """

    out: Path = _run(Path("runs/ablation"), help="folder of runs, tables and figures")
    seeds: tuple[int, ...] = _run((0, 1, 2), nargs="+", help="one run each")
    variants: tuple[str, ...] = _run(
        PARTS,
        type=names,
        metavar="A,B,...",
        help=f"what to train, of {', '.join(VARIANTS)}; others are compared with the first (default: the first six)",
    )
    test: tuple[str, ...] | None = _data(
        None, nargs="+", action="extend", metavar="NAME=PATH:SPLIT",
        help="sets to test on, as --data of evaluate, under names of your choice (default: five dashcam frames)",
    )  # fmt: skip
    min_scenes: int = _data(
        3, help="classes in fewer scenes of a test set are named and left out of its mean (default: %(default)s)"
    )

    def __post_init__(self) -> None:
        """Raises ValueError for what `train` refuses, and for options that the ablation sets itself."""
        super().__post_init__()
        for field in dataclasses.fields(self):
            if field.name in _SET_BY_ABLATION and getattr(self, field.name) != field.default:
                raise ValueError(f"{_flag(field.name)} is set by the ablation for every run; leave it out")
        if min(self.seeds) < 0 or len({*self.seeds}) < len(self.seeds):
            raise ValueError(f"--seeds {' '.join(map(str, self.seeds))} must be different numbers, 0 or more")
        if unknown := [name for name in self.variants if name not in VARIANTS]:
            raise ValueError(f"--variants: there is no {unknown[0][:60]!r}; choose among {', '.join(VARIANTS)}")
        if HELD_BACK in {source.name.lower() for source in parse_sets(self.test or ())}:
            raise ValueError(f"--test: a set cannot be called {HELD_BACK}, as the held-back part is; rename it")

    def of_run(self, **changes: Any) -> dict[str, Any]:
        """The fields of one run's `TrainOptions`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(TrainOptions)} | changes


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
