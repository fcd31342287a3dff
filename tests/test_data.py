"""Reading of images and labels, and the augmentation, against hand-made files and values worked out by hand."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tqdm_seg.data_tqdm import (
    FrameDataset,
    TrainDraws,
    TrainTransform,
    batch_draws,
    choose_crop,
    collate,
    distort_colours,
    find_pairs,
    frame_loader,
    hsv_to_rgb,
    linear,
    read_labels,
    resize,
    rgb_to_hsv,
    to_tensors,
    train_loader,
)
from tqdm_seg.loss_tqdm import supervised_masks

EXAMPLE = Path(__file__).parents[1] / "examples" / "orfd_mini"


def write_frame(scene: Path, name: str, image: np.ndarray, labels: np.ndarray) -> None:
    """One pair of PNGs in the ORFD layout."""
    for folder, array, suffix in (("image_data", image, ".png"), ("gt_image", labels, "_fillcolor.png")):
        (scene / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(scene / folder / f"{name}{suffix}")


def write_frames(scene: Path, count: int = 3, size: tuple[int, int] = (40, 48)) -> None:
    """Random images whose lower half is traversable."""
    rng = np.random.default_rng(0)
    labels = np.zeros(size, np.uint8)
    labels[size[0] // 2 :] = 255
    for i in range(count):
        write_frame(scene, f"{i}", rng.integers(0, 256, (*size, 3), dtype=np.uint8), labels)


def draws_of(root: Path, seed: int = 0) -> TrainDraws:
    """Augmented 32-pixel crops of root/training."""
    return TrainDraws(FrameDataset(find_pairs(root, "training"), "orfd", 2), TrainTransform(crop=32), seed)


# -- finding and reading --------------------------------------------------------------------------------


def test_both_orfd_layouts_are_found_and_the_scene_is_kept(tmp_path):
    write_frames(tmp_path / "deep" / "training" / "x0613_1627", 2)
    write_frames(tmp_path / "deep" / "training" / "y0613_1248", 1)
    write_frames(tmp_path / "flat" / "training", 2)
    (tmp_path / "deep" / "training" / "notes.txt").write_text("not a scene")
    deep, flat = (find_pairs(tmp_path / name, "training") for name in ("deep", "flat"))
    assert [(pair.scene, pair.key) for pair in deep] == [
        ("x0613_1627", "training/x0613_1627/image_data/0.png"),
        ("x0613_1627", "training/x0613_1627/image_data/1.png"),
        ("y0613_1248", "training/y0613_1248/image_data/0.png"),
    ]
    assert [(pair.scene, pair.key) for pair in flat] == [("", f"training/image_data/{i}.png") for i in range(2)]


def test_the_example_is_one_drive_in_two_parts():
    for split, count in (("training", 56), ("validation", 24)):
        frames = FrameDataset(find_pairs(EXAMPLE, split), "orfd", 2)
        assert len(frames) == count and {frame.scene for frame in frames.pairs} == {"x2021_0223_1756"}
        for i in range(count):
            assert frames[i].image.shape == (224, 224, 3) and set(np.unique(frames[i].labels)) == {0, 1}


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*training"):
        find_pairs(tmp_path, "training")
    (tmp_path / "training").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no image"):
        find_pairs(tmp_path, "training")
    write_frames(tmp_path / "training" / "scene", 2)
    (tmp_path / "training" / "scene" / "gt_image" / "1_fillcolor.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"image .*1\.png has no label .*1_fillcolor\.png"):
        find_pairs(tmp_path, "training")


@pytest.mark.parametrize("kind", ["image_data/0.png", "gt_image/0_fillcolor.png"])
def test_truncated_png_is_named(tmp_path, kind):
    scene = tmp_path / "training" / "scene"
    write_frames(scene, 1)
    content = (scene / kind).read_bytes()
    (scene / kind).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"cannot read .*{kind}"):
        FrameDataset(find_pairs(tmp_path, "training"), "orfd", 2)


def test_label_of_another_size_is_named(tmp_path):
    write_frame(tmp_path / "training" / "s", "0", np.zeros((8, 9, 3), np.uint8), np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"0_fillcolor\.png is 8x8, its image 8x9"):
        FrameDataset(find_pairs(tmp_path, "training"), "orfd", 2)


def test_orfd_rule_takes_brightness_above_200_of_any_kind_of_png(tmp_path):
    values = np.array([[0, 120, 200, 201, 255]], np.uint8)
    grey = Image.fromarray(values)
    # Only the third channel counts: red and green are the other way round here.
    colours = Image.fromarray(np.stack((255 - values, 255 - values, values), -1))
    palette = Image.fromarray(np.array([[0, 1, 2, 3, 4]], np.uint8))
    palette.putpalette([x for value in values[0] for x in (value, value, value)])
    for name, image in (("grey", grey), ("colours", colours), ("palette", palette)):
        image.save(tmp_path / f"{name}.png")
        assert read_labels(tmp_path / f"{name}.png", "orfd", 2).tolist() == [[0, 0, 0, 1, 1]], name


def test_id_rule_reads_palette_indices_and_grey_values(tmp_path):
    ids = np.array([[0, 1, 2, 255]], np.uint8)
    palette = Image.fromarray(ids)
    palette.putpalette([200, 100, 50] * 256)  # one colour for all: only the indices tell the ids apart
    palette.save(tmp_path / "palette.png")
    Image.fromarray(ids).save(tmp_path / "grey.png")
    for name in ("palette", "grey"):
        assert read_labels(tmp_path / f"{name}.png", "ids", 3).tolist() == ids.tolist()


def test_id_rule_names_unknown_values(tmp_path):
    Image.fromarray(np.array([[0, 7, 9, 255]], np.uint8)).save(tmp_path / "label.png")
    with pytest.raises(ValueError, match=r"label\.png holds the values \[7, 9\]"):
        read_labels(tmp_path / "label.png", "ids", 3)


def write_png(path: Path, bits: int, colour: int, row: bytes, width: int) -> None:
    """A one-line PNG of a kind that Pillow cannot write."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0" + row)),
    ]
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, content in [*chunks, (b"IEND", b"")]:
            checksum = struct.pack(">I", zlib.crc32(kind + content))
            file.write(struct.pack(">I", len(content)) + kind + content + checksum)


def test_id_rule_refuses_files_whose_ids_do_not_survive_reading(tmp_path):
    write_png(tmp_path / "grey4.png", 4, 0, bytes([0x01]), 2)  # Pillow reads its ids 0, 1 as 0, 17
    write_png(tmp_path / "rgb16.png", 16, 2, struct.pack(">3H", 1, 0, 0), 1)  # and this id 1 as 0
    Image.new("RGB", (2, 2)).save(tmp_path / "rgb.png")
    for name in ("grey4", "rgb16", "rgb"):
        with pytest.raises(ValueError, match=f"{name}.png .* holds no class ids that survive reading"):
            read_labels(tmp_path / f"{name}.png", "ids", 30)


def test_orfd_rule_needs_two_classes():
    with pytest.raises(ValueError, match="two classes apart, not 3"):
        FrameDataset(find_pairs(EXAMPLE, "training"), "orfd", 3)


# -- augmentation ---------------------------------------------------------------------------------------


def test_shrinking_reads_two_neighbours_and_no_wider_window():
    image = np.array([0, 100, 200, 40, 8, 16, 32, 64], np.uint8)[None, :, None].repeat(4, 0).repeat(3, 2)
    small, ids = resize(image, np.arange(8, dtype=np.uint8)[None].repeat(4, 0), 0.25)
    # Output pixel 0 lies at input 1.5, between 100 and 200; a low-pass filter would give about 85.
    assert small.shape == (1, 2, 3) and small[0, :, 0].tolist() == [150, 24]
    assert ids.tolist() == [[0, 4]]


def test_resize_makes_no_new_ids_and_rounds_the_size():
    labels = np.random.default_rng(0).choice(np.array([0, 1, 255], np.uint8), (31, 45))
    for ratio in (0.5, 0.77, 1.9):
        image, ids = resize(np.zeros((31, 45, 3), np.uint8), labels, ratio)
        assert image.shape[:2] == ids.shape == (round(31 * ratio), round(45 * ratio))
        assert set(np.unique(ids)) == {0, 1, 255}


def test_crop_avoids_one_class_filling_it():
    labels = np.zeros((64, 64), np.uint8)
    labels[48:] = 1
    labels[:, :4] = 255  # ignored pixels count for nothing
    shares = []
    for seed in range(40):
        window = choose_crop(labels, 24, 0.75, np.random.default_rng(seed))
        counts = np.bincount(labels[window].ravel(), minlength=2)[:2]
        shares.append(counts.max() / counts.sum())
    # About one position in six qualifies, so that all of eleven draws fail once in eight crops.
    assert np.mean(np.array(shares) < 0.75) > 0.7
    free = [choose_crop(labels, 24, 2.0, np.random.default_rng(seed))[0].start for seed in range(40)]
    assert np.mean([labels[start : start + 24, 8].mean() in (0, 1) for start in free]) < 0.7


def test_crop_of_one_class_is_taken_in_the_end_and_small_images_whole():
    labels = np.ones((20, 30), np.uint8)
    rows, columns = choose_crop(labels, 24, 0.75, np.random.default_rng(0))
    assert labels[rows, columns].shape == (20, 24) and rows.start == 0 and 0 <= columns.start <= 6


def test_hsv_values_by_hand():
    colours = {
        (255, 0, 0): (0, 255, 255),
        (0, 255, 0): (60, 255, 255),
        (0, 0, 255): (120, 255, 255),
        (255, 255, 0): (30, 255, 255),
        (255, 0, 255): (150, 255, 255),
        (100, 100, 100): (0, 0, 100),
        (0, 0, 0): (0, 0, 0),
        (200, 100, 50): (10, 191, 200),  # hue 20 degrees, saturation 0.75 * 255 = 191.25
    }
    rgb = np.array(list(colours), np.uint8)
    assert rgb_to_hsv(rgb).tolist() == [list(hsv) for hsv in colours.values()]
    assert np.abs(hsv_to_rgb(rgb_to_hsv(rgb)).astype(int) - rgb).max() <= 1


def test_hsv_equals_opencv():
    # Made with OpenCV 5.0.0: hsv by cv2.cvtColor of rgb[None] and cv2.COLOR_RGB2HSV, again of hsv and COLOR_HSV2RGB.
    hsv = [[68, 68, 229], [60, 72, 238], [95, 234, 245], [38, 249, 204], [117, 211, 213], [17, 41, 206]]
    again = [[168, 229, 184], [171, 238, 171], [20, 208, 245], [151, 204, 5], [37, 54, 213], [206, 192, 173]]
    rgb = np.random.default_rng(5).integers(0, 256, (6, 3), dtype=np.uint8)
    assert rgb_to_hsv(rgb).tolist() == hsv
    back = hsv_to_rgb(np.array(hsv, np.uint8)).astype(int)
    assert np.abs(back - again).max() <= 1  # OpenCV's own code paths differ by as much


def test_linear_cuts_off_and_never_wraps_around():
    values = np.array([0, 10, 100, 250], np.uint8)
    assert linear(values, 1.5).tolist() == [0, 15, 150, 255]
    assert linear(values, shift=-20.5).tolist() == [0, 0, 79, 229]


def test_colours_are_distorted_half_of_the_time_each():
    grey = np.full((1, 1, 3), 100, np.uint8)  # neither saturation nor hue can change a grey
    changed = [distort_colours(grey, np.random.default_rng(seed)) for seed in range(400)]
    assert all(pixel[0, 0, 0] == pixel[0, 0, 1] == pixel[0, 0, 2] for pixel in changed)
    same = np.mean([(pixel == grey).all() for pixel in changed])
    assert 0.2 < same < 0.36  # neither brightness nor contrast: a quarter, and changes of less than a step
    # Furthest: (100 +- 32) * (0.5 or 1.5).
    values = [int(pixel[0, 0, 0]) for pixel in changed]
    assert 34 <= min(values) < 45 and 185 < max(values) <= 198
    red = np.full((1, 1, 3), (200, 60, 60), np.uint8)
    hues = [int(rgb_to_hsv(distort_colours(red, np.random.default_rng(seed)))[0, 0, 0]) for seed in range(400)]
    turned = np.array([(hue + 90) % 180 - 90 for hue in hues])
    assert 0.45 < np.mean(turned == 0) < 0.6  # half, and one shift in 36 is by nothing
    # Contrast after the turn cuts channels off and so moves a few hues further.
    assert np.mean(np.abs(turned) <= 18) > 0.9 and (turned < -14).any() and (turned > 14).any()


def test_normalising_and_padding():
    image = np.full((2, 3, 3), 255, np.uint8)
    pixels, labels = to_tensors(image, np.ones((2, 3), np.uint8), 4)
    assert pixels.shape == (3, 4, 4) and pixels.dtype == torch.float32 and labels.dtype == torch.int64
    assert pixels[:, 0, 0].tolist() == pytest.approx([1.93034, 2.07488, 2.14590], abs=1e-4)
    assert (pixels[:, 2:] == 0).all() and (pixels[:, :, 3:] == 0).all()
    assert labels.tolist() == [[1, 1, 1, 255], [1, 1, 1, 255], [255] * 4, [255] * 4]


def test_image_and_labels_move_together():
    labels = np.zeros((60, 60), np.uint8)
    labels[10:40, 15:50] = 1
    image = np.repeat(labels[..., None] * 200, 3, -1)
    for seed in range(20):
        pixels, ids = TrainTransform(crop=32)(image, labels, np.random.default_rng(seed))
        known = ids != 255
        bright = pixels.mean(0) > (pixels.mean(0)[known].min() + pixels.mean(0)[known].max()) / 2
        if len(ids[known].unique()) == 2:
            assert (bright == (ids == 1))[known].float().mean() > 0.93  # they differ only along the edges


# -- draws ----------------------------------------------------------------------------------------------


def test_a_draw_depends_on_seed_step_and_row_alone(tmp_path):
    write_frames(tmp_path / "training" / "s")
    first, second, other = draws_of(tmp_path), draws_of(tmp_path), draws_of(tmp_path, seed=1)
    _ = [second[(step, row)] for step in range(3) for row in range(2)]  # what was drawn before must not matter
    for draw in ((5, 0), (5, 1), (6, 0)):
        assert torch.equal(first[draw]["pixel_values"], second[draw]["pixel_values"])
        assert torch.equal(first[draw]["labels"], second[draw]["labels"]) and first[draw]["key"] == second[draw]["key"]
        assert not torch.equal(first[draw]["pixel_values"], other[draw]["pixel_values"])
    assert not torch.equal(first[(5, 0)]["pixel_values"], first[(5, 1)]["pixel_values"])
    assert not torch.equal(first[(5, 0)]["pixel_values"], first[(6, 0)]["pixel_values"])


def test_every_frame_is_drawn_about_as_often(tmp_path):
    write_frames(tmp_path / "training" / "s", 4)
    draws = draws_of(tmp_path)
    keys = [draws[(step, 0)]["key"] for step in range(200)]
    assert all(30 < keys.count(pair.key) < 70 for pair in draws.frames.pairs)


def test_a_step_has_the_same_rows_however_it_is_divided():
    whole = list(batch_draws(3, 5, 8))
    assert whole == [[(step, row) for row in range(8)] for step in (3, 4)]
    divided = [list(batch_draws(3, 5, 2, parts=2, process=process, processes=2)) for process in (0, 1)]
    assert all(len(batches) == 4 for batches in divided)
    assert sorted(draw for batches in divided for batch in batches for draw in batch) == sum(whole, [])


def test_batches_are_the_same_with_and_without_workers_and_from_the_middle(tmp_path):
    write_frames(tmp_path / "training" / "s")
    draws = draws_of(tmp_path)
    alone = list(train_loader(draws, batch_draws(0, 3, 2), 2, workers=0))
    helped = list(train_loader(draws, batch_draws(0, 3, 2), 2, workers=2))
    resumed = list(train_loader(draws, batch_draws(2, 3, 2), 2, workers=0))
    assert len(alone) == 3 and len(resumed) == 1
    for one, other in (*zip(alone, helped, strict=True), (alone[2], resumed[0])):
        assert one["key"] == other["key"] and torch.equal(one["pixel_values"], other["pixel_values"])


def test_collate_keeps_key_and_scene_and_lists_the_masks(tmp_path):
    write_frames(tmp_path / "training" / "s")
    draws = draws_of(tmp_path)
    batch = collate([draws[(0, 0)], draws[(0, 1)]], num_classes=2)
    assert batch["pixel_values"].shape == (2, 3, 32, 32) and batch["labels"].shape == (2, 32, 32)
    assert batch["scene"] == ["s", "s"] and batch["key"] == [draws[(0, i)]["key"] for i in range(2)]
    assert torch.equal(batch["mask_index"], supervised_masks(batch["labels"], 2, 255))
    assert torch.is_tensor(batch["mask_index"]) and batch["mask_index"].device.type == "cpu"


def test_evaluation_frames_are_divided_without_loss_or_repeat(tmp_path):
    write_frames(tmp_path / "training" / "s", 5)
    frames = FrameDataset(find_pairs(tmp_path, "training"), "orfd", 2)
    keys = [[frame.key for frame in frame_loader(frames, 0, process, 2)] for process in (0, 1)]
    assert len(keys[0]) == 3 and sorted(keys[0] + keys[1]) == [pair.key for pair in frames.pairs]
