"""Image files to pixels."""

from io import BytesIO

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps
from PIL import Image as PILImage


def decode_picture(data: bytes) -> Image.Image:
    """The loaded picture; ValueError, to be read after the file's name, when it is broken or cut short."""
    try:
        with Image.open(BytesIO(data)) as file:
            file.verify()  # checksums of PNG chunks, which decoding alone does not look at
        with Image.open(BytesIO(data)) as file:
            file.load()
    except Exception as error:  # of broken files Pillow raises almost anything: SyntaxError, struct.error, TypeError
        raise ValueError(f"cannot be decoded ({error}); copy or unpack it anew") from error
    return file


# Orientations under which the picture is shown with its sides exchanged.
_TURNED = (5, 6, 7, 8)


def shown_size(picture: PILImage.Image) -> tuple[int, int]:
    """(width, height) of the picture after its EXIF orientation, as `datasets.Image` decodes it."""
    if picture.format == "TIFF":
        picture.load()  # Pillow turns TIFFs itself, and only then
    width, height = picture.size
    turned = picture.getexif().get(ExifTags.Base.Orientation) in _TURNED
    return (height, width) if turned else (width, height)


def turned(pixels: np.ndarray, orientation: int | None) -> np.ndarray:
    """pixels (H, W) or (H, W, 3) uint8 turned by an EXIF orientation, 1 ... 8, None or any other number: not at all."""
    if orientation not in range(2, 9):
        return pixels
    # Without the file's other EXIF tags: turning writes them anew, which fails for some that cameras write.
    image = PILImage.fromarray(pixels)
    image.getexif()[ExifTags.Base.Orientation] = orientation
    return np.asarray(ImageOps.exif_transpose(image))


def decode(content: bytes, flags: int) -> np.ndarray | None:
    """Pixels of a picture file, turned as its EXIF says, by OpenCV as in the published code; None if it cannot.

    Of a file that is cut short it may return a part without a word: for bytes whose checksum is known to be right.
    """
    return cv2.imdecode(np.frombuffer(content, np.uint8), flags)


def decode_carefully(content: bytes) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a picture file that nobody has checked, turned as its EXIF says; ValueError if broken."""
    picture = decode_picture(content)
    return turned(np.asarray(picture.convert("RGB")), picture.getexif().get(ExifTags.Base.Orientation))
