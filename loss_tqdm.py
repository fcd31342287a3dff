"""Losses of tqdm: fixed matching of query q to class q, for all layers at once, and the three regularisers.

Letters: B batch, K classes = textual queries, L predictions (bare queries and every layer), M supervised masks,
P points, E image-text width, H, W image, h, w mask logits.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class LossCounts(NamedTuple):
    """Normalisers of the losses, scalars: of one batch, or their mean over all batches of an optimiser step.

    With the mean, the average of the batches' losses is the loss of the whole step, for any number of processes and
    accumulated batches.
    masks: supervised masks. class_weight: sum of the queries' weights in the class loss. labelled: pixels that the
    score-map loss is averaged over.
    """

    masks: Tensor
    class_weight: Tensor
    labelled: Tensor


def count_losses(
    mask_index: Tensor, labels: Tensor, num_classes: int, no_object_weight: float, over: str, ignore_index: int
) -> LossCounts:
    """Counts of one batch: mask_index (M, 2), labels (B, H, W), both on the target device."""
    masks = torch.full((), float(len(mask_index)), device=labels.device)
    queries = len(labels) * num_classes
    labelled = labels.numel() if over == "all" else (labels != ignore_index).sum()
    return LossCounts(
        masks, masks + no_object_weight * (queries - masks), torch.as_tensor(labelled, device=labels.device).float()
    )


def check_labels(labels: Tensor, pixel_values: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raises ValueError for labels of other types than integers, of another size, and with ids that are no class.

    On a GPU an assertion on the device checks the ids, so that the host does not wait.
    """
    kind = labels.dtype if isinstance(labels, Tensor) else None
    if kind is None or kind.is_floating_point or kind.is_complex or kind == torch.bool:
        came = f"of {labels.dtype}" if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
        raise ValueError(f"labels are {came} and must be a tensor of class ids, of any integer type")
    labels = labels.long()
    expected = (len(pixel_values), *pixel_values.shape[-2:])
    if tuple(labels.shape) != expected:
        raise ValueError(
            f"labels are {tuple(labels.shape)} and must be {expected}, (batch, height, width) of pixel_values; resize "
            "them with the images (nearest neighbour)"
        )
    if torch.compiler.is_compiling():
        return
    known = ((labels >= 0) & (labels < num_classes) | (labels == ignore_index)).all()
    message = f"labels must be 0 ... {num_classes - 1} (id2label) or {ignore_index} (ignored)"
    if labels.is_cuda:
        torch._assert_async(known, message)
    elif not known:
        unknown = [i for i in labels.unique().tolist() if i != ignore_index and not 0 <= i < num_classes]
        raise ValueError(f"{message}, but hold {str(unknown)[:60]}; map these ids, or add the classes to id2label")


def check_loss_fields(config: Any) -> None:
    """Raises ValueError for fields of the losses that make no sense; a compiled graph holds no such check."""
    if not torch.compiler.is_compiling():
        config.check_losses()


def check_embedding(name: str, value: Tensor | None, expected: Tensor, finite: bool) -> None:
    """Raises ValueError unless the embedding, where there is one, has the shape of `expected`, and `finite` numbers."""
    if value is None:
        return
    if not isinstance(value, Tensor) or value.shape != expected.shape or not value.is_floating_point():
        came = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"{name} is {came} and must be a float tensor {tuple(expected.shape)}")
    if finite and value.is_cpu and not torch.compiler.is_compiling() and not value.isfinite().all():
        raise ValueError(f"{name} holds NaN or inf; check the weights of the teacher that made it")


def check_seeds(seeds: Tensor | None, batch: int) -> None:
    """Raises ValueError unless the seeds, where there are any, are one int32 per image."""
    if seeds is not None and not (isinstance(seeds, Tensor) and seeds.dtype == torch.int32 and seeds.shape == (batch,)):
        came = f"{tuple(seeds.shape)} {seeds.dtype}" if isinstance(seeds, Tensor) else f"a {type(seeds).__name__}"
        raise ValueError(f"sample_seeds is {came} and must be a tensor ({batch},) of int32, one per image")


def check_mask_index(mask_index: Tensor, batch: int, num_classes: int) -> None:
    """Raises ValueError unless it is (M, 2) of images and classes; values on a GPU are not looked at."""
    if not isinstance(mask_index, Tensor) or mask_index.dtype != torch.int64 or mask_index.shape[1:] != (2,):
        came = f"{tuple(mask_index.shape)} {mask_index.dtype}" if isinstance(mask_index, Tensor) else type(mask_index)
        raise ValueError(f"mask_index is {came} and must be a tensor (masks, 2) of int64, see supervised_masks()")
    if mask_index.device.type == "cpu" and not torch.compiler.is_compiling():
        limits = torch.tensor((batch, num_classes))
        if not ((mask_index >= 0) & (mask_index < limits)).all():
            raise ValueError(f"mask_index must hold images below {batch} and classes below {num_classes}")


def supervised_masks(labels: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Image and class (M, 2) of every class present in labels (B, H, W): images in order, classes ascending.

    The number of rows depends on the values, so on a GPU the host waits for the result. A data loader computes it on
    the CPU and passes it to the model.
    """
    slots = torch.where(labels == ignore_index, num_classes, labels).flatten(1)  # (B, H W)
    present = torch.zeros(len(labels), num_classes + 1, dtype=torch.bool, device=labels.device)
    return present.scatter_(1, slots, True)[:, :num_classes].nonzero()


def sample_labels(labels: Tensor, mask_index: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples (L, M, P), in 0 ... 1, of the binary masks `labels[image] == class` at points (L, M, P, 2).

    points are x, y in 0 ... 1 of the image; outside all masks are zero.
    """
    image, wanted = mask_index.unbind(-1)
    masks = (labels.int()[image] == wanted[:, None, None]).float()  # (M, H, W), the same for all predictions
    grid = (2 * points.transpose(0, 1)).sub_(1).flatten(1, 2)  # (M, L P, 2)
    samples = F.grid_sample(masks[:, None], grid[:, None], align_corners=False)[:, 0, 0]  # (M, L P)
    return samples.unflatten(1, points.shape[::2]).transpose(0, 1)


def sample_logits(mask_logits: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples (L, M, P) of mask logits (L, M, h, w), zero outside, at points (L, M, P, 2), x, y in 0 ... 1."""
    logits = mask_logits.flatten(0, 1)[:, None]  # (L M, 1, h, w)
    grid = (2 * points).sub_(1).flatten(0, 1)[:, None].to(logits.dtype)  # (L M, 1, P, 2)
    return F.grid_sample(logits, grid, align_corners=False).view(points.shape[:-1])


def mix_bits(x: Tensor) -> Tensor:
    """Whole numbers (...) int32 -> others that look random (the hash "lowbias32"); on every device the same."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        x = (x ^ (x >> shift & 2 ** (32 - shift) - 1)) * factor
    return x ^ (x >> 16 & 0xFFFF)


def uniform(seeds: Tensor, shape: Sequence[int]) -> Tensor:
    """Random numbers (S, *shape) in 0 ... 1; those of a seed, of seeds (S,) int32, depend on nothing else."""
    index = torch.arange(math.prod(shape), dtype=torch.int32, device=seeds.device)
    bits = mix_bits(mix_bits(index) + mix_bits(seeds)[:, None])
    return ((bits >> 8 & 0xFFFFFF).float() * 2**-24).unflatten(1, tuple(shape))


@torch.no_grad()
def choose_points(
    mask_logits: Tensor, extent: Tensor, num_points: int, oversample_ratio: float, importance_sample_ratio: float,
    seeds: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Random points (L, M, P, 2), x, y in 0 ... 1 of the image, most of them where the masks are least certain.

    PointRend's importance sampling: of num_points times oversample_ratio uniform points, those with the smallest
    |logit| make up importance_sample_ratio of the result; the rest is uniform.
    mask_logits (L, M, h, w); extent (2): the image's share x, y of the logits' area. seeds (M,) int32: of the masks,
    see `uniform`; without them torch's generator draws.
    """
    predictions, masks = mask_logits.shape[:2]
    uncertain = int(importance_sample_ratio * num_points)
    size, fresh_size = int(num_points * oversample_ratio), num_points - uncertain
    if seeds is None:
        candidates, fresh = (
            torch.rand(predictions, masks, count, 2, device=mask_logits.device) for count in (size, fresh_size)
        )
    else:
        points = uniform(seeds, (predictions, size + fresh_size, 2)).transpose(0, 1)
        candidates, fresh = points.split((size, fresh_size), 2)  # (L, M, S, 2), (L, M, P - U, 2)
    certainty = sample_logits(mask_logits, candidates * extent).abs()  # (L, M, S)
    index = certainty.topk(uncertain, -1, largest=False, sorted=False).indices  # (L, M, U)
    chosen = candidates.gather(2, index[..., None].expand(-1, -1, -1, 2))
    return torch.cat((chosen, fresh), 2)


def class_loss(class_logits: Tensor, mask_index: Tensor, no_object_weight: float, total_weight: Tensor) -> Tensor:
    """Weighted cross-entropy (L) of class logits (B, L, K, K + 1): query q is class q where present, else no object.

    sum(w CE) / total_weight over all B K queries, with w = 1 for classes and no_object_weight for no object.
    """
    batch, predictions, classes, _ = class_logits.shape
    targets = torch.full((batch, classes), classes, device=class_logits.device)
    image, wanted = mask_index.unbind(-1)
    targets = targets.index_put((image, wanted), wanted)  # (B, K)
    weights = torch.where(targets == classes, no_object_weight, 1.0)  # (B, K)
    targets = targets[:, None].expand(-1, predictions, -1)  # (B, L, K)
    entropy = F.cross_entropy(class_logits.float().flatten(0, 2), targets.flatten(), reduction="none")
    return (entropy.view(batch, predictions, classes) * weights[:, None]).sum((0, 2)) / total_weight


def mask_loss(point_logits: Tensor, targets: Tensor, num_masks: Tensor) -> Tensor:
    """Binary cross-entropy (L): mean over the points, summed over the masks / num_masks; all (L, M, P)."""
    entropy = F.binary_cross_entropy_with_logits(point_logits, targets, reduction="none")
    return entropy.mean(-1).sum(-1) / num_masks


def dice_loss(point_logits: Tensor, targets: Tensor, num_masks: Tensor) -> Tensor:
    """1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1) with p = sigmoid(logits), summed over masks / num_masks: (L).

    point_logits, targets (L, M, P); num_masks scalar >= 1. Zero, still on the graph, when M is 0.
    """
    p = point_logits.sigmoid()
    dice = 1 - (2 * (p * targets).sum(-1) + 1) / (p.sum(-1) + targets.sum(-1) + 1)  # (L, M)
    return dice.sum(-1) / num_masks


def name_layers(**losses: Tensor) -> dict[str, Tensor]:
    """Losses (L) by name -> scalars: "name" of the last layer, "name_0" of the bare queries, and so on; last first."""
    last = len(next(iter(losses.values()))) - 1
    return {
        name if layer == last else f"{name}_{layer}": values[layer]
        for layer in range(last, -1, -1)
        for name, values in losses.items()
    }


def textual_loss(text_embeddings: Tensor, reference: Tensor) -> Tensor:
    """Cross-entropy of the cosines of each class's query with all reference texts (paper equation 5), no temperature.

    text_embeddings (B, K, E); reference (K, E) of unit length. Scalar; never below log(1 + (K - 1) e^-2).
    """
    cosines = F.normalize(text_embeddings.float(), dim=-1) @ reference.float().T  # (B, K, K)
    targets = torch.arange(len(reference), device=reference.device).expand(len(cosines), -1)  # (B, K)
    return F.cross_entropy(cosines.flatten(0, 1), targets.flatten())


def visual_loss(image_embedding: Tensor, reference: Tensor) -> Tensor:
    """Mean squared distance of image embeddings (B, E) from the teacher's (B, E), not normalised. Scalar."""
    return F.mse_loss(image_embedding.float(), reference.float())


class UpsampledCrossEntropy(torch.autograd.Function):
    """Cross-entropy of upsampled logits (B, K, h, w) with labels (B, H, W), summed over the labelled pixels.

    The forward pass computes the gradient, too, in the memory of the upsampled logits. Autograd would hold three
    tensors of that size at the memory peak of a training step.
    """

    @staticmethod
    def forward(context: Any, small: Tensor, labels: Tensor, covered: tuple[int, int], ignore_index: int) -> Tensor:
        """small covers `covered` (rows, columns) pixels, of which labels are the top left part -> scalar."""
        height, width = labels.shape[-2:]
        whole = F.interpolate(small, covered, mode="bilinear", align_corners=False)
        logits = whole[..., :height, :width]  # (B, K, H, W)
        logits.sub_(logits.amax(1, keepdim=True))
        labelled = labels != ignore_index
        targets = labels.masked_fill(~labelled, 0)[:, None]  # (B, 1, H, W)
        target_logits = logits.gather(1, targets)[:, 0]
        totals = logits.exp_().sum(1)  # (B, H, W)
        if context.needs_input_grad[0]:
            logits.mul_((labelled / totals)[:, None]).scatter_add_(1, targets, -labelled[:, None].to(logits.dtype))
            whole[..., height:, :] = 0  # the padding has no labels
            whole[..., width:] = 0
            gradient = torch.ops.aten.upsample_bilinear2d_backward(whole, covered, small.shape, False)
            context.save_for_backward(gradient)  # (B, K, h, w)
        return ((totals.log() - target_logits) * labelled).sum()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """gradient: that of the scalar."""
        return gradient * context.saved_tensors[0], None, None, None


def score_map_loss(
    score_map: Tensor,
    labels: Tensor,
    covered: tuple[int, int],
    temperature: float,
    ignore_index: int,
    num_pixels: Tensor,
) -> Tensor:
    """Cross-entropy of the score map / temperature, upsampled to the labels (paper equation 7). Scalar.

    score_map (B, K, h, w) of cosines covers `covered` (rows, columns) pixels, of which labels (B, H, W) are the top
    left part. The sum over the labelled pixels / num_pixels, which is at least 1.
    """
    return UpsampledCrossEntropy.apply(score_map.float() / temperature, labels, covered, ignore_index) / num_pixels
