"""The shared core of all prepare commands: pairs of files in, a finished dataset folder out.

The folder is built as OUT.partial and renamed when whole, so OUT is never half-written. Work is divided by shard. Each
shard holds a fixed slice of the sorted pairs and the hash of what it is made from (options, keys, contents of all
files), so running the same command again keeps the shards that still fit and makes the others. On a finished folder
it does nothing: files of the same sizes and times are the same, others are read and compared. All pixels of every
image and label are decoded once, so no broken file gets into a shard.
"""

import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from .files import (
    check_not_input,
    check_out_folder,
    claim_folder,
    files_below,
    move_folder,
    read_mark,
    remove_folder,
    restore_folder,
    write_file,
    write_mark,
)
from .folders import SPLITS
from .images import apply_orientation, decode_image, orientation, read_rgb
from .label_maps import IGNORE_INDEX, LabelMap
from .options import PrepareOptions
from .shards import (
    FORMAT_VERSION,
    ROW_GROUP_ROWS,
    SHARD_NAME,
    Shard,
    StoredFrame,
    describe_shard,
    index_schema,
    read_manifest,
    shard_name,
    write_shard,
)
from .workers import process_pool

_PROGRAM = "prepare"
_NO_LABEL = "no label file"
_CARD = Path(__file__).parent / "templates" / "dataset_card.md"


class Pair(NamedTuple):
    """Where a frame lies. `scene` is empty where the paths do not tell it; `skip`: why the frame has to be left out."""

    split: str
    scene: str
    image: Path
    label: Path | None
    skip: str = ""


@dataclass(frozen=True)
class Source:
    """A dataset as the manifest and the card name it.

    terms: what its licence allows, in one sentence. licence: identifier for the card ("other": see terms).
    published: number of usable frames per split, several where several releases are in circulation.
    """

    name: str
    terms: str
    licence: str = "other"
    published: dict[str, tuple[int, ...]] = field(default_factory=dict)


class Slice(NamedTuple):
    """The frames of one shard, (key, pair) in the order of its rows, and the options that it is made with."""

    split: str
    number: int
    total: int
    frames: list[tuple[str, Pair]]
    options: dict[str, Any]

    @property
    def file(self) -> str:
        """Its path under the dataset folder."""
        return shard_name(self.split, self.number, self.total)

    def made_from(self, hashes: Sequence[tuple[str, str]]) -> str:
        """Hash of all that decides its rows; hashes: of the image and label of every frame."""
        files = [[key, pair.scene, *pair_hashes] for (key, pair), pair_hashes in zip(self.frames, hashes, strict=True)]
        return hashlib.sha256(json.dumps([FORMAT_VERSION, self.options, files], sort_keys=True).encode()).hexdigest()

    def source_hash(self) -> str:
        """`made_from` of the files as they are now."""
        return self.made_from([(_hash(pair.image), _hash(pair.label)) for _, pair in self.frames])


def first_folder(root: Path, *candidates: str) -> Path:
    """The first of the folders under `root` that exists; FileNotFoundError naming them all."""
    for candidate in candidates:
        if (root / candidate).is_dir():
            return root / candidate
    wanted = " or ".join(str(root / candidate) for candidate in candidates)
    raise FileNotFoundError(f"folder not found: {wanted}; name the folder that the downloads were unpacked into")


def images_by_name(images: Iterable[Path]) -> dict[str, Path]:
    """Images by file name; ValueError for a name in two folders, which a list of names cannot tell apart."""
    found: dict[str, Path] = {}
    for image in images:
        if image.name in found:
            raise ValueError(f"{found[image.name]} and {image} have the same name; remove one")
        found[image.name] = image
    return found


# -- one shard ------------------------------------------------------------------------------------------


class ReadPair(NamedTuple):
    """A frame as it is stored, whether its label was turned by the image's EXIF orientation, how many of its pixels
    took the nearest value, and the hashes of both files.
    """

    frame: StoredFrame
    turned: bool
    moved: int
    hashes: tuple[str, str]


def read_pair(key: str, pair: Pair, label_map: LabelMap, options: PrepareOptions) -> ReadPair:
    """Reads and checks a frame.

    The image counts as viewers show it, turned by EXIF. A label drawn on the unturned pixels is recognised by its size
    and turned as well. Raises ValueError naming the file.
    """
    data, image = _read(pair.image, "image", lambda content: (content, decode_image(content)))
    pixels = read_rgb(image, f"image {pair.image}")
    drawn, (labels, moved) = _read(pair.label, "label", lambda content: (content, label_map.read(content)))
    hashes = hashlib.sha256(data).hexdigest(), hashlib.sha256(drawn).hexdigest()
    height, width = pixels.shape[:2]
    unturned = labels.shape != (height, width) and labels.shape[::-1] == image.size
    if unturned:
        labels = apply_orientation(labels, orientation(image))
    if labels.shape != (height, width):
        raise ValueError(
            f"label {pair.label} is {labels.shape[1]}x{labels.shape[0]}, its image {pair.image.name} {width}x{height} "
            "(width x height); use the label that was drawn on this image"
        )
    path = pair.image.name
    if options.link:
        data, path = None, str(pair.image.resolve())
    elif options.jpeg is not None and image.format not in ("JPEG", "MPO"):
        data, path = _encode_jpeg(pixels, options.jpeg), f"{pair.image.stem}.jpg"
    png = BytesIO()
    Image.fromarray(labels).save(png, "PNG", compress_level=1)  # level 6 takes several times as long for little
    counts = np.bincount(labels.ravel(), minlength=IGNORE_INDEX + 1)[: len(label_map.classes)]
    frame = StoredFrame(key, pair.scene, height, width, data, path, png.getvalue(), counts)
    return ReadPair(frame, unturned, moved, hashes)


def _read(path: Path, what: str, decode: Callable[[bytes], Any]) -> Any:
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{what} {path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{what} {path} {error}") from error


def _hash(path: Path) -> str:
    """SHA-256 of a file, "" of one that cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def _encode_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    content = BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=quality)
    return content.getvalue()


def make_shard(folder: Path, label_map: LabelMap, options: PrepareOptions, part: Slice) -> Shard:
    """The finished shard of a slice; an existing one that is made from the same is only read through.

    Raises ValueError for a bad frame, OSError when the shard cannot be written.
    """
    path = folder / part.file
    if path.is_file() and _made_from(path) == part.source_hash():
        return describe_shard(path, part.split, part.number)
    skipped: dict[str, str] = {}
    turned: list[str] = []
    facts: dict[str, Any] = {"skipped": skipped, "turned": turned}

    def frames() -> Iterator[StoredFrame]:
        hashes = []
        for key, pair in part.frames:
            try:
                read = read_pair(key, pair, label_map, options)
            except ValueError as error:
                if not options.skip_bad:
                    raise ValueError(f"{error}; correct it, or leave such frames out with --skip-bad") from error
                skipped[key] = str(error)
                hashes.append((_hash(pair.image), _hash(pair.label)))
                continue
            hashes.append(read.hashes)
            turned.extend([key] * read.turned)
            if read.moved:
                facts.setdefault("moved", {})[key] = read.moved
            yield read.frame
        facts["made_from"] = part.made_from(hashes)

    try:
        write_shard(path, frames(), len(label_map.classes), facts)
    except OSError as error:
        raise OSError(
            f"cannot write {path}: {error.strerror or error}; finished shards are kept: make room, then run the same "
            "command again"
        ) from error
    return describe_shard(path, part.split, part.number)


def _made_from(shard: Path) -> str:
    """What an existing shard says that it is made from; "" for a file that is none."""
    try:
        facts = (pq.read_metadata(shard).metadata or {}).get(b"tqdm_seg", b"{}")
        return str(json.loads(facts).get("made_from", ""))
    except (OSError, ValueError, pa.ArrowException):
        return ""


def make_shards(folder: Path, label_map: LabelMap, options: PrepareOptions, parts: list[Slice]) -> list[Shard]:
    """All shards in the order of `parts`, with a progress bar; after an error no new one is started."""
    make = partial(make_shard, folder, label_map, options)
    done: dict[str, Shard] = {}
    with tqdm(total=sum(len(part.frames) for part in parts), unit="frame", desc=folder.stem) as bar:
        if options.workers <= 1:
            for part in parts:
                done[part.file] = make(part)
                bar.update(len(part.frames))
        else:
            with process_pool(min(options.workers, len(parts))) as pool:
                futures = {pool.submit(make, part): part for part in parts}
                for future in as_completed(futures):
                    part = futures[future]
                    done[part.file] = future.result()
                    bar.update(len(part.frames))
    return [done[part.file] for part in parts]


# -- the whole folder -----------------------------------------------------------------------------------


def make_dataset(
    options: PrepareOptions,
    source: Source,
    label_map: LabelMap,
    pairs: Iterable[Pair],
    notes: Iterable[str] = (),
    **choices: object,
) -> dict[str, Any]:
    """Makes the dataset folder options.out and returns its manifest; does nothing when it is already finished.

    pairs: all frames, in any order, including those to be left out. choices: options of the program that decide which
    frames are taken. notes: what users of the data should know. Keys are the paths of the images under options.root.
    Raises OSError and ValueError that say what to do.
    """
    made_with = {
        "dataset": source.name, "label_map": label_map.name, "label_map_sha256": label_map.sha256,
        "rows_per_shard": options.rows_per_shard, "jpeg": options.jpeg,
        "link": str(options.root.resolve()) if options.link else None, **choices,
    }  # fmt: skip
    inputs = (getattr(options, field.name) for field in fields(options) if field.name != "out")
    check_not_input(options.out, (path for path in inputs if isinstance(path, Path)))
    restore_folder(options.out)
    usable, skipped = _usable(options, pairs)
    parts, listing, times = _slices(usable, made_with)
    plan = {"format": FORMAT_VERSION, "options": made_with, "source": listing}
    finished = _finished(options, plan, parts, times)
    if finished is not None:
        _remove_partial(options.out)
        print(f"{options.out} is complete and made from the same files; nothing to do", file=sys.stderr)
        return finished
    _check_first(usable, label_map, options)
    folder = _open_partial(options.out, {part.file for part in parts})
    try:
        shards = make_shards(folder, label_map, options, parts)
    except ValueError:
        if not any((folder / "data").iterdir()):  # nothing to go on with
            remove_folder(folder)
        raise
    for shard in shards:
        for key, reason in shard.facts["skipped"].items():
            skipped[reason].append(key)
    manifest = _manifest(plan, source, label_map, shards, skipped, list(notes))
    _finish(options.out, folder, manifest, shards, times)
    _report(options.out, manifest)
    return manifest


def _usable(
    options: PrepareOptions, pairs: Iterable[Pair]
) -> tuple[dict[str, list[tuple[str, Pair]]], dict[str, list[str]]]:
    """Frames by split, ordered, and the keys of the others by reason. Raises for missing labels and images."""
    frames: dict[str, list[tuple[str, Pair]]] = {split: [] for split in SPLITS}
    skipped: dict[str, list[str]] = defaultdict(list)
    labels: dict[Path, Path] = {}
    missing: list[Pair] = []
    for pair in sorted(pairs, key=lambda pair: pair.image):
        key = pair.image.relative_to(options.root).as_posix()
        if pair.skip:
            skipped[pair.skip].append(key)
        elif not pair.label.is_file():
            missing.append(pair)
            skipped[_NO_LABEL].append(key)
        elif pair.label in labels:
            raise ValueError(
                f"{labels[pair.label].name} and {pair.image.name} share the label {pair.label}; remove one image"
            )
        else:
            labels[pair.label] = pair.image
            frames[pair.split].append((key, pair))
    if missing and not options.skip_bad:
        raise FileNotFoundError(
            f"{len(missing)} images have no label, the first: {missing[0].image.name} needs {missing[0].label}; add "
            "the labels, or leave such frames out with --skip-bad"
        )
    if not labels:
        left_out = "; ".join(f"{len(keys)} left out: {reason}" for reason, keys in skipped.items())
        raise FileNotFoundError(
            f"{options.root} holds no usable image ({left_out or 'none found'}); see --help for the layout"
        )
    # Neighbours in a drive look alike. A stream that shuffles a few hundred frames at a time needs them far apart.
    frames["train"].sort(key=lambda frame: hashlib.sha256(frame[0].encode()).digest())
    return frames, skipped


def _slices(
    frames: dict[str, list[tuple[str, Pair]]], options: dict[str, Any]
) -> tuple[list[Slice], dict[str, Any], str]:
    """The shards to make; number, bytes and hash of the names and sizes of all source files; hash of their times."""
    parts: list[Slice] = []
    count, size, names, times = 0, 0, hashlib.sha256(), hashlib.sha256()
    rows = options["rows_per_shard"]
    for split, members in frames.items():
        starts = range(0, len(members), rows)
        for number, start in enumerate(starts):
            chosen = members[start : start + rows]
            stats = [(pair.image.stat(), pair.label.stat()) for _, pair in chosen]
            files = [
                [key, pair.scene, image.st_size, label.st_size]
                for (key, pair), (image, label) in zip(chosen, stats, strict=True)
            ]
            parts.append(Slice(split, number, len(starts), chosen, options))
            names.update(json.dumps([split, files]).encode())
            times.update(json.dumps([[s.st_mtime_ns, s.st_ctime_ns] for pair in stats for s in pair]).encode())
            count, size = count + 2 * len(chosen), size + sum(image + label for _, _, image, label in files)
    return parts, {"files": count, "bytes": size, "sha256": names.hexdigest()}, times.hexdigest()


def _check_first(frames: dict[str, list[tuple[str, Pair]]], label_map: LabelMap, options: PrepareOptions) -> None:
    """Raises ValueError, before anything is written, for a class file that does not fit the masks.

    Looks at the first frame of every split, and for two names without ids for a mask that holds 1.
    """
    for members in filter(None, frames.values()):
        if not options.skip_bad:
            try:
                read_pair(*members[0], label_map, options)
            except ValueError as error:
                raise ValueError(f"{error}; correct it, or leave such frames out with --skip-bad") from error
    if not label_map.counted or len(label_map.classes) != 2:
        return
    found: set[int] = set()
    for members in frames.values():
        for _, pair in members:
            with suppress(OSError, ValueError):
                found.update(np.unique(label_map.labels(pair.label.read_bytes())).tolist())
            if 1 in found:
                return
    if found == {0, IGNORE_INDEX}:
        first, second = label_map.classes
        raise ValueError(
            f"all masks hold 0 and 255 only, and 255 is ignored, so {second!r} would have no pixel; write "
            f"'{first},0' and '{second},255' into the class file (or '{second},1', if 255 is to be ignored)"
        )


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What changed between two plans, in words, "" for nothing."""
    if old["format"] != new["format"]:
        return f"format {old['format']}, now {new['format']}"
    before, now = old["options"], new["options"]
    names = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
    if "label_map" in names:
        names.remove("label_map_sha256")
    words = [f"{name} {before.get(name)}, now {now.get(name)}" for name in names]
    if old["source"]["sha256"] != new["source"]["sha256"]:
        counts = [f"{plan['source']['files']} files of {plan['source']['bytes']} bytes" for plan in (old, new)]
        words.append(
            f"source of {counts[0]}, now {counts[1]}" + (" of other names or sizes" * (counts[0] == counts[1]))
        )
    return "; ".join(words)


def _finished(options: PrepareOptions, plan: dict[str, Any], parts: list[Slice], times: str) -> dict[str, Any] | None:
    """The manifest of a finished options.out that fits the plan; None when there is work to do."""
    out = options.out
    if not (out / "manifest.json").is_file():
        check_out_folder(out, _PROGRAM, whole=True)
        return None
    try:
        manifest = read_manifest(out)
        changed = _differences(manifest, plan) or _changed_content(out, parts, times)
    except ValueError as error:
        manifest, changed = {}, str(error)
    if changed and not options.overwrite:
        raise FileExistsError(
            f"{out} was made with other files or options ({changed}); use another --out, or --overwrite to replace it"
        )
    if not changed:
        files = {out / shard["file"]: shard["bytes"] for shard in manifest["shards"]}
        if all(path.is_file() and path.stat().st_size == size for path, size in files.items()):
            return manifest
        print(f"{out} lacks shards or has some of another size; making it again", file=sys.stderr)
    check_out_folder(out, _PROGRAM, whole=True)
    return None


def _changed_content(out: Path, parts: list[Slice], times: str) -> str:
    """Which source files hold something else than when `out` was made, "" for none.

    Files of the same times and sizes are taken as the same; else all are read.
    """
    mark = read_mark(out) or {}
    if mark.get("source_times") == times:
        return ""
    there = [part for part in parts if (out / part.file).is_file()]
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(Slice.source_hash, there)
        found = list(tqdm(hashes, "comparing files", len(there), unit="shard", leave=False))
    for part, made_from in zip(there, found, strict=True):
        if made_from != _made_from(out / part.file):
            return f"the content of files behind {part.file} changed, of which {part.frames[0][0]} is the first"
    if mark:
        write_mark(out, _PROGRAM, mark.get("files"), source_times=times)
    return ""


_AROUND_SHARDS = ("manifest.json", "index.parquet", "README.md")


def _partial(out: Path) -> Path:
    out = out.resolve()
    return out.with_name(f"{out.name}.partial")


def _remove_partial(out: Path) -> None:
    """Removes what a killed --overwrite left next to a finished folder, unless it holds anything of somebody else's."""
    folder = _partial(out)
    if folder.is_dir() and (read_mark(folder) is not None or not files_below(folder)):
        claim_folder(folder, _PROGRAM)  # removes temporary files
        if all(name in _AROUND_SHARDS or SHARD_NAME.fullmatch(name) for name in files_below(folder)):
            remove_folder(folder)


def _open_partial(out: Path, files: set[str]) -> Path:
    """The folder to work in, without what does not belong to the plan. Shards made from something else get replaced."""
    folder = _partial(out)
    try:
        claim_folder(folder, _PROGRAM)
        (folder / "data").mkdir(exist_ok=True)
        for name in _AROUND_SHARDS:
            (folder / name).unlink(missing_ok=True)
        for path in (folder / "data").iterdir():
            if SHARD_NAME.fullmatch(f"data/{path.name}") and f"data/{path.name}" not in files:
                path.unlink()
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(f"cannot write {folder} ({error}); choose an --out where files can be made") from error
    return folder


def _manifest(
    plan: dict[str, Any],
    source: Source,
    label_map: LabelMap,
    shards: list[Shard],
    skipped: dict[str, list[str]],
    notes: list[str],
) -> dict[str, Any]:
    rows: dict[str, int] = defaultdict(int)
    pixels: dict[str, int] = defaultdict(int)
    class_pixels: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(len(label_map.classes), np.int64))
    for shard in shards:
        split, table = shard.record["split"], shard.index
        rows[split] += shard.record["rows"]
        values = table["class_pixels"].combine_chunks().flatten().to_numpy()
        class_pixels[split] += values.reshape(-1, len(label_map.classes)).sum(0)
        heights, widths = (table[side].to_numpy().astype(np.int64) for side in ("height", "width"))
        pixels[split] += int((heights * widths).sum())
    for split, expected in source.published.items():
        if rows[split] not in expected:
            notes.append(f"{rows[split]} {split} frames were found; published: {' or '.join(map(str, expected))}")
    for split, values in class_pixels.items():
        empty = [name for name, count in zip(label_map.classes, values, strict=True) if not count]
        if empty and rows[split]:
            notes.append(f"no pixel in {split}: {', '.join(empty)}")
    moved = [count for shard in shards for count in shard.facts.get("moved", {}).values()]
    if moved:
        notes.append(
            f"{sum(moved)} pixels in {len(moved)} masks took the nearest value, at most {label_map.tolerance} away"
        )
    turned = sorted(key for shard in shards for key in shard.facts["turned"])
    return plan | {
        "dataset": source.name, "terms": source.terms, "licence": source.licence, "classes": list(label_map.classes),
        "ignore_index": IGNORE_INDEX, "row_group_rows": ROW_GROUP_ROWS,
        "label_map": {"name": label_map.name, "sha256": label_map.sha256, "policy": label_map.policy},
        "rows": {split: count for split, count in rows.items() if count},
        "class_pixels": {split: values.tolist() for split, values in class_pixels.items() if rows[split]},
        "ignored_pixels": {split: pixels[split] - int(class_pixels[split].sum()) for split in rows if rows[split]},
        "notes": notes,
        "labels_turned_by_exif": turned,
        "skipped": {reason: sorted(keys) for reason, keys in sorted(skipped.items())},
        "shards": [shard.record for shard in shards],
    }  # fmt: skip


def _finish(out: Path, folder: Path, manifest: dict[str, Any], shards: list[Shard], times: str) -> None:
    """Index, card and manifest, then the folder takes its name."""
    if not manifest["rows"]:
        raise ValueError(f"every frame was left out, the first because {next(iter(manifest['skipped']))}")
    try:
        content = BytesIO()
        schema = index_schema(len(manifest["classes"]))
        pq.write_table(pa.concat_tables([schema.empty_table(), *(shard.index for shard in shards)]), content)
        manifest["index_sha256"] = hashlib.sha256(content.getvalue()).hexdigest()
        write_file(folder / "index.parquet", content.getvalue())
        write_file(folder / "README.md", card(manifest).encode())
        write_file(folder / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
        files = [*_AROUND_SHARDS, *(shard.record["file"] for shard in shards)]
        write_mark(folder, _PROGRAM, files, source_times=times)
        move_folder(folder, out)
    except OSError as error:
        raise OSError(
            f"cannot finish {out} ({error}); the shards are kept in {folder}: run the command again"
        ) from error


def _report(out: Path, manifest: dict[str, Any]) -> None:
    for split, rows in manifest["rows"].items():
        ignored = manifest["ignored_pixels"][split]
        share = ignored / max(ignored + sum(manifest["class_pixels"][split]), 1)
        print(f"{split}: {rows} frames, {share:.2%} of the pixels ignored", file=sys.stderr)
    for reason, keys in manifest["skipped"].items():
        print(f"left out: {len(keys)}, {reason}", file=sys.stderr)
    for note in manifest["notes"]:
        print(f"note: {note}", file=sys.stderr)
    print(f"{out} is complete", file=sys.stderr)


def card(manifest: dict[str, Any]) -> str:
    """README.md of the folder, which is also the dataset card on the Hub; its `configs:` say where the splits lie."""
    from huggingface_hub import DatasetCard, DatasetCardData

    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in manifest["rows"]]
    data = DatasetCardData(
        license=manifest["licence"], task_categories=["image-segmentation"],
        configs=[{"config_name": "default", "data_files": files}],
    )  # fmt: skip
    return str(DatasetCard.from_template(data, template_path=_CARD, **manifest))
