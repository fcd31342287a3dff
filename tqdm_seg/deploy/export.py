"""The model for other runtimes, and onnxruntime as one of them.

    python export_tqdm.py MODEL OUT [--format onnx torch] [--size 512x512]
    python predict.py OUT --backend onnxruntime photos/ --out results

    OUT/window.onnx    pixel_values (B, 3, h, w) float32, normalised -> scores (B, K, h, w) float32, of any size that is
                       a multiple of "multiple_of" in export.json
    OUT/window.pt2     the same for torch.export.load, of one size: a window; for CPUs
    OUT/export.json    names, sizes, operator set, versions, and what the checks below found

The class texts are stored and the layers folded, so neither text tower nor this repository is needed to run it. Before
OUT appears, every file is loaded anew and held against the model as it was loaded: on random numbers and on a picture,
one and three at a time. Sliding over larger images is left to the program, here `OnnxSegmenter`. Weights of more than
1.5 GB lie beside window.onnx, in window.onnx.data.
"""

import argparse
import importlib
import importlib.util
import json
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

from ..data.files import run, written_whole
from .folder import load_model, model_folder
from .speed import ready_to_predict

INPUT, OUTPUT = "pixel_values", "scores"
OPSET = 20  # the first that has GELU as one operator; onnxruntime reads it since 1.17
BOUND = 5e-4  # of a score, a sum of probabilities: what their logits may differ by from the published code's
_PICTURES = Path(__file__).parent / "examples" / "frames"


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
    """The module of this name; raises ImportError with the command that installs it."""
    if importlib.util.find_spec(backend) is None:
        raise ImportError(f"this needs the package {backend}: pip install onnx onnxscript onnxruntime")
    return importlib.import_module(backend)


def window_size(config: TqdmConfig, asked: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of window.pt2: as asked, else the model's window, else what its vision tower was made for.

    Raises ValueError for a size that no window of the model has; windows are smaller where the image is.
    """
    side = config.window_size or config.vision_config.image_size
    if asked is not None and config.window_size is not None and max(asked) > side:
        raise ValueError(
            f"--size {asked[0]}x{asked[1]}: the model slides windows of {side}x{side}; leave --size out, or set "
            "window_size in its config.json to null first, so that whole images are exported"
        )
    return asked or (side, side)


def size_multiple(config: TqdmConfig) -> int:
    """What height and width of images for window.onnx have to be multiples of; the model pads others with zeros."""
    vision = config.vision_config
    return 1 if vision.patch_remainder == "stretch" else vision.patch_size


def export_onnx(window: WindowModel, path: Path, opset: int) -> None:
    """Writes the ONNX file; raises ValueError for an operator set that torch cannot write."""
    require("onnxscript")
    tower = window.model.model.vision_tower
    # At the size of its position table the tower does not resize it, and the file would be for that size alone.
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
    torch.export.save(torch.export.export(window, (example,), dynamic_shapes=({0: batch},), strict=False), path)


def check_inputs(processor: TqdmImageProcessor, size: tuple[int, int], patch: int, picture: Path) -> dict[str, Tensor]:
    """What the files are tried on, by name: (1, 3, h, w) and (3, 3, h, w) of `size`, the last of another one."""
    image = Image.open(picture).convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR)
    real = processor(images=image, do_resize=False, return_tensors="pt")["pixel_values"]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3, *size, generator=generator)
    larger = torch.randn(1, 3, size[0] + 3 * patch, size[1] + patch, generator=generator)
    return {"random": noise[:1], "picture": real, "both, three at once": torch.cat((noise, real)), "larger": larger}


@torch.inference_mode()
def check(
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


def export_model(
    folder: Path, out: Path, formats: list[str], asked_size: tuple[int, int] | None, opset: int, picture: Path | None
) -> dict[str, Any]:
    """Writes OUT, whole or not at all; returns what export.json holds. picture: None leaves out the checks."""
    packages = [] if "onnx" not in formats else ["onnx", "onnxscript", *(["onnxruntime"] if picture else [])]
    versions = {"torch": torch.__version__} | {name: require(name).__version__ for name in packages}
    model, processor = load_model(folder)
    config, size = model.config, window_size(model.config, asked_size)
    inputs = check_inputs(processor, size, config.vision_config.patch_size, picture) if picture else {}
    with torch.inference_mode():
        expected = {name: model.score(x) for name, x in inputs.items()}
    window, example, checks = WindowModel(ready_to_predict(model)), torch.zeros(2, 3, *size), {}
    facts: dict[str, Any] = {"input": INPUT, "output": OUTPUT, "versions": versions, "bound": BOUND, "checks": checks}
    with written_whole(out) as temporary:
        config.to_json_file(temporary / "config.json")
        processor.to_json_file(temporary / "preprocessor_config.json")
        if "torch" in formats:
            path, facts["size"] = temporary / "window.pt2", list(size)
            export_torch(window, example, path)
            if inputs:
                fitting = {name: x for name, x in inputs.items() if x.shape[-2:] == size}
                checks[path.name] = check(path.name, torch.export.load(path).module(), fitting, expected)
        if "onnx" in formats:
            path = temporary / "window.onnx"
            facts |= {"opset": opset, "multiple_of": size_multiple(config)}
            export_onnx(window, path, opset)
            if inputs:
                checks[path.name] = check(path.name, OnnxSegmenter(temporary).score, inputs, expected)
        (temporary / "export.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


class OnnxSegmenter(Segmenter):
    """An exported model that predicts as `TqdmForSemanticSegmentation` does, computed by onnxruntime in float32.

    device: "cpu" or "cuda". As many threads as torch uses. Raises FileNotFoundError for a folder that is no export,
    ValueError for a file that cannot be read, or a device that onnxruntime cannot use.
    """

    dtype = torch.float32

    def __init__(self, folder: str | Path, device: str = "cpu"):
        folder, runtime = Path(folder), require("onnxruntime")
        missing = [name for name in ("window.onnx", "config.json") if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} holds no {missing[0]}, so it is no export to ONNX; make one: python export_tqdm.py MODEL OUT"
            )
        # Without its TF32, which rounds the factors of products to 10 bits.
        providers = {"cpu": ("CPUExecutionProvider", {}), "cuda": ("CUDAExecutionProvider", {"use_tf32": "0"})}
        if device not in providers:
            raise ValueError(f"onnxruntime computes on {' or '.join(providers)} here, not on {device}")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = runtime.InferenceSession(folder / "window.onnx", options, providers=[providers[device]])
        except Exception as error:  # of onnxruntime's own classes, which have no common one
            raise ValueError(f"cannot read {folder / 'window.onnx'}: {error}") from error
        usable = device == "cpu" or torch.cuda.is_available()  # torch's, for the tensors that go in and come out
        # Asked for a GPU that it cannot use, onnxruntime takes the CPU without an error.
        if not usable or providers[device][0] not in self.session.get_providers():
            raise ValueError(
                f"onnxruntime and torch find no {device} here; pip install onnxruntime-gpu, or choose --device cpu"
            )
        self.config = TqdmConfig.from_pretrained(folder)
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


def parse_size(text: str) -> tuple[int, int]:
    """'512x1024' -> (512, 1024); what argparse calls for an option."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write HEIGHTxWIDTH, as 1024x2048")
    return int(height), int(width)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="model folder, or name of a repository on the Hugging Face Hub")
    add("out", metavar="OUT", type=Path, help="folder to write; one that is there is replaced")
    add("--format", nargs="+", choices=["onnx", "torch"], default=["onnx", "torch"], help="(default: both)")
    add(
        "--size", type=parse_size, metavar="HxW",
        help="pixels of window.pt2, and what both are checked on (default: the model's window, else its tower's size)",
    )  # fmt: skip
    add("--opset", type=int, default=OPSET, help="ONNX operator set (default: %(default)s)")
    add("--picture", type=Path, help="for the check on a real picture (default: one of examples/frames)")
    add("--no-check", action="store_true", help="do not hold the files against the model, which takes a minute")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Exports, checks, prints what was found."""
    args = make_parser().parse_args(argv)
    picture = args.picture or next(iter(sorted(_PICTURES.rglob("image_data/*.png"))), None)
    if picture is None and not args.no_check:
        raise FileNotFoundError("the check needs a picture, and examples/frames is not here; name one with --picture")
    picture = None if args.no_check else picture
    facts = export_model(model_folder(args.model), args.out, args.format, args.size, args.opset, picture)
    for path in sorted(args.out.glob("window.*")):
        found = facts["checks"].get(path.name)
        verdict = f", differs from the model by at most {max(found.values()):.1e}" if found else ""
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB{verdict}")


if __name__ == "__main__":
    run(main)
