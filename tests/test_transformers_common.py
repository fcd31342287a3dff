"""What transformers' own common tests ask of a model, and the ways in which its users load, copy and train one."""

import copy
import pickle

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from conftest import micro_config, micro_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrize, prune
from transformers import Trainer, TrainingArguments

from tqdm_seg.configuration_tqdm import TqdmConfig, TqdmTextConfig, TqdmVisionConfig
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation, TqdmModel

BLOCKS, TOKENS, WIDTH, HEADS = 4, 17, 32, 2
LOAD = TqdmForSemanticSegmentation.from_pretrained


def same(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


# ---- hidden states and attentions


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("base", [False, True])
def test_hidden_states_and_attentions_on_request(model, images, attention, base):
    model.set_attn_implementation(attention)
    part = model.model if base else model
    with torch.no_grad():
        plain = part(images)
        outputs = part(images, output_hidden_states=True, output_attentions=True)
    assert plain.hidden_states is None and plain.attentions is None
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(2, TOKENS, WIDTH)] * (BLOCKS + 1)
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, HEADS, TOKENS, TOKENS)] * BLOCKS
    for weights in outputs.attentions:
        same(weights.sum(-1), torch.ones(2, HEADS, TOKENS))
    same(outputs.mask_logits, plain.mask_logits, 1e-4)
    tokens = outputs.hidden_states[-1][:, 0]
    tower = model.model.vision_tower
    same(tower.projection(tower.post_norm(tokens)), outputs.image_embedding)


def test_the_configuration_asks_for_them_too(images, tmp_path):
    micro_model().save_pretrained(tmp_path)
    model = LOAD(tmp_path, output_hidden_states=True, output_attentions=True, attn_implementation="eager")
    outputs = model(images)
    assert len(outputs.hidden_states) == BLOCKS + 1 and len(outputs.attentions) == BLOCKS
    assert model(images, return_dict=False)[-1][0].shape == (2, HEADS, TOKENS, TOKENS)


def test_gradients_reach_what_is_recorded(model, images):
    outputs = model.train()(images, output_hidden_states=True, output_attentions=True)
    first, weights = outputs.hidden_states[0], outputs.attentions[0]
    first.retain_grad(), weights.retain_grad()
    outputs.logits.flatten()[0].backward()
    assert first.grad is not None and weights.grad is not None


def test_nothing_is_recorded_unless_asked(model, images):
    model(images)
    assert not any(module._forward_hooks for module in model.modules())


def test_windows_have_no_hidden_states(model, images):
    with pytest.raises(ValueError, match="use_windows=False"):
        model(images.repeat(1, 1, 2, 2), output_hidden_states=True)


# ---- the same, however it is made, copied and asked


def test_outputs_as_tuple_and_as_fields_are_the_same(model, images, labels):
    for kwargs in ({}, {"output_hidden_states": True}):
        fields = model(images, **kwargs)
        values = model(images, return_dict=False, **kwargs)
        assert len(values) == len(fields.to_tuple())
        same(values[0], fields.logits)
    model.config.return_dict = False
    assert isinstance(model(images), tuple) and isinstance(model.model(images), tuple)
    torch.manual_seed(0)
    assert model(images, labels=labels)[0].isfinite()
    assert model.segment(images).shape == (2, 3, 32, 32)


def test_two_calls_are_bit_equal(model, images):
    assert torch.equal(model(images).logits, model(images).logits)


def test_copies_are_the_model(model, images):
    expected = model.segment(images)
    pickled, fast = (pickle.loads(pickle.dumps(model)) for _ in range(2))
    model(images, output_hidden_states=True)
    for copied in (copy.deepcopy(model), pickled):
        assert torch.equal(copied.segment(images), expected)
        assert len(copied(images, output_hidden_states=True).hidden_states) == BLOCKS + 1
    fast.prepare_for_inference()
    expected = fast.segment(images)
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(copied.segment(images), expected)


def test_token_ids_are_made_once_per_device_and_class_list(model, images, labels):
    queries, cpu = model.model.text_queries, torch.device("cpu")
    model.segment(images)  # in inference mode
    ids = queries._indices("token_ids", cpu)
    assert ids.tolist() == queries.token_ids and not ids.is_inference()
    model.train()(images, labels=labels).loss.backward()
    assert queries._indices("token_ids", cpu) is ids and queries._indices("token_ids", torch.device("meta")).is_meta
    with FakeTensorMode():
        assert queries._indices("reference_token_ids", cpu).shape[0] == 3
    assert queries._indices("reference_token_ids", cpu).tolist() == queries.reference_token_ids
    copied = copy.deepcopy(model)
    model.set_classes({0: "sky"})
    assert (
        len(queries._indices("token_ids", cpu)) == 1
        and copied.model.text_queries._indices("token_ids", cpu).tolist() == ids.tolist()
    )


def test_in_double_precision(model, images, labels):
    expected = model.segment(images)
    model.double()
    for score in (model.segment(images), model.segment(images.double())):
        same(score.float(), expected, 1e-3)
    model.segment_labels(images.repeat(1, 1, 2, 2).double())
    same(copy.deepcopy(model).prepare_for_inference().segment(images.double()).float(), expected, 1e-3)
    model.train()(images.double(), labels=labels).loss.backward()


def test_no_key_is_missing_and_the_base_model_loads_from_the_head(model, images, tmp_path):
    model.save_pretrained(tmp_path)
    for kind in (TqdmForSemanticSegmentation, TqdmModel):
        loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.no_grad():
            same(loaded(images).mask_logits[:, -1], model(images).mask_logits[:, -1])


def test_meta_device_then_weights(model, images, tmp_path):
    model.config.trained = True
    model.save_pretrained(tmp_path)
    expected = model.segment(images)
    for buffers in (False, True):
        with init_empty_weights(include_buffers=buffers):
            empty = TqdmForSemanticSegmentation(TqdmConfig.from_pretrained(tmp_path))
        loaded = load_checkpoint_and_dispatch(empty, str(tmp_path / "model.safetensors"), device_map={"": "cpu"}).eval()
        same(loaded.segment(images), expected)
    with torch.device("meta"):
        empty = TqdmForSemanticSegmentation(TqdmConfig.from_pretrained(tmp_path))
    empty.to_empty(device="cpu").load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    same(empty.eval().segment(images), expected)
    same(LOAD(tmp_path, device_map="cpu").segment(images), expected)


def test_every_buffer_is_saved(model):
    """What is not in the weights has to be derived: fresh memory holds anything."""
    assert {name for name, _ in model.named_buffers()} <= model.state_dict().keys()


# ---- what comes in


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_type(model, images, labels, dtype):
    labels = labels.masked_fill(labels == 255, 0)
    losses = []
    for kind in (dtype, torch.int64):
        torch.manual_seed(0)
        losses.append(model(images, labels=labels.to(kind)).loss)
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(2, 32, 32), torch.zeros(2, 32, 32, dtype=torch.bool), [[0]], torch.zeros(2, 9, 9, dtype=torch.int)]
)  # fmt: skip
def test_other_labels_are_refused_by_name(model, images, wrong):
    with pytest.raises(ValueError, match="labels"):
        model(images, labels=wrong)


WRONG_IMAGES = {
    "none": None, "a list": [[0.0]], "an array": torch.zeros(1, 3, 32, 32).numpy(),
    "three dimensions": torch.zeros(3, 32, 32),
    "four channels": torch.zeros(1, 4, 32, 32), "bytes": torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
    "integers": torch.zeros(1, 3, 32, 32, dtype=torch.int64), "empty": torch.zeros(0, 3, 32, 32),
    "no pixel": torch.zeros(1, 3, 0, 32), "nan": torch.full((1, 3, 32, 32), torch.nan),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_IMAGES.values(), ids=WRONG_IMAGES)
def test_what_is_no_batch_of_images_is_refused_by_name(wrong):
    model = micro_model()
    for act in (
        model,
        model.model,
        model.segment,
        model.segment_labels,
        lambda x: model.segment([torch.zeros(1, 3, 32, 32), x]),
    ):
        with pytest.raises(ValueError, match="pixel_values must be") as error:
            act(wrong)
        assert len(str(error.value)) <= 300 and "\n" not in str(error.value)


@pytest.mark.parametrize("size", [(0, 3), (3,), (2.5, 3), (-1, 4)])
def test_other_arguments_of_segment_are_refused_by_name(size, images):
    model = micro_model()
    with pytest.raises(ValueError, match="size"):
        model.segment(images, size)
    with pytest.raises(ValueError, match="empty list"):
        model.segment([])
    with pytest.raises(ValueError, match="same images"):
        model.segment([images, images[:1]])


# ---- fields of the configuration


def fields(config_class, part):
    whole = [
        name for name, field in config_class.__dataclass_fields__.items() if field.type in (int, float, float | int)
    ]
    inherited = {"chunk_size_feed_forward", "ignore_index", "num_prompt_tokens", "window_stride"}
    may_be_zero = ("weight", "dropout", "drop_path_rate", "ratio")
    for name in whole:
        for value in (0, -1, float("nan"), "x" * 2000):
            zero = value == 0 and (name.endswith(may_be_zero) and name not in ("no_object_weight", "oversample_ratio"))
            if name not in inherited and not zero:
                yield pytest.param(part, name, value, id=f"{name} {str(value)[:4]}")


CASES = [
    *fields(TqdmConfig, None), *fields(TqdmVisionConfig, "vision_config"), *fields(TqdmTextConfig, "text_config"),
    *[(part, "hidden_act", "wurst") for part in ("vision_config", "text_config")],
    *[("text_config", name, value) for name in ("bos_token_id", "eos_token_id") for value in (-1, 10**6, None)],
    ("vision_config", "feature_layers", list(range(500))), ("vision_config", "hiden_size", 3),
    (None, "window_size", 1), (None, "window_stride", 0), (None, "window_stride", 99), (None, "window_batch_size", 0),
    (None, "windw_size", 64), (None, "ignore_index", 1), (None, "reference_prompt", "x" * 2000),
    (None, "id2label", ["road"]), (None, "token_ids", {"road": [10**6]}),
]  # fmt: skip


@pytest.mark.parametrize(("part", "name", "value"), CASES)
def test_a_wrong_value_is_refused_by_its_field(part, name, value):
    with pytest.raises(ValueError, match=name) as error:
        micro_config(**({name: value} if part is None else {part: {name: value}}))
    assert len(str(error.value)) <= 300 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [{"window_stride": 0}, {"window_stride": 99}, {"window_size": -5}, {"window_batch_size": 0}, {"hidden_size": 33}]
)  # fmt: skip
def test_a_wrong_value_is_refused_on_every_route(changes, tmp_path, images):
    micro_model().save_pretrained(tmp_path)
    ((name, value),) = changes.items()
    config, model = TqdmConfig.from_pretrained(tmp_path), LOAD(tmp_path)
    setattr(config, name, value)
    setattr(model.config, name, value)
    for route in (
        lambda: LOAD(tmp_path, **changes), lambda: TqdmConfig.from_pretrained(tmp_path, **changes),
        lambda: LOAD(tmp_path, config=config), lambda: TqdmForSemanticSegmentation(config),
        lambda: config.save_pretrained(tmp_path / "x"), lambda: model.save_pretrained(tmp_path / "x"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            route()
    if name.startswith("window"):
        with pytest.raises(ValueError, match=name):
            model.segment(images.repeat(1, 1, 2, 2))


def test_as_many_classes_as_bytes_need_another_ignore_index():
    names = {i: f"thing {i}" for i in range(256)}
    with pytest.raises(ValueError, match="ignore_index 255"):
        micro_config(id2label=names)
    assert micro_config(id2label=names, ignore_index=-100).num_labels == 256


# ---- fast layers


def with_lora(model):
    get_peft_model(model, LoraConfig(r=2, target_modules=["fc1"]))


def with_a_hook(model):
    model.model.pixel_decoder.mask_features.register_forward_hook(lambda *_: None)


def with_weight_norm(model):
    nn.utils.parametrizations.weight_norm(model.model.mask_decoder.mask_head[-1])


def with_a_parametrisation(model):
    parametrize.register_parametrization(model.model.vision_tower.pyramid.up2, "weight", nn.Identity())


def with_masks(model):
    prune.l1_unstructured(model.model.vision_tower.blocks[0].ffn.fc1, "weight", 0.5)


def with_another_forward(model):
    layer = model.model.mask_decoder.mask_head[0]
    layer.forward = lambda x, forward=layer.forward: forward(x) * 2


def quantised(model):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model.model.vision_tower.blocks, torchao.Int8DynamicActivationInt8WeightConfig())


@pytest.mark.parametrize(
    "change",
    [with_lora, with_a_hook, with_weight_norm, with_a_parametrisation, with_masks, with_another_forward, quantised],
)
def test_fast_layers_refuse_what_they_cannot_fold_and_touch_nothing(change, images):
    model = micro_model()
    change(model)
    model.eval()
    expected = model.segment(images)
    kinds, keys = [type(module) for module in model.modules()], list(model.state_dict())
    with pytest.raises(ValueError, match=r"plain layers, and model\S* has"):
        model.prepare_for_inference()
    assert [type(module) for module in model.modules()] == kinds and list(model.state_dict()) == keys
    assert model.config.frozen_texts is None and not model.is_fast
    assert torch.equal(model.segment(images), expected)


def test_recorded_hidden_states_do_not_hinder_fast_layers(images):
    model = micro_model()
    expected = model(images, output_hidden_states=True).logits
    same(model.prepare_for_inference()(images).logits, expected, 1e-4)


# ---- transformers.Trainer


@pytest.mark.slow
def test_the_trainer_trains_evaluates_predicts_saves_and_loads(images, labels, tmp_path):
    def compute_metrics(predictions):
        logits, truth = predictions
        return {"accuracy": float((logits.argmax(1) == truth)[truth != 255].mean())}

    micro_model().save_pretrained(tmp_path / "start")
    names = {0: "track", 1: "grass", 2: "sky"}
    model = LOAD(tmp_path / "start", id2label=names, label2id={name: i for i, name in names.items()})
    rows = [{"pixel_values": images[i % 2], "labels": labels[i % 2].to(torch.uint8)} for i in range(4)]
    arguments = TrainingArguments(
        tmp_path / "run", per_device_train_batch_size=2, per_device_eval_batch_size=2, max_steps=4, save_steps=2,
        eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, report_to=[], use_cpu=True,
        learning_rate=1e-3,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=compute_metrics)
    trainer.train()
    assert {"eval_loss", "eval_accuracy"} <= trainer.evaluate().keys()
    predictions = trainer.predict(rows)
    assert predictions.predictions.shape == (4, 3, 32, 32)
    trainer.save_model(tmp_path / "saved")
    loaded = LOAD(tmp_path / "saved")
    assert loaded.config.trained and loaded.config.class_names == list(names.values())
    same(
        loaded.segment(torch.stack([row["pixel_values"] for row in rows])), torch.tensor(predictions.predictions), 1e-4
    )
