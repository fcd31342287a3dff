"""Bad inputs for every public entry point, each with a verdict by rule.

    python tests/bad_inputs.py [--only AREA] [--list]

clear            refused by one line of at most 300 characters that names the file or field and says what was expected
                 or what to do; a command ends with status 1 or 2; no file appears, changes or goes
obscure          refused, but not so
traceback        an exception that was not foreseen
accepted         no error at all
partial output   refused, and something was written or removed, other than what the case says is kept: of several
                 images predict keeps the results of those before and after a bad one, and goes on when called again
control          a good input that has to work, so that the bad ones of its kind are refused for what is bad in them
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import tempfile
import traceback
import typing
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from conftest import micro_config, micro_model
from evaluation_helpers import OFFROAD, SIZE, model_of
from PIL import Image
from safetensors.torch import load_file, save_file
from shard_helpers import orfd, photo, prepare, save
from transformers.utils import ModelOutput

import tqdm_seg
from tqdm_seg import configuration_tqdm
from tqdm_seg.commands import COMMANDS, named, start
from tqdm_seg.configuration_tqdm import TqdmConfig
from tqdm_seg.data.files import write_mark
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

Action = list | Callable[[], object]  # a command line, or a call
LONGEST, SECONDS = 300, 60
ROOT = Path(__file__).parents[1]
FORESEEN = (ValueError, TypeError, OSError, ImportError, FloatingPointError)
ADVICE = re.compile(
    r";|must|expected|choose|give|pass |use |not found|make|needs?\b|between|at least|at most|leave|see |or more|try",
    re.IGNORECASE,
)
BAD = ("obscure", "traceback", "accepted", "partial output", "control failed")


class Case(NamedTuple):
    """make: fills a folder of the case and gives what to do; names: one of them stands in a clear message.

    keeps: begin of the names of files that a refusal may leave.
    """

    area: str
    name: str
    make: Callable[[Path], Action]
    names: tuple[str, ...]
    control: bool = False
    keeps: str = "\0"


# ---- Verdicts


def snapshot(folder: Path) -> dict[str, str]:
    """A checksum of every file below the folder, and its folders."""
    found = {}
    for path in sorted(folder.rglob("*")):
        found[str(path.relative_to(folder))] = sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


class _Said(logging.Handler):
    """Log records from warnings up, which libraries write to the stderr that they found when they were imported."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += record.getMessage().splitlines()


def attempt(action: Action) -> tuple[object, list[str], BaseException | None]:
    """Exit status or result, what was said (lines of stderr and of the log), and the exception."""
    errors, said = io.StringIO(), _Said()
    loggers = [logging.getLogger(name) for name in (None, "transformers", "accelerate")]
    for logger in loggers:
        logger.addHandler(said)
    result, error = None, None
    try:
        with (
            contextlib.redirect_stderr(errors),
            contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            result = start(action[0], [str(word) for word in action[1:]]) if isinstance(action, list) else action()
    except SystemExit as end:
        result = end.code
    except BaseException as found:  # KeyboardInterrupt is the alarm
        error = found
    finally:
        for logger in loggers:
            logger.removeHandler(said)
    lines = [line for line in re.split(r"[\r\n]", errors.getvalue()) if line.strip() and not re.search(r"\d+%\|", line)]
    return result, lines + said.lines, error


def verdict(case: Case, folder: Path) -> tuple[str, str]:
    """The verdict on a case, and what was said."""
    action = case.make(folder)
    before = snapshot(folder)
    home = Path.cwd()
    os.chdir(folder)
    signal.alarm(SECONDS)
    try:
        result, lines, error = attempt(action)
    finally:
        signal.alarm(0)
        os.chdir(home)
    where = Path(traceback.extract_tb(error.__traceback__)[-1].filename) if error else ROOT
    foreseen = FORESEEN if not where.is_relative_to(ROOT) else (*FORESEEN, RuntimeError)
    told = "\n".join(lines) if error is None else f"{type(error).__name__}: {error}"
    failed = error is not None or (isinstance(action, list) and result not in (0, 3))  # 3: an audit found leaks
    if case.control:
        return ("control failed", told) if failed else ("control", "")
    if not failed:
        return "accepted", repr(result)[:80]
    if error is not None and (isinstance(error, KeyboardInterrupt) or not isinstance(error, foreseen)):
        return "traceback", f"{told} ({where.name}:{traceback.extract_tb(error.__traceback__)[-1].lineno})"
    if "not foreseen" in told or "Traceback" in told:
        return "traceback", told
    after = snapshot(folder)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    changed = {name for name in changed if not name.startswith(case.keeps)}
    if changed:
        return "partial output", f"{sorted(changed)[:4]}: {told}"
    lines = [line for line in lines if line.strip()] if error is None else str(error).splitlines()
    clear = (
        len(lines) == 1
        and len(lines[0]) <= LONGEST + len("error: ")
        and any(name.lower() in lines[0].lower() for name in case.names)
        and ADVICE.search(lines[0])
        and (error is not None or (result in (1, 2) and lines[0].startswith("error: ")))
    )
    return ("clear" if clear else "obscure"), told


# ---- Fixtures, made once


def fixtures(root: Path) -> None:
    """Good inputs of every kind: model, dataset, run, evaluation, export, images, masks, tables, checkpoints."""
    model_of(root / "model", OFFROAD, train=False)
    orfd(root / "raw", 4, "x_a", "training", 40)
    orfd(root / "raw", 3, "y_b", "validation", 40)
    prepare("orfd", root / "raw", root / "data")
    for name in ("0", "1"):
        photo(root / "images" / f"{name}.png", *SIZE)
        save(root / "masks" / f"{name}.png", np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) % 2)
    (root / "classes.txt").write_text("road\nsky\n")
    (root / "scenes.txt").write_text("y_b\n")
    (root / "attributes.csv").write_text("scene,weather\ny_b,rain\n")
    for argv in (train_line(root, root / "run"), evaluate_line(root, root / "evaluation")):
        status, lines, error = attempt(argv)
        assert status == 0, (lines, error)
    onnx_folder(root / "model", root / "export")


def train_line(root: Path, out: Path, *more: object, model: object = None, data: object = None) -> list:
    """A training of two steps."""
    line = "--steps 2 --batch-size 2 --crop 32 --warmup-steps 1 --min-pixels 5 --tracker none --overlays 0"
    line += " --save-every-steps 1 --log-every 1"
    fixed = ["train", "--model", model or root / "model", "--data", data or root / "data", "--out", out]
    return [*fixed, *line.split(), *more]


def evaluate_line(root: Path, out: Path, *more: object, model: object = None, data: object = None) -> list:
    """An evaluation of three frames in this process."""
    data = f"orfd={data or root / 'data'}"
    return ["evaluate", model or root / "model", "--data", data, "--out", out, "--workers", 0, *more]


def onnx_folder(model: Path, out: Path) -> None:
    """A folder as `export` writes it, around a graph that takes two channels of the image as scores."""
    out.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(model / name, out)
    helper, sides = onnx.helper, ["h", "w"]
    floats = functools.partial(helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["pixel_values", "two"], ["scores"], axis=1)],
        "window",
        [floats(name="pixel_values", shape=["b", 3, *sides])],
        [floats(name="scores", shape=["b", 2, *sides])],
        [onnx.numpy_helper.from_array(np.array([0, 1]), "two")],
    )
    model_proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    (out / "window.onnx").write_bytes(model_proto.SerializeToString())
    facts = {"input": "pixel_values", "output": "scores", "bound": 5e-4, "checks": {}, "opset": 20, "multiple_of": 8}
    (out / "export.json").write_text(json.dumps({**facts, "versions": {}}))
    write_mark(out, "export", sorted(path.name for path in out.iterdir()))


def copied(source: Path, folder: Path) -> Path:
    """A copy of a fixture in the folder of a case."""
    target = folder / source.name
    return Path(shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target))


# ---- Mutations

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 3500000\n"
NO_JSON = {
    "empty": b"",
    "blank": b" \n",
    "cut": None,
    "a list": b"[1, 2]",
    "null": b"null",
    "a text": b'"x"',
    "a number": b"7",
    "not JSON": b"{model: tqdm}",
    "bytes": b"\x89PNG\xff\x00\x01",
    "a pointer": POINTER,
}
NO_BINARY = {
    "empty": b"",
    "cut": None,
    "a pointer": POINTER,
    "zero bytes": bytes(5000),
    "text": b"no such thing\n" * 99,
}


def broken(table: dict[str, bytes | None], content: bytes) -> Iterator[tuple[str, bytes]]:
    """Every kind of damage: its name and the bytes; None is the first half of the content."""
    for kind, damage in table.items():
        yield kind, content[: len(content) // 2] if damage is None else damage


def wrong_values(fields: dict[str, Any], keys: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """The JSON fields without one of the keys ('a.b' lies deeper), and with a value of another type there."""
    for key in keys:
        for kind in ("missing", "null", "another type"):
            copy = json.loads(json.dumps(fields))
            *path, last = key.split(".")
            place = functools.reduce(
                lambda value, part: value[int(part) if isinstance(value, list) else part], path, copy
            )
            if kind == "missing":
                del place[last]
            else:
                other = {str: 7, int: "many", float: "many", list: 7, dict: [7], bool: "so", type(None): 7}
                place[last] = None if kind == "null" else other[type(place[last])]
            yield f"{key} {kind}", json.dumps(copy).encode()


def wrong_json(path: Path, keys: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Everything that may be wrong with a JSON file."""
    yield from broken(NO_JSON, path.read_bytes())
    yield from wrong_values(json.loads(path.read_text()), keys)


def wrong_weights(path: Path) -> Iterator[tuple[str, bytes]]:
    """Everything that may be wrong with a file of tensors."""
    yield from broken(NO_BINARY, path.read_bytes())
    state = load_file(path)
    name = next(key for key in state if state[key].ndim == 2)
    changes: dict[str, dict] = {
        "a tensor more": {"stranger": torch.zeros(2)},
        "another shape": {name: torch.zeros(3, 5)},
        "transposed": {name: torch.zeros(tuple(reversed((*state[name].shape, 2))))},
        "NaN": {name: torch.full_like(state[name], math.nan)},
        "one inf": {name: state[name].clone().index_fill_(0, torch.tensor([0]), math.inf)},
        "int32": {name: state[name].to(torch.int32)},
        "bool": {name: state[name] > 0},
    }
    states = {kind: state | change for kind, change in changes.items()}
    states["a tensor missing"] = {key: value for key, value in state.items() if key != name}
    states["half missing"] = dict(list(state.items())[::2])
    states["no tensor"] = {}
    states["other names"] = {f"other.{key}": value for key, value in state.items()}
    for kind, content in states.items():
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
            save_file(content, file.name, {"format": "pt"})
            yield kind, Path(file.name).read_bytes()


def file_cases(
    area: str,
    source: Path,
    name: str,
    damages: Iterator[tuple[str, bytes]],
    line: Callable[[Path, Path], Action],
    names: Sequence[str] = (),
) -> Iterator[Case]:
    """A case per damage to the file `name` of a copy of `source` (the file itself where `name` is empty).

    line: the copy and the case's folder to the action.
    """

    def make(content: bytes | None, folder: Path) -> Action:
        copy = copied(source, folder)
        path = copy / name if name else copy
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        return line(copy, folder)

    file = Path(name or source).name
    for kind, content in [*damages, ("missing", None)]:
        yield Case(area, f"{file}: {kind}", functools.partial(make, content), (file, *names))


# ---- Configuration and classes

# Numbers of the configuration that may be 0, below 0 or as large as you like.
ZERO_OK = {
    "drop_path_rate",
    "attention_dropout",
    "context_decoder_dropout",
    "num_prompt_tokens",
    "ignore_index",
    "importance_sample_ratio",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "attention_probs_dropout_prob",
}
INHERITED = set(configuration_tqdm.PreTrainedConfig.__dataclass_fields__)
BAD_TYPES = {int: "many", float: "many", str: 7, bool: "so", list: 7}


def config_fields(part: type) -> Iterator[tuple[str, Any]]:
    """Name and type of the fields that the class declares itself."""
    for field in dataclasses.fields(part):
        if field.name not in INHERITED and not field.name.startswith("_") and not field.name.endswith("_config"):
            yield field.name, field.type


def config_cases(root: Path) -> Iterator[Case]:
    """Every field of the configuration at values that make no sense."""
    parts = {"": TqdmConfig, "vision_config": TqdmConfig.sub_configs["vision_config"]}
    parts["text_config"] = TqdmConfig.sub_configs["text_config"]
    for part, cls in parts.items():
        for name, hint in config_fields(cls):
            kinds = typing.get_args(hint) if typing.get_origin(hint) is not Literal else ()
            kinds = {hint, *kinds}
            values: list[Any] = []
            if kinds & {int, float}:
                values = [-1, math.nan, math.inf, "many", [1]]
                values += [] if name in ZERO_OK or name.endswith("_weight") else [0]
                values += [] if name == "ignore_index" or float in kinds else [10**12]
                values = [value for value in values if not (name == "ignore_index" and value == -1)]
                values += [3.5] if float not in kinds else []
            elif str in kinds or typing.get_origin(hint) is Literal:
                values = ["nonsense", "", 7]
            elif bool in kinds:
                values = ["so", 7]
            for value in values:
                fields = {part: {name: value}} if part else {name: value}
                yield call_case("config", f"{part}.{name} = {value!r}".lstrip("."), config_of(fields), name)
    for value in ([], [0, 1, 2], [0, 1, 2, 9], [3, 2, 1, 0], "0123", [0, 1, 2, 2.5], None):
        fields = {"vision_config": {"feature_layers": value}}
        yield call_case("config", f"feature_layers = {value}", config_of(fields), "feature_layers")
    for value in (["road"], {"road": "text"}, {"road": [49408]}, {"road": [-1]}, {"road": [1.5]}, {"road": []}, 7):
        yield call_case("config", f"token_ids = {value}", config_of({"token_ids": value}), "token_ids", "class name")
    for value in ("road", [1], {"road": 1}, ["nobody"], []):
        yield call_case(
            "config", f"frozen_texts = {value}", lambda v=value: micro_model(frozen_texts=v), "frozen_texts", "id2label"
        )
    for fields in (
        {"mask_decoder_layers": 10**6},
        {"label2id": 7},
        {"dtype": "nosuch"},
        {"display_names": {"nobody": "x"}},
        {"vision_config": 7},
        {"vision_config": []},
        {"text_config": "clip"},
        {"hiden_size": 3},
        {"vision_config": {"hiden_size": 3}},
        {"text_config": {"layers": 3}},
        {"hidden_size": 36},
        {"mask_decoder_heads": 5},
        {"window_size": 32, "window_stride": 33},
    ):
        key = next(iter(fields))
        inner = fields[key] if isinstance(fields[key], dict) else {}
        call = functools.partial(TqdmConfig.from_preset, "tiny", **fields)
        yield call_case("config", f"from_preset {fields}", call, *inner, key)
    for preset in ("nonsense", "", None, 7, ["tiny"]):
        yield call_case(
            "config", f"from_preset {preset!r}", functools.partial(TqdmConfig.from_preset, preset), "preset"
        )


def config_of(fields: dict[str, Any]) -> Callable[[], object]:
    """What a user does with fields: a configuration; its model where it is accepted, for it may fail there, clearly."""
    return lambda: micro_config(**{name: value for name, value in fields.items()})


def call_case(area: str, name: str, call: Callable[[], object], *names: str) -> Case:
    """A function call that takes no file."""
    return Case(area, name, lambda _: call, names)


CLASS_LISTS: list[Any] = [
    [],
    {},
    ["a", "b"],
    "road",
    7,
    {0: None},
    {0: 7},
    {0: ""},
    {0: " "},
    {1: "a"},
    {0: "a", 2: "b"},
    {0: "a", 1: "a"},
    {0: "a", 1: "A"},
    {0: "a", 1: "a "},
    {"x": "a"},
    {0.5: "a"},
    {-1: "a", 0: "b"},
    {0: "a", "0": "b"},
    {0: "a\nb"},
    {0: "a\x00"},
    {0: "a" * 2000},
    {0: ["a"]},
    {None: "a"},
    {0: "road " * 80},
    {0: "ﬁeld", 1: "field"},
    {0: "ro\u200bad", 1: "sky"},
    [("a", 0)],
]


def class_cases(root: Path) -> Iterator[Case]:
    """Class lists of every wrong form, at the configuration and at a model."""
    for classes in CLASS_LISTS:
        shown = f"{str(classes)[:40]}"
        fields = ("id2label", "class", "name")
        yield call_case("classes", f"config {shown}", lambda c=classes: micro_model(id2label=c), *fields)
        yield call_case("classes", f"set_classes {shown}", lambda c=classes: micro_model().set_classes(c), *fields)
    yield call_case("classes", "set_classes None", lambda: micro_model().set_classes(None), *fields)
    for number in (0, -1, 5, "3", None, 2.5):
        yield (
            call_case("classes", f"num_labels = {number!r}", lambda n=number: TqdmConfig(num_labels=n), "num_labels")
            if (number is not None)
            else call_case("classes", "setting num_labels", set_number, "num_labels", "id2label")
        )
    yield call_case("classes", "ignore_index is a class", config_of({"ignore_index": 1}), "ignore_index")


def set_number() -> None:
    """Another number of classes, without names."""
    micro_config().num_labels = 7


# ---- Arrays


def array_cases(root: Path) -> Iterator[Case]:
    """What forward, segment, processor and metric are given instead of images."""
    model = micro_model()
    good = torch.zeros(1, 3, 32, 32)
    labels = torch.zeros(1, 32, 32, dtype=torch.int64)
    pixels: dict[str, Any] = {
        "None": None,
        "a list": [[1.0]],
        "a text": "photo.jpg",
        "numpy": np.zeros((1, 3, 32, 32), np.float32),
        "(3, 32, 32)": good[0],
        "(32, 32)": good[0, 0],
        "(1, 1, 3, 32, 32)": good[None],
        "no images": good[:0],
        "one channel": good[:, :1],
        "four channels": torch.zeros(1, 4, 32, 32),
        "channels last": torch.zeros(1, 32, 32, 3),
        "no pixels": good[..., :0],
        "8 pixels": good[..., :8, :8],
        "uint8": good.to(torch.uint8),
        "int64": good.long(),
        "bool": good > 0,
        "complex": good.to(torch.complex64),
        "NaN": torch.full_like(good, math.nan),
        "inf": torch.full_like(good, math.inf),
        "a dict": {"pixel_values": good},
        "a number": 3,
        "sparse": good.to_sparse(),
        "float8": good.to(torch.float8_e4m3fn),
    }
    for kind, value in pixels.items():
        for name, method in (("forward", model), ("segment", model.segment), ("segment_labels", model.segment_labels)):
            yield call_case(
                "arrays", f"{name} {kind}", lambda m=method, v=value: m(v), "pixel_values", "image", "views"
            )
    for kind, value in {
        "no views": [],
        "views of None": [None],
        "views of two batches": [good, good.repeat(2, 1, 1, 1)],
        "a view of another rank": [good, good[0]],
    }.items():
        yield call_case("arrays", f"segment {kind}", lambda v=value: model.segment(v), "view", "pixel_values")
    for name in ("flip", "softmax_views"):
        for value in (7, "no", None):
            yield call_case("arrays", f"{name}={value!r}", lambda n=name, v=value: model.segment(good, **{n: v}), name)
    for size in (
        0,
        (0, 0),
        (-1, 5),
        (3,),
        "32x32",
        (1.5, 2),
        (math.nan, 3),
        (None, 3),
        [1, 2, 3],
        (True, 3),
        (10**9,) * 2,
    ):
        yield call_case("arrays", f"segment size={size!r}", lambda s=size: model.segment(good, s), "size")
        yield call_case("arrays", f"segment_labels size={size!r}", lambda s=size: model.segment_labels(good, s), "size")
    wrong_labels = {
        "a list": [0],
        "of another size": labels[:, :16],
        "of another batch": labels.repeat(2, 1, 1),
        "float": labels.float() + 0.5,
        "class 3": labels + 3,
        "class -1": labels - 1,
        "(1, 1, 32, 32)": labels[None],
        "bool": labels > 0,
        "a text": "labels",
        "(32, 32)": labels[0],
        "no labels at all": labels[:, :0],
        "complex": labels.to(torch.complex64),
    }
    for kind, value in wrong_labels.items():
        yield call_case("arrays", f"labels {kind}", lambda v=value: model(good, labels=v), "labels")
    for kind, value in {
        "a list": [[0, 0]],
        "one column": torch.zeros(2, 1).long(),
        "image 5": torch.tensor([[5, 0]]),
        "class 9": torch.tensor([[0, 9]]),
        "float": torch.zeros(1, 2),
    }.items():
        yield call_case(
            "arrays", f"mask_index {kind}", lambda v=value: model(good, labels=labels, mask_index=v), "mask_index"
        )
    for name, shape in (("reference_image_embedding", (1, 7)), ("reference_text_embedding", (2, 16))):
        right = torch.zeros(shape[0] if "text" not in name else 3, 16)
        for kind, value in {
            "of another shape": torch.zeros(shape),
            "a list": [1.0],
            "NaN": right + math.nan,
            "int": right.long(),
        }.items():
            yield call_case(
                "arrays", f"{name} {kind}", lambda n=name, v=value: model(good, labels=labels, **{n: v}), name
            )
    seeds = {"a list": [1], "float": torch.zeros(1), "of two images": torch.zeros(2, dtype=torch.int32)}
    for name, values in {"sample_seeds": seeds, "loss_counts": {"a number": 7, "a list": [1, 2, 3]}}.items():
        for kind, value in values.items():
            call = functools.partial(model, good, labels=labels, **{name: value})
            yield call_case("arrays", f"{name} {kind}", call, name)
    edits = {"num_points": 0, "class_loss_weight": math.nan, "oversample_ratio": 0, "ignore_index": 1}
    for name, value in edits.items():

        def edited(n: str = name, v: Any = value) -> object:
            other = micro_model()
            setattr(other.config, n, v)
            return other(good, labels=labels)

        yield call_case("arrays", f"forward, config.{name} set to {value}", edited, name)
    yield from processor_cases()
    yield from metric_cases()


def processor_cases() -> Iterator[Case]:
    """Images and maps that the image processor refuses, and its options."""
    processor, image = TqdmImageProcessor(), np.zeros((20, 30, 3), np.uint8)
    images: dict[str, Any] = {
        "None": None,
        "an empty list": [],
        "a number": 7,
        "a text": "no such photo.png",
        "bytes": b"\x89PNG",
        "a list with None": [None],
        "a mixed list": [image, None],
        "rank 1": np.zeros(5, np.uint8),
        "rank 5": np.zeros((1, 1, 1, 2, 3)),
        "no pixels": image[:0],
        "no columns": image[:, :0],
        "five channels": np.zeros((20, 30, 5), np.uint8),
        "two channels": np.zeros((20, 30, 2), np.uint8),
        "objects": np.array([["a"]]),
        "complex": np.zeros((20, 30, 3), complex),
        "NaN": np.full((20, 30, 3), np.nan, np.float32),
        "inf": np.full((20, 30, 3), np.inf, np.float32),
        "floats above 1": np.full((20, 30, 3), 7.5, np.float32),
        "below 0": np.full((20, 30, 3), -3, np.int64),
        "above 255": np.full((20, 30, 3), 70000, np.int64),
        "a dict": {"image": image},
        "PIL without pixels": Image.new("RGB", (0, 5)),
        "sparse": torch.zeros(3, 4, 4).to_sparse(),
        "dates": np.zeros((4, 4, 3), "datetime64[s]"),
        "a folder": "/tmp",
        "a long name": "a" * 2000,
    }
    for kind, value in images.items():
        yield call_case(
            "processor", f"images: {kind}", lambda v=value: processor(images=v, return_tensors="pt"), "image"
        )
    maps: dict[str, Any] = {
        "of another size": np.zeros((20, 31), np.uint8),
        "three channels": image,
        "float": np.zeros((20, 30)),
        "a text": "map.png",
        "two for one image": [image[..., 0]] * 2,
        "an empty list": [],
        "None in a list": [None],
        "a number": 7,
        "rank 1": np.zeros(5, int),
        "RGB": Image.fromarray(image),
        "objects": np.array([["a"]]),
        "complex": np.zeros((20, 30), complex),
    }
    for kind, value in maps.items():
        call = functools.partial(processor, images=image, segmentation_maps=value)
        yield call_case("processor", f"map: {kind}", call, "map")
    options = {
        "size": [
            {"shortest_edge": 0, "longest_edge": 5},
            {"height": -1, "width": 5},
            {"height": 5},
            {"side": 5},
            "5x5",
            {},
            0,
            {"height": math.nan, "width": 5},
            {"height": 10**9, "width": 10**9},
        ],
        "resample": ["bilinear", 99, -1, [2], True],
        "image_mean": [[1, 2], "half", [math.nan] * 3, [None] * 3, [], [124, 116, 104]],
        "image_std": [[0, 0, 0], [1, 2], [math.nan] * 3, -1, [1, 1, -1]],
        "rescale_factor": ["x", math.nan, math.inf, 0, -1, True, 1e300],
        "antialias": ["yes", 1],
        "do_normalize": ["no"],
        "device": ["nosuch", 7],
        "return_tensors": ["xx", 7],
        "do_center_crop": [True],
        "do_pad": [True],
    }
    for name, values in options.items():
        for value in values:
            call = functools.partial(processor, images=image, **{"do_resize": True, name: value})
            yield call_case("processor", f"{name} = {value}", call, name)
            if not name.startswith(("return", "do_c", "do_p", "device")):
                made = functools.partial(TqdmImageProcessor, **{name: value})
                yield call_case("processor", f"made with {name} = {value}", made, name)
    outputs = tqdm_seg.TqdmForSemanticSegmentation(micro_config()).eval()(torch.zeros(1, 3, 32, 32))
    post = processor.post_process_semantic_segmentation
    for sizes in ([], [(1, 1)] * 2, [(0, 5)], [(-1, 5)], [5], 7, [(1.5, 2)], ["5x5"], [(None, 2)], [(1, 2, 3)]):
        yield call_case("processor", f"target_sizes = {sizes}", lambda s=sizes: post(outputs, s), "target_sizes")
    scores = {
        "NaN": torch.full((1, 3, 4, 4), math.nan),
        "int": torch.zeros(1, 3, 4, 4).long(),
        "(3, 4, 4)": outputs.logits[0],
    }
    wrong_outputs = {kind: ModelOutput(logits=value) for kind, value in scores.items()}
    for kind, value in {"None": None, "a tensor": torch.zeros(1, 3, 4, 4), "a dict": {}, **wrong_outputs}.items():
        yield call_case("processor", f"outputs: {kind}", lambda v=value: post(v), "outputs", "logits")


def metric_cases() -> Iterator[Case]:
    """Maps that the metric refuses."""
    module = load_module(Path(__file__).parents[1] / "metrics" / "mean_iou_tqdm" / "mean_iou_tqdm.py")
    good = np.zeros((4, 5), np.int64)
    for number in (0, -1, 2.5, "3", True, math.nan):
        yield call_case(
            "metric", f"num_classes = {number}", functools.partial(module.MeanIouTqdm, num_classes=number), "classes"
        )
    for index in (None, 1.5, "x", math.nan):
        call = functools.partial(module.MeanIouTqdm, num_classes=3, ignore_index=index)
        yield call_case("metric", f"ignore_index = {index}", call, "ignore_index")
    maps: dict[str, Any] = {
        "probabilities": np.full((4, 5), 0.7),
        "three channels": np.zeros((4, 5, 3), int),
        "logits": np.zeros((3, 4, 5)),
        "class 7": good + 7,
        "class -1": good - 1,
        "None": None,
        "a text": "map",
        "another size": good[:3],
        "NaN": np.full((4, 5), np.nan),
        "no pixels": good[:0],
        "objects": np.array([["a"]]),
        "bool": good > 0,
        "a ragged list": [[0, 1], [0]],
        "float ids": good.astype(float) + 0.5,
    }
    for kind, value in maps.items():
        for side in ("prediction", "reference"):
            pair = {"prediction": good, "reference": good} | {side: value}
            yield call_case(
                "metric", f"{side}: {kind}", lambda p=pair: module.MeanIouTqdm(num_classes=3).add(**p), side, "label"
            )
    for kind, batch in {
        "of other lengths": ([good], [good, good]),
        "of numbers": (7, 7),
        "of None": (None, [good]),
        "empty": ([], []),
    }.items():
        call = lambda b=batch: module.MeanIouTqdm(num_classes=3).compute(predictions=b[0], references=b[1])  # noqa: E731
        yield call_case("metric", f"batch {kind}", call, "prediction", "reference", "images", "map")


def load_module(path: Path) -> Any:
    """The module in a file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- Options of every command, on the command line and as a function

# Options that may be 0, and those that may be below.
ZERO = {
    "--window",
    "--seed",
    "--min-scenes",
    "--workers",
    "--bootstrap",
    "--frames",
    "--images",
    "--score-maps",
    "--minutes",
    "--distance",
    "--overlays",
    "--save-every-steps",
    "--eval-every-steps",
    "--min-pixels",
    "--warmup-steps",
    "--weight-decay",
    "--clip-norm",
    "--ema",
    "--min-lr",
    "--textual-weight",
    "--visual-weight",
    "--score-map-weight",
    "--class-weight",
    "--mask-weight",
    "--dice-weight",
    "--limit",
    "--holdout",
    "--seeds",
    "--tolerance",
}
FREE_TEXTS = {
    "--name",
    "--license",
    "--image-column",
    "--label-column",
    "--compile",
    "--tracker",
    "--mask-suffix",
    "--eval-data",
}


def base_line(command: str) -> tuple[list[str], dict[str, Any]]:
    """Required arguments that name nothing that exists, so that nothing begins: as words and as fields."""
    words, fields = [], {}
    if command in ("train", "ablate"):
        return ["--data", "/no/such/data"], {"data": "/no/such/data"}
    hints = typing.get_type_hints(named(COMMANDS[command].options))
    for field in dataclasses.fields(named(COMMANDS[command].options)):
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if optional and not field.metadata.get("positional"):
            continue
        value = f"no={field.name}" if field.name == "data" else f"/no/such/{field.name}"
        flag = field.metadata.get("flag") or field.name == "data"
        words += [flag_of(field.name), value] if flag else [value]
        fields[field.name] = [value] if typing.get_origin(hints[field.name]) is tuple else value
    return words, fields


def flag_of(name: str) -> str:
    """The option of a field."""
    return f"--{name.rstrip('_').replace('_', '-')}"


def option_cases(root: Path) -> Iterator[Case]:
    """Every option of every command at values that make no sense; an option that is accepted shows as another error."""
    for command in COMMANDS:
        options = named(COMMANDS[command].options)
        hints = typing.get_type_hints(options)
        words, fields = base_line(command)
        function = named(COMMANDS[command].function)
        for field in dataclasses.fields(options):
            if field.default is dataclasses.MISSING or command.startswith("prepare") and command != "prepare folder":
                continue
            flag, kinds = flag_of(field.name), set(typing.get_args(hints[field.name])) | {hints[field.name]}
            texts: list[str] = []
            values: list[Any] = [object()]
            size = field.metadata.get("type") is not None and field.metadata["type"].__name__ == "size"
            if size:
                texts, values = (
                    ["0x5", "5", "5x", "-1x5", "axb", "5x5x5", "", "9x99999"],
                    [(0, 5), (5,), "x", 5, (9, 10**9)],
                )
            elif kinds & {int, float} and bool not in kinds:
                texts = ["-1", "nan", "inf", "many", "", "1e999"] + ([] if flag in ZERO else ["0"])
                texts += [] if float in kinds else ["1.5", str(10**40)]
                many = typing.get_origin(hints[field.name]) is tuple
                values = [-1, math.nan, "many"] + ([] if many else [[1]]) + ([] if flag in ZERO else [0])
            elif any(typing.get_origin(kind) is Literal for kind in kinds):
                texts, values = ["nonsense", ""], ["nonsense", 7]
            elif bool in kinds:
                values = ["so", 7]
            elif field.metadata.get("type") is not None and field.metadata["type"].__name__ == "names":
                texts, values = ["", ",", "a,,b", "a,a"], [("a", ""), ("a", "a"), (1, 2), 7]
            elif str in kinds and flag not in FREE_TEXTS:
                texts = [""]
            for text in texts:
                line = [command, *words, f"{flag}={text}"]
                yield Case("options", f"{command} {flag}={text}", lambda _, line=line: line, (flag,))
            for value in values:
                call = functools.partial(function, **fields | {field.name: value})
                shown = "an object" if type(value) is object else repr(value)
                yield call_case("functions", f"{command}({field.name}={shown})", call, field.name, flag)
        if "workers" in hints:
            line = [command, *words, "--workers=100000"]
            yield Case("options", f"{command} --workers=100000", lambda _, line=line: line, ("--workers",))
        if command not in ("train", "ablate", "env"):
            yield Case("options", f"{command} without arguments", lambda _, c=command: [c], ("required",))
        yield Case(
            "options",
            f"{command} --no-such-option",
            lambda _, c=command, w=words: [c, *w, "--no-such-option"],
            ("--no-such-option",),
        )
        for name in fields:
            for value in (7, []) if command in ("train", "ablate") else (None, 7, []):
                call = functools.partial(function, **fields | {name: value})
                yield call_case("functions", f"{command}({name}={value})", call, name, flag_of(name))


# ---- Files


OPTIONAL = ("id2label missing", "id2label null")  # it follows from query_texts
# What transformers takes in every model: weights may be new, and the class says the type.
LIBRARYS = (
    "a tensor more", "NaN", "one inf", "int32", "bool", "a tensor missing", "half missing", "no tensor", "other names",
    "model_type missing", "model_type null", "model_type another type",
)  # fmt: skip


def model_cases(root: Path) -> Iterator[Case]:
    """Damaged model folders, at every program that loads one and at from_pretrained."""
    source, weights, image = root / "model", "model.safetensors", root / "images" / "0.png"

    def predict(copy: Path, folder: Path) -> Action:
        return ["predict", copy, image, "--out", folder / "out"]

    def load(copy: Path, folder: Path) -> Action:
        return lambda: TqdmForSemanticSegmentation.from_pretrained(copy)

    programs: dict[str, Callable[[Path, Path], Action]] = {
        "predict": predict,
        "evaluate": lambda copy, folder: evaluate_line(root, folder / "out", model=copy),
        "train": lambda copy, folder: train_line(root, folder / "out", model=copy),
        "export": lambda copy, folder: ["export", copy, "--out", folder / "out", "--no-check", "--format", "torch"],
        "from_pretrained": load,
    }
    yield Case("models", "predict", lambda folder: predict(copied(source, folder), folder), (), True)
    yield Case("models", "from_pretrained", lambda folder: load(copied(source, folder), folder), (), True)
    keys = (
        "model_type",
        "id2label",
        "hidden_size",
        "vision_config",
        "text_config.hidden_size",
        "vision_config.patch_size",
    )
    config = [
        item
        for item in wrong_json(source / "config.json", keys)
        if item[0] not in OPTIONAL and not item[0].endswith(("size missing", "config missing"))
    ]
    for program, line in programs.items():
        some = slice(None) if program in ("predict", "from_pretrained") else slice(0, None, 3)
        area = f"models ({program})"
        left_out = LIBRARYS if program == "from_pretrained" else ()
        yield from file_cases(
            area,
            source,
            weights,
            [item for item in wrong_weights(source / weights) if item[0] not in left_out][some],
            line,
            ("weights",),
        )
        damages = [item for item in config if item[0] not in left_out][some]
        names = ("id2label", "hidden_size", "weights", "vision_config", "patch_size")
        yield from file_cases(area, source, "config.json", damages, line, names)
        if program != "from_pretrained":
            damages = wrong_json(source / "preprocessor_config.json", ("size", "image_mean", "rescale_factor"))
            damages = [item for item in damages if not item[0].endswith(("missing", "null"))]
            yield from file_cases(area, source, "preprocessor_config.json", damages[some], line)
        places = {
            "a file": image,
            "a dataset": root / "data",
            "a run": root / "run",
            "missing": root / "nosuch",
            "raw": root / "raw",
        }
        for kind, place in places.items():
            yield Case(area, f"the model is {kind}", lambda folder, p=place, run=line: run(p, folder), (place.name,))


def dataset_cases(root: Path) -> Iterator[Case]:
    """Damaged dataset folders, at every program that reads one."""
    source, shard = root / "data", "data/train-00000-of-00001.parquet"
    programs: dict[str, Callable[[Path, Path], Action]] = {
        "check": lambda copy, folder: ["check", copy, "--workers", 1],
        "evaluate": lambda copy, folder: evaluate_line(root, folder / "out", data=copy),
        "train": lambda copy, folder: train_line(root, folder / "out", data=copy),
        "audit": lambda copy, folder: ["audit", f"{copy}:train", f"{copy}:validation", "--json", folder / "out.json"],
    }
    keys = (
        "format",
        "classes",
        "ignore_index",
        "shards",
        "shards.0.file",
        "shards.0.rows",
        "shards.0.sha256",
        "label_map",
        "label_map.name",
        "options",
        "rows",
        "rows.train",
    )
    for program, line in programs.items():
        area = f"datasets ({program})"
        manifest = list(wrong_json(source / "manifest.json", keys))
        if program == "audit":
            manifest = list(broken(NO_JSON, b"{}"))
        yield Case(area, "good", lambda folder, run=line: run(copied(source, folder), folder), (), True)
        yield from file_cases(area, source, "manifest.json", manifest, line, ("manifest",))
        for name in ("index.parquet", shard, shard.replace("train", "validation")):
            used = program != "audit" and (program != "evaluate" or "train" not in name)  # audit reports bad images
            if used:
                content = (source / name).read_bytes()
                damages = [*broken(NO_BINARY, content), *other_tables(source / name)]
                yield from file_cases(area, source, name, damages, line, ("index",))
        for kind, place in {
            "a file": root / "classes.txt",
            "missing": root / "nosuch",
            "a model": root / "model",
            "empty": root / "empty",
        }.items():
            if program != "audit" or kind == "missing":
                yield Case(area, f"the set is {kind}", lambda folder, p=place, run=line: run(p, folder), (place.name,))


def other_tables(path: Path) -> Iterator[tuple[str, bytes]]:
    """Parquet files that lack rows or columns, or hold others."""
    table = pq.read_table(path)
    for kind, other in {
        "no rows": table.slice(0, 0),
        "fewer rows": table.slice(1),
        "another column": pa.table({"a": [1]}),
        "a column less": table.drop_columns(table.column_names[-1]),
    }.items():
        sink = pa.BufferOutputStream()
        pq.write_table(other, sink)
        yield kind, sink.getvalue().to_pybytes()


def run_cases(root: Path) -> Iterator[Case]:
    """Damaged runs, evaluations, tables and exports."""
    run, evaluation = root / "run", root / "evaluation"
    last = "checkpoints/step_0000002"

    def resume(copy: Path, folder: Path) -> Action:
        return train_line(root, copy, "--resume")

    yield from file_cases(
        "runs", run, "args.json", wrong_values(json.loads((run / "args.json").read_text()), ("seed", "lr")), resume
    )
    yield from file_cases("runs", run, "args.json", broken(NO_JSON, (run / "args.json").read_bytes()), resume)

    def both(content: bytes | None, name: str, folder: Path) -> Action:
        copy = copied(run, folder)
        for step in (copy / "checkpoints").iterdir():
            (step / name).unlink()
            if content is not None:
                (step / name).write_bytes(content)
        return resume(copy, folder)

    for name in ("state.json", "weights.safetensors", "optimizer.safetensors"):
        path = run / last / name
        damages = [*broken(NO_JSON if name.endswith("json") else NO_BINARY, path.read_bytes()), ("missing", None)]
        keys = ("step", "groups", "groups.0.params", "groups.0.lr", "sha256")
        damages += list(wrong_values(json.loads(path.read_text()), keys)) if name.endswith("json") else []
        for kind, content in damages:
            names = (name, "checkpoint")
            yield Case("runs", f"{name} of all checkpoints: {kind}", functools.partial(both, content, name), names)
    taken = {
        "a run without --resume": run,
        "a file": root / "classes.txt",
        "a dataset": root / "data",
        "a model": root / "model",
        "below a file": root / "classes.txt" / "out",
        "images": root / "images",
    }
    for kind, place in taken.items():
        yield Case(
            "runs",
            f"OUT is {kind}",
            lambda folder, p=place: train_line(root, elsewhere(p, folder)),
            ("out", place.name),
        )

    def report(copy: Path, folder: Path) -> Action:
        return ["report", copy, "--out", folder / "page.html"]

    keys = ("sets", "sets.orfd.matrix", "sets.orfd.protocol", "sets.orfd.miou", "model")
    keys += ("sets.orfd.iou", "sets.orfd.groups", "sets.orfd.groups.scene.0.miou", "model.path", "model.sha256")
    yield Case("reports", "good", lambda folder: report(copied(evaluation, folder), folder), (), True)
    yield from file_cases("reports", evaluation, "results.json", wrong_json(evaluation / "results.json", keys), report)
    table = [*broken(NO_BINARY, (evaluation / "orfd.parquet").read_bytes()), *other_tables(evaluation / "orfd.parquet")]
    yield from file_cases("reports", evaluation, "orfd.parquet", table, report)
    for kind, place in {
        "a file": root / "classes.txt",
        "missing": root / "nosuch",
        "a run": run,
        "a model": root / "model",
    }.items():
        yield Case("reports", f"RESULTS is {kind}", lambda folder, p=place: report(p, folder), (place.name,))

    def again(copy: Path, folder: Path) -> Action:
        return evaluate_line(root, copy)

    yield Case("evaluations", "again", lambda folder: again(copied(evaluation, folder), folder), (), True)
    yield from file_cases(
        "evaluations",
        evaluation,
        "plan.json",
        wrong_json(evaluation / "plan.json", ("model", "sets")),
        again,
        ("evaluation",),
    )

    def compare(copy: Path, folder: Path) -> Action:
        return ["compare", evaluation / "orfd.parquet", copy, "--json", folder / "out.json"]

    yield Case("tables", "good", lambda folder: compare(copied(evaluation / "orfd.parquet", folder), folder), (), True)
    yield from file_cases("tables", evaluation / "orfd.parquet", "", table, compare)
    csv = root / "evaluation" / "orfd_groups.csv"
    yield from file_cases(
        "tables", csv, "", [*broken(NO_BINARY, csv.read_bytes()), ("of groups", csv.read_bytes())], compare
    )
    yield from csv_cases()
    yield from export_cases(root)


def csv_cases() -> Iterator[Case]:
    """Tables of counts as CSV, and what may lie next to them."""
    header = "frame,scene,0-0,0-1,1-0,1-1\n"
    rows = {
        "semicolons": header.replace(",", ";") + "a;s;1;2;3;4\n",
        "a cell less": header + "a,s,1,2,3\n",
        "a cell more": header + "a,s,1,2,3,4,5\n",
        "below 0": header + "a,s,-1,2,3,4\n",
        "a fraction": header + "a,s,1.5,2,3,4\n",
        "NaN": header + "a,s,nan,2,3,4\n",
        "inf": header + "a,s,inf,2,3,4\n",
        "2**63": header + f"a,s,{2**63},2,3,4\n",
        "a frame twice": header + "a,s,1,2,3,4\na,s,1,2,3,4\n",
        "no row": header,
        "no name": header + ",s,1,2,3,4\n",
        "an open quote": header + '"a,s,1,2,3,4\n',
        "no such month": header + "a,x1399_1627,1,2,3,4\n",
        "a column less": "frame,scene,0-0,0-1,1-0\na,s,1,2,3\n",
        "a column twice": "frame,scene,0-0,0-0,1-0,1-1\na,s,1,2,3,4\n",
    }

    def compare(files: dict[str, bytes], folder: Path) -> Action:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return ["compare", folder / "t.csv", folder / "t.csv"]

    for kind, text in rows.items():
        yield Case("tables", f"CSV: {kind}", functools.partial(compare, {"t.csv": text.encode()}), ("t.csv",))
    facts = {"classes": ["a", "b"], "protocol": {"class_set": {"name": "x", "classes": ["a"]}}}
    damages = [*broken(NO_JSON, json.dumps(facts).encode())]
    damages += wrong_values(facts, ("classes", "protocol", "protocol.class_set.classes"))
    damages += [("a class twice", json.dumps(facts | {"classes": ["a", "a"]}).encode())]
    for kind, content in damages:
        files = {"t.csv": f"{header}a,s,1,2,3,4\n".encode(), "t.csv.json": content}
        yield Case("tables", f"t.csv.json: {kind}", functools.partial(compare, files), ("t.csv",))


def elsewhere(place: Path, folder: Path) -> Path:
    """The place, or its copy in the folder of the case."""
    return copied(place, folder) if place.exists() else copied(place.parent, folder) / place.name


def export_cases(root: Path) -> Iterator[Case]:
    """Damaged exports."""
    source = root / "export"

    def predict(copy: Path, folder: Path) -> Action:
        return ["predict", copy, root / "images" / "0.png", "--out", folder / "out", "--backend", "onnxruntime"]

    yield Case("exports", "good", lambda folder: predict(copied(source, folder), folder), (), True)
    yield from file_cases(
        "exports", source, "window.onnx", broken(NO_BINARY, (source / "window.onnx").read_bytes()), predict
    )
    for name in ("config.json", "preprocessor_config.json"):
        yield from file_cases("exports", source, name, broken(NO_JSON, (source / name).read_bytes()), predict)
    fields = json.loads((source / "config.json").read_text())
    for kind, change in {
        "of three classes": {"id2label": {0: "a", 1: "b", 2: "c"}, "query_texts": ["a", "b", "c"]}
    }.items():
        content = json.dumps({**fields, **change}).encode()
        yield from list(file_cases("exports", source, "config.json", iter([(kind, content)]), predict))[:1]


def image_cases(root: Path) -> Iterator[Case]:
    """Images, masks and class files that predict and prepare refuse."""
    png = (root / "images" / "0.png").read_bytes()
    images = dict(broken(NO_BINARY, png)) | {
        "1x1": encoded(Image.new("RGB", (1, 1))),
        "a GIF of nothing": b"GIF89a",
        "JSON": b"{}",
        "html": b"<html></html>",
        "float": encoded(Image.fromarray(np.full(SIZE, 3e5, np.float32)), "TIFF"),
        "NaN": encoded(Image.fromarray(np.full(SIZE, np.nan, np.float32)), "TIFF"),
    }
    for kind, content in images.items():
        suffix = "tif" if content[:2] in (b"II", b"MM") else "png"

        def predict(folder: Path, c: bytes = content, s: str = suffix) -> Action:
            (folder / f"photo.{s}").write_bytes(c)
            return ["predict", root / "model", folder / f"photo.{s}", "--out", folder / "out"]

        yield Case("images", f"predict {kind}", predict, ("photo",))
        if kind == "text":

            def several(folder: Path, c: bytes = content) -> Action:
                fields = json.loads((copied(root / "model", folder) / "config.json").read_text())
                (folder / "model" / "config.json").write_text(json.dumps({**fields, "trained": True}))
                (folder / "photo.png").write_bytes(c)
                line = ["predict", folder / "model", root / "images" / "0.png", folder / "photo.png"]
                return [*line, root / "images" / "1.png", "--out", folder / "out"]

            yield Case("images", "predict, one of three is text", several, ("areas.json",), keeps="out")
        if kind != "1x1":
            yield from prepare_case(root, "images/0.png", f"image: {kind}", content, ("images", "0.png"))
    masks = dict(broken(NO_BINARY, png)) | {
        "RGB": png,
        "another size": encoded(Image.new("L", (7, 7))),
        "class 9": encoded(Image.new("L", SIZE[::-1], 9)),
        "1x1": encoded(Image.new("L", (1, 1))),
        "float": encoded(Image.fromarray(np.zeros(SIZE, np.float32)), "TIFF"),
        "16 bit": encoded(Image.fromarray(np.full(SIZE, 300, np.uint16))),
    }
    for kind, content in masks.items():
        yield from prepare_case(root, "masks/0.png", f"mask: {kind}", content, ("masks", "0.png", "class"))
    yield from prepare_case(root, "masks/0.png", "mask: missing", None, ("masks", "0.png"))
    classes = {
        "empty": b"",
        "blank": b"\n\n",
        "bytes": png,
        "twice": b"road\nroad\n",
        "an id twice": b"road,1\nsky,1\n",
        "no number": b"road,x\nsky,1\n",
        "two numbers": b"road,1,2\nsky,3,4\n",
        "above 255": b"road,300\nsky,1\n",
        "negative": b"road,-1\nsky,1\n",
        "colour 256": b"road,0,0,256\nsky,1,1,1\n",
        "mixed": b"road,1\nsky,1,2,3\n",
        "no name": b",1\nsky,2\n",
        "a number as name": b"0\n1\n",
        "one class": b"road\n",
        "JSON": b'{"road": 0}',
        "257 classes": "\n".join(f"class {i}" for i in range(257)).encode(),
        "a name of 2,000 letters": b"a" * 2000 + b"\nsky\n",
        "control": b"ro\x07ad\nsky\n",
    }
    for kind, content in classes.items():
        yield from prepare_case(root, "classes.txt", f"class file: {kind}", content, ("classes.txt",))
    yield from prepare_case(root, "classes.txt", "class file: missing", None, ("classes.txt",))
    lists = {
        "empty": b"",
        "NUL": b"\0\n",
        "a pointer": POINTER,
        "one cell": b"0.png\n",
        "five cells": b"0.png,0.png,train,s,x\n",
        "outside": b"../x,0.png\n",
        "an unknown split": b"0.png,0.png,nosuch\n",
        "an image twice": b"0.png,0.png\n0.png,1.png\n",
        "a missing image": b"9.png,9.png\n",
    }
    for option in ("--pairs", "--hold-out-scenes"):
        for kind, content in lists.items():

            def listed(folder: Path, o: str = option, c: bytes = content) -> Action:
                (folder / "list.txt").write_bytes(c)
                return [*prepare_line(root, folder), o, folder / "list.txt"]

            if (option, kind) != ("--hold-out-scenes", "one cell"):  # a list of images it takes
                yield Case("images", f"prepare {option}: {kind}", listed, ("list.txt",))
    yield Case("images", "prepare", lambda folder: prepare_line(root, folder), (), True)
    for kind in ("images", "masks"):
        for what, place in {"missing": "nosuch", "a file": "classes.txt", "empty": "empty"}.items():

            def make(folder: Path, k: str = kind, p: str = place) -> Action:
                line = prepare_line(root, folder)
                (folder / "empty").mkdir()
                return [folder / p if word == folder / k else word for word in line]

            yield Case("images", f"prepare: {kind} are {what}", make, (place,))


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def prepare_line(root: Path, folder: Path) -> list:
    """Prepares copies of images and masks."""
    for name in ("images", "masks", "classes.txt"):
        copied(root / name, folder)
    return [
        "prepare folder",
        folder / "images",
        folder / "masks",
        "--class-file",
        folder / "classes.txt",
        "--out",
        folder / "out",
        "--workers",
        1,
    ]


def prepare_case(root: Path, name: str, kind: str, content: bytes | None, names: tuple[str, ...]) -> Iterator[Case]:
    """prepare folder, with this content in one of its files."""

    def make(folder: Path) -> Action:
        line = prepare_line(root, folder)
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        return line

    yield Case("images", f"prepare {kind}", make, names)


def checkpoint_cases(root: Path) -> Iterator[Case]:
    """Files that convert does not take."""
    contents: dict[str, Any] = {
        "a list": [1, 2],
        "a text": "weights",
        "a number": 7,
        "None": None,
        "no tensors": {},
        "texts": {"state_dict": {"a": "b"}},
        "unknown keys": {"state_dict": {"a": torch.zeros(2)}},
        "keys that are numbers": {"state_dict": {1: torch.zeros(2)}},
        "a tensor": torch.zeros(3),
        "an object": {"state_dict": Path("x")},
        "half of it": {"state_dict": {"backbone.conv1.weight": torch.zeros(2, 2)}},
        "nested": {"state_dict": {"state_dict": {"a": torch.zeros(2)}}},
    }

    def line(folder: Path, path: Path, *more: object) -> Action:
        return ["convert", path, "--out", folder / "out", *more]

    for init in ((), ("--init", "tiny")):
        for kind, value in contents.items():

            def saved(folder: Path, v: Any = value, more: tuple = init) -> Action:
                torch.save(v, folder / "w.pth")
                return line(folder, folder / "w.pth", *more)

            yield Case("checkpoints", f"convert {kind} {' '.join(init)}", saved, ("w.pth", "checkpoint"))
        for suffix in ("pth", "safetensors"):
            good = (root / "model" / "model.safetensors").read_bytes()
            for kind, content in broken(NO_BINARY, good):

                def written(folder: Path, c: bytes = content, s: str = suffix, more: tuple = init) -> Action:
                    (folder / f"w.{s}").write_bytes(c)
                    return line(folder, folder / f"w.{s}", *more)

                yield Case("checkpoints", f"convert .{suffix} {kind} {' '.join(init)}", written, (f"w.{suffix}",))
        places = {
            "a folder": root / "model",
            "missing": root / "nosuch.pth",
            "an image": root / "images" / "0.png",
            "our own weights": root / "model" / "model.safetensors",
        }
        for kind, place in places.items():
            yield Case(
                "checkpoints",
                f"convert {kind} {' '.join(init)}",
                lambda f, p=place, m=init: line(f, p, *m),
                (place.name,),
            )
    for name in ("nosuch:tag", "ViT-B-16:nosuch", "ViT-B-16", "", ":"):
        more = ("--init", "clip_vit_b16", "--from", "open_clip")
        yield Case(
            "checkpoints", f"open_clip {name!r}", lambda f, n=name, m=more: line(f, n, *m), ("open_clip", "source")
        )
    for place in (root / "nosuch", root / "data", root / "model"):
        more = ("--init", "clip_vit_b16", "--from", "transformers")
        yield Case(
            "checkpoints", f"transformers {place.name}", lambda f, p=place, m=more: line(f, p, *m), (place.name,)
        )


def output_cases(root: Path) -> Iterator[Case]:
    """Outputs that are inputs, files for folders, folders for files, places that cannot be, what is not ours."""
    image = root / "images" / "0.png"
    lines: dict[str, Callable[[Path], list]] = {
        "predict": lambda out: ["predict", root / "model", image, "--out", out],
        "evaluate": lambda out: evaluate_line(root, out),
        "train": lambda out: train_line(root, out),
        "export": lambda out: ["export", root / "model", "--out", out, "--no-check", "--format", "torch"],
        "convert": lambda out: ["convert", root / "model" / "model.safetensors", "--out", out],
        "prepare": lambda out: ["prepare orfd", root / "raw", "--out", out, "--workers", 1],
        "ablate": lambda out: ["ablate", "--steps", 2, "--out", out],
    }
    for program, line in lines.items():
        for kind, make in {
            "a file": lambda f: write(f / "out", "mine"),
            "below a file": lambda f: write(f / "out", "mine") / "below",
            "a folder of theirs": lambda f: write(f / "out" / "thesis.txt", "years").parent,
            "under /proc": lambda f: Path("/proc/out"),
        }.items():
            yield Case("outputs", f"{program}: OUT is {kind}", lambda f, m=make, run=line: run(m(f)), ("out",))
    for program, source in (
        ("predict", "model"),
        ("evaluate", "data"),
        ("evaluate", "model"),
        ("train", "model"),
        ("train", "data"),
        ("export", "model"),
        ("prepare", "raw"),
    ):

        def make(folder: Path, p: str = program, s: str = source) -> Action:
            copy = copied(root / s, folder)
            return [
                copy if str(word) == str(root / s) else str(word).replace(str(root / s), str(copy))
                for word in lines[p](copy)
            ]

        yield Case("outputs", f"{program}: OUT is its {source}", make, (source,))
    table = root / "evaluation" / "orfd.parquet"
    files: dict[str, Callable[[Path, Path], list]] = {
        **{
            f"compare --{kind}": lambda t, out, k=kind: ["compare", t, t, f"--{k}", out]
            for kind in ("json", "csv", "markdown")
        },
        **{
            f"audit --{kind}": lambda t, out, k=kind: ["audit", root / "scenes.txt", root / "scenes.txt", f"--{k}", out]
            for kind in ("json", "csv")
        },
        "report --out": lambda t, out: ["report", root / "evaluation", "--out", out],
    }
    for program, line in files.items():
        for kind, make in {
            "a folder": lambda f: (f / "out").mkdir() or f / "out",
            "below a file": lambda f: write(f / "out", "mine") / "below",
            "a file of theirs": lambda f: write(f / "out", "years of work"),
            "under /proc": lambda f: Path("/proc/out"),
        }.items():
            yield Case("outputs", f"{program} {kind}", lambda f, m=make, run=line: run(table, m(f)), ("out",))

        def itself(folder: Path, run: Callable = line) -> Action:
            copy = copied(table, folder)
            return run(copy, copy)

        yield Case("outputs", f"{program} its input", itself, ("orfd.parquet",))


def write(path: Path, text: str) -> Path:
    """Writes the file, its folder made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def text_cases(root: Path) -> Iterator[Case]:
    """Lists of scenes, tables of attributes and names of sets."""
    table, image = root / "evaluation" / "orfd.parquet", (root / "images" / "0.png").read_bytes()
    lists = {"empty": b"", "blank": b"\n \n", "bytes": image, "unknown scenes": b"nowhere\n"}
    for option in ("--scenes", "--known", "--leaked", "--scene-map"):
        for kind, content in {**lists, "missing": None, "a folder": "folder"}.items():

            def make(folder: Path, c: Any = content, o: str = option) -> Action:
                path = folder / "list.txt"
                path.mkdir() if c == "folder" else c is not None and path.write_bytes(c)
                return ["compare", table, table, o, path]

            known_only = kind == "unknown scenes" and option in ("--known", "--leaked")
            if not known_only:
                yield Case("lists", f"compare {option} {kind}", make, ("list.txt",))
    attributes = {
        "empty": b"",
        "bytes": image,
        "no column scene": b"a,b\n1,2\n",
        "no other column": b"scene\ny_b\n",
        "scene twice": b"scene,weather\ny_b,a\ny_b,b\n",
        "a cell more": b"scene,weather\ny_b,a,b,c\n",
        "a column twice": b"scene,weather,weather\ny_b,a,b\n",
        "missing": None,
    }
    for kind, content in attributes.items():

        def make(folder: Path, c: Any = content, program: str = "compare") -> Action:
            path = folder / "attributes.csv"
            c is not None and path.write_bytes(c)
            compare = ["compare", table, table, "--attributes", path]
            return compare if program == "compare" else evaluate_line(root, folder / "out", "--attributes", path)

        for program in ("compare", "evaluate"):
            yield Case(
                "lists", f"{program} --attributes {kind}", functools.partial(make, program=program), ("attributes.csv",)
            )
    for program, more in (
        ("compare", ["compare", table, table]),
        ("evaluate", evaluate_line(root, Path("/no/such/out"))),
    ):
        for by in ("nosuch", "scene,nosuch"):
            line = [*more, "--attributes", root / "attributes.csv", "--by", by]
            yield Case("lists", f"{program} --by {by}", lambda _, line=line: line, ("nosuch",))
    for data in (
        "x",
        "=",
        "x=",
        "=x",
        "x=/no/such",
        "a b=/no/such",
        f"x={root / 'data'}:nosuch",
        f"x={root / 'data'}@0x5",
        f"x={root / 'data'}@5",
    ):
        line = ["evaluate", root / "model", "--data", data, "--out", "/no/such/out"]
        yield Case(
            "lists",
            f"evaluate --data {data.replace(str(root), '')}",
            lambda _, line=line: line,
            (data, "/no/such", "nosuch", "data"),
        )
    yield from saved_cases(root)
    line = evaluate_line(root, Path("/no/such/out"), "--data", f"ORFD={root / 'data'}")
    yield Case("lists", "evaluate with a name twice", lambda _: line, ("orfd",))
    for first in (
        "/no/such",
        "",
        str(root / "empty"),
        str(root / "classes.txt") + ":train",
        str(root / "data") + ":nosuch",
    ):
        line = ["audit", first, root / "scenes.txt"]
        yield Case(
            "lists",
            f"audit {first.replace(str(root), '')!r}",
            lambda _, line=line: line,
            (first or "first", Path(first).name, "nosuch"),
        )
    for more in (
        "--train-split nosuch",
        "--eval-split nosuch",
        "--crop 1",
        "--min-pixels 100000",
        "--eval-data /no/such",
        "--model nosuch",
        "--model /no/such",
        "--compile nosuch",
        "--tracker nosuch",
        "--precision fp16",
        "--eval-size 1x1",
        "--vision lora --lora-rank 0",
        "--data /no/such",
        "--min-lr 1",
        "--no-index --class-names a,b --image-column nosuch",
        "--no-index --class-names a,b --label-column nosuch",
        "--no-index --class-names a",
        "--no-index",
    ):
        words = more.split()
        yield Case("training", more, lambda f, w=words: train_line(root, f / "out", *w), tuple(words))
    for more in (
        "--only nosuch,traversable",
        "--only traversable",
        "--window 7",
        "--window 1 --stride 5",
        "--stride 0",
        "--size 1x1",
        "--device cuda",
        "--device mps",
        "--backend onnxruntime",
        "--precision tf32",
        "--window 0 --stride 3",
    ):
        line = ["predict", root / "model", root / "images" / "0.png", *more.split()]
        yield Case(
            "training",
            f"predict {more}",
            lambda f, w=line: [*w, "--out", f / "out"],
            (*more.split(), "window", "onnx", "cuda", "mps", "image"),
        )
        if "only" not in more and "backend" not in more:
            yield Case(
                "training",
                f"evaluate {more}",
                lambda f, m=more: evaluate_line(root, f / "out", *m.split()),
                (*more.split(), "window", "mps", "cuda", "image"),
            )


def saved_cases(root: Path) -> Iterator[Case]:
    """Saved predictions that cannot be scored; one of three frames has another file than it should."""
    ids = np.zeros((40, 40), np.uint8)

    def line(folder: Path, *more: object) -> list:
        source = ("--data", f"orfd={root / 'data'}", "--out", folder / "out", "--workers", 0)
        return ["evaluate", "--predictions", folder / "ids", *source, *more]

    def make(folder: Path, change: Any = None, more: Sequence[object] = ()) -> Action:
        for image in (root / "raw" / "validation").rglob("image_data/*.png"):
            save(folder / "ids" / f"{image.stem}.png", ids)
        path = folder / "ids" / f"{image.stem}.png"
        path.unlink() if isinstance(change, str) else None
        if isinstance(change, bytes):
            path.write_bytes(change)
        elif isinstance(change, np.ndarray):
            save(path, change)
        return line(folder, *more)

    good = save(root / "ids.png", ids).read_bytes()
    changes = {
        "missing": "",
        "of another size": ids[1:],
        "of a strange id": ids + 7,
        "in colours": np.zeros((40, 40, 3), np.uint8),
    }
    for kind, change in {**changes, **dict(broken(NO_BINARY, good))}.items():
        yield Case("lists", f"a prediction {kind}", functools.partial(make, change=change), (".png",))
    yield Case("lists", "a good prediction", make, (), True)
    for more in ("--class-names road", "--class-names a,b", "--class-names a,b --class-set common", "--no-index",
                 "--window 16", "--size 8x8", "--precision bf16", "--aug-test", "--class-set nosuch"):  # fmt: skip
        words = more.split()
        yield Case("lists", f"saved predictions {more}", functools.partial(make, more=words), (*words, "class"))
    for kind, place in {"missing": "nosuch", "a file": "classes.txt", "empty": "empty"}.items():
        words = ["--predictions", root / place]
        yield Case("lists", f"--predictions {kind}", lambda f, w=words: line(f, *w), (place,))
    for more in ("--image-column nosuch", "--no-index --label-column nosuch", "--no-index --class-names a",
                 "--class-names a,b", "--no-index --attributes x.csv"):  # fmt: skip
        words = more.split()
        yield Case("lists", f"evaluate {more}", lambda f, w=words: evaluate_line(root, f / "out", *w), (*words, "ids"))


AREAS = (
    config_cases,
    class_cases,
    array_cases,
    option_cases,
    model_cases,
    dataset_cases,
    run_cases,
    image_cases,
    checkpoint_cases,
    output_cases,
    text_cases,
)


def all_cases(root: Path) -> Iterator[Case]:
    """Every case; the fixtures lie below `root`."""
    for area in AREAS:
        yield from area(root)


def main(argv: Sequence[str] | None = None) -> dict[str, int]:
    """Tries all cases, prints every one that is not clear and the counts by area; the counts of all together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="AREA", default="", help="areas or cases with this in their name")
    parser.add_argument("--list", action="store_true", help="name the cases, try none")
    parser.add_argument("--all", action="store_true", help="print what was said in clear cases, too")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "good"
        (root / "empty").mkdir(parents=True)
        fixtures(root)
        for number, case in enumerate(all_cases(root)):
            if arguments.only not in f"{case.area}: {case.name}":
                continue
            if arguments.list:
                print(f"{case.area}: {case.name}")
                continue
            folder = Path(temporary) / str(number)
            folder.mkdir()
            found, told = verdict(case, folder)
            counts.setdefault(case.area, Counter())[found] += 1
            if found in BAD or arguments.all:
                print(f"{found:14} {case.area}: {case.name} -> {' | '.join(told.splitlines())[:400]}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    for area, found in counts.items():
        print(f"{area:30} {', '.join(f'{count} {name}' for name, count in sorted(found.items()))}")
    total = Counter[str]()
    for found in counts.values():
        total += found
    print(f"{sum(total.values())} cases: {', '.join(f'{count} {name}' for name, count in sorted(total.items()))}")
    return dict(total)


if __name__ == "__main__":
    found = main()
    os._exit(int(any(found.get(name) for name in BAD)))
