"""Speed and memory of a training step: ours in its modes, and the published order of work.

    python benchmarks/training_speed.py [--preset clip_vit_b16] [--size 512x512] [--batch-size 1] [--compile inductor]

A step is: teacher, forward pass and losses, backward pass, AdamW. Images and labels are random, new for every step and
already on the device (data_speed.py measures the loader); weights are random. Our step is the one of train.py; on a
GPU it runs under torch.cuda.set_sync_debug_mode("error"), which stops where the host waits for the device. Compared are
every loss of one batch in train mode, at the same points and with the same dropout, and the logarithm of the norm of
the gradient. Writes training_PRESET_SIZE_DEVICE.json and .md to --out. Exit status 1 if a variant failed.

published-order      the published order of work, see published.py
published-anomaly    the same under autograd's anomaly detection, as published; runs only if named in --only
ours-exact           `train.py`
ours-bf16            `train.py --precision bf16`
ours-bf16-teacher    `train.py --precision bf16 --teacher-precision bf16`
ours-channels-last   `train.py --precision bf16 --channels-last`
ours-checkpointing   `train.py --gradient-checkpointing`, in --precision
ours-compiled        `train.py --compile BACKEND`, in --precision (with --compile)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from unittest import mock

import torch
from measure import Builder, Settings, Work, choose, main, measure, random_images, write_results
from published import PublishedTraining, full_size_masks, random_model
from torch import Tensor
from torch.nn import functional as F

from tqdm_seg import modeling_tqdm
from tqdm_seg.configuration_tqdm import CITYSCAPES_CLASSES, PRESETS
from tqdm_seg.loss_tqdm import choose_points, supervised_masks
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation
from tqdm_seg.program import option, size
from tqdm_seg.train import batch_counts
from tqdm_seg.training.optimisation import gradient_norm, parameter_groups, step_counts
from tqdm_seg.training.teacher import Teacher

CLASSES = len(CITYSCAPES_CLASSES)
BASELINE, ANOMALY = "published-order", "published-anomaly"
OURS_IN_BF16 = ("ours-bf16", "ours-bf16-teacher", "ours-channels-last")
OURS_IN_PRECISION = ("ours-checkpointing", "ours-compiled")
Batch = dict[str, Any]


@dataclass(kw_only=True)
class TrainingSettings(Settings):
    """Options."""

    preset: str = option("clip_vit_b16", choices=sorted(PRESETS), help="of the model")
    size: tuple[int, int] = option((512, 512), type=size, metavar="HxW", help="of the images (default: 512x512)")
    batch_size: int | None = option(None, help="images of a step (default: 1 on a CPU, 16 on a GPU)")
    precision: Literal["fp32", "bf16"] = option("fp32", help="of ours-checkpointing and ours-compiled")
    compile: str | None = option(None, metavar="BACKEND", help="run ours-compiled, such as inductor: minutes on a CPU")
    repeats: int = option(3, help="timed rounds")

    def __post_init__(self):
        super().__post_init__()
        self.batch_size = self.batch_size or (1 if self.torch_device.type == "cpu" else 16)


def random_batch(settings: TrainingSettings, device: torch.device, number: int) -> Batch:
    """Inputs of the model, the same for the same number: a dozen areas per image and an ignored strip."""
    generator, count = torch.Generator().manual_seed(number), settings.batch_size
    areas = torch.randint(CLASSES, (count, 1, 3, 4), generator=generator).float()
    labels = F.interpolate(areas, settings.size, mode="nearest")[:, 0].long()
    labels[:, : settings.size[0] // 16] = 255
    batch = {"labels": labels, "mask_index": supervised_masks(labels, CLASSES)}
    batch = {name: value.to(device) for name, value in batch.items()}
    return batch | {"pixel_values": random_images(number, count, settings.size, device)}


def take_step(loss: Callable[[Batch], Tensor], optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """A training step."""
    loss(batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def without_waits(step: Callable[[Batch], None], batch: Batch) -> None:
    """A step that fails on a GPU where it makes the host wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    step(batch)
    torch.cuda.set_sync_debug_mode("default")


def comparable(model: TqdmForSemanticSegmentation, terms: dict[str, Tensor]) -> Tensor:
    """Losses of the first batch, and the logarithm of the norm of their sum's gradient."""
    sum(terms.values()).backward()
    norm = gradient_norm(model.parameters()).log()
    model.zero_grad()
    return torch.stack([*(terms[name] for name in sorted(terms)), norm]).detach()


def build_ours(name: str, settings: TrainingSettings, device: torch.device) -> Work:
    """Our step as its name says."""
    bf16 = settings.precision == "bf16" if name in OURS_IN_PRECISION else name in OURS_IN_BF16
    model = random_model(settings.preset, device).train().requires_grad_()
    teacher = Teacher(model, dtype=torch.bfloat16 if "teacher" in name else None)
    if "channels-last" in name:
        model = model.to(memory_format=torch.channels_last)
    if "checkpointing" in name:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-5, 1e-4, 0.1), fused=True)
    dtype = torch.bfloat16 if bf16 else torch.float32
    compiled = model
    if "compiled" in name:
        torch._inductor.config.fallback_random = True  # as train.py sets it
        compiled = torch.compile(model, backend=settings.compile)

    def outputs(called: torch.nn.Module, batch: Batch) -> Any:
        (counts,) = step_counts([batch_counts(batch, model)], device, published=False)
        if compiled is not model:
            torch._dynamo.maybe_mark_dynamic(batch["mask_index"], 0)
        with torch.autocast(device.type, dtype, enabled=bf16):
            targets = teacher(batch["pixel_values"])
            return called(**batch, **targets, loss_counts=counts, output_logits=False)

    def step(called: torch.nn.Module) -> Callable[[Batch], None]:
        return partial(take_step, lambda batch: outputs(called, batch).loss, optimizer)

    inputs = partial(random_batch, settings, device)
    torch.manual_seed(0)
    numbers = comparable(model, outputs(compiled, inputs(0)).losses)  # before the first step
    call = step(compiled) if device.type != "cuda" else partial(without_waits, step(compiled))
    return Work(call, inputs, dtype, lambda _: numbers, counted=lambda: step(model))


def build_published(name: str, settings: TrainingSettings, device: torch.device) -> Work:
    """The published order of work."""
    model = random_model(settings.preset, device).train().requires_grad_()
    published = PublishedTraining(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-5, 1e-4, 0.1))

    def loss(batch: Batch) -> Tensor:
        terms = published.losses(batch, published.teacher_embedding(batch["pixel_values"]))
        {name: term.item() for name, term in terms.items()}  # for the log, in every step
        return sum(terms.values())

    def inputs(number: int) -> Batch:
        batch = random_batch(settings, device, number)
        return batch | {"masks": full_size_masks(batch["labels"], batch["mask_index"])}

    published.teacher.eval()  # for the comparison only
    batch = inputs(0)
    target, points = published.teacher_embedding(batch["pixel_values"]), drawn_points(model, batch)
    torch.manual_seed(0)
    numbers = comparable(model, published.losses(batch, target, points))
    published.teacher.train()
    torch.autograd.set_detect_anomaly(name == ANOMALY)  # in the whole process of this variant
    return Work(partial(take_step, loss, optimizer), inputs, numbers=lambda _: numbers)


def drawn_points(model: TqdmForSemanticSegmentation, batch: Batch) -> Tensor:
    """The points (L, M, P, 2) of our model's mask losses after torch.manual_seed(0)."""
    found = []

    def choose_and_keep(*arguments: Any) -> Tensor:
        found.append(choose_points(*arguments))
        return found[0]

    torch.manual_seed(0)
    with mock.patch.object(modeling_tqdm, "choose_points", choose_and_keep), torch.no_grad():
        model(batch["pixel_values"], batch["labels"], batch["mask_index"], output_logits=False)
    return found[0]


def all_variants(settings: TrainingSettings) -> dict[str, Builder]:
    """Everything that can run."""
    ours = ["ours-exact", *OURS_IN_BF16, *(OURS_IN_PRECISION if settings.compile else OURS_IN_PRECISION[:1])]
    published = [name for name in (BASELINE, ANOMALY) if name == BASELINE or name in (settings.only or ())]
    builders = dict.fromkeys(published, build_published) | dict.fromkeys(ours, build_ours)
    return {name: partial(build, name, settings) for name, build in builders.items()}


def measure_training(settings: TrainingSettings) -> int:
    """Measures one variant after the other, as together they would not fit the memory; returns the exit status."""
    variants = choose(all_variants(settings), settings.only and (BASELINE, *settings.only))
    results, words = measure(variants, settings, in_turns=False), "x".join(map(str, settings.size))
    return write_results(
        settings, f"training_{settings.preset}_{words}_{settings.torch_device.type}",
        f"Training step: {settings.preset}, {words}, batch {settings.batch_size}", results, [BASELINE],
        preset=settings.preset, batch_size=settings.batch_size, order="one variant after the other",
    )  # fmt: skip


if __name__ == "__main__":
    main(measure_training, TrainingSettings, __doc__)
