"""What surrounds the training loop: recent losses, SIGTERM, log and trackers."""

import json
import math
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.files import named_when_full, write_file
from .options import TrainOptions
from .plan import Phase


class RecentLosses:
    """Losses by name since the last log line; they stay on the device, so that no step waits for their values."""

    def __init__(self):
        self.rows: list[tuple[int, list[str], Tensor]] = []
        self.names: list[str] = []

    def add(self, step: int, keys: list[str], losses: dict[str, Tensor]) -> None:
        """Remembers the scalar losses of one batch, and the keys of its images."""
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
                write_file(out / "not_finite.json", (json.dumps(content, indent=1) + "\n").encode())
                raise FloatingPointError(
                    f"{', '.join(broken)} not finite at step {step}, images {', '.join(keys)} (see "
                    f"{out / 'not_finite.json'}); look at these images and their labels, lower --lr, set --clip-norm, "
                    "or use --precision fp32. Nothing was saved since"
                )
        self.rows.clear()
        means = accelerator.reduce(values.mean(0), "mean").tolist()
        return {"loss": sum(means), **dict(zip(self.names, means, strict=True))}


class StopSignal:
    """Remembers SIGTERM, which schedulers send before they take a machine away."""

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
        """Whether all processes stop; several ask each other only where they synchronise anyway."""
        if accelerator.num_processes == 1:
            return self.came
        if not waits_anyway:
            return False
        return bool(accelerator.reduce(torch.tensor(float(self.came), device=accelerator.device)) > 0)


def read_log(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a log.jsonl, and how many were no line of a log: a kill or a full disk may tear the last one."""
    lines, torn = [], 0
    for text in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
            lines.append(line | {"step": int(line["step"])})
        except (ValueError, TypeError, KeyError):
            torn += 1
    return lines, torn


def append_line(path: Path, text: str) -> None:
    """Adds a line to a file; when that fails, such as on a full disk, the file is as before."""
    with named_when_full(path), path.open("ab", buffering=0) as file:
        size, left = file.seek(0, os.SEEK_END), memoryview(f"{text}\n".encode())
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(size)
            raise


class Log:
    """log.jsonl and the tracker, written by the first process."""

    def __init__(self, accelerator: Accelerator, options: TrainOptions, first_step: int, phases: Sequence[Phase] = ()):
        self.accelerator, self.path = accelerator, options.out / "log.jsonl"
        if accelerator.is_main_process:
            lines, torn = read_log(self.path)
            if torn:
                print(f"{self.path}: {torn} torn line(s) left out; the steps since the last checkpoint are repeated")
            # Later steps are repeated, and so is the last evaluation, which follows the last checkpoint.
            kept = [
                line for line in lines
                if line["step"] <= first_step and not ("miou" in line and line["step"] == options.steps)
            ]  # fmt: skip
            named = {line.get("phase") for line in kept}
            kept += [
                {"step": p.first_step, "phase": p.name, "last_step": p.last_step} for p in phases if p.name not in named
            ]
            write_file(self.path, "".join(f"{json.dumps(line)}\n" for line in kept).encode())
        simple = {name: v if isinstance(v, int | float | str) else str(v) for name, v in vars(options).items()}
        accelerator.init_trackers("tqdm", config=simple)

    def write(self, step: int, **values: float | None) -> None:
        """One line."""
        if self.accelerator.is_main_process:
            append_line(self.path, json.dumps({"step": step, **values}))
        self.accelerator.log({name: value for name, value in values.items() if value is not None}, step=step)

    def images(self, step: int, drawings: dict[str, np.ndarray]) -> None:
        """Sends images (H, W, 3) by name to the trackers that show images."""
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: image[None] for name, image in drawings.items()}, step, **layout)
