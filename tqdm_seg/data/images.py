"""Image files to pixels. OpenCV is imported only where it decodes."""

from io import BytesIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

# Orientations under which the image is shown with its sides exchanged.
_SIDEWAYS = (5, 6, 7, 8)


def decode_image(data: bytes) -> Image.Image:
    """The loaded image; ValueError, to be read after the file's name, when it is broken or cut short."""
    try:
        with Image.open(BytesIO(data)) as file:
            file.verify()  # checksums of PNG chunks, which decoding alone does not look at
        with Image.open(BytesIO(data)) as file:
            file.load()
    except Exception as error:  # of broken files Pillow raises almost anything: SyntaxError, struct.error, TypeError
        raise ValueError(f"cannot be decoded ({error}); copy or unpack it again") from error
    return file


def shown_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of the image after its EXIF orientation, as `datasets.Image` decodes it."""
    if image.format == "TIFF":
        image.load()  # Pillow turns TIFFs itself, and only then
    width, height = image.size
    sideways = image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS
    return (height, width) if sideways else (width, height)


def apply_orientation(pixels: np.ndarray, orientation: int | None) -> np.ndarray:
    """pixels (H, W) or (H, W, 3) uint8 turned by an EXIF orientation, 1 ... 8; None and other numbers: unchanged."""
    if orientation not in range(2, 9):
        return pixels
    # Without the file's other EXIF tags: turning writes them again, which fails for some that cameras write.
    image = Image.fromarray(pixels)
    image.getexif()[ExifTags.Base.Orientation] = orientation
    return np.asarray(ImageOps.exif_transpose(image))


def decode_rgb(content: bytes) -> np.ndarray | None:
    """(H, W, 3) uint8 of an image file, turned by EXIF, by OpenCV as in the published code; None if it cannot.

    For bytes with a known checksum: of a file that is cut short OpenCV may return a part without an error.
    """
    import cv2

    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)


def decode_unchanged(content: bytes) -> np.ndarray | None:
    """Values as stored, (H, W) or with colours as (H, W, BGR), by OpenCV; None if it cannot. Else as `decode_rgb`."""
    import cv2

    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)


def decode_rgb_safely(content: bytes) -> np.ndarray:
    """(H, W, 3) uint8 of an unchecked image file, turned by EXIF; ValueError when it is broken."""
    image = decode_image(content)
    return apply_orientation(np.asarray(image.convert("RGB")), image.getexif().get(ExifTags.Base.Orientation))
