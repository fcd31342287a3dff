"""A comparison of two runs as Markdown in English or Chinese, as CSV and as JSON."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from ..evaluation.figures import table_line
from ..evaluation.groups import NOT_GIVEN
from .comparison import Comparison, Message, PairedCounts

# Scenes named: the worst of each run, and the largest gains.
WORST, GAINS = 3, 2
ARROWS = {"up": "↑", "down": "↓", "": ""}
MARKS = (
    "↑ and ↓: above or below the mean of the scenes' differences ({mean}) by more than a standard deviation ({spread})."
)
SCENE_MEAN = "Mean of the scenes, all with the same weight, over {over} classes each: {a} and {b} ({diff})."
INTERVAL = (
    "95 % interval of the Overall difference: {low} to {high} (paired bootstrap over {scenes} scenes, {resamples} "
    "resamples, seed {seed})."
)
# What the Markdown says, in Chinese. Names of scenes, runs and classes stay as they are.
CHINESE = {
    "Comparison of {a} and {b}": "{a} 与 {b} 的对比",
    "Warning": "警告",
    "Scenes": "各场景",
    "Scene": "场景",
    "Frames": "帧数",
    "Difference": "差异",
    "Mean over": "平均类别数",
    "Means are over the classes {classes}.": "平均值仅由以下类别计算：{classes}。",
    "Mark": "标记",
    "Overall": "总体",
    "Class": "类别",
    "Classes, over all frames": "各类别（全部帧）",
    "Key findings": "关键发现",
    "By {name}": "按{name}分组",
    "training list": "训练场景列表",
    "leaked scenes": "泄漏场景",
    "weather": "天气",
    "light": "光照",
    "road": "道路类型",
    "known": "已知",
    "unknown": "未知",
    "all": "全部",
    "without the leaked": "不含泄漏场景",
    "only the leaked": "仅泄漏场景",
    "(no scene)": "（无场景）",
    NOT_GIVEN: "未注明",
    "frames": "帧",
    "scenes": "场景",
    "Differences are percentage points of unrounded values.": "差异为百分点，由未舍入的数值计算。",
    "Overall is computed on the counts of all frames together.": "总体由全部帧的计数合并后计算。",
    SCENE_MEAN: "各场景的平均（权重相同，各为 {over} 个类别）：{a} 与 {b}（{diff}）。",
    MARKS: "↑ 与 ↓：高于或低于各场景差异的均值（{mean}）超过一个标准差（{spread}）。",
    "Overall covers different frames: {frames_a} of {a}, {frames_b} of {b}.": (
        "总体所覆盖的帧不同：{a} 为 {frames_a} 帧，{b} 为 {frames_b} 帧。"
    ),
    "Overall mIoU: {before} % → {after} % ({diff}), over {over} classes.": (
        "总体 mIoU：{before} % → {after} %（{diff}），{over} 个类别的平均。"
    ),
    "{b} is better in {better} and worse in {worse} of {total} scenes.": (
        "共 {total} 个场景，{b} 在 {better} 个中更好，在 {worse} 个中更差。"
    ),
    "Largest gains, over {over} classes: {scenes}.": "最大提升（{over} 个类别）：{scenes}。",
    "Largest loss, over {over} classes: {scenes}.": "最大下降（{over} 个类别）：{scenes}。",
    "Worst scenes of {run}, over {over} classes: {scenes}.": "{run} 最差的场景（{over} 个类别）：{scenes}。",
    INTERVAL: "总体差异的 95 % 区间：{low} 至 {high}（{scenes} 个场景配对自助法，{resamples} 次重采样，种子 {seed}）。",
    "Scenes left out because they are not in {file}: {count}.": "不在 {file} 内而略去的场景：{count} 个。",
    "Leaked scenes: {scenes}.": "泄漏场景：{scenes}。",
    "Left out, as only one run has them, are the classes {classes}.": "仅一方有而略去的类别：{classes}。",
    "No table states its protocol: the runs may have been scored differently.": (
        "两个表均未注明评测协议：两者的评测方式可能不同。"
    ),
    "Found in {run} only ({unit}): {count}, beginning with {first}.": "仅在 {run} 中的{unit}：{count} 个，如 {first}。",
    "Scenes with different numbers of frames: {count}, beginning with {first} ({a} and {b}).": (
        "帧数不同的场景：{count} 个，首个为 {first}（{a} 与 {b}）。"
    ),
    "The ground truth differs in {count} of {total} {unit}, most in class {name}: by {share} % of its pixels.": (
        "{total} 个{unit}中有 {count} 个的真值不同，差异最大的是类别 {name}：为其像素的 {share} %。"
    ),
    "The tables disagree on {name} ({unit}): {count}, beginning with {first}.": (
        "两个表的 {name} 不一致的{unit}：{count} 个，首个为 {first}。"
    ),
    "The protocols differ in {field}: {a} and {b}.": "评测协议的 {field} 不同：{a} 与 {b}。",
    "Only {run} states its protocol.": "只有 {run} 注明了评测协议。",
}


def say(message: Message, language: str = "en") -> str:
    """The sentence in a language, en or zh."""
    values = {k: say(v, language) if isinstance(v, Message) else v for k, v in message.values.items()}
    return (CHINESE[message.text] if language == "zh" else message.text).format(**values)


def as_markdown(found: Comparison, language: str = "en") -> str:
    """The whole comparison for readers, in a language, en or zh."""
    a, b = found.runs
    lines = [f"# {say(Message('Comparison of {a} and {b}', {'a': a, 'b': b}), language)}"]
    for warning in found.warnings:
        lines += ["", f"> **{word('Warning', language)}:** {say(warning, language)}"]
    scenes = row_table(found, "Scene", [*found.scenes, found.overall], language)
    lines += section(word("Scenes", language), [*scenes, "", *bullets(explanations(found), language)])
    lines += section(word("Key findings", language), bullets(key_findings(found), language))
    for group in found.groups:
        title = say(Message("By {name}", {"name": word(group.name, language)}), language)
        lines += section(title, row_table(found, group.name, group.rows, language))
    lines += section(word("Classes, over all frames", language), class_table(found, language))
    return "\n".join(lines) + "\n"


def section(title: str, lines: Sequence[str]) -> list[str]:
    """Lines under a heading."""
    return ["", f"## {title}", "", *lines]


def bullets(messages: Sequence[Message], language: str) -> list[str]:
    """Lines of a list."""
    return [f"- {say(message, language)}" for message in messages]


def row_table(found: Comparison, title: str, rows: Sequence[PairedCounts], language: str) -> list[str]:
    """Lines of a table with a row per set of frames; scenes are marked, Overall is not."""
    marked = title == "Scene"
    titles = [title, "Frames", *(f"{run} mIoU" for run in found.runs), "Difference", "Mean over", *["Mark"] * marked]
    lines = [table_line(word(name, language) for name in titles), table_line(["---", *["---:"] * 5, *["---"] * marked])]
    for row in rows:
        frames = " / ".join(map(str, dict.fromkeys(row.frames)))  # one number where both have as many
        cells = [word(row.name, language), frames, *map(score, row.miou), points(row.difference), classes_text(row)]
        if row is found.overall:
            cells = [*(f"**{cell}**" for cell in cells), *[""] * marked]
        elif marked:
            cells.append(ARROWS[found.mark(row)])
        lines.append(table_line(cells))
    return lines


def classes_text(row: PairedCounts) -> str:
    """'19', '18 / 19' where the runs differ, or '1 of 2': the number of classes that the row's means are over."""
    counts, total = " / ".join(map(str, dict.fromkeys(row.classes))), row.counts.shape[1]
    return counts if counts == str(total) else f"{counts} of {total}"


def classes_span(rows: Sequence[PairedCounts], sides: Sequence[int] = (0, 1)) -> str:
    """'2', '1–2 of 2': numbers of classes that the means of several rows are over, in both runs or one."""
    counts = sorted({row.classes[side] for row in rows for side in sides} or {0})
    span = "–".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    return span if not rows or span == str(rows[0].counts.shape[1]) else f"{span} of {rows[0].counts.shape[1]}"


def class_table(found: Comparison, language: str) -> list[str]:
    """Lines of the table of class IoU."""
    titles = [word("Class", language), *(f"{run} IoU" for run in found.runs), word("Difference", language)]
    lines = [table_line(titles), table_line(["---", *["---:"] * 3])]
    for name, (before, after) in found.class_iou:
        lines.append(table_line([name, score(before), score(after), points((after - before) * 100)]))
    return lines


def explanations(found: Comparison) -> list[Message]:
    """How to read the table of scenes."""
    (a, b), (before, after), (mean, deviation) = found.runs, found.scene_mean, found.spread
    messages = [
        Message("Differences are percentage points of unrounded values."),
        Message("Overall is computed on the counts of all frames together."),
    ]
    if found.class_set:
        classes = ", ".join(found.class_set)
        messages.append(Message("Means are over the classes {classes}.", {"classes": classes}))
    if not found.same_frames:
        values = {"a": a, "b": b, "frames_a": found.overall.frames[0], "frames_b": found.overall.frames[1]}
        messages.append(Message("Overall covers different frames: {frames_a} of {a}, {frames_b} of {b}.", values))
    values = {"a": score(before), "b": score(after), "diff": points((after - before) * 100)}
    messages.append(Message(SCENE_MEAN, values | {"over": classes_span(found.ranked)}))
    values = {"mean": points(mean), "spread": points(deviation).lstrip("+")}
    return [*messages, Message(MARKS, values), *found.notes]


def key_findings(found: Comparison) -> list[Message]:
    """The main results of a comparison."""
    before, after = (f"{100 * miou:.2f}" for miou in found.overall.miou)
    over = classes_text(found.overall)
    values = {"before": before, "after": after, "diff": points(found.overall.difference), "over": over}
    messages = [Message("Overall mIoU: {before} % → {after} % ({diff}), over {over} classes.", values)]
    better = [row for row in reversed(found.ranked) if row.difference > 0]
    worse = [row for row in found.ranked if row.difference < 0]
    values = {"b": found.runs[1], "better": len(better), "worse": len(worse), "total": len(found.ranked)}
    messages.append(Message("{b} is better in {better} and worse in {worse} of {total} scenes.", values))
    gains, loss = "Largest gains, over {over} classes: {scenes}.", "Largest loss, over {over} classes: {scenes}."
    for text, rows in ((gains, better[:GAINS]), (loss, worse[:1])):
        if rows:
            named = ", ".join(f"{row.name} ({points(row.difference)})" for row in rows)
            values = {"scenes": named, "over": classes_span(rows)}
            messages.append(Message(text, values))
    for side, run in enumerate(found.runs):
        worst = sorted(
            (row for row in found.scenes if row.miou[side] == row.miou[side]), key=lambda row: row.miou[side]
        )[:WORST]
        named = ", ".join(f"{row.name} ({score(row.miou[side])})" for row in worst)
        values = {"run": run, "scenes": named, "over": classes_span(worst, [side])}
        messages.append(Message("Worst scenes of {run}, over {over} classes: {scenes}.", values))
    if found.interval is not None:
        values = found.interval._asdict() | {"low": points(found.interval.low), "high": points(found.interval.high)}
        messages.append(Message(INTERVAL, values))
    return messages


def as_csv(found: Comparison) -> str:
    """A line per scene, group and whole, unrounded; empty cells where there is no value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    classes = [f"iou_{side}_{name}" for side in "ab" for name in found.classes]
    columns = ["part", "name", "frames_a", "frames_b", "miou_a", "miou_b", "diff_points", "mark"]
    columns += ["classes_a", "classes_b", *classes, "warning"]
    writer.writerow(columns)
    warning = " ".join(say(message) for message in found.warnings)
    parts = [("scene", row) for row in found.scenes] + [("overall", found.overall)]
    parts += [(group.name, row) for group in found.groups for row in group.rows]
    for part, row in parts:
        numbers = [
            *row.miou,
            row.difference,
            found.mark(row) if part == "scene" else "",
            *row.classes,
            *row.iou.flatten().tolist(),
        ]
        writer.writerow([part, row.name, *row.frames, *("" if n != n else n for n in numbers), warning])
    before, after = found.scene_mean
    means = ["" if value != value else value for value in (before, after, (after - before) * 100)]
    writer.writerow(["scene_mean", "", "", "", *means, *[""] * (3 + len(classes)), warning])
    return text.getvalue()


def as_json(found: Comparison) -> str:
    """Everything, unrounded; null where there is no value."""
    mean, deviation = found.spread
    report = {
        "runs": found.runs,
        "protocols": found.protocols,
        "classes": found.classes,
        "class_set": found.class_set or None,
        "warnings": [say(message) for message in found.warnings],
        "notes": [say(message) for message in explanations(found)],
        "key_findings": [say(message) for message in key_findings(found)],
        "overall": plain_row(found, found.overall),
        "overall_covers_same_frames": found.same_frames,
        "scene_mean": list(map(or_none, found.scene_mean)),
        "better": sum(row.difference > 0 for row in found.ranked),
        "worse": sum(row.difference < 0 for row in found.ranked),
        "difference_of_scenes": {"mean": or_none(mean), "standard_deviation": or_none(deviation)},
        "bootstrap": found.interval and found.interval._asdict(),
        "scenes": [plain_row(found, row) | {"mark": found.mark(row)} for row in found.scenes],
        "groups": {group.name: [plain_row(found, row) for row in group.rows] for group in found.groups},
    }
    return json.dumps(report, indent=2, ensure_ascii=False) + "\n"


def plain_row(found: Comparison, row: PairedCounts) -> dict[str, Any]:
    """A row as JSON holds it."""
    iou = zip(found.classes, row.iou.T.tolist(), strict=True)
    return {
        "name": row.name,
        "frames": row.frames,
        "miou": list(map(or_none, row.miou)),
        "miou_classes": row.classes,
        "diff_points": or_none(row.difference),
        "iou": {name: list(map(or_none, both)) for name, both in iou},
    }


def word(name: str, language: str) -> str:
    """A heading or the name of a group in a language; names of scenes and runs stay as they are."""
    return CHINESE.get(name, name) if language == "zh" else name


def score(value: float) -> str:
    """As the published tables print it."""
    return "N/A" if value != value else f"{value:.4f}"


def points(value: float) -> str:
    """Percentage points as the published tables print them."""
    return "N/A" if value != value else f"{value:+.2f}%"


def or_none(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return None if value != value else value
