"""Segmentation scores from one integer confusion matrix.

Counts are summed over all frames first and ratios taken last, so a score never depends on batch size, number of
processes or order of the frames. All scores take the matrix of `confusion_matrix`, or a sum of several.
"""

import torch
from torch import Tensor


def confusion_matrix(prediction: Tensor, truth: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Pixel counts (K, K + 1) int64: rows truth, columns prediction, the last column "predicted no class".

    prediction, truth: integer maps of one shape, values 0 ... K-1 or `ignore_index`. Pixels whose truth is
    `ignore_index` are left out. A prediction of `ignore_index` on a labelled pixel is a miss for the true class and a
    false alarm for none, which is why it has a column and no row.
    Raises ValueError when the shapes differ or a value is neither a class nor `ignore_index`.
    """
    if prediction.shape != truth.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and truth {tuple(truth.shape)} differ in size; resize the scores "
            "to the truth before taking the class"
        )
    # int64 before anything else: uint8 arithmetic would wrap around.
    prediction, truth = prediction.flatten().long(), truth.flatten().long()
    for name, values in (("prediction", prediction), ("truth", truth)):
        strange = values[((values < 0) | (values >= num_classes)) & (values != ignore_index)]
        if len(strange):
            raise ValueError(
                f"{name} holds the value {int(strange[0])}, which is no class of 0 ... {num_classes - 1} and not the "
                f"ignored {ignore_index}; map the labels to class ids first"
            )
    labelled = truth != ignore_index
    prediction, truth = prediction[labelled], truth[labelled]
    prediction = torch.where(prediction == ignore_index, num_classes, prediction)
    cells = truth * (num_classes + 1) + prediction
    # bincount counts in int64; histc would count in float32 and lose pixels beyond 16.7 million per class.
    return torch.bincount(cells, minlength=num_classes * (num_classes + 1)).view(num_classes, num_classes + 1)


def class_iou(matrix: Tensor) -> Tensor:
    """IoU per class (K,) float64: hits / (truth + predicted - hits); NaN where a class is in neither."""
    hits, truth, predicted = _totals(matrix)
    return hits.double() / (truth + predicted - hits)


def mean_iou(matrix: Tensor) -> float:
    """Mean of `class_iou` over the classes whose union is not empty; NaN when all are."""
    return class_iou(matrix).nanmean().item()


def pixel_accuracy(matrix: Tensor) -> float:
    """Share of the labelled pixels that got their true class; NaN without labelled pixels."""
    hits, truth, _ = _totals(matrix)
    return (hits.sum().double() / truth.sum()).item()


def frequency_weighted_iou(matrix: Tensor) -> float:
    """`class_iou` weighted by each class's share of the labelled pixels; NaN without labelled pixels."""
    _, truth, _ = _totals(matrix)
    # A class absent from the truth has weight 0, and its IoU may be NaN: 0 * NaN must not spoil the sum.
    return (class_iou(matrix).nan_to_num() * truth.double() / truth.sum()).sum().item()


def positive_class_scores(matrix: Tensor, positive: int = 1) -> dict[str, float]:
    """precision, recall, f_score = 2 p r / (p + r) and iou of one class against all others, as ORFD reports them.

    NaN where a ratio has nothing below its line (nothing predicted, nothing in the truth, neither).
    """
    hits, truth, predicted = (total[positive].double() for total in _totals(matrix))
    return {
        "precision": (hits / predicted).item(),
        "recall": (hits / truth).item(),
        "f_score": (2 * hits / (truth + predicted)).item(),
        "iou": (hits / (truth + predicted - hits)).item(),
    }


def scores(matrix: Tensor, class_names: list[str]) -> dict[str, object]:
    """Every score of the whole set, ready for JSON: undefined ones are None. Two classes: those of class 1 as well."""
    result: dict[str, object] = {
        "miou": _or_none(mean_iou(matrix)),
        "iou": {name: _or_none(iou) for name, iou in zip(class_names, class_iou(matrix).tolist(), strict=True)},
        "pixel_accuracy": _or_none(pixel_accuracy(matrix)),
        "frequency_weighted_iou": _or_none(frequency_weighted_iou(matrix)),
    }
    if len(class_names) == 2:
        positive = {name: _or_none(value) for name, value in positive_class_scores(matrix, positive=1).items()}
        result["positive_class"] = {"name": class_names[1], **positive}
    return result


def _totals(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hits, true pixels and predicted pixels of every class, each (K,) int64."""
    return matrix.diagonal(), matrix.sum(1), matrix.sum(0)[:-1]


def _or_none(value: float) -> float | None:
    return None if value != value else value
