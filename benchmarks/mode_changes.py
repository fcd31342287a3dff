"""What the faster modes change: on the parity packs, and on the model that the quick start trains.

    python benchmarks/mode_changes.py [--model runs/quickstart/model] [--out benchmarks/results]

On the packs, small models with random weights and known outputs: largest difference from the published scores, share of
pixels with another class. On the trained model: mIoU on the 24 held-back frames of examples/orfd_mini (224x224, one
window each), and the share of pixels with another class than in plain float32, in the eight larger example images
(three of the drive it was trained on, 1280x720, five of another domain, 1164x874).
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import numpy as np
import torch
from measure import RESULTS, Settings, main, markdown_table, run_facts
from parity import PACKS, Pack
from PIL import Image

from tqdm_seg.data.frames import FrameDataset
from tqdm_seg.data.label_maps import IGNORE_INDEX
from tqdm_seg.deploy.folder import load_model
from tqdm_seg.deploy.speed import ready_to_predict
from tqdm_seg.evaluation.metrics import confusion_matrix, scores
from tqdm_seg.evaluation.protocol import Protocol, predict
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation
from tqdm_seg.program import option

ROOT = Path(__file__).parents[1]
Change = Callable[[TqdmForSemanticSegmentation], object]
IMAGES = ("examples/frames/validation/*/image_data/*.png", "examples/comma10k/images/test/*.png")


def without_overlap(model: TqdmForSemanticSegmentation) -> None:
    """The stride becomes the window."""
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
HEADER = [
    "mode", "packs: largest difference of a score", "packs: pixels of another class", "trained model: mIoU",
    "trained model: pixels of another class",
]  # fmt: skip


@dataclass(kw_only=True)
class ModeSettings:
    """Options."""

    model: Path = option(ROOT / "runs" / "quickstart" / "model", help="(default: %(default)s)")
    only: tuple[str, ...] = option(tuple(MODES), nargs="+", choices=list(MODES), help="modes (default: all)")
    out: Path = option(RESULTS, help="for mode_changes.json and .md (default: %(default)s)")


@torch.inference_mode()
def changes_on_packs(change: Change) -> dict[str, float]:
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


def class_ids(model: TqdmForSemanticSegmentation, processor: TqdmImageProcessor, image: np.ndarray) -> torch.Tensor:
    """Class ids of an image (H, W, 3) at its own size."""
    return predict(model, processor, Protocol().views(image, processor), image.shape[:2], Protocol())


def held_back_score(model: TqdmForSemanticSegmentation, processor: TqdmImageProcessor) -> float:
    """mIoU on the held-back frames of the quick start."""
    classes = model.config.num_labels
    matrix = torch.zeros(classes, classes + 1, dtype=torch.int64)
    for frame in FrameDataset(str(ROOT / "examples" / "orfd_mini"), "validation"):
        ids = class_ids(model, processor, frame.image)
        matrix += confusion_matrix(ids, torch.tensor(frame.labels), classes, IGNORE_INDEX)
    return scores(matrix, model.config.class_names)["miou"]


def row_cells(row: dict[str, Any]) -> list[str]:
    """A mode in the table."""
    pack = [f"{row['pack_difference']:.1e}", f"{row['pack_pixels_changed']:.3%}"]
    return [row["mode"], *pack, f"{row['miou']:.2%}", f"{row['pixels_changed']:.3%}"]


def measure_modes(settings: ModeSettings) -> None:
    """Measures every mode, prints and writes the table; the first mode is what the others are compared with."""
    rows, plain = [], None
    paths = [path for pattern in IMAGES for path in sorted(ROOT.glob(pattern))]
    for name in settings.only:
        model, processor = load_model(settings.model)
        MODES[name](model)
        labels = [class_ids(model, processor, np.asarray(Image.open(path).convert("RGB"))) for path in paths]
        plain = plain or labels
        changed = sum(int((ours != first).sum()) for ours, first in zip(labels, plain, strict=True))
        rows.append({
            "mode": name, **changes_on_packs(MODES[name]), "miou": held_back_score(model, processor),
            "pixels_changed": changed / sum(ids.numel() for ids in plain),
        })  # fmt: skip
        print(" | ".join(row_cells(rows[-1])), flush=True)
    settings.out.mkdir(parents=True, exist_ok=True)
    content = {"facts": run_facts(Settings(device="cpu")), "rows": rows}
    (settings.out / "mode_changes.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    page = f"# What the faster modes change\n\n{markdown_table(HEADER, [row_cells(row) for row in rows])}\n"
    (settings.out / "mode_changes.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(measure_modes, ModeSettings, __doc__)
