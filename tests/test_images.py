"""One door for images: every kind is read by one rule at every door, or refused in one line."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import doors
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from tqdm_seg.data.images import decode_rgb
from tqdm_seg.images_tqdm import apply_orientation, as_rgb

PIXELS = doors.colours()
FILES, ARRAYS = doors.files(PIXELS), doors.arrays(PIXELS)
FRACTIONS = PIXELS / np.float32(255)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def all_doors(tmp_path_factory) -> doors.Doors:
    return doors.Doors(tmp_path_factory.mktemp("doors"))


# -- the table ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_every_door_reads_a_file_alike(all_doors, name, tmp_path):
    expected = "refused" if FILES[name].meant is None else "equal"
    found = {door: all_doors.entry(FILES[name], door, tmp_path / name) for door in all_doors.of_files}
    assert found == dict.fromkeys(found, expected)


@pytest.mark.parametrize("name", ARRAYS)
def test_every_door_reads_an_array_alike(all_doors, name, tmp_path):
    expected = "refused" if ARRAYS[name].meant is None else "equal"
    found = {door: all_doors.entry(ARRAYS[name], door, tmp_path) for door in all_doors.of_arrays}
    assert found == dict.fromkeys(found, expected)


def test_the_ids_tell_images_apart(all_doors):
    ids = all_doors.ids(PIXELS)
    assert len(np.unique(ids)) > 1
    for other in (PIXELS[::-1], PIXELS[:, ::-1], PIXELS[..., ::-1], 255 - PIXELS, PIXELS // 2):
        assert not np.array_equal(all_doors.ids(other), ids)


@pytest.mark.slow
@settings(
    max_examples=10, deadline=None, phases=[Phase.generate], database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=st.data(), height=st.integers(16, 32), width=st.integers(16, 40), seed=st.integers(0, 2**16))
def test_one_image_has_the_same_ids_at_every_door(all_doors, tmp_path, data, height, width, seed):
    pixels = doors.colours(height, width, seed)
    files, arrays = doors.files(pixels), doors.arrays(pixels)
    name = data.draw(st.sampled_from([*files, *arrays]))
    kind, names = (files[name], all_doors.of_files) if name in files else (arrays[name], all_doors.of_arrays)
    found = {door: all_doors.entry(kind, door, tmp_path / name) for door in names}
    assert found == dict.fromkeys(names, "refused" if kind.meant is None else "equal")


# -- the rule -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FILES, *ARRAYS])
def test_an_image_is_what_was_meant_or_refused(name):
    kind = {**FILES, **ARRAYS}[name]
    source = kind.source[1] if isinstance(kind.source, tuple) else kind.source
    if kind.meant is None and name != "1x1":  # which only models refuse
        with pytest.raises(ValueError, match=r"^image 7 .{10,290}$"):
            as_rgb(source, "image 7")
    elif kind.meant is not None:
        found = as_rgb(source)
        assert found.dtype == np.uint8 and found.flags.c_contiguous and np.array_equal(found, kind.meant)


@pytest.mark.parametrize("name", FILES)
def test_the_fast_decoder_gives_the_same_pixels(name):
    if FILES[name].meant is not None:
        assert np.array_equal(decode_rgb(FILES[name].source[1]), FILES[name].meant)


def test_of_16_bits_the_high_byte_counts():
    values = np.array([[0, 255, 256, 511, 65535]], np.uint16)
    assert as_rgb(values)[..., 0].tolist() == [[0, 0, 1, 1, 255]]
    assert as_rgb(values.astype(">u2"))[..., 0].tolist() == [[0, 0, 1, 1, 255]]


@pytest.mark.parametrize("orientation", doors.STORED)
def test_orientations_turn_arrays_as_pillow_turns_images(orientation):
    stored = np.asarray(Image.fromarray(PIXELS).transpose(doors.STORED[orientation]))
    assert np.array_equal(apply_orientation(stored, orientation), PIXELS)


def test_where_the_bands_lie_is_known_even_for_tiny_images():
    for shape in [(1, 1, 3), (3, 5, 3), (1, 4, 3), (3, 3, 3)]:
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        tensor = torch.from_numpy(pixels).permute(2, 0, 1)
        assert np.array_equal(as_rgb(pixels), pixels) and np.array_equal(as_rgb(tensor), pixels)
        assert np.array_equal(as_rgb(tensor.numpy(), channels_first=True), pixels)


def test_a_url_is_read_as_its_file(tmp_path):
    (tmp_path / "image.png").write_bytes(FILES["EXIF 6 PNG"].source[1])
    (tmp_path / "text.png").write_bytes(b"text")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert np.array_equal(as_rgb(f"{address}/image.png"), PIXELS)
        for name in ("text.png", "missing.png"):
            with pytest.raises(ValueError, match=f"^{address}/{name} .{{10,200}}$"):
                as_rgb(f"{address}/{name}")
        server.shutdown()


# -- the image processor --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "named"),
    [
        ([], "images is empty"), ((), "images is empty"), (np.zeros((0, 3, 8, 8), np.uint8), "images is empty"),
        (None, "image 0 is of type NoneType"), ([None], "image 0 is of type NoneType"), (3, "image 0 is of type int"),
        ({"a": 1}, "image 0 is of type dict"), ([PIXELS, "nosuch.png"], "file not found: nosuch.png"),
        ("x" * 5000, "cannot be read"), ("", "file not found"), (".", "cannot be read"), ("a\0b", "cannot be read"),
        (b"", "image 0 cannot be decoded"), (PIXELS[0, 0], r"image 0 has the shape \(3,\)"),
        (np.zeros((1, 1, 2, 3, 8), np.uint8), "image 0 has the shape"), (PIXELS.tolist(), "image 0 is of type int"),
        (PIXELS.astype(object), "image 0 holds object"), (PIXELS.astype(complex), "image 0 holds complex128"),
        (torch.zeros(3, 9, 9), "image 0 holds float32.*do_rescale=False"), (Image.new("La", (9, 9)), "image 0 of mode"),
        (torch.zeros(3, 9, 9, dtype=torch.bfloat16), "image 0 holds float32"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_refused_in_one_line(all_doors, images, named):
    with pytest.raises((ValueError, OSError), match=named) as caught:
        all_doors.processor(images, return_tensors="pt")
    assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)


def test_fractions_are_taken_with_do_rescale_false(all_doors):
    ids = all_doors.ids(PIXELS)
    for image in (FRACTIONS, FRACTIONS.astype(np.float64), torch.from_numpy(FRACTIONS).permute(2, 0, 1)):
        assert np.array_equal(all_doors.ids(image, do_rescale=False), ids)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1.01, -0.01])
def test_fractions_beyond_0_and_1_are_refused(all_doors, value):
    image = FRACTIONS.copy()
    image[2, 3, 1] = value
    with pytest.raises(ValueError, match="image 0 holds values"):
        all_doors.processor(image, do_rescale=False)


def test_bytes_that_nothing_rescales_are_refused(all_doors):
    for image in (PIXELS, torch.from_numpy(PIXELS).permute(2, 0, 1)):
        with pytest.raises(ValueError, match="image 0 holds bytes.*do_rescale=False"):
            all_doors.processor(image, do_rescale=False)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_a_model_refuses_pixel_values_of_bytes(all_doors, dtype):
    pixel_values = torch.zeros(1, 3, 24, 40, dtype=dtype)
    for call in (all_doors.model, all_doors.model.segment, lambda x: all_doors.model.segment_labels(x, (24, 40))):
        with pytest.raises(ValueError, match="pixel_values must be .* torch"):
            call(pixel_values)
