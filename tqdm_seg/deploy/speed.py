"""A model made ready to predict, in five number formats.

    model = ready_to_predict(model, "bf16")

fp32    exact: only rounding differs from the plain model (1e-4 of a score)
tf32    float32 weights, products and convolutions in TF32: NVIDIA GPUs
bf16    weights and activations in bfloat16
fp16    weights and activations in float16: GPUs
int8    the vision tower's products in 8 bits (torchao), all else in float32: CPUs

`python benchmarks/mode_changes.py` measures what each of them changes.
"""

import copy
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

DTYPES = {
    "fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.float32,
}  # fmt: skip
PRECISIONS = tuple(DTYPES)


def use_huge_pages() -> None:
    """Lets torch ask Linux for huge pages, which made float32 2 to 9 % faster on a CPU. Call it before torch allocates.

    It is torch's own switch, an environment variable; a value that is already set stays.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def set_float32_arithmetic(precision: str) -> None:
    """Allows TF32 in float32 products and convolutions of NVIDIA GPUs for "tf32", and forbids it for all others.

    TF32 rounds factors to 10 bits. Torch's own default forbids it in products and allows it in convolutions.
    """
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def ready_to_predict(
    model: TqdmForSemanticSegmentation, precision: str = "fp32", compiled: bool = False
) -> TqdmForSemanticSegmentation:
    """Makes the model fast, in place, and returns it: eval mode, fast layers, weights in `precision`.

    Afterwards it can only predict. compiled: torch.compile for the windows, which takes a minute or two at the first
    one, and again for windows of another size.
    Raises ValueError for an unknown precision and one that the model's device does not have, ImportError for int8
    without torchao.
    """
    device = model.device.type
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    if precision == "int8" and device != "cpu":
        raise ValueError(
            f"int8 runs on CPUs only and the model is on {model.device}; choose bf16, which is faster there"
        )
    if precision == "tf32" and device != "cuda":
        raise ValueError(f"tf32 runs on NVIDIA GPUs only and the model is on {model.device}; choose fp32")
    set_float32_arithmetic(precision)
    model.prepare_for_inference()
    if precision == "int8":
        _quantise(model.model.vision_tower.blocks)
    model.to(DTYPES[precision])
    if compiled:
        model.score = torch.compile(model.score)
    return model


def ready_copy(model: TqdmForSemanticSegmentation, precision: str = "fp32") -> TqdmForSemanticSegmentation:
    """A copy that is `ready_to_predict`, for a model that is trained further.

    It is what loading the saved model would give: plain layers, without what training wrapped around them. Adapters
    must be merged before. Raises as `ready_to_predict`.
    """
    with torch.device("meta"):  # no weights are drawn
        ready = TqdmForSemanticSegmentation(copy.deepcopy(model.config))
    weights = model.state_dict().items()
    own = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in weights}
    ready.load_state_dict(own, assign=True)
    return ready_to_predict(ready, precision)


@contextmanager
def restore_arithmetic() -> Iterator[None]:
    """After the block float32 is computed as before, whatever `set_float32_arithmetic` chose inside."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def _quantise(blocks: nn.ModuleList) -> None:
    if importlib.util.find_spec("torchao") is None:
        raise ImportError("int8 needs the torchao package: pip install torchao, or choose bf16")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(blocks, Int8DynamicActivationInt8WeightConfig(), lambda module, _: isinstance(module, nn.Linear))
