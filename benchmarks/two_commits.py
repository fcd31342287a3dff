"""Speed of the same model in two checkouts, in turns in one run.

    python benchmarks/two_commits.py --before ../old --before-call tqdm_seg.modes_tqdm.prepare [--preset clip_vit_b16]

Measures `segment_labels` of random weights in float32 after a call that makes the model fast. The ratio of the speeds
and the difference of the scores are in the table that it prints.
"""

import importlib
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from measure import Settings, Work, main, measure, results_table

from tqdm_seg.program import option, size


@dataclass(kw_only=True)
class CommitSettings(Settings):
    """Options."""

    before: Path = option(flag=True, help="checkout, or the folder that holds its tqdm_seg")
    before_call: str = option("tqdm_seg.deploy.speed.ready_to_predict", help="MODULE.FUNCTION (default: %(default)s)")
    after: Path = option(Path(__file__).parents[1], help="another one (default: this one)")
    after_call: str = option("tqdm_seg.deploy.speed.ready_to_predict", help="MODULE.FUNCTION (default: %(default)s)")
    preset: str = option("clip_vit_b16", help="(default: %(default)s)")
    size: tuple[int, int] = option((512, 512), type=size, metavar="HxW", help="of the image (default: 512x512)")


def build(checkout: str, call: str, preset: str, shape: tuple[int, int], device: torch.device) -> Work:
    """The model of a checkout; forgets what was imported from this one."""
    for name in [name for name in sys.modules if name.split(".")[0] == "tqdm_seg"]:
        del sys.modules[name]
    sys.path.insert(0, checkout)
    modeling = importlib.import_module("tqdm_seg.modeling_tqdm")
    config = importlib.import_module("tqdm_seg.configuration_tqdm").TqdmConfig.from_preset(preset)
    module, _, function = call.rpartition(".")
    torch.manual_seed(0)
    model = modeling.TqdmForSemanticSegmentation(config).eval().to(device).requires_grad_(False)
    model = getattr(importlib.import_module(module), function)(model)

    def image(number: int) -> torch.Tensor:
        return torch.randn(1, 3, *shape, generator=torch.Generator().manual_seed(number)).to(device)

    return Work(model.segment_labels, image, numbers=model.segment, notes=modeling.__file__)


def measure_commits(settings: CommitSettings) -> int:
    """Prints a table; returns the exit status."""
    checkouts = {"before": (settings.before, settings.before_call), "after": (settings.after, settings.after_call)}
    results = measure(
        {
            name: partial(build, str(path.absolute()), call, settings.preset, settings.size)
            for name, (path, call) in checkouts.items()
        },
        settings,
    )
    print(results_table(results, ["before"]), *(f"{result.name}: {result.notes}" for result in results), sep="\n")
    return int(any(result.error for result in results))


if __name__ == "__main__":
    main(measure_commits, CommitSettings, __doc__)
