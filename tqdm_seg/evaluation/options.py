"""Options of `tqdm-seg evaluate`, and how a command line names prepared datasets."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..data.options import check_workers
from ..deploy.options import MODEL, Device, Precision, check_at_least
from ..program import cut, names, option, size

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
            f"--data {cut(text)!r} names no dataset; give NAME=PATH, NAME=PATH:SPLIT or NAME=PATH:SPLIT@1024x2048, "
            "where NAME has letters, digits, '.', '_' and '-'"
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


_COMMON = (
    ", or common: in evaluate those that model and sets name, without the pixels of others; in compare those with "
    "pixels in both"
)


def class_set_option(group: str, common: str = "") -> Any:
    """The option --class-set, which several programs have; common: what that set means there."""
    return option(
        None, group=group, metavar="NAME|A,B",
        help=f"classes that means are over: synthia-16, synthia-13, names{common} (default: all classes)",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GroupOptions:
    """Which classes means are over, and what frames are grouped by."""

    class_set: str | None = class_set_option("classes and groups", _COMMON)
    attributes: Path | None = option(
        None, group="classes and groups",
        help="CSV with a column `scene` and columns to group frames by, instead of those of a table",
    )  # fmt: skip
    by: tuple[str, ...] | None = option(
        None, type=names, nargs="?", const=(), group="classes and groups",
        help="columns to group by; without a value none (default: weather, light and road, where there are any)",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(GroupOptions):
    """Scores a model, or the saved predictions of any program: mIoU and more, every figure with its protocol.

        tqdm-seg evaluate MODEL --data cityscapes=DATA/cityscapes --data bdd100k=DATA/bdd100k --protocol published
        tqdm-seg evaluate --predictions DIR --data orfd=DATA/orfd:test
        torchrun --nproc_per_node 2 -m tqdm_seg.evaluation.evaluate MODEL --data orfd=DATA/orfd:test --offnet

        DIR/results.json      figures of all sets and groups, confusion matrices, protocols, the model's checksums
        DIR/NAME.parquet      pixel counts of every frame, from which all figures follow; for `tqdm-seg compare`
        DIR/NAME_groups.csv   figures by scene and attribute
        DIR/baselines/NAME    the same tables of every baseline, with --baselines
        DIR/plan.json         what was asked for

    Stopped at any moment, the same command continues with the remaining frames, with any number of processes. No code
    from MODEL runs. The model computes on its fast path, which differs from the plain one by rounding only.
    """

    model: str | None = option(None, positional=True, help=MODEL)
    data: tuple[str, ...] = option(
        flag=True, nargs="+", action="extend", metavar="NAME=PATH:SPLIT",
        help="prepared dataset (folder or URL) and the name of its results; repeat it for more sets. Without SPLIT: "
        "validation, or test if there is none. PATH:SPLIT@1024x2048 is --size for this set alone",
    )  # fmt: skip
    out: Path = option(Path("runs/evaluation"), help="for the results")
    predictions: Path | None = option(
        None, metavar="DIR", group="data",
        help="score the PNGs of class ids in this folder instead of a model; 255: no class. A file is named as its "
        "frame, with the frame's folders or some of them: val/a/0.png, a/0.png or 0.png; of several sets, in DIR/NAME",
    )  # fmt: skip
    no_index: bool = option(
        False, group="data",
        help="read --data with datasets.load_dataset, without an index: any dataset of images and 8-bit masks of class "
        "ids; without SPLIT validation",
    )  # fmt: skip
    baselines: str | None = option(
        None, metavar="PATH:SPLIT", group="data",
        help="score what the frames of this prepared training set say without a model, too: constant answer, location "
        "mask, colour classifier; without SPLIT train",
    )  # fmt: skip
    image_column: str = option("image", group="data", help="with --no-index: name of the column of images")
    label_column: str = option("label", group="data", help="with --no-index: name of the column of masks")
    class_names: tuple[str, ...] | None = option(
        None, type=names, group="data",
        help="class names in id order: of the masks with --no-index (default: the model's), of the ids with "
        "--predictions (default: the dataset's)",
    )  # fmt: skip

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

    device: Device = option("auto", group="computing", help="auto: a GPU if there is one")
    workers: int = option(2, group="computing", help="loader processes per process")
    save_every_frames: int = option(32, group="computing", help="frames that a kill costs at most")

    def __post_init__(self):
        parse_sets(self.data)
        check_at_least(window=(self.window, 0), stride=(self.stride, 1), window_batch=(self.window_batch, 1))
        if self.by and not self.attributes:
            raise ValueError("--by names columns of --attributes; give that file as well")
        if bool(self.model) == bool(self.predictions):
            raise ValueError("give MODEL to score a model, or --predictions DIR to score saved predictions")
        self._check_predictions()
        self._check_columns()
        check_workers(self.workers, 0)
        check_at_least(save_every_frames=(self.save_every_frames, 1))

    def _check_predictions(self) -> None:
        """Saved predictions have no image size, windows or precision to choose."""
        of_model = ("no_index", "protocol", "size", "window", "stride", "window_batch", "aug_test", "precision")
        wrong = [name for name in of_model if getattr(self, name) != getattr(type(self), name)]
        if self.predictions and wrong:
            raise ValueError(f"--{wrong[0].replace('_', '-')} is for models; leave it out with --predictions")

    def _check_columns(self) -> None:
        """The options of data without an index."""
        if self.class_names and not (self.no_index or self.predictions):
            raise ValueError("--class-names is for --no-index and --predictions; prepared data name their classes")
        if not self.no_index and (self.image_column, self.label_column) != ("image", "label"):
            raise ValueError("--image-column and --label-column are for --no-index; give that as well")
        if self.no_index and self.attributes:
            raise ValueError("--attributes is for prepared data, whose scenes are known; leave it out with --no-index")
