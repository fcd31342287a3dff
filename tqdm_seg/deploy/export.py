"""Writes a model for other runtimes, and runs such files by onnxruntime (`OnnxSegmenter`)."""

import sys

from ..commands import start

if __name__ == "__main__":
    sys.exit(start("export"))


import importlib
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from tqdm_seg.configuration_tqdm import TqdmConfig
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation
from tqdm_seg.windows_tqdm import Segmenter

from ..data.files import check_out_folder, cut, example, replace_folder, write_json
from ..data.images import read_rgb
from ..program import takes
from .checkpoints import check_download
from .folder import load_model, model_folder, read_config, warn_untrained
from .options import ExportOptions
from .self_check import verify
from .speed import ready_to_predict

INPUT, OUTPUT = "pixel_values", "scores"
FACTS = "export.json"
AGAIN = "make the export again: tqdm-seg export MODEL --out DIR"
BOUND = 5e-4  # of a score, a sum of probabilities: what their logits may differ by from the published code's


class WindowModel(nn.Module):
    """`TqdmForSemanticSegmentation.score` as a module: what is exported."""

    def __init__(self, model: TqdmForSemanticSegmentation):
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (B, 3, h, w) -> scores (B, K, h, w)."""
        return self.model.score(pixel_values)


def require(backend: str) -> Any:
    """Imports the module of this name; raises ImportError with the command that installs it."""
    if importlib.util.find_spec(backend) is None:
        raise ImportError(f"this needs the package {backend}: pip install onnx onnxscript onnxruntime")
    return importlib.import_module(backend)


def window_size(config: TqdmConfig, asked: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of window.pt2: as asked, else the model's window, else the size of its vision tower.

    Raises ValueError for a size larger than the model's windows; those of small images are smaller.
    """
    side = config.window_size or config.vision_config.image_size
    if asked is not None and config.window_size is not None and max(asked) > side:
        raise ValueError(
            f"--size {asked[0]}x{asked[1]}: the model slides windows of {side}x{side}; leave --size out, or set "
            "window_size in its config.json to null first, so that whole images are exported"
        )
    return asked or (side, side)


def size_multiple(config: TqdmConfig) -> int:
    """Height and width of images for window.onnx are multiples of it; the model pads other images with zeros."""
    vision = config.vision_config
    return 1 if vision.patch_remainder == "stretch" else vision.patch_size


def export_onnx(window: WindowModel, path: Path, opset: int) -> None:
    """Writes the ONNX file; raises ValueError for an operator set that torch cannot write."""
    require("onnxscript")
    tower = window.model.model.vision_tower
    # At the size of its position table the tower does not resize the table, and the file would fit that size only.
    size = ((tower.grid + patches) * tower.config.patch_size for patches in (1, 2))
    program = torch.onnx.export(
        window, (torch.zeros(2, 3, *size),), dynamo=True, opset_version=opset, input_names=[INPUT],
        output_names=[OUTPUT], dynamic_shapes=({0: "batch", 2: "height", 3: "width"},), verbose=False,
    )  # fmt: skip
    made = program.model.opset_imports[""]
    if made != opset:
        raise ValueError(f"--opset {opset}: torch {torch.__version__} gets no lower than {made}; leave --opset out")
    program.save(path)


def export_torch(window: WindowModel, example: Tensor, path: Path) -> None:
    """Writes the file for `torch.export.load`, of the size of example (B, 3, h, w)."""
    batch = torch.export.Dim("batch", min=1)
    content = io.BytesIO()  # torch's own writer aborts the whole process on a full disk
    torch.export.save(torch.export.export(window, (example,), dynamic_shapes=({0: batch},), strict=False), content)
    path.write_bytes(content.getbuffer())


def check_inputs(processor: TqdmImageProcessor, size: tuple[int, int], patch: int, path: Path) -> dict[str, Tensor]:
    """Inputs for the checks, by name: (1, 3, h, w) and (3, 3, h, w) of `size`, the last of another size.

    path: an image. Raises OSError or ValueError naming it when it cannot be read.
    """
    image = Image.fromarray(read_rgb(path)).resize(size[::-1], Image.Resampling.BILINEAR)
    real = processor(images=image, do_resize=False, return_tensors="pt")["pixel_values"]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3, *size, generator=generator)
    larger = torch.randn(1, 3, size[0] + 3 * patch, size[1] + patch, generator=generator)
    return {"random": noise[:1], "image": real, "both, three at once": torch.cat((noise, real)), "larger": larger}


@torch.inference_mode()
def compare_scores(
    name: str, score: Callable[[Tensor], Tensor], inputs: dict[str, Tensor], expected: dict[str, Tensor]
) -> dict[str, float]:
    """Largest difference of the file's scores on each of the inputs; raises ValueError if one is over `BOUND`."""
    found = {key: (score(x) - expected[key]).abs().max().item() for key, x in inputs.items()}
    wrong = {key: value for key, value in found.items() if not value <= BOUND}
    if wrong:
        raise ValueError(
            f"{name} differs from the model by {wrong}, more than {BOUND}; nothing was written. Try another "
            "--opset, or another version of torch or onnxruntime"
        )
    return found


@takes(ExportOptions)
def export(options: ExportOptions) -> dict[str, Any]:
    """Writes --out, whole or not at all; returns what export.json holds."""
    folder, out, formats = model_folder(options.model), options.out, options.format
    check_out_folder(out, "export", [folder, *filter(None, [options.image])], whole=True)
    packages = [] if "onnx" not in formats else ["onnx", "onnxscript", *(["onnxruntime"] if options.check else [])]
    versions = {"torch": torch.__version__} | {name: require(name).__version__ for name in packages}
    model, processor = load_model(folder)
    verify(model, folder)
    config, size, inputs = model.config, window_size(model.config, options.size), {}
    if options.check:
        image = options.image or sorted(example("frames").rglob("image_data/*.png"))[0]
        inputs = check_inputs(processor, size, config.vision_config.patch_size, image)
    with torch.inference_mode():
        expected = {name: model.score(x) for name, x in inputs.items()}
    window, zeros, checks = WindowModel(ready_to_predict(model)), torch.zeros(2, 3, *size), {}
    facts: dict[str, Any] = {"input": INPUT, "output": OUTPUT, "versions": versions, "bound": BOUND, "checks": checks}
    with replace_folder(out, "export") as temporary:
        config.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        if "torch" in formats:
            path, facts["size"] = temporary / "window.pt2", list(size)
            export_torch(window, zeros, path)
            if inputs:
                fitting = {name: x for name, x in inputs.items() if x.shape[-2:] == size}
                checks[path.name] = compare_scores(path.name, torch.export.load(path).module(), fitting, expected)
        if "onnx" in formats:
            path = temporary / "window.onnx"
            facts |= {"opset": options.opset, "multiple_of": size_multiple(config)}
            export_onnx(window, path, options.opset)
            if inputs:
                checks[path.name] = compare_scores(path.name, OnnxSegmenter(temporary).score, inputs, expected)
        write_json(temporary / FACTS, facts)
    print_files(out, checks)
    warn_untrained(config, options.model)
    return facts


def print_files(out: Path, checks: dict[str, dict[str, float]]) -> None:
    """A line for every file: its size, and its largest difference from the model."""
    for path in sorted(out.glob("window.*")):
        found = checks.get(path.name)
        verdict = f", differs from the model by at most {max(found.values()):.1e}" if found else ""
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB{verdict}")


class OnnxSegmenter(Segmenter):
    """An exported model with the predictions of `TqdmForSemanticSegmentation`, computed by onnxruntime in float32.

    device: "cpu" or "cuda". Uses as many threads as torch. Raises FileNotFoundError for a folder that is no export,
    ValueError for a file that cannot be read, or a device that onnxruntime cannot use.
    """

    dtype = torch.float32

    def __init__(self, folder: str | Path, device: str = "cpu"):
        folder, runtime = Path(folder), require("onnxruntime")
        missing = [name for name in ("window.onnx", "config.json") if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"file not found: {folder / missing[0]}, so {folder} is no ONNX export; {AGAIN}")
        # TF32, which rounds the factors of products to 10 bits, is off.
        providers = {"cpu": ("CPUExecutionProvider", {}), "cuda": ("CUDAExecutionProvider", {"use_tf32": "0"})}
        if device not in providers:
            raise ValueError(f"onnxruntime computes on {' or '.join(providers)} here, not on {device}")
        self.config, path = read_config(folder, AGAIN), folder / "window.onnx"
        check_download(path)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = runtime.InferenceSession(path, options, providers=[providers[device]])
        except Exception as error:  # onnxruntime's classes have no common base
            raise ValueError(f"{path} is damaged or no ONNX file ({cut(error, 80)}); {AGAIN}") from error
        names = [(port.name, *port.shape[1:2]) for port in (*self.session.get_inputs(), *self.session.get_outputs())]
        channels, classes = self.config.vision_config.num_channels, self.config.num_labels
        if names != [(INPUT, channels), (OUTPUT, classes)]:
            raise ValueError(
                f"{path} goes from and to {cut(names, 80)}, and its config.json says {INPUT} with {channels} channels "
                f"to {OUTPUT} with {classes}; {AGAIN}"
            )
        usable = device == "cpu" or torch.cuda.is_available()  # torch makes the input and takes the output
        # Asked for a GPU that it cannot use, onnxruntime takes the CPU without an error.
        if not usable or providers[device][0] not in self.session.get_providers():
            raise ValueError(
                f"onnxruntime and torch find no {device} here; pip install onnxruntime-gpu, or choose --device cpu"
            )
        self.config.name_or_path = str(folder)
        self.backend = f"onnxruntime {runtime.__version__}"
        self.device = torch.device(device)

    def score(self, pixel_values: Tensor) -> Tensor:
        """As `TqdmForSemanticSegmentation.score`; raises ValueError for an image under two patches a side."""
        height, width = pixel_values.shape[-2:]
        multiple, smallest = size_multiple(self.config), 2 * self.config.vision_config.patch_size
        padded = F.pad(pixel_values, (0, -width % multiple, 0, -height % multiple))
        if min(padded.shape[-2:]) < smallest:
            raise ValueError(f"image is {height}x{width} pixels; enlarge it to at least {smallest}x{smallest}")
        scores = self.session.run([OUTPUT], {INPUT: np.ascontiguousarray(padded.cpu().numpy())})[0]
        return torch.from_numpy(scores)[..., :height, :width].to(pixel_values.device)

    def window_scorer(self) -> Callable[[Tensor], Tensor]:
        """`score`."""
        return self.score
