"""Text side of tqdm: frozen CLIP text tower, learned prompt, and the context decoder that attends to the image.

Letters: B batch, K classes = textual queries, L text length, T text width, E image-text width, N pixel tokens.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import is_tracing

from .configuration_tqdm import TqdmConfig, TqdmTextConfig, quote
from .layers_tqdm import FeedForward, TqdmAttention, TqdmBaseModel, additive_mask, initialise_clip_block


class TextBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block of CLIP's text tower."""

    def __init__(self, config: TqdmTextConfig):
        super().__init__()
        self.depth = config.num_hidden_layers
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = TqdmAttention(config, config.hidden_size, config.num_attention_heads)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ffn = FeedForward(config.hidden_size, config.intermediate_size, config.hidden_act)

    def initialise(self) -> None:
        """CLIP's scaled normal initialisation; published settings load pre-trained weights instead."""
        initialise_clip_block(self, self.norm1.normalized_shape[0], self.depth)

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """tokens (K, L, T) -> (K, L, T)."""
        normed = self.norm1(tokens)
        tokens = tokens + self.attention(normed, normed, normed, attention_mask)
        return tokens + self.ffn(self.norm2(tokens))


class TqdmTextModel(TqdmBaseModel):
    """CLIP's text tower, with learned prompt vectors between the start token and the class name."""

    config: TqdmTextConfig
    main_input_name = "token_ids"
    input_modalities = ("text",)

    def __init__(self, config: TqdmTextConfig):
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Parameter(torch.empty(config.max_position_embeddings, config.hidden_size))
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.num_hidden_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    def initialise(self) -> None:
        """CLIP's initialisation of what is in no block; published settings load pre-trained weights instead."""
        init.normal_(self.token_embedding.weight, std=0.02)
        init.normal_(self.position_embedding, std=0.01)
        init.normal_(self.projection.weight, std=self.config.hidden_size**-0.5)

    def get_input_embeddings(self) -> nn.Module:
        """The token table."""
        return self.token_embedding

    def forward(self, token_ids: Tensor, prompt: Tensor | None = None) -> Tensor:
        """token_ids (K, L), zero after the end token; prompt (P, T) or none -> embeddings (K, E), not normalised.

        Attention is causal and the end token's row is read, so the padding changes nothing.
        """
        tokens = self.token_embedding(token_ids)  # (K, L, T)
        end = token_ids.argmax(-1)  # (K); the end token has the largest id
        if prompt is not None:
            prompt = prompt.to(tokens.dtype).expand(len(tokens), -1, -1)  # (K, P, T)
            tokens = torch.cat((tokens[:, :1], prompt, tokens[:, 1:]), 1)  # (K, P + L, T)
            end = end + prompt.shape[1]
        length = tokens.shape[1]
        tokens = tokens + self.position_embedding[:length]
        future = torch.ones(1, length, length, dtype=torch.bool, device=tokens.device).triu(1)
        attention_mask = additive_mask(future, tokens.dtype)  # (1, 1, L, L)
        for block in self.blocks:
            tokens = block(tokens, attention_mask)
        last = tokens[torch.arange(len(tokens), device=tokens.device), end]  # (K, T)
        return self.projection(self.final_norm(last))


class ContextDecoderLayer(nn.Module):
    """Pre-norm: self-attention among the texts, cross-attention to the image, feed-forward."""

    def __init__(self, config: TqdmConfig):
        super().__init__()
        width, heads = config.context_decoder_hidden_size, config.context_decoder_heads
        eps = config.layer_norm_eps
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.self_attention = TqdmAttention(config, width, heads, query_value_bias=False, key_bias=False)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.cross_attention = TqdmAttention(config, width, heads, query_value_bias=False, key_bias=False)
        self.norm3 = nn.LayerNorm(width, eps=eps)
        self.ffn = FeedForward(width, 4 * width, "gelu", config.context_decoder_dropout)
        self.dropout = nn.Dropout(config.context_decoder_dropout)

    def forward(self, text: Tensor, memory: Tensor) -> Tensor:
        """text (B, K, C), memory (B, 1 + N, C) -> (B, K, C)."""
        normed = self.norm1(text)
        text = text + self.dropout(self.self_attention(normed, normed, normed))
        text = text + self.dropout(self.cross_attention(self.norm2(text), memory, memory))
        return text + self.ffn(self.norm3(text))


class ContextDecoder(nn.Module):
    """Adds image context to each class's text embedding (context-aware prompting of DenseCLIP)."""

    def __init__(self, config: TqdmConfig):
        super().__init__()
        width, embedding = config.context_decoder_hidden_size, config.text_config.projection_dim
        eps = config.layer_norm_eps
        self.memory_proj = nn.Sequential(
            nn.LayerNorm(embedding, eps=eps), nn.Linear(embedding, width), nn.LayerNorm(width, eps=eps)
        )
        self.text_proj = nn.Sequential(nn.LayerNorm(embedding, eps=eps), nn.Linear(embedding, width))
        self.layers = nn.ModuleList(ContextDecoderLayer(config) for _ in range(config.context_decoder_layers))
        self.out_proj = nn.Sequential(nn.LayerNorm(width, eps=eps), nn.Linear(width, embedding))

    def initialise(self) -> None:
        """Truncated normal 0.02 for every linear layer, as in DenseCLIP."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    init.zeros_(module.bias)

    def forward(self, text: Tensor, visual: Tensor) -> Tensor:
        """text (B, K, E), visual (B, 1 + N, E) -> (B, K, E)."""
        memory = self.memory_proj(visual)  # (B, 1 + N, C)
        text = self.text_proj(text)  # (B, K, C)
        for layer in self.layers:
            text = layer(text, memory)
        return self.out_proj(text)


class TextualQueries(nn.Module):
    """One query per class: frozen text tower with a learned prompt, then the context decoder (section 3.2).

    A table of given vectors, or stored embeddings, can stand for tower and prompt.
    """

    def __init__(self, config: TqdmConfig):
        super().__init__()
        self.config = config
        width, embedding = config.text_config.hidden_size, config.text_config.projection_dim
        self.context_decoder = ContextDecoder(config)
        self.gamma = nn.Parameter(torch.empty(embedding))
        if config.frozen_texts is not None:
            self.register_buffer("encoded", torch.empty(config.num_labels, embedding))  # (K, E)
            return
        if config.queries == "vectors":
            self.register_buffer("text_vectors", torch.empty(len(config.class_vectors["names"]), embedding))  # (V, E)
            self.set_texts(config)
            return
        self.text_tower = TqdmTextModel._from_config(config.text_config)
        # The learned prompt, or without class texts (ablation) a learned vector per class. Modules, not parameters, so
        # that `encode` also finds weights that are offloaded or sharded.
        if config.queries == "textual":
            self.prompt = nn.Embedding(config.text_config.num_prompt_tokens, width)
        else:
            self.class_vectors = nn.Embedding(config.num_labels, embedding)
        config.resolve_token_ids()  # the prompt may have been edited since the configuration was made
        self.set_texts(config)

    def set_texts(self, config: TqdmConfig) -> None:
        """Takes the token ids of the query texts and of the reference texts: K rows each, padded with zeros.

        Of given vectors it takes the numbers of their rows. Lists, which no device and no loading of weights can lose.
        Raises ValueError as `token_table`.
        """
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}  # these lists as tensors
        if config.queries == "vectors":
            self.text_rows = [config.class_vectors["names"].index(text) for text in config.query_texts]
            return
        self.token_ids, self.reference_token_ids = self.token_table(config), self.token_table(config, prompted=True)

    @staticmethod
    def token_table(config: TqdmConfig, prompted: bool = False) -> list[list[int]]:
        """Token ids of the texts, K rows padded with zeros; raises ValueError for texts longer than the positions."""
        rows = [config.text_token_ids(text, prompted) for text in config.query_texts]
        room = config.text_config.max_position_embeddings
        room -= 0 if prompted else config.text_config.num_prompt_tokens
        for text, row in zip(config.query_texts, rows, strict=True):
            if len(row) > room:
                raise ValueError(
                    f"class name {quote(text)} needs {len(row)} text positions{' inside reference_prompt' * prompted} "
                    f"and {room} are left in the position table; use a shorter name, or weights with CLIP's 77 "
                    "positions (published checkpoints keep only the first ones)"
                )
        length = max(map(len, rows))
        return [row + [0] * (length - len(row)) for row in rows]

    def initialise(self) -> None:
        """Prompt and gamma with standard deviation 1, as published (the published code overwrites gamma's 1e-4).

        Runs after construction and after loading; then it keeps loaded weights and freezes the text tower.
        """
        init.trunc_normal_(self.gamma, std=1.0, a=-2.0, b=2.0)
        if self.config.frozen_texts is not None:
            init.zeros_(self.encoded)
            return
        if self.config.queries == "vectors":
            init.normal_(self.text_vectors)  # until `use_class_vectors`
            return
        if self.config.queries == "textual":
            init.trunc_normal_(self.prompt.weight, std=1.0, a=-2.0, b=2.0)
        # Here and not in the constructor: loading replaces the parameters and their requires_grad.
        self.text_tower.requires_grad_(False)

    @torch.no_grad()
    def freeze(self) -> None:
        """Replaces text tower and prompt, where there are any, by the result of `encode`."""
        if self.config.has_text_tower:
            self._replace_tower("encoded", self.encode().detach().clone())
            self.config.frozen_texts = list(self.config.query_texts)

    def use_vectors(self, config: TqdmConfig, vectors: Tensor) -> None:
        """Takes a table of vectors (V, E) for the texts of `config`, in the place of what encoded them."""
        self._replace_tower("text_vectors", vectors.to(self.gamma.device, self.gamma.dtype))
        self.set_texts(config)

    def _replace_tower(self, name: str, values: Tensor) -> None:
        for part in ("text_tower", "prompt", "class_vectors", "encoded", "text_vectors"):
            if hasattr(self, part):
                delattr(self, part)
        self.register_buffer(name, values)

    def encode(self) -> Tensor:
        """Text embeddings (K, E) of the prompted query texts, the same for every image."""
        if self.config.frozen_texts is not None:
            return self.encoded
        if self.config.queries == "vectors":
            return self.given_texts() * self.text_vectors.shape[1] ** 0.5  # entries of variance 1
        device = self._device()
        table = self.prompt if self.config.queries == "textual" else self.class_vectors
        rows = table(torch.arange(table.num_embeddings, device=device))
        if self.config.queries == "random":
            return rows
        return self.text_tower(self._indices("token_ids", device), rows)

    def _device(self) -> torch.device:
        """Where token ids go; of offloaded weights it is known to accelerate's hooks alone, which move inputs there."""
        weight = self.text_tower.token_embedding.weight
        offloaded = weight.is_meta and hasattr(self.text_tower.token_embedding, "_hf_hook")
        return torch.device("cpu") if offloaded else weight.device

    def _indices(self, name: str, device: torch.device) -> Tensor:
        """The list that `set_texts` made under this name, as a tensor (K, ...); copied to every device once."""
        rows = getattr(self, name)
        if is_tracing():
            return torch.tensor(rows).to(device)
        ids = self._on_device.get((name, device))
        if ids is None:
            with torch.inference_mode(False):  # training refuses tensors made in inference mode
                ids = torch.tensor(rows).to(device, non_blocking=True)
            if not is_tracing(ids):  # a FakeTensor serves its mode only
                self._on_device[name, device] = ids
        return ids

    @torch.no_grad()
    def encode_reference(self) -> Tensor:
        """Unit-length embeddings (K, E) of the reference texts, without learned prompt, for the textual regulariser.

        Raises ValueError once the texts are frozen.
        """
        if self.config.queries == "vectors":
            return self.given_texts()
        if self.config.frozen_texts is not None:
            raise ValueError("freeze_text() dropped the text tower, which training needs; train the original model")
        return F.normalize(self.text_tower(self._indices("reference_token_ids", self._device())), dim=-1)

    def given_texts(self) -> Tensor:
        """Unit-length rows (K, E) of the query texts in the table of given vectors, centred where that is asked for."""
        vectors = F.normalize(self.text_vectors, dim=-1)  # (V, E)
        if self.config.centre_class_vectors:
            vectors = F.normalize(vectors - vectors.mean(0), dim=-1)
        return vectors[self._indices("text_rows", vectors.device)]

    def forward(self, visual: Tensor, encoded: Tensor | None = None) -> Tensor:
        """visual (B, 1 + N, E) image and patch tokens; encoded: a stored result of `encode` -> queries (B, K, E)."""
        encoded = self.encode() if encoded is None else encoded
        text = encoded.expand(visual.shape[0], -1, -1)  # (B, K, E)
        return text + self.gamma * self.context_decoder(text, visual)
