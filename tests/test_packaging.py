"""One importable package out of the flat files, and nothing that shadows a library."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of this checkout, built from a copy so that nothing is left behind in it."""
    copy = tmp_path_factory.mktemp("checkout")
    for file in [*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "LICENSE", ROOT / "README.md"]:
        (copy / file.name).write_bytes(file.read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, copy]
    subprocess.run(command, check=True)
    return next(out.glob("tqdm_segmentation-*.whl"))


def test_the_wheel_holds_the_flat_files_in_one_package(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {f"tqdm_seg/{file.name}" for file in ROOT.glob("*.py") if file.name != "setup.py"}
    assert any(name.endswith("/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_the_wheel_imports_outside_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import tqdm, tqdm_seg.modeling_tqdm as m, tqdm_seg.train, tqdm_seg.configuration_tqdm as c\n"
        f"assert m.__file__.startswith({str(tmp_path)!r}), m.__file__\n"
        "assert hasattr(tqdm, 'tqdm'), 'the progress bar is shadowed'\n"
        "print(m.TqdmForSemanticSegmentation(c.TqdmConfig.from_preset('tiny')).num_parameters() > 0)"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n{code}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.strip() == "True", result.stderr


def test_no_file_shadows_a_library():
    shadowing = ("tqdm", "datasets", "evaluate", "tokenizers", "accelerate", "transformers", "torch", "peft")
    assert not [n for n in shadowing if (ROOT / f"{n}.py").exists() or (ROOT / n).is_dir()]
    assert not (ROOT / "__init__.py").exists()


def test_the_data_that_tests_keep_stays_small():
    kept = subprocess.run(["git", "ls-files", "tests"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    files = [ROOT / name for name in kept] or [file for file in (ROOT / "tests").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files if file.suffix != ".py") <= 15e6
