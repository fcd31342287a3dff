"""The training program on a very small model and 40-pixel images: recipe, exact resume, outputs, clear errors."""

import errno
import gc
import hashlib
import importlib
import io
import json
import shutil
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import micro_model
from PIL import Image
from safetensors.torch import load_file
from shard_helpers import call, photo, prepare, save
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from tqdm_seg.commands import start as start_command
from tqdm_seg.configuration_tqdm import PRESETS
from tqdm_seg.data.audit import FrameSet, NamedFrame
from tqdm_seg.data.frames import FrameDataset, PlainRows, frame_loader
from tqdm_seg.evaluation.evaluate import predict_frame, score_frames
from tqdm_seg.evaluation.metrics import confusion_matrix, mean_iou
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.program import parse
from tqdm_seg.training import checkpoint as checkpoint_tqdm
from tqdm_seg.training import options as options_of_training
from tqdm_seg.training.batches import MixedPlan, RareClassSampling, TrainPlan, TrainSamples, check_minimum
from tqdm_seg.training.build import build_model
from tqdm_seg.training.doctor import Survey, alarms, leak_lines
from tqdm_seg.training.log import RecentLosses, append_line
from tqdm_seg.training.optimisation import learning_rate
from tqdm_seg.training.options import AblateOptions, TrainOptions
from tqdm_seg.training.reporter import Reporter
from tqdm_seg.training.sets import FrameSets, TrainSet

program = importlib.import_module("tqdm_seg.train")  # `tqdm_seg.train` is the function
CLASSES = ["non-traversable", "traversable"]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A model folder to start from, with everything random that a real model has in training."""
    folder = tmp_path_factory.mktemp("start")
    micro_model(
        id2label=dict(enumerate(CLASSES)), context_decoder_dropout=0.1, vision_config={"drop_path_rate": 0.2}
    ).save_pretrained(folder)
    TqdmImageProcessor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A prepared dataset: four training, three held-back frames, bright below a line and dark above it."""
    root = tmp_path_factory.mktemp("raw")
    rng = np.random.default_rng(0)
    for split, count in (("training", 4), ("validation", 3)):
        for kind in ("image_data", "gt_image"):
            (root / split / f"x_{split}" / kind).mkdir(parents=True)
        for i in range(count):
            labels = np.zeros((40, 40), np.uint8)
            labels[15 + 3 * i :] = 255
            image = (labels[..., None] // 2 + rng.integers(0, 90, (40, 40, 3))).astype(np.uint8)
            Image.fromarray(image).save(root / split / f"x_{split}" / "image_data" / f"{i}.png")
            Image.fromarray(labels).save(root / split / f"x_{split}" / "gt_image" / f"{i}_fillcolor.png")
    out = tmp_path_factory.mktemp("data") / "orfd"
    prepare("orfd", root, out)
    return out


@pytest.fixture
def arguments(start, data):
    """Command line of a run of six steps; more options can be added."""

    def make(out: Path, *more: str) -> list[str]:
        fixed = f"--model {start} --out {out} --steps 6 --batch-size 2 --crop 32 --warmup-steps 2"
        fixed += " --min-pixels 50 --tracker none" + f" --data {data}" * ("--data" not in more)
        return [*fixed.split(), "--log-every", "1", "--save-every-steps", "2", "--overlays", "2", "--lr", "1e-3", *more]

    return make


def log_of(out: Path) -> list[dict]:
    """The log lines without speed and memory, which differ from run to run."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    varying = ("samples_per_second", "memory_gb", "seconds_left")
    return [{name: value for name, value in line.items() if name not in varying} for line in lines]


# -- options --------------------------------------------------------------------------------------------------------


def test_defaults_are_the_quick_start_on_the_frames_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = TrainOptions()
    assert (options.model, options.out) == ("tiny", Path("runs/quickstart"))
    assert len(FrameDataset(options.train_sources[0].folder, options.train_split)) == 56
    assert TrainOptions(data="one").eval_source == "one" and TrainOptions(data="one", eval_data="2").eval_source == "2"


def test_the_presets_of_the_help_are_those_of_the_model():
    assert tuple(sorted(PRESETS)) == options_of_training.PRESETS


WRONG = (
    "--steps 0", "--lr 0", "--crop -1", "--seed -1", "--warmup-steps -2", "--ema 1", "--push-to-hub a/b/c",
    "--lr nan", 
    "--phase more", "--ema nan", "--temperature nan", "--clip-norm nan", "--textual-weight inf", "--min-lr 1",
    "--eval-size 1024", "--no-index", "--class-names a,b", "--class-names a,,b", "--precision float16",
)  # fmt: skip


@pytest.mark.parametrize("option", WRONG)
def test_impossible_values_are_refused_in_one_line_that_names_the_option(option, capsys):
    with pytest.raises(SystemExit) as ended:
        start_command("train", option.split())
    said = capsys.readouterr().err
    assert ended.value.code == 2 and option.split()[0] in said and said.count("\n") == 1


def test_an_ablation_passes_options_on_and_refuses_those_that_it_sets(capsys):
    options = parse(AblateOptions, "", ["--seeds", "3", "4", "--steps", "7"])
    run = TrainOptions(**options.of_run(seed=3, textual_weight=0.0))
    assert options.seeds == (3, 4) and (run.seed, run.steps, run.textual_weight, run.crop) == (3, 7, 0, 128)
    wrong = ("--seed 3", "--random-queries", "--seeds 1 1", "--variants none", "--test held_back=x")
    for option in wrong:
        with pytest.raises(SystemExit):
            start_command("ablate", option.split())
        assert option.split()[0] in capsys.readouterr().err


# -- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(start, data, tmp_path_factory):
    """Folder and results of an uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    fixed = f"--model {start} --data {data} --out {out} --steps 6 --batch-size 2 --crop 32 --warmup-steps 2 --lr 1e-3"
    more = "--log-every 1 --save-every-steps 2 --eval-every-steps 3 --overlays 2 --min-pixels 50 --tracker none"
    return out, call("train", *fixed.split(), *more.split())


def same_checkpoints(one: Path, other: Path, step: int) -> bool:
    """Whether all files of two runs' checkpoints of a step are the same to the byte."""
    names = sorted(path.name for path in (one / "checkpoints" / f"step_{step:07d}").iterdir())
    assert {"weights.safetensors", "optimizer.safetensors", "state.json"} <= set(names)
    paths = [[out / "checkpoints" / f"step_{step:07d}" / name for out in (one, other)] for name in names]
    return all(first.read_bytes() == second.read_bytes() for first, second in paths)


@pytest.mark.parametrize("interrupted_at", [3, 5])
def test_resumed_run_ends_with_the_very_same_weights(finished, arguments, tmp_path, monkeypatch, interrupted_at):
    original, read = TrainSamples.__getitem__, []

    def interrupt(self, draw):
        if len(read) == 2 * interrupted_at:  # two images a step
            raise KeyboardInterrupt
        read.append(draw)
        return original(self, draw)

    monkeypatch.setattr(TrainSamples, "__getitem__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        call("train", *arguments(tmp_path / "run", "--eval-every-steps", "3"))
    assert log_of(tmp_path / "run")[-1]["step"] == interrupted_at
    monkeypatch.undo()
    torch.manual_seed(12345)  # the state of the global generator must not matter
    results = call("train", *arguments(tmp_path / "run", "--eval-every-steps", "3", "--resume"))

    whole, expected = finished
    assert results == expected and log_of(tmp_path / "run") == log_of(whole)
    one, other = (load_file(out / "model" / "model.safetensors") for out in (tmp_path / "run", whole))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert same_checkpoints(tmp_path / "run", whole, 6)


def test_training_changes_what_it_should_and_nothing_else(finished, start):
    before, after = (load_file(folder / "model.safetensors") for folder in (start, finished[0] / "model"))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert all(name in same for name in before if ".text_tower." in name)
    assert not any(".prompt" in name or ".gamma" in name or ".patch_embed" in name for name in same)
    assert not any("reference" in name for name in after)


def test_accumulated_batches_are_one_step(arguments, tmp_path):
    call("train", *arguments(tmp_path / "run", "--accumulation", "2", "--steps", "2"))
    assert [line["step"] for line in log_of(tmp_path / "run") if "loss" in line] == [1, 2]
    moments = load_file(tmp_path / "run" / "checkpoints" / "step_0000002" / "optimizer.safetensors")
    assert {int(value) for name, value in moments.items() if name.endswith("|step")} == {2}


def test_only_the_newest_checkpoints_stay(finished):
    assert sorted(path.name for path in (finished[0] / "checkpoints").iterdir()) == ["step_0000004", "step_0000006"]


def test_a_full_disk_leaves_the_last_checkpoint(arguments, tmp_path, monkeypatch):
    original, calls = checkpoint_tqdm.save_file, []

    def fail_at_second(tensors, path):
        calls.append(path)
        if len(calls) == 3:  # two files a checkpoint
            path.write_bytes(b"half")
            raise OSError("No space left on device")
        original(tensors, path)

    monkeypatch.setattr(checkpoint_tqdm, "save_file", fail_at_second)
    with pytest.raises(OSError, match="No space left"):
        call("train", *arguments(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_0000002"]
    monkeypatch.undo()
    call("train", *arguments(tmp_path / "run", "--resume"))
    assert [line["step"] for line in log_of(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_torn_line_of_the_log_is_left_out_with_a_word(finished, arguments, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_0000006")
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')
    call("train", *arguments(tmp_path / "run", "--eval-every-steps", "3", "--resume"))
    assert "log.jsonl: 1 torn line" in capsys.readouterr().out
    assert log_of(tmp_path / "run") == log_of(finished[0]) and same_checkpoints(tmp_path / "run", finished[0], 6)


def test_a_line_that_does_not_fit_leaves_the_log_as_before(tmp_path, monkeypatch):
    append_line(tmp_path / "log", "one")

    class Full(io.FileIO):
        def write(self, data):
            if len(data) < 4:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:2])

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(Path, "open", lambda self, *_, **__: Full(self, "ab"))
        append_line(tmp_path / "log", "three")
    assert (tmp_path / "log").read_bytes() == b"one\n"


@pytest.mark.parametrize("damage", ["weights.safetensors", "state.json", "optimizer.safetensors"])
def test_a_damaged_checkpoint_means_the_one_before_it(finished, arguments, tmp_path, capsys, damage):
    shutil.copytree(finished[0], tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step_0000006" / damage
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    path.write_bytes(content if damage != "state.json" else content[:30])
    call("train", *arguments(tmp_path / "run", "--eval-every-steps", "3", "--resume"))
    said = capsys.readouterr().out
    assert "step_0000006 is damaged" in said and "before" in said
    assert same_checkpoints(tmp_path / "run", finished[0], 6) and log_of(tmp_path / "run") == log_of(finished[0])


def test_checkpoints_that_a_kill_left_are_pruned_at_the_start(finished, arguments, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder / "step_0000004", folder / "step_0000002")
    shutil.copytree(folder / "step_0000004", folder / "step_0000001")
    (folder / "step_0000001" / "state.json").unlink()  # killed as it was deleted
    call("train", *arguments(tmp_path / "run", "--eval-every-steps", "3", "--resume"))
    assert sorted(path.name for path in folder.iterdir()) == ["step_0000004", "step_0000006"]


def test_what_systems_leave_in_folders_ends_no_run(finished, arguments, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    for part in ("model", "best", "overlays", "checkpoints", "."):
        for name in (".DS_Store", "._x", "Thumbs.db"):
            (tmp_path / "run" / part / name).write_bytes(b"left by a system")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_0000006")
    call("train", *arguments(tmp_path / "run", "--eval-every-steps", "3", "--resume"))
    assert log_of(tmp_path / "run") == log_of(finished[0])


@pytest.mark.parametrize("place", ["overlays/thesis.txt", "model/thesis.txt", "best/thesis.txt"])
def test_what_is_not_of_the_run_is_never_replaced(finished, arguments, tmp_path, place):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / place).write_text("years of work")
    with pytest.raises(FileExistsError, match="thesis"):
        call("train", *arguments(tmp_path / "run", "--eval-every-steps", "3", "--resume"))
    assert (tmp_path / "run" / place).read_text() == "years of work"


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_a_folder_of_others_is_no_run(arguments, tmp_path, more):
    (tmp_path / "run" / "overlays").mkdir(parents=True)
    (tmp_path / "run" / "overlays" / "holiday.png").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="run"):
        call("train", *arguments(tmp_path / "run", *more))
    assert [path.name for path in (tmp_path / "run").rglob("*.*")] == ["holiday.png"]


def test_a_run_is_known_by_its_content_wherever_it_lies(finished, arguments, start, data, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.copytree(data, tmp_path / "moved")
    shutil.copytree(start, tmp_path / "model")
    moved = (
        "--eval-every-steps",
        "3",
        "--resume",
        "--data",
        str(tmp_path / "moved"),
        "--model",
        str(tmp_path / "model"),
    )
    call("train", *arguments(tmp_path / "run", *moved))
    path = tmp_path / "moved" / "manifest.json"
    index = tmp_path / "moved" / "index.parquet"
    pq.write_table(pq.read_table(index), index, compression="none")  # another index at the same place
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"index_sha256": hashlib.sha256(index.read_bytes()).hexdigest()}))
    with pytest.raises(ValueError, match="data was"):
        call("train", *arguments(tmp_path / "run", *moved))


def test_a_run_goes_on_in_its_precision_only(finished, arguments, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path / "run")
    monkeypatch.setattr(program, "number_format", lambda accelerator: "bf16 autocast")  # as accelerate launch was told
    with pytest.raises(ValueError, match="precision was fp32, now bf16"):
        call("train", *arguments(tmp_path / "run", "--eval-every-steps", "3", "--resume"))


def test_other_versions_are_said(finished, arguments, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "args.json").read_text())
    facts["versions"]["torch"] = "1.0"
    (tmp_path / "run" / "args.json").write_text(json.dumps(facts))
    call("train", *arguments(tmp_path / "run", "--eval-every-steps", "3", "--resume"))
    assert "torch was 1.0" in capsys.readouterr().out


def test_the_last_evaluation_competes_for_the_best_and_the_end_names_the_folder(finished, arguments, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    last = [line["miou"] for line in log_of(out) if "miou" in line][-1]
    for kept, advice in ((last / 2, f"Use {out / 'model'}"), (0.99, "Better, by the same mean: ")):
        path = out / "best" / "results.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"miou": kept, "step": 3}))
        call("train", *arguments(out, "--eval-every-steps", "3", "--resume"))
        assert advice in capsys.readouterr().out
        assert json.loads(path.read_text())["step"] == (6 if kept < last else 3)
        assert [line["step"] for line in log_of(out) if "miou" in line] == [3, 6]


def test_resuming_with_other_options_or_another_model_is_refused(finished, arguments, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    with pytest.raises(ValueError, match="lr was 0.001, now 0.002"):
        call("train", *arguments(tmp_path / "run", "--resume", "--lr", "2e-3"))
    facts = json.loads((tmp_path / "run" / "args.json").read_text())
    (tmp_path / "run" / "args.json").write_text(
        json.dumps(facts | {"identity": facts["identity"] | {"start model": "tiny"}})
    )
    with pytest.raises(ValueError, match="step_0000006.* model"):
        call("train", *arguments(tmp_path / "run", "--resume", "--model", "tiny"))


@pytest.mark.slow
def test_a_named_phase_goes_on_with_other_options(finished, arguments, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    longer = ("--eval-every-steps", "3", "--resume", "--steps", "9", "--lr", "2e-3")
    with pytest.raises(ValueError, match="lr was 0.001.*--phase"):
        call("train", *arguments(out, *longer))
    with pytest.raises(ValueError, match="seed was 0") as refused:
        call("train", *arguments(out, *longer, "--phase", "longer", "--seed", "3"))
    assert "--phase" not in str(refused.value)
    with pytest.raises(ValueError, match="6 steps are done.*--steps above"):
        call("train", *arguments(out, "--resume", "--lr", "2e-3", "--phase", "longer"))
    assert json.loads((out / "args.json").read_text())["steps"] == 6
    call("train", *arguments(out, *longer, "--phase", "longer"))

    lines = log_of(out)
    assert [line for line in lines if "phase" in line] == [{"step": 6, "phase": "longer", "last_step": 9}]
    assert [line["lr_rest"] for line in lines if "loss" in line][6:] == pytest.approx(
        [learning_rate(step, 2e-3, 3, 2, 1e-6) for step in range(3)], rel=1e-9
    )
    facts = json.loads((out / "args.json").read_text())
    assert (facts["steps"], facts["lr"]) == (9, 2e-3)
    assert facts["phases"] == [
        {"name": "first", "first_step": 0, "last_step": 6}, {"name": "longer", "first_step": 6, "last_step": 9},
    ]  # fmt: skip
    assert "first (steps 0 to 6), longer (steps 6 to 9)" in (out / "model" / "README.md").read_text()

    # Killed in the phase, the same command, with or without the name, ends in the same bits.
    before = load_file(out / "model" / "model.safetensors")
    for name in (["--phase", "longer"], []):
        shutil.rmtree(out / "checkpoints" / "step_0000009")
        call("train", *arguments(out, *longer, *name))
        after = load_file(out / "model" / "model.safetensors")
        assert all(torch.equal(before[key], after[key]) for key in before) and log_of(out) == lines
    with pytest.raises(ValueError, match="first .*is over"):
        call("train", *arguments(out, *longer, "--phase", "first"))


def test_results_come_last_so_that_a_run_that_has_them_is_whole(finished, arguments, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Reporter, "drawings", stop)
    with pytest.raises(KeyboardInterrupt):
        call("train", *arguments(tmp_path / "run", "--eval-every-steps", "3", "--resume"))
    assert not (tmp_path / "run" / "results.json").exists()


def test_the_best_model_is_kept_and_loads(finished):
    best = finished[0] / "best"
    results = json.loads((best / "results.json").read_text())
    scored = {line["step"]: line["miou"] for line in log_of(finished[0]) if "miou" in line}
    assert scored[results["step"]] == results["miou"] == max(scored.values())
    assert AutoModelForSemanticSegmentation.from_pretrained(best, trust_remote_code=True).config.num_labels == 2


@pytest.mark.parametrize("folder", ["best", "model"])
def test_evaluate_prints_what_the_training_printed(finished, data, tmp_path, folder):
    stored = json.loads((finished[0] / folder / "results.json").read_text())
    more = ("--data", f"held={data}:validation", "--out", tmp_path / "out", "--workers", "0")
    results = call("evaluate", finished[0] / folder, *more)["sets"]["held"]
    assert results["miou"] == stored["miou"] and results["iou"] == stored["iou"]


def test_log_has_every_loss_rates_and_evaluations(finished):
    lines = log_of(finished[0])
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5, 6]
    terms = {"loss_class", "loss_mask_0", "loss_dice_1", "loss_textual", "loss_visual", "loss_score_map"}
    assert terms < training[0].keys()
    total = sum(value for name, value in training[0].items() if name.startswith("loss_"))
    assert training[0]["loss"] == pytest.approx(total, rel=1e-6)
    assert [line["lr_rest"] for line in training] == pytest.approx(
        [learning_rate(step, 1e-3, 6, 2, 1e-6) for step in range(6)], rel=1e-9
    )
    assert [line["step"] for line in lines if "miou" in line] == [3, 6]


def test_model_folder_loads_as_remote_code_and_scores_as_reported(finished, data):
    out, results = finished
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    processor = AutoImageProcessor.from_pretrained(out / "model", trust_remote_code=True)
    model = AutoModelForSemanticSegmentation.from_pretrained(out / "model", trust_remote_code=True)
    trained = load_file(out / "checkpoints" / "step_0000006" / "weights.safetensors")
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    matrix = 0
    for frame in frame_loader(FrameDataset(str(data), "validation"), 0):
        with torch.no_grad():
            outputs = model(**processor(images=Image.fromarray(frame.image), return_tensors="pt"))
        labels = processor.post_process_semantic_segmentation(outputs, target_sizes=[frame.labels.shape])[0]
        matrix = matrix + confusion_matrix(labels, torch.from_numpy(frame.labels.copy()), 2)
    assert mean_iou(matrix) == results["miou"]


def test_report_names_result_protocol_and_data(finished, data):
    out, results = finished
    protocol = results["protocol"]
    assert protocol["frames"] == 3 and protocol["image_size"] == protocol["ground_truth_size"] == {"40x40": 3}
    # The micro model's windows are smaller than these images.
    assert (protocol["mode"], protocol["window"], protocol["stride"]) == ("slide", 32, 20)
    assert protocol["labels"]["classes"] == dict(enumerate(CLASSES)) and protocol["labels"]["name"] == "orfd/merged"
    card = (out / "model" / "README.md").read_text()
    header = card.split("---")[1].splitlines()
    assert {"library_name: transformers", "pipeline_tag: image-segmentation", "license: apache-2.0"} <= set(header)
    assert f"| **mean over 2 classes** | **{100 * results['miou']:.2f}** |" in card
    assert "No scene is in both parts" in card and str(data) in card
    assert "](example.png)" in card and "with torch.no_grad():" in card
    assert Image.open(out / "model" / "example.png").size[0] > 1000
    overlays = sorted((out / "overlays").glob("*.png"))
    assert len(overlays) == 2 and all(Image.open(path).size[0] > 1000 for path in overlays)
    assert json.loads((out / "args.json").read_text())["crop"] == 32


def test_a_model_can_start_with_other_classes(arguments, start, tmp_path):
    for split in ("train", "val"):
        photo(tmp_path / "images" / split / "a.png", 40, 40)
        save(tmp_path / "masks" / split / "a.png", np.arange(1600).reshape(40, 40) // 534)
    (tmp_path / "classes.txt").write_text("traversable\ncar\ntrain\n")
    shards, names = tmp_path / "shards", tmp_path / "classes.txt"
    prepare("folder", tmp_path / "images", shards, tmp_path / "masks", "--class-file", names)
    more = ("--data", str(shards), "--steps", "1", "--save-every-steps", "0", "--lr", "1e-12", "--min-lr", "1e-13")
    results = call("train", *arguments(tmp_path / "run", *more))
    assert list(results["iou"]) == ["traversable", "car", "train"]
    before, after = (load_file(folder / "model.safetensors") for folder in (start, tmp_path / "run" / "model"))
    reshaped = {name for name in before if before[name].shape != after[name].shape}
    assert {name.split(".")[2] for name in reshaped} == {"text_positions", "query_positions", "class_head"}
    kept = "model.vision_tower.patch_embed.weight"
    torch.testing.assert_close(before[kept], after[kept], atol=1e-9, rtol=0)


# -- options that change what is trained -------------------------------------------------------------------------------


def short(arguments, out: Path, *more: str) -> Path:
    """A run of two steps; returns its folder."""
    call("train", *arguments(out, "--steps", "2", "--overlays", "0", *more))
    return out


def changed(one: Path, other: Path) -> set[str]:
    """Names of the weights in which two model folders differ."""
    before, after = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture(scope="module")
def plain_losses(start, data, tmp_path_factory) -> list[float]:
    """Losses of a run of two steps without further options."""
    out = tmp_path_factory.mktemp("plain") / "run"
    fixed = f"--model {start} --data {data} --out {out} --steps 2 --batch-size 2 --crop 32 --warmup-steps 2 --lr 1e-3"
    more = "--min-pixels 50 --tracker none --log-every 1 --overlays 0"
    call("train", *fixed.split(), *more.split())
    return [line["loss"] for line in log_of(out) if "loss" in line]


def test_a_frozen_tower_stays_and_its_pyramid_learns(arguments, start, tmp_path):
    names = changed(start, short(arguments, tmp_path / "run", "--vision", "frozen") / "model")
    tower = {name for name in names if "vision_tower" in name}
    assert tower and all(".pyramid." in name for name in tower) and any("mask_decoder" in name for name in names)


@pytest.mark.slow
def test_adapters_learn_and_are_merged_into_a_plain_model_folder(arguments, start, tmp_path):
    out = short(arguments, tmp_path / "run", "--vision", "lora", "--lora-rank", "2", "--save-every-steps", "1")
    names = changed(start, out / "model")
    tower = {name for name in names if "vision_tower" in name and ".pyramid." not in name}
    assert tower and all(".blocks." in name and name.endswith("weight") for name in tower)
    weights = load_file(out / "checkpoints" / "step_0000002" / "weights.safetensors")
    name = "model.vision_tower.blocks.0.attention.q_proj"
    low, high = (weights[f"{name}.lora_{part}.default.weight"] for part in "AB")
    merged = weights[f"{name}.base_layer.weight"] + 2 * high @ low
    torch.testing.assert_close(load_file(out / "model" / "model.safetensors")[f"{name}.weight"], merged)
    model = AutoModelForSemanticSegmentation.from_pretrained(out / "model", trust_remote_code=True)
    assert not any("lora" in name for name in model.state_dict())
    shutil.rmtree(out / "checkpoints" / "step_0000002")
    before = (out / "model" / "model.safetensors").read_bytes()
    short(arguments, out, "--vision", "lora", "--lora-rank", "2", "--save-every-steps", "1", "--resume")
    assert (out / "model" / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_averaged_weights_are_the_ones_that_are_saved(arguments, start, tmp_path):
    out = short(arguments, tmp_path / "run", "--ema", "0.75", "--save-every-steps", "1")
    first, second = (load_file(out / "checkpoints" / f"step_000000{step}" / "weights.safetensors") for step in (1, 2))
    saved = load_file(out / "model" / "model.safetensors")
    name = "model.mask_decoder.query_positions"  # the average starts at the first step's weights
    torch.testing.assert_close(saved[name], 0.75 * first[name] + 0.25 * second[name])
    averaged = load_file(out / "checkpoints" / "step_0000002" / "average.safetensors")
    assert all(torch.equal(value, averaged[name]) for name, value in saved.items())
    shutil.rmtree(out / "checkpoints" / "step_0000002")
    short(arguments, out, "--ema", "0.75", "--save-every-steps", "1", "--resume")
    again = load_file(out / "model" / "model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in saved.items())


@pytest.fixture
def fresh_accelerator():
    """One process can have one precision and one compiler only: forgets those of the runs before, and of this one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize(
    "option",
    ["--gradient-checkpointing", "--channels-last", pytest.param("--compile aot_eager", marks=pytest.mark.slow)],
)
def test_ways_to_compute_change_nothing_but_the_last_digits(arguments, plain_losses, tmp_path, option):
    out = short(arguments, tmp_path / "run", *option.split())
    assert [line["loss"] for line in log_of(out) if "loss" in line] == pytest.approx(plain_losses, rel=1e-5)


@pytest.mark.usefixtures("fresh_accelerator")
def test_bf16_stays_near_float32(arguments, plain_losses, tmp_path):
    out = short(arguments, tmp_path / "run", "--precision", "bf16")
    losses = [line["loss"] for line in log_of(out) if "loss" in line]
    assert losses == pytest.approx(plain_losses, rel=0.02) and losses != pytest.approx(plain_losses, rel=1e-6)


@pytest.mark.slow
def test_a_frozen_tower_in_bf16_moves_the_visual_loss_alone(arguments, start, plain_losses, tmp_path):
    first = [log_of(short(arguments, tmp_path / name, "--teacher-precision", name))[0] for name in ("fp32", "bf16")]
    assert first[0]["loss"] == plain_losses[0]
    moved = {name for name in first[0] if name.startswith("loss_") and first[0][name] != first[1][name]}
    assert moved == {"loss_visual"} and first[1]["loss_visual"] == pytest.approx(first[0]["loss_visual"], rel=0.2)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerator")
def test_a_compiled_model_is_one_graph_whatever_the_number_of_masks(arguments, tmp_path, monkeypatch):
    original, masks = program.model_inputs, []

    def fewer(batch, device):
        inputs = original(batch, device)
        inputs["mask_index"] = inputs["mask_index"][len(masks) :].T.contiguous().T  # as nonzero() lays it out
        masks.append(len(inputs["mask_index"]))
        return inputs

    monkeypatch.setattr(program, "model_inputs", fewer)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    short(arguments, tmp_path / "run", "--compile", "eager")
    assert masks[0] > masks[1] and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_published_behaviours_are_options_that_change_the_losses(arguments, plain_losses, tmp_path):
    for option in ("--teacher-drop-path", "--resize whole"):
        out = short(arguments, tmp_path / option.split()[0], *option.split())
        losses = [line["loss"] for line in log_of(out) if "loss" in line]
        assert losses == pytest.approx(plain_losses, rel=0.1) and losses != plain_losses, option


def test_gradients_are_clipped_to_the_norm():
    weight = torch.nn.Linear(2, 2)
    for limit, expected in ((0, 5), (1, 1)):
        weight.weight.grad, weight.bias.grad = torch.tensor([[3.0, 0], [0, 0]]), torch.tensor([0.0, 4])
        assert program.finish_gradients(program.Accelerator(), weight, limit).item() == pytest.approx(5)
        norm = torch.cat([weight.weight.grad.flatten(), weight.bias.grad]).norm()
        assert norm.item() == pytest.approx(expected, rel=1e-4)


def test_parts_of_the_model_can_be_left_out(arguments, start, tmp_path):
    out = short(arguments, tmp_path / "run", "--no-text-attention", "--random-queries", "--textual-weight", "0")
    names = load_file(out / "model" / "model.safetensors").keys()
    assert not any("text_attention" in name or "pixel_decoder.text" in name for name in names)
    line = log_of(out)[0]
    assert line["loss_textual"] == 0 and line["loss_visual"] >= 0
    model = AutoModelForSemanticSegmentation.from_pretrained(out / "model", trust_remote_code=True).eval()
    assert model.config.queries == "random" and model(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 2, 32, 32)


def write_vectors(path: Path, seed: int) -> str:
    """A table that has the words of both classes."""
    names = np.array(["road", "plant-other", "tree"])
    vectors = np.random.default_rng(seed).normal(size=(3, 16))
    np.savez(path, names=names, vectors=vectors, model="none", source="a test", licence="CC0-1.0")
    return str(path)


def test_class_texts_can_be_given_as_vectors(arguments, tmp_path):
    more = ("--class-head", "cosine", "--centre-class-vectors", "--class-vectors")
    out = short(arguments, tmp_path / "run", *more, write_vectors(tmp_path / "a.npz", 0))
    assert all(line["loss_textual"] > 0 for line in log_of(out) if "loss_textual" in line)
    model = AutoModelForSemanticSegmentation.from_pretrained(out / "model", trust_remote_code=True).eval()
    assert model.config.class_names == CLASSES and model.config.query_texts == ["plant-other", "road"]
    model.set_classes({0: "tree", 1: "road"})
    assert model(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 2, 32, 32)
    card = (out / "model" / "README.md").read_text()
    assert "from a test; licence: CC0-1.0" in card and "set_classes" in card
    shutil.copy(tmp_path / "a.npz", tmp_path / "moved.npz")
    short(arguments, tmp_path / "run", *more, str(tmp_path / "moved.npz"), "--resume")
    with pytest.raises(ValueError, match="class vectors was"):
        short(arguments, tmp_path / "run", *more, write_vectors(tmp_path / "b.npz", 1), "--resume")


def test_a_preset_takes_the_width_of_the_vectors_and_has_no_text_tower(start):
    classes = ["road", "sky", "vehicle"]
    net, _ = build_model(TrainOptions(class_vectors="clip_vit_b16", class_head="cosine"), classes)
    assert net.config.vision_config.projection_dim == net.config.text_config.projection_dim == 512
    assert not any("text_tower" in name for name in net.state_dict())
    assert net.config.query_texts == ["road", "sky-other", "car"] and net.config.class_names == classes
    assert net.config.class_vectors["licence"].startswith("MIT") and not net.config.centre_class_vectors
    refused = {
        "width": {"model": str(start), "class_vectors": "clip_vit_b16"},
        "queries": {"centre_class_vectors": True},
        "file not found": {"class_vectors": "clip_vit_b61"},
        "--random-queries": {"class_vectors": "clip_vit_b16", "random_queries": True},
    }
    for words, fields in refused.items():
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            build_model(TrainOptions(**fields), CLASSES)
    with pytest.raises(ValueError, match="'obstacle'"):
        build_model(TrainOptions(class_vectors="clip_vit_b16"), ["road", "obstacle"])


@pytest.mark.slow
def test_data_without_an_index_is_trained_on_and_evaluated(arguments, data, tmp_path):
    more = ("--no-index", "--class-names", ",".join(CLASSES))
    out = short(arguments, tmp_path / "run", *more)
    results = json.loads((out / "results.json").read_text())
    assert results["protocol"]["frames"] == 3 and results["protocol"]["labels"]["name"] == "ids/as_they_are"
    assert "Read without an index" in (out / "model" / "README.md").read_text()


def test_the_tracker_gets_the_losses_and_drawings(arguments, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    call(
        "train",
        *arguments(out, "--steps", "2", "--eval-every-steps", "1", "--overlays", "1", "--tracker", "tensorboard"),
    )
    found = [EventAccumulator(str(path.parent)).Reload().Tags() for path in (out / "tracker").rglob("events*")]
    assert {"loss", "gradient_norm", "miou", "lr_vision"} <= {name for tags in found for name in tags["scalars"]}
    assert [name for tags in found for name in tags["images"]]


def test_a_dry_run_prints_the_plan_and_writes_nothing(arguments, tmp_path, capsys):
    assert call("train", *arguments(tmp_path / "run", "--dry-run", "--vision", "frozen")) == {}
    text = capsys.readouterr().out
    for words in ("peak rate 0.001, decay 0", "of them trained", "6 steps of 2 images", "GiB of activations"):
        assert words in text
    assert not (tmp_path / "run").exists()


# -- errors -----------------------------------------------------------------------------------------------------------


def test_the_largest_workable_minimum_is_named_at_once():
    pixels = np.array([[900, 20, 0, 7], [800, 50, 0, 3]])
    with pytest.raises(ValueError, match="b, d, .*--min-pixels 6 or less"):
        TrainPlan(pixels, 0, RareClassSampling(min_pixels=100), "abcd")
    TrainPlan(pixels, 0, RareClassSampling(min_pixels=6), "abcd")


def test_an_earlier_run_is_not_overwritten(finished, arguments):
    with pytest.raises(FileExistsError, match="--resume"):
        call("train", *arguments(finished[0]))


def test_what_cannot_be_trained_is_named_before_anything_is_written(arguments, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        call("train", *arguments(tmp_path / "run", "--data", str(tmp_path / "nowhere")))
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "photos" / "a.png")
    with pytest.raises(FileNotFoundError, match="`tqdm-seg prepare folder` makes one"):
        call("train", *arguments(tmp_path / "run", "--data", str(tmp_path / "photos")))
    with pytest.raises(ValueError, match="no split 'none', only train, validation.* held back"):
        call("train", *arguments(tmp_path / "run", "--eval-split", "none"))
    with pytest.raises(FileNotFoundError, match="--model no_such_thing"):
        call("train", *arguments(tmp_path / "run", "--model", "no_such_thing"))
    for refused in ("--train-split none", "--eval-split none", "--tracker none_such", "--compile none_such"):
        with pytest.raises(ValueError, match="none"):
            call("train", *arguments(tmp_path / "run", *refused.split()))
    with pytest.raises(ValueError, match="--min-pixels"):
        call("train", *arguments(tmp_path / "run", "--min-pixels", "999999"))
    for option in ("--crop 1",):
        with pytest.raises(ValueError, match=option.split()[0]):
            call("train", *arguments(tmp_path / "run", *option.split()))
    with pytest.raises(ValueError, match=r"\.png .* 40x40 pixels, would be seen as 4x4"):
        call("train", *arguments(tmp_path / "run", "--eval-size", "4x4"))
    for column in ("image", "label"):
        more = ("--no-index", "--class-names", ",".join(CLASSES), f"--{column}-column", "nothing")
        with pytest.raises(ValueError, match="nothing"):
            call("train", *arguments(tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_masks_without_a_labelled_pixel_are_refused(arguments, tmp_path):
    for split, count in (("train", 2), ("val", 1)):
        for kind, mode in (("images", "RGB"), ("masks", "L")):
            (tmp_path / kind / split).mkdir(parents=True)
            for i in range(count):
                Image.new(mode, (40, 40), 255 if mode == "L" else (9, 9, 9)).save(tmp_path / kind / split / f"{i}.png")
    (tmp_path / "classes.txt").write_text("a,0\nb,1\n")
    paths = (tmp_path / name for name in ("images", "set", "masks"))
    prepare("folder", *paths, "--class-file", tmp_path / "classes.txt")
    with pytest.raises(ValueError, match="pixel"):
        call("train", *arguments(tmp_path / "run", "--data", str(tmp_path / "set")))
    assert not (tmp_path / "run").exists()


def test_without_an_index_the_first_frames_say_what_is_alarming(data, tmp_path):
    held_back = PlainRows(str(data), "validation", CLASSES)
    assert alarms(PlainRows(str(data), "train", CLASSES), held_back) == []
    (absent,) = alarms(PlainRows(str(data), "train", (*CLASSES, "puddle")), held_back)
    assert "without a pixel" in absent and absent.endswith(": puddle")
    mask = np.repeat(np.array([[0, 255]], np.uint8), 8, 0)
    files = {"image": np.stack([mask] * 3, -1), "label": mask}
    row = {name: [{"bytes": cv2.imencode(".png", file)[1].tobytes(), "path": None}] for name, file in files.items()}
    pq.write_table(pa.table(row), tmp_path / "train.parquet")
    absent, masks = alarms(PlainRows(str(tmp_path), "train", CLASSES), held_back)
    assert absent.endswith(f": {CLASSES[1]}") and f"'{CLASSES[1]},255'" in masks


def test_frames_that_are_trained_on_are_not_called_held_back(arguments, tmp_path, capsys):
    more = "--steps 1 --warmup-steps 0 --overlays 0 --eval-split train"
    call("train", *arguments(tmp_path / "run", *more.split()))
    card = (tmp_path / "run/model/README.md").read_text()
    assert "held back" not in card and "held-back" not in card and "trained on" in card
    assert "held back" not in capsys.readouterr().out.splitlines()[-1]


def test_the_best_model_is_the_best_of_the_class_set(arguments, tmp_path):
    more = "--steps 1 --warmup-steps 0 --eval-every-steps 1 --overlays 0 --class-set traversable"
    call("train", *arguments(tmp_path / "run", *more.split()))
    best = json.loads((tmp_path / "run/best/results.json").read_text())
    assert best["miou"] == best["iou"]["traversable"] and best["miou_classes"] == 1


def test_a_column_of_numbers_is_no_image(arguments, tmp_path):
    table = {"image": ["a.png"], "label": [1]}
    (tmp_path / "rows").mkdir()
    pq.write_table(pa.table(table), tmp_path / "rows" / "train.parquet")
    more = ("--no-index", "--class-names", ",".join(CLASSES), "--data", str(tmp_path / "rows"), "--eval-split", "train")
    with pytest.raises(ValueError, match="column 'label' .*images"):
        call("train", *arguments(tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_weights_of_all_losses_are_options(start):
    options = TrainOptions(model=str(start), class_weight=1.0, mask_weight=0.0, dice_weight=3.0, score_map_weight=4.0)
    config = build_model(options, CLASSES)[0].config
    assert (config.class_loss_weight, config.mask_loss_weight, config.dice_loss_weight) == (1, 0, 3)
    assert config.score_map_loss_weight == 4


def test_classes_without_a_pixel_are_said(data):
    frames, held_back = (FrameDataset(str(data), split) for split in ("train", "validation"))
    training = FrameSets([TrainSet("", frames, Fraction(1))])
    assert alarms(training, held_back) == []
    frames.index = replace(frames.index, table=without_class(frames.index.table, 1))
    without, masks = alarms(training, held_back)
    assert without.endswith("train on: traversable")
    assert "of train hold non-traversable" in masks and "'traversable,255'" in masks
    assert "trained on" in alarms(FrameSets([TrainSet("", held_back, Fraction(1))]), held_back)[-1]


def without_class(table: pa.Table, number: int) -> pa.Table:
    """An index in which a class has no pixel."""
    column = table.schema.get_field_index("class_pixels")
    pixels = [[0 if k == number else count for k, count in enumerate(row)] for row in table["class_pixels"].to_pylist()]
    return table.set_column(column, table.schema.field(column), pa.array(pixels, table.schema.field(column).type))


def test_the_doctor_prints_what_there_is_to_know_and_writes_nothing(arguments, tmp_path, capsys):
    upright, exif = np.arange(1600).reshape(40, 40) // 800, Image.Exif()
    exif[0x0112] = 6
    for split, names in (("train", "ab"), ("val", "bc")):
        for name in names:
            photo(tmp_path / "images" / split / f"{name}.png", 40, 40)
            save(tmp_path / "masks" / split / f"{name}.png", upright)
    photo(tmp_path / "images" / "train" / "turned.jpg", 40, 40, exif=exif)
    save(tmp_path / "masks" / "train" / "turned.png", upright)
    deep = np.random.default_rng(0).integers(0, 2**16, (40, 40), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "images" / "val" / "deep.png")
    save(tmp_path / "masks" / "val" / "deep.png", upright)
    (tmp_path / "classes.txt").write_text("road\nsky\ncar\n")
    prepare(
        "folder", tmp_path / "images", tmp_path / "set", tmp_path / "masks", "--class-file", tmp_path / "classes.txt"
    )
    line = arguments(tmp_path / "run", "--data", str(tmp_path / "set"), "--min-pixels", "5000", "--doctor")
    assert call("train", *line[:2], *line[4:]) == {}
    said = capsys.readouterr().out
    shown = " ".join(said.split())
    for words in (
        "frames 3 3", "road, % of labels 50.00 50.00", "car, % of labels none none", "1 16-bit grey PNG", "40x40",
        "largest workable --min-pixels: 799; 5000 is refused", "classes without a pixel in the frames to train on: car",
        "near-duplicate images: 1 held back, 1 trained on, such as val/b.png and train/b.png", "mirrored by EXIF",
        "look at train/turned.jpg",
    ):  # fmt: skip
        assert words in shown, said
    assert not (tmp_path / "run").exists()


def test_the_doctor_says_what_names_keep_it_from_looking():
    frames = FrameSet("train", [NamedFrame("a.png", "x1399_9999")])
    part = Survey("train", np.ones((1, 2), int), Counter({(1, 2): 1}), frames)
    (scenes, images) = leak_lines([part], part)
    assert "x1399_9999" in scenes and images.startswith("near-duplicate images: not looked for")


@pytest.mark.slow
def test_the_doctor_looks_at_the_first_rows_of_data_without_an_index(arguments, data, tmp_path, capsys):
    call("train", *arguments(tmp_path / "run", "--no-index", "--class-names", ",".join(CLASSES), "--doctor"))
    shown = " ".join(capsys.readouterr().out.split())
    assert "frames 4 3" in shown and "4 8-bit RGB PNG" in shown and "without an index" in shown


# -- several training sets --------------------------------------------------------------------------------------------


def test_several_sets_are_drawn_by_their_weights_and_by_sample_alone():
    pixels = [np.array([[60, 0], [60, 60]]), np.array([[60, 60], [0, 60], [60, 0]])]
    for rare in (RareClassSampling(min_pixels=50), None):
        plans = [TrainPlan(of_set, 3, rare, "ab", number) for number, of_set in enumerate(pixels)]
        plan = MixedPlan(plans, [Fraction(3), Fraction("0.5")], seed=3)
        draws = plan.draws(0, 2 * len(plan.pattern))
        assert (draws["frame"] < 2).mean() == 6 / 7 and set(draws["frame"]) == set(range(5))
        parts = [plan.draws(first, last) for first, last in ((0, 5), (5, 1200), (1200, len(draws)))]
        assert np.array_equal(np.concatenate(parts), draws)
    first = draws["frame"][draws["frame"] >= 2][:6].reshape(2, 3)  # permutations: each epoch shows every frame once
    assert np.array_equal(np.sort(first), [[2, 3, 4]] * 2)
    with pytest.raises(ValueError, match="b in two.*--min-pixels 6 or less"):
        check_minimum({"one": np.array([[60, 70]]), "two": np.array([[60, 7]])}, 50, "ab")


def test_a_run_on_several_sets_names_them_all(arguments, data, tmp_path):
    sets = (f"dry={data}@3", f"wet={data}:validation")
    line = arguments(tmp_path / "run", "--eval-data", str(data), "--steps", "2", "--data")
    call("train", *line, *sets)
    card = " ".join((tmp_path / "run" / "model" / "README.md").read_text().split())
    assert "75% of the samples" in card and "25% of the samples" in card and f"dry={data}@3" in card
    facts = json.loads((tmp_path / "run" / "args.json").read_text())["identity"]["training data"]
    assert facts["dry"].endswith("split train, weight 3") and facts["wet"].endswith("split validation, weight 1")
    with pytest.raises(ValueError, match=r"training data\.dry was .*weight 3, now .*weight 2"):
        call("train", *line, f"dry={data}@2", sets[1], "--resume")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (("a=one", "b=two"), "--eval-data"), (("a=one@0", "b=two"), "weight 0"), (("one", "b=two"), "one has no name"),
        (("a=one", "A=two"), "called a"), (("a=one@3x4", "b=two"), "size"), ((), "empty"),
    ],
)  # fmt: skip
def test_sets_that_make_no_sense_are_refused(data, words):
    with pytest.raises(ValueError, match=words):
        TrainOptions(data=data)


def test_data_again_adds_named_sets_and_replaces_paths():
    for words, expected in (
        ("--data a --data b", ("b",)), ("--data a --data b=c d=e", ("b=c", "d=e")),
        ("--data a=b --data c=d", ("a=b", "c=d")), ("--data a=b --data c", ("c",)),
    ):  # fmt: skip
        assert parse(TrainOptions, "", [*words.split(), "--eval-data", "x"]).data == expected


def test_sets_of_other_classes_are_refused_by_name(arguments, data, tmp_path):
    photo(tmp_path / "images" / "train" / "a.png", 40, 40)
    save(tmp_path / "masks" / "train" / "a.png", np.zeros((40, 40)))
    (tmp_path / "classes.txt").write_text("road\nsky\n")
    made, names = tmp_path / "set", tmp_path / "classes.txt"
    prepare("folder", tmp_path / "images", made, tmp_path / "masks", "--class-file", names)
    sets = ("--data", f"mine={made}", f"orfd={data}", "--eval-data", str(data))
    with pytest.raises(ValueError, match="orfd .*has the classes non-traversable, traversable, mine has road, sky"):
        call("train", *arguments(tmp_path / "run", *sets))


def test_damaged_training_images_are_named_before_anything_is_written(arguments, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    for path in (tmp_path / "data" / "data").glob("train*"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ValueError, match="train"):
        call("train", *arguments(tmp_path / "run", "--data", str(tmp_path / "data")))
    assert not (tmp_path / "run").exists()


def test_non_finite_loss_names_the_images_and_saves_nothing(arguments, tmp_path, monkeypatch):
    original, keys = program.model_inputs, []

    def poison(batch, device):
        inputs = original(batch, device)
        keys.append(batch["key"])
        if len(keys) == 3:
            inputs["pixel_values"][1] = 3e38  # overflows inside the model
        return inputs

    monkeypatch.setattr(program, "model_inputs", poison)
    with pytest.raises(FloatingPointError, match=r"step 2, .*training/x_training/image_data/\d\.png"):
        call("train", *arguments(tmp_path / "run", "--log-every", "10", "--save-every-steps", "4"))
    assert not (tmp_path / "run" / "checkpoints").exists()
    report = json.loads((tmp_path / "run" / "not_finite.json").read_text())
    assert report["step"] == 2 and report["images"] == keys[2] and report["losses"]["loss_class"] == "nan"


def test_non_finite_loss_is_traced_to_the_first_bad_batch(tmp_path):
    recent = RecentLosses()
    recent.add(7, ["good"], {"loss_a": torch.tensor(1.0), "loss_b": torch.tensor(2.0)})
    recent.add(8, ["bad", "worse"], {"loss_a": torch.tensor(1.0), "loss_b": torch.tensor(float("inf"))})
    recent.add(9, ["after"], {"loss_a": torch.tensor(float("nan")), "loss_b": torch.tensor(float("nan"))})
    with pytest.raises(FloatingPointError, match="loss_b .*step 8, .*bad, worse"):
        recent.means(program.Accelerator(), tmp_path)


# -- evaluation -------------------------------------------------------------------------------------------------------


def test_evaluation_pools_counts_and_leaves_the_model_as_it_was(data):
    model = micro_model(id2label=dict(enumerate(CLASSES)), context_decoder_dropout=0.5).train()
    frames = FrameDataset(str(data), "validation")
    processor, accelerator = TqdmImageProcessor(), program.Accelerator()
    results = [score_frames(model, processor, frame_loader(frames, 0), frames.label_map, accelerator) for _ in range(2)]
    assert model.training and results[0] == results[1]  # dropout was off
    model.eval()
    matrix = 0
    for i in range(len(frames)):
        prediction, _ = predict_frame(model, processor, frames[i])
        matrix = matrix + confusion_matrix(prediction, torch.from_numpy(frames[i].labels), 2)
    assert results[0]["miou"] == mean_iou(matrix)


def test_the_copy_that_is_evaluated_is_freed(data):
    model = micro_model(id2label=dict(enumerate(CLASSES)))
    frames = FrameDataset(str(data), "validation")
    gc.collect()
    before = sum(type(thing) is type(model) for thing in gc.get_objects())
    gc.disable()
    try:
        score_frames(model, TqdmImageProcessor(), [frames[0]], frames.label_map, program.Accelerator())
        assert sum(type(thing) is type(model) for thing in gc.get_objects()) == before
    finally:
        gc.enable()
