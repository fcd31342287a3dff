"""What a run will do: its options on disk, the plan of a dry run, and whether a run can be resumed."""

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn

from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

from .. import __version__
from ..data.class_vectors import vectors_path
from ..data.files import check_out_folder, claim_folder, read_json, write_file
from ..data.frames import FrameDataset, PlainRows
from ..deploy.folder import file_sum, identity
from ..evaluation.groups import flatten
from ..program import cut
from .options import FREE_OPTIONS, PHASE_OPTIONS, PRESETS, TrainOptions
from .sets import FrameSets
from .teacher import Teacher

ARGS = "args.json"
# Libraries whose versions decide the last digits of a run.
_LIBRARIES = ("tqdm-seg", "torch", "transformers", "accelerate", "numpy", "opencv-python-headless")


class Phase(NamedTuple):
    """A part of a run with one set of options: steps first_step ... last_step - 1."""

    name: str
    first_step: int
    last_step: int


def check_folder(out: Path, resume: bool) -> None:
    """Raises OSError when the folder holds a run and --resume is not given, or files that are none of the run's."""
    if (out / ARGS).is_file() and not resume:
        raise FileExistsError(f"{out} holds a run; add --resume to continue it, or choose another --out")
    check_out_folder(out, "train")
    for part in ("model", "best", "overlays"):
        check_out_folder(out / part, "train", whole=True)


def run_facts(
    options: TrainOptions,
    precision: str,
    processes: int,
    data: dict[str, FrameSets | FrameDataset | PlainRows],
) -> dict[str, Any]:
    """What args.json holds: the options, and what the run is by content, wherever data and start model lie.

    precision: the effective one. data: by the name of its part.
    """
    preset = options.model in PRESETS
    facts = dataclasses.asdict(options) | {
        "images_per_step": images_per_step(options, processes),
        "identity": {
            "precision": precision,
            "start model": options.model if preset else identity(Path(options.model))["sha256"],
            "class vectors": options.class_vectors and file_sum(vectors_path(options.class_vectors)),
            **{part: _content(frames) for part, frames in data.items()},
        },
        "versions": {name: _version(name) for name in _LIBRARIES},
    }
    return json.loads(json.dumps(facts, default=str))


def _content(frames: FrameSets | FrameDataset | PlainRows) -> str | dict[str, str]:
    """The frames by their index, which holds a checksum of every file; without an index by their place."""
    if isinstance(frames, PlainRows):
        return frames.source
    if isinstance(frames, FrameDataset):
        return frames.identity
    if not frames.sets[0].name:
        return frames.sets[0].frames.identity
    return {name: f"{part.identity}, split {part.split}, weight {weight}" for name, part, weight in frames.sets}


def _version(name: str) -> str:
    if name == "tqdm-seg":
        return __version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def write_facts(out: Path, facts: dict[str, Any], phases: list[Phase]) -> None:
    """Makes the run folder with its args.json."""
    claim_folder(out, "train")
    content = facts | {"phases": [phase._asdict() for phase in phases]}
    write_file(out / ARGS, (json.dumps(content, indent=2) + "\n").encode())


def check_resumable(out: Path, now: dict[str, Any], phase: str | None, say: Callable[[str], None]) -> list[Phase]:
    """The phases of the run in `out` up to now, and says changed versions.

    phase: name of the phase to go on with or to begin, None for the last one. Raises ValueError when options or
    contents changed that may not, or only in a new phase.
    """
    before = read_json(out / ARGS, fix="copy it again, or choose another --out")
    phases = [Phase(**phase) for phase in before.pop("phases", [])] or [Phase("first", 0, now["steps"])]
    old, versions, changed = flatten(before), [], {}
    for name, value in flatten(now).items():
        if name not in FREE_OPTIONS and old.get(name) != value:
            words = f"{name.removeprefix('identity.')} was {old.get(name)}, now {value}"
            if name.startswith("versions."):
                versions.append(words)
            else:
                changed[name] = words
    new = phase not in (None, phases[-1].name)
    if new and phase in [earlier.name for earlier in phases]:
        raise ValueError(
            f"the phase {cut(phase)} of {out} is over, {phases[-1].name} came after it; choose another name"
        )
    if changed and not (new and changed.keys() <= {*PHASE_OPTIONS}):
        fix = "repeat what the run began with, or choose another --out"
        if changed.keys() <= {*PHASE_OPTIONS}:
            fix = "repeat what it was, or name a new phase by --phase NAME"
        raise ValueError(f"cannot resume: by {out / ARGS} {'; '.join([*changed.values()][:3])}; {fix}")
    if versions:
        say(f"other versions than at the start: {'; '.join(versions)}: the last digits may differ")
    return phases


def phases_from(phases: list[Phase], name: str | None, first_step: int, steps: int) -> list[Phase]:
    """The phases of a run that goes on at `first_step`: those before, and one to `steps`, new or the last one's rest.

    Raises ValueError when a new phase has no step.
    """
    *earlier, last = phases
    if name in (None, last.name):
        # An older checkpoint than the one that the phase began with, because that is damaged.
        return [*earlier, last._replace(first_step=min(last.first_step, first_step))]
    if steps <= first_step:
        raise ValueError(f"{first_step} steps are done; the phase {cut(name)} needs --steps above that, the last step")
    return [*earlier, last._replace(last_step=first_step), Phase(name, first_step, steps)]


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
