"""Leaked test scenes are found, by name, by time and by image, and the published lists give the published overlap."""

import csv
import io
import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageEnhance
from shard_helpers import LISTS as ALL_LISTS
from shard_helpers import orfd, png, prepare, save

from tqdm_seg.commands import start
from tqdm_seg.data.audit import nearest_hashes
from tqdm_seg.data.scenes import canonical_name, recording_time

LISTS = ALL_LISTS / "scenes"
IMAGES = "near-duplicate images"
START = 1623721490000  # a frame's milliseconds since 1970
# How an image is stored that is shown upright under each EXIF orientation.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip


class Audit(NamedTuple):
    """What a run gave: exit status, printed text, and the JSON report (None where none was written)."""

    status: int
    out: str
    err: str
    report: dict | None

    def pairs(self, check: str) -> list[tuple]:
        """Findings of a check without their notes, in the order of the report."""
        return [(f["first"], f["second"], f["amount"]) for f in self.report["checks"][check]["findings"]]


@pytest.fixture
def audit(tmp_path, capsys) -> Callable[..., Audit]:
    """Runs the program in this process."""

    def run(*arguments: object) -> Audit:
        report = tmp_path / "report.json"
        report.unlink(missing_ok=True)
        try:
            status = start("audit", [*map(str, arguments), "--json", str(report)])
        except SystemExit as stop:
            status = stop.code
        return Audit(status, *capsys.readouterr(), json.loads(report.read_text()) if report.exists() else None)

    return run


def names(path: Path, *lines: str) -> Path:
    """A list of names."""
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@cache
def scenery(seed: int, height: int = 180, width: int = 320) -> Image.Image:
    """An image like a photograph: large forms stronger than small ones, a horizon, a few things with sharp edges."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)) + 1 / width
    field = np.fft.ifft2(np.fft.fft2(rng.normal(size=(3, height, width))) / frequency**1.3).real  # (3, H, W)
    field = 0.3 * field / field.std() + field[:1] / field[:1].std()  # colours that mostly vary together
    field[:, : int(height * rng.uniform(0.3, 0.6))] += rng.uniform(0.5, 1.5)
    for _ in range(4):
        top, left = rng.integers(0, height * 3 // 4), rng.integers(0, width * 3 // 4)
        field[:, top : top + rng.integers(10, height // 3), left : left + rng.integers(10, width // 3)] += rng.normal()
    return Image.fromarray((110 + 30 * field).clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def bricks(seed: int, size: int = 512) -> Image.Image:
    """A fine regular texture, whose large forms are weak."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    x = x + 15 * (y // 15 % 2)
    joints = (y % 15 < 3) | (x % 30 < 3)
    tones = rng.normal(0, 12, (size // 15 + 1, size // 30 + 2))[y // 15, x // 30]
    pixels = 140 + tones - 60 * joints + rng.normal(0, 3, (size, size))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def resized(width: float, height: float) -> Callable[[Image.Image], Image.Image]:
    """Resizing to a size, or by factors if they are small."""
    return lambda p: p.resize((round(p.width * width), round(p.height * height)) if width < 9 else (width, height))


def brightened(factor: float) -> Callable[[Image.Image], Image.Image]:
    """Brightening as photo programs do, up to white."""
    return lambda p: ImageEnhance.Brightness(p).enhance(factor)


def save_images(
    folder: Path, made: list[Image.Image], prefix: str = "", suffix: str = ".png", **options: object
) -> Path:
    """A folder of images, named 00, 01, ... behind the prefix."""
    folder.mkdir(parents=True)
    for i, image in enumerate(made):
        image.save(folder / f"{prefix}{i:02d}{suffix}", **options)
    return folder


# -- scenes ---------------------------------------------------------------------------------------------


def test_road3d_test_against_orfd_training_gives_exactly_the_three_known_scenes(tmp_path):
    known = sorted((LISTS / "road3d_orfd_overlap_scenes.txt").read_text().split())
    assert known == ["x0613_1627", "x2021_0223_1310", "y0613_1248"]
    test, training = LISTS / "road3d_test_scenes.txt", LISTS / "orfd_train_scenes.txt"
    # In another order, and with the names in their other form.
    others = names(tmp_path / "training.txt", *map(canonical_name, reversed(training.read_text().split())))
    for other in (training, others):
        # As a user runs it.
        command = [sys.executable, "-m", "tqdm_seg.data.audit", test, other, "--json", tmp_path / "leaks.json"]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert result.returncode == 3, result.stderr
        assert "LEAKS: same scene 3" in result.stdout
        report = json.loads((tmp_path / "leaks.json").read_text())
        found = report["checks"]["same scene"]["findings"]
        assert sorted(finding["first"] for finding in found) == known
        assert {canonical_name(finding["second"]) for finding in found} == set(map(canonical_name, known))


def test_lists_without_a_common_scene_pass(tmp_path, audit):
    first = names(tmp_path / "a.txt", "x0613_1627")
    result = audit(first, names(tmp_path / "b.txt", "y0615_1627"), "--minutes", 10)
    assert result.status == 0 and "no leak; checked: same scene, scenes near in time" in result.out
    result = audit(first, names(tmp_path / "b.txt", "y0613_1631"), "--minutes", 10)
    assert result.status == 3 and "scenes near in time 1" in result.out
    assert result.pairs("scenes near in time") == [("x0613_1627", "y0613_1631", 4.0)]


def test_scenes_near_in_time_are_those_within_the_minutes_that_are_not_the_same(tmp_path, audit):
    first = names(tmp_path / "a.txt", "x0613_1627", "y2021_1231_2355", "a1")
    second = names(tmp_path / "b.txt", "0613-1627", "y0613_1637", "y0613_1638", "2022-0101-0003_2", "0101-0004")
    result = audit(first, second, "--minutes", 10)
    assert result.pairs("same scene") == [("x0613_1627", "0613-1627", None)]
    assert result.pairs("scenes near in time") == [
        ("y2021_1231_2355", "2022-0101-0003_2", 8.0),
        ("y2021_1231_2355", "0101-0004", 9.0),
        ("x0613_1627", "y0613_1637", 10.0),
    ]
    notes = [f"1 scene names of {first} hold no time, not compared: a1"]
    assert result.report["checks"]["scenes near in time"]["notes"] == notes


def test_two_parts_of_one_drive_are_found(tmp_path, audit):
    # The raw folders of ORFD: the drive is the folder above image_data, its label images are no frames.
    for part, first in (("training", 0), ("validation", 9)):
        scene = tmp_path / part / "x2021_0223_1756"
        save_images(scene / "image_data", [scenery(first), scenery(first + 1)], str(START + 1000 * first)[:-2])
        save_images(scene / "gt_image", [scenery(99)])
    result = audit(tmp_path / "validation", tmp_path / "training")
    assert result.status == 3 and "LEAKS: same scene 1\n" in result.out, result.err
    assert [part["frames"] for part in result.report["sets"]] == [2, 2]


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("x0613_1627", "0613-1627"),
        ("c2021_0228_1819", "2021-0228-1819"),
        ("y2021_0222_1744_2", "2021-0222-1744-2"),
        ("0613-1627", "0613-1627"),
    ],
)
def test_canonical_names(name, canonical):
    assert canonical_name(name) == canonical


@pytest.mark.parametrize("name", ["x1313_1200", "x0632_1200", "y2021_0223_2510"])
def test_impossible_times_are_errors_that_name_the_scene(name, tmp_path, audit):
    with pytest.raises(ValueError, match=name):
        recording_time(name)
    result = audit(names(tmp_path / "a.txt", "x0613_1627", name), LISTS / "orfd_train_scenes.txt")
    assert result.status == 1 and name in result.err and "line 2" in result.err


# -- frames by name -------------------------------------------------------------------------------------


def test_frames_of_one_file_name_are_found_at_other_paths_and_in_other_formats(tmp_path, audit):
    # Subsets of GTA5, whose frames are numbered through.
    first = names(tmp_path / "a.txt", "00001.png", "00002.png", "00003.png")
    second = names(tmp_path / "b.txt", "images/00002.jpg", "images/00003.png", "images/00004.png")
    result = audit(first, second)
    assert result.status == 3
    assert result.pairs("same frame") == [
        ("00002.png", "images/00002.jpg", None),
        ("00003.png", "images/00003.png", None),
    ]
    assert result.report["checks"][IMAGES]["skipped"] == "no images in the first and the second set"


def test_file_names_that_repeat_within_a_set_are_told_apart_by_their_folders(tmp_path, audit):
    first = names(tmp_path / "a.txt", "train/aachen/0000.png", "train/bremen/0000.png")
    second = names(tmp_path / "b.txt", "val/bremen/0000.png", "val/cologne/0000.png")
    result = audit(first, second)
    assert result.pairs("same frame") == [("train/bremen/0000.png", "val/bremen/0000.png", None)]


def test_numbered_frames_of_a_recording_are_the_same_only_in_the_same_recording(tmp_path, audit):
    first = names(tmp_path / "a.txt", "x0613_1627/0001.png", "x0613_1627/0002.png")
    second = names(tmp_path / "b.txt", "y0613-1627/0001.jpg", "y0615_0800/0002.jpg")
    assert audit(first, second).pairs("same frame") == [("x0613_1627/0001.png", "y0613-1627/0001.jpg", None)]


def test_frames_near_in_time_are_the_nearest_ones_and_equal_stamps_are_the_same_frame(tmp_path, audit):
    first = names(tmp_path / "a.txt", *(f"a/{START + s}.png" for s in (0, 1000, 999_000)))
    second = names(tmp_path / "b.txt", *(f"b/{START + s}.png" for s in (1000, 1400, 61_400, 61_401, 500_000)))
    result = audit(first, second, "--minutes", 1)
    assert result.status == 3
    assert result.pairs("same frame") == [(f"a/{START + 1000}.png", f"b/{START + 1000}.png", None)]
    # 61,400 is exactly a minute from 1,400, not from a frame of the first set, of which 1,000 is the nearest.
    assert result.pairs("frames near in time") == [
        (f"a/{START + 1000}.png", f"b/{START + 1400}.png", 0.4),
        (f"a/{START}.png", f"b/{START + 1000}.png", 1.0),
    ]
    result = audit(first, second, "--minutes", 60.4 / 60)
    assert (f"a/{START + 1000}.png", f"b/{START + 61_400}.png", 60.4) in result.pairs("frames near in time")
    assert audit(first, second).report["checks"]["frames near in time"]["skipped"] == "give --minutes N"


@pytest.mark.parametrize("seed", range(5))
def test_frames_near_in_time_equal_a_search_through_all_pairs(seed, tmp_path, audit):
    rng = random.Random(seed)
    first, second = (sorted(rng.sample(range(300_000), 30)) for _ in range(2))
    lists = [
        names(tmp_path / f"{i}.txt", *(f"{START + t}.png" for t in part)) for i, part in enumerate((first, second))
    ]

    def nearest(times: list[int], others: list[int]) -> set[tuple[int, int]]:
        found = {a: min((abs(a - b), b) for b in others if a != b) for a in times}
        return {(a, b) for a, (gap, b) in found.items() if gap <= 3000}

    expected = nearest(first, second) | {(a, b) for b, a in nearest(second, first)}
    found = audit(*lists, "--minutes", 0.05).pairs("frames near in time")
    assert {(int(a[:-4]) - START, int(b[:-4]) - START) for a, b, _ in found} == expected and len(found) == len(expected)
    assert all(amount == abs(int(a[:-4]) - int(b[:-4])) / 1000 for a, b, amount in found)


@pytest.mark.parametrize(
    "lines",
    [["00001.png", "00002.png", "00001.png"], ["x0613_1627", "y0615_1200", "0613-1627"]],
    ids=["frames", "scenes"],
)
def test_names_that_stand_twice_in_a_list_are_named(lines, tmp_path, audit):
    result = audit(names(tmp_path / "a.txt", *lines), LISTS / "orfd_train_scenes.txt")
    assert result.status == 1 and "twice" in result.err and f"{lines[2]} in line 3" in result.err


# -- images -------------------------------------------------------------------------------------------

CHANGES = {
    "JPEG 50": (lambda p: p, {"suffix": ".jpg", "quality": 50}),
    "JPEG 75": (lambda p: p, {"suffix": ".jpg", "quality": 75}),
    "JPEG 95": (lambda p: p, {"suffix": ".jpg", "quality": 95}),
    "WebP": (lambda p: p, {"suffix": ".webp"}),
    "grey": (lambda p: p.convert("L"), {}),
    "palette": (lambda p: p.quantize(64), {}),
    "half": (resized(0.5, 0.5), {}),
    "double": (resized(2, 2), {}),
    "224 x 224": (resized(224, 224), {}),
    "half, JPEG 75": (resized(0.5, 0.5), {"suffix": ".jpg", "quality": 75}),
    "brighter": (brightened(1.25), {}),
    "darker": (brightened(0.7), {}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_picture_is_found_in_another_form_and_taken_for_no_other(change, tmp_path, audit):
    alter, stored_as = CHANGES[change]
    originals = [scenery(seed) for seed in range(12)]
    first = save_images(tmp_path / "a", originals, "a")
    second = save_images(tmp_path / "b", [alter(p) for p in originals[:9]], "b", **stored_as)
    result = audit(first, second)
    found = {(a[1:3], b[1:3]) for a, b, _ in result.pairs(IMAGES)}
    assert result.status == 3 and found == {(f"{i:02d}", f"{i:02d}") for i in range(9)}


def test_different_pictures_are_not_found(tmp_path, audit):
    first = save_images(tmp_path / "a", [scenery(seed, 90, 160) for seed in range(100, 140)], "a")
    second = save_images(tmp_path / "b", [scenery(seed, 90, 160) for seed in range(200, 240)], "b")
    result = audit(first, second)
    assert result.status == 0 and result.pairs(IMAGES) == []
    assert "no leak; checked: same frame, near-duplicate images" in result.out


def test_a_fine_texture_is_found_as_jpeg(tmp_path, audit):
    # Decoding JPEGs at an eighth of their size changed its hash by more than the default distance.
    textures = [bricks(seed) for seed in range(6)]
    first = save_images(tmp_path / "a", textures)
    for quality in (50, 75, 95):
        second = save_images(tmp_path / f"{quality}", textures, suffix=".jpg", quality=quality)
        found = {(Path(a).stem, Path(b).stem) for a, b, _ in audit(first, second).pairs(IMAGES)}
        assert {(f"{i:02d}", f"{i:02d}") for i in range(6)} <= found


def test_pictures_of_one_colour_are_left_out_with_a_note(tmp_path, audit):
    noise = np.random.default_rng(0).integers(99, 102, (90, 160), np.uint8)
    plain = [Image.new("RGB", (160, 90), "grey"), Image.fromarray(noise)]
    first = save_images(tmp_path / "a", [*plain, scenery(1)], "a")
    second = save_images(tmp_path / "b", [*plain, scenery(1)], "b")
    result = audit(first, second)
    assert result.status == 3 and result.pairs(IMAGES) == [("a02.png", "b02.png", 0)]
    left_out = [f"2 images of {folder} are of one even colour, not compared" for folder in (first, second)]
    assert result.report["checks"][IMAGES]["notes"] == left_out
    result = audit(first, save_images(tmp_path / "c", plain[:1], "c"))
    assert result.status == 0 and "1 images of" in result.out


@pytest.mark.parametrize("orientation", STORED)
def test_a_jpeg_that_exif_turns_equals_its_upright_copy(orientation, tmp_path, audit):
    upright = [scenery(seed) for seed in range(3)]
    sideways = [image.transpose(STORED[orientation]) for image in upright]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    first = save_images(tmp_path / "a", upright, "a", ".jpg", quality=90)
    turned = save_images(tmp_path / "b", sideways, "b", ".jpg", quality=90, exif=exif)
    found = {(a[1:3], b[1:3]) for a, b, _ in audit(first, turned).pairs(IMAGES)}
    assert found == {("00", "00"), ("01", "01"), ("02", "02")}
    as_stored = save_images(tmp_path / "c", sideways, "c", ".jpg", quality=90)
    assert audit(first, as_stored).pairs(IMAGES) == []


def exif_bytes(*tags: tuple[int, int, int]) -> bytes:
    """An EXIF block of (tag, type, value) of one value each."""
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


def test_odd_exif_tags_beside_the_orientation_do_no_harm(tmp_path, audit):
    # A width of type BYTE: Pillow reads it, but cannot write it, which it tries when it turns the image.
    exif = exif_bytes((0x0100, 1, 5), (ExifTags.Base.Orientation, 3, 6))
    first = save_images(tmp_path / "a", [scenery(1)], "a")
    second = save_images(tmp_path / "b", [scenery(1).transpose(STORED[6])], "b", ".jpg", exif=exif)
    assert [found[:2] for found in audit(first, second).pairs(IMAGES)] == [("a00.png", "b00.jpg")]


def broken_files() -> dict[str, bytes]:
    """Images that cannot be compared."""
    files = {"no_image.png": b"<html>404</html>", "empty.jpg": b""}
    for name, exif in (("cut.png", None), ("cut.jpg", None), ("exif.png", b"II*\0\x08")):
        scenery(1).save(content := io.BytesIO(), {"png": "PNG", "jpg": "JPEG"}[name[-3:]], exif=exif or Image.Exif())
        files[name] = content.getvalue() if exif else content.getvalue()[:-2000]
    files["deep.png"] = png(16, 0, [struct.pack(">32H", *range(0, 64000, 2000))] * 32, 32)
    return files


def test_broken_and_16_bit_pictures_are_named_and_the_others_compared(tmp_path, audit):
    first, second = (save_images(tmp_path / name, [scenery(5), scenery(6)], name) for name in "ab")
    for name, content in broken_files().items():
        (first / name).write_bytes(content)
    (second / "cut.png").write_bytes(broken_files()["cut.png"])
    result = audit(first, second)
    assert result.status == 1
    assert result.pairs(IMAGES) == [("a00.png", "b00.png", 0), ("a01.png", "b01.png", 0)]
    expected = [f"{first}: cannot read {name} (" for name in sorted(broken_files())] + [
        f"{second}: cannot read cut.png ("
    ]
    unreadable = result.report["unreadable"]
    assert [line[: len(start)] for line, start in zip(unreadable, expected, strict=True)] == expected
    assert "7 images could not be read:" in result.err and all(line in result.err for line in unreadable)
    assert "mode I;16, more than 8 bits" in unreadable[2] and " at 0x" not in result.err


def test_no_pictures_compares_names_only(tmp_path, audit):
    first, second = (save_images(tmp_path / name, [scenery(5)], name) for name in "ab")
    (first / "cut.png").write_bytes(b"")
    result = audit(first, second, "--no-images")
    assert result.status == 0 and result.report["checks"][IMAGES]["skipped"] == "--no-images was given"


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize("distance", [0, 4, 20])
def test_nearest_hashes_equal_a_search_through_all_pairs(distance, block):
    rng = np.random.default_rng(distance)
    # Few originals with few flipped bits: many pairs are near, and many equally near.
    originals = rng.random((12, 64)) < 0.5
    first, second = (originals[rng.integers(0, 12, n)] ^ (rng.random((n, 64)) < 0.03) for n in (90, 50))
    bits_apart = [[int(sum(a != b)) for b in second] for a in first]
    expected = set()
    for i, row in enumerate(bits_apart):
        expected.add((i, row.index(min(row)), min(row)))
    for j in range(len(second)):
        column = [row[j] for row in bits_apart]
        expected.add((column.index(min(column)), j, min(column)))
    expected = sorted(found for found in expected if found[2] <= distance)
    assert expected and nearest_hashes(first, second, distance, block) == expected
    assert nearest_hashes(first[:0], second, distance, block) == []


# -- kinds of sets --------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path) -> tuple[Path, Path]:
    """ORFD in miniature and its shards: two of the three training frames are in validation, as another scene."""
    root = orfd(tmp_path / "orfd", frames=3)
    orfd(root, frames=2, scene="y0613_1300", split="validation")
    # One that only validation has.
    scene = root / "validation" / "y0613_1300"
    (scene / "gt_image" / f"{START + 1}_fillcolor.png").rename(scene / "gt_image" / f"{START + 500}_fillcolor.png")
    (scene / "image_data" / f"{START + 1}.png").unlink()
    save(scene / "image_data" / f"{START + 500}.png", np.asarray(scenery(1).resize((8, 8))))
    prepare("orfd", root, tmp_path / "shards")
    return root, tmp_path / "shards"


def test_shards_and_each_of_their_splits_equal_the_folders_that_they_were_made_of(prepared, audit):
    root, shards = prepared
    folders = {f"{shards}:train": root / "training", f"{shards}:validation": root / "validation", f"{shards}": root}
    for part, folder in folders.items():
        for other in folders.values():
            by_shards, by_folder = audit(part, other, "--minutes", 9), audit(folder, other, "--minutes", 9)
            assert by_shards.status == by_folder.status == 3
            assert by_shards.report["sets"][0]["frames"] == by_folder.report["sets"][0]["frames"] > 0
            for name, check in by_shards.report["checks"].items():
                same = {(Path(f["first"]).name, f["second"], f["amount"]) for f in check["findings"]}
                assert same == {(Path(a).name, b, amount) for a, b, amount in by_folder.pairs(name)}, name
    result = audit(f"{shards}:validation", root / "training")
    assert result.pairs("same scene") == []
    frame = (f"validation/y0613_1300/image_data/{START}.png", f"y0613_1242/image_data/{START}.png")
    assert result.pairs("same frame") == [(*frame, None)] and result.pairs(IMAGES) == [(*frame, 0)]


def test_a_damaged_picture_in_a_shard_is_named_and_the_others_compared(prepared, audit):
    root, shards = prepared
    shard = next((shards / "data").glob("train-*"))
    content = (root / "training" / "y0613_1242" / "image_data" / f"{START + 1}.png").read_bytes()
    assert shard.read_bytes().count(content) == 1
    shard.write_bytes(shard.read_bytes().replace(content, content[:60] + b"!" + content[61:]))
    result = audit(f"{shards}:train", root / "training")
    assert result.status == 1 and len(result.pairs(IMAGES)) == 2
    assert len(result.report["unreadable"]) == 1 and f"y0613_1242/image_data/{START + 1}.png" in result.err


def test_a_split_that_is_not_there_is_an_error_that_names_those_that_are(prepared, audit):
    root, shards = prepared
    result = audit(f"{shards}:testing", root)
    assert result.status == 1 and "'testing'" in result.err and "train, validation" in result.err


def test_linked_folders_are_read_once_and_hidden_files_not_at_all(tmp_path, audit):
    folder = save_images(tmp_path / "a" / "deep", [scenery(1)], "a").parent
    (folder / "round").symlink_to(folder, target_is_directory=True)
    (folder / "elsewhere").symlink_to(save_images(tmp_path / "far", [scenery(2)], "far"), target_is_directory=True)
    (folder / "._a00.png").write_bytes(b"what macOS leaves behind")
    result = audit(folder, save_images(tmp_path / "b", [scenery(2)], "b"))
    assert result.status == 3 and result.pairs(IMAGES) == [("elsewhere/far00.png", "b00.png", 0)]
    assert result.report["sets"][0]["frames"] == 2


def test_a_folder_that_cannot_be_opened_stops_the_audit(tmp_path, audit, monkeypatch):
    folder = save_images(tmp_path / "a", [scenery(1)], "a")
    save_images(folder / "closed", [scenery(2)], "c")
    scandir = os.scandir

    def closed(path: object) -> object:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    result = audit(folder, save_images(tmp_path / "b", [scenery(2)], "b"))
    assert result.status == 1 and str(folder / "closed") in result.err


# -- the report -----------------------------------------------------------------------------------------


@pytest.fixture
def two_sets(tmp_path) -> tuple[Path, Path]:
    """Folders that have in common more than is printed, by every check."""
    drive = [scenery(seed, 60, 80) for seed in range(30)]
    save_images(tmp_path / "a" / "x0613_1627" / "image_data", drive)
    save_images(tmp_path / "b" / "y0613_1627" / "image_data", drive[:25])
    for scene, stamp in (("a/x0613_1630", START), ("b/y0613_1634", START + 12_300)):
        save_images(tmp_path / scene / "image_data", [scenery(stamp, 60, 80)], str(stamp)[:-2])
    return tmp_path / "a", tmp_path / "b"


def test_json_and_csv_hold_all_findings_and_the_table_the_first(two_sets, tmp_path, audit):
    result = audit(*two_sets, "--minutes", 10, "--csv", tmp_path / "leaks.csv")
    assert result.status == 3 and result.report["leaks"] is True and result.report["unreadable"] == []
    checks = result.report["checks"]
    assert {name: bool(check["findings"]) for name, check in checks.items()} == dict.fromkeys(checks, True)
    with open(tmp_path / "leaks.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [
        {"check": name, **finding, "unit": check["unit"]}
        for name, check in checks.items()
        for finding in check["findings"]
    ]
    for row in rows:
        row["amount"] = float(row["amount"]) if row["amount"] else None
    assert rows == expected
    for check in checks.values():
        order = [(f["amount"] or 0, f["first"], f["second"]) for f in check["findings"]]
        assert order == sorted(order)  # nearest first, whatever order sets of Python have
    assert len(checks["same frame"]["findings"]) == 25 and "... and 5 more, all in --json and --csv" in result.out
    assert " 12.3 seconds" in result.out


def test_exchanging_the_sets_exchanges_every_finding(two_sets, audit):
    there, back = audit(*two_sets, "--minutes", 10), audit(*reversed(two_sets), "--minutes", 10)
    for name in there.report["checks"]:
        found = there.pairs(name)
        assert found and len(set(found)) == len(found)
        assert set(found) == {(b, a, amount) for a, b, amount in back.pairs(name)}, name


def test_long_times_keep_their_milliseconds_in_the_csv(tmp_path, audit):
    first, second = (names(tmp_path / f"{t}.txt", f"{START + t}.png") for t in (0, 12_345_678))
    audit(first, second, "--minutes", 300, "--csv", tmp_path / "leaks.csv")
    assert (tmp_path / "leaks.csv").read_text().splitlines()[1].endswith(",12345.678,seconds,")


def test_the_order_of_names_makes_no_difference(tmp_path, audit):
    lines = ["x0613_1627", "y0615_1200", *(f"{START + 700 * i}.png" for i in range(9)), "a/1.png", "a/2.png"]
    first = names(tmp_path / "a.txt", *lines)
    second = names(tmp_path / "b.txt", "0613-1627", "0615-1205", f"{START + 300}.png", "b/2.png", "b/1.png")
    before = audit(first, second, "--minutes", 10)
    assert before.status == 3
    for path in (first, second):
        shuffled = path.read_text().split()
        random.Random(0).shuffle(shuffled)
        names(path, *shuffled)
    after = audit(first, second, "--minutes", 10)
    assert after.report == before.report and after.out == before.out


def test_file_names_that_are_no_text_can_be_reported(tmp_path, audit):
    first, second = (save_images(tmp_path / name, [scenery(1)]) for name in "ab")
    try:
        (first / "00.png").rename(first / os.fsdecode(b"caf\xe9.png"))
    except OSError:
        pytest.skip("this file system takes only names that are text")
    result = audit(first, second, "--csv", tmp_path / "leaks.csv")
    assert result.status == 3 and result.pairs(IMAGES) == [("caf\udce9.png", "00.png", 0)]
    assert r"caf\udce9.png" in result.out and r"caf\udce9.png" in (tmp_path / "leaks.csv").read_text()


@pytest.mark.parametrize(
    ("first", "named"),
    [
        ("nowhere.txt", "nowhere.txt"), ("empty.txt", "empty.txt is empty"), ("folder", "folder holds no image"),
        ("image.png", "image.png is no text file"), ("x" * 300, "File name too long"),
        ("frames.txt", "frames.txt"),
    ],
    ids=lambda value: value[:20],
)  # fmt: skip
def test_bad_input_is_named_with_one_line(first, named, tmp_path, audit):
    names(tmp_path / "empty.txt")
    names(tmp_path / "frames.txt", "00001.png")
    (tmp_path / "folder").mkdir()
    scenery(1).save(tmp_path / "image.png")
    result = audit(tmp_path / first, LISTS / "orfd_train_scenes.txt")
    assert result.status == 1 and named in result.err and result.report is None


def test_reports_that_cannot_be_written_end_the_audit_before_the_work_where_that_can_be_known(tmp_path, audit):
    sets = [names(tmp_path / f"{i}.txt", "x0613_1627") for i in range(2)]
    for out in (tmp_path, tmp_path / "nowhere" / "leaks.csv", tmp_path / ("x" * 300)):
        result = audit(*sets, "--csv", out)
        assert result.status == 1 and str(out)[:100] in result.err and result.out == ""
    # The name is short enough, that of the unfinished file is not.
    result = audit(*sets, "--csv", tmp_path / ("x" * 254))
    assert result.status == 1 and "LEAKS: same scene 1" in result.out


@pytest.mark.parametrize("option", [["--minutes", "-1"], ["--minutes", "nan"], ["--distance", "32"]])
def test_impossible_options_give_status_2(option, audit):
    lists = [LISTS / "orfd_train_scenes.txt"] * 2
    assert audit(*lists, *option).status == 2
