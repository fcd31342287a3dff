"""From the labels of public datasets to class ids: which values mean which class, and how to read them without loss.

    labels = CITYSCAPES.labels(path.read_bytes())  # (H, W) uint8, 255 ignored

Every value that may occur has its entry; any other value is an error, never silently a class or ignored.
Facts: ids and colours from cityscapesScripts (MIT); GTA5, SYNTHIA, Mapillary and ORFD rules from the converters of
tqdm, DAFormer, RobustNet, Rein and OFF-Net.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image

from .images import decode_image, decode_unchanged
from .options import OffRoadMap

IGNORE_INDEX = 255

# The 19 classes in train-id order, with the colours of the Cityscapes palette.
STREET_PALETTE = {
    "road": (128, 64, 128), "sidewalk": (244, 35, 232), "building": (70, 70, 70), "wall": (102, 102, 156),
    "fence": (190, 153, 153), "pole": (153, 153, 153), "traffic light": (250, 170, 30), "traffic sign": (220, 220, 0),
    "vegetation": (107, 142, 35), "terrain": (152, 251, 152), "sky": (70, 130, 180), "person": (220, 20, 60),
    "rider": (255, 0, 0), "car": (0, 0, 142), "truck": (0, 0, 70), "bus": (0, 60, 100), "train": (0, 80, 100),
    "motorcycle": (0, 0, 230), "bicycle": (119, 11, 32),
}  # fmt: skip
STREET_CLASSES = tuple(STREET_PALETTE)
OFFROAD_CLASSES = ("non-traversable", "traversable")

# How a label file stores its values. A reader that does not fit loses them without an error: a palette PNG turned to
# grey gives luminance, a 16-bit one read as 8-bit gives zeros.
Reading = Literal["values", "red16", "blue", "colours"]


@dataclass(frozen=True)
class LabelMap:
    """Which stored value means which class.

    name: "<kind of label>/<variant>"; two variants of one kind must not be mixed in one training or comparison.
    reading: "values": grey value or palette index; "red16": red channel of a 16-bit RGB PNG; "blue": third channel of
        the image as RGB, so that 1- and 3-channel files read alike; "colours": RGB as one number 0xRRGGBB.
    table: (stored value, class id or 255) for every value that may occur.
    policy: in words, what is ignored and what is merged.
    counted: a class file gave names without ids, so 0, 1, ... were assumed.
    tolerance: a value without an entry counts as the nearest one that differs by this much at most (in every channel of
        a colour), for masks with smoothed edges; 0: it is an error.
    listed_in: file or option that the user lists the classes in.
    """

    name: str
    classes: tuple[str, ...]
    reading: Reading
    table: tuple[tuple[int, int], ...]
    policy: str
    counted: bool = False
    tolerance: int = 0
    listed_in: str = ""

    def __post_init__(self):
        if not 1 <= len(self.classes) <= IGNORE_INDEX:
            raise ValueError(
                f"{len(self.classes)} classes; an 8-bit label holds 1 to {IGNORE_INDEX}, as 255 is ignored"
            )

    @property
    def sha256(self) -> str:
        """Hash of all that decides the result: class names in order, reading and table, and a tolerance."""
        parts = [self.classes, self.reading, sorted(self.table)] + [self.tolerance] * (self.tolerance > 0)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def labels(self, content: bytes) -> np.ndarray:
        """(H, W) uint8 class ids, 255 ignored, of a label file's bytes. Raises as `read`."""
        return self.read(content)[0]

    def read(self, content: bytes) -> tuple[np.ndarray, int]:
        """(H, W) uint8 class ids, 255 ignored, of a label file's bytes, and how many pixels took the nearest value.

        Raises ValueError, to be read after the file's name, for a file that cannot be decoded, that stores its pixels
        in a way the map does not read, or that holds values without an entry.
        """
        values = _read_values(content, self.reading)
        labels = _lookup(self.table, 2**24 if self.reading == "colours" else 2**16)[values]  # -1: no entry
        moved = 0
        if self.tolerance and (labels < 0).any():
            moved = int((labels < 0).sum())
            strange, place = np.unique(values[labels < 0], return_inverse=True)
            labels[labels < 0] = self._nearest(strange)[place]
            moved -= int((labels < 0).sum())
        self._check_known(values, labels < 0)
        return labels.astype(np.uint8), moved

    def _nearest(self, values: np.ndarray) -> np.ndarray:
        """Class id (n,) int16 of the nearest stored value, -1 where none is within the tolerance."""
        known = np.array([value for value, _ in self.table])
        shifts = [16, 8, 0] if self.reading == "colours" else [0]
        mask = 255 if self.reading == "colours" else -1
        channels = [
            np.stack([part.astype(np.int64) >> shift & mask for shift in shifts], -1) for part in (values, known)
        ]
        found = np.empty(len(values), np.int16)
        ids = np.array([label for _, label in self.table], np.int16)
        for first in range(0, len(values), 4096):
            apart = np.abs(channels[0][first : first + 4096, None] - channels[1])  # (n, m, channels)
            nearest = (apart**2).sum(-1).argmin(-1)
            near = np.take_along_axis(apart.max(-1), nearest[:, None], 1)[:, 0] <= self.tolerance
            found[first : first + 4096] = np.where(near, ids[nearest], -1)
        return found

    def _check_known(self, values: np.ndarray, unknown: np.ndarray) -> None:
        if unknown.any():
            strange = np.unique(values[unknown]).tolist()
            row, column = np.argwhere(unknown)[0].tolist()
            shown = [f"({v >> 16}, {v >> 8 & 255}, {v & 255})" if self.reading == "colours" else v for v in strange[:8]]
            more = f" and {len(strange) - 8} more" if len(strange) > 8 else ""
            listed = self.listed_in or f"the label map {self.name}"
            raise ValueError(
                f"holds {'the colours' if self.reading == 'colours' else 'the ids'} "
                f"{', '.join(map(str, shown))}{more}, which {listed} does not know, "
                f"first at row {row}, column {column} ({unknown.sum()} of {unknown.size} pixels)"
                + (f"; add them to {listed}" if self.listed_in else "")
            )


@lru_cache(maxsize=4)
def _lookup(table: tuple[tuple[int, int], ...], size: int) -> np.ndarray:
    lookup = np.full(size, -1, np.int16)
    for value, label in table:
        lookup[value] = label
    return lookup


def _read_values(content: bytes, reading: Reading) -> np.ndarray:
    """(H, W) whole numbers as stored in the file."""
    image = decode_image(content)
    bits, channels = _stored_as(image, content)
    kind = f"{bits}-bit {image.format}"
    if reading == "colours" or reading == "blue":
        if bits == 16:
            raise ValueError(f"is a {kind}; 8-bit colours or grey values were expected")
        pixels = np.asarray(image.convert("RGB"))
        if reading == "blue":
            return pixels[..., 2]
        return (pixels.astype(np.uint32) << np.array([16, 8, 0], np.uint32)).sum(-1, dtype=np.uint32)
    if reading == "red16":
        if bits != 16 or channels != 3 or image.format != "PNG":
            raise ValueError(f"is a {kind} of {channels} channels; a 16-bit RGB PNG was expected (R = class id)")
        return decode_unchanged(content)[..., 2]  # blue, green, red
    if channels > 2:
        raise ValueError("holds colours, not ids; take the file with ids, or name the colour of every class")
    if bits == 16 and channels == 2:
        raise ValueError("is a 16-bit grey PNG with alpha; save it without alpha")
    pixels = np.asarray(image)
    pixels = pixels[..., 0] if pixels.ndim == 3 else pixels  # grey with alpha
    if image.mode == "L" and bits < 8:
        return pixels // (255 // (2**bits - 1))  # Pillow stretches 2- and 4-bit grey over 0 ... 255
    return pixels.astype(np.uint16 if bits == 16 else np.uint8)  # 1-bit grey is read as bool


def as_stored(classes: Sequence[str]) -> LabelMap:
    """The map of files whose values are the ids of these classes, 255 ignored."""
    table = tuple((i, i) for i in (*range(len(classes)), IGNORE_INDEX))
    policy = "labels hold class ids; 255 is ignored"
    return LabelMap("ids/as_they_are", tuple(classes), "values", table, policy, listed_in="the list of classes")


# Compressions of TIFF that change values, as Pillow names them.
_LOSSY = ("jpeg", "tiff_jpeg", "webp", "jpeg2000")


def _stored_as(image: Image.Image, content: bytes) -> tuple[int, int]:
    """Bits and channels of a lossless label file; ValueError for a format that may have changed the values."""
    lossy = image.info.get("compression") in _LOSSY
    if image.format not in ("PNG", "TIFF", "BMP") or lossy:
        raise ValueError(
            f"is {'a lossy TIFF' if lossy else 'no PNG, TIFF or BMP'}; other formats may have changed the values: "
            "export the masks again as PNG"
        )
    if image.format == "PNG":
        return content[24], {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[content[25]]
    known = {"1": (8, 1), "L": (8, 1), "P": (8, 1), "LA": (8, 2), "I;16": (16, 1), "I;16B": (16, 1),
             "RGB": (8, 3), "RGBA": (8, 4), "RGBX": (8, 4)}  # fmt: skip
    if image.mode not in known or getattr(image, "n_frames", 1) > 1:
        raise ValueError(
            f"is a {image.format} of mode {image.mode}, not one layer of whole numbers; save it as 8-bit PNG"
        )
    bits, channels = known[image.mode]
    stored = image.tag_v2.get(258, (8,))[0] if image.format == "TIFF" and image.mode == "L" else bits
    return min(bits, stored), channels


def _rest_ignored(classes: dict[int, int], known: range | tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((value, classes.get(value, IGNORE_INDEX)) for value in known)


_CITYSCAPES_IDS = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14, 28: 15,
    31: 16, 32: 17, 33: 18,
}  # fmt: skip
CITYSCAPES = LabelMap(
    "cityscapes_ids/19", STREET_CLASSES, "values", _rest_ignored(_CITYSCAPES_IDS, (*range(34), IGNORE_INDEX)),
    "the 19 evaluation classes; every other class is ignored, the licence plate (id -1, stored as 255) too",
)  # fmt: skip
# By index, not by colour: car and licence plate (34) share one.
GTA5 = LabelMap(
    "gta5_ids/19", STREET_CLASSES, "values", _rest_ignored(_CITYSCAPES_IDS, (*range(35), IGNORE_INDEX)),
    "the 19 evaluation classes of Cityscapes; every other class is ignored, the licence plate too",
)  # fmt: skip
TRAIN_IDS = LabelMap(
    "train_ids/19", STREET_CLASSES, "values", tuple((i, i) for i in (*range(19), IGNORE_INDEX)),
    "labels hold train ids already; 255 is ignored",
)  # fmt: skip
SYNTHIA = LabelMap(
    "synthia_ids/19", STREET_CLASSES, "red16",
    _rest_ignored(
        {3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 16: 9, 1: 10, 10: 11, 17: 12, 8: 13, 18: 14, 19: 15,
         20: 16, 12: 17, 11: 18}, range(23),
    ),
    "the 19 classes, of which terrain, truck and train never occur: score the other 16; the rest is ignored",
)  # fmt: skip

# Two maps from the 66 ids of Mapillary Vistas v1.2 are in use; scores under different maps cannot be compared.
_MAPILLARY_ROBUSTNET = {
    13: 0, 24: 0, 41: 0, 2: 1, 15: 1, 17: 2, 6: 3, 3: 4, 45: 5, 47: 5, 48: 6, 50: 7, 30: 8, 29: 9, 27: 10, 19: 11,
    20: 12, 21: 12, 22: 12, 55: 13, 61: 14, 54: 15, 58: 16, 57: 17, 52: 18,
}  # fmt: skip
_MAPILLARY_OPENSEG = _MAPILLARY_ROBUSTNET | {
    7: 0, 8: 0, 10: 0, 14: 0, 23: 0, 9: 1, 11: 1, 44: 5, 46: 7, 49: 7, 41: IGNORE_INDEX
}  # fmt: skip
MAPILLARY = {
    "robustnet": LabelMap(
        "mapillary_v1.2/robustnet", STREET_CLASSES, "values", _rest_ignored(_MAPILLARY_ROBUSTNET, range(66)),
        "map of RobustNet, TLDR, tqdm, DAFormer and HRDA: manholes are road; bike and service lanes, parking, "
        "crosswalks, curb cuts, pedestrian areas, street lights, backs and frames of signs are ignored",
    ),
    "openseg": LabelMap(
        "mapillary_v1.2/openseg", STREET_CLASSES, "values", _rest_ignored(_MAPILLARY_OPENSEG, range(66)),
        "name rule of openseg, used by Rein: bike lanes, crosswalks, parking and service lanes are road, curb cuts and "
        "pedestrian areas sidewalk, street lights pole, backs and frames of signs traffic sign; manholes are ignored",
    ),
}  # fmt: skip

# ORFD and ORAD-3D: 255 is traversable, black not, a grey in between (its value is not documented) unreachable, the sky.
_ORFD_WHITE = {value: 1 for value in range(201, 256)}
ORFD = {
    "merged": LabelMap(
        "orfd/merged", OFFROAD_CLASSES, "blue", tuple((value, _ORFD_WHITE.get(value, 0)) for value in range(256)),
        "traversable where the third colour channel is above 200, as published; all else is non-traversable and "
        "counts, the unreachable part (grey: sky) included",
    ),
    "ignored": LabelMap(
        "orfd/ignored", OFFROAD_CLASSES, "blue", ((0, 0), *_rest_ignored(_ORFD_WHITE, range(1, 256))),
        "traversable where the third colour channel is above 200, non-traversable where it is 0; the grey in between "
        "(unreachable: sky) is ignored, unlike in published scores",
    ),
}  # fmt: skip

# Off-road classes in the order of their ids, with the colours of the original masks (YCOR: palette; RUGD: its
# RUGD_annotation-colormap.txt). YCOR's white is background, RUGD's first colour void: both are ignored.
YCOR_COLOURS = {
    "smooth trail": (178, 176, 153), "traversable grass": (128, 255, 0), "rough trail": (156, 76, 30),
    "puddle": (255, 0, 128), "obstacle": (255, 0, 0), "non-traversable low vegetation": (0, 160, 0),
    "high vegetation": (40, 80, 0), "sky": (1, 88, 255),
}  # fmt: skip
RUGD_COLOURS = {
    "dirt": (108, 64, 20), "sand": (255, 229, 204), "grass": (0, 102, 0), "tree": (0, 255, 0), "pole": (0, 153, 153),
    "water": (0, 128, 255), "sky": (0, 0, 255), "vehicle": (255, 255, 0), "container": (255, 0, 127),
    "asphalt": (64, 64, 64), "gravel": (255, 128, 0), "building": (255, 0, 0), "mulch": (153, 76, 0),
    "rock-bed": (102, 102, 0), "log": (102, 0, 0), "bicycle": (0, 255, 128), "person": (204, 153, 255),
    "fence": (102, 0, 204), "bush": (255, 153, 204), "sign": (0, 102, 102), "rock": (153, 204, 255),
    "bridge": (102, 255, 255), "concrete": (101, 101, 11), "picnic-table": (114, 85, 47),
}  # fmt: skip
# What a robot may drive on: trails and other hard or bare ground, or grass as well.
TRAVERSABLE = {
    "trail_only": ("smooth trail", "rough trail", "dirt", "sand", "asphalt", "gravel", "mulch", "concrete"),
    "with_grass": ("smooth trail", "rough trail", "dirt", "sand", "asphalt", "gravel", "mulch", "concrete",
                   "traversable grass", "grass"),
}  # fmt: skip
# Names that none of COCO-Stuff's 171 words stands for, see lists/class_words.json.
_WITHOUT_WORD = ("obstacle", "pole", "container")


def off_road_map(dataset: Literal["ycor", "rugd"], choice: OffRoadMap, reading: Reading) -> LabelMap:
    """YCOR's or RUGD's own names, those of them that have a class vector, or traversable or not under two decisions.

    reading: "colours" of the original masks; "values": ids, YCOR's from 0 with 255 ignored, RUGD's from 1 with 0 void.
    """
    colours, void = (YCOR_COLOURS, (255,) * 3) if dataset == "ycor" else (RUGD_COLOURS, (0,) * 3)
    ignored = ["background" if dataset == "ycor" else "void"]
    if choice in TRAVERSABLE:
        classes = OFFROAD_CLASSES
        new = {name: int(name in TRAVERSABLE[choice]) for name in colours}
        policy = f"traversable: {', '.join(name for name in colours if new[name])}; all else is not"
    else:
        left_out = _WITHOUT_WORD if choice == "words" else ()
        classes = tuple(name for name in colours if name not in left_out)
        new = {name: classes.index(name) if name in classes else IGNORE_INDEX for name in colours}
        ignored += [name for name in colours if name in left_out]
        policy = "classes of the dataset"
    if reading == "colours":
        values = [int.from_bytes(bytes(colour), "big") for colour in (*colours.values(), void)]
    else:
        values = [*range(8), IGNORE_INDEX] if dataset == "ycor" else [*range(1, 25), 0]
    table = [*zip(values, [*new.values(), IGNORE_INDEX], strict=True)]
    if reading == "values" and dataset == "rugd":
        table.append((IGNORE_INDEX, IGNORE_INDEX))
    kind = dataset if reading == "colours" else f"{dataset}_ids"
    name = f"traversable_{choice}" if choice in TRAVERSABLE else choice
    return LabelMap(f"{kind}/{name}", classes, reading, tuple(table), f"{policy}; ignored: {', '.join(ignored)}")
