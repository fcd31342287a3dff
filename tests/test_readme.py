"""What the README shows works: its Python runs, its commands parse, its files exist."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import micro_model

from tqdm_seg import ablate, train
from tqdm_seg.deploy import convert as convert_checkpoint
from tqdm_seg.deploy import export as export_tqdm
from tqdm_seg.deploy import predict
from tqdm_seg.deploy.folder import save_model_folder
from tqdm_seg.evaluation import evaluate as evaluate_tqdm
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.reports import compare as compare_runs
from tqdm_seg.reports import report

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A folder with the example frames and a model where the quick start leaves one."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    save_model_folder(micro_model(window_size=None), TqdmImageProcessor(), tmp_path / "runs/quickstart/model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_python_block_runs(checkout):
    assert len(blocks("python")) == 3
    for code in blocks("python"):
        scope: dict = {}
        exec(code, scope)
        if "labels" in scope and "masks" not in scope:
            assert scope["labels"].shape == (1, 224, 224)
        if "masks" in scope:
            assert scope["labels"].shape == scope["image"].size[::-1]
            assert scope["masks"].keys() <= set(scope["model"].config.id2label.values()) and scope["masks"]


def test_every_command_parses():
    commands = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]
    parsers = {
        "ablate.py": lambda argv: ablate.make_parser().parse_args(argv),
        "compare_runs.py": lambda argv: compare_runs.make_parser().parse_args(argv),
        "convert_checkpoint.py": convert_checkpoint.parse_args,
        "evaluate_tqdm.py": lambda argv: evaluate_tqdm.make_parser().parse_args(argv),
        "export_tqdm.py": lambda argv: export_tqdm.make_parser().parse_args(argv),
        "predict.py": lambda argv: predict.make_parser().parse_args(argv),
        "report.py": lambda argv: report.make_parser().parse_args(argv),
        "train.py": train.parse_args,
    }
    seen = 0
    for command in commands:
        words = shlex.split(command)
        if words[0] == "python" and words[1] in parsers:
            parsers[words[1]](words[2:])
            seen += 1
    assert seen >= 12
    options = re.findall(r"accelerate launch train.py (--[^`#\n]*)", README)
    assert options
    for line in options:
        train.parse_args(shlex.split(line))


def test_the_data_commands_run_on_the_examples(checkout):
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("python dataset_scripts/") and "~" not in line]
    assert len(commands) == 4
    for command in commands:
        words = shlex.split(command)
        result = subprocess.run([sys.executable, ROOT / words[1], *words[2:]], capture_output=True, text=True)
        # The three frames are of the drive that the example was trained on, and the audit says so.
        assert result.returncode == ("audit_splits" in command), result.stderr
        assert "audit_splits" not in command or "LEAKS: same scene 1" in result.stdout


def test_the_first_commands_are_install_and_train_then_the_tests():
    first, second = blocks("bash")[:2]
    assert first.strip() == "pip install -e . && accelerate launch train.py"
    assert second.strip() == 'pip install -e ".[test]" && python -m pytest'
    # CI runs the second one, word for word but for the quiet option.
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert 'pip install --quiet -e ".[test]"' in ci and "python -m pytest" in ci


def test_the_file_map_is_complete():
    listed = set(re.findall(r"`([a-z0-9_]+\.py)[` ]", README[README.index("## Files") :]))
    scripts = {file.name for file in (ROOT / "dataset_scripts").glob("*.py")}
    assert listed - scripts == {file.name for file in ROOT.glob("*.py")} - {"setup.py"}
    assert all((ROOT / link).exists() for link in re.findall(r"\]\((?!http)(.*?)\)", README))
