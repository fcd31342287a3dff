"""What users of transformers expect of any model, and what is special about this one."""

import copy
import sys
import types

import pytest
import torch
from conftest import micro_config, micro_model
from safetensors.torch import load_file, save_file
from torch import nn

from tqdm_seg.configuration_tqdm import TqdmConfig
from tqdm_seg.layers_tqdm import FeedForward
from tqdm_seg.loss_tqdm import supervised_masks
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation
from tqdm_seg.training.teacher import Teacher
from tqdm_seg.windows_tqdm import window_corners


def same(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


def step(model, images, labels, **kwargs):
    """Loss and gradients of one training step with fixed random points."""
    model.zero_grad()
    torch.manual_seed(0)
    loss = model(images, labels=labels, **kwargs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# ---- outputs


def test_outputs_have_the_documented_shapes(model, images, labels):
    outputs = model(images, labels=labels, **Teacher(model)(images))
    assert outputs.logits.shape == (2, 3, 32, 32) and outputs.class_logits.shape == (2, 3, 3, 4)
    assert outputs.mask_logits.shape == (2, 3, 3, 16, 16) and outputs.score_map.shape == (2, 3, 4, 4)
    assert outputs.text_embeddings.shape == (2, 3, 16) and outputs.image_embedding.shape == (2, 16)
    layered = {f"loss_{kind}{layer}" for kind in ("class", "mask", "dice") for layer in ("", "_0", "_1")}
    assert outputs.losses.keys() == layered | {"loss_textual", "loss_visual", "loss_score_map"}
    same(outputs.loss, sum(outputs.losses.values()))


def test_tuple_output_keeps_its_order(model, images, labels):
    outputs = model(images, return_dict=False)
    same(outputs[0], model(images).logits)
    assert isinstance(outputs, tuple) and model(images, labels=labels, return_dict=False)[0].dim() == 0


def test_a_batch_of_two_is_two_batches(model, images):
    with torch.no_grad():
        both = model(images)
        for i in (0, 1):
            one = model(images[i : i + 1])
            same(both.logits[i], one.logits[0])
            same(both.mask_logits[i], one.mask_logits[0], 1e-4)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (16, 64), (61, 17)])
def test_any_size_of_crop(model, size):
    labels = torch.zeros(1, *size, dtype=torch.long)
    outputs = model(torch.randn(1, 3, *size), labels=labels)
    assert outputs.logits.shape == (1, 3, *size) and outputs.loss.isfinite()


def test_an_image_under_two_patches_says_what_to_do(model):
    with pytest.raises(ValueError, match="enlarge the image to at least 16x16"):
        model(torch.randn(1, 3, 7, 40))


def test_eva02_positions_are_relative_to_the_image():
    """Rotary positions of any grid span the same range, so a constant image looks the same at every size."""
    tower = micro_model("eva02").model.vision_tower
    small, large = tower.rotary(4, 4), tower.rotary(8, 8)
    same(small[0].view(4, 4, -1), large[0].view(8, 8, -1)[::2, ::2])
    nn.init.constant_(tower.position_embedding, 0.3)
    assert tower.positions(6, 9).shape == (55, 32)
    same(tower.positions(6, 9), torch.full((55, 32), 0.3))


def test_class_embedding_is_added_twice_unless_told_otherwise(images):
    twice, once = micro_model(), micro_model(vision_config={"class_embedding_twice": False})
    once.load_state_dict(twice.state_dict())
    doubled = copy.deepcopy(once)
    doubled.model.vision_tower.class_embedding.data *= 2
    with torch.no_grad():
        same(twice(images).logits, doubled(images).logits)
        assert (twice(images).image_embedding - once(images).image_embedding).abs().max() > 1e-3


# ---- classes


@pytest.mark.parametrize("names", [["road", "other"], ["only one"], [f"thing {i}" for i in range(30)]])
def test_the_class_list_alone_sets_every_size(names, images):
    model = micro_model(id2label=dict(enumerate(names)))
    labels = torch.randint(0, len(names), (2, 32, 32))
    outputs = model(images, labels=labels)
    assert outputs.class_logits.shape[-2:] == (len(names), len(names) + 1) and outputs.logits.shape[1] == len(names)
    outputs.loss.backward()
    assert outputs.loss.isfinite()


def test_a_new_class_list_keeps_what_known_names_have_learned(model, images):
    before = copy.deepcopy(model)
    with torch.no_grad():
        model.set_classes({0: "gravel", 1: "sky", 2: "road", 3: "mud"})
        outputs = model(images)
    assert model.config.class_names == ["gravel", "sky", "road", "mud"] and outputs.logits.shape[1] == 4
    ours, old = model.model.mask_decoder.query_positions, before.model.mask_decoder.query_positions
    assert torch.equal(ours[1:3], old[[2, 0]]) and 0.5 < ours[0].std() < 2
    head, old = model.model.mask_decoder.class_head, before.model.mask_decoder.class_head
    same(head.weight[[1, 2, 4]], old.weight[[2, 0, 3]])  # the last row is no object
    same(model.model.text_queries.encode()[1:3], before.model.text_queries.encode()[[2, 0]])


def test_a_class_list_edited_in_the_configuration_before_building_is_used():
    config = micro_config()
    config.id2label = {0: "mud", 1: "road"}
    model = TqdmForSemanticSegmentation(config)
    assert model.model.text_queries.token_ids[1][:3] == [49406, 1759, 49407]
    assert model.model.mask_decoder.class_head.out_features == 3


def test_a_name_too_long_for_the_position_table_is_refused():
    with pytest.raises(ValueError, match="'a long name for a traffic sign' needs 9 .* 5 are left"):
        micro_model(
            id2label={0: "a long name for a traffic sign"},
            text_config={"max_position_embeddings": 10, "num_prompt_tokens": 5},
        )


def test_padding_of_texts_changes_nothing(model):
    queries = model.model.text_queries
    ids = torch.tensor(queries.token_ids)
    with torch.no_grad():
        longer = queries.text_tower(torch.nn.functional.pad(ids, (0, 7)), queries.prompt.weight)
        same(longer, queries.encode())


# ---- losses in training


def test_an_image_without_a_labelled_pixel_trains(model, images, labels):
    for ignored in (labels.clone().index_fill_(0, torch.tensor([1]), 255), torch.full_like(labels, 255)):
        loss, gradients = step(model.train(), images, ignored)
        assert loss.isfinite() and all(g.isfinite().all() for g in gradients.values())


def test_only_the_text_tower_has_no_gradient(model, images, labels):
    _, gradients = step(model, images, labels)
    without = {name for name, _ in model.named_parameters()} - gradients.keys()
    assert without == {n for n, _ in model.named_parameters() if n.startswith("model.text_queries.text_tower.")}


def test_mask_index_from_the_loader_changes_nothing(model, images, labels):
    index = supervised_masks(labels, 3)
    assert step(model, images, labels)[0] == step(model, images, labels, mask_index=index)[0]


def test_the_reference_stays_in_eval_mode_unless_asked(images):
    model = micro_model(vision_config={"drop_path_rate": 0.9}).train()
    steady, drifting = Teacher(model), Teacher(model, drop_path=True)
    key = "reference_image_embedding"
    for reference in (steady, drifting):
        reference.train()
    assert torch.equal(steady(images)[key], steady(images)[key])
    assert any(not torch.equal(drifting(images)[key], steady(images)[key]) for _ in range(5))
    drifting.eval()
    same(drifting(images)[key], steady(images)[key])
    assert not any(p.requires_grad for p in steady.parameters())


def test_the_reference_sees_the_same_as_the_tower_and_stays_behind(model, images, labels):
    reference = Teacher(model)
    same(reference(images)["reference_image_embedding"], model(images).image_embedding)
    with torch.no_grad():
        model.model.vision_tower.class_embedding += 1
    outputs = model(images, labels=labels, **reference(images))
    assert outputs.losses["loss_visual"] > 0
    assert not any("reference" in name for name in model.state_dict())


def test_the_loss_is_not_summed_over_accumulated_batches(images, labels, tmp_path):
    """transformers' Trainer divides by the accumulation steps only for models that do not claim to do so themselves."""
    from transformers import Trainer, TrainingArguments

    model = micro_model().train()
    rows = [{"pixel_values": images[0], "labels": labels[0]}] * 4
    once = model(images[:1], labels=labels[:1]).loss.item()
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=1, logging_steps=1,
        learning_rate=0.0, report_to=[], use_cpu=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([once], rel=0.2)


# ---- saving and loading


def test_round_trip_is_bit_equal_and_safetensors(model, images, tmp_path):
    model.save_pretrained(tmp_path)
    # The code comes along where a test before this one has published a model; that is what transformers remembers.
    data = {file.name for file in tmp_path.iterdir() if file.suffix != ".py"}
    assert data == {"config.json", "model.safetensors"}
    loaded = TqdmForSemanticSegmentation.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, model(images).logits)


def test_loading_on_the_meta_device_restores_what_is_not_saved(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = TqdmForSemanticSegmentation.from_pretrained(tmp_path)
    own = dict(model.named_buffers())
    assert {name for name, _ in loaded.named_buffers()} == own.keys()
    assert all(torch.equal(value, own[name]) for name, value in loaded.named_buffers())
    assert not {n for n, _ in loaded.named_parameters() if "text_tower" in n} & {
        n for n, p in loaded.named_parameters() if p.requires_grad
    }
    assert all(p.requires_grad for n, p in loaded.named_parameters() if "text_tower" not in n)
    assert not any(t.is_meta for t in [*loaded.parameters(), *loaded.buffers()])


def test_nothing_is_computed_on_real_memory_in_the_constructor():
    with torch.device("meta"):
        model = TqdmForSemanticSegmentation(micro_config("eva02"))
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])


def check_initialised(model: TqdmForSemanticSegmentation) -> None:
    """The initialisation rules have run, those of modules without parameters of their own included."""
    deformable = model.model.pixel_decoder.layers[0].deformable
    assert not deformable.sampling_offsets.weight.any() and not deformable.attention_weights.weight.any()
    offsets = deformable.sampling_offsets.bias.view(2, 3, 4, 2)  # heads, levels, points, x y
    assert offsets[0, 0].tolist() == [[1, 0], [2, 0], [3, 0], [4, 0]]
    assert offsets[1, 2, 1].tolist() == pytest.approx([-2, 0], abs=1e-5)
    bound = (6 / (4 * 32)) ** 0.5  # Xavier over the stacked projection of three
    weight = model.model.mask_decoder.layers[1].cross_attention.q_proj.weight
    assert 0.9 * bound < weight.abs().max() <= bound
    assert (
        0.5 < model.model.text_queries.prompt.weight.std() < 1.2
        and model.model.text_queries.prompt.weight.abs().max() <= 2
    )
    block = model.model.vision_tower.blocks[0]
    if isinstance(block.ffn, FeedForward):
        assert block.ffn.fc1.weight.std().item() == pytest.approx((2 * 32) ** -0.5, rel=0.1)
        assert not block.ffn.fc1.bias.any()


@pytest.mark.parametrize("tower", ["clip", "eva02"])
def test_initialisation_runs_from_scratch(tower):
    check_initialised(micro_model(tower))


def test_initialisation_runs_for_what_a_checkpoint_lacks(model, tmp_path):
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    gone = ("deformable", "cross_attention", "text_queries.prompt", "text_queries.gamma", "vision_tower.blocks.0.ffn")
    state = load_file(file)
    kept = {key: value for key, value in state.items() if not any(part in key for part in gone)}
    assert 0 < len(kept) < len(state)
    save_file(kept, file, metadata={"format": "pt"})
    loaded = TqdmForSemanticSegmentation.from_pretrained(tmp_path)
    check_initialised(loaded)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in kept.items())


def test_initialisation_spares_loaded_weights(model, tmp_path):
    """A rule of a parent module must not touch the loaded weights of its children."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.123)
    model.save_pretrained(tmp_path)
    loaded = TqdmForSemanticSegmentation.from_pretrained(tmp_path)
    assert all((parameter == 0.123).all() for parameter in loaded.parameters())


def test_weights_may_lie_on_disk(model, images, tmp_path):
    model.save_pretrained(tmp_path)
    device_map = {
        "model.vision_tower": "cpu", "model.text_queries": "disk", "model.pixel_decoder": "disk",
        "model.mask_decoder": "disk",
    }  # fmt: skip
    loaded = TqdmForSemanticSegmentation.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "o")
    assert next(loaded.model.pixel_decoder.parameters()).is_meta
    large = images.repeat(1, 1, 1, 2)  # by windows, too
    with torch.no_grad():
        same(loaded(images).logits, model(images).logits)
        same(loaded(large).logits, model(large).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_and_finite(model, images, dtype, tmp_path):
    model.save_pretrained(tmp_path)
    half = TqdmForSemanticSegmentation.from_pretrained(tmp_path, dtype=dtype)
    with torch.no_grad():
        ours, full = half(images.to(dtype)), model(images)
    assert ours.logits.dtype == dtype and ours.logits.isfinite().all()
    for name, bound in (("logits", 0.05), ("image_embedding", 0.1)):
        assert (ours[name].float() - full[name]).abs().max() < bound, name


def test_half_precision_trains(model, images, labels):
    loss, gradients = step(model.to(torch.bfloat16).train(), images.bfloat16(), labels)
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients.values())


# ---- the same numbers another way


def test_eager_is_sdpa(model, images, labels):
    assert model.config._attn_implementation == "sdpa"
    sdpa = model(images)
    model.set_attn_implementation("eager")
    assert model.model.vision_tower.config._attn_implementation == "eager"
    assert model.model.text_queries.text_tower.config._attn_implementation == "eager"
    eager = model(images)
    same(sdpa.logits, eager.logits)
    same(sdpa.mask_logits, eager.mask_logits, 1e-4)


def test_attention_can_differ_between_parts(tmp_path, images):
    micro_model().save_pretrained(tmp_path)
    model = TqdmForSemanticSegmentation.from_pretrained(
        tmp_path, attn_implementation={"": "eager", "vision_config": "sdpa", "text_config": "eager"}
    )
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == model.config.text_config._attn_implementation == "eager"


def test_flash_attention_is_claimed_only_where_there_are_no_masks(model):
    assert model.model.vision_tower._supports_flash_attn
    assert not model._supports_flash_attn and not model.model.text_queries.text_tower._supports_flash_attn


def test_xformers_attention_gets_what_its_operator_wants(model, images, monkeypatch):
    """The operator needs a GPU; a stand-in with its layout and its demand on the bias shows that the call is right."""

    def operator(query, key, value, attn_bias=None, scale=None):
        if attn_bias is not None:
            assert attn_bias.shape == (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
            assert attn_bias.stride(-2) % 8 == 0  # its storage is read in steps of eight
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        output = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, scale=scale)
        return output.transpose(1, 2)

    expected = model(images).logits
    model.set_attn_implementation("xformers")
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(ImportError, match="pip install xformers"):
        model(images)
    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = operator
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    same(model(images).logits, expected)


def test_gradient_checkpointing_changes_nothing(model, images, labels):
    loss, gradients = step(model.train(), images, labels)
    model.load_state_dict({**model.state_dict()})
    calls = []
    model.gradient_checkpointing_enable()
    function = model.model.vision_tower.blocks[0]._gradient_checkpointing_func
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = lambda *args, **kwargs: (
                calls.append(torch.is_grad_enabled()) or function(*args, **kwargs)
            )
    again, checkpointed = step(model, images, labels)
    # Four vision, one text (frozen, but its prompt learns), one pixel decoder and two mask decoder layers. Before 5.24
    # transformers also counts the text tower for the reference texts, which has nothing to keep.
    assert calls.count(True) == 8
    same(loss, again)
    assert gradients.keys() == checkpointed.keys()
    for name in gradients:
        same(gradients[name], checkpointed[name], 1e-4)


@pytest.mark.parametrize("tower", ["clip", "eva02"])
@pytest.mark.slow
def test_compiled_forward_is_eager_without_graph_breaks(tower, images, labels):
    model = micro_model(tower)
    index = supervised_masks(labels, 3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        same(compiled(images).logits, model(images).logits)
    torch.manual_seed(0)
    loss = model(images, labels=labels, mask_index=index).loss
    torch.manual_seed(0)
    same(compiled(images, labels=labels, mask_index=index).loss, loss, 1e-4)


# ---- windows


def test_window_corners_cover_the_image_and_stay_inside():
    assert window_corners(1024, 2048, 512, 341) == [
        (y, x) for y in (0, 341, 512) for x in (0, 341, 682, 1023, 1364, 1536)
    ]
    assert window_corners(300, 512, 512, 341) == [(0, 0)]
    assert window_corners(100, 900, 512, 341) == [(0, 0), (0, 341), (0, 388)]


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_windows_are_the_average_of_single_passes(model, batch):
    model.config.window_batch_size = batch
    image = torch.randn(2, 3, 40, 70)
    total, hits = torch.zeros(2, 3, 40, 70), torch.zeros(40, 70)
    with torch.no_grad():
        for y, x in window_corners(40, 70, 32, 20):
            total[..., y : y + 32, x : x + 32] += model(image[..., y : y + 32, x : x + 32]).logits
            hits[y : y + 32, x : x + 32] += 1
    same(model.segment(image), total / hits)
    with torch.no_grad():
        outputs = model(image)
    same(outputs.logits, total / hits)
    assert outputs.to_tuple() == (outputs.logits,)


def test_texts_are_encoded_once_for_all_windows(model, monkeypatch):
    calls = []
    tower = model.model.text_queries.text_tower
    tower.register_forward_hook(lambda *_: calls.append(1))
    model.segment(torch.randn(1, 3, 64, 90))
    assert len(calls) == 1


def test_windows_are_off_for_small_images_for_training_and_on_request(model, labels):
    large = torch.randn(1, 3, 48, 48)
    assert model(torch.randn(1, 3, 32, 20)).mask_logits is not None
    assert model(large).mask_logits is None
    assert model(large, use_windows=False).mask_logits is not None
    assert model(large, labels=torch.zeros(1, 48, 48, dtype=torch.long)).mask_logits is not None
    model.config.window_size = None
    assert model(large).mask_logits is not None


def test_segment_resizes_and_averages_views(model):
    image = torch.randn(1, 3, 32, 48)
    scores = model.segment(image, size=(20, 30))
    expected = nn.functional.interpolate(model.segment(image), (20, 30), mode="bilinear", align_corners=False)
    same(scores, expected)
    mean = (model.segment(image) + model.segment(image.flip(-1)).flip(-1)) / 2
    same(model.segment([image, image], flip=True), mean)
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        model.train().segment(image)


def test_the_default_configuration_is_the_published_architecture():
    with torch.device("meta"):
        model = TqdmForSemanticSegmentation(TqdmConfig(text_config={"max_position_embeddings": 10}))
    assert sum(p.numel() for p in model.parameters()) == 280094932 - 93910272  # without the frozen copy of the backbone
