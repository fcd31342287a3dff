"""Your own images and masks to shards: `tqdm-seg prepare folder`."""

import sys

from ...commands import start

if __name__ == "__main__":
    sys.exit(start("prepare folder"))


import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from ...program import takes
from ..class_files import read_classes
from ..folders import split_of, walk
from ..label_maps import LabelMap
from ..options import FolderOptions
from ..pairs import hold_out, hold_out_listed, read_pairs
from ..prepare import Pair, Source, first_folder, make_dataset
from ..scenes import frame_stamp, time_block

MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
# Folders of images and of masks that lie next to each other. The first pair is RELLIS-3D's, "image_data" ORFD's.
KNOWN_FOLDERS = (
    ("pylon_camera_node", "pylon_camera_node_label_id"), ("image_data", "gt_image"),
    ("JPEGImages", "SegmentationClass"),
    *((images, masks) for images in ("images", "image", "imgs", "img", "rgb")
      for masks in ("masks", "mask", "labels", "label", "annotations", "gt", "groundtruth")),
)  # fmt: skip


def scan(images: Path, masks: Path, suffix: str = ".png", folders: Sequence[str] = ()) -> list[Pair]:
    """All images; the scene is the folder that an image lies in, without its split.

    folders: names of those of images and of masks next to each other. Raises ValueError for first-level folders that
    are no splits, next to some that are.
    """
    found = []
    same = images.resolve() == masks.resolve()
    within = masks.relative_to(images) if not same and masks.is_relative_to(images) else None
    for image in walk(images):
        place = image.relative_to(images)
        if within is not None and place.is_relative_to(within):
            continue
        parts, of_image = list(place.parts[:-1]), list(place.parts[:-1])
        if same or folders:
            level = _image_folder(images, parts, [folders] if folders else KNOWN_FOLDERS)
            if level is None:
                continue
            at, name = level
            parts[at] = name
            del of_image[at]
        found.append((image, of_image, _mask(masks.joinpath(*parts), image.stem, suffix)))
    if not found and same:
        known = f"{folders[0]}/ and {folders[1]}/" if folders else "images/ and masks/"
        raise FileNotFoundError(f"{images} has no folders {known} next to each other; name yours with --folders")
    first = {folders[0] for _, folders, _ in found if folders}
    unknown = sorted(name for name in first if split_of(name) is None)
    if unknown and len(unknown) < len(first):
        raise ValueError(
            f"{images} has the splits {', '.join(sorted(first - set(unknown)))} and {', '.join(unknown[:3])}; move "
            "these folders into one of train, val and test or elsewhere, or list the frames with --pairs"
        )
    return [_pair(image, folders, mask) for image, folders, mask in found]


def _pair(image: Path, folders: Sequence[str], mask: Path) -> Pair:
    split = split_of(folders[0]) if folders else None
    return Pair(split or "train", "/".join(folders[1:] if split else folders), image, mask)


def _image_folder(root: Path, parts: Sequence[str], known: Iterable[Sequence[str]]) -> tuple[int, str] | None:
    """Which of the folders above an image is that of images, and the name of that of masks next to it."""
    for images, masks in known:
        for at in range(len(parts) - 1, -1, -1):
            if parts[at] == images and root.joinpath(*parts[:at], masks).is_dir():
                return at, masks
    return None


def _mask(folder: Path, stem: str, suffix: str) -> Path:
    """The mask of an image: with the suffix, in any case, else of another lossless format."""
    suffixes = [suffix, suffix.upper()]
    if suffix == ".png":
        suffixes += [other for kind in MASK_SUFFIXES[1:] for other in (kind, kind.upper())]
    candidates = [folder / f"{stem}{end}" for end in suffixes]
    return next((path for path in candidates if path.is_file()), candidates[0])


def choose_pairs(options: FolderOptions) -> list[Pair]:
    """The frames that the options choose, with their splits."""
    images, masks = first_folder(options.root, "."), first_folder(options.masks, ".")
    if options.pairs:
        pairs = [pair for path in options.pairs for pair in read_pairs(path, images, masks)]
    else:
        pairs = scan(images, masks, options.mask_suffix, options.folders)
    pairs = with_scenes(pairs, images, options.scene, options.scene_seconds)
    if options.hold_out is not None:
        return hold_out(pairs, images, options.hold_out, options.seed)
    return hold_out_listed(pairs, images, options.hold_out_scenes) if options.hold_out_scenes else pairs


def with_scenes(pairs: Sequence[Pair], images: Path, pattern: str | None, seconds: int | None) -> list[Pair]:
    """The pairs with scenes found in their names, or of so many seconds; ValueError for a name that has none."""
    if pattern is not None:
        pairs = [pair._replace(scene=_scene_in(pair.image.relative_to(images), pattern)) for pair in pairs]
    if seconds is not None:
        firsts: dict[str, int] = {}
        for pair in pairs:
            stamp = frame_stamp(pair.image.stem) or 0  # other names are refused below
            firsts[pair.scene] = min(stamp, firsts.get(pair.scene, stamp))
        pairs = [
            pair._replace(scene=time_block(pair.image.stem, firsts[pair.scene], seconds, pair.scene)) for pair in pairs
        ]
    return list(pairs)


def _scene_in(image: Path, pattern: str) -> str:
    match = re.search(pattern, image.with_suffix("").as_posix())
    if match is None or not (scene := match[1] if match.re.groups else match[0]):
        raise ValueError(f"--scene {pattern} finds nothing in {image}; give an expression that fits every frame")
    return scene


def _masks_hold(pairs: Iterable[Pair]) -> Literal["ids", "colours"]:
    """What the first mask holds, for class files that give both."""
    for pair in pairs:
        try:
            with Image.open(pair.label) as mask:
                return "colours" if mask.mode.startswith("RGB") else "ids"
        except OSError:
            continue
    return "colours"


@takes(FolderOptions)
def prepare_folder(options: FolderOptions) -> dict[str, Any]:
    """Prepares the dataset; returns its manifest."""
    source = Source(options.name, "Images and masks of a folder.", options.license)
    pairs = choose_pairs(options)
    return make_dataset(options, source, label_map_of(options, pairs), pairs)


def label_map_of(options: FolderOptions, pairs: Iterable[Pair]) -> LabelMap:
    """The label map of the class file, with the tolerance if there is one."""
    label_map = read_classes(options.class_file, _masks_hold(pairs))
    if not options.tolerance:
        return label_map
    policy = f"{label_map.policy}, but values within {options.tolerance} count as the nearest"
    return replace(label_map, tolerance=options.tolerance, policy=policy)
