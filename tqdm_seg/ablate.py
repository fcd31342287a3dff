"""What each part of tqdm is worth: models trained without it, on the same frames and from the same seeds.

    python ablate.py [--out runs/ablation] [--seeds 0 1 2] [-- OPTIONS OF train.py]

By default on the frames in examples/, from random weights: 56 frames of one off-road drive to train on, 24 later ones
of the same drive held back, and five dashcam frames of another continent as a domain never seen. Writes a table of mIoU
in Markdown, per variant the mean over the seeds and its range, to OUT/ablation.md, and all figures to
OUT/ablation.json. Runs that are finished are kept, so that it goes on where it was stopped.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from tqdm_seg.data.files import run, write_whole
from tqdm_seg.data.frames import FrameDataset, frame_loader
from tqdm_seg.evaluation.evaluate import score_frames
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation
from tqdm_seg.train import main as train

ROOT = Path(__file__).parent
VARIANTS = {
    "all of it": [],
    "without text-to-pixel attention": ["--no-text-attention"],
    "random queries instead of class texts": ["--random-queries", "--textual-weight", "0"],
    "without the textual regulariser": ["--textual-weight", "0"],
    "without the visual regulariser": ["--visual-weight", "0"],
    "without the score-map regulariser": ["--score-map-weight", "0"],
}


def unseen_frames(out: Path) -> FrameDataset:
    """The five dashcam frames, prepared."""
    comma, folder = ROOT / "examples" / "comma10k", out / "comma10k"
    command = [
        sys.executable,
        ROOT / "dataset_scripts" / "prepare_folder.py",
        comma / "images",
        comma / "masks",
        folder,
    ]
    subprocess.run([*command, "--classes", comma / "classes.csv"], check=True)
    return FrameDataset(str(folder), "test")


def score_unseen(model_folder: Path, frames: FrameDataset) -> float:
    """mIoU on the unseen domain, pictures fitted into the side that the model was trained at, and slid over."""
    model = TqdmForSemanticSegmentation.from_pretrained(model_folder).eval()
    processor = TqdmImageProcessor.from_pretrained(model_folder)
    processor.do_resize, processor.size = True, {"shortest_edge": 224, "longest_edge": 448}
    cpu = Accelerator(cpu=not torch.accelerator.is_available())
    return score_frames(model.to(cpu.device), processor, frame_loader(frames, 0), frames.label_map, cpu)["miou"]


def table(figures: dict[str, dict[str, list[float]]]) -> str:
    """Markdown: mean over the seeds, and range where there are several."""
    lines = ["| variant | held back, same drive | unseen domain |", "|---|---:|---:|"]
    for variant, columns in figures.items():
        cells = [f"{100 * statistics.mean(values):.1f}" for values in columns.values()]
        if max(map(len, columns.values())) > 1:
            ranges = [f" ({100 * min(values):.1f} to {100 * max(values):.1f})" for values in columns.values()]
            cells = [mean + span for mean, span in zip(cells, ranges, strict=True)]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder of the runs (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each (default: %(default)s)")
    parser.add_argument("options", nargs="*", help="further options of train.py, behind --")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Trains what is missing and writes the table."""
    args = make_parser().parse_args(argv)
    unseen = unseen_frames(args.out)
    figures: dict[str, dict[str, list[float]]] = {}
    for variant, changes in VARIANTS.items():
        columns = figures.setdefault(variant, {"held_back": [], "unseen": []})
        for seed in args.seeds:
            folder = args.out / f"{variant.replace(' ', '_')}_{seed}"
            if not (folder / "results.json").is_file():
                options = [
                    "--out",
                    str(folder),
                    "--seed",
                    str(seed),
                    "--overlays",
                    "0",
                    "--tracker",
                    "none",
                    "--resume",
                ]
                train([*options, *changes, *args.options])
            columns["held_back"].append(json.loads((folder / "results.json").read_text(encoding="utf-8"))["miou"])
            columns["unseen"].append(score_unseen(folder / "model", unseen))
    write_whole(args.out / "ablation.json", (json.dumps(figures, indent=1) + "\n").encode())
    write_whole(args.out / "ablation.md", table(figures).encode())
    print(table(figures))


if __name__ == "__main__":
    run(main)
