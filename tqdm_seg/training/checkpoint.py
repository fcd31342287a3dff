"""Checkpoints of a training run: complete or absent, safetensors and JSON only, bit-exact.

    step_0000400/weights.safetensors    the model as it is trained
    step_0000400/average.safetensors    averaged weights, with --ema
    step_0000400/optimizer.safetensors  both moments of every parameter
    step_0000400/state.json             step, parameter groups, scale of half-precision gradients, sums of the files

They hold no state of a random generator: every draw derives from the seed and the step.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ..data.files import plain_name, read_json, read_mark, remove_folder, replace_folder
from ..deploy.folder import file_sum

# What is read of state.json.
_STATE = {
    "step": int,
    "groups": [{"params": [str], "lr": float}],
    "scaler?": dict | None,
    "sha256": {"weights.safetensors": str, "optimizer.safetensors": str, str: str},
}
# Whole tensors on the CPU of the first process, also of a model that is sharded over processes.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights of a model that is sharded over processes, whole in every process; every process must call it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and optimiser state by parameter name; every process must call it, only the first gets them."""
    weights = get_model_state_dict(model, options=_WHOLE)
    state = get_optimizer_state_dict(model, optimizer, options=_WHOLE)
    if not weights:
        return {}
    moments = {f"{name}|{kind}": value for name, values in state["state"].items() for kind, value in values.items()}
    return {"weights": weights, "moments": moments, "groups": state["param_groups"]}


def write_checkpoint(
    folder: Path, step: int, state: dict[str, Any], average: dict[str, Tensor] | None, extra: dict[str, Any], keep: int
) -> Path:
    """Writes folder/step_<step> and deletes all but the newest `keep` checkpoints; returns the new one.

    state: of `training_state`; average: averaged weights, if any; extra: further content of state.json.
    Raises OSError when the disk is full; earlier checkpoints stay.
    """
    target = folder / _name(step)
    with replace_folder(target, "train") as temporary:
        save_file(_own_memory(state["weights"]), temporary / "weights.safetensors")
        save_file(_own_memory(state["moments"]), temporary / "optimizer.safetensors")
        if average is not None:
            save_file(_own_memory(average), temporary / "average.safetensors")
        sums = {path.name: file_sum(path) for path in sorted(temporary.glob("*.safetensors"))}
        content = {"step": step, "groups": state["groups"], "sha256": sums, **extra}
        (temporary / "state.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    prune(folder, step, keep)
    return target


def prune(folder: Path, step: int, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints of at most `step` steps; later ones are written again.

    What is left of one whose deletion was killed goes, too.
    """
    whole = [path for path in checkpoints(folder) if path.name <= _name(step) and (path / "state.json").is_file()]
    kept = whole[-keep:]
    for path in sorted(folder.glob("step_*")):
        if path.name <= _name(step) and path not in kept and read_mark(path) is not None:
            remove_folder(path)


def _name(step: int) -> str:
    return f"step_{step:07d}"


def _own_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, as safetensors requires."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints, oldest first; they appear whole, but may have been damaged since."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def read_state(path: Path) -> dict[str, Any]:
    """Content of the state.json of a checkpoint; raises ValueError if one of its files is damaged or missing."""
    try:
        content = read_json(path / "state.json", _STATE)
        if path.name != _name(content["step"]):
            raise ValueError(f"state.json is of step {content['step']}")
        for name, wanted in content["sha256"].items():
            if file_sum(path / plain_name(name, "state.json")) != wanted:
                raise ValueError(f"{name} is not what was written")
        return content
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def newest_checkpoint(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; None if there is none at all, ValueError if all are damaged."""
    paths = checkpoints(folder)
    for path in reversed(paths):
        try:
            read_state(path)
            return path
        except ValueError as error:
            say(f"{error}; going back to the checkpoint before it")
    if paths:
        raise ValueError(f"every checkpoint in {folder} is damaged; delete that folder to start the run again")
    return None


def _check_groups(path: Path, found: list[dict[str, Any]], expected: list[dict[str, Any]], trained: set[str]) -> None:
    """Raises ValueError unless state.json has the fields of the optimiser's groups, and all trained parameters."""
    # Not of how torch computes: a sharded model saves no value of it.
    other = ("params", "fused", "foreach")
    forms = [{name: value for name, value in group.items() if name not in other} for group in expected]
    wrong = "groups" if len(found) != len(forms) else ""
    for number, (group, form) in enumerate(zip(found, json.loads(json.dumps(forms)), strict=False)):
        names = [name for name in form if type(group.get(name)) is not type(form[name])]
        wrong = wrong or "".join(f"groups[{number}].{name}" for name in names[:1])
    if not wrong and not trained <= {name for group in found for name in group["params"]}:
        wrong = "groups.params"
    if wrong:
        raise ValueError(f"{path / 'state.json'}: {wrong} is not of this model; choose another --out, or copy it again")


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Loads weights and optimiser state; returns the content of state.json.

    Raises ValueError, and changes nothing, when it is damaged or the checkpoint of another model.
    """
    content, weights = read_state(path), load_file(path / "weights.safetensors")
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    expected = {name.removeprefix("module."): shape for name, shape in expected.items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if expected != found:
        names = sorted(name for name in expected | found if expected.get(name) != found.get(name))
        raise ValueError(
            f"{path} is the checkpoint of another model: {len(names)} weights differ, the first is {names[0]} "
            f"({found.get(names[0])} there, {expected.get(names[0])} here); use that run's options or another --out"
        )
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(path / "optimizer.safetensors").items():
        name, kind = key.split("|")
        state.setdefault(name, {})[kind] = value
    _check_groups(path, content["groups"], optimizer.param_groups, {*state})
    set_model_state_dict(model, weights, options=_WHOLE)
    set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": content["groups"]}, options=_WHOLE)
    return content
