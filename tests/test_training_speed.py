"""The training suite runs, its published order of work gives the model's losses, and a step waits for no device."""

import json
import sys
import traceback
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import pytest
import torch
from conftest import micro_model
from published import PublishedTraining, full_size_masks
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_speed import (
    BASELINE,
    TrainingSettings,
    build_ours,
    build_published,
    drawn_points,
    measure_training,
)

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
    points = drawn_points(model, batch)
    expected_outputs = model.model(images)
    published = PublishedTraining(model)
    published.teacher_text = -published.teacher_text  # both take it from what is given
    teacher = published.teacher_embedding(images + 1)
    found = published.losses(batch | {"masks": full_size_masks(labels, batch["mask_index"])}, teacher, points)
    expected = model.compute_losses(
        expected_outputs, labels, batch["mask_index"], teacher, published.teacher_text, points=points
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


@pytest.mark.slow
def test_every_mode_makes_the_published_step():
    device = torch.device("cpu")
    settings = TrainingSettings(preset="tiny", size=(64, 64), batch_size=2, device="cpu", compile="eager")
    published = build_published(BASELINE, settings, device)
    wanted = published.numbers(None)
    for name in ("ours-exact", "ours-checkpointing", "ours-compiled", "ours-bf16-teacher"):
        work = build_ours(name, settings, device)
        tolerance = 0.05 if "bf16" in name else 1e-5
        torch.testing.assert_close(work.numbers(None), wanted, rtol=tolerance, atol=tolerance)
        work.call(work.inputs(1))
        work.counted()(work.inputs(2))
    published.call(published.inputs(1))


@pytest.mark.slow
def test_training_is_measured_from_end_to_end(tmp_path, capsys):
    settings = TrainingSettings(
        preset="tiny", size=(64, 64), only=("ours-exact",), repeats=1, device="cpu", threads=1, pause=0,
        product_size=64, out=tmp_path,
    )  # fmt: skip
    assert measure_training(settings) == 0
    suite = json.loads((tmp_path / "training_tiny_64x64_cpu.json").read_text(encoding="utf-8"))
    published, ours = suite["variants"]
    assert published["name"] == BASELINE and suite["facts"]["batch_size"] == 1
    assert ours["difference"] < 1e-4 and 0 < ours["operations"] < published["operations"]
    page = (tmp_path / "training_tiny_64x64_cpu.md").read_text(encoding="utf-8")
    assert "| ours-exact |" in page and "one variant after the other" in page


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
