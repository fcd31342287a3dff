"""The programs of this package: where their options and functions lie, and how one is started.

Only the options are imported before the command line is parsed, so that help and errors of use are immediate.
"""

import importlib
import logging
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from .program import DEBUG, parse, run


class Command(NamedTuple):
    """Where the options class and the function of a command lie, as MODULE:NAME in this package, and what it does."""

    options: str
    function: str
    summary: str


SOURCES = ("acdc", "bdd100k", "cityscapes", "folder", "gta5", "mapillary", "orfd", "road3d", "rugd", "synthia", "ycor")
COMMANDS = {
    "train": Command("training.options:TrainOptions", "train:train", "train a model"),
    "predict": Command("deploy.options:PredictOptions", "deploy.predict:predict", "segment images and videos"),
    "evaluate": Command("evaluation.options:EvaluateOptions", "evaluation.evaluate:evaluate", "score a model"),
    "compare": Command("reports.options:CompareOptions", "reports.compare:compare", "compare two evaluations"),
    "table": Command("reports.options:TableOptions", "reports.table:table", "one table over runs, sets and seeds"),
    "report": Command("reports.options:ReportOptions", "reports.report:report", "make an HTML page of an evaluation"),
    "convert": Command(
        "deploy.options:ConvertOptions", "deploy.convert:convert", "published or CLIP weights to a model folder"
    ),
    "export": Command("deploy.options:ExportOptions", "deploy.export:export", "write ONNX and torch.export files"),
    **{
        f"prepare {name}": Command(
            f"data.options:{name.capitalize()}Options", f"data.sources.{name}:prepare_{name}", f"{name} to shards"
        )
        for name in SOURCES
    },
    "check": Command("data.options:CheckOptions", "data.check:check", "verify prepared datasets"),
    "audit": Command("data.options:AuditOptions", "data.audit:audit", "find test scenes that leaked from training"),
    "ablate": Command(
        "training.options:AblateOptions", "ablate:ablate", "train variants and seeds, test them elsewhere, one table"
    ),
    "env": Command("env:EnvOptions", "env:env", "versions, devices and commit, for a bug report"),
}


def named(place: str) -> Any:
    """What MODULE:NAME of this package stands for."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"tqdm_seg.{module}"), name)


def start(name: str, argv: Sequence[str] | None = None) -> int:
    """Runs one command; its exit status. The program's own file may be called instead: `python train.py ...`."""
    argv = sys.argv[1:] if argv is None else argv
    command = COMMANDS[name]
    # transformers imports torchao, which makes torch warn.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    options = named(command.options)
    chosen = parse(options, options.__doc__, argv, f"tqdm-seg {name}")

    def work() -> object:
        result = named(command.function).__wrapped__(chosen)
        return result if isinstance(result, int) else 0

    return run(work, DEBUG in argv, chosen)
