"""The shard format: what `datasets`, a Parquet reader and a range request find, and what the checker notices."""

import hashlib
import json
import time
from io import BytesIO
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Image, load_dataset
from huggingface_hub import DatasetCard
from PIL import Image as PILImage
from shard_helpers import call, contents, orfd, photo, prepare, save

from tqdm_seg.data.check import find_problem
from tqdm_seg.data.files import MARK, write_file
from tqdm_seg.data.shards import (
    FORMAT_VERSION,
    ROW_GROUP_ROWS,
    StoredFrame,
    check_same_labels,
    describe_shard,
    features,
    index_schema,
    read_frame,
    read_index,
    read_manifest,
    write_shard,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """50 training and 3 testing frames of 32x32."""
    root = tmp_path_factory.mktemp("source")
    orfd(root, 50, size=32)
    return orfd(root, 3, split="testing", size=32)


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory) -> Path:
    """The dataset folder of `source`, not to be changed."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare("orfd", source, out, "--rows-per-shard", 40)
    return out


@pytest.fixture
def out(prepared, tmp_path) -> Path:
    """A copy to damage."""
    for name, content in contents(prepared).items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(content)
    return tmp_path / "out"


def check(out: Path) -> None:
    call("check", out, "--workers", 1)


# -- reading --------------------------------------------------------------------------------------------


def test_load_dataset_streams_every_frame_with_its_features(prepared, source):
    frames = load_dataset(str(prepared), streaming=True)
    assert set(frames) == {"train", "test"} and frames["train"].num_shards == 2
    assert frames["train"].features == features(2)
    for split, count in (("train", 50), ("test", 3)):
        rows = list(frames[split])
        assert len(rows) == len({row["key"] for row in rows}) == count
        for row in rows:
            original = PILImage.open(source / row["key"])
            assert np.array_equal(np.asarray(row["image"]), np.asarray(original))
            labels = np.asarray(row["label"])
            assert labels.shape == (row["height"], row["width"]) == (32, 32) and row["label"].mode == "L"
            assert np.bincount(labels.ravel(), minlength=2).tolist() == row["class_pixels"]
            assert row["scene"] == "y0613_1242"


def test_original_bytes_are_kept(prepared, source):
    for split in ("train", "test"):
        for row in load_dataset(str(prepared), split=split, streaming=True).cast_column("image", Image(decode=False)):
            assert row["image"]["bytes"] == (source / row["key"]).read_bytes()


def test_shards_have_small_row_groups_bare_pictures_and_a_page_index(prepared):
    metadata = pq.read_metadata(prepared / "data" / "train-00000-of-00002.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [16, 16, 8]
    for i in range(metadata.row_group(0).num_columns):
        column = metadata.row_group(0).column(i)
        assert column.compression == "UNCOMPRESSED" and column.has_offset_index
        assert column.is_stats_set == (column.path_in_schema in ("key", "scene", "height", "width"))


def test_card_names_the_splits_as_the_hub_reads_them(prepared):
    card = DatasetCard.load(prepared / "README.md")
    assert card.data.to_dict()["configs"] == [
        {
            "config_name": "default",
            "data_files": [
                {"split": "train", "path": "data/train-*.parquet"}, {"split": "test", "path": "data/test-*.parquet"}
            ],
        }
    ]  # fmt: skip
    assert card.data.license == "apache-2.0" and "grey: sky" in card.text


def test_manifest_accounts_for_every_file(prepared):
    manifest = read_manifest(prepared)
    assert manifest["rows"] == {"train": 50, "test": 3} and manifest["classes"] == ["non-traversable", "traversable"]
    assert manifest["class_pixels"] == {"train": [50 * 17 * 32, 50 * 15 * 32], "test": [3 * 17 * 32, 3 * 15 * 32]}
    assert manifest["ignored_pixels"] == {"train": 0, "test": 0}
    for shard in manifest["shards"]:
        content = (prepared / shard["file"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard["bytes"], shard["sha256"])
    names = {"README.md", "index.parquet", "manifest.json", *(shard["file"] for shard in manifest["shards"])}
    assert set(contents(prepared)) == names | {MARK}


def test_index_agrees_with_the_shards_and_gives_each_frame_by_its_byte_range(prepared, source):
    index = read_index(prepared, "train")
    assert len(index) == 50 and len(read_index(prepared)) == 53
    rows = {row["key"]: row for row in load_dataset(str(prepared), split="train", streaming=True)}
    for i, entry in enumerate(index.table.to_pylist()):
        image, label = read_frame(index, i)
        assert image == (source / entry["key"]).read_bytes()
        assert np.array_equal(np.asarray(PILImage.open(BytesIO(label))), np.asarray(rows[entry["key"]]["label"]))
        assert index.class_pixels[i].tolist() == rows[entry["key"]]["class_pixels"]
        shard = pq.ParquetFile(prepared / "data" / f"train-{entry['shard']:05d}-of-00002.parquet")
        group = shard.read_row_group(entry["row"] // ROW_GROUP_ROWS, columns=["key"])
        assert group["key"][entry["row"] % ROW_GROUP_ROWS].as_py() == entry["key"]


def test_index_and_frames_are_read_from_remote_storage(prepared, source):
    memory = fsspec.filesystem("memory")
    for name, content in contents(prepared).items():
        memory.pipe(f"/remote/{name}", content)
    index = read_index("memory://remote", "test")
    assert len(index) == 3
    assert read_frame(index, 2)[0] == (source / index.table["key"][2].as_py()).read_bytes()


def test_linked_frames_are_read_from_where_they_lie(source, tmp_path):
    out = tmp_path / "out"
    prepare("orfd", source, out, "--link")
    index = read_index(out)
    key = index.table["key"][7].as_py()
    assert read_frame(index, 7)[0] == (source / key).read_bytes()
    row = next(iter(load_dataset(str(out), split="test", streaming=True)))
    assert np.array_equal(np.asarray(row["image"]), np.asarray(PILImage.open(source / row["key"])))
    check(out)


def test_25000_rows_of_the_index_load_in_a_second(tmp_path):
    rows, classes = 25_000, 19
    counts = np.random.default_rng(0).integers(0, 2_000_000, (rows, classes))
    columns = {name: np.arange(rows) for name in index_schema(classes).names} | {
        "split": ["train"] * rows, "key": [f"images/{i:05d}.png" for i in range(rows)], "scene": [""] * rows,
        "class_pixels": list(counts),
    }  # fmt: skip
    content = BytesIO()
    pq.write_table(pa.table(columns, index_schema(classes)), content)
    manifest = {
        "format": FORMAT_VERSION, "classes": list(map(str, range(classes))), "rows": {"train": rows},
        "shards": [{"file": "data/train-00000-of-00001.parquet", "split": "train", "shard": 0, "rows": rows,
                    "bytes": 0, "sha256": ""}],
        "dataset": "", "options": {"link": None}, "label_map": {"name": "a/b", "sha256": "", "policy": ""},
        "class_pixels": {}, "ignore_index": 255, "source": {"files": 0, "bytes": 0, "sha256": ""},
        "index_sha256": hashlib.sha256(content.getvalue()).hexdigest(),
    }  # fmt: skip
    (tmp_path / "index.parquet").write_bytes(content.getvalue())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    start = time.perf_counter()
    index = read_index(tmp_path, "train")
    assert np.array_equal(index.class_pixels, counts)
    assert time.perf_counter() - start < 1


# -- refusing -------------------------------------------------------------------------------------------


def test_what_is_not_finished_or_of_another_format_is_refused(out):
    with pytest.raises(ValueError, match="no split 'val', only train, test"):
        read_index(out, "val")
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"format": 0}))
    with pytest.raises(ValueError, match="format is 0"):
        read_manifest(out)
    (out / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="no finished dataset"):
        read_index(out)


def test_an_index_of_another_run_is_refused(out):
    content = (out / "index.parquet").read_bytes()
    (out / "index.parquet").write_bytes(content[:-1] + b"x")
    with pytest.raises(ValueError, match="damaged or of another run"):
        read_index(out)


def test_damaged_bytes_are_noticed_when_a_frame_is_read(out):
    entry = read_index(out, "test").table.to_pylist()[1]
    flip(out / "data" / "test-00000-of-00001.parquet", entry["image_offset"] + 60)
    with pytest.raises(ValueError, match=f"image of {entry['key']} .* is not what was written"):
        read_frame(read_index(out, "test"), 1)


def test_only_datasets_of_the_same_classes_and_maps_go_together():
    orfd_map, other = {"name": "orfd/merged", "sha256": "1"}, {"name": "orfd/ignored", "sha256": "2"}
    street = {"dataset": "GTA5", "classes": ["road"], "label_map": {"name": "gta5_ids/19", "sha256": "3"}}
    check_same_labels([street, street | {"dataset": "SYNTHIA", "label_map": {"name": "synthia_ids/19", "sha256": "4"}}])
    with pytest.raises(ValueError, match="orfd/merged and orfd/ignored"):
        check_same_labels([street | {"label_map": orfd_map}, street | {"label_map": other}])
    with pytest.raises(ValueError, match="different class lists"):
        check_same_labels([street, street | {"dataset": "ORFD", "classes": ["mud"]}])


def test_files_are_written_whole_or_not_at_all(tmp_path):
    write_file(tmp_path / "a", b"old")
    with pytest.raises(TypeError):
        write_file(tmp_path / "a", "text")
    assert contents(tmp_path) == {"a": b"old"}

    def rows():
        for i in range(ROW_GROUP_ROWS + 1):
            yield StoredFrame(str(i), "", 1, 1, b"image", "a.png", b"label", np.array([1]))
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "shard", rows(), 1, {})
    assert contents(tmp_path) == {"a": b"old"}


# -- checking -------------------------------------------------------------------------------------------


def flip(path: Path, position: int) -> None:
    """Changes one byte."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_check_passes_what_was_written(prepared):
    check(prepared)


@pytest.mark.parametrize("name", ["image", "label"])
def test_check_names_the_first_row_with_changed_bytes(out, name):
    rows = read_index(out, "train").table.to_pylist()
    for row in (rows[25], rows[21]):
        flip(out / "data" / "train-00000-of-00002.parquet", row[f"{name}_offset"] + 40)
    message = f"row 21 .{rows[21]['key']}.: the {name} is not what was written"
    with pytest.raises(ValueError, match=f"train-00000-of-00002.parquet {message}.*checksum"):
        check(out)


def test_check_names_missing_cut_and_foreign_files(out):
    shard = out / "data" / "train-00001-of-00002.parquet"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    (out / "data" / "test-00001-of-00002.parquet").write_bytes(content)
    with pytest.raises(ValueError) as error:
        check(out)
    assert "train-00001-of-00002.parquet row 0 (" in str(error.value) and "cannot be read" in str(error.value)
    assert "data/test-00001-of-00002.parquet" in str(error.value)
    shard.unlink()
    with pytest.raises(ValueError, match="train-00001-of-00002.parquet is missing"):
        check(out)


def test_check_notices_a_changed_footer(out):
    shard = out / "data" / "test-00000-of-00001.parquet"
    content = shard.read_bytes()
    position = content.rindex(b"made_from")
    shard.write_bytes(content[:position] + b"made_FROM" + content[position + 9 :])
    with pytest.raises(ValueError, match="another checksum than the manifest, though every row is correct"):
        check(out)


@pytest.mark.parametrize(
    ("labels", "counts", "size", "message"),
    [
        ([[0, 1, 7]], [1, 1], (1, 3), r"row 1 \(b\): the label holds the ids \[7\], classes are 0 ... 1"),
        ([[0, 1, 1]], [2, 1], (1, 3), r"row 1 \(b\): the label has \[1, 2\] pixels per class, recorded \[2, 1\]"),
        ([[0, 1, 1]], [1, 2], (1, 4), r"row 1 \(b\): image \(3, 1\) and label \(3, 1\) do not have the size"),
    ],
)
def test_check_names_rows_whose_content_is_wrong_from_the_start(tmp_path, labels, counts, size, message):
    (tmp_path / "data").mkdir()
    image = photo(tmp_path / "a.png", 1, 3).read_bytes()
    good = save(tmp_path / "good.png", [[0, 1, 255]]).read_bytes()
    bad = save(tmp_path / "bad.png", labels).read_bytes()
    rows = [
        StoredFrame("a", "", 1, 3, image, "a.png", good, np.array([1, 1])),
        StoredFrame("b", "", *size, image, "b.png", bad, np.array(counts)),
    ]
    path = tmp_path / "data" / "train-00000-of-00001.parquet"
    write_shard(path, iter(rows), 2, {})
    shard = describe_shard(path, "train", 0)
    assert find_problem(tmp_path, 2, shard.record, shard.index.slice(0, 1)).startswith("index")
    problem = find_problem(tmp_path, 2, shard.record, shard.index)
    with pytest.raises(ValueError, match=message):
        raise ValueError(problem)
