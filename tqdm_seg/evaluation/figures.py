"""Figures of a set and its groups from the counts of its frames, as JSON, CSV and Markdown.

Letters: K classes.
"""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .class_sets import over_text
from .counts import FrameTable
from .groups import NOT_GIVEN
from .metrics import group_sums, scores

# Figures of a whole set, as columns of tables name them.
FIGURES = {"miou": "mIoU", "pixel_accuracy": "pixel accuracy", "frequency_weighted_iou": "frequency-weighted IoU"}
# Of more sizes only the smallest and the largest are printed, of more scenes only the worst.
_SIZES, _SCENES = 3, 40


def set_results(table: FrameTable) -> dict[str, Any]:
    """All figures of a set, its confusion matrix (K, K + 1) and its groups, under their protocol, ready for JSON."""
    matrix = table.counts.sum(0)
    return {
        **scores(torch.from_numpy(matrix), table.classes, table.class_set),
        "matrix": matrix.tolist(),
        "protocol": table.protocol,
        "groups": group_results(table),
    }


def first_difference(found: Any, expected: Any, field: str = "") -> str:
    """Dotted name of the first field of `expected` that `found` lacks or has other, floats to 1e-9; "" for none."""
    parts: Iterable[tuple[Any, Any, str]] = ()
    if isinstance(expected, dict) and isinstance(found, dict):
        parts = ((found.get(name, ...), value, f"{field}.{name}".lstrip(".")) for name, value in expected.items())
    elif isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        parts = ((*both, f"{field}[{number}]") for number, both in enumerate(zip(found, expected, strict=True)))
    elif isinstance(expected, float) and type(found) in (int, float):
        return "" if math.isclose(found, expected, rel_tol=1e-9) else field
    else:
        return "" if type(found) is type(expected) and found == expected else field
    return next(filter(None, (first_difference(*part) for part in parts)), "")


def group_results(table: FrameTable) -> dict[str, list[dict[str, Any]]]:
    """{"scene": figures of every scene, "weather": ...}: every property of the frames that groups them."""
    columns = {"scene": table.scenes, **table.attributes}
    found: dict[str, list[dict[str, Any]]] = {}
    for property_name, values in columns.items():
        if not any(values):
            continue
        keys = [value or NOT_GIVEN for value in values]
        counts, frames = group_sums(table.counts, keys), group_sums(table.num_frames, keys)
        found[property_name] = [
            {
                "name": name,
                "frames": int(frames[name]),
                "pixels": int(matrix.sum()),
                **scores(torch.from_numpy(matrix), table.classes, table.class_set),
            }
            for name, matrix in counts.items()
        ]
    return found


def mean_results(sets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The published average: of each set's figures, every set with the same weight; None where a set has no value."""
    found: dict[str, Any] = {"sets": list(sets), "over": mean_over(list(sets.values()))}
    for name in FIGURES:
        values = [results[name] for results in sets.values()]
        found[name] = None if None in values else sum(values) / len(values)
    return found


def group_csv(results: dict[str, Any]) -> str:
    """A line per group and one, "all", for the set, unrounded, each with the protocol."""
    names = list(results["iou"])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    kinds = [f"{kind}_{name}" for kind in ("iou", "accuracy") for name in names]
    writer.writerow(["by", "name", "frames", "pixels", *FIGURES, "miou_classes", *kinds, "protocol"])
    protocol = protocol_text(results["protocol"])
    pixels = sum(map(sum, results["matrix"]))
    whole = {"name": "", "frames": results["protocol"]["frames"], "pixels": pixels, **results}
    rows = [("all", whole), *((by, row) for by, group in results["groups"].items() for row in group)]
    for by, row in rows:
        figures = [row[name] for name in (*FIGURES, "miou_classes")]
        figures += [row[kind][name] for kind in ("iou", "accuracy") for name in names]
        head = [by, row["name"], row["frames"], row["pixels"]]
        writer.writerow([*head, *("" if value is None else value for value in figures), protocol])
    return text.getvalue()


# -- Markdown -------------------------------------------------------------------------------------------


def closing_lines(results: dict[str, Any]) -> list[str]:
    """What `tqdm-seg evaluate` prints after the sets: all of them in one table, and the model."""
    lines = [*summary_lines(results), ""] if len(results["sets"]) > 1 else []
    model = results["model"]
    if not (model["commit"] or model["version"]):
        return [*lines, f"Saved predictions: {model['path']}."]
    code = f"commit {model['commit']}" if model["commit"] else f"version {model['version'] or 'not known'}"
    return [*lines, f"Model: {model['path']}; code: {code}."]


def set_lines(name: str, results: dict[str, Any]) -> list[str]:
    """A set: its figures, classes, groups, and the protocol that they hold under."""
    figures = ", ".join(f"{title} {percent(results[key])} %" for key, title in FIGURES.items())
    lines = [f"## {name}: {miou_text(results)}", "", f"{figures}.", *absent_lines(results)]
    lines += left_out_lines(results["protocol"])
    if "positive_class" in results:
        lines.append(positive_text(results["positive_class"]))
    lines += ["", *class_lines(results)]
    for by, group in results["groups"].items():
        lines += ["", *group_lines(by, group)]
    return [*lines, "", f"Protocol: {protocol_text(results['protocol'])}."]


def baseline_lines(name: str, results: dict[str, Any]) -> list[str]:
    """A set's figures over those of the baselines, which say what they are worth."""
    data = results["baselines"]["trained_on"]
    rows = {"scored": results, **results["baselines"]["figures"]}
    lines = [f"## {name}: baselines of {data['dataset']}, split {data['split']}", ""]
    lines += [table_line(["", *_set_titles()]), table_line(["---", *["---:"] * len(FIGURES), "---"])]
    for title, figures in rows.items():
        lines.append(table_line([title, *(percent(figures[key]) for key in FIGURES), mean_over([figures])]))
    return lines


def miou_text(results: dict[str, Any]) -> str:
    """'mIoU 71.20 % (mean over 19 classes)'."""
    return f"mIoU {percent(results['miou'])} % (mean over {mean_over([results])})"


def mean_over(results: Sequence[dict[str, Any]]) -> str:
    """'19 classes', '1 of 2 classes', or 'from 16 to 19 of 19 classes' where several results differ."""
    name = results[0].get("protocol", {}).get("class_set", {}).get("name")
    counts = sorted({found["miou_classes"] for found in results})
    text = over_text(counts[-1], len(results[0]["iou"]), name)
    return text if len(counts) == 1 else f"from {counts[0]} to {text}"


def absent_lines(results: dict[str, Any]) -> list[str]:
    """A sentence naming the classes without a pixel in the ground truth, if there are any."""
    absent = [name for name, accuracy in results["accuracy"].items() if accuracy is None]
    return [f"Without a pixel in the ground truth: {', '.join(absent)}."] if absent else []


def positive_text(positive: dict[str, Any]) -> str:
    """Precision, recall, F and IoU of the positive one of two classes."""
    values = ", ".join(
        f"{title} {percent(positive[key])} %"
        for key, title in {"precision": "precision", "recall": "recall", "f_score": "F", "iou": "IoU"}.items()
    )
    return f"{positive['name']} alone: {values}."


def class_lines(results: dict[str, Any]) -> list[str]:
    """Lines of the table of classes. share: of the labelled pixels."""
    labelled = [sum(row) for row in results["matrix"]]
    lines = [table_line(["class", "IoU, %", "accuracy, %", "share, %"]), table_line(["---", *["---:"] * 3])]
    for pixels, (name, iou) in zip(labelled, results["iou"].items(), strict=True):
        share = percent(pixels / sum(labelled) if sum(labelled) else None)
        lines.append(table_line([name, percent(iou), percent(results["accuracy"][name]), share]))
    return lines


def group_lines(by: str, group: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of the table of a set's groups, the worst of them if there are many."""
    ranked = sorted(group, key=lambda row: (row["miou"] is None, row["miou"]))
    shown = group if len(group) <= _SCENES else ranked[:_SCENES]
    lines = [table_line([by, "frames", *(f"{title}, %" for title in FIGURES.values()), "mIoU over"])]
    lines.append(table_line(["---", *["---:"] * (1 + len(FIGURES)), "---"]))
    for row in shown:
        figures = (percent(row[key]) for key in FIGURES)
        lines.append(table_line([row["name"], str(row["frames"]), *figures, mean_over([row])]))
    if len(shown) < len(group):
        lines += ["", f"The {_SCENES} worst of {len(group)}; all are in the files."]
    return lines


def summary_lines(results: dict[str, Any]) -> list[str]:
    """Lines of the table of all sets and their mean."""
    lines = ["## All sets", "", table_line(["set", *_set_titles(), "protocol"])]
    lines.append(table_line(["---", *["---:"] * len(FIGURES), "---", "---"]))
    for name, found in results["sets"].items():
        figures = (percent(found[key]) for key in FIGURES)
        lines.append(table_line([name, *figures, mean_over([found]), short_protocol(found["protocol"])]))
    mean = results["mean"]
    figures = (f"**{percent(mean[key])}**" for key in FIGURES)
    name = f"**mean of {len(mean['sets'])} sets**"
    return [*lines, table_line([name, *figures, mean["over"], "all sets have the same weight"])]


def _set_titles() -> list[str]:
    return [*(f"{title}, %" for title in FIGURES.values()), "mIoU over"]


def protocol_text(protocol: dict[str, Any]) -> str:
    """The whole protocol in one line, without a full stop."""
    labels = protocol["labels"]
    classes = labels["classes"].values()
    data = "{dataset}, split {split}: ".format(**protocol["data"]) if "data" in protocol else ""
    parts = [
        f"{data}{protocol['frames']} frames",
        short_protocol(protocol),
        *([f"images resized: {protocol['resize']}"] if protocol["image_size"] else []),
        protocol["interpolation"],
        f"ground truth {protocol['ground_truth']}, {sizes_text(protocol['ground_truth_size'])}",
        protocol["pooling"],
        f"{len(classes)} classes ({', '.join(classes)}), {labels['ignored']} ignored",
        f"label map {labels['name']}: {labels['policy']}",
    ]
    parts += [f"{line[0].lower()}{line[1:-1]}" for line in left_out_lines(protocol)]
    if "class_set" in protocol:
        parts.append(
            "mean over {name}: {0}".format(", ".join(protocol["class_set"]["classes"]), **protocol["class_set"])
        )
    return "; ".join(parts)


def left_out_lines(protocol: dict[str, Any]) -> list[str]:
    """A sentence for the classes that only the data have and one for those that only the predictions have, by name."""
    left_out = protocol["labels"].get("left_out", {})
    texts = {
        "data": "Left out, as the predictions have no such class: pixels of",
        "predictions": "Wrong wherever predicted, as the data have no such class:",
    }
    return [f"{text} {', '.join(left_out[of])}." for of, text in texts.items() if of in left_out]


def short_protocol(protocol: dict[str, Any]) -> str:
    """What differs most often: size, windows, views, ground truth, precision."""
    mode = protocol["mode"]
    if mode == "slide":
        mode = f"windows of {protocol['window']} every {protocol['stride']} pixels"
    ground_truth = protocol["ground_truth"]
    ground_truth = "" if ground_truth == "at its own size" else f", ground truth {ground_truth}"
    if not protocol["image_size"]:  # nothing is known of how they were made
        return f"{mode}{ground_truth}"
    return (
        f"images {sizes_text(protocol['image_size'])}, {mode}, test-time augmentation: "
        f"{protocol['test_time_augmentation']}{ground_truth}, {protocol['precision']}"
    )


def sizes_text(sizes: dict[str, int]) -> str:
    """'224x224', '224x224 (3) and 720x1280 (5)', or the extremes of many sizes; height x width."""
    if len(sizes) == 1:
        return next(iter(sizes))
    if len(sizes) <= _SIZES:
        return " and ".join(f"{size} ({count})" for size, count in sizes.items())
    by_area = sorted(sizes, key=lambda size: int(size.split("x")[0]) * int(size.split("x")[1]))
    return f"from {by_area[0]} to {by_area[-1]} ({len(sizes)} sizes)"


def percent(share: float | None) -> str:
    """'71.20' for 0.712; a figure that is not defined has none."""
    return "N/A" if share is None else f"{100 * share:.2f}"


def table_line(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return " | ".join(["", *(cell.replace("|", "\\|") for cell in cells), ""]).strip()
