"""Folders of models: damaged ones are refused in one line, and every saved one loads through every door."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import micro_model
from PIL import Image
from processes import finish
from safetensors.torch import load_file, save_file

from tqdm_seg.commands import start
from tqdm_seg.deploy.export import export
from tqdm_seg.deploy.folder import load_model, save_model_folder
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

ROOT = Path(__file__).parents[1]


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


# ---- Loading runs nothing of the folder, and is checked


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(path)
    return path


def test_code_planted_in_a_folder_does_not_run(folder, photo, tmp_path, monkeypatch):
    """predict, export, evaluate, report and train load by one loader, with the classes of this package."""
    monkeypatch.chdir(tmp_path)
    for file in folder.glob("*_tqdm.py"):
        file.write_text("open('victim', 'w').write('ran')\n")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("open('victim', 'w').write('ran')\n")
    assert start("predict", [str(folder), str(photo), "--out", "out"]) == 0
    monkeypatch.setattr("tqdm_seg.deploy.export.export_torch", lambda window, example, path: path.write_bytes(b""))
    export(model=str(folder), out="exported", format=("torch",), check=False)
    load_model(folder)
    from tqdm_seg.training.build import build_model
    from tqdm_seg.training.options import TrainOptions

    build_model(TrainOptions(model=str(folder), data=str(ROOT / "examples/orfd_mini"), steps=1), ("road", "sky"))
    assert not (tmp_path / "victim").exists()


def test_predict_check_compares_the_scores_with_the_saved_ones(folder, photo, tmp_path, capsys):
    command = [str(folder), str(photo), "--check", "--out", str(tmp_path / "out")]
    assert start("predict", command) == 0
    assert "self-check" in capsys.readouterr().out
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("class_head.weight"))
    edit_weights(folder, **{name: torch.randn_like(weights[name])})
    assert start("predict", [*command[:-1], str(tmp_path / "second")]) == 1
    assert "self_check.json" in capsys.readouterr().err
    assert not (tmp_path / "second").exists()
    with pytest.raises(ValueError, match=r"self_check\.json"):
        export(model=str(folder), out=tmp_path / "exported", format=("torch",), check=False)
    (folder / "self_check.json").unlink()
    assert start("predict", [*command[:-1], str(tmp_path / "third")]) == 1
    assert "self_check.json" in capsys.readouterr().err


@pytest.mark.parametrize("trained", [False, True])
def test_start_models_are_named_in_one_line(folder, photo, tmp_path, capsys, trained):
    fields = json.loads((folder / "config.json").read_text()) | {"trained": trained}
    (folder / "config.json").write_text(json.dumps(fields))
    assert start("predict", [str(folder), str(photo), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err.count("is not trained") == (not trained)


# ---- Every way of saving against every way of loading

# Run in a new process in a folder of its own: loads by every door, prints the ids of an image by each.
DOORS = """
import json, sys
import torch
import transformers.dynamic_module_utils
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation, pipeline
folder, photo, holds, modules = sys.argv[1:]
sys.path.insert(0, modules)
transformers.dynamic_module_utils.HF_MODULES_CACHE = modules
ours, names = {"trust_remote_code": True}, ["road", "traffic light", "sky"]
image, found = Image.open(photo), {}
processor = AutoImageProcessor.from_pretrained(folder, **ours)
if holds == "model":
    found["config"] = list(AutoConfig.from_pretrained(folder, **ours).id2label.values())
    model = AutoModelForSemanticSegmentation.from_pretrained(folder, **ours).eval()
    base = AutoModel.from_pretrained(folder, **ours).eval()
    values = processor(images=image, return_tensors="pt").pixel_values
    with torch.no_grad():
        found["model"] = model.segment_labels(values, (40, 40))[0].flatten().tolist()
        assert torch.equal(base(values).mask_logits, model.model(values).mask_logits)
    segments = pipeline("image-segmentation", folder, trust_remote_code=True)(photo)
    found["pipeline"] = {part["label"]: sum(map(bool, part["mask"].getdata())) for part in segments}
from tqdm_seg.deploy.export import export
from tqdm_seg.deploy.folder import load_model
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
if holds == "model":
    model, processor = load_model(__import__("pathlib").Path(folder))
    found["ours"] = model.segment_labels(values, (40, 40))[0].flatten().tolist()
else:
    TqdmImageProcessor.from_pretrained(folder)
print("FOUND", json.dumps(found))
"""


def by_auto_classes(saved: Path):
    from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

    model = AutoModelForSemanticSegmentation.from_pretrained(saved, trust_remote_code=True)
    return model, AutoImageProcessor.from_pretrained(saved, trust_remote_code=True)


def save_frozen(saved: Path, out: Path) -> None:
    """README: Auto class, freeze_text, save_pretrained."""
    model, processor = by_auto_classes(saved)
    model.freeze_text()
    model.save_pretrained(out)
    processor.save_pretrained(out)


def save_own_classes(saved: Path, out: Path) -> None:
    TqdmForSemanticSegmentation.from_pretrained(saved).save_pretrained(out)
    TqdmImageProcessor.from_pretrained(saved).save_pretrained(out)


def save_new(saved: Path, out: Path) -> None:
    micro_model().save_pretrained(out)
    TqdmImageProcessor().save_pretrained(out)


def save_in_parts(saved: Path, out: Path) -> None:
    """Weights in several files, as large models have them."""
    micro_model().save_pretrained(out, max_shard_size="50KB")
    TqdmImageProcessor().save_pretrained(out)
    assert len(list(out.glob("model-*.safetensors"))) > 1


def save_processor(saved: Path, out: Path) -> None:
    TqdmImageProcessor().save_pretrained(out)


def save_processor_again(saved: Path, out: Path) -> None:
    by_auto_classes(saved)[1].save_pretrained(out)


def save_twice(saved: Path, out: Path) -> None:
    """A copy of a copy, by both kinds of classes."""
    save_own_classes(saved, out.with_name("first"))
    model, processor = by_auto_classes(out.with_name("first"))
    model.save_pretrained(out)
    processor.save_pretrained(out)


def save_by_trainer(saved: Path, out: Path) -> None:
    """A checkpoint that transformers' Trainer leaves."""
    from transformers import Trainer, TrainingArguments

    model, processor = by_auto_classes(saved)
    row = {"pixel_values": torch.randn(3, 32, 32), "labels": torch.zeros(32, 32, dtype=torch.long)}
    settings = TrainingArguments(
        str(out.with_name("trainer")), max_steps=1, save_steps=1, learning_rate=0.0, report_to=[], use_cpu=True,
        per_device_train_batch_size=1, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, settings, train_dataset=[row, row], processing_class=processor).train()
    shutil.move(out.with_name("trainer") / "checkpoint-1", out)


def save_by_push(saved: Path, out: Path) -> None:
    """What push_to_hub uploads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: type("Repo", (), {"repo_id": "me/it"})())
        patch.setattr(
            "transformers.utils.hub.PushToHubMixin._upload_modified_files",
            lambda self, folder, *_, **__: shutil.copytree(folder, out, dirs_exist_ok=True),
        )
        for part in by_auto_classes(saved):
            part.push_to_hub("me/it")


def save_by_us(saved: Path, out: Path) -> None:
    save_model_folder(*load_model(saved), out)


ROUTES = [
    save_frozen, save_own_classes, save_new, save_in_parts, save_processor, save_processor_again, save_twice,
    save_by_trainer, save_by_push, save_by_us,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("save", ROUTES, ids=lambda route: route.__name__.removeprefix("save_"))
def test_every_saved_folder_loads_through_every_door(saved, save, tmp_path):
    out, photo = tmp_path / "saved", tmp_path / "photo.png"
    save(saved, out)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(photo)
    holds = "processor" if save in (save_processor, save_processor_again) else "model"
    printed = finish("-c", DOORS, out, photo, holds, tmp_path / "modules", folder=tmp_path)
    if holds == "processor":
        return
    found = json.loads(printed.split("FOUND ")[1].splitlines()[0])
    model, processor = load_model(saved)
    values = processor(images=Image.open(photo), return_tensors="pt").pixel_values
    expected = model.segment_labels(values, (40, 40))[0].flatten().tolist()
    names = ["road", "traffic light", "sky"]
    assert found["config"] == names
    assert found["model"] == found["ours"] == expected
    assert found["pipeline"] == {names[label]: expected.count(label) for label in set(expected)}
