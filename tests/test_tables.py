"""Per-frame tables come back as they were written, in any layout, and what cannot be counts of frames is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import torch

from tqdm_seg.evaluation import counts as counts_module
from tqdm_seg.evaluation.counts import FrameTable, read_table, write_table
from tqdm_seg.evaluation.metrics import confusion_matrix, group_sums, scores

ROAD3D = Path(__file__).parent / "road3d"
FILE1_HEADER = ",0-0,0-1,1-0,1-1,weather,road,light,scene\n"
FILE2_HEADER = "," + ",".join(
    ["scene", *(f"class{k}_{total}" for k in (0, 1) for total in ("intersect", "union", "pred_label", "label"))]
)


def random_table(seed: int, classes: int = 2, rows: int = 20, none: bool = True) -> FrameTable:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 10**6, (rows, classes, classes + 1)) * (rng.random((rows, classes, classes + 1)) < 0.7)
    if not none:
        counts[..., -1] = 0
    return FrameTable(
        frames=[f"road3d/testing/x/image_data/{1620322736185 + i}.png" for i in rng.permutation(rows)],
        scenes=rng.choice(["x0613_1627", "y2021_0222_1744_2", "c2021_0228_1819"], rows).tolist(),
        attributes={
            "weather": rng.choice(["sunny", 'rainy, "cold"', "", "NA", "雪\nnext line"], rows).tolist(),
            "light": ["1"] * rows,
        },
        counts=counts,
        classes=[f"class {k}" for k in range(classes)],
        protocol={"mode": "slide", "window": [512, 512], "labels": {"ignored": 255}},
    )


def assert_same(found: FrameTable, expected: FrameTable) -> None:
    assert found.counts.dtype == np.int64 and np.array_equal(found.counts, expected.counts)
    assert np.array_equal(found.num_frames, expected.num_frames)
    for name in ("frames", "scenes", "attributes", "classes", "protocol"):
        assert getattr(found, name) == getattr(expected, name), name


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
@pytest.mark.parametrize(("classes", "none"), [(1, True), (2, False), (2, True), (19, False), (19, True)])
def test_a_table_comes_back_as_it_was_written(tmp_path, suffix, classes, none):
    table = random_table(classes, classes, none=none)
    write_table(tmp_path / f"frames{suffix}", table)
    assert_same(read_table(tmp_path / f"frames{suffix}"), table)
    (tmp_path / "frames.csv.json").unlink(missing_ok=True)
    if suffix == ".csv":  # the file next to it may be missing
        bare = replace(table, classes=[str(k) for k in range(classes)], protocol={})
        assert_same(read_table(tmp_path / "frames.csv"), bare)


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_sums_of_frames_come_back_with_their_number(tmp_path, suffix):
    table = replace(random_table(0, rows=3), frames=["", "", ""], num_frames=np.array([1, 439, 2**40]))
    write_table(tmp_path / f"sums{suffix}", table)
    assert_same(read_table(tmp_path / f"sums{suffix}"), table)


def test_line_breaks_in_names_survive_in_files_that_are_read_in_blocks(tmp_path):
    table = replace(random_table(0, classes=1, rows=50_000), attributes={"weather": ["cold,\nwet\nand\ndark"] * 50_000})
    write_table(tmp_path / "t.csv", table)
    assert (tmp_path / "t.csv").stat().st_size > 4e6
    assert_same(read_table(tmp_path / "t.csv"), table)


def test_csv_has_a_column_per_pair_and_one_for_none_only_where_it_is_needed(tmp_path):
    table = random_table(0, none=False)
    write_table(tmp_path / "a.csv", table)
    table.counts[3, 1, 2] = 7
    write_table(tmp_path / "b.csv", table)
    names = ["frame", "scene", "weather", "light", "0-0", "0-1", "1-0", "1-1"]
    headers = [(tmp_path / name).read_text().splitlines()[0].replace('"', "").split(",") for name in ("a.csv", "b.csv")]
    assert headers == [names, [*names, "1-none"]]


def test_every_score_follows_from_the_table(tmp_path):
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([0, 1, 2, 255])
    maps = [values[torch.randint(4, (2, 9, 7), generator=generator)] for _ in range(6)]
    counts = torch.stack([confusion_matrix(prediction, ground_truth, 3) for prediction, ground_truth in maps]).numpy()
    table = FrameTable([str(i) for i in range(6)], ["a"] * 6, {}, counts, ["a", "b", "c"], {})
    prediction, ground_truth = (torch.stack(side) for side in zip(*maps, strict=True))
    for suffix in (".parquet", ".csv"):
        write_table(tmp_path / f"t{suffix}", table)
        found = read_table(tmp_path / f"t{suffix}")
        assert scores(torch.from_numpy(found.counts.sum(0)), found.classes) == scores(
            confusion_matrix(prediction, ground_truth, 3), ["a", "b", "c"]
        )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("none", [True, False])
def test_both_layouts_in_circulation_give_the_same_counts(tmp_path, seed, none):
    """In any order of columns, with columns that nobody knows, whole numbers written as 7.0 among them."""
    table = random_table(seed, none=none)
    rng = np.random.default_rng(seed)
    text = {"scene": table.scenes, "weather": table.attributes["weather"], "comment": ["?"] * 20}
    cells = {f"{t}-{p}": table.counts[:, t, p] for t in (0, 1) for p in (0, 1)}
    cells |= {f"{t}-none": table.counts[:, t, 2] for t in (0, 1)} if none else {}
    totals = {}
    for k in (0, 1):
        hits, ground_truth, predicted = table.counts[:, k, k], table.counts[:, k].sum(1), table.counts[:, :, k].sum(1)
        totals[f"class{k}_intersect"], totals[f"class{k}_union"] = hits, ground_truth + predicted - hits
        totals[f"class{k}_pred_label"], totals[f"class{k}_label"] = predicted.astype(float), ground_truth
        totals[f"class{k}_recall"] = hits / np.maximum(ground_truth, 1)
        totals[f"class{k}_precision"] = ["nan"] * 20
    for name, columns in (("file1.csv", cells), ("file2.csv", totals)):
        columns = {**text, **columns}
        order = rng.permutation(list(columns)).tolist()
        content = pa.table({"": table.frames, **{column: columns[column] for column in order}})
        pa_csv.write_csv(content, tmp_path / name)
        found = read_table(tmp_path / name)
        assert np.array_equal(found.counts, table.counts)
        assert (found.frames, found.scenes, found.classes) == (table.frames, table.scenes, ["0", "1"])
        assert found.attributes["weather"] == table.attributes["weather"]


def test_the_published_sums_are_read():
    first, second = (read_table(ROAD3D / f"road3d_counts_file{k}.csv") for k in (1, 2))
    assert first.num_frames.sum() == second.num_frames.sum() == 11098
    assert first.scenes[0] == "0602-1107" and second.scenes[0] == "y0602_1107"
    assert first.counts[0].tolist() == [[313697476, 5319020, 0], [16435924, 69129980, 0]]
    # Intersect, then what the other class took, from the totals: 318150772 - 316928753 and 86431628 - 66115561.
    assert second.counts[0].tolist() == [[316928753, 1222019, 0], [20316067, 66115561, 0]]


GOOD = "a,1,2,3,4,s,r,d,x0613_1627\n"
BAD_TABLES = {
    "empty": ("", "file is empty"),
    "only a header": (FILE1_HEADER, "holds no row"),
    "missing count column": (FILE1_HEADER.replace("1-0,", "") + "a,1,2,4,s,r,d,x\n", "no column 1-0"),
    "missing scene column": (FILE1_HEADER.replace(",scene", "") + "a,1,2,3,4,s,r,d\n", "no column scene"),
    "no count columns": ("frame,scene\na,x\n", "no columns of counts"),
    "missing frame column": ("scene,0-0,0-1,1-0,1-1\nx,1,2,3,4\n", "first column must name the frame"),
    "column twice": ("frame,scene,0-0,0-0\na,x,1,2\n", "'0-0' is listed 2 times"),
    "prediction without ground truth": ("frame,scene,0-0,0-1\na,x,1,2\n", "'0-1' predicts a class that has no ground"),
    "negative": (FILE1_HEADER + GOOD + "b,1,2,-3,4,s,r,d,x\n", "row 2, column '1-0': -3"),
    "fraction": (FILE1_HEADER + GOOD + "b,1,2.5,3,4,s,r,d,x\n", "row 2, column '0-1': 2.5"),
    "NaN": (FILE1_HEADER + GOOD + "b,nan,2,3,4,s,r,d,x\n", "row 2, column '0-0': a missing value"),
    "infinity": (FILE1_HEADER + GOOD + "b,inf,2,3,4,s,r,d,x\n", "row 2, column '0-0': inf"),
    "nothing": (FILE1_HEADER + GOOD + "b,,2,3,4,s,r,d,x\n", "row 2, column '0-0': a missing value"),
    "a word": (FILE1_HEADER + GOOD + "b,1,2,3,many,s,r,d,x\n", "row 2, column '1-1': 'many'"),
    "true": (FILE1_HEADER + "b,1,2,3,true,s,r,d,x\n", "row 1, column '1-1': True"),
    "too large": (FILE1_HEADER + "b,1,2,3,99999999999999999999,s,r,d,x\n", "row 1, column '1-1': 1e"),
    "duplicate frame": (FILE1_HEADER + GOOD + "b,1,2,3,4,s,r,d,x\n" + GOOD, "'a' is in rows 1 and 3"),
    "nameless frame": (FILE1_HEADER + GOOD + ",1,2,3,4,s,r,d,x\n", "row 2 has no name"),
    "frame without scene": (FILE1_HEADER + GOOD + "b,1,2,3,4,s,r,d,\n", "row 2 has no scene"),
    "row too short": (FILE1_HEADER + GOOD + "b,1,2,3,4,s,r,d\n", "Row #3.*as many fields in every row"),
    "row too long": (FILE1_HEADER + GOOD + "b,1,2,3,4,s,r,d,x,y\n", "Row #3.*as many fields in every row"),
    "no frames in a sum": ("scene,0-0,n_frames\nx,1,0\n", "row 1, column 'n_frames' is no number of frames"),
    "wrong union": (FILE2_HEADER + "\na,x,5,8,7,7,2,6,4,4\n", "row 1, column 'class0_union' is not class0_pred_label"),
    "hits beyond labels": (FILE2_HEADER + "\na,x,5,4,5,4,2,3,2,3\n", "row 1, column 'class"),
    "taken beyond labels": (
        FILE2_HEADER + "\na,x,5,9,7,7,2,16,14,4\n",
        "row 1, column 'class0_label' is too small",
    ),
    "negative total": (FILE2_HEADER + "\na,x,-5,9,7,7,2,6,4,4\n", "row 1, column 'class0_intersect': -5"),
    "missing total": (FILE2_HEADER.replace("class1_union,", "") + "\na,x,5,9,7,7,2,4,4\n", "no column class1_union"),
    "totals of three classes": (FILE2_HEADER + ",class2_union\na,x,5,9,7,7,2,6,4,4,1\n", "not of 0, 1, 2"),
    "another separator": (FILE1_HEADER.replace(",", ";") + GOOD.replace(",", ";"), "no column scene"),
}


@pytest.mark.parametrize(("content", "message"), BAD_TABLES.values(), ids=BAD_TABLES.keys())
def test_a_bad_csv_is_refused_naming_file_and_place(tmp_path, content, message):
    (tmp_path / "bad.csv").write_text(content)
    with pytest.raises(ValueError, match=rf"(?s)bad\.csv: .*{message}"):
        read_table(tmp_path / "bad.csv")


def test_a_good_csv_in_the_form_of_the_bad_ones_is_read(tmp_path):
    (tmp_path / "good.csv").write_text(FILE1_HEADER + GOOD, encoding="utf-8-sig", newline="\r\n")
    assert read_table(tmp_path / "good.csv").counts.tolist() == [[[1, 2, 0], [3, 4, 0]]]
    (tmp_path / "good.csv").write_text(FILE2_HEADER + "\na,x,5,9,7,7,2,6,4,4\n")
    assert read_table(tmp_path / "good.csv").counts.tolist() == [[[5, 2, 0], [2, 2, 0]]]


def test_text_that_is_no_utf8_and_foreign_files_are_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes("scène,0-0\n".encode("latin-1"))
    (tmp_path / "b.csv").write_bytes(FILE1_HEADER.encode() + GOOD.replace("s", "é").encode("latin-1"))
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no more")
    for name in ("a.csv", "b.csv", "c.parquet"):
        with pytest.raises(ValueError, match=name):
            read_table(tmp_path / name)
    (tmp_path / "table.txt").touch()
    with pytest.raises(ValueError, match="neither .parquet nor .csv"):
        read_table(tmp_path / "table.txt")
    with pytest.raises(FileNotFoundError, match="nowhere.csv"):
        read_table(tmp_path / "nowhere.csv")


def parquet(counts: pa.Array, **columns: list[object]) -> pa.Table:
    return pa.table({"frame": ["a", "b"], "scene": ["x", "x"], **columns, "counts": counts})


def list_array(values: list[object], size: int, kind: pa.DataType | None = None) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values, kind or pa.int64()), size)


BAD_PARQUETS = {
    "no counts": (pa.table({"frame": ["a"], "scene": ["x"]}), "no column counts"),
    "no scene": (parquet(list_array(range(4), 2)).drop_columns(["scene"]), "no column scene"),
    "lists of any length": (parquet(pa.array([[1, 2], [3, 4]])), "not a list of K x"),
    "fractions": (parquet(list_array([1.0, 2, 3, 4], 2, pa.float64())), "not a list of K x"),
    "null": (parquet(list_array([1, None, 3, 4], 2)), "empty cells"),
    "no square": (parquet(list_array(range(10), 5)), "K x .K . 1. for no K"),
    "negative": (parquet(list_array([1, 2, 3, -4], 2)), "row 2, column '0-none' is negative"),
    "scene null": (parquet(list_array(range(4), 2)).set_column(1, "scene", [["x", None]]), "row 2 has no scene"),
    "frame twice": (parquet(list_array(range(4), 2)).set_column(0, "frame", [["a", "a"]]), "rows 1 and 2"),
}


@pytest.mark.parametrize(("content", "message"), BAD_PARQUETS.values(), ids=BAD_PARQUETS.keys())
def test_a_bad_parquet_is_refused_naming_file_and_place(tmp_path, content, message):
    pq.write_table(content, tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match=rf"bad\.parquet: .*{message}"):
        read_table(tmp_path / "bad.parquet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ["a"]}, r"20 frames of 1 classes need counts \(20, 1, 2\) int64"),
        ({"scenes": ["a"]}, "column 'scene' has 1 values for 20 rows"),
        ({"attributes": {"weather": []}}, "column 'weather' has 0 values"),
        ({"attributes": {"0-1": ["a"] * 20}}, "cannot be called '0-1'"),
        ({"frames": [""] * 20, "num_frames": None}, "no n_frames"),
    ],
)
def test_a_table_that_is_none_cannot_be_made(change, message):
    with pytest.raises(ValueError, match=message):
        replace(random_table(0), **change)


def test_a_failed_write_leaves_the_old_table_and_never_a_foreign_protocol(tmp_path, monkeypatch):
    old, new = random_table(1), replace(random_table(2), protocol={"mode": "whole"})
    for name in ("t.parquet", "t.csv"):
        write_table(tmp_path / name, old)
    written = []

    def fail_at(name: str):
        def write(path: Path, content: bytes) -> None:
            if path.name == name:
                raise OSError("disk full")
            written.append(path.name)
            path.write_bytes(content)

        return write

    for name in ("t.parquet", "t.csv"):
        monkeypatch.setattr(counts_module, "write_file", fail_at(name))
        with pytest.raises(OSError, match="disk full"):
            write_table(tmp_path / name, new)
        assert np.array_equal(read_table(tmp_path / name).counts, old.counts)
    monkeypatch.setattr(counts_module, "write_file", fail_at("t.csv.json"))
    with pytest.raises(OSError, match="disk full"):
        write_table(tmp_path / "t.csv", new)
    found = read_table(tmp_path / "t.csv")
    assert np.array_equal(found.counts, new.counts) and found.protocol == {}


def test_a_damaged_file_beside_a_csv_is_named(tmp_path):
    write_table(tmp_path / "t.csv", random_table(0))
    for content in ("{", "[]", '{"classes": 3}'):
        (tmp_path / "t.csv.json").write_text(content)
        with pytest.raises(ValueError, match="t.csv.json"):
            read_table(tmp_path / "t.csv")


@pytest.mark.parametrize("seed", range(5))
def test_group_sums_equal_a_slow_loop_and_stay_exact(seed):
    table = random_table(seed, classes=3, rows=50)
    table.counts[:, 0, 0] += 2**53 + 1  # a float64 would lose the last digit
    expected: dict[str, list[list[int]]] = {}
    for scene, counts in zip(table.scenes, table.counts.tolist(), strict=True):
        sums = expected.setdefault(scene, [[0] * 4 for _ in range(3)])
        for ground_truth in range(3):
            for prediction in range(4):
                sums[ground_truth][prediction] += counts[ground_truth][prediction]
    found = group_sums(table.counts, table.scenes)
    assert list(found) == sorted(expected)
    assert {scene: sums.tolist() for scene, sums in found.items()} == expected
    assert group_sums(table.counts[:0], []) == {}
