"""Every recipe: its commands pass the real parsers with the published values, its figures are those of the paper."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from shard_helpers import LISTS, orfd
from shard_helpers import prepare as prepare_dataset

from tqdm_seg.commands import COMMANDS, named, start
from tqdm_seg.configuration_tqdm import PRESETS, TqdmConfig
from tqdm_seg.evaluation.groups import read_attributes
from tqdm_seg.evaluation.options import parse_set
from tqdm_seg.layers_tqdm import TqdmBaseModel
from tqdm_seg.program import parse
from tqdm_seg.training.options import AblateOptions, TrainOptions

ROOT = Path(__file__).parent.parent
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.sh"))}
STREET = [name for name in RECIPES if name.startswith(("gta5", "cityscapes", "synthia"))]
LAUNCHERS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
# mIoU of the main table of arXiv 2407.09033, by recipe.
FIGURES = {
    "gta5_clip_vit_b": {"Cityscapes": "57.50", "BDD100K": "47.66", "Mapillary": "59.76"},
    "gta5_eva02_l": {"Cityscapes": "68.88", "BDD100K": "59.18", "Mapillary": "70.10"},
    "cityscapes_clip_vit_b": {"BDD100K": "50.54", "Mapillary": "65.74"},
    "cityscapes_eva02_l": {"BDD100K": "64.72", "Mapillary": "76.15"},
}

# The published settings, by option of train.
PUBLISHED = {
    "lr": 1e-5, "weight_decay": 1e-4, "min_lr": 1e-6, "vision_lr_mult": 0.1, "steps": 20000, "warmup_steps": 1500,
    "batch_size": 8, "accumulation": 1, "crop": 512, "seed": 2023, "save_every_steps": 2000, "eval_every_steps": 2000,
    "sampling": "rare-class", "temperature": 100, "min_pixels": 3000, "resize": "whole", "loss_counts": "published",
    "vision": "full", "clip_norm": 0, "ema": 0, "precision": None, "no_embedding_decay": False,
    "no_text_attention": False, "random_queries": False,
}  # fmt: skip
CITYSCAPES = {"lr": 1e-4, "weight_decay": 1e-5, "no_embedding_decay": True}
SIZE = (1024, 2048)
# Where things are: --data, --eval-data, --eval-size.
PLACES = {
    "gta5": ("data/gta5", "data/cityscapes", SIZE),
    "synthia": ("data/synthia", "data/cityscapes", SIZE),
    "cityscapes": ("data/cityscapes", None, SIZE),
    "orfd": ("data/orfd", None, None),
    "road3d": ("data/orfd", None, None),
}
PRESET_OF = {"clip_vit_b": "clip_vit_b16", "eva02_l": "eva02_clip_l14"}
# Tested on: name and split, None for validation.
TESTS = {
    "gta5": {"cityscapes": None, "bdd100k": None, "mapillary": None},
    "synthia": {"cityscapes": None, "bdd100k": None, "mapillary": None},
    "cityscapes": {"bdd100k": None, "mapillary": None},
    "orfd": {"orfd": "test"},
    "road3d": {"orfd": "test", "road3d": "test"},  # by way of orfd_clip_vit_b.sh
}

# Stands for python and accelerate: notes its arguments; a training leaves a model folder, an audit finds leaks.
STUB = """#!/usr/bin/env bash
printf '%s\\n' "$(basename "$0") ${*@Q}" >> "$LOG"
case "$*" in
-c*) echo frames ;;
*tqdm_seg.train*) mkdir -p "$RUN/model" ;;
*tqdm_seg.cli\\ audit*) touch "$RUN/leaks.csv"; exit 3 ;;
esac
"""


def setting(name: str) -> tuple[str, str]:
    """Data set that a recipe is named after, and its vision tower."""
    return tuple(name.split("_", 1))


def program(path: Path, text: str) -> None:
    """Writes a script that can be run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def recorded(name: str, folder: Path, *options: str, **variables: str) -> list[list[str]]:
    """The commands that a recipe calls in `folder`, as lists of words: accelerate's, and those of tqdm-seg."""
    for stub in ("python", "accelerate"):
        program(folder / "bin" / stub, STUB)
    environment = {"START": "models/start", "RUN": "runs/it", "LOG": str(folder / "log")}
    environment["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
    subprocess.run(["bash", RECIPES[name], *options], cwd=folder, env=os.environ | environment | variables, check=True)
    words = [shlex.split(line) for line in (folder / "log").read_text().splitlines()]
    return [line[3:] if line[:3] == ["python", "-m", "tqdm_seg.cli"] else line for line in words]


def options_of(commands: list[list[str]], command: str) -> list[Any]:
    """The options of every call of a command of tqdm-seg."""
    start = ["accelerate", "launch", "-m", "tqdm_seg.train"] if command == "train" else command.split()
    calls = [words[len(start) :] for words in commands if words[: len(start)] == start]
    return [parse(named(COMMANDS[command].options), None, argv) for argv in calls]


def train_options(argv: list[str]) -> TrainOptions:
    return parse(TrainOptions, None, argv)


def train_argv(commands: list[list[str]]) -> list[str]:
    """Arguments of the one call of train."""
    (argv,) = [words[words.index("tqdm_seg.train") + 1 :] for words in commands if "tqdm_seg.train" in words]
    return argv


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> dict[str, list[list[str]]]:
    """Commands of every recipe, started where nothing is made yet."""
    return {name: recorded(name, tmp_path_factory.mktemp(name)) for name in RECIPES}


def header(name: str) -> dict[str, str]:
    """Paragraphs of a recipe's comment block by their first word."""
    block = re.search(r"^#!.*\n((?:#.*\n)+)", RECIPES[name].read_text(encoding="utf-8"))[1]
    found, current = {}, "Title"
    for line in block.splitlines():
        if match := re.match(r"# ([A-Z][a-z]+)  +(.*)", line):
            current, line = match[1], match[2]
        elif line == "#":
            current = "Usage"
        found[current] = f"{found.get(current, '')} {line.lstrip('# ')}".strip()
    return found


# -- what is there --------------------------------------------------------------------------------------


def test_every_published_setting_has_a_recipe():
    street = {f"{source}_{tower}" for source in ("gta5", "cityscapes", "synthia") for tower in PRESET_OF}
    assert set(RECIPES) == street | {"orfd_clip_vit_b", "road3d_clip_vit_b"}
    assert all(os.access(path, os.X_OK) for path in RECIPES.values())


@pytest.mark.parametrize("name", RECIPES)
def test_header_states_setting_data_cost_and_the_published_figures(name):
    parts = header(name)
    assert parts.keys() >= {"Title", "Setting", "Data", "Cost", "Expected", "Ours"}
    assert all(f"prepare {used}" in COMMANDS for used in re.findall(r"tqdm-seg prepare (\w+)", parts["Data"]))
    assert dict(re.findall(r"(\w+) (\d\d\.\d\d)(?=,| mIoU)", parts["Expected"])) == FIGURES.get(name, {})
    assert ("2407.09033" in parts["Expected"]) == (name in FIGURES)


def table_rows(page: str) -> list[list[str]]:
    """Cells of all Markdown tables of a page."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_the_tables_have_every_recipe_and_the_published_figures():
    rows = {cells[0].removesuffix(".sh"): cells[2:] for cells in table_rows("recipes/README.md")}
    assert rows.keys() >= RECIPES.keys()
    for name in RECIPES:
        published = [cell.split(" / ")[0] for cell in rows[name] if cell and not cell.startswith("none")]
        assert published == list(FIGURES.get(name, {}).values())
    towers = {"clip_vit_b": "CLIP ViT-B/16", "eva02_l": "EVA02-CLIP-L/14"}
    in_readme = {(cells[0], cells[1].lower()): cells[2:5] for cells in table_rows("README.md")}
    for name, figures in FIGURES.items():
        source, tower = setting(name)
        cells = in_readme[towers[tower], source]
        assert [cell.split(" / ")[0] for cell in cells if cell] == list(figures.values())


@pytest.mark.parametrize("path", [*RECIPES.values(), ROOT / "recipes/steps.bash"], ids=lambda path: path.stem)
def test_bash_accepts_it_and_lines_are_short(path):
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 120
    assert path.suffix != ".sh" or "\nset -euo pipefail\n" in text


# -- what it runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_training_has_the_published_values(name, commands):
    source, tower = setting(name)
    options = train_options(train_argv(commands[name]))
    expected = PUBLISHED | (CITYSCAPES if source == "cityscapes" else {})
    assert {option: getattr(options, option) for option in expected} == expected
    assert (*options.data, options.eval_data, options.eval_size) == PLACES[source]
    assert (options.model, options.out, options.push_to_hub) == ("models/start", Path("runs/it"), None)
    # The tower of EVA02 has no paths to drop, so there the option would be without effect.
    rate = TqdmConfig.from_preset(PRESET_OF[tower]).vision_config.drop_path_rate
    assert options.teacher_drop_path == (rate > 0)


@pytest.mark.parametrize("name", RECIPES)
def test_training_names_only_what_differs_from_the_defaults(name, commands):
    argv = train_argv(commands[name])
    options = train_options(argv)
    chosen = {word[2:].replace("-", "_") for word in argv if word.startswith("--")}
    assert not [option for option in chosen if getattr(options, option) == getattr(TrainOptions(), option)]


@pytest.mark.parametrize("name", RECIPES)
def test_start_model_is_the_preset_with_pretrained_towers(name, commands):
    (options,) = options_of(commands[name], "convert")
    assert (options.init, str(options.out), options.seed) == (PRESET_OF[setting(name)[1]], "models/start", 2023)
    assert options.init in PRESETS and options.class_names is None  # train gives the model the classes of the data
    (argv,) = [words for words in commands[name] if words[0] == "convert"]
    assert {
        "clip_vit_b16": {"openai/clip-vit-base-patch16", "transformers"},
        "eva02_clip_l14": {"EVA02-L-14-336:merged2b_s6b_b61k", "open_clip"},
    }[options.init] <= set(argv)


@pytest.mark.parametrize("name", RECIPES)
def test_all_data_is_prepared_with_the_published_choices(name, commands):
    published = {"splits": "robustnet", "map": "robustnet", "unreachable": "merged", "link": False, "jpeg": None}
    made = set()
    for source in {words[1] for words in commands[name] if words[0] == "prepare"}:
        (options,) = options_of(commands[name], f"prepare {source}")
        assert all(value == published[option] for option, value in vars(options).items() if option in published)
        assert (options.root, options.out) == (Path("downloads", source), Path("data", source))
        made.add(str(options.out))
    training = train_options(train_argv(commands[name]))
    tested = {f"data/{target}" for target in TESTS[setting(name)[0]]}
    assert made == {*training.data, training.eval_source} | tested


@pytest.mark.parametrize("name", RECIPES)
def test_the_last_model_is_tested_on_every_target_as_published(name, commands):
    found = {}
    for options in options_of(commands[name], "evaluate"):
        assert str(options.model) == "runs/it/model" and options.out.parent == Path("runs/it")
        assert options.protocol == ("published" if name in STREET else "model")
        for source in map(parse_set, options.data):
            assert source.folder == f"data/{source.name}"
            found[source.name] = source.split
    assert found == TESTS[setting(name)[0]]


@pytest.mark.parametrize("name", RECIPES)
def test_the_commands_of_the_header_run_this_recipe_with_real_options(name, commands):
    training = train_argv(commands[name])
    lines = re.findall(r"^#   (.*?)bash recipes/(\w+)\.sh *(.*)$", RECIPES[name].read_text("utf-8"), re.MULTILINE)
    assert {recipe for _, recipe, _ in lines} == {name}
    parsed = [train_options(training + shlex.split(options)) for _, _, options in lines]
    assert any(options.vision == "frozen" for options in parsed) and any(options.dry_run for options in parsed)
    # Adapters start from nothing and learn at 1e-4.
    assert all(o.lr * o.vision_lr_mult == pytest.approx(1e-4) for o in parsed if o.vision == "lora")
    for variables, _, _ in lines:
        for file in re.findall(r"\S+\.yaml", variables.replace('"', " ")):
            assert ROOT / file in LAUNCHERS


def test_further_options_and_the_launcher_reach_the_training(tmp_path):
    launcher = "--config_file recipes/accelerate/ddp.yaml"
    found = recorded("gta5_eva02_l", tmp_path, "--crop", "64", LAUNCH=launcher)
    (words,) = [words for words in found if "tqdm_seg.train" in words]
    assert words[:6] == ["accelerate", "launch", *launcher.split(), "-m", "tqdm_seg.train"]
    assert train_options(words[6:]).crop == 64


def test_what_exists_is_not_made_again(tmp_path):
    for made in ("data/gta5", "data/cityscapes", "data/bdd100k", "data/mapillary", "models/start"):
        (tmp_path / made).mkdir(parents=True)
        (tmp_path / made / "manifest.json").touch()
    assert [words[0] for words in recorded("gta5_clip_vit_b", tmp_path)] == ["accelerate", "evaluate"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_dry_run_makes_and_tests_nothing(name, tmp_path):
    words = recorded(name, tmp_path, "--dry-run")
    assert [line[0] for line in words] == ["python", "accelerate"]  # python finds the example frames
    assert train_options(train_argv(words)).model == PRESET_OF[setting(name)[1]]


# -- runs -----------------------------------------------------------------------------------------------


@pytest.fixture
def variables(tmp_path) -> dict[str, str]:
    """Environment under which a recipe runs the real programs, reads and writes in `tmp_path` only."""
    places = {"RAW": "raw", "DATA": "data", "START": "start", "RUN": "run"}
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings = {"PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return os.environ | settings | {name: str(tmp_path / place) for name, place in places.items()}


@pytest.mark.slow
def test_dry_run_without_any_data_tells_the_plan(tmp_path, variables):
    program(tmp_path / "bin" / "accelerate", f'#!/bin/sh\nshift; exec {sys.executable} "$@"\n')  # one process, sooner
    options = ["--dry-run", "--model", "tiny", "--crop", "64", "--workers", "0", "--batch-size", "2"]
    command = ["bash", RECIPES["orfd_clip_vit_b"], *options]
    result = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"tqdm-seg prepare orfd {tmp_path}/raw/orfd --out {tmp_path}/data/orfd" in result.stdout
    assert re.search(r"\d+\.\d+ M parameters", result.stdout) and "20000 steps of 2 images" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


@pytest.mark.slow
def test_road3d_scenes_that_were_trained_on_are_told_from_the_others(tmp_path, variables):
    """ORFD is prepared in miniature; its training scene is also one of two of Road3D's download."""
    for scene, split in (("x0613_1627", "training"), ("y0609_1947", "validation"), ("y0613_1220", "testing")):
        orfd(tmp_path / "raw" / "orfd", scene=scene, split=split, frames=2, size=96)
    for scene, digit in (("x0613_1627", "1"), ("y0613_1242", "2")):
        folder = orfd(tmp_path / "raw" / "road3d", scene=scene, split="testing", frames=2) / "testing" / scene
        for file in sorted(folder.rglob("*.png")):
            file.rename(file.with_name(digit + file.name[1:]))  # no two frames have the same time
    prepare_dataset("orfd", tmp_path / "raw" / "orfd", tmp_path / "data" / "orfd")
    (tmp_path / "run" / "model").mkdir(parents=True)
    # Everything is real but for the test of the model, which is none.
    stub = f'#!/bin/sh\ncase "$*" in *evaluate*) echo TEST "$@";; *) exec {sys.executable} "$@";; esac\n'
    program(tmp_path / "bin" / "python", stub)
    command = ["bash", RECIPES["road3d_clip_vit_b"]]
    result = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "TEST -m tqdm_seg.cli evaluate" in result.stdout
    groups = {row["scene"]: row["seen"] for row in read_attributes(tmp_path / "run" / "seen.csv").values()}
    listed = (LISTS / "scenes/road3d_test_scenes.txt").read_text().split()
    assert groups == dict.fromkeys(listed, "no") | {"x0613_1627": "yes"}


def test_the_recipe_names_the_seen_scenes_of_the_list():
    seen = (LISTS / "scenes/road3d_orfd_overlap_scenes.txt").read_text().split()
    assert len(seen) == 3 and all(scene in header("road3d_clip_vit_b")["Setting"] for scene in seen)


# -- launching ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path):
    assert load_config_from_file(str(path)).mixed_precision == "no"  # "no" bare would be read as false
    args = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    args, _, _ = _validate_launch_command(args)
    assert (args.num_machines, args.num_processes) == {"ddp_multi_node": (2, 16)}.get(path.stem, (1, 2))
    assert (args.multi_gpu, args.use_fsdp) == ((False, True) if path.stem == "fsdp2" else (True, False))
    # The commands in its comment parse, and name this file.
    commands = re.findall(r"^#   accelerate launch (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    for command in commands:
        assert launch_command_parser().parse_args(shlex.split(command)).config_file == str(path.relative_to(ROOT))
    assert commands


def test_fsdp_wraps_what_the_model_must_not_split():
    path = ROOT / "recipes" / "accelerate" / "fsdp2.yaml"
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(path), "train.py"]))
    variables = prepare_multi_gpu_env(args)
    assert variables["FSDP_VERSION"] == "2" and variables["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    assert variables["FSDP_TRANSFORMER_CLS_TO_WRAP"].split(",") == TqdmBaseModel._no_split_modules


# -- experiments ----------------------------------------------------------------------------------------


EXPERIMENTS = sorted(path.stem for path in (ROOT / "recipes").glob("e[0-9]*.py"))


@pytest.fixture
def experiment(request, monkeypatch) -> Any:
    """The module of an experiment, as it is started in a folder of its own."""
    monkeypatch.syspath_prepend(ROOT / "recipes")
    return importlib.import_module(request.param)


@pytest.mark.parametrize("experiment", EXPERIMENTS, indirect=True)
def test_experiments_prepare_what_they_use_and_choose_by_the_held_back_part_alone(experiment):
    made = set()
    for command in experiment.PREPARATION:
        options = parse(named(COMMANDS[" ".join(command[:2])].options), None, command[2:])
        made.add(str(options.out))
    for command in experiment.ABLATIONS:
        options = parse(AblateOptions, None, command)
        assert options.eval_every_steps and options.eval_data is None and len(options.seeds) >= 3
        used = {*options.data, *(parse_set(text).folder for text in options.test)}
        assert used <= made and str(options.out).startswith("runs/")
    assert {"Setting", "Chosen", "Data", "Cost", "Figures"} <= set(re.findall(r"^[A-Z]\w+", experiment.__doc__, re.M))


@pytest.mark.parametrize("experiment", EXPERIMENTS, indirect=True)
def test_a_dry_run_of_an_experiment_names_what_is_missing_and_makes_nothing(experiment, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert experiment.main(experiment.PREPARATION, experiment.ABLATIONS, ["--dry-run"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == (
        ["to do first"] * len(experiment.PREPARATION) + ["then"] * len(experiment.ABLATIONS)
    )
    assert not list(tmp_path.iterdir())


def test_an_experiment_prepares_and_ends_at_the_first_failure(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    main, calls = importlib.import_module("experiment").main, []
    monkeypatch.setattr("tqdm_seg.cli.main", lambda words: calls.append(words[0]) or int(words[0] == "ablate"))
    assert main([["prepare", "ycor", "--out", "x"]], [["--out", "a"], ["--out", "b"]], []) == 1
    assert calls == ["prepare", "ablate"]


def test_committed_figures_follow_from_the_committed_counts(capsys):
    for folder in sorted((ROOT / "recipes" / "results").glob("*/ablation.json")):
        assert start("table", [str(folder.parent)]) == 0
        assert capsys.readouterr().out == (folder.parent / "ablation.md").read_text(encoding="utf-8")
