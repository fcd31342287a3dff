"""Official layouts of all datasets in miniature, with the traps that are in them, through the real programs."""

import errno
import json
import os
import signal
import struct
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from shard_helpers import LISTS, ROOT, call, contents, orfd, photo, png, save, stored
from shard_helpers import prepare as make

from tqdm_seg.configuration_tqdm import CITYSCAPES_CLASSES
from tqdm_seg.data import prepare as core
from tqdm_seg.data.files import example
from tqdm_seg.data.label_maps import (
    CITYSCAPES,
    GTA5,
    MAPILLARY,
    ORFD,
    RUGD_COLOURS,
    STREET_CLASSES,
    SYNTHIA,
    TRAIN_IDS,
    LabelMap,
)
from tqdm_seg.data.shards import check_same_labels, read_manifest

EXAMPLES = example("orfd_mini").parent
# One colour for every index: whoever reads colours loses the ids.
ONE_COLOUR = [0, 0, 142] * 256
PLAIN = LabelMap("plain/3", ("a", "b", "c"), "values", ((0, 0), (1, 1), (2, 2), (255, 255)), "ids as they are")


# -- label maps and decoding ----------------------------------------------------------------------------


def test_label_maps_have_not_changed():
    # The hash stands for names, reading and table; a change makes every prepared dataset another one.
    assert STREET_CLASSES == CITYSCAPES_CLASSES
    maps = (CITYSCAPES, GTA5, SYNTHIA, TRAIN_IDS, *MAPILLARY.values(), *ORFD.values())
    assert {label_map.name: label_map.sha256[:8] for label_map in maps} == {
        "cityscapes_ids/19": "0beb7d1c", "gta5_ids/19": "a816d0d7", "synthia_ids/19": "b969d20f",
        "train_ids/19": "aa18dfc6", "mapillary_v1.2/robustnet": "4fce719d", "mapillary_v1.2/openseg": "67135015",
        "orfd/merged": "3c35c6db", "orfd/ignored": "be6b5c79",
    }  # fmt: skip


def test_ids_survive_every_kind_of_png():
    grey = bytes([9, 9, 9] * 256)
    files = {
        "1-bit grey": (png(1, 0, [bytes([0b01000000])], 3), [0, 1, 0]),
        "2-bit grey": (png(2, 0, [bytes([0b00011000])], 3), [0, 1, 2]),
        "4-bit grey": (png(4, 0, [bytes([0x01, 0x20])], 3), [0, 1, 2]),
        "8-bit grey": (png(8, 0, [bytes([0, 2, 255])], 3), [0, 2, 255]),
        "16-bit grey": (png(16, 0, [struct.pack(">3H", 0, 2, 255)], 3), [0, 2, 255]),
        "grey with alpha": (png(8, 4, [bytes([0, 0, 2, 0, 255, 9])], 3), [0, 2, 255]),
        "1-bit palette": (png(1, 3, [bytes([0b01000000])], 3, grey[:6]), [0, 1, 0]),
        "2-bit palette": (png(2, 3, [bytes([0b00011000])], 3, grey[:12]), [0, 1, 2]),
        "4-bit palette": (png(4, 3, [bytes([0x01, 0x20])], 3, grey[:48]), [0, 1, 2]),
        "8-bit palette": (png(8, 3, [bytes([0, 2, 255])], 3, grey), [0, 2, 255]),
    }
    for name, (content, ids) in files.items():
        labels = PLAIN.labels(content)
        assert labels.dtype == np.uint8 and labels.tolist() == [ids], name


def test_values_above_255_are_not_cut_to_known_ones():
    with pytest.raises(ValueError, match=r"holds the ids 257, 300, .* first at row 0, column 1 \(2 of 3 pixels\)"):
        PLAIN.labels(png(16, 0, [struct.pack(">3H", 0, 300, 257)], 3))


def test_what_holds_no_ids_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds colours, not ids"):
        PLAIN.labels(png(8, 2, [bytes(9)], 3))
    with pytest.raises(ValueError, match="is no PNG"):
        PLAIN.labels(save(tmp_path / "a.jpg", np.zeros((8, 8))).read_bytes())
    with pytest.raises(ValueError, match="8-bit PNG of 3 channels; a 16-bit RGB"):
        SYNTHIA.labels(png(8, 2, [bytes(9)], 3))
    with pytest.raises(ValueError, match="16-bit"):
        ORFD["merged"].labels(png(16, 2, [bytes(18)], 3))
    whole = png(16, 2, [os.urandom(6 * 50) for _ in range(20)], 50)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 16
    for broken in (bytes(damaged), whole[: len(whole) // 2]):
        with pytest.raises(ValueError, match="cannot be decoded"):
            SYNTHIA.labels(broken)


# -- the layouts ----------------------------------------------------------------------------------------


def gta5(root: Path, names: dict[str, list[int]], folder: str = "") -> Path:
    """Frames with the given ids in one row, stretched to 1052x1914's shape in small."""
    for name, ids in names.items():
        photo(root / "images" / folder / f"{name}.png", 1, len(ids))
        save(root / "labels" / folder / f"{name}.png", [ids], ONE_COLOUR)
    return root


def test_gta5_keeps_ids_that_share_a_colour_and_leaves_out_the_known_bad_frames(tmp_path):
    gta5(tmp_path / "in", {"00001": [26, 34, 7, 0], "00022": [33, 31, 29, 255], "00011": [11, 11, 17, 19]})
    gta5(tmp_path / "in", {"12160": [0], "15188": [7], "17705": [7]})
    photo(tmp_path / "in/images/15188.png", 3, 5)
    photo(tmp_path / "in/images/17705.png", 3, 5)
    save(tmp_path / "in/labels/00001_labelTrainIds.png", np.zeros((1, 4)))  # what other converters leave behind
    manifest = make("gta5", tmp_path / "in", tmp_path / "out")
    rows = stored(tmp_path / "out")
    assert {key: (row["split"], row["labels"].tolist()) for key, row in rows.items()} == {
        "images/00001.png": ("train", [[13, 255, 0, 255]]),
        "images/00022.png": ("validation", [[18, 16, 255, 255]]),
        "images/00011.png": ("test", [[2, 2, 5, 6]]),
    }
    assert rows["images/00011.png"]["class_pixels"] == [0, 0, 2, 0, 0, 1, 1] + 12 * [0]
    original = (tmp_path / "in/images/00001.png").read_bytes()
    assert rows["images/00001.png"]["image"] == {"bytes": original, "path": "00001.png"}
    assert manifest["skipped"] == {
        "in no list of the robustnet split": ["images/12160.png"],
        "sizes of image and label differ in the public release": ["images/15188.png", "images/17705.png"],
    }
    assert "1 train frames were found; published: 12387" in manifest["notes"]


def test_gta5_in_sub_folders_and_a_name_in_two_of_them(tmp_path):
    gta5(tmp_path / "in", {"00001": [7]}, "train")
    gta5(tmp_path / "in", {"00022": [8]}, "valid")
    make("gta5", tmp_path / "in", tmp_path / "out")
    assert {key: row["split"] for key, row in stored(tmp_path / "out").items()} == {
        "images/train/00001.png": "train", "images/valid/00022.png": "validation",
    }  # fmt: skip
    gta5(tmp_path / "in", {"00001": [7]})
    with pytest.raises(ValueError, match=r"images/00001\.png and .*train/00001\.png have the same name"):
        make("gta5", tmp_path / "in", tmp_path / "out2")


def test_gta5_official_split_is_read_from_the_download(tmp_path, monkeypatch):
    gta5(tmp_path / "in", {"00001": [7], "00002": [8], "12160": [0], "00009": [0]})
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        make("gta5", tmp_path / "in", tmp_path / "out", "--splits", "official")
    lists = {"trainIds": [[12160], [2]], "valIds": [[1]], "testIds": [[77]]}
    scipy = types.SimpleNamespace(loadmat=lambda path: {name: np.array(ids) for name, ids in lists.items()})
    monkeypatch.setitem(sys.modules, "scipy", types.ModuleType("scipy"))
    monkeypatch.setitem(sys.modules, "scipy.io", scipy)
    manifest = make("gta5", tmp_path / "in", tmp_path / "out", "--splits", "official")
    assert {key[7:12]: row["split"] for key, row in stored(tmp_path / "out").items()} == {
        "00001": "validation", "00002": "train", "12160": "train",
    }  # fmt: skip
    assert manifest["skipped"] == {"in no list of the official split": ["images/00009.png"]}


def coloured(path: Path, colours: list[tuple[int, int, int]]) -> None:
    """A palette mask of one row of these colours."""
    save(path, [range(len(colours))], [value for colour in colours for value in colour])


def test_ycor_holds_its_last_frames_back_in_both_layouts(tmp_path):
    trail, grass, sky, background = (178, 176, 153), (128, 255, 0), (1, 88, 255), (255, 255, 255)
    for folder, number in (("train", 2), ("train", 10), ("train", 700), ("valid", 839)):
        frame = tmp_path / "in/yamaha_v0" / folder / f"iid{number:06d}"
        photo(frame / "rgb.jpg", 1, 4)
        coloured(frame / "labels.png", [trail, grass, sky, background])
    splits = {"iid000002": "train", "iid000010": "train", "iid000700": "validation", "iid000839": "test"}
    expected = {
        "names": [0, 1, 7, 255],
        "words": [0, 1, 6, 255],
        "trail_only": [1, 0, 0, 255],
        "with_grass": [1, 1, 0, 255],
    }
    for choice, labels in expected.items():
        make("ycor", tmp_path / "in", tmp_path / choice, "--hold-out-last", 1, "--map", choice)
        rows = stored(tmp_path / choice)
        assert {key.split("/")[-2]: row["split"] for key, row in rows.items()} == splits
        assert all(row["labels"].tolist() == [labels] for row in rows.values())
    for name in ("0000", "0001", "0002"):
        photo(tmp_path / f"plain/train/images/{name}.jpg", 1, 4)
        save(tmp_path / f"plain/train/masks/{name}.png", [[0, 1, 7, 255]])
    make("ycor", tmp_path / "plain", tmp_path / "out", "--hold-out-last", 1, "--map", "with_grass")
    rows = stored(tmp_path / "out")
    assert [rows[key]["split"] for key in sorted(rows)] == ["train", "train", "validation"]
    assert all(row["labels"].tolist() == [[1, 1, 0, 255]] for row in rows.values())
    with pytest.raises(ValueError, match="--hold-out-last 3 of 3 frames"):
        make("ycor", tmp_path / "plain", tmp_path / "none", "--hold-out-last", 3)


def test_rugd_in_its_three_layouts_with_scenes_from_the_names(tmp_path):
    colours = [(108, 64, 20), (0, 102, 0), (114, 85, 47), (0, 0, 0)]  # dirt, grass, picnic table, void
    original, sample, plain = (tmp_path / name for name in ("original", "sample", "plain"))
    for scene in ("creek", "trail-3"):
        name = f"{scene}_00001"
        photo(original / f"RUGD_frames-with-annotations/{scene}/{name}.png", 1, 4)
        coloured(original / f"RUGD_annotations/{scene}/{name}.png", colours)
        photo(sample / f"images/{name}.png", 1, 4)
        coloured(sample / f"annotations/{name}.png", colours)
        photo(plain / f"test/images/{name}.jpg", 1, 4)
        save(plain / f"test/masks/{name}.png", [[1, 3, 24, 0]])
    lines = "".join(f"{i} {name} {r} {g} {b}\n" for i, (name, (r, g, b)) in enumerate(
        {"void": (0, 0, 0), **RUGD_COLOURS, "container/generic-object": RUGD_COLOURS["container"]}.items()
    ) if name != "container")  # fmt: skip
    (original / "RUGD_annotations/RUGD_annotation-colormap.txt").write_text(lines)
    expected = {
        "names": [0, 2, 23, 255],
        "words": [0, 2, 21, 255],
        "trail_only": [1, 0, 0, 255],
        "with_grass": [1, 1, 0, 255],
    }
    for root in (original, sample, plain):
        for choice, labels in expected.items():
            out = tmp_path / f"{root.name}_{choice}"
            make("rugd", root, out, "--map", choice)
            rows = list(stored(out).values())
            assert sorted((row["split"], row["scene"]) for row in rows) == [("test", "creek"), ("test", "trail-3")]
            assert all(row["labels"].tolist() == [labels] for row in rows)
    (original / "RUGD_annotations/RUGD_annotation-colormap.txt").write_text(lines.replace("108 64 20", "109 64 20"))
    with pytest.raises(ValueError, match="RUGD_annotation-colormap.txt has other colours"):
        make("rugd", original, tmp_path / "other")


def test_decisions_on_what_is_traversable_are_not_mixed(tmp_path):
    manifests = [
        {"dataset": name, "classes": ["a", "b"], "label_map": {"name": f"{name}/traversable_{choice}", "sha256": ""}}
        for name, choice in (("ycor", "trail_only"), ("rugd", "trail_only"), ("other", "with_grass"))
    ]
    check_same_labels(manifests[:2])
    with pytest.raises(ValueError, match="ycor was prepared as traversable_trail_only, other as"):
        check_same_labels(manifests)


def test_robustnet_lists_are_whole():
    counts = {path.name: len(set(path.read_text().split())) for path in LISTS.glob("robustnet_splits/*.txt")}
    assert counts == {
        "gtav_split_train.txt": 12388, "gtav_split_val.txt": 6382, "gtav_split_test.txt": 6181,
        "synthia_split_train.txt": 6580, "synthia_split_val.txt": 2820,
    }  # fmt: skip
    assert "Redistribution" in (LISTS / "robustnet_splits" / "LICENSE").read_text()


def cityscapes(root: Path, split: str, city: str, ids: list[int]) -> None:
    """One frame with its label, and the other files next to it."""
    frame = f"{city}_000000_000019"
    photo(root / "leftImg8bit" / split / city / f"{frame}_leftImg8bit.png", 1, len(ids))
    for what in ("labelIds", "instanceIds", "color", "labelTrainIds"):
        values = ids if what == "labelIds" else [77] * len(ids)
        save(root / "gtFine" / split / city / f"{frame}_gtFine_{what}.png", [values])


def test_cityscapes_reads_label_ids_and_never_the_dummy_labels_of_test(tmp_path):
    cityscapes(tmp_path / "in", "train", "aachen", [7, 1, 255, 33])  # 255: a licence plate, -1, in eight bits
    cityscapes(tmp_path / "in", "val", "munster", [26, 24, 0, 4])
    cityscapes(tmp_path / "in", "test", "berlin", [0, 0, 0, 0])
    manifest = make("cityscapes", tmp_path / "in", tmp_path / "out")
    rows = stored(tmp_path / "out").values()
    assert [(row["split"], row["scene"], row["labels"].tolist()) for row in rows] == [
        ("train", "aachen", [[0, 255, 255, 18]]), ("validation", "munster", [[13, 11, 255, 255]]),
    ]  # fmt: skip
    dummy = ["leftImg8bit/test/berlin/berlin_000000_000019_leftImg8bit.png"]
    assert manifest["skipped"] == {"gtFine/test holds dummy labels": dummy}


@pytest.mark.parametrize("top", ["", "bdd100k/"])
@pytest.mark.parametrize(
    ("images", "labels", "suffix"),
    [("images/10k", "labels/sem_seg/masks", ".png"), ("seg/images", "seg/labels", "_train_id.png")],
)
def test_bdd100k_in_both_releases(tmp_path, top, images, labels, suffix):
    for split in ("train", "val", "test"):
        photo(tmp_path / "in" / top / images / split / f"{split}0-a.jpg", 2, 3)
        if split != "test":
            save(tmp_path / "in" / top / labels / split / f"{split}0-a{suffix}", [[0, 18, 255], [5, 5, 5]])
    manifest = make("bdd100k", tmp_path / "in", tmp_path / "out")
    assert [(row["split"], row["labels"].tolist()) for row in stored(tmp_path / "out").values()] == [
        ("train", [[0, 18, 255], [5, 5, 5]]), ("validation", [[0, 18, 255], [5, 5, 5]]),
    ]  # fmt: skip
    assert list(manifest["skipped"]) == ["no labels are published for test"]


def test_bdd100k_colormaps_are_no_labels(tmp_path):
    photo(tmp_path / "images/10k/train/a.jpg", 2, 3)
    photo(tmp_path / "labels/sem_seg/colormaps/train/a.png", 2, 3)
    with pytest.raises(FileNotFoundError, match="labels/sem_seg/masks"):
        make("bdd100k", tmp_path, tmp_path / "out")


def mapillary(
    root: Path, version: str = "v1.2/", split: str = "training", ids: tuple[int, ...] = (13, 41, 7, 65)
) -> Path:
    """One frame with the ids in its row, as a palette PNG."""
    photo(root / split / "images" / "a.jpg", 1, len(ids))
    save(root / split / version / "labels" / "a.png", [ids], ONE_COLOUR)
    return root


@pytest.mark.parametrize("version", ["v1.2/", ""])
def test_mapillary_maps_differ_and_are_not_mixed(tmp_path, version):
    root = mapillary(tmp_path / "in", version)
    photo(root / "testing" / "images" / "t.jpg")
    for name, labels in (("robustnet", [0, 0, 255, 255]), ("openseg", [0, 255, 0, 255])):
        manifest = make("mapillary", root, tmp_path / name, "--map", name)
        assert stored(tmp_path / name)["training/images/a.jpg"]["labels"].tolist() == [labels]
        assert manifest["skipped"] == {"no labels are published for testing": ["testing/images/t.jpg"]}
    with pytest.raises(FileExistsError, match="label_map mapillary_v1.2/robustnet, now mapillary_v1.2/openseg"):
        make("mapillary", root, tmp_path / "robustnet", "--map", "openseg")
    with pytest.raises(ValueError, match="under the label maps mapillary_v1.2/robustnet and mapillary_v1.2/openseg"):
        call("check", tmp_path / "robustnet", tmp_path / "openseg")


def test_mapillary_v2_labels_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="v2.0 labels only"):
        make("mapillary", mapillary(tmp_path / "a", "v2.0/"), tmp_path / "out")
    with pytest.raises(ValueError, match="holds the ids 66, 123"):
        make("mapillary", mapillary(tmp_path / "b", "", ids=(13, 66, 123)), tmp_path / "out1")
    root = mapillary(tmp_path / "c", "")
    (root / "config.json").write_text(json.dumps({"labels": [{}] * 124}))
    with pytest.raises(ValueError, match="names 124 classes"):
        make("mapillary", root, tmp_path / "out2")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turned_pictures_get_the_label_that_fits_what_is_shown(tmp_path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    images = tmp_path / "in/training/images"
    shown = np.array([[0, 13, 15], [17, 6, 30]])
    for name, labels in (("shown", shown), ("stored", None)):
        path = photo(images / f"{name}.jpg", *((3, 2) if orientation > 4 else (2, 3)), exif=exif)
        if labels is None:  # drawn on the pixels as stored: undo the turning by trying all
            drawn = Image.fromarray(shown.astype(np.uint8))
            back = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, 1)
            turns = {1: None, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270,
                     7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}  # fmt: skip
            labels = np.asarray(drawn.transpose(turns[back]) if turns[back] is not None else drawn)
            assert labels.shape == Image.open(path).size[::-1]
        save(tmp_path / f"in/training/v1.2/labels/{name}.png", labels)
    manifest = make("mapillary", tmp_path / "in", tmp_path / "out")
    for row in stored(tmp_path / "out").values():
        assert (row["height"], row["width"]) == (2, 3)
        assert row["labels"].tolist() == [[255, 0, 1], [2, 3, 8]], row["key"]
    assert manifest["labels_turned_by_exif"] == (["training/images/stored.jpg"] if orientation > 4 else [])


def synthia(root: Path, name: str, ids: list[int], bits: int = 16) -> None:
    """Red is the id, green an instance number."""
    photo(root / "RGB" / f"{name}.png", 1, len(ids))
    path = root / "GT" / "LABELS" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    row = b"".join(struct.pack(">3H" if bits == 16 else ">3B", i, 7, 0) for i in ids)
    path.write_bytes(png(bits, 2, [row], len(ids)))
    photo(root / "GT" / "COLOR" / f"{name}.png", 1, len(ids))


def test_synthia_ids_are_the_red_channel_of_16_bits(tmp_path):
    synthia(tmp_path / "in", "0000001", [3, 4, 2, 21, 5, 7, 15, 9, 6, 16, 1, 10, 17, 8, 18, 19, 20, 12, 11])
    synthia(tmp_path / "in", "0000000", [0, 13, 14, 22])
    make("synthia", tmp_path / "in", tmp_path / "out")
    rows = stored(tmp_path / "out")
    assert rows["RGB/0000001.png"]["labels"].tolist() == [list(range(19))]
    assert rows["RGB/0000000.png"]["labels"].tolist() == [[255] * 4]
    assert {key: row["split"] for key, row in rows.items()} == {
        "RGB/0000001.png": "train", "RGB/0000000.png": "validation",
    }  # fmt: skip
    assert make("synthia", tmp_path / "in", tmp_path / "all", "--splits", "none")["rows"] == {"train": 2}
    synthia(tmp_path / "in", "0000002", [3], bits=8)
    with pytest.raises(ValueError, match=r"LABELS/0000002\.png is a 8-bit PNG of 3 channels"):
        make("synthia", tmp_path / "in", tmp_path / "out8")


def test_acdc_reads_train_ids_and_keeps_condition_and_drive(tmp_path):
    for condition, split in (("fog", "train"), ("night", "val"), ("rain", "test"), ("snow", "train_ref")):
        frame = f"{condition}/{split}/GOPR0475/GOPR0475_frame_000041"
        photo(tmp_path / "in/rgb_anon" / f"{frame}_rgb_anon.png", 1, 3)
        if split in ("train", "val"):
            save(tmp_path / "in/gt" / f"{frame}_gt_labelTrainIds.png", [[0, 18, 255]])
            save(tmp_path / "in/gt" / f"{frame}_gt_labelIds.png", [[7, 33, 0]])
    manifest = make("acdc", tmp_path / "in", tmp_path / "out")
    assert [(r["split"], r["scene"], r["labels"].tolist()) for r in stored(tmp_path / "out").values()] == [
        ("train", "fog/GOPR0475", [[0, 18, 255]]), ("validation", "night/GOPR0475", [[0, 18, 255]]),
    ]  # fmt: skip
    assert [len(keys) for keys in manifest["skipped"].values()] == [1]


@pytest.mark.parametrize(("choice", "grey"), [("merged", 0), ("ignored", 255)])
def test_orfd_grey_is_merged_or_ignored_in_labels_of_one_and_three_channels(tmp_path, choice, grey):
    values = np.array([[0, 128, 200, 201, 255]])
    labels = {"1": values, "3": np.stack((255 - values, 255 - values, values), -1)}
    for name, array in labels.items():
        photo(tmp_path / f"in/training/y0613_1242/image_data/{name}.png", 1, 5)
        save(tmp_path / f"in/training/y0613_1242/gt_image/{name}_fillcolor.png", array)
    manifest = make("orfd", tmp_path / "in", tmp_path / "out", "--unreachable", choice)
    for row in stored(tmp_path / "out").values():
        assert row["labels"].tolist() == [[0, grey, grey, 1, 1]] and row["scene"] == "y0613_1242"
    assert manifest["label_map"]["name"] == f"orfd/{choice}" and manifest["ignored_pixels"]["train"] == (grey > 0) * 4


def test_orfd_without_scenes_is_read_and_says_what_is_lost(tmp_path, capsys):
    flat = orfd(tmp_path / "in" / "Final_Dataset", 2, scene=".")
    manifest = make("orfd", tmp_path / "in", tmp_path / "out")
    assert {row["scene"] for row in stored(tmp_path / "out").values()} == {""} and flat.is_dir()
    assert "no scene level" in manifest["notes"][0] and "no scene level" in capsys.readouterr().err


def test_road3d_scenes_may_lie_one_folder_deeper(tmp_path):
    orfd(tmp_path / "in", 1, "y0613_1242", "testing")
    orfd(tmp_path / "in", 1, "y0613_1304/y0613_1304", "testing")
    save(tmp_path / "in/testing/y0613_1242/gt_image_multi_seg/1623721490000_fillcolor.png", np.full((8, 8), 7))
    assert make("road3d", tmp_path / "in", tmp_path / "out")["rows"] == {"test": 2}
    assert {row["scene"] for row in stored(tmp_path / "out").values()} == {"y0613_1242", "y0613_1304"}


def test_real_orfd_frames_go_through_and_are_those_of_the_example(tmp_path):
    manifest = make("orfd", EXAMPLES / "frames", tmp_path / "out")
    assert manifest["rows"] == {"validation": 3} and manifest["skipped"] == {}
    rows, example = stored(tmp_path / "out"), stored(EXAMPLES / "orfd_mini")
    assert len(example) == 80
    for key, row in rows.items():
        label = EXAMPLES / "frames" / key.replace("image_data", "gt_image").replace(".png", "_fillcolor.png")
        assert np.array_equal(row["labels"], np.asarray(Image.open(label)) // 255)
        assert row["image"] == example[key]["image"] and np.array_equal(row["labels"], example[key]["labels"])


def test_the_example_shards_are_whole():
    call("check", EXAMPLES / "orfd_mini", "--workers", 1)
    card = (EXAMPLES / "orfd_mini" / "README.md").read_text(encoding="utf-8")
    assert card == core.card(read_manifest(EXAMPLES / "orfd_mini"))


def test_real_comma10k_frames_become_two_classes(tmp_path):
    comma = EXAMPLES / "comma10k"
    classes = comma / "classes.csv"
    manifest = make("folder", comma / "images", tmp_path / "out", comma / "masks", "--class-file", classes)
    assert manifest["rows"] == {"test": 5} and manifest["classes"] == ["non-traversable", "traversable"]
    for key, row in stored(tmp_path / "out").items():
        mask = np.asarray(Image.open(comma / "masks" / key).convert("RGB"))
        red = mask[..., 0]  # of the five colours only road and lane markings have 64 and 255
        assert np.array_equal(row["labels"], np.select([np.isin(red, (64, 255)), red == 204], [1, 255], 0))
        assert row["labels"].shape == (874, 1164) and row["class_pixels"][1] > 50_000


# -- own folders ----------------------------------------------------------------------------------------


def folder(root: Path, classes: str, mask: np.ndarray, name: str = "a", picture: str = ".jpg") -> list[object]:
    """One picture with its mask, and the arguments that name them."""
    photo(root / "images" / f"{name}{picture}", *np.shape(mask)[:2])
    save(root / "masks" / f"{name}.png", mask)
    (root / "classes.txt").write_text(classes)
    return [root / "images", root / "out", root / "masks", "--class-file", root / "classes.txt"]


def test_own_masks_of_ids_of_other_ids_and_of_colours(tmp_path):
    colours = np.array([[[64, 32, 32, 255], [255, 0, 0, 0], [204, 0, 255, 9]]])  # comma10k's, with alpha
    for name, classes, mask, expected in (
        ("ids", "road\npuddle\n\nmud\n", [[0, 2, 255]], [0, 2, 255]),
        ("other", "road,7\npuddle,30\nroad,8\nignored,0\n", [[7, 30, 0], [8, 8, 255]], [0, 1, 255, 0, 0, 255]),
        ("colours", "road,64,32,32\nlane marking,255,0,0\nignored,204,0,255\n", colours, [0, 1, 255]),
        ("rgb", "road,64,32,32\nlane marking,255,0,0\nignored,204,0,255\n", colours[..., :3], [0, 1, 255]),
    ):
        manifest = make("folder", *folder(tmp_path / name, classes, mask))
        assert stored(tmp_path / name / "out")["a.jpg"]["labels"].ravel().tolist() == expected, name
    assert manifest["classes"] == ["road", "lane marking"]


def test_own_mask_with_unknown_values_is_named_in_one_line(tmp_path):
    with pytest.raises(ValueError) as error:
        make("folder", *folder(tmp_path / "a", "road\nmud", [[0, 1, 7]]))
    message = str(error.value)
    assert "masks/a.png holds the ids 7" in message and "column 2 (1 of 3 pixels)" in message and "\n" not in message
    with pytest.raises(ValueError, match=r"holds the colours \(1, 2, 3\)"):
        make("folder", *folder(tmp_path / "b", "road,0,0,0", [[[0, 0, 0], [1, 2, 3]]]))


@pytest.mark.parametrize("line", ["road,x", "road,1,2", "road,256", ",1", "road,-1"])
def test_class_file_says_which_line_is_wrong(tmp_path, line):
    with pytest.raises(ValueError, match="classes.txt line 2: "):
        make("folder", *folder(tmp_path, f"mud,1\n{line}\n", [[0]]))


def test_class_file_of_two_kinds_or_with_one_id_twice_is_refused(tmp_path):
    for second in ("mud", "mud,1,2,3", "mud,1"):
        with pytest.raises(ValueError, match="line 2.*every line needs its own"):
            make("folder", *folder(tmp_path, f"road,1\n{second}", [[0]]))


def test_split_folders_scenes_and_pictures_that_share_a_mask(tmp_path):
    for name in ("training/drive1/a", "val/drive2/a", "val/a"):
        argv = folder(tmp_path, "road", [[0]], name)
    make("folder", *argv)
    assert {key: (row["split"], row["scene"]) for key, row in stored(tmp_path / "out").items()} == {
        "training/drive1/a.jpg": ("train", "drive1"), "val/drive2/a.jpg": ("validation", "drive2"),
        "val/a.jpg": ("validation", ""),
    }  # fmt: skip
    argv = folder(tmp_path, "road", [[0]], "val/a", ".png")
    with pytest.raises(ValueError, match=r"a\.jpg and a\.png share the label .*val/a\.png"):
        make("folder", *argv)


# -- bad input ------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    """Cuts a file to its half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD = {
    "image_data/1623721490001.png cannot be decoded": lambda scene: cut(scene / "image_data/1623721490001.png"),
    "1623721490001_fillcolor.png cannot be decoded": lambda scene: cut(scene / "gt_image/1623721490001_fillcolor.png"),
    "no label": lambda scene: (scene / "gt_image/1623721490001_fillcolor.png").unlink(),
    "1623721490001_fillcolor.png is 4x3, its image .* 8x8": lambda scene: save(
        scene / "gt_image/1623721490001_fillcolor.png", np.zeros((3, 4))
    ),
    "1623721490001.png cannot be decoded": lambda scene: (scene / "image_data/1623721490001.png").write_bytes(b""),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_frame_stops_the_run_or_is_left_out_and_listed(tmp_path, reason):
    root, out = orfd(tmp_path / "in"), tmp_path / "out"
    BAD[reason](root / "training" / "y0613_1242")
    with pytest.raises((ValueError, FileNotFoundError), match=f"{reason}.*--skip-bad"):
        make("orfd", root, out)
    assert not out.exists()
    manifest = make("orfd", root, out, "--skip-bad")
    assert manifest["rows"] == {"train": 2} and len(stored(out)) == 2
    assert list(manifest["skipped"].values()) == [["training/y0613_1242/image_data/1623721490001.png"]]


def test_an_empty_or_wrong_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="training"):
        make("orfd", tmp_path, tmp_path / "out")
    (tmp_path / "training").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no usable image"):
        make("orfd", tmp_path, tmp_path / "out")
    for name in ("gta5", "cityscapes", "bdd100k", "mapillary", "synthia", "acdc", "road3d"):
        with pytest.raises(FileNotFoundError, match="folder not found|holds no usable"):
            make(name, tmp_path / "nothing", tmp_path / "out")
    root = orfd(tmp_path / "in", 1)
    cut(root / "training/y0613_1242/image_data/1623721490000.png")
    with pytest.raises(ValueError, match="every frame was left out.* cannot be decoded"):
        make("orfd", root, tmp_path / "out", "--skip-bad")
    assert not (tmp_path / "out").exists()


def test_programs_end_with_one_line_and_status_1(tmp_path):
    for argv, status in (([tmp_path, "--out", tmp_path / "out"], 1), ([tmp_path], 2)):
        command = [sys.executable, ROOT / "dataset_scripts" / "prepare_road3d.py", *argv]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == status and result.stderr.startswith("error: "), result.stderr
        assert len(result.stderr.splitlines()) == 1


# -- the output -----------------------------------------------------------------------------------------


def test_output_that_cannot_be_written_is_named(tmp_path):
    root = orfd(tmp_path / "in")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file is a file, so .*file/out cannot be made"):
        make("orfd", root, tmp_path / "file" / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    for flags in ((), ("--overwrite",)):
        with pytest.raises(FileExistsError, match="mine holds thesis.txt, not made by"):
            make("orfd", root, tmp_path / "mine", *flags)
    (tmp_path / "mine").rename(tmp_path / "new.partial")
    with pytest.raises(FileExistsError, match="new.partial holds thesis.txt, not made by"):
        make("orfd", root, tmp_path / "new")
    assert (tmp_path / "new.partial" / "thesis.txt").exists()


@pytest.mark.slow
def test_disk_full_keeps_finished_shards_and_leaves_no_half_one(tmp_path):
    root, out = orfd(tmp_path / "in", 6, size=64), tmp_path / "out"
    photo(root / "training/y0613_1242/image_data/1623721490003.png", 64, 64, compress_level=0)
    big = photo(root / "training/y0613_1242/image_data/1623721490004.png", 640, 64)
    save(root / "training/y0613_1242/gt_image/1623721490004_fillcolor.png", np.zeros((640, 64)))
    argv = [str(root), "--out", str(out), "--rows-per-shard", "1", "--workers", "1"]
    # The system refuses files above the limit as it does on a full disk.
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))\n"
        f"from tqdm_seg.commands import start; sys.exit(start('prepare orfd', {argv}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1 and big.stat().st_size > 60000
    message = result.stderr.splitlines()[-1]
    assert "cannot write" in message and "File too large" in message and "run the same command again" in message
    assert "Traceback" not in result.stderr and "ignored" not in result.stderr
    files = {path.name for path in (tmp_path / "out.partial" / "data").iterdir()}
    assert not out.exists() and 0 < len(files) < 6 and all(name.endswith("-of-00006.parquet") for name in files)
    with pytest.raises(FileNotFoundError, match="no finished dataset"):
        read_manifest(tmp_path / "out.partial")
    assert make("orfd", root, out, "--rows-per-shard", "1")["rows"] == {"train": 6}


def test_disk_full_at_the_very_end_is_reported_and_the_work_kept(tmp_path, monkeypatch):
    root, out = orfd(tmp_path / "in"), tmp_path / "out"

    def full(path: Path, content: bytes) -> None:
        if path.name == "index.parquet":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        path.write_bytes(content)

    with monkeypatch.context() as patch:
        patch.setattr(core, "write_file", full)
        with pytest.raises(OSError, match="cannot finish .*No space left.*run the command again"):
            make("orfd", root, out)
    assert not out.exists() and len(list((tmp_path / "out.partial" / "data").iterdir())) == 1
    make("orfd", root, out)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(tmp_path):
    root = orfd(tmp_path / "in", 6)
    argv = [str(root), "--out", str(tmp_path / "out"), "--rows-per-shard", "2", "--workers", "1"]
    code = (
        "import time, tqdm_seg.data.prepare as p; from tqdm_seg.commands import start\n"
        "read = p.read_pair\n"
        "p.read_pair = lambda *a: (time.sleep(0.3), read(*a))[1]\n"
        f"start('prepare orfd', {argv})"
    )
    running = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    data = tmp_path / "out.partial" / "data"
    while not list(data.glob("train*")):
        assert running.poll() is None
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    before = {path: path.stat().st_mtime_ns for path in data.glob("train*")}
    assert not (tmp_path / "out").exists() and 0 < len(before) < 3
    make("orfd", root, tmp_path / "out", "--rows-per-shard", "2")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "data").iterdir()}
    assert all(after[path.name] == time for path, time in before.items())
    make("orfd", root, tmp_path / "fresh", "--rows-per-shard", "2")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_repaired_source_file_rebuilds_only_its_own_shard(tmp_path):
    root, out = orfd(tmp_path / "in", 4), tmp_path / "out"
    scene = root / "training" / "y0613_1242"
    order = sorted(scene.glob("image_data/*"), key=lambda p: core.hashlib.sha256(
        p.relative_to(root).as_posix().encode()).digest())  # fmt: skip
    whole = order[-1].read_bytes()
    cut(order[-1])
    with pytest.raises(ValueError, match=f"{order[-1].name} cannot be decoded"):
        make("orfd", root, out, "--rows-per-shard", "1")
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.partial" / "data").iterdir()}
    assert len(kept) == 3
    order[-1].write_bytes(whole)
    make("orfd", root, out, "--rows-per-shard", "1")
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in (out / "data").iterdir()}.items()


@pytest.mark.slow
def test_a_second_run_does_nothing_and_two_workers_write_the_same_bytes(tmp_path, capsys):
    root, out = orfd(orfd(tmp_path / "in", 5), 2, split="testing"), tmp_path / "out"
    command = [sys.executable, ROOT / "dataset_scripts" / "prepare_orfd.py", root, "--out", out]
    more = ["--rows-per-shard", "2", "--workers", "2"]
    result = subprocess.run([*command, *more], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0 and "100%" in result.stderr, result.stderr
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    make("orfd", root, out, "--rows-per-shard", "2")
    assert "nothing to do" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    make("orfd", root, tmp_path / "one", "--rows-per-shard", "2")
    assert contents(out) == contents(tmp_path / "one")


def test_changed_options_and_sources_are_named_and_replaced_on_request(tmp_path):
    root, out = orfd(tmp_path / "in"), tmp_path / "out"
    first = make("orfd", root, out)
    for flags, words in (
        (["--rows-per-shard", "2"], "rows_per_shard 128, now 2"),
        (["--jpeg", "90"], "jpeg None, now 90"),
        (["--unreachable", "ignored"], "label_map orfd/merged, now orfd/ignored"),
    ):
        with pytest.raises(FileExistsError, match=words):
            make("orfd", root, out, *flags)
    assert make("orfd", root, out, "--rows-per-shard", "2", "--overwrite")["shards"] != first["shards"]
    orfd(root, 4)
    with pytest.raises(FileExistsError, match="source of 6 files of .*, now 8 files"):
        make("orfd", root, out, "--rows-per-shard", "2")
    assert make("orfd", root, out, "--rows-per-shard", "2", "--overwrite")["rows"] == {"train": 4}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_an_unfinished_run_starts_again_with_other_options(tmp_path):
    root, out = orfd(tmp_path / "in"), tmp_path / "out"
    broken = root / "training/y0613_1242/image_data/1623721490001.png"
    whole = broken.read_bytes()
    cut(broken)
    with pytest.raises(ValueError):
        make("orfd", root, out, "--rows-per-shard", "1")
    broken.write_bytes(whole)
    make("orfd", root, out, "--rows-per-shard", "2", "--unreachable", "ignored")
    make("orfd", root, tmp_path / "fresh", "--rows-per-shard", "2", "--unreachable", "ignored")
    assert contents(out) == contents(tmp_path / "fresh")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_lost_shards_of_a_finished_folder_are_made_again(tmp_path, damage):
    root, out = orfd(tmp_path / "in", 4), tmp_path / "out"
    make("orfd", root, out, "--rows-per-shard", "2")
    before = contents(out)
    shard = out / "data" / "train-00001-of-00002.parquet"
    shard.unlink() if damage == "missing" else cut(shard)
    make("orfd", root, out, "--rows-per-shard", "2")
    assert contents(out) == before


def test_linked_pictures_stay_where_they_are(tmp_path):
    root, out = orfd(tmp_path / "in"), tmp_path / "out"
    manifest = make("orfd", root, out, "--link")
    for key, row in stored(out).items():
        assert row["image"] == {"bytes": None, "path": str((root / key).resolve())} and row["label"]["bytes"]
    assert manifest["options"]["link"] == str(root.resolve())
    with pytest.raises(SystemExit):
        make("orfd", root, out, "--link", "--jpeg", "90")


def test_jpeg_re_encodes_what_is_no_jpeg_and_says_so(tmp_path):
    argv = folder(tmp_path, "road", np.zeros((16, 16)), "a", ".png")
    folder(tmp_path, "road", np.zeros((16, 16)), "b", ".jpg")
    manifest = make("folder", *argv, "--jpeg", "90")
    rows = stored(tmp_path / "out")
    assert rows["a.png"]["image"]["bytes"][:2] == b"\xff\xd8" and rows["a.png"]["image"]["path"] == "a.jpg"
    assert rows["b.jpg"]["image"]["bytes"] == (tmp_path / "images" / "b.jpg").read_bytes()
    assert manifest["options"]["jpeg"] == 90 and "JPEG of quality 90" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(SystemExit):
        make("folder", *argv, "--jpeg", "0")


def test_neighbours_of_a_drive_are_apart_in_train_and_in_order_elsewhere(tmp_path):
    root = orfd(orfd(tmp_path / "in", 12), 12, split="testing")
    make("orfd", root, tmp_path / "out")
    keys = {
        split: [k for k, row in stored(tmp_path / "out").items() if row["split"] == split]
        for split in ("train", "test")
    }
    assert keys["test"] == sorted(keys["test"]) and keys["train"] != sorted(keys["train"])
