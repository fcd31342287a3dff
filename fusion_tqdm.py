"""Layers that follow one another without anything between them, folded into one: fewer products, the same sums.

Letters: D vision width, C hidden width, M what lies between two layers.
"""

import torch
from torch import Tensor, nn

from .layers_tqdm import FeedForward


class PatchExpansion(nn.Module):
    """`nn.ConvTranspose2d` with kernel and stride 2 as one matrix product: every cell becomes four."""

    def __init__(self, weight: Tensor, bias: Tensor):
        """weight (D, C, 2, 2) of the transposed convolution, bias (C)."""
        super().__init__()
        width, channels = weight.shape[:2]
        self.linear = nn.utils.skip_init(nn.Linear, width, 4 * channels, dtype=weight.dtype, device=weight.device)
        self.linear.weight.copy_(weight.permute(2, 3, 1, 0).reshape(-1, width))  # (2 2 C, D)
        self.linear.bias.copy_(bias.repeat(4))

    def forward(self, maps: Tensor) -> Tensor:
        """maps (B, D, h, w) -> (B, C, 2h, 2w), both fastest where the channels lie side by side in memory."""
        h, w = maps.shape[-2:]
        cells = self.linear(maps.flatten(2).transpose(1, 2))  # (B, h w, 2 2 C)
        cells = cells.unflatten(2, (2, 2, -1)).unflatten(1, (h, w))  # (B, h, w, 2, 2, C)
        return cells.transpose(2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def expansion_of(
    convolution: nn.ConvTranspose2d, norm: nn.BatchNorm2d | None = None, pointwise: nn.Conv2d | None = None
) -> PatchExpansion:
    """A transposed convolution (kernel and stride 2) and what follows it: BatchNorm in eval mode, a 1x1 convolution."""
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
    kind = convolution.weight.dtype
    return PatchExpansion(weight.to(kind), bias.to(kind))


def head_with_pixels(last: nn.Linear, pointwise: nn.Conv2d) -> nn.Linear:
    """The mask head's last layer (C, C) and the 1x1 convolution that makes the pixels it is multiplied with.

    head . (W x + b) = (W' head) . x + b . head: the layer gets one more output, the bias of the mask.
    """
    mixing = torch.cat((pointwise.weight.double()[..., 0, 0], pointwise.bias.double()[:, None]), 1)  # (C, C + 1)
    width = last.in_features
    folded = nn.utils.skip_init(nn.Linear, width, width + 1, dtype=last.weight.dtype, device=last.weight.device)
    folded.weight.copy_(mixing.T @ last.weight.double())
    folded.bias.copy_(mixing.T @ last.bias.double())
    return folded


def fold_activation(ffn: FeedForward) -> None:
    """Quick GELU x sigmoid(1.702 x) = silu(1.702 x) / 1.702: its factors go into the layers; activations in place."""
    if isinstance(ffn.activation, nn.ReLU):
        ffn.activation = nn.ReLU(inplace=True)
    elif type(ffn.activation).__name__ == "QuickGELUActivation":
        ffn.fc1.weight.mul_(1.702)
        ffn.fc1.bias.mul_(1.702)
        ffn.fc2.weight.div_(1.702)
        ffn.activation = nn.SiLU(inplace=True)
