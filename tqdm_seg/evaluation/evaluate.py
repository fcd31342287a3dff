"""Scores of a model on prepared datasets: `tqdm-seg evaluate`, and the scoring that training does in between.

Letters: N frames, K classes, H, W image, h, w ground truth.
"""

import sys

from ..commands import start

if __name__ == "__main__":
    sys.exit(start("evaluate"))


import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

from ..data.files import check_out_folder, claim_folder, read_json, write_file
from ..data.frames import Frame, FrameDataset
from ..data.label_maps import IGNORE_INDEX
from ..deploy.folder import identity, load_model, model_folder, warn_untrained
from ..deploy.predict import choose_device, set_windows
from ..deploy.speed import ready_copy, ready_to_predict, restore_arithmetic, use_huge_pages
from ..program import takes
from .baselines import BASELINE_FOLDER, Baselines, file_name, score_baselines
from .class_sets import class_set, renumbering
from .counts import FrameTable, Scored, join_scored, read_scored, read_table, save_batch, write_table
from .figures import baseline_lines, closing_lines, group_csv, mean_results, set_lines, set_results
from .groups import flatten, read_attributes
from .metrics import confusion_matrix, scores
from .options import EvaluateOptions, parse_set
from .protocol import PUBLISHED_SCALES, Protocol, check_view_sizes, frame_sizes, predict
from .saved import SavedPredictions
from .sets import EvaluationSet, Sample, Samples, default_names, frame_attributes, left_out, open_sets, rows_to_score

# -- for training ---------------------------------------------------------------------------------------


def predict_frame(
    model: TqdmForSemanticSegmentation, processor: TqdmImageProcessor, frame: Frame
) -> tuple[Tensor, tuple[int, int]]:
    """Class ids (h, w) int64 at the size of the labels, and height and width of the model's input."""
    protocol = Protocol.of(processor)
    views = protocol.views(frame.image, processor)
    ids = predict(model, processor, views, frame.labels.shape, protocol, frame.key)
    return ids.long(), tuple(views[0].shape[-2:])


def count_frames(
    model: TqdmForSemanticSegmentation, processor: TqdmImageProcessor, frames: Iterable[Frame]
) -> tuple[Tensor, Counter[tuple[int, int]]]:
    """The confusion matrix (K, K + 1) of all frames together, on the model's device, and how many have which size."""
    num_classes = model.config.num_labels
    matrix = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64, device=model.device)
    sizes: Counter[tuple[int, int]] = Counter()
    for frame in frames:
        prediction, _ = predict_frame(model, processor, frame)
        labels = torch.tensor(frame.labels, device=prediction.device)
        matrix += confusion_matrix(prediction, labels, num_classes, IGNORE_INDEX)
        sizes[frame.labels.shape] += 1
    return matrix, sizes


def score_frames(
    model: TqdmForSemanticSegmentation,
    processor: TqdmImageProcessor,
    frames: Iterable[Frame],
    label_map: dict[str, str],
    accelerator: Accelerator,
    class_set_name: str | None = None,
) -> dict[str, object]:
    """All of `metrics.scores` pooled over the frames, with their protocol: what `evaluate` prints for the saved model.

    frames: those that this process scores; counts are summed over processes. label_map: its name and policy, from the
    manifest of the dataset. class_set_name: of the classes that the mean is over. A copy of the model, which is freed
    afterwards, computes on the fast path in the precision of the training; it has no adapters.
    """
    precision = number_format(accelerator).split()[0]
    with restore_arithmetic():
        matrix, sizes = count_frames(ready_copy(model, precision), processor, frames)
    matrix = accelerator.reduce(matrix, "sum")
    sizes = sum(gather_object([sizes]), Counter())
    names = model.config.class_names
    protocol = Protocol.of(processor).describe(model.config, names, label_map, sizes, precision)
    if chosen := class_set(class_set_name, names):
        protocol["class_set"] = {"name": class_set_name, "classes": list(chosen)}
    return {**scores(matrix.cpu(), names, chosen), "protocol": protocol}


def number_format(accelerator: Accelerator) -> str:
    """The precision of a training: fp32, tf32, bf16 autocast or fp16 autocast."""
    if accelerator.mixed_precision != "no":
        return f"{accelerator.mixed_precision} autocast"
    tf32 = accelerator.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else "fp32"


# -- the program: what is asked for ---------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that is known to be possible.

    model, processor: None where predictions were saved before; saved: those of every set. names: what the predicted ids
    mean. attributes: of the frames of every set with an index. plan: all that the counts depend on, ready for JSON.
    """

    model: TqdmForSemanticSegmentation | None
    processor: TqdmImageProcessor | None
    saved: dict[str, SavedPredictions]
    names: list[str]
    sets: list[EvaluationSet]
    attributes: dict[str, dict[str, list[str]]]
    plan: dict[str, Any]


def open_evaluation(options: EvaluateOptions) -> Evaluation:
    """Model or predictions, and data of the options; raises ValueError or OSError for all that cannot be evaluated."""
    model, processor, saved = None, None, {}
    if options.model:
        model, processor = load_model(model_folder(options.model))
        set_windows(model, options.window, options.stride, options.window_batch)
    names = model.config.class_names if model else default_names(options)
    protocol = replace(Protocol.of(processor) if processor else Protocol(), offnet=options.offnet)
    if options.aug_test:
        protocol = replace(protocol, scales=PUBLISHED_SCALES, flip=True, softmax_views=True)
    sets = open_sets(options, protocol, names)
    for chosen in sets:
        if model:
            check_view_sizes(model, chosen.frames, chosen.protocol)
        else:
            saved[chosen.name] = open_predictions(options, chosen, names)
    class_set(options.class_set, sets[0].classes)
    attributes = attributes_of(sets, options.attributes, options.by) if options.attributes else {}
    evaluation = Evaluation(model, processor, saved, names, sets, attributes, {})
    return replace(evaluation, plan=make_plan(evaluation, options))


def open_predictions(options: EvaluateOptions, chosen: EvaluationSet, names: Sequence[str]) -> SavedPredictions:
    """The saved predictions of a set: in DIR, or DIR/NAME if there is such a folder; raises as `SavedPredictions`."""
    own = options.predictions / chosen.name
    saved = SavedPredictions.of(own if own.is_dir() else options.predictions, chosen.frames.keys, names)
    saved.check_sizes(dict(frame_sizes(chosen.frames)))
    return saved


def attributes_of(sets: list[EvaluationSet], path: Path, by: tuple[str, ...] | None) -> dict[str, dict[str, list[str]]]:
    """{set: {attribute: a value per frame}}; raises ValueError if the file knows no scene of any set."""
    of_scene = read_attributes(path)
    found = {chosen.name: frame_attributes(chosen.frames.scenes, of_scene, by) for chosen in sets}
    found = {name: {by: values for by, values in of_set.items() if any(values)} for name, of_set in found.items()}
    if not any(found.values()):
        raise ValueError(f"{path} has nothing to group by for any scene of the sets; compare the names of the scenes")
    return found


def make_plan(evaluation: Evaluation, options: EvaluateOptions) -> dict[str, Any]:
    """All that the counts of an evaluation depend on, ready for JSON."""
    config, planned = evaluation.model and evaluation.model.config, {}
    for chosen in evaluation.sets:
        sizes = chosen.sizes or Counter(size for _, size in frame_sizes(chosen.frames))
        protocol = describe(evaluation, chosen, sizes, options.precision)
        planned[chosen.name] = {"protocol": protocol, "index_sha256": chosen.facts["index_sha256"]}
        if not chosen.indexed:  # not all sizes are known yet
            asked = [chosen.place, chosen.frames.image, chosen.frames.label, config.window_size, config.window_stride]
            planned[chosen.name]["asked"] = asked
    made_by = (
        identity(model_folder(options.model)) if options.model
        else {"sha256": {n: found.digest() for n, found in evaluation.saved.items()}, "commit": None, "version": None}
    )  # fmt: skip
    plan = {"model": made_by, "window_batch": config and config.window_batch_size, "sets": planned}
    return json.loads(json.dumps(plan))


def describe(
    evaluation: Evaluation, chosen: EvaluationSet, sizes: Counter[tuple[int, int]], precision: str
) -> dict[str, Any]:
    """The protocol of a set, ready for JSON; sizes: how many frames of each (height, width) there are."""
    data = {name: chosen.facts[name] for name in ("dataset", "split")}
    config, label_map = evaluation.model and evaluation.model.config, chosen.frames.label_map
    asked = chosen.protocol.describe(config, chosen.classes, label_map, sizes, precision)
    if others := left_out(evaluation.names, chosen):
        asked["labels"]["left_out"] = others
    return json.loads(json.dumps({"data": data, **asked}))


def check_plan(out: Path, plan: dict[str, Any]) -> None:
    """Raises ValueError when the folder holds another evaluation, FileExistsError when it holds other files."""
    check_out_folder(out, "evaluate")
    path = out / "plan.json"
    if not ((out / "results.json").is_file() or any((out / "parts").rglob("*.npz"))):
        return  # nothing is scored yet
    before, now = (flatten(content) for content in (read_json(path, fix="choose another --out"), plan))
    changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    if changed:
        words = "; ".join(f"{name} was {before.get(name)}, now {now.get(name)}" for name in changed[:3])
        raise ValueError(f"{out} holds another evaluation ({words}); choose another --out, or delete it")


# -- the program: doing it ------------------------------------------------------------------------------


def score_set(
    evaluation: Evaluation, chosen: EvaluationSet, folder: Path, accelerator: Accelerator, options: EvaluateOptions
) -> None:
    """Scores this process's share of the frames that are not scored yet, and saves their counts batch by batch."""
    done = read_scored(folder, chosen.length, len(chosen.classes))
    check_ground_truth(chosen, done)
    accelerator.wait_for_everyone()  # all have seen the same frames done
    process, processes = accelerator.process_index, accelerator.num_processes
    rows = rows_to_score(chosen, done.rows, process, processes)
    for batch in scored_batches(evaluation, chosen, rows, len(done.rows), options, accelerator):
        save_batch(folder, batch)


def scored_batches(
    evaluation: Evaluation, chosen: EvaluationSet, rows: Iterable[Any], done: int, options: EvaluateOptions,
    accelerator: Accelerator,
) -> Iterator[Scored]:  # fmt: skip
    """The counts of these items of `Samples`, batch by batch; done: frames that are scored already."""
    source = evaluation.processor or evaluation.saved[chosen.name]
    remaining = chosen.length and len(range(accelerator.process_index, chosen.length - done, accelerator.num_processes))
    loader = DataLoader(
        Samples(chosen, source), batch_size=None, sampler=rows, pin_memory=accelerator.device.type == "cuda",
        num_workers=options.workers if remaining is None else min(options.workers, remaining),
    )  # fmt: skip
    bar = tqdm(loader, chosen.name, remaining, unit="frame", disable=not accelerator.is_main_process)
    samples = iter(bar)
    while batch := [
        (sample, frame_counts(evaluation, chosen, sample)) for sample in islice(samples, options.save_every_frames)
    ]:
        counts = torch.stack([counted for _, counted in batch]).cpu().numpy()
        about = [(sample.key, sample.scene, *sample.ground_truth.shape) for sample, _ in batch]
        numbers = np.array([sample.row for sample, _ in batch])
        scored = Scored(numbers, counts, None if chosen.indexed else np.array(about, str))
        check_ground_truth(chosen, scored)
        yield scored


def frame_counts(evaluation: Evaluation, chosen: EvaluationSet, sample: Sample) -> Tensor:
    """Counts (K, K + 1) of one frame on the model's device, without waiting for it."""
    ids, model = sample.views[0], evaluation.model
    if model:
        size = sample.ground_truth.shape
        ids = predict(model, evaluation.processor, sample.views, size, chosen.protocol, sample.key)
    if evaluation.names != chosen.classes:
        ids = torch.from_numpy(renumbering(evaluation.names, chosen.classes)).to(ids.device)[ids.long()]
    labels = sample.ground_truth.to(ids.device, non_blocking=True)
    return confusion_matrix(ids, labels, len(chosen.classes), IGNORE_INDEX, check=False)


def score_saved(evaluation: Evaluation, options: EvaluateOptions, accelerator: Accelerator) -> dict[str, Scored]:
    """The counts of all sets of saved predictions, in memory: a bad file is an error before anything is written."""
    found = {}
    for chosen in evaluation.sets:
        batches = scored_batches(evaluation, chosen, rows_to_score(chosen, []), 0, options, accelerator)
        found[chosen.name] = join_scored(batches, chosen.length, len(chosen.classes))
    return found


def check_ground_truth(chosen: EvaluationSet, scored: Scored) -> None:
    """Raises ValueError unless every frame has as many pixels of every class as its index says."""
    if chosen.protocol.offnet or not chosen.indexed:
        return  # shrinking changes the counts
    wrong = (scored.counts.sum(2) != chosen.class_pixels[scored.rows]).any(1)
    if wrong.any():
        folder, key = chosen.frames.folder, chosen.frames.keys[scored.rows[wrong.argmax()]]
        raise ValueError(
            f"labels of {key} in {folder} have other pixels than its index counts; run tqdm-seg check {folder}"
        )


def frame_table(evaluation: Evaluation, chosen: EvaluationSet, scored: Scored, options: EvaluateOptions) -> FrameTable:
    """The counts of every frame, in the order of the set; raises ValueError if any is missing."""
    number = len(scored.rows)
    if number != (chosen.length or number) or scored.rows.tolist() != list(range(number)):
        raise ValueError(f"{options.out} has {number} of the frames of {chosen.name}; can all processes write there?")
    if scored.about is None:
        keys, scenes, sizes = chosen.frames.keys, chosen.frames.scenes, chosen.sizes
    else:
        keys, scenes, *sides = scored.about.T.tolist()
        sizes = Counter(zip(*(map(int, side) for side in sides), strict=True))
        if len({*keys}) < number:
            keys = [f"{row}/{key}" for row, key in enumerate(keys)]
    return FrameTable(
        frames=keys,
        scenes=[scene or "(no scene)" for scene in scenes] if any(scenes) else scenes,
        attributes={},
        counts=scored.counts,
        classes=chosen.classes,
        protocol=describe(evaluation, chosen, sizes, options.precision),
    )


def finished_table(chosen: EvaluationSet, out: Path) -> FrameTable:
    """The table of an evaluation that is finished; raises ValueError unless it is the one that its results are of."""
    path = out / f"{chosen.name}.parquet"
    table, results = read_table(path), read_json(out / "results.json", {"sets": {str: dict}})
    matrix = results["sets"].get(chosen.name, {}).get("matrix")
    if (chosen.indexed and table.frames != chosen.frames.keys) or table.counts.sum(0).tolist() != matrix:
        raise ValueError(f"{path} is not the table that {out / 'results.json'} is of; evaluate into another --out")
    check_ground_truth(chosen, Scored(np.arange(len(table.frames)), table.counts))
    return table


def write_set(
    evaluation: Evaluation, chosen: EvaluationSet, table: FrameTable, options: EvaluateOptions
) -> dict[str, Any]:
    """Writes the files of a set, prints its figures; returns its part of results.json."""
    out = options.out
    table = replace(table, attributes=evaluation.attributes.get(chosen.name, {})).with_class_set(options.class_set)
    data = {"path": chosen.place, **chosen.facts}
    results = {**set_results(table), "data": data, "views": asdict(chosen.protocol)}
    write_table(out / f"{chosen.name}.parquet", table)
    write_file(out / f"{chosen.name}_groups.csv", group_csv(results).encode())
    print(*set_lines(chosen.name, results), "", sep="\n", flush=True)
    return results


def open_training(text: str) -> FrameDataset:
    """The training frames of --baselines PATH[:SPLIT]; raises ValueError or OSError for what is no prepared dataset."""
    source = parse_set(f"training={text}")
    return FrameDataset(source.folder, source.split or "train")


def add_baselines(
    evaluation: Evaluation, training: FrameDataset, results: dict[str, dict[str, Any]], options: EvaluateOptions
) -> None:
    """Adds the figures of the baselines to those of every set, writes their per-frame tables, prints both."""
    fitted = Baselines.fit([training], options.workers)
    data = {"dataset": training.index.manifest["dataset"], "split": training.split, "index_sha256": training.identity}
    for chosen in evaluation.sets:
        table, own = read_table(options.out / f"{chosen.name}.parquet"), results[chosen.name]
        own["baselines"] = {"trained_on": data, "figures": {}}
        for name, counts in score_baselines(fitted, chosen, options.workers).items():
            path = options.out / BASELINE_FOLDER / chosen.name / f"{file_name(name)}.parquet"
            write_table(path, replace(table, counts=counts))
            own["baselines"]["figures"][name] = scores(torch.from_numpy(counts.sum(0)), table.classes, table.class_set)
        print(*baseline_lines(chosen.name, own), "", sep="\n", flush=True)


def write_results(results: dict[str, Any], out: Path) -> dict[str, Any]:
    """Adds the mean over several sets, writes results.json and prints the end; returns what the file holds."""
    if len(results["sets"]) > 1:
        results["mean"] = mean_results(results["sets"])
    results = json.loads(json.dumps(results))
    write_file(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    print(*closing_lines(results), sep="\n", flush=True)
    return results


@takes(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Evaluates, prints and writes; returns what results.json holds, {} in other processes than the first."""
    use_huge_pages()
    choose_device(options.device)  # raises ValueError if torch has none
    accelerator = Accelerator(cpu=options.device == "cpu" or not torch.accelerator.is_available())
    main_process, out, parts = accelerator.is_main_process, options.out, options.out / "parts"
    try:
        evaluation = open_evaluation(options)
        check_plan(out, evaluation.plan)
        training = open_training(options.baselines) if options.baselines else None
        scored = score_saved(evaluation, options, accelerator) if options.predictions and main_process else {}
        finished = bool(evaluation.model) and (out / "results.json").is_file()
        tables = {chosen.name: finished_table(chosen, out) for chosen in evaluation.sets if finished}
        for chosen in evaluation.sets:  # what is scored already has to be whole
            read_scored(parts / chosen.name, chosen.length, len(chosen.classes))
    except (OSError, ValueError):
        if main_process:
            raise
        raise SystemExit(1) from None  # the first process says why
    accelerator.wait_for_everyone()  # all have looked for an earlier evaluation
    if evaluation.model and not finished:
        ready_to_predict(evaluation.model.to(accelerator.device), options.precision)
    if main_process:
        if evaluation.model:
            warn_untrained(evaluation.model.config, options.model)
        claim_folder(out, "evaluate")
        write_file(out / "plan.json", (json.dumps(evaluation.plan, indent=2) + "\n").encode())

    results: dict[str, Any] = {"model": {"path": options.model or str(options.predictions), **evaluation.plan["model"]}}
    results["sets"] = {}
    for chosen in evaluation.sets:
        name, folder = chosen.name, parts / chosen.name
        if evaluation.model and not finished:
            score_set(evaluation, chosen, folder, accelerator, options)
            accelerator.wait_for_everyone()
        if main_process and finished:
            results["sets"][name] = write_set(evaluation, chosen, tables[name], options)
        elif main_process:
            found = scored.get(name) or read_scored(folder, chosen.length, len(chosen.classes))
            table = frame_table(evaluation, chosen, found, options)
            results["sets"][name] = write_set(evaluation, chosen, table, options)
    if main_process:
        if training is not None:
            add_baselines(evaluation, training, results["sets"], options)
        results = write_results(results, out)
        shutil.rmtree(parts, ignore_errors=True)
    accelerator.end_training()
    return results if main_process else {}
