"""An evaluation as one HTML page: `tqdm-seg report`.

Letters: R frames, K classes.
"""

import sys

from ..commands import start

if __name__ == "__main__":
    sys.exit(start("report"))


from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

from ..data.files import check_fields, check_out_file, plain_name, read_json, write_file
from ..data.frames import FrameDataset
from ..deploy.folder import identity, load_model, model_folder, warn_untrained
from ..deploy.predict import choose_device, set_windows
from ..deploy.speed import ready_to_predict
from ..evaluation.class_sets import members
from ..evaluation.counts import FrameTable, read_table
from ..evaluation.figures import first_difference, mean_results, set_results
from ..evaluation.metrics import class_iou
from ..evaluation.options import SetSource, parse_sets
from ..evaluation.protocol import Protocol
from ..program import takes
from .comparison import Comparison, attribute_groups, compare_tables, with_class_set
from .images import draw_frame, draw_score_maps
from .options import ReportOptions
from .page import BEGINS, FrameScore, SetReport, render_page

# Resamples of the scenes for the interval of a difference, as many as `tqdm-seg compare` takes.
_RESAMPLES = 10000


# What is read of results.json, besides what follows from the tables.
_RESULTS = {
    "model": {"path": str, "sha256": {str: str}, "commit": str | None, "version": str | None},
    "sets": {str: dict},
}
# What is read of a set in it to draw its frames.
_DRAWN = {
    "data": {"path": str, "split": str, "index_sha256": str},
    "views": {"size": dict | None, "scales": [float], "flip": bool, "softmax_views": bool, "offnet": bool},
}


def read_evaluation(folder: Path) -> tuple[dict[str, Any], dict[str, FrameTable]]:
    """results.json of a finished evaluation, and its tables by set.

    Raises OSError or ValueError for any other folder, and for figures that do not follow from the tables.
    """
    path = folder / "results.json"
    if not folder.is_dir():
        raise FileNotFoundError(f"folder not found: {folder}; give the --out of a finished tqdm-seg evaluate")
    if not path.is_file():
        begun = (folder / "plan.json").is_file()
        advice = "let tqdm-seg evaluate finish there" if begun else "give the --out of a finished tqdm-seg evaluate"
        raise FileNotFoundError(f"{folder} holds no results.json; {advice}")
    fix = "evaluate again into a new folder"
    results = read_json(path, fix=fix)
    if "sets" not in results:
        model = folder / "model" if (folder / "model").is_dir() else "MODEL"
        raise ValueError(
            f"{path} has no sets: it is of a training run, no evaluation; run tqdm-seg evaluate {model} --data "
            "NAME=PATH --out DIR, then tqdm-seg report DIR"
        )
    check_fields(results, _RESULTS, path, fix)
    tables = {name: read_table(folder / f"{plain_name(name, path)}.parquet") for name in results["sets"]}
    sets = {name: set_results(table) for name, table in tables.items()}
    expected = {"sets": sets} | ({"mean": mean_results(sets)} if len(sets) > 1 else {})
    if not sets or (field := first_difference(results, expected)):
        files = ", ".join(f"{name}.parquet" for name in sets)
        raise ValueError(f"{path}: {f'{field} does not follow from {files}' if sets else 'sets is empty'}; {fix}")
    return results, tables


def rank_frames(table: FrameTable) -> list[FrameScore]:
    """The frames that have an mIoU, the worst first."""
    iou = class_iou(torch.tensor(table.counts))  # (R, K)
    chosen = iou[:, members(table.class_set, table.classes)]  # (R, K)
    counts = (~chosen.isnan()).sum(-1).tolist()
    rows = zip(table.frames, table.scenes, chosen.nanmean(-1).tolist(), counts, iou.tolist(), strict=True)
    scored = [FrameScore(number, *row) for number, row in enumerate(rows)]
    return sorted((frame for frame in scored if frame.miou == frame.miou), key=lambda frame: (frame.miou, frame.name))


def pick_worst_and_best(ranked: Sequence[FrameScore], number: int) -> tuple[list[FrameScore], list[FrameScore]]:
    """Up to `number` of each, best first among the best, no frame in both."""
    worst = list(ranked[: min(number, (len(ranked) + 1) // 2)])
    return worst, list(reversed(ranked[max(len(worst), len(ranked) - number) :]))


def open_frames(source: SetSource, results: dict[str, Any]) -> FrameDataset:
    """The frames that were evaluated; raises ValueError if those of the source are others."""
    if source.name not in results["sets"]:
        raise ValueError(
            f"--data {source.name}: the evaluation has no such set; choose from {', '.join(results['sets'])}"
        )
    check_fields(results["sets"][source.name], _DRAWN, f"results.json, set {source.name}", "evaluate again")
    data = results["sets"][source.name]["data"]
    frames = FrameDataset(source.folder, source.split or data["split"])
    found = frames.index.manifest["index_sha256"]
    if (found, frames.split) != (data["index_sha256"], data["split"]):
        raise ValueError(
            f"--data {source.name}: {source.folder} has other frames than were evaluated; give {data['path']}"
        )
    return frames


def open_model(
    name: str, results: dict[str, Any], device: str
) -> tuple[TqdmForSemanticSegmentation, TqdmImageProcessor]:
    """The evaluated model, ready to predict as it was; raises ValueError if this one has other weights."""
    folder = model_folder(name)
    if identity(folder)["sha256"] != results["model"]["sha256"]:
        raise ValueError(
            f"--model {name} has other files than the evaluated model, {results['model']['path']}; give that"
        )
    model, processor = load_model(folder)
    warn_untrained(model.config, name)
    precision = next(iter(results["sets"].values()))["protocol"]["precision"]  # all sets of an evaluation have one
    return ready_to_predict(model.to(device), precision), processor


def draw(
    part: SetReport,
    frames: FrameDataset,
    model: TqdmForSemanticSegmentation,
    processor: TqdmImageProcessor,
    options: ReportOptions,
) -> None:
    """Adds the images of the worst and best frames, predicted again under the set's protocol."""
    described, views = part.results["protocol"], part.results["views"]
    set_windows(model, described["window"] or 0, described["stride"], None)
    protocol = Protocol(**views | {"scales": tuple(views["scales"])})

    def first(number: int) -> list[int]:
        return [frame.row for frame in (*part.worst[:number], *part.best[:number])]

    drawn, mapped = first(options.images), first(options.score_maps)
    for row in tqdm(dict.fromkeys([*drawn, *mapped]), part.name, unit="frame"):
        if row in drawn:
            part.images[row] = draw_frame(model, processor, frames[row], protocol)
        if row in mapped:
            part.score_maps[row] = draw_score_maps(model, processor, frames[row], protocol)


def compare_sets(folders: tuple[Path, Path], tables: dict[str, FrameTable]) -> dict[str, Comparison]:
    """Both evaluations of every set that both have; raises ValueError if there is none.

    tables: those of the first folder, by set.
    """
    first, second = folders
    _, others = read_evaluation(second)
    common = [name for name in tables if name in others]
    if not common:
        raise ValueError(f"{second} has none of the sets {', '.join(tables)}; evaluate under the same names")
    names = tuple(path.resolve().name for path in folders)
    runs = names if names[0] != names[1] else (str(first), str(second))
    found = {}
    for name in common:
        both = tables[name], others[name]
        both = with_class_set(both, None)
        groups, notes = attribute_groups(both, None, None)
        found[name] = compare_tables(both, runs, groups=groups, resamples=_RESAMPLES, notes=notes)
    return found


@takes(ReportOptions)
def report(options: ReportOptions) -> Path:
    """Writes the page; returns where."""
    (results, tables), out = read_evaluation(options.results), options.out or options.results / "report.html"
    check_out_file(out, BEGINS, [path for path in options.results.iterdir() if path.name != "report.html"])
    datasets = {source.name: open_frames(source, results) for source in parse_sets(options.data or ())}
    compared = compare_sets((options.results, options.compare), tables) if options.compare else {}
    parts = []
    for name, found in results["sets"].items():
        ranked = rank_frames(tables[name])
        worst, best = pick_worst_and_best(ranked, options.frames)
        parts.append(SetReport(name, found, ranked, worst, best, comparison=compared.get(name)))
    if options.model:
        model, processor = open_model(options.model, results, choose_device(options.device))
        for part in parts:
            if part.name in datasets:
                draw(part, datasets[part.name], model, processor, options)
    write_file(out, render_page(results, parts).encode())
    print(f"report: {out}")
    return out
