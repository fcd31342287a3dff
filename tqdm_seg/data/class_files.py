"""Class files as people have them: names alone, with ids or with colours, of any separator, order and encoding.

road                   road;7                  name,r,g,b             64 128 64<tab>Animal     (CamVid)
mud                    7<tab>road              road,128,64,128        0 void 0 0 0             (RUGD)
                                               road,#804080           road:128,64,128::        (CVAT)
"""

import codecs
import csv
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Literal, NamedTuple

from .files import check_text, cut
from .label_maps import IGNORE_INDEX, LabelMap

IGNORED = "ignored"
LONGEST_NAME = 100
_FORMS = "NAME or NAME,ID or NAME,R,G,B with numbers from 0 to 255"
_HEADER = {
    "name": ("name", "names", "class_name", "classname", "class", "classes", "category", "label", "labels"),
    "id": ("id", "ids", "class_id", "label_id", "index", "value", "pixel", "pixel_value", "class", "label"),
    "r": ("r", "red"), "g": ("g", "green"), "b": ("b", "blue"),
    "colour": ("color", "colour", "rgb", "hex", "color_rgb", "rgb_values"),
}  # fmt: skip
_HEADER_WORDS = {word for words in _HEADER.values() for word in words}
_HEX = re.compile(r"#[0-9a-fA-F]{6}")
_CVAT = re.compile(r"(?P<name>[^:]*):(?P<colour>\d+,\d+,\d+):[^:]*:[^:]*")


class Line(NamedTuple):
    """One class as its line has it."""

    number: int
    text: str
    name: str
    id: int | None
    colour: tuple[int, int, int] | None


def read_classes(path: Path, masks_hold: Literal["ids", "colours"] = "colours") -> LabelMap:
    """The label map that a class file describes. masks_hold: which counts where a file gives an id and a colour.

    New ids are the old ones where these are 0, 1, ... in any order, else they count the lines. Raises ValueError
    naming the file and the line that is wrong.
    """
    lines = _lines(path)
    if lines[0].text.lstrip().startswith(("{", '["')):
        raise _wrong(path, lines[0].number, lines[0].text, f"is JSON; write one class per line: {_FORMS}")
    kinds = {(line.id is not None, line.colour is not None) for line in lines}
    if len(kinds) != 1:
        first = next(line for line in lines if (line.id is not None, line.colour is not None) != _kind(lines[0]))
        raise _wrong(path, first.number, first.text, "lines have ids, colours, or neither; every line needs its own")
    has_ids, has_colours = kinds.pop()
    by_colour = has_colours and (masks_hold == "colours" or not has_ids)
    new = _new_ids(path, lines)
    table: dict[int, int] = {}
    for line in lines:
        value = int.from_bytes(bytes(line.colour), "big") if by_colour and line.colour else line.id
        value = new[line.name] if value is None else value
        if value in table:
            what = "its name, id or colour was named before; every line needs its own"
            raise _wrong(path, line.number, line.text, what)
        table[value] = new[line.name]
    if not by_colour:
        table.setdefault(IGNORE_INDEX, IGNORE_INDEX)
    classes = tuple(sorted((name for name in new if name != IGNORED), key=new.__getitem__))
    policy = f"ids or colours as listed in {path.name}; " + (
        "every other colour is an error" if by_colour else "255 is ignored, every other value is an error"
    )
    reading: Literal["colours", "values"] = "colours" if by_colour else "values"
    try:
        return LabelMap(
            f"folder/{path.stem}", classes, reading, tuple(table.items()), policy, counted=not (has_ids or by_colour),
            listed_in=path.name,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"class file {path} lists {error}") from error


def _kind(line: Line) -> tuple[bool, bool]:
    return line.id is not None, line.colour is not None


def _new_ids(path: Path, lines: list[Line]) -> dict[str, int]:
    """Class id of every name; "ignored" is 255."""
    names = [line.name for line in lines if line.name != IGNORED]
    ids = [line.id for line in lines if line.name != IGNORED]
    if ids and None not in ids and len(set(names)) == len(ids) and sorted(ids) == list(range(len(ids))):
        new = dict(zip(names, ids, strict=True))
    else:
        new = {name: number for number, name in enumerate(dict.fromkeys(names))}
    spelling: dict[str, str] = {}
    for line in lines:
        other = spelling.setdefault(line.name.casefold(), line.name)
        if other != line.name:
            raise _wrong(path, line.number, line.text, f"is spelled {other!r} before; use one spelling")
    return {IGNORED: IGNORE_INDEX, **new}


def _wrong(path: Path, number: int, text: str, what: str) -> ValueError:
    return ValueError(f"{path} line {number}: {cut(text)!r}: {what}")


# -- from bytes to lines --------------------------------------------------------------------------------


def _lines(path: Path) -> list[Line]:
    """All classes of the file in its order; a header, comments and empty lines left out."""
    texts = [
        (number, text)
        for number, text in enumerate(re.split(r"\r\n|\r|\n", read_text(path)), 1)
        if text.strip(" \t,;") and (not text.lstrip().startswith("#") or _HEX.match(text.lstrip()))
    ]
    rows = _cells(path, texts)
    columns = _header(rows[0][2]) if rows else None
    if columns is not None:
        if "name" not in columns:
            raise _wrong(path, *rows[0][:2], "the header names no column of class names; call it name")
        rows = rows[1:]
    if not rows:
        raise ValueError(f"class file {path} names no class; write one per line: {_FORMS}")
    return [_line(path, number, text, _chosen(cells, columns)) for number, text, cells in rows]


def read_text(path: Path) -> str:
    """A text file: UTF-8 or UTF-16 with or without a mark, else Windows' Western European."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encodings = ["utf-16"]
    elif content[1:2] == b"\0" or content[:1] == b"\0":
        encodings = ["utf-16-le" if content[1:2] == b"\0" else "utf-16-be"]
    else:
        encodings = ["utf-8-sig", "cp1252", "latin-1"]
    for encoding in encodings:
        try:
            return check_text(content.decode(encoding), path)
        except UnicodeDecodeError:
            continue
    raise ValueError(f"{path} is no text; save it as UTF-8")


def _cells(path: Path, texts: list[tuple[int, str]]) -> list[tuple[int, str, list[str]]]:
    """Number, text and cells of every line, divided by what most lines hold: tab, semicolon, comma, else blanks."""
    if texts and all(_CVAT.fullmatch(text.strip()) for _, text in texts):
        return [(n, text, [m["name"], m["colour"]]) for n, text in texts if (m := _CVAT.fullmatch(text.strip()))]
    usual = max("\t;,", key=lambda mark: sum(mark in text for _, text in texts)) if texts else ","
    if not any(usual in text for _, text in texts):
        return [(number, text, _by_blanks(path, number, text, texts)) for number, text in texts]
    rows = []
    for number, text in texts:
        try:
            cells = next(csv.reader([text], delimiter=usual, skipinitialspace=True, strict=True))
        except csv.Error as error:
            raise _wrong(path, number, text, f"cannot be divided into columns ({error}); write {_FORMS}") from error
        cells = [cell.strip() for cell in cells]
        while len(cells) > 1 and not cells[-1]:  # spreadsheets pad short rows
            cells.pop()
        if usual == "\t":  # CamVid: colours divided by blanks, then a tab
            cells = [cell for cell in cells if cell]
        rows.append((number, text, cells))
    return rows


def _by_blanks(path: Path, number: int, text: str, texts: list[tuple[int, str]]) -> list[str]:
    """Cells of a line without separators: a name, or numbers before and after one, where all lines have them."""
    word = text.strip().strip('"')
    numbers = re.compile(r"(?P<before>(?:\d+\s+)*)(?P<name>.*?)(?P<after>(?:\s+\d+)*)")

    def shape(line: str) -> tuple[int, int]:
        match = numbers.fullmatch(line.strip())
        return len(match["before"].split()), len(match["after"].split())

    shapes = Counter(shape(line) for _, line in texts)
    usual, own = shapes.most_common(1)[0][0], shape(text)
    if own == (0, 0) and usual == own:
        return [word]
    if own == usual and own in ((1, 0), (1, 3), (3, 0), (0, 3)):
        match = numbers.fullmatch(text.strip())
        return [*match["before"].split(), match["name"], *match["after"].split()]
    if sum(own) < 2 and sum(usual) < 2 and len(shapes) > 1:
        return [word]  # "lane 1" among names without a number
    raise _wrong(path, number, text, f"expected {_FORMS}; put a name with a number into quotes")


def _header(cells: list[str]) -> dict[str, int] | None:
    """Place of every column that the first line names, or None where it names a class."""
    words = [re.sub(r"[\s-]+", "_", cell.strip().strip("#").lower()) for cell in cells]
    known = [word in _HEADER_WORDS for word in words]
    if not any(known) or (len(words) > 1 and sum(known) < 2) or any(cell.isdecimal() for cell in cells):
        return None
    columns: dict[str, int] = {}
    for column, choices in _HEADER.items():
        free = [word for word in choices if word in words and words.index(word) not in columns.values()]
        if free:
            columns[column] = words.index(free[0])
    return columns


def _chosen(cells: list[str], columns: dict[str, int] | None) -> list[str]:
    """Cells in the order name, id, colour: as the header says."""
    if columns is None:
        return cells
    order = [columns[column] for column in ("name", "id", "r", "g", "b", "colour") if column in columns]
    return [cells[place] if place < len(cells) else "" for place in order]


def _line(path: Path, number: int, text: str, cells: list[str]) -> Line:
    """What a line's cells say; the name is the one cell that is neither number nor colour."""
    names: list[str] = []
    numbers: list[int] = []
    before = 0
    colour: tuple[int, ...] | None = None
    for cell in cells:
        parts = re.findall(r"\d+", cell)
        if cell.isdecimal() and cell.isascii():
            numbers.append(int(cell))
            before += not names
        elif _HEX.fullmatch(cell):
            colour = tuple(bytes.fromhex(cell[1:]))
        elif re.fullmatch(r"[\[(]?\s*\d+([\s,]+)\d+[\s,]+\d+\s*[\])]?", cell):
            colour = tuple(map(int, parts))
        else:
            names.append(cell)
    if len(numbers) in (3, 4) and colour is None:
        # Of four numbers one is the id: the first where two or more stand together behind it.
        place = 0 if len(numbers) == 4 and before != 3 else 3
        colour = tuple(numbers[:3]) if place == 3 else tuple(numbers[-3:])
        numbers = numbers[place : place + 1] if len(numbers) == 4 else []
    if len(names) != 1 or len(numbers) > 1 or any(value > 255 for value in (*numbers, *(colour or ()))):
        raise _wrong(path, number, text, f"expected {_FORMS}")
    name = _checked_name(path, number, text, names[0])
    return Line(number, text, name, numbers[0] if numbers else None, colour)  # type: ignore[arg-type]


def _checked_name(path: Path, number: int, text: str, name: str) -> str:
    name = " ".join(name.split(" "))
    strange = [character for character in name if unicodedata.category(character)[0] == "C" or character == "\ufffd"]
    if strange:
        raise _wrong(path, number, text, f"the name holds {strange[0]!r}; save the file as UTF-8, with plain names")
    if not name.strip() or not any(character.isalnum() for character in name):
        raise _wrong(path, number, text, f"names no class; write {_FORMS}")
    if re.fullmatch(r"-?\d+([.,]\d+)?", name):
        raise _wrong(path, number, text, f"the name is a number; write {_FORMS}")
    if len(name) > LONGEST_NAME:
        raise _wrong(path, number, text, f"the name has {len(name)} characters; at most {LONGEST_NAME} are allowed")
    return name.strip()
