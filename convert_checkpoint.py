"""Weights of other programs become weights of this one: published tqdm checkpoints, and CLIP or EVA02-CLIP to start from.

    python convert_checkpoint.py tqdm_clip.pth OUT              # published checkpoint -> model folder

Every key of the input is accounted for: renamed, or dropped for a reason given here; anything else is an error.
"""

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


def clip_text(source: str, target: str) -> list[Rule]:
    """Rules for CLIP's text tower, the same in OpenAI's, BAAI's, open_clip's and the published tqdm files."""
    return [
        (source + r"positional_embedding", target + "position_embedding"),
        (source + r"text_projection", target + "projection.weight", Tensor.t),
        (source + r"token_embedding\.weight", target + "token_embedding.weight"),
        (source + r"ln_final\.(weight|bias)", target + r"final_norm.\1"),
        *clip_blocks(source, target),
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
    (r"contexts", _QUERIES + "prompt", lambda prompt: prompt[0]),
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
    (r"decode_head\.pixel_decoder\.text_pos_embed\.weight", _PIXELS + "text_positions.weight"),
    (r"decode_head\.pixel_decoder\.level_encoding\.weight", _PIXELS + "level_embedding.weight"),
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
    (r"decode_head\.query_embed\.weight", _MASKS + "query_positions.weight"),
    (r"decode_head\.level_embed\.weight", _MASKS + "level_embedding.weight"),
    (r"decode_head\.text_proj\.(.*)", _MASKS + r"text_proj.\1"),
    (r"decode_head\.cls_embed\.(weight|bias)", _MASKS + r"class_head.\1"),
    (r"decode_head\.mask_embed\.(.*)", _MASKS + r"mask_head.\1"),
]


def apply_rules(state: dict[str, Tensor], rules: list[Rule]) -> dict[str, Tensor]:
    """Renamed and reshaped tensors, float32 where the source is half precision; in-projections split in three.

    Raises ValueError naming every key that no rule knows, and keys that end up under one name.
    """
    compiled = [(re.compile(pattern), *rest) for pattern, *rest in rules]
    converted: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in state.items():
        for pattern, replacement, *transform in compiled:
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


def convert_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a published tqdm checkpoint (original names) -> state dict of `TqdmForSemanticSegmentation`."""
    return apply_rules(state, PUBLISHED_RULES)
