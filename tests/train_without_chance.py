"""train.py with the random points of the mask losses on a fixed grid, for tests that compare runs of other processes.

KILL_AT_SAVE=N in the environment: SIGKILL in the middle of the N-th file of a checkpoint.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from tqdm_seg import modeling_tqdm
from tqdm_seg.program import parse, run
from tqdm_seg.train import train
from tqdm_seg.training import checkpoint as checkpoint_tqdm
from tqdm_seg.training.options import TrainOptions


def grid(mask_logits: torch.Tensor, extent: torch.Tensor, num_points: int, *_: float) -> torch.Tensor:
    """Points (L, M, P, 2) in rows and columns, the same for every mask."""
    side = int(num_points**0.5)
    centres = (torch.arange(side) + 0.5) / side
    points = torch.stack(torch.meshgrid(centres, centres, indexing="ij"), -1).flatten(0, 1)
    return points.expand(*mask_logits.shape[:2], -1, -1)


def save_or_die(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Saves, or dies over a half-written file."""
    saved.append(path)
    if len(saved) == int(os.environ.get("KILL_AT_SAVE", 0)):
        path.write_bytes(b"half of a checkpoint")
        os.kill(os.getpid(), signal.SIGKILL)
    original(tensors, path)


saved: list[Path] = []
original, checkpoint_tqdm.save_file = checkpoint_tqdm.save_file, save_or_die
modeling_tqdm.choose_points = grid
options = parse(TrainOptions, "", sys.argv[1:])


def work() -> None:
    """Trains, and says how."""
    results = train.__wrapped__(options)
    print(f"processes: {PartialState().num_processes}, results: {bool(results)}")


sys.exit(run(work))
