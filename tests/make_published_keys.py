"""Made tests/published_keys.json: python tests/make_published_keys.py PATH/TO/reference/original_keys_*.json

Names and shapes of every tensor of the two published architectures; blocks that differ only in number share a line, so
"blocks.{24}.norm1.weight" stands for blocks 0 to 23.
"""

import argparse
import json
import re
from pathlib import Path

PUBLISHED_KEYS = Path(__file__).parent / "published_keys.json"
_BLOCK = re.compile(r"(blocks|encoder\.layers|transformer_decoder\.layers|context_decoder\.decoder)\.(\d+)\.")


def published_shapes(preset: str) -> dict[str, list[int]]:
    """Shape by name of every tensor in a published checkpoint of that preset."""
    shapes = {}
    for line, shape in json.loads(PUBLISHED_KEYS.read_text())[preset].items():
        count = re.search(r"\{(\d+)\}", line)
        for i in range(int(count[1]) if count else 1):
            shapes[re.sub(r"\{\d+\}", str(i), line)] = shape
    return shapes


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
    sections = []
    for preset, path in zip(("clip_vit_b16", "eva02_clip_l14"), sorted(parser.parse_args().manifests), strict=True):
        folded = fold({entry["name"]: entry["shape"] for entry in json.loads(path.read_text())["entries"]})
        lines = (f"  {json.dumps(line)}: {json.dumps(shape)}" for line, shape in folded.items())
        sections.append(f'"{preset}": {{\n' + ",\n".join(lines) + "\n}")
    PUBLISHED_KEYS.write_text("{\n" + ",\n".join(sections) + "\n}\n")


if __name__ == "__main__":
    main()
