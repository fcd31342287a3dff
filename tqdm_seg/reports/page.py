"""The sections of the report on an evaluation: figures, classes, confusions, groups, frames, score maps, comparison.

Letters: R frames, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..data.palette import class_colours
from ..evaluation.figures import FIGURES, percent, short_protocol, sizes_text
from .comparison import Comparison, Row
from .comparison_text import ARROWS, explanations, key_findings, points, say
from .html import Cell, bar, document, element, escape, number, picture, scrolling, sortable, word
from .pictures import FramePictures, ScoreMaps

# Classes beyond this number get no column each in tables of frames and groups, and upright titles in the matrix.
_FEW = 5
_BINS = 20


class FrameScore(NamedTuple):
    """A frame: its number in the table, name, scene, mIoU and IoU of every class, NaN where undefined."""

    row: int
    name: str
    scene: str
    miou: float
    iou: list[float]


@dataclass
class SetReport:
    """What the page says about one set. ranked: its frames that have a score, from the worst on."""

    name: str
    results: dict[str, Any]
    ranked: list[FrameScore]
    worst: list[FrameScore]
    best: list[FrameScore]
    pictures: dict[int, FramePictures] = field(default_factory=dict)
    score_maps: dict[int, ScoreMaps] = field(default_factory=dict)
    comparison: Comparison | None = None

    @property
    def classes(self) -> list[str]:
        """Names in id order."""
        return list(self.results["iou"])


def page(results: dict[str, Any], sets: Sequence[SetReport]) -> str:
    """The whole page. results: what results.json holds."""
    model = results["model"]
    title = f"Evaluation of {model['path']}"
    links = "".join(element("li", element("a", escape(part.name), href=f"#{part.name}")) for part in sets)
    weights = ", ".join(f"{name} {digest[:12]}" for name, digest in model["sha256"].items())
    code = f"commit {model['commit']}" if model["commit"] else f"version {model['version'] or 'not known'}"
    head = [
        element("h1", escape(title)),
        element("p", escape(f"Code: {code}. SHA-256 of its files: {weights}."), class_="soft"),
        element("nav", element("ul", links), aria_label="Sets") if len(sets) > 1 else "",
    ]
    cards = [headline(part) for part in sets]
    if "mean" in results:
        cards.append(mean_card(results["mean"]))
    overview = element("section", *[element("div", *cards, class_="cards")], aria_label="Overview")
    return document(title, element("header", *head) + element("main", overview, *map(set_section, sets)))


def headline(part: SetReport) -> str:
    """The card of a set: its figures with the protocol that they hold under."""
    results = part.results
    values = {title: results[key] for key, title in FIGURES.items() if key != "miou"}
    if "positive_class" in results:
        positive = results["positive_class"]
        titles = {"precision": "precision", "recall": "recall", "f_score": "F", "iou": "IoU"}
        values |= {f"{title} of {positive['name']}": positive[key] for key, title in titles.items()}
    return element(
        "div",
        element("p", escape(f"{part.name}: mIoU"), class_="soft"),
        element("div", f"{percent(results['miou'])} %", class_="big"),
        definitions({title: f"{percent(value)} %" for title, value in values.items()}),
        element(
            "p", escape(f"{results['protocol']['frames']} frames; {short_protocol(results['protocol'])}"), class_="soft"
        ),
        class_="card",
    )


def mean_card(mean: dict[str, Any]) -> str:
    """The average of the sets, as published tables end with it."""
    values = {title: f"{percent(mean[key])} %" for key, title in FIGURES.items() if key != "miou"}
    text = f"{', '.join(mean['sets'])}: each set counts the same, under its own protocol"
    return element(
        "div",
        element("p", escape(f"Mean of {len(mean['sets'])} sets: mIoU"), class_="soft"),
        element("div", f"{percent(mean['miou'])} %", class_="big"),
        definitions(values),
        element("p", escape(text), class_="soft"),
        class_="card",
    )


def definitions(values: dict[str, str]) -> str:
    """Names and values."""
    pairs = (element("dt", escape(name)) + element("dd", escape(value)) for name, value in values.items())
    return element("dl", *pairs)


def set_section(part: SetReport) -> str:
    """Everything about one set."""
    parts = [
        element("h2", escape(part.name)),
        protocol_details(part.results["protocol"]),
        element("h3", "Classes"),
        class_table(part),
        element("h3", "What is taken for what"),
        confusion_table(part),
        *group_tables(part),
        *frame_parts(part),
        *score_map_parts(part),
    ]
    if part.comparison is not None:
        parts += comparison_parts(part.comparison)
    return element("section", *parts, class_="set", id=part.name, aria_label=f"Set {part.name}")


def protocol_details(protocol: dict[str, Any]) -> str:
    """Every field of the protocol."""
    labels = protocol["labels"]
    mode = protocol["mode"]
    if mode == "slide":
        mode = f"sliding windows of {protocol['window']} pixels, one every {protocol['stride']}"
    fields = {
        "frames": f"{protocol['frames']} of {protocol['data']['dataset']}, split {protocol['data']['split']}",
        "images": f"{sizes_text(protocol['image_size'])} (height x width); resized: {protocol['resize']}",
        "inference": mode,
        "test-time augmentation": protocol["test_time_augmentation"],
        "scores": protocol["interpolation"],
        "truth": f"{protocol['truth']}, {sizes_text(protocol['truth_size'])}",
        "pooling": protocol["pooling"],
        "number format": protocol["precision"],
        "label map": f"{labels['name']}: {labels['policy']}; {labels['ignored']} is ignored",
    }
    return element(
        "details", element("summary", "Protocol of all figures of this set"), definitions(fields), open="open"
    )


# -- tables ---------------------------------------------------------------------------------------------


def swatches(classes: Sequence[str]) -> list[str]:
    """A patch of every class's colour."""
    colours = class_colours(len(classes)).tolist()
    return [element("span", class_="swatch", style=f"background:rgb{tuple(colour)}") for colour in colours]


def class_table(part: SetReport) -> str:
    """IoU, accuracy and share of every class."""
    results = part.results
    truth = [sum(row) for row in results["matrix"]]
    rows = [
        [word(name, patch), bar(results["iou"][name]), bar(results["accuracy"][name]), share(pixels, sum(truth))]
        for name, patch, pixels in zip(part.classes, swatches(part.classes), truth, strict=True)
    ]
    caption = "In %. Accuracy: how much of the class's true pixels was found. Truth: its share of the labelled pixels."
    return sortable(caption, ["class", "IoU", "accuracy", "truth"], rows)


def share(pixels: int, total: int) -> Cell:
    """A share of pixels in %."""
    value = pixels / total if total else float("nan")
    return number(value, f"{100 * value:.2f}")


def confusion_table(part: SetReport) -> str:
    """The confusion matrix as a heat table: each row is a true class, in % of its pixels."""
    matrix = np.array(part.results["matrix"])
    columns = [*part.classes, "none"] if matrix[:, -1].any() else part.classes
    heads = [element("th", "true class", scope="col")]
    heads += [element("th", escape(f"as {name}"), scope="col") for name in columns]
    rows = []
    for k, (name, counts) in enumerate(zip(part.classes, matrix, strict=True)):
        cells = [element("th", escape(name), scope="row")]
        for column, pixels in enumerate(counts[: len(columns)].tolist()):
            value = pixels / counts.sum() if counts.sum() else 0
            shown = f"{100 * value:.1f}" if counts.sum() else "–"
            title = f"{pixels:,} pixels of {name} predicted as {columns[column]}"
            kind = "hit" if column == k else ""
            cells.append(element("td", shown, style=f"--v:{value:.4f}", title=title, class_=kind))
        rows.append(element("tr", *cells))
    caption = "Each row: where the true pixels of a class went, in %. Outlined: right."
    content = [element("caption", caption), element("thead", element("tr", *heads)), element("tbody", *rows)]
    kind = "heat many" if len(columns) > _FEW else "heat"
    return scrolling(element("table", *content, class_=kind), "Confusion matrix")


def group_tables(part: SetReport) -> list[str]:
    """A table of scenes, and one for every attribute."""
    found = []
    few = part.classes if len(part.classes) <= _FEW else []
    titles = ["frames", "mIoU", "pixel accuracy", *(f"IoU of {name}" for name in few)]
    for by, group in part.results["groups"].items():
        rows = [
            [
                word(row["name"]), number(row["frames"]), bar(row["miou"]), bar(row["pixel_accuracy"]),
                *(bar(row["iou"][name]) for name in few),
            ]
            for row in group
        ]  # fmt: skip
        heading = "Scenes" if by == "scene" else f"By {by}"
        found += [element("h3", escape(heading)), sortable("In %, pooled over the frames.", [by, *titles], rows)]
    return found


# -- frames ---------------------------------------------------------------------------------------------


def frame_parts(part: SetReport) -> list[str]:
    """How the frames' scores are spread, the worst and the best of them, and a table."""
    if not part.ranked:
        return []
    found = [element("h3", "Frames"), histogram([frame.miou for frame in part.ranked])]
    if part.pictures:
        legend = zip(swatches(part.classes), part.classes, strict=True)
        found.append(element("ul", *(element("li", s, escape(name)) for s, name in legend), class_="legend"))
        text = "Errors: wrong pixels are crimson, pixels without truth dark blue."
        found.append(element("p", text, class_="soft"))
        for title, frames in (("Worst frames", part.worst), ("Best frames", part.best)):
            drawn = [frame for frame in frames if frame.row in part.pictures]
            found += [element("h3", title), *(drawn_frame(frame, part) for frame in drawn)] if drawn else []
    listed = {frame.row: frame for frame in (*part.worst, *part.best)}.values()
    few = part.classes if len(part.classes) <= _FEW else []
    rows = [[word(f.name), word(f.scene), bar(f.miou), *(bar(iou) for iou in f.iou[: len(few)])] for f in listed]
    titles = ["frame", "scene", "mIoU", *(f"IoU of {name}" for name in few)]
    caption = f"The {len(part.worst)} worst and {len(part.best)} best of {len(part.ranked)} frames, in %."
    return [*found, element("h3", "Worst and best frames as a table"), sortable(caption, titles, rows)]


def drawn_frame(frame: FrameScore, part: SetReport) -> str:
    """A frame's pictures under its score."""
    drawn = part.pictures[frame.row]
    score = f"mIoU {100 * frame.miou:.2f} %"
    classes = zip(part.classes, frame.iou, strict=True)
    detail = ", ".join(f"{name} {100 * iou:.1f}" for name, iou in classes if iou == iou)
    titles = {
        "image": "the image",
        "truth": "the true classes over the image",
        "prediction": f"the predicted classes over the image, {score}",
        "errors": "wrong pixels in crimson",
    }
    figures = [picture(getattr(drawn, kind), f"Frame {frame.name}: {text}", kind) for kind, text in titles.items()]
    return element(
        "article",
        element("h4", escape(f"{frame.name}: {score}")),
        element("p", escape(f"scene {frame.scene or 'not named'}; IoU in %: {detail}"), class_="soft"),
        element("div", *figures, class_="pictures"),
        class_="frame card",
    )


def histogram(values: Sequence[float]) -> str:
    """How many frames have which mIoU, as a picture that says its main points in words, too."""
    counts, _ = np.histogram(values, _BINS, (0, 1))
    width, height, step = 600, 150, 30
    tallest = counts.max()
    bars = []
    for place, count in enumerate(counts.tolist()):
        tall = (height - 22) * count / tallest
        low, high = (100 * edge // _BINS for edge in (place, place + 1))
        box = {"x": f"{place * step + 1}", "y": f"{height - tall:.1f}", "width": f"{step - 2}", "height": f"{tall:.1f}"}
        bars.append(element("rect", element("title", f"{count} frames from {low} to {high} %"), **box))
    ticks = [
        element("text", f"{mark} %", x=f"{mark * width / 100:.0f}", y=f"{height + 16}", text_anchor=anchor)
        for mark, anchor in ((0, "start"), (25, "middle"), (50, "middle"), (75, "middle"), (100, "end"))
    ]
    ticks.append(element("text", f"{tallest} frames", x="0", y="14"))
    axis = element("line", x1="0", x2=f"{width}", y1=f"{height}", y2=f"{height}")
    low, middle, high = (100 * value for value in np.quantile(values, [0, 0.5, 1]))
    words = f"mIoU of single frames: from {low:.1f} to {high:.1f} %, half of them below {middle:.1f} %."
    drawing = element("svg", *bars, axis, *ticks, viewBox=f"0 0 {width} {height + 22}", role="img", aria_label=words)
    return element("figure", drawing, element("figcaption", words))


def score_map_parts(part: SetReport) -> list[str]:
    """What the text of every class finds in some frames."""
    if not part.score_maps:
        return []
    text = (
        "The cosine of every image patch with the text of a class, before masks are predicted: dark is low, bright "
        "high, on one scale for all classes of a frame."
    )
    found = [element("h3", "Score maps of the textual queries"), element("p", text)]
    names = {frame.row: frame.name for frame in part.ranked}
    for row, drawn in part.score_maps.items():
        figures = [picture(drawn.image, f"Frame {names[row]}: the image", "image")]
        for name, uri in zip(part.classes, drawn.maps, strict=True):
            figures.append(picture(uri, f"Frame {names[row]}: where the text {name} fits, brighter is better", name))
        scale = element("p", f"Cosines from {drawn.low:.3f} to {drawn.high:.3f}.", class_="soft")
        grid = element("div", *figures, class_="maps")
        found.append(element("article", element("h4", escape(names[row])), scale, grid, class_="frame card"))
    return found


# -- comparison -----------------------------------------------------------------------------------------


def comparison_parts(found: Comparison) -> list[str]:
    """Both runs side by side, with what speaks against comparing them."""
    a, b = found.runs
    parts = [element("h3", escape(f"Comparison of {a} and {b}"))]
    parts += [element("p", f"<strong>Warning:</strong> {escape(say(w))}", class_="warning") for w in found.warnings]
    parts.append(element("ul", *(element("li", escape(say(message))) for message in key_findings(found))))
    titles = ["scene", "frames", f"{a} mIoU", f"{b} mIoU", "difference", "mark"]
    rows = [[*comparison_cells(row), word(ARROWS[found.mark(row)])] for row in found.scenes]
    rows.append([*comparison_cells(found.overall), word("")])
    parts.append(sortable("Scenes, in %; differences in percentage points.", titles, rows, whole=True))
    parts += [element("p", escape(say(message)), class_="soft") for message in explanations(found)]
    iou = zip(found.classes, found.overall.iou.T.tolist(), strict=True)
    rows = [[word(name), bar(x), bar(y, "second"), difference((y - x) * 100)] for name, (x, y) in iou]
    titles = ["class", f"{a} IoU", f"{b} IoU", "difference"]
    parts.append(sortable("Classes, over all frames, in %; differences in percentage points.", titles, rows))
    for group in found.groups:
        titles = [group.name, "frames", f"{a} mIoU", f"{b} mIoU", "difference"]
        parts.append(sortable(f"By {group.name}, in %.", titles, map(comparison_cells, group.rows)))
    return parts


def comparison_cells(row: Row) -> list[Cell]:
    """Name, frames, both scores and their difference."""
    frames = " / ".join(map(str, dict.fromkeys(row.frames)))
    (first, second), frames = row.miou, number(max(row.frames), frames)
    return [word(row.name), frames, bar(first), bar(second, "second"), difference(row.difference)]


def difference(value: float) -> Cell:
    """Percentage points with their sign."""
    return number(value, points(value), "up" if value > 0 else "down" if value < 0 else "")
