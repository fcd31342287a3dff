"""A model folder as the Hub wants it: weights, configurations, the code that reads them, and a card."""

import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi

from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` once the block has ended well and all is on disk."""
    folder = folder.resolve()
    temporary, old = (folder.with_name(f".{folder.name}.{word}") for word in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            _fsync(path)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)  # not deleted yet: at every moment one whole version is on disk
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    _fsync(folder.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


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
