"""Configuration of tqdm: every architecture number, validated, and the published presets.

The class list is data. A class has a query text, to which its rows of the weights belong, and a display name in
`id2label`; most often they are the same. `token_ids` stores the CLIP token ids of the texts, so that a saved model
loads without tokeniser and network. Texts given as vectors need neither: `class_vectors` names the rows of their table.
"""

import difflib
import functools
import math
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
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


# ---- one check of values, by field


LARGEST, DEEPEST = 10_000_000, 1000  # of sizes and counts, and of layers: above it, a number is a slip
LONGEST_NAME = 200


def quote(value: Any, length: int = 60) -> str:
    """`repr` of a value, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def check_numbers(config: PreTrainedConfig, whole: str = "", positive: str = "", not_negative: str = "") -> None:
    """Raises ValueError, naming the field, unless its number is finite and in range; arguments are names in a row.

    whole: integers from 1 to `LARGEST`, and of layers to `DEEPEST`.
    """
    kinds = [
        (whole, f"a whole number from 1 to {LARGEST}, of layers to {DEEPEST}"),
        (positive, "a number above 0"),
        (not_negative, "a number from 0 on"),
    ]
    for names, kind in kinds:
        for name in names.split():
            value = getattr(config, name)
            fits = not isinstance(value, bool) and math.isfinite(value) and value >= 0
            most = math.inf if names != whole else DEEPEST if name.endswith("_layers") else LARGEST
            if not fits or (value == 0 and names != not_negative) or value > most:
                raise ValueError(f"{config.model_type} configuration: {name} is {quote(value)} and must be {kind}")


def check_shares(config: PreTrainedConfig, *names: str) -> None:
    """Raises ValueError, naming the field, unless its number is from 0 on and below 1."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(
                f"{config.model_type} configuration: {name} is {getattr(config, name)} and must be from 0 on, below 1"
            )


def check_activation(config: PreTrainedConfig) -> None:
    """Raises ValueError unless transformers knows `hidden_act`."""
    from transformers.activations import ACT2FN  # here, because it imports torch

    if config.hidden_act not in ACT2FN:
        near = difflib.get_close_matches(config.hidden_act, list(ACT2FN), 3) or ["quick_gelu", "gelu"]
        raise ValueError(
            f"{config.model_type} configuration: hidden_act {quote(config.hidden_act)} is no activation of "
            f"transformers; choose {' or '.join(near)}"
        )


def check_keys(config_class: type[PreTrainedConfig], keys: Iterable[str]) -> None:
    """Raises ValueError for a key that is no field of the class."""
    known = {*config_class.__dataclass_fields__, *PreTrainedConfig().to_dict(), "num_labels", "attn_implementation"}
    known |= {"output_attentions", "torch_dtype", "name_or_path"}
    for key in keys:
        if key not in known and not key.startswith("_"):
            near = difflib.get_close_matches(key, sorted(known), 1)
            raise ValueError(
                f"{config_class.__name__} has no field {quote(key)}{f'; did you mean {near[0]}?' if near else ''}"
            )


def plain_errors(config_class: type) -> type:
    """Decorates a `strict` class: what it refuses becomes a ValueError of one readable line that names the field."""

    def wrap(method: Callable) -> Callable:
        @functools.wraps(method)
        def wrapped(self: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
            try:
                method(self, *args, **kwargs)
            except (AttributeError, TypeError) as error:  # of values that the library does not look at
                name = next((n for n, value in kwargs.items() if str(value) in str(error)), "a field")
                raise ValueError(
                    f"{self.model_type} configuration: {name} must be of its type: {quote(error, 120)}"
                ) from error
            except StrictDataclassError as error:
                message = str(error.__cause__)
                if method.__name__.endswith("setattr__"):
                    name, value = args
                    kind = type(self).__dataclass_fields__[name].type
                    kind = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
                    message = (
                        f"{self.model_type} configuration: {name} is {quote(value)} and must be {kind}, not "
                        f"{type(value).__name__}"
                    )
                raise ValueError(message) from None

        return wrapped

    for name in ("__init__", "__setattr__", "validate"):
        setattr(config_class, name, wrap(getattr(config_class, name)))
    return config_class


# ---- class names


def check_names(id2label: Any) -> dict[int, str]:
    """The class names by id, in order; raises ValueError unless it maps 0 ... K-1 to distinct names in clear text."""
    if not isinstance(id2label, dict):
        raise ValueError(
            f'id2label is {quote(id2label)} and must be {{0: "first class", 1: "second class", ...}}; of a list, '
            "dict(enumerate(names)) makes it"
        )
    if not all(str(index).strip().isdecimal() and isinstance(index, int | str) for index in id2label):
        raise ValueError(f"id2label has the ids {quote(list(id2label))}; number the classes 0, 1, 2, ...")
    names = {int(index): id2label[index] for index in sorted(id2label, key=int)}
    if list(names) != list(range(len(id2label))) or not names:
        raise ValueError(f"id2label must number the classes 0, 1, 2, ... without gaps, not {quote(list(names))}")
    check_distinct(list(names.values()), "id2label")
    return names


def check_distinct(names: Sequence[Any], field: str) -> None:
    """Raises ValueError for names that are no text, empty, doubled, too long, or hold invisible characters."""
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{field}: class names must be distinct and not empty texts; {quote(name)} is none")
        if any(unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") for letter in name):
            raise ValueError(
                f"{field}: the class name {quote(name)} holds control or invisible characters; remove them"
            )
        if len(name) > LONGEST_NAME:
            raise ValueError(f"{field}: the class name {quote(name)} is longer than {LONGEST_NAME} letters; shorten it")
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"{field}: class names must be distinct; rename {quote(doubled)}")


def nearest(name: str, names: Collection[str], most: int = 4) -> list[str]:
    """The names that are spelled most alike, for a message; the first ones where none is near."""
    return difflib.get_close_matches(name, list(names), most, 0.5) or list(names)[:most]


def listed(names: Collection[str], most: int = 4) -> str:
    """Some of the names, for a message."""
    shown = ", ".join(quote(name, 30) for name in list(names)[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


@plain_errors
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
        check_numbers(
            self,
            "image_size patch_size num_channels hidden_size intermediate_size num_hidden_layers num_attention_heads "
            "projection_dim rope_grid",
            "layer_norm_eps rope_theta",
        )
        check_shares(self, "drop_path_rate")
        check_activation(self)
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
                f"feature_layers {quote(layers)} must be four increasing block numbers between 0 and "
                f"{self.num_hidden_layers - 1} (num_hidden_layers - 1)"
            )
        if self.image_size < 2 * self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} holds less than two patches of {self.patch_size} per side; the coarsest "
                f"feature map needs two: use image_size >= {2 * self.patch_size}"
            )


@plain_errors
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
        check_numbers(
            self,
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads projection_dim "
            "max_position_embeddings",
            "layer_norm_eps",
            "num_prompt_tokens",
        )
        check_activation(self)
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 <= value < self.vocab_size:
                raise ValueError(
                    f"text configuration: {name} is {quote(value)} and must be one id from 0 to {self.vocab_size - 1} "
                    "(vocab_size - 1)"
                )
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


@plain_errors
@strict
class TqdmConfig(PreTrainedConfig):
    """The whole model. `TqdmConfig()` is CLIP ViT-B/16 at 512 with the 19 Cityscapes classes.

    id2label: class names by id, 0 ... K-1, as results show them.
    query_texts: the text of every row of the weights, which `from_pretrained` matches with `id2label`; by default its
    names. They change with the weights alone: `set_classes` of the model.
    display_names: what classes are called where it is not their query text, {text: name}; see `rename_classes`.
    token_ids: CLIP token ids by text.
    frozen_texts: query texts of a model without text tower, set by `freeze_text()`.
    queries: what a class query starts from. "textual": its text in the text tower, with a learned prompt; "vectors":
    the row of its text in a given table, without tower; "random" (ablation): a learned vector.
    class_vectors: with queries="vectors" the table's "names", and of which "model" and "source" it is, under which
    "licence"; "words", {other name: name of the table}, are names that classes may have, too.
    centre_class_vectors: subtract the table's mean from its rows: raw CLIP texts lie close together.
    class_head: "linear" (published), a row of weights per class; "cosine" compares queries with the class texts, has no
    weights per class, and so takes new names without training.
    trained: False for the start of a training, whose predictions mean nothing. Training sets it, and a folder that does
    not say it counts as trained.
    Presets: `TqdmConfig.from_preset("clip_vit_b16" | "eva02_clip_l14" | "eva02_clip_b16" | "tiny")`.
    """

    model_type = "tqdm"
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {
        "vision_config": TqdmVisionConfig,
        "text_config": TqdmTextConfig,
    }
    # Outputs that transformers' Trainer does not gather.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "losses", "class_logits", "mask_logits", "score_map", "text_embeddings", "image_embedding", "hidden_states",
        "attentions",
    ]  # fmt: skip

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    query_texts: list[str] | None = None
    display_names: dict[str, str] | None = None
    token_ids: dict[str, list[int]] | None = None
    frozen_texts: list[str] | None = None
    class_vectors: dict[str, Any] | None = None
    centre_class_vectors: bool = False
    trained: bool = False

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
    queries: Literal["textual", "vectors", "random"] = "textual"
    class_head: Literal["linear", "cosine"] = "linear"
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
        """Builds the sub-configurations and the class list, and looks up the token ids of the query texts."""
        # transformers 5.10 has no `sub_configs_defaults`, which does this.
        for name, config_class in self.sub_configs.items():
            value = getattr(self, name)
            if not isinstance(value, PreTrainedConfig):
                check_keys(config_class, value or {})
                setattr(self, name, config_class(**(value or {})))
        count, label2id = kwargs.pop("num_labels", None), self.label2id
        if self.id2label is None:
            if self.query_texts is None:
                self.query_texts = list(CITYSCAPES_CLASSES)
            self.id2label = dict(enumerate(self.row_names))
        self.num_labels = len(self.id2label) if count is None else count
        super().__post_init__(**kwargs)
        self.label2id = label2id or self.label2id
        if self.query_texts is None:
            texts = {name: text for text, name in (self.display_names or {}).items()}
            named = [self._word(texts.get(name, name)) for name in self.class_names]
            if self.queries == "vectors":
                self.query_texts, self.display_names = named, _display_names(named, self.class_names)
            else:
                self.query_texts = self.frozen_texts or named
        self.resolve_token_ids()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, and checks what keyword arguments changed; `display_names` renames classes."""
        given, names = kwargs.get("num_labels"), kwargs.pop("display_names", None)
        if "query_texts" in kwargs:
            raise ValueError("query_texts belong to the weights; pass display_names, or use set_classes() of the model")
        return_unused = kwargs.pop("return_unused_kwargs", False)
        ids = kwargs.get("label2id")
        fields = {"trained": True, **config_dict}
        fields.pop("label2id", None)  # follows from id2label, which may have been edited
        for name, config_class in cls.sub_configs.items():  # other versions of transformers may add keys
            if isinstance(fields.get(name), dict):
                fields[name] = config_class.from_dict(fields[name])
        kwargs.pop("num_labels", None)
        config, kwargs = super().from_dict(fields, return_unused_kwargs=True, **kwargs)
        if ids is not None:  # setting id2label makes it
            config.label2id = ids
        if given is not None:
            config.num_labels = given
        if names is not None:
            config.rename_classes(names)
        config.validate()
        return (config, kwargs) if return_unused else config

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "id2label" and value is not None:
            value = check_names(value)
            super().__setattr__("label2id", {label: index for index, label in value.items()})
        super().__setattr__(name, value)

    @property
    def num_labels(self) -> int:
        """The number of classes. Setting another one raises ValueError: queries need names."""
        return len(self.id2label or ())

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        if count != self.num_labels:
            raise ValueError(
                f"num_labels is {quote(count)} and id2label has {self.num_labels} classes; the queries of this model "
                'are texts, so pass id2label={0: "first class", 1: "second class", ...} instead of num_labels'
            )

    def exceeds_window(self, height: int, width: int) -> bool:
        """True for images that inference slides windows over."""
        return self.window_size is not None and max(height, width) > self.window_size

    @property
    def class_names(self) -> list[str]:
        """The class names in id order."""
        return [self.id2label[index] for index in range(len(self.id2label))]

    @property
    def row_names(self) -> list[str]:
        """What the class of every row of the weights is called."""
        return [(self.display_names or {}).get(text, text) for text in self.query_texts]

    def rows_of(self, names: Sequence[str]) -> list[int | None]:
        """The row of the weights of each class, by its name or query text; None for those that have none."""
        rows = {text: row for row, text in enumerate(self.query_texts)}
        rows |= {name: row for row, name in enumerate(self.row_names)}
        return [rows.get(name, rows.get(self._word(name))) for name in names]

    @property
    def has_text_tower(self) -> bool:
        """True where the class texts are encoded by the model itself."""
        return self.frozen_texts is None and self.queries != "vectors"

    @property
    def has_open_classes(self) -> bool:
        """True where no weights belong to a class, so that new names need no training."""
        return self.class_head == "cosine" and self.queries != "random" and self.frozen_texts is None

    def check_loadable(self) -> None:
        """Raises ValueError for names in `id2label` that trained weights have no part for."""
        if self.trained and not self.has_open_classes and None in self.rows_of(self.class_names):
            self.check_rows()

    def check_rows(self) -> None:
        """Raises ValueError where `id2label` of a model was edited, and its weights do not follow."""
        if self.class_names != self.row_names:
            raise ValueError(
                f"config.id2label was edited to {listed(self.class_names)}, and the model still predicts "
                f"{listed(self.row_names)}; call set_classes() of the model for other classes, "
                "config.rename_classes() for other names"
            )

    @property
    def custom_pipelines(self) -> dict[str, Any]:
        """The pipeline of a folder's code, which `transformers.pipeline` takes where that code is trusted.

        Made for each reader, as `pipeline` writes classes into it, which no config.json can hold.
        """
        if not type(self).__module__.startswith("transformers_modules."):
            return {}
        impl = "image_processing_tqdm.TqdmImageSegmentationPipeline"
        return {"image-segmentation": {"impl": impl, "pt": ["AutoModelForSemanticSegmentation"]}}

    def set_classes(self, id2label: dict[int, str]) -> None:
        """Changes the class list of a model to be made. Known names keep their query text, new ones are their own.

        Raises ValueError, changing nothing, unless it maps 0 ... K-1 to names that are distinct for CLIP, too, and in
        the table where texts are given as vectors.
        """
        id2label = check_names(id2label)
        names = list(id2label.values())
        rows = self.rows_of(names)
        texts = [
            self._word(name if row is None else self.query_texts[row]) for name, row in zip(names, rows, strict=True)
        ]
        token_ids = self._look_up(texts)
        self.id2label, self.query_texts, self.token_ids = id2label, texts, token_ids
        self.display_names = _display_names(texts, names)

    def rename_classes(self, names: dict[str, str]) -> None:
        """Changes display names, {query text or present name: new name}: predictions stay the same.

        Raises ValueError, changing nothing, for a class that there is not, and for a new name that is the query text
        of another class.
        """
        rows = dict(zip(names, self.rows_of(list(names)), strict=True))
        unknown = [name for name, row in rows.items() if row is None]
        if unknown:
            raise ValueError(f"display_names: no class is called {listed(unknown)}, only {listed(self.query_texts)}")
        new = {self.query_texts[row]: names[name] for name, row in rows.items()}
        display = {text: name for text, name in ((self.display_names or {}) | new).items() if text != name}
        check_distinct([display.get(text, text) for text in self.query_texts], "display_names")
        taken = [name for name in display.values() if name in self.query_texts]
        if taken:
            raise ValueError(f"display_names: {listed(taken)} is the query text of another class; choose another name")
        shown = {
            i: name if row is None else self.query_texts[row]
            for i, (name, row) in enumerate(zip(self.class_names, self.rows_of(self.class_names), strict=True))
        }
        self.display_names = display or None
        self.id2label = {i: display.get(text, text) for i, text in shown.items()}

    def resolve_token_ids(self) -> None:
        """Makes `token_ids` hold exactly the query texts and the reference prompt; raises as `set_classes`."""
        self.token_ids = self._look_up(self.query_texts)

    def _word(self, name: str) -> str:
        """The query text of a new class: its name, or what the table of class vectors calls it."""
        vectors = self.class_vectors if self.queries == "vectors" else None
        return ((vectors or {}).get("words") or {}).get(name, name)

    def _check_vectors(self, texts: list[str]) -> None:
        """Raises ValueError unless `class_vectors` is a table that has these texts."""
        table = self.class_vectors
        if table is None or not isinstance(table.get("names"), list):
            raise ValueError(
                'queries="vectors" needs class_vectors={"names": [...], "model": ..., "source": ...}, not '
                f"{quote(table)}; `tqdm-seg train --class-vectors` sets it"
            )
        known, words = table["names"], table.get("words") or {}
        check_distinct(known, "class_vectors")
        for text in texts:
            if text not in known:
                near = nearest(text, [*known, *words])
                shown = (f"{name!r} (for {words[name]!r})" if name in words else repr(name) for name in near)
                raise ValueError(
                    f"id2label: there is no class vector for {quote(text, 40)}; the nearest of {len(known)} names are "
                    f"{', '.join(shown)}; use one of them, and display_names to show another name"
                )
            if texts.count(text) > 1:
                same = [quote(name, 30) for name in [text, *words] if words.get(name, name) == text]
                raise ValueError(
                    f"id2label: two classes have the class vector {quote(text, 30)}, which stands for "
                    f"{', '.join(same[:5])}; leave out or rename one"
                )

    def _look_up(self, texts: list[str]) -> dict[str, list[int]] | None:
        """Token ids of exactly these query texts and the reference prompt.

        Known texts keep their ids; open_clip's tokeniser encodes new ones, without a download. Raises ImportError for
        new texts without the `open_clip_torch` package, ValueError for texts that are one to CLIP. None, after the
        checks, where vectors stand for the texts.
        """
        if self.queries == "vectors":
            self._check_vectors(texts)
            return None
        prompt = [part.strip() for part in self.reference_prompt.split("{class}")]
        needed = [text for text in dict.fromkeys([*texts, *prompt]) if text]
        known = _KNOWN_TOKEN_IDS | (self.token_ids or {})
        new = [text for text in needed if text not in known]
        if new:
            known |= dict(zip(new, _encode(new), strict=True))
        seen: dict[tuple[int, ...], str] = {}
        for text in texts:
            ids = [*known[text], self.text_config.eos_token_id]
            read = tuple(ids[: ids.index(self.text_config.eos_token_id)])  # CLIP reads up to the end token
            if not read or read in seen:
                other = f"the same text to CLIP as {quote(seen[read])}" if read else "no text to CLIP"
                raise ValueError(f"id2label: the class name {quote(text)} is {other}; rename it")
            seen[read] = text
        return {text: known[text] for text in needed}

    def text_token_ids(self, text: str, prompted: bool = False) -> list[int]:
        """Token ids, start and end included, of a query text, alone or inside `reference_prompt`."""
        before, _, after = (part.strip() for part in self.reference_prompt.partition("{class}"))
        texts = [before, text, after] if prompted else [text]
        ids = [token for text in texts if text for token in self.token_ids[text]]
        return [self.text_config.bos_token_id, *ids, self.text_config.eos_token_id]

    def validate_names(self):
        """Raises ValueError unless id2label, label2id, display_names, token_ids and ignore_index fit each other."""
        if self.id2label is None:
            raise ValueError('id2label is None and must be {0: "first class", 1: "second class", ...}')
        names = check_names(self.id2label)
        label2id = {name: index for index, name in names.items()}
        if not isinstance(self.label2id, dict | None):
            raise ValueError(f"label2id is {quote(self.label2id)}; leave it out, it follows from id2label")
        if self.label2id in (None, {}, {name: row for row, name in enumerate(self.row_names)}):
            self.label2id = label2id  # single names of id2label were edited
        if {name: int(index) for name, index in self.label2id.items()} != label2id:
            wrong = [
                name for name in names.values() if self.label2id.get(name) not in (label2id[name], str(label2id[name]))
            ]
            raise ValueError(
                f"label2id contradicts id2label, for instance in {listed(wrong or sorted(self.label2id), 1)}; leave "
                "label2id out, it follows from id2label"
            )
        self.label2id = label2id
        check_distinct(self.query_texts, "query_texts")
        check_distinct(self.row_names, "display_names")
        if stray := [text for text in self.display_names or {} if text not in self.query_texts]:
            raise ValueError(f"display_names: no query text is {listed(stray)}; use {listed(self.query_texts)}")
        if self.frozen_texts is not None and not {*self.query_texts} <= {*self.frozen_texts}:
            raise ValueError(
                f"frozen_texts are {quote(self.frozen_texts)} and must hold the query texts {listed(self.query_texts)}"
            )
        self.check_vectors()
        for text, ids in (self.token_ids or {}).items():
            end = self.text_config.eos_token_id  # the largest one, by which the text tower finds the end
            if not all(0 <= index <= end for index in ids):
                raise ValueError(f"token_ids of {quote(text)} are {quote(ids)} and must be ids from 0 to {end}")
        self.check_losses()

    def check_vectors(self):
        """Raises ValueError for class vectors that do not fit the other fields."""
        if self.queries == "vectors":
            self._check_vectors(self.query_texts)
            if self.frozen_texts is not None:
                raise ValueError('frozen_texts: queries="vectors" has no text tower to drop; leave frozen_texts out')
        for name in ("class_vectors", "centre_class_vectors"):
            if getattr(self, name) and self.queries != "vectors":
                raise ValueError(
                    f'{name} is {quote(getattr(self, name))} and queries is "{self.queries}", which uses no table; set '
                    'queries="vectors", or leave it out'
                )

    def check_losses(self):
        """Raises ValueError for numbers that losses cannot be computed with."""
        check_numbers(
            self,
            "num_points",
            "no_object_weight score_map_temperature",
            "class_loss_weight mask_loss_weight dice_loss_weight textual_loss_weight visual_loss_weight "
            "score_map_loss_weight",
        )
        if not 0 <= self.importance_sample_ratio <= 1 or not 1 <= self.oversample_ratio < math.inf:
            raise ValueError(
                f"importance_sample_ratio {self.importance_sample_ratio} must lie between 0 and 1, and "
                f"oversample_ratio {self.oversample_ratio} be at least 1"
            )
        if 0 <= self.ignore_index < self.num_labels:
            raise ValueError(
                f"ignore_index {self.ignore_index} is the class {quote(self.id2label[self.ignore_index])}; choose one "
                "that is no class, such as -100"
            )

    def check_windows(self):
        """Raises ValueError for windows that leave gaps or hold no image."""
        check_numbers(self, " ".join(n for n in ("window_size", "window_batch_size") if getattr(self, n) is not None))
        smallest = 2 * self.vision_config.patch_size
        if self.window_size is not None and self.window_size < smallest:
            raise ValueError(f"window_size {self.window_size} holds less than two patches; use at least {smallest}")
        if self.window_size is not None and not 0 < self.window_stride <= self.window_size:
            raise ValueError(
                f"window_stride {self.window_stride} would leave gaps between windows of {self.window_size}; use a "
                f"stride from 1 to {self.window_size} (window_size)"
            )

    def validate_architecture(self):
        """Raises ValueError for inconsistent numbers; the message names the field and the fix."""
        check_numbers(
            self,
            "hidden_size group_norm_groups context_decoder_hidden_size context_decoder_layers context_decoder_heads "
            "pixel_decoder_layers pixel_decoder_heads pixel_decoder_points pixel_decoder_ffn_dim mask_decoder_layers "
            "mask_decoder_heads mask_decoder_ffn_dim",
            "layer_norm_eps",
        )
        check_shares(self, "context_decoder_dropout")
        self.check_windows()
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
            raise ValueError(f"reference_prompt {quote(self.reference_prompt)} must hold {{class}} exactly once")

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "TqdmConfig":
        """The named preset; `overrides` replace its fields (dicts for sub-configurations are merged)."""
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"unknown preset {quote(name)}; choose one of {', '.join(sorted(PRESETS))}")
        check_keys(cls, overrides)
        fields = {**PRESETS[name], **overrides}
        for key in cls.sub_configs:
            value = overrides.get(key)
            if not isinstance(value, dict | PreTrainedConfig | None):
                raise ValueError(f"{key} is {quote(value)} and must be a dict of its fields, or a configuration")
            if not isinstance(value, PreTrainedConfig):
                fields[key] = {**PRESETS[name].get(key, {}), **(value or {})}
        return cls(**fields)


def _display_names(texts: list[str], names: list[str]) -> dict[str, str] | None:
    """{text: name} where they differ, or None."""
    return {text: name for text, name in zip(texts, names, strict=True) if text != name} or None


@functools.cache
def _tokenizer() -> Any:
    """CLIP's byte-pair encoder; making it reads its vocabulary. Raises ImportError without open_clip."""
    try:  # an import outside of `try` is required of every user of a folder with this file
        from open_clip.tokenizer import SimpleTokenizer  # here, for importing it takes seconds
    except ImportError as error:
        raise ImportError(
            "new class names need the CLIP tokeniser, which is missing: pip install open_clip_torch (once; a saved "
            "model keeps the ids)"
        ) from error
    return SimpleTokenizer()


def _encode(texts: list[str]) -> list[list[int]]:
    """CLIP byte-pair ids of texts, without start and end token."""
    return [_tokenizer().encode(text) for text in texts]


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

TqdmConfig.register_for_auto_class()

__all__ = [
    "CITYSCAPES_CLASSES", "PRESETS", "TqdmConfig", "TqdmTextConfig", "TqdmVisionConfig", "check_distinct", "listed",
    "nearest", "quote",
]  # fmt: skip
