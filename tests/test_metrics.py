"""Scores against cases worked out by hand and against a slow, obvious version."""

import math

import pytest
import torch

from tqdm_seg.evaluation.metrics import (
    class_iou,
    confusion_matrix,
    frequency_weighted_iou,
    mean_iou,
    pixel_accuracy,
    positive_class_scores,
    scores,
)

# Truth: four 0, three 1, one ignored. Prediction: three 0 hit, one taken for 1; two 1 hit, one called 255.
TRUTH = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 255]])
PREDICTION = torch.tensor([[0, 0, 0, 1], [1, 1, 255, 0]])


def test_matrix_by_hand():
    assert confusion_matrix(PREDICTION, TRUTH, 3).tolist() == [[3, 1, 0, 0], [0, 2, 0, 1], [0, 0, 0, 0]]


def test_scores_by_hand():
    matrix = confusion_matrix(PREDICTION, TRUTH, 2)
    # Class 0: 3 hits, 4 true, 3 predicted. Class 1: 2 hits, 3 true, 3 predicted.
    assert class_iou(matrix).tolist() == [3 / 4, 2 / 4]
    assert mean_iou(matrix) == 0.625
    assert pixel_accuracy(matrix) == 5 / 7
    assert frequency_weighted_iou(matrix) == pytest.approx(4 / 7 * 0.75 + 3 / 7 * 0.5, abs=1e-15)
    assert positive_class_scores(matrix, 1) == pytest.approx(
        {"precision": 2 / 3, "recall": 2 / 3, "f_score": 2 / 3, "iou": 0.5}, abs=1e-15
    )


def test_ignored_prediction_is_a_miss_and_no_false_alarm():
    truth = torch.tensor([0, 0, 1, 1])
    ignored, wrong = (confusion_matrix(torch.tensor([0, x, 1, 1]), truth, 2) for x in (255, 1))
    assert class_iou(ignored).tolist() == [0.5, 1.0]
    assert class_iou(wrong).tolist() == [0.5, 2 / 3]


def test_absent_class_is_left_out_but_a_false_alarm_counts_as_zero():
    truth = torch.tensor([0, 0, 0, 1])
    absent = confusion_matrix(truth, truth, 3)
    assert math.isnan(class_iou(absent)[2]) and mean_iou(absent) == 1.0
    alarm = confusion_matrix(torch.tensor([0, 0, 2, 1]), truth, 3)
    assert class_iou(alarm)[2] == 0 and mean_iou(alarm) == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert frequency_weighted_iou(absent) == 1.0


def test_nothing_labelled_gives_no_score_and_valid_json():
    matrix = confusion_matrix(torch.zeros(4, dtype=torch.long), torch.full((4,), 255), 2)
    assert matrix.sum() == 0 and math.isnan(mean_iou(matrix)) and math.isnan(pixel_accuracy(matrix))
    result = scores(matrix, ["a", "b"])
    assert result["miou"] is None and result["iou"] == {"a": None, "b": None}
    assert result["positive_class"] == {"name": "b", "precision": None, "recall": None, "f_score": None, "iou": None}


def slow_iou(prediction: torch.Tensor, truth: torch.Tensor, num_classes: int) -> list[float]:
    """IoU by sets of pixels, one class after the other."""
    pairs = [(p, t) for p, t in zip(prediction.flatten().tolist(), truth.flatten().tolist(), strict=True) if t != 255]
    result = []
    for c in range(num_classes):
        predicted = {i for i, (p, _) in enumerate(pairs) if p == c}
        true = {i for i, (_, t) in enumerate(pairs) if t == c}
        result.append(len(predicted & true) / len(predicted | true) if predicted | true else math.nan)
    return result


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_equal_to_slow_version_however_the_frames_are_divided(dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([0, 1, 2, 3, 4, 255])  # class 5 occurs nowhere
    prediction, truth = (values[torch.randint(6, (6, 13, 7), generator=generator)].to(dtype) for _ in range(2))
    whole = confusion_matrix(prediction, truth, 6)
    parts = sum(confusion_matrix(p, t, 6) for p, t in zip(prediction, truth, strict=True))
    assert whole.dtype == torch.int64 and torch.equal(whole, parts)
    expected = slow_iou(prediction, truth, 6)
    assert class_iou(whole).tolist() == pytest.approx(expected, abs=0, nan_ok=True)
    assert mean_iou(whole) == pytest.approx(sum(expected[:5]) / 5, abs=1e-15)


def test_counts_beyond_float32_stay_exact():
    one = torch.zeros(1, 2, dtype=torch.int64)
    one[0, 0] = 2**24  # float32 cannot hold 2**24 + 1
    assert (one + confusion_matrix(torch.zeros(1), torch.zeros(1), 1)).tolist() == [[2**24 + 1, 0]]


@pytest.mark.parametrize(
    ("prediction", "truth", "message"),
    [
        ([0, 1], [0, 1, 1], "differ in size"),
        ([0, 7], [0, 1], "prediction: value 7"),
        ([0, 1], [0, 2], "labels: value 2"),
        ([0, -1], [0, 1], "prediction: value -1"),
    ],
)
def test_impossible_maps_are_refused(prediction, truth, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(torch.tensor(prediction), torch.tensor(truth), 2)
