"""What is each part of tqdm worth? Models trained without it, on the same frames and from the same seeds."""

import sys

from .commands import start

if __name__ == "__main__":
    sys.exit(start("ablate"))


import json
import statistics
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from tqdm_seg.train import train

from .data.files import claim_folder, example, read_json, write_file
from .data.frames import FrameDataset, frame_loader
from .data.sources.folder import prepare_folder
from .deploy.folder import load_model
from .evaluation.evaluate import score_frames
from .evaluation.figures import mean_over
from .program import takes
from .training.build import open_data
from .training.options import AblateOptions, TrainOptions

VARIANTS: dict[str, dict[str, Any]] = {
    "full model": {},
    "without text-to-pixel attention": {"no_text_attention": True},
    "random queries instead of class texts": {
        "random_queries": True, "textual_weight": 0.0, "class_vectors": None, "centre_class_vectors": False,
    },
    "without the textual regulariser": {"textual_weight": 0.0},
    "without the visual regulariser": {"visual_weight": 0.0},
    "without the score-map regulariser": {"score_map_weight": 0.0},
}  # fmt: skip


@takes(AblateOptions)
def ablate(options: AblateOptions) -> dict[str, dict[str, list[float]]]:
    """Trains what is missing and writes the table; returns the mIoU per variant, domain and seed."""
    open_data(TrainOptions(**options.of_run()))  # raises before anything is written
    claim_folder(options.out, "ablate")
    unseen = unseen_frames(options.out)
    scored: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for variant, changes in VARIANTS.items():
        columns = scored.setdefault(variant, {"held_back": [], "unseen": []})
        for seed in options.seeds:
            folder = options.out / f"{variant.replace(' ', '_')}_{seed}"
            if not (folder / "results.json").is_file():
                train(**options.of_run(out=folder, seed=seed, overlays=0, tracker="none", resume=True, **changes))
            columns["held_back"].append(read_json(folder / "results.json", ["miou", "miou_classes", "iou"]))
            columns["unseen"].append(score_unseen(folder / "model", unseen))
    figures = {
        variant: {domain: [found["miou"] for found in results] for domain, results in columns.items()}
        for variant, columns in scored.items()
    }
    write_file(options.out / "ablation.json", (json.dumps(figures, indent=1) + "\n").encode())
    write_file(options.out / "ablation.md", table(scored).encode())
    print(table(scored))
    return figures


def unseen_frames(out: Path) -> FrameDataset:
    """The five dashcam frames, prepared."""
    comma, folder = example("comma10k"), out / "comma10k"
    prepare_folder(root=comma / "images", masks=comma / "masks", out=folder, class_file=comma / "classes.csv")
    return FrameDataset(str(folder), "test")


def score_unseen(model_folder: Path, frames: FrameDataset) -> dict[str, Any]:
    """Scores on the unseen domain; images get the side that the model was trained at, with sliding windows."""
    model, processor = load_model(model_folder)
    processor.do_resize, processor.size = True, {"shortest_edge": 224, "longest_edge": 448}
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    loader = frame_loader(frames, 0)
    return score_frames(model.to(accelerator.device), processor, loader, frames.label_map, accelerator)


def table(scored: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """Markdown: mean over the seeds, and range where there are several; the head says over how many classes."""
    over = [
        mean_over([found for columns in scored.values() for found in columns[domain]])
        for domain in ("held_back", "unseen")
    ]
    lines = [f"| variant | held back, same drive ({over[0]}) | unseen domain ({over[1]}) |", "|---|---:|---:|"]
    for variant, columns in scored.items():
        means = [[100 * found["miou"] for found in results] for results in columns.values()]
        cells = [f"{statistics.mean(values):.1f}" for values in means]
        if max(map(len, means)) > 1:
            ranges = [f" ({min(values):.1f} to {max(values):.1f})" for values in means]
            cells = [mean + span for mean, span in zip(cells, ranges, strict=True)]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
