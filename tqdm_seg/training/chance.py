"""Chance by sample: what dropout and drop path leave out depends on (seed, sample), however samples are divided.

Letters: B batch.
"""

import torch
from torch import Tensor, nn

from tqdm_seg.backbone_tqdm import DropPath
from tqdm_seg.loss_tqdm import mix_bits, uniform


class Chance:
    """Draws for the samples whose seeds (B,) int32 are set before every forward pass.

    What a layer draws depends on the sample and on torch's generator, from which every layer takes one number: it
    starts alike in all processes, and activation checkpointing turns it back before it computes a layer twice.
    """

    def __init__(self):
        self.seeds = torch.zeros(1, dtype=torch.int32)

    def draw(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Numbers (B, *shape) in 0 ... 1, on the device of x (B, ...)."""
        layer = torch.randint(2**31 - 1, (1,), dtype=torch.int32, device=x.device)
        return uniform(mix_bits(self.seeds.to(x.device)) + layer, shape)


class SampleDropout(nn.Dropout):
    """Dropout that draws by sample."""

    chance: Chance

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ...) -> (B, ...)."""
        if not self.training or self.p == 0:
            return x
        keep = self.chance.draw(x, tuple(x.shape[1:])) >= self.p
        return x * keep.to(x.dtype) / (1 - self.p)


class SampleDropPath(DropPath):
    """Drop path that draws by sample."""

    chance: Chance

    def forward(self, branch: Tensor) -> Tensor:
        """branch (B, ...) -> (B, ...)."""
        if not self.training or self.rate == 0:
            return branch
        keep = self.chance.draw(branch, (1,) * (branch.dim() - 1)) >= self.rate
        return branch * keep.to(branch.dtype) / (1 - self.rate)


def draw_by_sample(model: nn.Module, chance: Chance) -> None:
    """Makes every dropout and drop path of a model draw by sample, in place."""
    kinds = {nn.Dropout: SampleDropout, DropPath: SampleDropPath}
    for module in model.modules():
        if type(module) in kinds:
            module.__class__ = kinds[type(module)]
            module.chance = chance
