"""Train tqdm: the recipe, and the one loop. `python train.py --help` lists the options (tqdm_seg/training/options.py).

python train.py                            the quick start: a small model, 56 real frames, minutes on a CPU
accelerate launch train.py --dry-run       what would be trained, on what, and the memory it takes
torchrun --nproc_per_node 2 train.py       several processes, on CPUs too
bash recipes/gta5_clip_vit_b.sh            a published setting
"""

import sys

from tqdm_seg.commands import start

if __name__ == "__main__":
    sys.exit(start("train"))


import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers.utils import logging

from tqdm_seg.data.files import named_when_full
from tqdm_seg.evaluation.evaluate import number_format
from tqdm_seg.loss_tqdm import LossCounts, count_losses
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation
from tqdm_seg.program import takes
from tqdm_seg.training.batches import first_now, model_inputs, step_batches
from tqdm_seg.training.build import build_model, check_sizes, choose_trained, make_accelerator, open_data
from tqdm_seg.training.chance import Chance, draw_by_sample
from tqdm_seg.training.checkpoint import load_checkpoint, newest_checkpoint, prune, training_state, write_checkpoint
from tqdm_seg.training.doctor import alarms, doctor_page
from tqdm_seg.training.log import Log, RecentLosses, StopSignal
from tqdm_seg.training.optimisation import (
    convert_batch_norm,
    gradient_norm,
    parameter_groups,
    set_learning_rates,
    step_counts,
    update_average,
)
from tqdm_seg.training.options import TrainOptions
from tqdm_seg.training.plan import (
    Phase,
    check_folder,
    check_resumable,
    images_per_step,
    memory_gb,
    phases_from,
    print_plan,
    run_facts,
    write_facts,
)
from tqdm_seg.training.reporter import Reporter
from tqdm_seg.training.teacher import TEACHER_DTYPES, Teacher


@takes(TrainOptions)
def train(options: TrainOptions) -> dict[str, object]:
    """Trains, evaluates, writes; returns what results.json holds, {} when it was stopped before the end.

    Everything is checked before the first file is written. Raises FileExistsError when --out holds a run, ValueError or
    OSError for options, data and models that do not fit.
    """
    if options.doctor:
        print(doctor_page(options, *open_data(options)))
        return {}
    if not options.dry_run:
        check_folder(options.out, options.resume)
    with named_when_full(options.out):
        return train_once(options)


def train_once(options: TrainOptions) -> dict[str, object]:
    """As `train`, in a folder that may be written to."""
    logging.disable_progress_bar()  # of saved files, which would break the bar of the steps
    accelerator = make_accelerator(options)
    process, processes, device = accelerator.process_index, accelerator.num_processes, accelerator.device

    training, validation = open_data(options)
    for alarm in alarms(training, validation):
        accelerator.print(alarm)
    if options.warmup_steps > options.steps:
        accelerator.print(f"--warmup-steps {options.warmup_steps}: the run is shorter and never reaches --lr")
    net, processor = build_model(options, training.classes)
    check_sizes(options, net, processor, validation)
    # The teacher has the weights that the run starts from, not those of a checkpoint.
    teacher = Teacher(net, options.teacher_drop_path, TEACHER_DTYPES[options.teacher_precision])
    choose_trained(net, options.vision, options.lora_rank)
    convert_batch_norm(net, device)
    chance = Chance()
    for part in (net, teacher):
        draw_by_sample(part, chance)
    if options.gradient_checkpointing:
        net.gradient_checkpointing_enable()
    net, teacher = net.to(device).train(), teacher.to(device).train()
    net.config.trained = True  # what this run saves
    if options.channels_last:
        net = net.to(memory_format=torch.channels_last)
    groups = parameter_groups(
        net, options.lr, options.weight_decay, options.vision_lr_mult, not options.no_embedding_decay
    )
    optimizer = torch.optim.AdamW(groups, fused=True)  # one pass over all parameters
    average = copy.deepcopy(net) if options.ema else None
    if options.dry_run:
        batch = next(step_batches(options, training, 0, process, processes))
        print_plan(options, net, optimizer, teacher, model_inputs(batch, device), processes, accelerator.print)
        return {}

    data = {"training data": training, "evaluation data": validation}
    facts = run_facts(options, number_format(accelerator), processes, data)
    run = Run(options, accelerator, net, *accelerator.prepare(net, optimizer), average, teacher, chance)
    first_step, phases = run.resume(facts)
    batches = first_now(step_batches(options, training, first_step, process, processes))
    accelerator.wait_for_everyone()  # all have looked for an earlier run
    if accelerator.is_main_process:
        write_facts(options.out, facts, phases)
        prune(options.out / "checkpoints", first_step, options.keep)
    log = Log(accelerator, options, first_step, phases[1:])
    shown = net if average is None else average
    reporter = Reporter(options, accelerator, shown, processor, training, validation, log, phases)
    results = reporter.finish() if train_steps(run, batches, first_step, phases[-1].first_step, log, reporter) else {}
    accelerator.end_training()
    return results


def train_steps(
    run: "Run", batches: Iterator[dict[str, Tensor]], first_step: int, phase_start: int, log: Log, reporter: Reporter
) -> bool:
    """The loop; False when SIGTERM ended it before the last step. phase_start: where the schedule of rates begins."""
    options, accelerator = run.options, run.accelerator
    bar = tqdm(total=options.steps, initial=first_step, unit="step", disable=not accelerator.is_main_process)
    images = images_per_step(options, accelerator.num_processes)
    recent, last_log, clock = RecentLosses(), first_step, time.perf_counter()
    with bar, StopSignal() as stop:
        for step in range(first_step, options.steps):
            rates = set_learning_rates(
                run.optimizer, step - phase_start, options.steps - phase_start, options.warmup_steps, options.min_lr
            )
            norm = run.step(step, [next(batches) for _ in range(options.accumulation)], recent)
            bar.update()

            done, at_end = step + 1, step + 1 == options.steps
            to_log, to_save, to_evaluate = (
                every > 0 and (at_end or done % every == 0)
                for every in (options.log_every, options.save_every_steps, options.eval_every_steps)
            )
            stopped = stop.agreed(accelerator, to_log or to_save)
            if to_log or to_save or stopped:
                means = recent.means(accelerator, options.out)  # raises at a loss that is not finite
                speed = images * (done - last_log) / (time.perf_counter() - clock)
                bar.set_postfix(loss=f"{means['loss']:.2f}")
                log.write(
                    done, **means, **rates, gradient_norm=norm.item(), samples_per_second=speed,
                    memory_gb=memory_gb(accelerator.device), seconds_left=images * (options.steps - done) / speed,
                )  # fmt: skip
                last_log, clock = done, time.perf_counter()
            if to_evaluate and not at_end:
                reporter.evaluate(done)  # before the checkpoint: a resumed run would not repeat it
            if to_save or stopped:
                run.save(done)
            if stopped and not at_end:
                accelerator.print(f"stopped by SIGTERM after step {done}; the same command with --resume continues")
                return False
    return True


@dataclass
class Run:
    """All that a training step touches. model: net as `accelerator` prepared it; average: of the weights, if any."""

    options: TrainOptions
    accelerator: Accelerator
    net: TqdmForSemanticSegmentation
    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: TqdmForSemanticSegmentation | None
    teacher: Teacher
    chance: Chance

    def step(self, step: int, parts: list[dict[str, Tensor]], recent: RecentLosses) -> Tensor:
        """One optimiser step over the accumulated batches; adds their losses to `recent`, returns the gradient norm."""
        options, accelerator = self.options, self.accelerator
        published = options.loss_counts == "published"
        counts = step_counts([batch_counts(part, self.net) for part in parts], accelerator.device, published)
        for batch, part_counts in zip(parts, counts, strict=True):
            inputs = model_inputs(batch, accelerator.device)
            if options.compile:  # one graph for any number of masks, which changes from batch to batch
                torch._dynamo.maybe_mark_dynamic(inputs["mask_index"], 0)
            # The same for all parts of a step: what differs between them is chance by sample.
            torch.manual_seed(int(np.random.SeedSequence([options.seed, step]).generate_state(1)[0]))
            self.chance.seeds = batch["chance"].to(accelerator.device, non_blocking=True)
            with accelerator.accumulate(self.model):
                with accelerator.autocast():
                    inputs |= self.teacher(inputs["pixel_values"])
                outputs = self.model(
                    **inputs, loss_counts=part_counts, sample_seeds=self.chance.seeds, output_logits=False
                )
                loss, losses = outputs.loss, outputs.losses
                del outputs  # mask logits of all layers, which the backward pass does not need
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = finish_gradients(accelerator, self.model, options.clip_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            recent.add(step, batch["key"], losses)
        if self.average is not None:
            update_average(self.average, self.net, options.ema if step > 0 else 0.0)
        return norm

    def save(self, done: int) -> None:
        """A checkpoint after `done` steps; every process must call it."""
        accelerator, average = self.accelerator, self.average
        state = training_state(self._bare_model(), self.optimizer.optimizer)
        if accelerator.is_main_process:
            extra = {"scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None}
            averaged = average.state_dict() if average is not None else None
            write_checkpoint(self.options.out / "checkpoints", done, state, averaged, extra, self.options.keep)
        accelerator.wait_for_everyone()

    def resume(self, facts: dict[str, Any]) -> tuple[int, list[Phase]]:
        """Loads the last whole checkpoint, if --resume is given and there is one.

        Returns the number of steps done and the phases of the run.
        """
        options, say = self.options, self.accelerator.print
        last = newest_checkpoint(options.out / "checkpoints", say) if options.resume else None
        if last is None:
            return 0, [Phase(options.phase or "first", 0, options.steps)]
        phases = check_resumable(options.out, facts, options.phase, say)
        of_phase = {group["name"]: (group["base_lr"], group["weight_decay"]) for group in self.optimizer.param_groups}
        content = load_checkpoint(last, self._bare_model(), self.optimizer.optimizer)
        for group in self.optimizer.param_groups:
            group["base_lr"], group["weight_decay"] = of_phase[group["name"]]
        if self.average is not None:
            self.average.load_state_dict(load_file(last / "average.safetensors"))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        return content["step"], phases_from(phases, options.phase, content["step"], options.steps)

    def _bare_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)


def batch_counts(batch: dict[str, Tensor], net: TqdmForSemanticSegmentation) -> LossCounts:
    """What the losses of this batch are divided by when it is the whole step."""
    config = net.config
    return count_losses(
        batch["mask_index"], batch["labels"], config.num_labels, config.no_object_weight, config.score_map_loss_over,
        config.ignore_index,
    )  # fmt: skip


def finish_gradients(accelerator: Accelerator, model: nn.Module, limit: float) -> Tensor:
    """Norm of all gradients together, on the device; if `limit` is above 0 they are scaled down to that norm."""
    if limit:
        return accelerator.clip_grad_norm_(model.parameters(), limit)
    accelerator.unscale_gradients()
    return gradient_norm(model.parameters())
