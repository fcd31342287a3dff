"""Options of `tqdm-seg compare` and `tqdm-seg report`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..deploy.options import Device
from ..evaluation.options import GroupOptions, parse_sets
from ..program import option

# Figures that other works published, with protocol and source.
PUBLISHED = Path(__file__).parents[1] / "data" / "lists" / "published_results.csv"
_MOST_RESAMPLES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class CompareOptions(GroupOptions):
    """Compares two evaluations of the same frames: which is better, where, and how certain that is.

        tqdm-seg compare A.parquet B.csv --leaked SEEN_IN_TRAINING.txt --by weather,light --markdown comparison.md

    A and B are folders that `tqdm-seg evaluate` writes, or tables of pixel counts per frame in them:
        scene         mean IoU over the classes, on the summed counts of the scene's frames; sorted by canonical name
        Overall       the same on the counts of all frames; the mean of the scenes is stated separately
        difference    (B - A) x 100 percentage points, of unrounded values; above 0 is better, below 0 worse
        marks         up or down: further above or below the mean of the scenes' differences than one standard
                      deviation (of a sample), as in the published Road3D comparison
        N/A           a class in neither ground truth nor prediction of a run has no IoU and is left out of its mean,
                      also where the other run predicts it (and gets 0). A scene without labelled pixels, or missing
                      in a run, has no mIoU and counts neither as better nor as worse.

    Other frames, ground truth or protocol: exit status 1. With --anyway such runs are compared all the same, and every
    output says what differs.
    """

    first: Path = option(
        metavar="A", help="folder of a finished evaluation, or per-frame table (.parquet or .csv), of the baseline"
    )
    second: Path = option(metavar="B", help="the same of the run to compare with it")
    set: str | None = option(None, metavar="NAME", help="which set, where A or B are folders of several")
    scenes: Path | None = option(None, group="scenes", help="only these scenes, one per line")
    known: Path | None = option(None, group="scenes", help="scenes of the training: groups known and unknown")
    leaked: Path | None = option(None, group="scenes", help="test scenes seen in training: groups with and without")
    scene_map: Path | None = option(
        None, group="scenes", metavar="FILE",
        help="CSV of renamed scenes, old,new per line; holds for both tables, lists and --attributes",
    )  # fmt: skip
    bootstrap: int = option(
        10000, help="resamples of the scenes for the interval of the Overall difference, 0: none",
    )  # fmt: skip
    seed: int = option(0, help="of the bootstrap")
    anyway: bool = option(False, help="compare in spite of other frames, ground truth or protocol, and say so")
    language: Literal["en", "zh"] = option("en", group="output", help="of the Markdown")
    markdown: Path | None = option(None, group="output", help="write what is printed")
    csv: Path | None = option(None, group="output", help="write scenes and groups, unrounded")
    json: Path | None = option(None, group="output", help="write everything, unrounded")

    def __post_init__(self):
        if not 0 <= self.bootstrap <= _MOST_RESAMPLES:
            raise ValueError(f"--bootstrap {self.bootstrap} must be 0 to {_MOST_RESAMPLES}")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed} must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """Makes one table over runs, sets and seeds: mIoU with 95 % intervals, differences, baselines, published figures.

        tqdm-seg table runs/e1                                       all variants of an ablation
        tqdm-seg table ours=runs/a_0,runs/a_1 other=runs/b --latex   evaluations; several folders are seeds of one model
        tqdm-seg table gta5=runs/gta5 --published --trained-on GTA5  published figures beside them, marked as such

    Intervals come from a bootstrap over scenes and seeds on summed counts; differences are paired by frame and seed.
    All methods of a set must have been scored on the same frames and ground truth.
    """

    runs: tuple[str, ...] = option(
        nargs="+",
        metavar="[NAME=]RUN[,RUN]",
        help="folders of finished evaluations or ablations, and a name for the row",
    )
    min_scenes: int = option(
        3, help="classes in fewer scenes are named and left out of the mean, in sets of at least as many scenes"
    )
    published: Path | None = option(
        None, nargs="?", const=PUBLISHED, metavar="CSV",
        help="add published figures on the same sets: method,backbone,trained_on,tested_on,miou,test_protocol,source "
        "per line (without CSV: those known here)",
    )  # fmt: skip
    trained_on: str | None = option(None, metavar="DATASET", help="only published figures of this training")
    bootstrap: int = option(10000, help="resamples for the intervals, 0: none")
    seed: int = option(0, help="of the bootstrap")
    latex: bool = option(False, group="output", help="print LaTeX (booktabs) instead of Markdown")
    json: Path | None = option(None, group="output", help="write everything, unrounded")

    def __post_init__(self):
        if min(self.bootstrap, self.seed, self.min_scenes) < 0:
            raise ValueError("--bootstrap, --seed and --min-scenes must be 0 or more")
        if self.trained_on and self.published is None:
            raise ValueError("--trained-on chooses published figures; give --published as well")


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Makes one HTML page of an evaluation, for any browser, offline: figures, classes, confusion, scenes, frames.

        tqdm-seg report runs/evaluation                                        figures only, without model and data
        tqdm-seg report runs/evaluation --model MODEL --data orfd=DATA/orfd    with images of the worst and best frames
        tqdm-seg report runs/evaluation --compare runs/other                   with another evaluation of the same sets

    Images are predicted with the evaluated weights under the protocol of the evaluation.
    """

    results: Path = option(help="folder of a finished evaluation")
    model: str | None = option(None, metavar="MODEL", help="the evaluated model, to draw images; needs --data")
    data: tuple[str, ...] | None = option(
        None,
        nargs="+",
        action="extend",
        metavar="NAME=PATH",
        help="an evaluated set to draw frames of; may be repeated",
    )
    compare: Path | None = option(None, metavar="DIR", help="folder of another evaluation, to compare with")
    out: Path | None = option(None, metavar="FILE", help="page to write (default: report.html in RESULTS)")
    frames: int = option(20, help="worst and best frames to list")
    images: int = option(6, help="worst and best frames to draw")
    score_maps: int = option(1, help="worst and best frames to draw score maps of")
    device: Device = option("auto", help="auto: a GPU if there is one")

    def __post_init__(self):
        parse_sets(self.data or ())
        if bool(self.model) != bool(self.data):
            raise ValueError("--model and --data draw images together; give both or neither")
        if min(self.frames, self.images, self.score_maps) < 0:
            raise ValueError("--frames, --images and --score-maps must be 0 or more")
