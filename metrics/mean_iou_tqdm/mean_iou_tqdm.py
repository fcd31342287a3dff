"""mIoU as an `evaluate` metric: `evaluate.load("metrics/mean_iou_tqdm", num_classes=19)`, offline.

The scores are those of `tqdm_seg.evaluation.metrics`, which must be installed (`pip install -e .` here).
Between batches it keeps a confusion matrix, not the pixels: memory and disk do not grow with the set.

Letters: H, W image, K classes.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import torch

from tqdm_seg.data.label_maps import STREET_CLASSES
from tqdm_seg.evaluation.class_sets import class_set, members
from tqdm_seg.evaluation.metrics import (
    as_ids,
    check_settings,
    class_accuracy,
    class_iou,
    confusion_matrix,
    mean_iou,
    pixel_accuracy,
)
from tqdm_seg.program import cut

DESCRIPTION = "Mean intersection over union of semantic segmentation, from one confusion matrix over all images."
INPUTS = """
predictions, references: batches or lists of (H, W) maps of class ids 0 ... K-1 and the ignored id, as tensors, arrays
    or nested lists; a prediction has the size of its reference.
num_labels, ignore_index, reduce_labels: as evaluate's own mean_iou takes them in `compute`, or in `load`. With
    reduce_labels 0 of the references becomes the ignored id, 1 becomes 0, and so on.

Returns mean_iou, mean_accuracy, mean_iou_classes and mean_accuracy_classes (how many classes these are over: those with
a value), classes_without_reference (ids of classes without a pixel in the references), overall_accuracy,
per_category_iou and per_category_accuracy (lists of K, NaN for absent classes), images, labelled_pixels, and
label_policy: how the ignored id and absent classes count.
Raises ValueError for a value that is neither a class nor the ignored id, for maps of different sizes, and for what is
no map of ids: fractions, probabilities, three channels.
"""


class MeanIouTqdm(evaluate.Metric):
    """Pass `num_classes` (or `num_labels`), and `ignore_index` for the id of pixels that do not count, to `load`.

    class_set: the classes that mean_iou is over, as ids, or a name of `tqdm_seg.evaluation.class_sets` for 19 street
    classes; all by default.
    """

    def __init__(
        self, *args: Any, num_classes: int | None = None, num_labels: int | None = None, ignore_index: int = 255,
        reduce_labels: bool = False, class_set: str | Sequence[int] | None = None, **kwargs: Any,
    ):  # fmt: skip
        self.num_classes = num_labels if num_classes is None else num_classes
        self.ignore_index, self.reduce_labels = ignore_index, reduce_labels
        self.class_set = class_set
        if self.num_classes is not None:
            self._check_settings()
        self._clear()
        super().__init__(*args, **kwargs)

    def _check_settings(self) -> None:
        number = self.num_classes
        if number is None:
            raise ValueError("the number of classes is missing; give num_labels to load or compute, such as 19")
        check_settings(number, self.ignore_index)
        if not isinstance(self.reduce_labels, bool):
            raise ValueError(f"reduce_labels is {cut(repr(self.reduce_labels))}; it must be True or False")
        if isinstance(self.class_set, str):
            if number != len(STREET_CLASSES):
                raise ValueError(f"class_set {self.class_set!r} is of {len(STREET_CLASSES)} classes; here are {number}")
            self.class_set = members(class_set(self.class_set, STREET_CLASSES), STREET_CLASSES)
        if self.class_set is not None and not (
            isinstance(self.class_set, Sequence) and self.class_set and all(i in range(number) for i in self.class_set)
        ):
            raise ValueError(
                f"class_set is {cut(repr(self.class_set))}; it must be a list of ids from 0 to {number - 1}"
            )

    def _info(self) -> evaluate.MetricInfo:
        maps = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": maps, "references": maps}),
        )

    @property
    def label_policy(self) -> str:
        """Which pixels and classes count, and how."""
        return (
            f"classes 0 ... {self.num_classes - 1}; pixels whose reference is {self.ignore_index} are left out; "
            f"elsewhere a prediction of {self.ignore_index} is a miss for the true class and a false alarm for no "
            "class; a class in neither references nor predictions is NaN and left out of the means, one that is only "
            "predicted has IoU 0; counts are summed over all images before ratios are taken"
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **settings: Any) -> None:
        """Counts a batch of maps; when it raises, none of them."""
        self._set(**settings)
        self._check_settings()
        number, other = (len(batch) if hasattr(batch, "__len__") else None for batch in (predictions, references))
        if number is None or number != other or isinstance(predictions, str):
            raise ValueError("predictions and references must be lists of one map per image, of the same number")
        counts = [self._count(p, r) for p, r in zip(predictions, references, strict=True)]
        if self._matrix is None:
            self._matrix = torch.zeros(self.num_classes, self.num_classes + 1, dtype=torch.int64)
        self._matrix += sum(counts)
        self._images += len(counts)

    def _count(self, prediction: Any, reference: Any) -> torch.Tensor:
        prediction, reference = _ids("predictions", prediction), _ids("references", reference)
        if self.reduce_labels:
            ignored = (reference == 0) | (reference == self.ignore_index)
            reference = torch.where(ignored, self.ignore_index, reference.long() - 1)
        return confusion_matrix(prediction, reference, self.num_classes, self.ignore_index).cpu()

    def _set(
        self, num_labels: int | None = None, ignore_index: int | None = None, reduce_labels: bool | None = None,
        nan_to_num: None = None, label_map: None = None,
    ) -> None:  # fmt: skip
        """Takes settings of evaluate's own mean_iou; raises ValueError for those that counts so far contradict."""
        if nan_to_num is not None or label_map:
            raise ValueError("nan_to_num and label_map are not offered; map the ids, or the NaN, yourself")
        given = {"num_classes": num_labels, "ignore_index": ignore_index, "reduce_labels": reduce_labels}
        for name, value in given.items():
            before = getattr(self, name)
            if value is not None and value != before:
                if self._images or (name == "num_classes" and before is not None):
                    raise ValueError(f"{name.replace('classes', 'labels')} is {value}, but was {before} before")
                setattr(self, name, value)

    def add(self, *, prediction: Any = None, reference: Any = None) -> None:
        """Counts one image."""
        self.add_batch(predictions=[prediction], references=[reference])

    def compute(self, *, predictions: Any = None, references: Any = None, **settings: Any) -> dict[str, Any] | None:
        """Scores of everything added and given here; starts over. None on all processes but the first."""
        self._set(**settings)
        self._check_settings()
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if self.num_process == 1 and not self._images:
            raise ValueError("nothing to compute; add images first")
        # The base class gathers pairs of maps from all processes: matrix and number of images go as such a pair.
        matrix = torch.zeros(self.num_classes, self.num_classes + 1).long() if self._matrix is None else self._matrix
        super().add_batch(predictions=[matrix.tolist()], references=[[[self._images]]])
        self._clear()
        return super().compute()

    def _compute(self, *, predictions: list[list[list[int]]], references: list[list[list[int]]]) -> dict[str, Any]:
        matrix = torch.tensor(predictions).sum(0)
        accuracy = class_accuracy(matrix)
        chosen = list(range(len(matrix))) if self.class_set is None else list(self.class_set)
        return {
            "mean_iou": mean_iou(matrix, chosen),
            "mean_iou_classes": int((~class_iou(matrix)[chosen].isnan()).sum()),
            "mean_accuracy": accuracy.nanmean().item(),
            "mean_accuracy_classes": int((~accuracy.isnan()).sum()),
            "overall_accuracy": pixel_accuracy(matrix),
            "per_category_iou": class_iou(matrix).tolist(),
            "per_category_accuracy": accuracy.tolist(),
            "classes_without_reference": accuracy.isnan().nonzero()[:, 0].tolist(),
            "images": sum(images for ((images,),) in references),
            "labelled_pixels": int(matrix.sum()),
            "label_policy": self.label_policy,
        }

    def _clear(self) -> None:
        self._matrix: torch.Tensor | None = None
        self._images = 0


def _ids(name: str, values: Any) -> torch.Tensor:
    """A map (H, W) of ids; raises ValueError for anything else."""
    try:
        ids = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        found = f"{type(values).__name__} {cut(values, 40)}"
        raise ValueError(f"{name} hold {found}, no map (H, W); give class ids, such as scores.argmax(0)") from error
    if ids.ndim != 2:
        raise ValueError(
            f"{name} hold a map of shape {tuple(ids.shape)}; give class ids (H, W), such as scores.argmax(0)"
        )
    return as_ids(name, ids)
