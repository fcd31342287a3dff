"""Is a prepared dataset folder what its manifest says? `tqdm-seg check` prints the first bad row of every bad shard."""

import sys

from ..commands import start

if __name__ == "__main__":
    sys.exit(start("check"))


import hashlib
import sys
import zlib
from functools import partial
from io import BytesIO
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from ..program import takes
from .folders import find
from .images import shown_size
from .label_maps import IGNORE_INDEX
from .options import CheckOptions
from .remote import Storage
from .shards import check_same_labels, read_index, read_manifest
from .workers import process_pool

_COMPARED = ("key", "scene", "height", "width", "class_pixels")  # columns that shards and index have in common


def find_problems(folder: str, workers: int) -> list[str]:
    """Everything that is wrong with the folder; raises FileNotFoundError or ValueError without manifest or index."""
    index = read_index(folder)
    manifest = index.manifest
    named = {record["file"] for record in manifest["shards"]}
    found = {f"data/{path.name}" for path in find(Path(folder) / "data", "*")} if Storage(folder).local else set()
    problems = [f"{name} is not in the manifest, but would be loaded; remove it" for name in sorted(found - named)]
    if sum(record["rows"] for record in manifest["shards"]) != len(index):
        problems.append(f"index.parquet has {len(index)} rows, the shards have another number")
    parts, first = [], 0
    for record in manifest["shards"]:  # the index has their order
        parts.append(index.table.slice(first, record["rows"]))
        first += record["rows"]
    check_shard = partial(find_problem, folder, len(manifest["classes"]))
    with tqdm(total=len(index), unit="frame", desc=PurePath(folder).name) as bar:
        for record, problem in zip(
            manifest["shards"], _map(check_shard, manifest["shards"], parts, workers), strict=True
        ):
            problems += [problem] if problem else []
            bar.update(record["rows"])
    return problems


def _map(check_shard: Any, records: list[dict[str, Any]], parts: list[pa.Table], workers: int) -> Any:
    if workers <= 1:
        yield from map(check_shard, records, parts)
        return
    with process_pool(min(workers, max(len(records), 1))) as pool:
        yield from pool.map(check_shard, records, parts)


def find_problem(folder: str | Path, num_classes: int, record: dict[str, Any], index: pa.Table) -> str | None:
    """What is wrong with a shard, naming the first bad row, or None. `index` holds the rows of this shard."""
    storage = Storage(folder)
    size = storage.size(record["file"])
    if size is None:
        return f"{record['file']} is missing; run the prepare command again"
    content = storage.read(record["file"], bytes, size)
    if len(content) != record["bytes"]:
        what = f"{record['file']} has {len(content)} bytes, not {record['bytes']}"
    elif hashlib.sha256(content).hexdigest() != record["sha256"]:
        what = f"{record['file']} has another checksum than the manifest"
    else:
        what = ""
    if index.num_rows != record["rows"]:
        return f"index.parquet has {index.num_rows} rows of {record['file']}, the manifest {record['rows']}"
    row = 0
    try:
        parquet = pq.ParquetFile(pa.BufferReader(content))
        if lacking := [name for name in (*_COMPARED, "image", "label") if name not in parquet.schema_arrow.names]:
            return f"{record['file']} lacks the columns {', '.join(lacking)}"
        for group in range(parquet.num_row_groups):
            for stored in parquet.read_row_group(group, use_threads=False).to_pylist():
                expected = index.slice(row, 1).to_pylist()[0]
                problem = _row_problem(stored, expected, num_classes)
                if problem:
                    return f"{record['file']} row {row} ({expected['key']}): {problem}" + (f"; {what}" if what else "")
                row += 1
    except (OSError, pa.ArrowException) as error:
        after = f" row {row} ({index['key'][row].as_py()})" if row < index.num_rows else ""
        return f"{record['file']}{after}: cannot be read ({error})" + (f"; {what}" if what else "")
    if row != record["rows"]:
        return f"{record['file']} has {row} rows, not {record['rows']}"
    return f"{what}, though every row is correct" if what else None


def _row_problem(stored: dict[str, Any], expected: dict[str, Any], num_classes: int) -> str | None:
    for name in _COMPARED:
        if stored[name] != expected[name]:
            return f"{name} is {stored[name]}, in the index {expected[name]}"
    for name in ("image", "label"):
        data = stored[name]["bytes"]
        if data is None:
            linked = Path(stored[name]["path"])
            if not linked.is_file():
                return f"the linked image {linked} is missing"
            data = linked.read_bytes()
        if zlib.crc32(data) != expected[f"{name}_crc32"]:
            return f"the {name} is not what was written"
        if name == "image":
            with Image.open(BytesIO(data)) as image:
                size = shown_size(image)
    labels = np.asarray(Image.open(BytesIO(stored["label"]["bytes"])))
    if labels.shape != (expected["height"], expected["width"]) or size != labels.shape[::-1]:
        return f"image {size} and label {labels.shape[::-1]} do not have the size recorded (width, height)"
    counts = np.bincount(labels.ravel(), minlength=IGNORE_INDEX + 1)
    strange = np.flatnonzero(counts[num_classes:IGNORE_INDEX]) + num_classes
    if len(strange):
        return f"the label holds the ids {strange.tolist()}, classes are 0 ... {num_classes - 1}"
    if counts[:num_classes].tolist() != expected["class_pixels"]:
        return f"the label has {counts[:num_classes].tolist()} pixels per class, recorded {expected['class_pixels']}"
    return None


@takes(CheckOptions)
def check(options: CheckOptions) -> None:
    """Checks the folders; raises ValueError that lists what is wrong."""
    check_same_labels([read_manifest(folder) for folder in options.folders])
    for folder in options.folders:
        problems = find_problems(folder, options.workers)
        if problems:
            raise ValueError(
                f"{folder} is damaged: {'; '.join(problems)}; delete damaged shards and run the same prepare command "
                "again: it makes the folder again"
            )
        print(f"{folder}: {len(read_index(folder))} frames, all correct", file=sys.stderr)
