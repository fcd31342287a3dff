"""Finished runs on disk: what `tqdm-seg evaluate` and `tqdm-seg ablate` leave behind, as per-frame tables by set."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..data.files import plain_name, read_json
from ..evaluation.baselines import BASELINE_FOLDER, BASELINES, file_name
from ..evaluation.counts import FrameTable, read_table

# Folder of an ablation that holds all per-frame tables, by set, and the file of its figures.
FRAME_FOLDER, ABLATION = "frames", "ablation.json"


@dataclass(frozen=True, eq=False)
class Method:
    """A row of a table: a model of one or several seeds, or a baseline. tables: of every set, one per seed."""

    name: str
    kind: Literal["model", "baseline"]
    tables: dict[str, list[FrameTable]]


def run_tables(folder: Path) -> dict[str, Path]:
    """{set: per-frame table} of a finished evaluation; raises OSError or ValueError for any other folder."""
    fix = "name the --out of a finished tqdm-seg evaluate or tqdm-seg ablate"
    sets = read_json(folder / "results.json", {"sets": {str: dict}}, fix)["sets"]
    return {name: folder / f"{plain_name(name, folder)}.parquet" for name in sets}


def set_table(path: str | Path, name: str | None = None) -> Path:
    """The table of a set in the folder of a finished evaluation; a file is itself.

    name: None where the evaluation has one set. Raises ValueError for several sets without a name, and for a name that
    is not among them, OSError as `run_tables`.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    tables = run_tables(path)
    if name is None and len(tables) > 1:
        raise ValueError(f"{path} has the sets {', '.join(tables)}; say which: --set NAME")
    if name is not None and name not in tables:
        raise ValueError(f"{path} has no set {name[:60]!r}, only {', '.join(tables)}; name one of them by --set")
    return tables[name] if name else next(iter(tables.values()))


def read_methods(texts: Iterable[str]) -> list[Method]:
    """The methods of arguments [NAME=]FOLDER[,FOLDER...], models first, each baseline once.

    Several folders are the seeds of one model. The folder of an ablation stands for its variants. Raises ValueError for
    seeds of other sets and for two methods of one name, OSError for folders that hold no finished run.
    """
    models: dict[str, Method] = {}
    baselines: dict[str, Method] = {}
    for text in texts:
        name, folders = _parts(text)
        read = [_read(folder, name or folder.name) for folder in folders]
        for method in _joined(read, text):
            found = models if method.kind == "model" else baselines
            if method.kind == "baseline" and method.name in found:
                found[method.name].tables.update(method.tables)
            elif method.name in found:
                raise ValueError(f"{text}: two runs are called {method.name}; name one of them: NAME=RUN")
            else:
                found[method.name] = method
    return [*models.values(), *baselines.values()]


def read_notes(texts: Iterable[str]) -> list[str]:
    """What the ablations among these arguments say of their training and of leaks, a sentence each."""
    folders = (folder for text in texts for folder in _parts(text)[1] if (folder / ABLATION).is_file())
    return [note for folder in folders for note in read_json(folder / ABLATION).get("notes", [])]


def _parts(text: str) -> tuple[str, list[Path]]:
    name, equals, rest = text.partition("=")
    if not equals or Path(text).exists():
        name, rest = "", text
    return name, [Path(rest)] if Path(rest).exists() else [Path(part) for part in rest.split(",")]


def _joined(read: list[list[Method]], text: str) -> list[Method]:
    """The methods of several folders as seeds of one each."""
    first, *others = read
    for other in others:
        kinds = [[(method.kind, sorted(method.tables)) for method in of_folder] for of_folder in (first, other)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"{text}: the runs hold other sets or baselines; evaluate every seed on the same sets")
    joined = []
    for methods in zip(*read, strict=True):
        kept = methods if methods[0].kind == "model" else methods[:1]
        tables = {name: [table for method in kept for table in method.tables[name]] for name in methods[0].tables}
        joined.append(Method(methods[0].name, methods[0].kind, tables))
    return joined


def _read(folder: Path, name: str) -> list[Method]:
    """The methods of one folder, of an evaluation or of an ablation."""
    if (folder / ABLATION).is_file():
        return read_ablation(folder)
    tables = run_tables(folder)
    methods = [Method(name, "model", {of_set: [read_table(path)] for of_set, path in tables.items()})]
    return methods + _baselines(folder / BASELINE_FOLDER, list(tables))


def read_ablation(folder: Path) -> list[Method]:
    """All variants of an ablation, with their seeds, and the baselines."""
    fields = {"variants": {str: str}, "seeds": [int], "sets": [str]}
    facts = read_json(folder / ABLATION, fields, "run tqdm-seg ablate again")
    methods = []
    for variant, label in facts["variants"].items():
        paths = {
            name: [folder / FRAME_FOLDER / name / f"{variant}_{seed}.parquet" for seed in facts["seeds"]]
            for name in facts["sets"]
        }
        there = {name: of_set for name, of_set in paths.items() if of_set[0].is_file()}
        methods.append(Method(label, "model", {name: list(map(read_table, of_set)) for name, of_set in there.items()}))
    return methods + _baselines(folder / FRAME_FOLDER, facts["sets"])


def _baselines(folder: Path, sets: Iterable[str]) -> list[Method]:
    methods = []
    for name in BASELINES:
        paths = {of_set: folder / of_set / f"{file_name(name)}.parquet" for of_set in sets}
        tables = {of_set: [read_table(path)] for of_set, path in paths.items() if path.is_file()}
        if tables:
            methods.append(Method(name, "baseline", tables))
    return methods
