"""Options of the programs that use a model: predict, convert, export."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..program import names, option, size

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["fp32", "tf32", "bf16", "fp16", "int8"]
Preset = Literal["clip_vit_b16", "eva02_clip_b16", "eva02_clip_l14", "tiny"]

MODEL = "model folder, or name of a repository on the Hugging Face Hub"
OPSET = 20  # the first with GELU as one operator; onnxruntime reads it since 1.17


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Segments images and videos.

        tqdm-seg predict MODEL street.jpg photos/ drive.mp4 --out results
        tqdm-seg predict EXPORT photos/ --out results --backend onnxruntime     # EXPORT: made by tqdm-seg export

        results/overlays/street.png    the image with every class in its colour, and a legend
        results/ids/street.png         8-bit grey, the value of a pixel is its class id
        results/overlays/drive.mp4     the same overlay for every frame, without sound; ids of videos are not kept
        results/areas.json             pixels and share of every class in every image and frame, and how they were made

    Files in folders keep their place under the folder. Files that cannot be read are skipped and named at the end, with
    exit status 1. The same command goes on where a stopped one ended. No code from MODEL runs.
    """

    model: str = option(help=MODEL)
    inputs: tuple[Path, ...] = option(metavar="INPUT", help="image, video, or folder of both, with its subfolders")
    out: Path = option(flag=True, help="for the results; files of the same name are replaced")
    class_names: tuple[str, ...] | None = option(
        None, type=names,
        help="predict these classes, whose ids are 0, 1, ... in this order: any names for a model of --class-head "
        "cosine, with a text tower or class vectors; names that it has for all others (default: the model's classes)",
    )  # fmt: skip
    only: tuple[str, ...] | None = option(
        None, type=names,
        help="of the model's classes, or of --class-names, let only these win a pixel; ids stay (default: all)",
    )  # fmt: skip
    size: tuple[int, int] | None = option(
        None,
        type=size,
        help="scale images to fit this box, such as 1024x2048 (default: keep their size)",
    )
    window: int | None = option(
        None, metavar="PX", help="side of the sliding window, 0: whole images (default: the model's)"
    )
    stride: int | None = option(
        None, metavar="PX", help="distance from window to window (default: the model's; with --window 2/3 of it)"
    )
    window_batch: int | None = option(
        None, help="windows per forward pass; fewer need less memory (default: the model's)"
    )
    flip: bool = option(False, help="average with the prediction for the mirrored image, in twice the time")
    device: Device = option("auto", help="auto: a GPU if there is one")
    precision: Precision = option("fp32", help="fp32 is exact; tf32 is for NVIDIA GPUs, int8 for CPUs with torchao")
    compile: bool = option(False, help="torch.compile: minutes for the first image, then faster")
    backend: Literal["torch", "onnxruntime"] = option("torch", help="onnxruntime is for exports")
    check: bool = option(False, help="first compare the model's scores with those stored when it was saved")

    def __post_init__(self):
        check_at_least(window=(self.window, 0), stride=(self.stride, 1), window_batch=(self.window_batch, 1))
        if self.only is not None and len(set(self.only)) < 2:
            raise ValueError(f"--only {','.join(self.only)}: every pixel gets one of these classes, name at least two")
        if self.backend == "onnxruntime" and (self.precision != "fp32" or self.compile):
            raise ValueError("an export computes in fp32: leave out --precision and --compile, or use --backend torch")
        if self.backend == "onnxruntime" and self.class_names:
            raise ValueError("an export has its class texts stored: leave out --class-names, or use --backend torch")
        if self.check and self.class_names:
            raise ValueError("--check compares the classes that the model was saved with; leave out --class-names")
        if self.backend == "onnxruntime" and self.check:
            raise ValueError("--check compares a model folder; an export is compared when it is made")
        if self.backend == "onnxruntime" and self.device == "mps":
            raise ValueError("--backend onnxruntime runs on cpu or cuda, not on mps")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Makes a model folder of published or pre-trained weights.

        tqdm-seg convert tqdm.pth --out DIR                              # published checkpoint -> model
        tqdm-seg convert ViT-B-16.pt --out DIR --init clip_vit_b16       # pre-trained CLIP -> start of a training
        tqdm-seg convert EVA02-L-14-336:merged2b_s6b_b61k --out DIR --init eva02_clip_l14 --from open_clip
        tqdm-seg convert openai/clip-vit-base-patch16 --out DIR --init clip_vit_b16 --from transformers

    Every key of the input is renamed, or dropped for a reason, and counted; any other key is an error.
    """

    source: str = option(help=".pth, .pt or .safetensors file, or what --from says")
    out: Path = option(flag=True, help="model folder to write, for `tqdm-seg predict` and `tqdm-seg train --model`")
    preset: Literal["auto", Preset] = option(
        "auto",
        help="SOURCE is a published tqdm checkpoint of this preset; auto: found by its shapes",
    )  # fmt: skip
    init: Preset | None = option(None, help="SOURCE is a pre-trained CLIP or EVA02-CLIP, DIR the start of a training")
    class_names: tuple[str, ...] | None = option(
        None, type=names, help="what the class ids mean, in their order (default: Cityscapes' 19)"
    )
    from_: Literal["file", "open_clip", "transformers"] = option(
        "file", group="with --init",
        help="what SOURCE is; open_clip: NAME:TAG of open_clip.list_pretrained(), or hf-hub:ORG/NAME; transformers: "
        "CLIPModel folder or Hub name; both download",
    )  # fmt: skip
    activation: Literal["quick_gelu", "gelu"] | None = option(
        None, group="with --init",
        help="of a file that does not say what it was trained with: quick_gelu for OpenAI's, gelu for most others",
    )  # fmt: skip
    seed: int = option(0, group="with --init", help="decides the weights that are not pre-trained")

    def __post_init__(self):
        check_at_least(seed=(self.seed, 0))
        if self.init is not None and self.preset != "auto":
            raise ValueError("--preset is for published checkpoints and --init for pre-trained towers; use one of them")
        if self.init is None and (self.from_ != "file" or self.activation):
            raise ValueError("--from and --activation are for pre-trained towers; add --init PRESET, the model to make")
        if self.from_ != "file" and self.activation:
            raise ValueError(f"--activation is for files; with --from {self.from_} it is known")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Writes a model for other runtimes.

        tqdm-seg export MODEL --out DIR
        tqdm-seg predict DIR photos/ --out results --backend onnxruntime

        DIR/window.onnx    pixel_values (B, 3, h, w) float32, normalised -> scores (B, K, h, w) float32, of any size
                           that is a multiple of "multiple_of" in export.json
        DIR/window.pt2     the same for torch.export.load, on CPUs and for windows of one size
        DIR/export.json    names, sizes, operator set, versions, and the results of the checks

    The class texts are stored and the layers folded: running the files needs neither a text tower nor this repository.
    Every file is reloaded and checked against the model first: on random numbers and on an image, one and three at a
    time. Sliding windows over larger images is left to the program that runs them. Weights above 1.5 GB lie in
    window.onnx.data.
    """

    model: str = option(help=MODEL)
    out: Path = option(flag=True, help="folder to write; an earlier export is replaced")
    format: tuple[Literal["onnx", "torch"], ...] = option(("onnx", "torch"), help="files to write")
    size: tuple[int, int] | None = option(
        None, type=size,
        help="pixels of window.pt2, and of the checks (default: the model's window, else its tower's size)",
    )  # fmt: skip
    opset: int = option(OPSET, help="ONNX operator set")
    image: Path | None = option(None, help="for the check on a real image (default: one of examples/frames)")
    check: bool = option(True, help="check the files against the model, which takes a minute")

    def __post_init__(self):
        check_at_least(opset=(self.opset, 1))


def check_at_least(**limits: tuple[int | None, int]) -> None:
    """Raises ValueError for an option whose value is given and smaller than its limit: `stride=(0, 1)`."""
    for name, (value, least) in limits.items():
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, must be at least {least}")
