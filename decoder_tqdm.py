"""Decoders of tqdm: the pixel decoder (section 3.3) and the mask decoder (section 3.2).

The pixel decoder is deformable attention over three scales, sharpened by text-to-pixel attention. In the mask decoder,
textual queries read the pixels that their own masks point at, layer by layer.

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
from .layers_tqdm import FeedForward, TqdmAttention, additive_mask, kept, resized, softmax_over_few

NUM_LEVELS = 3
# Pixels that go through a layer at once when a CPU predicts. In float32 what a few of them need fits the caches; in the
# shorter types, whose products are several times as fast, starting many small operations takes longer than it saves.
PIXELS_AT_ONCE, SHORT_PIXELS_AT_ONCE = 1344, 5376


@kept
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


@kept
def cell_centres(sizes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Centres (N, 2) of the cells of all levels as x, y in 0 ... 1."""
    centres = []
    for h, w in sizes:
        y = (torch.arange(h, device=device).float() + 0.5) / h
        x = (torch.arange(w, device=device).float() + 0.5) / w
        centres.append(torch.stack((x.expand(h, w), y[:, None].expand(h, w)), -1).flatten(0, 1))
    return torch.cat(centres)


def sample_by_grid(
    values: Tensor, offsets: Tensor, weights: Tensor, sizes: tuple[tuple[int, int], ...], start: int = 0
) -> Tensor:
    """Weighted sums of bilinear samples, zero outside, one `grid_sample` per level: the reference.

    values (B, N, heads, c) of all levels; offsets (B, Q, heads, levels, points, 2) of the Q cells from `start` on, from
    each cell's own centre, x, y in cells of the level that is read; weights (B, Q, heads, levels, points)
    -> (B, Q, heads c).
    """
    batch, length, heads = offsets.shape[:3]
    centres = cell_centres(sizes, values.device)[start : start + length, None, None]  # (Q, 1, 1, 2)
    values = values.permute(0, 2, 3, 1).flatten(0, 1)  # (B heads, c, N)
    sampled = []
    for level, (value, (h, w)) in enumerate(zip(values.split([h * w for h, w in sizes], -1), sizes, strict=True)):
        x, y = offsets[:, :, :, level].unbind(-1)  # (B, Q, heads, points)
        places = centres + torch.stack((x / w, y / h), -1)
        grid = (2 * places - 1).transpose(1, 2).flatten(0, 1)  # (B heads, Q, points, 2) in -1 ... 1
        sampled.append(F.grid_sample(value.unflatten(-1, (h, w)), grid, align_corners=False))
    weights = weights.flatten(3).transpose(1, 2).flatten(0, 1)[:, None]  # (B heads, 1, Q, levels points)
    output = (torch.cat(sampled, -1) * weights).sum(-1)  # (B heads, c, Q); each sample is (..., Q, points)
    return output.view(batch, -1, length).transpose(1, 2)


@kept
def bag_layout(sizes: tuple[tuple[int, int], ...], heads: int, points: int, device: torch.device) -> tuple[Tensor, ...]:
    """How the cells of all levels lie one after the other, each level with a border of zeros.

    Returns origins (N, 1, levels points 2), the centre x, y of every cell in cells of each bordered level; the last
    place (levels points 2) on each, over which all is zero; cells per row (levels points); and where (heads, 4, levels
    points) the four neighbours of a point on its level's first cell lie, counted in cells times heads. All is repeated
    for every point: short dimensions of size one are slow.
    """
    extent = torch.tensor([(w, h) for h, w in sizes], device=device)  # (levels, 2)
    origins = cell_centres(sizes, device)[:, None] * extent + 0.5  # (N, levels, 2)
    row = extent[:, :1] + 2  # (levels, 1)
    cells = (extent + 2).prod(-1)  # (levels)
    starts = (cells.cumsum(0) - cells)[:, None]  # (levels, 1)
    neighbours = torch.cat((starts, starts + 1, starts + row, starts + row + 1), 1)  # (levels, 4)
    rows = neighbours.T * heads + torch.arange(heads, device=device)[:, None, None]  # (heads, 4, levels)
    origins = origins.repeat_interleave(points, 1).flatten(1)[:, None]
    last = (extent + 1).float().repeat_interleave(points, 0).flatten()
    return origins, last, row.float().repeat_interleave(points), rows.int().repeat_interleave(points, 2)


def with_borders(values: Tensor, sizes: tuple[tuple[int, int], ...]) -> Tensor:
    """values (B, N, heads, c) of all levels -> (B, cells, heads, c), each level with a border of zeros."""
    levels = [
        F.pad(value.unflatten(1, size), (0, 0, 0, 0, 1, 1, 1, 1)).flatten(1, 2)  # (B, (h + 2) (w + 2), heads, c)
        for value, size in zip(values.split([h * w for h, w in sizes], 1), sizes, strict=True)
    ]
    # For the lower neighbours of the last border. Not len(values), which an exported graph would hold as a number.
    room = values.new_zeros(values.shape[0], sizes[-1][1] + 3, *values.shape[2:])
    return torch.cat([*levels, room], 1)


def sample_by_bags(
    table: Tensor, offsets: Tensor, weights: Tensor, sizes: tuple[tuple[int, int], ...], start: int = 0
) -> Tensor:
    """`sample_by_grid` as one weighted sum of table rows per pixel and head: nothing is sampled into memory first.

    table (B, cells, heads, c): the values `with_borders`. A place outside of a level is moved to the border of zeros,
    so that every sample is of four cells.
    """
    batch, length, heads, _, points, _ = offsets.shape
    origins, last, row, rows = bag_layout(sizes, heads, points, table.device)
    places = (offsets.flatten(3) + origins[start : start + length]).clamp_(torch.zeros_like(last), last)
    corners = places.floor()
    x, y = (places - corners).unflatten(3, (-1, 2)).unbind(-1)  # (B, Q, heads, levels points)
    first = torch.addcmul(corners[..., 0::2], corners[..., 1::2], row).int()  # in cells of a level
    h, w = sizes[-1]
    first = first.clamp_(0, (h + 2) * (w + 2) - 1)  # what is not finite has to stay inside of the table
    images = torch.arange(batch, device=table.device).int() * (table.shape[1] * heads)
    index = first.mul_(heads)[:, :, :, None] + (rows + images.view(-1, 1, 1, 1, 1))  # (B, Q, heads, 4, levels points)
    weights = weights.flatten(3)  # (B, Q, heads, levels points)
    lower = y * weights
    upper = weights - lower
    lower_right, upper_right = x * lower, x * upper
    shares = torch.stack((upper - upper_right, upper_right, lower - lower_right, lower_right), 3)
    bags = batch * length * heads
    output = F.embedding_bag(
        index.view(bags, -1), table.flatten(0, 2), mode="sum", per_sample_weights=shares.view(bags, -1)
    )
    return output.view(batch, length, -1)


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Zhu et al., 2021): every pixel reads a few learned places on every level."""

    def __init__(self, hidden_size: int, num_heads: int, num_points: int):
        super().__init__()
        self.num_heads = num_heads
        self.num_points = num_points
        places = num_heads * NUM_LEVELS * num_points
        self.sampling_offsets = nn.Linear(hidden_size, 2 * places)
        self.attention_weights = nn.Linear(hidden_size, places)
        self.value_proj = nn.Linear(hidden_size, hidden_size)
        self.output_proj = nn.Linear(hidden_size, hidden_size)

    def initialise(self) -> None:
        """Head i looks in direction 2 pi i / heads, point j at distance j + 1; equal weights."""
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

    def forward(self, queries: Tensor, values: Tensor, sizes: tuple[tuple[int, int], ...], start: int = 0) -> Tensor:
        """queries (B, Q, C) of the cells from `start` on, values: `readable`; sizes: (h, w) per level -> (B, Q, C)."""
        shape = (*queries.shape[:2], self.num_heads, NUM_LEVELS, self.num_points)
        # Places are computed in float32: bfloat16 would move them by whole cells.
        offsets = self.sampling_offsets(queries).float().view(*shape, 2)  # in cells of each level
        weights = softmax_over_few(self.attention_weights(queries).view(*shape[:3], -1)).view(shape)
        sample = sample_by_bags if self.by_bags() else sample_by_grid
        return self.output_proj(sample(values, offsets, weights, sizes, start).to(queries.dtype))

    def readable(self, pixels: Tensor, sizes: tuple[tuple[int, int], ...]) -> Tensor:
        """pixels (B, N, C) -> what the queries read, (B, N or cells, heads, C / heads)."""
        values = self.value_proj(pixels).float().unflatten(-1, (self.num_heads, -1))  # (B, N, heads, C / heads)
        return with_borders(values, sizes) if self.by_bags() else values

    def by_bags(self) -> bool:
        """Bags take a quarter of the time; with their gradients they gain nothing, and ONNX does not know them."""
        return not (self.training or torch.onnx.is_in_onnx_export())


class PixelDecoderLayer(GradientCheckpointingLayer):
    """Post-norm: pixels look around, then at the class texts, then think."""

    def __init__(self, config: TqdmConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.deformable = DeformableAttention(width, config.pixel_decoder_heads, config.pixel_decoder_points)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.text_attention = None
        self.fold_texts = False  # see `TqdmAttention.looking_at`
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
        values = self.deformable.readable(pixels, sizes)
        look = None
        if self.text_attention is not None:
            fold = self.fold_texts and self.text_attention.num_heads * text.shape[1] < text.shape[2]
            look = self.text_attention.looking_at(text_keys, text, fold)

        def settle(piece: Tensor, place: Tensor, start: int = 0) -> Tensor:
            """From here on every pixel is on its own: some of them (B, Q, C) and their positions -> (B, Q, C)."""
            piece = self.norm1(piece + self.deformable(piece + place, values, sizes, start))
            if look is not None:
                piece = self.norm2(piece + look(piece + place))
            return self.norm3(piece + self.ffn(piece))

        if self.training or pixels.device.type != "cpu" or torch.compiler.is_compiling():
            return settle(pixels, positions)
        step = PIXELS_AT_ONCE if pixels.dtype == torch.float32 else SHORT_PIXELS_AT_ONCE
        pieces = zip(pixels.split(step, 1), positions.split(step, 1), strict=True)
        return torch.cat([settle(piece, place, step * i) for i, (piece, place) in enumerate(pieces)], 1)


class ConvGroupNorm(nn.Sequential):
    """Convolution, then group normalisation."""

    def __init__(self, channels: int, config: TqdmConfig, kernel_size: int = 1, bias: bool = False):
        width = config.hidden_size
        convolution = nn.Conv2d(channels, width, kernel_size, padding=kernel_size // 2, bias=bias)
        group_norm = nn.GroupNorm(config.group_norm_groups, width, eps=config.layer_norm_eps)
        # Not called "norm": the published recipe exempts names with "norm" from weight decay, and not these.
        super().__init__(OrderedDict(conv=convolution, gn=group_norm))

    def initialise(self) -> None:
        """Kaiming normal over the outputs, as mmcv starts its convolution modules."""
        init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if self.conv.bias is not None:
            init.zeros_(self.conv.bias)


class PixelDecoder(nn.Module):
    """Feature maps and class texts -> pixel embeddings at stride 4 and three coarser maps for the mask decoder."""

    def __init__(self, config: TqdmConfig):
        super().__init__()
        width, channels = config.hidden_size, config.vision_config.hidden_size
        self.inputs = nn.ModuleList(ConvGroupNorm(channels, config, bias=True) for _ in range(NUM_LEVELS))
        self.level_embedding = nn.Parameter(torch.empty(NUM_LEVELS, width))
        self.text_proj = self.text_positions = None
        if config.text_to_pixel_attention:
            self.text_proj = nn.Linear(config.text_config.projection_dim, width)
            self.text_positions = nn.Parameter(torch.empty(config.num_labels, width))
        self.layers = nn.ModuleList(PixelDecoderLayer(config) for _ in range(config.pixel_decoder_layers))
        self.post_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.lateral = ConvGroupNorm(channels, config)
        self.output = ConvGroupNorm(width, config, kernel_size=3)
        self.mask_features = nn.Conv2d(width, width, 1)

    def initialise(self) -> None:
        """Unit normal, the start of `nn.Embedding`, which the published code uses here."""
        init.normal_(self.level_embedding)
        if self.text_positions is not None:
            init.normal_(self.text_positions)

    def forward(self, features: list[Tensor], text: Tensor) -> tuple[Tensor, list[Tensor]]:
        """features 4 x (B, D, h, w), fine to coarse; text (B, K, E) -> (B, C, 4h, 4w), 3 maps coarse to fine."""
        finest, *coarser = features
        pyramid = self.look_around(coarser, text)
        return self.embed(finest, pyramid[-1]), pyramid

    def look_around(self, features: list[Tensor], text: Tensor) -> list[Tensor]:
        """features 3 x (B, D, h, w), fine to coarse; text (B, K, E) -> 3 x (B, C, h, w), coarse to fine."""
        maps = [project(x) for project, x in zip(self.inputs, reversed(features), strict=True)]  # coarse to fine
        sizes = tuple(tuple(x.shape[-2:]) for x in maps)
        pixels = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)  # (B, N, C)
        positions = torch.cat(
            [
                sine_positions(*size, pixels.shape[-1], pixels.device) + level
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
        # The published code normalises after every layer and uses only the last result.
        pixels = self.post_norm(pixels).transpose(1, 2)  # (B, C, N)
        return [x.unflatten(2, size) for x, size in zip(pixels.split([h * w for h, w in sizes], 2), sizes, strict=True)]

    def embed(self, finest: Tensor, fine: Tensor) -> Tensor:
        """finest (B, D, 4h, 4w), fine (B, C, 2h, 2w) -> pixel embeddings (B, C, 4h, 4w).

        These maps are the largest, so each is let go as soon as the next one is made.
        """
        pixels = self.lateral(finest)
        # As a copy of its own: a part of the tokens, though laid out the same, is resized ten times slower on CPUs.
        pixels.add_(resized(fine.clone(memory_format=torch.channels_last), finest.shape[-2:]))
        for layer in self.output:
            pixels = layer(pixels)
        return self.mask_features(pixels.relu_())


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
