"""Checkpoints of others, read as tensors by restricted readers: no code that a file holds or names ever runs.

.safetensors files, what torch.save wrote (zip archives and the older pickles), and TorchScript archives, as OpenAI
publishes CLIP: programs, of which only the tensors are taken.
"""

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..data.files import cut

_AGAIN = "copy or download it again"


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """State dict of a .safetensors file, a file of torch.save (mmcv's too) or a TorchScript archive, on the CPU.

    Raises ValueError for a file that holds other objects than tensors, numbers and texts: no code of it is run.
    """
    if not path.exists():
        raise FileNotFoundError(f"file not found: {path}")
    check_download(path)
    if path.suffix == ".safetensors":
        check_safetensors(path)
        state: object = load_file(path)
    else:
        state = read_torchscript(path) if _is_torchscript(path) else _read_saved(path)
    if isinstance(state, dict):  # mmcv and open_clip wrap it, and BAAI's training under two other names
        wrapped = (state.get(key) for key in ("state_dict", "model", "module"))
        state = next((inner for inner in wrapped if isinstance(inner, dict)), state)
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        held = f"the keys {list(state)[:8]}" if isinstance(state, dict) else f"a {type(state).__name__}"
        raise ValueError(
            f"{path} holds no state dict but {cut(held, 90)}; expected tensors by name, alone or under 'state_dict'"
        )
    weights = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    check_finite(weights, path)
    return weights


def check_download(path: Path) -> None:
    """Raises ValueError, or OSError for a folder, unless the file may hold weights: no pointer, page or empty file."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file of weights")
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a pointer of Git LFS, not the weights; fetch them with: git lfs pull")
    if not start:
        raise ValueError(f"{path} is empty; {_AGAIN}")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{path} is damaged or no checkpoint but a web page; download the file itself")


def check_safetensors(path: Path) -> dict[str, str]:
    """Types of the tensors by name; raises ValueError naming the file for anything but a whole safetensors file."""
    check_download(path)
    try:
        with safe_open(path, "pt") as file:  # reads the header and compares it with the size
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({cut(error, 80)}); {_AGAIN}") from error


def check_finite(weights: dict[str, Tensor], path: Path) -> None:
    """Raises ValueError naming the first tensor with NaN or inf."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path}: the weights {cut(name)} hold NaN or inf; train again, or {_AGAIN}")


# ---- What torch.save wrote


class _NumpyType:
    """Stands for numpy.dtype: a letter, a size and a byte order, such as f8."""

    def __init__(self, code: str, *_: object):
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


def _numpy_scalar(kind: _NumpyType, data: bytes) -> object:
    """The number that numpy stored; raises UnpicklingError for anything but numbers."""
    if not re.fullmatch(r"[biufc]\d{1,2}", kind.code) or kind.order not in ("<", ">", "|", "="):
        raise pickle.UnpicklingError(f"GLOBAL numpy.{kind.code}")
    return np.frombuffer(data, np.dtype(kind.order.replace("|", "=") + kind.code), 1)[0]


_NUMPY = [
    (_NumpyType, "numpy.dtype"), (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
]  # fmt: skip


def _read_saved(path: Path) -> object:
    """What torch.save wrote: tensors, numbers (numpy's too), texts, lists and dicts; raises ValueError for others."""
    try:
        with torch.serialization.safe_globals(_NUMPY):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile or damaged file makes of the reader
        refused = ", ".join(sorted(set(re.findall(r"GLOBAL (\S+)", str(error)))))
        if not refused:
            raise ValueError(f"{path} is damaged or no checkpoint of torch; {_AGAIN}") from error
        _refuse(path, refused, error)


def _refuse(path: Path, refused: str, error: Exception) -> NoReturn:
    raise ValueError(
        f"{path} holds more than tensors, numbers and texts: {cut(refused, 80)} was refused, as such objects can run "
        "code; ask its author for a .safetensors file, or for one with the state dict alone"
    ) from error


# ---- TorchScript archives


class _Module:
    """Stands for any class of an archive: its fields, and no method. tensors: names of its weights, None for any."""

    tensors: frozenset[str] | None = None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("GLOBAL __setstate__")
        self.__dict__["fields"] = state


class _Storage(str):
    """The name of a kind of storage, such as HalfStorage."""


_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


def _value(value: object, *_: object) -> object:
    return value


def _tensor(base: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    """As torch's `_rebuild_tensor_v2`; raises RuntimeError for a place outside of the storage."""
    return torch.as_strided(base, size, stride, offset).clone()


class _ArchiveReader(pickle.Unpickler):
    """Restores data.pkl of a TorchScript archive: tensors, plain values, and modules without their methods."""

    def __init__(self, archive: zipfile.ZipFile, folder: str):
        super().__init__(io.BytesIO(archive.read(folder + "data.pkl")))
        self.archive, self.folder, self.storages = archive, folder, {}

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in of ours for every name an archive may use."""
        if module == "__torch__" or module.startswith("__torch__."):
            return type(name, (_Module,), {"tensors": self._weights_of(module, name)})
        if module == "torch" and name in _DTYPES:
            return _Storage(name)
        if module == "torch.jit._pickle" and name in (
            "restore_type_tag", "build_intlist", "build_tensorlist", "build_doublelist", "build_boollist"
        ):  # fmt: skip
            return _value
        known = {("torch._utils", "_rebuild_tensor_v2"): _tensor, ("collections", "OrderedDict"): OrderedDict}
        if (module, name) in known:
            return known[module, name]
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")

    def _weights_of(self, module: str, name: str) -> frozenset[str] | None:
        """Parameters and buffers of a class, as its source in the archive lists them."""
        file = f"{self.folder}code/{module.replace('.', '/')}.py"
        if file not in self.archive.namelist():
            return None
        source = self.archive.read(file).decode()
        lists = rf"^class {re.escape(name)}\(\w+\):\n  __parameters__ = \[(.*?)\]\n  __buffers__ = \[(.*?)\]"
        found = re.search(lists, source, re.M)
        return frozenset(re.findall(r'"(.+?)"', found[1] + found[2])) if found else None

    def persistent_load(self, pid: Any) -> Tensor:
        """The storage of a tensor: ("storage", kind, key, device, number of elements)."""
        _, kind, key, _, _ = pid
        if key not in self.storages:
            dtype = _DTYPES[kind]
            data = bytearray(self.archive.read(f"{self.folder}data/{key}"))
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self.storages[key]


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return False


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers of a TorchScript archive by name, as its `state_dict()` has them."""
    try:
        with zipfile.ZipFile(path) as archive:
            folder = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
            module = _ArchiveReader(archive, folder).load()
    except Exception as error:  # whatever a hostile or damaged archive makes of the reader
        if not isinstance(error, pickle.UnpicklingError) or "GLOBAL" not in str(error):
            raise ValueError(f"{path} is damaged or no TorchScript archive; {_AGAIN}") from error
        _refuse(path, str(error).removeprefix("GLOBAL "), error)
    if not isinstance(module, _Module):
        raise ValueError(f"{path} is a TorchScript archive that holds no module; expected a model with weights")
    return dict(_named_tensors(module, "", set()))


def _named_tensors(module: _Module, prefix: str, above: set[int]) -> Iterator[tuple[str, Tensor]]:
    if id(module) in above:
        raise ValueError("a module of the TorchScript archive holds itself; it is no model that torch saved")
    for name, value in module.__dict__.get("fields", {}).items():
        if isinstance(value, Tensor) and (module.tensors is None or name in module.tensors):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _named_tensors(value, f"{prefix}{name}.", above | {id(module)})
