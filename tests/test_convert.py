"""Nothing of a checkpoint is lost, guessed or silently ignored; converted towers compute what their library does."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import get_args

import open_clip
import pytest
import timm
import torch
from conftest import micro_config
from make_published_keys import published_shapes
from parity import LOGIT, PACKS, Pack, pack_config
from processes import finish
from safetensors.torch import save_file
from timm.layers import RotaryEmbeddingCat
from timm.models.eva import checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from tqdm_seg.commands import start
from tqdm_seg.configuration_tqdm import PRESETS, TqdmConfig
from tqdm_seg.deploy.checkpoints import read_checkpoint
from tqdm_seg.deploy.convert import (
    check_rotary,
    convert,
    convert_published,
    fitting_preset,
    initial_weights,
    load_initial_weights,
    load_published,
    read_open_clip,
)
from tqdm_seg.deploy.key_rules import INITIAL_RULES, PUBLISHED_RULES, dropped_keys
from tqdm_seg.deploy.options import ConvertOptions, Preset
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

VISION, TEXT = "model.vision_tower.", "model.text_queries.text_tower."
SMALL_VISION = {"image_size": 32, "layers": 4, "width": 32, "patch_size": 8, "head_width": 16, "mlp_ratio": 1.5}
SMALL_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1, "mlp_ratio": 2.0}
TOKEN_IDS = torch.tensor([[49406, 1759, 49407, 0, 0], [49406, 3399, 1395, 49407, 0]])


# Small random models of the programs whose weights are read ---------------------------------------------------------


@dataclass
class Library:
    """A small random model of another program: its state dict and what it computes."""

    state: dict[str, Tensor]
    tower: str
    activation: str
    tokens: Callable[[Tensor], Tensor]  # image (B, 3, H, W) -> (B, 1 + N, E)
    texts: Callable[[Tensor], Tensor]  # ids (K, L) -> (K, E)


def shaken(module: nn.Module) -> nn.Module:
    """Every parameter away from its start, so that a lost bias or norm is seen."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.eval()


def padded(ids: Tensor) -> Tensor:
    return F.pad(ids, (0, 77 - ids.shape[1]))


def clip_of_open_clip(quick_gelu: bool = False) -> Library:
    model = shaken(open_clip.CLIP(16, SMALL_VISION, SMALL_TEXT, quick_gelu=quick_gelu))
    model.visual.output_tokens = True

    def tokens(image: Tensor) -> Tensor:
        pooled, patches = model.visual(image)
        return torch.cat((pooled[:, None], patches @ model.visual.proj), 1)

    activation = "quick_gelu" if quick_gelu else "gelu"
    return Library(model.state_dict(), "clip", activation, tokens, lambda ids: model.encode_text(padded(ids)))


def clip_of_openai() -> Library:
    """OpenAI's own CLIP has open_clip's names and mathematics, quick GELU, half precision and three numbers more."""
    library = clip_of_open_clip(quick_gelu=True)
    header = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}
    return Library(library.state | {k: torch.tensor(v) for k, v in header.items()}, *list(vars(library).values())[1:])


def clip_config(activation: str) -> CLIPConfig:
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8, "hidden_act": activation,
    }  # fmt: skip
    text = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "eos_token_id": 49407, "hidden_act": activation,
    }  # fmt: skip
    return CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)


def clip_of_transformers(activation: str = "gelu") -> Library:
    model = shaken(CLIPModel(clip_config(activation)))

    def tokens(image: Tensor) -> Tensor:
        hidden = model.vision_model(image).last_hidden_state
        return model.visual_projection(model.vision_model.post_layernorm(hidden))

    def texts(ids: Tensor) -> Tensor:
        return model.text_projection(model.text_model(ids).pooler_output)

    return Library(model.state_dict(), "clip", activation, tokens, texts)


@timm.models.register_model
def eva02_micro_clip(pretrained: bool = False, **options) -> nn.Module:
    """timm's EVA02-CLIP, small."""
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "mlp_ratio": 1.5}
    return timm.create_model("eva02_base_patch16_clip_224", **{**small, **options})


def eva02_trunk_of_open_clip() -> tuple[nn.Module, Library]:
    vision = {"image_size": 32, "timm_model_name": "eva02_micro_clip", "timm_pool": "token", "timm_proj": None}
    model = shaken(open_clip.CustomTextCLIP(16, vision, SMALL_TEXT))
    trunk = model.visual.trunk

    def tokens(image: Tensor) -> Tensor:
        return trunk.head(trunk.forward_features(image))

    return trunk, Library(model.state_dict(), "eva02", "gelu", tokens, lambda ids: model.encode_text(padded(ids)))


def eva02_of_open_clip() -> Library:
    return eva02_trunk_of_open_clip()[1]


def eva02_of_baai() -> Library:
    """The same model under the names of BAAI's files, which timm's own reader of such files confirms."""
    trunk, library = eva02_trunk_of_open_clip()
    names = {
        r"\.trunk": "", r"attn\.([qv])_proj\.bias": r"attn.\1_bias", r"attn\.norm": "attn.inner_attn_ln",
        "mlp.norm": "mlp.ffn_ln", "mlp.fc1_g": "mlp.w1", "mlp.fc1_x": "mlp.w2", "mlp.fc2": "mlp.w3",
    }  # fmt: skip
    state = {}
    for key, tensor in library.state.items():
        for theirs, baai in names.items() if key.startswith("visual.") else ():
            key = re.sub(theirs, baai, key)
        state[key] = tensor
    assert {k: v.shape for k, v in checkpoint_filter_fn(dict(state), trunk).items()} == {
        k: v.shape for k, v in trunk.state_dict().items()
    }
    sin, cos = trunk.rope.get_embed((4, 4)).chunk(2, -1)
    for prefix in ("visual.", *(f"visual.blocks.{i}.attn." for i in range(4))):
        state |= {prefix + "rope.freqs_cos": cos, prefix + "rope.freqs_sin": sin}
    return Library(state, *list(vars(library).values())[1:])


LIBRARIES = [clip_of_openai, clip_of_open_clip, clip_of_transformers, eva02_of_baai, eva02_of_open_clip]


def small_model(tower: str, activation: str, **vision) -> TqdmForSemanticSegmentation:
    """A model whose towers have the shapes of the libraries', and their mathematics."""
    vision = {"hidden_act": activation, "class_embedding_twice": False, **vision}
    config = micro_config(tower, vision_config=vision | {"layer_norm_eps": 1e-6 if tower == "eva02" else 1e-5})
    config.text_config.hidden_act = activation
    return TqdmForSemanticSegmentation(config).eval()


# Weights to start from ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", LIBRARIES, ids=lambda make: make.__name__)
def test_initial_towers_compute_what_their_library_computes(make):
    library = make()
    model = small_model(library.tower, library.activation)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_initial_weights(model, library.state, library.activation)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected_tokens, expected_texts = library.tokens(image), library.texts(TOKEN_IDS)
        tokens = model.model.vision_tower(image)[1]
        texts = model.model.text_queries.text_tower(TOKEN_IDS)
    assert expected_tokens.std() > 0.1 and expected_texts.std() > 0.1
    torch.testing.assert_close(tokens, expected_tokens, atol=1e-4, rtol=0)
    torch.testing.assert_close(texts, expected_texts, atol=1e-4, rtol=0)
    # Every tensor of ours is either the library's or reported as what it was.
    unchanged = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    assert unchanged == set(report.fresh) and any(".pyramid." in name for name in report.fresh)
    assert report.used + len(report.dropped) == len(library.state)


def test_a_torchscript_archive_in_half_precision_is_read(tmp_path):
    library = clip_of_openai()
    archive = nn.Module()
    for key, tensor in library.state.items():
        *path, name = key.split(".")
        parent = archive
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.register_buffer(name, tensor.half() if tensor.is_floating_point() else tensor)
    torch.jit.script(archive).save(tmp_path / "ViT-B-16.pt")
    model = small_model("clip", "quick_gelu")
    report = load_initial_weights(model, tmp_path / "ViT-B-16.pt")  # such a file tells its activation
    assert report.kind == "OpenAI CLIP"
    assert sorted(report.dropped) == ["context_length", "input_resolution", "logit_scale", "vocab_size"]
    weights = initial_weights(read_checkpoint(tmp_path / "ViT-B-16.pt"), model.config)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    weight = model.state_dict()[TEXT + "blocks.0.ffn.fc1.weight"]
    assert torch.equal(weight, library.state["transformer.resblocks.0.mlp.c_fc.weight"].half().float())


@pytest.mark.parametrize("make, mode", [(clip_of_open_clip, "bilinear"), (eva02_of_open_clip, "bicubic")])
def test_position_tables_are_fitted_as_published(make, mode):
    library = make()
    config = small_model(library.tower, library.activation, image_size=56).config
    config.text_config.max_position_embeddings = 10
    weights = initial_weights(library.state, config)
    source = library.state["visual.positional_embedding" if mode == "bilinear" else "visual.trunk.pos_embed"].view(
        17, 32
    )
    grid = source[1:].view(1, 4, 4, 32).permute(0, 3, 1, 2)
    patches = F.interpolate(grid, (7, 7), mode=mode, align_corners=False).permute(0, 2, 3, 1).reshape(49, 32)
    torch.testing.assert_close(weights[VISION + "position_embedding"], torch.cat((source[:1], patches)))
    text = next(tensor for key, tensor in library.state.items() if re.fullmatch(r"(text\.)?positional_embedding", key))
    assert torch.equal(weights[TEXT + "position_embedding"], text[:10])


def test_weights_of_another_activation_are_refused():
    model, library = small_model("clip", "quick_gelu"), clip_of_open_clip(quick_gelu=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="--activation quick_gelu for OpenAI's"):
        load_initial_weights(model, library.state)
    with pytest.raises(ValueError, match='configuration says quick_gelu; set hidden_act to "gelu" in text_config and'):
        load_initial_weights(model, library.state, "gelu")
    model.config.vision_config.hidden_act = "gelu"
    with pytest.raises(ValueError, match="configuration says gelu and quick_gelu"):
        load_initial_weights(model, library.state, "gelu")
    with pytest.raises(ValueError, match="OpenAI CLIP: always trained with quick_gelu"):
        load_initial_weights(model, clip_of_openai().state, "gelu")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def meta_library(preset: str) -> dict[str, Tensor]:
    """State dict of the real pre-trained architecture, without memory."""
    if preset == "transformers":
        with torch.device("meta"):
            return CLIPModel(CLIPConfig(vision_config={"patch_size": 16})).state_dict()
    fields = open_clip.get_model_config(preset)
    kind = open_clip.CustomTextCLIP if fields.pop("custom_text", False) else open_clip.CLIP
    with torch.device("meta"):
        return kind(**fields).state_dict()


@pytest.mark.parametrize(
    "source, preset",
    [
        ("ViT-B-16", "clip_vit_b16"),
        ("ViT-B-16-quickgelu", "clip_vit_b16"),
        ("transformers", "clip_vit_b16"),
        ("EVA02-L-14-336", "eva02_clip_l14"),
        ("EVA02-B-16", "eva02_clip_b16"),
    ],
)
def test_pretrained_architectures_of_full_size_fill_the_towers_of_their_preset(source, preset):
    config = TqdmConfig.from_preset(preset)
    weights = initial_weights(meta_library(source), config)
    with torch.device("meta"):
        model = TqdmForSemanticSegmentation(config)
    towers = {
        name: tensor.shape
        for name, tensor in model.state_dict().items()
        if name.startswith((VISION, TEXT)) and ".pyramid." not in name
    }
    assert {name: tensor.shape for name, tensor in weights.items()} == towers


def test_baai_files_of_full_size_name_the_preset_that_fits():
    """The published EVA02 backbone and text encoder keep BAAI's names below their prefix."""
    prefixes = {"backbone.": "visual.", "text_encoder.": "text."}
    state = {
        prefixes[prefix] + key.removeprefix(prefix): tensor
        for key, tensor in published_state("eva02_clip_l14").items()
        for prefix in prefixes
        if key.startswith(prefix) and not key.startswith("backbone.fpn")
    }
    initial_weights(state, TqdmConfig.from_preset("eva02_clip_l14", text_config={"max_position_embeddings": 13}))
    with pytest.raises(ValueError, match="max_position_embeddings is 77, and the file has only 13"):
        initial_weights(state, TqdmConfig.from_preset("eva02_clip_l14"))
    with pytest.raises(ValueError, match="hidden_size is 1024, not 768.*the preset eva02_clip_l14 fits them"):
        initial_weights(state, TqdmConfig.from_preset("eva02_clip_b16"))


def test_missing_and_unknown_keys_of_initial_weights_are_errors():
    library = clip_of_transformers()
    model = small_model("clip", "gelu")
    lost = {key: tensor for key, tensor in library.state.items() if not key.endswith("layers.2.mlp.fc2.bias")}
    with pytest.raises(ValueError, match=r"architecture: 1 missing: model.vision_tower.blocks.2.ffn.fc2.bias$"):
        load_initial_weights(model, lost, "gelu")
    with pytest.raises(ValueError, match=r"1 keys of the checkpoint are unknown.*adapter.weight"):
        load_initial_weights(model, library.state | {"adapter.weight": torch.ones(1)}, "gelu")
    with pytest.raises(ValueError, match="visual.layer1.0.conv1.weight"):
        load_initial_weights(model, {"visual.layer1.0.conv1.weight": torch.ones(1)})


# Published checkpoints ----------------------------------------------------------------------------------------------


def published_state(preset: str) -> dict[str, Tensor]:
    """The whole state dict of a published architecture, without memory."""
    return {name: torch.empty(shape, device="meta") for name, shape in published_shapes(preset).items()}


@pytest.fixture
def pack(request, monkeypatch) -> Pack:
    """A small published checkpoint, and a preset of its name that describes it."""
    pack = Pack(PACKS / getattr(request, "param", "mini_clip"))
    config = pack_config(pack.pack)
    fields = {key: value for key, value in config.to_dict().items() if key in TqdmConfig.__dataclass_fields__}
    text = {**config.text_config.to_dict(), "max_position_embeddings": 77, "num_prompt_tokens": 2}  # read off the file
    fields |= {"vision_config": config.vision_config.to_dict(), "text_config": text}
    del fields["id2label"], fields["label2id"], fields["query_texts"]
    monkeypatch.setitem(PRESETS, pack.name, fields)
    return pack


@pytest.mark.parametrize("preset", ["clip_vit_b16", "eva02_clip_l14"])
def test_every_published_key_is_used_or_dropped_on_purpose(preset):
    state = published_state(preset)
    weights = convert_published(state)
    assert fitting_preset(weights) == preset
    lengths = {"clip_vit_b16": (10, 5), "eva02_clip_l14": (13, 8)}[preset]
    text = dict(zip(("max_position_embeddings", "num_prompt_tokens"), lengths, strict=True))
    with torch.device("meta"):
        model = TqdmForSemanticSegmentation(TqdmConfig.from_preset(preset, text_config=text))
    assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in model.state_dict().items()}
    dropped = dropped_keys(state, PUBLISHED_RULES)
    assert {re.sub(r".*\.rope\..*", "rope", key) if "reg_E0" not in key else "reg_E0" for key in dropped} == (
        {"reg_E0", "rope"} if preset.startswith("eva") else {"reg_E0"}
    )


@pytest.mark.parametrize("pack", ["mini_clip", "mini_eva02"], indirect=True)
def test_preset_classes_and_text_lengths_are_read_off_the_file(pack):
    model, report = load_published(pack.state)
    expected = pack.model().state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    text = model.config.text_config
    assert (text.max_position_embeddings, text.num_prompt_tokens) == {"mini_clip": (10, 5), "mini_eva02": (13, 8)}[
        pack.name
    ]
    assert model.config.class_names[6] == "traffic light" and not report.fresh
    assert report.used + len(report.dropped) == len(pack.state)


def test_published_keys_unknown_missing_or_of_another_shape_are_errors(pack):
    with pytest.raises(ValueError, match=r"1 keys of the checkpoint are unknown.*decode_head.extra.weight"):
        load_published(pack.state | {"decode_head.extra.weight": torch.ones(1)})
    del pack.state["decode_head.cls_embed.bias"]
    with pytest.raises(ValueError, match=r"architecture: 1 missing: model.mask_decoder.class_head.bias$"):
        load_published(pack.state)
    pack.state["backbone.positional_embedding"] = torch.zeros(26, 64)
    pack.state["decode_head.cls_embed.bias"] = torch.zeros(20, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"1 of whole numbers: model.mask_decoder.class_head.bias torch.int32$"):
        load_published({**pack.state, "backbone.positional_embedding": torch.zeros(17, 64)})
    pack.state["decode_head.cls_embed.bias"] = torch.zeros(20)
    with pytest.raises(ValueError, match=r"1 of another shape: model.*position_embedding \(26, 64\) for \(17, 64\)$"):
        load_published(pack.state)
    del pack.state["contexts"]
    with pytest.raises(ValueError, match="contexts"):
        load_published(pack.state)


def test_another_number_of_classes_needs_names(pack):
    for key in ("decode_head.query_embed.weight", "decode_head.pixel_decoder.text_pos_embed.weight"):
        pack.state[key] = pack.state[key][:2]
    for key in ("decode_head.cls_embed.weight", "decode_head.cls_embed.bias"):
        pack.state[key] = pack.state[key][:3]
    with pytest.raises(ValueError, match="has 2 classes and there are 19 names by default; .*--class-names"):
        load_published(pack.state)
    with pytest.raises(ValueError, match="has 2 classes and there are 1 names; .*--class-names"):
        load_published(pack.state, classes=["wall"])
    model, _ = load_published(pack.state, classes=["wall", "sky"])
    assert model.config.class_names == ["wall", "sky"]


@pytest.mark.parametrize("pack", ["mini_eva02"], indirect=True)
def test_rotary_tables_are_only_dropped_if_they_are_ours(pack):
    key = "backbone.blocks.1.attn.rope.freqs_sin"
    pack.state[key] = pack.state[key].clone()
    pack.state[key][3, 5] += 1e-3
    with pytest.raises(ValueError, match=f"rotary table {key} .*compare num_attention_heads"):
        load_published(pack.state)
    pack.state[key][3, 5] = torch.nan
    with pytest.raises(ValueError, match=f"rotary table {key} "):
        load_published(pack.state)


def test_our_rotary_tables_are_timms_at_every_published_grid():
    tower = TqdmForSemanticSegmentation(
        micro_config("eva02", vision_config={"hidden_size": 64, "num_attention_heads": 1})
    ).model.vision_tower
    for grid in (16, 24, 36):
        table = RotaryEmbeddingCat(64, in_pixels=False, feat_shape=[grid, grid], ref_feat_shape=[16, 16])
        sin, cos = table.get_embed((grid, grid)).chunk(2, -1)
        state = {"visual.pos_embed": torch.empty(1, 1 + grid * grid, 64), "visual.rope.freqs_sin": sin}
        check_rotary(state | {"visual.blocks.0.attn.rope.freqs_cos": cos.half()}, tower)
        with pytest.raises(ValueError, match="visual.rope.freqs_cos"):
            check_rotary(state | {"visual.rope.freqs_cos": sin}, tower)


def test_wrong_preset_names_the_right_one(pack):
    with pytest.raises(ValueError, match="hidden_size is 64, not 768.*the preset mini_clip fits them"):
        load_published(pack.state, preset="clip_vit_b16")
    del PRESETS["mini_clip"]
    with pytest.raises(ValueError, match="no preset .* has the checkpoint's towers: .*'vision_config.hidden_size': 64"):
        load_published(pack.state)


def test_published_and_pretrained_files_are_not_taken_for_each_other(pack):
    library = clip_of_openai()
    with pytest.raises(ValueError, match="OpenAI CLIP.*--init PRESET"):
        load_published(library.state)
    with pytest.raises(ValueError, match="without --init"):
        load_initial_weights(small_model("clip", "quick_gelu"), pack.state)


# Files --------------------------------------------------------------------------------------------------------------


def test_wrapped_plain_and_safetensors_files_hold_the_same(tmp_path):
    state = {"gamma": torch.ones(3), "decode_head.query_embed.weight": torch.zeros(2, 4)}
    torch.save({"meta": {"iter": 20000}, "state_dict": state, "optimizer": {}}, tmp_path / "mmcv.pth")
    torch.save(
        {"epoch": 3, "state_dict": {"module." + key: value for key, value in state.items()}}, tmp_path / "ddp.pt"
    )
    torch.save({"module": state}, tmp_path / "deepspeed.pt")
    torch.save(state, tmp_path / "plain.pth")
    save_file(state, tmp_path / "plain.safetensors")
    for path in tmp_path.iterdir():
        read = read_checkpoint(path)
        assert read.keys() == state.keys() and all(torch.equal(read[key], state[key]) for key in state), path


@pytest.mark.parametrize("content", [b"<html>404</html>", [1, 2], {"meta": {"iter": 3}}], ids=["html", "list", "meta"])
def test_other_files_are_named(tmp_path, content):
    path = tmp_path / "tqdm.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=r"tqdm\.pth (is damaged or no checkpoint|holds no state dict but)"):
        read_checkpoint(path)


# The command --------------------------------------------------------------------------------------------------------

LOAD_ALONE = """
import sys, torch
import transformers.dynamic_module_utils
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation
folder, golden, out, modules = sys.argv[1:]
sys.path.insert(0, modules)
transformers.dynamic_module_utils.HF_MODULES_CACHE = modules
model = AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert not any(name.startswith("tqdm_seg") for name in sys.modules)
with torch.no_grad():
    logits = model(load_file(golden)["eval_native/image"], use_windows=False).logits
    inner = base(load_file(golden)["eval_native/image"]).mask_logits
save_file({"logits": logits, "inner": inner}, out)
print(type(model).__name__, type(processor).__name__, type(base).__name__)
"""


@pytest.mark.slow
def test_a_converted_folder_predicts_in_a_fresh_process_as_the_published_code_did(pack, tmp_path, capsys):
    path, folder = tmp_path / "tqdm.pth", tmp_path / "OUT"
    torch.save({"meta": {"iter": 20000, "CLASSES": ("road",)}, "state_dict": pack.state, "optimizer": {}}, path)
    assert convert(source=str(path), out=folder) == folder
    assert "reg_E0 (" in capsys.readouterr().out
    shipped = {"backbone_tqdm.py", "configuration_tqdm.py", "image_processing_tqdm.py", "modeling_tqdm.py"}
    assert shipped | {"config.json", "model.safetensors", "preprocessor_config.json"} <= {
        file.name for file in folder.iterdir()
    }
    golden, out = PACKS / "mini_clip" / "golden.safetensors", tmp_path / "out.safetensors"
    printed = finish("-c", LOAD_ALONE, folder, golden, out, tmp_path / "modules", folder=tmp_path)
    assert printed.splitlines()[-1].split() == ["TqdmForSemanticSegmentation", "TqdmImageProcessor", "TqdmModel"]
    read = read_checkpoint(out)
    assert pack.compare("eval_native/semantic", read["logits"], LOGIT).passed
    assert pack.compare("eval_native/mask_logits_3", read["inner"][:, -1], LOGIT).passed


@pytest.fixture
def micro_preset(monkeypatch) -> str:
    """A preset for the small libraries."""
    config = micro_config("clip")
    fields = {key: value for key, value in config.to_dict().items() if key in TqdmConfig.__dataclass_fields__}
    fields |= {"vision_config": config.vision_config.to_dict(), "text_config": config.text_config.to_dict()}
    monkeypatch.setitem(PRESETS, "micro", fields)
    return "micro"


def write_open_clip(library: Library, folder: Path) -> str:
    folder.mkdir()
    save_file(library.state, folder / "open_clip_model.safetensors")
    fields = {"embed_dim": 16, "vision_cfg": SMALL_VISION, "text_cfg": SMALL_TEXT}
    (folder / "open_clip_config.json").write_text(dumps({"model_cfg": fields}))
    return f"local-dir:{folder}"


def write_transformers(library: Library, folder: Path) -> str:
    model = CLIPModel(clip_config(library.activation))
    model.load_state_dict(library.state)
    model.save_pretrained(folder)
    return str(folder)


def write_file(library: Library, folder: Path) -> str:
    save_file(library.state, folder.with_suffix(".safetensors"))
    return str(folder.with_suffix(".safetensors"))


@pytest.mark.parametrize(
    "make, write, options",
    [
        (clip_of_open_clip, write_file, {"activation": "gelu"}),
        (clip_of_open_clip, write_open_clip, {"from_": "open_clip"}),
        (clip_of_transformers, write_transformers, {"from_": "transformers"}),
    ],
    ids=["file", "open_clip", "transformers"],
)
def test_a_start_for_training_is_written(make, write, options, micro_preset, tmp_path, capsys):
    library, folder = make(), tmp_path / "OUT"
    options |= {"source": write(library, tmp_path / "source"), "class_names": ("road", "traffic light")}
    convert.__wrapped__(ConvertOptions(**options, out=folder, init=micro_preset))
    assert "left at random start: " in (said := capsys.readouterr().out) and "pyramid (11)" in said
    model = TqdmForSemanticSegmentation.from_pretrained(folder)
    assert model.config.class_names == ["road", "traffic light"]
    assert model.config.text_config.hidden_act == model.config.vision_config.hidden_act == library.activation
    expected = initial_weights(library.state, model.config)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    labels = torch.zeros(2, 32, 32, dtype=torch.long)
    assert model.train()(torch.randn(2, 3, 32, 32), labels).loss.isfinite()


def test_open_clip_tags_decide_the_activation_and_must_be_named(monkeypatch):
    asked = {}

    def create_model(name: str, **options) -> nn.Module:
        asked.update(options, name=name)
        return open_clip.CLIP(16, SMALL_VISION, SMALL_TEXT, quick_gelu=options["force_quick_gelu"])

    monkeypatch.setattr(open_clip, "create_model", create_model)
    # Under the plain name both openai's and LAION's weights are listed.
    assert read_open_clip("ViT-B-16:openai")[1] == "quick_gelu"
    assert (asked["name"], asked["pretrained"], asked["require_pretrained"]) == ("ViT-B-16", "openai", True)
    assert read_open_clip("ViT-B-16:laion2b_s34b_b88k")[1] == "gelu"
    with pytest.raises(ValueError, match="EVA02-L-14-336:TAG, of merged2b_s6b_b61k"):
        read_open_clip("EVA02-L-14-336")


def test_the_options_know_every_preset():
    assert set(get_args(Preset)) == PRESETS.keys()


def test_options_of_one_purpose_are_refused_with_the_other():
    for options in (["--from", "open_clip"], ["--activation", "gelu"], ["--init", "tiny", "--preset", "tiny"]):
        with pytest.raises(SystemExit, match="2"):
            start("convert", ["source.pth", "--out", "OUT", *options])


def test_patterns_do_not_overlap():
    """Every published and pre-trained key is known to one rule only, so the order of the tables means nothing."""
    sources = {"ViT-B-16": INITIAL_RULES, "EVA02-B-16": INITIAL_RULES, "transformers": INITIAL_RULES}
    keys = [(key, rules) for source, rules in sources.items() for key in meta_library(source)]
    keys += [
        (key, PUBLISHED_RULES) for preset in ("clip_vit_b16", "eva02_clip_l14") for key in published_shapes(preset)
    ]
    doubled = [key for key, rules in keys if sum(bool(re.fullmatch(pattern, key)) for pattern, *_ in rules) != 1]
    assert not doubled
