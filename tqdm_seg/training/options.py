"""The command line of train.py. Defaults are the quick start's; the published settings' values stand beside them."""

import argparse

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from tqdm_seg.configuration_tqdm import PRESETS

# Values of --reference-dtype.
REFERENCE_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}

# Options that a resumed run may change: they decide where and how fast it runs, not what it computes.
FREE_OPTIONS = (
    "out", "resume", "dry_run", "workers", "log_every", "save_every", "eval_every", "keep", "overlays", "tracker",
    "license", "push_to_hub", "batch_size", "accumulation", "gradient_checkpointing", "compile",
    "channels_last",
)  # fmt: skip


def parse_options(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The options of a run; ends the program, naming the option, for what makes no sense."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    run_options(parser.add_argument_group("run"))
    model_options(parser.add_argument_group("model"))
    data_options(parser.add_argument_group("data"))
    optimisation_options(parser.add_argument_group("optimisation"))
    speed_options(parser.add_argument_group("speed and memory"))
    args = parser.parse_args(argv)
    if args.no_index != (args.classes is not None):
        parser.error("--no-index needs --classes, and --classes is for --no-index: prepared datasets name theirs")
    positive = ("steps", "batch_size", "accumulation", "log_every", "keep", "crop", "lr", "vision_lr_mult")
    for name, value in vars(args).items():
        if isinstance(value, int | float) and (value < 0 or (value == 0 and name in (*positive, "temperature"))):
            parser.error(f"--{name.replace('_', '-')} {value} must be {'above 0' if name in positive else '0 or more'}")
    if args.push_to_hub:
        try:
            validate_repo_id(args.push_to_hub)
        except HFValidationError as error:
            parser.error(f"--push-to-hub {args.push_to_hub}: {error}")
    if args.ema >= 1:
        parser.error(f"--ema {args.ema} must be below 1, such as 0.999")
    return args


def run_options(group: argparse._ArgumentGroup) -> None:
    """Where the run lives and what it tells."""
    add = group.add_argument
    add("--out", default="runs/quickstart", help="run folder, made if missing (default: %(default)s)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out, if there is one")
    add("--dry-run", action="store_true", help="build everything, print the plan and the memory it takes, and stop")
    add("--seed", type=int, default=0, help="decides the first weights and every batch (default: %(default)s)")
    add("--log-every", type=int, default=10, help="steps per log line, which holds the means over them (%(default)s)")
    add("--save-every", type=int, default=50, help="steps between checkpoints, 0: none (published: 2000; %(default)s)")
    add("--keep", type=int, default=2, help="newest checkpoints to keep (default: %(default)s)")
    add("--eval-every", type=int, default=0, help="steps between evaluations, the best model is kept; 0: in the end")
    add("--overlays", type=int, default=6, help="held-back frames to draw at every evaluation (default: %(default)s)")
    add("--tracker", default="tensorboard", help="tensorboard, wandb, trackio, ..., or none (default: %(default)s)")
    add("--license", default="apache-2.0", help="licence named on the model card (default: %(default)s)")
    add("--push-to-hub", metavar="NAME/REPO", help="in the end push the model folder there")


def model_options(group: argparse._ArgumentGroup) -> None:
    """What is trained."""
    add = group.add_argument
    presets = ", ".join(sorted(PRESETS))
    add("--model", default="tiny", help=f"preset with random weights ({presets}), or model folder (%(default)s)")
    add(
        "--vision",
        choices=["full", "frozen", "lora"],
        default="full",
        help="vision tower: trained (published), frozen but for its pyramid, or with low-rank adapters, which are "
        "merged into the model folder in the end (default: %(default)s)",
    )
    add("--lora-rank", type=int, default=16, help="rank of the adapters of --vision lora (default: %(default)s)")
    add("--no-text-attention", action="store_true", help="ablation: no text-to-pixel attention in the pixel decoder")
    add("--random-queries", action="store_true", help="ablation: learned random vectors instead of the class texts")
    for name in ("textual", "visual", "score-map"):
        add(f"--{name}-weight", type=float, help=f"weight of the {name} regulariser (default: the model's, 1)")


def data_options(group: argparse._ArgumentGroup) -> None:
    """What it is trained on."""
    add = group.add_argument
    add(
        "--data",
        default="examples/orfd_mini",
        help="folder or URL of a dataset made by a program of dataset_scripts/; its classes become the model's "
        "(default: %(default)s)",
    )
    add("--train-split", default="train", help="split of --data to train on (default: %(default)s)")
    add("--eval-data", metavar="DATA", help="dataset to evaluate on (default: --data)")
    add("--eval-split", default="validation", help="split of it (default: %(default)s)")
    add("--eval-box", type=int, nargs=2, metavar=("SHORT", "LONG"), help="fit evaluated pictures into it, in pixels")
    add(
        "--no-index",
        action="store_true",
        help="read --data with datasets.load_dataset, without its index: any dataset of pictures and 8-bit label "
        "pictures of class ids; needs --classes, and samples frames in shuffled order",
    )
    add("--image-column", default="image", help="with --no-index: name of the column of pictures (%(default)s)")
    add("--label-column", default="label", help="with --no-index: name of the column of labels (%(default)s)")
    add(
        "--classes",
        type=lambda names: tuple(name.strip() for name in names.split(",")),
        metavar="A,B,...",
        help="with --no-index: class names in id order",
    )
    add(
        "--sampling",
        choices=["rare-class", "permutation"],
        default="rare-class",
        help="first a class, then a frame with enough of it (published), or every frame once an epoch (%(default)s)",
    )
    add(
        "--temperature", type=float, default=100, help="rare-class: 100 draws classes evenly (published), 0.01 the rare"
    )
    add(
        "--min-pixels",
        type=int,
        default=3000,
        help="rare-class: a frame drawn for a class has more pixels of it, its crop over half as many (%(default)s)",
    )
    add("--crop", type=int, default=128, help="side of the training crop in pixels (published: 512; %(default)s)")
    add(
        "--resize",
        choices=["window", "whole"],
        default="window",
        help="resize what the crop shows only, or the whole picture, with OpenCV's rounding as published (%(default)s)",
    )
    add("--workers", type=int, default=0, help="loader processes, 0: load in the main process (default: %(default)s)")


def optimisation_options(group: argparse._ArgumentGroup) -> None:
    """How it is trained."""
    add = group.add_argument
    add("--steps", type=int, default=300, help="optimiser steps (published: 20000; default: %(default)s)")
    add("--batch-size", type=int, default=4, help="images per process and forward pass (published: 8; %(default)s)")
    add("--accumulation", type=int, default=1, help="forward passes per optimiser step (default: %(default)s)")
    add("--lr", type=float, default=5e-4, help="peak learning rate (published: 1e-5, Cityscapes 1e-4; %(default)s)")
    add(
        "--vision-lr-mult",
        type=float,
        default=1.0,
        help="vision tower: --lr times this (published: 0.1, for a pre-trained tower; default: %(default)s)",
    )
    add("--min-lr", type=float, default=1e-6, help="learning rate that the decay ends at (default: %(default)s)")
    add("--warmup-steps", type=int, default=20, help="steps of linear warm-up (published: 1500; %(default)s)")
    add("--weight-decay", type=float, default=1e-4, help="AdamW's (published: 1e-4, Cityscapes 1e-5; %(default)s)")
    add(
        "--no-embedding-decay",
        action="store_true",
        help="no decay for the mask decoder's level and query embeddings either (published for Cityscapes)",
    )
    add("--clip-norm", type=float, default=0, help="largest norm of all gradients together, 0: no limit (published)")
    add("--ema", type=float, default=0, help="decay of averaged weights, which are evaluated and saved; 0: none")
    add(
        "--loss-counts",
        choices=["step", "published"],
        default="step",
        help="losses are divided by the counts of the whole step, so that it does not matter how it is divided among "
        "processes; published: by those of each process, but for the number of masks (default: %(default)s)",
    )
    add("--noisy-reference", action="store_true", help="the frozen tower drops paths at random, as published")


def speed_options(group: argparse._ArgumentGroup) -> None:
    """What changes time and memory, and results in their last digits."""
    add = group.add_argument
    add(
        "--mixed-precision",
        choices=["no", "bf16", "fp16"],
        help="autocast type, no: float32 (default: what `accelerate launch` was told, else no)",
    )
    add(
        "--reference-dtype",
        choices=list(REFERENCE_DTYPES),
        default="float32",
        help="of the frozen tower; bf16 takes a third of its time and half its memory, and moves loss_visual by 1e-4 "
        "of the embeddings' mean square (published: float32; default: %(default)s)",
    )
    add("--gradient-checkpointing", action="store_true", help="compute activations twice instead of keeping them")
    add("--channels-last", action="store_true", help="convolutions with channels side by side; in bf16 0.9 of the time")
    add(
        "--compile",
        metavar="BACKEND",
        help="torch.compile the model: inductor, aot_eager, ...; for GPUs: on a CPU it took minutes and gained nothing",
    )
