"""Images per second of the confusion matrix, ours and torchmetrics', on the same maps, in turns, on one thread.

    python benchmarks/metric_speed.py

Raises AssertionError if the two disagree. Needs torchmetrics (`pip install -e ".[test]"`).
"""

from dataclasses import dataclass
from functools import partial

import torch
from measure import main, markdown_table, seconds_of, speed_ratio, take_turns
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from tqdm_seg.evaluation.metrics import confusion_matrix
from tqdm_seg.program import option, size


@dataclass(kw_only=True)
class MetricSettings:
    """Options."""

    size: tuple[int, int] = option((1024, 2048), type=size, metavar="HxW", help="of the maps (default: 1024x2048)")
    classes: int = option(19, help="(default: %(default)s)")
    rounds: int = option(20, help="timed calls of each (default: %(default)s)")


def street_maps(height: int, width: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Prediction and ground truth (H, W) uint8: blocks of one class, an eighth predicted wrong, a tenth ignored."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(num_classes, (-(-height // 32), -(-width // 32)), generator=generator, dtype=torch.uint8)
    truth = blocks.repeat_interleave(32, 0).repeat_interleave(32, 1)[:height, :width].contiguous()
    wrong = torch.rand(truth.shape, generator=generator) < 1 / 8
    prediction = torch.where(wrong, (truth + 1) % num_classes, truth)
    truth[: height // 10] = 255
    return prediction, truth


def measure_metric(settings: MetricSettings) -> None:
    """Prints a table."""
    torch.set_num_threads(1)
    checked = MulticlassConfusionMatrix(settings.classes, ignore_index=255)
    unchecked = MulticlassConfusionMatrix(settings.classes, ignore_index=255, validate_args=False)
    prediction, truth = street_maps(*settings.size, settings.classes)
    rows = []
    for maps in ((prediction, truth), (prediction.long(), truth), (prediction.long(), truth.long())):
        calls = {
            "ours": partial(confusion_matrix, *maps, settings.classes),
            "torchmetrics": partial(checked, *maps), "without its checks": partial(unchecked, *maps),
        }  # fmt: skip
        ours, theirs = calls["ours"](), calls["torchmetrics"]()
        assert torch.equal(ours[:, :-1], theirs) and not ours[:, -1].any(), "the two count differently"
        first, *others = take_turns({name: partial(seconds_of, call) for name, call in calls.items()}, settings.rounds)
        kinds = " / ".join(str(part.dtype).removeprefix("torch.") for part in maps)
        cells = [[f"{1 / other.seconds:.1f}", f"{speed_ratio(first, other)[0]:.1f}"] for other in others]
        rows.append([kinds, f"{1 / first.seconds:.0f}", *sum(cells, [])])
    header = ["prediction / ground truth", "ours", "torchmetrics", "ratio", "without its checks", "ratio"]
    words = "x".join(map(str, settings.size))
    print(f"{words}, {settings.classes} classes, 1 thread, medians of {settings.rounds}, images per second")
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main(measure_metric, MetricSettings, __doc__)
