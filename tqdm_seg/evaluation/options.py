"""Options of `tqdm-seg evaluate`, and how a command line names prepared datasets."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from ..deploy.options import MODEL, Device, Precision, check_at_least
from ..program import names, option, size

_SET = re.compile(r"([A-Za-z0-9][\w.-]*)=(.+?)(?:@([1-9]\d*)x([1-9]\d*))?")


class SetSource(NamedTuple):
    """A NAME=PATH argument. split: None for the dataset's default; box: shorter and longer side, None for --size."""

    name: str
    folder: str
    split: str | None
    box: tuple[int, int] | None


def parse_set(text: str) -> SetSource:
    """The parts of NAME=PATH[:SPLIT][@HxW]; raises ValueError for anything else."""
    match = _SET.fullmatch(text)
    if match is None:
        raise ValueError(
            f"--data {text!r} names no dataset; give NAME=PATH, NAME=PATH:SPLIT or NAME=PATH:SPLIT@1024x2048, where "
            "NAME has letters, digits, '.', '_' and '-'"
        )
    name, folder, *sides = match.groups()
    short, long = sorted(map(int, sides)) if sides[0] else (0, 0)
    box = (short, long) if short else None
    place, colon, split = folder.rpartition(":")
    # URLs have colons, too: hf://datasets/...; and so may folders.
    port = re.fullmatch(r"\w+://[^/]*", place)
    if colon and re.fullmatch(r"\w+", split) and not port and not Path(folder).exists():
        return SetSource(name, place, split, box)
    return SetSource(name, folder, None, box)


def parse_sets(texts: Sequence[str]) -> list[SetSource]:
    """All NAME=PATH arguments; raises ValueError for malformed ones and names that differ in case only."""
    sources = [parse_set(text) for text in texts]
    for name, times in Counter(source.name.lower() for source in sources).items():
        if times > 1:
            raise ValueError(f"{times} sets are called {name}; files are named after them, so give each its own name")
    return sources


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Scores a model on prepared datasets: mIoU and more, every figure with its protocol.

        tqdm-seg evaluate MODEL --data cityscapes=DATA/cityscapes --data bdd100k=DATA/bdd100k --protocol published
        torchrun --nproc_per_node 2 -m tqdm_seg.evaluation.evaluate MODEL --data orfd=DATA/orfd:test --offnet

        DIR/results.json      figures of all sets and groups, confusion matrices, protocols, the model's checksums
        DIR/NAME.parquet      pixel counts of every frame, from which all figures follow; for `tqdm-seg compare`
        DIR/NAME_groups.csv   figures by scene and attribute
        DIR/plan.json         what was asked for

    Stopped at any moment, the same command continues with the remaining frames, with any number of processes. No code
    from MODEL runs. The model computes on its fast path, which differs from the plain one by rounding only.
    """

    model: str = option(help=MODEL)
    data: tuple[str, ...] = option(
        flag=True, nargs="+", action="extend", metavar="NAME=PATH:SPLIT",
        help="prepared dataset (folder or URL) and the name of its results; repeat it for more sets. Without SPLIT: "
        "validation, or test if there is none. PATH:SPLIT@1024x2048 is --size for this set alone",
    )  # fmt: skip
    out: Path = option(Path("runs/evaluation"), help="for the results")

    protocol: Literal["model", "own", "published"] = option(
        "model", group="protocol",
        help="image size: of the model's image processor, of the image itself, or as published: fitted into 1024x2048 "
        "(Cityscapes, Mapillary) or 720x1280 (BDD100K), its own for other sets",
    )  # fmt: skip
    size: tuple[int, int] | None = option(
        None, type=size, group="protocol", help="fit all images into this box, either way round, keeping their shape",
    )  # fmt: skip
    window: int | None = option(
        None, group="protocol", metavar="PX", help="side of the sliding window, 0: whole images (default: the model's)"
    )
    stride: int | None = option(
        None, group="protocol", metavar="PX",
        help="distance from window to window (default: the model's; with --window 2/3 of it)",
    )  # fmt: skip
    window_batch: int | None = option(
        None, group="protocol", help="windows per forward pass; fewer need less memory (default: the model's)",
    )  # fmt: skip
    aug_test: bool = option(
        False, group="protocol", help="average over six scales from 0.5 to 1.75, each mirrored too, as published"
    )
    offnet: bool = option(
        False, group="protocol", help="shrink the ground truth to 176x320 and enlarge it again, as OFF-Net scores"
    )
    precision: Precision = option(
        "fp32", group="protocol",
        help="fp32 is exact; tf32 is for NVIDIA GPUs, int8 for CPUs with torchao",
    )  # fmt: skip

    class_set: str | None = option(
        None, group="protocol", metavar="NAME|A,B",
        help="classes that means are over: synthia-16, synthia-13, or names. The IoU of every class stays that among "
        "all; a finished evaluation is only summed up again (default: all classes)",
    )  # fmt: skip

    attributes: Path | None = option(
        None, group="groups", help="CSV with a column `scene` and columns to group frames by"
    )
    by: tuple[str, ...] | None = option(
        None, type=names, group="groups", help="its columns to use (default: weather, light, road)"
    )

    device: Device = option("auto", group="computing", help="auto: a GPU if there is one")
    workers: int = option(2, group="computing", help="loader processes per process")
    save_every_frames: int = option(32, group="computing", help="frames that a kill costs at most")

    def __post_init__(self):
        parse_sets(self.data)
        check_at_least(window=(self.window, 0), stride=(self.stride, 1), window_batch=(self.window_batch, 1))
        if self.by and not self.attributes:
            raise ValueError("--by names columns of --attributes; give that file as well")
        if self.workers < 0 or self.save_every_frames < 1:
            raise ValueError(
                f"--workers must be at least 0 and --save-every-frames at least 1, not {self.workers} and "
                f"{self.save_every_frames}"
            )
