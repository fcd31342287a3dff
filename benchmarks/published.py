"""The published order of work with this repository's plain modules: the baseline of every speed-up.

Inference, in float32 and one window at a time: the class names go through the text tower in every window, the pixel
decoder normalises after every layer and uses the last result only, every layer predicts at full quarter resolution,
score maps are thrown away. Scores and counts are summed at full size, resized to the image, softmax, argmax.

Training: the frozen teacher runs in train mode and float32 with a pyramid that nothing reads. Losses go layer by layer
and image by image: 12,544 points of every predicted and every true mask for a matcher whose answer is known, a boolean
mask picks the supervised queries, true masks are images of 0 and 1, the host reads every loss, AdamW is not fused.

Where a detail of the order is not known, the cheaper way is taken, and attention runs through torch's fused function.
On GPUs the published code samples by a compiled kernel of mmcv: there this is no measure of it.

Letters: B batch, K classes, n true masks of an image, M of all images, P points, E image-text width, H, W image, h, w
mask logits.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tqdm_seg import loss_tqdm
from tqdm_seg.configuration_tqdm import TqdmConfig
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation
from tqdm_seg.train import batch_counts
from tqdm_seg.windows_tqdm import window_corners


def random_model(preset: str, device: torch.device) -> TqdmForSemanticSegmentation:
    """The model of a preset, frozen and in eval mode, with the same random weights every time."""
    torch.manual_seed(0)
    model = TqdmForSemanticSegmentation(TqdmConfig.from_preset(preset)).eval().to(device)
    return model.requires_grad_(False)  # in inference mode the counter of operations fails on others


class PublishedOrder:
    """Label maps of a plain model in the published order of work."""

    def __init__(self, model: TqdmForSemanticSegmentation):
        self.model = model
        normalise_after_every_layer(model)

    @torch.no_grad()
    def scores(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (B, 3, H, W) -> scores (B, K, H, W) before the softmax, which leaves their order unchanged."""
        config, (batch, _, height, width) = self.model.config, pixel_values.shape
        rows, columns = min(config.window_size, height), min(config.window_size, width)
        scores = pixel_values.new_zeros(batch, config.num_labels, height, width)
        counts = pixel_values.new_zeros(batch, 1, height, width)
        for y, x in window_corners(height, width, config.window_size, config.window_stride):
            window = pixel_values[..., y : y + rows, x : x + columns]
            part = self.model(window, use_windows=False, all_layers=True).logits
            scores[..., y : y + rows, x : x + columns] += part
            counts[..., y : y + rows, x : x + columns] += 1
        return F.interpolate(scores / counts, (height, width), mode="bilinear", align_corners=False)

    def __call__(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (B, 3, H, W) -> class ids (B, H, W)."""
        return self.scores(pixel_values).softmax(1).argmax(1)


def normalise_after_every_layer(model: TqdmForSemanticSegmentation) -> None:
    """The pixel decoder computes its last norm after every layer, for nothing."""
    decoder = model.model.pixel_decoder

    def normalise(layer: nn.Module, inputs: tuple, pixels: Tensor) -> None:
        decoder.post_norm(pixels)

    for layer in decoder.layers[:-1]:
        layer.register_forward_hook(normalise)


def full_size_masks(labels: Tensor, mask_index: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Classes (n) and 0/1 masks (n, H, W) of every image of labels (B, H, W), as published."""
    classes = [mask_index[mask_index[:, 0] == image, 1] for image in range(len(labels))]
    return [(c, (image == c[:, None, None]).to(torch.uint8)) for image, c in zip(labels, classes, strict=True)]


class PublishedTraining:
    """Losses of a plain model in the published order of work."""

    def __init__(self, model: TqdmForSemanticSegmentation):
        self.model, self.config = model, model.config
        self.teacher = copy.deepcopy(model.model.vision_tower)
        self.teacher_text = model.model.text_queries.encode_reference()  # (K, E)
        normalise_after_every_layer(model)

    @torch.no_grad()
    def teacher_embedding(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (B, 3, H, W) -> (B, E)."""
        return self.teacher(pixel_values)[1][:, 0]

    def losses(self, batch: dict[str, Any], teacher: Tensor, points: Tensor | None = None) -> dict[str, Tensor]:
        """Every weighted term by name, as `compute_losses` has them.

        batch: pixel_values (B, 3, H, W), labels (B, H, W), mask_index (M, 2), masks: `full_size_masks`.
        teacher (B, E); points (L, M, P, 2) replace the random ones.
        """
        config, labels = self.config, batch["labels"]
        outputs = self.model.model(batch["pixel_values"], all_layers=True)
        counts = batch_counts(batch, self.model)
        terms, last = {}, outputs.class_logits.shape[1] - 1
        for layer in range(last + 1):
            chosen = None if points is None else points[layer]
            values = self.layer_losses(outputs, layer, batch, counts, chosen)
            terms |= {name if layer == last else f"{name}_{layer}": value for name, value in values.items()}
        textual = loss_tqdm.textual_loss(outputs.text_embeddings, self.teacher_text)
        terms["loss_textual"] = config.textual_loss_weight * textual
        terms["loss_visual"] = config.visual_loss_weight * loss_tqdm.visual_loss(outputs.image_embedding, teacher)
        score_map = outputs.score_map / config.score_map_temperature
        score_map = F.interpolate(score_map, labels.shape[1:], mode="bilinear", align_corners=False)
        entropy = F.cross_entropy(score_map, labels, ignore_index=config.ignore_index, reduction="none").sum()
        terms["loss_score_map"] = config.score_map_loss_weight * entropy / counts.labelled.clamp(min=1)
        return terms

    def layer_losses(
        self, outputs: Any, layer: int, batch: dict[str, Any], counts: loss_tqdm.LossCounts, points: Tensor | None
    ) -> dict[str, Tensor]:
        """Three terms of a layer at points (M, P, 2) or random ones."""
        class_logits, mask_logits = outputs.class_logits[:, layer], outputs.mask_logits[:, layer]
        config = self.config
        supervised = torch.zeros(mask_logits.shape[:2], dtype=torch.bool, device=mask_logits.device)
        for positive, logits, (classes, masks) in zip(supervised, mask_logits, batch["masks"], strict=True):
            matched = torch.rand(1, 1, config.num_points, 2, device=masks.device)
            for maps in (logits, masks.float()):  # what a matcher would compare
                loss_tqdm.sample_logits(maps[None], matched.expand(-1, len(maps), -1, -1))
            positive[classes] = True
        picked = mask_logits[supervised][None]  # (1, M, h, w)
        if points is None:
            points = loss_tqdm.choose_points(
                picked, picked.new_ones(2), config.num_points, config.oversample_ratio, config.importance_sample_ratio
            )[0]
        point_logits = loss_tqdm.sample_logits(picked, points[None])  # (1, M, P)
        targets = loss_tqdm.sample_logits(torch.cat([masks for _, masks in batch["masks"]]).float()[None], points[None])
        masks = counts.masks.clamp(min=1)
        weights = config.no_object_weight, counts.class_weight
        entropy = loss_tqdm.class_loss(class_logits[:, None], batch["mask_index"], *weights)
        return {
            "loss_class": config.class_loss_weight * entropy[0],
            "loss_mask": config.mask_loss_weight * loss_tqdm.mask_loss(point_logits, targets, masks)[0],
            "loss_dice": config.dice_loss_weight * loss_tqdm.dice_loss(point_logits, targets, masks)[0],
        }
