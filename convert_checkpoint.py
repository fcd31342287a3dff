"""Weights of other programs become ours: published tqdm checkpoints, and CLIP or EVA02-CLIP to start a training from.

    python convert_checkpoint.py tqdm.pth OUT                             # published checkpoint -> model folder
    python convert_checkpoint.py ViT-B-16.pt OUT --init clip_vit_b16      # pre-trained CLIP -> start of a training
    python convert_checkpoint.py EVA02-L-14-336:merged2b_s6b_b61k OUT --init eva02_clip_l14 --from open_clip
    python convert_checkpoint.py openai/clip-vit-base-patch16 OUT --init clip_vit_b16 --from transformers

Every key of the input is accounted for: renamed, or dropped for a reason given here; anything else is an error.
"""

import argparse
import math
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPModel

from tqdm_seg.backbone_tqdm import TqdmVisionModel, resize_positions
from tqdm_seg.configuration_tqdm import CITYSCAPES_CLASSES, PRESETS, TqdmConfig
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation
from tqdm_seg.publish_tqdm import save_model_folder

# A rule: full pattern of a name, replacement (None: dropped on purpose), and what happens to the tensor.
Rule = tuple[str, str | None] | tuple[str, str, Callable[[Tensor], Tensor]]


def clip_blocks(source: str, target: str) -> list[Rule]:
    """Rules for the transformer blocks of OpenAI's CLIP, vision and text alike; in-projections are split later."""
    block = rf"{source}transformer\.resblocks\.(\d+)\."
    return [
        (block + r"ln_([12])\.(weight|bias)", rf"{target}blocks.\1.norm\2.\3"),
        (block + r"attn\.in_proj_(weight|bias)", rf"{target}blocks.\1.attention.in_proj.\2"),
        (block + r"attn\.out_proj\.(weight|bias)", rf"{target}blocks.\1.attention.out_proj.\2"),
        (block + r"mlp\.c_fc\.(weight|bias)", rf"{target}blocks.\1.ffn.fc1.\2"),
        (block + r"mlp\.c_proj\.(weight|bias)", rf"{target}blocks.\1.ffn.fc2.\2"),
    ]


def clip_vision(source: str, target: str) -> list[Rule]:
    """Rules for OpenAI's CLIP ViT, whose names the published tqdm backbone shares."""
    return [
        (source + r"class_embedding", target + "class_embedding"),
        (source + r"positional_embedding", target + "position_embedding"),
        (source + r"proj", target + "projection.weight", Tensor.t),
        (source + r"conv1\.weight", target + "patch_embed.weight"),
        (source + r"ln_pre\.(weight|bias)", target + r"pre_norm.\1"),
        (source + r"ln_post\.(weight|bias)", target + r"post_norm.\1"),
        *clip_blocks(source, target),
    ]


def eva02_vision(source: str, target: str) -> list[Rule]:
    """Rules for BAAI's EVA02-CLIP tower, whose names the published tqdm backbone shares.

    The rotary tables are the same constants in every block; they are computed from the configuration here.
    """
    block = rf"{source}blocks\.(\d+)\."
    return [
        (source + r"cls_token", target + "class_embedding", Tensor.flatten),
        (source + r"pos_embed", target + "position_embedding", lambda table: table[0]),
        (source + r"patch_embed\.proj\.(weight|bias)", target + r"patch_embed.\1"),
        (rf"{source}(blocks\.\d+\.attn\.)?rope\.freqs_(cos|sin)", None),
        (block + r"norm([12])\.(weight|bias)", rf"{target}blocks.\1.norm\2.\3"),
        (block + r"attn\.([qv])_bias", rf"{target}blocks.\1.attention.\2_proj.bias"),
        (block + r"attn\.([qkv])_proj\.weight", rf"{target}blocks.\1.attention.\2_proj.weight"),
        (block + r"attn\.inner_attn_ln\.(weight|bias)", rf"{target}blocks.\1.attention.inner_norm.\2"),
        (block + r"attn\.proj\.(weight|bias)", rf"{target}blocks.\1.attention.out_proj.\2"),
        (block + r"mlp\.w([123])\.(weight|bias)", rf"{target}blocks.\1.ffn.w\2.\3"),
        (block + r"mlp\.ffn_ln\.(weight|bias)", rf"{target}blocks.\1.ffn.inner_norm.\2"),
        (source + r"norm\.(weight|bias)", target + r"post_norm.\1"),
        (source + r"head\.(weight|bias)", target + r"projection.\1"),
    ]


def timm_eva02_vision(source: str, target: str) -> list[Rule]:
    """Rules for the names that timm, and so open_clip, changed in the EVA02-CLIP tower; the others are BAAI's."""
    block = rf"{source}blocks\.(\d+)\."
    return [
        (block + r"attn\.([qv])_proj\.bias", rf"{target}blocks.\1.attention.\2_proj.bias"),
        (block + r"attn\.norm\.(weight|bias)", rf"{target}blocks.\1.attention.inner_norm.\2"),
        (block + r"mlp\.fc1_g\.(weight|bias)", rf"{target}blocks.\1.ffn.w1.\2"),
        (block + r"mlp\.fc1_x\.(weight|bias)", rf"{target}blocks.\1.ffn.w2.\2"),
        (block + r"mlp\.fc2\.(weight|bias)", rf"{target}blocks.\1.ffn.w3.\2"),
        (block + r"mlp\.norm\.(weight|bias)", rf"{target}blocks.\1.ffn.inner_norm.\2"),
    ]


def clip_text(source: str, target: str) -> list[Rule]:
    """Rules for CLIP's text tower, the same in OpenAI's, BAAI's, open_clip's and the published tqdm files."""
    return [
        (source + r"positional_embedding", target + "position_embedding"),
        (source + r"text_projection", target + "projection.weight", Tensor.t),
        (source + r"token_embedding\.weight", target + "token_embedding.weight"),
        (source + r"ln_final\.(weight|bias)", target + r"final_norm.\1"),
        *clip_blocks(source, target),
    ]


def transformers_tower(source: str, target: str) -> list[Rule]:
    """Rules for what the two towers of transformers' CLIPModel have in common."""
    layer = rf"{source}encoder\.layers\.(\d+)\."
    return [
        (layer + r"layer_norm([12])\.(weight|bias)", rf"{target}blocks.\1.norm\2.\3"),
        (layer + r"self_attn\.([qkv]|out)_proj\.(weight|bias)", rf"{target}blocks.\1.attention.\2_proj.\3"),
        (layer + r"mlp\.fc([12])\.(weight|bias)", rf"{target}blocks.\1.ffn.fc\2.\3"),
        (source + r"embeddings\.position_embedding\.weight", target + "position_embedding"),
        (source + r"embeddings\.position_ids", None),  # 0, 1, 2, ... in files of older versions
    ]


_VISION, _TEXT = "model.vision_tower.", "model.text_queries.text_tower."
_QUERIES, _PIXELS, _MASKS = "model.text_queries.", "model.pixel_decoder.", "model.mask_decoder."
_CONTEXT = r"context_decoder\.decoder\.(\d+)\."
_PIXEL_LAYER = r"decode_head\.pixel_decoder\.encoder\.layers\.(\d+)\."
_MASK_LAYER = r"decode_head\.transformer_decoder\.layers\.(\d+)\."

PUBLISHED_RULES: list[Rule] = [
    # The frozen copy of the backbone: the start of the training run, which no prediction needs.
    (r"reg_E0\..*", None),
    *clip_vision(r"backbone\.", _VISION),
    *eva02_vision(r"backbone\.", _VISION),
    (r"backbone\.fpn1\.(.*)", _VISION + r"pyramid.up4.\1"),
    (r"backbone\.fpn2\.0\.(weight|bias)", _VISION + r"pyramid.up2.\1"),
    *clip_text(r"text_encoder\.", _TEXT),
    (r"contexts", _QUERIES + "prompt.weight", lambda prompt: prompt[0]),
    (r"gamma", _QUERIES + "gamma"),
    (r"context_decoder\.(memory|text|out)_proj\.(.*)", _QUERIES + r"context_decoder.\1_proj.\2"),
    (_CONTEXT + r"norm([123])\.(weight|bias)", _QUERIES + r"context_decoder.layers.\1.norm\2.\3"),
    (
        _CONTEXT + r"(self|cross)_attn\.([qkv])_proj\.weight",
        _QUERIES + r"context_decoder.layers.\1.\2_attention.\3_proj.weight",
    ),
    (
        _CONTEXT + r"(self|cross)_attn\.proj\.(weight|bias)",
        _QUERIES + r"context_decoder.layers.\1.\2_attention.out_proj.\3",
    ),
    (_CONTEXT + r"mlp\.0\.(weight|bias)", _QUERIES + r"context_decoder.layers.\1.ffn.fc1.\2"),
    (_CONTEXT + r"mlp\.3\.(weight|bias)", _QUERIES + r"context_decoder.layers.\1.ffn.fc2.\2"),
    (r"decode_head\.pixel_decoder\.input_convs\.(.*)", _PIXELS + r"inputs.\1"),
    (r"decode_head\.pixel_decoder\.lateral_convs\.0\.(.*)", _PIXELS + r"lateral.\1"),
    (r"decode_head\.pixel_decoder\.output_convs\.0\.(.*)", _PIXELS + r"output.\1"),
    (r"decode_head\.pixel_decoder\.mask_feature\.(weight|bias)", _PIXELS + r"mask_features.\1"),
    (r"decode_head\.pixel_decoder\.text_proj\.(weight|bias)", _PIXELS + r"text_proj.\1"),
    (r"decode_head\.pixel_decoder\.text_pos_embed\.weight", _PIXELS + "text_positions"),
    (r"decode_head\.pixel_decoder\.level_encoding\.weight", _PIXELS + "level_embedding"),
    (r"decode_head\.pixel_decoder\.encoder\.post_norm\.(weight|bias)", _PIXELS + r"post_norm.\1"),
    (_PIXEL_LAYER + r"attentions\.0\.(.*)", _PIXELS + r"layers.\1.deformable.\2"),
    (_PIXEL_LAYER + r"attentions\.1\.attn\.in_proj_(weight|bias)", _PIXELS + r"layers.\1.text_attention.in_proj.\2"),
    (_PIXEL_LAYER + r"attentions\.1\.attn\.out_proj\.(.*)", _PIXELS + r"layers.\1.text_attention.out_proj.\2"),
    *[
        rule
        for layer, target in ((_PIXEL_LAYER, _PIXELS), (_MASK_LAYER, _MASKS))
        for rule in (
            (layer + r"ffns\.0\.layers\.0\.0\.(weight|bias)", target + r"layers.\1.ffn.fc1.\2"),
            (layer + r"ffns\.0\.layers\.1\.(weight|bias)", target + r"layers.\1.ffn.fc2.\2"),
            (layer + r"norms\.0\.(weight|bias)", target + r"layers.\1.norm1.\2"),
            (layer + r"norms\.1\.(weight|bias)", target + r"layers.\1.norm2.\2"),
            (layer + r"norms\.2\.(weight|bias)", target + r"layers.\1.norm3.\2"),
        )
    ],
    *[
        rule
        for number, name in ((0, "cross_attention"), (1, "self_attention"))
        for rule in (
            (_MASK_LAYER + rf"attentions\.{number}\.attn\.in_proj_(.*)", _MASKS + rf"layers.\1.{name}.in_proj.\2"),
            (_MASK_LAYER + rf"attentions\.{number}\.attn\.out_proj\.(.*)", _MASKS + rf"layers.\1.{name}.out_proj.\2"),
        )
    ],
    (r"decode_head\.transformer_decoder\.post_norm\.(weight|bias)", _MASKS + r"post_norm.\1"),
    (r"decode_head\.query_embed\.weight", _MASKS + "query_positions"),
    (r"decode_head\.level_embed\.weight", _MASKS + "level_embedding"),
    (r"decode_head\.text_proj\.(.*)", _MASKS + r"text_proj.\1"),
    (r"decode_head\.cls_embed\.(weight|bias)", _MASKS + r"class_head.\1"),
    (r"decode_head\.mask_embed\.(.*)", _MASKS + r"mask_head.\1"),
]

# Pre-trained towers to start from, in the names of every program that has them.
INITIAL_RULES: list[Rule] = [
    # The temperature of the contrastive loss, and three numbers that OpenAI's archives carry.
    (r"logit_scale|input_resolution|context_length|vocab_size", None),
    *clip_vision(r"visual\.", _VISION),
    *eva02_vision(r"visual\.(?:trunk\.)?", _VISION),
    *timm_eva02_vision(r"visual\.trunk\.", _VISION),
    *clip_text(r"(?:text\.)?", _TEXT),
    *transformers_tower(r"vision_model\.", _VISION),
    *transformers_tower(r"text_model\.", _TEXT),
    (r"vision_model\.embeddings\.class_embedding", _VISION + "class_embedding"),
    (r"vision_model\.embeddings\.patch_embedding\.weight", _VISION + "patch_embed.weight"),
    (r"vision_model\.pre_layrnorm\.(weight|bias)", _VISION + r"pre_norm.\1"),
    (r"vision_model\.post_layernorm\.(weight|bias)", _VISION + r"post_norm.\1"),
    (r"visual_projection\.weight", _VISION + "projection.weight"),
    (r"text_model\.embeddings\.token_embedding\.weight", _TEXT + "token_embedding.weight"),
    (r"text_model\.final_layer_norm\.(weight|bias)", _TEXT + r"final_norm.\1"),
    (r"text_projection\.weight", _TEXT + "projection.weight"),
]


def apply_rules(state: dict[str, Tensor], rules: list[Rule]) -> dict[str, Tensor]:
    """Renamed and reshaped tensors, float32 where the source is half precision; in-projections split in three.

    Raises ValueError naming keys that no rule knows, and keys that end up under one name.
    """
    compiled = [(re.compile(pattern), *rest) for pattern, *rest in rules]
    converted: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in state.items():
        for pattern, replacement, *transform in compiled:  # noqa: B007
            if match := pattern.fullmatch(key):
                break
        else:
            unknown.append(key)
            continue
        if replacement is None:
            continue
        name = match.expand(replacement)
        tensor = transform[0](tensor) if transform else tensor
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        parts = {name: tensor}
        if ".in_proj." in name:
            parts = {name.replace("in_proj", f"{c}_proj"): part for c, part in zip("qkv", tensor.chunk(3), strict=True)}
        if doubled := parts.keys() & converted.keys():
            raise ValueError(f"two keys of the checkpoint become {sorted(doubled)}; the second is {key!r}")
        converted |= {part: value.contiguous() for part, value in parts.items()}
    if unknown:
        raise ValueError(f"{len(unknown)} keys of the checkpoint are unknown, the first ones: {unknown[:8]}")
    return converted


def dropped_keys(state: dict[str, Tensor], rules: list[Rule]) -> list[str]:
    """The keys that these rules leave out on purpose."""
    patterns = [re.compile(pattern) for pattern, replacement, *_ in rules if replacement is None]
    return [key for key in state if any(pattern.fullmatch(key) for pattern in patterns)]


def convert_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a published tqdm checkpoint (original names) -> state dict of `TqdmForSemanticSegmentation`."""
    return apply_rules(state, PUBLISHED_RULES)


_PUBLISHED = "published tqdm checkpoint"
# The first of these keys that a file has tells what it is, and the activation of its CLIP blocks where that is certain.
_KINDS = (
    ("decode_head.query_embed.weight", _PUBLISHED, None),
    ("input_resolution", "OpenAI CLIP", "quick_gelu"),
    ("visual.trunk.cls_token", "EVA02-CLIP of open_clip", "gelu"),
    ("visual.cls_token", "EVA02-CLIP of BAAI", "gelu"),
    ("visual.class_embedding", "CLIP in OpenAI's names", None),
    ("vision_model.embeddings.class_embedding", "CLIPModel of transformers", None),
)


def recognise(state: dict[str, Tensor]) -> tuple[str, str | None]:
    """The kind of file that has these keys, and the activation of its CLIP blocks, "quick_gelu" or "gelu", if known.

    For EVA02-CLIP that is the text tower's. Raises ValueError for a file of no kind that is read here.
    """
    for key, kind, activation in _KINDS:
        if key in state:
            return kind, activation
    raise ValueError(
        f"keys like {list(state)[:4]} are not known here; what is read, with vision transformers only: "
        f"{', '.join(kind for _, kind, _ in _KINDS)}"
    )


@dataclass
class Conversion:
    """What became of a file of some kind.

    used: number of its tensors that were loaded. dropped: its keys that were not, on purpose. fresh: our parameters and
    buffers that it does not have, left at their random start.
    """

    kind: str
    used: int
    dropped: list[str]
    fresh: list[str]

    def __str__(self) -> str:
        dropped = Counter(re.sub(r"(reg_E0)\..*|.*(rope)\..*", r"\1\2", key) for key in self.dropped)
        fresh = Counter(re.sub(r"model\.(?:vision_tower\.)?(\w+)\..*", r"\1", name) for name in self.fresh)
        dropped, fresh = (
            ", ".join(f"{name} ({count})" for name, count in counts.items()) or "nothing" for counts in (dropped, fresh)
        )
        return f"{self.kind}: {self.used} tensors used; dropped on purpose: {dropped}; left at random start: {fresh}"


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """State dict of a .safetensors file, a file of torch.save (mmcv's too) or a TorchScript archive, on the CPU.

    Raises ValueError for a file that holds other objects than tensors, numbers and texts: nothing is unpickled.
    """
    if path.suffix == ".safetensors":
        return load_file(path)
    if _is_torchscript(path):  # OpenAI's files; such an archive is a program, of which only the tensors are taken
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"`torch\.jit\.load` is deprecated")
            return torch.jit.load(path, map_location="cpu").state_dict()
    state = _load_saved(path)
    if isinstance(state, dict):  # mmcv and open_clip wrap it, and BAAI's training under two other names
        wrapped = (state.get(key) for key in ("state_dict", "model", "module"))
        state = next((inner for inner in wrapped if isinstance(inner, dict)), state)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        held = list(state)[:8] if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            f'{path} holds no state dict but {held}; expected names with tensors, alone or under the key "state_dict"'
        )
    return {key.removeprefix("module."): tensor for key, tensor in state.items()}


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _load_saved(path: Path) -> object:
    """What torch.save wrote; raises ValueError, with a way out, for anything that only unpickling could restore."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = ", ".join(sorted(set(re.findall(r"GLOBAL (\S+)", str(error)))))
        if not refused:
            raise ValueError(f"{path} is no checkpoint that torch can read, or it is damaged; get it again") from error
        raise ValueError(
            f"{path} holds more than tensors, numbers and texts: {refused} was refused. Restoring such an object means "
            "running code that the file names, so this program does not. If you trust the file, strip it to its "
            "weights yourself, best where there is nothing to lose (a container without network), and convert those:\n"
            f"    import torch; file = torch.load({str(path)!r}, map_location='cpu', weights_only=False)\n"
            f"    torch.save(dict(file.get('state_dict', file)), {str(path.with_suffix('.stripped.pth'))!r})"
        ) from error


def _tensor(weights: dict[str, Tensor], name: str) -> Tensor:
    """The tensor of that name, before or after conversion; raises ValueError if there is none."""
    if name not in weights:
        raise ValueError(
            f"the checkpoint has no {name}, or nothing that becomes it; it is incomplete or of another kind"
        )
    return weights[name]


def architecture(weights: dict[str, Tensor]) -> dict[str, int | str]:
    """The fields of a `TqdmConfig`, as "vision_config.hidden_size", that the shapes of converted towers tell."""
    depth = Counter(re.sub(r"blocks\.\d+\.norm1\.weight", "", name) for name in weights)
    tower, first = ("eva02", "w1") if _VISION + "blocks.0.ffn.w1.weight" in weights else ("clip", "fc1")
    width, _, _, patch = _tensor(weights, _VISION + "patch_embed.weight").shape
    vocabulary, text_width = _tensor(weights, _TEXT + "token_embedding.weight").shape
    return {
        "vision_config.tower": tower,
        "vision_config.patch_size": patch,
        "vision_config.hidden_size": width,
        "vision_config.intermediate_size": len(_tensor(weights, _VISION + f"blocks.0.ffn.{first}.weight")),
        "vision_config.num_hidden_layers": depth[_VISION],
        "vision_config.projection_dim": len(_tensor(weights, _VISION + "projection.weight")),
        "text_config.vocab_size": vocabulary,
        "text_config.hidden_size": text_width,
        "text_config.intermediate_size": len(_tensor(weights, _TEXT + "blocks.0.ffn.fc1.weight")),
        "text_config.num_hidden_layers": depth[_TEXT],
        "text_config.projection_dim": len(_tensor(weights, _TEXT + "projection.weight")),
    }


def fitting_preset(weights: dict[str, Tensor]) -> str | None:
    """Name of the preset whose towers have the shapes of these converted ones."""
    found = architecture(weights)
    for name in PRESETS:
        config = TqdmConfig.from_preset(name)
        if all(attrgetter(field)(config) == value for field, value in found.items()):
            return name
    return None


def check_architecture(weights: dict[str, Tensor], config: TqdmConfig) -> None:
    """Raises ValueError, naming the preset that fits, if converted towers have other shapes than the configuration."""
    wrong = [
        f"{field} is {value}, not {attrgetter(field)(config)}"
        for field, value in architecture(weights).items()
        if attrgetter(field)(config) != value
    ]
    if wrong:
        preset = fitting_preset(weights)
        fix = (
            f"the preset {preset} fits them" if preset else "no preset fits them, make a TqdmConfig with these numbers"
        )
        raise ValueError(f"the checkpoint's towers are not those of the configuration: {', '.join(wrong)}; {fix}")


def check_rotary(state: dict[str, Tensor], vision_tower: TqdmVisionModel) -> None:
    """Raises ValueError unless a checkpoint's rotary tables, which are dropped, are those that the tower computes."""
    for key, table in state.items():
        if match := re.fullmatch(r"(.+?\.)(?:blocks\.\d+\.attn\.)?rope\.freqs_(cos|sin)", key):
            grid = math.isqrt(state[match[1] + "pos_embed"].shape[1] - 1)
            ours = vision_tower.rotary(grid, grid)[("cos", "sin").index(match[2])].cpu()  # (grid * grid, head size)
            tolerance = max(1e-5, torch.finfo(table.dtype).eps)
            if table.shape != ours.shape or not torch.allclose(table.float(), ours, rtol=0, atol=tolerance):
                raise ValueError(
                    f"rotary table {key} {tuple(table.shape)} is not that of this configuration {tuple(ours.shape)}; "
                    "compare num_attention_heads, rope_grid and rope_theta of vision_config with the file's program"
                )


def load_exactly(model: TqdmForSemanticSegmentation, weights: dict[str, Tensor], expected: set[str]) -> None:
    """Loads converted weights; raises ValueError naming those that do not fit before anything is changed."""
    state = model.state_dict()
    wrong = {
        "missing": sorted(expected - weights.keys()),
        "without a place": sorted(weights.keys() - expected),
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} for {tuple(state[name].shape)}"
            for name in sorted(expected & weights.keys())
            if weights[name].shape != state[name].shape
        ],
    }
    if any(wrong.values()):
        found = "; ".join(f"{len(names)} {kind}: {', '.join(names[:8])}" for kind, names in wrong.items() if names)
        raise ValueError(
            f"the checkpoint does not fit this model, it is incomplete or of another architecture: {found}"
        )
    model.load_state_dict(weights, strict=False)


def load_published(
    state: dict[str, Tensor], preset: str = "auto", classes: list[str] | None = None
) -> tuple[TqdmForSemanticSegmentation, Conversion]:
    """The model of a published checkpoint, with the file's number of classes, prompt length and text positions.

    preset "auto": the one whose towers have the file's shapes. classes: names in id order, by default Cityscapes' 19.
    Raises ValueError for anything that does not fit.
    """
    kind, _ = recognise(state)
    if kind != _PUBLISHED:
        raise ValueError(
            f"this is no tqdm checkpoint but {kind}; with --init PRESET it becomes the start of a training"
        )
    weights = convert_published(state)
    names = classes or CITYSCAPES_CLASSES
    count = len(_tensor(state, "decode_head.query_embed.weight"))
    if count != len(names):
        raise ValueError(
            f"the checkpoint has {count} classes and there are {len(names)} names{'' if classes else ' by default'}; "
            "pass the names it was trained with, in id order: --classes first,second,..."
        )
    if preset == "auto":
        preset = fitting_preset(weights)
        if preset is None:
            raise ValueError(f"no preset ({', '.join(PRESETS)}) has the checkpoint's towers: {architecture(weights)}")
    text = {
        "max_position_embeddings": len(_tensor(state, "text_encoder.positional_embedding")),
        "num_prompt_tokens": _tensor(state, "contexts").shape[1],
    }
    config = TqdmConfig.from_preset(preset, id2label=dict(enumerate(names)), text_config=text)
    check_architecture(weights, config)
    model = TqdmForSemanticSegmentation(config)
    load_exactly(model, weights, set(model.state_dict()))
    check_rotary(state, model.model.vision_tower)
    dropped = dropped_keys(state, PUBLISHED_RULES)
    return model.eval(), Conversion(kind, len(state) - len(dropped), dropped, [])


def initial_weights(state: dict[str, Tensor], config: TqdmConfig) -> dict[str, Tensor]:
    """State dict of a pre-trained CLIP or EVA02-CLIP -> weights of the two towers of `TqdmForSemanticSegmentation`.

    Position tables are fitted as in the published code: the image's is resized to the grid of the configuration, the
    text's keeps its first rows. Raises ValueError if the towers are not those of the configuration.
    """
    weights = apply_rules(state, INITIAL_RULES)
    check_architecture(weights, config)
    vision, rows = config.vision_config, config.text_config.max_position_embeddings
    grid = vision.image_size // vision.patch_size
    table = _tensor(weights, _VISION + "position_embedding")  # (1 + g g, D)
    weights[_VISION + "position_embedding"] = resize_positions(table, grid, grid, vision.tower)
    table = _tensor(weights, _TEXT + "position_embedding")  # (77, T)
    if rows > len(table):
        raise ValueError(f"max_position_embeddings is {rows}, and the file has only {len(table)}; use at most as many")
    weights[_TEXT + "position_embedding"] = table[:rows]
    return weights


def check_activation(kind: str, trained: str | None, config: TqdmConfig) -> None:
    """Raises ValueError unless it is known what pre-trained CLIP blocks were trained with, and configured so."""
    if trained is None:
        raise ValueError(
            f"{kind}: the file does not tell its activation, and the wrong one spoils every feature without a trace. "
            "Pass --activation quick_gelu for OpenAI's weights and those called quickgelu, gelu for others, as LAION's"
        )
    towers = [config.text_config] + [config.vision_config] * (config.vision_config.tower == "clip")
    configured = sorted({tower.hidden_act for tower in towers})
    if configured != [trained]:
        raise ValueError(
            f"{kind}: trained with {trained}, but the configuration says {' and '.join(configured)}; set hidden_act to "
            f'"{trained}" in text_config and, for a CLIP tower, in vision_config'
        )


def load_initial_weights(
    model: TqdmForSemanticSegmentation, source: str | Path | dict[str, Tensor], activation: str | None = None
) -> Conversion:
    """Loads pre-trained towers from a file or state dict, whose kind is told by its keys; all else keeps its start.

    activation: "quick_gelu" or "gelu", what the CLIP blocks of the source were trained with; needed where the file does
    not tell, and must be the configuration's. Raises ValueError for anything that does not fit, changing nothing.
    """
    state = source if isinstance(source, dict) else read_checkpoint(Path(source))
    kind, known = recognise(state)
    if kind == _PUBLISHED:
        raise ValueError("this is a tqdm checkpoint, not only pre-trained towers; convert it without --init")
    if known and activation not in (None, known):
        raise ValueError(f"{kind}: always trained with {known}, not with {activation}; leave the activation out")
    weights = initial_weights(state, model.config)
    check_activation(kind, known or activation, model.config)
    check_rotary(state, model.model.vision_tower)
    names = set(model.state_dict())
    towers = {name for name in names if name.startswith((_VISION, _TEXT)) and not name.startswith(_VISION + "pyramid.")}
    load_exactly(model, weights, towers)
    dropped = dropped_keys(state, INITIAL_RULES)
    return Conversion(kind, len(state) - len(dropped), dropped, sorted(names - towers))


def start_model(
    preset: str, state: dict[str, Tensor], activation: str | None = None, classes: list[str] | None = None
) -> tuple[TqdmForSemanticSegmentation, Conversion]:
    """A model of the preset and the activation, with pre-trained towers; the rest is random."""
    config = TqdmConfig.from_preset(preset, id2label=dict(enumerate(classes or CITYSCAPES_CLASSES)))
    if activation is not None:
        config.text_config.hidden_act = activation
        if config.vision_config.tower == "clip":
            config.vision_config.hidden_act = activation
    model = TqdmForSemanticSegmentation(config)
    return model, load_initial_weights(model, state, activation)


def read_open_clip(name: str) -> tuple[dict[str, Tensor], str]:
    """State dict and activation of a model of open_clip: "NAME:TAG", "hf-hub:ORG/NAME" or "local-dir:PATH".

    Raises ValueError if no weights are named.
    """
    import open_clip
    from open_clip.transformer import QuickGELU

    tag = None
    if not name.startswith(("hf-hub:", "local-dir:")):
        name, _, tag = name.partition(":")
        if not tag:
            tags = open_clip.list_pretrained_tags_by_model(name)
            raise ValueError(f"{name} names no weights; add a tag, {name}:TAG, of {', '.join(tags) or 'that model'}")
    # Some tags, openai among them, are also listed under a model name that stands for the other activation.
    quick = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False) if tag else False
    model = open_clip.create_model(name, pretrained=tag, force_quick_gelu=quick, require_pretrained=True)
    quick = any(isinstance(module, QuickGELU) for module in model.modules())
    return model.state_dict(), "quick_gelu" if quick else "gelu"


def read_transformers(name: str) -> tuple[dict[str, Tensor], str]:
    """State dict and activation of a CLIPModel, by hub id or folder."""
    model = CLIPModel.from_pretrained(name)
    activations = {model.config.vision_config.hidden_act, model.config.text_config.hidden_act}
    if len(activations) > 1:
        raise ValueError(
            f"the towers of {name} have different activations, {sorted(activations)}; choose another model"
        )
    return model.state_dict(), activations.pop()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help=".pth, .pt or .safetensors file, or what --from says")
    parser.add_argument("out", help="model folder to write, for AutoModelForSemanticSegmentation and train.py --model")
    purpose = parser.add_mutually_exclusive_group()
    purpose.add_argument(
        "--preset", choices=["auto", *sorted(PRESETS)], default="auto",
        help="SOURCE is a published tqdm checkpoint of this preset; auto: told by its shapes (default %(default)s)",
    )  # fmt: skip
    purpose.add_argument(
        "--init", choices=sorted(PRESETS), metavar="PRESET",
        help=f"SOURCE is a pre-trained CLIP or EVA02-CLIP, OUT the start of a training: {', '.join(sorted(PRESETS))}",
    )  # fmt: skip
    parser.add_argument(
        "--classes", metavar="A,B,...", type=lambda text: [name.strip() for name in text.split(",")],
        help="class names in id order (default: the 19 of Cityscapes)",
    )  # fmt: skip
    init = parser.add_argument_group("with --init")
    init.add_argument(
        "--from", dest="origin", choices=["file", "open_clip", "transformers"], default="file",
        help="what SOURCE is; open_clip: NAME:TAG as open_clip.list_pretrained() has it, or hf-hub:ORG/NAME; "
        "transformers: hub id or folder of a CLIPModel; these two download (default %(default)s)",
    )  # fmt: skip
    init.add_argument(
        "--activation", choices=["quick_gelu", "gelu"],
        help="for a file that does not tell what it was trained with: quick_gelu for OpenAI's, gelu for most others",
    )  # fmt: skip
    init.add_argument("--seed", type=int, default=0, help="decides the weights not pre-trained (default %(default)s)")
    args = parser.parse_args(argv)
    if args.init is None and (args.origin != "file" or args.activation):
        parser.error("--from and --activation are for pre-trained towers; say with --init PRESET which model to make")
    if args.origin != "file" and args.activation:
        parser.error(f"--activation is for files; with --from {args.origin} it is known")
    return args


def main(argv: list[str] | None = None) -> None:
    """Converts, writes the folder, and prints what became of every tensor."""
    args = parse_args(argv)
    activation = args.activation
    if args.origin == "open_clip":
        state, activation = read_open_clip(args.source)
    elif args.origin == "transformers":
        state, activation = read_transformers(args.source)
    else:
        state = read_checkpoint(Path(args.source))
    if args.init is None:
        model, conversion = load_published(state, args.preset, args.classes)
    else:
        torch.manual_seed(args.seed)
        model, conversion = start_model(args.init, state, activation, args.classes)
    save_model_folder(model, TqdmImageProcessor(), args.out)
    print(f"{conversion}\n{args.out}: {model.config.num_labels} classes, {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
