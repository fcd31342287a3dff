"""Ablations: variants and seeds are trained, tested anywhere, resumed; one table over runs, sets and seeds."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import micro_model
from evaluation_helpers import CLASSES, blocks, prepared_folder
from shard_helpers import call, prepare, save

from tqdm_seg.data.files import write_json
from tqdm_seg.evaluation.counts import FrameTable, read_table, write_table
from tqdm_seg.evaluation.metrics import mean_iou
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.reports.options import PUBLISHED
from tqdm_seg.reports.runs import read_methods
from tqdm_seg.reports.table import make_table, published_rows, read_published

module = importlib.import_module("tqdm_seg.ablate")  # `tqdm_seg.ablate` is the function
pytestmark = pytest.mark.usefixtures("one_thread")


def frames(root: Path, **splits: list[str]) -> None:
    """Images of blocks and labels in three stripes, the frames SCENE/NAME of every split."""
    for split, names in splits.items():
        for number, name in enumerate(names):
            labels = np.repeat(np.arange(40) // (14 + number), 48).reshape(40, 48)
            save(root / "images" / split / f"{name}.png", blocks(number + len(split)))
            save(root / "masks" / split / f"{name}.png", labels)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Training, held-back and test frames, the last of three scenes."""
    root = tmp_path_factory.mktemp("data")
    frames(root, train=["0", "1", "2"], val=["0", "1"], test=["a/0", "a/1", "b/0", "c/0"])
    return prepared_folder(root, "blocks")


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    micro_model(id2label=dict(enumerate(CLASSES))).save_pretrained(folder)
    TqdmImageProcessor().save_pretrained(folder)
    return folder


def arguments(start: Path, data: Path, out: Path, *more: object) -> list[object]:
    fixed = "--steps 2 --eval-every-steps 1 --batch-size 2 --crop 32 --warmup-steps 1 --min-pixels 50 --lr 1e-3"
    return ["--model", start, "--data", data, "--test", f"there={data}:test", "--out", out, *fixed.split(), *more]


@pytest.fixture(scope="module")
def finished(start, data, tmp_path_factory) -> Path:
    """An ablation of two variants and two seeds."""
    out = tmp_path_factory.mktemp("ablations") / "whole"
    call("ablate", *arguments(start, data, out, "--variants", "full,no-visual", "--seeds", 0, 1))
    return out


@pytest.mark.slow
def test_every_figure_follows_from_the_per_frame_tables(finished, capsys):
    facts = json.loads((finished / "ablation.json").read_text())
    tables = [read_table(finished / f"frames/there/full_{seed}.parquet") for seed in (0, 1)]
    mious = [mean_iou(torch.from_numpy(table.counts.sum(0))) for table in tables]
    row = facts["figures"]["rows"][0]
    assert row["name"] == "full model" and row["seeds"] == 2
    assert row["sets"]["there"]["miou"][0] == pytest.approx(np.mean(mious))
    assert facts["sets"] == ["held_back", "there"] and set(facts["steps"].values()) <= {1, 2}
    assert [row["name"] for row in facts["figures"]["rows"][2:]] == [
        "constant answer", "location mask", "colour classifier",
    ]  # fmt: skip
    assert set(facts["audit"]) == {"training, held_back", "training, there", "held_back, there"}
    text = (finished / "ablation.md").read_text()
    assert "3 scenes" in text and "Audit of" in text and "the held-back part chose" in text
    capsys.readouterr()
    call("table", finished)
    assert capsys.readouterr().out == text


@pytest.mark.slow
def test_the_same_command_goes_on_and_other_options_are_refused(finished, start, data, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in (finished / "frames").rglob("*.parquet")}
    monkeypatch.setattr(module, "train", lambda **options: pytest.fail("trained again"))
    again = arguments(start, data, finished, "--variants", "full,no-visual", "--seeds", 0, 1)
    call("ablate", *again, "--test", f"more={data}:validation")
    assert {path: path.read_bytes() for path in before} == before
    assert (finished / "frames/more/location_mask.parquet").is_file()
    with pytest.raises(ValueError, match="options.lr was 0.001, now 0.002"):
        call("ablate", *again, "--lr", 0.002)


@pytest.mark.slow
def test_a_dry_run_and_a_refused_start_leave_nothing(start, data, tmp_path, capsys):
    call("ablate", *arguments(start, data, tmp_path / "out", "--dry-run"))
    assert "18 runs of 2 steps: full_0, " in capsys.readouterr().out
    other = tmp_path / "other"
    save(other / "images/test/0.png", blocks(0))
    save(other / "masks/test/0.png", np.zeros((40, 48)))
    (other / "classes.txt").write_text("mud\nice\n")
    prepare("folder", other / "images", other / "set", other / "masks", "--class-file", other / "classes.txt")
    with pytest.raises(ValueError, match="--test mud has the classes mud, ice, the training road"):
        call("ablate", *arguments(start, data, tmp_path / "out", "--test", f"mud={other / 'set'}:test"))
    with pytest.raises(FileNotFoundError, match="--model nosuch is no preset"):
        call("ablate", *arguments("nosuch", data, tmp_path / "out"))
    with pytest.raises(ValueError, match="--crop 8 is under two patches"):
        call("ablate", *arguments(start, data, tmp_path / "out", "--crop", 8))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_models_with_an_open_class_list_are_tested_under_other_names(tmp_path, capsys):
    """Words of the table in training, others at the test; a linear head is not asked for names that it never saw."""
    for name, classes, splits in (
        ("trained", "road\ntree\nsky-other\n", {"train": ["0", "1"], "val": ["0"]}),
        ("met", "asphalt\nbush\nwater\n", {"test": ["a/0", "b/0", "c/0"]}),
    ):
        frames(tmp_path / name, **splits)
        (tmp_path / f"{name}.txt").write_text(classes)
        folders = [tmp_path / name / "images", tmp_path / name / "set", tmp_path / name / "masks"]
        prepare("folder", *folders, "--class-file", tmp_path / f"{name}.txt")
    line = "--steps 1 --batch-size 2 --crop 32 --warmup-steps 1 --min-pixels 50 --seeds 0 --class-vectors clip_vit_b16"
    where = [
        "--data",
        tmp_path / "trained/set",
        "--test",
        f"met={tmp_path / 'met/set'}:test",
        "--out",
        tmp_path / "out",
    ]
    with pytest.raises(ValueError, match="--test met has the classes asphalt, bush, water.*--class-head cosine"):
        call("ablate", *line.split(), *where)
    found = call(
        "ablate", *line.split(), *where, "--class-head", "cosine", "--variants", "full,random-texts,linear-head"
    )
    rows = {row["name"]: row["sets"] for row in found["figures"]["rows"]}
    assert set(rows["linear class head"]) == {"held_back"} and set(rows["full model"]) == {"held_back", "met"}
    assert set(rows["random vectors as class texts"]["met"]["iou"]) == {"asphalt", "bush", "water"}
    table = read_table(tmp_path / "out/frames/met/constant_answer.parquet")
    assert table.counts[..., :3].sum((0, 1)).nonzero()[0].tolist() == [0]  # road is asphalt's word


# -- one table ------------------------------------------------------------------------------------------


def counted(folder: Path, seed: int, sets: tuple[str, ...] = ("cityscapes", "own")) -> Path:
    """A finished evaluation of made-up counts: five frames of four scenes, the same ground truth for every seed."""
    rng = np.random.default_rng(seed)
    labelled = np.array([[40, 60], [10, 90], [50, 50], [99, 1], [70, 30]])
    for name in sets:
        right = rng.integers(0, labelled + 1)
        counts = np.zeros((5, 2, 3), np.int64)
        for k in (0, 1):
            counts[:, k, k], counts[:, k, 1 - k] = right[:, k], labelled[:, k] - right[:, k]
        protocol = {"data": {"dataset": "Cityscapes" if name == "cityscapes" else "Own images", "split": "test"}}
        table = FrameTable([f"{i}" for i in range(5)], [*"aabcd"], {}, counts, ["mud", "road"], protocol | PROTOCOL)
        write_table(folder / f"{name}.parquet", table)
    write_json(folder / "results.json", {"sets": dict.fromkeys(sets, {})})
    return folder


PROTOCOL = {
    "frames": 5, "image_size": {"10x10": 5}, "resize": "none", "mode": "whole", "window": None, "stride": None,
    "test_time_augmentation": "none", "interpolation": "none", "ground_truth": "at its own size",
    "ground_truth_size": {"10x10": 5}, "pooling": "one", "precision": "fp32",
    "labels": {"name": "a/b", "policy": "none", "classes": {"0": "mud", "1": "road"}, "ignored": 255},
}  # fmt: skip


def test_seeds_are_averaged_and_published_figures_marked(tmp_path, capsys):
    runs = [counted(tmp_path / f"ours_{seed}", seed) for seed in range(3)]
    other = counted(tmp_path / "other", 9)
    ours = "ours=" + ",".join(map(str, runs))
    found = call("table", ours, other, "--published", "--trained-on", "GTA5", "--json", tmp_path / "table.json")
    said = capsys.readouterr().out
    first, second = found["rows"]
    assert (first["name"], first["seeds"], second["name"], second["seeds"]) == ("ours", 3, "other", 1)
    value, low, high = first["sets"]["own"]["miou"]
    assert low < value < high and list(second["sets"]["own"]["difference"]) == ["ours"]
    assert json.loads((tmp_path / "table.json").read_text())["rows"][0]["sets"]["own"]["miou"] == [value, low, high]
    line = next(line for line in said.splitlines() if line.startswith("| tqdm, CLIP ViT-B/16, trained on GTA5†"))
    assert line.endswith("| 57.50† | – |") and "published, not run here" in said and "4 scenes" in said
    call("table", ours, "--latex", "--published")
    latex = capsys.readouterr().out
    assert r"\begin{tabular}{lrrr}" in latex and r"57.50$^\dagger$" in latex and r"\bottomrule" in latex


def test_compare_takes_folders_and_asks_which_set(tmp_path, capsys):
    one, two, three = (counted(tmp_path / name, seed) for seed, name in enumerate(("one", "two", "three")))
    call("compare", one, two, "--set", "own")
    by_folder = capsys.readouterr().out
    call("compare", one / "own.parquet", two, "--set", "own")
    assert by_folder.replace("one", "own") == capsys.readouterr().out and "Overall" in by_folder
    with pytest.raises(ValueError, match="one has the sets cityscapes, own; say which: --set NAME"):
        call("compare", one, three)
    with pytest.raises(ValueError, match="one has no set 'bdd', only cityscapes, own"):
        call("compare", one, three, "--set", "bdd")


def test_runs_that_do_not_belong_into_one_table_are_refused(tmp_path):
    one, two = counted(tmp_path / "one", 0), counted(tmp_path / "two", 1, ("own",))
    with pytest.raises(ValueError, match="other sets"):
        read_methods([f"{one},{two}"])
    with pytest.raises(ValueError, match="two runs are called one"):
        read_methods([str(one), str(one)])
    with pytest.raises(FileNotFoundError, match="results.json.*tqdm-seg evaluate"):
        read_methods([str(tmp_path)])
    table = read_table(two / "own.parquet")
    write_table(two / "own.parquet", replace(table, counts=table.counts + [[1, 0, 0], [0, 0, 0]]))
    with pytest.raises(ValueError, match="set own: one and two have other ground truth"):
        make_table(read_methods([str(one), str(two)]), 3, 100, 0)


def test_published_figures_name_their_source_and_bad_files_are_refused(tmp_path):
    rows = read_published(PUBLISHED)
    assert len(rows) == 52 and all(row["source"] not in ("", "same") for row in rows)
    found = published_rows(rows, {"acdc": {"dataset": "ACDC"}})
    assert found and all(row["method"] for row in rows) and "ACDC train" in found[0]["notes"][0]
    with pytest.raises(ValueError, match="no figure of a training on Mars"):
        read_published(PUBLISHED, "Mars")
    path = tmp_path / "own.csv"
    path.write_text("method,miou\na,1\n")
    with pytest.raises(ValueError, match="own.csv needs the columns method,backbone"):
        read_published(path)
    path.write_text(f"{PUBLISHED.read_text().splitlines()[0]}\na,b,c,d,x,,e\n")
    with pytest.raises(ValueError, match="own.csv, line 2: miou is 'x'"):
        read_published(path)
