"""Evaluate a model on prepared datasets: mIoU and all that is behind it, with the protocol beside every figure.

    python evaluate_tqdm.py MODEL --data cityscapes=DATA/cityscapes bdd100k=DATA/bdd100k:validation --protocol published
    torchrun --nproc_per_node 2 evaluate_tqdm.py MODEL --data orfd=DATA/orfd:test --offnet --attributes scenes.csv

    OUT/results.json      figures of all sets, groups and confusion matrices, with protocols and the model's identity
    OUT/NAME.parquet      pixel counts of every frame (tables_tqdm.py): all figures follow from it; for compare_runs.py
    OUT/NAME_groups.csv   figures by scene and attribute
    OUT/plan.json         what was asked for

Stopped at any moment, the same command goes on with the frames that are left, with any number of processes. MODEL is
run by the code of this checkout, never by its own. Exit status: 0 evaluated, 1 bad input, 2 unknown option.

Letters: N frames, K classes, H, W image, h, w truth.
"""

import argparse
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.utils import logging

from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

from ..data.files import run, write_whole
from ..data.frames import Frame
from ..data.label_maps import IGNORE_INDEX
from ..deploy.folder import identity, load_model, model_folder
from ..deploy.predict import set_windows
from ..deploy.speed import ready_to_predict, use_huge_pages
from .counts import FrameTable, read_table, write_table
from .figures import closing_lines, group_csv, mean_results, set_lines, set_results
from .groups import flattened, read_attributes
from .metrics import confusion_matrix, scores
from .partial_counts import append_batch, new_part, read_scored
from .protocol import PUBLISHED_SCALES, model_inference, predict, protocol
from .sets import (
    EvaluationSet,
    Sample,
    Samples,
    checked_box,
    frame_attributes,
    open_sets,
    refuse_other_classes,
)

# -- for other programs ---------------------------------------------------------------------------------


def predict_frame(
    model: TqdmForSemanticSegmentation, processor: TqdmImageProcessor, frame: Frame
) -> tuple[Tensor, tuple[int, int]]:
    """Class ids (h, w) int64 at the size of the labels, and height and width of the image that the model was given."""
    inference = model_inference(processor)
    views = inference.views(frame.image, processor)
    ids = predict(model, processor, views, frame.labels.shape, inference)
    return ids.long(), tuple(views[0].shape[-2:])


def score_frames(
    model: TqdmForSemanticSegmentation,
    processor: TqdmImageProcessor,
    frames: Iterable[Frame],
    label_map: dict[str, str],
    accelerator: Accelerator,
) -> dict[str, object]:
    """All of `metrics_tqdm.scores` pooled over the frames, with the protocol that produced them.

    frames: the part of the set that this process shall score; counts are summed over processes. label_map: its name and
    policy, from the manifest of the dataset. The model comes back in the mode, training or not, that it was in.
    """
    training = model.training
    model.eval()
    num_classes = model.config.num_labels
    matrix = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64, device=model.device)
    sizes: Counter[tuple[int, int]] = Counter()
    with model.texts_kept():
        for frame in frames:
            with accelerator.autocast():
                prediction, _ = predict_frame(model, processor, frame)
            truth = torch.tensor(frame.labels, device=prediction.device)
            matrix += confusion_matrix(prediction, truth, num_classes, IGNORE_INDEX)
            sizes[frame.labels.shape] += 1
    model.train(training)

    matrix = accelerator.reduce(matrix, "sum")
    sizes = sum(gather_object([sizes]), Counter())
    precision = {"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    return {
        **scores(matrix.cpu(), model.config.class_names),
        "protocol": protocol(model.config, model_inference(processor), label_map, sizes, precision),
    }


# -- the program: what is asked for ---------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="model folder, or name of a repository on the Hugging Face Hub")
    add(
        "--data", required=True, nargs="+", metavar="NAME=PATH",
        help="prepared datasets, folders or URLs, under the names of their results; PATH:SPLIT for another split than "
        "validation (or test, if there is none), PATH@1024x2048 for a box of its own",
    )  # fmt: skip
    add("--out", type=Path, default=Path("runs/evaluation"), metavar="DIR", help="for the results (%(default)s)")
    inference_options(parser.add_argument_group("protocol"))
    add = parser.add_argument_group("output").add_argument
    add("--attributes", type=Path, metavar="FILE", help="CSV: scene and what to group its frames by")
    add("--by", nargs="+", metavar="NAME", help="its columns to group by (default: those of weather, light, road)")
    add = parser.add_argument_group("speed").add_argument
    add("--workers", type=int, default=2, metavar="N", help="loader processes per process (default: %(default)s)")
    add("--save-every", type=int, default=16, metavar="N", help="frames that a kill can cost at most (%(default)s)")
    return parser


def inference_options(group: argparse._ArgumentGroup) -> None:
    """What figures depend on."""
    add = group.add_argument
    add(
        "--protocol", choices=["model", "own", "published"], default="model",
        help="images as the model's image processor has them, at their own size, or as published: fitted into "
        "1024x2048 (Cityscapes, Mapillary) or 720x1280 (BDD100K), others at their own size (default: %(default)s)",
    )  # fmt: skip
    add("--box", type=int, nargs=2, metavar=("SHORT", "LONG"), help="fit all images into this instead, in pixels")
    windows = group.add_mutually_exclusive_group()
    windows.add_argument("--window", type=int, metavar="PX", help="side of the sliding window (default: the model's)")
    windows.add_argument("--whole", action="store_true", help="no windows, whole images")
    add("--stride", type=int, metavar="PX", help="window to window (default: the model's; with --window 2/3 of it)")
    add("--window-batch", type=int, metavar="N", help="windows at once, few save memory (default: the model's)")
    add("--aug-test", action="store_true", help="six scales from 0.5 to 1.75, mirrored too, averaged as published")
    truth = group.add_mutually_exclusive_group()
    truth.add_argument(
        "--full-res", dest="truth", action="store_const", const="own", default="own",
        help="hold predictions against the truth at its own size (default)",
    )  # fmt: skip
    truth.add_argument(
        "--offnet", dest="truth", action="store_const", const="offnet",
        help="against the truth as OFF-Net keeps it: shrunk to 320x176 and enlarged again",
    )  # fmt: skip
    add(
        "--precision", choices=["float32", "bf16", "fast-float32", "fast-bfloat16", "fast-int8"], default="float32",
        help="of the model; bf16: autocast, as in train.py; fast-...: as predict.py computes, layers folded, in "
        "that precision (default: %(default)s)",
    )  # fmt: skip


@dataclass(frozen=True)
class Job:
    """An evaluation that is known to be possible. plan: all that its counts depend on, ready for JSON."""

    model: TqdmForSemanticSegmentation
    processor: TqdmImageProcessor
    sets: list[EvaluationSet]
    attributes: dict[str, dict[str, list[str]]]
    plan: dict[str, Any]


def open_job(args: argparse.Namespace) -> Job:
    """Model and data of the command line; raises ValueError or OSError for all that cannot be evaluated."""
    if args.by and not args.attributes:
        raise ValueError("--by names columns of --attributes; give that file, too")
    if args.workers < 0 or args.save_every < 1:
        raise ValueError(f"--workers {args.workers} must be 0 or more, --save-every {args.save_every} at least 1")
    folder = model_folder(args.model)
    model, processor = load_model(folder)
    set_windows(model, 0 if args.whole else args.window, args.stride, args.window_batch)
    inference = replace(model_inference(processor), truth=args.truth)
    if args.aug_test:
        inference = replace(inference, scales=PUBLISHED_SCALES, flip=True, softmax_views=True)
    sets = open_sets(args.data, inference, args.protocol, checked_box(*args.box) if args.box else None)
    for chosen in sets:
        refuse_other_classes(model.config.class_names, chosen)
    attributes = {chosen.name: {} for chosen in sets}
    if args.attributes:
        attributes = attributes_of(sets, args.attributes, args.by)
    planned = {}
    for chosen in sets:
        facts = chosen.facts
        asked = protocol(model.config, chosen.inference, chosen.frames.label_map, chosen.sizes, args.precision)
        data = {name: facts[name] for name in ("dataset", "split")}
        planned[chosen.name] = {"protocol": {"data": data, **asked}, "index_sha256": facts["index_sha256"]}
    plan = {"model": identity(folder), "window_batch": model.config.window_batch_size, "sets": planned}
    return Job(model, processor, sets, attributes, json.loads(json.dumps(plan)))


def attributes_of(sets: list[EvaluationSet], path: Path, by: list[str] | None) -> dict[str, dict[str, list[str]]]:
    """{set: {attribute: a value per frame}}; raises ValueError if the file knows no scene of any set."""
    of_scene = read_attributes(path)
    found = {chosen.name: frame_attributes(chosen.frames.scenes, of_scene, by) for chosen in sets}
    found = {name: {by: values for by, values in of_set.items() if any(values)} for name, of_set in found.items()}
    if not any(found.values()):
        raise ValueError(f"{path} has nothing to group by for any scene of the sets; compare the names")
    return found


# -- the program: doing it ------------------------------------------------------------------------------


def refuse_other_plan(out: Path, plan: dict[str, Any]) -> None:
    """Raises ValueError when the folder holds an evaluation of something else, or no evaluation but other files."""
    path = out / "plan.json"
    if not path.is_file():
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} holds other files and no evaluation; choose another --out")
        return
    before, now = (flattened(content) for content in (json.loads(path.read_text(encoding="utf-8")), plan))
    changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    if changed:
        words = "; ".join(f"{name} was {before.get(name)}, now {now.get(name)}" for name in changed[:3])
        raise ValueError(f"{out} holds another evaluation ({words}); choose another --out, or delete it")


def score_set(
    job: Job, chosen: EvaluationSet, folder: Path, accelerator: Accelerator, args: argparse.Namespace
) -> None:
    """Scores this process's share of the frames that are not scored yet, and appends their counts to its part."""
    process, processes, device = accelerator.process_index, accelerator.num_processes, job.model.device
    done, part = read_scored(folder, len(chosen.frames), len(chosen.frames.classes)), new_part(folder, process)
    refuse_other_truth(chosen, done.rows, done.counts)
    accelerator.wait_for_everyone()  # all have seen the same frames done
    rows = np.setdiff1d(np.arange(len(chosen.frames)), done.rows)[process::processes].tolist()
    loader = DataLoader(
        Samples(chosen, job.processor), batch_size=None, sampler=rows, num_workers=min(args.workers, len(rows)),
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    scored: list[tuple[int, Tensor]] = []
    bar = tqdm(loader, chosen.name, len(rows), unit="frame", disable=not accelerator.is_main_process)
    for number, sample in enumerate(bar, 1):
        scored.append((sample.row, frame_counts(job, chosen, sample, args.precision)))
        if number % args.save_every == 0 or number == len(rows):
            numbers, counts = (np.array([row for row, _ in scored]), torch.stack([c for _, c in scored]).cpu().numpy())
            refuse_other_truth(chosen, numbers, counts)
            append_batch(part, numbers, counts)
            scored.clear()


def frame_counts(job: Job, chosen: EvaluationSet, sample: Sample, precision: str) -> Tensor:
    """Counts (K, K + 1) of one frame on the model's device, which nothing here waits for."""
    model, device = job.model, job.model.device
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        ids = predict(model, job.processor, sample.views, sample.truth.shape, chosen.inference)
    truth = sample.truth.to(device, non_blocking=True)
    return confusion_matrix(ids, truth, model.config.num_labels, IGNORE_INDEX, check=False)


def refuse_other_truth(chosen: EvaluationSet, rows: np.ndarray, counts: np.ndarray) -> None:
    """Raises ValueError unless the true pixels in counts (N, K, K + 1) of frames `rows` (N,) are those of the index."""
    if chosen.inference.truth != "own":
        return  # shrinking it changes the counts
    wrong = (counts.sum(2) != chosen.frames.index.class_pixels[rows]).any(1)
    if wrong.any():
        key = chosen.frames.keys[rows[wrong.argmax()]]
        raise ValueError(
            f"the truth of {key} in {chosen.frames.folder} has other pixels than its index counts; run check_shards.py"
        )


def frame_table(job: Job, chosen: EvaluationSet, folder: Path) -> FrameTable:
    """The counts of every frame, in the order of the index; raises ValueError if any is missing."""
    frames = chosen.frames
    scored = read_scored(folder, len(frames), len(frames.classes))
    if len(scored.rows) != len(frames):
        raise ValueError(f"{folder} has {len(scored.rows)} of {len(frames)} frames; can all processes write there?")
    return FrameTable(
        frames=frames.keys,
        scenes=[scene or "(no scene)" for scene in frames.scenes] if any(frames.scenes) else frames.scenes,
        attributes={},
        counts=scored.counts,
        classes=frames.classes,
        protocol=job.plan["sets"][chosen.name]["protocol"],
    )


def write_set(job: Job, chosen: EvaluationSet, table: FrameTable, out: Path) -> dict[str, Any]:
    """Writes the files of a set, prints its figures; returns its part of results.json."""
    table = replace(table, attributes=job.attributes[chosen.name])
    data = {"path": chosen.frames.folder, **chosen.facts}
    results = {**set_results(table), "data": data, "inference": asdict(chosen.inference)}
    write_table(out / f"{chosen.name}.parquet", table)
    write_whole(out / f"{chosen.name}_groups.csv", group_csv(results).encode())
    print(*set_lines(chosen.name, results), "", sep="\n", flush=True)
    return results


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Evaluates, prints and writes; returns what results.json holds, {} in other processes than the first."""
    use_huge_pages()
    args = make_parser().parse_args(argv)
    logging.disable_progress_bar()  # of loaded files, which would tear the bar of the frames apart
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    main_process, out, parts = accelerator.is_main_process, args.out, args.out / "parts"
    try:
        job = open_job(args)
        refuse_other_plan(out, job.plan)
    except (OSError, ValueError):
        if main_process:
            raise
        sys.exit(1)  # the first process says why
    finished = (out / "results.json").is_file()
    accelerator.wait_for_everyone()  # all have looked for an earlier evaluation
    for chosen in job.sets:
        (parts / chosen.name).mkdir(parents=True, exist_ok=True)
    if main_process:
        write_whole(out / "plan.json", (json.dumps(job.plan, indent=2) + "\n").encode())
    job.model.to(accelerator.device)
    if args.precision.startswith("fast-"):
        precision = args.precision.removeprefix("fast-")
        ready_to_predict(job.model, {"float32": "fp32", "bfloat16": "bf16"}.get(precision, precision))
    else:
        job.model.freeze_text()

    results: dict[str, Any] = {"model": {"path": args.model, **job.plan["model"]}, "sets": {}}
    for chosen in job.sets:
        if not finished:
            score_set(job, chosen, parts / chosen.name, accelerator, args)
            accelerator.wait_for_everyone()
        if main_process:
            path = out / f"{chosen.name}.parquet"
            table = read_table(path) if finished else frame_table(job, chosen, parts / chosen.name)
            results["sets"][chosen.name] = write_set(job, chosen, table, out)
    if main_process:
        if len(results["sets"]) > 1:
            results["mean"] = mean_results(results["sets"])
        results = json.loads(json.dumps(results))
        write_whole(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
        print(*closing_lines(results), sep="\n", flush=True)
        shutil.rmtree(parts)
    accelerator.end_training()
    return results if main_process else {}


if __name__ == "__main__":
    run(main)
