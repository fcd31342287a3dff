"""What the experiments share: they prepare what is missing in the folder they are started in, then train and test.

    DOWNLOADS (downloads/)   ycor, rugd: the original downloads, or PART/images next to PART/masks; orfd_224: the latter
    DATA (data/)             prepared datasets
    runs/                    trainings, per-frame tables, figures

Further words go to `tqdm-seg ablate`: --dry-run says what would be done, --seeds 0 does less.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RAW, DATA = (Path(os.environ.get(name, name.lower())) for name in ("DOWNLOADS", "DATA"))
SEEDS = ["--seeds", "0", "1", "2"]


def ycor(choice: str) -> list[str]:
    """Prepares YCOR under one of its maps."""
    return ["prepare", "ycor", str(RAW / "ycor"), "--map", choice, "--out", str(DATA / f"ycor_{choice}")]


def rugd(choice: str) -> list[str]:
    """Prepares RUGD under one of its maps."""
    return ["prepare", "rugd", str(RAW / "rugd"), "--map", choice, "--out", str(DATA / f"rugd_{choice}")]


def orfd(*more: str, parts: tuple[str, str] = ("", ""), name: str = "orfd_224") -> list[str]:
    """Prepares the 359 ORFD frames of one drive as scenes of 4 seconds; parts: below the folder, images and masks."""
    folders = [str(RAW / "orfd_224" / part) for part in parts]
    fixed = ["--class-file", str(HERE / "orfd_classes.txt"), "--scene-seconds", "4", "--name", "ORFD-224"]
    return ["prepare", "folder", *folders, *fixed, *more, "--out", str(DATA / name)]


def main(preparation: list[list[str]], ablations: list[list[str]], more: list[str]) -> int:
    """Runs what is not done yet, stops at the first failure; the exit status."""
    try:
        from tqdm_seg.cli import main as run
    except ImportError:  # a checkout that is not installed
        sys.path.insert(0, str(HERE.parent))
        from tqdm_seg.cli import main as run
    dry, missing = "--dry-run" in more, False
    for command in preparation:
        if (Path(command[-1]) / "manifest.json").is_file():
            continue
        missing = True
        if dry:
            print("to do first: tqdm-seg", *command)
        elif status := run(command):
            return status
    for command in ablations:
        line = ["ablate", *command, *more]
        if dry and missing:
            print("then: tqdm-seg", *line)
        elif status := run(line):
            return status
    return 0
