"""Weights of other programs become ours: published tqdm checkpoints, and CLIP or EVA02-CLIP to start a training from.

Every key of the input is renamed, or dropped for a reason (`key_rules.py`); any other key is an error.
"""

import sys

from ..commands import start

if __name__ == "__main__":
    sys.exit(start("convert"))


import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor

from tqdm_seg.backbone_tqdm import TqdmVisionModel, resize_positions
from tqdm_seg.configuration_tqdm import CITYSCAPES_CLASSES, PRESETS, TqdmConfig
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

from ..data.files import check_out_folder, cut
from ..program import did_you_mean, takes
from .checkpoints import read_checkpoint
from .folder import check_loading, from_pretrained, save_model_folder
from .key_rules import INITIAL_RULES, PUBLISHED_RULES, TEXT, VISION, apply_rules, dropped_keys
from .options import ConvertOptions


def convert_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a published tqdm checkpoint (original names) -> state dict of `TqdmForSemanticSegmentation`."""
    return apply_rules(state, PUBLISHED_RULES)


_PUBLISHED = "published tqdm checkpoint"
# The first of these keys found in a file decides its kind, and the activation of its CLIP blocks where it is certain.
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

    For EVA02-CLIP that is the text tower's. Raises ValueError for a checkpoint of another kind.
    """
    for key, kind, activation in _KINDS:
        if key in state:
            return kind, activation
    if any(key.startswith(VISION) for key in state):
        raise ValueError("the weights of a model folder need no conversion; use the folder that they lie in")
    raise ValueError(
        f"unrecognised checkpoint with keys such as {cut(', '.join(list(state)[:3]), 80)}; supported, with vision "
        "transformers: published tqdm checkpoints, CLIP of OpenAI, open_clip and transformers, EVA02-CLIP"
    )


@dataclass
class Conversion:
    """What became of a file.

    used: number of its tensors that were loaded. dropped: its keys that were not, on purpose. fresh: our parameters and
    buffers that it does not have, which keep their random start.
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


def _tensor(weights: dict[str, Tensor], name: str) -> Tensor:
    """The tensor of this name, before or after conversion; raises ValueError if there is none."""
    if name not in weights:
        raise ValueError(
            f"the checkpoint lacks {name}, or the tensor that becomes it; it is incomplete or of another kind"
        )
    return weights[name]


def architecture(weights: dict[str, Tensor]) -> dict[str, int | str]:
    """The fields of a `TqdmConfig`, such as "vision_config.hidden_size", that follow from the towers' shapes."""
    depth = Counter(re.sub(r"blocks\.\d+\.norm1\.weight", "", name) for name in weights)
    tower, first = ("eva02", "w1") if VISION + "blocks.0.ffn.w1.weight" in weights else ("clip", "fc1")
    width, _, _, patch = _tensor(weights, VISION + "patch_embed.weight").shape
    vocabulary, text_width = _tensor(weights, TEXT + "token_embedding.weight").shape
    return {
        "vision_config.tower": tower,
        "vision_config.patch_size": patch,
        "vision_config.hidden_size": width,
        "vision_config.intermediate_size": len(_tensor(weights, VISION + f"blocks.0.ffn.{first}.weight")),
        "vision_config.num_hidden_layers": depth[VISION],
        "vision_config.projection_dim": len(_tensor(weights, VISION + "projection.weight")),
        "text_config.vocab_size": vocabulary,
        "text_config.hidden_size": text_width,
        "text_config.intermediate_size": len(_tensor(weights, TEXT + "blocks.0.ffn.fc1.weight")),
        "text_config.num_hidden_layers": depth[TEXT],
        "text_config.projection_dim": len(_tensor(weights, TEXT + "projection.weight")),
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
    """Loads converted weights; raises ValueError, changing nothing, naming those that do not fit."""
    state = model.state_dict()
    wrong = {
        "missing": sorted(expected - weights.keys()),
        "unknown": sorted(weights.keys() - expected),
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} for {tuple(state[name].shape)}"
            for name in sorted(expected & weights.keys())
            if weights[name].shape != state[name].shape
        ],
        "of whole numbers": [
            f"{name} {weights[name].dtype}"
            for name in sorted(expected & weights.keys())
            if state[name].is_floating_point() and not weights[name].is_floating_point()
        ],
    }
    if any(wrong.values()):
        found = "; ".join(f"{len(names)} {kind}: {', '.join(names[:8])}" for kind, names in wrong.items() if names)
        raise ValueError(
            f"the checkpoint does not fit this model, it is incomplete or of another architecture: {found}"
        )
    model.load_state_dict(weights, strict=False)


def load_published(
    state: dict[str, Tensor], preset: str = "auto", classes: Sequence[str] | None = None
) -> tuple[TqdmForSemanticSegmentation, Conversion]:
    """The model of a published checkpoint, with the file's number of classes, prompt length and text positions.

    preset "auto": the one whose towers have the file's shapes. classes: names in id order, Cityscapes' 19 by default.
    Raises ValueError for anything that does not fit.
    """
    kind, _ = recognise(state)
    if kind != _PUBLISHED:
        raise ValueError(
            f"this is no tqdm checkpoint but {kind}; add --init PRESET to make the start of a training of it"
        )
    weights = convert_published(state)
    names = classes or CITYSCAPES_CLASSES
    count = len(_tensor(state, "decode_head.query_embed.weight"))
    if count != len(names):
        raise ValueError(
            f"the checkpoint has {count} classes and there are {len(names)} names{'' if classes else ' by default'}; "
            "pass the names it was trained with, in id order: --class-names first,second,..."
        )
    if preset == "auto":
        preset = fitting_preset(weights)
        if preset is None:
            raise ValueError(f"no preset ({', '.join(PRESETS)}) has the checkpoint's towers: {architecture(weights)}")
    text = {
        "max_position_embeddings": len(_tensor(state, "text_encoder.positional_embedding")),
        "num_prompt_tokens": _tensor(state, "contexts").shape[1],
    }
    config = TqdmConfig.from_preset(preset, id2label=dict(enumerate(names)), text_config=text, trained=True)
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
    table = _tensor(weights, VISION + "position_embedding")  # (1 + g g, D)
    weights[VISION + "position_embedding"] = resize_positions(table, grid, grid, vision.tower)
    table = _tensor(weights, TEXT + "position_embedding")  # (77, T)
    if rows > len(table):
        raise ValueError(f"max_position_embeddings is {rows}, and the file has only {len(table)}; use at most as many")
    weights[TEXT + "position_embedding"] = table[:rows]
    return weights


def check_activation(kind: str, trained: str | None, config: TqdmConfig) -> None:
    """Raises ValueError unless the activation of pre-trained CLIP blocks is known and the configuration's."""
    if trained is None:
        raise ValueError(
            f"{kind}: the file does not say its activation, and a wrong one silently spoils every feature. "
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
    """Loads pre-trained towers from a file or state dict, whose keys decide its kind; other weights stay.

    activation: "quick_gelu" or "gelu", with which the CLIP blocks of the source were trained; required where the file
    does not say it, and must be the configuration's. Raises ValueError, changing nothing, for anything that does not
    fit.
    """
    state = source if isinstance(source, dict) else read_checkpoint(Path(source))
    kind, known = recognise(state)
    if kind == _PUBLISHED:
        raise ValueError("this is a whole tqdm checkpoint, not pre-trained towers; convert it without --init")
    if known and activation not in (None, known):
        raise ValueError(f"{kind}: always trained with {known}, not with {activation}; leave the activation out")
    weights = initial_weights(state, model.config)
    check_activation(kind, known or activation, model.config)
    check_rotary(state, model.model.vision_tower)
    names = set(model.state_dict())
    towers = {name for name in names if name.startswith((VISION, TEXT)) and not name.startswith(VISION + "pyramid.")}
    load_exactly(model, weights, towers)
    dropped = dropped_keys(state, INITIAL_RULES)
    return Conversion(kind, len(state) - len(dropped), dropped, sorted(names - towers))


def start_model(
    preset: str, state: dict[str, Tensor], activation: str | None = None, classes: Sequence[str] | None = None
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
        name, _, tag = name.replace("/", "-").partition(":")
        models, tags = open_clip.list_models(), open_clip.list_pretrained_tags_by_model(name)
        if name not in models:
            near = did_you_mean(name, models)
            raise ValueError(f"open_clip has no model {cut(repr(name))}{near}; pass NAME:TAG of its list_pretrained()")
        if tag not in tags:
            known = cut(", ".join(tags), 150) or "another model, for this one has no weights"
            shown = cut(f"{name}:{tag}" if tag else name)
            raise ValueError(f"{shown} names no weights of open_clip; add a tag, {cut(name)}:TAG, of {known}")
    # Some tags, openai among them, are also listed under the model name of the other activation.
    quick = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False) if tag else False
    try:
        model = open_clip.create_model(name, pretrained=tag, force_quick_gelu=quick, require_pretrained=True)
    except Exception as error:  # whatever the name or the files cause in the library
        raise ValueError(f"open_clip cannot load {cut(name, 80)}: {cut(error, 120)}; compare the name") from error
    quick = any(isinstance(module, QuickGELU) for module in model.modules())
    return model.state_dict(), "quick_gelu" if quick else "gelu"


def read_transformers(name: str) -> tuple[dict[str, Tensor], str]:
    """State dict and activation of a CLIPModel, by Hub name or folder."""
    from transformers import CLIPModel

    model, loading = from_pretrained(CLIPModel, name)
    check_loading(loading, name)
    activations = {model.config.vision_config.hidden_act, model.config.text_config.hidden_act}
    if len(activations) > 1:
        raise ValueError(
            f"the towers of {name} have different activations, {sorted(activations)}; choose another model"
        )
    return model.state_dict(), activations.pop()


def read_source(options: ConvertOptions) -> tuple[dict[str, Tensor], str | None]:
    """State dict and, where it is known, activation of what the options name."""
    if options.from_ == "open_clip":
        return read_open_clip(options.source)
    if options.from_ == "transformers":
        return read_transformers(options.source)
    return read_checkpoint(Path(options.source)), options.activation


@takes(ConvertOptions)
def convert(options: ConvertOptions) -> Path:
    """Converts, writes the folder, and prints what became of every tensor; returns the folder."""
    check_out_folder(options.out, "convert", [options.source], whole=True)
    state, activation = read_source(options)
    try:
        if options.init is None:
            model, conversion = load_published(state, options.preset, options.class_names)
        else:
            torch.manual_seed(options.seed)
            model, conversion = start_model(options.init, state, activation, options.class_names)
    except ValueError as error:
        raise ValueError(f"{cut(options.source, 100)}: {error}") from error
    save_model_folder(model, TqdmImageProcessor(), options.out, program="convert")
    print(f"{conversion}\n{options.out}: {model.config.num_labels} classes, {model.num_parameters():,} parameters")
    return options.out
