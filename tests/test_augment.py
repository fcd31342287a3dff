"""Every step of the augmentation against the published formula, written out slowly here, and against OpenCV itself."""

import cv2
import numpy as np
import pytest
import torch

from tqdm_seg.training.augment import (
    TrainTransform,
    bilinear_window,
    class_counts,
    distort_colours,
    draw_window,
    nearest_window,
    normalise,
    opencv_window,
    padded,
    saturate_colours,
    scale_colours,
    scaled_size,
    turn_hue,
)

RATIOS = (0.5, 0.51, 0.77, 0.999, 1.0, 1.3, 1.777, 2.0)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8: smooth shapes with sharp edges and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = 90 + 60 * np.sin(x / 7)[..., None] * np.cos(y / 5)[..., None] + 70 * (x > width / 2)[..., None]
    return (waves + rng.integers(0, 30, (height, width, 3))).clip(0, 255).astype(np.uint8)


def bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The formula in float64: centres (i + 0.5) * old / new - 0.5, clipped to the image, two neighbours a side."""
    result = image.astype(np.float64)
    for axis, new in enumerate(size):
        old = image.shape[axis]
        at = ((np.arange(new) + 0.5) * old / new - 0.5).clip(0, old - 1)
        left = np.floor(at).astype(int)
        right = np.minimum(left + 1, old - 1)
        share = np.expand_dims(at - left, tuple(range(1, 3 - axis)))
        result = result.take(left, axis) * (1 - share) + result.take(right, axis) * share
    return result


def hsv_of(red: int, green: int, blue: int) -> tuple[float, float, float]:
    """Hue 0 ... 180, saturation and value 0 ... 255 by the textbook."""
    value, least = max(red, green, blue), min(red, green, blue)
    chroma = value - least
    if chroma == 0:
        return 0, 0, value
    if value == red:
        degrees = 60 * (green - blue) / chroma
    elif value == green:
        degrees = 120 + 60 * (blue - red) / chroma
    else:
        degrees = 240 + 60 * (red - green) / chroma
    return degrees % 360 / 2, 255 * chroma / value, value


# -- scaling --------------------------------------------------------------------------------------------


def test_size_is_cut_first_and_then_fitted_to_the_shape():
    assert scaled_size(1052, 1914, 1.0) == (1052, 1914)
    # The box is int(1914 * 0.7131) x int(1052 * 0.7131) = 1364 x 750, and 1364 / 1914 less than 750 / 1052.
    assert scaled_size(1052, 1914, 0.7131) == (int(1052 * 1364 / 1914 + 0.5), 1364) == (750, 1364)
    # Here the shorter side decides: 11 x 7, 7 / 10 < 11 / 15, and 15 * 0.7 = 10.5 is rounded up.
    assert scaled_size(10, 15, 0.77) == (7, 11)
    for ratio in np.random.default_rng(0).uniform(0.5, 2, 200):
        height, width = scaled_size(720, 1280, ratio)
        assert 0 <= 720 * ratio - height < 2 and 0 <= 1280 * ratio - width < 3
    assert scaled_size(1, 3, 0.5) == (1, 1)


@pytest.mark.parametrize("ratio", RATIOS)
def test_labels_of_a_window_are_those_of_opencv(ratio):
    labels = np.random.default_rng(0).integers(0, 256, (61, 97), dtype=np.uint8)
    size = scaled_size(61, 97, ratio)
    whole = cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST)
    for window in ((slice(3, 23), slice(7, 40)), (slice(size[0] - 9, size[0] + 5), slice(0, 200))):
        assert np.array_equal(nearest_window(labels, size, window), whole[window])


@pytest.mark.parametrize("ratio", RATIOS)
def test_pixels_of_a_window_are_those_of_the_formula(ratio):
    image = photo(61, 97)
    size = scaled_size(61, 97, ratio)
    formula = bilinear(image, size)
    for window in ((slice(3, 23), slice(7, 40)), (slice(size[0] - 9, size[0] + 5), slice(0, 200))):
        pixels = bilinear_window(image, size, window)
        assert pixels.shape == formula[window].shape
        assert np.abs(pixels - formula[window]).max() < 0.502  # rounded to the nearest, and nothing else
        opencv = opencv_window(image, size, window)
        assert np.array_equal(opencv, cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)[window])
        difference = np.abs(opencv.astype(int) - pixels)
        assert difference.max() <= 1 and difference.mean() < 0.2  # OpenCV's own rounding


def test_shrinking_reads_two_neighbours_and_no_wider_window():
    image = np.array([0, 100, 200, 40, 8, 16, 32, 64], np.uint8)[None, :, None].repeat(4, 0).repeat(3, 2)
    small = bilinear_window(image, (1, 2), (slice(0, 1), slice(0, 2)))
    # Output pixel 0 lies at input 1.5, between 100 and 200; a low-pass filter would give about 85.
    assert small[0, :, 0].tolist() == [150, 24]


# -- crop -----------------------------------------------------------------------------------------------


def test_counts_leave_out_what_is_ignored():
    labels = np.array([[0, 1, 1], [254, 255, 255]], np.uint8)
    counts = class_counts(labels)
    assert counts.shape == (255,) and counts[[0, 1, 254]].tolist() == [1, 2, 1] and counts.sum() == 4


def test_windows_are_uniform_and_small_sides_whole():
    rng = np.random.default_rng(0)
    corners = [tuple(part.start for part in draw_window((10, 6), 8, rng)) for _ in range(300)]
    assert {left for _, left in corners} == {0} and {top for top, _ in corners} == {0, 1, 2}
    assert all(70 < sum(top == value for top, _ in corners) < 130 for value in range(3))


def test_a_crop_with_one_class_or_three_quarters_of_one_is_redrawn():
    labels = np.zeros((64, 64), np.uint8)
    labels[48:] = 1
    labels[:, :4] = 255  # ignored pixels count for nothing
    transform = TrainTransform(crop=24, scale=(1, 1))
    shares = []
    for seed in range(40):
        _, window, ids = transform.draw_crop(labels, np.random.default_rng(seed))
        assert np.array_equal(ids, labels[window])
        counts = class_counts(ids)
        shares.append(counts.max() / counts.sum())
    # About one position in six qualifies, so that all of eleven draws fail once in eight crops.
    assert np.mean(np.array(shares) < 0.75) > 0.7


def test_the_eleventh_crop_is_taken_as_it_is(monkeypatch):
    draws = []
    monkeypatch.setattr("tqdm_seg.training.augment.class_counts", lambda ids: draws.append(ids) or np.array([5.0]))
    TrainTransform(crop=8).draw_crop(np.ones((20, 30), np.uint8), np.random.default_rng(0))
    assert len(draws) == 11


def test_a_crop_drawn_for_a_class_holds_enough_of_it():
    labels = np.zeros((96, 96), np.uint8)
    labels[:30, :30] = 1
    image = photo(96, 96)
    transform = TrainTransform(crop=32, min_class_pixels=300, max_class_share=2)
    found = [
        [transform(image, labels, np.random.default_rng(seed), wanted).class_pixels[1] for seed in range(60)]
        for wanted in (1, -1)
    ]
    assert np.mean(np.array(found[0]) > 300) > 0.8 > 0.4 > np.mean(np.array(found[1]) > 300)


# -- colours --------------------------------------------------------------------------------------------


def test_scaling_colours_cuts_off_and_never_wraps_around():
    values = np.array([[0, 10, 100, 250]], np.uint8)
    assert scale_colours(values, 1.5).tolist() == [[0, 15, 150, 255]]
    assert scale_colours(values, shift=-20.5).tolist() == [[0, 0, 79, 229]]
    everything = np.arange(256, dtype=np.uint8)[None]
    rng = np.random.default_rng(0)
    for factor, shift in rng.uniform((0.5, -32), (1.5, 32), (50, 2)):
        formula = (everything.astype(np.float32) * factor + shift).clip(0, 255).astype(np.uint8)
        assert np.array_equal(scale_colours(everything, factor, shift), formula)


def test_hue_and_saturation_follow_the_textbook():
    rgb = np.random.default_rng(0).integers(0, 256, (1, 500, 3), dtype=np.uint8)
    before = np.array([hsv_of(*pixel) for pixel in rgb[0].tolist()])
    vivid = (before[:, 1] > 60) & (before[:, 2] > 60)  # 8 bits hold the hue of dark and grey ones badly
    for steps in (-18, 5, 17):
        after = np.array([hsv_of(*pixel) for pixel in turn_hue(rgb, steps)[0].tolist()])
        turned = (after[:, 0] - before[:, 0] - steps + 90) % 180 - 90
        assert np.abs(turned[vivid]).max() < 2.5 and np.abs(after[vivid, 1:] - before[vivid, 1:]).max() < 6
    for factor in (0.5, 0.9, 1.4):
        after = np.array([hsv_of(*pixel) for pixel in saturate_colours(rgb, factor)[0].tolist()])
        assert np.abs(after[:, 1] - (before[:, 1] * factor).clip(0, 255))[vivid].max() < 6
        assert np.abs(after[:, 2] - before[:, 2]).max() <= 2


def test_hue_wraps_at_180_of_opencvs_steps():
    red = np.array([[[200, 60, 60]]], np.uint8)  # hue 0
    hues = {steps: int(cv2.cvtColor(turn_hue(red, steps), cv2.COLOR_RGB2HSV)[0, 0, 0]) for steps in (-18, -1, 0, 17)}
    assert hues == {-18: 162, -1: 179, 0: 0, 17: 17}


class Script:
    """A generator that answers as written, and remembers what it was asked."""

    def __init__(self, coins: list[float], values: list[float]):
        self.coins, self.values, self.asked = np.array(coins), list(values), []

    def random(self, count: int) -> np.ndarray:
        assert count == len(self.coins)
        return self.coins

    def uniform(self, low: float, high: float) -> float:
        self.asked.append((low, high))
        return self.values.pop(0)

    def integers(self, low: int, high: int) -> int:
        self.asked.append((low, high))
        return self.values.pop(0)


YES, NO = 0.2, 0.8


@pytest.mark.parametrize("contrast_first", [True, False])
def test_steps_come_in_the_published_order_and_ranges(contrast_first):
    image = photo(12, 20)
    steps = {
        "brightness": ((-32, 32), lambda x: scale_colours(x, shift=-7.5), -7.5),
        "contrast": ((0.5, 1.5), lambda x: scale_colours(x, 1.3), 1.3),
        "saturation": ((0.5, 1.5), lambda x: saturate_colours(x, 0.6), 0.6),
        "hue": ((-18, 18), lambda x: turn_hue(x, -11), -11),  # whole numbers, 18 excluded
    }
    order = ["brightness", "contrast", "saturation", "hue"]
    if not contrast_first:
        order = ["brightness", "saturation", "hue", "contrast"]
    script = Script([YES, YES if contrast_first else NO, YES, YES, YES], [steps[name][2] for name in order])
    expected = image
    for name in order:
        expected = steps[name][1](expected)
    assert np.array_equal(distort_colours(image, script), expected)
    assert script.asked == [steps[name][0] for name in order]


def test_each_step_is_left_out_half_of_the_time():
    image = photo(4, 4)
    assert np.array_equal(distort_colours(image, Script([NO] * 5, [])), image)
    assert np.array_equal(distort_colours(image, Script([NO, YES, NO, NO, YES], [9])), turn_hue(image, 9))
    coins = [np.random.default_rng(seed).random(5) < 0.5 for seed in range(400)]
    assert np.abs(np.mean(coins, 0) - 0.5).max() < 0.08


# -- tensors --------------------------------------------------------------------------------------------


def test_normalising_and_padding():
    image = np.full((2, 3, 3), 255, np.uint8)
    crop = padded(image, np.ones((2, 3), np.uint8), 4)
    assert crop.image.dtype == crop.labels.dtype == torch.uint8 and crop.size == (2, 3) and crop.class_pixels[1] == 6
    labels, pixels = crop.labels, normalise(crop.image[None], torch.tensor([crop.size]))[0]
    assert pixels.shape == (3, 4, 4) and pixels.dtype == torch.float32
    assert pixels[:, 0, 0].tolist() == pytest.approx([1.93034, 2.07488, 2.14590], abs=1e-4)
    assert (pixels[:, 2:] == 0).all() and (pixels[:, :, 3:] == 0).all()
    assert labels.tolist() == [[1, 1, 1, 255], [1, 1, 1, 255], [255] * 4, [255] * 4]


def test_normalising_is_the_published_formula_for_every_byte():
    image = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, 2)
    pixels = normalise(torch.from_numpy(image)[None], torch.tensor([[1, 256]]))[0]
    mean = 255 * np.array([0.48145466, 0.4578275, 0.40821073])
    std = 255 * np.array([0.26862954, 0.26130258, 0.27577711])
    assert np.abs(pixels[:, 0].T.numpy() - (image[0] - mean) / std).max() < 1e-6


def test_image_and_labels_move_together():
    labels = np.zeros((60, 60), np.uint8)
    labels[10:40, 15:50] = 1
    image = np.repeat(labels[..., None] * 200, 3, -1)
    for seed in range(20):
        crop = TrainTransform(crop=32)(image, labels, np.random.default_rng(seed))
        ids, grey = crop.labels, crop.image.float().mean(-1)
        known = ids != 255
        bright = grey > (grey[known].min() + grey[known].max()) / 2
        if len(ids[known].unique()) == 2:
            assert (bright == (ids == 1))[known].float().mean() > 0.93  # they differ only along the edges


def test_half_of_the_crops_are_mirrored_with_their_labels():
    image, labels = photo(32, 32), np.random.default_rng(0).integers(0, 3, (32, 32), dtype=np.uint8)
    crops = [TrainTransform(32, (1, 1))(image, labels, np.random.default_rng(seed)) for seed in range(100)]
    ids = [crop.labels.numpy() for crop in crops]
    mirrored = [np.array_equal(found, labels[:, ::-1]) for found in ids]
    assert all(np.array_equal(found, labels) for found, turned in zip(ids, mirrored, strict=True) if not turned)
    assert 35 < sum(mirrored) < 65


def test_both_ways_of_resizing_show_the_same_crop():
    image, labels = photo(80, 100), np.random.default_rng(0).integers(0, 3, (80, 100), dtype=np.uint8)
    for seed in range(8):
        one, other = (
            TrainTransform(crop=32, resize=resize)(image, labels, np.random.default_rng(seed))
            for resize in ("window", "whole")
        )
        difference = (one.image.float() - other.image.float()).abs()
        assert torch.equal(one.labels, other.labels) and difference.mean() < 1
