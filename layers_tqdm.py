"""Layers of towers and decoders: multi-head attention through transformers' interface, feed-forward, base class; and
the checks before a forward pass.

Letters: B batch, Q queries, N keys, C width, K classes.
"""

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.utils import is_tracing, logging

logger = logging.get_logger(__name__)


def make_vector(values: Sequence[float], device: torch.device) -> Tensor:
    """values as a float32 vector, written on the device: the host would have to wait for a copy to a GPU."""
    return torch.cat([torch.full((1,), value, device=device) for value in values])


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of maps (B, C, h, w)."""
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def check_images(pixel_values: Any, channels: int) -> None:
    """Raises ValueError, saying what came, unless this is a batch (B, channels, H, W) of normalised, finite images.

    Values are looked at where that costs nothing: in the host's memory, while no graph is traced.
    """
    if not isinstance(pixel_values, Tensor):
        came = f"a {type(pixel_values).__name__}"
    elif pixel_values.is_nested or pixel_values.layout is not torch.strided:
        came = "a nested or sparse tensor"
    elif pixel_values.dim() != 4 or pixel_values.shape[1] != channels or not pixel_values.numel():
        came = f"a tensor {tuple(pixel_values.shape)}"
    elif pixel_values.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        came = f"a tensor of {pixel_values.dtype}"
    elif pixel_values.is_cpu and not is_tracing(pixel_values) and not pixel_values.isfinite().all():
        came = "NaN or inf"
    else:
        return
    raise ValueError(
        f"pixel_values must be normalised images, a float tensor (batch, {channels}, height, width), not {came}; the "
        "image processor makes it"
    )


def check_names(config: PreTrainedConfig) -> None:
    """Raises ValueError where `id2label` of a model was edited, and its weights do not follow."""
    shown = config.display_names or {}
    if list(config.id2label.values()) != [shown.get(text, text) for text in config.query_texts]:
        config.check_rows()


def warn_untrained(config: PreTrainedConfig) -> None:
    """Warns, once, of predictions of a model that is not trained."""
    if not config.trained and not is_tracing():
        logger.warning_once(
            "this model is the start of a training: its predictions mean nothing. Train it first, or, if it is "
            "trained, set config.trained = True and save it"
        )


class TqdmBaseModel(PreTrainedModel):
    """Base class of the towers and of the whole model: weight initialisation, and what they support in transformers.

    A module with its own rule has an `initialise()` that uses `transformers.initialization`, whose functions skip
    loaded weights. All other weights get torch's default initialisation, as in the published code.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["VisionBlock", "TextBlock", "PixelDecoderLayer", "MaskDecoderLayer"]

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        config.validate()  # transformers and users set fields after the configuration was made
        super().__init__(config, *args, **kwargs)

    def _initialize_weights(self, module: nn.Module, *_: Any, **__: Any) -> None:
        # transformers skips remote-code modules that hold no parameters themselves, such as the deformable attention,
        # whose rule would silently never run. Every function of `init` is safe on loaded weights.
        if not getattr(module, "_is_hf_initialized", False):
            self._init_weights(module)
            module._is_hf_initialized = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(nn.init._calculate_fan_in_and_fan_out(module.weight)[0])
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm2d | nn.SyncBatchNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
                init.zeros_(module.running_mean)
                init.ones_(module.running_var)
                init.zeros_(module.num_batches_tracked)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif hasattr(module, "initialise"):
            module.initialise()


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain operations, with the signature of transformers' attention functions."""
    scores = query @ key.transpose(-1, -2) * scaling  # (B, heads, Q, N)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def xformers_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`attn_implementation="xformers"`: memory-efficient attention of the xformers package, on a GPU."""
    try:
        ops = importlib.import_module("xformers.ops")
    except ImportError as error:
        raise ImportError(
            'attn_implementation="xformers" needs the xformers package: pip install xformers, or choose "sdpa"'
        ) from error
    if attention_mask is not None:
        heads, length = query.shape[1], key.shape[2]
        # xformers reads the bias in steps of eight: the last dimension of its storage has to be padded to that.
        padded = nn.functional.pad(attention_mask.to(query.dtype), (0, -length % 8))
        attention_mask = padded.expand(query.shape[0], heads, query.shape[2], -1)[..., :length]
    output = ops.memory_efficient_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_bias=attention_mask, scale=scaling
    )  # (B, Q, heads, head size)
    return output, None


AttentionInterface.register("xformers", xformers_attention_forward)


def rotate(tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of adjacent pairs; tokens (B, heads, 1 + N, d), cos and sin (N, d); not of token 0."""
    patches = tokens[:, :, 1:]
    swapped = torch.stack((-patches[..., 1::2], patches[..., 0::2]), -1).flatten(-2)  # (B, heads, N, d)
    return torch.cat((tokens[:, :, :1], (patches * cos + swapped * sin).to(tokens.dtype)), 2)


class AttentionWeights(nn.Identity):
    """Where transformers records `attentions`."""


class TqdmAttention(nn.Module):
    """Multi-head attention with separate projections; the configuration names the attention function."""

    # Read by the sdpa and flash functions of transformers, which otherwise assume a causal mask.
    is_causal = False

    def __init__(
        self,
        config: PreTrainedConfig,
        hidden_size: int,
        num_heads: int,
        query_value_bias: bool = True,
        key_bias: bool = True,
        inner_norm_eps: float | None = None,
    ):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.scaling = (hidden_size // num_heads) ** -0.5
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=query_value_bias)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=key_bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=query_value_bias)
        self.inner_norm = nn.Identity() if inner_norm_eps is None else nn.LayerNorm(hidden_size, eps=inner_norm_eps)
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.weights = AttentionWeights()

    def initialise(self) -> None:
        """As `nn.MultiheadAttention`: Xavier over the stacked (3 C, C) projection, zero biases."""
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            init.xavier_uniform_(projection.weight, gain=2**-0.5)  # the bound of (3 C, C) for (C, C)
            if projection.bias is not None:
                init.zeros_(projection.bias)
        init.zeros_(self.out_proj.bias)

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        attention_mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        output_attentions: bool | None = None,
    ) -> Tensor:
        """queries (B, Q, C), keys and values (B, N, C), additive attention_mask (B or 1, 1, Q, N) -> (B, Q, C).

        output_attentions: attend in plain operations, which alone have weights for transformers to record.
        """
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, x in ((self.q_proj, queries), (self.k_proj, keys), (self.v_proj, values))
        )  # (B, heads, Q or N, C / heads)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        name = "eager" if output_attentions else self.config._attn_implementation
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        output, weights = attention(self, q, k, v, attention_mask, scaling=self.scaling, dropout=0.0)
        if weights is not None:
            self.weights(weights)
        return self.out_proj(self.inner_norm(output.flatten(2)))


class FeedForward(nn.Module):
    """Linear, activation, linear; with dropout after each where a rate is given."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str, dropout: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.activation = ACT2FN[activation]
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., C)."""
        return self.dropout(self.fc2(self.dropout(self.activation(self.fc1(x)))))


def additive_mask(blocked: Tensor, dtype: torch.dtype) -> Tensor:
    """blocked (B, Q, N) bool -> (B, 1, Q, N) in dtype: 0 where open, the most negative number where blocked."""
    return torch.zeros_like(blocked, dtype=dtype).masked_fill(blocked, torch.finfo(dtype).min)[:, None]


def initialise_clip_block(block: nn.Module, width: int, num_layers: int) -> None:
    """CLIP's scaled normal initialisation of a pre-norm block's `attention` (and `ffn`, if it is a `FeedForward`)."""
    out_std = (2 * width * num_layers) ** -0.5
    scales = {block.attention.out_proj: out_std}
    scales |= {p: width**-0.5 for p in (block.attention.q_proj, block.attention.k_proj, block.attention.v_proj)}
    if isinstance(block.ffn, FeedForward):
        scales |= {block.ffn.fc1: (2 * width) ** -0.5, block.ffn.fc2: out_std}
    for linear, std in scales.items():
        init.normal_(linear.weight, std=std)
        if linear.bias is not None:
            init.zeros_(linear.bias)
