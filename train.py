"""Train tqdm. `accelerate launch train.py` alone is the quick start: a small model, 56 real frames, minutes on a CPU.

The run folder --out receives args.json, log.jsonl, checkpoints/, best/ (with --eval-every), and in the end model/
(loadable with `AutoModelForSemanticSegmentation.from_pretrained(..., trust_remote_code=True)`), results.json and
overlays/*.png. Stopped at any moment, the same command with --resume goes on and ends in the same bits.

    accelerate launch train.py --dry-run       what would be trained, on what, and the memory it takes
    torchrun --nproc_per_node 2 train.py       several processes, on CPUs too
    bash recipes/gta5_clip_vit_b.sh            a published setting
"""

import argparse
import copy
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.utils import logging

from tqdm_seg.configuration_tqdm import PRESETS, TqdmConfig
from tqdm_seg.data.files import run as run_program
from tqdm_seg.data.files import write_whole, written_whole
from tqdm_seg.data.frames import FrameDataset, PlainRows, frame_loader
from tqdm_seg.data.shards import refuse_mixed_labels
from tqdm_seg.deploy.folder import push_folder, save_model_folder
from tqdm_seg.evaluation.evaluate import score_frames
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.loss_tqdm import LossCounts, count_losses
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation
from tqdm_seg.training.augment import TrainTransform
from tqdm_seg.training.batches import (
    PlainSamples,
    RareClassSampling,
    TrainPlan,
    TrainSamples,
    model_inputs,
    plain_batches,
    planned_batches,
    train_loader,
)
from tqdm_seg.training.card import model_card
from tqdm_seg.training.checkpoint import checkpoints, load_checkpoint, training_state, whole_weights, write_checkpoint
from tqdm_seg.training.log import Log, RecentLosses, StopSignal
from tqdm_seg.training.optimisation import (
    convert_batch_norm,
    gradient_norm,
    parameter_groups,
    set_learning_rates,
    step_counts,
    update_average,
)
from tqdm_seg.training.options import REFERENCE_DTYPES, parse_options
from tqdm_seg.training.overlays import draw_frames
from tqdm_seg.training.plan import check_resumable, images_per_step, memory_gb, print_plan
from tqdm_seg.training.teacher import FrozenReference


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    return parse_options(__doc__, argv)


# -- building ------------------------------------------------------------------------------------------


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """The processes that were launched; ValueError when several were asked for and one was started."""
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ and not os.environ.get("PMI_SIZE"):
        raise ValueError(
            "accelerate launch --cpu starts a single process whatever --num_processes says; use torchrun "
            "--nproc_per_node N train.py, or accelerate launch --multi_gpu --num_processes N train.py, on CPUs too"
        )
    if args.compile == "inductor":
        from torch._inductor import config  # not above: the compiler takes seconds to import

        config.fallback_random = True  # the same dropout and points as without compiling
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.accumulation,
        cpu=not torch.accelerator.is_available(), log_with=None if args.tracker == "none" else args.tracker,
        project_config=ProjectConfiguration(args.out, str(Path(args.out) / "tracker")), dynamo_backend=args.compile,
    )  # fmt: skip
    if accelerator.distributed_type == DistributedType.FSDP and (args.ema or args.vision == "lora"):
        raise ValueError("--ema and --vision lora need the whole model in every process; launch with DDP, not FSDP")
    return accelerator


def open_data(args: argparse.Namespace) -> tuple[FrameDataset | PlainRows, FrameDataset | PlainRows]:
    """Training and held-back frames; ValueError when their classes differ."""
    held_back = args.eval_data or args.data
    if args.no_index:
        columns = (args.classes, args.image_column, args.label_column)
        return PlainRows(args.data, args.train_split, *columns), PlainRows(held_back, args.eval_split, *columns)
    training, validation = FrameDataset(args.data, args.train_split), FrameDataset(held_back, args.eval_split)
    refuse_mixed_labels([training.index.manifest, validation.index.manifest])
    return training, validation


def build_model(
    args: argparse.Namespace, classes: Sequence[str]
) -> tuple[TqdmForSemanticSegmentation, TqdmImageProcessor]:
    """A preset with random weights by --seed, or a model folder; what belongs to a class new to it starts at random."""
    torch.manual_seed(args.seed)
    changes: dict[str, Any] = {"id2label": dict(enumerate(classes))}
    changes |= {"text_to_pixel_attention": False} if args.no_text_attention else {}
    changes |= {"queries": "random"} if args.random_queries else {}
    for name in ("textual", "visual", "score_map"):
        weight = getattr(args, f"{name}_weight")
        changes |= {f"{name}_loss_weight": weight} if weight is not None else {}
    if args.model in PRESETS:
        net, processor = (
            TqdmForSemanticSegmentation(TqdmConfig.from_preset(args.model, **changes)),
            TqdmImageProcessor(),
        )
    elif (Path(args.model) / "config.json").is_file():
        id2label = changes.pop("id2label")
        net = TqdmForSemanticSegmentation.from_pretrained(args.model, dtype=torch.float32, **changes)
        if net.config.id2label != id2label:
            net.set_classes(id2label)
        processor = TqdmImageProcessor.from_pretrained(args.model)
    else:
        raise FileNotFoundError(
            f"--model {args.model} is no preset ({', '.join(sorted(PRESETS))}) and no folder with a config.json"
        )
    if args.eval_box:
        processor.do_resize, processor.size = (
            True,
            dict(zip(("shortest_edge", "longest_edge"), args.eval_box, strict=True)),
        )
    return net, processor


def choose_trained(net: TqdmForSemanticSegmentation, vision: str, lora_rank: int) -> None:
    """Freezes the vision tower, or puts adapters into its blocks; its pyramid, which is new, always learns."""
    if vision == "full":
        return
    tower = net.model.vision_tower
    if vision == "lora":
        from tqdm_seg.training.lora import add_adapters  # not above: peft takes seconds to import

        add_adapters(tower, lora_rank)
    else:
        tower.requires_grad_(False)
    tower.pyramid.requires_grad_(True)


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


# -- the step and what is kept of it --------------------------------------------------------------------


def batch_counts(batch: dict[str, Tensor], net: TqdmForSemanticSegmentation) -> LossCounts:
    """What the losses of this batch alone would be divided by."""
    config = net.config
    return count_losses(
        batch["mask_index"], batch["labels"], config.num_labels, config.no_object_weight, config.score_map_loss_over,
        config.ignore_index,
    )  # fmt: skip


def finish_gradients(accelerator: Accelerator, model: nn.Module, limit: float) -> Tensor:
    """Norm of all gradients together, which are scaled down to `limit` where that is above 0; on the device."""
    if limit:
        return accelerator.clip_grad_norm_(model.parameters(), limit)
    accelerator.unscale_gradients()
    return gradient_norm(model.parameters())


def unsharded(accelerator: Accelerator, net: TqdmForSemanticSegmentation) -> TqdmForSemanticSegmentation:
    """The model itself, or where FSDP has sharded it a whole copy in every process."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return net
    whole = TqdmForSemanticSegmentation(net.config).to(accelerator.device)
    whole.load_state_dict(whole_weights(net))
    return whole


class Reporter:
    """Evaluates during and after training, keeps the best model and writes the last one.

    trained: the model as it is trained, or averaged.
    """

    def __init__(
        self, args: argparse.Namespace, accelerator: Accelerator, trained: TqdmForSemanticSegmentation,
        processor: TqdmImageProcessor, training: FrameDataset | PlainRows, validation: FrameDataset | PlainRows,
        log: Log,
    ):  # fmt: skip
        self.args, self.accelerator, self.processor = args, accelerator, processor
        self.trained = self.net = trained
        self.training, self.validation, self.log = training, validation, log

    def score(self) -> dict[str, object]:
        """Results of the held-back frames, every frame in one process."""
        self.net = unsharded(self.accelerator, self.trained)
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        frames = frame_loader(self.validation, self.args.workers, process, processes)
        return score_frames(self.net, self.processor, frames, self.validation.label_map, self.accelerator)

    def write_model(self, folder: Path, results: dict[str, object]) -> None:
        """Model folder with its card and results.json."""
        card = model_card(self.args, self.net, results, self.training, self.validation)
        files = {"README.md": card, "results.json": json.dumps(results, indent=2) + "\n"}
        net = self.net
        if self.args.vision == "lora":
            from tqdm_seg.training.lora import without_adapters

            net = without_adapters(net)
        save_model_folder(net, self.processor, folder, files)

    def evaluate(self, step: int) -> None:
        """In the middle of a run: logs the score, shows some frames, keeps the model if it is the best so far."""
        training = self.net.training
        results = self.score()
        self.log.write(step, miou=results["miou"])
        if self.accelerator.is_main_process:
            self.log.pictures(step, {name: np.asarray(drawn) for name, drawn in self.drawings(results)})
            best, kept = Path(self.args.out) / "best", -1.0
            if (best / "results.json").is_file():
                kept = json.loads((best / "results.json").read_text(encoding="utf-8"))["miou"] or kept
            if (results["miou"] or 0) > kept:
                self.write_model(best, results | {"step": step})
        self.net.train(training)
        self.accelerator.wait_for_everyone()

    def drawings(self, results: dict[str, object]) -> list[tuple[str, Any]]:
        """Some frames with truth and prediction."""
        count = results["protocol"]["frames"]
        return list(draw_frames(self.net, self.processor, self.validation, self.args.overlays, count))

    def finish(self) -> dict[str, object]:
        """In the end: results.json, model folder, overlays, and the push if one was asked for."""
        out, results = Path(self.args.out), self.score()
        if self.accelerator.is_main_process:
            write_whole(out / "results.json", (json.dumps(results, indent=2) + "\n").encode())
            self.write_model(out / "model", results)
            with written_whole(out / "overlays") as folder:
                for name, drawn in self.drawings(results):
                    drawn.save(folder / f"{name}.png")
            frames = results["protocol"]["frames"]
            self.accelerator.print(
                f"mIoU {results['miou']} on {frames} held-back frames; model, results, overlays: {out}"
            )
            if self.args.push_to_hub:
                self.accelerator.print(push_folder(out / "model", self.args.push_to_hub))
        return results


@dataclass
class Run:
    """All that a training step touches. model: what `accelerator` made of net; average: of the weights, if any."""

    args: argparse.Namespace
    accelerator: Accelerator
    net: TqdmForSemanticSegmentation
    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: TqdmForSemanticSegmentation | None
    reference: FrozenReference

    def step(self, step: int, parts: list[dict[str, Tensor]], recent: RecentLosses) -> Tensor:
        """One optimiser step over the accumulated batches; adds their losses to `recent`, returns the gradient norm."""
        args, accelerator = self.args, self.accelerator
        published = args.loss_counts == "published"
        counts = step_counts([batch_counts(part, self.net) for part in parts], accelerator.device, published)
        for number, (batch, part_counts) in enumerate(zip(parts, counts, strict=True)):
            inputs = model_inputs(batch, accelerator.device)
            if args.compile:  # one graph for any number of masks, which changes from batch to batch
                torch._dynamo.maybe_mark_dynamic(inputs["mask_index"], 0)
            # Dropout and the points of the mask losses draw from torch's global generator.
            seed = np.random.SeedSequence([args.seed, step, number, accelerator.process_index])
            torch.manual_seed(int(seed.generate_state(1)[0]))
            with accelerator.accumulate(self.model):
                with accelerator.autocast():
                    inputs |= self.reference(inputs["pixel_values"])
                outputs = self.model(**inputs, loss_counts=part_counts, output_logits=False)
                loss, losses = outputs.loss, outputs.losses
                del outputs  # mask logits of all layers, which the backward pass can do without
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = finish_gradients(accelerator, self.model, args.clip_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            recent.add(step, batch["key"], losses)
        if self.average is not None:
            update_average(self.average, self.net, args.ema if step > 0 else 0.0)
        return norm

    def save(self, done: int) -> None:
        """A checkpoint after `done` steps; every process must call it."""
        accelerator, average = self.accelerator, self.average
        state = training_state(self._bare_model(), self.optimizer.optimizer)
        if accelerator.is_main_process:
            extra = {"scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None}
            averaged = average.state_dict() if average is not None else None
            write_checkpoint(Path(self.args.out) / "checkpoints", done, state, averaged, extra, self.args.keep)
        accelerator.wait_for_everyone()

    def resume(self) -> int:
        """Loads the last checkpoint if there is one and it is asked for; returns the number of steps done."""
        last = checkpoints(Path(self.args.out) / "checkpoints")[-1:] if self.args.resume else []
        if not last:
            return 0
        check_resumable(self.args, self.accelerator.num_processes)
        content = load_checkpoint(last[0], self._bare_model(), self.optimizer.optimizer)
        if self.average is not None:
            self.average.load_state_dict(load_file(last[0] / "average.safetensors"))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        return content["step"]

    def _bare_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)


def train_steps(run: Run, batches: Iterator[dict[str, Tensor]], first_step: int, log: Log, report: Reporter) -> bool:
    """The loop; False when SIGTERM ended it before the last step."""
    args, accelerator = run.args, run.accelerator
    bar = tqdm(total=args.steps, initial=first_step, unit="step", disable=not accelerator.is_main_process)
    images = images_per_step(args, accelerator.num_processes)
    recent, last_log, clock = RecentLosses(), first_step, time.perf_counter()
    with bar, StopSignal() as stop:
        for step in range(first_step, args.steps):
            rates = set_learning_rates(run.optimizer, step, args.steps, args.warmup_steps, args.min_lr)
            norm = run.step(step, [next(batches) for _ in range(args.accumulation)], recent)
            bar.update()

            done, at_end = step + 1, step + 1 == args.steps
            to_log, to_save, to_evaluate = (
                every > 0 and (at_end or done % every == 0)
                for every in (args.log_every, args.save_every, args.eval_every)
            )
            stopped = stop.agreed(accelerator, to_log or to_save)
            if to_log or to_save or stopped:
                means = recent.means(accelerator, Path(args.out))  # stops at a loss that is not finite
                speed = images * (done - last_log) / (time.perf_counter() - clock)
                bar.set_postfix(loss=f"{means['loss']:.2f}")
                log.write(
                    done, **means, **rates, gradient_norm=norm.item(), samples_per_second=speed,
                    memory_gb=memory_gb(accelerator.device), seconds_left=images * (args.steps - done) / speed,
                )  # fmt: skip
                last_log, clock = done, time.perf_counter()
            if to_evaluate and not at_end:
                report.evaluate(done)  # before the checkpoint, from which it would not be made up for
            if to_save or stopped:
                run.save(done)
            if stopped and not at_end:
                accelerator.print(f"stopped by SIGTERM after step {done}; the same command with --resume goes on")
                return False
    return True


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Trains, evaluates, writes; returns what results.json holds, {} when it was stopped before the end."""
    args = parse_args(argv)
    out = Path(args.out)
    if not (args.resume or args.dry_run) and (out / "log.jsonl").exists():
        raise FileExistsError(f"{out} holds a run; add --resume to go on with it, choose another --out, or delete it")
    logging.disable_progress_bar()  # of saved files, which would tear the bar of the steps apart
    accelerator = make_accelerator(args)
    process, processes = accelerator.process_index, accelerator.num_processes

    training, validation = open_data(args)
    net, processor = build_model(args, training.classes)
    # Before a checkpoint is loaded: it is the start of the run.
    reference = FrozenReference(net, args.noisy_reference, REFERENCE_DTYPES[args.reference_dtype])
    choose_trained(net, args.vision, args.lora_rank)
    convert_batch_norm(net)
    if args.gradient_checkpointing:
        net.gradient_checkpointing_enable()
    net, reference = net.to(accelerator.device).train(), reference.to(accelerator.device).train()
    if args.channels_last:
        net = net.to(memory_format=torch.channels_last)
    groups = parameter_groups(net, args.lr, args.weight_decay, args.vision_lr_mult, not args.no_embedding_decay)
    optimizer = torch.optim.AdamW(groups, fused=True)  # one pass over all parameters
    average = copy.deepcopy(net) if args.ema else None
    if args.dry_run:
        batch = next(iter(train_batches(args, training, 0, process, processes)))
        inputs = model_inputs(batch, accelerator.device)
        print_plan(args, net, optimizer, reference, inputs, processes, accelerator.print)
        return {}

    run = Run(args, accelerator, net, *accelerator.prepare(net, optimizer), average, reference)
    first_step = run.resume()
    accelerator.wait_for_everyone()  # all have looked for an earlier run
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        facts = vars(args) | {"images_per_step": images_per_step(args, processes)}
        write_whole(out / "args.json", (json.dumps(facts, indent=2) + "\n").encode())
    log = Log(accelerator, args, first_step)
    shown = net if average is None else average
    report = Reporter(args, accelerator, shown, processor, training, validation, log)
    batches = iter(train_batches(args, training, first_step, process, processes))
    results = report.finish() if train_steps(run, batches, first_step, log, report) else {}
    accelerator.end_training()
    return results


if __name__ == "__main__":
    run_program(main)
