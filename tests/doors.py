"""Every kind of image at every door: `python tests/doors.py` prints the table, `test_images.py` keeps it true.

An entry says "equal" where the door gives the class ids of the image that was meant, "refused" where it names the
file or the argument in one line, "-" where the door takes no such thing, and "other ids" where it is wrong.
"""

import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from conftest import micro_model
from PIL import Image
from transformers import Pipeline, pipeline

from tqdm_seg.data.frames import PlainRows
from tqdm_seg.data.images import decode_rgb
from tqdm_seg.data.label_maps import LabelMap
from tqdm_seg.data.options import PrepareOptions
from tqdm_seg.data.prepare import Pair, read_pair
from tqdm_seg.deploy.folder import save_model_folder
from tqdm_seg.deploy.predict import Predictor, predict_image
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

SIZE = (24, 32)  # height, width
ORIENTATION = 0x0112
# How an upright image is stored under each EXIF orientation.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip
LOSSLESS = {".webp": {"lossless": True}}
MAP = LabelMap("one", ("road",), "values", ((0, 0),), "one class")


def forget_folders() -> None:
    """Forgets the code of model folders: that of the next folder would be looked for in theirs."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def path_without_caches() -> list[str]:
    """`sys.path` without folders of code that transformers copied from models: the first of them would be read."""
    return [place for place in sys.path if not Path(place, "transformers_modules").is_dir()]


class Kind(NamedTuple):
    """An image as a file's name and bytes, or as an array, and what it shows: (H, W, 3) uint8, None if refused."""

    source: tuple[str, bytes] | np.ndarray
    meant: np.ndarray | None


def colours(height: int = SIZE[0], width: int = SIZE[1], seed: int = 2) -> np.ndarray:
    """(H, W, 3) uint8: coarse noise, so that neighbouring pixels are alike."""
    noise = np.random.default_rng(seed).integers(0, 256, (-(-height // 4), -(-width // 4), 3), dtype=np.uint8)
    return noise.repeat(4, 0).repeat(4, 1)[:height, :width]


def encode(image: Image.Image, suffix: str, **options) -> tuple[str, bytes]:
    """A file's name and bytes."""
    content = io.BytesIO()
    image.save(content, Image.registered_extensions()[suffix], **options)
    return f"image{suffix}", content.getvalue()


def turned(pixels: np.ndarray, orientation: int, suffix: str) -> tuple[str, bytes]:
    """A file that EXIF turns to `pixels`."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encode(Image.fromarray(pixels).transpose(STORED[orientation]), suffix, exif=exif, **LOSSLESS.get(suffix, {}))


def files(pixels: np.ndarray) -> dict[str, Kind]:
    """Kinds of files."""
    import cv2

    image, grey = Image.fromarray(pixels), Image.fromarray(pixels).convert("L")
    alpha = np.random.default_rng(1).integers(0, 256, pixels.shape[:2], dtype=np.uint8)
    rgba = Image.fromarray(np.dstack([pixels, alpha]))
    deep = pixels.astype(np.uint16) * 256 + alpha[..., None]  # the low byte is noise
    palette, cmyk = image.quantize(64), encode(image.convert("CMYK"), ".jpg", quality=95)
    shown = {mode: np.asarray(image.convert(mode).convert("RGB")) for mode in ("1", "L", "HSV", "LAB", "YCbCr")}
    jpeg = encode(image, ".jpg", quality=95)
    decoded = {name: np.asarray(Image.open(io.BytesIO(data[1])).convert("RGB")) for name, data in
               {"jpeg": jpeg, "cmyk": cmyk}.items()}  # fmt: skip
    return {
        "PNG": Kind(encode(image, ".png"), pixels),
        "JPEG": Kind(jpeg, decoded["jpeg"]),
        "BMP": Kind(encode(image, ".bmp"), pixels),
        "TIFF": Kind(encode(image, ".tif"), pixels),
        "WebP": Kind(encode(image, ".webp", lossless=True), pixels),
        "1 bit": Kind(encode(image.convert("1"), ".png"), shown["1"]),
        "grey": Kind(encode(grey, ".png"), shown["L"]),
        "grey with alpha": Kind(encode(rgba.convert("LA"), ".png"), shown["L"]),
        "16-bit grey": Kind(encode(Image.fromarray(deep[..., 0]), ".png"), pixels[..., :1].repeat(3, -1)),
        "16-bit grey TIFF": Kind(encode(Image.fromarray(deep[..., 0]), ".tif"), pixels[..., :1].repeat(3, -1)),
        "16-bit colour": Kind(("image.png", cv2.imencode(".png", deep[..., ::-1])[1].tobytes()), pixels),
        "16-bit colour TIFF": Kind(("image.tif", cv2.imencode(".tif", deep[..., ::-1])[1].tobytes()), pixels),
        "palette": Kind(encode(palette, ".png"), np.asarray(palette.convert("RGB"))),
        "palette with alpha": Kind(encode(palette, ".png", transparency=3), np.asarray(palette.convert("RGB"))),
        "RGBA": Kind(encode(rgba, ".png"), pixels),
        "CMYK": Kind(cmyk, decoded["cmyk"]),
        "LAB": Kind(encode(image.convert("LAB"), ".tif"), shown["LAB"]),
        **{f"EXIF {o} PNG": Kind(turned(pixels, o, ".png"), pixels) for o in STORED},
        **{f"EXIF 6 {s[1:]}": Kind(turned(pixels, 6, s), pixels) for s in (".tif", ".webp")},
        "float TIFF": Kind(encode(Image.fromarray(pixels[..., 0] / np.float32(255)), ".tif"), None),
        "32-bit TIFF": Kind(encode(Image.fromarray(pixels[..., 0].astype(np.int32)), ".tif"), None),
        "cut short": Kind(("image.png", encode(image, ".png")[1][:-200]), None),
        "no image": Kind(("image.png", b"text"), None),
        "1x1": Kind(encode(image.crop((0, 0, 1, 1)), ".png"), None),
    }


def arrays(pixels: np.ndarray) -> dict[str, Kind]:
    """Kinds of arrays; the tensor of each goes through the same door."""
    grey = pixels[..., 0]
    repeated = grey[..., None].repeat(3, -1)
    fractions = pixels / np.float32(255)
    broken = fractions.copy()
    broken[3, 4, 1] = np.nan
    return {
        "array (H, W, 3)": Kind(pixels, pixels),
        "array (3, H, W)": Kind(np.ascontiguousarray(np.moveaxis(pixels, -1, 0)), pixels),
        "array (H, W)": Kind(grey, repeated),
        "array (H, W, 1)": Kind(grey[..., None], repeated),
        "negative strides": Kind(pixels[::-1, ::-1].copy()[::-1, ::-1], pixels),
        "uint16": Kind(pixels.astype(np.uint16) * 256 + 77, pixels),
        "int64": Kind(pixels.astype(np.int64), pixels),
        "bool": Kind(grey > 127, (repeated > 127) * np.uint8(255)),
        "int64 beyond 255": Kind(pixels.astype(np.int64) * 3, None),
        "fractions 0 ... 1": Kind(fractions, None),
        "floats 0 ... 255": Kind(pixels.astype(np.float32), None),
        "NaN": Kind(broken, None),
        "2 bands": Kind(pixels[..., :2], None),
        "4 bands": Kind(np.dstack([pixels, grey]), None),
        "5 bands": Kind(np.dstack([pixels, pixels[..., :2]]), None),
        "no pixels": Kind(pixels[:0], None),
    }


class Doors:
    """Functions from an image to class ids (H, W), by the name of the door: `of_files` of a path, `of_arrays`."""

    def __init__(self, folder: Path):
        self.size, self.known = SIZE, {}
        self.folder, self.processor, self.model = folder, TqdmImageProcessor(), steep_model()
        self.predictor = Predictor(self.model, self.processor, self.model.config.id2label)
        self.pipe = self.saved_pipeline(folder / "model")
        self.of_files: dict[str, Callable[[Path], np.ndarray]] = {
            "processor, path": lambda path: self.ids(str(path)),
            "processor, PIL": lambda path: self.ids(Image.open(path)),
            "predict": self.by_predict,
            "prepare, loader": lambda path: self.ids(self.prepared(path)),
            "prepare --jpeg": lambda path: self.ids(self.prepared(path, 95)),
            "--no-index": self.by_plain_rows,
            "pipeline, path": lambda path: self.by_pipeline(str(path)),
            "pipeline, PIL": lambda path: self.by_pipeline(Image.open(path)),
        }
        self.of_arrays: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "processor, array": self.ids,
            "processor, tensor": lambda array: self.ids(torch.from_numpy(np.ascontiguousarray(array))),
            "processor, list": lambda array: self.ids([array]),
        }

    def saved_pipeline(self, folder: Path) -> Pipeline:
        """As a user of a saved folder makes it."""
        save_model_folder(self.model, self.processor, folder)
        modules = str(folder.with_name("modules"))
        forget_folders()
        with (
            patch("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules),
            patch("sys.path", path_without_caches()),
        ):
            made = pipeline("image-segmentation", model=str(folder), trust_remote_code=True)
        forget_folders()
        return made

    def ids(self, image: object, **options) -> np.ndarray:
        """By the image processor."""
        pixel_values = self.processor(image, return_tensors="pt", **options).pixel_values
        return self.model.segment_labels(pixel_values, pixel_values.shape[-2:])[0].numpy().astype(np.uint8)

    def by_predict(self, path: Path) -> np.ndarray:
        """By `tqdm-seg predict`, read back from its PNG."""
        predict_image(self.predictor, path, lambda: self.folder, "predicted")
        return np.asarray(Image.open(self.folder / "ids" / "predicted.png"))

    def prepared(self, path: Path, jpeg: int | None = None) -> np.ndarray:
        """(H, W, 3) uint8 by the loader, of what `tqdm-seg prepare` stores."""
        options = PrepareOptions(root=path.parent, out=self.folder / "out", jpeg=jpeg)
        frame, *_ = read_pair("key", Pair("train", "", path, self.label(path)), MAP, options)
        return decode_rgb(frame.image, str(path))

    def by_plain_rows(self, path: Path) -> np.ndarray:
        """By `train --no-index`."""
        row = {name: {"bytes": file.read_bytes(), "path": str(file)} for name, file in
               {"image": path, "label": self.label(path)}.items()}  # fmt: skip
        return self.ids(PlainRows(str(path.parent), "train", ("road",)).frame(row, 0).image)

    def by_pipeline(self, image: object) -> np.ndarray:
        """By transformers' pipeline."""
        parts = self.pipe(image)
        ids = np.zeros(np.asarray(parts[0]["mask"]).shape, np.uint8)
        for part in parts:
            ids[np.asarray(part["mask"]) > 0] = self.model.config.label2id[part["label"]]
        return ids

    def label(self, path: Path) -> Path:
        """A mask as large as the upright image."""
        Image.new("L", (1, 1) if path.parent.name == "1x1" else self.size[::-1]).save(self.folder / "label.png")
        return self.folder / "label.png"

    def entry(self, kind: Kind, door: str, folder: Path) -> str:
        """What the table says; the file of the kind is written into `folder`."""
        source, meant = kind
        self.size = SIZE if meant is None else meant.shape[:2]
        if isinstance(source, tuple):
            folder.mkdir(parents=True, exist_ok=True)
            source = folder / source[0]
            source.write_bytes(kind.source[1])
            if door == "prepare --jpeg" and meant is not None and source.suffix != ".jpg":
                meant = np.asarray(Image.open(io.BytesIO(encode(Image.fromarray(meant), ".jpg", quality=95)[1])))
        try:
            found = {**self.of_files, **self.of_arrays}[door](source)
        except (ValueError, OSError) as error:
            named = str(source) in str(error) or str(error).startswith("image")
            return "refused" if named and len(str(error)) <= 300 and "\n" not in str(error) else f"obscure: {error}"
        if meant is None:
            return "accepted"
        key = meant.tobytes()
        self.known[key] = self.known[key] if key in self.known else self.ids(meant)
        return "equal" if np.array_equal(found, self.known[key]) else "other ids"


def steep_model() -> TqdmForSemanticSegmentation:
    """A micro model with larger heads, centred, so that its ids follow the pixels."""
    model, processor = micro_model(), TqdmImageProcessor()
    decoder = model.model.mask_decoder
    with torch.no_grad():
        for layer in decoder.mask_head[::2]:
            layer.weight.mul_(5)
        decoder.class_head.weight.mul_(10)
        logits = model.model(processor(colours(seed=0), return_tensors="pt").pixel_values).class_logits
        decoder.class_head.bias.sub_(logits[:, -1].mean((0, 1)))
    return model


def table(doors: Doors, pixels: np.ndarray) -> dict[str, dict[str, str]]:
    """Entries by kind and door."""
    entries = {}
    for kinds, names in ((files(pixels), doors.of_files), (arrays(pixels), doors.of_arrays)):
        for name, kind in kinds.items():
            entries[name] = {door: doors.entry(kind, door, doors.folder / name) for door in names}
    return entries


def main() -> None:
    """Prints one table for files and one for arrays."""
    with tempfile.TemporaryDirectory() as folder:
        doors = Doors(Path(folder))
        entries = table(doors, colours())
    for names in (doors.of_files, doors.of_arrays):
        print(f"\n{'':20}" + "".join(f"{name:20}" for name in names))
        for kind, row in entries.items():
            if row.keys() == names.keys():
                print(f"{kind:20}" + "".join(f"{entry:20}" for entry in row.values()))


if __name__ == "__main__":
    main()
