"""A model folder as the Hub wants it: weights, configurations, the code that reads them, and a card."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    model: TqdmForSemanticSegmentation, processor: TqdmImageProcessor, folder: str | Path, card: str | None = None
) -> None:
    """Writes a folder that the Auto classes and `pipeline` load with trust_remote_code=True; `card`: its README.md.

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
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")
        lost = sorted(set(os.listdir(folder)) - set(os.listdir(temporary))) if Path(folder).exists() else []
        if lost:
            raise FileExistsError(f"{folder} also holds {', '.join(lost[:5])}; choose a new folder, or empty this one")
