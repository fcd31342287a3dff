"""Speed and memory of a training step: ours in its modes, beside the published order of work.

    python benchmarks/training_speed.py [--preset clip_vit_b16] [--size 512] [--batch-size 1] [--compile inductor]

A step is: the frozen tower, forward pass and losses, backward pass, AdamW. Images and labels are random, new for every
step and already on the device (loader_speed.py measures the loader); weights are random. In every mode the step is the
one that train.py makes; on a GPU it runs under torch.cuda.set_sync_debug_mode("error"), which stops at the first
operation that makes the host wait for the device. Writes training_PRESET_SIZE_DEVICE.json and .md to --out. Exit status
1 if a contender failed, which is reported.

published-order        the published order of work, see published_training.py
published-anomaly      the same under autograd's anomaly detection, which the published training switches on (--anomaly)
ours-exact             `train.py`
ours-bf16              `train.py --precision bf16`
ours-bf16-reference    `train.py --precision bf16 --teacher-precision bf16`
ours-channels-last     `train.py --channels-last --precision bf16`
ours-checkpointing     `train.py --gradient-checkpointing`, in --precision
ours-compiled          `train.py --compile BACKEND`, in --precision (with --compile)
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import (
    RESULTS,
    Contender,
    Result,
    Settings,
    Work,
    exit_status,
    find_device,
    markdown_table,
    measure,
    run_facts,
    write_results,
)
from published_training import PUBLISHED_SECONDS, PublishedTraining, full_size_masks
from torch import Tensor
from torch.nn import functional as F

from tqdm_seg import modeling_tqdm
from tqdm_seg.configuration_tqdm import PRESETS, TqdmConfig
from tqdm_seg.loss_tqdm import choose_points, supervised_masks
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation
from tqdm_seg.train import batch_counts
from tqdm_seg.training.optimisation import gradient_norm, parameter_groups, step_counts
from tqdm_seg.training.teacher import TEACHER_DTYPES, Teacher

CLASSES = 19
ALONE = "one contender after the other"
REMARKS = (
    "Compared are every loss of one batch in train mode, at the same points and with the same dropout, and the "
    "logarithm of the norm of the gradient of their sum. First call: the first step after that."
)
PARTS = ("frozen tower", "forward and losses", "backward", "optimiser")
BASELINE, ANOMALY = "published-order", "published-anomaly"


@dataclass
class Setting:
    """What all contenders train on, and the folder in which they leave their numbers and the times of their parts."""

    preset: str
    size: int
    batch_size: int
    folder: Path


@dataclass
class Mode:
    """How our step is made. compiled: the backend of torch.compile, if any."""

    dtype: torch.dtype = torch.float32
    reference_dtype: str = "fp32"
    checkpointing: bool = False
    channels_last: bool = False
    compiled: str | None = None


class PartTimes:
    """Seconds of every part of the steps so far. On a GPU nothing waits for them: it notes the times itself."""

    def __init__(self, device: torch.device, file: Path):
        self.device, self.file = device, file
        self.marks: list[list[Any]] = []

    def begin(self) -> None:
        """A new step begins."""
        self.marks.append([])
        self.mark()

    def mark(self) -> None:
        """A part ends here."""
        if self.device.type == "cpu":
            self.marks[-1].append(time.perf_counter())
        else:
            event = torch.Event(self.device, enable_timing=True)
            event.record()
            self.marks[-1].append(event)

    def write(self) -> None:
        """All steps so far to the file; call it where waiting does no harm."""
        if self.device.type == "cpu":
            steps = [[end - start for start, end in zip(m, m[1:], strict=False)] for m in self.marks]
        else:
            steps = [[start.elapsed_time(end) / 1e3 for start, end in zip(m, m[1:], strict=False)] for m in self.marks]
        self.file.write_text(json.dumps(steps), encoding="utf-8")


def random_model(preset: str, device: torch.device) -> TqdmForSemanticSegmentation:
    """The model of a preset with random weights, always the same ones, in train mode."""
    torch.manual_seed(0)
    config = TqdmConfig.from_preset(preset, id2label={i: f"class {i}" for i in range(CLASSES)})
    return TqdmForSemanticSegmentation(config).to(device).train()


def random_batch(setting: Setting, device: torch.device, number: int) -> dict[str, Tensor]:
    """Inputs of the model, the same for the same number: labels of a dozen areas an image, and a strip of none."""
    generator = torch.Generator().manual_seed(number)
    size, count = setting.size, setting.batch_size
    areas = torch.randint(CLASSES, (count, 1, 3, 4), generator=generator).float()
    labels = F.interpolate(areas, (size, size), mode="nearest")[:, 0].long()
    labels[:, : size // 16] = 255
    batch = {
        "pixel_values": torch.randn(count, 3, size, size, generator=generator),
        "labels": labels,
        "mask_index": supervised_masks(labels, CLASSES),
    }
    return {name: value.to(device) for name, value in batch.items()}


def make_step(
    reference: Callable[[dict[str, Any]], Any],
    loss: Callable[[dict[str, Any], Any], Tensor],
    optimizer: torch.optim.Optimizer,
    times: PartTimes,
) -> Callable[[dict[str, Any]], None]:
    """A training step. reference: batch -> what the frozen tower gives; loss: batch, and that -> scalar."""

    def step(batch: dict[str, Any]) -> None:
        times.begin()
        targets = reference(batch)
        times.mark()
        total = loss(batch, targets)
        times.mark()
        total.backward()
        times.mark()
        optimizer.step()
        optimizer.zero_grad()
        times.mark()

    return step


def without_waits(step: Callable[[dict[str, Any]], None], device: torch.device) -> Callable[[dict[str, Any]], None]:
    """The step, which on a GPU fails where it makes the host wait for the device."""
    if device.type != "cuda":
        return step

    def watched(batch: dict[str, Any]) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return watched


def make_inputs(times: PartTimes, make: Callable[[int], dict[str, Any]]) -> Callable[[int], dict[str, Any]]:
    """Inputs by number; asked for between two steps, when the times of the last one can be read."""

    def inputs(number: int) -> dict[str, Any]:
        times.write()
        return make(number)

    return inputs


def save_numbers(path: Path, model: TqdmForSemanticSegmentation, terms: dict[str, Tensor]) -> None:
    """What contenders are compared by: losses of the first batch, logarithm of the norm of the sum's gradient."""
    sum(terms.values()).backward()
    norm = gradient_norm(model.parameters()).log()
    model.zero_grad()
    torch.save(torch.stack([*(terms[name] for name in sorted(terms)), norm]).detach().cpu(), path)


def build_ours(name: str, setting: Setting, mode: Mode, device: torch.device) -> Work:
    """Our step in one of its modes."""
    model = random_model(setting.preset, device)
    reference = Teacher(model, dtype=TEACHER_DTYPES[mode.reference_dtype])
    if mode.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if mode.checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-5, 1e-4, 0.1), fused=True)
    times = PartTimes(device, setting.folder / f"{name}.json")
    autocast = torch.autocast(device.type, mode.dtype, enabled=mode.dtype != torch.float32)
    compiled = model
    if mode.compiled:
        torch._inductor.config.fallback_random = True  # as train.py has it
        compiled = torch.compile(model, backend=mode.compiled)

    def targets(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with autocast:
            return reference(batch["pixel_values"])

    def outputs(called: torch.nn.Module, batch: dict[str, Tensor], targets: dict[str, Tensor]) -> Any:
        (counts,) = step_counts([batch_counts(batch, model)], device, published=False)
        if mode.compiled:
            torch._dynamo.maybe_mark_dynamic(batch["mask_index"], 0)
        with autocast:
            return called(**batch, **targets, loss_counts=counts, output_logits=False)

    inputs = make_inputs(times, partial(random_batch, setting, device))
    batch = inputs(0)
    torch.manual_seed(0)
    save_numbers(setting.folder / f"{name}.pt", model, outputs(compiled, batch, targets(batch)).losses)
    step, plain = (
        make_step(targets, lambda batch, given, called=called: outputs(called, batch, given).loss, optimizer, times)
        for called in (compiled, model)
    )
    return Work(without_waits(step, device), inputs, mode.dtype, counted=lambda: plain)


def build_published(anomaly: bool, setting: Setting, device: torch.device) -> Work:
    """The published order of work."""
    model = random_model(setting.preset, device)
    published = PublishedTraining(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-5, 1e-4, 0.1))
    name = ANOMALY if anomaly else BASELINE
    times = PartTimes(device, setting.folder / f"{name}.json")

    def loss(batch: dict[str, Any], reference: Tensor) -> Tensor:
        terms = published.losses(batch, reference)
        {name: term.item() for name, term in terms.items()}  # for the log, in every step
        return sum(terms.values())

    def make(number: int) -> dict[str, Any]:
        batch = random_batch(setting, device, number)
        return batch | {"masks": full_size_masks(batch["labels"], batch["mask_index"])}

    step = make_step(lambda batch: published.reference_embedding(batch["pixel_values"]), loss, optimizer, times)

    def call(batch: dict[str, Any]) -> None:
        with torch.autograd.set_detect_anomaly(anomaly):
            step(batch)

    inputs = make_inputs(times, make)
    batch = inputs(0)
    published.reference.eval()
    reference = published.reference_embedding(batch["pixel_values"])
    points = points_of(model, {name: batch[name] for name in ("pixel_values", "labels", "mask_index")})
    torch.manual_seed(0)
    save_numbers(setting.folder / f"{name}.pt", model, published.losses(batch, reference, points))
    published.reference.train()
    return Work(call, inputs)


def points_of(model: TqdmForSemanticSegmentation, batch: dict[str, Tensor]) -> Tensor:
    """The points (L, M, P, 2) that our model draws for its mask losses after torch.manual_seed(0)."""
    found = []

    def choose(*args: Any) -> Tensor:
        found.append(choose_points(*args))
        return found[0]

    modeling_tqdm.choose_points = choose
    torch.manual_seed(0)
    with torch.no_grad():
        model(**batch, output_logits=False)
    modeling_tqdm.choose_points = choose_points
    return found[0]


def compare(results: list[Result], folder: Path) -> None:
    """Fills in `difference` from the published order, and the `span` of its numbers."""
    wanted = torch.load(folder / f"{BASELINE}.pt")
    for result in results:
        if result.error is None and result.name == BASELINE:
            result.span = (wanted.min().item(), wanted.max().item())
        elif result.error is None:
            result.difference = (torch.load(folder / f"{result.name}.pt") - wanted).abs().max().item()


def part_medians(results: list[Result], folder: Path, settings: Settings) -> dict[str, list[float]]:
    """Seconds of every part by contender, medians over the timed steps."""
    medians = {}
    for result in results:
        if result.error is None:
            steps = json.loads((folder / f"{result.name}.json").read_text(encoding="utf-8"))
            timed = steps[settings.warm_ups : settings.warm_ups + settings.repeats]
            medians[result.name] = [statistics.median(column) for column in zip(*timed, strict=True)]
    return medians


def parts_table(medians: dict[str, list[float]], preset: str) -> str:
    """The parts of every contender's step as a table, and what is known of the published code."""
    rows = [
        [name, *(f"{value:.3g} ({value / sum(values):.0%})" for value in values)] for name, values in medians.items()
    ]
    table = markdown_table(["seconds (share)", *PARTS], rows)
    if preset != "clip_vit_b16":
        return table
    words = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in PUBLISHED_SECONDS.items())
    return (
        f"{table}\n\nThe published code itself, batch 1, 512x512, without optimiser, was measured once, on another "
        f"machine, with torch 2.13 and 2 threads: {words}, together {sum(PUBLISHED_SECONDS.values()):.3f} s: quoted."
    )


def all_contenders(setting: Setting, dtype: torch.dtype, backend: str | None, anomaly: bool) -> list[Contender]:
    """Everything that can be run; dtype: of the modes that save memory or compile."""
    modes = {
        "ours-exact": Mode(),
        "ours-bf16": Mode(torch.bfloat16),
        "ours-bf16-reference": Mode(torch.bfloat16, "bf16"),
        "ours-channels-last": Mode(torch.bfloat16, channels_last=True),
        "ours-checkpointing": Mode(dtype, checkpointing=True),
    } | ({"ours-compiled": Mode(dtype, compiled=backend)} if backend else {})
    contenders = [Contender(BASELINE, partial(build_published, False, setting))]
    if anomaly:
        contenders.append(Contender(ANOMALY, partial(build_published, True, setting)))
    return contenders + [Contender(name, partial(build_ours, name, setting, mode)) for name, mode in modes.items()]


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=sorted(PRESETS), default="clip_vit_b16", help="of the model (default: %(default)s)")
    add("--size", type=int, default=512, help="side of the images, a multiple of the patch (default: %(default)s)")
    add("--batch-size", type=int, help="images of a step (default: 1 on a CPU, 16 on a GPU)")
    add("--precision", choices=["no", "bf16"], default="no", help="of ours-checkpointing, -compiled (%(default)s)")
    add("--compile", metavar="BACKEND", help="run ours-compiled too, as inductor; takes minutes more on a CPU")
    add("--anomaly", action="store_true", help="run published-anomaly too")
    add("--contenders", nargs="+", metavar="NAME", help="these only, as named above, and published-order")
    add("--repeats", type=int, default=3, help="steps that are timed (default: %(default)s)")
    add("--warm-ups", type=int, help="steps before them (default: 1 on a CPU, 5 on a GPU)")
    add("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    add("--threads", type=int, default=0, help="0 for torch's own number (default: %(default)s)")
    add("--out", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the suite; returns the exit status."""
    args = make_parser().parse_args(argv)
    settings = Settings(args.repeats, args.warm_ups, args.device, args.threads)
    device = find_device(args.device)
    batch_size = args.batch_size or (1 if device.type == "cpu" else 16)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setting = Setting(args.preset, args.size, batch_size, folder)
        contenders = all_contenders(setting, dtype, args.compile, args.anomaly)
        if args.contenders:
            known = [contender.name for contender in contenders]
            if unknown := set(args.contenders) - set(known):
                raise SystemExit(f"no contender {', '.join(sorted(unknown))}; there are {', '.join(known)}")
            contenders = [c for c in contenders if c.name in (BASELINE, *args.contenders)]
        # One after the other: together they would not fit the memory.
        results = [measure([contender], settings)[0] for contender in contenders]
        compare(results, folder)
        medians = part_medians(results, folder, settings)
    facts = run_facts(settings) | {
        "preset": args.preset, "size": args.size, "batch_size": batch_size, "order": ALONE,
        "parts": {name: dict(zip(PARTS, values, strict=True)) for name, values in medians.items()},
    }  # fmt: skip
    shape = f"{args.size}x{args.size}"
    name, title = f"training_{args.preset}_{shape}_{device.type}", f"Training step: {args.preset}, {shape}"
    remarks = f"{REMARKS}\n\n{parts_table(medians, args.preset)}"
    write_results(args.out, name, f"{title}, batch {batch_size}", results, [BASELINE], facts, remarks)
    return exit_status(results)


if __name__ == "__main__":
    sys.exit(main())
