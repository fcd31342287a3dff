"""mIoU as an `evaluate` metric: `evaluate.load("metrics/mean_iou_tqdm", num_classes=19)`, offline.

The scores are those of `tqdm_seg.evaluation.metrics`, which must be installed (`pip install -e .` here).
Between batches it keeps a confusion matrix, not the pixels: memory and disk do not grow with the set.

Letters: H, W image, K classes.
"""

from typing import Any

import datasets
import evaluate
import torch

from tqdm_seg.evaluation.metrics import class_accuracy, class_iou, confusion_matrix, mean_iou, pixel_accuracy

DESCRIPTION = "Mean intersection over union of semantic segmentation, from one confusion matrix over all images."
INPUTS = """
predictions, references: batches or lists of (H, W) maps of class ids 0 ... K-1 and the ignored id, as tensors, arrays
    or nested lists; a prediction has the size of its reference.

Returns mean_iou, mean_accuracy, overall_accuracy, per_category_iou and per_category_accuracy (lists of K, NaN for
absent classes), images, labelled_pixels, and label_policy: how the ignored id and absent classes count.
Raises ValueError for a value that is neither a class nor the ignored id, and for maps of different sizes.
"""


class MeanIouTqdm(evaluate.Metric):
    """Pass `num_classes`, and `ignore_index` for the id of pixels that do not count, to `load`."""

    def __init__(self, *args: Any, num_classes: int | None = None, ignore_index: int = 255, **kwargs: Any):
        if num_classes is None or num_classes < 1:
            raise ValueError("the number of classes is missing; load the metric with it, such as num_classes=19")
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self._clear()
        super().__init__(*args, **kwargs)

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

    def add_batch(self, *, predictions: Any = None, references: Any = None) -> None:
        """Counts a batch of maps; when it raises, none of them."""
        if predictions is None or references is None or len(predictions) != len(references):
            raise ValueError("predictions and references differ in number; give one of each per image")
        counts = [
            confusion_matrix(torch.as_tensor(p), torch.as_tensor(r), self.num_classes, self.ignore_index).cpu()
            for p, r in zip(predictions, references, strict=True)
        ]
        self._matrix += sum(counts)
        self._images += len(counts)

    def add(self, *, prediction: Any = None, reference: Any = None) -> None:
        """Counts one image."""
        self.add_batch(predictions=[prediction], references=[reference])

    def compute(self, *, predictions: Any = None, references: Any = None) -> dict[str, Any] | None:
        """Scores of everything added and given here; starts over. None on all processes but the first."""
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if self.num_process == 1 and not self._images:
            raise ValueError("nothing to compute; add images first")
        # The base class gathers pairs of maps from all processes: matrix and number of images go as such a pair.
        super().add_batch(predictions=[self._matrix.tolist()], references=[[[self._images]]])
        self._clear()
        return super().compute()

    def _compute(self, *, predictions: list[list[list[int]]], references: list[list[list[int]]]) -> dict[str, Any]:
        matrix = torch.tensor(predictions).sum(0)
        accuracy = class_accuracy(matrix)
        return {
            "mean_iou": mean_iou(matrix),
            "mean_accuracy": accuracy.nanmean().item(),
            "overall_accuracy": pixel_accuracy(matrix),
            "per_category_iou": class_iou(matrix).tolist(),
            "per_category_accuracy": accuracy.tolist(),
            "images": sum(images for ((images,),) in references),
            "labelled_pixels": int(matrix.sum()),
            "label_policy": self.label_policy,
        }

    def _clear(self) -> None:
        self._matrix = torch.zeros(self.num_classes, self.num_classes + 1, dtype=torch.int64)
        self._images = 0
