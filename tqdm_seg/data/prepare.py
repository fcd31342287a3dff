"""What the programs in dataset_scripts/ share: pairs of files in, a finished dataset folder out.

The folder is built as OUT.partial and renamed when whole, so OUT is never half-written. Work is divided by shard: each
is made of a fixed slice of the sorted pairs and carries the hash of what it was made from (options, keys, file sizes),
so running the same command again keeps the shards that still fit and makes the others. On a finished folder it does
nothing. All pixels of every picture and label are decoded once, so no broken file gets into a shard.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import ExifTags, Image
from tqdm import tqdm

from .files import write_whole
from .images import decode_picture, shown_size, turned
from .label_maps import IGNORE_INDEX, LabelMap
from .shards import (
    FORMAT_VERSION,
    ROW_GROUP_ROWS,
    Row,
    Shard,
    describe_shard,
    index_schema,
    shard_name,
    write_shard,
)

SPLITS = ("train", "validation", "test")
_NO_LABEL = "no label file"


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


class Job(NamedTuple):
    """What every worker needs besides its slice."""

    folder: Path
    label_map: LabelMap
    jpeg: int | None
    link: bool
    skip_bad: bool


class Slice(NamedTuple):
    """The frames of one shard, (key, pair) in the order of its rows, and the hash of what the shard is made from."""

    split: str
    number: int
    total: int
    frames: list[tuple[str, Pair]]
    made_from: str

    @property
    def file(self) -> str:
        return shard_name(self.split, self.number, self.total)


# -- command line ---------------------------------------------------------------------------------------


def prepare_parser(description: str, more: str | None = None) -> argparse.ArgumentParser:
    """The arguments that all programs have; description: the program's docstring; more: a second source folder."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", metavar="ROOT", type=Path, help="folder with the pictures, as described above")
    if more is not None:
        parser.add_argument(more.lower(), metavar=more, type=Path, help="folder with the labels, as described above")
    parser.add_argument("out", metavar="OUT", type=Path, help="dataset folder to make; OUT.partial until it is whole")
    work = parser.add_argument_group("work")
    work.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    work.add_argument("--overwrite", action="store_true", help="replace an OUT made from other files or options")
    work.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out frames that are broken, unlabelled or of unfitting size, and list them in the manifest "
        "(default: stop at the first)",
    )
    stored = parser.add_argument_group("what is stored")
    stored.add_argument(
        "--rows-per-shard", type=int, default=128, help="frames per Parquet file (default: %(default)s)"
    )
    pictures = stored.add_mutually_exclusive_group()
    pictures.add_argument(
        "--link",
        action="store_true",
        help="store the full paths of the pictures instead of their bytes: small shards, for this machine only",
    )
    pictures.add_argument(
        "--jpeg",
        type=int,
        metavar="QUALITY",
        help="re-encode pictures that are no JPEG, 1 to 95: smaller and not the original any more (default: off)",
    )
    return parser


def first_folder(root: Path, *candidates: str) -> Path:
    """The first of the folders under `root` that exists; FileNotFoundError naming them all."""
    for candidate in candidates:
        if (root / candidate).is_dir():
            return root / candidate
    wanted = " or ".join(str(root / candidate) for candidate in candidates)
    raise FileNotFoundError(f"there is no folder {wanted}; name the folder that the downloads were unpacked into")


def by_name(images: Iterable[Path]) -> dict[str, Path]:
    """Pictures by file name; ValueError for a name in two folders, which a list of names cannot tell apart."""
    found: dict[str, Path] = {}
    for image in images:
        if image.name in found:
            raise ValueError(f"{found[image.name]} and {image} have the same name; remove one")
        found[image.name] = image
    return found


# -- one shard ------------------------------------------------------------------------------------------


def read_row(key: str, pair: Pair, job: Job) -> tuple[Row, bool]:
    """The frame as it is stored, and whether its label had to be turned with the picture's EXIF orientation.

    The picture counts as its viewers show it, turned by EXIF. A label drawn on the unturned pixels is recognised by its
    size and turned as well. Raises ValueError naming the file.
    """
    data, picture = _read(pair.image, "picture", lambda content: (content, decode_picture(content)))
    labels = _read(pair.label, "label", job.label_map.labels)
    width, height = shown_size(picture)
    unturned = labels.shape != (height, width) and labels.shape[::-1] == picture.size
    if unturned:
        labels = turned(labels, picture.getexif().get(ExifTags.Base.Orientation))
    if labels.shape != (height, width):
        raise ValueError(
            f"label {pair.label} is {labels.shape[1]}x{labels.shape[0]}, its picture {pair.image} {width}x{height} "
            "(width x height); use the label that was drawn on this picture"
        )
    path = pair.image.name
    if job.link:
        data, path = None, str(pair.image.resolve())
    elif job.jpeg is not None and picture.format not in ("JPEG", "MPO"):
        data, path = _jpeg(picture, job.jpeg), f"{pair.image.stem}.jpg"
    png = BytesIO()
    Image.fromarray(labels).save(png, "PNG", compress_level=1)  # level 6 takes several times as long for little
    counts = np.bincount(labels.ravel(), minlength=IGNORE_INDEX + 1)[: len(job.label_map.classes)]
    return Row(key, pair.scene, height, width, data, path, png.getvalue(), counts), unturned


def _read(path: Path, what: str, decode: Callable[[bytes], Any]) -> Any:
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{what} {path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{what} {path} {error}") from error


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    content = BytesIO()
    pixels = turned(np.asarray(picture.convert("RGB")), picture.getexif().get(ExifTags.Base.Orientation))
    Image.fromarray(pixels).save(content, "JPEG", quality=quality)
    return content.getvalue()


def make_shard(job: Job, part: Slice) -> Shard:
    """The finished shard of a slice; one that is there already, made from the same, is only read through.

    Raises ValueError for a bad frame, OSError when the shard cannot be written.
    """
    path = job.folder / part.file
    if path.is_file():
        old = pq.read_metadata(path).metadata or {}
        if json.loads(old.get(b"tqdm_seg", "{}")).get("made_from") == part.made_from:
            return describe_shard(path, part.split, part.number)
    skipped: dict[str, str] = {}
    turned: list[str] = []

    def rows() -> Iterator[Row]:
        for key, pair in part.frames:
            try:
                row, was_turned = read_row(key, pair, job)
            except ValueError as error:
                if not job.skip_bad:
                    raise ValueError(f"{error}; or leave such frames out with --skip-bad") from error
                skipped[key] = str(error)
                continue
            turned.extend([key] * was_turned)
            yield row

    facts = {"made_from": part.made_from, "skipped": skipped, "turned": turned}
    try:
        write_shard(path, rows(), len(job.label_map.classes), facts)
    except OSError as error:
        raise OSError(
            f"cannot write {path} ({error}); finished shards are kept in {job.folder}: make room, then run the same "
            "command again"
        ) from error
    return describe_shard(path, part.split, part.number)


def make_shards(job: Job, parts: list[Slice], workers: int) -> list[Shard]:
    """All shards in the order of `parts`, with a progress bar; after an error no new one is begun."""
    done: dict[str, Shard] = {}
    with tqdm(total=sum(len(part.frames) for part in parts), unit="frame", desc=job.folder.stem) as bar:
        if workers <= 1:
            for part in parts:
                done[part.file] = make_shard(job, part)
                bar.update(len(part.frames))
        else:
            # Not by fork, which copies locks held by threads of the progress bar and of Arrow.
            with ProcessPoolExecutor(min(workers, len(parts)), get_context("spawn")) as pool:
                futures = {pool.submit(make_shard, job, part): part for part in parts}
                try:
                    for future in as_completed(futures):
                        part = futures[future]
                        done[part.file] = future.result()
                        bar.update(len(part.frames))
                except BrokenProcessPool as error:
                    raise OSError(
                        "a worker was killed, most likely for want of memory; run the same command again with fewer "
                        "--workers"
                    ) from error
                finally:
                    pool.shutdown(cancel_futures=True)
    return [done[part.file] for part in parts]


# -- the whole folder -----------------------------------------------------------------------------------


def prepare(
    args: argparse.Namespace,
    source: Source,
    label_map: LabelMap,
    pairs: Iterable[Pair],
    notes: Iterable[str] = (),
    **choices: object,
) -> dict[str, Any]:
    """Makes the dataset folder args.out and returns its manifest; does nothing when it is there already.

    pairs: all frames, in any order, those to be left out included. choices: options of the program that decide which
    frames are taken. notes: what users of the data should know. Keys are the paths of the pictures under args.root.
    Raises OSError and ValueError, whose text says what to do.
    """
    if args.rows_per_shard < 1 or args.workers < 1 or not (args.jpeg is None or 1 <= args.jpeg <= 95):
        raise ValueError("--rows-per-shard and --workers must be 1 or more, --jpeg between 1 and 95")
    options = {
        "dataset": source.name, "label_map": label_map.name, "label_map_sha256": label_map.sha256,
        "rows_per_shard": args.rows_per_shard, "jpeg": args.jpeg,
        "link": str(args.root.resolve()) if args.link else None, **choices,
    }  # fmt: skip
    usable, skipped = _usable(args, pairs)
    parts, listing = _slices(usable, options)
    plan = {"format": FORMAT_VERSION, "options": options, "source": listing}
    finished = _finished(args, plan)
    if finished is not None:
        print(f"{args.out} is complete and made from the same files; nothing to do", file=sys.stderr)
        return finished
    folder = _open_partial(args, plan, {part.file for part in parts})
    job = Job(folder, label_map, args.jpeg, args.link, args.skip_bad)
    shards = make_shards(job, parts, args.workers)
    for shard in shards:
        for key, reason in shard.facts["skipped"].items():
            skipped[reason].append(key)
    manifest = _manifest(plan, source, label_map, shards, skipped, list(notes))
    _finish(args.out, folder, manifest, shards)
    _report(args.out, manifest)
    return manifest


def _usable(
    args: argparse.Namespace, pairs: Iterable[Pair]
) -> tuple[dict[str, list[tuple[str, Pair]]], dict[str, list[str]]]:
    """Frames by split, ordered, and the keys of the others by reason. Raises for missing labels and pictures."""
    frames: dict[str, list[tuple[str, Pair]]] = {split: [] for split in SPLITS}
    skipped: dict[str, list[str]] = defaultdict(list)
    labels: dict[Path, Path] = {}
    missing: list[Pair] = []
    for pair in sorted(pairs, key=lambda pair: pair.image):
        key = pair.image.relative_to(args.root).as_posix()
        if pair.skip:
            skipped[pair.skip].append(key)
        elif not pair.label.is_file():
            missing.append(pair)
            skipped[_NO_LABEL].append(key)
        elif pair.label in labels:
            raise ValueError(f"{labels[pair.label]} and {pair.image} share the label {pair.label}; remove one picture")
        else:
            labels[pair.label] = pair.image
            frames[pair.split].append((key, pair))
    if missing and not args.skip_bad:
        raise FileNotFoundError(
            f"{len(missing)} pictures have no label, the first: {missing[0].image} needs {missing[0].label}; add the "
            "labels, or leave such frames out with --skip-bad"
        )
    if not labels:
        left_out = "; ".join(f"{len(keys)} left out: {reason}" for reason, keys in skipped.items())
        raise FileNotFoundError(
            f"{args.root} holds no usable picture ({left_out or 'none found'}); see --help for the layout"
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


def _finished(args: argparse.Namespace, plan: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a finished args.out that fits the plan; None when there is work to do."""
    out, manifest_file = args.out, args.out / "manifest.json"
    if not manifest_file.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise FileExistsError(f"{out} exists and is no dataset folder of this program; choose another OUT")
        return None
    manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
    changed = _differences(manifest, plan)
    if changed and not args.overwrite:
        raise FileExistsError(f"{out} was made otherwise ({changed}); use another OUT, or --overwrite to replace it")
    if changed:
        return None
    whole = all(
        (out / shard["file"]).is_file() and (out / shard["file"]).stat().st_size == shard["bytes"]
        for shard in manifest["shards"]
    )
    if whole:
        return manifest
    print(f"{out} lacks shards or has some of another size; making these again", file=sys.stderr)
    _reopen(out, manifest, plan)
    return None


def _reopen(out: Path, manifest: dict[str, Any], plan: dict[str, Any]) -> None:
    """Turns a finished folder back into one in work, without its damaged shards."""
    for shard in manifest["shards"]:
        path = out / shard["file"]
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() != shard["sha256"]:
            path.unlink()
    write_whole(out / "plan.json", json.dumps(plan).encode())
    (out / "manifest.json").unlink()
    shutil.rmtree(_partial(out), ignore_errors=True)
    out.rename(_partial(out))


def _partial(out: Path) -> Path:
    out = out.resolve()
    return out.with_name(f"{out.name}.partial")


def _open_partial(args: argparse.Namespace, plan: dict[str, Any], files: set[str]) -> Path:
    """The folder to work in, emptied of what does not belong to the plan."""
    folder = _partial(args.out)
    plan_file = folder / "plan.json"
    if plan_file.is_file():
        old = json.loads(plan_file.read_text(encoding="utf-8"))
        # Repaired source files are welcome here: shards made from the old ones are recognised and made again.
        changed = _differences(old | {"source": plan["source"]}, plan)
        if changed and not args.overwrite:
            raise FileExistsError(
                f"{folder} was begun otherwise ({changed}); repeat the first command, delete this folder, or use "
                "--overwrite to begin anew"
            )
    elif folder.exists():
        raise FileExistsError(f"{folder} exists and was not begun by this program; rename it, or choose another OUT")
    try:
        (folder / "data").mkdir(parents=True, exist_ok=True)
        for path in (folder / "data").iterdir():
            if f"data/{path.name}" not in files:
                path.unlink()
        write_whole(plan_file, json.dumps(plan).encode())
    except OSError as error:
        raise OSError(f"cannot write {folder} ({error}); choose an OUT where files can be made") from error
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
        write_whole(folder / "index.parquet", content.getvalue())
        write_whole(folder / "README.md", card(manifest).encode())
        write_whole(folder / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
        (folder / "plan.json").unlink()
        old = out.resolve().with_name(f"{out.resolve().name}.old")
        if (out / "manifest.json").is_file():
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
        folder.rename(out.resolve())
        shutil.rmtree(old, ignore_errors=True)
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
    splits = list(manifest["rows"])
    data_files = "".join(f"  - split: {split}\n    path: data/{split}-*.parquet\n" for split in splits)
    options = manifest["options"]
    pictures = (
        f"paths of the original files under `{options['link']}`: of use on that machine only"
        if options["link"]
        else f"JPEG of quality {options['jpeg']} (originals that were JPEG: unchanged)"
        if options["jpeg"]
        else "the original files, byte for byte"
    )
    frames = "".join(f"| {split} | {manifest['rows'][split]} |\n" for split in splits)
    totals = {split: max(sum(counts), 1) for split, counts in manifest["class_pixels"].items()}
    classes = "".join(
        f"| {i} | {name} | "
        + " | ".join(f"{manifest['class_pixels'][split][i] / totals[split]:.3%}" for split in splits)
        + " |\n"
        for i, name in enumerate(manifest["classes"])
    )
    skipped = "".join(f"- {len(keys)} left out: {reason}\n" for reason, keys in manifest["skipped"].items())
    notes = "".join(f"- {note}\n" for note in manifest["notes"])
    return f"""---
license: {manifest["licence"]}
task_categories:
- image-segmentation
configs:
- config_name: default
  data_files:
{data_files}---

# {manifest["dataset"]}, prepared for training

{manifest["terms"]}

```python
from datasets import load_dataset

frames = load_dataset("FOLDER OR REPOSITORY", split="{splits[0]}", streaming=True)
frame = next(iter(frames))  # image and label as PIL pictures, key, scene, height, width, class_pixels
```

- Pictures: {pictures}.
- Labels: 8-bit PNG of class ids, 255 ignored. Map `{manifest["label_map"]["name"]}`: {manifest["label_map"]["policy"]}.
- `index.parquet` tells of every frame its shard, row, byte ranges and pixels per class; row r is in row group
  r // {manifest["row_group_rows"]} of its shard. `manifest.json`: counts, skipped files, checksums.
- Rows of `train` are in random order (by hash of the key), those of other splits in order of their keys.
{notes}{skipped}
| split | frames |
|---|---|
{frames}
| id | class | {" | ".join(f"share in {split}" for split in splits)} |
|---|---|{"---|" * len(splits)}
{classes}"""
