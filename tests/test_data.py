"""Which frame is trained on when, and that workers, processes and interruptions change nothing about it."""

import functools
import http.server
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset
from PIL import Image as PILImage
from shard_helpers import contents, orfd, photo, prepare, save

from tqdm_seg.data.frames import FrameDataset, PlainRows, frame_loader
from tqdm_seg.data.images import decode_rgb, decode_unchanged, read_rgb
from tqdm_seg.data.shards import read_index
from tqdm_seg.loss_tqdm import supervised_masks
from tqdm_seg.training.augment import TrainTransform
from tqdm_seg.training.batches import (
    PlainSamples,
    RareClassSampling,
    TrainPlan,
    TrainSamples,
    collate,
    model_inputs,
    plain_batches,
    planned_batches,
    train_loader,
)

EXAMPLE = Path(__file__).parents[1] / "examples" / "orfd_mini"
CLASSES = ("non-traversable", "traversable")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A prepared dataset of 11 frames of 40x40, of which the last three are held back, in two shards and one."""
    root, out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("prepared") / "out"
    orfd(root, 8, size=40)
    orfd(root, 3, scene="y0613_1304", split="validation", size=40)
    prepare("orfd", root, out, "--rows-per-shard", 5)
    return out


@pytest.fixture
def samples(folder) -> TrainSamples:
    return TrainSamples(FrameDataset(str(folder), "train"), TrainTransform(crop=32, min_class_pixels=10))


def plan_of(frames: FrameDataset, seed: int = 0) -> TrainPlan:
    return TrainPlan(frames.index.class_pixels, seed, RareClassSampling(min_pixels=20), frames.classes)


def same(one: dict, other: dict) -> bool:
    names = ("image", "labels", "size", "mask_index")
    return one["key"] == other["key"] and all(torch.equal(one[name], other[name]) for name in names if name in one)


# -- frames ---------------------------------------------------------------------------------------------


def test_frames_are_decoded_at_their_own_size_with_key_and_scene(folder):
    frames = FrameDataset(str(folder), "validation")
    assert frames.classes == list(CLASSES) and frames.label_map["name"] == "orfd/merged"
    rows = list(load_dataset(str(folder), split="validation", streaming=True))
    assert len(frames) == len(rows) == 3
    for frame, row in zip((frames[i] for i in range(3)), rows, strict=True):
        assert (frame.key, frame.scene) == (row["key"], "y0613_1304")
        assert np.array_equal(frame.image, np.asarray(row["image"]))
        assert np.array_equal(frame.labels, np.asarray(row["label"])) and frame.labels.dtype == np.uint8


def test_the_example_is_one_drive_in_two_parts():
    for split, count in (("train", 56), ("validation", 24)):
        frames = FrameDataset(str(EXAMPLE), split)
        assert len(frames) == count and set(frames.scenes) == {"x2021_0223_1756"}
        for i in range(count):
            assert frames[i].image.shape == (224, 224, 3) and set(np.unique(frames[i].labels)) == {0, 1}


def test_both_decoders_agree_on_every_kind_of_picture(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    exif = PILImage.Exif()
    exif[0x0112] = 6
    exif[0x0131] = "a camera"
    files = {
        "rgb.png": {}, "quality.jpg": {"quality": 60}, "turned.jpg": {"exif": exif}, "turned.png": {"exif": exif}
    }  # fmt: skip
    for name, options in files.items():
        content = save(tmp_path / name, colours, **options).read_bytes()
        one, other = decode_rgb(content), read_rgb(content)
        assert one.shape == ((16, 8, 3) if "turned" in name else (8, 16, 3))
        assert np.array_equal(one, other), name
    assert np.array_equal(decode_rgb((tmp_path / "rgb.png").read_bytes()), colours)
    grey = save(tmp_path / "grey.png", colours[..., 0]).read_bytes()
    assert np.array_equal(decode_unchanged(grey), colours[..., 0])
    assert np.array_equal(read_rgb(grey), colours[..., :1].repeat(3, -1))
    with pytest.raises(ValueError, match="cannot be decoded"):
        read_rgb(grey[: len(grey) // 2])


@pytest.mark.slow
def test_evaluation_frames_are_divided_without_loss_or_repeat(folder):
    frames = FrameDataset(str(folder), "train")
    for processes in (1, 2, 3, 5):
        for workers in (0, 2):
            parts = [[f.key for f in frame_loader(frames, workers, p, processes)] for p in range(processes)]
            assert all(part == frames.keys[p::processes] for p, part in enumerate(parts))


# -- plan -----------------------------------------------------------------------------------------------


def test_a_sample_depends_on_seed_and_number_alone():
    class_pixels = np.random.default_rng(0).integers(0, 9000, (50, 4))
    for sampling in (RareClassSampling(), None):
        plan, again, other = (TrainPlan(class_pixels, seed, sampling) for seed in (3, 3, 4))
        whole = plan.draws(0, 1000)
        assert all(again.draws(n, n + 1)[0] == whole[n] for n in range(950, 1000))
        assert np.array_equal(again.draws(123, 456), whole[123:456])
        assert not np.intersect1d(whole["seed"], other.draws(0, 1000)["seed"]).size
        assert len(np.unique(whole["seed"])) == 1000


def test_classes_are_drawn_by_the_softmax_of_their_rarity_and_frames_evenly():
    class_pixels = np.array([[9000, 4000, 0], [9000, 3001, 0], [9000, 3000, 0], [9000, 0, 0]])
    for temperature in (100, 0.2):
        sampling = RareClassSampling(temperature)
        share = class_pixels.sum(0) / class_pixels.sum()
        formula = np.exp((1 - share[:2]) / temperature) / np.exp((1 - share[:2]) / temperature).sum()
        assert sampling.probabilities(class_pixels) == pytest.approx([*formula, 0])
        draws = TrainPlan(class_pixels, 0, sampling).draws(0, 20000)
        rare, common = (draws["frame"][draws["wanted"] == wanted] for wanted in (1, 0))
        assert len(rare) / 20000 == pytest.approx(formula[1], abs=0.012) and len(rare) + len(common) == 20000
        # More than 3,000 pixels, not 3,000.
        assert np.bincount(rare, minlength=4) / len(rare) == pytest.approx([0.5, 0.5, 0, 0], abs=0.02)
        assert np.bincount(common) / len(common) == pytest.approx([0.25] * 4, abs=0.02)


def test_published_temperature_is_all_but_uniform_and_daformers_is_not():
    share = np.array([[0.37, 0.3, 0.2, 0.1, 0.02, 0.005, 0.004, 0.001]])
    published, daformer = (RareClassSampling(t).probabilities(share * 1e6) for t in (100, 0.01))
    assert published.max() / published.min() < 1.004
    assert daformer[-1] > 0.3 and daformer[0] < 1e-10


def test_a_permutation_shows_every_frame_once_an_epoch_in_ever_other_order():
    plan = TrainPlan(np.ones((7, 2)), 0, None)
    epochs = [plan.draws(7 * i, 7 * i + 7)["frame"].tolist() for i in range(5)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len(set(map(tuple, epochs))) == 5


def test_a_class_without_a_frame_to_draw_is_named_with_the_way_out():
    with pytest.raises(ValueError, match=r"more than 3000 pixels of mud.*--min-pixels 39"):
        TrainPlan(np.array([[9000, 40]]), 0, RareClassSampling(), ["road", "mud"])
    with pytest.raises(ValueError, match="no pixel of the training frames is labelled"):
        TrainPlan(np.zeros((3, 2)), 0, RareClassSampling())
    TrainPlan(np.array([[9000, 0]]), 0, RareClassSampling())  # a class that never occurs is no error


def test_40000_steps_are_planned_in_two_seconds():
    class_pixels = np.random.default_rng(0).integers(0, 50000, (12388, 19))
    start = time.process_time()
    plan = TrainPlan(class_pixels, 0, RareClassSampling())
    count = sum(len(batch) for batch in planned_batches(plan, 0, 40000, 16))
    assert time.process_time() - start < 2 and count == 640000


def test_a_step_has_the_same_samples_however_it_is_divided():
    plan = TrainPlan(np.full((9, 2), 9000), 0, RareClassSampling())
    whole = list(planned_batches(plan, 3, 5, 8))
    assert np.array_equal(np.concatenate(whole), plan.draws(24, 40))
    divided = [list(planned_batches(plan, 3, 5, 2, parts=2, process=p, processes=2)) for p in (0, 1)]
    assert all(len(batches) == 4 for batches in divided)
    for step in (0, 1):
        parts = np.concatenate([batch for batches in divided for batch in batches[2 * step : 2 * step + 2]])
        assert np.array_equal(np.sort(parts), np.sort(whole[step]))


def test_blocks_of_the_plan_leave_no_seam(monkeypatch):
    plan = TrainPlan(np.full((9, 2), 9000), 0, RareClassSampling())
    whole = np.stack(list(planned_batches(plan, 0, 50, 4)))
    monkeypatch.setattr("tqdm_seg.training.batches.PLAN_BLOCK", 10)
    assert np.array_equal(np.stack(list(planned_batches(plan, 0, 50, 4))), whole)


# -- batches --------------------------------------------------------------------------------------------


def test_batches_are_the_same_with_any_number_of_workers_and_from_the_middle(samples):
    plan = plan_of(samples.frames)

    def batches(workers: int, first: int = 0) -> list[dict]:
        return list(train_loader(samples, planned_batches(plan, first, 4, 2), 2, workers))

    alone = batches(0)
    for other in (batches(1), batches(2)):
        assert len(other) == 4 and all(map(same, alone, other))
    assert len(batches(2, 2)) == 2 and all(map(same, alone[2:], batches(2, 2)))


def test_two_processes_make_the_batch_of_one(samples):
    plan = plan_of(samples.frames)
    whole = next(iter(train_loader(samples, planned_batches(plan, 5, 6, 4), 2, 0)))
    halves = [
        next(iter(train_loader(samples, planned_batches(plan, 5, 6, 2, process=p, processes=2), 2, 0))) for p in (0, 1)
    ]
    assert whole["key"] == halves[0]["key"] + halves[1]["key"]
    assert torch.equal(whole["image"], torch.cat([half["image"] for half in halves]))


def test_samples_of_other_seeds_and_numbers_differ(samples):
    plan = plan_of(samples.frames)
    images = [samples[draw]["image"] for draw in (*plan.draws(0, 3), *plan_of(samples.frames, 1).draws(0, 3))]
    assert not any(torch.equal(images[i], images[j]) for i in range(6) for j in range(i))


def test_a_frame_drawn_for_a_class_is_cropped_for_it(samples):
    frames = samples.frames
    transform = TrainTransform(crop=8, scale=(2, 2), max_class_share=2, min_class_pixels=60)
    draws = plan_of(frames).draws(0, 80)
    draws = draws[draws["wanted"] == 1]
    free = draws.copy()
    free["wanted"] = -1
    found, free = (
        np.mean([int((TrainSamples(frames, transform)[draw]["labels"] == 1).sum()) > 60 for draw in chosen])
        for chosen in (draws, free)
    )
    assert len(draws) > 20 and found > 0.8 > 0.6 > free


def test_collate_keeps_key_and_scene_and_lists_the_masks(samples):
    parts = [samples[draw] for draw in plan_of(samples.frames).draws(0, 4)]
    batch = collate(parts, num_classes=2)
    assert batch["scene"] == ["y0613_1242"] * 4 and batch["key"] == [part["key"] for part in parts]
    inputs = model_inputs(batch, torch.device("cpu"))
    assert inputs["pixel_values"].shape == (4, 3, 32, 32) and inputs["labels"].shape == (4, 32, 32)
    assert (inputs["pixel_values"].dtype, inputs["labels"].dtype) == (torch.float32, torch.int64)
    assert torch.equal(inputs["mask_index"], supervised_masks(inputs["labels"], 2, 255))


# -- remote ---------------------------------------------------------------------------------------------


class Ranges(http.server.SimpleHTTPRequestHandler):
    """A file server that answers range requests, as object storage does, and notes them."""

    asked: list[tuple[str, str]] = []

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        content, wanted = path.read_bytes(), self.headers.get("Range", "")
        part = content
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            part = content[int(first) : int(last) + 1]
            self.asked.append((path.name, wanted))
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if body:
            self.wfile.write(part)


@pytest.fixture
def url(folder):
    """The prepared folder behind HTTP on loopback."""
    Ranges.asked = []
    handler = functools.partial(Ranges, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_shards_give_the_same_batches_by_range_requests(folder, samples, url, workers):
    remote = TrainSamples(FrameDataset(url, "train"), samples.transform)
    plan = plan_of(remote.frames)
    here = list(train_loader(samples, planned_batches(plan, 0, 3, 2), 2, 0))
    there = list(train_loader(remote, planned_batches(plan, 0, 3, 2), 2, workers))
    assert len(there) == 3 and all(map(same, here, there))
    assert Ranges.asked and all(name.startswith("train-") for name, _ in Ranges.asked)
    table = read_index(folder, "train").table.to_pylist()
    ranges = {
        f"bytes={row[f'{what}_offset']}-{row[f'{what}_offset'] + row[f'{what}_bytes'] - 1}"
        for row in table
        for what in ("image", "label")
    }
    assert {wanted for _, wanted in Ranges.asked} <= ranges | {"bytes=0-3"}  # nothing but frames, and a first try


def test_a_shard_that_is_gone_is_named(folder, tmp_path):
    for name, content in contents(folder).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    frames = FrameDataset(str(tmp_path), "validation")
    shard = tmp_path / "data" / "validation-00000-of-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(FileNotFoundError, match=r"validation-00000-of-00001.parquet has \d+ bytes, not \d+; copy it"):
        FrameDataset(str(tmp_path), "validation")
    shard.unlink()
    FrameDataset(str(tmp_path), "train")
    with pytest.raises(FileNotFoundError, match="validation-00000-of-00001.parquet is missing"):
        FrameDataset(str(tmp_path), "validation")
    with pytest.raises(FileNotFoundError, match="validation-00000-of-00001.parquet"):
        frames[0]


# -- without an index -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """Parquet files as `datasets` writes them, three shards of five rows, without key, index or manifest."""
    out = tmp_path_factory.mktemp("plain")
    rng = np.random.default_rng(0)
    for shard in range(3):
        columns = {"photo": [], "mask": [], "note": []}
        for i in range(5):
            path = photo(out / "raw" / f"{shard}_{i}.png", 40, 48)
            columns["photo"].append({"path": path.name, "bytes": path.read_bytes()})
            mask = save(out / "raw" / f"{shard}_{i}_mask.png", rng.choice([0, 1, 2, 255], (40, 48)))
            columns["mask"].append({"path": None, "bytes": mask.read_bytes()})
            columns["note"].append("x")
        features = Features({"photo": Image(), "mask": Image(), "note": Value("string")})
        Dataset.from_dict(columns, features=features).to_parquet(out / "data" / f"train-{shard:05d}-of-00003.parquet")
    return out / "data"


def plain_of(folder: Path, **changes) -> PlainRows:
    options = {"classes": ("a", "b", "c"), "image": "photo", "label": "mask"} | changes
    return PlainRows(str(folder), "train", **options)


def test_plain_frames_are_each_in_one_process_and_in_order(plain):
    keys = [frame.key for frame in plain_of(plain).frames()]
    assert keys == [f"{shard}_{i}.png" for shard in range(3) for i in range(5)]
    for processes in (2, 3, 4):
        parts = [[frame.key for frame in plain_of(plain).frames(p, processes)] for p in range(processes)]
        assert sorted(sum(parts, [])) == keys and all(part == sorted(part) and part for part in parts)


@pytest.mark.slow
def test_plain_batches_lose_no_row_repeat_an_epoch_and_resume(plain, monkeypatch):
    # Newer versions wait for threads of their own for five seconds at the end of every epoch.
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.01, raising=False)
    source = plain_of(plain)
    samples = PlainSamples(source, TrainTransform(crop=16), seed=5)
    for processes in (1, 3):
        keys = []
        for process in range(processes):
            count = 15 // processes // 5 * 2  # two epochs of batches of five
            batches = plain_batches(source, 5, 0, count, 5, process, processes)
            loaded = list(train_loader(samples, batches, 3, 0))
            again = list(train_loader(samples, plain_batches(source, 5, 1, count, 5, process, processes), 3, 2))
            assert len(loaded) == count and all(map(same, loaded[1:], again))
            keys.append([key for batch in loaded for key in batch["key"]])
        first = [key for part in keys for key in part[: len(part) // 2]]
        assert sorted(first) == sorted(frame.key for frame in source.frames())
        assert all(part[: len(part) // 2] != part[len(part) // 2 :] for part in keys)


def test_plain_data_with_wrong_columns_ids_or_files_is_named(plain, tmp_path):
    with pytest.raises(ValueError, match="has no column 'label', only photo, mask, note"):
        next(plain_of(plain, label="label").frames())
    with pytest.raises(ValueError, match=r"label of 0_0.png in .* holds the ids 2, which the list of classes"):
        next(plain_of(plain, classes=("a", "b")).frames())
    row = next(plain_of(plain).rows())
    row["photo"]["bytes"] = row["photo"]["bytes"][:100]
    with pytest.raises(ValueError, match="image of 0_0.png in .* cannot be decoded"):
        plain_of(plain).frame(row, 0)
    row = next(plain_of(plain).rows())
    row["photo"]["bytes"] = photo(tmp_path / "other.png", 40, 40).read_bytes()
    with pytest.raises(ValueError, match=r"label of 0_0.png in .* is 48x40, its image 40x40 \(width x height\)"):
        plain_of(plain).frame(row, 0)


def test_a_column_that_holds_no_images_is_named(tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(names=list(CLASSES))})
    rows = {"image": [PILImage.new("RGB", (4, 4))], "label": [0]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="column 'label' of .* holds ClassLabel"):
        next(PlainRows(str(tmp_path), "train", CLASSES).rows())


def test_the_identity_of_frames_is_their_content_not_their_place(folder, tmp_path):
    for name, content in contents(folder).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert FrameDataset(str(folder), "train").identity == FrameDataset(str(tmp_path), "train").identity


def test_a_prepared_folder_reads_as_plain_data_too(folder):
    frames = FrameDataset(str(folder), "train")
    plain = PlainRows(str(folder), "train", CLASSES).frames()
    for expected, frame in zip((frames[i] for i in range(8)), plain, strict=True):
        assert (frame.key, frame.scene) == (expected.key, expected.scene)
        assert np.array_equal(frame.image, expected.image) and np.array_equal(frame.labels, expected.labels)
