"""tqdm, the Textual Query-Driven Mask Transformer, and everything around it.

    tqdm_seg.train(data=..., out=...)      and predict, evaluate, compare, table, report, convert, export, check, audit
    tqdm_seg.ablate(data=..., test=...)    trains variants and seeds, tests them anywhere
    tqdm_seg.prepare_gta5(root=..., out=...)   and prepare_ of acdc, bdd100k, cityscapes, folder, mapillary, orfd, ...
    tqdm_seg.TqdmForSemanticSegmentation   and TqdmConfig, TqdmImageProcessor

The model lies flat at the root of the repository, as the Hub wants it. In a checkout the root is the second place in
which this package looks for its modules; a wheel holds them in here. Names are imported when first asked for.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from .commands import SOURCES

if TYPE_CHECKING:
    from .ablate import ablate as ablate
    from .configuration_tqdm import TqdmConfig as TqdmConfig
    from .data.audit import audit as audit
    from .data.check import check as check
    from .data.sources.acdc import prepare_acdc as prepare_acdc
    from .data.sources.bdd100k import prepare_bdd100k as prepare_bdd100k
    from .data.sources.cityscapes import prepare_cityscapes as prepare_cityscapes
    from .data.sources.folder import prepare_folder as prepare_folder
    from .data.sources.gta5 import prepare_gta5 as prepare_gta5
    from .data.sources.mapillary import prepare_mapillary as prepare_mapillary
    from .data.sources.orfd import prepare_orfd as prepare_orfd
    from .data.sources.road3d import prepare_road3d as prepare_road3d
    from .data.sources.synthia import prepare_synthia as prepare_synthia
    from .deploy.convert import convert as convert
    from .deploy.export import export as export
    from .deploy.predict import predict as predict
    from .evaluation.evaluate import evaluate as evaluate
    from .image_processing_tqdm import TqdmImageProcessor as TqdmImageProcessor
    from .modeling_tqdm import TqdmForSemanticSegmentation as TqdmForSemanticSegmentation
    from .reports.compare import compare as compare
    from .reports.report import report as report
    from .reports.table import table as table
    from .train import train as train

__version__ = "0.2.0"

_ROOT = Path(__file__).parents[1]
if (_ROOT / "modeling_tqdm.py").is_file():
    __path__.append(str(_ROOT))

_PLACES = {
    "TqdmConfig": "configuration_tqdm", "TqdmImageProcessor": "image_processing_tqdm",
    "TqdmForSemanticSegmentation": "modeling_tqdm",
    "ablate": "ablate", "audit": "data.audit", "check": "data.check", "compare": "reports.compare",
    "convert": "deploy.convert", "evaluate": "evaluation.evaluate", "export": "deploy.export",
    "predict": "deploy.predict", "report": "reports.report",
    "table": "reports.table", "train": "train",
    **{f"prepare_{name}": f"data.sources.{name}" for name in SOURCES},
}  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module 'tqdm_seg' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tqdm_seg.{_PLACES[name]}"), name)


class _Package(ModuleType):
    """Keeps `tqdm_seg.train` the function: importing the module of this name would put the module in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _PLACES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
