"""What a run will do: its options on disk, the plan of a dry run, and whether a run can be resumed."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

from ..data.files import write_file
from .options import FREE_OPTIONS, TrainOptions
from .teacher import Teacher


def write_options(options: TrainOptions, processes: int) -> None:
    """Makes the run folder with its args.json: all options, and the images of a step."""
    options.out.mkdir(parents=True, exist_ok=True)
    write_file(options.out / "args.json", (json.dumps(_facts(options, processes), indent=2) + "\n").encode())


def check_resumable(options: TrainOptions, processes: int) -> None:
    """Raises ValueError when options of the run in --out changed that may not change."""
    old = json.loads((options.out / "args.json").read_text(encoding="utf-8"))
    now = _facts(options, processes)
    changed = [name for name in now if name not in FREE_OPTIONS and old.get(name) != now[name]]
    if changed:
        words = "; ".join(f"{name} was {old.get(name)}, now {now[name]}" for name in changed)
        raise ValueError(
            f"cannot resume {options.out}: options changed ({words}); repeat its options, or choose another --out"
        )


def _facts(options: TrainOptions, processes: int) -> dict[str, Any]:
    """The options as JSON stores them."""
    facts = dataclasses.asdict(options) | {"images_per_step": images_per_step(options, processes)}
    return json.loads(json.dumps(facts, default=str))


def images_per_step(options: TrainOptions, processes: int) -> int:
    """Images of one optimiser step, over all processes."""
    return options.batch_size * options.accumulation * processes


def print_plan(
    options: TrainOptions,
    net: TqdmForSemanticSegmentation,
    optimizer: torch.optim.Optimizer,
    teacher: Teacher,
    batch: dict[str, Tensor],
    processes: int,
    say: Callable[[str], None],
) -> None:
    """What --dry-run prints: parameters, groups, steps, and memory, of which activations are measured on one image."""
    total = sum(parameter.numel() for parameter in net.parameters())
    for group in optimizer.param_groups:
        count = sum(parameter.numel() for parameter in group["params"])
        rate, decay = group["base_lr"], group["weight_decay"]
        say(f"{group['name']}: {count / 1e6:.2f} M parameters, peak rate {rate:g}, decay {decay:g}")
    trained = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    say(f"model: {total / 1e6:.2f} M parameters, {trained / total:.1%} of them trained")
    images = images_per_step(options, processes)
    batch_size = options.batch_size
    say(f"{options.steps} steps of {images} images ({batch_size} x {options.accumulation} x {processes} processes)")
    one = {name: value[:1] for name, value in batch.items() if name != "mask_index"}
    kept = saved_bytes(net, one, teacher)
    states = 4 * (total + 3 * trained) + sum(p.nbytes for p in teacher.parameters())
    say(
        f"memory per process: {states / 2**30:.2f} GiB of weights, gradients, moments and teacher, about "
        f"{kept * batch_size / 2**30:.2f} GiB of activations ({batch_size} x {kept / 2**20:.0f} MiB, float32)"
    )


def saved_bytes(net: nn.Module, inputs: dict[str, Tensor], teacher: Teacher) -> int:
    """Bytes that a forward pass in float32 keeps for the backward pass, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(**inputs, **teacher(inputs["pixel_values"]), output_logits=False)
    return sum(found.values())


def memory_gb(device: torch.device) -> float:
    """Peak memory of tensors on a GPU, or the memory that the process holds now, in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9
