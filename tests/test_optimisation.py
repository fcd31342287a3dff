"""The published optimisation: every parameter's rate and decay, the schedule, and ten steps written out by hand."""

import re

import pytest
import torch
from conftest import micro_model
from make_published_keys import published_rates
from parity import PACKS, Pack
from torch import nn

from tqdm_seg.configuration_tqdm import TqdmConfig
from tqdm_seg.deploy.key_rules import PUBLISHED_RULES
from tqdm_seg.loss_tqdm import LossCounts
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation
from tqdm_seg.training.optimisation import (
    ProcessBatchNorm,
    convert_batch_norm,
    gradient_norm,
    learning_rate,
    parameter_groups,
    set_learning_rates,
    step_counts,
    update_average,
)


def our_names(published: str) -> list[str]:
    """Our parameters that a published one becomes."""
    for pattern, replacement, *_ in PUBLISHED_RULES:
        if match := re.fullmatch(pattern, published):
            name = match.expand(replacement)
            return [name.replace("in_proj", f"{c}_proj") for c in "qkv"] if ".in_proj." in name else [name]
    raise KeyError(published)


# -- groups and schedule --------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["clip_vit_b16", "eva02_clip_l14"])
def test_every_parameter_has_the_published_rate_and_decay(preset):
    with torch.device("meta"):
        model = TqdmForSemanticSegmentation(TqdmConfig.from_preset(preset))
    model.model.text_queries.text_tower.requires_grad_(False)  # as initialising does, which needs real memory
    names = {parameter: name for name, parameter in model.named_parameters()}
    ours = {
        names[parameter]: [group["lr"], group["weight_decay"]]
        for group in parameter_groups(model, lr=1e-5, weight_decay=1e-4, vision_lr_mult=0.1)
        for parameter in group["params"]
    }
    published = {
        name: [pytest.approx(value) for value in values]
        for original, values in published_rates(preset).items()
        for name in our_names(original)
    }
    assert len(published_rates(preset)) > 400
    assert ours.keys() == published.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert ours == published


def test_cityscapes_settings_leave_two_embeddings_without_decay():
    model = micro_model()
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {
        decay: {g["name"]: {names[p] for p in g["params"]} for g in parameter_groups(model, 1e-4, 1e-5, 0.1, decay)}
        for decay in (True, False)
    }
    moved = groups[False]["no_decay"] - groups[True]["no_decay"]
    assert moved == {"model.mask_decoder.level_embedding", "model.mask_decoder.query_positions"}
    assert groups[True]["rest"] - groups[False]["rest"] == moved and groups[True]["vision"] == groups[False]["vision"]


def test_learning_rate_by_hand():
    published = {"steps": 20000, "warmup_steps": 1500, "min_lr": 1e-6}
    expected = {
        0: 1e-10,  # 1e-4 * 1e-6
        750: (1e-6 + 9.9e-5 * 0.966186) * 0.5000005,  # 0.9625 ** 0.9 = 0.966186, and half way through the warm-up
        1500: 1e-6 + 9.9e-5 * 0.932240,  # 0.925 ** 0.9
        10000: 1e-6 + 9.9e-5 * 0.535887,  # 0.5 ** 0.9
        20000: 1e-6,
    }
    for step, rate in expected.items():
        assert learning_rate(step, 1e-4, **published) == pytest.approx(rate, rel=2e-6), step
    # The published vision tower: base and end are the same, so that its rate stands still after the warm-up.
    assert [learning_rate(step, 1e-6, **published) for step in (1500, 9000, 19999)] == [1e-6] * 3
    assert learning_rate(0, 1e-3, steps=10, warmup_steps=0, min_lr=0) == 1e-3


def test_every_group_follows_its_own_curve():
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [
        {"name": str(i), "params": [w], "lr": lr, "base_lr": lr}
        for i, w, lr in zip((0, 1), weights, (1e-2, 1e-3), strict=True)
    ]
    optimizer = torch.optim.AdamW(groups)
    for step in (4, 0, 2):  # a function of the step, whatever came before
        rates = set_learning_rates(optimizer, step, 5, 2, 1e-3)
        assert rates == {f"lr_{i}": learning_rate(step, base, 5, 2, 1e-3) for i, base in enumerate((1e-2, 1e-3))}
        assert [group["lr"] for group in optimizer.param_groups] == list(rates.values())


# -- trajectory -----------------------------------------------------------------------------------------


def published_rule(name: str, lr: float, decay: float) -> tuple[float, float]:
    """Rate and decay by mmcv's rule: of the keys that occur in a name, the longest decides, and only that one."""
    rules = {"text_encoder": (0.0, 1.0), "backbone": (0.1, 1.0), "norm": (1.0, 0.0)}
    for key in sorted(rules, key=len, reverse=True):
        if key in name:
            return lr * rules[key][0], decay * rules[key][1]
    return lr, decay


class WrittenOutAdamW:
    """The algorithm of Loshchilov and Hutter with mmcv's schedule, one parameter after the other."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], lr: float, decay: float, steps: int, warmup: int, low: float
    ):
        self.parameters, self.lr, self.decay = parameters, lr, decay
        self.steps, self.warmup, self.low = steps, warmup, low
        self.moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in parameters.items()}
        self.done = 0

    @torch.no_grad()
    def step(self) -> None:
        i = self.done
        self.done += 1
        for name, p in self.parameters.items():
            base, decay = published_rule(name, self.lr, self.decay)
            rate = (base - self.low) * (1 - i / self.steps) ** 0.9 + self.low
            if i < self.warmup:
                rate *= 1 - (1 - i / self.warmup) * (1 - 1e-6)
            first, second = self.moments[name]
            first.mul_(0.9).add_(0.1 * p.grad)
            second.mul_(0.999).add_(0.001 * p.grad**2)
            unbiased = first / (1 - 0.9**self.done), second / (1 - 0.999**self.done)
            p.mul_(1 - rate * decay).sub_(rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8))
            p.grad = None


def test_ten_steps_follow_the_published_algorithm():
    pack = Pack(PACKS / "mini_clip")
    image, labels, points = pack.golden["train/image"], pack.labels("train"), pack.points("train")
    reference = {
        "reference_image_embedding": pack.golden["train/reg_E0_global_embedding"][:, 0],
        "reference_text_embedding": pack.golden["train/reg_T0"],
    }
    options = {"steps": 20, "warmup_steps": 4, "min_lr": 1e-5}

    def losses_of(model: TqdmForSemanticSegmentation, step) -> list[float]:
        found = []
        for i in range(10):
            terms = model.compute_losses(model.model(image), labels, points=points, **reference)
            total = sum(terms.values())
            total.backward()
            found.append(total.item())
            step(i)
        return found

    ours, theirs = pack.model().train(), pack.model().train()
    optimizer = torch.optim.AdamW(parameter_groups(ours, 1e-3, 1e-2, 0.1), fused=True)

    def our_step(i: int) -> None:
        set_learning_rates(optimizer, i, **options)
        optimizer.step()
        optimizer.zero_grad()

    published = {part: key for key, parts in pack.destinations.items() for part in parts}
    parameters = {f"{published[n]}|{n}": p for n, p in theirs.named_parameters() if p.requires_grad}
    written_out = WrittenOutAdamW(parameters, 1e-3, 1e-2, 20, 4, 1e-5)
    one, other = losses_of(ours, our_step), losses_of(theirs, lambda _: written_out.step())
    assert one[0] == pytest.approx(pack.golden_values["training"]["train"]["total_bn_train"], rel=1e-5)
    assert one == pytest.approx(other, rel=1e-5)
    assert one[-1] < 0.97 * one[0]  # far enough to tell


# -- counts, norms --------------------------------------------------------------------------------------


def test_counts_are_averaged_over_the_batches_of_a_step():
    parts = [LossCounts(*map(torch.tensor, counts)) for counts in ((2.0, 5.0, 100.0), (4.0, 7.0, 300.0))]
    together = step_counts(parts, torch.device("cpu"), published=False)
    assert [[value.item() for value in part] for part in together] == [[3, 6, 200]] * 2
    alone = step_counts(parts, torch.device("cpu"), published=True)
    assert [[value.item() for value in part] for part in alone] == [[2, 5, 100], [4, 7, 300]]


def test_parts_with_the_counts_of_the_step_have_the_gradient_of_the_whole_batch(images, labels):
    model = micro_model().eval()  # BatchNorm on running statistics, the only thing that ties images together
    labels[1, :20] = 255  # the halves differ in what is labelled
    points = torch.rand(3, 6, 40, 2, generator=torch.Generator().manual_seed(0))
    whole_index = torch.tensor([[i, c] for i in (0, 1) for c in (0, 1, 2)])

    def gradients(chunks: list[slice], counts: list[LossCounts] | None) -> torch.Tensor:
        model.zero_grad()
        for number, part in enumerate(chunks):
            chosen = (whole_index[:, 0] >= part.start) & (whole_index[:, 0] < part.stop)
            index = whole_index[chosen] - torch.tensor([part.start, 0])
            terms = model.compute_losses(
                model.model(images[part]), labels[part], index, points=points[:, chosen],
                loss_counts=counts[number] if counts else None,
            )  # fmt: skip
            (sum(terms.values()) / len(chunks)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole = gradients([slice(0, 2)], None)
    parts = [slice(0, 1), slice(1, 2)]
    own = [LossCounts(torch.tensor(3.0), torch.tensor(3.0), (labels[part] != 255).sum().float()) for part in parts]
    together = gradients(parts, step_counts(own, torch.device("cpu"), published=False))
    assert (together - whole).abs().max() < 1e-5 * whole.abs().max()
    assert (gradients(parts, None) - whole).abs().max() > 1e-3 * whole.abs().max()


def test_gradient_norm_is_that_of_all_gradients_together():
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(3))]
    weights[0].grad, weights[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert gradient_norm(weights) == 5


def test_averaged_weights_by_hand():
    average, model = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    model.weight.data += 4
    model.running_mean += 4
    model.num_batches_tracked += 7
    update_average(average, model, 0.75)
    assert average.weight.tolist() == [2, 2] and average.bias.tolist() == [0, 0]
    assert average.running_mean.tolist() == [4, 4] and average.num_batches_tracked == 7
    update_average(average, model, 0)
    assert torch.equal(average.weight, model.weight)


def test_batch_norm_of_one_process_is_torchs_and_keeps_its_weights(images):
    model, plain = micro_model().train(), micro_model().train()
    convert_batch_norm(model, torch.device("cpu"))
    converted = [type(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert converted == [ProcessBatchNorm] and model.state_dict().keys() == plain.state_dict().keys()
    for one, other in zip(model.model(images).values(), plain.model(images).values(), strict=True):
        assert torch.equal(one, other)


def test_batch_norm_for_gpus_is_torchs_over_all_processes_and_keeps_the_weights():
    model = micro_model()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    convert_batch_norm(model, torch.device("cuda"))
    assert [type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] == [nn.SyncBatchNorm]
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
