"""The commands: help and errors of use are immediate, every failure is one line, every command is a typed function."""

import dataclasses
import inspect
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

import tqdm_seg
from tqdm_seg import program
from tqdm_seg.commands import COMMANDS, named, start
from tqdm_seg.env import code_commit
from tqdm_seg.program import did_you_mean, explain, option, parse, run, takes

CPU_SECONDS = 0.5  # of one start, its interpreter included
# Files that do not exist, for every program that reads some.
WRONG_PATHS = {
    "predict": "nosuch photo.png --out out",
    "convert": "nosuch.pth --out out",
    "export": "./nosuch --out out",
    "evaluate": "./nosuch --data orfd=nosuch --out out",
    "compare": "nosuch nosuch2",
    "report": "nosuch",
    "train": "--data nosuch --out out",
    "ablate": "--data nosuch --out out",
    "check": "nosuch",
    "audit": "nosuch nosuch2",
    "prepare orfd": "nosuch --out out",
}


def call(*words: str, folder: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """A command in a process, and the CPU seconds that it took."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "tqdm_seg.cli", *words]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return result, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    "words", [[*name.split(), "--help"] for name in COMMANDS] + [["--help"], ["--version"]], ids=" ".join
)
def test_help_is_immediate(words, tmp_path):
    result, seconds = call(*words, folder=tmp_path)
    assert result.returncode == 0 and result.stdout and not result.stderr, result.stderr
    assert seconds <= CPU_SECONDS


@pytest.mark.parametrize("name", COMMANDS)
def test_an_error_of_use_is_one_immediate_line(name, tmp_path):
    result, seconds = call(*name.split(), "--nosuch-option", folder=tmp_path)
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert seconds <= CPU_SECONDS


@pytest.mark.parametrize("name", WRONG_PATHS)
def test_a_wrong_path_is_one_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert start(name, shlex.split(WRONG_PATHS[name])) in (1, 2)
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1, printed
    assert "nosuch" in printed or "photo.png" in printed
    assert not list(tmp_path.iterdir()), "a refused start leaves nothing behind"


@pytest.mark.slow
def test_a_module_is_the_command_and_debug_shows_the_traceback(tmp_path):
    command = [sys.executable, "-m", "tqdm_seg.deploy.predict", "nosuch", "photo.png", "--out", "out", "--debug"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1] == "error: file not found: photo.png"


@pytest.mark.parametrize("words", [[], ["nosuch"], ["prepare", "nosuch"], ["predcit"]], ids=" ".join)
def test_a_wrong_command_is_named(words, tmp_path):
    result, _ = call(*words, folder=tmp_path)
    assert result.returncode == (2 if words else 0)
    assert words == [] or (result.stderr.count("\n") == 1 and words[-1] in result.stderr)
    assert words != ["predcit"] or "predict" in result.stderr.partition("predcit")[2]


def test_importing_the_package_imports_no_library(tmp_path):
    code = (
        "import sys, tqdm_seg; assert tqdm_seg.__version__; print({'torch', 'numpy', 'transformers'} & {*sys.modules})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr


@pytest.mark.parametrize("name", [name for name in COMMANDS if " " not in name])
def test_every_command_is_a_function_with_the_fields_of_its_options(name):
    command = COMMANDS[name]
    options, function = named(command.options), named(command.function)
    parameters = inspect.signature(function).parameters
    assert {field.name: field.type for field in dataclasses.fields(options)} == {
        name: parameter.annotation for name, parameter in parameters.items()
    }
    assert options.__doc__ and function.__doc__
    if name != "env":
        assert getattr(tqdm_seg, name) is function


def test_the_commit_is_that_of_this_checkout():
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    assert (code_commit() or "").removesuffix(" with changes") == head  # both empty outside of a checkout


# -- options --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Of a program."""

    source: Path = option(help="file")
    rate: float = option(0.5, help="how fast")
    size: tuple[int, int] | None = option(None, type=program.size, help="of images (default: their own)")
    kinds: tuple[str, ...] = option(("a", "b"), nargs="+", help="which")
    batch_size: int = option(4, help="100% of them")
    quick: bool = option(True, help="or slow")

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError("--batch-size must be at least 1")


@takes(Options)
def work(options: Options) -> Options:
    """Does nothing."""
    return options


def test_a_command_line_becomes_typed_options():
    words = "in.png --rate 2 --size 3x4 --kinds x y --no-quick"
    assert parse(Options, None, words.split()) == Options(
        source=Path("in.png"), rate=2.0, size=(3, 4), kinds=("x", "y"), quick=False
    )


WRONG = (
    "--rate nan, --rate inf, --size 3, --size 0x3, --size -1x3, --batch-size 0, --batch-size 1.5, b, --rat 1, --kinds"
)


@pytest.mark.parametrize("words", ["", *(f"a {words}" for words in WRONG.split(", "))])
def test_wrong_values_are_one_line_and_exit_2(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(Options, None, words.split(), "tqdm-seg work")
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and "tqdm-seg work --help" in printed


def test_help_shows_every_default_once(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(Options, "What it does.", ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("how fast (default: 0.5)", "of images (default: their own)", "which (default: a b)",
                 "100% of them (default: 4)"):  # fmt: skip
        assert text in shown


def test_a_function_takes_texts_for_paths_and_lists_for_tuples():
    options = work(source="in.png", kinds=["x"], size=(1, 2))
    assert options == Options(source=Path("in.png"), kinds=("x",), size=(1, 2))
    assert work(source="in.png", kinds="x").kinds == ("x",)
    with pytest.raises(ValueError, match="rate"):
        work(source="in.png", rate=float("nan"))
    with pytest.raises(TypeError, match="nosuch"):
        work(source="in.png", nosuch=1)


# -- failing --------------------------------------------------------------------------------------------


class OutOfMemoryError(RuntimeError):
    """As torch calls its own."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("a file\n   is wrong"), ["a file is wrong"]),
        (FileNotFoundError(2, "No such file or directory", "x.png"), ["file not found: x.png"]),
        (PermissionError(13, "Permission denied", "x.png"), ["Permission denied: x.png"]),
        (OutOfMemoryError("CUDA out of memory. Tried 3 GiB"), ["probably out of memory", "--batch-size", "--size"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 3"), ["probably out of memory", "--batch-size"]),
        (KeyError("scores"), ["scores", "KeyError", "--debug"]),
    ],
)
def test_errors_say_what_where_and_what_to_do(error, words):
    message = explain(error, Options(source=Path("x")))
    assert "\n" not in message and all(word in message for word in words), message


class Broken(list):
    """Data that a loader's process cannot read."""

    def __getitem__(self, index: int) -> None:
        raise ValueError(f"frame {index} cannot be decoded; prepare it again")


def test_the_error_of_a_loader_process_is_its_own_line():
    with pytest.raises(ValueError, match="Original Traceback") as caught:
        next(iter(DataLoader(Broken([1]), num_workers=1)))
    assert explain(caught.value) == "frame 0 cannot be decoded; prepare it again"


def test_the_status_tells_how_a_program_ended(capsys):
    def fail(error: BaseException) -> None:
        raise error

    assert run(lambda: None) == 0 and run(lambda: 3) == 3 and run(lambda: True) == 0
    assert run(lambda: fail(KeyboardInterrupt())) == 130
    assert run(lambda: fail(ValueError("bad"))) == 1 and "Traceback" not in capsys.readouterr().err
    assert run(lambda: fail(ValueError("bad")), debug=True) == 1 and "Traceback" in capsys.readouterr().err


def test_near_words_are_offered():
    assert "predict" in did_you_mean("predcit", ["predict", "train"]) and did_you_mean("xyz", ["predict"]) == ""
