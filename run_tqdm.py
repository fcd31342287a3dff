"""What surrounds the training loop: losses on their way to the log, SIGTERM, trackers, the plan of a dry run."""

import argparse
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation
from tqdm_seg.options_tqdm import FREE_OPTIONS
from tqdm_seg.reference_tqdm import FrozenReference
from tqdm_seg.shards_tqdm import write_whole


class RecentLosses:
    """Losses by name since the last report, left on the device, so that no step waits for their values."""

    def __init__(self):
        self.rows: list[tuple[int, list[str], Tensor]] = []
        self.names: list[str] = []

    def add(self, step: int, keys: list[str], losses: dict[str, Tensor]) -> None:
        """Remembers the scalars of one batch, and which images it was made of."""
        self.names = list(losses)
        self.rows.append((step, keys, torch.stack(list(losses.values())).detach()))

    def means(self, accelerator: Accelerator, out: Path) -> dict[str, float]:
        """Means over batches and processes since the last call, of every loss and of their sum "loss".

        Raises FloatingPointError naming step and images of the first batch with a loss that is not finite, and writes
        them to out/not_finite.json.
        """
        values = torch.stack([row for _, _, row in self.rows])  # (batches, losses)
        for (step, keys, _), row in zip(self.rows, values.tolist(), strict=True):
            broken = [name for name, value in zip(self.names, row, strict=True) if not math.isfinite(value)]
            if broken:
                content = {"step": step, "losses": dict(zip(self.names, map(str, row), strict=True)), "images": keys}
                write_whole(out / "not_finite.json", (json.dumps(content, indent=1) + "\n").encode())
                raise FloatingPointError(
                    f"{', '.join(broken)} not finite at step {step}, images {', '.join(keys)} (see "
                    f"{out / 'not_finite.json'}); look at these images and their labels, lower --lr, set --clip-norm, "
                    "or use --mixed-precision no. Nothing was saved since"
                )
        self.rows.clear()
        means = accelerator.reduce(values.mean(0), "mean").tolist()
        return {"loss": sum(means), **dict(zip(self.names, means, strict=True))}


class StopSignal:
    """Whether SIGTERM has come, as schedulers send it before they take a machine away."""

    def __init__(self):
        self.came = False

    def __enter__(self) -> "StopSignal":
        self.before = signal.signal(signal.SIGTERM, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self.before)

    def _remember(self, *_: object) -> None:
        self.came = True

    def agreed(self, accelerator: Accelerator, waits_anyway: bool) -> bool:
        """Whether all processes shall stop; several ask each other only where they wait for each other anyway."""
        if accelerator.num_processes == 1:
            return self.came
        if not waits_anyway:
            return False
        return bool(accelerator.reduce(torch.tensor(float(self.came), device=accelerator.device)) > 0)


class Log:
    """log.jsonl and the tracker, written by the first process."""

    def __init__(self, accelerator: Accelerator, args: argparse.Namespace, first_step: int):
        self.accelerator, self.path = accelerator, Path(args.out) / "log.jsonl"
        if accelerator.is_main_process:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
            kept = [line for line in lines if json.loads(line)["step"] <= first_step]  # the rest is done again
            write_whole(self.path, "".join(kept).encode())
        simple = {
            name: value if isinstance(value, int | float | str) else str(value) for name, value in vars(args).items()
        }
        accelerator.init_trackers("tqdm", config=simple)

    def write(self, step: int, **values: float) -> None:
        """One line."""
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    def pictures(self, step: int, drawn: dict[str, np.ndarray]) -> None:
        """Pictures (H, W, 3) by name, to trackers that show some."""
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: picture[None] for name, picture in drawn.items()}, step, **layout)


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
