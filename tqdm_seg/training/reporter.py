"""Evaluation during and after training: scores, drawings, the best model and the last one."""

import json
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

from ..data.files import read_json, replace_folder, write_file
from ..data.frames import FrameDataset, PlainRows, frame_loader
from ..deploy.folder import push_folder, save_model_folder
from ..evaluation.evaluate import score_frames
from ..evaluation.figures import miou_text, percent
from .build import unsharded
from .card import evaluated_frames, model_card
from .log import Log
from .options import TrainOptions
from .overlays import draw_frames
from .plan import Phase
from .sets import FrameSets


@dataclass
class Reporter:
    """Evaluates during and after training, keeps the best model and writes the last one.

    trained: the model as it is trained, or its average.
    """

    options: TrainOptions
    accelerator: Accelerator
    trained: TqdmForSemanticSegmentation
    processor: TqdmImageProcessor
    training: FrameSets | PlainRows
    validation: FrameDataset | PlainRows
    log: Log
    phases: list[Phase]
    whole: TqdmForSemanticSegmentation = field(init=False)  # `trained`, gathered if it is sharded

    def evaluate(self, step: int) -> dict[str, Any]:
        """Logs the score, shows some frames, keeps the model if it is the best so far; returns the results."""
        mode = self.trained.training
        results = self.score()
        self.log.write(step, miou=results["miou"], miou_classes=results["miou_classes"])
        if self.accelerator.is_main_process:
            if self.accelerator.trackers:
                self.log.images(
                    step, {name: np.asarray(drawing) for name, drawing in self.drawings(results, self.options.overlays)}
                )
            best, kept = self.options.out / "best", self.kept()
            # A best model of a later step is of the time before an interruption, and this run makes it again.
            if self.options.eval_every_steps and not (kept["step"] <= step and kept["miou"] >= (results["miou"] or 0)):
                self.write_model(best, results | {"step": step})
        self.whole.train(mode)
        self.accelerator.wait_for_everyone()
        return results

    def kept(self) -> dict[str, Any]:
        """ "miou" and "step" of the model in best/; -1 if there is none."""
        try:
            found = read_json(self.options.out / "best" / "results.json", {"miou": float | None, "step": int})
            return {"miou": found["miou"] or 0.0, "step": found["step"]}
        except (OSError, ValueError):
            return {"miou": -1.0, "step": -1}

    def finish(self) -> dict[str, object]:
        """In the end: the last evaluation, model folder, overlays, results.json, and the push if one was asked for.

        results.json comes last: a run that has it is whole.
        """
        out, results = self.options.out, self.evaluate(self.options.steps)
        if self.accelerator.is_main_process:
            self.write_model(out / "model", results)
            with replace_folder(out / "overlays", "train") as folder:
                for name, drawing in self.drawings(results, self.options.overlays):
                    drawing.save(folder / f"{name}.png")
            write_file(out / "results.json", (json.dumps(results, indent=2) + "\n").encode())
            print(self.closing_text(results))
            if self.options.push_to_hub:
                print(push_folder(out / "model", self.options.push_to_hub))
        return results

    def closing_text(self, results: dict[str, Any]) -> str:
        """What the run ends with: its score, and the folder to use."""
        out, kept, last = self.options.out, self.kept(), results["miou"] or 0
        frames = f"{results['protocol']['frames']} {evaluated_frames(self.training, self.validation)}"
        text = f"{miou_text(results)} on {frames}. Model, results, overlays: {out}"
        if kept["miou"] > last:
            better = f"{percent(kept['miou'])} % after step {kept['step']}"
            return f"{text}. Better, by the same mean: {out / 'best'}, {better}; use that"
        return f"{text}. Use {out / 'model'}" + (", the best of the run" if self.options.eval_every_steps else "")

    def score(self) -> dict[str, object]:
        """Results of the held-back frames, each of which one process scores."""
        self.whole = unsharded(self.accelerator, self.trained)
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        frames = frame_loader(self.validation, self.options.workers, process, processes)
        return score_frames(
            self.saved(), self.processor, frames, self.validation.label_map, self.accelerator, self.options.class_set
        )

    def saved(self) -> TqdmForSemanticSegmentation:
        """The model as a folder gets it: whole, adapters merged."""
        if self.options.vision != "lora":
            return self.whole
        from .lora import without_adapters  # here, because peft takes seconds to import

        return without_adapters(self.whole)

    def write_model(self, folder: Path, results: dict[str, object]) -> None:
        """Model folder with its card, a drawing for the card, and results.json."""
        files: dict[str, str | bytes] = {"results.json": json.dumps(results, indent=2) + "\n"}
        for _, drawing in self.drawings(results, min(self.options.overlays, 1)):
            content = BytesIO()
            drawing.save(content, "PNG")
            files["example.png"] = content.getvalue()
        image = "example.png" if "example.png" in files else None
        files["README.md"] = model_card(
            self.options, self.whole, results, self.training, self.validation, self.phases, image
        )
        save_model_folder(self.saved(), self.processor, folder, files)

    def drawings(self, results: dict[str, object], count: int) -> list[tuple[str, Image.Image]]:
        """Names and drawings of `count` frames with ground truth and prediction."""
        frames = results["protocol"]["frames"]
        return list(draw_frames(self.whole, self.processor, self.validation, count, frames))
