"""Datasets as a stream reads them: Parquet shards with the original image bytes, an index, a manifest, a card.

    OUT/data/train-00000-of-00097.parquet     rows of `features`; loads with load_dataset(OUT, streaming=True)
    OUT/index.parquet                         one small row per frame: where it lies and what it holds
    OUT/manifest.json                         how it was made, counts, skipped files, checksum of every file
    OUT/README.md                             dataset card; `push_to_hub` of the folder needs nothing else

A frame is reached in two ways. By Parquet: shard -> row group (row // ROW_GROUP_ROWS) -> row. Or directly: images and
labels are stored verbatim, so the index names the byte range of each in its shard, one read or HTTP range request
(`read_frame`). A folder that holds a manifest is whole: it was built under another name and renamed in the end.

Letters: R rows, K classes.
"""

import hashlib
import json
import mmap
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .files import check_fields, cut, parse_json, replace_file
from .label_maps import IGNORE_INDEX
from .remote import DamagedError, Storage

if TYPE_CHECKING:
    from datasets import Features

FORMAT_VERSION = 1
# A generic Parquet reader fetches whole row groups: small ones keep that, and the memory of the writer, small.
ROW_GROUP_ROWS = 16
_FILES = ("image", "label")
SHARD_NAME = re.compile(r"data/(train|validation|test)-\d{5,}-of-\d{5,}\.parquet")
# Key of the facts about a shard in its Parquet footer.
_FACTS = "tqdm_seg"


class StoredFrame(NamedTuple):
    """One frame as it is stored. `image` is None in a linked dataset, where `image_path` is the file's full path."""

    key: str
    scene: str
    height: int
    width: int
    image: bytes | None
    image_path: str
    label: bytes
    class_pixels: np.ndarray


class Shard(NamedTuple):
    """A finished shard: its manifest entry, the facts in its footer, its part of the index."""

    record: dict[str, Any]
    facts: dict[str, Any]
    index: pa.Table


def features(num_classes: int) -> "Features":
    """Columns of a shard. `label` is an 8-bit grey PNG of class ids with 255 ignored; class_pixels leaves out 255."""
    from datasets import Features, Image, List, Value

    return Features(
        {
            "image": Image(),
            "label": Image(),
            "key": Value("string"),
            "scene": Value("string"),
            "height": Value("int32"),
            "width": Value("int32"),
            "class_pixels": List(Value("int64"), length=num_classes),
        }
    )


def index_schema(num_classes: int) -> pa.Schema:
    """Columns of the index: the frame's shard and row in it, and for image and label offset, length and CRC-32.

    Offsets count bytes from the start of the shard file. In a linked dataset image_offset is -1; length and checksum
    are those of the linked file.
    """
    ranges = [(f"{name}_{what}", pa.int64()) for name in _FILES for what in ("offset", "bytes", "crc32")]
    return pa.schema(
        [
            ("split", pa.string()), ("shard", pa.int32()), ("row", pa.int32()), ("key", pa.string()),
            ("scene", pa.string()), ("height", pa.int32()), ("width", pa.int32()), *ranges,
            ("class_pixels", pa.list_(pa.int64(), num_classes)),
        ]
    )  # fmt: skip


# -- writing --------------------------------------------------------------------------------------------


def write_shard(path: Path, rows: Iterator[StoredFrame], num_classes: int, facts: dict[str, Any]) -> None:
    """Writes rows as they come, a row group at a time; `facts`, read after the last row, go into the footer.

    The file appears under its name when it is whole and on disk. Raises OSError (disk full, no permission).
    """
    schema = features(num_classes).arrow_schema
    with replace_file(path) as temporary, temporary.open("wb") as file:
        writer = pq.ParquetWriter(
            file, schema, compression="none", use_dictionary=["scene"], write_page_index=True,
            write_statistics=["key", "scene", "height", "width"],  # of images they would be copies
        )  # fmt: skip
        try:
            for group in _batches(rows, ROW_GROUP_ROWS):
                writer.write_table(_shard_table(group, schema))
            writer.add_key_value_metadata({_FACTS: json.dumps(facts, sort_keys=True)})
            writer.close()
        finally:
            writer.is_open = False  # else it tries to write the footer once more when it is collected


def _batches(rows: Iterator[StoredFrame], size: int) -> Iterator[list[StoredFrame]]:
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _shard_table(rows: list[StoredFrame], schema: pa.Schema) -> pa.Table:
    columns = {
        "image": [{"bytes": row.image, "path": row.image_path} for row in rows],
        "label": [{"bytes": row.label, "path": f"{Path(row.key).stem}.png"} for row in rows],
        "class_pixels": [row.class_pixels.tolist() for row in rows],
    } | {name: [getattr(row, name) for row in rows] for name in ("key", "scene", "height", "width")}
    return pa.table({name: columns[name] for name in schema.names}, schema)


def describe_shard(path: Path, split: str, number: int) -> Shard:
    """Reads a shard through: checksum, size, facts, and where every image and label lies.

    Raises OSError or ValueError (pyarrow.ArrowInvalid among it) for what `write_shard` has not written.
    """
    parts = []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        parquet = pq.ParquetFile(path)
        groups, first = parquet.metadata, 0
        for number_of_group in range(groups.num_row_groups):
            table = parquet.read_row_group(number_of_group)
            ranges = {name: _locate(table, name, groups.row_group(number_of_group), content) for name in _FILES}
            rows = table.num_rows
            columns = {
                "split": [split] * rows, "shard": [number] * rows, "row": range(first, first + rows),
                **{name: table[name] for name in ("key", "scene", "height", "width", "class_pixels")},
                **{f"{name}_{what}": values for name in _FILES for what, values in ranges[name].items()},
            }  # fmt: skip
            schema = index_schema(table.schema.field("class_pixels").type.list_size)
            parts.append(pa.table({name: columns[name] for name in schema.names}, schema))
            first += rows
        num_classes = parquet.schema_arrow.field("class_pixels").type.list_size
        record = {
            "file": f"data/{path.name}", "split": split, "shard": number, "rows": first, "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }  # fmt: skip
        facts = json.loads(parquet.metadata.metadata[_FACTS.encode()])
    return Shard(record, facts, pa.concat_tables([index_schema(num_classes).empty_table(), *parts]))


def _locate(table: pa.Table, name: str, group: Any, content: mmap.mmap) -> dict[str, list[int]]:
    """Offset, length and CRC-32 of every file of a row group's column."""
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    position = columns[f"{name}.bytes"].data_page_offset
    found: dict[str, list[int]] = {"offset": [], "bytes": [], "crc32": []}
    for value in table[name].to_pylist():
        data = value["bytes"]
        if data is None:
            data, offset = Path(value["path"]).read_bytes(), -1
        else:
            # Parquet's plain encoding: four bytes of length, then the value.
            found_at = content.find(struct.pack("<I", len(data)) + data, position)
            if found_at < 0:
                raise ValueError(f"{name}s are not stored verbatim; was the shard written by another program?")
            offset = found_at + 4
            position = offset + len(data)
        for what, number in (("offset", offset), ("bytes", len(data)), ("crc32", zlib.crc32(data))):
            found[what].append(number)
    return found


# -- reading --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Index:
    """Index of a finished dataset folder, read whole (25,000 frames: a few MB)."""

    folder: str
    manifest: dict[str, Any]
    table: pa.Table

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def class_pixels(self) -> np.ndarray:
        """(R, K) int64, labelled pixels of every class in every frame."""
        values = self.table["class_pixels"].combine_chunks().flatten().to_numpy()
        return values.reshape(len(self), len(self.manifest["classes"]))


# What is read of a manifest.
_MANIFEST = {
    "dataset": str, "classes": [str], "ignore_index": int, "rows": {str: int}, "class_pixels": {str: [int]},
    "index_sha256": str, "label_map": {"name": str, "sha256": str, "policy": str},
    "options": {"link": str | None}, "source": {"files": int, "bytes": int, "sha256": str},
    "shards": [{"file": str, "split": str, "shard": int, "rows": int, "bytes": int, "sha256": str}],
}  # fmt: skip


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Manifest of a folder or URL (hf://datasets/..., s3://...); raises FileNotFoundError for what is not finished.

    Raises ValueError naming the file when it is damaged, of another format, or names files that no prepare command
    writes, such as `../x`.
    """
    try:
        return Storage(folder).read("manifest.json", partial(_parsed, f"{folder}/manifest.json"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"{folder} holds no manifest.json, so it is no finished dataset; run `tqdm-seg prepare` (again: "
            "finished shards are kept); of images and masks `tqdm-seg prepare folder` makes one"
        ) from error


def _parsed(name: str, content: bytes) -> dict[str, Any]:
    fix = "copy the folder again, or prepare it again"
    try:
        manifest = parse_json(content, name, {"format": object}, fix)
        for field, wanted in (("format", FORMAT_VERSION), ("ignore_index", IGNORE_INDEX)):
            if manifest.get(field) != wanted:
                found = cut(manifest.get(field, "missing"))
                raise ValueError(f"{name}: {field} is {found}, this code reads {wanted}; prepare it again")
        check_fields(manifest, _MANIFEST, name, fix)
    except ValueError as error:
        raise DamagedError(str(error)) from error
    rows: dict[str, int] = {}
    for record in manifest["shards"]:
        rows[record["split"]] = rows.get(record["split"], 0) + record["rows"]
        if not SHARD_NAME.fullmatch(record["file"]):
            raise ValueError(
                f"{name} names the file {cut(repr(record['file']))}, which no prepare command writes; prepare it again"
            )
    if {split: count for split, count in rows.items() if count} != manifest["rows"]:
        raise ValueError(f"{name}: rows are {cut(manifest['rows'])}, those of the shards {cut(rows)}; {fix}")
    if len({*manifest["classes"]}) < len(manifest["classes"]):
        raise ValueError(f"{name}: classes names one twice, {cut(manifest['classes'])}; {fix}")
    return manifest


def read_index(folder: str | Path, split: str | None = None) -> Index:
    """Index of one split or of all; raises ValueError when the file is not the one that the manifest names."""
    manifest = read_manifest(folder)

    def whole(content: bytes) -> bytes:
        if hashlib.sha256(content).hexdigest() != manifest["index_sha256"]:
            raise DamagedError(
                f"{folder}/index.parquet is damaged or of another run than manifest.json; prepare the set again"
            )
        return content

    content = Storage(folder).read("index.parquet", whole)
    if split is not None and split not in manifest["rows"]:
        raise ValueError(
            f"{folder} has no split {split!r}, only {', '.join(manifest['rows'])}; name one of them, or prepare "
            "the data with a part held back"
        )
    # Not through a Python file object on several threads: with it the interpreter sometimes aborts at its end.
    table = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
    if split is not None:
        table = table.filter(pc.field("split") == split)
    return Index(str(folder), manifest, table)


def check_shards_exist(index: Index, split: str) -> None:
    """Raises OSError unless frames of the split can be read: no shard is missing, all have the sizes recorded.

    The first bad shard is named, or the web server that sends whole files only.
    """
    storage = Storage(index.folder)
    expected = {s["file"]: s["bytes"] for s in index.manifest["shards"] if s["split"] == split}
    with ThreadPoolExecutor(16) as pool:
        sizes = list(pool.map(storage.size, expected))
    for (name, wanted), size in zip(expected.items(), sizes, strict=True):
        if size != wanted:
            found = "is missing" if size is None else f"has {size} bytes, not {wanted}"
            raise FileNotFoundError(f"{storage.folder}/{name} {found}; copy it again, or run the prepare command again")
    if expected:
        storage.check_ranges(next(iter(expected)))


def read_frame(index: Index, row: int) -> tuple[bytes, bytes]:
    """Image file and label PNG of one frame, each by one read of its byte range; ValueError for damaged bytes.

    Raises FileNotFoundError, naming the file, for a shard or linked image that is missing. Remote storage is asked
    several times before that.
    """
    entry = index.table.slice(row, 1).drop_columns(["class_pixels"]).to_pylist()[0]
    shard = shard_file(index.manifest, entry["split"], entry["shard"])
    names = [name for name in _FILES if entry[f"{name}_offset"] >= 0]
    starts = [entry[f"{name}_offset"] for name in names]
    ends = [start + entry[f"{name}_bytes"] for start, name in zip(starts, names, strict=True)]

    def checked(name: str, content: bytes) -> bytes:
        if zlib.crc32(content) != entry[f"{name}_crc32"]:
            raise DamagedError(
                f"{name} of {entry['key']} in {index.folder}/{shard} is not what was written; run `tqdm-seg check`"
            )
        return content

    def all_checked(contents: list[bytes]) -> dict[str, bytes]:
        return {name: checked(name, content) for name, content in zip(names, contents, strict=True)}

    found = Storage(index.folder).ranges(shard, starts, ends, all_checked)
    if "image" not in found:
        found["image"] = checked("image", (Path(index.manifest["options"]["link"]) / entry["key"]).read_bytes())
    return found["image"], found["label"]


def shard_file(manifest: dict[str, Any], split: str, number: int) -> str:
    """Path of a shard under the dataset folder."""
    return shard_name(split, number, sum(shard["split"] == split for shard in manifest["shards"]))


def shard_name(split: str, number: int, total: int) -> str:
    """Name that `load_dataset` and the card's globs find."""
    return f"data/{split}-{number:05d}-of-{total:05d}.parquet"


def check_same_labels(manifests: Sequence[dict[str, Any]], same_classes: bool = True) -> None:
    """Raises ValueError unless all datasets have the same classes, and one variant of every kind of label map.

    same_classes: False allows other classes in maps of different kinds.
    """
    variants: dict[tuple[str, ...], dict[str, Any]] = {}
    decisions: dict[str, tuple[str, str]] = {}
    for manifest in manifests:
        first = manifests[0]
        if same_classes and manifest["classes"] != first["classes"]:
            raise ValueError(
                f"{manifest['dataset']} has the classes {', '.join(manifest['classes'])}, {first['dataset']} has "
                f"{', '.join(first['classes'])}; datasets of different class lists cannot be used together"
            )
        label_map = manifest["label_map"]
        kind = label_map["name"].split("/")[0]
        other = variants.setdefault((kind, *([] if same_classes else manifest["classes"])), label_map)
        if other["sha256"] != label_map["sha256"]:
            raise ValueError(
                f"{manifest['dataset']} was prepared under the label maps {other['name']} and {label_map['name']}; "
                "scores and models under one cannot be compared with the other's: prepare all with one"
            )
        decision = label_map["name"].split("/")[-1]
        if decision.startswith("traversable_"):  # over datasets, too
            before = decisions.setdefault("traversable", (decision, manifest["dataset"]))
            if decision != before[0]:
                raise ValueError(
                    f"{before[1]} was prepared as {before[0]}, {manifest['dataset']} as {decision}; other ground is "
                    "traversable in them: prepare all with one --map"
                )
