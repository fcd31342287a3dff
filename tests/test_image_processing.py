"""The image processor keeps the published sizes, pixels and label rules."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from doors import path_without_caches
from PIL import Image
from transformers import AutoImageProcessor
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from tqdm_seg.image_processing_tqdm import TqdmImageProcessor

CITYSCAPES = {"shortest_edge": 1024, "longest_edge": 2048}
BDD100K = {"shortest_edge": 720, "longest_edge": 1280}
SMALL = {"shortest_edge": 32, "longest_edge": 64}
SOURCE = Path(__file__).parents[1] / "image_processing_tqdm.py"


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8 noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def random_map(height: int, width: int, ids: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """(H, W) uint8 noise of the given ids."""
    return np.random.default_rng(seed).choice(np.array(ids, dtype=np.uint8), (height, width))


@pytest.fixture
def processor() -> TqdmImageProcessor:
    return TqdmImageProcessor()


# --- sizes ---


@pytest.mark.parametrize(
    ("box", "image", "expected"),
    [  # (height, width); the expected sides were worked out by hand from the published rule
        (CITYSCAPES, (1024, 2048), (1024, 2048)),
        (CITYSCAPES, (2048, 1024), (2048, 1024)),  # portrait: the box turns with the image
        (CITYSCAPES, (1052, 1914), (1024, 1863)),  # 1914 * 1024 / 1052 = 1863.06
        (CITYSCAPES, (1914, 1052), (1863, 1024)),
        (CITYSCAPES, (480, 640), (1024, 1365)),  # enlarged: 640 * 1024 / 480 = 1365.33
        (CITYSCAPES, (1216, 2160), (1024, 1819)),  # 2160 * 1024 / 1216 = 1818.95, where the library cuts off to 1818
        (CITYSCAPES, (500, 1500), (683, 2048)),  # the long side decides: 500 * 2048 / 1500 = 682.67
        (CITYSCAPES, (700, 700), (1024, 1024)),
        (BDD100K, (720, 1280), (720, 1280)),
        (BDD100K, (1080, 1440), (720, 960)),
        (BDD100K, (300, 1000), (384, 1280)),
        ({"height": 40, "width": 24}, (30, 50), (40, 24)),
    ],
)
def test_resized_sizes_follow_the_published_rule(processor, box, image, expected):
    inputs = processor(np.zeros((*image, 3), np.uint8), do_resize=True, size=box, return_tensors="pt")
    assert inputs.pixel_values.shape == (1, 3, *expected)


def test_default_keeps_the_image_size(processor):
    assert processor(random_image(37, 53), return_tensors="pt").pixel_values.shape == (1, 3, 37, 53)


def test_do_resize_alone_means_the_cityscapes_box(processor):
    image = np.zeros((128, 256, 3), np.uint8)
    assert processor(image, do_resize=True, return_tensors="pt").pixel_values.shape == (1, 3, 1024, 2048)


# --- pixels ---


def test_pixels_are_scaled_by_the_clip_mean_and_deviation_channel_by_channel(processor):
    image = np.zeros((2, 3, 3), np.uint8)
    image[0, 1] = (255, 51, 102)
    pixels = processor(image, return_tensors="pt").pixel_values
    assert pixels.dtype == torch.float32
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    for channel, value in enumerate((1.0, 0.2, 0.4)):
        assert pixels[0, channel, 0, 1].item() == pytest.approx((value - mean[channel]) / std[channel], rel=1e-5)
        assert pixels[0, channel, 1, 2].item() == pytest.approx(-mean[channel] / std[channel], rel=1e-5)


def test_pixel_values_are_float32_without_scaling_too(processor):
    image = random_image(8, 9)
    pixels = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values
    assert pixels.dtype == torch.float32
    assert np.array_equal(pixels[0].permute(1, 2, 0).numpy(), image)


@pytest.mark.parametrize("shape", [(48, 80), (20, 30)], ids=["shrunk", "enlarged"])
@pytest.mark.parametrize("antialias", [False, True])
def test_resize_is_bilinear_rounded_to_bytes_and_antialiased_only_on_request(processor, shape, antialias):
    image = random_image(*shape)
    resized = processor(
        image,
        do_resize=True,
        size=SMALL,
        antialias=antialias,
        do_rescale=False,
        do_normalize=False,
        return_tensors="pt",
    ).pixel_values
    channels_first = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    options = {"mode": "bilinear", "align_corners": False, "antialias": antialias}
    expected = F.interpolate(channels_first, resized.shape[-2:], **options).round()
    assert torch.equal(resized, expected)
    assert (min(resized.shape[-2:]) == 32) and resized.shape[-2:] != shape


def test_bicubic_overshoot_is_cut_at_the_byte_limits(processor):
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, 8:] = 255
    pixels = processor(
        image, do_resize=True, size=SMALL, resample=Image.Resampling.BICUBIC, do_rescale=False, do_normalize=False
    ).pixel_values[0]
    assert pixels.min() == 0 and pixels.max() == 255
    assert torch.equal(pixels[0, :, 0], torch.zeros(32)) and (pixels.diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_images_of_any_mode_are_seen_as_rgb(processor, mode):
    image = Image.fromarray(random_image(8, 9)).convert(mode)
    pixels = processor(image, return_tensors="pt").pixel_values
    assert torch.equal(pixels, processor(image.convert("RGB"), return_tensors="pt").pixel_values)


def test_image_types_agree(processor):
    image = random_image(8, 9)
    expected = processor(Image.fromarray(image), return_tensors="pt").pixel_values
    for same in (image, torch.from_numpy(image).permute(2, 0, 1), [image], image[None]):
        assert torch.equal(processor(same, return_tensors="pt").pixel_values, expected)


def test_batch_equals_single_images(processor):
    images = [random_image(40, 56, seed) for seed in range(3)]
    maps = [random_map(40, 56, (0, 1, 255), seed) for seed in range(3)]
    options = {"do_resize": True, "size": SMALL, "return_tensors": "pt"}
    batch = processor(images, maps, **options)
    singles = [processor(*pair, **options) for pair in zip(images, maps, strict=True)]
    assert torch.equal(batch.pixel_values, torch.cat([single.pixel_values for single in singles]))
    assert torch.equal(batch.labels, torch.cat([single.labels for single in singles]))
    grouped = processor(images, maps, disable_grouping=False, **options)
    assert torch.allclose(batch.pixel_values, grouped.pixel_values)


def test_different_sizes_make_lists_but_no_tensor(processor):
    images = [random_image(8, 9), random_image(10, 9)]
    maps = [random_map(8, 9, (0, 1)), random_map(10, 9, (0, 1))]
    inputs = processor(images, maps)
    assert [tuple(image.shape) for image in inputs.pixel_values] == [(3, 8, 9), (3, 10, 9)]
    assert [tuple(label.shape) for label in inputs.labels] == [(8, 9), (10, 9)]
    with pytest.raises(ValueError, match=r"8x9, 10x9.*leave out return_tensors.*do_resize=True"):
        processor(images, return_tensors="pt")
    same = processor(images, maps, do_resize=True, size={"height": 6, "width": 7}, return_tensors="pt")
    assert same.pixel_values.shape == (2, 3, 6, 7) and same.labels.shape == (2, 6, 7)


@pytest.mark.parametrize("option", [{"do_pad": True, "pad_size": 64}, {"do_center_crop": True, "crop_size": 8}])
def test_cropping_and_padding_are_refused(processor, option):
    with pytest.raises(ValueError, match="neither crops nor pads"):
        processor(random_image(16, 16), **option)


# --- labels ---


def test_labels_are_the_ids_untouched(processor):
    ids = random_map(6, 7, (0, 18, 255))
    labels = processor(random_image(6, 7), ids, return_tensors="pt").labels
    assert labels.dtype == torch.int64
    assert np.array_equal(labels[0].numpy(), ids)


@pytest.mark.parametrize("shape", [(48, 80), (20, 30)], ids=["shrunk", "enlarged"])
def test_labels_are_never_blended(processor, shape):
    ids = (0, 7, 18, 255)
    labels = processor(
        random_image(*shape), random_map(*shape, ids), do_resize=True, size=SMALL, antialias=True, return_tensors="pt"
    ).labels
    assert min(labels.shape[-2:]) == 32
    assert set(labels.unique().tolist()) == set(ids)


def test_resized_labels_are_sampled_where_the_pixels_are(processor):
    ids = random_map(48, 72, (0, 1), seed=3)
    image = np.stack([ids * 255] * 3, axis=-1)  # the image shows its own labels
    options = {"do_resize": True, "size": {"shortest_edge": 16, "longest_edge": 24}, "do_normalize": False}
    inputs = processor(image, ids, return_tensors="pt", **options)
    # A third of the size: both resizes read the middle pixel of every 3 x 3.
    assert torch.equal(inputs.labels[0], torch.from_numpy(ids[1::3, 1::3]).long())
    assert torch.equal(inputs.labels[0].float(), inputs.pixel_values[0, 0])


def test_palette_png_is_read_as_ids_not_colours(processor, tmp_path):
    ids = random_map(6, 7, (0, 1, 2, 255))
    label = Image.fromarray(ids).convert("P")
    label.putdata(ids.flatten().tolist())
    label.putpalette([value for index in range(256) for value in (255 - index, 7, 90)])
    label.save(tmp_path / "label.png")
    with Image.open(tmp_path / "label.png") as png:
        assert png.mode == "P"
        labels = processor(random_image(6, 7), png, return_tensors="pt").labels
    assert np.array_equal(labels[0].numpy(), ids)


@pytest.mark.parametrize("count", [1, 3])
def test_map_types_agree(processor, count):
    images = [random_image(6, 7)] * count
    maps = np.stack([random_map(6, 7, (0, 1, 2, 255), seed) for seed in range(count)])  # (B, H, W)
    same = [
        maps,
        list(maps),
        tuple(maps[:, None]),
        list(maps[..., None]),
        list(maps[:, ::-1][:, ::-1]),
        maps.astype(np.int32),
        maps.astype(np.uint16),
        torch.from_numpy(maps),
        torch.from_numpy(maps)[:, None],
        [Image.fromarray(ids) for ids in maps],
        [Image.fromarray(ids.astype(np.uint16)) for ids in maps],
    ]
    for each in same:
        labels = processor(images, each, return_tensors="pt").labels
        assert labels.dtype == torch.int64 and np.array_equal(labels.numpy(), maps)


def test_single_map_needs_no_list(processor):
    ids = random_map(6, 7, (0, 1, 255))
    for same in (ids, torch.from_numpy(ids), Image.fromarray(ids)):
        assert np.array_equal(processor(random_image(6, 7), same).labels[0].numpy(), ids)


@pytest.mark.parametrize("kind", [Image.fromarray, np.asarray, lambda array: torch.from_numpy(array).permute(2, 0, 1)])
def test_colour_label_is_refused_with_the_fix(processor, kind):
    image = random_image(6, 7)
    with pytest.raises(ValueError, match=r"map 0 has shape .*3.*one integer class id per pixel.*translate colours"):
        processor(image, kind(image))


def test_map_of_fractions_is_refused(processor):
    with pytest.raises(ValueError, match=r"float32.*one integer class id per pixel"):
        processor(random_image(6, 7), np.zeros((6, 7), np.float32))


def test_map_given_as_a_path_is_refused_with_the_fix(processor):
    with pytest.raises(ValueError, match=r"type str.*PIL\.Image\.open"):
        processor(random_image(6, 7), "label.png")


def test_map_of_another_size_is_refused_naming_both_sizes(processor):
    images = [random_image(6, 7)] * 2
    maps = [random_map(6, 7, (0, 1)), random_map(7, 6, (0, 1))]
    with pytest.raises(ValueError, match=r"map 1 is 7x6, its image 6x7"):
        # The check comes before the resizing, which would hide the mistake.
        processor(images, maps, do_resize=True, size={"height": 4, "width": 4}, return_tensors="pt")


def test_every_image_needs_its_map(processor):
    with pytest.raises(ValueError, match="2 images but 1 segmentation maps"):
        processor([random_image(6, 7)] * 2, random_map(6, 7, (0, 1)))


# --- semantic maps ---


def random_outputs(batch: int = 2) -> SimpleNamespace:
    """Scores of 3 classes at 12 x 16."""
    return SimpleNamespace(logits=torch.rand(batch, 3, 12, 16, generator=torch.Generator().manual_seed(0)))


def test_semantic_maps_equal_the_manual_ones(processor):
    outputs = random_outputs()
    sizes = [(30, 41), (7, 9)]
    maps = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
    for index, size in enumerate(sizes):
        scores = F.interpolate(outputs.logits[index : index + 1], size, mode="bilinear", align_corners=False)
        assert torch.equal(maps[index], scores.argmax(1)[0])
        assert maps[index].dtype == torch.int64 and maps[index].shape == size
    from_tensor = processor.post_process_semantic_segmentation(outputs, target_sizes=torch.tensor(sizes))
    assert all(torch.equal(a, b) for a, b in zip(maps, from_tensor, strict=True))


def test_semantic_maps_keep_the_size_of_the_scores_by_default(processor):
    outputs = random_outputs()
    maps = processor.post_process_semantic_segmentation(outputs)
    assert torch.equal(torch.stack(maps), outputs.logits.argmax(1))


def test_scores_are_returned_beside_the_maps_on_request(processor):
    results = processor.post_process_semantic_segmentation(random_outputs(), [(5, 6), (8, 4)], True)
    assert [tuple(result.segmentation_scores.shape) for result in results] == [(3, 5, 6), (3, 8, 4)]
    for result in results:
        assert torch.equal(result.segmentation, result["segmentation_scores"].argmax(0))


@pytest.mark.parametrize("sizes", [[(4, 4)], [(4, 4)] * 3, []])
def test_number_of_target_sizes_must_be_the_batch_size(processor, sizes):
    with pytest.raises(ValueError, match=rf"{len(sizes)} target_sizes for a batch of 2"):
        processor.post_process_semantic_segmentation(random_outputs(2), target_sizes=sizes)


def test_pipeline_finds_only_the_semantic_post_processing(processor):
    # The image-segmentation pipeline prefers either of these to the semantic one.
    assert not hasattr(processor, "post_process_panoptic_segmentation")
    assert not hasattr(processor, "post_process_instance_segmentation")


# --- saving and shipping ---


@pytest.mark.parametrize(
    "options", [{}, {"do_resize": True, "size": BDD100K, "antialias": True, "image_std": [1, 2, 3]}]
)
def test_saved_settings_come_back_equal(options, tmp_path):
    processor = TqdmImageProcessor(**options)
    processor.save_pretrained(tmp_path)
    loaded = TqdmImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    for name, value in options.items():
        assert loaded.to_dict()[name] == (tuple(value) if isinstance(value, list) else value)
    image = random_image(10, 20)
    a, b = (each(image, size=SMALL, return_tensors="pt").pixel_values for each in (processor, loaded))
    assert torch.equal(a, b)


def test_saved_folder_loads_through_the_auto_class_with_its_own_code(tmp_path, monkeypatch):
    monkeypatch.setattr(TqdmImageProcessor, "_auto_class", None)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", path_without_caches())
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)  # of another cache
    TqdmImageProcessor.register_for_auto_class()
    TqdmImageProcessor(do_resize=True, size=SMALL).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / SOURCE.name).read_text() == SOURCE.read_text()
    loaded = AutoImageProcessor.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules.")
    image = random_image(40, 50)
    expected = TqdmImageProcessor()(image, do_resize=True, size=SMALL, return_tensors="pt").pixel_values
    assert torch.equal(loaded(image, return_tensors="pt").pixel_values, expected)


def test_only_allowed_packages_are_needed_at_load():
    found = set(get_imports(SOURCE)) - sys.stdlib_module_names
    assert found <= {"torch", "torchvision", "transformers", "PIL", "numpy"}
    assert get_relative_imports(SOURCE) == ["images_tqdm"]
