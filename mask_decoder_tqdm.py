"""Mask decoder of tqdm: textual queries read the pixels that their own masks point at, layer by layer (section 3.2).

Letters: B batch, K classes = textual queries, N pixel tokens of a level, C hidden, E image-text width, h, w a level.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_tqdm import TqdmConfig
from .layers_tqdm import FeedForward, TqdmAttention, additive_mask, resized
from .pixel_decoder_tqdm import NUM_LEVELS, sine_positions


class MaskDecoderLayer(GradientCheckpointingLayer):
    """Post-norm: queries look at the pixels of their masks, then at each other, then think."""

    def __init__(self, config: TqdmConfig):
        super().__init__()
        width, heads, eps = config.hidden_size, config.mask_decoder_heads, config.layer_norm_eps
        self.cross_attention = TqdmAttention(config, width, heads)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.self_attention = TqdmAttention(config, width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.ffn = FeedForward(width, config.mask_decoder_ffn_dim, "relu")
        self.norm3 = nn.LayerNorm(width, eps=eps)

    def forward(
        self, queries: Tensor, query_positions: Tensor, keys: Tensor, pixels: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """queries (B, K, C), query_positions (K, C), keys, pixels (B, N, C), mask (B, 1, K, N) -> queries (B, K, C)."""
        context = self.cross_attention(queries + query_positions, keys, pixels, attention_mask)  # (B, K, C)
        queries = self.norm1(queries + context)
        positioned = queries + query_positions
        queries = self.norm2(queries + self.self_attention(positioned, positioned, queries))
        return self.norm3(queries + self.ffn(queries))


class MaskDecoder(nn.Module):
    """Textual queries -> one class distribution and one mask per class, before and after every layer."""

    def __init__(self, config: TqdmConfig):
        super().__init__()
        width, classes = config.hidden_size, config.num_labels
        self.text_proj = nn.Sequential(
            nn.Linear(config.text_config.projection_dim, width), nn.ReLU(), nn.Linear(width, width)
        )
        self.query_positions = nn.Parameter(torch.empty(classes, width))
        self.level_embedding = nn.Parameter(torch.empty(NUM_LEVELS, width))
        self.layers = nn.ModuleList(MaskDecoderLayer(config) for _ in range(config.mask_decoder_layers))
        self.post_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.class_head = nn.Linear(width, classes + 1)
        self.mask_head = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
        )

    def initialise(self) -> None:
        """Unit normal, the start of `nn.Embedding`, which the published code uses here."""
        init.normal_(self.query_positions)
        init.normal_(self.level_embedding)

    def mask_logits(self, queries: Tensor, pixels: Tensor) -> Tensor:
        """queries (B, K, C) after the last norm, pixels (B, C, h, w) -> mask logits (B, K, h, w)."""
        weights, *bias = self.mask_head(queries).split(pixels.shape[1], -1)  # (B, K, C); a bias only where folded
        # Pixels first: with channels side by side in memory, as they are after fusing, bfloat16 needs no copy of them.
        logits = pixels.flatten(2).transpose(1, 2) @ weights.transpose(1, 2)  # (B, h w, K)
        logits = logits.transpose(1, 2).contiguous()  # (B, K, h w)
        return (logits + bias[0] if bias else logits).unflatten(2, pixels.shape[-2:])

    def predict(self, queries: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """queries (B, K, C), pixels (B, C, h, w) -> class logits (B, K, K + 1), mask logits (B, K, h, w)."""
        queries = self.post_norm(queries)
        return self.class_head(queries), self.mask_logits(queries, pixels)

    def attention_mask(self, coarse: Tensor) -> Tensor:
        """Where each query may look, from its mask (B, K, h, w) on a level: additive (B, 1, K, N), open over 0."""
        blocked = coarse.detach().flatten(2) < 0  # (B, K, N); sigmoid below one half
        blocked = blocked & ~blocked.all(-1, keepdim=True)  # a query with an empty mask looks everywhere
        return additive_mask(blocked, coarse.dtype)

    def forward(
        self, text: Tensor, pixels: Tensor, pyramid: list[Tensor], all_layers: bool = True
    ) -> tuple[list[Tensor], list[Tensor]]:
        """text (B, K, E), pixels (B, C, h, w), pyramid 3 x (B, C, h, w) coarse to fine -> class and mask logits.

        Two lists of num_layers + 1 predictions, from the bare queries to the last layer. With all_layers=False of the
        last one alone: the others only steer attention, and for that their masks are made at the size of a level.
        """
        queries = self.text_proj(text)  # (B, K, C)
        sizes = [tuple(level.shape[-2:]) for level in pyramid]
        values = [
            level.flatten(2).transpose(1, 2) + embedding
            for level, embedding in zip(pyramid, self.level_embedding, strict=True)
        ]  # 3 x (B, N, C)
        keys = [
            value + sine_positions(*size, value.shape[-1], value.device).to(value.dtype)
            for value, size in zip(values, sizes, strict=True)
        ]
        predictions = []
        if not all_layers:
            # Resizing is linear, so a mask of resized pixels is the resized mask.
            coarse_pixels = [resized(pixels, size) for size in sizes]
        for index, layer in enumerate(self.layers):
            level = index % NUM_LEVELS
            if all_layers:
                predictions.append(self.predict(queries, pixels))
                coarse = resized(predictions[-1][1].detach(), sizes[level])
            else:
                coarse = self.mask_logits(self.post_norm(queries), coarse_pixels[level])
            queries = layer(queries, self.query_positions, keys[level], values[level], self.attention_mask(coarse))
        predictions.append(self.predict(queries, pixels))
        class_logits, mask_logits = zip(*predictions, strict=True)
        return list(class_logits), list(mask_logits)
