"""Ways to predict faster than in float32, each at a price: `python benchmarks/mode_changes.py` measures it.

Without a price come `freeze_text()` and `fuse_for_inference()`, which `prepare` calls first.
"""

import importlib.util
import os

import torch
from torch import nn

from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

PRECISIONS = ("float32", "bfloat16", "float16", "int8")


def use_huge_pages() -> None:
    """Lets torch ask Linux for huge pages, which made float32 2 to 9 % faster on a CPU; before the first tensor.

    It is torch's own switch, an environment variable; one that is set already stays as it is.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def prepare(
    model: TqdmForSemanticSegmentation, precision: str = "float32", compiled: bool = False
) -> TqdmForSemanticSegmentation:
    """The model, in eval mode, as fast as it goes, in place: texts stored, layers folded, weights in `precision`.

    It can predict, and nothing else any more. "int8": products of the vision tower in 8 bits, one scale for every row
    of weights and every token (torchao), on CPUs; all else in float32. compiled: torch.compile for the windows, which
    takes a minute or two at the first one, and again for windows of another size. Raises ImportError without torchao,
    ValueError for other names, and for int8 elsewhere than on a CPU.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is none of {', '.join(PRECISIONS)}")
    if precision == "int8" and model.device.type != "cpu":
        raise ValueError(f"int8 is for CPUs and the model is on {model.device}; choose bfloat16, which is faster there")
    model.eval()
    model.freeze_text()
    model.fuse_for_inference()
    if precision == "int8":
        _quantise(model.model.vision_tower.blocks)
    else:
        model.to(getattr(torch, precision))
    if compiled:
        model.score = torch.compile(model.score)
    return model


def _quantise(blocks: nn.ModuleList) -> None:
    if importlib.util.find_spec("torchao") is None:
        raise ImportError("int8 needs the torchao package: pip install torchao, or choose bfloat16")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(blocks, Int8DynamicActivationInt8WeightConfig(), lambda module, _: isinstance(module, nn.Linear))
