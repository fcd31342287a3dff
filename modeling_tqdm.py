"""tqdm, the Textual Query-Driven Mask Transformer (Pak et al., ECCV 2024, arXiv 2407.09033), for transformers.

    image ──> vision tower ──> 4 maps ──────────────> pixel decoder ──> pixels, pyramid ─┐
                   │                                       ↑ text-to-pixel attention     ├──> mask decoder ──> class
                   └──> tokens ──> context decoder ──> textual queries ──────────────────┘      and mask logits
                                         ↑
    class names ──> frozen text tower ───┘

Letters: B batch, K classes = textual queries, N pixel tokens, C hidden width, D vision width, T text width,
E image-text width, H, W image, h, w feature map, L predictions (bare queries, then every layer), P sampled points,
M supervised masks.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
from transformers.utils import ModelOutput, can_return_tuple, is_tracing
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .backbone_tqdm import TqdmVisionModel, VisionBlock
from .configuration_tqdm import TqdmConfig, listed, nearest
from .decoder_tqdm import MaskDecoder, PixelDecoder
from .layers_tqdm import (
    AttentionWeights,
    TqdmBaseModel,
    check_images,
    check_names,
    make_vector,
    resize,
    warn_untrained,
)
from .loss_tqdm import (
    LossCounts,
    check_embedding,
    check_labels,
    check_loss_fields,
    check_mask_index,
    check_seeds,
    choose_points,
    class_loss,
    count_losses,
    dice_loss,
    mask_loss,
    mix_bits,
    name_layers,
    sample_labels,
    sample_logits,
    score_map_loss,
    supervised_masks,
    textual_loss,
    visual_loss,
)
from .text_tqdm import TextualQueries
from .windows_tqdm import Segmenter

# Registers the class with `pipeline("image-segmentation")`, which otherwise reports it as unsupported.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES.setdefault("tqdm", "TqdmForSemanticSegmentation")


@dataclass
class TqdmModelOutput(ModelOutput):
    """Raw predictions; class and mask logits start with the bare queries and end with the last layer.

    class_logits (B, L, K, K + 1): the last column is "no object". L is 1 where only the last layer was asked for.
    mask_logits (B, L, K, h, w): at a quarter of the image, before the sigmoid.
    score_map (B, K, h, w): cosine of every patch with every class text; only with all layers.
    text_embeddings (B, K, E): the textual queries after the context decoder.
    image_embedding (B, E): the image in the image-text space, not normalised.
    hidden_states, (B, 1 + N, D) each, before and after every block of the vision tower, and attentions, (B, heads,
    1 + N, 1 + N) each, of every block: on request.
    """

    class_logits: Tensor | None = None
    mask_logits: Tensor | None = None
    score_map: Tensor | None = None
    text_embeddings: Tensor | None = None
    image_embedding: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class TqdmSemanticSegmenterOutput(ModelOutput):
    """Per-pixel scores, the raw predictions of `TqdmModelOutput`, and in training the losses.

    loss: sum of `losses`, which holds every weighted term by name.
    logits (B, K, H, W): sum over queries of class probability times mask probability, at the size of the input. Scores
    >= 0 whose argmax is the label map; no distribution. After sliding windows the only field.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    class_logits: Tensor | None = None
    mask_logits: Tensor | None = None
    score_map: Tensor | None = None
    text_embeddings: Tensor | None = None
    image_embedding: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


# Inside `from_pretrained`: its argument ignore_mismatched_sizes.
_LOADING: ContextVar[bool | None] = ContextVar("_LOADING", default=None)


# Fields of the configuration that a class list decides.
CLASS_FIELDS = ("id2label", "query_texts", "display_names", "token_ids", "frozen_texts")


class TqdmPreTrainedModel(TqdmBaseModel):
    """Ties the model classes to their configuration, and the rows of the weights to query texts."""

    config: TqdmConfig
    base_model_prefix = "model"

    def __init__(self, config: TqdmConfig):
        config.validate()
        wanted = choose_rows(config)
        super().__init__(config)
        self._wanted = wanted  # by `from_pretrained`, once the weights are there

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; `id2label` orders and chooses classes by name, `display_names` renames them.

        A start model, which is not trained, takes any names. A trained one raises ValueError for names that it does not
        know, unless `ignore_mismatched_sizes` is True: their parts start at random, with a warning.
        """
        loading = _LOADING.set(bool(kwargs.get("ignore_mismatched_sizes")))
        try:
            loaded = super().from_pretrained(*args, **kwargs)
        except ValueError:
            raise
        except Exception as error:  # whatever damaged files and other kinds of folders cause in the library
            kind, reason = type(error), " ".join(str(error).split())[:180]
            if kind is RuntimeError:
                reason = "weights of another shape than config.json says, see above"
            elif kind.__name__ == "SafetensorError":
                reason = f"its weights are damaged or no safetensors file ({reason})"
            elif kind is TypeError:
                reason = f"its config.json holds no fields or unknown ones ({reason})"
            name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
            raise (kind if kind in (OSError, RuntimeError, ImportError) else ValueError)(
                f"cannot load {name}: {reason}; save, convert or download the model again"
            ) from error
        finally:
            _LOADING.reset(loading)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model._wanted is not None:
            model.set_classes(model._wanted)
            model._wanted = None
        return loaded

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; the folder gets this code and the names by which every Auto class finds it."""
        self.config.auto_map = {
            "AutoConfig": "configuration_tqdm.TqdmConfig",
            "AutoModel": "modeling_tqdm.TqdmModel",
            "AutoModelForSemanticSegmentation": "modeling_tqdm.TqdmForSemanticSegmentation",
        }
        super().save_pretrained(*args, **kwargs)

    @torch.no_grad()
    def set_classes(self, id2label: dict[int, str]) -> None:
        """Changes the class list, in place. Classes that keep their name keep their weights, others get random ones.

        A class is its text, a query position, a text position and a row of the class head. Known names, query texts or
        display names, are matched by text; new ones become queries, with a warning for a trained model. With
        class_head="cosine" a class is its text alone, and new ones need no training. Gradients stay switched on or off
        as they are; make the optimiser afterwards.
        Raises ValueError, changing nothing, for a list that `TqdmConfig` refuses, names too long for the position
        table, new names after `freeze_text`, offloaded weights, and a class head with adapters or quantised weights.
        """
        config = copy.deepcopy(self.config)
        config.set_classes(id2label)
        rows = [
            self.config.query_texts.index(text) if text in self.config.query_texts else None
            for text in config.query_texts
        ]
        new = [text for text, row in zip(config.query_texts, rows, strict=True) if row is None]
        if new and config.frozen_texts is not None:
            raise ValueError(
                f"this model has no text tower for {listed(new)}; the nearest of its {len(self.config.query_texts)} "
                f"texts are {listed(nearest(new[0], self.config.query_texts))}; load the model it was made from"
            )
        queries = [module for module in self.modules() if isinstance(module, TextualQueries)]
        tables = make_class_tables(self, rows)
        if config.frozen_texts is None:
            for module in queries:
                module.set_texts(config)  # the last that can fail
        for module, name, values in tables:
            setattr(module, name, values)
            if isinstance(module, nn.Linear):
                module.out_features = len(rows) + 1
            if isinstance(module, nn.Embedding):
                module.num_embeddings = len(rows)
        if config.frozen_texts is not None:
            config.frozen_texts = list(config.query_texts)
            for module in queries:
                module.encoded = module.encoded[rows]
        for name in CLASS_FIELDS:
            setattr(self.config, name, getattr(config, name))
        if new and config.trained and not config.has_open_classes:
            warnings.warn(f"classes without training: {', '.join(new)}; their parts are random", stacklevel=2)

    @torch.no_grad()
    def use_class_vectors(self, vectors: Tensor, about: dict[str, Any], centre: bool = False) -> None:
        """Takes class texts as vectors, in place, for text tower and prompt, which are dropped.

        vectors (V, E): one per name in about["names"]; about: see `class_vectors` of `TqdmConfig`. Classes keep their
        weights. Raises ValueError, changing nothing, for vectors of another shape and classes without one.
        """
        config = copy.deepcopy(self.config)
        config.queries, config.class_vectors, config.centre_class_vectors = "vectors", about, centre
        config.frozen_texts = None
        config.set_classes(config.id2label)
        shape = (len(about["names"]), config.text_config.projection_dim)
        if tuple(vectors.shape) != shape:
            raise ValueError(
                f"class vectors are {tuple(vectors.shape)} and must be {shape}: names, width of the model's image-text "
                "space; use vectors of the model's own CLIP"
            )
        queries = [module for module in self.modules() if isinstance(module, TextualQueries)]
        if any(module.gamma.is_meta for module in queries):
            raise ValueError("use_class_vectors() needs the weights, and they are offloaded; load them onto one device")
        for module in queries:
            module.use_vectors(config, vectors)
        for name in (*CLASS_FIELDS, "queries", "class_vectors", "centre_class_vectors"):
            setattr(self.config, name, getattr(config, name))


def choose_rows(config: TqdmConfig) -> dict[int, str] | None:
    """Makes a configuration fit the weights of a model to be made; what its classes have to become after loading.

    A model that is made and not loaded has rows for the names in `id2label`. Raises ValueError for names that trained
    weights have no rows for.
    """
    wanted, ignore = config.id2label, _LOADING.get()
    if config.class_names == config.row_names:
        return None
    if config.has_open_classes:
        config.set_classes(wanted)
        return None
    unknown = [name for name, row in zip(wanted.values(), config.rows_of(wanted.values()), strict=True) if row is None]
    if config.trained and (ignore is None or (unknown and not ignore)):
        of = f"no training for {listed(unknown)}, only for {listed(config.query_texts)}" if unknown else "another order"
        raise ValueError(
            f"id2label: the weights have {of}; rename with display_names={{old: new}}, add queries with set_classes() "
            "after loading, or from_pretrained(..., ignore_mismatched_sizes=True)"
        )
    if ignore is None:
        config.set_classes(wanted)
        return None
    config.id2label = dict(enumerate(config.row_names))
    return wanted


def plain_layers(module: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    """The layer itself, or the copies of it that peft's `modules_to_save` holds; raises ValueError for any other."""
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        return [plain_layers(layer, kind)[0] for layer in (module.original_module, *module.modules_to_save.values())]
    if type(module) is not kind or not isinstance(module.weight, nn.Parameter) or not module.weight.is_floating_point():
        raise ValueError(
            f"set_classes() needs a plain {kind.__name__} per class and finds {type(module).__name__}; merge or remove "
            "adapters and quantise afterwards"
        )
    return [module]


def make_class_tables(model: nn.Module, rows: list[int | None]) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Every parameter with a row per class, as (module, name, parameter) of these rows of it; None: a random row."""
    parts = list(model.modules())
    pixels, texts, masks = (
        [m for m in parts if isinstance(m, kind)] for kind in (PixelDecoder, TextualQueries, MaskDecoder)
    )
    config, count, tables = model.config, len(rows), []
    shared = config.class_head == "cosine"  # positions, and no row per class in the head

    def add(modules: list[nn.Module], name: str, fresh: Tensor, rows: list[int | None] = rows) -> None:
        tables.extend((module, name, with_rows(getattr(module, name), rows, fresh)) for module in modules)

    if config.text_to_pixel_attention and not shared:
        add(pixels, "text_positions", torch.randn(count, config.hidden_size))
    if config.queries == "random" and config.frozen_texts is None:
        vectors = [layer for module in texts for layer in plain_layers(module.class_vectors, nn.Embedding)]
        add(vectors, "weight", torch.randn(count, vectors[0].embedding_dim))
    if shared:
        return tables
    add(masks, "query_positions", torch.randn(count, config.hidden_size))
    heads = [layer for module in masks for layer in plain_layers(module.class_head, nn.Linear)]
    fresh = nn.Linear(config.hidden_size, count + 1)
    rows = [*rows, heads[0].out_features - 1]  # the last row of the class head is no object
    add(heads, "weight", fresh.weight, rows)
    add(heads, "bias", fresh.bias, rows)
    return tables


class TqdmModel(TqdmPreTrainedModel):
    """Image -> class and mask logits of every class, before and after every decoder layer."""

    _can_record_outputs = {
        "hidden_states": VisionBlock,
        "attentions": OutputRecorder(AttentionWeights, layer_name="vision_tower"),
    }

    def __init__(self, config: TqdmConfig):
        super().__init__(config)
        self.vision_tower = TqdmVisionModel._from_config(config.vision_config)
        self.text_queries = TextualQueries(config)
        self.pixel_decoder = PixelDecoder(config)
        self.mask_decoder = MaskDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The patch convolution."""
        return self.vision_tower.get_input_embeddings()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor,
        encoded_text: Tensor | None = None,
        all_layers: bool = True,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> TqdmModelOutput:
        """pixel_values (B, 3, H, W), normalised; encoded_text (K, E): a cached `text_queries.encode()`, or none.

        all_layers=False: only the last layer's predictions, which are all that inference needs.
        output_hidden_states, output_attentions: of the vision tower, recorded by transformers.
        """
        check_images(pixel_values, self.config.vision_config.num_channels)
        # 4 x (B, D, h, w), (B, 1 + N, E)
        features, tokens = self.vision_tower(pixel_values, output_attentions=output_attentions)
        class_texts = self.text_queries.encode() if encoded_text is None else encoded_text  # (K, E)
        text = self.text_queries(tokens, class_texts)  # (B, K, E)
        pixels, pyramid = self.pixel_decoder(features, text)  # (B, C, 4h, 4w), 3 x (B, C, h, w)
        class_logits, mask_logits = self.mask_decoder(text, pixels, pyramid, all_layers, class_texts)
        score_map = None
        if all_layers:
            patches = F.normalize(tokens[:, 1:], dim=-1)  # (B, N, E)
            score_map = (F.normalize(text, dim=-1) @ patches.transpose(1, 2)).unflatten(2, features[2].shape[-2:])
        return TqdmModelOutput(
            class_logits=torch.stack(class_logits, 1),  # L x (B, K, K + 1) -> (B, L, K, K + 1)
            mask_logits=torch.stack(mask_logits, 1),  # L x (B, K, h, w) -> (B, L, K, h, w)
            score_map=score_map,
            text_embeddings=text,
            image_embedding=tokens[:, 0],
        )


def semantic_scores(class_logits: Tensor, mask_logits: Tensor) -> Tensor:
    """class_logits (B, K, K + 1), mask_logits (B, K, h, w) -> (B, K, h, w): sum over q of P(k | q) sigmoid(mask q)."""
    return torch.einsum("bqk,bqhw->bkhw", class_logits.softmax(-1)[..., :-1], mask_logits.sigmoid())


def with_rows(values: nn.Parameter, rows: list[int | None], fresh: Tensor) -> nn.Parameter:
    """A parameter of these rows of `values`, and of the same row of `fresh` where the number is None."""
    if values.is_meta:
        raise ValueError("set_classes() needs the weights, and they are offloaded; load the model onto one device")
    parts = [fresh[new] if old is None else values[old] for new, old in enumerate(rows)]
    rows = torch.stack([part.to(values.device, values.dtype) for part in parts])
    return nn.Parameter(rows, requires_grad=values.requires_grad)


class TqdmForSemanticSegmentation(Segmenter, TqdmPreTrainedModel):
    """tqdm with its losses, per-pixel scores and sliding-window inference."""

    # Losses are divided by different counts, so Trainer has to average over accumulated batches.
    accepts_loss_kwargs = False

    def __init__(self, config: TqdmConfig):
        super().__init__(config)
        self.model = TqdmModel(config)
        self.is_fast = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        mask_index: Tensor | None = None,
        reference_image_embedding: Tensor | None = None,
        reference_text_embedding: Tensor | None = None,
        loss_counts: LossCounts | None = None,
        sample_seeds: Tensor | None = None,
        output_logits: bool = True,
        use_windows: bool | None = None,
        all_layers: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> TqdmSemanticSegmenterOutput:
        """Predict, and with labels compute the losses.

        pixel_values (B, 3, H, W): normalised images. labels (B, H, W): class ids, `config.ignore_index` left out.
        mask_index (M, 2): `supervised_masks(labels, ...)`; computed here if not given, which makes a GPU wait.
        reference_image_embedding (B, E): of the teacher; without it there is no visual loss.
        reference_text_embedding (K, E): `model.text_queries.encode_reference()`; computed here if not given.
        loss_counts: what the losses are divided by where this batch is part of a larger one, see `LossCounts`.
        sample_seeds (B,) int32: of every image's points in the mask losses, which then do not depend on its batch.
        output_logits: False leaves out the full-size scores, which training does not need.
        use_windows: slide windows over the image (then `logits` is the only field); by default in eval mode without
        labels, where the image is larger than `config.window_size`.
        all_layers: raw predictions of every layer, by default only in training mode and with labels.
        output_hidden_states, output_attentions: as in `TqdmModel`; there are none with windows.
        Raises ValueError, naming the argument, for images that are no normalised batch (B, 3, H, W) or under two
        patches a side, and for labels of another size, type, or unknown ids.
        """
        config, (height, width) = self.config, self._check_inputs(pixel_values, labels)
        recorded = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        if use_windows is None:
            predicts = labels is None and not self.training
            use_windows = predicts and max(height, width) > (config.window_size or math.inf)
        if use_windows:
            if any(recorded.values()):
                raise ValueError("windows have no hidden states of the whole image; pass use_windows=False")
            return TqdmSemanticSegmenterOutput(logits=self.window_scores(pixel_values))

        recorded = {name: value for name, value in recorded.items() if value is not None}  # else the configuration's
        all_layers = labels is not None or (self.training if all_layers is None else all_layers)
        outputs = self.model(pixel_values, all_layers=all_layers, return_dict=True, **recorded)
        loss = losses = None
        if labels is not None:
            losses = self.compute_losses(
                outputs, labels.long(), mask_index, reference_image_embedding, reference_text_embedding, loss_counts,
                sample_seeds,
            )  # fmt: skip
            loss = torch.stack(list(losses.values())).sum()
        logits = self._scores(outputs, height, width) if output_logits else None
        return TqdmSemanticSegmenterOutput(loss=loss, logits=logits, losses=losses, **outputs)

    def _check_inputs(self, pixel_values: Tensor, labels: Tensor | None) -> tuple[int, int]:
        """Checks images and labels; returns height and width. A training step makes the model a trained one."""
        check_images(pixel_values, self.config.vision_config.num_channels)
        check_names(self.config)
        if labels is None:
            warn_untrained(self.config)
        else:
            check_labels(labels, pixel_values, self.config.num_labels, self.config.ignore_index)
            if self.training and not self.config.trained and not is_tracing():
                self.config.trained = True
        return pixel_values.shape[-2:]

    def compute_losses(
        self,
        outputs: TqdmModelOutput,
        labels: Tensor,
        mask_index: Tensor | None = None,
        reference_image_embedding: Tensor | None = None,
        reference_text_embedding: Tensor | None = None,
        loss_counts: LossCounts | None = None,
        sample_seeds: Tensor | None = None,
        points: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Every weighted term by name; arguments as in `forward`.

        loss_class, loss_mask and loss_dice belong to the last layer, loss_class_0 ... to the bare queries and the
        layers before it. points (L, M, P, 2), x, y in 0 ... 1, replace the random ones.
        """
        config, covered = self.config, self.model.vision_tower.padded_size(*labels.shape[-2:])
        if mask_index is None:
            mask_index = supervised_masks(labels, config.num_labels, config.ignore_index)
        if reference_text_embedding is None:
            reference_text_embedding = self.model.text_queries.encode_reference()
        finite = not self.training  # a training names the images of a loss that is not
        check_embedding("reference_image_embedding", reference_image_embedding, outputs.image_embedding, finite)
        check_embedding("reference_text_embedding", reference_text_embedding, outputs.text_embeddings[0], finite)
        check_mask_index(mask_index, len(labels), config.num_labels)
        check_seeds(sample_seeds, len(labels))
        check_loss_fields(config)
        if not isinstance(loss_counts, (LossCounts, type(None))):
            raise ValueError(
                f"loss_counts is a {type(loss_counts).__name__} and must be LossCounts, see count_losses()"
            )
        counts = loss_counts
        if counts is None:
            counts = count_losses(
                mask_index, labels, config.num_labels, config.no_object_weight, config.score_map_loss_over,
                config.ignore_index,
            )  # fmt: skip

        point_logits, targets = self._sample_masks(
            outputs.mask_logits, labels, mask_index, covered, sample_seeds, points
        )  # (L, M, P) each
        num_masks = counts.masks.clamp(min=1)
        by_class = class_loss(outputs.class_logits, mask_index, config.no_object_weight, counts.class_weight)  # (L)
        decoder = name_layers(
            loss_class=config.class_loss_weight * by_class,
            loss_mask=config.mask_loss_weight * mask_loss(point_logits, targets, num_masks),
            loss_dice=config.dice_loss_weight * dice_loss(point_logits, targets, num_masks),
        )
        num_pixels = counts.labelled.clamp(min=1)
        return decoder | self._regularisers(
            outputs, labels, covered, num_pixels, reference_image_embedding, reference_text_embedding
        )

    def _regularisers(
        self,
        outputs: TqdmModelOutput,
        labels: Tensor,
        covered: tuple[int, int],
        num_pixels: Tensor,
        reference_image_embedding: Tensor | None,
        reference_text_embedding: Tensor,
    ) -> dict[str, Tensor]:
        """The weighted regularisers by name, equations 5 to 7 of the paper; the visual one with a teacher only."""
        config, terms = self.config, {}
        textual = textual_loss(outputs.text_embeddings, reference_text_embedding)
        terms["loss_textual"] = config.textual_loss_weight * textual
        if reference_image_embedding is not None:
            visual = visual_loss(outputs.image_embedding, reference_image_embedding)
            terms["loss_visual"] = config.visual_loss_weight * visual
        terms["loss_score_map"] = config.score_map_loss_weight * score_map_loss(
            outputs.score_map, labels, covered, config.score_map_temperature, config.ignore_index, num_pixels
        )
        return terms

    def _sample_masks(
        self,
        mask_logits: Tensor,
        labels: Tensor,
        mask_index: Tensor,
        covered: tuple[int, int],
        sample_seeds: Tensor | None,
        points: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Logits and labels in 0 ... 1, (L, M, P) each, of the supervised masks at `points`, by default random ones.

        mask_logits (B, L, K, h, w) cover `covered` (rows, columns) pixels, of which labels (B, H, W) are the top left.
        """
        config, (rows, columns), (height, width) = self.config, covered, labels.shape[-2:]
        image, wanted = mask_index.unbind(-1)
        mask_logits = mask_logits[image, :, wanted].transpose(0, 1).float()  # (L, M, h, w)
        extent = make_vector((width / columns, height / rows), mask_logits.device)
        if points is None:
            seeds = None if sample_seeds is None else mix_bits(sample_seeds)[image] + wanted.int()
            points = choose_points(
                mask_logits, extent, config.num_points, config.oversample_ratio, config.importance_sample_ratio, seeds
            )
        return sample_logits(mask_logits, points * extent), sample_labels(labels, mask_index, points)

    def _scores(self, outputs: TqdmModelOutput, height: int, width: int) -> Tensor:
        """Scores (B, K, height, width) of the last layer, without the padding of the last patches."""
        scores = semantic_scores(outputs.class_logits[:, -1], outputs.mask_logits[:, -1])
        return resize(scores, self.model.vision_tower.padded_size(height, width))[..., :height, :width]

    def score(self, pixel_values: Tensor, encoded_text: Tensor | None = None) -> Tensor:
        """Scores (B, K, H, W) of images (B, 3, H, W), without windows; arguments as in `TqdmModel`."""
        outputs = self.model(pixel_values, encoded_text, all_layers=False, return_dict=True)
        return self._scores(outputs, *pixel_values.shape[-2:])

    def window_scorer(self) -> Callable[[Tensor], Tensor]:
        """`score` with class texts that are encoded once."""
        encoded = self.model.text_queries.encode()  # (K, E)
        return lambda windows: self.score(windows, encoded)

    def freeze_text(self) -> None:
        """Stores the class texts' embeddings and drops the text tower, in place: half the size, the same predictions.

        Saves and loads like any other model. It raises ValueError in training, and for class names that it was not
        frozen with.
        """
        self.model.text_queries.freeze()

    def prepare_for_inference(self) -> "TqdmForSemanticSegmentation":
        """Makes the model fast, in place, and returns it in eval mode; scores stay within rounding (1e-4).

        Stores the class texts as `freeze_text` does and replaces layers by those of fast_tqdm.py. Afterwards the model
        only predicts: training and saving raise ValueError, so save it before.
        Raises ValueError, changing nothing, for a model that is split over several devices, and for layers with
        adapters, hooks, masks or quantised weights.
        """
        from .fast_tqdm import make_fast

        devices = set((getattr(self, "hf_device_map", None) or {}).values())
        if len(devices) > 1:
            raise ValueError(f"this model is split over {sorted(map(str, devices))}; load it onto one device first")
        if not self.is_fast:
            make_fast(self.model)
            self.is_fast = True
        return self.eval()

    @contextmanager
    def cache_texts(self) -> Iterator[None]:
        """Encodes the class texts once for all predictions inside, where the weights must not change."""
        queries = self.model.text_queries
        with torch.no_grad():
            encoded = queries.encode()
        queries.encode = lambda: encoded
        try:
            yield
        finally:
            del queries.encode

    def train(self, mode: bool = True) -> "TqdmForSemanticSegmentation":
        """Raises ValueError for training mode after `prepare_for_inference`."""
        if mode and self.is_fast:
            raise ValueError("prepare_for_inference() made this model for predicting only; load it again to train it")
        return super().train(mode)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; raises ValueError after `prepare_for_inference` and for names that cannot be loaded."""
        if self.is_fast:
            raise ValueError("prepare_for_inference() made this model for predicting only; load it again and save that")
        self.config.check_loadable()
        super().save_pretrained(*args, **kwargs)


TqdmModel.register_for_auto_class("AutoModel")
TqdmForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")

__all__ = [
    "TqdmForSemanticSegmentation",
    "TqdmModel",
    "TqdmModelOutput",
    "TqdmPreTrainedModel",
    "TqdmSemanticSegmenterOutput",
    "semantic_scores",
]
