"""What the faster modes change: on the parity packs, and on the model that the quick start trains.

    python benchmarks/mode_changes.py [--model runs/quickstart/model] [--out benchmarks/results]

On the packs, small models with random weights and known outputs: largest difference from the published scores, and how
many pixels get another class. On the trained model: mIoU on the 24 held-back frames of examples/orfd_mini (224x224, one
window each), and how many pixels of the eight larger example pictures (three of the drive it was trained on, 1280x720,
five of another domain, 1164x874) get another class than in float32 with the model's own windows.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import numpy as np
import torch
from measure import RESULTS, Settings, run_facts
from parity import PACKS, Pack
from PIL import Image

from tqdm_seg.data.files import write_whole
from tqdm_seg.data.frames import FrameDataset
from tqdm_seg.data.label_maps import IGNORE_INDEX
from tqdm_seg.deploy.folder import load_model
from tqdm_seg.deploy.speed import ready_to_predict
from tqdm_seg.evaluation.metrics import confusion_matrix, scores
from tqdm_seg.evaluation.protocol import Protocol, predict
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

ROOT = Path(__file__).parents[1]
Change = Callable[[TqdmForSemanticSegmentation], object]
PICTURES = ("examples/frames/validation/*/image_data/*.png", "examples/comma10k/images/test/*.png")


def without_overlap(model: TqdmForSemanticSegmentation) -> None:
    """Windows side by side: the stride becomes the window."""
    ready_to_predict(model)
    model.config.window_stride = model.config.window_size


def whole_images(model: TqdmForSemanticSegmentation) -> None:
    """No windows."""
    ready_to_predict(model)
    model.config.window_size = None


MODES: dict[str, Change] = {
    "float32, as loaded": lambda model: None,
    "float32, texts stored, layers folded": ready_to_predict,
    "bfloat16": lambda model: ready_to_predict(model, "bf16"),
    "int8 (vision tower)": lambda model: ready_to_predict(model, "int8"),
    "windows without overlap": without_overlap,
    "whole images": whole_images,
}


@torch.inference_mode()
def on_packs(change: Change) -> dict[str, float]:
    """Over all packs: largest difference from the published scores, share of pixels with another class than before."""
    difference, changed, pixels = 0.0, 0, 0
    for folder in sorted(path.parent for path in PACKS.glob("*/config.json")):
        pack = Pack(folder)
        model, image = pack.model(), pack.golden["eval_native/image"]
        before = model.segment_labels(image)
        change(model)
        ours = model.segment(image.to(model.dtype))
        difference = max(difference, pack.compare("eval_native/semantic", ours, 0.0).absolute)
        changed += (ours.argmax(1) != before).sum().item()
        pixels += before.numel()
    return {"pack_difference": difference, "pack_pixels_changed": changed / pixels}


def held_back_score(model: TqdmForSemanticSegmentation, processor: TqdmImageProcessor) -> float:
    """mIoU on the held-back frames of the quick start."""
    classes = model.config.num_labels
    matrix = torch.zeros(classes, classes + 1, dtype=torch.int64)
    for frame in FrameDataset(str(ROOT / "examples" / "orfd_mini"), "validation"):
        views = Protocol().views(frame.image, processor)
        ids = predict(model, processor, views, frame.labels.shape, Protocol())
        matrix += confusion_matrix(ids, torch.tensor(frame.labels), classes, IGNORE_INDEX)
    return scores(matrix, model.config.class_names)["miou"]


def picture_labels(model: TqdmForSemanticSegmentation, processor: TqdmImageProcessor) -> list[np.ndarray]:
    """Class ids of every larger example picture, at its own size."""
    found = []
    for path in (path for pattern in PICTURES for path in sorted(ROOT.glob(pattern))):
        image = np.asarray(Image.open(path).convert("RGB"))
        views = Protocol().views(image, processor)
        found.append(predict(model, processor, views, image.shape[:2], Protocol()).numpy())
    return found


def measure_modes(folder: Path, modes: dict[str, Change]) -> list[dict[str, Any]]:
    """A row per mode, in their order; the first is what the others are held against."""
    rows, plain = [], None
    for name, change in modes.items():
        model, processor = load_model(folder)
        change(model)
        labels = picture_labels(model, processor)
        plain = plain or labels
        changed = sum(int((ours != first).sum()) for ours, first in zip(labels, plain, strict=True))
        rows.append({
            "mode": name, **on_packs(change), "miou": held_back_score(model, processor),
            "pixels_changed": changed / sum(ids.size for ids in plain),
        })  # fmt: skip
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| mode | packs: largest difference of a score | packs: pixels of another class | trained model: mIoU "
        "| trained model: pixels of another class |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['mode']} | {row['pack_difference']:.1e} | {row['pack_pixels_changed']:.3%} "
            f"| {row['miou']:.2%} | {row['pixels_changed']:.3%} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Measures every mode, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "quickstart" / "model", help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="for mode_changes.json and .md (%(default)s)")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES), help="(default: all)")
    args = parser.parse_args(argv)
    rows = measure_modes(args.model, {name: MODES[name] for name in args.modes})
    facts = run_facts(Settings(device="cpu"))
    args.out.mkdir(parents=True, exist_ok=True)
    write_whole(args.out / "mode_changes.json", (json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n").encode())
    write_whole(args.out / "mode_changes.md", f"# What the faster modes change\n\n{table(rows)}".encode())


if __name__ == "__main__":
    main()
