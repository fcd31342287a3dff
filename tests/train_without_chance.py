"""train.py for tests of real processes.

KILL_AT_SAVE=N in the environment: SIGKILL in the middle of the N-th file of a checkpoint.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from tqdm_seg.program import parse, run
from tqdm_seg.train import train
from tqdm_seg.training import checkpoint as checkpoint_tqdm
from tqdm_seg.training.options import TrainOptions


def save_or_die(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Saves, or dies over a half-written file."""
    saved.append(path)
    if len(saved) == int(os.environ.get("KILL_AT_SAVE", 0)):
        path.write_bytes(b"half of a checkpoint")
        os.kill(os.getpid(), signal.SIGKILL)
    original(tensors, path)


saved: list[Path] = []
original, checkpoint_tqdm.save_file = checkpoint_tqdm.save_file, save_or_die
options = parse(TrainOptions, "", sys.argv[1:])


def work() -> None:
    """Trains, and says how."""
    results = train.__wrapped__(options)
    print(f"processes: {PartialState().num_processes}, results: {bool(results)}")


sys.exit(run(work))
