"""Made tests/packs from the full packs: python tests/make_packs.py PATH/TO/reference/mini_*

Keeps what the comparison needs and little more: of the token table only the rows of used tokens, of `reg_E0` no pyramid
(and all of it only in mini_clip; elsewhere its stored embedding stands in), of large golden tensors every n-th entry.
Inputs, labels and points stay whole.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

KEPT_ENTRIES = 800
WHOLE = ("/image", "/points_", "/gt_semantic_seg", "/attn_mask_")


def thin_golden(folder: Path, target: Path) -> None:
    """Writes golden.safetensors with strides noted in its metadata, and golden.json without the float64 noise."""
    golden, strides = {}, {}
    for key, tensor in load_file(folder / "golden.safetensors").items():
        if "/gt_labels_" in key or "/gt_masks_" in key or key == "train_empty/image" or "bn_after/reg_E0" in key:
            continue  # made from the label map, or without influence on anything
        if tensor.numel() > KEPT_ENTRIES and not any(part in key for part in WHOLE):
            strides[key] = -(-tensor.numel() // KEPT_ENTRIES) | 1  # odd, so that it does not follow rows
            tensor = tensor.flatten()[:: strides[key]].clone()
        golden[key] = tensor
    save_file(golden, target / "golden.safetensors", metadata={"strides": json.dumps(strides)})
    values = json.loads((folder / "golden.json").read_text())
    kept = without_frozen_copy({"training": values["training"]})
    (target / "golden.json").write_text(json.dumps(kept, separators=(",", ":")) + "\n")


def thin_weights(folder: Path, target: Path, pack: dict) -> None:
    """Writes weights.safetensors with `token_rows` naming the rows that are left of the token table."""
    state = load_file(folder / "weights.safetensors")
    rows = torch.tensor(sorted({i for ids in pack["class_token_ids"] + pack["regulariser_token_ids"] for i in ids}))
    table = state["text_encoder.token_embedding.weight"]
    state["text_encoder.token_embedding.weight"] = table[rows].clone()
    state["token_rows"] = rows
    unused = "reg_E0.fpn" if folder.name == "mini_clip" else "reg_E0."
    save_file({k: v for k, v in state.items() if not k.startswith(unused)}, target / "weights.safetensors")


def without_frozen_copy(values: Any) -> Any:
    """Without the entries of the frozen copy, which never has a gradient and is compared with nothing."""
    if not isinstance(values, dict):
        return values
    return {key: without_frozen_copy(value) for key, value in values.items() if not key.startswith("reg_E0.")}


def main() -> None:
    """Thins every pack given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("packs", nargs="+", type=Path)
    for folder in parser.parse_args().packs:
        target = Path(__file__).parent / "packs" / folder.name
        target.mkdir(parents=True, exist_ok=True)
        pack = json.loads((folder / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(pack) + "\n")
        thin_golden(folder, target)
        thin_weights(folder, target, pack)


if __name__ == "__main__":
    main()
