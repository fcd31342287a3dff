"""Intervals over scenes and seeds against a slow obvious version; baselines against answers by hand."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_helpers import call, prepare, save

from tqdm_seg.data.frames import FrameDataset
from tqdm_seg.evaluation.baselines import BASELINES, COLOUR, CONSTANT, LOCATION, Baselines, score_baselines
from tqdm_seg.evaluation.counts import FrameTable
from tqdm_seg.evaluation.metrics import mean_iou
from tqdm_seg.evaluation.protocol import Protocol
from tqdm_seg.evaluation.sets import EvaluationSet
from tqdm_seg.evaluation.statistics import (
    Estimate,
    Runs,
    class_estimates,
    difference,
    draw,
    miou_estimate,
    rare_classes,
)
from tqdm_seg.reports.runs import read_methods


def random_table(seed: int, scenes: list[str], classes: int = 3) -> FrameTable:
    counts = np.random.default_rng(seed).integers(0, 50, (len(scenes), classes, classes + 1))
    names = [str(k) for k in range(classes)]
    return FrameTable([f"f{i}" for i in range(len(scenes))], scenes, {}, counts, names, {})


SCENES = ["a", "b", "c", "a", "b", "d", "d", "d"]


def slow_miou(table: FrameTable, times: Counter) -> float:
    """mIoU of the frames, those of every scene as often as a resample has it."""
    rows = [row for row, scene in enumerate(table.scenes) for _ in range(times[scene])]
    return mean_iou(torch.from_numpy(table.counts[rows].sum(0)))


def test_intervals_are_those_of_a_slow_bootstrap_over_the_same_draws():
    first, second = ([random_table(10 * run + seed, SCENES) for seed in range(3)] for run in (0, 1))
    draws = draw(4, 3, 50, seed=5)
    values, differences = [], []
    for scenes, seeds in zip(draws.scenes.tolist(), draws.seeds.tolist(), strict=True):
        times = Counter(dict(zip("abcd", scenes, strict=True)))
        of_runs = [
            sum(n * slow_miou(table, times) for n, table in zip(seeds, tables, strict=True)) / 3
            for tables in (first, second)
        ]
        values.append(of_runs[0])
        differences.append(of_runs[1] - of_runs[0])
    runs = Runs.of(first), Runs.of(second)
    found, apart = miou_estimate(runs[0], 50, 5), difference(*runs, 50, 5)
    everything = Counter(dict.fromkeys("abcd", 1))
    means = [np.mean([slow_miou(table, everything) for table in tables]) for tables in (first, second)]
    assert found == pytest.approx((means[0], *np.quantile(values, [0.025, 0.975])))
    assert apart == pytest.approx((means[1] - means[0], *np.quantile(differences, [0.025, 0.975])))
    assert difference(runs[0], runs[0], 50)[:3] == (0, 0, 0)  # what both share cancels in every resample


def test_a_baseline_of_one_run_is_compared_with_every_seed():
    tables = [random_table(seed, SCENES) for seed in range(3)]
    alone = Runs.of(tables[:1])
    repeated = Runs.of(tables[:1] * 3)
    assert difference(alone, Runs.of(tables)) == pytest.approx(difference(repeated, Runs.of(tables)))
    back = difference(Runs.of(tables), alone)
    assert back.value == pytest.approx(-difference(alone, Runs.of(tables)).value)
    with pytest.raises(ValueError, match="other seeds"):
        difference(Runs.of(tables), Runs.of(tables[:2]))


def test_where_nothing_can_be_drawn_there_is_no_interval():
    place = [""] * 4
    assert miou_estimate(Runs.of([random_table(0, place)]))[1:] == (None, None)
    seeds = miou_estimate(Runs.of([random_table(seed, place) for seed in range(3)]))
    assert seeds.low < seeds.value < seeds.high
    assert [found.low is not None for found in class_estimates(Runs.of([random_table(0, SCENES)]))] == [True] * 3
    assert Estimate(0.639, 0.564, 0.747).text() == "63.9 [56.4, 74.7]"
    assert Estimate(0.123, 0.07, 0.176).text(sign=True) == "+12.3 [+7.0, +17.6]"
    assert Estimate(float("nan")).text() == "N/A" and Estimate(0.5).text() == "50.0"


def test_classes_in_few_scenes_are_named():
    table = random_table(0, SCENES)
    table.counts[:, 1] = 0
    table.counts[3, 1, 0] = 1  # in scene a
    assert rare_classes(table, 2) == ["1"] and rare_classes(table, 1) == []
    assert rare_classes(table, 5) == []  # of a set of four scenes nothing can be in five


# -- baselines ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[FrameDataset, FrameDataset]:
    """Train: red road below blue sky, thrice, and once the other way round; test: another size, a row unlabelled."""
    root: Path = tmp_path_factory.mktemp("sets")
    red, blue = (200, 0, 0), (0, 0, 200)
    for number, upside_down in enumerate((False, False, False, True)):
        labels = np.repeat([[0], [0], [1], [1]], 6, 1)[:: -1 if upside_down else 1]
        save(root / f"images/train/{number}.png", np.where(labels[..., None] == 1, red, blue))
        save(root / f"masks/train/{number}.png", labels)
    labels = np.repeat([[0], [1], [1], [255], [1], [1], [0], [0]], 9, 1)
    save(root / "images/test/a.png", np.where(labels[..., None] == 1, red, blue))
    save(root / "masks/test/a.png", labels)
    (root / "classes.txt").write_text("sky\nroad\n")
    prepare("folder", root / "images", root / "out", root / "masks", "--class-file", root / "classes.txt")
    return FrameDataset(str(root / "out"), "train"), FrameDataset(str(root / "out"), "test")


def test_baselines_answer_what_the_training_frames_say(sets):
    training, test = sets
    fitted = Baselines.fit([training])
    assert fitted.constant == 0  # both have as many pixels; the first counts
    assert fitted.location.tolist() == [[0] * 6] * 2 + [[1] * 6] * 2
    image = np.array([[(200, 0, 0), (0, 0, 200), (0, 255, 0), (207, 7, 7)]], np.uint8)
    assert fitted.answers(image)[COLOUR].tolist() == [[1, 0, 0, 1]]  # green was never seen: the constant answer
    counts = score_baselines(fitted, EvaluationSet("test", test, Protocol()))
    assert {name: found[0].tolist() for name, found in counts.items()} == {
        CONSTANT: [[27, 0, 0], [36, 0, 0]], LOCATION: [[9, 18, 0], [18, 18, 0]], COLOUR: [[27, 0, 0], [0, 36, 0]],
    }  # fmt: skip
    assert tuple(counts) == BASELINES


def test_answers_in_another_class_list_go_by_name_and_by_common_word(sets):
    fitted = Baselines.fit(sets[:1])
    assert fitted.translation(["road", "tree", "sky"])[:3].tolist() == [2, 0, 255]
    words = {"road": "road", "asphalt": "road", "gravel": "road"}
    assert fitted.translation(["tree", "asphalt", "gravel"], words)[:3].tolist() == [255, 1, 255]


def test_evaluate_writes_the_baselines_beside_the_model(sets, tmp_path, capsys):
    folder, saved = sets[1].folder, tmp_path / "saved"
    save(saved / "a.png", np.zeros((8, 9)))
    line = ["evaluate", "--predictions", saved, "--data", f"x={folder}:test", "--workers", 0, "--baselines"]
    call(*line, folder, "--out", tmp_path / "out")
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "out/results.json").read_text())["sets"]["x"]
    figures = results["baselines"]["figures"]
    assert tuple(figures) == BASELINES and results["baselines"]["trained_on"]["split"] == "train"
    assert figures[COLOUR]["miou"] == 1 and figures[CONSTANT]["miou"] == results["miou"]
    assert f"| {COLOUR} | 100.00 |" in said
    methods = read_methods([str(tmp_path / "out")])
    assert [(method.name, method.kind) for method in methods] == [
        ("out", "model"), *((name, "baseline") for name in BASELINES),
    ]  # fmt: skip
    with pytest.raises(FileNotFoundError, match="nosuch"):
        call(*line, "nosuch", "--out", tmp_path / "b")
    assert not (tmp_path / "b").exists()
