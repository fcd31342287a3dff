"""What README and docs show works: Python runs, commands parse, the own-data commands run, links and files exist."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import micro_model
from PIL import Image

from tqdm_seg.commands import COMMANDS, named, start
from tqdm_seg.deploy.folder import save_model_folder
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.program import parse

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "recipes" / "README.md"]
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
LAUNCHERS = ("accelerate launch", "torchrun", "python")


def blocks(page: Path, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT[page], re.DOTALL | re.MULTILINE)
    return [block for found, block in fenced if found == language]


def shell_lines(page: Path) -> list[str]:
    """Commands of the bash blocks and those in backquotes, without comments, one by one."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`(tqdm-seg [a-z]+ (?![^`]*NAME|[^`]*--help)[^`]+)`", TEXT[page])
    return [part.strip() for line in lines for part in line.split("  #")[0].split("&&") if part.strip()]


def program_of(words: list[str]) -> tuple[str, list[str]] | None:
    """(name in COMMANDS, arguments) of a shell command, None for one of another program."""
    if words[0] == "tqdm-seg":
        length = 2 if words[1] == "prepare" else 1
        return " ".join(words[1 : 1 + length]), words[1 + length :]
    if " ".join(words).startswith(LAUNCHERS):
        for i, word in enumerate(words):
            if word == "train.py" or word == "tqdm_seg.train":
                return "train", words[i + 1 :]
            if word.startswith("tqdm_seg.") and word != "tqdm_seg.cli":
                return word.rpartition(".")[2], words[i + 1 :]
    return None


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A folder with the example frames, a model where the quick start leaves one, and images of one's own."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    save_model_folder(micro_model(window_size=None), TqdmImageProcessor(), tmp_path / "runs/quickstart/model")
    image = next((tmp_path / "examples").rglob("image_data/*.png"))
    shutil.copy(image, tmp_path / "photo.jpg")
    for split, count in (("train", 4), ("val", 2)):
        for kind in ("images", "masks"):
            (tmp_path / "my" / kind / split).mkdir(parents=True)
        for i in range(count):
            Image.open(image).convert("RGB").resize((64, 64)).save(tmp_path / f"my/images/{split}/{split}{i}.png")
            ids = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64) % 2
            Image.fromarray(ids).save(tmp_path / f"my/masks/{split}/{split}{i}.png")
    (tmp_path / "my/classes.txt").write_text("ground\npath\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_is_short():
    assert len(TEXT[README].splitlines()) <= 180


def test_the_first_commands_install_and_train_then_test():
    first, second = blocks(README, "bash")[:2]
    assert first.strip() == "pip install -e . && accelerate launch train.py"
    assert second.strip() == 'pip install -e ".[test]" && python -m pytest'
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert 'pip install --quiet -e ".[test]"' in ci and "python -m pytest" in ci


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_parses(page):
    programs = 0
    for line in shell_lines(page):
        words = shlex.split(line)
        if found := program_of(words):
            options = named(COMMANDS[found[0]].options)
            assert isinstance(parse(options, None, found[1]), options)
            programs += 1
        files = [word for word in words if re.fullmatch(r"[\w/.]+\.(py|sh|yaml)", word) and "*" not in word]
        assert all((ROOT / file).is_file() for file in files), line
    assert programs or page.name in ("exactness.md", "design.md", "CONTRIBUTING.md", "README.md")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in TEXT[page]], ids=lambda page: page.name)
def test_every_python_block_runs(page, checkout):
    for code in blocks(page, "python"):
        scope: dict = {}
        exec(code, scope)
        if "masks" in scope:
            assert scope["masks"] and scope["masks"].keys() <= set(micro_model().config.id2label.values())
        if "labels" in scope:
            assert scope["labels"].shape == (1, 224, 224)


@pytest.mark.slow
def test_the_commands_for_own_data_run(checkout):
    lines = [line for line in shell_lines(README) if "my/" in line or "mine" in line]
    assert len(lines) == 4
    small = ["--steps", "2", "--crop", "64", "--tracker", "none", "--overlays", "0", "--min-pixels", "100"]
    for line in lines:
        name, argv = program_of(shlex.split(line))
        assert start(name, [*argv, *(small if name == "train" else [])]) == 0, line
    assert (checkout / "runs/mine/evaluation/report.html").is_file()


@pytest.mark.slow
def test_the_data_commands_run_on_the_examples(checkout):
    lines = [line for line in shell_lines(ROOT / "docs/data.md") if line.startswith("tqdm-seg") and "~" not in line]
    assert len(lines) == 5
    (checkout / "tqdm_seg").symlink_to(ROOT / "tqdm_seg")
    for line in lines:
        name, argv = program_of(shlex.split(line))
        # The three frames are of the drive of the other set, and the published lists share three scenes.
        assert start(name, argv) == (3 if name == "audit" else 0), line


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


def tree_paths(block: str) -> set[str]:
    """Paths of a file tree, one per line, folders by two spaces of indentation."""
    folders: list[str] = []
    paths = set()
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        if not name.startswith("="):
            folders = [*folders[:depth], name]
            paths.add("".join(folders))
    return paths


def test_the_tree_of_the_design_page_names_every_file():
    tree = tree_paths(blocks(ROOT / "docs/design.md", "")[-1])
    files = [*ROOT.glob("*.py"), *(file for file in ROOT.glob("tqdm_seg/**/*.py") if file.stat().st_size)]
    assert {path for path in tree if path.endswith(".py")} == {f.relative_to(ROOT).as_posix() for f in files}
    assert all((ROOT / path).exists() for path in tree)


def test_the_tree_of_the_readme_names_every_file_at_the_root_and_every_folder():
    tree = tree_paths(blocks(README, "")[-1])
    folders = {
        f"{folder.relative_to(ROOT)}/" for folder in ROOT.glob("tqdm_seg/*") if (folder / "__init__.py").is_file()
    }
    folders |= {"recipes/", "benchmarks/", "metrics/", "tests/", "examples/", "docs/", "dataset_scripts/", "tqdm_seg/"}
    assert {path for path in tree if path.endswith("/")} == folders
    files = [*ROOT.glob("*.py"), *(file for file in ROOT.glob("tqdm_seg/*.py") if file.name != "__init__.py")]
    assert tree - folders == {file.relative_to(ROOT).as_posix() for file in files}
    assert all((ROOT / path).exists() for path in tree)
