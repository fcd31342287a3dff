"""OUT is ours: what a program did not make it never removes, replaces or writes over; nothing is left half done."""

import errno
import json
import os
import stat
import tempfile
from pathlib import Path

import pytest
from conftest import micro_model
from PIL import Image

from tqdm_seg.commands import start
from tqdm_seg.data import files
from tqdm_seg.data.files import (
    MARK,
    check_out_file,
    check_out_folder,
    claim_folder,
    example,
    files_below,
    is_system_file,
    move_folder,
    parse_json,
    plain_name,
    read_json,
    replace_file,
    replace_folder,
    write_file,
    write_mark,
)  # fmt: skip
from tqdm_seg.deploy.folder import save_model_folder
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor


def fill(folder: Path, **content: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in content.items():
        (folder / name).write_text(text)
    return folder


def make(folder: Path, program: str = "export", **content: str) -> Path:
    """A folder made by a program."""
    with replace_folder(folder, program) as temporary:
        fill(temporary, **content)
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("whole", [True, False])
def test_a_folder_of_others_is_refused(tmp_path, whole):
    theirs = fill(tmp_path / "theirs", thesis="years")
    with pytest.raises(FileExistsError, match="thesis"):
        check_out_folder(theirs, "export", whole=whole)
    with pytest.raises(FileExistsError, match="thesis"), replace_folder(theirs, "export"):
        raise AssertionError("the work began")
    with pytest.raises(FileExistsError, match="thesis"):
        claim_folder(theirs, "train")
    assert snapshot(tmp_path) == {"theirs/thesis": b"years"}


def test_a_file_as_folder_and_a_folder_as_file_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="file"):
        check_out_folder(tmp_path / "file", "export")
    with pytest.raises(NotADirectoryError, match="file"):
        check_out_folder(tmp_path / "file" / "below" / "it", "export")
    with pytest.raises(IsADirectoryError):
        check_out_file(tmp_path, "{")


def test_only_what_the_mark_names_is_replaced(tmp_path):
    out = make(tmp_path / "out", a="1", b="2")
    make(out, a="3")
    assert files_below(out) == ["a"]
    (out / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="notes"), replace_folder(out, "export"):
        raise AssertionError("the work began")
    assert (out / "notes").read_text() == "mine"
    with pytest.raises(FileExistsError, match="export"):
        check_out_folder(out, "convert")
    with pytest.raises(FileExistsError, match="notes"):
        check_out_folder(out, "export", whole=True)
    claim_folder(out, "export")  # other files stay where a folder fills up step by step
    assert (out / "notes").read_text() == "mine"


def test_empty_folders_and_system_files_are_free(tmp_path):
    out = tmp_path / "out"
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._photo.jpg"):
        fill(out, **{name: "system"})
    (out / ".ipynb_checkpoints").mkdir()
    (out / ".ipynb_checkpoints" / "a.ipynb").write_text("system")
    assert files_below(out) == []
    make(out, a="1")
    (out / ".DS_Store").write_text("again")
    make(out, a="2")
    assert (out / "a").read_text() == "2"


@pytest.mark.parametrize("name", ["THUMBS.DB", ".ds_store", "._x.jpg", "a/.ipynb_checkpoints/b.png", "__MACOSX/a.png"])
def test_system_files(name):
    assert is_system_file(name)
    assert not is_system_file("a/photo_._.jpg")


@pytest.mark.parametrize("kind", [".tqdm-seg.old.", ".tqdm-seg.tmp."])
def test_temporary_names_are_checked_for_the_mark(tmp_path, kind):
    """`mkdir out.old; echo x > out.old/t`: neither such names nor our own temporary ones are taken unseen."""
    for name in ("out.old", ".out.old", ".out.tmp", "out.partial"):
        fill(tmp_path / name, t="x")
    make(tmp_path / "out", a="1")
    make(tmp_path / "out", a="2")
    theirs = fill(tmp_path / f"{kind}out", t="x")
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match="move it away"), replace_folder(tmp_path / "out", "export"):
        raise AssertionError("the work began")
    assert snapshot(tmp_path) == before
    write_mark(theirs, "export")  # what a kill leaves
    make(tmp_path / "out", a="3")
    assert not theirs.exists()
    assert (tmp_path / "out" / "a").read_text() == "3"


def test_a_kill_between_the_renames_loses_nothing(tmp_path):
    out = make(tmp_path / "out", a="1")
    out.rename(tmp_path / ".tqdm-seg.old.out")
    with pytest.raises(ZeroDivisionError), replace_folder(out, "export"):
        assert (out / "a").read_text() == "1"  # the earlier version is back
        1 / 0  # noqa: B018
    assert (out / "a").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("there", [True, False])
def test_the_next_start_ends_a_replacement_that_was_killed_inside_a_folder(tmp_path, there):
    """What a training replaces (best/, model/) may not be replaced again by the run that goes on."""
    write_mark(fill(tmp_path / "run"), "train")
    best = make(tmp_path / "run" / "best", a="1")
    best.rename(best.with_name(".tqdm-seg.old.best"))
    if there:
        make(best.with_name("made"), a="2").rename(best)
    claim_folder(tmp_path / "run", "train")
    assert (best / "a").read_text() == ("2" if there else "1")
    assert [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()] == ["best"]


def test_move_folder_keeps_folders_of_others(tmp_path):
    new, theirs = make(tmp_path / "new", a="1"), fill(tmp_path / "theirs", thesis="years")
    with pytest.raises(FileExistsError):
        move_folder(new, theirs)
    assert snapshot(theirs) == {"thesis": b"years"}


def test_ctrl_c_between_the_renames_loses_nothing(tmp_path, monkeypatch):
    out, rename = make(tmp_path / "out", a="1"), Path.rename

    def stop(path, target):
        if path.name.startswith(".tqdm-seg.tmp."):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        make(out, a="2")
    assert (out / "a").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_claimed_folders_lose_leftovers(tmp_path):
    claim_folder(tmp_path / "out", "predict")
    fill(tmp_path / "out" / "ids", **{".tqdm-seg.tmp.a.png": "cut", "b.png": "whole"})
    claim_folder(tmp_path / "out", "predict")
    assert files_below(tmp_path / "out") == ["ids/b.png"]


def test_outputs_that_are_inputs(tmp_path):
    source = fill(tmp_path / "in", a="1") / "a"
    os.link(source, tmp_path / "hard")
    (tmp_path / "soft").symlink_to(source)
    for out in (source, tmp_path / "hard", tmp_path / "soft", tmp_path / "in" / ".." / "in" / "a"):
        with pytest.raises(FileExistsError, match="input"):
            check_out_file(out, "1", [source])
    for out in (tmp_path / "in", tmp_path):
        with pytest.raises(FileExistsError, match="input"):
            check_out_folder(out, "predict", [source])
    assert source.read_text() == "1"


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "t.csv"
    check_out_file(path, "class,first")
    path.write_text("my,own,table\n")
    with pytest.raises(FileExistsError, match="t.csv"):
        check_out_file(path, "class,first")
    path.write_text("class,first,second\n1,2\n")
    check_out_file(path, "class,first")


def test_unwritable_places(tmp_path, monkeypatch):
    def refuse(**_: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(PermissionError, match=f"cannot write into {tmp_path} "):
        check_out_folder(tmp_path / "new", "predict")


@pytest.mark.parametrize("name", ["../victim.txt", "/etc/passwd", "a/b", "a\\b", "C:x", "", ".", "..", None, 3, "a\0b"])
def test_names_from_files_are_plain(name):
    with pytest.raises(ValueError, match="manifest.json"):
        plain_name(name, "manifest.json")
    assert plain_name("train-00000.parquet", "manifest.json") == "train-00000.parquet"


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "empty"), (b" \n", "empty"), (b'{"a": 1', "damaged"), (b"[1]", "a list"), (b"null", "null"),
     (b'{"b": 1}', "lacks a"), (b"\xff\xfe", "damaged"), (b"[" * 100_000, "damaged"), (b"3", "a whole number")],
)  # fmt: skip
def test_json_errors_name_the_file(tmp_path, content, expected):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=expected) as error:
        read_json(path, {"a": int}, fix="save it again")
    assert str(path) in str(error.value)
    assert "save it again" in str(error.value)
    with pytest.raises(FileNotFoundError, match="nosuch"):
        read_json(tmp_path / "nosuch")
    with pytest.raises(OSError, match=tmp_path.name):
        read_json(tmp_path)
    assert parse_json(b'{"a": 1}', "line 3") == {"a": 1}


def test_files_are_readable_as_the_umask_says(tmp_path):
    umask = os.umask(0o022)
    try:
        with replace_file(tmp_path / "file") as temporary:
            temporary.touch(0o600)
        with replace_folder(tmp_path / "folder", "export") as temporary:
            (temporary / "weights").touch(0o600)
    finally:
        os.umask(umask)
    for path in (tmp_path / "file", tmp_path / "folder" / "weights"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O error: No space left on device")]
)
def test_a_full_disk_names_the_file(tmp_path, error):
    write_file(tmp_path / "file", b"before")
    make(tmp_path / "folder", a="before")
    with pytest.raises(OSError, match="No space left.*file"), replace_file(tmp_path / "file") as temporary:
        temporary.write_bytes(b"cut")
        raise error
    with pytest.raises(OSError, match="No space left.*folder"), replace_folder(tmp_path / "folder", "export"):
        raise error
    assert snapshot(tmp_path).keys() == {"file", "folder/a", f"folder/{MARK}"}
    assert (tmp_path / "file").read_bytes() == b"before"


def test_folders_that_cannot_be_opened(tmp_path, monkeypatch):
    """Windows opens no folders."""
    opened = os.open

    def refuse_folders(path, *arguments, **names):
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **names)

    monkeypatch.setattr(files.os, "open", refuse_folders)
    make(tmp_path / "out", a="1")
    make(tmp_path / "out", a="2")
    assert json.loads((tmp_path / "out" / MARK).read_text())["files"] == ["a"]


# ---- The programs


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "model"
    names = {0: "non-traversable", 1: "traversable"}
    save_model_folder(micro_model(id2label=names), TqdmImageProcessor(), folder)
    return folder


@pytest.fixture
def photo(tmp_path) -> Path:
    Image.new("RGB", (40, 40), "red").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def line_of(capsys) -> str:
    """The one line of the error."""
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1 and len(error) <= 400, error
    return error


COMMANDS = {
    "predict": "predict MODEL PHOTO --out OUT",
    "export": "export MODEL --out OUT --format torch --no-check",
    "convert": "convert WEIGHTS --out OUT",
    "prepare": "prepare folder COMMA/images COMMA/masks --class-file COMMA/classes.csv --out OUT",
    "evaluate": "evaluate MODEL --data x=MINI --out OUT",
    "train": "train --model tiny --steps 1 --data MINI --out OUT",
}


def start_command(line: str, **places: Path) -> int:
    name, *rest = line.split()
    if name == "prepare":
        name = f"prepare {rest.pop(0)}"
    for key, place in places.items():
        rest = [word.replace(key, str(place)) for word in rest]
    try:
        return start(name, rest)
    except SystemExit as error:
        return int(error.code)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("theirs", ["thesis", "file", "program"])
def test_no_program_touches_what_it_did_not_make(tmp_path, model, photo, command, theirs, capsys):
    out = tmp_path / "out"
    if theirs == "thesis":
        fill(out, **{"thesis.txt": "years"})
    elif theirs == "file":
        out.write_text("years")
    else:
        make(out, "another", work="years")
    (tmp_path / "weights.pth").write_bytes(b"")
    before = snapshot(tmp_path)
    places = {"MODEL": model, "PHOTO": photo, "OUT": out, "WEIGHTS": tmp_path / "weights.pth",
              "COMMA": example("comma10k"), "MINI": example("orfd_mini")}  # fmt: skip
    assert start_command(COMMANDS[command], **places) == 1
    assert str(out) in line_of(capsys)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "line",
    ["export MODEL --out MODEL", "convert MODEL/model.safetensors --out MODEL", "predict MODEL PHOTO --out PHOTO",
     "predict MODEL FOLDER --out FOLDER", "compare T.csv U.csv --csv T.csv", "audit T.csv U.csv --json T.csv"],
)  # fmt: skip
def test_outputs_of_programs_are_no_inputs(tmp_path, model, photo, line, capsys):
    for name in "TU":
        (tmp_path / f"{name}.csv").write_text("scene\n")
    before = snapshot(tmp_path), snapshot(model)
    assert start_command(line, MODEL=model, PHOTO=photo, FOLDER=tmp_path, T=tmp_path / "T", U=tmp_path / "U") == 1
    line_of(capsys)
    assert (snapshot(tmp_path), snapshot(model)) == before


def test_results_of_earlier_predictions_are_replaced_and_others_stay(tmp_path, model, photo):
    out = tmp_path / "out"
    assert start("predict", [str(model), str(photo), "--out", str(out)]) == 0
    fill(out / "ids", **{".tqdm-seg.tmp.a.png": "cut", "mine.png": "mine"})
    Image.new("RGB", (40, 50), "blue").save(photo)
    assert start("predict", [str(model), str(photo), "--out", str(out)]) == 0
    assert Image.open(out / "ids" / "photo.png").size == (40, 50)
    assert sorted(path.name for path in (out / "ids").iterdir()) == ["mine.png", "photo.png"]


def test_ctrl_c_in_predict_is_one_line(tmp_path, model, photo, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tqdm_seg.deploy.predict.Predictor.__call__", stop)
    assert start("predict", [str(model), str(photo), "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith("stopped")
    assert files_below(tmp_path / "out") == []
