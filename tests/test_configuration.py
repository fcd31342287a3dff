"""The configuration: presets, class list as data, token ids, and errors that carry the fix."""

import json
import sys

import pytest
from conftest import micro_config

from tqdm_seg import configuration_tqdm
from tqdm_seg.configuration_tqdm import CITYSCAPES_CLASSES, PRESETS, TqdmConfig, TqdmTextConfig, TqdmVisionConfig


def test_presets_are_the_published_sizes():
    clip, eva = TqdmConfig.from_preset("clip_vit_b16"), TqdmConfig.from_preset("eva02_clip_l14")
    assert (clip.vision_config.hidden_size, clip.vision_config.num_hidden_layers) == (768, 12)
    assert (eva.vision_config.hidden_size, eva.vision_config.num_hidden_layers) == (1024, 24)
    assert eva.vision_config.patch_remainder == "stretch" and eva.text_config.num_prompt_tokens == 8
    assert clip.score_map_loss_over == eva.score_map_loss_over == "all"
    assert TqdmConfig.from_preset("eva02_clip_b16").vision_config.intermediate_size == 2048
    assert clip.class_names == list(CITYSCAPES_CLASSES)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_survive_a_round_trip(name, tmp_path):
    config = TqdmConfig.from_preset(name)
    config.save_pretrained(tmp_path)
    assert TqdmConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_token_ids_are_those_of_open_clip():
    import open_clip

    names = ["road", "traffic light", "non-traversable", "Snowy Track", "children's playground", "café"]
    config = TqdmConfig(id2label=dict(enumerate(names)))
    for name in names:
        for prompted, text in ((False, name), (True, f"a clean origami of a {name}")):
            expected = open_clip.tokenize([text])[0]
            ids = config.text_token_ids(name, prompted)
            assert ids == expected[: len(ids)].tolist() and not expected[len(ids) :].any()


def test_published_class_names_need_no_vocabulary(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip.tokenizer", None)
    configuration_tqdm._tokenizer.cache_clear()
    assert TqdmConfig().token_ids["traffic light"] == [3399, 1395]
    with pytest.raises(ImportError, match="pip install open_clip_torch"):
        TqdmConfig(id2label={0: "a name never seen"})


def test_a_saved_class_list_needs_no_vocabulary(monkeypatch, tmp_path):
    TqdmConfig(id2label={0: "gravel", 1: "mud"}).save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "open_clip.tokenizer", None)
    assert TqdmConfig.from_pretrained(tmp_path).class_names == ["gravel", "mud"]


def test_editing_id2label_in_the_file_is_enough(tmp_path):
    TqdmConfig.from_preset("tiny").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    fields["id2label"] = {"0": "mud", "1": "road"}
    file.write_text(json.dumps(fields))
    config = TqdmConfig.from_pretrained(tmp_path)
    assert config.num_labels == 2 and config.label2id == {"mud": 0, "road": 1}
    config.set_classes(config.id2label)
    assert set(config.token_ids) == {"mud", "road", "a clean origami of a"}


def test_another_reference_prompt_is_encoded_on_both_sides_of_the_class():
    config = micro_config(reference_prompt="a photo of a {class} in fog")
    ids = config.text_token_ids("road", prompted=True)
    assert ids[1:-1] == [*config.token_ids["a photo of a"], 1759, *config.token_ids["in fog"]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_labels": 2}, "pass id2label"),
        ({"id2label": {0: "a", 2: "b"}}, "without gaps"),
        ({"id2label": {0: "a", 1: "a"}}, "distinct"),
        ({"id2label": {}}, "without gaps"),
        ({"hidden_size": 100}, "not a multiple of pixel_decoder_heads 8"),
        ({"window_stride": 600}, "stride from 1 to 512"),
        ({"reference_prompt": "no place"}, "exactly once"),
        ({"text_config": {"projection_dim": 64}}, "projection_dim must be the same"),
        ({"vision_config": {"feature_layers": [3, 5, 7, 12]}}, "between 0 and 11"),
        ({"vision_config": {"image_size": 16}}, "image_size >= 32"),
        ({"vision_config": {"tower": "swin"}}, "tower"),
        ({"text_config": {"num_prompt_tokens": 75}}, "at most 74"),
        ({"score_map_loss_over": "some"}, "score_map_loss_over"),
    ],
)
def test_errors_carry_the_fix(fields, message):
    with pytest.raises(Exception, match=message):
        TqdmConfig(**fields)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="clip_vit_b16, eva02_clip_b16, eva02_clip_l14, tiny"):
        TqdmConfig.from_preset("huge")


def test_sub_configurations_stand_alone():
    assert TqdmVisionConfig().hidden_size == 768 and TqdmTextConfig().num_prompt_tokens == 5
