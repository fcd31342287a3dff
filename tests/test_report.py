"""The report is one page that needs no other file: what it says, its structure, and a browser that opens it."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import micro_model
from evaluation_helpers import CLASSES, SIZE, model_of, offroad_frames, roads
from PIL import Image
from shard_helpers import call

from tqdm_seg.commands import start
from tqdm_seg.data.frames import Frame
from tqdm_seg.evaluation.counts import FrameTable, read_table, write_table
from tqdm_seg.evaluation.figures import percent, set_results
from tqdm_seg.evaluation.protocol import Protocol
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.reports.images import draw_errors, draw_score_maps, text_scores
from tqdm_seg.reports.page import FrameScore, histogram
from tqdm_seg.reports.report import pick_worst_and_best, rank_frames

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.usefixtures("one_thread")  # several wait for each other on images this small
VOID = {"meta", "img", "br", "hr", "link"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a model, a dataset, and two evaluations of it, the second with other windows."""
    root = tmp_path_factory.mktemp("world")
    model_of(root / "model", CLASSES)
    roads(root / "raw")
    (root / "scenes.csv").write_text("scene,weather\na,snow & ice\nb,rain\n")
    for out, more in (("first", ()), ("second", ("--stride", "16"))):
        sets = [f"roads={root / 'raw' / 'roads'}", f"small={root / 'raw' / 'roads'}@32x36"]
        fixed = (root / "model", "--data", *sets, "--out", root / out, "--workers", 0)
        call("evaluate", *fixed, "--attributes", root / "scenes.csv", *more)
    return root


@pytest.fixture(scope="module")
def page(world) -> Path:
    """The report with everything that it can hold."""
    drawn = ("--model", world / "model", "--data", f"roads={world / 'raw' / 'roads'}", "--images", 1)
    return call("report", world / "first", *drawn, "--compare", world / "second")


class Outline(HTMLParser):
    """What a page is made of; raises AssertionError where elements are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def text_of(page: Path) -> str:
    """What a reader sees, with single spaces."""
    texts = [data for tag, data in Outline(page.read_text()).texts if tag not in ("style", "script")]
    return " ".join(" ".join(texts).split())


# -- structure ------------------------------------------------------------------------------------------


def test_the_page_needs_no_other_file(page):
    content, outline = page.read_text(encoding="utf-8"), Outline(page.read_text(encoding="utf-8"))
    assert not outline.all("link") and not outline.all("iframe")
    assert all("src" not in script for script in outline.all("script"))
    for _, attributes in outline.elements:
        assert attributes.get("src", "data:").startswith("data:") and attributes.get("href", "#").startswith("#")
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest", content)
    (policy,) = (meta["content"] for meta in outline.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_the_page_is_accessible(page):
    outline = Outline(page.read_text(encoding="utf-8"))
    assert outline.all("html")[0]["lang"] == "en" and len(outline.all("h1")) == len(outline.all("main")) == 1
    assert any(meta.get("name") == "viewport" for meta in outline.all("meta")) and outline.all("title")
    levels = [int(tag[1]) for tag, _ in outline.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    assert all(len(image["alt"]) > 10 for image in outline.all("img"))
    assert all(head["scope"] in ("row", "col") for head in outline.all("th"))
    assert len(outline.all("caption")) == len(outline.all("table")) >= 12
    for drawing in outline.all("svg"):
        assert drawing["role"] == "img" and drawing["aria-label"].startswith("mIoU of single frames, over ")
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert ids == ["roads", "small"] and {f"#{name}" for name in ids} == {a["href"] for a in outline.all("a")}
    style = "".join(data for tag, data in outline.texts if tag == "style")
    assert "prefers-color-scheme: dark" in style and "max-width: 40rem" in style


def test_every_figure_and_its_protocol_are_on_the_page(page, world):
    results, shown = json.loads((world / "first" / "results.json").read_text()), text_of(page)
    assert results["model"]["commit"] is None or results["model"]["commit"] in shown
    assert f"Mean of 2 sets: mIoU over 3 classes {100 * results['mean']['miou']:.2f} %" in shown
    for name, found in results["sets"].items():
        assert f"{name}: mIoU {100 * found['miou']:.2f} % (mean over {found['miou_classes']} classes)" in shown
        for label in CLASSES:
            assert f"{label} {percent(found['iou'][label])} {percent(found['accuracy'][label])}" in shown
        for scene in found["groups"]["scene"]:
            assert f"{scene['name']} {scene['frames']} {100 * scene['miou']:.2f}" in shown
        road = found["matrix"][0]
        assert f"road {' '.join(f'{100 * pixels / sum(road):.1f}' for pixels in road[:3])}" in shown
    assert "5 frames; images 40x48, windows of 32 every 20 pixels, test-time augmentation: none, fp32" in shown
    assert "sliding windows of 32 pixels, one every 20" in shown and "255 is ignored" in shown
    assert "snow & ice" in shown and "snow &amp; ice" in page.read_text()
    title = f"{sum(results['sets']['roads']['matrix'][0][1:2]):,} pixels of road predicted as traffic light"
    assert title in page.read_text()


def test_both_runs_stand_side_by_side_with_what_speaks_against_it(page, world):
    shown = text_of(page)
    assert shown.count("Comparison of first and second") == 2
    assert "Warning: The protocols differ in stride: 20 and 16." in shown
    first, second = (
        json.loads((world / run / "results.json").read_text())["sets"]["roads"] for run in ("first", "second")
    )
    before, after = first["miou"], second["miou"]
    assert (
        f"Overall mIoU: {100 * before:.2f} % → {100 * after:.2f} % ({100 * (after - before):+.2f}%), over 3 classes."
        in shown
    )
    assert f"Overall 5 {100 * before:.2f} {100 * after:.2f} {100 * (after - before):+.2f}%" in shown
    before, after = first["iou"]["road"], second["iou"]["road"]
    assert f"road {100 * before:.2f} {100 * after:.2f} {100 * (after - before):+.2f}%" in shown


def test_worst_and_best_frames_are_drawn_with_their_score_maps(page, world):
    outline = Outline(page.read_text(encoding="utf-8"))
    ranked = rank_frames(read_table(world / "first" / "roads.parquet"))
    assert len(ranked) == 4 and ranked == sorted(ranked, key=lambda frame: frame.miou)  # one has no ground truth
    descriptions = [image["alt"] for image in outline.all("img")]
    per_frame = [4, 1 + len(CLASSES)]  # image, ground truth, prediction, errors; image and a map per class
    assert len(descriptions) == 2 * sum(per_frame)
    for frame in (ranked[0], ranked[-1]):
        score = f"mIoU {100 * frame.miou:.2f} %, over {frame.classes} of 3 classes"
        assert f"Frame {frame.name}: the predicted classes over the image, {score}" in descriptions
        assert f"Frame {frame.name}: where the text traffic light fits, brighter is better" in descriptions
    for image in outline.all("img"):
        picture = Image.open(io.BytesIO(base64.b64decode(image["src"].removeprefix("data:image/jpeg;base64,"))))
        assert picture.size in ((480, 400), (224, 187))


def test_names_cannot_break_the_page(tmp_path):
    """Names of classes, scenes, attributes, frames, runs and label maps come from users."""
    evil, out = "<script>alert(1)</script>", tmp_path / '"><b>run'
    counts = np.arange(1, 13).reshape(2, 2, 3)
    labels = {"name": evil, "policy": evil, "classes": {0: evil, 1: "&amp;"}, "ignored": 255}
    protocol = {
        "frames": 2, "image_size": {"1x9": 2}, "resize": evil, "mode": "whole", "window": None, "stride": None,
        "test_time_augmentation": "none", "interpolation": "", "ground_truth": "at its own size",
        "ground_truth_size": {"1x9": 2}, "pooling": "", "precision": "fp32", "labels": labels,
        "data": {"dataset": evil, "split": "test"},
    }  # fmt: skip
    table = FrameTable([f"{evil}0", "1"], [f"{evil}a", "b"], {"weather": [evil, ""]}, counts, [evil, "&amp;"], protocol)
    model = {"path": evil, "commit": None, "version": evil, "sha256": {evil: "0"}}
    out.mkdir()
    write_table(out / "set.parquet", table)
    (out / "results.json").write_text(json.dumps({"model": model, "sets": {"set": set_results(table)}}))
    outline = Outline(call("report", out, "--compare", out).read_text(encoding="utf-8"))
    assert len(outline.all("script")) == 1 and not outline.all("b")
    texts = [data for _, data in outline.texts]
    assert texts.count(evil) >= 5 and "&amp;" in texts and f"{evil}a" in texts and f"{evil}0" in texts


# -- pieces ---------------------------------------------------------------------------------------------


def test_errors_are_marked_where_labels_and_prediction_differ():
    labels, ids = np.array([[0, 1], [255, 1]], np.uint8), np.array([[0, 0], [1, 1]], np.uint8)
    drawn = np.asarray(draw_errors(Image.new("RGB", (4, 4), (90, 120, 60)), labels, ids)).astype(int)
    right, wrong, ignored = drawn[0, 0], drawn[0, 3], drawn[3, 0]
    assert np.ptp(right) == 0 and (drawn[3, 3] == right).all()
    assert wrong[0] > wrong[1] + 100 and ignored[2] > ignored[0] + 20


def test_score_maps_are_those_of_the_model_and_average_over_windows():
    model, processor = micro_model(window_size=None), TqdmImageProcessor()
    pixels = torch.randn(1, 3, 40, 44, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(pixels, all_layers=True).score_map
    resized = torch.nn.functional.interpolate(whole, (40, 48), mode="bilinear")[..., :44]
    torch.testing.assert_close(text_scores(model, pixels), resized)
    model.config.window_size, model.config.window_stride, model.config.window_batch_size = 32, 20, 3
    total, hits = torch.zeros(1, 3, 40, 44), torch.zeros(40, 44)
    for y in (0, 8):
        for x in (0, 12):
            with torch.no_grad():
                part = model(pixels[..., y : y + 32, x : x + 32], all_layers=True).score_map
            total[..., y : y + 32, x : x + 32] += torch.nn.functional.interpolate(part, (32, 32), mode="bilinear")
            hits[y : y + 32, x : x + 32] += 1
    torch.testing.assert_close(text_scores(model, pixels), total / hits, atol=1e-5, rtol=1e-5)
    frame = Frame("a", "", np.zeros((*SIZE, 3), np.uint8), np.zeros(SIZE, np.uint8))
    drawn = draw_score_maps(model, processor, frame, Protocol())
    assert len(drawn.maps) == 3 and -1 <= drawn.low <= drawn.high <= 1


def test_no_frame_is_among_the_worst_and_the_best():
    def table(rows: int) -> FrameTable:
        counts = np.zeros((rows, 2, 3), np.int64)
        counts[:, 0, 0], counts[:, 1, 0] = range(1, rows + 1), 5
        return FrameTable([f"f{i}" for i in range(rows)], [""] * rows, {}, counts, ["a", "b"], {})

    for rows, wanted, expected in (
        (5, 2, ("f0 f1", "f4 f3")),
        (3, 2, ("f0 f1", "f2")),
        (1, 3, ("f0", "")),
        (2, 0, ("", "")),
    ):
        worst, best = pick_worst_and_best(rank_frames(table(rows)), wanted)
        assert (" ".join(f.name for f in worst), " ".join(f.name for f in best)) == expected


def test_the_histogram_counts_every_frame():
    chart = histogram([FrameScore(0, "", "", miou, 1, [miou, 0.0]) for miou in (0.0, 0.04, 0.05, 0.5, 1.0)])
    assert "over 1 of 2 classes" in chart["words"]
    assert chart["counts"][:2] == [2, 1] and chart["counts"][-1] == 1 and sum(chart["counts"]) == 5
    assert len(chart["counts"]) == 20 and chart["tallest"] == 2


def test_other_models_and_data_are_not_drawn(world, tmp_path, capsys):
    def refused(message: str, *arguments: object, status: int = 1) -> None:
        try:
            found = start("report", list(map(str, arguments)))
        except SystemExit as error:
            found = error.code
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert found == status and len(lines) == 1 and re.search(message, lines[0]), lines

    results, source = world / "first", f"roads={world / 'raw' / 'roads'}"
    model_of(tmp_path / "other", CLASSES, train=False)
    refused("evaluated model", results, "--model", tmp_path / "other", "--data", source)
    refused("roads, small", results, "--model", world / "model", "--data", f"other={world / 'raw' / 'roads'}")
    orfd = offroad_frames(tmp_path / "orfd", (1, 1))
    refused("other frames", results, "--model", world / "model", "--data", f"roads={orfd}")
    refused("both or neither", results, "--data", source, status=2)
    refused("--frames", results, "--frames", "-1", status=2)
    refused("nowhere.*tqdm-seg evaluate", tmp_path / "nowhere")
    refused("results.json.*tqdm-seg evaluate", tmp_path)
    (tmp_path / "results.json").write_text('{"miou": 0.5}')  # as a training leaves it
    refused("training.*tqdm-seg evaluate", tmp_path)


# -- in a browser ---------------------------------------------------------------------------------------

LISTEN = """<script>
const problems = [];
addEventListener("error", event => problems.push(String(event.message || event.target.tagName)), true);
addEventListener("securitypolicyviolation", event => problems.push(event.violatedDirective));
console.error = console.warn = (...words) => problems.push(words.join(" "));
</script>"""
PROBE = """<script>
addEventListener("load", () => {
  const tables = [], widths = [...document.images].map(image => image.complete ? image.naturalWidth : 0);
  for (const table of document.querySelectorAll("table.sortable"))
    for (const button of table.tHead.querySelectorAll("button")) {
      const head = button.closest("th"), place = head.cellIndex, clicks = [];
      for (const click of [1, 2]) {
        button.click();
        const rows = [...table.tBodies[0].rows].filter(row => row.className !== "whole");
        clicks.push([head.getAttribute("aria-sort"), rows.map(row => row.children[place].dataset.v)]);
      }
      const last = table.tBodies[0].rows[table.tBodies[0].rows.length - 1];
      tables.push({kind: head.dataset.kind, clicks, whole: last.textContent.startsWith("Overall")});
    }
  const wide = document.documentElement.scrollWidth > innerWidth;
  const shown = document.createElement("pre");
  shown.id = "probe";
  shown.textContent = JSON.stringify({problems, widths, tables, wide});
  document.body.append(shown);
});
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed here (apt-get install chromium)")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_every_picture_sorts_every_table_and_reports_no_error(page, tmp_path, width):
    content = (
        page.read_text(encoding="utf-8").replace("<head>", f"<head>{LISTEN}").replace("</body>", f"{PROBE}</body>")
    )
    (tmp_path / "probe.html").write_text(content, encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --virtual-time-budget=10000 --dump-dom"
    more = [f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
    done = subprocess.run(
        [BROWSER, *flags.split(), *more, (tmp_path / "probe.html").as_uri()], capture_output=True, text=True, timeout=60
    )  # fmt: skip
    assert ":CONSOLE" not in done.stderr
    outline = Outline(done.stdout[done.stdout.index("<html") :])
    found = json.loads("".join(data for tag, data in outline.texts if tag == "pre"))
    assert found["problems"] == [] and not found["wide"]
    assert len(found["widths"]) == 16 and set(found["widths"]) == {480, 224}
    assert len(found["tables"]) > 40 and any(table["whole"] for table in found["tables"])
    for table in found["tables"]:
        orders = [order for order, _ in table["clicks"]]
        assert orders == (["descending", "ascending"] if table["kind"] == "number" else ["ascending", "descending"])
        for order, values in table["clicks"]:
            full = [float(value) if table["kind"] == "number" else value for value in values if value]
            assert values[len(full) :] == [""] * (len(values) - len(full))  # what has no value comes last
            assert full == sorted(full, reverse=order == "descending")
