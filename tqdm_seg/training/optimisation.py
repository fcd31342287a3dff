"""The published optimisation: AdamW groups, schedule, what losses are divided by, BatchNorm over all processes.

Letters: B batch, C channels, H, W map.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tqdm_seg.loss_tqdm import LossCounts

# Embeddings that the published Cityscapes-trained settings leave without decay.
DECODER_EMBEDDINGS = ("mask_decoder.level_embedding", "mask_decoder.query_positions")


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, vision_lr_mult: float, decay_embeddings: bool = True
) -> list[dict[str, object]]:
    """AdamW groups of the published recipe: vision tower, what has no decay, everything else; frozen ones left out.

    The vision tower learns at lr * vision_lr_mult with decay, its own norms included. Outside it a parameter whose
    published name holds "norm" has no decay, nor has the scale of a cosine class head, and without `decay_embeddings`
    neither has one of `DECODER_EMBEDDINGS`; every other one, biases and positions included, has.
    """
    groups = {
        "vision": {"lr": lr * vision_lr_mult, "weight_decay": weight_decay},
        "no_decay": {"lr": lr, "weight_decay": 0.0},
        "rest": {"lr": lr, "weight_decay": weight_decay},
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in groups}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            without_decay = (
                "norm" in name
                or name.endswith("log_scale")
                or (not decay_embeddings and name.endswith(DECODER_EMBEDDINGS))
            )
            kind = "vision" if "vision_tower." in name else "no_decay" if without_decay else "rest"
            members[kind].append(parameter)
    return [
        {"name": name, "params": members[name], "base_lr": options["lr"], **options}
        for name, options in groups.items()
        if members[name]
    ]


def learning_rate(step: int, base: float, steps: int, warmup_steps: int, min_lr: float) -> float:
    """Rate of 0-based `step`: min_lr + (base - min_lr) (1 - step / steps)^0.9, in warm-up times a linear factor.

    The factor is 1 - (1 - step / warmup_steps) (1 - 1e-6). The decay runs from step 0, under the warm-up, and not from
    its end as in transformers' polynomial schedule. A group whose base is min_lr keeps it after the warm-up, as the
    vision tower of the published recipe does (1e-5 * 0.1 = 1e-6).
    """
    rate = min_lr + (base - min_lr) * (1 - min(step, steps) / steps) ** 0.9
    return rate * (1 - (1 - step / warmup_steps) * (1 - 1e-6)) if step < warmup_steps else rate


def set_learning_rates(
    optimizer: torch.optim.Optimizer, step: int, steps: int, warmup_steps: int, min_lr: float
) -> dict[str, float]:
    """Sets every group's rate for `step` of the `steps` of a phase; returns them by group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, group["base_lr"], steps, warmup_steps, min_lr)
    return {f"lr_{group['name']}": group["lr"] for group in optimizer.param_groups}


def step_counts(parts: list[LossCounts], device: torch.device, published: bool) -> list[LossCounts]:
    """What the losses of every accumulated batch of an optimiser step are divided by, given each batch's own counts.

    The mean over all batches of all processes, so that the step is that of one large batch. published: as the published
    code does, only the number of masks, averaged over the processes; all other counts are each batch's own.
    """
    counts = torch.stack([torch.stack(part) for part in parts]).to(device, non_blocking=True)  # (parts, 3)
    mean = counts.clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    if published:
        return [LossCounts(shared[0], own[1], own[2]) for shared, own in zip(mean, counts, strict=True)]
    return [LossCounts(*mean.mean(0))] * len(parts)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together, on their device: a scalar."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Averaged weights become decay average + (1 - decay) model, in place and in one pass; buffers become the model's.

    torch's AveragedModel does the same and waits for the device in every step.
    """
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    torch._foreach_copy_(list(average.buffers()), list(model.buffers()))


class SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        """x, the same shape everywhere."""
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        """gradient of the sum."""
        return SumOverProcesses.forward(context, gradient)


class ProcessBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the batches of all processes, for CPUs: torch's SyncBatchNorm runs on GPUs only.

    Every process must have the same number of pixels. Names and shapes of the weights are those of BatchNorm2d.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W)."""
        if not (self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        values = x.float()
        world = dist.get_world_size()
        # Two reductions instead of E(x^2) - E(x)^2, which loses digits where the mean is large.
        mean = SumOverProcesses.apply(values.mean((0, 2, 3))) / world  # (C,)
        centred = values - mean[:, None, None]
        variance = SumOverProcesses.apply(centred.square().mean((0, 2, 3))) / world
        with torch.no_grad():
            count = x.numel() / x.shape[1] * world
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def convert_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Normalises over all processes, in place and with the same parameters, on the device that the model is for.

    Every BatchNorm2d inside the model becomes torch's SyncBatchNorm for GPUs, a `ProcessBatchNorm` for others.
    """
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = ProcessBatchNorm
