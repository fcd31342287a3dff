"""What a bug report has to say: versions, devices and commit."""

import dataclasses
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from . import __version__
from .program import takes

LIBRARIES = (
    "torch", "torchvision", "transformers", "accelerate", "safetensors", "huggingface_hub", "open_clip_torch",
    "datasets", "evaluate", "opencv-python-headless", "pillow", "numpy", "peft", "torchao", "onnx", "onnxruntime", 
    "xformers", "av",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnvOptions:
    """Prints versions, devices and commit. Please paste it into a bug report."""


@takes(EnvOptions)
def env(options: EnvOptions) -> dict[str, str]:
    """What is printed, by name. Works where torch cannot be imported, too, and says why."""
    facts = {"tqdm-segmentation": __version__, "commit": code_commit() or "not a checkout"}
    facts |= {"python": platform.python_version(), "system": platform.platform()}
    for name in LIBRARIES:
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = "not installed"
    facts |= devices()
    width = max(map(len, facts))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()))
    return facts


def devices() -> dict[str, str]:
    """What torch can compute on."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: of a shared library
        return {"devices": f"torch cannot be imported: {error}"}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "CPU threads": str(torch.get_num_threads()),
        "CUDA": torch.version.cuda or "torch has none",
        "GPUs": ", ".join(gpus) or "none",
        "MPS": "yes" if torch.backends.mps.is_available() else "no",
    }


def code_commit() -> str | None:
    """Commit of the checkout that holds this package, "with changes" if its Python differs; None outside of one."""
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None  # installed inside somebody else's checkout
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "--", "*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
