"""Training in real processes: two make the step of one, and nothing is lost to SIGKILL and SIGTERM."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import micro_model
from processes import PythonProcess, finish, finish_two
from safetensors.torch import load_file
from shard_helpers import orfd, prepare

from tqdm_seg.data.files import MARK
from tqdm_seg.deploy.folder import save_model_folder
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor

pytestmark = pytest.mark.slow
HERE, ROOT = Path(__file__).parent, Path(__file__).parents[1]
PROGRAM = HERE / "train_without_chance.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]


@pytest.fixture(scope="module")
def fixed(tmp_path_factory) -> list[str]:
    """Options of a run of four steps of four images, with dropout, drop path and random points."""
    folder = tmp_path_factory.mktemp("processes")
    classes = {0: "non-traversable", 1: "traversable"}
    chance = {"context_decoder_dropout": 0.1, "vision_config": {"drop_path_rate": 0.2}}
    save_model_folder(micro_model(id2label=classes, **chance), TqdmImageProcessor(), folder / "start")
    orfd(folder / "raw", 6, size=40)
    orfd(folder / "raw", 3, scene="y0613_1304", split="validation", size=40)
    prepare("orfd", folder / "raw", folder / "data")
    options = f"""--model {folder / "start"} --data {folder / "data"} --steps 4 --crop 32 --min-pixels 50 --lr 1e-3
        --warmup-steps 2 --overlays 0 --tracker none --log-every 1 --save-every-steps 2"""
    return options.split()


def launch(command: list[object], **variables: str) -> tuple[int, str]:
    """Runs a launcher of processes, and they load every library: the exit status, and what all printed."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}", **variables}
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    return done.returncode, done.stdout


def weights(out: Path, step: int = 4) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step_{step:07d}" / "weights.safetensors")


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def one(fixed, tmp_path_factory) -> Path:
    """The run folder of one process with batches of four."""
    out = tmp_path_factory.mktemp("one") / "run"
    output = finish(PROGRAM, *fixed, "--batch-size", "4", "--out", out)
    assert "processes: 1, results: True" in output
    return out


def test_two_processes_make_the_steps_of_one(fixed, one, tmp_path):
    more = ["--batch-size", "2", "--out", tmp_path / "run"]
    status, output = launch([*ACCELERATE, "--multi_gpu", PROGRAM, *fixed, *more])
    assert status == 0, output
    assert output.count("processes: 2, results: True") == 2
    assert losses(tmp_path / "run") == pytest.approx(losses(one), rel=1e-5)
    # Averaged gradients, not weights: Adam moves a weight by its rate even where the gradient is nothing but rounding.
    first, second = (
        load_file(out / "checkpoints" / "step_0000004" / "optimizer.safetensors") for out in (one, tmp_path / "run")
    )
    moments = [name for name in first if name.endswith("|exp_avg")]
    assert first.keys() == second.keys() and len(moments) > 100
    largest = max(first[name].abs().max() for name in moments)
    assert all((first[name] - second[name]).abs().max() < 1e-5 * largest for name in moments)
    # Its running mean moves with a bias before it that has no gradient.
    (variance,) = (name for name in weights(one) if name.endswith("running_var"))
    torch.testing.assert_close(weights(one)[variance], weights(tmp_path / "run")[variance], rtol=1e-5, atol=1e-6)
    results = [json.loads((out / "results.json").read_text()) for out in (one, tmp_path / "run")]
    assert [result["protocol"]["frames"] for result in results] == [3, 3]
    assert results[0]["iou"] == pytest.approx(results[1]["iou"], abs=0.01)


def test_chance_is_by_sample_over_twenty_steps(fixed, tmp_path):
    more = ["--steps", "20", "--lr", "1e-4", "--teacher-drop-path"]
    finish(PROGRAM, *fixed, *more, "--batch-size", "4", "--out", tmp_path / "one")
    status, output = launch([*TORCHRUN, PROGRAM, *fixed, *more, "--batch-size", "2", "--out", tmp_path / "two"])
    assert status == 0, output
    terms = [
        [
            {key: value for key, value in json.loads(line).items() if key.startswith("loss_")}
            for line in (tmp_path / name / "log.jsonl").read_text().splitlines() if "loss_class" in line
        ]
        for name in ("one", "two")
    ]  # fmt: skip
    assert [len(lines) for lines in terms] == [20, 20]
    largest = max(abs(a[k] - b[k]) / max(abs(a[k]), 1e-3) for a, b in zip(*terms, strict=True) for k in a)
    print(f"largest relative difference of any loss term over 20 steps: {largest:.2g}")
    assert largest < 1e-3


def test_published_loss_counts_depend_on_how_images_are_divided(fixed, one, tmp_path):
    more = ["--batch-size", "2", "--out", tmp_path / "run", "--loss-counts", "published"]
    finish_two(PROGRAM, *fixed, *more)
    assert losses(tmp_path / "run") != pytest.approx(losses(one), rel=1e-5)


def test_a_model_sharded_by_fsdp2_is_saved_whole_and_loads_anywhere(tmp_path):
    assert finish_two(HERE / "sharded_state.py", tmp_path).count("sharded state is whole") == 2


def test_one_process_where_two_were_asked_for_is_an_error(fixed, tmp_path):
    status, output = launch([*ACCELERATE, "--cpu", ROOT / "train.py", *fixed, "--out", tmp_path / "run"])
    assert status != 0 and "starts a single process whatever --num_processes says" in output
    assert not (tmp_path / "run").exists()


def test_killed_in_the_middle_of_a_save_it_resumes_to_the_same_bits(fixed, one, tmp_path):
    command = [PROGRAM, *fixed, "--batch-size", "4", "--out", tmp_path / "run"]
    status, output = PythonProcess(*command, KILL_AT_SAVE="4").finish()  # the second file of the second checkpoint
    assert status == -signal.SIGKILL, output
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_0000002"]
    finish(*command, "--resume")
    assert all(torch.equal(value, weights(one)[name]) for name, value in weights(tmp_path / "run").items())
    assert losses(tmp_path / "run") == losses(one)


def test_sigterm_saves_and_ends_well_and_the_run_goes_on_to_the_same_bits(fixed, tmp_path):
    def command(out: Path) -> list[object]:
        more = ["--batch-size", "2", "--steps", "30", "--save-every-steps", "0", "--out", out]
        return [ROOT / "train.py", *fixed, *more]

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finish(*command(whole), "--save-every-steps", "30")
    process = PythonProcess(*command(stopped))
    while not (stopped / "log.jsonl").is_file() or len(losses(stopped)) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    status, output = process.finish()
    assert status == 0 and "stopped by SIGTERM after step" in output, output
    (checkpoint,) = (stopped / "checkpoints").iterdir()
    assert 3 <= int(checkpoint.name[5:]) < 30 and not (stopped / "model").exists()
    finish(*command(stopped), "--resume", "--save-every-steps", "30")
    assert losses(stopped) == losses(whole)
    assert all(torch.equal(value, weights(whole, 30)[name]) for name, value in weights(stopped, 30).items())


@pytest.fixture
def small_disk(tmp_path):
    """A function that makes a file system of some bytes, or gives it more."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(size: int) -> Path:
        options = f"{'remount,' if os.path.ismount(folder) else ''}size={size}"
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)
        if made.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {made.stderr.decode().strip()}")
        return folder

    yield resize
    subprocess.run(["umount", folder], check=False)


@pytest.mark.parametrize("share", [0.02, 0.4, 0.85])
def test_a_full_disk_is_named_and_with_room_again_the_run_ends_with_the_same_bits(fixed, one, small_disk, share):
    room = sum(path.stat().st_size for path in one.rglob("*") if path.is_file())
    out = small_disk(int(share * room)) / "run"
    command = [PROGRAM, *fixed, "--batch-size", "4", "--out", out]
    status, output = PythonProcess(*command).finish()
    assert status == 1 and "No space left on device" in output, output
    assert str(out) in output and "not foreseen" not in output
    small_disk(3 * room)
    finish(*command, *(["--resume"] if out.exists() else []))
    assert all(torch.equal(value, weights(one)[name]) for name, value in weights(out).items())
    assert losses(out) == losses(one)
    assert {path.name for path in out.rglob(".*")} == {MARK}
