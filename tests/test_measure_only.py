"""No frame of a set that is only measured on lies in the repository: by perceptual hashes, in any file."""

import base64
import io
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from shard_helpers import photo

from tqdm_seg.data.audit import image_hash, nearest_hashes

ROOT = Path(__file__).parents[1]
BITS = 6  # re-encoded images differ in 0 to 4 bits of 64; what the repository has differs in 12 or more
_EMBEDDED = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|data:image/[a-z+]+;base64,([A-Za-z0-9+/=]+)")


def known_hashes() -> np.ndarray:
    """Hashes (n, 64) bool of the frames that may not be here."""
    text = (ROOT / "tests" / "measure_only_hashes.txt").read_text()
    numbers = [bytes.fromhex(line) for line in text.splitlines() if not line.startswith("#")]
    return np.unpackbits(np.frombuffer(b"".join(numbers), np.uint8)).reshape(-1, 64).astype(bool)


def images_in(content: bytes) -> Iterator[Image.Image]:
    """Every image in a file: itself, in Parquet and archives, in the data URIs of pages."""
    for match in _EMBEDDED.finditer(content):
        try:
            data = base64.b64decode(match[1]) if match[1] else content[match.start() :]
            with Image.open(io.BytesIO(data)) as image:
                image.thumbnail((640, 640), Image.Resampling.BOX)  # faster, and the hash is of a smaller grid
                yield image.convert("RGB")
        except (OSError, ValueError, SyntaxError):
            continue  # bytes that only begin like an image


def hashes_of(image: Image.Image) -> Iterator[np.ndarray]:
    """Hashes of an image and, as figures show frames next to each other, of its parts by rows and columns."""
    grids = [(rows, columns) for rows in range(1, 4) for columns in range(1, 5)] if image.width > 300 else [(1, 1)]
    for rows, columns in grids:
        width, height = image.width / columns, image.height / rows
        for row in range(rows):
            for column in range(columns):
                box = (column * width, row * height, (column + 1) * width, (row + 1) * height)
                content = io.BytesIO()
                image.crop(tuple(map(round, box))).save(content, "BMP")
                found = image_hash(content.getvalue())
                if found is not None:
                    yield found


def test_no_frame_that_is_only_measured_on_is_in_the_repository():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    paths = [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    names, found = [], []
    for path in paths:
        if path.suffix == ".safetensors":  # numbers
            continue
        for image in images_in(path.read_bytes()):
            for bits in hashes_of(image):
                names.append(path)
                found.append(bits)
    assert len(found) > 200  # the examples, the frames inside their shards among them
    near = nearest_hashes(known_hashes(), np.stack(found), BITS)
    assert [names[j] for _, j, _ in near] == []


def test_such_a_frame_would_be_found_whole_in_a_page_and_in_a_figure(tmp_path):
    path = photo(tmp_path / "frame.png", 40, 60)
    known = image_hash(path.read_bytes())[None]
    page = b"<img src='data:image/png;base64," + base64.b64encode(path.read_bytes()) + b"'>"
    figure = Image.new("RGB", (360, 160), "white")
    figure.paste(Image.open(path).resize((120, 80)), (120, 80))
    figure.save(tmp_path / "figure.png")
    for content in (path.read_bytes(), page, (tmp_path / "figure.png").read_bytes()):
        bits = [bits for image in images_in(content) for bits in hashes_of(image)]
        assert nearest_hashes(known, np.stack(bits), BITS)
