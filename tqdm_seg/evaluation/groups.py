"""Groups of frames: scenes, and the attributes of scenes that a table names."""

import csv
from pathlib import Path
from typing import Any

from ..data.files import check_text, cut
from ..data.scenes import scene_identity

ATTRIBUTES = ("weather", "light", "road")
NOT_GIVEN = "not given"


def flatten(protocol: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"labels": {"ignored": 255}} -> {"labels.ignored": 255}."""
    found: dict[str, Any] = {}
    for key, value in protocol.items():
        found |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def read_attributes(path: Path) -> dict[str, dict[str, str]]:
    """{scene identity: {column: value}} of a CSV.

    Raises ValueError for what is no table with a column of scenes and others, or names a column or scene twice.
    """
    try:
        header, *rows = [fields for fields in csv.reader(read_text(path).splitlines()) if fields] or [[]]
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV ({error}); save it as UTF-8 CSV") from error
    if not rows or "scene" not in header or len(header) < 2:
        raise ValueError(f"{path} needs a column 'scene', others to group by, with commas between, and a row per scene")
    if len({*header}) < len(header):
        raise ValueError(f"{path} has a column twice in {cut(', '.join(header))}; rename or remove one")
    found: dict[str, dict[str, str]] = {}
    for number, fields in enumerate(rows, 1):
        if len(fields) != len(header):
            counts = f"{len(fields)} fields, the header has {len(header)}"
            raise ValueError(f"{path}, row {number}: {counts}; mend the row")
        row = dict(zip(header, fields, strict=True))
        try:
            scene = scene_identity(row["scene"])
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}") from error
        if scene in found:
            raise ValueError(f"{path}, row {number}: scene {row['scene']} is listed twice; remove one")
        found[scene] = row
    return found


def read_text(path: Path) -> str:
    """A text file; raises FileNotFoundError or, if it is not UTF-8, ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"file not found: {path}")
    try:
        return check_text(path.read_text(encoding="utf-8-sig"), path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text; save it as UTF-8") from error
