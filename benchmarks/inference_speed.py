"""Speed of inference: our model, the published order of work, and the models that people would pick instead.

    python benchmarks/inference_speed.py [--preset clip_vit_b16] [--size 512x512 1024x2048] [--repeats 5]
    python benchmarks/inference_speed.py --contenders published-order ours-exact --size 512x512

From a normalised image, a new one for every call, to the map of class ids at the same size, batch 1. Preprocessing is
left out for all. Weights are random: the time of a dense model does not depend on them. Windows as the preset has them.
Writes inference_PRESET_SIZE_DEVICE.json and .md to --out. Exit status 1 if a contender failed, which is reported.

published-order      the published order of work with our modules, see published_order.py
ours-plain           our model as `from_pretrained` gives it, `segment(...).argmax(1)`
ours-exact           after `prepare_for_inference()`, `segment_labels(...)`
ours-compiled        the same, the windows through torch.compile
ours-bf16            as ours-exact, in bfloat16; ours-compiled-bf16: compiled too
ours-int8            as ours-exact, the vision tower's products in 8 bits; on a CPU
ours-exported        as ours-exact, the windows through onnxruntime (ONNX, see export_tqdm.py); on a CPU
ours-no-overlap      as ours-exact, windows side by side; ours-no-overlap-bf16: in bfloat16 too
ours-whole-image     as ours-exact, without windows; ours-whole-image-bf16: in bfloat16 too
mask2former-swin-b, -l, eomt-b, -l, segformer-b5: transformers' own models and post-processing, see rivals.py
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from measure import (
    RESULTS,
    Contender,
    Settings,
    Work,
    exit_status,
    find_device,
    markdown_table,
    measure,
    run_facts,
    write_results,
)
from published_order import PARTS, PUBLISHED_SECONDS, PublishedOrder, time_parts
from rivals import RIVALS, build_rival
from torch import Tensor

from tqdm_seg.configuration_tqdm import PRESETS, TqdmConfig
from tqdm_seg.deploy.export import OnnxSegmenter, WindowModel, export_onnx
from tqdm_seg.deploy.options import OPSET
from tqdm_seg.deploy.speed import DTYPES, ready_to_predict
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation
from tqdm_seg.program import size as image_size

BASELINES = ["published-order", "mask2former-swin-b"]


@dataclass(frozen=True)
class Mode:
    """How our model is run, with `ready_to_predict`. windows: False for whole images."""

    precision: str = "fp32"
    compiled: bool = False
    windows: bool = True
    overlap: bool = True


OURS = {
    "ours-exact": Mode(),
    "ours-compiled": Mode(compiled=True),
    "ours-bf16": Mode("bf16"),
    "ours-compiled-bf16": Mode("bf16", compiled=True),
    "ours-int8": Mode("int8"),
    "ours-no-overlap": Mode(overlap=False),
    "ours-no-overlap-bf16": Mode("bf16", overlap=False),
    "ours-whole-image": Mode(windows=False),
    "ours-whole-image-bf16": Mode("bf16", windows=False),
}


def random_image(size: tuple[int, int], device: torch.device, number: int) -> Tensor:
    """pixel_values (1, 3, H, W), the same for the same number."""
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(number)).to(device)


def random_model(preset: str, device: torch.device) -> TqdmForSemanticSegmentation:
    """The model of a preset with random weights, always the same ones."""
    torch.manual_seed(0)
    model = TqdmForSemanticSegmentation(TqdmConfig.from_preset(preset)).eval().to(device)
    return model.requires_grad_(False)  # the counter of operations fails on others in inference mode


def build_published(preset: str, size: tuple[int, int], device: torch.device) -> Work:
    """The published order of work."""
    order = PublishedOrder(random_model(preset, device))
    notes = "" if device.type == "cpu" else "samples by grid_sample; the published code has a compiled kernel for that"
    return Work(order, partial(random_image, size, device), numbers=torch.no_grad()(order.scores), notes=notes)


def build_plain(preset: str, size: tuple[int, int], device: torch.device) -> Work:
    """Our model as it is loaded."""
    model = random_model(preset, device)
    return Work(
        lambda image: model.segment(image).argmax(1), partial(random_image, size, device), numbers=model.segment
    )


def prepared_model(preset: str, mode: Mode, device: torch.device) -> TqdmForSemanticSegmentation:
    """Our model in one of its modes."""
    model = ready_to_predict(random_model(preset, device), mode.precision, mode.compiled)
    if not mode.overlap:
        model.config.window_stride = model.config.window_size
    if not mode.windows:
        model.config.window_size = None
    return model


def eager_float32(preset: str, mode: Mode, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What a mode computes as the counter of operations can see it."""
    return prepared_model(preset, replace(mode, precision="fp32", compiled=False), device).segment_labels


def build_ours(preset: str, size: tuple[int, int], mode: Mode, device: torch.device) -> Work:
    """Our model in one of its modes."""
    model = prepared_model(preset, mode, device)
    quantised = mode.precision == "int8"
    return Work(
        call=model.segment_labels,
        inputs=partial(random_image, size, device),
        dtype=DTYPES[mode.precision],
        numbers=model.segment,
        counted=partial(eager_float32, preset, mode, device) if mode.compiled or quantised else None,
        notes="only the vision tower is in 8 bits; utilisation is of 8-bit products all the same" if quantised else "",
    )


def build_exported(preset: str, size: tuple[int, int], device: torch.device) -> Work:
    """Our model as onnxruntime computes it."""
    model = prepared_model(preset, Mode(), device)
    folder = Path(tempfile.mkdtemp())
    export_onnx(WindowModel(model), folder / "window.onnx", OPSET)
    model.config.to_json_file(folder / "config.json")
    runtime = OnnxSegmenter(folder)
    return Work(
        call=runtime.segment_labels,
        inputs=partial(random_image, size, device),
        numbers=runtime.segment,
        counted=partial(eager_float32, preset, Mode(), device),
        notes="deformable attention by grid_sample; peak memory with what is left of the export in the same process",
    )


def all_contenders(preset: str, size: tuple[int, int], precision: str, device: torch.device) -> list[Contender]:
    """Everything that can be run at this size on this device; precision: of the rivals."""
    window = TqdmConfig.from_preset(preset).window_size
    contenders = [Contender("published-order", partial(build_published, preset, size))]
    contenders.append(Contender("ours-plain", partial(build_plain, preset, size)))
    for name, mode in OURS.items():
        slides = max(size) > window or (mode.windows and mode.overlap)
        if slides and (device.type == "cpu" or mode.precision != "int8"):
            contenders.append(Contender(name, partial(build_ours, preset, size, mode)))
    if device.type == "cpu" and min(size) >= window:
        contenders.append(Contender("ours-exported", partial(build_exported, preset, size)))
    for name in RIVALS:
        if precision != "bf16":
            contenders.append(Contender(name, partial(build_rival, name, size, torch.float32)))
        if precision != "fp32" or name == BASELINES[1]:
            contenders.append(Contender(f"{name}-bf16", partial(build_rival, name, size, torch.bfloat16)))
    return contenders


def time_split(preset: str, settings: Settings) -> tuple[dict[str, float], str]:
    """Seconds of the parts of the published order on one window, and a table beside the published code's own."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = find_device(settings.device)
    order = PublishedOrder(random_model(preset, device))
    size = (order.config.window_size, order.config.window_size)
    runs = [time_parts(order, random_image(size, device, number)) for number in range(settings.repeats + 1)]
    parts = {part: statistics.median(run[part] for run in runs[1:]) for part in (*PARTS, "rest")}
    total = sum(parts.values())
    header = ["published order, one window", "seconds", "share"]
    rows = [[part.replace("_", " "), f"{value:.3f}", f"{value / total:.1%}"] for part, value in parts.items()]
    rows.append(["total", f"{total:.3f}", "100.0%"])
    remark = ""
    if preset == "clip_vit_b16":
        header += ["published code: seconds", "share"]
        theirs = sum(PUBLISHED_SECONDS.values())
        for row, part in zip(rows, PUBLISHED_SECONDS, strict=False):
            row += [f"{PUBLISHED_SECONDS[part]:.3f}", f"{PUBLISHED_SECONDS[part] / theirs:.1%}"]
        rows[-1] += [f"{theirs:.3f}", "100.0%"]
        remark = "\n\nThe published code was measured once, on another machine, with torch 2.13 and 2 threads: quoted."
    return parts, markdown_table(header, rows) + remark


def remarks_on(preset: str) -> str:
    """What all figures have in common, for the Markdown."""
    config = TqdmConfig.from_preset(preset)
    return (
        "From a normalised image to the map of class ids at the same size; preprocessing is left out for all. Weights "
        f"are random. Our model and the published order slide windows of {config.window_size} every "
        f"{config.window_stride} pixels; the others run as their image processors ask for.\n\n"
    )


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="clip_vit_b16", help="of our model (%(default)s)")
    parser.add_argument(
        "--size", nargs="+", type=image_size, default=[(512, 512), (1024, 2048)],
        help="image HEIGHTxWIDTH, one or more (default: 512x512 1024x2048)",
    )  # fmt: skip
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="these only, as named above (default: all)")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16", "both"], default="fp32",
        help="of transformers' models; Mask2Former Swin-B is run in bfloat16 too in any case (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5, help="rounds that are timed (default: %(default)s)")
    parser.add_argument("--warm-ups", type=int, help="calls before them (default: 1 on a CPU, 5 on a GPU)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="0 for torch's own number (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the suite at every size; returns the exit status."""
    args = make_parser().parse_args(argv)
    settings = Settings(args.repeats, args.warm_ups, args.device, args.threads)
    device = find_device(args.device)
    facts = run_facts(settings) | {"preset": args.preset}
    races = {size: all_contenders(args.preset, size, args.precision, device) for size in args.size}
    if args.contenders:
        known = list(dict.fromkeys(contender.name for race in races.values() for contender in race))
        if unknown := sorted(set(args.contenders) - set(known)):
            raise SystemExit(f"no contender {', '.join(unknown)} at this size; there are {', '.join(known)}")
        races = {size: [one for one in race if one.name in args.contenders] for size, race in races.items()}
    status = 0
    for size, contenders in races.items():
        published = BASELINES[0] in [contender.name for contender in contenders]
        results = measure(contenders, settings, BASELINES[0] if published else None)
        parts, remarks = time_split(args.preset, settings) if published else ({}, "")
        shape = f"{size[0]}x{size[1]}"
        write_results(
            args.out,
            f"inference_{args.preset}_{shape}_{device.type}",
            f"Inference: {args.preset}, {shape}, batch 1",
            results,
            BASELINES,
            facts | {"published_order_parts": parts},
            remarks_on(args.preset) + remarks,
        )
        status = max(status, exit_status(results))
    return status


if __name__ == "__main__":
    sys.exit(main())
