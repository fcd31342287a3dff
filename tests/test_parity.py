"""The published implementation's own numbers, within float32."""

import pytest
import torch
from parity import PACKS, Pack, compare_inference, compare_training

PACK_NAMES = ["mini_clip", "mini_eva02", "mini_clip_deep"]


def failures(rows):
    return [f"{row.name}: {row.absolute:.2e} absolute, {row.relative:.2e} relative" for row in rows if not row.passed]


@pytest.mark.parametrize("name", PACK_NAMES)
def test_every_intermediate_and_output_matches(name):
    rows = compare_inference(Pack(PACKS / name))
    assert not failures(rows)
    names = {row.name.split("/")[-1] for row in rows}
    assert {"backbone_feat_0", "text_embedding", "score_map", "pd_out_2", "cls_logits_3", "mask_logits_3"} <= names
    assert name == "mini_clip_deep" or {"logits", "logits_rescaled_half", "softmax_mean", "pred"} <= names


@pytest.mark.parametrize("name", PACK_NAMES)
def test_losses_gradients_and_batchnorm_match(name):
    pack = Pack(PACKS / name)
    rows = compare_training(pack)
    assert not failures(rows)
    layers = pack.pack["decoder_layers"]
    assert sum("/bn_train/decode" in row.name for row in rows) == 2 * 3 * (layers + 1)
    assert sum(row.name.startswith("train/grad/") for row in rows) >= 45
    assert sum(row.name.endswith("one side only") for row in rows) == 4


def test_the_comparison_sees_a_wrong_weight():
    pack = Pack(PACKS / "mini_clip")
    key = "decode_head.pixel_decoder.encoder.layers.1.attentions.0.sampling_offsets.bias"
    pack.state[key] = pack.state[key] + 0.01
    failed = {row.name for row in compare_inference(pack) if not row.passed}
    assert "eval_native/pd_layer_1" in failed and "eval_native/pd_layer_0" not in failed


def test_softmax_of_views_is_only_the_published_average():
    pack = Pack(PACKS / "mini_clip")
    model, image = pack.model(), pack.golden["slide/image"]
    plain, mirrored = model.segment(image), model.segment(image.flip(-1)).flip(-1)
    torch.testing.assert_close(model.segment(image, flip=True), (plain + mirrored) / 2)
    published = model.segment(image, flip=True, softmax_views=True)
    torch.testing.assert_close(published, (plain.softmax(1) + mirrored.softmax(1)) / 2)
    assert (published - (plain + mirrored) / 2).abs().max() > 0.1


def test_score_map_loss_over_labelled_pixels_is_the_published_one_rescaled():
    pack = Pack(PACKS / "mini_clip")
    labels = pack.labels("train_empty")
    share = (labels != 255).float().mean()
    assert 0 < share < 1
    terms = {}
    for over in ("all", "labelled"):
        model = pack.model(score_map_loss_over=over)
        with torch.no_grad():
            outputs = model.model(pack.golden["train/image"])
            terms[over] = model.compute_losses(outputs, labels)["loss_score_map"]
    torch.testing.assert_close(terms["labelled"] * share, terms["all"])


def test_padding_covers_the_pixels_that_stretching_drops():
    pack = Pack(PACKS / "mini_eva02")
    image = pack.golden["eval_native/image"]  # 64 px; patches of 14 leave 8 over
    vision = {**pack.model().config.vision_config.to_dict(), "patch_remainder": "pad"}
    padding, stretching = pack.model(vision_config=vision), pack.model()
    assert padding.model.vision_tower.padded_size(64, 64) == (70, 70)
    changed = image.clone()
    changed[..., 56:, :] += 1
    with torch.no_grad():
        torch.testing.assert_close(
            stretching(changed, use_windows=False).logits, stretching(image, use_windows=False).logits
        )
        padded = padding(image, use_windows=False).logits
        assert (padding(changed, use_windows=False).logits - padded).abs().max() > 1e-3
        # The same as an image that was black (zero after normalising) beyond its border, cut back to 64.
        larger = stretching(torch.nn.functional.pad(image, (0, 6, 0, 6)), use_windows=False).logits
    torch.testing.assert_close(padded, larger[..., :64, :64])


def test_padding_keeps_labels_in_their_place():
    """Points of the image are read at the same pixels of the padded masks, and the padding has no label."""
    pack = Pack(PACKS / "mini_eva02")
    vision = {**pack.model().config.vision_config.to_dict(), "patch_remainder": "pad"}
    model = pack.model(vision_config=vision)
    image, labels = pack.golden["train/image"], pack.labels("train")
    larger = torch.nn.functional.pad(labels, (0, 6, 0, 6), value=255)
    with torch.no_grad():
        outputs = model.model(image)
        points = (
            pack.points("train") * 0.9
        )  # away from the border, where zero lies outside of one and inside of the other
        ours = model.compute_losses(outputs, labels, points=points)
        whole = model.compute_losses(outputs, larger, points=points * 64 / 70)
    for name in ours:
        if name != "loss_score_map":  # "all" divides by the pixels, of which the larger map has more
            torch.testing.assert_close(ours[name], whole[name], msg=name)
    torch.testing.assert_close(ours["loss_score_map"] * 64**2, whole["loss_score_map"] * 70**2)
