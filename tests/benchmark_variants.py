"""Variants for the tests of measuring; a file that imports nothing else in their processes."""

import os

import torch
from measure import Work
from torch import Tensor, nn


def build_linear(shift: float, megabytes: int, device: torch.device) -> Work:
    """A linear layer that also holds so much memory, and whose numbers are moved by `shift`."""
    layer = nn.Linear(32, 32).requires_grad_(False)
    held = torch.ones(megabytes * 250_000)  # float32

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        return layer(x), held

    return Work(call, lambda number: torch.full((8, 32), float(number)), numbers=lambda x: layer(x) + shift)


def build_failing(fail_at: int, device: torch.device) -> Work:
    """Call number `fail_at` raises ValueError; with a negative one the process ends while it builds."""

    def call(number: int) -> None:
        if number == fail_at:
            raise ValueError(f"call {number} is wrong")

    if fail_at < 0:
        os._exit(3)
    return Work(call, lambda number: number)
