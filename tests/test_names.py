"""Names as a contract: rows of the weights belong to query texts, on every route that a class list takes."""

import copy
import json
import warnings

import pytest
import torch
from conftest import micro_config, micro_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation

from tqdm_seg import layers_tqdm
from tqdm_seg.configuration_tqdm import TqdmConfig
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation, TqdmModel

NAMES = ["road", "traffic light", "sky"]
REORDERED = {0: "sky", 1: "road", 2: "traffic light"}
ORDER = [2, 0, 1]  # rows of NAMES
LOAD = TqdmForSemanticSegmentation.from_pretrained
pytestmark = pytest.mark.usefixtures("auto_classes")


@pytest.fixture
def folder(tmp_path):
    """A trained model's folder."""
    micro_model(trained=True).save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


@pytest.fixture
def start(tmp_path):
    """The folder of a start model."""
    micro_model().save_pretrained(tmp_path / "start")
    return tmp_path / "start"


def scores(model, images):
    return model.segment(images)


def same(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


# ---- known names


def edited(folder, tmp_path, **fields):
    """A copy of the configuration and weights with other fields in config.json."""
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def by_keyword(folder, tmp_path):
    return LOAD(folder, id2label=REORDERED)


def by_auto_model(folder, tmp_path):
    return AutoModelForSemanticSegmentation.from_pretrained(folder, id2label={str(i): n for i, n in REORDERED.items()})


def by_auto_config(folder, tmp_path):
    config = AutoConfig.from_pretrained(folder, id2label=REORDERED)
    assert config.label2id == {"sky": 0, "road": 1, "traffic light": 2}
    return LOAD(folder, config=config)


def by_edited_configuration(folder, tmp_path):
    config = TqdmConfig.from_pretrained(folder)
    config.id2label = REORDERED
    return AutoModelForSemanticSegmentation.from_pretrained(folder, config=config)


def by_saved_configuration(folder, tmp_path):
    config = AutoConfig.from_pretrained(folder)
    config.id2label = REORDERED
    config.save_pretrained(folder)
    return LOAD(folder)


def by_single_names(folder, tmp_path):
    config = AutoConfig.from_pretrained(folder)
    for index, name in REORDERED.items():
        config.id2label[index] = name
    config.save_pretrained(folder)
    return LOAD(folder)


def by_the_file(folder, tmp_path):
    return LOAD(edited(folder, tmp_path, id2label={str(i): n for i, n in REORDERED.items()}))


def by_a_live_model(folder, tmp_path):
    model = LOAD(folder)
    model.config.id2label = REORDERED
    model.save_pretrained(tmp_path / "again")
    return LOAD(tmp_path / "again")


def by_set_classes(folder, tmp_path):
    model = LOAD(folder)
    model.set_classes(REORDERED)
    return model


def by_label2id(folder, tmp_path):
    return LOAD(folder, label2id={n: i for i, n in REORDERED.items()}, id2label=REORDERED, num_labels=3)


ROUTES = [
    by_keyword, by_auto_model, by_auto_config, by_edited_configuration, by_saved_configuration, by_single_names,
    by_the_file, by_a_live_model, by_set_classes, by_label2id,
]  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
def test_known_names_only_reorder(route, folder, tmp_path, images):
    expected = scores(LOAD(folder), images)[:, ORDER]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = route(folder, tmp_path)
    same(scores(model, images), expected)
    config = model.config
    assert config.id2label == REORDERED and config.query_texts == list(REORDERED.values())
    assert config.label2id == {name: index for index, name in REORDERED.items()}
    model.save_pretrained(tmp_path / "reloaded")
    same(scores(LOAD(tmp_path / "reloaded"), images), expected)


def test_known_names_choose(folder, images):
    model = LOAD(folder, id2label={0: "sky", 1: "road"})
    whole = LOAD(folder)
    whole.set_classes({0: "sky", 1: "road"})
    same(scores(model, images), scores(whole, images))


def test_the_base_model_follows_names(folder, images):
    plain, ordered = TqdmModel.from_pretrained(folder), AutoModel.from_pretrained(folder, id2label=REORDERED)
    with torch.no_grad():
        same(ordered(images).mask_logits, plain(images).mask_logits[:, :, ORDER])


def test_frozen_texts_follow_names(folder, tmp_path, images):
    model = LOAD(folder)
    model.freeze_text()
    model.save_pretrained(tmp_path / "frozen")
    expected = scores(model, images)[:, ORDER]
    same(scores(LOAD(tmp_path / "frozen", id2label=REORDERED), images), expected)
    with pytest.raises(ValueError, match=r"mud"):
        LOAD(tmp_path / "frozen", id2label={0: "mud"}, ignore_mismatched_sizes=True)


def test_an_edited_live_model_does_not_predict_nor_save_what_cannot_be_loaded(folder, tmp_path, images):
    model = LOAD(folder)
    model.config.id2label = UNKNOWN
    for act in (model, model.segment, lambda _: model.save_pretrained(tmp_path / "x")):
        with pytest.raises(ValueError, match="set_classes"):
            act(images)
    assert not (tmp_path / "x").exists()
    model.set_classes(REORDERED)
    model(images)


def test_old_folders_have_their_names_as_texts(folder, images):
    expected = scores(LOAD(folder), images)
    fields = json.loads((folder / "config.json").read_text())
    for name in ("query_texts", "display_names", "trained"):
        fields.pop(name, None)
    (folder / "config.json").write_text(json.dumps(fields))
    model = LOAD(folder)
    assert model.config.trained and model.config.query_texts == NAMES
    same(scores(model, images), expected)
    same(scores(LOAD(folder, id2label=REORDERED), images), expected[:, ORDER])


# ---- unknown names

UNKNOWN = {0: "road", 1: "mud", 2: "sky"}


@pytest.mark.parametrize("classes", [UNKNOWN, {0: "traversable", 1: "non-traversable"}, dict(enumerate("abcdef"))])
def test_a_trained_model_refuses_unknown_names_with_the_ways_out(classes, folder):
    for load in (LOAD, AutoModelForSemanticSegmentation.from_pretrained):
        with pytest.raises(ValueError, match=r"display_names.*set_classes.*ignore_mismatched_sizes") as error:
            load(folder, id2label=classes)
        assert len(str(error.value)) <= 300 and next(n for n in classes.values() if n not in NAMES) in str(error.value)


def test_ignore_mismatched_sizes_is_set_classes_with_a_warning(folder, images):
    with pytest.warns(UserWarning, match="mud"):
        model = LOAD(folder, id2label=UNKNOWN | {3: "traffic light"}, ignore_mismatched_sizes=True)
    old, new = LOAD(folder).model.mask_decoder, model.model.mask_decoder
    same(new.query_positions[[0, 2, 3]], old.query_positions[[0, 2, 1]])
    same(new.class_head.weight[[0, 2, 3, 4]], old.class_head.weight[[0, 2, 1, 3]])
    assert model.config.query_texts == ["road", "mud", "sky", "traffic light"] and "mud" in model.config.token_ids
    assert scores(model, images).shape[1] == 4


@pytest.mark.parametrize("ignore", [{}, {"ignore_mismatched_sizes": True}])
def test_a_start_model_takes_any_names(ignore, start, images, labels, tmp_path):
    id2label = {0: "mud", 1: "gravel", 2: "sky", 3: "tree"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoModelForSemanticSegmentation.from_pretrained(
            start, num_labels=4, id2label=id2label, label2id={n: i for i, n in id2label.items()}, **ignore
        )
    assert model.config.class_names == model.config.query_texts == list(id2label.values())
    model.train()(images, labels=labels).loss.backward()
    assert model.config.trained
    model.save_pretrained(tmp_path / "tuned")
    assert LOAD(tmp_path / "tuned").config.trained


def test_a_number_of_classes_is_refused_everywhere(folder, start):
    config = TqdmConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match="pass id2label"):
        config.num_labels = 4
    config.num_labels = 3
    for load in (LOAD, AutoConfig.from_pretrained, AutoModelForSemanticSegmentation.from_pretrained):
        for source in (folder, start):
            with pytest.raises(ValueError, match="pass id2label"):
                load(source, num_labels=4)


def test_trained_weights_are_not_loaded_by_number(folder):
    """A configuration of trained weights with other names makes no model that `load_state_dict` would fill wrongly."""
    config = TqdmConfig.from_pretrained(folder, id2label=REORDERED)
    with pytest.raises(ValueError, match="another order"):
        TqdmForSemanticSegmentation(config)


# ---- display names


def test_display_names_change_no_prediction(folder, tmp_path, images):
    expected = scores(LOAD(folder), images)
    model = LOAD(folder, display_names={"road": "Straße", "sky": "ciel"})
    assert model.config.class_names == ["Straße", "traffic light", "ciel"] and model.config.query_texts == NAMES
    assert model.config.label2id["Straße"] == 0 and "Straße" not in model.config.token_ids
    same(scores(model, images), expected)
    model.config.rename_classes({"ciel": "cielo"})
    model.save_pretrained(tmp_path / "translated")
    again = LOAD(tmp_path / "translated", id2label={0: "cielo", 1: "road", 2: "traffic light"})
    same(scores(again, images), expected[:, ORDER])
    assert again.config.class_names == ["cielo", "road", "traffic light"]


@pytest.mark.parametrize("names", [{"mud": "x"}, {"road": "sky"}, {"road": "x", "sky": "x"}, {"road": " "}])
def test_a_refused_renaming_changes_nothing(names, folder):
    config = TqdmConfig.from_pretrained(folder)
    before = config.to_dict()
    with pytest.raises(ValueError, match="display_names"):
        config.rename_classes(names)
    assert config.to_dict() == before


# ---- what is no class list

WRONG = {
    "ids from 1": {1: "road", 2: "traffic light", 3: "sky"},
    "a gap": {0: "road", 2: "sky"},
    "no numbers": {"a": "road", "b": "sky"},
    "doubled": {0: "road", 1: "road", 2: "sky"},
    "empty": {0: "road", 1: "", 2: "sky"},
    "blank": {0: "road", 1: " ", 2: "sky"},
    "none": {0: "road", 1: None, 2: "sky"},
    "nothing": {},
    "a list": ["road", "sky"],
    "control characters": {0: "road", 1: "traffic\nlight", 2: "sky"},
    "two thousand characters": {0: "x" * 2000, 1: "x" * 2000},
}


@pytest.mark.parametrize("names", WRONG.values(), ids=WRONG)
def test_no_route_takes_what_is_no_class_list(names, folder):
    before = TqdmConfig.from_pretrained(folder)
    model = LOAD(folder)
    state = copy.deepcopy(model.state_dict())

    def in_place():
        config = copy.deepcopy(before)
        config.id2label.clear() if not isinstance(names, dict) else None
        config.id2label.update(names if isinstance(names, dict) else {})
        if isinstance(names, dict):
            for index in set(config.id2label) - set(names):
                del config.id2label[index]
        config.validate()

    routes = [
        lambda: LOAD(folder, id2label=names), lambda: AutoConfig.from_pretrained(folder, id2label=names),
        lambda: AutoModelForSemanticSegmentation.from_pretrained(folder, id2label=names, ignore_mismatched_sizes=True),
        lambda: setattr(copy.deepcopy(before), "id2label", names), lambda: micro_config(id2label=names),
        lambda: model.set_classes(names), in_place,
    ]  # fmt: skip
    for route in routes:
        with pytest.raises(ValueError, match="id2label|class names") as error:
            route()
        assert len(str(error.value)) <= 300 and "\n" not in str(error.value)
    assert model.config.to_dict() == before.to_dict() | {
        k: v for k, v in model.config.to_dict().items() if k[0] == "_"
    } | {key: model.config.to_dict()[key] for key in ("architectures", "dtype", "vision_config", "text_config")}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "names",
    [["road", "Road"], ["road", "road "], ["road", "ROAD  "], ["a &amp; b", "a & b"], ["road", "<end_of_text>"]],
)
def test_names_that_are_one_text_to_clip_are_refused(names, folder):
    model = LOAD(folder)
    for act in (
        lambda: micro_config(id2label=dict(enumerate(names))),
        lambda: model.set_classes(dict(enumerate(names))),
    ):
        with pytest.raises(ValueError, match="to CLIP"):
            act()


@pytest.mark.parametrize(
    "name",
    [
        "children’s ‘play’", "ﬁeld", "ｒｏａｄ ｓｉｇｎ",
        "bed &amp; breakfast", "a<start_of_text>b", "a <end_of_text> b",
        "café", "wall  with\u00a0gap", "тропа",
    ],
)  # fmt: skip
def test_odd_names_are_those_of_open_clip(name):
    import open_clip

    ids = micro_config(id2label={0: name}).text_token_ids(name)
    assert ids == open_clip.tokenize([name])[0][: len(ids)].tolist()


def test_contradicting_label2id_is_refused(folder):
    wrong = {"road": 1, "traffic light": 0, "sky": 2}
    for kwargs in (
        {"label2id": wrong},
        {"label2id": wrong, "id2label": dict(enumerate(NAMES))},
        {"label2id": {"x": 0}},
    ):
        for load in (LOAD, AutoConfig.from_pretrained):
            with pytest.raises(ValueError, match="label2id contradicts"):
                load(folder, **kwargs)
    with pytest.raises(ValueError, match="label2id contradicts"):
        micro_config(label2id=wrong)
    config = TqdmConfig.from_pretrained(folder)
    config.label2id = wrong
    with pytest.raises(ValueError, match="label2id contradicts"):
        config.save_pretrained(folder)


# ---- set_classes


def test_set_classes_keeps_what_is_frozen(folder):
    model = LOAD(folder)
    model.model.mask_decoder.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.warns(UserWarning, match="mud"):
        model.set_classes(UNKNOWN)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_a_name_too_long_leaves_the_model_as_it_was(images):
    model = micro_model(text_config={"max_position_embeddings": 12})
    expected, before = scores(model, images), model.config.to_dict()
    with pytest.raises(ValueError, match="positions"):
        model.set_classes({0: "road", 1: "a very long name of a class with many words"})
    assert model.config.to_dict() == before
    same(scores(model, images), expected)


@pytest.mark.parametrize("saved", ["class_head", "mask_decoder"])
def test_set_classes_under_peft(saved, folder, images):
    from peft import LoraConfig, get_peft_model

    model = LOAD(folder)
    expected = scores(model, images)[:, ORDER]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[saved])).eval()
    adapted.set_classes(REORDERED)
    with torch.no_grad():
        same(adapted(images).logits, expected)
    learning = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert any("modules_to_save.default" in name for name in learning)
    assert not any("original_module" in name for name in learning)


def test_set_classes_refuses_an_adapted_class_head(folder, images):
    from peft import LoraConfig, get_peft_model

    model = LOAD(folder)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["class_head"])).eval()
    before = copy.deepcopy(adapted.state_dict())
    with pytest.raises(ValueError, match="merge or remove adapters"):
        adapted.set_classes(REORDERED)
    assert model.config.class_names == NAMES
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())


# ---- trained or not


def test_folders_say_whether_they_are_trained(folder, start):
    assert LOAD(folder).config.trained and not LOAD(start).config.trained
    assert not TqdmConfig.from_preset("tiny").trained and not TqdmConfig().trained


def test_only_predictions_of_a_start_model_warn(folder, start, images, labels, monkeypatch):
    said = []
    monkeypatch.setattr(layers_tqdm.logger, "warning_once", said.append, raising=False)
    scores(LOAD(folder), images)
    model = LOAD(start)
    model(images, labels=labels)
    assert not said
    model(images)
    model.segment(images)
    assert len(said) == 2 and "start of a training" in said[0]
    model.train()(images, labels=labels)
    model.eval()(images)
    assert len(said) == 2


def test_weights_of_a_start_are_safetensors_with_the_rows_of_their_texts(start):
    assert load_file(start / "model.safetensors")["model.mask_decoder.query_positions"].shape == (3, 32)
    assert isinstance(LOAD(start).model.mask_decoder.class_head, nn.Linear)


def test_programs_refuse_a_folder_with_names_that_its_weights_lack(folder, tmp_path):
    from tqdm_seg.deploy.folder import check_model_folder
    from tqdm_seg.image_processing_tqdm import TqdmImageProcessor

    TqdmImageProcessor().save_pretrained(folder)
    check_model_folder(edited(folder, tmp_path, id2label={str(i): n for i, n in REORDERED.items()}))
    with pytest.raises(ValueError, match=r"config\.json.*mud"):
        check_model_folder(edited(folder, tmp_path, id2label={str(i): n for i, n in UNKNOWN.items()}))
