"""What a run will do, before it does it: the plan of a dry run, and whether a run can be resumed."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

from .options import FREE_OPTIONS
from .teacher import FrozenReference


def check_resumable(args: argparse.Namespace, processes: int) -> None:
    """Raises ValueError when the run in --out was begun with other options than those that may change."""
    old = json.loads((Path(args.out) / "args.json").read_text(encoding="utf-8"))
    now = json.loads(json.dumps(vars(args) | {"images_per_step": images_per_step(args, processes)}))
    changed = [name for name in now if name not in FREE_OPTIONS and old.get(name) != now[name]]
    if changed:
        words = "; ".join(f"{name} was {old.get(name)}, now {now[name]}" for name in changed)
        raise ValueError(f"{args.out} was begun otherwise ({words}); repeat its options, or choose another --out")


def images_per_step(args: argparse.Namespace, processes: int) -> int:
    """Images of one optimiser step, over all processes."""
    return args.batch_size * args.accumulation * processes


def print_plan(
    args: argparse.Namespace,
    net: TqdmForSemanticSegmentation,
    optimizer: torch.optim.Optimizer,
    reference: FrozenReference,
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
    images = images_per_step(args, processes)
    say(f"{args.steps} steps of {images} images ({args.batch_size} x {args.accumulation} x {processes} processes)")
    one = {name: value[:1] for name, value in batch.items() if name != "mask_index"}
    kept = saved_bytes(net, one, reference)
    states = 4 * (total + 3 * trained) + sum(p.nbytes for p in reference.parameters())
    say(
        f"memory per process: {states / 2**30:.2f} GiB of weights, gradients, moments and frozen tower, about "
        f"{kept * args.batch_size / 2**30:.2f} GiB of activations ({args.batch_size} x {kept / 2**20:.0f} MiB, float32)"
    )


def saved_bytes(net: nn.Module, inputs: dict[str, Tensor], reference: FrozenReference) -> int:
    """Bytes that a forward pass in float32 keeps for the backward pass, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(**inputs, **reference(inputs["pixel_values"]), output_logits=False)
    return sum(found.values())


def memory_gb(device: torch.device) -> float:
    """Most memory that tensors took on a GPU so far, or what the process holds now, in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9
