"""What is exported computes what the model does, and predict.py makes the same maps with it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import micro_model
from parity import PACKS, Pack
from PIL import Image

from tqdm_seg import export_tqdm, predict
from tqdm_seg.export_tqdm import OnnxSegmenter
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation
from tqdm_seg.publish_tqdm import save_model_folder

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=["mini_clip", "mini_eva02"])
def made(request, tmp_path_factory) -> tuple[TqdmForSemanticSegmentation, Path, Path]:
    """A model of the parity packs, whose predictions are not one class everywhere; its folder, its export."""
    folder = tmp_path_factory.mktemp(request.param)
    model = Pack(PACKS / request.param).model()
    save_model_folder(model, TqdmImageProcessor(), folder / "model")
    export_tqdm.main([str(folder / "model"), str(folder / "export")])
    return model, folder / "model", folder / "export"


def test_the_folder_holds_both_files_and_what_they_were_checked_on(made):
    model, _, export = made
    assert {file.name for file in export.iterdir()} == {
        "window.onnx", "window.pt2", "export.json", "config.json", "preprocessor_config.json",
    }  # fmt: skip
    facts = json.loads((export / "export.json").read_text())
    assert facts["size"] == [64, 64] and facts["opset"] == export_tqdm.OPSET and facts["bound"] == 5e-4
    for name in ("window.onnx", "window.pt2"):
        assert set(facts["checks"][name]) == {"random", "picture", "both, three at once"}
        assert all(0 <= value <= 5e-5 for value in facts["checks"][name].values())
    assert json.loads((export / "config.json").read_text())["frozen_texts"] == model.config.class_names


@pytest.mark.parametrize("batch", [1, 4])
def test_any_number_of_windows_at_once(made, batch):
    model, _, export = made
    windows = torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model.score(windows)
        for run_file, name in ((export_tqdm.run_onnx, "window.onnx"), (export_tqdm.run_torch, "window.pt2")):
            torch.testing.assert_close(run_file(export / name, windows), expected, rtol=0, atol=5e-5)


def test_sliding_flipping_and_scales_are_those_of_the_model(made):
    model, _, export = made
    views = [torch.randn(1, 3, 70, 100), torch.randn(1, 3, 64, 90)]
    expected = model.segment(views, (60, 80), flip=True, softmax_views=True)
    runtime = OnnxSegmenter(export)
    found = runtime.segment(views, (60, 80), flip=True, softmax_views=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)
    assert torch.equal(runtime.segment_labels(views[0]), runtime.segment(views[0]).argmax(1))


def test_predict_makes_the_same_maps_with_either_backend(made, tmp_path):
    _, folder, export = made
    photo = tmp_path / "photo.png"
    source = next(iter(sorted(Path(export_tqdm.__file__).parent.glob("examples/frames/*/*/image_data/*.png"))))
    Image.open(source).convert("RGB").resize((160, 90)).save(photo)
    maps, protocols = [], []
    for model, backend in ((folder, "torch"), (export, "onnxruntime")):
        out = tmp_path / backend
        assert predict.main([str(model), str(photo), "--out", str(out), "--backend", backend, "--stride", "32"]) == 0
        maps.append(np.array(Image.open(out / "ids" / "photo.png")))
        protocols.append(json.loads((out / "areas.json").read_text())["protocol"])
    assert len(np.unique(maps[0])) > 1 and np.mean(maps[0] != maps[1]) < 1e-3
    assert protocols[1]["backend"].startswith("onnxruntime 1.") and protocols[0]["backend"] == "torch"
    assert {key for key in protocols[0] if protocols[0][key] != protocols[1][key]} == {"model", "backend"}


@pytest.mark.parametrize("options", [["--window", "32"], ["--dtype", "bfloat16"], ["--compile"]])
def test_options_of_the_export_are_refused(made, options, capsys, tmp_path):
    photo = next(iter(sorted(Path(export_tqdm.__file__).parent.glob("examples/frames/*/*/image_data/*.png"))))
    with pytest.raises(SystemExit):
        predict.main([str(made[2]), str(photo), "--out", str(tmp_path), "--backend", "onnxruntime", *options])
    assert "change what was exported" in capsys.readouterr().err


def test_what_is_no_export_is_named_with_the_fix(made, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="no window.onnx.*python export_tqdm.py MODEL OUT"):
        OnnxSegmenter(made[1])
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in made[2].iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 1000 if file.name == "window.onnx" else None])
    with pytest.raises(ValueError, match="cannot read .*window.onnx"):
        OnnxSegmenter(broken)
    with pytest.raises(ValueError, match="64x70 pixels and this export computes 64x64 only.*--size 64x70"):
        OnnxSegmenter(made[2]).score(torch.zeros(1, 3, 64, 70))
    with pytest.raises(ValueError, match="finds no cuda here"):
        OnnxSegmenter(made[2], "cuda")


def test_a_missing_runtime_is_named_with_the_fix(made, monkeypatch):
    monkeypatch.setattr(export_tqdm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install onnx onnxscript onnxruntime"):
        OnnxSegmenter(made[2])


def test_an_export_that_differs_or_stops_leaves_nothing(tmp_path, monkeypatch):
    save_model_folder(micro_model(), TqdmImageProcessor(), tmp_path / "model")
    monkeypatch.setattr(export_tqdm, "export_torch", lambda window, example, path: path.write_bytes(b"wrong"))
    monkeypatch.setattr(export_tqdm, "run_torch", lambda path, x: torch.zeros(1))
    words = [str(tmp_path / "model"), str(tmp_path / "out"), "--format", "torch"]
    with pytest.raises(ValueError, match="window.pt2 differs from the model"):
        export_tqdm.main(words)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_tqdm, "check", stop)
    with pytest.raises(KeyboardInterrupt):
        export_tqdm.main(words)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_whole_images_are_exported_at_the_size_asked_for(tmp_path):
    model = micro_model(window_size=None)
    save_model_folder(model, TqdmImageProcessor(), tmp_path / "model")
    export_tqdm.main([str(tmp_path / "model"), str(tmp_path / "out"), "--size", "40x52", "--format", "torch"])
    image = torch.randn(1, 3, 40, 52)
    with torch.inference_mode():
        found = export_tqdm.run_torch(tmp_path / "out" / "window.pt2", image)
    torch.testing.assert_close(found, model.segment(image), rtol=0, atol=5e-5)
    with pytest.raises(ValueError, match="slides windows of 32x32"):
        export_tqdm.window_size(micro_model().config, (40, 52))
