"""Names of other programs' weights -> ours, as tables of rules: what is renamed, what is dropped, and why."""

import re
from collections.abc import Callable

from torch import Tensor

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


VISION, TEXT = "model.vision_tower.", "model.text_queries.text_tower."
_QUERIES, _PIXELS, _MASKS = "model.text_queries.", "model.pixel_decoder.", "model.mask_decoder."
_CONTEXT = r"context_decoder\.decoder\.(\d+)\."
_PIXEL_LAYER = r"decode_head\.pixel_decoder\.encoder\.layers\.(\d+)\."
_MASK_LAYER = r"decode_head\.transformer_decoder\.layers\.(\d+)\."

PUBLISHED_RULES: list[Rule] = [
    # The frozen copy of the backbone: the start of the training run, which no prediction needs.
    (r"reg_E0\..*", None),
    *clip_vision(r"backbone\.", VISION),
    *eva02_vision(r"backbone\.", VISION),
    (r"backbone\.fpn1\.(.*)", VISION + r"pyramid.up4.\1"),
    (r"backbone\.fpn2\.0\.(weight|bias)", VISION + r"pyramid.up2.\1"),
    *clip_text(r"text_encoder\.", TEXT),
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
    *clip_vision(r"visual\.", VISION),
    *eva02_vision(r"visual\.(?:trunk\.)?", VISION),
    *timm_eva02_vision(r"visual\.trunk\.", VISION),
    *clip_text(r"(?:text\.)?", TEXT),
    *transformers_tower(r"vision_model\.", VISION),
    *transformers_tower(r"text_model\.", TEXT),
    (r"vision_model\.embeddings\.class_embedding", VISION + "class_embedding"),
    (r"vision_model\.embeddings\.patch_embedding\.weight", VISION + "patch_embed.weight"),
    (r"vision_model\.pre_layrnorm\.(weight|bias)", VISION + r"pre_norm.\1"),
    (r"vision_model\.post_layernorm\.(weight|bias)", VISION + r"post_norm.\1"),
    (r"visual_projection\.weight", VISION + "projection.weight"),
    (r"text_model\.embeddings\.token_embedding\.weight", TEXT + "token_embedding.weight"),
    (r"text_model\.final_layer_norm\.(weight|bias)", TEXT + r"final_norm.\1"),
    (r"text_projection\.weight", TEXT + "projection.weight"),
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
