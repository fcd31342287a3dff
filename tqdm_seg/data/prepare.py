"""The shared core of all prepare commands: pairs of files in, a finished dataset folder out.

The folder is built as OUT.partial and renamed when whole, so OUT is never half-written. Work is divided by shard. Each
shard holds a fixed slice of the sorted pairs and the hash of what it is made from (options, keys, file sizes), so
running the same command again keeps the shards that still fit and makes the others. On a finished folder it does
nothing. All pixels of every image and label are decoded once, so no broken file gets into a shard.
"""

import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from .files import check_out_folder, files_below, move_folder, write_file, write_mark
from .images import apply_orientation, decode_image, orientation, read_rgb
from .label_maps import IGNORE_INDEX, LabelMap
from .options import PrepareOptions
from .shards import (
    FORMAT_VERSION,
    ROW_GROUP_ROWS,
    Shard,
    StoredFrame,
    describe_shard,
    index_schema,
    shard_name,
    write_shard,
)

SPLITS = ("train", "validation", "test")
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
    """The frames of one shard, (key, pair) in the order of its rows, and the hash of what the shard is made from."""

    split: str
    number: int
    total: int
    frames: list[tuple[str, Pair]]
    made_from: str

    @property
    def file(self) -> str:
        """Its path under the dataset folder."""
        return shard_name(self.split, self.number, self.total)


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


def read_pair(key: str, pair: Pair, label_map: LabelMap, options: PrepareOptions) -> tuple[StoredFrame, bool]:
    """The frame as it is stored, and whether its label had to be turned by the image's EXIF orientation.

    The image counts as viewers show it, turned by EXIF. A label drawn on the unturned pixels is recognised by its size
    and turned as well. Raises ValueError naming the file.
    """
    data, image = _read(pair.image, "image", lambda content: (content, decode_image(content)))
    pixels = read_rgb(image, f"image {pair.image}")
    labels = _read(pair.label, "label", label_map.labels)
    height, width = pixels.shape[:2]
    unturned = labels.shape != (height, width) and labels.shape[::-1] == image.size
    if unturned:
        labels = apply_orientation(labels, orientation(image))
    if labels.shape != (height, width):
        raise ValueError(
            f"label {pair.label} is {labels.shape[1]}x{labels.shape[0]}, its image {pair.image} {width}x{height} "
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
    return StoredFrame(key, pair.scene, height, width, data, path, png.getvalue(), counts), unturned


def _read(path: Path, what: str, decode: Callable[[bytes], Any]) -> Any:
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{what} {path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{what} {path} {error}") from error


def _encode_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    content = BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=quality)
    return content.getvalue()


def make_shard(folder: Path, label_map: LabelMap, options: PrepareOptions, part: Slice) -> Shard:
    """The finished shard of a slice; an existing one that is made from the same is only read through.

    Raises ValueError for a bad frame, OSError when the shard cannot be written.
    """
    path = folder / part.file
    if path.is_file():
        old = pq.read_metadata(path).metadata or {}
        if json.loads(old.get(b"tqdm_seg", "{}")).get("made_from") == part.made_from:
            return describe_shard(path, part.split, part.number)
    skipped: dict[str, str] = {}
    turned: list[str] = []

    def frames() -> Iterator[StoredFrame]:
        for key, pair in part.frames:
            try:
                frame, was_turned = read_pair(key, pair, label_map, options)
            except ValueError as error:
                if not options.skip_bad:
                    raise ValueError(f"{error}; or leave such frames out with --skip-bad") from error
                skipped[key] = str(error)
                continue
            turned.extend([key] * was_turned)
            yield frame

    facts = {"made_from": part.made_from, "skipped": skipped, "turned": turned}
    try:
        write_shard(path, frames(), len(label_map.classes), facts)
    except OSError as error:
        raise OSError(
            f"cannot write {path} ({error}); finished shards are kept in {folder}: make room, then run the same "
            "command again"
        ) from error
    return describe_shard(path, part.split, part.number)


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
            # Not by fork, which copies locks held by threads of the progress bar and of Arrow.
            with ProcessPoolExecutor(min(options.workers, len(parts)), get_context("spawn")) as pool:
                futures = {pool.submit(make, part): part for part in parts}
                try:
                    for future in as_completed(futures):
                        part = futures[future]
                        done[part.file] = future.result()
                        bar.update(len(part.frames))
                except BrokenProcessPool as error:
                    raise OSError(
                        "a worker was killed, probably out of memory; run the same command again with fewer --workers"
                    ) from error
                finally:
                    pool.shutdown(cancel_futures=True)
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
    usable, skipped = _usable(options, pairs)
    parts, listing = _slices(usable, made_with)
    plan = {"format": FORMAT_VERSION, "options": made_with, "source": listing}
    finished = _finished(options, plan)
    if finished is not None:
        print(f"{options.out} is complete and made from the same files; nothing to do", file=sys.stderr)
        return finished
    folder = _open_partial(options, plan, {part.file for part in parts})
    shards = make_shards(folder, label_map, options, parts)
    for shard in shards:
        for key, reason in shard.facts["skipped"].items():
            skipped[reason].append(key)
    manifest = _manifest(plan, source, label_map, shards, skipped, list(notes))
    _finish(options.out, folder, manifest, shards)
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
            raise ValueError(f"{labels[pair.label]} and {pair.image} share the label {pair.label}; remove one image")
        else:
            labels[pair.label] = pair.image
            frames[pair.split].append((key, pair))
    if missing and not options.skip_bad:
        raise FileNotFoundError(
            f"{len(missing)} images have no label, the first: {missing[0].image} needs {missing[0].label}; add the "
            "labels, or leave such frames out with --skip-bad"
        )
    if not labels:
        left_out = "; ".join(f"{len(keys)} left out: {reason}" for reason, keys in skipped.items())
        raise FileNotFoundError(
            f"{options.root} holds no usable image ({left_out or 'none found'}); see --help for the layout"
        )
    # Neighbours in a drive look alike. A stream that shuffles a few hundred frames at a time needs them far apart.
    frames["train"].sort(key=lambda frame: hashlib.sha256(frame[0].encode()).digest())
    return frames, skipped


def _slices(frames: dict[str, list[tuple[str, Pair]]], options: dict[str, Any]) -> tuple[list[Slice], dict[str, Any]]:
    """The shards to make, and number, bytes and hash of all source files."""
    parts: list[Slice] = []
    count, size, total_hash = 0, 0, hashlib.sha256()
    rows = options["rows_per_shard"]
    for split, members in frames.items():
        starts = range(0, len(members), rows)
        for number, start in enumerate(starts):
            chosen = members[start : start + rows]
            files = [[key, pair.scene, *_sizes(pair)] for key, pair in chosen]
            content = json.dumps([FORMAT_VERSION, options, files], sort_keys=True).encode()
            parts.append(Slice(split, number, len(starts), chosen, hashlib.sha256(content).hexdigest()))
            total_hash.update(json.dumps([split, files]).encode())
            count, size = count + 2 * len(chosen), size + sum(image + label for _, _, image, label in files)
    return parts, {"files": count, "bytes": size, "sha256": total_hash.hexdigest()}


def _sizes(pair: Pair) -> tuple[int, int]:
    return pair.image.stat().st_size, pair.label.stat().st_size


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


def _finished(options: PrepareOptions, plan: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a finished options.out that fits the plan; None when there is work to do."""
    out, manifest_file = options.out, options.out / "manifest.json"
    if not manifest_file.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise FileExistsError(f"{out} exists and is no dataset folder of this program; choose another --out")
        return None
    manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
    changed = _differences(manifest, plan)
    if changed:
        if options.overwrite:
            check_out_folder(out, "prepare", whole=True)
            return None
        raise FileExistsError(
            f"{out} was made with other files or options ({changed}); use another --out, or --overwrite to replace it"
        )
    files = {out / shard["file"]: shard["bytes"] for shard in manifest["shards"]}
    if all(path.is_file() and path.stat().st_size == size for path, size in files.items()):
        return manifest
    print(f"{out} lacks shards or has some of another size; making it again", file=sys.stderr)
    return None


def _partial(out: Path) -> Path:
    out = out.resolve()
    return out.with_name(f"{out.name}.partial")


def _open_partial(options: PrepareOptions, plan: dict[str, Any], files: set[str]) -> Path:
    """The folder to work in, emptied of what does not belong to the plan."""
    folder = _partial(options.out)
    plan_file = folder / "plan.json"
    if plan_file.is_file():
        old = json.loads(plan_file.read_text(encoding="utf-8"))
        # Repaired source files are welcome here: shards made from the old ones are recognised and made again.
        changed = _differences(old | {"source": plan["source"]}, plan)
        if changed and not options.overwrite:
            raise FileExistsError(
                f"cannot resume {folder}: files or options changed ({changed}); repeat the first command, delete this "
                "folder, or use --overwrite to start again"
            )
    elif folder.exists():
        raise FileExistsError(f"{folder} exists and is not from this program; rename it, or choose another --out")
    try:
        (folder / "data").mkdir(parents=True, exist_ok=True)
        for path in (folder / "data").iterdir():
            if f"data/{path.name}" not in files:
                path.unlink()
        write_file(plan_file, json.dumps(plan).encode())
        write_mark(folder, "prepare")
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


def _finish(out: Path, folder: Path, manifest: dict[str, Any], shards: list[Shard]) -> None:
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
        (folder / "plan.json").unlink()
        write_mark(folder, "prepare", files_below(folder))
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
