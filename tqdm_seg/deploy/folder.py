"""Model folders: find or download one, load it, identify it, write it, push it to the Hub.

A model loads with the classes of this package, so no code from its folder runs.
"""

import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from transformers.utils import logging

from tqdm_seg.configuration_tqdm import TqdmConfig
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

from .. import __version__
from ..data.files import MARK, SYSTEM_FILES, cut, plain_name, read_json, replace_folder
from ..env import code_commit
from .checkpoints import check_finite, check_safetensors
from .self_check import write_self_check

_CONFIGURATIONS = ("config.json", "preprocessor_config.json")
_AGAIN = "save, convert or download the model again"


def model_folder(name: str | Path) -> Path:
    """The folder of a model; downloads a repository of the Hub. Raises FileNotFoundError if there is neither."""
    folder = Path(name)
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():
        raise FileNotFoundError(
            f"file not found: {folder / 'config.json'}, so {folder} is no model folder; `tqdm-seg train` leaves one in "
            "OUT/model"
        )
    if folder.is_absolute() or str(name).startswith(".") or len(folder.parts) > 2:  # no name of a repository
        raise FileNotFoundError(f"file not found: {folder}; name a model folder or a repository of the Hub")
    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # of httpx, of huggingface_hub, of the file system
        reason = cut(error, 120)
        raise FileNotFoundError(f"file not found: {name}, nor is it on the Hub ({reason})") from error


def load_model(folder: Path) -> tuple[TqdmForSemanticSegmentation, TqdmImageProcessor]:
    """Model in eval mode, in float32, and image processor.

    Raises FileNotFoundError or ValueError, naming the file, for another kind of model, and for weights that are
    damaged, missing, unknown, of another shape, no fractions, or not finite.
    """
    types = check_model_folder(folder)
    model, loading = from_pretrained(
        TqdmForSemanticSegmentation, folder, dtype=torch.float32, ignore_mismatched_sizes=True, use_safetensors=True
    )  # fmt: skip
    processor = read_processor(folder)
    check_loading(loading, folder)
    weights = model.state_dict()
    integers = [name for name, kind in types.items() if "F" not in kind and weights[name].is_floating_point()]
    if integers:
        raise ValueError(f"{folder}: the weights {integers[0]} are of type {types[integers[0]]}, not floats; {_AGAIN}")
    check_finite(weights, folder)
    return model.eval(), processor


def warn_untrained(config: TqdmConfig, name: str | Path) -> None:
    """Prints one line if the model is the start of a training."""
    if not config.trained:
        print(f"warning: {name} is not trained, its predictions mean nothing; train it first", file=sys.stderr)


def from_pretrained(kind: type, name: str | Path, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """`kind.from_pretrained`, quietly, and what it says of the weights; raises ValueError with one line of reason."""
    with _quiet_transformers():
        try:
            return kind.from_pretrained(name, output_loading_info=True, **settings)
        except Exception as error:  # whatever the files or the settings cause in the library
            reason = cut(re.sub(r"weights_only\S*", "", str(error)), 150)
            raise ValueError(f"cannot load {name}: {type(error).__name__}: {reason}; {_AGAIN}") from error


def check_loading(loading: dict[str, Any], name: str | Path) -> None:
    """Raises ValueError for weights that are missing, unknown or of another shape, by `output_loading_info`."""
    wrong = {
        "missing": sorted(loading["missing_keys"]),
        "unknown": sorted(loading["unexpected_keys"]),
        "of another shape": sorted(key for key, *_ in loading["mismatched_keys"]),
    }
    found = [f"{len(names)} {kind}, such as {cut(names[0], 70)}" for kind, names in wrong.items() if names]
    if found:
        raise ValueError(
            f"the weights in {name} do not fit its config.json: {'; '.join(found)}; save or convert the model again"
        )


def read_config(folder: Path, again: str = _AGAIN) -> TqdmConfig:
    """The model's configuration; raises FileNotFoundError or ValueError, naming the file, for a damaged one.

    again: what makes the folder once more.
    """
    path = folder / _CONFIGURATIONS[0]
    fields = read_json(path, fix=again)
    if fields.get("model_type") != TqdmConfig.model_type:
        raise ValueError(
            f"{path}: the model type is {cut(fields.get('model_type'))}, not {TqdmConfig.model_type}; "
            "`tqdm-seg convert` makes a model folder of other weights"
        )
    try:
        config = TqdmConfig.from_dict(fields)
        config.check_loadable()
    except Exception as error:  # whatever the fields cause
        raise ValueError(f"{path}: {cut(error, 170)}; {again}") from error
    return config


def read_processor(folder: Path, again: str = _AGAIN) -> TqdmImageProcessor:
    """The model's image processor; raises as `read_config`."""
    path = folder / _CONFIGURATIONS[1]
    fields = read_json(path, fix=again)
    try:
        return TqdmImageProcessor.from_dict(fields)
    except Exception as error:  # whatever the fields cause
        raise ValueError(f"{path}: {cut(error, 170)}; {again}") from error


def check_model_folder(folder: Path) -> dict[str, str]:
    """Types of the weights by name; raises FileNotFoundError or ValueError, naming the file, for a damaged folder."""
    read_config(folder)
    read_processor(folder)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds an adapter, not a whole model; merge it into its model and save that")
    return {name: kind for path in weight_files(folder) for name, kind in check_safetensors(path).items()}


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the parts that its index names; raises FileNotFoundError or ValueError naming the file."""
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file() and not (folder / names[0]).is_file():
        places = read_json(index, {"weight_map": {str: str}}, _AGAIN)["weight_map"]
        if not places:
            raise ValueError(f"{index}: weight_map names no files; {_AGAIN}")
        names = sorted({plain_name(name, index) for name in places.values()})
    if missing := [folder / name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"file not found: {missing[0]}; {_AGAIN}")
    return [folder / name for name in names]


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar and no warnings: what is wrong becomes one error."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def identity(folder: Path) -> dict[str, Any]:
    """What tells one model from another: checksums of its files, and the code that runs it."""
    files = [*sorted(folder.glob("*.safetensors")), *(folder / name for name in _CONFIGURATIONS)]
    return {"sha256": {path.name: file_sum(path) for path in files}, "commit": code_commit(), "version": __version__}


def file_sum(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def save_model_folder(
    model: TqdmForSemanticSegmentation,
    processor: TqdmImageProcessor,
    folder: str | Path,
    files: dict[str, str | bytes] | None = None,
    program: str = "train",
) -> None:
    """Writes a folder that the Auto classes and `pipeline` load with trust_remote_code=True.

    files: further files by name, such as the card, README.md. program: that makes it.
    Raises FileExistsError, and changes nothing, when `folder` is a file or holds what this program did not make.
    """
    with _quiet_transformers(), replace_folder(Path(folder), program) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        write_self_check(model, temporary)
        for name, content in (files or {}).items():
            (temporary / name).write_bytes(content.encode() if isinstance(content, str) else content)


def push_folder(folder: Path, repository: str) -> str:
    """Uploads the folder to the Hub repository NAME/REPO, which is created if it is new; returns its address.

    HF_ENDPOINT and HF_TOKEN apply. Raises OSError, with the command that tries again, when the Hub does not answer or
    refuses; the folder stays unchanged.
    """
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        return str(
            api.upload_folder(
                folder_path=folder,
                repo_id=repository,
                commit_message="Upload of a trained model",
                ignore_patterns=[MARK, *SYSTEM_FILES],
            )  # fmt: skip
        )
    except Exception as error:  # of httpx, of huggingface_hub, of the token file
        raise OSError(
            f"{repository} could not be pushed ({type(error).__name__}: {error}); nothing is lost, try again with: "
            f"hf upload {repository} {shlex.quote(str(folder))} ."
        ) from error
