"""Losses against slow, obvious versions, and their empty cases."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from tqdm_seg.loss_tqdm import (
    check_labels,
    choose_points,
    class_loss,
    count_losses,
    dice_loss,
    mask_loss,
    sample_labels,
    sample_logits,
    score_map_loss,
    supervised_masks,
    textual_loss,
    uniform,
)


def test_supervised_masks_lists_present_classes_in_order(labels):
    labels[1] = 255
    labels[0, 5, 5], expected = 2, [[0, c] for c in sorted(set(labels[0].unique().tolist()) - {255})]
    assert supervised_masks(labels, 3).tolist() == expected


def test_sampling_labels_written_out(labels):
    index = supervised_masks(labels, 3)
    points = torch.rand(2, len(index), 20, 2) * 1.1 - 0.05  # also beyond the border
    height, width = labels.shape[1:]
    expected = torch.zeros(points.shape[:-1])
    for prediction, mask, point in itertools.product(*map(range, expected.shape)):
        image, wanted = index[mask].tolist()
        x, y = (points[prediction, mask, point] * torch.tensor([width, height]) - 0.5).tolist()
        for column, row in itertools.product((math.floor(x), math.floor(x) + 1), (math.floor(y), math.floor(y) + 1)):
            if 0 <= column < width and 0 <= row < height and labels[image, row, column] == wanted:
                expected[prediction, mask, point] += (1 - abs(x - column)) * (1 - abs(y - row))
    torch.testing.assert_close(sample_labels(labels, index, points), expected, atol=1e-5, rtol=0)
    assert sample_labels(labels, index[:0], points[:, :0]).shape == (2, 0, 20)


def test_points_are_chosen_where_masks_are_uncertain():
    torch.manual_seed(0)
    ramp = torch.linspace(-10, 10, 64).expand(1, 2, 64, 64).clone()  # zero along the middle column
    points = choose_points(ramp, torch.ones(2), 400, 3.0, 0.75)
    assert points.shape == (1, 2, 400, 2) and points.min() >= 0 and points.max() <= 1
    chosen, fresh = points[:, :, :300, 0], points[:, :, 300:, 0]
    assert (chosen - 0.5).abs().quantile(0.95) < 0.15 and (fresh - 0.5).abs().quantile(0.5) > 0.2


def test_points_stay_inside_the_image_when_logits_cover_more():
    torch.manual_seed(0)
    logits = torch.full((1, 1, 64, 64), 5.0)
    logits[..., 32:] = 0  # the padding looks uncertain, and must not attract points
    points = choose_points(logits, torch.tensor([0.5, 1.0]), 100, 3.0, 0.75)
    assert sample_logits(logits, points * torch.tensor([0.5, 1.0])).mean() > 4.5


def test_class_loss_is_the_weighted_mean_written_out():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 5)  # B, L, K, K + 1
    index = torch.tensor([[0, 1], [0, 3], [1, 0]])
    for layer in range(3):
        total = weight = 0.0
        for image in range(2):
            for query in range(4):
                present = [image, query] in index.tolist()
                w, target = (1.0, query) if present else (0.1, 4)
                total += w * -logits[image, layer, query].log_softmax(-1)[target].item()
                weight += w
        counts = count_losses(index, torch.full((2, 4, 4), 255), 4, 0.1, "all", 255)
        assert (counts.masks, counts.labelled) == (3, 32) and counts.class_weight.item() == pytest.approx(weight)
        loss = class_loss(logits, index, 0.1, counts.class_weight)[layer]
        assert loss.item() == pytest.approx(total / weight, rel=1e-5)


def test_mask_and_dice_loss_written_out():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 7), torch.rand(2, 3, 7)
    p = logits.sigmoid()
    entropy = -(targets * p.log() + (1 - targets) * (1 - p).log())
    torch.testing.assert_close(mask_loss(logits, targets, torch.tensor(3.0)), entropy.mean((1, 2)))
    dice = torch.stack(
        [1 - (2 * (p[:, m] * targets[:, m]).sum(1) + 1) / (p[:, m].sum(1) + targets[:, m].sum(1) + 1) for m in range(3)]
    ).sum(0)
    torch.testing.assert_close(dice_loss(logits, targets, torch.tensor(3.0)), dice / 3)


def test_no_masks_at_all_is_zero_on_the_graph():
    logits = torch.randn(2, 0, 8, 8, requires_grad=True)
    points = choose_points(logits, torch.ones(2), 20, 3.0, 0.75)
    sampled = sample_logits(logits, points)
    num = count_losses(torch.zeros(0, 2), torch.full((1, 4, 4), 255), 3, 0.1, "all", 255).masks.clamp(min=1)
    loss = mask_loss(sampled, torch.zeros(2, 0, 20), num).sum() + dice_loss(sampled, torch.zeros(2, 0, 20), num).sum()
    assert loss == 0
    loss.backward()
    assert logits.grad is not None


def test_textual_loss_has_the_published_floor():
    reference = F.normalize(torch.eye(4) - 0.25, dim=-1)
    loss = textual_loss(reference[None] * 3, reference)
    worst = math.log(1 + 3 * math.exp(-2))
    assert loss > worst
    assert loss.item() == pytest.approx(-math.log(math.e / (math.e + 3 * math.exp(-1 / 3))), rel=1e-5)


@pytest.mark.parametrize("covered", [(32, 32), (36, 40)])
def test_score_map_loss_is_cross_entropy_of_the_enlarged_map(labels, covered):
    score_map = (torch.rand(2, 3, 4, 5) * 2 - 1).requires_grad_()
    labels[0, :7] = 255
    loss = 3 * score_map_loss(score_map, labels, covered, 0.07, 255, torch.tensor(50.0))
    (gradient,) = torch.autograd.grad(loss, score_map)
    enlarged = F.interpolate(score_map / 0.07, covered, mode="bilinear")[..., :32, :32]
    expected = 3 * F.cross_entropy(enlarged, labels, ignore_index=255, reduction="sum") / 50
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    (wanted,) = torch.autograd.grad(expected, score_map)
    assert (gradient - wanted).abs().max() < 1e-6 * wanted.abs().max()


def test_score_map_loss_of_only_ignored_pixels_is_zero():
    score_map = torch.rand(1, 3, 2, 2, requires_grad=True)
    labels = torch.full((1, 8, 8), 255)
    for over, pixels in (("labelled", 0), ("all", 64)):
        counts = count_losses(torch.zeros(0, 2), labels, 3, 0.1, over, 255)
        assert counts.labelled == pixels
        assert score_map_loss(score_map, labels, (8, 8), 0.07, 255, counts.labelled.clamp(min=1)) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda y: y[:, :16], r"must be \(2, 32, 32\)"), (lambda y: y.clone().fill_(7), r"hold \[7\]")],
)
def test_wrong_labels_are_named(labels, images, change, message):
    with pytest.raises(ValueError, match=message):
        check_labels(change(labels), images, 3, 255)


def test_numbers_by_seed_are_uniform_and_depend_on_nothing_else():
    seeds = torch.tensor([3, 2**31 - 1, 3, 0], dtype=torch.int32)
    numbers = uniform(seeds, (50, 400))
    assert torch.equal(numbers[0], numbers[2]) and torch.equal(numbers[1:2], uniform(seeds[1:2], (50, 400)))
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = torch.stack([torch.histc(row, 100, 0, 1) for row in numbers])
    assert ((counts - 200) ** 2 / 200).sum(1).max() < 170  # chi squared of 99 degrees; 148 is a thousandth
    pairs = torch.corrcoef(torch.stack([numbers[0].flatten(), numbers[1].flatten(), numbers[0].flatten().roll(1)]))
    assert (pairs - torch.eye(3)).abs().max() < 0.03


def test_points_by_seed_do_not_depend_on_the_other_masks():
    logits = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    seeds = torch.tensor([5, 6, 7], dtype=torch.int32)
    points = choose_points(logits, torch.ones(2), 40, 3.0, 0.75, seeds)
    alone = choose_points(logits[:, 1:2], torch.ones(2), 40, 3.0, 0.75, seeds[1:2])
    torch.testing.assert_close(points[:, 1:2].sort(2).values, alone.sort(2).values)
    assert not torch.equal(points[:, 0], points[:, 1])
