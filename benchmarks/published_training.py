"""A training step in the published order of work, with this repository's modules, for training_speed.py.

The frozen copy of the vision tower runs in train mode and float32, with a pyramid that nothing reads. The forward pass
is that of published_order.py. The losses go layer by layer and image by image: 12,544 points of every predicted and
every true mask are sampled for a matcher whose answer is known, the masks of supervised queries are picked by a mask of
booleans, and true masks are 0/1 pictures of the full size. The score map is enlarged and its cross-entropy recorded
step by step, the host reads every loss, and AdamW is not fused.

Where the order of work is not known to the last copy, the cheaper way is taken; the full-size masks are made outside of
the step, as the published data pipeline does.

Letters: B batch, K classes, n true masks of an image, M of all images, P points, H, W image, h, w mask logits.
"""

import copy
from typing import Any

import torch
from published_order import PublishedOrder
from torch import Tensor
from torch.nn import functional as F

from tqdm_seg.loss_tqdm import (
    choose_points,
    class_loss,
    dice_loss,
    mask_loss,
    sample_logits,
    textual_loss,
    visual_loss,
)
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation
from tqdm_seg.train import batch_counts

# Seconds of the published code itself, CLIP ViT-B/16, batch 1, 512x512, float32, without optimiser: measured once on
# another machine, torch 2.13, 2 threads. Only the shares compare.
PUBLISHED_SECONDS = {"forward and losses": 6.837, "backward": 9.386}


def full_size_masks(labels: Tensor, mask_index: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of every image of labels (B, H, W): its classes (n) and their masks (n, H, W) of 0 and 1."""
    classes = [mask_index[mask_index[:, 0] == image, 1] for image in range(len(labels))]
    return [
        (wanted, (picture == wanted[:, None, None]).to(torch.uint8))
        for picture, wanted in zip(labels, classes, strict=True)
    ]


class PublishedTraining:
    """Losses of a model in the published order of work."""

    def __init__(self, model: TqdmForSemanticSegmentation):
        self.model, self.config = model, model.config
        self.order = PublishedOrder(model)
        self.reference = copy.deepcopy(model.model.vision_tower)  # its weights learn nothing, and record nothing
        self.reference_text = model.model.text_queries.encode_reference()  # (K, E)

    @torch.no_grad()
    def reference_embedding(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (B, 3, H, W) -> (B, E)."""
        _, tokens = self.reference(pixel_values)
        return tokens[:, 0]

    def losses(self, batch: dict[str, Any], reference: Tensor, points: Tensor | None = None) -> dict[str, Tensor]:
        """Every weighted term by name, as `compute_losses` has them.

        batch: pixel_values (B, 3, H, W), labels (B, H, W), mask_index (M, 2), masks: of `full_size_masks`.
        reference (B, E); points (L, M, P, 2) replace the random ones.
        """
        config, order = self.config, self.order
        features, tokens = order.backbone(batch["pixel_values"])
        text = order.context_decoder(tokens, order.text_encoder())  # (B, K, E)
        patches = F.normalize(tokens[:, 1:], dim=-1)
        score_map = torch.einsum("bke,bne->bkn", F.normalize(text, dim=-1), patches).unflatten(2, features[2].shape[2:])
        pixels, pyramid = order.pixel_decoder(features, text)
        terms: dict[str, Tensor] = {}
        layers = list(zip(*order.mask_decoder(text, pixels, pyramid), strict=True))
        for number, (class_logits, mask_logits) in enumerate(layers):
            suffix = "" if number == len(layers) - 1 else f"_{number}"
            values = self.layer_losses(class_logits, mask_logits, batch, None if points is None else points[number])
            terms |= {f"{name}{suffix}": value for name, value in values.items()}
        terms["loss_textual"] = config.textual_loss_weight * textual_loss(text, self.reference_text)
        terms["loss_visual"] = config.visual_loss_weight * visual_loss(tokens[:, 0], reference)
        logits = F.interpolate(
            score_map / config.score_map_temperature, batch["labels"].shape[1:], mode="bilinear", align_corners=False
        )
        entropy = F.cross_entropy(logits, batch["labels"], ignore_index=config.ignore_index, reduction="none")
        pixels = batch_counts(batch, self.model).labelled.clamp(min=1)
        terms["loss_score_map"] = config.score_map_loss_weight * entropy.sum() / pixels
        return terms

    def layer_losses(
        self, class_logits: Tensor, mask_logits: Tensor, batch: dict[str, Any], points: Tensor | None
    ) -> dict[str, Tensor]:
        """class_logits (B, K, K + 1), mask_logits (B, K, h, w), points (M, P, 2) or random ones -> three terms."""
        config = self.config
        supervised, true_masks = [], []
        for logits, (classes, masks) in zip(mask_logits, batch["masks"], strict=True):
            self.match(logits, masks)
            positive = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
            positive[classes] = True
            supervised.append(positive)
            true_masks.append(masks[torch.arange(len(classes), device=logits.device)])
        picked = mask_logits[torch.stack(supervised)][None]  # (1, M, h, w)
        if points is None:
            points = choose_points(
                picked, picked.new_ones(2), config.num_points, config.oversample_ratio, config.importance_sample_ratio
            )[0]
        point_logits = sample_logits(picked, points[None])  # (1, M, P)
        targets = sample_logits(torch.cat(true_masks).float()[None], points[None])
        counts = batch_counts(batch, self.model)
        num_masks = counts.masks.clamp(min=1)
        return {
            "loss_class": config.class_loss_weight
            * class_loss(class_logits[:, None], batch["mask_index"], config.no_object_weight, counts.class_weight)[0],
            "loss_mask": config.mask_loss_weight * mask_loss(point_logits, targets, num_masks)[0],
            "loss_dice": config.dice_loss_weight * dice_loss(point_logits, targets, num_masks)[0],
        }

    def match(self, mask_logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """What a matcher would compare: mask_logits (K, h, w) and masks (n, H, W) at the same points of all."""
        points = torch.rand(1, 1, self.config.num_points, 2, device=masks.device)
        return tuple(
            sample_logits(maps[None], points.expand(-1, len(maps), -1, -1)) for maps in (mask_logits, masks.float())
        )
