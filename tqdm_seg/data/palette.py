"""Colours of classes, overlays, and legends."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's colours, which people with colour vision deficiencies can tell apart.
_FIRST_COLOURS = [
    (213, 94, 0), (0, 158, 115), (86, 180, 233), (230, 159, 0), (204, 121, 167), (0, 114, 178), (240, 228, 66),
]  # fmt: skip


def class_colours(num_classes: int) -> np.ndarray:
    """One RGB colour per class (K, 3) uint8; an id has the same colour in every class list.

    After the first seven, each colour is the vivid one farthest from all before it, in the OKLab space.
    """
    levels = np.linspace(0, 255, 12).round().astype(np.uint8)
    candidates = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3)
    seen = _oklab(candidates)
    vivid = (np.hypot(seen[:, 1], seen[:, 2]) > 0.1) & (seen[:, 0] > 0.35)  # grey and black are invisible over an image
    candidates, seen = candidates[vivid], seen[vivid]
    colours = [np.array(colour, np.uint8) for colour in _FIRST_COLOURS[:num_classes]]
    distance = np.full(len(seen), np.inf)
    for i in range(num_classes):
        if i == len(colours):
            colours.append(candidates[distance.argmax()])
        distance = np.minimum(distance, np.linalg.norm(seen - _oklab(colours[i]), axis=-1))
    return np.array(colours).reshape(-1, 3)


def _oklab(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 sRGB -> (..., 3) lightness and two colour axes (bottosson.github.io/posts/oklab)."""
    rgb = rgb / 255
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    cones = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    axes = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.cbrt(linear @ np.transpose(cones)) @ np.transpose(axes)


def tint(image: Image.Image, ids: np.ndarray, num_classes: int) -> Image.Image:
    """The RGB image mixed half and half with the colours of its class ids (h, w), which are resized to it.

    Pixels of unknown ids keep their colour.
    """
    ids = np.asarray(Image.fromarray(ids.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST))
    known = ids < num_classes
    colours = class_colours(num_classes)[np.where(known, ids, 0)]
    pixels = np.asarray(image)
    return Image.fromarray(np.where(known[..., None], pixels * 0.5 + colours * 0.5, pixels).astype(np.uint8))


def legend(class_names: dict[int, str], width: int) -> Image.Image:
    """A white strip of this width with a swatch and the name of every class, in as many rows as needed.

    The text grows with the width, so that it stays readable when the image is scaled down. A name that is too long
    makes the strip wider.
    """
    size = max(14, round(width / 60))
    gap, font = size // 2, ImageFont.load_default(size)
    needs = [2 * size + round(font.getlength(name)) for name in class_names.values()]
    width = max(width, max(needs) + 2 * gap)
    places, left, top = [], gap, gap
    for need in needs:
        if left > gap and left + need + gap > width:
            left, top = gap, top + 2 * size
        places.append((left, top))
        left += need + size
    strip = Image.new("RGB", (width, top + size + gap), "white")
    draw, colours = ImageDraw.Draw(strip), class_colours(max(class_names) + 1).tolist()
    for (index, name), (left, top) in zip(class_names.items(), places, strict=True):
        draw.rectangle((left, top, left + size, top + size), fill=tuple(colours[index]), outline="black")
        draw.text((left + size + gap, top + size / 2), name, "black", font, anchor="lm")
    return strip
