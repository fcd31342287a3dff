"""Model folders: find or download one, load it, identify it, write it, push it to the Hub.

A model loads with the classes of this package, so no code from its folder runs.
"""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from tqdm_seg.configuration_tqdm import TqdmConfig
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

from .. import __version__
from ..data.files import MARK, SYSTEM_FILES, read_json, replace_folder
from ..env import code_commit

_CONFIGURATIONS = ("config.json", "preprocessor_config.json")


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
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"file not found: {name}, nor is it on the Hub ({reason})") from error


def load_model(folder: Path) -> tuple[TqdmForSemanticSegmentation, TqdmImageProcessor]:
    """Model in eval mode, in float32, and image processor.

    Raises FileNotFoundError or ValueError, naming the file, for another kind of model, and for weights that are
    damaged, missing, unknown, or of another shape.
    """
    check_model_folder(folder)
    with _quiet_transformers():
        try:
            model, loading = TqdmForSemanticSegmentation.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True,
                use_safetensors=True,
            )  # fmt: skip
            processor = TqdmImageProcessor.from_pretrained(folder)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
            raise ValueError(f"cannot load {folder}: {error}") from error
    wrong = {
        "missing": sorted(loading["missing_keys"]),
        "unknown": sorted(loading["unexpected_keys"]),
        "of another shape": sorted(name for name, *_ in loading["mismatched_keys"]),
    }
    found = [f"{len(names)} {kind}, such as {names[0]}" for kind, names in wrong.items() if names]
    if found:
        raise ValueError(
            f"the weights in {folder} do not fit its config.json: {'; '.join(found)}; save or convert the model again"
        )
    return model.eval(), processor


def check_model_folder(folder: Path) -> None:
    """Raises FileNotFoundError or ValueError, naming the file, unless the folder holds a tqdm model's files, whole."""
    for name in _CONFIGURATIONS:
        fields = read_json(folder / name, fix="save, convert or download the model again")
        if name == "config.json" and fields.get("model_type") != TqdmConfig.model_type:
            raise ValueError(
                f"{folder / name}: the model type is {fields.get('model_type')}, not {TqdmConfig.model_type}; "
                "`tqdm-seg convert` makes a model folder of other weights"
            )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise FileNotFoundError(
            f"file not found: {folder}/model.safetensors; save, convert or download the model again"
        )
    for path in weights:
        try:
            with safe_open(path, "pt"):  # reads the header and compares it with the size
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged or no safetensors file ({error}); copy or download it again"
            ) from error


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
    texts: dict[str, str] | None = None,
    program: str = "train",
) -> None:
    """Writes a folder that the Auto classes and `pipeline` load with trust_remote_code=True.

    texts: further files by name, such as the card, README.md. program: that makes it.
    Raises FileExistsError, and changes nothing, when `folder` is a file or holds what this program did not make.
    """
    type(model.config).register_for_auto_class()
    type(model).register_for_auto_class("AutoModelForSemanticSegmentation")
    type(processor).register_for_auto_class("AutoImageProcessor")
    # Saving adds the entries of the three registered classes.
    model.config.auto_map = {"AutoModel": "modeling_tqdm.TqdmModel"}
    with _quiet_transformers(), replace_folder(Path(folder), program) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        for name, text in (texts or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")


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
