"""Class texts given as vectors: tables shipped with the package, and .npz files of the same form.

names    (V)     texts, distinct
vectors  (V, E)  floats, of any length but zero
model, source, licence    texts: whose vectors they are, where they come from, under which terms they are passed on
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tqdm_seg.configuration_tqdm import check_distinct

from .files import cut, read_json

LISTS = Path(__file__).parent / "lists"
_PREFIX = "class_vectors_"
SHIPPED = tuple(sorted(path.stem.removeprefix(_PREFIX) for path in LISTS.glob(f"{_PREFIX}*.npz")))
TEXTS = ("model", "source", "licence")
_FORM = f"expected an .npz of names (V), vectors (V, E) and the texts {', '.join(TEXTS)}"


class ClassVectors(NamedTuple):
    """A table. vectors (V, E) float32, of unit length; about: `class_vectors` of `TqdmConfig`."""

    vectors: np.ndarray
    about: dict[str, Any]


def vectors_path(name: str) -> Path:
    """The file of a shipped table, or the file of this name; raises FileNotFoundError for neither."""
    path = LISTS / f"{_PREFIX}{name}.npz" if name in SHIPPED else Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"file not found: {name}; name an .npz file, or a table of the package: {_shipped()}")
    return path


def read_class_vectors(name: str) -> ClassVectors:
    """The table of this name or file; raises FileNotFoundError, or ValueError naming the file and what is wrong."""
    path = vectors_path(name)
    fields = _read_arrays(path)
    names, vectors = fields["names"], fields["vectors"]
    if names.dtype.kind != "U" or names.ndim != 1 or not len(names):
        raise ValueError(f"{path}: names are {_kind(names)} and must be a list of texts; {_FORM}")
    if vectors.dtype.kind != "f" or vectors.ndim != 2 or len(vectors) != len(names) or not vectors.shape[1]:
        raise ValueError(f"{path}: vectors are {_kind(vectors)} and must be floats, {len(names)} (names) by any width")
    try:
        check_distinct(names.tolist(), "names")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    vectors = vectors.astype(np.float64)
    lengths = np.linalg.norm(vectors, axis=1)
    if wrong := [text for text, length in zip(names, lengths, strict=True) if not (np.isfinite(length) and length)]:
        raise ValueError(f"{path}: the vector of {cut(repr(str(wrong[0])))} is zero or not finite; make it again")
    known = names.tolist()
    words = {name: word for name, word in class_words().items() if word in known and name not in known}
    about = {text: str(fields[text]) for text in TEXTS}
    return ClassVectors((vectors / lengths[:, None]).astype(np.float32), {"names": known, "words": words, **about})


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays by name; raises ValueError for a file of another kind, or with other fields."""
    try:
        with np.load(path, allow_pickle=False) as file:
            fields = {key: file[key] for key in ("names", "vectors", *TEXTS) if key in file}
    except Exception as error:  # of zipfile, of zlib, of numpy; an .npy file is no context manager
        raise ValueError(f"{path} is damaged or no .npz without pickles ({cut(error, 80)}); {_FORM}") from error
    if missing := [key for key in ("names", "vectors", *TEXTS) if key not in fields]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; {_FORM}")
    for key in TEXTS:
        if fields[key].dtype.kind != "U" or fields[key].ndim or not str(fields[key]).strip():
            raise ValueError(f"{path}: {key} is {_kind(fields[key])} and must be one text that is not empty; {_FORM}")
    return fields


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape}"


def _shipped() -> str:
    return ", ".join(SHIPPED)


def class_words() -> dict[str, str]:
    """What a table of COCO-Stuff's names calls the classes of RUGD, YCOR, Cityscapes and ORFD; see class_words.json."""
    datasets = read_json(LISTS / "class_words.json", {"words": dict})["words"]
    return {name: word for words in datasets.values() for name, word in words.items()}
