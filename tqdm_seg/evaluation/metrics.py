"""Segmentation scores from one integer confusion matrix.

Counts are summed over all frames first and ratios taken last, so a score never depends on batch size, number of
processes or order of the frames. All scores take the matrix of `confusion_matrix`, or a sum of several.
"""

from collections.abc import Sequence
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from ..program import cut
from .class_sets import members

BYTES = 256  # values that a label image can hold
CHUNK = 2**18  # pixels that are counted at once: intermediate results stay in the processor's cache


def confusion_matrix(
    prediction: Tensor, labels: Tensor, num_classes: int, ignore_index: int = 255, check: bool = True
) -> Tensor:
    """Pixel counts (K, K + 1) int64: rows ground truth, columns prediction, the last column "predicted no class".

    prediction, labels: integer maps of one shape, values 0 ... K-1 or `ignore_index`. Pixels whose label is
    `ignore_index` are left out. A prediction of `ignore_index` on a labelled pixel is a miss for the true class and a
    false alarm for no class: it has a column and no row.
    check: False leaves out pairs of other values, so that bytes on a GPU are counted without waiting for it; the sum of
    the counts then tells whether all pixels were valid.
    Raises ValueError when the shapes differ, a value is neither a class nor `ignore_index`, and for what holds no ids.
    """
    check_settings(num_classes, ignore_index)
    prediction, labels = as_ids("prediction", prediction), as_ids("labels", labels)
    if prediction.shape != labels.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and labels {tuple(labels.shape)} differ in size; resize the scores "
            "to the labels before taking the class"
        )
    prediction, labels = prediction.flatten(), labels.flatten()
    pairs = None
    if num_classes <= BYTES and 0 <= ignore_index < BYTES:
        pairs = _pair_counts(labels, prediction, BYTES)
    if pairs is None:  # other ids than bytes: the ignored one, which can be anything, becomes K
        _check_values(prediction, labels, num_classes, ignore_index)
        labels, prediction = (
            torch.where(x.long() == ignore_index, num_classes, x.long()) for x in (labels, prediction)
        )
        ignore_index = num_classes
        pairs = _pair_counts(labels, prediction, num_classes + 1)
    if check:
        # Every pair of values has a bin, impossible ones too: to look through the bins costs less than through pixels.
        known = torch.tensor(sorted({*range(num_classes), ignore_index}), device=pairs.device)
        if pairs[known][:, known].sum() != labels.numel():
            _check_values(prediction, labels, num_classes, ignore_index)
    pairs[ignore_index] = 0
    matrix = torch.cat([pairs[:num_classes, :num_classes], pairs[:num_classes, ignore_index, None]], 1)
    if ignore_index < num_classes:
        matrix[:, ignore_index] = 0  # they are in the last column
    return matrix


def check_settings(num_classes: int, ignore_index: int) -> None:
    """Raises ValueError unless both are whole numbers, the first from 1."""
    for name, value, fits in (
        ("num_classes", num_classes, "from 1, such as 19"),
        ("ignore_index", ignore_index, "such as 255"),
    ):
        if not isinstance(value, Integral) or isinstance(value, bool) or (name == "num_classes" and value < 1):
            raise ValueError(f"{name} is {cut(repr(value))}; it must be a whole number {fits}")


def as_ids(name: str, values: Tensor) -> Tensor:
    """The values as whole numbers; raises ValueError, naming them, for what holds no class ids."""
    real = isinstance(values, Tensor) and values.dtype != torch.bool and not values.is_complex()
    if not real or (values.is_floating_point() and not (values == values.round()).all()):
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{name}: {kind} holds no class ids; give whole numbers, such as scores.argmax(0)")
    return values.long() if values.is_floating_point() else values


def group_sums(counts: np.ndarray, groups: Sequence[str]) -> dict[str, np.ndarray]:
    """Counts (R, ...) int64 summed over the rows of each group (scene, weather, ...), in the order of their names.

    groups: R names. Sums are exact; no rows give no groups.
    """
    if not len(counts):
        return {}
    names, index = np.unique(np.asarray(groups, dtype=object), return_inverse=True)
    order = np.argsort(index, kind="stable")
    starts = np.searchsorted(index[order], np.arange(len(names)))
    return dict(zip(names.tolist(), np.add.reduceat(counts[order], starts), strict=True))


def class_iou(matrix: Tensor) -> Tensor:
    """IoU per class (..., K) float64: hits / (true + predicted - hits); NaN where a class is in neither."""
    hits, true, predicted = _totals(matrix)
    return hits.double() / (true + predicted - hits)


def class_accuracy(matrix: Tensor) -> Tensor:
    """Share of each class's true pixels that got it (recall), (..., K) float64; NaN where it has no true pixel."""
    hits, true, _ = _totals(matrix)
    return hits.double() / true


def mean_iou(matrix: Tensor, over: Sequence[int] | slice = slice(None)) -> float:
    """Mean of `class_iou` over the classes, all or some by number, whose union is not empty; NaN when all are."""
    return class_iou(matrix)[..., over].nanmean().item()


def pixel_accuracy(matrix: Tensor) -> float:
    """Share of the labelled pixels that got their true class; NaN without labelled pixels."""
    hits, true, _ = _totals(matrix)
    return (hits.sum().double() / true.sum()).item()


def frequency_weighted_iou(matrix: Tensor) -> float:
    """`class_iou` weighted by each class's share of the labelled pixels; NaN without labelled pixels."""
    _, true, _ = _totals(matrix)
    # A class absent from the ground truth has weight 0, and its IoU may be NaN: 0 * NaN must not spoil the sum.
    return (class_iou(matrix).nan_to_num() * true.double() / true.sum()).sum().item()


def positive_class_scores(matrix: Tensor, positive: int = 1) -> dict[str, float]:
    """precision, recall, f_score = 2 p r / (p + r) and iou of one class against all others, as ORFD reports them.

    NaN where a denominator is 0.
    """
    hits, true, predicted = (total[positive].double() for total in _totals(matrix))
    return {
        "precision": (hits / predicted).item(),
        "recall": (hits / true).item(),
        "f_score": (2 * hits / (true + predicted)).item(),
        "iou": (hits / (true + predicted - hits)).item(),
    }


def scores(matrix: Tensor, class_names: list[str], over: Sequence[str] = ()) -> dict[str, object]:
    """Every score of the whole set, ready for JSON: undefined ones are None. Two classes: those of class 1 as well.

    over: names of the classes that the mean IoU is over, all by default; miou_classes: how many of them have an IoU.
    """
    chosen = members(over, class_names)
    iou = class_iou(matrix)
    result: dict[str, object] = {
        "miou": _or_none(mean_iou(matrix, chosen)),
        "miou_classes": int((~iou[chosen].isnan()).sum()),
        "iou": _by_name(class_names, iou),
        "accuracy": _by_name(class_names, class_accuracy(matrix)),
        "pixel_accuracy": _or_none(pixel_accuracy(matrix)),
        "frequency_weighted_iou": _or_none(frequency_weighted_iou(matrix)),
    }
    if len(class_names) == 2:
        positive = {name: _or_none(value) for name, value in positive_class_scores(matrix, positive=1).items()}
        result["positive_class"] = {"name": class_names[1], **positive}
    return result


def _totals(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hits, true pixels and predicted pixels of every class, each (..., K) int64."""
    return matrix.diagonal(dim1=-2, dim2=-1), matrix.sum(-1), matrix.sum(-2)[..., :-1]


def _pair_counts(rows: Tensor, columns: Tensor, side: int) -> Tensor | None:
    """How often each pair of values of rows, columns (P,) occurs, (side, side) int64; None unless all are < side."""
    pairs = torch.zeros(side * side, dtype=torch.int64, device=rows.device)
    for parts in zip(rows.split(CHUNK), columns.split(CHUNK), strict=True):
        if not all(_below(values, side) for values in parts):
            return None
        # int32 before any arithmetic: uint8 would wrap around.
        cells = parts[0].to(torch.int32, copy=True).mul_(side).add_(parts[1].int())
        _count_into(pairs, cells)
    return pairs.view(side, side)


def _count_into(pairs: Tensor, cells: Tensor) -> None:
    """Adds to pairs (side * side,) int64 how often each of its indices is among cells (P,) int32."""
    # Both count in int64; histc would count in float32 and lose pixels beyond 16.7 million per class.
    if pairs.is_cuda:  # bincount would wait for the GPU to know the largest value
        pairs.scatter_add_(0, cells.long(), pairs.new_ones(1).expand(len(cells)))
    else:
        pairs += torch.bincount(cells, minlength=len(pairs))


def _below(values: Tensor, side: int) -> bool:
    """Whether all values are 0 ... side-1."""
    if values.dtype == torch.uint8 and side >= BYTES or not len(values):
        return True
    low, high = values.long().aminmax()
    return bool(low >= 0 and high < side)


def _check_values(prediction: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raises ValueError for the first value that is neither a class nor `ignore_index`, if there is one."""
    for name, values in (("prediction", prediction.long()), ("labels", labels.long())):
        strange = values[((values < 0) | (values >= num_classes)) & (values != ignore_index)]
        if len(strange):
            raise ValueError(
                f"{name}: value {int(strange[0])} is neither a class id from 0 to {num_classes - 1} nor the ignored "
                f"{ignore_index}; map the labels to class ids first"
            )


def _by_name(class_names: list[str], values: Tensor) -> dict[str, float | None]:
    return {name: _or_none(value) for name, value in zip(class_names, values.tolist(), strict=True)}


def _or_none(value: float) -> float | None:
    return None if value != value else value
