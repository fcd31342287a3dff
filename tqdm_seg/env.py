"""What a bug report has to say: versions, devices and commit."""

import dataclasses
import platform
from importlib import metadata

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
    """What is printed, by name."""
    import torch

    from .deploy.folder import code_commit

    facts = {"tqdm-segmentation": __version__, "commit": code_commit() or "no checkout"}
    facts |= {"python": platform.python_version(), "system": platform.platform()}
    for name in LIBRARIES:
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = "not installed"
    facts["CPU threads"] = str(torch.get_num_threads())
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts["GPUs"] = ", ".join(gpus) or "none"
    width = max(map(len, facts))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()))
    return facts
