"""Draws examples/quickstart.png: python examples/draw_quickstart.py runs/quickstart/model

The held-back frame whose mIoU is closest to that of all 24: image, ground truth, prediction, at the camera's 16:9.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont

from tqdm_seg.data.frames import FrameDataset
from tqdm_seg.data.palette import legend, tint
from tqdm_seg.evaluation.evaluate import predict_frame, score_frames
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

FOLDER = Path(__file__).parent
PANEL, GAP, TITLE = (416, 234), 10, 30


def main(model_folder: str) -> None:
    """Writes the image and prints the metrics behind it."""
    model = TqdmForSemanticSegmentation.from_pretrained(model_folder).eval()
    processor = TqdmImageProcessor.from_pretrained(model_folder)
    frames = FrameDataset(str(FOLDER / "orfd_mini"), "validation")
    held_back = [frames[i] for i in range(len(frames))]

    def miou(some: list) -> float:
        return score_frames(model, processor, some, frames.label_map, Accelerator(cpu=True))["miou"]

    with torch.inference_mode():
        total, each = miou(held_back), [miou([frame]) for frame in held_back]
        frame = min(zip(each, held_back, strict=True), key=lambda pair: abs(pair[0] - total))[1]
        ids = predict_frame(model, processor, frame)[0].numpy()
    image = Image.fromarray(frame.image).resize(PANEL, Image.Resampling.BICUBIC)
    panels = {"image": image, "ground truth": tint(image, frame.labels, 2), "prediction": tint(image, ids, 2)}
    names = legend(model.config.id2label, 3 * PANEL[0] + 4 * GAP)
    canvas = Image.new("RGB", (names.width, TITLE + PANEL[1] + names.height), "white")
    for i, (title, panel) in enumerate(panels.items()):
        place = GAP + i * (PANEL[0] + GAP)
        ImageDraw.Draw(canvas).text((place, TITLE / 2), title, "black", ImageFont.load_default(16), anchor="lm")
        canvas.paste(panel, (place, TITLE))
    canvas.paste(names, (0, TITLE + PANEL[1]))
    canvas.save(FOLDER / "quickstart.png")
    print(f"mIoU {100 * total:.2f} % of {len(each)} frames, this one {100 * miou([frame]):.2f} %: {frame.key}")


if __name__ == "__main__":
    main(*sys.argv[1:])
