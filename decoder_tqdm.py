"""Decoders of tqdm: the pixel decoder (section 3.3) and the mask decoder (section 3.2).

The pixel decoder is the multi-scale deformable encoder of Mask2Former with text-to-pixel attention in every layer. The
mask decoder is Mask2Former's masked-attention decoder, with one textual query per class.

Letters: B batch, K classes = textual queries, N pixel tokens (of all levels in the pixel decoder, of one in the mask
decoder), C hidden, D vision width, E image-text width, h, w a level.
"""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_tqdm import TqdmConfig
from .layers_tqdm import FeedForward, TqdmAttention, additive_mask, resize

NUM_LEVELS = 3


def sine_positions(h: int, w: int, channels: int, device: torch.device) -> Tensor:
    """Sine encoding of a (h, w) map: (1, h w, C), rows in the first half of the channels, columns in the second.

    Positions count 1 ... n, scaled to 2 pi; sine and cosine alternate over frequencies 10000^(-2i / (C / 2)).
    """
    half = channels // 2
    frequencies = 10000 ** (-torch.arange(0, half, 2, device=device).float() / half)  # (C / 4)
    axes = []
    for n in (h, w):
        position = torch.arange(1, n + 1, device=device).float() / (n + 1e-6) * 2 * math.pi
        angles = position[:, None] * frequencies  # (n, C / 4)
        axes.append(torch.stack((angles.sin(), angles.cos()), -1).flatten(1))  # (n, C / 2)
    rows, columns = axes[0][:, None].expand(h, w, half), axes[1][None].expand(h, w, half)
    return torch.cat((rows, columns), -1).flatten(0, 1)[None]


def cell_centres(sizes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Centres (N, 2) of the cells of all levels as x, y in 0 ... 1."""
    centres = []
    for h, w in sizes:
        y = (torch.arange(h, device=device).float() + 0.5) / h
        x = (torch.arange(w, device=device).float() + 0.5) / w
        centres.append(torch.stack((x.expand(h, w), y[:, None].expand(h, w)), -1).flatten(0, 1))
    return torch.cat(centres)


def sample_bilinear(values: Tensor, offsets: Tensor, weights: Tensor, sizes: tuple[tuple[int, int], ...]) -> Tensor:
    """Weighted sums of bilinear samples, zero outside, one `grid_sample` per level.

    values (B, N, heads, c) of all levels; offsets (B, N, heads, levels, points, 2) from each cell's centre, x, y in
    cells of the sampled level; weights (B, N, heads, levels points) -> (B, N, heads c).
    """
    batch, length = offsets.shape[:2]
    centres = cell_centres(sizes, values.device)[:, None, None]  # (N, 1, 1, 2)
    values = values.permute(0, 2, 3, 1).flatten(0, 1)  # (B heads, c, N)
    sampled = []
    for level, (value, (h, w)) in enumerate(zip(values.split([h * w for h, w in sizes], -1), sizes, strict=True)):
        x, y = offsets[:, :, :, level].unbind(-1)  # (B, N, heads, points)
        locations = centres + torch.stack((x / w, y / h), -1)
        grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B heads, N, points, 2) in -1 ... 1
        sampled.append(F.grid_sample(value.unflatten(-1, (h, w)), grid, align_corners=False))
    weights = weights.transpose(1, 2).flatten(0, 1)[:, None]  # (B heads, 1, N, levels points)
    output = (torch.cat(sampled, -1) * weights).sum(-1)  # (B heads, c, N); each sample is (..., N, points)
    return output.view(batch, -1, length).transpose(1, 2)


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Zhu et al., 2021): every pixel samples a few locations per level."""

    def __init__(self, hidden_size: int, num_heads: int, num_points: int):
        super().__init__()
        self.num_heads = num_heads
        self.num_points = num_points
        samples = num_heads * NUM_LEVELS * num_points
        self.sampling_offsets = nn.Linear(hidden_size, 2 * samples)
        self.attention_weights = nn.Linear(hidden_size, samples)
        self.value_proj = nn.Linear(hidden_size, hidden_size)
        self.output_proj = nn.Linear(hidden_size, hidden_size)

    def initialise(self) -> None:
        """Head i samples in direction 2 pi i / heads, point j at distance j + 1; equal weights."""
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack((angles.cos(), angles.sin()), -1)  # (heads, 2)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, self.num_points + 1)[:, None]  # (points, 1)
        offsets = (directions[:, None, None] * distances).expand(-1, NUM_LEVELS, -1, -1)  # (heads, levels, points, 2)
        init.copy_(self.sampling_offsets.bias, offsets.flatten())
        for weight in (self.sampling_offsets.weight, self.attention_weights.weight, self.attention_weights.bias):
            init.zeros_(weight)
        for linear in (self.value_proj, self.output_proj):
            init.xavier_uniform_(linear.weight)
            init.zeros_(linear.bias)

    def sampling(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """queries (B, Q, C) -> offsets (B, Q, heads, levels, points, 2) and scores (B, Q, heads, levels points)."""
        shape = (*queries.shape[:2], self.num_heads, NUM_LEVELS, self.num_points)
        # In float32: bfloat16 would move the locations by whole cells.
        offsets = self.sampling_offsets(queries).float().view(*shape, 2)  # in cells of each level
        return offsets, self.attention_weights(queries).view(*shape[:3], -1)

    def forward(self, pixels: Tensor, positions: Tensor, sizes: tuple[tuple[int, int], ...]) -> Tensor:
        """pixels (B, N, C) of all levels and their positions (1, N, C), sizes: (h, w) of each level -> (B, N, C)."""
        values = self.value_proj(pixels).float().unflatten(-1, (self.num_heads, -1))  # (B, N, heads, C / heads)
        offsets, scores = self.sampling(pixels + positions)
        sampled = sample_bilinear(values, offsets, scores.softmax(-1, dtype=torch.float32), sizes)
        return self.output_proj(sampled.to(pixels.dtype))


class PixelDecoderLayer(GradientCheckpointingLayer):
    """Post-norm: deformable self-attention, text-to-pixel attention, feed-forward."""

    def __init__(self, config: TqdmConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.deformable = DeformableAttention(width, config.pixel_decoder_heads, config.pixel_decoder_points)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.text_attention = None
        if config.text_to_pixel_attention:
            self.text_attention = TqdmAttention(config, width, config.pixel_decoder_heads)
            self.norm2 = nn.LayerNorm(width, eps=eps)
        self.ffn = FeedForward(width, config.pixel_decoder_ffn_dim, "relu")
        self.norm3 = nn.LayerNorm(width, eps=eps)

    def forward(
        self,
        pixels: Tensor,
        positions: Tensor,
        text_keys: Tensor | None,
        text: Tensor | None,
        sizes: tuple[tuple[int, int], ...],
    ) -> Tensor:
        """pixels (B, N, C), positions (1, N, C), text_keys and text (B, K, C) -> pixels (B, N, C)."""
        pixels = self.norm1(pixels + self.deformable(pixels, positions, sizes))
        if self.text_attention is not None:  # section 3.3
            pixels = self.norm2(pixels + self.text_attention(pixels + positions, text_keys, text))
        return self.norm3(pixels + self.ffn(pixels))


class ConvGroupNorm(nn.Sequential):
    """Convolution, then group normalisation."""

    def __init__(self, channels: int, config: TqdmConfig, kernel_size: int = 1, bias: bool = False):
        width = config.hidden_size
        convolution = nn.Conv2d(channels, width, kernel_size, padding=kernel_size // 2, bias=bias)
        group_norm = nn.GroupNorm(config.group_norm_groups, width, eps=config.layer_norm_eps)
        # Not called "norm": the published recipe exempts names with "norm" from weight decay, and not these.
        super().__init__(OrderedDict(conv=convolution, gn=group_norm))

    def initialise(self) -> None:
        """Kaiming normal over the outputs, as in mmcv's convolution modules."""
        init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if self.conv.bias is not None:
            init.zeros_(self.conv.bias)


def position_rows(config: TqdmConfig) -> int:
    """Rows of the query and text positions: one per class, or one for all next to a head that compares."""
    return 1 if config.class_head == "cosine" else config.num_labels


class PixelDecoder(nn.Module):
    """Feature maps and class texts -> pixel embeddings at stride 4 and three coarser maps for the mask decoder."""

    sine_positions = staticmethod(sine_positions)

    def __init__(self, config: TqdmConfig):
        super().__init__()
        width, channels = config.hidden_size, config.vision_config.hidden_size
        self.inputs = nn.ModuleList(ConvGroupNorm(channels, config, bias=True) for _ in range(NUM_LEVELS))
        self.level_embedding = nn.Parameter(torch.empty(NUM_LEVELS, width))
        self.text_proj = self.text_positions = None
        if config.text_to_pixel_attention:
            self.text_proj = nn.Linear(config.text_config.projection_dim, width)
            self.text_positions = nn.Parameter(torch.empty(position_rows(config), width))
        self.layers = nn.ModuleList(PixelDecoderLayer(config) for _ in range(config.pixel_decoder_layers))
        self.post_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.lateral = ConvGroupNorm(channels, config)
        self.output = ConvGroupNorm(width, config, kernel_size=3)
        self.mask_features = nn.Conv2d(width, width, 1)

    def initialise(self) -> None:
        """Unit normal, as in the published code's `nn.Embedding`."""
        init.normal_(self.level_embedding)
        if self.text_positions is not None:
            init.normal_(self.text_positions)

    def forward(self, features: list[Tensor], text: Tensor) -> tuple[Tensor, list[Tensor]]:
        """features 4 x (B, D, h, w), fine to coarse; text (B, K, E) -> (B, C, 4h, 4w), 3 maps coarse to fine."""
        finest, *coarser = features
        pyramid = self.encode(coarser, text)
        return self.embed_pixels(finest, pyramid[-1]), pyramid

    def encode(self, features: list[Tensor], text: Tensor) -> list[Tensor]:
        """features 3 x (B, D, h, w), fine to coarse; text (B, K, E) -> 3 x (B, C, h, w), coarse to fine."""
        maps = [project(x) for project, x in zip(self.inputs, reversed(features), strict=True)]  # coarse to fine
        sizes = tuple(tuple(x.shape[-2:]) for x in maps)
        pixels = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)  # (B, N, C)
        positions = torch.cat(
            [
                self.sine_positions(*size, pixels.shape[-1], pixels.device) + level
                for size, level in zip(sizes, self.level_embedding, strict=True)
            ],
            1,
        ).to(pixels.dtype)  # (1, N, C)
        text_keys = None
        if self.text_proj is not None:
            text = self.text_proj(text)  # (B, K, C)
            text_keys = text + self.text_positions
        for layer in self.layers:
            pixels = layer(pixels, positions, text_keys, text, sizes)
        # The published code normalises after every layer and uses the last result only.
        pixels = self.post_norm(pixels).transpose(1, 2)  # (B, C, N)
        return [x.unflatten(2, size) for x, size in zip(pixels.split([h * w for h, w in sizes], 2), sizes, strict=True)]

    def embed_pixels(self, finest: Tensor, fine: Tensor) -> Tensor:
        """finest (B, D, 4h, 4w), fine (B, C, 2h, 2w) -> pixel embeddings (B, C, 4h, 4w)."""
        # As a copy: CPUs resize a slice of the tokens ten times slower.
        fine = resize(fine.clone(memory_format=torch.channels_last), finest.shape[-2:])
        return self.mask_features(self.output(self.lateral(finest) + fine).relu())


class MaskDecoderLayer(GradientCheckpointingLayer):
    """Post-norm: masked cross-attention to the pixels, self-attention among the queries, feed-forward."""

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
        """queries (B, K, C), query_positions (K or 1, C), keys, pixels (B, N, C), mask (B, 1, K, N) -> (B, K, C)."""
        context = self.cross_attention(queries + query_positions, keys, pixels, attention_mask)  # (B, K, C)
        queries = self.norm1(queries + context)
        positioned = queries + query_positions
        queries = self.norm2(queries + self.self_attention(positioned, positioned, queries))
        return self.norm3(queries + self.ffn(queries))


class CosineClassHead(nn.Module):
    """Class logits by comparison with the class texts: no weight belongs to a class, so any text can be one.

    The cosine of every query, in the image-text space, with every class text and with a learned vector for "no object",
    times a learned scale: CLIP's, from 1 / 0.07 and at most 100.
    """

    def __init__(self, config: TqdmConfig):
        super().__init__()
        embedding = config.text_config.projection_dim
        self.projection = nn.Linear(config.hidden_size, embedding)
        self.no_object = nn.Parameter(torch.empty(embedding))
        self.log_scale = nn.Parameter(torch.empty(1))

    def initialise(self) -> None:
        """A random direction for "no object", CLIP's scale."""
        init.normal_(self.no_object)
        init.constant_(self.log_scale, -math.log(0.07))

    def forward(self, queries: Tensor, class_texts: Tensor) -> Tensor:
        """queries (B, K, C), class_texts (K, E), the same for every image -> class logits (B, K, K + 1)."""
        texts = F.normalize(torch.cat((class_texts, self.no_object[None])), dim=-1)  # (K + 1, E)
        scale = self.log_scale.exp().clamp(max=100)
        return scale * (F.normalize(self.projection(queries), dim=-1) @ texts.T)


class MaskDecoder(nn.Module):
    """Textual queries -> one class distribution and one mask per query, before and after every layer."""

    sine_positions = staticmethod(sine_positions)

    def __init__(self, config: TqdmConfig):
        super().__init__()
        width = config.hidden_size
        self.text_proj = nn.Sequential(
            nn.Linear(config.text_config.projection_dim, width), nn.ReLU(), nn.Linear(width, width)
        )
        self.query_positions = nn.Parameter(torch.empty(position_rows(config), width))
        self.level_embedding = nn.Parameter(torch.empty(NUM_LEVELS, width))
        self.layers = nn.ModuleList(MaskDecoderLayer(config) for _ in range(config.mask_decoder_layers))
        self.post_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.compares = config.class_head == "cosine"
        self.class_head = CosineClassHead(config) if self.compares else nn.Linear(width, config.num_labels + 1)
        self.mask_head = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
        )

    def initialise(self) -> None:
        """Unit normal, as in the published code's `nn.Embedding`."""
        init.normal_(self.query_positions)
        init.normal_(self.level_embedding)

    def mask_logits(self, queries: Tensor, pixels: Tensor) -> Tensor:
        """queries (B, K, C) after the last norm, pixels (B, C, h, w) -> mask logits (B, K, h, w)."""
        logits = pixels.flatten(2).transpose(1, 2) @ self.mask_head(queries).transpose(1, 2)  # (B, h w, K)
        return logits.transpose(1, 2).contiguous().unflatten(2, pixels.shape[-2:])

    def predict(self, queries: Tensor, pixels: Tensor, class_texts: Tensor | None) -> tuple[Tensor, Tensor]:
        """queries (B, K, C), pixels (B, C, h, w) -> class logits (B, K, K + 1), mask logits (B, K, h, w)."""
        queries = self.post_norm(queries)
        class_logits = self.class_head(queries, class_texts) if self.compares else self.class_head(queries)
        return class_logits, self.mask_logits(queries, pixels)

    def attention_mask(self, mask_logits: Tensor) -> Tensor:
        """mask_logits (B, K, h, w) at the size of a level -> additive mask (B, 1, K, N), open where they are >= 0."""
        blocked = mask_logits.flatten(2) < 0  # (B, K, N); sigmoid below one half
        blocked = blocked & ~blocked.all(-1, keepdim=True)  # a query with an empty mask attends everywhere
        return additive_mask(blocked, mask_logits.dtype)

    def keys_and_values(self, pyramid: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """pyramid 3 x (B, C, h, w) -> keys and values of the cross-attention, 3 x (B, N, C) each."""
        values = [
            level.flatten(2).transpose(1, 2) + embedding
            for level, embedding in zip(pyramid, self.level_embedding, strict=True)
        ]
        keys = [
            value + self.sine_positions(*level.shape[-2:], value.shape[-1], value.device).to(value.dtype)
            for value, level in zip(values, pyramid, strict=True)
        ]
        return keys, values

    def forward(
        self,
        text: Tensor,
        pixels: Tensor,
        pyramid: list[Tensor],
        all_layers: bool = True,
        class_texts: Tensor | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """text (B, K, E), pixels (B, C, h, w), pyramid 3 x (B, C, h, w) coarse to fine -> class and mask logits.

        Two lists of num_layers + 1 predictions, from the bare queries to the last layer; with all_layers=False of the
        last one. class_texts (K, E): what a cosine class head compares with.
        """
        queries = self.text_proj(text)  # (B, K, C)
        keys, values = self.keys_and_values(pyramid)
        predictions = [self.predict(queries, pixels, class_texts)]
        for index, layer in enumerate(self.layers):
            level = index % NUM_LEVELS
            attention_mask = self.attention_mask(resize(predictions[-1][1].detach(), pyramid[level].shape[-2:]))
            queries = layer(queries, self.query_positions, keys[level], values[level], attention_mask)
            predictions.append(self.predict(queries, pixels, class_texts))
        class_logits, mask_logits = zip(*(predictions if all_layers else predictions[-1:]), strict=True)
        return list(class_logits), list(mask_logits)
