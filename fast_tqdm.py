"""The same numbers up to rounding, faster: what replaces the layers of a model that only predicts from now on.

Folding: layers without anything between them become one. Sampling: deformable attention is one weighted sum of table
rows per pixel and head (an embedding bag) instead of one `grid_sample` per level. Tiles: on a CPU a decoder layer runs
on a part of the pixels at a time, which fits its caches. Caching: positions depend on sizes alone. Attention masks are
made at the size of their level.

Letters: B batch, K classes, Q queries, N pixel tokens, C hidden width, D vision width, E image-text width, M width
between two folded layers, h, w a map.
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .backbone_tqdm import TqdmVisionModel, rotary_positions
from .decoder_tqdm import (
    NUM_LEVELS,
    DeformableAttention,
    MaskDecoder,
    PixelDecoder,
    PixelDecoderLayer,
    cell_centres,
    sine_positions,
)
from .layers_tqdm import FeedForward, TqdmAttention, resize
from .text_tqdm import TextualQueries

Sizes = tuple[tuple[int, int], ...]

# Pixels per tile. Tiles of float32 fit the caches of a CPU. The shorter types multiply several times as fast, and small
# tiles would spend more time on starting operations than they save.
TILE, SHORT_TILE = 1344, 5376


# ---- caching


def cache_by_shape(make: Callable) -> Callable:
    """Caches tensors computed from shapes and device, for the last few arguments of `make`.

    They must not be changed in place. Nothing is cached while a graph is traced or in FakeTensor mode.
    """
    # Outside of inference mode, whose tensors autograd refuses.
    cached = lru_cache(maxsize=6)(torch.inference_mode(False)(torch.no_grad()(make)))

    @wraps(make)
    def look_up(*args: Any) -> Any:
        traced = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
        return make(*args) if traced else cached(*args)

    return look_up


# ---- folding


class PatchExpansion(nn.Sequential):
    """Transposed convolutions with kernel and stride 2, and activations, as matrix products: `nn.Linear` makes of every
    cell four, which one copy at the end puts in place."""

    def forward(self, maps: Tensor) -> Tensor:
        """maps (B, D, h, w) -> (B, C, 2^n h, 2^n w), channels last; fastest for maps with channels last."""
        cells = maps.flatten(2).transpose(1, 2)  # (B, h w, D)
        steps = 0
        for layer in self:
            cells = layer(cells)
            if isinstance(layer, nn.Linear):
                cells = cells.unflatten(2, (4, -1)).flatten(1, 2)  # (B, h w 2 2 ..., C)
                steps += 1
        cells = cells.unflatten(1, (*maps.shape[-2:], *[2] * (2 * steps)))  # (B, h, w, 2, 2, ..., C)
        rows, columns = range(1, 3 + 2 * steps, 2), range(2, 3 + 2 * steps, 2)
        cells = cells.permute(0, *rows, *columns, -1)  # (B, h, 2, ..., w, 2, ..., C)
        return cells.flatten(1, 1 + steps).flatten(2, 2 + steps).permute(0, 3, 1, 2)


def fold_expansion(
    convolution: nn.ConvTranspose2d, norm: nn.BatchNorm2d | None = None, pointwise: nn.Conv2d | None = None
) -> nn.Linear:
    """A transposed convolution (kernel and stride 2) and what follows it: BatchNorm in eval mode, a 1x1 convolution.

    The layer gives the four cells one after the other: (2 2 C, D).
    """
    weight, bias = convolution.weight.double(), convolution.bias.double()  # (D, M, 2, 2), (M)
    if norm is not None:
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        weight = weight * scale[:, None, None]
        bias = (bias - norm.running_mean.double()) * scale + norm.bias.double()
    if pointwise is not None:
        mixing = pointwise.weight.double()[..., 0, 0]  # (C, M)
        weight, bias = torch.einsum("dmij,cm->dcij", weight, mixing), mixing @ bias
        if pointwise.bias is not None:
            bias = bias + pointwise.bias.double()
    return make_linear(weight.permute(2, 3, 1, 0).flatten(0, 2), bias.repeat(4), convolution.weight)


def make_linear(weight: Tensor, bias: Tensor, like: Tensor) -> nn.Linear:
    """A layer with this weight (C, D) and bias (C), in the dtype and on the device of `like`."""
    linear = nn.utils.skip_init(nn.Linear, *reversed(weight.shape), dtype=like.dtype, device=like.device)
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)
    return linear


def fold_mask_head(last: nn.Linear, pointwise: nn.Conv2d) -> nn.Linear:
    """The mask head's last layer (C, C) and the 1x1 convolution that makes the pixels it is multiplied with.

    head . (W x + b) = (W' head) . x + b . head: the layer gets one more output, the bias of the mask.
    """
    mixing = torch.cat((pointwise.weight.double()[..., 0, 0], pointwise.bias.double()[:, None]), 1)  # (C, C + 1)
    return make_linear(mixing.T @ last.weight.double(), mixing.T @ last.bias.double(), last.weight)


def fold_activation(ffn: FeedForward) -> None:
    """Quick GELU x sigmoid(1.702 x) = silu(1.702 x) / 1.702: the layers take the factors; activations work in place."""
    if isinstance(ffn.activation, nn.ReLU):
        ffn.activation = nn.ReLU(inplace=True)
    elif type(ffn.activation).__name__ == "QuickGELUActivation":
        ffn.fc1.weight.mul_(1.702)
        ffn.fc1.bias.mul_(1.702)
        ffn.fc2.weight.div_(1.702)
        ffn.activation = nn.SiLU(inplace=True)


# ---- attention


def short_softmax(scores: Tensor) -> Tensor:
    """Softmax over a short last dimension, in float32; on CPUs torch's own takes five times as long for a dozen."""
    if scores.device.type != "cpu" or torch.is_grad_enabled():
        return scores.softmax(-1, dtype=torch.float32)
    scores = scores.float()
    exponentials = scores.sub(scores.amax(-1, keepdim=True)).exp_()
    return exponentials.div_(exponentials.sum(-1, keepdim=True))


class FastTextAttention(TqdmAttention):
    """Attention of many pixels to few texts: the texts' keys and values are multiplied with the projections.

    What is left are two products with heads K columns instead of two with C and the attention.
    """

    def attend_to(self, keys: Tensor, values: Tensor) -> Callable[[Tensor], Tensor]:
        """`forward` with these keys and values (B, K, C), for tiles of queries: (B, Q, C) -> (B, Q, C)."""
        if self.num_heads * keys.shape[1] >= keys.shape[2]:
            return lambda queries: super(FastTextAttention, self).forward(queries, keys, values)
        heads = (self.num_heads, -1)
        keys = self.k_proj(keys).unflatten(-1, heads).transpose(1, 2) * self.scaling  # (B, heads, K, C / heads)
        values = self.v_proj(values).unflatten(-1, heads).transpose(1, 2)
        bias = (keys @ self.q_proj.bias.unflatten(0, heads)[..., None]).flatten(1)[:, None]  # (B, 1, heads K)
        keys = (keys @ self.q_proj.weight.unflatten(0, heads)).flatten(1, 2)  # (B, heads K, C)
        values = (values @ self.out_proj.weight.unflatten(1, heads).permute(1, 2, 0)).flatten(1, 2)  # (B, heads K, C)

        def attend(queries: Tensor) -> Tensor:
            scores = torch.baddbmm(bias, queries, keys.transpose(1, 2)).unflatten(-1, heads)  # (B, Q, heads, K)
            return torch.baddbmm(self.out_proj.bias, short_softmax(scores).flatten(2).to(queries.dtype), values)

        return attend

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """queries (B, Q, C), keys and values (B, K, C) -> (B, Q, C)."""
        return self.attend_to(keys, values)(queries)


# ---- deformable attention


@cache_by_shape
def table_layout(sizes: Sizes, heads: int, points: int, device: torch.device) -> tuple[Tensor, ...]:
    """Where the cells of all levels lie in `value_table`, in which every level has a border of zeros.

    Returns the centre x, y of every cell in cells of each bordered level (N, 1, levels points 2); the last location
    (levels points 2) on each, where all is zero; cells per row (levels points); and the table rows (heads, 4, levels
    points) of the four neighbours of a location in its level's first cell. All is repeated for every point: short
    dimensions of size one are slow.
    """
    extent = torch.tensor([(w, h) for h, w in sizes], device=device)  # (levels, 2)
    centres = cell_centres(sizes, device)[:, None] * extent + 0.5  # (N, levels, 2)
    row = extent[:, :1] + 2  # (levels, 1)
    cells = (extent + 2).prod(-1)  # (levels)
    starts = (cells.cumsum(0) - cells)[:, None]  # (levels, 1)
    neighbours = torch.cat((starts, starts + 1, starts + row, starts + row + 1), 1)  # (levels, 4)
    rows = neighbours.T * heads + torch.arange(heads, device=device)[:, None, None]  # (heads, 4, levels)
    centres = centres.repeat_interleave(points, 1).flatten(1)[:, None]
    last = (extent + 1).float().repeat_interleave(points, 0).flatten()
    return centres, last, row.float().repeat_interleave(points), rows.int().repeat_interleave(points, 2)


def value_table(values: Tensor, sizes: Sizes) -> Tensor:
    """values (B, N, heads, c) of all levels -> (B, cells, heads, c), each level with a border of zeros."""
    levels = [
        F.pad(value.unflatten(1, size), (0, 0, 0, 0, 1, 1, 1, 1)).flatten(1, 2)  # (B, (h + 2) (w + 2), heads, c)
        for value, size in zip(values.split([h * w for h, w in sizes], 1), sizes, strict=True)
    ]
    # For the lower neighbours of the last border. Not len(values), which an exported graph would hold as a number.
    room = values.new_zeros(values.shape[0], sizes[-1][1] + 3, *values.shape[2:])
    return torch.cat([*levels, room], 1)


def sample_table(table: Tensor, offsets: Tensor, weights: Tensor, sizes: Sizes, start: int = 0) -> Tensor:
    """`sample_bilinear` for the Q cells from `start` on, as one weighted sum of table rows per cell and head.

    table: a `value_table`; offsets (B, Q, heads, levels, points, 2), weights (B, Q, heads, levels points)
    -> (B, Q, heads c). A location outside of a level moves to its border of zeros: every sample reads four cells.
    """
    batch, length, heads, _, points, _ = offsets.shape
    centres, last, row, rows = table_layout(sizes, heads, points, table.device)
    locations = (offsets.flatten(3) + centres[start : start + length]).clamp_(torch.zeros_like(last), last)
    corners = locations.floor()
    x, y = (locations - corners).unflatten(3, (-1, 2)).unbind(-1)  # (B, Q, heads, levels points)
    first = torch.addcmul(corners[..., 0::2], corners[..., 1::2], row).int()  # in cells of a level
    h, w = sizes[-1]
    first = first.clamp_(0, (h + 2) * (w + 2) - 1)  # NaN and inf must not index outside of the table
    images = torch.arange(batch, device=table.device).int() * (table.shape[1] * heads)
    index = first.mul_(heads)[:, :, :, None] + (rows + images.view(-1, 1, 1, 1, 1))  # (B, Q, heads, 4, levels points)
    lower = y * weights
    upper = weights - lower
    lower_right, upper_right = x * lower, x * upper
    shares = torch.stack((upper - upper_right, upper_right, lower - lower_right, lower_right), 3)
    bags = batch * length * heads
    output = F.embedding_bag(
        index.view(bags, -1), table.flatten(0, 2), mode="sum", per_sample_weights=shares.view(bags, -1)
    )
    return output.view(batch, length, -1)


class FastDeformableAttention(DeformableAttention):
    """Deformable attention whose values are laid out once, for tiles of queries."""

    def attend_to(self, pixels: Tensor, sizes: Sizes) -> Callable[[Tensor, int], Tensor]:
        """`forward` with these pixels (B, N, C), for the Q queries (B, Q, C) of the cells from `start` on."""
        table = value_table(self.value_proj(pixels).float().unflatten(-1, (self.num_heads, -1)), sizes)

        def attend(queries: Tensor, start: int = 0) -> Tensor:
            offsets, scores = self.sampling(queries)
            sampled = sample_table(table, offsets, short_softmax(scores), sizes, start)
            return self.output_proj(sampled.to(queries.dtype))

        return attend


# ---- decoders


cached_sine_positions = cache_by_shape(sine_positions)


class FastPixelDecoderLayer(PixelDecoderLayer):
    """The layer on tiles of pixels."""

    def forward(
        self, pixels: Tensor, positions: Tensor, text_keys: Tensor | None, text: Tensor | None, sizes: Sizes
    ) -> Tensor:
        """pixels (B, N, C), positions (1, N, C), text_keys and text (B, K, C) -> pixels (B, N, C)."""
        if torch.onnx.is_in_onnx_export():  # ONNX has no embedding bag
            return super().forward(pixels, positions, text_keys, text, sizes)
        deformable = self.deformable.attend_to(pixels, sizes)
        text_attention = None if self.text_attention is None else self.text_attention.attend_to(text_keys, text)

        def run(tile: Tensor, positions: Tensor, start: int = 0) -> Tensor:
            """Per-pixel from here, so it can run on a tile (B, Q, C) of the cells from `start` on."""
            tile = self.norm1(tile + deformable(tile + positions, start))
            if text_attention is not None:
                tile = self.norm2(tile + text_attention(tile + positions))
            return self.norm3(tile + self.ffn(tile))

        if pixels.device.type != "cpu" or torch.compiler.is_compiling():
            return run(pixels, positions)
        size = TILE if pixels.dtype == torch.float32 else SHORT_TILE
        tiles = zip(pixels.split(size, 1), positions.split(size, 1), strict=True)
        return torch.cat([run(tile, place, size * i) for i, (tile, place) in enumerate(tiles)], 1)


class FastPixelDecoder(PixelDecoder):
    """Cached positions, and the largest maps changed in place."""

    sine_positions = staticmethod(cached_sine_positions)

    def embed_pixels(self, finest: Tensor, fine: Tensor) -> Tensor:
        """As in `PixelDecoder`; every map is freed as soon as the next one is made."""
        pixels = self.lateral(finest)
        pixels.add_(resize(fine.clone(memory_format=torch.channels_last), finest.shape[-2:]))
        for layer in self.output:
            pixels = layer(pixels)
        return self.mask_features(pixels.relu_())


class FastMaskDecoder(MaskDecoder):
    """Cached positions, the pixel embeddings' convolution in the mask head, and no masks larger than needed."""

    sine_positions = staticmethod(cached_sine_positions)

    def mask_logits(self, queries: Tensor, pixels: Tensor) -> Tensor:
        """As in `MaskDecoder`; the mask head's last output is the bias of the mask."""
        weights, bias = self.mask_head(queries).split(pixels.shape[1], -1)  # (B, K, C), (B, K, 1)
        logits = pixels.flatten(2).transpose(1, 2) @ weights.transpose(1, 2)  # (B, h w, K)
        return (logits.transpose(1, 2).contiguous() + bias).unflatten(2, pixels.shape[-2:])

    def forward(
        self,
        text: Tensor,
        pixels: Tensor,
        pyramid: list[Tensor],
        all_layers: bool = True,
        class_texts: Tensor | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As in `MaskDecoder`. For the last layer alone, the others' masks are made at the size of a level.

        Resizing is linear, so a mask of resized pixels is the resized mask.
        """
        if all_layers:
            return super().forward(text, pixels, pyramid, class_texts=class_texts)
        queries = self.text_proj(text)  # (B, K, C)
        keys, values = self.keys_and_values(pyramid)
        coarse = [resize(pixels, level.shape[-2:]) for level in pyramid]
        for index, layer in enumerate(self.layers):
            level = index % NUM_LEVELS
            mask_logits = self.mask_logits(self.post_norm(queries), coarse[level])
            attention_mask = self.attention_mask(mask_logits)
            queries = layer(queries, self.query_positions, keys[level], values[level], attention_mask)
        class_logits, mask_logits = self.predict(queries, pixels, class_texts)
        return [class_logits], [mask_logits]


# ---- the whole model


class FastVisionModel(TqdmVisionModel):
    """Cached positions."""

    rotary_positions = staticmethod(cache_by_shape(rotary_positions))


# The fast classes hold the same parameters, so a layer becomes fast by changing its class.
FAST_CLASSES = {
    TqdmVisionModel: FastVisionModel,
    DeformableAttention: FastDeformableAttention,
    PixelDecoderLayer: FastPixelDecoderLayer,
    PixelDecoder: FastPixelDecoder,
    MaskDecoder: FastMaskDecoder,
}


def check_plain(model: nn.Module) -> None:
    """Raises ValueError, naming the layer, unless all layers are torch's and this model's own, unchanged.

    Adapters, quantised weights, parametrisations, hooks and masks would be lost by folding, or folded wrongly.
    """
    ours = {TqdmVisionModel.__module__, MaskDecoder.__module__, TqdmAttention.__module__, TextualQueries.__module__}
    for name, module in model.named_modules(prefix="model"):
        kind = type(module).__module__
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if kind not in {*ours, type(model).__module__, "transformers.activations"} and not kind.startswith(
            "torch.nn.modules."
        ):
            found = f"a {type(module).__name__}"
        elif "forward" in vars(module) or any(not recorded(hook) for hook in hooks):
            found = "hooks"
        elif any(type(p) is not nn.Parameter or not p.is_floating_point() for p in module.parameters(recurse=False)):
            found = "weights that are not plain, such as quantised ones"
        else:
            continue
        raise ValueError(
            f"prepare_for_inference() needs plain layers, and {name} has {found}; merge adapters and remove hooks, "
            "masks and quantisation before, or predict with the model as loaded"
        )


def recorded(hook: Callable) -> bool:
    """True for the hooks with which transformers records hidden states, which change nothing."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


@torch.no_grad()
def make_fast(model: nn.Module) -> None:
    """Freezes the texts and replaces the layers of a `TqdmModel`, in place, in eval mode; raises as `check_plain`."""
    check_plain(model)
    model.eval()
    model.text_queries.freeze()
    tower, pixels, head = model.vision_tower, model.pixel_decoder, model.mask_decoder
    first, norm, activation, second = tower.pyramid.up4
    tower.pyramid.up4 = PatchExpansion(
        fold_expansion(first, norm=norm), activation, fold_expansion(second, pointwise=pixels.lateral.conv)
    )
    tower.pyramid.up2 = PatchExpansion(fold_expansion(tower.pyramid.up2, pointwise=pixels.inputs[-1].conv))
    pixels.lateral.conv = pixels.inputs[-1].conv = nn.Identity()
    pixels.output.to(memory_format=torch.channels_last)  # as the maps lie after PatchExpansion
    head.mask_head[-1] = fold_mask_head(head.mask_head[-1], pixels.mask_features)
    pixels.mask_features = nn.Identity()
    for layer in pixels.layers:
        if layer.text_attention is not None:
            layer.text_attention.__class__ = FastTextAttention
    for module in model.modules():
        module.__class__ = FAST_CLASSES.get(type(module), type(module))
        if isinstance(module, FeedForward):
            fold_activation(module)
    model.requires_grad_(False)
