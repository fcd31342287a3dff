"""Files and folders that are written whole or not at all, and only where nothing of anybody's is lost.

One rule for every program: OUT is ours. A folder that a program makes bears a mark, the hidden file `.tqdm-seg`. What
bears none is never removed, replaced or written into; a folder that is replaced whole holds only files its mark names.
Temporary files and folders have names of our own, so that the next start finds and removes what a kill left behind.
Imports the standard library only.
"""

import errno
import json
import math
import os
import re
import shutil
import stat
import tempfile
import typing
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .. import __version__
from ..program import LARGEST, cut

_PACKAGE = Path(__file__).parents[1]
MARK = ".tqdm-seg"
_AGAIN = "make or copy it again"
_TEMPORARY, _OLD = ".tqdm-seg.tmp.", ".tqdm-seg.old."
# What operating systems, editors and mounts leave in folders: nobody's property, no obstacle, no data.
SYSTEM_FILES = (
    ".DS_Store", "._*", ".AppleDouble", ".Spotlight-V100", ".Trashes", ".fseventsd", "__MACOSX", "Thumbs.db",
    "ehthumbs.db", "desktop.ini", "$RECYCLE.BIN", "System Volume Information", "lost+found", ".ipynb_checkpoints",
    ".directory", ".nfs*", ".Trash-*", "@eaDir",
)  # fmt: skip


def example(name: str) -> Path:
    """Path of `name` in the examples: orfd_mini (a prepared dataset), comma10k, frames, quickstart.png.

    They lie inside an installed package and at the root of a checkout. Raises FileNotFoundError for other names.
    """
    for root in (_PACKAGE, _PACKAGE.parent):
        if (root / "examples" / name).exists():
            return root / "examples" / name
    raise FileNotFoundError(f"file not found: {_PACKAGE / 'examples' / name}; install the package again")


# ---- Reading


def is_system_file(path: str | Path) -> bool:
    """Whether the name, or a folder on a relative path, is one that systems leave behind (.DS_Store, Thumbs.db)."""
    return any(fnmatch(part.lower(), known.lower()) for part in Path(path).parts for known in SYSTEM_FILES)


def files_below(folder: Path) -> list[str]:
    """Names of all files below a folder, as 'a/b.png', sorted; system files and our mark left out."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    return sorted(name.as_posix() for name in found if not is_system_file(name) and name.name != MARK)


def check_text(text: str, path: str | Path) -> str:
    """The text of a file; raises ValueError for bytes that are none, and for what Git LFS leaves in place of a file."""
    if text.startswith("version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the file; run git lfs pull")
    if "\0" in text:
        raise ValueError(f"{path} is no text; save it as UTF-8")
    return text


def read_json(path: Path, fields: dict[str, Any] | None = None, fix: str = _AGAIN) -> dict[str, Any]:
    """The fields of a JSON file.

    fields: what has to be in it, as `check_fields` takes it. Raises FileNotFoundError for a missing file, and
    ValueError naming it for one that is empty, cut, no object, or has other fields; `fix` says what to do.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"file not found: {path}; {fix}") from error
    except OSError as error:
        raise OSError(f"cannot read {path} ({error.strerror}); {fix}") from error
    return parse_json(content, path, fields, fix)


def parse_json(
    content: str | bytes, name: str | Path, fields: dict[str, Any] | None = None, fix: str = _AGAIN
) -> dict[str, Any]:
    """As `read_json`, of a text that `name` stands for."""
    if not content.strip():
        raise ValueError(f"{name} is empty; {fix}")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is damaged or no JSON ({cut(error, 80)}); {fix}") from error
    check_fields(found, fields or {}, name, fix)
    return found


def check_fields(value: Any, expected: Any, name: str | Path, fix: str = _AGAIN, field: str = "") -> None:
    """Raises ValueError, naming file and field, unless `value` of a JSON file is of the expected form.

    expected: a type or a union of types (a number is finite and no bool, an int does for a float, object is anything),
    [form of every item], {name: form} of fields, which have to be there but for "name?", {str: form} of any names.
    """
    form = type(expected) if isinstance(expected, dict | list) else expected
    if not _is(value, form):
        what = f"{field} is {cut(repr(value), 40)}" if field else f"the content is {_kind(type(value))}"
        kinds = " or ".join(map(_kind, typing.get_args(form) or (form,)))
        raise ValueError(f"{name}: {what}, expected {kinds}; {fix}")
    if isinstance(expected, list):
        for number, item in enumerate(value):
            check_fields(item, expected[0], name, fix, f"{field}[{number}]")
    elif isinstance(expected, dict):
        if missing := [key for key in expected if key is not str and not key.endswith("?") and key not in value]:
            raise ValueError(f"{name} lacks {', '.join(f'{field}.{key}'.lstrip('.') for key in missing[:5])}; {fix}")
        for key, item in value.items():
            forms = (expected[known] for known in (key, f"{key}?", str) if known in expected)
            check_fields(item, next(forms, object), name, fix, f"{field}.{key}".lstrip("."))


_KINDS = {
    dict: "fields",
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


def _kind(form: type) -> str:
    return _KINDS.get(form, "null")


def _is(value: Any, form: Any) -> bool:
    """Whether a value from JSON is of a type, or one of a union."""
    forms = typing.get_args(form) or (form,)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return isinstance(value, forms)
    whole = isinstance(value, int) and abs(value) < LARGEST
    return object in forms or (int in forms and whole) or (float in forms and -math.inf < value < math.inf)


def plain_name(name: object, source: str | Path) -> str:
    """`name`, which `source` gives for a file in its own folder; raises ValueError for a path, such as '../x'."""
    plain = isinstance(name, str) and name not in ("", ".", "..") and not re.search(r"[/\\:\x00-\x1f]", name)
    if not plain:
        raise ValueError(f"{source} names a file {cut(repr(name), 60)}; expected a plain file name, without a folder")
    return str(name)


# ---- OUT is ours


def check_not_input(out: Path, inputs: Iterable[str | Path]) -> None:
    """Raises FileExistsError when an output is one of the inputs, or a folder that holds one."""
    target = out.resolve()
    for source in map(Path, inputs):
        if not source.exists():
            continue
        if target == source.resolve() or (out.exists() and out.samefile(source)):
            raise FileExistsError(f"{out} is an input, which is never written over; choose another name for the output")
        if source.resolve().is_relative_to(target):
            raise FileExistsError(f"{out} holds the input {source}; choose another folder for the output")


def check_out_folder(folder: Path, program: str, inputs: Iterable[str | Path] = (), whole: bool = False) -> None:
    """Raises OSError, before any work, unless a program may write into the folder.

    It may be new, empty, or an earlier OUT of this program. whole: it will be replaced, so all its files are named in
    its mark. The folder is no input and holds none.
    """
    check_not_input(folder, inputs)
    _check_place(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; choose a new folder")
    mark, found = read_mark(folder), files_below(folder)
    if mark is None and found:
        raise FileExistsError(
            f"{folder} holds {_some(found)}, not made by tqdm-seg {program}; choose a new or empty folder"
        )
    if mark is not None and mark["program"] != program and found:
        raise FileExistsError(f"{folder} was made by tqdm-seg {mark['program']}, not {program}; choose another folder")
    if mark is not None and whole and (others := sorted(set(found) - set(mark.get("files", ())))):
        raise FileExistsError(
            f"{folder} also holds {_some(others)}, not made by tqdm-seg {program}; move that away or choose a new one"
        )


def check_out_file(path: Path, begins: str | bytes, inputs: Iterable[str | Path] = ()) -> None:
    """Raises OSError, before any work, unless a program may write this file.

    It may be new, empty, or an earlier one of this program: that begins with `begins`. It is no input.
    """
    check_not_input(path, inputs)
    _check_place(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file to write")
    if path.exists():
        if not os.access(path, os.R_OK | os.W_OK):
            raise PermissionError(f"no permission to write {path}; choose another place")
        start = begins.encode() if isinstance(begins, str) else begins
        with path.open("rb") as file:
            before = file.read(len(start) + 80).lstrip()
        if before and not before.startswith(start):
            raise FileExistsError(f"{path} exists and is none of this program's files; choose a new name")


def _check_place(path: Path) -> None:
    """Raises OSError unless the nearest folder above that exists is a folder in which files can be made."""
    above = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not above.is_dir():
        raise NotADirectoryError(f"{above} is a file, so {path} cannot be made; choose another place")
    try:  # asking for permission is not enough: /proc and read-only mounts say yes
        os.rmdir(tempfile.mkdtemp(prefix=_TEMPORARY, dir=above))
    except OSError as error:
        raise PermissionError(
            f"cannot write into {above} ({error.strerror}); choose another place than {path}"
        ) from error


def _some(names: Sequence[str]) -> str:
    return ", ".join(cut(name) for name in names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def claim_folder(folder: Path, program: str) -> None:
    """Makes the folder if need be, marks it, and ends or removes what a killed program left in it.

    For folders that fill up step by step. Raises as `check_out_folder`.
    """
    check_out_folder(folder, program)
    folder.mkdir(parents=True, exist_ok=True)
    write_mark(folder, program)
    for path in sorted(folder.rglob(_TEMPORARY + "*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            remove_folder(path)
        elif path.exists():
            path.unlink()
    for path in sorted(folder.rglob(_OLD + "*")):
        restore_folder(path.with_name(path.name.removeprefix(_OLD)))


def read_mark(folder: Path) -> dict[str, Any] | None:
    """What the mark of a folder says, or None where there is none."""
    try:
        return read_json(folder / MARK, {"program": str})
    except (OSError, ValueError):
        return None


def write_mark(folder: Path, program: str, files: Sequence[str] | None = None, **facts: object) -> None:
    """Marks a folder as made by a program. files: all that it holds, so that it may be replaced whole.

    facts: what the program wants to know of its folder later.
    """
    mark = {"program": program, "version": __version__} | ({} if files is None else {"files": list(files)}) | facts
    path = folder / MARK
    with (
        replace_file(path) if path.exists() else nullcontext(path) as target
    ):  # a first mark may be cut, later ones not
        target.write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")


def remove_folder(folder: Path) -> None:
    """Removes a folder that bears our mark or is empty, the mark last; raises FileExistsError for any other."""
    if not os.path.lexists(folder):
        return
    ours = folder.is_dir() and not folder.is_symlink() and (read_mark(folder) is not None or not files_below(folder))
    if not ours:
        raise FileExistsError(f"{folder} is in the way, and this program did not make it; move it away")
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()
    (folder / MARK).unlink(missing_ok=True)
    folder.rmdir()


# ---- Writing


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A temporary path with the suffix of `path`; after the block the file written there replaces `path`.

    Makes the folder of `path`. When the block raises, `path` stays as before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(_TEMPORARY + path.name)
    try:
        with named_when_full(path):
            yield temporary
            _make_public(temporary)
            _flush_to_disk(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Writes the whole file or, when that fails, nothing."""
    with replace_file(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON, the whole file or, when that fails, nothing."""
    write_file(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


@contextmanager
def replace_folder(folder: Path, program: str) -> Iterator[Path]:
    """A temporary empty folder; after the block it replaces `folder`. When the block raises, `folder` stays as before.

    At every moment one whole version is on disk. Raises FileExistsError for a folder that is not the program's own.
    """
    folder = folder.resolve()
    temporary = folder.with_name(_TEMPORARY + folder.name)
    restore_folder(folder)
    check_out_folder(folder, program, whole=True)
    remove_folder(temporary)
    with named_when_full(folder):
        temporary.mkdir(parents=True)
        write_mark(temporary, program)
        try:
            yield temporary
            write_mark(temporary, program, files_below(temporary))
            for path in (*temporary.rglob("*"), temporary):
                _make_public(path)
                _flush_to_disk(path)
            move_folder(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            restore_folder(folder)
            raise


def move_folder(source: Path, target: Path) -> None:
    """Renames `source`, which bears a mark, to `target`; an earlier one is removed after the new one took its name.

    Raises FileExistsError for a target that the same program did not make.
    """
    target = target.resolve()
    old = target.with_name(_OLD + target.name)
    restore_folder(target)
    check_out_folder(target, (read_mark(source) or {"program": ""})["program"], whole=True)
    if target.exists():
        target.rename(old)
    source.rename(target)
    remove_folder(old)
    _flush_to_disk(target.parent)


def restore_folder(target: Path) -> None:
    """Undoes or ends a `move_folder` that was killed: the old version returns where there is no new one."""
    target = target.resolve()
    old = target.with_name(_OLD + target.name)
    if old.is_dir() and not target.exists():
        old.rename(target)
    remove_folder(old)


@contextmanager
def named_when_full(path: Path) -> Iterator[None]:
    """Says which file did not fit on a full disk, whatever library found out."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise  # it names its file already
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(error):
            words = "No space left on device, make room and start the same command again; not written"
            raise OSError(errno.ENOSPC, words, str(path)) from error
        raise


def _make_public(path: Path) -> None:
    """Lets others read the file as the umask says; safetensors and temporary files forbid it."""
    umask = os.umask(0o077)
    os.umask(umask)
    if path.is_file() and not path.is_symlink():
        path.chmod(stat.S_IMODE(path.stat().st_mode) | 0o666 & ~umask)


def _flush_to_disk(path: Path) -> None:
    """Waits until the file is on disk, and the folder where the system can."""
    folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" and not folder else os.O_RDONLY)
    except OSError:
        if folder:  # Windows opens no folders
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not folder or error.errno == errno.ENOSPC:  # some network drives flush no folders
            raise
    finally:
        os.close(descriptor)
