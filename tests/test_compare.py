"""The published comparison to every digit and mark, and what a comparison must refuse, warn of, or leave open."""

import csv
import io
import json
import re
import string
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tqdm_seg.commands import start
from tqdm_seg.data.scenes import canonical_name
from tqdm_seg.evaluation.class_sets import CLASS_SETS
from tqdm_seg.evaluation.counts import FrameTable, read_table, write_table
from tqdm_seg.reports import comparison, comparison_text
from tqdm_seg.reports.comparison import bootstrap, compare_tables
from tqdm_seg.reports.comparison_text import CHINESE

ROOT = Path(__file__).parent.parent
ROAD3D = ROOT / "tests" / "road3d"
LISTS = ROOT / "tqdm_seg" / "data" / "lists" / "scenes"
FILE1, FILE2 = ROAD3D / "road3d_counts_file1.csv", ROAD3D / "road3d_counts_file2.csv"
with (ROAD3D / "road3d_scene_miou.csv").open(newline="") as file:
    PUBLISHED = [tuple(row) for row in csv.reader(file)][1:]


def run(capsys, *arguments) -> str:
    """Standard output of a comparison that must succeed."""
    assert start("compare", list(map(str, arguments))) == 0
    return capsys.readouterr().out


def refusal(capsys, *arguments) -> str:
    """Standard error, one line, of a comparison that must fail and print nothing else."""
    status = start("compare", list(map(str, arguments)))
    out, err = capsys.readouterr()
    assert status == 1 and not out and err.startswith("error: ") and err.count("\n") == 1
    return err


def rows(markdown: str, heading: str = "Scenes") -> list[list[str]]:
    """Cells of the table under a heading, without bold and what the means are over."""
    part = markdown.split(f"## {heading}\n")[1].split("\n## ")[0].replace("**", "")
    lines = [line for line in part.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [[*row[:5], *row[6:]] for row in cells]


def published_form(markdown: str) -> list[tuple[str, ...]]:
    """The table of scenes as the published file has it."""
    marks = {"↑": "up", "↓": "down", "": ""}
    table = [(name, a, b, diff.rstrip("%"), marks[mark]) for name, _, a, b, diff, mark in rows(markdown)]
    return table


def as_layout(table: FrameTable, layout: int, rng: np.random.Generator) -> str:
    """The rows as CSV of either layout, each split in up to three, shuffled, scenes named in either form."""
    header = ["0-0", "0-1", "1-0", "1-1", "scene", "n_frames"]
    if layout == 2:
        header = ["n_frames", "scene"]
        header += [f"class{k}_{total}" for k in (0, 1) for total in ("label", "union", "pred_label", "intersect")]
    lines = []
    for scene, counts, frames in zip(table.scenes, table.counts[..., :2], table.num_frames.tolist(), strict=True):
        parts = [counts // 3, counts // 5]
        parts.append(counts - sum(parts))
        for part, share in zip(parts, (1, 2, frames - 3), strict=True):
            hits, ground_truth, predicted = part.diagonal(), part.sum(1), part.sum(0)
            values = {"scene": scene if rng.random() < 0.5 else canonical_name(scene), "n_frames": share}
            values |= {f"{t}-{p}": part[t, p] for t in (0, 1) for p in (0, 1)}
            for k in (0, 1):
                values |= {f"class{k}_intersect": hits[k], f"class{k}_union": ground_truth[k] + predicted[k] - hits[k]}
                values |= {f"class{k}_pred_label": predicted[k], f"class{k}_label": ground_truth[k]}
            lines.append(",".join(str(values[name]) for name in header))
    return "\n".join([",".join(header), *rng.permutation(lines)]) + "\n"


def random_table(seed: int, classes: int = 4, scenes: int = 6, rows: int = 40) -> FrameTable:
    """Frames of made-up scenes; the ground truth depends on the number of rows, not on the seed."""
    shared, rng = np.random.default_rng(rows), np.random.default_rng(seed)
    ground_truth = shared.integers(0, 1000, (rows, classes))
    ground_truth[:, -1] = 0
    counts = np.zeros((rows, classes, classes + 1), np.int64)
    for row, of_class in np.ndindex(rows, classes):
        shares = rng.dirichlet(np.where(np.arange(classes + 1) == of_class, 3, 0.4))
        counts[row, of_class] = rng.multinomial(ground_truth[row, of_class], shares)
    return FrameTable(
        frames=[f"frames/{row}.png" for row in range(rows)],
        scenes=[f"place{row % scenes}" for row in range(rows)],
        attributes={"weather": ["sunny" if row % 3 else "rainy" for row in range(rows)]},
        counts=counts,
        classes=[f"class {k}" for k in range(classes)],
        protocol={"mode": "slide", "labels": {"ignored": 255}},
    )


@pytest.fixture
def pair(tmp_path):
    """Writes two tables and returns their paths."""

    def write(first: FrameTable, second: FrameTable, suffix: str = ".parquet") -> tuple[Path, Path]:
        for name, table in (("a", first), ("b", second)):
            write_table(tmp_path / f"{name}{suffix}", table)
        return tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"

    return write


# -- the published comparison ---------------------------------------------------------------------------


def test_the_published_table_comes_out_to_every_digit_and_mark(capsys):
    assert published_form(run(capsys, FILE1, FILE2, "--anyway")) == PUBLISHED and len(PUBLISHED) == 27


@pytest.mark.parametrize("layouts", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_order_layout_names_and_division_of_the_rows_make_no_difference(capsys, tmp_path, layouts):
    expected = run(capsys, FILE1, FILE2, "--anyway")
    for seed in range(3):
        rng = np.random.default_rng(seed)
        for source, layout in zip((FILE1, FILE2), layouts, strict=True):
            (tmp_path / source.name).write_text(as_layout(read_table(source), layout, rng))
        markdown = run(capsys, tmp_path / FILE1.name, tmp_path / FILE2.name, "--anyway")
        assert published_form(markdown) == PUBLISHED
        assert markdown == expected


def test_differences_are_of_unrounded_values_and_the_mark_rule_is_stated(capsys):
    rounded = [f"{(float(b) - float(a)) * 100:+.2f}" for _, a, b, _, _ in PUBLISHED[:-1]]
    assert sum(diff != row[3] for diff, row in zip(rounded, PUBLISHED, strict=False)) == 12
    markdown = run(capsys, FILE1, FILE2, "--anyway")
    assert "mean of the scenes' differences (+4.25%) by more than a standard deviation (7.35%)" in markdown


def test_overall_is_pooled_and_the_scene_mean_is_called_that(capsys):
    markdown = run(capsys, FILE1, FILE2, "--anyway")
    assert rows(markdown)[-1][:5] == ["Overall", "11098", "0.8557", "0.8974", "+4.17%"]
    assert "Mean of the scenes, all with the same weight, over 2 classes each: 0.8621 and 0.9046 (+4.25%)." in markdown


def test_the_published_key_findings_come_out(capsys):
    findings = run(capsys, FILE1, FILE2, "--anyway").split("## Key findings")[1].split("##")[0]
    for finding in (
        "Overall mIoU: 85.57 % → 89.74 % (+4.17%), over 2 classes.",
        "road3d_counts_file2 is better in 20 and worse in 6 of 26 scenes.",
        "Largest gains, over 2 classes: 0609-1923 (+29.23%), 0609-1924 (+22.93%).",
        "Largest loss, over 2 classes: 2021-0223-1700 (-3.88%).",
        "Worst scenes of road3d_counts_file1, over 2 classes: "
        "0609-1923 (0.6675), 0609-1924 (0.6752), 2021-0223-1454 (0.7492).",
    ):
        assert f"- {finding}\n" in findings


def test_leaked_and_known_scenes_stand_apart(capsys):
    leaked, known = LISTS / "road3d_orfd_overlap_scenes.txt", LISTS / "orfd_train_scenes.txt"
    markdown = run(capsys, FILE1, FILE2, "--anyway", "--leaked", leaked, "--known", known)
    without, only = ["9773", "0.8429", "0.8871", "+4.43%"], ["1325", "0.9627", "0.9817", "+1.90%"]
    assert rows(markdown, "By leaked scenes") == [
        ["all", "11098", "0.8557", "0.8974", "+4.17%"], ["without the leaked", *without], ["only the leaked", *only],
    ]  # fmt: skip
    assert rows(markdown, "By training list") == [["known", *only], ["unknown", *without]]
    assert "Leaked scenes: 0613-1248, 0613-1627, 2021-0223-1310." in markdown


def test_attributes_of_scenes_come_from_a_file(capsys):
    attributes = ["--attributes", ROAD3D / "road3d_scene_attributes.csv"]
    markdown = run(capsys, FILE1, FILE2, "--anyway", *attributes)
    assert [row[:2] for row in rows(markdown, "By light")] == [["daytime", "8779"], ["nighttime", "2319"]]
    assert {row[0] for row in rows(markdown, "By weather")} == {"rainy", "snowy", "sunny"}
    assert sum(int(row[1]) for row in rows(markdown, "By road")) == 11098
    only_light = run(capsys, FILE1, FILE2, "--anyway", *attributes, "--by", "light")
    assert re.findall("## By (.*)", only_light) == ["light"]
    assert "'fog'" in refusal(capsys, FILE1, FILE2, "--anyway", *attributes, "--by", "fog")


def test_the_published_pair_is_refused_for_its_truth_and_warned_of_in_every_output(capsys, tmp_path):
    outputs = [tmp_path / f"out.{suffix}" for suffix in ("md", "csv", "json")]
    options = [text for out in outputs for text in (f"--{out.suffix[1:].replace('md', 'markdown')}", out)]
    reason = "The ground truth differs in 26 of 26 scenes, most in class 1: by 0.82 % of its pixels."
    assert reason in refusal(capsys, FILE1, FILE2, *options) and not any(out.exists() for out in outputs)
    markdown = run(capsys, FILE1, FILE2, "--anyway", *options)
    assert f"**Warning:** {reason}" in markdown and outputs[0].read_text() == markdown
    assert all(line["warning"] == reason for line in csv.DictReader(outputs[1].open()))
    assert json.loads(outputs[2].read_text())["warnings"] == [reason]
    assert reason not in run(capsys, FILE1, FILE1)  # with itself it needs no excuse


def test_csv_and_json_hold_the_same_unrounded(capsys, tmp_path):
    run(capsys, FILE1, FILE2, "--anyway", "--csv", tmp_path / "o.csv", "--json", tmp_path / "o.json")
    lines = list(csv.DictReader((tmp_path / "o.csv").open()))
    scenes = [line for line in lines if line["part"] in ("scene", "overall")]
    formatted = [
        (
            x["name"],
            f"{float(x['miou_a']):.4f}",
            f"{float(x['miou_b']):.4f}",
            f"{float(x['diff_points']):+.2f}",
            x["mark"],
        )
        for x in scenes
    ]
    assert formatted == PUBLISHED
    report = json.loads((tmp_path / "o.json").read_text())
    assert [(row["name"], row["miou"][0], row["mark"]) for row in report["scenes"]] == [
        (line["name"], float(line["miou_a"]), line["mark"]) for line in scenes[:-1]
    ]
    assert report["overall"]["diff_points"] == float(scenes[-1]["diff_points"])
    assert (report["better"], report["worse"]) == (20, 6)
    assert (report["scene_mean"][0], report["scene_mean"][1]) == tuple(
        float(line[f"miou_{side}"]) for line in lines if line["part"] == "scene_mean" for side in "ab"
    )


@pytest.mark.slow
def test_it_runs_as_a_program(tmp_path):
    command = [sys.executable, "-m", "tqdm_seg.reports.compare", FILE1, FILE2, "--markdown", tmp_path / "o.md"]
    refused = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert refused.returncode == 1 and "ground truth differs" in refused.stderr and not (tmp_path / "o.md").exists()


# -- Chinese --------------------------------------------------------------------------------------------


def test_chinese_output_holds_the_same_figures_and_no_english(capsys):
    options = [
        FILE1, FILE2, "--anyway", "--leaked", LISTS / "road3d_orfd_overlap_scenes.txt",
        "--known", LISTS / "orfd_train_scenes.txt", "--attributes", ROAD3D / "road3d_scene_attributes.csv",
    ]  # fmt: skip
    english, chinese = run(capsys, *options), run(capsys, *options, "--language", "zh")
    assert rows(english)[:-1] == rows(chinese, "各场景")[:-1] and rows(chinese, "各场景")[-1][0] == "总体"
    figures = re.compile(r"[+-]?\d+(?:\.\d+)?%?")
    assert sorted(figures.findall(english)) == sorted(figures.findall(chinese))
    names = r"road3d_counts_file\d|mIoU|IoU|sunny|rainy|snowy|daytime|nighttime|(un)?paved_\w+_road"
    assert not re.findall("[A-Za-z]+", re.sub(names, "", chinese))


def test_every_sentence_has_its_chinese_form_with_the_same_parts():
    def parts(text: str) -> list[str]:
        return sorted(name for _, name, _, _ in string.Formatter().parse(text) if name)

    assert all(parts(english) == parts(chinese) for english, chinese in CHINESE.items())
    for module in (comparison_text, comparison):
        code = Path(module.__file__).read_text(encoding="utf-8")
        sentences = re.findall(r'(?:Message\(|text = )"(.*?)"', code)
        assert len(sentences) > 5 and set(sentences) <= CHINESE.keys()


# -- against an obvious version -------------------------------------------------------------------------


def slow_miou(table: FrameTable, kept: list[int]) -> float:
    """Mean IoU over the classes that occur, of some rows, with Python's whole numbers."""
    size = len(table.classes)
    counts = [[sum(int(table.counts[row, t, p]) for row in kept) for p in range(size + 1)] for t in range(size)]
    ious = []
    for k in range(size):
        union = sum(counts[k]) + sum(counts[t][k] for t in range(size)) - counts[k][k]
        if union:
            ious.append(counts[k][k] / union)
    return sum(ious) / len(ious) if ious else float("nan")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("classes", [2, 7])
def test_every_row_equals_a_slow_obvious_version(capsys, pair, tmp_path, seed, classes):
    first, second = (random_table(2 * seed + side, classes) for side in (0, 1))
    (tmp_path / "leaked.txt").write_text("place1\nplace4\n")
    run(capsys, *pair(first, second), "--json", tmp_path / "o.json", "--leaked", tmp_path / "leaked.txt")
    report = json.loads((tmp_path / "o.json").read_text())
    everything = range(len(first.frames))
    expected = {f"place{k}": [row for row in everything if row % 6 == k] for k in range(6)}
    groups = {
        "Overall": everything, "all": everything, "sunny": [row for row in everything if row % 3],
        "rainy": [row for row in everything if row % 3 == 0],
        "only the leaked": [*expected["place1"], *expected["place4"]],
        "without the leaked": [row for row in everything if row % 6 not in (1, 4)],
    }  # fmt: skip
    found = [*report["scenes"], report["overall"], *(row for group in report["groups"].values() for row in group)]
    assert {row["name"] for row in found} == {*expected, *groups}
    for row in found:
        kept = {**expected, **groups}[row["name"]]
        a, b = slow_miou(first, kept), slow_miou(second, kept)
        assert row["miou"] == pytest.approx([a, b], abs=1e-14) and row["frames"] == [len(kept)] * 2
        assert row["diff_points"] == pytest.approx((b - a) * 100, abs=1e-12)


def test_more_than_two_classes_get_a_table_of_their_own(capsys, pair):
    markdown = run(capsys, *pair(random_table(0, classes=3), random_table(1, classes=3)))
    table = rows(markdown, "Classes, over all frames")
    assert [row[0] for row in table] == ["class 0", "class 1", "class 2"]
    a, b = (table_.counts.sum(0) for table_ in (random_table(0, classes=3), random_table(1, classes=3)))
    a, b = (counts[0, 0] / (counts[0].sum() + counts[:, 0].sum() - counts[0, 0]) for counts in (a, b))
    assert table[0][1:] == [f"{a:.4f}", f"{b:.4f}", f"{(b - a) * 100:+.2f}%"]
    # Never in the ground truth, but predicted: 0, not undefined.
    assert table[2][1:3] == ["0.0000", "0.0000"]


def test_parquet_and_csv_of_the_same_runs_give_the_same_output(capsys, pair):
    tables = random_table(0), random_table(1)
    assert run(capsys, *pair(*tables)) == run(capsys, *pair(*tables, suffix=".csv"))


# -- bootstrap ------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_a_slow_bootstrap_over_the_same_draws():
    first, second = random_table(0, classes=3), random_table(1, classes=3)
    found = compare_tables([first, second], ("a", "b"), resamples=200, seed=5).interval
    draws = np.random.default_rng(5).multinomial(6, np.full(6, 1 / 6), 200)
    differences = []
    for times in draws.tolist():
        kept = [row for row in range(40) for _ in range(times[row % 6])]
        differences.append((slow_miou(second, kept) - slow_miou(first, kept)) * 100)
    expected = np.quantile(differences, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=1e-10)
    assert (found.scenes, found.resamples, found.seed) == (6, 200, 5)


def test_the_bootstrap_is_paired_and_seeded(capsys):
    scenes = compare_tables([read_table(FILE1), read_table(FILE2)], ("a", "b")).scenes
    same = compare_tables([read_table(FILE1), read_table(FILE1)], ("a", "b")).scenes
    assert bootstrap(same, 100, seed=0)[:2] == (0, 0)  # what both runs share cancels in every resample
    once, again, other = (bootstrap(scenes, 1000, seed) for seed in (0, 0, 1))
    assert once == again and once[:2] != other[:2]
    assert once.low < 4.17 < once.high
    assert bootstrap(scenes[:1], 1000, 0) is None and bootstrap(scenes, 0, 0) is None
    assert "95 % interval" not in run(capsys, FILE1, FILE2, "--anyway", "--bootstrap", 0)
    assert "1000 resamples, seed 7" in run(capsys, FILE1, FILE2, "--anyway", "--bootstrap", 1000, "--seed", 7)


# -- what may not be compared ---------------------------------------------------------------------------


def test_other_frames_are_refused_and_overall_says_so(capsys, pair):
    first = random_table(0)
    second = random_table(1)
    second.frames[7] = "frames/other.png"
    paths = pair(first, second)
    reasons = refusal(capsys, *paths)
    assert "Found in a only (frames): 1, beginning with place1/7" in reasons
    assert "Found in b only (frames): 1, beginning with place1/other" in reasons
    assert "Overall covers different frames: 40 of a, 40 of b." in run(capsys, *paths, "--anyway")


def test_the_same_frames_under_other_folders_and_as_labels_are_the_same(capsys, pair):
    first, second = random_table(0), random_table(1)
    second.frames = [rf"D:\data\gt_image\{row}_fillcolor.png" for row in range(40)]
    assert "Warning" not in run(capsys, *pair(first, second))


def test_equal_file_names_in_one_scene_are_told_apart_by_their_paths(capsys, pair):
    first, second = random_table(0), random_table(1)
    for table in (first, second):
        table.frames[6] = "left/0.png"  # of the same scene as frames/0.png
    assert "Warning" not in run(capsys, *pair(first, second))
    second.frames[6] = "right/0.png"
    assert "Found in a only (frames): 1, beginning with left/0.png" in refusal(capsys, *pair(first, second))


def test_another_number_of_frames_in_a_scene_is_refused(capsys, tmp_path):
    (tmp_path / "fewer.csv").write_text(FILE1.read_text().replace(",0616-1747,308", ",0616-1747,307"))
    reasons = refusal(capsys, FILE1, tmp_path / "fewer.csv")
    assert "Scenes with different numbers of frames: 1, beginning with 0616-1747 (308 and 307)." in reasons


def test_other_truth_is_refused_frame_by_frame(capsys, pair):
    first, second = random_table(0), random_table(1)
    second.counts[[3, 5], 1, 0] += 5000
    paths = pair(first, second)
    share = 100 * 10000 / second.counts[:, 1].sum()
    reason = f"The ground truth differs in 2 of 40 frames, most in class class 1: by {share:.2f} % of its pixels."
    assert reason in refusal(capsys, *paths) and reason in run(capsys, *paths, "--anyway")


def test_every_differing_field_of_the_protocols_is_named(capsys, pair, tmp_path):
    first = random_table(0)
    protocol = {"mode": "whole", "labels": {"ignored": 255, "name": "orfd"}}
    paths = pair(first, replace(random_table(1), protocol=protocol))
    reasons = refusal(capsys, *paths)
    assert "The protocols differ in mode: slide and whole." in reasons
    assert "The protocols differ in labels.name: not given and orfd." in reasons
    assert "labels.ignored" not in reasons
    run(capsys, *paths, "--anyway", "--json", tmp_path / "o.json")
    assert json.loads((tmp_path / "o.json").read_text())["protocols"] == [first.protocol, protocol]
    renamed = replace(random_table(1), classes=["class 0", "class 1", "class 2", "sky"])
    assert "differ in classes" in refusal(capsys, *pair(first, renamed))
    assert "Only a states its protocol." in refusal(capsys, *pair(first, replace(random_table(1), protocol={})))
    silent = [replace(random_table(seed), protocol={}) for seed in (0, 1)]
    assert "No table states its protocol" in run(capsys, *pair(*silent))


def test_another_number_of_classes_is_refused_in_any_case(capsys, pair):
    paths = pair(random_table(0, classes=3), random_table(0, classes=4))
    assert "3 and 4 classes cannot be compared" in refusal(capsys, *paths, "--anyway")


def test_a_scene_missing_on_one_side_is_left_open_and_counts_for_nothing(capsys, tmp_path):
    lines = FILE2.read_text().splitlines(keepends=True)
    (tmp_path / "fewer.csv").write_text("".join(line for line in lines if "y0609_1923" not in line))
    assert "Found in road3d_counts_file1 only (scenes): 1, beginning with 0609-1923." in refusal(
        capsys, FILE1, tmp_path / "fewer.csv"
    )
    for flipped in (False, True):
        runs = [FILE1, tmp_path / "fewer.csv"]
        markdown = run(capsys, *(reversed(runs) if flipped else runs), "--anyway", "--json", tmp_path / "o.json")
        (row,) = [row for row in rows(markdown) if row[0] == "0609-1923"]
        expected = ["0 / 405", "N/A", "0.6675"] if flipped else ["405 / 0", "0.6675", "N/A"]
        assert row == ["0609-1923", *expected, "N/A", ""]
        assert "of 25 scenes" in markdown and "0609-1923 (" not in markdown.split("Largest")[1].split("Worst")[0]
        assert "Overall covers different frames: " in markdown
        assert "10693" in rows(markdown)[-1][1]
        report = json.loads((tmp_path / "o.json").read_text())
        assert report["better"] + report["worse"] == 25 and not report["overall_covers_same_frames"]
        (row,) = [row for row in report["scenes"] if row["name"] == "0609-1923"]
        assert row["diff_points"] is None and None in row["miou"]


def test_a_scene_without_labelled_pixels_has_no_score(capsys, pair, tmp_path):
    tables = random_table(0), random_table(1)
    for table in tables:
        table.counts[2::6] = 0
    markdown = run(capsys, *pair(*tables), "--csv", tmp_path / "o.csv")
    assert rows(markdown)[2] == ["place2", "7", "N/A", "N/A", "N/A", ""] and "of 5 scenes" in markdown
    lines = {line["name"]: line for line in csv.DictReader((tmp_path / "o.csv").open())}
    assert lines["place2"]["miou_a"] == lines["place2"]["diff_points"] == ""
    assert "nan" not in markdown.lower()


def test_equal_runs_have_no_better_no_worse_and_no_mark(capsys):
    markdown = run(capsys, FILE1, FILE1)
    assert "is better in 0 and worse in 0 of 26 scenes" in markdown and "Largest" not in markdown
    assert {row[4] for row in rows(markdown)} == {"+0.00%"} and {row[5] for row in rows(markdown)} == {""}


def test_runs_of_one_name_are_told_apart_by_their_paths(capsys, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_table(tmp_path / name / "frames.parquet", random_table(len(name)))
    markdown = run(capsys, tmp_path / "one" / "frames.parquet", tmp_path / "two" / "frames.parquet")
    assert f"{tmp_path}/one/frames.parquet mIoU" in markdown and f"{tmp_path}/two/frames.parquet mIoU" in markdown


def test_a_bar_in_a_name_does_not_break_the_table(capsys, pair):
    tables = [replace(random_table(seed), classes=["a|b", "c", "d", "e"]) for seed in (0, 1)]
    assert r"| a\|b |" in run(capsys, *pair(*tables))


# -- scenes and groups ----------------------------------------------------------------------------------


def test_a_list_restricts_the_scenes_and_what_it_alone_names_stays_open(capsys, tmp_path):
    (tmp_path / "two.txt").write_text("testing/x0613_1627\n\n2021-0223-1310\ny0101_0101\n")
    markdown = run(capsys, FILE1, FILE2, "--anyway", "--scenes", tmp_path / "two.txt")
    assert [row[:2] for row in rows(markdown)] == [
        ["0101-0101", "0"], ["0613-1627", "380"], ["2021-0223-1310", "527"], ["Overall", "907"],
    ]  # fmt: skip
    assert rows(markdown)[0][2:5] == ["N/A"] * 3
    assert "Scenes left out because they are not in two.txt: 24." in markdown


def test_the_tables_own_attributes_group_single_frames(capsys, pair):
    first, second = random_table(0), random_table(1)
    assert [row[:2] for row in rows(run(capsys, *pair(first, second)), "By weather")] == [
        ["rainy", "14"],
        ["sunny", "26"],
    ]
    second.attributes["weather"][4] = ""
    markdown = run(capsys, *pair(first, second), "--by", "weather")
    assert "The tables disagree on weather (frames): 1, beginning with place4/4." in markdown
    assert [row[:2] for row in rows(markdown, "By weather")] == [
        ["not given", "0 / 1"], ["rainy", "14"], ["sunny", "26 / 25"],
    ]  # fmt: skip
    assert "## By" not in run(capsys, *pair(first, second), "--by")


def test_renamed_scenes_are_compared_under_their_new_names(capsys, pair, tmp_path):
    first, second = random_table(0), random_table(1)
    (tmp_path / "lists.txt").write_text("place0\nplace4\n")
    lists = ("--scenes", tmp_path / "lists.txt", "--known", tmp_path / "lists.txt")
    expected = run(capsys, *pair(first, second), *lists)
    first.scenes = [scene.replace("place", "old") for scene in first.scenes]
    assert "Found in a only" in refusal(capsys, *pair(first, second))
    (tmp_path / "map.csv").write_text("old,new\n" + "".join(f"old{k},place{k}\n" for k in range(6)))
    (tmp_path / "lists.txt").write_text("old0\nplace4\n")  # in either spelling
    assert run(capsys, *pair(first, second), *lists, "--scene-map", tmp_path / "map.csv") == expected


def test_sets_without_scenes_are_one_scene(capsys, pair):
    tables = [replace(random_table(seed), scenes=[""] * 40) for seed in (0, 1)]
    markdown = run(capsys, *pair(*tables))
    assert [row[0] for row in rows(markdown)] == ["(no scene)", "Overall"] and "interval" not in markdown


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("--scenes", "", "list.txt is empty"),
        ("--scenes", "x0613_1627\nx1313_1627\n", "list.txt, line 2: impossible scene name"),
        ("--scenes", "y0101_0101\n", "has no scene of the list"),
        ("--known", b"\xff\xfe", "list.txt is no UTF-8 text"),
        ("--leaked", "x0632_1200\n", "list.txt, line 1: impossible scene name"),
        ("--scene-map", "", "list.txt is empty"),
        ("--scene-map", "a,b\nc\n", "list.txt, line 2: 'c' is not old,new"),
        ("--scene-map", "a,b\nc,b\n", "list.txt, line 2: c,b names a scene for the second time"),
        ("--scene-map", "a,b\nb,c\n", "list.txt: b is an old name and a new one"),
        ("--scene-map", "a,x1313_1627\n", "list.txt, line 1: impossible scene name"),
        ("--scene-map", "a,b\n", "list.txt renames no scene of either table"),
        ("--attributes", "name,weather\na,b\n", "list.txt needs a column 'scene'"),
        ("--attributes", "scene,weather\nx0613_1627,a\n0613-1627,b\n", "row 2: scene 0613-1627"),
    ],
)
def test_bad_lists_are_named(capsys, tmp_path, option, content, message):
    (tmp_path / "list.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refusal(capsys, FILE1, FILE2, "--anyway", option, tmp_path / "list.txt")


def test_bad_tables_and_missing_files_are_named(capsys, tmp_path):
    (tmp_path / "bad.csv").write_text(FILE1.read_text().replace("313697476", "-1"))
    assert "bad.csv: row 1, column '0-0': -1" in refusal(capsys, tmp_path / "bad.csv", FILE2)
    (tmp_path / "bad.csv").write_text(FILE1.read_text().replace("0602-1107", "0602-2507"))
    assert "bad.csv: impossible scene name '0602-2507'" in refusal(capsys, FILE1, tmp_path / "bad.csv")
    assert "nowhere.csv" in refusal(capsys, FILE1, tmp_path / "nowhere.csv")
    assert "folder not found" in refusal(capsys, FILE1, FILE2, "--anyway", "--csv", tmp_path / "none" / "o.csv")


def test_every_row_says_how_many_classes_its_means_are_over(capsys, pair):
    first, second = random_table(0), random_table(1)
    first.counts[:, 3] = second.counts[:, 3] = 0
    first.counts[:, :, 3] = 0
    printed = run(capsys, *pair(first, second), "--anyway")
    assert "over 3 / 4 of 4 classes" in printed and "| 3 / 4 of 4 |" in printed
    assert "Worst scenes of a, over 3 of 4 classes: " in printed and "weight, over 3–4 of 4 classes each: " in printed
    printed = run(capsys, *pair(first, second), "--anyway", "--class-set", "common")
    assert "over 3 of 4 classes" in printed and "Means are over the classes" in printed


def test_class_sets_are_means_of_the_same_counts(capsys, pair):
    names = [*CLASS_SETS["synthia-16"], "terrain", "truck", "train"]
    tables = [replace(wide_table(seed), classes=names) for seed in (0, 1)]
    found = compare_tables([table.with_class_set("synthia-16") for table in tables], ("a", "b"))
    iou = found.overall.iou
    assert found.overall.miou == pytest.approx(iou[:, :16].mean(1).tolist(), abs=1e-12)
    assert found.overall.classes == (16, 16)
    wrong = refusal(capsys, *pair(tables[0].with_class_set("synthia-13"), tables[1]))
    assert "synthia-13 and all classes" in wrong and "--class-set" in wrong
    assert "'tram'" in refusal(capsys, *pair(*tables), "--class-set", "road,tram")
    assert "over 13 of 19 classes" in run(capsys, *pair(*tables), "--class-set", "synthia-13", "--anyway")


def test_runs_of_other_class_lists_are_compared_over_their_common_classes(capsys, pair):
    first, second = random_table(0), random_table(1)
    second = second.restricted(["class 2", "Class 0"])
    assert "--class-set common" in refusal(capsys, *pair(first, second))
    printed = run(capsys, *pair(first, second), "--class-set", "common")
    assert "over 2 classes" in printed and "the classes class 1, class 3." in printed
    kept = first.restricted(["class 0", "class 2"])
    assert kept.counts[:, 0].tolist() == [
        [row[0][0], row[0][2], row[0][1] + row[0][3] + row[0][4]] for row in first.counts
    ]
    assert f"| **{slow_miou(kept, list(range(40))):.4f}** |" in printed


def wide_table(seed: int) -> FrameTable:
    """Counts of four frames of 19 classes."""
    counts = np.random.default_rng(seed).integers(1, 100, (4, 19, 20))
    return FrameTable([*"abcd"], [*"wxyz"], {}, counts, list(map(str, range(19))), {})


def test_the_csv_output_is_one_table(capsys, pair, tmp_path):
    run(capsys, *pair(random_table(0), random_table(1)), "--csv", tmp_path / "o.csv")
    widths = {len(line) for line in csv.reader(io.StringIO((tmp_path / "o.csv").read_text()))}
    assert widths == {10 + 2 * 4 + 1}
