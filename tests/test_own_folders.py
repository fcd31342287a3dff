"""Own images and masks as people keep them: folders, links, leftovers, lists, class files that do not fit, kills."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from shard_helpers import ROOT, call, contents, orfd, photo, prepare, save, stored

from tqdm_seg.data import folders
from tqdm_seg.data.files import MARK
from tqdm_seg.data.folders import split_of, walk
from tqdm_seg.data.scenes import clusters_text
from tqdm_seg.data.shards import read_manifest


def frame(root: Path, name: str, mask: np.ndarray = ((0, 1),)) -> None:
    photo(root / "images" / f"{name}.jpg", *np.shape(mask)[:2])
    save(root / "masks" / f"{name}.png", mask)


def own(root: Path, *names: str, classes: str = "road\nmud\n", mask: np.ndarray = ((0, 1),)) -> list[object]:
    """Frames of these names; the arguments that prepare them."""
    for name in names:
        frame(root, name, mask)
    (root / "classes.txt").write_text(classes)
    return [root / "images", root / "out", root / "masks", "--class-file", root / "classes.txt"]


def splits(out: Path) -> dict[str, str]:
    return {key: row["split"] for key, row in stored(out).items()}


# -- folders --------------------------------------------------------------------------------------------


def test_splits_by_name_whatever_their_case():
    names = {
        "train": ("train", "Train", "TRAINING", "train2017", "train_1", "trn"),
        "validation": ("val", "Val", "valid", "Validation", "eval", "dev", "val2017", "val-b"),
        "test": ("Test", "testing", "testing_B", "test 2"),
        None: ("images", "valley", "test_drive", "trainer", "drive1", ""),
    }
    assert {name: split_of(name) for all in names.values() for name in all} == {
        name: split for split, all in names.items() for name in all
    }


def test_split_folders_of_any_spelling(tmp_path):
    prepare("folder", *own(tmp_path, "Train/a", "eval/b", "Testing_B/c"))
    assert splits(tmp_path / "out") == {
        "Train/a.jpg": "train", "eval/b.jpg": "validation", "Testing_B/c.jpg": "test",
    }  # fmt: skip
    root = orfd(orfd(tmp_path / "orfd", 1, split="Training"), 1, split="testing_B")
    assert prepare("orfd", root, tmp_path / "out2")["rows"] == {"train": 1, "test": 1}


def test_unknown_folders_beside_splits_are_refused(tmp_path):
    argv = own(tmp_path, "train/a", "extra/b")
    with pytest.raises(ValueError, match="train and extra"):
        prepare("folder", *argv)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    root = orfd(orfd(tmp_path / "orfd", 1), 1, split="more")
    with pytest.raises(ValueError, match="more holds frames"):
        prepare("orfd", root, tmp_path / "out2")


def test_linked_folders_are_followed_and_loops_are_not(tmp_path):
    own(tmp_path / "else", "b")
    argv = own(tmp_path, "train/a")
    for part in ("images", "masks"):
        (tmp_path / part / "val").symlink_to(tmp_path / "else" / part)
        (tmp_path / part / "train" / "back").symlink_to(tmp_path / part)
    prepare("folder", *argv)
    assert splits(tmp_path / "out") == {"train/a.jpg": "train", "val/b.jpg": "validation"}
    (tmp_path / "images" / "test").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="test links to"):
        prepare("folder", *argv)


def test_what_systems_leave_behind_is_no_data(tmp_path):
    argv = own(tmp_path, "a")
    root = orfd(tmp_path / "orfd", 1)
    scene = root / "training/y0613_1242/image_data"
    for where in (tmp_path / "images", scene):
        for name in ("._a.jpg", "._a.png", ".ipynb_checkpoints/a-checkpoint.png", "Thumbs.db", ".DS_Store",
                     "__MACOSX/._b.jpg", "desktop.ini"):  # fmt: skip
            (where / name).parent.mkdir(exist_ok=True)
            (where / name).write_bytes(b"junk")
    (root / ".DS_Store").write_bytes(b"junk")
    assert prepare("folder", *argv)["rows"] == {"train": 1}
    assert prepare("orfd", root, tmp_path / "out2")["rows"] == {"train": 1}
    for junk in (".DS_Store", "data/.DS_Store", "data/._x.parquet"):
        (tmp_path / "out" / junk).write_bytes(b"junk")
    call("check", tmp_path / "out", "--workers", 1)
    prepare("folder", *argv)
    assert prepare("folder", *argv, "--rows-per-shard", 5, "--overwrite")["rows"] == {"train": 1}


def test_one_walk_reads_a_folder_as_often_as_it_is_linked_or_once(tmp_path):
    photo(tmp_path / "a/x.jpg")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert [path.relative_to(tmp_path).as_posix() for path in walk(tmp_path)] == ["a/x.jpg", "b/x.jpg"]
    assert len(list(walk(tmp_path, once=True))) == 1
    assert folders.is_hidden(Path("a/.b/c.png")) and not folders.is_hidden(Path("a/b.png"))


def test_images_and_masks_next_to_each_other(tmp_path):
    for name in ("train/images/a", "val/images/b"):
        photo(tmp_path / "own" / f"{name}.jpg", 1, 2)
        save(tmp_path / "own" / f"{name.replace('images', 'masks')}.png", [[0, 1]])
    for scene in ("00000", "00001"):
        photo(tmp_path / "rellis" / scene / "pylon_camera_node/f.jpg", 1, 2)
        save(tmp_path / "rellis" / scene / "pylon_camera_node_label_id/f.png", [[0, 1]])
        save(tmp_path / "rellis" / scene / "pylon_camera_node_label_color/f.png", [[9, 9]])
    (tmp_path / "classes.txt").write_text("road\nmud")
    for root, expected in (
        (tmp_path / "own", {"train/images/a.jpg": ("train", ""), "val/images/b.jpg": ("validation", "")}),
        (tmp_path / "rellis", {f"{s}/pylon_camera_node/f.jpg": ("train", s) for s in ("00000", "00001")}),
    ):
        out = tmp_path / f"{root.name}_out"
        prepare("folder", root, out, root, "--class-file", tmp_path / "classes.txt")
        assert {key: (row["split"], row["scene"]) for key, row in stored(out).items()} == expected
    with pytest.raises(FileNotFoundError, match="next to each other"):
        images = tmp_path / "rellis/00000/pylon_camera_node"
        prepare("folder", images, tmp_path / "o", images, "--class-file", tmp_path / "classes.txt")


# -- lists and hold-out ---------------------------------------------------------------------------------


def test_pairs_from_lists(tmp_path):
    argv = own(tmp_path, "x/a", "x/b", "x/c")
    for text in ("image,mask,split,scene\nx/a.jpg,x/a.png,Val,s1\nx/b.jpg,x/b.png,,s2\n",
                 "x/a.jpg;x/a.png;validation;s1\nx/b.jpg;x/b.png;train;s2"):  # fmt: skip
        (tmp_path / "list.csv").write_text(text)
        prepare("folder", *argv, "--pairs", tmp_path / "list.csv", "--overwrite")
        assert {k: (r["split"], r["scene"]) for k, r in stored(tmp_path / "out").items()} == {
            "x/a.jpg": ("validation", "s1"), "x/b.jpg": ("train", "s2"),
        }  # fmt: skip
    (tmp_path / "train.lst").write_text("x/a.jpg x/a.png\n")
    (tmp_path / "val.lst").write_text("x/c.jpg x/c.png\n")
    prepare("folder", *argv, "--pairs", tmp_path / "train.lst", tmp_path / "val.lst", "--overwrite")
    assert splits(tmp_path / "out") == {"x/a.jpg": "train", "x/c.jpg": "validation"}


@pytest.mark.parametrize(
    ("text", "words"),
    [("x/a.jpg", "line 1"), ("x/a.jpg,x/a.png\nx/b.jpg,x/b.png,foo", "line 2.*foo"), ("../a.jpg,x/a.png", "line 1"),
     ("/etc/a.jpg,x/a.png", "line 1"), ("x/z.jpg,x/a.png", "line 1.*x/z.jpg"), ("", "no pair"),
     ("x/a.jpg,x/a.png\nx/a.jpg,x/b.png", "twice")],
)  # fmt: skip
def test_wrong_lists_are_named_by_line(tmp_path, text, words):
    argv = own(tmp_path, "x/a", "x/b")
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=f"list.csv.*{words}"):
        prepare("folder", *argv, "--pairs", tmp_path / "list.csv")


def test_hold_out_by_share_keeps_scenes_together_and_depends_on_the_seed_alone(tmp_path):
    argv = own(tmp_path, *(f"s{i % 10}/f{i}" for i in range(40)))
    chosen = []
    for seed in (0, 0, 1):
        prepare("folder", *argv, "--hold-out", 0.2, "--seed", seed, "--overwrite")
        held = {key for key, split in splits(tmp_path / "out").items() if split == "validation"}
        assert len(held) == 8 and len({key.split("/")[0] for key in held}) == 2
        chosen.append(held)
    assert chosen[0] == chosen[1] != chosen[2]
    flat = own(tmp_path / "flat", *(f"f{i}" for i in range(20)))
    assert prepare("folder", *flat, "--hold-out", 0.15)["rows"] == {"train": 17, "validation": 3}
    with pytest.raises(ValueError, match="validation split already"):
        prepare("folder", *own(tmp_path / "val", "train/a", "val/b"), "--hold-out", 0.5)
    with pytest.raises(ValueError, match="leaves none"):
        prepare("folder", *own(tmp_path / "one", "a"), "--hold-out", 0.5)


def test_hold_out_by_a_list_of_scenes_or_images(tmp_path):
    argv = own(tmp_path, "s1/a", "s1/b", "s2/c", "s3/d")
    (tmp_path / "list.txt").write_text("s1\ns3/d.jpg\n")
    prepare("folder", *argv, "--hold-out-scenes", tmp_path / "list.txt")
    held = {key for key, split in splits(tmp_path / "out").items() if split == "validation"}
    assert held == {"s1/a.jpg", "s1/b.jpg", "s3/d.jpg"}
    (tmp_path / "list.txt").write_text("s1\ns9\n")
    with pytest.raises(ValueError, match="list.txt line 2: 's9'"):
        prepare("folder", *argv, "--hold-out-scenes", tmp_path / "list.txt")


# -- classes that do not fit ----------------------------------------------------------------------------


def test_scenes_from_names_and_blocks_of_seconds(tmp_path):
    argv = own(tmp_path, "test/creek_1", "test/creek_2", "test/trail-3_1")
    prepare("folder", *argv, "--scene", r"([^/]+)_\d+$")
    assert {key: row["scene"] for key, row in stored(tmp_path / "out").items()} == {
        "test/creek_1.jpg": "creek", "test/creek_2.jpg": "creek", "test/trail-3_1.jpg": "trail-3",
    }  # fmt: skip
    with pytest.raises(ValueError, match="--scene x finds nothing in test/creek_1.jpg"):
        prepare("folder", argv[0], tmp_path / "none", *argv[2:], "--scene", "x")
    with pytest.raises(ValueError, match="creek_1.*leave out --scene-seconds"):
        prepare("folder", argv[0], tmp_path / "none", *argv[2:], "--scene-seconds", 4)
    drive = own(tmp_path / "drive", *(f"test/{1620322699201 + ms}" for ms in (0, 3999, 4000, 9000)))
    prepare("folder", *drive, "--scene-seconds", 4)
    scenes = [row["scene"] for row in stored(tmp_path / "drive" / "out").values()]
    assert scenes == ["4s-000", "4s-000", "4s-001", "4s-002"]
    assert clusters_text(scenes) == "3 blocks of 4 s within one drive"
    assert clusters_text(["a/4s-000", "b/4s-000"]) == "2 blocks of 4 s within 2 drives"
    assert clusters_text(["creek", "creek", "trail-3"]) == "2 scenes" and clusters_text(["creek"]) == "one place"
    assert clusters_text([""]) == "no scenes"


def test_masks_of_0_and_255_with_two_names_are_refused_with_the_whole_class_file(tmp_path):
    mask = [[0, 255, 255]]
    argv = own(tmp_path, "a", "b", classes="background\nlesion\n", mask=mask)
    with pytest.raises(ValueError, match="'background,0' and 'lesion,255'"):
        prepare("folder", *argv)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    (tmp_path / "classes.txt").write_text("background,0\nlesion,255\n")
    prepare("folder", *argv)
    assert stored(tmp_path / "out")["a.jpg"]["labels"].tolist() == [[0, 1, 1]]
    (tmp_path / "classes.txt").write_text("background\nlesion\n")
    frame(tmp_path, "b", [[0, 1, 255]])  # one pixel of 1 tells that 255 is ignored
    assert prepare("folder", *argv, "--overwrite")["class_pixels"] == {"train": [2, 1]}


def test_every_class_without_a_pixel_is_named_for_its_split(tmp_path, capsys):
    argv = own(tmp_path, "train/a", classes="road\nmud\nsky\n")
    frame(tmp_path, "val/b", [[2, 1]])
    notes = prepare("folder", *argv)["notes"]
    assert notes == ["no pixel in train: sky", "no pixel in validation: road"]
    assert "no pixel in train: sky" in capsys.readouterr().err


def test_a_wrong_class_file_leaves_nothing_behind(tmp_path):
    argv = own(tmp_path, "a", classes="road\n")
    with pytest.raises(ValueError, match="holds the ids 1"):
        prepare("folder", *argv)
    assert not (tmp_path / "out.partial").exists()
    (tmp_path / "classes.txt").write_text("road\nmud\n")
    assert prepare("folder", *argv)["rows"] == {"train": 1}


def test_an_image_of_one_pixel_is_prepared_and_checked(tmp_path):
    prepare("folder", *own(tmp_path, "a", mask=[[0]]))
    call("check", tmp_path / "out", "--workers", 1)


# -- content decides ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mask", "image"])
def test_other_content_of_the_same_size_is_noticed(tmp_path, kind, capsys):
    argv = own(tmp_path, "a", "b")
    path = tmp_path / ("masks/a.png" if kind == "mask" else "images/a.bmp")
    if kind == "image":
        (tmp_path / "images/a.jpg").unlink()
        save(path, np.zeros((1, 2, 3)))
    prepare("folder", *argv)
    size = path.stat().st_size
    save(path, [[1, 0]]) if kind == "mask" else save(path, np.full((1, 2, 3), 7))
    assert path.stat().st_size == size
    with pytest.raises(FileExistsError, match="content of files behind data/train"):
        prepare("folder", *argv)
    prepare("folder", *argv, "--overwrite")
    prepare("folder", *argv)
    assert "nothing to do" in capsys.readouterr().err


def test_touched_files_are_compared_and_found_the_same(tmp_path, capsys, monkeypatch):
    argv = own(tmp_path, "a")
    prepare("folder", *argv)
    before = contents(tmp_path / "out")
    os.utime(tmp_path / "masks/a.png", (1, 1))
    prepare("folder", *argv)
    assert "nothing to do" in capsys.readouterr().err
    after = contents(tmp_path / "out")
    assert before.pop(MARK) != after.pop(MARK) and before == after
    monkeypatch.setattr("tqdm_seg.data.prepare._hash", None)  # from now on the times are known
    prepare("folder", *argv)


# -- what is ours ---------------------------------------------------------------------------------------


def test_a_manifest_that_names_other_files_is_refused_and_nothing_lost(tmp_path):
    argv = own(tmp_path, "a")
    prepare("folder", *argv)
    (tmp_path / "victim.txt").write_text("mine")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    manifest["shards"][0]["file"] = "../victim.txt"
    (tmp_path / "out/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FileExistsError, match="victim.txt"):
        prepare("folder", *argv)
    with pytest.raises(ValueError, match=r"manifest.json names the file '../victim.txt'"):
        read_manifest(tmp_path / "out")
    prepare("folder", *argv, "--overwrite")
    assert (tmp_path / "victim.txt").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', '{"format": 1, "shards": 3}'])
def test_a_damaged_manifest_is_named(tmp_path, text):
    argv = own(tmp_path, "a")
    prepare("folder", *argv)
    (tmp_path / "out/manifest.json").write_text(text)
    with pytest.raises(ValueError, match="out/manifest.json"):
        read_manifest(tmp_path / "out")
    with pytest.raises(FileExistsError, match="out/manifest.json"):
        prepare("folder", *argv)
    assert prepare("folder", *argv, "--overwrite")["rows"] == {"train": 1}


def test_what_is_not_ours_stays(tmp_path):
    argv = own(tmp_path, "a")
    prepare("folder", *argv)
    (tmp_path / "out/thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="thesis.txt"):
        prepare("folder", *argv, "--rows-per-shard", 1, "--overwrite")
    assert (tmp_path / "out/thesis.txt").read_text() == "mine"
    with pytest.raises(FileExistsError, match="input"):
        prepare("folder", tmp_path / "images", tmp_path, *argv[2:])


# -- kills ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [(), ("data",), (MARK, "data"), (MARK, "manifest.json", "index.parquet")])
def test_a_kill_at_any_moment_leaves_what_the_next_start_takes(tmp_path, left):
    argv = own(tmp_path, "a")
    prepare("folder", *argv)
    expected = contents(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "out.partial")
    for path in sorted((tmp_path / "out.partial").rglob("*"), reverse=True):
        if path.relative_to(tmp_path / "out.partial").parts[0] not in left:
            path.rmdir() if path.is_dir() else path.unlink()
    if left == ("data",):
        for path in (tmp_path / "out.partial/data").iterdir():
            path.unlink()
    if MARK in left:
        (tmp_path / "out.partial" / ".tqdm-seg.tmp.x").write_text("half")
    prepare("folder", *argv)
    assert contents(tmp_path / "out") == expected and not (tmp_path / "out.partial").exists()


def test_a_kill_while_the_old_set_is_deleted_leaves_nothing_for_good(tmp_path):
    argv = own(tmp_path, "a")
    prepare("folder", *argv)
    prepare("folder", tmp_path / "images", tmp_path / "again", *argv[2:])
    (tmp_path / "again").rename(tmp_path / ".tqdm-seg.old.out")
    prepare("folder", *argv)
    assert not (tmp_path / ".tqdm-seg.old.out").exists()


def test_what_a_killed_overwrite_left_is_removed_unless_it_is_somebodys(tmp_path):
    argv, partial = own(tmp_path, "a"), tmp_path / "out.partial"
    prepare("folder", *argv)
    prepare("folder", tmp_path / "images", tmp_path / "again", *argv[2:])
    (tmp_path / "again").rename(partial)
    (partial / "thesis.txt").write_text("mine")
    prepare("folder", *argv)
    assert (partial / "thesis.txt").read_text() == "mine"
    (partial / "thesis.txt").unlink()
    prepare("folder", *argv)
    assert not partial.exists()
    partial.mkdir()
    prepare("folder", *argv)
    assert not partial.exists()


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path, kill):
    root = orfd(tmp_path / "in", 40, size=256)
    command = [sys.executable, ROOT / "dataset_scripts/prepare_orfd.py", root, "--out", tmp_path / "out",
               "--workers", "2", "--rows-per-shard", "1"]  # fmt: skip
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests in the background may be told to ignore it
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heeds)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    while not list((tmp_path / "out.partial/data").glob("train*")):
        assert running.poll() is None
        time.sleep(0.02)
    workers = children.read_text().split()
    assert len(workers) >= 2
    running.send_signal(kill)
    _, errors = running.communicate(timeout=30)
    if kill == signal.SIGINT:
        assert running.returncode == 130 and "Traceback" not in errors and errors.strip().endswith("stopped")
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() and not _is_dead(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers live on"
        time.sleep(0.05)
    prepare("orfd", root, tmp_path / "out", "--rows-per-shard", "1")


def _is_dead(pid: str) -> bool:
    """Whether a process has ended, though nobody asked for its status yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_the_number_of_workers_heeds_the_cpus_of_the_process():
    code = (
        "import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import tqdm_seg.data.options as options\nprint(options.CPUS)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "1\n"
