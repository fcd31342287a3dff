"""Groups of frames: scenes, and the attributes of scenes that a table names."""

import csv
from pathlib import Path
from typing import Any

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
    """{scene identity: {column: value}} of a CSV; raises ValueError if it has no scenes, or one of them twice."""
    rows = list(csv.DictReader(read_text(path).splitlines()))
    if not rows or "scene" not in rows[0]:
        raise ValueError(f"{path} needs a column 'scene' and a row per scene")
    found: dict[str, dict[str, str]] = {}
    for number, row in enumerate(rows, 1):
        if None in row:
            raise ValueError(f"{path}, row {number}: more fields than the header has; mend the row")
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
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text; save it as UTF-8") from error
