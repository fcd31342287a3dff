"""What is exported computes what the model does, and `predict` makes the same maps with it."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import micro_config, micro_model
from PIL import Image

import tqdm_seg.deploy.export as export_tqdm
from tqdm_seg.commands import start
from tqdm_seg.deploy.export import OnnxSegmenter
from tqdm_seg.deploy.folder import save_model_folder
from tqdm_seg.deploy.options import OPSET
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

pytestmark = pytest.mark.filterwarnings("ignore")
PHOTO = sorted(Path(__file__).parents[1].glob("examples/frames/*/*/image_data/*.png"))[0]


@pytest.fixture(scope="module", params=[pytest.param(tower, marks=pytest.mark.slow) for tower in ("clip", "eva02")])
def made(request, one_thread, tmp_path_factory) -> tuple[TqdmForSemanticSegmentation, Path, Path]:
    """A model whose masks are steep enough, and one class rare enough, that none wins everywhere; folder; export.

    CLIP's last patches are padded and its window.pt2 is of whole windows, EVA02's are stretched, and of low ones.
    """
    folder = tmp_path_factory.mktemp(request.param)
    rest, size = ("pad", None) if request.param == "clip" else ("stretch", (28, 32))
    model = micro_model(request.param, vision_config={"patch_remainder": rest})
    with torch.no_grad():
        for layer in model.model.mask_decoder.mask_head[::2]:
            layer.weight.mul_(4)
        model.model.mask_decoder.class_head.bias[1] -= 2
    save_model_folder(model, TqdmImageProcessor(), folder / "model")
    export_tqdm.export(model=str(folder / "model"), out=folder / "export", size=size)
    return model, folder / "model", folder / "export"


@pytest.fixture
def photo(tmp_path) -> Path:
    """A real photograph, wider than the window and lower."""
    path = tmp_path / "photo.png"
    Image.open(PHOTO).convert("RGB").resize((75, 30)).save(path)
    return path


def test_the_folder_holds_both_files_and_what_they_were_checked_on(made):
    model, _, export = made
    assert {file.name for file in export.iterdir()} >= {
        "window.onnx", "window.pt2", "export.json", "config.json", "preprocessor_config.json",
    }  # fmt: skip
    facts = json.loads((export / "export.json").read_text())
    clip = model.config.vision_config.tower == "clip"
    assert (facts["size"], facts["multiple_of"]) == (([32, 32], 8) if clip else ([28, 32], 1))
    assert facts["opset"] == OPSET and facts["bound"] == 5e-4
    assert set(facts["checks"]["window.pt2"]) == {"random", "image", "both, three at once"}
    assert set(facts["checks"]["window.onnx"]) == {"random", "image", "both, three at once", "larger"}
    assert all(0 <= value <= 3e-5 for found in facts["checks"].values() for value in found.values())
    assert json.loads((export / "config.json").read_text())["frozen_texts"] == model.config.class_names


@pytest.mark.parametrize("size", [(32, 32), (41, 57), (16, 100)])
def test_the_onnx_file_takes_any_number_of_images_of_any_size(made, size):
    model, _, export = made
    runtime = OnnxSegmenter(export)
    for batch in (1, 4):
        images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))
        with torch.inference_mode():
            torch.testing.assert_close(runtime.score(images), model.score(images), rtol=0, atol=3e-5)


@pytest.mark.parametrize("size", [(100, 100), (97, 131), (23, 17)])
def test_the_onnx_file_itself_is_exact_at_any_size(made, size):
    """Without the padding of `OnnxSegmenter`: the file rounds sizes up to patches itself."""
    model, _, export = made
    session = OnnxSegmenter(export).session
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    (scores,) = session.run(["scores"], {"pixel_values": images.numpy()})
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(scores), model.score(images), rtol=0, atol=3e-5)


def test_the_torch_file_takes_any_number_of_windows(made):
    model, _, export = made
    score = torch.export.load(export / "window.pt2").module()
    size = json.loads((export / "export.json").read_text())["size"]
    for batch in (1, 4):
        windows = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))
        with torch.inference_mode():
            torch.testing.assert_close(score(windows), model.score(windows), rtol=0, atol=3e-5)


def test_sliding_flipping_and_scales_are_those_of_the_model(made):
    model, _, export = made
    views = [torch.randn(1, 3, 50, 70), torch.randn(1, 3, 28, 45)]
    expected = model.segment(views, (60, 80), flip=True, softmax_views=True)
    runtime = OnnxSegmenter(export)
    found = runtime.segment(views, (60, 80), flip=True, softmax_views=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5)
    assert torch.equal(runtime.segment_labels(views[0]), runtime.segment(views[0]).argmax(1))
    assert runtime.session.get_session_options().intra_op_num_threads == torch.get_num_threads()


@pytest.mark.parametrize("options", [["--stride", "16"], ["--window", "26", "--flip"], ["--window", "40"]])
def test_predict_makes_the_same_maps_with_either_backend(made, photo, tmp_path, options):
    maps, protocols = [], []
    for model, backend in ((made[1], "torch"), (made[2], "onnxruntime")):
        out = tmp_path / backend
        arguments = [str(model), str(photo), "--out", str(out), "--backend", backend, "--device", "cpu", *options]
        assert start("predict", arguments) == 0
        maps.append(np.array(Image.open(out / "ids" / "photo.png")))
        protocols.append(json.loads((out / "areas.json").read_text())["protocol"])
    assert len(np.unique(maps[0])) > 1 and np.mean(maps[0] != maps[1]) < 1e-3
    assert protocols[1]["backend"].startswith("onnxruntime 1.") and protocols[0]["backend"] == "torch"
    assert {key for key in protocols[0] if protocols[0][key] != protocols[1][key]} == {"model", "backend"}


@pytest.mark.parametrize(
    ("folder", "options", "message"),
    [
        (2, ["--backend", "onnxruntime", "--precision", "bf16"], "--precision"),
        (2, ["--backend", "onnxruntime", "--compile"], "--compile"),
        (2, ["--backend", "onnxruntime", "--device", "mps"], "cpu or cuda"),
        (2, [], "add --backend onnxruntime"),
        (1, ["--backend", "onnxruntime"], "window.onnx.*tqdm-seg export"),
    ],
)
def test_what_does_not_go_together_is_named_with_the_fix(made, photo, tmp_path, capsys, folder, options, message):
    try:
        status = start("predict", [str(made[folder]), str(photo), "--out", str(tmp_path / "out"), *options])
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr().err
    assert status in (1, 2) and printed.count("\n") == 1 and re.search(message, printed), printed


def test_what_cannot_be_run_is_named_with_the_fix(made, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in made[2].iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 1000 if file.name == "window.onnx" else None])
    with pytest.raises(ValueError, match="window.onnx is damaged"):
        OnnxSegmenter(broken)
    with pytest.raises(ValueError, match="image is 8x70 pixels; enlarge it to at least 16x16"):
        OnnxSegmenter(made[2]).score(torch.zeros(1, 3, 8, 70))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="find no cuda here"):
            OnnxSegmenter(made[2], "cuda")


def test_a_missing_runtime_is_named_with_the_fix(made, tmp_path, monkeypatch):
    monkeypatch.setattr(export_tqdm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install onnx onnxscript onnxruntime"):
        OnnxSegmenter(made[2])
    with pytest.raises(ImportError, match="pip install onnx onnxscript onnxruntime"):
        export_tqdm.export(model=str(made[1]), out=tmp_path / "out")


def test_an_export_that_differs_or_stops_leaves_nothing(tmp_path, monkeypatch):
    def write(window, example, path):
        path.write_bytes(b"wrong")

    save_model_folder(micro_model(), TqdmImageProcessor(), tmp_path / "model")
    monkeypatch.setattr(export_tqdm, "export_torch", write)
    monkeypatch.setattr(torch.export, "load", lambda path: SimpleNamespace(module=lambda: torch.zeros_like))
    fields = {"model": str(tmp_path / "model"), "out": tmp_path / "out", "format": "torch"}
    with pytest.raises(ValueError, match="window.pt2 differs from the model"):
        export_tqdm.export(**fields)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_tqdm, "compare_scores", stop)
    with pytest.raises(KeyboardInterrupt):
        export_tqdm.export(**fields)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    export_tqdm.export(**fields, check=False)
    assert json.loads((tmp_path / "out" / "export.json").read_text())["checks"] == {}


def test_an_operator_set_that_torch_does_not_write_is_refused(tmp_path, monkeypatch):
    program = SimpleNamespace(model=SimpleNamespace(opset_imports={"": 18}))
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: program)
    window = export_tqdm.WindowModel(micro_model())
    with pytest.raises(ValueError, match="--opset 16: torch .* gets no lower than 18"):
        export_tqdm.export_onnx(window, tmp_path / "window.onnx", 16)


def test_the_torch_file_is_of_a_window_or_of_the_size_asked_for():
    config, whole = micro_config(), micro_config(window_size=None)
    assert [export_tqdm.window_size(model, None) for model in (config, whole)] == [(32, 32)] * 2
    assert export_tqdm.window_size(config, (24, 32)) == (24, 32) and export_tqdm.window_size(whole, (40, 52)) == (
        40,
        52,
    )
    with pytest.raises(ValueError, match="slides windows of 32x32"):
        export_tqdm.window_size(config, (40, 52))


def test_only_an_earlier_export_is_replaced(tmp_path):
    save_model_folder(micro_model(), TqdmImageProcessor(), tmp_path / "model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "full", tmp_path / "file", tmp_path / "model"):
        with pytest.raises(FileExistsError, match=out.name):
            export_tqdm.export(model=str(tmp_path / "model"), out=out)
    assert (tmp_path / "full/thesis.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "model/model.safetensors").is_file()
