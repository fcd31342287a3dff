"""Segment images and videos with a trained model: pictures to look at, class ids to work with, areas to count.

    python predict.py MODEL street.jpg photos/ drive.mp4 --out results
    python predict.py EXPORT photos/ --out results --backend onnxruntime     # EXPORT: made by export_tqdm.py

    results/overlays/street.png    the image with every class in its colour, and a legend
    results/ids/street.png         8-bit grey, the value of a pixel is its class id
    results/overlays/drive.mp4     the same overlay, frame by frame and without sound; ids of videos are not kept
    results/areas.json             pixels and share of every class in every image and frame, and how they were computed

Files in folders keep their place under the folder. One that cannot be read is skipped and named in the end, with exit
status 1. MODEL's own code is run: name only folders and repositories that you trust.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import transformers
from PIL import Image, ImageOps
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, BaseImageProcessor, PreTrainedModel

from tqdm_seg.image_processing_tqdm import TqdmImageProcessor

from ..data.palette import legend, tinted
from .export import OnnxSegmenter
from .speed import PRECISIONS, ready_to_predict, use_huge_pages

if TYPE_CHECKING:
    import av

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")


def box(text: str) -> dict[str, int]:
    """'2048x1024' -> the image processor's `size` of that box."""
    sides = sorted(int(side) for side in text.split("x"))
    if len(sides) != 2 or sides[0] < 1:
        raise ValueError
    return {"shortest_edge": sides[0], "longest_edge": sides[1]}


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="model folder, or name of a repository on the Hugging Face Hub")
    add("inputs", metavar="INPUT", nargs="+", help="image, video, or folder of both, searched with its subfolders")
    add("--out", required=True, type=Path, metavar="DIR", help="for the results; files of the same name are replaced")
    add("--classes", metavar="A,B,...", help="decide between these classes of the model only (default: all)")
    add("--size", type=box, metavar="WxH", help="scale images to fit this box, as 2048x1024 (default: as they are)")
    add("--window", type=int, metavar="PX", help="side of the sliding window, 0: whole images (default: the model's)")
    add("--stride", type=int, metavar="PX", help="window to window (default: the model's; with --window 2/3 of it)")
    add("--window-batch", type=int, metavar="N", help="windows at once, few save memory (default: the model's)")
    add("--flip", action="store_true", help="average with the prediction for the mirrored image, in twice the time")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto (default): a GPU if any")
    add("--dtype", choices=PRECISIONS, default="fp32", help="int8: on CPUs, with torchao (default %(default)s)")
    add("--compile", action="store_true", help="torch.compile: minutes for the first image, then faster")
    add("--backend", choices=["torch", "onnxruntime"], default="torch", help="onnxruntime: for exports (default torch)")
    return parser


def find_inputs(inputs: list[str], out: Path) -> dict[str, Path]:
    """Files by the name that their results get: the path below the folder given, without suffix.

    Raises FileNotFoundError for what does not exist and for folders without images and videos, ValueError for two files
    whose results would have the same name.
    """
    found: dict[str, Path] = {}
    for path in map(Path, inputs):
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}")
        files = [path]
        if path.is_dir():
            suffixes = IMAGE_SUFFIXES + VIDEO_SUFFIXES
            files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in suffixes and file.is_file()]
            files = [file for file in files if not file.resolve().is_relative_to(out.resolve())]
            if not files:
                raise FileNotFoundError(f"{path} holds no file ending in {', '.join(suffixes)}")
        for file in files:
            name = file.relative_to(path if path.is_dir() else path.parent).with_suffix("").as_posix()
            if name in found:
                raise ValueError(
                    f"{found[name]} and {file} would have the same result, {name}.png; start predict.py for each of "
                    "them, with its own --out"
                )
            found[name] = file
    return found


def choose_classes(model: PreTrainedModel | OnnxSegmenter, names: str | None) -> dict[int, str]:
    """The classes to decide between, by id; raises ValueError for names that the model does not know."""
    known = model.config.id2label
    if names is None:
        return known
    wanted = [name.strip() for name in names.split(",")]
    strange = [name for name in wanted if name not in known.values()]
    if strange:
        raise ValueError(
            f"the model has no class {', '.join(map(repr, strange))}, only {', '.join(known.values())}. A part of what "
            "it learned belongs to one class each, so other classes need training: train.py --classes"
        )
    if len(set(wanted)) < 2:
        raise ValueError(f"--classes {names}: every pixel gets one of these classes, so name at least two")
    return {index: name for index, name in known.items() if name in wanted}


def set_windows(
    model: PreTrainedModel | OnnxSegmenter, window: int | None, stride: int | None, window_batch: int | None
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
    """A model with everything that decides what it makes of an image."""

    model: PreTrainedModel | OnnxSegmenter
    processor: BaseImageProcessor
    classes: dict[int, str]
    size: dict[str, int] | None = None
    flip: bool = False
    dtype: str = "fp32"

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
        """The overlay, below it a legend of the classes `named`; both sides are even, as video formats want them."""
        overlay, key = tinted(image, ids, self.model.config.num_labels), legend(named, image.width)
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
        """What it takes to get the same numbers again."""
        config, processor = self.model.config, self.processor
        size = self.size or (dict(processor.size) if processor.do_resize else None)
        return {
            "model": config.name_or_path,
            "revision": getattr(config, "_commit_hash", None),  # of a Hub repository
            "classes": self.classes,
            "size": "each image's own" if size is None else size,
            "mode": "whole" if config.window_size is None else "slide, where a side is longer than the window",
            "window": config.window_size,
            "stride": config.window_stride if config.window_size else None,
            "flip": self.flip,
            "device": str(self.model.device),
            "dtype": self.dtype,
            "backend": getattr(self.model, "backend", "torch"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }


def read_image(path: Path) -> Image.Image:
    """The RGB image, turned upright where the camera noted how it was held; raises ValueError naming the file."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"{path} has more than 8 bits per channel (mode {image.mode}); convert it to 8 bits")
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow calls some broken PNGs SyntaxError
        raise ValueError(f"cannot read {path}: {error}") from error


def read_video(path: Path) -> Iterator[tuple[Image.Image, "av.VideoFrame", Fraction | None]]:
    """Every frame: RGB and upright, as it was decoded, and frames per second; raises ValueError naming the file."""
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


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A temporary file that becomes `path` once the block has ended well; a folder for it is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def predict_image(predictor: Predictor, path: Path, out: Path, name: str) -> dict[str, object]:
    """Writes overlay and ids; returns the image's entry in areas.json."""
    image = read_image(path)
    ids = predictor(image)
    seen = {index: name for index, name in predictor.classes.items() if (ids == index).any()}
    pictures = {f"overlays/{name}.png": predictor.draw(image, ids, seen), f"ids/{name}.png": Image.fromarray(ids)}
    for target, picture in pictures.items():
        with written(out / target) as temporary:
            picture.save(temporary, "png")
    return {"width": image.width, "height": image.height, "areas": predictor.areas(ids)}


def predict_video(predictor: Predictor, path: Path, out: Path, name: str) -> dict[str, object]:
    """Writes the overlay video, frame times as in the original; returns the video's entry in areas.json."""
    import av

    frames, stream = [], None
    with written(out / f"overlays/{name}.mp4") as temporary, av.open(str(temporary), "w", format="mp4") as video:
        for image, frame, rate in read_video(path):
            ids = predictor(image)
            drawn = av.VideoFrame.from_image(predictor.draw(image, ids, predictor.classes))
            if stream is None:
                stream = video.add_stream("libx264", rate, pix_fmt="yuv420p", width=drawn.width, height=drawn.height)
                stream.codec_context.time_base = frame.time_base
            drawn.pts, drawn.time_base = frame.pts, frame.time_base
            video.mux(stream.encode(drawn))
            frames.append({"seconds": frame.time, "areas": predictor.areas(ids)})
        if stream is None:
            raise ValueError(f"{path} holds no frame that can be read")
        video.mux(stream.encode())
    return {"width": image.width, "height": image.height, "frames": frames}


def open_model(args: argparse.Namespace) -> Predictor:
    """The model folder of the command line, ready to predict; raises ValueError for what it cannot do."""
    if (Path(args.model) / "export.json").is_file():
        raise ValueError(f"{args.model} was made by export_tqdm.py; add --backend onnxruntime")
    device = args.device
    if device == "auto":
        device = next((name for name in ("cuda", "mps") if getattr(torch, name).is_available()), "cpu")
    if device != "cpu" and not getattr(torch, device).is_available():
        raise ValueError(f"torch finds no {device} device here; leave out --device, or install torch for {device}")
    processor = AutoImageProcessor.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModelForSemanticSegmentation.from_pretrained(args.model, trust_remote_code=True, dtype=torch.float32)
    if model.config.model_type != "tqdm":
        raise ValueError(f"{args.model} is a model of type {model.config.model_type}, not tqdm")
    set_windows(model, args.window, args.stride, args.window_batch)
    classes = choose_classes(model, args.classes)
    ready_to_predict(model.to(device), args.dtype, args.compile)
    return Predictor(model, processor, classes, args.size, args.flip, args.dtype)


def open_export(args: argparse.Namespace) -> Predictor:
    """The exported folder of the command line; raises ValueError for what belongs to torch."""
    if args.dtype != "fp32" or args.compile:
        raise ValueError("--dtype and --compile are for --backend torch, an export computes in float32; leave them out")
    model = OnnxSegmenter(args.model, "cpu" if args.device == "auto" else args.device)
    set_windows(model, args.window, args.stride, args.window_batch)
    processor = TqdmImageProcessor.from_pretrained(args.model)
    return Predictor(model, processor, choose_classes(model, args.classes), args.size, args.flip)


def main(argv: list[str] | None = None) -> int:
    """Segments everything, writes areas.json last; returns the exit status."""
    use_huge_pages()
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        found = find_inputs(args.inputs, args.out)
        if importlib.util.find_spec("av") is None and any(map(is_video, found.values())):
            raise ValueError('reading videos needs PyAV: pip install "av>=15"')
        predictor = open_export(args) if args.backend == "onnxruntime" else open_model(args)
    except (FileNotFoundError, ImportError, ValueError) as error:
        parser.error(str(error))

    report = {"protocol": predictor.protocol(), "results": {}, "failed": {}}
    for name, path in tqdm(found.items(), unit="file"):
        try:
            entry = (predict_video if is_video(path) else predict_image)(predictor, path, args.out, name)
            report["results"][name] = {"file": str(path), **entry}
        except ValueError as error:
            report["failed"][str(path)] = str(error)
    with written(args.out / "areas.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    failed = report["failed"]
    if failed:
        print(f"{len(failed)} of {len(found)} inputs failed:", *failed.values(), sep="\n", file=sys.stderr)
    return 1 if failed else 0


def is_video(path: Path) -> bool:
    """By the suffix."""
    return path.suffix.lower() in VIDEO_SUFFIXES


if __name__ == "__main__":
    sys.exit(main())
