"""Every program that writes, killed at random moments and on full disks: what is lost?

    python tests/kills.py [--only PROGRAM] [--kills 20] [--disks] [--seed 0]

A program runs in a child process. Each kill is SIGKILL at a random moment; each disk is a tmpfs (needs root) with room
for none, 40 % and 80 % of what the program writes, on which it has to end with status 1 and one line that names the
disk. Then the same command (train and ablate: with --resume) starts again, on a disk with room. Something is lost if

    the inputs, or files of others next to OUT, changed;
    a file that has its final name right after the kill is not what an undisturbed run writes;
    the second start fails, leaves other bytes than an undisturbed run, or leaves temporary files.

Files that differ between two undisturbed runs (times) are compared by name only; they are printed.
"""

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from conftest import micro_config, micro_model
from safetensors.torch import save_file
from shard_helpers import orfd, photo, prepare

from tqdm_seg.commands import COMMANDS, named, start
from tqdm_seg.configuration_tqdm import PRESETS, TqdmConfig
from tqdm_seg.deploy.folder import save_model_folder
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor

PAGE = 4096
SHARES = (0.0, 0.4, 0.8)
SECONDS = 300
# What grows as a program works, so that right after a kill it is not yet what it will be.
GROWING = ("log.jsonl", "areas.json", ".tqdm-seg", "args.json")
# Folder that holds the best model so far.
BEST = "/best/"
# Fields of log.jsonl and args.json that tell of time, memory and the start, not of the work.
VARYING = ("samples_per_second", "memory_gb", "seconds_left", "resume")
# Files of somebody else around the output.
OTHERS = ("thesis.txt", "out.old/thesis.txt", "page.html.tmp/thesis.txt")
CLASSES = {0: "non-traversable", 1: "traversable"}


class Program(NamedTuple):
    """A command line, run in the folder that gets its output; again: words that the second start adds."""

    line: list[str]
    again: tuple[str, ...] = ()


def programs(root: Path) -> dict[str, Program]:
    """One small job for every program that writes."""
    model, data, table = root / "model", root / "data", root / "evaluation" / "x.parquet"
    train = "--steps 4 --batch-size 2 --crop 32 --warmup-steps 2 --min-pixels 50 --tracker none --lr 1e-3 --overlays 2"
    train += " --log-every 1 --save-every-steps 2"
    jobs = {
        "prepare": Program(f"prepare orfd {root}/raw --out out --workers 1 --rows-per-shard 2".split()),
        "train": Program(
            f"train --model {model} --data {data} --out out {train} --eval-every-steps 2".split(), ("--resume",)
        ),
        "evaluate": Program(
            f"evaluate {model} --data x={data}:train --out out --workers 0 --save-every-frames 1".split()
        ),
        "predict": Program(f"predict {model} {root}/images --out out".split()),
        "convert": Program(f"convert {root}/clip.safetensors --init tiny --activation gelu --out out".split()),
        "export": Program(f"export {model} --out out --format torch --no-check".split()),
        "compare": Program(f"compare {table} {table} --json a.json --csv a.csv --markdown a.md".split()),
        "report": Program(
            f"report {root}/evaluation --model {model} --data x={data}:train --out page.html --images 2".split()
        ),
        "audit": Program(f"audit {data}:train {data}:validation --json a.json --csv a.csv".split()),
        "table": Program(f"table a={root}/evaluation b={root}/evaluation --json a.json".split()),
        "ablate": Program(
            f"ablate --model {model} --data {data} --test x={data}:train --out out --seeds 0 {ablation(train)}".split()
        ),
    }
    missing = {name.split()[0] for name in COMMANDS} - jobs.keys() - {"check", "env"}
    assert not missing, f"no job for {missing}"
    return jobs


def ablation(train: str) -> str:
    """The options of a training without those that an ablation sets."""
    own = train.replace("--tracker none ", "").replace("--overlays 2", "").replace("--steps 4", "--steps 2")
    return f"{own} --variants full,no-visual"


def make_inputs(root: Path) -> None:
    """Model, data, images and an evaluation."""
    from test_convert import clip_of_open_clip  # here, because its libraries take seconds to import

    save_model_folder(
        micro_model(id2label=CLASSES, window_size=64, window_stride=48), TqdmImageProcessor(), root / "model"
    )
    orfd(root / "raw", 5, "x0613_1627", "training", 40)
    orfd(root / "raw", 3, "x0614_0900", "validation", 40)
    prepare("orfd", root / "raw", root / "data", "--rows-per-shard", 2)
    for number in range(4):
        photo(root / "images" / f"{number}.png", 40, 56)
    save_file(clip_of_open_clip().state, root / "clip.safetensors")
    assert (
        start("evaluate", f"{root}/model --data x={root}/data:train --out {root}/evaluation --workers 0".split()) == 0
    )


# -- children -----------------------------------------------------------------------------------------------


def spawn(work: Callable[[], int], folder: Path, log: Path) -> int:
    """A forked child that works in the folder, its output in a file; the number of its process."""
    child = os.fork()
    if child:
        os.setpgid(child, child)  # here and there, as nobody knows who comes first
        return child
    status = 70
    try:
        os.setpgid(0, 0)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        os.chdir(folder)
        status = work() or 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait(child: int, seconds: float) -> int | None:
    """The exit status of a child; None, after SIGKILL to it and its workers, if it runs longer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def run(line: Sequence[str], folder: Path, log: Path, seconds: float = SECONDS) -> int | None:
    """The exit status of a command in the folder, None if it was killed after these seconds."""
    words = list(line)
    name = f"{words.pop(0)} {words.pop(0)}" if words[0] == "prepare" else words.pop(0)
    return wait(spawn(lambda: start(name, words), folder, log), seconds)


# -- what is on disk ----------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, str]:
    """A checksum of every file below the folder, times and the like left out, and its folders."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[name] = sha256(comparable(path)).hexdigest() if path.is_file() else "folder"
    return found


def comparable(path: Path) -> bytes:
    """The bytes of a file, without the fields of logs that vary."""
    content = path.read_bytes()
    if path.name == "log.jsonl":
        lines = [json.loads(line) for line in content.splitlines()]
        return json.dumps([{k: v for k, v in line.items() if k not in VARYING} for line in lines]).encode()
    if path.name == "args.json":
        return json.dumps({k: v for k, v in json.loads(content).items() if k not in VARYING}).encode()
    return content


def half_written(folder: Path, expected: dict[str, str], unstable: set[str]) -> list[str]:
    """Files with a final name, right after a kill, that are not what an undisturbed run writes."""
    wrong = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and path.name not in GROWING and BEST not in name and name in expected.keys() - unstable:
            wrong += [f"half-written {name}"] * (sha256(comparable(path)).hexdigest() != expected[name])
    return wrong


def differences(found: dict[str, str], expected: dict[str, str], unstable: set[str]) -> list[str]:
    """What is missing, too much or other than expected."""
    wrong = [f"missing {name}" for name in expected.keys() - found.keys()]
    wrong += [f"left over {name}" for name in found.keys() - expected.keys()]
    same = found.keys() & expected.keys() - unstable
    return wrong + [f"other bytes in {name}" for name in same if found[name] != expected[name]]


# -- trials -------------------------------------------------------------------------------------------------


class Bench:
    """Trials of one program in one folder, whose path is the same in all of them."""

    def __init__(self, name: str, program: Program, root: Path):
        self.program, self.work, self.log = program, root / "work", root / "said.txt"
        self.lost: list[str] = []
        runs = []
        for _ in range(2):
            self.fresh()
            began = time.monotonic()
            status = run(program.line, self.work, self.log)
            assert status in (0, 3), f"{name} ended with {status}: {self.said()}"  # 3: the audit found leaks
            self.seconds, self.status = time.monotonic() - began, status  # the second run finds warm caches
            runs.append(snapshot(self.work))
        assert runs[0].keys() == runs[1].keys()
        self.expected = runs[1]
        self.unstable = {path for path in runs[0] if runs[0][path] != runs[1][path]}
        sizes = (path.stat().st_size for path in self.work.rglob("*") if path.is_file())
        self.pages = sum(-(-size // PAGE) for size in sizes) - len(OTHERS)

    def said(self) -> str:
        """The end of what the program last said."""
        return self.log.read_text(errors="replace")[-600:]

    def fresh(self) -> None:
        """An empty folder with the files of others."""
        if not os.path.ismount(self.work):
            shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir()
        for name in OTHERS:
            (self.work / name).parent.mkdir(parents=True, exist_ok=True)
            (self.work / name).write_text("years of work")

    def kill(self, seconds: float) -> bool:
        """Kills the program after some time and starts it again; False if it had ended before, which is no kill."""
        self.fresh()
        ended = run(self.program.line, self.work, self.log, seconds) is not None
        if not ended:
            self.lost += half_written(self.work, self.expected, self.unstable)
        self.again()
        return not ended

    def again(self) -> None:
        """Starts the program once more; all has to be as after an undisturbed run."""
        add = self.program.again if (self.work / "out").exists() else ()
        status = run([*self.program.line, *add], self.work, self.log)
        if status != self.status:
            self.lost.append(f"the second start ended with {status}: {self.said()}")
        self.lost += differences(snapshot(self.work), self.expected, self.unstable)

    def disk(self, share: float) -> str:
        """Runs the program on a small disk, then once more with room; what it did on the small one."""
        with tmpfs(self.work, int(share * self.pages) + len(OTHERS)) as resize:
            self.fresh()
            status = run(self.program.line, self.work, self.log)
            lines = [line for line in self.said().splitlines() if line.startswith("error: ")]
            if status != self.status and (status != 1 or len(lines) != 1 or "No space left" not in lines[0]):
                self.lost.append(f"on a disk with room for {share:.0%} it ended with {status}: {self.said()}")
            resize(4 * self.pages + 100)
            self.again()
        return "full" if status == 1 else "fits"


@contextmanager
def tmpfs(folder: Path, pages: int) -> Iterator[Callable[[int], None]]:
    """A small disk in place of the folder; gives a function that changes its size. Raises OSError without root."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()

    def mount(pages: int, again: str = "") -> None:
        options = f"{again}size={pages * PAGE}"
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if made.returncode:
            raise OSError(f"no tmpfs can be mounted here: {made.stderr.strip()}")

    mount(pages)
    try:
        yield lambda pages: mount(pages, "remount,")
    finally:
        subprocess.run(["umount", folder], check=True)


def prepare_process() -> None:
    """What children inherit: modules, one thread, a small preset."""
    torch.set_num_threads(1)
    for place in COMMANDS.values():
        named(place.function)
    for name in ("datasets", "huggingface_hub.repocard", "tqdm_seg.reports.page", "torch.export"):  # met on the way
        importlib.import_module(name)
    config = micro_config()
    fields = {name: value for name, value in config.to_dict().items() if name in TqdmConfig.__dataclass_fields__}
    PRESETS["tiny"] = fields | {
        part: getattr(config, part).to_dict() for part in ("vision_config", "text_config")
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a row per program; the number of losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PROGRAM", action="append", help="this program; may be repeated")
    parser.add_argument("--kills", type=int, default=20, help="per program")
    parser.add_argument("--disks", action="store_true", help="small disks, too; needs root")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args(argv)
    prepare_process()
    total = 0
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        made = wait(spawn(lambda: make_inputs(root), root, root / "said.txt"), SECONDS)
        assert made == 0, (root / "said.txt").read_text()
        os.environ["HF_MODULES_CACHE"] = str(root / "modules")
        inputs = [root / name for name in ("model", "raw", "data", "images", "evaluation")]
        before = [snapshot(folder) for folder in inputs]
        print("program    seconds  kills  disks             lost  compared by name only")
        for name, program in programs(root).items():
            if options.only and name not in options.only:
                continue
            moments, bench = random.Random(f"{options.seed} {name}"), Bench(name, program, root)
            killed = 0
            while killed < options.kills:
                killed += bench.kill(moments.uniform(0, bench.seconds))
            disks = [bench.disk(share) for share in SHARES] if options.disks else ["-"]
            if [snapshot(folder) for folder in inputs] != before:
                bench.lost.append("inputs changed")
            lost, unstable = len(bench.lost), ", ".join(sorted(bench.unstable)) or "-"
            row = f"{name:10} {bench.seconds:7.1f} {killed:6}  {', '.join(disks):16} {lost:5}"
            print(f"{row}  {unstable}", flush=True)
            for words in bench.lost:
                print(f"    {words}", flush=True)
            total += len(bench.lost)
    print(f"lost: {total}")
    return total


if __name__ == "__main__":
    sys.exit(min(main(), 1))
