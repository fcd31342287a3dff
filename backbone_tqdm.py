"""Vision towers of tqdm: CLIP ViT and EVA02, with the feature pyramid on top.

Letters: B batch, N patch tokens = h w, D vision width, E image-text width, H, W image, h, w patch grid.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_tqdm import TqdmVisionConfig
from .layers_tqdm import AttentionWeights, FeedForward, TqdmAttention, TqdmBaseModel, initialise_clip_block


class SwiGlu(nn.Module):
    """silu(w1 x) * (w2 x), normalised, then w3: the feed-forward of EVA02."""

    def __init__(self, hidden_size: int, intermediate_size: int, eps: float):
        super().__init__()
        self.w1 = nn.Linear(hidden_size, intermediate_size)
        self.w2 = nn.Linear(hidden_size, intermediate_size)
        self.inner_norm = nn.LayerNorm(intermediate_size, eps=eps)
        self.w3 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        return self.w3(self.inner_norm(F.silu(self.w1(x)) * self.w2(x)))


class DropPath(nn.Module):
    """Stochastic depth: in training drops a sample's branch with probability `rate` and rescales the others."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """branch (B, ...) -> (B, ...)."""
        if not self.training or self.rate == 0:
            return branch
        keep = torch.rand(branch.shape[0], *[1] * (branch.dim() - 1), device=branch.device) >= self.rate
        return branch * keep.to(branch.dtype) / (1 - self.rate)


class VisionBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block of both towers: self-attention, feed-forward."""

    def __init__(self, config: TqdmVisionConfig, drop_path_rate: float):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        eva = config.tower == "eva02"
        self.depth = config.num_hidden_layers
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = TqdmAttention(
            config, width, config.num_attention_heads, key_bias=not eva, inner_norm_eps=eps if eva else None
        )
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.ffn = (
            SwiGlu(width, config.intermediate_size, eps)
            if eva
            else FeedForward(width, config.intermediate_size, config.hidden_act)
        )
        self.drop_path = DropPath(drop_path_rate)

    def initialise(self) -> None:
        """CLIP's scaled normal initialisation; published settings load pre-trained weights instead."""
        initialise_clip_block(self, self.norm1.normalized_shape[0], self.depth)

    def forward(
        self, tokens: Tensor, rotary: tuple[Tensor, Tensor] | None = None, output_attentions: bool | None = None
    ) -> Tensor:
        """tokens (B, 1 + N, D) -> (B, 1 + N, D)."""
        normed = self.norm1(tokens)
        context = self.attention(normed, normed, normed, None, rotary, output_attentions)
        tokens = tokens + self.drop_path(context)
        return tokens + self.drop_path(self.ffn(self.norm2(tokens)))


class FeaturePyramid(nn.Module):
    """Four maps of one size become strides 1/4, 1/2, 1 and 2 of the patch grid, the shallowest tap the finest."""

    def __init__(self, width: int):
        super().__init__()
        self.up4 = nn.Sequential(
            nn.ConvTranspose2d(width, width, 2, stride=2),
            nn.BatchNorm2d(width),
            nn.GELU(),
            nn.ConvTranspose2d(width, width, 2, stride=2),
        )
        self.up2 = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.down2 = nn.MaxPool2d(2, stride=2)

    def forward(self, taps: list[Tensor]) -> list[Tensor]:
        """taps 4 x (B, D, h, w) -> (B, D, 4h, 4w), (B, D, 2h, 2w), (B, D, h, w), (B, D, h // 2, w // 2)."""
        return [self.up4(taps[0]), self.up2(taps[1]), taps[2], self.down2(taps[3])]


def resize_positions(table: Tensor, h: int, w: int, tower: str) -> Tensor:
    """Position table (1 + g g, D) of a square grid -> (1 + h w, D), bicubic for EVA02 as published; row 0 stays."""
    grid = math.isqrt(len(table) - 1)
    patches = table[1:].T.unflatten(1, (grid, grid))[None].float()  # (1, D, g, g)
    mode = "bicubic" if tower == "eva02" else "bilinear"
    patches = F.interpolate(patches, (h, w), mode=mode, align_corners=False).flatten(2)[0].T  # (N, D)
    return torch.cat((table[:1], patches.to(table.dtype)))


def rotary_positions(
    h: int, w: int, head_size: int, grid: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin (N, head size) of EVA02's 2-D rotary positions: first half by row, second half by column.

    Positions run over 0 ... grid at any size of the map, the range of the pre-training.
    """
    half = head_size // 2
    frequencies = float(theta) ** -(torch.arange(0, half, 2, device=device).float() / half)  # (half / 2)
    rows, columns = (
        (torch.arange(n, device=device) / n * grid)[:, None] * frequencies for n in (h, w)
    )  # (h, half / 2), (w, half / 2)
    rows, columns = rows.repeat_interleave(2, 1), columns.repeat_interleave(2, 1)  # (h, half), (w, half)
    angles = torch.cat((rows[:, None].expand(h, w, half), columns[None].expand(h, w, half)), -1).flatten(0, 1)
    return angles.cos(), angles.sin()  # (N, head size)


class TqdmVisionModel(TqdmBaseModel):
    """Image -> four feature maps for the pixel decoder, and all tokens in the image-text space."""

    config: TqdmVisionConfig
    _supports_flash_attn = True
    _can_record_outputs = {"hidden_states": VisionBlock, "attentions": AttentionWeights}
    rotary_positions = staticmethod(rotary_positions)

    def __init__(self, config: TqdmVisionConfig):
        super().__init__(config)
        width, eva = config.hidden_size, config.tower == "eva02"
        self.grid = config.image_size // config.patch_size
        self.patch_embed = nn.Conv2d(config.num_channels, width, config.patch_size, config.patch_size, bias=eva)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.position_embedding = nn.Parameter(torch.empty(1 + self.grid**2, width))
        self.pre_norm = nn.Identity() if eva else nn.LayerNorm(width, eps=config.layer_norm_eps)
        last = max(config.num_hidden_layers - 1, 1)
        self.blocks = nn.ModuleList(
            VisionBlock(config, config.drop_path_rate * i / last) for i in range(config.num_hidden_layers)
        )
        self.post_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.projection = nn.Linear(width, config.projection_dim, bias=eva)
        self.pyramid = FeaturePyramid(width)
        self.gradient_checkpointing = False
        self.post_init()

    def initialise(self) -> None:
        """CLIP's initialisation of what is in no block; published settings load pre-trained weights instead."""
        std = self.config.hidden_size**-0.5
        for weight in (self.class_embedding, self.position_embedding, self.projection.weight):
            init.normal_(weight, std=std)

    def get_input_embeddings(self) -> nn.Module:
        """The patch convolution, to which gradient checkpointing and adapters attach."""
        return self.patch_embed

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that the predictions of a (height, width) image cover, see `patch_remainder`."""
        if self.config.patch_remainder == "stretch":
            return height, width
        patch = self.config.patch_size
        # ONNX divides towards zero, so -(-height // patch) would round the wrong way there.
        return (height + patch - 1) // patch * patch, (width + patch - 1) // patch * patch

    def positions(self, h: int, w: int) -> Tensor:
        """Position embedding (1 + N, D) of a patch grid (h, w), see `resize_positions`."""
        if (h, w) == (self.grid, self.grid):
            return self.position_embedding
        return resize_positions(self.position_embedding, h, w, self.config.tower)

    def rotary(self, h: int, w: int) -> tuple[Tensor, Tensor]:
        """EVA02's rotary positions of a patch grid, see `rotary_positions`."""
        config = self.config
        size = config.hidden_size // config.num_attention_heads
        return self.rotary_positions(h, w, size, config.rope_grid, config.rope_theta, self.position_embedding.device)

    def forward(
        self, pixel_values: Tensor, with_pyramid: bool = True, output_attentions: bool | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """pixel_values (B, 3, H, W) -> four maps, fine to coarse, and tokens (B, 1 + N, E), the image's token first.

        with_pyramid=False returns no maps: the teacher needs none. output_attentions: see `TqdmAttention`.
        Raises ValueError for an image under two patches a side.
        """
        height, width = pixel_values.shape[-2:]
        rows, columns = self.padded_size(height, width)
        patch = self.config.patch_size
        h, w = rows // patch, columns // patch
        if min(h, w) < 2:
            raise ValueError(
                f"image is {height}x{width} pixels; the coarsest feature map needs two patches of {patch} per side: "
                f"enlarge the image to at least {2 * patch}x{2 * patch}"
            )
        pixel_values = F.pad(pixel_values.to(self.patch_embed.weight.dtype), (0, columns - width, 0, rows - height))
        patches = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)  # (B, N, D)
        positions = self.positions(h, w)  # (1 + N, D)
        first = self.class_embedding + positions[0]  # (D)
        if self.config.tower == "clip" and self.config.class_embedding_twice:
            first = first + self.class_embedding
        first = first.expand(patches.shape[0], 1, -1)  # (B, 1, D)
        tokens = self.pre_norm(torch.cat((first, patches + positions[1:]), 1))  # (B, 1 + N, D)

        rotary = self.rotary(h, w) if self.config.tower == "eva02" else None
        taps = []
        for index, block in enumerate(self.blocks):
            tokens = block(tokens, rotary, output_attentions)
            if with_pyramid and index in self.config.feature_layers:
                taps.append(tokens[:, 1:].transpose(1, 2).unflatten(2, (h, w)))  # (B, D, h, w)
        features = self.pyramid(taps) if with_pyramid else []
        return features, self.projection(self.post_norm(tokens))
