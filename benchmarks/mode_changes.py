"""What the faster modes change: on the parity packs, and on the model that the quick start trains.

    python benchmarks/mode_changes.py [--model runs/quickstart/model] [--out benchmarks/results]

On the packs, small models with random weights and known outputs: largest difference from the published scores, share of
pixels with another class. On the trained model: mIoU on the 24 held-back frames of examples/orfd_mini (224x224, one
window each), and the share of pixels with another class than in plain float32, in the eight larger example images
(three of the drive it was trained on, 1280x720, five of another domain, 1164x874).
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import numpy as np
import torch
from inference_speed import make_ready
from measure import RESULTS, Settings, main, markdown_table, run_facts, write_pair
from parity import PACKS, Pack
from PIL import Image

from tqdm_seg.data.frames import FrameDataset
from tqdm_seg.deploy.folder import load_model
from tqdm_seg.evaluation.evaluate import count_frames
from tqdm_seg.evaluation.metrics import scores
from tqdm_seg.evaluation.protocol import Protocol, predict
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation
from tqdm_seg.program import option

ROOT = Path(__file__).parents[1]
IMAGES = ("examples/frames/validation/*/image_data/*.png", "examples/comma10k/images/test/*.png")
MODES = {  # variants of inference_speed.py
    "float32, as loaded": "ours-plain",
    "float32, texts stored, layers folded": "ours-exact",
    "bfloat16": "ours-bf16",
    "int8 (vision tower)": "ours-int8",
    "windows without overlap": "ours-no-overlap",
    "whole images": "ours-whole-image",
}
COLUMNS = {
    "pack_difference": ("packs: largest difference of a score", ".1e"),
    "pack_pixels_changed": ("packs: pixels of another class", ".3%"),
    "miou": ("trained model: mIoU", ".2%"),
    "pixels_changed": ("trained model: pixels of another class", ".3%"),
}


@dataclass(kw_only=True)
class ModeSettings:
    """Options."""

    model: Path = option(ROOT / "runs" / "quickstart" / "model", help="trained by the quick start")
    only: tuple[str, ...] = option(tuple(MODES), nargs="+", choices=list(MODES), help="modes (default: all)")
    out: Path = option(RESULTS, help="for mode_changes.json and .md")


@torch.inference_mode()
def changes_on_packs(variant: str) -> dict[str, float]:
    """Over all packs: largest difference from the published scores, share of pixels with another class than before."""
    difference, changed, pixels = 0.0, 0, 0
    for folder in sorted(path.parent for path in PACKS.glob("*/config.json")):
        pack = Pack(folder)
        model, image = pack.model(), pack.golden["eval_native/image"]
        before = model.segment_labels(image)
        make_ready(model, variant)
        ours = model.segment(image.to(model.dtype))
        difference = max(difference, pack.compare("eval_native/semantic", ours, 0.0).absolute)
        changed += (ours.argmax(1) != before).sum().item()
        pixels += before.numel()
    return {"pack_difference": difference, "pack_pixels_changed": changed / pixels}


def class_ids(model: TqdmForSemanticSegmentation, processor: TqdmImageProcessor, path: Path) -> torch.Tensor:
    """Class ids of an image at its own size."""
    image = np.asarray(Image.open(path).convert("RGB"))
    return predict(model, processor, Protocol().views(image, processor), image.shape[:2], Protocol(), str(path))


def row_cells(row: dict[str, Any]) -> list[str]:
    """A mode in the table."""
    return [row["mode"], *(format(row[key], form) for key, (_, form) in COLUMNS.items())]


def measure_modes(settings: ModeSettings) -> None:
    """Measures every mode, prints and writes the table; the first mode is what the others are compared with."""
    rows, plain = [], None
    held_back = FrameDataset(str(ROOT / "examples" / "orfd_mini"), "validation")
    paths = [path for pattern in IMAGES for path in sorted(ROOT.glob(pattern))]
    for name in settings.only:
        variant, (model, processor) = MODES[name], load_model(settings.model)
        make_ready(model, variant)
        labels = [class_ids(model, processor, path) for path in paths]
        plain = plain or labels
        changed = sum(int((ours != first).sum()) for ours, first in zip(labels, plain, strict=True))
        matrix, _ = count_frames(model, processor, held_back)
        rows.append({
            "mode": name, **changes_on_packs(variant), "miou": scores(matrix, model.config.class_names)["miou"],
            "pixels_changed": changed / sum(ids.numel() for ids in plain),
        })  # fmt: skip
        print(" | ".join(row_cells(rows[-1])), flush=True)
    header = ["mode", *(title for title, _ in COLUMNS.values())]
    page = f"# What the faster modes change\n\n{markdown_table(header, [row_cells(row) for row in rows])}\n"
    write_pair(settings.out, "mode_changes", {"facts": run_facts(Settings(device="cpu")), "rows": rows}, page)


if __name__ == "__main__":
    main(measure_modes, ModeSettings, __doc__)
