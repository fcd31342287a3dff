"""A model folder's self-check: scores of two small images, stored at saving, compare a loaded model with the saved one.

Missing or exchanged weights, wrong folding and bad quantisation show within a second.
"""

from pathlib import Path

import torch
from torch import Tensor

from tqdm_seg.configuration_tqdm import TqdmConfig
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

from ..data.files import read_json, write_json

FILE = "self_check.json"

# Mean difference of scores, as a share of their mean, that other machines and number formats stay below.
TOLERANCES = {"fp32": 0.005, "tf32": 0.02, "bf16": 0.05, "fp16": 0.05, "int8": 0.1}

_GRID = 5  # scores are stored at this many positions per side


def check_images(config: TqdmConfig) -> list[Tensor]:
    """Two images (1, 3, h, w) made of integers alone, the same everywhere; the second one is no whole patches."""
    patch = config.vision_config.patch_size
    channels = config.vision_config.num_channels
    images = []
    for height, width in ((6 * patch, 8 * patch), (5 * patch + 3, 4 * patch + 1)):
        channel, y, x = (torch.arange(n) for n in (channels, height, width))
        waves = (7 * y[:, None] + 5 * x + 3 * y[:, None] * x // patch + 31 * channel[:, None, None]) % 97
        images.append((waves.float() / 24 - 2)[None])
    return images


@torch.no_grad()
def check_scores(model: TqdmForSemanticSegmentation) -> dict[str, list[float]]:
    """The model's scores of the images on a grid, a flat list for the text of every query; the mode stays."""
    training = model.training
    model.train(False)
    grids = []
    for image in check_images(model.config):
        scores = model.score(image.to(model.device, model.dtype))[0].float().cpu()  # (K, h, w)
        rows, columns = (torch.linspace(0, n - 1, _GRID).round().long() for n in scores.shape[-2:])
        grids.append(scores[:, rows][:, :, columns].flatten(1))
    if training:
        model.train()
    values = torch.cat(grids, 1)
    if not values.isfinite().all():
        raise ValueError("the model's scores are not finite: its weights hold NaN or inf; train or convert it again")
    return dict(zip(query_texts(model.config), values.tolist(), strict=True))


def query_texts(config: TqdmConfig) -> list[str]:
    """The text of every query, in id order."""
    return list(getattr(config, "query_texts", None) or config.class_names)


def check_model(model: TqdmForSemanticSegmentation, folder: Path, precision: str = "fp32") -> None:
    """Prints how near the scores are to the stored ones; raises FileNotFoundError if none are stored, as `verify`."""
    share = verify(model, folder, precision)
    if share is None:
        raise FileNotFoundError(f"file not found: {folder / FILE}; leave --check out, or save the model again")
    print(f"self-check: scores differ by {share:.2%} from those the model was saved with")


def write_self_check(model: TqdmForSemanticSegmentation, folder: str | Path) -> None:
    """Writes the scores of the model, which the folder holds, into it. Raises ValueError for scores with NaN."""
    scores = {text: [round(value, 6) for value in values] for text, values in check_scores(model).items()}
    write_json(Path(folder) / FILE, {"scores": scores})


def verify(model: TqdmForSemanticSegmentation, folder: str | Path, precision: str = "fp32") -> float | None:
    """The model's mean difference from the scores in the folder, as a share of them; None for a folder without any.

    Raises ValueError when it is above `TOLERANCES[precision]`, for other classes and for a damaged file.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    stored = read_json(path, {"scores": {str: list}}, "save or download the model again")["scores"]
    try:
        expected = {text: torch.tensor(values, dtype=torch.float32) for text, values in stored.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no scores by text; save or download the model again") from error
    found = {text: torch.tensor(values) for text, values in check_scores(model).items()}
    if found.keys() != expected.keys() or any(found[text].shape != expected[text].shape for text in found):
        raise ValueError(f"{path} is of other classes than the model; save the model again")
    difference = sum((found[text] - expected[text]).abs().sum() for text in found)
    share = float(difference / sum(values.abs().sum() for values in expected.values()).clamp(min=1e-6))
    if not share <= TOLERANCES[precision]:
        raise ValueError(
            f"{path}: the loaded model's scores differ by {share:.1%} from those it was saved with, more than "
            f"{TOLERANCES[precision]:.1%} ({precision}): weights are missing, damaged or of another model; download or "
            "convert it again"
        )
    return share
