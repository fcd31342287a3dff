"""A model folder for programs that compute with it: found or downloaded, loaded whole, and told from every other."""

import json
import os
import shlex
import subprocess
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download

from tqdm_seg.configuration_tqdm import TqdmConfig
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

from ..data.files import written_whole

_CONFIGURATIONS = ("config.json", "preprocessor_config.json")


def model_folder(name: str) -> Path:
    """The folder of a model, downloaded if it is a repository's name; raises FileNotFoundError if there is none."""
    if (Path(name) / "config.json").is_file():
        return Path(name)
    if Path(name).exists():
        raise FileNotFoundError(
            f"{name} holds no config.json, so it is no model folder; train.py leaves one in OUT/model"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # of httpx, of huggingface_hub, of the file system
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"there is no model folder {name}, nor could it be loaded from the Hub: {reason}"
        ) from error


def load_model(folder: Path) -> tuple[TqdmForSemanticSegmentation, TqdmImageProcessor]:
    """Model, ready to predict, and image processor; raises ValueError for other models and for missing weights."""
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind != TqdmConfig.model_type:
        raise ValueError(f"{folder} holds a model of type {kind}, not {TqdmConfig.model_type}")
    model, loading = TqdmForSemanticSegmentation.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} weights, such as {missing[0]}; save or convert the model anew")
    return model.eval(), TqdmImageProcessor.from_pretrained(folder)


def identity(folder: Path) -> dict[str, Any]:
    """What tells one model from another, wherever it lies: checksums of its files, and the code that runs it."""
    files = [*sorted(folder.glob("*.safetensors")), *(folder / name for name in _CONFIGURATIONS)]
    try:
        version = metadata.version("tqdm-segmentation")
    except metadata.PackageNotFoundError:
        version = None
    return {"sha256": {path.name: file_sum(path) for path in files}, "commit": code_commit(), "version": version}


def file_sum(path: Path) -> str:
    """SHA-256 of a file, read piece by piece."""
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def code_commit() -> str | None:
    """Commit of the checkout that this file lies in, "with changes" if its Python differs; None outside of one."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(here), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != here:
            return None
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "--", "*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def save_model_folder(
    model: TqdmForSemanticSegmentation,
    processor: TqdmImageProcessor,
    folder: str | Path,
    texts: dict[str, str] | None = None,
) -> None:
    """Writes a folder that the Auto classes and `pipeline` load with trust_remote_code=True.

    texts: further files by name, such as the card, README.md.

    Raises FileExistsError, and changes nothing, when `folder` holds files that would be lost.
    """
    type(model.config).register_for_auto_class()
    type(model).register_for_auto_class("AutoModelForSemanticSegmentation")
    type(processor).register_for_auto_class("AutoImageProcessor")
    # Saving adds the entries of the three registered classes.
    model.config.auto_map = {"AutoModel": "modeling_tqdm.TqdmModel"}
    with written_whole(Path(folder)) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        for name, text in (texts or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        lost = sorted(set(os.listdir(folder)) - set(os.listdir(temporary))) if Path(folder).exists() else []
        if lost:
            raise FileExistsError(f"{folder} also holds {', '.join(lost[:5])}; choose a new folder, or empty this one")


def push_folder(folder: Path, repository: str) -> str:
    """Makes the Hub repository NAME/REPO if it is new and uploads the folder; returns its address.

    The endpoint is huggingface_hub's (HF_ENDPOINT, HF_TOKEN). Raises OSError, with the command that tries again, when
    it does not answer or refuses; the folder stays as it is.
    """
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        return str(
            api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Upload of a trained model")
        )
    except Exception as error:  # of httpx, of huggingface_hub, of the token file
        raise OSError(
            f"{repository} could not be pushed ({type(error).__name__}: {error}); nothing is lost, try again with: "
            f"hf upload {repository} {shlex.quote(str(folder))} ."
        ) from error
