"""Layers that follow one another without anything between them, folded into one: fewer products, the same sums.

Letters: D vision width, C hidden width, M what lies between two layers.
"""

import torch
from torch import Tensor, nn

from .layers_tqdm import FeedForward


class PatchExpansion(nn.Sequential):
    """Transposed convolutions with kernel and stride 2, and activations, as matrix products: `nn.Linear` makes of every
    cell four, which find their places only at the end, in one copy."""

    def forward(self, maps: Tensor) -> Tensor:
        """maps (B, D, h, w) -> (B, C, 2^n h, 2^n w), fastest where the channels lie side by side, as in the result."""
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


def expansion_of(
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
    return linear_of(weight.permute(2, 3, 1, 0).flatten(0, 2), bias.repeat(4), convolution.weight)


def linear_of(weight: Tensor, bias: Tensor, like: Tensor) -> nn.Linear:
    """A layer with this weight (C, D) and bias (C), of the kind and on the device of `like`."""
    linear = nn.utils.skip_init(nn.Linear, *reversed(weight.shape), dtype=like.dtype, device=like.device)
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)
    return linear


def head_with_pixels(last: nn.Linear, pointwise: nn.Conv2d) -> nn.Linear:
    """The mask head's last layer (C, C) and the 1x1 convolution that makes the pixels it is multiplied with.

    head . (W x + b) = (W' head) . x + b . head: the layer gets one more output, the bias of the mask.
    """
    mixing = torch.cat((pointwise.weight.double()[..., 0, 0], pointwise.bias.double()[:, None]), 1)  # (C, C + 1)
    return linear_of(mixing.T @ last.weight.double(), mixing.T @ last.bias.double(), last.weight)


def fold_activation(ffn: FeedForward) -> None:
    """Quick GELU x sigmoid(1.702 x) = silu(1.702 x) / 1.702: its factors go into the layers; activations in place."""
    if isinstance(ffn.activation, nn.ReLU):
        ffn.activation = nn.ReLU(inplace=True)
    elif type(ffn.activation).__name__ == "QuickGELUActivation":
        ffn.fc1.weight.mul_(1.702)
        ffn.fc1.bias.mul_(1.702)
        ffn.fc2.weight.div_(1.702)
        ffn.activation = nn.SiLU(inplace=True)
