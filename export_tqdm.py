"""The window model for other runtimes, and onnxruntime as one of them.

    python export_tqdm.py MODEL OUT [--format onnx torch] [--size 512x512]
    python predict.py OUT --backend onnxruntime photos/ --out results

    OUT/window.onnx    pixel_values (B, 3, h, w) float32, normalised -> scores (B, K, h, w) float32, any B
    OUT/window.pt2     the same for torch.export.load
    OUT/export.json    sizes, operator set, versions, and what the checks below found

The class texts are stored and the layers folded, so neither text tower nor this repository is needed to run it. Before
OUT appears, every file is loaded anew and held against the model on random numbers and on a picture, one and three at a
time. Sliding over larger images is left to the program, here `OnnxSegmenter`.
"""

import argparse
import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tqdm_seg.configuration_tqdm import TqdmConfig
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.model_folder_tqdm import load_model, model_folder
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation, average_views, slide
from tqdm_seg.modes_tqdm import prepare
from tqdm_seg.prepare_tqdm import run
from tqdm_seg.publish_tqdm import written_whole

INPUT, OUTPUT = "pixel_values", "scores"
OPSET = 20  # the first whose GridSample is the one of torch
BOUND = 5e-4  # of a score: what logits may differ by, for the sums of operations are taken in another order
_PICTURES = Path(__file__).parent / "examples" / "frames"


class WindowModel(nn.Module):
    """`TqdmForSemanticSegmentation.score` as a module: what is exported."""

    def __init__(self, model: TqdmForSemanticSegmentation):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (B, 3, h, w) -> scores (B, K, h, w)."""
        return self.model.score(pixel_values)


def require(backend: str) -> Any:
    """The module of this name; raises ImportError with the command that installs it."""
    if importlib.util.find_spec(backend) is None:
        raise ImportError(f"this needs the package {backend}: pip install onnx onnxscript onnxruntime")
    return importlib.import_module(backend)


def window_size(config: TqdmConfig, asked: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width to export: as asked, else the model's window, else what its vision tower was made for.

    Raises ValueError for a size that is not the window of a model that has windows.
    """
    side = config.window_size or config.vision_config.image_size
    if asked is not None and config.window_size is not None and asked != (side, side):
        raise ValueError(
            f"--size {asked[0]}x{asked[1]}: the model slides windows of {side}x{side}; leave --size out, or set "
            "window_size in its config.json to null first, so that whole images are exported"
        )
    return asked or (side, side)


def export_onnx(window: WindowModel, example: Tensor, path: Path, opset: int) -> None:
    """Writes the ONNX file; example (B, 3, h, w)."""
    require("onnxscript")
    batch = torch.export.Dim("batch", min=1)
    program = torch.onnx.export(
        window, (example,), dynamo=True, opset_version=opset, input_names=[INPUT], output_names=[OUTPUT],
        dynamic_shapes=({0: batch},), verbose=False,
    )  # fmt: skip
    program.save(path)


def export_torch(window: WindowModel, example: Tensor, path: Path) -> None:
    """Writes the file for `torch.export.load`; example (B, 3, h, w)."""
    batch = torch.export.Dim("batch", min=1)
    torch.export.save(torch.export.export(window, (example,), dynamic_shapes=({0: batch},), strict=False), path)


def run_onnx(path: Path, pixel_values: Tensor) -> Tensor:
    """Scores of the ONNX file."""
    session = require("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run([OUTPUT], {INPUT: pixel_values.numpy()})[0])


def run_torch(path: Path, pixel_values: Tensor) -> Tensor:
    """Scores of the file for torch.export."""
    return torch.export.load(path).module()(pixel_values)


def check_inputs(processor: TqdmImageProcessor, size: tuple[int, int], picture: Path) -> dict[str, Tensor]:
    """What the files are tried on, by name: (1, 3, h, w) and (3, 3, h, w)."""
    image = Image.open(picture).convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR)
    real = processor(images=image, do_resize=False, return_tensors="pt")["pixel_values"]
    noise = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    return {"random": noise[:1], "picture": real, "both, three at once": torch.cat((noise, real))}


@torch.inference_mode()
def check(window: WindowModel, path: Path, inputs: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference from the model on each of the inputs; raises ValueError if one is over `BOUND`."""
    run_file = run_onnx if path.suffix == ".onnx" else run_torch
    found = {name: (run_file(path, x) - window(x)).abs().max().item() for name, x in inputs.items()}
    wrong = {name: value for name, value in found.items() if not value <= BOUND}
    if wrong:
        raise ValueError(
            f"{path.name} differs from the model by {wrong}, more than {BOUND}; nothing was written. Try another "
            "--opset, or another version of torch or onnxruntime"
        )
    return found


def export_model(
    folder: Path, out: Path, formats: list[str], asked_size: tuple[int, int] | None, opset: int, picture: Path
) -> dict[str, Any]:
    """Writes OUT, whole or not at all; returns what export.json holds."""
    model, processor = load_model(folder)
    size = window_size(model.config, asked_size)
    window = WindowModel(prepare(model).requires_grad_(False)).eval()
    example = torch.zeros(2, 3, *size)
    facts: dict[str, Any] = {
        "size": list(size), "input": INPUT, "output": OUTPUT, "bound": BOUND, "checks": {},
        "versions": {"torch": torch.__version__},
    }  # fmt: skip
    with written_whole(out) as temporary:
        if "torch" in formats:
            export_torch(window, example, temporary / "window.pt2")
        if "onnx" in formats:
            export_onnx(window, example, temporary / "window.onnx", opset)
            facts["opset"] = opset
            facts["versions"] |= {name: require(name).__version__ for name in ("onnx", "onnxscript", "onnxruntime")}
        inputs = check_inputs(processor, size, picture)
        for path in sorted(temporary.glob("window.*")):
            facts["checks"][path.name] = check(window, path, inputs)
        model.config.to_json_file(temporary / "config.json")
        processor.to_json_file(temporary / "preprocessor_config.json")
        (temporary / "export.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


class OnnxSegmenter:
    """An exported model that predicts as `TqdmForSemanticSegmentation` does, computed by onnxruntime.

    device: "cpu" or "cuda". As many threads as torch uses. Raises FileNotFoundError for a folder that is no export,
    ValueError for a file that cannot be read, or a device that onnxruntime cannot use.
    """

    dtype = torch.float32

    def __init__(self, folder: str | Path, device: str = "cpu"):
        folder, runtime = Path(folder), require("onnxruntime")
        missing = [name for name in ("window.onnx", "export.json", "config.json") if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} holds no {missing[0]}, so it is no export to ONNX; make one: python export_tqdm.py MODEL OUT"
            )
        providers = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
        if providers[device] not in runtime.get_available_providers():
            raise ValueError(f"onnxruntime finds no {device} here; pip install onnxruntime-gpu, or choose --device cpu")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = runtime.InferenceSession(folder / "window.onnx", options, providers=[providers[device]])
        except Exception as error:  # of onnxruntime's own classes, which have no common one
            raise ValueError(f"cannot read {folder / 'window.onnx'}: {error}") from error
        self.config = TqdmConfig.from_pretrained(folder)
        self.config.name_or_path = str(folder)
        self.backend = f"onnxruntime {runtime.__version__}"
        self.device = torch.device("cpu")  # of the tensors that go in and come out
        self.size = tuple(json.loads((folder / "export.json").read_text(encoding="utf-8"))["size"])

    def score(self, pixel_values: Tensor) -> Tensor:
        """Scores (B, K, h, w) of pixel_values (B, 3, h, w); raises ValueError for another size than the export's."""
        if tuple(pixel_values.shape[-2:]) != self.size:
            asked, made = ("x".join(map(str, size)) for size in (pixel_values.shape[-2:], self.size))
            raise ValueError(
                f"an image or window is {asked} pixels and this export computes {made} only; scale the images, or "
                f"export the model for them: python export_tqdm.py MODEL OUT --size {asked}"
            )
        return torch.from_numpy(self.session.run([OUTPUT], {INPUT: np.ascontiguousarray(pixel_values.numpy())})[0])

    def segment(
        self,
        views: Tensor | list[Tensor],
        size: tuple[int, int] | None = None,
        flip: bool = False,
        softmax_views: bool = False,
    ) -> Tensor:
        """As `TqdmForSemanticSegmentation.segment`."""
        views = [views] if isinstance(views, Tensor) else views
        return average_views(self._score_view, views, size or views[0].shape[-2:], flip, softmax_views)

    def _score_view(self, view: Tensor) -> Tensor:
        config = self.config
        if config.window_size is None or max(view.shape[-2:]) <= config.window_size:
            return self.score(view)
        batch = config.window_batch_size or 1
        return slide(self.score, view, config.num_labels, config.window_size, config.window_stride, batch)

    def segment_labels(
        self,
        views: Tensor | list[Tensor],
        size: tuple[int, int] | None = None,
        flip: bool = False,
        softmax_views: bool = False,
    ) -> Tensor:
        """As `TqdmForSemanticSegmentation.segment_labels`."""
        return self.segment(views, size, flip, softmax_views).max(1).indices


def parse_size(text: str) -> tuple[int, int]:
    """'512x1024' -> (512, 1024)."""
    height, width = (int(side) for side in text.split("x"))
    return height, width


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="model folder, or name of a repository on the Hugging Face Hub")
    add("out", metavar="OUT", type=Path, help="folder to write; one that is there is replaced")
    add("--format", nargs="+", choices=["onnx", "torch"], default=["onnx", "torch"], help="(default: both)")
    add(
        "--size", type=parse_size, metavar="HxW",
        help="pixels of what is exported, for models without windows (default: the window, else the tower's size)",
    )  # fmt: skip
    add("--opset", type=int, default=OPSET, help="ONNX operator set (default: %(default)s)")
    add("--picture", type=Path, help="for the check on a real picture (default: one of examples/frames)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Exports, checks, prints what was found."""
    args = make_parser().parse_args(argv)
    picture = args.picture or next(iter(sorted(_PICTURES.rglob("image_data/*.png"))), None)
    if picture is None:
        raise FileNotFoundError("the check needs a picture, and examples/frames is not here; name one with --picture")
    facts = export_model(model_folder(args.model), args.out, args.format, args.size, args.opset, picture)
    for name, found in facts["checks"].items():
        size = (args.out / name).stat().st_size / 1e6
        print(f"{args.out / name}: {size:.1f} MB, differs from the model by at most {max(found.values()):.1e}")


if __name__ == "__main__":
    run(main)
