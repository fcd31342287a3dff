"""The one door for images: files, URLs, PIL images, arrays and tensors of any kind become 8-bit RGB, by one rule.

Every program reads its images by `as_rgb`, and so does the image processor. Imports neither torch nor transformers.
"""

from io import BytesIO
from os import PathLike, fspath
from typing import Any
from urllib.request import urlopen

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

_URL = ("http://", "https://", "data:image/")
_TIMEOUT = 60  # seconds without an answer
_FIX = "pass uint8 values 0 ... 255, or fractions 0 ... 1 with do_rescale=False"


def as_rgb(
    image: Any,
    name: str = "image",
    channels_first: bool | None = None,
    fractions: bool = False,
    timeout: float | None = None,
) -> np.ndarray:
    """(H, W, 3) uint8 RGB of an image: a path, URL, the bytes of a file, a PIL image, an array or a torch tensor.

    files and PIL images   upright by EXIF; palette, grey, CMYK, YCbCr, HSV, LAB -> RGB by Pillow; alpha is dropped
    16 bits                the high byte, v // 256, as Pillow and OpenCV read 16-bit colour
    arrays and tensors     (H, W) grey, (H, W, C) or (C, H, W) of C = 1 or 3 bands; where both fit, an array is
                           (H, W, C) and a tensor (C, H, W), unless `channels_first` decides
    bool                   0 and 255; integers other than uint8 and uint16 must lie in 0 ... 255
    fractions              refused, unless `fractions`: then 0 ... 1 -> float32
    refused                32-bit modes of Pillow (I, F), NaN, infinity, other numbers of bands, no pixels

    timeout: seconds that a URL may be silent, 60 if None.
    Raises FileNotFoundError, or ValueError with one sentence that starts with the file or with `name`.
    """
    if isinstance(image, (str, PathLike)):
        name = shorten(fspath(image))
    try:
        if isinstance(image, (str, PathLike, bytes, bytearray)):
            image = decode_image(image, timeout)
        if isinstance(image, Image.Image):
            return np.require(_to_bytes(_decoded(image), fractions), None, "CW")
        return np.require(_to_bytes(_bands_last(image, channels_first), fractions), None, "CW")
    except ValueError as error:
        raise ValueError(f"{name} {error}") from error


def decode_image(source: str | PathLike | bytes, timeout: float | None = None) -> Image.Image:
    """The loaded image of a path, URL or the bytes of a file, checked and decoded as a whole.

    Raises FileNotFoundError; ValueError, to be read after the file's name, when it is no image, broken or cut short.
    """
    content = source if isinstance(source, (bytes, bytearray)) else _read(fspath(source), timeout)
    try:
        with Image.open(BytesIO(content)) as file:
            file.verify()  # checksums of PNG chunks, which decoding alone does not look at
        with Image.open(BytesIO(content)) as file:
            file.load()
    except UnidentifiedImageError as error:  # its own text is an address in memory
        raise ValueError("cannot be decoded (no known image format); convert it to PNG or JPEG") from error
    except Exception as error:  # of broken files Pillow raises almost anything: SyntaxError, struct.error, TypeError
        raise ValueError(f"cannot be decoded ({shorten(error)}); copy or unpack it again") from error
    return file


def orientation(image: Image.Image) -> int:
    """1 ... 8, how EXIF or XMP says that a loaded image is turned; 1 is upright. Pillow turns TIFFs itself."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except Exception as error:  # of broken EXIF data Pillow raises almost anything, too
        raise ValueError(f"has EXIF data that cannot be read ({shorten(error)}); save it without") from error
    return found if found in range(1, 9) else 1


def apply_orientation(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """pixels (H, W) or (H, W, C) turned upright by an EXIF orientation, 1 ... 8."""
    if orientation in (3, 4, 6, 7):
        pixels = pixels[::-1]
    if orientation in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels.swapaxes(0, 1) if orientation >= 5 else pixels)


def shorten(text: object, length: int = 120) -> str:
    """One line of at most `length` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= length else f"{line[: length - 4]} ..."


def _read(source: str, timeout: float | None) -> bytes:
    try:
        if source.startswith(_URL):
            with urlopen(source, timeout=timeout or _TIMEOUT) as answer:
                return answer.read()
        with open(source, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"file not found: {shorten(source)}; pass the path or URL of an image") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in a path
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot be read ({shorten(reason)}); pass the path or URL of an image") from error


def _decoded(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8, or (H, W, 1) uint16 of 16-bit grey, upright."""
    if image.mode in ("I", "F"):
        raise ValueError(f"has the 32-bit mode {image.mode}, whose white is unknown; save it with 8 or 16 bits a value")
    try:
        image.load()
        grey = image.mode.startswith("I;16")
        pixels = np.asarray(image)[..., None] if grey else np.asarray(image.convert("RGB"))
    except Exception as error:  # as in `decode_image`; ValueError for modes that Pillow does not convert
        raise ValueError(f"of mode {image.mode} cannot be decoded ({shorten(error)}); save it as RGB") from error
    return apply_orientation(pixels, orientation(image))


def _bands_last(image: Any, channels_first: bool | None) -> np.ndarray:
    """(H, W, 1 or 3) of an array or tensor; raises ValueError for other types and shapes."""
    axes = (-1, 0)
    if hasattr(image, "is_floating_point"):  # a tensor; NumPy has no bfloat16
        axes, image = (0, -1), image.detach().cpu()
        try:
            image = (image.float() if image.is_floating_point() else image).numpy()
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"is no plain tensor ({shorten(error, 80)}); pass a dense uint8 tensor") from error
    if not isinstance(image, np.ndarray):
        raise ValueError(f"is of type {type(image).__name__}; pass a path, URL, PIL image, uint8 array or tensor")
    shape = image.shape
    if channels_first is not None:
        axes = (0,) if channels_first else (-1,)
    if image.ndim == 2:
        image, axes = image[..., None], (-1,)
    axis = next((axis for axis in axes if image.shape[axis] in (1, 3)), None) if image.ndim == 3 else None
    if axis is None or not image.size:
        raise ValueError(
            f"has the shape {shape}; expected (H, W), (H, W, 3) or (3, H, W): pass the three bands of the colours (of "
            "RGBA the first three) or a PIL image"
        )
    return np.moveaxis(image, axis, -1)


def _to_bytes(pixels: np.ndarray, fractions: bool) -> np.ndarray:
    """pixels (H, W, 1 or 3) of any dtype -> (H, W, 3) uint8, or float32 if they are fractions."""
    kind, dtype = pixels.dtype.kind, pixels.dtype
    if not pixels.size:
        raise ValueError(f"has no pixels, its shape is {pixels.shape}; expected (H, W, 3)")
    if kind not in "buif" or (kind == "f" and not fractions):
        raise ValueError(f"holds {shorten(dtype, 40)}, expected bytes: {_FIX}")
    if kind == "f":
        pixels = pixels.astype(np.float32)
    if kind == "b":
        pixels = pixels * np.uint8(255)
    elif dtype.itemsize == 2 and kind == "u":
        pixels = (pixels >> 8).astype(np.uint8)
    elif pixels.dtype != np.uint8:
        most, low, high = (1 if kind == "f" else 255), pixels.min(), pixels.max()
        if not (low >= 0 and high <= most):  # not so for NaN, either
            raise ValueError(f"holds values {low:g} ... {high:g}, expected 0 ... {most}: {_FIX}")
        pixels = pixels if kind == "f" else pixels.astype(np.uint8)
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


__all__ = ["apply_orientation", "as_rgb", "decode_image", "orientation", "shorten"]
