"""The page of an evaluation: what the templates show.

Letters: R frames, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..data.palette import class_colours
from ..evaluation.figures import (
    FIGURES,
    absent_lines,
    left_out_lines,
    mean_over,
    miou_text,
    percent,
    short_protocol,
    sizes_text,
)
from .comparison import Comparison
from .comparison_text import ARROWS, classes_text, explanations, key_findings, points, say
from .images import FrameImages, ScoreMaps

# The first lines of a page.
BEGINS = (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="generator" content="tqdm-seg report">'
)


class FrameScore(NamedTuple):
    """A frame: number in the table, name, scene, mIoU, of how many classes, and every IoU; NaN where undefined."""

    row: int
    name: str
    scene: str
    miou: float
    classes: int
    iou: list[float]


@dataclass
class SetReport:
    """What the page says about one set. ranked: its frames that have a score, the worst first."""

    name: str
    results: dict[str, Any]
    ranked: list[FrameScore]
    worst: list[FrameScore]
    best: list[FrameScore]
    images: dict[int, FrameImages] = field(default_factory=dict)
    score_maps: dict[int, ScoreMaps] = field(default_factory=dict)
    comparison: Comparison | None = None


def histogram(frames: Sequence[FrameScore]) -> dict[str, Any]:
    """How many of the frames' mIoU lie in each of 20 bins, and the main points in words."""
    values, over = [frame.miou for frame in frames], sorted({frame.classes for frame in frames})
    classes = f"{over[0]} to {over[-1]}" if len(over) > 1 else over[0]
    counts = np.histogram(values, 20, (0, 1))[0].tolist()
    low, middle, high = (100 * value for value in np.quantile(values, [0, 0.5, 1]))
    words = (
        f"mIoU of single frames, over {classes} of {len(frames[0].iou)} classes each: from {low:.1f} to {high:.1f} %, "
        f"half of them below {middle:.1f} %."
    )
    return {"counts": counts, "tallest": max(counts), "words": words}


def render_page(results: dict[str, Any], sets: Sequence[SetReport]) -> str:
    """The whole page, one HTML file. results: what results.json holds."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {
        "colours": lambda names: [f"rgb{tuple(colour)}" for colour in class_colours(len(names)).tolist()],
        "explanations": explanations,
        "absent_lines": absent_lines,
        "left_out_lines": left_out_lines,
        "classes_text": classes_text,
        "histogram": histogram,
        "mean_over": mean_over,
        "miou_text": miou_text,
        "iou_of": "IoU of {}".format,
        "key_findings": key_findings,
        "percent": percent,
        "points": points,
        "say": say,
        "short_protocol": short_protocol,
        "sizes": sizes_text,
    }
    template = environment.get_template("report.html.j2")
    return template.render(model=results["model"], mean=results.get("mean"), sets=sets, figures=FIGURES, arrows=ARROWS)
