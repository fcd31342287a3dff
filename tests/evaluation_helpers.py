"""A micro model that tells classes apart by brightness, and miniature sets, for the tests of evaluation and report."""

from pathlib import Path

import numpy as np
import torch
from conftest import micro_model
from shard_helpers import call, orfd, prepare, save

from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

CLASSES = ["road", "traffic light", "sky"]
OFFROAD = ["non-traversable", "traversable"]
SIZE = (40, 48)


def blocks(seed: int) -> np.ndarray:
    """An image (40, 48, 3) uint8 of grey blocks, as bright as chance has it."""
    levels = np.random.default_rng(seed).integers(0, 256, (5, 6, 1))
    return levels.repeat(8, 0).repeat(8, 1).repeat(3, 2).astype(np.uint8)


def model_of(folder: Path, classes: list[str], processor: TqdmImageProcessor | None = None, train: bool = True) -> Path:
    """A model folder, trained until it finds every class in `blocks`: without, it finds one class everywhere."""
    model = micro_model(id2label=dict(enumerate(classes)))
    if train:
        train_on_brightness(model)
    model.save_pretrained(folder)
    (processor or TqdmImageProcessor()).save_pretrained(folder)
    return folder


def train_on_brightness(model: TqdmForSemanticSegmentation) -> None:
    """Teaches dark, ..., bright as the classes 0, ..., K - 1 until each is seen in 3 % of some images."""
    optimizer, generator, number = (
        torch.optim.AdamW(model.parameters(), lr=5e-3),
        torch.Generator(),
        len(model.config.id2label),
    )
    images = TqdmImageProcessor()(images=[blocks(seed) for seed in range(8)], return_tensors="pt")["pixel_values"]
    for step in range(300):
        if step % 10 == 0:
            ids = model.eval().segment(images).argmax(1)
            if torch.bincount(ids.flatten(), minlength=number).min() > 0.03 * ids.numel():
                return
        labels = torch.randint(number, (2, 2, 2), generator=generator.manual_seed(step))
        labels = labels.repeat_interleave(16, 1).repeat_interleave(16, 2)
        pixels = torch.randn(2, 3, 32, 32, generator=generator) / 2 + (labels[:, None] - (number - 1) / 2) * 1.5
        torch.manual_seed(step)  # the mask losses draw points
        model.train()(pixels, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError("the micro model does not learn")


def roads(root: Path) -> Path:
    """Five frames of two scenes; no sky in the ground truth, an ignored corner, one frame without labels."""
    for number, (scene, name) in enumerate([("a", "0"), ("a", "1"), ("a", "2"), ("b", "3"), ("b", "4")]):
        labels = np.zeros(SIZE, np.uint8)
        labels[10 + 4 * number :] = 1
        labels[:8, :8] = 255
        labels[:] = 255 if name == "4" else labels
        save(root / "images" / "val" / scene / f"{name}.png", blocks(number))
        save(root / "masks" / "val" / scene / f"{name}.png", labels)
    return prepared_folder(root, "roads")


def prepared_folder(root: Path, name: str) -> Path:
    """The set of this name made of root/images and root/masks, with `CLASSES`."""
    (root / "classes.txt").write_text("\n".join(CLASSES))
    options = ("--class-file", root / "classes.txt", "--name", name)
    prepare("folder", root / "images", root / name, root / "masks", *options)
    return root / name


def offroad_frames(root: Path, frames: tuple[int, int] = (16, 8)) -> Path:
    """Frames of two scenes in the ORFD layout."""
    for scene, count in zip(("y0613_1242", "y0614_0900"), frames, strict=True):
        orfd(root / "raw", count, scene, "validation", size=40)
    for number, path in enumerate(sorted((root / "raw").rglob("image_data/*.png"))):
        save(path, blocks(number)[:, :40])
    prepare("orfd", root / "raw", root / "shards")
    return root / "shards"


def run(model: Path, source: str, out: Path, *more: str) -> dict:
    """Evaluates one set in this process."""
    return call("evaluate", model, "--data", source, "--out", out, "--workers", 0, *more)
