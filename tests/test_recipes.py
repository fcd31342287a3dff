"""Every recipe: its commands pass the real parsers with the published values, its header says cost and figures."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from shard_helpers import LISTS, orfd, prepare

from tqdm_seg.commands import COMMANDS, named
from tqdm_seg.configuration_tqdm import PRESETS, TqdmConfig
from tqdm_seg.data.options import PrepareOptions
from tqdm_seg.deploy.convert import parse_args as convert_args
from tqdm_seg.evaluation.evaluate import make_parser as evaluate_parser
from tqdm_seg.evaluation.groups import read_attributes
from tqdm_seg.evaluation.sets import parse_set
from tqdm_seg.layers_tqdm import TqdmBaseModel
from tqdm_seg.program import parse
from tqdm_seg.train import parse_args

ROOT = Path(__file__).parent.parent
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.sh"))}
STREET = [name for name in RECIPES if name.startswith(("gta5", "cityscapes", "synthia"))]
LAUNCHERS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
ONLY_FIGURE = "68.9"  # the one number of the paper that was at hand, for gta5_eva02_l on Cityscapes

# The published settings, by option of train.py.
PUBLISHED = {
    "lr": 1e-5, "weight_decay": 1e-4, "min_lr": 1e-6, "vision_lr_mult": 0.1, "steps": 20000, "warmup_steps": 1500,
    "batch_size": 8, "accumulation": 1, "crop": 512, "seed": 2023, "save_every": 2000, "eval_every": 2000,
    "sampling": "rare-class", "temperature": 100, "min_pixels": 3000, "resize": "whole", "loss_counts": "published",
    "vision": "full", "clip_norm": 0, "ema": 0, "mixed_precision": None, "no_embedding_decay": False,
    "no_text_attention": False, "random_queries": False,
}  # fmt: skip
CITYSCAPES = {"lr": 1e-4, "weight_decay": 1e-5, "no_embedding_decay": True}
BOX = [1024, 2048]
# Where things are: --data, --eval-data, --eval-box.
PLACES = {
    "gta5": ("data/gta5", "data/cityscapes", BOX),
    "synthia": ("data/synthia", "data/cityscapes", BOX),
    "cityscapes": ("data/cityscapes", None, BOX),
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

# Stands for python and accelerate: notes its arguments; a training leaves a model folder.
STUB = """#!/usr/bin/env bash
printf '%s\\n' "$(basename "$0") ${*@Q}" >> "$LOG"
case "$*" in
*train.py*) mkdir -p "$RUN/model" ;;
*audit_splits.py*) touch "$RUN/leaks.csv"; exit 1 ;;
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
    """The commands that a recipe calls, as lists of words, with nothing made yet; paths in `folder` relative to it."""
    for stub in ("python", "accelerate"):
        program(folder / "bin" / stub, STUB)
    places = {"RAW": "raw", "DATA": "data", "START": "models/start", "RUN": "runs/it"}
    environment = {key: str(folder / place) for key, place in places.items()}
    environment |= {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "LOG": str(folder / "log")}
    subprocess.run(["bash", RECIPES[name], *options], env=os.environ | environment | variables, check=True)
    words = [shlex.split(line.replace(f"{folder}/", "")) for line in (folder / "log").read_text().splitlines()]
    return [line[1:] if line[0] == "python" else line for line in words]


def of_program(commands: list[list[str]], program: str) -> list[list[str]]:
    """Arguments of every call of a program."""
    return [words[words.index(found) + 1 :] for words in commands for found in words if found.endswith(program)]


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> dict[str, list[list[str]]]:
    """Commands of every recipe."""
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


def prepare_options(name: str, argv: list[str]) -> PrepareOptions:
    """The options that a program of dataset_scripts/ makes of its command line."""
    return parse(named(COMMANDS[name.replace("_", " ")].options), "", argv)


# -- what is there --------------------------------------------------------------------------------------


def test_every_published_setting_has_a_recipe():
    street = {f"{source}_{tower}" for source in ("gta5", "cityscapes", "synthia") for tower in PRESET_OF}
    assert set(RECIPES) == street | {"orfd_clip_vit_b", "road3d_clip_vit_b"}
    assert all(os.access(path, os.X_OK) for path in RECIPES.values())


@pytest.mark.parametrize("name", RECIPES)
def test_header_states_setting_data_bill_and_figures(name):
    parts = header(name)
    assert parts.keys() >= {"Title", "Setting", "Data", "Bill", "Expected", "Ours"}
    assert "not measured" in parts["Bill"] and parts["Ours"] == "not measured yet"
    programs = re.findall(r"prepare_\w+\.py", parts["Data"])
    assert programs and all((ROOT / "dataset_scripts" / program).is_file() for program in programs)
    if name in STREET:
        assert "2407.09033" in parts["Expected"] and "not at hand" in parts["Expected"]
    else:
        assert "nothing was published" in parts["Expected"]
    figures = re.findall(r"\d+\.\d+(?! *\d*033)", parts["Expected"].replace("2407.09033", ""))
    assert figures == ([ONLY_FIGURE] if name == "gta5_eva02_l" else [])


def test_the_table_lists_every_recipe_and_no_other_figure():
    text = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    rows = {match[1]: match[0] for match in re.finditer(r"^\| `(\w+)\.sh` \|.*$", text, re.MULTILINE)}
    assert rows.keys() == RECIPES.keys()
    for name, row in rows.items():
        assert re.findall(r"\d+\.\d+", row) == ([ONLY_FIGURE] if name == "gta5_eva02_l" else [])
        pairs = re.findall(r"(\S+) / (\S+)", row)
        assert len(pairs) == len(TESTS[setting(name)[0]]) - (name == "road3d_clip_vit_b")
        assert {ours for _, ours in pairs} == {"-"}  # as long as every header says "not measured yet"
    for file in re.findall(r"`(accelerate/\w+\.yaml)`", text):
        assert (ROOT / "recipes" / file) in LAUNCHERS


@pytest.mark.parametrize("name", RECIPES)
def test_bash_accepts_it_and_lines_are_short(name):
    subprocess.run(["bash", "-n", RECIPES[name]], check=True)
    text = RECIPES[name].read_text(encoding="utf-8")
    assert "\nset -euo pipefail\n" in text and max(map(len, text.splitlines())) <= 120


# -- what it runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_training_has_the_published_values(name, commands):
    source, tower = setting(name)
    (argv,) = of_program(commands[name], "train.py")
    args = vars(parse_args(argv))
    expected = PUBLISHED | (CITYSCAPES if source == "cityscapes" else {})
    assert {option: args[option] for option in expected} == expected
    assert (args["data"], args["eval_data"], args["eval_box"]) == PLACES[source]
    assert (args["model"], args["out"], args["push_to_hub"]) == ("models/start", "runs/it", None)
    # The tower of EVA02 has no paths to drop, so there the option would be without effect.
    rate = TqdmConfig.from_preset(PRESET_OF[tower]).vision_config.drop_path_rate
    assert args["noisy_reference"] == (rate > 0)


@pytest.mark.parametrize("name", RECIPES)
def test_training_names_only_what_differs_from_the_defaults(name, commands):
    (argv,) = of_program(commands[name], "train.py")
    defaults, args = vars(parse_args([])), vars(parse_args(argv))
    named = {word[2:].replace("-", "_") for word in argv if word.startswith("--")}
    assert not [option for option in named if args[option] == defaults[option]]


@pytest.mark.parametrize("name", RECIPES)
def test_start_model_is_the_preset_with_pretrained_towers(name, commands):
    (argv,) = of_program(commands[name], "convert_checkpoint.py")
    args = convert_args(argv)
    assert (args.init, args.out, args.seed) == (PRESET_OF[setting(name)[1]], "models/start", 2023)
    assert args.init in PRESETS and args.classes is None  # train.py gives the model the classes of the data
    assert (args.source, args.origin) == {
        "clip_vit_b16": ("openai/clip-vit-base-patch16", "transformers"),
        "eva02_clip_l14": ("EVA02-L-14-336:merged2b_s6b_b61k", "open_clip"),
    }[args.init]


@pytest.mark.parametrize("name", RECIPES)
def test_all_data_is_prepared_with_the_published_choices(name, commands, monkeypatch):
    made = {}
    for words in commands[name]:
        if match := re.search(r"(prepare_\w+)\.py$", words[0]):
            args = prepare_options(match[1], words[1:])
            made[str(args.out)] = args
            published = {
                "splits": "robustnet",
                "map": "robustnet",
                "unreachable": "merged",
                "link": False,
                "jpeg": None,
            }
            assert all(value == published[option] for option, value in vars(args).items() if option in published)
            assert args.root.name == args.out.name
    (training,) = of_program(commands[name], "train.py")
    args = parse_args(training)
    tested = {f"data/{target}" for target in TESTS[setting(name)[0]]}
    assert made.keys() == {args.data, args.eval_data or args.data} | tested


@pytest.mark.parametrize("name", RECIPES)
def test_the_last_model_is_tested_on_every_target_as_published(name, commands):
    found = {}
    for argv in of_program(commands[name], "evaluate_tqdm.py"):
        args = evaluate_parser().parse_args(argv)
        assert args.model == "runs/it/model" and args.out.parent == Path("runs/it")
        assert args.protocol == ("published" if name in STREET else "model")
        for source in map(parse_set, args.data):
            assert (source.folder, source.box) == (f"data/{source.name}", None)
            found[source.name] = source.split
    assert found == TESTS[setting(name)[0]]


@pytest.mark.parametrize("name", RECIPES)
def test_the_commands_of_the_header_run_this_recipe_with_real_options(name, commands):
    (training,) = of_program(commands[name], "train.py")
    lines = re.findall(r"^#   (.*?)bash recipes/(\w+)\.sh *(.*)$", RECIPES[name].read_text("utf-8"), re.MULTILINE)
    assert {recipe for _, recipe, _ in lines} == {name}
    parsed = [parse_args(training + shlex.split(options)) for _, _, options in lines]
    assert any(args.vision == "frozen" for args in parsed)
    if name != "road3d_clip_vit_b":
        assert any(args.gradient_checkpointing for args in parsed)
        assert any(args.mixed_precision == "bf16" for args in parsed) and any(args.resume for args in parsed)
        # Adapters start from nothing and learn at 1e-4.
        rates = [args.lr * args.vision_lr_mult for args in parsed if args.vision == "lora"]
        assert rates == [pytest.approx(1e-4)]
    for variables, _, _ in lines:
        for file in re.findall(r"\S+\.yaml", variables.replace('"', " ")):
            assert ROOT / file in LAUNCHERS


def test_further_options_and_the_launcher_reach_the_training(tmp_path):
    launcher = "--config_file recipes/accelerate/ddp.yaml"
    (words,) = [
        words for words in recorded("gta5_eva02_l", tmp_path, "--crop", "64", LAUNCH=launcher) if "train.py" in words
    ]
    assert words[:5] == ["accelerate", "launch", *launcher.split(), "train.py"]
    assert parse_args(words[5:]).crop == 64


def test_what_is_there_is_not_made_again(tmp_path):
    for made in ("data/gta5", "data/cityscapes", "data/bdd100k", "data/mapillary", "models/start"):
        (tmp_path / made).mkdir(parents=True)
        (tmp_path / made / "manifest.json").touch()
    programs = [words[0] for words in recorded("gta5_clip_vit_b", tmp_path)]
    assert programs == ["accelerate", "evaluate_tqdm.py"]


# -- runs -----------------------------------------------------------------------------------------------


@pytest.fixture
def variables(tmp_path) -> dict[str, str]:
    """Environment under which a recipe runs the installed programs, reads and writes in `tmp_path` only.

    ORFD is prepared in miniature; its training scene is also one of two of Road3D's download.
    """
    for scene, split in (("x0613_1627", "training"), ("y0609_1947", "validation"), ("y0613_1220", "testing")):
        orfd(tmp_path / "raw" / "orfd", scene=scene, split=split, frames=2, size=96)
    for scene, digit in (("x0613_1627", "1"), ("y0613_1242", "2")):
        folder = orfd(tmp_path / "raw" / "road3d", scene=scene, split="testing", frames=2) / "testing" / scene
        for file in sorted(folder.rglob("*.png")):
            file.rename(file.with_name(digit + file.name[1:]))  # no two frames have the same time
    prepare("orfd", tmp_path / "raw" / "orfd", tmp_path / "data" / "orfd")
    (tmp_path / "start").mkdir()
    places = {"RAW": "raw", "DATA": "data", "START": "start", "RUN": "run"}
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings = {"PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return os.environ | settings | {name: str(tmp_path / place) for name, place in places.items()}


def test_dry_run_of_a_recipe_tells_the_plan(tmp_path, variables):
    program(tmp_path / "bin" / "accelerate", f'#!/bin/sh\nshift; exec {sys.executable} "$@"\n')  # one process, sooner
    options = ["--dry-run", "--model", "tiny", "--crop", "64", "--workers", "0", "--batch-size", "2"]
    command = ["bash", RECIPES["orfd_clip_vit_b"], *options]
    result = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.search(r"model: \d+\.\d+ M parameters, \d+\.\d% of them trained", result.stdout)
    assert "20000 steps of 2 images" in result.stdout
    assert re.search(r"memory per process: \d+\.\d\d GiB", result.stdout)
    assert not (tmp_path / "run").exists()


def test_road3d_scenes_that_were_trained_on_are_told_from_the_others(tmp_path, variables):
    (tmp_path / "run" / "model").mkdir(parents=True)
    # Everything is real but for the test of the model, which is none.
    stub = f'#!/bin/sh\ncase "$*" in evaluate_tqdm.py*) echo TEST "$@";; *) exec {sys.executable} "$@";; esac\n'
    program(tmp_path / "bin" / "python", stub)
    result = subprocess.run(["bash", RECIPES["road3d_clip_vit_b"]], env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "LEAKS: same scene 1" in result.stdout and "TEST evaluate_tqdm.py" in result.stdout
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
    assert "Untested on GPUs" in path.read_text(encoding="utf-8")
