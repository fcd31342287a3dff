"""Made published_keys.json and published_rates.json: python tests/make_published_keys.py PATH/original_keys_*.json

Names and shapes of every tensor of the two published architectures, and learning rate and weight decay of every one
that is trained (at 1e-5 and 1e-4). Blocks that differ only in number share a line, so "blocks.{24}.norm1.weight" stands
for blocks 0 to 23.
"""

import argparse
import json
import re
from pathlib import Path

PUBLISHED_KEYS = Path(__file__).parent / "published_keys.json"
PUBLISHED_RATES = Path(__file__).parent / "published_rates.json"
_BLOCK = re.compile(r"(blocks|encoder\.layers|transformer_decoder\.layers|context_decoder\.decoder)\.(\d+)\.")


def published_shapes(preset: str) -> dict[str, list[int]]:
    """Shape by name of every tensor in a published checkpoint of that preset."""
    return unfold(json.loads(PUBLISHED_KEYS.read_text())[preset])


def published_rates(preset: str) -> dict[str, list[float]]:
    """Learning rate and weight decay by name of every parameter that the published recipe trains."""
    return unfold(json.loads(PUBLISHED_RATES.read_text())[preset])


def unfold(lines: dict[str, list]) -> dict[str, list]:
    """A value for every block of every line."""
    values = {}
    for line, value in lines.items():
        count = re.search(r"\{(\d+)\}", line)
        for i in range(int(count[1]) if count else 1):
            values[re.sub(r"\{\d+\}", str(i), line)] = value
    return values


def fold(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """The inverse: one line for all blocks that have a tensor of that name and shape."""
    blocks: dict[str, list[tuple[int, list[int]]]] = {}
    for name, shape in shapes.items():
        number = _BLOCK.search(name)
        line = _BLOCK.sub(r"\1.{}.", name, count=1)
        blocks.setdefault(line, []).append((int(number[2]) if number else 0, shape))
    folded = {}
    for line, members in blocks.items():
        numbers, all_shapes = zip(*sorted(members), strict=True)
        if numbers != tuple(range(len(members))) or any(shape != all_shapes[0] for shape in all_shapes):
            raise ValueError(f"{line}: blocks {numbers} of shapes {all_shapes} do not fold into one line")
        folded[line.replace("{}", f"{{{len(members)}}}")] = all_shapes[0]
    return folded


def main() -> None:
    """Writes the file, one line per kind of tensor."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("manifests", nargs=2, type=Path, help="key lists of the CLIP ViT-B and the EVA02-L model")
    shapes, rates = [], []
    for preset, path in zip(("clip_vit_b16", "eva02_clip_l14"), sorted(parser.parse_args().manifests), strict=True):
        entries = json.loads(path.read_text())["entries"]
        # The frozen copy never gets a gradient, so what the optimiser would do with it does not matter.
        trained = [e for e in entries if e["kind"] == "param" and e["requires_grad"] and e["name"][:7] != "reg_E0."]
        shapes.append(section(preset, {e["name"]: e["shape"] for e in entries}))
        rates.append(section(preset, {e["name"]: [e["lr"], e["weight_decay"]] for e in trained}))
    for file, sections in ((PUBLISHED_KEYS, shapes), (PUBLISHED_RATES, rates)):
        file.write_text("{\n" + ",\n".join(sections) + "\n}\n")


def section(preset: str, values: dict[str, list]) -> str:
    """The part of a file that is one architecture's."""
    lines = (f"  {json.dumps(line)}: {json.dumps(value)}" for line, value in fold(values).items())
    return f'"{preset}": {{\n' + ",\n".join(lines) + "\n}"


if __name__ == "__main__":
    main()
