"""The wheel holds what users without a checkout need, and works where no checkout is."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COPIED = ("metrics/", "examples/", "recipes/")


def run(*command: object, folder: Path, **variables: str) -> str:
    """Runs a command with the environment's libraries but without this checkout; what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    result = subprocess.run([*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def tracked() -> set[str]:
    """Files of the project, relative, without those that git ignores."""
    listed = run("git", "ls-files", "-co", "--exclude-standard", folder=ROOT).splitlines()
    return {name for name in listed if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the checkout, so that building leaves nothing behind."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in tracked():
        if name.startswith(("tqdm_seg/", *COPIED)) or "/" not in name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def build(folder: Path, out: Path) -> Path:
    """A wheel of a checkout or an unpacked sdist."""
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", out)
    run(sys.executable, "-m", "pip", "wheel", *options, folder, folder=folder)
    return next(out.glob("tqdm_segmentation-*.whl"))


def names(wheel: Path) -> set[str]:
    """Files of the package in a wheel."""
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def wheel(copy, tmp_path_factory) -> Path:
    return build(copy, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """A folder with the unpacked wheel, far from the checkout."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.mark.slow
def test_the_wheel_holds_the_package_the_shipped_modules_metric_and_examples(wheel):
    root = {f"tqdm_seg/{path.name}" for path in ROOT.glob("*.py") if path.name != "setup.py"}
    expected = root | {name for name in tracked() if name.startswith("tqdm_seg/") and not name.endswith(".pyi")}
    expected |= {f"tqdm_seg/{name}" for name in tracked() if name.startswith(COPIED)}
    assert names(wheel) == expected
    assert {"tqdm_seg/py.typed", "tqdm_seg/data/templates/dataset_card.md"} < expected
    assert wheel.stat().st_size < 12e6  # 10 MB, nearly all of it example frames


@pytest.mark.slow
def test_a_wheel_of_the_sdist_holds_the_same(copy, wheel, tmp_path):
    run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, folder=copy)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    again = build(next(path for path in tmp_path.iterdir() if path.is_dir()), tmp_path / "wheel")
    assert names(again) == names(wheel)


@pytest.mark.slow
def test_the_metadata_name_licence_readme_and_links(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = next(archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    for line in (
        "Name: tqdm-segmentation",
        "License-Expression: Apache-2.0",
        "Description-Content-Type: text/markdown",
    ):
        assert line in metadata
    assert metadata.count("Project-URL: ") >= 2 and "\nClassifier: Typing :: Typed" in metadata
    assert any(name.endswith("/LICENSE") for name in archive.namelist())


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_folder(site, tmp_path):
    code = (
        "import tqdm, tqdm_seg, tqdm_seg.modeling_tqdm as m, tqdm_seg.configuration_tqdm as c\n"
        f"assert m.__file__.startswith({str(site)!r}), m.__file__\n"
        "assert hasattr(tqdm, 'tqdm'), 'the progress bar is shadowed'\n"
        "print(m.TqdmForSemanticSegmentation(c.TqdmConfig.from_preset('tiny')).num_parameters() > 0)\n"
        "from tqdm_seg.data.files import example\n"
        "frames = example('frames')\n"
        "print(tqdm_seg.prepare_orfd(root=frames, out=__import__('pathlib').Path('out'), workers=1)['rows'])"
    )
    printed = run(sys.executable, "-c", code, folder=tmp_path, PYTHONPATH=str(site))
    assert printed.split("\n")[:2] == ["True", "{'validation': 3}"]
    packaged = site / "tqdm_seg" / "examples" / "orfd_mini"
    run(sys.executable, "-m", "tqdm_seg.data.check", packaged, "out", folder=tmp_path, PYTHONPATH=str(site))
    assert "train" in run(sys.executable, "-m", "tqdm_seg.cli", "--help", folder=tmp_path, PYTHONPATH=str(site))
    plan = run(sys.executable, "-m", "tqdm_seg.cli", "train", "--dry-run", folder=tmp_path, PYTHONPATH=str(site))
    assert "parameters" in plan  # of a model for the classes of the packaged examples


def test_the_lowest_versions_that_are_tested_are_the_minimums():
    def listed(file: str, pattern: str) -> dict[str, str]:
        return dict(re.findall(pattern, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE))

    minimums = listed("setup.py", r'"([\w-]+)>=([\d.]+)"')
    tested = listed("tests/constraints-lowest.txt", r"^([\w-]+)==([\d.]+)$")
    assert tested.keys() == minimums.keys() and len(tested) > 20
    assert not [name for name in tested if not f"{tested[name]}.".startswith(f"{minimums[name]}.")]


def test_no_file_shadows_a_library():
    shadowing = ("tqdm", "datasets", "evaluate", "tokenizers", "accelerate", "transformers", "torch", "peft")
    assert not [n for n in shadowing if (ROOT / f"{n}.py").exists() or (ROOT / n).is_dir()]
    assert not (ROOT / "__init__.py").exists()


def test_the_data_that_tests_keep_stays_small():
    files = [ROOT / name for name in tracked() if name.startswith("tests/") and not name.endswith(".py")]
    assert sum(file.stat().st_size for file in files) <= 15e6
