"""The frozen teacher of two regularisers: vision tower and text embeddings as pre-trained."""

import copy

import torch
from torch import Tensor, nn

from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

# Values of --teacher-precision.
TEACHER_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Teacher(nn.Module):
    """A copy of the vision tower, and the reference text embeddings, taken before training starts.

    Make it when the model holds its pre-trained weights and keep it out of what is saved. In the published code the
    runner switches the copy back into train mode, so that CLIP's drop-path makes the target noisy: `drop_path=True`
    reproduces that; otherwise the copy stays in eval mode.
    dtype: of the copy, by default the model's; bfloat16 takes a third of the time and half the memory, and moves the
    image embedding by about a hundredth of its length.
    """

    def __init__(self, model: TqdmForSemanticSegmentation, drop_path: bool = False, dtype: torch.dtype | None = None):
        super().__init__()
        self.drop_path = drop_path
        self.vision_tower = copy.deepcopy(model.model.vision_tower).requires_grad_(False)
        del self.vision_tower.pyramid  # never run here
        self.vision_tower.to(dtype=dtype)
        self.register_buffer("text", model.model.text_queries.encode_reference())  # (K, E)
        self.train(model.training)

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in eval mode unless `drop_path`."""
        return super().train(mode and self.drop_path)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """pixel_values (B, 3, H, W) -> the two reference arguments of the model's forward, (B, E) and (K, E)."""
        with torch.inference_mode():
            _, tokens = self.vision_tower(pixel_values, with_pyramid=False)
        # A copy outside of inference mode, which the loss may keep for its backward pass.
        return {"reference_image_embedding": tokens[:, 0].clone(), "reference_text_embedding": self.text}
