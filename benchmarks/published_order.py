"""The published order of work, with this repository's modules: what every speed-up is measured against.

Per window of the image, one window at a time and in float32: the class names go through the text tower again, the
pyramid is made by separate layers, deformable attention samples level by level into memory and stacks the samples, the
pixel decoder normalises after every layer for one use, masks and class logits of every layer are made at full quarter
resolution, the attention mask after the last layer and the score map are made and thrown away. Then come the float
copies at full size: sums divided by counts, resized to the image, a softmax over the classes, the argmax.

Where the order of work is not known to the last copy, the cheaper way is taken, and attention runs through torch's
fused function, as in our model. On GPUs the published code samples by a compiled kernel of mmcv that is not at hand
here: there this is no measure of it.

Letters: B batch, K classes = textual queries, N pixel tokens, C hidden, D vision width, E image-text width, h, w a map.
"""

import copy
import time
from collections.abc import Callable

import torch
from measure import synchronise
from torch import Tensor, nn
from torch.nn import functional as F

from tqdm_seg.decoder_tqdm import cell_centres, sine_positions
from tqdm_seg.layers_tqdm import additive_mask
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation
from tqdm_seg.windows_tqdm import window_corners

# Methods of `PublishedOrder`; what else it does is "rest".
PARTS = ("backbone", "text_encoder", "context_decoder", "pixel_decoder", "mask_decoder")

# Seconds of the published code itself, CLIP ViT-B/16, one window of 512x512: measured once on another machine, torch
# 2.13, 2 threads. Only the shares compare.
PUBLISHED_SECONDS = {
    "backbone": 1.927, "text_encoder": 0.135, "context_decoder": 0.014, "pixel_decoder": 1.811, "mask_decoder": 0.147,
    "rest": 0.157,
}  # fmt: skip


def deformable_attention(
    module: nn.Module, queries: Tensor, pixels: Tensor, centres: Tensor, sizes: list[tuple[int, int]]
) -> Tensor:
    """queries, pixels (B, N, C), centres (N, 2), sizes of the levels -> (B, N, C), one `grid_sample` per level."""
    batch, length, _ = queries.shape
    shape = (batch, length, module.num_heads, len(sizes), module.num_points)
    offsets = module.sampling_offsets(queries).view(*shape, 2)  # in cells of each level
    weights = module.attention_weights(queries).view(*shape[:3], -1).softmax(-1)
    values = module.value_proj(pixels).unflatten(-1, (module.num_heads, -1))  # (B, N, heads, C / heads)
    values = values.permute(0, 2, 3, 1).flatten(0, 1)  # (B heads, C / heads, N)
    sampled = []
    for level, (value, (h, w)) in enumerate(zip(values.split([h * w for h, w in sizes], -1), sizes, strict=True)):
        places = centres[:, None, None] + offsets[:, :, :, level] / offsets.new_tensor((w, h))
        grid = (2 * places - 1).transpose(1, 2).flatten(0, 1)  # (B heads, N, points, 2) in -1 ... 1
        sampled.append(F.grid_sample(value.unflatten(-1, (h, w)), grid, align_corners=False))  # (..., N, points)
    weights = weights.transpose(1, 2).flatten(0, 1)[:, None]  # (B heads, 1, N, levels points)
    output = (torch.stack(sampled, -2).flatten(-2) * weights).sum(-1)  # (B heads, C / heads, N)
    return module.output_proj(output.view(batch, -1, length).transpose(1, 2))


class PublishedOrder:
    """Label maps of a model in the published order of work; one method per part of `PARTS`."""

    def __init__(self, model: TqdmForSemanticSegmentation):
        self.model = model.model
        self.config = model.config

    def backbone(self, pixel_values: Tensor) -> tuple[list[Tensor], Tensor]:
        """pixel_values (B, 3, H, W) -> four maps, fine to coarse, and tokens (B, 1 + N, E)."""
        return self.model.vision_tower(pixel_values)

    def text_encoder(self) -> Tensor:
        """The class names (K, E)."""
        return self.model.text_queries.encode()

    def context_decoder(self, tokens: Tensor, encoded: Tensor) -> Tensor:
        """tokens (B, 1 + N, E), encoded (K, E) -> textual queries (B, K, E)."""
        return self.model.text_queries(tokens, encoded)

    def pixel_decoder(self, features: list[Tensor], text: Tensor) -> tuple[Tensor, list[Tensor]]:
        """features 4 x (B, D, h, w), text (B, K, E) -> pixels (B, C, 4h, 4w), 3 maps (B, C, h, w) coarse to fine."""
        decoder = self.model.pixel_decoder
        finest, *coarser = features
        maps = [project(x) for project, x in zip(decoder.inputs, reversed(coarser), strict=True)]  # coarse to fine
        sizes = [tuple(x.shape[-2:]) for x in maps]
        pixels = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)  # (B, N, C)
        positions = [sine_positions(*size, pixels.shape[-1], pixels.device) for size in sizes]
        positions = torch.cat([p + level for p, level in zip(positions, decoder.level_embedding, strict=True)], 1)
        centres = cell_centres(sizes, pixels.device)  # (N, 2)
        text = decoder.text_proj(text)  # (B, K, C)
        text_keys = text + decoder.text_positions
        for layer in decoder.layers:
            attended = deformable_attention(layer.deformable, pixels + positions, pixels, centres, sizes)
            pixels = layer.norm1(pixels + attended)
            pixels = layer.norm2(pixels + layer.text_attention(pixels + positions, text_keys, text))
            pixels = layer.norm3(pixels + layer.ffn(pixels))
            normed = decoder.post_norm(pixels)  # after every layer, and only the last one is used
        split = normed.transpose(1, 2).split([h * w for h, w in sizes], 2)
        pyramid = [x.unflatten(2, size) for x, size in zip(split, sizes, strict=True)]
        upsampled = F.interpolate(pyramid[-1], finest.shape[-2:], mode="bilinear", align_corners=False)
        return decoder.mask_features(decoder.output(decoder.lateral(finest) + upsampled).relu()), pyramid

    def predict(self, queries: Tensor, pixels: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """queries (B, K, C), pixels (B, C, h, w) -> class and mask logits, attention mask on a level of this size."""
        decoder = self.model.mask_decoder
        queries = decoder.post_norm(queries)
        mask_logits = torch.einsum("bkc,bchw->bkhw", decoder.mask_head(queries), pixels)
        coarse = F.interpolate(mask_logits, size, mode="bilinear", align_corners=False)
        blocked = coarse.flatten(2).sigmoid() < 0.5  # (B, K, N)
        blocked = blocked & ~blocked.all(-1, keepdim=True)
        return decoder.class_head(queries), mask_logits, additive_mask(blocked, mask_logits.dtype)

    def mask_decoder(self, text: Tensor, pixels: Tensor, pyramid: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """text (B, K, E), pixels (B, C, h, w), pyramid coarse to fine -> class and mask logits of every layer."""
        decoder = self.model.mask_decoder
        queries = decoder.text_proj(text)  # (B, K, C)
        sizes = [tuple(level.shape[-2:]) for level in pyramid]
        values, keys = [], []
        for level, size, embedding in zip(pyramid, sizes, decoder.level_embedding, strict=True):
            values.append(level.flatten(2).transpose(1, 2) + embedding)  # (B, N, C)
            keys.append(values[-1] + sine_positions(*size, level.shape[1], level.device))
        positions = decoder.query_positions
        predictions = [self.predict(queries, pixels, sizes[0])]
        for index, layer in enumerate(decoder.layers):
            level, attention_mask = index % len(sizes), predictions[-1][2]
            context = layer.cross_attention(queries + positions, keys[level], values[level], attention_mask)
            queries = layer.norm1(queries + context)
            positioned = queries + positions
            queries = layer.norm2(queries + layer.self_attention(positioned, positioned, queries))
            queries = layer.norm3(queries + layer.ffn(queries))
            predictions.append(self.predict(queries, pixels, sizes[(index + 1) % len(sizes)]))
        class_logits, mask_logits, _ = zip(*predictions, strict=True)
        return list(class_logits), list(mask_logits)

    def window_scores(self, window: Tensor) -> Tensor:
        """window (B, 3, h, w) -> scores (B, K, h, w)."""
        features, tokens = self.backbone(window)
        text = self.context_decoder(tokens, self.text_encoder())
        # Only the training loss reads the score map.
        F.normalize(tokens[:, 1:], dim=-1) @ F.normalize(text, dim=-1).transpose(1, 2)
        pixels, pyramid = self.pixel_decoder(features, text)
        class_logits, mask_logits = self.mask_decoder(text, pixels, pyramid)
        classes = class_logits[-1].softmax(-1)[..., :-1]  # (B, K, K)
        scores = torch.einsum("bqk,bqhw->bkhw", classes, mask_logits[-1].sigmoid())
        height, width = window.shape[-2:]
        covered = self.model.vision_tower.padded_size(height, width)
        return F.interpolate(scores, covered, mode="bilinear", align_corners=False)[..., :height, :width]

    def scores(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (B, 3, H, W) -> scores (B, K, H, W), before the softmax that leaves their order as it is."""
        batch, _, height, width = pixel_values.shape
        side, stride = self.config.window_size, self.config.window_stride
        rows, columns = min(side, height), min(side, width)
        scores = pixel_values.new_zeros(batch, self.config.num_labels, height, width)
        counts = pixel_values.new_zeros(batch, 1, height, width)
        for y, x in window_corners(height, width, side, stride):
            scores[..., y : y + rows, x : x + columns] += self.window_scores(
                pixel_values[..., y : y + rows, x : x + columns]
            )
            counts[..., y : y + rows, x : x + columns] += 1
        return F.interpolate(scores / counts, (height, width), mode="bilinear", align_corners=False)

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (B, 3, H, W) -> class ids (B, H, W)."""
        return self.scores(pixel_values).softmax(1).argmax(1)


def time_parts(order: PublishedOrder, pixel_values: Tensor) -> dict[str, float]:
    """Seconds of each of `PARTS` over one image, and of the rest; waits for the device around every part."""
    seconds = dict.fromkeys(PARTS, 0.0)

    def timed(part: str, method: Callable) -> Callable:
        def run(*arguments: object) -> object:
            synchronise(pixel_values.device)
            start = time.perf_counter()
            result = method(*arguments)
            synchronise(pixel_values.device)
            seconds[part] += time.perf_counter() - start
            return result

        return run

    watched = copy.copy(order)
    for part in PARTS:
        setattr(watched, part, timed(part, getattr(order, part)))
    synchronise(pixel_values.device)
    start = time.perf_counter()
    watched(pixel_values)
    synchronise(pixel_values.device)
    return seconds | {"rest": time.perf_counter() - start - sum(seconds.values())}
