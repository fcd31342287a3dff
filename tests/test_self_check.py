"""The scores that a model folder stores of itself."""

import pytest
import torch
from conftest import micro_model

from tqdm_seg.deploy.self_check import FILE, check_images, verify, write_self_check


def test_the_saved_model_passes_and_a_wrong_head_fails(model, tmp_path):
    write_self_check(model, tmp_path)
    assert verify(model.train(), tmp_path) < 1e-5 and model.training
    model.eval().prepare_for_inference()
    assert verify(model, tmp_path) < 1e-3
    with torch.no_grad():
        torch.nn.init.normal_(model.model.mask_decoder.class_head.weight)
    with pytest.raises(ValueError, match=FILE):
        verify(model, tmp_path)


def test_classes_are_matched_by_text(tmp_path):
    model = micro_model()
    write_self_check(model, tmp_path)
    model.set_classes({0: "sky", 1: "road", 2: "traffic light"})
    assert verify(model, tmp_path) < 1e-4
    model.set_classes({0: "sky", 1: "road"})
    with pytest.raises(ValueError, match="other classes"):
        verify(model, tmp_path)


def test_a_damaged_file_is_named_and_none_is_no_error(tmp_path):
    model = micro_model()
    assert verify(model, tmp_path) is None
    (tmp_path / FILE).write_text('{"scores": [')
    with pytest.raises(ValueError, match=FILE):
        verify(model, tmp_path)


def test_scores_with_nan_are_not_stored(tmp_path):
    model = micro_model()
    with torch.no_grad():
        model.model.mask_decoder.class_head.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        write_self_check(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_images_are_made_of_integers_and_small(model):
    for image in check_images(model.config):
        steps = (image + 2) * 24
        torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
        assert image.shape[:2] == (1, 3) and image.std() > 0.5
