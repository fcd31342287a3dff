"""An evaluation as one HTML page that opens anywhere, offline: figures, classes, confusions, scenes, frames, pictures.

    python report.py runs/evaluation                                        figures alone: no model, no data needed
    python report.py runs/evaluation --model MODEL --data orfd=DATA/orfd    with the worst and best frames drawn
    python report.py runs/evaluation --compare runs/other                   with another evaluation of the same sets

RESULTS is a folder that evaluate_tqdm.py has made. Pictures are drawn by the evaluated weights, under its protocol.
Exit status: 0 written, 1 bad input, 2 unknown option.

Letters: R frames, K classes.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging

from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

from ..data.files import run, write_whole
from ..data.frames import FrameDataset
from ..deploy.folder import identity, load_model, model_folder
from ..deploy.predict import set_windows
from ..deploy.speed import ready_to_predict
from ..evaluation.counts import FrameTable, read_table
from ..evaluation.metrics import class_iou
from ..evaluation.protocol import Inference
from ..evaluation.sets import SetSource, parse_set
from .comparison import Comparison, attribute_groups, compare
from .page import FrameScore, SetReport, page
from .pictures import draw_frame, draw_score_maps

# Resamples of the scenes for the interval of a difference, as many as compare_runs.py takes.
_RESAMPLES = 10000


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("results", type=Path, metavar="RESULTS", help="folder of a finished evaluation")
    add("--model", metavar="MODEL", help="the evaluated model, to draw pictures; needs --data")
    add("--data", nargs="+", default=[], metavar="NAME=PATH", help="the evaluated sets to draw frames of")
    add("--compare", type=Path, metavar="OTHER", help="folder of another evaluation, to set beside the first")
    add("--out", type=Path, metavar="FILE", help="page to write (default: report.html in RESULTS)")
    add("--frames", type=int, default=20, metavar="N", help="worst and best frames to list (default: %(default)s)")
    add("--pictures", type=int, default=6, metavar="N", help="worst and best ones to draw (default: %(default)s)")
    add("--score-maps", type=int, default=1, metavar="N", help="worst and best to draw score maps of (%(default)s)")
    return parser


def read_results(folder: Path) -> dict[str, Any]:
    """results.json of a finished evaluation; raises FileNotFoundError for any other folder."""
    path = folder / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no results.json; let evaluate_tqdm.py finish there first")
    return json.loads(path.read_text(encoding="utf-8"))


def ranked_frames(table: FrameTable) -> list[FrameScore]:
    """The frames that have an mIoU, from the worst on."""
    iou = class_iou(torch.tensor(table.counts))  # (R, K)
    rows = zip(table.frames, table.scenes, iou.nanmean(-1).tolist(), iou.tolist(), strict=True)
    scored = [FrameScore(number, *row) for number, row in enumerate(rows)]
    return sorted((frame for frame in scored if frame.miou == frame.miou), key=lambda frame: (frame.miou, frame.name))


def worst_and_best(ranked: Sequence[FrameScore], number: int) -> tuple[list[FrameScore], list[FrameScore]]:
    """Up to `number` of each, best first among the best, no frame in both."""
    worst = list(ranked[: min(number, (len(ranked) + 1) // 2)])
    return worst, list(reversed(ranked[max(len(worst), len(ranked) - number) :]))


def open_frames(source: SetSource, results: dict[str, Any]) -> FrameDataset:
    """The frames that were evaluated; raises ValueError if those of the source are others."""
    if source.name not in results["sets"]:
        raise ValueError(f"--data {source.name}: the evaluation has no such set, only {', '.join(results['sets'])}")
    data = results["sets"][source.name]["data"]
    frames = FrameDataset(source.folder, source.split or data["split"])
    found = frames.index.manifest["index_sha256"]
    if (found, frames.split) != (data["index_sha256"], data["split"]):
        raise ValueError(f"--data {source.name}: {source.folder} is not what was evaluated, {data['path']}")
    return frames


def open_model(name: str, results: dict[str, Any]) -> tuple[TqdmForSemanticSegmentation, TqdmImageProcessor]:
    """The evaluated model; raises ValueError if this one has other weights."""
    folder = model_folder(name)
    if identity(folder)["sha256"] != results["model"]["sha256"]:
        raise ValueError(f"{name} is not the model that was evaluated, {results['model']['path']}: its files differ")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, processor = load_model(folder)
    model.to(device)
    precision = next(iter(results["sets"].values()))["protocol"]["precision"]  # all sets of an evaluation have one
    if precision.startswith("fast-"):
        precision = precision.removeprefix("fast-")
        ready_to_predict(model, {"float32": "fp32", "bfloat16": "bf16"}.get(precision, precision))
    return model, processor


def draw(
    part: SetReport, frames: FrameDataset, model: TqdmForSemanticSegmentation, processor: TqdmImageProcessor,
    pictures: int, score_maps: int,
) -> None:  # fmt: skip
    """Fills in the pictures of the worst and best frames, predicted anew under the set's protocol."""
    protocol, saved = part.results["protocol"], part.results["inference"]
    set_windows(model, protocol["window"] or 0, protocol["stride"], None)
    inference = Inference(**{**saved, "scales": tuple(saved["scales"])})
    chosen = [frame.row for frame in (*part.worst[:pictures], *part.best[:pictures])]
    mapped = [frame.row for frame in (*part.worst[:score_maps], *part.best[:score_maps])]
    with torch.autocast(model.device.type, torch.bfloat16, enabled=protocol["precision"] == "bf16"):
        for row in tqdm(dict.fromkeys([*chosen, *mapped]), part.name, unit="frame"):
            if row in chosen:
                part.pictures[row] = draw_frame(model, processor, frames[row], inference)
            if row in mapped:
                part.score_maps[row] = draw_score_maps(model, processor, frames[row], inference)


def comparisons(args: argparse.Namespace, tables: dict[str, FrameTable]) -> dict[str, Comparison]:
    """Both evaluations of every set that both have; raises ValueError if there is none."""
    other = read_results(args.compare)
    common = [name for name in tables if name in other["sets"]]
    if not common:
        raise ValueError(f"{args.compare} has none of the sets {', '.join(tables)}; evaluate under the same names")
    names = tuple(path.resolve().name for path in (args.results, args.compare))
    runs = names if names[0] != names[1] else (str(args.results), str(args.compare))
    found = {}
    for name in common:
        both = tables[name], read_table(args.compare / f"{name}.parquet")
        groups, notes = attribute_groups(both, None, None)
        found[name] = compare(both, runs, groups=groups, resamples=_RESAMPLES, notes=notes)
    return found


def main(argv: list[str] | None = None) -> Path:
    """Writes the page; returns where."""
    args = make_parser().parse_args(argv)
    if bool(args.model) != bool(args.data):
        raise ValueError("--model and --data draw pictures together; give both or neither")
    if min(args.frames, args.pictures, args.score_maps) < 0:
        raise ValueError("--frames, --pictures and --score-maps must be 0 or more")
    logging.disable_progress_bar()
    results = read_results(args.results)
    sources = [parse_set(text) for text in args.data]
    datasets = {source.name: open_frames(source, results) for source in sources}
    tables = {name: read_table(args.results / f"{name}.parquet") for name in results["sets"]}
    compared = comparisons(args, tables) if args.compare else {}
    model, processor = open_model(args.model, results) if args.model else (None, None)
    parts = []
    for name, found in results["sets"].items():
        ranked = ranked_frames(tables[name])
        part = SetReport(name, found, ranked, *worst_and_best(ranked, args.frames), comparison=compared.get(name))
        if name in datasets:
            draw(part, datasets[name], model, processor, args.pictures, args.score_maps)
        parts.append(part)
    out = args.out or args.results / "report.html"
    write_whole(out, page(results, parts).encode())
    print(f"report: {out}")
    return out


if __name__ == "__main__":
    run(main)
