"""Train tqdm. `accelerate launch train.py` alone is the quick start: a small model, 56 real frames, minutes on a CPU.

The run folder --out receives args.json, log.jsonl, checkpoints/, and in the end model/ (loadable with
`AutoModelForSemanticSegmentation.from_pretrained(..., trust_remote_code=True)`), results.json and overlays/*.png.
"""

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.utils import logging

from tqdm_seg.augment_tqdm import TrainTransform
from tqdm_seg.configuration_tqdm import PRESETS, TqdmConfig
from tqdm_seg.data_tqdm import (
    FrameDataset,
    PlainRows,
    PlainSamples,
    RareClassSampling,
    TrainPlan,
    TrainSamples,
    frame_loader,
    plain_batches,
    planned_batches,
    train_loader,
)
from tqdm_seg.evaluate_tqdm import evaluate, predict_frame
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation
from tqdm_seg.publish_tqdm import save_model_folder, written_whole
from tqdm_seg.reference_tqdm import FrozenReference
from tqdm_seg.report_tqdm import draw_comparison, model_card

TrainingState = dict[str, torch.optim.Optimizer | LambdaLR | torch.amp.GradScaler]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; every default is the quick start's."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    run = parser.add_argument_group("run")
    run.add_argument("--out", default="runs/quickstart", help="run folder, made if missing")
    run.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out, if there is one")
    run.add_argument("--seed", type=int, default=0, help="decides the first weights and every batch, 0 or more")
    run.add_argument("--log-every", type=int, default=10, help="steps per log line, which holds the means over them")
    run.add_argument("--save-every", type=int, default=50, help="steps between checkpoints, 0: none")
    run.add_argument("--keep", type=int, default=2, help="newest checkpoints to keep")
    run.add_argument("--eval-every", type=int, default=0, help="steps between evaluations, 0: only in the end")
    run.add_argument("--overlays", type=int, default=6, help="held-back frames to draw in the end")
    run.add_argument("--license", default="apache-2.0", help="licence named on the model card")

    model = parser.add_argument_group("model")
    presets = ", ".join(sorted(PRESETS))
    model.add_argument("--model", default="tiny", help=f"preset with random weights ({presets}), or model folder")

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        default="examples/orfd_mini",
        help="folder or URL of a dataset made by a program of dataset_scripts/; its classes become the model's",
    )
    data.add_argument("--train-split", default="train", help="split of --data to train on")
    data.add_argument("--eval-split", default="validation", help="split of --data to evaluate on")
    data.add_argument(
        "--no-index",
        action="store_true",
        help="read --data with datasets.load_dataset, without its index: any dataset of pictures and 8-bit label "
        "pictures of class ids; needs --classes, and samples frames in shuffled order",
    )
    data.add_argument("--image-column", default="image", help="with --no-index: name of the column of pictures")
    data.add_argument("--label-column", default="label", help="with --no-index: name of the column of labels")
    data.add_argument(
        "--classes",
        type=lambda names: tuple(name.strip() for name in names.split(",")),
        metavar="A,B,...",
        help="with --no-index: class names in id order",
    )
    data.add_argument(
        "--sampling",
        choices=["rare-class", "permutation"],
        default="rare-class",
        help="rare-class: first a class, then a frame with enough of it (published); permutation: every frame once an "
        "epoch",
    )
    data.add_argument(
        "--temperature", type=float, default=100, help="rare-class: 100 draws classes evenly (published), 0.01 the rare"
    )
    data.add_argument(
        "--min-pixels",
        type=int,
        default=3000,
        help="rare-class: a frame drawn for a class has more pixels of it, and its crop more than half as many",
    )
    data.add_argument("--crop", type=int, default=128, help="side of the training crop in pixels (published: 512)")
    data.add_argument(
        "--resize",
        choices=["window", "whole"],
        default="window",
        help="window: resize what the crop shows only; whole: the whole picture, with OpenCV's rounding as published",
    )
    data.add_argument("--workers", type=int, default=0, help="loader processes, 0: load in the main process")

    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--steps", type=int, default=300, help="optimiser steps (published: 20000)")
    optim.add_argument("--batch-size", type=int, default=4, help="images per process and forward pass (published: 8)")
    optim.add_argument("--accumulation", type=int, default=1, help="forward passes per optimiser step")
    optim.add_argument("--lr", type=float, default=5e-4, help="peak learning rate (published: 1e-5)")
    optim.add_argument(
        "--backbone-lr-mult",
        type=float,
        default=1.0,
        help="vision tower: --lr times this; the text tower is frozen (published: 0.1, for a pre-trained tower)",
    )
    optim.add_argument("--min-lr", type=float, default=1e-6, help="learning rate that the decay ends at")
    optim.add_argument("--warmup-steps", type=int, default=20, help="steps of linear warm-up (published: 1500)")
    optim.add_argument("--weight-decay", type=float, default=1e-4, help="AdamW's; norms have none")
    optim.add_argument(
        "--mixed-precision",
        choices=["no", "bf16", "fp16"],
        help="autocast type, no: float32; None: what `accelerate launch` was told, else no",
    )
    args = parser.parse_args(argv)
    if args.no_index != (args.classes is not None):
        parser.error("--no-index needs --classes, and --classes is for --no-index: prepared datasets name theirs")
    positive = (
        "temperature",
        "steps",
        "batch_size",
        "accumulation",
        "log_every",
        "keep",
        "crop",
        "lr",
        "backbone_lr_mult",
    )
    for name, value in vars(args).items():
        if isinstance(value, int | float) and (value < 0 or (value == 0 and name in positive)):
            parser.error(f"--{name.replace('_', '-')} {value} must be {'above 0' if name in positive else '0 or more'}")
    return args


def open_data(args: argparse.Namespace) -> tuple[FrameDataset | PlainRows, FrameDataset | PlainRows]:
    """Training and held-back frames."""
    if args.no_index:
        columns = (args.classes, args.image_column, args.label_column)
        return PlainRows(args.data, args.train_split, *columns), PlainRows(args.data, args.eval_split, *columns)
    return FrameDataset(args.data, args.train_split), FrameDataset(args.data, args.eval_split)


def train_batches(
    args: argparse.Namespace, training: FrameDataset | PlainRows, first_step: int, process: int, processes: int
) -> DataLoader:
    """Loader of the batches that this process trains on from `first_step` on."""
    transform = TrainTransform(args.crop, min_class_pixels=args.min_pixels // 2, resize=args.resize)
    if isinstance(training, PlainRows):
        samples = PlainSamples(training, transform, args.seed)
        first, last = (step * args.accumulation for step in (first_step, args.steps))
        batches = plain_batches(training, args.seed, first, last, args.batch_size, process, processes)
    else:
        sampling = RareClassSampling(args.temperature, args.min_pixels) if args.sampling == "rare-class" else None
        plan = TrainPlan(training.index.class_pixels, args.seed, sampling, training.classes)
        samples = TrainSamples(training, transform)
        batches = planned_batches(
            plan, first_step, args.steps, args.batch_size, args.accumulation, process, processes
        )  # fmt: skip
    return train_loader(samples, batches, len(training.classes), args.workers)


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, backbone_lr_mult: float
) -> list[dict[str, object]]:
    """AdamW groups of the published recipe: vision tower, norms, everything else; frozen parameters are left out.

    The vision tower learns at lr * backbone_lr_mult with decay, its own norms included. Outside it a parameter with
    "norm" in its name has no decay; every other one, biases and positions included, has.
    """
    groups = {
        "vision": {"lr": lr * backbone_lr_mult, "weight_decay": weight_decay},
        "norms": {"lr": lr, "weight_decay": 0.0},
        "rest": {"lr": lr, "weight_decay": weight_decay},
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in groups}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "vision" if "vision_tower." in name else "norms" if "norm" in name else "rest"
            members[kind].append(parameter)
    return [{"name": name, "params": members[name], **options} for name, options in groups.items() if members[name]]


def learning_rate(step: int, base: float, steps: int, warmup_steps: int, min_lr: float) -> float:
    """Rate of 0-based `step`: min_lr + (base - min_lr) (1 - step / steps)^0.9, in warm-up times a linear factor.

    The factor is 1 - (1 - step / warmup_steps) (1 - 1e-6). The decay runs from step 0, under the warm-up, and not from
    its end as in transformers' polynomial schedule. A group whose base is min_lr keeps it after the warm-up, as the
    vision tower of the published recipe does (1e-5 * 0.1 = 1e-6).
    """
    rate = min_lr + (base - min_lr) * (1 - min(step, steps) / steps) ** 0.9
    return rate * (1 - (1 - step / warmup_steps) * (1 - 1e-6)) if step < warmup_steps else rate


def make_scheduler(optimizer: torch.optim.Optimizer, steps: int, warmup_steps: int, min_lr: float) -> LambdaLR:
    """`learning_rate` for every group, from the rate that the group has now."""

    def factor(step: int, base: float) -> float:
        return learning_rate(step, base, steps, warmup_steps, min_lr) / base

    return LambdaLR(optimizer, [partial(factor, base=group["lr"]) for group in optimizer.param_groups])


def build_model(
    args: argparse.Namespace, classes: Sequence[str]
) -> tuple[TqdmForSemanticSegmentation, TqdmImageProcessor]:
    """A preset with random weights by --seed, or a model folder; what belongs to a class new to it starts at random."""
    torch.manual_seed(args.seed)
    id2label = dict(enumerate(classes))
    if args.model in PRESETS:
        return TqdmForSemanticSegmentation(TqdmConfig.from_preset(args.model, id2label=id2label)), TqdmImageProcessor()
    if not (Path(args.model) / "config.json").is_file():
        raise FileNotFoundError(
            f"--model {args.model} is no preset ({', '.join(sorted(PRESETS))}) and no folder with a config.json"
        )
    model = TqdmForSemanticSegmentation.from_pretrained(args.model, dtype=torch.float32)
    if model.config.id2label != id2label:
        model.set_classes(id2label)
    return model, TqdmImageProcessor.from_pretrained(args.model)


def save_checkpoint(
    folder: Path,
    step: int,
    model: TqdmForSemanticSegmentation,
    processor: TqdmImageProcessor,
    state: TrainingState,
    keep: int,
) -> None:
    """Writes folder/step_<step>, model folder and training state, and deletes all but the newest `keep` of its kind.

    No state of a random generator is in it: every draw derives from the seed and the step.
    """
    with written_whole(folder / f"step_{step:07d}") as temporary:
        save_model_folder(model, processor, temporary / "model")
        states = {name: part.state_dict() for name, part in state.items()}
        torch.save({"step": step, **states}, temporary / "training_state.pt")
    for old in sorted(folder.glob("step_*"))[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, model: TqdmForSemanticSegmentation, state: TrainingState) -> int:
    """Loads the newest checkpoint in `folder` into the arguments; returns the number of steps done, 0 without one."""
    checkpoints = sorted(folder.glob("step_*"))
    if not checkpoints:
        return 0
    safetensors.torch.load_model(model, checkpoints[-1] / "model" / "model.safetensors", device=str(model.device))
    states = torch.load(checkpoints[-1] / "training_state.pt", map_location=model.device, weights_only=True)
    for name, part in state.items():
        part.load_state_dict(states[name])
    return states["step"]


class RecentLosses:
    """Losses by name since the last report, left on the device, so that no step waits for their values."""

    def __init__(self):
        self.rows: list[tuple[int, list[str], Tensor]] = []
        self.names: list[str] = []

    def add(self, step: int, keys: list[str], losses: dict[str, Tensor]) -> None:
        """Remembers the scalars of one batch, and which images it was made of."""
        self.names = list(losses)
        self.rows.append((step, keys, torch.stack(list(losses.values())).detach()))

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over batches and processes since the last call, of every loss and of their sum "loss".

        Raises FloatingPointError naming step and images of the first batch with a loss that is not finite.
        """
        values = torch.stack([row for _, _, row in self.rows])  # (batches, losses)
        for (step, keys, _), row in zip(self.rows, values.tolist(), strict=True):
            broken = [name for name, value in zip(self.names, row, strict=True) if not math.isfinite(value)]
            if broken:
                raise FloatingPointError(
                    f"{', '.join(broken)} not finite at step {step}, images {', '.join(keys)}; look at these images "
                    "and their labels, lower --lr, or use --mixed-precision no. Nothing was saved since"
                )
        self.rows.clear()
        means = accelerator.reduce(values.mean(0), "mean").tolist()
        return {"loss": sum(means), **dict(zip(self.names, means, strict=True))}


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def start_log(args: argparse.Namespace, out: Path, first_step: int) -> None:
    """Writes args.json, and cuts from the log what a resumed run will do again."""
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    write_text(log, "".join(line for line in lines if json.loads(line)["step"] <= first_step))
    write_text(out / "args.json", json.dumps(vars(args), indent=2) + "\n")


def write_report(
    args: argparse.Namespace,
    model: TqdmForSemanticSegmentation,
    processor: TqdmImageProcessor,
    results: dict[str, object],
    training: FrameDataset | PlainRows,
    validation: FrameDataset | PlainRows,
) -> None:
    """results.json, the model folder with its card, and drawn predictions."""
    out = Path(args.out)
    write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    card = model_card(args, model, results, training, validation)
    save_model_folder(model, processor, out / "model", card)
    count = results["protocol"]["frames"]
    chosen = set(np.linspace(0, count - 1, min(args.overlays, count)).round().astype(int).tolist())
    model.eval()
    with written_whole(out / "overlays") as folder:
        for index, frame in enumerate(frame_loader(validation, 0)):
            if index not in chosen:
                continue
            prediction, _ = predict_frame(model, processor, frame)
            drawn = draw_comparison(frame, prediction.cpu().numpy(), model.config.id2label)
            drawn.save(folder / f"{index:04d}_{Path(frame.key).stem}.png")


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Trains, evaluates, writes; returns what results.json holds."""
    args = parse_args(argv)
    out = Path(args.out)
    if not args.resume and (out / "log.jsonl").exists():
        raise FileExistsError(f"{out} holds a run; add --resume to go on with it, choose another --out, or delete it")
    logging.disable_progress_bar()  # of saved files, which would tear the bar of the steps apart
    accelerator = Accelerator(mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.accumulation)
    process, processes, device = accelerator.process_index, accelerator.num_processes, accelerator.device

    training, validation = open_data(args)
    net, processor = build_model(args, training.classes)
    net = net.to(device).train()
    reference = FrozenReference(net)  # before a checkpoint is loaded: it is the start of the run

    optimizer = torch.optim.AdamW(parameter_groups(net, args.lr, args.weight_decay, args.backbone_lr_mult))
    scheduler = make_scheduler(optimizer, args.steps, args.warmup_steps, args.min_lr)
    state: TrainingState = {"optimizer": optimizer, "scheduler": scheduler}
    if accelerator.scaler is not None:
        state["scaler"] = accelerator.scaler
    first_step = load_checkpoint(out / "checkpoints", net, state) if args.resume else 0
    model, optimizer = accelerator.prepare(net, optimizer)  # not the scheduler, which would step once per process

    accelerator.wait_for_everyone()  # all have looked for an earlier run
    if accelerator.is_main_process:
        start_log(args, out, first_step)

    def log(step: int, **values: float) -> None:
        if accelerator.is_main_process:
            with (out / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    def score() -> dict[str, object]:
        frames = frame_loader(validation, args.workers, process, processes)
        return evaluate(net, processor, frames, validation.label_map, accelerator)

    batches = iter(train_batches(args, training, first_step, process, processes))
    bar = tqdm(total=args.steps, initial=first_step, unit="step", disable=not accelerator.is_main_process)
    recent, samples, clock = RecentLosses(), 0, time.perf_counter()
    for step in range(first_step, args.steps):
        for part in range(args.accumulation):
            batch = next(batches)
            # Dropout and the points of the mask losses draw from torch's global generator.
            torch.manual_seed(int(np.random.SeedSequence([args.seed, step, part, process]).generate_state(1)[0]))
            inputs = {key: batch[key].to(device, non_blocking=True) for key in ("pixel_values", "labels", "mask_index")}
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    inputs |= reference(inputs["pixel_values"])
                outputs = model(**inputs, output_logits=False)
                accelerator.backward(outputs.loss)
                optimizer.step()
                optimizer.zero_grad()
            recent.add(step, batch["key"], outputs.losses)
            samples += args.batch_size * processes
        rates = {f"lr_{group['name']}": group["lr"] for group in optimizer.param_groups}
        scheduler.step()
        bar.update()

        done = step + 1
        last = done == args.steps
        save = args.save_every > 0 and (last or done % args.save_every == 0)
        if save or last or done % args.log_every == 0:
            means = recent.means(accelerator)  # stops here at a loss that is not finite, before anything is saved
            bar.set_postfix(loss=f"{means['loss']:.2f}")
            log(done, **means, **rates, samples_per_second=samples / (time.perf_counter() - clock))
            samples, clock = 0, time.perf_counter()
        if save and accelerator.is_main_process:
            save_checkpoint(out / "checkpoints", done, net, processor, state, args.keep)
        if args.eval_every and done % args.eval_every == 0 and not last:
            log(done, miou=score()["miou"])
    bar.close()

    results = score()
    if accelerator.is_main_process:
        write_report(args, net, processor, results, training, validation)
    count = results["protocol"]["frames"]
    accelerator.print(f"mIoU {results['miou']} on {count} held-back frames; model, results, overlays: {out}")
    return results


if __name__ == "__main__":
    main()
