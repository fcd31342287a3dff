"""Folders of models: damaged ones are refused in one line, and every saved one loads through every door."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import micro_model
from safetensors.torch import load_file, save_file

from tqdm_seg.deploy.folder import load_model, save_model_folder
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "model"
    save_model_folder(micro_model(), TqdmImageProcessor(), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


WEIGHT = "model.mask_decoder.class_head.weight"


def edit_weights(folder: Path, **changes) -> None:
    """Exchanges tensors; None removes one."""
    weights = load_file(folder / "model.safetensors") | {name.replace("__", "."): new for name, new in changes.items()}
    save_file({name: new for name, new in weights.items() if new is not None}, folder / "model.safetensors")


def damage(folder: Path, kind: str) -> str:
    """Damages the folder; what the error has to name."""
    file = folder / "model.safetensors"
    name = next(name for name in load_file(file) if name.endswith("class_head.weight"))
    weight = load_file(file)[name]
    weights = {"missing": None, "nan": weight * float("nan"), "infinite": weight / 0, "integers": weight.int(),
               "another shape": weight[:1].clone()}  # fmt: skip
    files = {"pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n",
             "cut": file.read_bytes()[:-9], "header cut": file.read_bytes()[:50], "empty": b""}  # fmt: skip
    configs = {
        "config empty": "",
        "config cut": '{"model_type": "tqdm"',
        "config list": "[]",
        "other type": '{"model_type": "clip"}',
        "config fields": json.dumps({"model_type": "tqdm", "id2label": ["road"]}),
    }
    if kind in weights:
        edit_weights(folder, **{name: weights[kind]})
        return name
    if kind == "unknown":
        edit_weights(folder, surprise=torch.ones(1))
        return "surprise"
    if kind in files:
        file.write_bytes(files[kind])
    elif kind in configs:
        (folder / "config.json").write_text(configs[kind])
        return "config.json"
    elif kind == "no weights":
        file.unlink()
    elif kind == "index":
        file.rename(folder.parent / "victim.safetensors")
        content = {"weight_map": {name: "../victim.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
        return "index.json"
    elif kind == "processor":
        (folder / "preprocessor_config.json").write_text("[]")
        return "preprocessor_config.json"
    elif kind == "bin":
        torch.save(load_file(file), folder / "pytorch_model.bin")
        file.unlink()
    return str(file)


DAMAGES = [
    "missing", "nan", "infinite", "integers", "another shape", "unknown", "pointer", "cut", "header cut", "empty",
    "config empty", "config cut", "config list", "other type", "config fields", "no weights", "index", "processor",
    "bin",
]  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_folders_are_refused_in_one_line(folder, kind):
    named = damage(folder, kind)
    with pytest.raises((OSError, ValueError)) as caught:
        load_model(folder)
    message = str(caught.value)
    assert named in message
    assert str(folder.parent) in message
    assert "weights_only" not in message and "\n" not in message
    assert len(message.replace(str(folder), "M")) < 300
    if kind == "pointer":
        assert "git lfs pull" in message


def test_whole_folders_load(folder):
    model, _ = load_model(folder)
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor)
