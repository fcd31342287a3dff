"""Segments images and videos with a trained model: overlays to look at, class ids to work with, areas to count."""

import sys

from ..commands import start

if __name__ == "__main__":
    sys.exit(start("predict"))


import functools
import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from PIL import Image
from tqdm import tqdm

from tqdm_seg.configuration_tqdm import listed
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

from ..data.files import check_out_folder, claim_folder, read_json, replace_file, write_file
from ..data.folders import walk
from ..data.images import read_rgb
from ..data.palette import legend, tint
from ..program import takes
from .export import AGAIN, OnnxSegmenter
from .folder import load_model, model_folder, read_processor, warn_untrained
from .options import PredictOptions
from .self_check import check_model
from .speed import ready_to_predict, use_huge_pages

if TYPE_CHECKING:
    import av

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
AREAS, SAVE_EVERY = "areas.json", 60  # seconds
MODEL_SUFFIXES = (".json", ".safetensors", ".onnx", ".data")
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")


def find_inputs(inputs: Sequence[Path], out: Path) -> dict[str, Path]:
    """Files by the name of their results: the path below the input folder, without suffix.

    Folders are read as everywhere: links followed, what is hidden or left by systems is no image.
    Raises FileNotFoundError for what does not exist and for folders without images and videos, ValueError for two files
    whose results would have the same name.
    """
    found: dict[str, Path] = {}
    for path in inputs:
        if not path.exists():
            raise FileNotFoundError(f"file not found: {path}")
        files = [path]
        if path.is_dir():
            suffixes = IMAGE_SUFFIXES + VIDEO_SUFFIXES
            files = [file for file in walk(path, suffixes) if not file.resolve().is_relative_to(out.resolve())]
            if not files:
                raise FileNotFoundError(f"{path} holds no file ending in {', '.join(suffixes)}")
        for file in files:
            name = file.relative_to(path if path.is_dir() else path.parent).with_suffix("").as_posix()
            if name in found:
                raise ValueError(
                    f"{found[name]} and {file} would both become {name}.png; predict them one at a time, each with "
                    "another --out"
                )
            found[name] = file
    return found


def choose_classes(known: dict[int, str], only: Sequence[str] | None) -> dict[int, str]:
    """The classes to decide between, by id; raises ValueError for names that the model does not know."""
    if only is None:
        return known
    unknown = [name for name in only if name not in known.values()]
    if unknown:
        raise ValueError(
            f"--only: the model has no class {', '.join(map(repr, unknown))}, only {', '.join(known.values())}; others "
            "need training, or --class-names and a model of --class-head cosine"
        )
    return {index: name for index, name in known.items() if name in only}


def set_class_names(model: TqdmForSemanticSegmentation, names: Sequence[str]) -> None:
    """Changes the classes of a model to these, in this order; raises ValueError, with the ways out, for unknown names.

    A model with open classes takes any name that its text tower or its table of class vectors has.
    """
    config = model.config
    unknown = [name for name, row in zip(names, config.rows_of(names), strict=True) if row is None]
    if unknown and not config.has_open_classes:
        raise ValueError(
            f"--class-names: the model has no class {listed(unknown)}, only {listed(config.class_names)}; choose among "
            "them, train with these names, or train with --class-head cosine, whose models take new names"
        )
    model.set_classes(dict(enumerate(names)))


def choose_device(name: str) -> str:
    """The device of an option, "auto": a GPU if there is one. Raises ValueError for one that torch does not find."""
    found = [device for device in ("cuda", "mps") if getattr(torch, device).is_available()]
    if name == "auto":
        return (found or ["cpu"])[0]
    if name != "cpu" and name not in found:
        raise ValueError(f"torch finds no {name} device here; leave out --device, or install torch for {name}")
    return name


def set_windows(
    model: TqdmForSemanticSegmentation | OnnxSegmenter, window: int | None, stride: int | None, window_batch: int | None
) -> None:
    """Changes the sliding windows where a value is given; raises ValueError for values that do not go together."""
    config = model.config
    if window is not None:
        config.window_size = window or None
        config.window_stride = max(2 * window // 3, 1)
    if stride is not None:
        if config.window_size is None:
            raise ValueError("--stride is for sliding windows; give --window a size, too, or leave --stride out")
        config.window_stride = stride
    if window_batch is not None:
        config.window_batch_size = window_batch
    config.validate_architecture()


@dataclass
class Predictor:
    """A model and all that decides its prediction.

    size: of the box that images are scaled to fit. files: of the model, by name, as `stamp` has them.
    """

    model: TqdmForSemanticSegmentation | OnnxSegmenter
    processor: TqdmImageProcessor
    classes: dict[int, str]
    size: dict[str, int] | None = None
    flip: bool = False
    precision: str = "fp32"
    revision: str | None = None
    files: dict[str, list[int]] = field(default_factory=dict)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Class ids (H, W) uint8 of an RGB image, at its own size."""
        resize = {} if self.size is None else {"do_resize": True, "size": self.size}
        pixel_values = self.processor(images=image, return_tensors="pt", **resize)["pixel_values"]
        pixel_values, size = pixel_values.to(self.model.device), (image.height, image.width)
        if len(self.classes) == self.model.config.num_labels:
            return self.model.segment_labels(pixel_values, size, self.flip)[0].to(torch.uint8).cpu().numpy()
        scores = self.model.segment(pixel_values, size, self.flip)[0]  # (K, H, W)
        ids = torch.tensor(list(self.classes), dtype=torch.uint8, device=scores.device)
        return ids[scores[list(self.classes)].max(0).indices].cpu().numpy()

    def draw(self, image: Image.Image, ids: np.ndarray, named: dict[int, str]) -> Image.Image:
        """The overlay above a legend of the classes `named`; both sides are even, as video formats need them."""
        overlay, key = tint(image, ids, self.model.config.num_labels), legend(named, image.width)
        width, height = max(image.width, key.width), image.height + key.height
        canvas = Image.new("RGB", (width + width % 2, height + height % 2), "white")
        canvas.paste(overlay, (0, 0))
        canvas.paste(key, (0, image.height))
        return canvas

    def areas(self, ids: np.ndarray) -> dict[str, dict[str, float]]:
        """Number of pixels of every class, and their share of all, 0 to 1."""
        counts = np.bincount(ids.ravel(), minlength=self.model.config.num_labels)
        return {
            name: {"pixels": int(counts[index]), "share": round(counts[index] / ids.size, 6)}
            for index, name in self.classes.items()
        }

    def protocol(self) -> dict[str, object]:
        """All that is needed to reproduce the numbers."""
        config, processor = self.model.config, self.processor
        size = self.size or (dict(processor.size) if processor.do_resize else None)
        return {
            "model": config.name_or_path,
            "revision": self.revision,
            "classes": self.classes,
            "size": "each image's own" if size is None else size,
            "mode": "whole" if config.window_size is None else "slide, where a side is longer than the window",
            "window": config.window_size,
            "stride": config.window_stride if config.window_size else None,
            "flip": self.flip,
            "device": str(self.model.device),
            "precision": self.precision,
            "backend": getattr(self.model, "backend", "torch"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }


def read_video(path: Path) -> Iterator[tuple[Image.Image, "av.VideoFrame", Fraction | None]]:
    """Every frame: upright RGB image, decoded frame, and frames per second; raises ValueError naming the file."""
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} holds no video, only other streams")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in tqdm(container.decode(stream), path.name, stream.frames or None, leave=False, unit="frame"):
                pixels = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                yield Image.fromarray(pixels), frame, stream.average_rate
    except av.FFmpegError as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def predict_image(predictor: Predictor, path: Path, out: Callable[[], Path], name: str) -> dict[str, object]:
    """Writes overlay and ids; returns the image's entry in areas.json."""
    image = Image.fromarray(read_rgb(path))
    ids = predictor(image)
    seen = {index: name for index, name in predictor.classes.items() if (ids == index).any()}
    files = {f"overlays/{name}.png": predictor.draw(image, ids, seen), f"ids/{name}.png": Image.fromarray(ids)}
    for target, written in files.items():
        with replace_file(out() / target) as temporary:
            written.save(temporary, "png")
    return {"width": image.width, "height": image.height, "areas": predictor.areas(ids)}


def predict_video(predictor: Predictor, path: Path, out: Callable[[], Path], name: str) -> dict[str, object]:
    """Writes the overlay video with the frame times of the original; returns the video's entry in areas.json."""
    import av

    frames, stream, pictures = [], None, read_video(path)
    first = next(pictures, None)  # read before anything is written
    if first is None:
        raise ValueError(f"{path} holds no frame that can be read; convert it to MP4")
    with replace_file(out() / f"overlays/{name}.mp4") as temporary, av.open(str(temporary), "w", format="mp4") as video:
        for image, frame, rate in chain([first], pictures):
            ids = predictor(image)
            drawn = av.VideoFrame.from_image(predictor.draw(image, ids, predictor.classes))
            if stream is None:
                stream = video.add_stream("libx264", rate, pix_fmt="yuv420p", width=drawn.width, height=drawn.height)
                stream.codec_context.time_base = frame.time_base
            drawn.pts, drawn.time_base = frame.pts, frame.time_base
            video.mux(stream.encode(drawn))
            frames.append({"seconds": frame.time, "areas": predictor.areas(ids)})
        video.mux(stream.encode())
    return {"width": image.width, "height": image.height, "frames": frames}


def stamp(path: Path) -> list[int]:
    """Size and time of change, by which a later run knows a file again."""
    return [path.stat().st_size, path.stat().st_mtime_ns]


def earlier_results(out: Path, report: dict[str, Any], found: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """What an earlier run of this kind has done: the same model, options and inputs, and its files are there."""
    try:
        earlier = read_json(out / AREAS, {"protocol": dict, "model_files": dict, "results": dict})
        same = all(earlier[key] == json.loads(json.dumps(report[key])) for key in ("protocol", "model_files"))
        done = {name: earlier["results"][name] for name in found if same and name in earlier["results"]}
        return {
            name: entry
            for name, entry in done.items()
            if [entry["file"], entry["stamp"]] == [str(found[name]), stamp(found[name])]
            and any((out / f"overlays/{name}{suffix}").is_file() for suffix in (".png", ".mp4"))
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def open_predictor(options: PredictOptions) -> Predictor:
    """The model folder or export of the options, ready to predict."""
    if options.backend == "onnxruntime":
        model: Any = OnnxSegmenter(options.model, "cpu" if options.device == "auto" else options.device)
        processor, revision, folder = read_processor(Path(options.model), AGAIN), None, Path(options.model)
    else:
        if (Path(options.model) / "export.json").is_file():
            raise ValueError(f"{options.model} was made by `tqdm-seg export`; add --backend onnxruntime")
        device, folder = choose_device(options.device), model_folder(options.model)
        model, processor = load_model(folder)
        if options.class_names is not None:
            set_class_names(model, options.class_names)
        model.to(device)
        model.config.name_or_path = options.model
        revision = folder.name if folder.parent.name == "snapshots" else None  # of a Hub repository
    if model.config.num_labels > 256:
        raise ValueError(f"{options.model} has {model.config.num_labels} classes; ids/*.png hold 256 at most")
    set_windows(model, options.window, options.stride, options.window_batch)
    classes = choose_classes(model.config.id2label, options.only)
    if options.backend == "torch":
        ready_to_predict(model, options.precision, options.compile)
        if options.check:
            check_model(model, folder, options.precision)
    smallest = 2 * model.config.vision_config.patch_size
    if options.size and min(options.size) < smallest:
        raise ValueError(f"--size {options.size[0]}x{options.size[1]}: images need at least {smallest} pixels a side")
    files = {path.name: stamp(path) for path in sorted(folder.iterdir()) if path.suffix in MODEL_SUFFIXES}
    box = options.size and {"shortest_edge": min(options.size), "longest_edge": max(options.size)}
    return Predictor(model, processor, classes, box, options.flip, options.precision, revision, files)


@takes(PredictOptions)
def predict(options: PredictOptions) -> dict[str, dict[str, Any]]:
    """Segments everything and writes areas.json, every minute and at the end; returns its results, by name.

    Goes on where an earlier run with the same model and options ended. Raises ValueError, after all others are done,
    naming the files that could not be read; where that are all, nothing is written.
    """
    use_huge_pages()
    check_out_folder(options.out, "predict", [*options.inputs, options.model])
    found = find_inputs(options.inputs, options.out)
    if importlib.util.find_spec("av") is None and any(map(is_video, found.values())):
        raise ImportError('reading videos needs PyAV: pip install "av>=15"')
    predictor = open_predictor(options)
    report: dict[str, Any] = {"protocol": predictor.protocol(), "model_files": predictor.files}
    results = earlier_results(options.out, report, found)
    report |= {"results": results, "failed": (failed := {})}

    @functools.cache
    def out() -> Path:
        """OUT, claimed when the first result is there."""
        warn_untrained(predictor.model.config, options.model)
        claim_folder(options.out, "predict")
        return options.out

    def save() -> None:
        write_file(out() / AREAS, (json.dumps(report, indent=2) + "\n").encode())

    if results:
        print(f"{len(results)} of {len(found)} inputs are done already; remove {options.out / AREAS} to repeat them")
    saved = time.monotonic()
    try:
        for name, path in tqdm(found.items(), unit="file"):
            if name in results:
                continue
            try:
                entry = (predict_video if is_video(path) else predict_image)(predictor, path, out, name)
                results[name] = {"file": str(path), "stamp": stamp(path), **entry}
            except (ValueError, FileNotFoundError) as error:
                failed[str(path)] = str(error) if str(path) in str(error) else f"{path}: {error}"
            if results and time.monotonic() > saved + SAVE_EVERY:
                save()
                saved = time.monotonic()
    finally:
        if results:
            save()
    if failed:
        kept = f"the others are done, see {options.out / AREAS}" if results else "nothing was written"
        raise ValueError(f"{len(failed)} of {len(found)} inputs failed, {kept}; first {next(iter(failed.values()))}")
    return results


def is_video(path: Path) -> bool:
    """By the suffix."""
    return path.suffix.lower() in VIDEO_SUFFIXES
