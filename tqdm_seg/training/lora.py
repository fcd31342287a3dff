"""Low-rank adapters (LoRA, by peft) in the vision tower: a cheap way to train; merged into the weights at the end."""

import copy

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from tqdm_seg.backbone_tqdm import TqdmVisionModel
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

# Attention and feed-forward of both towers.
TARGETS = r"blocks\.\d+\.(attention\.(q|k|v|out)_proj|ffn\.(fc1|fc2|w1|w2|w3))"


def add_adapters(tower: TqdmVisionModel, rank: int) -> None:
    """Adds adapters of this rank to every block, in place, and freezes the tower around them."""
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS), tower)


def without_adapters(model: TqdmForSemanticSegmentation) -> TqdmForSemanticSegmentation:
    """The model itself if it has no adapters, else a copy with all of them merged into the weights."""
    if not any(isinstance(module, LoraLayer) for module in model.modules()):
        return model
    merged = copy.deepcopy(model)
    for name, module in list(merged.named_modules()):
        if isinstance(module, LoraLayer) and isinstance(module, nn.Module):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(merged.get_submodule(parent), child, module.get_base_layer())
    return merged
