"""The layout: who may import whom, and where files lie."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tqdm_seg"
# Every group may import itself and the groups named here.
SHIPPED, BASE = "shipped", {"program", "commands", "__init__", "shipped"}
DATA = BASE | {"data"}
DEPLOY = DATA | {"deploy", "env"}
EVALUATION = DEPLOY | {"evaluation"}
ARROWS = {
    SHIPPED: set(), "program": set(), "__init__": {"commands"}, "commands": {"program"}, "data": DATA, "deploy": DEPLOY,
    "env": {"__init__", "program"}, "evaluation": EVALUATION, "reports": EVALUATION, "training": EVALUATION,
    "train": EVALUATION | {"reports", "training"}, "ablate": EVALUATION | {"reports", "training", "train"},
    "cli": {"__init__", "commands", "program"},
}  # fmt: skip
# What a model downloaded from the Hub may need; other libraries are imported inside functions.
HUB_LIBRARIES = {"torch", "transformers", "huggingface_hub"}
IMAGE_LIBRARIES = HUB_LIBRARIES | {"torchvision", "PIL", "numpy"}
SHIPS = sorted(path.stem for path in ROOT.glob("*_tqdm.py"))


def source(module: str) -> Path:
    """File of a module of the package, by its name without `tqdm_seg.`."""
    if module in SHIPS or module == "train":
        return ROOT / f"{module}.py"
    path = PACKAGE.joinpath(*module.split(".")) if module != "__init__" else PACKAGE
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def modules() -> list[str]:
    """All modules of the package, the root's among them."""
    inside = [path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")]
    return [*SHIPS, "train", *sorted(name.removesuffix("/__init__").replace("/", ".") for name in inside)]


def imported(module: str) -> set[str]:
    """Modules of our own that it imports, also inside functions; not those for type checkers alone."""
    tree = ast.parse(source(module).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    package = module.split(".") if source(module).name == "__init__.py" else module.split(".")[:-1]
    package = ["tqdm_seg", *(part for part in package if part != "__init__")]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            place = ".".join([*above, *([node.module] if node.module else [])])
            found |= {name if source_exists(name := f"{place}.{alias.name}") else place for alias in node.names}
    ours = {name.removeprefix("tqdm_seg.") for name in found if name.startswith("tqdm_seg.")}
    return ours | ({"__init__"} if "tqdm_seg" in found else set())


def source_exists(name: str) -> bool:
    """Whether `tqdm_seg.X` is a module and no name in one."""
    return name.startswith("tqdm_seg.") and source(name.removeprefix("tqdm_seg.")).is_file()


def group(module: str) -> str:
    """The part of the house that a module belongs to."""
    return SHIPPED if module in SHIPS else module.split(".")[0]


@pytest.mark.parametrize("module", modules())
def test_imports_point_one_way(module):
    allowed = ARROWS[group(module)] | {group(module)}
    assert {name for name in imported(module) if group(name) not in allowed} == set()


def test_no_modules_import_each_other_in_a_circle():
    try:
        TopologicalSorter({module: imported(module) - {module} for module in modules()}).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("module", SHIPS)
def test_shipped_modules_load_with_few_libraries(module):
    """At the top of a module; what single methods import is theirs."""
    libraries = IMAGE_LIBRARIES if module in ("image_processing_tqdm", "images_tqdm") else HUB_LIBRARIES
    for node in ast.parse(source(module).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = {node.module.split(".")[0]}
        else:
            continue
        assert names <= libraries | set(sys.stdlib_module_names), f"{module} imports {names}"


def test_only_what_ships_bears_the_suffix():
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    files = [Path(name) for name in tracked.stdout.split("\n") if name.endswith(".py") and (ROOT / name).is_file()]
    at_root = {path.stem for path in ROOT.glob("*.py")}
    assert at_root == {*SHIPS, "train", "setup"}
    bearers = {path for path in files if path.stem.endswith("_tqdm") and len(path.parts) > 1}
    assert bearers <= {Path("metrics/mean_iou_tqdm/mean_iou_tqdm.py")}  # a metric is named after its folder


def test_every_root_module_has_a_stub_of_one_line():
    stubs = {path.stem: path.read_text(encoding="utf-8") for path in PACKAGE.glob("*.pyi")}
    assert stubs == {name: f"from {name} import *\n" for name in (*SHIPS, "train")}


@pytest.mark.parametrize("module", ["files", "palette", "scenes", "images", "options"])
def test_what_predicting_needs_of_data_imports_no_heavy_library(module):
    heavy = "'cv2', 'datasets', 'pyarrow', 'torch', 'pandas'"
    code = f"import sys, tqdm_seg.data.{module}; print([name for name in ({heavy}) if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
