"""The training suite runs, its published order of work gives the model's losses, and a step waits for no device."""

import json
import sys
import traceback
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import pytest
import torch
import training_speed
from conftest import micro_model
from published_training import PublishedTraining, full_size_masks
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_speed import BASELINE, PARTS, Mode, Setting, build_ours, build_published, points_of

from tqdm_seg.loss_tqdm import count_losses, supervised_masks
from tqdm_seg.training.batches import model_inputs
from tqdm_seg.training.optimisation import step_counts
from tqdm_seg.training.teacher import Teacher

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_published_order_gives_losses_and_gradients_of_the_model(model, images, labels):
    for parameter in model.parameters():  # the zeros of a new model would hide what is left out
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    labels[0, :9] = 255
    batch = {"pixel_values": images, "labels": labels, "mask_index": supervised_masks(labels, 3)}
    published = PublishedTraining(model)
    published.reference_text = -published.reference_text  # both take it from what is given
    reference = published.reference_embedding(images + 1)
    points = points_of(model, batch)
    masks = full_size_masks(labels, batch["mask_index"])
    found = published.losses(batch | {"masks": masks}, reference, points)
    expected = model.compute_losses(
        model.model(images), labels, batch["mask_index"], reference, published.reference_text, points=points
    )
    assert found.keys() == expected.keys()
    gradients = []
    for terms in (found, expected):
        sum(terms.values()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-5), name
    assert (gradients[0] - gradients[1]).abs().max() < 1e-4 * gradients[1].abs().max()


def test_every_mode_makes_the_published_step(tmp_path):
    setting, device = Setting("tiny", 64, 2, tmp_path), torch.device("cpu")
    build_published(False, setting, device)
    wanted = torch.load(tmp_path / f"{BASELINE}.pt")
    modes = {
        "exact": (Mode(), 1e-5),
        "checkpointing": (Mode(checkpointing=True), 1e-5),
        "compiled": (Mode(compiled="eager"), 1e-5),
        "bf16": (Mode(torch.bfloat16, "bf16"), 0.05),
    }
    for name, (mode, tolerance) in modes.items():
        work = build_ours(name, setting, mode, device)
        found = torch.load(tmp_path / f"{name}.pt")
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
        work.call(work.inputs(1))
        work.counted()(work.inputs(2))
        steps = json.loads((tmp_path / f"{name}.json").read_text())
        assert len(steps) == 1 and len(steps[0]) == len(PARTS) and all(seconds > 0 for seconds in steps[0])


def test_the_suite_runs_from_end_to_end(tmp_path, capsys):
    argv = "--preset tiny --size 64 --contenders ours-exact --repeats 1 --device cpu --threads 1 --out"
    assert training_speed.main([*argv.split(), str(tmp_path)]) == 0
    suite = json.loads((tmp_path / "training_tiny_64x64_cpu.json").read_text(encoding="utf-8"))
    published, ours = suite["contenders"]
    assert ours["difference"] < 1e-4 and 0 < ours["operations"] < published["operations"]
    assert suite["facts"]["batch_size"] == 1 and suite["facts"]["parts"].keys() == {BASELINE, "ours-exact"}
    page = (tmp_path / "training_tiny_64x64_cpu.md").read_text(encoding="utf-8")
    assert "| frozen tower |" in page and "one contender after the other" in page and "took turns" not in page


def test_an_unknown_contender_is_an_error():
    with pytest.raises(SystemExit, match="no contender ours-magic; there are published-order, ours-exact"):
        training_speed.main(["--preset", "tiny", "--contenders", "ours-magic"])


# ---- a step without waiting


class Waits(TorchDispatchMode):
    """Notes copies from one device to another for which the host waits."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        devices = {x.device for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor)}
        copies = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        asynchronous = (kwargs or {}).get("non_blocking") or any(arg is True for arg in args)
        if copies and len(devices) > 1 and not asynchronous:
            frames = [frame for frame in traceback.format_stack() if f'"{ROOT / "tests"}' not in frame]
            self.found.append([frame for frame in frames if f'"{ROOT}' in frame][-1])
        return result


def move(module: nn.Module, device: torch.device) -> None:
    """Empty weights on another device in place of a module's own."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(torch.empty_like(value, device=device), value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = torch.empty_like(value, device=device)


def test_nothing_in_forward_pass_and_losses_waits_for_the_device(labels):
    """On a GPU that is not there: tensors without values, where reading one is an error in any case."""
    model = micro_model(vision_config={"drop_path_rate": 0.1}, context_decoder_dropout=0.1).train()
    reference = Teacher(model)
    index = supervised_masks(labels, 3)
    counts = count_losses(index, labels, 3, 0.1, "labelled", 255)
    image, size = torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.tensor([[32, 32]] * 2)
    batch = {"image": image, "size": size, "labels": labels.to(torch.uint8), "mask_index": index}
    with FakeTensorMode(allow_non_fake_inputs=True), Waits() as waits:
        gpu = torch.device("cuda", 0)
        move(model, gpu)
        move(reference, gpu)
        inputs = model_inputs(batch, gpu)
        (on_gpu,) = step_counts([counts], gpu, published=False)
        outputs = model(**inputs, **reference(inputs["pixel_values"]), loss_counts=on_gpu, output_logits=False)
    assert outputs.loss.device == gpu
    assert not waits.found, "\n".join(waits.found)
