"""The frozen reference that two regularisers compare with: the vision tower and text embeddings as pre-trained."""

import copy

import torch
from torch import Tensor, nn

from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation


class FrozenReference(nn.Module):
    """A copy of the vision tower, and the reference text embeddings, taken before training starts.

    Make it when the model holds its pre-trained weights and keep it out of what is saved. In the published code the
    runner switches the copy back into train mode, so that CLIP's drop-path makes the target noisy:
    `follow_train_mode=True` reproduces that; otherwise the copy stays in eval mode.
    dtype: of the copy, by default the model's; bfloat16 takes a third of the time and half the memory, and moves the
    image embedding by about a hundredth of its length.
    """

    def __init__(
        self, model: TqdmForSemanticSegmentation, follow_train_mode: bool = False, dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.follow_train_mode = follow_train_mode
        self.vision_tower = copy.deepcopy(model.model.vision_tower).requires_grad_(False)
        del self.vision_tower.pyramid  # never run here
        self.vision_tower.to(dtype=dtype)
        self.register_buffer("text", model.model.text_queries.encode_reference())  # (K, E)
        self.train(model.training)

    def train(self, mode: bool = True) -> "FrozenReference":
        """Stays in eval mode unless `follow_train_mode`."""
        return super().train(mode and self.follow_train_mode)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """pixel_values (B, 3, H, W) -> the two reference arguments of the model's forward, (B, E) and (K, E)."""
        with torch.inference_mode():
            _, tokens = self.vision_tower(pixel_values, with_pyramid=False)
        # A copy outside of inference mode, which the loss may keep for its backward pass.
        return {"reference_image_embedding": tokens[:, 0].clone(), "reference_text_embedding": self.text}
