"""Scenes, frames and images that two sets have in common: `tqdm-seg audit`."""

import sys

from ..commands import start

if __name__ == "__main__":
    sys.exit(start("audit"))


import csv
import io
import json
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from ..program import takes
from .files import check_out_file, check_text, write_file
from .folders import IMAGE_SUFFIXES, split_of, walk
from .images import apply_orientation, orientation
from .options import CPUS, AuditOptions
from .scenes import frame_stamp, minutes_apart, recording_time, scene_identity
from .shards import read_frame, read_index

# Exit statuses: some images could not be read; something was found.
UNREADABLE, LEAKS = 1, 3
# Rows of each check that are printed; --json and --csv get all of them.
PRINTED_ROWS = 20
# Perceptual hash: an image is shrunk to GRID x GRID grey pixels, of whose frequencies the lowest HASH x HASH count.
GRID, HASH = 32, 8
# Grey levels (standard deviation over the grid) below which an image shows nothing that could be recognised.
FLAT = 1.0


class Check(NamedTuple):
    """One question to two sets; `sees` says what its answer covers. `unit` is that of a finding's amount."""

    name: str
    unit: str
    sees: str


SAME_SCENE = Check(
    "same scene", "",
    "Sees scenes of one name, and names of one time behind another letter or with - for _; blind to a scene that was "
    "given another name.",
)  # fmt: skip
NEAR_SCENE = Check(
    "scenes near in time", "minutes",
    "Sees recordings whose names are at most N minutes apart, a missing year being the one that brings them closest; "
    "blind to visits of one place at other times, and to names without a time.",
)  # fmt: skip
SAME_FRAME = Check(
    "same frame", "",
    "Sees frames of one millisecond stamp, of one file name in one recording, or elsewhere of one file name (of one "
    "path, if names repeat within a set), even if they were only numbered alike; blind to frames that were renamed.",
)  # fmt: skip
NEAR_FRAME = Check(
    "frames near in time", "seconds",
    "Sees, for every frame named by a 13-digit millisecond stamp, the nearest other frame within N minutes, as far as"
    " the camera's clock was right; blind to frames with other names.",
)  # fmt: skip
IMAGES = Check(
    "near-duplicate images", "bits",
    "Sees, for every image, the most similar one if it is the same at another size, compression or brightness "
    "(short of clipping), or its close neighbour in a drive; blind to cropped, mirrored and turned ones, and to one "
    "place seen from elsewhere.",
)  # fmt: skip


class NamedFrame(NamedTuple):
    """A frame by its path or key. `scene` is empty where unknown, `read` gives the image file's bytes if any."""

    name: str
    scene: str
    read: Callable[[], bytes] | None = None


@dataclass
class FrameSet:
    """One of the two sets: its frames, and the names of its scenes, those of the frames included; both get sorted."""

    source: str
    frames: list[NamedFrame]
    scenes: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.frames.sort(key=lambda frame: frame.name)
        self.scenes = sorted({*self.scenes, *(frame.scene for frame in self.frames)} - {""})

    @cached_property
    def hashes(self) -> "Hashes":
        """Those of its images, made once for any number of comparisons."""
        return hash_images(self)


class Finding(NamedTuple):
    """What the first set shares with the second; `amount` is in the unit of the check, None where it has none."""

    first: str
    second: str
    amount: float | None
    note: str

    def mirrored(self) -> "Finding":
        """The same, seen from the second set."""
        return self._replace(first=self.second, second=self.first)


@dataclass
class CheckResult:
    """The answer of one check. `skipped` says why there is none; `notes` what was left out of it."""

    check: Check
    findings: list[Finding] = field(default_factory=list)
    skipped: str | None = None
    notes: list[str] = field(default_factory=list)


# -- reading the sets -----------------------------------------------------------------------------------


def read_set(source: str) -> FrameSet:
    """The set that a command-line argument names.

    Raises OSError for what does not exist, is empty or cannot be read, ValueError for impossible or repeated names.
    """
    path = Path(source)
    folder, colon, split = source.rpartition(":")
    if colon and not path.exists() and is_shard_folder(Path(folder)):
        return read_shards(source, folder, split)
    if is_shard_folder(path):
        return read_shards(source, source, None)
    if path.is_dir():
        return read_folder(source)
    if path.is_file():
        return read_list(source)
    raise FileNotFoundError(
        f"file or folder not found: {source}; give a list of names, a folder of images or a prepared dataset"
    )


def is_shard_folder(path: Path) -> bool:
    """By the files that every prepared data set has."""
    return (path / "index.parquet").is_file() or (path / "manifest.json").is_file()


def read_list(source: str) -> FrameSet:
    """Names from a text file: frames if they end like images or have 13 digits, else scenes (the end of a path)."""
    try:
        lines = check_text(Path(source).read_text(encoding="utf-8-sig"), source).splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is no text file; give a list of names, or a folder") from error
    frames: list[NamedFrame] = []
    scenes: list[str] = []
    seen: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        path = PurePosixPath(line.strip())
        if not path.name:
            continue
        try:
            if path.suffix.lower() in IMAGE_SUFFIXES or frame_stamp(path.name) is not None:
                identity = str(path)
                frames.append(NamedFrame(identity, scene_of(path.parts[:-1])))
            else:
                identity = scene_identity(path.name)
                scenes.append(path.name)
        except ValueError as error:
            raise ValueError(f"{source}, line {number}: {error}") from error
        where = f"{path} in line {number}"
        if identity in seen:
            raise ValueError(f"{source} lists {identity} twice, as {seen[identity]} and as {where}; leave one out")
        seen[identity] = where
    if not seen:
        raise ValueError(f"{source} is empty; it must hold a name per line")
    return FrameSet(source, frames, scenes)


def read_folder(source: str) -> FrameSet:
    """Images in a folder and below it, links followed, hidden files left out; OSError where a folder is closed."""
    root = Path(source).resolve()
    paths = list(walk(root, once=True))
    if not paths:
        raise FileNotFoundError(f"{source} holds no image ({', '.join(IMAGE_SUFFIXES)}); choose a folder of images")
    in_layout = [path for path in paths if path.parent.name == "image_data"]
    frames = []
    for path in in_layout or paths:
        name = path.relative_to(root)
        try:
            scene = scene_of(name.parent.parts, above=root.parts[-2:])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        frames.append(NamedFrame(name.as_posix(), scene, partial(Path.read_bytes, path)))
    return FrameSet(source, frames)


def read_shards(source: str, folder: str, split: str | None) -> FrameSet:
    """Frames of a prepared data set, or of one split of it, by its index."""
    index = read_index(folder, split)

    def image(row: int) -> bytes:
        return read_frame(index, row)[0]

    names = zip(index.table["key"].to_pylist(), index.table["scene"].to_pylist(), strict=True)
    found = FrameSet(source, [NamedFrame(key, scene, partial(image, row)) for row, (key, scene) in enumerate(names)])
    if not found.frames:
        raise ValueError(f"{source} holds no frames")
    for scene in found.scenes:
        try:
            recording_time(scene)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    return found


def scene_of(folders: Sequence[str], above: Sequence[str] = ()) -> str:
    """Scene of a frame in these folders: the innermost that is named after a time, else the one that holds image_data.

    above: the folders that the set itself lies in; these count only if they are named after a time. Empty when there is
    no such folder, as in ORFD's layout without scenes. Raises ValueError for impossible scene names.
    """
    for folder in reversed((*above, *folders)):
        if recording_time(folder) is not None:
            return folder
    if "image_data" in folders[1:]:
        holder = folders[folders.index("image_data") - 1]
        return "" if split_of(holder) else holder
    return ""


# -- the checks -----------------------------------------------------------------------------------------


def find_same_scenes(first: FrameSet, second: FrameSet) -> CheckResult:
    """Scenes of both sets, exactly or by `scene_identity`."""
    missing = without("scene names", first.scenes, second.scenes)
    if missing:
        return CheckResult(SAME_SCENE, skipped=missing)
    by_identity = defaultdict(list)
    for b in second.scenes:
        by_identity[scene_identity(b)].append(b)
    pairs = [(a, b) for a in first.scenes for b in by_identity[scene_identity(a)]]
    findings = [Finding(a, b, None, "exact" if a == b else "prefix-normalised") for a, b in pairs]
    return CheckResult(SAME_SCENE, findings, notes=timeless(first, second, "compared unchanged"))


def find_near_scenes(first: FrameSet, second: FrameSet, minutes: float | None) -> CheckResult:
    """Scenes of which one began at most `minutes` after the other, without those that are the same."""
    if minutes is None:
        return CheckResult(NEAR_SCENE, skipped="give --minutes N")
    times_of_first, times_of_second = (
        {name: time for name in part.scenes if (time := recording_time(name)) is not None} for part in (first, second)
    )
    missing = without("scene names with a time", times_of_first, times_of_second)
    if missing:
        return CheckResult(NEAR_SCENE, skipped=missing)
    findings = []
    for a, time_a in times_of_first.items():
        for b, time_b in times_of_second.items():
            apart = minutes_apart(time_a, time_b)
            if apart <= minutes and scene_identity(a) != scene_identity(b):
                findings.append(Finding(a, b, apart, "" if time_a.year and time_b.year else "a year is missing"))
    return CheckResult(NEAR_SCENE, findings, notes=timeless(first, second, "not compared"))


def timeless(first: FrameSet, second: FrameSet, consequence: str) -> list[str]:
    """A note on the scene names of each set that hold no time."""
    notes = []
    for part in (first, second):
        names = [name for name in part.scenes if recording_time(name) is None]
        if names:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            notes.append(f"{len(names)} scene names of {part.source} hold no time, {consequence}: {shown}")
    return notes


def find_same_frames(first: FrameSet, second: FrameSet) -> CheckResult:
    """Frames of both sets by `frame_identities`."""
    missing = without("frames", first.frames, second.frames)
    if missing:
        return CheckResult(SAME_FRAME, skipped=missing)
    by_path = any(names_repeat(part.frames) for part in (first, second))
    by_identity = defaultdict(list)
    for frame in second.frames:
        by_identity[frame_identity(frame, by_path)].append(frame.name)
    findings = []
    for frame in first.frames:
        identity = frame_identity(frame, by_path)
        findings += [Finding(frame.name, name, None, identity[0]) for name in by_identity[identity]]
    return CheckResult(SAME_FRAME, findings)


def frame_identity(frame: NamedFrame, by_path: bool) -> tuple[str, ...]:
    """What two names of one frame have in common, behind a word for what it is.

    by_path: a frame outside recordings goes by its whole path, not by its file name alone.
    """
    path = PurePosixPath(frame.name)
    if frame_stamp(path.stem) is not None:
        return "time stamp", path.stem
    if frame.scene and recording_time(frame.scene) is not None:
        return "scene and file name", scene_identity(frame.scene), path.stem
    if by_path:
        return "path", *(folder for folder in path.parts[:-1] if not split_of(folder)), path.stem
    return "file name", path.stem


def names_repeat(frames: Sequence[NamedFrame]) -> bool:
    """Whether file names alone do not tell frames apart, as where every folder counts from 0."""
    return max(Counter(frame_identity(frame, by_path=False) for frame in frames).values()) > 1


def find_near_frames(first: FrameSet, second: FrameSet, minutes: float | None) -> CheckResult:
    """For every stamped frame the nearest one of the other set, if at most `minutes` away; equal stamps left out."""
    if minutes is None:
        return CheckResult(NEAR_FRAME, skipped="give --minutes N")
    stamped = []
    for part in (first, second):
        stamps = ((frame_stamp(PurePosixPath(frame.name).stem), frame.name) for frame in part.frames)
        stamped.append(sorted((stamp, name) for stamp, name in stamps if stamp is not None))
    missing = without("frames named by a millisecond stamp", *stamped)
    if missing:
        return CheckResult(NEAR_FRAME, skipped=missing)
    limit = round(minutes * 60_000)
    pairs = nearest_stamps(*stamped, limit) | {f.mirrored() for f in nearest_stamps(*reversed(stamped), limit)}
    return CheckResult(NEAR_FRAME, list(pairs))


def nearest_stamps(stamped: list[tuple[int, str]], others: list[tuple[int, str]], limit: int) -> set[Finding]:
    """For every (milliseconds, name) the nearest of `others` more than 0 and at most `limit` away; both are sorted."""
    times, other_times = (np.array([time for time, _ in part], np.int64) for part in (stamped, others))
    before = np.searchsorted(other_times, times, "left") - 1
    after = np.searchsorted(other_times, times, "right")
    found = set()
    for (time, name), *neighbours in zip(stamped, before, after, strict=True):
        near = [(abs(others[i][0] - time), others[i][1]) for i in neighbours if 0 <= i < len(others)]
        if near and min(near)[0] <= limit:
            gap, other = min(near)
            found.add(Finding(name, other, gap / 1000, ""))
    return found


def compare_images(first: FrameSet, second: FrameSet, distance: int, wanted: bool) -> tuple[CheckResult, list[str]]:
    """Near-duplicates, and a message for every image that could not be read."""
    if not wanted:
        return CheckResult(IMAGES, skipped="--no-images was given"), []
    missing = without("images", *([f for f in part.frames if f.read is not None] for part in (first, second)))
    if missing:
        return CheckResult(IMAGES, skipped=missing), []
    sides = first.hashes, second.hashes
    result, problems = CheckResult(IMAGES), []
    for part, side in zip((first, second), sides, strict=True):
        problems += [f"{part.source}: {problem}" for problem in side.problems]
        if side.flat:
            result.notes.append(f"{side.flat} images of {part.source} are of one even colour, not compared")
    for i, j, differing in nearest_hashes(sides[0].bits, sides[1].bits, distance):
        result.findings.append(Finding(sides[0].names[i], sides[1].names[j], differing, ""))
    return result, problems


class Hashes(NamedTuple):
    """Names of a set's images and their hashes (n, 64) bool, without `flat` of one even colour and the unreadable."""

    names: list[str]
    bits: np.ndarray
    flat: int
    problems: list[str]


def hash_images(part: FrameSet) -> Hashes:
    """`image_hash` of every frame of a set whose frames have images, on all cores."""
    with ThreadPoolExecutor(CPUS) as pool:  # threads: Pillow decodes and shrinks outside Python's lock
        hashed = pool.map(hash_or_problem, part.frames)
        found = list(tqdm(hashed, part.source, len(part.frames), unit="image", disable=None))
    named = [(f.name, bits) for f, bits in zip(part.frames, found, strict=True) if isinstance(bits, np.ndarray)]
    return Hashes(
        [name for name, _ in named],
        np.array([bits for _, bits in named], bool).reshape(-1, HASH * HASH),
        sum(bits is None for bits in found),
        [problem for problem in found if isinstance(problem, str)],
    )


def hash_or_problem(frame: NamedFrame) -> np.ndarray | None | str:
    """`image_hash`, or what is wrong with the image: one bad file among thousands must not stop the others."""
    try:
        return image_hash(frame.read())
    except UnidentifiedImageError:  # its own text is an address in memory
        reason = "not an image of a known format"
    except Exception as error:  # of broken files Pillow raises almost anything: SyntaxError, struct.error, TypeError
        reason = str(error)
    return f"cannot read {frame.name} ({reason}); copy the file again, convert it or remove it"


def image_hash(content: bytes) -> np.ndarray | None:
    """Perceptual hash (64,) bool: which low frequencies of the grey image are above their median.

    Unlike differences of neighbouring pixels it hardly feels compression noise in skies and snow. None for an image of
    one even colour, where only noise would be hashed. Raises ValueError for more than 8 bits of grey, and what Pillow
    raises for files that it cannot read.
    """
    with Image.open(io.BytesIO(content)) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"mode {image.mode}, more than 8 bits")
        # JPEG is decoded small at once. Not below 4 x GRID: at 2 x GRID fine textures change up to 12 bits.
        image.draft("L", (4 * GRID, 4 * GRID))
        # HAMMING: of Pillow's filters the one under which an image's hash changes least with its size.
        small = image.convert("L").resize((GRID, GRID), Image.Resampling.HAMMING)
        grey = apply_orientation(np.asarray(small), orientation(image)).astype(np.float64)
    if grey.std() < FLAT:
        return None
    frequencies = (_COSINES @ grey @ _COSINES.T).ravel()
    return frequencies > np.median(frequencies)


# The first HASH rows of the discrete cosine transform of GRID values, without its scale.
_COSINES = np.cos(np.pi / GRID * np.outer(np.arange(HASH), np.arange(GRID) + 0.5))


def nearest_hashes(
    first: np.ndarray, second: np.ndarray, distance: int, block: int = 256
) -> list[tuple[int, int, int]]:
    """(i, j, differing bits) where j is nearest to i or i to j, at most `distance` apart; of equals the first is taken.

    first (n, 64), second (m, 64) bool. All n x m pairs are compared, `block` rows at a time, by a matrix product: of
    vectors of 1 and -1 it is 64 - 2 x differing bits, exact in float32. Only the nearest are kept, n + m at most: two
    sets of one drive have millions of near pairs.
    """
    if not len(first) or not len(second):
        return []
    a, b = (np.where(bits, np.float32(1), np.float32(-1)) for bits in (first, second))
    of_first = np.empty(len(a), np.int64)
    of_second, best = np.zeros(len(b), np.int64), np.full(len(b), -np.inf, np.float32)
    for row in range(0, len(a), block):
        agreement = a[row : row + block] @ b.T  # (block, m)
        of_first[row : row + block] = agreement.argmax(1)
        rows = agreement.argmax(0)
        values = agreement[rows, np.arange(len(b))]
        better = values > best
        of_second[better], best[better] = rows[better] + row, values[better]
    pairs = {*zip(range(len(a)), of_first.tolist(), strict=True), *zip(of_second.tolist(), range(len(b)), strict=True)}
    differing = ((i, j, int((first[i] != second[j]).sum())) for i, j in sorted(pairs))
    return [found for found in differing if found[2] <= distance]


def without(what: str, first: Sequence[object], second: Sequence[object]) -> str | None:
    """Why a check that needs `what` in both sets cannot be made, or None."""
    lacking = [part for part, found in (("first", first), ("second", second)) if not found]
    return f"no {what} in the {' and the '.join(lacking)} set" if lacking else None


def make_checks(
    first: FrameSet, second: FrameSet, minutes: float | None, distance: int, images: bool = True
) -> tuple[list[CheckResult], list[str]]:
    """All checks that the two sets allow, their findings sorted, and what was wrong with images."""
    of_images, problems = compare_images(first, second, distance, images)
    results = [
        find_same_scenes(first, second),
        find_near_scenes(first, second, minutes),
        find_same_frames(first, second),
        find_near_frames(first, second, minutes),
        of_images,
    ]
    for result in results:
        result.findings.sort(key=lambda finding: (finding.amount or 0, finding.first, finding.second))
    return results, problems


# -- the report -----------------------------------------------------------------------------------------


def print_report(first: FrameSet, second: FrameSet, results: list[CheckResult]) -> None:
    """What was found, check by check, and one line in the end."""
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    for title, part in (("first ", first), ("second", second)):
        print(f"{title}  {part.source}: {len(part.scenes)} scenes, {len(part.frames)} frames")
    for result in results:
        print(f"\n{result.check.name}: {summary(result)}")
        for text in (result.check.sees, *result.notes):
            print(textwrap.fill(text, 118, initial_indent="  ", subsequent_indent="  "))
        print_findings(result)
    print(f"\n{verdict(results)}")


def verdict(results: list[CheckResult]) -> str:
    """'LEAKS: near-duplicate images 3', or 'no leak; checked: same frame, ...'."""
    leaks = [f"{result.check.name} {len(result.findings)}" for result in results if result.findings]
    made = [result.check.name for result in results if result.skipped is None]
    return f"LEAKS: {', '.join(leaks)}" if leaks else f"no leak; checked: {', '.join(made)}"


def print_findings(result: CheckResult) -> None:
    """The first findings of a check as a table."""
    if not result.findings:
        return
    shown = [(f.first, f.second, found_text(f, result)) for f in result.findings[:PRINTED_ROWS]]
    rows = [("first", "second", "found"), *shown]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for a, b, found in rows:
        print(f"    {a:<{widths[0]}}  {b:<{widths[1]}}  {found}")
    if len(result.findings) > PRINTED_ROWS:
        print(f"    ... and {len(result.findings) - PRINTED_ROWS} more, all in --json and --csv")


def summary(result: CheckResult) -> str:
    """How much a check found."""
    if result.skipped is not None:
        return f"not checked, {result.skipped}"
    if not result.findings:
        return "none"
    counts = [len(set(side)) for side in zip(*((f.first, f.second) for f in result.findings), strict=True)]
    return f"{counts[0]} of the first set, {counts[1]} of the second"


def found_text(finding: Finding, result: CheckResult) -> str:
    """Amount and note in words."""
    amount = "" if finding.amount is None else f"{finding.amount:g} {result.check.unit}"
    return ", ".join(filter(None, (amount, finding.note)))


def as_json(
    first: FrameSet, second: FrameSet, results: list[CheckResult], options: AuditOptions, problems: list[str]
) -> str:
    """Everything that was found, and what it takes to find it again."""
    report = {
        "sets": [{"source": s.source, "scenes": len(s.scenes), "frames": len(s.frames)} for s in (first, second)],
        "options": {"minutes": options.minutes, "distance": options.distance},
        "leaks": any(result.findings for result in results),
        "unreadable": problems,
        "checks": {
            result.check.name: {
                "sees": result.check.sees,
                "unit": result.check.unit,
                "skipped": result.skipped,
                "notes": result.notes,
                "findings": [finding._asdict() for finding in result.findings],
            }
            for result in results
        },
    }
    return json.dumps(report, indent=2, ensure_ascii=False) + "\n"


def as_csv(results: list[CheckResult]) -> str:
    """One row per finding."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["check", "first", "second", "amount", "unit", "note"])
    for result in results:
        for finding in result.findings:
            first, second, amount, note = finding
            writer.writerow([result.check.name, first, second, amount, result.check.unit, note])
    return text.getvalue()


def write_report(out: Path, text: str) -> None:
    """The whole file or none; bytes of file names that are no UTF-8 are written as JSON writes them, \\udce9."""
    write_file(out, text.encode(errors="backslashreplace"))


@takes(AuditOptions)
def audit(options: AuditOptions) -> int:
    """Makes all checks that the two sets allow, prints the report; returns the exit status (see AuditOptions)."""
    for out, begins in ((options.json, '{\n  "sets": ['), (options.csv, "check,first,second,")):
        if out is not None:
            if out.is_dir() or not out.resolve().parent.is_dir():
                raise FileNotFoundError(f"{out} must be a file in a folder that exists")
            check_out_file(out, begins, [options.first, options.second])
    if options.json and options.csv and options.json.resolve() == options.csv.resolve():
        raise ValueError(f"--json and --csv name the same file {options.json}; name two")
    first, second = read_set(options.first), read_set(options.second)
    results, problems = make_checks(first, second, options.minutes, options.distance, options.images)
    if all(result.skipped for result in results):
        reasons = "; ".join(f"{result.check.name}: {result.skipped}" for result in results)
        raise ValueError(f"{options.first} and {options.second} hold nothing that could be compared. {reasons}")
    print_report(first, second, results)
    if options.json:
        write_report(options.json, as_json(first, second, results, options, problems))
    if options.csv:
        write_report(options.csv, as_csv(results))
    if problems:
        print(f"error: {len(problems)} images could not be read:", *problems, sep="\n", file=sys.stderr)
        return UNREADABLE
    return LEAKS if any(result.findings for result in results) else 0
