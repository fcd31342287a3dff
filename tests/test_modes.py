"""Faster modes keep to what they promise, and the table of what they change is made of real comparisons."""

import importlib.util
import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import micro_model
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tqdm_seg.deploy.folder import save_model_folder
from tqdm_seg.deploy.speed import ready_to_predict, use_huge_pages
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import mode_changes


@torch.no_grad()
def test_float32_is_the_same_and_bfloat16_is_close(images):
    plain = micro_model().segment(images)
    torch.testing.assert_close(ready_to_predict(micro_model()).segment(images), plain, rtol=0, atol=1e-5)
    halved = ready_to_predict(micro_model(), "bf16")
    assert {p.dtype for p in halved.parameters()} == {torch.bfloat16}
    scores = halved.segment(images.bfloat16())
    assert scores.dtype == torch.float32 and 1e-4 < (scores - plain).abs().max() < 0.3


@pytest.mark.slow
@torch.no_grad()
def test_windows_are_compiled_once_and_the_same(images, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # seconds instead of minutes
    large = images.repeat(1, 1, 2, 2)
    plain = micro_model().segment(large)
    torch.compiler.reset()
    model = ready_to_predict(micro_model(), compiled=True)
    torch.testing.assert_close(model.segment(large), plain, rtol=0, atol=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(
            model.segment(large[:, :, :50], flip=True), micro_model().segment(large[:, :, :50], flip=True)
        )


def held_bytes(weight: torch.Tensor) -> int:
    """Bytes of the plain tensors that a weight is made of, however its library nests them."""
    parts = weight.__tensor_flatten__()[0] if is_traceable_wrapper_subclass(weight) else ()
    return sum(held_bytes(getattr(weight, part)) for part in parts) if parts else weight.nbytes


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_int8_holds_the_tower_in_bytes_and_is_close(images):
    plain = micro_model().segment(images)
    model = ready_to_predict(micro_model(), "int8")
    tower, before = (m.model.vision_tower.blocks[0].ffn.fc1.weight for m in (model, micro_model()))
    assert held_bytes(tower) < held_bytes(before) / 2
    assert model.model.pixel_decoder.layers[0].ffn.fc1.weight.dtype == torch.float32
    assert 1e-5 < (model.segment(images) - plain).abs().max() < 0.3


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="'int4'.*fp32, tf32, bf16, fp16, int8"):
        ready_to_predict(micro_model(), "int4")
    with pytest.raises(ValueError, match="int8 runs on CPUs"):
        ready_to_predict(micro_model().to("meta"), "int8")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torchao" else find(name, *rest)
    )
    with pytest.raises(ImportError, match="pip install torchao"):
        ready_to_predict(micro_model(), "int8")


def test_the_table_of_changes_tells_a_mode_from_none(tmp_path, monkeypatch):
    model = micro_model(id2label={0: "non-traversable", 1: "traversable"}, window_size=None)
    save_model_folder(model, TqdmImageProcessor(), tmp_path / "model")
    monkeypatch.setattr(mode_changes, "IMAGES", ("examples/orfd_mini/*.png", "examples/frames/*/*/image_data/*296.png"))
    settings = mode_changes.ModeSettings(
        model=tmp_path / "model", out=tmp_path, only=("float32, as loaded", "bfloat16")
    )
    mode_changes.measure_modes(settings)
    same, coarse = json.loads((tmp_path / "mode_changes.json").read_text())["rows"]
    assert same["pack_difference"] < 5e-4 < coarse["pack_difference"]
    assert same["pack_pixels_changed"] == same["pixels_changed"] == 0 < coarse["pack_pixels_changed"]
    assert 0 < same["miou"] < 1
    lines = (tmp_path / "mode_changes.md").read_text().splitlines()
    assert lines[-1].startswith("| bfloat16 |") and lines[-1].count("|") == 6


def test_huge_pages_are_asked_for_unless_refused(monkeypatch):
    for given, expected in ((None, "1"), ("0", "0")):
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", given or "")
        if given is None:
            monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
        use_huge_pages()
        assert os.environ["THP_MEM_ALLOC_ENABLE"] == expected
