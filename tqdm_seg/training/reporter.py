"""Evaluation during and after training: scores, drawings, the best model and the last one."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

from ..data.files import replace_folder, write_file
from ..data.frames import FrameDataset, PlainRows, frame_loader
from ..deploy.folder import push_folder, save_model_folder
from ..evaluation.evaluate import score_frames
from .build import unsharded
from .card import model_card
from .log import Log
from .options import TrainOptions
from .overlays import draw_frames


@dataclass
class Reporter:
    """Evaluates during and after training, keeps the best model and writes the last one.

    trained: the model as it is trained, or its average.
    """

    options: TrainOptions
    accelerator: Accelerator
    trained: TqdmForSemanticSegmentation
    processor: TqdmImageProcessor
    training: FrameDataset | PlainRows
    validation: FrameDataset | PlainRows
    log: Log
    whole: TqdmForSemanticSegmentation = field(init=False)  # `trained`, gathered if it is sharded

    def evaluate(self, step: int) -> None:
        """During a run: logs the score, shows some frames, keeps the model if it is the best so far."""
        mode = self.trained.training
        results = self.score()
        self.log.write(step, miou=results["miou"])
        if self.accelerator.is_main_process:
            self.log.images(step, {name: np.asarray(drawing) for name, drawing in self.drawings(results)})
            best, kept = self.options.out / "best", -1.0
            if (best / "results.json").is_file():
                kept = json.loads((best / "results.json").read_text(encoding="utf-8"))["miou"] or kept
            if (results["miou"] or 0) > kept:
                self.write_model(best, results | {"step": step})
        self.whole.train(mode)
        self.accelerator.wait_for_everyone()

    def finish(self) -> dict[str, object]:
        """In the end: results.json, model folder, overlays, and the push if one was asked for."""
        out, results = self.options.out, self.score()
        if self.accelerator.is_main_process:
            write_file(out / "results.json", (json.dumps(results, indent=2) + "\n").encode())
            self.write_model(out / "model", results)
            with replace_folder(out / "overlays", "train") as folder:
                for name, drawing in self.drawings(results):
                    drawing.save(folder / f"{name}.png")
            frames = results["protocol"]["frames"]
            print(f"mIoU {results['miou']} on {frames} held-back frames; model, results, overlays: {out}")
            if self.options.push_to_hub:
                print(push_folder(out / "model", self.options.push_to_hub))
        return results

    def score(self) -> dict[str, object]:
        """Results of the held-back frames, each of which one process scores."""
        self.whole = unsharded(self.accelerator, self.trained)
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        frames = frame_loader(self.validation, self.options.workers, process, processes)
        return score_frames(self.whole, self.processor, frames, self.validation.label_map, self.accelerator)

    def write_model(self, folder: Path, results: dict[str, object]) -> None:
        """Model folder with its card and results.json."""
        card = model_card(self.options, self.whole, results, self.training, self.validation)
        files = {"README.md": card, "results.json": json.dumps(results, indent=2) + "\n"}
        net = self.whole
        if self.options.vision == "lora":
            from .lora import without_adapters

            net = without_adapters(net)
        save_model_folder(net, self.processor, folder, files)

    def drawings(self, results: dict[str, object]) -> list[tuple[str, Image.Image]]:
        """Names and drawings of some frames with ground truth and prediction."""
        count = results["protocol"]["frames"]
        return list(draw_frames(self.whole, self.processor, self.validation, self.options.overlays, count))
