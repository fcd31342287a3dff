"""Per-frame tables: the pixel counts of every scored frame, from which all scores follow without the model.

    frames.parquet    frame, scene, attributes ..., counts; class names and protocol inside
    frames.csv        frame, scene, attributes ..., 0-0, 0-1, 1-0, 1-1 (ground truth-prediction), 0-none, 1-none where
                      no class was predicted; class names and protocol in frames.csv.json, which may be missing

`scores(torch.from_numpy(table.counts.sum(0)), table.classes)` are those of the whole set.

`read_table` also reads the CSVs of two other programs, whose first column names the frame:

    ,0-0,0-1,1-0,1-1,weather,road,light,scene
    ,scene,class0_intersect,class0_union,class0_pred_label,class0_label,class1_...,weather,road,light

and sums of rows of any of these, with a column n_frames instead of the frame's name. Columns come in any order. Text
columns that are neither name nor count become attributes.

While an evaluation runs, `save_batch` writes counts of some frames and `read_scored` reads what there is, so that any
number of processes continues from what any other number has done.

Letters: R rows, N frames, K classes.
"""

import csv
import io
import json
import math
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from ..data.files import cut, parse_json, write_file
from .class_sets import class_set, renumbering

# Ground truth and prediction, as in 0-1 and 0-none.
_CELL = re.compile(r"(0|[1-9]\d*)-(0|[1-9]\d*|none)")
_CLASS = re.compile(r"class(0|[1-9]\d*)_(\w+)")
_CLASS_TOTALS = ("intersect", "union", "pred_label", "label")
# Key of classes and protocol in the Parquet file.
_FACTS = b"tqdm_seg"
_FIELDS = {"classes": [str], "protocol": {"class_set?": {"name": str, "classes": [str]}}}
# A float64 holds every whole number below this; no table has more pixels in a cell.
_LARGEST = 2**53


@dataclass(eq=False)
class FrameTable:
    """Pixel counts of R frames, checked: raises ValueError naming row and column for what cannot be counts of frames.

    frames: unique names, or all empty where a row sums several frames, of which num_frames (R,) int64 says how many.
    scenes: one per row, all empty in sets without scenes. attributes: {name: a value per row}.
    counts (R, K, K + 1) int64 as `metrics.confusion_matrix` lays them out. protocol: JSON-ready, as evaluated.
    """

    frames: list[str]
    scenes: list[str]
    attributes: dict[str, list[str]]
    counts: np.ndarray
    classes: list[str]
    protocol: dict[str, Any]
    num_frames: np.ndarray | None = None

    @property
    def class_set(self) -> tuple[str, ...]:
        """The classes that means are over, as the protocol says; none for all."""
        return tuple(self.protocol.get("class_set", {}).get("classes", ()))

    def with_class_set(self, text: str | None) -> "FrameTable":
        """The same counts whose means are over the classes of a set; raises ValueError for one there is not."""
        facts = {name: value for name, value in self.protocol.items() if name != "class_set"}
        chosen = class_set(text, self.classes)
        return replace(
            self, protocol=facts | ({"class_set": {"name": text, "classes": list(chosen)}} if chosen else {})
        )

    def restricted(self, names: Sequence[str]) -> "FrameTable":
        """The counts of some of the classes: without the pixels of others, which are no class where predicted."""
        numbers = renumbering(self.classes, names)[: len(self.classes)].tolist()
        order = [numbers.index(number) for number in range(len(names))]
        rows = self.counts[:, order]
        kept = rows[:, :, order]
        counts = np.concatenate([kept, (rows.sum(-1) - kept.sum(-1))[..., None]], -1)
        facts = {name: value for name, value in self.protocol.items() if name != "class_set"}
        if "labels" in facts:
            labels = {name: value for name, value in facts["labels"].items() if name != "left_out"}
            facts["labels"] = labels | {"classes": {str(number): name for number, name in enumerate(names)}}
        return replace(self, counts=counts, classes=list(names), protocol=facts)

    def __post_init__(self):
        rows, classes = len(self.frames), len(self.classes)
        if not rows:
            raise ValueError("the table holds no row; evaluate at least one frame")
        if len({*self.classes}) < classes or not {*self.class_set} <= {*self.classes}:
            words = f"classes {cut(self.classes)}, class set {cut(self.class_set)}"
            raise ValueError(f"{words}: a name is there twice or unknown; name each class once")
        if self.counts.shape != (rows, classes, classes + 1) or self.counts.dtype != np.int64:
            raise ValueError(
                f"{rows} frames of {classes} classes need counts ({rows}, {classes}, {classes + 1}) int64, not "
                f"{self.counts.shape} {self.counts.dtype}"
            )
        for name, column in {"scene": self.scenes, **self.attributes}.items():
            if len(column) != rows:
                raise ValueError(f"column {name!r} has {len(column)} values for {rows} rows; give one per row")
        for name in self.attributes:
            if _is_ours(name):
                raise ValueError(f"an attribute cannot be called {name!r}, as another column is; rename it")
        self._check_names()
        self._check_numbers()

    def _check_names(self) -> None:
        if any(self.frames):
            name, times = Counter(self.frames).most_common(1)[0]
            if "" in self.frames:
                raise ValueError(f"row {self.frames.index('') + 1} has no name in column 'frame'; name every frame")
            if times > 1:
                first = self.frames.index(name)
                both = f"rows {first + 1} and {self.frames.index(name, first + 1) + 1}"
                raise ValueError(f"frame {name!r} is in {both}; remove one, or it is counted twice")
        elif self.num_frames is None:
            raise ValueError("the rows have no names in column 'frame', and no n_frames; name every frame")
        if any(self.scenes) and "" in self.scenes:
            row = self.scenes.index("")
            raise ValueError(f"row {row + 1} has no scene while others have; fill column 'scene'")

    def _check_numbers(self) -> None:
        if self.num_frames is None:
            self.num_frames = np.ones(len(self.frames), np.int64)
        _check(self.num_frames[:, None] < 1, ["n_frames"], "is no number of frames; it must be 1 or more")
        cells = self.counts.reshape(len(self.frames), -1)
        _check(cells < 0, _cells(len(self.classes)), "is negative; count the pixels again")
        _check(cells >= _LARGEST, _cells(len(self.classes)), f"is no count of pixels, which are below {_LARGEST}")


def read_table(path: str | Path) -> FrameTable:
    """The table in a .parquet or .csv file, of any layout that this file's docstring names.

    Raises ValueError that names file, row (from 1, without the header), column and what to do; OSError if unreadable.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"file not found: {path}")
    _check_suffix(path)
    try:
        return _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read ({cut(error, 80)}); copy it again, or evaluate again") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_table(path: str | Path, table: FrameTable) -> None:
    """Writes .parquet, or .csv with its .csv.json, each whole or not at all; OSError if it cannot be written.

    A CSV never gets the .csv.json of another table: after a crash it has at worst none.
    """
    path = Path(path)
    _check_suffix(path)
    facts = {"classes": table.classes, "protocol": table.protocol}
    if path.suffix.lower() == ".parquet":
        write_file(path, _parquet_bytes(table, json.dumps(facts)))
        return
    content = pa.BufferOutputStream()
    pa_csv.write_csv(_csv_columns(table), content)
    _facts_path(path).unlink(missing_ok=True)
    write_file(path, content.getvalue())
    write_file(_facts_path(path), (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode())


# -- Parquet --------------------------------------------------------------------------------------------


def _parquet_bytes(table: FrameTable, facts: str) -> bytes:
    size = len(table.classes) * (len(table.classes) + 1)
    counts = pa.FixedSizeListArray.from_arrays(pa.array(table.counts.reshape(-1)), size)
    columns = pa.table({**_name_columns(table), "counts": counts})
    content = pa.BufferOutputStream()
    columns = columns.replace_schema_metadata({_FACTS: facts})
    # Of counts, which hardly repeat, a dictionary would only cost time.
    pq.write_table(columns, content, compression="zstd", use_dictionary=["scene", *table.attributes])
    return content.getvalue()


def _read_parquet(path: Path) -> FrameTable:
    # Not through a Python file object on several threads: with it the interpreter sometimes aborts at its end.
    table = pq.ParquetFile(pa.BufferReader(path.read_bytes())).read(use_threads=False)
    _need(table.column_names, ["scene", "counts"])
    kind = table.schema.field("counts").type
    if not (pa.types.is_fixed_size_list(kind) and pa.types.is_integer(kind.value_type)):
        raise ValueError(f"column 'counts' is {kind}, not a list of K x (K + 1) whole numbers; write it by write_table")
    counts = table["counts"].combine_chunks()
    if counts.null_count or counts.flatten().null_count:
        raise ValueError("column 'counts' has empty cells; count the pixels of the frames again")
    classes = (math.isqrt(4 * kind.list_size + 1) - 1) // 2
    if classes * (classes + 1) != kind.list_size:
        raise ValueError(f"column 'counts' has {kind.list_size} numbers per row, which is K x (K + 1) for no K")
    numbers = counts.flatten().cast(pa.int64()).to_numpy().reshape(len(table), classes, classes + 1)
    facts = (table.schema.metadata or {}).get(_FACTS)
    return _table(
        table, numbers, _read_facts(facts, "the file's metadata") if facts else {}, _frame_column(table.column_names)
    )


# -- CSV ------------------------------------------------------------------------------------------------


def _csv_columns(table: FrameTable) -> pa.Table:
    cells = table.counts.reshape(len(table.frames), -1)
    names = _cells(len(table.classes))
    kept = [i for i, name in enumerate(names) if not name.endswith("none") or cells[:, i].any()]
    return pa.table({**_name_columns(table), **{names[i]: cells[:, i] for i in kept}})


def _read_csv(path: Path) -> FrameTable:
    content = path.read_bytes()
    header = _header(content)
    text = {name: pa.string() for name in header if not _is_number(name)}
    try:
        table = pa_csv.read_csv(
            pa.BufferReader(content),
            read_options=pa_csv.ReadOptions(use_threads=False),
            parse_options=pa_csv.ParseOptions(newlines_in_values=True),
            convert_options=pa_csv.ConvertOptions(column_types=text),
        )
    except pa.ArrowInvalid as error:
        raise ValueError(f"{error}; save it as UTF-8 CSV with as many fields in every row as in the header") from error
    numbers = _from_cells(table) if any(map(_CELL.fullmatch, header)) else _from_class_totals(table)
    facts = _facts_path(path)
    known = _read_facts(facts.read_bytes(), facts.name) if facts.exists() else {}
    return _table(table, numbers, known, _frame_column(header))


def _header(content: bytes) -> list[str]:
    if not content.strip():
        raise ValueError("the file is empty; it must hold a header and a row per frame")
    try:
        header = next(csv.reader([content.split(b"\n", 1)[0].decode("utf-8-sig").rstrip("\r")]))
    except UnicodeDecodeError as error:
        raise ValueError(f"the header is no UTF-8 text ({error.reason}); save it as UTF-8 CSV") from error
    name, times = Counter(header).most_common(1)[0]
    if times > 1:
        raise ValueError(f"column {name!r} is listed {times} times; remove all but one")
    _need(header, ["scene"])
    return header


def _from_cells(table: pa.Table) -> np.ndarray:
    """Counts (R, K, K + 1) from columns such as 0-1."""
    given = [name for name in table.column_names if _CELL.fullmatch(name)]
    classes = len({name.split("-")[0] for name in given})
    names = _cells(classes)
    _need(table.column_names, [name for name in names if not name.endswith("none")])
    strange = [name for name in given if name not in names]
    if strange:
        raise ValueError(
            f"column {strange[0]!r} predicts a class that has no ground-truth columns; add those of every class"
        )
    missing = np.zeros(len(table), np.int64)  # 0-none may be left out
    columns = [_whole_numbers(table, name) if name in table.column_names else missing for name in names]
    return np.stack(columns, 1).reshape(len(table), classes, classes + 1)


def _from_class_totals(table: pa.Table) -> np.ndarray:
    """Counts (R, 2, 3) from columns such as class0_union."""
    found = {int(match[1]) for name in table.column_names if (match := _CLASS.fullmatch(name))}
    if not found:
        raise ValueError(
            "there are no columns of counts, neither 0-0, 0-1, ... nor class0_intersect, class0_union, ..."
        )
    if found != {0, 1}:
        raise ValueError(
            "columns such as class0_union determine the confusion matrix of two classes, 0 and 1, only, not of "
            f"{', '.join(map(str, sorted(found)))}; give columns 0-0, 0-1, ... (ground truth-prediction)"
        )
    names = [[f"class{k}_{total}" for total in _CLASS_TOTALS] for k in (0, 1)]
    _need(table.column_names, sum(names, []))
    values = [[_whole_numbers(table, name) for name in of_class] for of_class in names]
    (hits0, union0, predicted0, true0), (hits1, union1, predicted1, true1) = values
    for (hits, union, predicted, true), of_class in zip(values, names, strict=True):
        why = f"is not {of_class[2]} + {of_class[3]} - {of_class[0]}; take the counts from one evaluation"
        _check((union != predicted + true - hits)[:, None], of_class[1:2], why)
    # What was predicted as the other class, and what as none.
    wrong0, wrong1 = predicted1 - hits1, predicted0 - hits0
    counts = np.stack([hits0, wrong0, true0 - hits0 - wrong0, wrong1, hits1, true1 - hits1 - wrong1], 1)
    sums = ["class1_pred_label", "class0_label", "class0_pred_label", "class1_label"]
    _check(counts[:, [1, 2, 3, 5]] < 0, sums, "is too small or too large for the other counts of its row")
    return counts.reshape(len(table), 2, 3)


def _whole_numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column (R,) int64; raises ValueError for the first value that is not a whole number of at least 0."""
    column = table[name].combine_chunks()
    exact = pa.types.is_int64(column.type) and not column.null_count
    values = column.to_numpy() if exact else np.array([_number(value) for value in column.to_pylist()])
    wrong = ~((values >= 0) & (values < _LARGEST) & (values == np.floor(values)))
    if wrong.any():
        row = int(wrong.argmax())
        value = "a missing value" if column[row].as_py() is None else repr(column[row].as_py())
        raise ValueError(f"row {row + 1}, column {name!r}: {value} is no count; it must be a whole number from 0")
    return values.astype(np.int64)


def _number(value: object) -> float:
    """A cell as a number, which may be written 7.0; NaN for what is none."""
    try:
        return float(str(value))
    except ValueError:
        return math.nan


def _frame_column(header: list[str]) -> str | None:
    """The column that names the frame; None where rows sum several."""
    if "frame" in header or "n_frames" in header:
        return "frame" if "frame" in header else None
    if _is_ours(header[0]):
        raise ValueError(f"the first column must name the frame, but is {header[0]!r}; add it, or n_frames for sums")
    return header[0]


# -- both layouts -----------------------------------------------------------------------------------------------


def _table(table: pa.Table, counts: np.ndarray, facts: dict[str, Any], frame: str | None) -> FrameTable:
    """A checked table from the columns of names, and the counts that were read from the others."""
    others = [
        field.name
        for field in table.schema
        if field.type in (pa.string(), pa.large_string()) and not _is_ours(field.name) and field.name != frame
    ]
    names = [name for name in (frame, "scene", *others) if name is not None]
    text = {name: pc.fill_null(table[name].cast(pa.string()), "").to_pylist() for name in names}
    return FrameTable(
        frames=[""] * len(table) if frame is None else text[frame],
        scenes=text["scene"],
        attributes={name: text[name] for name in others},
        counts=counts,
        classes=facts.get("classes", [str(k) for k in range(counts.shape[1])]),
        protocol=facts.get("protocol", {}),
        num_frames=_whole_numbers(table, "n_frames") if "n_frames" in table.column_names else None,
    )


def _name_columns(table: FrameTable) -> dict[str, Sequence[Any]]:
    named = {"frame": table.frames} if any(table.frames) else {}
    sums = {"n_frames": table.num_frames} if (table.num_frames != 1).any() or not named else {}
    return {**named, "scene": table.scenes, **table.attributes, **sums}


def _cells(num_classes: int) -> list[str]:
    """Names of the K x (K + 1) counts in their order."""
    predictions = [*map(str, range(num_classes)), "none"]
    return [f"{true}-{prediction}" for true in range(num_classes) for prediction in predictions]


def _is_number(name: str) -> bool:
    return name == "n_frames" or bool(_CELL.fullmatch(name) or _CLASS.fullmatch(name))


def _is_ours(name: str) -> bool:
    """Whether a column of this name is no attribute."""
    return name in ("frame", "scene", "counts") or _is_number(name)


def _need(found: Sequence[str], wanted: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(f"there is no column {shown}; found {', '.join(map(repr, found[:12]))}; add what is missing")


def _check(wrong: np.ndarray, columns: Sequence[str], why: str) -> None:
    """Raises ValueError for the first cell where wrong (R, columns) is true."""
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(f"row {row + 1}, column {columns[column]!r} {why}")


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in (".parquet", ".csv"):
        raise ValueError(f"{path} is neither .parquet nor .csv; give a table such as NAME.parquet of tqdm-seg evaluate")


def _facts_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _read_facts(text: bytes, where: str) -> dict[str, Any]:
    facts = parse_json(text, where, _FIELDS, "write it again")
    return {name: facts[name] for name in ("classes", "protocol")}


# -- frames scored so far -------------------------------------------------------------------------------


class Scored(NamedTuple):
    """Numbers (N,) int64 of frames in their set, and their counts (N, K, K + 1) int64.

    about (N, 4) str: key, scene, height, width of frames that no index names, else None.
    """

    rows: np.ndarray
    counts: np.ndarray
    about: np.ndarray | None = None


def save_batch(folder: Path, batch: Scored) -> None:
    """Writes a file of a batch, whole or not at all, named after its first frame; no other process has that frame."""
    content = io.BytesIO()
    np.savez(content, **{name: part for name, part in batch._asdict().items() if part is not None})
    write_file(folder / f"{batch.rows[0]:08d}.npz", content.getvalue())


def read_scored(folder: Path, num_frames: int | None, num_classes: int) -> Scored:
    """All batches in a folder, as `join_scored`."""
    batches = []
    for path in sorted(folder.glob("[0-9]*.npz")):
        try:
            with np.load(path) as batch:
                batches.append(Scored(**batch))
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged ({cut(error, 80)}); delete it, evaluate again") from error
    try:
        return join_scored(batches, num_frames, num_classes)
    except ValueError as error:
        raise ValueError(f"{folder} {error}: two programs wrote there; delete it, evaluate again") from error


def join_scored(batches: Iterable[Scored], num_frames: int | None, num_classes: int) -> Scored:
    """The frames of all batches in their order; raises ValueError for frames that cannot be.

    num_frames: of the set, None where no index tells.
    """
    rows, counts, about = [np.empty(0, np.int64)], [np.empty((0, num_classes, num_classes + 1), np.int64)], []
    for batch in batches:
        rows.append(batch.rows)
        counts.append(batch.counts)
        about += [] if batch.about is None else [batch.about]
    found = np.concatenate(rows)
    order = np.argsort(found)
    found = found[order]
    impossible = num_frames is not None and len(found) and not 0 <= found[0] <= found[-1] < num_frames
    if len(np.unique(found)) < len(found) or impossible:
        raise ValueError("holds other frames or some twice")
    return Scored(found, np.concatenate(counts)[order], np.concatenate(about)[order] if about else None)
