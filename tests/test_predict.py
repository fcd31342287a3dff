"""`predict` writes what the model says, for every kind of input, and names what it could not read."""

import errno
import json
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import micro_model
from PIL import Image
from safetensors.torch import load_file, save_file

import tqdm_seg
from tqdm_seg.commands import start
from tqdm_seg.data.files import MARK
from tqdm_seg.data.palette import class_colours, legend, tint
from tqdm_seg.deploy import predict as predict_module
from tqdm_seg.deploy.folder import save_model_folder
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

CLASSES = {0: "road", 1: "traffic light", 2: "sky"}  # of the micro model
PHOTO = sorted(Path(__file__).parents[1].glob("examples/frames/validation/*/image_data/*"))[0]


@pytest.fixture(scope="module")
def model() -> TqdmForSemanticSegmentation:
    """Random weights whose masks are steep enough that no class wins everywhere."""
    model = micro_model(window_batch_size=16)
    with torch.no_grad():
        for layer in model.model.mask_decoder.mask_head[::2]:
            layer.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model_folder(model, TqdmImageProcessor(), folder)
    return str(folder)


@pytest.fixture
def photo(tmp_path) -> Path:
    """A real photograph, 60 x 44, so that six windows of 32 slide over it."""
    path = tmp_path / "in" / "photo.png"
    path.parent.mkdir()
    Image.open(PHOTO).convert("RGB").resize((60, 44)).save(path)
    return path


def scores(model: TqdmForSemanticSegmentation, image: Image.Image, **options) -> torch.Tensor:
    """(K, H, W) by the Python API."""
    inputs = TqdmImageProcessor()(images=image, return_tensors="pt", **options)
    return model.segment(inputs.pixel_values, size=(image.height, image.width))[0]


def run(*arguments: str | Path) -> tuple[int, Path]:
    """Exit status and result folder."""
    out = Path(arguments[1]).parent.parent / "out"
    return start("predict", [*map(str, arguments), "--out", str(out), "--device", "cpu"]), out


def refusal(capsys, *arguments: str | Path) -> str:
    """The line that a call prints which must be refused."""
    try:
        status = start("predict", list(map(str, arguments)))
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr().err
    assert status in (1, 2) and printed.startswith("error: ") and printed.count("\n") == 1, printed
    return printed


# ---- images


def test_ids_and_areas_are_the_argmax_of_segment(model, folder, photo):
    status, out = run(folder, photo)
    expected = scores(model, Image.open(photo)).argmax(0).numpy()
    assert status == 0 and len(np.unique(expected)) > 1
    with Image.open(out / "ids/photo.png") as ids:
        assert ids.mode == "L"
        np.testing.assert_array_equal(np.asarray(ids), expected)
    report = json.loads((out / "areas.json").read_text())
    entry = report["results"]["photo"]
    assert report["failed"] == {} and (entry["width"], entry["height"]) == (60, 44)
    assert {name: area["pixels"] for name, area in entry["areas"].items()} == {
        name: int((expected == index).sum()) for index, name in CLASSES.items()
    }
    assert sum(area["share"] for area in entry["areas"].values()) == pytest.approx(1, abs=1e-5)
    assert report["protocol"].items() >= {"window": 32, "stride": 20, "precision": "fp32", "device": "cpu"}.items()


def test_overlay_mixes_image_and_class_colours_half_and_half(folder, photo):
    _, out = run(folder, photo)
    image, ids = (np.asarray(Image.open(path)) for path in (photo, out / "ids/photo.png"))
    overlay = np.asarray(Image.open(out / "overlays/photo.png"))
    expected = (image / 2 + class_colours(3)[ids] / 2).astype(np.uint8)
    np.testing.assert_array_equal(overlay[:44, :60], expected)
    key = overlay[44:].reshape(-1, 3)
    for index, colour in enumerate(class_colours(3)):
        assert (key == colour).all(1).any() == (ids == index).any(), "the legend holds the classes that occur"


def test_options_change_the_prediction_as_they_do_in_python(model, folder, photo):
    image, found = Image.open(photo), {}
    options = {
        "whole": ["--window", "0"],
        "window": ["--window", "40", "--window-batch", "1"],
        "flip": ["--flip"],
        "size": ["--size", "50x80"],
    }
    for name, option in options.items():
        _, out = run(folder, photo, *option)
        found[name] = np.asarray(Image.open(out / "ids/photo.png"))
        protocol = json.loads((out / "areas.json").read_text())["protocol"]
        found[name + " protocol"] = [protocol[key] for key in ("mode", "window", "stride", "flip", "size")]
    plain = scores(model, image)
    mirrored = scores(model, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)).flip(-1)
    box = {"shortest_edge": 50, "longest_edge": 80}
    slide, own = "slide, where a side is longer than the window", "each image's own"
    expected = {"flip": (plain + mirrored) / 2, "size": scores(model, image, do_resize=True, size=box)}
    try:
        model.config.window_size, model.config.window_stride = 40, 26
        expected["window"] = scores(model, image)
        model.config.window_size = None
        expected["whole"] = scores(model, image)
    finally:
        model.config.window_size, model.config.window_stride = 32, 20
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value.argmax(0).numpy(), name)
        assert (found[name] != plain.argmax(0).numpy()).any(), f"{name} changes nothing, so this proves nothing"
    assert found["whole protocol"] == ["whole", None, None, False, own]
    assert found["window protocol"] == [slide, 40, 26, False, own]
    assert found["flip protocol"] == [slide, 32, 20, True, own]
    assert found["size protocol"] == [slide, 32, 20, False, box]


def test_chosen_classes_keep_their_ids_and_share_the_pixels_of_the_others(model, folder, photo):
    _, out = run(folder, photo, "--only", "traffic light, sky")
    expected = 1 + scores(model, Image.open(photo))[1:].argmax(0).numpy()
    np.testing.assert_array_equal(np.asarray(Image.open(out / "ids/photo.png")), expected)
    areas = json.loads((out / "areas.json").read_text())["results"]["photo"]["areas"]
    assert list(areas) == ["traffic light", "sky"] and sum(area["pixels"] for area in areas.values()) == 60 * 44


def test_photographs_are_turned_upright(folder, photo):
    image, exif = Image.open(photo), Image.Exif()
    exif[0x0112] = 6  # the camera was held a quarter turn off
    image.save(photo.with_name("turned.jpg"), exif=exif)
    _, out = run(folder, photo.with_name("turned.jpg"))
    assert Image.open(out / "ids/turned.png").size == (44, 60)


def test_folders_are_searched_with_their_subfolders_but_not_the_results(folder, photo):
    image = Image.open(photo)
    (photo.parent / "a" / "b").mkdir(parents=True)
    image.save(photo.parent / "a" / "b" / "photo.JPG", "jpeg")
    (photo.parent / "a" / "notes.txt").write_text("no image")
    out = photo.parent / "results"
    for _ in range(2):  # the second time the results are there
        assert start("predict", [folder, str(photo.parent), "--out", str(out)]) == 0
    written_files = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}
    names = ("photo", "a/b/photo")
    assert written_files == {
        "areas.json",
        MARK,
        *(f"{kind}/{name}.png" for kind in ("ids", "overlays") for name in names),
    }


def test_half_precision_runs(folder, photo):
    status, out = run(folder, photo, "--precision", "bf16")
    assert status == 0 and json.loads((out / "areas.json").read_text())["protocol"]["precision"] == "bf16"


# ---- what goes wrong


def test_unreadable_images_are_named_and_the_others_done(folder, photo, capsys):
    inside = photo.parent
    (inside / "cut.png").write_bytes(photo.read_bytes()[:2000])
    (inside / "text.jpg").write_text("no image")
    Image.fromarray(np.full((40, 40), 0.5, np.float32)).save(inside / "deep.tif")
    Image.new("RGB", (5, 7)).save(inside / "small.png")
    status, out = run(folder, photo, inside / "cut.png", inside / "text.jpg", inside / "deep.tif", inside / "small.png")
    assert status == 1
    printed = capsys.readouterr().err
    assert "4 of 5 inputs failed" in printed
    report = json.loads((out / "areas.json").read_text())
    assert list(report["results"]) == ["photo"]
    assert set(report["failed"]) == {str(inside / name) for name in ("cut.png", "text.jpg", "deep.tif", "small.png")}
    assert str(inside / "cut.png") in printed and str(out / "areas.json") in printed
    assert {file.name for file in out.rglob("*") if file.is_file()} == {"photo.png", "areas.json", MARK}


def test_nothing_is_written_where_no_image_can_be_read(folder, photo, capsys):
    (photo.parent / "text.jpg").write_text("no image")
    status, out = run(folder, photo.parent / "text.jpg")
    assert status == 1 and "text.jpg" in capsys.readouterr().err.splitlines()[-1] and not out.exists()


def test_a_stopped_run_goes_on(folder, photo, monkeypatch, capsys):
    photos = [photo, *(Path(shutil.copy(photo, photo.with_name(f"{name}.png"))) for name in "ab")]
    whole = predict_module.predict_image

    def stop_at_b(predictor, path, out, name):
        if name == "b":
            raise KeyboardInterrupt
        return whole(predictor, path, out, name)

    monkeypatch.setattr(predict_module, "predict_image", stop_at_b)
    status, out = run(folder, *photos)
    assert status == 130 and list(json.loads((out / "areas.json").read_text())["results"]) == ["photo", "a"]
    done = []
    monkeypatch.setattr(predict_module, "predict_image", lambda *of: done.append(of[3]) or whole(*of))
    photos[1].write_bytes(photos[1].read_bytes())  # another time of change
    (out / "overlays/photo.png").unlink()
    for options, expected in (([], ["photo", "a", "b"]), ([], []), (["--flip"], ["photo", "a", "b"])):
        done.clear()
        assert run(folder, *photos, *options)[0] == 0 and done == expected


def test_a_full_disk_names_the_file_and_the_same_command_goes_on(folder, photo, monkeypatch, capsys):
    whole = Image.Image.save

    def full(image, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert run(folder, photo)[0] == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and ".png" in error and "space" in error
    monkeypatch.setattr(Image.Image, "save", whole)
    status, out = run(folder, photo)
    assert status == 0 and (out / "ids" / "photo.png").is_file()
    assert not [path for path in out.rglob("*") if ".tmp" in path.name]


def test_more_classes_than_a_byte_holds_are_refused(photo, tmp_path, capsys):
    names = {index: f"thing {index}" for index in range(257)}
    save_model_folder(micro_model(id2label=names, ignore_index=-100), TqdmImageProcessor(), tmp_path / "many")
    assert "256" in refusal(capsys, tmp_path / "many", photo, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_are_read_through_links_and_without_what_systems_leave(folder, photo, tmp_path):
    (tmp_path / "far").mkdir()
    shutil.copy(photo, tmp_path / "far" / "b.png")
    (photo.parent / "more").symlink_to(tmp_path / "far")
    for name in ("._photo.png", ".ipynb_checkpoints/photo.png"):
        (photo.parent / name).parent.mkdir(exist_ok=True)
        (photo.parent / name).write_bytes(b"no image")
    status = start("predict", [folder, str(photo.parent), "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert status == 0
    assert list(json.loads((tmp_path / "out/areas.json").read_text())["results"]) == ["more/b", "photo"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: [folder / "none.png"], "file not found: "),
        (lambda folder: [folder], "holds no file ending in .bmp"),
        (lambda folder: [folder / "x.png", folder / "x.jpg"], "would both become x.png"),
    ],
)
def test_wrong_inputs_are_refused_before_the_model_is_loaded(make, message, tmp_path, capsys):
    inputs = make(tmp_path)
    for path in inputs[:2] if len(inputs) == 2 else []:
        path.touch()
    assert message in refusal(capsys, "no/such/model", *inputs, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "road,moose"], "no class 'moose', only road, traffic light, sky"),
        (["--only", "road"], "--only road"),
        (["--window", "20", "--stride", "30"], "would leave gaps between windows of 20"),
        (["--window", "0", "--stride", "30"], "--stride is for sliding windows"),
        (["--window", "-5"], "window"),
        (["--window-batch", "0"], "must be at least 1"),
        (["--size", "0x9"], "--size: '0x9'"),
        (["--precision", "float32"], "--precision"),
        (["--backend", "onnxruntime", "--precision", "bf16"], "--precision"),
    ],
)
def test_impossible_options_are_refused(options, message, folder, photo, capsys):
    assert message in refusal(capsys, folder, photo, "--out", photo.parent / "out", *options)
    assert not (photo.parent / "out").exists()


BLOCKED = ["accelerate", "cv2", "datasets", "evaluate", "open_clip", "peft", "pyarrow", "torchao"]
PREDICT_WITHOUT = f"""
import sys
sys.modules.update(dict.fromkeys({BLOCKED!r}))  # an import of them raises ImportError
from tqdm_seg.cli import main
sys.exit(main(["predict", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_predicting_needs_torch_transformers_and_pillow_only(folder, photo, tmp_path):
    command = [sys.executable, "-c", PREDICT_WITHOUT, folder, photo, "--out", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out/ids/photo.png").is_file()


def test_the_function_takes_texts_and_returns_the_areas(folder, photo, tmp_path):
    results = tqdm_seg.predict(model=folder, inputs=str(photo), out=str(tmp_path / "out"), only=["road", "sky"])
    assert list(results) == ["photo"] and list(results["photo"]["areas"]) == ["road", "sky"]
    with pytest.raises(ValueError, match="fp64"):
        tqdm_seg.predict(model=folder, inputs=[photo], out=tmp_path, precision="fp64")


def test_code_in_a_model_folder_is_not_run(folder, photo, tmp_path):
    planted = tmp_path / "planted"
    shutil.copytree(folder, planted)
    for path in planted.glob("*_tqdm.py"):
        path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + path.read_text())
    status, _ = run(str(planted), photo)
    assert status == 0 and not (tmp_path / "ran").exists()


def lose(path: Path, state: dict[str, torch.Tensor]) -> None:
    state.pop("model.mask_decoder.class_head.bias")


def add(path: Path, state: dict[str, torch.Tensor]) -> None:
    state["adapter.weight"] = torch.zeros(2)


def reshape(path: Path, state: dict[str, torch.Tensor]) -> None:
    state["model.mask_decoder.class_head.bias"] = torch.zeros(9)


@pytest.mark.parametrize("change", [lose, add, reshape])
def test_weights_that_do_not_fit_are_refused_by_name(change, folder, photo, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    state = load_file(path)
    change(path, state)
    save_file(state, path, {"format": "pt"})
    name = "adapter.weight" if change is add else "model.mask_decoder.class_head.bias"
    printed = refusal(capsys, tmp_path / "model", photo, "--out", tmp_path / "out")
    assert str(tmp_path / "model") in printed and name in printed


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("cut", [True, False], ids=["cut", "missing"])
def test_damaged_and_missing_files_of_a_model_are_named(name, cut, folder, photo, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / name
    path.write_bytes(path.read_bytes()[:-5]) if cut else path.unlink()
    assert str(path) in refusal(capsys, tmp_path / "model", photo, "--out", tmp_path / "out")


def test_models_of_other_types_are_named(photo, tmp_path, capsys):
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text('{"model_type": "clip"}')
    printed = refusal(capsys, tmp_path, photo, "--out", tmp_path / "out")
    assert str(tmp_path / "config.json") in printed and "clip" in printed


# ---- videos


def make_video(path: Path, pictures: list[Image.Image], times: list[int]) -> None:
    """An MP4 of the pictures at `times`, in fifteenths of a second."""
    import av

    with av.open(str(path), "w") as video:
        stream = video.add_stream("libx264", 15, width=pictures[0].width, height=pictures[0].height, pix_fmt="yuv420p")
        stream.options = {"crf": "0"}
        for picture, time in zip(pictures, times, strict=True):
            frame = av.VideoFrame.from_image(picture)
            frame.pts, frame.time_base = time, Fraction(1, 15)
            video.mux(stream.encode(frame))
        video.mux(stream.encode())


def frames_of(path: Path) -> list[tuple[float, np.ndarray]]:
    """Time and RGB pixels of every frame."""
    import av

    with av.open(str(path)) as video:
        return [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in video.decode(video=0)]


def test_video_becomes_an_overlay_video_with_the_same_times_and_areas_per_frame(model, folder, photo):
    pytest.importorskip("av")
    image = Image.open(photo)
    pictures = [image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), Image.new("RGB", image.size, "green")]
    make_video(photo.with_name("drive.mp4"), pictures, [0, 1, 4])  # the second stays longer
    status, out = run(folder, photo.with_name("drive.mp4"))
    assert status == 0
    entry = json.loads((out / "areas.json").read_text())["results"]["drive"]
    source, result = frames_of(photo.with_name("drive.mp4")), frames_of(out / "overlays/drive.mp4")
    assert [time for time, _ in result] == pytest.approx([0, 1 / 15, 4 / 15], abs=1e-3)
    assert [frame["seconds"] for frame in entry["frames"]] == pytest.approx([0, 1 / 15, 4 / 15], abs=1e-3)
    overlays = []
    for (_, pixels), frame in zip(source, entry["frames"], strict=True):
        ids = scores(model, Image.fromarray(pixels)).argmax(0).numpy()
        assert [area["pixels"] for area in frame["areas"].values()] == np.bincount(ids.ravel(), minlength=3).tolist()
        overlays.append(np.asarray(tint(Image.fromarray(pixels), ids, 3)).astype(float))
    # Compression takes fine colours away, but leaves every frame nearest to its own overlay.
    distance = [[np.abs(drawn[:44, :60] - overlay).mean() for overlay in overlays] for _, drawn in result]
    assert np.argmin(distance, 1).tolist() == [0, 1, 2] and np.diag(distance).max() < 20, distance


def test_video_of_a_phone_held_upright_is_turned(folder, photo):
    pytest.importorskip("av")
    path = photo.with_name("phone.mp4")
    picture = Image.new("RGB", (64, 48), "red")
    picture.paste("blue", (32, 0, 64, 48))
    make_video(path, [picture], [0])
    one, unity = (1 << 16).to_bytes(4, "big"), (1 << 30).to_bytes(4, "big")
    straight = one + bytes(12) + one + bytes(12) + unity
    turned = bytes(4) + one + bytes(4) + (-(1 << 16)).to_bytes(4, "big", signed=True) + bytes(16) + unity
    head, track, rest = path.read_bytes().partition(b"tkhd")
    assert straight in rest
    # What the player has to do: a quarter turn clockwise.
    path.write_bytes(head + track + rest.replace(straight, turned, 1))
    _, out = run(folder, path)
    entry = json.loads((out / "areas.json").read_text())["results"]["phone"]
    assert (entry["width"], entry["height"]) == (48, 64)
    drawn = frames_of(out / "overlays/phone.mp4")[0][1].astype(int)
    top, bottom = drawn[:32, :48].mean((0, 1)), drawn[32:64, :48].mean((0, 1))
    assert top[0] > bottom[0] + 50 and bottom[2] > top[2] + 50, "red above blue"


def test_unreadable_videos_are_named_and_leave_nothing(folder, photo, capsys):
    pytest.importorskip("av")
    make_video(photo.with_name("whole.mp4"), [Image.open(photo)] * 3, [0, 1, 2])
    data = photo.with_name("whole.mp4").read_bytes()
    photo.with_name("cut.mp4").write_bytes(data[: len(data) // 2])
    photo.with_name("text.avi").write_text("no video")
    status, out = run(folder, photo.with_name("cut.mp4"), photo.with_name("text.avi"), photo)
    printed = capsys.readouterr().err
    assert status == 1 and "2 of 3 inputs failed" in printed
    assert "cut.mp4" in printed
    failed = json.loads((out / "areas.json").read_text())["failed"]
    assert set(failed) == {str(photo.with_name(name)) for name in ("cut.mp4", "text.avi")}
    assert {file.name for file in out.rglob("*") if file.is_file()} == {"photo.png", "areas.json", MARK}


def test_without_pyav_a_video_is_refused_with_the_fix(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "drive.mp4").touch()
    assert 'pip install "av>=15"' in refusal(capsys, "no/such/model", tmp_path / "drive.mp4", "--out", tmp_path / "out")


# ---- colours and legend


def test_colours_differ_and_do_not_depend_on_the_number_of_classes():
    colours = class_colours(40).astype(int)
    np.testing.assert_array_equal(class_colours(19), colours[:19])
    distance = np.abs(colours[:, None] - colours).sum(-1) + 1000 * np.eye(40, dtype=int)
    assert distance[:19, :19].min() > 70 and distance.min() > 30


def test_legend_keeps_to_the_width_and_shows_every_class():
    names = {index: f"class number {index}" for index in range(19)}
    key = legend(names, 400)
    assert key.width == 400 and key.height > legend({0: "road"}, 400).height
    pixels = np.asarray(key).reshape(-1, 3)
    assert all((pixels == colour).all(1).sum() > 100 for colour in class_colours(19))
    assert legend({0: "a name that is longer than the strip is wide"}, 50).width > 200


def test_unknown_ids_stay_bare():
    image = Image.new("RGB", (2, 1), (100, 100, 100))
    assert np.asarray(tint(image, np.array([[255, 0]]), 3))[0].tolist() == [[100, 100, 100], [156, 97, 50]]
