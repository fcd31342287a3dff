"""The `evaluate` metric loads offline from anywhere, agrees with our scores and with other people's; ids may be any."""

import math
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image

from tqdm_seg.data.label_maps import STREET_CLASSES
from tqdm_seg.evaluation import metrics as metrics_module
from tqdm_seg.evaluation.metrics import class_accuracy, class_iou, confusion_matrix, mean_iou, pixel_accuracy

SCRIPT = Path(__file__).parent.parent / "metrics" / "mean_iou_tqdm"


def random_maps(seed: int, num_classes: int, ignored: bool = True) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Predictions that are mostly right and references, five each of different sizes; one class is in neither."""
    rng = np.random.default_rng(seed)
    predictions, references = [], []
    for size in ((9, 7), (1, 1), (16, 5), (3, 11), (8, 8)):
        reference = rng.integers(0, num_classes - 1, size).astype(np.uint8)
        wrong = rng.integers(0, num_classes - 1, size).astype(np.uint8)
        prediction = np.where(rng.random(size) < 0.6, reference, wrong)
        if ignored:
            reference[rng.random(size) < 0.2] = 255
        predictions.append(prediction)
        references.append(reference)
    return predictions, references


@pytest.fixture
def load(tmp_path, monkeypatch):
    """`evaluate.load` of the metric from outside the checkout, with its cache in the folder of the test."""
    monkeypatch.chdir(tmp_path)

    def load_metric(**options) -> evaluate.Metric:
        return evaluate.load(str(SCRIPT), cache_dir=str(tmp_path / "cache"), **options)

    return load_metric


@pytest.mark.parametrize("seed", range(3))
def test_it_agrees_with_our_scores_however_the_images_are_added(load, seed):
    predictions, references = random_maps(seed, 6)
    predictions[0][2:4] = 255
    matrix = sum(
        confusion_matrix(*map(torch.from_numpy, pair), 6) for pair in zip(predictions, references, strict=True)
    )
    metric = load(num_classes=6)
    metric.add_batch(predictions=predictions[:2], references=references[:2])
    metric.add(prediction=torch.from_numpy(predictions[2]).long(), reference=references[2].tolist())
    found = metric.compute(predictions=predictions[3:], references=references[3:])
    assert found["mean_iou"] == mean_iou(matrix) and found["overall_accuracy"] == pixel_accuracy(matrix)
    assert found["per_category_iou"] == pytest.approx(class_iou(matrix).tolist(), abs=0, nan_ok=True)
    assert found["per_category_accuracy"] == pytest.approx(class_accuracy(matrix).tolist(), abs=0, nan_ok=True)
    assert math.isnan(found["per_category_iou"][5]) and found["mean_accuracy"] > 0
    assert found["images"] == 5 and found["labelled_pixels"] == sum(int((r != 255).sum()) for r in references)
    # It starts again, and one call gives the same.
    again = metric.compute(predictions=predictions, references=references)
    assert str(again) == str(found)  # NaN and all


def test_it_states_its_label_policy(load):
    found = load(num_classes=2, ignore_index=7).compute(predictions=[[[0, 7, 1]]], references=[[[0, 0, 7]]])
    assert found["per_category_iou"] == pytest.approx([0.5, math.nan], nan_ok=True)
    assert found["per_category_accuracy"] == pytest.approx([0.5, math.nan], nan_ok=True)
    assert found["mean_accuracy"] == 0.5
    assert "whose reference is 7 are left out" in found["label_policy"] and "prediction of 7" in found["label_policy"]


def test_it_keeps_a_matrix_and_no_pixels(load, tmp_path):
    metric = load(num_classes=3)
    for _ in range(5):
        metric.add_batch(predictions=np.zeros((2, 300, 300), np.uint8), references=np.zeros((2, 300, 300), np.uint8))
    kept = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert not kept and metric.writer is None
    tensors = [value for value in vars(metric).values() if isinstance(value, torch.Tensor | np.ndarray)]
    assert sum(map(len, tensors)) == 3
    assert metric.compute()["labelled_pixels"] == 10 * 300 * 300


def test_two_processes_give_the_scores_of_one(load):
    predictions, references = random_maps(0, 4)
    metrics = [load(num_classes=4, process_id=rank, num_process=2, experiment_id="two") for rank in range(2)]
    for rank, metric in enumerate(metrics):
        metric.add_batch(predictions=predictions[rank::2], references=references[rank::2])
    with ThreadPoolExecutor(2) as pool:  # in the place of processes, which share nothing but files and their locks
        first, second = pool.map(lambda metric: metric.compute(), metrics)
    assert second is None
    assert str(first) == str(load(num_classes=4).compute(predictions=predictions, references=references))


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (([[[0, 3]]], [[[0, 1]]]), "prediction: value 3"),
        (([[[0, 1]]], [[[0, 1, 1]]]), "differ in size"),
        (([[[0, 1]]], []), "one map per image"),
        ((None, [[[0, 1]]]), "one map per image"),
        ((None, None), "nothing to compute"),
    ],
)
def test_impossible_inputs_are_refused(load, maps, message):
    with pytest.raises(ValueError, match=message):
        load(num_classes=2).compute(predictions=maps[0], references=maps[1])


def test_a_refused_batch_leaves_no_trace(load):
    metric = load(num_classes=2)
    with pytest.raises(ValueError, match="value 9"):
        metric.add_batch(predictions=[[[1]], [[9]]], references=[[[0]], [[0]]])
    assert metric.compute(predictions=[[[0]]], references=[[[0]]])["mean_iou"] == 1


def test_the_number_of_classes_must_be_given(load):
    with pytest.raises(ValueError, match="number of classes"):
        load().compute()
    with pytest.raises(ValueError, match="num_classes is 0"):
        load(num_classes=0)


def test_the_script_imports_one_module_per_line():
    # evaluate finds the requirements of a script by these lines and takes "a, b" for one name.
    lines = [line for line in (SCRIPT / "mean_iou_tqdm.py").read_text().splitlines() if line.startswith("import ")]
    assert lines and all(re.fullmatch(r"import \w+", line) for line in lines)


@pytest.mark.parametrize("seed", range(3))
def test_it_agrees_with_torchmetrics(load, seed):
    from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

    predictions, references = random_maps(seed, 5)
    jaccard = MulticlassJaccardIndex(5, average="macro", ignore_index=255)
    counts = MulticlassConfusionMatrix(5, ignore_index=255)
    ours = torch.zeros(5, 6, dtype=torch.int64)
    for pair in zip(predictions, references, strict=True):
        maps = [torch.from_numpy(values).long() for values in pair]
        jaccard.update(*maps)
        counts.update(*maps)
        ours += confusion_matrix(*maps, 5)
    assert torch.equal(ours[:, :5], counts.compute()) and not ours[:, 5].any()
    found = load(num_classes=5).compute(predictions=predictions, references=references)
    assert found["mean_iou"] == pytest.approx(jaccard.compute().item(), rel=1e-6)  # theirs is float32


@pytest.mark.parametrize("seed", range(3))
def test_it_agrees_with_cityscapes_scripts(load, tmp_path, seed):
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official
    from cityscapesscripts.helpers.labels import trainId2label

    predictions, references = random_maps(seed, 19)
    predictions[0][0] = 255  # as what it calls unlabeled, on labelled pixels
    # It scores pictures of label ids, of which 0 is not evaluated.
    to_label = np.zeros(256, np.uint8)
    to_label[:19] = [trainId2label[train_id].id for train_id in range(19)]
    names = {}
    for what, maps in (("p", predictions), ("r", references)):
        names[what] = [str(tmp_path / f"{what}{i}.png") for i in range(len(maps))]
        for name, values in zip(names[what], maps, strict=True):
            Image.fromarray(to_label[values]).save(name)
    options = SimpleNamespace(**vars(official.args) | {"quiet": True, "JSONOutput": False, "evalInstLevelScore": False})
    theirs = official.evaluateImgLists(names["p"], names["r"], options)
    found = load(num_classes=19).compute(predictions=predictions, references=references)
    assert found["mean_iou"] == pytest.approx(theirs["averageScoreClasses"], abs=1e-15)
    expected = [theirs["classScores"][name] for name in STREET_CLASSES]
    assert found["per_category_iou"] == pytest.approx(expected, abs=1e-15, nan_ok=True)


@pytest.mark.parametrize("ignored", [255, -1, -100, 0, 2, 65535, 10**9])
@pytest.mark.parametrize("num_classes", [1, 4, 255, 256, 300])
def test_the_matrix_counts_pairs_of_any_ids(monkeypatch, ignored, num_classes):
    monkeypatch.setattr(metrics_module, "CHUNK", 64)
    rng = np.random.default_rng(num_classes)
    values = np.array([*range(min(num_classes, 4)), num_classes - 1, ignored])
    prediction, ground_truth = (values[rng.integers(0, len(values), 300)] for _ in range(2))
    expected = Counter(
        (t, num_classes if p == ignored else p)
        for p, t in zip(prediction.tolist(), ground_truth.tolist(), strict=True)
        if t != ignored
    )
    found = confusion_matrix(torch.from_numpy(prediction), torch.from_numpy(ground_truth), num_classes, ignored)
    assert {(t, p): n for t, row in enumerate(found.tolist()) for p, n in enumerate(row) if n} == dict(expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_a_strange_id_is_found_wherever_it_stands(monkeypatch, dtype):
    monkeypatch.setattr(metrics_module, "CHUNK", 64)
    for where in (0, 57, 99):
        maps = {name: torch.zeros(100, dtype=dtype) for name in ("prediction", "labels")}
        for name in maps:
            spoiled = {**maps, name: maps[name].clone()}
            spoiled[name][where] = 200
            if name == "prediction":
                spoiled["labels"] = torch.full((100,), 255, dtype=dtype)  # also on pixels that do not count
            with pytest.raises(ValueError, match=f"{name}: value 200"):
                confusion_matrix(spoiled["prediction"], spoiled["labels"], 19)


def test_the_maps_are_left_as_they_were():
    prediction, ground_truth = (torch.tensor([0, 1, 255], dtype=torch.int32) for _ in range(2))
    confusion_matrix(prediction, ground_truth, 2)
    assert prediction.tolist() == ground_truth.tolist() == [0, 1, 255]


@pytest.mark.parametrize(
    "prediction",
    [np.full((4, 4), 0.7), np.zeros((3, 4, 4), int), np.zeros((4, 4, 3), int), np.zeros(4, int), None, "map", [[1j]],
     np.full((4, 4), np.nan)],
)  # fmt: skip
def test_what_is_no_map_of_ids_is_refused_and_counts_nothing(load, prediction):
    metric, right = load(num_classes=3), np.zeros((4, 4), int)
    for predictions, references in (([prediction], [right]), ([right], [prediction])):
        with pytest.raises(ValueError):
            metric.add_batch(predictions=predictions, references=references)
    assert metric.compute(predictions=[right.astype(float)], references=[right])["images"] == 1


def test_the_usual_signature_of_evaluate_works(load):
    references = [np.array([[0, 1], [2, 3]])]
    predictions = [np.array([[0, 0], [1, 1]])]
    settings = {"num_labels": 3, "ignore_index": 255, "reduce_labels": True}
    found = load().compute(predictions=predictions, references=references, **settings)
    assert found["per_category_iou"][:2] == [1, 0.5] and math.isclose(found["mean_iou"], 0.5)
    assert (found["mean_iou_classes"], found["labelled_pixels"]) == (3, 3)
    metric = load(num_labels=3)
    metric.add_batch(predictions=predictions, references=[references[0] % 3])
    with pytest.raises(ValueError, match="num_labels is 4, but was 3"):
        metric.compute(num_labels=4)
    with pytest.raises(ValueError, match="num_labels"):
        load().compute(predictions=predictions, references=references)


def test_every_mean_says_how_many_classes_it_is_over_and_absent_ones_are_named(load):
    found = load(num_labels=4).compute(predictions=[[[0, 1], [2, 2]]], references=[[[0, 1], [1, 255]]])
    assert found["mean_iou_classes"] == 3 and found["mean_accuracy_classes"] == 2  # 2 is only predicted
    assert found["classes_without_reference"] == [2, 3]


def test_a_class_set_is_the_mean_over_its_classes(load):
    predictions, references = random_maps(0, 20)
    found = [load(num_classes=19, class_set=chosen) for chosen in (None, "synthia-16", [0, 2])]
    found = [metric.compute(predictions=predictions, references=references) for metric in found]
    iou = np.array(found[0]["per_category_iou"])
    assert found[1]["mean_iou"] == pytest.approx(np.nanmean(np.delete(iou, [9, 14, 16])))
    assert (found[0]["mean_iou_classes"], found[1]["mean_iou_classes"], found[2]["mean_iou_classes"]) == (19, 16, 2)
    with pytest.raises(ValueError, match="synthia-16"):
        load(num_classes=3, class_set="synthia-16")
