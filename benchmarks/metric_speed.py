"""Images per second of the confusion matrix, beside torchmetrics' on the same maps in the same run.

    python benchmarks/metric_speed.py

One thread. Medians over rounds in which they take turns, so that other load on the machine hits all alike. Needs
torchmetrics (`pip install -e ".[test]"`).
"""

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from tqdm_seg.evaluation.metrics import confusion_matrix


def street_maps(height: int, width: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Prediction and truth (H, W) uint8: blocks of one class, an eighth predicted as another, a tenth ignored."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(num_classes, (-(-height // 32), -(-width // 32)), generator=generator, dtype=torch.uint8)
    truth = blocks.repeat_interleave(32, 0).repeat_interleave(32, 1)[:height, :width].contiguous()
    wrong = torch.rand(truth.shape, generator=generator) < 1 / 8
    prediction = torch.where(wrong, (truth + 1) % num_classes, truth)
    truth[: height // 10] = 255
    return prediction, truth


def seconds(functions: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Median time of a call of each, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = perf_counter()
            function()
            times[name].append(perf_counter() - start)
    return {name: median(values[1:]) for name, values in times.items()}  # the first one warms up


def main() -> None:
    """Prints a table; raises AssertionError if the two disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=1024, help="pixels (default %(default)s)")
    parser.add_argument("--width", type=int, default=2048, help="pixels (default %(default)s)")
    parser.add_argument("--classes", type=int, default=19, help="number of classes (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="calls of each that are timed (default %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)

    checked = MulticlassConfusionMatrix(args.classes, ignore_index=255)
    unchecked = MulticlassConfusionMatrix(args.classes, ignore_index=255, validate_args=False)
    prediction, truth = street_maps(args.height, args.width, args.classes)
    print(f"{args.width}x{args.height}, {args.classes} classes, 1 thread, medians of {args.rounds}, images per second")
    print("| prediction / truth | ours | torchmetrics | ratio | without its checks | ratio |")
    print("|---|---:|---:|---:|---:|---:|")
    for p, t in ((prediction, truth), (prediction.long(), truth), (prediction.long(), truth.long())):
        functions = {
            "ours": lambda p=p, t=t: confusion_matrix(p, t, args.classes),
            "torchmetrics": lambda p=p, t=t: checked(p, t),
            "unchecked": lambda p=p, t=t: unchecked(p, t),
        }
        ours, theirs = functions["ours"](), functions["torchmetrics"]()
        assert torch.equal(ours[:, :-1], theirs) and not ours[:, -1].any(), "the two count differently"
        speed = {name: 1 / time for name, time in seconds(functions, args.rounds).items()}
        kinds = f"{str(p.dtype).removeprefix('torch.')} / {str(t.dtype).removeprefix('torch.')}"
        others = [f"{speed[name]:.1f} | {speed['ours'] / speed[name]:.1f}" for name in ("torchmetrics", "unchecked")]
        print(f"| {kinds} | {speed['ours']:.0f} | {' | '.join(others)} |")


if __name__ == "__main__":
    main()
