"""A model that is ready to predict computes the same numbers; the plain forward stays in its five files."""

import copy
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch
from conftest import micro_config, micro_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSemanticSegmentation

from tqdm_seg import fast_tqdm, windows_tqdm
from tqdm_seg.configuration_tqdm import TqdmConfig
from tqdm_seg.decoder_tqdm import sample_bilinear, sine_positions
from tqdm_seg.deploy.folder import save_model_folder
from tqdm_seg.fast_tqdm import (
    FastPixelDecoderLayer,
    FastTextAttention,
    PatchExpansion,
    cache_by_shape,
    cached_sine_positions,
    fold_activation,
    sample_table,
    short_softmax,
    value_table,
)
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.layers_tqdm import FeedForward
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation
from tqdm_seg.windows_tqdm import Segmenter, window_corners


@pytest.fixture
def learned(model, images) -> TqdmForSemanticSegmentation:
    """A model whose batch statistics and biases are not the initial ones, so that a fold without them shows."""
    torch.manual_seed(3)
    norm = model.model.vision_tower.pyramid.up4[1]
    for values, low, high in ((norm.weight, 0.5, 2), (norm.bias, -1, 1), (norm.running_mean, -1, 1)):
        torch.nn.init.uniform_(values, low, high)
    torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    torch.nn.init.uniform_(model.model.pixel_decoder.mask_features.bias, -1, 1)
    return model


@torch.no_grad()
def test_scores_of_a_ready_model_are_the_same(learned, images):
    before = learned.score(images)
    learned.prepare_for_inference()
    assert sum(isinstance(part, PatchExpansion) for part in learned.modules()) == 2
    torch.testing.assert_close(learned.score(images), before, rtol=0, atol=1e-5)
    # Raw predictions of every layer come from the same folded parts.
    raw = learned(images, all_layers=True)
    assert raw.mask_logits.shape[1] == learned.config.mask_decoder_layers + 1
    again = learned.score(images)
    learned.prepare_for_inference()  # a second time changes nothing
    torch.testing.assert_close(learned.score(images), again, rtol=0, atol=0)


@torch.no_grad()
def test_folding_leaves_fewer_products():
    model = micro_model()
    image = torch.randn(1, 3, 32, 32)

    def products() -> int:
        with FlopCounterMode(display=False) as counter:
            model.model(image, all_layers=True)
        return counter.get_total_flops()

    before = products()
    model.prepare_for_inference()
    assert products() < 0.95 * before


@pytest.mark.parametrize("activation", ["quick_gelu", "relu", "gelu"])
def test_feed_forward_keeps_its_values_and_gradients_when_folded(activation):
    torch.manual_seed(0)
    plain = FeedForward(16, 32, activation)
    folded = copy.deepcopy(plain)
    with torch.no_grad():
        fold_activation(folded)
    x = torch.randn(2, 5, 16)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for ffn, value in zip((plain, folded), inputs, strict=True):
        ffn(value).square().sum().backward()
    torch.testing.assert_close(folded(x), plain(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-5)


def test_a_ready_model_is_neither_trained_nor_saved(learned, tmp_path):
    assert learned.train().prepare_for_inference() is learned and not learned.training
    with pytest.raises(ValueError, match="load it again"):
        learned.train()
    with pytest.raises(ValueError, match="load it again"):
        learned.save_pretrained(tmp_path / "model")
    assert not any(p.requires_grad for p in learned.parameters()) and not (tmp_path / "model").exists()
    assert learned.eval() is learned


def test_a_model_on_several_devices_is_not_made_ready():
    model = micro_model()
    model.hf_device_map = {"model.vision_tower": 0, "model.pixel_decoder": "cpu"}
    with pytest.raises(ValueError, match="one device"):
        model.prepare_for_inference()


@pytest.mark.parametrize("queries", ["textual", "random"])
@torch.no_grad()
def test_frozen_texts_predict_the_same_save_and_load(queries, images, tmp_path):
    model = micro_model(queries=queries)
    before, size = model.score(images), sum(p.nbytes for p in model.state_dict().values())
    model.freeze_text()
    model.freeze_text()  # a second time changes nothing
    torch.testing.assert_close(model.score(images), before, rtol=0, atol=0)
    assert sum(p.nbytes for p in model.state_dict().values()) < size
    assert not [name for name in model.state_dict() if "text_tower" in name or "prompt" in name]
    save_model_folder(model, TqdmImageProcessor(), tmp_path / "frozen")
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "frozen", trust_remote_code=True)
    torch.testing.assert_close(loaded.eval().score(images), before, rtol=0, atol=0)
    assert loaded.config.frozen_texts == ["road", "traffic light", "sky"]
    loaded.prepare_for_inference()
    torch.testing.assert_close(loaded.score(images), before, rtol=0, atol=1e-5)


@torch.no_grad()
def test_frozen_texts_can_be_chosen_among_but_not_added_to(images, tmp_path):
    whole, frozen = micro_model(), micro_model()
    frozen.freeze_text()
    with pytest.raises(ValueError, match="no text tower for 'grass'"):
        frozen.set_classes({0: "road", 1: "grass"})
    assert frozen.config.id2label == whole.config.id2label
    for model in (whole, frozen):
        model.set_classes({0: "sky", 1: "road"})
    # The tower encoded three texts there and two here, whose products round differently on some machines.
    torch.testing.assert_close(frozen.score(images), whole.score(images), rtol=0, atol=1e-6)
    frozen.save_pretrained(tmp_path)
    loaded = TqdmForSemanticSegmentation.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded.score(images), frozen.score(images), rtol=0, atol=0)
    with pytest.raises(ValueError, match="gravel road"):
        TqdmForSemanticSegmentation.from_pretrained(tmp_path, id2label={0: "sky", 1: "gravel road"})


def test_training_without_the_text_tower_is_refused(images, labels):
    model = micro_model()
    model.freeze_text()
    with pytest.raises(ValueError, match=r"freeze_text\(\) dropped the text tower"):
        model.train()(images, labels)


def test_a_checkpoint_for_use_is_under_half_of_the_published_file():
    for preset, published in (("clip_vit_b16", 1120e6), ("eva02_clip_l14", 3188e6)):
        with torch.device("meta"):
            model = TqdmForSemanticSegmentation(TqdmConfig.from_preset(preset))
        kept_bytes = sum(v.nbytes for n, v in model.state_dict().items() if "text_tower" not in n)
        assert kept_bytes + 19 * 768 * 4 <= 0.45 * published


@torch.no_grad()
def test_texts_are_encoded_once_inside_cache_texts(model, images, monkeypatch):
    calls = []
    tower = model.model.text_queries.text_tower
    tower.register_forward_hook(lambda *_: calls.append(1))
    before = model.segment(images)
    with model.cache_texts():
        torch.testing.assert_close(model.segment(images), before, rtol=0, atol=0)
        model.segment(images.repeat(1, 1, 2, 2))
    assert len(calls) == 2  # one before, one inside
    model.segment(images)
    assert len(calls) == 3


@torch.no_grad()
def test_the_last_layer_alone_is_the_last_of_all(model, images):
    every, last = model(images, all_layers=True), model(images)
    assert last.class_logits.shape[1] == 1 and last.score_map is None
    torch.testing.assert_close(last.logits, every.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(last.mask_logits[:, 0], every.mask_logits[:, -1], rtol=0, atol=1e-5)


def table_samples(values, offsets, weights, sizes, start=0):
    """`sample_table` with the arguments of `sample_bilinear`."""
    return sample_table(value_table(values, sizes), offsets, weights, sizes, start)


@pytest.mark.parametrize("batch", [1, 2])
def test_table_samples_are_bilinear_samples(batch):
    torch.manual_seed(0)
    sizes, heads, width, points = ((2, 3), (4, 6), (8, 11)), 2, 8, 4
    length = sum(h * w for h, w in sizes)
    values = torch.randn(batch, length, heads, width)
    # Near, further, across the border and far outside.
    offsets = torch.randn(batch, length, heads, 3, points, 2) * torch.tensor([0.3, 1, 5, 100])[:, None]
    weights = torch.rand(batch, length, heads, 3 * points)
    found = []
    for sample in (sample_bilinear, table_samples):
        inputs = [x.clone().requires_grad_() for x in (values, offsets, weights)]
        output = sample(*inputs, sizes)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        found.append([output, *(x.grad for x in inputs)])
    for plain, fast in zip(*found, strict=True):
        assert plain.abs().max() > 0.1
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-4)
    tile = table_samples(values, offsets[:, 5:40], weights[:, 5:40], sizes, 5)
    torch.testing.assert_close(tile, found[0][0][:, 5:40], rtol=1e-5, atol=1e-4)
    on_cells = offsets.round()  # where a sample has no gradient, but a value
    expected = sample_bilinear(values, on_cells, weights, sizes)
    torch.testing.assert_close(table_samples(values, on_cells, weights, sizes), expected, rtol=1e-5, atol=1e-4)


def test_samples_at_no_finite_location_are_nan_and_read_nothing_else():
    sizes = ((2, 2), (3, 3), (4, 4))
    values, weights = torch.randn(1, 29, 1, 4), torch.rand(1, 29, 1, 6)
    offsets = torch.zeros(1, 29, 1, 3, 2, 2)
    offsets[0, 0], offsets[0, 1], offsets[0, 2] = torch.nan, torch.inf, -torch.inf
    output = table_samples(values, offsets, weights, sizes)[0]
    assert output[0].isnan().all() and not output[3:].isnan().any()


def test_cached_tensors_are_made_once_and_serve_training():
    calls = []

    @cache_by_shape
    def ramp(n: int, device: torch.device) -> torch.Tensor:
        calls.append(n)
        return torch.arange(n, device=device).float()

    cpu = torch.device("cpu")
    with torch.inference_mode():
        first = ramp(3, cpu)
    assert ramp(3, cpu) is first and calls == [3]
    weight = torch.ones(3, requires_grad=True)
    (weight * first).sum().backward()  # an inference tensor would be refused here
    assert weight.grad.tolist() == [0, 1, 2]
    assert cached_sine_positions(4, 5, 16, cpu) is cached_sine_positions(4, 5, 16, cpu)
    assert torch.equal(cached_sine_positions(4, 5, 16, cpu), sine_positions(4, 5, 16, cpu))


def test_no_window_is_computed_twice():
    for height in range(8, 40, 3):
        for width in range(8, 40, 5):
            for stride in (1, 5, 8):
                corners = window_corners(height, width, 8, stride)
                assert len(set(corners)) == len(corners)


@torch.no_grad()
def test_labels_are_the_argmax_of_the_scores(model, images):
    large = images.repeat(1, 1, 2, 1)
    labels = model.segment_labels(large, (50, 40), flip=True)
    assert labels.shape == (2, 50, 40) and labels.dtype == torch.int64
    assert torch.equal(labels, model.segment(large, (50, 40), flip=True).argmax(1))


class PixelSegmenter(Segmenter):
    """Scores are the pixels themselves, bent by what else is in the window."""

    def __init__(self, window_batch_size: int):
        self.config = micro_config(window_batch_size=window_batch_size)

    def window_scorer(self):
        return lambda windows: windows + windows.std((2, 3), keepdim=True)


@pytest.mark.parametrize("window_batch_size", [1, 4, 100])
def test_labels_need_only_the_scores_that_are_not_finished(monkeypatch, window_batch_size):
    segmenter = PixelSegmenter(window_batch_size)
    window, stride = segmenter.config.window_size, segmenter.config.window_stride
    sizes = []
    slide_strips = windows_tqdm.slide_strips

    def watched(score, pixel_values, scores, *settings):
        sizes.append(tuple(scores.shape[-2:]))
        return slide_strips(score, pixel_values, scores, *settings)

    monkeypatch.setattr(windows_tqdm, "slide_strips", watched)
    for length in (window // 2, window, window + 1, window + stride, 3 * window + 5):
        for turned in (False, True):
            images = torch.randn(2, 3, window + 7, length)
            images = images.mT.contiguous() if turned else images
            labels = segmenter.segment_labels(images)
            scores = segmenter.segment(images)
            assert torch.equal(labels, scores.argmax(1)) and len(labels.unique()) == 3
            torch.testing.assert_close(scores, plain_windows(segmenter, images), rtol=1e-6, atol=1e-6)
            height, width = images.shape[-2:]
            kept = (min(height, window), width) if height > width else (height, min(width, window))
            assert sizes[-2:] == [kept, (height, width)]


def plain_windows(segmenter: Segmenter, images: torch.Tensor) -> torch.Tensor:
    """Scores averaged over windows, as plainly as it goes."""
    config = segmenter.config
    total, hits = torch.zeros_like(images), torch.zeros_like(images)
    side = config.window_size
    for y, x in window_corners(*images.shape[-2:], side, config.window_stride):
        total[..., y : y + side, x : x + side] += segmenter.window_scorer()(images[..., y : y + side, x : x + side])
        hits[..., y : y + side, x : x + side] += 1
    return total / hits


def test_gradients_pass_through_windows(model):
    images = torch.randn(1, 3, model.config.window_size * 2, model.config.window_size, requires_grad=True)
    model(images).logits.sum().backward()
    assert images.grad.abs().amin((0, 1)).max() > 0 and images.grad[..., -1, :].any() and images.grad[..., 0, :].any()


@torch.no_grad()
@pytest.mark.parametrize("tile", [7, 80])
def test_a_layer_runs_on_tiles(model, images, monkeypatch, tile):
    whole = model.score(images)
    model.prepare_for_inference()
    calls = []
    model.model.pixel_decoder.layers[0].ffn.register_forward_hook(lambda _, inputs, __: calls.append(inputs[0].shape))
    monkeypatch.setattr(fast_tqdm, "TILE", tile)
    torch.testing.assert_close(model.score(images), whole, rtol=0, atol=1e-5)
    assert len(calls) > 1 and max(shape[1] for shape in calls) <= tile


@torch.no_grad()
@pytest.mark.parametrize("classes", [3, 40])
def test_folded_text_attention_is_attention(model, classes):
    torch.manual_seed(0)
    attention = model.model.pixel_decoder.layers[0].text_attention
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # biases too
    queries, keys, values = torch.randn(2, 9, 32), torch.randn(2, classes, 32), torch.randn(2, classes, 32)
    expected = attention(queries, keys, values)
    assert expected.std() > 0.1
    model.prepare_for_inference()
    assert isinstance(attention, FastTextAttention)
    torch.testing.assert_close(attention(queries, keys, values), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_without_text_attention_a_model_is_made_ready_too(images):
    model = micro_model(text_to_pixel_attention=False)
    before = model.score(images)
    model.prepare_for_inference()
    assert isinstance(model.model.pixel_decoder.layers[0], FastPixelDecoderLayer)
    torch.testing.assert_close(model.score(images), before, rtol=0, atol=1e-5)


def test_short_softmax_is_softmax():
    scores = torch.randn(3, 5, 12) * torch.tensor([1, 30, 1000])[:, None, None]
    expected = scores.softmax(-1)
    assert torch.equal(short_softmax(scores), expected)
    with torch.no_grad():
        torch.testing.assert_close(short_softmax(scores), expected, rtol=1e-5, atol=1e-7)
        assert short_softmax(scores.bfloat16()).dtype == torch.float32


def test_windows_at_once_follow_the_device_unless_said():
    model = micro_model()
    assert model.config.window_batch_size is None
    assert model.window_batch_size(torch.device("cpu")) == 1 and model.window_batch_size(torch.device("cuda")) == 8
    model.config.window_batch_size = 3
    assert model.window_batch_size(torch.device("cpu")) == 3


# ---- the method alone

ROOT = Path(__file__).parents[1]
METHOD = ("modeling_tqdm.py", "backbone_tqdm.py", "text_tqdm.py", "layers_tqdm.py", "decoder_tqdm.py")


def files_of(call: Callable[[], object]) -> set[str]:
    """Names of this repository's files whose functions run in a call."""
    names = set()

    def look(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "tests"):
            names.add(path.relative_to(ROOT).as_posix())

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(before)
    return names


@pytest.mark.parametrize("tower", ["clip", "eva02"])
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_a_forward_pass_stays_in_the_five_files_of_the_method(tower, training, images):
    model = micro_model(tower).train(training)
    assert files_of(lambda: model(images)) == set(METHOD)
    if not training:
        found = files_of(lambda: model(images.repeat(1, 1, 2, 2)))
        assert {*METHOD, "windows_tqdm.py"} <= found <= {*METHOD, "windows_tqdm.py", "configuration_tqdm.py"}
        model.prepare_for_inference()
        assert "fast_tqdm.py" in files_of(lambda: model(images))


@pytest.mark.parametrize("name", METHOD)
def test_the_method_has_no_branch_for_devices_or_compilers(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not [word for word in ("device.type", "is_compiling", "is_in_onnx_export", "is_cuda") if word in text]


def test_the_fast_layers_are_imported_in_one_place():
    files = [*ROOT.glob("*.py"), *(ROOT / "tqdm_seg").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    places = {
        f"{file.name}: {line.strip()}"
        for file in files
        for line in file.read_text(encoding="utf-8").splitlines()
        if re.match(r"\s*(from|import)\s.*fast_tqdm", line)
    }
    assert places == {"modeling_tqdm.py: from .fast_tqdm import make_fast"}


def test_every_root_module_has_its_stub():
    modules = {path.stem for path in ROOT.glob("*_tqdm.py")} | {"train"}
    stubs = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "tqdm_seg").glob("*.pyi")}
    assert stubs == {name: f"from {name} import *\n" for name in modules}
