"""What is each part of tqdm worth? Models trained without it, from the same seeds, tested where they never were."""

import sys

from .commands import start

if __name__ == "__main__":
    sys.exit(start("ablate"))


import dataclasses
import io
import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tqdm_seg.train import train

from .data.audit import make_checks, read_shards, verdict
from .data.class_vectors import class_words, read_class_vectors
from .data.files import check_out_folder, claim_folder, cut, example, read_json, write_file, write_json
from .data.frames import FrameDataset
from .data.shards import check_same_labels
from .data.sources.folder import prepare_folder
from .deploy.folder import load_model, save_model_folder
from .evaluation.baselines import BASELINES, Baselines, file_name, score_baselines
from .evaluation.counts import read_table, write_table
from .evaluation.evaluate import evaluate
from .evaluation.groups import flatten
from .evaluation.options import SetSource, parse_set
from .evaluation.protocol import Protocol
from .evaluation.sets import EvaluationSet, default_split
from .evaluation.statistics import RESAMPLES
from .program import takes
from .reports.runs import ABLATION, FRAME_FOLDER, read_ablation
from .reports.table import as_markdown, make_table
from .training.build import build_model, check_sizes, open_data
from .training.options import HELD_BACK, RANDOM_TEXTS, REAL_TEXTS, VARIANTS, AblateOptions, TrainOptions
from .training.sets import FrameSets

# Options that may change from one start to the next: they add runs, or decide where these lie.
_FREE = {
    "out", "resume", "dry_run", "doctor", "workers", "log_every", "save_every_steps", "keep", "license", "data",
    "eval_data", "compile", "channels_last", "gradient_checkpointing", "seeds", "variants", "test", "min_scenes",
}  # fmt: skip
# Stamped frames this near in time are named by the audit; so are images that differ in this many of 64 bits.
_MINUTES, _BITS = 10, 4


class TestSet(NamedTuple):
    """A set to test on: its frames, what names it to `evaluate`, and whether it has other classes than the training."""

    frames: FrameDataset
    argument: str
    renamed: bool = False


@takes(AblateOptions)
def ablate(options: AblateOptions) -> dict[str, Any]:
    """Trains and tests what is missing, writes and prints the table; returns its figures, {} when it was stopped."""
    training, held_back = open_data(TrainOptions(**options.of_run()))
    sets = {HELD_BACK: TestSet(held_back, f"{HELD_BACK}={held_back.folder}:{held_back.split}")}
    sets |= open_tests(options, training.classes)
    check_same_labels(training.manifests + [test.frames.index.manifest for test in sets.values() if not test.renamed])
    if options.dry_run:
        return print_runs(options, sets)
    plan = make_plan(options, training, sets)
    check_plan(options.out, plan)
    check_models(options, training.classes, held_back)
    claim_folder(options.out, "ablate")
    write_json(options.out / "plan.json", plan)
    if options.test is None:
        sets["unseen"] = prepare_unseen(options.out)
    for name, seed in all_runs(options):
        folder = options.out / "runs" / f"{name}_{seed}"
        run = run_options(options, name, out=folder, seed=seed, resume=True)
        if not (folder / "results.json").is_file() and not train(**run):
            return {}  # stopped by SIGTERM, which it says
        for of_set, test in sets.items():
            test_run(options, folder, of_set, test)
    parts = [part.frames for part in training.sets]
    add_baselines(options, parts, sets)
    return write_figures(options, parts, sets)


def all_runs(options: AblateOptions) -> Iterator[tuple[str, int]]:
    """Variant and seed of every run, seed by seed: a stop leaves whole comparisons."""
    return ((name, seed) for seed in options.seeds for name in options.variants)


# -- what is asked for ----------------------------------------------------------------------------------


def open_tests(options: AblateOptions, classes: list[str]) -> dict[str, TestSet]:
    """The sets of --test; raises ValueError or OSError for what is no prepared dataset.

    Other classes than the training's need a model that takes new names: class vectors, and the head that compares.
    """
    found = {}
    for argument in options.test or ():
        source: SetSource = parse_set(argument)
        frames = FrameDataset(source.folder, source.split or default_split(source.folder))
        renamed = frames.classes != classes
        if renamed and not takes_new_names(options, "full"):
            raise ValueError(
                f"--test {source.name} has the classes {cut(', '.join(frames.classes))}, the training "
                f"{cut(', '.join(classes))}; prepare both alike, or give --class-vectors and --class-head cosine"
            )
        found[source.name] = TestSet(frames, argument, renamed)
    return found


def takes_new_names(options: AblateOptions, variant: str) -> bool:
    """Whether models of a variant take class names that they were not trained for."""
    fields = options.of_run(**VARIANTS[variant].changes)
    return fields["class_head"] == "cosine" and fields["class_vectors"] is not None


def prepare_unseen(out: Path) -> TestSet:
    """The five dashcam frames, prepared; shown at the side that the quick start trains at."""
    comma, folder = example("comma10k"), out / "comma10k"
    prepare_folder(root=comma / "images", masks=comma / "masks", out=folder, class_file=comma / "classes.csv")
    return TestSet(FrameDataset(str(folder), "test"), f"unseen={folder}:test@224x448")


def run_options(options: AblateOptions, variant: str, **changes: Any) -> dict[str, Any]:
    """The options of one training."""
    fields = options.of_run(overlays=0, tracker="none", **VARIANTS[variant].changes, **changes)
    if fields["class_vectors"] == RANDOM_TEXTS:
        fields["class_vectors"] = str(random_texts(options))
    return fields


def random_texts(options: AblateOptions) -> Path:
    """A table of random class texts of the names, and the width, of the real one; written once."""
    path, real = options.out / "random_texts.npz", read_class_vectors(options.class_vectors or REAL_TEXTS)
    if not path.is_file():
        vectors = np.random.default_rng(0).standard_normal(real.vectors.shape).astype(np.float32)
        content = io.BytesIO()
        about = {"model": "none", "source": "random numbers", "licence": "CC0-1.0"}
        np.savez(content, names=np.array(real.about["names"]), vectors=vectors, **about)
        write_file(path, content.getvalue())
    return path


def make_plan(options: AblateOptions, training: FrameSets, sets: dict[str, TestSet]) -> dict[str, Any]:
    """All that the runs depend on, ready for JSON."""
    fields = {name: value for name, value in dataclasses.asdict(options).items() if name not in _FREE}
    contents = {"training": [manifest["index_sha256"] for manifest in training.manifests]}
    contents |= {name: test.frames.identity for name, test in sets.items()}
    return json.loads(json.dumps({"options": fields, "data": contents}, default=str))


def check_plan(out: Path, plan: dict[str, Any]) -> None:
    """Raises ValueError when the folder holds an ablation with other options or data; further sets are welcome."""
    check_out_folder(out, "ablate")
    if not (out / "plan.json").is_file():
        return
    before, now = (flatten(content) for content in (read_json(out / "plan.json", fix="choose another --out"), plan))
    changed = [name for name in before if name in now and before[name] != now[name]]
    if changed:
        words = "; ".join(f"{name} was {before[name]}, now {now[name]}" for name in changed[:3])
        raise ValueError(f"{out} holds another ablation ({words}); choose another --out")


def check_models(options: AblateOptions, classes: list[str], held_back: FrameDataset) -> None:
    """Raises ValueError or OSError for a start model, class texts or sizes of which no run can be made."""
    for name in options.variants:
        fields = options.of_run(**VARIANTS[name].changes)
        if fields["class_vectors"] == RANDOM_TEXTS:
            fields["class_vectors"] = options.class_vectors or REAL_TEXTS
        run = TrainOptions(**fields)
        check_sizes(run, *build_model(run, classes), held_back)


def print_runs(options: AblateOptions, sets: dict[str, TestSet]) -> dict[str, Any]:
    """What --dry-run says: the runs, the sets, and the plan of the first training. Writes nothing."""
    runs = [f"{name}_{seed}" for name, seed in all_runs(options)]
    print(f"{len(runs)} runs of {options.steps} steps: {', '.join(runs)}")
    for name, test in sets.items():
        print(f"test set {name}: {len(test.frames)} frames of {test.frames.folder}, split {test.frames.split}")
    train(**options.of_run(**VARIANTS[options.variants[0]].changes, seed=options.seeds[0], tracker="none"))
    return {}


# -- testing --------------------------------------------------------------------------------------------


def test_run(options: AblateOptions, folder: Path, name: str, test: TestSet) -> None:
    """Writes the per-frame table of a run on a set, unless there is one; what `evaluate` prints goes into the run.

    A model that does not take the names of the set is not tested on it.
    """
    path = options.out / FRAME_FOLDER / name / f"{folder.name}.parquet"
    if path.is_file() or (test.renamed and not takes_new_names(options, folder.name.rpartition("_")[0])):
        return
    out, model = folder / "test" / name, chosen_model(options, folder)
    if test.renamed:
        model = renamed_model(model, folder / "test" / f"{name}_model", test.frames.classes)
    with redirect_stdout(io.StringIO()) as text:
        evaluate(model=str(model), data=(test.argument,), out=out, workers=options.workers)
    write_file(out.with_suffix(".md"), text.getvalue().encode())
    write_table(path, read_table(out / f"{name}.parquet"))


def chosen_model(options: AblateOptions, folder: Path) -> Path:
    """The model of a run that is tested: the best by the held-back part, where it was evaluated, else the last."""
    return folder / ("best" if options.eval_every_steps else "model")


def renamed_model(source: Path, out: Path, classes: list[str]) -> Path:
    """The folder of a model with another class list."""
    model, processor = load_model(source)
    model.set_classes(dict(enumerate(classes)))
    save_model_folder(model, processor, out, {})
    return out


def add_baselines(options: AblateOptions, training: list[FrameDataset], sets: dict[str, TestSet]) -> None:
    """Writes the per-frame tables of the baselines, under the protocol of the models, where any is missing."""
    folder = options.out / FRAME_FOLDER
    missing = [
        name for name in sets if not all((folder / name / f"{file_name(b)}.parquet").is_file() for b in BASELINES)
    ]
    if not missing:
        return
    fitted = Baselines.fit(training, options.workers)
    for name in missing:
        model = read_table(next((folder / name).glob("*_[0-9]*.parquet")))
        chosen = EvaluationSet(name, sets[name].frames, Protocol())
        for baseline, counts in score_baselines(fitted, chosen, options.workers, class_words()).items():
            write_table(folder / name / f"{file_name(baseline)}.parquet", replace(model, counts=counts))


# -- the table ------------------------------------------------------------------------------------------


def write_figures(options: AblateOptions, training: list[FrameDataset], sets: dict[str, TestSet]) -> dict[str, Any]:
    """ablation.json and ablation.md from the per-frame tables; prints the latter, returns what the former holds."""
    facts: dict[str, Any] = {
        "variants": {name: VARIANTS[name].label for name in options.variants},
        "seeds": list(options.seeds), "sets": list(sets),
        "steps": {f"{name}_{seed}": run_steps(options, name, seed) for name, seed in all_runs(options)},
        "audit": audit_pairs(training, sets),
    }  # fmt: skip
    facts["notes"] = [training_text(options, training, facts["steps"]), *audit_text(facts["audit"])]
    write_json(options.out / ABLATION, facts)
    figures = make_table(read_ablation(options.out), options.min_scenes, RESAMPLES, 0) | {"notes": facts["notes"]}
    write_json(options.out / ABLATION, facts | {"figures": figures})
    write_file(options.out / "ablation.md", as_markdown(figures).encode())
    print(as_markdown(figures))
    return facts | {"figures": figures}


def run_steps(options: AblateOptions, name: str, seed: int) -> int:
    """After how many steps the tested model of a run was taken."""
    if not options.eval_every_steps:
        return options.steps
    folder = chosen_model(options, options.out / "runs" / f"{name}_{seed}")
    return read_json(folder / "results.json", {"step": int})["step"]


def training_text(options: AblateOptions, training: list[FrameDataset], steps: dict[str, int]) -> str:
    """On what and how the models were trained, and what chose their steps."""
    every = options.eval_every_steps
    chosen = (
        f"the held-back part chose among every {every}: {', '.join(f'{run} {n}' for run, n in steps.items())}"
        if every else "the last model counts, no set chose it"
    )  # fmt: skip
    data = ", ".join(
        f"{frames.index.manifest['dataset']}, split {frames.split} ({len(frames)} frames)" for frames in training
    )
    images, seeds = options.batch_size * options.accumulation, ", ".join(map(str, options.seeds))
    return (
        f"Trained on {data}, from {options.model}: {options.steps} steps of {images} images, crop {options.crop}, rate "
        f"{options.lr:g}; seeds {seeds}. Steps: {chosen}. Each of the {len(steps)} runs was tested once on every set."
    )


def audit_pairs(training: list[FrameDataset], sets: dict[str, TestSet]) -> dict[str, str]:
    """{"training, rugd": what `audit` finds in both}: of every pair of sets."""
    frames = {f"training {n}" if n else "training": part for n, part in enumerate(training)}
    frames |= {name: test.frames for name, test in sets.items()}
    read = {name: read_shards(name, found.folder, found.split) for name, found in frames.items()}
    found = {}
    for first, second in combinations(read, 2):
        results, problems = make_checks(read[first], read[second], _MINUTES, _BITS)
        unread = f"; {len(problems)} images could not be read" if problems else ""
        found[f"{first}, {second}"] = verdict(results) + unread
    return found


def audit_text(found: dict[str, str]) -> list[str]:
    """The verdicts of the audit, one sentence per different one."""
    by_verdict: dict[str, list[str]] = {}
    for pair, text in found.items():
        by_verdict.setdefault(text, []).append(pair.replace(", ", " and "))
    return [f"Audit of {'; '.join(pairs)}: {text}." for text, pairs in by_verdict.items()]
