"""Predictions that any program saved as PNGs of class ids, by frame."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ..data.folders import walk
from ..data.label_maps import as_stored

# What the protocol says of predictions that were made elsewhere.
UNKNOWN = {
    "image_size": {},
    "resize": "not known",
    "mode": "predictions saved by another program",
    "window": None,
    "stride": None,
    "test_time_augmentation": "not known",
    "interpolation": "class ids as saved, at the size of the ground truth",
    "precision": "not known",
}


@dataclass(frozen=True)
class SavedPredictions:
    """The files of a set's frames: {key of the frame: PNG}, whose values are ids of `classes` or 255 for none."""

    files: dict[str, Path]
    classes: Sequence[str]

    @classmethod
    def of(cls, folder: Path, keys: Sequence[str], classes: Sequence[str]) -> "SavedPredictions":
        """The files of these frames: named as the frame, in its folders or some of them: val/a/0.png, a/0.png, 0.png.

        Raises FileNotFoundError for a frame without a file, ValueError for a file that fits several frames.
        """
        if not folder.is_dir():
            raise FileNotFoundError(f"folder not found: {folder}; give the PNGs of class ids by --predictions")
        found = {path.relative_to(folder).with_suffix("").as_posix(): path for path in walk(folder, (".png",))}
        frames: dict[str, list[str]] = defaultdict(list)
        files = {}
        for key in keys:
            parts = PurePosixPath(key.replace("\\", "/")).with_suffix("").parts
            ends = ("/".join(parts[first:]) for first in range(len(parts)))
            end = next((end for end in ends if end in found), None)
            if end is None:
                raise FileNotFoundError(
                    f"{folder} has no prediction of frame {key}; save it as {folder / parts[-1]}.png, or give another "
                    f"folder ({len(found)} PNGs are in this one)"
                )
            files[key] = found[end]
            frames[end].append(key)
        for end, fitting in frames.items():
            if len(fitting) > 1:
                raise ValueError(
                    f"{found[end]} fits {len(fitting)} frames, such as {fitting[0]} and {fitting[1]}; save predictions "
                    "in the frames' folders"
                )
        return cls(files, classes)

    def check_sizes(self, sizes: dict[str, tuple[int, int]]) -> None:
        """Raises ValueError for a file of another size than its frame's (height, width); reads headers only."""
        for key, (height, width) in sizes.items():
            path = self.files[key]
            try:
                with Image.open(path) as image:
                    found = image.size
            except OSError as error:
                raise ValueError(f"{path} is no PNG or damaged; save the prediction again") from error
            if found != (width, height):
                raise ValueError(
                    f"{path} has {found[1]}x{found[0]} pixels, the ground truth of {key} {height}x{width} (height x "
                    "width); enlarge the scores to that size before taking the class"
                )

    def ids(self, key: str) -> np.ndarray:
        """The ids (h, w) uint8 of a frame; raises ValueError naming the file for values that are no class."""
        path = self.files[key]
        try:
            return as_stored(self.classes).labels(path.read_bytes())
        except ValueError as error:
            names = f"classes have the ids 0 to {len(self.classes) - 1}, and 255 is none; see --class-names"
            raise ValueError(f"{path} {error}; {names}") from error

    def digest(self) -> str:
        """SHA-256 of all files with their frames and classes, which tells these predictions from others."""
        digest = sha256(repr(list(self.classes)).encode())
        for key, path in self.files.items():
            digest.update(f"{key}\0".encode() + sha256(path.read_bytes()).digest())
        return digest.hexdigest()
