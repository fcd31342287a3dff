"""Evaluation: figures against a slow obvious version, any number of processes, kills, protocols, bad input."""

import csv
import json
import re
import shutil
import signal
import time
from collections import Counter
from importlib import import_module
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import micro_model
from evaluation_helpers import CLASSES, OFFROAD, SIZE, blocks, model_of, offroad_frames, prepared_folder, roads, run
from PIL import Image
from processes import PythonProcess, finish_two
from shard_helpers import call, orfd, photo, prepare, save

from tqdm_seg.commands import start
from tqdm_seg.data.files import claim_folder
from tqdm_seg.data.frames import Frame, FrameDataset, frame_loader
from tqdm_seg.data.shards import read_manifest
from tqdm_seg.evaluation import evaluate as evaluate_module
from tqdm_seg.evaluation import metrics as metrics_module
from tqdm_seg.evaluation.counts import Scored, read_scored, read_table, save_batch, write_table
from tqdm_seg.evaluation.evaluate import predict_frame, score_frames
from tqdm_seg.evaluation.groups import read_attributes
from tqdm_seg.evaluation.metrics import confusion_matrix, scores
from tqdm_seg.evaluation.options import EvaluateOptions, parse_set
from tqdm_seg.evaluation.protocol import PUBLISHED_BOXES, Protocol, predict
from tqdm_seg.evaluation.saved import SavedPredictions
from tqdm_seg.evaluation.sets import default_split
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")  # sums in one order, as torchrun has them, too


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return model_of(tmp_path_factory.mktemp("model"), CLASSES)


@pytest.fixture(scope="module")
def offroad_model(tmp_path_factory) -> Path:
    return model_of(tmp_path_factory.mktemp("offroad_model"), OFFROAD)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return roads(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def offroad(tmp_path_factory) -> Path:
    """24 frames."""
    return offroad_frames(tmp_path_factory.mktemp("orfd"))


@pytest.fixture(scope="module")
def finished(model, data, tmp_path_factory) -> Path:
    """The folder of a whole evaluation of `data` under the name roads."""
    out = tmp_path_factory.mktemp("evaluations") / "whole"
    run(model, f"roads={data}", out)
    return out


@pytest.fixture(scope="module")
def finished_offroad(offroad_model, offroad, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("evaluations") / "offroad"
    run(offroad_model, f"orfd={offroad}", out)
    return out


def load(folder: Path) -> TqdmForSemanticSegmentation:
    return TqdmForSemanticSegmentation.from_pretrained(folder).eval()


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


# -- figures --------------------------------------------------------------------------------------------


def slow_counts(model: Path, data: Path, split: str = "validation") -> dict[str, Counter]:
    """{frame: {(ground truth, prediction): pixels}}, a pixel at a time, predicted as the README shows."""
    net, processor = load(model), TqdmImageProcessor.from_pretrained(model)
    found = {}
    for frame in frame_loader(FrameDataset(str(data), split), 0):
        with torch.no_grad():
            outputs = net(**processor(images=Image.fromarray(frame.image), return_tensors="pt"))
        ids = processor.post_process_semantic_segmentation(outputs, target_sizes=[frame.labels.shape])[0].tolist()
        pairs = Counter()
        for true_row, row in zip(frame.labels.tolist(), ids, strict=True):
            for ground_truth, prediction in zip(true_row, row, strict=True):
                pairs[ground_truth, prediction] += ground_truth != 255
        found[frame.key] = pairs
    return found


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def test_all_figures_equal_a_slow_computation(model, data, finished):
    results = json.loads((finished / "results.json").read_text())["sets"]["roads"]
    pairs = sum(slow_counts(model, data).values(), Counter())
    total = sum(pairs.values())
    assert total == 4 * (SIZE[0] * SIZE[1] - 64) and results["protocol"]["frames"] == 5
    ious, weighted = [], 0
    for k, name in enumerate(CLASSES):
        ground_truth = sum(pairs[k, p] for p in range(3))
        predicted = sum(pairs[t, k] for t in range(3))
        iou = ratio(pairs[k, k], ground_truth + predicted - pairs[k, k])
        assert results["iou"][name] == (iou if iou is None else pytest.approx(iou, abs=1e-14))
        assert results["accuracy"][name] == ratio(pairs[k, k], ground_truth)
        ious += [] if iou is None else [iou]
        weighted += (iou or 0) * ground_truth / total
        assert results["matrix"][k] == [*(pairs[k, p] for p in range(3)), 0]
    assert results["accuracy"]["sky"] is None and results["iou"]["sky"] == 0  # predicted, but not in the ground truth
    assert all(pairs[t, p] for t in (0, 1) for p in range(3))  # nothing here is trivially right
    assert results["miou"] == pytest.approx(sum(ious) / len(ious), abs=1e-14)
    assert results["frequency_weighted_iou"] == pytest.approx(weighted, abs=1e-14)
    assert results["pixel_accuracy"] == pytest.approx(sum(pairs[k, k] for k in range(3)) / total, abs=1e-14)


def test_two_classes_have_precision_recall_f_and_iou_of_the_positive_one(offroad_model, offroad, finished_offroad):
    positive = json.loads((finished_offroad / "results.json").read_text())["sets"]["orfd"]["positive_class"]
    pairs = sum(slow_counts(offroad_model, offroad).values(), Counter())
    hits, ground_truth, predicted = pairs[1, 1], pairs[1, 0] + pairs[1, 1], pairs[0, 1] + pairs[1, 1]
    assert min(hits, ground_truth - hits, predicted - hits) > 0
    assert positive == {
        "name": "traversable",
        "precision": pytest.approx(hits / predicted),
        "recall": pytest.approx(hits / ground_truth),
        "f_score": pytest.approx(2 * hits / (ground_truth + predicted)),
        "iou": pytest.approx(hits / (ground_truth + predicted - hits)),
    }


def test_every_figure_follows_from_the_table_of_frames(model, data, finished):
    results, table = (
        json.loads((finished / "results.json").read_text())["sets"]["roads"],
        read_table(finished / "roads.parquet"),
    )
    assert table.frames == [f"val/{name}.png" for name in ("a/0", "a/1", "a/2", "b/3", "b/4")]
    slow = slow_counts(model, data)
    for frame, counts in zip(table.frames, table.counts, strict=True):
        assert (
            counts[:, :3].tolist() == [[slow[frame][t, p] for p in range(3)] for t in range(3)]
            and not counts[:, 3].any()
        )
    assert table.counts[-1].sum() == 0  # a frame without ground truth has its row, too
    again = scores(torch.tensor(table.counts.sum(0)), table.classes)
    assert {name: results[name] for name in again} == again and table.protocol == results["protocol"]
    groups = {row["name"]: row for row in results["groups"]["scene"]}
    for scene, rows in (("a", slice(0, 3)), ("b", slice(3, 5))):
        again = scores(torch.tensor(table.counts[rows].sum(0)), table.classes)
        assert {name: groups[scene][name] for name in again} == again
        assert groups[scene]["frames"] == rows.stop - rows.start
        assert groups[scene]["pixels"] == table.counts[rows].sum()
    lines = list(csv.DictReader((finished / "roads_groups.csv").read_text().splitlines()))
    assert [(line["by"], line["name"]) for line in lines] == [("all", ""), ("scene", "a"), ("scene", "b")]
    assert float(lines[0]["miou"]) == results["miou"] and float(lines[2]["miou"]) == groups["b"]["miou"]
    assert lines[0]["accuracy_sky"] == "" and all("windows of 32 every 20 pixels" in line["protocol"] for line in lines)


def test_the_training_program_gets_the_same_figures(model, data, finished):
    results, frames = (
        json.loads((finished / "results.json").read_text())["sets"]["roads"],
        FrameDataset(str(data), "validation"),
    )
    net, processor = load(model).train(), TqdmImageProcessor.from_pretrained(model)
    found = json.loads(
        json.dumps(score_frames(net, processor, frame_loader(frames, 0), frames.label_map, Accelerator()))
    )
    assert net.training and found["protocol"] == {k: v for k, v in results["protocol"].items() if k != "data"}
    assert {name: value for name, value in results.items() if name in found and name != "protocol"} == {
        name: value for name, value in found.items() if name != "protocol"
    }


def test_a_set_without_any_label_has_no_figures_and_says_so(model, tmp_path, capsys):
    photo(tmp_path / "images" / "val" / "0.png", *SIZE)
    save(tmp_path / "masks" / "val" / "0.png", np.full(SIZE, 255))
    results = run(model, f"void={prepared_folder(tmp_path, 'void')}", tmp_path / "out")["sets"]["void"]
    assert results["miou"] is None and set(results["iou"].values()) == {None} and results["groups"] == {}
    assert "## void: mIoU N/A %" in capsys.readouterr().out


def test_counting_for_a_gpu_equals_counting_for_a_processor(monkeypatch):
    rng = np.random.default_rng(0)
    ground_truth, ids = (torch.from_numpy(rng.choice([0, 1, 2, 255], (50, 60)).astype(np.uint8)) for _ in range(2))
    expected = confusion_matrix(ids, ground_truth, 3)

    def scatter(pairs, cells):
        pairs.scatter_add_(0, cells.long(), pairs.new_ones(1).expand(len(cells)))

    monkeypatch.setattr(metrics_module, "_count_into", scatter)
    assert torch.equal(confusion_matrix(ids, ground_truth, 3, check=False), expected)
    ground_truth[0] = 7  # no class: left out, so that the sum tells
    assert confusion_matrix(ids, ground_truth, 3, check=False).sum() < (ground_truth != 255).sum()


# -- protocols ------------------------------------------------------------------------------------------

OPTIONS = {
    "--window 0": {"mode", "window", "stride"},
    "--window 24": {"window", "stride"},
    "--stride 16": {"stride"},
    "--size 32x36": {"image_size", "resize"},
    "--aug-test": {"test_time_augmentation"},
    "--offnet": {"ground_truth"},
    "--precision bf16": {"precision"},
    "--precision int8": {"precision"},
    "--window-batch 2": set(),
}


@pytest.mark.parametrize("option", [pytest.param(o, marks=pytest.mark.slow) if "aug" in o else o for o in OPTIONS])
def test_every_option_that_changes_figures_is_in_the_protocol(model, data, finished, tmp_path, capsys, option):
    run(model, f"roads={data}", tmp_path / "out", *option.split())
    printed = capsys.readouterr().out
    before, after = (read_table(out / "roads.parquet").protocol for out in (finished, tmp_path / "out"))
    changed = {name for name in before if before[name] != after[name]}
    assert before.keys() == after.keys() and changed == OPTIONS[option]
    for name in changed & {"test_time_augmentation", "ground_truth", "precision", "resize"}:
        assert str(after[name]) in printed
    if changed:  # such runs are not to be compared
        assert start("compare", [str(out / "roads.parquet") for out in (finished, tmp_path / "out")]) == 1
        assert f"differ in {sorted(changed)[0]}" in capsys.readouterr().err


@pytest.mark.slow
def test_boxes_belong_to_a_set_the_run_or_the_published_protocol(model, data, tmp_path, monkeypatch):
    monkeypatch.setitem(PUBLISHED_BOXES, "roads", (32, 40))
    sources = [f"plain={data}", f"own={data}@36x30"]
    more = ("--protocol", "published", "--out", tmp_path / "a", "--workers", 0)
    found = call("evaluate", model, "--data", *sources, *more)
    sizes = {name: list(results["protocol"]["image_size"]) for name, results in found["sets"].items()}
    assert sizes == {"plain": ["32x38"], "own": ["30x36"]}
    assert found["sets"]["plain"]["protocol"]["resize"] == "fitted into 32x40, either way round, keeping the shape"
    # A model folder's own size is kept, unless the protocol is another.
    boxed = TqdmImageProcessor(do_resize=True, size={"shortest_edge": 34, "longest_edge": 60})
    folder = model_of(tmp_path / "boxed", CLASSES, boxed)
    for protocol, size in (("model", "34x41"), ("own", "40x48")):
        results = run(folder, f"roads={data}", tmp_path / protocol, "--protocol", protocol)["sets"]["roads"]
        assert list(results["protocol"]["image_size"]) == [size]
        if protocol == "model":
            pairs = sum(slow_counts(folder, data).values(), Counter())
            assert [row[:3] for row in results["matrix"]] == [[pairs[t, p] for p in range(3)] for t in range(3)]
    assert PUBLISHED_BOXES["Cityscapes"] == PUBLISHED_BOXES["Mapillary Vistas"] == (1024, 2048)
    assert PUBLISHED_BOXES["BDD100K (10k)"] == (720, 1280)


def test_the_published_boxes_are_those_of_the_datasets_names():
    names = {
        import_module(f"tqdm_seg.data.sources.{name}").SOURCE.name for name in ("cityscapes", "bdd100k", "mapillary")
    }
    assert names == PUBLISHED_BOXES.keys()


def test_augmented_test_is_the_mean_over_scales_and_mirror_images_by_hand(model, data):
    net, processor = load(model), TqdmImageProcessor.from_pretrained(model)
    frame = FrameDataset(str(data), "validation")[0]
    protocol = Protocol(scales=(0.5, 1.25), flip=True, softmax_views=True)
    assert protocol.view_sizes(40, 48) == [(20, 24), (50, 60)]
    total = 0
    for side in (20, 50):
        resized = processor(
            images=frame.image.copy(), do_resize=True, size={"shortest_edge": side, "longest_edge": side * 6 // 5},
            return_tensors="pt",
        )["pixel_values"]  # fmt: skip
        for flipped in (resized, resized.flip(-1)):
            with torch.no_grad():
                scores = net(flipped).logits
            scores = torch.nn.functional.interpolate(scores, SIZE, mode="bilinear").softmax(1)
            total = total + (scores if flipped is resized else scores.flip(-1))
    found = predict(net, processor, protocol.views(frame.image, processor), SIZE, protocol, frame.key)
    assert torch.equal(found.long(), total[0].argmax(0))


def test_offnet_ground_truth_is_a_quarter_of_its_input_and_changes_counts_but_not_predictions():
    labels = np.zeros((720, 1280), np.uint8)
    labels[301:, 77:] = 1
    ground_truth = Protocol(offnet=True).ground_truth(labels).numpy()
    rows, columns = np.arange(720) * 176 // 720, np.arange(1280) * 320 // 1280
    small = labels[np.arange(176) * 720 // 176][:, np.arange(320) * 1280 // 320]
    assert np.array_equal(ground_truth, small[rows][:, columns]) and ground_truth.sum() != labels.sum()
    assert cv2.resize(labels, (320, 176), interpolation=cv2.INTER_NEAREST).shape == (176, 320)
    assert np.array_equal(Protocol().ground_truth(labels).numpy(), labels)


def test_predict_frame_is_what_the_readme_shows(model, data):
    net, processor = load(model), TqdmImageProcessor.from_pretrained(model)
    frame = FrameDataset(str(data), "validation")[1]
    with torch.no_grad():
        outputs = net(**processor(images=Image.fromarray(frame.image), return_tensors="pt"))
    ids, size = predict_frame(net, processor, frame)
    assert size == SIZE and ids.dtype == torch.int64 and torch.equal(ids, outputs.logits[0].argmax(0))
    assert Protocol.of(TqdmImageProcessor(do_resize=True, size={"height": 8, "width": 9})).view_size(5, 5) == (8, 9)


# -- several processes, kills ---------------------------------------------------------------------------


def command(model: Path, source: str, out: Path, *more: str) -> list[str]:
    return ["-m", "tqdm_seg.evaluation.evaluate", str(model), "--data", source, "--out", str(out), *more]


@pytest.mark.slow
def test_two_processes_count_every_frame_once_and_write_the_same_files(
    offroad_model, offroad, finished_offroad, tmp_path
):
    more = ("--save-every-frames", "7", "--workers", "1")
    printed = finish_two(*command(offroad_model, f"orfd={offroad}", tmp_path / "out", *more))
    assert printed.count("## orfd: mIoU") == 1
    assert files(tmp_path / "out") == files(finished_offroad)


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_from_the_frames_it_has(
    offroad_model, offroad, finished_offroad, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    parts = out / "parts" / "orfd"
    arguments = command(offroad_model, f"orfd={offroad}", out, "--save-every-frames", "1", "--workers", "0")
    process = PythonProcess(*arguments)
    while process.poll() is None and len(list(parts.glob("*.npz"))) < 3:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.finish()[0] == -signal.SIGKILL and not (out / "results.json").exists()
    done = read_scored(parts, 24, 2).rows
    assert 0 < len(done) < 24
    (parts / ".1.00000023.npz").write_bytes(b"PK")  # as if killed while it wrote

    scored, original = [], evaluate_module.frame_counts
    monkeypatch.setattr(evaluate_module, "frame_counts", lambda *a: scored.append(a[2].row) or original(*a))
    run(offroad_model, f"orfd={offroad}", out, "--save-every-frames", "5")
    assert sorted([*scored, *done.tolist()]) == list(range(24))
    assert files(out) == files(finished_offroad)


def test_a_finished_evaluation_is_not_done_again_but_can_be_grouped_again(
    model, data, finished, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    out.mkdir()
    for name, content in files(finished).items():
        (out / name).write_bytes(content)
    monkeypatch.setattr(evaluate_module, "predict", None)  # would fail
    run(model, f"roads={data}", out)
    assert "## roads: mIoU" in capsys.readouterr().out and files(out) == files(finished)
    (tmp_path / "scenes.csv").write_text("scene,weather,light,colour\na,rain,,red\n")
    results = run(model, f"roads={data}", out, "--attributes", str(tmp_path / "scenes.csv"))["sets"]["roads"]
    assert [row["name"] for row in results["groups"]["weather"]] == ["not given", "rain"] and "light" not in results[
        "groups"
    ]
    assert read_table(out / "roads.parquet").attributes == {"weather": ["rain"] * 3 + ["", ""]}
    more = ("--attributes", str(tmp_path / "scenes.csv"), "--by", "colour")
    assert "colour" in run(model, f"roads={data}", out, *more)["sets"]["roads"]["groups"]


def test_a_class_set_is_summed_up_from_the_counts_of_a_finished_evaluation(model, data, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "out")
    before = json.loads((finished / "results.json").read_text())["sets"]["roads"]
    assert before["miou_classes"] == 3 and "class_set" not in before["protocol"]
    found = run(model, f"roads={data}", tmp_path / "out", "--class-set", "road,traffic light")["sets"]["roads"]
    assert found["miou"] == pytest.approx((before["iou"]["road"] + before["iou"]["traffic light"]) / 2)
    assert found["miou_classes"] == 2 and found["iou"] == before["iou"]
    printed = capsys.readouterr().out
    assert "(mean over 2 of 3 classes, road,traffic light)" in printed
    assert "Without a pixel in the ground truth: sky." in printed
    assert read_table(tmp_path / "out" / "roads.parquet").class_set == ("road", "traffic light")
    assert run(model, f"roads={data}", tmp_path / "out")["sets"]["roads"]["miou"] == before["miou"]
    with pytest.raises(ValueError, match="--class-set .*synthia-16"):
        run(model, f"roads={data}", tmp_path / "new", "--class-set", "synthia-16")
    assert not (tmp_path / "new").exists()


def test_an_exchanged_table_of_a_finished_evaluation_is_noticed(model, data, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    table = read_table(finished / "roads.parquet")
    table.counts = table.counts.copy()
    table.counts[0, 0, :2] += [1, -1]
    write_table(tmp_path / "out" / "roads.parquet", table)
    with pytest.raises(ValueError, match="roads.parquet is not the table"):
        run(model, f"roads={data}", tmp_path / "out")


def test_a_refused_or_killed_start_does_not_bar_the_right_command(model, data, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError):
        run(model, f"roads={data}", out, "--window", "1", "--stride", "1")
    assert not out.exists()
    claim_folder(out, "evaluate")  # killed before the plan, or after that of another command and no frame
    (out / "parts").mkdir()
    (out / "plan.json").write_text("{}")
    (out / ".tqdm-seg.tmp.plan.json").write_text("{")
    assert run(model, f"roads={data}", out)["sets"]["roads"]["miou"] is not None
    assert not [path for path in out.iterdir() if "tmp" in path.name]


def test_a_port_is_no_split():
    assert parse_set("x=http://host:8810")[1:3] == ("http://host:8810", None)
    assert parse_set("x=http://host:8810/set:test")[1:3] == ("http://host:8810/set", "test")


def test_a_row_with_too_many_fields_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("scene,light\nx,day,night\n")
    with pytest.raises(ValueError, match="a.csv, row 1: 3 fields, the header has 2"):
        read_attributes(tmp_path / "a.csv")


def test_another_evaluation_in_the_folder_is_not_mixed_with(model, data, finished, tmp_path):
    before = files(finished)
    with pytest.raises(ValueError, match=r"holds another evaluation \(sets.roads.protocol.stride was 20, now 16\)"):
        run(model, f"roads={data}", finished, "--stride", "16")
    other = micro_model(id2label=dict(enumerate(CLASSES)))
    other.model.mask_decoder.query_positions.data += 1
    other.save_pretrained(tmp_path / "other")
    TqdmImageProcessor().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"model.sha256.model.safetensors was \w+, now \w+"):
        run(tmp_path / "other", f"roads={data}", finished)
    with pytest.raises(FileExistsError, match="not made by tqdm-seg evaluate"):
        run(model, f"roads={data}", tmp_path / "other")
    assert files(finished) == before


def test_batches_of_any_process_are_read_in_the_order_of_the_frames(tmp_path):
    counts = np.arange(4 * 6).reshape(4, 2, 3)
    assert len(read_scored(tmp_path / "none", 4, 2).rows) == 0
    for rows in ([3, 1], [0]):
        save_batch(tmp_path, Scored(np.array(rows), counts[rows]))
    found = read_scored(tmp_path, 4, 2)
    assert found.rows.tolist() == [0, 1, 3] and np.array_equal(found.counts, counts[[0, 1, 3]])
    with pytest.raises(ValueError, match="delete it"):
        read_scored(tmp_path, 3, 2)  # another set
    save_batch(tmp_path, Scored(np.array([2, 1]), counts[[2, 1]]))
    with pytest.raises(ValueError, match="two programs wrote"):
        read_scored(tmp_path, 4, 2)


def test_labels_that_are_not_those_of_the_index_stops_the_evaluation(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(Protocol, "ground_truth", lambda self, labels: torch.zeros(SIZE, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"labels of val/a/0.png in .* tqdm-seg check"):
        run(model, f"roads={data}", tmp_path / "out")


# -- several sets, bad input ----------------------------------------------------------------------------


def test_several_sets_have_their_mean_and_the_protocol_beside_every_figure(model, data, tmp_path, capsys):
    found = call("evaluate", model, "--data", f"one={data}", f"two={data}@32x36", "--out", tmp_path, "--workers", 0)
    one, two = (found["sets"][name] for name in ("one", "two"))
    assert found["mean"]["miou"] == (one["miou"] + two["miou"]) / 2 and found["mean"]["sets"] == ["one", "two"]
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert found["model"]["path"] == str(model) and len(found["model"]["sha256"]["model.safetensors"]) == 64
    assert "commit" in found["model"] and "model" not in one["protocol"]
    printed = capsys.readouterr().out
    assert printed.count("Protocol: roads, split validation: 5 frames;") == 2
    mean = f"| **mean of 2 sets** | **{100 * found['mean']['miou']:.2f}** |"
    assert mean in printed and "| two | " in printed and "images 30x36, windows of 32 every 20 pixels" in printed


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a=x", ("a", "x", None, None)),
        ("a=x:test", ("a", "x", "test", None)),
        ("a-1.b=x/y:test@1024x2048", ("a-1.b", "x/y", "test", (1024, 2048))),
        ("a=hf://datasets/o/n@main", ("a", "hf://datasets/o/n@main", None, None)),
        ("a=s3://b/c:train@8x9", ("a", "s3://b/c", "train", (8, 9))),
    ],
)
def test_sets_are_named_on_the_command_line(text, parts):
    assert parse_set(text) == parts


def test_the_default_split_is_validation_or_else_test(data, tmp_path):
    assert default_split(str(data)) == "validation"
    for split, root in (("testing", "t"), ("training", "r")):
        orfd(tmp_path / root, 1, split=split)
        prepare("orfd", tmp_path / root, tmp_path / f"{root}out")
    assert default_split(str(tmp_path / "tout")) == "test"
    with pytest.raises(ValueError, match="no split validation or test, only train; say which: PATH:SPLIT"):
        default_split(str(tmp_path / "rout"))


def test_bad_input_is_named_before_anything_is_done(model, offroad_model, data, offroad, tmp_path, capsys):
    out = tmp_path / "out"

    def refused(message: str, *arguments: object, status: int = 1) -> None:
        try:
            found = start("evaluate", [*map(str, arguments), "--out", str(out)])
        except SystemExit as error:
            found = error.code
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert found == status and len(lines) == 1 and re.search(message, lines[0]), lines

    nowhere, set_a = tmp_path / "nowhere", ("--data", f"a={data}")
    refused("nowhere", nowhere, *set_a)
    refused("config.json", tmp_path, *set_a)
    refused("manifest.json", model, "--data", f"a={nowhere}")
    refused("split 'dev'.*validation", model, "--data", f"a={data}:dev")
    refused("class 0 is non-traversable to the model but road in the dataset", offroad_model, *set_a)
    refused("non-traversable", model, *set_a, "--data", f"b={offroad}")
    refused("gaps", model, *set_a, "--stride", "64")
    for wrong in (("--data", data), ("--data", f"../a={data}"), (*set_a, f"A={data}"), set_a + ("--by", "weather")):
        refused("--by|--data|2 sets", model, *wrong, status=2)
    for name, value in (("size", "0x9"), ("workers", "-1"), ("save-every-frames", "0"), ("precision", "float32")):
        refused(name, model, *set_a, f"--{name}", value, status=2)
    (tmp_path / "scenes.csv").write_text("scene,weather\nelsewhere,rain\n")
    grouped = (model, *set_a, "--attributes", tmp_path / "scenes.csv")
    refused("group by", *grouped)
    refused("'scene'", *grouped, "--by", "scene")
    refused("'light'.*weather", *grouped, "--by", "light")
    refused("none.csv", model, *set_a, "--attributes", tmp_path / "none.csv")
    broken = model_of(tmp_path / "broken", CLASSES, train=False)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "segformer"}))
    refused("segformer", broken, *set_a)
    assert not out.exists()


def test_classes_in_another_order_are_refused(data, tmp_path):
    folder = model_of(tmp_path / "model", ["road", "sky", "traffic light"], train=False)
    with pytest.raises(ValueError, match="class 1 is sky to the model but traffic light in the dataset"):
        run(folder, f"a={data}", tmp_path / "out")
    folder = model_of(tmp_path / "more", [*CLASSES, "car"], train=False)
    with pytest.raises(
        ValueError, match="the model has 4 classes, a has 3, and class 3 is car to the model but nothing"
    ):
        run(folder, f"a={data}", tmp_path / "out")


def test_label_maps_of_one_kind_are_not_mixed(offroad_model, offroad, tmp_path):
    orfd(tmp_path / "raw", 1, split="validation", size=40)
    prepare("orfd", tmp_path / "raw", tmp_path / "other", "--unreachable", "ignored")
    assert read_manifest(tmp_path / "other")["label_map"]["name"] == "orfd/ignored"
    with pytest.raises(ValueError, match="prepared under the label maps orfd/merged and orfd/ignored"):
        call("evaluate", offroad_model, "--data", f"a={offroad}", f"b={tmp_path / 'other'}", "--out", tmp_path / "out")


def test_missing_weights_are_not_made_up(model, data, tmp_path):
    folder = model_of(tmp_path / "model", CLASSES, train=False)
    net = load(folder)
    state = net.state_dict()
    net.save_pretrained(
        folder, state_dict={name: value for name, value in state.items() if "query_positions" not in name}
    )
    with pytest.raises(ValueError, match="query_positions"):
        run(folder, f"a={data}", tmp_path / "out")


# -- other classes, saved predictions, data without an index --------------------------------------------


def slow_ids(model: Path, frame: Frame) -> np.ndarray:
    """Class ids (h, w) uint8 as the README predicts them."""
    net, processor = load(model), TqdmImageProcessor.from_pretrained(model)
    with torch.no_grad():
        outputs = net(**processor(images=Image.fromarray(frame.image), return_tensors="pt"))
    return processor.post_process_semantic_segmentation(outputs, target_sizes=[frame.labels.shape])[0].numpy()


@pytest.mark.parametrize("trained", [True, False])
def test_a_start_model_is_named(model, data, tmp_path, capsys, trained):
    shutil.copytree(model, tmp_path / "start")
    fields = json.loads((model / "config.json").read_text()) | {"trained": trained}
    (tmp_path / "start" / "config.json").write_text(json.dumps(fields))
    run(tmp_path / "start", f"roads={data}", tmp_path / "out")
    assert capsys.readouterr().err.count("is not trained") == (not trained)


def test_common_classes_are_matched_by_name_and_the_others_are_named(model, data, offroad, tmp_path, capsys):
    names = ["tree", "Sky", "road"]  # the model has road, traffic light, sky
    labels = np.zeros(SIZE, np.uint8)
    labels[10:], labels[20:, 30:], labels[:8, :8] = 2, 0, 255
    save(tmp_path / "images" / "val" / "0.png", blocks(0))
    save(tmp_path / "masks" / "val" / "0.png", labels)
    (tmp_path / "classes.txt").write_text("\n".join(names))
    prepare(
        "folder", *(tmp_path / name for name in ("images", "set", "masks")), "--class-file", tmp_path / "classes.txt"
    )
    source = f"new={tmp_path / 'set'}"
    results = run(model, source, tmp_path / "out", "--class-set", "common")
    found, ids = results["sets"]["new"], slow_ids(model, FrameDataset(str(tmp_path / "set"), "validation")[0])
    matrix = np.zeros((2, 3), int)  # of Sky and road; predicted traffic lights are none of them
    for true, predicted in zip(labels.ravel().tolist(), ids.ravel().tolist(), strict=True):
        if true in (1, 2):
            matrix[true - 1, {2: 0, 0: 1}.get(predicted, 2)] += 1
    assert (
        found["matrix"] == matrix.tolist() and np.count_nonzero(matrix[1]) > 1 and list(found["iou"]) == ["Sky", "road"]
    )
    labels_of = found["protocol"]["labels"]
    assert labels_of["classes"] == {"0": "Sky", "1": "road"}
    assert labels_of["left_out"] == {"predictions": ["traffic light"], "data": ["tree"]}
    printed = capsys.readouterr().out
    assert "(mean over 2 common classes)" in printed and "Without a pixel in the ground truth: Sky." in printed
    assert "pixels of tree" in printed and "no such class: traffic light" in printed
    both = run(model, source, tmp_path / "both", "--data", f"roads={data}", "--class-set", "common")
    assert both["mean"]["over"] == "2 common classes" and both["sets"]["new"]["matrix"] == found["matrix"]
    for more in ((), ("--data", f"orfd={offroad}", "--class-set", "common")):
        with pytest.raises(ValueError, match="--class-set common"):
            run(model, source, tmp_path / "new", *more)
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def saved(model, data, tmp_path_factory) -> Path:
    """The model's predictions as another program saves them: file names alone."""
    folder = tmp_path_factory.mktemp("saved")
    for frame in frame_loader(FrameDataset(str(data), "validation"), 0):
        save(folder / f"{Path(frame.key).stem}.png", slow_ids(model, frame).astype(np.uint8))
    return folder


def evaluate_saved(folder: Path, data: Path, out: Path, *more: str) -> dict:
    return call("evaluate", "--predictions", folder, "--data", f"roads={data}", "--out", out, "--workers", 0, *more)


def test_saved_predictions_get_the_same_tables_and_figures_as_their_model(data, finished, saved, tmp_path, capsys):
    results = evaluate_saved(saved, data, tmp_path / "out")
    before = json.loads((finished / "results.json").read_text())["sets"]["roads"]
    figures = [name for name in before if name not in ("protocol", "views")]
    assert {name: results["sets"]["roads"][name] for name in figures} == {name: before[name] for name in figures}
    a, b = (read_table(out / "roads.parquet") for out in (finished, tmp_path / "out"))
    assert a.frames == b.frames and a.scenes == b.scenes and np.array_equal(a.counts, b.counts)
    printed = capsys.readouterr().out
    assert "predictions saved by another program" in printed and f"Saved predictions: {saved}." in printed
    again = evaluate_saved(saved, data, tmp_path / "out", "--class-set", "road,sky")
    assert again["sets"]["roads"]["miou_classes"] == 2
    evaluate_saved(saved, data, tmp_path / "other", "--class-names", "sky,road,traffic light", "--class-set", "common")
    other = read_table(tmp_path / "other" / "roads.parquet")
    assert np.array_equal(other.counts[:, :, :3], a.counts[:, :, [1, 2, 0]])  # id 0 is sky there, 1 road
    assert start("report", [str(tmp_path / "out")]) == 0


def test_a_bad_saved_prediction_is_named_and_nothing_is_written(data, saved, tmp_path):
    for kind, words in {
        "missing": r"val/a/1.png.*1\.png",
        "size": r"1\.png.*39x48.*40x48",
        "value": r"1\.png.*\b7\b.*0 to 2",
        "colours": r"1\.png.*colours",
        "damaged": r"1\.png",
    }.items():
        folder = tmp_path / kind
        shutil.copytree(saved, folder)
        path = folder / "1.png"
        ids = np.array(Image.open(path))
        if kind == "missing":
            path.unlink()
        elif kind == "damaged":
            path.write_bytes(path.read_bytes()[:60])
        else:
            ids[3, 4] = 7
            save(path, {"size": ids[1:], "value": ids, "colours": ids[..., None].repeat(3, -1)}[kind])
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            evaluate_saved(folder, data, tmp_path / "out")
    with pytest.raises(ValueError, match="fits 2 frames"):
        SavedPredictions.of(saved, ["a/1.png", "b/1.png"], CLASSES)
    for more in ({}, {"model": "x", "predictions": saved}, {"predictions": saved, "window": 16}):
        with pytest.raises(ValueError, match="--predictions"):
            EvaluateOptions(data=(f"roads={data}",), **more)
    assert not (tmp_path / "out").exists()


def test_data_without_an_index_get_the_same_figures(model, data, finished, tmp_path, monkeypatch):
    before = json.loads((finished / "results.json").read_text())["sets"]["roads"]
    out, more = tmp_path / "out", ("--no-index", "--save-every-frames", "2")
    counted, scored = evaluate_module.frame_counts, []

    def stop(*given):
        scored.append(given[2].row)
        if len(scored) == 4:
            raise KeyboardInterrupt
        return counted(*given)

    monkeypatch.setattr(evaluate_module, "frame_counts", stop)
    with pytest.raises(KeyboardInterrupt):
        run(model, f"roads={data}", out, *more)
    found = run(model, f"roads={data}", out, *more)["sets"]["roads"]
    assert scored == [0, 1, 2, 3, 2, 3, 4]  # two were saved
    figures = [name for name in before if name not in ("protocol", "data")]
    assert {name: found[name] for name in figures} == {name: before[name] for name in figures}
    same = {name for name, value in before["protocol"].items() if found["protocol"][name] == value}
    assert before["protocol"].keys() - same == {"labels"}
    assert np.array_equal(read_table(out / "roads.parquet").counts, read_table(finished / "roads.parquet").counts)
    for wrong in (("--label-column", "nosuch"), ("--class-names", "road")):
        with pytest.raises(ValueError, match="nosuch|ids"):
            run(model, f"roads={data}", tmp_path / "new", *more, *wrong)
    assert not (tmp_path / "new").exists()
