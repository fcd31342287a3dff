"""Image files to pixels: `read_rgb` for any, `decode_rgb` for those of known checksums, faster and with equal pixels.

What each kind of image becomes is stated in `images_tqdm.as_rgb`. OpenCV is imported only where it decodes.
"""

from io import BytesIO

import numpy as np
from PIL import Image

from tqdm_seg.images_tqdm import apply_orientation, decode_image, orientation
from tqdm_seg.images_tqdm import as_rgb as read_rgb

__all__ = [
    "apply_orientation", "decode_image", "decode_rgb", "decode_unchanged", "orientation", "read_rgb", "shown_size",
]  # fmt: skip

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
# Of PNGs with these words Pillow and OpenCV may differ: orientations by EXIF or XMP, animations.
_DIFFER = (b"eXIf", b"exif", b"adobe.xmp", b"acTL")


def decode_rgb(content: bytes, name: str = "image") -> np.ndarray:
    """`read_rgb` of a file's bytes, by OpenCV where it decodes to the same pixels: upright PNG, grey and RGB JPEG.

    For bytes with a known checksum: of a file that is cut short OpenCV may return a part without an error.
    """
    import cv2

    if _opencv_agrees(content):
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
        if pixels is not None:
            return pixels
    return read_rgb(content, name)


def _opencv_agrees(content: bytes) -> bool:
    """Whether OpenCV decodes the file as Pillow does; looks at its header only."""
    if content.startswith(_PNG):
        return not any(word in content for word in _DIFFER)
    if not content.startswith(_JPEG):
        return False
    try:
        with Image.open(BytesIO(content)) as image:
            return image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB") and orientation(image) == 1
    except Exception:  # broken: `read_rgb` says how
        return False


def decode_unchanged(content: bytes) -> np.ndarray | None:
    """Values as stored, (H, W) or with colours as (H, W, BGR), by OpenCV; None if it cannot. Else as `decode_rgb`."""
    import cv2

    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)


def shown_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of the image after its EXIF orientation, as `datasets.Image` decodes it."""
    if image.format == "TIFF":
        image.load()  # Pillow turns TIFFs itself, and only then
    width, height = image.size
    return (height, width) if orientation(image) >= 5 else (width, height)
