"""Speed of inference: our model, the published order of work, and the models that people would pick instead.

    python benchmarks/inference_speed.py [--preset clip_vit_b16] [--size 512x512 1024x2048] [--repeats 5]
    python benchmarks/inference_speed.py --only published-order,ours-exact --size 512x512

From a normalised image to class ids at the same size, batch 1, without preprocessing. Weights are random: the time of a
dense model does not depend on them. Writes inference_PRESET_SIZE_DEVICE.json and .md to --out. Exit status 1 if a
variant failed.

published-order      the published order of work with our modules, see published.py
ours-plain           our model as `from_pretrained` loads it, `segment(...).argmax(1)`
ours-exact           after `ready_to_predict`, `segment_labels(...)`
ours-compiled        the same with torch.compile
ours-bf16            ours-exact in bfloat16; ours-compiled-bf16: with torch.compile
ours-int8            ours-exact, the vision tower's products in 8 bits; CPU
ours-exported        ours-exact through onnxruntime (ONNX, see tqdm-seg export); CPU
ours-no-overlap      ours-exact, windows that do not overlap; ours-no-overlap-bf16
ours-whole-image     ours-exact without windows; ours-whole-image-bf16
mask2former-swin-b, -l, eomt-b, -l, segformer-b5: transformers' models and post-processing, see other_models.py
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from measure import Builder, Settings, Work, choose, main, measure, random_images, write_results
from other_models import OTHER_MODELS, build_other
from published import PublishedOrder, random_model
from torch import Tensor

from tqdm_seg.configuration_tqdm import PRESETS, TqdmConfig
from tqdm_seg.deploy.export import OnnxSegmenter, WindowModel, export_onnx
from tqdm_seg.deploy.options import OPSET
from tqdm_seg.deploy.speed import ready_to_predict
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation
from tqdm_seg.program import option, size

BASELINES = ["published-order", "mask2former-swin-b"]


@dataclass(kw_only=True)
class InferenceSettings(Settings):
    """Options."""

    preset: str = option("clip_vit_b16", choices=sorted(PRESETS), help="of our model")
    size: tuple[tuple[int, int], ...] = option(
        ((512, 512), (1024, 2048)), nargs="+", type=size, metavar="HxW", help="images (default: 512x512 1024x2048)"
    )
    precision: Literal["fp32", "bf16", "both"] = option(
        "fp32", help="of the other models; Mask2Former Swin-B always runs in bf16 too"
    )


def build_published(preset: str, shape: tuple[int, int], device: torch.device) -> Work:
    """The published order of work."""
    order = PublishedOrder(random_model(preset, device))
    notes = "" if device.type == "cpu" else "samples by grid_sample; the published code has a compiled kernel"
    return Work(order, partial(random_images, count=1, size=shape, device=device), numbers=order.scores, notes=notes)


def make_ready(model: TqdmForSemanticSegmentation, name: str) -> TqdmForSemanticSegmentation:
    """Makes our model ready to predict, in place, as the name of a variant says."""
    precision = next((part for part in ("bf16", "int8") if part in name), "fp32")
    if name != "ours-plain":
        ready_to_predict(model, precision, "compiled" in name)
    if "no-overlap" in name:
        model.config.window_stride = model.config.window_size
    if "whole-image" in name:
        model.config.window_size = None
    return model


def build_ours(name: str, preset: str, shape: tuple[int, int], device: torch.device) -> Work:
    """Our model as the name says."""
    inputs = partial(random_images, count=1, size=shape, device=device)
    model = make_ready(random_model(preset, device), name)
    dtype, notes = model.dtype, ""
    if name == "ours-plain":
        return Work(lambda image: model.segment(image).argmax(1), inputs, numbers=model.segment)
    if name == "ours-int8":
        dtype, notes = torch.int8, "8 bits in the vision tower only; utilisation is of 8-bit products all the same"
    if name == "ours-exported":
        folder = Path(tempfile.mkdtemp())
        export_onnx(WindowModel(model), folder / "window.onnx", OPSET)
        model.config.to_json_file(folder / "config.json")
        model = OnnxSegmenter(folder)
        notes = "deformable attention by grid_sample; peak memory includes what the export left in the process"

    def counted() -> Callable[[Tensor], Tensor]:
        """In eager float32, as the counter cannot look into the others."""
        return make_ready(random_model(preset, device), "ours-exact").segment_labels

    hidden = "compiled" in name or name in ("ours-int8", "ours-exported")
    return Work(model.segment_labels, inputs, dtype, model.segment, counted if hidden else None, notes=notes)


def all_variants(settings: InferenceSettings, shape: tuple[int, int]) -> dict[str, Builder]:
    """Everything that runs on this device, and at this size differs from the rest."""
    preset, window = settings.preset, TqdmConfig.from_preset(settings.preset).window_size
    ours = ["ours-plain", "ours-exact", "ours-compiled", "ours-bf16", "ours-compiled-bf16"]
    if settings.torch_device.type == "cpu":
        ours += ["ours-int8", "ours-exported"] if min(shape) >= window else ["ours-int8"]
    if max(shape) > window:
        ours += ["ours-no-overlap", "ours-no-overlap-bf16", "ours-whole-image", "ours-whole-image-bf16"]
    variants = {"published-order": partial(build_published, preset, shape)}
    variants |= {name: partial(build_ours, name, preset, shape) for name in ours}
    for name in OTHER_MODELS:
        if settings.precision != "bf16":
            variants[name] = partial(build_other, name, shape, torch.float32)
        if settings.precision != "fp32" or name == BASELINES[1]:
            variants[f"{name}-bf16"] = partial(build_other, name, shape, torch.bfloat16)
    return variants


def measure_inference(settings: InferenceSettings) -> int:
    """Measures at every size; returns the exit status."""
    plans = {shape: choose(all_variants(settings, shape), settings.only) for shape in settings.size}
    config, status = TqdmConfig.from_preset(settings.preset), 0
    for shape, variants in plans.items():
        results, words = measure(variants, settings), "x".join(map(str, shape))
        status |= write_results(
            settings, f"inference_{settings.preset}_{words}_{settings.torch_device.type}",
            f"Inference: {settings.preset}, {words}, batch 1", results, BASELINES, preset=settings.preset,
            windows=f"of {config.window_size} every {config.window_stride} pixels; others as their processors ask for",
        )  # fmt: skip
    return status


if __name__ == "__main__":
    main(measure_inference, InferenceSettings, __doc__)
