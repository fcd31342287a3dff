"""Class texts given as vectors, and the class head that compares: any name of the table is a class."""

import copy
import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from conftest import micro_config, micro_model
from PIL import Image
from safetensors.torch import load_file
from test_names import ROUTES
from torch.nn import functional as F
from transformers import AutoModelForSemanticSegmentation

import tqdm_seg
from tqdm_seg.configuration_tqdm import CITYSCAPES_CLASSES, TqdmConfig
from tqdm_seg.data.class_vectors import LISTS, TEXTS, class_words, read_class_vectors
from tqdm_seg.data.label_maps import RUGD_COLOURS, YCOR_COLOURS
from tqdm_seg.deploy.export import export
from tqdm_seg.deploy.folder import save_model_folder
from tqdm_seg.deploy.predict import set_class_names
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.loss_tqdm import textual_loss
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

LOAD = TqdmForSemanticSegmentation.from_pretrained
NAMES = ["road", "traffic light", "sky", "rock", "stone", "tree"]
ABOUT = {"names": NAMES, "words": {"asphalt": "road", "forest": "tree"}, "model": "none", "source": "a test"}
STEPS = 150  # of training, where a test needs a trained model
WIDTH = 16  # of the micro models' image-text space
pytestmark = pytest.mark.usefixtures("auto_classes")


def table() -> torch.Tensor:
    """(V, E) with a large common part, as CLIP's texts have."""
    return F.normalize(torch.randn(len(NAMES), WIDTH, generator=torch.Generator().manual_seed(3)) + 1, dim=-1)


def vector_model(**overrides) -> TqdmForSemanticSegmentation:
    """A micro model with the table for a text tower, and a head that compares."""
    fields = {"queries": "vectors", "class_vectors": copy.deepcopy(ABOUT), "class_head": "cosine", "trained": True}
    model = micro_model(**(fields | overrides))
    model.use_class_vectors(table(), model.config.class_vectors, model.config.centre_class_vectors)
    return model


def same(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


@pytest.fixture
def folder(tmp_path):
    vector_model().save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


# ---- the shipped table


def test_the_shipped_vectors_are_those_of_clip_and_centring_tells_them_apart():
    vectors, about = read_class_vectors("clip_vit_b16")
    assert vectors.shape == (171, 512) and "CLIP ViT-B/16" in about["model"] and "MIT" in about["licence"]
    assert "Copyright (c) 2023 ZiqinZhou66" in (LISTS / "class_vectors_LICENSE.txt").read_text()
    rows = {name: row for row, name in enumerate(about["names"])}
    model = micro_model(
        id2label={0: "road", 1: "rock"}, queries="vectors", class_vectors=about,
        **dict.fromkeys(("vision_config", "text_config"), {"projection_dim": 512}),
    )  # fmt: skip
    model.set_classes(dict(enumerate(about["names"])))
    cosines = {}
    for centre in (False, True):
        model.use_class_vectors(torch.from_numpy(vectors), about, centre)
        texts = model.model.text_queries.encode_reference()
        same(texts.norm(dim=-1), torch.ones(171))
        cosines[centre] = texts @ texts.T
    for centre, (median, stone, road) in {False: (0.77, 0.955, 0.81), True: (-0.02, 0.74, -0.02)}.items():
        found = cosines[centre]
        apart = found[~torch.eye(171, dtype=torch.bool)]
        assert apart.median().item() == pytest.approx(median, abs=0.01)
        assert found[rows["rock"], rows["stone"]].item() == pytest.approx(stone, abs=0.005)
        assert found[rows["rock"], rows["road"]].item() == pytest.approx(road, abs=0.01)


def test_classes_of_known_datasets_have_a_word_or_are_named_as_without():
    names, words = read_class_vectors("clip_vit_b16").about["names"], class_words()
    assert {*words.values()} <= {*names} and not {*words} & {*names}
    without = {"rugd": {"pole", "container"}, "ycor": {"obstacle"}, "cityscapes": {"pole", "rider"}}
    classes = {"rugd": [*RUGD_COLOURS], "ycor": [*YCOR_COLOURS], "cityscapes": CITYSCAPES_CLASSES}
    for dataset, known in classes.items():
        lacking = {name for name in known if words.get(name, name) not in names}
        assert lacking - {"void", "background"} == without[dataset]


def write_table(path, **changes):
    fields = {"names": np.array(NAMES), "vectors": table().numpy(), **{text: np.array(f"a {text}") for text in TEXTS}}
    np.savez(path, **{name: value for name, value in (fields | changes).items() if value is not None})
    return str(path)


def test_a_table_file_is_read_at_unit_length(tmp_path):
    vectors, about = read_class_vectors(write_table(tmp_path / "t.npz", vectors=(7 * table()).numpy()))
    same(torch.from_numpy(vectors), table())
    assert about["names"] == NAMES and about["source"] == "a source" and about["words"]["asphalt"] == "road"


BAD = {
    "vectors lacking": {"vectors": None},
    "licence lacking": {"licence": None},
    "another number of rows": {"vectors": np.ones((5, WIDTH), np.float32)},
    "one row": {"vectors": np.ones(WIDTH, np.float32)},
    "whole numbers": {"vectors": np.ones((6, WIDTH), int)},
    "NaN": {"vectors": np.full((6, WIDTH), np.nan, np.float32)},
    "zero": {"vectors": np.zeros((6, WIDTH), np.float32)},
    "a name twice": {"names": np.array(["road", "road", "sky", "a", "b", "c"])},
    "an empty name": {"names": np.array(["", "road", "sky", "a", "b", "c"])},
    "names of bytes": {"names": np.array([b"road"] * 6)},
    "pickled names": {"names": np.array([{"a": 1}] * 6, object)},
    "a source of numbers": {"source": np.array(3)},
    "an empty source": {"source": np.array(" ")},
}


@pytest.mark.parametrize("changes", BAD.values(), ids=BAD)
def test_what_is_no_table_is_refused_in_one_line_that_names_the_file(changes, tmp_path):
    with pytest.raises(ValueError, match=r"t\.npz") as error:
        read_class_vectors(write_table(tmp_path / "t.npz", **changes))
    assert len(str(error.value)) <= 300 and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"no table"])
def test_files_of_another_kind_are_refused(content, tmp_path):
    (tmp_path / "t.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"t\.npz"):
        read_class_vectors(str(tmp_path / "t.npz"))
    np.save(tmp_path / "t.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"t\.npy"):
        read_class_vectors(str(tmp_path / "t.npy"))
    with pytest.raises(FileNotFoundError, match=r"clip_vit_b16$"):
        read_class_vectors("clip_vit_b32")


# ---- texts as vectors


def test_queries_and_targets_are_the_rows_of_the_texts():
    model = vector_model()
    rows = table()[:3]
    same(model.model.text_queries.encode(), rows * WIDTH**0.5)
    same(model.model.text_queries.encode_reference(), rows)
    centred = vector_model(centre_class_vectors=True).model.text_queries
    wanted = F.normalize(table() - table().mean(0), dim=-1)[:3]
    same(centred.encode_reference(), wanted)
    same(centred.encode(), wanted * WIDTH**0.5)


def test_losses_compare_with_the_given_vectors_and_train_all_but_them(images, labels):
    model = vector_model().train()
    outputs = model(images, labels=labels)
    same(outputs.losses["loss_textual"], textual_loss(outputs.text_embeddings, table()[:3]))
    outputs.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert "model.text_queries.text_vectors" not in dict(model.named_parameters())


def test_there_is_no_text_tower_and_no_row_per_class(folder):
    weights = load_file(folder / "model.safetensors")
    assert not any("text_tower" in name or "prompt" in name for name in weights)
    assert weights["model.text_queries.text_vectors"].shape == (6, WIDTH)
    assert weights["model.mask_decoder.query_positions"].shape == weights["model.pixel_decoder.text_positions"].shape
    assert len(weights["model.mask_decoder.query_positions"]) == 1
    fields = json.loads((folder / "config.json").read_text())
    assert fields["class_vectors"] == ABOUT and fields["token_ids"] is None
    model = LOAD(folder)
    before = sum(parameter.numel() for parameter in model.parameters())
    model.set_classes(dict(enumerate(NAMES)))
    assert sum(parameter.numel() for parameter in model.parameters()) == before


@pytest.mark.parametrize("head", ["linear", "cosine"])
@pytest.mark.parametrize("route", ROUTES)
def test_known_names_only_reorder(route, head, tmp_path, images):
    vector_model(class_head=head).save_pretrained(tmp_path / "trained")
    expected = LOAD(tmp_path / "trained").segment(images)[:, [2, 0, 1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = route(tmp_path / "trained", tmp_path)
    same(model.segment(images), expected)
    model.save_pretrained(tmp_path / "reloaded")
    same(LOAD(tmp_path / "reloaded").segment(images), expected)


NEW = {0: "stone", 1: "sky", 2: "forest", 3: "asphalt"}


def test_new_names_of_the_table_need_no_training_on_any_route(folder, tmp_path, images):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = LOAD(folder)
        model.set_classes(NEW)
        edited = json.loads((folder / "config.json").read_text()) | {"id2label": NEW}
        (folder / "config.json").write_text(json.dumps(edited))
        models = [LOAD(folder), LOAD(folder, id2label=NEW), AutoModelForSemanticSegmentation.from_pretrained(folder)]
        models.append(TqdmForSemanticSegmentation(TqdmConfig.from_pretrained(folder, id2label=NEW)))
        models[-1].load_state_dict(load_file(folder / "model.safetensors"))
    expected = model.segment(images)
    assert expected.shape[1] == 4
    for other in (*models, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same(other.eval().segment(images), expected)
        assert other.config.query_texts == ["stone", "sky", "tree", "road"] and other.config.id2label == NEW
        assert other.config.display_names == {"tree": "forest", "road": "asphalt"}


def test_a_linear_head_has_random_parts_for_new_names_and_says_so(images):
    model = vector_model(class_head="linear")
    with pytest.warns(UserWarning, match="stone"):
        model.set_classes(NEW)
    assert model.segment(images).shape[1] == 4


def test_names_without_a_vector_are_refused_with_the_nearest(folder):
    model = LOAD(folder)
    before = copy.deepcopy(model.config.to_dict())
    for act in (lambda n: model.set_classes(n), lambda n: LOAD(folder, id2label=n), lambda n: vector_model(id2label=n)):
        with pytest.raises(ValueError, match=r"'asphlt'.*'asphalt' \(for 'road'\)") as error:
            act({0: "asphlt", 1: "sky"})
        assert len(str(error.value)) <= 300
        with pytest.raises(ValueError, match=r"'road'.*'asphalt'"):
            act({0: "asphalt", 1: "road"})
    assert model.config.to_dict() == before


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"queries": "vectors"}, "class_vectors"),
        ({"queries": "vectors", "class_vectors": {"model": "x"}}, "class_vectors"),
        ({"queries": "vectors", "class_vectors": {"names": ["road", "road"]}}, "class_vectors"),
        ({"queries": "vectors", "class_vectors": {"names": ["road"]}}, "traffic light"),
        ({"queries": "vectors", "class_vectors": ABOUT, "frozen_texts": NAMES}, "frozen_texts"),
        ({"class_vectors": ABOUT}, "class_vectors"),
        ({"centre_class_vectors": True}, "centre_class_vectors"),
        ({"class_head": "cosin"}, "class_head"),
    ],
)
def test_fields_that_do_not_fit_are_refused_by_name(fields, words):
    with pytest.raises(ValueError, match=words):
        micro_model(**fields)


def test_a_model_with_a_tower_takes_vectors_and_drops_the_tower(images):
    model = micro_model(trained=True)
    model.use_class_vectors(table(), ABOUT)
    assert model.config.queries == "vectors" and not hasattr(model.model.text_queries, "text_tower")
    same(model.model.text_queries.encode_reference(), table()[:3])
    assert model.segment(images).shape[1] == 3
    before = model.config.to_dict()
    wrong = [(table()[:, :8], ABOUT, "width"), (table()[:2], {"names": ["a", "b"]}, "'road'"), (table(), {}, "names")]
    for vectors, about, words in wrong:
        with pytest.raises(ValueError, match=words):
            model.use_class_vectors(vectors, about)
    assert model.config.to_dict() == before


# ---- the head that compares


def test_class_logits_are_scaled_cosines(images):
    model = vector_model()
    head = model.model.mask_decoder.class_head
    queries = torch.randn(2, 3, 32)
    texts = torch.cat((table()[:3], head.no_object.detach()[None]))
    cosines = F.cosine_similarity(head.projection(queries)[:, :, None], texts[None, None], dim=-1)
    same(head(queries, model.model.text_queries.encode()), cosines / 0.07)
    head.log_scale.data.fill_(9)
    same(head(queries, model.model.text_queries.encode()), cosines * 100, 1e-3)


@pytest.mark.parametrize("centre", [False, True])
def test_fast_and_stored_texts_are_equal_and_fast_models_take_new_names(images, centre):
    model = vector_model(centre_class_vectors=centre)
    fast = copy.deepcopy(model).prepare_for_inference()
    for names in (model.config.id2label, NEW):
        model.set_classes(names)
        fast.set_classes(names)
        expected = model.segment(images)
        same(fast.segment(images), expected, 1e-4)
        with model.cache_texts():
            same(model.segment(images), expected)
    model.freeze_text()
    assert model.config.frozen_texts is None
    same(model.segment(images), expected)


def test_a_text_tower_encodes_new_names_until_it_is_dropped(images, tmp_path):
    model = micro_model(class_head="cosine", trained=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.set_classes({0: "mud", 1: "road", 2: "gravel", 3: "sky"})
    model.save_pretrained(tmp_path)
    expected = model.segment(images)
    same(LOAD(tmp_path).segment(images), expected)
    same(copy.deepcopy(model).prepare_for_inference().segment(images), expected, 1e-4)
    model.freeze_text()
    same(model.segment(images), expected)
    model.set_classes({0: "sky", 1: "mud"})
    with pytest.raises(ValueError, match="fog"):
        model.set_classes({0: "fog", 1: "mud"})


def test_random_queries_keep_a_vector_per_class(images):
    model = micro_model(class_head="cosine", queries="random", trained=True)
    with pytest.warns(UserWarning, match="mud"):
        model.set_classes({0: "mud", 1: "road"})
    assert model.segment(images).shape[1] == 2


def test_a_program_takes_new_names_of_open_models_and_says_the_ways_out_of_others():
    model = vector_model()
    set_class_names(model, ["forest", "road"])
    assert model.config.query_texts == ["tree", "road"]
    closed = micro_model(trained=True)
    set_class_names(closed, ["sky", "road"])
    assert closed.config.class_names == ["sky", "road"]
    with pytest.raises(ValueError, match=r"mud.*--class-head cosine") as error:
        set_class_names(closed, ["sky", "mud"])
    assert len(str(error.value)) <= 300 and closed.config.class_names == ["sky", "road"]


def test_the_configuration_survives_a_round_trip(tmp_path):
    config = micro_config(
        queries="vectors", class_vectors=ABOUT, class_head="cosine", id2label={0: "asphalt", 1: "sky"}
    )
    config.save_pretrained(tmp_path)
    assert TqdmConfig.from_pretrained(tmp_path).to_dict() | {"trained": False} == config.to_dict()
    assert config.query_texts == ["road", "sky"] and config.display_names == {"road": "asphalt"}


# ---- programs


@pytest.fixture
def saved(tmp_path):
    """A model folder as training leaves it, and an image."""
    save_model_folder(vector_model(), TqdmImageProcessor(), tmp_path / "model")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(tmp_path / "photo.png")
    return tmp_path


def test_predict_decides_between_names_given_at_run_time(saved):
    model = LOAD(saved / "model")
    model.set_classes(NEW)
    image = Image.open(saved / "photo.png")
    pixel_values = TqdmImageProcessor()(images=image, return_tensors="pt")["pixel_values"]
    arguments = {"model": str(saved / "model"), "inputs": saved / "photo.png"}
    for only in (None, ["stone", "forest"]):
        found = tqdm_seg.predict(**arguments, out=saved / str(only), class_names=[*NEW.values()], only=only)
        assert list(found["photo"]["areas"]) == (only or [*NEW.values()])
        ids = np.asarray(Image.open(saved / str(only) / "ids" / "photo.png"))
        scores = model.segment(pixel_values)[0].clone()
        scores[[i for i, name in NEW.items() if only and name not in only]] = -1
        assert (ids == scores.argmax(0).numpy()).mean() > 0.999
    for more, words in (({"class_names": ["moose", "sky"]}, "moose"), ({"check": True}, "--check"),
                        ({"backend": "onnxruntime"}, "--class-names")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            tqdm_seg.predict(**arguments, out=saved / "refused", **{"class_names": ["sky", "road"], **more})
    assert not (saved / "refused").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_exports_compute_what_the_model_does(saved):
    facts = export(model=str(saved / "model"), out=saved / "export", format=["onnx"])
    assert {*facts["checks"]} == {"window.onnx"}  # compared, else it raises
    with pytest.raises(ValueError, match="no class 'stone'"):
        arguments = {"model": str(saved / "export"), "inputs": saved / "photo.png", "backend": "onnxruntime"}
        tqdm_seg.predict(**arguments, out=saved / "out", only=["stone", "sky"])


# ---- what real language does: a name of the same meaning keeps its mask

SCENE = ["road", "rock", "tree", "hill", "sky-other", "water-other", "grass", "person"]


def scenes(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 3, 32, 32) of 4 x 4 cells, each with the colour of its class and noise, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    colours = 1.2 * torch.randn(len(SCENE), 3, generator=torch.Generator().manual_seed(5))
    labels = torch.randint(0, len(SCENE), (count, 4, 4), generator=generator)
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)
    noise = torch.randn(count, 32, 32, 3, generator=generator)
    return (colours[labels] + 0.3 * noise).permute(0, 3, 1, 2).contiguous(), labels


@pytest.fixture(scope="module")
def scene_model() -> TqdmForSemanticSegmentation:
    """A micro model that has learned the scenes with genuine texts of CLIP."""
    vectors, about = read_class_vectors("clip_vit_b16")
    width = dict.fromkeys(("vision_config", "text_config"), {"projection_dim": 512})
    fields = {"class_vectors": about, "queries": "vectors", "class_head": "cosine", "centre_class_vectors": True}
    model = micro_model(id2label=dict(enumerate(SCENE)), **fields, **width)
    model.use_class_vectors(torch.from_numpy(vectors), about, centre=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for step in range(STEPS):
        images, labels = scenes(8, step)
        model(images, labels=labels, output_logits=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "kept"),
    [("rock", "stone", True), ("hill", "mountain", True), ("rock", "tie", False), ("hill", "toothbrush", False)],
)
def test_a_synonym_keeps_most_of_its_mask_and_an_unrelated_name_does_not(scene_model, old, new, kept):
    images, labels = scenes(16, 10_000)
    model = copy.deepcopy(scene_model)
    before = model.segment(images).argmax(1)
    assert (before == labels).float().mean() > 0.9
    row = SCENE.index(old)
    model.set_classes({i: new if i == row else name for i, name in enumerate(SCENE)})
    after = model.segment(images).argmax(1)
    share = (after[before == row] == row).float().mean().item()
    assert share > 0.8 if kept else share < 0.2
    assert (after == before)[before != row].float().mean() > 0.95
