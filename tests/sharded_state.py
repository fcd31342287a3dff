"""Two processes and a model that FSDP2 shards over them: its checkpoint is whole, loads again, and into one process."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import micro_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tqdm_seg.training.checkpoint import load_checkpoint, training_state, whole_weights, write_checkpoint


def sharded(steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A sharded micro model after some optimiser steps."""
    model = micro_model().train()
    mesh = init_device_mesh("cpu", (2,))
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([{"name": "all", "base_lr": 0.1, "params": parameters}], lr=0.1, fused=True)
    for _ in range(steps):
        for number, parameter in enumerate(parameters):
            parameter.grad = torch.full_like(parameter, float(number + 1))
        optimizer.step()
    return model, optimizer


def main(folder: Path) -> None:
    """Raises AssertionError in every process that sees something wrong."""
    dist.init_process_group("gloo")
    model, optimizer = sharded(2)
    state = training_state(model, optimizer)
    if dist.get_rank() == 0:
        write_checkpoint(folder, 2, state, None, {}, keep=1)
    else:
        assert state == {}
    dist.barrier()
    expected = whole_weights(model)
    again, other = sharded(1)
    assert load_checkpoint(folder / "step_0000002", again, other)["step"] == 2
    for name, value in whole_weights(again).items():
        assert torch.equal(value, expected[name]), name
    alone = micro_model()
    plain = torch.optim.AdamW(
        [{"name": "all", "base_lr": 0.1, "params": [p for p in alone.parameters() if p.requires_grad]}]
    )
    load_checkpoint(folder / "step_0000002", alone, plain)
    assert all(torch.equal(value, expected[name]) for name, value in alone.state_dict().items())
    assert {value["step"].item() for value in plain.state.values()} == {2}
    print("sharded state is whole")


main(Path(sys.argv[1]))
