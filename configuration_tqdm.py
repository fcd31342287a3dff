"""Configuration of tqdm: every architecture number, validated, and the published presets.

The class list is data: `id2label` defines the textual queries. `token_ids` stores the CLIP token ids of the names, so
that a saved model loads without tokeniser and network.
"""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# The 19 evaluation classes of Cityscapes in train-id order, the class list of every published checkpoint.
CITYSCAPES_CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip

# Prompt of the frozen text embedding that the textual regulariser compares with (paper section 3.4).
REFERENCE_PROMPT = "a clean origami of a {class}"

# CLIP byte-pair ids, without start and end token, of the texts that the defaults need.
_KNOWN_TOKEN_IDS = {
    "a clean origami of a": [320, 3772, 31832, 539, 320],
    "road": [1759], "sidewalk": [23278], "building": [2307], "wall": [2569], "fence": [12679], "pole": [8170],
    "traffic light": [3399, 1395], "traffic sign": [3399, 2292], "vegetation": [33947], "terrain": [20184],
    "sky": [2390], "person": [2533], "rider": [9707], "car": [1615], "truck": [4629], "bus": [2840], "train": [3231],
    "motorcycle": [10297], "bicycle": [11652],
}  # fmt: skip


@strict
class TqdmVisionConfig(PreTrainedConfig):
    """One vision tower and its four-level feature pyramid. The defaults are CLIP ViT-B/16 at 512.

    tower: "clip" (learned positions, one feed-forward activation) or "eva02" (2-D rotary positions, SwiGLU, sub-LN).
    image_size: image side in pixels of the position table, which is interpolated for other sizes.
    hidden_act: activation of the CLIP tower, as in its pre-training: "quick_gelu" (OpenAI) or "gelu" (LAION).
    feature_layers: 0-based blocks tapped for the pyramid, fine to coarse.
    projection_dim: width E of the image-text space, the same as in the text tower.
    """

    model_type = "tqdm_vision"
    base_config_key = "vision_config"

    tower: Literal["clip", "eva02"] = "clip"
    image_size: int = 512
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"
    feature_layers: list[int] | tuple[int, ...] = (3, 5, 7, 11)
    projection_dim: int = 512
    layer_norm_eps: float = 1e-5
    drop_path_rate: float | int = 0.1
    # Side of EVA02's token grid in pre-training; rotary positions of any grid are rescaled to it.
    rope_grid: int = 16
    rope_theta: float | int = 10000
    # The published code adds the class embedding to token 0 twice, and published checkpoints are trained that way.
    # False: once, as in OpenAI's CLIP.
    class_embedding_twice: bool = True
    # For images whose sides are no multiples of the patch size. "pad": zeros are added, and cut off the prediction.
    # "stretch", the published behaviour: the last rows and columns are dropped and the prediction is stretched over the
    # whole image (for patch 14 at 512: 504 pixels over 512).
    patch_remainder: Literal["pad", "stretch"] = "pad"

    def validate_architecture(self):
        """Raises ValueError for inconsistent numbers; the message names the field and the fix."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"vision hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; change one of them"
            )
        if self.tower == "eva02" and (self.hidden_size // self.num_attention_heads) % 4:
            raise ValueError(
                f"2-D rotary positions need a head size that is a multiple of 4, not "
                f"{self.hidden_size // self.num_attention_heads}; choose another num_attention_heads"
            )
        layers = list(self.feature_layers)
        if (
            len(layers) != 4
            or layers != sorted(set(layers))
            or not 0 <= layers[0] <= layers[-1] < self.num_hidden_layers
        ):
            raise ValueError(
                f"feature_layers {layers} must be four increasing block numbers between 0 and "
                f"{self.num_hidden_layers - 1} (num_hidden_layers - 1)"
            )
        if self.image_size < 2 * self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} holds less than two patches of {self.patch_size} per side; the coarsest "
                f"feature map needs two: use image_size >= {2 * self.patch_size}"
            )


@strict
class TqdmTextConfig(PreTrainedConfig):
    """The frozen CLIP text tower and its learned prompt. The defaults are CLIP ViT-B/16.

    max_position_embeddings: rows of the position table. CLIP has 77; published tqdm checkpoints keep only the first 10
    (CLIP) or 13 (EVA02), which bounds the length of class names (start + prompt + name + end).
    num_prompt_tokens: learned vectors put between the start token and the class name.
    """

    model_type = "tqdm_text"
    base_config_key = "text_config"

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    max_position_embeddings: int = 77
    num_prompt_tokens: int = 5
    bos_token_id: int | None = 49406
    eos_token_id: int | list[int] | None = 49407

    def validate_architecture(self):
        """Raises ValueError for inconsistent numbers; the message names the field and the fix."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"text hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; change one of them"
            )
        if not 0 <= self.num_prompt_tokens <= self.max_position_embeddings - 3:
            raise ValueError(
                f"{self.num_prompt_tokens} prompt tokens leave no room for a class name in "
                f"{self.max_position_embeddings} positions; num_prompt_tokens may be at most "
                f"{self.max_position_embeddings - 3}"
            )


@strict
class TqdmConfig(PreTrainedConfig):
    """The whole model. `TqdmConfig()` is CLIP ViT-B/16 at 512 with the 19 Cityscapes classes.

    id2label: class names by id, 0 ... K-1. They are the queries: edit this map to change the classes.
    token_ids: CLIP token ids by text; `resolve_token_ids` adds those of new names.
    frozen_texts: class names of a model without text tower, set by `freeze_text()`.
    Presets: `TqdmConfig.from_preset("clip_vit_b16" | "eva02_clip_l14" | "eva02_clip_b16" | "tiny")`.
    """

    model_type = "tqdm"
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {
        "vision_config": TqdmVisionConfig,
        "text_config": TqdmTextConfig,
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    token_ids: dict[str, list[int]] | None = None
    frozen_texts: list[str] | None = None

    hidden_size: int = 256
    group_norm_groups: int = 32
    layer_norm_eps: float = 1e-5
    context_decoder_hidden_size: int = 256
    context_decoder_layers: int = 3
    context_decoder_heads: int = 4
    context_decoder_dropout: float | int = 0.1
    pixel_decoder_layers: int = 6
    pixel_decoder_heads: int = 8
    pixel_decoder_points: int = 4
    # The published configuration file says 1024, but a legacy argument of its builder restores 2048.
    pixel_decoder_ffn_dim: int = 2048
    # Ablations of the paper: without text-to-pixel attention; learned vectors instead of class texts as queries.
    text_to_pixel_attention: bool = True
    queries: Literal["textual", "random"] = "textual"
    mask_decoder_layers: int = 9
    mask_decoder_heads: int = 8
    mask_decoder_ffn_dim: int = 2048

    ignore_index: int = 255
    class_loss_weight: float | int = 2.0
    mask_loss_weight: float | int = 5.0
    dice_loss_weight: float | int = 5.0
    no_object_weight: float | int = 0.1
    textual_loss_weight: float | int = 1.0
    visual_loss_weight: float | int = 1.0
    score_map_loss_weight: float | int = 1.0
    score_map_temperature: float = 0.07
    # Pixels that the score-map loss averages over. "all", in the published presets: ignored pixels lower the loss.
    score_map_loss_over: Literal["labelled", "all"] = "labelled"
    num_points: int = 12544
    oversample_ratio: float | int = 3.0
    importance_sample_ratio: float = 0.75
    reference_prompt: str = REFERENCE_PROMPT

    # Sliding-window inference: side and stride in pixels, windows per forward pass. window_size None: whole image.
    # window_batch_size None: 8, but 1 on a CPU, whose caches larger batches exceed.
    window_size: int | None = 512
    window_stride: int = 341
    window_batch_size: int | None = None

    def __post_init__(self, **kwargs):
        """Builds the sub-configurations and the class list, and looks up the token ids of the class names."""
        # transformers 5.10 has no `sub_configs_defaults`, which does this.
        for name, config_class in self.sub_configs.items():
            value = getattr(self, name)
            if not isinstance(value, PreTrainedConfig):
                setattr(self, name, config_class(**(value or {})))
        if self.id2label is None:
            if kwargs.get("num_labels") not in (None, len(CITYSCAPES_CLASSES)):
                raise ValueError(
                    "the queries of this model are class names, so a number of classes is not enough; pass "
                    'id2label={0: "first class", 1: "second class", ...} instead of num_labels'
                )
            self.id2label = dict(enumerate(CITYSCAPES_CLASSES))
        super().__post_init__(**kwargs)
        self.set_classes(self.id2label)

    def exceeds_window(self, height: int, width: int) -> bool:
        """True for images that inference slides windows over."""
        return self.window_size is not None and max(height, width) > self.window_size

    @property
    def class_names(self) -> list[str]:
        """The class names in id order, one query each."""
        return [self.id2label[index] for index in range(len(self.id2label))]

    @property
    def reference_texts(self) -> list[str]:
        """The class names inside `reference_prompt`, in id order."""
        return [self.reference_prompt.replace("{class}", name) for name in self.class_names]

    def set_classes(self, id2label: dict[int, str]) -> None:
        """Changes the class list and its token ids. Raises ValueError unless it maps 0 ... K-1 to distinct names."""
        id2label = {int(index): name for index, name in id2label.items()}
        if sorted(id2label) != list(range(len(id2label))) or not id2label:
            raise ValueError(f"id2label must number the classes 0, 1, 2, ... without gaps, not {sorted(id2label)}")
        names = list(id2label.values())
        doubled = sorted({name for name in names if names.count(name) > 1 or not name.strip()})
        if doubled:
            raise ValueError(f"class names must be distinct and not empty; rename {doubled}")
        self.id2label = dict(sorted(id2label.items()))
        self.label2id = {name: index for index, name in self.id2label.items()}
        self.resolve_token_ids()

    def resolve_token_ids(self) -> None:
        """Makes `token_ids` hold exactly the texts that the class list and the reference prompt need.

        Known texts keep their ids; open_clip's tokeniser encodes new ones, without a download. Raises ImportError for
        new names without the `open_clip_torch` package.
        """
        prompt = [part.strip() for part in self.reference_prompt.split("{class}")]
        needed = [text for text in dict.fromkeys([*self.class_names, *prompt]) if text]
        known = _KNOWN_TOKEN_IDS | (self.token_ids or {})
        new = [text for text in needed if text not in known]
        if new:
            known |= dict(zip(new, _encode(new), strict=True))
        self.token_ids = {text: known[text] for text in needed}

    def text_token_ids(self, name: str, prompted: bool = False) -> list[int]:
        """Token ids, start and end included, of a class name, alone or inside `reference_prompt`."""
        before, _, after = (part.strip() for part in self.reference_prompt.partition("{class}"))
        texts = [before, name, after] if prompted else [name]
        ids = [token for text in texts if text for token in self.token_ids[text]]
        return [self.text_config.bos_token_id, *ids, self.text_config.eos_token_id]

    def validate_architecture(self):
        """Raises ValueError for inconsistent numbers; the message names the field and the fix."""
        for width, heads in (
            ("hidden_size", "pixel_decoder_heads"),
            ("hidden_size", "mask_decoder_heads"),
            ("hidden_size", "group_norm_groups"),
            ("context_decoder_hidden_size", "context_decoder_heads"),
        ):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(
                    f"{width} {getattr(self, width)} is not a multiple of {heads} {getattr(self, heads)}; "
                    "change one of them"
                )
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 4 for the sine positions")
        if self.vision_config.projection_dim != self.text_config.projection_dim:
            raise ValueError(
                f"image and text embeddings are compared, so projection_dim must be the same in vision_config "
                f"({self.vision_config.projection_dim}) and text_config ({self.text_config.projection_dim})"
            )
        if self.reference_prompt.count("{class}") != 1:
            raise ValueError(f"reference_prompt {self.reference_prompt!r} must hold {{class}} exactly once")
        if self.window_size is not None and not 0 < self.window_stride <= self.window_size:
            raise ValueError(
                f"window_stride {self.window_stride} would leave gaps between windows of {self.window_size}; use a "
                f"stride from 1 to {self.window_size}"
            )
        if self.window_batch_size is not None and self.window_batch_size < 1:
            raise ValueError(f"window_batch_size {self.window_batch_size} must be at least 1")
        if not 0 <= self.importance_sample_ratio <= 1 or self.oversample_ratio < 1:
            raise ValueError(
                f"importance_sample_ratio {self.importance_sample_ratio} must lie between 0 and 1, and "
                f"oversample_ratio {self.oversample_ratio} be at least 1"
            )

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "TqdmConfig":
        """The named preset; `overrides` replace its fields (dicts for sub-configurations are merged)."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(sorted(PRESETS))}")
        fields = {**PRESETS[name], **overrides}
        for key in cls.sub_configs:
            value = overrides.get(key)
            if not isinstance(value, PreTrainedConfig):
                fields[key] = {**PRESETS[name].get(key, {}), **(value or {})}
        return cls(**fields)


def _encode(texts: list[str]) -> list[list[int]]:
    """CLIP byte-pair ids of texts, without start and end token."""
    try:
        from open_clip.tokenizer import SimpleTokenizer  # here, for importing it takes seconds
    except ImportError as error:
        raise ImportError(
            f"this configuration has no token ids for {texts}, and the CLIP tokeniser that makes them is missing: "
            "pip install open_clip_torch (once; a saved model keeps the ids)"
        ) from error
    tokenizer = SimpleTokenizer()
    return [tokenizer.encode(text) for text in texts]


# Differences from the defaults of the classes above.
_PUBLISHED = {"score_map_loss_over": "all"}
_EVA02_TEXT = {"hidden_act": "gelu", "num_prompt_tokens": 8}
PRESETS: dict[str, dict[str, Any]] = {
    "clip_vit_b16": {**_PUBLISHED},
    "eva02_clip_l14": {
        **_PUBLISHED,
        "vision_config": {
            "tower": "eva02", "patch_size": 14, "hidden_size": 1024, "intermediate_size": 2730,
            "num_hidden_layers": 24, "num_attention_heads": 16, "feature_layers": [7, 11, 15, 23],
            "projection_dim": 768, "layer_norm_eps": 1e-6, "drop_path_rate": 0, "patch_remainder": "stretch",
        },
        "text_config": {
            **_EVA02_TEXT, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
            "projection_dim": 768,
        },
    },
    # Not a published setting: the smaller EVA02 tower under the published recipe.
    "eva02_clip_b16": {
        **_PUBLISHED,
        "vision_config": {
            "tower": "eva02", "intermediate_size": 2048, "layer_norm_eps": 1e-6, "drop_path_rate": 0,
        },
        "text_config": _EVA02_TEXT,
    },
    # For laptops and tests: trains from random weights in minutes on two CPU cores.
    "tiny": {
        "vision_config": {
            "image_size": 128, "patch_size": 8, "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4,
            "num_attention_heads": 4, "feature_layers": [0, 1, 2, 3], "projection_dim": 64, "drop_path_rate": 0,
        },
        "text_config": {
            "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
            "projection_dim": 64,
        },
        "hidden_size": 64, "context_decoder_hidden_size": 64, "pixel_decoder_layers": 2, "pixel_decoder_heads": 4,
        "pixel_decoder_ffn_dim": 128, "mask_decoder_layers": 3, "mask_decoder_heads": 4, "mask_decoder_ffn_dim": 128,
        "num_points": 1024, "window_size": 224, "window_stride": 149,
    },
}  # fmt: skip

__all__ = ["CITYSCAPES_CLASSES", "PRESETS", "TqdmConfig", "TqdmTextConfig", "TqdmVisionConfig"]
