"""Frames of prepared datasets, and of others that `datasets` reads.

Letters: H, W image.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from .files import cut
from .images import decode_rgb, decode_unchanged, read_rgb
from .label_maps import LabelMap, as_stored
from .shards import check_shards_exist, read_frame, read_index

# A set smaller than this is kept decoded in memory, once per loader process.
CACHE_BYTES = 256 * 2**20


class Frame(NamedTuple):
    """One decoded frame: image (H, W, 3) uint8 RGB, labels (H, W) uint8 class ids with 255 ignored."""

    key: str
    scene: str
    image: np.ndarray
    labels: np.ndarray


class FrameDataset(Dataset):
    """Decoded frames of one split of a prepared dataset, in the order of its index.

    folder: what `tqdm-seg prepare` made: a local folder or any URL that fsspec reads (hf://, s3://, https://).
    Frames are read one by one by their byte ranges; a small set is then kept in memory.
    Raises FileNotFoundError for an unfinished folder and missing shards, ValueError for a missing split.
    """

    def __init__(self, folder: str, split: str):
        self.index = read_index(folder, split)
        check_shards_exist(self.index, split)
        self.folder, self.split = folder, split
        self.classes: list[str] = self.index.manifest["classes"]
        self.label_map: dict[str, str] = self.index.manifest["label_map"]
        # What the data is, wherever it lies: the index holds keys, sizes and checksums of all frames.
        self.identity: str = self.index.manifest["index_sha256"]
        self.keys: list[str] = self.index.table["key"].to_pylist()
        self.scenes: list[str] = self.index.table["scene"].to_pylist()
        sides = (self.index.table[side].to_numpy().astype(np.int64) for side in ("height", "width"))
        size = 4 * int(np.multiply(*sides).sum())  # three bytes of colour and one of label
        self.cache: dict[int, Frame] | None = {} if size <= CACHE_BYTES else None

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, row: int) -> Frame:
        if self.cache is None:
            return self._read(row)
        if row not in self.cache:
            self.cache[row] = self._read(row)
        return self.cache[row]

    def _read(self, row: int) -> Frame:
        image, label = read_frame(self.index, row)
        pixels = decode_rgb(image, f"image {self.keys[row]} of {self.folder}")
        return Frame(self.keys[row], self.scenes[row], pixels, decode_unchanged(label))

    def labels(self, row: int) -> np.ndarray:
        """The labels (H, W) uint8 of a frame, its image not decoded."""
        return decode_unchanged(read_frame(self.index, row)[1])


def frame_loader(
    frames: "FrameDataset | PlainRows", workers: int, process: int = 0, processes: int = 1
) -> Iterable[Frame]:
    """The part of all frames that one process evaluates, in order and unchanged: each frame in one process, once."""
    if isinstance(frames, PlainRows):
        return frames.frames(process, processes)
    return DataLoader(
        frames, batch_size=None, sampler=range(process, len(frames), processes), num_workers=workers, collate_fn=_same
    )


def _same(frame: Frame) -> Frame:
    return frame


# -- data without an index ------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlainRows:
    """Any dataset with an image and a label column, in the order in which `datasets` streams it.

    source: folder, Hub repository or URL for `load_dataset`. classes: their names in id order; labels hold these ids,
    255 is ignored. Without an index there is no rare-class sampling, and going on from a step reads all rows before it.
    """

    source: str
    split: str
    classes: tuple[str, ...]
    image: str = "image"
    label: str = "label"

    @property
    def label_map(self) -> dict[str, str]:
        """Name and policy, as the manifest of a prepared dataset has them."""
        return {"name": self._ids.name, "policy": self._ids.policy}

    @property
    def _ids(self) -> LabelMap:
        return as_stored(self.classes)

    def rows(self, process: int = 0, processes: int = 1, shuffle_seed: int | None = None) -> Iterator[dict[str, Any]]:
        """Undecoded rows of one process: of one epoch, or with a seed endless, in another order every epoch.

        Rows are divided here, once. Raises ValueError for a missing column, or one that holds no images.
        """
        import datasets
        from datasets.distributed import split_dataset_by_node

        try:
            rows = datasets.load_dataset(self.source, split=self.split, streaming=True)
        except (OSError, ValueError) as error:
            what = f"cannot read {self.source}, split {self.split} ({cut(error, 100)})"
            raise ValueError(f"{what}; choose data that datasets.load_dataset reads, and one of its splits") from error
        columns = rows.features or rows._resolve_features().features or {}
        for column, flag in ((self.image, "--image-column"), (self.label, "--label-column")):
            if column not in columns:
                raise ValueError(f"{self.source} has no column {column!r}, only {', '.join(columns)}; see {flag}")
            if not _holds_files(columns[column]):
                raise ValueError(
                    f"column {column!r} of {self.source} holds {cut(columns[column])}, expected images; name "
                    "the column of the masks by --label-column, that of the images by --image-column"
                )
            rows = rows.cast_column(column, datasets.Image(decode=False))
        if shuffle_seed is None:
            yield from split_dataset_by_node(rows, process, processes)
            return
        # By shards and within a buffer: the same every time, so skipping rows restores the state.
        rows = split_dataset_by_node(rows.shuffle(shuffle_seed, buffer_size=256), process, processes)
        epoch = 0
        while True:
            rows.set_epoch(epoch)
            empty = True
            for row in rows:
                empty = False
                yield row
            if empty:
                raise ValueError(f"{self.source}, split {self.split}, has no row for process {process} of {processes}")
            epoch += 1

    def frames(self, process: int = 0, processes: int = 1) -> Iterator[Frame]:
        """Every frame of one process, in order and unchanged."""
        for number, row in enumerate(self.rows(process, processes)):
            yield self.frame(row, number)

    def file(self, row: dict[str, Any]) -> bytes:
        """The bytes of the row's image file."""
        return _file_bytes(row[self.image])

    def frame(self, row: dict[str, Any], number: int) -> Frame:
        """The decoded frame; its key is the row's "key", else the file name, else its number."""
        image, label = (_file_bytes(row[column]) for column in (self.image, self.label))
        key = str(row.get("key") or row[self.image].get("path") or number)
        pixels = read_rgb(image, f"image of {key} in {self.source}")
        try:
            labels = self._ids.labels(label)
        except ValueError as error:
            raise ValueError(
                f"label of {key} in {self.source} {error}; --class-names gives {len(self.classes)} names in id order"
            ) from error
        if pixels.shape[:2] != labels.shape:
            raise ValueError(
                f"label of {key} in {self.source} is {labels.shape[1]}x{labels.shape[0]}, its image "
                f"{pixels.shape[1]}x{pixels.shape[0]} (width x height); use the label that was drawn on this image"
            )
        return Frame(key, str(row.get("scene") or ""), pixels, labels)


def _holds_files(feature: Any) -> bool:
    """Whether a column's type is an image, a path, or the bytes of a file."""
    kind = type(feature).__name__
    if kind == "Value":
        return feature.dtype in ("string", "large_string", "binary", "large_binary")
    return kind == "Image" or (isinstance(feature, dict) and {"bytes", "path"} <= set(feature))


def _file_bytes(value: dict[str, Any]) -> bytes:
    if value["bytes"] is not None:
        return value["bytes"]
    with open(value["path"], "rb") as file:
        return file.read()
